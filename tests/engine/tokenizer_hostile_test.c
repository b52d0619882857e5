/* What a hostile tokenizer file or text can bring: it is refused or done in linear time, it holds
 * no memory afterwards. The files are seeds of the fuzz targets, changed. */
#include "base/base.h"
#include "engine/tokenizer.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define SEEDS "tests/fuzz/seeds/tokenizer_json_fuzz"

static json_t *load_seed(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, SEEDS "/%s", name);
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, NULL);
    assert_non_null(root);
    return root;
}

/* The seed with one part exchanged; `part` is given away. */
static choir_status parse_changed(const char *seed, const char *field, json_t *part,
                                  choir_tokenizer **out)
{
    json_t *root = load_seed(seed);
    assert_non_null(part);
    json_object_set_new(root, field, part);
    char *json = json_dumps(root, JSON_COMPACT);
    choir_status status = choir_tokenizer_parse_json(json, strlen(json), out);
    free(json);
    json_decref(root);
    return status;
}

static json_t *split(const char *pattern)
{
    return json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern", "Regex", pattern,
                     "behavior", "Isolated", "invert", 0);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The status of encoding n times `fill` and then `end`. */
static choir_status encode_repeated(const choir_tokenizer *t, char fill, size_t n, char end)
{
    char *text = malloc(n + 1);
    uint32_t *ids = NULL;
    size_t n_ids;
    memset(text, fill, n);
    text[n] = end;
    choir_status status =
        choir_tokenizer_encode(t, text, n + 1, CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n_ids);
    if (status == CHOIR_OK) choir_free(ids);
    free(text);
    return status;
}

/* Loops over single characters one behind the other, which PCRE2's JIT does not count itself. */
static void a_pattern_that_backtracks_is_stopped(void **state)
{
    (void)state;
    static const char *const patterns[] = {
        "(?=[^x]*[^w]*[^v]*[yz])a",
        "[^x]*b?[^w]*c?[^v]*[yz]",
        "[^x]*[^x]*[^x]*[yz]",
        "(a*)*[yz]",
        "(?:a|a)*[yz]",
        "(?:[^x]*(?>[^w]*))y|z",
        "a*?a*?a*?a*?[yz]",
        "a{0,9}+a*a*a{0,9}?a*[yz]",
    };
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        choir_tokenizer *t;
        assert_int_equal(parse_changed("smollm", "pre_tokenizer", split(patterns[i]), &t),
                         CHOIR_OK);
        double start = seconds();
        choir_status status = encode_repeated(t, 'a', 20000, 'a');
        double took = seconds() - start;
        if (status != CHOIR_OK) {
            assert_int_equal(status, CHOIR_E_INVALID);
            assert_non_null(strstr(choir_error_message(), "too many steps"));
        }
        if (took > 20) fail_msg("%s took %.1f s on 20 kB", patterns[i], took);
        choir_tokenizer_destroy(t);
    }
}

/* Models' own patterns meet the texts that are hardest for them, a megabyte long. */
static void long_runs_are_no_hostile_texts(void **state)
{
    (void)state;
    static const char *const patterns[] = {
        "\\s+$",
        "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        "\\p{N}{1,3}",
        "[\\p{Lu}\\p{Lo}&&[^\\p{Han}]]*[\\p{Ll}\\p{Lo}&&[^\\p{Han}]]+|[\\p{Lu}&&[^\\p{Han}]]+|[a-z&"
        "&[^b]]+",
        "(?:a|b|A|1|\\s)+",
        "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lo}]*[\\p{Ll}\\p{Lo}]+(?i:'s|'t)?|[\\p{Lu}\\p{Lo}]+[\\p{"
        "Ll}]*",
    };
    static const char fills[] = " a1A\n.";
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        choir_tokenizer *t;
        assert_int_equal(parse_changed("smollm", "pre_tokenizer", split(patterns[i]), &t),
                         CHOIR_OK);
        for (const char *fill = fills; *fill != '\0'; fill++) {
            assert_int_equal(encode_repeated(t, *fill, 1 << 20, '1'), CHOIR_OK);
            assert_int_equal(encode_repeated(t, *fill, 1 << 20, 'x'), CHOIR_OK);
        }
        choir_tokenizer_destroy(t);
    }
}

/* The first of the spaces takes all others, as in the reference; so does the second, … */
static void spaces_behind_added_tokens_are_walked_once(void **state)
{
    (void)state;
    static const char spaces[] = "[{\"content\":\" \",\"rstrip\":true,\"normalized\":false}]";
    choir_tokenizer *t;
    assert_int_equal(parse_changed("smollm", "added_tokens", json_loads(spaces, 0, NULL), &t),
                     CHOIR_OK);
    double start = seconds();
    assert_int_equal(encode_repeated(t, ' ', 1 << 20, 'a'), CHOIR_OK);
    double took = seconds() - start;
    if (took > 20) fail_msg("a megabyte of spaces took %.1f s", took);
    choir_tokenizer_destroy(t);
}

static void an_endless_added_token_is_refused(void **state)
{
    (void)state;
    char content[2000];
    memset(content, 'a', sizeof content);
    choir_tokenizer *t;
    assert_int_equal(parse_changed("smollm", "added_tokens",
                                   json_pack("[{s:s%}]", "content", content, sizeof content), &t),
                     CHOIR_E_FORMAT);
    assert_non_null(strstr(choir_error_message(), "the limit is 1024"));
}

/* Each of these makes 64 of every character, and of what the one before made. */
static void replacements_do_not_multiply(void **state)
{
    (void)state;
    json_t *list = json_array();
    char content[65] = "";
    memset(content, 'a', 64);
    for (int i = 0; i < 30; i++)
        json_array_append_new(list, json_pack("{s:s, s:{s:s}, s:s}", "type", "Replace", "pattern",
                                              "Regex", "a|e", "content", content));
    choir_tokenizer *t;
    uint32_t ids[4], n;
    char *text;
    size_t bytes;
    assert_int_equal(parse_changed("smollm", "decoder",
                                   json_pack("{s:s, s:o}", "type", "Sequence", "decoders", list),
                                   &t),
                     CHOIR_OK);
    for (n = 0; n < 4; n++) assert_true(choir_tokenizer_find(t, n & 1 ? "e" : "a", 1, &ids[n]));
    assert_int_equal(choir_tokenizer_decode(t, ids, 4, false, &text, &bytes), CHOIR_E_INVALID);
    assert_non_null(strstr(choir_error_message(), "beyond any use"));
    choir_tokenizer_destroy(t);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_TOKENIZER), 0);
}

static void a_pattern_of_many_classes_is_refused(void **state)
{
    (void)state;
    char pattern[16001];
    for (size_t i = 0; i < 16000; i++) pattern[i] = i & 1 ? 'w' : '\\';
    pattern[16000] = '\0';
    choir_tokenizer *t;
    assert_int_equal(parse_changed("smollm", "pre_tokenizer", split(pattern), &t),
                     CHOIR_E_UNIMPLEMENTED);
}

static void a_text_that_is_no_utf8_is_refused_with_its_place(void **state)
{
    (void)state;
    choir_tokenizer *t;
    uint32_t *ids;
    size_t n;
    assert_int_equal(parse_changed("smollm", "version", json_string("1.0"), &t), CHOIR_OK);
    static const char *const bad[] = {"abc\xFF", "abc\xC3", "abc\xED\xA0\x80", "abc\xC0\x80"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(choir_tokenizer_encode(t, bad[i], strlen(bad[i]),
                                                CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n),
                         CHOIR_E_INVALID);
        assert_non_null(strstr(choir_error_message(), "at byte 3"));
    }
    choir_tokenizer_destroy(t);
}

/* Cut anywhere, or with any byte changed, a file is loaded or refused; memory comes back. */
static void a_broken_file_leaks_nothing(void **state)
{
    (void)state;
    static const char *const names[] = {"smollm", "llama2", "normal-sequence", "added-flags"};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        json_t *root = load_seed(names[k]);
        char *json = json_dumps(root, JSON_COMPACT);
        size_t bytes = strlen(json);
        for (size_t i = 0; i < bytes; i += 7) {
            choir_tokenizer *t;
            assert_int_not_equal(choir_tokenizer_parse_json(json, i, &t), CHOIR_OK);
            char was = json[i];
            json[i] = (char)("\"0}{,:]a"[i & 7]);
            if (choir_tokenizer_parse_json(json, bytes, &t) == CHOIR_OK) choir_tokenizer_destroy(t);
            json[i] = was;
        }
        free(json);
        json_decref(root);
        assert_int_equal(choir_memory_bytes(CHOIR_MEM_TOKENIZER), 0);
    }
}

static choir_status parse_and_encode(const char *json, size_t bytes)
{
    choir_tokenizer *t;
    uint32_t *ids;
    size_t n;
    choir_status status = choir_tokenizer_parse_json(json, bytes, &t);
    if (status != CHOIR_OK) return status;
    status = choir_tokenizer_encode(t, "He said: <s>\xC3\xA9 12 a", 17,
                                    CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n);
    if (status == CHOIR_OK) choir_free(ids);
    choir_tokenizer_destroy(t);
    return status;
}

static void memory_that_runs_out_leaks_nothing(void **state)
{
    (void)state;
    static const char *const names[] = {"smollm", "llama2", "normal-sequence",
                                        "added-flags-normal"};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        json_t *root = load_seed(names[k]);
        char *json = json_dumps(root, JSON_COMPACT);
        choir_status status = CHOIR_E_NO_MEMORY;
        for (uint64_t i = 1; status != CHOIR_OK; i++) {
            choir_memory_fail_at(i);
            status = parse_and_encode(json, strlen(json));
            choir_memory_fail_at(0);
            assert_true(status == CHOIR_OK || status == CHOIR_E_NO_MEMORY);
            assert_int_equal(choir_memory_bytes(CHOIR_MEM_TOKENIZER), 0);
        }
        free(json);
        json_decref(root);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_pattern_that_backtracks_is_stopped),
        cmocka_unit_test(long_runs_are_no_hostile_texts),
        cmocka_unit_test(spaces_behind_added_tokens_are_walked_once),
        cmocka_unit_test(an_endless_added_token_is_refused),
        cmocka_unit_test(replacements_do_not_multiply),
        cmocka_unit_test(a_pattern_of_many_classes_is_refused),
        cmocka_unit_test(a_text_that_is_no_utf8_is_refused_with_its_place),
        cmocka_unit_test(a_broken_file_leaks_nothing),
        cmocka_unit_test(memory_that_runs_out_leaks_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
