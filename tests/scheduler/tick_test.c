/* Who gets rows and pages, and when. FAULTS 13, 14, 15, 26, 28. */
#include "tests/scheduler/world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static const uint32_t prompt[] = {4, 5, 6};

static choir_request request_of(uint32_t max_tokens, int32_t priority, uint64_t seed)
{
    choir_request r = plain_request(prompt, 3, max_tokens, seed);
    r.ignore_eos = true;
    r.priority = priority;
    return r;
}

/* Runs three requests through one slot and tells in which order they started. */
static void check_order(const int32_t *priorities, const uint64_t *after_s,
                        const uint32_t *expected)
{
    choir_scheduler_options o = small_options();
    o.max_sequences = 1;
    world w = make_world(64, o);
    choir_request r = request_of(4, 100, 1);
    choir_stream *first = submit(&w, &r), *streams[3];
    choir_scheduler_tick(w.scheduler);
    for (int i = 0; i < 3; i++) {
        r = request_of(4, priorities[i], 1);
        fake_now += after_s[i] * CHOIR_SECOND;
        streams[i] = submit(&w, &r);
    }
    answer a[3] = {0}, f = {0};
    uint32_t n = 0;
    while (!a[0].done || !a[1].done || !a[2].done) {
        choir_scheduler_tick(w.scheduler);
        for (uint32_t i = 0; i < 3; i++) {
            bool before = a[i].started;
            drain(streams[i], &a[i]);
            if (!before && a[i].started) assert_int_equal(expected[n++], i);
        }
    }
    finish(&w, first, &f);
    for (int i = 0; i < 3; i++) choir_stream_release(streams[i]);
    assert_quiet(&w);
    end_world(&w);
}

static void test_order_of_admission(void **state)
{
    (void)state;
    check_order((int32_t[]){0, 0, 0}, (uint64_t[]){0, 0, 0}, (uint32_t[]){0, 1, 2});
    check_order((int32_t[]){0, 2, 1}, (uint64_t[]){0, 0, 0}, (uint32_t[]){1, 2, 0});
    check_order((int32_t[]){0, 1, 5}, (uint64_t[]){0, 11, 0},
                (uint32_t[]){2, 0, 1}); /* it has aged */
    check_order((int32_t[]){INT32_MIN, INT32_MAX, 0}, (uint64_t[]){0, 0, 0}, (uint32_t[]){1, 2, 0});
}

/* 240 tokens of prompt in chunks: the one that decodes gets its token in every step. */
static void test_long_prefill_does_not_block_decode(void **state)
{
    (void)state;
    world w = make_world(128, small_options());
    uint32_t many[240];
    for (uint32_t i = 0; i < 240; i++) many[i] = 4 + i % 50;
    choir_request r = request_of(40, 0, 1), l = plain_request(many, 240, 2, 1);
    choir_stream *quick = submit(&w, &r);
    choir_scheduler_tick(w.scheduler);
    choir_stream *large = submit(&w, &l);
    answer a = {0}, b = {0};
    uint32_t n_steps = 0;
    drain(quick, &a);
    for (; !b.started; n_steps++) {
        uint32_t before = a.n[0];
        choir_scheduler_tick(w.scheduler);
        drain(quick, &a);
        drain(large, &b);
        assert_int_equal(a.n[0], before + 1);
    }
    assert_int_equal(n_steps, (240 + 22) / 23); /* 24 rows a step, one of them decodes */
    finish(&w, quick, &a);
    finish(&w, large, &b);
    assert_quiet(&w);
    end_world(&w);
}

static void test_deadlines(void **state)
{
    (void)state;
    choir_scheduler_options o = small_options();
    o.max_sequences = 1;
    world w = make_world(64, o);
    choir_request running = request_of(50, 0, 1), queued = request_of(50, 0, 2);
    running.deadline_ns = fake_now + 100 * CHOIR_MS;
    queued.deadline_ns = fake_now + 50 * CHOIR_MS;
    choir_stream *a = submit(&w, &running), *b = submit(&w, &queued);
    answer x = {0}, y = {0};
    choir_scheduler_tick(w.scheduler);
    uint64_t rows = w.engine->n_tokens;
    fake_now += 60 * CHOIR_MS;
    choir_scheduler_tick(w.scheduler);
    assert_true(drain(b, &y));
    assert_int_equal(y.status, CHOIR_E_DEADLINE);
    assert_int_equal(w.engine->n_tokens, rows + 1); /* no prefill for it */
    fake_now += 60 * CHOIR_MS;
    assert_false(choir_scheduler_tick(w.scheduler));
    assert_true(drain(a, &x));
    assert_int_equal(x.status, CHOIR_E_DEADLINE);
    choir_stream_release(a);
    choir_stream_release(b);
    assert_quiet(&w);
    end_world(&w);
}

/* A cancel after k ticks, whatever the request is doing then: everything is back one tick later. */
static void test_cancel_in_each_state(void **state)
{
    (void)state;
    uint32_t many[60];
    for (uint32_t i = 0; i < 60; i++) many[i] = 4 + i % 50;
    for (uint32_t k = 0; k < 20; k++)
        for (uint32_t n = 1; n <= 3; n++) {
            world w = make_world(64, small_options());
            choir_request r = plain_request(many, 60, 12, 1);
            r.n = n;
            r.ignore_eos = true;
            choir_stream *stream = submit(&w, &r);
            for (uint32_t i = 0; i < k; i++) choir_scheduler_tick(w.scheduler);
            choir_stream_cancel(stream);
            choir_scheduler_tick(w.scheduler);
            answer a = {0};
            assert_true(drain(stream, &a));
            assert_int_equal(a.status, k < 14 ? CHOIR_E_CANCELLED : a.status);
            choir_stream_release(stream);
            assert_quiet(&w);
            end_world(&w);
        }
}

/* 12 pages for two requests of 9 each: the newer and the lower in priority wait, with the same
 * tokens. */
static void test_preemption(void **state)
{
    (void)state;
    for (int newer_first = 0; newer_first < 2; newer_first++) {
        choir_scheduler_options o = small_options();
        o.prefix_cache = newer_first == 0;
        world w = make_world(12, o);
        choir_request r[2] = {request_of(30, 0, 1), request_of(30, newer_first, 2)};
        choir_stream *streams[2] = {submit(&w, &r[0]), submit(&w, &r[1])};
        answer a[2] = {0};
        for (int i = 0; i < 2; i++) finish(&w, streams[i], &a[i]);
        for (int i = 0; i < 2; i++) {
            answer alone = run_alone(&r[i], NULL);
            assert_int_equal(a[i].n[0], 30);
            assert_memory_equal(a[i].tokens, alone.tokens, sizeof alone.tokens);
        }
        assert_int_equal(a[newer_first].usage.n_preemptions, 0);
        assert_true(a[!newer_first].usage.n_preemptions > 0);
        assert_quiet(&w);
        end_world(&w);
    }
}

/* Long prompts are let in one after another as their pages are there, not all at once to throw each
 * other out. */
static void test_admission_counts_what_is_promised(void **state)
{
    (void)state;
    world w = make_world(46, small_options());
    uint32_t many[4][60];
    choir_stream *streams[4];
    for (uint32_t i = 0; i < 4; i++) {
        for (uint32_t t = 0; t < 60; t++) many[i][t] = 4 + (t + 7 * i) % 50;
        choir_request r = plain_request(many[i], 60, 20, i);
        r.ignore_eos = true;
        streams[i] = submit(&w, &r);
    }
    for (uint32_t i = 0; i < 4; i++) {
        answer a = {0};
        finish(&w, streams[i], &a);
        assert_int_equal(a.status, CHOIR_OK);
        assert_int_equal(a.usage.n_preemptions, 0);
    }
    assert_quiet(&w);
    end_world(&w);
}

/* When the cache must give pages, a conversation loses its end first: its beginning is still found.
 */
static void test_eviction_spares_the_beginning(void **state)
{
    (void)state;
    world w = make_world(20, small_options());
    uint32_t first[41], second[41];
    for (uint32_t i = 0; i < 41; i++) first[i] = 4 + i, second[i] = 50 - i;
    const choir_request a = plain_request(first, 41, 1, 1), b = plain_request(second, 41, 1, 1);
    answer x = {0}, y = {0}, z = {0};
    finish(&w, submit(&w, &a), &x);
    finish(&w, submit(&w, &b), &y);
    finish(&w, submit(&w, &a), &z);
    assert_int_equal(z.usage.cached_tokens, 36); /* 20 pages: 11 for the second, 9 are left */
    assert_quiet(&w);
    end_world(&w);
}

static void look_healthy(void *user)
{
    choir_scheduler_stats stats;
    choir_scheduler_get_stats(((world *)user)->scheduler, &stats);
    assert_true(stats.healthy);
}

static void test_health_after_a_long_idle_time(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    choir_request r = request_of(3, 0, 1);
    w.engine->before_step = look_healthy;
    w.engine->user = &w;
    for (int i = 0; i < 3; i++) {
        fake_now += 3600 * CHOIR_SECOND;
        choir_stream *stream = submit(&w, &r);
        look_healthy(&w);
        answer a = {0};
        finish(&w, stream, &a);
    }
    choir_stream *stream = submit(&w, &r);
    fake_now += 31 * CHOIR_SECOND; /* nobody ticks: the engine thread hangs */
    choir_scheduler_stats stats;
    choir_scheduler_get_stats(w.scheduler, &stats);
    assert_false(stats.healthy);
    w.engine->before_step = NULL;
    answer a = {0};
    finish(&w, stream, &a);
    assert_quiet(&w);
    end_world(&w);
}

/* A step that fails whole is a bug: its requests end with its sentence, others and later ones live.
 */
static void test_failed_step(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    choir_request r = request_of(5, 0, 1);
    choir_stream *stream = submit(&w, &r);
    choir_scheduler_tick(w.scheduler);
    w.engine->fail_steps = 1;
    answer a = {0}, b = {0}, alone = run_alone(&r, NULL);
    finish(&w, stream, &a);
    assert_int_equal(a.status, CHOIR_E_INTERNAL);
    assert_int_equal(a.finish[0], CHOIR_FINISH_ERROR);
    finish(&w, submit(&w, &r), &b);
    assert_memory_equal(b.tokens, alone.tokens, sizeof alone.tokens);
    assert_quiet(&w);
    end_world(&w);
}

/* The poison lies in pages that the cache gave to another: both end, nobody gets them later. */
static void test_poison_is_not_cached(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    w.engine->poison = 60;
    uint32_t tokens[20];
    for (uint32_t i = 0; i < 20; i++) tokens[i] = 10 + i;
    tokens[2] = 60;
    for (int i = 0; i < 2; i++) {
        choir_request r = plain_request(tokens, 20, 8, 1);
        answer a = {0};
        finish(&w, submit(&w, &r), &a);
        assert_int_equal(a.status, CHOIR_E_DATA_LOSS);
        assert_int_equal(a.usage.cached_tokens, 0);
        assert_quiet(&w);
        for (uint32_t k = 0; k < w.engine->n_pages * w.engine->page_tokens; k++)
            assert_int_equal(w.engine->kv[k], 0);
    }
    end_world(&w);
}

/* A long context takes memory from the experts, and gives it back some time after it has ended. */
static void test_pages_are_taken_and_given_back(void **state)
{
    (void)state;
    simulated_engine_shares = true;
    world w = make_world(64, small_options());
    simulated_engine_shares = false;
    assert_int_equal(w.engine->allowed, SIMULATED_KV_FLOOR);
    uint32_t tokens[160];
    for (uint32_t i = 0; i < 160; i++) tokens[i] = 4 + i % 50;
    choir_request r = plain_request(tokens, 160, 8, 1),
                  small = plain_request(tokens + 3, 5, 100, 2);
    r.ignore_eos = small.ignore_eos = true;
    answer a = {0}, b = {0};
    choir_stream *s = submit(&w, &r);
    finish(&w, s, &a);
    assert_int_equal(a.status, CHOIR_OK);
    assert_true(w.engine->most_allowed >= 42);
    assert_true(w.engine->allowed >= 42); /* not at once */
    s = submit(&w, &small);
    finish(&w, s, &b);
    assert_int_equal(b.status, CHOIR_OK);
    assert_true(w.engine->n_forgotten > 20);
    assert_true(w.engine->allowed < 40);
    assert_quiet(&w);
    end_world(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order_of_admission),
        cmocka_unit_test(test_long_prefill_does_not_block_decode),
        cmocka_unit_test(test_deadlines),
        cmocka_unit_test(test_cancel_in_each_state),
        cmocka_unit_test(test_preemption),
        cmocka_unit_test(test_admission_counts_what_is_promised),
        cmocka_unit_test(test_eviction_spares_the_beginning),
        cmocka_unit_test(test_health_after_a_long_idle_time),
        cmocka_unit_test(test_failed_step),
        cmocka_unit_test(test_poison_is_not_cached),
        cmocka_unit_test(test_pages_are_taken_and_given_back),
    };
    return cmocka_run_group_tests(tests, use_fake_clock, NULL);
}
