/* Tiny models of every family against PyTorch in f32: logits, routes and greedy continuations, in exact
 * mode; and the fast path beside it. */
#include "tests/engine/sequence.h"
#include "tests/support/reference.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const char *const names[] = {"llama", "llama3rope", "mistral", "qwen2",
                                    "qwen3", "mixtral",    "qwen3_moe", "olmoe"};

static choir_engine *open_engine(const char *name, bool exact)
{
    char path[256];
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.exact = exact;
    o.n_threads = 2;
    o.max_rows = 128;
    snprintf(path, sizeof path, "tests/fixtures/models/%s", name);
    choir_engine *engine;
    if (choir_engine_open(path, &o, &engine) != CHOIR_OK) fail_msg("%s", choir_error_message());
    return engine;
}

/* The largest difference, as a part of the largest logit. */
static double difference(const float *a, const float *b, size_t n)
{
    double worst = 0, largest = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(a[i])) return INFINITY;
        worst = fmax(worst, fabs((double)a[i] - b[i]));
        largest = fmax(largest, fabs((double)b[i]));
    }
    return worst / largest;
}

static void check_routes(const reference *r, const reference_prompt *p, const choir_routes *routes)
{
    size_t n = (size_t)r->n_layers * p->n_tokens * r->k;
    for (size_t i = 0; i < n; i++) {
        /* Equal weights may change places; nothing else may differ. */
        bool tie = i + 1 < n && fabsf(p->weights[i] - p->weights[i + 1]) < 1e-5F;
        tie = tie || (i > 0 && fabsf(p->weights[i] - p->weights[i - 1]) < 1e-5F);
        if (!tie) assert_int_equal(routes->experts[i], p->experts[i]);
        assert_float_equal(routes->weights[i], p->weights[i], 1e-5);
    }
}

static void compare_prompt(choir_engine *engine, const reference *r, const reference_prompt *p,
                           double tolerance, const char *name)
{
    float *logits = malloc(sizeof *logits * p->n_tokens * r->vocab);
    size_t n = (size_t)r->n_layers * p->n_tokens * (r->k > 0 ? r->k : 1);
    choir_routes routes = {calloc(n, sizeof(uint16_t)), calloc(n, sizeof(float))};
    sequence s = sequence_at(engine, 0, 4);
    choir_span span = sequence_span(&s, p->ids, p->n_tokens, logits);
    if (r->k > 0) span.routes = &routes;
    assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
    double d = difference(logits, p->logits, (size_t)p->n_tokens * r->vocab);
    if (!(d <= tolerance)) fail_msg("%s: logits differ by %g of the largest", name, d);
    if (r->k > 0 && tolerance < 1e-3) check_routes(r, p, &routes);
    free(logits);
    free(routes.experts);
    free(routes.weights);
}

static void compare_greedy(choir_engine *engine, const reference *r, const reference_prompt *p)
{
    float *logits = malloc(sizeof *logits * r->vocab);
    sequence s = sequence_at(engine, 0, 4);
    choir_span span = sequence_span(&s, p->ids, p->n_tokens, logits);
    span.n_logits = 1;
    for (uint32_t i = 0; i < p->n_greedy && s.position + span.n_tokens <= 4 * CHOIR_PAGE_TOKENS; i++) {
        assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
        sequence_advance(&s, &span);
        uint32_t best = 0;
        for (uint32_t v = 1; v < r->vocab; v++)
            if (logits[v] > logits[best]) best = v;
        if (p->margins[i] > 1e-3F) assert_int_equal(best, p->greedy[i]);
        span = sequence_span(&s, &p->greedy[i], 1, logits);
    }
    free(logits);
}

static void compare(bool exact, double tolerance)
{
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[256];
        snprintf(path, sizeof path, "tests/fixtures/models/%s/ref.bin", names[i]);
        reference r = reference_open(path);
        choir_engine *engine = open_engine(names[i], exact);
        for (uint32_t p = 0; p < r.n_prompts; p++) {
            compare_prompt(engine, &r, &r.prompts[p], tolerance, names[i]);
            if (exact) compare_greedy(engine, &r, &r.prompts[p]);
        }
        choir_engine_close(engine);
        reference_close(&r);
    }
}

static void test_exact(void **state)
{
    (void)state;
    compare(true, 1e-4);
}

/* bf16 weights and f16 KV, no quantised products in these files. */
static void test_fast(void **state)
{
    (void)state;
    compare(false, 3e-3);
}

static void test_tokenizer(void **state)
{
    (void)state;
    choir_engine *engine = open_engine("llama", true);
    reference r = reference_open("tests/fixtures/models/llama/ref.bin");
    const char *text = "The licenses for most software are designed to take away your freedom to share and "
                       "change it.";
    uint32_t *ids;
    size_t n;
    assert_int_equal(choir_tokenizer_encode(choir_engine_tokenizer(engine), text, strlen(text),
                                            CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n),
                     CHOIR_OK);
    assert_int_equal(n, r.prompts[1].n_tokens);
    assert_memory_equal(ids, r.prompts[1].ids, n * sizeof *ids);
    choir_free(ids);
    reference_close(&r);
    choir_engine_close(engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_fast),
        cmocka_unit_test(test_tokenizer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
