/* x += Wo attention(rope(Wq norm(x)), KV): grouped-query attention over paged KV (Ainslie et al. 2023;
 * Kwon et al. 2023). */
#include "engine/state.h"

#include <math.h>
#include <string.h>

/* Where head `head` of K (part 0) or V (part 1) begins in a page of this layer, in elements. */
static size_t kv_offset(const choir_model_config *c, uint32_t part, uint32_t head, uint32_t token)
{
    return (((size_t)part * c->n_kv_heads + head) * CHOIR_PAGE_TOKENS + token) * c->head_dim;
}

static uint8_t *kv_of(choir_engine *e, uint32_t l, uint32_t page)
{
    return e->kv + page * e->page_bytes + l * e->layer_kv_bytes;
}

static void add_bias(const choir_engine *e, float *x, const float *bias, uint32_t n)
{
    if (bias != NULL) e->kernels->add(x, bias, n);
}

/* Norms of q and k, over each head or over the full width, as the family has it. */
static void norm_heads(const choir_engine *e, float *x, const float *weight, uint32_t n_heads)
{
    if (weight == NULL) return;
    bool per_head = e->config.family->qk_norm == CHOIR_QK_NORM_HEAD;
    uint32_t n = per_head ? e->config.head_dim : n_heads * e->config.head_dim;
    for (uint32_t i = 0; i < (per_head ? n_heads : 1); i++)
        e->kernels->rms_norm(x + (size_t)i * n, weight, e->config.norm_eps, n, x + (size_t)i * n);
}

static void rotate_heads(const choir_engine *e, size_t i, float *x, uint32_t n_heads)
{
    const choir_rope_config *r = &e->config.rope;
    const float *cos = e->step.cos + i * (r->rotary_dims / 2);
    const float *sin = e->step.sin + i * (r->rotary_dims / 2);
    for (uint32_t head = 0; head < n_heads; head++)
        e->kernels->rope(x + (size_t)head * e->config.head_dim, r->rotary_dims, r->interleaved, cos,
                         sin);
}

static void write_kv(choir_engine *e, uint32_t l, size_t i)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    const choir_span *span = &s->spans[s->rows[i].span];
    uint32_t position = s->rows[i].position, token = position % CHOIR_PAGE_TOKENS;
    uint8_t *page = kv_of(e, l, span->pages[position / CHOIR_PAGE_TOKENS]);
    for (uint32_t part = 0; part < 2; part++) {
        const float *from = (part == 0 ? s->k : s->v) + i * c->n_kv_heads * c->head_dim;
        for (uint32_t head = 0; head < c->n_kv_heads; head++, from += c->head_dim) {
            size_t at = kv_offset(c, part, head, token);
            if (e->options.exact)
                memcpy((float *)page + at, from, c->head_dim * sizeof *from);
            else
                e->kernels->f32_to_f16(from, c->head_dim, (uint16_t *)page + at);
        }
    }
}

static void finish_qkv(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const layer *w = &e->layers[l];
    uint32_t hd = e->config.head_dim, n_q = e->config.n_heads, n_kv = e->config.n_kv_heads;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        float *q = s->q + i * n_q * hd, *k = s->k + i * n_kv * hd, *v = s->v + i * n_kv * hd;
        add_bias(e, q, w->q_bias, n_q * hd);
        add_bias(e, k, w->k_bias, n_kv * hd);
        add_bias(e, v, w->v_bias, n_kv * hd);
        norm_heads(e, q, w->q_norm, n_q);
        norm_heads(e, k, w->k_norm, n_kv);
        rotate_heads(e, i, q, n_q);
        rotate_heads(e, i, k, n_kv);
        write_kv(e, l, i);
    }
}

/* Exact mode: one query head over f32 KV, two passes, sums in double. */
static void attend_exactly(choir_engine *e, uint32_t l, const attention_item *item, size_t i,
                           uint32_t head, float *scores)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    const uint32_t *pages = s->spans[item->span].pages;
    uint32_t hd = c->head_dim, position = s->rows[i].position;
    uint32_t window = c->sliding_window;
    uint32_t first = window != 0 && position >= window ? position - window + 1 : 0;
    const float *q = s->q + (i * c->n_heads + head) * hd;
    float *out = s->att + (i * c->n_heads + head) * hd, scale = 1.0F / sqrtf((float)hd);
    double max = -INFINITY, sum = 0, acc[CHOIR_MAX_HEAD_DIM] = {0};
    for (uint32_t t = first; t <= position; t++) {
        const float *k = (float *)kv_of(e, l, pages[t / CHOIR_PAGE_TOKENS]) +
                         kv_offset(c, 0, item->kv_head, t % CHOIR_PAGE_TOKENS);
        float dot = 0;
        for (uint32_t d = 0; d < hd; d++) dot += q[d] * k[d];
        scores[t] = dot * scale;
        if (scores[t] > max) max = scores[t];
    }
    for (uint32_t t = first; t <= position; t++) {
        const float *v = (float *)kv_of(e, l, pages[t / CHOIR_PAGE_TOKENS]) +
                         kv_offset(c, 1, item->kv_head, t % CHOIR_PAGE_TOKENS);
        double p = exp(scores[t] - max);
        sum += p;
        for (uint32_t d = 0; d < hd; d++) acc[d] += p * v[d];
    }
    for (uint32_t d = 0; d < hd; d++) out[d] = (float)(acc[d] / sum);
}

static void attend(choir_engine *e, uint32_t l, const attention_item *item, uint32_t worker)
{
    step *s = &e->step;
    const choir_model_config *c = &e->config;
    if (e->options.exact) {
        uint32_t group = c->n_heads / c->n_kv_heads;
        for (uint32_t i = item->first_row; i < item->first_row + item->n_queries; i++)
            for (uint32_t g = 0; g < group; g++)
                attend_exactly(e, l, item, i, item->kv_head * group + g,
                               s->attention_scratch[worker]);
        return;
    }
    size_t at = (size_t)item->first_row * c->n_heads * c->head_dim;
    e->kernels->attention(&(choir_attention_block){
        .q = s->q + at,
        .out = s->att + at,
        .n_queries = item->n_queries,
        .position = s->rows[item->first_row].position,
        .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads,
        .kv_head = item->kv_head,
        .head_dim = c->head_dim,
        .page_tokens = CHOIR_PAGE_TOKENS,
        .window = c->sliding_window,
        .scale = 1.0F / sqrtf((float)c->head_dim),
        .pages = s->spans[item->span].pages,
        .kv = kv_of(e, l, 0),
        .page_stride = e->page_bytes,
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

static void quantize_attention(choir_engine *e, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    if (!e->options.exact && begin < end)
        e->kernels->quantize(s->att, e->config.n_heads * e->config.head_dim, s->q8_att,
                             (uint32_t)begin, (uint32_t)end);
}

void choir_phase_attention(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const layer *w = &e->layers[l];
    uint32_t width = e->config.n_heads * e->config.head_dim;

    choir_norm_rows(e, w->attn_norm, s->h, s->q8_h, worker, n_workers);
    choir_workers_sync(e->workers);

    const product qkv[] = {{&w->q, s->q}, {&w->k, s->k}, {&w->v, s->v}};
    const choir_acts in = {s->h, s->q8_h, s->n_rows, e->config.hidden};
    choir_multiply(e, qkv, 3, &in, worker, n_workers);
    choir_workers_sync(e->workers);

    finish_qkv(e, l, worker, n_workers);
    choir_workers_sync(e->workers);

    attend_all(e, l, worker);
    choir_workers_sync(e->workers);

    if (worker == 0) atomic_store_explicit(&s->next_item, 0, memory_order_relaxed);
    quantize_attention(e, worker, n_workers);
    choir_workers_sync(e->workers);

    const choir_acts att = {s->att, s->q8_att, s->n_rows, width};
    choir_multiply_into_residual(e, &w->out, &att, s->h, s->x, worker, n_workers);
    choir_workers_sync(e->workers);
}
