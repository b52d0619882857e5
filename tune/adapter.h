/* WHAT    A LoRA adapter on the MLP of a dense model, read for merging: delta W = scale * B A
 *         (Hu et al. 2021).
 * OWNS    A and B as f32.
 * THREADS Read-only after open.
 * ERRORS  As engine/adapter_file.h; CHOIR_E_INVALID and CHOIR_E_UNIMPLEMENTED for what no expert can take over.
 * LIMITS  gate_proj, up_proj and down_proj only.
 * NEXT    tune/weights.h */
#pragma once
#include "engine/adapter_file.h"

enum { CHOIR_TUNE_GATE, CHOIR_TUNE_UP, CHOIR_TUNE_DOWN, CHOIR_TUNE_N_PARTS };

typedef struct choir_tune_lora {
    uint32_t rank; /* 0: this matrix has no adapter */
    float scale;
    const float *a; /* [rank, inputs] */
    const float *b; /* [outputs, rank] */
} choir_tune_lora;

typedef struct choir_tune_adapter {
    uint32_t n_layers;
    choir_adapter_data *data; /* what the loras point to */
    choir_tune_lora *loras;   /* [n_layers, CHOIR_TUNE_N_PARTS] */
} choir_tune_adapter;

choir_status choir_tune_adapter_open(const char *folder, const choir_model_config *base,
                                     choir_tune_adapter *out) CHOIR_MUST_USE;
void choir_tune_adapter_close(choir_tune_adapter *adapter);
/* row += scale * B[index] A */
void choir_tune_lora_add(const choir_tune_lora *lora, uint32_t index, uint32_t cols, float *row);
