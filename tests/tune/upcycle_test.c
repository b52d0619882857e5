/* choir_upcycle() on a tiny model: expert i is the base with adapter i merged, equal experts are
 * the dense model, every output type opens again; what does not fit is refused and leaves nothing
 * behind. */
#include "tests/engine/sequence.h"
#include "tests/tune/peft.h"
#include "tune/tune.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define BASE      "tests/fixtures/models/llama"
#define BASE_GGUF BASE ".gguf"
enum { N_TOKENS = 40 };

static const lora_shape shape = {3, 64, 160, 4, 0.5F, 0.1F};
static const char two_text[] = "It was the best of times, it was the worst of times.";
static char folder[64];

/* A path in this test's folder; sixteen at a time. */
static const char *in_folder(const char *name)
{
    static char paths[16][128];
    static int next;
    char *path = paths[next++ % 16];
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
    write_text(folder, "two.txt", two_text);
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

/* The same scale of 0.5, as PEFT may also write it. */
static void settings_that_mean_the_same_are_read(void **state)
{
    (void)state;
    static const char *const same[] = {
        "\"r\": 4, \"lora_alpha\": 1, \"use_rslora\": true",
        "\"r\": 7, \"lora_alpha\": 2, \"rank_pattern\": {\"mlp.gate_proj\": 4, "
        "\"up_proj\": 4, \"layers.0.mlp.down_proj\": 4, \"model.layers.1.mlp.down_proj\": 4, "
        "\"2.mlp.down_proj\": 4, \"own_proj\": 9}",
        "\"r\": 4, \"lora_alpha\": 3, \"alpha_pattern\": {\"gate_proj\": 2, \"mlp.up_proj\": 2, "
        "\"down_proj\": 2.0}",
        "\"r\": 4, \"lora_alpha\": 2, \"init_lora_weights\": \"gaussian\", \"use_dora\": false, "
        "\"modules_to_save\": null, \"lora_bias\": false, \"bias\": \"none\"",
    };
    write_adapter(in_folder("said"), &shape, 1);
    write_merged(BASE, in_folder("meant"), &shape, 1, CHOIR_F32);
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        char text[512];
        snprintf(text, sizeof text, "{\"peft_type\": \"LORA\", %s}", same[i]);
        write_text(in_folder("said"), "adapter_config.json", text);
        must(upcycle(in_folder("said"), in_folder("two"), in_folder("said-moe"), CHOIR_F32,
                     CHOIR_GATES_UNIFORM));
        assert_true(difference(in_folder("said-moe"), 1, in_folder("meant"), -1) < 1e-5);
        remove_folder(in_folder("said-moe"));
    }
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

/* Rows of q and k lie in pairs in GGUF and in halves in a folder. */
static void a_folder_from_gguf_is_the_folder_from_a_folder(void **state)
{
    (void)state;
    const char *one = in_folder("one"), *two = in_folder("two");
    must(upcycle_base(BASE_GGUF, one, two, in_folder("gguf-base"), CHOIR_F32, CHOIR_GATES_HIDDEN));
    must(upcycle_base(BASE, one, two, in_folder("folder-base"), CHOIR_F32, CHOIR_GATES_HIDDEN));
    for (int32_t expert = -1; expert < 3; expert++)
        assert_true(difference(in_folder("gguf-base"), expert, in_folder("folder-base"), expert) <
                    1e-5);
}

/* A folder with the tiny model and its own defaults of sampling. */
static const char *base_that_samples(void)
{
    const char *base = in_folder("sampling");
    write_merged(BASE, base, &shape, 1, CHOIR_F32);
    write_text(base, "generation_config.json",
               "{\"do_sample\": true, \"temperature\": 0.7, \"top_p\": 0.9, \"top_k\": 30, "
               "\"repetition_penalty\": 1.1, \"eos_token_id\": [2, 5]}");
    return base;
}

static void the_base_defaults_are_kept(void **state)
{
    (void)state;
    choir_model_file *base, *moe;
    const char *base_path = base_that_samples(), *out = in_folder("sampling-moe");
    must(upcycle_base(base_path, in_folder("one"), in_folder("two"), out, CHOIR_BF16,
                      CHOIR_GATES_UNIFORM));
    must(choir_model_file_open(base_path, &base));
    must(choir_model_file_open(out, &moe));
    const choir_model_config *b = choir_model_file_config(base), *m = choir_model_file_config(moe);
    assert_true(m->temperature == 0.7F && m->temperature == b->temperature);
    assert_true(m->top_p == 0.9F && m->top_p == b->top_p);
    assert_true(m->top_k == 30 && m->top_k == b->top_k);
    assert_true(m->repetition_penalty == 1.1F && m->repetition_penalty == b->repetition_penalty);
    assert_int_equal(m->n_eos, b->n_eos);
    assert_memory_equal(m->eos_ids, b->eos_ids, b->n_eos * sizeof *b->eos_ids);
    assert_int_equal(m->bos_id, b->bos_id);
    assert_int_equal(m->pad_id, b->pad_id);
    assert_int_equal(m->max_positions, b->max_positions);
    assert_true(m->norm_eps == b->norm_eps && m->rope.theta == b->rope.theta);
    choir_model_file_close(base);
    choir_model_file_close(moe);
}

static void an_output_has_the_same_bytes_again(void **state)
{
    (void)state;
    char *first, *again;
    size_t n_first, n_again;
    for (int i = 0; i < 2; i++)
        must(upcycle(in_folder("one"), in_folder("two"), in_folder(i == 0 ? "1.gguf" : "2.gguf"),
                     CHOIR_Q4_1, CHOIR_GATES_HIDDEN));
    must(choir_file_read(in_folder("1.gguf"), 1 << 24, &first, &n_first));
    must(choir_file_read(in_folder("2.gguf"), 1 << 24, &again, &n_again));
    assert_int_equal(n_first, n_again);
    assert_memory_equal(first, again, n_first);
    choir_free(first);
    choir_free(again);
}

/* A sentence with this word, and nothing new in the folder, under any name. */
static void failed(choir_status status, uint32_t before, const char *word)
{
    assert_int_not_equal(status, CHOIR_OK);
    if (strstr(choir_error_message(), word) == NULL)
        fail_msg("no '%s' in: %s", word, choir_error_message());
    assert_int_equal(n_in_folder(folder), before);
}

static void refused(const char *one, const char *out, choir_dtype dtype, const char *word)
{
    uint32_t before = n_in_folder(folder);
    failed(upcycle(one, in_folder("two"), out, dtype, CHOIR_GATES_UNIFORM), before, word);
}

/* An adapter like "one", in which `from` is `to` (of the same length) wherever it stands. */
static const char *patched(const char *name, const char *from, const char *to)
{
    char path[160], *data;
    size_t bytes, n = strlen(from);
    write_adapter(in_folder(name), &shape, 1);
    snprintf(path, sizeof path, "%s/%s/adapter_model.safetensors", folder, name);
    must(choir_file_read(path, 1 << 20, &data, &bytes));
    assert_int_equal(strlen(to), n);
    for (char *at = data; (at = memmem(at, bytes - (size_t)(at - data), from, n)) != NULL;)
        memcpy(at, to, n);
    FILE *f = fopen(path, "wb");
    assert_true(f != NULL && fwrite(data, bytes, 1, f) == 1 && fclose(f) == 0);
    choir_free(data);
    return in_folder(name);
}

static void adapters_that_do_not_fit_are_refused(void **state)
{
    (void)state;
    char out[96];
    snprintf(out, sizeof out, "%s/refused.gguf", folder);
    lora_shape wide = shape, deep = shape;
    wide.hidden = 96;
    deep.n_layers = 4;
    write_adapter(in_folder("wide"), &wide, 1);
    write_adapter(in_folder("deep"), &deep, 1);
    refused(in_folder("not-there"), out, CHOIR_Q8_0, "not-there");
    refused(in_folder("wide"), out, CHOIR_Q8_0, "[96, 4]");
    refused(in_folder("deep"), out, CHOIR_Q8_0, "layers.3");
    refused(patched("cannot express", "mlp.up_proj", "att.qu_proj"), out, CHOIR_Q8_0,
            "att.qu_proj");
    refused(patched("unknown", "lora_B", "lora_C"), out, CHOIR_Q8_0, "lora_B");
    refused(patched("no-mate", "2.mlp.up_proj.lora_A", "2.mlp.up_proj.lora_Z"), out, CHOIR_Q8_0,
            "2.mlp.up_proj.lora_B");
    refused(patched("norm", "base_model.model.model.layers.0.mlp",
                    "base_model.model.model.layers.0.nlp"),
            out, CHOIR_Q8_0, "layers.0.nlp");
}

static void adapter_settings_that_mean_something_else_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *config, *word;
    } bad[] = {
        {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"use_dora\": true}", "use_dora"},
        {"{\"peft_type\": \"LORA\", \"r\": 5, \"lora_alpha\": 8}", "[5, 160]"},
        {"{\"peft_type\": \"LORA\", \"r\": 4}", "lora_alpha"},
        {"{\"peft_type\": \"LORA\", \"lora_alpha\": 8}", "no number for r"},
        {"{\"peft_type\": \"LORA\", \"r\": 0, \"lora_alpha\": 8}", "r is 0"},
        {"{\"peft_type\": \"LORA\", \"r\": 3.5, \"lora_alpha\": 8}", "r is 3.5"},
        {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 1e300}", "lora_alpha is 1e+300"},
        {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"init_lora_weights\": "
         "\"pissa_niter_4\"}",
         "pissa_niter_4"},
        {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"init_lora_weights\": \"olora\"}",
         "olora"},
        {"{\"peft_type\": \"IA3\"}", "IA3"},
        {"{\"peft_type\": ", "line 1"},
        {"", "adapter_config.json"},
    };
    write_adapter(in_folder("odd"), &shape, 1);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_text(in_folder("odd"), "adapter_config.json", bad[i].config);
        refused(in_folder("odd"), in_folder("refused.gguf"), CHOIR_Q8_0, bad[i].word);
    }
}

/* y + B A r with the residual stream r: no change of W, though its factors look like LoRA's. */
static void bottlenecks_of_the_residual_stream_are_refused(void **state)
{
    (void)state;
    static float zeros[64 * 64];
    assert_true(shape.hidden * 4 <= 64 * 64);
    tensors t = {0};
    add_tensor(&t, "model.layers.0.output_adapters.adapters.x.adapter_down.0.weight", 4,
               shape.hidden, zeros);
    add_tensor(&t, "model.layers.0.output_adapters.adapters.x.adapter_up.weight", shape.hidden, 4,
               zeros);
    assert_int_equal(mkdir(in_folder("hub"), 0777), 0);
    write_tensors(&t, in_folder("hub"), "adapter.safetensors");
    write_text(in_folder("hub"), "adapter_config.json",
               "{\"config\": {\"non_linearity\": \"linear\", \"is_parallel\": true, "
               "\"mh_adapter\": false, "
               "\"output_adapter\": true, \"reduction_factor\": 16}, \"model_type\": \"llama\"}");
    refused(in_folder("hub"), in_folder("refused.gguf"), CHOIR_Q8_0, "by a bottleneck");
}

static void adapters_cut_short_are_refused(void **state)
{
    (void)state;
    char path[128];
    write_adapter(in_folder("cut"), &shape, 1);
    snprintf(path, sizeof path, "%s/cut/adapter_model.safetensors", folder);
    struct stat whole;
    assert_int_equal(stat(path, &whole), 0);
    for (off_t bytes = whole.st_size - 1; bytes > 0; bytes -= bytes < 10 ? 1 : 199) {
        assert_int_equal(truncate(path, bytes < 1 ? 1 : bytes), 0);
        refused(in_folder("cut"), in_folder("refused.gguf"), CHOIR_Q8_0, in_folder("cut"));
    }
}

/* Found while the output is written, which is when the whole weight is first known. */
static void weights_that_a_type_cannot_hold_are_refused(void **state)
{
    (void)state;
    lora_shape none = shape, huge = shape;
    none.size = NAN;
    huge.size = 1e30F;
    write_adapter(in_folder("nan"), &none, 1);
    write_adapter(in_folder("huge"), &huge, 1);
    refused(in_folder("nan"), in_folder("refused"), CHOIR_F32, "holds NaN");
    refused(in_folder("huge"), in_folder("refused"), CHOIR_F16, "expert 'one'");
    refused(in_folder("huge"), in_folder("refused.gguf"), CHOIR_Q8_0, "blk.0.ffn_gate_exps");
}

static void other_bases_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *base, *word;
    } bad[] = {
        {"tests/fixtures/models/mixtral", "dense"},
        {"tests/fixtures/models/qwen2", "cannot express"},
        {"tests/fixtures/models/none", "models/none"},
        {BASE, "is a folder"}, /* for a GGUF output */
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint32_t before = n_in_folder(folder);
        failed(upcycle_base(bad[i].base, in_folder("one"), in_folder("two"),
                            in_folder("refused.gguf"), CHOIR_Q8_0, CHOIR_GATES_UNIFORM),
               before, bad[i].word);
    }
}

static void places_that_cannot_be_written_are_refused(void **state)
{
    (void)state;
    assert_int_equal(mkdir(in_folder("taken.gguf"), 0777), 0);
    refused(in_folder("one"), in_folder("refused.gguf"), CHOIR_F32, "Q8_0");
    refused(in_folder("one"), in_folder("refused"), CHOIR_Q8_0, "BF16");
    refused(in_folder("one"), in_folder("base.txt/x.gguf"), CHOIR_Q8_0, "base.txt");
    refused(in_folder("one"), in_folder("base.txt/x"), CHOIR_BF16, "base.txt");
    refused(in_folder("one"), in_folder("base.txt"), CHOIR_BF16, "there already");
    refused(in_folder("one"), in_folder("not-there/x.gguf"), CHOIR_Q8_0, "not-there");
    refused(in_folder("one"), in_folder("taken.gguf"), CHOIR_Q8_0, "taken.gguf");
    refused(in_folder("one"), folder, CHOIR_BF16, "there already");
}

static void sample_texts_that_say_nothing_are_refused(void **state)
{
    (void)state;
    static const char *const texts[] = {"", NULL};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        if (texts[i] != NULL)
            write_text(folder, "two.txt", texts[i]);
        else
            assert_int_equal(unlink(in_folder("two.txt")), 0);
        uint32_t before = n_in_folder(folder);
        failed(upcycle(in_folder("one"), in_folder("two"), in_folder("refused.gguf"), CHOIR_Q8_0,
                       CHOIR_GATES_HIDDEN),
               before, "two.txt");
    }
    write_text(folder, "two.txt", two_text);
}

static void options_out_of_bounds_are_refused(void **state)
{
    (void)state;
    const char *one = in_folder("one");
    const choir_upcycle_expert bad_name[] = {{"a/b", one, NULL}},
                               named_base[] = {{"base", one, NULL}};
    const choir_upcycle_expert twins[] = {{"a", one, NULL}, {"a", one, NULL}},
                               good[] = {{"a", one, NULL}};
    choir_upcycle_options o = CHOIR_UPCYCLE_OPTIONS_DEFAULT;
    o.base = BASE;
    o.out = in_folder("refused");
    o.gates = CHOIR_GATES_UNIFORM;
    const choir_upcycle_options sound = o;
    const uint32_t before = n_in_folder(folder);
#define REFUSED(word, ...)                                                                         \
    do {                                                                                           \
        o = sound;                                                                                 \
        o.experts = good;                                                                          \
        o.n_experts = 1;                                                                           \
        __VA_ARGS__;                                                                               \
        failed(choir_upcycle(&o), before, word);                                                   \
    } while (0)
    REFUSED("a/b", o.experts = bad_name);
    REFUSED("base", o.experts = named_base);
    REFUSED("two experts", o.experts = twins, o.n_experts = 2);
    REFUSED("0 adapters", o.n_experts = 0);
    REFUSED("64 adapters", o.n_experts = 64);
    REFUSED("0 experts per token", o.top_k = 0);
    REFUSED("3 experts per token", o.top_k = 3);
    REFUSED("temperature", o.temperature = NAN);
    REFUSED("temperature", o.temperature = 0);
    REFUSED("0 bytes", o.shard_bytes = 0);
    REFUSED("base", o.gates = CHOIR_GATES_HIDDEN);
    REFUSED("a base", o.base = NULL);
    REFUSED("an output", o.out = "");
#undef REFUSED
}

/* Files end at `bytes`, as on a full disk; 0 ends it. */
static void limit_files(rlim_t bytes)
{
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes == 0 ? limit.rlim_max : bytes;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

static void a_full_disk_leaves_the_old_file_whole(void **state)
{
    (void)state;
    write_text(folder, "old.gguf", "what was there before");
    signal(SIGXFSZ, SIG_IGN);
    for (rlim_t bytes = 100; bytes < 200000; bytes *= 3) {
        limit_files(bytes);
        refused(in_folder("one"), in_folder("old.gguf"), CHOIR_Q8_0, "File too large");
        refused(in_folder("one"), in_folder("new"), CHOIR_BF16, "File too large");
        limit_files(0);
    }
    char *text;
    size_t bytes;
    must(choir_file_read(in_folder("old.gguf"), 100, &text, &bytes));
    assert_string_equal(text, "what was there before");
    choir_free(text);
}

/* A process that was killed leaves its folder; the next one of that number must not take it over.
 */
static void what_a_killed_process_left_is_not_part_of_the_output(void **state)
{
    (void)state;
    char left[160];
    snprintf(left, sizeof left, "%s/again.tmp-%ld", folder, (long)getpid());
    assert_int_equal(mkdir(left, 0777), 0);
    write_text(left, "model.safetensors.index.json", "{\"weight_map\": {}}");
    write_text(left, "model-00099-of-00099.safetensors", "half");
    must(upcycle(in_folder("one"), in_folder("two"), in_folder("again"), CHOIR_BF16,
                 CHOIR_GATES_UNIFORM));
    assert_false(choir_file_exists(in_folder("again/model-00099-of-00099.safetensors")));
    assert_true(difference(in_folder("again"), 0, BASE, -1) < 1e-5);
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
        cmocka_unit_test(settings_that_mean_the_same_are_read),
        cmocka_unit_test(equal_experts_are_the_dense_model),
        cmocka_unit_test(an_expert_of_any_type_is_the_merged_model_in_that_type),
        cmocka_unit_test(a_folder_from_gguf_is_the_folder_from_a_folder),
        cmocka_unit_test(the_base_defaults_are_kept),
        cmocka_unit_test(an_output_has_the_same_bytes_again),
        cmocka_unit_test(adapters_that_do_not_fit_are_refused),
        cmocka_unit_test(adapter_settings_that_mean_something_else_are_refused),
        cmocka_unit_test(bottlenecks_of_the_residual_stream_are_refused),
        cmocka_unit_test(adapters_cut_short_are_refused),
        cmocka_unit_test(weights_that_a_type_cannot_hold_are_refused),
        cmocka_unit_test(other_bases_are_refused),
        cmocka_unit_test(places_that_cannot_be_written_are_refused),
        cmocka_unit_test(sample_texts_that_say_nothing_are_refused),
        cmocka_unit_test(options_out_of_bounds_are_refused),
        cmocka_unit_test(a_full_disk_leaves_the_old_file_whole),
        cmocka_unit_test(what_a_killed_process_left_is_not_part_of_the_output),
        cmocka_unit_test(memory_that_runs_out),
    };
    return cmocka_run_group_tests_name("upcycle", tests, set_up, tear_down);
}
