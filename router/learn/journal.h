/* WHAT    The feedback journal: every routing decision with its probabilities, every feedback, every router
 *         version and every change of the live one, in one SQLite file (WAL, synchronous=FULL).
 * OWNS    The file FOLDER/journal.db, one writer thread, one bounded queue; readers open connections of their own.
 * THREADS decide, feed: any; what they hand over is copied before they return. put_version, move_version, retain
 *         and forget wait for the writer. `done` runs on the writer thread: it must not block, and may call
 *         decide and feed alone. Readers: any; `each` and `write` run on their caller's thread and may call all.
 * ERRORS  CHOIR_E_FULL (the queue, or the disk: decide and feed refuse in one sentence and serving goes on),
 *         CHOIR_E_IO, CHOIR_E_NOT_FOUND (feedback on a request that is not in the journal), CHOIR_E_EXISTS,
 *         CHOIR_E_ABORTED (feedback that says otherwise than an earlier one of its kind), CHOIR_E_INVALID,
 *         CHOIR_E_DATA_LOSS (a reader met damage), CHOIR_E_UNAVAILABLE (another process has the journal, or
 *         readers are in the way), CHOIR_E_NO_MEMORY.
 * LIMITS  What `done` calls CHOIR_OK survives kill -9 and a power cut; what it refuses is whole or not there. A
 *         damaged journal is set aside under another name, said in the log, and a new one begun, whose sequence
 *         begins anew. Retention by age and by size, oldest first. Rows that Choir would not have written are
 *         skipped when read. What waits for the writer is bounded in number and to 64 MiB.
 * NEXT    router/learn/learn.h */
#pragma once
#include "base/base.h"

enum {
    CHOIR_MAX_CANDIDATES = 8,    /* plans that a request may be answered with */
    CHOIR_MAX_FEATURES = 96,
    CHOIR_MAX_PLAN_NAME = 256,   /* bytes, with the NUL: "", "legal", "legal=0.5,code=0.5" */
    CHOIR_MAX_REQUEST_ID = 129,  /* bytes, with the NUL */
    CHOIR_MAX_CORRECTION = 1 << 20,
    CHOIR_MAX_ROUTES = 16 << 20, /* bytes */
    CHOIR_MAX_SCOPE_NAME = 257,  /* a model's or a tenant's, bytes, with the NUL */
};

typedef struct choir_journal choir_journal;

typedef struct choir_journal_options {
    uint32_t max_queued;     /* entries that wait for the writer */
    uint64_t max_bytes;      /* of the file; 0: no limit. Above it the oldest decisions go, with their feedback */
    int64_t max_age_s;       /* of a decision; 0: no limit */
    const char *vfs;         /* NULL, or the name of an SQLite VFS: tests, which make disks fail */
} choir_journal_options;
#define CHOIR_JOURNAL_OPTIONS_DEFAULT                                                              \
    ((choir_journal_options){.max_queued = 4096,                                                   \
                             .max_bytes = (uint64_t)1 << 30,                                       \
                             .max_age_s = 90 * 24 * 3600})

/* Makes the folder if it is missing. Migrates older schemas; a newer one than this program's is refused. One
 * process at a time has a journal. */
choir_status choir_journal_open(const char *folder, const choir_journal_options *options,
                                choir_journal **out) CHOIR_MUST_USE;
/* Writes what is queued, joins the writer. NULL is fine. */
void choir_journal_close(choir_journal *journal);

/* The answer to an entry: its place in the journal, or why there is none (message: a sentence, lent). */
typedef struct choir_journal_receipt {
    choir_status status;
    const char *message;
    uint64_t sequence;  /* grows from entry to entry, over decisions and feedback together */
    bool duplicate;     /* the same feedback was there already; sequence is the earlier one's */
} choir_journal_receipt;
typedef void (*choir_journal_done)(void *user, const choir_journal_receipt *receipt);

/* --- decisions */

typedef struct choir_candidate {
    char name[CHOIR_MAX_PLAN_NAME]; /* of the plan; "" is the model alone */
    uint64_t digest;                /* of the weights that it adds */
    double probability;             /* with which it was drawn; of the one chosen: above 0 */
} choir_candidate;

/* Texts are UTF-8, numbers finite: anything else is CHOIR_E_INVALID. */
typedef struct choir_decision {
    char request_id[CHOIR_MAX_REQUEST_ID]; /* unique in the journal: a second one is CHOIR_E_EXISTS */
    const char *model, *tenant;            /* tenant: a digest of the API key, or "" */
    int64_t time_ms;                       /* of the wall clock, since 1970; for people and for retention */
    const float *features;                 /* [n_features]; 0: the request named its plan */
    uint32_t n_features;
    choir_candidate candidates[CHOIR_MAX_CANDIDATES];
    uint32_t n_candidates, chosen;
    bool explored;        /* the plan drawn is not the champion's */
    uint64_t champion;    /* the version that was live, 0: none */
    uint64_t challenger;  /* the version on trial that had a share in the probabilities; 0: none */
    uint64_t seed;        /* of the draw */
    const void *routes;   /* with consent: the masks of the answer's routes; NULL: none */
    size_t routes_bytes;
} choir_decision;

/* done(user, …) exactly once if this returns CHOIR_OK, never otherwise. */
choir_status choir_journal_decide(choir_journal *journal, const choir_decision *decision,
                                  choir_journal_done done, void *user) CHOIR_MUST_USE;

/* --- feedback */

typedef enum choir_signal {
    CHOIR_SIGNAL_THUMB,      /* value 0 or 1 */
    CHOIR_SIGNAL_SCORE,      /* value 0 … 1 */
    CHOIR_SIGNAL_PREFERRED,  /* text: the id of the request whose answer was better */
    CHOIR_SIGNAL_CORRECTION, /* text: what the answer should have been */
    CHOIR_N_SIGNALS
} choir_signal;

/* One of each kind a request: the same again is a duplicate, another value CHOIR_E_ABORTED. A preference names
 * two requests of one tenant and model, both in the journal. */
typedef struct choir_feedback {
    const char *request_id, *tenant; /* a tenant's feedback on another's request: CHOIR_E_NOT_FOUND */
    choir_signal signal;
    float value;      /* of a thumb, a score; else it is not kept */
    const char *text; /* of a preference, a correction; else it is not kept */
    int64_t time_ms;
} choir_feedback;
choir_status choir_journal_feed(choir_journal *journal, const choir_feedback *feedback,
                                choir_journal_done done, void *user) CHOIR_MUST_USE;

/* --- what learning reads: in the order of `sequence`, so that the same journal is the same events */

typedef struct choir_journal_entry {
    uint64_t sequence;
    bool is_feedback;
    choir_decision decision; /* of a feedback: the decision that it is about; pointers are lent for the call */
    uint64_t decision_sequence;
    choir_feedback feedback; /* of a feedback */
} choir_journal_entry;
/* Calls `each` for every entry of the model and tenant with `sequence` above `after`, at most `limit` of them (0: all),
 * until it returns false. *last: the sequence of the last one given, or `after`. */
choir_status choir_journal_read(choir_journal *journal, const char *model, const char *tenant,
                                uint64_t after, uint64_t limit,
                                bool (*each)(void *user, const choir_journal_entry *entry), void *user,
                                uint64_t *last) CHOIR_MUST_USE;
/* Every tenant that the journal has decisions of for the model; `each` as above. */
choir_status choir_journal_tenants(choir_journal *journal, const char *model,
                                   bool (*each)(void *user, const char *tenant), void *user) CHOIR_MUST_USE;

/* --- versions: their files are router/learn/version.h's; the journal knows their history */

typedef enum choir_version_state {
    CHOIR_VERSION_FROZEN,    /* on trial in the shadow */
    CHOIR_VERSION_STAGED,    /* on trial with a share of the traffic */
    CHOIR_VERSION_LIVE,
    CHOIR_VERSION_RETIRED,   /* was live, and another took its place */
    CHOIR_VERSION_REJECTED,  /* its trial ended without promotion */
    CHOIR_VERSION_ROLLED_BACK,
    CHOIR_N_VERSION_STATES
} choir_version_state;

typedef struct choir_version_row {
    uint64_t version, parent;  /* numbered from 1 within model and tenant; parent 0: none */
    char digest[33];           /* of its file, hexadecimal */
    choir_version_state state;
    double share;              /* of the traffic, STAGED: 0.05, 0.25 */
    uint64_t learnt_to;        /* the last journal sequence it has learnt from */
    uint64_t n_feedback;       /* that it has learnt from */
    int64_t created_ms;
    char evidence[512];        /* of its last change of state: JSON */
} choir_version_row;

/* Durable when they return (they wait for the writer). put: row->version is given if 0; a number that is taken is
 * CHOIR_E_EXISTS. move: to another state, with share and evidence; if to LIVE, the one that was live becomes `was`
 * (RETIRED or ROLLED_BACK) in the same transaction; a put of a LIVE one retires it likewise. Each change is also a row
 * of the table `promotions`, which is history and never changed. */
choir_status choir_journal_put_version(choir_journal *journal, const char *model, const char *tenant,
                                       choir_version_row *row) CHOIR_MUST_USE;
typedef struct choir_version_move {
    uint64_t version;
    choir_version_state to, was;
    double share;
    const char *evidence; /* JSON, at most 511 bytes */
    int64_t time_ms;
} choir_version_move;
choir_status choir_journal_move_version(choir_journal *journal, const char *model, const char *tenant,
                                        const choir_version_move *move) CHOIR_MUST_USE;
/* Newest first; returns how many there are through *n, at most `room` are written. */
choir_status choir_journal_versions(choir_journal *journal, const char *model, const char *tenant,
                                    choir_version_row *out, uint32_t room, uint32_t *n) CHOIR_MUST_USE;

/* --- care */

/* Deletes what is too old or too much, and waits for it (the writer does so by itself, once in a while). */
choir_status choir_journal_retain(choir_journal *journal, int64_t now_ms) CHOIR_MUST_USE;
/* All of a tenant as JSON lines, decisions and feedback in order, to `write` (false stops). */
choir_status choir_journal_export(choir_journal *journal, const char *tenant,
                                  bool (*write)(void *user, const char *line, size_t bytes), void *user)
    CHOIR_MUST_USE;
/* Every trace of a tenant: decisions, feedback, versions; the file is written anew without them, and the WAL is
 * truncated. CHOIR_E_UNAVAILABLE: a reader was in the way of that; all is deleted, but not overwritten yet: once more
 * does it. *n: decisions that are gone. */
choir_status choir_journal_forget(choir_journal *journal, const char *tenant, uint64_t *n) CHOIR_MUST_USE;

typedef struct choir_journal_stats {
    uint64_t n_decisions, n_feedback, bytes, last_sequence;
    uint64_t n_refused;  /* entries that did not become durable */
    uint32_t n_queued;
    bool healthy;        /* the last write went well */
    char why[CHOIR_MAX_SENTENCE]; /* … or this sentence */
} choir_journal_stats;
void choir_journal_get_stats(choir_journal *journal, choir_journal_stats *out);
