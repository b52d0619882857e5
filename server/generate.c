/* Choir.Generate: a checked request goes to the scheduler, its events come back as messages. The
 * next event is taken only when the last write was: what a slow reader leaves waits in the
 * scheduler's outbox. */
#include "server/call.h"

#include "server/generate_request.h"
#include "server/message.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct choir_generation {
    choir_stream *stream;
    char id[129];
    char *adapter; /* as `started` names it; NULL: none */
    uint64_t seed;
    uint32_t n_layers, n_used;
    uint32_t n_stops;
    char *stops[CHOIR_MAX_STOPS];
};

static void free_generation(choir_generation *g)
{
    if (g == NULL) return;
    for (uint32_t i = 0; i < g->n_stops; i++) choir_free(g->stops[i]);
    choir_free(g->adapter);
    choir_free(g);
}

void choir_generate_release(choir_call *call)
{
    choir_generation *g = call->generation;
    if (g == NULL) return;
    call->generation = NULL;
    choir_stream_release(g->stream);
    free_generation(g);
}

/* The name, or of a mix "a=0.5,b=1". */
static char *adapter_text(const choir_request *r)
{
    enum { WEIGHT_BYTES = 24 };
    size_t room = 1, n = 0;
    for (uint32_t i = 0; i < r->n_adapters; i++)
        room += strlen(r->adapters[i].name) + WEIGHT_BYTES;
    char *text = choir_alloc(CHOIR_MEM_REQUESTS, room);
    for (uint32_t i = 0; i < r->n_adapters && text != NULL; i++) {
        const choir_request_adapter *a = &r->adapters[i];
        bool alone = r->n_adapters == 1 && a->weight == 1;
        n += (size_t)snprintf(text + n, room - n, "%s%s", i > 0 ? "," : "", a->name);
        if (!alone) n += (size_t)snprintf(text + n, room - n, "=%g", (double)a->weight);
    }
    return text;
}

static choir_status make_generation(const choir_generate_request *r, choir_generation **out)
{
    choir_generation *g = choir_calloc(CHOIR_MEM_REQUESTS, 1, sizeof *g);
    if (g == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
    memcpy(g->id, r->id, sizeof g->id);
    g->seed = r->request.sampling.seed;
    g->n_layers = r->model->config->n_layers;
    g->n_used = r->model->config->n_experts_used;
    if (r->request.n_adapters > 0 && (g->adapter = adapter_text(&r->request)) == NULL) {
        free_generation(g);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
    }
    for (; g->n_stops < r->request.n_stops; g->n_stops++) {
        g->stops[g->n_stops] = choir_strdup(CHOIR_MEM_REQUESTS, r->request.stops[g->n_stops]);
        if (g->stops[g->n_stops] != NULL) continue;
        free_generation(g);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
    }
    *out = g;
    return CHOIR_OK;
}

static void wake(void *user)
{
    choir_call_wake(user);
}

/* Under the lock, so that a client that leaves now either stops the submit or finds the stream. */
static choir_status submit(choir_call *call, const choir_generate_request *r, choir_generation *g)
{
    choir_status status = CHOIR_OK;
    pthread_mutex_lock(&call->lock);
    if (!call->cancelled && !call->finishing) {
        status = choir_scheduler_submit(r->model->scheduler, &r->request, wake, call, &g->stream);
        if (status == CHOIR_OK) {
            call->generation = g;
            g = NULL;
            choir_generate_pump(call);
        }
    }
    pthread_mutex_unlock(&call->lock);
    free_generation(g);
    return status;
}

static choir_status resolve(choir_call *call, choir_generate_request *r)
{
    choir_server *s = call->server;
    const choir_server_model *model;
    CHOIR_TRY(choir_generate_request_read(call->data, call->bytes, r));
    CHOIR_TRY(choir_server_find_model(s, r->message->model, &model));
    if (r->id[0] == '\0')
        snprintf(r->id, sizeof r->id, "%s-%" PRIu64, s->boot,
                 atomic_fetch_add(&s->n_requests, 1) + 1);
    pthread_mutex_lock(&call->lock);
    call->model = model;
    pthread_mutex_unlock(&call->lock);
    CHOIR_TRY(choir_generate_request_resolve(r, model));
    r->request.deadline_ns = call->deadline_ns;
    choir_generation *g = NULL;
    CHOIR_TRY(make_generation(r, &g));
    return submit(call, r, g);
}

void choir_generate_prepare(choir_call *call)
{
    choir_generate_request r = {0};
    choir_status status = resolve(call, &r);
    if (status != CHOIR_OK) choir_call_fail(call, status);
    choir_generate_request_free(&r);
    choir_free(call->data); /* a long prompt need not be kept while its answer runs */
    call->data = NULL;
}

/* --- events to messages */

static grpc_slice pack_started(const choir_call *call, const choir_event *e)
{
    const choir_generation *g = call->generation;
    Choir__V1__GenerateEvent event = CHOIR__V1__GENERATE_EVENT__INIT;
    Choir__V1__Started started = CHOIR__V1__STARTED__INIT;
    started.request_id = (char *)g->id;
    started.model = (char *)call->model->name;
    if (g->adapter != NULL) started.adapter = g->adapter;
    started.prompt_tokens = e->usage.prompt_tokens;
    started.cached_tokens = e->usage.cached_tokens;
    started.seed = g->seed;
    event.event_case = CHOIR__V1__GENERATE_EVENT__EVENT_STARTED;
    event.started = &started;
    return choir_message_pack(&event.base);
}

/* What protobuf-c wants of logprobs: pointers to messages, all in one block. */
typedef struct logprob_block {
    Choir__V1__TokenLogprob **list;
    Choir__V1__TokenLogprob *tokens;
    Choir__V1__TokenAlternative **alternative_list;
    Choir__V1__TokenAlternative *alternatives;
} logprob_block;

static void *make_logprobs(const choir_event *e, logprob_block *b)
{
    size_t n = e->n_tokens, n_top = 0;
    for (size_t i = 0; i < n; i++) n_top += e->logprobs[i].n_top;
    char *block = choir_alloc(CHOIR_MEM_REQUESTS,
                              n * (sizeof *b->list + sizeof *b->tokens) +
                                  n_top * (sizeof *b->alternative_list + sizeof *b->alternatives));
    if (block == NULL) return NULL;
    b->tokens = (void *)block;
    b->alternatives = (void *)(b->tokens + n);
    b->list = (void *)(b->alternatives + n_top);
    b->alternative_list = (void *)(b->list + n);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const choir_token_logprob *from = &e->logprobs[i];
        Choir__V1__TokenLogprob *to = b->list[i] = &b->tokens[i];
        choir__v1__token_logprob__init(to);
        to->token = from->token;
        to->logprob = from->logprob;
        to->n_top = from->n_top;
        to->top = b->alternative_list + at;
        for (uint32_t k = 0; k < from->n_top; k++, at++) {
            b->alternative_list[at] = &b->alternatives[at];
            choir__v1__token_alternative__init(&b->alternatives[at]);
            b->alternatives[at].token = from->top_tokens[k];
            b->alternatives[at].logprob = from->top_logprobs[k];
        }
    }
    return block;
}

/* Delta's text is appended by hand behind its other fields: it may hold a NUL that the model wrote.
 */
static grpc_slice wrap_delta(const Choir__V1__Delta *delta, const char *text, size_t bytes)
{
    enum { EVENT_DELTA = 2, DELTA_TEXT = 2 };
    size_t packed = protobuf_c_message_get_packed_size(&delta->base);
    size_t text_header = bytes == 0 ? 0 : choir_wire_put_header(NULL, DELTA_TEXT, bytes);
    size_t inner = packed + text_header + bytes;
    grpc_slice slice = grpc_slice_malloc(choir_wire_put_header(NULL, EVENT_DELTA, inner) + inner);
    uint8_t *p = GRPC_SLICE_START_PTR(slice);
    p += choir_wire_put_header(p, EVENT_DELTA, inner);
    p += protobuf_c_message_pack(&delta->base, p);
    if (bytes != 0) {
        p += choir_wire_put_header(p, DELTA_TEXT, bytes);
        memcpy(p, text, bytes);
    }
    return slice;
}

static choir_status pack_delta(const choir_call *call, const choir_event *e, grpc_slice *out)
{
    const choir_generation *g = call->generation;
    Choir__V1__Delta delta = CHOIR__V1__DELTA__INIT;
    Choir__V1__Routes routes = CHOIR__V1__ROUTES__INIT;
    void *logprobs = NULL;
    uint32_t *experts = NULL;
    delta.index = e->index;
    delta.n_token_ids = e->n_tokens;
    delta.token_ids = (uint32_t *)e->tokens;
    choir_status status = CHOIR_OK;
    if (e->logprobs != NULL) {
        logprob_block block;
        logprobs = make_logprobs(e, &block);
        if (logprobs == NULL) status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for logprobs");
        delta.n_logprobs = logprobs == NULL ? 0 : e->n_tokens;
        delta.logprobs = logprobs == NULL ? NULL : block.list;
    }
    if (e->route_experts != NULL && status == CHOIR_OK) {
        size_t n = (size_t)g->n_layers * g->n_used;
        experts = choir_calloc(CHOIR_MEM_REQUESTS, n, sizeof *experts);
        if (experts == NULL) status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for routes");
        for (size_t i = 0; i < n && experts != NULL; i++) experts[i] = e->route_experts[i];
        routes.n_layers = g->n_layers;
        routes.n_used = g->n_used;
        routes.n_experts = routes.n_weights = n;
        routes.experts = experts;
        routes.weights = (float *)e->route_weights;
        delta.routes = &routes;
    }
    if (status == CHOIR_OK) *out = wrap_delta(&delta, e->text, e->text_bytes);
    choir_free(logprobs);
    choir_free(experts);
    return status;
}

static const char *finish_text(choir_finish finish)
{
    switch (finish) {
    case CHOIR_FINISH_LENGTH:
        return "length";
    case CHOIR_FINISH_ERROR:
        return "error";
    default:
        return "stop";
    }
}

static grpc_slice pack_done(const choir_call *call, const choir_event *e)
{
    const choir_generation *g = call->generation;
    Choir__V1__GenerateEvent event = CHOIR__V1__GENERATE_EVENT__INIT;
    Choir__V1__Done done = CHOIR__V1__DONE__INIT;
    Choir__V1__Usage usage = CHOIR__V1__USAGE__INIT;
    Choir__V1__Timings timings = CHOIR__V1__TIMINGS__INIT;
    char *reasons[CHOIR_MAX_SAMPLES], *matches[CHOIR_MAX_SAMPLES];
    uint32_t n = e->n_finish < CHOIR_MAX_SAMPLES ? e->n_finish : CHOIR_MAX_SAMPLES;
    bool any_match = false;
    for (uint32_t i = 0; i < n; i++) {
        bool matched = e->stop_match != NULL && e->stop_match[i] < g->n_stops;
        reasons[i] = (char *)finish_text(e->finish[i]);
        matches[i] = matched ? g->stops[e->stop_match[i]] : (char *)"";
        any_match |= matched;
    }
    usage.prompt_tokens = e->usage.prompt_tokens;
    usage.cached_tokens = e->usage.cached_tokens;
    usage.output_tokens = e->usage.output_tokens;
    usage.total_tokens = usage.prompt_tokens + usage.output_tokens;
    timings.queue_ms = (double)e->usage.queue_ns / CHOIR_MS;
    timings.prefill_ms = (double)e->usage.prefill_ns / CHOIR_MS;
    timings.decode_ms = (double)e->usage.decode_ns / CHOIR_MS;
    timings.preemptions = e->usage.n_preemptions;
    done.n_finish_reason = n;
    done.finish_reason = reasons;
    done.n_stop_match = any_match ? n : 0;
    done.stop_match = matches;
    done.usage = &usage;
    done.timings = &timings;
    event.event_case = CHOIR__V1__GENERATE_EVENT__EVENT_DONE;
    event.done = &done;
    return choir_message_pack(&event.base);
}

void choir_generate_pump(choir_call *call)
{
    choir_event e;
    if (call->generation == NULL || call->sending || call->finishing || call->cancelled) return;
    if (!choir_stream_next(call->generation->stream, &e)) return;
    grpc_slice message;
    choir_status status = CHOIR_OK;
    switch (e.kind) {
    case CHOIR_EVENT_STARTED:
        choir_call_send(call, pack_started(call, &e));
        break;
    case CHOIR_EVENT_DELTA:
        status = pack_delta(call, &e, &message);
        if (status == CHOIR_OK)
            choir_call_send(call, message);
        else
            choir_call_finish(call, status, choir_error_message());
        break;
    case CHOIR_EVENT_DONE:
        if (e.status == CHOIR_OK)
            choir_call_reply(call, pack_done(call, &e));
        else
            choir_call_finish(call, e.status,
                              e.message != NULL ? e.message : choir_status_text(e.status));
        break;
    }
    if (e.kind == CHOIR_EVENT_DONE || status != CHOIR_OK) choir_generate_release(call);
}
