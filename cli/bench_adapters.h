/* WHAT    Adapters of random numbers for `choir bench --adapters`: LoRA of one rank on a model's matrices.
 * OWNS    choir_bench_adapters: what was made.
 * THREADS The main thread.
 * ERRORS  Those of engine/adapter.h.
 * LIMITS  Their numbers are of no use; their shapes, ranks and places are those of real ones.
 * NEXT    cli/bench.c, engine/adapter.h */
#pragma once
#include "cli/cli.h"

enum { CHOIR_BENCH_MAX_ADAPTERS = 4096 };

typedef struct choir_bench_adapter_options {
    uint32_t n, rank;
    bool mlp_alone; /* not on attention's matrices */
    choir_adapter_type type;
} choir_bench_adapter_options;

typedef struct choir_bench_adapters {
    uint32_t n;
    uint64_t bytes; /* of each */
    choir_adapter **made;
    choir_adapter_use *uses; /* each alone, weight 1 */
} choir_bench_adapters;

/* free() also after a failure. */
choir_status choir_bench_adapters_make(const choir_engine *engine,
                                       const choir_bench_adapter_options *options,
                                       choir_bench_adapters *out) CHOIR_MUST_USE;
void choir_bench_adapters_free(choir_bench_adapters *adapters);
