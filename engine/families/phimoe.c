/* Phi-3.5-MoE: two experts chosen one after the other by a sparse mixer, LayerNorm, biases
 * everywhere (Abdin et al. 2024). */
#include "engine/families/families.h"

#define MOE "model.layers.%l.block_sparse_moe."

static const choir_places hf = {
    [CHOIR_ROLE_ROUTER] = {MOE "gate.weight"},
    [CHOIR_ROLE_EXPERT_GATE] = {MOE "experts.%e.w1.weight"},
    [CHOIR_ROLE_EXPERT_UP] = {MOE "experts.%e.w3.weight"},
    [CHOIR_ROLE_EXPERT_DOWN] = {MOE "experts.%e.w2.weight"},
};

static const choir_key keys[] = {
    CHOIR_COUNT("intermediate_size", "feed_forward_length", expert_hidden),
    CHOIR_REAL("router_jitter_noise", NULL, gate.jitter),
    CHOIR_REAL(NULL, "attention.layer_norm_epsilon", norm_eps),
    CHOIR_HAS("attention_bias", NULL, CHOIR_BIASES_QKV | CHOIR_ROLE_BIT(ATTN_OUT_BIAS)),
    CHOIR_HAS("lm_head_bias", NULL, CHOIR_ROLE_BIT(HEAD_BIAS)),
    {0},
};

/* The mixer chooses two, whatever the configuration says. */
static void settle(choir_model_config *c, bool gguf)
{
    (void)gguf;
    c->n_experts_used = 2;
}

const choir_family choir_family_phimoe = {
    .name = "phimoe",
    .model_types = {"phimoe"},
    .architectures = {"phimoe"},
    .moe = true,
    .properties = {.layer_norm = true,
                   .gate = {.kind = CHOIR_GATE_SPARSE_MIXER, .jitter = 0.01F},
                   .roles = CHOIR_ROLE_BIT(ATTN_NORM_BIAS) | CHOIR_ROLE_BIT(FFN_NORM_BIAS) |
                            CHOIR_ROLE_BIT(OUTPUT_NORM_BIAS)},
    .windows = CHOIR_WINDOW_ALL,
    .keys = keys,
    .hf = hf,
    .settle = settle,
};
