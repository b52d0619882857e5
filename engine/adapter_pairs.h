/* WHAT    The pairs A, B of a PEFT LoRA adapter as its file has them, under the names of the file: what merging
 *         works on. engine/adapter_file.h says the same in the base's terms, and the same code reads both.
 * OWNS    choir_adapter_pairs: a map of the file, its configuration's text, and the list.
 * THREADS Any; read-only once open.
 * ERRORS  As engine/adapter_file.h; CHOIR_E_UNIMPLEMENTED for what is no plain LoRA or rsLoRA, with its name.
 * LIMITS  Numbers are as they lie: whether they are finite is seen by who reads them.
 * NEXT    tune/merge.c */
#pragma once
#include "engine/adapter_file.h"

/* A is [n_experts * rank, cols] and B [rows, rank * n_experts]: expert e has A's rows from e * rank on, and B's
 * columns e, e + n_experts, e + 2 n_experts … */
typedef struct choir_adapter_raw_pair {
    const char *name; /* A's without its ending: "base_model.model.model.layers.0.mlp.up_proj" */
    choir_role role;  /* of the base's matrix that it is of, or the first of those that the file fuses … */
    uint32_t layer, index;
    bool embedding;   /* the endings are .lora_embedding_A and _B, else .lora_A.weight and .lora_B.weight */
    bool stacked;     /* of all experts at once, of one of their parameters */
    bool swapped;     /* a stack of square matrices whose A has the outputs and B the inputs */
    uint32_t n_experts, rank, rows, cols;
    float scale;
    choir_tensor a, b;
} choir_adapter_raw_pair;

typedef struct choir_adapter_pairs {
    const char *folder;
    choir_adapter_raw_pair *items; /* by name */
    size_t n;
    uint32_t max_rank;
    const char *config; /* adapter_config.json's text */
    size_t config_bytes;
    void *memory; /* owner's own */
} choir_adapter_pairs;

choir_status choir_adapter_pairs_open(const choir_model_config *base, const char *folder,
                                      choir_adapter_pairs **out) CHOIR_MUST_USE;
void choir_adapter_pairs_close(choir_adapter_pairs *pairs);
/* NULL: it has none of that name. */
const choir_adapter_raw_pair *choir_adapter_pairs_find(const choir_adapter_pairs *pairs, const char *name);
/* "lora_A.weight" or what it is called for embeddings. */
const char *choir_adapter_pair_ending(bool embedding, bool b);
