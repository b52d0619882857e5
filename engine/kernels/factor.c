/* Low-rank factors into the kernels' layout: rows of equal length that end in zeros. */
#include "engine/kernels/layout.h"

#include <math.h>
#include <string.h>

size_t choir_factor_element_bytes(choir_factor_type type)
{
    static const size_t bytes[] = {[CHOIR_FACTOR_F32] = 4,
                                   [CHOIR_FACTOR_F16] = 2,
                                   [CHOIR_FACTOR_BF16] = 2,
                                   [CHOIR_FACTOR_INT8] = 1};
    return bytes[type];
}

static bool has_scales(choir_factor_type type)
{
    return type == CHOIR_FACTOR_F16 || type == CHOIR_FACTOR_INT8;
}

static size_t data_bytes(choir_factor_type type, uint32_t rank, uint32_t length)
{
    return (size_t)rank * choir_factor_stride(length) * choir_factor_element_bytes(type);
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

/* Of the absolute values; they are ordered as their bits are, and integers may be compared many at
 * once. */
static float largest(const float *x, uint32_t n)
{
    int32_t max = 0;
    for (uint32_t i = 0; i < n; i++) {
        int32_t bits = (int32_t)(f32_to_bits(x[i]) & 0x7fffffff);
        max = bits > max ? bits : max;
    }
    return bits_to_f32((uint32_t)max);
}

/* Halves of one row, which is spent, the largest in [0.5, 1]; returns their scale. */
static float pack_halves(float *row, uint32_t n, uint16_t *out)
{
    int exponent;
    frexpf(largest(row, n), &exponent);
    if (exponent < -100) exponent = -100; /* 2^-exponent stays finite */
    float inverse = ldexpf(1, -exponent);
    for (uint32_t i = 0; i < n; i++) row[i] *= inverse;
    choir_kernels_at(choir_cpu_best_level())
        ->f32_to_f16(row, n, out); /* every level's bits are the same */
    return ldexpf(1, exponent);
}

/* Codes in [-127, 127] of one row; returns its scale. */
static float pack_codes(const float *row, uint32_t n, int8_t *out)
{
    float max = largest(row, n), inverse = max > 0 ? 127.0F / max : 0;
    if (!isfinite(inverse)) inverse = 0; /* too small to count */
    for (uint32_t i = 0; i < n; i++) out[i] = (int8_t)lrintf(row[i] * inverse);
    return max / 127.0F;
}

/* One row, which is spent. */
static void pack_row(choir_factor *f, uint32_t r, float *row)
{
    size_t bytes = choir_factor_element_bytes(f->type);
    uint8_t *to = (uint8_t *)f->data + (size_t)r * f->stride * bytes;
    memset(to + f->length * bytes, 0, (f->stride - f->length) * bytes);
    float *scales = (float *)f->scales;
    switch (f->type) {
    case CHOIR_FACTOR_F32:
        memcpy(to, row, f->length * sizeof *row);
        break;
    case CHOIR_FACTOR_F16:
        scales[r] = pack_halves(row, f->length, (uint16_t *)to);
        break;
    case CHOIR_FACTOR_BF16:
        for (uint32_t i = 0; i < f->length; i++) ((uint16_t *)to)[i] = choir_f32_to_bf16(row[i]);
        break;
    default:
        scales[r] = pack_codes(row, f->length, (int8_t *)to);
    }
}

static void take_row(const choir_factor_source *from, uint32_t r, float *restrict out)
{
    const float *restrict row = from->data + r * from->row_stride, *scales = from->scales;
    const size_t n = from->length, stride = from->stride;
    const float scale = from->scale;
    if (stride == 1)
        for (size_t i = 0; i < n; i++) out[i] = row[i] * scale;
    else
        for (size_t i = 0; i < n; i++) out[i] = row[i * stride] * scale;
    for (size_t i = 0; scales != NULL && i < n; i++) out[i] *= scales[i];
}

choir_factor choir_factor_pack(choir_factor_type type, const choir_factor_source *from,
                               float *scratch, void *data)
{
    uint32_t rank = from->rank, n = from->length;
    choir_factor f = {type, rank, n, choir_factor_stride(n), data, NULL};
    if (has_scales(type)) f.scales = (float *)((uint8_t *)data + data_bytes(type, rank, n));
    for (uint32_t r = 0; r < rank; r++) {
        take_row(from, r, scratch);
        pack_row(&f, r, scratch);
    }
    return f;
}
