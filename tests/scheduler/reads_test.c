/* Sequences that share a disk: who runs with whom, for how long others are held back, how large
 * steps grow. Beneath is the simulated engine with experts that cost time to read; the clock is
 * fake. */
#include "tests/scheduler/world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

enum {
    LAYERS = 3, /* the first is dense: it has no routes */
    EXPERTS = 32,
    USED = 2,
    TOPIC = 4, /* experts of a topic in each layer */
    N_PAIRS = LAYERS * EXPERTS,
    STEP_MS = 1,
    MISS_MS = 10,
    N_REQUESTS = 8,
    N_TOKENS = 120,
};

/* The first token of a sequence says its topic, which says its experts; least recently used ones
 * go. */
typedef struct disk_engine {
    choir_step_engine inner;
    simulated_engine *simulated;
    uint32_t n_slots, n_topics;
    uint64_t used_at[N_PAIRS], now; /* 0: not in memory */
    choir_experts_stats stats;
    uint32_t most_rows;
} disk_engine;

static disk_engine disk;

static void want(uint32_t pair)
{
    uint32_t n_held = 0, oldest = N_PAIRS;
    if (disk.used_at[pair] != 0) {
        disk.used_at[pair] = disk.now;
        disk.stats.n_hits++;
        return;
    }
    for (uint32_t i = 0; i < N_PAIRS; i++) {
        if (disk.used_at[i] == 0) continue;
        n_held++;
        if (oldest == N_PAIRS || disk.used_at[i] < disk.used_at[oldest]) oldest = i;
    }
    if (n_held >= disk.n_slots) disk.used_at[oldest] = 0;
    disk.used_at[pair] = disk.now;
    disk.stats.n_misses++;
    disk.stats.stall_ns += MISS_MS * CHOIR_MS;
    fake_now += MISS_MS * CHOIR_MS;
}

static choir_status disk_step(void *engine, choir_span *spans, uint32_t n_spans)
{
    uint32_t rows = 0;
    disk.now++;
    fake_now += STEP_MS * CHOIR_MS;
    choir_status status = disk.inner.step(engine, spans, n_spans);
    for (uint32_t i = 0; i < n_spans; i++)
        for (uint32_t at = 0; spans[i].routes != NULL && at < spans[i].n_tokens * USED; at++) {
            spans[i].routes->experts[at] = UINT16_MAX;
            spans[i].routes->weights[at] = 0;
        }
    for (uint32_t l = 1; l < LAYERS; l++)
        for (uint32_t i = 0; i < n_spans; i++) {
            choir_span *span = &spans[i];
            assert_true(span->remaining > 0 && span->remaining <= N_TOKENS);
            uint32_t first = span->pages[0] * disk.simulated->page_tokens,
                     topic = (disk.simulated->kv[first] - 1) % disk.n_topics;
            for (uint32_t t = 0; t < span->n_tokens; t++)
                for (uint32_t k = 0; k < USED; k++) {
                    uint32_t at = (span->position + t + k) % TOPIC, expert = topic * TOPIC + at;
                    want(l * EXPERTS + expert);
                    if (span->routes == NULL) continue;
                    size_t place = ((size_t)l * span->n_tokens + t) * USED + k;
                    span->routes->experts[place] = (uint16_t)expert;
                    span->routes->weights[place] = 0.5F;
                }
        }
    for (uint32_t i = 0; i < n_spans; i++) rows += spans[i].n_tokens;
    if (rows > disk.most_rows) disk.most_rows = rows;
    return status;
}

static choir_experts_stats disk_stats(void *engine)
{
    (void)engine;
    disk.stats.n_slots = disk.n_slots;
    return disk.stats;
}

static float disk_heat(void *engine, uint32_t layer, uint32_t expert)
{
    (void)engine;
    return (float)disk.used_at[layer * EXPERTS + expert];
}

static world make_disk_world(uint32_t n_slots, uint32_t n_topics, choir_scheduler_options options)
{
    world w = {.engine = simulated_engine_create(512)};
    disk = (disk_engine){.inner = simulated_step_engine(w.engine),
                         .simulated = w.engine,
                         .n_slots = n_slots,
                         .n_topics = n_topics};
    choir_step_engine step = disk.inner;
    step.step = disk_step;
    step.expert_stats = disk_stats;
    step.expert_heat = disk_heat;
    step.n_layers = LAYERS;
    step.n_experts = EXPERTS;
    step.n_experts_used = USED;
    options.manual = true;
    options.prefix_cache = false;
    assert_int_equal(choir_scheduler_create(&step, &options, &w.scheduler), CHOIR_OK);
    return w;
}

typedef struct outcome {
    answer answers[N_REQUESTS];
    uint64_t n_misses, longest_ns, took_ns; /* the longest wait for a token */
    uint32_t most_groups;
} outcome;

/* Requests of the topics in turn, all at once, to their end. */
static void run_requests(uint32_t n_slots, uint32_t n_topics, uint32_t max_hold_ms, outcome *o)
{
    choir_scheduler_options options = small_options();
    options.max_hold_ms = max_hold_ms;
    world w = make_disk_world(n_slots, n_topics, options);
    choir_stream *streams[N_REQUESTS];
    uint64_t last[N_REQUESTS], began = fake_now;
    uint32_t n_left = N_REQUESTS;
    memset(o, 0, sizeof *o);
    for (uint32_t i = 0; i < N_REQUESTS; i++) {
        uint32_t prompt[] = {16 + i % n_topics, 5, 6};
        choir_request r = plain_request(prompt, 3, N_TOKENS, i);
        r.ignore_eos = true;
        streams[i] = submit(&w, &r);
        last[i] = fake_now;
    }
    while (n_left > 0) {
        choir_scheduler_stats stats;
        choir_scheduler_tick(w.scheduler);
        choir_scheduler_get_stats(w.scheduler, &stats);
        if (stats.n_read_groups > o->most_groups) o->most_groups = stats.n_read_groups;
        n_left = 0;
        for (uint32_t i = 0; i < N_REQUESTS; i++) {
            uint32_t before = o->answers[i].n[0];
            if (!drain(streams[i], &o->answers[i])) n_left++;
            if (o->answers[i].n[0] == before) continue;
            if (fake_now - last[i] > o->longest_ns) o->longest_ns = fake_now - last[i];
            last[i] = fake_now;
        }
    }
    for (uint32_t i = 0; i < N_REQUESTS; i++) {
        assert_int_equal(o->answers[i].status, CHOIR_OK);
        assert_int_equal(o->answers[i].n[0], N_TOKENS);
        choir_stream_release(streams[i]);
    }
    o->n_misses = disk.stats.n_misses;
    o->took_ns = fake_now - began;
    assert_quiet(&w);
    end_world(&w);
}

static void assert_same_answers(const outcome *a, const outcome *b)
{
    for (uint32_t i = 0; i < N_REQUESTS; i++)
        assert_memory_equal(a->answers[i].tokens[0], b->answers[i].tokens[0],
                            N_TOKENS * sizeof(uint32_t));
}

/* Memory holds one of two topics: taking turns spares most reads, changes no token, and holds
 * nobody back for longer than is allowed (and one step). */
static void test_topics_take_turns(void **state)
{
    (void)state;
    static outcome together, apart;
    run_requests(9, 2, 0, &together);
    run_requests(9, 2, 2000, &apart);
    assert_same_answers(&together, &apart);
    assert_int_equal(together.most_groups, 1);
    assert_int_equal(apart.most_groups, 2);
    print_message(
        "%llu reads and %llu ms together, %llu and %llu in turns\n",
        (unsigned long long)together.n_misses, (unsigned long long)(together.took_ns / CHOIR_MS),
        (unsigned long long)apart.n_misses, (unsigned long long)(apart.took_ns / CHOIR_MS));
    assert_true(2 * apart.n_misses < together.n_misses);
    assert_true(3 * apart.took_ns < 2 * together.took_ns);
    assert_true(apart.longest_ns < (2000 + 200) * CHOIR_MS);
}

/* A short leash is held to; shorter than a step: each group has one step in turn at the least. */
static void test_hold_is_bounded(void **state)
{
    (void)state;
    static outcome o;
    const uint32_t holds[] = {1, 50, 200};
    for (int i = 0; i < 3; i++) {
        run_requests(9, 2, holds[i], &o);
        assert_true(o.longest_ns < (holds[i] + 400) * CHOIR_MS);
    }
}

/* Each of several groups has its turns, however many there are. */
static void test_many_topics(void **state)
{
    (void)state;
    static outcome o;
    for (uint32_t n_topics = 3; n_topics <= 8; n_topics++) {
        run_requests(9, n_topics, 2000, &o);
        assert_true(o.longest_ns < (2000 + 400) * CHOIR_MS);
        assert_true(o.most_groups > 1);
    }
}

/* Where all experts fit, or everybody wants the same, nobody is held back. */
static void test_no_turns_without_need(void **state)
{
    (void)state;
    static outcome o;
    run_requests(N_PAIRS, 2, 2000, &o);
    assert_int_equal(o.most_groups, 1);
    run_requests(4, 1, 2000, &o);
    assert_int_equal(o.most_groups, 1);
    run_requests(5, 8, 0, &o);
    assert_int_equal(o.most_groups, 1);
}

/* Whose deadline is near runs in every turn. */
static void test_deadline_is_not_held_back(void **state)
{
    (void)state;
    choir_scheduler_options options = small_options();
    world w = make_disk_world(9, 2, options);
    choir_stream *streams[N_REQUESTS];
    answer a[N_REQUESTS] = {{{{0}}}};
    choir_scheduler_stats stats;
    for (uint32_t i = 0; i < N_REQUESTS; i++) {
        uint32_t prompt[] = {16 + i % 2, 5, 6};
        choir_request r = plain_request(prompt, 3, N_TOKENS, i);
        r.ignore_eos = true;
        /* Enough for all its tokens in steps that read two topics, not for waits besides. */
        if (i == 7) r.deadline_ns = fake_now + N_TOKENS * (STEP_MS + 8 * MISS_MS) * CHOIR_MS;
        streams[i] = submit(&w, &r);
    }
    uint32_t n_turns = 0;
    while (!a[7].done) {
        uint32_t before = a[7].n[0];
        choir_scheduler_tick(w.scheduler);
        choir_scheduler_get_stats(w.scheduler, &stats);
        for (uint32_t i = 0; i < N_REQUESTS; i++) drain(streams[i], &a[i]);
        if (stats.n_read_groups < 2 || a[7].done) continue;
        n_turns++;
        assert_int_equal(a[7].n[0], before + 1);
    }
    assert_int_equal(a[7].status, CHOIR_OK);
    assert_true(n_turns > 10);
    for (uint32_t i = 0; i < N_REQUESTS; i++) choir_stream_cancel(streams[i]);
    for (uint32_t i = 0; i < N_REQUESTS; i++) finish(&w, streams[i], &a[i]);
    assert_quiet(&w);
    end_world(&w);
}

/* While a prompt's steps wait for the disk they grow to what the engine takes; where they do not
 * wait, they stay as they are. */
static void test_steps_grow(void **state)
{
    (void)state;
    uint32_t prompt[200];
    for (uint32_t i = 0; i < 200; i++) prompt[i] = 16 + i % 40;
    for (int waits = 0; waits < 2; waits++) {
        choir_scheduler_options options = small_options();
        options.max_step_tokens = 16;
        world w = make_disk_world(waits ? 3 : N_PAIRS, 2, options);
        choir_request r = plain_request(prompt, 200, 4, 1);
        r.ignore_eos = true;
        answer a = {0};
        finish(&w, submit(&w, &r), &a);
        assert_int_equal(a.status, CHOIR_OK);
        assert_int_equal(disk.most_rows, waits ? (int)w.engine->max_rows : 32);
        assert_quiet(&w);
        end_world(&w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_topics_take_turns),
        cmocka_unit_test(test_hold_is_bounded),
        cmocka_unit_test(test_many_topics),
        cmocka_unit_test(test_no_turns_without_need),
        cmocka_unit_test(test_deadline_is_not_held_back),
        cmocka_unit_test(test_steps_grow),
    };
    return cmocka_run_group_tests(tests, use_fake_clock, NULL);
}
