/* A line is {"layer": 3, "token": 17, "experts": [5, 2], "weights": [0.7, 0.3]}. */
#include "tune/usage.h"

#include "base/base.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { MAX_LINE = 64 << 10 };

typedef struct reader {
    const char *path;
    const choir_model_config *config;
    uint64_t line;
    uint64_t *picks;  /* [n_layers, n_experts] */
    uint64_t *tokens; /* [n_layers] */
} reader;

static choir_status bad_line(const reader *r, const char *what)
{
    return choir_fail(CHOIR_E_FORMAT,
                      "%s, line %" PRIu64 ": %s; `choir logits --routes` writes such files",
                      r->path, r->line, what);
}

/* An integer in [0, limit). */
static bool small_integer(const json_t *value, uint64_t limit, uint32_t *out)
{
    if (!json_is_integer(value)) return false;
    json_int_t n = json_integer_value(value);
    if (n < 0 || (uint64_t)n >= limit) return false;
    *out = (uint32_t)n;
    return true;
}

static choir_status count_line(reader *r, const json_t *line)
{
    const choir_model_config *c = r->config;
    const json_t *experts = json_object_get(line, "experts"),
                 *weights = json_object_get(line, "weights");
    uint32_t layer, token, expert;
    if (!small_integer(json_object_get(line, "layer"), c->n_layers, &layer) ||
        (c->layers[layer] & CHOIR_LAYER_MOE) == 0)
        return bad_line(r, "\"layer\" is no layer with experts");
    if (!small_integer(json_object_get(line, "token"), UINT32_MAX, &token))
        return bad_line(r, "\"token\" is no number of a token");
    size_t n = json_array_size(experts); /* 0 when it is no array */
    if (n == 0 || n > c->n_experts || json_array_size(weights) != n)
        return bad_line(r, "\"experts\" and \"weights\" are no arrays of the same length");
    for (size_t i = 0; i < n; i++) {
        if (!small_integer(json_array_get(experts, i), c->n_experts, &expert))
            return bad_line(r, "\"experts\" has what is no expert's number");
        if (!json_is_number(json_array_get(weights, i)))
            return bad_line(r, "\"weights\" has what is no number");
        for (size_t k = 0; k < i; k++)
            if (json_equal(json_array_get(experts, k), json_array_get(experts, i)))
                return bad_line(r, "\"experts\" names an expert twice");
        r->picks[(size_t)layer * c->n_experts + expert]++;
    }
    r->tokens[layer]++;
    return CHOIR_OK;
}

static choir_status read_lines(reader *r, FILE *file, char *line)
{
    while (fgets(line, MAX_LINE, file) != NULL) {
        r->line++;
        size_t n = strlen(line); /* of what comes before a NUL byte, if there is one */
        bool ended = n > 0 && line[n - 1] == '\n';
        if (!ended && !feof(file)) return bad_line(r, "it is too long, or holds a NUL byte");
        json_t *object = json_loadb(line, n, JSON_REJECT_DUPLICATES, NULL);
        choir_status status =
            json_is_object(object) ? count_line(r, object) : bad_line(r, "it is no JSON object");
        json_decref(object);
        CHOIR_TRY(status);
    }
    return ferror(file) ? choir_fail(CHOIR_E_IO, "cannot read %s: %m", r->path) : CHOIR_OK;
}

static choir_status shares_of(const reader *r, float *usage)
{
    const choir_model_config *c = r->config;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        bool moe = (c->layers[l] & CHOIR_LAYER_MOE) != 0;
        if (moe && r->tokens[l] == 0)
            return choir_fail(CHOIR_E_FORMAT, "%s says nothing about layer %u", r->path, l);
        for (uint32_t x = 0; x < c->n_experts; x++) {
            size_t at = (size_t)l * c->n_experts + x;
            usage[at] = moe ? (float)((double)r->picks[at] / (double)r->tokens[l]) : 0;
        }
    }
    return CHOIR_OK;
}

choir_status choir_usage_read(const char *path, const choir_model_config *c, float *usage)
{
    reader r = {.path = path, .config = c};
    char *line = choir_alloc(CHOIR_MEM_TUNE, MAX_LINE);
    r.picks = choir_calloc(CHOIR_MEM_TUNE, (size_t)c->n_layers * c->n_experts, sizeof *r.picks);
    r.tokens = choir_calloc(CHOIR_MEM_TUNE, c->n_layers, sizeof *r.tokens);
    FILE *file = NULL;
    choir_status status = CHOIR_OK;
    if (line == NULL || r.picks == NULL || r.tokens == NULL)
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory to read %s", path);
    if (status == CHOIR_OK && (file = fopen(path, "re")) == NULL)
        status = choir_fail(CHOIR_E_IO, "cannot read %s: %m", path);
    if (status == CHOIR_OK) status = read_lines(&r, file, line);
    if (status == CHOIR_OK) status = shares_of(&r, usage);
    if (file != NULL) fclose(file);
    choir_free(line);
    choir_free(r.picks);
    choir_free(r.tokens);
    return status;
}
