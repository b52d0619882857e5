/* The pool of adapters, its loader run by hand over real folders: who is read, who goes, who waits;
 * versions under one name; folders that are bad, change or vanish; the i-th allocation fails; the
 * process is killed. FAULTS 2, 9, 28, 29. */
#include "experts/adapter_pool.h"
#include "tests/support/toy_adapters.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { KB = 1024, SIZE = 100 * KB };

static uint64_t fake_now;

static uint64_t read_clock(void *user)
{
    (void)user;
    return fake_now;
}

typedef struct world {
    toy_folder folder;
    toy_maker maker;
    toy_disk disk;
    choir_adapters *pool;
} world;

static void open_pool(world *w, uint64_t budget)
{
    toy_disk_create(&w->disk, 1);
    choir_adapters_options o = toy_options(&w->maker, &w->disk, budget);
    o.folder = w->folder.path;
    assert_int_equal(choir_adapters_create(&o, &w->pool), CHOIR_OK);
}

static void make_world(world *w, uint64_t budget)
{
    fake_now = 1000 * CHOIR_SECOND;
    choir_clock_replace(read_clock, NULL);
    *w = (world){0};
    toy_folder_create(&w->folder);
    open_pool(w, budget);
}

static void assert_idle(const world *w)
{
    choir_adapters_stats t;
    choir_adapters_get_stats(w->pool, &t);
    assert_int_equal(t.n_pins, 0);
    assert_int_equal(t.n_claims, 0);
    assert_int_equal(t.n_loading, 0);
    assert_int_equal(t.held_bytes, w->maker.live_bytes);
    assert_true(t.held_bytes <= t.budget_bytes);
}

static void end_world(world *w)
{
    while (choir_adapters_work(w->pool))
        ;
    assert_idle(w);
    choir_adapters_destroy(w->pool);
    assert_true(w->disk.closed);
    assert_int_equal(w->maker.n_live, 0);
    toy_folder_destroy(&w->folder);
    choir_clock_replace(NULL, NULL);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_ADAPTERS), 0);
}

static toy_spec spec_of(uint64_t seed)
{
    return (toy_spec){.seed = seed, .bytes = SIZE};
}

static choir_adapter_load place(const world *w, const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", w->folder.path, name);
    return (choir_adapter_load){.name = name, .path = path};
}

static void add(world *w, const char *name, uint64_t seed)
{
    toy_spec spec = spec_of(seed);
    toy_write(&w->folder, name, &spec);
    choir_adapter_load what = place(w, name);
    if (choir_adapters_register(w->pool, &what) != CHOIR_OK) fail_msg("%s", choir_error_message());
}

static void work(world *w)
{
    for (int i = 0; i < 20; i++) choir_adapters_work(w->pool);
}

static choir_adapter_claim *claim(world *w, const char *name, int64_t urgency)
{
    choir_adapter_claim *c = calloc(1, sizeof *c);
    if (choir_adapters_claim(w->pool, name, urgency, c, NULL) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return c;
}

static bool pin(world *w, choir_adapter_claim *c)
{
    bool pinned;
    if (choir_adapters_pin(w->pool, c, 1, &pinned) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    return pinned;
}

static void release(world *w, choir_adapter_claim *c)
{
    choir_adapters_release(w->pool, c, 1);
    choir_adapters_release(w->pool, c, 1);
    free(c);
}

static uint64_t digest_of_seed(uint64_t seed)
{
    toy_spec spec = spec_of(seed);
    return toy_digest(&spec);
}

/* What runs with the claim is what the seed says. */
static void assert_holds(const choir_adapter_claim *c, uint64_t seed)
{
    const toy_adapter *a = choir_adapter_claim_adapter(c);
    assert_int_equal(a->digest, digest_of_seed(seed));
    assert_int_equal(choir_adapter_claim_digest(c), a->digest);
}

static choir_adapter_info info_of(world *w, const char *name)
{
    choir_adapter_info info;
    assert_int_equal(choir_adapters_find(w->pool, name, &info), CHOIR_OK);
    return info;
}

static void says(const char *part)
{
    if (strstr(choir_error_message(), part) == NULL)
        fail_msg("'%s' does not say '%s'", choir_error_message(), part);
}

static void test_names(void **state)
{
    (void)state;
    static const char *const good[] = {"a", "Python-v2.1", "org/name", "_x", "a:b@c+d", "9"};
    static const char *const bad[] = {"",     ".",   "..",   "../x", "a/../b", "/etc",
                                      "a//b", "a/",  "a b",  "a\nb", "-a",     "\xC3\xA9",
                                      "a\\b", "a;b", "a..b", "~x",   "%2e",    "a*"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_int_equal(choir_adapters_check_name(good[i]), CHOIR_OK);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(choir_adapters_check_name(bad[i]), CHOIR_E_INVALID);
    char longest[CHOIR_ADAPTER_MAX_NAME + 2];
    memset(longest, 'x', sizeof longest);
    longest[CHOIR_ADAPTER_MAX_NAME + 1] = 0;
    assert_int_equal(choir_adapters_check_name(longest), CHOIR_E_INVALID);
    says("256");
    longest[CHOIR_ADAPTER_MAX_NAME] = 0;
    assert_int_equal(choir_adapters_check_name(longest), CHOIR_OK);
}

/* Registering reads headers alone; a claim brings it; nobody waits for the disk meanwhile. */
static void test_claim_and_pin(void **state)
{
    (void)state;
    world w;
    make_world(&w, 1024 * KB);
    add(&w, "a", 1);
    add(&w, "b", 2);
    work(&w);
    assert_int_equal(w.maker.n_made, 0);
    choir_adapter_claim none = {0};
    assert_int_equal(choir_adapters_claim(w.pool, "c", 0, &none, NULL), CHOIR_E_NOT_FOUND);
    says("no adapter c");
    choir_adapter_claim *a = claim(&w, "a", 0);
    assert_false(pin(&w, a));
    w.disk.held = true;
    work(&w);
    assert_false(pin(&w, a));
    assert_string_equal(info_of(&w, "a").state, "loading");
    w.disk.held = false;
    work(&w);
    assert_true(pin(&w, a));
    assert_holds(a, 1);
    assert_int_equal(w.maker.n_made, 1);
    choir_adapter_info info = info_of(&w, "a");
    assert_true(info.resident && info.n_pins == 1 && info.n_requests == 1 && info.n_loads == 1);
    assert_int_equal(info.bytes, SIZE);
    assert_int_equal(info_of(&w, "b").digest, 0);
    release(&w, a);
    a = claim(&w, "a", 0); /* it is there at once */
    assert_true(pin(&w, a));
    release(&w, a);
    end_world(&w);
}

/* Room for three, and for what loading a fourth takes. */
static void test_lru_and_pins(void **state)
{
    (void)state;
    world w;
    make_world(&w, 5 * SIZE);
    char name[2] = "a";
    for (int i = 0; i < 6; i++, name[0]++) add(&w, name, (uint64_t)i);
    choir_adapter_claim *c[3];
    for (int i = 0; i < 3; i++) {
        name[0] = (char)('a' + i);
        c[i] = claim(&w, name, 0);
        work(&w);
        assert_true(pin(&w, c[i]));
    }
    release(&w, c[1]);
    release(&w, c[0]);
    choir_adapter_claim *d = claim(&w, "d", 0);
    work(&w);
    assert_true(pin(&w, d)); /* b was let go first */
    assert_false(info_of(&w, "b").resident);
    assert_int_equal(info_of(&w, "b").n_evictions, 1);
    assert_true(info_of(&w, "a").resident && info_of(&w, "c").resident);
    choir_adapter_claim *e = claim(&w, "e", 0);
    work(&w);
    assert_true(pin(&w, e));
    assert_false(info_of(&w, "a").resident);
    choir_adapter_claim *f = claim(&w, "f", 0);
    work(&w);
    assert_false(pin(&w, f)); /* c, d and e are pinned */
    assert_true(info_of(&w, "c").resident);
    release(&w, c[2]);
    work(&w);
    assert_true(pin(&w, f));
    assert_true(w.maker.most_live_bytes <= 5 * SIZE);
    release(&w, d);
    release(&w, e);
    release(&w, f);
    end_world(&w);
}

/* 1,000 on disk, eight in memory, wanted as a city's words are. */
static void test_a_thousand(void **state)
{
    (void)state;
    world w;
    uint64_t random = 7;
    make_world(&w, 8 * 2 * KB + 8 * KB);
    char name[16];
    for (uint32_t i = 0; i < 1000; i++) {
        toy_spec spec = {.seed = i, .bytes = 2 * KB};
        snprintf(name, sizeof name, "a%u", i);
        toy_write(&w.folder, name, &spec);
    }
    uint32_t n_good, n_bad;
    assert_int_equal(choir_adapters_register_folder(w.pool, w.folder.path, &n_good, &n_bad),
                     CHOIR_OK);
    assert_int_equal(n_good, 1000);
    assert_int_equal(n_bad, 0);
    static choir_adapter_info list[1000];
    assert_int_equal(choir_adapters_list(w.pool, "", list, 1000), 1000);
    for (int i = 1; i < 1000; i++) assert_true(strcmp(list[i - 1].name, list[i].name) < 0);
    for (int round = 0; round < 3000; round++) {
        random = random * UINT64_C(6364136223846793005) + 1;
        double u = (double)(random >> 11) / (double)(UINT64_C(1) << 53);
        uint32_t i = (uint32_t)(1000 * u * u * u * u); /* few are wanted most of the time */
        snprintf(name, sizeof name, "a%u", i);
        choir_adapter_claim *c = claim(&w, name, round);
        for (int turn = 0; !pin(&w, c); turn++) {
            assert_true(turn < 100);
            choir_adapters_work(w.pool);
        }
        toy_spec spec = {.seed = i, .bytes = 2 * KB};
        assert_int_equal(choir_adapter_claim_digest(c), toy_digest(&spec));
        release(&w, c);
    }
    choir_adapters_stats t;
    choir_adapters_get_stats(w.pool, &t);
    assert_true(t.n_loads < 2900 && t.n_loads > 300);
    assert_int_equal(t.n_requests, 3000);
    assert_int_equal(t.n_loads, w.maker.n_made);
    assert_true(w.maker.most_live_bytes <= 8 * 2 * KB + 8 * KB);
    end_world(&w);
}

/* The more urgent goes first, takes what the less urgent has not pinned, and is not overtaken. */
static void test_urgency(void **state)
{
    (void)state;
    world w;
    make_world(&w, 3 * SIZE + 16 * KB); /* two, or one and a load */
    for (int i = 0; i < 4; i++) add(&w, (char[]){(char)('a' + i), 0}, (uint64_t)i);
    choir_adapter_claim *a = claim(&w, "a", 3), *b = claim(&w, "b", 2), *c = claim(&w, "c", 1);
    work(&w);
    assert_true(info_of(&w, "c").resident && info_of(&w, "b").resident);
    assert_false(info_of(&w, "a").resident);
    choir_adapter_claim *d = claim(&w, "d", 0);
    work(&w);
    assert_true(info_of(&w, "d").resident && info_of(&w, "c").resident);
    assert_false(info_of(&w, "b").resident);
    assert_true(pin(&w, d) && pin(&w, c));
    work(&w);
    /* b finds no room, so nobody behind it gets a pin, even of what is there. */
    choir_adapter_claim *late = claim(&w, "d", 5), *early = claim(&w, "d", -1);
    assert_false(pin(&w, late));
    assert_true(pin(&w, early));
    release(&w, early);
    release(&w, d);
    assert_false(pin(&w, late));
    work(&w);
    assert_true(pin(&w, b));
    release(&w, b);
    release(&w, c);
    work(&w);
    assert_true(pin(&w, a));
    release(&w, a);
    work(&w);
    assert_true(pin(&w, late));
    release(&w, late);
    end_world(&w);
}

/* Two mixes that each need both halves of the room: all or none, so that none waits for the other's
 * half. */
static void test_mixes_do_not_lock_each_other(void **state)
{
    (void)state;
    world w;
    make_world(&w, 3 * SIZE + 16 * KB);
    for (int i = 0; i < 4; i++) add(&w, (char[]){(char)('a' + i), 0}, (uint64_t)i);
    choir_adapter_claim x[2] = {0}, y[2] = {0};
    bool pinned;
    assert_int_equal(choir_adapters_claim(w.pool, "a", 0, &x[0], NULL), CHOIR_OK);
    assert_int_equal(choir_adapters_claim(w.pool, "c", 1, &y[0], NULL), CHOIR_OK);
    work(&w);
    assert_int_equal(choir_adapters_claim(w.pool, "b", 0, &x[1], NULL), CHOIR_OK);
    assert_int_equal(choir_adapters_claim(w.pool, "d", 1, &y[1], NULL), CHOIR_OK);
    work(&w);
    assert_int_equal(choir_adapters_pin(w.pool, y, 2, &pinned), CHOIR_OK);
    assert_false(pinned);
    assert_int_equal(choir_adapters_pin(w.pool, x, 2, &pinned), CHOIR_OK);
    assert_true(pinned);
    choir_adapters_release(w.pool, x, 2);
    work(&w);
    assert_int_equal(choir_adapters_pin(w.pool, y, 2, &pinned), CHOIR_OK);
    assert_true(pinned);
    choir_adapters_release(w.pool, y, 2);
    /* Three together can never be there. */
    choir_adapter_claim z[3] = {0};
    for (int i = 0; i < 3; i++)
        assert_int_equal(choir_adapters_claim(w.pool, (char[]){(char)('a' + i), 0}, 0, &z[i], NULL),
                         CHOIR_OK);
    assert_int_equal(choir_adapters_pin(w.pool, z, 3, &pinned), CHOIR_E_FULL);
    says("a mix of 3 adapters takes");
    choir_adapters_release(w.pool, z, 3);
    end_world(&w);
}

static void test_too_large(void **state)
{
    (void)state;
    world w;
    make_world(&w, SIZE + 50 * KB);
    toy_spec spec = spec_of(1);
    toy_write(&w.folder, "a", &spec);
    choir_adapter_load what = place(&w, "a");
    assert_int_equal(choir_adapters_register(w.pool, &what), CHOIR_OK);
    choir_adapter_claim c = {0};
    assert_int_equal(choir_adapters_claim(w.pool, "a", 0, &c, NULL), CHOIR_E_FULL);
    says("adapter a takes 20"); /* itself, and its file */
    assert_int_equal(choir_adapters_load(w.pool, &what, NULL), CHOIR_E_FULL);
    end_world(&w);
}

/* Running requests keep what they began with; those that wait get the newest. */
static void test_versions(void **state)
{
    (void)state;
    world w;
    make_world(&w, 1024 * KB);
    add(&w, "a", 1);
    choir_adapter_claim *runs = claim(&w, "a", 0), *waits = claim(&w, "a", 1);
    work(&w);
    assert_true(pin(&w, runs));
    add(&w, "a", 2); /* its files were replaced, and it is registered again */
    assert_true(info_of(&w, "a").version == 2 && info_of(&w, "a").n_pins == 0);
    assert_false(pin(&w, waits));
    work(&w);
    assert_true(pin(&w, waits));
    assert_holds(runs, 1);
    assert_holds(waits, 2);
    assert_int_equal(w.maker.n_live, 2);
    /* Loaded anew while both run: a third. */
    toy_spec spec = spec_of(3);
    toy_write(&w.folder, "a", &spec);
    choir_adapter_load what = place(&w, "a");
    choir_adapter_info info;
    assert_int_equal(choir_adapters_load(w.pool, &what, &info), CHOIR_OK);
    assert_true(info.version == 3 && info.resident && info.digest == digest_of_seed(3));
    assert_int_equal(w.maker.n_live, 3);
    assert_holds(runs, 1);
    release(&w, runs);
    work(&w);
    assert_int_equal(w.maker.n_live, 2);
    /* The name goes; who runs keeps it. */
    assert_int_equal(choir_adapters_unload(w.pool, "a"), CHOIR_OK);
    assert_int_equal(choir_adapters_unload(w.pool, "a"), CHOIR_E_NOT_FOUND);
    assert_holds(waits, 2);
    work(&w);
    assert_int_equal(w.maker.n_live, 1);
    release(&w, waits);
    work(&w);
    assert_int_equal(w.maker.n_live, 0);
    end_world(&w);
}

/* FAULTS 9: loading again is idempotent; other weights from elsewhere are refused, unless they may
 * replace. */
static void test_load_again(void **state)
{
    (void)state;
    world w;
    make_world(&w, 1024 * KB);
    toy_spec one = spec_of(1), two = spec_of(2);
    toy_write(&w.folder, "x", &one);
    toy_write(&w.folder, "y", &two);
    toy_write(&w.folder, "z", &one);
    choir_adapter_load what = {.name = "a", .path = "x", .beneath = true};
    choir_adapter_info info, again;
    assert_int_equal(choir_adapters_load(w.pool, &what, &info), CHOIR_OK);
    assert_int_equal(choir_adapters_load(w.pool, &what, &again), CHOIR_OK);
    assert_int_equal(info.version, again.version);
    choir_adapter_load full = place(&w, "x"); /* the same folder, by its whole path */
    full.name = "a";
    assert_int_equal(choir_adapters_load(w.pool, &full, &again), CHOIR_OK);
    assert_int_equal(info.version, again.version);
    assert_int_equal(choir_adapters_register(w.pool, &full), CHOIR_OK);
    assert_int_equal(info_of(&w, "a").version, info.version);
    what.path = "y";
    assert_int_equal(choir_adapters_load(w.pool, &what, NULL), CHOIR_E_EXISTS);
    assert_int_equal(choir_adapters_register(w.pool, &what), CHOIR_E_EXISTS);
    assert_int_equal(info_of(&w, "a").digest, digest_of_seed(1));
    what.path = "./z/"; /* the same bytes: it lies there from now on */
    assert_int_equal(choir_adapters_load(w.pool, &what, &again), CHOIR_OK);
    assert_int_equal(again.digest, info.digest);
    toy_remove(&w.folder, "x");
    what.path = "y";
    what.replace = true;
    assert_int_equal(choir_adapters_load(w.pool, &what, &again), CHOIR_OK);
    assert_int_equal(again.digest, digest_of_seed(2));
    work(&w);
    assert_int_equal(w.maker.n_live, 1);
    /* What cannot be loaded leaves all as it was. */
    toy_spec spoiled = {.seed = 5, .bytes = SIZE, .spoiled = true};
    toy_write(&w.folder, "y", &spoiled);
    assert_int_equal(choir_adapters_load(w.pool, &what, NULL), CHOIR_E_PRECONDITION);
    says("NaN");
    assert_int_equal(info_of(&w, "a").digest, digest_of_seed(2));
    assert_true(info_of(&w, "a").resident);
    end_world(&w);
}

static void test_kept(void **state)
{
    (void)state;
    world w;
    make_world(&w, 3 * SIZE + 16 * KB);
    toy_spec spec = spec_of(9);
    toy_write(&w.folder, "k", &spec);
    choir_adapter_load what = place(&w, "k");
    what.keep = true;
    assert_int_equal(choir_adapters_register(w.pool, &what), CHOIR_OK);
    work(&w);
    assert_true(info_of(&w, "k").resident && info_of(&w, "k").kept);
    for (int i = 0; i < 5; i++) {
        char name[2] = {(char)('a' + i), 0};
        add(&w, name, (uint64_t)i);
        choir_adapter_claim *c = claim(&w, name, 0);
        work(&w);
        assert_true(pin(&w, c));
        release(&w, c);
    }
    assert_true(info_of(&w, "k").resident);
    what = place(&w, "a");
    what.keep = true;
    assert_int_equal(choir_adapters_load(w.pool, &what, NULL), CHOIR_OK);
    choir_adapter_claim c = {0};
    assert_int_equal(choir_adapters_claim(w.pool, "b", 0, &c, NULL), CHOIR_E_FULL);
    says("never evicted");
    what.keep = false;
    assert_int_equal(choir_adapters_load(w.pool, &what, NULL), CHOIR_OK);
    assert_int_equal(choir_adapters_claim(w.pool, "b", 0, &c, NULL), CHOIR_OK);
    choir_adapters_release(w.pool, &c, 1);
    end_world(&w);
}

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

/* FAULTS 28: the third poisoned request quarantines the version; a new one is given another chance.
 */
static void test_quarantine(void **state)
{
    (void)state;
    world w;
    bool pinned;
    make_world(&w, 1024 * KB);
    add(&w, "a", 1);
    choir_log_set_level(CHOIR_LOG_ERROR);
    for (int i = 0; i < 3; i++) {
        choir_adapter_claim *c = claim(&w, "a", 0);
        work(&w);
        assert_true(pin(&w, c));
        choir_adapters_note_poison(w.pool, c);
        release(&w, c);
    }
    choir_log_set_level(CHOIR_LOG_INFO);
    choir_adapter_claim c = {0};
    assert_int_equal(choir_adapters_claim(w.pool, "a", 0, &c, NULL), CHOIR_E_PRECONDITION);
    says("quarantined");
    assert_string_equal(info_of(&w, "a").state, "quarantined");
    choir_adapters_stats t;
    choir_adapters_get_stats(w.pool, &t);
    assert_int_equal(t.n_quarantined, 1);
    choir_adapter_load what = place(&w, "a");
    assert_int_equal(choir_adapters_load(w.pool, &what, NULL), CHOIR_OK);
    assert_int_equal(choir_adapters_claim(w.pool, "a", 0, &c, NULL), CHOIR_OK);
    assert_int_equal(choir_adapters_pin(w.pool, &c, 1, &pinned), CHOIR_OK);
    assert_true(pinned);
    choir_adapters_release(w.pool, &c, 1);
    choir_adapters_get_stats(w.pool, &t);
    assert_int_equal(t.n_quarantined, 0);
    end_world(&w);
}

/* The budget moves: what is unpinned goes at once, the rest when it is let go. */
static void test_budget_moves(void **state)
{
    (void)state;
    world w;
    make_world(&w, 1024 * KB);
    for (int i = 0; i < 3; i++) add(&w, (char[]){(char)('a' + i), 0}, (uint64_t)i);
    choir_adapter_claim *c[3];
    for (int i = 0; i < 3; i++) {
        c[i] = claim(&w, (char[]){(char)('a' + i), 0}, 0);
        work(&w);
        assert_true(pin(&w, c[i]));
    }
    release(&w, c[0]);
    assert_int_equal(choir_adapters_set_budget(w.pool, SIZE), 2 * SIZE);
    work(&w);
    assert_int_equal(w.maker.n_live, 2);
    choir_adapters_stats t;
    choir_adapters_get_stats(w.pool, &t);
    assert_int_equal(t.wanted_bytes, 2 * SIZE);
    release(&w, c[1]);
    work(&w);
    assert_int_equal(w.maker.n_live, 1);
    choir_adapter_claim *a = claim(&w, "a", 0);
    work(&w);
    assert_false(pin(&w, a));
    choir_adapters_get_stats(w.pool, &t);
    assert_true(t.wanted_bytes >= 4 * SIZE); /* two, and what loading takes */
    choir_adapters_set_budget(w.pool, t.wanted_bytes);
    work(&w);
    assert_true(pin(&w, a));
    release(&w, a);
    release(&w, c[2]);
    end_world(&w);
}

/* FAULTS 29: whatever allocation fails, the call says so, or the load does, and nothing leaks. */
static void test_no_memory(void **state)
{
    (void)state;
    bool done = false;
    choir_log_set_level(CHOIR_LOG_ERROR);
    for (uint64_t fail_at = 1; !done; fail_at++) {
        world w;
        bool pinned = false;
        make_world(&w, 1024 * KB);
        toy_spec spec = spec_of(1);
        toy_write(&w.folder, "a", &spec);
        choir_adapter_load what = place(&w, "a");
        choir_adapter_claim c = {0};
        choir_memory_fail_at(fail_at);
        choir_status status = choir_adapters_register(w.pool, &what);
        if (status == CHOIR_OK) status = choir_adapters_claim(w.pool, "a", 0, &c, NULL);
        if (status == CHOIR_OK) {
            work(&w);
            status = choir_adapters_pin(w.pool, &c, 1, &pinned);
        }
        choir_adapters_release(w.pool, &c, 1);
        if (status == CHOIR_OK) status = choir_adapters_load(w.pool, &what, NULL);
        choir_memory_fail_at(0);
        done = status == CHOIR_OK && pinned;
        if (status != CHOIR_OK) assert_int_equal(status, CHOIR_E_NO_MEMORY);
        assert_true(fail_at < 100);
        end_world(&w);
    }
    choir_log_set_level(CHOIR_LOG_INFO);
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

static void test_options(void **state)
{
    (void)state;
    toy_maker maker = {0};
    choir_adapters *pool;
    choir_adapters_options o = toy_options(&maker, NULL, 1024 * KB);
    o.folder = "/nonexistent/adapters";
    assert_int_equal(choir_adapters_create(&o, &pool), CHOIR_E_INVALID);
    says("/nonexistent/adapters");
    choir_adapters_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_claim_and_pin),
        cmocka_unit_test(test_lru_and_pins),
        cmocka_unit_test(test_a_thousand),
        cmocka_unit_test(test_urgency),
        cmocka_unit_test(test_mixes_do_not_lock_each_other),
        cmocka_unit_test(test_too_large),
        cmocka_unit_test(test_versions),
        cmocka_unit_test(test_load_again),
        cmocka_unit_test(test_kept),
        cmocka_unit_test(test_unreadable),
        cmocka_unit_test(test_a_disk_that_takes_no_reads),
        cmocka_unit_test(test_changes),
        cmocka_unit_test(test_changes_under_the_reader),
        cmocka_unit_test(test_waiting_through_an_unload),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_folder_within_a_folder),
        cmocka_unit_test(test_beneath),
        cmocka_unit_test(test_quarantine),
        cmocka_unit_test(test_budget_moves),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
