/* The list of families, and the places that most of them share. */
#include "engine/families/families.h"

#include <stdio.h>
#include <string.h>

/* FAMILIES(X): every choir_family_NAME that a file of this folder defines; engine/files.cmake makes it. */
#include "families_list.h"

#define X(family) extern const choir_family choir_family_##family;
FAMILIES(X)
#undef X

static const choir_family *const families[] = {
#define X(family) &choir_family_##family,
    FAMILIES(X)
#undef X
};
enum { N_FAMILIES = sizeof families / sizeof *families, MAX_NAMES = 3 };

static bool is_among(const char *const *names, const char *name)
{
    for (int i = 0; i < MAX_NAMES && names[i] != NULL; i++)
        if (strcmp(names[i], name) == 0) return true;
    return false;
}

const choir_family *choir_family_of_model_type(const char *model_type)
{
    for (int i = 0; i < N_FAMILIES; i++)
        if (is_among(families[i]->model_types, model_type)) return families[i];
    return NULL;
}

const choir_family *choir_family_of_architecture(const char *architecture, bool moe)
{
    for (int i = 0; i < N_FAMILIES; i++)
        if (is_among(families[i]->architectures, architecture) && families[i]->moe == moe)
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
            const char *known = gguf ? families[i]->architectures[0] : families[i]->model_types[0];
            if (told[i] || known == NULL) continue;
            int d = choir_edit_distance(name, known);
            if (best < 0 || d < best_distance) {
                best = i;
                best_distance = d;
            }
        }
        told[best] = true;
        const char *known =
            gguf ? families[best]->architectures[0] : families[best]->model_types[0];
        bool again = false; /* GGUF calls Mixtral llama too */
        for (int i = 0; i < N_FAMILIES; i++) {
            const char *other = gguf ? families[i]->architectures[0] : families[i]->model_types[0];
            again = again || (i != best && told[i] && strcmp(other, known) == 0);
        }
        if (again) continue;
        n += (size_t)snprintf(out + n, bytes - n, "%s%s", n > 0 ? ", " : "", known);
        if (n >= bytes) break;
    }
    return out;
}

#define LAYER "model.layers.%l."

static const choir_places common_hf = {
    [CHOIR_ROLE_EMBEDDING] = {"model.embed_tokens.weight"},
    [CHOIR_ROLE_OUTPUT_NORM] = {"model.norm.weight"},
    [CHOIR_ROLE_OUTPUT_NORM_BIAS] = {"model.norm.bias"},
    [CHOIR_ROLE_HEAD] = {"lm_head.weight"},
    [CHOIR_ROLE_HEAD_BIAS] = {"lm_head.bias"},
    [CHOIR_ROLE_ATTN_NORM] = {LAYER "input_layernorm.weight"},
    [CHOIR_ROLE_ATTN_NORM_BIAS] = {LAYER "input_layernorm.bias"},
    [CHOIR_ROLE_ATTN_Q] = {LAYER "self_attn.q_proj.weight"},
    [CHOIR_ROLE_ATTN_K] = {LAYER "self_attn.k_proj.weight"},
    [CHOIR_ROLE_ATTN_V] = {LAYER "self_attn.v_proj.weight"},
    [CHOIR_ROLE_ATTN_OUT] = {LAYER "self_attn.o_proj.weight"},
    [CHOIR_ROLE_ATTN_Q_BIAS] = {LAYER "self_attn.q_proj.bias"},
    [CHOIR_ROLE_ATTN_K_BIAS] = {LAYER "self_attn.k_proj.bias"},
    [CHOIR_ROLE_ATTN_V_BIAS] = {LAYER "self_attn.v_proj.bias"},
    [CHOIR_ROLE_ATTN_OUT_BIAS] = {LAYER "self_attn.o_proj.bias"},
    [CHOIR_ROLE_ATTN_Q_NORM] = {LAYER "self_attn.q_norm.weight"},
    [CHOIR_ROLE_ATTN_K_NORM] = {LAYER "self_attn.k_norm.weight"},
    [CHOIR_ROLE_FFN_NORM] = {LAYER "post_attention_layernorm.weight"},
    [CHOIR_ROLE_FFN_NORM_BIAS] = {LAYER "post_attention_layernorm.bias"},
    [CHOIR_ROLE_FFN_GATE] = {LAYER "mlp.gate_proj.weight"},
    [CHOIR_ROLE_FFN_UP] = {LAYER "mlp.up_proj.weight"},
    [CHOIR_ROLE_FFN_DOWN] = {LAYER "mlp.down_proj.weight"},
    [CHOIR_ROLE_FFN_GATE_BIAS] = {LAYER "mlp.gate_proj.bias"},
    [CHOIR_ROLE_FFN_UP_BIAS] = {LAYER "mlp.up_proj.bias"},
    [CHOIR_ROLE_FFN_DOWN_BIAS] = {LAYER "mlp.down_proj.bias"},
    [CHOIR_ROLE_ROUTER] = {LAYER "mlp.gate.weight"},
    [CHOIR_ROLE_ROUTER_CORRECTION] = {LAYER "mlp.gate.e_score_correction_bias"},
    [CHOIR_ROLE_EXPERT_GATE] = {LAYER "mlp.experts.%e.gate_proj.weight"},
    [CHOIR_ROLE_EXPERT_UP] = {LAYER "mlp.experts.%e.up_proj.weight"},
    [CHOIR_ROLE_EXPERT_DOWN] = {LAYER "mlp.experts.%e.down_proj.weight"},
    [CHOIR_ROLE_SHARED_GATE] = {LAYER "mlp.shared_experts.gate_proj.weight"},
    [CHOIR_ROLE_SHARED_UP] = {LAYER "mlp.shared_experts.up_proj.weight"},
    [CHOIR_ROLE_SHARED_DOWN] = {LAYER "mlp.shared_experts.down_proj.weight"},
    [CHOIR_ROLE_SHARED_GATE_BIAS] = {LAYER "mlp.shared_experts.gate_proj.bias"},
    [CHOIR_ROLE_SHARED_UP_BIAS] = {LAYER "mlp.shared_experts.up_proj.bias"},
    [CHOIR_ROLE_SHARED_DOWN_BIAS] = {LAYER "mlp.shared_experts.down_proj.bias"},
};

static const choir_places common_gguf = {
    [CHOIR_ROLE_EMBEDDING] = {"token_embd.weight"},
    [CHOIR_ROLE_OUTPUT_NORM] = {"output_norm.weight"},
    [CHOIR_ROLE_OUTPUT_NORM_BIAS] = {"output_norm.bias"},
    [CHOIR_ROLE_HEAD] = {"output.weight"},
    [CHOIR_ROLE_HEAD_BIAS] = {"output.bias"},
    [CHOIR_ROLE_ROPE_FACTORS] = {"rope_freqs.weight"},
    [CHOIR_ROLE_ROPE_LONG] = {"rope_factors_long.weight"},
    [CHOIR_ROLE_ROPE_SHORT] = {"rope_factors_short.weight"},
    [CHOIR_ROLE_ATTN_NORM] = {"blk.%l.attn_norm.weight"},
    [CHOIR_ROLE_ATTN_NORM_BIAS] = {"blk.%l.attn_norm.bias"},
    [CHOIR_ROLE_ATTN_Q] = {"blk.%l.attn_q.weight"},
    [CHOIR_ROLE_ATTN_Q_A] = {"blk.%l.attn_q_a.weight"},
    [CHOIR_ROLE_ATTN_Q_A_NORM] = {"blk.%l.attn_q_a_norm.weight"},
    [CHOIR_ROLE_ATTN_Q_B] = {"blk.%l.attn_q_b.weight"},
    [CHOIR_ROLE_ATTN_K] = {"blk.%l.attn_k.weight"},
    [CHOIR_ROLE_ATTN_V] = {"blk.%l.attn_v.weight"},
    [CHOIR_ROLE_ATTN_KV_A] = {"blk.%l.attn_kv_a_mqa.weight"},
    [CHOIR_ROLE_ATTN_KV_A_NORM] = {"blk.%l.attn_kv_a_norm.weight"},
    [CHOIR_ROLE_ATTN_K_B] = {"blk.%l.attn_k_b.weight"},
    [CHOIR_ROLE_ATTN_V_B] = {"blk.%l.attn_v_b.weight"},
    [CHOIR_ROLE_ATTN_OUT] = {"blk.%l.attn_output.weight"},
    [CHOIR_ROLE_ATTN_Q_BIAS] = {"blk.%l.attn_q.bias"},
    [CHOIR_ROLE_ATTN_K_BIAS] = {"blk.%l.attn_k.bias"},
    [CHOIR_ROLE_ATTN_V_BIAS] = {"blk.%l.attn_v.bias"},
    [CHOIR_ROLE_ATTN_OUT_BIAS] = {"blk.%l.attn_output.bias"},
    [CHOIR_ROLE_ATTN_Q_NORM] = {"blk.%l.attn_q_norm.weight"},
    [CHOIR_ROLE_ATTN_K_NORM] = {"blk.%l.attn_k_norm.weight"},
    [CHOIR_ROLE_FFN_NORM] = {"blk.%l.ffn_norm.weight"},
    [CHOIR_ROLE_FFN_NORM_BIAS] = {"blk.%l.ffn_norm.bias"},
    [CHOIR_ROLE_FFN_GATE] = {"blk.%l.ffn_gate.weight"},
    [CHOIR_ROLE_FFN_UP] = {"blk.%l.ffn_up.weight"},
    [CHOIR_ROLE_FFN_DOWN] = {"blk.%l.ffn_down.weight"},
    [CHOIR_ROLE_FFN_GATE_BIAS] = {"blk.%l.ffn_gate.bias"},
    [CHOIR_ROLE_FFN_UP_BIAS] = {"blk.%l.ffn_up.bias"},
    [CHOIR_ROLE_FFN_DOWN_BIAS] = {"blk.%l.ffn_down.bias"},
    [CHOIR_ROLE_ROUTER] = {"blk.%l.ffn_gate_inp.weight"},
    [CHOIR_ROLE_ROUTER_BIAS] = {"blk.%l.ffn_gate_inp.bias"},
    [CHOIR_ROLE_ROUTER_CORRECTION] = {"blk.%l.exp_probs_b.bias"},
    [CHOIR_ROLE_EXPERT_GATE] = {"blk.%l.ffn_gate_exps.weight"},
    [CHOIR_ROLE_EXPERT_UP] = {"blk.%l.ffn_up_exps.weight"},
    [CHOIR_ROLE_EXPERT_DOWN] = {"blk.%l.ffn_down_exps.weight"},
    [CHOIR_ROLE_EXPERT_GATE_BIAS] = {"blk.%l.ffn_gate_exps.bias"},
    [CHOIR_ROLE_EXPERT_UP_BIAS] = {"blk.%l.ffn_up_exps.bias"},
    [CHOIR_ROLE_EXPERT_DOWN_BIAS] = {"blk.%l.ffn_down_exps.bias"},
    [CHOIR_ROLE_SHARED_GATE] = {"blk.%l.ffn_gate_shexp.weight"},
    [CHOIR_ROLE_SHARED_UP] = {"blk.%l.ffn_up_shexp.weight"},
    [CHOIR_ROLE_SHARED_DOWN] = {"blk.%l.ffn_down_shexp.weight"},
    [CHOIR_ROLE_SHARED_GATE_BIAS] = {"blk.%l.ffn_gate_shexp.bias"},
    [CHOIR_ROLE_SHARED_UP_BIAS] = {"blk.%l.ffn_up_shexp.bias"},
    [CHOIR_ROLE_SHARED_DOWN_BIAS] = {"blk.%l.ffn_down_shexp.bias"},
    [CHOIR_ROLE_SHARED_ROUTER] = {"blk.%l.ffn_gate_inp_shexp.weight"},
};

/* Where tensors are that somebody has joined: transformers' own form of experts; llama.cpp's converter with
 * --fuse-qkv. */
static const choir_places joined_hf = {
    [CHOIR_ROLE_EXPERT_GATE] = {LAYER "mlp.experts.gate_up_proj", CHOIR_PART_FIRST_HALF},
    [CHOIR_ROLE_EXPERT_UP] = {LAYER "mlp.experts.gate_up_proj", CHOIR_PART_SECOND_HALF},
    [CHOIR_ROLE_EXPERT_DOWN] = {LAYER "mlp.experts.down_proj"},
};

static const choir_places joined_gguf = {
    [CHOIR_ROLE_ATTN_Q] = {"blk.%l.attn_qkv.weight", CHOIR_PART_Q},
    [CHOIR_ROLE_ATTN_K] = {"blk.%l.attn_qkv.weight", CHOIR_PART_K},
    [CHOIR_ROLE_ATTN_V] = {"blk.%l.attn_qkv.weight", CHOIR_PART_V},
    [CHOIR_ROLE_ATTN_Q_BIAS] = {"blk.%l.attn_qkv.bias", CHOIR_PART_Q},
    [CHOIR_ROLE_ATTN_K_BIAS] = {"blk.%l.attn_qkv.bias", CHOIR_PART_K},
    [CHOIR_ROLE_ATTN_V_BIAS] = {"blk.%l.attn_qkv.bias", CHOIR_PART_V},
};

const choir_place *choir_family_place(const choir_family *f, choir_role role, bool gguf, uint32_t i)
{
    const choir_place *own = gguf ? f->gguf : f->hf, *other = gguf ? f->gguf_other : f->hf_other;
    const choir_place *common = gguf ? common_gguf : common_hf;
    const choir_place *first = own != NULL && own[role].name != NULL ? &own[role] : &common[role];
    const choir_place *second = other != NULL && other[role].name != NULL ? &other[role] : NULL;
    const choir_place *third = gguf ? &joined_gguf[role] : &joined_hf[role];
    const choir_place *place = i == 0 ? first : i == 1 ? second : third;
    return place != NULL && place->name != NULL ? place : NULL;
}
