/* WHAT    Learning which plan answers which prompt, for one model and one tenant: from events to challengers, their
 *         trials, promotions and rollbacks; and the draw for a request, by what is live now.
 * OWNS    The events it has learnt from (the last max_events), policies, bounds.
 * THREADS choose, get_stats: any. The others: one thread, the learner's, which gives it the journal's entries in order.
 * ERRORS  CHOIR_E_NO_MEMORY; CHOIR_E_INVALID for events that fit no plan.
 * LIMITS  A tenant's events move that tenant's routing alone. What it does is a function of the events in their order and
 *         of the versions it was told of; nothing is drawn but by a request's own seed.
 * NEXT    router/learn/version.h for what a version is on disk, router/learn/journal.h for where events lie */
#pragma once
#include "router/learn/drift.h"
#include "router/learn/trial.h"

typedef struct choir_learner choir_learner;

typedef struct choir_learner_options {
    choir_explore_options explore;
    choir_trial_options trial;
    choir_reward_options reward;
    choir_routing first;     /* the champion while there is no version: FIXED or UNIFORM */
    uint32_t freeze_events;  /* events before the first challenger; later ones want half as many again as the last */
    uint32_t max_events;     /* that are kept and learnt from */
    double drift_alarm;      /* chance of a false alarm of the features' drift within CHOIR_DRIFT_WINDOW requests */
} choir_learner_options;
#define CHOIR_LEARNER_OPTIONS_DEFAULT                                                              \
    ((choir_learner_options){.explore = CHOIR_EXPLORE_OPTIONS_DEFAULT,                             \
                             .trial = CHOIR_TRIAL_OPTIONS_DEFAULT,                                 \
                             .reward = CHOIR_REWARD_OPTIONS_DEFAULT,                               \
                             .first = {.kind = CHOIR_ROUTING_FIXED},                               \
                             .freeze_events = 300,                                                 \
                             .max_events = 20000,                                                  \
                             .drift_alarm = 0.01})

choir_status choir_learner_create(const choir_learner_options *options, uint32_t n_plans,
                                  choir_learner **out) CHOIR_MUST_USE;
void choir_learner_destroy(choir_learner *learner);

/* --- a request */

typedef struct choir_routing_choice {
    double probability[CHOIR_MAX_CANDIDATES];
    uint32_t chosen;
    bool explored;       /* what was drawn is not among what the champion would have done */
    uint64_t champion, challenger; /* versions; challenger 0: none has a share */
} choir_routing_choice;
/* bit a of `allowed`: plan a may answer. explore false: the champion's own choice, with probability 1. */
void choir_learner_choose(choir_learner *learner, const float features[CHOIR_N_FEATURES], uint32_t allowed,
                          bool explore, uint64_t seed, choir_routing_choice *out);

/* --- an answer's reward */

typedef enum choir_news_kind {
    CHOIR_NEWS_NONE,
    CHOIR_NEWS_FROZEN,      /* a challenger was made: version, policy */
    CHOIR_NEWS_STAGED,      /* it has a share of the traffic now */
    CHOIR_NEWS_PROMOTED,
    CHOIR_NEWS_REJECTED,
    CHOIR_NEWS_ROLLED_BACK, /* version is the one that is live again; it may be 0 */
} choir_news_kind;

/* What learning an event has changed, to be made durable by the caller. */
typedef struct choir_news {
    choir_news_kind kind;
    uint64_t version, former;
    const choir_routing *policy; /* FROZEN: lent until the next call */
    uint64_t learnt_to, n_learnt; /* FROZEN: the last journal sequence, and how many events */
    double share;
    char evidence[512];          /* JSON */
} choir_news;

/* Whether the guards hold for a challenger; asked when a stage would change. NULL in learn(): they do. */
typedef bool (*choir_guards)(void *user, const choir_routing *challenger, const choir_routing *champion);
/* A request was answered, with or without feedback to come: for drift, and for who is given feedback. */
void choir_learner_note_request(choir_learner *learner, const float features[CHOIR_N_FEATURES], uint32_t chosen);
/* Its answer was given a reward; the event's weight is the learner's to set. */
choir_status choir_learner_learn(choir_learner *learner, const choir_reward_event *event, choir_guards guards,
                                 void *user, choir_news *news) CHOIR_MUST_USE;

/* --- by hand, and after a restart */

/* Makes `policy` the live one; the one that was live is kept and watched against. The trial, if any, ends. */
void choir_learner_promote(choir_learner *learner, uint64_t version, const choir_routing *policy);
/* The former one is live again; CHOIR_E_PRECONDITION if there is none. */
choir_status choir_learner_roll_back(choir_learner *learner, choir_news *news) CHOIR_MUST_USE;
/* After a restart: what the journal says of the versions. Entries that are then given to note_request and learn change
 * no version, until restored() is called; the policies are copied. */
typedef struct choir_learner_past {
    uint64_t live, former, challenger, last; /* versions; last: the highest number given */
    const choir_routing *live_policy, *former_policy, *challenger_policy; /* NULL: none */
    uint64_t challenger_since, live_since;   /* journal sequences: what counts for the trial, and for the watch */
    uint64_t n_trials;                       /* that were begun, this one too */
    uint64_t last_n_learnt;                  /* events that the latest version has learnt from */
    choir_trial_stage stage;
} choir_learner_past;
void choir_learner_restore(choir_learner *learner, const choir_learner_past *past);
void choir_learner_restored(choir_learner *learner);

/* --- watching it */

typedef struct choir_plan_stats {
    uint64_t n_requests, n_feedback;
    double mean_reward;   /* of its feedback */
    double lift;          /* self-normalised estimate: its reward, were it given every prompt, less plan 0's */
} choir_plan_stats;

/* A domain is the set of prompts for which the estimate thinks one plan best. */
typedef struct choir_domain_stats {
    uint64_t n_events;
    double champion_reward, best_reward; /* by the estimate, over the domain's events */
} choir_domain_stats;

typedef struct choir_learner_stats {
    uint64_t live, challenger, former, n_events, n_trials;
    choir_trial_stage stage;
    double lower, upper, mean;   /* of challenger - champion; 0 without a trial */
    double watch_upper, watch_mean; /* of live - former; 0 without one */
    double explored_share;       /* of the requests of late */
    double regret;               /* estimate of the reward lost a request against the best plan by the estimate */
    bool feedback_is_even;       /* no evidence that plans differ in how often they are given feedback */
    choir_drift_stats drift;
    choir_plan_stats plans[CHOIR_MAX_CANDIDATES];
    choir_domain_stats domains[CHOIR_MAX_CANDIDATES];
} choir_learner_stats;
void choir_learner_get_stats(choir_learner *learner, choir_learner_stats *out);
