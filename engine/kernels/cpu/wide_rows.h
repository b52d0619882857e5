/* WHAT    Row kernels on 16 lanes: norm, rope, SwiGLU, sums, conversion, exponentials,
 *         quantisation.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  Included once by each level's source, after its wide_*.h. Bits equal reference.c's.
 * NEXT    wide_attention.h */
#pragma once

INLINE wide exp2_of(wide n, wide f) /* 2^(n + f) */
{
    wide p = w_fma(w_set(EXP2_C5), f, w_set(EXP2_C4));
    p = w_fma(p, f, w_set(EXP2_C3));
    p = w_fma(p, f, w_set(EXP2_C2));
    p = w_fma(p, f, w_set(EXP2_C1));
    p = w_fma(p, f, w_set(EXP2_C0));
    p = w_fma(p, f, w_set(1.0F));
    return w_times_power(p, n);
}

INLINE wide exp2_wide(wide x)
{
    x = w_min(w_set(EXP2_MAX), w_max(w_set(EXP2_MIN), x));
    wide n = w_round(x);
    return exp2_of(n, w_sub(x, n));
}

INLINE wide exp_wide(wide x)
{
    x = w_min(w_set(EXP_MAX), w_max(w_set(EXP_MIN), x));
    wide n = w_round(w_mul(x, w_set(LOG2E_HIGH)));
    wide f = w_fma(x, w_set(LOG2E_HIGH), w_sub(w_zero(), n));
    return exp2_of(n, w_fma(x, w_set(LOG2E_LOW), f));
}

/* Walks a row in steps of 16 lanes: BODY sees `i`; TAIL sees `i` and `left`, 1..15. */
#define FOR_ROW(n, BODY, TAIL)                                                                     \
    do {                                                                                           \
        uint32_t i = 0;                                                                            \
        for (; i + LANES <= (n); i += LANES) BODY;                                                 \
        if (i < (n)) {                                                                             \
            uint32_t left = (n)-i;                                                                 \
            TAIL;                                                                                  \
        }                                                                                          \
    } while (0)

static void rms_norm(const float *x, const float *weight, float eps, uint32_t n, float *out)
{
    wide sum = w_zero();
    FOR_ROW(
        n,
        {
            wide v = w_load(x + i);
            sum = w_fma(v, v, sum);
        },
        {
            wide v = w_load_first(x + i, left);
            sum = w_fma(v, v, sum);
        });
    wide scale = w_set(1.0F / __builtin_sqrtf(w_fold(sum) / (float)n + eps)), one = w_set(1.0F);
    FOR_ROW(
        n,
        {
            wide v = w_mul(w_load(x + i), scale);
            w_store(out + i, w_mul(v, weight != NULL ? w_load(weight + i) : one));
        },
        {
            wide v = w_mul(w_load_first(x + i, left), scale);
            v = w_mul(v, weight != NULL ? w_load_first(weight + i, left) : one);
            w_store_first(out + i, v, left);
        });
}

static void rope_pair(float *a, float *b, float cos, float sin)
{
    float a0 = *a, b0 = *b;
    *a = __builtin_fmaf(a0, cos, -(b0 * sin));
    *b = __builtin_fmaf(b0, cos, a0 * sin);
}

static void rope(float *x, uint32_t rotary_dims, bool interleaved, const float *cos,
                 const float *sin)
{
    uint32_t half = rotary_dims / 2, i = 0;
    if (interleaved) {
        for (; i < half; i++) rope_pair(x + 2 * i, x + 2 * i + 1, cos[i], sin[i]);
        return;
    }
    for (; i + LANES <= half; i += LANES) {
        wide a = w_load(x + i), b = w_load(x + half + i), c = w_load(cos + i), s = w_load(sin + i);
        w_store(x + i, w_fma(a, c, w_sub(w_set(-0.0F), w_mul(b, s))));
        w_store(x + half + i, w_fma(b, c, w_mul(a, s)));
    }
    for (; i < half; i++) rope_pair(x + i, x + half + i, cos[i], sin[i]);
}

INLINE wide silu(wide g)
{
    return w_div(g, w_add(w_set(1.0F), exp_wide(w_sub(w_set(-0.0F), g))));
}

static void silu_mul(const float *gate, const float *up, uint32_t n, float *out)
{
    FOR_ROW(
        n, { w_store(out + i, w_mul(silu(w_load(gate + i)), w_load(up + i))); },
        {
            wide g = silu(w_load_first(gate + i, left));
            w_store_first(out + i, w_mul(g, w_load_first(up + i, left)), left);
        });
}

INLINE wide gelu(wide g)
{
    wide u = w_mul(g, w_fma(w_mul(g, g), w_set(GELU_B), w_set(GELU_A)));
    return w_div(g, w_add(w_set(1.0F), exp_wide(w_sub(w_set(-0.0F), u))));
}

static void gelu_mul(const float *gate, const float *up, uint32_t n, float *out)
{
    FOR_ROW(
        n, { w_store(out + i, w_mul(gelu(w_load(gate + i)), w_load(up + i))); },
        {
            wide g = gelu(w_load_first(gate + i, left));
            w_store_first(out + i, w_mul(g, w_load_first(up + i, left)), left);
        });
}

INLINE wide clamped(wide gate, wide up, wide alpha, wide limit)
{
    wide g = w_min(limit, gate), u = w_max(w_sub(w_set(-0.0F), limit), up);
    wide e = exp_wide(w_sub(w_set(-0.0F), w_mul(alpha, g)));
    u = w_add(w_min(limit, u), w_set(1.0F));
    return w_mul(w_div(g, w_add(w_set(1.0F), e)), u);
}

static void clamped_swiglu(const float *gate, const float *up, float alpha, float limit, uint32_t n,
                           float *out)
{
    wide a = w_set(alpha), l = w_set(limit);
    FOR_ROW(
        n, { w_store(out + i, clamped(w_load(gate + i), w_load(up + i), a, l)); },
        {
            wide x = clamped(w_load_first(gate + i, left), w_load_first(up + i, left), a, l);
            w_store_first(out + i, x, left);
        });
}

/* 1 - 2 / (1 + e^2x) */
INLINE wide tanh_wide(wide x)
{
    wide e = exp_wide(w_mul(w_set(2.0F), x));
    return w_sub(w_set(1.0F), w_div(w_set(2.0F), w_add(w_set(1.0F), e)));
}

static void softcap(float *x, float cap, uint32_t n)
{
    wide c = w_set(cap), inverse = w_set(1.0F / cap);
    FOR_ROW(
        n, { w_store(x + i, w_mul(c, tanh_wide(w_mul(w_load(x + i), inverse)))); },
        {
            wide t = tanh_wide(w_mul(w_load_first(x + i, left), inverse));
            w_store_first(x + i, w_mul(c, t), left);
        });
}

static void add(float *x, const float *y, uint32_t n)
{
    FOR_ROW(
        n, { w_store(x + i, w_add(w_load(x + i), w_load(y + i))); },
        {
            wide sum = w_add(w_load_first(x + i, left), w_load_first(y + i, left));
            w_store_first(x + i, sum, left);
        });
}

static void add_scaled(float *x, const float *y, float scale, uint32_t n)
{
    wide s = w_set(scale);
    FOR_ROW(
        n, { w_store(x + i, w_fma(s, w_load(y + i), w_load(x + i))); },
        {
            wide sum = w_fma(s, w_load_first(y + i, left), w_load_first(x + i, left));
            w_store_first(x + i, sum, left);
        });
}

static void f32_to_f16_row(const float *x, uint32_t n, uint16_t *out)
{
    FOR_ROW(
        n, { w_store_f16(out + i, w_load(x + i)); },
        {
            uint16_t tail[LANES];
            w_store_f16(tail, w_load_first(x + i, left));
            memcpy(out + i, tail, left * sizeof *tail);
        });
}

static void f16_to_f32_row(const void *x, uint32_t n, float *out)
{
    const uint16_t *from = x;
    FOR_ROW(
        n, { w_store(out + i, w_load_f16(from + i)); },
        {
            uint16_t tail[LANES] = {0};
            memcpy(tail, (const char *)x + (size_t)i * 2, left * sizeof *tail);
            w_store_first(out + i, w_load_f16(tail), left);
        });
}

static float max_of_row(const float *x, uint32_t n)
{
    wide low = w_set(-__builtin_inff()), max = low;
    FOR_ROW(
        n, { max = w_max(w_load(x + i), max); },
        { max = w_max(w_keep(w_load_first(x + i, left), 0, (int32_t)left, low), max); });
    return w_fold_max(max);
}

static double sum_exp(const float *x, float max, uint32_t n)
{
    wide_double sum = w_zero_double();
    wide m = w_set(max);
    FOR_ROW(
        n, { sum = w_add_double(sum, exp_wide(w_sub(w_load(x + i), m))); },
        {
            wide e = exp_wide(w_sub(w_load_first(x + i, left), m));
            sum = w_add_double(sum, w_keep(e, 0, (int32_t)left, w_zero()));
        });
    return w_fold_double(sum);
}

/* -- quantisation -- */

/* The largest |x| of 32 by its bits, so that Inf and NaN come out on top. */
INLINE float largest_of_block(const float *x)
{
    __m256i mask = _mm256_set1_epi32(0x7fffffff), max = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(x + i * 8));
        max = _mm256_max_epu32(max, _mm256_and_si256(bits, mask));
    }
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return bits_to_f32((uint32_t)_mm_cvtsi128_si32(m));
}

/* 32 codes as int16, in order. */
typedef struct block_words {
    __m256i half[2];
} block_words;

INLINE block_words words_of_block(const float *x, float inverse)
{
    __m256 scale = _mm256_set1_ps(inverse);
    block_words w;
    for (int i = 0; i < 2; i++, x += 16) {
        __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), scale));
        __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), scale));
        /* Packs work within 128-bit halves; the permutation puts the fours back in order. */
        w.half[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    }
    return w;
}

INLINE __m256i join_bytes(__m256i a, __m256i b)
{
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
}

INLINE int32_t sum_of_words(__m256i words)
{
    __m256i x = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

INLINE void store_block(const acts_layout *l, uint8_t *row, uint32_t b, block_words w, float d)
{
    __m256i high[2], low[2], *words = (__m256i *)(row + l->words_at) + 2 * (size_t)b;
    int32_t *sums = (int32_t *)(row + l->sums_at) + (size_t)b * N_SUMS;
    for (int i = 0; i < 2; i++) {
        high[i] = _mm256_srai_epi16(_mm256_add_epi16(w.half[i], _mm256_set1_epi16(128)), 8);
        low[i] = _mm256_sub_epi16(w.half[i], _mm256_slli_epi16(high[i], 8));
        __m256i shuffled = _mm256_shufflelo_epi16(w.half[i], 0xd8);
        _mm256_storeu_si256(words + i, _mm256_shufflehi_epi16(shuffled, 0xd8));
        sums[i] = sum_of_words(w.half[i]);
    }
    _mm256_storeu_si256((__m256i *)row + b, join_bytes(high[0], high[1]));
    _mm256_storeu_si256((__m256i *)(row + l->low_at) + b, join_bytes(low[0], low[1]));
    ((float *)(row + l->d_at))[b] = d;
    ((float *)(row + l->s_at))[b] = d * (float)(sums[SUM_FIRST] + sums[SUM_SECOND]);
}

static void quantize_row(const float *x, uint32_t cols, const acts_layout *l, uint8_t *row)
{
    float tail[BLOCK];
    for (uint32_t b = 0; b < l->n_blocks; b++) {
        const float *from = x + (size_t)b * BLOCK;
        if (cols - b * BLOCK < BLOCK) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, from, (cols - b * BLOCK) * sizeof *tail);
            from = tail;
        }
        float max = largest_of_block(from), d = max / CODE_MAX;
        block_words words = {{_mm256_setzero_si256(), _mm256_setzero_si256()}};
        if (!(max <= __FLT_MAX__))
            d = __builtin_nanf("");
        else if (max < QUANT_MIN)
            d = 0;
        else
            words = words_of_block(from, CODE_MAX / max);
        store_block(l, row, b, words, d);
    }
}

static void quantize(const float *x, uint32_t cols, void *q8, uint32_t begin, uint32_t end)
{
    acts_layout l = choir_acts_layout(cols);
    for (uint32_t i = begin; i < end; i++)
        quantize_row(x + (size_t)i * cols, cols, &l, (uint8_t *)q8 + i * l.row_bytes);
}
