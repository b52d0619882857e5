/* WHAT    The loaded model and its step: rows of many sequences in, logits and drawn tokens out.
 * OWNS    Packed weights, the KV pages' memory, step scratch, the worker threads.
 * THREADS One engine thread calls step() and the KV calls; config and tokenizer: any thread.
 * ERRORS  A step fails as a whole only for bugs; a span whose logits are NaN or Inf fails alone
 *         (span->status CHOIR_E_DATA_LOSS), as does one whose expert cannot be read; CHOIR_E_UNAVAILABLE:
 *         the disk keeps its expert waiting, the same span may be given again. A probe is one span.
 * LIMITS  step() allocates nothing once warm. The caller owns page numbers: who holds which page is the
 *         scheduler's matter.
 * NEXT    engine/token_path.c: the path of a token, read aloud; scheduler/scheduler.h above. */
#pragma once
#include "base/base.h"
#include "engine/adapter.h"
#include "engine/chat_template.h"
#include "engine/gguf.h"
#include "engine/kernels/kernels.h"
#include "engine/model_file.h"
#include "engine/safetensors.h"
#include "engine/sampler.h"
#include "engine/tokenizer.h"
#include "experts/experts.h"

typedef struct choir_engine_options {
    uint32_t n_threads;     /* 0: one per core */
    choir_cpu_level level;  /* CHOIR_CPU_N_LEVELS: the best of this CPU */
    bool exact;             /* f32 activations and accumulation over dequantised weights */
    uint64_t memory_bytes;  /* for weights, KV, scratch and the process together; experts that do not fit
                             * are streamed, and share with the KV pages; 0: no such budget */
    uint64_t kv_bytes;      /* memory for KV pages (with a budget: at most); 0: enough for max_rows tokens */
    uint32_t max_rows;      /* rows (tokens) of one step, at most */
    uint32_t max_rows_streamed; /* under a budget that streams experts max_rows grows up to this, as far as an
                             * eighth of what KV pages and experts share holds the scratch; 0: it does not. A step reads nearly
                             * all experts once, however many rows of a prompt it has */
    uint32_t max_spans;     /* sequences of one step, at most */
    uint32_t max_context;   /* tokens of the longest sequence to come; 0: the model's own. Longrope's long
                             * divisors are for those beyond the original context, and hold for all then */
    uint64_t expert_bytes;  /* memory for experts: the others are streamed; 0: all are resident */
    uint32_t max_expert_slots; /* 0: as many as fit */
    uint64_t adapter_bytes; /* memory for adapters (choir_engine_open_adapters), at most; 0: there will be none.
                             * Of a budget that streams experts: what adapters do not take now, experts have */
    choir_io io;            /* how they are read */
    uint32_t io_depth;      /* reads in flight; 0: a few */
    choir_policy_kind policy; /* who stays in memory */
    double small_experts;   /* 0 … 1: so many of each layer's experts, the least used, are computed from the
                             * small copies that a pack may hold, whether they are in memory or not */
    bool no_prefetch;       /* the next layer's experts are not guessed */
    uint64_t stall_ns;      /* a step waits so long for a disk that gives nothing */
    choir_disk *disk;       /* NULL, or taken over: tests */
    bool show_progress;     /* a bar on stderr while loading */
} choir_engine_options;
#define CHOIR_ENGINE_OPTIONS_DEFAULT                                                               \
    ((choir_engine_options){.level = CHOIR_CPU_N_LEVELS,                                           \
                            .max_rows = 512,                                                       \
                            .max_spans = 64,                                                       \
                            .policy = CHOIR_POLICY_DEFAULT,                                        \
                            .stall_ns = CHOIR_SECOND})

choir_status choir_engine_open(const char *path, const choir_engine_options *options,
                               choir_engine **out) CHOIR_MUST_USE;
void choir_engine_close(choir_engine *engine);

const choir_model_config *choir_engine_config(const choir_engine *engine);
const choir_tokenizer *choir_engine_tokenizer(const choir_engine *engine);
const choir_chat_template *choir_engine_chat_template(const choir_engine *engine); /* NULL: none */
const choir_kernels *choir_engine_kernels(const choir_engine *engine);
uint32_t choir_engine_n_threads(const choir_engine *engine);
uint32_t choir_engine_max_rows(const choir_engine *engine);
uint32_t choir_engine_max_spans(const choir_engine *engine);

/* What a request that leaves sampling out gets: the model's own values over CHOIR_SAMPLING_DEFAULT. */
choir_sampling choir_sampling_of_model(const choir_model_config *config);
/* {"temperature": 0.2, "top_p": 0.9}: the keys of generation_config.json, over the model's own. A bad key or
 * value is CHOIR_E_INVALID, and the config is undefined then. */
choir_status choir_generation_override(choir_model_config *config, const char *json) CHOIR_MUST_USE;

enum { CHOIR_PAGE_TOKENS = 32 };
uint32_t choir_engine_n_pages(const choir_engine *engine);
size_t choir_engine_page_bytes(const choir_engine *engine);
void choir_engine_copy_page(choir_engine *engine, uint32_t from, uint32_t to);
void choir_engine_zero_page(choir_engine *engine, uint32_t page); /* poisoned KV is wiped */
/* Under a memory budget with streamed experts: so many pages may be in use from now on; experts have the
 * rest. Page numbers go up to n_pages all the same; the floor is always KV's. */
void choir_engine_set_kv_pages(choir_engine *engine, uint32_t n);
uint32_t choir_engine_kv_floor(const choir_engine *engine); /* n_pages where nothing is shared */
void choir_engine_forget_page(choir_engine *engine, uint32_t page); /* its memory is given back */

/* The engine's pool of adapters, once, before a scheduler is made of the engine; it ends with the engine. Names
 * and loads: experts/adapters.h. */
typedef struct choir_engine_adapters_options {
    choir_adapter_type type; /* how they lie in memory */
    const char *folder;      /* NULL, or what clients' paths lie beneath; lent for the call */
} choir_engine_adapters_options;
choir_status choir_engine_open_adapters(choir_engine *engine, const choir_engine_adapters_options *options)
    CHOIR_MUST_USE;
choir_adapters *choir_engine_adapters(const choir_engine *engine); /* NULL: it has none */
/* Under a memory budget with streamed experts: adapters would like so many bytes. Returns how many they may have
 * now, as experts let go of theirs; the floor is always theirs. */
uint64_t choir_engine_set_adapter_bytes(choir_engine *engine, uint64_t bytes);
uint64_t choir_engine_adapter_floor(const choir_engine *engine); /* all of it where nothing is shared */
/* "ATTN_Q,ATTN_V": the roles that choir_adapter_facts' targets name. Returns the length of the whole. */
size_t choir_adapter_targets_text(uint64_t targets, char *out, size_t room);

/* The routes of a span's tokens: [n_layers, n_tokens, n_experts_used], best first; of dense layers: 0. */
typedef struct choir_routes {
    uint16_t *experts;
    float *weights;
} choir_routes;

/* One sequence's rows in a step: n_tokens new tokens at consecutive positions. */
typedef struct choir_span {
    /* Each below vocab, or vocab + i: the virtual token i of its only adapter, at position i. */
    const uint32_t *tokens;
    uint32_t n_tokens;      /* >= 1 */
    uint32_t position;      /* of tokens[0]; keys 0 .. position-1 lie in the pages already */
    const uint32_t *pages;  /* page i holds positions [32 i, 32 i + 32); covers position + n_tokens */
    uint32_t n_pages;
    uint32_t n_logits;      /* the last n_logits tokens get logits: 0 in mid-prefill, else 1 … n_tokens */
    float *logits;          /* [n_logits, vocab], or NULL */
    const uint32_t *targets; /* [n_logits] or NULL: score these next tokens … */
    float *target_logprobs;  /* … here (log-softmax, computed in double) */
    choir_sampler *sampler;  /* NULL, or draws from the last token's logits (n_logits >= 1) */
    choir_routes *routes;    /* NULL, or filled */
    /* Rows at positions from adapter_from on are computed with these; at most CHOIR_MAX_MIX, each once. */
    const choir_adapter_use *adapters;
    uint32_t n_adapters, adapter_from;
    float *ffn_inputs;       /* NULL, or [n_layers, n_tokens, hidden]: what each layer's FFN was given */
    choir_sample sample;     /* out, when sampler */
    choir_status status;     /* out */
    uint32_t remaining;      /* tokens that its request may still draw; 0: unknown. Who stays in memory */
    int32_t missing_layer, missing_expert; /* out: -1, or the expert that the status is about */
} choir_span;

/* Σ n_tokens <= max_rows, n_spans <= max_spans. Spans are independent: a span's bits depend on nothing
 * but its own tokens and pages. Two spans of one step may share pages only below their positions. */
choir_status choir_engine_step(choir_engine *engine, choir_span *spans, uint32_t n_spans) CHOIR_MUST_USE;
/* Why a span of a step has failed, as a sentence; returns its status. */
choir_status choir_span_failure(const choir_span *span);
uint64_t choir_engine_n_steps(const choir_engine *engine); /* for the watchdog; any thread */

/* How a prompt looks to the model alone early in the network, below what its adapters change: features for
 * whoever chooses them. Its tokens go through the embedding and the first blocks, attention and FFN being one
 * each, with keys and values of their own: no KV page is touched. Engine thread, between steps; as a step, it
 * allocates nothing, and its bits depend on nothing but the tokens. */
enum { CHOIR_PROBE_TOKENS = 512 };
typedef struct choir_probe {
    const uint32_t *tokens; /* of a prompt beyond CHOIR_PROBE_TOKENS, or max_rows, the last so many count */
    uint32_t n_tokens;
    uint32_t n_blocks;   /* 0: the embeddings; 1: behind layer 0's attention; 2 l: behind l whole layers */
    float *mean;         /* [hidden]: of the residual stream over the rows */
    float gate_entropy;  /* out, in nats: of the gates that were passed, over rows and layers; 0: none was */
    uint32_t n_rows;     /* out: tokens that counted */
} choir_probe;
choir_status choir_engine_probe(choir_engine *engine, choir_probe *probe) CHOIR_MUST_USE;

/* Every token goes to this expert alone (weight 1); -1 ends it. A property of the demo MoE that tests
 * and `choir logits --force-expert` use. */
choir_status choir_engine_force_expert(choir_engine *engine, int32_t expert) CHOIR_MUST_USE;

/* Memory by use, for `choir info` and GetStats. */
typedef struct choir_engine_sizes {
    uint64_t weight_bytes, expert_bytes, kv_bytes, scratch_bytes, file_bytes;
} choir_engine_sizes;
choir_engine_sizes choir_engine_memory(const choir_engine *engine);
/* Of streamed experts; `streamed` is false when all are resident. Engine thread. */
choir_experts_stats choir_engine_expert_stats(const choir_engine *engine);
float choir_engine_expert_heat(const choir_engine *engine, uint32_t layer, uint32_t expert);
uint32_t choir_engine_n_experts_pinned(const choir_engine *engine); /* 0 between steps */
const char *choir_engine_path(const choir_engine *engine);
/* XXH3 over all tensors' bytes as the file has them, and over which experts are small copies: changes whenever
 * the weights that are computed with do. */
uint64_t choir_engine_digest(const choir_engine *engine);
