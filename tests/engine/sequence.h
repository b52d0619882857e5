/* A sequence run by hand through choir_engine_step, for tests of the engine: pages are its own. */
#pragma once
#include "engine/engine.h"

typedef struct sequence {
    choir_engine *engine;
    uint32_t pages[64], n_pages;
    uint32_t position;
} sequence;

/* Opens with the i-th allocation failing, for all i: CHOIR_E_NO_MEMORY and a sentence, until it opens. */
void open_without_memory(const char *path, const choir_engine_options *options);

sequence sequence_at(choir_engine *engine, uint32_t first_page, uint32_t n_pages);
/* A span of the next n tokens that wants all logits; the caller runs it and then calls advance. */
choir_span sequence_span(sequence *s, const uint32_t *tokens, uint32_t n, float *logits);
void sequence_advance(sequence *s, const choir_span *span);
/* Runs tokens [0, n) in chunks of `chunk`, alone; logits: [n, vocab]. */
void sequence_run(sequence *s, const uint32_t *tokens, uint32_t n, uint32_t chunk, float *logits);
