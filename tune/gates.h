/* WHAT    Gates that send a token to the expert whose sample text its hidden state resembles.
 * OWNS    Nothing.
 * THREADS One; it runs the engine.
 * ERRORS  CHOIR_E_INVALID (a sample text without tokens), CHOIR_E_DATA_LOSS (hidden states are
 *         NaN).
 * LIMITS  768 tokens a text, in windows of 256 with fresh KV; the engine in exact mode.
 * NEXT    tune/upcycle.c */
#pragma once
#include "tune/weights.h"

/* texts: [n_experts] files. gates: [n_layers, n_experts, hidden]. */
choir_status choir_tune_gates_from_texts(const char *base_path, const char *const *texts,
                                         uint32_t n_experts, float temperature, uint32_t n_threads,
                                         bool show_progress, float *gates) CHOIR_MUST_USE;

/* The formula alone, of one layer: means [n, hidden] (overwritten) -> gates [n, hidden]; `common`
 * [hidden] is filled with the mean of the means. */
void choir_tune_gates_of_means(double *means, uint32_t n, uint32_t hidden, float temperature,
                               double *common, float *gates);
