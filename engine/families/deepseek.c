/* DeepSeek-V2, V3, R1 and Kimi K2: latent attention, shared experts, the first layers dense,
 * experts chosen within groups (DeepSeek-AI 2024a, 2024b). */
#include "engine/families/families.h"

#define ATTN "model.layers.%l.self_attn."

static const choir_places hf = {
    [CHOIR_ROLE_ATTN_Q_A] = {ATTN "q_a_proj.weight"},
    [CHOIR_ROLE_ATTN_Q_A_NORM] = {ATTN "q_a_layernorm.weight"},
    [CHOIR_ROLE_ATTN_Q_B] = {ATTN "q_b_proj.weight"},
    [CHOIR_ROLE_ATTN_KV_A] = {ATTN "kv_a_proj_with_mqa.weight"},
    [CHOIR_ROLE_ATTN_KV_A_NORM] = {ATTN "kv_a_layernorm.weight"},
    [CHOIR_ROLE_ATTN_K_B] = {ATTN "kv_b_proj.weight", CHOIR_PART_HEAD_K},
    [CHOIR_ROLE_ATTN_V_B] = {ATTN "kv_b_proj.weight", CHOIR_PART_HEAD_V},
};

/* Older files have K_B and V_B in one tensor, as the checkpoint has them. */
static const choir_places gguf_other = {
    [CHOIR_ROLE_ATTN_K_B] = {"blk.%l.attn_kv_b.weight", CHOIR_PART_HEAD_K},
    [CHOIR_ROLE_ATTN_V_B] = {"blk.%l.attn_kv_b.weight", CHOIR_PART_HEAD_V},
};

static const choir_key keys[] = {
    CHOIR_COUNT("kv_lora_rank", "attention.kv_lora_rank", kv_lora_rank),
    CHOIR_COUNT("q_lora_rank", "attention.q_lora_rank", q_lora_rank),
    CHOIR_COUNT("qk_nope_head_dim", NULL, nope_dim),
    CHOIR_COUNT("qk_rope_head_dim", "rope.dimension_count", rope_dim),
    CHOIR_COUNT(NULL, "attention.value_length", value_dim),
    CHOIR_COUNT("v_head_dim", "attention.value_length_mla", value_dim),
    CHOIR_COUNT(NULL, "attention.key_length_mla", head_dim),
    CHOIR_COUNT("n_group", "expert_group_count", gate.n_groups),
    CHOIR_COUNT("topk_group", "expert_group_used_count", gate.n_groups_used),
    CHOIR_FLAG("rope_interleave", NULL, rope.interleaved),
    {0},
};

/* GGUF files call all of them deepseek2; a sigmoid is V3's. transformers scales V2's weights and never divides
 * them by their sum, whatever norm_topk_prob says. */
static void settle(choir_model_config *c, bool gguf)
{
    if (gguf)
        c->gate.group_by_two = c->gate.kind == CHOIR_GATE_SIGMOID;
    else
        c->gate.normalise = false;
}

#define SHARED                                                                                     \
    (CHOIR_ROLE_BIT(SHARED_GATE) | CHOIR_ROLE_BIT(SHARED_UP) | CHOIR_ROLE_BIT(SHARED_DOWN))

const choir_family choir_family_deepseek_v2 = {
    .name = "deepseek_v2",
    .model_types = {"deepseek_v2"},
    .architectures = {"deepseek2"},
    .moe = true,
    .properties = {.latent_norm_eps = 1e-6F, .rope = {.interleaved = true}, .roles = SHARED},
    .gguf_interleaved_rope = true,
    .keys = keys,
    .hf = hf,
    .gguf_other = gguf_other,
    .settle = settle,
};

const choir_family choir_family_deepseek_v3 = {
    .name = "deepseek_v3",
    .model_types = {"deepseek_v3", "kimi_k2"},
    .moe = true,
    .properties = {.latent_norm_eps = 1e-6F,
                   .rope = {.interleaved = true},
                   .gate = {.kind = CHOIR_GATE_SIGMOID, .group_by_two = true, .normalise = true},
                   .roles = SHARED | CHOIR_ROLE_BIT(ROUTER_CORRECTION)},
    .gguf_interleaved_rope = true,
    .keys = keys,
    .hf = hf,
    .gguf_other = gguf_other,
};
