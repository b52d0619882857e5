/* A configuration file for a table with every kind of option, and behind a zero byte one
 * command-line argument: parsed or refused; values keep to their limits. */
#include "tests/fuzz/two_files.h"

typedef struct values {
    const char *config, *name;
    choir_option_list listen;
    uint64_t count, size;
    double share;
    bool quiet;
} values;

static const choir_option table[] = {
    {"config", 0, CHOIR_OPTION_TEXT, offsetof(values, config), "FILE", "", 0, 0},
    {"name", 'n', CHOIR_OPTION_TEXT, offsetof(values, name), "TEXT", "", 0, 0},
    {"listen", 0, CHOIR_OPTION_LIST, offsetof(values, listen), "ADDRESS", "", 0, 0},
    {"count", 0, CHOIR_OPTION_COUNT, offsetof(values, count), "N", "", 1, 1000},
    {"size", 's', CHOIR_OPTION_SIZE, offsetof(values, size), "8GiB", "", 0, 0},
    {"share", 0, CHOIR_OPTION_REAL, offsetof(values, share), "P", "", 0, 1},
    {"quiet", 'q', CHOIR_OPTION_FLAG, offsetof(values, quiet), NULL, "", 0, 0},
};
enum { N_OPTIONS = sizeof table / sizeof *table };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static FILE *nowhere;
    if (nowhere == NULL) nowhere = fopen("/dev/null", "w");
    write_two_files("config.json", "argument", data, bytes);
    const uint8_t *zero = bytes > 0 ? memchr(data, 0, bytes) : NULL;
    char verb[] = "verb", flag[] = "--config", argument[64] = "";
    if (zero != NULL) {
        size_t n = bytes - (size_t)(zero + 1 - data);
        snprintf(argument, sizeof argument, "%.*s", (int)(n < 63 ? n : 63), (const char *)zero + 1);
    }
    char *argv[] = {verb, flag, two_files.path[0], argument, NULL};
    values v = {.count = 5};
    choir_arguments a;
    choir_status status =
        choir_options_parse(table, N_OPTIONS, argument[0] != '\0' ? 4 : 3, argv, &v, &a);
    CHOIR_ASSERT(status == CHOIR_OK || status == CHOIR_E_INVALID || status == CHOIR_E_FORMAT ||
                 status == CHOIR_E_NO_MEMORY || status == CHOIR_E_NOT_FOUND ||
                 status == CHOIR_E_IO);
    if (status != CHOIR_OK) return 0;
    CHOIR_ASSERT(v.count >= 1 && v.count <= 1000 && v.share >= 0 && v.share <= 1);
    choir_options_print_resolved(table, N_OPTIONS, &v, &a, nowhere);
    choir_options_free(&a);
    return 0;
}
