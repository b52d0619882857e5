/* Attention: head sizes, group sizes, windows and positions; unused page slots hold NaN, and a
 * query's bits must not depend on the queries beside it. */
#include "tests/kernels/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct shape {
    uint32_t n_heads, n_kv_heads, key_dim, page_tokens, window, position, n_queries;
    uint32_t value_dim; /* 0: key_dim */
    uint32_t chunk;
    float softcap;
    bool sinks, latent;
} shape;

// clang-format off
static const shape shapes[] = {
    {9, 3, 64, 32,  0,   0, 16},
    {9, 3, 64, 32,  0, 100, 16},
    {9, 3, 64, 32,  0, 511,  1},
    {3, 3,  5, 16,  0,   3,  7},
    {4, 1, 17, 16,  0,  60, 13},
    {2, 2, 32, 32, 10,   5, 16},
    {2, 1, 65, 32, 64, 190, 16},
    {8, 2, 48, 16, 33, 127,  9},
    {20, 2, 16,  7, 0, 129,  3},
    {1, 1,  1, 32,  0,   0,  1},
    {6, 2, 80, 32, 1,   77,  5},
    {2, 1, 128, 32, 0, 1000, 4},
    {6, 2, 24, 32, 0,   70, 16, .value_dim = 40},
    {4, 2, 24, 32, 0,   90, 16, .chunk = 32},
    {4, 2, 24, 16, 12,  90, 9, .chunk = 50, .softcap = 0.7F},
    {4, 4, 33, 32, 0,  200, 3, .softcap = 50},
    {9, 3, 20, 32, 24,  30, 16, .sinks = true},
    {3, 1, 16, 32, 0,    0, 5, .sinks = true, .softcap = 2},
    {5, 1, 40, 32, 0,   77, 16, .value_dim = 32, .latent = true},
    {18, 1, 72, 32, 0, 130, 4, .value_dim = 50, .latent = true},
};
// clang-format on

typedef struct cache {
    uint8_t *data;
    uint32_t *pages, n_pages;
    size_t page_bytes;
} cache;

static uint32_t value_dim_of(const shape *s)
{
    return s->value_dim != 0 ? s->value_dim : s->key_dim;
}

static const float sinks[] = {0.5F, -3, 2, 0, 1.25F, -0.125F, 4, -1, 0.75F};

static const uint16_t half_nan = 0x7e00;

/* Pages in shuffled order; only slots below n_keys hold numbers. */
static cache make_cache(const shape *s, uint32_t n_keys)
{
    cache c = {.n_pages = n_keys / s->page_tokens + 2};
    size_t keys = (size_t)s->page_tokens * s->key_dim;
    size_t values = s->latent ? 0 : (size_t)s->page_tokens * value_dim_of(s);
    c.page_bytes = s->n_kv_heads * (keys + values) * sizeof(uint16_t);
    c.data = malloc(c.n_pages * c.page_bytes);
    c.pages = malloc(c.n_pages * sizeof *c.pages);
    CHOIR_ASSERT(c.data != NULL && c.pages != NULL);
    for (uint32_t i = 0; i < c.n_pages; i++) c.pages[i] = c.n_pages - 1 - i;
    for (size_t i = 0; i < c.n_pages * c.page_bytes / 2; i++) ((uint16_t *)c.data)[i] = half_nan;
    for (uint32_t key = 0; key < n_keys; key++)
        for (uint32_t part = 0; part < (s->latent ? 1 : 2) * s->n_kv_heads; part++) {
            bool v = part >= s->n_kv_heads;
            uint32_t dims = v ? value_dim_of(s) : s->key_dim;
            uint16_t *at = (uint16_t *)(c.data + c.pages[key / s->page_tokens] * c.page_bytes) +
                           (v ? s->n_kv_heads * keys + (part - s->n_kv_heads) * values
                              : part * keys) +
                           key % s->page_tokens * dims;
            for (uint32_t d = 0; d < dims; d++)
                at[d] = (uint16_t)(check_below(2) << 15 | (12 + check_below(4)) << 10 |
                                   check_below(1024));
        }
    return c;
}

/* Queries [first, first + n) of the shape's, written at their places in `out`. */
static void attend(const choir_kernels *k, const shape *s, const cache *c, const float *q,
                   float *out, uint32_t first, uint32_t n)
{
    size_t floats = choir_attention_scratch_floats(s->n_heads, s->key_dim, value_dim_of(s));
    guarded scratch = check_alloc(floats * sizeof(float));
    size_t at = (size_t)first * s->n_heads;
    uint32_t group = s->n_heads / s->n_kv_heads;
    for (uint32_t head = 0; head < s->n_kv_heads; head++)
        k->attention(&(choir_attention_block){.q = q + at * s->key_dim,
                                              .out = out + at * value_dim_of(s),
                                              .n_queries = n,
                                              .position = s->position + first,
                                              .n_heads = s->n_heads,
                                              .n_kv_heads = s->n_kv_heads,
                                              .kv_head = head,
                                              .first_head = head * group,
                                              .n_block_heads = group,
                                              .key_dim = s->key_dim,
                                              .value_dim = value_dim_of(s),
                                              .latent = s->latent,
                                              .chunk = s->chunk,
                                              .softcap = s->softcap,
                                              .sinks = s->sinks ? sinks : NULL,
                                              .page_tokens = s->page_tokens,
                                              .window = s->window,
                                              .scale = 1.0F / sqrtf((float)s->key_dim),
                                              .pages = c->pages,
                                              .kv = c->data,
                                              .page_stride = c->page_bytes,
                                              .scratch = scratch.data});
    check_true("attention's scratch", check_guards(&scratch));
    check_free(&scratch);
}

/* In double, without any cuts: what the reference itself is held to. */
static double plain(const shape *s, const cache *c, const float *q, uint32_t query, uint32_t head,
                    uint32_t dim)
{
    uint32_t kv_head = head / (s->n_heads / s->n_kv_heads), last = s->position + query;
    uint32_t first = choir_first_key(last, s->window, s->chunk), vd = value_dim_of(s);
    double sum = s->sinks ? exp((double)sinks[head]) : 0, total = 0;
    size_t keys = (size_t)s->page_tokens * s->key_dim, values = (size_t)s->page_tokens * vd;
    for (uint32_t key = first; key <= last; key++) {
        float k[256], v[256];
        const uint8_t *page = c->data + c->pages[key / s->page_tokens] * c->page_bytes;
        const uint16_t *at =
            (const uint16_t *)page + kv_head * keys + key % s->page_tokens * s->key_dim;
        choir_tensor row = {CHOIR_F16, 1, s->key_dim, at, 0};
        choir_tensor_row(&row, 0, k);
        if (!s->latent)
            at = (const uint16_t *)page + s->n_kv_heads * keys + kv_head * values +
                 key % s->page_tokens * vd;
        row = (choir_tensor){CHOIR_F16, 1, vd, at, 0};
        choir_tensor_row(&row, 0, v);
        double dot = 0, cap = (double)s->softcap;
        for (uint32_t d = 0; d < s->key_dim; d++)
            dot += (double)q[((size_t)query * s->n_heads + head) * s->key_dim + d] * (double)k[d];
        dot /= sqrt((double)s->key_dim);
        double p = exp(cap != 0 ? cap * tanh(dot / cap) : dot);
        sum += p;
        total += p * (double)v[dim];
    }
    return total / sum;
}

static void check_against_plain(const shape *s, const cache *c, const float *q, const float *out)
{
    for (uint32_t i = 0; i < 20; i++) {
        uint32_t query = check_below(s->n_queries), head = check_below(s->n_heads);
        uint32_t dim = check_below(value_dim_of(s));
        double expected = plain(s, c, q, query, head, dim);
        double got = (double)out[((size_t)query * s->n_heads + head) * value_dim_of(s) + dim];
        check_true(check_label("attention by its formula: %g for %g", got, expected),
                   fabs(got - expected) <= 2e-6 * (1 + fabs(expected)));
    }
}

static void check_shape(const choir_kernels *ref, const choir_kernels *k, const shape *s)
{
    size_t heads = (size_t)s->n_queries * s->n_heads, n = heads * s->key_dim;
    cache c = make_cache(s, s->position + s->n_queries);
    guarded q = check_alloc(n * sizeof(float));
    guarded expected = check_alloc(heads * value_dim_of(s) * sizeof(float));
    guarded got = check_alloc(expected.bytes);
    for (size_t i = 0; i < n; i++) ((float *)q.data)[i] = (float)check_below(2001) * 1e-3F - 1;
    attend(ref, s, &c, q.data, expected.data, 0, s->n_queries);
    check_against_plain(s, &c, q.data, expected.data);
    const char *text =
        check_label("attention dims=%u/%u heads=%u/%u window=%u position=%u queries=%u", s->key_dim,
                    value_dim_of(s), s->n_heads, s->n_kv_heads, s->window, s->position,
                    s->n_queries);
    attend(k, s, &c, q.data, got.data, 0, s->n_queries);
    check_same(text, &expected, &got);
    for (uint32_t first = 0, cut = 1; first < s->n_queries;
         first += cut, cut = 1 + check_below(5)) {
        if (cut > s->n_queries - first) cut = s->n_queries - first;
        attend(k, s, &c, q.data, got.data, first, cut);
    }
    check_same(text, &expected, &got);
    check_free(&q);
    check_free(&expected);
    check_free(&got);
    free(c.data);
    free(c.pages);
}

void check_attention(const choir_kernels *ref, const choir_kernels *k)
{
    for (uint32_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_shape(ref, k, &shapes[i]);
}
