/* Versions on disk: the same bits back, and nothing that is damaged or made up. */
#include "router/learn/version.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include <setjmp.h>

#include <cmocka.h>

static char folder[] = "/tmp/choir-version-XXXXXX";

static choir_version make(void)
{
    choir_version v = {
        .learnt_to = 77, .n_learnt = 60, .feature_seed = UINT64_MAX, .n_blocks = 1, .n_plans = 3};
    strcpy(v.model, "m\"ü");
    strcpy(v.plans[1].name, "legal");
    strcpy(v.plans[2].name, "legal=0.5,code=0.5");
    v.plans[2].digest = 0x8000000000000001;
    v.policy.kind = CHOIR_ROUTING_GREEDY;
    choir_reward_init(&v.policy.model, 3);
    for (uint32_t a = 0; a < 3; a++) {
        v.policy.model.n_events[a] = 20;
        for (uint32_t d = 0; d < CHOIR_N_FEATURES; d++)
            v.policy.model.theta[a][d] = choir_uniform(a, d) / 3 - 0.1;
    }
    return v;
}

static char *path_of(const char *digest)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s.json", folder, digest);
    return path;
}

static void test_round_trip(void **state)
{
    (void)state;
    const choir_version v = make();
    choir_version back;
    char digest[CHOIR_DIGEST_TEXT], again[CHOIR_DIGEST_TEXT];
    assert_int_equal(choir_version_save(folder, &v, digest), CHOIR_OK);
    assert_int_equal(choir_version_load(folder, digest, &back), CHOIR_OK);
    assert_memory_equal(&v, &back, sizeof v);
    assert_int_equal(choir_version_save(folder, &back, again), CHOIR_OK);
    assert_string_equal(digest, again);
    back.learnt_to++;
    assert_int_equal(choir_version_save(folder, &back, again), CHOIR_OK);
    assert_string_not_equal(digest, again);
}

static void write_all(const char *path, const char *bytes, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
}

static void test_damage(void **state)
{
    (void)state;
    const choir_version v = make();
    choir_version back;
    char digest[CHOIR_DIGEST_TEXT];
    char *bytes;
    size_t n;
    assert_int_equal(choir_version_save(folder, &v, digest), CHOIR_OK);
    assert_int_equal(choir_file_read(path_of(digest), 1 << 20, &bytes, &n), CHOIR_OK);
    for (size_t at = 0; at < n; at += 1 + n / 97) {
        bytes[at] ^= 1;
        write_all(path_of(digest), bytes, n);
        assert_int_equal(choir_version_load(folder, digest, &back), CHOIR_E_FORMAT);
        assert_non_null(strstr(choir_error_message(), "damaged"));
        bytes[at] ^= 1;
        write_all(path_of(digest), bytes, at);
        assert_int_equal(choir_version_load(folder, digest, &back), CHOIR_E_FORMAT);
    }
    write_all(path_of(digest), bytes, n);
    assert_int_equal(choir_version_load(folder, digest, &back), CHOIR_OK);
    choir_free(bytes);
    assert_int_equal(choir_version_load(folder, "../../etc/passwd", &back), CHOIR_E_FORMAT);
    assert_int_equal(choir_version_load(folder, "0123456789abcdef0123456789abcdef", &back),
                     CHOIR_E_NOT_FOUND);
}

/* A file under its right name whose words were exchanged. */
static choir_status load_changed(const char *from, const char *to)
{
    const choir_version v = make();
    choir_version back;
    char digest[CHOIR_DIGEST_TEXT], *text, *changed;
    size_t n;
    assert_int_equal(choir_version_save(folder, &v, digest), CHOIR_OK);
    assert_int_equal(choir_file_read(path_of(digest), 1 << 20, &text, &n), CHOIR_OK);
    const char *at = strstr(text, from);
    assert_non_null(at);
    assert_true(asprintf(&changed, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from)) > 0);
    XXH128_hash_t h = XXH3_128bits(changed, strlen(changed));
    snprintf(digest, sizeof digest, "%016" PRIx64 "%016" PRIx64, h.high64, h.low64);
    write_all(path_of(digest), changed, strlen(changed));
    choir_free(text);
    free(changed);
    return choir_version_load(folder, digest, &back);
}

static void test_hostile(void **state)
{
    (void)state;
    static const char *const changes[][2] = {
        {"\"choir_router\": 1", "\"choir_router\": 2"},
        {"\"choir_router\": 1", "\"choir_router\": \"1\""},
        {"\"learnt_to\": 77", "\"learnt_to\": -1"},
        {"\"learnt_to\": 77", "\"learnt_to\": 1e3"},
        {"\"greedy\"", "\"greedier\""},
        {"\"greedy\"", "null"},
        {"\"plan\": 0", "\"plan\": 3"},
        {"\"prior\": 0.5", "\"prior\": 1.5"},
        {"\"mean\": [", "\"mean\": [1.0,"},
        {"\"mean\": [", "\"mean\": [[],"},
        {"\"theta\": [", "\"theta\": [1e300,"},
        {"\"events\": 20", "\"events\": 20.5"},
        {"\"legal\"", "\"le\\u0000gal\""},
        {"\"feature_seed\": \"ffff", "\"feature_seed\": \"-fff"},
        {"\"feature_blocks\": 1", "\"feature_blocks\": 4294967297"},
        {"{", "[{"},
        {"\"parent\": \"\"", "\"parent\": \"0123456789abcdef0123456789abcdef0\""},
    };
    assert_int_equal(load_changed("\"learnt_to\": 77", "\"learnt_to\": 78"), CHOIR_OK);
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++)
        if (load_changed(changes[i][0], changes[i][1]) != CHOIR_E_FORMAT)
            fail_msg("\"%s\" was taken for \"%s\"", changes[i][1], changes[i][0]);
}

static int make_folder(void **state)
{
    (void)state;
    return mkdtemp(folder) == NULL;
}

static int remove_folder(void **state)
{
    (void)state;
    DIR *d = opendir(folder);
    char path[512];
    for (struct dirent *f; (f = readdir(d)) != NULL;) {
        snprintf(path, sizeof path, "%s/%s", folder, f->d_name);
        if (f->d_name[0] != '.') remove(path);
    }
    closedir(d);
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_damage),
        cmocka_unit_test(test_hostile),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
