/* WHAT    Who stays in memory: what each (layer, expert) is worth, from how it was used.
 * OWNS    A few numbers for each of them.
 * THREADS The engine thread.
 * ERRORS  CHOIR_E_NO_MEMORY at creation only.
 * LIMITS  value() and use() take constant time; nothing is allocated after creation.
 * NEXT    experts/slots.c, which evicts by it; bench/expert_cache.c, which compares the kinds with the
 *         optimum; docs/decisions/0007 for its numbers */
#pragma once
#include "base/base.h"

typedef enum choir_policy_kind {
    CHOIR_POLICY_LRU,      /* the last use counts */
    CHOIR_POLICY_LFU_AGED, /* uses count, half as much after CHOIR_POLICY_HALF_LIFE steps */
    CHOIR_POLICY_ROUTER,   /* the same, uses weighed by the router and by how long who wants it will run */
    CHOIR_N_POLICIES
} choir_policy_kind;
#define CHOIR_POLICY_DEFAULT CHOIR_POLICY_ROUTER
enum { CHOIR_POLICY_HALF_LIFE = 64 }; /* steps */

const char *choir_policy_text(choir_policy_kind kind); /* "lru", "lfu", "router" */
bool choir_policy_parse(const char *text, choir_policy_kind *out);

typedef struct choir_policy choir_policy;
choir_status choir_policy_create(choir_policy_kind kind, uint32_t n_layers, uint32_t n_experts,
                                 choir_policy **out) CHOIR_MUST_USE;
void choir_policy_destroy(choir_policy *policy);

void choir_policy_step(choir_policy *policy); /* a step begins: time goes on by one */
/* Rows of this step want the expert: so many, with this sum of weights; the longest of their requests may
 * draw `remaining` tokens more (0: unknown). Once a step and expert. */
void choir_policy_use(choir_policy *policy, uint32_t layer, uint32_t expert, uint32_t n_rows,
                      float weight, uint32_t remaining);
/* What a miss in the layer costs beside others (1: as much as the mean). */
void choir_policy_set_layer_cost(choir_policy *policy, uint32_t layer, float cost);
/* Among those that may go, the one with the smallest goes. Comparable at one time, not between times. */
double choir_policy_value(const choir_policy *policy, uint32_t layer, uint32_t expert);
/* Uses, aged: what a heat map shows. */
float choir_policy_heat(const choir_policy *policy, uint32_t layer, uint32_t expert);
