/* Names that get new versions without end, under traffic: 10,000 swaps, random schedules by seeds,
 * and threads. An answer is that of a version which its name had between the request's submission
 * and its end; nothing grows, and what does not have to fail does not. */
#include "tests/scheduler/house.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N_NAMES = 6, N_SEEDS = 5, N_KINDS = 4, N_CLIENTS = 7 };

static uint32_t prompts[N_KINDS][24], n_prompts[N_KINDS];
static answer known[N_NAMES][N_SEEDS][N_KINDS];
static const char *const names[N_NAMES] = {"n0", "n1", "n2", "n3", "n4", "n5"};

/* What name i is with seed s: some have virtual tokens, some act late; the kinds of prompts hold 40
 * 41 or not. */
static toy_spec spec_of(uint32_t name, uint32_t seed)
{
    toy_spec s = {.seed = 100 * name + seed, .bytes = 1024 + 512 * seed};
    if (name == 2) s.n_virtual = 1 + seed;
    if (name == 3) {
        s.n_invocation = 2;
        s.invocation[0] = 40;
        s.invocation[1] = 41;
    }
    return s;
}

static choir_request kind_of(uint32_t kind, const choir_request_adapter *use)
{
    choir_request r = plain_request(prompts[kind], n_prompts[kind], 6 + kind, kind);
    r.adapters = use;
    r.n_adapters = 1;
    r.ignore_eos = true;
    return r;
}

static void make_known(void)
{
    static bool made;
    if (made) return;
    made = true;
    seed_random(77);
    for (uint32_t k = 0; k < N_KINDS; k++) {
        n_prompts[k] = 6 + pick(18);
        for (uint32_t i = 0; i < n_prompts[k]; i++) prompts[k][i] = i < 6 ? 4 + i : 4 + pick(36);
        if (k % 2 == 0) prompts[k][5] = 40;
        if (k % 2 == 0) prompts[k][6] = 41;
        if (k % 2 == 0 && n_prompts[k] < 8) n_prompts[k] = 8;
    }
    for (uint32_t n = 0; n < N_NAMES; n++)
        for (uint32_t s = 0; s < N_SEEDS; s++)
            for (uint32_t k = 0; k < N_KINDS; k++) {
                const choir_request_adapter use = {names[n], 1};
                const toy_spec spec = spec_of(n, s);
                choir_request r = kind_of(k, &use);
                known[n][s][k] = alone(&r, &spec);
            }
}

typedef struct client {
    choir_stream *stream; /* NULL: idle */
    uint32_t name, kind, first_swap;
    bool may_fail;
    answer got;
} client;

typedef struct swaps {
    uint32_t seeds[N_NAMES][1 << 14]; /* seeds[name][i]: after its i-th swap */
    uint32_t n[N_NAMES], doubts[N_NAMES]; /* 1: it is this one, or the one before */
    bool there[N_NAMES];
} swaps;
static swaps history;

/* Its tokens are those of a version that the name had between its submission and now, or it has
 * failed and may. */
static void check_client(const client *c)
{
    if (c->got.status != CHOIR_OK) {
        if (!c->may_fail) fail_msg("a request failed with %s", choir_status_text(c->got.status));
        return;
    }
    for (uint32_t i = c->first_swap; i <= history.n[c->name]; i++)
        if (same(&c->got, &known[c->name][history.seeds[c->name][i]][c->kind])) return;
    fail_msg("a stale answer of %s", names[c->name]);
}

static void start_client(house *h, client *c)
{
    uint32_t name = pick(N_NAMES), kind = pick(N_KINDS);
    if (!history.there[name]) return;
    const choir_request_adapter use = {names[name], 1};
    choir_request r = kind_of(kind, &use);
    *c = (client){.name = name, .kind = kind, .first_swap = history.n[name]};
    c->stream = submit(&h->w, &r);
}

static void take_clients(client *clients)
{
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        client *c = &clients[i];
        if (c->stream == NULL || !drain(c->stream, &c->got)) continue;
        check_client(c);
        choir_stream_release(c->stream);
        c->stream = NULL;
    }
}

static void note_swap(uint32_t name, uint32_t seed)
{
    history.seeds[name][++history.n[name]] = seed;
    history.doubts[name] = 0;
    history.there[name] = true;
}

/* Another version of a name, in one of the ways there are. */
static void swap(house *h)
{
    uint32_t name = pick(N_NAMES), seed = pick(N_SEEDS), how = pick(4);
    toy_spec spec = spec_of(name, seed);
    toy_write(&h->folder, names[name], &spec);
    if (how == 0 && history.there[name])
        assert_int_equal(choir_adapters_unload(h->pool, names[name]), CHOIR_OK);
    if (how == 1) {
        add(h, names[name], spec);
    } else if (load(h, names[name]) != CHOIR_OK) {
        fail_msg("%s", choir_error_message());
    }
    note_swap(name, seed);
}

/* 10,000 swaps under traffic: no stale output, no growth of memory, no failed request. */
static void test_ten_thousand_swaps(void **state)
{
    (void)state;
    house h;
    client clients[N_CLIENTS] = {0};
    uint64_t bytes_then = 0;
    make_known();
    open_house_with(&h, 64, small_options(), 256 << 10, 0);
    memset(&history, 0, sizeof history);
    seed_random(1);
    for (uint32_t n = 0; n < N_NAMES; n++) {
        add(&h, names[n], spec_of(n, 0));
        history.there[n] = true;
    }
    uint32_t n_asked = 0;
    for (uint32_t i = 0; i < 10000; i++) {
        swap(&h);
        fake_now += CHOIR_MS;
        for (uint32_t c = 0; c < N_CLIENTS; c++)
            if (clients[c].stream == NULL && pick(2) == 0) {
                start_client(&h, &clients[c]);
                n_asked++;
            }
        for (uint32_t t = pick(3); t > 0; t--) turn(&h);
        choir_scheduler_tick(h.w.scheduler);
        take_clients(clients);
        if (i % 1000 != 999) continue;
        /* All quiet: what is held is the names' versions and nothing else. */
        for (bool busy = true; busy;) {
            turn(&h);
            take_clients(clients);
            busy = false;
            for (uint32_t c = 0; c < N_CLIENTS; c++) busy = busy || clients[c].stream != NULL;
        }
        while (choir_adapters_work(h.pool))
            ;
        assert_no_claims(&h);
        assert_true(h.maker.n_live <= N_NAMES);
        choir_adapters_set_budget(h.pool, 0);
        while (choir_adapters_work(h.pool))
            ;
        assert_int_equal(h.maker.n_live, 0);
        choir_adapters_set_budget(h.pool, 256 << 10);
        uint64_t bytes =
            choir_memory_bytes(CHOIR_MEM_ADAPTERS) + choir_memory_bytes(CHOIR_MEM_REQUESTS);
        if (i > 1000) assert_int_equal(bytes, bytes_then);
        bytes_then = bytes;
    }
    assert_true(n_asked > 10000);
    close_house(&h);
}

/* Small memory, a bad disk, clients that leave, names that come and go; by seeds. */
static void simulate(uint64_t seed)
{
    house h;
    client clients[N_CLIENTS] = {0};
    choir_scheduler_options o = small_options();
    o.max_sequences = 1 + (uint32_t)seed % 4;
    open_house_with(&h, seed % 3 == 0 ? 24 : 64, o, (12 << 10) + 4096 * (seed % 7),
                    seed % 5 == 0 ? 12 << 10 : 0);
    seed_random(seed);
    h.disk.random = seed;
    h.disk.late_permille = 500;
    h.disk.eio_permille = seed % 2 == 0 ? 50 : 0;
    memset(&history, 0, sizeof history);
    for (uint32_t n = 0; n < N_NAMES; n++) {
        add(&h, names[n], spec_of(n, 0));
        history.there[n] = true;
    }
    for (uint32_t round = 0; round < 400; round++) {
        uint32_t c = pick(N_CLIENTS), name = pick(N_NAMES), with = pick(N_SEEDS);
        bool busy = clients[c].stream != NULL;
        if (!busy) {
            const choir_request_adapter use = {names[name], 1};
            choir_request r = kind_of(pick(N_KINDS), &use);
            clients[c] = (client){.name = name,
                                  .kind = (uint32_t)r.sampling.seed,
                                  .first_swap = history.n[name] - history.doubts[name],
                                  .may_fail = true};
            r.priority = (int32_t)pick(3);
            if (pick(10) == 0) r.deadline_ns = fake_now + pick(30) * CHOIR_MS;
            if (pick(10) == 0) choir_memory_fail_at(1 + pick(20));
            if (choir_scheduler_submit(h.w.scheduler, &r, NULL, NULL, &clients[c].stream) !=
                CHOIR_OK)
                clients[c].stream = NULL;
            choir_memory_fail_at(0);
        } else if (pick(20) == 0) {
            choir_stream_cancel(clients[c].stream);
        }
        if (pick(8) == 0) {
            toy_spec spec = spec_of(name, with);
            toy_write(&h.folder, names[name], &spec);
            if (pick(3) == 0) {
                uint32_t before = history.seeds[name][history.n[name]];
                note_swap(name, with);
                if (load(&h, names[name]) != CHOIR_OK) {
                    /* The one before goes on, until it is read again from what lies there now. */
                    note_swap(name, before);
                    note_swap(name, with);
                    history.doubts[name] = 1;
                }
            } else {
                add(&h, names[name], spec);
                note_swap(name, with);
            }
        }
        fake_now += pick(4) * CHOIR_MS;
        if (pick(50) == 0) fake_now += 31 * CHOIR_SECOND;
        if (pick(10) == 0) choir_memory_fail_at(1 + pick(4));
        if (pick(2) == 0) choir_adapters_work(h.pool);
        choir_scheduler_tick(h.w.scheduler);
        choir_memory_fail_at(0);
        take_clients(clients);
    }
    h.disk.eio_permille = 0;
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        for (int t = 0; clients[i].stream != NULL; t++) {
            assert_true(t < 5000); /* nobody waits for ever */
            turn(&h);
            take_clients(clients);
        }
    }
    close_house(&h);
}

static uint64_t n_seeds = 150; /* the first argument, for long runs by hand */

static void test_simulation(void **state)
{
    (void)state;
    make_known();
    for (uint64_t seed = 1; seed <= n_seeds; seed++) {
        if (seed % 50 == 1) print_message("seeds from %llu on\n", (unsigned long long)seed);
        simulate(seed);
    }
}

/* -- threads -- */

enum { THREADS = 3, ROUNDS = 60 };

typedef struct asker {
    choir_scheduler *scheduler;
    pthread_t thread;
    uint64_t seed;
    uint32_t n_wrong, n_done;
} asker;

static uint32_t draw(asker *a, uint32_t n)
{
    a->seed = a->seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(a->seed >> 33) % n;
}

static bool is_any(const answer *got, uint32_t name, uint32_t kind)
{
    for (uint32_t s = 0; s < N_SEEDS; s++)
        if (same(got, &known[name][s][kind])) return true;
    return false;
}

static void *run_asker(void *arg)
{
    asker *a = arg;
    for (int i = 0; i < ROUNDS; i++) {
        uint32_t name = draw(a, N_NAMES), kind = draw(a, N_KINDS);
        const choir_request_adapter use = {names[name], 1};
        choir_request r = kind_of(kind, &use);
        choir_stream *stream;
        answer got = {0};
        choir_event e;
        if (choir_scheduler_submit(a->scheduler, &r, NULL, NULL, &stream) != CHOIR_OK) {
            a->n_wrong++;
            continue;
        }
        bool leaves = draw(a, 6) == 0;
        while (!got.done && choir_stream_wait(stream, 20 * CHOIR_SECOND, &e)) {
            for (uint32_t t = 0; e.kind == CHOIR_EVENT_DELTA && t < e.n_tokens; t++)
                got.tokens[0][got.n[0]++] = e.tokens[t];
            got.done = e.kind == CHOIR_EVENT_DONE;
            got.status = e.status;
            if (leaves) break;
        }
        if (!leaves) a->n_wrong += got.status != CHOIR_OK || !is_any(&got, name, kind);
        a->n_done++;
        choir_stream_release(stream);
    }
    return NULL;
}

/* The loader, the engine thread, clients and an admin, all at once; for TSan above all. */
static void test_threads(void **state)
{
    (void)state;
    make_known();
    choir_clock_replace(NULL, NULL);
    for (int io = 0; io < 2; io++) {
        toy_folder folder;
        toy_maker maker = {0};
        choir_adapters *pool;
        choir_scheduler *s;
        toy_folder_create(&folder);
        choir_adapters_options a = toy_options(&maker, NULL, 48 << 10);
        a.io = io == 0 ? CHOIR_IO_AUTO : CHOIR_IO_PREAD;
        a.folder = folder.path;
        assert_int_equal(choir_adapters_create(&a, &pool), CHOIR_OK);
        simulated_engine *engine = simulated_engine_create(40);
        engine->adapters = pool;
        const choir_step_engine step = simulated_step_engine(engine);
        choir_scheduler_options o = small_options();
        assert_int_equal(choir_scheduler_create(&step, &o, &s), CHOIR_OK);
        for (uint32_t n = 0; n < N_NAMES; n++) {
            const toy_spec spec = spec_of(n, 0);
            toy_write(&folder, names[n], &spec);
            const choir_adapter_load what = {.name = names[n], .path = names[n], .beneath = true};
            assert_int_equal(choir_adapters_register(pool, &what), CHOIR_OK);
        }
        asker askers[THREADS];
        for (uint32_t i = 0; i < THREADS; i++) {
            askers[i] = (asker){.scheduler = s, .seed = i + 1};
            assert_int_equal(pthread_create(&askers[i].thread, NULL, run_asker, &askers[i]), 0);
        }
        for (uint32_t i = 0; i < 60; i++) {
            uint32_t name = i % N_NAMES;
            const toy_spec spec = spec_of(name, i / N_NAMES % N_SEEDS);
            toy_write(&folder, names[name], &spec);
            const choir_adapter_load what = {
                .name = names[name], .path = names[name], .beneath = true};
            if (choir_adapters_load(pool, &what, NULL) != CHOIR_OK)
                fail_msg("%s", choir_error_message());
            choir_scheduler_stats t;
            choir_scheduler_get_stats(s, &t);
            static choir_adapter_info list[N_NAMES];
            assert_int_equal(choir_adapters_list(pool, "", list, N_NAMES), N_NAMES);
        }
        for (uint32_t i = 0; i < THREADS; i++) {
            pthread_join(askers[i].thread, NULL);
            assert_int_equal(askers[i].n_wrong, 0);
            assert_int_equal(askers[i].n_done, ROUNDS);
        }
        choir_scheduler_destroy(s);
        choir_adapters_stats t;
        choir_adapters_get_stats(pool, &t);
        assert_true(t.n_pins == 0 && t.n_claims == 0);
        choir_adapters_destroy(pool);
        simulated_engine_destroy(engine);
        assert_int_equal(maker.n_live, 0);
        toy_folder_destroy(&folder);
    }
    use_fake_clock(NULL);
}

int main(int argc, char **argv)
{
    choir_log_set_level(CHOIR_LOG_ERROR);
    if (argc > 1) n_seeds = strtoull(argv[1], NULL, 10);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ten_thousand_swaps),
        cmocka_unit_test(test_simulation),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, use_fake_clock, NULL);
}
