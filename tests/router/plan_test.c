#include "router/router.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

static choir_plan *make_plan(uint32_t rows, uint32_t n, uint32_t k)
{
    choir_plan *plan;
    assert_int_equal(choir_plan_create(rows, n, k, &plan), CHOIR_OK);
    return plan;
}

static void test_known_row(void **state)
{
    (void)state;
    const float logits[] = {1, 3, 2, 3};
    choir_plan *plan = make_plan(1, 4, 3);
    choir_gate gate = {CHOIR_GATE_TOPK_SOFTMAX, 4, 3, true};
    choir_router_route(&gate, logits, 0, 1, plan);
    /* The tie of experts 1 and 3 goes to the lower id. */
    assert_int_equal(plan->experts[0], 1);
    assert_int_equal(plan->experts[1], 3);
    assert_int_equal(plan->experts[2], 2);
    double sum = exp(3) * 2 + exp(2);
    assert_float_equal(plan->weights[0], exp(3) / sum, 1e-7);
    assert_float_equal(plan->weights[2], exp(2) / sum, 1e-7);
    gate = (choir_gate){CHOIR_GATE_SOFTMAX_TOPK, 4, 3, false};
    choir_router_route(&gate, logits, 0, 1, plan);
    assert_float_equal(plan->weights[0], exp(3) / (sum + exp(1)), 1e-7);
    choir_plan_destroy(plan);
}

/* Random rows: the chosen are the largest, the slots hold every (row, rank) once, sorted. */
static void test_random_rows(void **state)
{
    (void)state;
    unsigned seed = 4711;
    print_message("seed %u\n", seed);
    srand(seed);
    for (int round = 0; round < 200; round++) {
        uint32_t n = 1 + (uint32_t)rand() % 70, k = 1 + (uint32_t)rand() % n;
        uint32_t rows = 1 + (uint32_t)rand() % 40;
        float *logits = malloc(sizeof *logits * rows * n);
        for (uint32_t i = 0; i < rows * n; i++) logits[i] = (float)(rand() % 64) / 8;
        choir_plan *plan = make_plan(40, n, k);
        choir_gate gate = {CHOIR_GATE_SOFTMAX_TOPK, n, k, true};
        choir_router_route(&gate, logits, 0, rows, plan);
        choir_plan_group(plan, rows);
        for (uint32_t r = 0; r < rows; r++) {
            double sum = 0;
            uint32_t least = plan->experts[r * k + k - 1];
            for (uint32_t i = 0; i < k; i++) sum += plan->weights[r * k + i];
            assert_float_equal(sum, 1, 1e-5);
            uint32_t n_above = 0;
            for (uint32_t e = 0; e < n; e++) n_above += logits[r * n + e] > logits[r * n + least];
            assert_true(n_above < k);
        }
        assert_int_equal(plan->first[n], rows * k);
        for (uint32_t e = 0; e < n; e++)
            for (uint32_t s = plan->first[e]; s < plan->first[e + 1]; s++) {
                assert_int_equal(plan->experts[plan->slots[s]], e);
                assert_int_equal(plan->slot_of[plan->slots[s]], s);
                if (s > plan->first[e]) assert_true(plan->slots[s] > plan->slots[s - 1]);
            }
        choir_plan_destroy(plan);
        free(logits);
    }
}

static void test_forced_and_poisoned(void **state)
{
    (void)state;
    choir_plan *plan = make_plan(2, 4, 3);
    for (uint32_t e = 0; e < 4; e++) {
        choir_router_force(e, 0, 2, plan);
        choir_plan_group(plan, 2);
        assert_int_equal(plan->experts[3], e);
        assert_true(plan->weights[3] == 1 && plan->weights[4] == 0 && plan->weights[5] == 0);
        assert_true(plan->experts[4] != e && plan->experts[5] != e);
        assert_true(plan->experts[4] != plan->experts[5]);
    }
    const float poison[] = {NAN, NAN, NAN, NAN, 1, NAN, 2, INFINITY};
    choir_gate gate = {CHOIR_GATE_SOFTMAX_TOPK, 4, 3, true};
    choir_router_route(&gate, poison, 0, 2, plan);
    choir_plan_group(plan, 2); /* ids stay in range whatever the logits are */
    choir_plan_destroy(plan);
}

static void test_bad_shapes(void **state)
{
    (void)state;
    choir_plan *plan;
    assert_int_equal(choir_plan_create(1, 4, 5, &plan), CHOIR_E_INVALID);
    assert_int_equal(choir_plan_create(1, 0, 0, &plan), CHOIR_E_INVALID);
    for (uint64_t i = 1; i <= 6; i++) {
        choir_memory_fail_at(i);
        assert_int_equal(choir_plan_create(8, 4, 2, &plan), CHOIR_E_NO_MEMORY);
    }
    choir_memory_fail_at(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_row),
        cmocka_unit_test(test_random_rows),
        cmocka_unit_test(test_forced_and_poisoned),
        cmocka_unit_test(test_bad_shapes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
