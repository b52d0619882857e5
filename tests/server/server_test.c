/* The server and the blocking client in one process, over the simulated model. */
#include "server/client.h"
#include "tests/server/simulated_model.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
// cmocka wants setjmp.h and stdarg.h first
#include <cmocka.h>

static simulated_model model;
static choir_scheduler *scheduler;
static choir_server *server;
static volatile sig_atomic_t stop;

static choir_server_options options_of(void)
{
    static const char *const listen[] = {"127.0.0.1:0"};
    choir_server_options o = CHOIR_SERVER_OPTIONS_DEFAULT;
    o.listen = listen;
    o.n_listen = 1;
    o.http = "127.0.0.1:0";
    o.drain_pause_ms = 1;
    return o;
}

static int set_up(void **state)
{
    (void)state;
    choir_scheduler_options s = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    if (simulated_model_open(&model, "tests/fixtures/server/tokenizer.json", 1024) != CHOIR_OK)
        return 1;
    if (choir_scheduler_create(&model.engine, &s, &scheduler) != CHOIR_OK) return 1;
    choir_server_options o = options_of();
    choir_server_model served = simulated_model_served(&model, scheduler);
    if (choir_server_create(&o, &served, 1, &server) != CHOIR_OK) return 1;
    return choir_server_start(server) == CHOIR_OK ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    choir_server_destroy(server);
    choir_scheduler_destroy(scheduler);
    simulated_model_close(&model);
    return 0;
}

static choir_client *connect_to(const char *address, uint32_t timeout_ms)
{
    choir_client_options o = {.target = address, .timeout_ms = timeout_ms, .stop = &stop};
    choir_client *client = NULL;
    assert_int_equal(choir_client_create(&o, &client), CHOIR_OK);
    return client;
}

typedef struct seen {
    char text[8192];
    size_t n;
    uint32_t n_events, stop_after;
    bool started, done;
} seen;

static bool see(void *user, const Choir__V1__GenerateEvent *event)
{
    seen *s = user;
    s->n_events++;
    if (event->event_case == CHOIR__V1__GENERATE_EVENT__EVENT_STARTED) s->started = true;
    if (event->event_case == CHOIR__V1__GENERATE_EVENT__EVENT_DONE) s->done = true;
    if (event->event_case == CHOIR__V1__GENERATE_EVENT__EVENT_DELTA) {
        size_t n = strlen(event->delta->text);
        assert_true(s->n + n < sizeof s->text);
        memcpy(s->text + s->n, event->delta->text, n + 1);
        s->n += n;
    }
    if (s->stop_after != 0 && s->n_events == s->stop_after / 2) stop = 1;
    return s->stop_after == 0 || s->n_events < s->stop_after;
}

static choir_status ask(choir_client *client, const char *prompt, uint32_t max_tokens, seen *out)
{
    Choir__V1__GenerateRequest request = CHOIR__V1__GENERATE_REQUEST__INIT;
    Choir__V1__Sampling sampling = CHOIR__V1__SAMPLING__INIT;
    request.input_case = CHOIR__V1__GENERATE_REQUEST__INPUT_PROMPT;
    request.prompt = (char *)prompt;
    CHOIR_CLIENT_SET(&sampling, max_tokens, MAX_TOKENS, max_tokens);
    request.sampling = &sampling;
    return choir_client_generate(client, &request, see, out);
}

static void answers(void **state)
{
    (void)state;
    choir_client *client = connect_to(choir_server_address(server, 0), 10000);
    assert_int_equal(choir_client_wait_serving(client, "", 5000), CHOIR_OK);
    seen s = {0};
    assert_int_equal(ask(client, "<|short|>", 10, &s), CHOIR_OK);
    assert_string_equal(s.text, "ok");
    assert_true(s.started && s.done);
    ProtobufCMessage *answer;
    Choir__V1__ListModelsRequest request = CHOIR__V1__LIST_MODELS_REQUEST__INIT;
    assert_int_equal(choir_client_call(client, "/choir.v1.Choir/ListModels", &request.base,
                                       &choir__v1__list_models_response__descriptor, &answer),
                     CHOIR_OK);
    assert_string_equal(((Choir__V1__ListModelsResponse *)answer)->models[0]->name, "simulated");
    protobuf_c_message_free_unpacked(answer, NULL);
    choir_client_destroy(client);
}

static void tells_the_servers_sentence(void **state)
{
    (void)state;
    choir_client *client = connect_to(choir_server_address(server, 0), 10000);
    seen s = {0};
    assert_int_equal(ask(client, "", 10, &s), CHOIR_E_INVALID);
    assert_non_null(strstr(choir_error_message(), "prompt"));
    assert_int_equal(choir_client_wait_serving(client, "nobody", 1000), CHOIR_E_NOT_FOUND);
    choir_client_destroy(client);
    client = connect_to("127.0.0.1:1", 500);
    choir_status status = ask(client, "x", 1, &s);
    assert_true(status == CHOIR_E_UNAVAILABLE || status == CHOIR_E_DEADLINE);
    assert_int_equal(choir_client_wait_serving(client, "", 300), CHOIR_E_DEADLINE);
    choir_client_destroy(client);
}

static void can_be_stopped(void **state)
{
    (void)state;
    choir_client *client = connect_to(choir_server_address(server, 0), 0);
    seen s = {.stop_after = 20}; /* the flag is raised at the tenth event */
    assert_int_equal(ask(client, "<|slow|>", 3000, &s), CHOIR_E_CANCELLED);
    assert_true(s.started && !s.done && s.n_events <= 21);
    stop = 0;
    choir_client_destroy(client);
    client = connect_to(choir_server_address(server, 0), 300);
    s = (seen){0};
    assert_int_equal(ask(client, "<|slow|>", 3000, &s), CHOIR_E_DEADLINE);
    choir_client_destroy(client);
}

/* The answer of one GET on a connection of its own; "" if nobody listens. */
static void get(const char *address, const char *path, char *out, size_t room)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                             .sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1))};
    char request[256];
    size_t n = 0;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int bytes = snprintf(request, sizeof request, "GET %s HTTP/1.0\r\n\r\n", path);
    out[0] = '\0';
    if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0 &&
        write(fd, request, (size_t)bytes) == bytes) {
        for (ssize_t got; n + 1 < room && (got = read(fd, out + n, room - 1 - n)) > 0;)
            n += (size_t)got;
        out[n] = '\0';
    }
    close(fd);
}

typedef struct scraper { /* cmocka's asserts are for the main thread alone */
    atomic_bool stop;
    uint32_t n_scrapes, n_bad;
} scraper;

static void *scrape(void *arg)
{
    static const char done[] = "\nchoir_requests_done_total{model=\"simulated\"} ";
    static char text[32 << 10];
    scraper *w = arg;
    uint64_t before = 0;
    for (; !atomic_load(&w->stop); w->n_scrapes++) {
        get(choir_server_http_address(server), "/metrics?experts=1", text, sizeof text);
        const char *at = strstr(text, done);
        uint64_t now = at != NULL ? strtoull(at + strlen(done), NULL, 10) : 0;
        w->n_bad += at == NULL || now < before;
        before = now;
        get(choir_server_http_address(server), "/readyz", text, sizeof text);
        w->n_bad += strstr(text, "\r\n\r\nready\n") == NULL;
        usleep(20000); /* two connections a round, and an address has 200 a second */
    }
    return NULL;
}

static void is_watched_while_it_answers(void **state)
{
    (void)state;
    choir_client *client = connect_to(choir_server_address(server, 0), 10000);
    pthread_t thread;
    scraper w = {0};
    assert_int_equal(pthread_create(&thread, NULL, scrape, &w), 0);
    for (int i = 0; i < 5; i++) {
        seen s = {0};
        assert_int_equal(ask(client, "<|slow|>", 4, &s), CHOIR_OK);
    }
    atomic_store(&w.stop, true);
    pthread_join(thread, NULL);
    assert_true(w.n_scrapes > 5);
    assert_int_equal(w.n_bad, 0);
    choir_client_destroy(client);
}

/* Starting fails at each of its own allocations once, with a sentence and without a leak. */
static void start_survives_failing_memory(void **state)
{
    (void)state;
    choir_server_options o = options_of();
    choir_server_model served = simulated_model_served(&model, scheduler);
    choir_status status = CHOIR_E_NO_MEMORY;
    uint32_t n_failed = 0;
    for (uint64_t i = 1; status != CHOIR_OK; i++) {
        choir_server *s = NULL;
        assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_OK);
        choir_memory_fail_at(i);
        status = choir_server_start(s);
        choir_memory_fail_at(0);
        assert_true(status == CHOIR_OK || status == CHOIR_E_NO_MEMORY);
        n_failed += status != CHOIR_OK;
        choir_server_destroy(s);
    }
    assert_true(n_failed > 2);
}

static void create_survives_failing_memory(void **state)
{
    (void)state;
    choir_server_options o = options_of();
    choir_server_model served = simulated_model_served(&model, scheduler);
    choir_status status = CHOIR_E_NO_MEMORY;
    for (uint64_t i = 1; status != CHOIR_OK; i++) {
        choir_server *s = NULL;
        choir_memory_fail_at(i);
        status = choir_server_create(&o, &served, 1, &s);
        choir_memory_fail_at(0);
        assert_true(status == CHOIR_OK || status == CHOIR_E_NO_MEMORY);
        choir_server_destroy(s);
    }
}

/* Every allocation of a request fails once: the call ends with a status, the server lives. */
static void calls_survive_failing_memory(void **state)
{
    (void)state;
    choir_client *client = connect_to(choir_server_address(server, 0), 5000);
    uint32_t n_failed = 0;
    for (uint64_t i = 1; i < 120; i++) {
        seen s = {0};
        choir_memory_fail_at(i);
        choir_status status = ask(client, "hello", 4, &s);
        choir_memory_fail_at(0);
        if (status != CHOIR_OK) n_failed++;
    }
    assert_true(n_failed > 0);
    seen s = {0};
    assert_int_equal(ask(client, "<|short|>", 10, &s), CHOIR_OK);
    assert_string_equal(s.text, "ok");
    choir_client_destroy(client);
}

static void refuses_bad_options(void **state)
{
    (void)state;
    static const char *const nowhere[] = {"256.0.0.1:0"};
    choir_server *s = NULL;
    choir_server_model served = simulated_model_served(&model, scheduler);
    choir_server_options o = options_of();
    o.n_listen = 0;
    assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_E_INVALID);
    o = options_of();
    assert_int_equal(choir_server_create(&o, &served, 0, &s), CHOIR_E_INVALID);
    o.tls_key = "x";
    assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_E_INVALID);
    o.tls_certificate = "y";
    assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_OK);
    assert_int_not_equal(choir_server_start(s), CHOIR_OK);
    choir_server_destroy(s);
    o = options_of();
    o.http = "unix:/x";
    assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_E_INVALID);
    o.http = choir_server_http_address(server); /* taken */
    assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_OK);
    assert_int_equal(choir_server_start(s), CHOIR_E_IO);
    choir_server_destroy(s);
    o = options_of();
    o.http_max_connections = 1;
    assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_E_INVALID);
    const choir_server_model twice[] = {served, served};
    o = options_of();
    assert_int_equal(choir_server_create(&o, twice, 2, &s), CHOIR_E_INVALID);
    assert_non_null(strstr(choir_error_message(), "simulated"));
    o.listen = nowhere;
    assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_OK);
    assert_int_equal(choir_server_start(s), CHOIR_E_IO);
    choir_server_destroy(s);
}

static void refuses_bad_addresses(void **state)
{
    (void)state;
    static const char *const good[] = {"127.0.0.1:0", "localhost:65535", "[::1]:50051", "unix:/x"};
    static const char *const bad[] = {
        "",        ":1",         "localhost",       "127.0.0.1:",  "host:1x",
        "host:-1", "host:65536", "127.0.0.1:99999", "host:000001", "host: 1"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_int_equal(choir_server_check_address(good[i]), CHOIR_OK);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(choir_server_check_address(bad[i]), CHOIR_E_INVALID);
        assert_int_equal(choir_server_check_http_address(bad[i]), CHOIR_E_INVALID);
    }
    char long_name[300];
    memset(long_name, 'a', sizeof long_name);
    memcpy(long_name + sizeof long_name - 3, ":1", 3);
    assert_int_equal(choir_server_check_http_address("[::1]:0"), CHOIR_OK);
    assert_int_equal(choir_server_check_http_address("unix:/x"), CHOIR_E_INVALID);
    assert_int_equal(choir_server_check_http_address(long_name), CHOIR_E_INVALID);
}

static void starts_and_stops_many_times(void **state)
{
    (void)state;
    choir_server_options o = options_of();
    choir_server_model served = simulated_model_served(&model, scheduler);
    for (int i = 0; i < 10; i++) {
        choir_server *s;
        assert_int_equal(choir_server_create(&o, &served, 1, &s), CHOIR_OK);
        assert_int_equal(choir_server_start(s), CHOIR_OK);
        choir_client *client = connect_to(choir_server_address(s, 0), 5000);
        seen got = {0};
        assert_int_equal(ask(client, "<|short|>", 10, &got), CHOIR_OK);
        char address[64], text[512];
        snprintf(address, sizeof address, "%s", choir_server_http_address(s));
        get(address, "/healthz", text, sizeof text);
        assert_non_null(strstr(text, "\r\n\r\nok\n"));
        if (i % 2 == 0) choir_server_stop(s);
        choir_server_destroy(s);
        get(address, "/healthz", text, sizeof text);
        assert_string_equal(text, "");
        choir_client_destroy(client);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answers),
        cmocka_unit_test(tells_the_servers_sentence),
        cmocka_unit_test(can_be_stopped),
        cmocka_unit_test(is_watched_while_it_answers),
        cmocka_unit_test(create_survives_failing_memory),
        cmocka_unit_test(start_survives_failing_memory),
        cmocka_unit_test(calls_survive_failing_memory),
        cmocka_unit_test(refuses_bad_options),
        cmocka_unit_test(refuses_bad_addresses),
        cmocka_unit_test(starts_and_stops_many_times),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
