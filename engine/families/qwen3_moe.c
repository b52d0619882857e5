/* Qwen 3 MoE: softmax over all experts, the chosen renormalised if the configuration says so. */
#include "engine/families/families.h"

const choir_family choir_family_qwen3_moe = {
    .name = "qwen3_moe",
    .model_types = {"qwen3_moe"},
    .architectures = {"qwen3moe"},
    .moe = true,
    .properties = {.qk_norm = CHOIR_QK_NORM_HEAD,
                   .gate = {.normalise = true},
                   .roles = CHOIR_ROLE_BIT(ATTN_Q_NORM) | CHOIR_ROLE_BIT(ATTN_K_NORM)},
};
