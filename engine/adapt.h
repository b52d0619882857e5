/* WHAT    How a step applies adapters: what an adapter is in memory, and what the phases call. Internal to engine/.
 * OWNS    Nothing; low-rank activations lie in the step.
 * THREADS shrink: the worker that made the rows. expand: any worker, columns of its own, after a meeting.
 * ERRORS  None inside a step.
 * LIMITS  A row's result depends on its own adapters alone, bit for bit. Without adapters in a step: one test.
 * NEXT    engine/adapt.c, engine/adapter.c */
#pragma once
#include "engine/adapter.h"
#include "engine/kernels/kernels.h"

enum {
    ADAPT_BUFFERS = 3, /* matrices that share a phase: q, k and v */
    MAX_FETCHED = 2048, /* ranges that a worker fetches beside a phase's products */
};

/* A choir_adapter_change as it is computed, its settings folded into as few arrays as it takes:
 *   y = scale · y0 + B f(A z + a_bias) + shift */
typedef struct adapted {
    choir_role role;
    uint32_t index;
    choir_factor a, b;       /* rank 0: none */
    const float *a_columns;  /* of the embedding: [vocab, rank] instead of A */
    const float *a_bias;     /* NULL, or [rank] */
    choir_adapter_act act;
    bool series, residual;   /* z is y0, the residual stream, both together; neither: x */
    const float *scale;      /* NULL: 1, or [rows] */
    const float *shift;      /* NULL, or [rows] */
    const float *in_scale;   /* NULL, or [cols] */
    choir_matrix weight;     /* rows 0, or in W's place */
    float *vector;           /* NULL, or [cols] in a norm's place */
} adapted;

struct choir_adapter {
    uint64_t bytes, digest;
    uint64_t roles, series_roles, in_scale_roles; /* bits */
    uint32_t max_rank, n_virtual;
    bool mixes, prefix;
    adapted *items;   /* by (layer, role, index) */
    uint32_t *first;  /* [n_layers * CHOIR_N_ROLES + 1] */
    const float *virtual_embeddings, *virtual_keys, *virtual_values;
    void *memory;
    choir_page_cache *pages; /* memory's, or NULL */
};

/* The change of a matrix, or NULL. */
const adapted *choir_adapted_find(const choir_adapter *adapter, choir_role role, uint32_t layer,
                                  uint32_t index);

/* Rows of a step that have the same adapters. */
typedef struct adapter_run {
    const choir_adapter_use *uses;
    uint32_t n_uses;
    uint32_t at[CHOIR_MAX_MIX]; /* where each one's low-rank activations begin in a row's */
} adapter_run;

enum { NO_RUN = UINT32_MAX };

/* A product that adapters may change: which matrix, which of the step's rows its activations are, and where
 * their low-rank activations are kept. */
typedef struct adapt_target {
    choir_role role;
    uint32_t layer, index;
    uint32_t buffer;
    const uint32_t *map; /* NULL: activations' row i is the step's; else the step's row map[i] / divide */
    uint32_t divide;
    size_t first; /* of the buffer's rows: activations' row i has row first + i */
} adapt_target;

/* A line of its own: each tile of a product writes it. */
typedef union worker_fetch {
    choir_fetch of;
    char line[CHOIR_CACHE_LINE];
} worker_fetch;

typedef struct activations {
    const float *x;
    size_t ldx;
} activations;

/* engine/adapt.c */
/* Lists the step's runs and makes room for their low-rank activations. */
choir_status choir_adapt_lay_out(choir_engine *engine) CHOIR_MUST_USE;
void choir_adapt_free(choir_engine *engine);
bool choir_adapts(const choir_engine *engine, choir_role role);
/* A z of activation rows [begin, end), kept for expand(), where z is x. */
void choir_adapt_shrink(choir_engine *engine, const adapt_target *target, activations in,
                        uint32_t begin, uint32_t end);
/* y of rows [0, n_rows), columns [begin, end), from W x to what the adapters make of it. */
void choir_adapt_expand(choir_engine *engine, const adapt_target *target, activations in,
                        uint32_t n_rows, float *y, size_t ldy, uint32_t begin, uint32_t end);
/* Whether some row's z is not x: then all workers meet before expand(), shrink their rows by this, and meet
 * again. */
bool choir_adapts_series(const choir_engine *engine, choir_role role);
void choir_adapt_shrink_outputs(choir_engine *engine, const adapt_target *target, activations y,
                                uint32_t begin, uint32_t end);
/* Columns [begin, end) of activation rows, before they are quantised and multiplied. */
void choir_adapt_scale_inputs(choir_engine *engine, const adapt_target *target, float *x, size_t ldx,
                              uint32_t first_row, uint32_t last_row, uint32_t begin, uint32_t end);
/* All of it for one row that one worker has whole. */
void choir_adapt_row(choir_engine *engine, const adapt_target *target, uint32_t row, activations in,
                     float *y, uint32_t n);
/* Lists what the worker's next products fetch besides: those read little memory, the adapters of many rows little
 * else. B of the products' own columns, and A for the rows that the worker makes next. */
void choir_adapt_fetch_begin(choir_engine *engine, uint32_t worker);
void choir_adapt_fetch_outputs(choir_engine *engine, const adapt_target *target, uint32_t n_rows, uint32_t worker,
                               uint32_t begin, uint32_t end);
void choir_adapt_fetch_inputs(choir_engine *engine, const adapt_target *target, uint32_t worker,
                              uint32_t n_workers);
/* engine/attention.c, engine/moe.c: the matrices whose A a layer's normed rows meet; their number. Those of routed
 * experts are not known so early. */
uint32_t choir_attention_inputs(const choir_engine *engine, uint32_t layer, adapt_target out[ADAPT_BUFFERS]);
uint32_t choir_ffn_inputs(const choir_engine *engine, uint32_t layer, adapt_target out[ADAPT_BUFFERS]);
/* A norm's weight for a row of the step. */
float *choir_adapt_norm(const choir_engine *engine, choir_role role, uint32_t layer, size_t row, float *weight);
/* The residual stream's begin: embedding row `x` of a token, or a virtual token's. */
void choir_adapt_embedding(choir_engine *engine, size_t row, float *x);
/* NULL, or the virtual token's key (part 0) or value that lies in the pages instead of a computed one. */
const float *choir_adapt_prefix(const choir_engine *engine, uint32_t layer, size_t row, uint32_t part);
