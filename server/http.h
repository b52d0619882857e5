/* WHAT    HTTP/1.1 for those who watch: /metrics, /healthz, /readyz. Plain, without TLS.
 * OWNS    Its thread, its listener and connections.
 * THREADS start, stop: the server's. The rest is the thread's own; it reads what others publish and
 *         never waits for an engine.
 * ERRORS  start: CHOIR_E_INVALID (the address), CHOIR_E_IO (it cannot be had), CHOIR_E_NO_MEMORY.
 *         To clients: JSON as OpenAI writes it, {"error": {"message", "type", "code"}}; what is no
 *         HTTP is answered by libevent, in HTML.
 * LIMITS  max_metadata_bytes of headers, no body, http_max_connections (the one that was idle
 *         longest makes room), http_request_ms from a request's first byte to the answer's last,
 *         http_idle_ms between requests, so many requests of one connection in a row, so many bytes
 *         of answers that wait for their readers.
 * NEXT    server/metrics.h */
#pragma once
#include "server/server.h"

typedef struct choir_http choir_http;

choir_status choir_http_start(choir_server *server, choir_http **out) CHOIR_MUST_USE;
void choir_http_stop(choir_http *http); /* closes all connections; NULL is fine */
/* HOST:PORT with the real port. */
const char *choir_http_address(const choir_http *http);
