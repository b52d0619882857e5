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

/* Blocks that the small types can hold come back as they were, and lie as docs/formats.md says. */
static void small_types_hold_what_they_can(void **state)
{
    (void)state;
    float x[BLOCK], back[BLOCK];
    uint8_t out[14];
    for (int i = 0; i < BLOCK; i++) x[i] = 0.25F * (float)((i * 7 + i / 8) % 4) - 1.5F;
    assert_true(choir_tune_encode(CHOIR_Q2, x, BLOCK, out));
    choir_tensor_row(&(choir_tensor){CHOIR_Q2, 1, BLOCK, out, 12}, 0, back);
    assert_memory_equal(back, x, sizeof x);
    static const uint8_t head[] = {0x00, 0x34, 0x00, 0xBE}; /* 0.25 and -1.5 */
    assert_memory_equal(out, head, sizeof head);
    for (int i = 0; i < BLOCK; i++)
        assert_int_equal(out[4 + i % 8] >> (i / 8 * 2) & 3, (i * 7 + i / 8) % 4);

    for (int i = 0; i < BLOCK; i++) x[i] = 0.5F * (float)((i * 5 + i / 8) % 8 - 4);
    assert_true(choir_tune_encode(CHOIR_Q3, x, BLOCK, out));
    choir_tensor_row(&(choir_tensor){CHOIR_Q3, 1, BLOCK, out, 14}, 0, back);
    assert_memory_equal(back, x, sizeof x);
    uint32_t third;
    memcpy(&third, out + 10, sizeof third);
    assert_int_equal(out[0] | out[1] << 8, 0x3800); /* 0.5 */
    for (int i = 0; i < BLOCK; i++) {
        assert_int_equal(out[2 + i % 8] >> (i / 8 * 2) & 3, (i * 5 + i / 8) % 8 % 4);
        assert_int_equal(third >> i & 1, (i * 5 + i / 8) % 8 / 4);
    }
}

static double squared_error(choir_dtype dtype, const float *x)
{
    uint8_t out[14];
    float back[BLOCK];
    double error = 0;
    assert_true(choir_tune_encode(dtype, x, BLOCK, out));
    choir_tensor_row(&(choir_tensor){dtype, 1, BLOCK, out, sizeof out}, 0, back);
    for (int i = 0; i < BLOCK; i++) error += pow((double)x[i] - (double)back[i], 2);
    return error;
}

/* Codes at the nearest of d * code + m, the ends of the range being codes: no search. */
static double rounded_error(const float *x, int top)
{
    double min = INFINITY, max = -INFINITY, largest = 0, error = 0;
    for (int i = 0; i < BLOCK; i++) {
        double v = (double)x[i];
        min = fmin(min, v);
        max = fmax(max, v);
        if (fabs(v) > fabs(largest)) largest = v;
    }
    double d = top == 3 ? (max - min) / 3 : largest / -4, m = top == 3 ? min : -4 * d;
    for (int i = 0; i < BLOCK; i++) {
        double code = fmin(fmax(round(((double)x[i] - m) / d), 0), top);
        error += pow((double)x[i] - (d * code + m), 2);
    }
    return error;
}

/* Over blocks of normal numbers, some with outliers, as weights have them. */
static void small_types_beat_rounding(void **state)
{
    (void)state;
    static const choir_dtype types[] = {CHOIR_Q2, CHOIR_Q3};
    uint64_t seed = 1;
    double searched[2] = {0}, rounded[2] = {0};
    for (int b = 0; b < 2000; b++) {
        float x[BLOCK];
        for (int i = 0; i < BLOCK; i++) {
            double sum = 0;
            for (int k = 0; k < 12; k++) {
                seed = seed * 6364136223846793005U + 1442695040888963407U;
                sum += (double)(seed >> 40) / (1 << 24);
            }
            x[i] = (float)(sum - 6) * 0.02F * (b % 4 == 0 && i == 5 ? 4.0F : 1.0F);
        }
        for (int t = 0; t < 2; t++) {
            double s = squared_error(types[t], x), r = rounded_error(x, t == 0 ? 3 : 7);
            if (s > r * 1.02 + 1e-9) /* d and m are rounded to f16 in one of the two */
                fail_msg("%s, block %d: %g, rounding %g", choir_dtype_text(types[t]), b, s, r);
            searched[t] += s;
            rounded[t] += r;
        }
    }
    for (int t = 0; t < 2; t++)
        print_message("%s: %.3f of rounding's squared error\n", choir_dtype_text(types[t]),
                      searched[t] / rounded[t]);
    assert_true(searched[0] < 0.65 * rounded[0] && searched[1] < 0.9 * rounded[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_as_the_reference_has_them),
        cmocka_unit_test(rows_of_denormals_are_zeros),
        cmocka_unit_test(of_two_zeros_the_first_is_the_minimum),
        cmocka_unit_test(what_a_type_cannot_hold_is_refused),
        cmocka_unit_test(small_types_hold_what_they_can),
        cmocka_unit_test(small_types_beat_rounding),
    };
    return cmocka_run_group_tests_name("encode", tests, NULL, NULL);
}
