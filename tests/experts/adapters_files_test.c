/* The pool of adapters and what lies on disk: reads that fail, folders that are bad, change or
 * vanish, paths that lead out; the process is killed. FAULTS 2, 9, 28. */
#include "tests/experts/pool_world.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* FAULTS 2 and its like: two more tries; then it has failed, says why, and is tried again after a
 * while. */
static void test_unreadable(void **state)
{
    (void)state;
    world w;
    bool pinned;
    make_world(&w, 1024 * KB);
    add(&w, "a", 1);
    add(&w, "b", 2);
    w.disk.fail_reads = 2;
    choir_adapter_claim *a = claim(&w, "a", 0);
    work(&w);
    assert_true(pin(&w, a));
    choir_adapters_stats t;
    choir_adapters_get_stats(w.pool, &t);
    assert_int_equal(t.n_retries, 2);
    choir_adapter_claim *b = claim(&w, "b", 0);
    w.disk.fail_reads = 3;
    work(&w);
    assert_int_equal(choir_adapters_pin(w.pool, b, 1, &pinned), CHOIR_E_UNAVAILABLE);
    assert_false(pinned);
    says("adapter b cannot be read");
    assert_string_equal(info_of(&w, "b").state, "failed");
    assert_int_equal(info_of(&w, "b").failure, CHOIR_E_UNAVAILABLE);
    assert_holds(a, 1); /* others go on */
    release(&w, b);
    choir_adapter_claim c = {0};
    assert_int_equal(choir_adapters_claim(w.pool, "b", 0, &c, NULL), CHOIR_E_UNAVAILABLE);
    fake_now += 31 * CHOIR_SECOND;
    b = claim(&w, "b", 0);
    work(&w);
    assert_true(pin(&w, b));
    assert_holds(b, 2);
    release(&w, a);
    release(&w, b);
    end_world(&w);
}

/* A ring that takes nothing, with nothing under way: tried again as a failed read is, then told. */
static void test_a_disk_that_takes_no_reads(void **state)
{
    (void)state;
    world w;
    bool pinned;
    make_world(&w, 1024 * KB);
    add(&w, "a", 1);
    uint32_t depth = w.disk.depth;
    w.disk.depth = 0;
    choir_adapter_claim *a = claim(&w, "a", 0);
    work(&w);
    assert_int_equal(choir_adapters_pin(w.pool, a, 1, &pinned), CHOIR_E_UNAVAILABLE);
    says("adapter a cannot be read");
    release(&w, a);
    w.disk.depth = depth;
    fake_now += 31 * CHOIR_SECOND;
    a = claim(&w, "a", 0);
    work(&w);
    assert_true(pin(&w, a));
    assert_holds(a, 1);
    release(&w, a);
    end_world(&w);
}

/* What happens to a folder between registration and load: one sentence, and others go on. */
static void check_change(void (*change)(world *w), const char *sentence)
{
    world w;
    bool pinned;
    make_world(&w, 1024 * KB);
    add(&w, "a", 1);
    add(&w, "b", 2);
    change(&w);
    choir_adapter_claim *a = claim(&w, "a", 0), *b = claim(&w, "b", 1);
    work(&w);
    assert_int_equal(choir_adapters_pin(w.pool, a, 1, &pinned), CHOIR_E_PRECONDITION);
    says(sentence);
    assert_null(strstr(choir_error_message(), w.folder.path)); /* clients read it */
    assert_true(pin(&w, b));
    release(&w, a);
    release(&w, b);
    end_world(&w);
}

static void change_vanished(world *w)
{
    toy_remove(&w->folder, "a");
}
static void change_no_tensors(world *w)
{
    char path[256];
    snprintf(path, sizeof path, "%s/a/adapter_model.safetensors", w->folder.path);
    assert_int_equal(unlink(path), 0);
}
static int truncate_of(const world *w, const char *name, off_t bytes)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s/adapter_model.safetensors", w->folder.path, name);
    return truncate(path, bytes);
}
static void change_cut(world *w)
{
    assert_int_equal(truncate_of(w, "a", 5000), 0);
}

static void test_changes(void **state)
{
    (void)state;
    check_change(change_vanished, "its folder is not there");
    check_change(change_no_tensors, "has no adapter_model.safetensors");
    check_change(change_cut, "its tensors have 5000 bytes");
}

/* Other files lie there when it is read, or are put there meanwhile: it is what they are, as
 * another version. */
static void test_changes_under_the_reader(void **state)
{
    (void)state;
    world w;
    bool pinned;
    make_world(&w, 1024 * KB);
    choir_log_set_level(CHOIR_LOG_ERROR);
    add(&w, "a", 1);
    toy_spec spec = {.seed = 3, .bytes = 3 * SIZE}; /* it takes another room, too */
    toy_write(&w.folder, "a", &spec);
    choir_adapter_claim *a = claim(&w, "a", 0);
    work(&w);
    assert_true(pin(&w, a));
    assert_int_equal(choir_adapter_claim_digest(a), toy_digest(&spec));
    assert_int_equal(info_of(&w, "a").version, 2);
    release(&w, a);
    for (int cut = 0; cut < 2; cut++) {
        add(&w, "b", 2);
        a = claim(&w, "b", 0);
        w.disk.held = true;
        work(&w);
        if (cut) assert_int_equal(truncate_of(&w, "b", 5000), 0);
        spec = spec_of(4);
        if (!cut) toy_write(&w.folder, "b", &spec);
        w.disk.held = false;
        work(&w);
        choir_status status = choir_adapters_pin(w.pool, a, 1, &pinned);
        if (cut) assert_int_equal(status, CHOIR_E_PRECONDITION);
        if (cut) says("its tensors have 5000 bytes");
        if (!cut) assert_true(pinned);
        if (!cut) assert_holds(a, 2); /* what was opened is whole */
        release(&w, a);
    }
    /* Evicted, and others when it is read again, though nothing but the bytes tells. */
    add(&w, "c", 5);
    a = claim(&w, "c", 0);
    work(&w);
    assert_true(pin(&w, a));
    release(&w, a);
    choir_adapters_set_budget(w.pool, 0);
    work(&w);
    assert_int_equal(w.maker.n_live, 0);
    choir_adapters_set_budget(w.pool, 1024 * KB);
    uint64_t version = info_of(&w, "c").version;
    spec = spec_of(6);
    toy_write(&w.folder, "c", &spec);
    adapter_files files;
    assert_int_equal(files_open(w.pool, "c", "c", true, false, &files), CHOIR_OK);
    name_find(w.pool, "c")->current->tensors = files.tensors_mark;
    name_find(w.pool, "c")->current->config = files.config_mark;
    files_close(&files);
    a = claim(&w, "c", 0);
    work(&w);
    assert_true(pin(&w, a));
    assert_holds(a, 6);
    assert_true(info_of(&w, "c").version > version);
    release(&w, a);
    choir_log_set_level(CHOIR_LOG_INFO);
    end_world(&w);
}

static void register_a(world *w)
{
    choir_adapter_load what = place(w, "a");
    assert_int_equal(choir_adapters_register(w->pool, &what), CHOIR_OK);
}

static void register_other_a(world *w)
{
    toy_spec spec = spec_of(3);
    toy_write(&w->folder, "a", &spec);
    register_a(w);
}

/* While a load is under way, its name gets a version from the same files, or from yet others: the
 * load's answer is true of what the name has then. */
static void test_changes_under_a_load(void **state)
{
    (void)state;
    world w;
    choir_adapter_info info;
    make_world(&w, 1024 * KB);
    choir_log_set_level(CHOIR_LOG_ERROR);
    add(&w, "a", 1);
    toy_spec spec = spec_of(2);
    toy_write(&w.folder, "a", &spec);
    choir_adapter_load what = place(&w, "a");
    what.keep = true;
    before_making(register_a);
    assert_int_equal(choir_adapters_load(w.pool, &what, &info), CHOIR_OK);
    assert_true(info.resident && info.kept && info.digest == digest_of_seed(2));
    uint64_t version = info.version;
    assert_true(version > 3); /* registered twice, loaded once */
    spec = spec_of(5);
    toy_write(&w.folder, "a", &spec);
    before_making(register_other_a);
    assert_int_equal(choir_adapters_load(w.pool, &what, &info), CHOIR_E_PRECONDITION);
    says("adapter a: its files have changed while it was loaded");
    assert_true(info_of(&w, "a").version > version);
    choir_adapter_claim *a = claim(&w, "a", 0);
    work(&w);
    assert_true(pin(&w, a));
    assert_holds(a, 3);
    release(&w, a);
    /* A load that fails leaves its name's version as it was, also if that has other files now. */
    what.path = what.name = "a";
    what.beneath = true;
    assert_int_equal(choir_adapters_load(w.pool, &what, &info), CHOIR_OK);
    assert_true(info.kept && info.digest == digest_of_seed(3));
    spec = (toy_spec){.seed = 6, .bytes = SIZE, .spoiled = true};
    toy_write(&w.folder, "a", &spec);
    assert_int_equal(choir_adapters_load(w.pool, &what, &info), CHOIR_E_PRECONDITION);
    assert_true(info_of(&w, "a").kept && info_of(&w, "a").digest == digest_of_seed(3));
    choir_log_set_level(CHOIR_LOG_INFO);
    end_world(&w);
}

/* Unloaded and loaded again, other weights, while somebody waits: he gets what the name has now. */
static void test_waiting_through_an_unload(void **state)
{
    (void)state;
    world w;
    make_world(&w, 1024 * KB);
    add(&w, "a", 1);
    choir_adapter_claim *a = claim(&w, "a", 0), *b = claim(&w, "a", 0);
    assert_int_equal(choir_adapters_unload(w.pool, "a"), CHOIR_OK);
    work(&w);
    assert_true(pin(&w, a)); /* it can still be had */
    assert_holds(a, 1);
    toy_spec spec = spec_of(2);
    toy_write(&w.folder, "a", &spec);
    choir_adapter_load what = place(&w, "a");
    assert_int_equal(choir_adapters_load(w.pool, &what, NULL), CHOIR_OK);
    assert_true(pin(&w, b));
    assert_holds(a, 1);
    assert_holds(b, 2);
    release(&w, a);
    release(&w, b);
    end_world(&w);
}

static void put(const world *w, const char *file, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", w->folder.path, file);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* What is refused at once, by headers or by what lies there. */
static void test_refusals(void **state)
{
    (void)state;
    world w;
    char path[256];
    make_world(&w, 1024 * KB);
    toy_spec spec = spec_of(1);
    static const char *const names[] = {"config", "tensors", "pickle", "header", "folder"};
    for (int i = 0; i < 5; i++) toy_write(&w.folder, names[i], &spec);
    put(&w, "config/adapter_config.json", "{}");
    put(&w, "tensors/adapter_model.safetensors", "abc");
    snprintf(path, sizeof path, "%s/pickle/adapter_model.safetensors", w.folder.path);
    unlink(path);
    put(&w, "pickle/adapter_model.bin", "cos\nsystem\n");
    put(&w, "header/adapter_model.safetensors", "\377\377\377\377\377\377\377\377 and more");
    snprintf(path, sizeof path, "%s/folder/adapter_config.json", w.folder.path);
    unlink(path);
    mkdir(path, 0777);
    put(&w, "a.gguf", "GGUF");
    put(&w, "README.md", "none");
#define REFUSED(which, expected, sentence)                                                         \
    do {                                                                                           \
        choir_adapter_load what = place(&w, which);                                                \
        assert_int_equal(choir_adapters_register(w.pool, &what), expected);                        \
        says(sentence);                                                                            \
        assert_int_equal(choir_adapters_load(w.pool, &what, NULL), expected);                      \
        says(sentence);                                                                            \
        says(which);                                                                               \
    } while (0)
    REFUSED("config", CHOIR_E_PRECONDITION, "malformed");
    REFUSED("tensors", CHOIR_E_PRECONDITION, "cut");
    REFUSED("pickle", CHOIR_E_PRECONDITION, "adapter_model.bin alone, a pickle");
    REFUSED("header", CHOIR_E_PRECONDITION, "header");
    REFUSED("folder", CHOIR_E_PRECONDITION, "no regular file");
    REFUSED("a.gguf", CHOIR_E_PRECONDITION, "no GGUF");
    REFUSED("nothing", CHOIR_E_PRECONDITION, "its folder is not there");
    add(&w, "good", 1);
    mkdir("/tmp/toy_adapters_empty", 0777);
    uint32_t n_good, n_bad;
    choir_log_set_level(CHOIR_LOG_ERROR);
    assert_int_equal(choir_adapters_register_folder(w.pool, w.folder.path, &n_good, &n_bad),
                     CHOIR_OK);
    choir_log_set_level(CHOIR_LOG_INFO);
    assert_int_equal(n_good, 1);
    assert_int_equal(n_bad, 6);
    snprintf(path, sizeof path, "%s/good", w.folder.path);
    assert_int_equal(choir_adapters_register_folder(w.pool, path, &n_good, &n_bad),
                     CHOIR_E_INVALID);
    says("an adapter itself");
    assert_int_equal(choir_adapters_register_folder(w.pool, "/nonexistent", &n_good, &n_bad),
                     CHOIR_E_IO);
    rmdir("/tmp/toy_adapters_empty");
    end_world(&w);
}

static void test_folder_within_a_folder(void **state)
{
    (void)state;
    world w;
    make_world(&w, 1024 * KB);
    toy_spec spec = spec_of(1);
    toy_write(&w.folder, "org/one", &spec);
    toy_write(&w.folder, "org/two", &spec);
    toy_write(&w.folder, "three", &spec);
    toy_write(&w.folder, "three/inner", &spec); /* a part of three */
    uint32_t n_good, n_bad;
    assert_int_equal(choir_adapters_register_folder(w.pool, w.folder.path, &n_good, &n_bad),
                     CHOIR_OK);
    assert_int_equal(n_good, 3);
    assert_int_equal(n_bad, 0);
    assert_int_equal(info_of(&w, "org/one").file_bytes, SIZE + 24);
    info_of(&w, "org/two");
    info_of(&w, "three");
    end_world(&w);
}

/* Clients' paths lead nowhere but beneath the folder, with openat2() and without. */
static void test_beneath(void **state)
{
    (void)state;
    world w;
    char outside[128], path[256];
    make_world(&w, 1024 * KB);
    toy_spec spec = spec_of(1);
    toy_write(&w.folder, "in/side", &spec);
    toy_folder other;
    toy_folder_create(&other);
    toy_write(&other, "x", &spec);
    snprintf(outside, sizeof outside, "../%s/x", strrchr(other.path, '/') + 1);
    snprintf(path, sizeof path, "%s/link", w.folder.path);
    assert_int_equal(symlink(other.path, path), 0);
    snprintf(path, sizeof path, "%s/x", other.path);
    const char *const bad[] = {path, outside, "in/../../x", "in/side/..", "link/x", "..", "/"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        choir_adapter_load what = {.name = "a", .path = bad[i], .beneath = true};
        assert_int_equal(choir_adapters_register(w.pool, &what), CHOIR_E_INVALID);
        says("leads out of");
    }
    choir_adapter_load what = {.name = "a", .path = "in/side", .beneath = true};
    assert_int_equal(choir_adapters_register(w.pool, &what), CHOIR_OK);
    choir_adapter_claim *a = claim(&w, "a", 0);
    work(&w);
    assert_true(pin(&w, a));
    release(&w, a);
    int at = open(w.folder.path, O_PATH | O_DIRECTORY);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_true(open_by_steps(at, bad[i], O_RDONLY) < 0);
    int fd = open_by_steps(at, "in/side/adapter_config.json", O_RDONLY);
    assert_true(fd >= 0);
    close(fd);
    fd = open_by_steps(at, "in//side/", O_PATH);
    assert_true(fd >= 0);
    close(fd);
    assert_true(open_by_steps(at, "in/side/none", O_RDONLY) < 0 && errno == ENOENT);
    close(at);
    toy_folder_destroy(&other);
    end_world(&w);
}

/* FAULTS 9: killed at any moment of registering, loading and unloading, the folder is what it was,
 * and the next process finds everything there. */
static void run_until_killed(const char *folder)
{
    toy_maker maker = {0};
    choir_adapters_options o = toy_options(&maker, NULL, 1024 * KB);
    choir_adapters *pool;
    uint32_t n_good, n_bad;
    o.folder = folder;
    if (choir_adapters_create(&o, &pool) != CHOIR_OK) _exit(1);
    for (;;) {
        if (choir_adapters_register_folder(pool, folder, &n_good, &n_bad) != CHOIR_OK) _exit(2);
        for (int i = 0; i < 4; i++) {
            char name[2] = {(char)('a' + i), 0};
            const choir_adapter_load what = {.name = name, .path = name, .beneath = true};
            if (choir_adapters_load(pool, &what, NULL) != CHOIR_OK) _exit(3);
        }
        if (choir_adapters_unload(pool, "b") != CHOIR_OK) _exit(4);
    }
}

static void test_killed(void **state)
{
    (void)state;
    world w;
    make_world(&w, 1024 * KB);
    choir_clock_replace(NULL, NULL);
    for (int i = 0; i < 4; i++) {
        toy_spec spec = spec_of((uint64_t)i);
        toy_write(&w.folder, (char[]){(char)('a' + i), 0}, &spec);
    }
    for (int round = 0; round < 20; round++) {
        pid_t child = fork();
        if (child == 0) run_until_killed(w.folder.path);
        usleep(500 * (useconds_t)(1 + round));
        kill(child, SIGKILL);
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        choir_adapters_destroy(w.pool);
        open_pool(&w, 1024 * KB);
        uint32_t n_good, n_bad;
        assert_int_equal(choir_adapters_register_folder(w.pool, w.folder.path, &n_good, &n_bad),
                         CHOIR_OK);
        assert_true(n_good == 4 && n_bad == 0);
        for (int i = 0; i < 4; i++) {
            choir_adapter_claim *c = claim(&w, (char[]){(char)('a' + i), 0}, 0);
            work(&w);
            assert_true(pin(&w, c));
            assert_holds(c, (uint64_t)i);
            release(&w, c);
        }
    }
    end_world(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unreadable),
        cmocka_unit_test(test_a_disk_that_takes_no_reads),
        cmocka_unit_test(test_changes),
        cmocka_unit_test(test_changes_under_the_reader),
        cmocka_unit_test(test_changes_under_a_load),
        cmocka_unit_test(test_waiting_through_an_unload),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_folder_within_a_folder),
        cmocka_unit_test(test_beneath),
        cmocka_unit_test(test_killed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
