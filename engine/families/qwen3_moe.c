/* Qwen 3 MoE: softmax over all experts, the chosen renormalised if the configuration says so. */
#include "engine/families/families.h"

const choir_family choir_family_qwen3_moe = {
    .name = "qwen3_moe",
    .model_type = "qwen3_moe",
    .architecture = "qwen3moe",
    .gate = CHOIR_GATE_SOFTMAX_TOPK,
    .normalise_topk = true,
    .qk_norm = CHOIR_QK_NORM_HEAD,
    .moe = true,
    .hf_router = "model.layers.%l.mlp.gate.weight",
    .hf_expert_gate = "model.layers.%l.mlp.experts.%e.gate_proj.weight",
    .hf_expert_up = "model.layers.%l.mlp.experts.%e.up_proj.weight",
    .hf_expert_down = "model.layers.%l.mlp.experts.%e.down_proj.weight",
};
