/* A model with its scheduler in this process, for `generate` and `chat`. */
#include "cli/cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

choir_status choir_local_open(const char *model, const choir_engine_options *options, choir_local *out)
{
    *out = (choir_local){0};
    choir_engine_options o = *options;
    if (o.kv_bytes == 0) o.kv_bytes = (uint64_t)512 << 20;
    CHOIR_TRY(choir_cli_open_engine(model, &o, &out->engine));
    choir_scheduler_options s = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    s.max_step_tokens = o.max_rows;
    const choir_step_engine step = choir_step_engine_of(out->engine);
    choir_status status = choir_scheduler_create(&step, &s, &out->scheduler);
    if (status != CHOIR_OK) choir_local_close(out);
    return status;
}

void choir_local_close(choir_local *local)
{
    choir_scheduler_destroy(local->scheduler);
    choir_engine_close(local->engine);
    *local = (choir_local){0};
}

static void set_token_text(json_t *variables, const choir_tokenizer *t, const char *name, int32_t id)
{
    size_t bytes;
    const char *piece = id < 0 ? NULL : choir_tokenizer_piece(t, (uint32_t)id, &bytes);
    if (piece != NULL) json_object_set_new(variables, name, json_stringn(piece, bytes));
}

choir_status choir_local_chat_tokens(const choir_local *local, const json_t *messages, uint32_t **ids,
                                     size_t *n_ids)
{
    const choir_chat_template *t = choir_engine_chat_template(local->engine);
    const choir_tokenizer *tokenizer = choir_engine_tokenizer(local->engine);
    if (t == NULL)
        return choir_fail(CHOIR_E_PRECONDITION, "this model has no chat template; use -p without --chat");
    json_t *variables = json_pack("{s:O, s:b}", "messages", messages, "add_generation_prompt", 1);
    if (variables == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the conversation");
    set_token_text(variables, tokenizer, "bos_token", choir_tokenizer_bos(tokenizer));
    set_token_text(variables, tokenizer, "eos_token", choir_tokenizer_eos(tokenizer));
    char *text = NULL;
    size_t bytes;
    choir_status status = choir_chat_template_render(t, variables, (int64_t)time(NULL), &text, &bytes);
    json_decref(variables);
    CHOIR_TRY(status);
    const choir_encode_options options = {.add_special = false, .parse_special = true};
    status = choir_tokenizer_encode(tokenizer, text, bytes, options, ids, n_ids);
    choir_free(text);
    return status;
}

void choir_cli_set_sampling(const choir_cli_sampling_values *v, const choir_model_config *c,
                            choir_request *r)
{
    choir_sampling s = CHOIR_SAMPLING_DEFAULT;
    if (c->temperature >= 0) s.temperature = c->temperature;
    if (c->top_p > 0) s.top_p = c->top_p;
    if (c->top_k > 0) s.top_k = (uint32_t)c->top_k;
    if (c->repetition_penalty > 0) s.repetition_penalty = c->repetition_penalty;
    if (v->temperature >= 0) s.temperature = (float)v->temperature;
    if (v->top_p >= 0) s.top_p = (float)v->top_p;
    if (v->top_k != UINT32_MAX) s.top_k = (uint32_t)v->top_k;
    if (v->repetition_penalty >= 0) s.repetition_penalty = (float)v->repetition_penalty;
    s.min_p = (float)v->min_p;
    s.presence_penalty = (float)v->presence_penalty;
    s.frequency_penalty = (float)v->frequency_penalty;
    s.seed = v->seed;
    s.min_tokens = (uint32_t)v->min_tokens;
    r->sampling = s;
    r->max_tokens = (uint32_t)v->max_tokens;
    r->ignore_eos = v->ignore_eos;
    r->stops = v->stop.item;
    r->n_stops = v->stop.n;
    r->n = 1;
    r->skip_special = true;
}

static const char *finish_text(choir_finish finish)
{
    return finish == CHOIR_FINISH_STOP ? "stop" : finish == CHOIR_FINISH_LENGTH ? "length" : "error";
}

static void add_delta(json_t *result, const choir_event *e)
{
    json_t *text = json_object_get(result, "text"), *ids = json_object_get(result, "token_ids");
    size_t n = json_string_length(text);
    char *joined = malloc(n + e->text_bytes + 1);
    if (joined == NULL) return;
    memcpy(joined, json_string_value(text), n);
    memcpy(joined + n, e->text, e->text_bytes);
    json_object_set_new(result, "text", json_stringn(joined, n + e->text_bytes));
    free(joined);
    for (uint32_t i = 0; i < e->n_tokens; i++)
        json_array_append_new(ids, json_integer(e->tokens[i]));
}

static void add_done(json_t *result, const choir_event *e)
{
    const choir_usage *u = &e->usage;
    if (e->n_finish > 0)
        json_object_set_new(result, "finish_reason", json_string(finish_text(e->finish[0])));
    json_object_set_new(result, "usage",
                        json_pack("{s:i, s:i, s:i}", "prompt_tokens", (int)u->prompt_tokens,
                                  "cached_tokens", (int)u->cached_tokens, "output_tokens",
                                  (int)u->output_tokens));
    json_object_set_new(result, "timings",
                        json_pack("{s:f, s:f, s:f}", "queue_ms", (double)u->queue_ns / 1e6,
                                  "prefill_ms", (double)u->prefill_ns / 1e6, "decode_ms",
                                  (double)u->decode_ns / 1e6));
}

choir_status choir_local_run(choir_local *local, const choir_request *request,
                             void (*show)(void *user, const char *text, size_t bytes), void *user,
                             const volatile int *stop, json_t *result)
{
    choir_stream *stream;
    CHOIR_TRY(choir_scheduler_submit(local->scheduler, request, NULL, NULL, &stream));
    if (result != NULL) {
        json_object_set_new(result, "text", json_string(""));
        json_object_set_new(result, "token_ids", json_array());
    }
    choir_status status = CHOIR_OK;
    for (bool cancelled = false;;) {
        choir_event e;
        if (!cancelled && stop != NULL && *stop) {
            choir_stream_cancel(stream);
            cancelled = true;
        }
        if (!choir_stream_wait(stream, CHOIR_SECOND / 20, &e)) continue;
        if (e.kind == CHOIR_EVENT_DELTA) {
            if (show != NULL && !cancelled) show(user, e.text, e.text_bytes);
            if (result != NULL) add_delta(result, &e);
        }
        if (e.kind != CHOIR_EVENT_DONE) continue;
        if (result != NULL) add_done(result, &e);
        if (e.status != CHOIR_OK && !cancelled) status = choir_fail(e.status, "%s", e.message);
        break;
    }
    choir_stream_release(stream);
    return status;
}
