/* WHAT    Adapters that become one: what they are, the matrices that they change together, and
 *         where each lies in the file that is written.
 * OWNS    choir_tune_merge: the adapters' files and the list; choir_merge() frees it.
 * THREADS One owner; choir_tune_merge_write() brings its workers.
 * ERRORS  As tune/tune.h says for choir_merge().
 * LIMITS  The matrices of a few modules are in memory at a time.
 * NEXT    tune/merge_module.h, tune/peft_out.c */
#pragma once
#include "engine/adapter_pairs.h"
#include "tune/tune.h"

/* A matrix of the output, or all experts' of one parameter, as engine/adapter_pairs.h has them. */
typedef struct choir_tune_merged {
    const char *name;
    bool embedding, stacked, swapped;
    uint32_t n_experts, rows, cols;
    uint32_t sum_of_ranks; /* of the adapters that have it */
    uint64_t a_at, b_at;   /* bytes from the first tensor's first */
} choir_tune_merged;

typedef struct choir_tune_merge {
    const choir_merge_options *options;
    choir_adapter_pairs *pairs[CHOIR_MAX_MERGE]; /* of each adapter */
    choir_tune_merged *modules;                  /* by name */
    size_t n_modules;
    uint32_t rank; /* of all of them */
    uint64_t data_bytes;
} choir_tune_merge;

/* The folder, whole or not there (tune/peft_out.c). */
choir_status choir_tune_merge_save(const choir_tune_merge *merge) CHOIR_MUST_USE;
/* All tensors into the file, the first at first_byte. */
choir_status choir_tune_merge_write(const choir_tune_merge *merge, uint64_t first_byte,
                                    choir_save *save) CHOIR_MUST_USE;
