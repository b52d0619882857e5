/* Virtual tokens before the prompt: rows of the embedding (prompt tuning, Lester et al. 2021;
 * p-tuning, Liu et al. 2021, of which PEFT saves what its encoder gives), or keys and values of
 * every layer (prefix tuning, Li and Liang 2021). */
#include "engine/adapter_read.h"

#include <inttypes.h>
#include <string.h>

static choir_status find_prompt(choir_adapter_reader *r, uint64_t width, choir_adapter_tensor **out)
{
    double n;
    const char *name = "prompt_embeddings";
    CHOIR_TRY(choir_adapter_number(r, "num_virtual_tokens", &n));
    if (!(n >= 1 && n <= CHOIR_ADAPTER_MAX_VIRTUAL) || n != (uint32_t)n)
        return choir_fail(CHOIR_E_INVALID,
                          "%s: num_virtual_tokens is %g, must be a whole number from 1 to %d",
                          r->name, n, CHOIR_ADAPTER_MAX_VIRTUAL);
    const json_t *submodules = choir_adapter_get(r, "num_transformer_submodules");
    if (submodules != NULL && json_number_value(submodules) != 1)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: num_transformer_submodules is %g; Choir's models have one decoder",
                          r->name, json_number_value(submodules));
    *out = choir_adapter_find(r, name);
    if (*out == NULL)
        return choir_fail(CHOIR_E_INVALID, "%s: tensor '%s' is missing", r->name, name);
    r->data->n_virtual = (uint32_t)n;
    return choir_adapter_expect(r, *out, (uint64_t)n, width);
}

choir_status choir_adapter_read_prompt(choir_adapter_reader *r)
{
    choir_adapter_tensor *t;
    bool prompt = strcmp(choir_adapter_string(r, "peft_type", ""), "P_TUNING") != 0;
    snprintf(r->data->kind, sizeof r->data->kind, prompt ? "prompt tuning" : "p-tuning");
    CHOIR_TRY(find_prompt(r, r->base->hidden, &t));
    CHOIR_TRY(choir_adapter_read(r, t, NULL, &r->data->virtual_embeddings));
    float *values = (float *)r->data->virtual_embeddings; /* the reader's own */
    size_t n = (size_t)r->data->n_virtual * r->base->hidden;
    /* Where transformers' table of embeddings scales what it gives, prompts come behind that scale.
     */
    if (values != NULL && r->base->family->scales_table)
        for (size_t i = 0; i < n; i++) values[i] /= r->base->embedding_scale;
    return CHOIR_OK;
}

/* PEFT's [tokens, layers, key and value, heads, head_dim] as [layers, tokens, heads * head_dim]. */
static choir_status spread(choir_adapter_reader *r, choir_adapter_tensor *t)
{
    const choir_model_config *c = r->base;
    choir_adapter_data *d = r->data;
    uint32_t width = c->n_kv_heads * c->head_dim, n = d->n_virtual;
    const float *from;
    float *to[2];
    /* Keys are turned as the base's are, in pairs or in halves. */
    const choir_adapter_place place = {.role = CHOIR_ROLE_ATTN_K};
    const choir_adapter_rows order = choir_adapter_rows_of(r, &place);
    CHOIR_TRY(choir_adapter_load(r, t, &from));
    for (int i = 0; i < 2; i++)
        CHOIR_TRY(choir_adapter_floats(r, (size_t)c->n_layers * n * width, &to[i]));
    for (uint32_t l = 0; l < c->n_layers; l++)
        for (uint32_t v = 0; v < n; v++) {
            const float *key = from + ((size_t)v * c->n_layers + l) * 2 * width;
            size_t at = ((size_t)l * n + v) * width;
            for (uint32_t i = 0; i < width; i++) to[0][at + i] = key[choir_adapter_row(&order, i)];
            memcpy(to[1] + at, key + width, width * sizeof *key);
        }
    d->virtual_keys = to[0];
    d->virtual_values = to[1];
    return CHOIR_OK;
}

choir_status choir_adapter_read_prefix(choir_adapter_reader *r)
{
    const choir_model_config *c = r->base;
    choir_adapter_tensor *t;
    snprintf(r->data->kind, sizeof r->data->kind, "prefix tuning");
    if (choir_is_latent(c))
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s: prefix tuning gives keys and values, the base (%s) keeps latents of both", r->name,
            c->family->name);
    const json_t *heads = choir_adapter_get(r, "num_attention_heads");
    if (heads != NULL && json_number_value(heads) != c->n_kv_heads)
        return choir_fail(
            CHOIR_E_INVALID,
            "%s: num_attention_heads of adapter_config.json is %g, the base has %u heads of "
            "keys",
            r->name, json_number_value(heads), c->n_kv_heads);
    uint64_t width = (uint64_t)c->n_layers * 2 * c->n_kv_heads * c->head_dim;
    CHOIR_TRY(find_prompt(r, width, &t));
    t->used = true;
    return r->headers_only ? CHOIR_OK : spread(r, t);
}
