/* choir's front end over a simulated engine, for tests: real scheduler, real tokenizer, made-up
 * tokens. Prints "listening on ADDRESS". */
#include "tests/server/simulated_adapters.h"
#include "tests/server/simulated_model.h"

#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct arguments {
    const char *listen[2], *tokenizer, *keys[1], *certificate, *key;
    const char *name;     /* NULL: the model's own */
    const char *adapters; /* NULL: none */
    uint32_t adapter_bytes;
    uint32_t n_listen, n_pages, step_ms, stall_ms, n_streamed;
    choir_server_options server;
    choir_scheduler_options scheduler;
} arguments;

static uint32_t number(const char *text)
{
    return (uint32_t)strtoul(text, NULL, 10);
}

static void parse(int argc, char **argv, arguments *a)
{
    // clang-format off
    static const struct option options[] = {
        {"listen", 1, NULL, 'l'},      {"tokenizer", 1, NULL, 't'},     {"pages", 1, NULL, 'p'},
        {"step-ms", 1, NULL, 's'},     {"stall-ms", 1, NULL, 'S'},      {"api-key", 1, NULL, 'k'},
        {"max-queued", 1, NULL, 'q'},  {"max-sequences", 1, NULL, 'n'}, {"outbox", 1, NULL, 'o'},
        {"slow-reader-ms", 1, NULL, 'r'}, {"stalled-after-ms", 1, NULL, 'h'},
        {"watchdog-exit-ms", 1, NULL, 'w'}, {"pause-ms", 1, NULL, 'P'},
        {"shutdown-ms", 1, NULL, 'd'}, {"stuck-ms", 1, NULL, 'u'}, {"max-calls", 1, NULL, 'c'},
        {"http", 1, NULL, 'H'},        {"http-connections", 1, NULL, 'x'},
        {"http-request-ms", 1, NULL, 'R'}, {"http-idle-ms", 1, NULL, 'I'},
        {"name", 1, NULL, 'N'},        {"stream-experts", 1, NULL, 'E'},
        {"adapters", 1, NULL, 'A'},    {"adapter-bytes", 1, NULL, 'B'},
        {"tls-cert", 1, NULL, 'C'}, {"tls-key", 1, NULL, 'K'}, {0}};
    // clang-format on
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'l':
            if (a->n_listen < 2) a->listen[a->n_listen++] = optarg;
            break;
        case 't':
            a->tokenizer = optarg;
            break;
        case 'p':
            a->n_pages = number(optarg);
            break;
        case 's':
            a->step_ms = number(optarg);
            break;
        case 'S':
            a->stall_ms = number(optarg);
            break;
        case 'k':
            a->keys[0] = optarg;
            a->server.n_api_keys = 1;
            break;
        case 'q':
            a->scheduler.max_queued = number(optarg);
            break;
        case 'n':
            a->scheduler.max_sequences = number(optarg);
            break;
        case 'o':
            a->scheduler.outbox_bytes = number(optarg);
            break;
        case 'r':
            a->scheduler.slow_reader_ms = number(optarg);
            break;
        case 'h':
            a->scheduler.stall_ms = number(optarg);
            break;
        case 'w':
            a->server.watchdog_exit_ms = number(optarg);
            break;
        case 'P':
            a->server.drain_pause_ms = number(optarg);
            break;
        case 'd':
            a->server.shutdown_ms = number(optarg);
            break;
        case 'u':
            a->server.stuck_ms = number(optarg);
            break;
        case 'c':
            a->server.max_calls = number(optarg);
            break;
        case 'H':
            a->server.http = optarg;
            break;
        case 'x':
            a->server.http_max_connections = number(optarg);
            break;
        case 'R':
            a->server.http_request_ms = number(optarg);
            break;
        case 'I':
            a->server.http_idle_ms = number(optarg);
            break;
        case 'N':
            a->name = optarg;
            break;
        case 'E':
            a->n_streamed = number(optarg);
            break;
        case 'A':
            a->adapters = optarg;
            break;
        case 'B':
            a->adapter_bytes = number(optarg);
            break;
        case 'C':
            a->certificate = optarg;
            break;
        case 'K':
            a->key = optarg;
            break;
        default:
            exit(2);
        }
    }
}

static choir_status serve(const arguments *a, simulated_model *m)
{
    choir_scheduler *scheduler = NULL;
    choir_server *server = NULL;
    choir_status status = CHOIR_OK;
    if (a->adapters != NULL)
        status = simulated_adapters_create(a->adapters, a->adapter_bytes, &m->engine.adapters);
    if (status == CHOIR_OK)
        status = choir_scheduler_create(&m->engine, &a->scheduler, &scheduler);
    if (status == CHOIR_OK) {
        choir_server_model model = simulated_model_served(m, scheduler);
        if (a->name != NULL) model.name = a->name;
        model.adapter_type = CHOIR_ADAPTER_F32;
        status = choir_server_create(&a->server, &model, 1, &server);
    }
    if (status == CHOIR_OK) status = choir_server_start(server);
    if (status == CHOIR_OK) {
        for (uint32_t i = 0; i < a->server.n_listen; i++)
            printf("listening on %s\n", choir_server_address(server, i));
        if (a->server.http != NULL) printf("http on %s\n", choir_server_http_address(server));
        fflush(stdout);
        choir_server_run_until_signal(server);
    }
    choir_server_destroy(server);
    choir_scheduler_destroy(scheduler);
    if (m->engine.adapters != NULL) choir_adapters_destroy(m->engine.adapters);
    return status;
}

static choir_status read_pem(const char *path, char **out)
{
    size_t bytes;
    return path == NULL ? CHOIR_OK : choir_file_read(path, 1 << 20, out, &bytes);
}

int main(int argc, char **argv)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    arguments a = {.tokenizer = "tests/fixtures/server/tokenizer.json",
                   .n_pages = 4096,
                   .stall_ms = 3000,
                   .server = CHOIR_SERVER_OPTIONS_DEFAULT,
                   .scheduler = CHOIR_SCHEDULER_OPTIONS_DEFAULT};
    a.scheduler.max_sequences = 64;
    parse(argc, argv, &a);
    if (a.n_listen == 0) a.listen[a.n_listen++] = "127.0.0.1:0";
    a.server.listen = a.listen;
    a.server.n_listen = a.n_listen;
    a.server.api_keys = a.keys;
    char *certificate = NULL, *key = NULL;
    simulated_model model = {0};
    choir_status status = read_pem(a.certificate, &certificate);
    if (status == CHOIR_OK) status = read_pem(a.key, &key);
    a.server.tls_certificate = certificate;
    a.server.tls_key = key;
    if (status == CHOIR_OK) status = simulated_model_open(&model, a.tokenizer, a.n_pages);
    if (a.n_streamed > 0) simulated_model_stream_experts(&model, a.n_streamed);
    model.step_ms = a.step_ms;
    model.stall_ms = a.stall_ms;
    if (status == CHOIR_OK) status = serve(&a, &model);
    if (status != CHOIR_OK) fprintf(stderr, "test_server: %s\n", choir_error_message());
    simulated_model_close(&model);
    choir_free(certificate);
    choir_free(key);
    return status == CHOIR_OK ? 0 : 1;
}
