/* Decompositions of matrices whose singular values and vectors are known: made of the orthonormal
 * vectors of the discrete cosine transform. */
#include "tune/svd.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Element i of the k-th of n orthonormal vectors of length n. */
static double wave(uint32_t n, uint32_t k, uint32_t i)
{
    double at = cos(3.14159265358979323846 * (i + 0.5) * k / n);
    return at * sqrt((k == 0 ? 1.0 : 2.0) / n);
}

typedef struct spectrum {
    uint32_t rows, cols, n;
    const double *sigma;
} spectrum;

/* The sum of the first n terms sigma_k u_k v_k'. */
static double *sum_of(const spectrum *s, uint32_t n)
{
    double *x = calloc((size_t)s->rows * s->cols, sizeof *x);
    for (uint32_t k = 0; k < n; k++)
        for (uint32_t i = 0; i < s->rows; i++) {
            double left = s->sigma[k] * wave(s->rows, k, i);
            for (uint32_t j = 0; j < s->cols; j++)
                x[(size_t)i * s->cols + j] += left * wave(s->cols, s->n - 1 - k, j);
        }
    return x;
}

static choir_tune_svd want(uint32_t rows, uint32_t cols, uint32_t rank)
{
    choir_tune_svd svd = {.rows = rows, .cols = cols, .rank = rank};
    svd.a = malloc((size_t)rank * cols * sizeof *svd.a);
    svd.b = malloc((size_t)rows * rank * sizeof *svd.b);
    return svd;
}

static double at(const choir_tune_svd *svd, uint32_t i, uint32_t j)
{
    double sum = 0;
    for (uint32_t k = 0; k < svd->rank; k++)
        sum +=
            (double)svd->b[(size_t)i * svd->rank + k] * (double)svd->a[(size_t)k * svd->cols + j];
    return sum;
}

static double furthest(const choir_tune_svd *svd, const double *x)
{
    double most = 0;
    for (uint32_t i = 0; i < svd->rows; i++)
        for (uint32_t j = 0; j < svd->cols; j++)
            most = fmax(most, fabs(at(svd, i, j) - x[(size_t)i * svd->cols + j]));
    return most;
}

static void free_svd(choir_tune_svd *svd)
{
    free(svd->a);
    free(svd->b);
}

static void check_dense(const spectrum *s, uint32_t rank, double tolerance)
{
    uint32_t kept = rank < s->n ? rank : s->n;
    double *x = sum_of(s, s->n), *best = sum_of(s, kept);
    float *given = malloc((size_t)s->rows * s->cols * sizeof *given);
    for (size_t i = 0; i < (size_t)s->rows * s->cols; i++) given[i] = (float)x[i];
    choir_tune_svd svd = want(s->rows, s->cols, rank);
    assert_int_equal(choir_tune_svd_dense(&svd, given), CHOIR_OK);
    double off = furthest(&svd, best);
    if (!(off <= tolerance)) fail_msg("%u by %u, rank %u: %g away", s->rows, s->cols, rank, off);
    free_svd(&svd);
    free(given);
    free(best);
    free(x);
}

enum { N_SIGMA = 40 };
static void geometric(double *sigma, double ratio)
{
    for (int k = 0; k < N_SIGMA; k++) sigma[k] = 3 * pow(ratio, k);
}

static void dense_matrices_of_every_shape(void **state)
{
    (void)state;
    double sigma[N_SIGMA];
    geometric(sigma, 0.8);
    static const uint32_t shapes[][2] = {{40, 40}, {41, 64}, {64, 41}, {43, 300}, {300, 43}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (uint32_t rank = 1; rank <= N_SIGMA; rank += 13)
            check_dense(&(spectrum){shapes[i][0], shapes[i][1], N_SIGMA, sigma}, rank, 1e-6);
}

/* Too large for all directions at once: the Krylov space has to find the wanted ones. */
static void large_matrices_from_either_side(void **state)
{
    (void)state;
    double sigma[N_SIGMA];
    geometric(sigma, 0.9);
    check_dense(&(spectrum){200, 331, N_SIGMA, sigma}, 4, 1e-6);
    check_dense(&(spectrum){331, 200, N_SIGMA, sigma}, 4, 1e-6);
    check_dense(&(spectrum){260, 240, N_SIGMA, sigma}, 11, 1e-6);
}

/* Where values hardly differ, which vectors are found is a matter of taste; how much they hold is
 * not. */
static void values_that_hardly_differ(void **state)
{
    (void)state;
    enum { ROWS = 220, COLS = 200, RANK = 5 };
    double sigma[COLS], best = 0, held = 0;
    for (int k = 0; k < COLS; k++) sigma[k] = 1 - 0.0005 * k;
    const spectrum s = {ROWS, COLS, COLS, sigma};
    double *x = sum_of(&s, COLS);
    float *given = malloc(sizeof(float) * ROWS * COLS);
    for (size_t i = 0; i < ROWS * COLS; i++) given[i] = (float)x[i];
    choir_tune_svd svd = want(ROWS, COLS, RANK);
    assert_int_equal(choir_tune_svd_dense(&svd, given), CHOIR_OK);
    for (uint32_t k = 0; k < RANK; k++) best += sigma[k] * sigma[k];
    for (uint32_t i = 0; i < ROWS; i++)
        for (uint32_t j = 0; j < COLS; j++) held += at(&svd, i, j) * at(&svd, i, j);
    if (!(held <= best * (1 + 1e-6) && held >= best * (1 - 1e-6)))
        fail_msg("%g held of %g", held, best);
    free_svd(&svd);
    free(given);
    free(x);
}

/* The same matrix by factors, of which some columns are alike. */
static void products(void **state)
{
    (void)state;
    enum { ROWS = 50, COLS = 70, INNER = 12 };
    double sigma[6] = {5, 4, 3, 2, 1, 0.5};
    const spectrum s = {ROWS, COLS, 6, sigma};
    double p[ROWS * INNER], q[INNER * COLS];
    for (uint32_t k = 0; k < INNER; k++) {
        for (uint32_t i = 0; i < ROWS; i++)
            p[i * INNER + k] = sigma[k % 6] * wave(ROWS, k % 6, i) * (k < 6 ? 3 : -2);
        for (uint32_t j = 0; j < COLS; j++) q[k * COLS + j] = wave(COLS, 5 - k % 6, j);
    }
    for (uint32_t rank = 1; rank <= 20; rank++) {
        double *best = sum_of(&s, rank < 6 ? rank : 6);
        choir_tune_svd svd = want(ROWS, COLS, rank);
        assert_int_equal(choir_tune_svd_product(&svd, INNER, p, q), CHOIR_OK);
        assert_true(furthest(&svd, best) <= 1e-6);
        free_svd(&svd);
        free(best);
    }
}

static void nothing_comes_of_zeros(void **state)
{
    (void)state;
    static float x[150 * 150];
    static double p[30 * 2], q[2 * 20];
    choir_tune_svd large = want(150, 150, 3), small = want(30, 20, 25);
    assert_int_equal(choir_tune_svd_dense(&large, x), CHOIR_OK);
    for (uint32_t i = 0; i < 450; i++) assert_true(large.a[i] == 0 && large.b[i] == 0);
    assert_int_equal(choir_tune_svd_dense(&small, x), CHOIR_OK);
    assert_int_equal(choir_tune_svd_product(&small, 2, p, q), CHOIR_OK);
    for (uint32_t i = 0; i < 20 * 25; i++) assert_true(small.a[i] == 0);
    free_svd(&large);
    free_svd(&small);
}

/* A's rows are orthonormal, so that B alone says how much a direction counts. */
static void the_rows_of_a_are_orthonormal(void **state)
{
    (void)state;
    double sigma[N_SIGMA];
    geometric(sigma, 0.7);
    double *x = sum_of(&(spectrum){64, 48, N_SIGMA, sigma}, N_SIGMA);
    float given[64 * 48];
    for (size_t i = 0; i < 64 * 48; i++) given[i] = (float)x[i];
    choir_tune_svd svd = want(64, 48, 9);
    assert_int_equal(choir_tune_svd_dense(&svd, given), CHOIR_OK);
    for (uint32_t k = 0; k < 9; k++)
        for (uint32_t l = 0; l <= k; l++) {
            double sum = 0;
            for (uint32_t j = 0; j < 48; j++)
                sum += (double)svd.a[k * 48 + j] * (double)svd.a[l * 48 + j];
            assert_true(fabs(sum - (k == l)) <= 1e-6);
        }
    free_svd(&svd);
    free(x);
}

static void no_memory_and_no_patience(void **state)
{
    (void)state;
    static float x[150 * 150];
    double p[30] = {1}, q[20] = {1};
    for (uint32_t i = 0; i < 150; i++) x[i * 151] = 1 / (1 + (float)i);
    choir_tune_svd large = want(150, 150, 2), small = want(30, 20, 4);
    choir_status status = CHOIR_E_NO_MEMORY;
    for (uint32_t n = 1; status == CHOIR_E_NO_MEMORY; n++) {
        choir_memory_fail_at(n);
        status = choir_tune_svd_product(&small, 1, p, q);
        if (status == CHOIR_OK) status = choir_tune_svd_dense(&small, x);
        if (status == CHOIR_OK) status = choir_tune_svd_dense(&large, x);
        assert_int_equal(choir_memory_bytes(CHOIR_MEM_TUNE), 0);
    }
    choir_memory_fail_at(0);
    assert_int_equal(status, CHOIR_OK);
    const volatile sig_atomic_t now = 1;
    large.interrupted = &now;
    assert_int_equal(choir_tune_svd_dense(&large, x), CHOIR_E_CANCELLED);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_TUNE), 0);
    free_svd(&large);
    free_svd(&small);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dense_matrices_of_every_shape),
        cmocka_unit_test(large_matrices_from_either_side),
        cmocka_unit_test(values_that_hardly_differ),
        cmocka_unit_test(products),
        cmocka_unit_test(nothing_comes_of_zeros),
        cmocka_unit_test(the_rows_of_a_are_orthonormal),
        cmocka_unit_test(no_memory_and_no_patience),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
