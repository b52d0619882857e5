/* WHAT    A model as it lies on disk, Hugging Face folder, GGUF v3 or pack, behind one face: its configuration,
 *         its tensors by role, where its tokenizer and chat template are.
 * OWNS    The maps of its files; every choir_tensor it gives is a view that ends with close.
 * THREADS Open in one thread; after that read-only, any thread.
 * ERRORS  CHOIR_E_NOT_FOUND, CHOIR_E_FORMAT (names file, field, value, offset), CHOIR_E_UNIMPLEMENTED
 *         (a family or type that Choir lacks; lists the nearest).
 * LIMITS  Every size, offset and count is checked before use; memory is bounded by the file's size.
 * NEXT    engine/families/families.h for what a family is; engine/load.c, which packs the weights. */
#pragma once
#include "engine/kernels/kernels.h"
#include "engine/properties.h"
#include <jansson.h>

/* X(role, where, rows, columns, when): the tensors a model may have.
 * where:   MODEL once; LAYER in every layer; DENSE, MOE in layers of that kind; EXPERT for every expert of an
 *          MoE layer; HEAD for every query head of every layer
 * shape:   names of engine/roles.c; a vector is one row
 * when:    ALWAYS; OPTIONAL (config->roles says); UNTIED; GQA, LATENT by the kind of attention, the latter
 *          with DIRECT_Q or LORA_Q */
// clang-format off
#define CHOIR_ROLE_LIST(X)                                                                         \
    X(EMBEDDING,         MODEL,  VOCAB,    HIDDEN,    ALWAYS)                                      \
    X(OUTPUT_NORM,       MODEL,  ONE,      HIDDEN,    ALWAYS)                                      \
    X(OUTPUT_NORM_BIAS,  MODEL,  ONE,      HIDDEN,    OPTIONAL)                                    \
    X(HEAD,              MODEL,  VOCAB,    HIDDEN,    UNTIED)                                      \
    X(HEAD_BIAS,         MODEL,  ONE,      VOCAB,     OPTIONAL)                                    \
    X(ROPE_FACTORS,      MODEL,  ONE,      ROTARY,    OPTIONAL)                                    \
    X(ROPE_LONG,         MODEL,  ONE,      ROTARY,    OPTIONAL)                                    \
    X(ROPE_SHORT,        MODEL,  ONE,      ROTARY,    OPTIONAL)                                    \
    X(ATTN_NORM,         LAYER,  ONE,      HIDDEN,    ALWAYS)                                      \
    X(ATTN_NORM_BIAS,    LAYER,  ONE,      HIDDEN,    OPTIONAL)                                    \
    X(ATTN_Q,            LAYER,  QUERIES,  HIDDEN,    DIRECT_Q)                                    \
    X(ATTN_Q_A,          LAYER,  Q_LORA,   HIDDEN,    LORA_Q)                                      \
    X(ATTN_Q_A_NORM,     LAYER,  ONE,      Q_LORA,    LORA_Q)                                      \
    X(ATTN_Q_B,          LAYER,  QUERIES,  Q_LORA,    LORA_Q)                                      \
    X(ATTN_K,            LAYER,  KEYS,     HIDDEN,    GQA)                                         \
    X(ATTN_V,            LAYER,  KEYS,     HIDDEN,    GQA)                                         \
    X(ATTN_KV_A,         LAYER,  LATENT,   HIDDEN,    LATENT)                                      \
    X(ATTN_KV_A_NORM,    LAYER,  ONE,      KV_LORA,   LATENT)                                      \
    X(ATTN_K_B,          HEAD,   KV_LORA,  NOPE,      LATENT)                                      \
    X(ATTN_V_B,          HEAD,   VALUE,    KV_LORA,   LATENT)                                      \
    X(ATTN_OUT,          LAYER,  HIDDEN,   ATTENDED,  ALWAYS)                                      \
    X(ATTN_Q_BIAS,       LAYER,  ONE,      QUERIES,   OPTIONAL)                                    \
    X(ATTN_K_BIAS,       LAYER,  ONE,      KEYS,      OPTIONAL)                                    \
    X(ATTN_V_BIAS,       LAYER,  ONE,      KEYS,      OPTIONAL)                                    \
    X(ATTN_OUT_BIAS,     LAYER,  ONE,      HIDDEN,    OPTIONAL)                                    \
    X(ATTN_Q_NORM,       LAYER,  ONE,      Q_NORM,    OPTIONAL)                                    \
    X(ATTN_K_NORM,       LAYER,  ONE,      K_NORM,    OPTIONAL)                                    \
    X(ATTN_SINKS,        LAYER,  ONE,      HEADS,     OPTIONAL)                                    \
    X(ATTN_POST_NORM,    LAYER,  ONE,      HIDDEN,    OPTIONAL)                                    \
    X(FFN_NORM,          LAYER,  ONE,      HIDDEN,    ALWAYS)                                      \
    X(FFN_NORM_BIAS,     LAYER,  ONE,      HIDDEN,    OPTIONAL)                                    \
    X(FFN_POST_NORM,     LAYER,  ONE,      HIDDEN,    OPTIONAL)                                    \
    X(FFN_GATE,          DENSE,  FFN,      HIDDEN,    ALWAYS)                                      \
    X(FFN_UP,            DENSE,  FFN,      HIDDEN,    ALWAYS)                                      \
    X(FFN_DOWN,          DENSE,  HIDDEN,   FFN,       ALWAYS)                                      \
    X(FFN_GATE_BIAS,     DENSE,  ONE,      FFN,       OPTIONAL)                                    \
    X(FFN_UP_BIAS,       DENSE,  ONE,      FFN,       OPTIONAL)                                    \
    X(FFN_DOWN_BIAS,     DENSE,  ONE,      HIDDEN,    OPTIONAL)                                    \
    X(ROUTER,            MOE,    EXPERTS,  HIDDEN,    ALWAYS)                                      \
    X(ROUTER_BIAS,       MOE,    ONE,      EXPERTS,   OPTIONAL)                                    \
    X(ROUTER_CORRECTION, MOE,    ONE,      EXPERTS,   OPTIONAL)                                    \
    X(EXPERT_GATE,       EXPERT, EXPERT,   HIDDEN,    ALWAYS)                                      \
    X(EXPERT_UP,         EXPERT, EXPERT,   HIDDEN,    ALWAYS)                                      \
    X(EXPERT_DOWN,       EXPERT, HIDDEN,   EXPERT,    ALWAYS)                                      \
    X(EXPERT_GATE_BIAS,  EXPERT, ONE,      EXPERT,    OPTIONAL)                                    \
    X(EXPERT_UP_BIAS,    EXPERT, ONE,      EXPERT,    OPTIONAL)                                    \
    X(EXPERT_DOWN_BIAS,  EXPERT, ONE,      HIDDEN,    OPTIONAL)                                    \
    X(SHARED_GATE,       MOE,    SHARED,   HIDDEN,    OPTIONAL)                                    \
    X(SHARED_UP,         MOE,    SHARED,   HIDDEN,    OPTIONAL)                                    \
    X(SHARED_DOWN,       MOE,    HIDDEN,   SHARED,    OPTIONAL)                                    \
    X(SHARED_GATE_BIAS,  MOE,    ONE,      SHARED,    OPTIONAL)                                    \
    X(SHARED_UP_BIAS,    MOE,    ONE,      SHARED,    OPTIONAL)                                    \
    X(SHARED_DOWN_BIAS,  MOE,    ONE,      HIDDEN,    OPTIONAL)                                    \
    X(SHARED_ROUTER,     MOE,    ONE,      HIDDEN,    OPTIONAL)
// clang-format on

typedef enum choir_role {
#define X(role, where, rows, cols, when) CHOIR_ROLE_##role,
    CHOIR_ROLE_LIST(X)
#undef X
    CHOIR_N_ROLES
} choir_role;
#define CHOIR_ROLE_BIT(role) (UINT64_C(1) << CHOIR_ROLE_##role)
_Static_assert(CHOIR_N_ROLES <= 64, "roles are bits of 64");

/* What a model of this configuration has (engine/roles.c). */
void choir_role_shape(const choir_model_config *config, choir_role role, uint64_t *rows, uint64_t *cols);
/* Whether the layer has the role's tensors; MODEL roles: layer is ignored. */
bool choir_role_in_layer(const choir_model_config *config, choir_role role, uint32_t layer);
bool choir_role_per_layer(choir_role role);
bool choir_role_optional(choir_role role);
bool choir_role_is_vector(choir_role role);
/* 1, or the number of experts or heads that have each their own. */
uint32_t choir_role_count(const choir_model_config *config, choir_role role);
bool choir_role_is_routed(choir_role role); /* a matrix of routed experts */
bool choir_role_is_f32(choir_role role);    /* vectors, and gates, which decide by small margins */
extern const choir_role choir_expert_roles[3]; /* gate, up, down */
const char *choir_role_text(choir_role role); /* "ATTN_Q" */

/* Every tensor of a configuration, by role, layer and index: start from zeros; false: there is no further. */
typedef struct choir_role_place {
    choir_role role;
    uint32_t layer, index;
    bool begun;
} choir_role_place;
bool choir_next_tensor(const choir_model_config *config, choir_role_place *at);

/* A matrix or vector as it lies in a file, perhaps as a part of a larger tensor: every other row of it, one
 * head's, or its transpose. A view, like choir_tensor. */
typedef struct choir_slice {
    choir_dtype dtype; /* of what choir_slice_copy writes */
    uint32_t rows, cols;
    const uint8_t *data;
    size_t row_stride;     /* bytes */
    size_t col_stride;     /* bytes; 0: a row's elements (or blocks) follow each other */
    const uint8_t *scales; /* MXFP4 in two tensors: data has 16 bytes a block, this one exponent */
    size_t scales_stride;  /* bytes of a row's exponents */
    choir_dtype source;    /* what lies there: dtype, or quantised rows to be transposed as F32 */
} choir_slice;

size_t choir_slice_bytes(const choir_slice *slice); /* of rows x cols in dtype */
/* Bytes from `data` to the end of the last element, what lies between included; scales apart. */
size_t choir_slice_span(const choir_slice *slice);
/* True when it lies as a tensor does, and can be used where it is. */
bool choir_slice_is_tensor(const choir_slice *slice, choir_tensor *out);
/* Its pages may leave memory until they are read again. */
void choir_slice_forget(const choir_slice *slice);
/* Writes choir_slice_bytes() bytes, row after row. */
void choir_slice_copy(const choir_slice *slice, void *out);
/* As a tensor, where it lies or else as a copy, which choir_free(*copy) ends. False: no memory. */
bool choir_slice_tensor(const choir_slice *slice, choir_memory_tag tag, choir_tensor *out,
                        void **copy) CHOIR_MUST_USE;

typedef struct choir_model_file choir_model_file;
typedef struct choir_gguf choir_gguf; /* engine/gguf.h, for the tokenizer's metadata */
typedef struct choir_pack choir_pack; /* engine/pack_file.h */

choir_status choir_model_file_open(const char *path, choir_model_file **out) CHOIR_MUST_USE;
void choir_model_file_close(choir_model_file *file);

const choir_model_config *choir_model_file_config(const choir_model_file *file);
const char *choir_model_file_path(const choir_model_file *file);
/* NULL for a folder, and for a pack of one; of a pack of a GGUF file its header alone. */
const choir_gguf *choir_model_file_gguf(const choir_model_file *file);
/* NULL unless it is a pack: its matrices are no slices, but lie in the kernels' layout. */
const choir_pack *choir_model_file_pack(const choir_model_file *file);
const char *choir_model_file_kind(const choir_model_file *file);       /* "GGUF", "safetensors", "pack" */
uint64_t choir_model_file_bytes(const choir_model_file *file);         /* on disk, all shards */
uint64_t choir_model_file_n_parameters(const choir_model_file *file);
/* "Q4_1 (210), F32 (61)": types by count, for people. Valid until close. */
const char *choir_model_file_types(const choir_model_file *file);

/* A role's tensor, its shape checked against the configuration; `index` is an expert or a head, ignored where
 * the role has neither, like `layer`. CHOIR_E_NOT_FOUND names the tensor. */
choir_status choir_model_file_slice(const choir_model_file *file, choir_role role, uint32_t layer,
                                    uint32_t index, choir_slice *out) CHOIR_MUST_USE;
/* The same where it lies as a tensor does; CHOIR_E_UNIMPLEMENTED where it does not. */
choir_status choir_model_file_tensor(const choir_model_file *file, choir_role role, uint32_t layer,
                                     uint32_t index, choir_tensor *out) CHOIR_MUST_USE;

/* A role's tensor as f32, [rows, cols]: norms that lie less one, as those of Gemma's folders do, are whole. */
void choir_model_file_expand(const choir_model_file *file, choir_role role, const choir_tensor *tensor,
                             float *out);
/* Bytes of all matrices as planned, each filled up to a multiple of `align`: of what every token meets, and
 * of the routed experts. */
choir_status choir_model_file_weigh(const choir_model_file *file, size_t align, uint64_t *dense,
                                    uint64_t *experts) CHOIR_MUST_USE;

/* The files that the tensors lie in, and where in which a slice's bytes are; false: not in a file. */
uint32_t choir_model_file_n_parts(const choir_model_file *file);
const char *choir_model_file_part_path(const choir_model_file *file, uint32_t part);
bool choir_model_file_locate(const choir_model_file *file, const void *data, uint32_t *part,
                             uint64_t *offset);

/* A text of a folder, or of a pack of one, by name: "tokenizer.json". choir_free() it. */
bool choir_model_file_has_text(const choir_model_file *file, const char *name);
choir_status choir_model_file_text(const choir_model_file *file, const char *name, size_t max_bytes,
                                   char **out, size_t *bytes) CHOIR_MUST_USE;
/* A role's matrix as the kernels will have it (data NULL), vectors and gates as f32: its bytes in memory. */
choir_status choir_model_file_plan(const choir_model_file *file, choir_role role, uint32_t layer,
                                   uint32_t index, choir_matrix *out) CHOIR_MUST_USE;

/* The model's own Jinja chat template, or NULL; lent until close. */
const char *choir_model_file_chat_template(const choir_model_file *file);
