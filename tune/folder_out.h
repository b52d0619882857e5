/* WHAT    The mixture as a Hugging Face folder: safetensors (an index if there are several),
 *         config.json of Mixtral, tokenizer, chat template, a README with the parts' licences.
 * OWNS    Nothing.
 * THREADS One.
 * ERRORS  CHOIR_E_UNIMPLEMENTED (a GGUF tokenizer that tokenizer.json cannot say, rope by
 *         factors), CHOIR_E_IO. Nothing is left on failure.
 * LIMITS  Written beside its final name and renamed when whole.
 * NEXT    tune/hf_files.h, tune/weights.h */
#pragma once
#include "tune/weights.h"

typedef struct choir_tune_folder {
    const char *path;
    choir_dtype dtype;
    uint64_t shard_bytes;
    uint32_t n_threads;
    bool show_progress;
} choir_tune_folder;

choir_status choir_tune_write_folder(const choir_tune_moe *moe,
                                     const choir_tune_folder *folder) CHOIR_MUST_USE;
