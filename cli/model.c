/* Finding and opening MODEL for every verb that has one. */
#include "cli/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

void choir_cli_cache_folder(char *path, size_t bytes)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (cache != NULL && cache[0] == '/')
        snprintf(path, bytes, "%s/choir/models", cache);
    else
        snprintf(path, bytes, "%s/.cache/choir/models", home != NULL ? home : "");
}

choir_status choir_cli_find_model(const char *model, char *path, size_t bytes)
{
    if (choir_file_exists(model) || choir_folder_exists(model)) {
        if ((size_t)snprintf(path, bytes, "%s", model) >= bytes)
            return choir_fail(CHOIR_E_INVALID, "the model's path has more than %zu bytes",
                              bytes - 1);
        return CHOIR_OK;
    }
    char cache[3000];
    choir_cli_cache_folder(cache, sizeof cache);
    /* A name lies directly in the cache; nothing else is looked for. */
    if (strchr(model, '/') == NULL && model[0] != '\0' && model[0] != '.' && strlen(model) < 200) {
        static const char *const endings[] = {"", ".gguf", ".choir"};
        for (int i = 0; i < 3; i++) {
            snprintf(path, bytes, "%s/%s%s", cache, model, endings[i]);
            if (choir_file_exists(path) || choir_folder_exists(path)) return CHOIR_OK;
        }
    }
    return choir_fail(CHOIR_E_NOT_FOUND,
                      "model '%.200s' is neither a file, nor a folder, nor a name in %s", model,
                      cache);
}

choir_status choir_cli_engine_options(const choir_cli_engine_values *values,
                                      choir_engine_options *options)
{
    options->n_threads = (uint32_t)values->threads;
    options->exact = values->exact;
    options->show_progress = true;
    options->memory_bytes = values->memory;
    options->stall_ns = 60 * CHOIR_SECOND; /* nobody else waits */
    options->io_depth = (uint32_t)values->io_depth;
    options->expert_bytes = values->expert_memory;
    options->no_prefetch = values->no_prefetch;
    options->small_experts = values->small_experts;
    if (values->io != NULL && !choir_io_parse(values->io, &options->io))
        return choir_fail(CHOIR_E_INVALID,
                          "--expert-io is '%.40s', must be auto, io_uring, io_uring-plain or pread",
                          values->io);
    if (values->policy != NULL && !choir_policy_parse(values->policy, &options->policy))
        return choir_fail(CHOIR_E_INVALID, "--expert-policy is '%.40s', must be lru, lfu or router",
                          values->policy);
    if (values->cpu_level != NULL && !choir_cpu_level_parse(values->cpu_level, &options->level))
        return choir_fail(CHOIR_E_INVALID,
                          "--cpu-level is '%.40s', must be reference, avx2 or avx512vnni",
                          values->cpu_level);
    return CHOIR_OK;
}

uint64_t choir_cli_kv_bytes_per_token(const choir_model_config *c, bool exact)
{
    return (uint64_t)c->n_layers * choir_kv_numbers(c) * (exact ? sizeof(float) : sizeof(uint16_t));
}

choir_status choir_cli_parse_ids(const char *what, const char *text, uint32_t limit, uint32_t **ids,
                                 size_t *n)
{
    static const char *const between = ", \t\r\n[]";
    *ids = choir_alloc(CHOIR_MEM_OTHER, (strlen(text) / 2 + 1) * sizeof **ids);
    if (*ids == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the ids");
    *n = 0;
    for (const char *p = text + strspn(text, between); *p != '\0';) {
        char *end;
        unsigned long id = strtoul(p, &end, 10);
        if (*p < '0' || *p > '9' || (*end != '\0' && strchr(between, *end) == NULL))
            return choir_fail(CHOIR_E_INVALID, "%s has '%.20s', must be ids like 5,7,9", what, p);
        if (id >= limit)
            return choir_fail(CHOIR_E_INVALID, "%s has %.20s, the vocabulary ends at %u", what, p,
                              limit - 1);
        (*ids)[(*n)++] = (uint32_t)id;
        p = end + strspn(end, between);
    }
    return *n > 0 ? CHOIR_OK : choir_fail(CHOIR_E_INVALID, "%s holds no ids", what);
}

bool choir_cli_parse_dtype(const char *text, choir_dtype *out)
{
    *out = CHOIR_N_DTYPES;
    if (text == NULL) return true;
    for (int d = 0; d < CHOIR_N_DTYPES && *out == CHOIR_N_DTYPES; d++)
        if (strcasecmp(text, choir_dtype_text((choir_dtype)d)) == 0) *out = (choir_dtype)d;
    return *out != CHOIR_N_DTYPES;
}

void choir_cli_print_json(json_t *object, bool indented)
{
    json_dumpf(object, stdout,
               (indented ? JSON_INDENT(2) : JSON_COMPACT) | JSON_REAL_PRECISION(10));
    putchar('\n');
    json_decref(object);
}

choir_status choir_cli_open_engine(const char *model, const choir_engine_options *options,
                                   choir_engine **out)
{
    char path[4096];
    CHOIR_TRY(choir_cli_find_model(model, path, sizeof path));
    return choir_engine_open(path, options, out);
}
