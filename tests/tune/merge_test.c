/* choir_merge() on small adapters against what PEFT made of them (tests/oracle/make_merges.py), and
 * on ones made here: experts in both layouts, configurations, refusals, what is left behind. */
#include "base/base.h"
#include "engine/adapter_file.h"
#include "engine/safetensors.h"
#include "tests/tune/peft.h"
#include "tune/tune.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define BASE     "tests/fixtures/models/llama"
#define MOE      "tests/fixtures/models/mixtral"
#define FIXTURES "tests/fixtures/merge"

static char folder[64];

/* A path in this test's folder; 256 at a time. */
static const char *in_folder(const char *name)
{
    static char paths[256][128];
    static int next;
    char *path = paths[next++ % 256];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static int set_up(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/choir-merge-XXXXXX");
    return mkdtemp(folder) == NULL;
}

static int tear_down(void **state)
{
    (void)state;
    remove_folder(folder);
    return 0;
}

static void must(choir_status status)
{
    if (status != CHOIR_OK) fail_msg("%s", choir_error_message());
}

/* ---- adapters as files ---- */

typedef struct matrix {
    uint32_t rows, cols;
    float *v;
} matrix;

static choir_safetensors *open_tensors(const char *path)
{
    choir_safetensors *file;
    must(choir_safetensors_open(path, &file));
    return file;
}

static matrix read_matrix(const choir_safetensors *file, const char *name)
{
    const choir_safetensor *t = choir_safetensors_find(file, name);
    if (t == NULL) fail_msg("%s is not there", name);
    assert_int_equal(t->n_dims, 2);
    matrix m = {(uint32_t)t->dims[0], (uint32_t)t->dims[1], NULL};
    m.v = malloc((size_t)m.rows * m.cols * sizeof *m.v);
    const choir_tensor view = {t->dtype, m.rows, m.cols, t->data, t->bytes};
    for (uint32_t i = 0; i < m.rows; i++) choir_tensor_row(&view, i, m.v + (size_t)i * m.cols);
    return m;
}

static matrix product(matrix b, matrix a)
{
    assert_int_equal(b.cols, a.rows);
    matrix p = {b.rows, a.cols, malloc((size_t)b.rows * a.cols * sizeof(float))};
    for (uint32_t i = 0; i < p.rows; i++)
        for (uint32_t j = 0; j < p.cols; j++) {
            double sum = 0;
            for (uint32_t k = 0; k < a.rows; k++)
                sum += (double)b.v[i * b.cols + k] * (double)a.v[k * a.cols + j];
            p.v[i * p.cols + j] = (float)sum;
        }
    return p;
}

/* The largest difference over the largest number. */
static void alike(matrix x, matrix y, double most, const char *what)
{
    double largest = 0, off = 0;
    assert_int_equal(x.rows, y.rows);
    assert_int_equal(x.cols, y.cols);
    for (size_t i = 0; i < (size_t)x.rows * x.cols; i++) {
        largest = fmax(largest, fabs((double)y.v[i]));
        off = fmax(off, fabs((double)x.v[i] - (double)y.v[i]));
    }
    if (!(off <= most * largest)) fail_msg("%s: %g away, the largest is %g", what, off, largest);
}

static json_t *read_json(const char *path)
{
    json_t *j = json_load_file(path, 0, NULL);
    assert_non_null(j);
    return j;
}

static const char *text_of(const json_t *j, const char *key)
{
    return json_string_value(json_object_get(j, key));
}

/* ---- merges ---- */

static choir_merge_adapter adapters[CHOIR_MAX_MERGE + 1];

static choir_merge_options options(const char *base, const char *out, uint32_t n)
{
    choir_merge_options o = CHOIR_MERGE_OPTIONS_DEFAULT;
    o.base = base;
    o.out = out;
    o.adapters = adapters;
    o.n_adapters = n;
    o.n_threads = 2;
    o.method = CHOIR_MERGE_CAT;
    return o;
}

static choir_merge_method method_named(const char *text)
{
    for (int i = 0; i < CHOIR_N_MERGE_METHODS; i++)
        if (strcmp(choir_merge_method_of(i)->text, text) == 0) return (choir_merge_method)i;
    fail_msg("%s is no method", text);
    return CHOIR_N_MERGE_METHODS;
}

/* Factors are compared as they are; of a decomposition only the product is determined. */
static void compare_files(const char *ours_path, const char *theirs_path, bool factors,
                          const char *what)
{
    choir_safetensors *ours = open_tensors(ours_path), *theirs = open_tensors(theirs_path);
    assert_int_equal(choir_safetensors_count(ours), choir_safetensors_count(theirs));
    for (size_t i = 0; i < choir_safetensors_count(theirs); i++) {
        const char *name = choir_safetensors_at(theirs, i)->name, *letter = strstr(name, "_A");
        char b[256];
        if (letter == NULL) continue;
        snprintf(b, sizeof b, "%s", name);
        b[letter - name + 1] = 'B';
        matrix m[4] = {read_matrix(ours, name), read_matrix(theirs, name), read_matrix(ours, b),
                       read_matrix(theirs, b)};
        matrix x = product(m[2], m[0]), y = product(m[3], m[1]);
        if (factors) {
            alike(m[0], m[1], 1e-6, what);
            alike(m[2], m[3], 1e-6, what);
        }
        alike(x, y, 2e-6, what);
        for (int k = 0; k < 4; k++) free(m[k].v);
        free(x.v);
        free(y.v);
    }
    choir_safetensors_close(ours);
    choir_safetensors_close(theirs);
}

static void the_same_as_peft(void **state)
{
    (void)state;
    static char paths[CHOIR_MAX_MERGE][64];
    json_t *cases = read_json(FIXTURES "/merged/cases.json"), *c;
    size_t i;
    json_array_foreach(cases, i, c)
    {
        char theirs[128], ours[192];
        const char *name = text_of(c, "name"), *out = in_folder(name);
        json_t *letters = json_object_get(c, "adapters"), *weights = json_object_get(c, "weights");
        choir_merge_options o = options(BASE, out, (uint32_t)json_array_size(letters));
        choir_merge_result made;
        o.method = method_named(text_of(c, "method"));
        o.density = json_number_value(json_object_get(c, "density"));
        o.rank = (uint32_t)json_integer_value(json_object_get(c, "rank"));
        o.by_frequency = json_is_true(json_object_get(c, "frequency"));
        for (uint32_t k = 0; k < o.n_adapters; k++) {
            snprintf(paths[k], sizeof paths[k], "%s/%s", FIXTURES,
                     json_string_value(json_array_get(letters, k)));
            adapters[k] =
                (choir_merge_adapter){paths[k], json_number_value(json_array_get(weights, k))};
        }
        must(choir_merge(&o, &made));
        snprintf(theirs, sizeof theirs, "%s/merged/%s.safetensors", FIXTURES, name);
        snprintf(ours, sizeof ours, "%s/adapter_model.safetensors", out);
        compare_files(ours, theirs, !choir_merge_method_of(o.method)->svd, name);
    }
    assert_true(i >= 11);
    json_decref(cases);
}

static void use_fixtures(const char *letters)
{
    static char paths[CHOIR_MAX_MERGE][64];
    for (size_t k = 0; letters[k] != '\0'; k++) {
        snprintf(paths[k], sizeof paths[k], "%s/%c", FIXTURES, letters[k]);
        adapters[k] = (choir_merge_adapter){paths[k], 1};
    }
}

static json_t *config_of(const char *out)
{
    char path[192];
    snprintf(path, sizeof path, "%s/adapter_config.json", out);
    return read_json(path);
}

/* One rank, no scale, no patterns, rsLoRA's other scale gone; what is targeted is what is there. */
static void the_configuration_says_what_is_there(void **state)
{
    (void)state;
    choir_merge_result made;
    const char *out = in_folder("config");
    use_fixtures("bca");
    choir_merge_options o = options(BASE, out, 3);
    must(choir_merge(&o, &made));
    assert_int_equal(made.rank, 4 + 3 + 4);
    assert_int_equal(made.n_modules, 4);
    json_t *j = config_of(out);
    assert_int_equal(json_integer_value(json_object_get(j, "r")), 11);
    assert_int_equal(json_integer_value(json_object_get(j, "lora_alpha")), 11);
    assert_true(json_is_false(json_object_get(j, "use_rslora")));
    assert_int_equal(json_object_size(json_object_get(j, "rank_pattern")), 0);
    assert_int_equal(json_object_size(json_object_get(j, "alpha_pattern")), 0);
    assert_string_equal(text_of(j, "peft_type"), "LORA");
    assert_int_equal(json_array_size(json_object_get(j, "target_modules")), 4);
    json_decref(j);
}

/* What choir makes it reads again, and finds as many matrices of one rank. */
static void what_is_made_can_be_read(void **state)
{
    (void)state;
    choir_model_file *base;
    choir_adapter_data *data;
    choir_merge_result made;
    static const choir_dtype dtypes[] = {CHOIR_F32, CHOIR_BF16, CHOIR_F16};
    must(choir_model_file_open(BASE, &base));
    for (int i = 0; i < 3; i++) {
        const char *out = in_folder(choir_dtype_text(dtypes[i]));
        use_fixtures("abcd");
        choir_merge_options o = options(BASE, out, 4);
        o.method = CHOIR_MERGE_SVD;
        o.rank = 5;
        o.dtype = dtypes[i];
        must(choir_merge(&o, &made));
        must(choir_adapter_data_open(choir_model_file_config(base), out, &data));
        assert_int_equal(data->max_rank, 5);
        assert_int_equal(data->n_changes, made.n_modules);
        assert_true(data->changes[0].scale == 1);
        choir_adapter_data_free(data);
    }
    choir_model_file_close(base);
}

static void check_same_bytes(const char *x, const char *y, bool same)
{
    char path[192], *data[2];
    size_t bytes[2];
    const char *folders[] = {x, y};
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/adapter_model.safetensors", folders[i]);
        must(choir_file_read(path, 1 << 24, &data[i], &bytes[i]));
    }
    assert_int_equal(bytes[0], bytes[1]);
    assert_int_equal(memcmp(data[0], data[1], bytes[0]) == 0, same);
    choir_free(data[0]);
    choir_free(data[1]);
}

static void threads_change_nothing_and_seeds_do(void **state)
{
    (void)state;
    choir_merge_result made;
    use_fixtures("ab");
    for (int i = 0; i < 3; i++) {
        choir_merge_options o = options(BASE, in_folder(i == 0 ? "t1" : i == 1 ? "t3" : "s8"), 2);
        o.method = CHOIR_MERGE_DARE_TIES_SVD;
        o.density = 0.5;
        o.n_threads = i == 0 ? 1 : 3;
        o.seed = i == 2 ? 8 : 7;
        must(choir_merge(&o, &made));
    }
    check_same_bytes(in_folder("t1"), in_folder("t3"), true);
    check_same_bytes(in_folder("t1"), in_folder("s8"), false);
}

/* ---- experts: one adapter, its pairs stacked and one by one ---- */

enum { EXPERTS = 8, HIDDEN = 64, FFN = 96, LAYER = 1 };

typedef struct expert_pair {
    uint32_t rank;
    float *a, *b; /* [EXPERTS, rank, FFN], [EXPERTS, HIDDEN, rank]: of w2 */
} expert_pair;

static expert_pair draw_experts(uint32_t rank, uint32_t seed)
{
    size_t n_a = (size_t)EXPERTS * rank * FFN, n_b = (size_t)EXPERTS * HIDDEN * rank;
    expert_pair p = {rank, malloc(n_a * sizeof *p.a), malloc(n_b * sizeof *p.b)};
    for (size_t i = 0; i < n_a + n_b; i++) {
        seed = seed * 1664525 + 1013904223;
        *(i < n_a ? &p.a[i] : &p.b[i - n_a]) = (float)(seed >> 8) / (1 << 23) - 1;
    }
    return p;
}

static void write_config(const char *name, uint32_t rank, const char *targets)
{
    char text[512];
    snprintf(
        text, sizeof text,
        "{\"peft_type\": \"LORA\", \"peft_version\": \"0.21.2\", \"r\": %u, \"lora_alpha\": 6, "
        "\"bias\": \"none\", %s}",
        rank, targets);
    write_text(in_folder(name), "adapter_config.json", text);
}

static void write_stacked(const char *name, const expert_pair *p)
{
    tensors t = {0};
    size_t n = (size_t)HIDDEN * p->rank * EXPERTS;
    float *b = malloc(n * sizeof *b);
    for (uint32_t e = 0; e < EXPERTS; e++)
        for (uint32_t i = 0; i < HIDDEN; i++)
            for (uint32_t k = 0; k < p->rank; k++)
                b[(i * p->rank + k) * EXPERTS + e] = p->b[(e * HIDDEN + i) * p->rank + k];
    must(choir_folder_make(in_folder(name)));
    write_config(name, p->rank, "\"target_parameters\": [\"mlp.experts.down_proj\"]");
    add_tensor(&t, "base_model.model.model.layers.1.mlp.experts.lora_A.weight", EXPERTS * p->rank,
               FFN, p->a);
    add_tensor(&t, "base_model.model.model.layers.1.mlp.experts.lora_B.weight", HIDDEN,
               EXPERTS * p->rank, b);
    write_tensors(&t, in_folder(name), "adapter_model.safetensors");
    free(b);
}

static void expert_name(char *out, size_t bytes, uint32_t e, char letter)
{
    snprintf(out, bytes,
             "base_model.model.model.layers.%d.block_sparse_moe.experts.%u.w2.lora_%c.weight",
             LAYER, e, letter);
}

static void write_one_by_one(const char *name, const expert_pair *p)
{
    tensors t = {0};
    must(choir_folder_make(in_folder(name)));
    write_config(name, p->rank, "\"target_modules\": [\"w2\"]");
    for (uint32_t e = 0; e < EXPERTS; e++) {
        char tensor[128];
        expert_name(tensor, sizeof tensor, e, 'A');
        add_tensor(&t, tensor, p->rank, FFN, p->a + (size_t)e * p->rank * FFN);
        expert_name(tensor, sizeof tensor, e, 'B');
        add_tensor(&t, tensor, HIDDEN, p->rank, p->b + (size_t)e * HIDDEN * p->rank);
    }
    write_tensors(&t, in_folder(name), "adapter_model.safetensors");
}

static void compare_layouts(const char *stacked, const char *one_by_one, uint32_t rank)
{
    char path[192];
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", stacked);
    choir_safetensors *s = open_tensors(path);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", one_by_one);
    choir_safetensors *o = open_tensors(path);
    matrix all_a = read_matrix(s, "base_model.model.model.layers.1.mlp.experts.lora_A.weight");
    matrix all_b = read_matrix(s, "base_model.model.model.layers.1.mlp.experts.lora_B.weight");
    for (uint32_t e = 0; e < EXPERTS; e++) {
        char name[128];
        expert_name(name, sizeof name, e, 'A');
        matrix a = read_matrix(o, name);
        expert_name(name, sizeof name, e, 'B');
        matrix b = read_matrix(o, name);
        assert_int_equal(a.rows, rank);
        assert_memory_equal(a.v, all_a.v + (size_t)e * rank * FFN, sizeof(float) * rank * FFN);
        for (uint32_t i = 0; i < HIDDEN; i++)
            for (uint32_t k = 0; k < rank; k++)
                assert_true(b.v[i * rank + k] == all_b.v[(i * rank + k) * EXPERTS + e]);
        free(a.v);
        free(b.v);
    }
    free(all_a.v);
    free(all_b.v);
    choir_safetensors_close(s);
    choir_safetensors_close(o);
}

/* Two adapters of the experts in each layout: "s0", "s1" and "o0", "o1". */
static void write_experts(void)
{
    for (uint32_t i = 0; i < 2; i++) {
        expert_pair p = draw_experts(2, 3 + i);
        write_stacked(i == 0 ? "s0" : "s1", &p);
        write_one_by_one(i == 0 ? "o0" : "o1", &p);
        free(p.a);
        free(p.b);
    }
}

static void experts_are_alike_in_both_layouts(void **state)
{
    (void)state;
    static const choir_merge_method methods[] = {CHOIR_MERGE_LINEAR, CHOIR_MERGE_CAT,
                                                 CHOIR_MERGE_SVD, CHOIR_MERGE_TIES,
                                                 CHOIR_MERGE_TIES_SVD};
    choir_merge_result made;
    write_experts();
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        const char *text = choir_merge_method_of(methods[i])->text;
        char outs[2][64];
        for (int k = 0; k < 2; k++) {
            snprintf(outs[k], sizeof outs[k], "%s-%d", text, k);
            adapters[0] = (choir_merge_adapter){in_folder(k == 0 ? "s0" : "o0"), 0.75};
            adapters[1] = (choir_merge_adapter){in_folder(k == 0 ? "s1" : "o1"), -0.5};
            choir_merge_options o = options(MOE, in_folder(outs[k]), 2);
            o.method = methods[i];
            if (choir_merge_method_of(o.method)->pruning != CHOIR_MERGE_PRUNES_NOTHING)
                o.density = 0.4;
            must(choir_merge(&o, &made));
            assert_int_equal(made.n_modules, k == 0 ? 1 : EXPERTS);
        }
        compare_layouts(in_folder(outs[0]), in_folder(outs[1]), made.rank);
    }
    json_t *j = config_of(in_folder("cat-0"));
    assert_true(json_is_null(json_object_get(j, "target_modules")));
    assert_string_equal(
        json_string_value(json_array_get(json_object_get(j, "target_parameters"), 0)),
        "mlp.experts.down_proj");
    json_decref(j);
}

/* ---- what is targeted ---- */

static const lora_shape shape = {3, 64, 160, 4, 0.5F, 0.1F};

static void targets_are_words_or_whole_names(void **state)
{
    (void)state;
    choir_merge_result made;
    for (int i = 0; i < 2; i++) {
        const char *name = i == 0 ? "words" : "names", *out = i == 0 ? "words-out" : "names-out";
        write_adapter(in_folder(name), &shape, 1);
        if (i == 1)
            write_text(in_folder(name), "adapter_config.json",
                       "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 2, \"bias\": \"none\", "
                       "\"target_modules\": [\"gate_proj\", \"up_proj\", \"down_proj\"], "
                       "\"layers_to_transform\": [0, 1, 2]}");
        adapters[0] = (choir_merge_adapter){in_folder(name), 1};
        choir_merge_options o = options(BASE, in_folder(out), 1);
        must(choir_merge(&o, &made));
        json_t *j = config_of(in_folder(out)), *list = json_object_get(j, "target_modules");
        assert_int_equal(json_array_size(list), i == 0 ? 3 : 9);
        if (i == 1) {
            assert_string_equal(json_string_value(json_array_get(list, 0)),
                                "model.layers.0.mlp.down_proj");
            assert_true(json_is_null(json_object_get(j, "layers_to_transform")));
        }
        json_decref(j);
    }
}

/* ---- refusals ---- */

static void failed(choir_status status, choir_status wanted, uint32_t before, const char *word)
{
    assert_int_equal(status, wanted);
    if (strstr(choir_error_message(), word) == NULL)
        fail_msg("no '%s' in: %s", word, choir_error_message());
    assert_int_equal(n_in_folder(folder), before);
}

static void refused(choir_merge_options o, choir_status wanted, const char *word)
{
    choir_merge_result made;
    uint32_t before = n_in_folder(folder);
    failed(choir_merge(&o, &made), wanted, before, word);
}

static void bad_options(void **state)
{
    (void)state;
    use_fixtures("ab");
    choir_merge_options good = options(BASE, in_folder("bad"), 2), o = good;
    o.n_adapters = 0;
    refused(o, CHOIR_E_INVALID, "0 adapters were given, must be 1 to 64");
    o.n_adapters = CHOIR_MAX_MERGE + 1;
    refused(o, CHOIR_E_INVALID, "65 adapters were given, must be 1 to 64");
    static const double densities[] = {0, -0.5, 1.5, NAN, INFINITY};
    for (size_t i = 0; i < sizeof densities / sizeof *densities; i++) {
        o = good;
        o.method = CHOIR_MERGE_TIES;
        o.density = densities[i];
        refused(o, CHOIR_E_INVALID, "must be over 0 and at most 1");
    }
    o = good;
    o.density = 0.5;
    refused(o, CHOIR_E_INVALID, "cat prunes nothing");
    o = good;
    o.rank = 4;
    refused(o, CHOIR_E_INVALID, "cat has the rank that its adapters have");
    o.method = CHOIR_MERGE_SVD;
    o.rank = 5000;
    refused(o, CHOIR_E_INVALID, "the rank is 5000, must be 1 to 4096");
    o = good;
    o.dtype = CHOIR_Q8_0;
    refused(o, CHOIR_E_INVALID, "F32, BF16 or F16, not Q8_0");
    static const double bad_weights[] = {9, -8.5, NAN, INFINITY};
    for (size_t i = 0; i < sizeof bad_weights / sizeof *bad_weights; i++) {
        adapters[1].weight = bad_weights[i];
        refused(good, CHOIR_E_INVALID, "must be -8 to 8");
    }
    o = good;
    adapters[1].weight = 1;
    o.out = in_folder("nowhere/at/all");
    o.base = in_folder("none");
    refused(o, CHOIR_E_NOT_FOUND, "none");
    o = good;
    o.out = folder;
    refused(o, CHOIR_E_EXISTS, "is there already");
}

static void adapters_that_cannot_be_joined(void **state)
{
    (void)state;
    use_fixtures("ac");
    choir_merge_options o = options(BASE, in_folder("joined"), 2);
    o.method = CHOIR_MERGE_LINEAR;
    refused(o, CHOIR_E_INVALID, "has rank 2, and 4 in");
    adapters[1].folder = in_folder("nothing");
    refused(o, CHOIR_E_NOT_FOUND, "nothing is no folder");
    must(choir_folder_make(in_folder("s-and-o")));
    write_experts();
    adapters[0].folder = in_folder("s0");
    adapters[1].folder = in_folder("o1");
    o.base = MOE;
    refused(o, CHOIR_E_INVALID, "of the two layouts cannot be joined");
    o.base = BASE;
    refused(
        o, CHOIR_E_INVALID,
        "mlp.experts.lora_A.weight' is for EXPERT_DOWN of layer 1, which the base (llama) lacks");
    o.base = MOE;
    adapters[1].folder = in_folder("s1");
    write_config("s1", 2, "\"target_parameters\": [\"experts.down_proj\"]");
    refused(o, CHOIR_E_INVALID, "target_parameters differs");
}

/* An adapter of the first layer's down_proj, with one word of its configuration more. */
static const char *with_config(const char *name, const char *more)
{
    char text[256];
    static const lora_shape one = {1, 64, 160, 4, 0.5F, 0.1F};
    remove_folder(in_folder(name));
    write_adapter(in_folder(name), &one, 1);
    snprintf(text, sizeof text,
             "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"bias\": \"none\", "
             "\"target_modules\": [\"gate_proj\", \"up_proj\", \"down_proj\"]%s}",
             more);
    write_text(in_folder(name), "adapter_config.json", text);
    return in_folder(name);
}

/* One of v_proj with a vector of its outputs more, and the setting that such vectors have. */
static const char *with_vector(const char *ending, const char *setting)
{
    char name[128], targets[128];
    tensors t = {0};
    float a[4 * 64] = {1}, b[32 * 4] = {1};
    remove_folder(in_folder("vector"));
    must(choir_folder_make(in_folder("vector")));
    snprintf(targets, sizeof targets, "\"target_modules\": [\"v_proj\"], \"%s\": true", setting);
    write_config("vector", 4, targets);
    const char *module = "base_model.model.model.layers.0.self_attn.v_proj";
    snprintf(name, sizeof name, "%s.lora_A.weight", module);
    add_tensor(&t, name, 4, 64, a);
    snprintf(name, sizeof name, "%s.lora_B.weight", module);
    add_tensor(&t, name, 32, 4, b);
    snprintf(name, sizeof name, "%s.%s", module, ending);
    add_tensor(&t, name, 1, 32, b);
    write_tensors(&t, in_folder("vector"), "adapter_model.safetensors");
    return in_folder("vector");
}

static const char *write_ia3(const char *name)
{
    tensors t = {0};
    float l[32] = {1};
    remove_folder(in_folder(name));
    must(choir_folder_make(in_folder(name)));
    write_text(in_folder(name), "adapter_config.json",
               "{\"peft_type\": \"IA3\", \"target_modules\": [\"v_proj\"], "
               "\"feedforward_modules\": []}");
    add_tensor(&t, "base_model.model.model.layers.0.self_attn.v_proj.ia3_l", 32, 1, l);
    write_tensors(&t, in_folder(name), "adapter_model.safetensors");
    return in_folder(name);
}

static void kinds_that_are_no_sums(void **state)
{
    (void)state;
    use_fixtures("ab");
    choir_merge_options o = options(BASE, in_folder("kinds"), 2);
    adapters[1].folder = with_config("kind", ", \"use_dora\": true");
    refused(o, CHOIR_E_INVALID, "lora_magnitude_vector");
    adapters[1].folder = with_config("kind", ", \"alora_invocation_tokens\": [5, 6]");
    refused(o, CHOIR_E_UNIMPLEMENTED, "is of the kind aLoRA");
    adapters[1].folder = with_config("kind", ", \"use_qalora\": true");
    refused(o, CHOIR_E_UNIMPLEMENTED, "use_qalora");
    adapters[1].folder = with_config("kind", ", \"init_lora_weights\": \"pissa\"");
    refused(o, CHOIR_E_UNIMPLEMENTED, "pissa");
    adapters[1].folder = with_config("kind", ", \"rank_pattern\": {\"down_proj\": 5}");
    refused(o, CHOIR_E_INVALID, "down_proj");
    adapters[1].folder = with_vector("lora_magnitude_vector", "use_dora");
    refused(o, CHOIR_E_UNIMPLEMENTED, "is of the kind DoRA");
    adapters[1].folder = with_vector("lora_B.bias", "lora_bias");
    refused(o, CHOIR_E_UNIMPLEMENTED, "whole weights or biases of ATTN_V in layer 0");
    adapters[1].folder = write_ia3("kind");
    refused(o, CHOIR_E_UNIMPLEMENTED, "is of the kind IA3");
    write_text(in_folder("kind"), "adapter_config.json", "{\"peft_type\": ");
    refused(o, CHOIR_E_FORMAT, "adapter_config.json");
}

/* One adapter of a matrix, under one of the names that it has had. */
static void write_named(const char *name, const char *module, uint32_t rows, uint32_t cols)
{
    tensors t = {0};
    char a[160], b[160];
    float numbers[4 * 160] = {0};
    must(choir_folder_make(in_folder(name)));
    write_config(name, 2, "\"target_modules\": [\"q_proj\"]");
    snprintf(a, sizeof a, "base_model.model.%s.lora_A.weight", module);
    snprintf(b, sizeof b, "base_model.model.%s.lora_B.weight", module);
    add_tensor(&t, a, 2, cols, numbers);
    add_tensor(&t, b, rows, 2, numbers);
    write_tensors(&t, in_folder(name), "adapter_model.safetensors");
}

static void matrices_with_two_names(void **state)
{
    (void)state;
    static const struct {
        const char *base, *a, *b;
        uint32_t rows, cols;
    } cases[] = {
        {BASE, "model.layers.0.self_attn.v_proj", "model.language_model.layers.0.self_attn.v_proj",
         32, 64},
        {MOE, "model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.gate", 8, 64},
    };
    choir_merge_result made;
    use_fixtures("ab");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_named("one-name", cases[i].a, cases[i].rows, cases[i].cols);
        write_named("other-name", cases[i].b, cases[i].rows, cases[i].cols);
        adapters[0].folder = in_folder("one-name");
        adapters[1].folder = in_folder("other-name");
        choir_merge_options o = options(cases[i].base, in_folder("of-two-names"), 2);
        refused(o, CHOIR_E_INVALID, "are one matrix of the base under two names");
        refused(o, CHOIR_E_INVALID, cases[i].b);
        adapters[1].folder = in_folder("one-name");
        o = options(cases[i].base, in_folder(i == 0 ? "of-one-name" : "of-one-name-more"), 2);
        must(choir_merge(&o, &made));
    }
}

static void numbers_that_are_none(void **state)
{
    (void)state;
    tensors t = {0};
    float a[4 * 64] = {0}, b[32 * 4] = {0};
    must(choir_folder_make(in_folder("nan")));
    write_config("nan", 4, "\"target_modules\": [\"v_proj\"]");
    b[77] = NAN;
    add_tensor(&t, "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", 4, 64, a);
    add_tensor(&t, "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight", 32, 4, b);
    write_tensors(&t, in_folder("nan"), "adapter_model.safetensors");
    use_fixtures("ab");
    adapters[1].folder = in_folder("nan");
    for (int method = 0; method < CHOIR_N_MERGE_METHODS; method++) {
        choir_merge_options o = options(BASE, in_folder("of-nan"), 2);
        o.method = (choir_merge_method)method;
        if (choir_merge_method_of(o.method)->pruning != CHOIR_MERGE_PRUNES_NOTHING) o.density = 0.5;
        refused(o, CHOIR_E_DATA_LOSS, "v_proj.lora_B.weight' holds NaN");
    }
    /* what f32 holds and f16 does not */
    must(choir_folder_make(in_folder("large")));
    write_config("large", 4, "\"target_modules\": [\"v_proj\"]");
    b[77] = 70000;
    t = (tensors){0};
    add_tensor(&t, "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", 4, 64, a);
    add_tensor(&t, "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight", 32, 4, b);
    write_tensors(&t, in_folder("large"), "adapter_model.safetensors");
    adapters[1].folder = in_folder("large");
    choir_merge_options o = options(BASE, in_folder("of-large"), 2);
    o.dtype = CHOIR_F16;
    refused(o, CHOIR_E_DATA_LOSS, "too large for F16");
}

static void interrupted(void **state)
{
    (void)state;
    const volatile sig_atomic_t now = 1;
    use_fixtures("ab");
    choir_merge_options o = options(BASE, in_folder("interrupted"), 2);
    o.interrupted = &now;
    refused(o, CHOIR_E_CANCELLED, "interrupted");
}

static size_t held(void)
{
    size_t sum = 0;
    for (choir_memory_tag t = 0; t < CHOIR_MEM_N_TAGS; t++) sum += choir_memory_bytes(t);
    return sum;
}

/* Each allocation fails once: a sentence, nothing left behind, nothing held. */
static void memory_that_runs_out(void **state)
{
    (void)state;
    choir_merge_result made;
    size_t before = held();
    uint32_t n_before = n_in_folder(folder);
    use_fixtures("abd");
    choir_merge_options o = options(BASE, in_folder("memory"), 3);
    o.method = CHOIR_MERGE_TIES_SVD;
    o.density = 0.5;
    o.n_threads = 1;
    choir_status status = CHOIR_E_NO_MEMORY;
    for (uint32_t n = 1; status == CHOIR_E_NO_MEMORY; n++) {
        choir_memory_fail_at(n);
        status = choir_merge(&o, &made);
        choir_memory_fail_at(0);
        assert_int_equal(held(), before);
        if (status == CHOIR_OK) break;
        assert_int_equal(n_in_folder(folder), n_before);
    }
    must(status);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_as_peft),
        cmocka_unit_test(the_configuration_says_what_is_there),
        cmocka_unit_test(what_is_made_can_be_read),
        cmocka_unit_test(threads_change_nothing_and_seeds_do),
        cmocka_unit_test(experts_are_alike_in_both_layouts),
        cmocka_unit_test(targets_are_words_or_whole_names),
        cmocka_unit_test(bad_options),
        cmocka_unit_test(adapters_that_cannot_be_joined),
        cmocka_unit_test(kinds_that_are_no_sums),
        cmocka_unit_test(matrices_with_two_names),
        cmocka_unit_test(numbers_that_are_none),
        cmocka_unit_test(interrupted),
        cmocka_unit_test(memory_that_runs_out),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
