/* x += Σ_chosen weight · expert(norm(x)): where the router's plan meets the expert store. A dense layer is
 * a layer with one expert that gets every row (SwiGLU experts: down(silu(gate h) · up h), Shazeer 2020). */
#include "engine/state.h"

#include <string.h>

static bool is_moe(const choir_engine *e, uint32_t l) { return e->layers[l].router.rows > 0; }

static void copy_taps(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        const choir_span *span = &s->spans[s->rows[i].span];
        if (span->ffn_inputs == NULL) continue;
        size_t at = (size_t)l * span->n_tokens + (i - s->first_row[s->rows[i].span]);
        memcpy(span->ffn_inputs + at * hidden, s->h + i * hidden, hidden * sizeof(float));
    }
}

static void record_routes(choir_engine *e, uint32_t l, size_t i)
{
    step *s = &e->step;
    const choir_span *span = &s->spans[s->rows[i].span];
    if (span->routes == NULL) return;
    uint32_t k = s->plan->k;
    size_t at = ((size_t)l * span->n_tokens + (i - s->first_row[s->rows[i].span])) * k;
    memcpy(span->routes->experts + at, s->plan->experts + i * k, k * sizeof(uint16_t));
    memcpy(span->routes->weights + at, s->plan->weights + i * k, k * sizeof(float));
}

/* h -> (expert, weight) for the worker's own rows, which it has just normed. */
static void route(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t n = e->config.n_experts, hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    if (begin == end) return;
    const choir_acts own = {s->h + begin * hidden, NULL, (uint32_t)(end - begin), hidden};
    e->kernels->matmul(&e->layers[l].router, &own, s->router_logits + begin * n, n, 0, n);
    if (e->forced_expert >= 0)
        choir_router_force((uint32_t)e->forced_expert, (uint32_t)begin, (uint32_t)end, s->plan);
    else
        choir_router_route(&e->gate, s->router_logits, (uint32_t)begin, (uint32_t)end, s->plan);
    for (uint64_t i = begin; i < end; i++) record_routes(e, l, i);
}

static uint32_t n_slots_of(const choir_plan *plan, uint32_t expert)
{
    return plan->first[expert + 1] - plan->first[expert];
}

/* One worker: groups the rows by expert, finds each expert's area, pins it. All experts are resident,
 * so a pin cannot fail. */
static void open_experts(choir_engine *e, uint32_t l)
{
    step *s = &e->step;
    choir_plan_group(s->plan, s->n_rows);
    size_t in_at = 0, ffn_at = 0;
    for (uint32_t x = 0; x < e->config.n_experts; x++) {
        uint32_t n = n_slots_of(s->plan, x);
        s->pinned[x] = NULL;
        if (n == 0) continue;
        choir_status status = choir_experts_pin(e->experts, l, x, &s->pinned[x]);
        CHOIR_ASSERT(status == CHOIR_OK);
        s->q8_in_at[x] = in_at;
        s->q8_ffn_at[x] = ffn_at;
        in_at += (choir_acts_q8_bytes(n, e->config.hidden) + 63) & ~(size_t)63;
        ffn_at += (choir_acts_q8_bytes(n, e->config.expert_hidden) + 63) & ~(size_t)63;
    }
    CHOIR_ASSERT(e->options.exact || (in_at <= s->q8_h_bytes && ffn_at <= s->q8_ffn_bytes));
}

static void close_experts(choir_engine *e, uint32_t l)
{
    for (uint32_t x = 0; x < e->config.n_experts; x++)
        if (e->step.pinned[x] != NULL) choir_experts_unpin(e->experts, l, x);
}

/* Copies each slot's row beside the others of its expert. */
static void gather(choir_engine *e, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share((uint64_t)s->n_rows * s->plan->k, 1, worker, n_workers, &begin, &end);
    for (uint64_t slot = begin; slot < end; slot++)
        memcpy(s->slot_in + slot * hidden,
               s->h + (size_t)(s->plan->slots[slot] / s->plan->k) * hidden, hidden * sizeof(float));
}

/* Quantises the worker's share of slots; each expert's slots lie in an area of their own. */
static void quantize_slots(choir_engine *e, const float *x, uint32_t cols, uint8_t *q8,
                           const size_t *at, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    if (e->options.exact) return;
    uint64_t begin, end;
    choir_share((uint64_t)s->n_rows * s->plan->k, 1, worker, n_workers, &begin, &end);
    for (uint32_t expert = 0; expert < e->config.n_experts; expert++) {
        uint64_t first = s->plan->first[expert], last = s->plan->first[expert + 1];
        uint64_t b = begin > first ? begin : first, n = end < last ? end : last;
        if (b < n)
            e->kernels->quantize(x + first * cols, cols, q8 + at[expert], (uint32_t)(b - first),
                                 (uint32_t)(n - first));
    }
}

/* gate = silu(Wg h) · (Wu h) over the worker's own columns; no meeting is needed in between. */
static void gate_and_up(choir_engine *e, const choir_expert *expert, const choir_acts *in,
                        float *gate, float *up, uint32_t worker, uint32_t n_workers)
{
    uint64_t begin, end;
    uint32_t ffn = expert->gate.rows;
    choir_share(ffn, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    if (begin == end) return;
    e->kernels->matmul(&expert->gate, in, gate, ffn, (uint32_t)begin, (uint32_t)end);
    e->kernels->matmul(&expert->up, in, up, ffn, (uint32_t)begin, (uint32_t)end);
    for (size_t i = 0; i < in->n_rows; i++)
        e->kernels->silu_mul(gate + i * ffn + begin, up + i * ffn + begin, (uint32_t)(end - begin),
                             gate + i * ffn + begin);
}

/* Adds each slot's output to its row, weighted, over the worker's own columns. Experts ascend, so a
 * row's sum has one order whatever the batch. */
static void down_and_mix(choir_engine *e, uint32_t expert, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_plan *p = s->plan;
    const choir_matrix *w = &s->pinned[expert]->down;
    uint32_t hidden = w->rows, ffn = w->cols, first = p->first[expert];
    uint64_t begin, end;
    choir_share(hidden, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    if (begin == end) return;
    const choir_acts in = {s->gate + (size_t)first * ffn, s->q8_ffn + s->q8_ffn_at[expert],
                           n_slots_of(p, expert), ffn};
    e->kernels->matmul(w, &in, s->slot_out + (size_t)first * hidden, hidden, (uint32_t)begin,
                       (uint32_t)end);
    for (uint32_t slot = first; slot < p->first[expert + 1]; slot++) {
        size_t i = p->slots[slot] / p->k;
        e->kernels->add_scaled(s->x + i * hidden + begin,
                               s->slot_out + (size_t)slot * hidden + begin,
                               p->weights[p->slots[slot]], (uint32_t)(end - begin));
    }
}

static void run_experts(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t n = e->config.n_experts, hidden = e->config.hidden, ffn = e->config.expert_hidden;
    route(e, l, worker, n_workers);
    choir_workers_sync(e->workers);

    if (worker == 0) open_experts(e, l);
    choir_workers_sync(e->workers);

    gather(e, worker, n_workers);
    quantize_slots(e, s->slot_in, hidden, s->q8_h, s->q8_in_at, worker, n_workers);
    choir_workers_sync(e->workers);

    for (uint32_t x = 0; x < n; x++) {
        if (s->pinned[x] == NULL) continue;
        size_t first = s->plan->first[x];
        const choir_acts in = {s->slot_in + first * hidden, s->q8_h + s->q8_in_at[x],
                               n_slots_of(s->plan, x), hidden};
        gate_and_up(e, s->pinned[x], &in, s->gate + first * ffn, s->up + first * ffn, worker,
                    n_workers);
    }
    choir_workers_sync(e->workers);

    quantize_slots(e, s->gate, ffn, s->q8_ffn, s->q8_ffn_at, worker, n_workers);
    choir_workers_sync(e->workers);

    for (uint32_t x = 0; x < n; x++)
        if (s->pinned[x] != NULL) down_and_mix(e, x, worker, n_workers);
    choir_workers_sync(e->workers);
    if (worker == 0) close_experts(e, l);
}

static void run_dense(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t ffn = e->config.ffn_hidden;
    if (worker == 0) {
        choir_status status = choir_experts_pin(e->experts, l, 0, &s->pinned[0]);
        CHOIR_ASSERT(status == CHOIR_OK);
    }
    choir_workers_sync(e->workers);

    const choir_acts in = {s->h, s->q8_h, s->n_rows, e->config.hidden};
    gate_and_up(e, s->pinned[0], &in, s->gate, s->up, worker, n_workers);
    choir_workers_sync(e->workers);

    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    if (!e->options.exact && begin < end)
        e->kernels->quantize(s->gate, ffn, s->q8_ffn, (uint32_t)begin, (uint32_t)end);
    choir_workers_sync(e->workers);

    const choir_acts act = {s->gate, s->q8_ffn, s->n_rows, ffn};
    choir_multiply_into_residual(e, &s->pinned[0]->down, &act, s->h, s->x, worker, n_workers);
    choir_workers_sync(e->workers);
    if (worker == 0) choir_experts_unpin(e->experts, l, 0);
}

void choir_phase_ffn(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    bool moe = is_moe(e, l);
    /* An MoE layer quantises its slots after routing, so only a dense one quantises rows here. */
    choir_norm_rows(e, e->layers[l].ffn_norm, s->h, moe ? NULL : s->q8_h, worker, n_workers);
    copy_taps(e, l, worker, n_workers);
    if (moe)
        run_experts(e, l, worker, n_workers);
    else
        run_dense(e, l, worker, n_workers);
}
