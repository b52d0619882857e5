/* FAULTS 12: a reader that does not read costs others nothing and ends in time. */
#include "tests/scheduler/world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static const uint32_t prompt[] = {4, 5, 6};

/* Few tokens fill an outbox below the options' floor. */
static world make_small_outboxes(uint32_t n_pages, choir_scheduler_options o)
{
    world w = make_world(n_pages, o);
    w.scheduler->options.outbox_bytes = 2048;
    return w;
}

static choir_request long_request(uint64_t seed)
{
    choir_request r = plain_request(prompt, 3, 100, seed);
    r.ignore_eos = true;
    return r;
}

static void test_slow_readers_hold_no_slots(void **state)
{
    (void)state;
    choir_scheduler_options o = small_options();
    o.max_sequences = 2;
    world w = make_small_outboxes(128, o);
    choir_stream *slow[4];
    for (uint32_t i = 0; i < 4; i++) {
        choir_request r = long_request(i);
        slow[i] = submit(&w, &r);
    }
    choir_request r = long_request(9);
    answer quick = {0}, alone = run_alone(&r, NULL);
    finish(&w, submit(&w, &r), &quick);
    assert_int_equal(quick.status, CHOIR_OK);
    assert_memory_equal(quick.tokens, alone.tokens, sizeof alone.tokens);
    for (uint32_t i = 0; i < 4; i++) {
        answer a = {0};
        choir_request s = long_request(i);
        alone = run_alone(&s, NULL);
        finish(&w, slow[i], &a); /* it reads at last, and has lost nothing */
        assert_int_equal(a.status, CHOIR_OK);
        assert_memory_equal(a.tokens, alone.tokens, sizeof alone.tokens);
    }
    assert_quiet(&w);
    end_world(&w);
}

/* 26 pages of 4 hold one such request: whoever comes next takes the slow one's pages. */
static void test_slow_reader_without_pages_ends_in_time(void **state)
{
    (void)state;
    choir_scheduler_options o = small_options();
    world w = make_small_outboxes(26, o);
    choir_request r = long_request(1);
    choir_stream *slow = submit(&w, &r);
    uint64_t begin = fake_now;
    for (uint32_t i = 0; i < 10; i++) {
        answer a = {0};
        r = long_request(2 + i);
        finish(&w, submit(&w, &r), &a);
        assert_int_equal(a.status, CHOIR_OK);
        fake_now = begin + (uint64_t)o.slow_reader_ms * CHOIR_MS / 10 * (i + 1);
    }
    answer a = {0};
    choir_scheduler_tick(w.scheduler);
    finish(&w, slow, &a);
    assert_int_equal(a.status, CHOIR_E_CANCELLED);
    assert_int_equal(a.n[0], 1); /* it was not fed while nobody read */
    assert_true(a.usage.n_preemptions > 0);
    assert_quiet(&w);
    end_world(&w);
}

static void test_stream_outlives_scheduler(void **state)
{
    (void)state;
    world w = make_small_outboxes(128, small_options());
    choir_request r = long_request(1);
    choir_stream *stream = submit(&w, &r), *queued = submit(&w, &r);
    while (choir_scheduler_tick(w.scheduler))
        ;
    choir_stream *late = submit(&w, &r); /* no tick has seen it */
    end_world(&w);
    answer a = {0}, b = {0}, c = {0};
    assert_true(drain(stream, &a) && drain(queued, &b) && drain(late, &c));
    assert_int_equal(a.status, CHOIR_E_UNAVAILABLE);
    assert_int_equal(c.status, CHOIR_E_UNAVAILABLE);
    assert_true(a.n[0] > 0 && c.n[0] == 0);
    choir_stream_release(stream);
    choir_stream_release(queued);
    choir_stream_release(late);
}

static void test_no_memory_to_lend_a_record(void **state)
{
    (void)state;
    world w = make_world(128, small_options());
    choir_request r = long_request(1);
    choir_stream *stream = submit(&w, &r);
    choir_scheduler_tick(w.scheduler);
    choir_event e;
    assert_true(choir_stream_next(stream, &e));
    assert_int_equal(e.kind, CHOIR_EVENT_STARTED);
    choir_memory_fail_at(1);
    assert_false(choir_stream_next(stream, &e));
    choir_memory_fail_at(0);
    answer a = {.started = true};
    finish(&w, stream, &a);
    assert_int_equal(a.status, CHOIR_E_NO_MEMORY);
    assert_int_equal(a.n[0], 0); /* nothing after the hole */
    assert_quiet(&w);
    end_world(&w);
}

static uint32_t n_wakes;
static void count_wake(void *user)
{
    assert_ptr_equal(user, &n_wakes);
    n_wakes++;
}

static void test_wakes_and_release(void **state)
{
    (void)state;
    world w = make_world(128, small_options());
    choir_request r = long_request(1);
    choir_stream *stream;
    n_wakes = 0;
    assert_int_equal(choir_scheduler_submit(w.scheduler, &r, count_wake, &n_wakes, &stream),
                     CHOIR_OK);
    for (int i = 0; i < 5; i++) choir_scheduler_tick(w.scheduler);
    assert_int_equal(n_wakes, 5);
    choir_stream_release(stream); /* leaving cancels; nobody is woken after it */
    assert_quiet(&w);
    assert_int_equal(n_wakes, 5);
    end_world(&w);
}

static void test_logprobs(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    choir_request r = plain_request(prompt, 3, 4, 1);
    r.want_logprobs = r.ignore_eos = true;
    r.sampling.top_logprobs = 3;
    choir_stream *stream = submit(&w, &r);
    while (choir_scheduler_tick(w.scheduler))
        ;
    choir_event e;
    uint32_t n = 0;
    while (choir_stream_next(stream, &e)) {
        if (e.kind != CHOIR_EVENT_DELTA) continue;
        assert_non_null(e.logprobs);
        assert_int_equal(e.logprobs[0].token, e.tokens[0]);
        assert_int_equal(e.logprobs[0].n_top, 3);
        assert_true(e.logprobs[0].top_logprobs[0] >= e.logprobs[0].top_logprobs[2]);
        n++;
    }
    assert_int_equal(n, 4);
    choir_stream_release(stream);
    end_world(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_slow_readers_hold_no_slots),
        cmocka_unit_test(test_slow_reader_without_pages_ends_in_time),
        cmocka_unit_test(test_stream_outlives_scheduler),
        cmocka_unit_test(test_no_memory_to_lend_a_record),
        cmocka_unit_test(test_wakes_and_release),
        cmocka_unit_test(test_logprobs),
    };
    return cmocka_run_group_tests(tests, use_fake_clock, NULL);
}
