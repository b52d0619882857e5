#include "tests/scheduler/world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

uint64_t fake_now;
static uint64_t random_state;

static uint64_t read_clock(void *user)
{
    (void)user;
    return fake_now;
}

int use_fake_clock(void **state)
{
    (void)state;
    fake_now = 1000 * CHOIR_SECOND;
    choir_clock_replace(read_clock, NULL);
    return 0;
}

void seed_random(uint64_t seed)
{
    random_state = seed;
}

uint32_t pick(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(random_state >> 33) % n;
}

choir_scheduler_options small_options(void)
{
    choir_scheduler_options o = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    o.max_sequences = 8;
    o.max_step_tokens = 24;
    o.max_queued = 16;
    return o;
}

world make_world_with(uint32_t n_pages, choir_scheduler_options options,
                      const choir_tokenizer *tokenizer)
{
    world w = {.engine = simulated_engine_create(n_pages)};
    choir_step_engine step = simulated_step_engine(w.engine);
    step.tokenizer = tokenizer;
    options.manual = true;
    assert_int_equal(choir_scheduler_create(&step, &options, &w.scheduler), CHOIR_OK);
    return w;
}

world make_world(uint32_t n_pages, choir_scheduler_options options)
{
    return make_world_with(n_pages, options, NULL);
}

void assert_quiet(world *w)
{
    choir_scheduler_stats stats;
    choir_scheduler_tick(w->scheduler);
    choir_scheduler_get_stats(w->scheduler, &stats);
    assert_int_equal(stats.n_running + stats.n_waiting + stats.n_paused, 0);
    assert_int_equal(stats.n_pages_free + stats.n_pages_cached, stats.n_pages);
    assert_true(choir_scheduler_idle(w->scheduler));
    assert_true(stats.healthy);
}

void end_world(world *w)
{
    choir_scheduler_destroy(w->scheduler);
    simulated_engine_destroy(w->engine);
}

static void take_delta(const choir_event *e, answer *a)
{
    assert_true(a->started && e->index < N_ANSWERS);
    uint32_t i = e->index;
    assert_true(a->n[i] + e->n_tokens <= MAX_TOKENS && a->text_bytes[i] + e->text_bytes < MAX_TEXT);
    for (uint32_t t = 0; t < e->n_tokens; t++) a->tokens[i][a->n[i]++] = e->tokens[t];
    if (e->text_bytes > 0) memcpy(a->text[i] + a->text_bytes[i], e->text, e->text_bytes);
    a->text_bytes[i] += e->text_bytes;
}

static void note_adapters(const choir_event *e, answer *a)
{
    size_t n = 0;
    for (uint32_t i = 0; i < e->n_adapters && n < sizeof a->with; i++)
        n += (size_t)snprintf(a->with + n, sizeof a->with - n, "%s:%g ", e->adapters[i].name,
                              (double)e->adapters[i].weight);
}

bool drain(choir_stream *stream, answer *a)
{
    choir_event e;
    while (!a->done && choir_stream_next(stream, &e)) {
        if (e.kind == CHOIR_EVENT_STARTED) {
            assert_false(a->started);
            a->started = true;
            note_adapters(&e, a);
        }
        if (e.kind == CHOIR_EVENT_DELTA) take_delta(&e, a);
        if (e.kind != CHOIR_EVENT_DONE) continue;
        a->done = true;
        a->status = e.status;
        a->usage = e.usage;
        uint32_t n = e.n_finish < N_ANSWERS ? e.n_finish : N_ANSWERS;
        memcpy(a->finish, e.finish, n * sizeof *e.finish);
        memcpy(a->stop_match, e.stop_match, n * sizeof *e.stop_match);
    }
    return a->done;
}

choir_request plain_request(const uint32_t *tokens, size_t n, uint32_t max_tokens, uint64_t seed)
{
    choir_request r = {.tokens = tokens,
                       .n_tokens = n,
                       .max_tokens = max_tokens,
                       .n = 1,
                       .sampling = CHOIR_SAMPLING_DEFAULT};
    r.sampling.seed = seed;
    return r;
}

choir_stream *submit(world *w, const choir_request *r)
{
    choir_stream *stream;
    assert_int_equal(choir_scheduler_submit(w->scheduler, r, NULL, NULL, &stream), CHOIR_OK);
    return stream;
}

void finish(world *w, choir_stream *stream, answer *a)
{
    while (!drain(stream, a)) choir_scheduler_tick(w->scheduler);
    choir_stream_release(stream);
}

answer run_alone(const choir_request *asked, const choir_tokenizer *tokenizer)
{
    choir_scheduler_options o = small_options();
    o.prefix_cache = false;
    world w = make_world_with(128, o, tokenizer);
    answer a = {0};
    choir_request r = *asked;
    r.deadline_ns = 0;
    finish(&w, submit(&w, &r), &a);
    assert_quiet(&w);
    end_world(&w);
    return a;
}
