/* Entries as they become rows. What an entry may be refused for is looked up before anything is
 * inserted, so that a refusal is its own and not the transaction's. */
#include "router/learn/journal_state.h"

#include <math.h>
#include <string.h>

/* -- what is taken in -- */

static choir_status check_text(const char *what, const char *text, size_t room)
{
    if (text == NULL) return choir_fail(CHOIR_E_INVALID, "%s is missing", what);
    if (!journal_text_is_good(text, room))
        return choir_fail(CHOIR_E_INVALID, "%s must be UTF-8 of at most %zu bytes", what, room - 1);
    return CHOIR_OK;
}

static choir_status check_request_id(const char *what, const char *id)
{
    CHOIR_TRY(check_text(what, id, CHOIR_MAX_REQUEST_ID));
    return id[0] != '\0' ? CHOIR_OK : choir_fail(CHOIR_E_INVALID, "%s is empty", what);
}

static choir_status check_candidates(const choir_decision *d)
{
    if (d->n_candidates < 1 || d->n_candidates > CHOIR_MAX_CANDIDATES)
        return choir_fail(CHOIR_E_INVALID, "a decision has 1 to %d candidates, not %u",
                          CHOIR_MAX_CANDIDATES, d->n_candidates);
    if (d->chosen >= d->n_candidates)
        return choir_fail(CHOIR_E_INVALID, "candidate %u of %u was chosen", d->chosen,
                          d->n_candidates);
    for (uint32_t i = 0; i < d->n_candidates; i++) {
        double p = d->candidates[i].probability;
        CHOIR_TRY(check_text("a plan's name", d->candidates[i].name, CHOIR_MAX_PLAN_NAME));
        /* What learning divides by is never 0. */
        if (!(p >= 0 && p <= 1) || (i == d->chosen && p == 0))
            return choir_fail(CHOIR_E_INVALID, "candidate %u has probability %g", i, p);
    }
    return CHOIR_OK;
}

choir_status journal_check_decision(const choir_decision *d)
{
    CHOIR_TRY(check_request_id("the request's id", d->request_id));
    CHOIR_TRY(check_text("the model's name", d->model, CHOIR_MAX_SCOPE_NAME));
    CHOIR_TRY(check_text("the tenant", d->tenant, CHOIR_MAX_SCOPE_NAME));
    CHOIR_TRY(check_candidates(d));
    if (d->n_features > CHOIR_MAX_FEATURES)
        return choir_fail(CHOIR_E_INVALID, "%u features, the limit is %d", d->n_features,
                          CHOIR_MAX_FEATURES);
    for (uint32_t i = 0; i < d->n_features; i++)
        if (!isfinite(d->features[i]))
            return choir_fail(CHOIR_E_INVALID, "feature %u is not finite", i);
    if (d->routes_bytes > CHOIR_MAX_ROUTES)
        return choir_fail(CHOIR_E_INVALID, "routes of %zu bytes, the limit is %d", d->routes_bytes,
                          CHOIR_MAX_ROUTES);
    return CHOIR_OK;
}

choir_status journal_check_feedback(const choir_feedback *f)
{
    CHOIR_TRY(check_request_id("the request's id", f->request_id));
    CHOIR_TRY(check_text("the tenant", f->tenant, CHOIR_MAX_SCOPE_NAME));
    switch (f->signal) {
    case CHOIR_SIGNAL_THUMB:
        if (f->value == 0 || f->value == 1) return CHOIR_OK;
        return choir_fail(CHOIR_E_INVALID, "a thumb is 0 or 1, not %g", (double)f->value);
    case CHOIR_SIGNAL_SCORE:
        if (f->value >= 0 && f->value <= 1) return CHOIR_OK;
        return choir_fail(CHOIR_E_INVALID, "a score is 0 to 1, not %g", (double)f->value);
    case CHOIR_SIGNAL_PREFERRED:
        CHOIR_TRY(check_request_id("the preferred request's id", f->text));
        if (strcmp(f->text, f->request_id) != 0) return CHOIR_OK;
        return choir_fail(CHOIR_E_INVALID, "a request cannot be preferred to itself");
    case CHOIR_SIGNAL_CORRECTION:
        return check_text("the correction", f->text, CHOIR_MAX_CORRECTION + 1);
    default:
        return choir_fail(CHOIR_E_INVALID, "no kind of feedback has the number %d", (int)f->signal);
    }
}

/* -- rows -- */

/* The row's number; it is made if it is not there. */
static choir_status scope_of(journal_db *db, const char *model, const char *tenant, int64_t *scope)
{
    journal_call call = journal_begin_call(db, SQL_FIND_SCOPE);
    bool row;
    journal_put_text(&call, model);
    journal_put_text(&call, tenant);
    CHOIR_TRY(journal_row(&call, &row));
    if (row) {
        *scope = sqlite3_column_int64(call.statement, 0);
        journal_end_call(&call);
        return CHOIR_OK;
    }
    call = journal_begin_call(db, SQL_ADD_SCOPE);
    journal_put_text(&call, model);
    journal_put_text(&call, tenant);
    CHOIR_TRY(journal_run(&call));
    *scope = sqlite3_last_insert_rowid(db->db);
    return CHOIR_OK;
}

static choir_status add_entry(choir_journal *j, int64_t scope, uint64_t *sequence)
{
    journal_call call = journal_begin_call(&j->db, SQL_ADD_ENTRY);
    journal_put(&call, scope);
    CHOIR_TRY(journal_run(&call));
    *sequence = (uint64_t)sqlite3_last_insert_rowid(j->db.db);
    return CHOIR_OK;
}

static choir_status add_candidates(journal_db *db, const choir_decision *d, uint64_t sequence)
{
    for (uint32_t i = 0; i < d->n_candidates; i++) {
        journal_call call = journal_begin_call(db, SQL_ADD_CANDIDATE);
        journal_put(&call, (int64_t)sequence);
        journal_put(&call, i);
        journal_put_text(&call, d->candidates[i].name);
        journal_put(&call, (int64_t)d->candidates[i].digest);
        journal_put_real(&call, d->candidates[i].probability);
        CHOIR_TRY(journal_run(&call));
    }
    return CHOIR_OK;
}

static choir_status check_new(journal_db *db, const char *request_id)
{
    journal_call call = journal_begin_call(db, SQL_HAS_REQUEST);
    bool row;
    journal_put_text(&call, request_id);
    CHOIR_TRY(journal_row(&call, &row));
    if (!row) return CHOIR_OK;
    journal_end_call(&call);
    return choir_fail(CHOIR_E_EXISTS, "the journal has a request %s already", request_id);
}

static choir_status write_decision(choir_journal *j, queued *entry)
{
    const choir_decision *d = &entry->decision;
    int64_t scope;
    uint64_t sequence;
    CHOIR_TRY(check_new(&j->db, d->request_id));
    CHOIR_TRY(scope_of(&j->db, d->model, d->tenant, &scope));
    CHOIR_TRY(add_entry(j, scope, &sequence));
    journal_call call = journal_begin_call(&j->db, SQL_ADD_DECISION);
    journal_put(&call, (int64_t)sequence);
    journal_put_text(&call, d->request_id);
    journal_put(&call, d->time_ms);
    journal_put_blob(&call, d->features, d->n_features * sizeof *d->features);
    journal_put(&call, d->chosen);
    journal_put(&call, d->explored);
    journal_put(&call, (int64_t)d->champion);
    journal_put(&call, (int64_t)d->challenger);
    journal_put(&call, (int64_t)d->seed);
    journal_put_blob(&call, d->routes, d->routes_bytes);
    CHOIR_TRY(journal_run(&call));
    CHOIR_TRY(add_candidates(&j->db, d, sequence));
    entry->receipt.sequence = j->delta.last_sequence = sequence;
    j->delta.n_decisions++;
    return CHOIR_OK;
}

typedef struct found_request {
    uint64_t sequence;
    int64_t scope;
} found_request;

/* One sentence for what is not there and for what is another tenant's: who asks learns nothing of
 * others. */
static choir_status find_request(journal_db *db, const char *request_id, const char *tenant,
                                 found_request *out)
{
    journal_call call = journal_begin_call(db, SQL_FIND_REQUEST);
    bool row;
    journal_put_text(&call, request_id);
    journal_put_text(&call, tenant);
    CHOIR_TRY(journal_row(&call, &row));
    if (!row) return choir_fail(CHOIR_E_NOT_FOUND, "the journal has no request %s", request_id);
    *out = (found_request){(uint64_t)sqlite3_column_int64(call.statement, 0),
                           sqlite3_column_int64(call.statement, 1)};
    journal_end_call(&call);
    return CHOIR_OK;
}

static choir_status check_preferred(journal_db *db, const choir_feedback *f, int64_t scope)
{
    found_request other;
    CHOIR_TRY(find_request(db, f->text, f->tenant, &other));
    if (other.scope == scope) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "requests %s and %s were of different models", f->text,
                      f->request_id);
}

static bool is_text_signal(choir_signal signal)
{
    return signal == CHOIR_SIGNAL_PREFERRED || signal == CHOIR_SIGNAL_CORRECTION;
}

static bool says_the_same(sqlite3_stmt *row, const choir_feedback *f)
{
    if (!is_text_signal(f->signal)) return sqlite3_column_double(row, 1) == (double)f->value;
    const void *text = sqlite3_column_text(row, 2);
    size_t bytes = (size_t)sqlite3_column_bytes(row, 2);
    return text != NULL && bytes == strlen(f->text) && memcmp(text, f->text, bytes) == 0;
}

/* *there: the same feedback, or none (false); other feedback of its kind is an error. */
static choir_status find_earlier(journal_db *db, const choir_feedback *f, uint64_t decision,
                                 choir_journal_receipt *receipt, bool *there)
{
    journal_call call = journal_begin_call(db, SQL_FIND_FEEDBACK);
    journal_put(&call, (int64_t)decision);
    journal_put(&call, f->signal);
    CHOIR_TRY(journal_row(&call, there));
    if (!*there) return CHOIR_OK;
    receipt->sequence = (uint64_t)sqlite3_column_int64(call.statement, 0);
    receipt->duplicate = says_the_same(call.statement, f);
    journal_end_call(&call);
    if (receipt->duplicate) return CHOIR_OK;
    return choir_fail(CHOIR_E_ABORTED, "request %s has other feedback of this kind already",
                      f->request_id);
}

static choir_status add_feedback(choir_journal *j, const choir_feedback *f,
                                 const found_request *request, uint64_t *out)
{
    uint64_t sequence;
    bool is_text = is_text_signal(f->signal);
    CHOIR_TRY(add_entry(j, request->scope, &sequence));
    journal_call call = journal_begin_call(&j->db, SQL_ADD_FEEDBACK);
    journal_put(&call, (int64_t)sequence);
    journal_put(&call, (int64_t)request->sequence);
    journal_put(&call, f->signal);
    journal_put_real(&call, is_text ? 0 : (double)f->value);
    journal_put_text(&call, is_text ? f->text : NULL);
    journal_put(&call, f->time_ms);
    CHOIR_TRY(journal_run(&call));
    *out = j->delta.last_sequence = sequence;
    j->delta.n_feedback++;
    return CHOIR_OK;
}

static choir_status write_feedback(choir_journal *j, queued *entry)
{
    const choir_feedback *f = &entry->feedback;
    found_request request;
    bool there;
    CHOIR_TRY(find_request(&j->db, f->request_id, f->tenant, &request));
    if (f->signal == CHOIR_SIGNAL_PREFERRED) CHOIR_TRY(check_preferred(&j->db, f, request.scope));
    CHOIR_TRY(find_earlier(&j->db, f, request.sequence, &entry->receipt, &there));
    return there ? CHOIR_OK : add_feedback(j, f, &request, &entry->receipt.sequence);
}

/* -- versions -- */

typedef struct change {
    int64_t scope;
    uint64_t version;
    int64_t from; /* a state, or NONE */
    choir_version_state to;
    double share;
    const char *evidence;
    int64_t time_ms;
} change;
enum { NONE = -1 };

static choir_status add_promotion(journal_db *db, const change *c)
{
    journal_call call = journal_begin_call(db, SQL_ADD_PROMOTION);
    journal_put(&call, c->scope);
    journal_put(&call, (int64_t)c->version);
    journal_put(&call, c->from);
    journal_put(&call, c->to);
    journal_put_real(&call, c->share);
    journal_put_text(&call, c->evidence);
    journal_put(&call, c->time_ms);
    return journal_run(&call);
}

static choir_status apply(journal_db *db, const change *c)
{
    journal_call call = journal_begin_call(db, SQL_MOVE_VERSION);
    journal_put(&call, c->scope);
    journal_put(&call, (int64_t)c->version);
    journal_put(&call, c->to);
    journal_put_real(&call, c->share);
    journal_put_text(&call, c->evidence);
    CHOIR_TRY(journal_run(&call));
    return add_promotion(db, c);
}

/* The one that is live, if it is another than `next`, becomes `was`. */
static choir_status end_live(journal_db *db, const change *next, choir_version_state was)
{
    journal_call call = journal_begin_call(db, SQL_FIND_LIVE);
    bool row;
    journal_put(&call, next->scope);
    journal_put(&call, CHOIR_VERSION_LIVE);
    CHOIR_TRY(journal_row(&call, &row));
    if (!row) return CHOIR_OK;
    uint64_t version = (uint64_t)sqlite3_column_int64(call.statement, 0);
    journal_end_call(&call);
    if (version == next->version) return CHOIR_OK;
    change end = {.scope = next->scope,
                  .version = version,
                  .from = CHOIR_VERSION_LIVE,
                  .to = was,
                  .evidence = next->evidence,
                  .time_ms = next->time_ms};
    return apply(db, &end);
}

static choir_status next_version(journal_db *db, int64_t scope, uint64_t *out)
{
    journal_call call = journal_begin_call(db, SQL_NEXT_VERSION);
    bool row;
    journal_put(&call, scope);
    CHOIR_TRY(journal_row(&call, &row));
    *out = row ? (uint64_t)sqlite3_column_int64(call.statement, 0) : 1;
    if (row) journal_end_call(&call);
    return CHOIR_OK;
}

/* *state: NONE if the version is not there. */
static choir_status find_version(journal_db *db, int64_t scope, uint64_t version, int64_t *state)
{
    journal_call call = journal_begin_call(db, SQL_FIND_VERSION);
    bool row;
    journal_put(&call, scope);
    journal_put(&call, (int64_t)version);
    CHOIR_TRY(journal_row(&call, &row));
    *state = row ? sqlite3_column_int64(call.statement, 0) : NONE;
    if (row) journal_end_call(&call);
    return CHOIR_OK;
}

static choir_status add_version(journal_db *db, int64_t scope, uint64_t version,
                                const choir_version_row *r)
{
    journal_call call = journal_begin_call(db, SQL_ADD_VERSION);
    journal_put(&call, scope);
    journal_put(&call, (int64_t)version);
    journal_put(&call, (int64_t)r->parent);
    journal_put_text(&call, r->digest);
    journal_put(&call, r->state);
    journal_put_real(&call, r->share);
    journal_put(&call, (int64_t)r->learnt_to);
    journal_put(&call, (int64_t)r->n_feedback);
    journal_put(&call, r->created_ms);
    journal_put_text(&call, r->evidence);
    return journal_run(&call);
}

static choir_status write_put(choir_journal *j, queued *entry)
{
    const choir_version_row *r = entry->version.row;
    journal_db *db = &j->db;
    int64_t scope, state;
    uint64_t version = r->version;
    CHOIR_TRY(scope_of(db, entry->version.model, entry->version.tenant, &scope));
    if (version == 0) CHOIR_TRY(next_version(db, scope, &version));
    CHOIR_TRY(find_version(db, scope, version, &state));
    if (state != NONE)
        return choir_fail(CHOIR_E_EXISTS, "the journal has a version %llu of %s already",
                          (unsigned long long)version, entry->version.model);
    change made = {.scope = scope,
                   .version = version,
                   .from = NONE,
                   .to = r->state,
                   .share = r->share,
                   .evidence = r->evidence,
                   .time_ms = r->created_ms};
    if (r->state == CHOIR_VERSION_LIVE) CHOIR_TRY(end_live(db, &made, CHOIR_VERSION_RETIRED));
    CHOIR_TRY(add_version(db, scope, version, r));
    CHOIR_TRY(add_promotion(db, &made));
    entry->receipt.sequence = version; /* its caller takes it from there, once it is durable */
    return CHOIR_OK;
}

static choir_status write_move(choir_journal *j, queued *entry)
{
    const choir_version_move *m = entry->version.move;
    journal_db *db = &j->db;
    int64_t scope, state;
    CHOIR_TRY(scope_of(db, entry->version.model, entry->version.tenant, &scope));
    CHOIR_TRY(find_version(db, scope, m->version, &state));
    if (state == NONE)
        return choir_fail(CHOIR_E_NOT_FOUND, "the journal has no version %llu of %s",
                          (unsigned long long)m->version, entry->version.model);
    change move = {.scope = scope,
                   .version = m->version,
                   .from = state,
                   .to = m->to,
                   .share = m->share,
                   .evidence = m->evidence != NULL ? m->evidence : "",
                   .time_ms = m->time_ms};
    if (m->to == CHOIR_VERSION_LIVE) CHOIR_TRY(end_live(db, &move, m->was));
    return apply(db, &move);
}

choir_status journal_write(choir_journal *journal, queued *entry)
{
    switch (entry->kind) {
    case QUEUED_DECISION:
        return write_decision(journal, entry);
    case QUEUED_FEEDBACK:
        return write_feedback(journal, entry);
    case QUEUED_PUT:
        return write_put(journal, entry);
    default:
        CHOIR_ASSERT(entry->kind == QUEUED_MOVE);
        return write_move(journal, entry);
    }
}
