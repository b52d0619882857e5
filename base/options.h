/* WHAT    One table of options feeds a struct, the command line (getopt_long), a config file (JSON) and
 *         the help; and remembers where each value came from.
 * OWNS    Nothing: texts point into argv or into the config, which lives until choir_options_free.
 * THREADS One.
 * ERRORS  CHOIR_E_INVALID: a sentence with the flag, the value, the limits; for an unknown flag the nearest.
 * LIMITS  64 options, 64 positional arguments, lists of 64.
 * NEXT    cli/cli.h */
#pragma once
#include "base/error.h"
#include <stdio.h>

typedef enum choir_option_kind {
    CHOIR_OPTION_FLAG,  /* bool */
    CHOIR_OPTION_COUNT, /* uint64_t; "32K" is 32768; a default of UINT64_MAX shows as not set */
    CHOIR_OPTION_SIZE,  /* uint64_t bytes; "8GiB", "512M" */
    CHOIR_OPTION_REAL,  /* double */
    CHOIR_OPTION_TEXT,  /* const char * */
    CHOIR_OPTION_LIST,  /* choir_option_list; may be given several times */
} choir_option_kind;

enum { CHOIR_MAX_OPTIONS = 64, CHOIR_MAX_LIST = 64 };

typedef struct choir_option_list {
    const char *item[CHOIR_MAX_LIST];
    uint32_t n;
} choir_option_list;

typedef struct choir_option {
    const char *name; /* "max-num-seqs"; on the command line --max-num-seqs */
    char letter;      /* 'n' for -n; 0: none */
    choir_option_kind kind;
    size_t offset;      /* of the member in the caller's struct */
    const char *value;  /* "N", "FILE"; for the help */
    const char *help;   /* one line; the default is added from the struct */
    double min, max;    /* COUNT, SIZE, REAL; both 0: no limits */
} choir_option;

typedef enum choir_origin { CHOIR_FROM_DEFAULT, CHOIR_FROM_FILE, CHOIR_FROM_COMMAND } choir_origin;

typedef struct choir_arguments {
    const char *positional[CHOIR_MAX_LIST];
    uint32_t n_positional;
    choir_origin origin[CHOIR_MAX_OPTIONS];
    void *config; /* the parsed file, holds its texts */
} choir_arguments;

/* `values` holds the defaults and gets the rest. argv[0] is the verb. If the table has an option named
 * "config" of kind TEXT, that file's values are applied below the command line's. */
choir_status choir_options_parse(const choir_option *table, uint32_t n, int argc, char **argv,
                                 void *values, choir_arguments *out) CHOIR_MUST_USE;
void choir_options_free(choir_arguments *arguments);

void choir_options_print_help(const choir_option *table, uint32_t n, const void *defaults, FILE *to);
/* "max-num-seqs = 32 (command line)", one a line: the configuration as it was understood; "-" is what
 * is not set, and the values of "api-key" are not shown. */
void choir_options_print_resolved(const choir_option *table, uint32_t n, const void *values,
                                  const choir_arguments *arguments, FILE *to);
/* Levenshtein distance; of names longer than 62 bytes the first 62 count. */
int choir_edit_distance(const char *a, const char *b);
/* The name closest to `name` by edit distance. */
const char *choir_nearest(const char *name, const char *const *names, uint32_t n);
