/* WHAT    How often each expert is used, counted over the routes that `choir logits --routes` wrote.
 * OWNS    Nothing.
 * THREADS One.
 * ERRORS  CHOIR_E_FORMAT names the file, the line and what is wrong with it; CHOIR_E_IO, CHOIR_E_NO_MEMORY.
 * LIMITS  The file is anybody's: read line by line, each checked against the model. A line has at most 64 KiB.
 * NEXT    tune/pack_out.c */
#pragma once
#include "engine/model_file.h"

/* usage: [n_layers, n_experts], the share of a layer's tokens that an expert took, 0 … 1; 0 in dense layers.
 * Every layer with experts must have been seen. */
choir_status choir_usage_read(const char *path, const choir_model_config *config, float *usage)
    CHOIR_MUST_USE;
