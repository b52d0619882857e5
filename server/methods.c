/* Every method the server knows, in one table, and the unary ones of choir.v1. */
#include "server/call.h"

#include "server/generate_request.h"
#include "server/message.h"
#include "server/stats.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

choir_status choir_call_request(choir_call *call, const ProtobufCMessageDescriptor *type, void *out)
{
    ProtobufCMessage *message;
    CHOIR_TRY(choir_message_read(type, choir_request_rules, choir_n_request_rules, call->data,
                                 call->bytes, &message));
    *(ProtobufCMessage **)out = message;
    return CHOIR_OK;
}

void choir_call_answer(choir_call *call, grpc_slice message)
{
    pthread_mutex_lock(&call->lock);
    choir_call_reply(call, message);
    pthread_mutex_unlock(&call->lock);
}

/* Appends "a", "b", … while they fit. */
static void list_names(const choir_server *server, char *out, size_t room)
{
    size_t n = 0;
    out[0] = '\0';
    for (uint32_t i = 0; i < server->n_models && n < room; i++) {
        int wrote = snprintf(out + n, room - n, "%s%s", i == 0 ? "" : ", ", server->models[i].name);
        n += (size_t)wrote;
    }
}

static bool answers_to(const choir_server_model *model, const char *name)
{
    bool is = strcmp(model->name, name) == 0;
    for (uint32_t i = 0; i < model->n_aliases && !is; i++)
        is = strcmp(model->aliases[i], name) == 0;
    return is;
}

choir_status choir_server_find_model(const choir_server *server, const char *name,
                                     const choir_server_model **out)
{
    char names[512];
    if (name[0] == '\0' && server->n_models == 1) {
        *out = &server->models[0];
        return CHOIR_OK;
    }
    for (uint32_t i = 0; i < server->n_models; i++) {
        *out = &server->models[i];
        if (answers_to(*out, name)) return CHOIR_OK;
    }
    list_names(server, names, sizeof names);
    if (name[0] == '\0')
        return choir_fail(CHOIR_E_INVALID, "model is empty, and several are served: %s", names);
    return choir_fail(CHOIR_E_NOT_FOUND, "model \"%s\" is not served here; there is %s", name,
                      names);
}

/* --- Tokenize, Detokenize */

static choir_status encode(const Choir__V1__TokenizeRequest *request,
                           const choir_server_model *model, uint32_t **ids, size_t *n)
{
    bool is_chat = request->input_case == CHOIR__V1__TOKENIZE_REQUEST__INPUT_CHAT;
    choir_encode_options options = {.add_special = !is_chat, .parse_special = true};
    if (request->_add_special_case != 0) options.add_special = request->add_special;
    if (request->_parse_special_case != 0) options.parse_special = request->parse_special;
    char *rendered = NULL;
    const char *text;
    size_t bytes;
    if (is_chat) {
        CHOIR_TRY(choir_chat_render(model, request->chat, &rendered, &bytes));
        text = rendered;
    } else if (request->input_case == CHOIR__V1__TOKENIZE_REQUEST__INPUT_TEXT) {
        text = request->text;
        bytes = strlen(text);
    } else {
        return choir_fail(CHOIR_E_INVALID, "the request has neither text nor chat: one is due");
    }
    choir_status status = choir_tokenizer_encode(model->tokenizer, text, bytes, options, ids, n);
    choir_free(rendered);
    return status;
}

static choir_status reply_tokens(choir_call *call, const choir_server_model *model, uint32_t *ids,
                                 size_t n, bool with_pieces)
{
    Choir__V1__TokenizeResponse response = CHOIR__V1__TOKENIZE_RESPONSE__INIT;
    ProtobufCBinaryData *pieces = NULL;
    response.n_ids = n;
    response.ids = ids;
    response.max_tokens = choir_server_model_max_tokens(model);
    if (with_pieces) {
        pieces = choir_calloc(CHOIR_MEM_REQUESTS, n, sizeof *pieces);
        if (pieces == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu pieces", n);
        for (size_t i = 0; i < n; i++) {
            pieces[i].data =
                (uint8_t *)choir_tokenizer_piece(model->tokenizer, ids[i], &pieces[i].len);
            if (pieces[i].data == NULL) pieces[i].len = 0;
        }
        response.n_pieces = n;
        response.pieces = pieces;
    }
    choir_call_answer(call, choir_message_pack(&response.base));
    choir_free(pieces);
    return CHOIR_OK;
}

static choir_status tokenize(choir_call *call, const Choir__V1__TokenizeRequest *request)
{
    const choir_server_model *model;
    CHOIR_TRY(choir_server_find_model(call->server, request->model, &model));
    uint32_t *ids;
    size_t n;
    CHOIR_TRY(encode(request, model, &ids, &n));
    choir_status status = reply_tokens(call, model, ids, n, request->with_pieces);
    choir_free(ids);
    return status;
}

static void prepare_tokenize(choir_call *call)
{
    Choir__V1__TokenizeRequest *request = NULL;
    choir_status status = choir_call_request(call, &choir__v1__tokenize_request__descriptor, &request);
    if (status == CHOIR_OK) status = tokenize(call, request);
    choir_message_free((ProtobufCMessage *)request);
    if (status != CHOIR_OK) choir_call_fail(call, status);
}

static choir_status detokenize(choir_call *call, const Choir__V1__DetokenizeRequest *request)
{
    const choir_server_model *model;
    CHOIR_TRY(choir_server_find_model(call->server, request->model, &model));
    for (size_t i = 0; i < request->n_ids; i++)
        if (request->ids[i] >= choir_tokenizer_n_ids(model->tokenizer))
            return choir_fail(CHOIR_E_INVALID, "ids[%zu] is %u; the vocabulary ends at %u", i,
                              request->ids[i], choir_tokenizer_n_ids(model->tokenizer) - 1);
    char *text;
    size_t bytes;
    CHOIR_TRY(choir_tokenizer_decode(model->tokenizer, request->ids, request->n_ids,
                                     request->skip_special_tokens, &text, &bytes));
    Choir__V1__DetokenizeResponse response = CHOIR__V1__DETOKENIZE_RESPONSE__INIT;
    enum { RESPONSE_TEXT = 1 };
    choir_call_answer(call, choir_message_pack_with_text(&response.base, RESPONSE_TEXT, text, bytes));
    choir_free(text);
    return CHOIR_OK;
}

static void prepare_detokenize(choir_call *call)
{
    Choir__V1__DetokenizeRequest *request = NULL;
    choir_status status = choir_call_request(call, &choir__v1__detokenize_request__descriptor, &request);
    if (status == CHOIR_OK) status = detokenize(call, request);
    choir_message_free((ProtobufCMessage *)request);
    if (status != CHOIR_OK) choir_call_fail(call, status);
}

/* --- ListModels */

typedef struct model_entry {
    Choir__V1__Model model;
    Choir__V1__SamplingDefaults defaults;
    char digest[17];
} model_entry;

static void fill_model(const choir_server_model *from, model_entry *to)
{
    const choir_model_config *c = from->config;
    choir_sampling sampling = choir_sampling_of_model(c);
    choir__v1__model__init(&to->model);
    choir__v1__sampling_defaults__init(&to->defaults);
    snprintf(to->digest, sizeof to->digest, "%016llx", (unsigned long long)from->digest);
    to->model.name = (char *)from->name;
    to->model.n_aliases = from->n_aliases;
    to->model.aliases = (char **)from->aliases;
    to->model.digest = to->digest;
    to->model.family = (char *)c->name;
    to->model.max_tokens = choir_server_model_max_tokens(from);
    to->model.vocab = c->vocab;
    to->model.n_layers = c->n_layers;
    to->model.hidden = c->hidden;
    to->model.n_experts = c->n_experts;
    to->model.n_experts_used = c->n_experts_used;
    to->model.tokenizer = (char *)choir_tokenizer_kind(from->tokenizer);
    to->model.chat_template = from->chat_template != NULL;
    to->model.licence = (char *)c->licence;
    to->defaults.temperature = sampling.temperature;
    to->defaults.top_k = sampling.top_k;
    to->defaults.top_p = sampling.top_p;
    to->defaults.repetition_penalty = sampling.repetition_penalty;
    to->model.defaults = &to->defaults;
}

static void prepare_list_models(choir_call *call)
{
    const choir_server *s = call->server;
    Choir__V1__ListModelsResponse response = CHOIR__V1__LIST_MODELS_RESPONSE__INIT;
    model_entry *entries = choir_calloc(CHOIR_MEM_REQUESTS, s->n_models, sizeof *entries);
    Choir__V1__Model *list[CHOIR_SERVER_MAX_MODELS];
    if (entries == NULL) {
        choir_call_fail(call, choir_fail(CHOIR_E_NO_MEMORY, "no memory for the models"));
        return;
    }
    for (uint32_t i = 0; i < s->n_models; i++) {
        fill_model(&s->models[i], &entries[i]);
        list[i] = &entries[i].model;
    }
    response.n_models = s->n_models;
    response.models = list;
    choir_call_answer(call, choir_message_pack(&response.base));
    choir_free(entries);
}

/* --- GetStats */

static void reply_stats(choir_call *call, const choir_server_model *only, bool want_heat)
{
    choir_server *s = call->server;
    Choir__V1__GetStatsResponse response = CHOIR__V1__GET_STATS_RESPONSE__INIT;
    Choir__V1__ServerStats server;
    Choir__V1__ModelStats models[CHOIR_SERVER_MAX_MODELS], *list[CHOIR_SERVER_MAX_MODELS];
    Choir__V1__ExpertStats experts[CHOIR_SERVER_MAX_MODELS];
    Choir__V1__AdapterStats adapters[CHOIR_SERVER_MAX_MODELS];
    void *heat[CHOIR_SERVER_MAX_MODELS] = {NULL};
    Choir__V1__MemoryUse memory[CHOIR_MEM_N_TAGS], *memory_list[CHOIR_MEM_N_TAGS];
    choir_stats_fill_server(s, &server);
    for (uint32_t i = 0; i < s->n_models; i++) {
        if (only != NULL && only != &s->models[i]) continue;
        list[response.n_models] = &models[response.n_models];
        choir_stats_fill_model(&s->models[i], &models[response.n_models++], &experts[i],
                               &adapters[i]);
        if (want_heat && list[response.n_models - 1]->experts != NULL)
            heat[i] = choir_stats_fill_heat(&s->models[i], &experts[i]);
    }
    for (int i = 0; i < CHOIR_MEM_N_TAGS; i++) {
        memory_list[i] = &memory[i];
        choir__v1__memory_use__init(&memory[i]);
        memory[i].what = (char *)choir_memory_tag_text((choir_memory_tag)i);
        memory[i].bytes = choir_memory_bytes((choir_memory_tag)i);
    }
    server.n_memory = CHOIR_MEM_N_TAGS;
    server.memory = memory_list;
    response.models = list;
    response.server = &server;
    choir_call_answer(call, choir_message_pack(&response.base));
    for (uint32_t i = 0; i < s->n_models; i++) choir_free(heat[i]);
}

static void prepare_get_stats(choir_call *call)
{
    Choir__V1__GetStatsRequest *request = NULL;
    const choir_server_model *only = NULL;
    choir_status status = choir_call_request(call, &choir__v1__get_stats_request__descriptor, &request);
    bool want_heat = status == CHOIR_OK && request->expert_heat;
    if (status == CHOIR_OK && request->model[0] != '\0')
        status = choir_server_find_model(call->server, request->model, &only);
    choir_message_free((ProtobufCMessage *)request);
    if (status == CHOIR_OK)
        reply_stats(call, only, want_heat);
    else
        choir_call_fail(call, status);
}

/* --- reflection: one answer a request, then the next request */

static void prepare_reflection(choir_call *call)
{
    uint8_t *answer;
    size_t bytes;
    choir_status status =
        choir_reflection_answer(call->server->reflection, call->data, call->bytes, &answer, &bytes);
    if (status != CHOIR_OK) {
        choir_call_fail(call, status);
        return;
    }
    grpc_slice slice = grpc_slice_from_copied_buffer((const char *)answer, bytes);
    choir_free(answer);
    pthread_mutex_lock(&call->lock);
    call->answering = true;
    choir_call_send(call, slice);
    pthread_mutex_unlock(&call->lock);
}

static void pump_reflection(choir_call *call)
{
    if (call->finishing || call->cancelled) return;
    if (call->half_closed && !call->sending) {
        choir_call_finish(call, CHOIR_OK, "");
    } else if (call->answering) {
        call->answering = false;
        choir_call_receive(call);
    }
}

// clang-format off
#define CHOIR_PATH(name) "/choir.v1.Choir/" name
#define NO_FEEDBACK "feedback is not there yet: this server does not learn from it"
#define NO_ROUTERS  "router versions are not there yet: this server uses the model's own gates"
static const choir_method methods[] = {
    {.path = CHOIR_PATH("Generate"), .generates = true, .parsed = true,
     .prepare = choir_generate_prepare, .pump = choir_generate_pump},
    {.path = CHOIR_PATH("Tokenize"), .parsed = true, .prepare = prepare_tokenize},
    {.path = CHOIR_PATH("Detokenize"), .parsed = true, .prepare = prepare_detokenize},
    {.path = CHOIR_PATH("ListModels"), .prepare = prepare_list_models},
    {.path = CHOIR_PATH("GetStats"), .parsed = true, .prepare = prepare_get_stats},
    {.path = CHOIR_PATH("LoadAdapter"), .slow = true, .prepare = choir_adapters_prepare_load},
    {.path = CHOIR_PATH("UnloadAdapter"), .parsed = true, .prepare = choir_adapters_prepare_unload},
    {.path = CHOIR_PATH("ListAdapters"), .parsed = true, .prepare = choir_adapters_prepare_list},
    {.path = CHOIR_PATH("Feedback"), .missing = NO_FEEDBACK},
    {.path = CHOIR_PATH("ListRouterVersions"), .missing = NO_ROUTERS},
    {.path = CHOIR_PATH("PromoteRouter"), .missing = NO_ROUTERS},
    {.path = CHOIR_PATH("RollbackRouter"), .missing = NO_ROUTERS},
    {.path = CHOIR_PATH("GetRouterStats"), .missing = NO_ROUTERS},
    {.path = "/grpc.health.v1.Health/Check", .open = true, .prepare = choir_health_prepare_check},
    {.path = "/grpc.health.v1.Health/Watch", .open = true, .prepare = choir_health_prepare_watch,
     .pump = choir_health_pump},
    {.path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", .client_stream = true,
     .prepare = prepare_reflection, .pump = pump_reflection},
    {.path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", .client_stream = true,
     .prepare = prepare_reflection, .pump = pump_reflection},
};
static const choir_method unknown = {
    .path = "an unknown method",
    .missing = "there is no such method here; reflection lists those that there are"};
// clang-format on

const choir_method *choir_method_find(const char *path, size_t bytes)
{
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (strlen(methods[i].path) == bytes && memcmp(methods[i].path, path, bytes) == 0)
            return &methods[i];
    return &unknown;
}
