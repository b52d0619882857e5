/* The pool of adapters, its loader run by hand: who is read, who goes, who waits; versions under
 * one name; quarantine, a budget that moves; the i-th allocation fails. FAULTS 28, 29. */
#include "tests/experts/pool_world.h"

#include <string.h>

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
    /* Evicted and loaded again: the same version is back. */
    choir_adapters_set_budget(w.pool, 0);
    work(&w);
    assert_int_equal(w.maker.n_live, 0);
    choir_adapters_set_budget(w.pool, 1024 * KB);
    uint64_t version = again.version;
    assert_int_equal(choir_adapters_load(w.pool, &what, &again), CHOIR_OK);
    assert_true(again.resident && again.version == version);
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

static bool yes(void *calls)
{
    return ++*(int *)calls > 0;
}

/* Nobody waits for a load any more: it ends, and does not hold up those who are less urgent. */
static void test_a_load_is_given_up(void **state)
{
    (void)state;
    world w;
    int calls = 0;
    make_world(&w, 3 * SIZE);
    add(&w, "a", 1);
    choir_adapter_claim *a = claim(&w, "a", 0);
    work(&w);
    assert_true(pin(&w, a));
    toy_spec spec = spec_of(2);
    toy_write(&w.folder, "b", &spec);
    choir_adapter_load what = place(&w, "b");
    what.stopped = yes;
    what.user = &calls;
    assert_int_equal(choir_adapters_load(w.pool, &what, NULL), CHOIR_E_CANCELLED);
    says("adapter b: nobody waits");
    assert_int_equal(calls, 1);
    release(&w, a);
    choir_adapter_claim none = {0};
    assert_int_equal(choir_adapters_claim(w.pool, "b", 0, &none, NULL), CHOIR_E_NOT_FOUND);
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
    /* One has to go, and its bytes are there until the loader has freed it. */
    assert_int_equal(choir_adapters_set_budget(w.pool, SIZE), 3 * SIZE);
    work(&w);
    assert_int_equal(choir_adapters_set_budget(w.pool, SIZE), 2 * SIZE);
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
        cmocka_unit_test(test_a_load_is_given_up),
        cmocka_unit_test(test_quarantine),
        cmocka_unit_test(test_budget_moves),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
