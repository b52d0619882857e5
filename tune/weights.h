/* WHAT    The mixture's weights, made row by row from the base, the adapters and the gates; and
 *         the list of tensors of an output file, each with its place in the mixture.
 * OWNS    choir_tune_moe: the adapters and the gates. A plan: its list.
 * THREADS Rows: any number at once. write: one owner, which brings the workers.
 * ERRORS  CHOIR_E_DATA_LOSS (a weight is NaN, infinite or too large for the type), CHOIR_E_IO.
 * LIMITS  A few MiB of rows are held at a time.
 * NEXT    tune/gguf_out.h, tune/folder_out.h */
#pragma once
#include "base/base.h"
#include "tune/adapter.h"

enum { CHOIR_TUNE_MAX_NAME = 128 };

typedef struct choir_tune_moe {
    const choir_model_file *base;
    const choir_model_config *config; /* the base's */
    uint32_t n_experts, top_k;
    const char *const *names;           /* [n_experts], "base" first; lent */
    choir_tune_adapter *adapters;       /* [n_experts]; the base's is empty */
    const char *const *adapter_folders; /* [n_experts]; lent */
    float *gates;                       /* [n_layers, n_experts, hidden] */
} choir_tune_moe;

/* A tensor of the output: n_slices experts from first_expert on, each [rows, cols]. */
typedef struct choir_tune_tensor {
    char name[CHOIR_TUNE_MAX_NAME];
    choir_role role;
    uint32_t layer, first_expert, n_slices, rows, cols;
    choir_dtype dtype;
    bool vector;       /* [cols], not [1, cols] */
    bool as_it_lies;   /* the base's bytes, unchanged */
    bool split_halves; /* rows of q and k from pairs (2i, 2i + 1) to halves (i, i + d/2) */
    uint64_t bytes;
} choir_tune_tensor;

typedef struct choir_tune_plan {
    choir_tune_tensor *items;
    size_t n, capacity;
    uint64_t bytes; /* of all tensors */
} choir_tune_plan;

/* Every tensor of the mixture in reading order. Matrices get `dtype`, gates and vectors F32. GGUF:
 * llama.cpp's names, experts stacked, and the base's quantised matrices kept as they lie where
 * `dtype` is quantised too. Otherwise: transformers' names for Mixtral, an expert a tensor. */
choir_status choir_tune_plan_make(const choir_tune_moe *moe, choir_dtype dtype, bool gguf,
                                  choir_tune_plan *out) CHOIR_MUST_USE;
void choir_tune_plan_free(choir_tune_plan *plan);

/* Row `row` of expert `expert` as f32. */
choir_status choir_tune_row(const choir_tune_moe *moe, const choir_tune_tensor *tensor,
                            uint32_t expert, uint32_t row, float *out) CHOIR_MUST_USE;

/* Writes tensors and counts the bytes for the bar. */
typedef struct choir_tune_writer {
    const choir_tune_moe *moe;
    choir_workers *workers;
    uint8_t *bytes; /* WRITE_BYTES, or one row if that is longer */
    float *rows;    /* [n_workers, longest row] */
    uint32_t longest;
    choir_progress progress;
    uint64_t done;
} choir_tune_writer;
choir_status choir_tune_writer_create(const choir_tune_moe *moe, const choir_tune_plan *plan,
                                      uint32_t n_threads, choir_tune_writer *out) CHOIR_MUST_USE;
void choir_tune_writer_destroy(choir_tune_writer *writer);
choir_status choir_tune_write(choir_tune_writer *writer, const choir_tune_tensor *tensor,
                              choir_save *save) CHOIR_MUST_USE;

/* A sentence with both sizes when the folder of `path` has less than `bytes` free. */
choir_status choir_tune_check_space(const char *path, uint64_t bytes) CHOIR_MUST_USE;
