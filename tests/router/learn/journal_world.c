#include "tests/router/learn/journal_world.h"

#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t came = PTHREAD_COND_INITIALIZER;

void make_closed_world(world *w, const char *where)
{
    *w = (world){.options = CHOIR_JOURNAL_OPTIONS_DEFAULT};
    if (where == NULL) where = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(w->folder, sizeof w->folder, "%s/choir-journal-XXXXXX", where);
    assert_non_null(mkdtemp(w->folder));
}

void make_world(world *w)
{
    make_closed_world(w, NULL);
    open_world(w);
}

void open_world(world *w)
{
    choir_status status = choir_journal_open(w->folder, &w->options, &w->journal);
    if (status != CHOIR_OK) fail_msg("%s", choir_error_message());
}

void close_world(world *w)
{
    choir_journal_close(w->journal);
    w->journal = NULL;
}

void end_world(world *w)
{
    char command[128];
    close_world(w);
    snprintf(command, sizeof command, "rm -rf '%s'", w->folder);
    assert_int_equal(system(command), 0);
}

void world_path(const world *w, const char *name, char path[128])
{
    snprintf(path, 128, "%s/%s", w->folder, name);
}

static sqlite3 *open_by_hand(const world *w)
{
    char path[128];
    sqlite3 *db;
    world_path(w, "journal.db", path);
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    return db;
}

void edit(const world *w, const char *sql)
{
    sqlite3 *db = open_by_hand(w);
    if (sqlite3_exec(db, sql, NULL, NULL, NULL) != SQLITE_OK)
        fail_msg("%s: %s", sql, sqlite3_errmsg(db));
    sqlite3_close(db);
}

int64_t ask_number(const world *w, const char *sql)
{
    sqlite3 *db = open_by_hand(w);
    sqlite3_stmt *statement;
    assert_int_equal(sqlite3_prepare_v2(db, sql, -1, &statement, NULL), SQLITE_OK);
    assert_int_equal(sqlite3_step(statement), SQLITE_ROW);
    int64_t number = sqlite3_column_int64(statement, 0);
    sqlite3_finalize(statement);
    sqlite3_close(db);
    return number;
}

/* -- entries -- */

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= UINT64_C(0xBF58476D1CE4E5B9);
    x ^= x >> 27;
    x *= UINT64_C(0x94D049BB133111EB);
    return x ^ (x >> 31);
}

static uint64_t hash(const char *text)
{
    uint64_t h = 5;
    for (; *text != '\0'; text++) h = mix(h + (uint8_t)*text);
    return h;
}

static void make_candidates(choir_decision *d, uint64_t h)
{
    static const char *const names[] = {"", "legal", "legal=0.5,code=0.5"};
    d->n_candidates = 1 + (uint32_t)(h % 3);
    d->chosen = (uint32_t)(h / 3 % d->n_candidates);
    for (uint32_t i = 0; i < d->n_candidates; i++) {
        choir_candidate *c = &d->candidates[i];
        snprintf(c->name, sizeof c->name, "%s", names[i]);
        c->digest = mix(h + i);
        c->probability = (double)(mix(h + 10 + i) >> 11) / (double)(UINT64_C(1) << 53);
    }
}

void make_toy(toy *t, const char *id, const char *model, const char *tenant)
{
    uint64_t h = hash(id);
    memset(t, 0, sizeof *t);
    choir_decision *d = &t->decision;
    snprintf(d->request_id, sizeof d->request_id, "%s", id);
    d->model = model;
    d->tenant = tenant;
    d->time_ms = 1700000000000 + (int64_t)(h % 1000);
    for (int i = 0; i < N_TOY_FEATURES; i++)
        t->features[i] = (float)(int32_t)mix(h + 20 + (uint64_t)i) / 3e7f;
    d->features = t->features;
    d->n_features = h % 7 == 0 ? 0 : N_TOY_FEATURES;
    make_candidates(d, h);
    d->explored = h % 2 == 1;
    d->champion = mix(h + 30);
    d->challenger = h % 5 == 0 ? 7 : 0;
    d->seed = mix(h + 31);
    for (int i = 0; i < TOY_ROUTES; i++) t->routes[i] = (uint8_t)mix(h + 40 + (uint64_t)i);
    if (h % 3 == 0) {
        d->routes = t->routes;
        d->routes_bytes = TOY_ROUTES;
    }
}

static void assert_is_toy(const choir_decision *d)
{
    toy t;
    make_toy(&t, d->request_id, d->model, d->tenant);
    const choir_decision *want = &t.decision;
    assert_int_equal(d->n_features, want->n_features);
    assert_memory_equal(d->features, want->features, want->n_features * sizeof(float));
    assert_int_equal(d->n_candidates, want->n_candidates);
    for (uint32_t i = 0; i < want->n_candidates; i++) {
        const choir_candidate *c = &d->candidates[i], *w = &want->candidates[i];
        assert_string_equal(c->name, w->name);
        assert_true(c->digest == w->digest);
        assert_memory_equal(&c->probability, &w->probability, sizeof c->probability);
    }
    assert_int_equal(d->chosen, want->chosen);
    assert_int_equal(d->explored, want->explored);
    assert_true(d->champion == want->champion && d->challenger == want->challenger &&
                d->seed == want->seed);
    assert_int_equal(d->routes_bytes, want->routes_bytes);
    assert_int_equal(d->routes == NULL, want->routes == NULL);
    if (want->routes != NULL) assert_memory_equal(d->routes, want->routes, want->routes_bytes);
}

/* -- calls that wait -- */

static void take_reply(void *user, const choir_journal_receipt *receipt)
{
    reply *r = user;
    pthread_mutex_lock(&lock);
    CHOIR_ASSERT(!r->there); /* once */
    r->status = receipt->status;
    snprintf(r->why, sizeof r->why, "%s", receipt->message);
    r->sequence = receipt->sequence;
    r->duplicate = receipt->duplicate;
    r->there = true;
    pthread_cond_broadcast(&came);
    pthread_mutex_unlock(&lock);
}

void wait_for(const reply *r)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 60;
    int e = 0;
    pthread_mutex_lock(&lock);
    while (!r->there && e == 0) e = pthread_cond_timedwait(&came, &lock, &until);
    pthread_mutex_unlock(&lock);
    assert_int_equal(e, 0);
}

/* A refusal at once is a reply as well. */
static choir_status started(choir_status status, reply *out)
{
    if (status == CHOIR_OK) return status;
    out->status = status;
    snprintf(out->why, sizeof out->why, "%s", choir_error_message());
    out->there = true;
    return status;
}

choir_status start_decide(world *w, const toy *t, reply *out)
{
    *out = (reply){0};
    return started(choir_journal_decide(w->journal, &t->decision, take_reply, out), out);
}

choir_status start_feed(world *w, const choir_feedback *feedback, reply *out)
{
    *out = (reply){0};
    return started(choir_journal_feed(w->journal, feedback, take_reply, out), out);
}

reply decide_toy(world *w, const toy *t)
{
    reply r;
    if (start_decide(w, t, &r) == CHOIR_OK) wait_for(&r);
    return r;
}

reply decide(world *w, const char *id, const char *model, const char *tenant)
{
    toy t;
    make_toy(&t, id, model, tenant);
    return decide_toy(w, &t);
}

reply feed(world *w, const choir_feedback *feedback)
{
    reply r;
    if (start_feed(w, feedback, &r) == CHOIR_OK) wait_for(&r);
    return r;
}

reply thumb(world *w, const char *id, const char *tenant, float value)
{
    choir_feedback f = {.request_id = id, .tenant = tenant, .value = value, .time_ms = 5};
    return feed(w, &f);
}

/* -- the list -- */

static bool add_listed(void *user, const choir_journal_entry *e)
{
    listing *l = user;
    assert_true(l->n < MAX_LISTED);
    assert_is_toy(&e->decision);
    assert_true(l->n == 0 || l->at[l->n - 1].sequence < e->sequence);
    listed *to = &l->at[l->n++];
    *to = (listed){.sequence = e->sequence,
                   .decision_sequence = e->decision_sequence,
                   .is_feedback = e->is_feedback};
    snprintf(to->id, sizeof to->id, "%s", e->decision.request_id);
    if (!e->is_feedback) {
        assert_int_equal(e->sequence, e->decision_sequence);
        return true;
    }
    assert_true(e->decision_sequence < e->sequence);
    assert_string_equal(e->feedback.request_id, e->decision.request_id);
    to->signal = e->feedback.signal;
    to->value = e->feedback.value;
    snprintf(to->text, sizeof to->text, "%s", e->feedback.text != NULL ? e->feedback.text : "");
    return true;
}

const listing *list_all(world *w, const char *model, const char *tenant)
{
    static listing l;
    l.n = 0;
    choir_status status =
        choir_journal_read(w->journal, model, tenant, 0, 0, add_listed, &l, &l.last);
    if (status != CHOIR_OK) fail_msg("%s", choir_error_message());
    return &l;
}

uint32_t count_listed(const listing *l, const char *id, bool is_feedback)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < l->n; i++)
        n += l->at[i].is_feedback == is_feedback && strcmp(l->at[i].id, id) == 0;
    return n;
}
