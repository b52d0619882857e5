/* WHAT    The best approximation of a matrix X [rows, cols] by factors B A of a given rank: its
 *         truncated singular value decomposition X = U S V' (Eckart, Young 1936), B = U S, A = V'.
 * OWNS    Nothing between calls.
 * THREADS One a call; several calls may run beside each other.
 * ERRORS  CHOIR_E_NO_MEMORY; CHOIR_E_CANCELLED once *interrupted is set.
 * LIMITS  In f64; singular values below 1e-12 of the largest are noise and left out. Columns of B
 *         and rows of A beyond X's singular values are zero. The same bits each time.
 * NEXT    tune/merge_module.h */
#pragma once
#include "base/base.h"

#include <signal.h>

typedef struct choir_tune_svd {
    uint32_t rows, cols, rank;
    float *a;                                 /* out: [rank, cols], its rows of length 1 or 0 */
    float *b;                                 /* out: [rows, rank] */
    const volatile sig_atomic_t *interrupted; /* NULL, or asked between rounds */
} choir_tune_svd;

/* X = P Q by factors p [rows, inner] and q [inner, cols]; inner is at most rows and cols. */
choir_status choir_tune_svd_product(const choir_tune_svd *svd, uint32_t inner, const double *p,
                                    const double *q) CHOIR_MUST_USE;
/* X as it lies, finite. */
choir_status choir_tune_svd_dense(const choir_tune_svd *svd, const float *x) CHOIR_MUST_USE;
