/* The engine's promises: bits that do not depend on batch, chunks, threads or pages; bad steps
 * refused; a warm step allocates nothing. The reference comparison is in oracle_test.c. */
#include "tests/engine/sequence.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N_TOKENS = 70, N_PAGES = 40 };

/* One model for each way that the token path may take; the first two are what single tests use. */
static const char *const models[] = {
    "tests/fixtures/models/llama",       "tests/fixtures/models/mixtral",
    "tests/fixtures/models/deepseek_v2", "tests/fixtures/models/deepseek_v3",
    "tests/fixtures/models/gpt_oss",     "tests/fixtures/models/llama4",
    "tests/fixtures/models/gemma3",      "tests/fixtures/models/phimoe",
    "tests/fixtures/models/qwen2_moe",   "tests/fixtures/models/dynamic"};

static choir_engine *open_engine(const char *path, uint32_t n_threads, bool exact)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = n_threads;
    o.exact = exact;
    o.max_rows = 256;
    o.kv_bytes = (uint64_t)64 << 20;
    choir_engine *engine;
    if (choir_engine_open(path, &o, &engine) != CHOIR_OK) fail_msg("%s", choir_error_message());
    assert_true(choir_engine_n_pages(engine) >= N_PAGES);
    return engine;
}

static void make_tokens(uint32_t seed, uint32_t vocab, uint32_t n, uint32_t *tokens)
{
    uint64_t state = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
    for (uint32_t i = 0; i < n; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        tokens[i] = (uint32_t)(state >> 33) % vocab;
    }
}

static float *run_alone(choir_engine *engine, const uint32_t *tokens, uint32_t chunk)
{
    uint32_t vocab = choir_engine_config(engine)->vocab;
    float *logits = malloc(sizeof *logits * N_TOKENS * vocab);
    assert_non_null(logits);
    sequence s = sequence_at(engine, 0, 3);
    sequence_run(&s, tokens, N_TOKENS, chunk, logits);
    return logits;
}

static void assert_same_bits(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0)
            fail_msg("value %zu differs: %.9g and %.9g", i, (double)a[i], (double)b[i]);
}

/* A whole prompt, any chunks, and token by token give the same bits, with 1, 2 and 3 threads. */
static void test_chunks_and_threads(void **state)
{
    (void)state;
    for (size_t m = 0; m < sizeof models / sizeof *models; m++) {
        for (int exact = 0; exact < 2; exact++) {
            uint32_t tokens[N_TOKENS];
            choir_engine *one = open_engine(models[m], 1, exact);
            uint32_t vocab = choir_engine_config(one)->vocab;
            make_tokens(7, vocab, N_TOKENS, tokens);
            float *whole = run_alone(one, tokens, N_TOKENS);
            for (uint32_t threads = 1; threads <= 3; threads++) {
                choir_engine *engine = open_engine(models[m], threads, exact);
                const uint32_t chunks[] = {1, 5, 16, 33, N_TOKENS};
                for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
                    float *part = run_alone(engine, tokens, chunks[c]);
                    assert_same_bits(whole, part, (size_t)N_TOKENS * vocab);
                    free(part);
                }
                choir_engine_close(engine);
            }
            free(whole);
            choir_engine_close(one);
        }
    }
}

/* The same request among others that join, leave and differ in length, at another span index. */
static void test_among_others(void **state)
{
    (void)state;
    for (size_t m = 0; m < sizeof models / sizeof *models; m++) {
        choir_engine *engine = open_engine(models[m], 2, false);
        uint32_t vocab = choir_engine_config(engine)->vocab, tokens[N_TOKENS], noise[N_TOKENS];
        make_tokens(7, vocab, N_TOKENS, tokens);
        make_tokens(8, vocab, N_TOKENS, noise);
        float *alone = run_alone(engine, tokens, N_TOKENS);
        float *among = malloc(sizeof *among * N_TOKENS * vocab);
        sequence mine = sequence_at(engine, 0, 3), others[12];
        for (uint32_t i = 0; i < 12; i++) others[i] = sequence_at(engine, 3 + 3 * i, 3);
        for (uint32_t at = 0, round = 0; at < N_TOKENS; round++) {
            choir_span spans[13];
            uint32_t n = 0, n_others = round * 5 % 13, mine_at = 0;
            uint32_t chunk = 1 + round * 7 % 11, left = N_TOKENS - at;
            for (uint32_t i = 0; i < n_others; i++) {
                if (i == n_others / 2) mine_at = n++;
                sequence *o = &others[i];
                uint32_t len = 1 + (i + round) % 6;
                if (o->position + len > N_TOKENS) o->position = 0; /* leaves, another joins */
                spans[n] = sequence_span(o, noise + o->position, len, NULL);
                spans[n++].n_logits = 0;
                sequence_advance(o, &spans[n - 1]);
            }
            if (n_others == 0) mine_at = n++;
            if (chunk > left) chunk = left;
            spans[mine_at] = sequence_span(&mine, tokens + at, chunk, among + (size_t)at * vocab);
            assert_int_equal(choir_engine_step(engine, spans, n), CHOIR_OK);
            sequence_advance(&mine, &spans[mine_at]);
            at += chunk;
        }
        assert_same_bits(alone, among, (size_t)N_TOKENS * vocab);
        free(alone);
        free(among);
        choir_engine_close(engine);
    }
}

/* Targets give the log-softmax of the logits; the sampler's logprob agrees with it. */
static void test_targets_and_draws(void **state)
{
    (void)state;
    choir_engine *engine = open_engine(models[0], 2, false);
    uint32_t vocab = choir_engine_config(engine)->vocab, tokens[N_TOKENS];
    make_tokens(3, vocab, N_TOKENS, tokens);
    float scores[N_TOKENS];
    sequence s = sequence_at(engine, 0, 3);
    choir_sampling greedy = CHOIR_SAMPLING_DEFAULT;
    greedy.temperature = 0;
    choir_sampler *sampler;
    assert_int_equal(choir_sampler_create(&greedy, vocab, &sampler), CHOIR_OK);
    float *logits = malloc(sizeof *logits * N_TOKENS * vocab);
    choir_span span = sequence_span(&s, tokens, N_TOKENS - 1, logits);
    span.targets = tokens + 1;
    span.target_logprobs = scores;
    span.sampler = sampler;
    assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
    assert_int_equal(span.status, CHOIR_OK);
    const float *last = logits + (size_t)(N_TOKENS - 2) * vocab;
    uint32_t best = 0;
    for (uint32_t v = 1; v < vocab; v++)
        if (last[v] > last[best]) best = v;
    assert_int_equal(span.sample.token, best);
    for (uint32_t i = 0; i < N_TOKENS - 1; i++) assert_true(scores[i] < 0 && scores[i] > -60);
    choir_span again = sequence_span(&s, tokens, N_TOKENS - 1, NULL);
    again.targets = &best;
    again.n_logits = 1;
    float drawn;
    again.target_logprobs = &drawn;
    assert_int_equal(choir_engine_step(engine, &again, 1), CHOIR_OK);
    assert_float_equal(drawn, span.sample.logprob, 1e-5);
    free(logits);
    choir_sampler_destroy(sampler);
    choir_engine_close(engine);
}

static void test_routes(void **state)
{
    (void)state;
    choir_engine *engine = open_engine(models[1], 2, true);
    const choir_model_config *c = choir_engine_config(engine);
    uint32_t tokens[N_TOKENS], n = c->n_layers * N_TOKENS * c->n_experts_used;
    make_tokens(5, c->vocab, N_TOKENS, tokens);
    choir_routes routes = {calloc(n, sizeof(uint16_t)), calloc(n, sizeof(float))};
    sequence s = sequence_at(engine, 0, 3);
    for (int32_t forced = -1; forced < (int32_t)c->n_experts; forced += 3) {
        assert_int_equal(choir_engine_force_expert(engine, forced), CHOIR_OK);
        choir_span span = sequence_span(&s, tokens, N_TOKENS, NULL);
        span.routes = &routes;
        assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
        for (uint32_t i = 0; i < n; i += c->n_experts_used) {
            float sum = 0;
            for (uint32_t k = 0; k < c->n_experts_used; k++) sum += routes.weights[i + k];
            assert_float_equal(sum, 1, 1e-5);
            assert_true(routes.weights[i] >= routes.weights[i + 1]);
            if (forced >= 0) assert_int_equal(routes.experts[i], forced);
        }
    }
    assert_int_equal(choir_engine_force_expert(engine, 8), CHOIR_E_INVALID);
    free(routes.experts);
    free(routes.weights);
    choir_engine_close(engine);
}

/* Where there is nothing to route there are zeros, whatever lay in the caller's memory. */
static void test_routes_of_dense_layers(void **state)
{
    (void)state;
    choir_engine *engine = open_engine("tests/fixtures/models/deepseek_v3", 2, false);
    const choir_model_config *c = choir_engine_config(engine);
    uint32_t k = c->n_experts_used, n_dense = 0, tokens[N_TOKENS];
    size_t n = (size_t)c->n_layers * N_TOKENS * k;
    make_tokens(5, c->vocab, N_TOKENS, tokens);
    choir_routes routes = {malloc(n * sizeof(uint16_t)), malloc(n * sizeof(float))};
    memset(routes.experts, 0xFF, n * sizeof(uint16_t));
    memset(routes.weights, 0xFF, n * sizeof(float));
    sequence s = sequence_at(engine, 0, 3);
    choir_span span = sequence_span(&s, tokens, N_TOKENS, NULL);
    span.routes = &routes;
    assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        bool moe = (c->layers[l] & CHOIR_LAYER_MOE) != 0;
        n_dense += !moe;
        for (size_t i = (size_t)l * N_TOKENS * k; i < (size_t)(l + 1) * N_TOKENS * k; i++) {
            assert_true(routes.experts[i] < c->n_experts);
            assert_true(moe ? routes.weights[i] > 0
                            : routes.weights[i] == 0 && routes.experts[i] == 0);
        }
    }
    assert_true(n_dense > 0 && n_dense < c->n_layers);
    free(routes.experts);
    free(routes.weights);
    choir_engine_close(engine);
}

static void test_bad_steps(void **state)
{
    (void)state;
    choir_engine *engine = open_engine(models[0], 1, false);
    const choir_model_config *c = choir_engine_config(engine);
    uint32_t tokens[300];
    make_tokens(1, c->vocab, 300, tokens);
    sequence s = sequence_at(engine, 0, 12);
    choir_span good = sequence_span(&s, tokens, 4, NULL);
    choir_span spans[2] = {good, good};
    uint32_t far_page = choir_engine_n_pages(engine), bad_token = c->vocab;
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        choir_span span = good;                                                                    \
        change;                                                                                    \
        assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_E_INVALID);                    \
    } while (0)
    REFUSED(span.n_tokens = 0);
    REFUSED(span.n_logits = 5);
    REFUSED(span.n_pages = 0);
    REFUSED(span.position = c->max_positions - 3; span.n_pages = 64);
    REFUSED(span.pages = &far_page; span.n_pages = 1);
    REFUSED(span.tokens = &bad_token; span.n_tokens = 1; span.n_logits = 1);
    REFUSED(span.targets = &bad_token; span.n_logits = 1);
    REFUSED(span.n_tokens = 257; span.n_logits = 1);
    assert_int_equal(choir_engine_step(engine, spans, 65), CHOIR_E_INVALID);
    assert_int_equal(choir_engine_step(engine, spans, 1), CHOIR_OK);
    choir_engine_close(engine);
}

static void test_warm_step_allocates_nothing(void **state)
{
    (void)state;
    for (size_t m = 0; m < sizeof models / sizeof *models; m++) {
        choir_engine *engine = open_engine(models[m], 2, false);
        uint32_t tokens[N_TOKENS];
        make_tokens(2, choir_engine_config(engine)->vocab, N_TOKENS, tokens);
        sequence s = sequence_at(engine, 0, 3);
        uint64_t before = choir_memory_n_allocs();
        for (uint32_t i = 0; i < N_TOKENS; i++) {
            choir_span span = sequence_span(&s, tokens + i, 1, NULL);
            assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
            sequence_advance(&s, &span);
        }
        assert_int_equal(choir_memory_n_allocs(), before);
        assert_int_equal(choir_engine_n_steps(engine), N_TOKENS);
        choir_engine_close(engine);
    }
}

/* Every allocation of an open fails once; each time a sentence, no leak, and the next open works.
 */
/* Also where tensors are rearranged on their way: latent attention, MXFP4. */
static void test_open_survives_lack_of_memory(void **state)
{
    (void)state;
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = 2;
    o.max_rows = 64;
    open_without_memory("tests/fixtures/models/mixtral", &o);
    open_without_memory("tests/fixtures/models/deepseek_v3", &o);
    open_without_memory("tests/fixtures/models/gpt_oss_mxfp4", &o);
}

static uint64_t digest_of(const char *path, uint32_t n_threads, bool exact)
{
    choir_engine *engine = open_engine(path, n_threads, exact);
    uint64_t digest = choir_engine_digest(engine);
    choir_engine_close(engine);
    return digest;
}

/* The digest belongs to the weights: not to threads or mode, but to every bit. */
static void test_digest(void **state)
{
    (void)state;
    const char *gguf = "tests/fixtures/models/llama.gguf";
    uint64_t digest = digest_of(gguf, 1, false);
    assert_true(digest == digest_of(gguf, 3, false) && digest == digest_of(gguf, 1, true));
    assert_true(digest != digest_of(models[1], 1, false));
    char *data, path[] = "/tmp/choir-digest-XXXXXX.gguf";
    size_t bytes;
    assert_int_equal(choir_file_read(gguf, 1 << 20, &data, &bytes), CHOIR_OK);
    data[bytes - 100] ^= 1;
    FILE *copy = fdopen(mkstemps(path, 5), "wb");
    assert_int_equal(fwrite(data, 1, bytes, copy), bytes);
    fclose(copy);
    assert_true(digest != digest_of(path, 1, false));
    remove(path);
    choir_free(data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks_and_threads),
        cmocka_unit_test(test_among_others),
        cmocka_unit_test(test_targets_and_draws),
        cmocka_unit_test(test_routes),
        cmocka_unit_test(test_routes_of_dense_layers),
        cmocka_unit_test(test_digest),
        cmocka_unit_test(test_bad_steps),
        cmocka_unit_test(test_warm_step_allocates_nothing),
        cmocka_unit_test(test_open_survives_lack_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
