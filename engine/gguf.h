/* WHAT    GGUF v3, parsed with every bound checked: metadata by key, tensors by name.
 * OWNS    The map of its file; strings and arrays are views into it until close.
 * THREADS Read-only after open.
 * ERRORS  CHOIR_E_FORMAT names the field, its value and its offset in the file.
 * LIMITS  Counts are bounded by the file's bytes before anything is allocated; array nesting 1.
 * NEXT    engine/model_file.h */
#pragma once
#include "engine/model_file.h"

/* A string of the file: not terminated, may hold any byte. */
typedef struct choir_text {
    const char *data;
    size_t bytes;
} choir_text;

choir_status choir_gguf_open(const char *path, choir_gguf **out) CHOIR_MUST_USE;
/* From memory, lent until close; for fuzzing. `name` is used in sentences. */
choir_status choir_gguf_parse(const char *name, const void *data, size_t bytes, choir_gguf **out)
    CHOIR_MUST_USE;
/* The same of a header alone: the tensors' bytes lie elsewhere, and their data is NULL. */
choir_status choir_gguf_parse_header(const char *name, const void *data, size_t bytes,
                                     choir_gguf **out) CHOIR_MUST_USE;
void choir_gguf_close(choir_gguf *gguf);

/* The whole file as it lies in memory, and its path. */
const void *choir_gguf_data(const choir_gguf *gguf, size_t *bytes);
const char *choir_gguf_path(const choir_gguf *gguf);

/* Typed look-ups: true when the key is there with that kind. Integers are widened; a bool is an integer. */
bool choir_gguf_integer(const choir_gguf *gguf, const char *key, int64_t *out);
bool choir_gguf_real(const choir_gguf *gguf, const char *key, double *out);
bool choir_gguf_string(const choir_gguf *gguf, const char *key, choir_text *out);

/* Entries in file order; raw: key, type and value as they lie, for copying into another file. */
uint64_t choir_gguf_n_entries(const choir_gguf *gguf);
void choir_gguf_entry_at(const choir_gguf *gguf, uint64_t i, choir_text *key, choir_text *raw);

typedef struct choir_gguf_array choir_gguf_array;
/* NULL when the key is absent or is no array. */
const choir_gguf_array *choir_gguf_find_array(const choir_gguf *gguf, const char *key);
uint64_t choir_gguf_array_count(const choir_gguf_array *array);
/* Element i; false when the array has another kind. String look-ups are O(1) in order, indexed at open. */
bool choir_gguf_array_string(const choir_gguf_array *array, uint64_t i, choir_text *out);
bool choir_gguf_array_integer(const choir_gguf_array *array, uint64_t i, int64_t *out);
bool choir_gguf_array_real(const choir_gguf_array *array, uint64_t i, double *out);

/* A tensor of the file; dims as stored (fastest first). */
typedef struct choir_gguf_tensor {
    choir_text name;
    choir_dtype dtype;
    uint32_t n_dims;
    uint64_t dims[4];
    const void *data;
    size_t bytes;
} choir_gguf_tensor;
uint64_t choir_gguf_n_tensors(const choir_gguf *gguf);
const choir_gguf_tensor *choir_gguf_tensor_at(const choir_gguf *gguf, uint64_t i);
const choir_gguf_tensor *choir_gguf_find_tensor(const choir_gguf *gguf, const char *name);
