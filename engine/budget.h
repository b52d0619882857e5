/* WHAT    How one budget of memory is split between KV pages, adapters and experts; internal to engine/.
 * OWNS    Nothing.
 * THREADS Any: pure functions.
 * ERRORS  False: it is too little.
 * LIMITS  What the parts have at most, together, is within what is there, so that no part's growth takes from
 *         another but from the experts, which have whatever is not in use.
 * NEXT    engine/budget.c */
#pragma once
#include "base/base.h"

typedef struct budget_wishes {
    uint64_t rest;              /* what is there */
    uint64_t experts;           /* bytes of all, or what was told for them */
    uint64_t spare_experts;     /* that must be beside all experts, for them to be resident with less KV than wanted */
    uint64_t few_experts;       /* the least to stream with */
    uint64_t kv, least_kv;      /* kv >= least_kv */
    uint64_t adapters;          /* at most; 0: none */
} budget_wishes;

typedef struct budget_parts {
    uint64_t kv, kv_floor;             /* at most, at least */
    uint64_t adapters, adapter_floor;
    uint64_t experts;                  /* with all that KV pages may have taken, and adapters their floor */
} budget_parts;

/* Each part has its own memory, and all experts are there. */
bool choir_budget_fixed(const budget_wishes *w, budget_parts *out);
/* Experts are streamed, and share. */
bool choir_budget_shared(const budget_wishes *w, budget_parts *out);
