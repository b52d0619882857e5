/* One connection to SQLite: how it is opened, its statements, what its errors mean. */
#include "router/learn/journal_state.h"

#include <string.h>
#include <utf8proc.h>

enum {
    MAX_ROW_BYTES =
        32 << 20,   /* more than the longest routes and text; a file that claims more is refused */
    BUSY_MS = 5000, /* for readers that are in the way of a truncated WAL */
};

static const char *const sql[] = {
#define X(name, text) [SQL_##name] = text,
    JOURNAL_STATEMENTS(X)
#undef X
};

choir_status journal_db_open(journal_db *db, const char *path, const char *vfs, bool writer)
{
    *db = (journal_db){.path = path};
    int flags = SQLITE_OPEN_NOMUTEX |
                (writer ? SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE : SQLITE_OPEN_READONLY);
    int rc = sqlite3_open_v2(path, &db->db, flags, vfs);
    if (rc != SQLITE_OK) {
        if (db->db != NULL) rc = sqlite3_extended_errcode(db->db);
        choir_status status = journal_fail(db, rc);
        journal_db_close(db);
        return status;
    }
    sqlite3_extended_result_codes(db->db, 1);
    sqlite3_busy_timeout(db->db, BUSY_MS);
    sqlite3_limit(db->db, SQLITE_LIMIT_LENGTH, MAX_ROW_BYTES);
    /* The file may have been edited: nothing that stands in its schema is run. */
    sqlite3_db_config(db->db, SQLITE_DBCONFIG_DEFENSIVE, 1, NULL);
    sqlite3_db_config(db->db, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, NULL);
    sqlite3_db_config(db->db, SQLITE_DBCONFIG_ENABLE_TRIGGER, 0, NULL);
    sqlite3_db_config(db->db, SQLITE_DBCONFIG_ENABLE_VIEW, 0, NULL);
    return CHOIR_OK;
}

void journal_db_close(journal_db *db)
{
    for (int i = 0; i < SQL_N_STATEMENTS; i++) {
        sqlite3_finalize(db->statements[i]);
        db->statements[i] = NULL;
    }
    int rc = sqlite3_close(db->db);
    CHOIR_ASSERT(rc != SQLITE_BUSY); /* a statement that is not in the table */
    db->db = NULL;
}

bool journal_is_damage(int rc)
{
    return (rc & 0xff) == SQLITE_CORRUPT || (rc & 0xff) == SQLITE_NOTADB;
}

choir_status journal_fail(journal_db *db, int rc)
{
    if ((rc & 0xff) == SQLITE_CONSTRAINT)
        return choir_fail(CHOIR_E_INTERNAL, "the rules of the journal %s refuse this entry: %s",
                          db->path, sqlite3_errmsg(db->db));
    db->rc = rc;
    if (journal_is_damage(rc))
        return choir_fail(CHOIR_E_DATA_LOSS, "the journal %s is damaged (%s)", db->path,
                          sqlite3_errstr(rc));
    switch (rc & 0xff) {
    case SQLITE_FULL:
        return choir_fail(CHOIR_E_FULL,
                          "the disk that holds the journal %s is full: nothing is learnt until "
                          "there is room on it",
                          db->path);
    case SQLITE_NOMEM:
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory to work on the journal %s", db->path);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return choir_fail(CHOIR_E_UNAVAILABLE, "the journal %s is in use: try again", db->path);
    case SQLITE_IOERR:
    case SQLITE_CANTOPEN:
    case SQLITE_READONLY:
    case SQLITE_PERM:
    case SQLITE_AUTH:
        return choir_fail(CHOIR_E_IO,
                          "the journal %s cannot be read or written (%s, %d): see to its disk and "
                          "its permissions",
                          db->path, sqlite3_errstr(rc), rc);
    case SQLITE_TOOBIG:
        return choir_fail(CHOIR_E_DATA_LOSS,
                          "a row of the journal %s is larger than any of choir's", db->path);
    default:
        return choir_fail(CHOIR_E_INTERNAL, "the journal %s: %s (%d)", db->path,
                          db->db != NULL ? sqlite3_errmsg(db->db) : sqlite3_errstr(rc), rc);
    }
}

choir_status journal_exec(journal_db *db, const char *text)
{
    int rc = sqlite3_exec(db->db, text, NULL, NULL, NULL);
    return rc == SQLITE_OK ? CHOIR_OK : journal_fail(db, rc);
}

journal_call journal_begin_call(journal_db *db, journal_statement which)
{
    journal_call call = {.db = db, .statement = db->statements[which]};
    if (call.statement != NULL) return call;
    call.rc = sqlite3_prepare_v3(db->db, sql[which], -1, SQLITE_PREPARE_PERSISTENT,
                                 &db->statements[which], NULL);
    call.statement = db->statements[which];
    /* The statements are right, so the tables are not those that were made. */
    if (call.rc == SQLITE_ERROR) call.rc = SQLITE_CORRUPT;
    return call;
}

static void note(journal_call *call, int rc)
{
    if (call->rc == SQLITE_OK) call->rc = rc;
}

void journal_put(journal_call *call, int64_t number)
{
    call->n++;
    if (call->rc == SQLITE_OK) note(call, sqlite3_bind_int64(call->statement, call->n, number));
}

void journal_put_real(journal_call *call, double number)
{
    call->n++;
    if (call->rc == SQLITE_OK) note(call, sqlite3_bind_double(call->statement, call->n, number));
}

void journal_put_text(journal_call *call, const char *text)
{
    call->n++;
    if (call->rc == SQLITE_OK)
        note(call, sqlite3_bind_text(call->statement, call->n, text, -1, SQLITE_STATIC));
}

void journal_put_blob(journal_call *call, const void *data, size_t bytes)
{
    call->n++;
    if (call->rc == SQLITE_OK)
        note(call, sqlite3_bind_blob64(call->statement, call->n, data, bytes, SQLITE_STATIC));
}

void journal_end_call(journal_call *call)
{
    if (call->statement == NULL) return;
    sqlite3_reset(call->statement);
    sqlite3_clear_bindings(call->statement);
}

choir_status journal_row(journal_call *call, bool *row)
{
    int rc = call->rc;
    *row = false;
    if (rc == SQLITE_OK) rc = sqlite3_step(call->statement);
    if (rc == SQLITE_ROW) {
        *row = true;
        return CHOIR_OK;
    }
    choir_status status = rc == SQLITE_DONE ? CHOIR_OK : journal_fail(call->db, rc);
    journal_end_call(call);
    return status;
}

choir_status journal_run(journal_call *call)
{
    bool row;
    do CHOIR_TRY(journal_row(call, &row));
    while (row);
    return CHOIR_OK;
}

choir_status journal_run_plain(journal_db *db, journal_statement which)
{
    journal_call call = journal_begin_call(db, which);
    return journal_run(&call);
}

choir_status journal_number(journal_db *db, journal_statement which, int64_t *out)
{
    journal_call call = journal_begin_call(db, which);
    bool row;
    *out = 0;
    CHOIR_TRY(journal_row(&call, &row));
    if (!row) return CHOIR_OK;
    *out = sqlite3_column_int64(call.statement, 0);
    journal_end_call(&call);
    return CHOIR_OK;
}

bool journal_text_is_good(const char *text, size_t room)
{
    size_t n = strnlen(text, room);
    if (n == room) return false;
    for (size_t i = 0; i < n;) {
        utf8proc_int32_t character;
        utf8proc_ssize_t bytes = utf8proc_iterate((const utf8proc_uint8_t *)text + i,
                                                  (utf8proc_ssize_t)(n - i), &character);
        if (bytes <= 0) return false;
        i += (size_t)bytes;
    }
    return true;
}

choir_status journal_empty_wal(journal_db *db)
{
    int rc = sqlite3_wal_checkpoint_v2(db->db, NULL, SQLITE_CHECKPOINT_TRUNCATE, NULL, NULL);
    return rc == SQLITE_OK ? CHOIR_OK : journal_fail(db, rc);
}
