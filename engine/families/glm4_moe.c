/* GLM-4.5: DeepSeek-V3's gate over ordinary attention, of which half a head turns (Zhipu 2025). */
#include "engine/families/families.h"

static const choir_places gguf = {
    [CHOIR_ROLE_FFN_NORM] = {"blk.%l.post_attention_norm.weight"},
};

static const choir_key keys[] = {
    CHOIR_COUNT("n_group", "expert_group_count", gate.n_groups),
    CHOIR_COUNT("topk_group", "expert_group_used_count", gate.n_groups_used),
    CHOIR_HAS("use_qk_norm", NULL, CHOIR_ROLE_BIT(ATTN_Q_NORM) | CHOIR_ROLE_BIT(ATTN_K_NORM)),
    {0},
};

const choir_family choir_family_glm4_moe = {
    .name = "glm4_moe",
    .model_types = {"glm4_moe"},
    .architectures = {"glm4moe"},
    .moe = true,
    .properties = {.qk_norm = CHOIR_QK_NORM_HEAD,
                   .gate = {.kind = CHOIR_GATE_SIGMOID, .group_by_two = true, .normalise = true},
                   .roles = CHOIR_ROLE_BIT(ROUTER_CORRECTION)},
    .rotary_part = 0.5F,
    .keys = keys,
    .gguf = gguf,
};
