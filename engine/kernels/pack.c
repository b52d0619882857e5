/* Weights into the kernels' layout, and rows of it back (layout.h draws it). */
#include "engine/kernels/layout.h"

/* Which layout a source type takes, and its flags. Scales that are products of two stored numbers
 * need f32 to stay exact; the others keep their f16. */
static const struct {
    choir_layout layout;
    uint32_t flags;
} plans[CHOIR_N_DTYPES] = {
    [CHOIR_F32] = {CHOIR_LAYOUT_F32, 0},
    [CHOIR_F16] = {CHOIR_LAYOUT_F16, 0},
    [CHOIR_BF16] = {CHOIR_LAYOUT_BF16, 0},
    [CHOIR_Q8_0] = {CHOIR_LAYOUT_W8, 7 << ZERO_SHIFT},
    [CHOIR_Q4_0] = {CHOIR_LAYOUT_W4, 3 << ZERO_SHIFT},
    [CHOIR_Q4_1] = {CHOIR_LAYOUT_W4, FLAG_MIN},
    [CHOIR_Q5_0] = {CHOIR_LAYOUT_W8, 4 << ZERO_SHIFT},
    [CHOIR_Q5_1] = {CHOIR_LAYOUT_W8, FLAG_MIN},
    [CHOIR_Q4_K] = {CHOIR_LAYOUT_W4, FLAG_MIN | FLAG_F32},
    [CHOIR_Q5_K] = {CHOIR_LAYOUT_W8, FLAG_MIN | FLAG_F32},
    [CHOIR_Q6_K] = {CHOIR_LAYOUT_W8, FLAG_F32 | FLAG_HALVES | 5 << ZERO_SHIFT},
    [CHOIR_Q2_K] = {CHOIR_LAYOUT_W4, FLAG_MIN | FLAG_F32 | FLAG_HALVES | TABLE_SAME << TABLE_SHIFT},
    [CHOIR_Q3_K] = {CHOIR_LAYOUT_W4,
                    FLAG_F32 | FLAG_HALVES | 2 << ZERO_SHIFT | TABLE_SAME << TABLE_SHIFT},
    [CHOIR_IQ4_NL] = {CHOIR_LAYOUT_W4, 7 << ZERO_SHIFT | TABLE_IQ4 << TABLE_SHIFT},
    [CHOIR_IQ4_XS] = {CHOIR_LAYOUT_W4, FLAG_F32 | 7 << ZERO_SHIFT | TABLE_IQ4 << TABLE_SHIFT},
    [CHOIR_MXFP4] = {CHOIR_LAYOUT_W4, FLAG_F32 | 7 << ZERO_SHIFT | TABLE_FP4 << TABLE_SHIFT},
    [CHOIR_Q2] = {CHOIR_LAYOUT_W2, FLAG_MIN},
    [CHOIR_Q3] = {CHOIR_LAYOUT_W3, 2 << ZERO_SHIFT},
};

static choir_status check_source(const choir_tensor *t)
{
    if ((uint32_t)t->dtype >= CHOIR_N_DTYPES)
        return choir_fail(CHOIR_E_INVALID, "tensor type %u of %u", (unsigned)t->dtype,
                          (unsigned)CHOIR_N_DTYPES);
    if (t->rows == 0 || t->cols == 0)
        return choir_fail(CHOIR_E_INVALID, "a weight of %u rows and %u columns", t->rows, t->cols);
    uint32_t elements = choir_dtype_block_elements(t->dtype);
    if (t->cols % elements != 0)
        return choir_fail(CHOIR_E_INVALID, "%u columns of %s, not a multiple of %u", t->cols,
                          choir_dtype_text(t->dtype), elements);
    size_t need;
    if (__builtin_mul_overflow(choir_dtype_row_bytes(t->dtype, t->cols), t->rows, &need) ||
        t->data == NULL || t->bytes < need)
        return choir_fail(CHOIR_E_INVALID, "%u x %u of %s in %zu bytes", t->rows, t->cols,
                          choir_dtype_text(t->dtype), t->bytes);
    return CHOIR_OK;
}

static size_t strip_bytes(const choir_matrix *m)
{
    return choir_layout_has_codes(m->layout) ? choir_quant_layout(m).strip_bytes
                                             : choir_float_strip_bytes(m);
}

choir_status choir_matrix_plan(const choir_tensor *source, choir_matrix *out)
{
    CHOIR_TRY(check_source(source));
    *out = (choir_matrix){.layout = plans[source->dtype].layout,
                          .dtype = source->dtype,
                          .rows = source->rows,
                          .cols = source->cols,
                          .flags = plans[source->dtype].flags};
    size_t strips = ((size_t)source->rows + STRIP - 1) / STRIP;
    if (__builtin_mul_overflow(strips, strip_bytes(out), &out->bytes))
        return choir_fail(CHOIR_E_INVALID, "a weight of %u x %u is too large", source->rows,
                          source->cols);
    return CHOIR_OK;
}

/* Scales are copied as they were stored: the f16 that a decoded f32 came from. */
static void put_scale(const quant_layout *l, uint8_t *block, uint32_t i, float value)
{
    if (l->f32) {
        memcpy(block + i * 4, &value, 4);
    } else {
        uint16_t half = f32_to_f16(value);
        memcpy(block + i * 2, &half, 2);
    }
}

static float get_scale(const quant_layout *l, const uint8_t *block, uint32_t i)
{
    float value;
    if (!l->f32) return f16_to_f32(load_u16(block + i * 2));
    memcpy(&value, block + i * 4, 4);
    return value;
}

static void put_codes(choir_layout layout, uint8_t *block, uint32_t r, const uint8_t *code)
{
    for (uint32_t k = 0; k < BLOCK; k++) {
        uint32_t group = k / 4, at = r * 4 + k % 4;
        if (layout == CHOIR_LAYOUT_W8)
            block[group * 64 + at] = code[k];
        else if (layout == CHOIR_LAYOUT_W4)
            block[group / 2 * 64 + at] |= (uint8_t)(code[k] << (group % 2 * 4));
        else
            block[group / 4 * 64 + at] |= (uint8_t)((code[k] & 3) << (group % 4 * 2));
        if (layout == CHOIR_LAYOUT_W3) block[128 + at] |= (uint8_t)(code[k] >> 2 << group);
    }
}

static void pack_quantised_row(const choir_matrix *m, const quant_layout *l, const uint8_t *row,
                               uint8_t *strip, uint32_t r)
{
    block_codes codes;
    for (uint32_t b = 0; b < l->n_blocks; b++) {
        choir_decode_block(m->dtype, row, b, &codes);
        uint8_t *scales = strip + (size_t)b * l->scale_bytes;
        for (uint32_t g = 0; g < l->n_groups; g++) put_scale(l, scales, g * STRIP + r, codes.d[g]);
        for (uint32_t g = 0; l->min && g < l->n_groups; g++)
            put_scale(l, scales, (l->n_groups + g) * STRIP + r, codes.m[g]);
        put_codes(m->layout, strip + l->codes_at + (size_t)b * l->code_bytes, r, codes.code);
    }
}

static void pack_float_row(const choir_matrix *m, const uint8_t *row, uint8_t *strip, uint32_t r)
{
    size_t size = m->layout == CHOIR_LAYOUT_F32 ? 4 : 2;
    for (size_t k = 0; k < m->cols; k++)
        memcpy(strip + (k * STRIP + r) * size, row + k * size, size);
}

void choir_matrix_pack(const choir_matrix *matrix, const choir_tensor *source, void *data,
                       uint32_t begin, uint32_t end)
{
    CHOIR_ASSERT(matrix->layout != CHOIR_LAYOUT_EXACT && begin % STRIP == 0);
    CHOIR_ASSERT(end <= matrix->rows && (end % STRIP == 0 || end == matrix->rows));
    quant_layout l = choir_quant_layout(matrix);
    size_t bytes = strip_bytes(matrix),
           row_bytes = choir_dtype_row_bytes(source->dtype, source->cols);
    for (uint32_t r = begin; r < end; r++) {
        const uint8_t *row = (const uint8_t *)source->data + r * row_bytes;
        uint8_t *strip = (uint8_t *)data + r / STRIP * bytes;
        if (r % STRIP == 0) memset(strip, 0, bytes);
        if (choir_layout_has_codes(matrix->layout))
            pack_quantised_row(matrix, &l, row, strip, r % STRIP);
        else
            pack_float_row(matrix, row, strip, r % STRIP);
    }
}

choir_matrix choir_matrix_exact(const choir_tensor *source)
{
    return (choir_matrix){.layout = CHOIR_LAYOUT_EXACT,
                          .dtype = source->dtype,
                          .rows = source->rows,
                          .cols = source->cols,
                          .data = source->data,
                          .bytes = source->bytes};
}

static void quantised_row(const choir_matrix *m, const uint8_t *strip, uint32_t r, float *out)
{
    quant_layout l = choir_quant_layout(m);
    int zero = l.min ? 0 : 1 << l.zero_log2;
    for (uint32_t b = 0; b < l.n_blocks; b++) {
        const uint8_t *scales = strip + (size_t)b * l.scale_bytes;
        const uint8_t *codes = strip + l.codes_at + (size_t)b * l.code_bytes;
        for (uint32_t k = 0; k < BLOCK; k++, out++) {
            uint32_t g = l.n_groups == 2 ? k / 16 : 0;
            float d = get_scale(&l, scales, g * STRIP + r);
            uint32_t code = choir_code_at(m->layout, codes, r, k);
            if (l.table != TABLE_NONE) code = choir_code_tables[l.table][code];
            *out = d * (float)((int)code - zero);
            if (l.min) *out += get_scale(&l, scales, (l.n_groups + g) * STRIP + r);
        }
    }
}

void choir_matrix_row(const choir_matrix *matrix, uint32_t row, float *out)
{
    if (matrix->layout == CHOIR_LAYOUT_EXACT) {
        size_t row_bytes = choir_dtype_row_bytes(matrix->dtype, matrix->cols);
        choir_dequantize(matrix->dtype, (const uint8_t *)matrix->data + row * row_bytes, 0,
                         matrix->cols, out);
        return;
    }
    const uint8_t *strip = (const uint8_t *)matrix->data + row / STRIP * strip_bytes(matrix);
    uint32_t r = row % STRIP;
    if (choir_layout_has_codes(matrix->layout)) {
        quantised_row(matrix, strip, r, out);
        return;
    }
    size_t size = matrix->layout == CHOIR_LAYOUT_F32 ? 4 : 2;
    for (size_t k = 0; k < matrix->cols; k++)
        choir_dequantize(matrix->dtype, strip + (k * STRIP + r) * size, 0, 1, out + k);
}

size_t choir_acts_q8_bytes(uint32_t n_rows, uint32_t cols)
{
    return n_rows * choir_acts_layout(cols).row_bytes;
}
