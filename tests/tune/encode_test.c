/* What is written equals what gguf-py and PyTorch's rounding write, bit for bit
 * (tests/oracle/make_quantised.py made the fixture). */
#include "tune/encode.h"

#include "base/base.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { BLOCK = 32 };

static void rows_as_the_reference_has_them(void **state)
{
    (void)state;
    static const choir_dtype types[] = {CHOIR_F16, CHOIR_BF16, CHOIR_Q8_0, CHOIR_Q4_1};
    char *file;
    size_t bytes, at = 4;
    uint32_t n;
    assert_int_equal(choir_file_read("tests/fixtures/tune/quantised.bin", 1 << 20, &file, &bytes),
                     CHOIR_OK);
    memcpy(&n, file, sizeof n);
    float *x = malloc(n * sizeof *x);
    memcpy(x, file + at, n * sizeof *x);
    at += n * sizeof *x;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        size_t block = choir_dtype_row_bytes(types[t], BLOCK);
        uint8_t *out = malloc(n / BLOCK * block);
        assert_true(choir_tune_encode(types[t], x, n, out));
        for (uint32_t b = 0; b < n / BLOCK; b++)
            if (memcmp(out + b * block, file + at + b * block, block) != 0)
                fail_msg("%s, block %u", choir_dtype_text(types[t]), b);
        at += n / BLOCK * block;
        free(out);
    }
    assert_int_equal(at, bytes);
    free(x);
    choir_free(file);
}

static void what_a_type_cannot_hold_is_refused(void **state)
{
    (void)state;
    static const float bad[] = {NAN, INFINITY, -INFINITY, 3.4e38F};
    float x[BLOCK] = {0};
    uint8_t out[BLOCK * sizeof(float)];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        x[31] = bad[i];
        for (choir_dtype t = 0; t < CHOIR_N_DTYPES; t++)
            if (choir_tune_can_encode(t))
                assert_int_equal(choir_tune_encode(t, x, BLOCK, out),
                                 isfinite(bad[i]) && t == CHOIR_F32);
    }
}

/* Where gguf-py divides by zero: scales and codes of 0. */
static void rows_of_denormals_are_zeros(void **state)
{
    (void)state;
    float x[BLOCK];
    uint8_t out[34], zeros[34] = {0};
    for (int i = 0; i < BLOCK; i++) x[i] = (float)i * 1e-40F;
    assert_true(choir_tune_encode(CHOIR_Q8_0, x, BLOCK, out));
    assert_memory_equal(out, zeros, 34);
    assert_true(choir_tune_encode(CHOIR_Q4_1, x, BLOCK, out));
    assert_memory_equal(out, zeros, 20);
}

/* As in llama.cpp; gguf-py's answer depends on NumPy's vector width. */
static void of_two_zeros_the_first_is_the_minimum(void **state)
{
    (void)state;
    static const float zeros[] = {0.0F, -0.0F};
    for (int first = 0; first < 2; first++) {
        float x[BLOCK];
        uint8_t out[20];
        for (int i = 0; i < BLOCK; i++) x[i] = zeros[(i + first) % 2];
        for (int largest = 0; largest < 2; largest++) {
            x[31] = largest ? 15 : x[31];
            assert_true(choir_tune_encode(CHOIR_Q4_1, x, BLOCK, out));
            assert_int_equal(out[1], largest ? 0x3C : 0); /* 1.0 or 0.0 */
            assert_int_equal(out[3], first ? 0x80 : 0);   /* the sign */
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_as_the_reference_has_them),
        cmocka_unit_test(rows_of_denormals_are_zeros),
        cmocka_unit_test(of_two_zeros_the_first_is_the_minimum),
        cmocka_unit_test(what_a_type_cannot_hold_is_refused),
    };
    return cmocka_run_group_tests_name("encode", tests, NULL, NULL);
}
