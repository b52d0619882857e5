/* Text to ids against what Hugging Face tokenizers gave (tests/oracle/make_tokenizers.py). */
#include "base/base.h"
#include "engine/gguf.h"
#include "engine/tokenizer.h"
#include "tests/support/gguf_image.h"
#include "tests/support/tokenizer_case.h"

#include <dirent.h>
#include <jansson.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define ROOT "tests/fixtures/tokenizer"

static json_t *load(const char *path)
{
    json_error_t error;
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &error);
    if (root == NULL) fail_msg("%s: %s", path, error.text);
    return root;
}

static void check_ids(const char *name, const choir_tokenizer *t, const json_t *text,
                      choir_encode_options options, const json_t *want)
{
    uint32_t *ids;
    size_t n;
    choir_status status = choir_tokenizer_encode(t, json_string_value(text),
                                                 json_string_length(text), options, &ids, &n);
    if (status != CHOIR_OK) fail_msg("%s: %s", name, choir_error_message());
    bool same = n == json_array_size(want);
    for (size_t i = 0; same && i < n; i++)
        same = ids[i] == (uint32_t)json_integer_value(json_array_get(want, i));
    if (!same) fail_msg("%s: other ids for \"%s\"", name, json_string_value(text));
    choir_free(ids);
}

static void check_text(const char *name, const choir_tokenizer *t, const json_t *ids, bool skip,
                       const json_t *want)
{
    uint32_t list[4096];
    char *text;
    size_t n = json_array_size(ids), bytes;
    if (json_is_null(want)) return;
    assert_true(n <= 4096);
    for (size_t i = 0; i < n; i++) list[i] = (uint32_t)json_integer_value(json_array_get(ids, i));
    assert_int_equal(choir_tokenizer_decode(t, list, n, skip, &text, &bytes), CHOIR_OK);
    if (bytes != json_string_length(want) || memcmp(text, json_string_value(want), bytes) != 0)
        fail_msg("%s: decoded \"%s\", not \"%s\"", name, text, json_string_value(want));
    choir_free(text);
}

static void check_file(const char *name, const json_t *texts)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, ROOT "/cases/%s", name);
    json_t *root = load(path), *cases = json_object_get(root, "cases");
    char *json = tokenizer_case_json(ROOT, root);
    choir_tokenizer *t;
    if (choir_tokenizer_parse_json(json, strlen(json), &t) != CHOIR_OK)
        fail_msg("%s: %s", name, choir_error_message());
    free(json);
    assert_int_equal(json_array_size(texts), json_array_size(cases));
    for (size_t i = 0; i < json_array_size(cases); i++) {
        json_t *one = json_array_get(cases, i), *text = json_array_get(texts, i);
        json_t *ids = json_array_get(one, 0), *plain = json_array_get(one, 1);
        json_t *decoded = json_array_get(one, 2), *skipped = json_array_get(one, 3);
        /* 0 stands for "the same as the one before". */
        if (json_is_integer(plain)) plain = ids;
        if (json_is_integer(decoded)) decoded = text;
        if (json_is_integer(skipped)) skipped = decoded;
        check_ids(name, t, text, CHOIR_ENCODE_OPTIONS_DEFAULT, ids);
        check_ids(name, t, text, (choir_encode_options){false, false}, plain);
        check_text(name, t, ids, false, decoded);
        check_text(name, t, ids, true, skipped);
    }
    choir_tokenizer_destroy(t);
    json_decref(root);
}

static void every_component_gives_the_reference_ids(void **state)
{
    (void)state;
    json_t *texts = load(ROOT "/texts.json");
    DIR *folder = opendir(ROOT "/cases");
    assert_non_null(folder);
    size_t n = 0;
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        if (entry->d_name[0] == '.') continue;
        check_file(entry->d_name, texts);
        n++;
    }
    closedir(folder);
    json_decref(texts);
    assert_true(n > 100);
}

/* ---- SmolLM2's own file */
static choir_tokenizer *open_smol(void)
{
    char path[PATH_MAX];
    const char *given = getenv("CHOIR_TEST_MODEL"), *home = getenv("HOME");
    snprintf(path, sizeof path, "%s", given != NULL ? given : "");
    if (given == NULL)
        snprintf(path, sizeof path, "%s/.cache/choir/models/SmolLM2-135M-Instruct.Q4_1.gguf",
                 home != NULL ? home : "");
    if (!choir_file_exists(path)) {
        print_message("skipped: no model at %s\n", path);
        return NULL;
    }
    choir_gguf *gguf;
    choir_tokenizer *t;
    assert_int_equal(choir_gguf_open(path, &gguf), CHOIR_OK);
    assert_int_equal(choir_tokenizer_parse_gguf(gguf, &t), CHOIR_OK);
    choir_gguf_close(gguf); /* the tokenizer keeps copies */
    return t;
}

static void smollm_from_gguf_gives_the_reference_ids(void **state)
{
    (void)state;
    choir_tokenizer *t = open_smol();
    if (t == NULL) skip();
    json_t *cases = load(ROOT "/smollm2.json"), *one;
    size_t i;
    json_array_foreach(cases, i, one)
    {
        check_ids("smollm2", t, json_array_get(one, 0), CHOIR_ENCODE_OPTIONS_DEFAULT,
                  json_array_get(one, 1));
        check_text("smollm2", t, json_array_get(one, 1), false, json_array_get(one, 0));
    }
    json_decref(cases);
    assert_string_equal(choir_tokenizer_kind(t), "byte-level BPE");
    assert_int_equal(choir_tokenizer_bos(t), 1);
    assert_int_equal(choir_tokenizer_eos(t), 2);
    assert_int_equal(choir_tokenizer_n_ids(t), 49152);
    assert_true(choir_tokenizer_is_special(t, 2));
    choir_tokenizer_destroy(t);
}

/* ---- a text of many scripts, emoji, code and odd spaces: all ids, by their hash. The same on a
 * megabyte: tests/oracle/compare_tokenizer.py. */
static uint64_t hash_of(const uint32_t *ids, size_t n)
{
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++)
        for (int byte = 0; byte < 4; byte++) h = (h ^ (ids[i] >> 8 * byte & 0xFF)) * 0x100000001B3u;
    return h;
}

static void check_mixed(const char *name, const choir_tokenizer *t, const char *text, size_t bytes,
                        const json_t *want)
{
    uint32_t *ids;
    size_t n;
    assert_int_equal(choir_tokenizer_encode(t, text, bytes, CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n),
                     CHOIR_OK);
    uint64_t hash = strtoull(json_string_value(json_array_get(want, 1)), NULL, 16);
    if ((json_int_t)n != json_integer_value(json_array_get(want, 0)) || hash_of(ids, n) != hash)
        fail_msg("%s: %zu ids of mixed.txt, other ones than the reference", name, n);
    choir_free(ids);
}

static void a_text_of_many_scripts_gives_the_reference_ids(void **state)
{
    (void)state;
    char *text;
    size_t bytes;
    json_t *all = load(ROOT "/mixed.json"), *want;
    const char *name;
    assert_int_equal(choir_file_read(ROOT "/mixed.txt", 1 << 20, &text, &bytes), CHOIR_OK);
    json_object_foreach(all, name, want)
    {
        bool gguf = strcmp(name, "gguf") == 0;
        choir_tokenizer *t = gguf ? open_smol() : tokenizer_case_open(ROOT, name);
        if (t != NULL) check_mixed(name, t, text, bytes, want);
        choir_tokenizer_destroy(t);
    }
    choir_free(text);
    json_decref(all);
}

/* ---- what a GGUF file names, against the tokenizer.json of the same model */
static void put_model(gguf_image *image, const json_t *model)
{
    const json_t *vocab = json_object_get(model, "vocab"),
                 *merges = json_object_get(model, "merges");
    size_t n = json_object_size(vocab), i;
    const char **pieces = calloc(n, sizeof *pieces), *piece;
    json_t *id, *merge;
    json_object_foreach((json_t *)vocab, piece, id) pieces[json_integer_value(id)] = piece;
    gguf_put_array(image, "tokenizer.ggml.tokens", GGUF_STRING, n);
    for (i = 0; i < n; i++) gguf_put_text(image, (choir_text){pieces[i], strlen(pieces[i])});
    gguf_put_array(image, "tokenizer.ggml.token_type", GGUF_I32, n);
    for (i = 0; i < n; i++) gguf_put(image, &(int32_t){i < 3 ? 3 : 1}, sizeof(int32_t));
    gguf_put_array(image, "tokenizer.ggml.merges", GGUF_STRING, json_array_size(merges));
    json_array_foreach(merges, i, merge)
    {
        char text[256];
        int bytes =
            snprintf(text, sizeof text, "%s %s", json_string_value(json_array_get(merge, 0)),
                     json_string_value(json_array_get(merge, 1)));
        gguf_put_text(image, (choir_text){text, (size_t)bytes});
    }
    free(pieces);
}

static choir_tokenizer *open_pre(const json_t *model, const char *pre)
{
    gguf_image image = {0};
    choir_gguf *gguf;
    choir_tokenizer *t;
    gguf_image_begin(&image);
    gguf_put_key(&image, "tokenizer.ggml.model", GGUF_STRING);
    gguf_put_text(&image, (choir_text){"gpt2", 4});
    gguf_put_key(&image, "tokenizer.ggml.pre", GGUF_STRING);
    gguf_put_text(&image, (choir_text){pre, strlen(pre)});
    gguf_put_u32(&image, "tokenizer.ggml.bos_token_id", 1);
    put_model(&image, model);
    gguf_image_end(&image);
    assert_int_equal(choir_gguf_parse("image", image.bytes, image.n, &gguf), CHOIR_OK);
    if (choir_tokenizer_parse_gguf(gguf, &t) != CHOIR_OK) fail_msg("%s", choir_error_message());
    choir_gguf_close(gguf);
    gguf_image_free(&image);
    return t;
}

static void pre_tokenizers_of_gguf_agree_with_tokenizer_json(void **state)
{
    (void)state;
    static const struct {
        const char *pre, *json;
    } same[] = {
        {"gpt-2", "gpt2"},        {"smollm", "smollm"},      {"llama-bpe", "llama3"},
        {"qwen2", "qwen2"},       {"qwen35", "qwen35"},      {"deepseek-v3", "deepseek3"},
        {"gpt-4o", "gpt4o"},      {"bloom", "bloom"},        {"deepseek-coder", "deepseek-coder"},
        {"superbpe", "superbpe"}, {"tiny_aya", "thousands"},
    };
    char *text;
    size_t bytes;
    json_t *all = load(ROOT "/mixed.json"), *model = load(ROOT "/models/byte.json");
    assert_int_equal(choir_file_read(ROOT "/mixed.txt", 1 << 20, &text, &bytes), CHOIR_OK);
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        choir_tokenizer *t = open_pre(model, same[i].pre);
        check_mixed(same[i].pre, t, text, bytes, json_object_get(all, same[i].json));
        choir_tokenizer_destroy(t);
    }
    choir_free(text);
    json_decref(model);
    json_decref(all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_component_gives_the_reference_ids),
        cmocka_unit_test(smollm_from_gguf_gives_the_reference_ids),
        cmocka_unit_test(a_text_of_many_scripts_gives_the_reference_ids),
        cmocka_unit_test(pre_tokenizers_of_gguf_agree_with_tokenizer_json),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
