#include "base/options.h"

#include "base/memory.h"
#include "tests/base/test.h"

#include <unistd.h>

typedef struct values {
    bool fast;
    uint64_t rows, memory;
    double heat;
    const char *config, *text;
    choir_option_list listen;
} values;
static const values defaults = {.rows = 32, .heat = 0.5, .text = "abc"};
static const choir_option table[] = {
    {"fast", 'f', CHOIR_OPTION_FLAG, offsetof(values, fast), NULL, "go fast", 0, 0},
    {"max-rows", 'n', CHOIR_OPTION_COUNT, offsetof(values, rows), "N", "rows", 1, 100000},
    {"memory", 0, CHOIR_OPTION_SIZE, offsetof(values, memory), "8GiB", "budget", 0, 0},
    {"heat", 0, CHOIR_OPTION_REAL, offsetof(values, heat), "T", "heat", -1, 2},
    {"text", 0, CHOIR_OPTION_TEXT, offsetof(values, text), "TEXT", "text", 0, 0},
    {"listen", 0, CHOIR_OPTION_LIST, offsetof(values, listen), "ADDR", "addresses", 0, 0},
    {"config", 0, CHOIR_OPTION_TEXT, offsetof(values, config), "FILE", "config", 0, 0},
};
enum { N = sizeof table / sizeof *table };

static values got;
static choir_arguments arguments;

/* Parses the words behind the verb; NULL ends them. */
static choir_status parse(const char *first, ...)
{
    char *argv[32] = {(char *)"verb"};
    int argc = 1;
    va_list list;
    va_start(list, first);
    for (const char *word = first; word != NULL; word = va_arg(list, const char *))
        argv[argc++] = (char *)word;
    va_end(list);
    choir_options_free(&arguments);
    got = defaults;
    return choir_options_parse(table, N, argc, argv, &got, &arguments);
}

static const char *config_file(const char *json)
{
    static char path[64];
    strcpy(path, "/tmp/choir-options-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, json, strlen(json)), (ssize_t)strlen(json));
    close(fd);
    return path;
}

static void test_every_kind(void **state)
{
    (void)state;
    assert_int_equal(parse("MODEL", "-f", "--max-rows", "2K", "--memory=8GiB", "--heat", "-0.25",
                           "--text", "", "--listen", "a", "more", "--listen", "b", NULL),
                     CHOIR_OK);
    assert_true(got.fast);
    assert_int_equal(got.rows, 2048);
    assert_int_equal(got.memory, (uint64_t)8 << 30);
    assert_float_equal(got.heat, -0.25, 0);
    assert_string_equal(got.text, "");
    assert_int_equal(got.listen.n, 2);
    assert_string_equal(got.listen.item[1], "b");
    assert_int_equal(arguments.n_positional, 2);
    assert_string_equal(arguments.positional[1], "more");
    assert_int_equal(arguments.origin[0], CHOIR_FROM_COMMAND);
    assert_int_equal(arguments.origin[6], CHOIR_FROM_DEFAULT);
}

static void test_two_dashes_end_the_options(void **state)
{
    (void)state;
    assert_int_equal(parse("--", "--fast", "-n", NULL), CHOIR_OK);
    assert_false(got.fast);
    assert_int_equal(arguments.n_positional, 2);
    assert_string_equal(arguments.positional[0], "--fast");
}

static void test_sizes(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {{"0", 0},        {"512", 512},         {"512B", 512},
                {"1K", 1024},    {"1.5KiB", 1536},     {"3MB", 3 << 20},
                {"2M", 2 << 20}, {"1TiB", 1ull << 40}, {"8G", 8ull << 30}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(parse("--memory", good[i].text, NULL), CHOIR_OK);
        assert_int_equal(got.memory, good[i].bytes);
    }
    static const char *const bad[] = {"",     "x",   "-1",    "1X",    "8 GiB",
                                      "0x10", "1e3", "nan",   "inf",   " 1",
                                      "1.5",  "K",   "8GiBs", "1.1.1", "99999999TiB"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(parse("--memory", bad[i], NULL), CHOIR_E_INVALID);
        ASSERT_SAYS("--memory");
    }
}

static void test_limits_are_told(void **state)
{
    (void)state;
    assert_int_equal(parse("--max-rows", "0", NULL), CHOIR_E_INVALID);
    assert_string_equal(choir_error_message(), "--max-rows is 0, must be 1 to 100000");
    assert_int_equal(parse("--heat", "2.5", NULL), CHOIR_E_INVALID);
    ASSERT_SAYS("--heat is 2.5, must be -1 to 2");
    assert_int_equal(parse("--heat", "warm", NULL), CHOIR_E_INVALID);
    assert_int_equal(parse("--heat", "nan", NULL), CHOIR_E_INVALID);
}

static void test_unknown_flags_name_the_nearest(void **state)
{
    (void)state;
    assert_int_equal(parse("--memry", "8GiB", NULL), CHOIR_E_INVALID);
    assert_string_equal(choir_error_message(),
                        "'memry' is no option here; the nearest is --memory");
    assert_int_equal(parse("--liste=5", NULL), CHOIR_OK); /* a unique beginning will do */
    assert_int_equal(parse("--lisent=5", NULL), CHOIR_E_INVALID);
    ASSERT_SAYS("--listen");
    assert_int_equal(parse("-z", NULL), CHOIR_E_INVALID);
    ASSERT_SAYS("'-z'");
    assert_int_equal(parse("--fast=1", NULL), CHOIR_E_INVALID);
    ASSERT_SAYS("--fast takes no value");
    assert_int_equal(parse("--heat", NULL), CHOIR_E_INVALID);
    ASSERT_SAYS("--heat needs a value");
    char huge[10000];
    memset(huge, 'a', sizeof huge - 1);
    huge[sizeof huge - 1] = '\0';
    huge[0] = huge[1] = '-';
    assert_int_equal(parse(huge, NULL), CHOIR_E_INVALID);
}

static void test_config_lies_below_the_command_line(void **state)
{
    (void)state;
    const char *path =
        config_file("{\"max-rows\": 7, \"memory\": \"1GiB\", \"fast\": true, \"heat\": 1.5,"
                    " \"listen\": [\"x\", \"y\"], \"text\": \"from file\"}");
    assert_int_equal(parse("--max-rows", "9", "--listen", "z", "--config", path, NULL), CHOIR_OK);
    assert_int_equal(got.rows, 9);
    assert_int_equal(got.memory, 1 << 30);
    assert_true(got.fast);
    assert_int_equal(got.listen.n, 1);
    assert_string_equal(got.listen.item[0], "z");
    assert_string_equal(got.text, "from file");
    assert_int_equal(arguments.origin[1], CHOIR_FROM_COMMAND);
    assert_int_equal(arguments.origin[2], CHOIR_FROM_FILE);
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    choir_options_print_resolved(table, N, &got, &arguments, out);
    fclose(out);
    assert_non_null(strstr(text, "max-rows = 9 (command line)"));
    assert_non_null(strstr(text, "memory = 1GiB (config file)"));
    assert_non_null(strstr(text, "fast = on (config file)"));
    assert_non_null(strstr(text, "listen = z (command line)"));
    free(text);
    unlink(path);
}

static void test_bad_config_files(void **state)
{
    (void)state;
    static const struct {
        const char *json, *says;
    } bad[] = {
        {"{\"max-row\": 7}", "the nearest is --max-rows"},
        {"{\"max-rows\": 0}", "must be 1 to 100000"},
        {"{\"max-rows\": []}", "wrong type"},
        {"{\"fast\": \"yes\"}", "wrong type"},
        {"{\"text\": 5}", "must be a text"},
        {"{\"listen\": [5]}", "must list texts"},
        {"{\"fast\": true, \"fast\": false}", "line 1"},
        {"[1]", "must be a JSON object"},
        {"{\"max-rows\": 7,\n", "line 2"},
        {"", "line 1"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *path = config_file(bad[i].json);
        assert_int_equal(parse("--config", path, NULL), CHOIR_E_INVALID);
        ASSERT_SAYS(bad[i].says);
        ASSERT_SAYS(path);
        unlink(path);
    }
    assert_int_equal(parse("--config=/nowhere", NULL), CHOIR_E_NOT_FOUND);
}

static void test_many_values(void **state)
{
    (void)state;
    char *argv[300] = {(char *)"verb"};
    for (int i = 1; i < 300; i++) argv[i] = (char *)(i % 2 ? "--listen" : "a");
    got = defaults;
    choir_options_free(&arguments);
    assert_int_equal(choir_options_parse(table, N, 299, argv, &got, &arguments), CHOIR_E_INVALID);
    ASSERT_SAYS("more than 64 times");
    for (int i = 1; i < 300; i++) argv[i] = (char *)"m";
    got = defaults;
    choir_options_free(&arguments);
    assert_int_equal(choir_options_parse(table, N, 299, argv, &got, &arguments), CHOIR_E_INVALID);
    ASSERT_SAYS("more than 64 arguments");
}

static void test_help_has_every_option_and_default(void **state)
{
    (void)state;
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    choir_options_print_help(table, N, &defaults, out);
    fclose(out);
    for (int i = 0; i < N; i++) assert_non_null(strstr(text, table[i].name));
    assert_non_null(strstr(text, "-n, --max-rows N"));
    assert_non_null(strstr(text, "rows [32]"));
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_kind),
        cmocka_unit_test(test_two_dashes_end_the_options),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_limits_are_told),
        cmocka_unit_test(test_unknown_flags_name_the_nearest),
        cmocka_unit_test(test_config_lies_below_the_command_line),
        cmocka_unit_test(test_bad_config_files),
        cmocka_unit_test(test_many_values),
        cmocka_unit_test(test_help_has_every_option_and_default),
    };
    int code = cmocka_run_group_tests(tests, NULL, NULL);
    choir_options_free(&arguments);
    return code;
}
