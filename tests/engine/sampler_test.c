#include "base/memory.h"
#include "engine/kernels/kernels.h"
#include "engine/philox.h"
#include "engine/sampler.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_VOCAB = 49152 };
static float logits[MAX_VOCAB], kept_logits[MAX_VOCAB];
static _Alignas(64) uint8_t scratch[MAX_VOCAB * 8];

static uint64_t random_state = 1;
static uint32_t random_word(void)
{
    const choir_philox counter = {{(uint32_t)random_state++, 0, 0, 7}};
    return choir_philox_draw(counter, 42, 43).word[0];
}
static double random_unit(void)
{
    return random_word() * 0x1p-32;
}
static float random_normal(void)
{
    double u = random_unit() + 0x1p-33, v = random_unit();
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

static choir_sampler *sampler_of(const choir_sampling *p, uint32_t vocab)
{
    choir_sampler *s = NULL;
    choir_status status = choir_sampler_create(p, vocab, &s);
    if (status != CHOIR_OK) print_error("%s\n", choir_error_message());
    assert_int_equal(status, CHOIR_OK);
    return s;
}

static choir_sample draw_at(choir_cpu_level level, choir_sampler *s)
{
    choir_sample sample;
    assert_int_equal(choir_sampler_draw(s, choir_kernels_at(level), logits, scratch, &sample),
                     CHOIR_OK);
    return sample;
}
static choir_sample draw(choir_sampler *s)
{
    return draw_at(CHOIR_CPU_REFERENCE, s);
}

/* The vectors of kat_vectors in Random123, for philox4x32 with 10 rounds. */
static void test_philox_known_answers(void **state)
{
    (void)state;
    static const struct {
        choir_philox counter;
        uint32_t key[2];
        choir_philox answer;
    } known[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
         {0xffffffff, 0xffffffff},
         {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
         {0xa4093822, 0x299f31d0},
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        choir_philox got = choir_philox_draw(known[i].counter, known[i].key[0], known[i].key[1]);
        assert_memory_equal(&got, &known[i].answer, sizeof got);
    }
}

/* The slow way: everything sorted, everything in double, nothing skipped. */
typedef struct entry {
    double score, mass;
    uint32_t token;
    bool in;
} entry;

static int by_score(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return x->token < y->token ? -1 : 1;
}
static int by_token(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    return x->token < y->token ? -1 : 1;
}

static uint32_t slow_choice(const choir_sampling *p, const float *scores, uint32_t vocab,
                            uint32_t n_drawn)
{
    entry *e = calloc(vocab, sizeof *e);
    for (uint32_t i = 0; i < vocab; i++) e[i] = (entry){scores[i], 0, i, true};
    qsort(e, vocab, sizeof *e, by_score);
    float max = (float)e[0].score;
    uint32_t n = p->top_k > 0 && p->top_k < vocab ? p->top_k : vocab, chosen = e[0].token;
    if (p->temperature == 0) {
        free(e);
        return chosen;
    }
    double total = 0;
    for (uint32_t i = 0; i < n; i++) {
        float x = (float)e[i].score - max;
        if (p->temperature != 1) x /= p->temperature;
        e[i].score = x;
        e[i].mass = exp((double)x);
        total += e[i].mass;
    }
    double before = 0;
    uint32_t n_nucleus = 0;
    while (n_nucleus < n && before < (double)p->top_p * total) before += e[n_nucleus++].mass;
    if (p->top_p >= 1) n_nucleus = n;
    n = n_nucleus;
    uint32_t left = 0;
    total = 0;
    for (uint32_t i = 0; i < n; i++)
        if (p->min_p == 0 || e[i].mass >= (double)p->min_p * e[0].mass) total += e[left++].mass;
    qsort(e, left, sizeof *e, by_token);
    const choir_philox counter = {{n_drawn, p->index, 0, 0}};
    choir_philox bits = choir_philox_draw(counter, (uint32_t)p->seed, (uint32_t)(p->seed >> 32));
    double u = (double)(((uint64_t)bits.word[1] << 32 | bits.word[0]) >> 11) * 0x1p-53;
    double passed = 0;
    for (uint32_t i = 0; i < left; i++) {
        passed += e[i].mass;
        if (e[i].mass > 0) chosen = e[i].token;
        if (passed > u * total) break;
    }
    free(e);
    return chosen;
}

static void fill_logits(uint32_t vocab, uint32_t kind)
{
    for (uint32_t i = 0; i < vocab; i++) {
        float x = random_normal();
        logits[i] = kind == 0   ? 3 * x
                    : kind == 1 ? floorf(2 * x) /* many ties */
                    : kind == 2 ? 1e-4F * x     /* nearly flat */
                    : kind == 3 ? 30 * x        /* peaked */
                                : 1.5F;         /* flat */
    }
    if (kind == 0 && vocab > 100) /* a model's look: a few words stand out */
        for (int i = 0; i < 20; i++) logits[random_word() % vocab] += 12;
}

static choir_sampling random_sampling(uint32_t vocab)
{
    static const float temperatures[] = {0, 1, 1, 0.7F, 1.5F, 100, 0.01F};
    static const float top_ps[] = {1, 1, 0.9F, 0.5F, 0.01F, 0.999F};
    static const float min_ps[] = {0, 0, 0, 0.05F, 0.5F};
    const uint32_t top_ks[] = {0, 0, 1, 2, 40, 1000, vocab / 2, vocab / 2 + 2, vocab};
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    p.temperature = temperatures[random_word() % 7];
    p.top_p = top_ps[random_word() % 6];
    p.min_p = min_ps[random_word() % 5];
    p.top_k = top_ks[random_word() % 9];
    p.seed = (uint64_t)random_word() << 32 | random_word();
    p.index = random_word() % 3;
    return p;
}

static void test_equals_the_slow_way(void **state)
{
    (void)state;
    static const uint32_t vocabs[] = {1, 2, 3, 7, 63, 64, 65, 128, 1000, 4097, 8192};
    for (int level = 0; level < CHOIR_CPU_N_LEVELS; level++) {
        if (choir_kernels_at((choir_cpu_level)level) == NULL) continue;
        for (int round = 0; round < 1200; round++) {
            uint32_t vocab = vocabs[random_word() % 11];
            choir_sampling p = random_sampling(vocab);
            fill_logits(vocab, random_word() % 5);
            choir_sampler *s = sampler_of(&p, vocab);
            for (uint32_t i = 0; i < 3; i++) {
                uint32_t wanted = slow_choice(&p, logits, vocab, i);
                uint32_t got = draw_at((choir_cpu_level)level, s).token;
                if (got != wanted)
                    print_error("round %d: vocab %u T %g top_k %u top_p %g min_p %g draw %u\n",
                                round, vocab, (double)p.temperature, p.top_k, (double)p.top_p,
                                (double)p.min_p, i);
                assert_int_equal(got, wanted);
            }
            choir_sampler_destroy(s);
        }
    }
}

static void test_whole_vocabulary(void **state)
{
    (void)state;
    fill_logits(MAX_VOCAB, 0);
    for (int round = 0; round < 20; round++) {
        choir_sampling p = random_sampling(MAX_VOCAB);
        choir_sampler *s = sampler_of(&p, MAX_VOCAB);
        assert_int_equal(draw(s).token, slow_choice(&p, logits, MAX_VOCAB, 0));
        choir_sampler_destroy(s);
    }
}

/* Pearson's statistic of draws against the exact distribution; 99.9 % of good generators stay
 * below. */
static void check_distribution(const choir_sampling *p, uint32_t vocab, const double *wanted,
                               double limit)
{
    enum { DRAWS = 40000 };
    uint32_t counts[64] = {0};
    choir_sampler *s = sampler_of(p, vocab);
    for (int i = 0; i < DRAWS; i++) {
        memcpy(logits, kept_logits, vocab * sizeof *logits);
        counts[draw(s).token]++;
    }
    choir_sampler_destroy(s);
    double statistic = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        double expected = wanted[i] * DRAWS, gap = counts[i] - expected;
        if (wanted[i] == 0) assert_int_equal(counts[i], 0);
        if (wanted[i] > 0) statistic += gap * gap / expected;
    }
    assert_true(statistic < limit);
}

static void test_distribution(void **state)
{
    (void)state;
    enum { VOCAB = 20 };
    double exact[VOCAB], total = 0, warm[VOCAB] = {0}, warm_total = 0;
    for (int i = 0; i < VOCAB; i++) {
        kept_logits[i] = sinf((float)i * 1.7F) * 2;
        total += exp((double)kept_logits[i]);
    }
    for (int i = 0; i < VOCAB; i++) exact[i] = exp((double)kept_logits[i]) / total;
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    p.seed = 5;
    check_distribution(&p, VOCAB, exact, 43.8); /* 19 degrees of freedom */

    p.temperature = 0.5F;
    p.top_k = 6;
    for (int i = 0; i < VOCAB; i++) {
        int above = 0;
        for (int j = 0; j < VOCAB; j++) above += kept_logits[j] > kept_logits[i];
        if (above < 6) warm_total += warm[i] = exp(2 * (double)kept_logits[i]);
    }
    for (int i = 0; i < VOCAB; i++) warm[i] /= warm_total;
    check_distribution(&p, VOCAB, warm, 20.5); /* 5 degrees of freedom */
}

static void test_seed_index_and_count_decide(void **state)
{
    (void)state;
    fill_logits(1000, 0);
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    p.temperature = 2;
    uint32_t first[4][8];
    for (uint32_t k = 0; k < 4; k++) {
        p.seed = k == 3 ? UINT64_C(1) << 40 : k == 1; /* seeds 0, 1, 0, 2^40 … */
        p.index = k == 2;                             /* … and sample 1 of seed 0 */
        choir_sampler *s = sampler_of(&p, 1000), *again = sampler_of(&p, 1000);
        for (uint32_t i = 0; i < 8; i++) {
            first[k][i] = draw(s).token;
            assert_int_equal(choir_sampler_n_drawn(s), i + 1);
            assert_int_equal(draw(again).token, first[k][i]);
        }
        choir_sampler_destroy(s);
        choir_sampler_destroy(again);
    }
    for (int k = 1; k < 4; k++) assert_memory_not_equal(first[0], first[k], sizeof first[0]);
    assert_int_not_equal(first[0][0], first[0][1]);
}

static void test_logprobs_are_of_raw_logits(void **state)
{
    (void)state;
    enum { VOCAB = 200 };
    fill_logits(VOCAB, 1);
    double total = 0;
    for (int i = 0; i < VOCAB; i++) total += exp((double)logits[i]);
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    const choir_logit_bias bias = {17, 50};
    p.logit_bias = &bias;
    p.n_logit_bias = 1;
    p.temperature = 0.3F;
    p.top_logprobs = 20;
    choir_sampler *s = sampler_of(&p, VOCAB);
    choir_sample sample = draw(s);
    assert_int_equal(sample.token, 17);
    assert_true(fabs((double)sample.logprob - (double)logits[17] + log(total)) < 1e-5);
    assert_int_equal(sample.n_top, 20);
    for (uint32_t i = 0; i < 20; i++) {
        uint32_t t = sample.top_tokens[i], rank = 0;
        for (uint32_t j = 0; j < VOCAB; j++)
            rank += logits[j] > logits[t] || (logits[j] == logits[t] && j < t);
        assert_int_equal(rank, i);
        assert_true(fabs((double)sample.top_logprobs[i] - (double)logits[t] + log(total)) < 1e-5);
    }
    choir_sampler_destroy(s);

    p.top_logprobs = 20; /* a vocabulary smaller than what is wanted */
    p.n_logit_bias = 0;
    s = sampler_of(&p, 3);
    assert_int_equal(draw(s).n_top, 3);
    choir_sampler_destroy(s);
}

static void test_greedy_takes_the_lowest_of_equals(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 1000; i++) logits[i] = -1;
    logits[333] = logits[700] = logits[999] = 2;
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    p.temperature = 0;
    choir_sampler *s = sampler_of(&p, 1000);
    assert_int_equal(draw(s).token, 333);
    choir_sampler_destroy(s);
    p.frequency_penalty = 1; /* a token drawn loses 1 each time: 333, 700, 999, then again */
    s = sampler_of(&p, 1000);
    static const uint32_t wanted[] = {333, 700, 999, 333, 700, 999, 333, 700, 999, 0};
    for (int i = 0; i < 10; i++) assert_int_equal(draw(s).token, wanted[i]);
    choir_sampler_destroy(s);
}

static uint32_t greedy(const choir_sampling *p, const uint32_t *prompt, size_t n, uint32_t vocab)
{
    choir_sampler *s = sampler_of(p, vocab);
    assert_int_equal(choir_sampler_see_prompt(s, prompt, n), CHOIR_OK);
    uint32_t token = draw(s).token;
    choir_sampler_destroy(s);
    return token;
}

static void test_penalties(void **state)
{
    (void)state;
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    p.temperature = 0;
    static const uint32_t prompt[] = {0, 1, 0};
    logits[0] = 2, logits[1] = -1, logits[2] = 1.5F, logits[3] = -1.9F;
    p.repetition_penalty = 1.3F; /* 2 / 1.3 = 1.54 still leads … */
    assert_int_equal(greedy(&p, prompt, 3, 4), 0);
    p.repetition_penalty = 1.4F; /* … 1.43 does not */
    assert_int_equal(greedy(&p, prompt, 3, 4), 2);
    p.presence_penalty = 2, p.frequency_penalty = 2, p.repetition_penalty = 1; /* output only */
    assert_int_equal(greedy(&p, prompt, 3, 4), 0);
    logits[0] = -1, logits[2] = -1.5F; /* a negative logit is multiplied, so it falls as well */
    p.presence_penalty = 0, p.frequency_penalty = 0, p.repetition_penalty = 2;
    assert_int_equal(greedy(&p, prompt, 3, 4), 2);
    logits[2] = -FLT_MAX, logits[3] = -FLT_MAX; /* an overflow is cut, not infinite */
    logits[0] = logits[1] = -FLT_MAX;
    assert_int_equal(greedy(&p, prompt, 3, 4), 0);

    logits[0] = 1, logits[1] = 0.5F, logits[2] = 0; /* presence counts once, frequency each time */
    p = CHOIR_SAMPLING_DEFAULT;
    p.temperature = 0, p.presence_penalty = 0.75F;
    choir_sampler *s = sampler_of(&p, 3);
    static const uint32_t wanted[] = {0, 1, 0, 0};
    for (int i = 0; i < 4; i++) assert_int_equal(draw(s).token, wanted[i]);
    assert_int_equal(choir_sampler_see_prompt(s, prompt, 1), CHOIR_E_PRECONDITION);
    choir_sampler_destroy(s);
}

static void test_min_tokens_holds_stop_ids_back(void **state)
{
    (void)state;
    fill_logits(100, 0);
    for (int i = 0; i < 100; i++) logits[i] = i == 7 ? 50 : i == 9 ? 40 : 0;
    static const uint32_t stops[] = {7, 9, 7};
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    p.stop_ids = stops, p.n_stop_ids = 3, p.min_tokens = 5;
    choir_sampler *s = sampler_of(&p, 100);
    for (int i = 0; i < 8; i++) {
        uint32_t token = draw(s).token;
        assert_int_equal(token == 7 || token == 9, i >= 5);
    }
    choir_sampler_destroy(s);
    p.stop_ids = (const uint32_t[]){0, 1, 2}; /* nothing would be left */
    assert_int_equal(choir_sampler_create(&p, 3, &s), CHOIR_E_INVALID);
    p.min_tokens = 0;
    assert_int_equal(choir_sampler_create(&p, 3, &s), CHOIR_OK);
    choir_sampler_destroy(s);
}

static void test_poisoned_logits_are_found(void **state)
{
    (void)state;
    static const float poisons[] = {NAN, INFINITY, -INFINITY};
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    choir_sampler *s = sampler_of(&p, 77);
    choir_sample sample;
    for (uint32_t i = 0; i < 77; i++)
        for (int k = 0; k < 3; k++) {
            fill_logits(77, 0);
            logits[i] = poisons[k];
            assert_int_equal(choir_sampler_draw(s, choir_kernels_at(CHOIR_CPU_REFERENCE), logits,
                                                scratch, &sample),
                             CHOIR_E_DATA_LOSS);
        }
    assert_int_equal(choir_sampler_n_drawn(s), 0);
    for (uint32_t i = 0; i < 77; i++)
        logits[i] = i % 2 ? FLT_MAX : -FLT_MAX; /* large, not poisoned */
    assert_int_equal(draw(s).token % 2, 1);
    choir_sampler_destroy(s);
}

static void refuse(choir_sampling p, const char *words)
{
    choir_sampler *s;
    assert_int_equal(choir_sampler_create(&p, 10, &s), CHOIR_E_INVALID);
    assert_null(s);
    if (strstr(choir_error_message(), words) == NULL) fail_msg("%s", choir_error_message());
}

static void test_parameters_are_checked(void **state)
{
    (void)state;
    const choir_sampling ok = CHOIR_SAMPLING_DEFAULT;
    static const choir_logit_bias far = {10, 0}, heavy = {9, 101}, nan_bias = {9, NAN};
    static const uint32_t stop = 10;
#define REFUSE(words, ...)                                                                         \
    do {                                                                                           \
        choir_sampling p = ok;                                                                     \
        __VA_ARGS__;                                                                               \
        refuse(p, words);                                                                          \
    } while (0)
    REFUSE("temperature is -1, must be 0 to 100", p.temperature = -1);
    REFUSE("temperature is nan", p.temperature = NAN);
    REFUSE("temperature is inf", p.temperature = INFINITY);
    REFUSE("top_p is 0, must be over 0", p.top_p = 0);
    REFUSE("top_p is 1.5", p.top_p = 1.5F);
    REFUSE("min_p is 2, must be 0 to 1", p.min_p = 2);
    REFUSE("repetition_penalty is 0,", p.repetition_penalty = 0);
    REFUSE("repetition_penalty is 11,", p.repetition_penalty = 11);
    REFUSE("presence_penalty is 2.5, must be -2 to 2", p.presence_penalty = 2.5F);
    REFUSE("frequency_penalty is -3,", p.frequency_penalty = -3);
    REFUSE("logprobs is 21, the limit is 20", p.top_logprobs = 21);
    REFUSE("logit_bias' count is 1025", p.n_logit_bias = 1025);
    REFUSE("logit_bias[0] is 10, the vocabulary has 10", p.logit_bias = &far, p.n_logit_bias = 1);
    REFUSE("logit_bias is 101", p.logit_bias = &heavy, p.n_logit_bias = 1);
    REFUSE("logit_bias is nan", p.logit_bias = &nan_bias, p.n_logit_bias = 1);
    REFUSE("stop_token_ids[0] is 10", p.stop_ids = &stop, p.n_stop_ids = 1);
    REFUSE("stop_token_ids' count is 81, the limit is 80", p.n_stop_ids = 81);
#undef REFUSE
    choir_sampling p = ok;
    choir_sampler *s = sampler_of(&p, 10);
    assert_int_equal(choir_sampler_see_prompt(s, &stop, 1), CHOIR_E_INVALID);
    choir_sampler_destroy(s);
    choir_sampler_destroy(NULL);
}

static void test_memory(void **state)
{
    (void)state;
    fill_logits(1000, 0);
    choir_sampling p = CHOIR_SAMPLING_DEFAULT;
    p.repetition_penalty = 1.1F, p.top_p = 0.9F, p.top_k = 100, p.min_p = 0.01F, p.top_logprobs = 5;
    choir_sampler *s = NULL;
    choir_memory_fail_at(1);
    assert_int_equal(choir_sampler_create(&p, 1000, &s), CHOIR_E_NO_MEMORY);
    assert_null(s);
    choir_memory_fail_at(0);
    size_t before = choir_memory_bytes(CHOIR_MEM_REQUESTS);
    s = sampler_of(&p, 1000);
    uint64_t n_allocs = choir_memory_n_allocs();
    for (int i = 0; i < 50; i++) draw(s);
    assert_int_equal(choir_memory_n_allocs(), n_allocs);
    choir_sampler_destroy(s);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_REQUESTS), before);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_philox_known_answers),
        cmocka_unit_test(test_equals_the_slow_way),
        cmocka_unit_test(test_whole_vocabulary),
        cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_seed_index_and_count_decide),
        cmocka_unit_test(test_logprobs_are_of_raw_logits),
        cmocka_unit_test(test_greedy_takes_the_lowest_of_equals),
        cmocka_unit_test(test_penalties),
        cmocka_unit_test(test_min_tokens_holds_stop_ids_back),
        cmocka_unit_test(test_poisoned_logits_are_found),
        cmocka_unit_test(test_parameters_are_checked),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
