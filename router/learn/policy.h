/* WHAT    Which plan answers a request: an estimate of every plan's reward, the probabilities that explore within a
 *         stated loss, and the draw. Pure functions of their inputs: the same events give the same bits.
 * OWNS    Nothing; everything is a plain struct.
 * THREADS Any.
 * ERRORS  CHOIR_E_NO_MEMORY of choir_reward_fit() alone.
 * LIMITS  At most CHOIR_MAX_CANDIDATES plans, CHOIR_MAX_FEATURES features. Arithmetic is double, in one order.
 * NEXT    router/learn/trial.h, which judges policies; router/learn/learner.h, which puts them together */
#pragma once
#include "router/learn/journal.h"

/* φ = [1, R h / rms(h), ln length, entropy], with h [n_hidden] the mean hidden state of the prompt's tokens at a low
 * layer, R [CHOIR_PROJECTED, n_hidden] of ±1 / √n_hidden drawn by `seed` (Achlioptas 2003), length in tokens, and the
 * entropy in nats of the gates that the prompt has met (0: none). Returns how many there are. */
enum { CHOIR_PROJECTED = 64, CHOIR_N_FEATURES = CHOIR_PROJECTED + 3 };
uint32_t choir_features_make(const float *hidden, uint32_t n_hidden, uint32_t n_tokens, float entropy,
                             uint64_t seed, float out[CHOIR_N_FEATURES]);

/* What is known of one answer. Plans are numbered as the learner's table of plans is. */
typedef struct choir_reward_event {
    uint64_t sequence;                     /* in the journal */
    float features[CHOIR_N_FEATURES];
    double probability[CHOIR_MAX_CANDIDATES]; /* with which each plan would have been drawn; 0: not allowed */
    uint32_t chosen;
    float reward;                          /* 0 … 1 */
    float weight;                          /* 0 … 1: evens out which plans are given feedback how often */
} choir_reward_event;

/* f̂(x, a) = clip(θ_a · standardised φ, 0, 1): ridge regression for each plan, with the ridge of 0.1 … 1000 whose estimate
 * from one half of the events tells the other half's rewards best. */
typedef struct choir_reward_model {
    uint32_t n_plans;
    uint64_t n_events[CHOIR_MAX_CANDIDATES]; /* that each plan's estimate is of; 0: it is `prior` */
    double prior;                            /* the mean reward of all events; 0.5 of none */
    double mean[CHOIR_N_FEATURES], scale[CHOIR_N_FEATURES];
    double theta[CHOIR_MAX_CANDIDATES][CHOIR_N_FEATURES];
} choir_reward_model;

typedef struct choir_reward_options {
    bool class_weights; /* events of domains that are rare count more, up to four times; a domain is the set of
                         * prompts for which a first estimate thinks the same plan best */
} choir_reward_options;
#define CHOIR_REWARD_OPTIONS_DEFAULT ((choir_reward_options){.class_weights = true})

void choir_reward_init(choir_reward_model *model, uint32_t n_plans);
choir_status choir_reward_fit(const choir_reward_event *events, size_t n, uint32_t n_plans,
                              const choir_reward_options *options, choir_reward_model *out) CHOIR_MUST_USE;
void choir_reward_predict(const choir_reward_model *model, const float features[CHOIR_N_FEATURES],
                          double out[CHOIR_MAX_CANDIDATES]);

/* --- policies */

typedef enum choir_routing_kind {
    CHOIR_ROUTING_FIXED,   /* always the same plan */
    CHOIR_ROUTING_UNIFORM, /* each allowed plan alike */
    CHOIR_ROUTING_GREEDY,  /* the plan that a frozen estimate thinks best; ties go to the lower number */
} choir_routing_kind;

typedef struct choir_routing {
    choir_routing_kind kind;
    uint32_t plan; /* FIXED; where it is not allowed, plan 0 stands in */
    choir_reward_model model; /* GREEDY */
} choir_routing;

/* π(a | x) over the allowed plans, bit a of `allowed`; plan 0 is always allowed. */
void choir_routing_distribution(const choir_routing *policy, uint32_t n_plans, uint32_t allowed,
                               const float features[CHOIR_N_FEATURES], double out[CHOIR_MAX_CANDIDATES]);

typedef struct choir_explore_options {
    double epsilon; /* of the requests explore at most: the loss against the champion is at most this a request */
    double eta;     /* of those, so many are spread evenly: each plan has at least epsilon eta / K */
    double gamma;   /* SquareCB's sharpness is gamma √(K n) after n events */
    double watch;   /* of the requests that the former champion keeps while the new one is being watched */
} choir_explore_options;
#define CHOIR_EXPLORE_OPTIONS_DEFAULT                                                              \
    ((choir_explore_options){.epsilon = 0.2, .eta = 0.5, .gamma = 1, .watch = 0.05})

/* p_min: no allowed plan of at most n_plans is drawn with less. */
double choir_explore_floor(const choir_explore_options *options, uint32_t n_plans);

/* p(a) = (1 - ε - w) [(1 - s) π0 + s π1] + w π_former + ε [(1 - η) q + η / K], where q is SquareCB's (Foster and
 * Rakhlin 2020, equation 2): q(a) = 1 / (K + γ (f̂(a*) - f̂(a))) for a ≠ a*, and a* has the rest. */
typedef struct choir_explore_mix {
    const choir_routing *champion;
    const choir_routing *challenger; /* NULL: none has a share */
    double share;                   /* s */
    const choir_routing *former;     /* NULL: none is kept; then w is 0 */
    const choir_reward_model *estimate;
    uint64_t n_events;              /* that the estimate has learnt from */
} choir_explore_mix;
void choir_explore_probabilities(const choir_explore_options *options, const choir_explore_mix *mix,
                                 uint32_t n_plans, uint32_t allowed,
                                 const float features[CHOIR_N_FEATURES], double out[CHOIR_MAX_CANDIDATES]);
/* Draws by a counter-based generator: the same seed draws the same. */
uint32_t choir_explore_draw(const double *probability, uint32_t n_plans, uint64_t seed);
/* Uniform in [0, 1) with 53 bits: the value `counter` of the stream `seed` (SplitMix64, Steele et al. 2014). */
double choir_uniform(uint64_t seed, uint64_t counter);
