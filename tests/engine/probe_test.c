/* A prompt's features: the rows are those of a plain step at the same point, bit for bit, whatever
 * else runs and however many threads there are; and whoever runs beside a probe does not notice. */
#include "engine/state.h"
#include "tests/engine/sequence.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N_TOKENS = 70, N_PAGES = 3, MAX_HIDDEN = 256 };

#define MODELS "tests/fixtures/models/"
/* One for each way that the token path may take. */
static const char *const models[] = {MODELS "llama",       MODELS "mixtral", MODELS "deepseek_v2",
                                     MODELS "deepseek_v3", MODELS "gpt_oss", MODELS "llama4",
                                     MODELS "gemma3",      MODELS "phimoe",  MODELS "qwen2_moe",
                                     MODELS "dynamic"};
enum { N_MODELS = sizeof models / sizeof *models };

static choir_engine_options options_of(uint32_t n_threads, bool exact)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = n_threads;
    o.exact = exact;
    o.max_rows = 128;
    o.kv_bytes = (uint64_t)8 << 20;
    return o;
}

static choir_engine *open_with(const char *path, const choir_engine_options *o)
{
    choir_engine *engine;
    if (choir_engine_open(path, o, &engine) != CHOIR_OK) fail_msg("%s", choir_error_message());
    assert_true(choir_engine_config(engine)->hidden <= MAX_HIDDEN);
    return engine;
}

static choir_engine *open_engine(const char *path, uint32_t n_threads, bool exact)
{
    const choir_engine_options o = options_of(n_threads, exact);
    return open_with(path, &o);
}

static void make_tokens(uint32_t seed, uint32_t vocab, uint32_t n, uint32_t *tokens)
{
    uint64_t state = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
    for (uint32_t i = 0; i < n; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        tokens[i] = (uint32_t)(state >> 33) % vocab;
    }
}

typedef struct features {
    float mean[MAX_HIDDEN], entropy;
    uint32_t n_rows;
} features;

static features probe(choir_engine *engine, const uint32_t *tokens, uint32_t n, uint32_t n_blocks)
{
    features f = {.entropy = -1};
    choir_probe p = {.tokens = tokens, .n_tokens = n, .n_blocks = n_blocks, .mean = f.mean};
    /* NaN where its keys and values will lie: none is read that it has not written. */
    memset(engine->step.logits, 0xFF, choir_probe_pages(engine) * engine->layer_kv_bytes);
    if (choir_engine_probe(engine, &p) != CHOIR_OK) fail_msg("%s", choir_error_message());
    f.entropy = p.gate_entropy;
    f.n_rows = p.n_rows;
    return f;
}

static void assert_same(const features *a, const features *b)
{
    assert_memory_equal(a->mean, b->mean, sizeof a->mean);
    assert_memory_equal(&a->entropy, &b->entropy, sizeof a->entropy);
    assert_int_equal(a->n_rows, b->n_rows);
}

/* The rows that a step or a probe has left, summed in their order. */
static features mean_of_step(const choir_engine *e)
{
    const step *s = &e->step;
    features f = {.n_rows = s->n_rows};
    for (uint32_t d = 0; d < e->config.hidden; d++) {
        for (uint32_t i = 0; i < s->n_rows; i++)
            f.mean[d] += s->x[(size_t)i * e->config.hidden + d];
        f.mean[d] /= (float)s->n_rows;
    }
    return f;
}

static void assert_mean(const features *a, const features *b)
{
    assert_memory_equal(a->mean, b->mean, sizeof a->mean);
    assert_int_equal(a->n_rows, b->n_rows);
}

static void run_plainly(choir_engine *e, const uint32_t *tokens, float *ffn_inputs)
{
    sequence q = sequence_at(e, 0, N_PAGES);
    choir_span span = sequence_span(&q, tokens, N_TOKENS, NULL);
    span.ffn_inputs = ffn_inputs;
    assert_int_equal(choir_engine_step(e, &span, 1), CHOIR_OK);
    assert_int_equal(span.status, CHOIR_OK);
}

/* Behind the attention of layer l, normed: what a plain step gave to its FFN. */
static void check_layer(choir_engine *e, uint32_t l, const uint32_t *tokens, const float *given)
{
    float h[MAX_HIDDEN];
    uint32_t hidden = e->config.hidden;
    features got = probe(e, tokens, N_TOKENS, 2 * l + 1), rows = mean_of_step(e);
    assert_mean(&got, &rows);
    for (uint32_t i = 0; i < N_TOKENS; i++) {
        choir_norm_row(e, e->layers[l].ffn_norm, e->step.x + (size_t)i * hidden, h);
        assert_memory_equal(h, given + (size_t)i * hidden, hidden * sizeof *h);
    }
}

static void check_embeddings(choir_engine *e, const uint32_t *tokens)
{
    float sums[MAX_HIDDEN] = {0}, x[MAX_HIDDEN];
    features got = probe(e, tokens, N_TOKENS, 0);
    for (uint32_t i = 0; i < N_TOKENS; i++) {
        choir_matrix_row(&e->embedding, tokens[i], x);
        for (uint32_t d = 0; d < e->config.hidden; d++) sums[d] += x[d] * e->config.embedding_scale;
    }
    for (uint32_t d = 0; d < e->config.hidden; d++)
        assert_true(fabsf(got.mean[d] - sums[d] / N_TOKENS) <= 1e-5F * (1 + fabsf(got.mean[d])));
    assert_true(got.entropy == 0);
}

static void test_points_are_those_of_a_step(void **state)
{
    (void)state;
    for (int i = 0; i < 2 * N_MODELS; i++) {
        choir_engine *e = open_engine(models[i / 2], 2, i % 2);
        uint32_t tokens[N_TOKENS], hidden = e->config.hidden, n_layers = e->config.n_layers;
        make_tokens(7, e->config.vocab, N_TOKENS, tokens);
        size_t of_layer = (size_t)N_TOKENS * hidden;
        float *given = calloc(n_layers * of_layer, sizeof *given);
        assert_non_null(given);
        run_plainly(e, tokens, given);
        features whole = mean_of_step(e), got = probe(e, tokens, N_TOKENS, 2 * n_layers);
        assert_mean(&got, &whole);
        for (uint32_t l = 0; l < n_layers; l++) check_layer(e, l, tokens, given + l * of_layer);
        check_embeddings(e, tokens);
        free(given);
        choir_engine_close(e);
    }
}

static void test_threads_and_company(void **state)
{
    (void)state;
    for (size_t m = 0; m < N_MODELS; m++) {
        features wanted[5];
        uint32_t tokens[N_TOKENS], others[N_TOKENS];
        for (uint32_t threads = 1; threads <= 3; threads++) {
            choir_engine *e = open_engine(models[m], threads, false);
            make_tokens(7, e->config.vocab, N_TOKENS, tokens);
            make_tokens(8, e->config.vocab, N_TOKENS, others);
            for (uint32_t round = 0; round < 2; round++)
                for (uint32_t b = 0; b < 5; b++) {
                    features got = probe(e, tokens, N_TOKENS, b);
                    if (threads == 1 && round == 0) wanted[b] = got;
                    assert_same(&got, &wanted[b]);
                    run_plainly(e, others, NULL);
                    probe(e, others, 1 + 13 * b, 4 - b);
                }
            choir_engine_close(e);
        }
    }
}

/* Every page is a running sequence's, and a probe of another prompt comes between all its tokens.
 */
static void test_sequences_do_not_notice(void **state)
{
    (void)state;
    for (size_t m = 0; m < N_MODELS; m++) {
        choir_engine_options o = options_of(2, false);
        o.max_rows = N_PAGES * CHOIR_PAGE_TOKENS;
        o.kv_bytes = 0; /* pages for max_rows tokens */
        choir_engine *e = open_with(models[m], &o);
        assert_int_equal(choir_engine_n_pages(e), N_PAGES);
        uint32_t tokens[N_TOKENS], others[N_TOKENS], vocab = e->config.vocab;
        make_tokens(7, vocab, N_TOKENS, tokens);
        make_tokens(8, vocab, N_TOKENS, others);
        float *logits[2];
        for (int beside = 0; beside < 2; beside++) {
            logits[beside] = calloc((size_t)N_TOKENS * vocab, sizeof(float));
            assert_non_null(logits[beside]);
            sequence q = sequence_at(e, 0, N_PAGES);
            for (uint32_t at = 0, n; at < N_TOKENS; at += n) {
                n = at == 0 ? 40 : 1;
                choir_span span =
                    sequence_span(&q, tokens + at, n, logits[beside] + (size_t)at * vocab);
                assert_int_equal(choir_engine_step(e, &span, 1), CHOIR_OK);
                sequence_advance(&q, &span);
                if (beside) probe(e, others + at % 20, 50, at % (2 * e->config.n_layers + 1));
            }
        }
        assert_memory_equal(logits[0], logits[1], (size_t)N_TOKENS * vocab * sizeof(float));
        free(logits[0]);
        free(logits[1]);
        choir_engine_close(e);
    }
}

static void test_long_prompts_count_by_their_end(void **state)
{
    (void)state;
    enum { LONG = 3 * CHOIR_PROBE_TOKENS };
    static const uint32_t max_rows[] = {33, 64, 4 * CHOIR_PROBE_TOKENS};
    static uint32_t tokens[LONG];
    for (size_t i = 0; i < sizeof max_rows / sizeof *max_rows; i++) {
        choir_engine_options o = options_of(2, false);
        o.max_rows = max_rows[i];
        o.max_spans = 4;
        choir_engine *e = open_with(models[0], &o);
        uint32_t most = choir_probe_rows(e);
        assert_true(most <= max_rows[i] && most <= CHOIR_PROBE_TOKENS);
        make_tokens(5, e->config.vocab, LONG, tokens);
        features whole = probe(e, tokens, LONG, 3), end = probe(e, tokens + LONG - most, most, 3),
                 more = probe(e, tokens + LONG - most - 1, most + 1, 3),
                 less = probe(e, tokens + LONG - most + 1, most - 1, 3);
        assert_same(&whole, &end);
        assert_same(&more, &end);
        assert_int_equal(end.n_rows, most);
        assert_memory_not_equal(less.mean, end.mean, sizeof end.mean);
        choir_engine_close(e);
    }
}

/* Against the gate's own matrix and what a plain step gave to it. */
static void test_entropy(void **state)
{
    (void)state;
    choir_engine *e = open_engine(MODELS "mixtral", 2, true);
    const choir_model_config *c = &e->config;
    uint32_t tokens[N_TOKENS];
    size_t of_layer = (size_t)N_TOKENS * c->hidden;
    make_tokens(7, c->vocab, N_TOKENS, tokens);
    float *given = calloc(c->n_layers * of_layer, sizeof *given), gate[MAX_HIDDEN];
    assert_non_null(given);
    run_plainly(e, tokens, given);
    double sum = 0;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        for (uint32_t i = 0; i < N_TOKENS; i++) {
            double all = 0, weighed = 0;
            for (uint32_t x = 0; x < c->n_experts; x++) {
                double logit = 0;
                choir_matrix_row(&e->layers[l].router, x, gate);
                for (uint32_t d = 0; d < c->hidden; d++)
                    logit += (double)gate[d] * (double)given[l * of_layer + i * c->hidden + d];
                all += exp(logit);
                weighed += exp(logit) * logit;
            }
            sum += log(all) - weighed / all;
        }
        features f = probe(e, tokens, N_TOKENS, 2 * l + 2);
        assert_float_equal(f.entropy, sum / N_TOKENS / (l + 1), 1e-4);
        assert_true(f.entropy > 0 && f.entropy < logf((float)c->n_experts));
        f = probe(e, tokens, N_TOKENS, 2 * l + 1); /* it has not come to this layer's gate */
        if (l == 0) assert_true(f.entropy == 0);
    }
    free(given);
    choir_engine_close(e);
    e = open_engine(MODELS "llama", 1, false);
    assert_true(probe(e, tokens, N_TOKENS, 2 * e->config.n_layers).entropy == 0);
    choir_engine_close(e);
}

static void test_streamed_is_resident(void **state)
{
    (void)state;
    for (size_t m = 0; m < N_MODELS; m++) {
        choir_engine *resident = open_engine(models[m], 2, false);
        choir_engine_options o = options_of(2, false);
        o.expert_bytes = (uint64_t)64 << 20;
        o.max_expert_slots = 3;
        if (resident->config.n_experts > 0) {
            choir_engine *streamed = open_with(models[m], &o);
            uint32_t tokens[N_TOKENS];
            make_tokens(7, resident->config.vocab, N_TOKENS, tokens);
            for (uint32_t b = 0; b <= 2 * resident->config.n_layers; b++) {
                features a = probe(resident, tokens, N_TOKENS, b),
                         x = probe(streamed, tokens, N_TOKENS, b);
                assert_same(&a, &x);
                assert_int_equal(choir_engine_n_experts_pinned(streamed), 0);
            }
            choir_engine_close(streamed);
        }
        choir_engine_close(resident);
    }
}

static void test_bad_probes(void **state)
{
    (void)state;
    choir_engine *e = open_engine(models[0], 1, false);
    float mean[MAX_HIDDEN];
    const uint32_t tokens[] = {1, e->config.vocab};
    const choir_probe good = {.tokens = tokens, .n_tokens = 1, .n_blocks = 1, .mean = mean};
    choir_probe p = good;
    assert_int_equal(choir_engine_probe(e, &p), CHOIR_OK);
    p.n_tokens = 0;
    assert_int_equal(choir_engine_probe(e, &p), CHOIR_E_INVALID);
    p.n_tokens = 2;
    assert_int_equal(choir_engine_probe(e, &p), CHOIR_E_INVALID);
    p = good;
    p.n_blocks = 2 * e->config.n_layers + 1;
    assert_int_equal(choir_engine_probe(e, &p), CHOIR_E_INVALID);
    choir_engine_close(e);
}

static void test_warm_probe_allocates_nothing(void **state)
{
    (void)state;
    for (size_t m = 0; m < N_MODELS; m++) {
        choir_engine *e = open_engine(models[m], 2, false);
        uint32_t tokens[N_TOKENS];
        make_tokens(2, e->config.vocab, N_TOKENS, tokens);
        uint64_t before = choir_memory_n_allocs();
        for (uint32_t i = 1; i <= 20; i++) probe(e, tokens, 3 * i, i % 5);
        assert_int_equal(choir_memory_n_allocs(), before);
        assert_int_equal(choir_engine_n_steps(e), 0);
        choir_engine_close(e);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_points_are_those_of_a_step),
        cmocka_unit_test(test_threads_and_company),
        cmocka_unit_test(test_sequences_do_not_notice),
        cmocka_unit_test(test_long_prompts_count_by_their_end),
        cmocka_unit_test(test_entropy),
        cmocka_unit_test(test_streamed_is_resident),
        cmocka_unit_test(test_bad_probes),
        cmocka_unit_test(test_warm_probe_allocates_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
