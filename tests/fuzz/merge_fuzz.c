/* An adapter_config.json, and behind a zero byte an adapter_model.safetensors: its pairs are listed
 * or refused; what is listed can be merged with itself by every method, into finite numbers. The
 * seeds fit the shape below. */
#include "engine/adapter_pairs.h"
#include "engine/model_config.h"
#include "tests/fuzz/two_files.h"
#include "tune/merge_module.h"

#include <math.h>

static const char base_text[] =
    "{\"architectures\": [\"MixtralForCausalLM\"], \"model_type\": \"mixtral\", \"hidden_size\": "
    "8, "
    "\"num_hidden_layers\": 2, \"num_attention_heads\": 2, \"num_key_value_heads\": 1, "
    "\"intermediate_size\": 12, \"vocab_size\": 20, \"max_position_embeddings\": 64, "
    "\"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\", "
    "\"tie_word_embeddings\": false, \"num_local_experts\": 3, \"num_experts_per_tok\": 2}";

static const choir_model_config *base(void)
{
    static choir_model_config config;
    if (config.n_layers > 0) return &config;
    char folder[] = "/tmp/choir-fuzz-base-XXXXXX", path[64];
    CHOIR_ASSERT(mkdtemp(folder) != NULL);
    snprintf(path, sizeof path, "%s/config.json", folder);
    FILE *f = fopen(path, "wb");
    CHOIR_ASSERT(f != NULL && fputs(base_text, f) >= 0 && fclose(f) == 0);
    CHOIR_ASSERT(choir_config_read_hf(&(choir_texts){.path = folder}, &config) == CHOIR_OK);
    CHOIR_ASSERT(choir_config_check(folder, &config) == CHOIR_OK);
    unlink(path);
    rmdir(folder);
    return &config;
}

/* The first expert's, or the whole: stacked factors are longer, never shorter. */
static bool read_all(const choir_tensor *t, size_t n, float *out)
{
    float *row = malloc(t->cols * sizeof *row);
    for (uint32_t i = 0; i < t->rows; i++) {
        choir_tensor_row(t, i, row);
        for (size_t j = 0; j < t->cols; j++) {
            if (!isfinite(row[j])) {
                free(row);
                return false;
            }
            if ((size_t)i * t->cols + j < n) out[(size_t)i * t->cols + j] = row[j];
        }
    }
    free(row);
    return true;
}

static void merge(const choir_adapter_raw_pair *p, const float *a, const float *b,
                  choir_merge_method method)
{
    const choir_merge_options o = {.method = method, .density = 0.5};
    const choir_tune_source sources[] = {{a, b, p->rank, (double)p->scale, 1, 0},
                                         {a, b, p->rank, (double)p->scale, -0.5, 1}};
    uint32_t rank = method == CHOIR_MERGE_CAT ? 2 * p->rank : p->rank;
    size_t n_a = (size_t)rank * p->cols, n_b = (size_t)p->rows * rank;
    float *out_a = malloc(n_a * sizeof *out_a), *out_b = malloc(n_b * sizeof *out_b);
    const choir_tune_target target = {p->name, 1, p->rows, p->cols, rank, out_a, out_b};
    choir_status status = choir_tune_merge_module(&o, sources, 2, &target);
    CHOIR_ASSERT(status == CHOIR_OK || status == CHOIR_E_DATA_LOSS);
    for (size_t i = 0; status == CHOIR_OK && i < n_a; i++) CHOIR_ASSERT(isfinite(out_a[i]));
    for (size_t i = 0; status == CHOIR_OK && i < n_b; i++) CHOIR_ASSERT(isfinite(out_b[i]));
    free(out_a);
    free(out_b);
}

static void merge_pair(const choir_adapter_raw_pair *p)
{
    CHOIR_ASSERT(p->rank > 0 && p->rank <= CHOIR_ADAPTER_MAX_RANK);
    CHOIR_ASSERT(p->a.rows == p->n_experts * p->rank && p->b.cols == p->a.rows);
    size_t n_a = (size_t)p->rank * p->cols, n_b = (size_t)p->rows * p->rank;
    float *a = malloc(n_a * sizeof *a), *b = malloc(n_b * sizeof *b);
    bool finite = read_all(&p->a, n_a, a) && read_all(&p->b, n_b, b);
    for (int method = 0; finite && method < CHOIR_N_MERGE_METHODS; method++)
        merge(p, a, b, (choir_merge_method)method);
    free(a);
    free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const char *folder =
        write_two_files("adapter_config.json", "adapter_model.safetensors", data, bytes);
    choir_adapter_pairs *pairs;
    choir_status status = choir_adapter_pairs_open(base(), folder, &pairs);
    CHOIR_ASSERT(status != CHOIR_E_INTERNAL && status != CHOIR_E_IO);
    if (status != CHOIR_OK) return 0;
    for (size_t i = 0; i < pairs->n; i++) {
        CHOIR_ASSERT(choir_adapter_pairs_find(pairs, pairs->items[i].name) == &pairs->items[i]);
        merge_pair(&pairs->items[i]);
    }
    choir_adapter_pairs_close(pairs);
    return 0;
}
