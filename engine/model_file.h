/* WHAT    A model as it lies on disk, Hugging Face folder or GGUF v3, behind one face: its configuration,
 *         its tensors by role, where its tokenizer and chat template are.
 * OWNS    The maps of its files; every choir_tensor it gives is a view that ends with close.
 * THREADS Open in one thread; after that read-only, any thread.
 * ERRORS  CHOIR_E_NOT_FOUND, CHOIR_E_FORMAT (names file, field, value, offset), CHOIR_E_UNIMPLEMENTED
 *         (a family or type that Choir lacks; lists the nearest).
 * LIMITS  Every size, offset and count is checked before use; memory is bounded by the file's size.
 * NEXT    engine/families/families.h for what a family is; engine/load.c, which packs the weights. */
#pragma once
#include "engine/kernels/kernels.h"
#include <jansson.h>

/* X(role, per layer?, per expert?) : the tensors a family may have. */
#define CHOIR_ROLE_LIST(X)                                                                         \
    X(EMBEDDING, 0, 0)                                                                             \
    X(OUTPUT_NORM, 0, 0)                                                                           \
    X(HEAD, 0, 0)                                                                                  \
    X(ROPE_FACTORS, 0, 0)                                                                          \
    X(ATTN_NORM, 1, 0)                                                                             \
    X(ATTN_Q, 1, 0)                                                                                \
    X(ATTN_K, 1, 0)                                                                                \
    X(ATTN_V, 1, 0)                                                                                \
    X(ATTN_OUT, 1, 0)                                                                              \
    X(ATTN_Q_BIAS, 1, 0)                                                                           \
    X(ATTN_K_BIAS, 1, 0)                                                                           \
    X(ATTN_V_BIAS, 1, 0)                                                                           \
    X(ATTN_Q_NORM, 1, 0)                                                                           \
    X(ATTN_K_NORM, 1, 0)                                                                           \
    X(FFN_NORM, 1, 0)                                                                              \
    X(FFN_GATE, 1, 0)                                                                              \
    X(FFN_UP, 1, 0)                                                                                \
    X(FFN_DOWN, 1, 0)                                                                              \
    X(ROUTER, 1, 0)                                                                                \
    X(EXPERT_GATE, 1, 1)                                                                           \
    X(EXPERT_UP, 1, 1)                                                                             \
    X(EXPERT_DOWN, 1, 1)

typedef enum choir_role {
#define X(role, layer, expert) CHOIR_ROLE_##role,
    CHOIR_ROLE_LIST(X)
#undef X
    CHOIR_N_ROLES
} choir_role;

typedef enum choir_rope_scaling {
    CHOIR_ROPE_NONE,
    CHOIR_ROPE_LINEAR, /* positions / factor */
    CHOIR_ROPE_LLAMA3, /* frequencies scaled by wavelength (Llama 3.1) */
} choir_rope_scaling;

typedef struct choir_rope_config {
    float theta;
    choir_rope_scaling scaling;
    float factor, low_freq_factor, high_freq_factor;
    uint32_t original_max_positions;
    uint32_t rotary_dims;
    bool interleaved; /* rows of q and k lie as (2i, 2i+1) pairs: GGUF files of the llama family */
} choir_rope_config;

struct choir_family;
/* What the token path needs to know; every number is checked (nonzero, divisible, bounded). */
typedef struct choir_model_config {
    const struct choir_family *family;
    char name[128];
    uint32_t n_layers, hidden, n_heads, n_kv_heads, head_dim;
    uint32_t ffn_hidden;    /* dense FFN width; 0 if every layer is MoE */
    uint32_t n_experts;     /* 0: dense */
    uint32_t n_experts_used;
    uint32_t expert_hidden; /* an expert's FFN width */
    uint32_t vocab, max_positions;
    uint32_t sliding_window; /* 0: none */
    float norm_eps;
    choir_rope_config rope;
    bool tied_head;
    bool normalise_topk; /* chosen experts' weights sum to one */
    int32_t bos_id, eos_ids[16], pad_id; /* -1: none */
    uint32_t n_eos;
    /* from generation_config.json or GGUF's general.sampling; negative or 0 (temperature: negative) = not given */
    float temperature, top_p;
    int32_t top_k;
    float repetition_penalty;
    char licence[64]; /* "" when the file does not say */
} choir_model_config;

const char *choir_model_config_family(const choir_model_config *config); /* "mixtral" */

typedef struct choir_model_file choir_model_file;
typedef struct choir_gguf choir_gguf; /* engine/gguf.h, for the tokenizer's metadata */

choir_status choir_model_file_open(const char *path, choir_model_file **out) CHOIR_MUST_USE;
void choir_model_file_close(choir_model_file *file);

const choir_model_config *choir_model_file_config(const choir_model_file *file);
const char *choir_model_file_path(const choir_model_file *file);
const choir_gguf *choir_model_file_gguf(const choir_model_file *file); /* NULL for a HF folder */
const char *choir_model_file_kind(const choir_model_file *file);       /* "GGUF", "safetensors" */
uint64_t choir_model_file_bytes(const choir_model_file *file);         /* on disk, all shards */
uint64_t choir_model_file_n_parameters(const choir_model_file *file);
/* "Q4_1 (210), F32 (61)": types by count, for people. Valid until close. */
const char *choir_model_file_types(const choir_model_file *file);

/* The tensor of a role, its shape checked against the configuration; layer and expert are ignored where
 * the role has none. Experts that lie stacked are sliced. CHOIR_E_NOT_FOUND names the tensor. */
choir_status choir_model_file_tensor(const choir_model_file *file, choir_role role, uint32_t layer,
                                     uint32_t expert, choir_tensor *out) CHOIR_MUST_USE;
bool choir_model_file_has(const choir_model_file *file, choir_role role, uint32_t layer);

/* The model's own Jinja chat template, or NULL; lent until close. */
const char *choir_model_file_chat_template(const choir_model_file *file);
