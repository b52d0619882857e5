/* WHAT    The trial of a frozen challenger against the champion: stages, promotion by a lower bound and guards, the watch
 *         over a version that was promoted, and rollback by the mirrored bound.
 *
 *           freeze            L > 0, guards         again, guards        again, guards
 *   (none) ───────▶ SHADOW ───────────────▶ 5 % ───────────────▶ 25 % ───────────────▶ PROMOTED
 *                     │                      │                     │
 *                     └──── U < 0, a guard, or too long without a bound ────▶ REJECTED
 *
 *         choir_trial_judge() is the only way from one to the next.
 * OWNS    Nothing; plain structs.
 * THREADS Any, one at a time.
 * ERRORS  None.
 * LIMITS  Only answers whose journal sequence is above the challenger's learnt_to count. The m-th trial's level is
 *         6 α / (π² m²), so that over all trials the chance of one false promotion is at most α.
 * NEXT    router/learn/learner.h */
#pragma once
#include "router/learn/bound.h"

typedef struct choir_trial_options {
    double alpha;             /* over all promotions */
    uint64_t stage_events;    /* answers with feedback that a stage sees at least */
    uint64_t patience_events; /* a stage that brings no bound ends the trial after so many */
} choir_trial_options;
#define CHOIR_TRIAL_OPTIONS_DEFAULT                                                                \
    ((choir_trial_options){.alpha = 0.05, .stage_events = 50, .patience_events = 5000})

/* 6 α / (π² m²), m from 1. */
double choir_trial_level(double alpha, uint64_t m);

typedef enum choir_trial_stage {
    CHOIR_TRIAL_SHADOW,
    CHOIR_TRIAL_FIVE,
    CHOIR_TRIAL_QUARTER,
    CHOIR_TRIAL_PROMOTED,
    CHOIR_TRIAL_REJECTED,
} choir_trial_stage;

/* Two bounds of one difference: is the newer policy better, is it worse? */
typedef struct choir_comparison {
    choir_bound better, worse; /* of the differences, and of them with the other sign */
} choir_comparison;
void choir_comparison_init(choir_comparison *c, double p_min, double alpha);
void choir_comparison_add(choir_comparison *c, const choir_routing *newer, const choir_routing *older,
                          const choir_reward_model *estimate, uint32_t n_plans,
                          const choir_reward_event *event);
double choir_comparison_lower(const choir_comparison *c);
double choir_comparison_upper(const choir_comparison *c);

typedef struct choir_trial {
    choir_trial_options options;
    choir_trial_stage stage;
    choir_comparison of; /* challenger - champion */
    uint64_t stage_began; /* of.better.n then */
} choir_trial;
/* number: m, from 1. */
void choir_trial_begin(choir_trial *trial, const choir_trial_options *options, uint64_t number, double p_min);
double choir_trial_share(const choir_trial *trial); /* of the traffic that the challenger has */
/* guards: whether all of them hold now. True: the stage has changed. */
bool choir_trial_judge(choir_trial *trial, bool guards);
/* Whether the stage would change if the guards hold: they are only worth computing then. */
bool choir_trial_wants_guards(const choir_trial *trial);
const char *choir_trial_stage_text(choir_trial_stage stage);
