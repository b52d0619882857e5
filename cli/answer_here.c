/* One request through a scheduler of this process. */
#include "cli/answer.h"
#include "engine/chat_variables.h"

#include <string.h>
#include <time.h>

/* The conversation as the model's own template writes it, tokenized. */
static choir_status chat_tokens(const choir_engine *engine, const json_t *messages, uint32_t **ids,
                                size_t *n_ids)
{
    const choir_chat_template *t = choir_engine_chat_template(engine);
    const choir_tokenizer *tokenizer = choir_engine_tokenizer(engine);
    if (t == NULL)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "this model has no chat template; use `generate -p TEXT` without --chat");
    json_t *variables = json_pack("{s:O}", "messages", (json_t *)messages);
    if (variables == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the conversation");
    char *text = NULL;
    size_t bytes;
    choir_status status = choir_chat_variables_set(variables, tokenizer, true);
    if (status == CHOIR_OK)
        status = choir_chat_template_render(t, variables, (int64_t)time(NULL), &text, &bytes);
    json_decref(variables);
    CHOIR_TRY(status);
    const choir_encode_options options = {.add_special = false, .parse_special = true};
    status = choir_tokenizer_encode(tokenizer, text, bytes, options, ids, n_ids);
    choir_free(text);
    return status;
}

/* The flags over the model's generation_config over the stated defaults. */
static choir_sampling sampling_of(const choir_cli_sampling_values *v, const choir_model_config *c)
{
    choir_sampling s = choir_sampling_of_model(c);
    if (v->temperature >= 0) s.temperature = (float)v->temperature;
    if (v->top_p >= 0) s.top_p = (float)v->top_p;
    if (v->top_k != CHOIR_CLI_UNSET) s.top_k = (uint32_t)v->top_k;
    if (v->repetition_penalty >= 0) s.repetition_penalty = (float)v->repetition_penalty;
    s.min_p = (float)v->min_p;
    s.presence_penalty = (float)v->presence_penalty;
    s.frequency_penalty = (float)v->frequency_penalty;
    s.seed = choir_answer_seed(v);
    s.min_tokens = (uint32_t)v->min_tokens;
    return s;
}

static const char *finish_text(const choir_event *done)
{
    if (done->n_finish == 0 || done->status != CHOIR_OK) return "error";
    return done->finish[0] == CHOIR_FINISH_STOP ? "stop" : "length";
}

static choir_status follow(choir_stream *stream, const choir_ask *ask, json_t *result)
{
    bool cancelled = false;
    for (choir_event e;;) {
        if (!cancelled && choir_cli_interrupted) {
            choir_stream_cancel(stream);
            cancelled = true;
        }
        if (!choir_stream_wait(stream, CHOIR_SECOND / 20, &e)) continue;
        if (e.kind == CHOIR_EVENT_DELTA && !cancelled) {
            if (ask->show != NULL) ask->show(e.text, e.text_bytes);
            choir_answer_add(result, e.text, e.text_bytes, e.tokens, e.n_tokens);
        }
        if (e.kind != CHOIR_EVENT_DONE) continue;
        choir_answer_end(result, cancelled ? "cancelled" : finish_text(&e), &e.usage);
        if (cancelled) return choir_fail(CHOIR_E_CANCELLED, "stopped by Ctrl-C");
        return e.status == CHOIR_OK ? CHOIR_OK : choir_fail(e.status, "%s", e.message);
    }
}

choir_status choir_answer_here(const choir_answerer *a, const choir_ask *ask, json_t *result)
{
    const choir_cli_sampling_values *v = ask->sampling;
    uint32_t *ids = NULL;
    size_t n_ids;
    choir_stream *stream;
    if (ask->messages != NULL)
        CHOIR_TRY(chat_tokens(a->engine, ask->messages, &ids, &n_ids));
    else
        CHOIR_TRY(choir_tokenizer_encode(choir_engine_tokenizer(a->engine), ask->prompt,
                                         strlen(ask->prompt), CHOIR_ENCODE_OPTIONS_DEFAULT, &ids,
                                         &n_ids));
    const choir_request request = {
        .tokens = ids,
        .n_tokens = n_ids,
        .sampling = sampling_of(v, choir_engine_config(a->engine)),
        .max_tokens = (uint32_t)v->max_tokens,
        .n = 1,
        .ignore_eos = v->ignore_eos,
        .skip_special = true,
        .stops = v->stop.item,
        .n_stops = v->stop.n,
        .adapters = a->adapters,
        .n_adapters = a->n_adapters,
    };
    json_object_set_new(result, "seed", json_integer((json_int_t)request.sampling.seed));
    choir_status status = choir_scheduler_submit(a->scheduler, &request, NULL, NULL, &stream);
    choir_free(ids);
    CHOIR_TRY(status);
    status = follow(stream, ask, result);
    choir_stream_release(stream);
    return status;
}
