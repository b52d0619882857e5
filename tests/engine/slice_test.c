/* Parts of tensors as tensors of their own: every other row, a transpose, a head of quantised keys,
 * MXFP4 in two tensors; each against the element that it must be. */
#include "engine/model_file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { ROWS = 6, COLS = 5 };

static float source[ROWS][COLS];

static void fill(void)
{
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) source[r][c] = (float)(100 * r + c);
}

static void test_whole(void **state)
{
    (void)state;
    fill();
    choir_slice s = {.dtype = CHOIR_F32,
                     .rows = ROWS,
                     .cols = COLS,
                     .data = (const uint8_t *)source,
                     .row_stride = sizeof source[0],
                     .source = CHOIR_F32};
    choir_tensor t;
    assert_true(choir_slice_is_tensor(&s, &t));
    assert_ptr_equal(t.data, source);
    assert_int_equal(choir_slice_bytes(&s), sizeof source);
}

static void test_every_other_row(void **state)
{
    (void)state;
    fill();
    choir_slice s = {.dtype = CHOIR_F32,
                     .rows = ROWS / 2,
                     .cols = COLS,
                     .data = (const uint8_t *)source[1],
                     .row_stride = 2 * sizeof source[0],
                     .source = CHOIR_F32};
    choir_tensor t;
    float out[ROWS / 2][COLS];
    assert_false(choir_slice_is_tensor(&s, &t));
    choir_slice_copy(&s, out);
    for (int r = 0; r < ROWS / 2; r++)
        assert_memory_equal(out[r], source[2 * r + 1], sizeof out[r]);
}

static void test_transpose(void **state)
{
    (void)state;
    fill();
    choir_slice s = {.dtype = CHOIR_F32,
                     .rows = COLS,
                     .cols = ROWS,
                     .data = (const uint8_t *)source,
                     .row_stride = sizeof(float),
                     .col_stride = sizeof source[0],
                     .source = CHOIR_F32};
    float out[COLS][ROWS];
    choir_slice_copy(&s, out);
    for (int r = 0; r < COLS; r++)
        for (int c = 0; c < ROWS; c++) assert_true(out[r][c] == source[c][r]);
}

/* Rows of 512 codes of Q8_0, read as columns: 512 rows of f32. */
static void test_quantised_transpose(void **state)
{
    (void)state;
    enum { N = 512, HEADS_KEYS = 3 };
    size_t row = choir_dtype_row_bytes(CHOIR_Q8_0, N);
    uint8_t *data = malloc(HEADS_KEYS * row);
    float *out = malloc(sizeof *out * N * HEADS_KEYS), values[N];
    assert_true(data != NULL && out != NULL);
    for (size_t i = 0; i < HEADS_KEYS * row; i++) data[i] = (uint8_t)(i * 37 + 11);
    for (size_t i = 0; i < HEADS_KEYS * row; i += 34) data[i + 1] = 0x2c; /* scales about 0.07 */
    choir_slice s = {.dtype = CHOIR_F32,
                     .rows = N,
                     .cols = HEADS_KEYS,
                     .data = data,
                     .col_stride = row,
                     .source = CHOIR_Q8_0};
    choir_tensor t;
    assert_false(choir_slice_is_tensor(&s, &t));
    assert_int_equal(choir_slice_bytes(&s), sizeof *out * N * HEADS_KEYS);
    choir_slice_copy(&s, out);
    for (uint32_t c = 0; c < HEADS_KEYS; c++) {
        const choir_tensor whole = {CHOIR_Q8_0, HEADS_KEYS, N, data, HEADS_KEYS * row};
        choir_tensor_row(&whole, c, values);
        for (uint32_t r = 0; r < N; r++) assert_true(out[(size_t)r * HEADS_KEYS + c] == values[r]);
    }
    free(data);
    free(out);
}

/* Codes in pairs of neighbours and exponents apart are the block with halves side by side. */
static void test_mxfp4(void **state)
{
    (void)state;
    static const float fp4[] = {0, 0.5F, 1, 1.5F, 2, 3, 4, 6};
    uint8_t pairs[2][16], exponents[2] = {127, 130}, block[2][17];
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < 16; i++)
            pairs[r][i] = (uint8_t)((2 * i + r) % 16 | (2 * i + 1 + r) % 16 << 4);
    choir_slice s = {.dtype = CHOIR_MXFP4,
                     .rows = 2,
                     .cols = 32,
                     .data = pairs[0],
                     .row_stride = 16,
                     .scales = exponents,
                     .scales_stride = 1,
                     .source = CHOIR_MXFP4};
    choir_slice_copy(&s, block);
    for (uint32_t r = 0; r < 2; r++) {
        const choir_tensor t = {CHOIR_MXFP4, 2, 32, block, sizeof block};
        float values[32];
        choir_tensor_row(&t, r, values);
        for (uint32_t i = 0; i < 32; i++) {
            uint32_t code = (i + r) % 16;
            float expected = fp4[code % 8] * (code < 8 ? 1 : -1) * (r == 0 ? 1 : 8);
            assert_true(values[i] == expected);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole),     cmocka_unit_test(test_every_other_row),
        cmocka_unit_test(test_transpose), cmocka_unit_test(test_quantised_transpose),
        cmocka_unit_test(test_mxfp4),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
