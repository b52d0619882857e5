/* Mixtral: softmax over the two chosen experts (Jiang et al. 2024); GGUF files call it llama. */
#include "engine/families/families.h"

const choir_family choir_family_mixtral = {
    .name = "mixtral",
    .model_type = "mixtral",
    .architecture = "llama",
    .gate = CHOIR_GATE_TOPK_SOFTMAX,
    .normalise_topk = true,
    .moe = true,
    .gguf_interleaved_rope = true,
    .hf_router = "model.layers.%l.block_sparse_moe.gate.weight",
    .hf_expert_gate = "model.layers.%l.block_sparse_moe.experts.%e.w1.weight",
    .hf_expert_up = "model.layers.%l.block_sparse_moe.experts.%e.w3.weight",
    .hf_expert_down = "model.layers.%l.block_sparse_moe.experts.%e.w2.weight",
};
