/* Packing: refused plans, disjoint parts, and products against the formula in double. */
#include "tests/kernels/check.h"

#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void expect_refused(choir_tensor t, const char *part)
{
    choir_matrix m;
    assert_int_equal(choir_matrix_plan(&t, &m), CHOIR_E_INVALID);
    if (strstr(choir_error_message(), part) == NULL)
        fail_msg("\"%s\" lacks \"%s\"", choir_error_message(), part);
}

static void test_bad_plans(void **state)
{
    (void)state;
    static const uint8_t data[64];
    expect_refused((choir_tensor){CHOIR_Q4_0, 1, 33, data, 64}, "multiple of 32");
    expect_refused((choir_tensor){CHOIR_Q4_K, 1, 32, data, 64}, "multiple of 256");
    expect_refused((choir_tensor){CHOIR_Q4_0, 0, 32, data, 64}, "0 rows");
    expect_refused((choir_tensor){CHOIR_F32, 4, 0, data, 64}, "0 columns");
    expect_refused((choir_tensor){CHOIR_F32, 4, 5, data, 64}, "64 bytes");
    expect_refused((choir_tensor){CHOIR_F32, 4, 4, NULL, 64}, "64 bytes");
    expect_refused((choir_tensor){CHOIR_F32, UINT32_MAX, UINT32_MAX, data, 64}, "64 bytes");
    expect_refused((choir_tensor){(choir_dtype)99, 1, 32, data, 64}, "type 99");
}

/* Two workers pack what one packs. */
static void test_parts(void **state)
{
    (void)state;
    for (uint32_t d = 0; d < CHOIR_N_DTYPES; d++) {
        choir_tensor t = check_tensor((choir_dtype)d, 37, 512);
        choir_matrix whole = check_packed(&t);
        assert_int_equal((uintptr_t)whole.data % 64, 0);
        void *parts = aligned_alloc(64, (whole.bytes + 63) & ~(size_t)63);
        choir_matrix_pack(&whole, &t, parts, 16, 37);
        choir_matrix_pack(&whole, &t, parts, 0, 16);
        assert_memory_equal(parts, whole.data, whole.bytes);
        free(parts);
        free((void *)whole.data);
        free((void *)t.data);
    }
}

/* The largest error over the largest product of a few rows. */
static double error_of(const choir_matrix *w, const choir_tensor *t, const float *x, const void *q8)
{
    const choir_kernels *k = choir_kernels_at(choir_cpu_best_level());
    float y[40], row[512];
    const choir_acts acts = {x, q8, 1, t->cols};
    k->matmul(w, &acts, y, t->rows, 0, t->rows);
    double error = 0, largest = 0;
    for (uint32_t r = 0; r < t->rows; r++) {
        double sum = 0, size = 0;
        choir_tensor_row(t, r, row);
        for (uint32_t i = 0; i < t->cols; i++) {
            sum += (double)row[i] * (double)x[i];
            size += fabs((double)row[i] * (double)x[i]);
        }
        error = fmax(error, fabs(sum - (double)y[r]));
        largest = fmax(largest, size);
    }
    return error / largest;
}

/* f32 activations: rounding only. Codes: half a step an element, most of which cancels. */
static void test_products(void **state)
{
    (void)state;
    float x[512];
    for (uint32_t d = 0; d < CHOIR_N_DTYPES; d++) {
        choir_tensor t = check_tensor((choir_dtype)d, 37, 512);
        choir_matrix packed = check_packed(&t), exact = choir_matrix_exact(&t);
        for (int i = 0; i < 512; i++) x[i] = (float)check_below(2001) * 1e-3F - 1;
        void *q8 = aligned_alloc(64, choir_acts_q8_bytes(1, 512));
        choir_kernels_at(CHOIR_CPU_REFERENCE)->quantize(x, 512, q8, 0, 1);
        bool quantised = choir_layout_has_codes(packed.layout);
        assert_true(error_of(&exact, &t, x, NULL) < 2e-7);
        assert_true(error_of(&packed, &t, x, q8) < (quantised ? 4e-6 : 2e-7));
        free(q8);
        free((void *)packed.data);
        free((void *)t.data);
    }
}

static void test_levels(void **state)
{
    (void)state;
    choir_cpu_level level;
    assert_true(choir_cpu_level_parse("reference", &level) && level == CHOIR_CPU_REFERENCE);
    assert_true(choir_cpu_level_parse("avx512vnni", &level) && level == CHOIR_CPU_AVX512VNNI);
    assert_false(choir_cpu_level_parse("sse9", &level));
    assert_null(choir_kernels_at((choir_cpu_level)7));
    for (uint32_t i = 0; i < CHOIR_CPU_N_LEVELS; i++) {
        const choir_kernels *k = choir_kernels_at((choir_cpu_level)i);
        assert_true(i > 0 || k != NULL);
        if (k == NULL) continue;
        assert_int_equal(k->level, i);
        assert_true(choir_cpu_level_parse(k->name, &level) && level == (choir_cpu_level)i);
    }
    assert_non_null(choir_kernels_at(choir_cpu_best_level()));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_plans),
        cmocka_unit_test(test_parts),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_levels),
    };
    check_seed(5);
    return cmocka_run_group_tests_name("kernels/pack", tests, NULL, NULL);
}
