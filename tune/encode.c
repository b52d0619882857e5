#include "tune/encode.h"

#include <math.h>
#include <string.h>

#define F16_MAX 65504.0F
enum { BLOCK = 32 };

bool choir_tune_can_encode(choir_dtype dtype)
{
    return dtype == CHOIR_F32 || dtype == CHOIR_F16 || dtype == CHOIR_BF16 || dtype == CHOIR_Q8_0 ||
           dtype == CHOIR_Q4_1 || dtype == CHOIR_Q4_0;
}

static void put_f16(float x, uint8_t *out)
{
    uint16_t half;
    choir_kernels_at(CHOIR_CPU_REFERENCE)->f32_to_f16(&x, 1, &half);
    memcpy(out, &half, sizeof half);
}

/* Round to nearest, ties to even. */
static bool encode_bf16(const float *x, uint32_t n, uint8_t *out)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
        if ((rounded & 0x7F800000) == 0x7F800000) return false;
        uint16_t half = (uint16_t)(rounded >> 16);
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
    default:
        CHOIR_ASSERT(!"a type that cannot be written");
        return false;
    }
}
