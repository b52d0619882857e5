/* Batch invariance through the scheduler and the real engine, bit for bit: a request alone; the
 * same one among others that join and leave; with 1 and 2 threads; chunked at other budgets; behind
 * a prefix hit; preempted for lack of pages. Tokens, logprobs and alternatives must be the same. */
#include "scheduler/scheduler.h"
#include "tests/support/smol_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N_OTHERS = 31, PROMPT = 70, OUTPUT = 24, TOP = 3, MOST_PAGES = 300 };

typedef struct answer {
    uint32_t tokens[OUTPUT], top_tokens[OUTPUT][TOP], n;
    float logprobs[OUTPUT], top_logprobs[OUTPUT][TOP];
    choir_usage usage;
    bool done;
} answer;

typedef struct setting {
    uint32_t threads, budget, n_pages; /* n_pages 0: enough */
    bool crowd, prefix_hit;
} setting;

typedef struct house {
    choir_engine *engine;
    choir_scheduler *scheduler;
    uint32_t vocab;
} house;

static house open_house(const char *path, const setting *s)
{
    house h;
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = s->threads;
    o.max_rows = 512;
    choir_engine *sizing;
    if (choir_engine_open(path, &o, &sizing) != CHOIR_OK) fail_msg("%s", choir_error_message());
    o.kv_bytes = (s->n_pages ? s->n_pages : MOST_PAGES) * choir_engine_page_bytes(sizing);
    choir_engine_close(sizing);
    if (choir_engine_open(path, &o, &h.engine) != CHOIR_OK) fail_msg("%s", choir_error_message());
    choir_scheduler_options so = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    so.max_step_tokens = s->budget;
    if (so.max_sequences > s->budget) so.max_sequences = s->budget;
    so.manual = true;
    so.prefix_cache = s->prefix_hit;
    choir_step_engine step = choir_step_engine_of(h.engine);
    if (choir_scheduler_create(&step, &so, &h.scheduler) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    h.vocab = choir_engine_config(h.engine)->vocab;
    return h;
}

static void close_house(house *h)
{
    choir_scheduler_destroy(h->scheduler);
    choir_engine_close(h->engine);
}

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525 + 1013904223;
    return *state >> 8;
}

static void no_wake(void *user)
{
    (void)user;
}

/* Request 0 is the one that is compared; the others differ in everything. */
static choir_stream *submit(house *h, uint32_t number)
{
    uint32_t tokens[PROMPT], state = number * 7919 + 1;
    choir_request r = {.tokens = tokens,
                       .n_tokens = PROMPT,
                       .max_tokens = OUTPUT,
                       .n = 1,
                       .ignore_eos = true,
                       .want_logprobs = true};
    r.sampling = CHOIR_SAMPLING_DEFAULT;
    r.sampling.temperature = 0.8F;
    r.sampling.top_p = 0.95F;
    r.sampling.repetition_penalty = 1.1F;
    r.sampling.top_logprobs = TOP;
    r.sampling.seed = 42 + number;
    if (number > 0) {
        r.n_tokens = 1 + next_random(&state) % 40;
        r.max_tokens = 1 + next_random(&state) % 20;
        r.sampling.temperature = number % 3 ? 1 : 0;
        r.priority = number > 6; /* they overtake request 0, which loses its pages to them */
    }
    for (uint32_t i = 0; i < r.n_tokens; i++) tokens[i] = next_random(&state) % h->vocab;
    choir_stream *stream;
    if (choir_scheduler_submit(h->scheduler, &r, no_wake, NULL, &stream) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return stream;
}

static void keep(answer *a, const choir_event *e)
{
    for (uint32_t i = 0; i < e->n_tokens; i++, a->n++) {
        const choir_token_logprob *l = &e->logprobs[i];
        assert_true(a->n < OUTPUT && l->n_top == TOP && l->token == e->tokens[i]);
        a->tokens[a->n] = l->token;
        a->logprobs[a->n] = l->logprob;
        memcpy(a->top_tokens[a->n], l->top_tokens, sizeof a->top_tokens[0]);
        memcpy(a->top_logprobs[a->n], l->top_logprobs, sizeof a->top_logprobs[0]);
    }
}

/* Reads what is there; a is NULL for those whose answers do not matter. */
static bool read_events(choir_stream *stream, answer *a)
{
    choir_event e;
    while (choir_stream_next(stream, &e)) {
        if (e.kind == CHOIR_EVENT_DELTA && a != NULL) keep(a, &e);
        if (e.kind != CHOIR_EVENT_DONE) continue;
        if (e.status != CHOIR_OK) fail_msg("%s", e.message);
        if (a != NULL) a->usage = e.usage;
        return true;
    }
    return false;
}

/* Request 0, and others that join at random steps before and after it. */
static answer run(house *h, bool crowd)
{
    answer a = {0};
    choir_stream *mine = NULL, *others[N_OTHERS] = {0};
    uint32_t n_joined = crowd ? 0 : N_OTHERS, n_left = n_joined, state = 11;
    for (uint32_t step = 0; !a.done || n_left < N_OTHERS; step++) {
        if (mine == NULL && !a.done && (!crowd || n_joined >= 3)) mine = submit(h, 0);
        for (uint32_t n = next_random(&state) % 4; n > 0 && n_joined < N_OTHERS; n--, n_joined++)
            others[n_joined] = submit(h, 1 + n_joined);
        choir_scheduler_tick(h->scheduler);
        for (uint32_t i = 0; i < n_joined; i++)
            if (others[i] != NULL && read_events(others[i], NULL)) {
                choir_stream_release(others[i]);
                others[i] = NULL;
                n_left++;
            }
        if (mine != NULL && read_events(mine, &a)) {
            choir_stream_release(mine);
            mine = NULL;
            a.done = true;
        }
        assert_true(step < 10000);
    }
    assert_int_equal(a.n, OUTPUT);
    return a;
}

static answer run_in(const char *path, const setting *s)
{
    house h = open_house(path, s);
    if (s->prefix_hit) run(&h, false);
    answer a = run(&h, s->crowd);
    if (s->prefix_hit) assert_true(a.usage.cached_tokens > 0);
    if (s->n_pages) assert_true(a.usage.n_preemptions > 0);
    close_house(&h);
    return a;
}

static void assert_same(const answer *a, const answer *b, size_t number)
{
    if (memcmp(a->tokens, b->tokens, sizeof a->tokens) != 0)
        fail_msg("setting %zu: other tokens", number);
    if (memcmp(a->logprobs, b->logprobs, sizeof a->logprobs) != 0)
        fail_msg("setting %zu: other logprobs", number);
    assert_memory_equal(a->top_tokens, b->top_tokens, sizeof a->top_tokens);
    assert_memory_equal(a->top_logprobs, b->top_logprobs, sizeof a->top_logprobs);
}

static void check_model(const char *path)
{
    const setting alone = {1, 512, 0, false, false};
    const setting others[] = {
        {2, 512, 0, false, false}, {1, 13, 0, false, false}, {2, 40, 0, true, false},
        {1, 512, 0, true, false},  {2, 512, 0, false, true}, {2, 33, 0, true, true},
        {2, 64, 9, true, false},
    };
    answer expected = run_in(path, &alone);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        answer got = run_in(path, &others[i]);
        assert_same(&expected, &got, i);
    }
}

static void a_tiny_dense_model(void **state)
{
    (void)state;
    check_model("tests/fixtures/models/llama");
}

static void a_tiny_mixture_of_experts(void **state)
{
    (void)state;
    check_model("tests/fixtures/models/mixtral");
}

static void smollm2(void **state)
{
    (void)state;
    check_model(smol_model());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_tiny_dense_model),
        cmocka_unit_test(a_tiny_mixture_of_experts),
        cmocka_unit_test(smollm2),
    };
    return cmocka_run_group_tests_name("invariance", tests, NULL, NULL);
}
