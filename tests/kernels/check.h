/* The kernel check: every entry of every level against the reference, in the manner of checkasm.
 * All levels keep one order of operations, so the tolerance is nothing: bits must be equal. */
#pragma once
#include "engine/kernels/kernels.h"

#include <stdio.h>

/* -- seeded numbers
 * -------------------------------------------------------------------------------- */
void check_seed(uint64_t seed);
uint32_t check_below(uint32_t n); /* 0 .. n-1 */
float check_float(void);          /* about normal, variance 1; a tenth of them 100 times larger */
void check_floats(float *out, size_t n);

/* -- outputs with guard bytes on both sides
 * -------------------------------------------------------- */
typedef struct guarded {
    uint8_t *base;
    void *data; /* 64-aligned */
    size_t bytes;
} guarded;
guarded check_alloc(size_t bytes); /* filled with a pattern */
bool check_guards(const guarded *g);
void check_free(guarded *g);

/* Reports and counts a failure; true when both are the same bits and their guards are whole. */
bool check_same(const char *what, const guarded *expected, const guarded *got);
bool check_true(const char *what, bool condition);
const char *check_label(const char *format, ...) CHOIR_PRINTF(1, 2); /* valid until the next call */
uint32_t check_failures(void);

/* A random tensor of any type with sane scales; free() its data. */
choir_tensor check_tensor(choir_dtype dtype, uint32_t rows, uint32_t cols);
/* Packed (or EXACT: lent from the tensor); free() the data of a packed one. */
choir_matrix check_packed(const choir_tensor *t);

/* -- the checks: `k` against `ref`
 * ------------------------------------------------------------------ */
void check_rows(const choir_kernels *ref, const choir_kernels *k);
void check_matmul(const choir_kernels *ref, const choir_kernels *k);
void check_factors(const choir_kernels *ref, const choir_kernels *k);
void check_attention(const choir_kernels *ref, const choir_kernels *k);
void check_bench(const choir_kernels *k);
