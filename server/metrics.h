/* WHAT    What /metrics says: the numbers of server/stats.h in Prometheus' text format 0.0.4.
 * OWNS    Nothing.
 * THREADS Any: only what schedulers published is read.
 * ERRORS  CHOIR_E_NO_MEMORY; `out` then has a part.
 * LIMITS  Some 20 KiB, and 60 bytes more an expert of each layer when heat is wanted.
 * NEXT    server/http.h, docs/monitoring.md */
#pragma once
#include "server/server.h"
#include <event2/buffer.h>

choir_status choir_metrics_write(choir_server *server, bool with_heat,
                                 struct evbuffer *out) CHOIR_MUST_USE;
