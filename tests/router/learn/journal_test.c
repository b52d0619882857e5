/* The journal as its users see it: receipts, feedback and what refuses it, tenants, order,
 * versions, retention, export, forgetting, a full queue, no memory. */
#include "tests/router/learn/journal_world.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void assert_ok(const reply *r)
{
    if (r->status != CHOIR_OK) fail_msg("%s", r->why);
}

static void assert_status(const reply *r, choir_status status, const char *says)
{
    assert_int_equal(r->status, status);
    if (strstr(r->why, says) == NULL) fail_msg("\"%s\" does not say \"%s\"", r->why, says);
}

static choir_journal_stats stats_of(world *w)
{
    choir_journal_stats s;
    choir_journal_get_stats(w->journal, &s);
    return s;
}

/* What was answered OK is there after a new start, bit by bit, in the order of its sequence. */
static void test_receipts(void **state)
{
    (void)state;
    world w;
    char id[16];
    uint64_t before = 0;
    make_world(&w);
    for (int i = 0; i < 50; i++) {
        snprintf(id, sizeof id, "r%d", i);
        reply r = decide(&w, id, "m", "t");
        assert_ok(&r);
        assert_true(r.sequence > before && !r.duplicate);
        before = r.sequence;
        if (i % 2 == 1) continue;
        r = thumb(&w, id, "t", i % 4 == 0);
        assert_ok(&r);
        assert_true(r.sequence > before);
        before = r.sequence;
    }
    close_world(&w);
    open_world(&w);
    const listing *l = list_all(&w, "m", "t");
    assert_int_equal(l->n, 75);
    assert_int_equal(l->last, before);
    for (int i = 0; i < 50; i++) {
        snprintf(id, sizeof id, "r%d", i);
        assert_int_equal(count_listed(l, id, false), 1);
        assert_int_equal(count_listed(l, id, true), i % 2 == 0);
    }
    assert_true(l->at[1].is_feedback && l->at[1].value == 1 && l->at[4].value == 0);
    choir_journal_stats s = stats_of(&w);
    assert_true(s.healthy && s.n_decisions == 50 && s.n_feedback == 25 &&
                s.last_sequence == before);
    assert_true(s.n_refused == 0 && s.n_queued == 0 && s.bytes > 4096);
    end_world(&w);
}

/* Many wait for one commit, and each is answered once. */
static void test_group(void **state)
{
    (void)state;
    enum { N = 500 };
    static toy toys[N];
    static reply replies[N];
    world w;
    char id[16];
    make_world(&w);
    for (int i = 0; i < N; i++) {
        snprintf(id, sizeof id, "r%d", i % 400); /* the last hundred are there already */
        make_toy(&toys[i], id, "m", "t");
        assert_int_equal(start_decide(&w, &toys[i], &replies[i]), CHOIR_OK);
        memset(&toys[i], 0x5A, sizeof toys[i]); /* it was copied */
    }
    for (int i = 0; i < N; i++) {
        wait_for(&replies[i]);
        assert_int_equal(replies[i].status, i < 400 ? CHOIR_OK : CHOIR_E_EXISTS);
    }
    assert_int_equal(list_all(&w, "m", "t")->n, 400);
    assert_int_equal(stats_of(&w).n_refused, 100);
    assert_true(stats_of(&w).healthy);
    end_world(&w);
}

static bool stop_after_three(void *user, const choir_journal_entry *e)
{
    (void)e;
    return ++*(int *)user < 3;
}

static void test_read_in_parts(void **state)
{
    (void)state;
    world w;
    char id[16];
    uint64_t last;
    int n = 0;
    make_world(&w);
    for (int i = 0; i < 10; i++) {
        snprintf(id, sizeof id, "r%d", i);
        decide(&w, id, i % 2 == 0 ? "m" : "other", "t");
    }
    assert_int_equal(choir_journal_read(w.journal, "m", "t", 0, 0, stop_after_three, &n, &last),
                     CHOIR_OK);
    assert_int_equal(n, 3);
    assert_int_equal(last, 5); /* every second one is of the other model */
    n = -100;
    assert_int_equal(choir_journal_read(w.journal, "m", "t", last, 1, stop_after_three, &n, &last),
                     CHOIR_OK);
    assert_int_equal(n, -99);
    assert_int_equal(last, 7);
    assert_int_equal(choir_journal_read(w.journal, "m", "t", 9, 0, stop_after_three, &n, &last),
                     CHOIR_OK);
    assert_int_equal(n, -99);
    assert_int_equal(last, 9);
    assert_int_equal(
        choir_journal_read(w.journal, "m", "t", UINT64_MAX, 0, stop_after_three, &n, &last),
        CHOIR_OK);
    assert_int_equal(choir_journal_read(w.journal, "none", "t", 0, 0, stop_after_three, &n, &last),
                     CHOIR_OK);
    assert_int_equal(n, -99);
    end_world(&w);
}

/* -- feedback -- */

static void test_feedback_again(void **state)
{
    (void)state;
    world w;
    make_world(&w);
    decide(&w, "a", "m", "t");
    decide(&w, "b", "m", "t");
    decide(&w, "c", "n", "t");
    reply first = thumb(&w, "a", "t", 1), again = thumb(&w, "a", "t", 1),
          other = thumb(&w, "a", "t", 0);
    assert_ok(&first);
    assert_ok(&again);
    assert_true(again.duplicate && !first.duplicate && again.sequence == first.sequence);
    assert_status(&other, CHOIR_E_ABORTED, "request a has other feedback");
    choir_feedback f = {
        .request_id = "a", .tenant = "t", .signal = CHOIR_SIGNAL_PREFERRED, .text = "b"};
    reply r = feed(&w, &f);
    assert_ok(&r);
    r = feed(&w, &f);
    assert_true(r.status == CHOIR_OK && r.duplicate);
    f.text = "c";
    r = feed(&w, &f);
    assert_status(&r, CHOIR_E_INVALID, "different models");
    f.text = "zzz";
    r = feed(&w, &f);
    assert_status(&r, CHOIR_E_NOT_FOUND, "zzz");
    f.text = "a";
    r = feed(&w, &f);
    assert_status(&r, CHOIR_E_INVALID, "preferred to itself");
    f = (choir_feedback){
        .request_id = "b", .tenant = "t", .signal = CHOIR_SIGNAL_CORRECTION, .text = "4\xC3\xA9"};
    r = feed(&w, &f);
    assert_ok(&r);
    f.text = "5";
    r = feed(&w, &f);
    assert_status(&r, CHOIR_E_ABORTED, "request b");
    const listing *l = list_all(&w, "m", "t");
    assert_int_equal(l->n, 5);
    assert_string_equal(l->at[3].text, "b");
    assert_string_equal(l->at[4].text, "4\xC3\xA9");
    assert_int_equal(l->at[4].signal, CHOIR_SIGNAL_CORRECTION);
    end_world(&w);
}

/* A tenant learns nothing of another's requests: unknown and foreign read the same. */
static void test_tenants_apart(void **state)
{
    (void)state;
    world w;
    make_world(&w);
    decide(&w, "a", "m", "one");
    decide(&w, "b", "m", "two");
    reply foreign = thumb(&w, "a", "two", 1), unknown = thumb(&w, "x", "two", 1);
    assert_status(&foreign, CHOIR_E_NOT_FOUND, "the journal has no request a");
    assert_status(&unknown, CHOIR_E_NOT_FOUND, "the journal has no request x");
    choir_feedback f = {
        .request_id = "b", .tenant = "two", .signal = CHOIR_SIGNAL_PREFERRED, .text = "a"};
    foreign = feed(&w, &f);
    assert_status(&foreign, CHOIR_E_NOT_FOUND, "the journal has no request a");
    reply own = thumb(&w, "a", "one", 1);
    assert_ok(&own);
    const listing *l = list_all(&w, "m", "two");
    assert_int_equal(l->n, 1);
    assert_string_equal(l->at[0].id, "b");
    assert_int_equal(list_all(&w, "m", "one")->n, 2);
    end_world(&w);
}

static bool add_tenant(void *user, const char *tenant)
{
    strcat(user, tenant);
    strcat(user, ";");
    return true;
}

static void test_tenants(void **state)
{
    (void)state;
    world w;
    char all[64] = "";
    choir_version_row v = {.state = CHOIR_VERSION_FROZEN};
    make_world(&w);
    decide(&w, "a", "m", "two");
    decide(&w, "b", "m", "");
    decide(&w, "c", "n", "three");
    assert_int_equal(choir_journal_put_version(w.journal, "m", "four", &v), CHOIR_OK);
    assert_int_equal(choir_journal_tenants(w.journal, "m", add_tenant, all), CHOIR_OK);
    assert_string_equal(all, ";two;");
    end_world(&w);
}

/* -- what is not taken -- */

typedef struct wrong {
    const char *says;
    void (*make)(toy *t);
} wrong;

static void no_id(toy *t)
{
    t->decision.request_id[0] = 0;
}
static void long_id(toy *t)
{
    memset(t->decision.request_id, 'x', sizeof t->decision.request_id);
}
static void bad_id(toy *t)
{
    strcpy(t->decision.request_id, "\xFF");
}
static void no_model(toy *t)
{
    t->decision.model = NULL;
}
static void no_candidate(toy *t)
{
    t->decision.n_candidates = 0;
}
static void many_candidates(toy *t)
{
    t->decision.n_candidates = CHOIR_MAX_CANDIDATES + 1;
}
static void chosen_beyond(toy *t)
{
    t->decision.chosen = t->decision.n_candidates;
}
static void nan_probability(toy *t)
{
    t->decision.candidates[0].probability = (double)NAN;
}
static void high_probability(toy *t)
{
    t->decision.candidates[0].probability = 1.5;
}
static void chosen_at_0(toy *t)
{
    t->decision.candidates[t->decision.chosen].probability = 0;
}
static void long_name(toy *t)
{
    memset(t->decision.candidates[0].name, 'x', CHOIR_MAX_PLAN_NAME);
}
static void many_features(toy *t)
{
    t->decision.n_features = CHOIR_MAX_FEATURES + 1;
}
static void large_routes(toy *t)
{
    t->decision.routes_bytes = CHOIR_MAX_ROUTES + 1;
}
static void nan_feature(toy *t)
{
    t->features[1] = NAN;
    t->decision.n_features = 2;
}

static void test_wrong_decisions(void **state)
{
    (void)state;
    static const wrong all[] = {
        {"id is empty", no_id},
        {"id must be UTF-8", long_id},
        {"id must be UTF-8", bad_id},
        {"model's name is missing", no_model},
        {"1 to 8", no_candidate},
        {"1 to 8", many_candidates},
        {"was chosen", chosen_beyond},
        {"probability", nan_probability},
        {"probability", high_probability},
        {"probability 0", chosen_at_0},
        {"plan's name", long_name},
        {"97 features", many_features},
        {"feature 1", nan_feature},
        {"routes", large_routes},
    };
    world w;
    make_world(&w);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        toy t;
        make_toy(&t, "a", "m", "t");
        all[i].make(&t);
        reply r = decide_toy(&w, &t);
        assert_status(&r, CHOIR_E_INVALID, all[i].says);
    }
    assert_int_equal(stats_of(&w).n_decisions, 0);
    end_world(&w);
}

static void test_wrong_feedback(void **state)
{
    (void)state;
    static const struct {
        const char *says;
        choir_feedback f;
    } all[] = {
        {"id is empty", {"", "t"}},
        {"tenant is missing", {"a", NULL}},
        {"a thumb is 0 or 1", {"a", "t", CHOIR_SIGNAL_THUMB, 0.5F}},
        {"a thumb is 0 or 1", {"a", "t", CHOIR_SIGNAL_THUMB, NAN}},
        {"a score is 0 to 1", {"a", "t", CHOIR_SIGNAL_SCORE, 1.5F}},
        {"a score is 0 to 1", {"a", "t", CHOIR_SIGNAL_SCORE, NAN}},
        {"preferred request's id is missing", {"a", "t", CHOIR_SIGNAL_PREFERRED}},
        {"correction is missing", {"a", "t", CHOIR_SIGNAL_CORRECTION}},
        {"correction must be UTF-8", {"a", "t", CHOIR_SIGNAL_CORRECTION, 0, "\xC3"}},
        {"no kind", {"a", "t", CHOIR_N_SIGNALS, 0}},
    };
    world w;
    make_world(&w);
    decide(&w, "a", "m", "t");
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        reply r = feed(&w, &all[i].f);
        assert_status(&r, CHOIR_E_INVALID, all[i].says);
    }
    char *longest = calloc(1, CHOIR_MAX_CORRECTION + 2);
    assert_non_null(longest);
    memset(longest, 'x', CHOIR_MAX_CORRECTION + 1);
    choir_feedback f = {"a", "t", CHOIR_SIGNAL_CORRECTION, 0, longest, 0};
    reply r = feed(&w, &f);
    assert_status(&r, CHOIR_E_INVALID, "1048576");
    longest[CHOIR_MAX_CORRECTION] = 0;
    r = feed(&w, &f);
    assert_ok(&r);
    free(longest);
    end_world(&w);
}

/* -- versions -- */

static uint64_t put(world *w, choir_version_state version_state, const char *digest)
{
    choir_version_row row = {
        .state = version_state, .share = 0.05, .learnt_to = 12, .created_ms = 77};
    strcpy(row.digest, digest);
    strcpy(row.evidence, "{\"n\":1}");
    if (choir_journal_put_version(w->journal, "m", "t", &row) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return row.version;
}

static choir_status move(world *w, uint64_t version, choir_version_state to,
                         choir_version_state was)
{
    choir_version_move m = {
        .version = version, .to = to, .was = was, .evidence = "{}", .time_ms = 88};
    return choir_journal_move_version(w->journal, "m", "t", &m);
}

static void assert_states(world *w, const choir_version_state *want, uint32_t n_want)
{
    choir_version_row rows[8];
    uint32_t n;
    assert_int_equal(choir_journal_versions(w->journal, "m", "t", rows, 8, &n), CHOIR_OK);
    assert_int_equal(n, n_want);
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(rows[i].version, n - i);
        assert_int_equal(rows[i].state, want[i]);
    }
}

static void test_versions(void **state)
{
    (void)state;
    world w;
    make_world(&w);
    assert_states(&w, NULL, 0);
    assert_int_equal(put(&w, CHOIR_VERSION_LIVE, "aa"), 1);
    assert_int_equal(put(&w, CHOIR_VERSION_FROZEN, "bb"), 2);
    assert_int_equal(put(&w, CHOIR_VERSION_FROZEN, "cc"), 3);
    assert_int_equal(move(&w, 2, CHOIR_VERSION_STAGED, 0), CHOIR_OK);
    assert_int_equal(move(&w, 2, CHOIR_VERSION_LIVE, CHOIR_VERSION_RETIRED), CHOIR_OK);
    assert_states(
        &w,
        (choir_version_state[]){CHOIR_VERSION_FROZEN, CHOIR_VERSION_LIVE, CHOIR_VERSION_RETIRED},
        3);
    assert_int_equal(move(&w, 1, CHOIR_VERSION_LIVE, CHOIR_VERSION_ROLLED_BACK), CHOIR_OK);
    assert_int_equal(move(&w, 3, CHOIR_VERSION_REJECTED, 0), CHOIR_OK);
    assert_int_equal(move(&w, 4, CHOIR_VERSION_REJECTED, 0), CHOIR_E_NOT_FOUND);
    assert_int_equal(move(&w, 3, CHOIR_VERSION_LIVE, CHOIR_VERSION_FROZEN), CHOIR_E_INVALID);
    assert_int_equal(move(&w, 3, CHOIR_N_VERSION_STATES, 0), CHOIR_E_INVALID);
    choir_version_row taken = {.version = 3};
    assert_int_equal(choir_journal_put_version(w.journal, "m", "t", &taken), CHOIR_E_EXISTS);
    taken.share = (double)NAN;
    assert_int_equal(choir_journal_put_version(w.journal, "m", "t", &taken), CHOIR_E_INVALID);
    close_world(&w);
    open_world(&w);
    assert_states(&w,
                  (choir_version_state[]){CHOIR_VERSION_REJECTED, CHOIR_VERSION_ROLLED_BACK,
                                          CHOIR_VERSION_LIVE},
                  3);
    choir_version_row row;
    uint32_t n;
    assert_int_equal(choir_journal_versions(w.journal, "m", "t", &row, 1, &n), CHOIR_OK);
    assert_int_equal(n, 3);
    assert_string_equal(row.digest, "cc");
    assert_true(row.learnt_to == 12 && row.created_ms == 77);
    assert_string_equal(row.evidence, "{}");
    assert_int_equal(put(&w, CHOIR_VERSION_LIVE, "dd"), 4);
    assert_states(&w,
                  (choir_version_state[]){CHOIR_VERSION_LIVE, CHOIR_VERSION_REJECTED,
                                          CHOIR_VERSION_ROLLED_BACK, CHOIR_VERSION_RETIRED},
                  4);
    close_world(&w);
    /* Four begin, 2 is staged, 1 and 2 change places, 2 and 1 do, 3 is rejected, 4 takes 1's place.
     */
    assert_int_equal(ask_number(&w, "SELECT count(*) FROM promotions"), 11);
    assert_int_equal(ask_number(&w, "SELECT sum(from_state = -1) FROM promotions"), 4);
    assert_int_equal(
        ask_number(&w, "SELECT group_concat(version || ':' || from_state || to_state, ' ') = "
                       "'1:-12 2:-10 3:-10 2:01 1:23 2:12 2:25 1:32 3:04 1:23 4:-12' FROM "
                       "(SELECT * FROM promotions ORDER BY id)"),
        1);
    open_world(&w);
    end_world(&w);
}

/* -- retention -- */

static void decide_at(world *w, const char *id, int64_t time_ms)
{
    toy t;
    make_toy(&t, id, "m", "t");
    t.decision.time_ms = time_ms;
    reply r = decide_toy(w, &t);
    assert_ok(&r);
}

static void test_retention_by_age(void **state)
{
    (void)state;
    world w;
    char id[16];
    make_closed_world(&w, NULL);
    w.options.max_age_s = 100;
    open_world(&w);
    for (int i = 0; i < 600; i++) { /* more than two slices */
        snprintf(id, sizeof id, "old%d", i);
        decide_at(&w, id, 1000 + i);
        if (i % 100 == 0) thumb(&w, id, "t", 1);
    }
    decide_at(&w, "young", 200000);
    thumb(&w, "young", "t", 1);
    uint64_t last = stats_of(&w).last_sequence;
    assert_int_equal(choir_journal_retain(w.journal, 100999), CHOIR_OK);
    assert_int_equal(stats_of(&w).n_decisions, 601); /* as old as may be */
    assert_int_equal(choir_journal_retain(w.journal, 101001 + 10), CHOIR_OK);
    assert_int_equal(stats_of(&w).n_decisions, 590);
    assert_int_equal(stats_of(&w).n_feedback, 6);
    assert_int_equal(choir_journal_retain(w.journal, 250000), CHOIR_OK);
    const listing *l = list_all(&w, "m", "t");
    assert_int_equal(l->n, 2);
    assert_string_equal(l->at[0].id, "young");
    close_world(&w);
    assert_int_equal(ask_number(&w, "SELECT count(*) FROM candidates WHERE decision NOT IN "
                                    "(SELECT sequence FROM decisions)"),
                     0);
    assert_int_equal(ask_number(&w, "SELECT count(*) FROM entries"), 2);
    open_world(&w);
    assert_int_equal(choir_journal_retain(w.journal, 500000), CHOIR_OK);
    assert_int_equal(stats_of(&w).n_decisions, 0);
    reply r = decide(&w, "next", "m", "t");
    assert_true(r.sequence == last + 1); /* no sequence is given twice */
    end_world(&w);
}

static void test_retention_by_size(void **state)
{
    (void)state;
    enum { LIMIT = 256 << 10, N = 1500 };
    world w;
    char id[16], path[128];
    struct stat st;
    make_closed_world(&w, NULL);
    w.options.max_bytes = LIMIT;
    w.options.max_age_s = 0;
    open_world(&w);
    for (int i = 0; i < N; i++) {
        snprintf(id, sizeof id, "r%d", i);
        reply r = decide(&w, id, "m", "t");
        assert_ok(&r);
    }
    assert_int_equal(choir_journal_retain(w.journal, 0), CHOIR_OK);
    const listing *l = list_all(&w, "m", "t");
    assert_true(l->n > 200 && l->n < N); /* the youngest, and most of what there is room for */
    for (uint32_t i = 0; i < l->n; i++) {
        snprintf(id, sizeof id, "r%u", N - l->n + i);
        assert_string_equal(l->at[i].id, id);
    }
    assert_true(stats_of(&w).bytes <= LIMIT);
    close_world(&w);
    world_path(&w, "journal.db", path);
    assert_int_equal(stat(path, &st), 0);
    assert_true(st.st_size <= LIMIT);
    open_world(&w);
    end_world(&w);
}

/* -- export and forget -- */

typedef struct exported {
    int n_decisions, n_feedback;
    json_int_t last;
} exported;

static bool check_line(void *user, const char *line, size_t bytes)
{
    exported *x = user;
    assert_true(line[bytes - 1] == '\n' && memchr(line, '\n', bytes) == line + bytes - 1);
    json_error_t error;
    json_t *object = json_loadb(line, bytes, 0, &error);
    assert_non_null(object);
    const char *kind = json_string_value(json_object_get(object, "kind"));
    const char *id = json_string_value(json_object_get(object, "request_id"));
    json_int_t sequence = json_integer_value(json_object_get(object, "sequence"));
    assert_true(sequence > x->last);
    x->last = sequence;
    assert_non_null(strstr(id, "-private")); /* the tenant's own alone */
    if (strcmp(kind, "decision") == 0) {
        toy t;
        make_toy(&t, id, "m", "one");
        json_t *list = json_object_get(object, "candidates");
        assert_int_equal(json_array_size(list), t.decision.n_candidates);
        json_t *p = json_object_get(json_array_get(list, 0), "probability");
        assert_true(json_real_value(p) == t.decision.candidates[0].probability);
        assert_int_equal(json_array_size(json_object_get(object, "features")),
                         t.decision.n_features);
        assert_int_equal(json_object_get(object, "routes") != NULL, t.decision.routes != NULL);
        x->n_decisions++;
    } else {
        assert_string_equal(json_string_value(json_object_get(object, "signal")), "correction");
        assert_non_null(
            strstr(json_string_value(json_object_get(object, "text")), "say \"\n\xC3\xA9"));
        x->n_feedback++;
    }
    json_decref(object);
    return x->n_decisions < 1000;
}

/* Two tenants' rows, of many lengths and in no order of their ids, so that pages hold both and rows
 * move. */
static void fill_two_tenants(world *w, int n)
{
    enum { AT_ONCE = 1000 };
    static reply decided[AT_ONCE], fed[AT_ONCE];
    uint32_t random = 1;
    for (int i = 0; i < n; i++) {
        char id[64], text[512] = "say \"\n\xC3\xA9 ";
        toy t;
        random = random * 1664525 + 1013904223;
        snprintf(id, sizeof id, "%08x%.*s-%s", random, (int)(random >> 8) % 24,
                 "........................", i % 2 == 0 ? "private" : "kept");
        make_toy(&t, id, i % 3 == 0 ? "m" : "n", i % 2 == 0 ? "one" : "two");
        assert_int_equal(start_decide(w, &t, &decided[i % AT_ONCE]), CHOIR_OK);
        for (uint32_t k = 0; k <= (random >> 16 & 31); k++) strcat(text, "secret-");
        choir_feedback f = {id, "one", CHOIR_SIGNAL_CORRECTION, 0, text, 0};
        fed[i % AT_ONCE] = (reply){.there = true};
        if (i % 4 == 0) assert_int_equal(start_feed(w, &f, &fed[i % AT_ONCE]), CHOIR_OK);
        for (int k = 0; k <= i % AT_ONCE && (i % AT_ONCE == AT_ONCE - 1 || i == n - 1); k++) {
            wait_for(&decided[k]);
            wait_for(&fed[k]);
            assert_ok(&decided[k]);
            assert_ok(&fed[k]);
        }
    }
}

static void test_export(void **state)
{
    (void)state;
    world w;
    exported x = {0};
    make_world(&w);
    fill_two_tenants(&w, 200);
    assert_int_equal(choir_journal_export(w.journal, "one", check_line, &x), CHOIR_OK);
    assert_int_equal(x.n_decisions, 100);
    assert_int_equal(x.n_feedback, 50);
    x = (exported){.n_decisions = 999};
    assert_int_equal(choir_journal_export(w.journal, "one", check_line, &x), CHOIR_OK);
    assert_int_equal(x.n_decisions, 1000); /* `false` stops it */
    end_world(&w);
}

/* How often the bytes of `text` occur in the journal's files. */
static int count_bytes(const world *w, const char *text)
{
    static const char *const names[] = {"journal.db", "journal.db-wal", "journal.db-shm"};
    int n = 0;
    for (int i = 0; i < 3; i++) {
        char path[128], *data;
        size_t bytes;
        world_path(w, names[i], path);
        if (choir_file_read(path, 64 << 20, &data, &bytes) != CHOIR_OK) continue;
        for (char *at = data;
             (at = memmem(at, bytes - (size_t)(at - data), text, strlen(text))) != NULL; at++)
            n++;
        choir_free(data);
    }
    return n;
}

static void test_forget(void **state)
{
    (void)state;
    enum { N = 6000 };
    world w;
    uint64_t n;
    choir_version_row v = {.state = CHOIR_VERSION_LIVE, .evidence = "{\"private\":1}"};
    make_world(&w);
    fill_two_tenants(&w, N);
    assert_int_equal(choir_journal_put_version(w.journal, "m", "one", &v), CHOIR_OK);
    uint32_t kept = list_all(&w, "m", "two")->n;
    kept += list_all(&w, "n", "two")->n;
    close_world(&w); /* so that it lies in the file, and does not in the WAL alone */
    assert_true(count_bytes(&w, "private") > N / 2 && count_bytes(&w, "secret-") > N / 4 - 1);
    open_world(&w);
    decide(&w, "last-private", "m", "one");
    assert_int_equal(choir_journal_forget(w.journal, "one", &n), CHOIR_OK);
    assert_int_equal(n, N / 2 + 1);
    assert_int_equal(count_bytes(&w, "private"), 0);
    assert_int_equal(count_bytes(&w, "secret-"), 0);
    assert_true(count_bytes(&w, "-kept") >= N / 2);
    assert_int_equal(list_all(&w, "m", "one")->n, 0);
    assert_int_equal(kept, N / 2);
    kept -= list_all(&w, "m", "two")->n;
    assert_int_equal(list_all(&w, "n", "two")->n, kept);
    assert_int_equal(stats_of(&w).n_decisions, N / 2);
    assert_int_equal(stats_of(&w).n_feedback, 0);
    assert_int_equal(choir_journal_forget(w.journal, "one", &n), CHOIR_OK);
    assert_int_equal(n, 0);
    close_world(&w);
    assert_int_equal(count_bytes(&w, "private"), 0);
    assert_int_equal(ask_number(&w, "SELECT count(*) FROM scopes WHERE tenant = 'one'"), 0);
    assert_int_equal(
        ask_number(&w,
                   "SELECT (SELECT count(*) FROM versions) + (SELECT count(*) FROM promotions)"),
        0);
    open_world(&w);
    end_world(&w);
}

/* -- bounds -- */

typedef struct gate {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    bool entered, open;
} gate;

static void hold_writer(void *user, const choir_journal_receipt *receipt)
{
    (void)receipt;
    gate *g = user;
    pthread_mutex_lock(&g->lock);
    g->entered = true;
    pthread_cond_broadcast(&g->moved);
    while (!g->open) pthread_cond_wait(&g->moved, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

static void close_gate(world *w, gate *g, const toy *t)
{
    assert_int_equal(choir_journal_decide(w->journal, &t->decision, hold_writer, g), CHOIR_OK);
    pthread_mutex_lock(&g->lock);
    while (!g->entered) pthread_cond_wait(&g->moved, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

static void open_gate(gate *g)
{
    pthread_mutex_lock(&g->lock);
    g->open = true;
    pthread_cond_broadcast(&g->moved);
    pthread_mutex_unlock(&g->lock);
}

static void test_full_queue(void **state)
{
    (void)state;
    world w;
    gate g = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, false};
    toy t;
    reply replies[4];
    make_closed_world(&w, NULL);
    w.options.max_queued = 3;
    open_world(&w);
    make_toy(&t, "first", "m", "t");
    close_gate(&w, &g, &t);
    for (int i = 0; i < 4; i++) {
        make_toy(&t, (char[]){(char)('a' + i), 0}, "m", "t");
        assert_int_equal(start_decide(&w, &t, &replies[i]), i < 3 ? CHOIR_OK : CHOIR_E_FULL);
    }
    assert_status(&replies[3], CHOIR_E_FULL, "3 entries wait");
    choir_journal_stats s = stats_of(&w);
    assert_true(s.n_queued == 3 && s.n_refused == 1 && s.healthy);
    open_gate(&g);
    for (int i = 0; i < 3; i++) {
        wait_for(&replies[i]);
        assert_ok(&replies[i]);
    }
    reply again = decide(&w, "d", "m", "t");
    assert_ok(&again);
    end_world(&w);
}

/* What waits when the journal is closed is written. */
static void test_close_writes_all(void **state)
{
    (void)state;
    static reply replies[100];
    world w;
    toy t;
    char id[16];
    make_world(&w);
    for (int i = 0; i < 100; i++) {
        snprintf(id, sizeof id, "r%d", i);
        make_toy(&t, id, "m", "t");
        assert_int_equal(start_decide(&w, &t, &replies[i]), CHOIR_OK);
    }
    close_world(&w);
    for (int i = 0; i < 100; i++) assert_true(replies[i].there && replies[i].status == CHOIR_OK);
    open_world(&w);
    assert_int_equal(list_all(&w, "m", "t")->n, 100);
    end_world(&w);
}

static void test_one_process(void **state)
{
    (void)state;
    world w;
    choir_journal *second;
    make_world(&w);
    assert_int_equal(choir_journal_open(w.folder, &w.options, &second), CHOIR_E_UNAVAILABLE);
    assert_non_null(strstr(choir_error_message(), "another process's"));
    end_world(&w);
    assert_int_equal(choir_journal_open("/proc/none/journal", &w.options, &second), CHOIR_E_IO);
}

/* The i-th allocation fails, for every i: an error, and the next time it goes well. */
static void test_no_memory(void **state)
{
    (void)state;
    world w;
    toy t;
    make_world(&w);
    make_toy(&t, "a", "m", "t");
    for (uint64_t i = 1;; i++) {
        choir_memory_fail_at(i);
        reply r = decide_toy(&w, &t);
        choir_memory_fail_at(0);
        if (r.status == CHOIR_OK) break;
        assert_int_equal(r.status, CHOIR_E_NO_MEMORY);
        assert_true(i < 10);
    }
    close_world(&w);
    choir_memory_fail_at(1);
    assert_int_equal(choir_journal_open(w.folder, &w.options, &w.journal), CHOIR_E_NO_MEMORY);
    choir_memory_fail_at(0);
    open_world(&w);
    assert_int_equal(list_all(&w, "m", "t")->n, 1);
    end_world(&w);
}

static bool count_entry(void *user, const choir_journal_entry *entry)
{
    (void)entry;
    ++*(uint64_t *)user;
    return true;
}

/* Readers go beside the writer, and see each decision before its feedback. */
static void *feed_many(void *arg)
{
    world *w = arg;
    for (int i = 0; i < 200; i++) {
        char id[32];
        snprintf(id, sizeof id, "p%d-%ld", i, (long)pthread_self());
        reply r = decide(w, id, "m", "t");
        CHOIR_ASSERT(r.status == CHOIR_OK);
        r = thumb(w, id, "t", 1);
        CHOIR_ASSERT(r.status == CHOIR_OK);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    world w;
    pthread_t threads[3];
    uint64_t last, n = 0, before = 0;
    make_world(&w);
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, feed_many, &w), 0);
    while (n < 1200) {
        n = 0;
        assert_int_equal(choir_journal_read(w.journal, "m", "t", 0, 0, count_entry, &n, &last),
                         CHOIR_OK);
        assert_true(n >= before);
        before = n;
    }
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    assert_int_equal(list_all(&w, "m", "t")->n, 1200);
    assert_true(stats_of(&w).healthy);
    end_world(&w);
}

int main(void)
{
    choir_log_set_level(CHOIR_LOG_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_receipts),
        cmocka_unit_test(test_group),
        cmocka_unit_test(test_read_in_parts),
        cmocka_unit_test(test_feedback_again),
        cmocka_unit_test(test_tenants_apart),
        cmocka_unit_test(test_tenants),
        cmocka_unit_test(test_wrong_decisions),
        cmocka_unit_test(test_wrong_feedback),
        cmocka_unit_test(test_versions),
        cmocka_unit_test(test_retention_by_age),
        cmocka_unit_test(test_retention_by_size),
        cmocka_unit_test(test_export),
        cmocka_unit_test(test_forget),
        cmocka_unit_test(test_full_queue),
        cmocka_unit_test(test_close_writes_all),
        cmocka_unit_test(test_one_process),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
