/* WHAT    What a model family is, as data: how its files name things, and the properties that the token
 *         path branches on. A family is one file here and one line in families.c.
 * OWNS    Constant tables.
 * THREADS Any.
 * ERRORS  None; choir_family_* return NULL for what is unknown.
 * LIMITS  Code branches on a property, never on a family's name.
 * NEXT    engine/model_file.c, which reads files by these tables. */
#pragma once
#include "engine/model_file.h"
#include "router/router.h"

typedef enum choir_qk_norm {
    CHOIR_QK_NORM_NONE,
    CHOIR_QK_NORM_HEAD, /* RMSNorm of each head of q and k (Qwen 3) */
    CHOIR_QK_NORM_FULL, /* RMSNorm of the whole q and k rows (OLMoE) */
} choir_qk_norm;

/* Names of tensors by role; %l is the layer, %e the expert. NULL: the family has no such tensor. */
typedef struct choir_names {
    const char *role[CHOIR_N_ROLES];
} choir_names;

typedef struct choir_family {
    const char *name;
    const char *model_type;       /* config.json */
    const char *architecture;     /* general.architecture of GGUF */
    bool moe;
    choir_gate_kind gate;
    bool normalise_topk;          /* where the configuration does not say */
    bool attention_bias;          /* q, k and v have biases */
    choir_qk_norm qk_norm;
    bool gguf_interleaved_rope;   /* llama.cpp's converter permutes q and k */
    const char *hf_router, *hf_expert_gate, *hf_expert_up, *hf_expert_down;
} choir_family;

extern const choir_family choir_family_llama, choir_family_mistral, choir_family_qwen2,
    choir_family_qwen3, choir_family_mixtral, choir_family_qwen3_moe, choir_family_olmoe;

const choir_family *choir_family_of_model_type(const char *model_type);
/* `moe`: the file has experts (llama.cpp stores Mixtral as architecture "llama" with experts). */
const choir_family *choir_family_of_architecture(const char *architecture, bool moe);
/* Known names by closeness to `name`, for an error: "llama, mistral, …". */
const char *choir_family_nearest(const char *name, bool gguf, char *out, size_t bytes);
/* The pattern of a role in a Hugging Face folder or a GGUF file; NULL when the family has none. */
const char *choir_family_pattern(const choir_family *family, choir_role role, bool gguf);
