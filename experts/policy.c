#include "experts/policy.h"

#include <math.h>
#include <string.h>

/* Aged counts are kept as they were at their last change: count(t) = count 2^((changed - t) /
 * half-life). A layer's time is the step of its last turn: those whose turn in this step is still
 * to come must not look colder than those that have had it. */
typedef struct use {
    float count, worth; /* uses; what the policy makes of them */
    uint32_t changed;   /* step */
    uint32_t last;      /* number of the layer's turn, over all steps, in which it was last used */
} use;

struct choir_policy {
    choir_policy_kind kind;
    uint32_t n_layers, n_experts, now;
    use *uses;         /* [n_layers, n_experts] */
    uint32_t *turn;    /* [n_layers] step of the layer's last turn */
    float *layer_cost; /* [n_layers] */
};

static const char *const texts[] = {"lru", "lfu", "router"};

const char *choir_policy_text(choir_policy_kind kind)
{
    return texts[kind];
}

bool choir_policy_parse(const char *text, choir_policy_kind *out)
{
    for (int k = 0; k < CHOIR_N_POLICIES; k++)
        if (strcmp(text, texts[k]) == 0) {
            *out = (choir_policy_kind)k;
            return true;
        }
    return false;
}

choir_status choir_policy_create(choir_policy_kind kind, uint32_t n_layers, uint32_t n_experts,
                                 choir_policy **out)
{
    choir_policy *p = choir_calloc(CHOIR_MEM_EXPERTS, 1, sizeof *p);
    if (p != NULL) {
        p->uses = choir_calloc(CHOIR_MEM_EXPERTS, (size_t)n_layers * n_experts, sizeof *p->uses);
        p->turn = choir_calloc(CHOIR_MEM_EXPERTS, n_layers, sizeof *p->turn);
        p->layer_cost = choir_calloc(CHOIR_MEM_EXPERTS, n_layers, sizeof *p->layer_cost);
    }
    if (p == NULL || p->uses == NULL || p->turn == NULL || p->layer_cost == NULL) {
        choir_policy_destroy(p);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory to keep the uses of %u experts", n_experts);
    }
    p->kind = kind;
    p->n_layers = n_layers;
    p->n_experts = n_experts;
    for (uint32_t l = 0; l < n_layers; l++) p->layer_cost[l] = 1;
    *out = p;
    return CHOIR_OK;
}

void choir_policy_destroy(choir_policy *p)
{
    if (p == NULL) return;
    choir_free(p->uses);
    choir_free(p->turn);
    choir_free(p->layer_cost);
    choir_free(p);
}

void choir_policy_step(choir_policy *p)
{
    p->now++;
}

static use *use_at(const choir_policy *p, uint32_t layer, uint32_t expert)
{
    return &p->uses[(size_t)layer * p->n_experts + expert];
}

static float age(const choir_policy *p, uint32_t layer, const use *u)
{
    return exp2f(-(float)(p->turn[layer] - u->changed) / CHOIR_POLICY_HALF_LIFE);
}

/* A use by a request that ends soon says less of the steps to come; weights say how clearly the
 * router wanted it. */
static float worth_of(const choir_policy *p, uint32_t n_rows, float weight, uint32_t remaining)
{
    if (p->kind != CHOIR_POLICY_ROUTER) return 1;
    float stays = remaining == 0 ? 1 : (float)remaining / (float)(remaining + 8);
    return stays * (0.5F + weight / (float)(n_rows > 0 ? n_rows : 1) + 0.1F * (float)(n_rows - 1));
}

void choir_policy_use(choir_policy *p, uint32_t layer, uint32_t expert, uint32_t n_rows,
                      float weight, uint32_t remaining)
{
    use *u = use_at(p, layer, expert);
    p->turn[layer] = p->now;
    float aged = age(p, layer, u);
    u->count = u->count * aged + 1;
    u->worth = u->worth * aged + worth_of(p, n_rows, weight, remaining);
    u->changed = p->now;
    u->last = p->now * p->n_layers + layer;
}

void choir_policy_set_layer_cost(choir_policy *p, uint32_t layer, float cost)
{
    p->layer_cost[layer] = cost;
}

double choir_policy_value(const choir_policy *p, uint32_t layer, uint32_t expert)
{
    const use *u = use_at(p, layer, expert);
    if (p->kind == CHOIR_POLICY_LRU) return u->last;
    return (double)(u->worth * age(p, layer, u) * p->layer_cost[layer]);
}

float choir_policy_heat(const choir_policy *p, uint32_t layer, uint32_t expert)
{
    const use *u = use_at(p, layer, expert);
    return u->count * age(p, layer, u);
}
