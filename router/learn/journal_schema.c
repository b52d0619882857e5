/* The journal's tables, how older ones become today's, and what happens to a file that is damaged.
 */
#include "router/learn/journal_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* "Chor": what PRAGMA application_id says of a journal, so that no other program's file is taken
 * for one. */
#define APPLICATION_ID "1130917746"

/* Step i leads from schema i to schema i + 1, in one transaction. Never changed: a new schema is a
 * new step.
 *
 * entries counts decisions and feedback together; AUTOINCREMENT, so that no sequence is given
 * twice, also when the last one was deleted. The candidates' probabilities are REAL, which is the
 * double as it is. Numbers that are unsigned in C lie as the signed ones of the same bits.
 * promotions.from_state is -1 where a version begins. */
static const char *const steps[] = {
    "PRAGMA application_id = " APPLICATION_ID ";"
    "CREATE TABLE scopes (id INTEGER PRIMARY KEY, model TEXT NOT NULL, tenant TEXT NOT NULL,"
    " UNIQUE (model, tenant));"
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY AUTOINCREMENT, scope INTEGER NOT NULL);"
    "CREATE INDEX entries_scope ON entries (scope);"
    "CREATE TABLE decisions (sequence INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE,"
    " time_ms INTEGER NOT NULL, features BLOB, chosen INTEGER NOT NULL, explored INTEGER NOT NULL,"
    " champion INTEGER NOT NULL, challenger INTEGER NOT NULL, seed INTEGER NOT NULL, routes BLOB);"
    "CREATE INDEX decisions_time ON decisions (time_ms);"
    "CREATE TABLE candidates (decision INTEGER NOT NULL, position INTEGER NOT NULL,"
    " name TEXT NOT NULL, digest INTEGER NOT NULL, probability REAL NOT NULL,"
    " PRIMARY KEY (decision, position)) WITHOUT ROWID;"
    "CREATE TABLE feedback (sequence INTEGER PRIMARY KEY, decision INTEGER NOT NULL,"
    " signal INTEGER NOT NULL, value REAL NOT NULL, text TEXT, time_ms INTEGER NOT NULL,"
    " UNIQUE (decision, signal));"
    "CREATE TABLE versions (scope INTEGER NOT NULL, version INTEGER NOT NULL,"
    " parent INTEGER NOT NULL, digest TEXT NOT NULL, state INTEGER NOT NULL, share REAL NOT NULL,"
    " learnt_to INTEGER NOT NULL, n_feedback INTEGER NOT NULL, created_ms INTEGER NOT NULL,"
    " evidence TEXT NOT NULL, PRIMARY KEY (scope, version)) WITHOUT ROWID;"
    "CREATE UNIQUE INDEX versions_live ON versions (scope) WHERE state = 2;"
    "CREATE TABLE promotions (id INTEGER PRIMARY KEY AUTOINCREMENT, scope INTEGER NOT NULL,"
    " version INTEGER NOT NULL, from_state INTEGER NOT NULL, to_state INTEGER NOT NULL,"
    " share REAL NOT NULL, evidence TEXT NOT NULL, time_ms INTEGER NOT NULL);"
    "CREATE INDEX promotions_scope ON promotions (scope);",
};
enum { N_STEPS = sizeof steps / sizeof *steps };
_Static_assert(CHOIR_VERSION_LIVE == 2, "the index versions_live says so");

/* auto_vacuum counts only before the first table; synchronous=FULL syncs the WAL at every commit.
 * What is deleted is overwritten at once, so that no page keeps it until it is used again. */
static const char settings[] = "PRAGMA auto_vacuum = INCREMENTAL;"
                               "PRAGMA journal_mode = WAL;"
                               "PRAGMA synchronous = FULL;"
                               "PRAGMA secure_delete = ON;"
                               "PRAGMA cell_size_check = ON;"
                               "PRAGMA journal_size_limit = 16777216;";

static choir_status pragma(journal_db *db, const char *text, int64_t *number, bool *is_ok)
{
    sqlite3_stmt *statement;
    int rc = sqlite3_prepare_v2(db->db, text, -1, &statement, NULL);
    if (rc != SQLITE_OK) return journal_fail(db, rc);
    rc = sqlite3_step(statement);
    if (rc == SQLITE_ROW && number != NULL) *number = sqlite3_column_int64(statement, 0);
    if (rc == SQLITE_ROW && is_ok != NULL) {
        const unsigned char *said = sqlite3_column_text(statement, 0);
        *is_ok = said != NULL && strcmp((const char *)said, "ok") == 0;
    }
    sqlite3_finalize(statement);
    return rc == SQLITE_ROW || rc == SQLITE_DONE ? CHOIR_OK : journal_fail(db, rc);
}

static choir_status migrate_from(journal_db *db, int64_t version)
{
    char set_version[64];
    for (; version < N_STEPS; version++) {
        snprintf(set_version, sizeof set_version, "PRAGMA user_version = %d", (int)version + 1);
        CHOIR_TRY(journal_exec(db, "BEGIN IMMEDIATE"));
        CHOIR_TRY(journal_exec(db, steps[version]));
        CHOIR_TRY(journal_exec(db, set_version));
        CHOIR_TRY(journal_exec(db, "COMMIT"));
    }
    return CHOIR_OK;
}

static choir_status migrate(journal_db *db)
{
    int64_t version = 0, application = 0, n_tables = 0;
    CHOIR_TRY(pragma(db, "PRAGMA user_version", &version, NULL));
    CHOIR_TRY(pragma(db, "PRAGMA application_id", &application, NULL));
    CHOIR_TRY(pragma(db, "SELECT count(*) FROM sqlite_schema", &n_tables, NULL));
    if (n_tables > 0 && application != strtoll(APPLICATION_ID, NULL, 10))
        return choir_fail(CHOIR_E_PRECONDITION,
                          "%s is a database, but not a journal of choir's: move it away, or choose "
                          "another folder",
                          db->path);
    if (version > N_STEPS)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "the journal %s has schema %lld, and this choir knows none above %d: run "
                          "a newer choir, or choose another folder",
                          db->path, (long long)version, N_STEPS);
    if (version < 0 || (n_tables > 0) != (version > 0)) return journal_fail(db, SQLITE_CORRUPT);
    return migrate_from(db, version);
}

static choir_status check_pages(journal_db *db)
{
    bool good = false;
    CHOIR_TRY(pragma(db, "PRAGMA quick_check(1)", NULL, &good));
    return good ? CHOIR_OK : journal_fail(db, SQLITE_CORRUPT);
}

/* All statements are prepared once: a schema that somebody has edited shows here. */
static choir_status prepare_all(journal_db *db)
{
    for (int i = 0; i < SQL_N_STATEMENTS; i++) {
        journal_call call = journal_begin_call(db, (journal_statement)i);
        if (call.rc != SQLITE_OK) return journal_fail(db, call.rc);
    }
    return CHOIR_OK;
}

static choir_status connect_once(choir_journal *j, bool whole)
{
    journal_db *db = &j->db;
    int64_t page_bytes = 0;
    CHOIR_TRY(journal_db_open(db, j->path, j->vfs[0] != '\0' ? j->vfs : NULL, true));
    CHOIR_TRY(journal_exec(db, settings));
    CHOIR_TRY(migrate(db));
    if (whole) CHOIR_TRY(check_pages(db));
    CHOIR_TRY(prepare_all(db));
    /* After a sync that failed, what lies in the WAL may be in the kernel's memory alone, marked as
     * if it were on the disk. So it is all written into the file and synced there, and the WAL begun
     * anew, before anything is added behind it. */
    CHOIR_TRY(journal_empty_wal(db));
    CHOIR_TRY(pragma(db, "PRAGMA page_size", &page_bytes, NULL));
    j->page_bytes = (uint64_t)page_bytes;
    return journal_count(j);
}

/* A close that checkpoints would sync on a handle whose sync has failed. */
static void close_untrusted(journal_db *db)
{
    if (db->db != NULL) sqlite3_db_config(db->db, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL);
    journal_db_close(db);
}

/* journal.db becomes journal.db.damaged-N, which SQLite's own tools can open. The WAL goes first:
 * were it left behind by a crash in between, it would be taken for the new file's. */
static choir_status set_aside(choir_journal *j)
{
    static const char *const ends[] = {"-wal", "-shm", ""};
    char from[sizeof j->path + 64], to[sizeof j->path + 64], aside[sizeof j->path + 32];
    for (int n = 1;; n++) {
        snprintf(aside, sizeof aside, "%s.damaged-%d", j->path, n);
        snprintf(to, sizeof to, "%s-wal", aside);
        if (access(aside, F_OK) != 0 && access(to, F_OK) != 0) break;
    }
    for (int i = 0; i < 3; i++) {
        snprintf(from, sizeof from, "%s%s", j->path, ends[i]);
        snprintf(to, sizeof to, "%s%s", aside, ends[i]);
        if (access(from, F_OK) == 0 && rename(from, to) != 0)
            return choir_fail(CHOIR_E_IO, "the damaged journal %s cannot be renamed: %m", from);
    }
    choir_log(CHOIR_LOG_ERROR,
              "the journal %s is damaged: it is set aside as %s, and a new one begun", j->path,
              aside);
    return choir_folder_sync(j->path);
}

choir_status journal_connect(choir_journal *j, bool whole)
{
    choir_status status = connect_once(j, whole);
    if (status == CHOIR_OK) return CHOIR_OK;
    bool damaged = journal_is_damage(j->db.rc);
    close_untrusted(&j->db);
    if (!damaged) return status;
    CHOIR_TRY(set_aside(j));
    status = connect_once(j, false);
    if (status != CHOIR_OK) close_untrusted(&j->db);
    return status;
}

static void undo(journal_db *db)
{
    int rc = db->rc;
    if (db->db != NULL && !sqlite3_get_autocommit(db->db)) {
        choir_status ignored = journal_run_plain(db, SQL_ROLLBACK);
        (void)ignored; /* what cannot be rolled back is closed below, and that undoes it */
    }
    db->rc = rc;
}

void journal_recover(choir_journal *j)
{
    journal_db *db = &j->db;
    if (db->db == NULL) return;
    undo(db);
    int rc = db->rc & 0xff;
    bool keep = sqlite3_get_autocommit(db->db) &&
                (rc == SQLITE_OK || rc == SQLITE_FULL || rc == SQLITE_BUSY || rc == SQLITE_LOCKED);
    if (!keep) close_untrusted(db);
    if (journal_is_damage(rc) && set_aside(j) != CHOIR_OK)
        choir_log(CHOIR_LOG_ERROR, "%s", choir_error_message());
    db->rc = SQLITE_OK;
}

/* On a connection that is new: the old one's cache may hold the pages as they were. */
void journal_look_at_damage(choir_journal *j)
{
    close_untrusted(&j->db);
    if (journal_connect(j, true) != CHOIR_OK)
        choir_log(CHOIR_LOG_ERROR, "%s", choir_error_message());
}
