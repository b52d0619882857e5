/* One request to a server, over gRPC. */
#include "cli/answer.h"

#include <string.h>

enum { MAX_MESSAGES = 4096, MAX_STOPS = CHOIR_MAX_LIST };

/* The request's messages, built where they stay until the call is over. */
typedef struct letter {
    Choir__V1__GenerateRequest request;
    Choir__V1__Sampling sampling;
    Choir__V1__Chat chat;
    Choir__V1__ChatMessage *messages, **pointers;
    Choir__V1__AdapterWeight mix[CHOIR_MAX_MIX], *pointers_of_mix[CHOIR_MAX_MIX];
} letter;

static choir_status write_chat(const json_t *messages, letter *l)
{
    size_t n = json_array_size(messages);
    if (n > MAX_MESSAGES)
        return choir_fail(CHOIR_E_INVALID, "the conversation has %zu messages, the limit is %d", n,
                          MAX_MESSAGES);
    l->messages = choir_calloc(CHOIR_MEM_OTHER, n, sizeof *l->messages);
    l->pointers = choir_calloc(CHOIR_MEM_OTHER, n, sizeof *l->pointers);
    if (l->messages == NULL || l->pointers == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the conversation");
    for (size_t i = 0; i < n; i++) {
        const json_t *m = json_array_get(messages, i);
        choir__v1__chat_message__init(&l->messages[i]);
        l->messages[i].role = (char *)json_string_value(json_object_get(m, "role"));
        l->messages[i].content = (char *)json_string_value(json_object_get(m, "content"));
        l->pointers[i] = &l->messages[i];
    }
    l->chat.n_messages = n;
    l->chat.messages = l->pointers;
    l->request.input_case = CHOIR__V1__GENERATE_REQUEST__INPUT_CHAT;
    l->request.chat = &l->chat;
    return CHOIR_OK;
}

/* Flags that were not given are left out: the server knows the model's own defaults. */
static void write_sampling(const choir_cli_sampling_values *v, Choir__V1__Sampling *s)
{
    if (v->temperature >= 0) CHOIR_CLIENT_SET(s, temperature, TEMPERATURE, (float)v->temperature);
    if (v->top_p >= 0) CHOIR_CLIENT_SET(s, top_p, TOP_P, (float)v->top_p);
    if (v->top_k != CHOIR_CLI_UNSET) CHOIR_CLIENT_SET(s, top_k, TOP_K, (uint32_t)v->top_k);
    if (v->min_p > 0) CHOIR_CLIENT_SET(s, min_p, MIN_P, (float)v->min_p);
    if (v->repetition_penalty >= 0)
        CHOIR_CLIENT_SET(s, repetition_penalty, REPETITION_PENALTY, (float)v->repetition_penalty);
    if (v->presence_penalty != 0)
        CHOIR_CLIENT_SET(s, presence_penalty, PRESENCE_PENALTY, (float)v->presence_penalty);
    if (v->frequency_penalty != 0)
        CHOIR_CLIENT_SET(s, frequency_penalty, FREQUENCY_PENALTY, (float)v->frequency_penalty);
    CHOIR_CLIENT_SET(s, seed, SEED, choir_answer_seed(v));
    if (v->max_tokens > 0) CHOIR_CLIENT_SET(s, max_tokens, MAX_TOKENS, (uint32_t)v->max_tokens);
    if (v->min_tokens > 0) CHOIR_CLIENT_SET(s, min_tokens, MIN_TOKENS, (uint32_t)v->min_tokens);
    if (v->ignore_eos) CHOIR_CLIENT_SET(s, ignore_eos, IGNORE_EOS, true);
    s->n_stop = v->stop.n;
    s->stop = (char **)v->stop.item;
}

/* One that has its full weight is an adapter, all else a mix. */
static void write_adapters(const choir_answerer *a, letter *l)
{
    if (a->n_adapters == 1 && a->adapters[0].weight == 1) {
        l->request.adapting_case = CHOIR__V1__GENERATE_REQUEST__ADAPTING_ADAPTER;
        l->request.adapter = a->names[0];
        return;
    }
    for (uint32_t i = 0; i < a->n_adapters; i++) {
        choir__v1__adapter_weight__init(&l->mix[i]);
        l->mix[i].adapter = a->names[i];
        l->mix[i].weight = a->adapters[i].weight;
        l->pointers_of_mix[i] = &l->mix[i];
    }
    l->request.n_mix = a->n_adapters;
    l->request.mix = l->pointers_of_mix;
}

typedef struct listener {
    const choir_ask *ask;
    json_t *result;
} listener;

static uint64_t nanoseconds(double ms)
{
    return ms > 0 ? (uint64_t)(ms * 1e6) : 0;
}

static void end_with(json_t *result, const Choir__V1__Done *done)
{
    choir_usage u = {0};
    if (done->usage != NULL) {
        u.prompt_tokens = done->usage->prompt_tokens;
        u.cached_tokens = done->usage->cached_tokens;
        u.output_tokens = done->usage->output_tokens;
    }
    if (done->timings != NULL) {
        u.queue_ns = nanoseconds(done->timings->queue_ms);
        u.prefill_ns = nanoseconds(done->timings->prefill_ms);
        u.decode_ns = nanoseconds(done->timings->decode_ms);
    }
    choir_answer_end(result, done->n_finish_reason > 0 ? done->finish_reason[0] : "error", &u);
}

static bool on_event(void *user, const Choir__V1__GenerateEvent *event)
{
    listener *l = user;
    switch (event->event_case) {
    case CHOIR__V1__GENERATE_EVENT__EVENT_STARTED:
        json_object_set_new(l->result, "model", json_string(event->started->model));
        if (event->started->adapter[0] != '\0')
            json_object_set_new(l->result, "adapter", json_string(event->started->adapter));
        json_object_set_new(l->result, "request_id", json_string(event->started->request_id));
        json_object_set_new(l->result, "seed", json_integer((json_int_t)event->started->seed));
        break;
    case CHOIR__V1__GENERATE_EVENT__EVENT_DELTA: {
        const Choir__V1__Delta *d = event->delta;
        size_t bytes = strlen(d->text);
        if (l->ask->show != NULL) l->ask->show(d->text, bytes);
        choir_answer_add(l->result, d->text, bytes, d->token_ids, d->n_token_ids);
        break;
    }
    case CHOIR__V1__GENERATE_EVENT__EVENT_DONE:
        end_with(l->result, event->done);
        break;
    default:
        break; /* an event that a newer server may send */
    }
    return true;
}

choir_status choir_answer_there(const choir_answerer *a, const choir_ask *ask, json_t *result)
{
    letter l = {.request = CHOIR__V1__GENERATE_REQUEST__INIT,
                .sampling = CHOIR__V1__SAMPLING__INIT,
                .chat = CHOIR__V1__CHAT__INIT};
    listener listening = {ask, result};
    choir_status status = CHOIR_OK;
    l.request.model = (char *)a->model;
    l.request.sampling = &l.sampling;
    write_sampling(ask->sampling, &l.sampling);
    write_adapters(a, &l);
    if (ask->messages != NULL) {
        CHOIR_TRY_TO(done, status, write_chat(ask->messages, &l));
    } else {
        l.request.input_case = CHOIR__V1__GENERATE_REQUEST__INPUT_PROMPT;
        l.request.prompt = (char *)ask->prompt;
    }
    status = choir_client_generate(a->client, &l.request, on_event, &listening);
    if (status == CHOIR_E_CANCELLED && choir_cli_interrupted) {
        const choir_usage nothing = {0};
        choir_answer_end(result, "cancelled", &nothing);
        status = choir_fail(CHOIR_E_CANCELLED, "stopped by Ctrl-C");
    }
done:
    choir_free(l.messages);
    choir_free(l.pointers);
    return status;
}
