/* What the upcycling tests need on disk: a random LoRA adapter on the MLP as PEFT writes it, and a
 * dense model with an adapter merged, made here without choir's own merge: W + scale B A, in f32.
 */
#pragma once
#include "engine/kernels/kernels.h"

typedef struct lora_shape {
    uint32_t n_layers, hidden, ffn, rank;
    float scale, size; /* size: of the random factors; 0: B is zero, so the adapter does nothing */
} lora_shape;

enum { GATE_PROJ, UP_PROJ, DOWN_PROJ, N_PROJ };

/* A safetensors file in the making: F32 only. write_tensors() frees it. */
typedef struct tensors {
    char *header;
    size_t header_bytes;
    float *data;
    size_t n;
} tensors;
/* One row is a vector. */
void add_tensor(tensors *t, const char *name, uint64_t rows, uint64_t cols, const float *values);
void write_tensors(tensors *t, const char *folder, const char *name);

/* Makes `folder` with adapter_config.json and adapter_model.safetensors; the factors depend on the
 * seed. */
void write_adapter(const char *folder, const lora_shape *shape, uint32_t seed);
/* Makes `folder`, the model of `base` with that same adapter merged: an F32 file, its matrices
 * rounded to what `dtype` can hold. */
void write_merged(const char *base, const char *folder, const lora_shape *shape, uint32_t seed,
                  choir_dtype dtype);
void write_text(const char *folder, const char *name, const char *text);
void remove_folder(const char *folder);
uint32_t n_in_folder(const char *folder); /* files and folders, at any depth */
