/* WHAT    From a GenerateRequest's bytes to a request the scheduler takes: checked, rendered, tokenized.
 * OWNS    The unpacked message and the arrays it makes; `request` points into them, so it is not moved.
 * THREADS Any; no state is shared.
 * ERRORS  CHOIR_E_INVALID (names the field, the value, the limit), CHOIR_E_NOT_FOUND (model),
 *         CHOIR_E_PRECONDITION (a capability that is not there), CHOIR_E_NO_MEMORY.
 * LIMITS  Those that proto/choir.proto states; counts and lengths are checked before anything is copied.
 * NEXT    server/generate.c */
#pragma once
#include "proto/proto.h"
#include "server/server.h"
#include "server/wire.h"

typedef struct choir_generate_request {
    Choir__V1__GenerateRequest *message;
    const choir_server_model *model;
    char id[129];
    uint32_t *tokens; /* NULL when they lie in the message */
    choir_logit_bias *logit_bias;
    choir_request_adapter adapters[CHOIR_MAX_MIX];
    bool return_routes;
    choir_request request;
} choir_generate_request;

/* Checks and unpacks; nothing is rendered yet. */
choir_status choir_generate_request_read(const uint8_t *data, size_t bytes,
                                         choir_generate_request *out) CHOIR_MUST_USE;
/* Fills `request` for the model: defaults, limits, prompt. `id` is set by the caller if it is
 * empty. */
choir_status choir_generate_request_resolve(choir_generate_request *r,
                                            const choir_server_model *model) CHOIR_MUST_USE;
/* Also after a failure; zeroed is fine. */
void choir_generate_request_free(choir_generate_request *r);

uint32_t choir_server_model_max_tokens(const choir_server_model *model); /* prompt and answer */
/* A chat as the model's template writes it, choir_free()d by the caller. */
choir_status choir_chat_render(const choir_server_model *model, const Choir__V1__Chat *chat,
                               char **text, size_t *bytes) CHOIR_MUST_USE;
/* The bounds of every field of every request of choir.v1. */
extern const choir_wire_rule choir_request_rules[];
extern const size_t choir_n_request_rules;
