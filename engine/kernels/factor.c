/* Low-rank factors into the kernels' layout: rows of equal length that end in zeros. */
#include "engine/kernels/layout.h"

#include <math.h>
#include <string.h>

static const size_t element_bytes[] = {[CHOIR_FACTOR_F32] = 4,
                                       [CHOIR_FACTOR_F16] = 2,
                                       [CHOIR_FACTOR_BF16] = 2,
                                       [CHOIR_FACTOR_INT8] = 1};

static bool has_scales(choir_factor_type type)
{
    return type == CHOIR_FACTOR_F16 || type == CHOIR_FACTOR_INT8;
}

static size_t data_bytes(choir_factor_type type, uint32_t rank, uint32_t length)
{
    return (size_t)rank * choir_factor_stride(length) * element_bytes[type];
}

size_t choir_factor_bytes(choir_factor_type type, uint32_t rank, uint32_t length)
{
    size_t scales = has_scales(type) ? rank * sizeof(float) : 0;
    return (data_bytes(type, rank, length) + scales + 63) & ~(size_t)63;
}

uint16_t choir_f32_to_bf16(float x)
{
    uint32_t bits = f32_to_bits(x);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float largest(const float *row, size_t stride, uint32_t length)
{
    float max = 0;
    for (uint32_t i = 0; i < length; i++) max = fmaxf(max, fabsf(row[i * stride]));
    return max;
}

/* Halves of one row, the largest in [0.5, 1]; returns their scale. */
static float pack_halves(const float *row, size_t stride, uint32_t length, uint16_t *out)
{
    int exponent;
    frexpf(largest(row, stride, length), &exponent);
    if (exponent < -100) exponent = -100; /* ldexpf(1, -exponent) stays finite */
    for (uint32_t i = 0; i < length; i++) out[i] = f32_to_f16(ldexpf(row[i * stride], -exponent));
    return ldexpf(1, exponent);
}

/* Codes in [-127, 127] of one row; returns its scale. */
static float pack_codes(const float *row, size_t stride, uint32_t length, int8_t *out)
{
    float max = largest(row, stride, length);
    float inverse = max > 0 ? 127.0F / max : 0;
    if (!isfinite(inverse)) return 0; /* too small to count: the codes stay 0 */
    for (uint32_t i = 0; i < length; i++) out[i] = (int8_t)lrintf(row[i * stride] * inverse);
    return max / 127.0F;
}

choir_factor choir_factor_pack(choir_factor_type type, uint32_t rank, uint32_t length,
                               const float *from, size_t row_stride, size_t stride, void *data)
{
    choir_factor f = {type, rank, length, choir_factor_stride(length), data, NULL};
    float *scales = (float *)((uint8_t *)data + data_bytes(type, rank, length));
    memset(data, 0, choir_factor_bytes(type, rank, length));
    if (has_scales(type)) f.scales = scales;
    for (size_t r = 0; r < rank; r++) {
        const float *row = from + r * row_stride;
        size_t at = r * f.stride;
        switch (type) {
        case CHOIR_FACTOR_F32:
            for (uint32_t i = 0; i < length; i++) ((float *)data)[at + i] = row[i * stride];
            break;
        case CHOIR_FACTOR_BF16:
            for (uint32_t i = 0; i < length; i++)
                ((uint16_t *)data)[at + i] = choir_f32_to_bf16(row[i * stride]);
            break;
        case CHOIR_FACTOR_F16:
            scales[r] = pack_halves(row, stride, length, (uint16_t *)data + at);
            break;
        default:
            scales[r] = pack_codes(row, stride, length, (int8_t *)data + at);
            break;
        }
    }
    return f;
}
