/* Mixtral: softmax over the two chosen experts (Jiang et al. 2024); GGUF files call it llama. */
#include "engine/families/families.h"

#define MOE "model.layers.%l.block_sparse_moe."

static const choir_places hf = {
    [CHOIR_ROLE_ROUTER] = {MOE "gate.weight"},
    [CHOIR_ROLE_EXPERT_GATE] = {MOE "experts.%e.w1.weight"},
    [CHOIR_ROLE_EXPERT_UP] = {MOE "experts.%e.w3.weight"},
    [CHOIR_ROLE_EXPERT_DOWN] = {MOE "experts.%e.w2.weight"},
};

/* Older files have a tensor for each expert. */
static const choir_places gguf_other = {
    [CHOIR_ROLE_EXPERT_GATE] = {"blk.%l.ffn_gate.%e.weight"},
    [CHOIR_ROLE_EXPERT_UP] = {"blk.%l.ffn_up.%e.weight"},
    [CHOIR_ROLE_EXPERT_DOWN] = {"blk.%l.ffn_down.%e.weight"},
};

static const choir_key keys[] = {
    CHOIR_COUNT("intermediate_size", "feed_forward_length", expert_hidden), {0}};

const choir_family choir_family_mixtral = {
    .name = "mixtral",
    .model_types = {"mixtral"},
    .architectures = {"llama"},
    .moe = true,
    .properties = {.gate = {.kind = CHOIR_GATE_TOPK_SOFTMAX, .normalise = true}},
    .windows = CHOIR_WINDOW_ALL,
    .gguf_interleaved_rope = true,
    .keys = keys,
    .hf = hf,
    .gguf_other = gguf_other,
};
