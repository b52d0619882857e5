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
    float logits[] = {1, 3, 2, 3};
    choir_plan *plan = make_plan(1, 4, 3);
    choir_gate gate = {.kind = CHOIR_GATE_TOPK_SOFTMAX, .n_experts = 4, .k = 3};
    choir_router_route(&gate, logits, NULL, 0, 1, plan);
    /* The tie of experts 1 and 3 goes to the lower id. */
    assert_int_equal(plan->experts[0], 1);
    assert_int_equal(plan->experts[1], 3);
    assert_int_equal(plan->experts[2], 2);
    double sum = exp(3) * 2 + exp(2);
    assert_float_equal(plan->weights[0], exp(3) / sum, 1e-7);
    assert_float_equal(plan->weights[2], exp(2) / sum, 1e-7);
    gate.kind = CHOIR_GATE_SOFTMAX_TOPK;
    choir_router_route(&gate, logits, NULL, 0, 1, plan);
    assert_float_equal(plan->weights[0], exp(3) / (sum + exp(1)), 1e-7);
    choir_plan_destroy(plan);
}

/* Sigmoids, a correction that moves the choice alone, two of four groups by their two best together,
 * scaled (DeepSeek-V3's equations 12 to 16, worked out by hand). */
static void test_grouped_sigmoid(void **state)
{
    (void)state;
    float logits[] = {2, -1, 1.5F, 1.4F, 3, -4, 0, 0.5F};
    const float correction[] = {0, 0, 0, 0.3F, -0.2F, 0, 0, 0};
    choir_plan *plan = make_plan(1, 8, 2);
    choir_gate gate = {CHOIR_GATE_SIGMOID, 8, 2, 4, 2, true, .normalise = true, .scale = 2.5F};
    choir_router_route(&gate, logits, correction, 0, 1, plan);
    /* Groups score 1.150, 1.920, 0.771 and 1.122: expert 4, the largest logit, is out. */
    double a = 1 / (1 + exp(-1.4)), b = 1 / (1 + exp(-2.0));
    assert_int_equal(plan->experts[0], 3);
    assert_int_equal(plan->experts[1], 0);
    assert_float_equal(plan->weights[0], 2.5 * a / (a + b), 1e-6);
    assert_float_equal(plan->weights[1], 2.5 * b / (a + b), 1e-6);
    choir_plan_destroy(plan);
}

/* Groups by their best expert: what k cannot find within them weighs nothing (DeepSeek-V2). */
static void test_grouped_softmax(void **state)
{
    (void)state;
    float logits[] = {2, 1, 0, 3};
    choir_plan *plan = make_plan(1, 4, 4);
    choir_gate gate = {CHOIR_GATE_SOFTMAX_TOPK, 4, 4, 2, 1, .scale = 16};
    choir_router_route(&gate, logits, NULL, 0, 1, plan);
    double sum = exp(2) + exp(1) + exp(0) + exp(3);
    assert_int_equal(plan->experts[0], 3);
    assert_int_equal(plan->experts[1], 2);
    assert_float_equal(plan->weights[0], 16 * exp(3) / sum, 1e-5);
    assert_float_equal(plan->weights[1], 16 * exp(0) / sum, 1e-5);
    assert_true(plan->weights[2] == 0 && plan->weights[3] == 0);
    choir_plan_destroy(plan);
}

/* A softmax over scores, corrected for the choice, with a least sum (ERNIE 4.5). */
static void test_corrected_softmax(void **state)
{
    (void)state;
    float logits[] = {1, 2, 3};
    const float correction[] = {5, 0, 0};
    choir_plan *plan = make_plan(1, 3, 1);
    choir_gate gate = {.kind = CHOIR_GATE_SOFTMAX_TOPK, .n_experts = 3, .k = 1, .normalise = true,
                       .normalise_min = 0.5F};
    choir_router_route(&gate, logits, correction, 0, 1, plan);
    assert_int_equal(plan->experts[0], 0);
    assert_float_equal(plan->weights[0], exp(1) / (exp(1) + exp(2) + exp(3)) / 0.5, 1e-6);
    choir_plan_destroy(plan);
}

/* Each of the two is weighed among the logits close to it. */
static void test_sparse_mixer(void **state)
{
    (void)state;
    float logits[] = {2, 1.99F, 1.5F, 1.49F, -3};
    choir_plan *plan = make_plan(1, 5, 2);
    choir_gate gate = {.kind = CHOIR_GATE_SPARSE_MIXER, .n_experts = 5, .k = 2, .jitter = 0.01F};
    choir_router_route(&gate, logits, NULL, 0, 1, plan);
    assert_int_equal(plan->experts[0], 0);
    assert_int_equal(plan->experts[1], 1);
    assert_float_equal(plan->weights[0], 1 / (1 + exp(-0.01)), 1e-6);
    assert_float_equal(plan->weights[1], 1, 1e-6);
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
        choir_gate gate = {.kind = CHOIR_GATE_SOFTMAX_TOPK, .n_experts = n, .k = k, .normalise = true};
        choir_router_route(&gate, logits, NULL, 0, rows, plan);
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
    const float correction[4] = {0, 1, NAN, 0};
    for (choir_gate_kind kind = 0; kind <= CHOIR_GATE_SPARSE_MIXER; kind++)
        for (uint32_t n_groups = 1; n_groups <= 4; n_groups *= 2)
            for (int corrected = 0; corrected < 2; corrected++) {
                float poison[] = {NAN, NAN, NAN, NAN, 1, NAN, 2, INFINITY};
                choir_gate gate = {kind, 4, 3, n_groups, 1, true, .normalise = true};
                choir_router_route(&gate, poison, corrected ? correction : NULL, 0, 2, plan);
                choir_plan_group(plan, 2); /* ids stay in range whatever the logits are */
            }
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
        cmocka_unit_test(test_grouped_sigmoid),
        cmocka_unit_test(test_grouped_softmax),
        cmocka_unit_test(test_corrected_softmax),
        cmocka_unit_test(test_sparse_mixer),
        cmocka_unit_test(test_random_rows),
        cmocka_unit_test(test_forced_and_poisoned),
        cmocka_unit_test(test_bad_shapes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
