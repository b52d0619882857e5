/* WHAT    What this machine gives at best, measured in a second: bytes read and int8 products, of
 *         all threads together. `choir bench` holds tokens/s against it.
 * OWNS    Nothing between calls.
 * THREADS It starts its own workers, and ends them.
 * ERRORS  CHOIR_E_NO_MEMORY.
 * LIMITS  The products are those of the kernel table's own 8-bit layout, out of the cache: what a
 *         whole model reaches of it tells what is lost around the products.
 * NEXT    cli/bench.c */
#pragma once
#include "engine/kernels/kernels.h"

typedef struct choir_peak {
    double bytes_per_s; /* sequential reads of memory */
    double ops_per_s;   /* multiplications and additions of int8 matrix products */
} choir_peak;

choir_status choir_peak_measure(const choir_kernels *kernels, uint32_t n_threads,
                                choir_peak *out) CHOIR_MUST_USE;
