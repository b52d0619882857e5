#include "cli/adapters.h"

#include "scheduler/scheduler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_BYTES = 4096 };

choir_status choir_cli_adapter_split(const char *text, char *path, size_t bytes, float *weight)
{
    const char *equals = strrchr(text, '=');
    size_t n = strlen(text);
    *weight = 1;
    if (equals != NULL && equals[1] != '\0' &&
        equals[1 + strspn(equals + 1, "+-.0123456789eE")] == '\0') {
        char *end;
        double value = strtod(equals + 1, &end);
        if (end != equals + 1 && *end == '\0') {
            if (!(fabs(value) <= CHOIR_MAX_ADAPTER_WEIGHT))
                return choir_fail(CHOIR_E_INVALID,
                                  "--adapter %.200s: the weight is %.20s, must be -%d to %d", text,
                                  equals + 1, CHOIR_MAX_ADAPTER_WEIGHT, CHOIR_MAX_ADAPTER_WEIGHT);
            *weight = (float)value;
            n = (size_t)(equals - text);
        }
    }
    if (n == 0 || n >= bytes)
        return choir_fail(CHOIR_E_INVALID,
                          "--adapter is '%.40s', must be DIR or DIR=WEIGHT, at most %zu bytes",
                          text, bytes - 1);
    memcpy(path, text, n);
    path[n] = '\0';
    return CHOIR_OK;
}

choir_status choir_cli_adapter_type_check(const char *text)
{
    choir_adapter_type type;
    if (choir_adapter_type_parse(text, &type)) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID,
                      "--adapter-dtype is '%.20s', must be auto, f32, f16, bf16 or int8", text);
}

choir_status choir_cli_adapters_check(const choir_cli_adapter_values *v)
{
    char paths[2][PATH_BYTES];
    float weight;
    if (v->adapter.n > CHOIR_MAX_MIX)
        return choir_fail(CHOIR_E_INVALID, "--adapter is given %u times, a mix has at most %d",
                          v->adapter.n, CHOIR_MAX_MIX);
    for (uint32_t i = 0; i < v->adapter.n; i++) {
        CHOIR_TRY(choir_cli_adapter_split(v->adapter.item[i], paths[0], PATH_BYTES, &weight));
        for (uint32_t k = 0; k < i; k++) {
            CHOIR_TRY(choir_cli_adapter_split(v->adapter.item[k], paths[1], PATH_BYTES, &weight));
            if (strcmp(paths[0], paths[1]) == 0)
                return choir_fail(CHOIR_E_INVALID, "--adapter %.200s is given twice", paths[0]);
        }
    }
    return choir_cli_adapter_type_check(v->type);
}

/* What belongs to a sequence as a whole cannot be one of several. */
static choir_status check_mix(const choir_cli_adapter_values *v, const choir_cli_adapters *a)
{
    for (uint32_t i = 0; i < a->n; i++) {
        if (a->n > 1 && a->data[i]->n_invocation > 0)
            return choir_fail(CHOIR_E_INVALID,
                              "--adapter %.200s: an activated LoRA cannot be part of a mix",
                              v->adapter.item[i]);
        for (uint32_t k = 0; k < i; k++)
            if (a->data[k]->digest == a->data[i]->digest)
                return choir_fail(CHOIR_E_INVALID, "--adapter %.200s: it is in the mix already",
                                  v->adapter.item[i]);
    }
    return CHOIR_OK;
}

static choir_status read_all(const choir_cli_adapter_values *v, const choir_model_config *base,
                             choir_cli_adapters *out)
{
    char path[PATH_BYTES];
    for (uint32_t i = 0; i < v->adapter.n; i++) {
        CHOIR_TRY(
            choir_cli_adapter_split(v->adapter.item[i], path, sizeof path, &out->uses[i].weight));
        out->paths[i] = v->adapter.item[i];
        CHOIR_TRY(choir_adapter_data_open(base, path, &out->data[i]));
        out->n = i + 1;
    }
    CHOIR_TRY(check_mix(v, out));
    if (out->n == 1) out->n_virtual = out->data[0]->n_virtual;
    return CHOIR_OK;
}

choir_status choir_cli_adapters_read(const choir_cli_adapter_values *v, const char *model,
                                     choir_cli_adapters *out)
{
    char path[PATH_BYTES];
    choir_model_file *file;
    *out = (choir_cli_adapters){0};
    bool known = choir_adapter_type_parse(v->type, &out->type);
    CHOIR_ASSERT(known); /* choir_cli_adapters_check() has looked */
    if (v->adapter.n == 0) return CHOIR_OK;
    CHOIR_TRY(choir_cli_find_model(model, path, sizeof path));
    CHOIR_TRY(choir_model_file_open(path, &file));
    choir_status status = read_all(v, choir_model_file_config(file), out);
    choir_model_file_close(file);
    return status;
}

choir_status choir_cli_adapters_make(choir_cli_adapters *a, const choir_engine *engine)
{
    for (uint32_t i = 0; i < a->n; i++) {
        choir_status status = choir_adapter_make(engine, a->data[i], a->type, NULL, &a->made[i]);
        if (status != CHOIR_OK) return choir_fail_in(status, "--adapter %s", a->paths[i]);
        if ((a->n > 1 || a->uses[i].weight != 1) && !choir_adapter_mixes(a->made[i]))
            return choir_fail(CHOIR_E_INVALID,
                              "--adapter %s: it replaces parts of the model (%s), so that it can "
                              "only be the sole one, "
                              "without a weight",
                              a->paths[i], a->data[i]->kind);
        a->uses[i].adapter = a->made[i];
    }
    return CHOIR_OK;
}

void choir_cli_adapters_close(choir_cli_adapters *a)
{
    for (uint32_t i = 0; i < CHOIR_MAX_MIX; i++) {
        if (a->made[i] != NULL) choir_adapter_free(a->made[i]);
        if (a->data[i] != NULL) choir_adapter_data_free(a->data[i]);
    }
    *a = (choir_cli_adapters){0};
}

choir_status choir_cli_adapters_fit(const choir_cli_adapters *a, const char *what,
                                    uint64_t n_tokens, const choir_model_config *c)
{
    if (n_tokens + a->n_virtual <= c->max_positions) return CHOIR_OK;
    if (a->n_virtual == 0)
        return choir_fail(CHOIR_E_INVALID, "%s: %llu tokens, the model's context is %u", what,
                          (unsigned long long)n_tokens, c->max_positions);
    return choir_fail(
        CHOIR_E_INVALID,
        "%s: %llu tokens and %u virtual ones of the adapter, the model's context is %u", what,
        (unsigned long long)n_tokens, a->n_virtual, c->max_positions);
}

choir_status choir_cli_adapters_begin(const choir_cli_adapters *a, choir_engine *engine,
                                      const uint32_t *pages, uint32_t n_pages)
{
    enum { CHUNK = 64 };
    uint32_t tokens[CHUNK], vocab = choir_engine_config(engine)->vocab, n;
    uint32_t rows = choir_engine_max_rows(engine) < CHUNK ? choir_engine_max_rows(engine) : CHUNK;
    for (uint32_t first = 0; first < a->n_virtual; first += n) {
        n = a->n_virtual - first < rows ? a->n_virtual - first : rows;
        for (uint32_t i = 0; i < n; i++) tokens[i] = vocab + first + i;
        choir_span span = {.tokens = tokens,
                           .n_tokens = n,
                           .position = first,
                           .pages = pages,
                           .n_pages = n_pages,
                           .adapters = a->uses,
                           .n_adapters = a->n};
        CHOIR_TRY(choir_engine_step(engine, &span, 1));
        CHOIR_TRY(choir_span_failure(&span));
    }
    return CHOIR_OK;
}

void choir_cli_adapters_use(const choir_cli_adapters *a, const uint32_t *prompt, size_t n_prompt,
                            choir_span *span)
{
    span->adapters = a->uses;
    span->n_adapters = a->n;
    if (a->n == 1 && a->data[0]->n_invocation > 0)
        span->adapter_from = choir_adapter_begins(a->data[0]->invocation, a->data[0]->n_invocation,
                                                  prompt, n_prompt);
}
