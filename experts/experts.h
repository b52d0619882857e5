/* WHAT    The expert store: makes (layer, expert) reachable. Today one tier, all experts resident in RAM.
 * OWNS    The experts' packed weights.
 * THREADS Loading: any worker, disjoint experts. pin/unpin: the engine thread.
 * ERRORS  CHOIR_E_NO_MEMORY; CHOIR_E_NOT_FOUND for an expert that was never put.
 * LIMITS  Every pin is paired with one unpin; the view ends there.
 * NEXT    engine/moe.c */
#pragma once
#include "base/base.h"
#include "engine/kernels/kernels.h"

typedef struct choir_experts choir_experts;

typedef struct choir_expert {
    choir_matrix gate, up, down; /* [ffn, hidden], [ffn, hidden], [hidden, ffn] */
    const float *gate_bias, *up_bias, *down_bias; /* NULL, or [ffn], [ffn], [hidden]; the caller's */
} choir_expert;

choir_status choir_experts_create(uint32_t n_layers, uint32_t n_experts, choir_experts **out)
    CHOIR_MUST_USE;
void choir_experts_destroy(choir_experts *store);

/* Reserves a layer's experts, each one run of bytes behind the other, from their planned matrices
 * (choir_matrix_plan; views, which have data already, need no bytes), and sets the matrices' data in place; the caller then
 * packs into them. experts: [n_experts]. */
choir_status choir_experts_reserve(choir_experts *store, uint32_t layer, choir_expert *experts)
    CHOIR_MUST_USE;

choir_status choir_experts_pin(choir_experts *store, uint32_t layer, uint32_t expert,
                               const choir_expert **out) CHOIR_MUST_USE;
void choir_experts_unpin(choir_experts *store, uint32_t layer, uint32_t expert);
uint64_t choir_experts_bytes(const choir_experts *store);
uint32_t choir_experts_n_pinned(const choir_experts *store); /* 0 between steps */
