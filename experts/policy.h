#pragma once
#include "base/base.h"
typedef enum choir_policy_kind { CHOIR_POLICY_LRU, CHOIR_POLICY_LFU_AGED, CHOIR_POLICY_ROUTER, CHOIR_N_POLICIES } choir_policy_kind;
#define CHOIR_POLICY_DEFAULT CHOIR_POLICY_LFU_AGED
const char *choir_policy_text(choir_policy_kind kind);
bool choir_policy_parse(const char *text, choir_policy_kind *out);
typedef struct choir_policy choir_policy;
choir_status choir_policy_create(choir_policy_kind kind, uint32_t n_layers, uint32_t n_experts, choir_policy **out) CHOIR_MUST_USE;
void choir_policy_destroy(choir_policy *policy);
void choir_policy_step(choir_policy *policy);
void choir_policy_use(choir_policy *policy, uint32_t layer, uint32_t expert, uint32_t n_rows, float weight, uint32_t remaining);
void choir_policy_hint(choir_policy *policy, uint32_t layer, uint32_t expert, float probability);
void choir_policy_set_layer_cost(choir_policy *policy, uint32_t layer, float cost);
double choir_policy_value(const choir_policy *policy, uint32_t layer, uint32_t expert);
float choir_policy_heat(const choir_policy *policy, uint32_t layer, uint32_t expert);
