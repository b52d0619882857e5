/* The reference: every kernel in plain C, in the order of operations that all levels keep. Slow on
 * purpose; it is what the others are checked against. */
#include "engine/kernels/cpu/levels.h"

#include <float.h>
#include <math.h>

/* -- exponentials -- */

static float clamp(float x, float min, float max) /* NaN stays NaN */
{
    if (x < min) return min;
    return x > max ? max : x;
}

/* 2^(n + f), |f| <= 0.5 */
static float scaled_exp2(float n, float f)
{
    float p = EXP2_C5;
    p = fmaf(p, f, EXP2_C4);
    p = fmaf(p, f, EXP2_C3);
    p = fmaf(p, f, EXP2_C2);
    p = fmaf(p, f, EXP2_C1);
    p = fmaf(p, f, EXP2_C0);
    p = fmaf(p, f, 1.0F);
    if (isnan(p)) return p;
    return bits_to_f32(f32_to_bits(p) + ((uint32_t)(int32_t)n << 23));
}

float choir_reference_exp2(float x)
{
    x = clamp(x, EXP2_MIN, EXP2_MAX);
    float n = rintf(x);
    return scaled_exp2(n, x - n);
}

/* e^x: the product with log2(e) is kept to twice the precision, or large |x| would lose digits. */
static float exp_e(float x)
{
    x = clamp(x, EXP_MIN, EXP_MAX);
    float n = rintf(x * LOG2E_HIGH);
    return scaled_exp2(n, fmaf(x, LOG2E_LOW, fmaf(x, LOG2E_HIGH, -n)));
}

static float fold(float *sum)
{
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) sum[i] += sum[i + n];
    return sum[0];
}

/* -- quantisation -- */

/* The largest |x| by its bits, so that Inf and NaN come out on top. */
static float largest(const float *x, uint32_t n)
{
    uint32_t max = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits = f32_to_bits(x[i]) & 0x7fffffff;
        if (bits > max) max = bits;
    }
    return bits_to_f32(max);
}

static float quantize_block(const float *x, uint32_t n, int32_t *codes)
{
    float max = largest(x, n);
    bool finite = max <= FLT_MAX, zero = max < QUANT_MIN;
    float inverse = finite && !zero ? CODE_MAX / max : 0;
    for (uint32_t i = 0; i < BLOCK; i++)
        codes[i] = (int32_t)(i < n && inverse != 0 ? rintf(x[i] * inverse) : 0);
    if (!finite) return NAN; /* the outputs must show it */
    return zero ? 0 : max / CODE_MAX;
}

static void store_block(const acts_layout *l, uint8_t *row, uint32_t b, const int32_t *codes,
                        float d)
{
    static const uint8_t order[4] = {0, 2, 1, 3};
    int8_t *high = (int8_t *)row + (size_t)b * BLOCK, *low = high + l->low_at;
    int16_t *words = (int16_t *)(row + l->words_at) + (size_t)b * BLOCK;
    int32_t *sums = (int32_t *)(row + l->sums_at) + (size_t)b * N_SUMS;
    memset(sums, 0, N_SUMS * sizeof *sums);
    for (uint32_t k = 0; k < BLOCK; k++) {
        high[k] = (int8_t)((codes[k] + 128) >> 8);
        low[k] = (int8_t)(codes[k] - 256 * high[k]);
        words[k] = (int16_t)codes[k / 4 * 4 + order[k % 4]];
        sums[k / 16] += codes[k];
    }
    ((float *)(row + l->d_at))[b] = d;
    ((float *)(row + l->s_at))[b] = d * (float)(sums[SUM_FIRST] + sums[SUM_SECOND]);
}

static void quantize(const float *x, uint32_t cols, void *q8, uint32_t begin, uint32_t end)
{
    acts_layout l = choir_acts_layout(cols);
    for (uint32_t i = begin; i < end; i++)
        for (uint32_t b = 0; b < l.n_blocks; b++) {
            int32_t codes[BLOCK];
            uint32_t left = cols - b * BLOCK, n = left < BLOCK ? left : BLOCK;
            float d = quantize_block(x + (size_t)i * cols + b * BLOCK, n, codes);
            store_block(&l, (uint8_t *)q8 + i * l.row_bytes, b, codes, d);
        }
}

/* -- matmul -- */

static float scale_of(const quant_layout *l, const uint8_t *block, uint32_t i)
{
    float value;
    if (!l->f32) return f16_to_f32(load_u16(block + i * 2));
    memcpy(&value, block + i * 4, 4);
    return value;
}

static int32_t act_of(const acts_layout *a, const uint8_t *row, uint32_t k)
{
    return 256 * ((const int8_t *)row)[k] + ((const int8_t *)row)[a->low_at + k];
}

static float quantised_dot(const choir_matrix *w, const quant_layout *l, const uint8_t *strip,
                           uint32_t r, const uint8_t *row)
{
    acts_layout a = choir_acts_layout(w->cols);
    const float *d = (const float *)(row + a.d_at);
    const float *s = (const float *)(row + a.s_at);
    const int32_t *sums = (const int32_t *)(row + a.sums_at);
    const uint8_t *table = choir_code_tables[l->table];
    uint32_t n = BLOCK / l->n_groups;
    int32_t zero = l->min ? 0 : 1 << l->zero_log2;
    float y = 0;
    for (uint32_t b = 0; b < l->n_blocks; b++) {
        const uint8_t *scales = strip + (size_t)b * l->scale_bytes;
        const uint8_t *codes = strip + l->codes_at + (size_t)b * l->code_bytes;
        for (uint32_t g = 0; g < l->n_groups; g++) {
            int32_t sum = 0;
            for (uint32_t k = g * n; k < (g + 1) * n; k++) {
                int32_t code = (int32_t)choir_code_at(w->layout, codes, r, k);
                if (l->table != TABLE_NONE) code = table[code];
                sum += (code - zero) * act_of(&a, row, b * BLOCK + k);
            }
            y = fmaf((float)sum, scale_of(l, scales, g * STRIP + r) * d[b], y);
            float of_minimum = l->n_groups == 1 ? s[b] : d[b] * (float)sums[b * N_SUMS + g];
            if (l->min) y = fmaf(scale_of(l, scales, (l->n_groups + g) * STRIP + r), of_minimum, y);
        }
    }
    return y;
}

static void quantised_matmul(const choir_matrix *w, const choir_acts *acts, float *y, size_t ldy,
                             uint32_t begin, uint32_t end)
{
    quant_layout l = choir_quant_layout(w);
    size_t row_bytes = choir_acts_layout(w->cols).row_bytes;
    CHOIR_ASSERT(acts->q8 != NULL);
    for (uint32_t r = begin; r < end; r++) {
        const uint8_t *strip = (const uint8_t *)w->data + r / STRIP * l.strip_bytes;
        for (size_t i = 0; i < acts->n_rows; i++)
            y[i * ldy + r] =
                quantised_dot(w, &l, strip, r % STRIP, (const uint8_t *)acts->q8 + i * row_bytes);
    }
}

/* Elements [k, k + n) of output row r as f32; `out` is [n]. */
static void float_weights(const choir_matrix *w, uint32_t r, uint32_t k, uint32_t n, float *out)
{
    const uint8_t *data = w->data;
    if (w->layout == CHOIR_LAYOUT_EXACT) {
        data += r * choir_dtype_row_bytes(w->dtype, w->cols);
        choir_dequantize(w->dtype, data, k, k + n, out);
        return;
    }
    size_t size = w->layout == CHOIR_LAYOUT_F32 ? 4 : 2;
    data += r / STRIP * choir_float_strip_bytes(w);
    for (size_t i = 0; i < n; i++)
        choir_dequantize(w->dtype, data + ((k + i) * STRIP + r % STRIP) * size, 0, 1, out + i);
}

static void float_matmul(const choir_matrix *w, const choir_acts *acts, float *y, size_t ldy,
                         uint32_t begin, uint32_t end)
{
    float weights[FLOAT_CHUNK];
    for (uint32_t r = begin; r < end; r++)
        for (uint32_t k = 0; k < w->cols; k += FLOAT_CHUNK) {
            uint32_t n = w->cols - k < FLOAT_CHUNK ? w->cols - k : FLOAT_CHUNK;
            float_weights(w, r, k, n, weights);
            for (size_t i = 0; i < acts->n_rows; i++) {
                const float *x = acts->x + i * acts->cols + k;
                float sum = 0;
                for (uint32_t j = 0; j < n; j++) sum = fmaf(weights[j], x[j], sum);
                y[i * ldy + r] = k == 0 ? sum : y[i * ldy + r] + sum;
            }
        }
}

static void matmul(const choir_matrix *w, const choir_acts *acts, float *restrict y, size_t ldy,
                   uint32_t begin, uint32_t end)
{
    if (choir_layout_has_codes(w->layout))
        quantised_matmul(w, acts, y, ldy, begin, end);
    else
        float_matmul(w, acts, y, ldy, begin, end);
}

/* -- low-rank factors -- */

static float factor_at(const choir_factor *f, uint32_t r, uint32_t i)
{
    size_t at = (size_t)r * f->stride + i;
    switch (f->type) {
    case CHOIR_FACTOR_F32:
        return ((const float *)f->data)[at];
    case CHOIR_FACTOR_F16:
        return f16_to_f32(((const uint16_t *)f->data)[at]);
    case CHOIR_FACTOR_BF16:
        return bf16_to_f32(((const uint16_t *)f->data)[at]);
    default:
        return ((const int8_t *)f->data)[at];
    }
}

static void shrink(const choir_factor *a, const float *x, size_t ldx, uint32_t n_rows, float *t,
                   size_t ldt)
{
    for (size_t i = 0; i < n_rows; i++)
        for (uint32_t r = 0; r < a->rank; r++) {
            float sum[LANES] = {0};
            for (uint32_t k = 0; k < a->length; k++)
                sum[k % LANES] = fmaf(factor_at(a, r, k), x[i * ldx + k], sum[k % LANES]);
            t[i * ldt + r] = fold(sum) * choir_factor_scale(a, r);
        }
}

static void expand(const choir_factor *b, const float *t, size_t ldt, uint32_t n_rows, float *y,
                   size_t ldy, uint32_t begin, uint32_t end)
{
    for (size_t i = 0; i < n_rows; i++)
        for (uint32_t c = begin; c < end; c++)
            for (uint32_t r = 0; r < b->rank; r++)
                y[i * ldy + c] = fmaf(t[i * ldt + r] * choir_factor_scale(b, r), factor_at(b, r, c),
                                      y[i * ldy + c]);
}

/* -- rows -- */

static void rms_norm(const float *x, const float *weight, float eps, uint32_t n, float *out)
{
    float sum[LANES] = {0};
    for (uint32_t i = 0; i < n; i++) sum[i % LANES] = fmaf(x[i], x[i], sum[i % LANES]);
    float scale = 1.0F / sqrtf(fold(sum) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++) out[i] = x[i] * scale * (weight != NULL ? weight[i] : 1.0F);
}

static void rope(float *x, uint32_t rotary_dims, bool interleaved, const float *cos,
                 const float *sin)
{
    uint32_t half = rotary_dims / 2;
    for (uint32_t i = 0; i < half; i++) {
        float *a = x + (interleaved ? 2 * i : i), *b = interleaved ? a + 1 : a + half;
        float a0 = *a, b0 = *b;
        *a = fmaf(a0, cos[i], -(b0 * sin[i]));
        *b = fmaf(b0, cos[i], a0 * sin[i]);
    }
}

static void silu_mul(const float *gate, const float *up, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n; i++) out[i] = gate[i] / (1.0F + exp_e(-gate[i])) * up[i];
}

static void gelu_mul(const float *gate, const float *up, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n; i++) {
        float g = gate[i], u = g * fmaf(g * g, GELU_B, GELU_A);
        out[i] = g / (1.0F + exp_e(-u)) * up[i];
    }
}

static void clamped_swiglu(const float *gate, const float *up, float alpha, float limit, uint32_t n,
                           float *out)
{
    for (uint32_t i = 0; i < n; i++) {
        float g = limit < gate[i] ? limit : gate[i], u = -limit > up[i] ? -limit : up[i];
        if (limit < u) u = limit;
        out[i] = g / (1.0F + exp_e(-(alpha * g))) * (u + 1.0F);
    }
}

/* 1 - 2 / (1 + e^2x) */
float choir_reference_tanh(float x)
{
    return 1.0F - 2.0F / (1.0F + exp_e(2.0F * x));
}

static void softcap(float *x, float cap, uint32_t n)
{
    float inverse = 1.0F / cap;
    for (uint32_t i = 0; i < n; i++) x[i] = cap * choir_reference_tanh(x[i] * inverse);
}

static void add(float *x, const float *y, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) x[i] += y[i];
}

static void add_scaled(float *x, const float *y, float scale, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) x[i] = fmaf(scale, y[i], x[i]);
}

static void f32_to_f16_row(const float *x, uint32_t n, uint16_t *out)
{
    for (uint32_t i = 0; i < n; i++) out[i] = f32_to_f16(x[i]);
}

static void f16_to_f32_row(const void *x, uint32_t n, float *out)
{
    const uint8_t *from = x;
    for (uint32_t i = 0; i < n; i++) out[i] = f16_to_f32(load_u16(from + (size_t)i * 2));
}

static float max_of_row(const float *x, uint32_t n)
{
    float max = -INFINITY;
    for (uint32_t i = 0; i < n; i++)
        if (x[i] > max) max = x[i];
    return max;
}

static double sum_exp(const float *x, float max, uint32_t n)
{
    double sum[LANES] = {0};
    for (uint32_t i = 0; i < n; i++) sum[i % LANES] += (double)exp_e(x[i] - max);
    for (int k = LANES / 2; k > 0; k /= 2)
        for (int i = 0; i < k; i++) sum[i] += sum[i + k];
    return sum[0];
}

const choir_kernels choir_kernels_reference = {
    .level = CHOIR_CPU_REFERENCE,
    .name = "reference",
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
    .attention = choir_reference_attention,
    .max = max_of_row,
    .sum_exp = sum_exp,
};
