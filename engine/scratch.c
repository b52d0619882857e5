/* The memory of a step and of the KV pages, sized once, so that a warm step allocates nothing. */
#include "engine/state.h"

#include <math.h>

/* Hands out 64-aligned parts of one region; the first pass only adds sizes up (base NULL). */
typedef struct carver {
    uint8_t *base;
    size_t at;
} carver;

static void *carve(carver *c, size_t n, size_t bytes)
{
    void *p = c->base == NULL ? NULL : c->base + c->at;
    c->at += (n * bytes + 63) & ~(size_t)63;
    return p;
}

static size_t max_of(size_t a, size_t b)
{
    return a > b ? a : b;
}

static void carve_rows(choir_engine *e, carver *c)
{
    step *s = &e->step;
    const choir_model_config *m = &e->config;
    size_t n = e->options.max_rows, half = m->rope.rotary_dims / 2, attended = choir_attended(m);
    size_t keys = (size_t)choir_kv_heads(m) * choir_key_dim(m);
    size_t values = choir_is_latent(m) ? 0 : (size_t)m->n_kv_heads * m->head_dim;
    s->rows = carve(c, n, sizeof *s->rows);
    s->outputs = carve(c, n, sizeof *s->outputs);
    s->output_status = carve(c, n, sizeof *s->output_status);
    s->first_row = carve(c, e->options.max_spans, sizeof *s->first_row);
    s->order = carve(c, e->options.max_spans, sizeof *s->order);
    s->runs = carve(c, e->options.max_spans, sizeof *s->runs);
    s->fetch = carve(c, e->n_threads, sizeof *s->fetch);
    s->fetch_ranges = carve(c, (size_t)e->n_threads * MAX_FETCHED, sizeof *s->fetch_ranges);
    s->run_of = carve(c, n, sizeof *s->run_of);
    s->items = carve(c, n * choir_head_groups(m), sizeof *s->items);
    s->x = carve(c, n * m->hidden, sizeof(float));
    s->h = carve(c, n * m->hidden, sizeof(float));
    s->rope.cos = carve(c, n * half, sizeof(float));
    s->rope.sin = carve(c, n * half, sizeof(float));
    size_t window_half = m->window_rope.theta > 0 ? half : 0;
    s->window_rope.cos = carve(c, n * window_half, sizeof(float));
    s->window_rope.sin = carve(c, n * window_half, sizeof(float));
    s->q = carve(c, n * m->n_heads * m->head_dim, sizeof(float));
    s->k = carve(c, n * keys, sizeof(float));
    s->v = carve(c, n * values, sizeof(float));
    s->att = carve(c, n * attended, sizeof(float));
    s->q8_att = carve(c, 1, choir_acts_q8_bytes((uint32_t)n, (uint32_t)attended));
    size_t head_rows = n < HEAD_ROWS ? n : HEAD_ROWS;
    size_t probe_kv = choir_probe_pages(e) * (choir_kv_page_bytes(e) / m->n_layers);
    s->logits = carve(c, 1, max_of(head_rows * m->vocab * sizeof(float), probe_kv));
    s->gate_entropy = carve(c, choir_probe_rows(e), sizeof(float));
}

static void carve_latents(choir_engine *e, carver *c)
{
    step *s = &e->step;
    const choir_model_config *m = &e->config;
    uint32_t n = e->options.max_rows, part = (uint32_t)max_of(m->nope_dim, m->kv_lora_rank);
    if (!choir_is_latent(m)) return;
    size_t heads = (size_t)n * m->n_heads;
    s->q_latent = carve(c, (size_t)n * m->q_lora_rank, sizeof(float));
    s->q8_latent = carve(c, 1, choir_acts_q8_bytes(n, m->q_lora_rank));
    s->by_head = carve(c, heads * part, sizeof(float));
    s->q8_by_head_bytes = (choir_acts_q8_bytes(n, part) + 63) & ~(size_t)63;
    s->q8_by_head = carve(c, m->n_heads, s->q8_by_head_bytes);
    s->q_wide = carve(c, heads * choir_key_dim(m), sizeof(float));
    s->att_wide = carve(c, heads * m->kv_lora_rank, sizeof(float));
}

/* What every row's expert needs: the dense FFN, or the shared one. */
static void carve_always(choir_engine *e, carver *c)
{
    step *s = &e->step;
    const choir_model_config *m = &e->config;
    size_t n = e->options.max_rows, ffn = max_of(m->ffn_hidden, m->shared_hidden);
    s->always_gate = carve(c, n * ffn, sizeof(float));
    s->always_up = carve(c, n * ffn, sizeof(float));
    s->always_weight = carve(c, n, sizeof(float));
    s->q8_always = carve(c, 1, choir_acts_q8_bytes((uint32_t)n, (uint32_t)ffn));
}

/* A step's slots by expert: each expert's area is padded, hence the rows beyond n * k. */
static void carve_slots(choir_engine *e, carver *c)
{
    step *s = &e->step;
    const choir_model_config *m = &e->config;
    size_t n = e->options.max_rows, n_experts = m->n_experts, n_slots = n * m->n_experts_used;
    uint32_t ffn = m->expert_hidden, padded = (uint32_t)(n_slots + 16 * n_experts);
    s->q8_h_bytes = choir_acts_q8_bytes((uint32_t)max_of(n, padded), m->hidden) + 64 * n_experts;
    s->q8_h = carve(c, 1, s->q8_h_bytes);
    /* Rows for all and slots of experts are there at once only beside a shared expert. */
    s->q8_rows = s->q8_h;
    if (m->shared_hidden > 0) s->q8_rows = carve(c, 1, choir_acts_q8_bytes((uint32_t)n, m->hidden));
    if (n_experts == 0) return;
    s->gate = carve(c, n_slots * ffn, sizeof(float));
    s->up = carve(c, n_slots * ffn, sizeof(float));
    s->q8_ffn_bytes = choir_acts_q8_bytes(padded, ffn) + 64 * n_experts;
    s->q8_ffn = carve(c, 1, s->q8_ffn_bytes);
    s->q8_in_at = carve(c, n_experts, sizeof *s->q8_in_at);
    s->q8_ffn_at = carve(c, n_experts, sizeof *s->q8_ffn_at);
    s->pinned = carve(c, n_experts, sizeof *s->pinned);
    s->computed = carve(c, n_experts, sizeof *s->computed);
    s->wanted = carve(c, n_experts, sizeof *s->wanted);
    s->uses = carve(c, n_experts, sizeof *s->uses);
    s->missing = carve(c, n_experts, sizeof *s->missing);
    s->wave = carve(c, n_experts, sizeof *s->wave);
    s->arrived = carve(c, n_experts, sizeof *s->arrived);
    s->predict_h = carve(c, PREDICT_ROWS * m->hidden, sizeof(float));
    s->predict_logits = carve(c, PREDICT_ROWS * n_experts, sizeof(float));
    s->votes = carve(c, n_experts, sizeof *s->votes);
    s->router_logits = carve(c, n * m->n_experts, sizeof(float));
    s->slot_in = carve(c, n_slots * m->hidden, sizeof(float));
    s->slot_out = carve(c, n_slots * m->hidden, sizeof(float));
}

static void carve_workers(choir_engine *e, carver *c)
{
    step *s = &e->step;
    const choir_model_config *m = &e->config;
    size_t floats = e->options.exact ? m->max_positions
                                     : choir_attention_scratch_floats(m->n_heads, choir_key_dim(m),
                                                                      choir_kv_value_dim(m));
    s->attention_scratch = carve(c, e->n_threads, sizeof *s->attention_scratch);
    s->sampler_scratch = carve(c, e->n_threads, sizeof *s->sampler_scratch);
    for (uint32_t i = 0; i < e->n_threads; i++) {
        float *attention = carve(c, floats, sizeof(float));
        void *sampler = carve(c, m->vocab, 8);
        if (c->base == NULL) continue;
        s->attention_scratch[i] = attention;
        s->sampler_scratch[i] = sampler;
    }
}

static void carve_all(choir_engine *e, carver *c)
{
    carve_rows(e, c);
    carve_latents(e, c);
    carve_always(e, c);
    carve_slots(e, c);
    carve_workers(e, c);
}

size_t choir_step_bytes(choir_engine *e)
{
    carver sizes = {NULL, 0};
    carve_all(e, &sizes);
    return sizes.at;
}

choir_status choir_step_create(choir_engine *e)
{
    e->scratch_bytes = choir_step_bytes(e);
    e->scratch = choir_alloc_pages(CHOIR_MEM_SCRATCH, e->scratch_bytes);
    if (e->scratch == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a step of %u rows (%zu bytes)",
                          e->options.max_rows, e->scratch_bytes);
    carver parts = {e->scratch, 0};
    carve_all(e, &parts);
    if (e->config.n_experts == 0) return CHOIR_OK;
    CHOIR_TRY(choir_plan_create(PREDICT_ROWS, e->config.n_experts, e->config.n_experts_used,
                                &e->step.prediction));
    return choir_plan_create(e->options.max_rows, e->config.n_experts, e->config.n_experts_used,
                             &e->step.plan);
}

void choir_step_destroy(choir_engine *e)
{
    choir_plan_destroy(e->step.plan);
    choir_plan_destroy(e->step.prediction);
    choir_adapt_free(e);
    choir_free_pages(CHOIR_MEM_SCRATCH, e->scratch, e->scratch_bytes);
}

size_t choir_kv_page_bytes(const choir_engine *e)
{
    size_t element = e->options.exact ? sizeof(float) : sizeof(uint16_t);
    return CHOIR_PAGE_TOKENS * choir_kv_numbers(&e->config) * element * e->config.n_layers;
}

choir_status choir_kv_create(choir_engine *e)
{
    e->page_bytes = choir_kv_page_bytes(e);
    e->layer_kv_bytes = e->page_bytes / e->config.n_layers;
    uint64_t wanted = e->options.kv_bytes / e->page_bytes;
    if (e->options.kv_bytes == 0)
        wanted = (e->options.max_rows + CHOIR_PAGE_TOKENS - 1) / CHOIR_PAGE_TOKENS;
    if (wanted == 0 || wanted > UINT32_MAX / 2)
        return choir_fail(
            CHOIR_E_INVALID, "%llu bytes for KV pages, one page of %d tokens has %zu bytes",
            (unsigned long long)e->options.kv_bytes, CHOIR_PAGE_TOKENS, e->page_bytes);
    e->n_pages = (uint32_t)wanted;
    e->kv_bytes = (size_t)wanted * e->page_bytes;
    e->kv = choir_alloc_pages(CHOIR_MEM_KV, e->kv_bytes);
    if (e->kv == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u KV pages (%zu bytes)", e->n_pages,
                          e->kv_bytes);
    return CHOIR_OK;
}
