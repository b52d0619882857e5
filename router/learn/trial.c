#include "router/learn/trial.h"

double choir_trial_level(double alpha, uint64_t m)
{
    const double pi_squared = 9.8696044010893586;
    return 6 * alpha / (pi_squared * (double)m * (double)m);
}

void choir_comparison_init(choir_comparison *c, double p_min, double alpha)
{
    choir_bound_init(&c->better, p_min, alpha);
    choir_bound_init(&c->worse, p_min, alpha);
}

static uint32_t allowed_of(const choir_reward_event *event, uint32_t n_plans)
{
    uint32_t allowed = 0;
    for (uint32_t a = 0; a < n_plans; a++) allowed |= (uint32_t)(event->probability[a] > 0) << a;
    return allowed;
}

void choir_comparison_add(choir_comparison *c, const choir_routing *newer,
                          const choir_routing *older, const choir_reward_model *estimate,
                          uint32_t n_plans, const choir_reward_event *event)
{
    double value[CHOIR_MAX_CANDIDATES], to[CHOIR_MAX_CANDIDATES], from[CHOIR_MAX_CANDIDATES];
    uint32_t allowed = allowed_of(event, n_plans);
    choir_reward_predict(estimate, event->features, value);
    choir_routing_distribution(newer, n_plans, allowed, event->features, to);
    choir_routing_distribution(older, n_plans, allowed, event->features, from);
    double difference =
        event->weight * choir_difference(to, from, value, n_plans, event->chosen,
                                         event->probability[event->chosen], event->reward);
    choir_bound_add(&c->better, difference);
    choir_bound_add(&c->worse, -difference);
}

double choir_comparison_lower(const choir_comparison *c)
{
    return choir_bound_lower(&c->better);
}

double choir_comparison_upper(const choir_comparison *c)
{
    return -choir_bound_lower(&c->worse);
}

void choir_trial_begin(choir_trial *trial, const choir_trial_options *options, uint64_t number,
                       double p_min)
{
    *trial = (choir_trial){.options = *options};
    choir_comparison_init(&trial->of, p_min, choir_trial_level(options->alpha, number));
}

double choir_trial_share(const choir_trial *trial)
{
    static const double shares[] = {[CHOIR_TRIAL_SHADOW] = 0,
                                    [CHOIR_TRIAL_FIVE] = 0.05,
                                    [CHOIR_TRIAL_QUARTER] = 0.25,
                                    [CHOIR_TRIAL_PROMOTED] = 1,
                                    [CHOIR_TRIAL_REJECTED] = 0};
    return shares[trial->stage];
}

static bool is_over(const choir_trial *trial)
{
    return trial->stage == CHOIR_TRIAL_PROMOTED || trial->stage == CHOIR_TRIAL_REJECTED;
}

static bool is_lost(const choir_trial *trial)
{
    return choir_comparison_upper(&trial->of) < 0 ||
           trial->of.better.n - trial->stage_began >= trial->options.patience_events;
}

static bool is_won(const choir_trial *trial)
{
    return trial->of.better.n - trial->stage_began >= trial->options.stage_events &&
           choir_comparison_lower(&trial->of) > 0;
}

bool choir_trial_wants_guards(const choir_trial *trial)
{
    return !is_over(trial) && !is_lost(trial) && is_won(trial);
}

/* A guard that fails ends the trial: what it protects is not traded for reward. */
bool choir_trial_judge(choir_trial *trial, bool guards)
{
    if (is_over(trial)) return false;
    bool won = choir_trial_wants_guards(trial);
    if (is_lost(trial) || (won && !guards))
        trial->stage = CHOIR_TRIAL_REJECTED;
    else if (won)
        trial->stage++;
    else
        return false;
    trial->stage_began = trial->of.better.n;
    return true;
}

const char *choir_trial_stage_text(choir_trial_stage stage)
{
    static const char *const texts[] = {[CHOIR_TRIAL_SHADOW] = "shadow",
                                        [CHOIR_TRIAL_FIVE] = "5 %",
                                        [CHOIR_TRIAL_QUARTER] = "25 %",
                                        [CHOIR_TRIAL_PROMOTED] = "promoted",
                                        [CHOIR_TRIAL_REJECTED] = "rejected"};
    return texts[stage];
}
