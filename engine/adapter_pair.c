/* Two small matrices beside a large one, as changes of the base: of one matrix, of several that a
 * file has in one, of all experts of a layer, of the embedding. */
#include "engine/adapter_read.h"

#include <inttypes.h>
#include <string.h>

static void turn(const float *from, size_t rows, size_t cols, float *to)
{
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < cols; k++) to[k * rows + i] = from[i * cols + k];
}

/* kv_b_proj of latent attention makes every head's keys and values of the latent, and the base has
 * it head by head: a key's part turned, since it is multiplied into the query. With B's rows of a
 * head, W_k + B_k A is turned to W_k^T + A^T B_k^T: the factors change places. */
static choir_status add_head(choir_adapter_reader *r, const choir_adapter_spot *spot,
                             uint32_t place, const choir_adapter_pair *p, const float *a,
                             const float *b, uint32_t head)
{
    const choir_model_config *m = r->base;
    bool keys = spot->places[place]->role == CHOIR_ROLE_ATTN_K_B;
    size_t rank = p->rank, n = keys ? m->nope_dim : m->value_dim, latent = m->kv_lora_rank;
    choir_adapter_change c = choir_adapter_begin(r, spot->places[place], spot->layer, head);
    c.rank = p->rank;
    c.scale = p->scale;
    c.has = CHOIR_ADAPTER_HAS_LOW_RANK;
    c.a = a;
    if (b != NULL) {
        b += (head * ((size_t)m->nope_dim + m->value_dim) + (keys ? 0 : m->nope_dim)) * rank;
        c.b = b;
    }
    if (b != NULL && keys) {
        float *from_query, *to_latent;
        CHOIR_TRY(choir_adapter_floats(r, rank * n, &from_query));
        CHOIR_TRY(choir_adapter_floats(r, latent * rank, &to_latent));
        turn(b, n, rank, from_query);
        turn(a, rank, latent, to_latent);
        c.a = from_query;
        c.b = to_latent;
    }
    return choir_adapter_add(r, &c, p->a->name);
}

static choir_status add_to_heads(choir_adapter_reader *r, const choir_adapter_spot *spot,
                                 const choir_adapter_pair *p)
{
    const choir_model_config *m = r->base;
    const float *a, *b;
    uint64_t rows = (uint64_t)m->n_heads * (m->nope_dim + m->value_dim);
    CHOIR_TRY(choir_adapter_expect(r, p->a, p->rank, m->kv_lora_rank));
    CHOIR_TRY(choir_adapter_expect(r, p->b, rows, p->rank));
    if (p->a_bias != NULL || p->b_bias != NULL || p->magnitude != NULL ||
        p->act != CHOIR_ADAPTER_LINEAR || p->series)
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s: tensor '%.200s' changes kv_b_proj of latent attention, which Choir multiplies "
            "into "
            "queries and outputs head by head: it takes LoRA there, without DoRA and biases",
            r->name, p->a->name);
    CHOIR_TRY(choir_adapter_read(r, p->a, NULL, &a));
    CHOIR_TRY(choir_adapter_read(r, p->b, NULL, &b));
    for (uint32_t i = 0; i < spot->n_places; i++)
        for (uint32_t head = 0; head < m->n_heads; head++)
            CHOIR_TRY(add_head(r, spot, i, p, a, b, head));
    return CHOIR_OK;
}

/* A factor as f32, or where it lies. */
static choir_status read_factor(choir_adapter_reader *r, const choir_adapter_pair *p,
                                choir_adapter_tensor *t, const choir_adapter_rows *rows,
                                choir_tensor *lent, const float **out)
{
    bool plain = p->act == CHOIR_ADAPTER_LINEAR && !p->series && !p->residual &&
                 p->a_bias == NULL && p->magnitude == NULL;
    *out = NULL;
    *lent = (choir_tensor){0};
    if (plain) CHOIR_TRY(choir_adapter_lend(r, t, rows, lent));
    return lent->data != NULL ? CHOIR_OK : choir_adapter_read(r, t, rows, out);
}

/* A pair of one matrix, or of several that lie in one: they share A, and each has its rows of B. */
choir_status choir_adapter_add_pair(choir_adapter_reader *r, const choir_adapter_spot *spot,
                                    const choir_adapter_pair *p)
{
    const float *a, *a_bias = NULL;
    choir_tensor a_lent;
    uint64_t rows, cols;
    if (choir_adapter_is_of_heads(spot->places[0])) return add_to_heads(r, spot, p);
    choir_adapter_whole_shape(r, spot->places[0], &rows, &cols);
    CHOIR_TRY(choir_adapter_expect(r, p->a, p->rank, p->series || p->residual ? rows : cols));
    CHOIR_TRY(choir_adapter_expect(r, p->b, rows, p->rank));
    if (p->a_bias != NULL) CHOIR_TRY(choir_adapter_expect(r, p->a_bias, 0, p->rank));
    if (p->b_bias != NULL) CHOIR_TRY(choir_adapter_expect(r, p->b_bias, 0, rows));
    if (p->magnitude != NULL) CHOIR_TRY(choir_adapter_expect(r, p->magnitude, 0, rows));
    if (p->series && spot->places[0]->part != CHOIR_PART_ALL)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: tensor '%.200s' comes behind several matrices at once", r->name,
                          p->a->name);
    CHOIR_TRY(read_factor(r, p, p->a, NULL, &a_lent, &a));
    if (p->a_bias != NULL) CHOIR_TRY(choir_adapter_read(r, p->a_bias, NULL, &a_bias));
    for (uint32_t i = 0; i < spot->n_places; i++) {
        const choir_adapter_rows map = choir_adapter_rows_of(r, spot->places[i]);
        choir_adapter_change c = choir_adapter_begin(r, spot->places[i], spot->layer, spot->index);
        c.rank = p->rank;
        c.scale = p->scale;
        c.act = p->act;
        c.series = p->series;
        c.residual = p->residual;
        c.a = a;
        c.a_lent = a_lent;
        c.a_bias = a_bias;
        c.has = CHOIR_ADAPTER_HAS_LOW_RANK | (p->a_bias != NULL ? CHOIR_ADAPTER_HAS_A_BIAS : 0);
        CHOIR_TRY(read_factor(r, p, p->b, &map, &c.b_lent, &c.b));
        if (p->b_bias != NULL) {
            CHOIR_TRY(choir_adapter_read(r, p->b_bias, &map, &c.b_bias));
            c.has |= CHOIR_ADAPTER_HAS_B_BIAS;
        }
        if (p->magnitude != NULL) {
            CHOIR_TRY(choir_adapter_read(r, p->magnitude, &map, &c.magnitude));
            c.has |= CHOIR_ADAPTER_HAS_MAGNITUDE;
        }
        CHOIR_TRY(choir_adapter_add(r, &c, p->a->name));
    }
    return CHOIR_OK;
}

/* A token's row of the table and its column of A. PEFT has A as [rank, vocab], llama.cpp its
 * transpose. */
choir_status choir_adapter_add_embedding(choir_adapter_reader *r, const choir_adapter_spot *spot,
                                         const choir_adapter_pair *p)
{
    choir_adapter_change c = choir_adapter_begin(r, spot->places[0], 0, 0);
    bool turned = r->gguf != NULL;
    c.rank = p->rank;
    c.scale = p->scale;
    c.has = CHOIR_ADAPTER_HAS_LOW_RANK;
    CHOIR_TRY(choir_adapter_expect(r, p->a, turned ? c.rows : p->rank, turned ? p->rank : c.rows));
    CHOIR_TRY(choir_adapter_expect(r, p->b, c.cols, p->rank));
    if (!turned || r->headers_only) {
        CHOIR_TRY(choir_adapter_read(r, p->a, NULL, &c.a));
    } else {
        const float *from;
        float *to;
        CHOIR_TRY(choir_adapter_load(r, p->a, &from));
        CHOIR_TRY(choir_adapter_floats(r, (size_t)c.rows * p->rank, &to));
        turn(from, c.rows, p->rank, to);
        c.a = to;
    }
    CHOIR_TRY(choir_adapter_read(r, p->b, NULL, &c.b));
    if (p->magnitude != NULL) {
        CHOIR_TRY(choir_adapter_expect(r, p->magnitude, 0, c.cols));
        CHOIR_TRY(choir_adapter_read(r, p->magnitude, NULL, &c.magnitude));
        c.has |= CHOIR_ADAPTER_HAS_MAGNITUDE;
    }
    return choir_adapter_add(r, &c, p->a->name);
}

/* The pairs of all experts of a layer.
 * PEFT lays one beneath the other: expert e has the rows e rank … of the tensor whose rows are
 * ranks, and of the other's columns every n_experts-th from e on. The inputs are beside A, except
 * where PEFT took the parameter for its transpose: A and B have changed their sides then. llama.cpp
 * stacks [experts, rank, inputs] and [experts, outputs, rank]. */
typedef struct stack {
    uint32_t n_experts, rank;
    uint64_t rows, cols; /* of one expert's whole matrix */
    bool swapped, by_experts;
} stack;

/* Where number (k, i) of expert e's factor is: in the tensor whose rows are ranks, n to a row … */
static size_t in_ranks(const stack *s, uint64_t n, uint32_t e, uint32_t k, uint64_t i)
{
    return ((size_t)e * s->rank + k) * n + i;
}

/* … and in the one whose columns are, of n rows. */
static size_t in_columns(const stack *s, uint64_t n, uint32_t e, uint32_t k, uint64_t i)
{
    if (s->by_experts) return ((size_t)e * n + i) * s->rank + k;
    return (size_t)i * s->n_experts * s->rank + (size_t)k * s->n_experts + e;
}

static void gather_a(const stack *s, const float *from, float *to)
{
    for (uint32_t e = 0; e < s->n_experts; e++)
        for (uint32_t k = 0; k < s->rank; k++, to += s->cols)
            if (!s->swapped)
                memcpy(to, from + in_ranks(s, s->cols, e, k, 0), s->cols * sizeof *to);
            else
                for (uint64_t i = 0; i < s->cols; i++)
                    to[i] = from[in_columns(s, s->cols, e, k, i)];
}

static void gather_b(const stack *s, const choir_adapter_rows *map, const float *from, float *to)
{
    for (uint32_t e = 0; e < s->n_experts; e++)
        for (uint32_t i = 0; i < map->n; i++) {
            uint64_t row = choir_adapter_row(map, i);
            for (uint32_t k = 0; k < s->rank; k++)
                *to++ = from[s->swapped ? in_ranks(s, s->rows, e, k, row)
                                        : in_columns(s, s->rows, e, k, row)];
        }
}

static choir_status make_arrays(choir_adapter_reader *r, const stack *s, uint64_t n, float **out)
{
    size_t each;
    *out = NULL;
    if (r->headers_only) return CHOIR_OK;
    if (__builtin_mul_overflow((size_t)s->n_experts, (size_t)n, &each)) each = SIZE_MAX;
    return choir_adapter_floats(r, each, out);
}

static choir_status check_stack(const choir_adapter_reader *r, const choir_adapter_pair *p,
                                stack *s)
{
    uint64_t ranks = (uint64_t)s->n_experts * p->rank;
    if (s->by_experts) {
        CHOIR_TRY(choir_adapter_expect_stack(r, p->a, s->n_experts, p->rank, s->cols));
        return choir_adapter_expect_stack(r, p->b, s->n_experts, s->rows, p->rank);
    }
    /* A square matrix fits both ways: what wrote the file says which. */
    bool could = p->a->n_dims == 2 && p->b->n_dims == 2 && p->a->dims[1] == s->rows &&
                 p->b->dims[0] == s->cols;
    s->swapped = could && (s->rows != s->cols || p->swapped);
    CHOIR_TRY(choir_adapter_expect(r, p->a, ranks, s->swapped ? s->rows : s->cols));
    return choir_adapter_expect(r, p->b, s->swapped ? s->cols : s->rows, ranks);
}

choir_status choir_adapter_add_stack(choir_adapter_reader *r, const choir_adapter_spot *spot,
                                     const choir_adapter_pair *p)
{
    stack s = {.n_experts = choir_role_count(r->base, spot->places[0]->role),
               .rank = p->rank,
               .by_experts = r->gguf != NULL};
    float *a, *b;
    const float *from;
    choir_adapter_whole_shape(r, spot->places[0], &s.rows, &s.cols);
    CHOIR_TRY(check_stack(r, p, &s));
    p->a->used = p->b->used = true;
    CHOIR_TRY(make_arrays(r, &s, s.rank * s.cols, &a));
    if (a != NULL) {
        CHOIR_TRY(choir_adapter_load(r, s.swapped ? p->b : p->a, &from));
        gather_a(&s, from, a);
    }
    for (uint32_t i = 0; i < spot->n_places; i++) {
        const choir_adapter_rows map = choir_adapter_rows_of(r, spot->places[i]);
        CHOIR_TRY(make_arrays(r, &s, (uint64_t)map.n * s.rank, &b));
        if (b != NULL) {
            CHOIR_TRY(choir_adapter_load(r, s.swapped ? p->a : p->b, &from));
            gather_b(&s, &map, from, b);
        }
        for (uint32_t e = 0; e < s.n_experts; e++) {
            choir_adapter_change c = choir_adapter_begin(r, spot->places[i], spot->layer, e);
            c.rank = s.rank;
            c.scale = p->scale;
            c.has = CHOIR_ADAPTER_HAS_LOW_RANK;
            c.a = a == NULL ? NULL : a + (size_t)e * s.rank * s.cols;
            c.b = b == NULL ? NULL : b + (size_t)e * map.n * s.rank;
            CHOIR_TRY(choir_adapter_add(r, &c, p->a->name));
        }
    }
    return CHOIR_OK;
}
