/* Experts that are read as they are wanted give the bits of experts that are all in memory: every
 * family, every file, every way to read, however few slots there are. */
#include "tests/engine/sequence.h"
#include "tune/tune.h"

#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { N_TOKENS = 24, N_PAGES = 2, PROMPT = 20 };

#define MODELS "tests/fixtures/models"

typedef struct case_ {
    uint32_t n_threads, n_slots;
    choir_io io;
    bool exact;
} case_;

static choir_engine *open_engine(const char *path, const case_ *c, bool streamed)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = c->n_threads;
    o.exact = c->exact;
    o.max_rows = 64;
    o.kv_bytes = (uint64_t)16 << 20;
    if (streamed) {
        o.expert_bytes = (uint64_t)64 << 20;
        o.max_expert_slots = c->n_slots;
        o.io = c->io;
    }
    choir_engine *engine;
    if (choir_engine_open(path, &o, &engine) != CHOIR_OK)
        fail_msg("%s: %s", path, choir_error_message());
    return engine;
}

/* A prompt in one step, then single tokens; beside it, from another place, a second sequence. */
static float *run(choir_engine *engine)
{
    uint32_t vocab = choir_engine_config(engine)->vocab, tokens[N_TOKENS];
    float *logits = calloc(2 * (size_t)N_TOKENS * vocab, sizeof *logits);
    assert_non_null(logits);
    for (uint32_t i = 0; i < N_TOKENS; i++) tokens[i] = (i * 7919 + 11) % vocab;
    sequence a = sequence_at(engine, 0, N_PAGES), b = sequence_at(engine, N_PAGES, N_PAGES);
    for (uint32_t at = 0; at < N_TOKENS;) {
        uint32_t n = at == 0 ? PROMPT : 1;
        choir_span spans[] = {
            sequence_span(&a, tokens + at, n, logits + (size_t)at * vocab),
            sequence_span(&b, tokens + N_TOKENS - at - n, n,
                          logits + ((size_t)N_TOKENS + at) * vocab),
        };
        assert_int_equal(choir_engine_step(engine, spans, 2), CHOIR_OK);
        for (int i = 0; i < 2; i++)
            if (spans[i].status != CHOIR_OK) fail_msg("%s", choir_status_text(spans[i].status));
        sequence_advance(&a, &spans[0]);
        sequence_advance(&b, &spans[1]);
        at += n;
    }
    return logits;
}

static void compare(const char *path, const case_ *c, const float *wanted, bool streamed)
{
    choir_engine *engine = open_engine(path, c, streamed);
    const choir_model_config *config = choir_engine_config(engine);
    float *got = run(engine);
    for (size_t i = 0; i < 2 * (size_t)N_TOKENS * config->vocab; i++)
        if (memcmp(&got[i], &wanted[i], sizeof *got) != 0)
            fail_msg("%s, %u slots, %s: logit %zu is %.9g, resident %.9g", path, c->n_slots,
                     choir_io_text(c->io), i, (double)got[i], (double)wanted[i]);
    free(got);
    choir_experts_stats s = choir_engine_expert_stats(engine);
    assert_int_equal(choir_engine_n_experts_pinned(engine), 0);
    assert_int_equal(s.streamed, streamed);
    if (!streamed) {
        choir_engine_close(engine);
        return;
    }
    assert_int_equal(s.n_slots, c->n_slots < s.n_experts ? c->n_slots : s.n_experts);
    assert_true(s.n_slots_used <= s.n_slots);
    assert_true(s.n_misses > 0 && s.bytes_read > 0 && s.n_failed == 0 && s.n_damaged == 0);
    choir_engine_close(engine);
}

static void make_pack(const char *path, char *pack, size_t bytes)
{
    snprintf(pack, bytes, "/tmp/streaming_test-%ld.choir", (long)getpid());
    choir_pack_options o = CHOIR_PACK_OPTIONS_DEFAULT;
    o.model = path;
    o.out = pack;
    o.n_threads = 2;
    if (choir_pack_write(&o) != CHOIR_OK) fail_msg("%s: %s", path, choir_error_message());
}

static void try_model(const char *path)
{
    static const case_ cases[] = {
        {1, 2, CHOIR_IO_AUTO, false},        {2, 3, CHOIR_IO_PREAD, false},
        {3, 2, CHOIR_IO_URING_PLAIN, false}, {2, 5, CHOIR_IO_AUTO, true},
        {2, 1000, CHOIR_IO_AUTO, false},
    };
    float *wanted[2];
    bool moe = false;
    for (int exact = 0; exact < 2; exact++) {
        const case_ resident = {.n_threads = 2, .exact = exact};
        choir_engine *engine = open_engine(path, &resident, false);
        moe = choir_engine_config(engine)->n_experts > 0;
        wanted[exact] = run(engine);
        choir_engine_close(engine);
    }
    char pack[64];
    make_pack(path, pack, sizeof pack);
    for (size_t i = 0; moe && i < sizeof cases / sizeof *cases; i++) {
        compare(path, &cases[i], wanted[cases[i].exact], true);
        compare(pack, &cases[i], wanted[cases[i].exact], !cases[i].exact);
    }
    const case_ resident = {.n_threads = 2};
    compare(pack, &resident, wanted[0], false);
    unlink(pack);
    free(wanted[0]);
    free(wanted[1]);
}

static void test_streamed_is_resident(void **state)
{
    (void)state;
    struct dirent **names;
    int n = scandir(MODELS, &names, NULL, alphasort), n_tried = 0;
    assert_true(n > 2);
    for (int i = 0; i < n; i++) {
        char path[400];
        snprintf(path, sizeof path, MODELS "/%s", names[i]->d_name);
        if (names[i]->d_name[0] != '.') {
            try_model(path);
            n_tried++;
        }
        free(names[i]);
    }
    free(names);
    assert_true(n_tried > 60);
}

/* The pool's disk, but for what the test forbids. */
typedef struct bad_disk {
    choir_disk disk;
    choir_disk *real;
    bool all_fail;
    uint32_t n_failing;
    choir_read_done failed[64];
} bad_disk;

static uint32_t bad_submit(choir_disk *disk, const choir_read *reads, uint32_t n)
{
    bad_disk *b = (bad_disk *)disk;
    if (!b->all_fail) return b->real->submit(b->real, reads, n);
    uint32_t taken = 0;
    for (; taken < n && b->n_failing < 64; taken++)
        b->failed[b->n_failing++] = (choir_read_done){reads[taken].tag, EIO};
    return taken;
}

static uint32_t bad_reap(choir_disk *disk, choir_read_done *done, uint32_t max, uint64_t wait_ns)
{
    bad_disk *b = (bad_disk *)disk;
    uint32_t n = 0;
    while (n < max && b->n_failing > 0) done[n++] = b->failed[--b->n_failing];
    return n > 0 ? n : b->real->reap(b->real, done, max, wait_ns);
}

static void bad_use_memory(choir_disk *disk, void *data, size_t bytes, bool in_use)
{
    (void)disk, (void)data, (void)bytes, (void)in_use;
}

static void bad_use_file(choir_disk *disk, int fd)
{
    (void)disk, (void)fd;
}

static void bad_close(choir_disk *disk)
{
    bad_disk *b = (bad_disk *)disk;
    b->real->close(b->real);
}

static choir_status step_one(choir_engine *engine, uint32_t token, uint32_t position)
{
    uint32_t pages[] = {0, 1};
    float *logits = calloc(choir_engine_config(engine)->vocab, sizeof *logits);
    choir_span span = {.tokens = &token,
                       .n_tokens = 1,
                       .position = position,
                       .pages = pages,
                       .n_pages = 2,
                       .n_logits = 1,
                       .logits = logits};
    assert_int_equal(choir_engine_step(engine, &span, 1), CHOIR_OK);
    assert_int_equal(choir_engine_n_experts_pinned(engine), 0);
    choir_status status = choir_span_failure(&span);
    assert_int_equal(status, span.status);
    if (status != CHOIR_OK) {
        assert_true(span.missing_expert >= 0 && span.missing_layer >= 0);
        assert_non_null(strstr(choir_error_message(), "cannot be read from disk"));
    }
    free(logits);
    return status;
}

/* FAULTS 1: who needs an expert that cannot be read learns which; the engine lives, and who needs
 * none of them goes on. */
static void test_unreadable_experts(void **state)
{
    (void)state;
    bad_disk bad = {.disk = {"bad", bad_submit, bad_reap, bad_use_memory, bad_use_file, bad_close}};
    assert_int_equal(choir_disk_open(CHOIR_IO_PREAD, 8, &bad.real), CHOIR_OK);
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = 2;
    o.expert_bytes = (uint64_t)64 << 20;
    o.no_prefetch = true;
    o.disk = &bad.disk;
    choir_engine *engine;
    assert_int_equal(choir_engine_open(MODELS "/mixtral", &o, &engine), CHOIR_OK);
    assert_int_equal(step_one(engine, 7, 0), CHOIR_OK);
    bad.all_fail = true;
    assert_int_equal(step_one(engine, 7, 0), CHOIR_OK); /* its experts are in memory */
    uint32_t n_lost = 0;
    for (uint32_t t = 0; t < 30; t++) n_lost += step_one(engine, t, 0) == CHOIR_E_DATA_LOSS;
    assert_in_range(n_lost, 1, 29);
    assert_true(choir_engine_expert_stats(engine).n_failed > 0);
    assert_int_equal(step_one(engine, 7, 0), CHOIR_OK);
    choir_engine_close(engine);
}

/* FAULTS 6: a file that is cut under the server kills nobody. */
static void test_truncated_file(void **state)
{
    (void)state;
    char pack[64];
    make_pack(MODELS "/mixtral", pack, sizeof pack);
    const case_ c = {2, 2, CHOIR_IO_AUTO, false};
    choir_engine *engine = open_engine(pack, &c, true);
    assert_int_equal(step_one(engine, 7, 0), CHOIR_OK);
    assert_int_equal(truncate(pack, 4096), 0);
    uint32_t n_lost = 0;
    for (uint32_t t = 0; t < 10; t++) n_lost += step_one(engine, t, 0) == CHOIR_E_DATA_LOSS;
    assert_true(n_lost > 0);
    choir_engine_close(engine);
    unlink(pack);
}

/* FAULTS 29, and a warm step of a pack takes no memory. */
static void test_memory(void **state)
{
    (void)state;
    char pack[64];
    make_pack(MODELS "/mixtral", pack, sizeof pack);
    choir_engine_options lean = CHOIR_ENGINE_OPTIONS_DEFAULT;
    lean.n_threads = 1;
    lean.max_rows = 16;
    lean.max_spans = 4;
    lean.expert_bytes = (uint64_t)64 << 20;
    lean.io = CHOIR_IO_PREAD;
    open_without_memory(pack, &lean);
    open_without_memory(MODELS "/gpt_oss_mxfp4", &lean);
    lean.io = CHOIR_IO_URING_PLAIN;
    open_without_memory(pack, &lean);
    const case_ c = {2, 2, CHOIR_IO_AUTO, false};
    choir_engine *engine = open_engine(pack, &c, true);
    free(run(engine));
    uint64_t before = choir_memory_n_allocs();
    free(run(engine));
    assert_int_equal(choir_memory_n_allocs(), before);
    choir_engine_close(engine);
    for (uint64_t i = 1; i < 200; i++) { /* packing, too */
        choir_pack_options o = CHOIR_PACK_OPTIONS_DEFAULT;
        o.model = MODELS "/mixtral";
        o.out = pack;
        o.n_threads = 1;
        choir_memory_fail_at(i);
        choir_status status = choir_pack_write(&o);
        choir_memory_fail_at(0);
        if (status != CHOIR_OK) assert_int_equal(status, CHOIR_E_NO_MEMORY);
    }
    unlink(pack);
    strcat(pack, ".partial");
    unlink(pack);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_streamed_is_resident),
        cmocka_unit_test(test_unreadable_experts),
        cmocka_unit_test(test_truncated_file),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
