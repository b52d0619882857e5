/* What both kinds of configuration share: the keys that mean the same everywhere, defaults, checks.
 */
#include "engine/model_config.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

const choir_key choir_common_keys[] = {
    CHOIR_NEEDED("num_hidden_layers", "block_count", n_layers),
    CHOIR_NEEDED("hidden_size", "embedding_length", hidden),
    CHOIR_NEEDED("num_attention_heads", "attention.head_count", n_heads),
    CHOIR_COUNT("num_key_value_heads", "attention.head_count_kv", n_kv_heads),
    CHOIR_COUNT("head_dim", "attention.key_length", head_dim),
    CHOIR_NEEDED("vocab_size", NULL, vocab),
    CHOIR_COUNT("max_position_embeddings", NULL, max_positions),
    CHOIR_NEEDED(NULL, "context_length", max_positions),
    CHOIR_COUNT("sliding_window", "attention.sliding_window", sliding_window),
    CHOIR_REAL("rms_norm_eps", "attention.layer_norm_rms_epsilon", norm_eps),
    CHOIR_FLAG("tie_word_embeddings", NULL, tied_head),
    CHOIR_HAS("attention_bias", NULL, CHOIR_BIASES_QKV),
    CHOIR_HAS("mlp_bias", NULL,
              CHOIR_ROLE_BIT(FFN_GATE_BIAS) | CHOIR_ROLE_BIT(FFN_UP_BIAS) |
                  CHOIR_ROLE_BIT(FFN_DOWN_BIAS)),
    CHOIR_REAL("attn_logit_softcapping", "attn_logit_softcapping", attention_softcap),
    CHOIR_REAL("final_logit_softcapping", "final_logit_softcapping", logit_softcap),
    CHOIR_COUNT("intermediate_size", "feed_forward_length", ffn_hidden),
    CHOIR_COUNT("moe_intermediate_size", "expert_feed_forward_length", expert_hidden),
    CHOIR_COUNT("num_experts", "expert_count", n_experts),
    CHOIR_COUNT("num_local_experts", NULL, n_experts),
    CHOIR_COUNT("n_routed_experts", NULL, n_experts),
    CHOIR_COUNT("num_experts_per_tok", "expert_used_count", n_experts_used),
    CHOIR_FLAG("norm_topk_prob", "expert_weights_norm", gate.normalise),
    CHOIR_REAL("routed_scaling_factor", "expert_weights_scale", gate.scale),
    {0},
};

void choir_config_begin(const choir_family *family, choir_model_config *c)
{
    *c = family->properties;
    c->family = family;
    c->bos_id = c->pad_id = -1;
    c->temperature = c->top_p = -1;
    if (c->max_positions == 0) c->max_positions = 2048;
    c->embedding_scale = c->residual_scale = c->logit_divisor = 1;
    if (c->rope.theta == 0) c->rope.theta = 10000;
    c->rope.attention_factor = c->window_rope.attention_factor = 1;
    c->rope.beta_fast = 32;
    c->rope.beta_slow = 1;
    if (c->norm_eps == 0) c->norm_eps = 1e-6F;
}

void choir_config_set(choir_model_config *c, const choir_key *key, double value)
{
    void *at = (char *)c + key->offset;
    switch (key->kind) {
    case CHOIR_KEY_COUNT:
        *(uint32_t *)at = (uint32_t)value;
        break;
    case CHOIR_KEY_REAL:
        *(float *)at = (float)value;
        break;
    case CHOIR_KEY_FLAG:
        *(bool *)at = value != 0;
        break;
    case CHOIR_KEY_ROLES:
        if (value != 0) c->roles |= key->roles;
        break;
    }
}

uint32_t choir_config_count(const choir_model_config *c, const choir_key *key)
{
    return key->kind == CHOIR_KEY_COUNT ? *(const uint32_t *)((const char *)c + key->offset) : 0;
}

float choir_yarn_mscale(float factor, float m)
{
    return factor <= 1 ? 1 : 0.1F * m * logf(factor) + 1;
}

/* Counts that the family lacks must not be taken for its own. */
static void drop_experts(choir_model_config *c)
{
    c->n_experts = c->n_experts_used = c->expert_hidden = 0;
}

void choir_config_settle(choir_model_config *c, bool gguf)
{
    if (!c->family->moe) drop_experts(c);
    if (c->n_kv_heads == 0) c->n_kv_heads = c->n_heads;
    if (choir_is_latent(c)) {
        /* Every head has its own keys, made of the latent. */
        c->n_kv_heads = c->n_heads;
        if (c->nope_dim == 0 && c->head_dim > c->rope_dim) c->nope_dim = c->head_dim - c->rope_dim;
        c->head_dim = c->nope_dim + c->rope_dim;
        c->rope.rotary_dims = c->rope_dim;
        if (c->latent_norm_eps == 0) c->latent_norm_eps = c->norm_eps;
    }
    if (c->head_dim == 0 && c->n_heads > 0) c->head_dim = c->hidden / c->n_heads;
    if (c->rope.rotary_dims == 0) c->rope.rotary_dims = c->head_dim;
    if (c->window_rope.rotary_dims == 0) c->window_rope.rotary_dims = c->rope.rotary_dims;
    if (c->family->settle != NULL) c->family->settle(c, gguf);
    if (c->attention_scale == 0 && c->head_dim > 0)
        c->attention_scale = 1 / sqrtf((float)c->head_dim);
    c->gate.n_experts = c->n_experts;
    c->gate.k = c->n_experts_used;
    /* Windows and chunks that no layer has; and layers with a window that is none. */
    for (uint32_t l = 0; l < c->n_layers && l < CHOIR_MAX_LAYERS; l++) {
        if (c->sliding_window == 0) c->layers[l] &= (uint8_t)~CHOIR_LAYER_WINDOW;
        if (c->attention_chunk == 0) c->layers[l] &= (uint8_t)~CHOIR_LAYER_CHUNKED;
    }
}

void choir_config_set_id(const choir_model_config *c, int64_t id, int32_t *out)
{
    *out = id >= 0 && id < c->vocab ? (int32_t)id : -1;
}

void choir_config_add_eos(choir_model_config *c, int64_t id)
{
    if (id < 0 || id >= c->vocab || c->n_eos == CHOIR_MAX_EOS) return;
    for (uint32_t i = 0; i < c->n_eos; i++)
        if (c->eos_ids[i] == id) return;
    c->eos_ids[c->n_eos++] = (int32_t)id;
}

static choir_status check_counts(const char *path, const choir_model_config *c)
{
    const struct {
        const char *what;
        uint32_t value, most;
        bool needed;
    } counts[] = {
        {"number of layers", c->n_layers, CHOIR_MAX_LAYERS, true},
        {"hidden size", c->hidden, 1 << 20, true},
        {"number of heads", c->n_heads, 4096, true},
        {"number of kv heads", c->n_kv_heads, 4096, true},
        {"head size", c->head_dim, 4096, true},
        {"vocabulary", c->vocab, 1 << 24, true},
        {"context length", c->max_positions, 1 << 28, true},
        {"FFN size", c->ffn_hidden, 1 << 20, c->n_experts == 0},
        {"experts' FFN size", c->expert_hidden, 1 << 20, c->n_experts > 0},
        {"number of experts", c->n_experts, 65535, c->family->moe},
        {"latent's size", c->kv_lora_rank, 1 << 16, false},
        {"queries' latent's size", c->q_lora_rank, 1 << 16, false},
        {"size of a key without rope", c->nope_dim, 4096, choir_is_latent(c)},
        {"size of a key's rope", c->rope_dim, 4096, choir_is_latent(c)},
        {"size of a value", c->value_dim, 4096, choir_is_latent(c)},
    };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i].value > counts[i].most || (counts[i].needed && counts[i].value == 0))
            return choir_fail(CHOIR_E_FORMAT, "%s: the %s is %u, must be %d to %u", path,
                              counts[i].what, counts[i].value, counts[i].needed, counts[i].most);
    if (c->n_heads % c->n_kv_heads != 0)
        return choir_fail(CHOIR_E_FORMAT, "%s: %u heads are no multiple of %u kv heads", path,
                          c->n_heads, c->n_kv_heads);
    return CHOIR_OK;
}

static bool good_rope(const choir_rope_config *r)
{
    if (!(r->theta > 0) || !isfinite(r->theta) || !isfinite(r->attention_factor)) return false;
    if (r->scaling == CHOIR_ROPE_NONE) return true;
    if (!(r->factor >= 1) || !isfinite(r->factor)) return false;
    if (r->scaling == CHOIR_ROPE_LINEAR) return true;
    if (r->original_max_positions == 0) return false;
    if (r->scaling == CHOIR_ROPE_LLAMA3)
        return r->low_freq_factor > 0 && r->high_freq_factor > r->low_freq_factor;
    if (r->scaling == CHOIR_ROPE_YARN) return r->beta_slow > 0 && r->beta_fast >= r->beta_slow;
    return r->scaling != CHOIR_ROPE_DYNAMIC || r->rotary_dims > 2;
}

static choir_status check_gate(const char *path, const choir_model_config *c)
{
    const choir_gate *g = &c->gate;
    if (c->n_experts == 0) return CHOIR_OK;
    if (c->n_experts_used == 0 || c->n_experts_used > c->n_experts)
        return choir_fail(CHOIR_E_FORMAT, "%s: %u experts per token of %u", path, c->n_experts_used,
                          c->n_experts);
    if (g->n_groups > 1 &&
        (g->n_groups > CHOIR_MAX_EXPERT_GROUPS || c->n_experts % g->n_groups != 0 ||
         g->n_groups_used == 0 || g->n_groups_used > g->n_groups))
        return choir_fail(
            CHOIR_E_FORMAT,
            "%s: %u of %u groups of %u experts; experts must divide evenly into at most %d", path,
            g->n_groups_used, g->n_groups, c->n_experts, CHOIR_MAX_EXPERT_GROUPS);
    return CHOIR_OK;
}

choir_status choir_config_check(const char *path, const choir_model_config *c)
{
    CHOIR_TRY(check_counts(path, c));
    uint32_t turned = c->rope.rotary_dims;
    if (turned == 0 || turned % 2 != 0 || turned > c->head_dim ||
        c->window_rope.rotary_dims != turned)
        return choir_fail(CHOIR_E_FORMAT, "%s: rope turns %u of %u dimensions", path, turned,
                          c->head_dim);
    CHOIR_TRY(check_gate(path, c));
    const float reals[] = {c->embedding_scale,   c->residual_scale,    c->logit_divisor,
                           c->logit_softcap,     c->attention_scale,   c->attention_softcap,
                           c->temperature_floor, c->temperature_scale, c->swiglu_alpha,
                           c->swiglu_limit,      c->gate.scale,        c->gate.normalise_min,
                           c->gate.jitter};
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
        if (!isfinite(reals[i]))
            return choir_fail(CHOIR_E_FORMAT, "%s: a scale of the model is no finite number", path);
    bool good = c->norm_eps >= 0 && c->norm_eps < 1 && good_rope(&c->rope) &&
                c->logit_divisor != 0 && c->attention_softcap >= 0 && c->logit_softcap >= 0 &&
                c->temperature_floor >= 0;
    if (c->window_rope.theta != 0) good = good && good_rope(&c->window_rope);
    if (!good)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: the norm's epsilon, rope's or another scale's parameters "
                          "are absurd",
                          path);
    return CHOIR_OK;
}
