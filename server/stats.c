#include "server/stats.h"

#include "server/call.h"

#ifndef CHOIR_VERSION
#    define CHOIR_VERSION "0"
#endif

// clang-format off
#define TYPE_OF(type, member)                                                                      \
    _Generic(((type *)NULL)->member,                                                               \
        uint32_t: CHOIR_NUMBER_U32, uint64_t: CHOIR_NUMBER_U64, bool: CHOIR_NUMBER_BOOL,           \
        protobuf_c_boolean: CHOIR_NUMBER_WIRE_BOOL, double: CHOIR_NUMBER_DOUBLE)
#define MEMBER(type, member) {TYPE_OF(type, member), offsetof(type, member)}
#define COUNTER CHOIR_METRIC_COUNTER, false
#define SECONDS CHOIR_METRIC_COUNTER, true
#define GAUGE   CHOIR_METRIC_GAUGE, false

#define OWN(from, ...)       {MEMBER(choir_scheduler_stats, from), {0}, __VA_ARGS__}
#define MODEL(from, to, ...) {MEMBER(choir_scheduler_stats, from), MEMBER(Choir__V1__ModelStats, to), __VA_ARGS__}
static const choir_number model_numbers[] = {
    MODEL(healthy, healthy, GAUGE, "choir_healthy",
          "1 while the engine makes progress or has nothing to do."),
    MODEL(n_running, running, GAUGE, "choir_requests_running", "Requests being answered."),
    MODEL(n_waiting, waiting, GAUGE, "choir_requests_waiting", "Requests in the queue."),
    MODEL(n_paused, paused, GAUGE, "choir_requests_paused",
          "Of the running requests, those whose reader is slow."),
    MODEL(n_accepted, accepted, COUNTER, "choir_requests_accepted_total", "Requests taken into the queue."),
    MODEL(n_refused, refused, COUNTER, "choir_requests_refused_total",
          "Requests refused: the queue was full, the server draining, or they could never fit."),
    MODEL(n_done, done, COUNTER, "choir_requests_done_total", "Requests answered to their end."),
    MODEL(n_cancelled, cancelled, COUNTER, "choir_requests_cancelled_total",
          "Requests cancelled by their client, or because it did not read."),
    MODEL(n_expired, expired, COUNTER, "choir_requests_expired_total", "Requests ended by their deadline."),
    MODEL(n_failed, failed, COUNTER, "choir_requests_failed_total", "Requests ended by an error."),
    MODEL(n_preempted, preempted, COUNTER, "choir_preemptions_total",
          "Sequences that gave back their KV pages to others and were computed again."),
    MODEL(n_late, late, COUNTER, "choir_late_sequences_total",
          "Sequences that were sent back a step to wait for an expert."),
    MODEL(n_prompt_tokens, prompt_tokens, COUNTER, "choir_prompt_tokens_total", "Tokens of prompts."),
    MODEL(n_cached_tokens, cached_tokens, COUNTER, "choir_cached_tokens_total",
          "Of the prompts' tokens, those found in the prefix cache."),
    MODEL(n_output_tokens, output_tokens, COUNTER, "choir_output_tokens_total", "Tokens of answers."),
    MODEL(n_pages, kv_pages, GAUGE, "choir_kv_pages", "KV pages."),
    MODEL(n_pages_free, kv_pages_free, GAUGE, "choir_kv_pages_free", "KV pages that nobody holds."),
    MODEL(n_pages_cached, kv_pages_cached, GAUGE, "choir_kv_pages_cached",
          "KV pages that the prefix cache alone holds; free at need."),
    MODEL(n_steps, steps, COUNTER, "choir_steps_total", "Steps of the engine."),
    OWN(rows_total, COUNTER, "choir_step_rows_total",
        "Rows of all steps; over the steps it is the mean batch."),
    OWN(step_ns_total, SECONDS, "choir_step_seconds_total", "Time spent in steps."),
    OWN(last_step_ns, CHOIR_METRIC_GAUGE, true, "choir_last_step_seconds", "Time of the last step."),
};
const choir_numbers choir_model_numbers = {model_numbers, sizeof model_numbers / sizeof *model_numbers};

#define STREAMED(from, to, ...) \
    {MEMBER(choir_scheduler_stats, from), MEMBER(Choir__V1__ExpertStats, to), __VA_ARGS__}
#define EXPERT(from, to, ...) STREAMED(experts.from, to, __VA_ARGS__)
#define EXPERT_OWN(from, ...) OWN(experts.from, __VA_ARGS__)
static const choir_number expert_numbers[] = {
    EXPERT(n_experts, experts, GAUGE, "choir_experts", "Experts of all layers."),
    EXPERT(n_slots, slots, GAUGE, "choir_expert_slots", "Experts that the budget holds."),
    EXPERT(n_slots_used, slots_used, GAUGE, "choir_expert_slots_used", "Slots that hold an expert."),
    EXPERT(budget_bytes, budget_bytes, GAUGE, "choir_expert_budget_bytes", "Memory that experts may take."),
    EXPERT(held_bytes, held_bytes, GAUGE, "choir_expert_held_bytes", "Memory that experts take."),
    EXPERT(n_hits, hits, COUNTER, "choir_expert_hits_total",
           "Experts that a step's layer wanted and memory held."),
    EXPERT(n_late_hits, late_hits, COUNTER, "choir_expert_late_hits_total",
           "Experts that a step's layer wanted while they were on their way."),
    EXPERT(n_misses, misses, COUNTER, "choir_expert_misses_total",
           "Experts that a step's layer wanted and that had to be read."),
    EXPERT(n_reads, reads, COUNTER, "choir_expert_reads_total", "Reads sent to the disk."),
    EXPERT(bytes_read, bytes_read, COUNTER, "choir_expert_read_bytes_total", "Bytes read from the disk."),
    EXPERT(n_retries, retries, COUNTER, "choir_expert_read_retries_total", "Reads tried again."),
    EXPERT(n_damaged, damaged, COUNTER, "choir_expert_damaged_total", "Reads whose checksum was wrong."),
    EXPERT(n_failed, failed, COUNTER, "choir_expert_failed_total", "Experts given up for a while."),
    EXPERT_OWN(n_late, COUNTER, "choir_expert_late_total",
               "Experts that a step went on without since the disk was late."),
    EXPERT_OWN(busy_ns, SECONDS, "choir_expert_busy_seconds_total", "Time with reads in flight."),
    EXPERT_OWN(stall_ns, SECONDS, "choir_expert_stall_seconds_total", "Time that steps waited for reads."),
    EXPERT(n_prefetched, prefetched, COUNTER, "choir_expert_prefetched_total", "Experts read ahead."),
    EXPERT(n_prefetch_used, prefetch_used, COUNTER, "choir_expert_prefetch_used_total",
           "Experts read ahead that were wanted."),
    EXPERT_OWN(n_prefetch_wasted, COUNTER, "choir_expert_prefetch_wasted_total",
               "Experts read ahead that made room before they were wanted."),
    EXPERT_OWN(n_predicted, COUNTER, "choir_expert_predicted_total",
               "Experts that rows took, where they had been predicted."),
    EXPERT_OWN(n_predicted_right, COUNTER, "choir_expert_predicted_right_total",
               "Of those, the ones that the prediction named."),
    EXPERT(prefetching, prefetching, GAUGE, "choir_expert_prefetching",
           "1 while experts are read ahead: it pays at the moment."),
    STREAMED(n_read_groups, groups, GAUGE, "choir_expert_groups",
             "Groups of sequences that take turns to share reads; 1: all run together."),
    STREAMED(step_tokens, step_tokens, GAUGE, "choir_expert_step_tokens",
             "Rows that a step may have; it grows while steps wait for reads."),
};
const choir_numbers choir_expert_numbers = {expert_numbers, sizeof expert_numbers / sizeof *expert_numbers};

#define ADAPTER(from, to, ...) \
    {MEMBER(choir_scheduler_stats, adapters.from), MEMBER(Choir__V1__AdapterStats, to), __VA_ARGS__}
#define ADAPTER_OWN(from, ...) OWN(adapters.from, __VA_ARGS__)
static const choir_number adapter_numbers[] = {
    ADAPTER(n_names, registered, GAUGE, "choir_adapters_registered", "Names of adapters."),
    ADAPTER(n_resident, resident, GAUGE, "choir_adapters_resident",
            "Adapters in memory, superseded versions that requests still use included."),
    ADAPTER(n_loading, loading, GAUGE, "choir_adapters_loading", "Adapters that are being read."),
    ADAPTER(n_failed, failed, GAUGE, "choir_adapters_failed", "Adapters that could not be read the last time."),
    ADAPTER(n_quarantined, quarantined, GAUGE, "choir_adapters_quarantined",
            "Adapters whose logits were no numbers too often; nobody gets them until they are loaded anew."),
    ADAPTER(n_claims, in_use, GAUGE, "choir_adapters_in_use", "Uses by requests that wait or run."),
    ADAPTER(budget_bytes, budget_bytes, GAUGE, "choir_adapter_budget_bytes", "Memory that adapters may take."),
    ADAPTER(held_bytes, held_bytes, GAUGE, "choir_adapter_held_bytes",
            "Memory that adapters take, or have reserved to be read into."),
    ADAPTER(n_requests, requests, COUNTER, "choir_adapter_requests_total", "Uses by requests."),
    ADAPTER(n_loads, loads, COUNTER, "choir_adapter_loads_total", "Adapters read into memory."),
    ADAPTER(n_failures, load_failures, COUNTER, "choir_adapter_load_failures_total", "Loads that failed."),
    ADAPTER_OWN(load_ns, SECONDS, "choir_adapter_load_seconds_total",
                "Time of all loads, from the first read to the last byte in place."),
    ADAPTER(bytes_read, bytes_read, COUNTER, "choir_adapter_read_bytes_total", "Bytes read from the disk."),
    ADAPTER_OWN(n_retries, COUNTER, "choir_adapter_read_retries_total", "Reads tried again."),
    ADAPTER(n_evictions, evictions, COUNTER, "choir_adapter_evictions_total", "Adapters that made room for others."),
    ADAPTER(n_waits, waits, COUNTER, "choir_adapter_waits_total", "Requests that had to wait for an adapter."),
    ADAPTER_OWN(wait_ns, SECONDS, "choir_adapter_wait_seconds_total", "Time that requests waited for adapters."),
    ADAPTER_OWN(n_poisoned, COUNTER, "choir_adapter_poisoned_total",
                "Requests with an adapter whose logits were no numbers."),
};
const choir_numbers choir_adapter_numbers = {adapter_numbers, sizeof adapter_numbers / sizeof *adapter_numbers};

#define SERVER(from, ...) {MEMBER(Choir__V1__ServerStats, from), {0}, __VA_ARGS__}
static const choir_number server_numbers[] = {
    SERVER(uptime_s, GAUGE, "choir_uptime_seconds", "Time since the server started."),
    SERVER(draining, GAUGE, "choir_draining", "1 while the server is on its way down."),
    SERVER(open_calls, GAUGE, "choir_open_calls", "gRPC calls that are open."),
    SERVER(calls, COUNTER, "choir_calls_total", "gRPC calls."),
    SERVER(refused_calls, COUNTER, "choir_refused_calls_total",
           "gRPC calls answered with an error before the scheduler saw them."),
    SERVER(internal_errors, COUNTER, "choir_internal_errors_total", "Bugs met; each is in the log with its id."),
    SERVER(resident_bytes, GAUGE, "choir_resident_memory_bytes",
           "Memory of the whole process, as the kernel counts it."),
};
const choir_numbers choir_server_numbers = {server_numbers, sizeof server_numbers / sizeof *server_numbers};
// clang-format on

static void put(const void *from_struct, void *to_struct, const choir_number *number)
{
    const char *from = (const char *)from_struct + number->from.offset;
    char *to = (char *)to_struct + number->to.offset;
    if (number->to.type == CHOIR_NUMBER_NONE) return;
    if (number->from.type == CHOIR_NUMBER_BOOL) {
        CHOIR_ASSERT(number->to.type == CHOIR_NUMBER_WIRE_BOOL);
        *(protobuf_c_boolean *)to = *(const bool *)from;
        return;
    }
    CHOIR_ASSERT(number->from.type == number->to.type);
    if (number->from.type == CHOIR_NUMBER_U32)
        *(uint32_t *)to = *(const uint32_t *)from;
    else
        *(uint64_t *)to = *(const uint64_t *)from;
}

static void put_all(choir_numbers numbers, const choir_scheduler_stats *from, void *to)
{
    for (size_t i = 0; i < numbers.n; i++) put(from, to, &numbers.at[i]);
}

static double ratio(uint64_t part, uint64_t whole)
{
    return whole > 0 ? (double)part / (double)whole : 0;
}

static void fill_experts(const choir_scheduler_stats *s, Choir__V1__ExpertStats *to)
{
    const choir_experts_stats *x = &s->experts;
    choir__v1__expert_stats__init(to);
    put_all(choir_expert_numbers, s, to);
    to->io = (char *)x->io;
    to->policy = (char *)x->policy;
    to->hit_rate = ratio(x->n_hits, x->n_hits + x->n_late_hits + x->n_misses);
    to->bandwidth = ratio(x->bytes_read, x->busy_ns) * 1e9;
    to->read_p50_ms = 1e3 * choir_experts_latency(x, 0.5);
    to->read_p99_ms = 1e3 * choir_experts_latency(x, 0.99);
    to->stall_ms_per_token = ratio(x->stall_ns, s->rows_total) / 1e6;
    to->prediction_recall = ratio(x->n_predicted_right, x->n_predicted);
    to->prefetch_precision = ratio(x->n_prefetch_used, x->n_prefetch_used + x->n_prefetch_wasted);
}

void *choir_stats_fill_heat(const choir_server_model *model, Choir__V1__ExpertStats *to)
{
    size_t n = choir_scheduler_get_expert_heat(model->scheduler, NULL);
    uint32_t n_layers = n > 0 ? model->config->n_layers : 0;
    if (n == 0) return NULL;
    size_t heads = n_layers * (sizeof(Choir__V1__LayerHeat) + sizeof(Choir__V1__LayerHeat *));
    char *block = choir_alloc(CHOIR_MEM_SERVER, heads + n * sizeof(float));
    if (block == NULL) return NULL;
    Choir__V1__LayerHeat *layers = (Choir__V1__LayerHeat *)block;
    Choir__V1__LayerHeat **list = (Choir__V1__LayerHeat **)(layers + n_layers);
    float *heat = (float *)(list + n_layers);
    choir_scheduler_get_expert_heat(model->scheduler, heat);
    for (uint32_t l = 0; l < n_layers; l++) {
        list[l] = &layers[l];
        choir__v1__layer_heat__init(&layers[l]);
        layers[l].layer = l;
        layers[l].n_experts = n / n_layers;
        layers[l].experts = heat + l * (n / n_layers);
    }
    to->n_heat = n_layers;
    to->heat = list;
    return block;
}

static void fill_adapters(const choir_scheduler_stats *s, Choir__V1__AdapterStats *to)
{
    choir__v1__adapter_stats__init(to);
    put_all(choir_adapter_numbers, s, to);
    to->load_ms = (double)s->adapters.load_ns / CHOIR_MS;
    to->wait_ms = (double)s->adapters.wait_ns / CHOIR_MS;
}

void choir_stats_fill_model(const choir_server_model *model, Choir__V1__ModelStats *to,
                            Choir__V1__ExpertStats *experts, Choir__V1__AdapterStats *adapters)
{
    choir_scheduler_stats s;
    choir_scheduler_get_stats(model->scheduler, &s);
    choir__v1__model_stats__init(to);
    put_all(choir_model_numbers, &s, to);
    to->model = (char *)model->name;
    to->last_step_ms = (double)s.last_step_ns / CHOIR_MS;
    to->mean_step_ms = ratio(s.step_ns_total, s.n_steps) / CHOIR_MS;
    to->mean_batch_rows = ratio(s.rows_total, s.n_steps);
    if (choir_scheduler_adapters(model->scheduler) != NULL) {
        fill_adapters(&s, adapters);
        to->adapters = adapters;
    }
    if (!s.experts.streamed) return;
    fill_experts(&s, experts);
    to->experts = experts;
}

void choir_stats_fill_server(choir_server *s, Choir__V1__ServerStats *to)
{
    choir__v1__server_stats__init(to);
    to->uptime_s = (double)(choir_clock_now() - s->started_ns) / CHOIR_SECOND;
    to->version = (char *)CHOIR_VERSION;
    to->open_calls = atomic_load(&s->n_open);
    to->calls = atomic_load(&s->n_calls);
    to->refused_calls = atomic_load(&s->n_refused);
    to->internal_errors = atomic_load(&s->n_internal);
    to->draining = atomic_load(&s->phase) > CHOIR_PHASE_SERVING;
    to->resident_bytes = choir_memory_resident();
}
