/* f32 rows to a file's types, bit for bit as gguf-py quantises; internal to tune/. */
#pragma once
#include "engine/engine.h"

bool can_quantize(choir_dtype dtype); /* Q8_0, Q4_1, F16, BF16, F32 */
/* out: choir_dtype_row_bytes(dtype, n); n a multiple of the block. */
void quantize_row(choir_dtype dtype, const float *x, uint32_t n, uint8_t *out);
