/* The answer's two ways, and the JSON object that both fill. */
#include "cli/answer.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

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

static choir_status open_here(const char *model, const choir_cli_engine_values *engine,
                              choir_answerer *out)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    choir_scheduler_options s = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    CHOIR_TRY(choir_cli_engine_options(engine, &o));
    o.kv_bytes = (uint64_t)512 << 20;
    s.max_step_tokens = o.max_rows;
    CHOIR_TRY(choir_cli_open_engine(model, &o, &out->engine));
    const choir_step_engine step = choir_step_engine_of(out->engine);
    return choir_scheduler_create(&step, &s, &out->scheduler);
}

choir_status choir_answerer_open(const char *model, const choir_cli_server_values *server,
                                 const choir_cli_engine_values *engine,
                                 const choir_cli_adapter_values *adapters, choir_answerer *out)
{
    *out = (choir_answerer){.model = model, .adapters = adapters};
    choir_cli_catch_interrupts();
    if (server->target != NULL) return choir_cli_client(server, &out->client);
    if (adapters->adapter.n > 0) return choir_cli_not_yet("--adapter without --server");
    choir_cli_block_interrupts(true);
    choir_status status = open_here(model, engine, out);
    choir_cli_block_interrupts(false);
    if (status != CHOIR_OK) choir_answerer_close(out);
    return status;
}

void choir_answerer_close(choir_answerer *answerer)
{
    choir_client_destroy(answerer->client);
    choir_scheduler_destroy(answerer->scheduler);
    choir_engine_close(answerer->engine);
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
