/* LoadAdapter, UnloadAdapter, ListAdapters: the pool's registry over gRPC. A load waits for the
 * disk, so it runs on the slow thread; the other two never wait. */
#include "server/call.h"

#include "proto/proto.h"
#include "server/message.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum {
    MAX_LIST = 1024,  /* of one answer, so that it fits into gRPC's usual 4 MiB */
    MAX_LOAD_S = 120, /* a disk that takes longer keeps others from loading */
    MAX_TARGETS = 64, /* choir_adapter_facts has a bit for each */
    TARGET_BYTES = 32,
};

typedef struct adapter_entry {
    Choir__V1__Adapter message;
    char digest[17];
    char *targets[MAX_TARGETS], texts[MAX_TARGETS][TARGET_BYTES];
} adapter_entry;

static choir_status find_pool(const choir_server *server, const char *name,
                              const choir_server_model **model, choir_adapters **pool)
{
    CHOIR_TRY(choir_server_find_model(server, name, model));
    *pool = choir_scheduler_adapters((*model)->scheduler);
    if (*pool != NULL) return CHOIR_OK;
    return choir_fail(CHOIR_E_PRECONDITION,
                      "model %s takes no adapters: its server was started without --adapters",
                      (*model)->name);
}

static Choir__V1__AdapterState state_of(const char *text)
{
    static const struct {
        const char *text;
        Choir__V1__AdapterState state;
    } states[] = {{"registered", CHOIR__V1__ADAPTER_STATE__REGISTERED},
                  {"loading", CHOIR__V1__ADAPTER_STATE__LOADING},
                  {"resident", CHOIR__V1__ADAPTER_STATE__RESIDENT},
                  {"failed", CHOIR__V1__ADAPTER_STATE__FAILED},
                  {"quarantined", CHOIR__V1__ADAPTER_STATE__QUARANTINED}};
    for (size_t i = 0; i < sizeof states / sizeof *states; i++)
        if (strcmp(states[i].text, text) == 0) return states[i].state;
    return CHOIR__V1__ADAPTER_STATE__ADAPTER_STATE_UNSPECIFIED;
}

/* The roles' names as GGUF would write them, in small letters. */
static void fill_targets(uint64_t bits, adapter_entry *to)
{
    for (int role = 0; role < CHOIR_N_ROLES && role < MAX_TARGETS; role++) {
        if ((bits >> role & 1) == 0) continue;
        size_t n = to->message.n_targets++;
        const char *from = choir_role_text((choir_role)role);
        for (size_t i = 0; i + 1 < TARGET_BYTES && from[i] != '\0'; i++)
            to->texts[n][i] = (char)tolower((unsigned char)from[i]);
        to->targets[n] = to->texts[n];
    }
    to->message.targets = to->targets;
}

static void fill_adapter(const choir_server_model *model, const choir_adapter_info *from,
                         adapter_entry *to)
{
    memset(to, 0, sizeof *to);
    Choir__V1__Adapter *m = &to->message;
    choir__v1__adapter__init(m);
    if (from->digest != 0) snprintf(to->digest, sizeof to->digest, "%016" PRIx64, from->digest);
    m->name = (char *)from->name;
    m->model = (char *)model->name;
    m->digest = to->digest;
    m->rank = from->facts.max_rank;
    fill_targets(from->facts.targets, to);
    m->bytes = from->resident ? from->bytes : from->facts.bytes;
    m->pinned = from->kept;
    m->quarantined = from->quarantined;
    m->requests = from->n_requests;
    m->state = state_of(from->state);
    m->kind = (char *)from->facts.kind;
    m->type = (char *)choir_adapter_type_text(model->adapter_type);
    m->version = from->version;
    m->error = from->failure != CHOIR_OK ? (char *)from->why : (char *)"";
    m->in_use = from->n_claims;
    m->waits = from->n_waits;
    m->wait_ms = (double)from->wait_ns / CHOIR_MS;
    m->loads = from->n_loads;
    m->evictions = from->n_evictions;
    m->parameters = from->facts.n_parameters;
    m->file_bytes = from->file_bytes;
    m->virtual_tokens = from->facts.n_virtual;
    m->activated = from->facts.n_invocation > 0;
}

/* --- LoadAdapter */

/* A client that has left while its call stood in the queue wants nothing any more, and a server
 * that has stopped does not begin. */
static bool is_over(void *user)
{
    choir_call *call = user;
    pthread_mutex_lock(&call->lock);
    bool over = call->cancelled || call->finishing;
    pthread_mutex_unlock(&call->lock);
    return over;
}

static choir_status check_load(const Choir__V1__LoadAdapterRequest *request)
{
    if (request->name[0] == '\0')
        return choir_fail(CHOIR_E_INVALID, "name is empty; an adapter's name has 1 to %d bytes",
                          CHOIR_ADAPTER_MAX_NAME);
    CHOIR_TRY(choir_adapters_check_name(request->name));
    return CHOIR_OK;
}

static choir_status load(choir_call *call, const Choir__V1__LoadAdapterRequest *request)
{
    const choir_server_model *model;
    choir_adapters *pool;
    CHOIR_TRY(find_pool(call->server, request->model, &model, &pool));
    CHOIR_TRY(check_load(request));
    uint64_t latest = choir_clock_now() + MAX_LOAD_S * CHOIR_SECOND;
    const choir_adapter_load what = {
        .name = request->name,
        .path = request->path[0] != '\0' ? request->path : request->name,
        .beneath = true,
        .replace = request->replace,
        .keep = request->pin,
        .deadline_ns =
            call->deadline_ns != 0 && call->deadline_ns < latest ? call->deadline_ns : latest,
        .stopped = is_over,
        .user = call,
    };
    choir_adapter_info before, after;
    /* Loads are this thread's alone, so that another version is this call's doing. */
    bool known = choir_adapters_find(pool, request->name, &before) == CHOIR_OK;
    CHOIR_TRY(choir_adapters_load(pool, &what, &after));
    Choir__V1__LoadAdapterResponse response = CHOIR__V1__LOAD_ADAPTER_RESPONSE__INIT;
    adapter_entry entry;
    fill_adapter(model, &after, &entry);
    response.adapter = &entry.message;
    response.changed = !known || before.version != after.version;
    choir_call_answer(call, choir_message_pack(&response.base));
    return CHOIR_OK;
}

void choir_adapters_prepare_load(choir_call *call)
{
    Choir__V1__LoadAdapterRequest *request = NULL;
    if (is_over(call)) return;
    choir_status status =
        choir_call_request(call, &choir__v1__load_adapter_request__descriptor, &request);
    if (status == CHOIR_OK) status = load(call, request);
    choir_message_free((ProtobufCMessage *)request);
    if (status != CHOIR_OK) choir_call_fail(call, status);
}

/* --- UnloadAdapter */

static choir_status unload(choir_call *call, const Choir__V1__UnloadAdapterRequest *request)
{
    const choir_server_model *model;
    choir_adapters *pool;
    CHOIR_TRY(find_pool(call->server, request->model, &model, &pool));
    CHOIR_TRY(choir_adapters_check_name(request->name));
    CHOIR_TRY(choir_adapters_unload(pool, request->name));
    const Choir__V1__UnloadAdapterResponse response = CHOIR__V1__UNLOAD_ADAPTER_RESPONSE__INIT;
    choir_call_answer(call, choir_message_pack(&response.base));
    return CHOIR_OK;
}

void choir_adapters_prepare_unload(choir_call *call)
{
    Choir__V1__UnloadAdapterRequest *request = NULL;
    choir_status status =
        choir_call_request(call, &choir__v1__unload_adapter_request__descriptor, &request);
    if (status == CHOIR_OK) status = unload(call, request);
    choir_message_free((ProtobufCMessage *)request);
    if (status != CHOIR_OK) choir_call_fail(call, status);
}

/* --- ListAdapters */

/* What an answer points to until it is packed. */
typedef struct listing {
    adapter_entry *entries;
    choir_adapter_info *infos;
    Choir__V1__Adapter **list;
    uint32_t room, n;
    bool more;
} listing;

static choir_status make_listing(uint32_t room, listing *out)
{
    *out = (listing){.room = room};
    out->entries = choir_calloc(CHOIR_MEM_REQUESTS, room, sizeof *out->entries);
    out->infos = choir_calloc(CHOIR_MEM_REQUESTS, room, sizeof *out->infos);
    out->list = choir_calloc(CHOIR_MEM_REQUESTS, room, sizeof(Choir__V1__Adapter *));
    return out->entries != NULL && out->infos != NULL && out->list != NULL
               ? CHOIR_OK
               : choir_fail(CHOIR_E_NO_MEMORY, "no memory for a list of %u adapters", room);
}

static void free_listing(listing *l)
{
    choir_free(l->entries);
    choir_free(l->infos);
    choir_free(l->list);
}

static void add_model(const choir_server_model *model, const char *after, uint32_t limit,
                      listing *l)
{
    choir_adapters *pool = choir_scheduler_adapters(model->scheduler);
    if (pool == NULL) return;
    choir_adapter_info *infos = l->infos + l->n;
    uint32_t all = choir_adapters_list(pool, after, infos, limit);
    uint32_t n = all < limit ? all : limit;
    l->more = l->more || all > limit;
    for (uint32_t i = 0; i < n; i++, l->n++) {
        fill_adapter(model, &infos[i], &l->entries[l->n]);
        l->list[l->n] = &l->entries[l->n].message;
    }
}

static choir_status list(choir_call *call, const Choir__V1__ListAdaptersRequest *request)
{
    const choir_server *s = call->server;
    const choir_server_model *only = NULL;
    uint32_t limit = request->limit == 0 || request->limit > MAX_LIST ? MAX_LIST : request->limit;
    if (request->model[0] != '\0' || s->n_models == 1)
        CHOIR_TRY(choir_server_find_model(s, request->model, &only));
    if (only == NULL && request->after[0] != '\0')
        return choir_fail(
            CHOIR_E_INVALID,
            "after is set and model is empty; with several models served it wants one");
    if (only == NULL) limit = limit / s->n_models > 0 ? limit / s->n_models : 1;
    listing l;
    choir_status status = make_listing(only != NULL ? limit : limit * s->n_models, &l);
    if (status == CHOIR_OK) {
        Choir__V1__ListAdaptersResponse response = CHOIR__V1__LIST_ADAPTERS_RESPONSE__INIT;
        for (uint32_t i = 0; i < s->n_models; i++)
            if (only == NULL || only == &s->models[i])
                add_model(&s->models[i], request->after, limit, &l);
        response.n_adapters = l.n;
        response.adapters = l.list;
        response.more = l.more;
        choir_call_answer(call, choir_message_pack(&response.base));
    }
    free_listing(&l);
    return status;
}

void choir_adapters_prepare_list(choir_call *call)
{
    Choir__V1__ListAdaptersRequest *request = NULL;
    choir_status status =
        choir_call_request(call, &choir__v1__list_adapters_request__descriptor, &request);
    if (status == CHOIR_OK) status = list(call, request);
    choir_message_free((ProtobufCMessage *)request);
    if (status != CHOIR_OK) choir_call_fail(call, status);
}
