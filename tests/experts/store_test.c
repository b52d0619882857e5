#include "experts/experts.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static choir_status create(uint32_t n_layers, uint32_t n_experts, choir_experts **out)
{
    choir_experts_options o = CHOIR_EXPERTS_OPTIONS_DEFAULT;
    o.n_layers = n_layers;
    o.n_experts = n_experts;
    return choir_experts_create(&o, out);
}

static choir_expert planned(size_t bytes)
{
    choir_matrix m = {.layout = CHOIR_LAYOUT_W8, .rows = 16, .cols = 32, .bytes = bytes};
    return (choir_expert){m, m, m};
}

static void test_runs_do_not_overlap(void **state)
{
    (void)state;
    choir_experts *store;
    assert_int_equal(create(2, 3, &store), CHOIR_OK);
    for (uint32_t l = 0; l < 2; l++) {
        choir_expert experts[] = {planned(1000), planned(64), planned(4097)};
        assert_int_equal(choir_experts_reserve(store, l, experts), CHOIR_OK);
        const char *end = NULL;
        for (uint32_t x = 0; x < 3; x++) {
            const choir_expert *held;
            assert_int_equal(choir_experts_pin(store, l, x, &held), CHOIR_OK);
            const choir_matrix *parts[] = {&held->gate, &held->up, &held->down};
            for (int i = 0; i < 3; i++) {
                assert_int_equal((uintptr_t)parts[i]->data % 64, 0);
                if (end != NULL) assert_true((const char *)parts[i]->data >= end);
                end = (const char *)parts[i]->data + parts[i]->bytes;
                memset((void *)parts[i]->data, 0xA5, parts[i]->bytes);
            }
            assert_int_equal(choir_experts_n_pinned(store), 1);
            choir_experts_unpin(store, l, x);
        }
    }
    assert_int_equal(choir_experts_n_pinned(store), 0);
    assert_true(choir_experts_bytes(store) >= 2 * 3 * (1000 + 64 + 4097));
    choir_experts_destroy(store);
}

static void test_absent_and_exact(void **state)
{
    (void)state;
    choir_experts *store;
    const choir_expert *held;
    assert_int_equal(create(1, 1, &store), CHOIR_OK);
    assert_int_equal(choir_experts_pin(store, 0, 0, &held), CHOIR_E_NOT_FOUND);
    const float weights[4] = {1, 2, 3, 4};
    choir_expert views = planned(0);
    views.gate = views.up = views.down = (choir_matrix){.layout = CHOIR_LAYOUT_EXACT,
                                                        .rows = 2,
                                                        .cols = 2,
                                                        .data = weights,
                                                        .bytes = sizeof weights};
    assert_int_equal(choir_experts_reserve(store, 0, &views), CHOIR_OK);
    assert_int_equal(choir_experts_bytes(store), 0);
    assert_int_equal(choir_experts_pin(store, 0, 0, &held), CHOIR_OK);
    assert_ptr_equal(held->up.data, weights);
    choir_experts_unpin(store, 0, 0);
    choir_experts_destroy(store);
}

static void test_lack_of_memory(void **state)
{
    (void)state;
    for (uint64_t i = 1; i <= 6; i++) {
        choir_experts *store = NULL;
        choir_expert expert = planned(100);
        choir_memory_fail_at(i);
        choir_status status = create(1, 1, &store);
        if (status == CHOIR_OK) status = choir_experts_reserve(store, 0, &expert);
        choir_memory_fail_at(0);
        assert_int_equal(status, CHOIR_E_NO_MEMORY);
        choir_experts_destroy(store);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_runs_do_not_overlap),
        cmocka_unit_test(test_absent_and_exact),
        cmocka_unit_test(test_lack_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
