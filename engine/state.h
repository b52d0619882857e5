/* WHAT    The engine's own picture of a loaded model and of one step; internal to engine/.
 * OWNS    struct choir_engine owns all below it.
 * THREADS A step runs on every worker at once (SPMD): each phase works on the worker's share, then all
 *         meet in choir_workers_sync(). What a phase reads was written before the last meeting.
 * ERRORS  None inside a step: everything was checked and sized before it.
 * LIMITS  R = max_rows rows, S = R * k expert slots, B = HEAD_ROWS logits rows at a time.
 * NEXT    engine/token_path.c */
#pragma once
#include "engine/adapt.h"
#include "engine/engine.h"
#include "engine/families/families.h"
#include "experts/experts.h"
#include "router/router.h"

#include <stdatomic.h>

enum { PREDICT_ROWS = 64, MAX_PREFETCH = 16 }; /* rows whose experts are predicted; guesses of a layer */
enum { HEAD_ROWS = 32, CHOIR_MAX_HEAD_DIM = 1024 }; /* HEAD_ROWS: rows whose logits are held at once */

typedef struct rope_table rope_table; /* engine/rope.c */
typedef struct expert_slices expert_slices; /* engine/stream.c */

/* A norm's weights; bias is NULL for an RMSNorm. */
typedef struct norm {
    float *weight, *bias; /* [n] */
} norm;

typedef struct layer {
    uint8_t flags; /* CHOIR_LAYER_ */
    norm attn_norm, ffn_norm;           /* [hidden] */
    float *attn_post_norm, *ffn_post_norm; /* NULL, or [hidden]: of a block's output */
    /* [n_heads hd, hidden] (with a latent of q: [n_heads hd, q_lora]), [n_kv hd, hidden] x 2,
     * [hidden, attended] */
    choir_matrix q, k, v, out;
    float *q_bias, *k_bias, *v_bias, *out_bias; /* NULL, or [rows] */
    float *q_norm, *k_norm; /* NULL, [head_dim], or full width (config.qk_norm) */
    float *sinks;           /* NULL, or [n_heads] */
    /* Latent attention: hidden to the latents, their norms; per head, keys and values of the latent. */
    choir_matrix q_a, kv_a;      /* [q_lora, hidden], [kv_lora + rope, hidden] */
    float *q_a_norm, *kv_a_norm; /* [q_lora], [kv_lora] */
    choir_matrix *k_b, *v_b;     /* [n_heads] of [kv_lora, nope] and [value, kv_lora] */
    choir_matrix router;         /* [n_experts, hidden], f32; rows = 0: a dense layer */
    float *router_bias, *router_correction; /* NULL, or [n_experts] */
    choir_expert always; /* what every row has: the dense FFN, or the shared expert; gate.rows 0: none */
    float *always_gate;  /* NULL, or [hidden]: the shared expert is weighed by a sigmoid of this . h */
} layer;

/* A row of the step: one token of one span. */
typedef struct row {
    uint32_t span, token, position;
} row;

/* A piece of attention: one kv head, at most CHOIR_ATTENTION_HEADS of its query heads, at most
 * CHOIR_ATTENTION_QUERIES tokens of one span. */
typedef struct attention_item {
    uint32_t span, first_row, n_queries, kv_head, first_head, n_heads;
} attention_item;

/* cos and sin of a step's rows: [R, rotary / 2]. */
typedef struct rope_rows {
    float *cos, *sin;
} rope_rows;

/* Where a step's keys and values lie: page p of layer l begins at base + p page_bytes + l layer_bytes. */
typedef struct kv_view {
    uint8_t *base;
    size_t page_bytes, layer_bytes;
    uint32_t n_pages;
} kv_view;

typedef struct step {
    kv_view kv;
    choir_span *spans;
    uint32_t n_spans, n_rows, n_outputs, n_items;
    row *rows;                /* [R] */
    uint32_t *first_row;      /* [max_spans] a span's first row */
    uint32_t *outputs;        /* [R] rows that get logits, ascending */
    attention_item *items;    /* [R * choir_head_groups()] */
    atomic_uint next_item;    /* relaxed ticket: items are independent; results meet at a sync */
    float *x;                 /* [R, hidden] the residual stream */
    float *h;                 /* [R, hidden] normed; also the gathered output rows */
    rope_rows rope, window_rope;
    float *q, *k, *v, *att;   /* [R, heads hd], [R, keys], [R, values], [R, attended] */
    /* Latent attention: [R, q_lora]; [heads, R, max(nope, kv_lora)]; [R, heads, key], [R, heads, kv_lora] */
    float *q_latent, *by_head, *q_wide, *att_wide;
    uint8_t *q8_latent, *q8_by_head;
    size_t q8_by_head_bytes; /* of one head */
    float *router_logits;     /* [R, n_experts] */
    choir_plan *plan;
    float *slot_in;           /* [S, hidden] an expert's rows side by side (MoE) */
    float *gate, *up;         /* [S, ffn] */
    float *slot_out;          /* [S, hidden] (MoE) */
    float *always_gate, *always_up;  /* [R, its ffn] */
    float *always_weight;            /* [R] */
    uint8_t *q8_h, *q8_att, *q8_ffn; /* quantised rows; of slots: one area per expert */
    uint8_t *q8_rows, *q8_always;    /* what every row's expert takes and makes */
    size_t *q8_in_at, *q8_ffn_at; /* [n_experts] where an expert's area begins in q8_h, q8_ffn */
    size_t q8_h_bytes, q8_ffn_bytes;
    const choir_expert **pinned; /* [n_experts] of the current layer; NULL: not in reach */
    bool *computed, *wanted;     /* [n_experts] its slots' outputs are there; are asked for */
    choir_expert_use *uses;      /* [n_experts] what the layer wants of the store */
    choir_expert_missing *missing; /* [n_experts] */
    uint16_t *wave, *arrived;    /* [n_experts] experts that compute now; those to be checked before */
    uint32_t n_wave, n_arrived;
    bool more; /* waves to come */
    float *predict_h, *predict_logits; /* [PREDICT_ROWS, hidden], [PREDICT_ROWS, n_experts] */
    choir_plan *prediction;            /* of the first rows, for the next layer */
    uint32_t predicted_layer;          /* 0: none; set when its guesses were sent */
    float *votes;                      /* [n_experts] */
    uint16_t guessed[MAX_PREFETCH];
    float *logits;            /* [B, vocab]; of a probe, which has no head: its keys and values */
    float *gate_entropy;      /* [R] of a probe's rows, summed over its gates … */
    bool wants_entropy;       /* … and whether this is one */
    choir_status *output_status; /* [R] of each output row; folded into spans at the end */
    /* Adapters: the rows' runs; A z of each row, [ADAPT_BUFFERS, low_rank_floats], a row's n_ranks long. */
    uint32_t *order;          /* [max_spans] spans as their rows lie: those of one adapter together */
    adapter_run *runs;        /* [max_spans] */
    worker_fetch *fetch;      /* [n_threads]: what each fetches beside its products */
    choir_range *fetch_ranges; /* [n_threads, MAX_FETCHED] */
    uint32_t *run_of;         /* [R]; NO_RUN: the base alone */
    uint32_t n_runs, n_ranks;
    uint64_t adapted_roles, series_roles, in_scale_roles; /* bits; 0: no row has any such change */
    bool has_virtual;
    float *low_rank;
    size_t low_rank_floats, low_rank_bytes;
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
    int32_t forced_expert;

    choir_matrix embedding, head;
    norm output_norm;
    float *head_bias; /* NULL, or [vocab] */
    rope_table *rope, *window_rope; /* window_rope: NULL, or of layers with a window */
    layer *layers;
    choir_experts *experts;
    expert_slices *slices; /* NULL, or [n_layers, n_experts]: how streamed experts lie in files */
    bool *small;           /* NULL, or [n_layers, n_experts]: what is computed from a pack's small copy */
    void *weights;          /* one region for all packed dense matrices */
    size_t weight_bytes;
    choir_arena *vectors;   /* norms, biases, gates, tables: f32 */

    uint8_t *kv;
    size_t kv_bytes, page_bytes, layer_kv_bytes; /* of one layer in one page */
    uint32_t n_pages;
    uint64_t file_bytes, digest;
    uint64_t shared_bytes, kv_floor_bytes; /* what KV pages and streamed experts share; 0: fixed parts */
    /* Of that, or besides it: what adapters have at least and at most; what KV and they have now of it. */
    uint64_t adapter_floor, adapter_most, kv_now_bytes, adapter_now_bytes;
    choir_adapters *adapters; /* NULL, or the pool … */
    choir_page_cache *adapter_pages; /* … and where its memory comes from */
    choir_adapter_type adapter_type;

    step step;
    void *scratch;
    size_t scratch_bytes;
    _Atomic uint64_t n_steps; /* release by step(), acquire by the watchdog */
};

/* Pieces of attention that a token has: of each kv head its query heads, in groups. */
static inline uint32_t choir_head_groups(const choir_model_config *c)
{
    uint32_t group = c->n_heads / choir_kv_heads(c);
    return choir_kv_heads(c) * ((group + CHOIR_ATTENTION_HEADS - 1) / CHOIR_ATTENTION_HEADS);
}

static inline bool choir_expert_is_small(const choir_engine *e, uint32_t layer_index, uint32_t expert)
{
    return e->small != NULL && e->small[(size_t)layer_index * e->config.n_experts + expert];
}

/* engine/load.c */
choir_status choir_engine_load_weights(choir_engine *engine, const choir_model_file *file)
    CHOIR_MUST_USE;
void choir_engine_free_weights(choir_engine *engine);
/* engine/stream.c */
choir_status choir_stream_create(choir_engine *engine, const choir_model_file *file) CHOIR_MUST_USE;
/* Places one expert of a file that is not packed; `planned` has its matrices' shapes and its biases. */
choir_status choir_stream_place(choir_engine *engine, const choir_model_file *file, uint32_t layer,
                                uint32_t expert, const choir_slice slices[3],
                                const choir_expert *planned, uint64_t *digest) CHOIR_MUST_USE;
bool choir_stream_unpack(void *engine, uint32_t layer, uint32_t expert, uint32_t part,
                         const uint8_t *const *staged, const choir_expert *into);
/* engine/predict.c */
void choir_predict_rows(choir_engine *engine, uint32_t layer, uint32_t worker, uint32_t n_workers);
void choir_predict_prefetch(choir_engine *engine, uint32_t layer);
void choir_predict_score(choir_engine *engine, uint32_t layer);
/* engine/small.c */
choir_status choir_small_plan(choir_engine *engine, const choir_model_file *file) CHOIR_MUST_USE;
/* The bytes of all experts, with small copies in place of those that are not computed with. */
uint64_t choir_small_weigh(const choir_engine *engine, const choir_model_file *file, uint64_t experts);
uint64_t choir_small_digest(const choir_engine *engine, uint64_t digest);
/* engine/budget.c */
choir_status choir_budget_plan(choir_engine *engine, const choir_model_file *file) CHOIR_MUST_USE;
/* So many of the adapters' bytes are set apart from what they and experts share. Before serving. */
void choir_engine_reserve_adapter_bytes(choir_engine *engine, uint64_t bytes);
/* engine/scratch.c */
size_t choir_step_bytes(choir_engine *engine); /* of scratch, before there is any */
size_t choir_kv_page_bytes(const choir_engine *engine);
/* A probe's rows and its KV pages, of one layer each. */
uint32_t choir_probe_rows(const choir_engine *engine);
uint32_t choir_probe_pages(const choir_engine *engine);
choir_status choir_step_create(choir_engine *engine) CHOIR_MUST_USE;
void choir_step_destroy(choir_engine *engine);
choir_status choir_kv_create(choir_engine *engine) CHOIR_MUST_USE;

/* engine/token_path.c: checks spans over step.kv, and lays their tokens out as the step's rows. */
choir_status choir_step_lay_out(choir_engine *engine, choir_span *spans, uint32_t n_spans) CHOIR_MUST_USE;

/* The phases, each on every worker (engine/token_path.c, engine/attention.c, engine/moe.c, engine/head.c). */
void choir_phase_embed(choir_engine *engine, uint32_t worker, uint32_t n_workers);
void choir_phase_attention(choir_engine *engine, uint32_t layer, uint32_t worker, uint32_t n_workers);
void choir_phase_ffn(choir_engine *engine, uint32_t layer, uint32_t worker, uint32_t n_workers);
void choir_phase_head(choir_engine *engine, uint32_t worker, uint32_t n_workers);

/* engine/rope.c */
choir_status choir_rope_create(choir_engine *engine, const choir_model_file *file) CHOIR_MUST_USE;
void choir_rope_rows(const choir_engine *engine, uint64_t begin, uint64_t end);

/* out = norm(x), RMSNorm or LayerNorm; x and out: [hidden], may be the same. */
void choir_norm_row(const choir_engine *engine, norm w, const float *x, float *out);
/* A norm of a layer, and its role. */
typedef struct layer_norm {
    const norm *norm;
    choir_role role;
    uint32_t layer;
} layer_norm;
/* h = norm(x) for the worker's rows, quantised into q8 unless exact or NULL. */
void choir_norm_rows(choir_engine *engine, layer_norm w, float *h, uint8_t *q8, uint32_t worker,
                     uint32_t n_workers);
/* A serial bottleneck takes whole rows of what W makes: all workers meet, each shrinks rows of its own, and they
 * meet again. Nothing where no row has one. */
void choir_meet_for_series(choir_engine *engine, const adapt_target *target, activations y, uint32_t n_rows,
                           uint32_t worker, uint32_t n_workers);
/* x += residual_scale * post_norm(W a + bias). Ends with a meeting. */
typedef struct residual_product {
    const choir_matrix *matrix;
    const float *bias, *post_norm; /* NULL, or [rows] */
    choir_acts acts;
    float *y; /* [n_rows, hidden] scratch */
    adapt_target target, next[ADAPT_BUFFERS]; /* next: of the matrices that follow, whose A is fetched meanwhile */
    uint32_t n_next;
} residual_product;
/* The same, for products that fetch besides what the worker has listed. */
static inline choir_acts choir_acts_fetching(const choir_engine *e, const choir_acts *acts, uint32_t worker)
{
    choir_acts own = *acts;
    if (e->step.n_runs > 0) own.fetch = &e->step.fetch[worker].of;
    return own;
}
void choir_multiply_into_residual(choir_engine *engine, const residual_product *product, uint32_t worker,
                                  uint32_t n_workers);
/* One worker's share of several products of the same activations, with what adapters make of them. next: NULL, or a
 * matrix that follows, whose A is fetched meanwhile. */
typedef struct product {
    const choir_matrix *matrix;
    float *y; /* [n_rows, matrix->rows] */
    adapt_target target;
} product;
void choir_multiply(choir_engine *engine, const product *products, uint32_t n_products,
                    const choir_acts *acts, const adapt_target *next, uint32_t worker, uint32_t n_workers);
