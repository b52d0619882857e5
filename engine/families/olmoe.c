/* OLMoE: softmax over all experts, norms over the full width of q and k (Muennighoff et al. 2024). */
#include "engine/families/families.h"

const choir_family choir_family_olmoe = {
    .name = "olmoe",
    .model_type = "olmoe",
    .architecture = "olmoe",
    .gate = CHOIR_GATE_SOFTMAX_TOPK,
    .qk_norm = CHOIR_QK_NORM_FULL,
    .moe = true,
    .hf_router = "model.layers.%l.mlp.gate.weight",
    .hf_expert_gate = "model.layers.%l.mlp.experts.%e.gate_proj.weight",
    .hf_expert_up = "model.layers.%l.mlp.experts.%e.up_proj.weight",
    .hf_expert_down = "model.layers.%l.mlp.experts.%e.down_proj.weight",
};
