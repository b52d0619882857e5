/* libevent parses and writes; this file decides who may stay and what is answered.
 *
 * A connection's life is bounded by our own clock, since libevent's time-outs begin anew with every
 * byte. libevent 2.1 tells nobody when it frees a connection; so each bufferevent is held with a
 * reference of ours, and one whose callbacks are gone has been freed. Whoever has to go gets the
 * event of libevent's own time-out: the end of the stream would not be seen while reading rests. */
#include "server/http.h"

#include "server/call.h"
#include "server/metrics.h"

#include <errno.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/http.h>
#include <event2/keyvalq_struct.h>
#include <event2/listener.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    BACKLOG = 128,
    SWEEP_MS = 200,
    ROOM_MS = 1,            /* the listener rests so long when one has to go */
    BURST = 50,             /* requests of one connection at once, … */
    REQUESTS_PER_S = 20,    /* … and later */
    TEXT_MS = 100,          /* metrics asked for more often are the same text */
    MAX_BODY_BYTES = 4096,  /* read and thrown away */
    MAX_PENDING = 16 << 20, /* bytes of answers that are not sent yet */
    WATCH_LATE_MS = 5000,   /* the watch thread looks ten times a second */
};

/* A connection. Free when `bev` is NULL. */
typedef struct peer {
    struct bufferevent *bev;
    uint64_t asking_since_ns; /* a request's first byte; 0: idle */
    uint64_t idle_since_ns;
    double allowance; /* requests it may make, as of refilled_ns */
    uint64_t refilled_ns;
} peer;

struct choir_http {
    choir_server *server;
    struct event_base *base;
    struct evhttp *http;
    struct evconnlistener *listener; /* evhttp's */
    struct event *sweep, *room, *stop;
    int stop_fd;
    pthread_t thread;
    bool started;
    peer *peers; /* [n_slots] */
    uint32_t n_slots, n_peers;
    struct evbuffer *texts[2]; /* of /metrics, without and with heat */
    uint64_t text_ns[2];
    char address[300];
};

/* --- connections */

static bool was_freed(const peer *p)
{
    bufferevent_event_cb on_event;
    bufferevent_getcb(p->bev, NULL, NULL, &on_event, NULL);
    return on_event == NULL;
}

static void reap(choir_http *h)
{
    for (uint32_t i = 0; i < h->n_slots; i++) {
        peer *p = &h->peers[i];
        if (p->bev == NULL || !was_freed(p)) continue;
        bufferevent_decref(p->bev);
        *p = (peer){0};
        h->n_peers--;
    }
}

/* Never of the connection whose callback runs: it is freed at once. */
static void drop(peer *p)
{
    bufferevent_trigger_event(p->bev, BEV_EVENT_TIMEOUT | BEV_EVENT_READING, 0);
}

static bool goes_before(const peer *a, const peer *b)
{
    bool a_idles = a->asking_since_ns == 0, b_idles = b->asking_since_ns == 0;
    if (a_idles != b_idles) return a_idles;
    return a_idles ? a->idle_since_ns < b->idle_since_ns : a->asking_since_ns < b->asking_since_ns;
}

/* The one that has been idle longest, or else asks longest, makes room. */
static void drop_one(choir_http *h)
{
    peer *oldest = NULL;
    for (uint32_t i = 0; i < h->n_slots; i++) {
        peer *p = &h->peers[i];
        if (p->bev == NULL || was_freed(p)) continue;
        if (oldest == NULL || goes_before(p, oldest)) oldest = p;
    }
    if (oldest != NULL) drop(oldest);
}

static void rest(choir_http *h)
{
    const struct timeval soon = {.tv_usec = ROOM_MS * 1000};
    evconnlistener_disable(h->listener);
    evtimer_add(h->room, &soon);
}

static void on_room(evutil_socket_t fd, short what, void *http)
{
    (void)fd, (void)what;
    choir_http *h = http;
    reap(h);
    if (h->n_peers < h->n_slots)
        evconnlistener_enable(h->listener);
    else
        rest(h);
}

static void on_sweep(evutil_socket_t fd, short what, void *http)
{
    (void)fd, (void)what;
    choir_http *h = http;
    const choir_server_options *o = &h->server->options;
    uint64_t now = choir_clock_now();
    reap(h);
    for (uint32_t i = 0; i < h->n_slots; i++) {
        peer *p = &h->peers[i];
        if (p->bev == NULL) continue;
        uint64_t since = p->asking_since_ns != 0 ? p->asking_since_ns : p->idle_since_ns;
        uint32_t limit_ms = p->asking_since_ns != 0 ? o->http_request_ms : o->http_idle_ms;
        if (now - since > limit_ms * CHOIR_MS) drop(p);
    }
}

static void on_bytes(struct evbuffer *input, const struct evbuffer_cb_info *info, void *of)
{
    (void)input;
    peer *p = of;
    if (info->n_added > 0 && p->asking_since_ns == 0) p->asking_since_ns = choir_clock_now();
}

/* A new connection's bufferevent; the listener rests while no slot is free. */
static struct bufferevent *on_connect(struct event_base *base, void *http)
{
    choir_http *h = http;
    /* The socket closes with our reference: until then its events stand under its number, which
     * must not be another connection's. */
    struct bufferevent *bev = bufferevent_socket_new(base, -1, BEV_OPT_CLOSE_ON_FREE);
    if (bev == NULL) return NULL;
    reap(h);
    uint32_t i = 0;
    while (i < h->n_slots && h->peers[i].bev != NULL) i++;
    CHOIR_ASSERT(i < h->n_slots);
    peer *p = &h->peers[i];
    uint64_t now = choir_clock_now();
    *p = (peer){.bev = bev,
                .asking_since_ns = now,
                .idle_since_ns = now,
                .allowance = BURST,
                .refilled_ns = now};
    h->n_peers++;
    bufferevent_incref(bev);
    /* While an answer is written libevent goes on reading, into a buffer without a bound. */
    bufferevent_setwatermark(bev, EV_READ, 0,
                             h->server->options.max_metadata_bytes + 2 * MAX_BODY_BYTES);
    /* Without it a connection would pass for idle while it sends: rather it goes soon. */
    if (evbuffer_add_cb(bufferevent_get_input(bev), on_bytes, p) == NULL) p->asking_since_ns = 1;
    if (h->n_peers == h->n_slots) {
        drop_one(h); /* not this one: libevent has not set its callbacks yet */
        rest(h);
    }
    return bev;
}

static peer *peer_of(choir_http *h, struct evhttp_request *request)
{
    struct bufferevent *bev =
        evhttp_connection_get_bufferevent(evhttp_request_get_connection(request));
    for (uint32_t i = 0; i < h->n_slots; i++)
        if (h->peers[i].bev == bev) return &h->peers[i];
    return NULL; /* memory lacked when it came */
}

static void on_answered(struct evhttp_request *request, void *http)
{
    peer *p = peer_of(http, request);
    if (p == NULL) return;
    bool has_more = evbuffer_get_length(bufferevent_get_input(p->bev)) > 0;
    p->idle_since_ns = choir_clock_now();
    p->asking_since_ns = has_more ? p->idle_since_ns : 0;
}

static bool may_ask(peer *p)
{
    uint64_t now = choir_clock_now();
    double earned = (double)(now - p->refilled_ns) / CHOIR_SECOND * REQUESTS_PER_S;
    p->allowance = p->allowance + earned > BURST ? BURST : p->allowance + earned;
    p->refilled_ns = now;
    if (p->allowance < 1) return false;
    p->allowance -= 1;
    return true;
}

/* --- answers */

typedef struct route {
    const char *path;
    bool open; /* needs no api key */
    void (*answer)(choir_http *http, struct evhttp_request *request);
} route;

static void header(struct evhttp_request *request, const char *name, const char *value)
{
    (void)evhttp_add_header(evhttp_request_get_output_headers(request), name, value);
}

/* Takes what `body` holds. To HEAD libevent 2.1 would send the body too. */
static void answer(struct evhttp_request *request, int code, const char *type,
                   struct evbuffer *body)
{
    char length[24];
    snprintf(length, sizeof length, "%zu", evbuffer_get_length(body));
    header(request, "Content-Length", length);
    header(request, "Content-Type", type);
    header(request, "Cache-Control", "no-store");
    bool is_head = evhttp_request_get_command(request) == EVHTTP_REQ_HEAD;
    evhttp_send_reply(request, code, NULL, is_head ? NULL : body);
}

static void answer_text(struct evhttp_request *request, int code, const char *type,
                        const char *text)
{
    struct evbuffer *body = evbuffer_new();
    if (body == NULL || evbuffer_add(body, text, strlen(text)) != 0)
        evhttp_send_error(request, HTTP_SERVUNAVAIL, NULL);
    else
        answer(request, code, type, body);
    if (body != NULL) evbuffer_free(body);
}

/* The message holds no quotes and nothing of the client's. */
static void refuse(struct evhttp_request *request, int code, const char *type, const char *what,
                   const char *message)
{
    char text[400];
    snprintf(text, sizeof text,
             "{\"error\": {\"message\": \"%s\", \"type\": \"%s\", \"code\": \"%s\"}}\n", message,
             type, what);
    answer_text(request, code, "application/json", text);
}

static void answer_line(struct evhttp_request *request, bool ok, const char *line)
{
    answer_text(request, ok ? HTTP_OK : HTTP_SERVUNAVAIL, "text/plain; charset=utf-8", line);
}

static void answer_healthz(choir_http *h, struct evhttp_request *request)
{
    const choir_server *s = h->server;
    /* Both pair with the watch thread's stores. */
    uint64_t looked = atomic_load(&s->looked_ns), now = choir_clock_now();
    bool moves = atomic_load(&s->makes_progress);
    bool looks = now < looked || now - looked < WATCH_LATE_MS * CHOIR_MS;
    answer_line(request, moves && looks,
                !looks  ? "the watch thread has not looked for 5 s\n"
                : moves ? "ok\n"
                        : "no progress: work is pending and no step was done for too long\n");
}

static void answer_readyz(choir_http *h, struct evhttp_request *request)
{
    const choir_server *s = h->server;
    bool is_serving = choir_health_serving(s),
         drains = atomic_load(&s->phase) > CHOIR_PHASE_SERVING;
    answer_line(request, is_serving && !drains,
                drains       ? "draining\n"
                : is_serving ? "ready\n"
                             : "not serving: an engine makes no progress\n");
}

static bool wants_experts(struct evhttp_request *request)
{
    const char *query = evhttp_uri_get_query(evhttp_request_get_evhttp_uri(request));
    struct evkeyvalq pairs = {0};
    bool wants = false;
    if (query == NULL || evhttp_parse_query_str(query, &pairs) != 0) return false;
    const char *value = evhttp_find_header(&pairs, "experts");
    wants = value != NULL && strcmp(value, "1") == 0;
    evhttp_clear_headers(&pairs);
    return wants;
}

/* The text, in one piece. It is made at most every TEXT_MS, whoever asks. */
static struct evbuffer *metrics_text(choir_http *h, bool with_heat)
{
    uint64_t now = choir_clock_now();
    struct evbuffer **text = &h->texts[with_heat];
    if (*text != NULL && now - h->text_ns[with_heat] < TEXT_MS * CHOIR_MS) return *text;
    struct evbuffer *fresh = evbuffer_new();
    if (fresh == NULL) return NULL;
    if (choir_metrics_write(h->server, with_heat, fresh) != CHOIR_OK ||
        evbuffer_pullup(fresh, -1) == NULL) {
        evbuffer_free(fresh);
        return NULL;
    }
    if (*text != NULL) evbuffer_free(*text);
    *text = fresh;
    h->text_ns[with_heat] = now;
    return fresh;
}

static size_t pending_bytes(const choir_http *h)
{
    size_t bytes = 0;
    for (uint32_t i = 0; i < h->n_slots; i++)
        if (h->peers[i].bev != NULL)
            bytes += evbuffer_get_length(bufferevent_get_output(h->peers[i].bev));
    return bytes;
}

static void answer_metrics(choir_http *h, struct evhttp_request *request)
{
    if (pending_bytes(h) > MAX_PENDING) {
        refuse(request, HTTP_SERVUNAVAIL, "server_error", "overloaded",
               "too many answers wait for their readers");
        return;
    }
    struct evbuffer *text = metrics_text(h, wants_experts(request)), *body = evbuffer_new();
    /* A copy: with a reference the slowest reader of each text would hold all of it. */
    if (text == NULL || body == NULL ||
        evbuffer_add(body, evbuffer_pullup(text, -1), evbuffer_get_length(text)) != 0)
        refuse(request, HTTP_SERVUNAVAIL, "server_error", "out_of_memory",
               "no memory for the metrics");
    else
        answer(request, HTTP_OK, "text/plain; version=0.0.4; charset=utf-8", body);
    if (body != NULL) evbuffer_free(body);
}

static const route routes[] = {
    {.path = "/metrics", .answer = answer_metrics},
    {.path = "/healthz", .open = true, .answer = answer_healthz},
    {.path = "/readyz", .open = true, .answer = answer_readyz},
};

static bool knows_key(const choir_http *h, struct evhttp_request *request)
{
    const struct evkeyvalq *headers = evhttp_request_get_input_headers(request);
    if (h->server->options.n_api_keys == 0) return true;
    for (const struct evkeyval *e = headers->tqh_first; e != NULL; e = e->next.tqe_next)
        if (evutil_ascii_strcasecmp(e->key, "authorization") == 0 &&
            choir_auth_allows_value(h->server, (const uint8_t *)e->value, strlen(e->value)))
            return true;
    return false;
}

static void dispatch(choir_http *h, const route *to, struct evhttp_request *request)
{
    enum evhttp_cmd_type method = evhttp_request_get_command(request);
    if (to == NULL) {
        refuse(request, HTTP_NOTFOUND, "invalid_request_error", "not_found",
               "there is no such path here; there are /metrics, /healthz and /readyz");
    } else if (method != EVHTTP_REQ_GET && method != EVHTTP_REQ_HEAD) {
        header(request, "Allow", "GET, HEAD");
        refuse(request, HTTP_BADMETHOD, "invalid_request_error", "method_not_allowed",
               "this path takes GET and HEAD only");
    } else if (!to->open && !knows_key(h, request)) {
        header(request, "WWW-Authenticate", "Bearer");
        refuse(request, 401, "invalid_request_error", "invalid_api_key",
               "this path wants the header `Authorization: Bearer KEY` with a key of this server");
    } else {
        to->answer(h, request);
    }
}

static void on_request(struct evhttp_request *request, void *http)
{
    choir_http *h = http;
    const struct evhttp_uri *uri = evhttp_request_get_evhttp_uri(request);
    const char *path = uri != NULL ? evhttp_uri_get_path(uri) : NULL;
    const route *to = NULL;
    peer *p = peer_of(h, request);
    evhttp_request_set_on_complete_cb(request, on_answered, h);
    for (size_t i = 0; i < sizeof routes / sizeof *routes && path != NULL; i++)
        if (strcmp(routes[i].path, path) == 0) to = &routes[i];
    if (p == NULL || !may_ask(p)) {
        header(request, "Connection", "close");
        refuse(request, 429, "rate_limit_error", "rate_limit_exceeded",
               "too many requests of one connection");
        return;
    }
    dispatch(h, to, request);
}

/* --- start and stop */

/* "HOST:PORT" or "[HOST]:PORT"; the first address that can be had is bound, and no other. */
static choir_status bind_to(const char *address, int *out)
{
    char host[256];
    const char *colon = strrchr(address, ':');
    size_t n = (size_t)(colon - address);
    const char *start = address;
    if (n >= 2 && address[0] == '[' && address[n - 1] == ']') {
        start++;
        n -= 2;
    }
    snprintf(host, sizeof host, "%.*s", (int)n, start);
    const struct addrinfo want = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *found = NULL;
    int error = getaddrinfo(host, colon + 1, &want, &found), fd = -1;
    if (error != 0)
        return choir_fail(CHOIR_E_IO, "cannot listen on %s: %s", address, gai_strerror(error));
    for (const struct addrinfo *a = found; a != NULL && fd < 0; a = a->ai_next) {
        const int yes = 1; /* a port whose last connections linger is free */
        fd = socket(a->ai_family, a->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, a->ai_protocol);
        if (fd < 0) continue;
        (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, BACKLOG) == 0) continue;
        error = errno;
        close(fd);
        fd = -1;
        errno = error;
    }
    freeaddrinfo(found);
    *out = fd;
    return fd >= 0 ? CHOIR_OK : choir_fail(CHOIR_E_IO, "cannot listen on %s: %m", address);
}

static void note_address(choir_http *h, const char *address, int fd)
{
    struct sockaddr_storage at = {0};
    socklen_t bytes = sizeof at;
    char port[16] = "0";
    (void)getsockname(fd, (struct sockaddr *)&at, &bytes);
    (void)getnameinfo((struct sockaddr *)&at, bytes, NULL, 0, port, sizeof port, NI_NUMERICSERV);
    snprintf(h->address, sizeof h->address, "%.*s:%s", (int)(strrchr(address, ':') - address),
             address, port);
}

static choir_status no_memory(void)
{
    return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the HTTP side");
}

static choir_status listen_on(choir_http *h, const char *address)
{
    int fd;
    CHOIR_TRY(bind_to(address, &fd));
    note_address(h, address, fd);
    /* A backlog of 0: it listens already. */
    h->listener = evconnlistener_new(h->base, NULL, NULL,
                                     LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, 0, fd);
    if (h->listener == NULL) {
        close(fd);
        return no_memory();
    }
    if (evhttp_bind_listener(h->http, h->listener) != NULL) return CHOIR_OK;
    evconnlistener_free(h->listener);
    return no_memory();
}

static void on_stop(evutil_socket_t fd, short what, void *http)
{
    (void)fd, (void)what;
    event_base_loopbreak(((choir_http *)http)->base);
}

static choir_status make_events(choir_http *h)
{
    const struct timeval every = {.tv_usec = SWEEP_MS * 1000};
    h->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (h->stop_fd < 0) return choir_fail(CHOIR_E_IO, "eventfd: %m");
    h->sweep = event_new(h->base, -1, EV_PERSIST, on_sweep, h);
    h->room = event_new(h->base, -1, 0, on_room, h);
    h->stop = event_new(h->base, h->stop_fd, EV_READ, on_stop, h);
    if (h->sweep == NULL || h->room == NULL || h->stop == NULL ||
        event_add(h->sweep, &every) != 0 || event_add(h->stop, NULL) != 0)
        return no_memory();
    return CHOIR_OK;
}

static choir_status make_http(choir_http *h)
{
    const choir_server_options *o = &h->server->options;
    h->http = evhttp_new(h->base);
    if (h->http == NULL) return no_memory();
    evhttp_set_max_headers_size(h->http, o->max_metadata_bytes);
    evhttp_set_max_body_size(h->http, MAX_BODY_BYTES);
    /* All that libevent knows, so that we say 405 where it would say 501. */
    evhttp_set_allowed_methods(h->http, EVHTTP_REQ_GET | EVHTTP_REQ_HEAD | EVHTTP_REQ_POST |
                                            EVHTTP_REQ_PUT | EVHTTP_REQ_DELETE |
                                            EVHTTP_REQ_OPTIONS | EVHTTP_REQ_TRACE |
                                            EVHTTP_REQ_CONNECT | EVHTTP_REQ_PATCH);
    evhttp_set_gencb(h->http, on_request, h);
    evhttp_set_bevcb(h->http, on_connect, h);
    return CHOIR_OK;
}

/* libevent's warnings are about peers that left: of no use to an operator. */
static void log_line(int severity, const char *line)
{
    choir_log(severity == EVENT_LOG_ERR ? CHOIR_LOG_ERROR : CHOIR_LOG_DEBUG, "http: %s", line);
}

static void on_fatal(int error)
{
    (void)error;
    CHOIR_ASSERT(!"libevent can go on");
}

static void *run(void *http)
{
    event_base_dispatch(((choir_http *)http)->base);
    return NULL;
}

static choir_status fill(choir_http *h)
{
    event_set_log_callback(log_line);
    event_set_fatal_callback(on_fatal);
    h->n_slots = h->server->options.http_max_connections;
    h->peers = choir_calloc(CHOIR_MEM_SERVER, h->n_slots, sizeof *h->peers);
    h->base = event_base_new();
    if (h->peers == NULL || h->base == NULL) return no_memory();
    CHOIR_TRY(make_http(h));
    CHOIR_TRY(make_events(h));
    CHOIR_TRY(listen_on(h, h->server->options.http));
    CHOIR_TRY(choir_thread_start(&h->thread, "choir-http", run, h));
    h->started = true;
    return CHOIR_OK;
}

choir_status choir_http_start(choir_server *server, choir_http **out)
{
    choir_http *h = choir_calloc(CHOIR_MEM_SERVER, 1, sizeof *h);
    if (h == NULL) return no_memory();
    h->server = server;
    h->stop_fd = -1;
    choir_status status = fill(h);
    if (status != CHOIR_OK) {
        choir_http_stop(h);
        return status;
    }
    *out = h;
    return CHOIR_OK;
}

void choir_http_stop(choir_http *h)
{
    if (h == NULL) return;
    if (h->started) {
        CHOIR_ASSERT(eventfd_write(h->stop_fd, 1) == 0);
        pthread_join(h->thread, NULL);
    }
    if (h->http != NULL) evhttp_free(h->http); /* the listener and all connections with it */
    if (h->peers != NULL) reap(h);
    CHOIR_ASSERT(h->n_peers == 0);
    for (int i = 0; i < 2; i++)
        if (h->texts[i] != NULL) evbuffer_free(h->texts[i]);
    if (h->sweep != NULL) event_free(h->sweep);
    if (h->room != NULL) event_free(h->room);
    if (h->stop != NULL) event_free(h->stop);
    if (h->base != NULL) event_base_free(h->base);
    if (h->stop_fd >= 0) close(h->stop_fd);
    choir_free(h->peers);
    choir_free(h);
}

const char *choir_http_address(const choir_http *h)
{
    return h->address;
}
