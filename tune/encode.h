/* WHAT    Rows of f32 into the types that Choir writes: F32, F16, BF16, Q8_0, Q4_1, Q4_0, bit for bit what gguf-py and
 *         PyTorch make of them; and Choir's own Q2 and Q3, by a search for the least squared error.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  false: a value is NaN, infinite, or too large for the type.
 * LIMITS  n is a multiple of the type's block.
 * NEXT    tune/weights.h */
#pragma once
#include "engine/kernels/kernels.h"

bool choir_tune_can_encode(choir_dtype dtype);
bool choir_tune_encode(choir_dtype dtype, const float *x, uint32_t n, void *out) CHOIR_MUST_USE;
