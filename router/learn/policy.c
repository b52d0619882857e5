#include "router/learn/policy.h"

#include <math.h>
#include <string.h>

enum { MAX_CLASS_WEIGHT = 4 };

/* --- randomness */

static uint64_t mix_bits(uint64_t z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ z >> 27) * 0x94D049BB133111EBULL;
    return z ^ z >> 31;
}

static uint64_t bits_of(uint64_t seed, uint64_t counter)
{
    return mix_bits(mix_bits(seed) + (counter + 1) * 0x9E3779B97F4A7C15ULL);
}

double choir_uniform(uint64_t seed, uint64_t counter)
{
    return (double)(bits_of(seed, counter) >> 11) * 0x1p-53;
}

/* --- features */

static double rms_of(const float *x, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sqrt(sum / n);
}

uint32_t choir_features_make(const float *hidden, uint32_t n_hidden, uint32_t n_tokens,
                             float entropy, uint64_t seed, float out[CHOIR_N_FEATURES])
{
    double rms = rms_of(hidden, n_hidden);
    double unit = rms > 0 ? 1 / (rms * sqrt(n_hidden)) : 0;
    uint32_t words = (n_hidden + 63) / 64;
    out[0] = 1;
    for (uint32_t r = 0; r < CHOIR_PROJECTED; r++) {
        double sum = 0;
        for (uint32_t w = 0; w < words; w++) {
            uint64_t signs = bits_of(seed, (uint64_t)r * words + w);
            for (uint32_t i = w * 64; i < n_hidden && i < (w + 1) * 64; i++, signs >>= 1)
                sum += (signs & 1) != 0 ? hidden[i] : -hidden[i];
        }
        out[1 + r] = (float)(sum * unit);
    }
    out[1 + CHOIR_PROJECTED] = logf((float)n_tokens + 1);
    out[2 + CHOIR_PROJECTED] = entropy;
    return CHOIR_N_FEATURES;
}

/* --- the reward's estimate */

void choir_reward_init(choir_reward_model *model, uint32_t n_plans)
{
    memset(model, 0, sizeof *model);
    model->n_plans = n_plans;
    model->prior = 0.5;
    for (uint32_t d = 0; d < CHOIR_N_FEATURES; d++) model->scale[d] = 1;
}

static void standardise(const choir_reward_model *model, const float *features, double *out)
{
    out[0] = 1;
    for (uint32_t d = 1; d < CHOIR_N_FEATURES; d++)
        out[d] = (features[d] - model->mean[d]) * model->scale[d];
}

/* Means and scales of the features over all events; a feature that never changes is left out. */
static void find_scales(const choir_reward_event *events, size_t n, choir_reward_model *model)
{
    const double least = 1e-6;
    for (uint32_t d = 1; d < CHOIR_N_FEATURES; d++) {
        double sum = 0, squares = 0;
        for (size_t i = 0; i < n; i++) sum += events[i].features[d];
        model->mean[d] = sum / (double)n;
        for (size_t i = 0; i < n; i++) {
            double x = events[i].features[d] - model->mean[d];
            squares += x * x;
        }
        double deviation = sqrt(squares / (double)n);
        model->scale[d] = deviation > least ? 1 / deviation : 0;
    }
}

typedef struct normal_equations {
    double gram[CHOIR_N_FEATURES][CHOIR_N_FEATURES], moment[CHOIR_N_FEATURES];
} normal_equations;

static void add_event(normal_equations *e, const double *x, double reward, double weight)
{
    for (uint32_t i = 0; i < CHOIR_N_FEATURES; i++) {
        double wx = weight * x[i];
        for (uint32_t j = 0; j <= i; j++) e->gram[i][j] += wx * x[j];
        e->moment[i] += wx * reward;
    }
}

/* Solves (gram + ridge) θ = moment by Cholesky's decomposition, in place. The mean, which is the
 * first feature's, is hardly shrunk. */
static void solve(normal_equations *e, double ridge, double *theta)
{
    enum { N = CHOIR_N_FEATURES };
    double(*a)[N] = e->gram;
    for (uint32_t i = 1; i < N; i++) a[i][i] += ridge;
    a[0][0] += 1e-3;
    for (uint32_t i = 0; i < N; i++) {
        for (uint32_t j = 0; j <= i; j++) {
            double sum = a[i][j];
            for (uint32_t k = 0; k < j; k++) sum -= a[i][k] * a[j][k];
            a[i][j] = i == j ? sqrt(sum) : sum / a[j][j];
        }
    }
    for (uint32_t i = 0; i < N; i++) {
        double sum = e->moment[i];
        for (uint32_t k = 0; k < i; k++) sum -= a[i][k] * theta[k];
        theta[i] = sum / a[i][i];
    }
    for (uint32_t i = N; i-- > 0;) {
        double sum = theta[i];
        for (uint32_t k = i + 1; k < N; k++) sum -= a[k][i] * theta[k];
        theta[i] = sum / a[i][i];
    }
}

/* θ' gram θ - 2 θ' moment: the squared errors of θ on the events that the equations are of, up to a
 * constant. */
static double errors_of(const normal_equations *e, const double *theta)
{
    double sum = 0;
    for (uint32_t i = 0; i < CHOIR_N_FEATURES; i++) {
        for (uint32_t j = 0; j < i; j++) sum += 2 * theta[i] * e->gram[i][j] * theta[j];
        sum += theta[i] * (e->gram[i][i] * theta[i] - 2 * e->moment[i]);
    }
    return sum;
}

/* Each half's estimate is tried on the other half. */
static double best_ridge(const normal_equations half[2], normal_equations *scratch)
{
    static const double ridges[] = {1000, 100, 10, 1, 0.1};
    double best = ridges[0], least = INFINITY;
    for (size_t i = 0; i < sizeof ridges / sizeof *ridges; i++) {
        double theta[CHOIR_N_FEATURES], errors = 0;
        for (int h = 0; h < 2; h++) {
            *scratch = half[h];
            solve(scratch, ridges[i] / 2, theta);
            errors += errors_of(&half[1 - h], theta);
        }
        if (errors < least) {
            least = errors;
            best = ridges[i];
        }
    }
    return best;
}

typedef struct fit_scratch {
    normal_equations half[2], whole;
} fit_scratch;

static void fit_plan(const choir_reward_event *events, size_t n, const float *weights,
                     uint32_t plan, fit_scratch *s, choir_reward_model *model)
{
    double x[CHOIR_N_FEATURES];
    memset(s->half, 0, sizeof s->half);
    model->n_events[plan] = 0;
    for (size_t i = 0; i < n; i++) {
        if (events[i].chosen != plan || events[i].weight <= 0) continue;
        standardise(model, events[i].features, x);
        add_event(&s->half[model->n_events[plan]++ % 2], x, events[i].reward,
                  (double)events[i].weight * weights[i]);
    }
    if (model->n_events[plan] == 0) return;
    double ridge = best_ridge(s->half, &s->whole);
    for (uint32_t i = 0; i < CHOIR_N_FEATURES; i++) {
        s->whole.moment[i] = s->half[0].moment[i] + s->half[1].moment[i];
        for (uint32_t j = 0; j <= i; j++)
            s->whole.gram[i][j] = s->half[0].gram[i][j] + s->half[1].gram[i][j];
    }
    solve(&s->whole, ridge, model->theta[plan]);
}

static uint32_t best_of(const double *value, uint32_t n, uint32_t allowed)
{
    uint32_t best = 0;
    for (uint32_t a = 1; a < n; a++)
        if ((allowed >> a & 1) != 0 && value[a] > value[best]) best = a;
    return best;
}

/* Each domain would weigh as much as the others together, were it not for the limits. */
static void weigh_domains(const choir_reward_event *events, size_t n,
                          const choir_reward_model *first, float *weights)
{
    size_t counts[CHOIR_MAX_CANDIDATES] = {0};
    uint32_t n_domains = 0;
    for (size_t i = 0; i < n; i++) {
        double value[CHOIR_MAX_CANDIDATES];
        choir_reward_predict(first, events[i].features, value);
        uint32_t domain = best_of(value, first->n_plans, UINT32_MAX);
        n_domains += counts[domain]++ == 0;
        weights[i] = (float)domain;
    }
    for (size_t i = 0; i < n; i++) {
        double even = (double)n / n_domains / (double)counts[(uint32_t)weights[i]];
        weights[i] = (float)fmin(fmax(even, 1), MAX_CLASS_WEIGHT);
    }
}

choir_status choir_reward_fit(const choir_reward_event *events, size_t n, uint32_t n_plans,
                              const choir_reward_options *options, choir_reward_model *out)
{
    choir_reward_init(out, n_plans);
    if (n == 0) return CHOIR_OK;
    fit_scratch *s = choir_alloc(CHOIR_MEM_LEARNING, sizeof *s);
    float *weights = choir_alloc(CHOIR_MEM_LEARNING, n * sizeof *weights);
    choir_status status = CHOIR_OK;
    if (s == NULL || weights == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory to learn from %zu events", n);
        goto done;
    }
    double sum = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)events[i].weight * events[i].reward;
        all += events[i].weight;
        weights[i] = 1;
    }
    if (all > 0) out->prior = sum / all;
    find_scales(events, n, out);
    for (int pass = 0; pass < (options->class_weights ? 2 : 1); pass++) {
        if (pass == 1) weigh_domains(events, n, out, weights);
        for (uint32_t a = 0; a < n_plans; a++) fit_plan(events, n, weights, a, s, out);
    }
done:
    choir_free(s);
    choir_free(weights);
    return status;
}

void choir_reward_predict(const choir_reward_model *model, const float features[CHOIR_N_FEATURES],
                          double out[CHOIR_MAX_CANDIDATES])
{
    double x[CHOIR_N_FEATURES];
    standardise(model, features, x);
    for (uint32_t a = 0; a < model->n_plans; a++) {
        double sum = 0;
        for (uint32_t d = 0; d < CHOIR_N_FEATURES; d++) sum += model->theta[a][d] * x[d];
        if (model->n_events[a] == 0) sum = model->prior;
        out[a] = fmin(fmax(sum, 0), 1);
    }
}

/* --- policies */

static uint32_t n_allowed(uint32_t n_plans, uint32_t allowed)
{
    uint32_t n = 0;
    for (uint32_t a = 0; a < n_plans; a++) n += allowed >> a & 1;
    return n;
}

void choir_routing_distribution(const choir_routing *policy, uint32_t n_plans, uint32_t allowed,
                                const float features[CHOIR_N_FEATURES],
                                double out[CHOIR_MAX_CANDIDATES])
{
    double value[CHOIR_MAX_CANDIDATES];
    uint32_t sole = 0;
    allowed |= 1;
    memset(out, 0, CHOIR_MAX_CANDIDATES * sizeof *out);
    switch (policy->kind) {
    case CHOIR_ROUTING_UNIFORM:
        for (uint32_t a = 0; a < n_plans; a++)
            out[a] = (allowed >> a & 1) / (double)n_allowed(n_plans, allowed);
        return;
    case CHOIR_ROUTING_GREEDY:
        choir_reward_predict(&policy->model, features, value);
        sole = best_of(value, n_plans < policy->model.n_plans ? n_plans : policy->model.n_plans,
                       allowed);
        break;
    case CHOIR_ROUTING_FIXED:
        sole = policy->plan < n_plans && (allowed >> policy->plan & 1) != 0 ? policy->plan : 0;
        break;
    }
    out[sole] = 1;
}

double choir_explore_floor(const choir_explore_options *options, uint32_t n_plans)
{
    return options->epsilon * options->eta / n_plans;
}

static void square_cb(const double *value, uint32_t n_plans, uint32_t allowed, double gamma,
                      double *q)
{
    uint32_t best = best_of(value, n_plans, allowed), k = n_allowed(n_plans, allowed);
    double rest = 1;
    for (uint32_t a = 0; a < n_plans; a++) {
        q[a] = 0;
        if ((allowed >> a & 1) == 0 || a == best) continue;
        q[a] = 1 / (k + gamma * (value[best] - value[a]));
        rest -= q[a];
    }
    q[best] = rest;
}

void choir_explore_probabilities(const choir_explore_options *options, const choir_explore_mix *mix,
                                 uint32_t n_plans, uint32_t allowed,
                                 const float features[CHOIR_N_FEATURES],
                                 double out[CHOIR_MAX_CANDIDATES])
{
    double champion[CHOIR_MAX_CANDIDATES], challenger[CHOIR_MAX_CANDIDATES] = {0};
    double former[CHOIR_MAX_CANDIDATES] = {0}, value[CHOIR_MAX_CANDIDATES], q[CHOIR_MAX_CANDIDATES];
    allowed |= 1;
    uint32_t k = n_allowed(n_plans, allowed);
    double share = mix->challenger != NULL ? mix->share : 0;
    double kept = mix->former != NULL ? options->watch : 0;
    choir_routing_distribution(mix->champion, n_plans, allowed, features, champion);
    if (mix->challenger != NULL)
        choir_routing_distribution(mix->challenger, n_plans, allowed, features, challenger);
    if (mix->former != NULL)
        choir_routing_distribution(mix->former, n_plans, allowed, features, former);
    choir_reward_predict(mix->estimate, features, value);
    square_cb(value, n_plans, allowed, options->gamma * sqrt((double)k * (double)mix->n_events), q);
    memset(out, 0, CHOIR_MAX_CANDIDATES * sizeof *out);
    for (uint32_t a = 0; a < n_plans; a++) {
        if ((allowed >> a & 1) == 0) continue;
        double follow = (1 - share) * champion[a] + share * challenger[a];
        double explore = (1 - options->eta) * q[a] + options->eta / k;
        out[a] =
            (1 - options->epsilon - kept) * follow + kept * former[a] + options->epsilon * explore;
    }
}

uint32_t choir_explore_draw(const double *probability, uint32_t n_plans, uint64_t seed)
{
    double u = choir_uniform(seed, 0), sum = 0;
    uint32_t last = 0;
    for (uint32_t a = 0; a < n_plans; a++) {
        if (probability[a] <= 0) continue;
        sum += probability[a];
        last = a;
        if (u < sum) return a;
    }
    return last; /* the sum is 1 up to rounding */
}
