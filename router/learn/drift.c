#include "router/learn/drift.h"

#include <string.h>

static void begin_means(choir_drift *d)
{
    d->n = d->n_scores = 0;
    d->tests = false;
    memset(d->mean, 0, sizeof d->mean);
    memset(d->squares, 0, sizeof d->squares);
}

static void begin_window(choir_drift *d)
{
    d->n = 0;
    d->n_scores = CHOIR_DRIFT_CALIBRATE;
    d->alarm = false;
    for (int i = 0; i < 3; i++) d->capital[i] = 1.0 / 3;
}

void choir_drift_begin(choir_drift *d, double chance, uint64_t seed)
{
    memset(d, 0, sizeof *d);
    d->threshold = 1 / chance;
    d->seed = seed;
    for (int i = 0; i < 3; i++) d->capital[i] = 1.0 / 3;
}

static void add_to_means(choir_drift *d, const float *features)
{
    d->n++;
    for (uint32_t i = 0; i < CHOIR_N_FEATURES; i++) {
        double off = features[i] - d->mean[i];
        d->mean[i] += off / d->n;
        d->squares[i] += off * (features[i] - d->mean[i]);
    }
}

/* Σ ((x - mean) / deviation)²; features that did not vary count nothing. */
static float score_of(const choir_drift *d, const float *features)
{
    const double least = 1e-9;
    double sum = 0;
    for (uint32_t i = 0; i < CHOIR_N_FEATURES; i++) {
        double variance = d->squares[i] / (CHOIR_DRIFT_FIT - 1), off = features[i] - d->mean[i];
        if (variance > least) sum += off * off / variance;
    }
    return (float)sum;
}

/* The share of scores, its own with them, that are stranger; equal ones are drawn for. */
static double p_value(choir_drift *d, float score)
{
    uint32_t stranger = 0, equal = 1;
    for (uint32_t i = 0; i < d->n_scores; i++) {
        stranger += d->scores[i] > score;
        equal += d->scores[i] == score;
    }
    double u = choir_uniform(d->seed, d->n_drawn++);
    return (stranger + u * equal) / (d->n_scores + 1.0);
}

static double capital_of(const choir_drift *d)
{
    return d->capital[0] + d->capital[1] + d->capital[2];
}

/* Each step a hundredth of all capital is spread evenly again, so that no bettor is ever broke. */
static void bet(choir_drift *d, double p)
{
    const double jump = 0.01, all = capital_of(d);
    for (int i = 0; i < 3; i++) {
        double kept = (1 - jump) * d->capital[i] + jump / 3 * all;
        d->capital[i] = kept * (1 + (i - 1) * (p - 0.5));
    }
}

void choir_drift_add(choir_drift *d, const float features[CHOIR_N_FEATURES])
{
    if (!d->tests && d->n < CHOIR_DRIFT_FIT) {
        add_to_means(d, features);
        return;
    }
    float score = score_of(d, features);
    if (!d->tests) {
        d->scores[d->n_scores++] = score;
        if (d->n_scores < CHOIR_DRIFT_CALIBRATE) return;
        d->tests = true;
        begin_window(d);
        return;
    }
    bet(d, p_value(d, score));
    d->scores[d->n_scores++] = score;
    d->n++;
    if (capital_of(d) >= d->threshold) {
        d->alarm = true;
        d->n_alarms++;
        d->n_windows++;
        begin_means(d);
    } else if (d->n == CHOIR_DRIFT_WINDOW) {
        d->n_windows++;
        begin_window(d);
    }
}

choir_drift_stats choir_drift_get_stats(const choir_drift *d)
{
    return (choir_drift_stats){d->n_windows, d->n_alarms, d->alarm, capital_of(d)};
}
