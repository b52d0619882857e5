/* WHAT    16 floats as one AVX-512 register: the same vocabulary as wide_avx2.h, with the same
 *         bits.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  AVX-512 F, BW, VL, and AVX2; a source includes this or wide_avx2.h. Tests compile it
 *         through SIMDe too, to run it on any x86 (tests/kernels/simde_avx512.h).
 * NEXT    wide_rows.h, wide_matmul.h, wide_attention.h */
#pragma once
#include "engine/kernels/cpu/levels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef __m512 wide;
enum { FACTOR_SUMS = 16 }; /* of 32 registers */

typedef struct wide_double {
    __m512d low, high; /* lanes 0..7, 8..15 */
} wide_double;

enum { ROUND_NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };

INLINE __mmask16 first_lanes(uint32_t n)
{
    return (__mmask16)((1U << n) - 1);
}

INLINE wide w_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
INLINE wide w_load_first(const float *p, uint32_t n) /* the other lanes are 0 and not read */
{
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
INLINE wide w_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE wide w_load_bf16(const uint16_t *p)
{
    __m512i wider = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wider, 16));
}
INLINE wide w_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE void w_store(float *p, wide x)
{
    _mm512_storeu_ps(p, x);
}
INLINE void w_store_first(float *p, wide x, uint32_t n)
{
    _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
INLINE void w_store_f16(uint16_t *p, wide x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, ROUND_NEAREST));
}

INLINE wide w_set(float x)
{
    return _mm512_set1_ps(x);
}
INLINE wide w_zero(void)
{
    return _mm512_setzero_ps();
}
INLINE wide w_add(wide x, wide y)
{
    return _mm512_add_ps(x, y);
}
INLINE wide w_sub(wide x, wide y)
{
    return _mm512_sub_ps(x, y);
}
INLINE wide w_mul(wide x, wide y)
{
    return _mm512_mul_ps(x, y);
}
INLINE wide w_div(wide x, wide y)
{
    return _mm512_div_ps(x, y);
}
INLINE wide w_max(wide x, wide y)
{
    return _mm512_max_ps(x, y);
} /* y where x or y is NaN */
INLINE wide w_min(wide x, wide y)
{
    return _mm512_min_ps(x, y);
}
INLINE wide w_fma(wide x, wide y, wide z)
{
    return _mm512_fmadd_ps(x, y, z);
} /* x y + z */
INLINE wide w_round(wide x)
{
    return _mm512_roundscale_ps(x, ROUND_NEAREST);
}
INLINE wide w_times_power(wide x, wide n) /* x 2^n where both are normal; NaN stays NaN */
{
    __m512i exponent = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), exponent));
}
/* Lanes outside [begin, end) become those of y. */
INLINE wide w_keep(wide x, int32_t begin, int32_t end, wide y)
{
    uint32_t below_end = end >= 16 ? 0xffff : (1U << (end > 0 ? end : 0)) - 1;
    uint32_t below_begin = begin >= 16 ? 0xffff : (1U << (begin > 0 ? begin : 0)) - 1;
    return _mm512_mask_blend_ps((__mmask16)(below_end & ~below_begin), y, x);
}

INLINE __m256 low_half(wide x)
{
    return _mm512_castps512_ps256(x);
}
INLINE __m256 high_half(wide x)
{
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
}

INLINE float w_fold(wide x) /* 8 + 8, 4 + 4, 2 + 2, 1 + 1 */
{
    __m256 y = _mm256_add_ps(low_half(x), high_half(x));
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
INLINE float w_fold_max(wide x)
{
    __m256 y = _mm256_max_ps(low_half(x), high_half(x));
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

INLINE wide_double w_zero_double(void)
{
    return (wide_double){_mm512_setzero_pd(), _mm512_setzero_pd()};
}
INLINE wide_double w_add_double(wide_double sum, wide x)
{
    sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(low_half(x)));
    sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(high_half(x)));
    return sum;
}
INLINE double w_fold_double(wide_double x)
{
    __m512d sum = _mm512_add_pd(x.low, x.high);
    __m256d y = _mm256_add_pd(_mm512_castpd512_pd256(sum), _mm512_extractf64x4_pd(sum, 1));
    __m128d z = _mm_add_pd(_mm256_castpd256_pd128(y), _mm256_extractf128_pd(y, 1));
    return _mm_cvtsd_f64(_mm_add_sd(z, _mm_unpackhi_pd(z, z)));
}
