/* The engine's pool over real files: what fits is registered and what does not is refused by name;
 * what is known from headers is so; an adapter of the pool computes what one that was made by hand
 * does. */
#include "tests/engine/sequence.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define MODELS   "tests/fixtures/models/"
#define ADAPTERS "tests/fixtures/adapters"
enum { N_TOKENS = 12, MAX_LIST = 128, VOCAB = 288 };

static choir_engine *open_engine(uint64_t adapter_bytes)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = 2;
    o.max_rows = 64;
    o.adapter_bytes = adapter_bytes;
    choir_engine *e;
    if (choir_engine_open(MODELS "yarn", &o, &e) != CHOIR_OK) fail_msg("%s", choir_error_message());
    return e;
}

static choir_adapters *open_pool(choir_engine *e, choir_adapter_type type)
{
    const choir_engine_adapters_options o = {.type = type, .folder = ADAPTERS};
    if (choir_engine_open_adapters(e, &o) != CHOIR_OK) fail_msg("%s", choir_error_message());
    assert_ptr_equal(choir_engine_adapters(e), choir_engine_adapters(e));
    return choir_engine_adapters(e);
}

static void pin(choir_adapters *pool, const char *name, choir_adapter_claim *claim)
{
    bool pinned = false;
    *claim = (choir_adapter_claim){0};
    if (choir_adapters_claim(pool, name, 0, claim, NULL) != CHOIR_OK)
        fail_msg("%s: %s", name, choir_error_message());
    for (int i = 0; !pinned; i++) {
        assert_true(i < 20000);
        if (choir_adapters_pin(pool, claim, 1, &pinned) != CHOIR_OK)
            fail_msg("%s: %s", name, choir_error_message());
        if (!pinned) usleep(500);
    }
}

/* Logits of some tokens behind the adapter's virtual ones. */
static void run(choir_engine *e, const choir_adapter *adapter, float *logits)
{
    uint32_t tokens[64], pages[] = {0, 1}, n = choir_adapter_n_virtual(adapter);
    const choir_adapter_use use = {adapter, 1};
    assert_true(n + N_TOKENS <= 64);
    for (uint32_t i = 0; i < n; i++) tokens[i] = VOCAB + i;
    for (uint32_t i = 0; i < N_TOKENS; i++) tokens[n + i] = 4 + i * 7;
    choir_span span = {.tokens = tokens,
                       .n_tokens = n + N_TOKENS,
                       .pages = pages,
                       .n_pages = 2,
                       .n_logits = N_TOKENS,
                       .logits = logits,
                       .adapters = &use,
                       .n_adapters = 1};
    if (choir_engine_step(e, &span, 1) != CHOIR_OK) fail_msg("%s", choir_error_message());
    assert_int_equal(span.status, CHOIR_OK);
}

static void check_one(choir_engine *e, choir_adapters *pool, const choir_adapter_info *info,
                      choir_adapter_type type)
{
    static float expected[N_TOKENS * VOCAB], got[N_TOKENS * VOCAB];
    char path[512], targets[512];
    choir_adapter_data *data;
    choir_adapter *made;
    choir_adapter_claim claim;
    snprintf(path, sizeof path, ADAPTERS "/%.256s", info->name);
    assert_int_equal(choir_adapter_data_open(choir_engine_config(e), path, &data), CHOIR_OK);
    assert_int_equal(choir_adapter_make(e, data, type, NULL, &made), CHOIR_OK);
    pin(pool, info->name, &claim);
    const choir_adapter *own = choir_adapter_claim_adapter(&claim);
    const choir_adapter_facts *f = choir_adapter_claim_facts(&claim);
    run(e, made, expected);
    run(e, own, got);
    assert_memory_equal(got, expected, sizeof got);
    assert_int_equal(choir_adapter_claim_digest(&claim), data->digest);
    assert_int_equal(f->bytes, choir_adapter_bytes(made));
    if (info->facts.bytes < f->bytes) /* what headers promise is enough */
        fail_msg("%s: %llu bytes by its headers, %llu in memory", info->name,
                 (unsigned long long)info->facts.bytes, (unsigned long long)f->bytes);
    assert_string_equal(info->facts.kind, data->kind);
    assert_int_equal(info->facts.max_rank, data->max_rank);
    assert_int_equal(info->facts.n_virtual, data->n_virtual);
    assert_int_equal(info->facts.n_parameters, data->n_parameters);
    assert_int_equal(info->facts.n_invocation, data->n_invocation);
    assert_memory_equal(info->facts.invocation, data->invocation, sizeof data->invocation);
    assert_int_equal(f->sole, !choir_adapter_mixes(made));
    size_t n = choir_adapter_targets_text(f->targets, targets, sizeof targets);
    assert_true(n == strlen(targets) && (n > 0) == (data->n_changes > 0));
    for (size_t i = 0; i < data->n_changes; i++)
        assert_non_null(strstr(targets, choir_role_text(data->changes[i].role)));
    choir_adapters_release(pool, &claim, 1);
    choir_adapter_free(made);
    choir_adapter_data_free(data);
}

static void check_folder(choir_adapter_type type)
{
    static choir_adapter_info list[MAX_LIST];
    uint32_t n_good, n_bad;
    size_t before = choir_memory_bytes(CHOIR_MEM_ADAPTERS);
    choir_engine *e = open_engine(64 << 20);
    choir_adapters *pool = open_pool(e, type);
    choir_log_set_level(CHOIR_LOG_ERROR);
    assert_int_equal(choir_adapters_register_folder(pool, ADAPTERS, &n_good, &n_bad), CHOIR_OK);
    choir_log_set_level(CHOIR_LOG_INFO);
    assert_true(n_good >= 15 && n_bad >= 10); /* other models' */
    assert_int_equal(choir_adapters_list(pool, "", list, MAX_LIST), n_good);
    for (uint32_t i = 0; i < n_good; i++) check_one(e, pool, &list[i], type);
    choir_adapters_stats t;
    choir_adapters_get_stats(pool, &t);
    assert_int_equal(t.n_loads, n_good);
    assert_true(t.n_failures == 0 && t.held_bytes <= t.budget_bytes);
    choir_engine_close(e);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_ADAPTERS), before);
}

static void test_every_fixture(void **state)
{
    (void)state;
    check_folder(CHOIR_ADAPTER_AUTO);
    check_folder(CHOIR_ADAPTER_INT8);
}

/* Whatever is wrong with it is one sentence with the adapter's name, and FAILED_PRECONDITION. */
static void test_bad_ones(void **state)
{
    (void)state;
    choir_engine *e = open_engine(64 << 20);
    choir_adapters *pool = open_pool(e, CHOIR_ADAPTER_AUTO);
    static const char *const others[] = {"mla", "experts_mixtral", "phi3_fused"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        const choir_adapter_load what = {.name = "x", .path = others[i], .beneath = true};
        assert_int_equal(choir_adapters_register(pool, &what), CHOIR_E_PRECONDITION);
        assert_true(strlen(choir_error_message()) > 20);
        assert_non_null(strstr(choir_error_message(), "x"));
        assert_int_equal(choir_adapters_load(pool, &what, NULL), CHOIR_E_PRECONDITION);
    }
    const choir_adapter_load good = {.name = "x", .path = "lora", .beneath = true};
    choir_adapter_info info;
    assert_int_equal(choir_adapters_load(pool, &good, &info), CHOIR_OK);
    assert_true(info.resident && info.digest != 0 && info.facts.max_rank > 0);
    choir_engine_close(e);
}

static void copy_file(const char *from, const char *to)
{
    char *data;
    size_t bytes;
    assert_int_equal(choir_file_read(from, 1 << 24, &data, &bytes), CHOIR_OK);
    FILE *f = fopen(to, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    fclose(f);
    choir_free(data);
}

/* Its headers are right and its numbers are not: it is known when they are read. */
static void test_nan(void **state)
{
    (void)state;
    char folder[] = "/tmp/adapters_test-XXXXXX", path[128], config[128];
    assert_non_null(mkdtemp(folder));
    snprintf(config, sizeof config, "%s/adapter_config.json", folder);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    copy_file(ADAPTERS "/lora/adapter_config.json", config);
    copy_file(ADAPTERS "/lora/adapter_model.safetensors", path);
    const float nan = __builtin_nanf("");
    FILE *f = fopen(path, "r+");
    assert_non_null(f);
    assert_int_equal(fseek(f, -4, SEEK_END), 0);
    assert_int_equal(fwrite(&nan, sizeof nan, 1, f), 1);
    fclose(f);
    choir_engine *e = open_engine(64 << 20);
    choir_adapters *pool = open_pool(e, CHOIR_ADAPTER_AUTO);
    const choir_adapter_load what = {.name = "poisoned", .path = folder};
    assert_int_equal(choir_adapters_register(pool, &what), CHOIR_OK);
    assert_int_equal(choir_adapters_load(pool, &what, NULL), CHOIR_E_PRECONDITION);
    assert_non_null(strstr(choir_error_message(), "poisoned"));
    choir_engine_close(e);
    unlink(path);
    unlink(config);
    rmdir(folder);
}

static void test_no_memory_for_adapters(void **state)
{
    (void)state;
    const choir_engine_adapters_options o = {0};
    choir_engine *e = open_engine(0);
    assert_int_equal(choir_engine_open_adapters(e, &o), CHOIR_E_INVALID);
    assert_non_null(strstr(choir_error_message(), "--adapter-memory"));
    assert_null(choir_engine_adapters(e));
    choir_engine_close(e);
    e = open_engine(1 << 20);
    assert_int_equal(choir_engine_adapter_floor(e), 1 << 20);
    assert_int_equal(choir_engine_set_adapter_bytes(e, 5), 1 << 20); /* nothing is shared */
    const choir_engine_adapters_options nowhere = {.folder = "/nonexistent"};
    assert_int_equal(choir_engine_open_adapters(e, &nowhere), CHOIR_E_INVALID);
    choir_engine_close(e);
}

static void test_targets_text(void **state)
{
    (void)state;
    char out[16];
    uint64_t targets = CHOIR_ROLE_BIT(ATTN_Q) | CHOIR_ROLE_BIT(FFN_DOWN);
    assert_int_equal(choir_adapter_targets_text(targets, out, sizeof out), 15);
    assert_string_equal(out, "ATTN_Q,FFN_DOWN");
    assert_int_equal(choir_adapter_targets_text(targets, out, 10), 15);
    assert_string_equal(out, "ATTN_Q,FF");
    assert_int_equal(choir_adapter_targets_text(targets, out, 0), 15);
    assert_int_equal(choir_adapter_targets_text(0, out, sizeof out), 0);
    assert_string_equal(out, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_fixture), cmocka_unit_test(test_bad_ones),
        cmocka_unit_test(test_nan),           cmocka_unit_test(test_no_memory_for_adapters),
        cmocka_unit_test(test_targets_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
