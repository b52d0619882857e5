/* Hunyuan-A13B: a shared expert as wide as the others, norms of q and k after rope (Tencent 2025).
 */
#include "engine/families/families.h"

#define LAYER "model.layers.%l."

static const choir_places hf = {
    [CHOIR_ROLE_ATTN_Q_NORM] = {LAYER "self_attn.query_layernorm.weight"},
    [CHOIR_ROLE_ATTN_K_NORM] = {LAYER "self_attn.key_layernorm.weight"},
    [CHOIR_ROLE_ROUTER] = {LAYER "mlp.gate.wg.weight"},
    [CHOIR_ROLE_SHARED_GATE] = {LAYER "mlp.shared_mlp.gate_proj.weight"},
    [CHOIR_ROLE_SHARED_UP] = {LAYER "mlp.shared_mlp.up_proj.weight"},
    [CHOIR_ROLE_SHARED_DOWN] = {LAYER "mlp.shared_mlp.down_proj.weight"},
};

static const choir_key keys[] = {
    CHOIR_COUNT("intermediate_size", "expert_feed_forward_length", expert_hidden),
    CHOIR_COUNT("moe_topk", NULL, n_experts_used),
    {0},
};

const choir_family choir_family_hunyuan_moe = {
    .name = "hunyuan_v1_moe",
    .model_types = {"hunyuan_v1_moe"},
    .architectures = {"hunyuan-moe"},
    .moe = true,
    .properties = {.qk_norm = CHOIR_QK_NORM_HEAD,
                   .qk_norm_after_rope = true,
                   .gate = {.normalise = true},
                   .roles = CHOIR_ROLE_BIT(ATTN_Q_NORM) | CHOIR_ROLE_BIT(ATTN_K_NORM) |
                            CHOIR_ROLE_BIT(SHARED_GATE) | CHOIR_ROLE_BIT(SHARED_UP) |
                            CHOIR_ROLE_BIT(SHARED_DOWN)},
    .keys = keys,
    .hf = hf,
};
