#include "base/memory.h"

#include "tests/base/test.h"

static void test_tags_count_bytes(void **state)
{
    (void)state;
    size_t before = choir_memory_bytes(CHOIR_MEM_TUNE);
    char *p = choir_alloc(CHOIR_MEM_TUNE, 100);
    assert_non_null(p);
    assert_int_equal((uintptr_t)p % 16, 0);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_TUNE), before + 100);
    p = choir_realloc(CHOIR_MEM_TUNE, p, 1000);
    assert_non_null(p);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_TUNE), before + 1000);
    choir_free(p);
    choir_free(NULL);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_TUNE), before);
    for (int t = 0; t < CHOIR_MEM_N_TAGS; t++)
        assert_true(strlen(choir_memory_tag_text((choir_memory_tag)t)) > 1);
}

static void test_sizes_that_overflow_are_refused(void **state)
{
    (void)state;
    assert_null(choir_alloc(CHOIR_MEM_OTHER, SIZE_MAX));
    assert_null(choir_alloc(CHOIR_MEM_OTHER, SIZE_MAX - 8));
    assert_null(choir_calloc(CHOIR_MEM_OTHER, SIZE_MAX / 2, 3));
    assert_null(choir_alloc_pages(CHOIR_MEM_OTHER, SIZE_MAX - 5));
}

static void test_calloc_is_zero_and_strdup_copies(void **state)
{
    (void)state;
    uint32_t *p = choir_calloc(CHOIR_MEM_OTHER, 1000, sizeof *p);
    assert_non_null(p);
    for (int i = 0; i < 1000; i++) assert_int_equal(p[i], 0);
    choir_free(p);
    char *text = choir_strdup(CHOIR_MEM_OTHER, "abc");
    assert_string_equal(text, "abc");
    choir_free(text);
}

static void test_the_nth_call_fails_once(void **state)
{
    (void)state;
    choir_memory_fail_at(3);
    void *p[4];
    for (int i = 0; i < 4; i++) {
        p[i] = choir_alloc(CHOIR_MEM_OTHER, 8);
        assert_int_equal(p[i] == NULL, i == 2);
    }
    choir_memory_fail_at(1);
    assert_null(choir_realloc(CHOIR_MEM_OTHER, p[0], 64));
    for (int i = 0; i < 4; i++) choir_free(p[i]);
    choir_memory_fail_at(0);
}

static void test_pages_are_aligned_and_zero(void **state)
{
    (void)state;
    size_t before = choir_memory_bytes(CHOIR_MEM_KV), bytes = 5000000;
    uint8_t *p = choir_alloc_pages(CHOIR_MEM_KV, bytes);
    assert_non_null(p);
    assert_int_equal((uintptr_t)p % (2 << 20), 0);
    for (size_t i = 0; i < bytes; i += 4096) assert_int_equal(p[i], 0);
    assert_true(choir_memory_bytes(CHOIR_MEM_KV) >= before + bytes);
    choir_free_pages(CHOIR_MEM_KV, p, bytes);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_KV), before);
}

static void test_arena_keeps_its_chunks(void **state)
{
    (void)state;
    choir_arena *arena;
    size_t before = choir_memory_bytes(CHOIR_MEM_SCRATCH);
    assert_int_equal(choir_arena_create(CHOIR_MEM_SCRATCH, 1000, &arena), CHOIR_OK);
    for (int round = 0; round < 3; round++) {
        uint64_t calls = choir_memory_n_allocs();
        for (int i = 1; i < 100; i++) {
            uint8_t *p = choir_arena_alloc(arena, (size_t)i * 7);
            assert_non_null(p);
            assert_int_equal((uintptr_t)p % 64, 0);
            memset(p, i, (size_t)i * 7);
        }
        assert_non_null(choir_arena_alloc(arena, 100000));
        uint8_t *large = choir_arena_alloc(arena, 5000000); /* its chunk is of huge pages */
        assert_non_null(large);
        memset(large, round, 5000000);
        if (round > 0) assert_int_equal(choir_memory_n_allocs(), calls);
        assert_true(choir_arena_used(arena) > 100000);
        choir_arena_reset(arena);
        assert_int_equal(choir_arena_used(arena), 0);
    }
    assert_null(choir_arena_alloc(arena, SIZE_MAX - 10));
    choir_arena_destroy(arena);
    choir_arena_destroy(NULL);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_SCRATCH), before);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tags_count_bytes),
        cmocka_unit_test(test_sizes_that_overflow_are_refused),
        cmocka_unit_test(test_calloc_is_zero_and_strdup_copies),
        cmocka_unit_test(test_the_nth_call_fails_once),
        cmocka_unit_test(test_pages_are_aligned_and_zero),
        cmocka_unit_test(test_arena_keeps_its_chunks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
