#include "engine/families/families.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const choir_family *const families[] = {
    &choir_family_llama,   &choir_family_mistral,   &choir_family_qwen2, &choir_family_qwen3,
    &choir_family_mixtral, &choir_family_qwen3_moe, &choir_family_olmoe,
};
enum { N_FAMILIES = sizeof families / sizeof *families };

const choir_family *choir_family_of_model_type(const char *model_type)
{
    for (int i = 0; i < N_FAMILIES; i++)
        if (strcmp(families[i]->model_type, model_type) == 0) return families[i];
    return NULL;
}

const choir_family *choir_family_of_architecture(const char *architecture, bool moe)
{
    for (int i = 0; i < N_FAMILIES; i++)
        if (strcmp(families[i]->architecture, architecture) == 0 && families[i]->moe == moe)
            return families[i];
    return NULL;
}

const char *choir_family_nearest(const char *name, bool gguf, char *out, size_t bytes)
{
    bool told[N_FAMILIES] = {false};
    size_t n = 0;
    out[0] = '\0';
    for (int shown = 0; shown < 4; shown++) {
        int best = -1, best_distance = 0;
        for (int i = 0; i < N_FAMILIES; i++) {
            int d = choir_edit_distance(name, gguf ? families[i]->architecture : families[i]->model_type);
            if (!told[i] && (best < 0 || d < best_distance)) {
                best = i;
                best_distance = d;
            }
        }
        told[best] = true;
        const char *known = gguf ? families[best]->architecture : families[best]->model_type;
        if (strstr(out, known) != NULL) continue;
        n += (size_t)snprintf(out + n, bytes - n, "%s%s", n > 0 ? ", " : "", known);
        if (n >= bytes) break;
    }
    return out;
}

static const char *const hf_names[CHOIR_N_ROLES] = {
    [CHOIR_ROLE_EMBEDDING] = "model.embed_tokens.weight",
    [CHOIR_ROLE_OUTPUT_NORM] = "model.norm.weight",
    [CHOIR_ROLE_HEAD] = "lm_head.weight",
    [CHOIR_ROLE_ATTN_NORM] = "model.layers.%l.input_layernorm.weight",
    [CHOIR_ROLE_ATTN_Q] = "model.layers.%l.self_attn.q_proj.weight",
    [CHOIR_ROLE_ATTN_K] = "model.layers.%l.self_attn.k_proj.weight",
    [CHOIR_ROLE_ATTN_V] = "model.layers.%l.self_attn.v_proj.weight",
    [CHOIR_ROLE_ATTN_OUT] = "model.layers.%l.self_attn.o_proj.weight",
    [CHOIR_ROLE_ATTN_Q_BIAS] = "model.layers.%l.self_attn.q_proj.bias",
    [CHOIR_ROLE_ATTN_K_BIAS] = "model.layers.%l.self_attn.k_proj.bias",
    [CHOIR_ROLE_ATTN_V_BIAS] = "model.layers.%l.self_attn.v_proj.bias",
    [CHOIR_ROLE_ATTN_Q_NORM] = "model.layers.%l.self_attn.q_norm.weight",
    [CHOIR_ROLE_ATTN_K_NORM] = "model.layers.%l.self_attn.k_norm.weight",
    [CHOIR_ROLE_FFN_NORM] = "model.layers.%l.post_attention_layernorm.weight",
    [CHOIR_ROLE_FFN_GATE] = "model.layers.%l.mlp.gate_proj.weight",
    [CHOIR_ROLE_FFN_UP] = "model.layers.%l.mlp.up_proj.weight",
    [CHOIR_ROLE_FFN_DOWN] = "model.layers.%l.mlp.down_proj.weight",
};

static const char *const gguf_names[CHOIR_N_ROLES] = {
    [CHOIR_ROLE_EMBEDDING] = "token_embd.weight",
    [CHOIR_ROLE_OUTPUT_NORM] = "output_norm.weight",
    [CHOIR_ROLE_HEAD] = "output.weight",
    [CHOIR_ROLE_ROPE_FACTORS] = "rope_freqs.weight",
    [CHOIR_ROLE_ATTN_NORM] = "blk.%l.attn_norm.weight",
    [CHOIR_ROLE_ATTN_Q] = "blk.%l.attn_q.weight",
    [CHOIR_ROLE_ATTN_K] = "blk.%l.attn_k.weight",
    [CHOIR_ROLE_ATTN_V] = "blk.%l.attn_v.weight",
    [CHOIR_ROLE_ATTN_OUT] = "blk.%l.attn_output.weight",
    [CHOIR_ROLE_ATTN_Q_BIAS] = "blk.%l.attn_q.bias",
    [CHOIR_ROLE_ATTN_K_BIAS] = "blk.%l.attn_k.bias",
    [CHOIR_ROLE_ATTN_V_BIAS] = "blk.%l.attn_v.bias",
    [CHOIR_ROLE_ATTN_Q_NORM] = "blk.%l.attn_q_norm.weight",
    [CHOIR_ROLE_ATTN_K_NORM] = "blk.%l.attn_k_norm.weight",
    [CHOIR_ROLE_FFN_NORM] = "blk.%l.ffn_norm.weight",
    [CHOIR_ROLE_FFN_GATE] = "blk.%l.ffn_gate.weight",
    [CHOIR_ROLE_FFN_UP] = "blk.%l.ffn_up.weight",
    [CHOIR_ROLE_FFN_DOWN] = "blk.%l.ffn_down.weight",
    [CHOIR_ROLE_ROUTER] = "blk.%l.ffn_gate_inp.weight",
    [CHOIR_ROLE_EXPERT_GATE] = "blk.%l.ffn_gate_exps.weight",
    [CHOIR_ROLE_EXPERT_UP] = "blk.%l.ffn_up_exps.weight",
    [CHOIR_ROLE_EXPERT_DOWN] = "blk.%l.ffn_down_exps.weight",
};

const char *choir_family_pattern(const choir_family *f, choir_role role, bool gguf)
{
    bool dense_ffn = role == CHOIR_ROLE_FFN_GATE || role == CHOIR_ROLE_FFN_UP ||
                     role == CHOIR_ROLE_FFN_DOWN;
    bool routed = role == CHOIR_ROLE_ROUTER || role == CHOIR_ROLE_EXPERT_GATE ||
                  role == CHOIR_ROLE_EXPERT_UP || role == CHOIR_ROLE_EXPERT_DOWN;
    bool bias = role == CHOIR_ROLE_ATTN_Q_BIAS || role == CHOIR_ROLE_ATTN_K_BIAS ||
                role == CHOIR_ROLE_ATTN_V_BIAS;
    bool qk_norm = role == CHOIR_ROLE_ATTN_Q_NORM || role == CHOIR_ROLE_ATTN_K_NORM;
    if (dense_ffn == f->moe && dense_ffn) return NULL;
    if (routed && !f->moe) return NULL;
    if (bias && !f->attention_bias) return NULL;
    if (qk_norm && f->qk_norm == CHOIR_QK_NORM_NONE) return NULL;
    if (gguf) return gguf_names[role];
    switch (role) {
    case CHOIR_ROLE_ROUTER: return f->hf_router;
    case CHOIR_ROLE_EXPERT_GATE: return f->hf_expert_gate;
    case CHOIR_ROLE_EXPERT_UP: return f->hf_expert_up;
    case CHOIR_ROLE_EXPERT_DOWN: return f->hf_expert_down;
    default: return hf_names[role];
    }
}
