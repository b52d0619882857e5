/* MiniMax-M2: Mixtral's experts behind a gate of sigmoids, norms over the full width of q and k, of which a
 * part of each head turns (MiniMax 2025). */
#include "engine/families/families.h"

#define MOE "model.layers.%l.block_sparse_moe."

static const choir_places hf = {
    [CHOIR_ROLE_ROUTER] = {MOE "gate.weight"},
    [CHOIR_ROLE_ROUTER_CORRECTION] = {MOE "e_score_correction_bias"},
    [CHOIR_ROLE_EXPERT_GATE] = {MOE "experts.%e.w1.weight"},
    [CHOIR_ROLE_EXPERT_UP] = {MOE "experts.%e.w3.weight"},
    [CHOIR_ROLE_EXPERT_DOWN] = {MOE "experts.%e.w2.weight"},
};

static const choir_key keys[] = {
    CHOIR_COUNT("intermediate_size", "expert_feed_forward_length", expert_hidden),
    CHOIR_COUNT("rotary_dim", NULL, rope.rotary_dims),
    {0},
};

const choir_family choir_family_minimax_m2 = {
    .name = "minimax_m2",
    .model_types = {"minimax_m2"},
    .architectures = {"minimax-m2"},
    .moe = true,
    .properties = {.qk_norm = CHOIR_QK_NORM_FULL,
                   .gate = {.kind = CHOIR_GATE_SIGMOID, .normalise = true},
                   .roles = CHOIR_ROLE_BIT(ATTN_Q_NORM) | CHOIR_ROLE_BIT(ATTN_K_NORM) |
                            CHOIR_ROLE_BIT(ROUTER_CORRECTION)},
    .keys = keys,
    .hf = hf,
};
