/* The scheduler over a simulated engine with a fake clock: every request gets the tokens it gets
 * alone, whoever runs beside it; whatever happens, pages and requests come back. FAULTS 12 to 16,
 * 26 to 29. */
#include "tests/scheduler/world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_one_request(void **state)
{
    (void)state;
    const uint32_t tokens[] = {5, 6, 7, 8, 9, 10, 11};
    choir_request r = plain_request(tokens, 7, 20, 1);
    r.ignore_eos = true;
    answer a = run_alone(&r, NULL), b = run_alone(&r, NULL);
    assert_int_equal(a.status, CHOIR_OK);
    assert_int_equal(a.n[0], 20);
    assert_int_equal(a.finish[0], CHOIR_FINISH_LENGTH);
    assert_memory_equal(a.tokens[0], b.tokens[0], 20 * sizeof(uint32_t));
}

static void test_refusals(void **state)
{
    (void)state;
    world w = make_world(32, small_options());
    uint32_t tokens[200] = {0}, bad = 64;
    choir_stream *stream;
#define REFUSED(expected, change)                                                                  \
    do {                                                                                           \
        choir_request r = plain_request(tokens, 4, 4, 1);                                          \
        change;                                                                                    \
        assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &stream), expected);  \
        assert_true(strlen(choir_error_message()) > 10);                                           \
    } while (0)
    REFUSED(CHOIR_E_INVALID, r.n_tokens = 0);
    REFUSED(CHOIR_E_INVALID,
            r.n_tokens = 128); /* 32 pages of 4 hold 128, the answer needs one more */
    REFUSED(CHOIR_E_INVALID, r.tokens = &bad; r.n_tokens = 1);
    REFUSED(CHOIR_E_INVALID, r.n = 0);
    REFUSED(CHOIR_E_INVALID, r.n = 65);
    REFUSED(CHOIR_E_INVALID, r.n_stops = 17);
    REFUSED(CHOIR_E_INVALID, r.n_stop_ids = 65);
    REFUSED(CHOIR_E_INVALID, r.sampling.temperature = -1);
    const char *const stops[] = {""};
    REFUSED(CHOIR_E_INVALID, r.stops = stops; r.n_stops = 1);
    choir_scheduler_drain(w.scheduler);
    REFUSED(CHOIR_E_UNAVAILABLE, (void)0);
    assert_quiet(&w);
    end_world(&w);
}

static void test_queue_is_bounded(void **state)
{
    (void)state;
    world w = make_world(32, small_options());
    choir_stream *streams[17];
    const uint32_t tokens[] = {4, 5, 6};
    for (int i = 0; i < 17; i++) {
        choir_request r = plain_request(tokens, 3, 4, 1);
        choir_status want = i < 16 ? CHOIR_OK : CHOIR_E_FULL;
        assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &streams[i]), want);
    }
    assert_true(choir_scheduler_retry_ms(w.scheduler) >= 50);
    while (choir_scheduler_tick(w.scheduler))
        ;
    for (int i = 0; i < 16; i++) choir_stream_release(streams[i]);
    assert_quiet(&w);
    end_world(&w);
}

/* A second request with the same beginning finds it; another tenant's does not. */
static void test_prefix_cache(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    uint32_t tokens[30];
    for (uint32_t i = 0; i < 30; i++) tokens[i] = 4 + i;
    uint32_t cached[3];
    for (int i = 0; i < 3; i++) {
        choir_request r = plain_request(tokens, 30, 5, 9);
        r.cache_salt = i == 2;
        r.ignore_eos = true;
        answer a = {0}, alone = run_alone(&r, NULL);
        choir_stream *stream;
        assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &stream), CHOIR_OK);
        while (!drain(stream, &a)) choir_scheduler_tick(w.scheduler);
        choir_stream_release(stream);
        assert_memory_equal(a.tokens[0], alone.tokens[0], 5 * sizeof(uint32_t));
        cached[i] = a.usage.cached_tokens;
    }
    assert_int_equal(cached[0], 0);
    assert_int_equal(cached[1], 28);
    assert_int_equal(cached[2], 0);
    assert_quiet(&w);
    end_world(&w);
}

static void test_samples_share_the_prompt(void **state)
{
    (void)state;
    uint32_t tokens[23];
    for (uint32_t i = 0; i < 23; i++) tokens[i] = 4 + i;
    for (uint32_t n_prompt = 20; n_prompt <= 23; n_prompt++) {
        world w = make_world(64, small_options());
        choir_request r = plain_request(tokens, n_prompt, 6, 5);
        r.n = 4;
        r.ignore_eos = true;
        answer a = {0};
        choir_stream *stream;
        assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &stream), CHOIR_OK);
        while (!drain(stream, &a)) choir_scheduler_tick(w.scheduler);
        choir_stream_release(stream);
        /* The prompt once, its last token again for each further sample, then five inputs each. */
        assert_int_equal(w.engine->n_tokens, n_prompt + 3 + 4 * 5);
        for (uint32_t i = 0; i < 4; i++) assert_int_equal(a.n[i], 6);
        assert_true(memcmp(a.tokens[0], a.tokens[1], 6 * sizeof(uint32_t)) != 0);
        assert_quiet(&w);
        end_world(&w);
    }
}

/* FAULTS 28: the poisoned request ends, its pages are wiped and unknown; its neighbour goes on. */
static void test_poisoned_request(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    w.engine->poison = 60;
    uint32_t bad[] = {5, 6, 7, 8, 60, 9, 10, 11, 12}, good[] = {5, 6, 7, 8, 9, 10};
    choir_request r = plain_request(bad, 9, 8, 1), g = plain_request(good, 6, 8, 1);
    g.sampling.logit_bias = &(choir_logit_bias){60, -100};
    g.sampling.n_logit_bias = 1;
    answer a = {0}, b = {0};
    choir_stream *sa, *sb;
    assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &sa), CHOIR_OK);
    assert_int_equal(choir_scheduler_submit(w.scheduler, &g, NULL, NULL, &sb), CHOIR_OK);
    while (!drain(sa, &a) | !drain(sb, &b)) choir_scheduler_tick(w.scheduler);
    assert_int_equal(a.status, CHOIR_E_DATA_LOSS);
    assert_int_equal(b.status, CHOIR_OK);
    choir_stream_release(sa);
    choir_stream_release(sb);
    for (uint32_t i = 0; i < w.engine->n_pages * w.engine->page_tokens; i++)
        assert_true(w.engine->kv[i] != 61);
    assert_quiet(&w);
    end_world(&w);
}

/* FAULTS 4: who waits for an expert waits alone, until its deadline; it takes no token meanwhile.
 */
static void test_late_expert(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    uint32_t tokens[] = {5, 6, 7, 8, 9, 10};
    choir_request r = plain_request(tokens, 6, 8, 1);
    choir_scheduler_stats stats;
    answer a = {0}, wanted = run_alone(&r, NULL);
    w.engine->late_percent = 100;
    choir_stream *s = submit(&w, &r);
    for (int i = 0; i < 50; i++) assert_false(choir_scheduler_tick(w.scheduler)); /* no progress */
    assert_false(drain(s, &a));
    fake_now += 31 * CHOIR_SECOND;
    choir_scheduler_get_stats(w.scheduler, &stats);
    assert_false(stats.healthy);
    assert_true(stats.n_late >= 50);
    w.engine->late_percent = 0;
    finish(&w, s, &a);
    assert_int_equal(a.status, CHOIR_OK);
    assert_int_equal(a.n[0], wanted.n[0]);
    assert_memory_equal(a.tokens[0], wanted.tokens[0], a.n[0] * sizeof(uint32_t));
    choir_scheduler_get_stats(w.scheduler, &stats);
    assert_true(stats.healthy);
    w.engine->late_percent = 100;
    r.deadline_ns = choir_clock_now() + CHOIR_SECOND;
    s = submit(&w, &r);
    for (int i = 0; i < 5; i++) choir_scheduler_tick(w.scheduler);
    fake_now += 2 * CHOIR_SECOND;
    a = (answer){0};
    finish(&w, s, &a);
    assert_int_equal(a.status, CHOIR_E_DEADLINE);
    assert_quiet(&w);
    end_world(&w);
}

static void hang(void *user)
{
    world *w = user;
    choir_scheduler_stats stats;
    fake_now += 31 * CHOIR_SECOND; /* the step takes longer than stall_ms */
    choir_scheduler_get_stats(w->scheduler, &stats);
    assert_false(stats.healthy);
}

/* FAULTS 26, 27: a step that hangs is seen from outside; an idle scheduler is healthy for ever. */
static void test_watchdog(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    choir_scheduler_stats stats;
    fake_now += 3600 * CHOIR_SECOND;
    choir_scheduler_get_stats(w.scheduler, &stats);
    assert_true(stats.healthy);
    const uint32_t tokens[] = {4, 5, 6};
    choir_request r = plain_request(tokens, 3, 2, 1);
    choir_stream *stream;
    assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &stream), CHOIR_OK);
    choir_scheduler_tick(w.scheduler);
    w.engine->before_step = hang;
    w.engine->user = &w;
    choir_scheduler_tick(w.scheduler);
    w.engine->before_step = NULL;
    choir_scheduler_get_stats(w.scheduler, &stats);
    assert_true(stats.healthy);
    choir_stream_release(stream);
    assert_quiet(&w);
    end_world(&w);
}

/* FAULTS 12: the slow one pauses, the other finishes; after slow_reader_ms the slow one is ended.
 */
static void test_slow_reader(void **state)
{
    (void)state;
    choir_scheduler_options o = small_options();
    world w = make_world(128, o);
    w.scheduler->options.outbox_bytes = 2048; /* below the floor, so that few tokens fill it */
    const uint32_t tokens[] = {4, 5, 6};
    choir_request r = plain_request(tokens, 3, 100, 1), fast = plain_request(tokens, 3, 100, 2);
    r.ignore_eos = fast.ignore_eos = true;
    answer a = {0}, b = {0};
    choir_stream *slow, *quick;
    assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &slow), CHOIR_OK);
    assert_int_equal(choir_scheduler_submit(w.scheduler, &fast, NULL, NULL, &quick), CHOIR_OK);
    while (!drain(quick, &b)) choir_scheduler_tick(w.scheduler);
    choir_scheduler_stats stats;
    choir_scheduler_get_stats(w.scheduler, &stats);
    assert_int_equal(stats.n_paused, 1);
    assert_true(stats.healthy);
    fake_now += (uint64_t)o.slow_reader_ms * CHOIR_MS;
    choir_scheduler_tick(w.scheduler);
    while (!drain(slow, &a)) choir_scheduler_tick(w.scheduler);
    assert_int_equal(a.status, CHOIR_E_CANCELLED);
    choir_stream_release(slow);
    choir_stream_release(quick);
    assert_quiet(&w);
    end_world(&w);
}

static void test_warm_ticks_allocate_nothing(void **state)
{
    (void)state;
    world w = make_world(128, small_options());
    const uint32_t tokens[] = {4, 5, 6};
    choir_stream *streams[4];
    for (uint32_t i = 0; i < 4; i++) {
        choir_request r = plain_request(tokens, 3, 120, i);
        r.ignore_eos = true;
        assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &streams[i]),
                         CHOIR_OK);
    }
    for (int i = 0; i < 10; i++) choir_scheduler_tick(w.scheduler);
    uint64_t before = choir_memory_n_allocs();
    for (int i = 0; i < 100; i++) assert_true(choir_scheduler_tick(w.scheduler));
    assert_int_equal(choir_memory_n_allocs(), before);
    for (uint32_t i = 0; i < 4; i++) choir_stream_release(streams[i]);
    assert_quiet(&w);
    end_world(&w);
}

/* -- the simulation -------------------------------------------------------------------------------
 */

enum { N_SLOTS = 24, POISON = 60 };

typedef struct client {
    bool busy, reads, will_cancel;
    choir_stream *stream;
    choir_request request;
    uint32_t tokens[64];
    answer got;
    uint32_t cancel_in;
} client;

static void start_client(world *w, client *c, const uint32_t *common)
{
    *c = (client){.busy = true, .reads = pick(10) > 0};
    uint32_t n = 1 + pick(40), shared = pick(3) > 0 ? pick(n) : 0;
    for (uint32_t i = 0; i < n; i++) c->tokens[i] = i < shared ? common[i] : 4 + pick(50);
    c->request = plain_request(c->tokens, n, 1 + pick(40), pick(1000));
    if (pick(20) == 0) c->tokens[pick(n)] = POISON;
    c->request.n = pick(6) == 0 ? 1 + pick(3) : 1;
    c->request.priority = (int32_t)pick(3) - 1;
    c->request.cache_salt = pick(2);
    c->request.ignore_eos = pick(2) == 0;
    c->request.sampling.temperature = pick(3) == 0 ? 0 : 1;
    c->will_cancel = pick(5) == 0;
    c->cancel_in = pick(40);
    if (pick(8) == 0) c->request.deadline_ns = fake_now + pick(200) * CHOIR_MS;
    if (pick(16) == 0) choir_memory_fail_at(1 + pick(20));
    choir_status status = choir_scheduler_submit(w->scheduler, &c->request, NULL, NULL, &c->stream);
    choir_memory_fail_at(0);
    if (status != CHOIR_OK) {
        assert_true(status == CHOIR_E_FULL || status == CHOIR_E_NO_MEMORY);
        c->busy = false;
    }
}

static void check_answer(const client *c)
{
    const answer *a = &c->got;
    if (a->status == CHOIR_E_DATA_LOSS) { /* only with the poisonous token in its history */
        bool poisoned = false;
        for (size_t i = 0; i < c->request.n_tokens; i++) poisoned |= c->tokens[i] == POISON;
        for (uint32_t i = 0; i < c->request.n; i++)
            for (uint32_t t = 0; t < a->n[i]; t++) poisoned |= a->tokens[i][t] == POISON;
        assert_true(poisoned);
        return;
    }
    if (a->status != CHOIR_OK) {
        bool expected = (a->status == CHOIR_E_CANCELLED && (c->will_cancel || !c->reads)) ||
                        (a->status == CHOIR_E_DEADLINE && c->request.deadline_ns != 0) ||
                        a->status == CHOIR_E_NO_MEMORY;
        if (!expected) fail_msg("a request ended with %s", choir_status_text(a->status));
        return;
    }
    choir_request r = c->request;
    r.tokens = c->tokens;
    answer alone = run_alone(&r, NULL);
    for (uint32_t i = 0; i < r.n; i++) {
        assert_int_equal(a->n[i], alone.n[i]);
        assert_memory_equal(a->tokens[i], alone.tokens[i], a->n[i] * sizeof(uint32_t));
    }
}

static void simulate(uint64_t seed, uint32_t n_pages, uint32_t n_rounds, uint64_t *n_preempted)
{
    seed_random(seed);
    simulated_engine_shares = seed % 5 == 0;
    world w = make_world(n_pages, small_options());
    simulated_engine_shares = false;
    w.engine->poison = POISON;
    if (seed % 2 == 0) w.scheduler->options.outbox_bytes = 2048; /* readers are often too slow */
    if (seed % 3 == 0) w.engine->late_percent = 20;              /* experts are often late */
    w.engine->late_state = seed;
    static client clients[N_SLOTS];
    memset(clients, 0, sizeof clients);
    uint32_t common[64];
    for (uint32_t i = 0; i < 64; i++) common[i] = 4 + pick(50);
    for (uint32_t round = 0;; round++) {
        bool any = false;
        for (uint32_t i = 0; i < N_SLOTS; i++) {
            client *c = &clients[i];
            if (!c->busy && round < n_rounds && pick(4) == 0) start_client(&w, c, common);
            if (!c->busy) continue;
            any = true;
            if (c->will_cancel && c->cancel_in-- == 0) choir_stream_cancel(c->stream);
            if (!c->reads && round < n_rounds) continue;
            if (!drain(c->stream, &c->got)) continue;
            check_answer(c);
            choir_stream_release(c->stream);
            c->busy = false;
        }
        if (!any && round >= n_rounds) break;
        fake_now += pick(3) * CHOIR_MS;
        if (pick(16) == 0) choir_memory_fail_at(1 + pick(3));
        choir_scheduler_tick(w.scheduler);
        choir_memory_fail_at(0);
        assert_true(round < n_rounds + 20000); /* nobody starves */
    }
    choir_scheduler_stats stats;
    choir_scheduler_get_stats(w.scheduler, &stats);
    *n_preempted += stats.n_preempted;
    assert_quiet(&w);
    end_world(&w);
}

static uint64_t n_seeds = 40; /* the first argument, for long runs by hand */

static void test_simulation(void **state)
{
    (void)state;
    uint64_t n_preempted = 0;
    for (uint64_t seed = 1; seed <= n_seeds; seed++) {
        print_message("seed %llu\n", (unsigned long long)seed);
        simulate(seed, seed % 3 == 0 ? 400 : 24, 300, &n_preempted);
    }
    print_message("%llu preemptions\n", (unsigned long long)n_preempted);
    assert_true(n_preempted > 20);
}

int main(int argc, char **argv)
{
    if (argc > 1) n_seeds = strtoull(argv[1], NULL, 10);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_request),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_queue_is_bounded),
        cmocka_unit_test(test_prefix_cache),
        cmocka_unit_test(test_samples_share_the_prompt),
        cmocka_unit_test(test_poisoned_request),
        cmocka_unit_test(test_late_expert),
        cmocka_unit_test(test_watchdog),
        cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_warm_ticks_allocate_nothing),
        cmocka_unit_test(test_simulation),
    };
    return cmocka_run_group_tests(tests, use_fake_clock, NULL);
}
