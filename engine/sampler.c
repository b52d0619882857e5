/* The order of a draw, which is vLLM's where the two overlap:
 *   1. log-softmax of the raw logits: logprob and top_logprobs are the model's own
 *   2. logit_bias; repetition, then frequency and presence penalties; stop ids masked before
 * min_tokens
 *   3. temperature 0: the largest, the lowest id among equals. Otherwise
 *   4. top_k, temperature (which changes no order), top_p of what is left, min_p of what is left
 *   5. one 53-bit number from Philox at (seed; tokens drawn, index), looked up in the cumulative
 *      distribution over ascending ids. */
#include "engine/sampler.h"
#include "base/memory.h"
#include "engine/candidates.h"
#include "engine/philox.h"

#include <float.h>
#include <math.h>
#include <string.h>

struct choir_sampler {
    choir_sampling sampling; /* logit_bias and stop_ids point behind this struct */
    uint32_t vocab, n_drawn;
    bool changes_logits;
    bool counts; /* a penalty is on: seen and n_outputs are there */
    uint32_t n_seen;
    uint32_t *seen;      /* [vocab] distinct tokens of prompt and output, in order of appearance */
    uint32_t *n_outputs; /* [vocab] how often drawn, plus IN_PROMPT */
};
enum { IN_PROMPT = 1u << 31 };

static choir_status check_range(const char *field, float value, bool good, const char *range)
{
    if (good) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "%s is %g, must be %s", field, (double)value, range);
}

static choir_status check_count(const char *field, uint64_t value, uint64_t limit)
{
    if (value <= limit) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "%s is %llu, the limit is %llu", field,
                      (unsigned long long)value, (unsigned long long)limit);
}

static choir_status check_token(const char *field, uint32_t i, uint32_t token, uint32_t vocab)
{
    if (token < vocab) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "%s[%u] is %u, the vocabulary has %u tokens", field, i,
                      token, vocab);
}

/* While min_tokens holds the stop ids back there must be another token to draw. */
static choir_status check_stop_ids(const choir_sampling *s, uint32_t vocab)
{
    CHOIR_TRY(check_count("stop_token_ids' count", s->n_stop_ids, CHOIR_MAX_END_IDS));
    uint32_t n_distinct = 0;
    for (uint32_t i = 0; i < s->n_stop_ids; i++) {
        CHOIR_TRY(check_token("stop_token_ids", i, s->stop_ids[i], vocab));
        uint32_t before = 0;
        while (before < i && s->stop_ids[before] != s->stop_ids[i]) before++;
        n_distinct += before == i;
    }
    if (s->min_tokens > 0 && n_distinct == vocab)
        return choir_fail(CHOIR_E_INVALID,
                          "stop_token_ids names all %u tokens, which min_tokens %u forbids", vocab,
                          s->min_tokens);
    return CHOIR_OK;
}

choir_status choir_sampling_check(const choir_sampling *s, uint32_t vocab)
{
    float t = s->temperature, r = s->repetition_penalty, presence = s->presence_penalty,
          frequency = s->frequency_penalty;
    CHOIR_TRY(check_range("temperature", t, t >= 0 && t <= 100, "0 to 100"));
    CHOIR_TRY(
        check_range("top_p", s->top_p, s->top_p > 0 && s->top_p <= 1, "over 0 and at most 1"));
    CHOIR_TRY(check_range("min_p", s->min_p, s->min_p >= 0 && s->min_p <= 1, "0 to 1"));
    CHOIR_TRY(check_range("repetition_penalty", r, r > 0 && r <= 10, "over 0 and at most 10"));
    CHOIR_TRY(
        check_range("presence_penalty", presence, presence >= -2 && presence <= 2, "-2 to 2"));
    CHOIR_TRY(
        check_range("frequency_penalty", frequency, frequency >= -2 && frequency <= 2, "-2 to 2"));
    CHOIR_TRY(check_count("logprobs", s->top_logprobs, CHOIR_MAX_TOP_LOGPROBS));
    CHOIR_TRY(check_count("logit_bias' count", s->n_logit_bias, CHOIR_MAX_LOGIT_BIAS));
    for (uint32_t i = 0; i < s->n_logit_bias; i++) {
        float bias = s->logit_bias[i].bias;
        CHOIR_TRY(check_token("logit_bias", i, s->logit_bias[i].token, vocab));
        CHOIR_TRY(check_range("logit_bias", bias, bias >= -100 && bias <= 100, "-100 to 100"));
    }
    return check_stop_ids(s, vocab);
}

choir_status choir_sampler_create(const choir_sampling *sampling, uint32_t vocab,
                                  choir_sampler **out)
{
    *out = NULL;
    if (vocab == 0) return choir_fail(CHOIR_E_INVALID, "a vocabulary of 0 tokens");
    CHOIR_TRY(choir_sampling_check(sampling, vocab));
    bool counts = sampling->repetition_penalty != 1 || sampling->presence_penalty != 0 ||
                  sampling->frequency_penalty != 0;
    size_t bias_bytes = sampling->n_logit_bias * sizeof(choir_logit_bias);
    size_t stop_bytes = sampling->n_stop_ids * sizeof(uint32_t);
    size_t count_bytes = counts ? (size_t)vocab * sizeof(uint32_t) : 0;
    choir_sampler *s =
        choir_alloc(CHOIR_MEM_REQUESTS, sizeof *s + bias_bytes + stop_bytes + 2 * count_bytes);
    if (s == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a sampler");
    *s = (choir_sampler){.sampling = *sampling, .vocab = vocab, .counts = counts};
    char *behind = (char *)(s + 1);
    if (bias_bytes > 0) memcpy(behind, sampling->logit_bias, bias_bytes);
    s->sampling.logit_bias = (const choir_logit_bias *)(void *)behind;
    behind += bias_bytes;
    if (stop_bytes > 0) memcpy(behind, sampling->stop_ids, stop_bytes);
    s->sampling.stop_ids = (const uint32_t *)(void *)behind;
    behind += stop_bytes;
    if (counts) {
        s->n_outputs = (uint32_t *)(void *)behind;
        memset(s->n_outputs, 0, count_bytes);
        s->seen = s->n_outputs + vocab;
    }
    s->changes_logits = counts || s->sampling.n_logit_bias > 0 ||
                        (s->sampling.min_tokens > 0 && s->sampling.n_stop_ids > 0);
    *out = s;
    return CHOIR_OK;
}

void choir_sampler_destroy(choir_sampler *sampler)
{
    choir_free(sampler);
}

uint32_t choir_sampler_n_drawn(const choir_sampler *sampler)
{
    return sampler->n_drawn;
}

choir_status choir_sampler_see_prompt(choir_sampler *s, const uint32_t *tokens, size_t n)
{
    if (s->n_drawn > 0)
        return choir_fail(CHOIR_E_PRECONDITION, "the prompt comes after %u drawn tokens",
                          s->n_drawn);
    for (size_t i = 0; i < n; i++)
        if (tokens[i] >= s->vocab)
            return choir_fail(CHOIR_E_INVALID, "prompt[%zu] is %u, the vocabulary has %u tokens", i,
                              tokens[i], s->vocab);
    if (!s->counts || s->sampling.repetition_penalty == 1) return CHOIR_OK;
    for (size_t i = 0; i < n; i++) {
        if (s->n_outputs[tokens[i]] == 0) s->seen[s->n_seen++] = tokens[i];
        s->n_outputs[tokens[i]] = IN_PROMPT;
    }
    return CHOIR_OK;
}

static void count_drawn(choir_sampler *s, uint32_t token)
{
    s->n_drawn++;
    if (!s->counts) return;
    if (s->n_outputs[token] == 0) s->seen[s->n_seen++] = token;
    s->n_outputs[token]++;
}

static float keep_finite(float x)
{
    return fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
}

/* Infinities hide from a sum of exponentials (exp(-inf) = 0), so the exponents' bits are looked at.
 */
static bool all_finite(const float *x, uint32_t n)
{
    typedef uint32_t word8 __attribute__((vector_size(32)));
    word8 bad = {0};
    uint32_t i = 0, rest = 0;
    for (; i + 8 <= n; i += 8) {
        word8 v;
        memcpy(&v, x + i, sizeof v);
        bad |= (v & 0x7FFFFFFF) + 0x00800000; /* carries into the top bit at exponent 255 */
    }
    for (; i < n; i++) {
        uint32_t v;
        memcpy(&v, x + i, sizeof v);
        rest |= (v & 0x7FFFFFFF) + 0x00800000;
    }
    for (int k = 0; k < 8; k++) rest |= bad[k];
    return rest >> 31 == 0;
}

static void find_top(const choir_kernels *kernels, const float *logits, uint32_t vocab,
                     uint32_t wanted, choir_sample *out)
{
    enum { BLOCK = 64 };
    float best[CHOIR_MAX_TOP_LOGPROBS];
    uint32_t n = 0;
    for (uint32_t from = 0; from < vocab && wanted > 0; from += BLOCK) {
        uint32_t end = vocab - from < BLOCK ? vocab : from + BLOCK;
        if (n == wanted && kernels->max(logits + from, end - from) <= best[n - 1]) continue;
        for (uint32_t i = from; i < end; i++) {
            if (n == wanted && logits[i] <= best[n - 1]) continue;
            uint32_t at = n < wanted ? n++ : n - 1;
            for (; at > 0 && logits[i] > best[at - 1]; at--) {
                best[at] = best[at - 1];
                out->top_tokens[at] = out->top_tokens[at - 1];
            }
            best[at] = logits[i];
            out->top_tokens[at] = i;
        }
    }
    out->n_top = n;
    memcpy(out->top_logprobs, best, n * sizeof *best);
}

static void change_scores(const choir_sampler *s, float *x)
{
    const choir_sampling *p = &s->sampling;
    for (uint32_t i = 0; i < p->n_logit_bias; i++)
        x[p->logit_bias[i].token] = keep_finite(x[p->logit_bias[i].token] + p->logit_bias[i].bias);
    for (uint32_t i = 0; i < s->n_seen; i++) {
        uint32_t token = s->seen[i], n = s->n_outputs[token] & ~(uint32_t)IN_PROMPT;
        float v = x[token];
        v = v > 0 ? v / p->repetition_penalty : v * p->repetition_penalty;
        v -= p->frequency_penalty * (float)n;
        v -= n > 0 ? p->presence_penalty : 0;
        x[token] = keep_finite(v);
    }
    if (s->n_drawn < p->min_tokens)
        for (uint32_t i = 0; i < p->n_stop_ids; i++) x[p->stop_ids[i]] = -INFINITY;
}

/* Uniform in [0, 1), a multiple of 2^-53; a function of seed, index and how many were drawn. */
static double uniform(const choir_sampler *s)
{
    const choir_philox counter = {{s->n_drawn, s->sampling.index, 0, 0}};
    choir_philox bits =
        choir_philox_draw(counter, (uint32_t)s->sampling.seed, (uint32_t)(s->sampling.seed >> 32));
    return (double)(((uint64_t)bits.word[1] << 32 | bits.word[0]) >> 11) * 0x1p-53;
}

static uint32_t choose(const choir_sampler *s, const choir_kernels *kernels, const float *logits,
                       float max, void *scratch)
{
    const choir_sampling *p = &s->sampling;
    if (p->temperature == 0 && !s->changes_logits)
        return candidates_first_of(kernels, logits, s->vocab, max);
    candidates c = candidates_begin(kernels, logits, s->vocab, scratch);
    if (s->changes_logits) change_scores(s, c.score);
    candidates_find_max(&c);
    if (p->temperature == 0) return candidates_first_of(kernels, c.score, c.n, c.max);
    candidates_top_k(&c, p->top_k);
    if (p->temperature != 1) candidates_temper(&c, p->temperature);
    candidates_top_p(&c, p->top_p);
    candidates_min_p(&c, p->min_p);
    return candidates_draw(&c, uniform(s));
}

choir_status choir_sampler_draw(choir_sampler *s, const struct choir_kernels *kernels,
                                float *logits, void *scratch, choir_sample *out)
{
    if (!all_finite(logits, s->vocab))
        return choir_fail(CHOIR_E_DATA_LOSS, "logits of output token %u are NaN or infinite",
                          s->n_drawn);
    float max = kernels->max(logits, s->vocab);
    double log_sum = max + log(kernels->sum_exp(logits, max, s->vocab));
    find_top(kernels, logits, s->vocab, s->sampling.top_logprobs, out);
    for (uint32_t i = 0; i < out->n_top; i++)
        out->top_logprobs[i] = (float)(out->top_logprobs[i] - log_sum);
    out->token = choose(s, kernels, logits, max, scratch);
    out->logprob = (float)(logits[out->token] - log_sum);
    count_drawn(s, out->token);
    return CHOIR_OK;
}
