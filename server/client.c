#include "server/client.h"

#include "base/base.h"
#include "server/message.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct choir_client {
    char *target, *authorization, *roots;
    grpc_channel *channel;
    uint32_t timeout_ms;
    const volatile sig_atomic_t *stop;
};

static void free_strings(choir_client *c)
{
    choir_free(c->target);
    choir_free(c->authorization);
    choir_free(c->roots);
}

static choir_status copy_options(choir_client *c, const choir_client_options *o)
{
    c->timeout_ms = o->timeout_ms;
    c->stop = o->stop;
    c->target = choir_strdup(CHOIR_MEM_SERVER, o->target);
    bool all = c->target != NULL;
    if (o->api_key != NULL) {
        size_t n = strlen(o->api_key) + sizeof "Bearer ";
        c->authorization = choir_alloc(CHOIR_MEM_SERVER, n);
        all = all && c->authorization != NULL;
        if (c->authorization != NULL) snprintf(c->authorization, n, "Bearer %s", o->api_key);
    }
    if (o->tls_roots != NULL)
        all = all && (c->roots = choir_strdup(CHOIR_MEM_SERVER, o->tls_roots)) != NULL;
    return all ? CHOIR_OK : choir_fail(CHOIR_E_NO_MEMORY, "no memory for a client");
}

/* A server that is starting is asked again soon, not after gRPC's usual seconds. */
static void open_channel(choir_client *c, bool tls)
{
    enum { BACKOFF_MS = 100, BACKOFF_MAX_MS = 1000 };
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS,
         .value.integer = BACKOFF_MS},
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
         .value.integer = BACKOFF_MAX_MS},
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_MAX_RECONNECT_BACKOFF_MS,
         .value.integer = BACKOFF_MAX_MS},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_ENABLE_HTTP_PROXY, .value.integer = 0},
    };
    grpc_channel_args all = {sizeof args / sizeof *args, args};
    grpc_channel_credentials *credentials =
        tls ? grpc_ssl_credentials_create(c->roots, NULL, NULL, NULL)
            : grpc_insecure_credentials_create();
    c->channel = grpc_channel_create(c->target, credentials, &all);
    grpc_channel_credentials_release(credentials);
}

choir_status choir_client_create(const choir_client_options *options, choir_client **out)
{
    if (options->target == NULL || options->target[0] == '\0')
        return choir_fail(CHOIR_E_INVALID, "a client wants the server's address, HOST:PORT");
    choir_client *c = choir_calloc(CHOIR_MEM_SERVER, 1, sizeof *c);
    if (c == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a client");
    choir_status status = copy_options(c, options);
    if (status != CHOIR_OK) {
        free_strings(c);
        choir_free(c);
        return status;
    }
    grpc_init();
    open_channel(c, options->tls);
    *out = c;
    return CHOIR_OK;
}

void choir_client_destroy(choir_client *c)
{
    if (c == NULL) return;
    grpc_channel_destroy(c->channel);
    grpc_shutdown();
    free_strings(c);
    choir_free(c);
}

/* --- one call */

typedef struct exchange {
    choir_client *client;
    grpc_call *call;
    grpc_completion_queue *queue;
    grpc_metadata_array headers, trailers;
    grpc_byte_buffer *received;
    grpc_status_code code;
    grpc_slice details;
    bool stopped, has_headers;
} exchange;

/* In gRPC's order of codes. */
static choir_status status_of(grpc_status_code code)
{
    static const choir_status table[] = {CHOIR_OK,
                                         CHOIR_E_CANCELLED,
                                         CHOIR_E_INTERNAL,
                                         CHOIR_E_INVALID,
                                         CHOIR_E_DEADLINE,
                                         CHOIR_E_NOT_FOUND,
                                         CHOIR_E_EXISTS,
                                         CHOIR_E_DENIED,
                                         CHOIR_E_FULL,
                                         CHOIR_E_PRECONDITION,
                                         CHOIR_E_ABORTED,
                                         CHOIR_E_INVALID,
                                         CHOIR_E_UNIMPLEMENTED,
                                         CHOIR_E_INTERNAL,
                                         CHOIR_E_UNAVAILABLE,
                                         CHOIR_E_DATA_LOSS,
                                         CHOIR_E_UNAUTHENTICATED};
    return (size_t)code < sizeof table / sizeof *table ? table[code] : CHOIR_E_INTERNAL;
}

static gpr_timespec after_ms(uint32_t ms)
{
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(ms, GPR_TIMESPAN));
}

static void open_exchange(choir_client *c, const char *path, uint32_t timeout_ms, exchange *x)
{
    *x = (exchange){.client = c};
    x->queue = grpc_completion_queue_create_for_next(NULL);
    gpr_timespec deadline =
        timeout_ms != 0 ? after_ms(timeout_ms) : gpr_inf_future(GPR_CLOCK_MONOTONIC);
    grpc_slice method = grpc_slice_from_copied_string(path);
    x->call = grpc_channel_create_call(c->channel, NULL, GRPC_PROPAGATE_DEFAULTS, x->queue, method,
                                       NULL, deadline, NULL);
    grpc_slice_unref(method);
    grpc_metadata_array_init(&x->headers);
    grpc_metadata_array_init(&x->trailers);
    x->details = grpc_empty_slice();
}

static void close_exchange(exchange *x)
{
    if (x->received != NULL) grpc_byte_buffer_destroy(x->received);
    grpc_metadata_array_destroy(&x->headers);
    grpc_metadata_array_destroy(&x->trailers);
    grpc_slice_unref(x->details);
    grpc_call_unref(x->call);
    grpc_completion_queue_shutdown(x->queue);
    while (grpc_completion_queue_next(x->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(x->queue);
}

static void cancel(exchange *x)
{
    if (!x->stopped) grpc_call_cancel(x->call, NULL);
    x->stopped = true;
}

/* Runs a batch to its end; looks at `stop` meanwhile. */
static bool run(exchange *x, const grpc_op *ops, size_t n)
{
    enum { LOOK_MS = 50 };
    if (grpc_call_start_batch(x->call, ops, n, x, NULL) != GRPC_CALL_OK) return false;
    const volatile sig_atomic_t *stop = x->client->stop;
    for (;;) {
        if (stop != NULL && *stop) cancel(x);
        grpc_event e = grpc_completion_queue_next(x->queue, after_ms(LOOK_MS), NULL);
        if (e.type == GRPC_OP_COMPLETE) return e.success != 0;
    }
}

static void send_request(exchange *x, const ProtobufCMessage *request)
{
    grpc_slice slice = choir_message_pack(request);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    grpc_metadata key = {.key = grpc_slice_from_static_string("authorization")};
    grpc_op ops[3] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                      {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}};
    if (x->client->authorization != NULL) {
        key.value = grpc_slice_from_copied_string(x->client->authorization);
        ops[0].data.send_initial_metadata.count = 1;
        ops[0].data.send_initial_metadata.metadata = &key;
    }
    ops[1].data.send_message.send_message = message;
    (void)run(x, ops, 3); /* how it failed is in the status */
    grpc_byte_buffer_destroy(message);
    if (x->client->authorization != NULL) grpc_slice_unref(key.value);
}

static choir_status unpack(grpc_byte_buffer *buffer, const ProtobufCMessageDescriptor *type,
                           ProtobufCMessage **out)
{
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer))
        return choir_fail(CHOIR_E_FORMAT, "the server's message cannot be read");
    grpc_slice slice = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    const uint8_t *data = GRPC_SLICE_START_PTR(slice);
    size_t bytes = GRPC_SLICE_LENGTH(slice);
    choir_status status = choir_wire_check(type, NULL, 0, data, bytes);
    if (status == CHOIR_OK) {
        *out = protobuf_c_message_unpack(type, NULL, bytes, data);
        if (*out == NULL)
            status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for a message of %zu bytes", bytes);
    }
    grpc_slice_unref(slice);
    return status;
}

/* The next message; NULL in *out at the stream's end. */
static choir_status receive(exchange *x, const ProtobufCMessageDescriptor *type,
                            ProtobufCMessage **out)
{
    *out = NULL;
    grpc_op ops[2] = {{.op = GRPC_OP_RECV_MESSAGE}, {.op = GRPC_OP_RECV_INITIAL_METADATA}};
    ops[0].data.recv_message.recv_message = &x->received;
    ops[1].data.recv_initial_metadata.recv_initial_metadata = &x->headers;
    size_t n = x->has_headers ? 1 : 2;
    x->has_headers = true;
    if (!run(x, ops, n) || x->received == NULL) return CHOIR_OK;
    choir_status status = unpack(x->received, type, out);
    grpc_byte_buffer_destroy(x->received);
    x->received = NULL;
    return status;
}

static choir_status finish(exchange *x)
{
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    op.data.recv_status_on_client.trailing_metadata = &x->trailers;
    op.data.recv_status_on_client.status = &x->code;
    op.data.recv_status_on_client.status_details = &x->details;
    x->code = GRPC_STATUS_INTERNAL;
    (void)run(x, &op, 1);
    if (x->code == GRPC_STATUS_OK) return CHOIR_OK;
    size_t n = GRPC_SLICE_LENGTH(x->details);
    return choir_fail(status_of(x->code), "%s: %.*s", x->client->target, (int)(n < 800 ? n : 800),
                      (const char *)GRPC_SLICE_START_PTR(x->details));
}

static choir_status call_unary(choir_client *c, const char *path, uint32_t timeout_ms,
                               const ProtobufCMessage *request,
                               const ProtobufCMessageDescriptor *type, ProtobufCMessage **answer)
{
    exchange x;
    *answer = NULL;
    open_exchange(c, path, timeout_ms, &x);
    send_request(&x, request);
    choir_status status = receive(&x, type, answer);
    if (status != CHOIR_OK) cancel(&x);
    choir_status ended = finish(&x);
    if (status == CHOIR_OK) status = ended;
    if (status == CHOIR_OK && *answer == NULL)
        status = choir_fail(CHOIR_E_FORMAT, "%s: the server sent no answer", c->target);
    if (status != CHOIR_OK && *answer != NULL) {
        protobuf_c_message_free_unpacked(*answer, NULL);
        *answer = NULL;
    }
    close_exchange(&x);
    return status;
}

choir_status choir_client_call(choir_client *c, const char *path, const ProtobufCMessage *request,
                               const ProtobufCMessageDescriptor *type, ProtobufCMessage **answer)
{
    return call_unary(c, path, c->timeout_ms, request, type, answer);
}

choir_status choir_client_generate(choir_client *c, const Choir__V1__GenerateRequest *request,
                                   bool (*on_event)(void *, const Choir__V1__GenerateEvent *),
                                   void *user)
{
    exchange x;
    open_exchange(c, "/choir.v1.Choir/Generate", c->timeout_ms, &x);
    send_request(&x, &request->base);
    choir_status status;
    for (;;) {
        ProtobufCMessage *event;
        status = receive(&x, &choir__v1__generate_event__descriptor, &event);
        if (status != CHOIR_OK) cancel(&x);
        if (event == NULL) break;
        if (!x.stopped && !on_event(user, (const Choir__V1__GenerateEvent *)event)) cancel(&x);
        protobuf_c_message_free_unpacked(event, NULL);
    }
    choir_status ended = finish(&x);
    close_exchange(&x);
    return status != CHOIR_OK ? status : ended;
}

choir_status choir_client_wait_serving(choir_client *c, const char *service, uint32_t timeout_ms)
{
    enum { ASK_MS = 1000, PAUSE_US = 50000 };
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)service;
    uint64_t end = choir_clock_now() + timeout_ms * CHOIR_MS;
    for (;;) {
        ProtobufCMessage *answer;
        choir_status status =
            call_unary(c, "/grpc.health.v1.Health/Check", ASK_MS, &request.base,
                       &grpc__health__v1__health_check_response__descriptor, &answer);
        bool serving = status == CHOIR_OK &&
                       ((Grpc__Health__V1__HealthCheckResponse *)answer)->status ==
                           GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
        if (status == CHOIR_OK) protobuf_c_message_free_unpacked(answer, NULL);
        if (serving) return CHOIR_OK;
        bool later =
            status == CHOIR_OK || status == CHOIR_E_UNAVAILABLE || status == CHOIR_E_DEADLINE;
        if (!later || (c->stop != NULL && *c->stop))
            return status != CHOIR_OK
                       ? status
                       : choir_fail(CHOIR_E_CANCELLED, "%s: stopped while waiting", c->target);
        if (choir_clock_now() >= end)
            return choir_fail(CHOIR_E_DEADLINE, "%s is not serving \"%s\" after %u ms", c->target,
                              service, timeout_ms);
        usleep(PAUSE_US);
    }
}
