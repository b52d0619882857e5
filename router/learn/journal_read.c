/* What others read of the journal, each call with a connection and a snapshot of its own. The file
 * may have been edited: a row is given only if Choir could have written it. */
#include "router/learn/journal_state.h"

#include <math.h>
#include <string.h>

choir_status journal_begin_read(choir_journal *j, journal_db *db)
{
    CHOIR_TRY(journal_db_open(db, j->path, j->vfs[0] != '\0' ? j->vfs : NULL, false));
    choir_status status = journal_exec(db, "BEGIN");
    if (status != CHOIR_OK) journal_db_close(db);
    return status;
}

choir_status journal_end_read(choir_journal *j, journal_db *db, choir_status status)
{
    bool damage = journal_is_damage(db->rc);
    journal_db_close(db);
    if (!damage) return status;
    pthread_mutex_lock(&j->lock);
    j->suspect = true;
    pthread_cond_signal(&j->work);
    pthread_mutex_unlock(&j->lock);
    return status;
}

/* -- columns -- */

static bool get_text(sqlite3_stmt *row, int column, size_t room, const char **out)
{
    if (sqlite3_column_type(row, column) != SQLITE_TEXT) return false;
    *out = (const char *)sqlite3_column_text(row, column);
    return *out != NULL && journal_text_is_good(*out, room) &&
           strlen(*out) == (size_t)sqlite3_column_bytes(row, column);
}

static bool copy_text(sqlite3_stmt *row, int column, char *to, size_t room)
{
    const char *text;
    if (!get_text(row, column, room, &text)) return false;
    memcpy(to, text, strlen(text) + 1);
    return true;
}

static bool get_number(sqlite3_stmt *row, int column, int64_t *out)
{
    *out = sqlite3_column_int64(row, column);
    return sqlite3_column_type(row, column) == SQLITE_INTEGER;
}

static bool get_count(sqlite3_stmt *row, int column, uint64_t *out)
{
    int64_t number;
    if (!get_number(row, column, &number)) return false;
    *out = (uint64_t)number;
    return true;
}

/* 0 to 1. */
static bool get_share(sqlite3_stmt *row, int column, double *out)
{
    *out = sqlite3_column_double(row, column);
    return sqlite3_column_type(row, column) == SQLITE_FLOAT && *out >= 0 && *out <= 1;
}

/* -- entries -- */

/* A row's features, copied since a blob is aligned to nothing. */
typedef struct entry_row {
    choir_journal_entry entry;
    float features[CHOIR_MAX_FEATURES];
} entry_row;

static bool get_blob(sqlite3_stmt *row, int column, size_t max_bytes, const void **out,
                     size_t *bytes)
{
    int type = sqlite3_column_type(row, column);
    *out = NULL;
    *bytes = 0;
    if (type == SQLITE_NULL) return true;
    if (type != SQLITE_BLOB) return false;
    *out = sqlite3_column_blob(row, column);
    *bytes = (size_t)sqlite3_column_bytes(row, column);
    return *bytes <= max_bytes;
}

static bool get_features(sqlite3_stmt *row, int column, entry_row *r)
{
    const void *data;
    size_t bytes;
    if (!get_blob(row, column, sizeof r->features, &data, &bytes)) return false;
    if (bytes % sizeof(float) != 0) return false;
    if (bytes > 0) memcpy(r->features, data, bytes);
    uint32_t n = (uint32_t)(bytes / sizeof(float));
    for (uint32_t i = 0; i < n; i++)
        if (!isfinite(r->features[i])) return false;
    r->entry.decision.features = r->features;
    r->entry.decision.n_features = n;
    return true;
}

static bool get_decision(sqlite3_stmt *row, entry_row *r)
{
    choir_decision *d = &r->entry.decision;
    int64_t chosen, explored;
    if (!get_text(row, 1, CHOIR_MAX_SCOPE_NAME, &d->model) ||
        !get_text(row, 2, CHOIR_MAX_SCOPE_NAME, &d->tenant) ||
        !get_count(row, 3, &r->entry.decision_sequence) ||
        !copy_text(row, 4, d->request_id, sizeof d->request_id) || d->request_id[0] == '\0' ||
        !get_number(row, 5, &d->time_ms) || !get_features(row, 6, r) ||
        !get_number(row, 7, &chosen) || !get_number(row, 8, &explored) ||
        !get_count(row, 9, &d->champion) || !get_count(row, 10, &d->challenger) ||
        !get_count(row, 11, &d->seed) ||
        !get_blob(row, 12, CHOIR_MAX_ROUTES, &d->routes, &d->routes_bytes))
        return false;
    d->chosen = (uint32_t)chosen;
    d->explored = explored == 1;
    return chosen >= 0 && chosen < CHOIR_MAX_CANDIDATES && explored >= 0 && explored <= 1;
}

static bool get_feedback(sqlite3_stmt *row, choir_journal_entry *entry)
{
    choir_feedback *f = &entry->feedback;
    int64_t signal;
    if (!get_number(row, 14, &signal) || signal < 0 || signal >= CHOIR_N_SIGNALS ||
        sqlite3_column_type(row, 15) != SQLITE_FLOAT || !get_number(row, 17, &f->time_ms))
        return false;
    f->request_id = entry->decision.request_id;
    f->tenant = entry->decision.tenant;
    f->signal = (choir_signal)signal;
    f->value = (float)sqlite3_column_double(row, 15);
    f->text = NULL;
    if (sqlite3_column_type(row, 16) != SQLITE_NULL &&
        !get_text(row, 16, CHOIR_MAX_CORRECTION + 1, &f->text))
        return false;
    return journal_check_feedback(f) == CHOIR_OK;
}

static bool get_candidate(sqlite3_stmt *row, choir_decision *d)
{
    uint32_t i = d->n_candidates;
    int64_t position;
    if (i == CHOIR_MAX_CANDIDATES || !get_number(row, 0, &position) || position != (int64_t)i)
        return false;
    choir_candidate *c = &d->candidates[i];
    if (!copy_text(row, 1, c->name, sizeof c->name) || !get_count(row, 2, &c->digest) ||
        !get_share(row, 3, &c->probability))
        return false;
    d->n_candidates++;
    return true;
}

static choir_status read_candidates(journal_db *db, choir_journal_entry *entry, bool *good)
{
    journal_call call = journal_begin_call(db, SQL_CANDIDATES);
    bool row;
    journal_put(&call, (int64_t)entry->decision_sequence);
    entry->decision.n_candidates = 0;
    *good = true;
    for (;;) {
        CHOIR_TRY(journal_row(&call, &row));
        if (!row) return CHOIR_OK;
        *good = *good && get_candidate(call.statement, &entry->decision);
    }
}

static choir_status read_entry(journal_call *call, entry_row *r, bool *good)
{
    sqlite3_stmt *row = call->statement;
    *good = get_count(row, 0, &r->entry.sequence) && get_decision(row, r);
    if (!*good) return CHOIR_OK;
    r->entry.is_feedback = sqlite3_column_type(row, 13) != SQLITE_NULL;
    if (r->entry.is_feedback) *good = get_feedback(row, &r->entry);
    if (!*good) return CHOIR_OK;
    CHOIR_TRY(read_candidates(call->db, &r->entry, good));
    /* What the writer would refuse is not given either: no candidate, one chosen that is not there
     * … */
    *good = *good && journal_check_decision(&r->entry.decision) == CHOIR_OK;
    return CHOIR_OK;
}

choir_status journal_each_entry(journal_call *call, uint64_t limit,
                                bool (*each)(void *user, const choir_journal_entry *entry),
                                void *user, uint64_t *last)
{
    uint64_t n = 0, n_bad = 0;
    bool row, good = true, on = true;
    while (on && (limit == 0 || n < limit)) {
        entry_row r;
        CHOIR_TRY(journal_row(call, &row));
        if (!row) break;
        r.entry = (choir_journal_entry){0};
        choir_status status = read_entry(call, &r, &good);
        if (status != CHOIR_OK) {
            journal_end_call(call);
            return status;
        }
        n += good;
        n_bad += !good;
        if (!good) continue;
        *last = r.entry.sequence;
        on = each(user, &r.entry);
    }
    journal_end_call(call);
    if (n_bad > 0)
        choir_log(
            CHOIR_LOG_WARNING,
            "%llu entries of the journal %s are none that choir has written: they are skipped",
            (unsigned long long)n_bad, call->db->path);
    return CHOIR_OK;
}

/* *found: whether the journal knows of the tenant with the model. */
static choir_status find_scope(journal_db *db, const char *model, const char *tenant,
                               int64_t *scope, bool *found)
{
    journal_call call = journal_begin_call(db, SQL_FIND_SCOPE);
    journal_put_text(&call, model);
    journal_put_text(&call, tenant);
    CHOIR_TRY(journal_row(&call, found));
    if (!*found) return CHOIR_OK;
    *scope = sqlite3_column_int64(call.statement, 0);
    journal_end_call(&call);
    return CHOIR_OK;
}

typedef struct read_call {
    const char *model, *tenant;
    uint64_t after, limit;
    bool (*each)(void *user, const choir_journal_entry *entry);
    void *user;
} read_call;

static choir_status read_scope(journal_db *db, const read_call *r, uint64_t *last)
{
    int64_t scope;
    bool found;
    if (r->after >= INT64_MAX) return CHOIR_OK;
    CHOIR_TRY(find_scope(db, r->model, r->tenant, &scope, &found));
    if (!found) return CHOIR_OK;
    journal_call call = journal_begin_call(db, SQL_READ);
    journal_put(&call, scope);
    journal_put(&call, (int64_t)r->after);
    return journal_each_entry(&call, r->limit, r->each, r->user, last);
}

choir_status choir_journal_read(choir_journal *journal, const char *model, const char *tenant,
                                uint64_t after, uint64_t limit,
                                bool (*each)(void *user, const choir_journal_entry *entry),
                                void *user, uint64_t *last)
{
    const read_call r = {model, tenant, after, limit, each, user};
    journal_db db;
    *last = after;
    CHOIR_TRY(journal_begin_read(journal, &db));
    return journal_end_read(journal, &db, read_scope(&db, &r, last));
}

/* -- tenants -- */

static choir_status read_tenants(journal_db *db, const char *model,
                                 bool (*each)(void *user, const char *tenant), void *user)
{
    journal_call call = journal_begin_call(db, SQL_TENANTS);
    bool row, on = true;
    journal_put_text(&call, model);
    while (on) {
        const char *tenant;
        CHOIR_TRY(journal_row(&call, &row));
        if (!row) return CHOIR_OK;
        if (get_text(call.statement, 0, CHOIR_MAX_SCOPE_NAME, &tenant)) on = each(user, tenant);
    }
    journal_end_call(&call);
    return CHOIR_OK;
}

choir_status choir_journal_tenants(choir_journal *journal, const char *model,
                                   bool (*each)(void *user, const char *tenant), void *user)
{
    journal_db db;
    CHOIR_TRY(journal_begin_read(journal, &db));
    return journal_end_read(journal, &db, read_tenants(&db, model, each, user));
}

/* -- versions -- */

static bool get_version(sqlite3_stmt *row, choir_version_row *v)
{
    int64_t state;
    *v = (choir_version_row){0};
    if (!get_count(row, 0, &v->version) || !get_count(row, 1, &v->parent) ||
        !copy_text(row, 2, v->digest, sizeof v->digest) || !get_number(row, 3, &state) ||
        !get_share(row, 4, &v->share) || !get_count(row, 5, &v->learnt_to) ||
        !get_count(row, 6, &v->n_feedback) || !get_number(row, 7, &v->created_ms) ||
        !copy_text(row, 8, v->evidence, sizeof v->evidence))
        return false;
    v->state = (choir_version_state)state;
    return state >= 0 && state < CHOIR_N_VERSION_STATES;
}

typedef struct version_list {
    choir_version_row *out;
    uint32_t room, n;
} version_list;

static choir_status read_versions(journal_db *db, const char *model, const char *tenant,
                                  version_list *list)
{
    int64_t scope;
    bool row;
    choir_version_row version;
    CHOIR_TRY(find_scope(db, model, tenant, &scope, &row));
    if (!row) return CHOIR_OK;
    journal_call call = journal_begin_call(db, SQL_VERSIONS);
    journal_put(&call, scope);
    for (;;) {
        CHOIR_TRY(journal_row(&call, &row));
        if (!row) return CHOIR_OK;
        if (!get_version(call.statement, &version)) continue;
        if (list->n < list->room) list->out[list->n] = version;
        list->n++;
    }
}

choir_status choir_journal_versions(choir_journal *journal, const char *model, const char *tenant,
                                    choir_version_row *out, uint32_t room, uint32_t *n)
{
    version_list list = {.out = out, .room = room};
    journal_db db;
    *n = 0;
    CHOIR_TRY(journal_begin_read(journal, &db));
    CHOIR_TRY(journal_end_read(journal, &db, read_versions(&db, model, tenant, &list)));
    *n = list.n;
    return CHOIR_OK;
}
