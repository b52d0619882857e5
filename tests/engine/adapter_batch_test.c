/* Many adapters in one batch: every sequence has bit for bit what it has alone, whoever is beside
 * it, with any number of threads, however the rows are cut into steps, experts in memory or read as
 * they are wanted; and base rows have the bits of an engine that never met an adapter. */
#include "tests/engine/sequence.h"
#include "tests/support/random_adapter.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define MODELS   "tests/fixtures/models/"
#define ADAPTERS "tests/fixtures/adapters/"
enum { N_ADAPTERS = 32, N_REQUESTS = 40, N_TOKENS = 14, MAX_VIRTUAL = 8, MAX_USES = 3 };

typedef struct request {
    uint32_t tokens[MAX_VIRTUAL + N_TOKENS], n_virtual, n_tokens;
    uint32_t start, chunk; /* the round that it begins in, its rows in a step */
    uint32_t n_uses, uses[MAX_USES], from;
    float weights[MAX_USES];
} request;

typedef struct pool {
    choir_engine *engine;
    choir_adapter *adapters[N_ADAPTERS];
    uint32_t n_virtual[N_ADAPTERS];
} pool;

typedef struct setting {
    uint32_t n_threads;
    bool exact, streamed;
} setting;

static choir_engine *open_engine(const char *model, const setting *s)
{
    char path[256];
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.exact = s->exact;
    o.n_threads = s->n_threads;
    o.max_rows = N_REQUESTS * (MAX_VIRTUAL + N_TOKENS);
    o.max_spans = N_REQUESTS;
    o.kv_bytes = (uint64_t)64 << 20;
    if (s->streamed) {
        o.expert_bytes = (uint64_t)64 << 20;
        o.max_expert_slots = 3;
    }
    snprintf(path, sizeof path, MODELS "%s", model);
    choir_engine *engine;
    if (choir_engine_open(path, &o, &engine) != CHOIR_OK) fail_msg("%s", choir_error_message());
    return engine;
}

static void keep(pool *p, uint32_t at, const choir_adapter_data *data, choir_adapter_type type)
{
    if (choir_adapter_make(p->engine, data, type, NULL, &p->adapters[at]) != CHOIR_OK)
        fail_msg("adapter %u: %s", at, choir_error_message());
    p->n_virtual[at] = data->n_virtual;
}

/* All but those of `files` are made of random numbers: every kind, every type, ranks from 1 to 9.
 */
static pool open_pool(const char *model, const setting *s, const char *const *files)
{
    pool p = {.engine = open_engine(model, s)};
    const choir_model_config *c = choir_engine_config(p.engine);
    uint32_t n = 0;
    for (; files[n] != NULL; n++) {
        char path[256];
        choir_adapter_data *data;
        snprintf(path, sizeof path, ADAPTERS "%s", files[n]);
        if (choir_adapter_data_open(c, path, &data) != CHOIR_OK)
            fail_msg("%s", choir_error_message());
        keep(&p, n, data, CHOIR_ADAPTER_AUTO);
        choir_adapter_data_free(data);
    }
    for (; n < N_ADAPTERS; n++) {
        random_adapter *r = random_adapter_make(c, n % N_RANDOM_KINDS, n);
        keep(&p, n, random_adapter_data(r), n / N_RANDOM_KINDS % CHOIR_N_ADAPTER_TYPES);
        random_adapter_free(r);
    }
    return p;
}

static void close_pool(pool *p)
{
    for (uint32_t i = 0; i < N_ADAPTERS; i++) choir_adapter_free(p->adapters[i]);
    choir_engine_close(p->engine);
}

/* Each of the 32 adapters once, four base rows, four mixes of two or three. */
static request request_of(const pool *p, uint32_t i)
{
    const choir_model_config *c = choir_engine_config(p->engine);
    request r = {.start = i % 5, .chunk = i % 3 == 0 ? 1 : i % 3 == 1 ? 4 : 100};
    if (i < N_ADAPTERS) {
        r.n_uses = 1;
        r.uses[0] = i;
        r.weights[0] = i % 4 == 3 && choir_adapter_mixes(p->adapters[i]) ? 0.7F : 1;
        r.n_virtual = p->n_virtual[i];
        r.from = i % 6 == 5 && r.n_virtual == 0 ? 3 + i % 7 : 0;
    } else if (i % 2 == 0) {
        for (uint32_t u = i; r.n_uses < (i % 4 == 0 ? 3 : 2); u += 5) {
            if (!choir_adapter_mixes(p->adapters[u % N_ADAPTERS])) continue;
            r.weights[r.n_uses] = 0.5F - 0.3F * (float)r.n_uses;
            r.uses[r.n_uses++] = u % N_ADAPTERS;
        }
    }
    assert_true(r.n_virtual <= MAX_VIRTUAL);
    for (uint32_t k = 0; k < r.n_virtual; k++) r.tokens[k] = c->vocab + k;
    for (uint32_t k = 0; k < N_TOKENS; k++)
        r.tokens[r.n_virtual + k] = (i * 131 + k * 37 + 11) % c->vocab;
    r.n_tokens = r.n_virtual + N_TOKENS;
    return r;
}

typedef struct run {
    sequence q;
    choir_adapter_use uses[MAX_USES];
    float *logits; /* of every token, [n_tokens, vocab]; virtual ones have none */
} run;

static run run_of(const pool *p, const request *r, uint32_t page)
{
    run x = {.q = sequence_at(p->engine, page, 1)};
    for (uint32_t u = 0; u < r->n_uses; u++)
        x.uses[u] = (choir_adapter_use){p->adapters[r->uses[u]], r->weights[u]};
    x.logits = calloc((size_t)r->n_tokens * choir_engine_config(p->engine)->vocab, sizeof(float));
    assert_non_null(x.logits);
    return x;
}

static choir_span next_span(const pool *p, const request *r, run *x, uint32_t chunk)
{
    uint32_t at = x->q.position, left = r->n_tokens - at, n = left < chunk ? left : chunk;
    choir_span span = sequence_span(&x->q, r->tokens + at, n, NULL);
    uint32_t end = at + n, first = at > r->n_virtual ? at : r->n_virtual;
    span.n_logits = end > first ? end - first : 0;
    if (span.n_logits > 0)
        span.logits = x->logits + (size_t)first * choir_engine_config(p->engine)->vocab;
    span.adapters = r->n_uses > 0 ? x->uses : NULL;
    span.n_adapters = r->n_uses;
    span.adapter_from = r->from;
    return span;
}

static void step(const pool *p, choir_span *spans, uint32_t n)
{
    if (choir_engine_step(p->engine, spans, n) != CHOIR_OK) fail_msg("%s", choir_error_message());
    for (uint32_t i = 0; i < n; i++) {
        choir_status status = choir_span_failure(&spans[i]);
        if (status != CHOIR_OK) fail_msg("%s", choir_error_message());
    }
}

static float *run_alone(const pool *p, const request *r)
{
    run x = run_of(p, r, 0);
    while (x.q.position < r->n_tokens) {
        choir_span span = next_span(p, r, &x, 100);
        step(p, &span, 1);
        sequence_advance(&x.q, &span);
    }
    return x.logits;
}

/* All together: in every round those that have begun and are not through. */
static void run_together(const pool *p, const request *requests, float **logits)
{
    run runs[N_REQUESTS];
    for (uint32_t i = 0; i < N_REQUESTS; i++) runs[i] = run_of(p, &requests[i], i);
    for (uint32_t round = 0, n_left = N_REQUESTS; n_left > 0; round++) {
        choir_span spans[N_REQUESTS];
        uint32_t who[N_REQUESTS], n = 0;
        n_left = 0;
        for (uint32_t k = 0; k < N_REQUESTS; k++) {
            uint32_t i = (k * 7 + round) % N_REQUESTS; /* never in the same order */
            if (runs[i].q.position == requests[i].n_tokens) continue;
            n_left++;
            if (requests[i].start > round) continue;
            who[n] = i;
            spans[n++] = next_span(p, &requests[i], &runs[i], requests[i].chunk);
        }
        if (n > 0) step(p, spans, n);
        for (uint32_t s = 0; s < n; s++) sequence_advance(&runs[who[s]].q, &spans[s]);
    }
    for (uint32_t i = 0; i < N_REQUESTS; i++) logits[i] = runs[i].logits;
}

static void expect_bits(const char *what, const request *r, uint32_t i, const float *got,
                        const float *wanted, uint32_t vocab)
{
    for (size_t k = 0; k < (size_t)r->n_tokens * vocab; k++)
        if (memcmp(&got[k], &wanted[k], sizeof *got) != 0)
            fail_msg("%s: request %u (adapter %d), token %zu, logit %zu is %.9g, not %.9g", what, i,
                     r->n_uses > 0 ? (int)r->uses[0] : -1, k / vocab, k % vocab, (double)got[k],
                     (double)wanted[k]);
}

static void free_logits(float **logits)
{
    for (uint32_t i = 0; i < N_REQUESTS; i++) free(logits[i]);
}

static void compare(const char *what, const char *model, const setting *s, const char *const *files,
                    float *const *wanted)
{
    float *together[N_REQUESTS];
    request requests[N_REQUESTS];
    pool p = open_pool(model, s, files);
    uint32_t vocab = choir_engine_config(p.engine)->vocab;
    for (uint32_t i = 0; i < N_REQUESTS; i++) requests[i] = request_of(&p, i);
    run_together(&p, requests, together);
    for (uint32_t i = 0; i < N_REQUESTS; i++)
        expect_bits(what, &requests[i], i, together[i], wanted[i], vocab);
    if (s->streamed) assert_true(choir_engine_expert_stats(p.engine).n_misses > 0);
    free_logits(together);
    close_pool(&p);
}

/* What each gives alone with one thread; base rows as an engine gives them that meets no adapter.
 */
static void run_each_alone(const char *model, const setting *s, const char *const *files,
                           float **wanted)
{
    pool p = open_pool(model, s, files), base = {.engine = open_engine(model, s)};
    size_t bytes = sizeof(float) * choir_engine_config(p.engine)->vocab;
    for (uint32_t i = 0; i < N_REQUESTS; i++) {
        request r = request_of(&p, i), plain = r;
        plain.n_uses = 0;
        float *logits = run_alone(&p, &r);
        wanted[i] = run_alone(r.n_uses == 0 ? &base : &p, &r);
        expect_bits("again", &r, i, logits, wanted[i], choir_engine_config(p.engine)->vocab);
        free(logits);
        if (r.n_uses == 0 || r.n_virtual > 0) continue;
        /* Up to where it acts it is the base, and behind that it is not. */
        float *untouched = run_alone(&base, &plain);
        assert_memory_equal(wanted[i], untouched, r.from * bytes);
        size_t last = (size_t)(r.n_tokens - 1) * bytes / sizeof(float);
        if (memcmp(wanted[i] + last, untouched + last, bytes) == 0 &&
            i % N_RANDOM_KINDS != RANDOM_EXPERTS)
            fail_msg("%s: adapter %u changes nothing", model, r.uses[0]);
        free(untouched);
    }
    close_pool(&p);
    choir_engine_close(base.engine);
}

static void compare_model(const char *model, bool streams, const char *const *files)
{
    for (int exact = 0; exact < 2; exact++) {
        float *wanted[N_REQUESTS];
        setting s = {.n_threads = 1, .exact = exact};
        run_each_alone(model, &s, files, wanted);
        for (s.n_threads = 1; s.n_threads <= 3; s.n_threads++) {
            char what[128];
            s.streamed = false;
            snprintf(what, sizeof what, "%s, %u threads, %s", model, s.n_threads,
                     exact ? "exact" : "fast");
            compare(what, model, &s, files, wanted);
            if (!streams) continue;
            s.streamed = true;
            strcat(what, ", streamed");
            compare(what, model, &s, files, wanted);
        }
        free_logits(wanted);
    }
}

static const char *const none[] = {NULL};

static void test_dense(void **state)
{
    (void)state;
    static const char *const files[] = {
        "lora",        "prompt_tuning", "dora",       "prefix_tuning",       "ia3", "vera",
        "hub_houlsby", "saved",         "embeddings", "bottleneck_parallel", NULL,
    };
    compare_model("yarn", false, files);
    compare_model("qwen2.gguf", false, none);
}

static void test_experts(void **state)
{
    (void)state;
    static const char *const files[] = {"by_expert_mixtral", "experts_mixtral", NULL};
    compare_model("mixtral_odd", true, files);
    compare_model("qwen2_moe", true, none);
    compare_model("gpt_oss.gguf", true, none);
}

static void test_latent(void **state)
{
    (void)state;
    static const char *const files[] = {"mla_dora", "experts_deepseek_v3", NULL};
    compare_model("deepseek_v3", true, files);
}

/* A mix of one with weight 1 is the adapter, and the order in which a mix names its adapters is its
 * own matter: the sum is taken as they are named. With weight 0 it is the base but for signs of
 * zeros. */
static void test_weights(void **state)
{
    (void)state;
    setting s = {.n_threads = 2, .exact = true};
    pool p = open_pool("yarn", &s, none);
    uint32_t vocab = choir_engine_config(p.engine)->vocab;
    request whole = request_of(&p, 0), zero = whole, base = whole;
    whole.weights[0] = 1;
    zero.weights[0] = 0;
    base.n_uses = 0;
    float *a = run_alone(&p, &whole), *b = run_alone(&p, &zero), *c = run_alone(&p, &base);
    double changed = 0;
    for (size_t i = 0; i < (size_t)N_TOKENS * vocab; i++) {
        assert_true(b[i] == c[i]);
        changed += a[i] != c[i];
    }
    assert_true(changed > 0.9 * N_TOKENS * vocab);
    free(a);
    free(b);
    free(c);
    close_pool(&p);
}

/* A step with adapters allocates nothing once such a step has been. */
static void test_warm_step_allocates_nothing(void **state)
{
    (void)state;
    setting s = {.n_threads = 2};
    pool p = open_pool("mixtral_odd", &s, none);
    request requests[N_REQUESTS];
    run runs[N_REQUESTS];
    choir_span spans[N_REQUESTS];
    for (uint32_t i = 0; i < N_REQUESTS; i++) {
        requests[i] = request_of(&p, i);
        runs[i] = run_of(&p, &requests[i], i);
    }
    for (uint32_t round = 0; round < 4; round++) {
        uint64_t before = choir_memory_n_allocs();
        for (uint32_t i = 0; i < N_REQUESTS; i++)
            spans[i] = next_span(&p, &requests[i], &runs[i], 2);
        step(&p, spans, N_REQUESTS);
        if (round > 0) assert_int_equal(choir_memory_n_allocs(), before);
        for (uint32_t i = 0; i < N_REQUESTS; i++) sequence_advance(&runs[i].q, &spans[i]);
    }
    for (uint32_t i = 0; i < N_REQUESTS; i++) free(runs[i].logits);
    close_pool(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dense),
        cmocka_unit_test(test_experts),
        cmocka_unit_test(test_latent),
        cmocka_unit_test(test_weights),
        cmocka_unit_test(test_warm_step_allocates_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
