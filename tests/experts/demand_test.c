/* What a request gets from a disk that fails: short of bytes, wrong ones, none for a while. FAULTS
 * 1 to 4. */
#include "tests/experts/fake_disk.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 8 };

static const choir_expert_use all[N] = {{0, 1, 1}, {1, 1, 1}, {2, 1, 1}, {3, 1, 1},
                                        {4, 1, 1}, {5, 1, 1}, {6, 1, 1}, {7, 1, 1}};

static choir_experts_stats stats_of(const fake_store *f)
{
    choir_experts_stats s;
    choir_experts_get_stats(f->store, &s);
    return s;
}

static void test_each_is_read_once(void **state)
{
    (void)state;
    fake_store f;
    fake_store_create(&f, 2, N, 0, 1);
    f.disk.slowest_ns = CHOIR_MS;
    assert_int_equal(fake_run(&f, 0, all, N), N);
    assert_int_equal(fake_run(&f, 0, all, N), N);
    choir_experts_stats s = stats_of(&f);
    assert_int_equal(s.n_misses, N);
    assert_int_equal(s.n_hits, N);
    assert_int_equal(s.n_reads, N);
    assert_true(s.bytes_read >= N * 3000 && s.busy_ns > 0 && s.stall_ns > 0);
    assert_true(choir_experts_latency(&s, 0.5) > 0);
    assert_true(choir_experts_latency(&s, 0.99) < 2e-3);
    uint64_t n_timed = 0;
    for (int i = 0; i < CHOIR_LATENCY_BUCKETS; i++) n_timed += s.latency[i];
    assert_int_equal(n_timed, N);
    assert_true(s.latency_ns > 0 && s.latency_ns < 2 * N * CHOIR_MS);
    fake_store_destroy(&f);
}

/* More experts than slots: each still comes, once. */
static void test_fewer_slots_than_wanted(void **state)
{
    (void)state;
    for (uint32_t n_slots = 1; n_slots <= 3; n_slots++) {
        fake_store f;
        fake_store_create(&f, 1, N, n_slots, 2);
        f.disk.slowest_ns = CHOIR_MS;
        assert_int_equal(fake_run(&f, 0, all, N), N);
        assert_int_equal(stats_of(&f).n_reads, N);
        assert_true(f.disk.max_in_flight <= n_slots);
        fake_store_destroy(&f);
    }
}

/* FAULTS 1: an error is tried again; an expert that stays unreadable is lost for a while, alone. */
static void test_eio(void **state)
{
    (void)state;
    fake_store f;
    fake_store_create(&f, 1, N, 0, 3);
    f.disk.bad_from = 3 * 8192;
    f.disk.bad_to = 4 * 8192;
    assert_int_equal(fake_run(&f, 0, all, N), N - 1);
    assert_int_equal(f.n_missing, 1);
    assert_int_equal(f.missing[0].expert, 3);
    assert_int_equal(f.missing[0].status, CHOIR_E_DATA_LOSS);
    assert_int_equal(stats_of(&f).n_retries, 2);
    assert_int_equal(stats_of(&f).n_failed, 1);
    /* Left alone for a while, even once the disk is well … */
    uint64_t submitted = f.disk.n_submitted;
    f.disk.bad_to = 0;
    assert_int_equal(fake_run(&f, 0, all, N), N - 1);
    assert_int_equal(f.disk.n_submitted, submitted);
    /* … and then tried anew. */
    fake_now += 31 * CHOIR_SECOND;
    assert_int_equal(fake_run(&f, 0, all, N), N);
    fake_store_destroy(&f);
}

/* FAULTS 3: damage on the way is read again; damage on the disk is never handed out. */
static void test_damage(void **state)
{
    (void)state;
    fake_store f;
    uint32_t came = 0;
    fake_store_create(&f, 1, N, 4, 4);
    f.disk.damage_permille = 300;
    for (int i = 0; i < 50; i++) {
        came += fake_run(&f, 0, all, N);
        for (uint32_t m = 0; m < f.n_missing; m++)
            assert_int_equal(f.missing[m].status, CHOIR_E_DATA_LOSS);
        fake_now += 31 * CHOIR_SECOND;
    }
    assert_true(came > 45 * N && stats_of(&f).n_damaged > 50);
    f.disk.damage_permille = 0;
    f.disk.damaged_to = 8192;
    fake_now += 31 * CHOIR_SECOND;
    for (int i = 0; i < 3; i++) /* the first may still lie in a slot */
        fake_run(&f, 0, all, N);
    assert_int_equal(f.n_missing, 1);
    assert_int_equal(f.missing[0].expert, 0);
    fake_store_destroy(&f);
}

/* FAULTS 4: a disk that gives nothing keeps a request waiting for stall_ns and no longer; what
 * comes late is there for the next. */
static void test_stall(void **state)
{
    (void)state;
    fake_store f;
    const choir_expert_use one[] = {{0, 1, 1}}, two[] = {{0, 1, 1}, {1, 1, 1}};
    fake_store_create(&f, 1, N, 0, 5);
    assert_int_equal(fake_run(&f, 0, one, 1), 1);
    f.disk.stalled = true;
    uint64_t began = fake_now;
    assert_int_equal(fake_run(&f, 0, two, 2), 1);
    assert_int_equal(f.n_missing, 1);
    assert_int_equal(f.missing[0].status, CHOIR_E_UNAVAILABLE);
    assert_in_range(fake_now - began, CHOIR_SECOND, CHOIR_SECOND + CHOIR_MS);
    /* Who asks again does not wait again, and what is resident is given at once. */
    began = fake_now;
    assert_int_equal(fake_run(&f, 0, two, 2), 1);
    assert_int_equal(fake_now, began);
    assert_int_equal(stats_of(&f).n_late, 2);
    f.disk.stalled = false;
    fake_now += CHOIR_MS;
    assert_int_equal(fake_run(&f, 0, two, 2), 2);
    assert_int_equal(stats_of(&f).n_misses, 2);
    fake_store_destroy(&f);
}

/* A budget that shrinks gives memory back and goes on with fewer slots; one that grows takes it
 * again. */
static void test_budget_moves(void **state)
{
    (void)state;
    fake_store f;
    fake_store_create(&f, 4, N, 0, 6);
    for (uint32_t l = 0; l < 4; l++) fake_run(&f, l, all, N);
    uint64_t held = choir_experts_bytes(f.store);
    assert_int_equal(stats_of(&f).n_slots_used, 4 * N);
    uint64_t left = choir_experts_set_budget(f.store, held / 2);
    assert_true(left <= held / 2);
    for (uint32_t l = 0; l < 4; l++) assert_int_equal(fake_run(&f, l, all, N), N);
    assert_true(choir_experts_bytes(f.store) <= held / 2);
    choir_experts_set_budget(f.store, held);
    for (uint32_t l = 0; l < 4; l++) fake_run(&f, l, all, N);
    assert_int_equal(choir_experts_bytes(f.store), held);
    fake_store_destroy(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_is_read_once),
        cmocka_unit_test(test_fewer_slots_than_wanted),
        cmocka_unit_test(test_eio),
        cmocka_unit_test(test_damage),
        cmocka_unit_test(test_stall),
        cmocka_unit_test(test_budget_moves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
