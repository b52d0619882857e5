/* Results of PyTorch for a tiny model: tests/fixtures/models/NAME/ref.bin (tests/oracle/make_references.py
 * says how it lies). */
#pragma once
#include <stdint.h>

typedef struct reference_prompt {
    uint32_t n_tokens, n_greedy;
    const uint32_t *ids, *experts, *greedy; /* experts: [n_layers, n_tokens, k] */
    const float *logits, *weights, *margins; /* logits: [n_tokens, vocab] */
} reference_prompt;

typedef struct reference {
    uint32_t vocab, n_layers, k, n_prompts;
    reference_prompt prompts[16];
    char *file;
} reference;

reference reference_open(const char *path); /* a broken file stops the test */
void reference_close(reference *r);
