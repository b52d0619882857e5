/* Llama 4's text model: the best expert by a sigmoid that scales its input, a shared expert,
 * attention in chunks, and layers without rope whose queries grow with the position (Meta 2025). */
#include "engine/families/families.h"

#define FFN "model.layers.%l.feed_forward."

static const choir_places hf = {
    [CHOIR_ROLE_FFN_GATE] = {FFN "gate_proj.weight"},
    [CHOIR_ROLE_FFN_UP] = {FFN "up_proj.weight"},
    [CHOIR_ROLE_FFN_DOWN] = {FFN "down_proj.weight"},
    [CHOIR_ROLE_ROUTER] = {FFN "router.weight"},
    [CHOIR_ROLE_EXPERT_GATE] = {FFN "experts.gate_up_proj", CHOIR_PART_FIRST_HALF, true},
    [CHOIR_ROLE_EXPERT_UP] = {FFN "experts.gate_up_proj", CHOIR_PART_SECOND_HALF, true},
    [CHOIR_ROLE_EXPERT_DOWN] = {FFN "experts.down_proj", CHOIR_PART_ALL, true},
    [CHOIR_ROLE_SHARED_GATE] = {FFN "shared_expert.gate_proj.weight"},
    [CHOIR_ROLE_SHARED_UP] = {FFN "shared_expert.up_proj.weight"},
    [CHOIR_ROLE_SHARED_DOWN] = {FFN "shared_expert.down_proj.weight"},
};

static const choir_key keys[] = {
    CHOIR_COUNT("intermediate_size", "expert_feed_forward_length", expert_hidden),
    CHOIR_COUNT("intermediate_size_mlp", "feed_forward_length", ffn_hidden),
    CHOIR_COUNT("attention_chunk_size", "attention.chunk_size", attention_chunk),
    CHOIR_FLAG("use_qk_norm", NULL, qk_norm_unweighted),
    CHOIR_REAL("floor_scale", "attention.temperature_length", temperature_floor),
    CHOIR_REAL("attn_scale", "attention.temperature_scale", temperature_scale),
    {0},
};

static void settle(choir_model_config *c, bool gguf)
{
    if (gguf && c->n_experts == 128) c->qk_norm_unweighted = false; /* Maverick, which GGUF does not tell */
    c->qk_norm_after_rope = c->qk_norm_unweighted;
}

const choir_family choir_family_llama4 = {
    .name = "llama4",
    .model_types = {"llama4_text", "llama4"},
    .architectures = {"llama4"},
    .moe = true,
    .properties = {.gate = {.kind = CHOIR_GATE_SIGMOID},
                   .weigh_input = true,
                   .attention_chunk = 8192,
                   .qk_norm_unweighted = true,
                   .temperature_floor = 8192,
                   .temperature_scale = 0.1F,
                   .rope = {.interleaved = true},
                   .roles = CHOIR_ROLE_BIT(SHARED_GATE) | CHOIR_ROLE_BIT(SHARED_UP) |
                            CHOIR_ROLE_BIT(SHARED_DOWN)},
    .rope_period = 4,
    .gguf_interleaved_rope = true,
    .hides_transposed = true,
    .keys = keys,
    .hf = hf,
    .settle = settle,
};
