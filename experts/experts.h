/* WHAT    The expert store: makes (layer, expert) reachable. All experts resident in RAM, or a budget of
 *         slots that are filled from NVMe as the router wants them.
 * OWNS    The experts' packed weights, its slots, its reads in flight.
 * THREADS Loading: any worker, disjoint experts. Everything else: the engine thread; check(): any worker,
 *         disjoint experts. Statistics are copied out by the engine thread.
 * ERRORS  CHOIR_E_NO_MEMORY; CHOIR_E_NOT_FOUND for an expert that was never put. Of a single expert:
 *         CHOIR_E_DATA_LOSS (unreadable or damaged after retries), CHOIR_E_UNAVAILABLE (the disk stalls).
 * LIMITS  Every pin is paired with one unpin; the view ends there. What is pinned is never evicted, and
 *         bytes whose checksum is wrong are never handed out.
 * NEXT    engine/moe.c; experts/store.h for the slots' states, experts/disk.h for the reads,
 *         experts/policy.h for who is evicted */
#pragma once
#include "base/base.h"
#include "engine/kernels/kernels.h"
#include "experts/adapters.h"
#include "experts/disk.h"
#include "experts/policy.h"

typedef struct choir_experts choir_experts;

typedef struct choir_expert {
    choir_matrix gate, up, down; /* [ffn, hidden], [ffn, hidden], [hidden, ffn] */
    const float *gate_bias, *up_bias, *down_bias; /* NULL, or [ffn], [ffn], [hidden]; the caller's */
} choir_expert;

static inline const choir_matrix *choir_expert_part(const choir_expert *expert, uint32_t part)
{
    return part == 0 ? &expert->gate : part == 1 ? &expert->up : &expert->down;
}

/* Turns bytes as a file has them into the kernels' layout: staged[i] is the first byte of extent i, `into`
 * has its data in place; part 0 is the gate, 1 up, 2 down. Any worker. False: no memory, and the expert is
 * tried again. */
typedef bool (*choir_expert_unpack)(void *user, uint32_t layer, uint32_t expert, uint32_t part,
                                    const uint8_t *const *staged, const choir_expert *into);

typedef struct choir_experts_options {
    uint32_t n_layers, n_experts;
    choir_io io;
    uint32_t queue_depth;     /* reads in flight */
    choir_policy_kind policy;
    uint64_t stall_ns;        /* the disk gives nothing for so long: who waits is sent on without */
    uint64_t quarantine_ns;   /* an expert that could not be read is not tried again for so long */
    choir_disk *disk;         /* NULL, or taken over (tests) */
    choir_expert_unpack unpack; /* NULL when all experts lie packed */
    void *user;
} choir_experts_options;
#define CHOIR_EXPERTS_OPTIONS_DEFAULT                                                              \
    ((choir_experts_options){.queue_depth = 16,                                                    \
                             .policy = CHOIR_POLICY_DEFAULT,                                       \
                             .stall_ns = CHOIR_SECOND,                                             \
                             .quarantine_ns = 30 * CHOIR_SECOND})

choir_status choir_experts_create(const choir_experts_options *options, choir_experts **out)
    CHOIR_MUST_USE;
void choir_experts_destroy(choir_experts *store);

/* -- loading, all resident -- */

/* Reserves a layer's experts, each one run of bytes behind the other, from their planned matrices
 * (choir_matrix_plan; views, which have data already, need no bytes), and sets the matrices' data in place; the caller then
 * packs into them. experts: [n_experts]. */
choir_status choir_experts_reserve(choir_experts *store, uint32_t layer, choir_expert *experts)
    CHOIR_MUST_USE;

/* -- loading, streamed -- */

enum { CHOIR_EXPERT_EXTENTS = 6, CHOIR_EXPERT_PARTS = 3 };
typedef struct choir_expert_extent {
    uint32_t file; /* of choir_experts_add_file() */
    uint32_t bytes;
    uint64_t offset;
} choir_expert_extent;

/* One extent that is a run (choir_expert_run_bytes, padded to CHOIR_DISK_PAGE, at such an offset) with
 * XXH3 of its matrices; or what unpack() makes a run of. */
typedef struct choir_expert_source {
    bool packed;
    uint32_t n_extents;
    choir_expert_extent extents[CHOIR_EXPERT_EXTENTS];
    uint64_t checksums[CHOIR_EXPERT_PARTS]; /* packed */
} choir_expert_source;

choir_status choir_experts_add_file(choir_experts *store, const char *path, uint32_t *out)
    CHOIR_MUST_USE;
/* `planned`: matrices without data. */
choir_status choir_experts_place(choir_experts *store, uint32_t layer, uint32_t expert,
                                 const choir_expert *planned, const choir_expert_source *source)
    CHOIR_MUST_USE;
/* Gate, up and down behind each other, each at a multiple of 64 bytes. */
size_t choir_expert_run_bytes(const choir_expert *planned);
/* Sets the matrices' data in a run at `data`. */
void choir_expert_place_run(choir_expert *planned, void *data);

/* Once all are placed: room for slots within `bytes`, staging included; max_slots 0: no other limit.
 * CHOIR_E_INVALID names how much the least is. Memory is taken slab by slab as slots are needed. */
choir_status choir_experts_start(choir_experts *store, uint64_t bytes, uint32_t max_slots)
    CHOIR_MUST_USE;
/* The budget now; a smaller one takes effect as slots become free. Returns the bytes still held. */
uint64_t choir_experts_set_budget(choir_experts *store, uint64_t bytes);
uint64_t choir_experts_least_bytes(const choir_experts *store); /* what start() wants at least */

/* -- a layer's demand: request, then collect … check … admit … release until collect() gives none -- */

typedef struct choir_expert_use {
    uint32_t expert, n_rows;
    float weight;       /* sum over the rows */
    uint32_t remaining; /* tokens that the longest of their requests may still draw; 0: unknown */
} choir_expert_use;

void choir_experts_step(choir_experts *store); /* a step begins */
/* Starts the reads of those that are cold; `uses` ascend. The one before has ended. */
void choir_experts_request(choir_experts *store, uint32_t layer, const choir_expert_use *uses,
                           uint32_t n);
/* Of the experts within reach that were not given yet, at most `max`, ids ascending: those that need no check;
 * with `wait` also those that do, and it waits for one. 0: none are left, or (wait) those left will not come:
 * choir_experts_missing(). */
uint32_t choir_experts_collect(choir_experts *store, bool wait, uint32_t max, uint16_t *ids);
/* True while requested experts have not been collected. */
bool choir_experts_pending(const choir_experts *store);
/* Between collect and admit, all parts, each on any worker: sees to it that what was read is right. */
void choir_experts_check(choir_experts *store, uint32_t layer, uint32_t expert, uint32_t part);
uint32_t choir_experts_n_in_flight(const choir_experts *store); /* reads, those not sent yet included */
/* Pinned until release(); NULL: it was damaged and is read again, collect() will give it. */
const choir_expert *choir_experts_admit(choir_experts *store, uint32_t layer, uint32_t expert);
void choir_experts_release(choir_experts *store, uint32_t layer, uint32_t expert);
/* Ends a request: the experts that did not come, and why. */
typedef struct choir_expert_missing {
    uint32_t expert;
    choir_status status;
} choir_expert_missing;
uint32_t choir_experts_missing(choir_experts *store, choir_expert_missing *out);

/* Real loads of experts that the next layer may want, best first, into slots that are colder. As many as
 * the disk is likely to read until then; none while guesses have not paid. Returns how many were begun. */
uint32_t choir_experts_prefetch(choir_experts *store, uint32_t layer, const uint16_t *experts,
                                uint32_t n);

/* Any thread: its shapes and biases; its matrices have data only where all experts are resident. */
const choir_expert *choir_experts_describe(const choir_experts *store, uint32_t layer, uint32_t expert);
/* One expert alone, for loading and tests: resident ones only. */
choir_status choir_experts_pin(choir_experts *store, uint32_t layer, uint32_t expert,
                               const choir_expert **out) CHOIR_MUST_USE;
void choir_experts_unpin(choir_experts *store, uint32_t layer, uint32_t expert);

enum { CHOIR_LATENCY_BUCKETS = 40 }; /* bucket i: [2^i, 2^(i+1)) microseconds / 8 */
typedef struct choir_experts_stats {
    bool streamed;
    const char *io, *policy;
    uint32_t n_experts, n_slots, n_slots_used; /* experts of all layers; slots within the budget */
    uint64_t budget_bytes, held_bytes;
    uint64_t n_hits, n_late_hits, n_misses; /* requested: in a slot, on their way already, cold */
    uint64_t n_prefetched, n_prefetch_used, n_prefetch_wasted;
    uint64_t n_predicted, n_predicted_right; /* (row, expert) pairs: recall of the prediction */
    bool prefetching;                        /* it pays, at the moment */
    uint64_t n_reads, bytes_read, n_retries, n_damaged, n_failed, n_late; /* n_late: sent on without */
    uint64_t stall_ns, busy_ns; /* the step waited; reads were in flight */
    uint64_t latency[CHOIR_LATENCY_BUCKETS], latency_ns; /* of each expert's load; their sum */
} choir_experts_stats;
void choir_experts_get_stats(const choir_experts *store, choir_experts_stats *out);
/* The latency, in seconds, that a share of the reads stayed below. */
double choir_experts_latency(const choir_experts_stats *stats, double share);
float choir_experts_heat(const choir_experts *store, uint32_t layer, uint32_t expert);
/* Of n pairs that were predicted so many were right: statistics. */
void choir_experts_note_prediction(choir_experts *store, uint32_t n, uint32_t n_right);
bool choir_experts_streamed(const choir_experts *store);
bool choir_experts_in_reach(const choir_experts *store, uint32_t layer, uint32_t expert);

uint64_t choir_experts_bytes(const choir_experts *store);
uint32_t choir_experts_n_pinned(const choir_experts *store); /* 0 between steps */
