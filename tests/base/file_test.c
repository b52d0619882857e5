#include "base/file.h"

#include "tests/base/test.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[] = "/tmp/choir-file-XXXXXX";

static const char *in_folder(const char *name)
{
    static char path[4][256];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static int n_entries(void)
{
    DIR *d = opendir(folder);
    int n = 0;
    while (readdir(d) != NULL) n++;
    closedir(d);
    return n - 2;
}

static void save_text(const char *path, const char *text)
{
    choir_save save;
    assert_int_equal(choir_save_begin(path, &save), CHOIR_OK);
    assert_int_equal(choir_save_write(&save, text, strlen(text)), CHOIR_OK);
    assert_int_equal(choir_save_commit(&save), CHOIR_OK);
}

static void test_save_and_read_back(void **state)
{
    (void)state;
    const char *path = in_folder("a");
    char *text;
    size_t bytes;
    save_text(path, "first");
    save_text(path, "second");
    assert_int_equal(choir_file_read(path, 100, &text, &bytes), CHOIR_OK);
    assert_string_equal(text, "second");
    assert_int_equal(bytes, 6);
    choir_free(text);
    assert_int_equal(n_entries(), 1);
    assert_int_equal(choir_file_read(path, 5, &text, &bytes), CHOIR_E_INVALID);
    ASSERT_SAYS("has 6 bytes, the limit is 5");
    choir_map map;
    assert_int_equal(choir_map_open(path, &map), CHOIR_OK);
    assert_int_equal(map.bytes, 6);
    assert_memory_equal(map.data, "second", 6);
    choir_map_close(&map);
    unlink(path);
}

static void test_abandoned_save_leaves_the_old_file(void **state)
{
    (void)state;
    const char *path = in_folder("b");
    choir_save save;
    char *text;
    size_t bytes;
    save_text(path, "old");
    assert_int_equal(choir_save_begin(path, &save), CHOIR_OK);
    assert_int_equal(choir_save_write(&save, "new", 3), CHOIR_OK);
    choir_save_abandon(&save);
    assert_int_equal(choir_file_read(path, 100, &text, &bytes), CHOIR_OK);
    assert_string_equal(text, "old");
    choir_free(text);
    assert_int_equal(n_entries(), 1);
    unlink(path);
}

static void test_what_is_no_file(void **state)
{
    (void)state;
    choir_map map;
    char *text;
    size_t bytes;
    assert_int_equal(choir_map_open(in_folder("none"), &map), CHOIR_E_NOT_FOUND);
    ASSERT_SAYS("none");
    assert_int_equal(choir_map_open(folder, &map), CHOIR_E_INVALID);
    ASSERT_SAYS("not a regular file");
    /* A FIFO without a writer must not hang. */
    assert_int_equal(mkfifo(in_folder("fifo"), 0600), 0);
    assert_int_equal(choir_file_read(in_folder("fifo"), 10, &text, &bytes), CHOIR_E_INVALID);
    unlink(in_folder("fifo"));
    assert_false(choir_file_exists(folder));
    assert_true(choir_folder_exists(folder));
    save_text(in_folder("empty"), "");
    assert_int_equal(choir_map_open(in_folder("empty"), &map), CHOIR_OK);
    assert_int_equal(map.bytes, 0);
    choir_map_close(&map);
    unlink(in_folder("empty"));
}

static void test_a_full_disk_is_told(void **state)
{
    (void)state;
    choir_save save;
    assert_int_equal(choir_save_begin(in_folder("full"), &save), CHOIR_OK);
    int real = save.fd;
    FILE *full = fopen("/dev/full", "w");
    if (full == NULL) {
        choir_save_abandon(&save);
        skip();
    }
    save.fd = fileno(full);
    assert_int_equal(choir_save_write(&save, "text", 4), CHOIR_E_IO);
    ASSERT_SAYS("No space left");
    save.fd = real;
    choir_save_abandon(&save);
    fclose(full);
    assert_int_equal(n_entries(), 0);
    assert_int_equal(choir_save_begin("/nowhere/at/all", &save), CHOIR_E_IO);
}

static void test_folders_with_parents(void **state)
{
    (void)state;
    assert_int_equal(choir_folder_make(in_folder("x/y/z")), CHOIR_OK);
    assert_int_equal(choir_folder_make(in_folder("x/y/z")), CHOIR_OK);
    assert_true(choir_folder_exists(in_folder("x/y/z")));
    rmdir(in_folder("x/y/z"));
    rmdir(in_folder("x/y"));
    rmdir(in_folder("x"));
    save_text(in_folder("file"), "");
    assert_int_equal(choir_folder_make(in_folder("file/below")), CHOIR_E_IO);
    unlink(in_folder("file"));
    assert_int_equal(choir_folder_make(""), CHOIR_E_INVALID);
}

static void test_reading_without_memory(void **state)
{
    (void)state;
    char *text;
    size_t bytes;
    save_text(in_folder("m"), "text");
    choir_memory_fail_at(1);
    assert_int_equal(choir_file_read(in_folder("m"), 100, &text, &bytes), CHOIR_E_NO_MEMORY);
    choir_memory_fail_at(0);
    unlink(in_folder("m"));
}

/* Two ends of a file, the last first, and what was begun before goes on behind its own. */
static void test_writes_at_their_places(void **state)
{
    (void)state;
    choir_save save;
    char *text;
    size_t bytes;
    assert_int_equal(choir_save_begin(in_folder("places"), &save), CHOIR_OK);
    assert_int_equal(choir_save_write(&save, "head", 4), CHOIR_OK);
    assert_int_equal(choir_save_write_at(&save, 9, "end", 3), CHOIR_OK);
    assert_int_equal(choir_save_write_at(&save, 6, "mid", 3), CHOIR_OK);
    assert_int_equal(choir_save_write(&save, "er", 2), CHOIR_OK);
    assert_int_equal(choir_save_commit(&save), CHOIR_OK);
    assert_int_equal(choir_file_read(in_folder("places"), 100, &text, &bytes), CHOIR_OK);
    assert_int_equal(bytes, 12);
    assert_string_equal(text, "headermidend");
    choir_free(text);
    unlink(in_folder("places"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_save_and_read_back),
        cmocka_unit_test(test_abandoned_save_leaves_the_old_file),
        cmocka_unit_test(test_what_is_no_file),
        cmocka_unit_test(test_a_full_disk_is_told),
        cmocka_unit_test(test_folders_with_parents),
        cmocka_unit_test(test_reading_without_memory),
        cmocka_unit_test(test_writes_at_their_places),
    };
    if (mkdtemp(folder) == NULL) return 1;
    int code = cmocka_run_group_tests(tests, NULL, NULL);
    rmdir(folder);
    return code;
}
