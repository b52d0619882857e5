#include "tune/quantize.h"

#include <math.h>
#include <string.h>

enum { BLOCK = 32 };

bool can_quantize(choir_dtype dtype)
{
    return dtype == CHOIR_Q8_0 || dtype == CHOIR_Q4_1 || dtype == CHOIR_F16 || dtype == CHOIR_BF16 ||
           dtype == CHOIR_F32;
}

static void put_f16(float value, uint8_t *out)
{
    _Float16 half = (_Float16)value; /* rounds to nearest even */
    memcpy(out, &half, 2);
}

static void put_bf16(float value, uint8_t *out)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t top = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    memcpy(out, &top, 2);
}

static void quantize_q8_0(const float *x, uint8_t *out)
{
    float max = 0;
    for (int i = 0; i < BLOCK; i++) max = fmaxf(max, fabsf(x[i]));
    float d = max / 127.0F, inverse = d == 0 ? 0 : 1.0F / d;
    put_f16(d, out);
    for (int i = 0; i < BLOCK; i++) out[2 + i] = (uint8_t)(int8_t)roundf(x[i] * inverse);
}

static uint8_t code_4(float x)
{
    int q = (int)(x + 0.5F);
    return (uint8_t)(q < 0 ? 0 : q > 15 ? 15 : q);
}

static void quantize_q4_1(const float *x, uint8_t *out)
{
    float min = x[0], max = x[0];
    for (int i = 1; i < BLOCK; i++) {
        min = fminf(min, x[i]);
        max = fmaxf(max, x[i]);
    }
    float d = (max - min) / 15.0F, inverse = d == 0 ? 0 : 1.0F / d;
    put_f16(d, out);
    put_f16(min, out + 2);
    for (int i = 0; i < BLOCK / 2; i++)
        out[4 + i] = (uint8_t)(code_4((x[i] - min) * inverse) |
                               code_4((x[i + BLOCK / 2] - min) * inverse) << 4);
}

void quantize_row(choir_dtype dtype, const float *x, uint32_t n, uint8_t *out)
{
    uint32_t block = choir_dtype_block_elements(dtype), bytes = choir_dtype_block_bytes(dtype);
    for (uint32_t i = 0; i < n; i += block, out += bytes) {
        if (dtype == CHOIR_Q8_0)
            quantize_q8_0(x + i, out);
        else if (dtype == CHOIR_Q4_1)
            quantize_q4_1(x + i, out);
        else if (dtype == CHOIR_F16)
            put_f16(x[i], out);
        else if (dtype == CHOIR_BF16)
            put_bf16(x[i], out);
        else
            memcpy(out, x + i, sizeof *x);
    }
}
