/* dots.llm1: DeepSeek-V3's gate over Qwen 3's attention (rednote 2025). */
#include "engine/families/families.h"

static const choir_key keys[] = {
    CHOIR_COUNT("n_group", "expert_group_count", gate.n_groups),
    CHOIR_COUNT("topk_group", "expert_group_used_count", gate.n_groups_used),
    {0},
};

const choir_family choir_family_dots1 = {
    .name = "dots1",
    .model_types = {"dots1"},
    .architectures = {"dots1"},
    .moe = true,
    .properties = {.qk_norm = CHOIR_QK_NORM_HEAD,
                   .gate = {.kind = CHOIR_GATE_SIGMOID, .group_by_two = true},
                   .roles = CHOIR_ROLE_BIT(ATTN_Q_NORM) | CHOIR_ROLE_BIT(ATTN_K_NORM) |
                            CHOIR_ROLE_BIT(ROUTER_CORRECTION)},
    .keys = keys,
};
