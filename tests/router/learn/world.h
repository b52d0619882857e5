/* A small world to learn in: prompts of a few domains, whose features lie around a centre each, and plans whose rewards
 * depend on the domain. Everything is drawn from a seed. */
#pragma once
#include "router/learn/learn.h"

enum { WORLD_DOMAINS = 4, WORLD_PLANS = 4 };

typedef struct world {
    double reward[WORLD_DOMAINS][WORLD_PLANS]; /* chance of a thumb up */
    double share[WORLD_DOMAINS];               /* of the prompts */
    double noise;                              /* of the features, evenly so far around ±1 */
    uint64_t seed, n_drawn, n_events;
} world;

/* Each domain has a plan of its own that is better by `lift` than the others; their reward is `base`. */
world world_make(uint64_t seed, double base, double lift);
double world_uniform(world *w);
/* A prompt; returns its domain. */
uint32_t world_prompt(world *w, float features[CHOIR_N_FEATURES]);
/* An answer of a plan that was drawn from `probability`, with its thumb. */
choir_reward_event world_answer(world *w, uint32_t domain, const float *features, const double *probability,
                                uint32_t chosen);
/* The mean reward over all prompts that a policy has; and the best there is. */
double world_value(const world *w, const choir_routing *policy);
double world_best(const world *w);
/* Plan d for domain d where right[d], else the next plan: a policy of known value. */
choir_routing world_policy(const world *w, const bool right[WORLD_DOMAINS]);
