/* WHAT    One matrix's pairs A, B of several LoRA adapters merged into one pair, as PEFT's
 *         add_weighted_adapter() does it: weighted sums of the factors or of the products B A, one
 *         behind the other, or with numbers pruned first: TIES (Yadav et al. 2023), DARE (Yu et al.
 *         2024), by magnitude.
 * OWNS    Nothing between calls.
 * THREADS One a call; several calls may run beside each other.
 * ERRORS  CHOIR_E_NO_MEMORY, CHOIR_E_CANCELLED, CHOIR_E_DATA_LOSS (a result too large for f32).
 * LIMITS  Sums in f64. Of numbers of one magnitude those that lie first stay. What is pruned at
 *         random depends on the seed, the matrix's name and the adapter's place in the list alone.
 * NEXT    tune/svd.h */
#pragma once
#include "tune/tune.h"

typedef struct choir_tune_source {
    const float *a, *b; /* [rank, cols], [rows, rank] */
    uint32_t rank;
    double scale, weight;
    uint32_t adapter; /* its place in the list */
} choir_tune_source;

typedef struct choir_tune_target {
    const char *name; /* of the matrix, for sentences */
    uint64_t stream;  /* a number of this name */
    uint32_t rows, cols, rank;
    float *a, *b; /* [rank, cols], [rows, rank] */
} choir_tune_target;

/* Methods that add factors want sources of one rank, at most the target's; "cat" a target's rank
 * that is their sum or more. What a pair does not fill is zero. */
choir_status choir_tune_merge_module(const choir_merge_options *options,
                                     const choir_tune_source *sources, uint32_t n_sources,
                                     const choir_tune_target *target) CHOIR_MUST_USE;
/* About how much memory a call takes at most. */
uint64_t choir_tune_merge_module_bytes(choir_merge_method method, uint32_t rows, uint32_t cols,
                                       uint32_t sum_of_ranks, uint32_t rank);
