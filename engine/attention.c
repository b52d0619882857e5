/* x += Wo attention(rope(Wq norm(x)), KV): grouped-query attention over paged KV (Ainslie et al.
 * 2023; Kwon et al. 2023), and the latent attention of DeepSeek. */
#include "engine/state.h"

#include <math.h>
#include <string.h>

/* Where head `head` of K (part 0) or V (part 1) begins in a page of this layer, in elements. */
static size_t kv_offset(const choir_model_config *c, uint32_t part, uint32_t head, uint32_t token)
{
    size_t heads = choir_kv_heads(c), key = choir_key_dim(c), value = choir_kv_value_dim(c);
    size_t at = head * CHOIR_PAGE_TOKENS + token;
    if (part == 0 || choir_is_latent(c)) return at * key;
    return heads * CHOIR_PAGE_TOKENS * key + at * value;
}

static uint8_t *kv_of(choir_engine *e, uint32_t l, uint32_t page)
{
    const kv_view *kv = &e->step.kv;
    return kv->base + page * kv->page_bytes + l * kv->layer_bytes;
}

static uint32_t window_of(const choir_engine *e, uint32_t l)
{
    return (e->layers[l].flags & CHOIR_LAYER_WINDOW) != 0 ? e->config.sliding_window : 0;
}

static uint32_t chunk_of(const choir_engine *e, uint32_t l)
{
    return (e->layers[l].flags & CHOIR_LAYER_CHUNKED) != 0 ? e->config.attention_chunk : 0;
}

static void add_bias(const choir_engine *e, float *x, const float *bias, uint32_t n)
{
    if (bias != NULL) e->kernels->add(x, bias, n);
}

/* Norms of q and k, over each head or over the full width, as the model has it. */
static void norm_heads(const choir_engine *e, float *x, const float *weight, uint32_t n_heads)
{
    const choir_model_config *c = &e->config;
    if (weight == NULL && !c->qk_norm_unweighted) return;
    bool full = c->qk_norm == CHOIR_QK_NORM_FULL;
    uint32_t n = full ? n_heads * c->head_dim : c->head_dim;
    for (uint32_t i = 0; i < (full ? 1 : n_heads); i++)
        e->kernels->rms_norm(x + (size_t)i * n, weight, c->norm_eps, n, x + (size_t)i * n);
}

/* Turns the `rotary_dims` of each of n_heads that lie `stride` apart. */
static void rotate(const choir_engine *e, uint32_t l, size_t i, float *x, uint32_t n_heads,
                   size_t stride)
{
    bool local = e->window_rope != NULL && (e->layers[l].flags & CHOIR_LAYER_WINDOW) != 0;
    const choir_rope_config *r = local ? &e->config.window_rope : &e->config.rope;
    const rope_rows *rows = local ? &e->step.window_rope : &e->step.rope;
    size_t half = r->rotary_dims / 2;
    for (uint32_t head = 0; head < n_heads; head++)
        e->kernels->rope(x + head * stride, r->rotary_dims, e->config.rope.interleaved,
                         rows->cos + i * half, rows->sin + i * half);
}

/* Layers without rope sharpen late positions' queries (Nakanishi 2025; Llama 4). */
static void warm(const choir_engine *e, float *q, uint32_t n, uint32_t position)
{
    const choir_model_config *c = &e->config;
    float steps = floorf(((float)position + 1.0F) / c->temperature_floor);
    float scale = log1pf(steps) * c->temperature_scale + 1.0F;
    for (uint32_t d = 0; d < n; d++) q[d] *= scale;
}

static void write_kv(choir_engine *e, uint32_t l, size_t i, uint32_t part, const float *from)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    const choir_span *span = &s->spans[s->rows[i].span];
    uint32_t position = s->rows[i].position, token = position % CHOIR_PAGE_TOKENS;
    uint32_t n = part == 0 ? choir_key_dim(c) : choir_kv_value_dim(c);
    const float *prefix = choir_adapt_prefix(e, l, i, part);
    if (prefix != NULL) from = prefix;
    uint8_t *page = kv_of(e, l, span->pages[position / CHOIR_PAGE_TOKENS]);
    for (uint32_t head = 0; head < choir_kv_heads(c); head++, from += n) {
        size_t at = kv_offset(c, part, head, token);
        if (e->options.exact)
            memcpy((float *)page + at, from, n * sizeof *from);
        else
            e->kernels->f32_to_f16(from, n, (uint16_t *)page + at);
    }
}

/* Biases, norms, rope of q, k and v; k and v go to their pages. */
static void finish_qkv(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    const layer *w = &e->layers[l];
    uint32_t hd = c->head_dim, n_q = c->n_heads, n_kv = c->n_kv_heads;
    bool roped = (w->flags & CHOIR_LAYER_NO_ROPE) == 0;
    /* Norms without weights belong to rope (Llama 4). */
    bool normed = !c->qk_norm_unweighted || roped;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        float *q = s->q + i * n_q * hd, *k = s->k + i * n_kv * hd, *v = s->v + i * n_kv * hd;
        add_bias(e, q, w->q_bias, n_q * hd);
        add_bias(e, k, w->k_bias, n_kv * hd);
        add_bias(e, v, w->v_bias, n_kv * hd);
        for (int after = 0; after < 2; after++) {
            if (normed && c->qk_norm_after_rope == (after != 0)) {
                norm_heads(e, q, w->q_norm, n_q);
                norm_heads(e, k, w->k_norm, n_kv);
            }
            if (after != 0 || !roped) continue;
            rotate(e, l, i, q, n_q, hd);
            rotate(e, l, i, k, n_kv, hd);
        }
        if (!roped && c->temperature_floor > 0) warm(e, q, n_q * hd, s->rows[i].position);
        write_kv(e, l, i, 0, k);
        write_kv(e, l, i, 1, v);
    }
}

/* Exact mode: one query head over f32 KV, two passes, sums in double. */
static void attend_exactly(choir_engine *e, uint32_t l, const attention_item *item, size_t i,
                           uint32_t head, const float *q, float *out, float *scores)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    const uint32_t *pages = s->spans[item->span].pages;
    uint32_t key_dim = choir_key_dim(c), value_dim = choir_kv_value_dim(c);
    uint32_t position = s->rows[i].position;
    uint32_t first = choir_first_key(position, window_of(e, l), chunk_of(e, l));
    const float *sinks = e->layers[l].sinks;
    double max = sinks != NULL ? (double)sinks[head] : -INFINITY, acc[CHOIR_MAX_HEAD_DIM] = {0};
    for (uint32_t t = first; t <= position; t++) {
        const float *k = (float *)kv_of(e, l, pages[t / CHOIR_PAGE_TOKENS]) +
                         kv_offset(c, 0, item->kv_head, t % CHOIR_PAGE_TOKENS);
        float dot = 0;
        for (uint32_t d = 0; d < key_dim; d++) dot += q[d] * k[d];
        scores[t] = dot * c->attention_scale;
        if (c->attention_softcap != 0)
            scores[t] = c->attention_softcap * tanhf(scores[t] / c->attention_softcap);
        if (scores[t] > max) max = scores[t];
    }
    double sum = sinks != NULL ? exp(sinks[head] - max) : 0;
    for (uint32_t t = first; t <= position; t++) {
        const float *v = (float *)kv_of(e, l, pages[t / CHOIR_PAGE_TOKENS]) +
                         kv_offset(c, 1, item->kv_head, t % CHOIR_PAGE_TOKENS);
        double p = exp(scores[t] - max);
        sum += p;
        for (uint32_t d = 0; d < value_dim; d++) acc[d] += p * v[d];
    }
    for (uint32_t d = 0; d < value_dim; d++) out[d] = (float)(acc[d] / sum);
}

static void attend(choir_engine *e, uint32_t l, const attention_item *item, uint32_t worker)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    bool latent = choir_is_latent(c);
    size_t key_dim = choir_key_dim(c), value_dim = choir_kv_value_dim(c);
    size_t at = (size_t)item->first_row * c->n_heads;
    const float *q = (latent ? s->q_wide : s->q) + at * key_dim;
    float *out = (latent ? s->att_wide : s->att) + at * value_dim;
    if (e->options.exact) {
        for (uint32_t n = 0; n < item->n_queries; n++)
            for (uint32_t head = item->first_head; head < item->first_head + item->n_heads;
                 head++) {
                size_t at_head = (size_t)n * c->n_heads + head;
                attend_exactly(e, l, item, item->first_row + n, head, q + at_head * key_dim,
                               out + at_head * value_dim, s->attention_scratch[worker]);
            }
        return;
    }
    e->kernels->attention(&(choir_attention_block){
        .q = q,
        .out = out,
        .n_queries = item->n_queries,
        .position = s->rows[item->first_row].position,
        .n_heads = c->n_heads,
        .n_kv_heads = choir_kv_heads(c),
        .kv_head = item->kv_head,
        .first_head = item->first_head,
        .n_block_heads = item->n_heads,
        .key_dim = (uint32_t)key_dim,
        .value_dim = (uint32_t)value_dim,
        .latent = latent,
        .page_tokens = CHOIR_PAGE_TOKENS,
        .window = window_of(e, l),
        .chunk = chunk_of(e, l),
        .scale = c->attention_scale,
        .softcap = c->attention_softcap,
        .sinks = e->layers[l].sinks,
        .pages = s->spans[item->span].pages,
        .kv = kv_of(e, l, 0),
        .page_stride = e->step.kv.page_bytes,
        .scratch = s->attention_scratch[worker],
    });
}

/* Items are taken by ticket: long and short sequences balance, and results do not depend on who. */
static void attend_all(choir_engine *e, uint32_t l, uint32_t worker)
{
    step *s = &e->step;
    for (;;) {
        uint32_t ticket = atomic_fetch_add_explicit(&s->next_item, 1, memory_order_relaxed);
        if (ticket >= s->n_items) return;
        /* Later items see longer contexts, so they are taken first. */
        attend(e, l, &s->items[s->n_items - 1 - ticket], worker);
    }
}

static void quantize_rows(choir_engine *e, const float *x, uint32_t cols, uint8_t *q8,
                          uint32_t worker, uint32_t n_workers)
{
    uint64_t begin, end;
    choir_share(e->step.n_rows, 1, worker, n_workers, &begin, &end);
    if (!e->options.exact && begin < end)
        e->kernels->quantize(x, cols, q8, (uint32_t)begin, (uint32_t)end);
}

/* -- latent attention (DeepSeek-AI 2024, section 2.1) --
 * Scores against keys W_k c are scores of W_k^T q against the latents c, and sums of values W_v c
 * are W_v of sums of latents: so the pages hold one latent a token, with the key's position beside
 * it, and every head attends to them as if they were its own. */

/* Latents of q and of keys get their norms, the key's position its rope; both go to the page. */
static void finish_latents(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    const layer *w = &e->layers[l];
    uint32_t rank = c->kv_lora_rank, width = choir_key_dim(c), q_rank = c->q_lora_rank;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        float *k = s->k + i * width, *q = s->q_latent + i * q_rank;
        e->kernels->rms_norm(k, w->kv_a_norm, c->latent_norm_eps, rank, k);
        rotate(e, l, i, k + rank, 1, 0);
        write_kv(e, l, i, 0, k);
        if (q_rank > 0) e->kernels->rms_norm(q, w->q_a_norm, c->latent_norm_eps, q_rank, q);
    }
    if (q_rank == 0) return;
    const adapt_target q_b = {.role = CHOIR_ROLE_ATTN_Q_B, .layer = l};
    choir_adapt_shrink(e, &q_b, (activations){s->q_latent, q_rank}, (uint32_t)begin, (uint32_t)end);
    quantize_rows(e, s->q_latent, q_rank, s->q8_latent, worker, n_workers);
}

/* Columns [at, at + n) of a head in every row, side by side; quantised unless exact. */
static void gather_head(choir_engine *e, const float *x, uint32_t head, size_t stride, size_t at,
                        uint32_t n)
{
    step *s = &e->step;
    float *to = s->by_head + (size_t)head * e->options.max_rows * n;
    for (size_t i = 0; i < s->n_rows; i++)
        memcpy(to + i * n, x + (i * e->config.n_heads + head) * stride + at, n * sizeof *to);
    if (!e->options.exact)
        e->kernels->quantize(to, n, s->q8_by_head + head * s->q8_by_head_bytes, 0, s->n_rows);
}

/* Each head's product with a matrix of its own, into rows of n_heads x width. */
static void multiply_head(choir_engine *e, const choir_matrix *w, const adapt_target *target,
                          uint32_t n, float *y, size_t width)
{
    uint32_t head = target->index;
    step *s = &e->step;
    const choir_acts in = {s->by_head + (size_t)head * e->options.max_rows * n,
                           s->q8_by_head + head * s->q8_by_head_bytes, s->n_rows, n};
    const activations rows = {in.x, n};
    size_t ldy = e->config.n_heads * width;
    e->kernels->matmul(w, &in, y + head * width, ldy, 0, w->rows);
    choir_adapt_shrink(e, target, rows, 0, s->n_rows);
    choir_adapt_expand(e, target, rows, s->n_rows, y + head * width, ldy, 0, w->rows);
}

/* A head's product is one worker's alone, which keeps A z of its rows for itself. */
static adapt_target head_target(const step *s, choir_role role, uint32_t l, uint32_t head,
                                uint32_t worker)
{
    return (adapt_target){
        .role = role, .layer = l, .index = head, .first = (size_t)worker * s->n_rows};
}

/* q's heads in terms of the latents, their positions turned and beside them. Workers take heads. */
static void widen_queries(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    size_t wide = choir_key_dim(c), rank = c->kv_lora_rank;
    uint64_t begin, end;
    choir_share(c->n_heads, 1, worker, n_workers, &begin, &end);
    for (uint32_t head = (uint32_t)begin; head < end; head++) {
        gather_head(e, s->q, head, c->head_dim, 0, c->nope_dim);
        const adapt_target t = head_target(s, CHOIR_ROLE_ATTN_K_B, l, head, worker);
        multiply_head(e, &e->layers[l].k_b[head], &t, c->nope_dim, s->q_wide, wide);
        for (size_t i = 0; i < s->n_rows; i++) {
            size_t at = i * c->n_heads + head;
            float *position = s->q_wide + at * wide + rank;
            memcpy(position, s->q + at * c->head_dim + c->nope_dim, c->rope_dim * sizeof *position);
            rotate(e, l, i, position, 1, 0);
        }
    }
}

static void narrow_values(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    uint64_t begin, end;
    choir_share(c->n_heads, 1, worker, n_workers, &begin, &end);
    for (uint32_t head = (uint32_t)begin; head < end; head++) {
        gather_head(e, s->att_wide, head, c->kv_lora_rank, 0, c->kv_lora_rank);
        const adapt_target t = head_target(s, CHOIR_ROLE_ATTN_V_B, l, head, worker);
        multiply_head(e, &e->layers[l].v_b[head], &t, c->kv_lora_rank, s->att, c->value_dim);
    }
}

static adapt_target input_target(choir_role role, uint32_t l, uint32_t buffer)
{
    return (adapt_target){.role = role, .layer = l, .buffer = buffer};
}

uint32_t choir_attention_inputs(const choir_engine *e, uint32_t l, adapt_target out[ADAPT_BUFFERS])
{
    static const choir_role direct[] = {CHOIR_ROLE_ATTN_Q, CHOIR_ROLE_ATTN_K, CHOIR_ROLE_ATTN_V};
    static const choir_role latent[] = {CHOIR_ROLE_ATTN_KV_A, CHOIR_ROLE_ATTN_Q,
                                        CHOIR_ROLE_ATTN_Q_A};
    bool is_latent = choir_is_latent(&e->config);
    for (uint32_t i = 0; i < 3; i++) /* Q and Q_A are never both there: they share a buffer. */
        out[i] = is_latent ? input_target(latent[i], l, i > 0) : input_target(direct[i], l, i);
    return l < e->config.n_layers ? 3 : 0;
}

/* What adapters want of the normed rows, by the worker that normed them. */
static void shrink_inputs(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    adapt_target inputs[ADAPT_BUFFERS];
    uint64_t begin, end;
    choir_share(e->step.n_rows, 1, worker, n_workers, &begin, &end);
    uint32_t n = choir_attention_inputs(e, l, inputs);
    for (uint32_t i = 0; i < n; i++)
        choir_adapt_shrink(e, &inputs[i], (activations){e->step.h, e->config.hidden},
                           (uint32_t)begin, (uint32_t)end);
}

static void make_latent_qkv(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const layer *w = &e->layers[l];
    bool compressed = e->config.q_lora_rank > 0;
    const product a[] = {
        {&w->kv_a, s->k, input_target(CHOIR_ROLE_ATTN_KV_A, l, 0)},
        {compressed ? &w->q_a : &w->q, compressed ? s->q_latent : s->q,
         input_target(compressed ? CHOIR_ROLE_ATTN_Q_A : CHOIR_ROLE_ATTN_Q, l, 1)}};
    const choir_acts in = {s->h, s->q8_h, s->n_rows, e->config.hidden};
    choir_multiply(e, a, 2, &in, NULL, worker, n_workers);
    choir_workers_sync(e->workers);

    finish_latents(e, l, worker, n_workers);
    choir_workers_sync(e->workers);

    if (compressed) {
        const product b = {&w->q, s->q, input_target(CHOIR_ROLE_ATTN_Q_B, l, 0)};
        const choir_acts latent = {s->q_latent, s->q8_latent, s->n_rows, e->config.q_lora_rank};
        choir_multiply(e, &b, 1, &latent, NULL, worker, n_workers);
        choir_workers_sync(e->workers);
    }
    widen_queries(e, l, worker, n_workers);
    choir_workers_sync(e->workers);
}

static void make_qkv(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const layer *w = &e->layers[l];
    const product qkv[] = {{&w->q, s->q, input_target(CHOIR_ROLE_ATTN_Q, l, 0)},
                           {&w->k, s->k, input_target(CHOIR_ROLE_ATTN_K, l, 1)},
                           {&w->v, s->v, input_target(CHOIR_ROLE_ATTN_V, l, 2)}};
    const choir_acts in = {s->h, s->q8_h, s->n_rows, e->config.hidden};
    const adapt_target out = input_target(CHOIR_ROLE_ATTN_OUT, l, 0);
    choir_multiply(e, qkv, 3, &in, &out, worker, n_workers);
    choir_workers_sync(e->workers);

    finish_qkv(e, l, worker, n_workers);
    choir_workers_sync(e->workers);
}

static void adapt_attended(choir_engine *e, const adapt_target *target, uint32_t width,
                           uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    choir_adapt_scale_inputs(e, target, s->att, width, (uint32_t)begin, (uint32_t)end, 0, width);
    choir_adapt_shrink(e, target, (activations){s->att, width}, (uint32_t)begin, (uint32_t)end);
}

void choir_phase_attention(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const layer *w = &e->layers[l];
    bool latent = choir_is_latent(&e->config);
    uint32_t width = choir_attended(&e->config);

    const layer_norm before = {&w->attn_norm, CHOIR_ROLE_ATTN_NORM, l};
    choir_norm_rows(e, before, s->h, s->q8_h, worker, n_workers);
    shrink_inputs(e, l, worker, n_workers);
    choir_workers_sync(e->workers);

    if (latent)
        make_latent_qkv(e, l, worker, n_workers);
    else
        make_qkv(e, l, worker, n_workers);

    attend_all(e, l, worker);
    choir_workers_sync(e->workers);

    if (latent) {
        narrow_values(e, l, worker, n_workers);
        choir_workers_sync(e->workers);
    }
    if (worker == 0) atomic_store_explicit(&s->next_item, 0, memory_order_relaxed);
    residual_product out = {.matrix = &w->out,
                            .bias = w->out_bias,
                            .post_norm = w->attn_post_norm,
                            .acts = {s->att, s->q8_att, s->n_rows, width},
                            .y = s->h,
                            .target = input_target(CHOIR_ROLE_ATTN_OUT, l, 0)};
    out.n_next = choir_ffn_inputs(e, l, out.next);
    adapt_attended(e, &out.target, width, worker, n_workers);
    quantize_rows(e, s->att, width, s->q8_att, worker, n_workers);
    choir_workers_sync(e->workers);

    choir_multiply_into_residual(e, &out, worker, n_workers);
}
