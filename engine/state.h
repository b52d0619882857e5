/* WHAT    The engine's own picture of a loaded model and of one step; internal to engine/.
 * OWNS    struct choir_engine owns all below it.
 * THREADS A step runs on every worker at once (SPMD): each phase works on the worker's share, then all
 *         meet in choir_workers_sync(). What a phase reads was written before the last meeting.
 * ERRORS  None inside a step: everything was checked and sized before it.
 * LIMITS  R = max_rows rows, S = R * k expert slots, B = HEAD_ROWS logits rows at a time.
 * NEXT    engine/token_path.c */
#pragma once
#include "engine/engine.h"
#include "engine/families/families.h"
#include "experts/experts.h"
#include "router/router.h"

#include <stdatomic.h>

enum { HEAD_ROWS = 32, CHOIR_MAX_HEAD_DIM = 512 }; /* HEAD_ROWS: rows whose logits are held at once */

typedef struct layer {
    float *attn_norm;          /* [hidden] */
    choir_matrix q, k, v, out; /* [n_heads hd, hidden], [n_kv hd, hidden] x 2, [hidden, n_heads hd] */
    float *q_bias, *k_bias, *v_bias; /* NULL or [rows of q], … */
    float *q_norm, *k_norm;          /* NULL, [head_dim], or full width (family->qk_norm) */
    float *ffn_norm;                 /* [hidden] */
    choir_matrix router;             /* [n_experts, hidden], f32; rows = 0: a dense layer */
} layer;

/* A row of the step: one token of one span. */
typedef struct row {
    uint32_t span, token, position;
} row;

/* A piece of attention: one kv head, at most CHOIR_ATTENTION_QUERIES tokens of one span. */
typedef struct attention_item {
    uint32_t span, first_row, n_queries, kv_head;
} attention_item;

typedef struct step {
    choir_span *spans;
    uint32_t n_spans, n_rows, n_outputs, n_items;
    row *rows;                /* [R] */
    uint32_t *first_row;      /* [max_spans] a span's first row */
    uint32_t *outputs;        /* [R] rows that get logits, ascending */
    attention_item *items;    /* [R * n_kv_heads] */
    atomic_uint next_item;    /* relaxed ticket: items are independent; results meet at a sync */
    float *x;                 /* [R, hidden] the residual stream */
    float *h;                 /* [R, hidden] normed; also the gathered output rows */
    float *cos, *sin;         /* [R, rotary / 2] */
    float *q, *k, *v, *att;   /* [R, heads hd], [R, kv hd] x 2, [R, heads hd] */
    float *router_logits;     /* [R, n_experts] */
    choir_plan *plan;
    float *slot_in;           /* [S, hidden] an expert's rows side by side (MoE) */
    float *gate, *up;         /* [S, ffn] */
    float *slot_out;          /* [S, hidden] (MoE) */
    uint8_t *q8_h, *q8_att, *q8_ffn; /* quantised rows; of slots: one area per expert */
    size_t *q8_in_at, *q8_ffn_at; /* [n_experts] where an expert's area begins in q8_h, q8_ffn */
    size_t q8_h_bytes, q8_ffn_bytes;
    const choir_expert **pinned; /* [n_experts] of the current layer; NULL without rows */
    float *logits;            /* [B, vocab] */
    choir_status *output_status; /* [R] of each output row; folded into spans at the end */
    float **attention_scratch; /* [n_threads] */
    void **sampler_scratch;    /* [n_threads] */
} step;

struct choir_engine {
    choir_engine_options options;
    choir_model_config config;
    choir_model_file *file; /* kept open in exact mode, where weights are views into it */
    char *path;
    choir_tokenizer *tokenizer;
    choir_chat_template *chat_template;
    choir_workers *workers;
    uint32_t n_threads;
    const choir_kernels *kernels;
    choir_gate gate;
    int32_t forced_expert;

    choir_matrix embedding, head;
    float *output_norm;
    float *inv_freq; /* [rotary / 2] */
    layer *layers;
    choir_experts *experts; /* a dense FFN is expert 0 of its layer */
    void *weights;          /* one region for all packed dense matrices */
    size_t weight_bytes;
    choir_arena *vectors;   /* norms, biases, gates: f32 */

    uint8_t *kv;
    size_t kv_bytes, page_bytes, layer_kv_bytes; /* of one layer in one page */
    uint32_t n_pages;
    uint64_t file_bytes, digest;

    step step;
    void *scratch;
    size_t scratch_bytes;
    _Atomic uint64_t n_steps; /* release by step(), acquire by the watchdog */
};

/* engine/load.c */
choir_status choir_engine_load_weights(choir_engine *engine, const choir_model_file *file)
    CHOIR_MUST_USE;
void choir_engine_free_weights(choir_engine *engine);
/* engine/scratch.c */
choir_status choir_step_create(choir_engine *engine) CHOIR_MUST_USE;
void choir_step_destroy(choir_engine *engine);
choir_status choir_kv_create(choir_engine *engine) CHOIR_MUST_USE;

/* The phases, each on every worker (engine/attention.c, engine/moe.c, engine/head.c). */
void choir_phase_attention(choir_engine *engine, uint32_t layer, uint32_t worker, uint32_t n_workers);
void choir_phase_ffn(choir_engine *engine, uint32_t layer, uint32_t worker, uint32_t n_workers);
void choir_phase_head(choir_engine *engine, uint32_t worker, uint32_t n_workers);

/* h = norm(x) for the worker's rows, quantised into q8 unless exact. */
void choir_norm_rows(choir_engine *engine, const float *weight, float *h, uint8_t *q8,
                     uint32_t worker, uint32_t n_workers);
/* The residual stream gets W a: the worker's own columns. y: [n_rows, hidden] scratch. */
void choir_multiply_into_residual(const choir_engine *engine, const choir_matrix *w,
                                  const choir_acts *acts, float *y, float *x, uint32_t worker,
                                  uint32_t n_workers);
/* One worker's share of several products of the same activations. */
typedef struct product {
    const choir_matrix *matrix;
    float *y; /* [n_rows, matrix->rows] */
} product;
void choir_multiply(const choir_engine *engine, const product *products, uint32_t n_products,
                    const choir_acts *acts, uint32_t worker, uint32_t n_workers);
