/* WHAT    What an adapter's file says, in the base model's terms: a list of changes to the base's
 *         matrices, each found by role, layer and expert; virtual tokens; where it begins to act.
 *         PEFT's LoRA, rsLoRA, DoRA, IA3, VeRA, prompt and prefix tuning, bottleneck adapters,
 *         modules_to_save; GGUF LoRA files of llama.cpp.
 * OWNS    choir_adapter_data: all that it points to.
 * THREADS Any; read-only once made.
 * ERRORS  CHOIR_E_NOT_FOUND, CHOIR_E_IO, CHOIR_E_FORMAT, CHOIR_E_INVALID (a tensor without a place
 *         in this base, a shape that does not fit, an absurd rank; names tensor, field, value),
 *         CHOIR_E_DATA_LOSS (NaN, infinity), CHOIR_E_UNIMPLEMENTED (a kind that Choir lacks;
 *         pickles, by name).
 * LIMITS  Every tensor has a place or the adapter is refused. Ranks up to CHOIR_ADAPTER_MAX_RANK.
 * NEXT    engine/adapter.h, which makes a step's adapter of it; tune/ for merging */
#pragma once
#include "engine/model_file.h"

enum {
    CHOIR_ADAPTER_MAX_RANK = 4096,
    CHOIR_ADAPTER_MAX_VIRTUAL = 4096,
    CHOIR_ADAPTER_MAX_INVOCATION = 256
};

/* What lies between A and B of a bottleneck. */
typedef enum choir_adapter_act {
    CHOIR_ADAPTER_LINEAR,
    CHOIR_ADAPTER_RELU,
    CHOIR_ADAPTER_GELU, /* its erf form */
    CHOIR_ADAPTER_GELU_TANH,
    CHOIR_ADAPTER_SILU,
    CHOIR_ADAPTER_TANH,
} choir_adapter_act;

/* The change of one matrix W [rows, cols] of the base. With y0 = W x (or weight x) before any bias:
 *
 *   n = 1, or with a magnitude m: m / |W + scale B A| by rows (Liu et al. 2024, DoRA, equation 5)
 *   z = in_scale · x (which W is given too); or y0 + the base's bias where `series`, the residual
 *       stream before its block's sum where `residual`, or both together
 *   y = out_scale · (n · y0 + n · scale (B f(A z + a_bias) + b_bias) + the bias)
 *
 * Arrays are f32; those that a change does not have are NULL. The rows are in the order of the base
 * as it is loaded: permuted where its rope is interleaved and the adapter's is not, cut where the
 * file fuses matrices. */
typedef struct choir_adapter_change {
    choir_role role;       /* of a matrix, or of a vector that `weight` replaces (a norm: rows 1) */
    uint32_t layer, index; /* index: the expert, 0 where the role has none */
    uint32_t rows, cols;
    uint32_t rank; /* 0: no A and B */
    float scale;
    choir_adapter_act act;
    bool series, residual;   /* residual: of a block's last matrix */
    const float *a, *a_bias; /* [rank, cols] ([rank, rows] where `series` or `residual`), [rank] */
    const float *b, *b_bias; /* [rows, rank], [rows] */
    /* In place of a or b where `data` is set: the same numbers where they lie in the source
     * (lends), F16 or BF16, plain LoRA alone. */
    choir_tensor a_lent, b_lent;
    const float *magnitude; /* [rows] */
    const float *out_scale; /* [rows] */
    const float
        *in_scale; /* [cols]: of all that W is given, as IA3 has it for feed-forward modules */
    const float *weight; /* [rows, cols], in W's place (modules_to_save) */
    const float *bias;   /* [rows], in the base's bias' place */
    uint32_t has; /* CHOIR_ADAPTER_HAS_ bits: the arrays, also where only headers were read */
} choir_adapter_change;
enum {
    CHOIR_ADAPTER_HAS_LOW_RANK = 1, /* a, b */
    CHOIR_ADAPTER_HAS_A_BIAS = 2,
    CHOIR_ADAPTER_HAS_B_BIAS = 4,
    CHOIR_ADAPTER_HAS_MAGNITUDE = 8,
    CHOIR_ADAPTER_HAS_OUT_SCALE = 16,
    CHOIR_ADAPTER_HAS_IN_SCALE = 32,
    CHOIR_ADAPTER_HAS_WEIGHT = 64,
    CHOIR_ADAPTER_HAS_BIAS = 128,
    /* `weight` is the file's copy of the base's own matrix: PEFT saves the embeddings beside LoRA
       on them */
    CHOIR_ADAPTER_HAS_COPY = 256,
};
/* W + scale B A, and nothing else. */
static inline bool choir_adapter_is_lora(const choir_adapter_change *c)
{
    return c->has == CHOIR_ADAPTER_HAS_LOW_RANK && c->act == CHOIR_ADAPTER_LINEAR && !c->series &&
           !c->residual;
}
/* The role EMBEDDING is looked up, not multiplied: its W x is W's row of the token, and A is [rank,
 * vocab], B [hidden, rank]; rows and cols are those of the role's shape, [vocab, hidden]: `b` has
 * `cols` rows there, and `magnitude` as many numbers, for the columns of W + scale (B A)^T. The
 * role HEAD may be there although the base's head is tied. A norm's `weight` is whole also where a
 * folder's has 1 less. */

typedef struct choir_adapter_data {
    char kind[24]; /* "LoRA", "DoRA", "IA3", "prompt tuning", for people */
    choir_adapter_change
        *changes; /* by (layer, role, index), each at most once; MODEL's have layer 0 */
    size_t n_changes;
    uint32_t max_rank;
    uint64_t n_parameters;
    /* XXH3 over the file's bytes and the settings: changes whenever what it computes does; 0 where
     * only headers were read */
    uint64_t digest;
    /* Virtual tokens at positions 0 .. n_virtual - 1 before the prompt: rows of the embedding
     * (prompt tuning; as the table has them, before the base's embedding_scale), or keys (not
     * rotated) and values (prefix tuning). */
    uint32_t n_virtual;
    const float *virtual_embeddings; /* NULL, or [n_virtual, hidden] */
    const float *virtual_keys,
        *virtual_values; /* NULL, or [n_layers, n_virtual, kv heads * head_dim] */
    /* aLoRA (Greenewald et al. 2025): it acts from the last occurrence of these tokens on; 0:
     * everywhere */
    uint32_t n_invocation, invocation[CHOIR_ADAPTER_MAX_INVOCATION];
    void *memory; /* owner's own */
} choir_adapter_data;

/* An adapter's bytes in memory, lent for the call. `name` is what sentences call it. */
typedef struct choir_adapter_source {
    const char *name;
    const char *config; /* adapter_config.json's text; NULL: `tensors` is a GGUF LoRA file */
    size_t config_bytes;
    const void *tensors; /* adapter_model.safetensors */
    size_t tensor_bytes;
    bool lends; /* `tensors` stays as long as the data do: numbers may stay there too */
} choir_adapter_source;

/* The files of PEFT's folder, mapped; the map and the configuration's text are the caller's. */
choir_status choir_adapter_open_files(const char *folder, choir_adapter_source *source,
                                      char **config, choir_map *map) CHOIR_MUST_USE;
/* `base`: of the model file that is served; its family and rope say how names and rows are meant.
 */
choir_status choir_adapter_data_parse(const choir_model_config *base,
                                      const choir_adapter_source *source,
                                      choir_adapter_data **out) CHOIR_MUST_USE;
/* The same of headers alone (tensor_bytes may end with the header): shapes and places are checked,
 * and `changes` have no arrays. What a registry asks before the bytes are wanted. */
choir_status choir_adapter_data_check(const choir_model_config *base,
                                      const choir_adapter_source *source, uint64_t file_bytes,
                                      choir_adapter_data **out) CHOIR_MUST_USE;
/* A PEFT folder, or a .gguf file, read whole. */
choir_status choir_adapter_data_open(const choir_model_config *base, const char *path,
                                     choir_adapter_data **out) CHOIR_MUST_USE;
void choir_adapter_data_free(choir_adapter_data *data);

/* Where the last occurrence of the invocation tokens begins; CHOIR_ADAPTER_NEVER: nowhere, and the
 * base answers alone, as in PEFT. */
#define CHOIR_ADAPTER_NEVER UINT32_MAX
uint32_t choir_adapter_begins(const uint32_t *invocation, uint32_t n_invocation,
                              const uint32_t *tokens, size_t n_tokens);
