/* The scheduler's own picture of requests and sequences; internal to scheduler/.
 *
 *   (client) ───────────┬──────────────────────────┐ submit, with a chooser
 *      │                │ submit, with adapters    ▼
 *      │                ▼      chosen: claimed  CHOOSING
 *      │             FETCHING ◀────────────────────┤
 *      │                │ its turn, and they are   │ chosen: the model alone,
 *      │                │ in memory: pinned; or    │ or what cannot be had
 *      │                │ chosen, and they failed  │
 *      │                │   ┌──────────────────────┘
 *      │ submit         ▼   ▼    admit: pages            last token drawn
 *      └───────────▶ WAITING ──────────────▶ RUNNING ───────────────────▶ ENDED
 *                       ▲   preempt: pages away  │ ▲
 *                       └────────────────────────┤ │ outbox drained
 *                       ▲          outbox full   ▼ │
 *                       └──── pages away ────  PAUSED
 *   Any state but ENDED ends on cancel, deadline, a reader too slow, or an error. sequence_move()
 * is the only way. A paused sequence holds no slot, and its pages only while nobody else wants
 * them. A request that has left FETCHING holds its adapters' pins to its end; before, only claims;
 * in CHOOSING nothing at all.
 *
 * THREADS request and sequence belong to the engine thread once submitted; a stream is shared with
 * its consumer under stream.lock. */
#pragma once
#include "scheduler/prefix_cache.h"
#include "scheduler/scheduler.h"

#include <pthread.h>
#include <stdatomic.h>

enum { NO_STOP = UINT32_MAX, NO_GROUP = UINT32_MAX, DELTA_ROOM = 4096 };

typedef enum sequence_state {
    SEQ_CHOOSING,
    SEQ_FETCHING,
    SEQ_WAITING,
    SEQ_RUNNING,
    SEQ_PAUSED,
    SEQ_ENDED,
    N_SEQUENCE_STATES
} sequence_state;

/* The consumer's end of a request. Deltas lie in a ring of records; STARTED and DONE are flags, so
 * that an end always finds room. Freed when both sides have let go. */
struct choir_stream {
    choir_scheduler *scheduler;
    pthread_mutex_t lock;
    pthread_cond_t readable;
    uint8_t *ring;
    size_t ring_bytes, head, used; /* records from head on */
    uint8_t *view;                 /* the record lent to the consumer */
    size_t view_bytes;
    bool started, started_taken, done, done_taken, released, finished_by_engine, wanted_room;
    choir_usage usage, usage_at_start;
    choir_status status;
    char message[512];
    choir_finish finish[CHOIR_MAX_SAMPLES];
    uint32_t stop_match[CHOIR_MAX_SAMPLES], n_finish;
    /* What the answer is computed with, once it has started. */
    char adapter_names[CHOIR_MAX_MIX][CHOIR_ADAPTER_MAX_NAME + 1];
    choir_request_adapter adapters[CHOIR_MAX_MIX];
    uint32_t n_adapters;
    bool broken;               /* a record could not be lent for lack of memory: it ends so */
    size_t outbox_bytes;       /* a copy: the scheduler may be gone before its streams */
    uint32_t n_layers, n_used; /* shape of a route */
    void (*wake)(void *user);
    void *user;
    atomic_bool cancelled; /* release by cancel(), acquire by the tick */
};

/* What a request is computed with; scheduler/adapters.c. */
typedef struct request_adapters {
    choir_adapters *pool;
    choir_adapter_claim claims[CHOIR_MAX_MIX];
    float weights[CHOIR_MAX_MIX];
    uint32_t n;
    /* Once they are pinned: */
    choir_adapter_use uses[CHOIR_MAX_MIX];
    uint32_t n_uses;    /* 0 too where they never begin to act: the model answers alone */
    uint32_t from;      /* rows at positions below are the model's alone */
    uint32_t n_virtual; /* tokens before the prompt */
    prefix_key key;     /* of all that */
    uint64_t missed_ns; /* its turn had come, and they were not there; 0: not yet */
} request_adapters;

typedef struct request request;

typedef struct sequence {
    request *of;
    uint32_t index;
    sequence_state state;
    uint32_t *tokens; /* virtual ones, the prompt, then what was drawn; room for all */
    uint32_t n_tokens, n_prompt, n_computed; /* n_computed: those whose KV is in the pages; n_prompt: with
                                              * the virtual ones */
    uint32_t *pages, n_pages, max_pages;
    prefix_key *keys;      /* [max_pages + 1]: keys[i + 1] is page i's */
    uint32_t n_registered; /* full pages the prefix cache was told of */
    choir_sampler *sampler;
    choir_detokenizer *detokenizer;
    char *held; /* text that may begin a stop text */
    size_t n_held;
    choir_finish finish;
    uint32_t stop_match;
    bool selected;       /* has a span in this step */
    uint32_t n_rows;     /* of that span */
    choir_routes routes; /* of the span, when wanted */
    float *wants;        /* NULL, or [n_layers, n_experts]: how likely a token wants each; reads.c */
    choir_routes drawn_by; /* of the last token, where experts are streamed */
    uint32_t n_seen, group; /* tokens that `wants` has learnt from; NO_GROUP: it runs with everybody */
    uint64_t ran_ns;        /* when it was last given rows */
} sequence;

struct request {
    request *next; /* in the mailbox */
    choir_stream *stream;
    sequence *sequences; /* [n]; 0 prefills, the others fork from it */
    uint32_t n, n_ended;
    uint32_t max_new, min_new;
    bool want_logprobs, want_routes;
    char *stops[CHOIR_MAX_STOPS];
    size_t stop_bytes[CHOIR_MAX_STOPS], longest_stop;
    uint32_t n_stops;
    uint32_t end_ids[CHOIR_MAX_END_IDS], n_end_ids;
    int64_t rank;           /* lower goes first: the arrival, less the priority's worth */
    int64_t arrival;        /* its time, as no other has it; grows from request to request */
    uint64_t blocked_since; /* the outbox has been full since; 0: it has room */
    uint64_t deadline_ns, submitted_ns, first_step_ns, first_token_ns;
    prefix_key root;
    choir_usage usage;
    bool admitted;
    request_adapters adapters;
    choir_chooser chooser; /* until it was asked */
    bool chosen;           /* it has been: the adapters are its choice */
};

typedef struct read_sums {
    double steps, rows, ns, stall_ns, misses;
} read_sums;

/* Who runs with whom for the disk's sake; reads.c. */
typedef struct read_groups {
    bool streamed;
    size_t n_pairs;      /* n_layers * n_experts */
    float *absent;       /* scratch */
    uint32_t n_groups;   /* below 2: all run together */
    uint32_t turn, n_steps, turn_steps; /* whose turn it is, steps it has had and may have */
    uint64_t turn_began_ns, turn_ns;    /* and how long it may take */
    uint32_t until_review, shun;        /* steps; reviews without groups */
    uint32_t step_tokens;               /* rows of a step at most, now */
    double step_ns, token_ns[2];        /* measured: a step; a token together, and in groups (0: unknown) */
    read_sums sums;
} read_groups;

struct choir_scheduler {
    choir_step_engine engine;
    choir_scheduler_options options;
    kv_pages pages;
    prefix_cache *prefix; /* NULL: off */
    uint32_t n_kv_pages, n_idle_ticks; /* pages that may be in use; kv_share.c */
    uint64_t adapter_bytes;            /* that adapters were asked for; kv_share.c */
    uint32_t n_spare_ticks;
    uint64_t n_bad_news; /* of adapters, that were looked at */
    read_groups reads;

    pthread_t thread;
    bool threaded;
    pthread_mutex_t lock; /* guards mailbox, flags and published */
    pthread_cond_t work;
    request *mailbox_first, *mailbox_last;
    bool stopping, draining, nudged;
    uint32_t n_held_requests; /* submitted and not ended: bounds the queue */
    uint32_t n_not_admitted, n_held_samples;
    uint64_t published_request_ns; /* mean time of a request */
    choir_scheduler_stats published;
    float *published_heat;          /* [n_layers, n_experts], or NULL */
    _Atomic int64_t last_arrival; /* relaxed */

    _Atomic uint64_t
        last_progress_ns; /* release by the tick and the first submit, acquire by get_stats */
    atomic_bool busy;     /* likewise: there is work a step could do */

    /* the engine thread's */
    sequence **live; /* every sequence not ended, in no order */
    uint32_t n_live, max_live;
    sequence **order; /* scratch: the live ones by rank */
    choir_span *spans;
    sequence **span_of;
    float *features; /* scratch, NULL or [engine.n_features] */
    choir_scheduler_stats stats;
    uint64_t mean_request_ns;
    request *ended; /* freed at the end of the tick, when nothing points to them any more */
};

/* sequence.c */
choir_status request_create(choir_scheduler *s, const choir_request *from, choir_stream *stream,
                            request **out) CHOIR_MUST_USE;
void request_destroy(request *r);
void sequence_move(choir_scheduler *s, sequence *q, sequence_state to);
void sequence_drop_pages(choir_scheduler *s, sequence *q, bool suspect);
uint32_t sequence_remaining(const sequence *q); /* tokens that it may still draw */
/* Takes one drawn token: text, stops, ends; puts the delta into the outbox. */
void sequence_take_token(choir_scheduler *s, sequence *q, const choir_sample *sample);
/* Ends every sequence of a request; `message` NULL: a good end. */
void request_end(choir_scheduler *s, request *r, choir_status status, const char *message);

/* stream.c */
choir_status stream_create(choir_scheduler *s, void (*wake)(void *), void *user,
                           choir_stream **out) CHOIR_MUST_USE;
void stream_free(choir_stream *stream);
typedef struct delta {
    uint32_t index;
    const char *text;
    size_t text_bytes;
    const choir_sample *sample; /* NULL: text only */
    bool logprobs;
    const choir_routes *routes; /* of one position */
} delta;
bool stream_has_room(choir_stream *stream,
                     uint32_t n_deltas); /* notes that room is wanted if not */
void stream_start(choir_stream *stream, const request *r);
choir_status stream_put(choir_stream *stream, const delta *d) CHOIR_MUST_USE;
void stream_finish(choir_stream *stream, const request *r, choir_status status,
                   const char *message);
void stream_wake(choir_stream *stream);

/* kv_share.c */
void kv_share_begin(choir_scheduler *s);
void kv_share_before_step(choir_scheduler *s);

/* adapters.c */
choir_status adapters_check(const choir_scheduler *s, const choir_request *from) CHOIR_MUST_USE;
/* Claims them; where they have virtual tokens as of now, it says how many. */
choir_status adapters_claim(choir_scheduler *s, const choir_request *from, request *r,
                            uint32_t *n_virtual) CHOIR_MUST_USE;
void adapters_release(request *r);
/* At its turn: true when they are pinned, and its sequences WAITING; false: they are not, or it has ended. */
bool adapters_fetched(choir_scheduler *s, request *r);
void adapters_end_failed(choir_scheduler *s); /* requests whose adapters will not come */
/* Those that were chosen are let go, and its sequences WAITING: the model answers alone. */
void adapters_fall_back(choir_scheduler *s, request *r);
void adapters_note_poison(request *r, const choir_span *span);
/* The key of a full page of the sequence, whose keys up to it are known. */
prefix_key sequence_page_key(const choir_scheduler *s, const sequence *q, uint32_t page);

/* chooser.c */
choir_status chooser_check(const choir_scheduler *s, const choir_request *from) CHOIR_MUST_USE;
/* Of the first n of s->order, by rank, as far as a tick's probes go. False: nobody had to choose. */
bool choosers_take_turns(choir_scheduler *s, uint32_t n);
void chooser_release(request *r);

/* reads.c */
choir_status reads_create(choir_scheduler *s) CHOIR_MUST_USE;
void reads_destroy(choir_scheduler *s);
void reads_know(choir_scheduler *s, sequence *q); /* a sequence begins to run */
void reads_forget(sequence *q);
void reads_before_choice(choir_scheduler *s); /* s->order is by rank */
bool reads_may_run(const choir_scheduler *s, const sequence *q, uint64_t now);
void reads_note(choir_scheduler *s, sequence *q, const choir_routes *routes); /* NULL: unknown */
void reads_after_step(choir_scheduler *s, uint32_t n_rows, uint32_t n_spans);

/* tick.c */
bool scheduler_tick(choir_scheduler *s);
/* scheduler.c */
void scheduler_nudge(choir_scheduler *s);
