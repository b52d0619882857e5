/* logits = head(norm(x)) for the rows that want them, HEAD_ROWS at a time; then scores and draws.
 */
#include "engine/state.h"

#include <math.h>
#include <string.h>

/* log-softmax of logits[target], with the denominator summed in double. */
static choir_status score(const choir_engine *e, const float *logits, uint32_t target, float *out)
{
    float max = e->kernels->max(logits, e->config.vocab);
    double sum = e->kernels->sum_exp(logits, max, e->config.vocab);
    if (!isfinite(max) || !isfinite(sum)) return CHOIR_E_DATA_LOSS;
    *out = (float)((double)logits[target] - max - log(sum));
    return CHOIR_OK;
}

/* A poisoned row is found even when nothing is drawn from it. */
static choir_status check_finite(const choir_engine *e, const float *logits)
{
    float max = e->kernels->max(logits, e->config.vocab);
    bool good = isfinite(max) && isfinite(e->kernels->sum_exp(logits, max, e->config.vocab));
    return good ? CHOIR_OK : CHOIR_E_DATA_LOSS;
}

static void finish_logits(const choir_engine *e, float *logits)
{
    const choir_model_config *c = &e->config;
    if (e->head_bias != NULL) e->kernels->add(logits, e->head_bias, c->vocab);
    for (uint32_t i = 0; c->logit_divisor != 1 && i < c->vocab; i++) logits[i] /= c->logit_divisor;
    if (c->logit_softcap != 0) e->kernels->softcap(logits, c->logit_softcap, c->vocab);
}

/* Hands out one row's logits: copies, scores, draws; in this order, since a draw overwrites them.
 */
static choir_status finish_row(choir_engine *e, uint32_t output, float *logits, uint32_t worker)
{
    step *s = &e->step;
    const row *r = &s->rows[s->outputs[output]];
    choir_span *span = &s->spans[r->span];
    uint32_t index = r->position - span->position - (span->n_tokens - span->n_logits);
    if (span->status != CHOIR_OK) return CHOIR_OK; /* void already; nothing is drawn from it */
    finish_logits(e, logits);
    bool draws = span->sampler != NULL && index + 1 == span->n_logits;
    if (span->logits != NULL)
        memcpy(span->logits + (size_t)index * e->config.vocab, logits,
               e->config.vocab * sizeof *logits);
    if (span->targets != NULL) {
        choir_status status = score(e, logits, span->targets[index], &span->target_logprobs[index]);
        if (status != CHOIR_OK) return status;
    }
    if (draws)
        return choir_sampler_draw(span->sampler, e->kernels, logits, s->sampler_scratch[worker],
                                  &span->sample);
    return span->targets != NULL ? CHOIR_OK : check_finite(e, logits);
}

/* The head's rows are those that want logits, from output `first` on. */
static adapt_target head_target(const step *s, uint32_t first)
{
    return (adapt_target){.role = CHOIR_ROLE_HEAD, .map = s->outputs + first, .divide = 1};
}

static void norm_outputs(choir_engine *e, uint32_t first, uint32_t n, uint32_t worker,
                         uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(n, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        size_t at = s->outputs[first + i];
        norm own = e->output_norm;
        own.weight = choir_adapt_norm(e, CHOIR_ROLE_OUTPUT_NORM, 0, at, own.weight);
        choir_norm_row(e, own, s->x + at * hidden, s->h + i * hidden);
    }
    const adapt_target target = head_target(s, first);
    choir_adapt_shrink(e, &target, (activations){s->h, hidden}, (uint32_t)begin, (uint32_t)end);
    if (!e->options.exact && begin < end)
        e->kernels->quantize(s->h, hidden, s->q8_h, (uint32_t)begin, (uint32_t)end);
}

void choir_phase_head(choir_engine *e, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    for (uint32_t first = 0; first < s->n_outputs; first += HEAD_ROWS) {
        uint32_t left = s->n_outputs - first, n = left < HEAD_ROWS ? left : HEAD_ROWS;
        norm_outputs(e, first, n, worker, n_workers);
        choir_workers_sync(e->workers);

        const product head = {&e->head, s->logits, head_target(s, first)};
        const choir_acts in = {s->h, s->q8_h, n, e->config.hidden};
        choir_multiply(e, &head, 1, &in, NULL, worker, n_workers);
        choir_workers_sync(e->workers);

        uint64_t begin, end;
        choir_share(n, 1, worker, n_workers, &begin, &end);
        for (uint64_t i = begin; i < end; i++)
            s->output_status[first + i] =
                finish_row(e, first + (uint32_t)i, s->logits + i * e->config.vocab, worker);
        choir_workers_sync(e->workers);
    }
}
