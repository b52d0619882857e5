/* Model files read back what was written, and refuse what is cut, changed or hostile with a sentence.
 * FAULTS 17, 18. tests/oracle/make_file_seeds.py wrote the fixtures. */
#include "engine/engine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define GGUF_FILE "tests/fixtures/files/small.gguf"
#define SAFETENSORS_FILE "tests/fixtures/files/small.safetensors"

typedef struct bytes {
    uint8_t *data;
    size_t n;
} bytes;

static bytes read_file(const char *path)
{
    char *data;
    size_t n;
    assert_int_equal(choir_file_read(path, 1 << 20, &data, &n), CHOIR_OK);
    bytes b = {malloc(n), n};
    memcpy(b.data, data, n);
    choir_free(data);
    return b;
}

static choir_status parse_gguf(const uint8_t *data, size_t n)
{
    choir_gguf *gguf;
    choir_status status = choir_gguf_parse("test.gguf", data, n, &gguf);
    if (status == CHOIR_OK)
        choir_gguf_close(gguf);
    else if (status != CHOIR_E_NO_MEMORY)
        assert_non_null(strstr(choir_error_message(), "test.gguf"));
    return status;
}

static choir_status parse_safetensors(const uint8_t *data, size_t n)
{
    choir_safetensors *file;
    choir_status status = choir_safetensors_parse("test.safetensors", data, n, &file);
    if (status == CHOIR_OK)
        choir_safetensors_close(file);
    else if (status != CHOIR_E_NO_MEMORY)
        assert_non_null(strstr(choir_error_message(), "test.safetensors"));
    return status;
}

static void test_gguf_values(void **state)
{
    (void)state;
    choir_gguf *g;
    int64_t integer;
    double real;
    choir_text text;
    assert_int_equal(choir_gguf_open(GGUF_FILE, &g), CHOIR_OK);
    assert_true(choir_gguf_integer(g, "a.integer", &integer) && integer == -7);
    assert_true(choir_gguf_integer(g, "a.flag", &integer) && integer == 1);
    assert_true(choir_gguf_real(g, "a.real", &real) && real == 2.5);
    assert_false(choir_gguf_integer(g, "a.real", &integer));
    assert_false(choir_gguf_real(g, "no.such.key", &real));
    assert_true(choir_gguf_string(g, "general.name", &text) && text.bytes == 5);
    const choir_gguf_array *tokens = choir_gguf_find_array(g, "tokenizer.ggml.tokens");
    assert_int_equal(choir_gguf_array_count(tokens), 4);
    assert_true(choir_gguf_array_string(tokens, 3, &text) && memcmp(text.data, "é", 2) == 0);
    assert_false(choir_gguf_array_string(tokens, 4, &text));
    assert_true(choir_gguf_array_real(choir_gguf_find_array(g, "tokenizer.ggml.scores"), 1, &real));
    assert_true(real == -1.5);
    const choir_gguf_tensor *t = choir_gguf_find_tensor(g, "y.Q4_1");
    assert_int_equal(t->dtype, CHOIR_Q4_1);
    assert_int_equal(t->bytes, 2 * 2 * 20);
    assert_int_equal(choir_gguf_find_tensor(g, "x")->dims[0], 5);
    assert_null(choir_gguf_find_tensor(g, "z"));
    choir_gguf_close(g);
}

/* Each shorter file is refused; each file with one byte changed is parsed or refused. The copies lie at
 * the end of their own heap block, so that the sanitizer sees a read beyond. The last `padding` bytes of
 * the file belong to nothing. */
static void cut_and_change(const char *path, size_t padding, choir_status (*parse)(const uint8_t *, size_t))
{
    bytes whole = read_file(path);
    assert_int_equal(parse(whole.data, whole.n), CHOIR_OK);
    for (size_t n = 0; n < whole.n - padding; n++) {
        uint8_t *copy = malloc(n + 1);
        memcpy(copy + 1, whole.data, n);
        assert_int_not_equal(parse(copy + 1, n), CHOIR_OK);
        free(copy);
    }
    for (size_t i = 0; i < whole.n; i++)
        for (int bit = 0; bit < 8; bit++) {
            uint8_t *copy = malloc(whole.n);
            memcpy(copy, whole.data, whole.n);
            copy[i] ^= (uint8_t)(1 << bit);
            choir_status status = parse(copy, whole.n);
            assert_true(status == CHOIR_OK || status == CHOIR_E_FORMAT || status == CHOIR_E_UNIMPLEMENTED);
            free(copy);
        }
    free(whole.data);
}

static void test_gguf_cut_and_changed(void **state)
{
    (void)state;
    cut_and_change(GGUF_FILE, 16, parse_gguf);
}

static void test_safetensors_cut_and_changed(void **state)
{
    (void)state;
    cut_and_change(SAFETENSORS_FILE, 0, parse_safetensors);
}

static void expect_gguf(const char *sentence, size_t at, const void *patch, size_t n)
{
    bytes b = read_file(GGUF_FILE);
    memcpy(b.data + at, patch, n);
    assert_int_not_equal(parse_gguf(b.data, b.n), CHOIR_OK);
    if (strstr(choir_error_message(), sentence) == NULL) fail_msg("'%s' lacks '%s'", choir_error_message(), sentence);
    free(b.data);
}

static void test_gguf_hostile(void **state)
{
    (void)state;
    const uint64_t huge = UINT64_C(1) << 63, many = UINT64_MAX;
    expect_gguf("not a GGUF", 0, "GGML", 4);
    expect_gguf("version 2", 4, "\2\0\0\0", 4);
    expect_gguf("tensor count at byte 8", 8, &huge, 8);
    expect_gguf("metadata count at byte 16", 16, &many, 8);
    expect_gguf("key", 24, &huge, 8);
    /* The first tensor's dimensions lie behind its name "x" and its count of dimensions. */
    bytes b = read_file(GGUF_FILE);
    const uint8_t name[] = {1, 0, 0, 0, 0, 0, 0, 0, 'x', 2, 0, 0, 0};
    const uint8_t *table = memmem(b.data, b.n, name, sizeof name);
    assert_non_null(table);
    size_t at = (size_t)(table - b.data) + sizeof name;
    const uint64_t zero = 0;
    const uint32_t type = 99;
    expect_gguf("absurd dimension", at, &zero, 8);
    expect_gguf("absurd dimension", at, &huge, 8);
    expect_gguf("type 99", at + 16, &type, 4);
    expect_gguf("misaligned", at + 20, &(const uint64_t){1}, 8);
    expect_gguf("truncated", at + 20, &(const uint64_t){UINT64_MAX - 31}, 8);
    free(b.data);
}

static choir_status parse_header(const char *json, size_t data_bytes)
{
    uint64_t n = strlen(json);
    uint8_t *file = calloc(1, 8 + n + data_bytes);
    memcpy(file, &n, 8);
    memcpy(file + 8, json, n);
    choir_status status = parse_safetensors(file, 8 + n + data_bytes);
    free(file);
    return status;
}

static void test_safetensors_hostile(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "[]",
        "{\"x\":1}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[5,9]}}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}",
        "{\"x\":{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}",
    };
    assert_int_equal(parse_header("{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 8), CHOIR_OK);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_not_equal(parse_header(bad[i], 8), CHOIR_OK);
    const uint64_t long_header[2] = {UINT64_C(1) << 40, 0};
    assert_int_equal(parse_safetensors((const uint8_t *)long_header, 16), CHOIR_E_FORMAT);
}

/* A folder with one field of the tiny llama's config.json changed. */
static choir_model_config changed; /* of the last folder that opened */

static choir_status open_changed(const char *key, json_t *value)
{
    char folder[] = "/tmp/choir-files-XXXXXX", path[256];
    json_error_t error;
    assert_non_null(mkdtemp(folder));
    json_t *config = json_load_file("tests/fixtures/models/llama/config.json", 0, &error);
    if (value == NULL)
        json_object_del(config, key);
    else
        json_object_set_new(config, key, value);
    snprintf(path, sizeof path, "%s/config.json", folder);
    assert_int_equal(json_dump_file(config, path, 0), 0);
    json_decref(config);
    char target[4096];
    assert_non_null(realpath("tests/fixtures/models/llama/model.safetensors", target));
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    assert_int_equal(symlink(target, path), 0);
    choir_model_file *file;
    choir_status status = choir_model_file_open(folder, &file);
    if (status == CHOIR_OK) {
        changed = *choir_model_file_config(file);
        choir_model_file_close(file);
    }
    unlink(path);
    snprintf(path, sizeof path, "%s/config.json", folder);
    unlink(path);
    rmdir(folder);
    return status;
}

static void test_configurations(void **state)
{
    (void)state;
    assert_int_equal(open_changed("head_dim", json_null()), CHOIR_OK);
    assert_int_equal(open_changed("rope_parameters", NULL), CHOIR_OK);
    assert_int_equal(open_changed("num_key_value_heads", json_integer(3)), CHOIR_E_FORMAT);
    assert_int_equal(open_changed("hidden_size", json_integer(128)), CHOIR_E_FORMAT);
    assert_int_equal(open_changed("hidden_size", json_integer(-5)), CHOIR_E_FORMAT);
    assert_int_equal(open_changed("vocab_size", json_integer(0)), CHOIR_E_FORMAT);
    assert_int_equal(open_changed("num_hidden_layers", json_integer(4)), CHOIR_E_NOT_FOUND);
    assert_int_equal(open_changed("num_attention_heads", json_integer(0)), CHOIR_E_FORMAT);
    assert_int_equal(open_changed("hidden_act", json_string("gelu")), CHOIR_E_UNIMPLEMENTED);
    assert_int_equal(open_changed("model_type", json_string("lama")), CHOIR_E_UNIMPLEMENTED);
    assert_non_null(strstr(choir_error_message(), "llama"));
    assert_int_equal(open_changed("rope_parameters", json_pack("{s:s}", "rope_type", "spiral")),
                     CHOIR_E_UNIMPLEMENTED);
    assert_int_equal(open_changed("rope_parameters", json_pack("{s:s, s:f}", "rope_type", "yarn", "factor",
                                                               0.5)), CHOIR_E_FORMAT);
    assert_int_equal(open_changed("attention_bias", json_true()), CHOIR_E_NOT_FOUND);
    assert_non_null(strstr(choir_error_message(), "q_proj.bias"));
    assert_int_equal(open_changed("tie_word_embeddings", json_true()), CHOIR_OK);
    assert_int_equal(open_changed("num_hidden_layers", json_integer(2)), CHOIR_E_UNIMPLEMENTED);
    assert_non_null(strstr(choir_error_message(), "no place"));
    assert_int_equal(open_changed("model_type", NULL), CHOIR_E_FORMAT);
    assert_int_equal(open_changed("rms_norm_eps", json_real(1e300)), CHOIR_E_FORMAT);
    assert_int_equal(
        open_changed("rope_parameters", json_pack("{s:s, s:f}", "rope_type", "linear", "factor", 1e300)),
        CHOIR_E_FORMAT);
}

static void test_ids_beyond_the_vocabulary_are_none(void **state)
{
    (void)state;
    static const json_int_t ids[] = {-2, 512, INT64_C(1) << 32, INT64_MIN};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        assert_int_equal(open_changed("bos_token_id", json_integer(ids[i])), CHOIR_OK);
        assert_int_equal(changed.bos_id, -1);
        assert_int_equal(open_changed("eos_token_id", json_pack("[I, i]", ids[i], 511)), CHOIR_OK);
        assert_int_equal(changed.n_eos, 1);
        assert_int_equal(changed.eos_ids[0], 511);
    }
    assert_int_equal(open_changed("pad_token_id", json_integer(511)), CHOIR_OK);
    assert_int_equal(changed.pad_id, 511);
}

static void test_lack_of_memory(void **state)
{
    (void)state;
    bytes g = read_file(GGUF_FILE), s = read_file(SAFETENSORS_FILE);
    for (uint64_t i = 1;; i++) {
        choir_memory_fail_at(i);
        choir_status a = parse_gguf(g.data, g.n);
        choir_memory_fail_at(i);
        choir_status b = parse_safetensors(s.data, s.n);
        choir_memory_fail_at(0);
        assert_true(a == CHOIR_OK || a == CHOIR_E_NO_MEMORY);
        assert_true(b == CHOIR_OK || b == CHOIR_E_NO_MEMORY);
        if (a == CHOIR_OK && b == CHOIR_OK) break;
    }
    free(g.data);
    free(s.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gguf_values),
        cmocka_unit_test(test_gguf_cut_and_changed),
        cmocka_unit_test(test_safetensors_cut_and_changed),
        cmocka_unit_test(test_gguf_hostile),
        cmocka_unit_test(test_safetensors_hostile),
        cmocka_unit_test(test_configurations),
        cmocka_unit_test(test_ids_beyond_the_vocabulary_are_none),
        cmocka_unit_test(test_lack_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
