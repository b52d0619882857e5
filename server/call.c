#include "server/call.h"

#include "server/message.h"

#include <grpc/byte_buffer.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static void on_arrived(choir_call *call, bool ok);
static void on_closed(choir_call *call, bool ok);
static void on_received(choir_call *call, bool ok);
static void on_sent(choir_call *call, bool ok);

static void arm(choir_tag *tag)
{
    atomic_store_explicit(&tag->armed, 1, memory_order_release);
}

static choir_call *make_call(choir_server *server)
{
    choir_call *call = choir_calloc(CHOIR_MEM_SERVER, 1, sizeof *call);
    if (call == NULL) return NULL;
    call->server = server;
    call->arrived = (choir_tag){.run = on_arrived, .call = call};
    call->closed = (choir_tag){.run = on_closed, .call = call};
    call->received = (choir_tag){.run = on_received, .call = call};
    call->sent = (choir_tag){.run = on_sent, .call = call};
    call->references = 1; /* of the slot; then of the `closed` batch */
    call->watched = -1;
    call->watch_sent = -1;
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    pthread_mutex_init(&call->lock, NULL);
    return call;
}

static void free_call(choir_call *call)
{
    CHOIR_ASSERT(call->generation == NULL);
    if (call->core_message != NULL) grpc_byte_buffer_destroy(call->core_message);
    if (call->grpc != NULL) grpc_call_unref(call->grpc);
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->metadata);
    pthread_mutex_destroy(&call->lock);
    choir_free(call->data);
    choir_free(call);
}

choir_status choir_call_await(choir_server *server)
{
    choir_call *call = make_call(server);
    if (call == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a call");
    arm(&call->arrived);
    grpc_call_error e =
        grpc_server_request_call(server->grpc, &call->grpc, &call->details, &call->metadata,
                                 server->completions, server->completions, &call->arrived);
    if (e == GRPC_CALL_OK) return CHOIR_OK;
    free_call(call);
    return choir_fail(CHOIR_E_INTERNAL, "grpc_server_request_call gives %d", (int)e);
}

static void link_call(choir_call *call)
{
    choir_server *s = call->server;
    pthread_mutex_lock(&s->calls_lock);
    call->next = s->calls;
    if (s->calls != NULL) s->calls->previous = call;
    s->calls = call;
    pthread_mutex_unlock(&s->calls_lock);
}

static void unlink_call(choir_call *call)
{
    choir_server *s = call->server;
    pthread_mutex_lock(&s->calls_lock);
    if (call->previous != NULL)
        call->previous->next = call->next;
    else
        s->calls = call->next;
    if (call->next != NULL) call->next->previous = call->previous;
    pthread_mutex_unlock(&s->calls_lock);
}

void choir_call_hold(choir_call *call)
{
    atomic_fetch_add_explicit(&call->references, 1, memory_order_relaxed);
}

void choir_call_drop(choir_call *call)
{
    /* acq_rel: the last one to drop sees what all others wrote. */
    if (atomic_fetch_sub_explicit(&call->references, 1, memory_order_acq_rel) != 1) return;
    choir_server *server = call->server;
    unlink_call(call);
    if (call->counted) atomic_fetch_sub(&server->n_generating, 1);
    free_call(call);
    atomic_fetch_sub(&server->n_open, 1);
}

/* Starts ops under `tag` with a reference of its own. False: gRPC refused, which is a bug of ours.
 */
static bool start(choir_call *call, choir_tag *tag, const grpc_op *ops, size_t n)
{
    choir_call_hold(call);
    arm(tag);
    grpc_call_error e = grpc_call_start_batch(call->grpc, ops, n, tag, NULL);
    if (e == GRPC_CALL_OK) return true;
    choir_log(CHOIR_LOG_ERROR, "grpc_call_start_batch gives %s", grpc_call_error_to_string(e));
    atomic_fetch_sub_explicit(&call->references, 1, memory_order_relaxed); /* never the last one */
    return false;
}

/* --- sending; call->lock is held */

typedef struct batch {
    grpc_op ops[3];
    size_t n;
    grpc_byte_buffer *message;
    grpc_metadata trailer;
    grpc_slice sentence;
} batch;

static void add_headers(batch *b, choir_call *call)
{
    if (call->headers_sent) return;
    call->headers_sent = true;
    b->ops[b->n++].op = GRPC_OP_SEND_INITIAL_METADATA;
}

static void add_message(batch *b, grpc_slice slice)
{
    b->message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    b->ops[b->n].op = GRPC_OP_SEND_MESSAGE;
    b->ops[b->n++].data.send_message.send_message = b->message;
}

static void add_status(batch *b, int code, grpc_slice *sentence)
{
    grpc_op *op = &b->ops[b->n++];
    op->op = GRPC_OP_SEND_STATUS_FROM_SERVER;
    op->data.send_status_from_server.status = (grpc_status_code)code;
    op->data.send_status_from_server.status_details = sentence;
}

static void send_batch(choir_call *call, batch *b)
{
    call->sending = true;
    call->since_ns = choir_clock_now();
    if (!start(call, &call->sent, b->ops, b->n)) call->sending = false;
    if (b->message != NULL) grpc_byte_buffer_destroy(b->message);
}

void choir_call_send(choir_call *call, grpc_slice message)
{
    CHOIR_ASSERT(!call->sending);
    if (call->finishing || call->cancelled) {
        grpc_slice_unref(message);
        return;
    }
    batch b = {0};
    add_headers(&b, call);
    add_message(&b, message);
    send_batch(call, &b);
}

void choir_call_reply(choir_call *call, grpc_slice message)
{
    CHOIR_ASSERT(!call->sending);
    if (call->finishing || call->cancelled) {
        grpc_slice_unref(message);
        return;
    }
    call->finishing = true;
    batch b = {0};
    add_headers(&b, call);
    add_message(&b, message);
    add_status(&b, 0, NULL);
    send_batch(call, &b);
}

/* How long a client that retries by itself should wait; -1: it must not; < -1: nothing is said. */
static int64_t pushback_ms(choir_call *call, choir_status status)
{
    if (status == CHOIR_E_DATA_LOSS) return -1;
    if (status == CHOIR_E_FULL && call->model != NULL)
        return choir_scheduler_retry_ms(call->model->scheduler);
    if (choir_status_grpc(status) == GRPC_STATUS_RESOURCE_EXHAUSTED) return 1000;
    return -2;
}

void choir_call_finish(choir_call *call, choir_status status, const char *sentence)
{
    if (call->finishing || call->cancelled) return;
    call->finishing = true;
    int code = choir_status_grpc(status);
    char internal[96];
    if (status == CHOIR_E_INTERNAL) {
        uint64_t id = atomic_fetch_add(&call->server->n_internal, 1) + 1;
        choir_log(CHOIR_LOG_ERROR, "internal error %s-%" PRIu64 " in %s: %s", call->server->boot,
                  id, call->method->path, sentence);
        snprintf(internal, sizeof internal,
                 "internal error %s-%" PRIu64 "; the server's log says more", call->server->boot,
                 id);
        sentence = internal;
    }
    if (status != CHOIR_OK && !call->headers_sent)
        atomic_fetch_add_explicit(&call->server->n_refused, 1, memory_order_relaxed);
    if (call->sending) {
        grpc_call_cancel_with_status(call->grpc, (grpc_status_code)code, sentence, NULL);
        return;
    }
    batch b = {0};
    char pushback[24];
    b.sentence = grpc_slice_from_copied_string(sentence);
    add_headers(&b, call);
    add_status(&b, code, &b.sentence);
    int64_t wait_ms = pushback_ms(call, status);
    if (wait_ms >= -1) {
        snprintf(pushback, sizeof pushback, "%" PRId64, wait_ms);
        b.trailer.key = grpc_slice_from_static_string("grpc-retry-pushback-ms");
        b.trailer.value = grpc_slice_from_copied_string(pushback);
        b.ops[b.n - 1].data.send_status_from_server.trailing_metadata_count = 1;
        b.ops[b.n - 1].data.send_status_from_server.trailing_metadata = &b.trailer;
    }
    send_batch(call, &b);
    grpc_slice_unref(b.sentence);
    if (wait_ms >= -1) grpc_slice_unref(b.trailer.value);
}

void choir_call_fail(choir_call *call, choir_status status)
{
    char sentence[CHOIR_MAX_SENTENCE];
    snprintf(sentence, sizeof sentence, "%s", choir_error_message());
    pthread_mutex_lock(&call->lock);
    choir_call_finish(call, status, sentence);
    pthread_mutex_unlock(&call->lock);
}

static void refuse(choir_call *call, choir_status status, const char *sentence)
{
    pthread_mutex_lock(&call->lock);
    choir_call_finish(call, status, sentence);
    pthread_mutex_unlock(&call->lock);
}

/* --- the life of a call, on the completion thread */

static uint64_t clock_deadline(gpr_timespec deadline)
{
    deadline = gpr_convert_clock_type(deadline, GPR_CLOCK_MONOTONIC);
    if (gpr_time_cmp(deadline, gpr_inf_future(GPR_CLOCK_MONOTONIC)) == 0) return 0;
    gpr_timespec left = gpr_time_sub(deadline, gpr_now(GPR_CLOCK_MONOTONIC));
    uint64_t now = choir_clock_now();
    if (left.tv_sec < 0) return 1;
    if (left.tv_sec > 365 * 24 * 3600) return 0;
    return now + (uint64_t)left.tv_sec * CHOIR_SECOND + (uint64_t)left.tv_nsec;
}

static void post_slot(choir_server *server)
{
    /* Without memory the slot is missing until the watch thread finds some. */
    if (choir_call_await(server) != CHOIR_OK)
        atomic_fetch_add_explicit(&server->n_slots_missing, 1, memory_order_relaxed);
}

/* Why a call is refused before its message is read; CHOIR_OK: it is not. */
static choir_status admit(choir_call *call)
{
    choir_server *s = call->server;
    if (!call->method->open && !choir_auth_allows(s, &call->metadata))
        return choir_fail(CHOIR_E_UNAUTHENTICATED,
                          "this server wants an API key: authorization: Bearer KEY");
    if (call->method->missing != NULL)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s", call->method->missing);
    if (atomic_load(&s->n_open) > s->options.max_calls)
        return choir_fail(CHOIR_E_FULL, "%u calls are open, the limit; try again later",
                          s->options.max_calls);
    if (call->method->generates && atomic_load(&s->phase) >= CHOIR_PHASE_REFUSING)
        return choir_fail(CHOIR_E_UNAVAILABLE, "the server is shutting down; ask another one");
    return CHOIR_OK;
}

static void on_arrived(choir_call *call, bool ok)
{
    choir_server *s = call->server;
    if (!ok) { /* the server shuts down: no call came */
        free_call(call);
        return;
    }
    post_slot(s);
    atomic_fetch_add(&s->n_open, 1);
    atomic_fetch_add_explicit(&s->n_calls, 1, memory_order_relaxed);
    call->deadline_ns = clock_deadline(call->details.deadline);
    call->since_ns = choir_clock_now();
    call->method = choir_method_find((const char *)GRPC_SLICE_START_PTR(call->details.method),
                                     GRPC_SLICE_LENGTH(call->details.method));
    link_call(call);
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    close.data.recv_close_on_server.cancelled = &call->core_cancelled;
    start(call, &call->closed, &close, 1);
    choir_status status = admit(call);
    if (status == CHOIR_OK) {
        if (call->method->generates) {
            call->counted = true;
            atomic_fetch_add(&s->n_generating, 1);
        }
        choir_call_receive(call);
    } else {
        choir_call_fail(call, status);
    }
    choir_call_drop(call); /* the slot's reference */
}

static void on_closed(choir_call *call, bool ok)
{
    pthread_mutex_lock(&call->lock);
    if (!ok || call->core_cancelled) call->cancelled = true;
    choir_generate_release(call);
    pthread_mutex_unlock(&call->lock);
    choir_call_drop(call);
}

void choir_call_receive(choir_call *call)
{
    grpc_op receive = {.op = GRPC_OP_RECV_MESSAGE};
    receive.data.recv_message.recv_message = &call->core_message;
    start(call, &call->received, &receive, 1);
}

static choir_status take_message(choir_call *call)
{
    choir_free(call->data);
    call->data = NULL;
    call->bytes = 0;
    grpc_byte_buffer *message = call->core_message;
    call->core_message = NULL;
    choir_status status = choir_message_receive(message, call->server->options.max_message_bytes,
                                                &call->data, &call->bytes);
    grpc_byte_buffer_destroy(message);
    return status;
}

static void handle_message(choir_call *call, bool ok)
{
    bool got = ok && call->core_message != NULL;
    pthread_mutex_lock(&call->lock);
    bool over = call->finishing || call->cancelled;
    call->since_ns = 0;
    if (!got && call->method->client_stream && !over) {
        call->half_closed = true;
        if (call->method->pump != NULL) call->method->pump(call);
        over = true;
    }
    pthread_mutex_unlock(&call->lock);
    if (over) return;
    if (!got) {
        refuse(call, CHOIR_E_INVALID, "the call carries no request message");
        return;
    }
    choir_status status = take_message(call);
    if (status != CHOIR_OK) {
        choir_call_fail(call, status);
    } else if (call->method->parsed || call->method->slow) {
        choir_server *s = call->server;
        choir_call_hold(call);
        if (choir_queue_try_push(call->method->slow ? s->slow_queue : s->parse_queue, &call->work))
            return;
        choir_call_drop(call); /* never the last: on_received has one */
        refuse(call, CHOIR_E_FULL,
               call->method->slow ? "too many adapters are waiting to be loaded; try again later"
                                  : "too many requests are being read; try again later");
    } else {
        call->method->prepare(call);
    }
}

static void on_received(choir_call *call, bool ok)
{
    handle_message(call, ok);
    choir_call_drop(call);
}

static void on_sent(choir_call *call, bool ok)
{
    pthread_mutex_lock(&call->lock);
    call->sending = false;
    call->since_ns = 0;
    if (ok && !call->finishing && !call->cancelled && call->method->pump != NULL)
        call->method->pump(call);
    pthread_mutex_unlock(&call->lock);
    choir_call_drop(call);
}

void choir_call_wake(choir_call *call)
{
    /* Pairs with the pump's clear: a wake after it queues the call again. */
    if (atomic_exchange(&call->is_woken, true)) return;
    choir_call_hold(call);
    if (!choir_queue_try_push(call->server->wake_queue, &call->woken)) choir_call_drop(call);
}

/* --- all calls */

void choir_calls_sweep(choir_server *server)
{
    uint64_t now = choir_clock_now(), limit = server->options.stuck_ms * CHOIR_MS;
    pthread_mutex_lock(&server->calls_lock);
    for (choir_call *call = server->calls; call != NULL; call = call->next) {
        pthread_mutex_lock(&call->lock);
        bool waits = call->since_ns != 0 && (call->sending || !call->method->client_stream);
        if (waits && !call->cancelled && now > call->since_ns + limit) {
            const char *why = call->sending
                                  ? "the reader takes nothing; the call was ended"
                                  : "the request message did not come; the call was ended";
            call->since_ns = 0;
            call->finishing = true;
            choir_generate_release(call);
            grpc_call_cancel_with_status(call->grpc, GRPC_STATUS_CANCELLED, why, NULL);
        }
        pthread_mutex_unlock(&call->lock);
    }
    pthread_mutex_unlock(&server->calls_lock);
}

void choir_calls_stop(choir_server *server)
{
    pthread_mutex_lock(&server->calls_lock);
    for (choir_call *call = server->calls; call != NULL; call = call->next) {
        pthread_mutex_lock(&call->lock);
        choir_generate_release(call);
        choir_call_finish(call, CHOIR_E_UNAVAILABLE, "the server has stopped; ask another one");
        pthread_mutex_unlock(&call->lock);
    }
    pthread_mutex_unlock(&server->calls_lock);
}
