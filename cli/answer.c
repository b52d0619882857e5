/* The answer's two ways, and the JSON object that both fill. */
#include "cli/answer.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

choir_status choir_cli_client(const choir_cli_server_values *server, choir_client **out)
{
    char *roots = NULL;
    size_t bytes;
    if (server->ca != NULL) CHOIR_TRY(choir_file_read(server->ca, 1 << 20, &roots, &bytes));
    const choir_client_options o = {
        .target = server->target,
        .api_key = server->api_key != NULL ? server->api_key : getenv("CHOIR_API_KEY"),
        .tls = server->tls || server->ca != NULL,
        .tls_roots = roots,
        .stop = &choir_cli_interrupted,
    };
    choir_cli_block_interrupts(true);
    choir_status status = choir_client_create(&o, out);
    choir_cli_block_interrupts(false);
    choir_free(roots);
    return status;
}

/* What adapters take while they are read and made, at most: the file, its numbers as f32, and
 * themselves. */
static choir_status adapter_memory(const choir_cli_adapter_values *v, uint64_t *out)
{
    char path[4096], tensors[4200];
    float weight;
    for (uint32_t i = 0; i < v->adapter.n; i++) {
        int fd;
        size_t bytes = 0;
        CHOIR_TRY(choir_cli_adapter_split(v->adapter.item[i], path, sizeof path, &weight));
        snprintf(tensors, sizeof tensors, "%s/adapter_model.safetensors", path);
        if (choir_file_open(choir_folder_exists(path) ? tensors : path, &fd, &bytes) == CHOIR_OK)
            close(fd);
        *out += 16 * (uint64_t)bytes + (64 << 20);
    }
    return CHOIR_OK;
}

/* The path in letters that a name may have: sentences name the adapter by it. */
static void name_of(const char *path, char *name, size_t bytes)
{
    size_t n = 0;
    while (*path != '\0' && strchr("/.-", *path) != NULL) path++;
    if (strlen(path) >= bytes) path += strlen(path) - bytes + 1;
    for (; *path != '\0'; path++) {
        bool again = n > 0 && name[n - 1] == *path && strchr("/.", *path) != NULL;
        bool fine = isalnum((unsigned char)*path) || strchr("._-/:@+", *path) != NULL;
        if (!again) name[n++] = '_';
        if (!again && fine && (n > 1 || isalnum((unsigned char)*path))) name[n - 1] = *path;
    }
    while (n > 1 && name[n - 1] == '/') n--;
    if (n == 0) name[n++] = '_';
    name[n] = '\0';
}

/* One more of the answerer's adapters. */
static choir_status keep_adapter(choir_answerer *out, const char *name, float weight)
{
    uint32_t i = out->n_adapters;
    out->names[i] = choir_strdup(CHOIR_MEM_OTHER, name);
    if (out->names[i] == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a name");
    out->adapters[i].name = out->names[i];
    out->adapters[i].weight = weight;
    out->n_adapters = i + 1;
    return CHOIR_OK;
}

static const uint64_t LOAD_NS = 120 * CHOIR_SECOND;

static choir_status open_pool(const choir_cli_adapter_values *v, choir_engine *engine)
{
    choir_engine_adapters_options o = {0};
    if (v->adapter.n == 0) return CHOIR_OK;
    bool known = choir_adapter_type_parse(v->type, &o.type);
    CHOIR_ASSERT(known); /* choir_cli_adapters_check() has looked */
    return choir_engine_open_adapters(engine, &o);
}

/* Registers and reads them, so that a bad one is told before a prompt is. The scheduler runs: of a
 * budget that experts share it is who gives adapters more than their floor. */
static choir_status load_adapters(const choir_cli_adapter_values *v, choir_answerer *out)
{
    for (uint32_t i = 0; i < v->adapter.n; i++) {
        char path[4096], name[CHOIR_ADAPTER_MAX_NAME + 1];
        float weight;
        CHOIR_TRY(choir_cli_adapter_split(v->adapter.item[i], path, sizeof path, &weight));
        name_of(path, name, sizeof name);
        CHOIR_TRY(keep_adapter(out, name, weight));
        const choir_adapter_load what = {
            .name = name, .path = path, .keep = true, .deadline_ns = choir_clock_now() + LOAD_NS};
        CHOIR_TRY(choir_adapters_load(choir_engine_adapters(out->engine), &what, NULL));
    }
    return CHOIR_OK;
}

static choir_status open_here(const char *model, const choir_cli_engine_values *engine,
                              const choir_cli_adapter_values *adapters, choir_answerer *out)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    choir_scheduler_options s = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    CHOIR_TRY(choir_cli_engine_options(engine, &o));
    CHOIR_TRY(adapter_memory(adapters, &o.adapter_bytes));
    o.kv_bytes = (uint64_t)512 << 20;
    s.max_step_tokens = o.max_rows;
    CHOIR_TRY(choir_cli_open_engine(model, &o, &out->engine));
    CHOIR_TRY(open_pool(adapters, out->engine));
    const choir_step_engine step = choir_step_engine_of(out->engine);
    CHOIR_TRY(choir_scheduler_create(&step, &s, &out->scheduler));
    return load_adapters(adapters, out);
}

/* The names of a server's adapters. */
static choir_status name_adapters(const choir_cli_adapter_values *v, choir_answerer *out)
{
    for (uint32_t i = 0; i < v->adapter.n; i++) {
        char name[CHOIR_ADAPTER_MAX_NAME + 1];
        float weight;
        CHOIR_TRY(choir_cli_adapter_split(v->adapter.item[i], name, sizeof name, &weight));
        CHOIR_TRY(keep_adapter(out, name, weight));
    }
    return CHOIR_OK;
}

choir_status choir_answerer_open(const char *model, const choir_cli_server_values *server,
                                 const choir_cli_engine_values *engine,
                                 const choir_cli_adapter_values *adapters, choir_answerer *out)
{
    *out = (choir_answerer){.model = model};
    choir_cli_catch_interrupts();
    choir_status status;
    if (server->target != NULL) {
        status = name_adapters(adapters, out);
        if (status == CHOIR_OK) status = choir_cli_client(server, &out->client);
    } else {
        choir_cli_block_interrupts(true);
        status = open_here(model, engine, adapters, out);
        choir_cli_block_interrupts(false);
    }
    if (status != CHOIR_OK) choir_answerer_close(out);
    return status;
}

void choir_answerer_close(choir_answerer *answerer)
{
    choir_client_destroy(answerer->client);
    choir_scheduler_destroy(answerer->scheduler);
    choir_engine_close(answerer->engine);
    for (uint32_t i = 0; i < CHOIR_MAX_MIX; i++) choir_free(answerer->names[i]);
    *answerer = (choir_answerer){0};
}

choir_status choir_answer(const choir_answerer *answerer, const choir_ask *ask, json_t *result)
{
    json_object_set_new(result, "model", json_string(answerer->model));
    json_object_set_new(result, "text", json_string(""));
    json_object_set_new(result, "token_ids", json_array());
    choir_cli_interrupted = 0;
    return answerer->client != NULL ? choir_answer_there(answerer, ask, result)
                                    : choir_answer_here(answerer, ask, result);
}

void choir_answer_add(json_t *result, const char *text, size_t bytes, const uint32_t *tokens,
                      size_t n_tokens)
{
    json_t *before = json_object_get(result, "text"), *ids = json_object_get(result, "token_ids");
    size_t n = json_string_length(before);
    char *joined = malloc(n + bytes + 1);
    if (joined == NULL) return;
    memcpy(joined, json_string_value(before), n);
    memcpy(joined + n, text, bytes);
    json_object_set_new(result, "text", json_stringn(joined, n + bytes));
    free(joined);
    for (size_t i = 0; i < n_tokens; i++) json_array_append_new(ids, json_integer(tokens[i]));
}

uint64_t choir_answer_seed(const choir_cli_sampling_values *v)
{
    uint64_t seed = 0;
    if (v->seed != CHOIR_CLI_UNSET) return v->seed;
    if (getrandom(&seed, sizeof seed, 0) != sizeof seed) seed = choir_clock_now();
    return seed >> 11;
}

static json_t *milliseconds(uint64_t ns)
{
    return json_real((double)(ns / 1000) / 1000);
}

void choir_answer_end(json_t *result, const char *finish_reason, const choir_usage *u)
{
    json_t *usage = json_object(), *timings = json_object();
    json_object_set_new(usage, "prompt_tokens", json_integer(u->prompt_tokens));
    json_object_set_new(usage, "cached_tokens", json_integer(u->cached_tokens));
    json_object_set_new(usage, "output_tokens", json_integer(u->output_tokens));
    json_object_set_new(usage, "total_tokens",
                        json_integer((json_int_t)u->prompt_tokens + u->output_tokens));
    json_object_set_new(timings, "queue_ms", milliseconds(u->queue_ns));
    json_object_set_new(timings, "prefill_ms", milliseconds(u->prefill_ns));
    json_object_set_new(timings, "decode_ms", milliseconds(u->decode_ns));
    json_object_set_new(result, "finish_reason", json_string(finish_reason));
    json_object_set_new(result, "usage", usage);
    json_object_set_new(result, "timings", timings);
}
