/* A byte that says which base, then an adapter_config.json, and behind a zero byte an
 * adapter_model.safetensors; where the configuration is empty, a GGUF LoRA file: read or refused,
 * and what is read can be read through. What can be read whole can be read by its header too. The
 * seeds fit the shapes below. */
#include "base/base.h"
#include "engine/adapter_file.h"
#include "engine/families/families.h"

#include <math.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static const struct {
    const char *family;
    bool pairs, moe, latent;
} bases[] = {{"llama", false, false, false},      {"llama", true, false, false},
             {"mixtral", false, true, false},     {"gpt_oss", false, true, false},
             {"llama4_text", false, true, false}, {"deepseek_v3", false, true, true},
             {"phi3", false, false, false},       {"gemma2", false, false, false},
             {"qwen2_moe", true, true, false}};

static choir_model_config base_of(size_t i)
{
    const choir_family *f = choir_family_of_model_type(bases[i].family);
    choir_model_config c = f->properties;
    c.family = f;
    c.n_layers = 2;
    c.hidden = 8;
    c.vocab = 16;
    c.n_heads = 2;
    c.n_kv_heads = 1;
    c.head_dim = 4;
    c.ffn_hidden = c.expert_hidden = c.shared_hidden = 12;
    c.n_experts = bases[i].moe ? 2 : 0;
    c.n_experts_used = 1;
    c.embedding_scale = 2;
    c.rope.interleaved = c.rope.interleaved || bases[i].pairs;
    for (uint32_t l = 0; l < c.n_layers; l++)
        c.layers[l] = bases[i].moe && l > 0 ? CHOIR_LAYER_MOE : 0;
    if (!bases[i].latent) return c;
    c.n_kv_heads = c.n_heads;
    c.kv_lora_rank = c.q_lora_rank = 6;
    c.nope_dim = c.rope_dim = c.value_dim = 2;
    return c;
}

static void read_through(const float *values, size_t n)
{
    for (size_t i = 0; values != NULL && i < n; i++) CHOIR_ASSERT(!isnan(values[i]));
}

static void use(const choir_model_config *base, const choir_adapter_data *d)
{
    size_t width = (size_t)base->n_kv_heads * base->head_dim;
    for (size_t i = 0; i < d->n_changes; i++) {
        const choir_adapter_change *c = &d->changes[i];
        bool table = c->role == CHOIR_ROLE_EMBEDDING, behind = c->series || c->residual;
        CHOIR_ASSERT(c->role < CHOIR_N_ROLES && c->layer < base->n_layers && c->has != 0);
        CHOIR_ASSERT(c->index < choir_role_count(base, c->role));
        CHOIR_ASSERT(c->rank <= d->max_rank && isfinite(c->scale));
        read_through(c->a, (size_t)c->rank * (table || behind ? c->rows : c->cols));
        read_through(c->b, (size_t)c->rank * (table ? c->cols : c->rows));
        read_through(c->a_bias, c->rank);
        read_through(c->b_bias, c->rows);
        read_through(c->magnitude, table ? c->cols : c->rows);
        read_through(c->out_scale, c->rows);
        read_through(c->in_scale, c->cols);
        read_through(c->weight, (size_t)c->rows * c->cols);
        read_through(c->bias, c->rows);
    }
    read_through(d->virtual_embeddings, (size_t)d->n_virtual * base->hidden);
    read_through(d->virtual_keys, base->n_layers * d->n_virtual * width);
    read_through(d->virtual_values, base->n_layers * d->n_virtual * width);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes == 0) return 0;
    const choir_model_config base = base_of(data[0] % (sizeof bases / sizeof *bases));
    const char *config = (const char *)data + 1;
    const uint8_t *zero = memchr(config, 0, bytes - 1);
    if (zero == NULL) return 0;
    choir_adapter_source source = {.name = "adapter",
                                   .config = zero == data + 1 ? NULL : config,
                                   .config_bytes = (size_t)(zero - data - 1),
                                   .tensors = zero + 1,
                                   .tensor_bytes = (size_t)(data + bytes - zero - 1)};
    choir_adapter_data *whole, *header;
    choir_status status = choir_adapter_data_parse(&base, &source, &whole);
    CHOIR_ASSERT(status != CHOIR_E_INTERNAL && status != CHOIR_E_NO_MEMORY);
    choir_status checked = choir_adapter_data_check(&base, &source, source.tensor_bytes, &header);
    CHOIR_ASSERT(status != CHOIR_OK || checked == CHOIR_OK);
    if (status == CHOIR_OK) {
        use(&base, whole);
        CHOIR_ASSERT(whole->n_changes == header->n_changes);
        choir_adapter_data_free(whole);
    }
    if (checked == CHOIR_OK) choir_adapter_data_free(header);
    return 0;
}
