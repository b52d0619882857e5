/* WHAT    Continuous batching over one engine: requests join and leave between steps; KV pages, prefix
 *         cache, fairness, preemption, deadlines; tokens become text and go to their streams.
 * OWNS    Every request from submit to its last event; KV page numbers; the engine thread.
 * THREADS submit, cancel, stats, drain: any. A stream: one consumer. The tick: the engine thread, which
 *         the scheduler starts (or run by hand in tests: choir_scheduler_tick).
 * ERRORS  submit: CHOIR_E_INVALID (field, value, limit), CHOIR_E_FULL (queue, with retry_ms),
 *         CHOIR_E_UNAVAILABLE (draining), and what experts/adapters.h says of an adapter (CHOIR_E_NOT_FOUND, …).
 *         Later errors arrive as the stream's last event.
 * LIMITS  Bounded queue; an outbox of at most outbox_bytes per request: a slow reader pauses its own
 *         sequence only. Same request, seed and versions: same tokens, whatever else runs.
 * NEXT    server/server.h above, engine/engine.h below. */
#pragma once
#include "engine/engine.h"

typedef struct choir_scheduler choir_scheduler;
typedef struct choir_stream choir_stream;

typedef struct choir_scheduler_options {
    uint32_t max_sequences;    /* running at once (--max-num-seqs); <= engine max_spans */
    uint32_t max_step_tokens;  /* token budget of a step (--max-num-batched-tokens); <= engine max_rows, up to
                                * which it grows while steps wait for streamed experts */
    uint32_t max_queued;       /* requests waiting for admission */
    uint32_t max_tokens_per_sequence; /* --max-model-len; 0: the model's */
    uint32_t outbox_bytes;     /* pending output of one request before its sequences pause */
    uint32_t slow_reader_ms;   /* paused for longer: cancelled, pages freed */
    uint32_t stall_ms;         /* work pending and no step done for this long: unhealthy */
    uint32_t max_hold_ms;      /* with streamed experts, sequences that want others than the rest may be held
                                * back so long, so that the rest need not read theirs again; 0: never */
    bool prefix_cache;
    bool manual;               /* no thread: the caller ticks (tests, simulation) */
} choir_scheduler_options;
#define CHOIR_SCHEDULER_OPTIONS_DEFAULT                                                            \
    ((choir_scheduler_options){.max_sequences = 32,                                                \
                               .max_step_tokens = 512,                                             \
                               .max_queued = 256,                                                  \
                               .outbox_bytes = 64 << 10,                                           \
                               .slow_reader_ms = 30000,                                            \
                               .stall_ms = 30000,                                                  \
                               .max_hold_ms = 2000,                                                \
                               .prefix_cache = true})

/* The step the scheduler calls: choir_engine_step, or a simulated one in tests. */
typedef struct choir_step_engine {
    void *engine;
    choir_status (*step)(void *engine, choir_span *spans, uint32_t n_spans);
    void (*copy_page)(void *engine, uint32_t from, uint32_t to);
    void (*zero_page)(void *engine, uint32_t page);
    choir_experts_stats (*expert_stats)(void *engine); /* NULL: none are streamed */
    float (*expert_heat)(void *engine, uint32_t layer, uint32_t expert);
    uint32_t n_experts;
    /* NULL, or KV pages share memory with streamed experts: so many may be in use, at least kv_floor; what a
     * page holds is not needed any more */
    void (*set_pages)(void *engine, uint32_t n);
    void (*forget_page)(void *engine, uint32_t page);
    uint32_t kv_floor;
    choir_adapters *adapters; /* NULL: none; its adapters are choir_adapter, as spans take them */
    /* NULL, or adapters share that memory too: they would like so many bytes, and may have those it returns
     * now, which is adapter_floor at least */
    uint64_t (*set_adapter_bytes)(void *engine, uint64_t bytes);
    uint64_t adapter_floor;
    uint32_t n_pages, page_tokens, vocab, max_positions, max_rows, max_spans;
    const choir_tokenizer *tokenizer; /* NULL: no text, ids only */
    uint64_t digest;                  /* of what makes KV: the weights; part of every prefix key */
    const int32_t *eos_ids;           /* end an answer unless ignore_eos; lent */
    uint32_t n_eos;
    uint32_t n_layers, n_experts_used; /* the shape of a route; 0: none */
    /* NULL, or features of a prompt for a chooser, as choir_engine_probe makes them: of n_features numbers, behind
     * n_blocks blocks at most, of the prompt's last probe_tokens tokens */
    choir_status (*probe)(void *engine, choir_probe *probe);
    uint32_t n_features, n_blocks, probe_tokens;
} choir_step_engine;
choir_step_engine choir_step_engine_of(choir_engine *engine);

choir_status choir_scheduler_create(const choir_step_engine *engine,
                                    const choir_scheduler_options *options, choir_scheduler **out)
    CHOIR_MUST_USE;
void choir_scheduler_destroy(choir_scheduler *scheduler); /* cancels what is left, joins its thread */

enum { CHOIR_MAX_STOPS = 16, CHOIR_MAX_STOP_BYTES = 256, CHOIR_MAX_SAMPLES = 64 };

typedef struct choir_request_adapter {
    const char *name;
    float weight; /* 1 for an adapter alone; -CHOIR_MAX_ADAPTER_WEIGHT … CHOIR_MAX_ADAPTER_WEIGHT in a mix */
} choir_request_adapter;
enum { CHOIR_MAX_ADAPTER_WEIGHT = 8 };

/* How the prompt looks to the model alone, early in the network; lent for the call. */
typedef struct choir_prompt_features {
    const float *mean; /* [n] */
    uint32_t n;
    float gate_entropy;
    uint32_t n_tokens; /* of the prompt */
} choir_prompt_features;

typedef struct choir_choice {
    choir_request_adapter adapters[CHOIR_MAX_MIX]; /* names are lent until release() */
    uint32_t n;                                    /* 0: the model alone */
} choir_choice;

/* Who chooses a request's adapters when its prompt has been looked at. From submit's CHOIR_OK on `user` is the
 * scheduler's: choose() is called at most once (not where the request ends before, or its prompt cannot be
 * probed), then release() exactly once; both on the engine thread, or release() on destroy()'s. Neither may block
 * or call the scheduler. Either may run before submit has returned. */
typedef struct choir_chooser {
    void (*choose)(void *user, const choir_prompt_features *features, choir_choice *out); /* NULL: nobody */
    void (*release)(void *user); /* may be NULL */
    void *user;
    uint32_t n_blocks; /* of the probe: choir_probe */
} choir_chooser;

/* Lent for the call to submit, which copies. */
typedef struct choir_request {
    const uint32_t *tokens;
    size_t n_tokens;
    choir_sampling sampling; /* index and stop_ids are set by the scheduler */
    uint32_t max_tokens;     /* 0: as many as fit */
    uint32_t n;              /* samples, 1 .. 64; they share the prompt's pages */
    bool ignore_eos;
    bool want_logprobs;      /* deltas carry logprobs (sampling.top_logprobs alternatives) */
    bool want_routes;
    bool skip_special;       /* special tokens are left out of the text */
    const char *const *stops; /* texts that end the answer; not part of it */
    uint32_t n_stops;
    const uint32_t *stop_ids;
    uint32_t n_stop_ids;
    int32_t priority;        /* higher first; equal: first come, first served */
    uint64_t deadline_ns;    /* choir_clock_now() time; 0: none */
    uint64_t cache_salt;     /* tenant: prefix hits never cross it */
    /* What the answer is computed with besides the model: a mix of adapters, each once; at most CHOIR_MAX_MIX.
     * Until they are in memory the request waits, and only it; then it keeps their versions to its end. Virtual
     * tokens of soft prompts stand before the prompt: they take room in the context, and are in no count. */
    const choir_request_adapter *adapters;
    uint32_t n_adapters;
    /* Or they are left open: chosen when the request's turn has come, and claimed as if it had named them. Where
     * that fails, also later when they cannot be loaded, the model answers alone: the stream tells what it was. */
    choir_chooser chooser;
} choir_request;

typedef enum choir_finish {
    CHOIR_FINISH_NONE,
    CHOIR_FINISH_STOP,   /* EOS, stop id or stop text */
    CHOIR_FINISH_LENGTH, /* max_tokens or the context's end */
    CHOIR_FINISH_ERROR,
} choir_finish;

typedef enum choir_event_kind { CHOIR_EVENT_STARTED, CHOIR_EVENT_DELTA, CHOIR_EVENT_DONE } choir_event_kind;

typedef struct choir_token_logprob {
    uint32_t token;
    float logprob;
    uint32_t n_top;
    const uint32_t *top_tokens;
    const float *top_logprobs;
} choir_token_logprob;

typedef struct choir_usage {
    uint32_t prompt_tokens, cached_tokens, output_tokens; /* output: over all samples */
    uint32_t n_preemptions;
    uint64_t queue_ns, prefill_ns, decode_ns; /* queue: submit to first step; prefill: to first token */
    uint64_t adapter_ns; /* of queue: it could have run, but for its adapters */
} choir_usage;

typedef struct choir_event {
    choir_event_kind kind;
    /* DELTA: whole characters and the tokens they end with; text may be empty while held back */
    uint32_t index;
    const char *text;
    size_t text_bytes;
    const uint32_t *tokens;
    const choir_token_logprob *logprobs; /* [n_tokens] when wanted */
    uint32_t n_tokens;
    /* when wanted: [n_layers, k] of the position the token was drawn from, and the weights alike */
    const uint16_t *route_experts;
    const float *route_weights;
    /* STARTED: usage.prompt_tokens, cached_tokens; sent with the first token. DONE: all */
    choir_usage usage;
    choir_status status;           /* DONE: CHOIR_OK, or why it ended; message is the sentence */
    const char *message;
    const choir_finish *finish;    /* DONE: [n] */
    const uint32_t *stop_match;    /* DONE: [n] index of the stop text, or UINT32_MAX */
    uint32_t n_finish;
    /* STARTED, and DONE if it has started: what it is computed with besides the model; lent until the stream's
     * release. None where an adapter's invocation does not occur. */
    const choir_request_adapter *adapters;
    uint32_t n_adapters;
} choir_event;

/* `wake` is called (any thread, must not block or call back) whenever the stream may have become
 * readable. On success exactly one choir_stream_release() must follow. */
choir_status choir_scheduler_submit(choir_scheduler *scheduler, const choir_request *request,
                                    void (*wake)(void *user), void *user, choir_stream **out)
    CHOIR_MUST_USE;
uint32_t choir_scheduler_retry_ms(choir_scheduler *scheduler); /* hint after CHOIR_E_FULL */

/* Takes the next event; false: none now. Its pointers are lent until the next call or release. The
 * last event is DONE. */
bool choir_stream_next(choir_stream *stream, choir_event *out);
/* Waits up to timeout_ns for an event (for callers without an event loop). */
bool choir_stream_wait(choir_stream *stream, uint64_t timeout_ns, choir_event *out);
void choir_stream_cancel(choir_stream *stream);  /* takes effect at the next step; DONE follows */
void choir_stream_release(choir_stream *stream); /* must be called exactly once; cancels if running */

/* One step by hand (options.manual). False: nothing to do. */
bool choir_scheduler_tick(choir_scheduler *scheduler);

typedef struct choir_scheduler_stats {
    uint32_t n_running, n_waiting, n_paused;
    uint32_t n_fetching; /* of n_waiting: those whose adapters are not there yet, or whose turn has not come */
    uint32_t n_choosing; /* of n_waiting: those whose adapters are not chosen yet */
    uint32_t n_pages, n_pages_free, n_pages_cached; /* cached: only the prefix cache holds them */
    uint64_t n_steps, n_prompt_tokens, n_cached_tokens, n_output_tokens;
    uint64_t n_late; /* spans that were sent back to wait for an expert */
    uint64_t n_chosen, n_fell_back; /* requests whose adapters were chosen; that go on without those */
    uint64_t n_accepted, n_refused, n_done, n_cancelled, n_expired, n_failed, n_preempted;
    uint64_t last_step_ns, step_ns_total, rows_total; /* rows_total / n_steps: mean batch */
    choir_experts_stats experts; /* as of the last step */
    choir_adapters_stats adapters; /* as of now; all 0 where there are none */
    uint32_t n_read_groups;      /* that take turns for the disk's sake; 1: all run together */
    uint32_t step_tokens;        /* the token budget now */
    bool healthy;                                     /* forward progress, or nothing to do */
} choir_scheduler_stats;
/* Uses of streamed experts, aged, as of some steps ago: [n_layers, n_experts]; NULL to ask for the length;
 * 0: none are streamed. */
size_t choir_scheduler_get_expert_heat(choir_scheduler *scheduler, float *out);
void choir_scheduler_get_stats(choir_scheduler *scheduler, choir_scheduler_stats *out);
choir_adapters *choir_scheduler_adapters(const choir_scheduler *scheduler); /* the engine's, or NULL */

/* Refuses new requests (CHOIR_E_UNAVAILABLE); running ones go on. True once nothing is left. */
void choir_scheduler_drain(choir_scheduler *scheduler);
bool choir_scheduler_idle(choir_scheduler *scheduler);
