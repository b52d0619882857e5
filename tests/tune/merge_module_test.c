/* Merging one matrix: pruning, electing and adding against the same done plainly, number by number;
 * random pruning by its properties. */
#include "tune/merge_module.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { ROWS = 23, COLS = 31, RANK = 5, N = 3 };
static float a[N][RANK * COLS], b[N][ROWS * RANK];
static float out_a[4 * RANK * COLS], out_b[ROWS * 4 * RANK];
static const double weights[N] = {0.7, -1.2, 0.4}, scales[N] = {2, 0.5, 1.5};

static int fill(void **state)
{
    (void)state;
    uint32_t seed = 11;
    for (int p = 0; p < N; p++) {
        float *all[] = {a[p], b[p]};
        const size_t sizes[] = {RANK * COLS, ROWS * RANK};
        for (int w = 0; w < 2; w++)
            for (size_t i = 0; i < sizes[w]; i++) {
                seed = seed * 1664525 + 1013904223;
                all[w][i] = (float)(seed >> 8) / (1 << 23) - 1;
            }
    }
    return 0;
}

static choir_status merge(choir_merge_options o, uint32_t n, uint32_t rank)
{
    choir_tune_source sources[N];
    for (uint32_t p = 0; p < n; p++)
        sources[p] = (choir_tune_source){a[p], b[p], RANK, scales[p], weights[p], p};
    const choir_tune_target target = {"w", 77, ROWS, COLS, rank, out_a, out_b};
    return choir_tune_merge_module(&o, sources, n, &target);
}

static void near(double value, double wanted, double most)
{
    if (!(fabs(value - wanted) <= most)) fail_msg("%.9g, not %.9g", value, wanted);
}

/* ---- the same, plainly ---- */

typedef struct matrix {
    size_t n;
    double v[N][ROWS * COLS];
} matrix;

static int by_size_and_place(const void *x, const void *y)
{
    const double *const *p = x, *const *q = y;
    if (fabs(**p) != fabs(**q)) return fabs(**p) > fabs(**q) ? -1 : 1;
    return *p < *q ? -1 : 1;
}

static void keep_largest(double *v, size_t n, double density)
{
    double *sorted[ROWS * COLS];
    for (size_t i = 0; i < n; i++) sorted[i] = &v[i];
    qsort(sorted, n, sizeof *sorted, by_size_and_place);
    for (size_t i = (size_t)(density * (double)n); i < n; i++) *sorted[i] = 0;
}

static double elected(const matrix *m, size_t i, const double *w, bool by_frequency)
{
    double votes = 0, sum = 0;
    int n = 0;
    for (int p = 0; p < N; p++)
        votes += by_frequency ? (m->v[p][i] > 0) - (m->v[p][i] < 0) : m->v[p][i];
    for (int p = 0; p < N; p++)
        if (m->v[p][i] != 0 && (m->v[p][i] > 0) == (votes >= 0)) {
            sum += w[p] * m->v[p][i];
            n++;
        }
    return sum / (n > 0 ? n : 1);
}

static double added(const matrix *m, size_t i, const double *w)
{
    double sum = 0;
    for (int p = 0; p < N; p++) sum += w[p] * m->v[p][i];
    return sum;
}

static double plainly(const matrix *m, size_t i, const double *w, const choir_merge_options *o)
{
    return choir_merge_method_of(o->method)->elects ? elected(m, i, w, o->by_frequency)
                                                    : added(m, i, w);
}

static void check_factors(choir_merge_options o)
{
    static matrix m;
    double w_a[N], w_b[N];
    assert_int_equal(merge(o, N, RANK + 1), CHOIR_OK);
    for (int p = 0; p < N; p++) {
        w_b[p] = sqrt(fabs(weights[p] * scales[p]));
        w_a[p] = weights[p] < 0 ? -w_b[p] : w_b[p];
    }
    for (int w = 0; w < 2; w++) {
        m.n = w == 0 ? RANK * COLS : ROWS * RANK;
        for (int p = 0; p < N; p++) {
            for (size_t i = 0; i < m.n; i++) m.v[p][i] = (double)(w == 0 ? a[p] : b[p])[i];
            if (o.density < 1) keep_largest(m.v[p], m.n, o.density);
        }
        for (size_t i = 0; i < m.n; i++) {
            size_t at = w == 0 ? i : i / RANK * (RANK + 1) + i % RANK;
            near((double)(w == 0 ? out_a : out_b)[at], plainly(&m, i, w == 0 ? w_a : w_b, &o),
                 1e-6);
        }
    }
    for (int j = 0; j < COLS; j++) assert_true(out_a[RANK * COLS + j] == 0);
    for (int i = 0; i < ROWS; i++) assert_true(out_b[i * (RANK + 1) + RANK] == 0);
}

static double product_at(const float *left, const float *right, uint32_t rank, size_t i)
{
    double sum = 0;
    for (uint32_t k = 0; k < rank; k++)
        sum += (double)left[i / COLS * rank + k] * (double)right[k * COLS + i % COLS];
    return sum;
}

/* All of the result's rank, so that the decomposition gives the whole sum back. */
static void check_products(choir_merge_options o)
{
    static matrix m;
    o.rank = ROWS;
    choir_tune_source sources[N];
    static float all_a[ROWS * COLS], all_b[ROWS * ROWS];
    const choir_tune_target target = {"w", 77, ROWS, COLS, ROWS, all_a, all_b};
    for (uint32_t p = 0; p < N; p++)
        sources[p] = (choir_tune_source){a[p], b[p], RANK, scales[p], weights[p], p};
    assert_int_equal(choir_tune_merge_module(&o, sources, N, &target), CHOIR_OK);
    m.n = ROWS * COLS;
    for (int p = 0; p < N; p++) {
        for (size_t i = 0; i < m.n; i++)
            m.v[p][i] = (double)(float)(scales[p] * product_at(b[p], a[p], RANK, i));
        if (o.density < 1) keep_largest(m.v[p], m.n, o.density);
    }
    for (size_t i = 0; i < m.n; i++)
        near(product_at(all_b, all_a, ROWS, i), plainly(&m, i, weights, &o), 1e-5);
}

static void factors_are_added_as_they_are_plainly(void **state)
{
    (void)state;
    choir_merge_options o = {.method = CHOIR_MERGE_LINEAR, .density = 1};
    check_factors(o);
    for (int k = 0; k < 4; k++) {
        o.density = 0.15 + 0.2 * k;
        o.method = CHOIR_MERGE_MAGNITUDE_PRUNE;
        check_factors(o);
        o.method = CHOIR_MERGE_TIES;
        o.by_frequency = k % 2 == 1;
        check_factors(o);
    }
}

static void products_are_added_as_they_are_plainly(void **state)
{
    (void)state;
    choir_merge_options o = {.method = CHOIR_MERGE_SVD, .density = 1};
    check_products(o);
    for (int k = 0; k < 4; k++) {
        o.density = 0.15 + 0.2 * k;
        o.method = CHOIR_MERGE_MAGNITUDE_PRUNE_SVD;
        check_products(o);
        o.method = CHOIR_MERGE_TIES_SVD;
        o.by_frequency = k % 2 == 1;
        check_products(o);
    }
}

/* Many numbers of one size: those that lie first stay. */
static void numbers_of_one_size(void **state)
{
    (void)state;
    static float save[RANK * COLS];
    memcpy(save, a[0], sizeof save);
    for (int i = 0; i < RANK * COLS; i++) a[0][i] = i % 3 == 0 ? 2.0F : i % 3 == 1 ? -2.0F : 0;
    const choir_merge_options o = {.method = CHOIR_MERGE_MAGNITUDE_PRUNE, .density = 0.4};
    check_factors(o);
    const choir_merge_options nothing = {.method = CHOIR_MERGE_MAGNITUDE_PRUNE, .density = 1e-4};
    assert_int_equal(merge(nothing, 1, RANK), CHOIR_OK);
    for (int i = 0; i < RANK * COLS; i++) assert_true(out_a[i] == 0);
    memcpy(a[0], save, sizeof save);
}

static void one_behind_the_other(void **state)
{
    (void)state;
    const choir_merge_options o = {.method = CHOIR_MERGE_CAT, .density = 1};
    assert_int_equal(merge(o, N, 4 * RANK), CHOIR_OK);
    for (size_t i = 0; i < ROWS * COLS; i++) {
        double sum = 0;
        for (int p = 0; p < N; p++) sum += weights[p] * scales[p] * product_at(b[p], a[p], RANK, i);
        near(product_at(out_b, out_a, 4 * RANK, i), sum, 1e-5);
    }
    for (int j = 0; j < RANK * COLS; j++) assert_true(out_a[N * RANK * COLS + j] == 0);
    for (int i = 0; i < ROWS; i++) assert_true(out_b[i * 4 * RANK + N * RANK] == 0);
}

/* Each number stays as often as the density says, so many times larger, and is right on average. */
static void random_pruning(void **state)
{
    (void)state;
    enum { SEEDS = 4000 };
    static double mean[RANK * COLS];
    choir_merge_options o = {.method = CHOIR_MERGE_DARE_LINEAR, .density = 0.3};
    double factor = sqrt(weights[0] * scales[0]), kept = 0;
    memset(mean, 0, sizeof mean);
    for (o.seed = 0; o.seed < SEEDS; o.seed++) {
        assert_int_equal(merge(o, 1, RANK), CHOIR_OK);
        for (int i = 0; i < RANK * COLS; i++) {
            mean[i] += (double)out_a[i] / SEEDS;
            if (out_a[i] == 0) continue;
            kept++;
            near((double)out_a[i], factor * (double)a[0][i] / 0.3, 1e-6);
        }
    }
    /* five standard deviations */
    double n = (double)SEEDS * RANK * COLS;
    near(kept / n, 0.3, 5 * sqrt(0.3 * 0.7 / n));
    for (int i = 0; i < RANK * COLS; i++) {
        double size = factor * fabs((double)a[0][i]);
        near(mean[i], factor * (double)a[0][i], 5 * size * sqrt(0.7 / 0.3 / SEEDS) + 1e-9);
    }
}

/* What is dropped depends on the seed, the adapter and the matrix; A, B and B A are drawn apart. */
static void random_pruning_again(void **state)
{
    (void)state;
    static float first[RANK * COLS];
    choir_merge_options o = {.method = CHOIR_MERGE_DARE_TIES, .density = 0.5, .seed = 3};
    choir_tune_source source = {a[0], b[0], RANK, 1, 1, 0};
    choir_tune_target target = {"w", 77, ROWS, COLS, RANK, out_a, out_b};
    assert_int_equal(choir_tune_merge_module(&o, &source, 1, &target), CHOIR_OK);
    memcpy(first, out_a, sizeof first);
    assert_int_equal(choir_tune_merge_module(&o, &source, 1, &target), CHOIR_OK);
    assert_memory_equal(first, out_a, sizeof first);
    for (int change = 0; change < 3; change++) {
        o.seed = change == 0 ? 4 : 3;
        source.adapter = change == 1 ? 1 : 0;
        target.stream = change == 2 ? 78 : 77;
        assert_int_equal(choir_tune_merge_module(&o, &source, 1, &target), CHOIR_OK);
        int alike = 0;
        for (int i = 0; i < RANK * COLS; i++) alike += (out_a[i] == 0) == (first[i] == 0);
        assert_in_range(alike, RANK * COLS * 3 / 10, RANK * COLS * 7 / 10);
    }
    o.density = 1;
    assert_int_equal(choir_tune_merge_module(&o, &source, 1, &target), CHOIR_OK);
    assert_memory_equal(a[0], out_a, sizeof a[0]);
}

/* DARE on products, each number of which is dropped or twice as large. */
static void random_pruning_of_products(void **state)
{
    (void)state;
    static float all_a[ROWS * COLS], all_b[ROWS * ROWS];
    const choir_merge_options o = {.method = CHOIR_MERGE_DARE_LINEAR_SVD, .density = 0.5};
    const choir_tune_source source = {a[0], b[0], RANK, 1, 1, 0};
    const choir_tune_target target = {"w", 77, ROWS, COLS, ROWS, all_a, all_b};
    assert_int_equal(choir_tune_merge_module(&o, &source, 1, &target), CHOIR_OK);
    int n_kept = 0;
    for (size_t i = 0; i < ROWS * COLS; i++) {
        double whole = 2 * product_at(b[0], a[0], RANK, i), is = product_at(all_b, all_a, ROWS, i);
        bool kept = fabs(is) > fabs(whole) / 2;
        n_kept += kept;
        near(is, kept ? whole : 0, 1e-5);
    }
    assert_in_range(n_kept, ROWS * COLS * 4 / 10, ROWS * COLS * 6 / 10);
}

static void results_too_large(void **state)
{
    (void)state;
    float huge = 3e38F, kept = a[0][3];
    a[0][3] = huge;
    const choir_merge_options o = {.method = CHOIR_MERGE_CAT, .density = 1};
    assert_int_equal(merge(o, 1, RANK), CHOIR_E_DATA_LOSS);
    assert_non_null(strstr(choir_error_message(), "w: the merged weights are too large"));
    const choir_merge_options ties = {.method = CHOIR_MERGE_TIES_SVD, .density = 0.5};
    b[0][0] *= 10;
    assert_int_equal(merge(ties, 1, RANK), CHOIR_E_DATA_LOSS);
    b[0][0] /= 10;
    a[0][3] = kept;
}

static void memory_that_runs_out(void **state)
{
    (void)state;
    for (int method = 0; method < CHOIR_N_MERGE_METHODS; method++) {
        choir_merge_options o = {.method = (choir_merge_method)method, .density = 1};
        if (choir_merge_method_of(o.method)->pruning != CHOIR_MERGE_PRUNES_NOTHING) o.density = 0.5;
        choir_status status = CHOIR_E_NO_MEMORY;
        for (uint32_t n = 1; status == CHOIR_E_NO_MEMORY; n++) {
            choir_memory_fail_at(n);
            status = merge(o, N, method == CHOIR_MERGE_CAT ? 4 * RANK : RANK + 1);
            choir_memory_fail_at(0);
            assert_int_equal(choir_memory_bytes(CHOIR_MEM_TUNE), 0);
        }
        assert_int_equal(status, CHOIR_OK);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(factors_are_added_as_they_are_plainly),
        cmocka_unit_test(products_are_added_as_they_are_plainly),
        cmocka_unit_test(numbers_of_one_size),
        cmocka_unit_test(one_behind_the_other),
        cmocka_unit_test(random_pruning),
        cmocka_unit_test(random_pruning_again),
        cmocka_unit_test(random_pruning_of_products),
        cmocka_unit_test(results_too_large),
        cmocka_unit_test(memory_that_runs_out),
    };
    return cmocka_run_group_tests(tests, fill, NULL);
}
