/* Where a step's rows meet their adapters: y = W x becomes scale · W x + B f(A z) + shift, each
 * row with its own. Rows lie sorted by adapter, so that a factor is read once for all rows
 * that share it, and a row pays its own rank. A z is computed by whoever made the rows,
 * before the phase's meeting; B's columns are cut as W's are: adapters add no meeting of their own
 * (Chen et al. 2023, Punica; Sheng et al. 2023, S-LoRA, for the idea of batching them). */
#include "engine/state.h"

#include <math.h>
#include <string.h>

enum { MIN_RANKS = 64, MAX_FETCHED_RANK = 16 };

/* -- laying out -- */

static bool same_uses(const adapter_run *run, const choir_span *span)
{
    if (run->n_uses != span->n_adapters) return false;
    for (uint32_t i = 0; i < run->n_uses; i++)
        if (run->uses[i].adapter != span->adapters[i].adapter ||
            run->uses[i].weight != span->adapters[i].weight)
            return false;
    return true;
}

static void begin_run(step *s, const choir_span *span)
{
    adapter_run *run = &s->runs[s->n_runs++];
    uint32_t at = 0;
    *run = (adapter_run){.uses = span->adapters, .n_uses = span->n_adapters};
    for (uint32_t i = 0; i < run->n_uses; i++) {
        const choir_adapter *a = run->uses[i].adapter;
        run->at[i] = at;
        at += a->max_rank;
        s->adapted_roles |= a->roles;
        s->series_roles |= a->series_roles;
        s->in_scale_roles |= a->in_scale_roles;
        s->has_virtual = s->has_virtual || a->n_virtual > 0;
    }
    if (at > s->n_ranks) s->n_ranks = at;
}

static choir_status reserve(choir_engine *e)
{
    step *s = &e->step;
    static const uint64_t routed =
        CHOIR_ROLE_BIT(EXPERT_GATE) | CHOIR_ROLE_BIT(EXPERT_UP) | CHOIR_ROLE_BIT(EXPERT_DOWN);
    static const uint64_t of_heads = CHOIR_ROLE_BIT(ATTN_K_B) | CHOIR_ROLE_BIT(ATTN_V_B);
    size_t rows = s->n_rows, ranks = s->n_ranks > MIN_RANKS ? s->n_ranks : MIN_RANKS;
    /* Slots' buffers lie behind the rows'. */
    if ((s->adapted_roles & routed) != 0) rows += rows * e->config.n_experts_used;
    /* Each worker has a head of all rows at a time. */
    if ((s->adapted_roles & of_heads) != 0) rows *= e->n_threads;
    s->n_ranks = (uint32_t)ranks;
    s->low_rank_floats = (rows + 1) * ranks;
    size_t bytes = ADAPT_BUFFERS * s->low_rank_floats * sizeof(float);
    if (bytes <= s->low_rank_bytes) return CHOIR_OK;
    /* Room for a full step of such ranks, so that later steps need no more. */
    size_t full = bytes / s->n_rows * e->options.max_rows + ADAPT_BUFFERS * ranks * sizeof(float);
    choir_free(s->low_rank);
    s->low_rank_bytes = 0;
    s->low_rank = choir_alloc(CHOIR_MEM_SCRATCH, full);
    if (s->low_rank == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a step with adapters (%zu bytes)",
                          full);
    s->low_rank_bytes = full;
    return CHOIR_OK;
}

choir_status choir_adapt_lay_out(choir_engine *e)
{
    step *s = &e->step;
    s->n_runs = s->n_ranks = 0;
    s->adapted_roles = s->series_roles = s->in_scale_roles = 0;
    s->has_virtual = false;
    for (size_t i = 0; i < s->n_rows; i++) {
        const choir_span *span = &s->spans[s->rows[i].span];
        bool adapted_row = span->n_adapters > 0 && s->rows[i].position >= span->adapter_from;
        s->run_of[i] = NO_RUN;
        if (!adapted_row) continue;
        if (i == 0 || s->run_of[i - 1] == NO_RUN || !same_uses(&s->runs[s->n_runs - 1], span))
            begin_run(s, span);
        s->run_of[i] = s->n_runs - 1;
    }
    return s->n_runs > 0 ? reserve(e) : CHOIR_OK;
}

void choir_adapt_free(choir_engine *e)
{
    choir_free(e->step.low_rank);
}

/* -- what a row has -- */

bool choir_adapts(const choir_engine *e, choir_role role)
{
    return (e->step.adapted_roles >> role & 1) != 0;
}

bool choir_adapts_series(const choir_engine *e, choir_role role)
{
    return (e->step.series_roles >> role & 1) != 0;
}

static uint32_t run_of(const step *s, const adapt_target *t, size_t i)
{
    return s->run_of[t->map == NULL ? i : t->map[i] / t->divide];
}

/* The rows from *i on, below end, that have one run; *i moves behind them. NULL: the end. */
static const adapter_run *next_rows(const step *s, const adapt_target *t, size_t *i, size_t end,
                                    size_t *first)
{
    while (*i < end && run_of(s, t, *i) == NO_RUN) ++*i;
    if (*i >= end) return NULL;
    *first = *i;
    uint32_t run = run_of(s, t, *i);
    while (*i < end && run_of(s, t, *i) == run) ++*i;
    return &s->runs[run];
}

static const adapted *change_of(const adapter_run *run, uint32_t use, const adapt_target *t)
{
    const choir_adapter *a = run->uses[use].adapter;
    return (a->roles >> t->role & 1) != 0 ? choir_adapted_find(a, t->role, t->layer, t->index)
                                          : NULL;
}

static void find_changes(const adapter_run *run, const adapt_target *t,
                         const adapted *changes[CHOIR_MAX_MIX])
{
    for (uint32_t u = 0; u < run->n_uses; u++) changes[u] = change_of(run, u, t);
}

static float *low_rank_of(const step *s, const adapt_target *t, const adapter_run *run,
                          uint32_t use, size_t at)
{
    return s->low_rank + t->buffer * s->low_rank_floats + (t->first + at) * s->n_ranks +
           run->at[use];
}

/* -- A z -- */

static float activate(choir_adapter_act act, float x)
{
    switch (act) {
    case CHOIR_ADAPTER_RELU:
        return x > 0 ? x : 0;
    case CHOIR_ADAPTER_GELU:
        return 0.5F * x * (1 + erff(x * 0x1.6a09e6p-1F));
    case CHOIR_ADAPTER_GELU_TANH:
        return 0.5F * x * (1 + tanhf(0x1.988454p-1F * (x + 0.044715F * x * x * x)));
    case CHOIR_ADAPTER_SILU:
        return x / (1 + expf(-x));
    case CHOIR_ADAPTER_TANH:
        return tanhf(x);
    default:
        return x;
    }
}

/* t becomes weight · f(t + a_bias). */
static void finish_low_rank(const adapted *c, float weight, float *t)
{
    for (uint32_t r = 0; r < c->b.rank; r++) {
        float x = c->a_bias != NULL ? t[r] + c->a_bias[r] : t[r];
        t[r] = weight * activate(c->act, x);
    }
}

static void shrink(choir_engine *e, const adapt_target *t, activations in, size_t begin, size_t end)
{
    step *s = &e->step;
    size_t i = begin, first;
    for (const adapter_run *run; (run = next_rows(s, t, &i, end, &first)) != NULL;)
        for (uint32_t u = 0; u < run->n_uses; u++) {
            const adapted *c = change_of(run, u, t);
            if (c == NULL || c->a.rank == 0 || c->series || c->residual) continue;
            float *low = low_rank_of(s, t, run, u, first);
            e->kernels->shrink(&c->a, in.x + first * in.ldx, in.ldx, (uint32_t)(i - first), low,
                               s->n_ranks);
            for (size_t at = first; at < i; at++)
                finish_low_rank(c, run->uses[u].weight, low + (at - first) * s->n_ranks);
        }
}

void choir_adapt_shrink(choir_engine *e, const adapt_target *t, activations in, uint32_t begin,
                        uint32_t end)
{
    if (choir_adapts(e, t->role)) shrink(e, t, in, begin, end);
}

/* A z of one row where z is y0, the residual stream, or their sum: A y0 + A x. */
static void shrink_row(const choir_engine *e, const adapted *c, const float *y, const float *x,
                       float weight, float *low)
{
    float more[CHOIR_ADAPTER_MAX_RANK];
    e->kernels->shrink(&c->a, c->series ? y : x, 0, 1, low, 0);
    if (c->series && c->residual) {
        e->kernels->shrink(&c->a, x, 0, 1, more, 0);
        e->kernels->add(low, more, c->a.rank);
    }
    finish_low_rank(c, weight, low);
}

void choir_adapt_shrink_outputs(choir_engine *e, const adapt_target *t, activations y,
                                uint32_t begin, uint32_t end)
{
    step *s = &e->step;
    size_t i = begin, first;
    if (!choir_adapts_series(e, t->role)) return;
    for (const adapter_run *run; (run = next_rows(s, t, &i, end, &first)) != NULL;)
        for (uint32_t u = 0; u < run->n_uses; u++) {
            const adapted *c = change_of(run, u, t);
            if (c == NULL || !(c->series || c->residual)) continue;
            for (size_t at = first; at < i; at++)
                shrink_row(e, c, y.x + at * y.ldx, s->x + at * e->config.hidden,
                           run->uses[u].weight, low_rank_of(s, t, run, u, at));
        }
}

/* Of a run's changes of a matrix those that scale what goes in, or comes out, and their weights. */
typedef struct scales {
    const float *of[CHOIR_MAX_MIX];
    float weights[CHOIR_MAX_MIX];
    uint32_t n;
} scales;

static scales scales_of(const adapter_run *run, const adapted *const *changes, bool inputs)
{
    scales found = {.n = 0};
    for (uint32_t u = 0; u < run->n_uses; u++) {
        const adapted *c = changes[u];
        const float *scale = c == NULL ? NULL : inputs ? c->in_scale : c->scale;
        if (scale == NULL) continue;
        found.of[found.n] = scale;
        found.weights[found.n++] = run->uses[u].weight;
    }
    return found;
}

/* x becomes (1 + Σ weight (scale - 1)) · x. One alone, weight 1, is taken as it is: 1 + (scale - 1)
 * may differ. */
static void apply_scales(const scales *f, float *x, uint32_t begin, uint32_t end)
{
    bool sole = f->n == 1 && f->weights[0] == 1;
    for (uint32_t d = begin; sole && d < end; d++) x[d] *= f->of[0][d];
    for (uint32_t d = begin; !sole && d < end; d++) {
        float scale = 1;
        for (uint32_t u = 0; u < f->n; u++) scale += f->weights[u] * (f->of[u][d] - 1);
        x[d] *= scale;
    }
}

void choir_adapt_scale_inputs(choir_engine *e, const adapt_target *t, float *x, size_t ldx,
                              uint32_t first_row, uint32_t last_row, uint32_t begin, uint32_t end)
{
    step *s = &e->step;
    size_t i = first_row, first;
    if ((s->in_scale_roles >> t->role & 1) == 0) return;
    for (const adapter_run *run; (run = next_rows(s, t, &i, last_row, &first)) != NULL;) {
        const adapted *changes[CHOIR_MAX_MIX];
        find_changes(run, t, changes);
        scales found = scales_of(run, changes, true);
        for (size_t at = first; found.n > 0 && at < i; at++)
            apply_scales(&found, x + at * ldx, begin, end);
    }
}

/* -- y -- */

/* Rows [first, last) of one run: what stands in W's place, then scales, pairs, shifts. */
static void expand_run(choir_engine *e, const adapter_run *run, const adapt_target *t,
                       activations in, size_t first, size_t last, float *y, size_t ldy,
                       uint32_t begin, uint32_t end)
{
    step *s = &e->step;
    uint32_t n = (uint32_t)(last - first);
    const adapted *changes[CHOIR_MAX_MIX];
    find_changes(run, t, changes);
    const adapted *sole = run->n_uses == 1 ? changes[0] : NULL;
    if (sole != NULL && sole->weight.rows > 0) {
        const choir_acts acts = {in.x + first * in.ldx, NULL, n, sole->weight.cols};
        CHOIR_ASSERT(in.ldx == sole->weight.cols);
        e->kernels->matmul(&sole->weight, &acts, y + first * ldy, ldy, begin, end);
    }
    scales found = scales_of(run, changes, false);
    for (size_t at = first; found.n > 0 && at < last; at++)
        apply_scales(&found, y + at * ldy, begin, end);
    for (uint32_t u = 0; u < run->n_uses; u++) {
        const adapted *c = changes[u];
        if (c == NULL) continue;
        if (c->b.rank > 0)
            e->kernels->expand(&c->b, low_rank_of(s, t, run, u, first), s->n_ranks, n,
                               y + first * ldy, ldy, begin, end);
        for (size_t at = first; c->shift != NULL && at < last; at++)
            e->kernels->add_scaled(y + at * ldy + begin, c->shift + begin, run->uses[u].weight,
                                   end - begin);
    }
}

void choir_adapt_expand(choir_engine *e, const adapt_target *t, activations in, uint32_t n_rows,
                        float *y, size_t ldy, uint32_t begin, uint32_t end)
{
    size_t i = 0, first;
    if (!choir_adapts(e, t->role) || begin >= end) return;
    for (const adapter_run *run; (run = next_rows(&e->step, t, &i, n_rows, &first)) != NULL;)
        expand_run(e, run, t, in, first, i, y, ldy, begin, end);
}

void choir_adapt_row(choir_engine *e, const adapt_target *t, uint32_t at, activations in, float *y,
                     uint32_t n)
{
    size_t i = at, first;
    if (!choir_adapts(e, t->role)) return;
    const adapter_run *run = next_rows(&e->step, t, &i, (size_t)at + 1, &first);
    if (run == NULL) return;
    shrink(e, t, in, at, (size_t)at + 1);
    expand_run(e, run, t, in, at, (size_t)at + 1, y - (size_t)at * n, n, 0, n);
}

/* -- fetching -- */

void choir_adapt_fetch_begin(choir_engine *e, uint32_t worker)
{
    const choir_range *ranges = e->step.fetch_ranges + (size_t)worker * MAX_FETCHED;
    e->step.fetch[worker].of = (choir_fetch){.ranges = ranges, .last = ranges};
}

static void add_range(step *s, uint32_t worker, const char *begin, const char *end)
{
    choir_fetch *f = &s->fetch[worker].of;
    choir_range *base = s->fetch_ranges + (size_t)worker * MAX_FETCHED;
    if (f->last == base + MAX_FETCHED) return;
    const char *at = (const char *)((uintptr_t)begin & ~(uintptr_t)(CHOIR_CACHE_LINE - 1));
    base[f->last - base] = (choir_range){at, (size_t)(end - at)};
    f->last++;
}

/* More ranks are more than a cache holds of so many adapters. */
static bool is_fetched(const choir_factor *f)
{
    return f->rank > 0 && f->rank <= MAX_FETCHED_RANK;
}

void choir_adapt_fetch_outputs(choir_engine *e, const adapt_target *t, uint32_t n_rows,
                               uint32_t worker, uint32_t begin, uint32_t end)
{
    step *s = &e->step;
    size_t i = 0, first;
    if (!choir_adapts(e, t->role) || begin >= end) return;
    for (const adapter_run *run; (run = next_rows(s, t, &i, n_rows, &first)) != NULL;)
        for (uint32_t u = 0; u < run->n_uses; u++) {
            const adapted *c = change_of(run, u, t);
            if (c == NULL || !is_fetched(&c->b)) continue;
            size_t bytes = choir_factor_element_bytes(c->b.type), stride = c->b.stride * bytes;
            const char *at = c->b.data;
            for (uint32_t r = 0; r < c->b.rank; r++, at += stride)
                add_range(s, worker, at + begin * bytes, at + end * bytes);
        }
}

void choir_adapt_fetch_inputs(choir_engine *e, const adapt_target *t, uint32_t worker,
                              uint32_t n_workers)
{
    step *s = &e->step;
    uint64_t begin, end;
    if (!choir_adapts(e, t->role) || t->map != NULL) return;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    size_t i = begin, first;
    for (const adapter_run *run; (run = next_rows(s, t, &i, end, &first)) != NULL;)
        for (uint32_t u = 0; u < run->n_uses; u++) {
            const adapted *c = change_of(run, u, t);
            if (c == NULL || !is_fetched(&c->a)) continue;
            const char *data = c->a.data;
            add_range(s, worker, data,
                      data + choir_factor_bytes(c->a.type, c->a.rank, c->a.length));
        }
}

/* -- what is no product -- */

float *choir_adapt_norm(const choir_engine *e, choir_role role, uint32_t l, size_t at,
                        float *weight)
{
    const step *s = &e->step;
    const adapt_target t = {.role = role, .layer = l};
    if (!choir_adapts(e, role) || s->run_of[at] == NO_RUN) return weight;
    const adapted *c = change_of(&s->runs[s->run_of[at]], 0, &t);
    return c != NULL && c->vector != NULL ? c->vector : weight;
}

static const choir_adapter *virtual_of(const choir_engine *e, size_t i)
{
    const step *s = &e->step;
    bool is_virtual = s->has_virtual && s->rows[i].token >= e->config.vocab;
    return is_virtual ? s->spans[s->rows[i].span].adapters[0].adapter : NULL;
}

void choir_adapt_embedding(choir_engine *e, size_t i, float *x)
{
    step *s = &e->step;
    uint32_t hidden = e->config.hidden, token = s->rows[i].token;
    const choir_adapter *soft = virtual_of(e, i);
    const adapt_target t = {.role = CHOIR_ROLE_EMBEDDING};
    if (soft != NULL) {
        size_t at = (size_t)(token - e->config.vocab) * hidden;
        for (uint32_t d = 0; d < hidden; d++)
            x[d] = soft->virtual_embeddings != NULL ? soft->virtual_embeddings[at + d] : 0;
        return;
    }
    if (!choir_adapts(e, t.role) || s->run_of[i] == NO_RUN) return;
    const adapter_run *run = &s->runs[s->run_of[i]];
    for (uint32_t u = 0; u < run->n_uses; u++) {
        const adapted *c = change_of(run, u, &t);
        if (c == NULL) continue;
        if (c->weight.rows > 0) choir_matrix_row(&c->weight, token, x);
        if (c->b.rank == 0) continue;
        float *low = low_rank_of(s, &t, run, u, i);
        memcpy(low, c->a_columns + (size_t)token * c->b.rank, c->b.rank * sizeof *low);
        finish_low_rank(c, run->uses[u].weight, low);
        e->kernels->expand(&c->b, low, s->n_ranks, 1, x, hidden, 0, hidden);
    }
}

const float *choir_adapt_prefix(const choir_engine *e, uint32_t l, size_t i, uint32_t part)
{
    const choir_adapter *a = virtual_of(e, i);
    if (a == NULL || !a->prefix) return NULL;
    size_t n = (size_t)e->config.n_kv_heads * e->config.head_dim;
    size_t at = ((size_t)l * a->n_virtual + (e->step.rows[i].token - e->config.vocab)) * n;
    return (part == 0 ? a->virtual_keys : a->virtual_values) + at;
}
