/* WHAT    The store's own picture: entries (what there is), slots (where it can be), a request.
 * OWNS    struct choir_experts owns all below it.
 * THREADS As experts/experts.h.
 * ERRORS  None of its own.
 * LIMITS  Invariants, checked by tests/experts/schedule_test.c:
 *         1. an entry has a slot exactly while the slot has the entry, and slots are moved by slot_move() alone;
 *         2. a pinned entry's slot is LOADING, ARRIVED or READY, and never becomes FREE but by its own failure;
 *         3. only READY slots are handed out, and bytes become READY only after their check;
 *         4. a completion whose generation is not the slot's is dropped.
 *
 *                     start_load            slot_arrive            check ok
 *             FREE ---------------> LOADING -----------> ARRIVED -----------> READY
 *              ^                     |   ^                 |  |                 |
 *              |       slot_fail     |   |    damaged      |  |                 |
 *              +---------------------+   +-----------------+  |                 |
 *              +------------------- evict --------------------+-----------------+
 * NEXT    experts/slots.c, experts/demand.c */
#pragma once
#include "experts/experts.h"

typedef enum slot_state { SLOT_FREE, SLOT_LOADING, SLOT_ARRIVED, SLOT_READY } slot_state;

enum { PART_UNCHECKED, PART_GOOD, PART_DAMAGED };
enum { NONE = -1, MAX_TRIES = 3, MAX_GUESSES = 64 };

/* What has become of a wanted expert. */
typedef enum want { WANT_COLD, WANT_AWAITED, WANT_GIVEN } want;

typedef struct entry {
    choir_expert expert; /* data is NULL while it is in no slot */
    choir_expert_source source;
    uint32_t n_pins;
    int32_t slot;
    bool resident; /* in a region, for good */
    uint64_t quarantined_until; /* 0: it is not */
} entry;

typedef struct slot {
    slot_state state;
    uint8_t *data;
    uint32_t slab, entry, generation;
    int32_t staging;      /* a buffer that an unpacked expert is read into */
    uint8_t n_extents_sent, n_extents_arrived, tries;
    bool speculative;     /* prefetched, and not wanted yet */
    bool late;            /* who wanted it went on without it */
    uint8_t parts[CHOIR_EXPERT_PARTS]; /* what check() found, each part by one worker */
    int error;            /* errno of its first failed read */
    uint64_t sent_ns;
} slot;

/* Slots come and go by slabs, so that memory can be given back. */
typedef struct slab {
    uint8_t *data; /* NULL: not held */
} slab;

/* A layer's experts lie in one region, so that large pages are not wasted on small experts. */
typedef struct region {
    void *data;
    size_t bytes;
} region;

typedef struct staging {
    uint8_t *data;
    bool taken;
} staging;

typedef struct wanted {
    uint32_t expert;
    want state;
} wanted;

/* What a layer's misses have cost, aged: some layers compute or read ahead while they wait, others cannot. */
typedef struct miss_cost {
    double stall_ns, n;
} miss_cost;

/* A slot that may go, and what its expert is worth. */
typedef struct victim {
    double value;
    uint32_t slot;
} victim;

struct choir_experts {
    choir_experts_options options;
    uint32_t n_layers, n_experts;
    entry *entries;  /* [n_layers, n_experts] */
    region *regions; /* [n_layers] */
    uint64_t resident_bytes;
    uint32_t n_pinned;

    choir_disk *disk;
    choir_policy *policy;
    int *fds;
    uint64_t *file_bytes;
    uint32_t n_files;

    size_t slot_bytes, slab_bytes, staged_bytes;
    uint32_t slots_per_slab, max_slabs, n_slabs_allowed, n_slabs_held, slot_limit;
    slab *slabs;     /* [max_slabs] */
    slot *slots;     /* [max_slabs * slots_per_slab] */
    uint32_t n_slots_used;
    uint32_t *free_slots, n_free_slots; /* of held slabs */
    uint32_t *sending, n_sending;       /* LOADING slots with extents that the disk had no room for */
    victim *victims;                    /* scratch, one for each slot */
    staging *stagings;
    uint8_t *staging_data;
    uint32_t n_stagings;

    /* the request */
    uint32_t layer, n_wanted, n_left; /* n_left: not collected yet */
    wanted *wanted;                   /* [n_experts] */
    miss_cost *miss_costs;            /* [n_layers] */

    /* guesses: what was read ahead and has not been wanted yet */
    uint32_t *guesses, n_guesses;  /* [MAX_GUESSES] slots */
    double right, wrong;           /* decayed counts */
    uint64_t guessed_at, window_ns; /* when the last were sent; mean time from then to the next demand */
    bool guessing;                 /* in this block of layers */
    double gain;                   /* log of the cost without over that with guesses: mean of pairs of blocks */
    double cost_before;            /* ns per wanted expert, of the block before */
    bool guessed_before;
    uint64_t layer_began, block_ns, block_wanted;
    uint32_t layer_wanted, block_layers, n_blocks, n_pairs;

    uint32_t n_reads_in_flight;
    uint64_t busy_since, progress_ns; /* progress: when the disk last gave something, or was last asked */
    bool stalled; /* it gave nothing for stall_ns, nor anything since: nobody waits for it */
    choir_experts_stats stats;
};

static inline entry *entry_at(const choir_experts *store, uint32_t layer, uint32_t expert)
{
    CHOIR_ASSERT(layer < store->n_layers && expert < store->n_experts);
    return &store->entries[(size_t)layer * store->n_experts + expert];
}

/* experts/slots.c */
void slot_move(choir_experts *store, slot *s, slot_state to);
/* The coldest of the slots that may be evicted, in order, at most `most`, into store->victims. */
uint32_t slots_find_victims(choir_experts *store, uint32_t most);
/* A free slot: one that is, or of a slab not held yet; NULL: somebody has to go. */
slot *slots_take_free(choir_experts *store);
void slot_evict(choir_experts *store, slot *s);
/* The next of n victims from *at on that may still go; false: none. */
bool slots_evict_next(choir_experts *store, uint32_t *at, uint32_t n);
/* A guess that was read and holds a staging buffer goes; false: there is none. */
bool slots_free_staging(choir_experts *store);
void slots_shrink(choir_experts *store); /* gives slabs beyond the budget back, if it can */
void entry_pin(choir_experts *store, entry *e);
void entry_unpin(choir_experts *store, entry *e);

/* experts/prefetch.c */
void guesses_begin_layer(choir_experts *store, uint32_t n_wanted);
void guesses_end_layer(choir_experts *store, uint32_t layer); /* after the hits were counted */
void guess_was_right(choir_experts *store, slot *s);
void guess_was_wrong(choir_experts *store, slot *s);

/* experts/loads.c: reads of slots */
size_t choir_expert_staged_bytes(const choir_expert_source *source);
bool load_can_begin(const choir_experts *store, const entry *e); /* a staging buffer is there if it needs one */
bool loads_spare_staging(const choir_experts *store); /* more than half of the buffers are free */
void load_begin(choir_experts *store, slot *s, uint32_t entry, bool speculative);
void load_again(choir_experts *store, slot *s);
void loads_send(choir_experts *store);
void loads_reap(choir_experts *store, uint64_t wait_ns);
void load_check(choir_experts *store, slot *s, uint32_t part);
void load_end_staging(choir_experts *store, slot *s);
void slot_fail(choir_experts *store, slot *s, const char *why);
