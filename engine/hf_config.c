#include "engine/model_config.h"

#include "base/base.h"

#include <math.h>
#include <string.h>

enum { MAX_CONFIG_BYTES = 4 << 20 };

typedef struct reader {
    const char *path;
    const json_t *root;
} reader;

static choir_status load_json(const char *path, json_t **out)
{
    char *text;
    size_t bytes;
    json_error_t error;
    CHOIR_TRY(choir_file_read(path, MAX_CONFIG_BYTES, &text, &bytes));
    *out = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    choir_free(text);
    if (!json_is_object(*out)) {
        json_decref(*out);
        return choir_fail(CHOIR_E_FORMAT, "%s: bad JSON in line %d: %s", path, error.line,
                          *out == NULL ? error.text : "not an object");
    }
    return CHOIR_OK;
}

/* null counts as absent: config.json of many models writes "head_dim": null. */
static const json_t *get(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

static choir_status read_count(const reader *r, const char *key, bool needed, uint32_t *out)
{
    const json_t *value = get(r->root, key);
    if (value == NULL && !needed) return CHOIR_OK;
    if (value == NULL) return choir_fail(CHOIR_E_FORMAT, "%s lacks '%s'", r->path, key);
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) > 1 << 30)
        return choir_fail(CHOIR_E_FORMAT, "%s: '%s' is no whole number from 0 to %d", r->path, key,
                          1 << 30);
    *out = (uint32_t)json_integer_value(value);
    return CHOIR_OK;
}

static choir_status read_real(const reader *r, const json_t *object, const char *key, float *out)
{
    const json_t *value = get(object, key);
    if (value == NULL) return CHOIR_OK;
    if (!json_is_number(value) || !isfinite((float)json_number_value(value)))
        return choir_fail(CHOIR_E_FORMAT, "%s: '%s' is no number", r->path, key);
    *out = (float)json_number_value(value);
    return CHOIR_OK;
}

static choir_status read_flag(const reader *r, const char *key, bool *out)
{
    const json_t *value = get(r->root, key);
    if (value == NULL) return CHOIR_OK;
    if (!json_is_boolean(value))
        return choir_fail(CHOIR_E_FORMAT, "%s: '%s' is neither true nor false", r->path, key);
    *out = json_is_true(value);
    return CHOIR_OK;
}

static choir_status read_family(const reader *r, choir_model_config *c)
{
    const json_t *type = get(r->root, "model_type");
    char nearest[256];
    if (!json_is_string(type)) return choir_fail(CHOIR_E_FORMAT, "%s lacks 'model_type'", r->path);
    c->family = choir_family_of_model_type(json_string_value(type));
    if (c->family != NULL) return CHOIR_OK;
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "%s: 'model_type' is \"%.60s\", a family Choir does not know; the nearest known "
                      "ones are %s",
                      r->path, json_string_value(type),
                      choir_family_nearest(json_string_value(type), false, nearest, sizeof nearest));
}

/* rope_parameters (transformers 5), or rope_theta and rope_scaling beside it (before). */
static choir_status read_rope(const reader *r, choir_model_config *c)
{
    const json_t *parameters = get(r->root, "rope_parameters");
    const json_t *scaling = parameters != NULL ? parameters : get(r->root, "rope_scaling");
    choir_rope_config *rope = &c->rope;
    rope->theta = 10000;
    rope->rotary_dims = c->head_dim;
    CHOIR_TRY(read_real(r, r->root, "rope_theta", &rope->theta));
    if (scaling == NULL) return CHOIR_OK;
    CHOIR_TRY(read_real(r, scaling, "rope_theta", &rope->theta));
    const json_t *type = get(scaling, "rope_type");
    if (type == NULL) type = get(scaling, "type");
    const char *kind = json_is_string(type) ? json_string_value(type) : "default";
    if (strcmp(kind, "default") == 0) return CHOIR_OK;
    float original = 0;
    CHOIR_TRY(read_real(r, scaling, "factor", &rope->factor));
    CHOIR_TRY(read_real(r, scaling, "low_freq_factor", &rope->low_freq_factor));
    CHOIR_TRY(read_real(r, scaling, "high_freq_factor", &rope->high_freq_factor));
    CHOIR_TRY(read_real(r, scaling, "original_max_position_embeddings", &original));
    rope->original_max_positions = original > 0 && original < 1e9F ? (uint32_t)original : 0;
    if (strcmp(kind, "linear") == 0)
        rope->scaling = CHOIR_ROPE_LINEAR;
    else if (strcmp(kind, "llama3") == 0)
        rope->scaling = CHOIR_ROPE_LLAMA3;
    else
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: 'rope_type' is \"%.40s\"; Choir has default, linear and llama3",
                          r->path, kind);
    return CHOIR_OK;
}

static choir_status read_ids(const reader *r, choir_model_config *c)
{
    const json_t *bos = get(r->root, "bos_token_id"), *eos = get(r->root, "eos_token_id");
    const json_t *pad = get(r->root, "pad_token_id");
    if (json_is_integer(bos)) choir_config_set_id(c, json_integer_value(bos), &c->bos_id);
    if (json_is_integer(pad)) choir_config_set_id(c, json_integer_value(pad), &c->pad_id);
    if (json_is_integer(eos)) choir_config_add_eos(c, json_integer_value(eos));
    for (size_t i = 0; json_is_array(eos) && i < json_array_size(eos); i++)
        if (json_is_integer(json_array_get(eos, i)))
            choir_config_add_eos(c, json_integer_value(json_array_get(eos, i)));
    return CHOIR_OK;
}

/* What the token path cannot do is refused by name, not ignored. */
static choir_status refuse_unknown(const reader *r)
{
    const json_t *activation = get(r->root, "hidden_act");
    if (json_is_string(activation) && strcmp(json_string_value(activation), "silu") != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: 'hidden_act' is \"%.40s\", Choir has silu",
                          r->path, json_string_value(activation));
    static const char *const must_be_off[] = {"mlp_bias", "clip_qkv"};
    for (size_t i = 0; i < sizeof must_be_off / sizeof *must_be_off; i++) {
        const json_t *value = get(r->root, must_be_off[i]);
        if (value != NULL && !json_is_false(value))
            return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: '%s' is set, Choir lacks that", r->path,
                              must_be_off[i]);
    }
    return CHOIR_OK;
}

static choir_status read_experts(const reader *r, choir_model_config *c)
{
    c->normalise_topk = c->family->normalise_topk;
    if (!c->family->moe) return read_count(r, "intermediate_size", true, &c->ffn_hidden);
    CHOIR_TRY(read_count(r, "num_experts", false, &c->n_experts));
    CHOIR_TRY(read_count(r, "num_local_experts", false, &c->n_experts));
    CHOIR_TRY(read_count(r, "num_experts_per_tok", true, &c->n_experts_used));
    CHOIR_TRY(read_count(r, "intermediate_size", true, &c->expert_hidden));
    CHOIR_TRY(read_count(r, "moe_intermediate_size", false, &c->expert_hidden));
    CHOIR_TRY(read_flag(r, "norm_topk_prob", &c->normalise_topk));
    uint32_t sparse_step = 1;
    CHOIR_TRY(read_count(r, "decoder_sparse_step", false, &sparse_step));
    if (sparse_step != 1 || json_array_size(get(r->root, "mlp_only_layers")) > 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: dense layers among MoE layers (decoder_sparse_step, mlp_only_layers)",
                          r->path);
    if (c->n_experts == 0)
        return choir_fail(CHOIR_E_FORMAT, "%s: '%s' has no experts", r->path, c->family->name);
    return CHOIR_OK;
}

static choir_status read_shapes(const reader *r, choir_model_config *c)
{
    CHOIR_TRY(read_count(r, "num_hidden_layers", true, &c->n_layers));
    CHOIR_TRY(read_count(r, "hidden_size", true, &c->hidden));
    CHOIR_TRY(read_count(r, "num_attention_heads", true, &c->n_heads));
    c->n_kv_heads = c->n_heads;
    CHOIR_TRY(read_count(r, "num_key_value_heads", false, &c->n_kv_heads));
    c->head_dim = c->n_heads > 0 ? c->hidden / c->n_heads : 0;
    CHOIR_TRY(read_count(r, "head_dim", false, &c->head_dim));
    CHOIR_TRY(read_count(r, "vocab_size", true, &c->vocab));
    c->max_positions = 2048;
    CHOIR_TRY(read_count(r, "max_position_embeddings", false, &c->max_positions));
    CHOIR_TRY(read_count(r, "sliding_window", false, &c->sliding_window));
    bool windowed = true;
    CHOIR_TRY(read_flag(r, "use_sliding_window", &windowed));
    if (!windowed) c->sliding_window = 0;
    c->norm_eps = 1e-6F;
    CHOIR_TRY(read_real(r, r->root, "rms_norm_eps", &c->norm_eps));
    return read_flag(r, "tie_word_embeddings", &c->tied_head);
}

static choir_status read_generation(const char *folder, choir_model_config *c)
{
    char path[4096];
    json_t *root;
    snprintf(path, sizeof path, "%s/generation_config.json", folder);
    if (!choir_file_exists(path)) return CHOIR_OK;
    CHOIR_TRY(load_json(path, &root));
    const reader r = {path, root};
    choir_status status = read_ids(&r, c);
    float top_k = 0;
    bool sampled = false;
    if (status == CHOIR_OK) status = read_flag(&r, "do_sample", &sampled);
    if (status == CHOIR_OK && sampled) {
        status = read_real(&r, root, "temperature", &c->temperature);
        if (status == CHOIR_OK) status = read_real(&r, root, "top_p", &c->top_p);
        if (status == CHOIR_OK) status = read_real(&r, root, "top_k", &top_k);
        if (status == CHOIR_OK)
            status = read_real(&r, root, "repetition_penalty", &c->repetition_penalty);
        c->top_k = top_k > 0 && top_k < 1e9F ? (int32_t)top_k : 0;
    }
    json_decref(root);
    return status;
}

static choir_status read_config(const reader *r, choir_model_config *c)
{
    CHOIR_TRY(read_family(r, c));
    CHOIR_TRY(refuse_unknown(r));
    CHOIR_TRY(read_shapes(r, c));
    CHOIR_TRY(read_experts(r, c));
    CHOIR_TRY(read_rope(r, c));
    return read_ids(r, c);
}

choir_status choir_config_read_hf(const char *folder, choir_model_config *c)
{
    char path[4096];
    json_t *root;
    if ((size_t)snprintf(path, sizeof path, "%s/config.json", folder) >= sizeof path)
        return choir_fail(CHOIR_E_INVALID, "the folder's name is too long");
    CHOIR_TRY(load_json(path, &root));
    const reader r = {path, root};
    *c = (choir_model_config){.bos_id = -1, .pad_id = -1, .temperature = -1, .top_p = -1};
    const char *slash = strrchr(folder, '/');
    snprintf(c->name, sizeof c->name, "%.100s", slash != NULL && slash[1] != '\0' ? slash + 1 : folder);
    choir_status status = read_config(&r, c);
    json_decref(root);
    CHOIR_TRY(status);
    return read_generation(folder, c);
}
