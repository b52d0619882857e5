/* WHAT    The journal from inside: its connection to SQLite, its statements, what waits for its writer.
 * OWNS    See journal.h.
 * THREADS The writer thread alone has `db`, `taken` and the counts of the transaction; under `lock` lies what
 *         others see. A reader makes a journal_db of its own for each call.
 * ERRORS  What SQLite says becomes a status and a sentence in one place, journal_fail(). Errors that concern one
 *         entry leave db->rc at SQLITE_OK; with any other the transaction is lost, and journal_recover() decides
 *         what becomes of the connection.
 * LIMITS  All text is bound to statements, never part of one.
 * NEXT    journal.c (queue, writer), journal_write.c (entries), journal_read.c, journal_care.c (retention, forget) */
#pragma once
#include "router/learn/journal.h"

#include <sqlite3.h>

/* What an entry's reader needs, in the order of the columns in journal_read.c. */
#define JOURNAL_ENTRY                                                                              \
    "SELECT e.sequence, s.model, s.tenant, d.sequence, d.request_id, d.time_ms, d.features, "      \
    "d.chosen, d.explored, d.champion, d.challenger, d.seed, d.routes, f.sequence, f.signal, "     \
    "f.value, f.text, f.time_ms FROM entries e CROSS JOIN scopes s ON s.id = e.scope "             \
    "LEFT JOIN feedback f ON f.sequence = e.sequence "                                             \
    "JOIN decisions d ON d.sequence = ifnull(f.decision, e.sequence) "
#define JOURNAL_TENANT "(SELECT id FROM scopes WHERE tenant = ?1)"

#define JOURNAL_STATEMENTS(X)                                                                      \
    X(BEGIN, "BEGIN IMMEDIATE")                                                                    \
    X(COMMIT, "COMMIT")                                                                            \
    X(ROLLBACK, "ROLLBACK")                                                                        \
    X(MARK, "SAVEPOINT entry")                                                                     \
    X(UNMARK, "RELEASE entry")                                                                     \
    X(BACK_TO_MARK, "ROLLBACK TO entry")                                                           \
    X(FIND_SCOPE, "SELECT id FROM scopes WHERE model = ?1 AND tenant = ?2")                        \
    X(ADD_SCOPE, "INSERT INTO scopes (model, tenant) VALUES (?1, ?2)")                             \
    X(ADD_ENTRY, "INSERT INTO entries (scope) VALUES (?1)")                                        \
    X(HAS_REQUEST, "SELECT 1 FROM decisions WHERE request_id = ?1")                                \
    X(ADD_DECISION, "INSERT INTO decisions VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)")      \
    X(ADD_CANDIDATE, "INSERT INTO candidates VALUES (?1, ?2, ?3, ?4, ?5)")                         \
    X(FIND_REQUEST,                                                                                \
      "SELECT d.sequence, e.scope FROM decisions d JOIN entries e ON e.sequence = d.sequence "     \
      "JOIN scopes s ON s.id = e.scope WHERE d.request_id = ?1 AND s.tenant = ?2")                 \
    X(FIND_FEEDBACK,                                                                               \
      "SELECT sequence, value, text FROM feedback WHERE decision = ?1 AND signal = ?2")            \
    X(ADD_FEEDBACK, "INSERT INTO feedback VALUES (?1, ?2, ?3, ?4, ?5, ?6)")                        \
    X(NEXT_VERSION, "SELECT ifnull(max(version), 0) + 1 FROM versions WHERE scope = ?1")           \
    X(FIND_VERSION, "SELECT state FROM versions WHERE scope = ?1 AND version = ?2")                \
    X(FIND_LIVE, "SELECT version FROM versions WHERE scope = ?1 AND state = ?2")                   \
    X(ADD_VERSION, "INSERT INTO versions VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)")        \
    X(MOVE_VERSION, "UPDATE versions SET state = ?3, share = ?4, evidence = ?5 "                   \
                    "WHERE scope = ?1 AND version = ?2")                                           \
    X(ADD_PROMOTION,                                                                               \
      "INSERT INTO promotions (scope, version, from_state, to_state, share, evidence, time_ms) "   \
      "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")                                                       \
    X(READ, JOURNAL_ENTRY "WHERE e.scope = ?1 AND e.sequence > ?2 ORDER BY e.sequence")            \
    X(READ_TENANT, JOURNAL_ENTRY "WHERE e.scope IN " JOURNAL_TENANT " ORDER BY e.sequence")        \
    X(CANDIDATES, "SELECT position, name, digest, probability FROM candidates "                    \
                  "WHERE decision = ?1 ORDER BY position")                                         \
    X(TENANTS, "SELECT tenant FROM scopes s WHERE model = ?1 AND EXISTS "                          \
               "(SELECT 1 FROM entries WHERE scope = s.id) ORDER BY tenant")                       \
    X(VERSIONS, "SELECT version, parent, digest, state, share, learnt_to, n_feedback, created_ms, " \
                "evidence FROM versions WHERE scope = ?1 ORDER BY version DESC")                   \
    X(OLD_BY_AGE, "SELECT sequence FROM decisions WHERE time_ms < ?1 ORDER BY time_ms LIMIT ?2")   \
    X(OLD_BY_SIZE, "SELECT sequence FROM decisions ORDER BY sequence LIMIT ?1")                    \
    X(DECISIONS_OF_TENANT, "SELECT d.sequence FROM entries e JOIN decisions d "                    \
                           "ON d.sequence = e.sequence WHERE e.scope IN " JOURNAL_TENANT           \
                           " LIMIT ?2")                                                            \
    X(DROP_CANDIDATES, "DELETE FROM candidates WHERE decision = ?1")                               \
    X(DROP_FEEDBACK_ENTRIES, "DELETE FROM entries WHERE sequence IN "                              \
                             "(SELECT sequence FROM feedback WHERE decision = ?1)")                \
    X(DROP_FEEDBACK, "DELETE FROM feedback WHERE decision = ?1")                                   \
    X(DROP_DECISION, "DELETE FROM decisions WHERE sequence = ?1")                                  \
    X(DROP_ENTRY, "DELETE FROM entries WHERE sequence = ?1")                                       \
    X(FORGET_FEEDBACK, "DELETE FROM feedback WHERE sequence IN "                                   \
                       "(SELECT sequence FROM entries WHERE scope IN " JOURNAL_TENANT ")")         \
    X(FORGET_ENTRIES, "DELETE FROM entries WHERE scope IN " JOURNAL_TENANT)                        \
    X(FORGET_PROMOTIONS, "DELETE FROM promotions WHERE scope IN " JOURNAL_TENANT)                  \
    X(FORGET_VERSIONS, "DELETE FROM versions WHERE scope IN " JOURNAL_TENANT)                      \
    X(FORGET_SCOPES, "DELETE FROM scopes WHERE tenant = ?1")                                       \
    X(VACUUM, "VACUUM")                                                                            \
    X(SHRINK, "PRAGMA incremental_vacuum")                                                         \
    X(N_PAGES, "PRAGMA page_count")                                                                \
    X(N_FREE_PAGES, "PRAGMA freelist_count")                                                       \
    X(N_DECISIONS, "SELECT count(*) FROM decisions")                                               \
    X(N_FEEDBACK, "SELECT count(*) FROM feedback")                                                 \
    X(LAST_SEQUENCE, "SELECT ifnull(max(seq), 0) FROM sqlite_sequence WHERE name = 'entries'")

typedef enum journal_statement {
#define X(name, sql) SQL_##name,
    JOURNAL_STATEMENTS(X)
#undef X
    SQL_N_STATEMENTS
} journal_statement;

/* -- journal_sql.c: a connection, its statements, what its errors mean -- */

typedef struct journal_db {
    sqlite3 *db; /* NULL: closed */
    const char *path;
    sqlite3_stmt *statements[SQL_N_STATEMENTS]; /* prepared when first used, then kept */
    int rc; /* SQLITE_OK, or what has broken the transaction */
} journal_db;

choir_status journal_db_open(journal_db *db, const char *path, const char *vfs,
                             bool writer) CHOIR_MUST_USE;
void journal_db_close(journal_db *db);
/* A status with its sentence; db->rc is set unless the trouble is one entry's. */
choir_status journal_fail(journal_db *db, int rc);
bool journal_is_damage(int rc);
/* Several statements at once, without arguments or rows. */
choir_status journal_exec(journal_db *db, const char *sql) CHOIR_MUST_USE;
/* The first column of the first row; `otherwise` if there is none. */
choir_status journal_number(journal_db *db, journal_statement which, int64_t *out) CHOIR_MUST_USE;

/* A statement with its arguments, put one after the other; then run, or row by row until there is none. The texts
 * are lent until then. */
typedef struct journal_call {
    journal_db *db;
    sqlite3_stmt *statement;
    int n, rc;
} journal_call;
journal_call journal_begin_call(journal_db *db, journal_statement which);
void journal_put(journal_call *call, int64_t number);
void journal_put_real(journal_call *call, double number);
void journal_put_text(journal_call *call, const char *text); /* NULL: NULL */
void journal_put_blob(journal_call *call, const void *data, size_t bytes);
choir_status journal_run(journal_call *call) CHOIR_MUST_USE;
choir_status journal_row(journal_call *call, bool *row) CHOIR_MUST_USE;
void journal_end_call(journal_call *call); /* before the last row was asked for */
choir_status journal_run_plain(journal_db *db, journal_statement which) CHOIR_MUST_USE;
/* Writes the WAL into the file, syncs that, and cuts the WAL to nothing. */
choir_status journal_empty_wal(journal_db *db) CHOIR_MUST_USE;

/* UTF-8 of fewer than `room` bytes. */
bool journal_text_is_good(const char *text, size_t room);

/* -- journal_schema.c -- */

/* Opens, migrates, checks. `whole`: every page is looked at. */
choir_status journal_connect(choir_journal *journal, bool whole) CHOIR_MUST_USE;
/* After a failure: the transaction is undone, the connection closed if it cannot be trusted, a damaged file set
 * aside. */
void journal_recover(choir_journal *journal);
/* A reader has met damage: whether it is there. */
void journal_look_at_damage(choir_journal *journal);

/* -- what waits for the writer -- */

typedef enum queued_kind {
    QUEUED_DECISION,
    QUEUED_FEEDBACK,
    QUEUED_PUT,
    QUEUED_MOVE,
    QUEUED_LAST_IN_TRANSACTION = QUEUED_MOVE,
    QUEUED_RETAIN,
    QUEUED_FORGET,
} queued_kind;

typedef struct queued {
    struct queued *next;
    queued_kind kind;
    size_t bytes; /* of this struct with what it points to, behind it */
    union {
        choir_decision decision;
        choir_feedback feedback;
        struct {
            const char *model, *tenant;
            choir_version_row *row;         /* QUEUED_PUT: its caller's, who waits */
            const choir_version_move *move; /* QUEUED_MOVE: as above */
        } version;
        struct {
            const char *tenant;
            uint64_t *n;
        } forget;
        int64_t retain_ms;
    };
    choir_journal_done done;
    void *user;
    choir_journal_receipt receipt;
    char why[CHOIR_MAX_SENTENCE];
} queued;

/* -- journal_write.c: within a transaction -- */

choir_status journal_write(choir_journal *journal, queued *entry) CHOIR_MUST_USE;
choir_status journal_check_decision(const choir_decision *decision) CHOIR_MUST_USE;
choir_status journal_check_feedback(const choir_feedback *feedback) CHOIR_MUST_USE;

/* -- journal_care.c -- */

/* A slice of what is to be deleted. *more: there may be another. */
choir_status journal_retain_slice(choir_journal *journal, int64_t now_ms, bool *more) CHOIR_MUST_USE;
choir_status journal_forget_now(choir_journal *journal, const char *tenant, uint64_t *n) CHOIR_MUST_USE;

/* -- journal_read.c -- */

/* A connection for one call; journal_end_read() forwards the status, and tells the writer of damage. */
choir_status journal_begin_read(choir_journal *journal, journal_db *db) CHOIR_MUST_USE;
choir_status journal_end_read(choir_journal *journal, journal_db *db, choir_status status) CHOIR_MUST_USE;
/* Every good row of a statement that begins as JOURNAL_ENTRY; its arguments are put already. */
choir_status journal_each_entry(journal_call *call, uint64_t limit,
                                bool (*each)(void *user, const choir_journal_entry *entry), void *user,
                                uint64_t *last) CHOIR_MUST_USE;

/* -- journal.c -- */

/* What a transaction adds to the numbers, once it is committed. */
typedef struct journal_delta {
    int64_t n_decisions, n_feedback;
    uint64_t last_sequence; /* 0: as it was */
} journal_delta;

/* Connected, or why not. */
choir_status journal_ready(choir_journal *journal) CHOIR_MUST_USE;
choir_status journal_begin(choir_journal *journal) CHOIR_MUST_USE;
choir_status journal_commit(choir_journal *journal) CHOIR_MUST_USE;
/* From the file, after it was opened. */
choir_status journal_count(choir_journal *journal) CHOIR_MUST_USE;
choir_status journal_measure(choir_journal *journal) CHOIR_MUST_USE;

struct choir_journal {
    choir_journal_options options;
    char folder[4096], path[4096 + 16], vfs[64];
    int claim; /* the locked file that keeps other processes out */
    pthread_t thread;
    bool threaded;

    /* The writer's. */
    journal_db db;
    uint64_t page_bytes, used_bytes;
    journal_delta delta;
    uint64_t cared_ns;   /* when retention last ran by itself */
    queued *retaining;   /* who waits for the retention that goes on */
    bool retention;      /* … also if nobody waits */
    int64_t retain_ms;

    pthread_mutex_t lock;
    pthread_cond_t work, settled; /* settled: for who waits for an entry of his */
    queued *first, **last;
    uint64_t queued_bytes;
    bool stopping, suspect; /* suspect: a reader has met damage */
    choir_journal_stats stats;
};
