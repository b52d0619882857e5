/* The path of a token, read aloud. Every worker runs this together; each phase does the worker's
 * share and ends with a meeting (choir_workers_sync), so that the next phase finds everything in
 * place.
 *
 *   x = embed(token)
 *   for each layer:
 *       x += Wo attention(rope(Wq norm(x)), KV)      engine/attention.c
 *       x += experts(norm(x))                        engine/moe.c
 *   logits = head(norm(x)); sample                   engine/head.c
 *
 * A probe (engine/probe.c) goes the same way, and turns back early.
 */
#include "engine/state.h"

void choir_phase_embed(choir_engine *e, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    uint32_t hidden = e->config.hidden;
    float scale = e->config.embedding_scale;
    for (uint64_t i = begin; i < end; i++) {
        float *x = s->x + i * hidden;
        if (s->rows[i].token < e->config.vocab)
            choir_matrix_row(&e->embedding, s->rows[i].token, x);
        choir_adapt_embedding(e, i, x);
        for (uint32_t d = 0; scale != 1 && d < hidden; d++) x[d] *= scale;
    }
    choir_rope_rows(e, begin, end);
    choir_workers_sync(e->workers);
}

static void run_token_path(void *arg, uint32_t worker, uint32_t n_workers)
{
    choir_engine *e = arg;
    choir_phase_embed(e, worker, n_workers);
    for (uint32_t l = 0; l < e->config.n_layers; l++) {
        choir_phase_attention(e, l, worker, n_workers);
        choir_phase_ffn(e, l, worker, n_workers);
    }
    choir_phase_head(e, worker, n_workers);
}

static choir_status check_adapters(const choir_span *span)
{
    if (span->n_adapters > CHOIR_MAX_MIX)
        return choir_fail(CHOIR_E_INVALID, "%u adapters at once, the limit is %d", span->n_adapters,
                          CHOIR_MAX_MIX);
    for (uint32_t i = 0; i < span->n_adapters; i++)
        if (!choir_adapter_mixes(span->adapters[i].adapter) &&
            (span->n_adapters > 1 || span->adapters[i].weight != 1))
            return choir_fail(
                CHOIR_E_INVALID,
                "an adapter that replaces weights, scales inputs or brings tokens in a mix");
    return CHOIR_OK;
}

/* Token i is a virtual one of the span's adapter, at its own position. */
static bool is_virtual(const choir_engine *e, const choir_span *span, uint32_t i)
{
    uint32_t number = span->tokens[i] - e->config.vocab;
    return span->n_adapters == 1 && number < choir_adapter_n_virtual(span->adapters[0].adapter) &&
           number == span->position + i;
}

static choir_status check_span(const choir_engine *e, const choir_span *span)
{
    uint64_t end = (uint64_t)span->position + span->n_tokens;
    if (span->n_tokens == 0) return choir_fail(CHOIR_E_INVALID, "a span without tokens");
    if (end > e->config.max_positions)
        return choir_fail(CHOIR_E_INVALID, "position %llu is beyond the model's %u",
                          (unsigned long long)end - 1, e->config.max_positions);
    if (end > (uint64_t)span->n_pages * CHOIR_PAGE_TOKENS)
        return choir_fail(CHOIR_E_INVALID, "%u KV pages do not hold %llu tokens", span->n_pages,
                          (unsigned long long)end);
    if (span->n_logits > span->n_tokens || (span->sampler != NULL && span->n_logits == 0))
        return choir_fail(CHOIR_E_INVALID, "%u logits of %u tokens", span->n_logits,
                          span->n_tokens);
    for (uint32_t i = 0; i < span->n_pages; i++)
        if (span->pages[i] >= e->step.kv.n_pages)
            return choir_fail(CHOIR_E_INVALID, "KV page %u of %u", span->pages[i],
                              e->step.kv.n_pages);
    CHOIR_TRY(check_adapters(span));
    for (uint32_t i = 0; i < span->n_tokens; i++)
        if (span->tokens[i] >= e->config.vocab && !is_virtual(e, span, i))
            return choir_fail(CHOIR_E_INVALID, "token %u, the vocabulary has %u", span->tokens[i],
                              e->config.vocab);
    for (uint32_t i = 0; span->targets != NULL && i < span->n_logits; i++)
        if (span->targets[i] >= e->config.vocab)
            return choir_fail(CHOIR_E_INVALID, "target %u, the vocabulary has %u", span->targets[i],
                              e->config.vocab);
    return CHOIR_OK;
}

static void add_attention_items(choir_engine *e, uint32_t span_index)
{
    step *s = &e->step;
    const choir_span *span = &s->spans[span_index];
    uint32_t group = e->config.n_heads / choir_kv_heads(&e->config);
    /* Cut at fixed distances from the span's start; a query's result does not depend on the cut. */
    for (uint32_t at = 0; at < span->n_tokens; at += CHOIR_ATTENTION_QUERIES) {
        uint32_t left = span->n_tokens - at;
        uint32_t n = left < CHOIR_ATTENTION_QUERIES ? left : CHOIR_ATTENTION_QUERIES;
        for (uint32_t kv = 0; kv < choir_kv_heads(&e->config); kv++)
            for (uint32_t h = 0; h < group; h += CHOIR_ATTENTION_HEADS)
                s->items[s->n_items++] = (attention_item){
                    span_index,
                    s->first_row[span_index] + at,
                    n,
                    kv,
                    kv * group + h,
                    group - h < CHOIR_ATTENTION_HEADS ? group - h : CHOIR_ATTENTION_HEADS};
    }
}

static bool comes_after(const choir_span *a, const choir_span *b)
{
    if (a->n_adapters != b->n_adapters) return a->n_adapters > b->n_adapters;
    return a->n_adapters > 0 &&
           (uintptr_t)a->adapters[0].adapter > (uintptr_t)b->adapters[0].adapter;
}

/* Spans of one adapter lie together, so that its factors are read once a phase; a span's result
 * does not depend on where it lies. */
static void sort_by_adapter(step *s)
{
    for (uint32_t i = 0; i < s->n_spans; i++) {
        uint32_t at = i;
        for (; at > 0 && comes_after(&s->spans[s->order[at - 1]], &s->spans[i]); at--)
            s->order[at] = s->order[at - 1];
        s->order[at] = i;
    }
}

/* Also lists the step's attention items and output rows. */
choir_status choir_step_lay_out(choir_engine *e, choir_span *spans, uint32_t n_spans)
{
    step *s = &e->step;
    s->spans = spans;
    s->n_spans = n_spans;
    s->n_rows = s->n_outputs = s->n_items = 0;
    atomic_store_explicit(&s->next_item, 0, memory_order_relaxed);
    if (n_spans > e->options.max_spans)
        return choir_fail(CHOIR_E_INVALID, "%u spans in a step of at most %u", n_spans,
                          e->options.max_spans);
    for (uint32_t i = 0; i < n_spans; i++) CHOIR_TRY(check_span(e, &spans[i]));
    sort_by_adapter(s);
    for (uint32_t at = 0; at < n_spans; at++) {
        uint32_t i = s->order[at];
        choir_span *span = &spans[i];
        if (span->n_tokens > e->options.max_rows - s->n_rows)
            return choir_fail(CHOIR_E_INVALID, "more than %u tokens in a step",
                              e->options.max_rows);
        span->status = CHOIR_OK;
        span->missing_layer = span->missing_expert = -1;
        s->first_row[i] = s->n_rows;
        for (uint32_t t = 0; t < span->n_tokens; t++) {
            if (t + span->n_logits >= span->n_tokens) s->outputs[s->n_outputs++] = s->n_rows;
            s->rows[s->n_rows++] = (row){i, span->tokens[t], span->position + t};
        }
        add_attention_items(e, i);
    }
    return choir_adapt_lay_out(e);
}

choir_status choir_span_failure(const choir_span *span)
{
    if (span->status == CHOIR_OK) return CHOIR_OK;
    if (span->missing_expert >= 0)
        return choir_fail(span->status,
                          span->status == CHOIR_E_UNAVAILABLE
                              ? "expert %d of layer %d is late: the disk gives nothing"
                              : "expert %d of layer %d cannot be read from disk, or is damaged",
                          span->missing_expert, span->missing_layer);
    return choir_fail(span->status, "the model's logits hold NaN or Inf for this request");
}

choir_status choir_engine_step(choir_engine *engine, choir_span *spans, uint32_t n_spans)
{
    step *s = &engine->step;
    s->kv = (kv_view){engine->kv, engine->page_bytes, engine->layer_kv_bytes, engine->n_pages};
    CHOIR_TRY(choir_step_lay_out(engine, spans, n_spans));
    choir_experts_step(engine->experts);
    if (s->n_rows > 0) choir_workers_run(engine->workers, run_token_path, engine);
    for (uint32_t i = 0; i < s->n_outputs; i++) {
        choir_span *span = &spans[s->rows[s->outputs[i]].span];
        if (span->status == CHOIR_OK) span->status = s->output_status[i];
    }
    atomic_fetch_add_explicit(&engine->n_steps, 1, memory_order_release);
    return CHOIR_OK;
}
