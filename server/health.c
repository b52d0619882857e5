/* grpc.health.v1: one status per service name. The watch thread writes them; Check reads them; a
 * Watch call is sent each change, of which it may miss those that passed while a write was in
 * flight. */
#include "server/call.h"

#include "proto/proto.h"
#include "server/message.h"

#include <string.h>

enum {
    SERVING = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING,
    NOT_SERVING = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING,
    SERVICE_UNKNOWN = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN,
};

static choir_status add(choir_server *server, const char *service, int model)
{
    if (server->n_health == CHOIR_SERVER_MAX_NAMES)
        return choir_fail(CHOIR_E_INVALID, "more than %d served names", CHOIR_SERVER_MAX_NAMES - 2);
    choir_health *h = &server->health[server->n_health++];
    h->service = service;
    h->model = model;
    atomic_init(&h->status, NOT_SERVING);
    return CHOIR_OK;
}

choir_status choir_health_create(choir_server *server)
{
    CHOIR_TRY(add(server, "", -1));
    CHOIR_TRY(add(server, "choir.v1.Choir", -1));
    for (uint32_t i = 0; i < server->n_models; i++) {
        const choir_server_model *m = &server->models[i];
        CHOIR_TRY(add(server, m->name, (int)i));
        for (uint32_t k = 0; k < m->n_aliases; k++) CHOIR_TRY(add(server, m->aliases[k], (int)i));
    }
    return CHOIR_OK;
}

static int find(const choir_server *server, const char *service)
{
    for (uint32_t i = 0; i < server->n_health; i++)
        if (strcmp(server->health[i].service, service) == 0) return (int)i;
    return -1;
}

void choir_health_update(choir_server *server, const bool *model_healthy)
{
    bool all = atomic_load(&server->phase) == CHOIR_PHASE_SERVING, changed = false;
    bool open = all;
    for (uint32_t i = 0; i < server->n_models; i++) all = all && model_healthy[i];
    for (uint32_t i = 0; i < server->n_health; i++) {
        choir_health *h = &server->health[i];
        bool serving = h->model < 0 ? all : open && model_healthy[h->model];
        int status = serving ? SERVING : NOT_SERVING;
        /* Pairs with the loads in pump and check; the wake below makes watchers look again. */
        if (atomic_exchange(&h->status, status) == status) continue;
        changed = true;
        if (h->service[0] == '\0')
            choir_log(serving || !open ? CHOIR_LOG_INFO : CHOIR_LOG_WARNING, "health: %s",
                      serving ? "SERVING" : "NOT_SERVING");
    }
    if (!changed) return;
    pthread_mutex_lock(&server->calls_lock);
    for (choir_call *call = server->calls; call != NULL; call = call->next)
        if (call->method->pump == choir_health_pump) choir_call_wake(call);
    pthread_mutex_unlock(&server->calls_lock);
}

bool choir_health_serving(const choir_server *server)
{
    return atomic_load(&server->health[0].status) == SERVING; /* that of "" */
}

static choir_status read_request(choir_call *call, Grpc__Health__V1__HealthCheckRequest **out)
{
    static const choir_wire_rule rules[] = {
        {&grpc__health__v1__health_check_request__descriptor, "service", 0, 256}};
    return choir_message_read(&grpc__health__v1__health_check_request__descriptor, rules, 1,
                              call->data, call->bytes, (ProtobufCMessage **)out);
}

static grpc_slice pack(int status)
{
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)status;
    return choir_message_pack(&response.base);
}

void choir_health_prepare_check(choir_call *call)
{
    Grpc__Health__V1__HealthCheckRequest *request = NULL;
    choir_status status = read_request(call, &request);
    int index = -1;
    if (status == CHOIR_OK && (index = find(call->server, request->service)) < 0)
        status =
            choir_fail(CHOIR_E_NOT_FOUND, "no service \"%s\" is served here", request->service);
    choir_message_free((ProtobufCMessage *)request);
    if (status != CHOIR_OK) {
        choir_call_fail(call, status);
        return;
    }
    pthread_mutex_lock(&call->lock);
    choir_call_reply(call, pack(atomic_load(&call->server->health[index].status)));
    pthread_mutex_unlock(&call->lock);
}

/* An unknown service may come to be known later, says the protocol; here names never change, and
 * the watcher is told SERVICE_UNKNOWN once. */
void choir_health_prepare_watch(choir_call *call)
{
    Grpc__Health__V1__HealthCheckRequest *request = NULL;
    choir_status status = read_request(call, &request);
    if (status != CHOIR_OK) {
        choir_call_fail(call, status);
        return;
    }
    pthread_mutex_lock(&call->lock);
    call->watched = find(call->server, request->service);
    call->watching = true;
    choir_health_pump(call);
    pthread_mutex_unlock(&call->lock);
    choir_message_free((ProtobufCMessage *)request);
}

void choir_health_pump(choir_call *call)
{
    if (!call->watching || call->sending || call->finishing || call->cancelled) return;
    int now = call->watched < 0 ? SERVICE_UNKNOWN
                                : atomic_load(&call->server->health[call->watched].status);
    if (now == call->watch_sent) return;
    call->watch_sent = now;
    choir_call_send(call, pack(now));
}
