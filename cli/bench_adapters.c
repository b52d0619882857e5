#include "cli/bench_adapters.h"

#include <stdlib.h>
#include <string.h>

#define BIT CHOIR_ROLE_BIT
static const uint64_t attention = BIT(ATTN_Q) | BIT(ATTN_K) | BIT(ATTN_V) | BIT(ATTN_OUT) |
                                  BIT(ATTN_Q_A) | BIT(ATTN_Q_B) | BIT(ATTN_KV_A);
static const uint64_t mlp = BIT(FFN_GATE) | BIT(FFN_UP) | BIT(FFN_DOWN) | BIT(EXPERT_GATE) |
                            BIT(EXPERT_UP) | BIT(EXPERT_DOWN) | BIT(SHARED_GATE) | BIT(SHARED_UP) |
                            BIT(SHARED_DOWN);

/* Every factor is a piece of the same numbers, begun elsewhere. */
typedef struct source {
    choir_adapter_change *changes;
    size_t n_changes;
    float *numbers;
    size_t n_numbers, longest;
} source;

static int by_place(const void *a, const void *b)
{
    const choir_adapter_change *x = a, *y = b;
    if (x->layer != y->layer) return x->layer < y->layer ? -1 : 1;
    if (x->role != y->role) return x->role < y->role ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* The places, counted where `changes` is NULL. */
static void list_places(const choir_model_config *c, const choir_bench_adapter_options *o,
                        source *s)
{
    uint64_t wanted = o->mlp_alone ? mlp : mlp | attention;
    s->n_changes = 0;
    for (choir_role_place at = {0}; choir_next_tensor(c, &at);) {
        uint64_t rows, cols;
        if ((wanted >> at.role & 1) == 0) continue;
        choir_role_shape(c, at.role, &rows, &cols);
        size_t n = (size_t)(rows > cols ? rows : cols) * o->rank;
        if (n > s->longest) s->longest = n;
        if (s->changes != NULL)
            s->changes[s->n_changes] = (choir_adapter_change){.role = at.role,
                                                              .layer = at.layer,
                                                              .index = at.index,
                                                              .rows = (uint32_t)rows,
                                                              .cols = (uint32_t)cols,
                                                              .rank = o->rank,
                                                              .scale = 1,
                                                              .has = CHOIR_ADAPTER_HAS_LOW_RANK};
        s->n_changes++;
    }
}

static choir_status open_source(const choir_model_config *c, const choir_bench_adapter_options *o,
                                source *s)
{
    uint64_t state = 7;
    list_places(c, o, s);
    s->n_numbers = s->longest + 65536;
    s->changes = choir_calloc(CHOIR_MEM_OTHER, s->n_changes, sizeof *s->changes);
    s->numbers = choir_alloc(CHOIR_MEM_OTHER, s->n_numbers * sizeof *s->numbers);
    if (s->changes == NULL || s->numbers == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the adapters' numbers");
    list_places(c, o, s);
    qsort(s->changes, s->n_changes, sizeof *s->changes, by_place);
    for (size_t i = 0; i < s->n_numbers; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        s->numbers[i] = 0.02F * ((float)(state >> 40) / (1 << 23) - 1);
    }
    return CHOIR_OK;
}

static void close_source(source *s)
{
    choir_free(s->changes);
    choir_free(s->numbers);
}

static choir_status make_one(const choir_engine *engine, const choir_bench_adapter_options *o,
                             const source *s, uint32_t number, choir_adapter **out)
{
    choir_adapter_data data = {.changes = s->changes,
                               .n_changes = s->n_changes,
                               .max_rank = o->rank,
                               .digest = number + 1};
    for (size_t i = 0; i < s->n_changes; i++) {
        size_t at = (i * 2654435761U + number * 40503U) % (s->n_numbers - s->longest);
        s->changes[i].a = s->numbers + at;
        s->changes[i].b = s->numbers + (at * 31 + 17) % (s->n_numbers - s->longest);
    }
    return choir_adapter_make(engine, &data, o->type, NULL, out);
}

choir_status choir_bench_adapters_make(const choir_engine *engine,
                                       const choir_bench_adapter_options *o,
                                       choir_bench_adapters *out)
{
    choir_status status = CHOIR_OK;
    source s = {0};
    out->made = choir_calloc(CHOIR_MEM_OTHER, o->n, sizeof *out->made);
    out->uses = choir_calloc(CHOIR_MEM_OTHER, o->n, sizeof *out->uses);
    if (out->made == NULL || out->uses == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u adapters", o->n);
    CHOIR_TRY_TO(done, status, open_source(choir_engine_config(engine), o, &s));
    for (; out->n < o->n; out->n++) {
        CHOIR_TRY_TO(done, status, make_one(engine, o, &s, out->n, &out->made[out->n]));
        out->uses[out->n] = (choir_adapter_use){out->made[out->n], 1};
        out->bytes = choir_adapter_bytes(out->made[out->n]);
    }
done:
    close_source(&s);
    return status;
}

void choir_bench_adapters_free(choir_bench_adapters *adapters)
{
    for (uint32_t i = 0; i < adapters->n; i++) choir_adapter_free(adapters->made[i]);
    choir_free(adapters->made);
    choir_free(adapters->uses);
}
