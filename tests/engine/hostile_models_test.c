/* Models with something wrong in their descriptions: refused in a sentence, or run without a fault.
 * The sanitizers watch. */
#include "tests/engine/sequence.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* Latent attention and groups; MXFP4, biases and sinks; norms after blocks and two ropes; fused
 * tensors and rope's divisors; another layout of experts. */
static const char *const models[] = {"deepseek_v3", "gpt_oss_mxfp4", "gemma3", "phi3_long",
                                     "mixtral_odd"};

static uint64_t state_of_dice = 4711;

static uint32_t below(uint32_t n)
{
    state_of_dice = state_of_dice * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(state_of_dice >> 33) % n;
}

static void write_file(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* Opens it and, if that works, runs a step of five tokens. */
static choir_status open_and_step(const char *path, bool exact)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.exact = exact;
    o.n_threads = 1;
    o.max_rows = 8;
    o.max_spans = 1;
    choir_engine *engine;
    choir_status status = choir_engine_open(path, &o, &engine);
    if (status != CHOIR_OK) {
        assert_true(strlen(choir_error_message()) > 10);
        return status;
    }
    static const uint32_t tokens[] = {5, 6, 7, 8, 9};
    sequence s = sequence_at(engine, 0, 1);
    choir_span span = sequence_span(&s, tokens, 5, NULL);
    if (choir_engine_config(engine)->max_positions >= 5)
        assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
    choir_engine_close(engine);
    return CHOIR_OK;
}

/* Where the metadata of the model (not the tokenizer's long lists) and the tensors' table lie,
 * bytes are changed at random. */
static void change_bytes(const char *name, uint32_t n_rounds)
{
    char path[256], copy[] = "/tmp/choir-hostile-XXXXXX";
    char *data;
    size_t n;
    snprintf(path, sizeof path, "tests/fixtures/models/%s.gguf", name);
    assert_int_equal(choir_file_read(path, 1 << 20, &data, &n), CHOIR_OK);
    const char *lists = memmem(data, n, "tokenizer.ggml.model", 20);
    const char *table = memmem(data, n, "blk.0.", 6);
    assert_true(lists != NULL && table != NULL);
    size_t head = (size_t)(lists - data), first = (size_t)(table - data);
    close(mkstemp(copy));
    uint32_t n_opened = 0;
    for (uint32_t round = 0; round < n_rounds; round++) {
        size_t at[3];
        char old[3];
        const int n_changes = 1 + (int)(round % 3);
        for (int i = 0; i < n_changes; i++) {
            at[i] = below(2) ? 24 + below((uint32_t)head - 24) : first + below(2500);
            old[i] = data[at[i]];
            data[at[i]] =
                (char)(below(3) == 0 ? below(256) : (unsigned char)old[i] ^ (1U << below(8)));
        }
        write_file(copy, data, n);
        n_opened += open_and_step(copy, round % 2 == 0) == CHOIR_OK;
        for (int i = n_changes - 1; i >= 0; i--) data[at[i]] = old[i];
    }
    print_message("%s: %u of %u changed files ran\n", name, n_opened, n_rounds);
    remove(copy);
    choir_free(data);
}

static void test_changed_bytes(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) change_bytes(models[i], 300);
}

/* Any tensor that is called something else is missed by its name, or has no place. */
static void test_renamed_tensors(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char path[256], copy[] = "/tmp/choir-hostile-XXXXXX";
        char *data;
        size_t n;
        snprintf(path, sizeof path, "tests/fixtures/models/%s.gguf", models[i]);
        assert_int_equal(choir_file_read(path, 1 << 20, &data, &n), CHOIR_OK);
        close(mkstemp(copy));
        char *at = data;
        for (uint32_t found = 0; (at = memmem(at, n - (size_t)(at - data), "blk.1.", 6)) != NULL;
             found++) {
            at[6] ^= 1;
            write_file(copy, data, n);
            choir_status status = open_and_step(copy, true);
            if (status != CHOIR_E_NOT_FOUND && status != CHOIR_E_UNIMPLEMENTED &&
                status != CHOIR_E_FORMAT)
                fail_msg("%s: %.30s renamed: status %d", models[i], at, (int)status);
            at[6] ^= 1;
            at += 6;
        }
        remove(copy);
        choir_free(data);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_changed_bytes),
        cmocka_unit_test(test_renamed_tensors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
