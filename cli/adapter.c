/* The adapters of a running server: what there is, one more, one less. */
#include "cli/answer.h"

#include <stdio.h>
#include <string.h>

typedef struct values {
    choir_cli_server_values server;
    const char *model;
    bool pin, replace, json;
} values;
static const values defaults = {.server = {.target = "127.0.0.1:50051"}};
static const choir_option options[] = {
    {"model", 'm', CHOIR_OPTION_TEXT, offsetof(values, model), "NAME",
     "whose adapters, if the server has several models", 0, 0},
    {"pin", 0, CHOIR_OPTION_FLAG, offsetof(values, pin), NULL,
     "load: it stays in memory until it is unloaded", 0, 0},
    {"replace", 0, CHOIR_OPTION_FLAG, offsetof(values, replace), NULL,
     "load: other weights may take the name over; running requests keep the old ones", 0, 0},
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL, "list: an array, load: an object",
     0, 0},
    CHOIR_CLI_SERVER_OPTIONS(values, server),
};

static const char *state_text(Choir__V1__AdapterState state)
{
    static const char *const texts[] = {"?",        "registered", "loading",
                                        "resident", "failed",     "quarantined"};
    return (size_t)state < sizeof texts / sizeof *texts ? texts[state] : texts[0];
}

static json_t *adapter_json(const Choir__V1__Adapter *a)
{
    json_t *targets = json_array();
    for (size_t i = 0; i < a->n_targets; i++)
        json_array_append_new(targets, json_string(a->targets[i]));
    json_t *o = json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:I, s:s, s:I, s:o, s:I, s:I, s:I, s:b, s:I, s:I, s:I, s:f}",
        "name", a->name, "model", a->model, "state", state_text(a->state), "kind", a->kind, "type",
        a->type, "version", (json_int_t)a->version, "digest", a->digest, "rank",
        (json_int_t)a->rank, "targets", targets, "parameters", (json_int_t)a->parameters, "bytes",
        (json_int_t)a->bytes, "file_bytes", (json_int_t)a->file_bytes, "pinned", (int)a->pinned,
        "requests", (json_int_t)a->requests, "in_use", (json_int_t)a->in_use, "waits",
        (json_int_t)a->waits, "wait_ms", a->wait_ms);
    json_t *more =
        json_pack("{s:I, s:I, s:I, s:b, s:s}", "loads", (json_int_t)a->loads, "evictions",
                  (json_int_t)a->evictions, "virtual_tokens", (json_int_t)a->virtual_tokens,
                  "activated", (int)a->activated, "error", a->error);
    json_object_update(o, more);
    json_decref(more);
    return o;
}

/* A line of the list; the widest name decides where the next column begins. */
static void print_line(const Choir__V1__Adapter *a, int width)
{
    char bytes[16];
    printf("%-*s  %-11s  %-14s  %5u  %9s  %7llu  %8llu  %6u  %5llu%s%s%s\n", width, a->name,
           state_text(a->state), a->kind, a->rank, choir_format_bytes(a->bytes, bytes),
           (unsigned long long)a->version, (unsigned long long)a->requests, a->in_use,
           (unsigned long long)a->waits, a->pinned ? "  pinned" : "",
           a->error[0] != '\0' ? "  " : "", a->error);
}

/* --- list */

typedef struct listing {
    choir_client *client;
    ProtobufCMessage **pages; /* ListAdaptersResponse each */
    size_t n_pages;
} listing;

static choir_status add_page(listing *l, const Choir__V1__ListAdaptersRequest *request,
                             const Choir__V1__ListAdaptersResponse **out)
{
    ProtobufCMessage **grown =
        choir_realloc(CHOIR_MEM_OTHER, l->pages, (l->n_pages + 1) * sizeof(ProtobufCMessage *));
    if (grown == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the list");
    l->pages = grown;
    CHOIR_TRY(choir_client_call(l->client, "/choir.v1.Choir/ListAdapters", &request->base,
                                &choir__v1__list_adapters_response__descriptor,
                                &l->pages[l->n_pages]));
    *out = (const Choir__V1__ListAdaptersResponse *)l->pages[l->n_pages++];
    return CHOIR_OK;
}

/* All pages of one model's list. */
static choir_status list_model(listing *l, const char *model)
{
    Choir__V1__ListAdaptersRequest request = CHOIR__V1__LIST_ADAPTERS_REQUEST__INIT;
    request.model = (char *)model;
    for (;;) {
        const Choir__V1__ListAdaptersResponse *page;
        CHOIR_TRY(add_page(l, &request, &page));
        if (!page->more || page->n_adapters == 0) return CHOIR_OK;
        request.after = page->adapters[page->n_adapters - 1]->name;
    }
}

static choir_status list_all(listing *l, const char *model)
{
    const Choir__V1__ListModelsRequest request = CHOIR__V1__LIST_MODELS_REQUEST__INIT;
    ProtobufCMessage *answer;
    if (model != NULL) return list_model(l, model);
    CHOIR_TRY(choir_client_call(l->client, "/choir.v1.Choir/ListModels", &request.base,
                                &choir__v1__list_models_response__descriptor, &answer));
    const Choir__V1__ListModelsResponse *models = (const Choir__V1__ListModelsResponse *)answer;
    choir_status status = CHOIR_OK;
    for (size_t i = 0; i < models->n_models && status == CHOIR_OK; i++)
        status = list_model(l, models->models[i]->name);
    protobuf_c_message_free_unpacked(answer, NULL);
    return status;
}

static void print_json_list(const listing *l)
{
    json_t *list = json_array();
    for (size_t p = 0; p < l->n_pages; p++) {
        const Choir__V1__ListAdaptersResponse *page =
            (const Choir__V1__ListAdaptersResponse *)l->pages[p];
        for (size_t i = 0; i < page->n_adapters; i++)
            json_array_append_new(list, adapter_json(page->adapters[i]));
    }
    choir_cli_print_json(list, true);
}

static void print_list(const listing *l)
{
    int width = 4;
    size_t n = 0;
    for (int pass = 0; pass < 2; pass++)
        for (size_t p = 0; p < l->n_pages; p++) {
            const Choir__V1__ListAdaptersResponse *page =
                (const Choir__V1__ListAdaptersResponse *)l->pages[p];
            for (size_t i = 0; i < page->n_adapters; i++) {
                const Choir__V1__Adapter *a = page->adapters[i];
                if (pass == 0 && (int)strlen(a->name) > width) width = (int)strlen(a->name);
                if (pass == 1 && n++ == 0)
                    printf("%-*s  %-11s  %-14s  %5s  %9s  %7s  %8s  %6s  %5s\n", width, "name",
                           "state", "kind", "rank", "memory", "version", "requests", "in use",
                           "waits");
                if (pass == 1) print_line(a, width);
            }
        }
    if (n == 0) puts("no adapters");
}

static choir_status list(const values *v, choir_client *client)
{
    listing l = {.client = client};
    choir_status status = list_all(&l, v->model);
    if (status == CHOIR_OK) (v->json ? print_json_list : print_list)(&l);
    for (size_t i = 0; i < l.n_pages; i++) protobuf_c_message_free_unpacked(l.pages[i], NULL);
    choir_free(l.pages);
    return status;
}

/* --- load, unload */

static choir_status load(const values *v, choir_client *client, const char *name, const char *path)
{
    Choir__V1__LoadAdapterRequest request = CHOIR__V1__LOAD_ADAPTER_REQUEST__INIT;
    ProtobufCMessage *answer;
    char bytes[16];
    request.name = (char *)name;
    if (path != NULL) request.path = (char *)path;
    if (v->model != NULL) request.model = (char *)v->model;
    request.pin = v->pin;
    request.replace = v->replace;
    CHOIR_TRY(choir_client_call(client, "/choir.v1.Choir/LoadAdapter", &request.base,
                                &choir__v1__load_adapter_response__descriptor, &answer));
    const Choir__V1__LoadAdapterResponse *r = (const Choir__V1__LoadAdapterResponse *)answer;
    const Choir__V1__Adapter *a = r->adapter;
    if (a == NULL) {
        protobuf_c_message_free_unpacked(answer, NULL);
        return choir_fail(CHOIR_E_FORMAT, "%s: the server's answer lacks the adapter",
                          v->server.target);
    }
    if (v->json) {
        json_t *o = adapter_json(a);
        json_object_set_new(o, "changed", json_boolean(r->changed));
        choir_cli_print_json(o, true);
    } else {
        printf("%s: %s of rank %u, %s of memory, version %llu%s\n", a->name, a->kind, a->rank,
               choir_format_bytes(a->bytes, bytes), (unsigned long long)a->version,
               r->changed ? "" : " as before");
    }
    protobuf_c_message_free_unpacked(answer, NULL);
    return CHOIR_OK;
}

static choir_status unload(const values *v, choir_client *client, const char *name)
{
    Choir__V1__UnloadAdapterRequest request = CHOIR__V1__UNLOAD_ADAPTER_REQUEST__INIT;
    ProtobufCMessage *answer;
    request.name = (char *)name;
    if (v->model != NULL) request.model = (char *)v->model;
    CHOIR_TRY(choir_client_call(client, "/choir.v1.Choir/UnloadAdapter", &request.base,
                                &choir__v1__unload_adapter_response__descriptor, &answer));
    protobuf_c_message_free_unpacked(answer, NULL);
    if (v->json)
        choir_cli_print_json(json_pack("{s:s}", "unloaded", name), false);
    else
        printf("%s: unloaded\n", name);
    return CHOIR_OK;
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    const char *const *words = arguments->positional;
    choir_client *client;
    choir_cli_catch_interrupts();
    CHOIR_TRY(choir_cli_client(&v->server, &client));
    choir_status status;
    if (strcmp(words[0], "list") == 0)
        status = list(v, client);
    else if (strcmp(words[0], "load") == 0)
        status = load(v, client, words[1], arguments->n_positional > 2 ? words[2] : NULL);
    else
        status = unload(v, client, words[1]);
    choir_client_destroy(client);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    static const struct {
        const char *name;
        uint32_t least, most;
        const char *usage;
    } actions[] = {{"list", 1, 1, "list"},
                   {"load", 2, 3, "load NAME [PATH]"},
                   {"unload", 2, 2, "unload NAME"}};
    const values *v = verb_values;
    const char *action = arguments->positional[0];
    uint32_t n = arguments->n_positional;
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        if (strcmp(actions[i].name, action) != 0) continue;
        if (n < actions[i].least || n > actions[i].most)
            return choir_fail(CHOIR_E_INVALID, "usage: choir adapter %s", actions[i].usage);
        if (i != 1 && (v->pin || v->replace))
            return choir_fail(CHOIR_E_INVALID, "--pin and --replace go with load");
        return CHOIR_OK;
    }
    return choir_fail(CHOIR_E_INVALID, "'%.40s' is not list, load or unload", action);
}

const choir_verb choir_verb_adapter = {
    .name = "adapter",
    .arguments = "list | load NAME [PATH] | unload NAME  [--server HOST:PORT] [--json]",
    .summary = "a running server's adapters: lists them, loads one from its folder, forgets one",
    .example = "choir adapter load french --server 127.0.0.1:50051",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 3,
    .check = check,
    .run = run,
};
