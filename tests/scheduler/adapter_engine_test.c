/* Adapters through the scheduler and the real engine, bit for bit: every adapter's answer alone is
 * its answer among all others, and behind a prefix hit; an aLoRA's is the same whether the model's
 * own KV was found or not. */
#include "scheduler/scheduler.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { PROMPT = 90, OUTPUT = 8, VOCAB = 288, PAGE = CHOIR_PAGE_TOKENS };

/* NULL: the model alone. The aLoRA's invocation is 17 5 9. */
static const char *const names[] = {NULL,
                                    "lora",
                                    "dora",
                                    "ia3",
                                    "ia3_outputs",
                                    "vera",
                                    "alora",
                                    "prompt_tuning",
                                    "prefix_tuning",
                                    "saved",
                                    "embeddings",
                                    "bottleneck_parallel",
                                    "bottleneck_series",
                                    "patterns"};
enum { N_NAMES = sizeof names / sizeof *names };

typedef struct answer {
    uint32_t tokens[OUTPUT], n;
    float logprobs[OUTPUT];
    choir_usage usage;
    choir_status status;
    bool done;
} answer;

typedef struct house {
    choir_engine *engine;
    choir_scheduler *scheduler;
} house;

static house open_house(bool prefix_cache, uint32_t budget)
{
    house h;
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = 2;
    o.max_rows = 256;
    o.kv_bytes = 16 << 20;
    o.adapter_bytes = 16 << 20;
    if (choir_engine_open("tests/fixtures/models/yarn", &o, &h.engine) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    const choir_engine_adapters_options a = {.folder = "tests/fixtures/adapters"};
    if (choir_engine_open_adapters(h.engine, &a) != CHOIR_OK) fail_msg("%s", choir_error_message());
    for (uint32_t i = 1; i < N_NAMES; i++) {
        const choir_adapter_load what = {.name = names[i], .path = names[i], .beneath = true};
        if (choir_adapters_register(choir_engine_adapters(h.engine), &what) != CHOIR_OK)
            fail_msg("%s", choir_error_message());
    }
    choir_scheduler_options so = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    so.manual = true;
    so.prefix_cache = prefix_cache;
    so.max_step_tokens = budget;
    const choir_step_engine step = choir_step_engine_of(h.engine);
    if (choir_scheduler_create(&step, &so, &h.scheduler) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return h;
}

static void close_house(house *h)
{
    choir_adapters_stats t;
    choir_adapters_get_stats(choir_engine_adapters(h->engine), &t);
    assert_true(t.n_pins == 0 && t.n_claims == 0);
    choir_scheduler_destroy(h->scheduler);
    choir_engine_close(h->engine);
}

/* Of a prompt with the invocation at `at`; 0: without. chooser: NULL, or who names `uses`. */
static choir_stream *submit_to(house *h, const choir_request_adapter *uses, uint32_t n, uint32_t at,
                               const choir_chooser *chooser)
{
    uint32_t tokens[PROMPT];
    for (uint32_t i = 0; i < PROMPT; i++) tokens[i] = 20 + i * 13 % 250;
    if (at > 0) memcpy(tokens + at, (const uint32_t[]){17, 5, 9}, 3 * sizeof *tokens);
    choir_request r = {.tokens = tokens,
                       .n_tokens = PROMPT,
                       .max_tokens = OUTPUT,
                       .n = 1,
                       .ignore_eos = true,
                       .want_logprobs = true,
                       .sampling = CHOIR_SAMPLING_DEFAULT,
                       .adapters = uses,
                       .n_adapters = n};
    r.sampling.temperature = 0;
    if (chooser != NULL) r.chooser = *chooser;
    choir_stream *stream;
    if (choir_scheduler_submit(h->scheduler, &r, NULL, NULL, &stream) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return stream;
}

static choir_stream *submit(house *h, const choir_request_adapter *uses, uint32_t n, uint32_t at)
{
    return submit_to(h, uses, n, at, NULL);
}

static bool drain(choir_stream *stream, answer *a)
{
    choir_event e;
    while (!a->done && choir_stream_next(stream, &e)) {
        for (uint32_t i = 0; e.kind == CHOIR_EVENT_DELTA && i < e.n_tokens; i++) {
            a->tokens[a->n] = e.tokens[i];
            a->logprobs[a->n++] = e.logprobs[i].logprob;
        }
        if (e.kind != CHOIR_EVENT_DONE) continue;
        a->done = true;
        a->status = e.status;
        a->usage = e.usage;
        if (e.status != CHOIR_OK) fail_msg("%s", e.message);
    }
    return a->done;
}

static void finish(house *h, choir_stream *stream, answer *a)
{
    for (int i = 0; !drain(stream, a); i++) {
        assert_true(i < 20000);
        if (!choir_scheduler_tick(h->scheduler)) usleep(500); /* the disk works */
    }
    choir_stream_release(stream);
}

static answer ask(house *h, const char *name, uint32_t at)
{
    const choir_request_adapter use = {name, 1};
    answer a = {0};
    finish(h, submit(h, &use, name != NULL, at), &a);
    return a;
}

static void assert_same(const answer *a, const answer *b)
{
    assert_int_equal(a->n, OUTPUT);
    assert_int_equal(b->n, OUTPUT);
    assert_memory_equal(a->tokens, b->tokens, sizeof a->tokens);
    assert_memory_equal(a->logprobs, b->logprobs, sizeof a->logprobs);
}

static bool differs(const answer *a, const answer *b)
{
    return memcmp(a->logprobs, b->logprobs, sizeof a->logprobs) != 0;
}

static void test_alone_and_together(void **state)
{
    (void)state;
    answer alone[N_NAMES];
    for (uint32_t i = 0; i < N_NAMES; i++) {
        house h = open_house(false, 256);
        alone[i] = ask(&h, names[i], 50);
        if (i > 0) assert_true(differs(&alone[i], &alone[0]));
        assert_int_equal(alone[i].usage.prompt_tokens, PROMPT);
        close_house(&h);
    }
    static const uint32_t budgets[] = {256, 48};
    for (int b = 0; b < 2; b++) {
        house h = open_house(true, budgets[b]);
        for (int round = 0; round < 2; round++) {
            answer got[N_NAMES] = {0};
            choir_stream *streams[N_NAMES];
            for (uint32_t i = 0; i < N_NAMES; i++) {
                const choir_request_adapter use = {names[i], 1};
                streams[i] = submit(&h, &use, names[i] != NULL, 50);
            }
            for (uint32_t i = 0; i < N_NAMES; i++) {
                finish(&h, streams[i], &got[i]);
                assert_same(&got[i], &alone[i]);
                if (round == 1) assert_true(got[i].usage.cached_tokens >= PAGE);
            }
        }
        close_house(&h);
    }
}

typedef struct choice {
    const char *name;
    float features[64];
    uint32_t n_features;
} choice;

static void choose(void *user, const choir_prompt_features *f, choir_choice *out)
{
    choice *c = user;
    assert_true(f->n <= 64);
    memcpy(c->features, f->mean, f->n * sizeof *f->mean);
    c->n_features = f->n;
    if (c->name != NULL) out->adapters[out->n++] = (choir_request_adapter){c->name, 1};
}

/* Each answer is that of who names the adapter, however the probes lie between others' steps; and
 * all see the same features of the same prompt. */
static void test_chosen(void **state)
{
    (void)state;
    answer alone[N_NAMES];
    house fresh = open_house(false, 256), h = open_house(true, 48);
    for (uint32_t i = 0; i < N_NAMES; i++) alone[i] = ask(&fresh, names[i], 50);
    close_house(&fresh);
    for (uint32_t n_blocks = 0; n_blocks < 4; n_blocks++) {
        answer got[N_NAMES] = {0};
        choir_stream *streams[N_NAMES];
        choice choices[N_NAMES];
        for (uint32_t i = 0; i < N_NAMES; i++) {
            choices[i] = (choice){.name = names[i]};
            const choir_chooser c = {choose, NULL, &choices[i], n_blocks};
            streams[i] = submit_to(&h, NULL, 0, 50, &c);
        }
        for (uint32_t i = 0; i < N_NAMES; i++) {
            finish(&h, streams[i], &got[i]);
            assert_same(&got[i], &alone[i]);
            assert_int_equal(choices[i].n_features, choir_engine_config(h.engine)->hidden);
            assert_memory_equal(choices[i].features, choices[0].features,
                                sizeof choices[0].features);
        }
    }
    close_house(&h);
}

/* The order in which a client names a mix says nothing. */
static void test_mix(void **state)
{
    (void)state;
    const choir_request_adapter ab[] = {{"lora", 0.75F}, {"vera", -0.5F}, {"dora", 0.5F}},
                                ba[] = {{"dora", 0.5F}, {"lora", 0.75F}, {"vera", -0.5F}};
    house h = open_house(false, 256);
    answer a = {0}, b = {0}, lora = ask(&h, "lora", 0);
    finish(&h, submit(&h, ab, 3, 0), &a);
    finish(&h, submit(&h, ba, 3, 0), &b);
    assert_same(&a, &b);
    assert_true(differs(&a, &lora));
    close_house(&h);
}

/* Base KV below the invocation is found, and changes no bit. */
static void test_alora(void **state)
{
    (void)state;
    static const uint32_t places[] = {0, 1, 31, 32, 33, 64, 70, 87};
    for (size_t p = 0; p < sizeof places / sizeof *places; p++) {
        uint32_t at = places[p];
        house fresh = open_house(false, 256);
        answer base = ask(&fresh, NULL, at), expected = ask(&fresh, "alora", at);
        close_house(&fresh);
        assert_int_equal(differs(&base, &expected), at > 0);
        house h = open_house(true, 256);
        answer first = ask(&h, NULL, at), second = ask(&h, "alora", at);
        assert_same(&first, &base);
        assert_same(&second, &expected);
        uint32_t shared = at == 0 ? (PROMPT - 1) / PAGE * PAGE : at / PAGE * PAGE;
        assert_int_equal(second.usage.cached_tokens, shared);
        answer third = ask(&h, "alora", at);
        assert_same(&third, &expected);
        assert_int_equal(third.usage.cached_tokens, (PROMPT - 1) / PAGE * PAGE);
        first = ask(&h, NULL, at);
        assert_same(&first, &base);
        close_house(&h);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alone_and_together),
        cmocka_unit_test(test_chosen),
        cmocka_unit_test(test_mix),
        cmocka_unit_test(test_alora),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
