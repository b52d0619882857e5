/* The engine thread among clients that submit, read, dawdle, cancel and leave; for TSan above all.
 */
#include "tests/scheduler/world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { N_CLIENTS = 4, N_KINDS = 12, N_ROUNDS = 40 };

static uint32_t prompts[N_KINDS][24];
static choir_request kinds[N_KINDS];
static answer expected[N_KINDS];

typedef struct client {
    choir_scheduler *scheduler;
    pthread_t thread;
    uint64_t seed;
    uint32_t n_done, n_wrong;
    uint32_t n_open;                           /* requests whose adapters were left open */
    atomic_uint n_wakes, n_chosen, n_released; /* relaxed: only counted */
} client;

static uint32_t draw(client *c, uint32_t n)
{
    c->seed = c->seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(c->seed >> 33) % n;
}

static void wake(void *user)
{
    atomic_fetch_add_explicit(&((client *)user)->n_wakes, 1, memory_order_relaxed);
}

/* The model alone, or what cannot be had. */
static void choose(void *user, const choir_prompt_features *features, choir_choice *out)
{
    client *c = user;
    uint32_t n = atomic_fetch_add_explicit(&c->n_chosen, 1, memory_order_relaxed);
    out->adapters[0] = (choir_request_adapter){"none", features->mean[0]};
    out->n = n % 2;
}

static void give_back(void *user)
{
    atomic_fetch_add_explicit(&((client *)user)->n_released, 1, memory_order_relaxed);
}

static bool is_right(const answer *got, const answer *want, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (got->n[i] != want->n[i] ||
            memcmp(got->tokens[i], want->tokens[i], got->n[i] * sizeof(uint32_t)) != 0)
            return false;
    return true;
}

static void run_once(client *c)
{
    uint32_t kind = draw(c, N_KINDS), leave_after = draw(c, 5) == 0 ? draw(c, 10) : UINT32_MAX;
    bool cancels = draw(c, 8) == 0;
    choir_stream *stream;
    choir_request r = kinds[kind];
    if (draw(c, 2) == 0) r.chooser = (choir_chooser){choose, give_back, c, 2};
    if (choir_scheduler_submit(c->scheduler, &r, wake, c, &stream) != CHOIR_OK) {
        usleep(500);
        return;
    }
    c->n_open += r.chooser.choose != NULL;
    answer a = {0};
    choir_event e;
    for (uint32_t n = 0; n < leave_after && !a.done; n++) {
        if (!choir_stream_wait(stream, 20 * CHOIR_SECOND, &e)) {
            c->n_wrong++;
            break;
        }
        if (e.kind == CHOIR_EVENT_DELTA)
            for (uint32_t i = 0; i < e.n_tokens; i++)
                a.tokens[e.index][a.n[e.index]++] = e.tokens[i];
        if (cancels && n == 3) choir_stream_cancel(stream);
        a.done = e.kind == CHOIR_EVENT_DONE;
        if (!a.done) continue;
        c->n_done++;
        bool good = e.status == CHOIR_OK ? is_right(&a, &expected[kind], kinds[kind].n)
                                         : cancels && e.status == CHOIR_E_CANCELLED;
        c->n_wrong += !good;
    }
    choir_stream_release(stream);
}

static void *run_client(void *arg)
{
    client *c = arg;
    for (int i = 0; i < N_ROUNDS; i++) {
        run_once(c);
        choir_scheduler_stats stats;
        choir_scheduler_get_stats(c->scheduler, &stats);
        c->n_wrong += !stats.healthy;
    }
    return NULL;
}

static void make_kinds(void)
{
    seed_random(5);
    for (uint32_t k = 0; k < N_KINDS; k++) {
        uint32_t n = 2 + pick(22);
        for (uint32_t i = 0; i < n; i++) prompts[k][i] = 4 + (i < n / 2 ? i : pick(50));
        kinds[k] = plain_request(prompts[k], n, 5 + pick(20), k);
        kinds[k].n = 1 + pick(3);
        kinds[k].priority = (int32_t)pick(3);
        expected[k] = run_alone(&kinds[k], NULL);
    }
}

static void test_clients(void **state)
{
    (void)state;
    make_kinds();
    simulated_engine *engine = simulated_engine_create(40);
    const choir_step_engine step = simulated_step_engine(engine);
    choir_scheduler_options o = small_options();
    choir_scheduler *s;
    assert_int_equal(choir_scheduler_create(&step, &o, &s), CHOIR_OK);
    client clients[N_CLIENTS];
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        clients[i] = (client){.scheduler = s, .seed = i + 1};
        assert_int_equal(pthread_create(&clients[i].thread, NULL, run_client, &clients[i]), 0);
    }
    uint32_t n_done = 0;
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        pthread_join(clients[i].thread, NULL);
        assert_int_equal(clients[i].n_wrong, 0);
        n_done += clients[i].n_done;
    }
    assert_true(n_done > N_CLIENTS * N_ROUNDS / 2);
    choir_scheduler_drain(s);
    for (int i = 0; i < 20000 && !choir_scheduler_idle(s); i++) usleep(1000);
    assert_true(choir_scheduler_idle(s));
    choir_scheduler_destroy(s);
    simulated_engine_destroy(engine);
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        assert_true(clients[i].n_open > 0 && clients[i].n_chosen <= clients[i].n_open);
        assert_int_equal(clients[i].n_released, clients[i].n_open);
    }
}

/* The scheduler goes while streams are open and read from other threads. */
static void *read_to_the_end(void *arg)
{
    choir_event e;
    do {
        if (!choir_stream_wait(arg, UINT64_MAX, &e)) return NULL;
    } while (e.kind != CHOIR_EVENT_DONE);
    choir_stream_release(arg);
    return arg;
}

static void test_destroy_under_way(void **state)
{
    (void)state;
    for (int round = 0; round < 20; round++) {
        simulated_engine *engine = simulated_engine_create(64);
        const choir_step_engine step = simulated_step_engine(engine);
        choir_scheduler_options o = small_options();
        choir_scheduler *s;
        assert_int_equal(choir_scheduler_create(&step, &o, &s), CHOIR_OK);
        pthread_t threads[3];
        for (uint32_t i = 0; i < 3; i++) {
            const uint32_t tokens[] = {4, 5, 6};
            choir_request r = plain_request(tokens, 3, 200, i);
            r.ignore_eos = true;
            choir_stream *stream;
            assert_int_equal(choir_scheduler_submit(s, &r, NULL, NULL, &stream), CHOIR_OK);
            assert_int_equal(pthread_create(&threads[i], NULL, read_to_the_end, stream), 0);
        }
        usleep((useconds_t)round * 100);
        choir_scheduler_destroy(s);
        for (uint32_t i = 0; i < 3; i++) {
            void *ended;
            pthread_join(threads[i], &ended);
            assert_non_null(ended);
        }
        simulated_engine_destroy(engine);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_clients),
        cmocka_unit_test(test_destroy_under_way),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
