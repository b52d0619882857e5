/* Requests whose adapters are chosen for them, over a simulated engine and the real pool: they are
 * asked for by rank and a few at a time; the answer is that of a client who names the same; what
 * cannot be had is left out, and the stream says so; whoever ends before is not asked, and its
 * chooser comes back exactly once. FAULTS 13, 14, 29. */
#include "tests/scheduler/house.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { FAR = 1000 }; /* never asked */

/* Names what it was told to, and notes what it was shown and when. */
typedef struct toy_chooser {
    choir_choice choice;
    uint32_t n_asked, n_released, turn; /* turn: of all choosers' */
    float mean[SIMULATED_FEATURES];
    choir_prompt_features features;
} toy_chooser;

static uint32_t n_turns;

static const uint32_t prompt[N_PROMPT] = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18};

static void toy_choose(void *user, const choir_prompt_features *features, choir_choice *out)
{
    toy_chooser *t = user;
    assert_int_equal(t->n_released, 0);
    assert_int_equal(features->n, SIMULATED_FEATURES);
    assert_int_equal(out->n, 0);
    t->n_asked++;
    t->turn = n_turns++;
    t->features = *features;
    memcpy(t->mean, features->mean, sizeof t->mean);
    *out = t->choice;
}

static void toy_release(void *user)
{
    ((toy_chooser *)user)->n_released++;
}

static toy_chooser choosing(const choir_request_adapter *adapters, uint32_t n)
{
    toy_chooser t = {.choice = {.n = n}, .turn = FAR};
    for (uint32_t i = 0; i < n; i++) t.choice.adapters[i] = adapters[i];
    return t;
}

static choir_request request_of(const choir_request_adapter *adapters, uint32_t n)
{
    choir_request r = plain_request(prompt, N_PROMPT, 10, 3);
    r.ignore_eos = true;
    r.adapters = adapters;
    r.n_adapters = n;
    return r;
}

static choir_request open_request(toy_chooser *t)
{
    choir_request r = request_of(NULL, 0);
    r.chooser = (choir_chooser){toy_choose, toy_release, t, 1};
    return r;
}

static void assert_settled(const toy_chooser *t, uint32_t n_asked)
{
    assert_int_equal(t->n_asked, n_asked);
    assert_int_equal(t->n_released, 1);
}

static choir_scheduler_stats stats_of(const house *h)
{
    choir_scheduler_stats t;
    choir_scheduler_get_stats(h->w.scheduler, &t);
    return t;
}

/* -- the choice -- */

static void test_as_if_named(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    const toy_spec specs[] = {{.seed = 1}, {.seed = 2}}, virtual = {.seed = 3, .n_virtual = 5};
    add(&h, "a", specs[0]);
    add(&h, "b", specs[1]);
    add(&h, "v", virtual);
    const choir_request_adapter mix[] = {{"a", 0.25F}, {"b", 0.75F}}, v = {"v", 1};
    const struct {
        const choir_request_adapter *uses;
        uint32_t n;
        const toy_spec *specs;
        const char *with;
    } cases[] = {{NULL, 0, NULL, ""}, {mix, 2, specs, "a:0.25 b:0.75 "}, {&v, 1, &virtual, "v:1 "}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (uint32_t n = 1; n <= 3; n += 2) {
            toy_chooser t = choosing(cases[i].uses, cases[i].n);
            choir_request open = open_request(&t), named = request_of(cases[i].uses, cases[i].n);
            open.n = named.n = n;
            answer want = alone(&named, cases[i].specs), got = ask(&h, &open),
                   again = ask(&h, &named);
            assert_int_equal(got.status, CHOIR_OK);
            assert_true(same(&got, &want) && same(&again, &want));
            assert_string_equal(got.with, cases[i].with);
            assert_string_equal(again.with, cases[i].with);
            /* What was computed by the choice is found by who names it. */
            uint32_t n_virtual = cases[i].uses == &v ? 5 : 0;
            uint32_t all = (n_virtual + N_PROMPT - 1) / PAGE * PAGE - n_virtual;
            assert_int_equal(got.usage.cached_tokens, n == 1 ? 0 : all);
            assert_int_equal(again.usage.cached_tokens, all);
            assert_settled(&t, 1);
        }
    assert_int_equal(stats_of(&h).n_chosen, 6);
    assert_int_equal(stats_of(&h).n_fell_back, 0);
    close_house(&h);
}

static void test_features(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    uint32_t tokens[50];
    for (uint32_t i = 0; i < 50; i++) tokens[i] = 4 + i;
    for (uint32_t n = 1; n <= 50; n += 7) {
        toy_chooser t = choosing(NULL, 0);
        choir_request r = open_request(&t);
        r.tokens = tokens;
        r.n_tokens = n;
        r.chooser.n_blocks = n % (SIMULATED_BLOCKS + 1);
        answer a = ask(&h, &r);
        assert_int_equal(a.status, CHOIR_OK);
        uint32_t rows = n < SIMULATED_PROBE_TOKENS ? n : SIMULATED_PROBE_TOKENS;
        const float want[] = {(float)(4 + n - rows), (float)(3 + n), (float)rows,
                              (float)r.chooser.n_blocks};
        assert_memory_equal(t.mean, want, sizeof want);
        assert_int_equal(t.features.n_tokens, n);
        assert_true(t.features.gate_entropy == 0.5F);
    }
    close_house(&h);
}

/* A request that needs no choice never costs a probe. */
static void test_named_are_not_probed(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    const choir_request_adapter a = {"a", 1};
    choir_request named = request_of(&a, 1), base = request_of(NULL, 0);
    ask(&h, &named);
    ask(&h, &base);
    assert_int_equal(h.w.engine->n_probes, 0);
    close_house(&h);
}

/* -- whose turn it is -- */

/* 24 rows a step: one prompt of 14 a tick, two of 10, or one of more than all. The one that decodes
 * gets its token in every tick. */
static void test_turns(void **state)
{
    (void)state;
    static const int32_t priorities[] = {0, 5, 0, 9, 5};
    static const uint32_t order[] = {3, 1, 4, 0, 2};
    static const struct {
        uint32_t n_tokens, a_tick;
    } sizes[] = {{14, 1}, {10, 2}, {5, 4}, {28, 1}};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        house h;
        open_house(&h);
        uint32_t tokens[40];
        for (uint32_t i = 0; i < 40; i++) tokens[i] = 4 + i;
        choir_request decodes = request_of(NULL, 0);
        decodes.max_tokens = 40;
        decodes.priority = 10;
        answer d = {0}, got[5] = {0};
        choir_stream *running = submit(&h.w, &decodes), *streams[5];
        turn(&h);
        drain(running, &d);
        toy_chooser t[5];
        n_turns = 0;
        for (uint32_t i = 0; i < 5; i++) {
            t[i] = choosing(NULL, 0);
            choir_request r = open_request(&t[i]);
            r.tokens = tokens;
            r.n_tokens = sizes[k].n_tokens;
            r.priority = priorities[i];
            streams[i] = submit(&h.w, &r);
        }
        for (uint32_t tick = 1; n_turns < 5; tick++) {
            uint32_t before = d.n[0];
            turn(&h);
            drain(running, &d);
            assert_int_equal(d.n[0], before + 1);
            uint32_t wanted = tick * sizes[k].a_tick < 5 ? tick * sizes[k].a_tick : 5;
            assert_int_equal(n_turns, wanted);
            assert_int_equal(stats_of(&h).n_choosing, 5 - wanted);
            assert_true(stats_of(&h).n_waiting >= 5 - wanted);
        }
        for (uint32_t i = 0; i < 5; i++) assert_int_equal(t[order[i]].turn, i);
        for (uint32_t i = 0; i < 5; i++) finish_one(&h, streams[i], &got[i]);
        finish_one(&h, running, &d);
        close_house(&h);
    }
}

/* A prompt that does not fit beside those before it is not overtaken by one that would. */
static void test_large_one_is_not_overtaken(void **state)
{
    (void)state;
    static const uint32_t n_tokens[] = {10, 20, 4};
    house h;
    open_house(&h);
    toy_chooser t[3];
    choir_stream *streams[3];
    n_turns = 0;
    for (uint32_t i = 0; i < 3; i++) {
        static uint32_t tokens[20];
        for (uint32_t k = 0; k < 20; k++) tokens[k] = 4 + k;
        t[i] = choosing(NULL, 0);
        choir_request r = open_request(&t[i]);
        r.tokens = tokens;
        r.n_tokens = n_tokens[i];
        streams[i] = submit(&h.w, &r);
    }
    turn(&h);
    assert_int_equal(n_turns, 1);
    turn(&h);
    assert_int_equal(n_turns, 3); /* 24 rows */
    for (uint32_t i = 0; i < 3; i++) {
        answer a = {0};
        assert_int_equal(t[i].turn, i);
        finish_one(&h, streams[i], &a);
    }
    close_house(&h);
}

/* All slots are taken: it chooses all the same, and its adapter is read meanwhile. */
static void test_loads_while_queued(void **state)
{
    (void)state;
    house h;
    choir_scheduler_options o = small_options();
    o.max_sequences = 1;
    open_house_with(&h, 128, o, ROOM, 0);
    add(&h, "a", (toy_spec){.seed = 1});
    const choir_request_adapter use = {"a", 1};
    toy_chooser t = choosing(&use, 1);
    choir_request open = open_request(&t), base = request_of(NULL, 0);
    base.max_tokens = 40;
    answer a = {0}, b = {0};
    choir_stream *first = submit(&h.w, &base);
    choir_scheduler_tick(h.w.scheduler);
    choir_stream *second = submit(&h.w, &open);
    choir_scheduler_tick(h.w.scheduler);
    while (choir_adapters_work(h.pool))
        ;
    choir_adapter_info info;
    assert_int_equal(choir_adapters_find(h.pool, "a", &info), CHOIR_OK);
    assert_true(info.resident && info.n_claims == 1 && info.n_pins == 0);
    assert_settled(&t, 1);
    assert_int_equal(stats_of(&h).n_fetching, 1);
    finish_one(&h, first, &b);
    finish_one(&h, second, &a);
    assert_true(a.status == CHOIR_OK && a.usage.adapter_ns == 0);
    close_house(&h);
}

/* -- ends -- */

/* FAULTS 13, 14: behind others in rank, it has not been asked yet. */
static void test_ends_while_choosing(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    const choir_request_adapter use = {"a", 1};
    toy_chooser t[4];
    choir_stream *streams[4];
    answer got[4] = {0};
    for (uint32_t i = 0; i < 4; i++) {
        t[i] = choosing(&use, 1);
        choir_request r = open_request(&t[i]);
        r.n = 3;
        if (i == 3) r.deadline_ns = fake_now + 50 * CHOIR_MS;
        streams[i] = submit(&h.w, &r);
    }
    choir_stream_cancel(streams[1]); /* before any tick */
    choir_scheduler_tick(h.w.scheduler);
    assert_true(drain(streams[1], &got[1]));
    assert_int_equal(stats_of(&h).n_choosing, 2 * 3);
    choir_stream_cancel(streams[2]);
    fake_now += 51 * CHOIR_MS;
    choir_scheduler_tick(h.w.scheduler);
    assert_true(drain(streams[2], &got[2]) && drain(streams[3], &got[3]));
    assert_int_equal(got[1].status, CHOIR_E_CANCELLED);
    assert_int_equal(got[2].status, CHOIR_E_CANCELLED);
    assert_int_equal(got[3].status, CHOIR_E_DEADLINE);
    for (uint32_t i = 1; i < 4; i++) {
        assert_settled(&t[i], 0);
        choir_stream_release(streams[i]);
    }
    finish_one(&h, streams[0], &got[0]);
    assert_int_equal(got[0].status, CHOIR_OK);
    assert_settled(&t[0], 1);
    assert_int_equal(h.w.engine->n_probes, 1);
    close_house(&h);
}

/* Chosen, and not there yet. */
static void test_ends_while_fetching(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    h.disk.held = true;
    const choir_request_adapter use = {"a", 1};
    toy_chooser t = choosing(&use, 1);
    choir_request r = open_request(&t);
    choir_stream *stream = submit(&h.w, &r);
    for (int i = 0; i < 3; i++) turn(&h);
    assert_int_equal(stats_of(&h).n_fetching, 1);
    choir_stream_cancel(stream);
    choir_scheduler_tick(h.w.scheduler);
    answer a = {0};
    assert_true(drain(stream, &a));
    assert_int_equal(a.status, CHOIR_E_CANCELLED);
    assert_no_claims(&h);
    assert_settled(&t, 1);
    choir_stream_release(stream);
    h.disk.held = false;
    close_house(&h);
}

/* Draining refuses who comes; who chooses goes on. */
static void test_drain(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    const toy_spec spec = {.seed = 1};
    const choir_request_adapter use = {"a", 1};
    toy_chooser t[2] = {choosing(&use, 1), choosing(&use, 1)}, late = choosing(&use, 1);
    choir_request r[2] = {open_request(&t[0]), open_request(&t[1])}, x = open_request(&late),
                  named = request_of(&use, 1);
    choir_stream *streams[2] = {submit(&h.w, &r[0]), submit(&h.w, &r[1])}, *none;
    choir_scheduler_tick(h.w.scheduler);
    assert_int_equal(stats_of(&h).n_choosing, 1);
    choir_scheduler_drain(h.w.scheduler);
    assert_int_equal(choir_scheduler_submit(h.w.scheduler, &x, NULL, NULL, &none),
                     CHOIR_E_UNAVAILABLE);
    assert_int_equal(late.n_released, 0); /* it stays its caller's */
    answer want = alone(&named, &spec);
    for (int i = 0; i < 2; i++) {
        answer a = {0};
        finish_one(&h, streams[i], &a);
        assert_true(same(&a, &want));
        assert_settled(&t[i], 1);
    }
    close_house(&h);
}

/* With requests in every state before RUNNING, and one that no tick has seen. */
static void test_destroy(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    h.disk.held = true;
    const choir_request_adapter use = {"a", 1};
    toy_chooser t[4];
    choir_stream *streams[4];
    for (uint32_t i = 0; i < 4; i++) {
        t[i] = choosing(&use, 1);
        choir_request r = open_request(&t[i]);
        if (i == 3) turn(&h);
        streams[i] = submit(&h.w, &r);
    }
    choir_scheduler_destroy(h.w.scheduler);
    for (uint32_t i = 0; i < 4; i++) {
        answer a = {0};
        assert_true(drain(streams[i], &a));
        assert_int_equal(a.status, CHOIR_E_UNAVAILABLE);
        assert_settled(&t[i], i == 0);
        choir_stream_release(streams[i]);
    }
    h.disk.held = false;
    choir_scheduler_options o = small_options();
    const choir_step_engine step = simulated_step_engine(h.w.engine);
    o.manual = true;
    assert_int_equal(choir_scheduler_create(&step, &o, &h.w.scheduler), CHOIR_OK);
    close_house(&h);
}

/* Pages for about two: who gives its pages keeps its choice, and is not asked again. */
static void test_preempted_keeps_its_choice(void **state)
{
    (void)state;
    house h;
    open_house_with(&h, 20, small_options(), ROOM, 0);
    const toy_spec specs[] = {{.seed = 1}, {.seed = 2}};
    const choir_request_adapter uses[] = {{"a", 1}, {"b", 1}};
    add(&h, "a", specs[0]);
    add(&h, "b", specs[1]);
    toy_chooser t[4];
    choir_stream *streams[4];
    for (uint32_t i = 0; i < 4; i++) {
        t[i] = choosing(&uses[i % 2], 1);
        choir_request r = open_request(&t[i]);
        r.max_tokens = 40;
        streams[i] = submit(&h.w, &r);
    }
    for (uint32_t i = 0; i < 4; i++) {
        answer got = {0};
        choir_request named = request_of(&uses[i % 2], 1);
        named.max_tokens = 40;
        answer want = alone(&named, &specs[i % 2]);
        finish_one(&h, streams[i], &got);
        assert_true(same(&got, &want));
        assert_settled(&t[i], 1);
    }
    assert_true(stats_of(&h).n_preempted > 0);
    assert_int_equal(h.w.engine->n_probes, 4);
    close_house(&h);
}

/* -- what cannot be had -- */

static void check_fallback(house *h, const choir_request_adapter *uses, uint32_t n)
{
    choir_request base = request_of(NULL, 0);
    base.n = 2;
    answer want = alone(&base, NULL);
    toy_chooser t = choosing(uses, n);
    choir_request r = open_request(&t);
    r.n = 2;
    uint64_t before = stats_of(h).n_fell_back;
    answer got = ask(h, &r);
    if (got.status != CHOIR_OK) fail_msg("%s", choir_status_text(got.status));
    assert_true(same(&got, &want));
    assert_string_equal(got.with, "");
    assert_settled(&t, 1);
    assert_int_equal(stats_of(h).n_fell_back, before + 1);
    assert_no_claims(h);
}

static void test_falls_back(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    choir_log_set_level(CHOIR_LOG_ERROR);
    add(&h, "a", (toy_spec){.seed = 1});
    add(&h, "gone", (toy_spec){.seed = 2});
    add(&h, "spoiled", (toy_spec){.seed = 3, .spoiled = true});
    add(&h, "sole", (toy_spec){.seed = 4, .sole = true});
    add(&h, "long", (toy_spec){.seed = 5, .n_virtual = 250});
    add(&h, "large", (toy_spec){.seed = 6, .bytes = ROOM});
    assert_int_equal(choir_adapters_unload(h.pool, "gone"), CHOIR_OK);
#define FALLS_BACK(...)                                                                            \
    do {                                                                                           \
        const choir_request_adapter uses[] = {__VA_ARGS__};                                        \
        check_fallback(&h, uses, sizeof uses / sizeof *uses);                                      \
    } while (0)
    FALLS_BACK({"gone", 1});
    FALLS_BACK({"a", 0.5F}, {"gone", 0.5F}); /* the first was claimed already */
    FALLS_BACK({"../a", 1});
    FALLS_BACK({"a", (float)NAN});
    FALLS_BACK({"a", 1}, {"a", 1});
    FALLS_BACK({"long", 1});
    FALLS_BACK({"large", 1});
    FALLS_BACK({"spoiled", 1});        /* known when it was read … */
    FALLS_BACK({"spoiled", 1});        /* … and now from the start */
    FALLS_BACK({"a", 1}, {"sole", 1}); /* known when both are there */
    h.disk.fail_reads = 3;
    add(&h, "disk", (toy_spec){.seed = 7});
    FALLS_BACK({"disk", 1});
    choir_log_set_level(CHOIR_LOG_INFO);
    close_house(&h);
}

/* It vanishes while it waits for the disk: the version that was claimed is the request's. */
static void test_unloaded_while_fetching(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    const toy_spec spec = {.seed = 1};
    add(&h, "a", spec);
    h.disk.held = true;
    const choir_request_adapter use = {"a", 1};
    toy_chooser t = choosing(&use, 1);
    choir_request r = open_request(&t), named = request_of(&use, 1);
    answer got = {0}, want = alone(&named, &spec);
    choir_stream *stream = submit(&h.w, &r);
    turn(&h);
    assert_int_equal(choir_adapters_unload(h.pool, "a"), CHOIR_OK);
    h.disk.held = false;
    finish_one(&h, stream, &got);
    assert_true(same(&got, &want));
    assert_string_equal(got.with, "a:1 ");
    close_house(&h);
}

/* Nobody is asked about a prompt that cannot be looked at. */
static void test_failed_probe(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    const choir_request_adapter use = {"a", 1};
    static const choir_status failures[] = {CHOIR_E_DATA_LOSS, CHOIR_E_UNAVAILABLE};
    for (int i = 0; i < 2; i++) {
        h.w.engine->probe_status = failures[i];
        toy_chooser t = choosing(&use, 1);
        choir_request r = open_request(&t), base = request_of(NULL, 0);
        answer got = ask(&h, &r), want = alone(&base, NULL);
        assert_true(got.status == CHOIR_OK && same(&got, &want));
        assert_string_equal(got.with, "");
        assert_settled(&t, 0);
        assert_int_equal(stats_of(&h).n_fell_back, i + 1);
    }
    close_house(&h);
}

/* An adapter that poisons is the request's all the same: its end, and the adapter's quarantine.
 * Then it cannot be had. */
static void test_poison(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    choir_log_set_level(CHOIR_LOG_ERROR);
    add(&h, "bad", (toy_spec){.seed = 1, .poison = true});
    const choir_request_adapter bad = {"bad", 1};
    for (int i = 0; i < 3; i++) {
        toy_chooser t = choosing(&bad, 1);
        choir_request r = open_request(&t);
        answer a = ask(&h, &r);
        assert_int_equal(a.status, CHOIR_E_DATA_LOSS);
        assert_settled(&t, 1);
    }
    check_fallback(&h, &bad, 1);
    choir_log_set_level(CHOIR_LOG_INFO);
    close_house(&h);
}

/* An invocation that the prompt lacks: the model alone, as when the client names it. */
static void test_never_acts(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "late", (toy_spec){.seed = 1, .n_invocation = 2, .invocation = {40, 41}});
    const choir_request_adapter use = {"late", 1};
    toy_chooser t = choosing(&use, 1);
    choir_request r = open_request(&t), base = request_of(NULL, 0);
    answer got = ask(&h, &r), want = alone(&base, NULL);
    assert_true(same(&got, &want));
    assert_string_equal(got.with, "");
    assert_int_equal(stats_of(&h).n_fell_back, 0);
    close_house(&h);
}

/* -- limits and faults -- */

static void refused(choir_scheduler *s, const choir_request *r, choir_status expected,
                    const char *sentence)
{
    choir_stream *stream;
    assert_int_equal(choir_scheduler_submit(s, r, NULL, NULL, &stream), expected);
    if (strstr(choir_error_message(), sentence) == NULL)
        fail_msg("'%s' does not say '%s'", choir_error_message(), sentence);
}

static void test_refusals(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    const choir_request_adapter use = {"a", 1};
    toy_chooser t = choosing(NULL, 0);
    choir_request both = open_request(&t), deep = open_request(&t);
    both.adapters = &use;
    both.n_adapters = 1;
    deep.chooser.n_blocks = SIMULATED_BLOCKS + 1;
    refused(h.w.scheduler, &both, CHOIR_E_INVALID, "names adapter a");
    refused(h.w.scheduler, &deep, CHOIR_E_INVALID, "9 blocks, the model has 8");
    close_house(&h);
    simulated_engine *engine = simulated_engine_create(32);
    engine->no_probe = true;
    const choir_step_engine step = simulated_step_engine(engine);
    choir_scheduler_options o = small_options();
    choir_scheduler *s;
    o.manual = true;
    assert_int_equal(choir_scheduler_create(&step, &o, &s), CHOIR_OK);
    const choir_request open = open_request(&t);
    refused(s, &open, CHOIR_E_UNIMPLEMENTED, "no features");
    choir_scheduler_destroy(s);
    simulated_engine_destroy(engine);
    assert_true(t.n_released == 0 && t.n_asked == 0);
}

/* They count in the queue as others do. */
static void test_queue_is_bounded(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    toy_chooser t[17];
    choir_stream *streams[16];
    for (uint32_t i = 0; i < 17; i++) {
        t[i] = choosing(NULL, 0);
        choir_request r = open_request(&t[i]);
        if (i < 16)
            streams[i] = submit(&h.w, &r);
        else
            refused(h.w.scheduler, &r, CHOIR_E_FULL, "16 requests are waiting");
    }
    for (uint32_t i = 0; i < 16; i++) {
        answer a = {0};
        finish_one(&h, streams[i], &a);
        assert_int_equal(a.status, CHOIR_OK);
        assert_settled(&t[i], 1);
    }
    assert_int_equal(t[16].n_released, 0);
    close_house(&h);
}

/* A model without a pool of adapters may be asked; only the model alone can be chosen. */
static void test_without_a_pool(void **state)
{
    (void)state;
    world w = make_world(64, small_options());
    const choir_request_adapter use = {"a", 1};
    choir_request base = request_of(NULL, 0);
    answer want = run_alone(&base, NULL);
    for (uint32_t n = 0; n < 2; n++) {
        toy_chooser t = choosing(&use, n);
        choir_request r = open_request(&t);
        answer got = {0};
        finish(&w, submit(&w, &r), &got);
        assert_true(got.status == CHOIR_OK && same(&got, &want));
        assert_settled(&t, 1);
    }
    assert_quiet(&w);
    end_world(&w);
}

/* FAULTS 29: a request that was accepted gives its chooser back once, however it ends. Without
 * memory for a claim, the model answers alone. */
static void test_no_memory(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "v", (toy_spec){.seed = 2, .n_virtual = 9});
    const choir_request_adapter use = {"v", 1};
    toy_chooser warm = choosing(&use, 1);
    choir_request w = open_request(&warm);
    ask(&h, &w); /* so that it is in memory */
    bool done = false;
    for (uint64_t fail_at = 1; !done; fail_at++) {
        toy_chooser t = choosing(&use, 1);
        choir_request r = open_request(&t);
        choir_stream *stream = NULL;
        answer a = {0};
        r.n = 2;
        choir_memory_fail_at(fail_at);
        choir_status status = choir_scheduler_submit(h.w.scheduler, &r, NULL, NULL, &stream);
        for (int i = 0; status == CHOIR_OK && i < 5; i++) choir_scheduler_tick(h.w.scheduler);
        choir_memory_fail_at(0);
        if (status == CHOIR_OK) {
            finish_one(&h, stream, &a);
            status = a.status;
            assert_int_equal(t.n_released, 1);
            done = status == CHOIR_OK && strcmp(a.with, "v:1 ") == 0;
        } else {
            assert_int_equal(t.n_released, 0);
        }
        assert_true(status == CHOIR_OK || status == CHOIR_E_NO_MEMORY);
        assert_true(fail_at < 200);
        assert_no_claims(&h);
    }
    close_house(&h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_as_if_named),
        cmocka_unit_test(test_features),
        cmocka_unit_test(test_named_are_not_probed),
        cmocka_unit_test(test_turns),
        cmocka_unit_test(test_large_one_is_not_overtaken),
        cmocka_unit_test(test_loads_while_queued),
        cmocka_unit_test(test_ends_while_choosing),
        cmocka_unit_test(test_ends_while_fetching),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_destroy),
        cmocka_unit_test(test_preempted_keeps_its_choice),
        cmocka_unit_test(test_falls_back),
        cmocka_unit_test(test_unloaded_while_fetching),
        cmocka_unit_test(test_failed_probe),
        cmocka_unit_test(test_poison),
        cmocka_unit_test(test_never_acts),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_queue_is_bounded),
        cmocka_unit_test(test_without_a_pool),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, use_fake_clock, NULL);
}
