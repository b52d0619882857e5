/* Every call to the disk fails once, and once with three more behind it: what was acknowledged is
 * there, also after a power cut; what was refused is whole or not there, and can be sent again; the
 * journal is well again once the disk is. FAULTS 7, 8, 10. */
#include "tests/router/learn/bad_disk.h"
#include "tests/router/learn/journal_world.h"

#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* `step`: every so-manieth call; all kinds of writes take the same way through SQLite and the
 * journal. */
typedef struct way {
    const char *name;
    bad_call call;
    int rc;
    choir_status status;
    uint64_t step, opens;
} way;
static const way ways[] = {
    {"a write finds the disk full", BAD_WRITE, SQLITE_FULL, CHOIR_E_FULL, 3},
    {"half a write finds room", BAD_HALF_WRITE, SQLITE_FULL, CHOIR_E_FULL, 7},
    {"a write fails", BAD_WRITE, SQLITE_IOERR_WRITE, CHOIR_E_IO, 7},
    {"half a write fails", BAD_HALF_WRITE, SQLITE_IOERR_WRITE, CHOIR_E_IO, 7},
    {"a sync fails", BAD_SYNC, SQLITE_IOERR_FSYNC, CHOIR_E_IO, 1},
    {"a sync fails, then opens do", BAD_SYNC, SQLITE_IOERR_FSYNC, CHOIR_E_IO, 1, 2},
    {"an open fails", BAD_OPEN, SQLITE_CANTOPEN, CHOIR_E_IO, 1},
    {"a cut fails", BAD_TRUNCATE, SQLITE_IOERR_TRUNCATE, CHOIR_E_IO, 1},
};

enum { N = 6 };
typedef struct acks {
    bool decided[N], fed[N];
    uint64_t version;
} acks;

static const way *now; /* for messages */
static uint64_t now_at;
static const char *now_where = "";

static void fail_here(const char *what)
{
    fail_msg("%s, call %llu%s: %s", now->name, (unsigned long long)now_at, now_where, what);
}

static void check_refusal(const reply *r)
{
    if (r->status != now->status || strstr(r->why, "journal.db") == NULL) fail_here(r->why);
}

/* Every second one is sent again until it is taken; it may have been written before it was refused.
 */
static bool ask(world *w, int i, bool is_feedback)
{
    char id[16];
    snprintf(id, sizeof id, "r%d", i);
    for (int tries = 0; tries < 8; tries++) {
        reply r = is_feedback ? thumb(w, id, "t", 1) : decide(w, id, "m", "t");
        if (r.status == CHOIR_OK || (tries > 0 && r.status == CHOIR_E_EXISTS)) return true;
        if (is_feedback && r.status == CHOIR_E_NOT_FOUND)
            return false; /* its decision was refused */
        check_refusal(&r);
        choir_journal_stats s;
        choir_journal_get_stats(w->journal, &s);
        if (s.healthy || s.why[0] == '\0') fail_here("the journal does not say that it is ill");
        if (i % 2 == 1) return false;
    }
    fail_here("it does not recover");
    return false;
}

static void use(world *w, acks *a)
{
    uint64_t n;
    choir_version_row row = {.state = CHOIR_VERSION_LIVE};
    reply other = decide(w, "other", "m", "other");
    (void)other;
    for (int i = 0; i < N; i++) {
        a->decided[i] = ask(w, i, false);
        a->fed[i] = ask(w, i, true);
        if (i == 1 && choir_journal_put_version(w->journal, "m", "t", &row) == CHOIR_OK)
            a->version = row.version;
        if (i == 3) {
            choir_status status = choir_journal_forget(w->journal, "other", &n);
            if (status != CHOIR_OK && status != now->status) fail_here(choir_error_message());
        }
    }
}

static void check_acks(world *w, const acks *a)
{
    choir_journal_stats s;
    choir_version_row row;
    uint32_t n;
    const listing *l = list_all(w, "m", "t");
    for (int i = 0; i < N; i++) {
        char id[16];
        snprintf(id, sizeof id, "r%d", i);
        uint32_t n_decided = count_listed(l, id, false), n_fed = count_listed(l, id, true);
        if (n_decided > 1 || n_fed > n_decided)
            fail_here("an entry is there twice, or feedback alone");
        if (a->decided[i] && n_decided == 0) fail_here("a decision is lost");
        if (a->fed[i] && n_fed == 0) fail_here("feedback is lost");
    }
    uint32_t n_listed = l->n;
    uint32_t n_other = list_all(w, "m", "other")->n;
    choir_journal_get_stats(w->journal, &s);
    if (n_listed + n_other != s.n_decisions + s.n_feedback) fail_here("an entry is there in part");
    assert_int_equal(choir_journal_versions(w->journal, "m", "t", &row, 1, &n), CHOIR_OK);
    if (n > 1 || (a->version != 0 && (n != 1 || row.state != CHOIR_VERSION_LIVE)))
        fail_here("a version is lost");
    reply r = decide(w, "after", "m", "new");
    if (r.status != CHOIR_OK) fail_here(r.why);
}

/* The folder as it lies there, once the disk is good. */
static void check_folder(const char *folder, const char *when, const acks *a)
{
    world w = {.options = CHOIR_JOURNAL_OPTIONS_DEFAULT};
    w.options.vfs = "bad";
    snprintf(w.folder, sizeof w.folder, "%s", folder);
    now_where = when;
    open_world(&w);
    check_acks(&w, a);
    close_world(&w);
}

static void use_and_cut(world *w, acks *a, const char *cut)
{
    choir_status status = choir_journal_open(w->folder, &w->options, &w->journal);
    if (status != CHOIR_OK) {
        if (status != now->status) fail_here(choir_error_message());
        w->journal = NULL;
    } else {
        use(w, a);
    }
    bad_disk_cut(w->folder, cut);
    close_world(w);
}

/* False: the disk has failed nowhere. */
static bool run_once(const way *how, uint64_t at)
{
    const bad_plan plan = {how->call, how->rc, at, at % 2 == 0 ? 3 : 0, how->opens};
    world w;
    acks a = {0};
    char cut[sizeof w.folder];
    now = how;
    now_at = at;
    now_where = "";
    make_closed_world(&w, NULL);
    snprintf(cut, sizeof cut, "%.64s/cut", w.folder);
    w.options.vfs = "bad";
    bad_disk_arm(&plan);
    use_and_cut(&w, &a, cut);
    bool failed = bad_disk_failures() > 0;
    bad_disk_disarm();
    check_folder(cut, ", after a power cut", &a);
    check_folder(w.folder, ", after a new start", &a);
    end_world(&w);
    return failed;
}

static void test_each_call_fails(void **state)
{
    (void)state;
    bool every = getenv("CHOIR_EVERY_CALL") != NULL;
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        uint64_t n = 0;
        for (uint64_t at = 1; run_once(&ways[i], at); at += every ? 1 : ways[i].step) n++;
        printf("%s: %llu times\n", ways[i].name, (unsigned long long)n);
        assert_true(n > 0);
    }
}

int main(void)
{
    choir_log_set_level((choir_log_level)-1);
    bad_disk_register();
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_each_call_fails)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
