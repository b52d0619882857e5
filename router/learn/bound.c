#include "router/learn/bound.h"

#include <math.h>

double choir_difference(const double *newer, const double *older, const double *value,
                        uint32_t n_plans, uint32_t chosen, double probability, double reward)
{
    double direct = 0;
    for (uint32_t a = 0; a < n_plans; a++) direct += (newer[a] - older[a]) * value[a];
    return direct + (newer[chosen] - older[chosen]) / probability * (reward - value[chosen]);
}

void choir_bound_init(choir_bound *bound, double p_min, double alpha)
{
    *bound = (choir_bound){.k = 1 + 1 / p_min, .log_one_over_alpha = -log(alpha)};
}

static double center_of(const choir_bound *b)
{
    double mean = b->n > 0 ? b->sum_xi / (double)b->n : 0;
    return fmin(mean, 1 / (b->k + 1));
}

/* λ_t = min(3/4, √(2 ln(1/α) / (σ̂² t ln(1 + t)))), from the past alone; one observation that is off
 * by one reward stands in for a past that is not there yet. */
static double lambda_of(const choir_bound *b)
{
    double t = (double)b->n + 1, unit = 1 / (b->k + 1);
    double variance = (unit * unit + b->sum_squares) / t;
    double lambda = sqrt(2 * b->log_one_over_alpha / (variance * t * log(1 + t)));
    return fmin(lambda, 0.75);
}

void choir_bound_add(choir_bound *b, double difference)
{
    CHOIR_ASSERT(fabs(difference) <= b->k * (1 + 1e-9));
    double xi = difference / (b->k + 1), lambda = lambda_of(b), off = xi - center_of(b);
    b->sum_lambda += lambda;
    b->sum_lambda_xi += lambda * xi;
    b->sum_penalty += (-log1p(-lambda) - lambda) * off * off;
    b->sum_squares += off * off;
    b->sum_xi += xi;
    b->n++;
}

double choir_bound_lower(const choir_bound *b)
{
    if (b->n == 0) return -b->k;
    double lower = (b->sum_lambda_xi - b->log_one_over_alpha - b->sum_penalty) / b->sum_lambda;
    return fmax((b->k + 1) * lower, -b->k);
}

double choir_bound_mean(const choir_bound *b)
{
    return b->n > 0 ? (b->k + 1) * b->sum_xi / (double)b->n : 0;
}
