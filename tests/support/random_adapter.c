#include "tests/support/random_adapter.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CHANGES = 4096, MAX_ARRAYS = 4 * MAX_CHANGES };

struct random_adapter {
    choir_adapter_data data;
    choir_adapter_change changes[MAX_CHANGES];
    float *arrays[MAX_ARRAYS];
    uint32_t n_arrays;
    uint64_t state;
};

static double uniform(random_adapter *r)
{
    r->state = r->state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(r->state >> 40) / (1 << 24);
}

/* n numbers about `middle`. */
static const float *numbers(random_adapter *r, size_t n, double middle, double spread)
{
    float *p = malloc(n * sizeof *p);
    CHOIR_ASSERT(p != NULL && r->n_arrays < MAX_ARRAYS);
    r->arrays[r->n_arrays++] = p;
    for (size_t i = 0; i < n; i++)
        p[i] = (float)(middle + spread * (uniform(r) + uniform(r) + uniform(r) - 1.5));
    r->data.n_parameters += n;
    return p;
}

static void add_low_rank(random_adapter *r, choir_adapter_change *c)
{
    bool embedding = c->role == CHOIR_ROLE_EMBEDDING;
    uint32_t in = embedding || c->series || c->residual ? c->rows : c->cols;
    uint32_t out = embedding ? c->cols : c->rows;
    c->rank = 1 + (uint32_t)(uniform(r) * 9);
    c->scale = 0.5F + (float)uniform(r);
    c->a = numbers(r, (size_t)c->rank * in, 0, embedding ? 0.5 : 1.5 / sqrt(in));
    c->b = numbers(r, (size_t)out * c->rank, 0, 0.3);
    c->has |= CHOIR_ADAPTER_HAS_LOW_RANK;
    if (c->rank > r->data.max_rank) r->data.max_rank = c->rank;
}

static void add_biases(random_adapter *r, choir_adapter_change *c)
{
    c->a_bias = numbers(r, c->rank, 0, 0.2);
    c->b_bias = numbers(r, c->rows, 0, 0.2);
    c->has |= CHOIR_ADAPTER_HAS_A_BIAS | CHOIR_ADAPTER_HAS_B_BIAS;
}

static bool in_attention(choir_role role)
{
    return role == CHOIR_ROLE_ATTN_Q || role == CHOIR_ROLE_ATTN_K || role == CHOIR_ROLE_ATTN_V ||
           role == CHOIR_ROLE_ATTN_OUT || role == CHOIR_ROLE_ATTN_Q_A ||
           role == CHOIR_ROLE_ATTN_Q_B || role == CHOIR_ROLE_ATTN_KV_A;
}

static bool is_matrix(choir_role role)
{
    return !choir_role_is_vector(role) && role != CHOIR_ROLE_SHARED_ROUTER;
}

static bool is_head_part(choir_role role)
{
    return role == CHOIR_ROLE_ATTN_K_B || role == CHOIR_ROLE_ATTN_V_B;
}

static void add_ia3(random_adapter *r, choir_adapter_change *c)
{
    if (c->role == CHOIR_ROLE_ATTN_K || c->role == CHOIR_ROLE_ATTN_V) {
        c->out_scale = numbers(r, c->rows, 1, 0.3);
        c->has |= CHOIR_ADAPTER_HAS_OUT_SCALE;
    } else if (c->role == CHOIR_ROLE_FFN_DOWN || c->role == CHOIR_ROLE_SHARED_DOWN) {
        c->in_scale = numbers(r, c->cols, 1, 0.3);
        c->has |= CHOIR_ADAPTER_HAS_IN_SCALE;
    }
}

static void add_bottleneck(random_adapter *r, choir_adapter_change *c)
{
    static const choir_adapter_act acts[] = {CHOIR_ADAPTER_TANH, CHOIR_ADAPTER_RELU,
                                             CHOIR_ADAPTER_GELU, CHOIR_ADAPTER_GELU_TANH,
                                             CHOIR_ADAPTER_SILU};
    if (!in_attention(c->role) && c->role != CHOIR_ROLE_FFN_UP && c->role != CHOIR_ROLE_FFN_DOWN)
        return;
    bool last = c->role == CHOIR_ROLE_ATTN_OUT || c->role == CHOIR_ROLE_FFN_DOWN;
    c->series = last && uniform(r) < 0.6;
    c->residual = last && uniform(r) < 0.6;
    c->act = acts[(uint32_t)(uniform(r) * 5)];
    add_low_rank(r, c);
    add_biases(r, c);
}

static void add_saved(random_adapter *r, choir_adapter_change *c)
{
    bool norm = c->role == CHOIR_ROLE_ATTN_NORM || c->role == CHOIR_ROLE_OUTPUT_NORM;
    bool whole = c->role == CHOIR_ROLE_HEAD || c->role == CHOIR_ROLE_EMBEDDING;
    if (norm || whole) {
        c->weight = norm ? numbers(r, c->cols, 1, 0.3)
                         : numbers(r, (size_t)c->rows * c->cols, 0, 1 / sqrt(c->cols));
        c->has |= CHOIR_ADAPTER_HAS_WEIGHT;
    } else if (in_attention(c->role)) {
        add_low_rank(r, c);
    }
}

static void fill(random_adapter *r, random_adapter_kind kind, choir_adapter_change *c)
{
    bool matrix = is_matrix(c->role);
    if (kind == RANDOM_SAVED) {
        add_saved(r, c);
    } else if (!matrix) {
        return;
    } else if (kind == RANDOM_IA3) {
        add_ia3(r, c);
    } else if (kind == RANDOM_BOTTLENECK) {
        add_bottleneck(r, c);
    } else if (kind == RANDOM_LORA || (kind == RANDOM_ATTENTION && in_attention(c->role)) ||
               (kind == RANDOM_EXPERTS &&
                (choir_role_is_routed(c->role) || c->role == CHOIR_ROLE_ROUTER))) {
        add_low_rank(r, c);
    } else if (kind == RANDOM_DORA && c->role != CHOIR_ROLE_EMBEDDING &&
               !choir_role_is_routed(c->role) && !is_head_part(c->role)) {
        add_low_rank(r, c);
        c->magnitude = numbers(r, c->rows, 1, 0.3);
        c->has |= CHOIR_ADAPTER_HAS_MAGNITUDE;
    }
}

static int by_place(const void *a, const void *b)
{
    const choir_adapter_change *x = a, *y = b;
    if (x->layer != y->layer) return x->layer < y->layer ? -1 : 1;
    if (x->role != y->role) return x->role < y->role ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

random_adapter *random_adapter_make(const choir_model_config *base, random_adapter_kind kind,
                                    uint32_t seed)
{
    random_adapter *r = calloc(1, sizeof *r);
    CHOIR_ASSERT(r != NULL);
    r->state = seed * UINT64_C(0x9E3779B97F4A7C15) + kind;
    r->data.changes = r->changes;
    r->data.digest = ((uint64_t)seed << 8) + kind + 1;
    strcpy(r->data.kind, "random");
    for (choir_role_place at = {0}; choir_next_tensor(base, &at);) {
        uint64_t rows, cols;
        choir_role_shape(base, at.role, &rows, &cols);
        CHOIR_ASSERT(r->data.n_changes < MAX_CHANGES);
        choir_adapter_change *c = &r->changes[r->data.n_changes];
        *c = (choir_adapter_change){.role = at.role,
                                    .layer = at.layer,
                                    .index = at.index,
                                    .rows = (uint32_t)rows,
                                    .cols = (uint32_t)cols};
        fill(r, kind, c);
        if (c->has != 0) r->data.n_changes++;
    }
    qsort(r->changes, r->data.n_changes, sizeof *r->changes, by_place);
    return r;
}

const choir_adapter_data *random_adapter_data(const random_adapter *r)
{
    return &r->data;
}

void random_adapter_free(random_adapter *r)
{
    for (uint32_t i = 0; i < r->n_arrays; i++) free(r->arrays[i]);
    free(r);
}
