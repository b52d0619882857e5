/* Qwen 1.5 and 2 MoE: a shared expert behind a gate of its own, dense layers among the others. */
#include "engine/families/families.h"

#define SHARED "model.layers.%l.mlp.shared_expert."

static const choir_places hf = {
    [CHOIR_ROLE_SHARED_GATE] = {SHARED "gate_proj.weight"},
    [CHOIR_ROLE_SHARED_UP] = {SHARED "up_proj.weight"},
    [CHOIR_ROLE_SHARED_DOWN] = {SHARED "down_proj.weight"},
    [CHOIR_ROLE_SHARED_ROUTER] = {"model.layers.%l.mlp.shared_expert_gate.weight"},
};

static const choir_key keys[] = {CHOIR_HAS("qkv_bias", NULL, CHOIR_BIASES_QKV), {0}};

const choir_family choir_family_qwen2_moe = {
    .name = "qwen2_moe",
    .model_types = {"qwen2_moe"},
    .architectures = {"qwen2moe"},
    .moe = true,
    .properties = {.roles = CHOIR_ROLE_BIT(SHARED_GATE) | CHOIR_ROLE_BIT(SHARED_UP) |
                            CHOIR_ROLE_BIT(SHARED_DOWN) | CHOIR_ROLE_BIT(SHARED_ROUTER)},
    .keys = keys,
    .hf = hf,
};
