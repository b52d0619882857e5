/* Phi-3 and Phi-4: llama with q, k and v, and gate and up, in one tensor each (Abdin et al. 2024).
 */
#include "engine/families/families.h"

#define QKV     "model.layers.%l.self_attn.qkv_proj.weight"
#define GATE_UP "model.layers.%l.mlp.gate_up_proj.weight"

static const choir_places hf = {
    [CHOIR_ROLE_ATTN_Q] = {QKV, CHOIR_PART_Q},
    [CHOIR_ROLE_ATTN_K] = {QKV, CHOIR_PART_K},
    [CHOIR_ROLE_ATTN_V] = {QKV, CHOIR_PART_V},
    [CHOIR_ROLE_FFN_GATE] = {GATE_UP, CHOIR_PART_FIRST_HALF},
    [CHOIR_ROLE_FFN_UP] = {GATE_UP, CHOIR_PART_SECOND_HALF},
};

static const choir_places gguf = {
    [CHOIR_ROLE_ATTN_Q] = {"blk.%l.attn_qkv.weight", CHOIR_PART_Q},
    [CHOIR_ROLE_ATTN_K] = {"blk.%l.attn_qkv.weight", CHOIR_PART_K},
    [CHOIR_ROLE_ATTN_V] = {"blk.%l.attn_qkv.weight", CHOIR_PART_V},
    [CHOIR_ROLE_FFN_GATE] = {"blk.%l.ffn_up.weight", CHOIR_PART_FIRST_HALF},
    [CHOIR_ROLE_FFN_UP] = {"blk.%l.ffn_up.weight", CHOIR_PART_SECOND_HALF},
};

const choir_family choir_family_phi3 = {
    .name = "phi3",
    .model_types = {"phi3"},
    .architectures = {"phi3"},
    .windows = CHOIR_WINDOW_ALL,
    .hf = hf,
    .gguf = gguf,
};
