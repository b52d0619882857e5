/* How a budget is split: whatever is asked for and whatever is there, the parts fit, each has its
 * floor, and none's growth can take from another. */
#include "engine/budget.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static uint64_t random_state = 9;

static uint64_t pick(uint64_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (random_state >> 20) % (n + 1);
}

static budget_wishes draw(void)
{
    budget_wishes w = {.rest = pick(1 << pick(30)), .least_kv = pick(1000)};
    w.experts = pick(4) == 0 ? 0 : pick(1 << pick(30));
    w.spare_experts = w.experts / 8;
    w.few_experts = pick(w.experts / 4);
    w.kv = w.least_kv + pick(1 << pick(30));
    w.adapters = pick(2) == 0 ? 0 : 1 + pick(1 << pick(30));
    return w;
}

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static void test_parts_fit(void **state)
{
    (void)state;
    uint32_t n_fixed = 0, n_shared = 0, n_refused = 0;
    for (int i = 0; i < 200000; i++) {
        budget_wishes w = draw();
        budget_parts p;
        memset(&p, 0xAA, sizeof p);
        if (choir_budget_fixed(&w, &p)) {
            n_fixed++;
            assert_true(p.experts == w.experts && p.kv + p.adapters + p.experts <= w.rest);
            assert_true(p.kv >= w.least_kv && p.kv <= w.kv && p.kv_floor == p.kv);
            assert_true(p.adapters <= w.adapters && (p.adapters > 0) == (w.adapters > 0));
            assert_true(p.adapter_floor == p.adapters);
            continue;
        }
        if (!choir_budget_shared(&w, &p)) {
            n_refused++;
            assert_true(w.rest <
                        larger(w.rest / 8, w.least_kv) + larger(w.rest / 8, w.few_experts));
            continue;
        }
        n_shared++;
        uint64_t expert_floor = larger(w.rest / 8, w.few_experts);
        /* With all that KV pages and adapters may have, experts keep their floor. */
        assert_true(p.kv + p.adapters + expert_floor <= w.rest);
        assert_true(p.kv >= p.kv_floor && p.kv_floor >= w.least_kv && p.kv <= w.kv);
        assert_true(p.adapters <= w.adapters && p.adapter_floor <= p.adapters);
        assert_int_equal(p.experts + p.kv + p.adapter_floor, w.rest);
    }
    assert_true(n_fixed > 10000 && n_shared > 10000 && n_refused > 10000);
}

/* Adapters that nobody asked for take nothing, and a budget that holds everything gives everything.
 */
static void test_ends(void **state)
{
    (void)state;
    budget_parts p;
    budget_wishes w = {
        .rest = 1000, .experts = 400, .spare_experts = 50, .kv = 600, .least_kv = 10};
    assert_true(choir_budget_fixed(&w, &p));
    assert_true(p.kv == 600 && p.adapters == 0);
    w.rest = 5000;
    w.adapters = 700;
    assert_true(choir_budget_fixed(&w, &p));
    assert_true(p.kv == 600 && p.adapters == 700);
    w.rest = 1060; /* half of the 600 beside experts and the least of KV */
    assert_true(choir_budget_fixed(&w, &p));
    assert_true(p.kv == 360 && p.adapters == 300);
    w.rest = 400;
    assert_false(choir_budget_fixed(&w, &p));
    assert_true(choir_budget_shared(&w, &p));
    assert_true(p.kv_floor == 50 && p.adapters == 150 && p.adapter_floor == 18 && p.kv == 200);
    w = (budget_wishes){.rest = 9, .kv = 10, .least_kv = 10};
    assert_false(choir_budget_fixed(&w, &p));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parts_fit),
        cmocka_unit_test(test_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
