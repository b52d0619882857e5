/* Which experts the next layer will want: its gate over this layer's residual stream, before the
 * experts of this one have added to it (as in Eliseev, Mazur 2023, section 3.2). */
#include "engine/state.h"

enum { NEARLY_IDLE = 2 }; /* reads in flight */

/* The MoE layer after l, or 0. */
static uint32_t next_layer(const choir_engine *e, uint32_t l)
{
    while (++l < e->config.n_layers)
        if (e->layers[l].router.rows > 0) return l;
    return 0;
}

static uint32_t n_predicted_rows(const choir_engine *e)
{
    return e->step.n_rows < PREDICT_ROWS ? e->step.n_rows : PREDICT_ROWS;
}

void choir_predict_rows(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t to = next_layer(e, l), n = e->config.n_experts, hidden = e->config.hidden;
    if (to == 0 || e->options.no_prefetch || !choir_experts_streamed(e->experts)) return;
    uint64_t begin, end;
    choir_share(n_predicted_rows(e), 1, worker, n_workers, &begin, &end);
    if (begin == end) return;
    const layer *w = &e->layers[to];
    for (uint64_t i = begin; i < end; i++)
        choir_norm_row(e, w->ffn_norm, s->x + i * hidden, s->predict_h + i * hidden);
    const choir_acts own = {s->predict_h + begin * hidden, NULL, (uint32_t)(end - begin), hidden};
    e->kernels->matmul(&w->router, &own, s->predict_logits + begin * n, n, 0, n);
    for (uint64_t i = begin; w->router_bias != NULL && i < end; i++)
        e->kernels->add(s->predict_logits + i * n, w->router_bias, n);
    choir_router_route(&e->config.gate, s->predict_logits, w->router_correction, (uint32_t)begin,
                       (uint32_t)end, s->prediction);
}

/* One worker, as soon as the disk has little left to do for this layer: the next layer's most
 * likely experts, best first; once a layer. */
void choir_predict_prefetch(choir_engine *e, uint32_t l)
{
    step *s = &e->step;
    uint32_t to = next_layer(e, l), n_rows = n_predicted_rows(e), k = e->config.n_experts_used,
             n = 0;
    if (to == 0 || s->predicted_layer == to || e->options.no_prefetch ||
        !choir_experts_streamed(e->experts) || choir_experts_n_in_flight(e->experts) > NEARLY_IDLE)
        return;
    s->predicted_layer = to;
    for (uint32_t x = 0; x < e->config.n_experts; x++) s->votes[x] = 0;
    for (uint32_t i = 0; i < n_rows * k; i++)
        s->votes[s->prediction->experts[i]] += s->prediction->weights[i];
    /* Insertion into a short list, best first. */
    for (uint32_t x = 0; x < e->config.n_experts; x++) {
        if (s->votes[x] <= 0 || choir_experts_in_reach(e->experts, to, x)) continue;
        uint32_t at = n < MAX_PREFETCH ? n++ : MAX_PREFETCH;
        if (at == MAX_PREFETCH && s->votes[s->guessed[--at]] >= s->votes[x]) continue;
        for (; at > 0 && s->votes[s->guessed[at - 1]] < s->votes[x]; at--)
            s->guessed[at] = s->guessed[at - 1];
        s->guessed[at] = (uint16_t)x;
    }
    choir_experts_prefetch(e->experts, to, s->guessed, n);
}

/* One worker, once layer l is routed: how good the prediction was. */
void choir_predict_score(choir_engine *e, uint32_t l)
{
    step *s = &e->step;
    uint32_t k = e->config.n_experts_used, n = n_predicted_rows(e), n_right = 0;
    if (s->predicted_layer != l || l == 0) return;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t a = 0; a < k; a++)
            for (uint32_t b = 0; b < k; b++)
                n_right += s->plan->experts[i * k + a] == s->prediction->experts[i * k + b];
    choir_experts_note_prediction(e->experts, n * k, n_right);
}
