/* Small copies of rare experts: who is computed from them is settled by the file alone; streamed
 * and resident give the same bits; what is hostile in a file is refused. */
#include "engine/pack_file.h"
#include "tests/engine/sequence.h"
#include "tune/tune.h"

#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmocka.h>

#define MODELS "tests/fixtures/models"

enum { N_TOKENS = 12, N_PAGES = 2 };

static char pack[64], routes[64];

static void name_files(void)
{
    snprintf(pack, sizeof pack, "/tmp/small_test-%ld.choir", (long)getpid());
    snprintf(routes, sizeof routes, "/tmp/small_test-%ld.jsonl", (long)getpid());
}

/* Routes in which expert x took x + 1 of a layer's tokens, or all took one: the first is the
 * rarest. */
static void write_routes(const char *model, bool alike)
{
    choir_model_file *file;
    assert_int_equal(choir_model_file_open(model, &file), CHOIR_OK);
    const choir_model_config *c = choir_model_file_config(file);
    FILE *to = fopen(routes, "w");
    assert_non_null(to);
    for (uint32_t l = 0; l < c->n_layers; l++)
        for (uint32_t x = 0; (c->layers[l] & CHOIR_LAYER_MOE) != 0 && x < c->n_experts; x++)
            for (uint32_t i = 0; i < (alike ? 1 : x + 1); i++)
                fprintf(to, "{\"layer\":%u,\"token\":%u,\"experts\":[%u],\"weights\":[1.0]}\n", l,
                        i, x);
    assert_int_equal(fclose(to), 0);
    choir_model_file_close(file);
}

static choir_pack_options packing(const char *model, choir_dtype small)
{
    choir_pack_options o = CHOIR_PACK_OPTIONS_DEFAULT;
    o.model = model;
    o.out = pack;
    o.small = small;
    o.usage = routes;
    o.n_threads = 2;
    return o;
}

static void make_pack(const char *model, choir_dtype small)
{
    const choir_pack_options o = packing(model, small);
    if (choir_pack_write(&o) != CHOIR_OK) fail_msg("%s: %s", model, choir_error_message());
}

static choir_engine_options serving(double share, uint32_t n_slots)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.n_threads = 2;
    o.max_rows = 64;
    o.small_experts = share;
    o.kv_bytes = (uint64_t)16 << 20;
    if (n_slots > 0) o.expert_bytes = (uint64_t)64 << 20;
    o.max_expert_slots = n_slots;
    return o;
}

/* The logits of some tokens, each expert's (-1: as routed); in steps of `chunk`. */
static float *run(const choir_engine_options *o, int32_t expert, uint32_t chunk, uint64_t *digest)
{
    choir_engine *engine;
    if (choir_engine_open(pack, o, &engine) != CHOIR_OK) fail_msg("%s", choir_error_message());
    uint32_t vocab = choir_engine_config(engine)->vocab, tokens[N_TOKENS];
    float *logits = calloc((size_t)N_TOKENS * vocab, sizeof *logits);
    assert_non_null(logits);
    for (uint32_t i = 0; i < N_TOKENS; i++) tokens[i] = (i * 7919 + 11) % vocab;
    assert_int_equal(choir_engine_force_expert(engine, expert), CHOIR_OK);
    sequence s = sequence_at(engine, 0, N_PAGES);
    sequence_run(&s, tokens, N_TOKENS, chunk, logits);
    if (digest != NULL) *digest = choir_engine_digest(engine);
    choir_engine_close(engine);
    return logits;
}

static bool equal(const float *a, const float *b)
{
    return memcmp(a, b, 64 * sizeof *a) == 0; /* every vocabulary has so many */
}

static bool same(float *a, float *b)
{
    bool are = equal(a, b);
    free(a);
    free(b);
    return are;
}

/* Every family: resident, streamed through few slots and through many; in one step or single
 * tokens. Returns whether the copies made a difference. */
static bool try_model(const char *model, choir_dtype small, double share)
{
    const choir_engine_options resident = serving(share, 0), off = serving(0, 0);
    uint64_t digest, digest_off;
    write_routes(model, false);
    make_pack(model, small);
    float *wanted = run(&resident, -1, N_TOKENS, &digest);
    for (uint32_t chunk = 1; chunk <= N_TOKENS; chunk += N_TOKENS - 1) {
        const choir_engine_options streamed = serving(share, chunk == 1 ? 2 : 60);
        float *got = run(&streamed, -1, chunk, NULL);
        if (!equal(wanted, got))
            fail_msg("%s, share %g, chunk %u: not the resident bits", model, share, chunk);
        free(got);
    }
    bool differ = !same(wanted, run(&off, -1, N_TOKENS, &digest_off));
    assert_int_not_equal(digest, digest_off);
    unlink(pack);
    return differ;
}

static bool is_mixture(const char *model)
{
    choir_model_file *file;
    if (choir_model_file_open(model, &file) != CHOIR_OK) fail_msg("%s", choir_error_message());
    bool is = choir_model_file_config(file)->n_experts > 0;
    choir_model_file_close(file);
    return is;
}

static void test_streamed_is_resident(void **state)
{
    (void)state;
    struct dirent **names;
    int n = scandir(MODELS, &names, NULL, alphasort), n_tried = 0, n_differ = 0;
    for (int i = 0; i < n; i++) {
        char path[400];
        snprintf(path, sizeof path, MODELS "/%s", names[i]->d_name);
        if (names[i]->d_name[0] != '.' && is_mixture(path)) {
            n_differ +=
                n_tried % 2 == 0 ? try_model(path, CHOIR_Q3, 0.5) : try_model(path, CHOIR_Q2, 1);
            n_tried++;
        }
        free(names[i]);
    }
    free(names);
    print_message("%d mixtures, %d with other logits\n", n_tried, n_differ);
    /* Most have rows of no whole blocks, whose copies are as they were. */
    assert_true(n_tried > 30 && n_differ >= 4);
}

/* With one expert for every token, its bits tell whether its copy was used. */
static void test_the_rarest_are_small(void **state)
{
    (void)state;
    static const struct {
        double share;
        bool alike;
        uint32_t first, last; /* the experts that must be small */
    } cases[] = {{0.5, false, 0, 3}, {0.25, false, 0, 1}, {0.5, true, 4, 7}, {1, true, 0, 7}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_routes(MODELS "/mixtral", cases[i].alike);
        make_pack(MODELS "/mixtral", CHOIR_Q3);
        const choir_engine_options o = serving(cases[i].share, 0), none = serving(0, 0),
                                   all = serving(1, 0);
        for (uint32_t x = 0; x < 8; x++) {
            bool small = x >= cases[i].first && x <= cases[i].last;
            int32_t expert = (int32_t)x;
            assert_int_equal(
                same(run(&o, expert, N_TOKENS, NULL), run(&all, expert, N_TOKENS, NULL)), small);
            assert_int_equal(
                same(run(&o, expert, N_TOKENS, NULL), run(&none, expert, N_TOKENS, NULL)), !small);
        }
    }
    unlink(pack);
}

/* Copies in Q4_0 of experts in Q4_0 are those experts. */
static void test_equals_a_pack_of_that_type(void **state)
{
    (void)state;
    write_routes(MODELS "/mixtral", false);
    choir_pack_options o = packing(MODELS "/mixtral", CHOIR_Q4_0);
    o.quant = CHOIR_Q4_0;
    assert_int_equal(choir_pack_write(&o), CHOIR_OK);
    const choir_engine_options none = serving(0, 0), all = serving(1, 0), some = serving(0.5, 3);
    assert_true(same(run(&none, -1, N_TOKENS, NULL), run(&all, -1, N_TOKENS, NULL)));
    assert_true(same(run(&none, -1, N_TOKENS, NULL), run(&some, -1, 1, NULL)));
    unlink(pack);
}

/* A copy's rows are the encoder's, and exact arithmetic is near the codes'. */
static void test_exact(void **state)
{
    (void)state;
    write_routes(MODELS "/mixtral", false);
    make_pack(MODELS "/mixtral", CHOIR_Q2);
    choir_engine_options codes = serving(1, 0), exact = serving(1, 0);
    exact.exact = true;
    float *a = run(&codes, -1, N_TOKENS, NULL), *b = run(&exact, -1, N_TOKENS, NULL);
    for (int i = 0; i < 64; i++) assert_true(fabsf(a[i] - b[i]) < 1e-3F);
    assert_false(same(a, b));
    unlink(pack);
}

static void expect_failure(const char *path, const choir_engine_options *o, choir_status wanted,
                           const char *text)
{
    choir_engine *engine = NULL;
    assert_int_equal(choir_engine_open(path, o, &engine), wanted);
    if (strstr(choir_error_message(), text) == NULL)
        fail_msg("\"%s\" lacks \"%s\"", choir_error_message(), text);
}

static void test_refusals(void **state)
{
    (void)state;
    static const double bad[] = {-0.1, 1.1, NAN, INFINITY};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const choir_engine_options o = serving(bad[i], 0);
        expect_failure(MODELS "/mixtral", &o, CHOIR_E_INVALID, "must be a share from 0 to 1");
    }
    const choir_engine_options half = serving(0.5, 0), all = serving(1, 0);
    expect_failure(MODELS "/mixtral", &half, CHOIR_E_PRECONDITION, "holds no small copies");
    write_routes(MODELS "/mixtral", false);
    choir_pack_options o = packing(MODELS "/mixtral", CHOIR_N_DTYPES);
    assert_int_equal(choir_pack_write(&o), CHOIR_E_INVALID); /* usage alone */
    o.usage = NULL;
    assert_int_equal(choir_pack_write(&o), CHOIR_OK);
    expect_failure(pack, &half, CHOIR_E_PRECONDITION, "holds no small copies");
    o.small = CHOIR_Q3;
    assert_int_equal(choir_pack_write(&o), CHOIR_OK);
    expect_failure(pack, &half, CHOIR_E_PRECONDITION, "does not say which experts are rare");
    free(run(&all, -1, N_TOKENS, NULL)); /* nothing has to be known for that */
    o.usage = MODELS "/mixtral/config.json";
    assert_int_equal(choir_pack_write(&o), CHOIR_E_FORMAT);
    o = packing(MODELS "/llama", CHOIR_Q3);
    assert_int_equal(choir_pack_write(&o), CHOIR_E_INVALID);
    assert_non_null(strstr(choir_error_message(), "it has no experts"));
    o = packing(MODELS "/mixtral", CHOIR_Q8_0);
    assert_int_equal(choir_pack_write(&o), CHOIR_E_INVALID);
    assert_non_null(strstr(choir_error_message(), "can be Q2, Q3 or Q4_0"));
    unlink(pack);
}

/* -- hostile tables -- */

static uint8_t *good, *edited;
static size_t n_bytes;

static void seal(void)
{
    choir_pack_header h;
    memcpy(&h, edited, sizeof h);
    h.tables_hash = XXH3_64bits(edited + CHOIR_PACK_PAGE, h.tables_bytes);
    memcpy(edited, &h, sizeof h);
    uint64_t hash = XXH3_64bits(edited, CHOIR_PACK_HASH_AT);
    memcpy(edited + CHOIR_PACK_HASH_AT, &hash, sizeof hash);
}

/* What opening and loading an edited file says. */
static choir_status try_edited(void)
{
    const choir_engine_options o = serving(1, 0);
    choir_engine *engine = NULL;
    seal();
    FILE *to = fopen(pack, "w");
    assert_non_null(to);
    assert_int_equal(fwrite(edited, 1, n_bytes, to), n_bytes);
    assert_int_equal(fclose(to), 0);
    choir_status status = choir_engine_open(pack, &o, &engine);
    choir_engine_close(engine);
    memcpy(edited, good, n_bytes);
    return status;
}

static void test_hostile_tables(void **state)
{
    (void)state;
    char *data;
    write_routes(MODELS "/mixtral", false);
    make_pack(MODELS "/mixtral", CHOIR_Q3);
    assert_int_equal(choir_file_read(pack, 1 << 26, &data, &n_bytes), CHOIR_OK);
    good = (uint8_t *)data;
    edited = malloc(n_bytes);
    memcpy(edited, good, n_bytes);
    choir_pack_header *h = (choir_pack_header *)edited;
    choir_pack_small *x =
        (choir_pack_small *)(edited + CHOIR_PACK_PAGE + h->n_tensors * sizeof(choir_pack_tensor) +
                             h->n_runs * sizeof(choir_pack_run));
    assert_int_equal(h->version, CHOIR_PACK_VERSION_SMALL);
    assert_int_equal(try_edited(), CHOIR_OK);
    /* One bit of every byte but the usage and the zeros: another place, size, type, layout,
     * checksum. */
    for (size_t i = 0; i < sizeof *x; i++) {
        if (i >= offsetof(choir_pack_small, usage) && i < offsetof(choir_pack_small, dtypes))
            continue;
        if (i >= offsetof(choir_pack_small, reserved) && i < offsetof(choir_pack_small, flags))
            continue;
        ((uint8_t *)x)[i] ^= (uint8_t)(1 << i % 8);
        choir_status status = try_edited();
        if (status != CHOIR_E_FORMAT && status != CHOIR_E_DATA_LOSS)
            fail_msg("byte %zu of a small copy's entry changed: %s", i, choir_status_text(status));
    }
    static const float usages[] = {NAN, -0.5F, 1.5F, INFINITY};
    for (size_t i = 0; i < sizeof usages / sizeof *usages; i++) {
        x[3].usage = usages[i];
        assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    }
    x[0].offset = h->file_bytes;
    assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    x[0].offset = UINT64_MAX - 4095;
    assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    x[0].dtypes[0] = CHOIR_N_DTYPES;
    assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    x[0].dtypes[1] = CHOIR_F32; /* as large as it claims not to be */
    assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    h->flags &= ~(uint32_t)CHOIR_PACK_HAS_USAGE; /* numbers that the file says it has not */
    assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    h->flags |= 4;
    assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    h->version = CHOIR_PACK_VERSION; /* the flag, too, is of version 2 */
    assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    h->version = 3;
    assert_int_equal(try_edited(), CHOIR_E_UNIMPLEMENTED);
    h->n_runs++;
    assert_int_equal(try_edited(), CHOIR_E_FORMAT);
    edited[x[5].offset + 70] ^= 1; /* bytes of a copy */
    assert_int_equal(try_edited(), CHOIR_E_DATA_LOSS);
    free(edited);
    choir_free(data);
    unlink(pack);
}

/* Stopped after every unit and gone on with, the file is the one that is written at once. */
static void test_going_on(void **state)
{
    (void)state;
    char *whole, *resumed;
    size_t bytes, n;
    volatile sig_atomic_t stop = 1;
    write_routes(MODELS "/mixtral", false);
    make_pack(MODELS "/mixtral", CHOIR_Q2);
    assert_int_equal(choir_file_read(pack, 1 << 26, &whole, &bytes), CHOIR_OK);
    unlink(pack);
    choir_pack_options o = packing(MODELS "/mixtral", CHOIR_Q2), other;
    o.interrupted = &stop;
    uint32_t n_calls = 1;
    for (; choir_pack_write(&o) == CHOIR_E_CANCELLED; n_calls++) {
        assert_false(choir_file_exists(pack));
        assert_true(n_calls < 1000);
        if (n_calls != 40) continue;
        other = o; /* a copy in another type is another file, and begins anew */
        other.small = CHOIR_Q3;
        assert_int_equal(choir_pack_write(&other), CHOIR_E_CANCELLED);
    }
    assert_true(n_calls > 60);
    assert_int_equal(choir_file_read(pack, 1 << 26, &resumed, &n), CHOIR_OK);
    assert_int_equal(n, bytes);
    assert_memory_equal(resumed, whole, bytes);
    choir_free(whole);
    choir_free(resumed);
    unlink(pack);
}

static void test_memory(void **state)
{
    (void)state;
    write_routes(MODELS "/mixtral", false);
    make_pack(MODELS "/mixtral", CHOIR_Q3);
    choir_engine_options o = serving(0.5, 4);
    o.n_threads = 1;
    o.max_rows = o.max_spans = 4;
    o.kv_bytes = 0;
    o.expert_bytes = (uint64_t)1 << 20;
    o.io = CHOIR_IO_PREAD;
    open_without_memory(pack, &o);
    choir_pack_options p = packing(MODELS "/mixtral", CHOIR_Q3);
    p.n_threads = 1;
    /* Every allocation of the plan, some of those that each matrix takes. */
    uint32_t n_good = 0, n_failed = 0;
    for (uint64_t i = 1; n_good < 3; i += i < 50 ? 1 : 37) {
        choir_memory_fail_at(i);
        choir_status status = choir_pack_write(&p);
        choir_memory_fail_at(0);
        if (status != CHOIR_OK) assert_int_equal(status, CHOIR_E_NO_MEMORY);
        n_good = status == CHOIR_OK ? n_good + 1 : 0;
        n_failed += status != CHOIR_OK;
    }
    assert_true(n_failed > 50);
    unlink(pack);
    strcat(pack, ".partial");
    unlink(pack);
    name_files();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_streamed_is_resident),
        cmocka_unit_test(test_the_rarest_are_small),
        cmocka_unit_test(test_equals_a_pack_of_that_type),
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_hostile_tables),
        cmocka_unit_test(test_going_on),
        cmocka_unit_test(test_memory),
    };
    name_files();
    int failed = cmocka_run_group_tests_name("engine/small", tests, NULL, NULL);
    unlink(routes);
    return failed;
}
