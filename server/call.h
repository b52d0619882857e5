/* WHAT    One call from arrival to its last batch, and the server around it: the folder's own
 * header.
 *
 *           arrived ──▶ RECEIVING ──message──▶ PREPARING ──submit──▶ STREAMING ──done──▶ FINISHING
 * ─▶ gone on_arrived       on_received        (a parser)            pump                on_sent
 *         Every refusal goes straight to FINISHING (choir_call_finish). A client that leaves
 * (on_closed) sets `cancelled` in any state; a stream is then released at once, which frees its
 * pages.
 *
 * OWNS    A call is counted: one reference per batch in flight and per queue it sits in. Whoever
 * drops the last one frees it. A stream lives at most until on_closed, so its batch covers it.
 * THREADS The completion thread runs on_*; a parser runs method->prepare; the pump thread runs
 *         method->pump. call->lock guards what is marked so. Lock order: server->calls_lock,
 * call->lock, then the scheduler's and the queues' own. References are dropped outside every lock.
 * ERRORS  choir_call_finish() maps choir_status to gRPC.
 * LIMITS  One send batch in flight per call.
 * NEXT    server/methods.c, server/generate.c */
#pragma once
#include "server/http.h"
#include "server/queue.h"
#include "server/reflection.h"
#include "server/server.h"
#include <grpc/grpc.h>
#include <protobuf-c/protobuf-c.h>
#include <pthread.h>
#include <stdatomic.h>

typedef struct choir_call choir_call;

/* What a completion carries. `armed` is for race detectors, which do not see inside gRPC: released
 * before the batch starts, acquired when it completes. */
typedef struct choir_tag {
    void (*run)(choir_call *call, bool ok);
    choir_call *call;
    _Atomic uint32_t armed;
} choir_tag;

typedef struct choir_method {
    const char *path;
    bool open;      /* needs no api key */
    bool generates; /* refused while draining, counted as running */
    bool parsed;    /* prepare runs on a parser, not on the completion thread */
    bool slow;      /* … or on a thread for what waits for a disk, one call after the other */
    bool client_stream;
    /* Has the message in call->data; ends with choir_call_reply, _finish or a stream. */
    void (*prepare)(choir_call *call);
    /* Sends what there is to send, if nothing is in flight. call->lock is held. */
    void (*pump)(choir_call *call);
    const char *missing; /* for methods declared but not there yet: the sentence */
} choir_method;

typedef struct choir_generation choir_generation; /* server/generate.c */

struct choir_call {
    choir_server *server;
    const choir_method *method;
    grpc_call *grpc;
    grpc_call_details details;
    grpc_metadata_array metadata;
    choir_tag arrived, closed, received, sent;
    _Atomic uint32_t references;
    int core_cancelled;             /* written by gRPC before `closed` completes */
    grpc_byte_buffer *core_message; /* written by gRPC before `received` completes */
    uint8_t *data;                  /* the message, contiguous; the state's owner reads it */
    size_t bytes;
    uint64_t deadline_ns;        /* choir_clock_now() time; 0: none */
    choir_call *previous, *next; /* open calls; server->calls_lock */
    choir_node work;             /* in the parsers' queue, or the slow one */
    choir_node woken;            /* in the pump's queue */
    _Atomic bool is_woken;       /* set by the waker that queues it, cleared by the pump */

    pthread_mutex_t lock; /* guards what follows */
    bool cancelled;       /* the client is gone */
    bool sending;         /* a send batch is in flight */
    bool finishing;       /* the status is in flight or sent */
    bool headers_sent;
    bool counted;      /* in server->n_generating */
    uint64_t since_ns; /* of the send in flight, or of the wait for the message; for the sweep */
    const choir_server_model *model; /* once known */
    choir_generation *generation;
    bool watching;    /* health.Watch: the request has come */
    int watched;      /* index of its service; -1 unknown */
    int watch_sent;   /* the last status sent; -1 none */
    bool half_closed; /* reflection: no more requests */
    bool answering;   /* reflection: the next request is not asked for yet */
};

typedef enum choir_phase { /* server->phase; only ever grows */
                           CHOIR_PHASE_NEW,
                           CHOIR_PHASE_SERVING,
                           CHOIR_PHASE_NOT_SERVING, /* draining; new requests are still taken */
                           CHOIR_PHASE_REFUSING,    /* draining; they get UNAVAILABLE */
                           CHOIR_PHASE_STOPPING,
                           CHOIR_PHASE_STOPPED,
} choir_phase;

enum { CHOIR_SERVER_MAX_MODELS = 64, CHOIR_SERVER_MAX_NAMES = 256, CHOIR_SERVER_MAX_LISTEN = 16 };

/* Health of one service name; the index into server->health is what Watch calls keep. */
typedef struct choir_health {
    const char *service;
    int model;          /* -1: all of them */
    _Atomic int status; /* a grpc.health.v1 ServingStatus; the watcher writes, anyone reads */
} choir_health;

struct choir_server {
    choir_server_options options;
    choir_server_model models[CHOIR_SERVER_MAX_MODELS];
    uint32_t n_models;
    choir_arena *copies; /* of the strings in options and models */
    char *addresses[CHOIR_SERVER_MAX_LISTEN];
    choir_http *http; /* NULL: off */
    grpc_server *grpc;
    grpc_completion_queue *completions;
    choir_reflection *reflection;
    choir_health health[CHOIR_SERVER_MAX_NAMES];
    uint32_t n_health;
    uint64_t started_ns;
    char boot[12]; /* makes request ids unique over restarts */

    pthread_mutex_t calls_lock; /* guards `calls` and their links */
    choir_call *calls;
    _Atomic uint32_t n_open, n_generating, n_slots_missing;
    /* The watch thread's last look, for /healthz; a server that drains lives. */
    _Atomic bool makes_progress;
    _Atomic uint64_t looked_ns;
    _Atomic uint64_t n_calls, n_refused, n_internal, n_requests;

    choir_queue *parse_queue, *slow_queue, *wake_queue;
    pthread_t completion_thread, pump_thread, watch_thread, slow_thread, *parsers;
    uint32_t n_parsers_started;
    bool completion_started, pump_started, watch_started, slow_started, grpc_started;
    choir_tag shut_down;

    pthread_mutex_t phase_lock; /* guards the wish and signals the change of phase */
    pthread_cond_t phase_changed;
    _Atomic int phase;
    bool drain_wanted, stop_wanted, is_shut_down;
};

/* --- call.c */
choir_status choir_call_await(choir_server *server); /* posts a slot for the next call */
void choir_call_hold(choir_call *call);
void choir_call_drop(choir_call *call);
/* These three want call->lock held, and nothing in flight where they say send. */
void choir_call_send(choir_call *call, grpc_slice message); /* takes the slice */
void choir_call_reply(choir_call *call,
                      grpc_slice message); /* message and status OK; takes the slice */
/* Ends the call with a status. A send that is in flight (its reader takes nothing) is cut off. */
void choir_call_finish(choir_call *call, choir_status status, const char *sentence);
/* The same for callers without the lock, with the thread's sentence. */
void choir_call_fail(choir_call *call, choir_status status);
void choir_call_receive(choir_call *call); /* starts receiving the next message */
void choir_call_wake(choir_call *call);    /* has the pump thread call method->pump */
/* Ends calls that hold a place for nothing: a message that does not come, a reader that takes
 * nothing. */
void choir_calls_sweep(choir_server *server);
void choir_calls_stop(choir_server *server); /* every stream ends with UNAVAILABLE */

/* --- methods.c, adapters.c, generate.c, health.c */
/* An unknown path gives the method that is missing altogether, never NULL. */
const choir_method *choir_method_find(const char *path, size_t bytes);
/* NULL with the sentence set (CHOIR_E_NOT_FOUND, or _INVALID for a name left out among several). */
choir_status choir_server_find_model(const choir_server *server, const char *name,
                                     const choir_server_model **out) CHOIR_MUST_USE;
/* The call's message, checked and unpacked as `type`: choir_message_free() it. */
choir_status choir_call_request(choir_call *call, const ProtobufCMessageDescriptor *type,
                                void *out) CHOIR_MUST_USE;
/* choir_call_reply() for callers without the lock. */
void choir_call_answer(choir_call *call, grpc_slice message);
void choir_adapters_prepare_load(choir_call *call);
void choir_adapters_prepare_unload(choir_call *call);
void choir_adapters_prepare_list(choir_call *call);
void choir_generate_prepare(choir_call *call);
void choir_generate_pump(choir_call *call);
void choir_generate_release(choir_call *call); /* call->lock held; frees the stream and its pages */
void choir_health_prepare_check(choir_call *call);
void choir_health_prepare_watch(choir_call *call);
void choir_health_pump(choir_call *call);
choir_status choir_health_create(choir_server *server);
/* Sets every service's status from the phase and the engines; wakes the watchers of those that
 * changed. */
void choir_health_update(choir_server *server, const bool *model_healthy);
bool choir_health_serving(const choir_server *server); /* of the whole server */

/* --- auth.c */
bool choir_auth_allows(const choir_server *server, const grpc_metadata_array *metadata);
/* The value of one authorization header. The server has keys. */
bool choir_auth_allows_value(const choir_server *server, const uint8_t *value, size_t bytes);

/* --- accept.c */
/* Process-wide; max_connects_per_s of one address, 0: no limit. */
void choir_accept_limit(uint32_t max_connections, uint32_t max_connects_per_s);

/* --- watch.c: the thread that probes engines, moves the phase and ends what must end */
void *choir_watch_run(void *server);
void choir_dump_stacks(void);
