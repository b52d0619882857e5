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

/* The k largest of `scores` (n of them), best first; ties go to the lower id. k is small. */
static void select_top_k(const float *scores, uint32_t n, uint32_t k, uint16_t *chosen)
{
    uint32_t n_chosen = 0;
    for (uint32_t e = 0; e < n; e++) {
        uint32_t at = n_chosen;
        while (at > 0 && scores[e] > scores[chosen[at - 1]]) at--;
        if (at == k) continue;
        if (n_chosen < k) n_chosen++;
        for (uint32_t i = n_chosen - 1; i > at; i--) chosen[i] = chosen[i - 1];
        chosen[at] = (uint16_t)e;
    }
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

void choir_router_route(const choir_gate *gate, const float *logits, uint32_t begin, uint32_t end,
                        choir_plan *plan)
{
    uint32_t n = gate->n_experts, k = gate->k;
    bool over_all = gate->kind == CHOIR_GATE_SOFTMAX_TOPK && !gate->normalise;
    for (uint32_t row = begin; row < end; row++) {
        const float *row_logits = logits + (size_t)row * n;
        uint16_t *chosen = plan->experts + (size_t)row * k;
        for (uint32_t i = 0; i < k; i++) chosen[i] = (uint16_t)i; /* also for NaN logits */
        select_top_k(row_logits, n, k, chosen);
        softmax_of_chosen(row_logits, n, chosen, k, over_all, plan->weights + (size_t)row * k);
    }
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
