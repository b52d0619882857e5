#include "experts/policy.h"
#include <math.h>
#include <string.h>
struct choir_policy { uint32_t n_experts; double now; double *value; };
const char *choir_policy_text(choir_policy_kind k) { return k == CHOIR_POLICY_LRU ? "lru" : k == CHOIR_POLICY_LFU_AGED ? "lfu" : "router"; }
bool choir_policy_parse(const char *t, choir_policy_kind *out) { for (int k = 0; k < CHOIR_N_POLICIES; k++) if (!strcmp(t, choir_policy_text(k))) { *out = k; return true; } return false; }
choir_status choir_policy_create(choir_policy_kind k, uint32_t l, uint32_t n, choir_policy **out) { (void)k; choir_policy *p = choir_calloc(CHOIR_MEM_EXPERTS, 1, sizeof *p); if (!p) return choir_fail(CHOIR_E_NO_MEMORY, "no memory"); p->n_experts = n; p->value = choir_calloc(CHOIR_MEM_EXPERTS, (size_t)l * n, 8); if (!p->value) { choir_free(p); return choir_fail(CHOIR_E_NO_MEMORY, "no memory"); } *out = p; return CHOIR_OK; }
void choir_policy_destroy(choir_policy *p) { if (p) { choir_free(p->value); choir_free(p); } }
void choir_policy_step(choir_policy *p) { p->now++; }
void choir_policy_use(choir_policy *p, uint32_t l, uint32_t x, uint32_t n, float w, uint32_t r) { (void)n, (void)w, (void)r; double *v = &p->value[(size_t)l * p->n_experts + x]; double a = p->now / 64, d = *v == 0 ? a : fmax(*v, a) + log2(1 + exp2(fmin(*v, a) - fmax(*v, a))); *v = d; }
void choir_policy_hint(choir_policy *p, uint32_t l, uint32_t x, float q) { (void)p, (void)l, (void)x, (void)q; }
void choir_policy_set_layer_cost(choir_policy *p, uint32_t l, float c) { (void)p, (void)l, (void)c; }
double choir_policy_value(const choir_policy *p, uint32_t l, uint32_t x) { return p->value[(size_t)l * p->n_experts + x]; }
float choir_policy_heat(const choir_policy *p, uint32_t l, uint32_t x) { return (float)exp2(choir_policy_value(p, l, x) - p->now / 64); }
