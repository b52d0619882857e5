/* x += Σ_chosen weight · expert(norm(x)) + always(norm(x)): where the router's plan meets the
 * expert store. A dense layer has no router, only the expert that takes every row (SwiGLU experts:
 * down(silu(gate h) · up h), Shazeer 2020); an MoE layer may have such a one too, the shared
 * expert. */
#include "engine/state.h"

#include <math.h>
#include <string.h>

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

/* Where a row's routes of a layer begin in its span's. */
static size_t route_at(const step *s, uint32_t l, size_t i, uint32_t k)
{
    const choir_span *span = &s->spans[s->rows[i].span];
    return ((size_t)l * span->n_tokens + (i - s->first_row[s->rows[i].span])) * k;
}

static void record_routes(choir_engine *e, uint32_t l, size_t i)
{
    step *s = &e->step;
    const choir_routes *routes = s->spans[s->rows[i].span].routes;
    if (routes == NULL) return;
    uint32_t k = s->plan->k;
    size_t at = route_at(s, l, i, k);
    memcpy(routes->experts + at, s->plan->experts + i * k, k * sizeof(uint16_t));
    memcpy(routes->weights + at, s->plan->weights + i * k, k * sizeof(float));
}

/* Dense layers have no routes: zeros. */
static void clear_routes(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t k = e->config.n_experts_used;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        const choir_routes *routes = s->spans[s->rows[i].span].routes;
        if (routes == NULL) continue;
        memset(routes->experts + route_at(s, l, i, k), 0, k * sizeof(uint16_t));
        memset(routes->weights + route_at(s, l, i, k), 0, k * sizeof(float));
    }
}

static float dot(const float *a, const float *b, uint32_t n)
{
    float sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* The shared expert's weight: 1, or a sigmoid of its gate (Qwen 2 MoE). */
static void weigh_always(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const float *gate = e->layers[l].always_gate;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        s->always_weight[i] = 1;
        if (gate == NULL) continue;
        float logit = dot(gate, s->h + i * hidden, hidden);
        const adapt_target t = {.role = CHOIR_ROLE_SHARED_ROUTER, .layer = l};
        choir_adapt_row(e, &t, (uint32_t)i, (activations){s->h, hidden}, &logit, 1);
        s->always_weight[i] = 1 / (1 + expf(-logit));
    }
}

/* Of softmax(logits), in nats: ln Σ exp(l) - Σ p l. */
static float entropy(const float *logits, uint32_t n)
{
    float max = logits[0];
    double sum = 0, weighed = 0;
    for (uint32_t x = 1; x < n; x++)
        if (logits[x] > max) max = logits[x];
    for (uint32_t x = 0; x < n; x++) {
        double below = logits[x] - max, e = exp(below);
        sum += e;
        weighed += e * below;
    }
    return (float)(log(sum) - weighed / sum);
}

/* h -> (expert, weight) for the worker's own rows, which it has just normed. */
static void route(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const layer *w = &e->layers[l];
    uint32_t n = e->config.n_experts, hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    if (begin == end) return;
    const choir_acts own = {s->h + begin * hidden, NULL, (uint32_t)(end - begin), hidden};
    e->kernels->matmul(&w->router, &own, s->router_logits + begin * n, n, 0, n);
    const adapt_target t = {.role = CHOIR_ROLE_ROUTER, .layer = l};
    for (uint64_t i = begin; i < end; i++)
        choir_adapt_row(e, &t, (uint32_t)i, (activations){s->h, hidden}, s->router_logits + i * n,
                        n);
    for (uint64_t i = begin; w->router_bias != NULL && i < end; i++)
        e->kernels->add(s->router_logits + i * n, w->router_bias, n);
    for (uint64_t i = begin; s->wants_entropy && i < end; i++)
        s->gate_entropy[i] += entropy(s->router_logits + i * n, n);
    if (e->forced_expert >= 0)
        choir_router_force((uint32_t)e->forced_expert, (uint32_t)begin, (uint32_t)end, s->plan);
    else
        choir_router_route(&e->config.gate, s->router_logits, w->router_correction, (uint32_t)begin,
                           (uint32_t)end, s->plan);
    for (uint64_t i = begin; i < end; i++) record_routes(e, l, i);
}

/* Whether a row counts whose answer is not void already that goes to the expert. */
static bool is_wanted(const step *s, uint32_t expert)
{
    const choir_plan *p = s->plan;
    for (uint32_t slot = p->first[expert]; slot < p->first[expert + 1]; slot++)
        if (s->spans[s->rows[p->slots[slot] / p->k].span].status == CHOIR_OK) return true;
    return false;
}

static uint32_t n_slots_of(const choir_plan *plan, uint32_t expert)
{
    return plan->first[expert + 1] - plan->first[expert];
}

static choir_expert_use use_of(const step *s, uint32_t expert)
{
    const choir_plan *p = s->plan;
    choir_expert_use use = {.expert = expert, .n_rows = n_slots_of(p, expert)};
    for (uint32_t slot = p->first[expert]; slot < p->first[expert + 1]; slot++) {
        uint32_t remaining = s->spans[s->rows[p->slots[slot] / p->k].span].remaining;
        use.weight += p->weights[p->slots[slot]];
        if (remaining > use.remaining) use.remaining = remaining;
    }
    return use;
}

/* One worker: what was found right makes the next wave. */
static void admit_arrived(choir_engine *e, uint32_t l)
{
    step *s = &e->step;
    for (uint32_t i = 0; i < s->n_arrived; i++) {
        uint16_t x = s->arrived[i];
        s->pinned[x] = choir_experts_admit(e->experts, l, x);
        if (s->pinned[x] != NULL) s->wave[s->n_wave++] = x;
    }
    s->n_arrived = 0;
    s->more = choir_experts_pending(e->experts);
}

/* One worker: groups the rows by expert, finds each expert's area, asks for all experts at once.
 * What is in reach makes the first wave; the others arrive while it computes. */
static void open_experts(choir_engine *e, uint32_t l)
{
    step *s = &e->step;
    choir_plan_group(s->plan, s->n_rows);
    size_t in_at = 0, ffn_at = 0;
    uint32_t n_uses = 0;
    for (uint32_t x = 0; x < e->config.n_experts; x++) {
        uint32_t n = n_slots_of(s->plan, x);
        s->pinned[x] = NULL;
        s->computed[x] = s->wanted[x] = false;
        if (n == 0 || !is_wanted(s, x)) continue;
        s->wanted[x] = true;
        s->uses[n_uses++] = use_of(s, x);
        s->q8_in_at[x] = in_at;
        s->q8_ffn_at[x] = ffn_at;
        in_at += (choir_acts_q8_bytes(n, e->config.hidden) + 63) & ~(size_t)63;
        ffn_at += (choir_acts_q8_bytes(n, e->config.expert_hidden) + 63) & ~(size_t)63;
    }
    CHOIR_ASSERT(e->options.exact || (in_at <= s->q8_h_bytes && ffn_at <= s->q8_ffn_bytes));
    choir_predict_score(e, l);
    s->predicted_layer = 0;
    choir_experts_request(e->experts, l, s->uses, n_uses);
    s->n_arrived = choir_experts_collect(e->experts, false, e->config.n_experts, s->arrived);
    s->n_wave = 0;
    admit_arrived(e, l);
}

static void close_wave(choir_engine *e, uint32_t l)
{
    step *s = &e->step;
    for (uint32_t i = 0; i < s->n_wave; i++) {
        choir_experts_release(e->experts, l, s->wave[i]);
        s->pinned[s->wave[i]] = NULL;
    }
    s->n_wave = 0;
}

/* Rows whose expert does not come go on without it, and their spans' answers are void. */
static void give_up_missing(choir_engine *e, uint32_t l)
{
    step *s = &e->step;
    uint32_t n = choir_experts_missing(e->experts, s->missing);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t x = s->missing[i].expert;
        for (uint32_t slot = s->plan->first[x]; slot < s->plan->first[x + 1]; slot++) {
            choir_span *span = &s->spans[s->rows[s->plan->slots[slot] / s->plan->k].span];
            /* What is lost counts for more than what is late. */
            if (span->status == CHOIR_E_DATA_LOSS) continue;
            span->status = s->missing[i].status;
            span->missing_layer = (int32_t)l;
            span->missing_expert = (int32_t)x;
        }
    }
}

/* One worker: the next experts to be checked, or none. One for each worker, so that their parts are
 * shared out evenly, and what a check has read is still in a cache when it is multiplied. */
static void await_experts(choir_engine *e, uint32_t l)
{
    step *s = &e->step;
    close_wave(e, l);
    choir_predict_prefetch(e, l);
    uint32_t n = choir_experts_collect(e->experts, true, e->n_threads, s->arrived);
    if (n == 0 && choir_experts_pending(e->experts)) give_up_missing(e, l);
    s->n_arrived = n;
    choir_predict_prefetch(e, l);
}

static void check_arrived(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    for (uint32_t i = worker; i < s->n_arrived * CHOIR_EXPERT_PARTS; i += n_workers)
        choir_experts_check(e->experts, l, s->arrived[i / CHOIR_EXPERT_PARTS],
                            i % CHOIR_EXPERT_PARTS);
}

/* Copies each slot's row beside the others of its expert, weighed already where the model says so.
 */
static void gather(choir_engine *e, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_plan *p = s->plan;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share((uint64_t)s->n_rows * p->k, 1, worker, n_workers, &begin, &end);
    for (uint64_t slot = begin; slot < end; slot++) {
        float *to = s->slot_in + slot * hidden, weight = p->weights[p->slots[slot]];
        memcpy(to, s->h + (size_t)(p->slots[slot] / p->k) * hidden, hidden * sizeof *to);
        for (uint32_t d = 0; e->config.weigh_input && d < hidden; d++) to[d] *= weight;
    }
}

/* -- adapters -- */

typedef enum buffer {
    GATE_BUFFER,
    UP_BUFFER,
    DOWN_BUFFER
} buffer; /* where a phase keeps A z of its rows */

static buffer buffer_of(choir_role routed)
{
    if (routed == CHOIR_ROLE_EXPERT_DOWN) return DOWN_BUFFER;
    return routed == CHOIR_ROLE_EXPERT_UP ? UP_BUFFER : GATE_BUFFER;
}

/* The expert that takes every row, the shared one or the dense FFN, by one of choir_expert_roles.
 */
static adapt_target always_target(const choir_engine *e, uint32_t l, choir_role routed)
{
    static const choir_role shared[] = {CHOIR_ROLE_SHARED_GATE, CHOIR_ROLE_SHARED_UP,
                                        CHOIR_ROLE_SHARED_DOWN};
    static const choir_role dense[] = {CHOIR_ROLE_FFN_GATE, CHOIR_ROLE_FFN_UP, CHOIR_ROLE_FFN_DOWN};
    bool moe = e->layers[l].router.rows > 0;
    buffer part = buffer_of(routed);
    return (adapt_target){.role = moe ? shared[part] : dense[part], .layer = l, .buffer = part};
}

/* (adapter, expert) is one routed unit: the slots of an expert, each with its row's adapter.
 * Buffers are the slots' own, behind those of rows that a shared expert keeps: they have no
 * matrices in common. */
static adapt_target slots_target(const choir_engine *e, uint32_t l, choir_role role,
                                 uint32_t expert)
{
    const choir_plan *p = e->step.plan;
    return (adapt_target){.role = role,
                          .layer = l,
                          .index = expert,
                          .buffer = buffer_of(role),
                          .map = p->slots + p->first[expert],
                          .divide = p->k,
                          .first = e->step.n_rows + p->first[expert]};
}

/* Slots' rows and their quantised twins: each expert's slots lie in an area of their own. */
typedef struct slot_rows {
    const float *x; /* [S, cols] */
    uint32_t cols;
    uint8_t *q8;
    const size_t *at; /* [n_experts] */
    uint32_t layer, n_roles;
    choir_role roles[2]; /* whose inputs they are */
} slot_rows;

/* Quantises (and shrinks for their adapters) those of the expert's slots whose numbers, counted
 * from `first`, are in [begin, end). */
static void quantize_slots(choir_engine *e, const slot_rows *r, uint32_t expert, uint64_t first,
                           uint64_t begin, uint64_t end)
{
    uint64_t last = first + n_slots_of(e->step.plan, expert);
    uint64_t b = begin > first ? begin : first, n = end < last ? end : last;
    if (b >= n) return;
    const activations in = {r->x + (size_t)e->step.plan->first[expert] * r->cols, r->cols};
    for (uint32_t i = 0; i < r->n_roles; i++) {
        const adapt_target t = slots_target(e, r->layer, r->roles[i], expert);
        choir_adapt_shrink(e, &t, in, (uint32_t)(b - first), (uint32_t)(n - first));
    }
    if (!e->options.exact)
        e->kernels->quantize(r->x + (size_t)e->step.plan->first[expert] * r->cols, r->cols,
                             r->q8 + r->at[expert], (uint32_t)(b - first), (uint32_t)(n - first));
}

/* The worker's share of all slots. */
static void quantize_inputs(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const slot_rows r = {s->slot_in,
                         e->config.hidden,
                         s->q8_h,
                         s->q8_in_at,
                         l,
                         2,
                         {CHOIR_ROLE_EXPERT_GATE, CHOIR_ROLE_EXPERT_UP}};
    uint64_t begin, end;
    choir_share((uint64_t)s->n_rows * s->plan->k, 1, worker, n_workers, &begin, &end);
    for (uint32_t x = 0; x < e->config.n_experts; x++)
        if (s->wanted[x]) quantize_slots(e, &r, x, s->plan->first[x], begin, end);
}

/* The worker's share of the wave's slots. */
static void quantize_activated(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const slot_rows r = {s->gate, e->config.expert_hidden, s->q8_ffn, s->q8_ffn_at, l,
                         1,       {CHOIR_ROLE_EXPERT_DOWN}};
    uint64_t begin, end, total = 0, first = 0;
    for (uint32_t i = 0; i < s->n_wave; i++) total += n_slots_of(s->plan, s->wave[i]);
    choir_share(total, 1, worker, n_workers, &begin, &end);
    for (uint32_t i = 0; i < s->n_wave; first += n_slots_of(s->plan, s->wave[i++]))
        quantize_slots(e, &r, s->wave[i], first, begin, end);
}

static void activate(const choir_engine *e, const float *up, uint32_t n, float *gate)
{
    const choir_model_config *c = &e->config;
    switch (c->activation) {
    case CHOIR_SWIGLU:
        e->kernels->silu_mul(gate, up, n, gate);
        break;
    case CHOIR_GEGLU:
        e->kernels->gelu_mul(gate, up, n, gate);
        break;
    case CHOIR_CLAMPED_SWIGLU:
        e->kernels->clamped_swiglu(gate, up, c->swiglu_alpha, c->swiglu_limit, n, gate);
        break;
    }
}

/* An expert on the rows that it takes. */
typedef struct expert_rows {
    const choir_expert *expert;
    choir_acts in;
    float *gate, *up; /* [in.n_rows, ffn] */
    adapt_target gate_target, up_target, down_target;
} expert_rows;

/* gate = silu(Wg h) · (Wu h) over the worker's own columns; no meeting is needed in between, unless
 * an adapter wants whole rows. */
static void gate_and_up(choir_engine *e, const expert_rows *r, uint32_t worker, uint32_t n_workers)
{
    uint64_t begin, end;
    const choir_expert *expert = r->expert;
    const choir_acts own = choir_acts_fetching(e, &r->in, worker), *in = &own;
    const activations x = {in->x, in->cols};
    float *gate = r->gate, *up = r->up;
    uint32_t ffn = expert->gate.rows;
    choir_share(ffn, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    uint32_t n = (uint32_t)(end - begin);
    choir_adapt_fetch_begin(e, worker);
    choir_adapt_fetch_outputs(e, &r->gate_target, in->n_rows, worker, (uint32_t)begin,
                              (uint32_t)end);
    choir_adapt_fetch_outputs(e, &r->up_target, in->n_rows, worker, (uint32_t)begin, (uint32_t)end);
    choir_adapt_fetch_inputs(e, &r->down_target, worker, n_workers);
    if (n > 0) e->kernels->matmul(&expert->gate, in, gate, ffn, (uint32_t)begin, (uint32_t)end);
    if (n > 0) e->kernels->matmul(&expert->up, in, up, ffn, (uint32_t)begin, (uint32_t)end);
    choir_meet_for_series(e, &r->gate_target, (activations){gate, ffn}, in->n_rows, worker,
                          n_workers);
    choir_meet_for_series(e, &r->up_target, (activations){up, ffn}, in->n_rows, worker, n_workers);
    if (n == 0) return;
    choir_adapt_expand(e, &r->gate_target, x, in->n_rows, gate, ffn, (uint32_t)begin,
                       (uint32_t)end);
    choir_adapt_expand(e, &r->up_target, x, in->n_rows, up, ffn, (uint32_t)begin, (uint32_t)end);
    for (size_t i = 0; i < in->n_rows; i++) {
        float *g = gate + i * ffn + begin, *u = up + i * ffn + begin;
        if (expert->gate_bias != NULL) e->kernels->add(g, expert->gate_bias + begin, n);
        if (expert->up_bias != NULL) e->kernels->add(u, expert->up_bias + begin, n);
        activate(e, u, n, g);
    }
    choir_adapt_scale_inputs(e, &r->down_target, gate, ffn, 0, in->n_rows, (uint32_t)begin,
                             (uint32_t)end);
}

/* Each slot's output over the worker's own columns. */
static void down(choir_engine *e, uint32_t l, uint32_t expert, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_plan *p = s->plan;
    const choir_expert *x = s->pinned[expert];
    uint32_t hidden = x->down.rows, ffn = x->down.cols, first = p->first[expert];
    uint64_t begin, end;
    choir_share(hidden, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    uint32_t n = (uint32_t)(end - begin);
    if (n == 0) return;
    const choir_acts in = {s->gate + (size_t)first * ffn, s->q8_ffn + s->q8_ffn_at[expert],
                           n_slots_of(p, expert), ffn};
    const adapt_target t = slots_target(e, l, CHOIR_ROLE_EXPERT_DOWN, expert);
    float *y = s->slot_out + (size_t)first * hidden;
    e->kernels->matmul(&x->down, &in, y, hidden, (uint32_t)begin, (uint32_t)end);
    choir_adapt_expand(e, &t, (activations){in.x, ffn}, in.n_rows, y, hidden, (uint32_t)begin,
                       (uint32_t)end);
    for (uint32_t slot = first; x->down_bias != NULL && slot < p->first[expert + 1]; slot++)
        e->kernels->add(s->slot_out + (size_t)slot * hidden + begin, x->down_bias + begin, n);
}

/* Adds each slot's output to its row, weighted, over the worker's own columns. Experts ascend, so a
 * row's sum has one order, whatever the batch and whoever arrived first. */
static void mix(choir_engine *e, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_plan *p = s->plan;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(hidden, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    uint32_t n = (uint32_t)(end - begin);
    for (uint32_t x = 0; n > 0 && x < e->config.n_experts; x++)
        for (uint32_t slot = p->first[x]; s->computed[x] && slot < p->first[x + 1]; slot++) {
            size_t i = p->slots[slot] / p->k;
            float weight = e->config.weigh_input ? 1 : p->weights[p->slots[slot]];
            e->kernels->add_scaled(s->x + i * hidden + begin,
                                   s->slot_out + (size_t)slot * hidden + begin,
                                   weight * e->config.residual_scale, n);
        }
}

/* The shared expert's part, after those of the routed ones. */
static void mix_always(choir_engine *e, uint32_t l, const choir_expert *x, uint32_t worker,
                       uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t hidden = x->down.rows;
    uint64_t begin, end;
    choir_share(hidden, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    if (begin == end) return;
    const choir_acts in = {s->always_gate, s->q8_always, s->n_rows, x->down.cols};
    const adapt_target t = always_target(e, l, CHOIR_ROLE_EXPERT_DOWN);
    e->kernels->matmul(&x->down, &in, s->h, hidden, (uint32_t)begin, (uint32_t)end);
    choir_adapt_expand(e, &t, (activations){in.x, in.cols}, in.n_rows, s->h, hidden,
                       (uint32_t)begin, (uint32_t)end);
    for (size_t i = 0; i < s->n_rows; i++) {
        float *y = s->h + i * hidden + begin;
        if (x->down_bias != NULL) e->kernels->add(y, x->down_bias + begin, (uint32_t)(end - begin));
        e->kernels->add_scaled(s->x + i * hidden + begin, y,
                               s->always_weight[i] * e->config.residual_scale,
                               (uint32_t)(end - begin));
    }
}

static void quantize_always(choir_engine *e, uint32_t l, const choir_expert *x, uint32_t worker,
                            uint32_t n_workers)
{
    step *s = &e->step;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    const adapt_target t = always_target(e, l, CHOIR_ROLE_EXPERT_DOWN);
    choir_adapt_shrink(e, &t, (activations){s->always_gate, x->gate.rows}, (uint32_t)begin,
                       (uint32_t)end);
    if (!e->options.exact && begin < end)
        e->kernels->quantize(s->always_gate, x->gate.rows, s->q8_always, (uint32_t)begin,
                             (uint32_t)end);
}

/* gate and up of the expert that takes every row. */
static void run_always(choir_engine *e, uint32_t l, const choir_expert *x, uint32_t worker,
                       uint32_t n_workers)
{
    step *s = &e->step;
    const expert_rows rows = {.expert = x,
                              .in = {s->h, s->q8_rows, s->n_rows, e->config.hidden},
                              .gate = s->always_gate,
                              .up = s->always_up,
                              .gate_target = always_target(e, l, CHOIR_ROLE_EXPERT_GATE),
                              .up_target = always_target(e, l, CHOIR_ROLE_EXPERT_UP),
                              .down_target = always_target(e, l, CHOIR_ROLE_EXPERT_DOWN)};
    gate_and_up(e, &rows, worker, n_workers);
}

uint32_t choir_ffn_inputs(const choir_engine *e, uint32_t l, adapt_target out[ADAPT_BUFFERS])
{
    if (e->layers[l].always.gate.rows == 0) return 0;
    for (int i = 0; i < 2; i++) out[i] = always_target(e, l, choir_expert_roles[i]);
    return 2;
}

/* What adapters want of the normed rows for it, by the worker that normed them. */
static void shrink_for_always(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    adapt_target inputs[ADAPT_BUFFERS];
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    uint32_t n = choir_ffn_inputs(e, l, inputs);
    for (uint32_t i = 0; i < n; i++)
        choir_adapt_shrink(e, &inputs[i], (activations){s->h, e->config.hidden}, (uint32_t)begin,
                           (uint32_t)end);
}

/* The experts in reach: slot_out = down(act(gate) · up) of their slots. `always`: NULL, or the
 * shared expert, which computes beside the first wave. */
static void run_wave(choir_engine *e, uint32_t l, const choir_expert *always, uint32_t worker,
                     uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t hidden = e->config.hidden, ffn = e->config.expert_hidden;
    for (uint32_t i = 0; i < s->n_wave; i++) {
        uint16_t x = s->wave[i];
        size_t first = s->plan->first[x];
        const expert_rows rows = {.expert = s->pinned[x],
                                  .in = {s->slot_in + first * hidden, s->q8_h + s->q8_in_at[x],
                                         n_slots_of(s->plan, x), hidden},
                                  .gate = s->gate + first * ffn,
                                  .up = s->up + first * ffn,
                                  .gate_target = slots_target(e, l, CHOIR_ROLE_EXPERT_GATE, x),
                                  .up_target = slots_target(e, l, CHOIR_ROLE_EXPERT_UP, x),
                                  .down_target = slots_target(e, l, CHOIR_ROLE_EXPERT_DOWN, x)};
        gate_and_up(e, &rows, worker, n_workers);
    }
    if (always != NULL) run_always(e, l, always, worker, n_workers);
    choir_workers_sync(e->workers);

    quantize_activated(e, l, worker, n_workers);
    if (always != NULL) quantize_always(e, l, always, worker, n_workers);
    choir_workers_sync(e->workers);

    for (uint32_t i = 0; i < s->n_wave; i++) {
        down(e, l, s->wave[i], worker, n_workers);
        if (worker == 0) s->computed[s->wave[i]] = true;
    }
}

/* Waits for experts that are being read, and checks them. */
static void next_wave(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    choir_workers_sync(e->workers); /* the wave before is done with its experts */
    if (worker == 0) await_experts(e, l);
    choir_workers_sync(e->workers);
    check_arrived(e, l, worker, n_workers);
    choir_workers_sync(e->workers);
    if (worker == 0) admit_arrived(e, l);
    choir_workers_sync(e->workers);
}

static void run_experts(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const choir_expert *always = e->layers[l].always.gate.rows > 0 ? &e->layers[l].always : NULL;
    route(e, l, worker, n_workers);
    if (always != NULL) {
        weigh_always(e, l, worker, n_workers);
        shrink_for_always(e, l, worker, n_workers);
    }
    choir_workers_sync(e->workers);

    if (worker == 0) open_experts(e, l);
    choir_workers_sync(e->workers);

    gather(e, worker, n_workers);
    choir_predict_rows(e, l, worker, n_workers);
    quantize_inputs(e, l, worker, n_workers);
    choir_workers_sync(e->workers);

    if (worker == 0) choir_predict_prefetch(e, l);
    run_wave(e, l, always, worker, n_workers);
    while (s->more) {
        next_wave(e, l, worker, n_workers);
        run_wave(e, l, NULL, worker, n_workers);
    }
    choir_workers_sync(e->workers); /* computed[] is seen by all */
    mix(e, worker, n_workers);
    if (always != NULL) mix_always(e, l, always, worker, n_workers);
    choir_workers_sync(e->workers);
    if (worker == 0) close_wave(e, l);
}

static void run_dense(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const layer *w = &e->layers[l];
    clear_routes(e, l, worker, n_workers);
    shrink_for_always(e, l, worker, n_workers);
    choir_workers_sync(e->workers);

    run_always(e, l, &w->always, worker, n_workers);
    choir_workers_sync(e->workers);

    quantize_always(e, l, &w->always, worker, n_workers);
    choir_workers_sync(e->workers);

    residual_product down = {
        .matrix = &w->always.down,
        .bias = w->always.down_bias,
        .post_norm = w->ffn_post_norm,
        .acts = {s->always_gate, s->q8_always, s->n_rows, e->config.ffn_hidden},
        .y = s->h,
        .target = always_target(e, l, CHOIR_ROLE_EXPERT_DOWN)};
    down.n_next = choir_attention_inputs(e, l + 1, down.next);
    choir_multiply_into_residual(e, &down, worker, n_workers);
}

void choir_phase_ffn(choir_engine *e, uint32_t l, uint32_t worker, uint32_t n_workers)
{
    step *s = &e->step;
    const layer *w = &e->layers[l];
    bool moe = w->router.rows > 0;
    /* Routed experts' slots are quantised after routing; rows, for the expert that takes all of
     * them. */
    const layer_norm before = {&w->ffn_norm, CHOIR_ROLE_FFN_NORM, l};
    choir_norm_rows(e, before, s->h, w->always.gate.rows > 0 ? s->q8_rows : NULL, worker,
                    n_workers);
    copy_taps(e, l, worker, n_workers);
    if (moe)
        run_experts(e, l, worker, n_workers);
    else
        run_dense(e, l, worker, n_workers);
}
