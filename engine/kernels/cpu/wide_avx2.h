/* WHAT    16 floats as two AVX2 registers: the vocabulary in which wide_*.h are written.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  wide_avx512.h gives the same names with the same bits; a source includes one of them.
 * NEXT    wide_rows.h, wide_matmul.h, wide_attention.h */
#pragma once
#include "engine/kernels/cpu/levels.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef struct wide {
    __m256 a, b; /* lanes 0..7, 8..15 */
} wide;

enum { FACTOR_SUMS = 4 }; /* two of 16 registers each */

typedef struct wide_double {
    __m256d part[4];
} wide_double;

/* Lanes below n (at most 8) of a register. */
INLINE __m256i first_lanes(uint32_t n)
{
    static const int32_t ramp[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ramp + 8 - (n < 8 ? n : 8)));
}

INLINE uint32_t above_8(uint32_t n)
{
    return n > 8 ? n - 8 : 0;
}

INLINE wide w_load(const float *p)
{
    return (wide){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
INLINE wide w_load_first(const float *p, uint32_t n) /* the other lanes are 0 and not read */
{
    return (wide){_mm256_maskload_ps(p, first_lanes(n)),
                  _mm256_maskload_ps(p + 8, first_lanes(above_8(n)))};
}
INLINE wide w_load_f16(const uint16_t *p)
{
    return (wide){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                  _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1))};
}
INLINE __m256 bf16_lanes(const uint16_t *p)
{
    __m256i wider = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wider, 16));
}
INLINE wide w_load_bf16(const uint16_t *p)
{
    return (wide){bf16_lanes(p), bf16_lanes(p + 8)};
}
INLINE wide w_load_i8(const int8_t *p)
{
    __m128i codes = _mm_loadu_si128((const __m128i *)p);
    __m256i low = _mm256_cvtepi8_epi32(codes);
    __m256i high = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(codes, codes));
    return (wide){_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)};
}
INLINE void w_store(float *p, wide x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE void w_store_first(float *p, wide x, uint32_t n)
{
    _mm256_maskstore_ps(p, first_lanes(n), x.a);
    _mm256_maskstore_ps(p + 8, first_lanes(above_8(n)), x.b);
}
INLINE void w_store_f16(uint16_t *p, wide x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

INLINE wide w_set(float x)
{
    return (wide){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
INLINE wide w_zero(void)
{
    return (wide){_mm256_setzero_ps(), _mm256_setzero_ps()};
}

#define W_BINARY(name, operation)                                                                  \
    INLINE wide name(wide x, wide y)                                                               \
    {                                                                                              \
        return (wide){operation(x.a, y.a), operation(x.b, y.b)};                                   \
    }
W_BINARY(w_add, _mm256_add_ps)
W_BINARY(w_sub, _mm256_sub_ps)
W_BINARY(w_mul, _mm256_mul_ps)
W_BINARY(w_div, _mm256_div_ps)
W_BINARY(w_max, _mm256_max_ps) /* y where x or y is NaN */
W_BINARY(w_min, _mm256_min_ps)
#undef W_BINARY

INLINE wide w_fma(wide x, wide y, wide z) /* x y + z */
{
    return (wide){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE wide w_round(wide x)
{
    enum { mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    return (wide){_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
INLINE __m256 times_power(__m256 x, __m256 n)
{
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
INLINE wide w_times_power(wide x, wide n) /* x 2^n where both are normal; NaN stays NaN */
{
    return (wide){times_power(x.a, n.a), times_power(x.b, n.b)};
}
/* Lanes outside [begin, end) become those of y. */
INLINE wide w_keep(wide x, int32_t begin, int32_t end, wide y)
{
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), eight = _mm256_set1_epi32(8);
    __m256i first = _mm256_set1_epi32(begin - 1), last = _mm256_set1_epi32(end);
    __m256i high = _mm256_add_epi32(lane, eight);
    __m256i in = _mm256_and_si256(_mm256_cmpgt_epi32(lane, first), _mm256_cmpgt_epi32(last, lane));
    __m256i in_high =
        _mm256_and_si256(_mm256_cmpgt_epi32(high, first), _mm256_cmpgt_epi32(last, high));
    return (wide){_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(in)),
                  _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(in_high))};
}

INLINE float w_fold(wide x) /* 8 + 8, 4 + 4, 2 + 2, 1 + 1 */
{
    __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
INLINE float w_fold_max(wide x)
{
    __m256 y = _mm256_max_ps(x.a, x.b);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

INLINE wide_double w_zero_double(void)
{
    __m256d zero = _mm256_setzero_pd();
    return (wide_double){{zero, zero, zero, zero}};
}
INLINE wide_double w_add_double(wide_double sum, wide x)
{
    __m128 part[4] = {_mm256_castps256_ps128(x.a), _mm256_extractf128_ps(x.a, 1),
                      _mm256_castps256_ps128(x.b), _mm256_extractf128_ps(x.b, 1)};
    for (int i = 0; i < 4; i++) sum.part[i] = _mm256_add_pd(sum.part[i], _mm256_cvtps_pd(part[i]));
    return sum;
}
INLINE double w_fold_double(wide_double x)
{
    __m256d y =
        _mm256_add_pd(_mm256_add_pd(x.part[0], x.part[2]), _mm256_add_pd(x.part[1], x.part[3]));
    __m128d z = _mm_add_pd(_mm256_castpd256_pd128(y), _mm256_extractf128_pd(y, 1));
    return _mm_cvtsd_f64(_mm_add_sd(z, _mm_unpackhi_pd(z, z)));
}
