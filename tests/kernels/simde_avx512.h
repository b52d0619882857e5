/* AVX-512 on CPUs without it, for tests only: SIMDe gives most intrinsics under their own names;
 * those that SIMDe 0.7.4 lacks are plain loops here. Forced into every source of the simulated
 * level (-include). */
#pragma once
#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <math.h>
#include <string.h>

/* What SIMDe lacks, and what immintrin.h declares but this target cannot compile. */
static inline __m512 sim_maskz_loadu_ps(__mmask16 k, const void *p)
{
    float lane[16] = {0};
    for (int i = 0; i < 16; i++)
        if (k >> i & 1) memcpy(lane + i, (const float *)p + i, 4);
    return simde_mm512_loadu_ps(lane);
}

static inline void sim_mask_storeu_ps(void *p, __mmask16 k, __m512 x)
{
    float lane[16];
    simde_mm512_storeu_ps(lane, x);
    for (int i = 0; i < 16; i++)
        if (k >> i & 1) memcpy((float *)p + i, lane + i, 4);
}

static inline __m512 sim_cvtph_ps(__m256i x)
{
    float lane[16];
    _mm256_storeu_ps(lane, _mm256_cvtph_ps(_mm256_castsi256_si128(x)));
    _mm256_storeu_ps(lane + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
    return simde_mm512_loadu_ps(lane);
}

static inline __m256i sim_cvtps_ph(__m512 x)
{
    float lane[16];
    simde_mm512_storeu_ps(lane, x);
    __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(lane), _MM_FROUND_TO_NEAREST_INT);
    __m128i high = _mm256_cvtps_ph(_mm256_loadu_ps(lane + 8), _MM_FROUND_TO_NEAREST_INT);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

static inline __m512i sim_cvtepu16_epi32(__m256i x)
{
    uint16_t from[16];
    uint32_t lane[16];
    _mm256_storeu_si256((__m256i *)from, x);
    for (int i = 0; i < 16; i++) lane[i] = from[i];
    return simde_mm512_loadu_si512(lane);
}

static inline __m512i sim_cvtepi8_epi32(__m128i x)
{
    int8_t from[16];
    int32_t lane[16];
    _mm_storeu_si128((__m128i *)from, x);
    for (int i = 0; i < 16; i++) lane[i] = from[i];
    return simde_mm512_loadu_si512(lane);
}

static inline __m512i sim_cvtps_epi32(__m512 x)
{
    float lane[16];
    __m256i out[2];
    simde_mm512_storeu_ps(lane, x);
    out[0] = _mm256_cvtps_epi32(_mm256_loadu_ps(lane));
    out[1] = _mm256_cvtps_epi32(_mm256_loadu_ps(lane + 8));
    return simde_mm512_loadu_si512(out);
}

static inline __m512 sim_cvtepi32_ps(__m512i x)
{
    int32_t from[16];
    float lane[16];
    simde_mm512_storeu_si512(from, x);
    for (int i = 0; i < 16; i++) lane[i] = (float)from[i];
    return simde_mm512_loadu_ps(lane);
}

static inline __m512d sim_cvtps_pd(__m256 x)
{
    float from[8];
    double lane[8];
    _mm256_storeu_ps(from, x);
    for (int i = 0; i < 8; i++) lane[i] = (double)from[i];
    return simde_mm512_loadu_pd(lane);
}

/* maxps and minps give their second operand where one is NaN; SIMDe's need not. */
static inline __m512 sim_max_ps(__m512 x, __m512 y)
{
    float a[16], b[16];
    simde_mm512_storeu_ps(a, x);
    simde_mm512_storeu_ps(b, y);
    for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return simde_mm512_loadu_ps(a);
}

static inline __m512 sim_min_ps(__m512 x, __m512 y)
{
    float a[16], b[16];
    simde_mm512_storeu_ps(a, x);
    simde_mm512_storeu_ps(b, y);
    for (int i = 0; i < 16; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
    return simde_mm512_loadu_ps(a);
}

static inline __m512 sim_round_ps(__m512 x)
{
    float lane[16];
    simde_mm512_storeu_ps(lane, x);
    for (int i = 0; i < 16; i++) lane[i] = rintf(lane[i]);
    return simde_mm512_loadu_ps(lane);
}

/* Fused, whatever SIMDe does. */
static inline __m512 sim_fmadd_ps(__m512 x, __m512 y, __m512 z)
{
    float a[16], b[16], c[16];
    simde_mm512_storeu_ps(a, x);
    simde_mm512_storeu_ps(b, y);
    simde_mm512_storeu_ps(c, z);
    for (int i = 0; i < 16; i++) a[i] = fmaf(a[i], b[i], c[i]);
    return simde_mm512_loadu_ps(a);
}

#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_pd
#undef _mm512_max_ps
#undef _mm512_min_ps
#undef _mm512_roundscale_ps
#undef _mm512_fmadd_ps
#define _mm512_maskz_loadu_ps(k, p)    sim_maskz_loadu_ps(k, p)
#define _mm512_mask_storeu_ps(p, k, x) sim_mask_storeu_ps(p, k, x)
#define _mm512_cvtph_ps(x)             sim_cvtph_ps(x)
#define _mm512_cvtps_ph(x, mode)       sim_cvtps_ph(x)
#define _mm512_cvtepu16_epi32(x)       sim_cvtepu16_epi32(x)
#define _mm512_cvtepi8_epi32(x)        sim_cvtepi8_epi32(x)
#define _mm512_cvtps_epi32(x)          sim_cvtps_epi32(x)
#define _mm512_cvtepi32_ps(x)          sim_cvtepi32_ps(x)
#define _mm512_cvtps_pd(x)             sim_cvtps_pd(x)
#define _mm512_max_ps(x, y)            sim_max_ps(x, y)
#define _mm512_min_ps(x, y)            sim_min_ps(x, y)
#define _mm512_roundscale_ps(x, mode)  sim_round_ps(x)
#define _mm512_fmadd_ps(x, y, z)       sim_fmadd_ps(x, y, z)
