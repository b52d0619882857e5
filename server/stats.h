/* WHAT    The numbers that GetStats and /metrics tell, each once: where it comes from, its field of
 *         the protobuf message, its name, unit and meaning for Prometheus.
 * OWNS    Nothing.
 * THREADS Any: only what schedulers published is read.
 * ERRORS  Heat that finds no memory is left out.
 * LIMITS  What is a quotient of these numbers is GetStats' alone; Prometheus divides by itself.
 * NEXT    server/metrics.h, proto/choir.proto (GetStats) */
#pragma once
#include "proto/proto.h"
#include "server/server.h"

typedef enum choir_number_type {
    CHOIR_NUMBER_NONE,
    CHOIR_NUMBER_U32,
    CHOIR_NUMBER_U64,
    CHOIR_NUMBER_BOOL,
    CHOIR_NUMBER_WIRE_BOOL, /* protobuf_c_boolean, an int */
    CHOIR_NUMBER_DOUBLE,
} choir_number_type;

typedef struct choir_member {
    choir_number_type type;
    size_t offset;
} choir_member;

typedef enum choir_metric_kind {
    CHOIR_METRIC_NONE, /* for GetStats alone */
    CHOIR_METRIC_GAUGE,
    CHOIR_METRIC_COUNTER,
} choir_metric_kind;

typedef struct choir_number {
    choir_member from; /* of choir_scheduler_stats, or of Choir__V1__ServerStats */
    choir_member to;   /* of the message; CHOIR_NUMBER_NONE: GetStats has no such field */
    choir_metric_kind kind;
    bool is_ns; /* shown as seconds */
    const char *name, *help;
} choir_number;

typedef struct choir_numbers {
    const choir_number *at;
    size_t n;
} choir_numbers;

extern const choir_numbers choir_model_numbers;  /* to Choir__V1__ModelStats */
extern const choir_numbers choir_expert_numbers; /* to Choir__V1__ExpertStats; where streamed */
extern const choir_numbers choir_adapter_numbers; /* to Choir__V1__AdapterStats; where there are any */
extern const choir_numbers choir_server_numbers; /* from Choir__V1__ServerStats */

/* to->experts is `experts` if the model streams them, to->adapters is `adapters` if it takes any. */
void choir_stats_fill_model(const choir_server_model *model, Choir__V1__ModelStats *to,
                            Choir__V1__ExpertStats *experts, Choir__V1__AdapterStats *adapters);
/* A model's heat, layer by layer; NULL: it streams none, or memory lacks. One block, for
 * choir_free(). */
void *choir_stats_fill_heat(const choir_server_model *model, Choir__V1__ExpertStats *to);
void choir_stats_fill_server(choir_server *server, Choir__V1__ServerStats *to);
