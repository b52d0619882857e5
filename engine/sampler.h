/* WHAT    From logits to the next token: penalties, bias, temperature, top-k, top-p, min-p, a seeded draw.
 * OWNS    One sampler per sequence: its parameters and the counts of the tokens seen.
 * THREADS One owner at a time (the engine step); different samplers run on different workers.
 * ERRORS  CHOIR_E_INVALID names the field, the value and the limit; CHOIR_E_DATA_LOSS for NaN or Inf logits.
 * LIMITS  Draws depend on (seed, position) only: a counter-based generator (Philox4x32-10, Salmon et al.
 *         2011), so that a seed means the same tokens in any batch.
 * NEXT    engine/engine.h */
#pragma once
#include "base/error.h"

typedef struct choir_logit_bias {
    uint32_t token;
    float bias; /* -100 .. 100, added to the logit */
} choir_logit_bias;

typedef struct choir_sampling {
    float temperature;        /* 0 = greedy; 0 .. 100 */
    uint32_t top_k;           /* 0 = all */
    float top_p;              /* (0, 1]; 1 = all */
    float min_p;              /* [0, 1]; 0 = off: drops p < min_p * p_max */
    float repetition_penalty; /* (0, 10]; 1 = off; prompt and output (Keskar et al. 2019) */
    float presence_penalty;   /* -2 .. 2; output only */
    float frequency_penalty;  /* -2 .. 2; output only, per occurrence */
    uint64_t seed;
    uint32_t index;           /* which of the request's n samples: part of the generator's key */
    uint32_t min_tokens;      /* stop ids cannot be drawn before this many outputs */
    uint32_t top_logprobs;    /* 0 .. 20 alternatives reported per token */
    const choir_logit_bias *logit_bias; /* copied by create */
    uint32_t n_logit_bias;              /* at most 1024 */
    const uint32_t *stop_ids;           /* masked until min_tokens; copied */
    uint32_t n_stop_ids;                /* at most CHOIR_MAX_END_IDS */
} choir_sampling;
#define CHOIR_SAMPLING_DEFAULT                                                                     \
    ((choir_sampling){.temperature = 1, .top_p = 1, .repetition_penalty = 1})
enum {
    CHOIR_MAX_TOP_LOGPROBS = 20,
    CHOIR_MAX_LOGIT_BIAS = 1024,
    CHOIR_MAX_STOP_IDS = 64,                     /* of a request */
    CHOIR_MAX_END_IDS = CHOIR_MAX_STOP_IDS + 16, /* and the model's EOS ids */
};

typedef struct choir_sample {
    uint32_t token;
    float logprob; /* of the model's own distribution: log-softmax of the raw logits */
    uint32_t n_top;
    uint32_t top_tokens[CHOIR_MAX_TOP_LOGPROBS]; /* best first */
    float top_logprobs[CHOIR_MAX_TOP_LOGPROBS];
} choir_sample;

/* Checks every parameter against its range and the vocabulary; the sentence names the field. */
choir_status choir_sampling_check(const choir_sampling *sampling, uint32_t vocab) CHOIR_MUST_USE;

typedef struct choir_sampler choir_sampler;
choir_status choir_sampler_create(const choir_sampling *sampling, uint32_t vocab, choir_sampler **out)
    CHOIR_MUST_USE;
void choir_sampler_destroy(choir_sampler *sampler);
/* Prompt tokens, for the repetition penalty; may be called once before the first draw. */
choir_status choir_sampler_see_prompt(choir_sampler *sampler, const uint32_t *tokens, size_t n)
    CHOIR_MUST_USE;

struct choir_kernels;
/* Draws from logits [vocab], which are overwritten. scratch: vocab * 8 bytes, 64-aligned, the worker's
 * own. The drawn token is counted as seen. No allocation. */
choir_status choir_sampler_draw(choir_sampler *sampler, const struct choir_kernels *kernels,
                                float *logits, void *scratch, choir_sample *out) CHOIR_MUST_USE;
uint32_t choir_sampler_n_drawn(const choir_sampler *sampler);
