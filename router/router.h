/* WHAT    From gate logits to a plan: for each row its experts and weights, for each expert its rows.
 * OWNS    A plan owns its arrays, sized once for the largest step.
 * THREADS Pure functions of their inputs; one owner per plan.
 * ERRORS  CHOIR_E_INVALID (k > n_experts, …) and CHOIR_E_NO_MEMORY at creation only.
 * LIMITS  Ties go to the lower expert id; a token's experts are summed in ascending id, so that results
 *         never depend on the batch.
 * NEXT    engine/moe.c, where plans meet experts/experts.h. */
#pragma once
#include "base/base.h"

typedef enum choir_gate_kind {
    CHOIR_GATE_SOFTMAX_TOPK, /* softmax over all experts, then the k best (optionally renormalised) */
    CHOIR_GATE_TOPK_SOFTMAX, /* the k best logits, then softmax over those (equal to the above with
                                renormalisation, up to rounding) */
    CHOIR_GATE_SIGMOID,      /* a sigmoid of each logit, then the k best (DeepSeek-AI 2024, Llama 4) */
    CHOIR_GATE_SPARSE_MIXER, /* one expert after the other, each weighed by a softmax over those whose
                                logits are close to its own (Liu et al. 2023, Phi-3.5-MoE) */
} choir_gate_kind;

enum { CHOIR_MAX_EXPERT_GROUPS = 256 };

typedef struct choir_gate {
    choir_gate_kind kind;
    uint32_t n_experts, k;
    /* Experts lie in n_groups equal groups, and only those of the n_groups_used best may be chosen; a
     * group is as good as its best expert, or as its two best together. 0 or 1: no groups. */
    uint32_t n_groups, n_groups_used;
    bool group_by_two;
    bool normalise;      /* the k weights are divided by their sum … */
    float normalise_min; /* … or by this, if the sum is less */
    float scale;         /* of the weights; 0 counts as 1 */
    float jitter;        /* SPARSE_MIXER: how close, as a part of the best logit, halved */
} choir_gate;

/* Slots: the (row, rank) pairs sorted by expert, then by row: what the experts compute. */
typedef struct choir_plan {
    uint32_t n_rows, n_experts, k, max_rows;
    uint16_t *experts; /* [n_rows, k] best first */
    float *weights;    /* [n_rows, k] same order */
    uint32_t *first;   /* [n_experts + 1]: expert e has slots first[e] .. first[e + 1) */
    uint32_t *slots;   /* [n_rows * k] slot -> row * k + rank */
    uint32_t *slot_of; /* [n_rows * k] row * k + rank -> slot */
} choir_plan;

choir_status choir_plan_create(uint32_t max_rows, uint32_t n_experts, uint32_t k, choir_plan **out)
    CHOIR_MUST_USE;
void choir_plan_destroy(choir_plan *plan);

/* Experts and weights of rows [begin, end) from logits [n_rows, n_experts], which are spent; workers take
 * disjoint rows. correction: NULL, or [n_experts] added to the scores for the choice alone. */
void choir_router_route(const choir_gate *gate, float *logits, const float *correction, uint32_t begin,
                        uint32_t end, choir_plan *plan);
/* The same, but every row goes to one expert with weight 1 (its other ranks have weight 0). */
void choir_router_force(uint32_t expert, uint32_t begin, uint32_t end, choir_plan *plan);
/* Fills the slots once all rows are routed; one worker. */
void choir_plan_group(choir_plan *plan, uint32_t n_rows);
