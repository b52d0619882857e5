/* The learner from its first event to a promotion by the bound, a rollback, and a restart. */
#include "tests/router/learn/world.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <setjmp.h>

#include <cmocka.h>

/* --- drawing */

static void test_probabilities(void **state)
{
    (void)state;
    const choir_explore_options options = {.epsilon = 0.2, .eta = 0.5, .gamma = 2, .watch = 0.05};
    const choir_routing champion = {.kind = CHOIR_ROUTING_FIXED, .plan = 1};
    const choir_routing former = {.kind = CHOIR_ROUTING_FIXED, .plan = 2};
    choir_reward_model estimate;
    float features[CHOIR_N_FEATURES] = {1};
    double p[CHOIR_MAX_CANDIDATES], floor = choir_explore_floor(&options, 3);
    choir_reward_init(&estimate, 3);
    const double values[] = {0.5, 0.3, 0.1};
    for (uint32_t a = 0; a < 3; a++) {
        estimate.theta[a][0] = values[a];
        estimate.n_events[a] = 1;
    }
    const choir_explore_mix mix = {
        .champion = &champion, .former = &former, .estimate = &estimate, .n_events = 12};
    choir_explore_probabilities(&options, &mix, 3, 7, features, p);
    double gamma = 2 * sqrt(3 * 12), q1 = 1 / (3 + gamma * 0.2), q2 = 1 / (3 + gamma * 0.4);
    assert_true(fabs(p[0] - 0.2 * (0.5 * (1 - q1 - q2) + 0.5 / 3)) < 1e-12);
    assert_true(fabs(p[1] - (0.75 + 0.2 * (0.5 * q1 + 0.5 / 3))) < 1e-12);
    assert_true(fabs(p[2] - (0.05 + 0.2 * (0.5 * q2 + 0.5 / 3))) < 1e-12);
    for (uint32_t a = 0; a < 3; a++) assert_true(p[a] >= floor);
    /* A plan that is not allowed is never drawn, and the champion's place is the model's then. */
    choir_explore_probabilities(&options, &mix, 3, 5, features, p);
    assert_true(p[1] == 0 && p[0] > 0.75 && fabs(p[0] + p[2] - 1) < 1e-12);
}

static void test_draws(void **state)
{
    (void)state;
    enum { N = 20000 };
    const double p[] = {0.5, 0, 0.3, 0.2};
    uint32_t counts[4] = {0};
    for (uint64_t seed = 0; seed < N; seed++) {
        uint32_t a = choir_explore_draw(p, 4, seed);
        assert_int_equal(a, choir_explore_draw(p, 4, seed));
        counts[a]++;
    }
    assert_int_equal(counts[1], 0);
    for (int a = 0; a < 4; a++)
        assert_true(fabs(counts[a] - N * p[a]) <= 4 * sqrt(N * p[a] * (1 - p[a])));
}

/* --- the estimate */

static void test_fit_finds_a_line(void **state)
{
    (void)state;
    enum { N = 400 };
    world w = world_make(3, 0.5, 0);
    choir_reward_event *events = calloc(N, sizeof *events);
    const choir_reward_options options = {.class_weights = false};
    const double p[CHOIR_MAX_CANDIDATES] = {0.5, 0.5};
    choir_reward_model model;
    for (uint32_t i = 0; i < N; i++) {
        float features[CHOIR_N_FEATURES];
        world_prompt(&w, features);
        events[i] = world_answer(&w, 0, features, p, i % 2);
        events[i].reward = i % 2 == 0 ? 0.5F + 0.1F * features[3] : 0.25F;
    }
    assert_int_equal(choir_reward_fit(events, N, 3, &options, &model), CHOIR_OK);
    for (uint32_t i = 0; i < N; i++) {
        double value[CHOIR_MAX_CANDIDATES];
        choir_reward_predict(&model, events[i].features, value);
        assert_true(fabs(value[0] - (0.5 + 0.1 * (double)events[i].features[3])) < 1e-3);
        assert_true(fabs(value[1] - 0.25) < 1e-3);
        assert_true(value[2] == model.prior); /* never tried */
    }
    free(events);
}

/* --- learning */

typedef struct student {
    choir_learner *learner;
    world w;
    choir_news_kind last;
    uint64_t n_frozen, n_promoted, n_rolled_back, promoted_at;
    choir_routing frozen[8]; /* by version */
    double reward;           /* of all answers */
} student;

static choir_learner *make_learner(choir_routing_kind first)
{
    choir_learner_options options = CHOIR_LEARNER_OPTIONS_DEFAULT;
    choir_learner *l;
    options.first.kind = first;
    assert_int_equal(choir_learner_create(&options, WORLD_PLANS, &l), CHOIR_OK);
    return l;
}

static void take_news(student *s, const choir_news *news, uint64_t sequence)
{
    s->last = news->kind;
    switch (news->kind) {
    case CHOIR_NEWS_FROZEN:
        assert_int_equal(news->version, ++s->n_frozen);
        assert_int_equal(news->learnt_to, sequence);
        if (news->version < 8) s->frozen[news->version] = *news->policy;
        break;
    case CHOIR_NEWS_PROMOTED:
        if (s->n_promoted++ == 0) s->promoted_at = sequence;
        break;
    case CHOIR_NEWS_ROLLED_BACK:
        s->n_rolled_back++;
        break;
    default:
        break;
    }
}

static choir_reward_event ask(student *s)
{
    float features[CHOIR_N_FEATURES];
    choir_routing_choice choice;
    uint32_t domain = world_prompt(&s->w, features);
    choir_learner_choose(s->learner, features, UINT32_MAX, true, s->w.n_drawn, &choice);
    choir_learner_note_request(s->learner, features, choice.chosen);
    choir_reward_event e = world_answer(&s->w, domain, features, choice.probability, choice.chosen);
    s->reward += s->w.reward[domain][choice.chosen];
    return e;
}

static void study(student *s, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        choir_news news;
        choir_reward_event e = ask(s);
        assert_int_equal(choir_learner_learn(s->learner, &e, NULL, NULL, &news), CHOIR_OK);
        take_news(s, &news, e.sequence);
    }
}

/* From a uniform champion: promoted by the bound alone, and what is live then has 95 % of the best
 * there is. */
static void test_learns(void **state)
{
    (void)state;
    student s = {.learner = make_learner(CHOIR_ROUTING_UNIFORM), .w = world_make(11, 0.3, 0.4)};
    choir_learner_stats stats;
    study(&s, 5000);
    choir_learner_get_stats(s.learner, &stats);
    assert_true(s.n_promoted >= 1 && stats.live >= 1 && stats.live < 8);
    double value = world_value(&s.w, &s.frozen[stats.live]);
    printf(
        "first promotion after %llu answers; live: version %llu, %.1f %% of the best; all answers "
        "had %.3f, uniform has 0.400\n",
        (unsigned long long)s.promoted_at, (unsigned long long)stats.live,
        100 * value / world_best(&s.w), s.reward / 5000);
    assert_true(value >= 0.95 * world_best(&s.w));
    assert_true(stats.feedback_is_even && stats.plans[1].n_requests > 0);
    choir_learner_destroy(s.learner);
}

/* A version that is wrong everywhere, made live by hand, is swapped back by the mirrored bound. */
static void test_rolls_back(void **state)
{
    (void)state;
    const bool all[] = {true, true, true, true}, none[] = {false, false, false, false};
    student s = {.learner = make_learner(CHOIR_ROUTING_UNIFORM), .w = world_make(12, 0.3, 0.4)};
    const choir_routing good = world_policy(&s.w, all), bad = world_policy(&s.w, none);
    choir_learner_stats stats;
    choir_learner_promote(s.learner, 1, &good);
    choir_learner_promote(s.learner, 2, &bad);
    uint32_t n = 0;
    for (; s.n_rolled_back == 0 && n < 3000; n++) {
        choir_news news;
        choir_reward_event e = ask(&s);
        assert_int_equal(choir_learner_learn(s.learner, &e, NULL, NULL, &news), CHOIR_OK);
        s.n_rolled_back += news.kind == CHOIR_NEWS_ROLLED_BACK;
        if (news.kind == CHOIR_NEWS_ROLLED_BACK) assert_int_equal(news.version, 1);
    }
    choir_learner_get_stats(s.learner, &stats);
    printf("rolled back after %u answers\n", n);
    assert_true(s.n_rolled_back == 1 && stats.live == 1);
    choir_learner_destroy(s.learner);
}

static bool refuse(void *user, const choir_routing *challenger, const choir_routing *champion)
{
    (void)challenger, (void)champion;
    ++*(uint32_t *)user;
    return false;
}

static void test_guards_refuse(void **state)
{
    (void)state;
    student s = {.learner = make_learner(CHOIR_ROUTING_UNIFORM), .w = world_make(13, 0.3, 0.4)};
    choir_learner_stats stats;
    uint32_t n_asked = 0, n_rejected = 0;
    for (uint32_t i = 0; i < 3000; i++) {
        choir_news news;
        choir_reward_event e = ask(&s);
        assert_int_equal(choir_learner_learn(s.learner, &e, refuse, &n_asked, &news), CHOIR_OK);
        n_rejected += news.kind == CHOIR_NEWS_REJECTED;
        assert_true(news.kind != CHOIR_NEWS_PROMOTED && news.kind != CHOIR_NEWS_STAGED);
    }
    choir_learner_get_stats(s.learner, &stats);
    assert_true(n_asked >= 1 && n_rejected == n_asked && stats.live == 0);
    choir_learner_destroy(s.learner);
}

/* The same events give the same versions, bit for bit; a restart in the middle changes nothing. */
static void test_replays(void **state)
{
    (void)state;
    enum { N = 2500, CUT = 900 };
    student s = {.learner = make_learner(CHOIR_ROUTING_UNIFORM), .w = world_make(14, 0.3, 0.4)};
    choir_reward_event *events = calloc(N, sizeof *events);
    choir_news *news = calloc(N, sizeof *news);
    choir_routing frozen[8];
    uint64_t since = 0;
    for (uint32_t i = 0; i < N; i++) {
        events[i] = ask(&s);
        assert_int_equal(choir_learner_learn(s.learner, &events[i], NULL, NULL, &news[i]),
                         CHOIR_OK);
        if (news[i].kind == CHOIR_NEWS_FROZEN && news[i].version < 8)
            frozen[news[i].version] = *news[i].policy;
        if (i < CUT && news[i].kind == CHOIR_NEWS_FROZEN) since = news[i].learnt_to;
        if (i < CUT) assert_true(news[i].kind <= CHOIR_NEWS_FROZEN); /* the cut is in the shadow */
    }
    assert_true(since > 0);
    choir_learner *again = make_learner(CHOIR_ROUTING_UNIFORM);
    const choir_learner_past past = {.challenger = 1,
                                     .last = 1,
                                     .challenger_policy = &frozen[1],
                                     .challenger_since = since,
                                     .n_trials = 1,
                                     .last_n_learnt = 300};
    choir_learner_restore(again, &past);
    for (uint32_t i = 0; i < N; i++) {
        choir_news now;
        if (i == CUT) choir_learner_restored(again);
        choir_learner_note_request(again, events[i].features, events[i].chosen);
        assert_int_equal(choir_learner_learn(again, &events[i], NULL, NULL, &now), CHOIR_OK);
        if (i < CUT) continue;
        assert_int_equal(now.kind, news[i].kind);
        assert_int_equal(now.version, news[i].version);
        assert_string_equal(now.evidence, news[i].evidence);
        if (now.kind == CHOIR_NEWS_FROZEN && now.version < 8)
            assert_memory_equal(now.policy, &frozen[now.version], sizeof *now.policy);
    }
    choir_learner_destroy(again);
    choir_learner_destroy(s.learner);
    free(events);
    free(news);
}

/* Thumbs that come twice as often for one plan are thinned, so that its weight is half. */
static void test_uneven_feedback(void **state)
{
    (void)state;
    student s = {.learner = make_learner(CHOIR_ROUTING_UNIFORM), .w = world_make(15, 0.5, 0)};
    choir_learner_stats stats;
    for (uint32_t i = 0; i < 4000; i++) {
        choir_news news;
        choir_reward_event e = ask(&s);
        if (world_uniform(&s.w) > (e.chosen == 2 ? 0.8 : 0.4)) continue;
        assert_int_equal(choir_learner_learn(s.learner, &e, NULL, NULL, &news), CHOIR_OK);
        assert_true(news.kind != CHOIR_NEWS_PROMOTED);
    }
    choir_learner_get_stats(s.learner, &stats);
    assert_false(stats.feedback_is_even);
    choir_learner_destroy(s.learner);
}

static void test_poison_is_refused(void **state)
{
    (void)state;
    student s = {.learner = make_learner(CHOIR_ROUTING_UNIFORM), .w = world_make(16, 0.5, 0)};
    choir_news news;
    for (int i = 0; i < 8; i++) {
        choir_reward_event e = ask(&s);
        if (i == 0) e.reward = NAN;
        if (i == 1) e.reward = 2;
        if (i == 2) e.features[5] = INFINITY;
        if (i == 3) e.chosen = WORLD_PLANS;
        if (i == 4) e.probability[0] = NAN;
        if (i == 5) e.probability[1] = 1e-9;
        if (i == 6) e.probability[WORLD_PLANS] = 0.1;
        if (i == 7) e.probability[e.chosen] = 0;
        assert_int_equal(choir_learner_learn(s.learner, &e, NULL, NULL, &news), CHOIR_E_INVALID);
    }
    choir_learner_stats stats;
    choir_learner_get_stats(s.learner, &stats);
    assert_int_equal(stats.n_events, 0);
    choir_learner_destroy(s.learner);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_probabilities),     cmocka_unit_test(test_draws),
        cmocka_unit_test(test_fit_finds_a_line),  cmocka_unit_test(test_learns),
        cmocka_unit_test(test_rolls_back),        cmocka_unit_test(test_guards_refuse),
        cmocka_unit_test(test_replays),           cmocka_unit_test(test_uneven_feedback),
        cmocka_unit_test(test_poison_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
