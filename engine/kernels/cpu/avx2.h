/* WHAT    The parts of the AVX2 level; avx2.c gathers them into its table.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  Only avx2*.c include this; they are compiled with -mavx2 -mfma -mf16c.
 * NEXT    avx2_quant.c */
#pragma once
#include "engine/kernels/cpu/levels.h"

void choir_avx2_quant_matmul(const choir_matrix *w, const choir_acts *acts, float *restrict y,
                             size_t ldy, uint32_t begin, uint32_t end);
