/* WHAT    Whether one policy is better than another, from logged answers: the doubly robust estimate of the difference
 *         and an anytime-valid lower confidence sequence of its mean.
 * OWNS    Nothing; plain structs.
 * THREADS Any, one at a time.
 * ERRORS  None.
 * LIMITS  Valid however often and whenever one looks (Ville's inequality); what it is fed must be computed from estimates
 *         of earlier events alone, and no logged probability may be below the bound's floor.
 * NEXT    router/learn/trial.h */
#pragma once
#include "router/learn/policy.h"

/* φ̂ = Σ_a (π1 - π0)(a | x) f̂(x, a) + (π1 - π0)(A | x) / p(A) · (r - f̂(x, A)): its mean is the difference of the two
 * policies' rewards, whatever f̂ is (Dudík, Langford and Li 2011, equation 4, for a difference). */
double choir_difference(const double *newer, const double *older, const double *value, uint32_t n_plans,
                        uint32_t chosen, double probability, double reward);

/* With ξ = φ̂ / (k + 1), where |φ̂| <= k = 1 + 1 / p_min, and ξ̄ the running mean of the past, clipped to at most 1 / (k + 1)
 * so that ξ - ξ̄ >= -1:
 *   L_t = (k + 1) [Σ λ_i ξ_i - ln(1/α) - Σ ψ(λ_i) (ξ_i - ξ̄_{i-1})²] / Σ λ_i,   ψ(λ) = -ln(1 - λ) - λ.
 * exp(Σ λ_i (ξ_i - μ_i) - ψ(λ_i) (ξ_i - ξ̄_{i-1})²) is a supermartingale, since ln(1 + λ y) >= λ y - ψ(λ) y² for y >= -1 and
 * 0 <= λ < 1 (Fan, Grama and Liu 2015, proposition 4.1); so with probability 1 - α no L_t ever exceeds the λ-weighted
 * mean of the true differences (Waudby-Smith et al. 2022, theorem 2). */
typedef struct choir_bound {
    double k, log_one_over_alpha;
    double sum_lambda, sum_lambda_xi, sum_penalty; /* Σ λ, Σ λ ξ, Σ ψ(λ) (ξ - ξ̄)² */
    double sum_xi, sum_squares;                    /* of ξ; of ξ - ξ̄ */
    uint64_t n;
} choir_bound;

void choir_bound_init(choir_bound *bound, double p_min, double alpha);
void choir_bound_add(choir_bound *bound, double difference); /* |difference| <= k */
double choir_bound_lower(const choir_bound *bound);          /* -k of nothing yet */
double choir_bound_mean(const choir_bound *bound);           /* the plain mean; 0 of nothing */
