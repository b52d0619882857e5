/* WHAT    The pool of adapters: many registered by name, which lie on disk; a budget's worth of them in memory,
 *         read when somebody claims them. It knows bytes and names, no shapes: the caller makes adapters of bytes.
 * OWNS    Names and their versions, the adapters in memory, a disk, the loader's thread.
 * THREADS Any: all of it lies under one lock, which is never held while a disk or a maker works. register, load
 *         and register_folder wait for the disk, so they are not for the engine thread; the others never do.
 *         check() runs on the caller's thread, make() and free() on the loader's.
 * ERRORS  One sentence that names the adapter. CHOIR_E_NOT_FOUND (no such name), CHOIR_E_INVALID (name, path),
 *         CHOIR_E_EXISTS (the name has other weights), CHOIR_E_FULL (no room), CHOIR_E_PRECONDITION (an adapter
 *         that does not fit, was changed under its name, or is quarantined), CHOIR_E_UNAVAILABLE (its disk),
 *         CHOIR_E_NO_MEMORY.
 * LIMITS  What is pinned is never evicted, and lives until its last claim ends, also when its name has gone or
 *         has a newer version. On disk there is nothing but the adapters' own folders: whatever kills the
 *         process leaves them as they are.
 * NEXT    experts/adapter_pool.h, which draws a version's states; engine/adapters.c, which makes the adapters */
#pragma once
#include "base/base.h"
#include "experts/disk.h"

typedef struct choir_adapters choir_adapters;
typedef struct choir_adapter_version choir_adapter_version; /* what a name stood for at some time */

/* Bytes as they lie on disk, lent for the call. */
typedef struct choir_adapter_file {
    const char *name;   /* what sentences call it */
    const char *config; /* adapter_config.json; NULL: `tensors` is a GGUF file */
    size_t config_bytes;
    const void *tensors; /* for check(): their header at least */
    size_t tensor_bytes;
    uint64_t file_bytes; /* of the tensors' whole file */
} choir_adapter_file;

enum { CHOIR_ADAPTER_MAX_NAME = 256, CHOIR_ADAPTER_FACT_TOKENS = 256 };

/* What is known of an adapter before its bytes are read. The pool uses the first two; it keeps the others. */
typedef struct choir_adapter_facts {
    uint64_t bytes;      /* in memory */
    uint64_t load_bytes; /* and so many more, besides the file's, while it is made */
    char kind[24];       /* "LoRA", for people */
    uint64_t n_parameters, targets; /* targets: a bit for each of the maker's roles */
    bool sole;           /* it cannot be mixed or weighed, as far as is known before it is made */
    uint32_t max_rank, n_virtual, n_invocation, invocation[CHOIR_ADAPTER_FACT_TOKENS];
} choir_adapter_facts;

typedef struct choir_adapter_made {
    void *adapter;
    uint64_t bytes, digest; /* digest: changes whenever what the adapter computes does */
    bool sole;              /* it cannot be mixed or weighed */
} choir_adapter_made;

typedef struct choir_adapters_options {
    uint64_t budget_bytes; /* what is in memory, and what loading takes, is within it */
    uint64_t most_bytes;   /* set_budget() may raise it to so much; 0: budget_bytes */
    uint32_t max_names;
    choir_io io;
    uint32_t io_depth;     /* reads in flight */
    uint64_t retry_ns;     /* what could not be loaded is not tried again for so long */
    uint32_t max_poisoned; /* requests that an adapter may poison before it is quarantined */
    const char *folder;    /* NULL, or the only place where clients' paths lead to; lent for create() */
    choir_disk *disk;      /* NULL, or taken over (tests) */
    choir_page_cache *pages; /* NULL, or for what is read; lent until destroy(), the loader's thread alone has it */
    bool manual;           /* no thread: choir_adapters_work() is called by hand (tests) */
    /* Of headers alone: whether it fits, and its facts. */
    choir_status (*check)(void *user, const choir_adapter_file *file, choir_adapter_facts *facts);
    choir_status (*make)(void *user, const choir_adapter_file *file, choir_adapter_made *made);
    void (*free)(void *user, void *adapter);
    void *user;
} choir_adapters_options;
#define CHOIR_ADAPTERS_OPTIONS_DEFAULT                                                             \
    ((choir_adapters_options){.budget_bytes = (uint64_t)1 << 30,                                   \
                              .max_names = 65536,                                                  \
                              .io_depth = 16,                                                      \
                              .retry_ns = 30 * CHOIR_SECOND,                                       \
                              .max_poisoned = 3})

choir_status choir_adapters_create(const choir_adapters_options *options, choir_adapters **out)
    CHOIR_MUST_USE;
void choir_adapters_destroy(choir_adapters *pool); /* every claim has ended */

/* -- the registry: admin's and start-up's threads -- */

/* Letters, digits and ._-/:@+ ; a letter, a digit or _ first, no ".." and no empty part between slashes. */
choir_status choir_adapters_check_name(const char *name) CHOIR_MUST_USE;

typedef struct choir_adapter_load {
    const char *name;
    const char *path; /* a folder of PEFT's, or a GGUF file */
    bool beneath;     /* the path is a client's: it leads to somewhere beneath options.folder */
    bool replace;     /* another path's weights may take the name over */
    bool keep;        /* never evicted */
    uint64_t deadline_ns; /* choir_clock_now() time; 0: none */
    bool (*stopped)(void *user); /* NULL, or whether nobody waits any more: asked while it waits, under the pool's lock */
    void *user;
} choir_adapter_load;

/* What a list shows of a name. */
typedef struct choir_adapter_info {
    char name[CHOIR_ADAPTER_MAX_NAME + 1];
    choir_adapter_facts facts;
    const char *state;      /* "registered", "loading", "resident", "failed", "quarantined" */
    uint64_t version;       /* ascends over all names */
    uint64_t digest;        /* 0: it was not read yet */
    uint64_t bytes;         /* in memory; 0 unless it is resident */
    uint64_t file_bytes;
    uint32_t n_pins, n_claims;
    bool kept, resident, quarantined;
    choir_status failure;   /* CHOIR_OK, or why it could not be loaded … */
    char why[CHOIR_MAX_SENTENCE]; /* … as a sentence */
    uint64_t n_requests, n_loads, n_evictions, n_failures; /* of the name, all versions */
    uint64_t n_waits, wait_ns; /* requests that stood still for it alone, and for how long together */
} choir_adapter_info;

/* Makes a name known; headers are checked, the bytes are read when they are claimed. The same again is
 * CHOIR_OK; if the files at its path have changed, they are the name's next version. */
choir_status choir_adapters_register(choir_adapters *pool, const choir_adapter_load *what) CHOIR_MUST_USE;
/* The same, but it is read now, whole, and becomes the name's next version once it is in memory: what cannot
 * be loaded leaves the registry as it was. The weights that the name has already change nothing. */
choir_status choir_adapters_load(choir_adapters *pool, const choir_adapter_load *what,
                                 choir_adapter_info *out) CHOIR_MUST_USE;
/* Every adapter that lies in the folder, or one folder deeper, by its path from there; a .gguf file by its
 * name without the ending. What is refused is named in the log and skipped. */
choir_status choir_adapters_register_folder(choir_adapters *pool, const char *folder, uint32_t *n_good,
                                            uint32_t *n_bad) CHOIR_MUST_USE;
/* The name is gone; who has claimed it keeps it. */
choir_status choir_adapters_unload(choir_adapters *pool, const char *name) CHOIR_MUST_USE;
choir_status choir_adapters_find(choir_adapters *pool, const char *name, choir_adapter_info *out)
    CHOIR_MUST_USE;
/* By name, ascending, those behind the name `after` ("": all); at most `max`. Returns how many there are. */
uint32_t choir_adapters_list(choir_adapters *pool, const char *after, choir_adapter_info *out,
                             uint32_t max);

/* -- use: claim, then pin until it is pinned, then release -- */

/* Zeroed at first; the pool's between claim and release: it must not move. */
typedef struct choir_adapter_claim {
    choir_adapter_version *version;
    int64_t urgency;
    struct choir_adapter_claim *next, **link;
    bool pinned;
} choir_adapter_claim;

/* The name's version as of now; a newer one takes its place until it is pinned. Its load begins as soon as
 * there is room, those of smaller `urgency` first. facts: NULL, or filled. */
choir_status choir_adapters_claim(choir_adapters *pool, const char *name, int64_t urgency,
                                  choir_adapter_claim *claim, choir_adapter_facts *facts) CHOIR_MUST_USE;
/* All of them or none, of one user: *pinned tells. An error: they will not come. Who is less urgent than a claim
 * that finds no room is not pinned before that one. */
choir_status choir_adapters_pin(choir_adapters *pool, choir_adapter_claim *claims, uint32_t n,
                                bool *pinned) CHOIR_MUST_USE;
/* An error: they will not come. */
choir_status choir_adapters_check_claims(choir_adapters *pool, const choir_adapter_claim *claims,
                                         uint32_t n) CHOIR_MUST_USE;
/* Ends claims, pinned or not; once more does nothing. */
void choir_adapters_release(choir_adapters *pool, choir_adapter_claim *claims, uint32_t n);
/* Of a pinned claim, until its release. */
const void *choir_adapter_claim_adapter(const choir_adapter_claim *claim);
const char *choir_adapter_claim_name(const choir_adapter_claim *claim);
uint64_t choir_adapter_claim_digest(const choir_adapter_claim *claim);
const choir_adapter_facts *choir_adapter_claim_facts(const choir_adapter_claim *claim);

/* Its logits were NaN or Inf. At max_poisoned its version is quarantined: nobody gets it until it is loaded
 * anew. */
void choir_adapters_note_poison(choir_adapters *pool, const choir_adapter_claim *claim);
/* A request stood still for it. */
void choir_adapters_note_wait(choir_adapters *pool, const choir_adapter_claim *claim, uint64_t ns);
/* Called, on the loader's thread, whenever a load has ended, or begins or ceases to lack room. NULL: not called
 * any more, also on return. */
void choir_adapters_set_wake(choir_adapters *pool, void (*wake)(void *user), void *user);

/* -- memory -- */

/* What is unpinned goes, the least recently used first, until it fits. Returns the bytes still held. */
uint64_t choir_adapters_set_budget(choir_adapters *pool, uint64_t bytes);

typedef struct choir_adapters_stats {
    uint32_t n_names, n_resident, n_loading, n_failed, n_quarantined; /* versions, but for the first */
    uint32_t n_claims, n_pins;   /* pins: of claims; 0 when idle */
    uint64_t budget_bytes, most_bytes;
    uint64_t held_bytes;         /* residents, what loads have reserved, and what was evicted and is not freed yet */
    uint64_t wanted_bytes;       /* of those that are claimed or kept, with what loading the next takes */
    uint64_t n_requests, n_loads, n_evictions, n_failures, n_retries, n_poisoned; /* retries: of reads */
    uint64_t bytes_read, load_ns; /* load_ns: of all loads, from the first read to the last byte in place */
    uint64_t n_waits, wait_ns;
    const char *io;
} choir_adapters_stats;
void choir_adapters_get_stats(choir_adapters *pool, choir_adapters_stats *out);
/* Counts what may have made claims go bad: while it stays, choir_adapters_check_claims() says what it did. */
uint64_t choir_adapters_bad_news(choir_adapters *pool);

/* One turn of the loader (options.manual). False: nothing moved, and nothing is on its way. */
bool choir_adapters_work(choir_adapters *pool);
