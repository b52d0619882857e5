#include "server/call.h"

#include "proto/proto.h"

#include <errno.h>
#include <grpc/grpc_security.h>
#include <grpc/support/log.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

enum {
    SLOTS = 64,   /* calls that may arrive while the completion thread is busy */
    MAX_SLOW = 64 /* calls that may wait for the slow thread */
};

/* gRPC's own log lines become ours; its chatter about lost peers is of no use to an operator. */
static void log_line(gpr_log_func_args *line)
{
    choir_log_level level =
        line->severity == GPR_LOG_SEVERITY_ERROR ? CHOIR_LOG_WARNING : CHOIR_LOG_DEBUG;
    choir_log(level, "grpc: %s", line->message);
}

/* --- create */

static char *copy(choir_server *s, const char *text)
{
    size_t n = strlen(text) + 1;
    char *to = choir_arena_alloc(s->copies, n);
    return to == NULL ? NULL : memcpy(to, text, n);
}

static choir_status copy_list(choir_server *s, const char *const **list, uint32_t n)
{
    if (n == 0) return CHOIR_OK;
    const char **to = choir_arena_alloc(s->copies, n * sizeof *to);
    bool all = to != NULL;
    for (uint32_t i = 0; i < n && all; i++) all = (to[i] = copy(s, (*list)[i])) != NULL;
    if (!all) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the server");
    *list = to;
    return CHOIR_OK;
}

static choir_status copy_text(choir_server *s, const char **text)
{
    if (*text == NULL) return CHOIR_OK;
    *text = copy(s, *text);
    return *text != NULL ? CHOIR_OK : choir_fail(CHOIR_E_NO_MEMORY, "no memory for the server");
}

static choir_status check_host_port(const char *address, const char *what, const char *form)
{
    const char *colon = strrchr(address, ':');
    size_t digits = colon != NULL ? strspn(colon + 1, "0123456789") : 0;
    if (digits == 0 || digits > 5 || colon[1 + digits] != '\0' || colon == address)
        return choir_fail(CHOIR_E_INVALID, "the %s is '%.200s', must be %s", what, address, form);
    if (atoi(colon + 1) > 65535)
        return choir_fail(CHOIR_E_INVALID, "the port of %.200s must be 0 to 65535", address);
    return CHOIR_OK;
}

choir_status choir_server_check_address(const char *address)
{
    if (strncmp(address, "unix:", 5) == 0) return CHOIR_OK;
    return check_host_port(address, "address", "HOST:PORT or unix:/path");
}

choir_status choir_server_check_http_address(const char *address)
{
    enum { MAX_BYTES = 255 };
    if (strncmp(address, "unix:", 5) == 0 || strlen(address) > MAX_BYTES)
        return choir_fail(CHOIR_E_INVALID, "the HTTP address is '%.200s', must be HOST:PORT",
                          address);
    return check_host_port(address, "HTTP address", "HOST:PORT");
}

static choir_status check_options(const choir_server_options *o, uint32_t n_models)
{
    if (n_models == 0 || n_models > CHOIR_SERVER_MAX_MODELS)
        return choir_fail(CHOIR_E_INVALID, "a server has 1 to %d models, not %u",
                          CHOIR_SERVER_MAX_MODELS, n_models);
    if (o->n_listen == 0 || o->n_listen > CHOIR_SERVER_MAX_LISTEN)
        return choir_fail(CHOIR_E_INVALID, "a server listens on 1 to %d addresses, not %u",
                          CHOIR_SERVER_MAX_LISTEN, o->n_listen);
    for (uint32_t i = 0; i < o->n_listen; i++) CHOIR_TRY(choir_server_check_address(o->listen[i]));
    if (o->http != NULL) CHOIR_TRY(choir_server_check_http_address(o->http));
    if (o->http_max_connections < 2 || o->http_max_connections > 65536)
        return choir_fail(CHOIR_E_INVALID, "http_max_connections is %u; it is 2 to 65536",
                          o->http_max_connections);
    if (o->max_message_bytes < 1024 || o->max_message_bytes > 1u << 30)
        return choir_fail(CHOIR_E_INVALID, "max_message_bytes is %u; it is 1 KiB to 1 GiB",
                          o->max_message_bytes);
    if (o->n_parsers < 1 || o->n_parsers > 64)
        return choir_fail(CHOIR_E_INVALID, "n_parsers is %u; it is 1 to 64", o->n_parsers);
    if ((o->tls_certificate == NULL) != (o->tls_key == NULL))
        return choir_fail(CHOIR_E_INVALID, "TLS wants both a certificate and a key");
    for (uint32_t i = 0; i < o->n_api_keys; i++)
        if (o->api_keys[i][0] == '\0') return choir_fail(CHOIR_E_INVALID, "an API key is empty");
    return CHOIR_OK;
}

/* The second would never be found, and in /metrics one could not tell them apart. */
static choir_status check_names(const choir_server_model *models, uint32_t n_models)
{
    for (uint32_t i = 0; i < n_models; i++)
        for (uint32_t k = 0; k < i; k++)
            if (strcmp(models[i].name, models[k].name) == 0)
                return choir_fail(CHOIR_E_INVALID, "two models have the name \"%.200s\"",
                                  models[i].name);
    return CHOIR_OK;
}

static choir_status copy_inputs(choir_server *s, const choir_server_options *options,
                                const choir_server_model *models, uint32_t n_models)
{
    s->options = *options;
    s->n_models = n_models;
    memcpy(s->models, models, n_models * sizeof *models);
    CHOIR_TRY(choir_arena_create(CHOIR_MEM_SERVER, 16 << 10, &s->copies));
    CHOIR_TRY(copy_list(s, &s->options.listen, options->n_listen));
    CHOIR_TRY(copy_list(s, &s->options.api_keys, options->n_api_keys));
    CHOIR_TRY(copy_text(s, &s->options.tls_certificate));
    CHOIR_TRY(copy_text(s, &s->options.tls_key));
    CHOIR_TRY(copy_text(s, &s->options.http));
    for (uint32_t i = 0; i < n_models; i++) {
        CHOIR_TRY(copy_text(s, &s->models[i].name));
        CHOIR_TRY(copy_list(s, &s->models[i].aliases, models[i].n_aliases));
    }
    return CHOIR_OK;
}

static choir_status fill(choir_server *s, const choir_server_options *options,
                         const choir_server_model *models, uint32_t n_models)
{
    CHOIR_TRY(copy_inputs(s, options, models, n_models));
    CHOIR_TRY(choir_health_create(s));
    CHOIR_TRY(choir_reflection_create(
        choir_proto_descriptors, (size_t)(choir_proto_descriptors_end - choir_proto_descriptors),
        &s->reflection));
    CHOIR_TRY(choir_queue_create(s->options.max_parsing, &s->parse_queue));
    CHOIR_TRY(choir_queue_create(MAX_SLOW, &s->slow_queue));
    CHOIR_TRY(choir_queue_create(0, &s->wake_queue));
    s->parsers = choir_calloc(CHOIR_MEM_SERVER, s->options.n_parsers, sizeof *s->parsers);
    if (s->parsers == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the server");
    uint32_t boot = 0;
    if (getrandom(&boot, sizeof boot, 0) != (ssize_t)sizeof boot)
        return choir_fail(CHOIR_E_INTERNAL, "getrandom: %m");
    snprintf(s->boot, sizeof s->boot, "r%08" PRIx32, boot);
    return CHOIR_OK;
}

choir_status choir_server_create(const choir_server_options *options,
                                 const choir_server_model *models, uint32_t n_models,
                                 choir_server **out)
{
    CHOIR_TRY(check_options(options, n_models));
    CHOIR_TRY(check_names(models, n_models));
    choir_server *s = choir_calloc(CHOIR_MEM_SERVER, 1, sizeof *s);
    if (s == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the server");
    pthread_mutex_init(&s->calls_lock, NULL);
    pthread_mutex_init(&s->phase_lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&s->phase_changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    choir_status status = fill(s, options, models, n_models);
    if (status != CHOIR_OK) {
        choir_server_destroy(s);
        return status;
    }
    *out = s;
    return CHOIR_OK;
}

/* --- threads */

static void on_shut_down(choir_server *s)
{
    pthread_mutex_lock(&s->phase_lock);
    s->is_shut_down = true;
    pthread_cond_broadcast(&s->phase_changed);
    pthread_mutex_unlock(&s->phase_lock);
}

static void *run_completions(void *arg)
{
    choir_server *s = arg;
    for (;;) {
        grpc_event e =
            grpc_completion_queue_next(s->completions, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (e.type == GRPC_QUEUE_SHUTDOWN) return NULL;
        choir_tag *tag = e.tag;
        /* Pairs with the release when the batch was started. */
        (void)atomic_load_explicit(&tag->armed, memory_order_acquire);
        if (tag == &s->shut_down)
            on_shut_down(s);
        else
            tag->run(tag->call, e.success != 0);
    }
}

#define CALL_OF(node_, member) ((choir_call *)((char *)(node_)-offsetof(choir_call, member)))

static void prepare_calls(choir_queue *queue)
{
    for (choir_node *node; (node = choir_queue_pop(queue)) != NULL;) {
        choir_call *call = CALL_OF(node, work);
        call->method->prepare(call);
        choir_call_drop(call);
    }
}

static void *run_parser(void *arg)
{
    prepare_calls(((choir_server *)arg)->parse_queue);
    return NULL;
}

static void *run_slow(void *arg)
{
    prepare_calls(((choir_server *)arg)->slow_queue);
    return NULL;
}

static void *run_pump(void *arg)
{
    choir_server *s = arg;
    for (choir_node *node; (node = choir_queue_pop_all(s->wake_queue)) != NULL;) {
        for (choir_node *next; node != NULL; node = next) {
            next = node->next;
            choir_call *call = CALL_OF(node, woken);
            /* Before the events are taken: a wake from here on queues the call again. */
            atomic_store(&call->is_woken, false);
            pthread_mutex_lock(&call->lock);
            call->method->pump(call);
            pthread_mutex_unlock(&call->lock);
            choir_call_drop(call);
        }
    }
    return NULL;
}

/* --- start */

static choir_status make_credentials(const choir_server_options *o, grpc_server_credentials **out)
{
    if (o->tls_certificate == NULL) {
        *out = grpc_insecure_server_credentials_create();
    } else {
        grpc_ssl_pem_key_cert_pair pair = {o->tls_key, o->tls_certificate};
        *out = grpc_ssl_server_credentials_create_ex(
            NULL, &pair, 1, GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE, NULL);
    }
    return *out != NULL ? CHOIR_OK
                        : choir_fail(CHOIR_E_INVALID, "the TLS certificate or key cannot be used");
}

/* gRPC tells only its log why a port cannot be had; with a bad certificate no port can. */
static choir_status explain_no_port(choir_server *s, const char *address,
                                    grpc_server_credentials *credentials)
{
    if (s->options.tls_certificate != NULL &&
        grpc_server_add_http2_port(s->grpc, "127.0.0.1:0", credentials) == 0)
        return choir_fail(
            CHOIR_E_INVALID,
            "the TLS certificate and key cannot be used: they must be PEM and a pair");
    return choir_fail(CHOIR_E_IO, "cannot listen on %s: is it taken, or not an address of here?",
                      address);
}

static choir_status bind_all(choir_server *s, grpc_server_credentials *credentials)
{
    for (uint32_t i = 0; i < s->options.n_listen; i++) {
        const char *address = s->options.listen[i];
        int port = grpc_server_add_http2_port(s->grpc, address, credentials);
        if (port == 0) return explain_no_port(s, address, credentials);
        const char *colon = strrchr(address, ':');
        bool is_path = strncmp(address, "unix:", 5) == 0;
        int host = is_path || colon == NULL ? (int)strlen(address) : (int)(colon - address);
        char bound[512];
        if (is_path || colon == NULL)
            snprintf(bound, sizeof bound, "%s", address);
        else
            snprintf(bound, sizeof bound, "%.*s:%d", host, address, port);
        s->addresses[i] = copy(s, bound);
        if (s->addresses[i] == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the server");
    }
    return CHOIR_OK;
}

static grpc_arg integer(const char *key, uint32_t value)
{
    return (grpc_arg){.type = GRPC_ARG_INTEGER,
                      .key = (char *)key,
                      .value.integer = value > INT32_MAX ? INT32_MAX : (int)value};
}

static grpc_server *make_grpc_server(const choir_server_options *o)
{
    enum { PING_MIN_MS = 5000, PING_STRIKES = 100000, HANDSHAKE_MS = 20000 };
    grpc_arg args[20];
    size_t n = 0;
    args[n++] = integer(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, o->max_message_bytes);
    args[n++] = integer(GRPC_ARG_MAX_METADATA_SIZE, o->max_metadata_bytes);
    args[n++] = integer(GRPC_ARG_MAX_CONCURRENT_STREAMS, o->max_streams);
    args[n++] = integer(GRPC_ARG_KEEPALIVE_TIME_MS, o->keepalive_ms);
    args[n++] = integer(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, o->keepalive_timeout_ms);
    args[n++] = integer(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    /* A client may ask as often as this. Each ping too many costs gRPC 1.51 time in proportion to
     * those before it in the same read, so that a strict limit is what makes a flood dear: a
     * lenient one still bounds the answers that wait for a peer which does not read. */
    args[n++] = integer(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, PING_MIN_MS);
    args[n++] = integer(GRPC_ARG_HTTP2_MAX_PING_STRIKES, PING_STRIKES);
    args[n++] = integer(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, HANDSHAKE_MS);
    /* choir_message_receive() decompresses, with a bound. */
    args[n++] = integer(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
    /* Two servers on one port would each get half of the clients by surprise. */
    args[n++] = integer(GRPC_ARG_ALLOW_REUSEPORT, 0);
    if (o->idle_ms != 0) args[n++] = integer(GRPC_ARG_MAX_CONNECTION_IDLE_MS, o->idle_ms);
    if (o->age_ms != 0) args[n++] = integer(GRPC_ARG_MAX_CONNECTION_AGE_MS, o->age_ms);
    if (o->age_grace_ms != 0)
        args[n++] = integer(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, o->age_grace_ms);
    grpc_channel_args all = {n, args};
    return grpc_server_create(&all, NULL);
}

static choir_status start_threads(choir_server *s)
{
    CHOIR_TRY(choir_thread_start(&s->completion_thread, "choir-grpc", run_completions, s));
    s->completion_started = true;
    CHOIR_TRY(choir_thread_start(&s->pump_thread, "choir-pump", run_pump, s));
    s->pump_started = true;
    CHOIR_TRY(choir_thread_start(&s->slow_thread, "choir-slow", run_slow, s));
    s->slow_started = true;
    for (; s->n_parsers_started < s->options.n_parsers; s->n_parsers_started++)
        CHOIR_TRY(
            choir_thread_start(&s->parsers[s->n_parsers_started], "choir-parse", run_parser, s));
    for (int i = 0; i < SLOTS; i++) CHOIR_TRY(choir_call_await(s));
    atomic_store(&s->makes_progress, true);
    atomic_store(&s->looked_ns, choir_clock_now());
    atomic_store(&s->phase, CHOIR_PHASE_SERVING);
    CHOIR_TRY(choir_thread_start(&s->watch_thread, "choir-watch", choir_watch_run, s));
    s->watch_started = true;
    return CHOIR_OK;
}

choir_status choir_server_start(choir_server *s)
{
    gpr_set_log_function(log_line);
    grpc_init();
    s->grpc_started = true;
    s->started_ns = choir_clock_now();
    s->completions = grpc_completion_queue_create_for_next(NULL);
    s->grpc = make_grpc_server(&s->options);
    if (s->grpc == NULL) return choir_fail(CHOIR_E_INVALID, "gRPC refuses the server's options");
    grpc_server_register_completion_queue(s->grpc, s->completions, NULL);
    grpc_server_credentials *credentials;
    CHOIR_TRY(make_credentials(&s->options, &credentials));
    choir_accept_limit(s->options.max_connections, s->options.max_connects_per_s);
    choir_status status = bind_all(s, credentials);
    grpc_server_credentials_release(credentials);
    CHOIR_TRY(status);
    grpc_server_start(s->grpc);
    CHOIR_TRY(start_threads(s));
    return s->options.http != NULL ? choir_http_start(s, &s->http) : CHOIR_OK;
}

const char *choir_server_address(const choir_server *s, uint32_t i)
{
    return s->addresses[i];
}

const char *choir_server_http_address(const choir_server *s)
{
    return s->http != NULL ? choir_http_address(s->http) : NULL;
}

/* --- the way down */

void choir_server_begin_drain(choir_server *s)
{
    pthread_mutex_lock(&s->phase_lock);
    s->drain_wanted = true;
    pthread_cond_broadcast(&s->phase_changed);
    pthread_mutex_unlock(&s->phase_lock);
}

void choir_server_stop(choir_server *s)
{
    pthread_mutex_lock(&s->phase_lock);
    s->stop_wanted = true;
    pthread_cond_broadcast(&s->phase_changed);
    pthread_mutex_unlock(&s->phase_lock);
}

bool choir_server_wait(choir_server *s, uint32_t timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t ns = (uint64_t)until.tv_nsec + timeout_ms * CHOIR_MS;
    until.tv_sec += (time_t)(ns / CHOIR_SECOND);
    until.tv_nsec = (long)(ns % CHOIR_SECOND);
    pthread_mutex_lock(&s->phase_lock);
    int error = 0;
    while (atomic_load(&s->phase) != CHOIR_PHASE_STOPPED && error != ETIMEDOUT)
        error = pthread_cond_timedwait(&s->phase_changed, &s->phase_lock, &until);
    bool stopped = atomic_load(&s->phase) == CHOIR_PHASE_STOPPED;
    pthread_mutex_unlock(&s->phase_lock);
    return stopped;
}

void choir_server_run_until_signal(choir_server *s)
{
    const struct timespec tick = {.tv_nsec = 100 * 1000000L};
    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGTERM);
    sigaddset(&wanted, SIGINT);
    int n_signals = 0;
    while (!choir_server_wait(s, 0)) {
        if (sigtimedwait(&wanted, NULL, &tick) < 0) continue;
        n_signals++;
        if (n_signals == 1) choir_server_begin_drain(s);
        if (n_signals == 2) choir_server_stop(s);
        /* Only a bug can hold a stop up; who asks a third time gets it. */
        if (n_signals > 2) _exit(1);
    }
}

static void shut_down(choir_server *s)
{
    if (s->watch_started) {
        choir_server_stop(s);
        pthread_join(s->watch_thread, NULL);
    } else if (s->completion_started) {
        grpc_server_shutdown_and_notify(s->grpc, s->completions, &s->shut_down);
        grpc_server_cancel_all_calls(s->grpc);
        pthread_mutex_lock(&s->phase_lock);
        while (!s->is_shut_down) pthread_cond_wait(&s->phase_changed, &s->phase_lock);
        pthread_mutex_unlock(&s->phase_lock);
    }
    if (s->parse_queue != NULL) choir_queue_close(s->parse_queue);
    if (s->slow_queue != NULL) choir_queue_close(s->slow_queue);
    if (s->wake_queue != NULL) choir_queue_close(s->wake_queue);
    for (uint32_t i = 0; i < s->n_parsers_started; i++) pthread_join(s->parsers[i], NULL);
    if (s->slow_started) pthread_join(s->slow_thread, NULL);
    if (s->pump_started) pthread_join(s->pump_thread, NULL);
}

/* A server that was bound but never served: its queue has nobody to run it but us. */
static void release_grpc(choir_server *s)
{
    if (s->completions != NULL) {
        if (!s->completion_started && s->grpc != NULL) {
            grpc_server_shutdown_and_notify(s->grpc, s->completions, &s->shut_down);
            grpc_completion_queue_next(s->completions, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        }
        grpc_completion_queue_shutdown(s->completions);
        if (s->completion_started)
            pthread_join(s->completion_thread, NULL);
        else
            while (grpc_completion_queue_next(s->completions, gpr_inf_future(GPR_CLOCK_MONOTONIC),
                                              NULL)
                       .type != GRPC_QUEUE_SHUTDOWN) {
            }
    }
    if (s->grpc != NULL) grpc_server_destroy(s->grpc);
    if (s->completions != NULL) grpc_completion_queue_destroy(s->completions);
    if (s->grpc_started) grpc_shutdown_blocking();
}

void choir_server_destroy(choir_server *s)
{
    if (s == NULL) return;
    shut_down(s);
    choir_http_stop(s->http); /* last, so that it tells of the way down */
    release_grpc(s);
    choir_queue_destroy(s->parse_queue);
    choir_queue_destroy(s->slow_queue);
    choir_queue_destroy(s->wake_queue);
    choir_reflection_destroy(s->reflection);
    choir_arena_destroy(s->copies);
    pthread_cond_destroy(&s->phase_changed);
    pthread_mutex_destroy(&s->phase_lock);
    pthread_mutex_destroy(&s->calls_lock);
    choir_free(s->parsers);
    choir_free(s);
}
