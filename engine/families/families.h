/* WHAT    What a model family is, as data: how its files name and place things, which keys of a
 *         configuration set which property, and the properties it always has. A family is one file here
 *         and one line in families.c (docs/adding-a-family.md).
 * OWNS    Constant tables.
 * THREADS Any.
 * ERRORS  None; choir_family_* return NULL for what is unknown.
 * LIMITS  Code branches on a property, never on a family's name.
 * NEXT    engine/model_file.c, which reads files by these tables. */
#pragma once
#include "engine/model_file.h"

/* Which part of a file's tensor a role is. Rows are outputs; of a vector, elements. */
typedef enum choir_part {
    CHOIR_PART_ALL,
    CHOIR_PART_FIRST_HALF,
    CHOIR_PART_SECOND_HALF,
    CHOIR_PART_EVEN,
    CHOIR_PART_ODD,
    CHOIR_PART_Q, /* of q, k and v one after the other */
    CHOIR_PART_K,
    CHOIR_PART_V,
    CHOIR_PART_HEAD_K, /* of kv_b_proj: head i's keys, transposed … */
    CHOIR_PART_HEAD_V, /* … and its values */
} choir_part;

/* Where a role's tensor is: a name with %l for the layer and %e for the expert (without %e, experts are
 * stacked), the part, and whether the file has it as [inputs, outputs]. NULL: nowhere. */
typedef struct choir_place {
    const char *name;
    choir_part part;
    bool transposed;
} choir_place;
typedef choir_place choir_places[CHOIR_N_ROLES];

typedef enum choir_key_kind { CHOIR_KEY_COUNT, CHOIR_KEY_REAL, CHOIR_KEY_FLAG, CHOIR_KEY_ROLES } choir_key_kind;

/* A key of config.json and of GGUF's metadata (behind "ARCHITECTURE."), and the property it sets; NULL: that
 * kind of file has none. ROLES: a flag that, when true, says that the model has these roles. */
typedef struct choir_key {
    const char *hf, *gguf;
    choir_key_kind kind;
    size_t offset; /* of the property in choir_model_config: uint32_t, float or bool */
    uint64_t roles;
    bool needed;
} choir_key;
#define CHOIR_KEY(hf, gguf, kind, field, needed)                                                   \
    {hf, gguf, kind, offsetof(choir_model_config, field), 0, needed}
#define CHOIR_COUNT(hf, gguf, field)  CHOIR_KEY(hf, gguf, CHOIR_KEY_COUNT, field, false)
#define CHOIR_NEEDED(hf, gguf, field) CHOIR_KEY(hf, gguf, CHOIR_KEY_COUNT, field, true)
#define CHOIR_REAL(hf, gguf, field)   CHOIR_KEY(hf, gguf, CHOIR_KEY_REAL, field, false)
#define CHOIR_FLAG(hf, gguf, field)   CHOIR_KEY(hf, gguf, CHOIR_KEY_FLAG, field, false)
#define CHOIR_HAS(hf, gguf, roles)    {hf, gguf, CHOIR_KEY_ROLES, 0, roles, false}
#define CHOIR_BIASES_QKV                                                                           \
    (CHOIR_ROLE_BIT(ATTN_Q_BIAS) | CHOIR_ROLE_BIT(ATTN_K_BIAS) | CHOIR_ROLE_BIT(ATTN_V_BIAS))

/* Which layers have the sliding window, where the configuration does not list them. */
typedef enum choir_window_layers {
    CHOIR_WINDOW_BY_FLAG, /* those from max_window_layers on, if use_sliding_window */
    CHOIR_WINDOW_ALL,
    CHOIR_WINDOW_PERIOD, /* all but every window_period-th */
} choir_window_layers;

typedef struct choir_family {
    const char *name;
    const char *model_types[3];   /* config.json */
    const char *architectures[3]; /* general.architecture of GGUF */
    bool moe;
    choir_model_config properties; /* what a model of this family starts from; 0 where a key must say */
    choir_window_layers windows;
    uint32_t window_period, rope_period; /* rope_period: every so-manieth layer has no rope */
    float rotary_part;            /* of a head, where the configuration does not say; 0: all */
    bool norms_less_one;          /* a Hugging Face folder's norm weights lack 1 (Gemma) */
    bool gguf_interleaved_rope;   /* llama.cpp's converter permutes q and k */
    bool scales_table;            /* transformers' table of embeddings scales what it gives, and no prompts */
    bool hides_transposed;        /* transformers' experts lie [inputs, outputs] and do not say so (is_transposed) */
    const choir_key *keys;        /* besides the common ones, ended by {0} */
    const choir_place *hf, *gguf; /* places besides the common ones, NULL or choir_places */
    const choir_place *hf_other, *gguf_other; /* … and where a role may be instead */
    void (*settle)(choir_model_config *config, bool gguf); /* what one key cannot say, or NULL */
} choir_family;

const choir_family *choir_family_of_model_type(const char *model_type);
/* `moe`: the file has experts (llama.cpp stores Mixtral as architecture "llama" with experts). */
const choir_family *choir_family_of_architecture(const char *architecture, bool moe);
/* Known names by closeness to `name`, for an error: "llama, mistral, …". */
const char *choir_family_nearest(const char *name, bool gguf, char *out, size_t bytes);
enum { CHOIR_MAX_PLACES = 3 };
/* The i-th place of a role in a Hugging Face folder or a GGUF file; NULL when there is no i-th. */
const choir_place *choir_family_place(const choir_family *family, choir_role role, bool gguf, uint32_t i);
