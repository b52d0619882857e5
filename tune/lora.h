/* A PEFT LoRA adapter on the MLP's three matrices: W + (alpha / r) B A (Hu et al. 2021); internal to
 * tune/. Tensors are views into the adapter's file until close. */
#pragma once
#include "engine/engine.h"

typedef enum mlp_part { MLP_GATE, MLP_UP, MLP_DOWN, MLP_PARTS } mlp_part;

typedef struct lora_pair {
    bool present;
    uint32_t rank;
    float *a, *b; /* [rank, cols], [rows, rank] */
} lora_pair;

typedef struct lora {
    uint32_t n_layers;
    float scale; /* alpha / r, or alpha / sqrt(r) for rsLoRA */
    lora_pair *pairs; /* [n_layers, MLP_PARTS] */
} lora;

choir_status lora_open(const char *folder, const choir_model_config *base, lora *out) CHOIR_MUST_USE;
void lora_close(lora *l);
/* row += scale * B[row] A */
void lora_add_row(const lora *l, uint32_t layer, mlp_part part, uint32_t row_index, uint32_t cols,
                  float *row);
