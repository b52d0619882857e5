/* WHAT    The pool's own picture: names, versions, loads.
 * OWNS    struct choir_adapters owns all below it.
 * THREADS As experts/adapters.h. A load and the files that it has open are the loader's alone.
 * ERRORS  None of its own.
 * LIMITS  Invariants, checked by tests/experts/adapters_schedule_test.c:
 *         1. version_move() alone moves a version, and an adapter is there exactly while it is RESIDENT;
 *         2. a pinned version is RESIDENT, and a pinned or kept one is not evicted;
 *         3. the bytes of residents and the reservations of loads are within the budget, unless the budget was
 *            lowered below what is pinned and being loaded;
 *         4. a version that no name stands for ends with its last claim;
 *         5. a claim that is not pinned is of its name's current version, while the name is there.
 *
 *                        chosen: there is room                made
 *           REGISTERED ---------------------------> LOADING ----------> RESIDENT
 *             ^ ^  ^                                |  |                    |
 *             | |  | claimed again after retry_ns   |  | load_end           |
 *             | |  +-------------------------- FAILED <+                    |
 *             | +----- other files lie there -------+                       |
 *             +------------------------------- evict -----------------------+
 *         A version's end is possible in every state but LOADING: the loader frees it.
 * NEXT    experts/adapter_registry.c for names, experts/adapter_loads.c for the loader */
#pragma once
#include "experts/adapters.h"

#include <pthread.h>
#include <sys/stat.h>

enum {
    MAX_LOADS = 2,         /* at once: one is read while the other is made */
    PIECE_BYTES = 1 << 20, /* of a read */
    MAX_LOAD_TRIES = 3,
    MAX_CONFIG = 1 << 20,
    MAX_HEADER = 32 << 20,
    MAX_PATH = 4096,
};

typedef enum version_state {
    VERSION_REGISTERED,
    VERSION_LOADING,
    VERSION_RESIDENT,
    VERSION_FAILED,
    N_VERSION_STATES
} version_state;

/* Whether a file is still the one that it was. */
typedef struct file_mark {
    uint64_t device, inode, bytes;
    int64_t seconds, nanoseconds; /* of its last change */
} file_mark;

/* Where an adapter lies, and its open files. */
typedef struct adapter_files {
    int config, tensors;                         /* -1: there is none; it is not open */
    file_mark folder, config_mark, tensors_mark; /* folder: of the path itself */
} adapter_files;

typedef struct adapter_name {
    char *text;
    choir_adapter_version *current;
    uint64_t n_requests, n_loads, n_evictions, n_failures, n_waits, wait_ns;
} adapter_name;

/* What a version adds to the pool's sums. */
typedef struct version_sums {
    uint64_t wanted, kept;
    uint32_t n_absent;
} version_sums;

struct choir_adapter_version {
    adapter_name *of; /* NULL: it was replaced or unloaded, or is a candidate */
    char *name, *path;
    bool beneath, kept, quarantined, candidate; /* candidate: load() waits for it */
    file_mark folder, config, tensors;
    choir_adapter_facts facts;
    uint64_t number;
    version_state state;
    void *adapter;
    uint64_t bytes, digest; /* digest: 0 until it was read */
    choir_adapter_claim *claims;
    uint32_t n_claims, n_pins, n_poisoned;
    uint32_t n_holds; /* it does not end: load() comes back to it */
    uint64_t used;     /* LRU: the pool's count when it was last let go */
    uint64_t retry_at; /* FAILED */
    choir_status failure;
    char why[CHOIR_MAX_SENTENCE];
    version_sums sums;
    uint32_t place;                      /* in the pool's table */
    void *evicted;                       /* an adapter that the loader frees … */
    choir_adapter_version *next_evicted; /* … in this list */
    choir_adapter_version *next_ended;   /* no claim, no name: the loader frees it */
};

typedef struct adapter_load {
    choir_adapter_version *version; /* NULL: free */
    adapter_files files;
    char *config;
    size_t config_bytes;
    uint8_t *data;
    size_t room;
    uint64_t reserved, began_ns;
    uint32_t n_pieces, n_sent, n_in_flight, n_tries;
    int error;  /* errno of the first piece that failed */
    bool ready; /* files are open and the buffer is there */
} adapter_load;

struct choir_adapters {
    choir_adapters_options options;
    int folder; /* options.folder, or -1 */
    choir_disk *disk;
    pthread_t thread;
    bool threaded;

    pthread_mutex_t lock;         /* guards all below, but `loads`, which are the loader's */
    pthread_cond_t work, settled; /* for the loader; for load() */
    bool stopping, nudged;
    adapter_name **names; /* ascending */
    uint32_t n_names, names_room;
    choir_adapter_version **versions;
    uint32_t n_versions, versions_room, n_in_state[N_VERSION_STATES];
    choir_adapter_version *evicted, *ended; /* lists of what the loader frees */
    uint32_t n_candidates;
    uint64_t n_numbered, n_used, n_bad_news; /* bad news: claims may have gone bad since */
    uint64_t held_bytes, most_overhead; /* overhead: what loading takes besides */
    uint64_t going_bytes; /* besides held_bytes: of the lists of what the loader frees */
    version_sums sums;
    bool blocked; /* a claim of this urgency finds no room */
    int64_t blocked_urgency;
    uint64_t blocked_budget; /* when that was last looked at */
    choir_adapters_stats stats;
    adapter_load loads[MAX_LOADS];

    pthread_mutex_t wake_lock; /* guards: */
    void (*wake)(void *user);
    void *wake_user;
};

/* experts/adapter_files.c */
/* An adapter that is not fit is a precondition; what the disk or memory does is weather. */
choir_status adapter_failure(choir_status status);
choir_status files_open(const choir_adapters *pool, const char *name, const char *path,
                        bool beneath, bool direct, adapter_files *out) CHOIR_MUST_USE;
void files_close(adapter_files *files);
bool file_mark_same(const file_mark *a, const file_mark *b);
bool files_unchanged(const adapter_files *files); /* since they were opened */
/* The whole configuration, NUL behind it; NULL without one. choir_free() it. */
choir_status files_read_config(const adapter_files *files, const char *name, char **out,
                               size_t *bytes) CHOIR_MUST_USE;
/* As much of the tensors as check() wants. choir_free() it. */
choir_status files_read_header(const adapter_files *files, const char *name, void **out,
                               size_t *bytes) CHOIR_MUST_USE;
/* An open(2) of what lies beneath a folder, step by step, following no links. */
int open_by_steps(int folder, const char *path, int flags);

/* experts/adapter_versions.c; all under the lock */
/* NULL: no memory. */
choir_adapter_version *version_create(choir_adapters *pool, const choir_adapter_load *what,
                                      const adapter_files *files, const choir_adapter_facts *facts);
/* Without the lock, adapter and all. */
void version_free(choir_adapters *pool, choir_adapter_version *v);
void version_move(choir_adapters *pool, choir_adapter_version *v, version_state to);
/* After whatever changes its sums. */
void version_recount(choir_adapters *pool, choir_adapter_version *v);
void version_fail(choir_adapters *pool, choir_adapter_version *v, choir_status status,
                  const char *why);
void version_evict(choir_adapters *pool, choir_adapter_version *v);
/* No name stands for it any more: claims that are not pinned go to `next`, unless that is NULL. */
void version_retire(choir_adapters *pool, choir_adapter_version *v, choir_adapter_version *next);
/* Claims of former versions of its name that are not pinned become its own. */
void version_adopt(choir_adapters *pool, choir_adapter_version *v);
/* Its weights are others now. */
void version_renumber(choir_adapters *pool, choir_adapter_version *v);
/* While it is LOADING: other files lie at its path. It is REGISTERED as what they are, under a new number. */
void version_take_files(choir_adapters *pool, choir_adapter_version *v, const adapter_files *files,
                        const choir_adapter_facts *facts);
void version_end_if_idle(choir_adapters *pool, choir_adapter_version *v);
/* Its name's next version is being loaded: whatever befalls this one, claims that are not pinned wait for that. */
bool version_is_followed(const choir_adapters *pool, const choir_adapter_version *v);
uint64_t version_overhead(const choir_adapter_version *v);
int64_t version_urgency(const choir_adapter_version *v); /* of its most urgent claim */
void claim_link(choir_adapters *pool, choir_adapter_version *v, choir_adapter_claim *claim);
void claim_unlink(choir_adapters *pool, choir_adapter_claim *claim);
/* NULL: nothing is wanted that is not there, or on its way. */
choir_adapter_version *pool_next_load(choir_adapters *pool);
/* False: there is no room now for so many bytes, and nothing was evicted. */
bool pool_make_room(choir_adapters *pool, uint64_t bytes, int64_t urgency);
/* Evicts until what is held is within the budget, if it can. */
void pool_shrink(choir_adapters *pool);
/* Whether so many bytes could be had at all, beside those of adapters that are kept. */
choir_status pool_check_fits(const choir_adapters *pool, const char *name, uint64_t bytes,
                             uint64_t kept) CHOIR_MUST_USE;
void pool_nudge(choir_adapters *pool);

/* experts/adapter_registry.c; the first without the lock, the others under it */
/* Opens what lies there, and asks check() of its headers. */
choir_status adapter_examine(choir_adapters *pool, const choir_adapter_load *what, adapter_files *files,
                             choir_adapter_facts *facts) CHOIR_MUST_USE;
adapter_name *name_find(const choir_adapters *pool, const char *text); /* NULL: there is none */
choir_status name_unknown(const choir_adapters *pool, const char *text);
choir_status files_changed(const char *name); /* while they were loaded; needs no lock */

/* experts/adapter_loads.c */
void *run_loader(void *pool);
bool loader_turn(choir_adapters *pool); /* false: nothing moved, and nothing is being read */
void loads_end(choir_adapters *pool);   /* no thread runs */
