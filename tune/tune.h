/* WHAT    Model surgery. Upcycling: a dense model and LoRA adapters on its MLP become a mixture of experts
 *         (Komatsuzaki et al. 2023): expert 0 is the base's MLP, expert i the MLP with adapter i merged.
 * OWNS    Nothing between calls; the output appears whole or not at all.
 * THREADS One caller; it starts its own workers.
 * ERRORS  CHOIR_E_INVALID (an option; an adapter that does not fit, with the tensor's name),
 *         CHOIR_E_UNIMPLEMENTED (DoRA, a family whose MLP has no Mixtral form), CHOIR_E_EXISTS (the output
 *         folder is there), CHOIR_E_IO (with what is needed and what is free), CHOIR_E_DATA_LOSS (NaN).
 * LIMITS  64 experts, 64 adapters that are merged. Memory: the adapters as f32, and a few MiB; weights are streamed.
 * NEXT    tune/upcycle.c, tune/pack_out.c, tune/merge.c */
#pragma once
#include "engine/engine.h"

#include <signal.h>

/* Where gates start from. HIDDEN: with mu_e the mean FFN input over sample text e, c the mean of all
 * mu_e: gate row e is (mu_e - c) made orthogonal to c, of length `temperature`. UNIFORM: zeros. */
typedef enum choir_gate_init { CHOIR_GATES_HIDDEN, CHOIR_GATES_UNIFORM } choir_gate_init;

enum { CHOIR_MAX_UPCYCLE_ADAPTERS = 63 };

typedef struct choir_upcycle_expert {
    const char *name;        /* letters, digits, '.', '_' and '-'; at most 64 */
    const char *adapter;     /* a PEFT folder: adapter_config.json, adapter_model.safetensors */
    const char *sample_text; /* a file of its domain's text; NULL with CHOIR_GATES_UNIFORM */
} choir_upcycle_expert;

typedef struct choir_upcycle_options {
    const char *base; /* a dense Llama-like model: .gguf or a Hugging Face folder */
    const char *out;  /* NAME.gguf, or a folder to be made (safetensors, Mixtral's config.json) */
    const choir_upcycle_expert *experts;
    uint32_t n_experts;           /* 1 … 63; the base comes on top */
    const char *base_sample_text; /* text that stands for the base; NULL with CHOIR_GATES_UNIFORM */
    choir_gate_init gates;
    float temperature;
    uint32_t top_k;       /* experts per token */
    choir_dtype dtype;    /* GGUF: Q8_0, Q4_1, F16, BF16; folder: BF16, F16, F32; CHOIR_N_DTYPES: Q8_0 or BF16 */
    uint64_t shard_bytes; /* a folder's files are at most so large */
    uint32_t n_threads;   /* 0: one per core */
    bool show_progress;
} choir_upcycle_options;
#define CHOIR_UPCYCLE_OPTIONS_DEFAULT                                                              \
    ((choir_upcycle_options){.temperature = 4,                                                     \
                             .top_k = 2,                                                           \
                             .dtype = CHOIR_N_DTYPES,                                              \
                             .shard_bytes = UINT64_C(5000000000)})

/* `choir pack`: any model into a `.choir` file, streamed, whole or not there; an unfinished file of the same
 * model and options is gone on with. */
typedef struct choir_pack_options {
    const char *model; /* .gguf or a Hugging Face folder */
    const char *out;   /* NAME.choir */
    choir_dtype quant; /* of all matrices but gates: Q4_0, Q8_0, BF16; CHOIR_N_DTYPES: as they are */
    choir_dtype small; /* of a second copy of every expert: Q2, Q3, Q4_0; CHOIR_N_DTYPES: there is none */
    const char *usage; /* NULL, or with `small`: what `choir logits --routes` wrote, from which the file
                        * learns how often each expert is used */
    uint32_t n_threads;
    bool show_progress;
    const volatile sig_atomic_t *interrupted; /* NULL, or stops at its next unit, to be gone on with */
} choir_pack_options;
#define CHOIR_PACK_OPTIONS_DEFAULT                                                                 \
    ((choir_pack_options){.quant = CHOIR_N_DTYPES, .small = CHOIR_N_DTYPES})
choir_status choir_pack_write(const choir_pack_options *options) CHOIR_MUST_USE;

/* A GGUF output replaces a file of that name; a folder must not be there. */
choir_status choir_upcycle(const choir_upcycle_options *options) CHOIR_MUST_USE;

/* X(name, text, where it prunes first, whether signs are elected, whether it works on B A and
 * decomposes the result instead of working on A and on B). The words and the arithmetic are those
 * of PEFT's add_weighted_adapter(). */
#define CHOIR_MERGE_METHODS(X)                                                                     \
    X(LINEAR, "linear", NOTHING, false, false)                                                     \
    X(CAT, "cat", NOTHING, false, false)                                                           \
    X(SVD, "svd", NOTHING, false, true)                                                            \
    X(TIES, "ties", SMALL, true, false)                                                            \
    X(TIES_SVD, "ties_svd", SMALL, true, true)                                                     \
    X(DARE_LINEAR, "dare_linear", RANDOM, false, false)                                            \
    X(DARE_LINEAR_SVD, "dare_linear_svd", RANDOM, false, true)                                     \
    X(DARE_TIES, "dare_ties", RANDOM, true, false)                                                 \
    X(DARE_TIES_SVD, "dare_ties_svd", RANDOM, true, true)                                          \
    X(MAGNITUDE_PRUNE, "magnitude_prune", SMALL, false, false)                                     \
    X(MAGNITUDE_PRUNE_SVD, "magnitude_prune_svd", SMALL, false, true)
typedef enum choir_merge_method {
#define X(name, text, prunes, elects, svd) CHOIR_MERGE_##name,
    CHOIR_MERGE_METHODS(X)
#undef X
    CHOIR_N_MERGE_METHODS
} choir_merge_method;
typedef enum choir_merge_pruning {
    CHOIR_MERGE_PRUNES_NOTHING,
    CHOIR_MERGE_PRUNES_SMALL,  /* the smallest go, `density` of the numbers stay */
    CHOIR_MERGE_PRUNES_RANDOM, /* each stays with the probability `density`, divided by it */
} choir_merge_pruning;
typedef struct choir_merge_method_info {
    const char *text;
    choir_merge_pruning pruning;
    bool elects, svd;
} choir_merge_method_info;
const choir_merge_method_info *choir_merge_method_of(choir_merge_method method);

typedef struct choir_merge_adapter {
    const char *folder; /* PEFT's LoRA or rsLoRA: adapter_config.json, adapter_model.safetensors */
    double weight;      /* of what it adds to the base; of either sign */
} choir_merge_adapter;

enum { CHOIR_MAX_MERGE = 64 };
#define CHOIR_MERGE_MAX_WEIGHT 8.0

/* `choir merge`: adapters of one base become one, as PEFT writes them, whole or not there. */
typedef struct choir_merge_options {
    const char *base; /* the model that all of them are for; only its shapes are read */
    const char *out;  /* a folder to be made */
    const choir_merge_adapter *adapters;
    uint32_t n_adapters; /* 1 … CHOIR_MAX_MERGE */
    choir_merge_method method;
    double density;     /* over 0, up to 1: methods that prune */
    bool by_frequency;  /* signs are elected by how many are for them, not by their sum */
    uint32_t rank;      /* of what is decomposed; 0: the largest of the adapters' */
    uint64_t seed;      /* of random pruning */
    choir_dtype dtype;  /* F32, BF16, F16 */
    uint32_t n_threads; /* 0: one per core; the result does not depend on it */
    bool show_progress;
    const volatile sig_atomic_t *interrupted; /* NULL, or stops soon, leaving nothing */
} choir_merge_options;
#define CHOIR_MERGE_OPTIONS_DEFAULT                                                                \
    ((choir_merge_options){.method = CHOIR_MERGE_SVD, .density = 1, .dtype = CHOIR_F32})
typedef struct choir_merge_result {
    uint32_t rank;
    uint64_t n_modules, bytes;
} choir_merge_result;
choir_status choir_merge(const choir_merge_options *options,
                         choir_merge_result *out) CHOIR_MUST_USE;
