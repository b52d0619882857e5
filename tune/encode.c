#include "tune/encode.h"

#include <math.h>
#include <string.h>

#define F16_MAX 65504.0F
enum { BLOCK = 32 };

bool choir_tune_can_encode(choir_dtype dtype)
{
    return dtype == CHOIR_F32 || dtype == CHOIR_F16 || dtype == CHOIR_BF16 || dtype == CHOIR_Q8_0 ||
           dtype == CHOIR_Q4_1 || dtype == CHOIR_Q4_0 || dtype == CHOIR_Q2 || dtype == CHOIR_Q3;
}

static void put_f16(float x, uint8_t *out)
{
    uint16_t half;
    choir_kernels_at(CHOIR_CPU_REFERENCE)->f32_to_f16(&x, 1, &half);
    memcpy(out, &half, sizeof half);
}

static bool encode_bf16(const float *x, uint32_t n, uint8_t *out)
{
    for (uint32_t i = 0; i < n; i++) {
        uint16_t half = choir_f32_to_bf16(x[i]);
        if ((half & 0x7F80) == 0x7F80) return false;
        memcpy(out + 2 * (size_t)i, &half, sizeof half);
    }
    return true;
}

/* 0 where the scale's inverse is no number: the scale itself is 0 then, in f16. */
static float inverse_of(float d)
{
    return d != 0 && isfinite(1 / d) ? 1 / d : 0;
}

/* d = max |x| / 127, q = x / d rounded with ties away from zero */
static bool encode_q8_0(const float *x, uint8_t *out)
{
    float max = 0;
    for (int i = 0; i < BLOCK; i++) max = fmaxf(max, fabsf(x[i]));
    float d = max / 127, inverse = inverse_of(d);
    if (d > F16_MAX) return false;
    put_f16(d, out);
    for (int i = 0; i < BLOCK; i++) out[2 + i] = (uint8_t)(int8_t)roundf(x[i] * inverse);
    return true;
}

/* d = (max - min) / 15, q = (x - min) / d rounded; elements i and i + 16 share a byte. Of 0 and -0
 * the first is the minimum, as in llama.cpp: fminf() and NumPy leave it open. */
static bool encode_q4_1(const float *x, uint8_t *out)
{
    float min = x[0], max = x[0];
    uint8_t q[BLOCK];
    for (int i = 1; i < BLOCK; i++) {
        if (x[i] < min) min = x[i];
        if (x[i] > max) max = x[i];
    }
    float d = (max - min) / 15, inverse = inverse_of(d);
    if (d > F16_MAX || fabsf(min) > F16_MAX) return false;
    put_f16(d, out);
    put_f16(min, out + 2);
    for (int i = 0; i < BLOCK; i++) {
        int v = (int)((x[i] - min) * inverse + 0.5F);
        q[i] = (uint8_t)(v > 15 ? 15 : v);
    }
    for (int i = 0; i < BLOCK / 2; i++) out[4 + i] = (uint8_t)(q[i] | q[i + BLOCK / 2] << 4);
    return true;
}

/* d = the value of largest |x|, sign and all, / -8; q = x / d + 8 rounded */
static bool encode_q4_0(const float *x, uint8_t *out)
{
    float max = 0, largest = 0;
    uint8_t q[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        if (fabsf(x[i]) > largest) {
            largest = fabsf(x[i]);
            max = x[i];
        }
    float d = max / -8, inverse = inverse_of(d);
    if (fabsf(d) > F16_MAX) return false;
    put_f16(d, out);
    for (int i = 0; i < BLOCK; i++) {
        int v = (int)(x[i] * inverse + 8.5F);
        q[i] = (uint8_t)(v > 15 ? 15 : v);
    }
    for (int i = 0; i < BLOCK / 2; i++) out[2 + i] = (uint8_t)(q[i] | q[i + BLOCK / 2] << 4);
    return true;
}

/* -- Q2 and Q3 --
 * With so few codes it matters where they lie: the ends of a block's range are seldom the best.
 * From several ranges codes are assigned and the line through them is fitted by least squares, in
 * turns; the error is that of the numbers as f16 holds them. The first range is that of plain
 * rounding, so no block comes out worse than that. */

enum { FITS = 3, LANES = 8 }; /* sums in LANES parts, which compilers make vectors of */

/* x = d * code + m, codes 0 … top; of Q3 m is -4 d. */
typedef struct line {
    float d, m, error;
    float code[BLOCK];
} line;

/* The nearest number that f16 has, as put_f16() writes it. */
static float as_f16(float x)
{
    float size = fabsf(x);
    if (size < 0x1p-14F) {
        size = (size + 0.5F) - 0.5F; /* multiples of 2^-24 */
    } else {
        uint32_t bits;
        memcpy(&bits, &size, sizeof bits);
        bits = (bits + 0xFFF + (bits >> 13 & 1)) & ~UINT32_C(0x1FFF);
        memcpy(&size, &bits, sizeof bits);
    }
    return copysignf(size > F16_MAX ? INFINITY : size, x);
}

static float total(const float *sum)
{
    float t = 0;
    for (int k = 0; k < LANES; k++) t += sum[k];
    return t;
}

static void assign_codes(const float *restrict x, float top, line *restrict l)
{
    const float inverse = inverse_of(l->d), d = l->d, m = l->m;
    float error[LANES] = {0};
    for (int i = 0; i < BLOCK; i += LANES)
        for (int k = 0; k < LANES; k++) {
            float v = (x[i + k] - m) * inverse;
            v = v > 0 ? v : 0; /* NaN is 0 */
            v = v < top ? v : top;
            float code = (float)(int)(v + 0.5F), e = x[i + k] - (d * code + m);
            l->code[i + k] = code;
            error[k] += e * e;
        }
    l->error = total(error);
}

/* Sums over a block, of codes less `zero`. */
typedef struct sums {
    float c, cc, x, cx;
} sums;

static sums sum_up(const float *restrict x, const line *restrict l, float zero)
{
    float c[LANES] = {0}, cc[LANES] = {0}, s[LANES] = {0}, cx[LANES] = {0};
    for (int i = 0; i < BLOCK; i += LANES)
        for (int k = 0; k < LANES; k++) {
            float code = l->code[i + k] - zero;
            c[k] += code;
            cc[k] += code * code;
            s[k] += x[i + k];
            cx[k] += code * x[i + k];
        }
    return (sums){total(c), total(cc), total(s), total(cx)};
}

static void fit_q2(const float *x, line *l)
{
    sums s = sum_up(x, l, 0);
    float det = BLOCK * s.cc - s.c * s.c; /* 0: all codes are the same */
    l->d = as_f16(det > 0 ? (BLOCK * s.cx - s.c * s.x) / det : 0);
    l->m = as_f16((s.x - l->d * s.c) / BLOCK);
}

static void fit_q3(const float *x, line *l)
{
    sums s = sum_up(x, l, 4);
    l->d = as_f16(s.cc > 0 ? s.cx / s.cc : 0);
    l->m = -4 * l->d;
}

/* Whatever is better than `best` on the way from a first guess. */
static void search(const float *x, float top, void (*fit)(const float *, line *), float d, float m,
                   line *best)
{
    line l = {.d = as_f16(d), .m = as_f16(m)};
    if (top == 7) l.m = -4 * l.d;
    for (int i = 0; i < FITS; i++) {
        assign_codes(x, top, &l);
        if (l.error < best->error) *best = l;
        fit(x, &l);
    }
}

/* The lower two bits of 32 codes: bits 2j of byte i are element 8j + i. */
static void put_pairs(const float *code, uint8_t *out)
{
    memset(out, 0, 8);
    for (int i = 0; i < BLOCK; i++) out[i % 8] |= (uint8_t)(((int)code[i] & 3) << (i / 8 * 2));
}

static bool encode_q2(const float *x, uint8_t *out)
{
    float min = x[0], max = x[0];
    for (int i = 1; i < BLOCK; i++) {
        min = fminf(min, x[i]);
        max = fmaxf(max, x[i]);
    }
    if (fabsf(min) > F16_MAX || fabsf(max) > F16_MAX) return false;
    line best = {.error = INFINITY};
    for (int cut = 0; cut < 8; cut++) { /* sixteenths of the range, from both ends */
        float off = (max - min) * (float)cut / 32;
        search(x, 3, fit_q2, (max - min - 2 * off) / 3, min + off, &best);
    }
    put_f16(best.d, out);
    put_f16(best.m, out + 2);
    put_pairs(best.code, out + 4);
    return true;
}

static bool encode_q3(const float *x, uint8_t *out)
{
    float largest = 0;
    for (int i = 0; i < BLOCK; i++)
        if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
    if (fabsf(largest) > F16_MAX) return false;
    line best = {.error = INFINITY};
    for (int i = 0; i < 6; i++) { /* the largest is 4 (as in Q4_0, 8), 4.4, … 6 steps from 0 */
        float d = largest / (4 + 0.4F * (float)i);
        search(x, 7, fit_q3, -d, 0, &best);
    }
    for (int i = 0; i < 6; i++) /* or 3, 3.4, … 5, on the other side */
        search(x, 7, fit_q3, largest / (3 + 0.4F * (float)i), 0, &best);
    uint32_t third = 0;
    for (int i = 0; i < BLOCK; i++) third |= (uint32_t)((int)best.code[i] >> 2) << i;
    put_f16(best.d, out);
    put_pairs(best.code, out + 2);
    memcpy(out + 10, &third, sizeof third);
    return true;
}

bool choir_tune_encode(choir_dtype dtype, const float *x, uint32_t n, void *out)
{
    uint8_t *to = out;
    float largest = 0;
    bool finite = true;
    for (uint32_t i = 0; i < n; i++) {
        finite = finite && isfinite(x[i]);
        largest = fmaxf(largest, fabsf(x[i]));
    }
    if (!finite) return false;
    bool good = true;
    switch (dtype) {
    case CHOIR_F32:
        memcpy(to, x, (size_t)n * sizeof *x);
        return true;
    case CHOIR_BF16:
        return encode_bf16(x, n, to);
    case CHOIR_F16:
        if (largest > F16_MAX) return false;
        choir_kernels_at(CHOIR_CPU_REFERENCE)->f32_to_f16(x, n, out);
        return true;
    case CHOIR_Q8_0:
        for (uint32_t i = 0; i < n && good; i += BLOCK, to += 34) good = encode_q8_0(x + i, to);
        return good;
    case CHOIR_Q4_1:
        for (uint32_t i = 0; i < n && good; i += BLOCK, to += 20) good = encode_q4_1(x + i, to);
        return good;
    case CHOIR_Q4_0:
        for (uint32_t i = 0; i < n && good; i += BLOCK, to += 18) good = encode_q4_0(x + i, to);
        return good;
    case CHOIR_Q2:
        for (uint32_t i = 0; i < n && good; i += BLOCK, to += 12) good = encode_q2(x + i, to);
        return good;
    case CHOIR_Q3:
        for (uint32_t i = 0; i < n && good; i += BLOCK, to += 14) good = encode_q3(x + i, to);
        return good;
    default:
        CHOIR_ASSERT(!"a type that cannot be written");
        return false;
    }
}
