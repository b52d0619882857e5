/* Files that are not what the journal has written: damaged ones are set aside, others' and newer
 * ones refused, rows that somebody has edited are skipped; whatever it is, nothing crashes and the
 * journal goes on. FAULTS 11. */
#include "tests/router/learn/journal_world.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N = 40 };

static void fill(world *w)
{
    char id[16];
    for (int i = 0; i < N; i++) {
        snprintf(id, sizeof id, "r%d", i);
        reply r = decide(w, id, "m", "t");
        assert_int_equal(r.status, CHOIR_OK);
        if (i % 4 == 0) thumb(w, id, "t", 1);
    }
}

/* Filled and closed. */
static void make_filled(world *w)
{
    make_world(w);
    fill(w);
    close_world(w);
}

static off_t size_of(const world *w, const char *name)
{
    char path[128];
    struct stat st;
    world_path(w, name, path);
    return stat(path, &st) == 0 ? st.st_size : -1;
}

static void overwrite(const world *w, const char *name, off_t offset, const void *data,
                      size_t bytes)
{
    char path[128];
    world_path(w, name, path);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, data, bytes, offset), bytes);
    close(fd);
}

static void cut_file(const world *w, const char *name, off_t bytes)
{
    char path[128];
    world_path(w, name, path);
    assert_int_equal(truncate(path, bytes), 0);
}

/* It is empty, works, and the damaged file lies beside it. */
static void assert_begun_anew(world *w)
{
    assert_int_equal(list_all(w, "m", "t")->n, 0);
    reply r = decide(w, "new", "m", "t");
    assert_int_equal(r.status, CHOIR_OK);
    assert_true(size_of(w, "journal.db.damaged-1") >= 0);
    choir_journal_stats s;
    choir_journal_get_stats(w->journal, &s);
    assert_true(s.healthy);
}

static void test_damaged_header(void **state)
{
    (void)state;
    world w;
    make_filled(&w);
    off_t bytes = size_of(&w, "journal.db");
    overwrite(&w, "journal.db", 0, "SQLitf", 6);
    open_world(&w);
    assert_begun_anew(&w);
    assert_int_equal(size_of(&w, "journal.db.damaged-1"), bytes); /* nothing of it is lost */
    close_world(&w);
    overwrite(&w, "journal.db", 0, "no database at all", 18);
    open_world(&w);
    assert_begun_anew(&w);
    assert_true(size_of(&w, "journal.db.damaged-2") > 0);
    end_world(&w);
}

/* The log tells what became of the file. */
static void test_log_line(void **state)
{
    (void)state;
    world w;
    char path[128], *said;
    size_t bytes;
    make_filled(&w);
    overwrite(&w, "journal.db", 0, "SQLitf", 6);
    world_path(&w, "log", path);
    int log = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600), before = dup(STDERR_FILENO);
    dup2(log, STDERR_FILENO);
    choir_log_set_level(CHOIR_LOG_ERROR);
    open_world(&w);
    choir_log_set_level((choir_log_level)-1);
    dup2(before, STDERR_FILENO);
    close(before);
    close(log);
    assert_int_equal(choir_file_read(path, 4096, &said, &bytes), CHOIR_OK);
    assert_non_null(strstr(said, "set aside as"));
    assert_non_null(strstr(said, "journal.db.damaged-1"));
    choir_free(said);
    end_world(&w);
}

/* The root of every table and index; and a file that ends in the middle. */
static void test_damaged_pages(void **state)
{
    (void)state;
    world w;
    make_filled(&w);
    off_t n_pages = size_of(&w, "journal.db") / 4096;
    end_world(&w);
    for (off_t page = 2; page < n_pages; page += 3) {
        make_filled(&w);
        overwrite(&w, "journal.db", page * 4096, "\x0D\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 8);
        open_world(&w);
        assert_begun_anew(&w);
        end_world(&w);
    }
    make_filled(&w);
    cut_file(&w, "journal.db", (n_pages - 3) * 4096);
    open_world(&w);
    assert_begun_anew(&w);
    end_world(&w);
}

/* Copies what a kill would leave: the file and its WAL, while the journal is open and idle. */
static void copy_open(const world *from, world *to)
{
    static const char *const names[] = {"journal.db", "journal.db-wal"};
    make_closed_world(to, NULL);
    for (int i = 0; i < 2; i++) {
        char path[128], *data;
        size_t bytes;
        world_path(from, names[i], path);
        assert_int_equal(choir_file_read(path, 64 << 20, &data, &bytes), CHOIR_OK);
        overwrite(to, names[i], 0, data, bytes);
        choir_free(data);
    }
}

/* A WAL that ends anywhere, or is wrong from somewhere on: the entries before that are there, and
 * no other. */
static void test_damaged_wal(void **state)
{
    (void)state;
    world w, copy;
    uint32_t random = 1, n_fewer = 0, n_before = 0;
    make_world(&w);
    fill(&w);
    off_t bytes = size_of(&w, "journal.db-wal");
    for (int i = 0; i <= 24; i++) {
        copy_open(&w, &copy);
        random = random * 1664525 + 1013904223;
        off_t at = i == 24 ? bytes : bytes * i / 24;
        cut_file(&copy, "journal.db-wal", at);
        open_world(&copy);
        const listing *l = list_all(&copy, "m", "t");
        assert_true(l->n >= n_before); /* the longer the WAL, the more there is */
        for (uint32_t k = 0; k < l->n; k++) assert_int_equal(l->at[k].sequence, k + 1);
        n_before = l->n;
        n_fewer += l->n < N + N / 4;
        assert_int_equal(size_of(&copy, "journal.db.damaged-1"), -1);
        end_world(&copy);
        copy_open(&w, &copy);
        overwrite(&copy, "journal.db-wal", (off_t)(random % (uint32_t)bytes), "\xFF\x00\xA5", 3);
        open_world(&copy);
        l = list_all(&copy, "m", "t");
        for (uint32_t k = 0; k < l->n; k++) assert_int_equal(l->at[k].sequence, k + 1);
        end_world(&copy);
    }
    assert_int_equal(n_before, N + N / 4);
    assert_true(n_fewer > 10);
    end_world(&w);
}

/* Any three bytes: it opens, and what it gives is what was put in, or nothing. */
static bool look(void *user, const choir_journal_entry *e)
{
    float sum = 0;
    for (uint32_t i = 0; i < e->decision.n_features; i++) sum += e->decision.features[i];
    assert_true(sum == sum && e->decision.chosen < e->decision.n_candidates);
    ++*(uint32_t *)user;
    return true;
}

static void test_random_damage(void **state)
{
    (void)state;
    world w;
    uint32_t random = 7, n_aside = 0, n = 0;
    make_filled(&w);
    char path[128], *data;
    size_t bytes;
    world_path(&w, "journal.db", path);
    assert_int_equal(choir_file_read(path, 64 << 20, &data, &bytes), CHOIR_OK);
    for (int round = 0; round < 150; round++) {
        world copy;
        uint64_t last;
        make_closed_world(&copy, NULL);
        overwrite(&copy, "journal.db", 0, data, bytes);
        for (int i = 0; i < 3; i++) {
            random = random * 1664525 + 1013904223;
            uint32_t at = i == 0 && round % 3 == 0 ? random % 4096 : random % (uint32_t)bytes;
            overwrite(&copy, "journal.db", (off_t)at, (uint8_t[]){(uint8_t)(random >> 24)}, 1);
        }
        choir_status status = choir_journal_open(copy.folder, &copy.options, &copy.journal);
        if (status == CHOIR_OK) {
            status = choir_journal_read(copy.journal, "m", "t", 0, 0, look, &n, &last);
            assert_true(status == CHOIR_OK || status == CHOIR_E_DATA_LOSS);
            reply r = decide(&copy, "next", "m", "t");
            (void)r;
        } else { /* a flipped schema number or application id reads as another program's */
            assert_int_equal(status, CHOIR_E_PRECONDITION);
            copy.journal = NULL;
        }
        n_aside += size_of(&copy, "journal.db.damaged-1") >= 0;
        end_world(&copy);
    }
    printf("%u of 150 were set aside, %u entries were read\n", n_aside, n);
    assert_true(n_aside > 0 && n > 0);
    choir_free(data);
    end_world(&w);
}

/* -- files that are whole, but not this program's -- */

static void assert_refused(world *w, const char *says)
{
    assert_int_equal(choir_journal_open(w->folder, &w->options, &w->journal), CHOIR_E_PRECONDITION);
    w->journal = NULL;
    if (strstr(choir_error_message(), says) == NULL) fail_msg("%s", choir_error_message());
    assert_int_equal(size_of(w, "journal.db.damaged-1"), -1);
}

static void test_newer_schema(void **state)
{
    (void)state;
    world w;
    make_filled(&w);
    edit(&w, "PRAGMA user_version = 2");
    assert_refused(&w, "has schema 2, and this choir knows none above 1");
    edit(&w, "PRAGMA user_version = 1");
    open_world(&w);
    assert_int_equal(list_all(&w, "m", "t")->n, N + N / 4);
    end_world(&w);
}

static void test_others_database(void **state)
{
    (void)state;
    world w;
    make_closed_world(&w, NULL);
    edit(&w, "CREATE TABLE theirs (a); INSERT INTO theirs VALUES (1)");
    assert_refused(&w, "not a journal of choir's");
    assert_int_equal(ask_number(&w, "SELECT a FROM theirs"), 1);
    end_world(&w);
    make_closed_world(&w, NULL);
    overwrite(&w, "journal.db", 0, "", 0); /* an empty file is one that was begun */
    open_world(&w);
    fill(&w);
    end_world(&w);
}

/* Tables that are not those that were made; and what would run by itself. */
static void test_edited_schema(void **state)
{
    (void)state;
    static const char *const edits[] = {
        "DROP TABLE candidates",
        "ALTER TABLE decisions RENAME COLUMN seed TO seeds",
        "ALTER TABLE feedback ADD COLUMN more",
        "DROP TABLE entries; CREATE VIEW entries AS SELECT 1 AS sequence, 1 AS scope",
    };
    world w;
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        make_filled(&w);
        edit(&w, edits[i]);
        open_world(&w);
        assert_begun_anew(&w);
        end_world(&w);
    }
    make_filled(&w);
    edit(&w, "CREATE TRIGGER bad AFTER INSERT ON entries BEGIN DELETE FROM decisions; END");
    open_world(&w);
    decide(&w, "new", "m", "t");
    assert_int_equal(list_all(&w, "m", "t")->n, N + N / 4 + 1);
    end_world(&w);
}

/* Each edit makes one decision, r0, none that Choir has written: it and its feedback are skipped,
 * or the feedback alone. */
static void test_edited_rows(void **state)
{
    (void)state;
    static const struct {
        const char *sql;
        uint32_t n_gone;
    } edits[] = {
        {"UPDATE decisions SET features = x'0102030405' WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET features = x'0000c07f' WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET features = zeroblob(388) WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET features = 'text' WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET features = 5 WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET chosen = 9223372036854775807 WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET chosen = -1 WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET chosen = 4294967296 WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET chosen = 7 WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET chosen = x'00' WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET explored = 2 WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET time_ms = 'then' WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET seed = 0.5 WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET routes = 17 WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET routes = zeroblob(16777217) WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET request_id = '' WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET request_id = printf('%.200c', 'x') WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET request_id = 'a' || char(0) || 'b' WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET request_id = CAST(x'ff' AS TEXT) WHERE request_id = 'r0'", 2},
        {"UPDATE decisions SET request_id = x'6162' WHERE request_id = 'r0'", 2},
        {"DELETE FROM decisions WHERE request_id = 'r0'", 2},
        {"DELETE FROM candidates WHERE decision = 1", 2},
        {"UPDATE candidates SET probability = 9e999 WHERE decision = 1", 2},
        {"UPDATE candidates SET probability = -0.5 WHERE decision = 1", 2},
        {"UPDATE candidates SET probability = 0 WHERE decision = 1", 2},
        {"UPDATE candidates SET probability = 'half' WHERE decision = 1", 2},
        {"UPDATE candidates SET name = printf('%.256c', 'x') WHERE decision = 1", 2},
        {"UPDATE candidates SET name = x'00' WHERE decision = 1", 2},
        {"UPDATE candidates SET position = position + 1000 WHERE decision = 1", 2},
        {"WITH RECURSIVE n(i) AS (SELECT 3 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) "
         "INSERT OR REPLACE INTO candidates SELECT 1, i, '', 0, 0.5 FROM n",
         2},
        {"UPDATE feedback SET signal = 99 WHERE decision = 1", 1},
        {"UPDATE feedback SET signal = -1 WHERE decision = 1", 1},
        {"UPDATE feedback SET signal = 3, text = NULL WHERE decision = 1", 1},
        {"UPDATE feedback SET signal = 3, text = printf('%.1048577c', 'x') WHERE decision = 1", 1},
        {"UPDATE feedback SET value = 0.5 WHERE decision = 1", 1},
        {"UPDATE feedback SET value = 'much' WHERE decision = 1", 1},
        {"UPDATE feedback SET decision = 77777 WHERE decision = 1", 1},
        {"UPDATE entries SET scope = 77 WHERE sequence = 2", 1},
    };
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        world w;
        uint64_t last;
        uint32_t n = 0;
        make_world(&w);
        for (int k = 0; k < 3; k++) {
            char id[8] = {'r', (char)('0' + k), 0};
            decide(&w, id, "m", "t");
            thumb(&w, id, "t", 1);
        }
        close_world(&w);
        edit(&w, edits[i].sql);
        open_world(&w);
        assert_int_equal(choir_journal_read(w.journal, "m", "t", 0, 0, look, &n, &last), CHOIR_OK);
        if (n != 6 - edits[i].n_gone) fail_msg("%s: %u entries", edits[i].sql, n);
        end_world(&w);
    }
}

static void test_edited_versions(void **state)
{
    (void)state;
    static const char *const edits[] = {
        "UPDATE versions SET state = 77",
        "UPDATE versions SET share = 9e999",
        "UPDATE versions SET digest = zeroblob(9)",
        "UPDATE versions SET digest = printf('%.40c', 'f')",
        "UPDATE versions SET evidence = printf('%.600c', 'x')",
    };
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        world w;
        choir_version_row row = {.state = CHOIR_VERSION_FROZEN};
        uint32_t n;
        make_world(&w);
        assert_int_equal(choir_journal_put_version(w.journal, "m", "t", &row), CHOIR_OK);
        close_world(&w);
        edit(&w, edits[i]);
        open_world(&w);
        assert_int_equal(choir_journal_versions(w.journal, "m", "t", &row, 1, &n), CHOIR_OK);
        assert_int_equal(n, 0);
        end_world(&w);
    }
}

/* -- while it runs -- */

/* A reader meets damage that came since: it says so, and the writer sets the file aside. */
static void test_damage_while_open(void **state)
{
    (void)state;
    world w;
    uint64_t last;
    uint32_t n = 0;
    uint8_t noise[4096];
    make_filled(&w);
    open_world(&w);
    memset(noise, 0xEE, sizeof noise);
    for (off_t page = 2; page < size_of(&w, "journal.db") / 4096; page++)
        overwrite(&w, "journal.db", page * 4096, noise, sizeof noise);
    assert_int_equal(choir_journal_read(w.journal, "m", "t", 0, 0, look, &n, &last),
                     CHOIR_E_DATA_LOSS);
    reply r = decide(&w, "r0", "m", "t"); /* behind the writer's look at it */
    assert_int_equal(r.status, CHOIR_OK);
    assert_int_equal(list_all(&w, "m", "t")->n, 1);
    assert_true(size_of(&w, "journal.db.damaged-1") > 0);
    end_world(&w);
}

static void test_deleted_while_open(void **state)
{
    (void)state;
    world w;
    char path[128];
    make_world(&w);
    decide(&w, "a", "m", "t");
    world_path(&w, "journal.db", path);
    assert_int_equal(unlink(path), 0);
    reply r = decide(&w, "b", "m", "t");
    assert_int_equal(r.status, CHOIR_OK);
    close_world(&w);
    open_world(&w);
    const listing *l = list_all(&w, "m", "t");
    assert_int_equal(l->n, 1);
    assert_string_equal(l->at[0].id, "b");
    end_world(&w);
}

int main(void)
{
    choir_log_set_level((choir_log_level)-1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_damaged_header),    cmocka_unit_test(test_log_line),
        cmocka_unit_test(test_damaged_pages),     cmocka_unit_test(test_damaged_wal),
        cmocka_unit_test(test_random_damage),     cmocka_unit_test(test_newer_schema),
        cmocka_unit_test(test_others_database),   cmocka_unit_test(test_edited_schema),
        cmocka_unit_test(test_edited_rows),       cmocka_unit_test(test_edited_versions),
        cmocka_unit_test(test_damage_while_open), cmocka_unit_test(test_deleted_while_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
