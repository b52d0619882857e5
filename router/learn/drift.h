/* WHAT    Whether prompts are still what they were: an alarm with a stated chance of being false.
 * OWNS    Nothing; a plain struct.
 * THREADS Any, one at a time.
 * ERRORS  None.
 * LIMITS  The first FIT requests give means and scales, the next CALIBRATE give scores to compare with, then each window
 *         of CHOIR_DRIFT_WINDOW requests has a false alarm with at most the stated chance, as long as requests are
 *         exchangeable: a conformal test martingale, the Simple Jumper (Vovk et al. 2021, algorithm 1). After an alarm
 *         the requests that follow are the new normal.
 * NEXT    router/learn/learner.h */
#pragma once
#include "router/learn/policy.h"

enum { CHOIR_DRIFT_FIT = 500, CHOIR_DRIFT_CALIBRATE = 500, CHOIR_DRIFT_WINDOW = 2000 };

typedef struct choir_drift {
    double threshold; /* 1 / chance */
    uint64_t seed, n_drawn, n_windows, n_alarms;
    uint32_t n;       /* requests since means were last begun, or since the window began */
    uint32_t n_scores;
    bool tests;       /* means, scales and scores are there */
    bool alarm;       /* raised in this window, or new means are not there yet since it was */
    double mean[CHOIR_N_FEATURES], squares[CHOIR_N_FEATURES]; /* Welford's sums */
    double capital[3]; /* of those who bet on strange, on any and on usual requests */
    float scores[CHOIR_DRIFT_CALIBRATE + CHOIR_DRIFT_WINDOW]; /* calibration's, then the window's */
} choir_drift;

typedef struct choir_drift_stats {
    uint64_t n_windows, n_alarms;
    bool alarm;
    double capital; /* an alarm at 1 / chance; 1 is no evidence */
} choir_drift_stats;

void choir_drift_begin(choir_drift *drift, double chance, uint64_t seed);
void choir_drift_add(choir_drift *drift, const float features[CHOIR_N_FEATURES]);
choir_drift_stats choir_drift_get_stats(const choir_drift *drift);
