#include "base/page_cache.h"

#include "tests/base/test.h"

#include <string.h>

enum { PAGE = 4096 };

static size_t held(void)
{
    return choir_memory_bytes(CHOIR_MEM_ADAPTERS);
}

static void test_pages_come_back_as_they_were_given(void **state)
{
    (void)state;
    size_t before = held();
    choir_page_cache *c = choir_page_cache_create(CHOIR_MEM_ADAPTERS, 10 * PAGE);
    assert_non_null(c);
    uint8_t *a = choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, 3 * PAGE - 5),
            *b = choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, PAGE);
    assert_true(a != NULL && b != NULL);
    memset(a, 7, 3 * PAGE);
    choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, a, 3 * PAGE - 5);
    choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, b, PAGE);
    choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, NULL, PAGE);
    /* Of the same pages, whatever the bytes. */
    assert_ptr_equal(choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, 3 * PAGE), a);
    assert_true(a[0] == 7 && a[3 * PAGE - 1] == 7);
    /* Another size is another block. */
    uint8_t *other = choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, 2 * PAGE);
    assert_true(other != NULL && other != b);
    choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, other, 2 * PAGE);
    choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, a, 3 * PAGE);
    choir_page_cache_destroy(c);
    assert_int_equal(held(), before);
    choir_page_cache_destroy(NULL);
}

static void test_no_more_than_the_limit_is_kept(void **state)
{
    (void)state;
    choir_page_cache *c = choir_page_cache_create(CHOIR_MEM_ADAPTERS, 4 * PAGE);
    assert_non_null(c);
    size_t empty = held();
    uint8_t *p[3];
    for (int i = 0; i < 3; i++)
        p[i] = choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, (size_t)(i + 1) * PAGE);
    for (int i = 0; i < 3; i++) {
        assert_non_null(p[i]);
        p[i][0] = (uint8_t)i;
        choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, p[i], (size_t)(i + 1) * PAGE);
        assert_true(held() - empty <= 4 * PAGE + (size_t)(2 - i) * 3 * PAGE);
    }
    assert_int_equal(held() - empty, 3 * PAGE); /* the two older ones went */
    uint8_t *large = choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, 5 * PAGE);
    assert_non_null(large);
    choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, large, 5 * PAGE);
    assert_int_equal(held() - empty, 3 * PAGE);
    assert_ptr_equal(choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, 3 * PAGE), p[2]);
    choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, p[2], 3 * PAGE);
    /* Many small ones. */
    for (int i = 0; i < 2; i++) {
        uint8_t *many[100];
        for (int k = 0; k < 100; k++)
            assert_non_null(many[k] = choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, PAGE));
        for (int k = 0; k < 100; k++) choir_page_cache_give(c, CHOIR_MEM_ADAPTERS, many[k], PAGE);
        assert_int_equal(held() - empty, 4 * PAGE);
    }
    choir_page_cache_destroy(c);
}

static void test_no_memory_is_told(void **state)
{
    (void)state;
    choir_memory_fail_at(1);
    assert_null(choir_page_cache_create(CHOIR_MEM_ADAPTERS, PAGE));
    choir_page_cache *c = choir_page_cache_create(CHOIR_MEM_ADAPTERS, PAGE);
    assert_non_null(c);
    choir_memory_fail_at(1);
    assert_null(choir_page_cache_take(c, CHOIR_MEM_ADAPTERS, PAGE));
    choir_memory_fail_at(0);
    choir_page_cache_destroy(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pages_come_back_as_they_were_given),
        cmocka_unit_test(test_no_more_than_the_limit_is_kept),
        cmocka_unit_test(test_no_memory_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
