/* WHAT    The tokens that may still be drawn: a vocabulary of scores, narrowed by top-k, top-p
 *         and min-p without sorting it, and the draw among those left.
 * OWNS    Nothing: scores and numbers lie in the caller's scratch of vocab * 8 bytes.
 * THREADS One owner.
 * ERRORS  None; scores are finite, or -INFINITY for what is masked, and at least one is finite.
 * LIMITS  Order is by score, then by lower number: ties are cut the same way everywhere. Passes
 *         are linear in the vocabulary.
 * NEXT    engine/sampler.c */
#pragma once
#include "engine/kernels/kernels.h"

/* While numbers is NULL, score[i] is token i's. Once few are left they are packed to the front, in
 * ascending order of their numbers. spare holds at least n floats. */
typedef struct candidates {
    const choir_kernels *kernels;
    float *score;
    uint32_t *numbers;
    uint32_t n, vocab;
    float max;       /* of the scores */
    uint32_t *space; /* [vocab]: the numbers once packed; spare before that and behind them */
} candidates;

candidates candidates_begin(const choir_kernels *kernels, const float *scores, uint32_t vocab,
                            void *scratch);
void candidates_find_max(candidates *c);
void candidates_top_k(candidates *c, uint32_t k);
/* score = (score - max) / temperature */
void candidates_temper(candidates *c, float temperature);
void candidates_top_p(candidates *c, float p);
void candidates_min_p(candidates *c, float p);
/* The token at `u` in [0, 1) of the cumulative softmax of the scores, in the order of numbers. */
uint32_t candidates_draw(const candidates *c, double u);
/* The lowest index whose score equals `max`, which must be there. */
uint32_t candidates_first_of(const choir_kernels *kernels, const float *scores, uint32_t n,
                             float max);
