/* WHAT    An adapter's file in memory, as tests want it: tensors by name with numbers that a test can
 *         tell, as safetensors or as a GGUF LoRA file.
 * OWNS    The image's bytes, until free.
 * THREADS One owner.
 * ERRORS  Lack of memory stops the process.
 * LIMITS  F32 alone; 64 tensors.
 * NEXT    engine/adapter_file.h, which reads it */
#pragma once
#include "engine/adapter_file.h"

enum { IMAGE_MAX_TENSORS = 64, IMAGE_MAX_NAME = 200 };

typedef struct image_tensor {
    char name[IMAGE_MAX_NAME];
    uint32_t n_dims;
    uint64_t dims[4]; /* slowest first */
    size_t n;
    float *values;
} image_tensor;

typedef struct adapter_image {
    image_tensor tensors[IMAGE_MAX_TENSORS];
    size_t n_tensors;
    uint8_t *bytes; /* after image_safetensors() or image_gguf() */
    size_t n_bytes, header_bytes;
} adapter_image;

/* Dimensions slowest first, those behind the last 0. Element i is image_value(number, i), where
 * number counts the tensors from 0. */
image_tensor *image_add(adapter_image *image, const char *name, uint64_t d0, uint64_t d1,
                        uint64_t d2);
float image_value(size_t number, size_t i);
void image_safetensors(adapter_image *image);
/* `alpha` 0: there is none. */
void image_gguf(adapter_image *image, const char *architecture, float alpha);
void image_free(adapter_image *image);
