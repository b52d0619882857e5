#include "router/router.h"

#include <math.h>

choir_status choir_plan_create(uint32_t max_rows, uint32_t n_experts, uint32_t k, choir_plan **out)
{
    if (n_experts == 0 || k == 0 || k > n_experts || n_experts > UINT16_MAX)
        return choir_fail(CHOIR_E_INVALID, "a router with %u experts per token of %u", k,
                          n_experts);
    choir_plan *plan = choir_calloc(CHOIR_MEM_SCRATCH, 1, sizeof *plan);
    if (plan == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a routing plan");
    size_t slots = (size_t)max_rows * k;
    *plan = (choir_plan){
        .n_experts = n_experts,
        .k = k,
        .max_rows = max_rows,
        .experts = choir_calloc(CHOIR_MEM_SCRATCH, slots, sizeof *plan->experts),
        .weights = choir_calloc(CHOIR_MEM_SCRATCH, slots, sizeof *plan->weights),
        .first = choir_calloc(CHOIR_MEM_SCRATCH, n_experts + 1, sizeof *plan->first),
        .slots = choir_calloc(CHOIR_MEM_SCRATCH, slots, sizeof *plan->slots),
        .slot_of = choir_calloc(CHOIR_MEM_SCRATCH, slots, sizeof *plan->slot_of),
    };
    if (plan->experts == NULL || plan->weights == NULL || plan->first == NULL ||
        plan->slots == NULL || plan->slot_of == NULL) {
        choir_plan_destroy(plan);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a routing plan of %u rows", max_rows);
    }
    *out = plan;
    return CHOIR_OK;
}

void choir_plan_destroy(choir_plan *plan)
{
    if (plan == NULL) return;
    choir_free(plan->experts);
    choir_free(plan->weights);
    choir_free(plan->first);
    choir_free(plan->slots);
    choir_free(plan->slot_of);
    choir_free(plan);
}

/* What a choice is made from: scores, what is added to them, and the groups that may be chosen. */
typedef struct choice {
    const float *scores, *correction; /* correction: NULL or [n] */
    const bool *groups;               /* NULL: every expert may be chosen */
    uint32_t n, group_size;
} choice;

static float value_of(const choice *c, uint32_t e)
{
    if (c->groups != NULL && !c->groups[e / c->group_size]) return -INFINITY;
    return c->correction != NULL ? c->scores[e] + c->correction[e] : c->scores[e];
}

/* The k best, best first; ties go to the lower id. k is small. */
static void select_top_k(const choice *c, uint32_t k, uint16_t *chosen)
{
    uint32_t n_chosen = 0;
    for (uint32_t e = 0; e < c->n; e++) {
        uint32_t at = n_chosen;
        float value = value_of(c, e);
        while (at > 0 && value > value_of(c, chosen[at - 1])) at--;
        if (at == k) continue;
        if (n_chosen < k) n_chosen++;
        for (uint32_t i = n_chosen - 1; i > at; i--) chosen[i] = chosen[i - 1];
        chosen[at] = (uint16_t)e;
    }
}

/* Marks the n_groups_used best groups. */
static void select_groups(const choir_gate *gate, const choice *c, bool *groups)
{
    float values[CHOIR_MAX_EXPERT_GROUPS];
    uint16_t best[CHOIR_MAX_EXPERT_GROUPS];
    for (uint32_t g = 0; g < gate->n_groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (uint32_t i = 0; i < c->group_size; i++) {
            float value = value_of(c, g * c->group_size + i);
            if (value > first) {
                second = first;
                first = value;
            } else if (value > second) {
                second = value;
            }
        }
        values[g] = gate->group_by_two && c->group_size > 1 ? first + second : first;
        groups[g] = false;
        best[g] = (uint16_t)g; /* also for NaN scores */
    }
    const choice of_groups = {.scores = values, .n = gate->n_groups};
    select_top_k(&of_groups, gate->n_groups_used, best);
    for (uint32_t i = 0; i < gate->n_groups_used; i++) groups[best[i]] = true;
}

/* Softmax weights of the chosen experts. With `over_all` the denominator runs over every expert,
 * otherwise over the chosen ones. Sums are in double and in a fixed order: experts are few. */
static void softmax_of_chosen(const float *logits, uint32_t n, const uint16_t *chosen, uint32_t k,
                              bool over_all, float *weights)
{
    double max = logits[chosen[0]], sum = 0;
    if (over_all)
        for (uint32_t e = 0; e < n; e++) sum += exp(logits[e] - max);
    else
        for (uint32_t i = 0; i < k; i++) sum += exp(logits[chosen[i]] - max);
    for (uint32_t i = 0; i < k; i++) weights[i] = (float)(exp(logits[chosen[i]] - max) / sum);
}

/* Logits become scores: probabilities, or sigmoids. */
static void score(const choir_gate *gate, float *logits)
{
    double max = -INFINITY, sum = 0;
    if (gate->kind == CHOIR_GATE_SIGMOID) {
        for (uint32_t e = 0; e < gate->n_experts; e++)
            logits[e] = (float)(1 / (1 + exp(-(double)logits[e])));
        return;
    }
    for (uint32_t e = 0; e < gate->n_experts; e++)
        if (logits[e] > max) max = logits[e];
    for (uint32_t e = 0; e < gate->n_experts; e++) sum += exp(logits[e] - max);
    for (uint32_t e = 0; e < gate->n_experts; e++) logits[e] = (float)(exp(logits[e] - max) / sum);
}

/* The best remaining logit wins; its weight is its probability among the remaining ones within
 * 2 jitter of it, relative to the larger of it and their own size. Then it is taken out. */
static void sparse_mixer(const choir_gate *gate, float *logits, uint16_t *chosen, float *weights)
{
    for (uint32_t i = 0; i < gate->k; i++) {
        const choice left = {.scores = logits, .n = gate->n_experts};
        select_top_k(&left, 1, &chosen[i]);
        float max = logits[chosen[i]];
        double sum = 0;
        for (uint32_t e = 0; e < gate->n_experts; e++) {
            float size = fabsf(logits[e]) > max ? fabsf(logits[e]) : max;
            if (!((max - logits[e]) / size > 2 * gate->jitter)) sum += exp((double)logits[e] - max);
        }
        weights[i] = (float)(1 / sum);
        logits[chosen[i]] = -INFINITY;
    }
}

static void normalise(const choir_gate *gate, float *weights)
{
    double sum = 0;
    for (uint32_t i = 0; i < gate->k; i++) sum += weights[i];
    if (sum < gate->normalise_min) sum = gate->normalise_min;
    for (uint32_t i = 0; i < gate->k; i++) weights[i] = (float)(weights[i] / sum);
}

static void route_row(const choir_gate *gate, float *logits, const float *correction,
                      uint16_t *chosen, float *weights)
{
    uint32_t n = gate->n_experts, k = gate->k;
    bool groups[CHOIR_MAX_EXPERT_GROUPS], grouped = gate->n_groups > 1;
    for (uint32_t i = 0; i < k; i++) chosen[i] = (uint16_t)i; /* also for NaN logits */
    if (gate->kind == CHOIR_GATE_SPARSE_MIXER) {
        sparse_mixer(gate, logits, chosen, weights);
        return;
    }
    /* A softmax keeps the order of logits, so it is needed before the choice only for sums of scores. */
    bool scored = gate->kind == CHOIR_GATE_SIGMOID || grouped || correction != NULL;
    if (scored) score(gate, logits);
    choice c = {.scores = logits, .correction = correction, .n = n};
    if (grouped) {
        c.group_size = n / gate->n_groups;
        select_groups(gate, &c, groups);
        c.groups = groups;
    }
    select_top_k(&c, k, chosen);
    if (!scored) {
        bool over_all = gate->kind == CHOIR_GATE_SOFTMAX_TOPK && !gate->normalise;
        softmax_of_chosen(logits, n, chosen, k, over_all, weights);
    } else {
        /* DeepSeek-V2 gives experts outside the groups no weight, should k reach them; V3 does. */
        bool outside = gate->kind == CHOIR_GATE_SIGMOID;
        for (uint32_t i = 0; i < k; i++)
            weights[i] = outside || value_of(&c, chosen[i]) > -INFINITY ? logits[chosen[i]] : 0;
        if (gate->normalise) normalise(gate, weights);
    }
    for (uint32_t i = 0; gate->scale != 0 && i < k; i++) weights[i] *= gate->scale;
}

void choir_router_route(const choir_gate *gate, float *logits, const float *correction, uint32_t begin,
                        uint32_t end, choir_plan *plan)
{
    for (size_t row = begin; row < end; row++)
        route_row(gate, logits + row * gate->n_experts, correction, plan->experts + row * gate->k,
                  plan->weights + row * gate->k);
}

void choir_router_force(uint32_t expert, uint32_t begin, uint32_t end, choir_plan *plan)
{
    for (uint32_t row = begin; row < end; row++) {
        for (uint32_t i = 0; i < plan->k; i++) {
            /* The other ranks name other experts, each once, with weight 0. */
            uint32_t other = i <= expert ? i - 1 : i;
            plan->experts[(size_t)row * plan->k + i] = (uint16_t)(i == 0 ? expert : other);
            plan->weights[(size_t)row * plan->k + i] = i == 0 ? 1.0F : 0.0F;
        }
    }
}

void choir_plan_group(choir_plan *plan, uint32_t n_rows)
{
    CHOIR_ASSERT(n_rows <= plan->max_rows);
    uint32_t n = plan->n_experts, k = plan->k;
    plan->n_rows = n_rows;
    for (uint32_t e = 0; e <= n; e++) plan->first[e] = 0;
    for (uint32_t i = 0; i < n_rows * k; i++) plan->first[plan->experts[i] + 1]++;
    for (uint32_t e = 0; e < n; e++) plan->first[e + 1] += plan->first[e];
    /* first[e] walks through its expert's slots and is put back by the shift below. */
    for (uint32_t i = 0; i < n_rows * k; i++) {
        uint32_t slot = plan->first[plan->experts[i]]++;
        plan->slots[slot] = i;
        plan->slot_of[i] = slot;
    }
    for (uint32_t e = n; e > 0; e--) plan->first[e] = plan->first[e - 1];
    plan->first[0] = 0;
}
