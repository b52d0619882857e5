/* The rows of a gate: away from what all texts share, of one length, zero for a text like the mean.
 */
#include "tune/gates.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

enum { HIDDEN = 48, N_EXPERTS = 5 };

static void near(double value, double wanted, double most)
{
    if (!(fabs(value - wanted) <= most)) fail_msg("%g, not %g", value, wanted);
}

static void two_texts_on_paper(void **state)
{
    (void)state;
    double means[] = {3, 1, 1, 3}, common[2];
    float gates[4];
    choir_tune_gates_of_means(means, 2, 2, 4, common, gates);
    near(common[0], 2, 0);
    near(common[1], 2, 0);
    const double side = 4 / sqrt(2);
    const double wanted[] = {side, -side, -side, side};
    for (int i = 0; i < 4; i++) near(gates[i], wanted[i], 1e-6);
}

static double dot(const float *row, const double *other)
{
    double sum = 0;
    for (int i = 0; i < HIDDEN; i++) sum += (double)row[i] * other[i];
    return sum;
}

static void rows_have_one_length_and_no_share_in_the_common(void **state)
{
    (void)state;
    double means[N_EXPERTS * HIDDEN], common[HIDDEN];
    float gates[N_EXPERTS * HIDDEN];
    for (int i = 0; i < N_EXPERTS * HIDDEN; i++) means[i] = 3 + sin(i * i);
    choir_tune_gates_of_means(means, N_EXPERTS, HIDDEN, 2.5F, common, gates);
    for (int e = 0; e < N_EXPERTS; e++) {
        const float *row = gates + (size_t)e * HIDDEN;
        double squares = 0;
        for (int i = 0; i < HIDDEN; i++) squares += (double)row[i] * (double)row[i];
        near(sqrt(squares), 2.5, 1e-6);
        near(dot(row, common), 0, 1e-5);
    }
}

static void equal_texts_have_no_direction(void **state)
{
    (void)state;
    double means[N_EXPERTS * HIDDEN], common[HIDDEN];
    float gates[N_EXPERTS * HIDDEN];
    for (int i = 0; i < N_EXPERTS * HIDDEN; i++) means[i] = sin(i % HIDDEN) / 3;
    choir_tune_gates_of_means(means, N_EXPERTS, HIDDEN, 4, common, gates);
    for (int i = 0; i < N_EXPERTS * HIDDEN; i++) near(gates[i], 0, 0);
}

/* A text whose mean is a multiple of the others' leans nowhere once that is taken out. */
static void louder_texts_have_no_direction(void **state)
{
    (void)state;
    double means[2 * HIDDEN], common[HIDDEN];
    float gates[2 * HIDDEN];
    for (int i = 0; i < 2 * HIDDEN; i++) means[i] = (1 + i / HIDDEN) * sin(i % HIDDEN + 1);
    choir_tune_gates_of_means(means, 2, HIDDEN, 4, common, gates);
    for (int i = 0; i < 2 * HIDDEN; i++) near(gates[i], 0, 0);
}

static void texts_that_share_nothing_keep_their_directions(void **state)
{
    (void)state;
    double means[] = {1, 0, -1, 0}, common[2];
    float gates[4];
    choir_tune_gates_of_means(means, 2, 2, 4, common, gates);
    const double wanted[] = {4, 0, -4, 0};
    for (int i = 0; i < 4; i++) near(gates[i], wanted[i], 0);
    memset(means, 0, sizeof means);
    choir_tune_gates_of_means(means, 2, 2, 4, common, gates);
    for (int i = 0; i < 4; i++) near(gates[i], 0, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(two_texts_on_paper),
        cmocka_unit_test(rows_have_one_length_and_no_share_in_the_common),
        cmocka_unit_test(equal_texts_have_no_direction),
        cmocka_unit_test(louder_texts_have_no_direction),
        cmocka_unit_test(texts_that_share_nothing_keep_their_directions),
    };
    return cmocka_run_group_tests_name("gates", tests, NULL, NULL);
}
