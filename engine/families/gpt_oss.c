/* gpt-oss: a sink beside each head's scores, every other layer with a sliding window, experts with
 * biases and a clamped SwiGLU, weights in MXFP4 (OpenAI 2025). */
#include "engine/families/families.h"

#define MLP "model.layers.%l.mlp."

static const choir_places hf = {
    [CHOIR_ROLE_ATTN_SINKS] = {"model.layers.%l.self_attn.sinks"},
    [CHOIR_ROLE_ROUTER] = {MLP "router.weight"},
    [CHOIR_ROLE_ROUTER_BIAS] = {MLP "router.bias"},
    [CHOIR_ROLE_EXPERT_GATE] = {MLP "experts.gate_up_proj", CHOIR_PART_EVEN, true},
    [CHOIR_ROLE_EXPERT_UP] = {MLP "experts.gate_up_proj", CHOIR_PART_ODD, true},
    [CHOIR_ROLE_EXPERT_DOWN] = {MLP "experts.down_proj", CHOIR_PART_ALL, true},
    [CHOIR_ROLE_EXPERT_GATE_BIAS] = {MLP "experts.gate_up_proj_bias", CHOIR_PART_EVEN},
    [CHOIR_ROLE_EXPERT_UP_BIAS] = {MLP "experts.gate_up_proj_bias", CHOIR_PART_ODD},
    [CHOIR_ROLE_EXPERT_DOWN_BIAS] = {MLP "experts.down_proj_bias"},
};

/* Checkpoints in MXFP4 have codes and exponents in two tensors, outputs first. */
static const choir_places hf_other = {
    [CHOIR_ROLE_EXPERT_GATE] = {MLP "experts.gate_up_proj_blocks", CHOIR_PART_EVEN},
    [CHOIR_ROLE_EXPERT_UP] = {MLP "experts.gate_up_proj_blocks", CHOIR_PART_ODD},
    [CHOIR_ROLE_EXPERT_DOWN] = {MLP "experts.down_proj_blocks"},
};

static const choir_places gguf = {
    [CHOIR_ROLE_FFN_NORM] = {"blk.%l.post_attention_norm.weight"},
    [CHOIR_ROLE_ATTN_SINKS] = {"blk.%l.attn_sinks.weight"},
};

static const choir_key keys[] = {
    CHOIR_COUNT("intermediate_size", "expert_feed_forward_length", expert_hidden),
    CHOIR_REAL("swiglu_limit", NULL, swiglu_limit),
    CHOIR_REAL("swiglu_alpha", NULL, swiglu_alpha),
    {0},
};

/* GGUF does not say that YaRN's ramp is not rounded. */
static void settle(choir_model_config *c, bool from_gguf)
{
    if (from_gguf) c->rope.untruncated = true;
}

const choir_family choir_family_gpt_oss = {
    .name = "gpt_oss",
    .model_types = {"gpt_oss"},
    .architectures = {"gpt-oss"},
    .moe = true,
    .properties = {.activation = CHOIR_CLAMPED_SWIGLU,
                   .swiglu_alpha = 1.702F,
                   .swiglu_limit = 7,
                   .gate = {.kind = CHOIR_GATE_TOPK_SOFTMAX, .normalise = true},
                   .roles = CHOIR_BIASES_QKV | CHOIR_ROLE_BIT(ATTN_OUT_BIAS) |
                            CHOIR_ROLE_BIT(ATTN_SINKS) | CHOIR_ROLE_BIT(ROUTER_BIAS) |
                            CHOIR_ROLE_BIT(EXPERT_GATE_BIAS) | CHOIR_ROLE_BIT(EXPERT_UP_BIAS) |
                            CHOIR_ROLE_BIT(EXPERT_DOWN_BIAS)},
    .windows = CHOIR_WINDOW_PERIOD,
    .window_period = 2,
    .keys = keys,
    .hf = hf,
    .hf_other = hf_other,
    .gguf = gguf,
    .settle = settle,
};
