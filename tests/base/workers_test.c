#include "base/workers.h"

#include "base/memory.h"
#include "tests/base/test.h"

#include <stdatomic.h>

enum { N = 1000 };

typedef struct job {
    choir_workers *workers;
    uint32_t seen[N];
    uint32_t first[256], second[256];
    atomic_uint calls;
} job;

static void mark_share(void *arg, uint32_t worker, uint32_t n_workers)
{
    job *j = arg;
    uint64_t begin, end;
    choir_share(N, 16, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) j->seen[i]++;
    atomic_fetch_add(&j->calls, 1);
}

static void test_every_item_once(void **state)
{
    (void)state;
    static const uint32_t counts[] = {1, 2, 3, 7, 16};
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
        job j = {0};
        assert_int_equal(choir_workers_create(counts[c], &j.workers), CHOIR_OK);
        assert_int_equal(choir_workers_count(j.workers), counts[c]);
        for (uint32_t round = 1; round <= 200; round++) {
            choir_workers_run(j.workers, mark_share, &j);
            for (int i = 0; i < N; i++) assert_int_equal(j.seen[i], round);
        }
        assert_int_equal(j.calls, 200 * counts[c]);
        choir_workers_destroy(j.workers);
    }
}

/* What every worker wrote before the barrier is read by all others behind it, twice over. */
static void meet(void *arg, uint32_t worker, uint32_t n_workers)
{
    job *j = arg;
    for (uint32_t round = 1; round <= 50; round++) {
        j->first[worker] = round;
        choir_workers_sync(j->workers);
        uint32_t sum = 0;
        for (uint32_t i = 0; i < n_workers; i++) sum += j->first[i];
        j->second[worker] = sum;
        choir_workers_sync(j->workers);
        for (uint32_t i = 0; i < n_workers; i++)
            if (j->second[i] != round * n_workers) atomic_fetch_add(&j->calls, 1);
        choir_workers_sync(j->workers);
    }
}

static void test_barriers_inside_a_run(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= 5; n++) {
        job j = {0};
        assert_int_equal(choir_workers_create(n, &j.workers), CHOIR_OK);
        choir_workers_run(j.workers, meet, &j);
        choir_workers_run(j.workers, meet, &j);
        assert_int_equal(j.calls, 0);
        choir_workers_destroy(j.workers);
    }
}

static void test_limits_and_lack_of_memory(void **state)
{
    (void)state;
    choir_workers *workers = NULL;
    assert_int_equal(choir_workers_create(0, &workers), CHOIR_E_INVALID);
    assert_int_equal(choir_workers_create(257, &workers), CHOIR_E_INVALID);
    ASSERT_SAYS("257");
    for (uint64_t i = 1;; i++) {
        choir_memory_fail_at(i);
        choir_status status = choir_workers_create(4, &workers);
        if (status == CHOIR_OK) break;
        assert_int_equal(status, CHOIR_E_NO_MEMORY);
        assert_in_range(i, 1, 50);
    }
    choir_memory_fail_at(0);
    choir_workers_destroy(workers);
    choir_workers_destroy(NULL);
}

static void test_shares_are_whole_and_grained(void **state)
{
    (void)state;
    for (uint64_t n = 0; n < 200; n += 7)
        for (uint32_t k = 1; k < 9; k++) {
            uint64_t at = 0, begin, end;
            for (uint32_t i = 0; i < k; i++) {
                choir_share(n, 16, i, k, &begin, &end);
                assert_int_equal(begin, at);
                assert_true(begin % 16 == 0 || begin == n);
                at = end;
            }
            assert_int_equal(at, n);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_item_once),
        cmocka_unit_test(test_barriers_inside_a_run),
        cmocka_unit_test(test_limits_and_lack_of_memory),
        cmocka_unit_test(test_shares_are_whole_and_grained),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
