/* SmolLM2-135M-Instruct (Q4_1) against PyTorch in f32 over the dequantised weights
 * (tests/oracle/smol_oracle.py wrote tests/fixtures/smol/smol_oracle.json): logits, greedy answers,
 * perplexity in exact mode; the fast path against the exact one. */
#include "tests/engine/sequence.h"
#include "tests/support/smol_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#define ORACLE "tests/fixtures/smol/smol_oracle.json"
#define GPL "/usr/share/common-licenses/GPL-3"
enum { CONTEXT = 512, GPL_BYTES = 20000 };

static json_t *oracle;

static choir_engine *open_engine(bool exact)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.exact = exact;
    o.max_rows = CONTEXT;
    choir_engine *engine;
    if (choir_engine_open(smol_model(), &o, &engine) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return engine;
}

static uint32_t read_ids(const json_t *array, uint32_t *ids, uint32_t most)
{
    uint32_t n = (uint32_t)json_array_size(array);
    assert_true(n <= most);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = (uint32_t)json_integer_value(json_array_get(array, i));
    return n;
}

/* The last prompt position's five best logits, to 2e-3 of the largest. */
static void check_first_logits(const json_t *chat, const float *logits)
{
    const json_t *top = json_object_get(chat, "first_top5");
    double largest = fabs(json_real_value(json_array_get(json_array_get(top, 0), 1)));
    for (size_t i = 0; i < json_array_size(top); i++) {
        const json_t *pair = json_array_get(top, i);
        size_t id = (size_t)json_integer_value(json_array_get(pair, 0));
        double want = json_real_value(json_array_get(pair, 1));
        if (fabs(logits[id] - want) > 2e-3 * largest)
            fail_msg("logit of token %zu is %f, the oracle has %f", id, (double)logits[id], want);
    }
}

static void test_exact_answers(void **state)
{
    (void)state;
    choir_engine *engine = open_engine(true);
    uint32_t vocab = choir_engine_config(engine)->vocab, n_compared = 0;
    json_t *chats = json_object_get(oracle, "chat");
    float *logits = malloc(sizeof *logits * vocab);
    for (size_t c = 0; c < json_array_size(chats); c++) {
        const json_t *chat = json_array_get(chats, c), *margins = json_object_get(chat, "margins");
        uint32_t prompt[256], out[64];
        uint32_t n = read_ids(json_object_get(chat, "prompt_ids"), prompt, 256);
        uint32_t n_out = read_ids(json_object_get(chat, "out_ids"), out, 64);
        sequence s = sequence_at(engine, 0, 10);
        choir_span span = sequence_span(&s, prompt, n, logits);
        span.n_logits = 1;
        for (uint32_t i = 0; i < n_out; i++) {
            assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
            sequence_advance(&s, &span);
            if (i == 0) check_first_logits(chat, logits);
            uint32_t best = 0;
            for (uint32_t v = 1; v < vocab; v++)
                if (logits[v] > logits[best]) best = v;
            if (json_number_value(json_array_get(margins, i)) > 0.02) {
                assert_int_equal(best, out[i]);
                n_compared++;
            }
            span = sequence_span(&s, &out[i], 1, logits);
        }
    }
    print_message("%u greedy tokens equal\n", n_compared);
    assert_true(n_compared > 100);
    free(logits);
    choir_engine_close(engine);
}

/* Negative log likelihood of window w's tokens 1 …, and of those of its second half. */
static double window_nll(choir_engine *engine, const uint32_t *ids, uint32_t n, double *second_half)
{
    float scores[CONTEXT];
    sequence s = sequence_at(engine, 0, CONTEXT / CHOIR_PAGE_TOKENS);
    choir_span span = sequence_span(&s, ids, n - 1, NULL);
    span.targets = ids + 1;
    span.target_logprobs = scores;
    assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
    assert_int_equal(span.status, CHOIR_OK);
    double nll = 0;
    *second_half = 0;
    for (uint32_t i = 0; i < n - 1; i++) {
        nll -= scores[i];
        if (i + 1 > CONTEXT / 2) *second_half -= scores[i];
    }
    return nll;
}

static uint32_t *gpl_ids(choir_engine *engine, size_t *n)
{
    char *text;
    size_t bytes;
    uint32_t *ids;
    if (!choir_file_exists(GPL)) {
        print_message("skipped: %s is not there\n", GPL);
        skip();
    }
    assert_int_equal(choir_file_read(GPL, 1 << 20, &text, &bytes), CHOIR_OK);
    assert_int_equal(choir_tokenizer_encode(choir_engine_tokenizer(engine), text, GPL_BYTES,
                                            CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, n),
                     CHOIR_OK);
    choir_free(text);
    assert_int_equal(*n, json_integer_value(
                             json_object_get(json_object_get(oracle, "ppl"), "tokens")));
    return ids;
}

/* Three windows here; all nine are compared by hand with `choir perplexity` (docs/verification.md). */
static void test_perplexity(void **state)
{
    (void)state;
    choir_engine *exact = open_engine(true), *fast = open_engine(false);
    size_t n;
    uint32_t *ids = gpl_ids(exact, &n);
    const json_t *windows = json_object_get(json_object_get(oracle, "ppl"), "windows");
    double nll_exact = 0, nll_fast = 0, half;
    for (uint32_t w = 0; w < 3; w++) {
        double nll = window_nll(exact, ids + (size_t)w * CONTEXT, CONTEXT, &half);
        double want = json_number_value(json_array_get(json_array_get(windows, w), 1));
        if (fabs(nll - want) > 2e-4 * want)
            fail_msg("window %u: nll %f, the oracle has %f", w, nll, want);
        nll_exact += nll;
        nll_fast += window_nll(fast, ids + (size_t)w * CONTEXT, CONTEXT, &half);
    }
    double ratio = exp((nll_fast - nll_exact) / (3 * (CONTEXT - 1)));
    print_message("perplexity fast / exact: %.5f\n", ratio);
    assert_true(fabs(ratio - 1) < 0.005);
    choir_free(ids);
    choir_engine_close(exact);
    choir_engine_close(fast);
}

int main(void)
{
    json_error_t error;
    oracle = json_load_file(ORACLE, 0, &error);
    if (oracle == NULL) {
        fprintf(stderr, "%s: %s\n", ORACLE, error.text);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact_answers),
        cmocka_unit_test(test_perplexity),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    json_decref(oracle);
    return failed;
}
