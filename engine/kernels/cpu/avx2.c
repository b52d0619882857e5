/* The AVX2 level (with FMA and F16C). */
#include "engine/kernels/cpu/avx2.h"
#include "engine/kernels/cpu/wide_avx2.h"
/* wide_*.h need the vocabulary above. */
#include "engine/kernels/cpu/wide_attention.h"
#include "engine/kernels/cpu/wide_factors.h"
#include "engine/kernels/cpu/wide_matmul.h"
#include "engine/kernels/cpu/wide_rows.h"

static void matmul(const choir_matrix *w, const choir_acts *acts, float *restrict y, size_t ldy,
                   uint32_t begin, uint32_t end)
{
    if (choir_layout_has_codes(w->layout))
        choir_avx2_quant_matmul(w, acts, y, ldy, begin, end);
    else
        float_matmul(w, acts, y, ldy, begin, end);
}

const choir_kernels choir_kernels_avx2 = {
    .level = CHOIR_CPU_AVX2,
    .name = "avx2",
    .quantize = quantize,
    .matmul = matmul,
    .shrink = shrink,
    .expand = expand,
    .rms_norm = rms_norm,
    .rope = rope,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .clamped_swiglu = clamped_swiglu,
    .softcap = softcap,
    .add = add,
    .add_scaled = add_scaled,
    .f32_to_f16 = f32_to_f16_row,
    .f16_to_f32 = f16_to_f32_row,
    .attention = attention,
    .max = max_of_row,
    .sum_exp = sum_exp,
};
