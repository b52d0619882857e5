/* The path of a token (engine/token_path.c) as far as its first blocks, for a prompt's features.
 *
 * A layer's keys and values are not needed beyond it, and the head is not reached: so one layer's
 * pages do for all, and they lie where a step has its logits. */
#include "engine/state.h"

#include <math.h>
#include <string.h>

enum { PROBE_PAGES = CHOIR_PROBE_TOKENS / CHOIR_PAGE_TOKENS };

typedef struct probe_run {
    choir_engine *engine;
    choir_probe *probe;
} probe_run;

uint32_t choir_probe_rows(const choir_engine *e)
{
    uint32_t most = CHOIR_PROBE_TOKENS;
    if (most > e->options.max_rows) most = e->options.max_rows;
    return most < e->config.max_positions ? most : e->config.max_positions;
}

uint32_t choir_probe_pages(const choir_engine *e)
{
    return (choir_probe_rows(e) + CHOIR_PAGE_TOKENS - 1) / CHOIR_PAGE_TOKENS;
}

/* Of the worker's own columns, rows ascending. */
static void mean_of_rows(const choir_engine *e, float *mean, uint32_t worker, uint32_t n_workers)
{
    const step *s = &e->step;
    uint64_t begin, end;
    choir_share(e->config.hidden, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    uint32_t n = (uint32_t)(end - begin);
    if (n == 0) return;
    memcpy(mean + begin, s->x + begin, n * sizeof *mean);
    for (size_t i = 1; i < s->n_rows; i++)
        e->kernels->add(mean + begin, s->x + i * e->config.hidden + begin, n);
    for (uint64_t d = begin; d < end; d++) mean[d] /= (float)s->n_rows;
}

static void run_blocks(void *arg, uint32_t worker, uint32_t n_workers)
{
    const probe_run *run = arg;
    choir_engine *e = run->engine;
    choir_phase_embed(e, worker, n_workers);
    for (uint32_t b = 0; b < run->probe->n_blocks; b++)
        if (b % 2 == 0)
            choir_phase_attention(e, b / 2, worker, n_workers);
        else
            choir_phase_ffn(e, b / 2, worker, n_workers);
    mean_of_rows(e, run->probe->mean, worker, n_workers);
}

static float mean_entropy(const choir_engine *e, uint32_t n_blocks)
{
    const step *s = &e->step;
    uint32_t n_gates = 0;
    double sum = 0;
    for (uint32_t l = 0; l < n_blocks / 2; l++) n_gates += e->layers[l].router.rows > 0;
    for (uint32_t i = 0; n_gates > 0 && i < s->n_rows; i++) sum += (double)s->gate_entropy[i];
    return n_gates > 0 ? (float)(sum / n_gates / s->n_rows) : 0;
}

/* Whatever lies in them: keys and values are read once they were written. */
static void make_pages(choir_engine *e, uint32_t n_rows, uint32_t pages[PROBE_PAGES],
                       choir_span *span)
{
    step *s = &e->step;
    uint32_t n = (n_rows + CHOIR_PAGE_TOKENS - 1) / CHOIR_PAGE_TOKENS;
    for (uint32_t i = 0; i < n; i++) pages[i] = i;
    s->kv = (kv_view){(uint8_t *)s->logits, e->layer_kv_bytes, 0, n};
    span->pages = pages;
    span->n_pages = n;
}

static choir_status check_mean(const choir_engine *e, const float *mean)
{
    for (uint32_t d = 0; d < e->config.hidden; d++)
        if (!isfinite(mean[d]))
            return choir_fail(CHOIR_E_DATA_LOSS, "the prompt's features hold NaN or Inf");
    return CHOIR_OK;
}

choir_status choir_engine_probe(choir_engine *e, choir_probe *p)
{
    step *s = &e->step;
    uint32_t most = choir_probe_rows(e), pages[PROBE_PAGES];
    p->n_rows = p->n_tokens < most ? p->n_tokens : most;
    if (p->n_blocks > 2 * e->config.n_layers)
        return choir_fail(CHOIR_E_INVALID, "a probe of %u blocks, the model has %u", p->n_blocks,
                          2 * e->config.n_layers);
    choir_span span = {.tokens = p->tokens + (p->n_tokens - p->n_rows), .n_tokens = p->n_rows};
    make_pages(e, p->n_rows, pages, &span);
    CHOIR_TRY(choir_step_lay_out(e, &span, 1));
    choir_experts_step(e->experts);
    memset(s->gate_entropy, 0, p->n_rows * sizeof *s->gate_entropy);
    s->wants_entropy = true;
    choir_workers_run(e->workers, run_blocks, &(probe_run){e, p});
    s->wants_entropy = false;
    s->predicted_layer = 0; /* of the layer behind its last, to which it did not come */
    CHOIR_TRY(choir_span_failure(&span));
    p->gate_entropy = mean_entropy(e, p->n_blocks);
    return check_mean(e, p->mean);
}
