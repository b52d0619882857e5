/* What a learner does with an event, in order: it counts for the trial and for the watch, by
 * estimates of earlier events alone; then the estimate learns from it; then it is asked whether
 * anything is decided. */
#include "router/learn/learner.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum {
    FIRST_FIT = 10, /* events of the first estimate; the next ones come after a tenth more each */
    EVEN_FEEDBACK_LEAST = 50, /* requests of a plan before its rate of feedback is looked at */
    RECENT_REQUESTS = 1000,   /* explored_share is of about so many */
};

typedef struct named_policy {
    uint64_t version;
    choir_routing policy;
} named_policy;

struct choir_learner {
    choir_learner_options options;
    uint32_t n_plans;

    /* The learner thread's; who chooses reads them under the lock, under which they change. */
    pthread_mutex_t lock;
    named_policy live, former, challenger;
    bool has_former, on_trial;
    choir_reward_model estimate;
    uint64_t n_learnt; /* events, ever */

    /* The learner thread's alone. */
    choir_trial trial;
    choir_comparison watch;
    choir_reward_event *events; /* the last n_events, oldest first */
    size_t n_events, max_events;
    uint64_t last_version, n_trials, next_fit, next_freeze, challenger_since, live_since,
        last_sequence;
    bool restoring;
    choir_trial_stage restored_stage;

    /* The learner thread's, and read by others: it writes them under the lock. */
    choir_drift drift;
    uint64_t n_requests[CHOIR_MAX_CANDIDATES], n_feedback[CHOIR_MAX_CANDIDATES];
    double explored_share;
    uint64_t n_chosen;
    choir_learner_stats published;
};

choir_status choir_learner_create(const choir_learner_options *options, uint32_t n_plans,
                                  choir_learner **out)
{
    CHOIR_ASSERT(n_plans >= 1 && n_plans <= CHOIR_MAX_CANDIDATES && options->max_events >= 2);
    choir_learner *l = choir_calloc(CHOIR_MEM_LEARNING, 1, sizeof *l);
    if (l == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a router that learns");
    l->options = *options;
    l->n_plans = n_plans;
    l->live.policy = options->first;
    l->next_fit = FIRST_FIT;
    l->next_freeze = options->freeze_events;
    choir_reward_init(&l->estimate, n_plans);
    choir_drift_begin(&l->drift, options->drift_alarm, 1);
    pthread_mutex_init(&l->lock, NULL);
    *out = l;
    return CHOIR_OK;
}

void choir_learner_destroy(choir_learner *l)
{
    if (l == NULL) return;
    pthread_mutex_destroy(&l->lock);
    choir_free(l->events);
    choir_free(l);
}

/* --- a request */

static choir_explore_mix mix_of(const choir_learner *l)
{
    return (choir_explore_mix){
        .champion = &l->live.policy,
        .challenger = l->on_trial ? &l->challenger.policy : NULL,
        .share = l->on_trial ? choir_trial_share(&l->trial) : 0,
        .former = l->has_former ? &l->former.policy : NULL,
        .estimate = &l->estimate,
        .n_events = l->n_learnt,
    };
}

void choir_learner_choose(choir_learner *l, const float features[CHOIR_N_FEATURES],
                          uint32_t allowed, bool explore, uint64_t seed, choir_routing_choice *out)
{
    double champion[CHOIR_MAX_CANDIDATES];
    pthread_mutex_lock(&l->lock);
    choir_explore_mix mix = mix_of(l);
    choir_routing_distribution(mix.champion, l->n_plans, allowed, features, champion);
    memcpy(out->probability, champion, sizeof champion);
    if (explore)
        choir_explore_probabilities(&l->options.explore, &mix, l->n_plans, allowed, features,
                                    out->probability);
    out->champion = l->live.version;
    out->challenger = explore && mix.share > 0 ? l->challenger.version : 0;
    out->chosen = choir_explore_draw(out->probability, l->n_plans, seed);
    out->explored = champion[out->chosen] <= 0;
    uint64_t recent = ++l->n_chosen < RECENT_REQUESTS ? l->n_chosen : RECENT_REQUESTS;
    l->explored_share += (out->explored - l->explored_share) / (double)recent;
    pthread_mutex_unlock(&l->lock);
}

void choir_learner_note_request(choir_learner *l, const float features[CHOIR_N_FEATURES],
                                uint32_t chosen)
{
    pthread_mutex_lock(&l->lock);
    l->n_requests[chosen]++;
    choir_drift_add(&l->drift, features);
    pthread_mutex_unlock(&l->lock);
}

/* --- who is given feedback */

static double feedback_rate(const choir_learner *l, uint32_t plan)
{
    return ((double)l->n_feedback[plan] + 1) / ((double)l->n_requests[plan] + 2);
}

static bool is_counted(const choir_learner *l, uint32_t plan)
{
    return l->n_requests[plan] >= EVEN_FEEDBACK_LEAST;
}

/* Pearson's χ² of feedback against plan, at about one in a thousand. */
static bool feedback_is_even(const choir_learner *l)
{
    static const double limits[] = {0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32};
    double fed = 0, all = 0, statistic = 0;
    uint32_t n = 0;
    for (uint32_t a = 0; a < l->n_plans; a++) {
        if (!is_counted(l, a)) continue;
        fed += (double)l->n_feedback[a];
        all += (double)l->n_requests[a];
        n++;
    }
    if (n < 2 || fed <= 0 || fed >= all) return true;
    for (uint32_t a = 0; a < l->n_plans; a++) {
        if (!is_counted(l, a)) continue;
        double requests = (double)l->n_requests[a], expected = requests * fed / all;
        double off = (double)l->n_feedback[a] - expected;
        statistic += off * off / expected + off * off / (requests - expected);
    }
    return statistic <= limits[n - 1];
}

/* Answers that are given feedback more often than the rarest are thinned out to that one's rate:
 * among what is left a plan is as likely as it was drawn, and no weight is above 1. */
static double feedback_weight(const choir_learner *l, uint32_t chosen)
{
    if (feedback_is_even(l)) return 1;
    double rarest = feedback_rate(l, chosen);
    for (uint32_t a = 0; a < l->n_plans; a++)
        if (is_counted(l, a)) rarest = fmin(rarest, feedback_rate(l, a));
    return rarest / feedback_rate(l, chosen);
}

/* Thumbs alone cannot judge plans that differ in how often they are given any, until their rates
 * are known. */
static bool rates_are_known(const choir_learner *l)
{
    if (feedback_is_even(l)) return true;
    for (uint32_t a = 0; a < l->n_plans; a++)
        if (l->n_requests[a] > 0 && !is_counted(l, a)) return false;
    return true;
}

/* --- learning */

/* Room for twice as many, so that the older half goes at once and rarely. */
static choir_status keep_event(choir_learner *l, const choir_reward_event *event)
{
    size_t room = l->max_events;
    if (l->n_events == room && room < 2 * (size_t)l->options.max_events) {
        size_t more = room == 0 ? 256 : 2 * room, most = 2 * (size_t)l->options.max_events;
        if (more > most) more = most;
        void *grown = choir_realloc(CHOIR_MEM_LEARNING, l->events, more * sizeof *l->events);
        if (grown == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory to learn from %zu events", more);
        l->events = grown;
        l->max_events = more;
    }
    if (l->n_events == l->max_events) {
        size_t kept = l->options.max_events;
        memmove(l->events, l->events + l->n_events - kept, kept * sizeof *l->events);
        l->n_events = kept;
    }
    l->events[l->n_events++] = *event;
    return CHOIR_OK;
}

/* From the last max_events, whatever more is there still. */
static choir_status fit(const choir_learner *l, choir_reward_model *out)
{
    size_t n = l->n_events < l->options.max_events ? l->n_events : l->options.max_events;
    return choir_reward_fit(l->events + l->n_events - n, n, l->n_plans, &l->options.reward, out);
}

static choir_status learn_estimate(choir_learner *l, const choir_reward_event *event)
{
    CHOIR_TRY(keep_event(l, event));
    choir_reward_model fitted;
    bool due = l->n_learnt + 1 >= l->next_fit;
    if (due) CHOIR_TRY(fit(l, &fitted));
    pthread_mutex_lock(&l->lock);
    l->n_learnt++;
    if (due) {
        l->estimate = fitted;
        l->next_fit = l->n_learnt + l->n_learnt / 10 + 1;
    }
    pthread_mutex_unlock(&l->lock);
    return CHOIR_OK;
}

static void count(choir_learner *l, const choir_reward_event *event)
{
    if (l->on_trial && event->sequence > l->challenger_since)
        choir_comparison_add(&l->trial.of, &l->challenger.policy, &l->live.policy, &l->estimate,
                             l->n_plans, event);
    if (l->has_former && event->sequence > l->live_since)
        choir_comparison_add(&l->watch, &l->live.policy, &l->former.policy, &l->estimate,
                             l->n_plans, event);
}

static double p_min(const choir_learner *l)
{
    return choir_explore_floor(&l->options.explore, l->n_plans);
}

static void begin_trial(choir_learner *l, uint64_t version, const choir_routing *policy,
                        uint64_t since)
{
    pthread_mutex_lock(&l->lock);
    l->challenger.version = version;
    l->challenger.policy = *policy;
    l->challenger_since = since;
    l->on_trial = true;
    choir_trial_begin(&l->trial, &l->options.trial, ++l->n_trials, p_min(l));
    pthread_mutex_unlock(&l->lock);
}

/* Who was live is watched against from here on. */
static void make_live(choir_learner *l, uint64_t version, const choir_routing *policy,
                      uint64_t since)
{
    named_policy next = {.version = version, .policy = *policy};
    pthread_mutex_lock(&l->lock);
    l->former = l->live;
    l->live = next;
    l->live_since = since;
    l->has_former = true;
    l->on_trial = false;
    choir_comparison_init(&l->watch, p_min(l), l->options.trial.alpha);
    pthread_mutex_unlock(&l->lock);
}

static void say_evidence(choir_news *news, const char *what, const choir_comparison *c)
{
    snprintf(news->evidence, sizeof news->evidence,
             "{\"why\":\"%s\",\"events\":%llu,\"difference\":%.6g,\"lower\":%.6g,\"upper\":%.6g}",
             what, (unsigned long long)c->better.n, choir_bound_mean(&c->better),
             choir_comparison_lower(c), choir_comparison_upper(c));
}

static choir_status maybe_freeze(choir_learner *l, const choir_reward_event *event,
                                 choir_news *news)
{
    if (l->on_trial || l->n_learnt < l->next_freeze) return CHOIR_OK;
    choir_routing policy = {.kind = CHOIR_ROUTING_GREEDY};
    CHOIR_TRY(fit(l, &policy.model));
    l->next_freeze = l->n_learnt + l->n_learnt / 2;
    begin_trial(l, ++l->last_version, &policy, event->sequence);
    *news = (choir_news){.kind = CHOIR_NEWS_FROZEN,
                         .version = l->challenger.version,
                         .former = l->live.version,
                         .policy = &l->challenger.policy,
                         .learnt_to = event->sequence,
                         .n_learnt = l->n_learnt};
    snprintf(news->evidence, sizeof news->evidence,
             "{\"why\":\"frozen\",\"trial\":%llu,\"level\":%.6g}", (unsigned long long)l->n_trials,
             choir_trial_level(l->options.trial.alpha, l->n_trials));
    return CHOIR_OK;
}

static void end_trial(choir_learner *l)
{
    pthread_mutex_lock(&l->lock);
    l->on_trial = false;
    pthread_mutex_unlock(&l->lock);
}

static void judge_trial(choir_learner *l, uint64_t sequence, choir_guards guards, void *user,
                        choir_news *news)
{
    bool hold = true;
    if (!l->on_trial || !rates_are_known(l)) return;
    if (choir_trial_wants_guards(&l->trial) && guards != NULL)
        hold = guards(user, &l->challenger.policy, &l->live.policy);
    pthread_mutex_lock(&l->lock);
    bool changed = choir_trial_judge(&l->trial, hold);
    pthread_mutex_unlock(&l->lock);
    if (!changed) return;
    *news = (choir_news){.version = l->challenger.version,
                         .former = l->live.version,
                         .share = choir_trial_share(&l->trial)};
    say_evidence(news, hold ? choir_trial_stage_text(l->trial.stage) : "a guard failed",
                 &l->trial.of);
    switch (l->trial.stage) {
    case CHOIR_TRIAL_PROMOTED:
        news->kind = CHOIR_NEWS_PROMOTED;
        make_live(l, l->challenger.version, &l->challenger.policy, sequence);
        break;
    case CHOIR_TRIAL_REJECTED:
        news->kind = CHOIR_NEWS_REJECTED;
        end_trial(l);
        break;
    default:
        news->kind = CHOIR_NEWS_STAGED;
    }
}

static void swap_back(choir_learner *l, choir_news *news)
{
    *news = (choir_news){
        .kind = CHOIR_NEWS_ROLLED_BACK, .version = l->former.version, .former = l->live.version};
    say_evidence(news, "worse than the former", &l->watch);
    pthread_mutex_lock(&l->lock);
    l->live = l->former;
    l->has_former = l->on_trial = false;
    pthread_mutex_unlock(&l->lock);
}

/* A version that has shown itself better on fresh answers needs no watch any more. */
static void judge_watch(choir_learner *l, choir_news *news)
{
    if (!l->has_former || news->kind != CHOIR_NEWS_NONE) return;
    if (choir_comparison_upper(&l->watch) < 0) {
        swap_back(l, news);
    } else if (choir_comparison_lower(&l->watch) > 0) {
        pthread_mutex_lock(&l->lock);
        l->has_former = false;
        pthread_mutex_unlock(&l->lock);
    }
}

static choir_status check_event(const choir_learner *l, const choir_reward_event *event)
{
    double sum = 0, floor = p_min(l) * (1 - 1e-9);
    bool good = event->chosen < l->n_plans && event->reward >= 0 && event->reward <= 1 &&
                event->weight >= 0 && event->weight <= 1;
    for (uint32_t a = 0; a < CHOIR_MAX_CANDIDATES; a++) {
        double p = event->probability[a];
        good = good && (p == 0 || (a < l->n_plans && p >= floor && p <= 1 + 1e-9));
        sum += p;
    }
    good = good && event->probability[event->chosen] > 0 && fabs(sum - 1) < 1e-6;
    for (uint32_t d = 0; d < CHOIR_N_FEATURES; d++) good = good && isfinite(event->features[d]);
    return good ? CHOIR_OK
                : choir_fail(CHOIR_E_INVALID,
                             "entry %llu of the journal cannot be learnt from: its probabilities, "
                             "features or "
                             "reward are out of range",
                             (unsigned long long)event->sequence);
}

static void publish(choir_learner *l);

static void note_feedback(choir_learner *l, uint32_t chosen)
{
    pthread_mutex_lock(&l->lock);
    l->n_feedback[chosen]++;
    pthread_mutex_unlock(&l->lock);
}

/* While a past is restored the challenger's trial begins where it began. */
static void resume_trial(choir_learner *l, uint64_t sequence)
{
    if (!l->restoring || l->on_trial || l->challenger.version == 0) return;
    if (sequence <= l->challenger_since) return;
    const choir_routing policy = l->challenger.policy;
    begin_trial(l, l->challenger.version, &policy, l->challenger_since);
}

choir_status choir_learner_learn(choir_learner *l, const choir_reward_event *from,
                                 choir_guards guards, void *user, choir_news *news)
{
    choir_reward_event event = *from;
    *news = (choir_news){.kind = CHOIR_NEWS_NONE};
    event.weight = 1;
    CHOIR_TRY(check_event(l, &event));
    resume_trial(l, event.sequence);
    event.weight = (float)feedback_weight(l, event.chosen);
    note_feedback(l, event.chosen);
    count(l, &event);
    CHOIR_TRY(learn_estimate(l, &event));
    l->last_sequence = event.sequence;
    if (l->restoring) return CHOIR_OK;
    judge_trial(l, event.sequence, guards, user, news);
    judge_watch(l, news);
    if (news->kind == CHOIR_NEWS_NONE) CHOIR_TRY(maybe_freeze(l, &event, news));
    publish(l);
    return CHOIR_OK;
}

/* --- by hand */

void choir_learner_promote(choir_learner *l, uint64_t version, const choir_routing *policy)
{
    make_live(l, version, policy, l->last_sequence);
    if (version > l->last_version) l->last_version = version;
    publish(l);
}

choir_status choir_learner_roll_back(choir_learner *l, choir_news *news)
{
    if (!l->has_former)
        return choir_fail(CHOIR_E_PRECONDITION, "there is no former version to go back to");
    swap_back(l, news);
    publish(l);
    return CHOIR_OK;
}

/* --- after a restart */

void choir_learner_restore(choir_learner *l, const choir_learner_past *past)
{
    l->restoring = true;
    l->restored_stage = past->stage;
    l->last_version = past->last;
    l->n_trials = past->n_trials;
    if (past->last_n_learnt > 0) l->next_freeze = past->last_n_learnt + past->last_n_learnt / 2;
    if (past->former_policy != NULL) l->live = (named_policy){past->former, *past->former_policy};
    if (past->live_policy != NULL) {
        if (past->former_policy != NULL)
            make_live(l, past->live, past->live_policy, past->live_since);
        else
            l->live = (named_policy){past->live, *past->live_policy};
    }
    if (past->challenger_policy == NULL) return;
    l->n_trials--;
    l->challenger = (named_policy){past->challenger, *past->challenger_policy};
    l->challenger_since = past->challenger_since;
}

void choir_learner_restored(choir_learner *l)
{
    resume_trial(l, UINT64_MAX);
    pthread_mutex_lock(&l->lock);
    if (l->on_trial) l->trial.stage = l->restored_stage;
    if (l->on_trial) l->trial.stage_began = l->trial.of.better.n;
    l->restoring = false;
    pthread_mutex_unlock(&l->lock);
    publish(l);
}

/* --- watching it */

static void publish_plans(const choir_learner *l, choir_learner_stats *out)
{
    double ips[CHOIR_MAX_CANDIDATES] = {0}, all[CHOIR_MAX_CANDIDATES] = {0};
    double sum[CHOIR_MAX_CANDIDATES] = {0};
    uint64_t n[CHOIR_MAX_CANDIDATES] = {0};
    for (size_t i = 0; i < l->n_events; i++) {
        const choir_reward_event *e = &l->events[i];
        double weight = e->weight / e->probability[e->chosen];
        ips[e->chosen] += weight * e->reward;
        all[e->chosen] += weight;
        sum[e->chosen] += e->reward;
        n[e->chosen]++;
    }
    for (uint32_t a = 0; a < l->n_plans; a++) {
        choir_plan_stats *p = &out->plans[a];
        p->mean_reward = n[a] > 0 ? sum[a] / (double)n[a] : 0;
        if (all[a] > 0 && all[0] > 0) p->lift = ips[a] / all[a] - ips[0] / all[0];
    }
}

static void publish_domains(const choir_learner *l, choir_learner_stats *out)
{
    double lost = 0;
    for (size_t i = 0; i < l->n_events; i++) {
        double value[CHOIR_MAX_CANDIDATES], champion[CHOIR_MAX_CANDIDATES], reward = 0;
        const float *features = l->events[i].features;
        uint32_t best = 0;
        choir_reward_predict(&l->estimate, features, value);
        choir_routing_distribution(&l->live.policy, l->n_plans, UINT32_MAX, features, champion);
        for (uint32_t a = 0; a < l->n_plans; a++) {
            if (value[a] > value[best]) best = a;
            reward += champion[a] * value[a];
        }
        choir_domain_stats *d = &out->domains[best];
        d->n_events++;
        d->champion_reward += reward;
        d->best_reward += value[best];
        lost += value[best] - reward;
    }
    for (uint32_t a = 0; a < l->n_plans; a++) {
        choir_domain_stats *d = &out->domains[a];
        double n = d->n_events > 0 ? (double)d->n_events : 1;
        d->champion_reward /= n;
        d->best_reward /= n;
    }
    out->regret = l->n_events > 0 ? lost / (double)l->n_events : 0;
}

/* What runs over all events is done again when a twentieth of them is new. */
static bool is_fresh(const choir_learner *l, const choir_learner_stats *stats)
{
    return l->n_learnt < l->next_fit && stats->n_events != 0 && stats->live == l->live.version &&
           l->n_learnt - stats->n_events < l->n_learnt / 20;
}

static void publish(choir_learner *l)
{
    choir_learner_stats stats;
    pthread_mutex_lock(&l->lock);
    stats = l->published;
    pthread_mutex_unlock(&l->lock);
    if (!is_fresh(l, &stats)) {
        stats = (choir_learner_stats){.n_events = l->n_learnt};
        publish_plans(l, &stats);
        publish_domains(l, &stats);
    }
    stats.live = l->live.version;
    stats.former = l->has_former ? l->former.version : 0;
    stats.challenger = l->on_trial ? l->challenger.version : 0;
    stats.n_trials = l->n_trials;
    stats.stage = l->trial.stage;
    stats.lower = l->on_trial ? choir_comparison_lower(&l->trial.of) : 0;
    stats.upper = l->on_trial ? choir_comparison_upper(&l->trial.of) : 0;
    stats.mean = l->on_trial ? choir_bound_mean(&l->trial.of.better) : 0;
    stats.watch_upper = l->has_former ? choir_comparison_upper(&l->watch) : 0;
    stats.watch_mean = l->has_former ? choir_bound_mean(&l->watch.better) : 0;
    pthread_mutex_lock(&l->lock);
    l->published = stats;
    pthread_mutex_unlock(&l->lock);
}

void choir_learner_get_stats(choir_learner *l, choir_learner_stats *out)
{
    pthread_mutex_lock(&l->lock);
    *out = l->published;
    out->drift = choir_drift_get_stats(&l->drift);
    out->explored_share = l->explored_share;
    out->feedback_is_even = feedback_is_even(l);
    for (uint32_t a = 0; a < l->n_plans; a++) {
        out->plans[a].n_requests = l->n_requests[a];
        out->plans[a].n_feedback = l->n_feedback[a];
    }
    pthread_mutex_unlock(&l->lock);
}
