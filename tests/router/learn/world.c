#include "tests/router/learn/world.h"

#include <math.h>
#include <string.h>

world world_make(uint64_t seed, double base, double lift)
{
    world w = {.noise = 1.5, .seed = seed};
    for (uint32_t d = 0; d < WORLD_DOMAINS; d++) {
        w.share[d] = 1.0 / WORLD_DOMAINS;
        for (uint32_t a = 0; a < WORLD_PLANS; a++) w.reward[d][a] = base + (a == d ? lift : 0);
    }
    return w;
}

double world_uniform(world *w)
{
    return choir_uniform(w->seed, w->n_drawn++);
}

/* The domain's number in ones and minus ones, over and over. */
static double centre_of(uint32_t domain, uint32_t feature)
{
    return (domain >> feature % 2 & 1) != 0 ? 1 : -1;
}

static void fill_features(world *w, uint32_t domain, float *features)
{
    features[0] = 1;
    for (uint32_t i = 1; i < CHOIR_N_FEATURES; i++)
        features[i] = (float)(centre_of(domain, i) + w->noise * (world_uniform(w) * 2 - 1));
}

uint32_t world_prompt(world *w, float features[CHOIR_N_FEATURES])
{
    double u = world_uniform(w);
    uint32_t domain = 0;
    while (domain + 1 < WORLD_DOMAINS && u >= w->share[domain]) u -= w->share[domain++];
    fill_features(w, domain, features);
    return domain;
}

choir_reward_event world_answer(world *w, uint32_t domain, const float *features,
                                const double *probability, uint32_t chosen)
{
    choir_reward_event e = {.sequence = ++w->n_events, .chosen = chosen, .weight = 1};
    memcpy(e.features, features, sizeof e.features);
    memcpy(e.probability, probability, sizeof e.probability);
    e.reward = world_uniform(w) < w->reward[domain][chosen] ? 1 : 0;
    return e;
}

double world_value(const world *w, const choir_routing *policy)
{
    enum { PROMPTS = 100 };
    world copy = *w;
    double value = 0;
    copy.seed = 999; /* the same prompts for every policy */
    copy.n_drawn = 0;
    for (uint32_t d = 0; d < WORLD_DOMAINS; d++)
        for (int i = 0; i < PROMPTS; i++) {
            float features[CHOIR_N_FEATURES];
            double p[CHOIR_MAX_CANDIDATES];
            fill_features(&copy, d, features);
            choir_routing_distribution(policy, WORLD_PLANS, UINT32_MAX, features, p);
            for (uint32_t a = 0; a < WORLD_PLANS; a++)
                value += w->share[d] * p[a] * w->reward[d][a] / PROMPTS;
        }
    return value;
}

double world_best(const world *w)
{
    double value = 0;
    for (uint32_t d = 0; d < WORLD_DOMAINS; d++) {
        double best = 0;
        for (uint32_t a = 0; a < WORLD_PLANS; a++) best = fmax(best, w->reward[d][a]);
        value += w->share[d] * best;
    }
    return value;
}

/* A linear score that is highest for the plan of the domain: by its two bits and their product,
 * which features do not have, so a plan's score is the agreement of the bits. */
choir_routing world_policy(const world *w, const bool right[WORLD_DOMAINS])
{
    choir_routing policy = {.kind = CHOIR_ROUTING_GREEDY};
    (void)w;
    choir_reward_init(&policy.model, WORLD_PLANS);
    for (uint32_t d = 0; d < WORLD_DOMAINS; d++) {
        uint32_t a = right[d] ? d : (d + 1) % WORLD_PLANS;
        policy.model.n_events[a] = 1;
        policy.model.theta[a][0] += 0.5;
        for (uint32_t i = 1; i < CHOIR_N_FEATURES; i++)
            policy.model.theta[a][i] += 0.4 * centre_of(d, i) / (CHOIR_N_FEATURES - 1);
    }
    return policy;
}
