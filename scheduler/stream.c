/* The outbox of a request: deltas in a ring that the engine thread fills and one consumer empties.
 */
#include "scheduler/state.h"

#include <stdio.h>
#include <string.h>

/* One record: this header, then text, then routes (experts, weights), padded to 8. */
typedef struct record {
    uint32_t bytes, index, text_bytes, n_tokens, token, has_logprob, n_top, n_routes;
    float logprob;
    uint32_t top_tokens[CHOIR_MAX_TOP_LOGPROBS];
    float top_logprobs[CHOIR_MAX_TOP_LOGPROBS];
} record;

/* What the consumer's event points to. */
typedef struct view {
    record r;
    choir_token_logprob logprob;
} view;

choir_status stream_create(choir_scheduler *s, void (*wake)(void *), void *user, choir_stream **out)
{
    choir_stream *stream = choir_calloc(CHOIR_MEM_REQUESTS, 1, sizeof *stream);
    if (stream == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
    stream->scheduler = s;
    stream->wake = wake;
    stream->user = user;
    stream->n_layers = s->engine.n_layers;
    stream->n_used = s->engine.n_experts_used;
    stream->outbox_bytes = s->options.outbox_bytes;
    stream->ring_bytes = s->options.outbox_bytes + 2 * DELTA_ROOM;
    stream->ring = choir_alloc(CHOIR_MEM_REQUESTS, stream->ring_bytes);
    pthread_mutex_init(&stream->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&stream->readable, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (stream->ring == NULL) {
        stream_free(stream);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request's outbox");
    }
    *out = stream;
    return CHOIR_OK;
}

void stream_free(choir_stream *stream)
{
    if (stream == NULL) return;
    pthread_mutex_destroy(&stream->lock);
    pthread_cond_destroy(&stream->readable);
    choir_free(stream->ring);
    choir_free(stream->view);
    choir_free(stream);
}

bool stream_has_room(choir_stream *stream, uint32_t n_deltas)
{
    pthread_mutex_lock(&stream->lock);
    bool room =
        stream->used == 0 || stream->used + (size_t)n_deltas * DELTA_ROOM <= stream->outbox_bytes;
    stream->wanted_room = !room;
    pthread_mutex_unlock(&stream->lock);
    return room;
}

/* Under the lock: tells the consumer, unless it has let go. */
static void tell(choir_stream *stream)
{
    pthread_cond_signal(&stream->readable);
    if (stream->wake != NULL && !stream->released) stream->wake(stream->user);
}

void stream_start(choir_stream *stream, const request *r)
{
    const request_adapters *a = &r->adapters;
    pthread_mutex_lock(&stream->lock);
    stream->started = true;
    stream->usage_at_start = r->usage;
    stream->n_adapters = a->n_uses > 0 ? a->n : 0;
    for (uint32_t i = 0; i < stream->n_adapters; i++) {
        char *name = stream->adapter_names[i];
        snprintf(name, sizeof stream->adapter_names[i], "%s",
                 choir_adapter_claim_name(&a->claims[i]));
        stream->adapters[i] = (choir_request_adapter){name, a->weights[i]};
    }
    pthread_mutex_unlock(&stream->lock);
}

/* The ring grows only for a record beyond all bounds (a token of kilobytes); records never wrap. */
static choir_status make_room(choir_stream *stream, size_t bytes)
{
    if (stream->head > 0 && stream->head + stream->used + bytes > stream->ring_bytes) {
        memmove(stream->ring, stream->ring + stream->head, stream->used);
        stream->head = 0;
    }
    if (stream->used + bytes <= stream->ring_bytes) return CHOIR_OK;
    uint8_t *larger = choir_realloc(CHOIR_MEM_REQUESTS, stream->ring, stream->used + bytes);
    if (larger == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request's output");
    stream->ring = larger;
    stream->ring_bytes = stream->used + bytes;
    return CHOIR_OK;
}

choir_status stream_put(choir_stream *stream, const delta *d)
{
    size_t n_routes = d->routes != NULL ? (size_t)stream->n_layers * stream->n_used : 0;
    size_t bytes = sizeof(record) + d->text_bytes + n_routes * 6 + 16;
    bytes = (bytes + 7) & ~(size_t)7;
    if (bytes > UINT32_MAX) return choir_fail(CHOIR_E_INTERNAL, "a delta of %zu bytes", bytes);
    pthread_mutex_lock(&stream->lock);
    choir_status status = CHOIR_OK;
    if (!stream->broken && (status = make_room(stream, bytes)) == CHOIR_OK) {
        uint8_t *at = stream->ring + stream->head + stream->used;
        record r = {.bytes = (uint32_t)bytes,
                    .index = d->index,
                    .text_bytes = (uint32_t)d->text_bytes,
                    .n_routes = (uint32_t)n_routes};
        if (d->sample != NULL) {
            r.n_tokens = 1;
            r.token = d->sample->token;
            r.has_logprob = d->logprobs;
            r.logprob = d->sample->logprob;
            r.n_top = d->logprobs ? d->sample->n_top : 0;
            memcpy(r.top_tokens, d->sample->top_tokens, sizeof r.top_tokens);
            memcpy(r.top_logprobs, d->sample->top_logprobs, sizeof r.top_logprobs);
        }
        memcpy(at, &r, sizeof r);
        if (n_routes > 0) {
            memcpy(at + sizeof r, d->routes->weights, n_routes * 4);
            memcpy(at + sizeof r + n_routes * 4, d->routes->experts, n_routes * 2);
        }
        if (d->text_bytes > 0) memcpy(at + sizeof r + n_routes * 6, d->text, d->text_bytes);
        stream->used += bytes;
        tell(stream);
    }
    pthread_mutex_unlock(&stream->lock);
    return status;
}

void stream_finish(choir_stream *stream, const request *r, choir_status status, const char *message)
{
    pthread_mutex_lock(&stream->lock);
    stream->done = true;
    stream->status = stream->broken ? CHOIR_E_NO_MEMORY : status;
    if (stream->broken) message = "no memory for the request's output";
    if (message != NULL) strncpy(stream->message, message, sizeof stream->message - 1);
    stream->usage = r->usage;
    stream->n_finish = r->n;
    for (uint32_t i = 0; i < r->n; i++) {
        stream->finish[i] = r->sequences[i].finish;
        stream->stop_match[i] = r->sequences[i].stop_match;
    }
    stream->finished_by_engine = true;
    bool last = stream->released;
    if (!last) tell(stream);
    pthread_mutex_unlock(&stream->lock);
    if (last) stream_free(stream);
}

/* Under the lock: copies the first record out, so that the engine thread may go on. */
static bool take_record(choir_stream *stream, choir_event *out)
{
    const uint8_t *at = stream->ring + stream->head;
    record r;
    memcpy(&r, at, sizeof r);
    size_t need = sizeof(view) + r.bytes;
    if (need > stream->view_bytes) {
        uint8_t *larger = choir_realloc(CHOIR_MEM_REQUESTS, stream->view, need);
        if (larger == NULL) {
            /* Without its memory the answer would have a hole: it ends instead. */
            stream->broken = true;
            stream->used = stream->head = 0;
            stream->status = CHOIR_E_NO_MEMORY;
            atomic_store_explicit(&stream->cancelled, true, memory_order_release);
            return false;
        }
        stream->view = larger;
        stream->view_bytes = need;
    }
    view *v = (view *)stream->view;
    uint8_t *rest = stream->view + sizeof *v;
    v->r = r;
    memcpy(rest, at + sizeof r, r.bytes - sizeof r);
    stream->head += r.bytes;
    stream->used -= r.bytes;
    if (stream->used == 0) stream->head = 0;
    v->logprob =
        (choir_token_logprob){r.token, r.logprob, r.n_top, v->r.top_tokens, v->r.top_logprobs};
    *out = (choir_event){
        .kind = CHOIR_EVENT_DELTA,
        .index = r.index,
        .text = (const char *)rest + (size_t)r.n_routes * 6,
        .text_bytes = r.text_bytes,
        .tokens = &v->r.token,
        .n_tokens = r.n_tokens,
        .logprobs = r.has_logprob ? &v->logprob : NULL,
        .route_weights = r.n_routes > 0 ? (const float *)rest : NULL,
        .route_experts = r.n_routes > 0 ? (const uint16_t *)(rest + (size_t)r.n_routes * 4) : NULL};
    return true;
}

static bool next_locked(choir_stream *stream, choir_event *out, bool *nudge)
{
    if (stream->started && !stream->started_taken) {
        stream->started_taken = true;
        *out = (choir_event){.kind = CHOIR_EVENT_STARTED,
                             .usage = stream->usage_at_start,
                             .adapters = stream->adapters,
                             .n_adapters = stream->n_adapters};
        return true;
    }
    if (stream->used > 0) {
        bool taken = take_record(stream, out);
        *nudge = stream->broken || (stream->wanted_room && stream->used < stream->outbox_bytes / 2);
        if (*nudge) stream->wanted_room = false;
        if (taken) return true;
    }
    if (!stream->done || stream->done_taken) return false;
    stream->done_taken = true;
    *out = (choir_event){.kind = CHOIR_EVENT_DONE,
                         .usage = stream->usage,
                         .status = stream->status,
                         .message = stream->message,
                         .finish = stream->finish,
                         .stop_match = stream->stop_match,
                         .n_finish = stream->n_finish,
                         .adapters = stream->adapters,
                         .n_adapters = stream->n_adapters};
    return true;
}

/* Under the stream's lock: until the engine thread has taken it to finish, the scheduler is alive.
 */
static void nudge_scheduler(choir_stream *stream)
{
    if (!stream->finished_by_engine) scheduler_nudge(stream->scheduler);
}

bool choir_stream_next(choir_stream *stream, choir_event *out)
{
    bool nudge = false;
    pthread_mutex_lock(&stream->lock);
    bool got = next_locked(stream, out, &nudge);
    if (nudge) nudge_scheduler(stream);
    pthread_mutex_unlock(&stream->lock);
    return got;
}

bool choir_stream_wait(choir_stream *stream, uint64_t timeout_ns, choir_event *out)
{
    if (choir_stream_next(stream, out)) return true;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t end = (uint64_t)until.tv_sec * CHOIR_SECOND + (uint64_t)until.tv_nsec;
    if (__builtin_add_overflow(end, timeout_ns, &end) || end > INT64_MAX) end = INT64_MAX;
    until = (struct timespec){(time_t)(end / CHOIR_SECOND), (long)(end % CHOIR_SECOND)};
    pthread_mutex_lock(&stream->lock);
    while (stream->used == 0 && !(stream->done && !stream->done_taken) &&
           pthread_cond_timedwait(&stream->readable, &stream->lock, &until) == 0)
        ;
    pthread_mutex_unlock(&stream->lock);
    return choir_stream_next(stream, out);
}

void choir_stream_cancel(choir_stream *stream)
{
    atomic_store_explicit(&stream->cancelled, true, memory_order_release);
    pthread_mutex_lock(&stream->lock);
    nudge_scheduler(stream);
    pthread_mutex_unlock(&stream->lock);
}

void choir_stream_release(choir_stream *stream)
{
    if (stream == NULL) return;
    atomic_store_explicit(&stream->cancelled, true, memory_order_release);
    pthread_mutex_lock(&stream->lock);
    stream->released = true;
    bool last = stream->finished_by_engine;
    nudge_scheduler(stream);
    pthread_mutex_unlock(&stream->lock);
    if (last) stream_free(stream);
}
