/* What ends an answer, and what of its text goes out. */
#include "tests/scheduler/world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { VOCAB = 64 };

/* Two letters make a text in which stop texts cut across tokens often; one token is half a
 * character. */
static choir_tokenizer *make_tokenizer(void)
{
    char json[8192];
    size_t n =
        (size_t)snprintf(json, sizeof json,
                         "{\"added_tokens\":[],\"normalizer\":null,\"pre_tokenizer\":"
                         "{\"type\":\"ByteLevel\",\"add_prefix_space\":false},\"decoder\":"
                         "{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"merges\":[],"
                         "\"vocab\":{\"a\":0,\"b\":1,\"\u00c3\":2,\"\u00a9\":3");
    for (uint32_t id = 4; id < VOCAB; id++) { /* every string of a, b with five digits of the id */
        char text[6] = {0};
        for (int i = 0; i < 5; i++) text[i] = (id >> i & 1) != 0 ? 'a' : 'b';
        n += (size_t)snprintf(json + n, sizeof json - n, ",\"%s%s\":%u", text, id < 32 ? "" : "c",
                              id);
    }
    n += (size_t)snprintf(json + n, sizeof json - n, "}}}");
    choir_tokenizer *t;
    if (choir_tokenizer_parse_json(json, n, &t) != CHOIR_OK) fail_msg("%s", choir_error_message());
    return t;
}

static const uint32_t prompt[] = {4, 5, 6};

static void test_stop_texts_cut_where_they_begin(void **state)
{
    const choir_tokenizer *t = *state;
    seed_random(7);
    uint32_t n_cut = 0;
    for (int round = 0; round < 300; round++) {
        choir_request r = plain_request(prompt, 3, 20, pick(50));
        r.ignore_eos = true;
        answer whole = run_alone(&r, t);
        assert_true(whole.text_bytes[0] > 40);
        whole.text[0][whole.text_bytes[0]] = 0;
        char stop[2][16] = {{0}};
        const char *const stops[] = {stop[0], stop[1]};
        for (int i = 0; i < 2; i++) {
            size_t at = pick((uint32_t)whole.text_bytes[0] - 16), n = 1 + pick(12);
            if (((uint8_t)whole.text[0][at] & 0xC0) == 0x80) at++; /* at a character's beginning */
            memcpy(stop[i], whole.text[0] + at, n);
            if (pick(4) == 0) stop[i][n - 1] = 'x'; /* begins well and never comes */
        }
        r.stops = stops;
        r.n_stops = 2;
        answer a = run_alone(&r, t);
        const char *hits[2] = {strstr(whole.text[0], stop[0]), strstr(whole.text[0], stop[1])};
        size_t n = whole.text_bytes[0];
        for (int i = 0; i < 2; i++)
            if (hits[i] != NULL && (size_t)(hits[i] - whole.text[0]) < n)
                n = (size_t)(hits[i] - whole.text[0]);
        if (n == whole.text_bytes[0]) {
            assert_int_equal(a.finish[0], CHOIR_FINISH_LENGTH);
            assert_int_equal(a.stop_match[0], UINT32_MAX);
            assert_int_equal(a.text_bytes[0], n);
        } else {
            assert_int_equal(a.finish[0], CHOIR_FINISH_STOP);
            /* A later text may be complete earlier: then the cut lies behind the first one's begin.
             */
            const char *cut = hits[a.stop_match[0]];
            assert_non_null(cut);
            assert_int_equal(a.text_bytes[0], cut - whole.text[0]);
            n_cut++;
        }
        assert_memory_equal(a.text[0], whole.text[0], a.text_bytes[0]);
    }
    assert_true(n_cut > 200);
}

static void test_the_end_token_has_no_text(void **state)
{
    const choir_tokenizer *t = *state;
    choir_request r = plain_request(prompt, 3, 10, 3);
    r.ignore_eos = true;
    answer whole = run_alone(&r, t);
    const uint32_t id = whole.tokens[0][5];
    r.stop_ids = &id;
    r.n_stop_ids = 1;
    uint32_t first = 0;
    while (whole.tokens[0][first] != id) first++;
    answer a = run_alone(&r, t);
    assert_int_equal(a.finish[0], CHOIR_FINISH_STOP);
    assert_int_equal(a.n[0], first + 1);
    assert_int_equal(a.tokens[0][first], id);
    assert_int_equal(a.usage.output_tokens, first + 1);
    r.n_stop_ids = 0;
    r.max_tokens = first;
    if (first > 0) {
        answer before = run_alone(&r, t);
        assert_int_equal(before.text_bytes[0], a.text_bytes[0]);
        assert_memory_equal(before.text[0], a.text[0], a.text_bytes[0]);
    }
}

static void test_min_tokens(void **state)
{
    (void)state;
    for (uint32_t seed = 0; seed < 40; seed++) {
        choir_request r = plain_request(prompt, 3, 12, seed);
        const choir_logit_bias likely = {3, 8};
        r.sampling.logit_bias = &likely; /* EOS comes at once … */
        r.sampling.n_logit_bias = 1;
        r.sampling.min_tokens = 5; /* … but not before this */
        uint32_t stop_ids[CHOIR_MAX_STOP_IDS];
        for (uint32_t i = 0; i < CHOIR_MAX_STOP_IDS; i++) stop_ids[i] = 2;
        r.stop_ids = stop_ids;
        r.n_stop_ids = seed % 2 == 0 ? 0 : CHOIR_MAX_STOP_IDS; /* EOS comes behind them */
        answer a = run_alone(&r, NULL);
        assert_true(a.n[0] > 5);
        for (uint32_t i = 0; i < 5; i++) assert_int_not_equal(a.tokens[0][i], likely.token);
    }
}

static void test_answers_end_with_the_context(void **state)
{
    (void)state;
    world w = make_world(8, small_options()); /* 32 tokens in all */
    choir_request r = plain_request(prompt, 3, 0, 1);
    r.ignore_eos = true;
    answer a = {0};
    finish(&w, submit(&w, &r), &a);
    assert_int_equal(a.status, CHOIR_OK);
    assert_int_equal(a.finish[0], CHOIR_FINISH_LENGTH);
    assert_int_equal(a.n[0], 32 - 3);
    assert_quiet(&w);
    end_world(&w);
}

/* FAULTS 29: whichever allocation of a request fails, it ends with a sentence and nothing is left.
 */
static void test_lack_of_memory(void **state)
{
    const choir_tokenizer *t = *state;
    world w = make_world_with(64, small_options(), t);
    const char *const stops[] = {"abba", "never"};
    choir_request r = plain_request(prompt, 3, 8, 1);
    r.n = 3;
    r.stops = stops;
    r.n_stops = 2;
    r.want_logprobs = true;
    bool submitted = false;
    for (uint64_t i = 1; i < 500; i++) {
        choir_stream *stream;
        choir_memory_fail_at(i);
        choir_status status = choir_scheduler_submit(w.scheduler, &r, NULL, NULL, &stream);
        answer a = {.status = status};
        if (status == CHOIR_OK) finish(&w, stream, &a);
        choir_memory_fail_at(0);
        assert_true(a.status == CHOIR_OK || a.status == CHOIR_E_NO_MEMORY);
        submitted = submitted || status == CHOIR_OK;
        assert_quiet(&w);
        if (a.status == CHOIR_OK) break;
    }
    assert_true(submitted);
    end_world(&w);
}

static int open_tokenizer(void **state)
{
    *state = make_tokenizer();
    return use_fake_clock(state);
}

static int close_tokenizer(void **state)
{
    choir_tokenizer_destroy(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stop_texts_cut_where_they_begin),
        cmocka_unit_test(test_the_end_token_has_no_text),
        cmocka_unit_test(test_min_tokens),
        cmocka_unit_test(test_answers_end_with_the_context),
        cmocka_unit_test(test_lack_of_memory),
    };
    return cmocka_run_group_tests(tests, open_tokenizer, close_tokenizer);
}
