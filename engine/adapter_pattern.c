#include "engine/adapter_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <string.h>

enum { MAX_KEY_BYTES = 1000, MAX_STEPS = 100000, MAX_DEPTH = 1000 };

/* What all matches of a list may cost together, some seconds: comparing a name with a key without
 * an expression costs 1, a step of an expression CALLOUT_COST. */
static const uint64_t max_cost = UINT64_C(1) << 31;
enum { CALLOUT_COST = 20 };

typedef struct pattern {
    const char *key;  /* lent from the configuration */
    pcre2_code *code; /* NULL: letters, digits and dots alone */
    double value;
} pattern;

struct choir_adapter_patterns {
    const char *field;
    size_t n;
    uint64_t cost; /* so far */
    pcre2_match_data *match;
    pcre2_match_context *limits;
    pattern items[];
};

/* Python's dialect and PCRE2's mean the same by what module names need. */
static choir_status compile(const choir_adapter_reader *r, const char *field, bool whole,
                            pattern *p)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.";
    char text[MAX_KEY_BYTES + 32];
    PCRE2_UCHAR why[120];
    int error;
    PCRE2_SIZE at;
    if (strlen(p->key) > MAX_KEY_BYTES)
        return choir_fail(CHOIR_E_INVALID, "%s: a key of %s has %zu bytes, the limit is %d",
                          r->name, field, strlen(p->key), MAX_KEY_BYTES);
    if (!whole && p->key[strspn(p->key, plain)] == '\0') return CHOIR_OK;
    if (strstr(p->key, "{,") != NULL) /* from none on, in Python; letters, in PCRE2 */
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: the key \"%.100s\" of %s has '{,'; write '{0,'", r->name, p->key,
                          field);
    snprintf(text, sizeof text, whole ? "(?:%s)\\z" : "(?:.*\\.)?(?:%s)$", p->key);
    p->code =
        pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED,
                      PCRE2_ANCHORED | PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C | PCRE2_AUTO_CALLOUT,
                      &error, &at, NULL);
    if (p->code != NULL) return CHOIR_OK;
    if (error == PCRE2_ERROR_HEAP_FAILED)
        return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for %s", r->name, field);
    pcre2_get_error_message(error, why, sizeof why);
    return choir_fail(CHOIR_E_FORMAT, "%s: the key \"%.100s\" of %s is no regular expression: %s",
                      r->name, p->key, field, (const char *)why);
}

static choir_status fill(const choir_adapter_reader *r, const json_t *object,
                         choir_adapter_patterns *p)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value)
    {
        if (!json_is_number(value))
            return choir_fail(CHOIR_E_FORMAT, "%s: %s has no number for \"%.100s\"", r->name,
                              p->field, key);
        p->items[p->n] = (pattern){.key = key, .value = json_number_value(value)};
        CHOIR_TRY(compile(r, p->field, false, &p->items[p->n]));
        p->n++;
    }
    return CHOIR_OK;
}

/* At each step of an expression. */
static int count_step(pcre2_callout_block *block, void *patterns)
{
    choir_adapter_patterns *p = patterns;
    (void)block;
    p->cost += CALLOUT_COST;
    return p->cost > max_cost ? PCRE2_ERROR_CALLOUT : 0;
}

static choir_status make(const choir_adapter_reader *r, const char *field, size_t n,
                         choir_adapter_patterns **out)
{
    choir_adapter_patterns *p = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *p + n * sizeof *p->items);
    *out = p;
    if (p != NULL) {
        p->field = field;
        p->limits = pcre2_match_context_create(NULL);
        p->match = pcre2_match_data_create(16, NULL);
    }
    if (p == NULL || p->limits == NULL || p->match == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for %s", r->name, field);
    pcre2_set_match_limit(p->limits, MAX_STEPS);
    pcre2_set_depth_limit(p->limits, MAX_DEPTH);
    pcre2_set_callout(p->limits, count_step, p);
    return CHOIR_OK;
}

choir_status choir_adapter_patterns_make(const choir_adapter_reader *r, const char *field,
                                         choir_adapter_patterns **out)
{
    const json_t *object = choir_adapter_get(r, field);
    *out = NULL;
    if (choir_adapter_is_off(object)) return CHOIR_OK;
    if (!json_is_object(object))
        return choir_fail(CHOIR_E_FORMAT, "%s: %s of adapter_config.json is no object", r->name,
                          field);
    CHOIR_TRY(make(r, field, json_object_size(object), out));
    return fill(r, object, *out);
}

choir_status choir_adapter_pattern_whole(const choir_adapter_reader *r, const char *field,
                                         choir_adapter_patterns **out)
{
    CHOIR_TRY(make(r, field, 1, out));
    pattern *p = &(*out)->items[0];
    *p = (pattern){.key = choir_adapter_string(r, field, ""), .value = 1};
    CHOIR_TRY(compile(r, field, true, p));
    (*out)->n = 1;
    return CHOIR_OK;
}

/* A key of letters, digits and dots: the dots stand for any character. */
static bool ends_with(const char *module, const char *key)
{
    size_t n = strlen(module), m = strlen(key);
    if (m > n || (m < n && module[n - m - 1] != '.')) return false;
    for (size_t i = 0; i < m; i++)
        if (key[i] != '.' && key[i] != module[n - m + i]) return false;
    return true;
}

static choir_status too_long(const choir_adapter_reader *r, const choir_adapter_patterns *p)
{
    return choir_fail(
        CHOIR_E_INVALID,
        "%s: the %zu keys of %s take too long to compare with the names of its tensors", r->name,
        p->n, p->field);
}

static choir_status fits(const choir_adapter_reader *r, choir_adapter_patterns *p,
                         const pattern *item, const char *module, bool *out)
{
    if (p->cost++ >= max_cost) return too_long(r, p);
    if (item->code == NULL) {
        *out = ends_with(module, item->key);
        return CHOIR_OK;
    }
    int n = pcre2_match(item->code, (PCRE2_SPTR)module, strlen(module), 0, 0, p->match, p->limits);
    *out = n >= 0;
    if (n >= 0 || n == PCRE2_ERROR_NOMATCH) return CHOIR_OK;
    if (n == PCRE2_ERROR_CALLOUT) return too_long(r, p);
    if (n == PCRE2_ERROR_MATCHLIMIT || n == PCRE2_ERROR_DEPTHLIMIT || n == PCRE2_ERROR_HEAPLIMIT)
        return choir_fail(CHOIR_E_INVALID,
                          "%s: the key \"%.100s\" of %s takes more than %d steps for '%.100s'",
                          r->name, item->key, p->field, MAX_STEPS, module);
    return choir_fail(CHOIR_E_INVALID,
                      "%s: the key \"%.100s\" of %s cannot be matched with '%.100s' (%d)", r->name,
                      item->key, p->field, module, n);
}

choir_status choir_adapter_patterns_find(const choir_adapter_reader *r, choir_adapter_patterns *p,
                                         const char *module, double *out)
{
    for (size_t i = 0; p != NULL && i < p->n; i++) {
        bool found;
        CHOIR_TRY(fits(r, p, &p->items[i], module, &found));
        if (!found) continue;
        *out = p->items[i].value;
        return CHOIR_OK;
    }
    return CHOIR_OK;
}

void choir_adapter_patterns_free(choir_adapter_patterns *p)
{
    if (p == NULL) return;
    for (size_t i = 0; i < p->n; i++) pcre2_code_free(p->items[i].code);
    pcre2_match_context_free(p->limits);
    pcre2_match_data_free(p->match);
    choir_free(p);
}
