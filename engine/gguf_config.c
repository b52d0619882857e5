#include "engine/model_config.h"

#include "base/base.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

typedef struct reader {
    const char *path, *architecture;
    const choir_gguf *gguf;
} reader;

static void key_of(const reader *r, const char *name, char *key, size_t bytes)
{
    snprintf(key, bytes, "%s.%s", r->architecture, name);
}

static bool find_integer(const reader *r, const char *name, int64_t *out)
{
    char key[160];
    key_of(r, name, key, sizeof key);
    return choir_gguf_integer(r->gguf, key, out);
}

static bool find_real(const reader *r, const char *name, float *out)
{
    char key[160];
    double value;
    key_of(r, name, key, sizeof key);
    bool found = choir_gguf_real(r->gguf, key, &value);
    if (found) *out = (float)value;
    return found;
}

/* One entry a layer, all alike; layers without the thing have 0. */
static choir_status read_array(const reader *r, const char *name, const choir_gguf_array *array,
                               const choir_key *key, choir_model_config *c)
{
    int64_t common = 0, value;
    for (uint64_t i = 0; i < choir_gguf_array_count(array); i++) {
        if (!choir_gguf_array_integer(array, i, &value) || value < 0 || value > 1 << 30)
            return choir_fail(CHOIR_E_FORMAT,
                              "%s: entry %" PRIu64 " of '%s' is no whole number from 0 to %d",
                              r->path, i, name, 1 << 30);
        if (value != 0 && common != 0 && value != common)
            return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: '%s' differs between layers", r->path,
                              name);
        if (value != 0) common = value;
    }
    choir_config_set(c, key, (double)common);
    return CHOIR_OK;
}

static choir_status read_key(const reader *r, const choir_key *key, choir_model_config *c)
{
    char name[160];
    int64_t value;
    double real;
    if (key->gguf == NULL) return CHOIR_OK;
    key_of(r, key->gguf, name, sizeof name);
    if (key->kind == CHOIR_KEY_REAL) {
        if (choir_gguf_real(r->gguf, name, &real)) choir_config_set(c, key, real);
        return CHOIR_OK;
    }
    if (!choir_gguf_integer(r->gguf, name, &value)) {
        const choir_gguf_array *array = choir_gguf_find_array(r->gguf, name);
        if (array != NULL) return read_array(r, name, array, key, c);
        return key->needed ? choir_fail(CHOIR_E_FORMAT, "%s lacks '%s'", r->path, name) : CHOIR_OK;
    }
    if (value < 0 || value > 1 << 30)
        return choir_fail(CHOIR_E_FORMAT, "%s: '%s' is %" PRId64 ", must be 0 to %d", r->path, name,
                          value, 1 << 30);
    choir_config_set(c, key, (double)value);
    return CHOIR_OK;
}

static choir_status read_keys(const reader *r, const choir_key *keys, choir_model_config *c)
{
    for (; keys != NULL && (keys->hf != NULL || keys->gguf != NULL); keys++)
        CHOIR_TRY(read_key(r, keys, c));
    return CHOIR_OK;
}

static void copy_text(const choir_gguf *gguf, const char *key, char *out, size_t bytes)
{
    choir_text text;
    if (choir_gguf_string(gguf, key, &text))
        snprintf(out, bytes, "%.*s", (int)(text.bytes < bytes ? text.bytes : bytes - 1), text.data);
}

/* As llama.cpp has it: the logarithm's multiplier is DeepSeek's mscale_all_dim over ten, and mscale
 * is 1. */
static void read_yarn(const reader *r, choir_model_config *c)
{
    choir_rope_config *rope = &c->rope;
    float log_multiplier = 0, factor = 1, m = 1;
    find_real(r, "rope.scaling.yarn_beta_fast", &rope->beta_fast);
    find_real(r, "rope.scaling.yarn_beta_slow", &rope->beta_slow);
    find_real(r, "rope.scaling.yarn_log_multiplier", &log_multiplier);
    if (log_multiplier != 0) m = choir_yarn_mscale(rope->factor, log_multiplier / 0.1F);
    rope->attention_factor = choir_yarn_mscale(rope->factor, 1) / m;
    if (find_real(r, "rope.scaling.yarn_attn_factor", &factor)) rope->attention_factor = factor;
    if (choir_is_latent(c) && c->head_dim > 0)
        c->attention_scale = m * m / sqrtf((float)c->head_dim);
}

static choir_status read_scaling(const reader *r, choir_model_config *c)
{
    static const struct {
        const char *text;
        choir_rope_scaling scaling;
    } kinds[] = {{"none", CHOIR_ROPE_NONE},
                 {"linear", CHOIR_ROPE_LINEAR},
                 {"yarn", CHOIR_ROPE_YARN},
                 {"longrope", CHOIR_ROPE_LONGROPE}};
    choir_text kind;
    char key[160];
    size_t i = 0, n = sizeof kinds / sizeof *kinds;
    int64_t original;
    key_of(r, "rope.scaling.type", key, sizeof key);
    /* Phi-3's long variants do not say it, but have the divisors. */
    bool divided = choir_gguf_find_tensor(r->gguf, "rope_factors_long.weight") != NULL;
    if (!choir_gguf_string(r->gguf, key, &kind))
        kind = (choir_text){divided ? "longrope" : "none", divided ? 8 : 4};
    while (i < n && (strlen(kinds[i].text) != kind.bytes ||
                     memcmp(kinds[i].text, kind.data, kind.bytes) != 0))
        i++;
    if (i == n)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: '%s' is \"%.*s\"; Choir has none, linear, yarn and longrope",
                          r->path, key, (int)(kind.bytes < 40 ? kind.bytes : 40), kind.data);
    c->rope.scaling = kinds[i].scaling;
    find_real(r, "rope.scaling.factor", &c->rope.factor);
    c->rope.original_max_positions = c->max_positions;
    if (find_integer(r, "rope.scaling.original_context_length", &original) && original > 0 &&
        original <= 1 << 28)
        c->rope.original_max_positions = (uint32_t)original;
    if (c->rope.scaling == CHOIR_ROPE_YARN) read_yarn(r, c);
    if (c->rope.scaling == CHOIR_ROPE_LONGROPE)
        find_real(r, "rope.scaling.attn_factor", &c->rope.attention_factor);
    return CHOIR_OK;
}

static choir_status read_rope(const reader *r, choir_model_config *c)
{
    int64_t dims;
    c->rope.interleaved = c->family->gguf_interleaved_rope;
    find_real(r, "rope.freq_base", &c->rope.theta);
    find_real(r, "rope.freq_base_swa", &c->window_rope.theta);
    if (find_integer(r, "rope.dimension_count", &dims)) {
        if (dims < 0 || dims > 1 << 16)
            return choir_fail(CHOIR_E_FORMAT,
                              "%s: '%s.rope.dimension_count' is %" PRId64 ", must be 0 to %d",
                              r->path, r->architecture, dims, 1 << 16);
        c->rope.rotary_dims = (uint32_t)dims;
    }
    CHOIR_TRY(read_scaling(r, c));
    /* Longrope's divisors are tensors; both kinds of context have the same factor on cos and sin.
     */
    c->rope.long_attention_factor = c->rope.attention_factor;
    if (c->rope.scaling == CHOIR_ROPE_LONGROPE && c->rope.factor == 0) c->rope.factor = 1;
    return CHOIR_OK;
}

/* The gate's kind, where the file says it: 1 softmax, 2 sigmoid, 3 softmax over the chosen. */
static choir_status read_gate(const reader *r, choir_model_config *c)
{
    static const choir_gate_kind kinds[] = {CHOIR_GATE_SOFTMAX_TOPK, CHOIR_GATE_SIGMOID,
                                            CHOIR_GATE_TOPK_SOFTMAX};
    int64_t kind;
    if (!find_integer(r, "expert_gating_func", &kind) || kind == 0) return CHOIR_OK;
    if (kind < 0 || kind > 3)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: '%s.expert_gating_func' is %" PRId64 "; Choir has 1, 2 and 3",
                          r->path, r->architecture, kind);
    if (c->gate.kind != CHOIR_GATE_SPARSE_MIXER) c->gate.kind = kinds[kind - 1];
    return CHOIR_OK;
}

/* A bool a layer, or a period; where the file has neither, the family's rule. */
static void read_layers(const reader *r, choir_model_config *c)
{
    char key[160];
    int64_t period = c->family->window_period, flag;
    key_of(r, "attention.sliding_window_pattern", key, sizeof key);
    const choir_gguf_array *pattern = choir_gguf_find_array(r->gguf, key);
    bool by_period =
        choir_gguf_integer(r->gguf, key, &period) || c->family->windows == CHOIR_WINDOW_PERIOD;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        bool windowed = c->family->windows == CHOIR_WINDOW_ALL;
        if (pattern != NULL)
            windowed = choir_gguf_array_integer(pattern, l, &flag) && flag != 0;
        else if (by_period)
            windowed = period > 0 && (l + 1) % period != 0;
        bool rope = c->family->rope_period == 0 || (l + 1) % c->family->rope_period != 0;
        if (windowed) c->layers[l] |= CHOIR_LAYER_WINDOW;
        if (!rope) c->layers[l] |= CHOIR_LAYER_NO_ROPE;
        if (rope && c->attention_chunk > 0) c->layers[l] |= CHOIR_LAYER_CHUNKED;
    }
}

static choir_status read_shapes(const reader *r, choir_model_config *c)
{
    int64_t n_predicted = 0;
    CHOIR_TRY(read_keys(r, choir_common_keys, c));
    CHOIR_TRY(read_keys(r, c->family->keys, c));
    /* Layers that predict further tokens lie behind the others, and are not used. */
    if (find_integer(r, "nextn_predict_layers", &n_predicted) && n_predicted > 0 &&
        n_predicted < c->n_layers)
        c->n_layers -= (uint32_t)n_predicted;
    if (c->n_layers > CHOIR_MAX_LAYERS)
        return choir_fail(CHOIR_E_FORMAT, "%s: the number of layers is %u, must be 1 to %d",
                          r->path, c->n_layers, CHOIR_MAX_LAYERS);
    const choir_gguf_tensor *embedding = choir_gguf_find_tensor(r->gguf, "token_embd.weight");
    if (embedding == NULL || embedding->dims[1] > 1 << 30)
        return choir_fail(CHOIR_E_FORMAT, "%s: tensor 'token_embd.weight' is missing or absurd",
                          r->path);
    c->vocab = (uint32_t)embedding->dims[1];
    c->tied_head = choir_gguf_find_tensor(r->gguf, "output.weight") == NULL;
    CHOIR_TRY(read_gate(r, c));
    read_layers(r, c);
    return CHOIR_OK;
}

static void read_ids(const choir_gguf *gguf, choir_model_config *c)
{
    int64_t id;
    if (choir_gguf_integer(gguf, "tokenizer.ggml.bos_token_id", &id))
        choir_config_set_id(c, id, &c->bos_id);
    if (choir_gguf_integer(gguf, "tokenizer.ggml.padding_token_id", &id))
        choir_config_set_id(c, id, &c->pad_id);
    if (choir_gguf_integer(gguf, "tokenizer.ggml.eos_token_id", &id)) choir_config_add_eos(c, id);
    if (choir_gguf_integer(gguf, "tokenizer.ggml.eot_token_id", &id)) choir_config_add_eos(c, id);
}

static void read_sampling(const choir_gguf *gguf, choir_model_config *c)
{
    const struct {
        const char *key;
        float *to;
    } reals[] = {{"general.sampling.temp", &c->temperature},
                 {"general.sampling.top_p", &c->top_p},
                 {"general.sampling.penalty_repeat", &c->repetition_penalty}};
    double real;
    int64_t top_k;
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
        if (choir_gguf_real(gguf, reals[i].key, &real) && isfinite((float)real))
            *reals[i].to = (float)real;
    if (choir_gguf_integer(gguf, "general.sampling.top_k", &top_k) && top_k > 0 &&
        top_k <= INT32_MAX)
        c->top_k = (int32_t)top_k;
}

static choir_status find_family(const reader *r, const choir_family **out)
{
    char key[160], nearest[256];
    int64_t n_experts = 0;
    key_of(r, "expert_count", key, sizeof key);
    bool moe = choir_gguf_find_array(r->gguf, key) != NULL ||
               (choir_gguf_integer(r->gguf, key, &n_experts) && n_experts > 0);
    *out = choir_family_of_architecture(r->architecture, moe);
    if (*out != NULL) return CHOIR_OK;
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "%s: 'general.architecture' is \"%s\"%s, a family Choir does not know; the "
                      "nearest known ones are %s",
                      r->path, r->architecture, moe ? " with experts" : "",
                      choir_family_nearest(r->architecture, true, nearest, sizeof nearest));
}

choir_status choir_config_read_gguf(const char *path, const choir_gguf *gguf, choir_model_config *c)
{
    char architecture[64] = "";
    const choir_family *family;
    copy_text(gguf, "general.architecture", architecture, sizeof architecture);
    if (architecture[0] == '\0')
        return choir_fail(CHOIR_E_FORMAT, "%s lacks 'general.architecture'", path);
    const reader r = {path, architecture, gguf};
    CHOIR_TRY(find_family(&r, &family));
    choir_config_begin(family, c);
    c->norm_eps = 1e-5F;
    CHOIR_TRY(read_shapes(&r, c));
    CHOIR_TRY(read_rope(&r, c));
    choir_config_settle(c, true);
    read_ids(gguf, c);
    read_sampling(gguf, c);
    copy_text(gguf, "general.name", c->name, sizeof c->name);
    if (c->name[0] == '\0') {
        const char *slash = strrchr(path, '/');
        snprintf(c->name, sizeof c->name, "%.100s", slash != NULL ? slash + 1 : path);
    }
    copy_text(gguf, "general.license", c->licence, sizeof c->licence);
    return CHOIR_OK;
}
