/* Adapters made in memory, of random numbers: for tests that want many, or what no file says. */
#pragma once
#include "engine/engine.h"

/* What it changes. */
typedef enum random_adapter_kind {
    RANDOM_LORA,      /* every matrix, embedding and head included */
    RANDOM_ATTENTION, /* LoRA there alone */
    RANDOM_EXPERTS,   /* LoRA on routed experts and on the gate */
    RANDOM_DORA, /* every matrix but the embedding and routed experts, whose norms want all weights
                    in memory */
    RANDOM_IA3,  /* keys, values, the feed-forward's inputs */
    RANDOM_BOTTLENECK, /* beside some and behind others, with biases */
    RANDOM_SAVED,      /* LoRA, other norms, another matrix in place of one */
    N_RANDOM_KINDS
} random_adapter_kind;

typedef struct random_adapter random_adapter;
/* The same seed gives the same; ranks from 1 to 9. A kind that finds nothing to change has no
 * changes. */
random_adapter *random_adapter_make(const choir_model_config *base, random_adapter_kind kind,
                                    uint32_t seed);
const choir_adapter_data *random_adapter_data(const random_adapter *adapter);
void random_adapter_free(random_adapter *adapter);
