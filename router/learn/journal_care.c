/* What leaves the journal: what is too old or too much, slice by slice between the writer's
 * transactions, and a tenant who wants to be forgotten, at once. */
#include "router/learn/journal_state.h"

enum { SLICE = 256 }; /* decisions; a slice holds the writer up for some milliseconds */

typedef struct slice {
    int64_t sequences[SLICE];
    int n;
} slice;

static choir_status fill(journal_call *call, slice *out)
{
    bool row;
    out->n = 0;
    for (;;) {
        CHOIR_TRY(journal_row(call, &row));
        if (!row) return CHOIR_OK;
        if (out->n < SLICE) out->sequences[out->n++] = sqlite3_column_int64(call->statement, 0);
    }
}

static choir_status run_with(journal_db *db, journal_statement which, int64_t number)
{
    journal_call call = journal_begin_call(db, which);
    journal_put(&call, number);
    return journal_run(&call);
}

static choir_status drop_decision(choir_journal *j, int64_t sequence)
{
    journal_db *db = &j->db;
    CHOIR_TRY(run_with(db, SQL_DROP_CANDIDATES, sequence));
    CHOIR_TRY(run_with(db, SQL_DROP_FEEDBACK_ENTRIES, sequence));
    CHOIR_TRY(run_with(db, SQL_DROP_FEEDBACK, sequence));
    j->delta.n_feedback -= sqlite3_changes(db->db);
    CHOIR_TRY(run_with(db, SQL_DROP_DECISION, sequence));
    j->delta.n_decisions -= sqlite3_changes(db->db);
    return run_with(db, SQL_DROP_ENTRY, sequence);
}

static choir_status drop(choir_journal *j, const slice *s)
{
    CHOIR_TRY(journal_begin(j));
    for (int i = 0; i < s->n; i++) CHOIR_TRY(drop_decision(j, s->sequences[i]));
    CHOIR_TRY(journal_run_plain(&j->db, SQL_SHRINK));
    return journal_commit(j);
}

/* -- retention -- */

static choir_status too_old(choir_journal *j, int64_t now_ms, slice *out)
{
    out->n = 0;
    int64_t age_s = j->options.max_age_s;
    if (age_s <= 0 || age_s > INT64_MAX / 1000) return CHOIR_OK;
    int64_t oldest;
    if (__builtin_sub_overflow(now_ms, age_s * 1000, &oldest)) return CHOIR_OK;
    journal_call call = journal_begin_call(&j->db, SQL_OLD_BY_AGE);
    journal_put(&call, oldest);
    journal_put(&call, SLICE);
    return fill(&call, out);
}

/* A share of what there is, so that a small journal is not emptied by its first slice. */
static choir_status too_much(choir_journal *j, slice *out)
{
    out->n = 0;
    CHOIR_TRY(journal_measure(j));
    if (j->options.max_bytes == 0 || j->used_bytes <= j->options.max_bytes) return CHOIR_OK;
    uint64_t share = j->stats.n_decisions / 16 + 1; /* the writer alone changes it */
    journal_call call = journal_begin_call(&j->db, SQL_OLD_BY_SIZE);
    journal_put(&call, share < SLICE ? (int64_t)share : SLICE);
    return fill(&call, out);
}

choir_status journal_retain_slice(choir_journal *j, int64_t now_ms, bool *more)
{
    slice s;
    CHOIR_TRY(journal_ready(j));
    CHOIR_TRY(too_old(j, now_ms, &s));
    if (s.n == 0) CHOIR_TRY(too_much(j, &s));
    *more = s.n > 0;
    return *more ? drop(j, &s) : CHOIR_OK;
}

/* -- forget -- */

static choir_status run_for_tenant(journal_db *db, journal_statement which, const char *tenant)
{
    journal_call call = journal_begin_call(db, which);
    journal_put_text(&call, tenant);
    return journal_run(&call);
}

/* What is the tenant's besides decisions: versions, and what somebody's edit of the file has left
 * over. */
static choir_status drop_rest(choir_journal *j, const char *tenant)
{
    static const journal_statement rest[] = {SQL_FORGET_FEEDBACK, SQL_FORGET_ENTRIES,
                                             SQL_FORGET_PROMOTIONS, SQL_FORGET_VERSIONS,
                                             SQL_FORGET_SCOPES};
    CHOIR_TRY(journal_begin(j));
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) {
        CHOIR_TRY(run_for_tenant(&j->db, rest[i], tenant));
        if (rest[i] == SQL_FORGET_FEEDBACK) j->delta.n_feedback -= sqlite3_changes(j->db.db);
    }
    return journal_commit(j);
}

/* secure_delete overwrites what is deleted, but when SQLite moves rows between pages their old
 * bytes may stay in the gaps: so the file is written anew, and then the WAL, which has held it all,
 * is cut to nothing. */
static choir_status overwrite(journal_db *db)
{
    CHOIR_TRY(journal_run_plain(db, SQL_VACUUM));
    return journal_empty_wal(db);
}

choir_status journal_forget_now(choir_journal *j, const char *tenant, uint64_t *n)
{
    slice s;
    do {
        CHOIR_TRY(journal_ready(j));
        journal_call call = journal_begin_call(&j->db, SQL_DECISIONS_OF_TENANT);
        journal_put_text(&call, tenant);
        journal_put(&call, SLICE);
        CHOIR_TRY(fill(&call, &s));
        if (s.n > 0) CHOIR_TRY(drop(j, &s));
        *n += (uint64_t)s.n;
    } while (s.n > 0);
    CHOIR_TRY(drop_rest(j, tenant));
    CHOIR_TRY(overwrite(&j->db));
    return journal_measure(j);
}
