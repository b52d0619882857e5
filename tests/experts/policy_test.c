#include "experts/policy.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static choir_policy *create(choir_policy_kind kind)
{
    choir_policy *p;
    assert_int_equal(choir_policy_create(kind, 2, 4, &p), CHOIR_OK);
    return p;
}

static void use(choir_policy *p, uint32_t layer, uint32_t expert)
{
    choir_policy_use(p, layer, expert, 1, 0.5F, 0);
}

static void test_lru(void **state)
{
    (void)state;
    choir_policy *p = create(CHOIR_POLICY_LRU);
    for (uint32_t x = 0; x < 3; x++) {
        choir_policy_step(p);
        use(p, 0, x);
        use(p, 1, x);
    }
    assert_true(choir_policy_value(p, 0, 3) < choir_policy_value(p, 0, 0)); /* never used */
    assert_true(choir_policy_value(p, 0, 0) < choir_policy_value(p, 1, 0));
    assert_true(choir_policy_value(p, 1, 0) < choir_policy_value(p, 0, 1));
    choir_policy_destroy(p);
}

/* Often counts for more than lately, until it was long ago. */
static void test_lfu(void **state)
{
    (void)state;
    choir_policy *p = create(CHOIR_POLICY_LFU_AGED);
    for (int i = 0; i < 10; i++) {
        choir_policy_step(p);
        use(p, 0, 0);
    }
    choir_policy_step(p);
    use(p, 0, 1);
    assert_true(choir_policy_value(p, 0, 0) > choir_policy_value(p, 0, 1));
    assert_true(choir_policy_heat(p, 0, 0) > 9 && choir_policy_heat(p, 0, 0) < 10);
    for (int i = 0; i < 4 * CHOIR_POLICY_HALF_LIFE; i++) choir_policy_step(p);
    use(p, 0, 1);
    assert_true(choir_policy_value(p, 0, 0) < choir_policy_value(p, 0, 1));
    choir_policy_destroy(p);
}

static void test_router(void **state)
{
    (void)state;
    choir_policy *p = create(CHOIR_POLICY_ROUTER);
    choir_policy_step(p);
    choir_policy_use(p, 0, 0, 1, 0.9F, 0);
    choir_policy_use(p, 0, 1, 1, 0.1F, 0);
    assert_true(choir_policy_value(p, 0, 0) > choir_policy_value(p, 0, 1)); /* clearly wanted */
    choir_policy_use(p, 0, 2, 4, 4 * 0.9F, 0);
    assert_true(choir_policy_value(p, 0, 2) > choir_policy_value(p, 0, 0)); /* by many */
    choir_policy_use(p, 1, 0, 1, 0.9F, 2);
    choir_policy_use(p, 1, 1, 1, 0.9F, 500);
    assert_true(choir_policy_value(p, 1, 1) > choir_policy_value(p, 1, 0)); /* for long */
    choir_policy_destroy(p);
}

static void test_layer_cost(void **state)
{
    (void)state;
    choir_policy *p = create(CHOIR_POLICY_LFU_AGED);
    choir_policy_step(p);
    use(p, 0, 0);
    use(p, 1, 0);
    choir_policy_set_layer_cost(p, 1, 2);
    assert_true(choir_policy_value(p, 1, 0) > choir_policy_value(p, 0, 0));
    choir_policy_destroy(p);
}

static void test_names_and_memory(void **state)
{
    (void)state;
    for (int k = 0; k < CHOIR_N_POLICIES; k++) {
        choir_policy_kind got;
        assert_true(choir_policy_parse(choir_policy_text((choir_policy_kind)k), &got));
        assert_int_equal(got, k);
    }
    choir_policy_kind got;
    assert_false(choir_policy_parse("fifo", &got));
    for (uint64_t i = 1; i <= 3; i++) {
        choir_policy *p;
        choir_memory_fail_at(i);
        choir_status status = choir_policy_create(CHOIR_POLICY_LRU, 2, 4, &p);
        choir_memory_fail_at(0);
        assert_int_equal(status, CHOIR_E_NO_MEMORY);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lru),
        cmocka_unit_test(test_lfu),
        cmocka_unit_test(test_router),
        cmocka_unit_test(test_layer_cost),
        cmocka_unit_test(test_names_and_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
