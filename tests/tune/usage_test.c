/* Routes are read as anybody's: counted where they are right, refused by line where they are not.
 */
#include "tune/usage.h"

#include "base/base.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { LAYERS = 3, EXPERTS = 4 };

static char path[64];
static choir_model_config config;

static void write_bytes(const char *text, size_t n)
{
    FILE *to = fopen(path, "w");
    assert_non_null(to);
    assert_int_equal(fwrite(text, 1, n, to), n);
    assert_int_equal(fclose(to), 0);
}

static choir_status read_text(const char *text, float *usage)
{
    write_bytes(text, strlen(text));
    return choir_usage_read(path, &config, usage);
}

#define LINE(layer, experts, weights)                                                              \
    "{\"layer\":" #layer ",\"token\":0,\"experts\":" experts ",\"weights\":" weights "}\n"
#define GOOD LINE(1, "[0,2]", "[0.5,0.5]") LINE(1, "[2]", "[1]") LINE(2, "[3]", "[1.0]")

static void shares_are_counted(void **state)
{
    (void)state;
    float usage[LAYERS * EXPERTS];
    static const float wanted[] = {0, 0, 0, 0, 0.5F, 0, 1, 0, 0, 0, 0, 1};
    assert_int_equal(read_text(GOOD, usage), CHOIR_OK);
    assert_memory_equal(usage, wanted, sizeof wanted);
    char no_newline[sizeof GOOD] = GOOD;
    no_newline[sizeof GOOD - 2] = '\0';
    memset(usage, 0, sizeof usage);
    assert_int_equal(read_text(no_newline, usage), CHOIR_OK);
    assert_memory_equal(usage, wanted, sizeof wanted);
}

static void bad_lines_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *line, *text;
    } cases[] = {
        {"\n", "no JSON object"},
        {"[]\n", "no JSON object"},
        {"{\"layer\":1\n", "no JSON object"},
        {"{\"layer\":1,\"layer\":2,\"token\":0,\"experts\":[1],\"weights\":[1]}\n",
         "no JSON object"},
        {"{}\n", "\"layer\" is no layer"},
        {LINE(0, "[1]", "[1]"), "\"layer\" is no layer"}, /* a dense one */
        {LINE(3, "[1]", "[1]"), "\"layer\" is no layer"},
        {LINE(-1, "[1]", "[1]"), "\"layer\" is no layer"},
        {LINE(4294967297, "[1]", "[1]"), "\"layer\" is no layer"},
        {LINE(1.0, "[1]", "[1]"), "\"layer\" is no layer"},
        {LINE("1", "[1]", "[1]"), "\"layer\" is no layer"},
        {"{\"layer\":1,\"token\":-1,\"experts\":[1],\"weights\":[1]}\n", "\"token\""},
        {"{\"layer\":1,\"experts\":[1],\"weights\":[1]}\n", "\"token\""},
        {LINE(1, "[]", "[]"), "same length"},
        {LINE(1, "7", "[1]"), "same length"},
        {LINE(1, "[1]", "[1,2]"), "same length"},
        {LINE(1, "[0,1,2,3,0]", "[1,1,1,1,1]"), "same length"},
        {LINE(1, "[4]", "[1]"), "no expert's number"},
        {LINE(1, "[-1]", "[1]"), "no expert's number"},
        {LINE(1, "[1.5]", "[1]"), "no expert's number"},
        {LINE(1, "[2,2]", "[1,1]"), "twice"},
        {LINE(1, "[2]", "[null]"), "what is no number"},
        {LINE(1, "[2]", "[1]") "x", "line 5"},
    };
    float usage[LAYERS * EXPERTS];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[1000];
        snprintf(text, sizeof text, "%s%s", GOOD, cases[i].line);
        choir_status status = read_text(text, usage);
        const char *message = choir_error_message();
        if (status != CHOIR_E_FORMAT || strstr(message, cases[i].text) == NULL ||
            strstr(message, i + 1 < sizeof cases / sizeof *cases ? "line 4" : "line 5") == NULL)
            fail_msg("%s: %s, %s", cases[i].line, choir_status_text(status), message);
    }
}

static void bad_files_are_refused(void **state)
{
    (void)state;
    float usage[LAYERS * EXPERTS];
    assert_int_equal(read_text("", usage), CHOIR_E_FORMAT);
    assert_int_equal(read_text(LINE(1, "[0]", "[1]"), usage), CHOIR_E_FORMAT);
    assert_non_null(strstr(choir_error_message(), "nothing about layer 2"));
    size_t n = 200 << 10; /* a line that is longer than any, and one with a NUL byte */
    char *text = malloc(n);
    memset(text, ' ', n);
    write_bytes(text, n);
    assert_int_equal(choir_usage_read(path, &config, usage), CHOIR_E_FORMAT);
    assert_non_null(strstr(choir_error_message(), "too long"));
    memcpy(text, GOOD, sizeof GOOD);
    write_bytes(text, sizeof GOOD + 10);
    assert_int_equal(choir_usage_read(path, &config, usage), CHOIR_E_FORMAT);
    memcpy(text + 20, "\0", 1);
    write_bytes(text, sizeof GOOD - 1);
    assert_int_equal(choir_usage_read(path, &config, usage), CHOIR_E_FORMAT);
    memset(text, '[', n);
    write_bytes(text, 60000);
    assert_int_equal(choir_usage_read(path, &config, usage), CHOIR_E_FORMAT);
    free(text);
    assert_int_equal(choir_usage_read("/nowhere", &config, usage), CHOIR_E_IO);
    assert_int_equal(choir_usage_read("/tmp", &config, usage), CHOIR_E_IO);
    for (uint64_t i = 1; i < 4; i++) {
        write_bytes(GOOD, sizeof GOOD - 1);
        choir_memory_fail_at(i);
        choir_status status = choir_usage_read(path, &config, usage);
        choir_memory_fail_at(0);
        assert_int_equal(status, CHOIR_E_NO_MEMORY);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shares_are_counted),
        cmocka_unit_test(bad_lines_are_refused),
        cmocka_unit_test(bad_files_are_refused),
    };
    snprintf(path, sizeof path, "/tmp/usage_test-%ld.jsonl", (long)getpid());
    config.n_layers = LAYERS;
    config.n_experts = EXPERTS;
    config.layers[1] = config.layers[2] = CHOIR_LAYER_MOE;
    int failed = cmocka_run_group_tests_name("tune/usage", tests, NULL, NULL);
    unlink(path);
    return failed;
}
