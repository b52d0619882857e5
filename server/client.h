/* WHAT    A blocking gRPC client: one call at a time, with a deadline and a way to stop it.
 * OWNS    Its channel. Messages are those of proto/proto.h.
 * THREADS One at a time; `stop` may be set by a signal handler or another thread.
 * ERRORS  The server's status as choir_status, its sentence as ours; CHOIR_E_UNAVAILABLE when
 *         nobody answers; CHOIR_E_CANCELLED after `stop`.
 * LIMITS  A text that holds a NUL ends there (protobuf-c).
 * NEXT    cli/generate.c */
#pragma once
#include "base/error.h"
#include "proto/proto.h"
#include <signal.h>

typedef struct choir_client choir_client;

typedef struct choir_client_options {
    const char *target;  /* "127.0.0.1:50051", "unix:/run/choir.sock" */
    const char *api_key; /* NULL: none */
    bool tls;
    const char *tls_roots;             /* PEM text; NULL: the system's */
    uint32_t timeout_ms;               /* of each call; 0: none */
    const volatile sig_atomic_t *stop; /* not 0: the running call is cancelled; may be NULL */
} choir_client_options;

choir_status choir_client_create(const choir_client_options *options, choir_client **out)
    CHOIR_MUST_USE; /* strings are copied; connects at the first call */
void choir_client_destroy(choir_client *client);

/* Waits until the service ("" or a model's name) says SERVING. */
choir_status choir_client_wait_serving(choir_client *client, const char *service,
                                       uint32_t timeout_ms) CHOIR_MUST_USE;

/* `on_event` sees every event as it comes; returning false cancels (CHOIR_E_CANCELLED). */
choir_status choir_client_generate(choir_client *client, const Choir__V1__GenerateRequest *request,
                                   bool (*on_event)(void *user,
                                                    const Choir__V1__GenerateEvent *event),
                                   void *user) CHOIR_MUST_USE;
/* Any unary method by its path ("/choir.v1.Choir/ListModels"). *answer, of type `type`, is freed
 * with protobuf_c_message_free_unpacked(answer, NULL). */
choir_status choir_client_call(choir_client *client, const char *path,
                               const ProtobufCMessage *request,
                               const ProtobufCMessageDescriptor *type,
                               ProtobufCMessage **answer) CHOIR_MUST_USE;

/* Sets an optional field of Sampling: CHOIR_CLIENT_SET(&s, temperature, TEMPERATURE, 0.7f). */
#define CHOIR_CLIENT_SET(sampling, field, FIELD, value)                                            \
    ((sampling)->_##field##_case = CHOIR__V1__SAMPLING___##FIELD##_##FIELD,                        \
     (sampling)->field = (value))
