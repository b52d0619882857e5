/* Granite 3 dense and MoE: llama with multipliers on embeddings, residuals, scores and logits;
 * experts' gate and up stacked one above the other (IBM 2024). */
#include "engine/families/families.h"

#define MOE "model.layers.%l.block_sparse_moe."

static const choir_places hf_moe = {
    [CHOIR_ROLE_ROUTER] = {MOE "router.layer.weight"},
    [CHOIR_ROLE_EXPERT_GATE] = {MOE "input_linear.weight", CHOIR_PART_FIRST_HALF},
    [CHOIR_ROLE_EXPERT_UP] = {MOE "input_linear.weight", CHOIR_PART_SECOND_HALF},
    [CHOIR_ROLE_EXPERT_DOWN] = {MOE "output_linear.weight"},
};

#define MULTIPLIERS                                                                                \
    CHOIR_REAL("embedding_multiplier", "embedding_scale", embedding_scale),                        \
        CHOIR_REAL("residual_multiplier", "residual_scale", residual_scale),                       \
        CHOIR_REAL("attention_multiplier", "attention.scale", attention_scale),                    \
        CHOIR_REAL("logits_scaling", "logit_scale", logit_divisor)

static const choir_key keys[] = {MULTIPLIERS, {0}};
static const choir_key moe_keys[] = {
    MULTIPLIERS, CHOIR_COUNT("intermediate_size", "feed_forward_length", expert_hidden), {0}};

const choir_family choir_family_granite = {
    .name = "granite",
    .model_types = {"granite"},
    .architectures = {"granite"},
    .gguf_interleaved_rope = true,
    .keys = keys,
};

const choir_family choir_family_granitemoe = {
    .name = "granitemoe",
    .model_types = {"granitemoe"},
    .architectures = {"granitemoe"},
    .moe = true,
    .properties = {.gate = {.kind = CHOIR_GATE_TOPK_SOFTMAX, .normalise = true}},
    .gguf_interleaved_rope = true,
    .keys = moe_keys,
    .hf = hf_moe,
};
