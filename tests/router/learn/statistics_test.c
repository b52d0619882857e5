/* What the router's statistics promise, over many simulated runs. CHOIR_RUNS sets how many (1,000).
 */
#include "tests/router/learn/world.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <setjmp.h>

#include <cmocka.h>

static uint32_t n_runs(void)
{
    const char *text = getenv("CHOIR_RUNS");
    return text != NULL ? (uint32_t)strtoul(text, NULL, 10) : 1000;
}

/* At most so many of n runs where each has a chance of at most `chance`: three deviations more. */
static double at_most(uint32_t n, double chance)
{
    return n * chance + 3 * sqrt(n * chance * (1 - chance));
}

/* --- the estimate of a difference */

/* Over all plans and both thumbs, each with its chance, whatever the estimate says. */
static void test_difference_is_unbiased(void **state)
{
    (void)state;
    const double p[4] = {0.1, 0.2, 0.3, 0.4}, truth[4] = {0.9, 0.1, 0.5, 0.3};
    const double newer[4] = {0, 1, 0, 0}, older[4] = {0.25, 0.25, 0.25, 0.25};
    double exact = 0;
    for (int a = 0; a < 4; a++) exact += (newer[a] - older[a]) * truth[a];
    for (int wrong = 0; wrong < 5; wrong++) {
        const double value[4] = {wrong * 0.25, 1 - wrong * 0.2, 0.5, wrong * 0.1};
        double mean = 0;
        for (uint32_t a = 0; a < 4; a++)
            for (int r = 0; r < 2; r++)
                mean += p[a] * (r != 0 ? truth[a] : 1 - truth[a]) *
                        choir_difference(newer, older, value, 4, a, p[a], r);
        assert_true(fabs(mean - exact) < 1e-12);
    }
}

/* --- the bound */

/* ±k with small chances, as importance weights are, and their mean. */
static double heavy(world *w, double k, double mean)
{
    double u = world_uniform(w), p = 0.5 / k;
    if (u < p / 2) return k * 0.9;
    if (u < p) return -k * 0.9;
    return mean / (1 - p);
}

static void test_bound_covers(void **state)
{
    (void)state;
    /* A large level, so that a bound that is wrong is seen to be. */
    const double alpha = 0.3, floor = 0.05, means[] = {-0.3, 0, 0.3};
    for (int m = 0; m < 3; m++) {
        uint32_t missed = 0, seen = 0, n = n_runs();
        for (uint32_t run = 0; run < n; run++) {
            world w = {.seed = 77 + run};
            choir_bound b;
            bool above = false;
            choir_bound_init(&b, floor, alpha);
            for (int t = 0; t < 400; t++) {
                double x = run % 2 == 0 ? heavy(&w, b.k, means[m])
                                        : means[m] + (world_uniform(&w) - 0.5) * 2;
                choir_bound_add(&b, x);
                above = above || choir_bound_lower(&b) > means[m] + 1e-9;
            }
            missed += above;
            seen += choir_bound_lower(&b) > means[m] - 1;
        }
        printf("mean %4.1f: %u of %u runs went above, %u came within 1\n", means[m], missed, n,
               seen);
        assert_true(missed <= at_most(n, alpha));
        assert_true(seen > n / 4); /* it says something, too */
    }
}

/* The formula as it stands, from scratch. */
static void test_bound_is_the_formula(void **state)
{
    (void)state;
    const double x[] = {0.5, -0.25, 1, 0, 0.75, -1, 0.125}, alpha = 0.1, k = 1 + 1 / 0.2;
    double lambdas = 0, sum = 0, penalty = 0, mean = 0, squares = 0;
    choir_bound b;
    choir_bound_init(&b, 0.2, alpha);
    for (int t = 1; t <= 7; t++) {
        double variance = (1 / ((k + 1) * (k + 1)) + squares) / t;
        double lambda = fmin(0.75, sqrt(2 * log(1 / alpha) / (variance * t * log(1.0 + t))));
        double xi = x[t - 1] / (k + 1), off = xi - fmin(t > 1 ? mean / (t - 1) : 0, 1 / (k + 1));
        lambdas += lambda;
        sum += lambda * xi;
        penalty += (-log(1 - lambda) - lambda) * off * off;
        mean += xi;
        squares += off * off;
        choir_bound_add(&b, x[t - 1]);
    }
    double lower = (k + 1) * (sum - log(1 / alpha) - penalty) / lambdas;
    assert_true(fabs(choir_bound_lower(&b) - fmax(lower, -k)) < 1e-9);
    assert_true(fabs(choir_bound_mean(&b) - (0.5 - 0.25 + 1 + 0.75 - 1 + 0.125) / 7) < 1e-9);
}

/* --- trials */

typedef struct trial_run {
    choir_trial_stage stage;
    uint64_t n;
} trial_run;

/* Two frozen policies; the estimate is that of a learner that knows the base reward alone. */
static trial_run run_trial(world *w, const choir_routing *champion, const choir_routing *challenger,
                           uint64_t most)
{
    const choir_explore_options explore = CHOIR_EXPLORE_OPTIONS_DEFAULT;
    const choir_trial_options options = CHOIR_TRIAL_OPTIONS_DEFAULT;
    choir_reward_model estimate;
    choir_trial trial;
    choir_reward_init(&estimate, WORLD_PLANS);
    choir_trial_begin(&trial, &options, 1, choir_explore_floor(&explore, WORLD_PLANS));
    for (uint64_t i = 0; i < most && trial.stage < CHOIR_TRIAL_PROMOTED; i++) {
        float features[CHOIR_N_FEATURES];
        double p[CHOIR_MAX_CANDIDATES];
        uint32_t domain = world_prompt(w, features);
        const choir_explore_mix mix = {.champion = champion,
                                       .challenger = challenger,
                                       .share = choir_trial_share(&trial),
                                       .estimate = &estimate};
        choir_explore_probabilities(&explore, &mix, WORLD_PLANS, UINT32_MAX, features, p);
        uint32_t chosen = choir_explore_draw(p, WORLD_PLANS, w->seed * 1000003 + i);
        choir_reward_event e = world_answer(w, domain, features, p, chosen);
        choir_comparison_add(&trial.of, challenger, champion, &estimate, WORLD_PLANS, &e);
        choir_trial_judge(&trial, true);
    }
    return (trial_run){trial.stage, trial.of.better.n};
}

static uint32_t count_promotions(double lift, bool worse, uint64_t most, uint64_t *median)
{
    const bool half[] = {true, true, false, false}, all[] = {true, true, true, true};
    const bool other[] = {false, false, true, true};
    uint32_t promoted = 0, n = n_runs();
    uint64_t *at = calloc(n, sizeof *at);
    for (uint32_t run = 0; run < n; run++) {
        world w = world_make(run + 1, 0.4, lift);
        choir_routing champion = world_policy(&w, worse ? all : half);
        choir_routing challenger = world_policy(&w, worse ? half : median != NULL ? all : other);
        trial_run r = run_trial(&w, &champion, &challenger, most);
        uint32_t place = promoted;
        if (r.stage != CHOIR_TRIAL_PROMOTED) continue;
        for (; place > 0 && at[place - 1] > r.n; place--) at[place] = at[place - 1];
        at[place] = r.n;
        promoted++;
    }
    if (median != NULL) *median = promoted > n / 2 ? at[n / 2] : UINT64_MAX;
    free(at);
    return promoted;
}

/* Δ = 0: two policies that are wrong on other halves of the domains, so that they differ on all
 * prompts; Δ < 0. */
static void test_no_false_promotions(void **state)
{
    (void)state;
    uint32_t n = n_runs(), even = count_promotions(0.2, false, 1200, NULL);
    uint32_t worse = count_promotions(0.1, true, 1200, NULL);
    printf("promoted at no difference: %u of %u, at -0.05: %u\n", even, n, worse);
    double level = choir_trial_level(0.05, 1);
    assert_true(even <= at_most(n, level));
    assert_true(worse <= at_most(n, level));
}

/* The lift that a champion misses which is wrong on half of the domains, each worth 0.4: 0.2. */
static void test_promotes_what_is_better(void **state)
{
    (void)state;
    uint64_t median;
    uint32_t promoted = count_promotions(0.4, false, 4000, &median);
    printf("lift 0.2: %u of %u promoted, after a median of %llu answers\n", promoted, n_runs(),
           (unsigned long long)median);
    assert_true(promoted > n_runs() * 0.95 && median < 2500);
}

static void test_levels_add_up_to_alpha(void **state)
{
    (void)state;
    double sum = 0;
    for (uint64_t m = 1; m < 1000000; m++) sum += choir_trial_level(0.05, m);
    assert_true(sum < 0.05 && sum > 0.04999);
}

/* --- drift */

static uint64_t count_alarms(uint64_t seed, uint32_t windows, double moved)
{
    world w = world_make(seed, 0.5, 0);
    choir_drift *d = calloc(1, sizeof *d);
    float features[CHOIR_N_FEATURES];
    choir_drift_begin(d, 0.05, seed);
    uint32_t before = CHOIR_DRIFT_FIT + CHOIR_DRIFT_CALIBRATE;
    for (uint32_t i = 0; i < before + windows * CHOIR_DRIFT_WINDOW; i++) {
        world_prompt(&w, features);
        for (uint32_t f = 1; i >= before + 300 && f < CHOIR_N_FEATURES; f++)
            features[f] += (float)moved;
        choir_drift_add(d, features);
    }
    uint64_t alarms = choir_drift_get_stats(d).n_alarms;
    free(d);
    return alarms;
}

static void test_drift(void **state)
{
    (void)state;
    uint32_t n = n_runs() / 25, falsely = 0, seen = 0;
    for (uint32_t i = 0; i < n; i++) {
        falsely += count_alarms(5 + i, 1, 0) > 0;
        seen += count_alarms(5 + i, 1, 0.5) > 0;
    }
    printf("drift: %u of %u false alarms at 0.05, %u of %u seen\n", falsely, n, seen, n);
    assert_true(falsely <= at_most(n, 0.05));
    assert_true(seen > n * 0.9);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_difference_is_unbiased),
        cmocka_unit_test(test_bound_is_the_formula),
        cmocka_unit_test(test_bound_covers),
        cmocka_unit_test(test_levels_add_up_to_alpha),
        cmocka_unit_test(test_no_false_promotions),
        cmocka_unit_test(test_promotes_what_is_better),
        cmocka_unit_test(test_drift),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
