#include "server/metrics.h"

#include "server/call.h"
#include "server/stats.h"
#include "server/wire.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Bounds of the histogram: 2^(i+1) eighths of a microsecond, 16 us to 17 s; what lies outside is in
 * the first bucket and in +Inf. */
enum { FIRST_BUCKET = 6, LAST_BUCKET = 26 };

typedef struct writer {
    choir_server *server;
    struct evbuffer *out;
    choir_scheduler_stats *stats; /* [n_models] */
    bool failed;
} writer;

static void put(writer *w, const char *format, ...) CHOIR_PRINTF(2, 3);

static void put(writer *w, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    w->failed |= evbuffer_add_vprintf(w->out, format, values) < 0;
    va_end(values);
}

static void put_bytes(writer *w, const char *bytes, size_t n)
{
    w->failed |= evbuffer_add(w->out, bytes, n) != 0;
}

/* One value that is not UTF-8 would cost the reader the whole text. */
static void put_label_value(writer *w, const char *text)
{
    if (!choir_utf8_valid(text, strlen(text))) text = "(not UTF-8)";
    for (; *text != '\0'; text++) {
        if (*text == '\n')
            put_bytes(w, "\\n", 2);
        else if (*text == '\\' || *text == '"')
            put(w, "\\%c", *text);
        else
            put_bytes(w, text, 1);
    }
}

/* Further labels may follow, then the brace. */
static void open_labels(writer *w, const char *name, const char *suffix, const char *label,
                        const char *value)
{
    put(w, "%s%s{%s=\"", name, suffix, label);
    put_label_value(w, value);
    put_bytes(w, "\"", 1);
}

static void add_label(writer *w, const char *label, const char *value)
{
    put(w, ",%s=\"", label);
    put_label_value(w, value);
    put_bytes(w, "\"", 1);
}

static void put_head(writer *w, const char *name, const char *type, const char *help)
{
    put(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void put_seconds(writer *w, uint64_t ns)
{
    put(w, "%" PRIu64 ".%09" PRIu64, ns / CHOIR_SECOND, ns % CHOIR_SECOND);
}

static void put_value(writer *w, const choir_number *number, const void *from_struct)
{
    const char *from = (const char *)from_struct + number->from.offset;
    switch (number->from.type) {
    case CHOIR_NUMBER_U32:
        put(w, "%" PRIu32, *(const uint32_t *)from);
        break;
    case CHOIR_NUMBER_U64:
        if (number->is_ns)
            put_seconds(w, *(const uint64_t *)from);
        else
            put(w, "%" PRIu64, *(const uint64_t *)from);
        break;
    case CHOIR_NUMBER_BOOL:
        put(w, "%d", *(const bool *)from);
        break;
    case CHOIR_NUMBER_WIRE_BOOL:
        put(w, "%d", *(const protobuf_c_boolean *)from != 0);
        break;
    case CHOIR_NUMBER_DOUBLE:
        put(w, "%.9g", *(const double *)from);
        break;
    case CHOIR_NUMBER_NONE:
        CHOIR_ASSERT(false);
    }
    put_bytes(w, "\n", 1);
}

static void put_number_head(writer *w, const choir_number *number)
{
    put_head(w, number->name, number->kind == CHOIR_METRIC_COUNTER ? "counter" : "gauge",
             number->help);
}

static void put_server(writer *w)
{
    Choir__V1__ServerStats s;
    choir_stats_fill_server(w->server, &s);
    put_head(w, "choir_build_info", "gauge", "Which Choir this is.");
    open_labels(w, "choir_build_info", "", "version", s.version);
    put(w, "} 1\n");
    for (size_t i = 0; i < choir_server_numbers.n; i++) {
        const choir_number *number = &choir_server_numbers.at[i];
        put_number_head(w, number);
        put(w, "%s ", number->name);
        put_value(w, number, &s);
    }
    put_head(w, "choir_memory_bytes", "gauge", "Memory that was asked for, by what it is for.");
    for (int i = 0; i < CHOIR_MEM_N_TAGS; i++) {
        open_labels(w, "choir_memory_bytes", "", "what",
                    choir_memory_tag_text((choir_memory_tag)i));
        put(w, "} %zu\n", choir_memory_bytes((choir_memory_tag)i));
    }
}

/* Which models have the numbers. */
static bool all_models(const writer *w, uint32_t m)
{
    (void)w, (void)m;
    return true;
}

static bool streams(const writer *w, uint32_t m)
{
    return w->stats[m].experts.streamed;
}

static bool takes_adapters(const writer *w, uint32_t m)
{
    return choir_scheduler_adapters(w->server->models[m].scheduler) != NULL;
}

static bool any_model(const writer *w, bool (*has)(const writer *w, uint32_t m))
{
    uint32_t m = 0;
    while (m < w->server->n_models && !has(w, m)) m++;
    return m < w->server->n_models;
}

static void put_models(writer *w, choir_numbers numbers, bool (*has)(const writer *w, uint32_t m))
{
    if (!any_model(w, has)) return;
    for (size_t i = 0; i < numbers.n; i++) {
        const choir_number *number = &numbers.at[i];
        put_number_head(w, number);
        for (uint32_t m = 0; m < w->server->n_models; m++) {
            if (!has(w, m)) continue;
            open_labels(w, number->name, "", "model", w->server->models[m].name);
            put_bytes(w, "} ", 2);
            put_value(w, number, &w->stats[m]);
        }
    }
}

static void put_backend(writer *w, const char *model, const choir_experts_stats *x)
{
    open_labels(w, "choir_expert_streaming_info", "", "model", model);
    add_label(w, "io", x->io);
    add_label(w, "policy", x->policy);
    put(w, "} 1\n");
}

static void put_latency(writer *w, const char *model, const choir_experts_stats *x)
{
    static const char name[] = "choir_expert_read_latency_seconds";
    uint64_t below = 0, n = 0;
    for (int i = 0; i < CHOIR_LATENCY_BUCKETS; i++) n += x->latency[i];
    for (int i = 0; i <= LAST_BUCKET; i++) {
        below += x->latency[i];
        if (i < FIRST_BUCKET) continue;
        open_labels(w, name, "_bucket", "model", model);
        put(w, ",le=\"%.9g\"} %" PRIu64 "\n", ldexp(1, i + 1) / 8e6, below);
    }
    open_labels(w, name, "_bucket", "model", model);
    put(w, ",le=\"+Inf\"} %" PRIu64 "\n", n);
    open_labels(w, name, "_sum", "model", model);
    put_bytes(w, "} ", 2);
    put_seconds(w, x->latency_ns);
    put_bytes(w, "\n", 1);
    open_labels(w, name, "_count", "model", model);
    put(w, "} %" PRIu64 "\n", n);
}

static void put_heat(writer *w, const choir_server_model *model)
{
    Choir__V1__ExpertStats experts = CHOIR__V1__EXPERT_STATS__INIT;
    void *block = choir_stats_fill_heat(model, &experts);
    w->failed |= block == NULL && choir_scheduler_get_expert_heat(model->scheduler, NULL) > 0;
    for (size_t l = 0; l < experts.n_heat; l++) {
        const Choir__V1__LayerHeat *h = experts.heat[l];
        for (size_t i = 0; i < h->n_experts; i++) {
            open_labels(w, "choir_expert_heat", "", "model", model->name);
            put(w, ",layer=\"%" PRIu32 "\",expert=\"%zu\"} %.6g\n", h->layer, i,
                (double)h->experts[i]);
        }
    }
    choir_free(block);
}

/* Of a metric all lines stand together, so each goes over the models on its own. */
static void put_experts(writer *w, bool with_heat)
{
    const choir_server *s = w->server;
    if (!any_model(w, streams)) return;
    put_models(w, choir_expert_numbers, streams);
    put_head(w, "choir_expert_streaming_info", "gauge",
             "How experts are read, and who is evicted.");
    for (uint32_t m = 0; m < s->n_models; m++)
        if (w->stats[m].experts.streamed) put_backend(w, s->models[m].name, &w->stats[m].experts);
    put_head(w, "choir_expert_read_latency_seconds", "histogram",
             "Time from the first read of an expert to its last byte.");
    for (uint32_t m = 0; m < s->n_models; m++)
        if (w->stats[m].experts.streamed) put_latency(w, s->models[m].name, &w->stats[m].experts);
    if (!with_heat) return;
    put_head(w, "choir_expert_heat", "gauge",
             "Uses of an expert, aged: half as much after 64 steps.");
    for (uint32_t m = 0; m < s->n_models; m++)
        if (w->stats[m].experts.streamed) put_heat(w, &s->models[m]);
}

choir_status choir_metrics_write(choir_server *server, bool with_heat, struct evbuffer *out)
{
    writer w = {.server = server, .out = out};
    w.stats = choir_calloc(CHOIR_MEM_SERVER, server->n_models, sizeof *w.stats);
    if (w.stats == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the metrics");
    for (uint32_t m = 0; m < server->n_models; m++)
        choir_scheduler_get_stats(server->models[m].scheduler, &w.stats[m]);
    put_server(&w);
    put_models(&w, choir_model_numbers, all_models);
    put_models(&w, choir_adapter_numbers, takes_adapters);
    put_experts(&w, with_heat);
    choir_free(w.stats);
    return w.failed ? choir_fail(CHOIR_E_NO_MEMORY, "no memory for the metrics") : CHOIR_OK;
}
