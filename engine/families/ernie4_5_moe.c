/* ERNIE 4.5 MoE: a softmax whose choice is corrected by a bias, shared experts, rope on
 * neighbouring pairs (Baidu 2025). */
#include "engine/families/families.h"

static const choir_places hf_other = {
    [CHOIR_ROLE_ROUTER_CORRECTION] = {"model.layers.%l.mlp.moe_statics.e_score_correction_bias"},
};

static const choir_key keys[] = {
    CHOIR_COUNT("moe_num_experts", NULL, n_experts),
    CHOIR_COUNT("moe_k", NULL, n_experts_used),
    CHOIR_REAL("moe_norm_min", NULL, gate.normalise_min),
    CHOIR_HAS("use_bias", NULL, CHOIR_BIASES_QKV | CHOIR_ROLE_BIT(ATTN_OUT_BIAS)),
    {0},
};

const choir_family choir_family_ernie4_5_moe = {
    .name = "ernie4_5_moe",
    .model_types = {"ernie4_5_moe"},
    .architectures = {"ernie4_5-moe"},
    .moe = true,
    .properties = {.rope = {.interleaved = true},
                   .gate = {.normalise = true, .normalise_min = 1e-12F},
                   .roles = CHOIR_ROLE_BIT(ROUTER_CORRECTION)},
    .gguf_interleaved_rope = true,
    .keys = keys,
    .hf_other = hf_other,
};
