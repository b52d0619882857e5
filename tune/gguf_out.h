/* WHAT    The mixture as one GGUF v3 file that llama.cpp loads: architecture llama with experts,
 *         the way Mixtral is stored.
 * OWNS    Nothing.
 * THREADS One.
 * ERRORS  CHOIR_E_UNIMPLEMENTED (a base without GGUF metadata), CHOIR_E_IO. Nothing is left on
 *         failure.
 * LIMITS  The tokenizer is the base's, key by key.
 * NEXT    tune/weights.h */
#pragma once
#include "tune/weights.h"

choir_status choir_tune_write_gguf(const choir_tune_moe *moe, choir_dtype dtype, const char *path,
                                   uint32_t n_threads, bool show_progress) CHOIR_MUST_USE;
