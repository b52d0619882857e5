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

static choir_status read_count(const reader *r, const char *name, bool needed, uint32_t *out)
{
    char key[160];
    int64_t value;
    key_of(r, name, key, sizeof key);
    if (!choir_gguf_integer(r->gguf, key, &value)) {
        if (choir_gguf_find_array(r->gguf, key) != NULL)
            return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: '%s' differs between layers", r->path,
                              key);
        return needed ? choir_fail(CHOIR_E_FORMAT, "%s lacks '%s'", r->path, key) : CHOIR_OK;
    }
    if (value < 0 || value > 1 << 30)
        return choir_fail(CHOIR_E_FORMAT, "%s: '%s' is %" PRId64 ", must be 0 to %d", r->path, key,
                          value, 1 << 30);
    *out = (uint32_t)value;
    return CHOIR_OK;
}

static void read_real(const reader *r, const char *name, float *out)
{
    char key[160];
    double value;
    key_of(r, name, key, sizeof key);
    if (choir_gguf_real(r->gguf, key, &value)) *out = (float)value;
}

static void copy_text(const choir_gguf *gguf, const char *key, char *out, size_t bytes)
{
    choir_text text;
    if (choir_gguf_string(gguf, key, &text))
        snprintf(out, bytes, "%.*s", (int)(text.bytes < bytes ? text.bytes : bytes - 1), text.data);
}

static choir_status read_rope(const reader *r, choir_model_config *c)
{
    choir_text kind;
    char key[160];
    c->rope.theta = 10000;
    c->rope.rotary_dims = c->head_dim;
    c->rope.interleaved = c->family->gguf_interleaved_rope;
    read_real(r, "rope.freq_base", &c->rope.theta);
    CHOIR_TRY(read_count(r, "rope.dimension_count", false, &c->rope.rotary_dims));
    key_of(r, "rope.scaling.type", key, sizeof key);
    if (!choir_gguf_string(r->gguf, key, &kind)) return CHOIR_OK;
    if (kind.bytes == 4 && memcmp(kind.data, "none", 4) == 0) return CHOIR_OK;
    if (kind.bytes != 6 || memcmp(kind.data, "linear", 6) != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: '%s' is \"%.*s\"; Choir has none and linear",
                          r->path, key, (int)(kind.bytes < 40 ? kind.bytes : 40), kind.data);
    c->rope.scaling = CHOIR_ROPE_LINEAR;
    read_real(r, "rope.scaling.factor", &c->rope.factor);
    return CHOIR_OK;
}

static choir_status read_experts(const reader *r, choir_model_config *c)
{
    c->normalise_topk = c->family->normalise_topk;
    if (!c->family->moe) return read_count(r, "feed_forward_length", true, &c->ffn_hidden);
    int64_t flag;
    char key[160];
    CHOIR_TRY(read_count(r, "expert_used_count", true, &c->n_experts_used));
    CHOIR_TRY(read_count(r, "feed_forward_length", false, &c->expert_hidden));
    CHOIR_TRY(read_count(r, "expert_feed_forward_length", false, &c->expert_hidden));
    key_of(r, "expert_weights_norm", key, sizeof key);
    if (choir_gguf_integer(r->gguf, key, &flag)) c->normalise_topk = flag != 0;
    return CHOIR_OK;
}

static choir_status read_shapes(const reader *r, choir_model_config *c)
{
    CHOIR_TRY(read_count(r, "block_count", true, &c->n_layers));
    CHOIR_TRY(read_count(r, "embedding_length", true, &c->hidden));
    CHOIR_TRY(read_count(r, "attention.head_count", true, &c->n_heads));
    c->n_kv_heads = c->n_heads;
    CHOIR_TRY(read_count(r, "attention.head_count_kv", false, &c->n_kv_heads));
    c->head_dim = c->n_heads > 0 ? c->hidden / c->n_heads : 0;
    CHOIR_TRY(read_count(r, "attention.key_length", false, &c->head_dim));
    CHOIR_TRY(read_count(r, "context_length", true, &c->max_positions));
    CHOIR_TRY(read_count(r, "attention.sliding_window", false, &c->sliding_window));
    c->norm_eps = 1e-5F;
    read_real(r, "attention.layer_norm_rms_epsilon", &c->norm_eps);
    const choir_gguf_tensor *embedding = choir_gguf_find_tensor(r->gguf, "token_embd.weight");
    if (embedding == NULL || embedding->dims[1] > 1 << 30)
        return choir_fail(CHOIR_E_FORMAT, "%s: tensor 'token_embd.weight' is missing or absurd",
                          r->path);
    c->vocab = (uint32_t)embedding->dims[1];
    c->tied_head = choir_gguf_find_tensor(r->gguf, "output.weight") == NULL;
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

choir_status choir_config_read_gguf(const char *path, const choir_gguf *gguf, choir_model_config *c)
{
    char architecture[64] = "", nearest[256];
    *c = (choir_model_config){.bos_id = -1, .pad_id = -1, .temperature = -1, .top_p = -1};
    copy_text(gguf, "general.architecture", architecture, sizeof architecture);
    if (architecture[0] == '\0')
        return choir_fail(CHOIR_E_FORMAT, "%s lacks 'general.architecture'", path);
    const reader r = {path, architecture, gguf};
    CHOIR_TRY(read_count(&r, "expert_count", false, &c->n_experts));
    c->family = choir_family_of_architecture(architecture, c->n_experts > 0);
    if (c->family == NULL)
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s: 'general.architecture' is \"%s\"%s, a family Choir does not know; the "
            "nearest known ones are %s",
            path, architecture, c->n_experts > 0 ? " with experts" : "",
            choir_family_nearest(architecture, true, nearest, sizeof nearest));
    CHOIR_TRY(read_shapes(&r, c));
    CHOIR_TRY(read_experts(&r, c));
    CHOIR_TRY(read_rope(&r, c));
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
