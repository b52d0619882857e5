#include "scheduler/kv_pages.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static uint32_t wiped[8], n_wiped;
static void wipe(void *engine, uint32_t page)
{
    assert_null(engine);
    wiped[n_wiped++] = page;
}

static void test_every_page_once(void **state)
{
    (void)state;
    kv_pages p;
    bool seen[5] = {false};
    assert_int_equal(kv_pages_create(5, wipe, NULL, &p), CHOIR_OK);
    uint32_t page;
    for (int i = 0; i < 5; i++) {
        assert_true(kv_pages_take(&p, &page));
        assert_true(page < 5 && !seen[page]);
        seen[page] = true;
    }
    assert_false(kv_pages_take(&p, &page));
    kv_pages_hold(&p, 2);
    assert_false(kv_pages_drop(&p, 2));
    assert_true(kv_pages_drop(&p, 2));
    assert_true(kv_pages_take(&p, &page));
    assert_int_equal(page, 2);
    kv_pages_destroy(&p);
}

static void test_idle_pages_are_counted(void **state)
{
    (void)state;
    kv_pages p;
    uint32_t page;
    assert_int_equal(kv_pages_create(2, wipe, NULL, &p), CHOIR_OK);
    assert_true(kv_pages_take(&p, &page));
    kv_pages_cache(&p, page);
    assert_int_equal(p.n_idle, 0);
    assert_false(kv_pages_drop(&p, page));
    assert_int_equal(p.n_idle, 1);
    kv_pages_hold(&p, page);
    assert_int_equal(p.n_idle, 0);
    assert_false(kv_pages_uncache(&p, page)); /* its holder keeps it */
    assert_int_equal(p.n_idle, 0);
    assert_true(kv_pages_drop(&p, page));
    assert_int_equal(p.n_free, 2);
    kv_pages_destroy(&p);
}

static void test_suspects_are_wiped_when_free(void **state)
{
    (void)state;
    kv_pages p;
    uint32_t page;
    n_wiped = 0;
    assert_int_equal(kv_pages_create(2, wipe, NULL, &p), CHOIR_OK);
    assert_true(kv_pages_take(&p, &page));
    kv_pages_hold(&p, page);
    kv_pages_suspect(&p, page);
    kv_pages_drop(&p, page);
    assert_int_equal(n_wiped, 0); /* somebody still reads it */
    kv_pages_drop(&p, page);
    assert_int_equal(n_wiped, 1);
    assert_int_equal(wiped[0], page);
    assert_true(kv_pages_take(&p, &page));
    kv_pages_drop(&p, page);
    assert_int_equal(n_wiped, 1);
    kv_pages_destroy(&p);
}

static void test_lack_of_memory(void **state)
{
    (void)state;
    for (uint64_t i = 1; i <= 2; i++) {
        kv_pages p;
        choir_memory_fail_at(i);
        assert_int_equal(kv_pages_create(4, wipe, NULL, &p), CHOIR_E_NO_MEMORY);
        choir_memory_fail_at(0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_page_once),
        cmocka_unit_test(test_idle_pages_are_counted),
        cmocka_unit_test(test_suspects_are_wiped_when_free),
        cmocka_unit_test(test_lack_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
