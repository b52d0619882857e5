/* choir_upcycle() on a tiny model: expert i is the base with adapter i merged, equal experts are
 * the dense model, every output type opens again; what does not fit is refused and leaves nothing
 * behind. */
#include "tests/engine/sequence.h"
#include "tests/tune/peft.h"
#include "tune/tune.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define BASE      "tests/fixtures/models/llama"
#define BASE_GGUF BASE ".gguf"
enum { N_TOKENS = 40 };

static const lora_shape shape = {3, 64, 160, 4, 0.5F, 0.1F};
static char folder[64];

/* A path in this test's folder; eight at a time. */
static const char *in_folder(const char *name)
{
    static char paths[8][128];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static int set_up(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/choir-upcycle-XXXXXX");
    if (mkdtemp(folder) == NULL) return 1;
    write_adapter(in_folder("one"), &shape, 1);
    write_adapter(in_folder("two"), &shape, 2);
    write_text(folder, "base.txt", "The wind blew and the old house stood on its hill.");
    write_text(folder, "one.txt", "for i in range(10): print(i * i)");
    write_text(folder, "two.txt", "It was the best of times, it was the worst of times.");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    remove_folder(folder);
    return 0;
}

static choir_status upcycle_base(const char *base, const char *one, const char *two,
                                 const char *out, choir_dtype dtype, choir_gate_init gates)
{
    char texts[3][96];
    static const char *const names[] = {"base.txt", "one.txt", "two.txt"};
    for (int i = 0; i < 3; i++) snprintf(texts[i], sizeof texts[i], "%s/%s", folder, names[i]);
    const choir_upcycle_expert experts[] = {{"one", one, texts[1]}, {"two", two, texts[2]}};
    choir_upcycle_options o = CHOIR_UPCYCLE_OPTIONS_DEFAULT;
    o.base = base;
    o.out = out;
    o.experts = experts;
    o.n_experts = 2;
    o.base_sample_text = texts[0];
    o.gates = gates;
    o.dtype = dtype;
    o.shard_bytes = 200000;
    o.n_threads = 2;
    return choir_upcycle(&o);
}

static choir_status upcycle(const char *one, const char *two, const char *out, choir_dtype dtype,
                            choir_gate_init gates)
{
    const char *base = strstr(out, ".gguf") != NULL ? BASE_GGUF : BASE;
    return upcycle_base(base, one, two, out, dtype, gates);
}

/* [N_TOKENS, vocab] in exact mode, to be freed. */
static float *logits_of(const char *path, int32_t expert, uint32_t *n)
{
    choir_engine *engine;
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.exact = true;
    o.n_threads = 1;
    if (choir_engine_open(path, &o, &engine) != CHOIR_OK) fail_msg("%s", choir_error_message());
    uint32_t vocab = choir_engine_config(engine)->vocab, tokens[N_TOKENS];
    for (uint32_t i = 0; i < N_TOKENS; i++) tokens[i] = (i * 37 + 11) % vocab;
    if (expert >= 0) assert_int_equal(choir_engine_force_expert(engine, expert), CHOIR_OK);
    *n = N_TOKENS * vocab;
    float *logits = malloc(*n * sizeof *logits);
    sequence s = sequence_at(engine, 0, 2);
    sequence_run(&s, tokens, N_TOKENS, N_TOKENS, logits);
    choir_engine_close(engine);
    return logits;
}

/* The largest difference over the largest logit. */
static double difference(const char *a, int32_t expert_a, const char *b, int32_t expert_b)
{
    uint32_t n, n_b;
    float *x = logits_of(a, expert_a, &n), *y = logits_of(b, expert_b, &n_b);
    double most = 0, largest = 0;
    assert_int_equal(n, n_b);
    for (uint32_t i = 0; i < n; i++) {
        most = fmax(most, fabs((double)x[i] - (double)y[i]));
        largest = fmax(largest, fabs((double)x[i]));
    }
    free(x);
    free(y);
    return most / largest;
}

static void must(choir_status status)
{
    if (status != CHOIR_OK) fail_msg("%s", choir_error_message());
}

/* In f32 only the order of sums differs: the merge here sums in double, choir's in float. */
static void expert_i_is_the_base_with_adapter_i(void **state)
{
    (void)state;
    write_merged(BASE, in_folder("merged1"), &shape, 1, CHOIR_F32);
    write_merged(BASE, in_folder("merged2"), &shape, 2, CHOIR_F32);
    const char *moe = in_folder("moe");
    must(upcycle(in_folder("one"), in_folder("two"), moe, CHOIR_F32, CHOIR_GATES_HIDDEN));
    assert_true(difference(moe, 0, BASE, -1) < 1e-6);
    assert_true(difference(moe, 1, in_folder("merged1"), -1) < 1e-5);
    assert_true(difference(moe, 2, in_folder("merged2"), -1) < 1e-5);
    assert_true(difference(moe, 1, BASE, -1) > 1e-2); /* the adapters do something */
    assert_true(difference(moe, 2, moe, 1) > 1e-2);
}

static void equal_experts_are_the_dense_model(void **state)
{
    (void)state;
    lora_shape nothing = shape;
    nothing.size = 0;
    write_adapter(in_folder("nothing"), &nothing, 3);
    const char *none = in_folder("nothing");
    must(upcycle(none, none, in_folder("same"), CHOIR_F32, CHOIR_GATES_HIDDEN));
    assert_true(difference(in_folder("same"), -1, BASE, -1) < 1e-5);
    must(upcycle(none, none, in_folder("uniform"), CHOIR_BF16, CHOIR_GATES_UNIFORM));
    assert_true(difference(in_folder("uniform"), -1, BASE, -1) < 1e-5);
}

/* The merged model is rounded to the type as well, so the type's own error cancels. What is left
 * are weights so near the middle of two values that the order of the merge's sums decides. */
static void an_expert_of_any_type_is_the_merged_model_in_that_type(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        choir_dtype dtype;
    } kinds[] = {
        {"f16", CHOIR_F16},        {"bf16", CHOIR_BF16},    {"q8_0.gguf", CHOIR_Q8_0},
        {"q4_1.gguf", CHOIR_Q4_1}, {"f16.gguf", CHOIR_F16}, {"bf16.gguf", CHOIR_BF16},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char moe[128];
        snprintf(moe, sizeof moe, "%s/%s", folder, kinds[i].name);
        must(upcycle(in_folder("one"), in_folder("two"), moe, kinds[i].dtype, CHOIR_GATES_HIDDEN));
        for (int32_t expert = 0; expert < 3; expert++) {
            lora_shape merged = shape;
            if (expert == 0) merged.size = 0;
            write_merged(BASE, in_folder("rounded"), &merged, (uint32_t)expert, kinds[i].dtype);
            double d = difference(moe, expert, in_folder("rounded"), -1);
            if (!(d < 1e-4)) fail_msg("%s, expert %d: %g", kinds[i].name, expert, d);
            remove_folder(in_folder("rounded"));
        }
    }
    assert_true(difference(BASE, -1, BASE_GGUF, -1) < 1e-6);
    assert_true(choir_file_exists(in_folder("bf16/model.safetensors.index.json")));
}

/* What is refused, and a word of the sentence. Nothing comes into the folder, under any name. */
static void refused(const char *one, const char *out, choir_dtype dtype, const char *word)
{
    uint32_t before = n_in_folder(folder);
    choir_status status = upcycle(one, in_folder("two"), out, dtype, CHOIR_GATES_UNIFORM);
    assert_int_not_equal(status, CHOIR_OK);
    if (strstr(choir_error_message(), word) == NULL)
        fail_msg("no '%s' in: %s", word, choir_error_message());
    assert_int_equal(n_in_folder(folder), before);
}

static void cut_file(const char *path, long bytes)
{
    assert_int_equal(truncate(path, bytes), 0);
}

static void what_does_not_fit_is_refused(void **state)
{
    (void)state;
    char out[96];
    snprintf(out, sizeof out, "%s/refused.gguf", folder);
    lora_shape wide = shape, deep = shape;
    wide.hidden = 96;
    deep.n_layers = 4;
    write_adapter(in_folder("wide"), &wide, 1);
    write_adapter(in_folder("deep"), &deep, 1);
    write_adapter(in_folder("cut"), &shape, 1);
    write_adapter(in_folder("dora"), &shape, 1);
    write_adapter(in_folder("odd"), &shape, 1);
    cut_file(in_folder("cut/adapter_model.safetensors"), 5000);
    write_text(in_folder("dora"), "adapter_config.json",
               "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"use_dora\": true}");
    write_text(in_folder("odd"), "adapter_config.json",
               "{\"peft_type\": \"LORA\", \"r\": 5, \"lora_alpha\": 8}");
    refused(in_folder("not-there"), out, CHOIR_Q8_0, "not-there");
    refused(in_folder("wide"), out, CHOIR_Q8_0, "[96, 4]");
    refused(in_folder("deep"), out, CHOIR_Q8_0, "layers.3");
    refused(in_folder("cut"), out, CHOIR_Q8_0, "adapter_model.safetensors");
    refused(in_folder("dora"), out, CHOIR_Q8_0, "use_dora");
    refused(in_folder("odd"), out, CHOIR_Q8_0, "[5, 160]");
    refused(in_folder("one"), out, CHOIR_F32, "Q8_0");
    refused(in_folder("one"), in_folder("base.txt/x.gguf"), CHOIR_Q8_0, "base.txt");
    refused(in_folder("one"), in_folder("base.txt/x"), CHOIR_BF16, "base.txt");
    refused(in_folder("one"), folder, CHOIR_BF16, "there already");
}

static size_t bytes_held(void)
{
    size_t sum = 0;
    for (choir_memory_tag t = 0; t < CHOIR_MEM_N_TAGS; t++) sum += choir_memory_bytes(t);
    return sum;
}

/* Each allocation fails once: a sentence, nothing left behind, nothing held. */
static void memory_that_runs_out(void **state)
{
    (void)state;
    char out[96];
    const size_t held = bytes_held();
    for (int kind = 0; kind < 2; kind++) {
        snprintf(out, sizeof out, "%s/memory%s", folder, kind == 0 ? ".gguf" : "");
        choir_status status = CHOIR_E_NO_MEMORY;
        uint32_t before = n_in_folder(folder);
        for (uint64_t n = 1; status != CHOIR_OK; n++) {
            choir_memory_fail_at(n);
            status = upcycle(in_folder("one"), in_folder("two"), out,
                             kind == 0 ? CHOIR_Q8_0 : CHOIR_BF16, CHOIR_GATES_HIDDEN);
            choir_memory_fail_at(0);
            if (status == CHOIR_OK) continue;
            if (status != CHOIR_E_NO_MEMORY) fail_msg("%s", choir_error_message());
            assert_int_equal(n_in_folder(folder), before);
            assert_int_equal(bytes_held(), held);
        }
        remove_folder(out);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(expert_i_is_the_base_with_adapter_i),
        cmocka_unit_test(equal_experts_are_the_dense_model),
        cmocka_unit_test(an_expert_of_any_type_is_the_merged_model_in_that_type),
        cmocka_unit_test(what_does_not_fit_is_refused),
        cmocka_unit_test(memory_that_runs_out),
    };
    return cmocka_run_group_tests_name("upcycle", tests, set_up, tear_down);
}
