/* Tokens to text as they come: never half a character, and all pieces together are decode() of all
 * ids. */
#include "base/base.h"
#include "engine/tokenizer.h"
#include "tests/support/tokenizer_case.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define ROOT "tests/fixtures/tokenizer"

static choir_tokenizer *open_case(const char *name)
{
    return tokenizer_case_open(ROOT, name);
}

/* Valid UTF-8 as a reader would see it: no cut character at either end. */
static bool is_whole(const char *text, size_t bytes)
{
    json_t *string = json_stringn(text, bytes);
    bool whole = string != NULL;
    json_decref(string);
    return whole;
}

static void check_ids(const choir_tokenizer *t, const uint32_t *ids, size_t n, bool skip_special)
{
    char joined[8192], *text;
    const char *piece;
    size_t total = 0, bytes;
    choir_detokenizer *d;
    assert_int_equal(choir_detokenizer_create(t, skip_special, &d), CHOIR_OK);
    for (int round = 0; round < 2; round++) { /* after a flush it starts anew */
        total = 0;
        for (size_t i = 0; i <= n; i++) {
            choir_status status = i < n ? choir_detokenizer_push(d, ids[i], &piece, &bytes)
                                        : choir_detokenizer_flush(d, &piece, &bytes);
            assert_int_equal(status, CHOIR_OK);
            assert_true(is_whole(piece, bytes));
            assert_true(total + bytes < sizeof joined);
            memcpy(joined + total, piece, bytes);
            total += bytes;
        }
    }
    choir_detokenizer_destroy(d);
    assert_int_equal(choir_tokenizer_decode(t, ids, n, skip_special, &text, &bytes), CHOIR_OK);
    assert_int_equal(bytes, total);
    assert_memory_equal(text, joined, total);
    choir_free(text);
}

static uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static void pieces_join_to_the_whole(void **state)
{
    (void)state;
    static const char *const names[] = {"smollm",
                                        "llama2",
                                        "gemma",
                                        "metaspace-first-cut",
                                        "decoder-fused",
                                        "decoder-strip",
                                        "decoder-none",
                                        "llama2-normal-added",
                                        "decoder-bytelevel-last"};
    uint64_t seed = 20240611;
    print_message("seed %llu\n", (unsigned long long)seed);
    for (size_t k = 0; k < sizeof names / sizeof names[0]; k++) {
        choir_tokenizer *t = open_case(names[k]);
        for (int round = 0; round < 400; round++) {
            uint32_t ids[24], n = next_random(&seed) % 24;
            for (uint32_t i = 0; i < n; i++) ids[i] = next_random(&seed) % choir_tokenizer_n_ids(t);
            check_ids(t, ids, n, round & 1);
        }
        choir_tokenizer_destroy(t);
    }
}

static void half_a_character_is_held_back(void **state)
{
    (void)state;
    choir_tokenizer *t = open_case("smollm");
    choir_detokenizer *d;
    const char *piece;
    size_t bytes;
    uint32_t ids[4];
    /* The four bytes of U+1F600, as GPT-2 writes them. */
    static const char *const marks[] = {"\xC3\xB0", "\xC5\x81", "\xC4\xBA", "\xC4\xA2"};
    for (int i = 0; i < 4; i++) assert_true(choir_tokenizer_find(t, marks[i], 2, &ids[i]));
    assert_int_equal(choir_detokenizer_create(t, false, &d), CHOIR_OK);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(choir_detokenizer_push(d, ids[i], &piece, &bytes), CHOIR_OK);
        assert_int_equal(bytes, 0);
    }
    assert_int_equal(choir_detokenizer_push(d, ids[3], &piece, &bytes), CHOIR_OK);
    assert_int_equal(bytes, 4);
    assert_memory_equal(piece, "\xF0\x9F\x98\x80", 4);
    /* Cut short, it becomes one U+FFFD. */
    assert_int_equal(choir_detokenizer_push(d, ids[0], &piece, &bytes), CHOIR_OK);
    assert_int_equal(choir_detokenizer_push(d, ids[1], &piece, &bytes), CHOIR_OK);
    assert_int_equal(choir_detokenizer_flush(d, &piece, &bytes), CHOIR_OK);
    assert_int_equal(bytes, 3);
    assert_memory_equal(piece, "\xEF\xBF\xBD", 3);
    choir_detokenizer_destroy(d);
    choir_tokenizer_destroy(t);
}

static void an_id_beyond_the_vocabulary_is_refused(void **state)
{
    (void)state;
    choir_tokenizer *t = open_case("smollm");
    uint32_t id = choir_tokenizer_n_ids(t);
    char *text;
    size_t bytes;
    assert_int_equal(choir_tokenizer_decode(t, &id, 1, false, &text, &bytes), CHOIR_E_INVALID);
    assert_non_null(strstr(choir_error_message(), "beyond the vocabulary"));
    assert_null(choir_tokenizer_piece(t, id, &bytes));
    choir_tokenizer_destroy(t);
}

static void memory_that_runs_out_leaks_nothing(void **state)
{
    (void)state;
    choir_tokenizer *t = open_case("decoder-fused");
    uint32_t ids[] = {300, 301, 200, 201, 330, 310};
    choir_status status = CHOIR_E_NO_MEMORY;
    for (uint64_t i = 1; status != CHOIR_OK; i++) {
        char *text;
        size_t bytes;
        choir_memory_fail_at(i);
        status = choir_tokenizer_decode(t, ids, 6, false, &text, &bytes);
        choir_memory_fail_at(0);
        if (status == CHOIR_OK)
            choir_free(text);
        else
            assert_int_equal(status, CHOIR_E_NO_MEMORY);
    }
    choir_tokenizer_destroy(t);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_TOKENIZER), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pieces_join_to_the_whole),
        cmocka_unit_test(half_a_character_is_held_back),
        cmocka_unit_test(an_id_beyond_the_vocabulary_is_refused),
        cmocka_unit_test(memory_that_runs_out_leaks_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
