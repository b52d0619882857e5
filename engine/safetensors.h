/* WHAT    Safetensors: one file's header, parsed with every bound checked; tensors by name.
 * OWNS    The map of its file; tensors are views into it until close.
 * THREADS Read-only after open.
 * ERRORS  CHOIR_E_FORMAT names the file, the tensor and the value.
 * LIMITS  Header up to 100 MB, at most 8 dimensions; F32, F16, BF16 (others are listed, not read).
 * NEXT    engine/model_file.h */
#pragma once
#include "engine/model_file.h"

typedef struct choir_safetensors choir_safetensors;

typedef struct choir_safetensor {
    const char *name;
    const char *type; /* as the file writes it: "BF16" */
    bool readable;    /* dtype is set */
    choir_dtype dtype;
    uint32_t n_dims;
    uint64_t dims[8]; /* slowest first */
    const void *data;
    size_t bytes;
} choir_safetensor;

choir_status choir_safetensors_open(const char *path, choir_safetensors **out) CHOIR_MUST_USE;
/* From memory, lent until close; for fuzzing. */
choir_status choir_safetensors_parse(const char *name, const void *data, size_t bytes,
                                     choir_safetensors **out) CHOIR_MUST_USE;
/* The same of a header alone, of a file of so many bytes: the tensors' bytes lie elsewhere, and their data is NULL. */
choir_status choir_safetensors_parse_header(const char *name, const void *data, size_t bytes,
                                            uint64_t file_bytes, choir_safetensors **out) CHOIR_MUST_USE;
void choir_safetensors_close(choir_safetensors *file);
const choir_safetensor *choir_safetensors_find(const choir_safetensors *file, const char *name);
size_t choir_safetensors_count(const choir_safetensors *file);
const choir_safetensor *choir_safetensors_at(const choir_safetensors *file, size_t i);
const void *choir_safetensors_data(const choir_safetensors *file); /* the whole file in memory */
const char *choir_safetensors_path(const choir_safetensors *file);
size_t choir_safetensors_bytes(const choir_safetensors *file);
