/* Requests with adapters over a simulated engine and the real pool: who waits, waits alone; an
 * answer is that of the adapters it began with, whatever is loaded, replaced or evicted beside it;
 * no KV is found by anybody whose adapters did not make it; pins and claims come back. FAULTS 9,
 * 13, 14, 28, 29. */
#include "tests/scheduler/house.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { VOCABULARY = 64 };

static const uint32_t prompt[N_PROMPT] = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18};

static choir_request request_of(const choir_request_adapter *adapters, uint32_t n)
{
    choir_request r = plain_request(prompt, N_PROMPT, 10, 3);
    r.ignore_eos = true;
    r.adapters = adapters;
    r.n_adapters = n;
    return r;
}

static void says(const char *part)
{
    if (strstr(choir_error_message(), part) == NULL)
        fail_msg("'%s' does not say '%s'", choir_error_message(), part);
}

/* -- waiting -- */

static void test_waits_alone(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    const toy_spec spec = {.seed = 1};
    const choir_request_adapter use = {"a", 1};
    choir_request r = request_of(&use, 1), base = request_of(NULL, 0);
    answer a = {0}, b = {0}, expected = alone(&r, &spec), plain = alone(&base, NULL);
    assert_false(same(&expected, &plain));
    add(&h, "a", spec);
    h.disk.held = true;
    choir_stream *first = submit(&h.w, &r), *second = submit(&h.w, &base);
    finish_one(&h, second, &b);
    assert_true(same(&b, &plain));
    assert_false(drain(first, &a) || a.started);
    choir_scheduler_stats t;
    choir_scheduler_get_stats(h.w.scheduler, &t);
    assert_true(t.n_fetching == 1 && t.n_waiting == 1 && t.adapters.n_loading == 1);
    assert_int_equal(t.adapters.n_pins, 0);
    fake_now += 70 * CHOIR_MS;
    h.disk.held = false;
    finish_one(&h, first, &a);
    assert_int_equal(a.status, CHOIR_OK);
    assert_true(same(&a, &expected));
    assert_int_equal(a.usage.adapter_ns, 70 * CHOIR_MS);
    choir_adapter_info info;
    assert_int_equal(choir_adapters_find(h.pool, "a", &info), CHOIR_OK);
    assert_true(info.n_waits == 1 && info.wait_ns == 70 * CHOIR_MS && info.n_requests == 1);
    answer again = ask(&h, &r); /* it is there */
    assert_true(same(&again, &expected) && again.usage.adapter_ns == 0);
    close_house(&h);
}

/* The load begins when the request joins the queue, though all slots are taken. */
static void test_loads_while_queued(void **state)
{
    (void)state;
    house h;
    choir_scheduler_options o = small_options();
    o.max_sequences = 1;
    open_house_with(&h, 128, o, ROOM, 0);
    add(&h, "a", (toy_spec){.seed = 1});
    const choir_request_adapter use = {"a", 1};
    choir_request r = request_of(&use, 1), base = request_of(NULL, 0);
    base.max_tokens = 40;
    answer a = {0}, b = {0};
    choir_stream *first = submit(&h.w, &base);
    choir_scheduler_tick(h.w.scheduler);
    choir_stream *second = submit(&h.w, &r);
    while (choir_adapters_work(h.pool))
        ;
    choir_adapter_info info;
    assert_int_equal(choir_adapters_find(h.pool, "a", &info), CHOIR_OK);
    assert_true(info.resident && info.n_claims == 1 && info.n_pins == 0);
    finish_one(&h, first, &b);
    finish_one(&h, second, &a);
    assert_true(a.status == CHOIR_OK && a.usage.adapter_ns == 0);
    close_house(&h);
}

/* FAULTS 13, 14: cancelled or too late while it waits for the disk: all is back at once. */
static void test_ends_while_waiting(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    add(&h, "b", (toy_spec){.seed = 2});
    h.disk.held = true;
    const choir_request_adapter use[] = {{"a", 0.5F}, {"b", 0.5F}};
    choir_request r = request_of(use, 2);
    r.n = 3;
    choir_stream *cancelled = submit(&h.w, &r);
    r.deadline_ns = fake_now + 50 * CHOIR_MS;
    choir_stream *late = submit(&h.w, &r);
    for (int i = 0; i < 5; i++) turn(&h);
    choir_stream_cancel(cancelled);
    choir_scheduler_tick(h.w.scheduler);
    answer a = {0}, b = {0};
    assert_true(drain(cancelled, &a));
    assert_int_equal(a.status, CHOIR_E_CANCELLED);
    choir_adapters_stats t;
    choir_adapters_get_stats(h.pool, &t);
    assert_int_equal(t.n_claims, 2);
    fake_now += 51 * CHOIR_MS;
    choir_scheduler_tick(h.w.scheduler);
    assert_true(drain(late, &b));
    assert_int_equal(b.status, CHOIR_E_DEADLINE);
    assert_no_claims(&h);
    assert_int_equal(h.w.engine->n_steps, 0);
    choir_stream_release(cancelled);
    choir_stream_release(late);
    h.disk.held = false;
    close_house(&h);
}

/* A load that fails ends who waits for it with its sentence, also before their turn; others go on.
 */
static void test_failed_load(void **state)
{
    (void)state;
    house h;
    choir_scheduler_options o = small_options();
    o.max_sequences = 1;
    open_house_with(&h, 128, o, ROOM, 0);
    add(&h, "bad", (toy_spec){.seed = 1, .spoiled = true});
    add(&h, "disk", (toy_spec){.seed = 2});
    const choir_request_adapter bad = {"bad", 1}, disk = {"disk", 1};
    choir_request base = request_of(NULL, 0), x = request_of(&bad, 1), y = request_of(&disk, 1);
    base.max_tokens = 60;
    answer a = {0}, b = {0}, c = {0};
    choir_stream *first = submit(&h.w, &base);
    turn(&h);
    choir_stream *second = submit(&h.w, &x);
    while (choir_adapters_work(h.pool))
        ;
    h.disk.fail_reads = 3;
    choir_stream *third = submit(&h.w, &y);
    while (choir_adapters_work(h.pool))
        ;
    choir_scheduler_tick(h.w.scheduler);
    assert_true(drain(second, &b) && drain(third, &c) && !drain(first, &a));
    assert_int_equal(b.status, CHOIR_E_PRECONDITION);
    assert_int_equal(c.status, CHOIR_E_UNAVAILABLE);
    finish_one(&h, first, &a);
    assert_int_equal(a.status, CHOIR_OK);
    choir_stream *none;
    assert_int_equal(choir_scheduler_submit(h.w.scheduler, &x, NULL, NULL, &none),
                     CHOIR_E_PRECONDITION);
    says("NaN");
    assert_int_equal(choir_scheduler_submit(h.w.scheduler, &y, NULL, NULL, &none),
                     CHOIR_E_UNAVAILABLE);
    fake_now += 31 * CHOIR_SECOND; /* it is tried again */
    const toy_spec spec = {.seed = 2};
    answer d = ask(&h, &y), expected = alone(&y, &spec);
    assert_true(same(&d, &expected));
    choir_stream_release(second);
    choir_stream_release(third);
    close_house(&h);
}

static void test_refusals(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    add(&h, "b", (toy_spec){.seed = 2});
    add(&h, "virtual", (toy_spec){.seed = 3, .n_virtual = 3});
    add(&h, "late", (toy_spec){.seed = 4, .n_invocation = 2, .invocation = {8, 9}});
    add(&h, "large", (toy_spec){.seed = 5, .bytes = ROOM});
    add(&h, "long", (toy_spec){.seed = 5, .n_virtual = 250});
    choir_request_adapter nine[9];
    for (int i = 0; i < 9; i++) nine[i] = (choir_request_adapter){"a", 1};
#define REFUSED(expected, sentence, ...)                                                           \
    do {                                                                                           \
        const choir_request_adapter uses[] = {__VA_ARGS__};                                        \
        choir_request r = request_of(uses, sizeof uses / sizeof *uses);                            \
        choir_stream *stream;                                                                      \
        assert_int_equal(choir_scheduler_submit(h.w.scheduler, &r, NULL, NULL, &stream),           \
                         expected);                                                                \
        says(sentence);                                                                            \
    } while (0)
    REFUSED(CHOIR_E_NOT_FOUND, "no adapter none", {"none", 1});
    REFUSED(CHOIR_E_NOT_FOUND, "no adapter none", {"a", 1}, {"none", 1});
    REFUSED(CHOIR_E_INVALID, "..", {"../a", 1});
    REFUSED(CHOIR_E_INVALID, "twice", {"a", 1}, {"a", 1});
    REFUSED(CHOIR_E_INVALID, "weight 9", {"a", 9});
    REFUSED(CHOIR_E_INVALID, "weight nan", {"a", (float)NAN});
    REFUSED(CHOIR_E_INVALID, "cannot be mixed", {"a", 1}, {"virtual", 1});
    REFUSED(CHOIR_E_INVALID, "cannot be mixed", {"virtual", 0.5F});
    REFUSED(CHOIR_E_INVALID, "different tokens", {"a", 1}, {"late", 1});
    REFUSED(CHOIR_E_INVALID, "must fit into 256", {"long", 1});
    REFUSED(CHOIR_E_FULL, "adapter large takes", {"large", 1});
    choir_request r = request_of(nine, 9);
    choir_stream *stream;
    assert_int_equal(choir_scheduler_submit(h.w.scheduler, &r, NULL, NULL, &stream),
                     CHOIR_E_INVALID);
    says("9 adapters, the limit is 8");
    assert_no_claims(&h);
    world w = make_world(32, small_options());
    r = request_of(nine, 1);
    assert_int_equal(choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &stream),
                     CHOIR_E_NOT_FOUND);
    says("this model has none");
    end_world(&w);
    close_house(&h);
}

/* Of some that is known only when they are there: by then as the request's end, later at once. */
static void test_sole(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    const toy_spec spec = {.seed = 1, .sole = true};
    add(&h, "sole", spec);
    add(&h, "a", (toy_spec){.seed = 2});
    const choir_request_adapter mix[] = {{"a", 1}, {"sole", 1}}, whole = {"sole", 1},
                                half = {"sole", 0.5F};
    choir_request m = request_of(mix, 2), w = request_of(&whole, 1), l = request_of(&half, 1);
    choir_stream *stream;
    answer x = ask(&h, &m), y = ask(&h, &w), want = alone(&w, &spec);
    assert_int_equal(x.status, CHOIR_E_INVALID);
    assert_true(same(&y, &want));
    assert_int_equal(choir_scheduler_submit(h.w.scheduler, &l, NULL, NULL, &stream),
                     CHOIR_E_INVALID);
    says("cannot be mixed");
    close_house(&h);
}

/* FAULTS 29 */
static void test_no_memory(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    add(&h, "v", (toy_spec){.seed = 2, .n_virtual = 9});
    for (int kind = 0; kind < 2; kind++) {
        const choir_request_adapter use = {kind == 0 ? "a" : "v", 1};
        choir_request r = request_of(&use, 1);
        bool done = false;
        r.n = 2;
        ask(&h, &r); /* so that it is in memory */
        for (uint64_t fail_at = 1; !done; fail_at++) {
            choir_stream *stream = NULL;
            answer a = {0};
            choir_memory_fail_at(fail_at);
            choir_status status = choir_scheduler_submit(h.w.scheduler, &r, NULL, NULL, &stream);
            for (int i = 0; status == CHOIR_OK && i < 5; i++) choir_scheduler_tick(h.w.scheduler);
            choir_memory_fail_at(0);
            if (status == CHOIR_OK) {
                finish_one(&h, stream, &a);
                status = a.status;
                done = status == CHOIR_OK;
            }
            if (!done) assert_int_equal(status, CHOIR_E_NO_MEMORY);
            assert_true(fail_at < 200);
            assert_no_claims(&h);
        }
    }
    close_house(&h);
}

/* -- what an answer is computed with -- */

static void test_mixes(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    const toy_spec specs[] = {{.seed = 1}, {.seed = 2}}, swapped[] = {{.seed = 2}, {.seed = 1}};
    add(&h, "a", specs[0]);
    add(&h, "b", specs[1]);
    const choir_request_adapter ab[] = {{"a", 0.25F}, {"b", 0.75F}},
                                ba[] = {{"b", 0.75F}, {"a", 0.25F}},
                                other[] = {{"a", 0.75F}, {"b", 0.25F}};
    choir_request r = request_of(ab, 2), s = request_of(ba, 2), t = request_of(other, 2);
    answer x = ask(&h, &r), y = ask(&h, &s), z = ask(&h, &t);
    answer expected = alone(&r, specs), third = alone(&t, specs), second = alone(&s, swapped);
    assert_true(same(&x, &expected) && same(&y, &expected) && same(&second, &expected));
    assert_int_equal(y.usage.cached_tokens, N_PROMPT / PAGE * PAGE); /* the order says nothing */
    assert_true(same(&z, &third) && !same(&z, &x));
    assert_int_equal(z.usage.cached_tokens, 0);
    close_house(&h);
}

/* Nobody finds KV that other adapters have made, nor the model's own; the same bytes under any name
 * or version do. */
static void test_keys(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    add(&h, "b", (toy_spec){.seed = 2});
    add(&h, "twin", (toy_spec){.seed = 1});
    const choir_request_adapter a = {"a", 1}, half = {"a", 0.5F}, b = {"b", 1}, twin = {"twin", 1};
    const uint32_t all = N_PROMPT / PAGE * PAGE;
    const struct {
        const choir_request_adapter *use;
        uint32_t cached;
    } asks[] = {{NULL, 0}, {&a, 0},   {&half, 0},   {&b, 0},     {NULL, all},
                {&a, all}, {&b, all}, {&half, all}, {&twin, all}};
    answer base = {0};
    for (size_t i = 0; i < sizeof asks / sizeof *asks; i++) {
        choir_request r = request_of(asks[i].use, asks[i].use != NULL);
        answer x = ask(&h, &r);
        assert_int_equal(x.status, CHOIR_OK);
        assert_int_equal(x.usage.cached_tokens, asks[i].cached);
        if (i == 0) base = x;
        if (i > 0) assert_int_equal(same(&x, &base), asks[i].use == NULL);
    }
    /* A reload under the same name: new weights find nothing, the old ones found again do. */
    choir_request r = request_of(&a, 1);
    toy_spec spec = {.seed = 9, .bytes = SIZE};
    toy_write(&h.folder, "a", &spec);
    assert_int_equal(load(&h, "a"), CHOIR_OK);
    answer x = ask(&h, &r), expected = alone(&r, &spec);
    assert_int_equal(x.usage.cached_tokens, 0);
    assert_true(same(&x, &expected));
    spec.seed = 1;
    toy_write(&h.folder, "a", &spec);
    assert_int_equal(load(&h, "a"), CHOIR_OK);
    x = ask(&h, &r);
    assert_int_equal(x.usage.cached_tokens, all);
    close_house(&h);
}

/* Who runs keeps its version, samples and preemption included; who waits gets the newest. */
static void test_versions(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    toy_spec one = {.seed = 1, .bytes = SIZE}, two = {.seed = 2, .bytes = SIZE};
    const choir_request_adapter use = {"a", 1};
    choir_request r = request_of(&use, 1);
    r.n = 2;
    r.max_tokens = 30;
    answer old = alone(&r, &one), new = alone(&r, &two), x = {0}, y = {0};
    add(&h, "a", one);
    choir_stream *runs = submit(&h.w, &r);
    while (!x.started) {
        turn(&h);
        drain(runs, &x);
    }
    toy_write(&h.folder, "a", &two);
    assert_int_equal(load(&h, "a"), CHOIR_OK);
    choir_adapters_work(h.pool);
    assert_int_equal(h.maker.n_live, 2);
    assert_int_equal(choir_adapters_unload(h.pool, "a"), CHOIR_OK);
    choir_adapters_work(h.pool);
    assert_int_equal(h.maker.n_live, 1);
    finish_one(&h, runs, &x);
    assert_true(same(&x, &old));
    choir_adapters_work(h.pool);
    assert_int_equal(h.maker.n_live, 0);
    /* It waits for the first, whose files are replaced before they are read. */
    toy_write(&h.folder, "a", &one);
    add(&h, "a", one);
    h.disk.held = true;
    choir_stream *waits = submit(&h.w, &r);
    turn(&h);
    toy_write(&h.folder, "a", &two);
    add(&h, "a", two);
    h.disk.held = false;
    finish_one(&h, waits, &y);
    assert_int_equal(y.status, CHOIR_OK);
    assert_true(same(&y, &new));
    close_house(&h);
}

static void test_preempted_keeps_its_pins(void **state)
{
    (void)state;
    house h;
    open_house_with(&h, 20, small_options(), 3 * SIZE + (16 << 10), 0); /* pages for about two */
    const toy_spec one = {.seed = 1}, two = {.seed = 2};
    const choir_request_adapter a = {"a", 1}, b = {"b", 1};
    choir_request x = request_of(&a, 1), y = request_of(&b, 1);
    x.max_tokens = y.max_tokens = 40;
    answer want_x = alone(&x, &one), want_y = alone(&y, &two), got[4] = {0};
    add(&h, "a", one);
    add(&h, "b", two);
    choir_stream *streams[4];
    for (int i = 0; i < 4; i++) streams[i] = submit(&h.w, i % 2 == 0 ? &x : &y);
    for (int i = 0; i < 4; i++) {
        finish_one(&h, streams[i], &got[i]);
        assert_true(same(&got[i], i % 2 == 0 ? &want_x : &want_y));
    }
    choir_scheduler_stats t;
    choir_scheduler_get_stats(h.w.scheduler, &t);
    assert_true(t.n_preempted > 0);
    close_house(&h);
}

/* -- aLoRA -- */

static void test_invocation(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    const toy_spec spec = {.seed = 1, .n_invocation = 2, .invocation = {40, 41}};
    add(&h, "late", spec);
    add(&h, "plain", (toy_spec){.seed = 1});
    /* The invocation stands at 5 and at 18: it acts from 18 on. */
    uint32_t tokens[30];
    for (uint32_t i = 0; i < 30; i++) tokens[i] = 4 + i;
    tokens[5] = tokens[18] = 40;
    tokens[6] = tokens[19] = 41;
    const choir_request_adapter use = {"late", 1}, plain = {"plain", 1};
    choir_request base = request_of(NULL, 0), late = request_of(&use, 1), p = request_of(&plain, 1);
    base.tokens = late.tokens = p.tokens = tokens;
    base.n_tokens = late.n_tokens = p.n_tokens = 30;
    answer want_base = alone(&base, NULL), want = alone(&late, &spec);
    assert_false(same(&want, &want_base));
    answer a = ask(&h, &base);
    assert_true(same(&a, &want_base));
    uint64_t rows = h.w.engine->n_tokens, adapted = h.w.engine->n_adapted;
    a = ask(&h, &late); /* four pages lie wholly below 18 */
    assert_int_equal(a.usage.cached_tokens, 16);
    assert_true(same(&a, &want));
    assert_int_equal(h.w.engine->n_tokens - rows, 30 - 16 + 9);
    assert_int_equal(h.w.engine->n_adapted - adapted, 30 - 18 + 9);
    a = ask(&h, &late);
    assert_int_equal(a.usage.cached_tokens, 28);
    assert_true(same(&a, &want));
    a = ask(&h, &base); /* and it left the model's own alone */
    assert_int_equal(a.usage.cached_tokens, 28);
    assert_true(same(&a, &want_base));
    a = ask(&h, &p);
    assert_int_equal(a.usage.cached_tokens, 0);
    /* The other way round: what it computed below is the model's. */
    for (uint32_t i = 0; i < 16; i++) tokens[i]++;
    a = ask(&h, &late);
    assert_int_equal(a.usage.cached_tokens, 0);
    a = ask(&h, &base);
    assert_int_equal(a.usage.cached_tokens, 16);
    close_house(&h);
}

/* Other prompts with the same invocation at other places, at the start and at the very end; and
 * without it. */
static void test_invocation_places(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    const toy_spec spec = {.seed = 1, .n_invocation = 2, .invocation = {40, 41}};
    add(&h, "late", spec);
    const choir_request_adapter use = {"late", 1};
    for (uint32_t at = 0; at <= 22; at++) {
        uint32_t tokens[23];
        for (uint32_t i = 0; i < 23; i++) tokens[i] = 4 + i;
        if (at < 22) tokens[at] = 40;
        if (at < 22) tokens[at + 1] = 41;
        if (at == 22) tokens[22] = 40; /* begun, and not whole */
        choir_request r = request_of(&use, 1), base = request_of(NULL, 0);
        r.tokens = base.tokens = tokens;
        r.n_tokens = base.n_tokens = 23;
        answer want = alone(&r, &spec), plain = alone(&base, NULL), a = ask(&h, &r);
        assert_true(same(&a, &want));
        assert_int_equal(same(&a, &plain), at == 22);
        a = ask(&h, &base);
        assert_true(same(&a, &plain));
        uint32_t shared = at == 22 ? 20 : at / PAGE * PAGE;
        assert_int_equal(a.usage.cached_tokens, shared);
        a = ask(&h, &r);
        assert_true(same(&a, &want));
        assert_int_equal(a.usage.cached_tokens, 20);
    }
    close_house(&h);
}

/* -- soft prompts -- */

static void test_virtual_tokens(void **state)
{
    (void)state;
    for (uint32_t n_virtual = 1; n_virtual <= 9; n_virtual++) {
        house h;
        open_house(&h);
        const toy_spec spec = {.seed = 1, .n_virtual = n_virtual};
        const choir_request_adapter use = {"v", 1};
        choir_request r = request_of(&use, 1), base = request_of(NULL, 0);
        r.n = 2;
        r.sampling.repetition_penalty = 1.5F; /* of what the user knows */
        answer want = alone(&r, &spec), plain = alone(&base, NULL);
        add(&h, "v", spec);
        answer a = ask(&h, &r);
        assert_true(same(&a, &want) && !same(&a, &plain));
        assert_int_equal(a.usage.prompt_tokens, N_PROMPT);
        assert_int_equal(a.usage.cached_tokens, 0);
        assert_int_equal(a.usage.output_tokens, 20);
        for (uint32_t i = 0; i < 10; i++) assert_true(a.tokens[0][i] < VOCABULARY);
        a = ask(&h, &r);
        assert_true(same(&a, &want));
        uint32_t pages = (n_virtual + N_PROMPT - 1) / PAGE * PAGE;
        assert_int_equal(a.usage.cached_tokens, pages - n_virtual);
        choir_scheduler_stats t;
        choir_scheduler_get_stats(h.w.scheduler, &t);
        assert_int_equal(t.n_prompt_tokens, 2 * N_PROMPT);
        a = ask(&h, &base);
        assert_true(same(&a, &plain) && a.usage.cached_tokens == 0);
        /* The context holds them too. */
        r.n = 1;
        r.max_tokens = 0;
        r.sampling.repetition_penalty = 1;
        a = ask(&h, &r);
        assert_int_equal(a.n[0], 256 - N_PROMPT - n_virtual);
        assert_int_equal(a.finish[0], CHOIR_FINISH_LENGTH);
        close_house(&h);
    }
}

/* Between submit and its turn the name gets a version with more virtual tokens, or with too many.
 */
static void test_virtual_tokens_change(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    const toy_spec one = {.seed = 1, .n_virtual = 2}, two = {.seed = 2, .n_virtual = 7};
    const choir_request_adapter use = {"v", 1};
    choir_request r = request_of(&use, 1);
    answer want = alone(&r, &two), a = {0}, b = {0};
    add(&h, "v", one);
    h.disk.held = true;
    choir_stream *stream = submit(&h.w, &r);
    turn(&h);
    add(&h, "v", two);
    h.disk.held = false;
    finish_one(&h, stream, &a);
    assert_true(same(&a, &want));
    h.disk.held = true;
    add(&h, "v", one);
    stream = submit(&h.w, &r);
    add(&h, "v", (toy_spec){.seed = 3, .n_virtual = 250});
    h.disk.held = false;
    finish_one(&h, stream, &b);
    assert_int_equal(b.status, CHOIR_E_INVALID);
    close_house(&h);
}

/* -- poison -- */

/* FAULTS 28: three poisoned requests, each DATA_LOSS with its KV wiped and forgotten; then the
 * version is out, until it is loaded anew. Mixes and weights are not the adapter's fault, and
 * neighbours go on. */
static void test_quarantine(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    choir_log_set_level(CHOIR_LOG_ERROR);
    add(&h, "bad", (toy_spec){.seed = 1, .poison = true});
    add(&h, "good", (toy_spec){.seed = 2});
    const toy_spec good_spec = {.seed = 2};
    const choir_request_adapter bad = {"bad", 1}, weighed = {"bad", 2}, good = {"good", 1},
                                mix[] = {{"bad", 1}, {"good", 1}};
    choir_request b = request_of(&bad, 1), g = request_of(&good, 1), w = request_of(&weighed, 1),
                  m = request_of(mix, 2);
    answer want = alone(&g, &good_spec);
    for (int i = 0; i < 5; i++) {
        answer x = ask(&h, &w), y = ask(&h, &m);
        assert_true(x.status == CHOIR_E_DATA_LOSS && y.status == CHOIR_E_DATA_LOSS);
    }
    for (int i = 0; i < 3; i++) {
        answer x = {0}, y = {0};
        choir_stream *poisoned = submit(&h.w, &b), *beside = submit(&h.w, &g);
        finish_one(&h, poisoned, &x);
        finish_one(&h, beside, &y);
        assert_int_equal(x.status, CHOIR_E_DATA_LOSS);
        assert_true(same(&y, &want));
    }
    choir_stream *stream;
    assert_int_equal(choir_scheduler_submit(h.w.scheduler, &b, NULL, NULL, &stream),
                     CHOIR_E_PRECONDITION);
    says("quarantined");
    answer y = ask(&h, &g);
    assert_true(same(&y, &want));
    choir_scheduler_stats t;
    choir_scheduler_get_stats(h.w.scheduler, &t);
    assert_int_equal(t.adapters.n_quarantined, 1);
    assert_int_equal(t.adapters.n_poisoned, 3);
    toy_spec healed = {.seed = 3, .bytes = SIZE};
    toy_write(&h.folder, "bad", &healed);
    assert_int_equal(load(&h, "bad"), CHOIR_OK);
    answer x = ask(&h, &b), expected = alone(&b, &healed);
    assert_true(same(&x, &expected));
    choir_log_set_level(CHOIR_LOG_INFO);
    close_house(&h);
}

/* Who waits while it is quarantined gets the sentence too. */
static void test_quarantine_while_waiting(void **state)
{
    (void)state;
    house h;
    choir_scheduler_options o = small_options();
    o.max_sequences = 1;
    open_house_with(&h, 128, o, ROOM, 0);
    choir_log_set_level(CHOIR_LOG_ERROR);
    add(&h, "bad", (toy_spec){.seed = 1, .poison = true});
    const choir_request_adapter bad = {"bad", 1};
    choir_request b = request_of(&bad, 1);
    choir_stream *streams[5];
    answer got[5] = {0};
    for (int i = 0; i < 5; i++) streams[i] = submit(&h.w, &b);
    for (int i = 0; i < 5; i++) finish_one(&h, streams[i], &got[i]);
    for (int i = 0; i < 5; i++)
        assert_int_equal(got[i].status, i < 3 ? CHOIR_E_DATA_LOSS : CHOIR_E_PRECONDITION);
    choir_log_set_level(CHOIR_LOG_INFO);
    close_house(&h);
}

/* -- memory -- */

/* Room for two, ten are asked for at once: all are served, in order, and nobody is overtaken for
 * ever. */
static void test_more_than_fit(void **state)
{
    (void)state;
    house h;
    open_house_with(&h, 128, small_options(), 3 * SIZE + (16 << 10), 0);
    char names[10][4];
    choir_request_adapter uses[10];
    choir_stream *streams[10];
    answer want[10], got[10] = {0};
    for (uint32_t i = 0; i < 10; i++) {
        snprintf(names[i], sizeof names[i], "a%u", i);
        uses[i] = (choir_request_adapter){names[i], 1};
        const toy_spec spec = {.seed = i};
        choir_request r = request_of(&uses[i], 1);
        want[i] = alone(&r, &spec);
        add(&h, names[i], spec);
    }
    for (uint32_t i = 0; i < 10; i++) {
        choir_request r = request_of(&uses[i], 1);
        fake_now += CHOIR_MS;
        streams[i] = submit(&h.w, &r);
    }
    for (uint32_t i = 0; i < 10; i++) {
        for (uint32_t j = i + 4; j < 10; j++) assert_false(drain(streams[j], &got[j]));
        finish_one(&h, streams[i], &got[i]);
        assert_true(same(&got[i], &want[i]));
    }
    assert_true(h.maker.most_live_bytes <= 3 * SIZE + (16 << 10));
    close_house(&h);
}

/* One wants a large adapter while small ones are asked for without end. */
static void test_large_one_is_not_starved(void **state)
{
    (void)state;
    house h;
    open_house_with(&h, 128, small_options(), 24 << 10, 0);
    add(&h, "small", (toy_spec){.seed = 1, .bytes = 4 << 10});
    add(&h, "large", (toy_spec){.seed = 2, .bytes = 8 << 10});
    const choir_request_adapter small = {"small", 1}, large = {"large", 1};
    choir_request s = request_of(&small, 1), l = request_of(&large, 1);
    choir_stream *streams[3] = {NULL}, *waits = NULL;
    answer got = {0}, a[3];
    uint32_t rounds = 0;
    for (; !got.done; rounds++) {
        assert_true(rounds < 500);
        for (uint32_t i = 0; i < 3; i++) {
            fake_now += CHOIR_MS;
            if (streams[i] == NULL) {
                a[i] = (answer){0};
                s.max_tokens = 5 + pick(20);
                streams[i] = submit(&h.w, &s);
            }
        }
        if (rounds == 20) waits = submit(&h.w, &l);
        turn(&h);
        for (uint32_t i = 0; i < 3; i++)
            if (drain(streams[i], &a[i])) {
                assert_int_equal(a[i].status, CHOIR_OK);
                choir_stream_release(streams[i]);
                streams[i] = NULL;
            }
        if (waits != NULL) drain(waits, &got);
    }
    assert_int_equal(got.status, CHOIR_OK);
    choir_stream_release(waits);
    for (uint32_t i = 0; i < 3; i++)
        if (streams[i] != NULL) finish_one(&h, streams[i], &a[i]);
    close_house(&h);
}

/* With streamed experts: adapters' memory grows with demand, as experts let go of it, and goes
 * back. */
static void test_share(void **state)
{
    (void)state;
    house h;
    open_house_with(&h, 128, small_options(), 512 << 10, 20 << 10);
    h.w.engine->slow_grants = 3;
    char names[6][4];
    choir_request_adapter uses[6];
    choir_stream *streams[6];
    answer got[6] = {0};
    for (uint32_t i = 0; i < 6; i++) {
        snprintf(names[i], sizeof names[i], "a%u", i);
        uses[i] = (choir_request_adapter){names[i], 1};
        add(&h, names[i], (toy_spec){.seed = i});
        choir_request r = request_of(&uses[i], 1);
        r.max_tokens = 60;
        streams[i] = submit(&h.w, &r);
    }
    uint64_t most = 0;
    for (uint32_t i = 0; i < 6; i++) {
        for (int t = 0; !drain(streams[i], &got[i]); t++) {
            assert_true(t < 1000);
            turn(&h);
            if (h.w.engine->adapter_bytes > most) most = h.w.engine->adapter_bytes;
        }
        assert_int_equal(got[i].status, CHOIR_OK);
        choir_stream_release(streams[i]);
    }
    assert_true(most > 6 * SIZE && most <= 512 << 10);
    assert_true(h.maker.most_live_bytes == 6 * SIZE);
    choir_request base = request_of(NULL, 0);
    base.max_tokens = 150;
    base.tokens = prompt;
    answer b = ask(&h, &base);
    assert_int_equal(b.status, CHOIR_OK);
    assert_int_equal(h.w.engine->adapter_bytes, 20 << 10);
    choir_adapters_stats t;
    choir_adapters_get_stats(h.pool, &t);
    assert_true(t.held_bytes <= 20 << 10 && t.n_resident > 0); /* the floor stays in use */
    close_house(&h);
}

static void test_warm_ticks_allocate_nothing(void **state)
{
    (void)state;
    house h;
    open_house(&h);
    add(&h, "a", (toy_spec){.seed = 1});
    add(&h, "b", (toy_spec){.seed = 2});
    const choir_request_adapter mix[] = {{"a", 0.5F}, {"b", 0.5F}};
    choir_stream *streams[4];
    answer a[4] = {0};
    for (uint32_t i = 0; i < 4; i++) {
        choir_request r = request_of(mix, i % 3);
        r.max_tokens = 120;
        streams[i] = submit(&h.w, &r);
    }
    for (int i = 0; i < 20; i++) turn(&h);
    uint64_t before = choir_memory_n_allocs();
    for (int i = 0; i < 50; i++) assert_true(choir_scheduler_tick(h.w.scheduler));
    assert_int_equal(choir_memory_n_allocs(), before);
    for (uint32_t i = 0; i < 4; i++) finish_one(&h, streams[i], &a[i]);
    close_house(&h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_waits_alone),
        cmocka_unit_test(test_loads_while_queued),
        cmocka_unit_test(test_ends_while_waiting),
        cmocka_unit_test(test_failed_load),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_sole),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_mixes),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_versions),
        cmocka_unit_test(test_preempted_keeps_its_pins),
        cmocka_unit_test(test_invocation),
        cmocka_unit_test(test_invocation_places),
        cmocka_unit_test(test_virtual_tokens),
        cmocka_unit_test(test_virtual_tokens_change),
        cmocka_unit_test(test_quarantine),
        cmocka_unit_test(test_quarantine_while_waiting),
        cmocka_unit_test(test_more_than_fit),
        cmocka_unit_test(test_large_one_is_not_starved),
        cmocka_unit_test(test_share),
        cmocka_unit_test(test_warm_ticks_allocate_nothing),
    };
    return cmocka_run_group_tests(tests, use_fake_clock, NULL);
}
