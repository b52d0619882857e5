#include "scheduler/prefix_cache.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

enum { N_PAGES = 8, PAGE_TOKENS = 4 };

static uint32_t n_wiped;
static void wipe(void *engine, uint32_t page)
{
    (void)engine, (void)page;
    n_wiped++;
}

typedef struct world {
    kv_pages pages;
    prefix_cache *cache;
} world;

static void make_world(world *w)
{
    n_wiped = 0;
    assert_int_equal(kv_pages_create(N_PAGES, wipe, NULL, &w->pages), CHOIR_OK);
    assert_int_equal(prefix_cache_create(&w->pages, PAGE_TOKENS, &w->cache), CHOIR_OK);
}

static void end_world(world *w)
{
    prefix_cache_destroy(w->cache);
    kv_pages_destroy(&w->pages);
}

/* A sequence of n full pages comes, is remembered and leaves, as the scheduler does it. */
static void remember(world *w, prefix_key root, const uint32_t *tokens, uint32_t n, uint32_t *pages)
{
    prefix_key parent = root;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t *t = tokens + i * PAGE_TOKENS;
        prefix_key key = prefix_child(parent, t, PAGE_TOKENS);
        if (!prefix_cache_find(w->cache, parent, key, t, &pages[i])) {
            assert_true(kv_pages_take(&w->pages, &pages[i]));
            prefix_cache_add(w->cache, parent, key, t, pages[i]);
        }
        parent = key;
    }
    for (uint32_t i = n; i-- > 0;) {
        prefix_cache_touch(w->cache, pages[i]);
        kv_pages_drop(&w->pages, pages[i]);
    }
}

static uint32_t count_hits(world *w, prefix_key root, const uint32_t *tokens, uint32_t n)
{
    prefix_key parent = root;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t *t = tokens + i * PAGE_TOKENS;
        prefix_key key = prefix_child(parent, t, PAGE_TOKENS);
        uint32_t page;
        if (!prefix_cache_find(w->cache, parent, key, t, &page)) return i;
        kv_pages_drop(&w->pages, page);
        parent = key;
    }
    return n;
}

static const uint32_t text[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};

static void test_keys_hold_all_that_made_the_page(void **state)
{
    (void)state;
    world w;
    uint32_t pages[3];
    make_world(&w);
    remember(&w, prefix_root(1, 2), text, 3, pages);
    assert_int_equal(count_hits(&w, prefix_root(1, 2), text, 3), 3);
    assert_int_equal(count_hits(&w, prefix_root(0, 2), text, 3), 0);     /* another tenant */
    assert_int_equal(count_hits(&w, prefix_root(1, 3), text, 3), 0);     /* another model */
    assert_int_equal(count_hits(&w, prefix_root(1, 2), text + 4, 2), 0); /* another place */
    end_world(&w);
}

/* A forged key must not give away other tokens' page. */
static void test_tokens_are_compared(void **state)
{
    (void)state;
    world w;
    uint32_t pages[1], page;
    const uint32_t other[] = {1, 2, 3, 5};
    make_world(&w);
    prefix_key root = prefix_root(0, 0), key = prefix_child(root, text, PAGE_TOKENS);
    remember(&w, root, text, 1, pages);
    assert_false(prefix_cache_find(w.cache, root, key, other, &page));
    assert_false(prefix_cache_find(w.cache, prefix_root(9, 9), key, text, &page));
    end_world(&w);
}

static void test_leaves_go_before_their_parents(void **state)
{
    (void)state;
    world w;
    uint32_t pages[3];
    make_world(&w);
    prefix_key root = prefix_root(0, 0);
    remember(&w, root, text, 3, pages);
    remember(&w, root, text + 8, 1, pages); /* newer: stays longest */
    for (uint32_t left = 3; left-- > 0;) {
        assert_true(prefix_cache_evict(w.cache));
        assert_int_equal(count_hits(&w, root, text, 3), left);
    }
    assert_int_equal(count_hits(&w, root, text + 8, 1), 1);
    assert_true(prefix_cache_evict(w.cache));
    assert_false(prefix_cache_evict(w.cache));
    assert_int_equal(w.pages.n_free, N_PAGES);
    end_world(&w);
}

static void test_held_pages_stay(void **state)
{
    (void)state;
    world w;
    uint32_t pages[1];
    make_world(&w);
    remember(&w, prefix_root(0, 0), text, 1, pages);
    kv_pages_hold(&w.pages, pages[0]);
    assert_false(prefix_cache_evict(w.cache));
    kv_pages_drop(&w.pages, pages[0]);
    assert_true(prefix_cache_evict(w.cache));
    end_world(&w);
}

/* What was computed from a bad page is bad too, whoever computed it. */
static void test_poison_takes_the_children(void **state)
{
    (void)state;
    world w;
    uint32_t pages[3], branch[3];
    const uint32_t other[] = {1, 2, 3, 4, 20, 21, 22, 23, 24, 25, 26, 27};
    make_world(&w);
    prefix_key root = prefix_root(0, 0);
    remember(&w, root, text, 3, pages);
    remember(&w, root, other, 3, branch);
    remember(&w, root, text + 4, 1, branch);
    prefix_cache_forget(w.cache, pages[0]);
    assert_int_equal(count_hits(&w, root, text, 3), 0);
    assert_int_equal(count_hits(&w, root, text + 4, 1), 1);
    assert_int_equal(n_wiped, 5);
    remember(&w, root, text, 1, pages); /* computed anew: its old children are not back */
    assert_int_equal(count_hits(&w, root, text, 3), 1);
    assert_int_equal(count_hits(&w, root, other, 3), 1);
    end_world(&w);
}

static void test_lack_of_memory(void **state)
{
    (void)state;
    kv_pages pages;
    assert_int_equal(kv_pages_create(N_PAGES, wipe, NULL, &pages), CHOIR_OK);
    for (uint64_t i = 1; i <= 4; i++) {
        prefix_cache *cache;
        choir_memory_fail_at(i);
        assert_int_equal(prefix_cache_create(&pages, PAGE_TOKENS, &cache), CHOIR_E_NO_MEMORY);
        choir_memory_fail_at(0);
    }
    kv_pages_destroy(&pages);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keys_hold_all_that_made_the_page),
        cmocka_unit_test(test_tokens_are_compared),
        cmocka_unit_test(test_leaves_go_before_their_parents),
        cmocka_unit_test(test_held_pages_stay),
        cmocka_unit_test(test_poison_takes_the_children),
        cmocka_unit_test(test_lack_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
