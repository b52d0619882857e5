/* WHAT    The front end: over gRPC the methods of choir.v1, health, reflection; limits, auth, drain;
 *         over HTTP metrics and health.
 * OWNS    Its calls and its threads (one for completions, one that moves tokens to calls, one
 *         that watches, a few that parse requests, one for HTTP). Models and schedulers are lent
 * until destroy. THREADS Everything but create and destroy: any. SIGTERM and SIGINT must be blocked
 * before create. ERRORS  create, start: CHOIR_E_INVALID (an option), CHOIR_E_IO (an address),
 * CHOIR_E_NO_MEMORY. Errors of a call become its gRPC status (choir_status_grpc) and sentence.
 * LIMITS  Bounded everywhere: message and metadata sizes, calls, requests being parsed, one write
 *         in flight per call. A slow reader holds its own sequence only (scheduler.h,
 *         outbox_bytes).
 * NEXT    server/call.h for the life of a call, server/http.h for HTTP; scheduler/scheduler.h
 * below. */
#pragma once
#include "scheduler/scheduler.h"

typedef struct choir_server choir_server;

/* What the server needs of a model; everything is lent until destroy. */
typedef struct choir_server_model {
    const char *name;
    const char *const *aliases; /* further names it answers to */
    uint32_t n_aliases;
    const choir_model_config *config;
    const choir_tokenizer *tokenizer;
    const choir_chat_template *chat_template; /* NULL: `chat` is refused */
    choir_scheduler *scheduler;
    choir_adapter_type adapter_type; /* how the scheduler's adapters lie in memory */
    uint32_t max_tokens; /* prompt and answer; 0: config->max_positions */
    uint64_t digest;     /* of the weights; shown by ListModels */
} choir_server_model;
/* "HOST:PORT" with a port of 0 to 65535 (gRPC would take larger ones modulo 65536), or
 * "unix:/path". */
choir_status choir_server_check_address(const char *address) CHOIR_MUST_USE;
/* "HOST:PORT" alone. */
choir_status choir_server_check_http_address(const char *address) CHOIR_MUST_USE;
/* Fills everything but aliases from an engine and its scheduler. */
choir_server_model choir_server_model_of(const char *name, const choir_engine *engine,
                                         choir_scheduler *scheduler);

typedef struct choir_server_options {
    const char *const
        *listen; /* "127.0.0.1:50051" (port 0: any free one), "unix:/run/choir.sock" */
    uint32_t n_listen;
    const char *tls_certificate; /* PEM text; NULL: no TLS */
    const char *tls_key;
    const char *const *api_keys; /* "authorization: Bearer KEY" on every method but health's */
    uint32_t n_api_keys;         /* 0: open */
    uint32_t max_message_bytes;
    uint32_t max_metadata_bytes;
    uint32_t max_connections;      /* further ones are closed at once */
    uint32_t max_connects_per_s;   /* of one address, and 8 s' worth at once; 0: no limit */
    uint32_t max_streams;          /* at once, per connection */
    uint32_t max_calls;            /* open, of all connections */
    uint32_t n_parsers;            /* threads that check, render and tokenize requests */
    uint32_t max_parsing;          /* requests waiting for one of them */
    uint32_t stuck_ms;             /* no message after headers, or a write not taken: ended */
    uint32_t keepalive_ms;         /* a silent peer is asked after this … */
    uint32_t keepalive_timeout_ms; /* … and given up after that */
    uint32_t idle_ms;              /* connections without calls are closed; 0: never */
    uint32_t age_ms, age_grace_ms; /* connections older are told to go elsewhere; 0: never */
    uint32_t drain_pause_ms; /* NOT_SERVING before the first refusal, for balancers to see it */
    uint32_t shutdown_ms;    /* running streams are cancelled this long after that */
    const char *http;        /* "127.0.0.1:8000": metrics and health, never with TLS; NULL: off */
    uint32_t http_max_connections; /* one more: the one that was idle longest is closed */
    uint32_t http_request_ms;      /* from a request's first byte to the answer's last */
    uint32_t http_idle_ms;         /* between two requests */
    uint32_t watchdog_exit_ms;     /* unhealthy for longer: stacks to stderr, exit 1; 0: never */
} choir_server_options;
#define CHOIR_SERVER_OPTIONS_DEFAULT                                                               \
    ((choir_server_options){.max_message_bytes = 4 << 20,                                          \
                            .max_metadata_bytes = 16 << 10,                                        \
                            .max_connections = 16384,                                              \
                            .max_connects_per_s = 200,                                             \
                            .max_streams = 256,                                                    \
                            .max_calls = 4096,                                                     \
                            .n_parsers = 2,                                                        \
                            .max_parsing = 256,                                                    \
                            .stuck_ms = 60000,                                                     \
                            .keepalive_ms = 20000,                                                 \
                            .keepalive_timeout_ms = 5000,                                          \
                            .idle_ms = 1800000,                                                    \
                            .http_max_connections = 256,                                           \
                            .http_request_ms = 10000,                                              \
                            .http_idle_ms = 120000,                                                \
                            .drain_pause_ms = 500,                                                 \
                            .shutdown_ms = 30000})

/* Strings are copied; engines, tokenizers, templates and schedulers are lent until destroy. */
choir_status choir_server_create(const choir_server_options *options,
                                 const choir_server_model *models, uint32_t n_models,
                                 choir_server **out) CHOIR_MUST_USE;
/* Binds every address and serves; health turns SERVING at once if all engines are healthy. */
choir_status choir_server_start(choir_server *server) CHOIR_MUST_USE;
/* The address that listen[i] got, with its real port; lent until destroy. */
const char *choir_server_address(const choir_server *server, uint32_t i);
const char *choir_server_http_address(const choir_server *server); /* the same; NULL: off */

/* Health NOT_SERVING at once; after drain_pause_ms new requests get UNAVAILABLE; running streams go
 * on for at most shutdown_ms; then the server stops by itself. */
void choir_server_begin_drain(choir_server *server);
/* Stops now: running streams end with UNAVAILABLE. */
void choir_server_stop(choir_server *server);
/* Waits until the server has stopped; false: still running after timeout_ms. */
bool choir_server_wait(choir_server *server, uint32_t timeout_ms);
/* The loop of `choir serve`: SIGTERM or SIGINT drains, a second one stops. Returns once stopped. */
void choir_server_run_until_signal(choir_server *server);

void choir_server_destroy(choir_server *server); /* stops first if it runs */
