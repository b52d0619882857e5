#include "base/options.h"

#include "base/file.h"

#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CONFIG_BYTES = 1 << 20, FIRST_LONG = 256 };

static void *member(void *values, const choir_option *o)
{
    return (char *)values + o->offset;
}

int choir_edit_distance(const char *a, const char *b)
{
    int row[64], n = (int)strlen(b);
    if (n > 62) n = 62;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 0; a[i] != '\0' && i < 62; i++) {
        int diagonal = row[0];
        row[0] = i + 1;
        for (int j = 1; j <= n; j++) {
            int up = row[j], best = diagonal + (a[i] != b[j - 1]);
            if (up + 1 < best) best = up + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
            diagonal = up;
        }
    }
    return row[n];
}

const char *choir_nearest(const char *name, const char *const *names, uint32_t n)
{
    const char *best = n > 0 ? names[0] : "";
    for (uint32_t i = 1; i < n; i++)
        if (choir_edit_distance(name, names[i]) < choir_edit_distance(name, best)) best = names[i];
    return best;
}

static choir_status check_range(const choir_option *o, double value, const char *text)
{
    if (o->min == 0 && o->max == 0) return CHOIR_OK;
    if (value >= o->min && value <= o->max) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "--%s is %.80s, must be %.10g to %.10g", o->name, text,
                      o->min, o->max);
}

/* "32", "32K", "8GiB", "1.5M": powers of 1024. */
static choir_status parse_count(const choir_option *o, const char *text, uint64_t *out)
{
    static const char suffixes[] = "KMGT";
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    /* strtod alone would also take "0x10", "1e3", "inf" and leading blanks. */
    size_t digits = strspn(text, "0123456789.");
    bool good = digits > 0 && end == text + digits && errno == 0 && isfinite(value);
    if (good && *end != '\0') {
        const char *suffix = strchr(suffixes, *end);
        good = suffix != NULL;
        if (good) {
            value = ldexp(value, 10 * (int)(suffix - suffixes + 1));
            end++;
            if (o->kind == CHOIR_OPTION_SIZE && end[0] == 'i') end++;
            if (o->kind == CHOIR_OPTION_SIZE && end[0] == 'B') end++;
        } else if (o->kind == CHOIR_OPTION_SIZE && strcmp(end, "B") == 0) {
            good = true;
            end++;
        }
    }
    /* Above 2^53 a double no longer holds every whole number. */
    if (!good || *end != '\0' || value != floor(value) || value > 9007199254740992.0)
        return choir_fail(CHOIR_E_INVALID, "--%s is '%.80s', must be a whole number%s", o->name,
                          text, o->kind == CHOIR_OPTION_SIZE ? " of bytes, like 8GiB or 512M" : "");
    CHOIR_TRY(check_range(o, value, text));
    *out = (uint64_t)value;
    return CHOIR_OK;
}

static choir_status parse_real(const choir_option *o, const char *text, double *out)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !isfinite(value))
        return choir_fail(CHOIR_E_INVALID, "--%s is '%.80s', must be a number", o->name, text);
    CHOIR_TRY(check_range(o, value, text));
    *out = value;
    return CHOIR_OK;
}

static choir_status set_value(const choir_option *o, const char *text, void *values)
{
    void *to = member(values, o);
    choir_option_list *list = to;
    switch (o->kind) {
    case CHOIR_OPTION_FLAG:
        *(bool *)to = true;
        return CHOIR_OK;
    case CHOIR_OPTION_COUNT:
    case CHOIR_OPTION_SIZE:
        return parse_count(o, text, to);
    case CHOIR_OPTION_REAL:
        return parse_real(o, text, to);
    case CHOIR_OPTION_TEXT:
        *(const char **)to = text;
        return CHOIR_OK;
    case CHOIR_OPTION_LIST:
        if (list->n == CHOIR_MAX_LIST)
            return choir_fail(CHOIR_E_INVALID, "--%s is given more than %d times", o->name,
                              CHOIR_MAX_LIST);
        list->item[list->n++] = text;
        return CHOIR_OK;
    }
    return CHOIR_OK;
}

static const choir_option *find_option(const choir_option *table, uint32_t n, const char *name)
{
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(table[i].name, name) == 0) return &table[i];
    return NULL;
}

static choir_status unknown(const choir_option *table, uint32_t n, const char *name,
                            const char *where)
{
    const char *names[CHOIR_MAX_OPTIONS];
    for (uint32_t i = 0; i < n; i++) names[i] = table[i].name;
    return choir_fail(CHOIR_E_INVALID, "%s'%.80s' is no option here; the nearest is --%s", where,
                      name, choir_nearest(name, names, n));
}

/* One value of the config file; numbers are taken as JSON writes them, sizes also as "8GiB". */
static choir_status set_from_file(const choir_option *o, json_t *value, void *values)
{
    char number[64];
    if (o->kind == CHOIR_OPTION_FLAG && json_is_boolean(value)) {
        *(bool *)member(values, o) = json_is_true(value);
        return CHOIR_OK;
    }
    if (o->kind == CHOIR_OPTION_LIST && json_is_array(value)) {
        for (size_t i = 0; i < json_array_size(value); i++) {
            if (!json_is_string(json_array_get(value, i)))
                return choir_fail(CHOIR_E_INVALID, "'%s' must list texts", o->name);
            CHOIR_TRY(set_value(o, json_string_value(json_array_get(value, i)), values));
        }
        return CHOIR_OK;
    }
    if (o->kind == CHOIR_OPTION_FLAG || (!json_is_string(value) && !json_is_number(value)))
        return choir_fail(CHOIR_E_INVALID, "'%s' has a value of the wrong type", o->name);
    if (json_is_string(value)) return set_value(o, json_string_value(value), values);
    if (o->kind == CHOIR_OPTION_TEXT || o->kind == CHOIR_OPTION_LIST)
        return choir_fail(CHOIR_E_INVALID, "'%s' must be a text", o->name);
    snprintf(number, sizeof number, "%.17g", json_number_value(value));
    return set_value(o, number, values);
}

static choir_status read_config(const choir_option *table, uint32_t n, const char *path,
                                void *values, choir_arguments *out)
{
    char *text;
    size_t bytes;
    json_error_t error;
    CHOIR_TRY(choir_file_read(path, MAX_CONFIG_BYTES, &text, &bytes));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    choir_free(text);
    out->config = root;
    if (!json_is_object(root))
        return choir_fail(CHOIR_E_INVALID, "%s, line %d: %s", path, root == NULL ? error.line : 1,
                          root == NULL ? error.text : "must be a JSON object of options");
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value)
    {
        const choir_option *o = find_option(table, n, key);
        char where[300];
        snprintf(where, sizeof where, "%.250s: ", path);
        if (o == NULL) return unknown(table, n, key, where);
        choir_status status = set_from_file(o, value, values);
        if (status != CHOIR_OK) return choir_fail_in(status, "%s", path);
        out->origin[o - table] = CHOIR_FROM_FILE;
    }
    return CHOIR_OK;
}

/* --config is needed before the others, so that they lie above it. */
static const char *find_config(int argc, char **argv)
{
    const char *path = NULL;
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (strcmp(argv[i], "--config") == 0 && i + 1 < argc) path = argv[i + 1];
        if (strncmp(argv[i], "--config=", 9) == 0) path = argv[i] + 9;
    }
    return path;
}

/* getopt refused argv[optind - 1]: a letter or a name it does not know, or "--flag=value". */
static choir_status refused(const choir_option *table, uint32_t n, char **argv)
{
    char name[100];
    if (optopt >= FIRST_LONG)
        return choir_fail(CHOIR_E_INVALID, "--%s takes no value", table[optopt - FIRST_LONG].name);
    if (optopt != 0)
        return choir_fail(CHOIR_E_INVALID, "'-%c' is no option here; see --help", optopt);
    const char *given = argv[optind - 1];
    while (*given == '-') given++;
    snprintf(name, sizeof name, "%.*s", (int)strcspn(given, "="), given);
    return unknown(table, n, name, "");
}

static choir_status take_option(const choir_option *table, uint32_t n, int found, char **argv,
                                void *values, choir_arguments *out)
{
    if (found == '?') return refused(table, n, argv);
    if (found == ':') return choir_fail(CHOIR_E_INVALID, "%s needs a value", argv[optind - 1]);
    for (uint32_t i = 0; i < n; i++) {
        if (found != FIRST_LONG + (int)i && (table[i].letter == 0 || found != table[i].letter))
            continue;
        choir_option_list *list = member(values, &table[i]);
        /* A list on the command line replaces the file's. */
        if (table[i].kind == CHOIR_OPTION_LIST && out->origin[i] != CHOIR_FROM_COMMAND) list->n = 0;
        out->origin[i] = CHOIR_FROM_COMMAND;
        return set_value(&table[i], optarg, values);
    }
    return CHOIR_OK;
}

static choir_status parse(const choir_option *table, uint32_t n, int argc, char **argv,
                          void *values, choir_arguments *out)
{
    struct option longs[CHOIR_MAX_OPTIONS + 1] = {0};
    char letters[3 * CHOIR_MAX_OPTIONS + 2] = ":";
    size_t at = 1;
    CHOIR_ASSERT(n <= CHOIR_MAX_OPTIONS);
    *out = (choir_arguments){0};
    for (uint32_t i = 0; i < n; i++) {
        int takes = table[i].kind == CHOIR_OPTION_FLAG ? no_argument : required_argument;
        longs[i] = (struct option){table[i].name, takes, NULL, FIRST_LONG + (int)i};
        if (table[i].letter == 0) continue;
        letters[at++] = table[i].letter;
        if (takes == required_argument) letters[at++] = ':';
    }
    const char *config = find_config(argc, argv);
    if (config != NULL && find_option(table, n, "config") != NULL)
        CHOIR_TRY(read_config(table, n, config, values, out));
    optind = 0; /* getopt starts afresh */
    opterr = 0;
    for (int found; (found = getopt_long(argc, argv, letters, longs, NULL)) != -1;)
        CHOIR_TRY(take_option(table, n, found, argv, values, out));
    for (int i = optind; i < argc; i++) {
        if (out->n_positional == CHOIR_MAX_LIST)
            return choir_fail(CHOIR_E_INVALID, "more than %d arguments", CHOIR_MAX_LIST);
        out->positional[out->n_positional++] = argv[i];
    }
    return CHOIR_OK;
}

choir_status choir_options_parse(const choir_option *table, uint32_t n, int argc, char **argv,
                                 void *values, choir_arguments *out)
{
    choir_status status = parse(table, n, argc, argv, values, out);
    if (status != CHOIR_OK) choir_options_free(out);
    return status;
}

void choir_options_free(choir_arguments *arguments)
{
    json_decref(arguments->config);
    arguments->config = NULL;
}

/* "8GiB", or plain bytes where no unit divides them: what the same option would take. */
static void format_size(uint64_t size, char *out, size_t bytes)
{
    static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    while (unit < 4 && size > 0 && size % 1024 == 0) {
        size /= 1024;
        unit++;
    }
    snprintf(out, bytes, "%llu%s", (unsigned long long)size, units[unit]);
}

/* The value as a person would write it; "" for what is not set. */
static void format_value(const choir_option *o, const void *values, char *out, size_t bytes)
{
    const void *from = (const char *)values + o->offset;
    const choir_option_list *list = from;
    const char *text;
    out[0] = '\0';
    switch (o->kind) {
    case CHOIR_OPTION_FLAG:
        snprintf(out, bytes, "%s", *(const bool *)from ? "on" : "off");
        break;
    case CHOIR_OPTION_COUNT:
        if (*(const uint64_t *)from != UINT64_MAX)
            snprintf(out, bytes, "%llu", (unsigned long long)*(const uint64_t *)from);
        break;
    case CHOIR_OPTION_SIZE:
        format_size(*(const uint64_t *)from, out, bytes);
        break;
    case CHOIR_OPTION_REAL:
        snprintf(out, bytes, "%g", *(const double *)from);
        break;
    case CHOIR_OPTION_TEXT:
        text = *(const char *const *)from;
        if (text != NULL) snprintf(out, bytes, "%s", text);
        break;
    case CHOIR_OPTION_LIST:
        for (uint32_t i = 0; i < list->n && strlen(out) + 2 < bytes; i++)
            snprintf(out + strlen(out), bytes - strlen(out), "%s%s", i > 0 ? " " : "",
                     list->item[i]);
        break;
    }
}

void choir_options_print_help(const choir_option *table, uint32_t n, const void *defaults, FILE *to)
{
    for (uint32_t i = 0; i < n; i++) {
        char left[64], value[128];
        const choir_option *o = &table[i];
        char letter[8] = "    ";
        if (o->letter != 0) snprintf(letter, sizeof letter, "-%c, ", o->letter);
        snprintf(left, sizeof left, "%s--%s%s%s", letter, o->name, o->value != NULL ? " " : "",
                 o->value != NULL ? o->value : "");
        format_value(o, defaults, value, sizeof value);
        bool shown = o->kind != CHOIR_OPTION_FLAG && value[0] != '\0' && strcmp(value, "0") != 0 &&
                     strcmp(value, "-1") != 0;
        /* A long name pushes its text to the next line, so that texts stay in one column. */
        fprintf(to, "  %-32s%s%s%s%s%s\n", left,
                strlen(left) < 32 ? " " : "\n                                   ", o->help,
                shown ? " [" : "", shown ? value : "", shown ? "]" : "");
    }
}

void choir_options_print_resolved(const choir_option *table, uint32_t n, const void *values,
                                  const choir_arguments *arguments, FILE *to)
{
    static const char *const from[] = {"default", "config file", "command line"};
    for (uint32_t i = 0; i < n; i++) {
        char value[512];
        format_value(&table[i], values, value, sizeof value);
        bool secret = strcmp(table[i].name, "api-key") == 0 && value[0] != '\0';
        fprintf(to, "  %s = %s (%s)\n", table[i].name,
                secret             ? "(secret)"
                : value[0] == '\0' ? "-"
                                   : value,
                from[arguments->origin[i]]);
    }
}
