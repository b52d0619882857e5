#include "engine/model_config.h"

#include "base/base.h"

#include <math.h>
#include <string.h>

enum { MAX_CONFIG_BYTES = 4 << 20 };

typedef struct reader {
    const char *path;
    const json_t *root;
} reader;

static choir_status load_json(const choir_texts *texts, const char *name, const char *path,
                              json_t **out)
{
    char *text;
    size_t bytes;
    json_error_t error;
    CHOIR_TRY(choir_texts_read(texts, name, MAX_CONFIG_BYTES, &text, &bytes));
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

/* A whole number; of a list with one entry a layer, all alike, the entry. */
static choir_status read_count(const reader *r, const char *key, bool needed, uint32_t *out)
{
    const json_t *value = get(r->root, key);
    if (value == NULL && !needed) return CHOIR_OK;
    if (value == NULL) return choir_fail(CHOIR_E_FORMAT, "%s lacks '%s'", r->path, key);
    for (size_t i = 1; i < json_array_size(value); i++)
        if (!json_equal(json_array_get(value, 0), json_array_get(value, i)))
            return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: '%s' differs between layers", r->path,
                              key);
    if (json_array_size(value) > 0) value = json_array_get(value, 0);
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

static choir_status find_family(const reader *r, const choir_family **out)
{
    const json_t *type = get(r->root, "model_type");
    char nearest[256];
    if (!json_is_string(type)) return choir_fail(CHOIR_E_FORMAT, "%s lacks 'model_type'", r->path);
    *out = choir_family_of_model_type(json_string_value(type));
    if (*out != NULL) return CHOIR_OK;
    return choir_fail(
        CHOIR_E_UNIMPLEMENTED,
        "%s: 'model_type' is \"%.60s\", a family Choir does not know; the nearest known "
        "ones are %s",
        r->path, json_string_value(type),
        choir_family_nearest(json_string_value(type), false, nearest, sizeof nearest));
}

static choir_status read_key(const reader *r, const choir_key *key, choir_model_config *c)
{
    const json_t *value = key->hf == NULL ? NULL : get(r->root, key->hf);
    uint32_t count = 0;
    float real = 0;
    bool flag = false;
    /* A family may have the default that its configuration class has. */
    bool needed = key->needed && choir_config_count(c, key) == 0;
    if (key->hf == NULL) return CHOIR_OK;
    if (value == NULL && !needed) {
        /* A key that is null is none, whatever the family starts from: no soft cap, no window. */
        if (json_object_get(r->root, key->hf) != NULL) choir_config_set(c, key, 0);
        return CHOIR_OK;
    }
    switch (key->kind) {
    case CHOIR_KEY_COUNT:
        CHOIR_TRY(read_count(r, key->hf, needed, &count));
        choir_config_set(c, key, count);
        break;
    case CHOIR_KEY_REAL:
        CHOIR_TRY(read_real(r, r->root, key->hf, &real));
        choir_config_set(c, key, real);
        break;
    default:
        CHOIR_TRY(read_flag(r, key->hf, &flag));
        choir_config_set(c, key, flag);
        break;
    }
    return CHOIR_OK;
}

static choir_status read_keys(const reader *r, const choir_key *keys, choir_model_config *c)
{
    for (; keys != NULL && (keys->hf != NULL || keys->gguf != NULL); keys++)
        CHOIR_TRY(read_key(r, keys, c));
    return CHOIR_OK;
}

static choir_status read_rope_kind(const reader *r, const json_t *from, choir_rope_config *rope)
{
    static const struct {
        const char *text;
        choir_rope_scaling scaling;
    } kinds[] = {{"default", CHOIR_ROPE_NONE},    {"linear", CHOIR_ROPE_LINEAR},
                 {"llama3", CHOIR_ROPE_LLAMA3},   {"yarn", CHOIR_ROPE_YARN},
                 {"dynamic", CHOIR_ROPE_DYNAMIC}, {"longrope", CHOIR_ROPE_LONGROPE},
                 {"su", CHOIR_ROPE_LONGROPE}};
    const json_t *type = get(from, "rope_type");
    if (type == NULL) type = get(from, "type");
    const char *kind = json_is_string(type) ? json_string_value(type) : "default";
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(kinds[i].text, kind) == 0) {
            rope->scaling = kinds[i].scaling;
            return CHOIR_OK;
        }
    return choir_fail(
        CHOIR_E_UNIMPLEMENTED,
        "%s: 'rope_type' is \"%.40s\"; Choir has default, linear, llama3, yarn, dynamic and "
        "longrope",
        r->path, kind);
}

/* YaRN's factor on cos and sin, where the file does not give it; and DeepSeek's on the scores. */
static choir_status read_yarn(const reader *r, const json_t *from, choir_rope_config *rope,
                              choir_model_config *c)
{
    float mscale = 0, all = 0, fast = 0, slow = 0;
    CHOIR_TRY(read_real(r, from, "mscale", &mscale));
    CHOIR_TRY(read_real(r, from, "mscale_all_dim", &all));
    CHOIR_TRY(read_real(r, from, "beta_fast", &fast));
    CHOIR_TRY(read_real(r, from, "beta_slow", &slow));
    if (fast != 0) rope->beta_fast = fast;
    if (slow != 0) rope->beta_slow = slow;
    rope->untruncated = json_is_false(get(from, "truncate"));
    if (rope->attention_factor == 0)
        rope->attention_factor = mscale != 0 && all != 0 ? choir_yarn_mscale(rope->factor, mscale) /
                                                               choir_yarn_mscale(rope->factor, all)
                                                         : choir_yarn_mscale(rope->factor, 1);
    if (choir_is_latent(c) && all != 0) {
        float m = choir_yarn_mscale(rope->factor, all);
        c->attention_scale = m * m / sqrtf((float)(c->nope_dim + c->rope_dim));
    }
    return CHOIR_OK;
}

static choir_status read_divisors(const reader *r, const json_t *from, const char *key, uint32_t n,
                                  float *out)
{
    const json_t *list = get(from, key);
    if (json_array_size(list) != n || n > CHOIR_MAX_ROPE_DIVISORS)
        return choir_fail(CHOIR_E_FORMAT, "%s: '%s' has %zu entries, must be %u (at most %d)",
                          r->path, key, json_array_size(list), n, CHOIR_MAX_ROPE_DIVISORS);
    for (uint32_t i = 0; i < n; i++) {
        const json_t *value = json_array_get(list, i);
        out[i] = (float)json_number_value(value);
        if (!json_is_number(value) || !(out[i] > 0) || !isfinite(out[i]))
            return choir_fail(CHOIR_E_FORMAT, "%s: entry %u of '%s' is no positive number", r->path,
                              i, key);
    }
    return CHOIR_OK;
}

/* Phi-3.5-MoE gives the factors for short and long contexts; others the one, or what it follows
 * from. */
static choir_status read_longrope(const reader *r, const json_t *from, choir_rope_config *rope,
                                  choir_model_config *c)
{
    uint32_t n = rope->rotary_dims / 2;
    CHOIR_TRY(read_divisors(r, from, "short_factor", n, c->short_divisors));
    CHOIR_TRY(read_divisors(r, from, "long_factor", n, c->long_divisors));
    if (rope->attention_factor == 0)
        rope->attention_factor =
            rope->factor <= 1
                ? 1
                : sqrtf(1 + logf(rope->factor) / logf((float)rope->original_max_positions));
    rope->long_attention_factor = rope->attention_factor;
    CHOIR_TRY(read_real(r, from, "short_mscale", &rope->attention_factor));
    return read_real(r, from, "long_mscale", &rope->long_attention_factor);
}

/* One object with rope_type and what belongs to it; rotary_dims is known. */
static choir_status read_scaling(const reader *r, const json_t *from, choir_rope_config *rope,
                                 choir_model_config *c)
{
    float original = 0, alpha = 0;
    CHOIR_TRY(read_real(r, from, "rope_theta", &rope->theta));
    CHOIR_TRY(read_rope_kind(r, from, rope));
    if (rope->scaling == CHOIR_ROPE_NONE) return CHOIR_OK;
    CHOIR_TRY(read_real(r, from, "factor", &rope->factor));
    CHOIR_TRY(read_real(r, from, "low_freq_factor", &rope->low_freq_factor));
    CHOIR_TRY(read_real(r, from, "high_freq_factor", &rope->high_freq_factor));
    CHOIR_TRY(read_real(r, r->root, "original_max_position_embeddings", &original));
    CHOIR_TRY(read_real(r, from, "original_max_position_embeddings", &original));
    CHOIR_TRY(read_real(r, from, "alpha", &alpha));
    rope->original_max_positions =
        original > 0 && original < 1e9F ? (uint32_t)original : c->max_positions;
    if (rope->factor == 0)
        rope->factor = (float)c->max_positions / (float)rope->original_max_positions;
    if (rope->scaling == CHOIR_ROPE_DYNAMIC && alpha > 0 && rope->rotary_dims > 2) {
        /* Hunyuan's "dynamic" stretches the base once and for all. */
        float n = (float)rope->rotary_dims;
        rope->theta *= powf(alpha, n / (n - 2));
        rope->scaling = CHOIR_ROPE_NONE;
    } else if (rope->scaling == CHOIR_ROPE_DYNAMIC) {
        rope->original_max_positions = c->max_positions;
    }
    double stretched = (double)rope->original_max_positions * (double)rope->factor;
    bool longer = stretched > c->max_positions && stretched < 1 << 28;
    if (longer && (rope->scaling == CHOIR_ROPE_YARN || rope->scaling == CHOIR_ROPE_DYNAMIC))
        c->max_positions = (uint32_t)stretched;
    if (rope->scaling == CHOIR_ROPE_YARN || rope->scaling == CHOIR_ROPE_LONGROPE) {
        rope->attention_factor = 0;
        CHOIR_TRY(read_real(r, from, "attention_factor", &rope->attention_factor));
    }
    if (rope->scaling == CHOIR_ROPE_YARN) return read_yarn(r, from, rope, c);
    return rope->scaling == CHOIR_ROPE_LONGROPE ? read_longrope(r, from, rope, c) : CHOIR_OK;
}

/* rope_parameters (transformers 5), or rope_theta and rope_scaling beside it (before); Gemma 3 has
 * two ropes. */
static choir_status read_rope(const reader *r, choir_model_config *c)
{
    const json_t *parameters = get(r->root, "rope_parameters");
    const json_t *scaling = parameters != NULL ? parameters : get(r->root, "rope_scaling");
    const json_t *full = get(scaling, "full_attention"),
                 *sliding = get(scaling, "sliding_attention");
    float part = c->family->rotary_part > 0 ? c->family->rotary_part : 1;
    if (full != NULL) scaling = full;
    CHOIR_TRY(read_real(r, r->root, "rope_theta", &c->rope.theta));
    CHOIR_TRY(read_real(r, r->root, "rope_local_base_freq", &c->window_rope.theta));
    CHOIR_TRY(read_real(r, r->root, "partial_rotary_factor", &part));
    CHOIR_TRY(read_real(r, scaling, "partial_rotary_factor", &part));
    uint32_t head = c->head_dim > 0 ? c->head_dim : c->n_heads > 0 ? c->hidden / c->n_heads : 0;
    if (choir_is_latent(c)) head = c->rope_dim;
    if (!(part > 0) || part > 1)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: 'partial_rotary_factor' is %g, must be above 0, at most 1", r->path,
                          (double)part);
    if (c->rope.rotary_dims == 0) {
        /* An odd part of a head is rounded up to pairs; the frequencies remember it (transformers). */
        uint32_t dims = (uint32_t)((double)head * (double)part);
        c->rope.exponent_dims = dims;
        c->rope.rotary_dims = dims + dims % 2;
    }
    c->window_rope.rotary_dims = c->rope.rotary_dims;
    if (scaling != NULL) CHOIR_TRY(read_scaling(r, scaling, &c->rope, c));
    return sliding != NULL && c->window_rope.theta > 0
               ? read_scaling(r, sliding, &c->window_rope, c)
               : CHOIR_OK;
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
static choir_status refuse_unknown(const reader *r, const choir_model_config *c)
{
    const char *wanted = c->activation == CHOIR_GEGLU ? "gelu_pytorch_tanh" : "silu";
    const json_t *activation = get(r->root, "hidden_activation");
    if (activation == NULL) activation = get(r->root, "hidden_act");
    if (json_is_string(activation) && strcmp(json_string_value(activation), wanted) != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: 'hidden_act' is \"%.40s\"; for the family %s Choir has %s", r->path,
                          json_string_value(activation), c->family->name, wanted);
    static const char *const must_be_off[] = {"clip_qkv", "use_bidirectional_attention"};
    for (size_t i = 0; i < sizeof must_be_off / sizeof *must_be_off; i++) {
        const json_t *value = get(r->root, must_be_off[i]);
        if (value != NULL && !json_is_false(value))
            return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: '%s' is set, Choir lacks that", r->path,
                              must_be_off[i]);
    }
    return CHOIR_OK;
}

/* Settings that are words, or switch others off. */
static void read_switches(const reader *r, choir_model_config *c)
{
    const json_t *method = get(r->root, "topk_method"), *tuned = get(r->root, "attn_temperature_tuning");
    if (json_is_string(method) && strcmp(json_string_value(method), "greedy") == 0) c->gate.n_groups = 0;
    if (json_is_false(tuned) || (json_is_integer(tuned) && json_integer_value(tuned) == 0))
        c->temperature_floor = 0;
}

/* layer_types lists them, or the family's rule holds. */
static choir_status read_windows(const reader *r, choir_model_config *c)
{
    const json_t *types = get(r->root, "layer_types");
    uint32_t from = 0, period = c->family->window_period;
    bool windowed = c->family->windows == CHOIR_WINDOW_ALL;
    CHOIR_TRY(read_flag(r, "use_sliding_window", &windowed));
    CHOIR_TRY(read_count(r, "max_window_layers", false, &from));
    CHOIR_TRY(read_count(r, "sliding_window_pattern", false, &period));
    if (types != NULL && json_array_size(types) != c->n_layers)
        return choir_fail(CHOIR_E_FORMAT, "%s: 'layer_types' has %zu entries for %u layers",
                          r->path, json_array_size(types), c->n_layers);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        const char *type = json_string_value(json_array_get(types, l));
        uint8_t flag = 0;
        if (types == NULL && c->family->windows == CHOIR_WINDOW_PERIOD)
            flag = period > 0 && (l + 1) % period != 0 ? CHOIR_LAYER_WINDOW : 0;
        else if (types == NULL)
            flag = windowed && l >= from ? CHOIR_LAYER_WINDOW : 0;
        else if (type != NULL && strcmp(type, "sliding_attention") == 0)
            flag = CHOIR_LAYER_WINDOW;
        else if (type != NULL && strcmp(type, "chunked_attention") == 0)
            flag = CHOIR_LAYER_CHUNKED;
        else if (type == NULL || strcmp(type, "full_attention") != 0)
            return choir_fail(CHOIR_E_UNIMPLEMENTED,
                              "%s: 'layer_types' has \"%.40s\"; Choir has full_attention, "
                              "sliding_attention and chunked_attention",
                              r->path, type != NULL ? type : "no text");
        c->layers[l] |= flag;
    }
    return CHOIR_OK;
}

/* no_rope_layers has a 0 for a layer without rope; or every so-manieth has none. */
static choir_status read_rope_layers(const reader *r, choir_model_config *c)
{
    const json_t *list = get(r->root, "no_rope_layers");
    uint32_t period = c->family->rope_period;
    if (period == 0) return CHOIR_OK;
    CHOIR_TRY(read_count(r, "no_rope_layer_interval", false, &period));
    if (json_array_size(list) > 0 && json_array_size(list) != c->n_layers)
        return choir_fail(CHOIR_E_FORMAT, "%s: 'no_rope_layers' has %zu entries for %u layers",
                          r->path, json_array_size(list), c->n_layers);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        bool rope = json_array_size(list) > 0 ? json_integer_value(json_array_get(list, l)) != 0
                                              : period == 0 || (l + 1) % period != 0;
        if (!rope) c->layers[l] |= CHOIR_LAYER_NO_ROPE;
    }
    /* Llama 4's older files do not list layer_types: those with rope are chunked. */
    for (uint32_t l = 0; l < c->n_layers && c->attention_chunk > 0; l++)
        if (get(r->root, "layer_types") == NULL && !(c->layers[l] & CHOIR_LAYER_NO_ROPE))
            c->layers[l] |= CHOIR_LAYER_CHUNKED;
    return CHOIR_OK;
}

static choir_status read_layers(const reader *r, choir_model_config *c)
{
    if (c->n_layers > CHOIR_MAX_LAYERS)
        return choir_fail(CHOIR_E_FORMAT, "%s: 'num_hidden_layers' is %u, must be 1 to %d", r->path,
                          c->n_layers, CHOIR_MAX_LAYERS);
    CHOIR_TRY(read_windows(r, c));
    return read_rope_layers(r, c);
}

static choir_status read_generation(const choir_texts *texts, choir_model_config *c)
{
    static const char *const name = "generation_config.json";
    char path[4096];
    json_t *root;
    if (!choir_texts_have(texts, name)) return CHOIR_OK;
    choir_texts_path(texts, name, path, sizeof path);
    CHOIR_TRY(load_json(texts, name, path, &root));
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
    const choir_family *family;
    CHOIR_TRY(find_family(r, &family));
    choir_config_begin(family, c);
    CHOIR_TRY(refuse_unknown(r, c));
    CHOIR_TRY(read_keys(r, choir_common_keys, c));
    CHOIR_TRY(read_keys(r, family->keys, c));
    read_switches(r, c);
    CHOIR_TRY(read_layers(r, c));
    CHOIR_TRY(read_rope(r, c));
    choir_config_settle(c, false);
    return read_ids(r, c);
}

choir_status choir_config_read_hf(const choir_texts *texts, choir_model_config *c)
{
    char path[4096];
    json_t *root;
    choir_texts_path(texts, "config.json", path, sizeof path);
    CHOIR_TRY(load_json(texts, "config.json", path, &root));
    /* A model that also sees and hears has the text's part inside. */
    const json_t *text = get(root, "text_config");
    const reader r = {path, json_is_object(text) ? text : root};
    choir_status status = read_config(&r, c);
    if (status == CHOIR_OK && r.root != root) status = read_ids(&(reader){path, root}, c);
    json_decref(root);
    CHOIR_TRY(status);
    const char *slash = strrchr(texts->path, '/');
    snprintf(c->name, sizeof c->name, "%.100s",
             slash != NULL && slash[1] != '\0' ? slash + 1 : texts->path);
    return read_generation(texts, c);
}
