#include "cli/adapters.h"

#include "scheduler/scheduler.h"
#include "server/server.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>

typedef struct values {
    choir_cli_engine_values engine;
    const char *config, *http, *override_generation_config, *adapters, *adapter_type,
        *kv_cache_dtype, *tls_cert, *tls_key;
    choir_option_list listen, served_model_name, api_key, lora_modules;
    uint64_t adapter_memory;
    uint64_t max_model_len, max_num_seqs, max_num_batched_tokens, max_queued, seed;
    uint64_t shutdown_timeout, watchdog_timeout, max_message;
    uint64_t max_hold;
    bool no_prefix_cache;
} values;
static const values defaults = {
    .listen = {{"127.0.0.1:50051"}, 1},
    .kv_cache_dtype = "auto",
    .adapter_type = "auto",
    .adapter_memory = 1 << 30,
    .max_num_seqs = 32,
    .max_num_batched_tokens = 512,
    .max_queued = 256,
    .max_hold = 2000,
    .shutdown_timeout = 30,
    .watchdog_timeout = 30,
    .max_message = 4 << 20,
};
static const choir_option options[] = {
    {"config", 0, CHOIR_OPTION_TEXT, offsetof(values, config), "FILE",
     "these options as a JSON object; the command line is stronger", 0, 0},
    {"listen", 0, CHOIR_OPTION_LIST, offsetof(values, listen), "HOST:PORT",
     "gRPC address, or unix:/path; may be given again", 0, 0},
    {"http", 0, CHOIR_OPTION_TEXT, offsetof(values, http), "HOST:PORT",
     "/metrics for Prometheus, /healthz, /readyz; plain HTTP [off]", 0, 0},
    {"served-model-name", 0, CHOIR_OPTION_LIST, offsetof(values, served_model_name), "NAME",
     "the names clients use, one for each MODEL [the file's]", 0, 0},
    {"max-model-len", 0, CHOIR_OPTION_COUNT, offsetof(values, max_model_len), "N",
     "tokens of prompt and answer; 0: the model's context", 0, 1 << 28},
    {"max-num-seqs", 0, CHOIR_OPTION_COUNT, offsetof(values, max_num_seqs), "N",
     "sequences running at once", 1, 1024},
    {"max-num-batched-tokens", 0, CHOIR_OPTION_COUNT, offsetof(values, max_num_batched_tokens), "N",
     "tokens of one step", 16, 65536},
    {"max-queued", 0, CHOIR_OPTION_COUNT, offsetof(values, max_queued), "N",
     "requests waiting at most", 1, 65536},
    {"max-hold", 0, CHOIR_OPTION_COUNT, offsetof(values, max_hold), "MS",
     "with streamed experts, hold a sequence that wants others than the rest back so long; 0: "
     "never",
     0, 600000},
    {"no-prefix-cache", 0, CHOIR_OPTION_FLAG, offsetof(values, no_prefix_cache), NULL,
     "prompts share no KV pages", 0, 0},
    {"override-generation-config", 0, CHOIR_OPTION_TEXT,
     offsetof(values, override_generation_config), "JSON",
     "how requests that do not say are sampled: temperature, top_p, top_k, repetition_penalty", 0,
     0},
    {"kv-cache-dtype", 0, CHOIR_OPTION_TEXT, offsetof(values, kv_cache_dtype), "TYPE",
     "auto or f16", 0, 0},
    {"adapters", 0, CHOIR_OPTION_TEXT, offsetof(values, adapters), "DIR",
     "every adapter in the folder, by its name there; clients may load others from it", 0, 0},
    {"lora-modules", 0, CHOIR_OPTION_LIST, offsetof(values, lora_modules), "NAME=DIR",
     "an adapter, a PEFT folder or a GGUF LoRA file; may be given again", 0, 0},
    {"adapter-memory", 0, CHOIR_OPTION_SIZE, offsetof(values, adapter_memory), "BYTES",
     "what adapters may take at once; those used last stay", 1, 0x1p53},
    CHOIR_CLI_ADAPTER_TYPE_OPTION(values, adapter_type),
    {"api-key", 0, CHOIR_OPTION_LIST, offsetof(values, api_key), "KEY",
     "clients must send `authorization: Bearer KEY`", 0, 0},
    {"tls-cert", 0, CHOIR_OPTION_TEXT, offsetof(values, tls_cert), "FILE", "certificate chain, PEM",
     0, 0},
    {"tls-key", 0, CHOIR_OPTION_TEXT, offsetof(values, tls_key), "FILE", "its private key, PEM", 0,
     0},
    {"max-message", 0, CHOIR_OPTION_SIZE, offsetof(values, max_message), "BYTES", "of one request",
     1024, 1 << 30},
    {"shutdown-timeout", 0, CHOIR_OPTION_COUNT, offsetof(values, shutdown_timeout), "S",
     "seconds that running streams get after SIGTERM", 0, 86400},
    {"watchdog-timeout", 0, CHOIR_OPTION_COUNT, offsetof(values, watchdog_timeout), "S",
     "no step for so long with work pending: NOT_SERVING; twice as long: exit", 1, 3600},
    {"seed", 0, CHOIR_OPTION_COUNT, offsetof(values, seed), "S",
     "accepted as vLLM does; requests carry their own", 0, 0},
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};

typedef struct hosted {
    choir_engine *engine;
    choir_model_config config; /* the engine's, with --override-generation-config */
    choir_scheduler *scheduler;
    choir_adapter_type adapter_type;
    char name[256];
} hosted;

/* Bytes this process may still take: what the kernel calls available, within the container's limit.
 */
static uint64_t available_memory(void)
{
    uint64_t available = 0, limit;
    char line[256];
    FILE *info = fopen("/proc/meminfo", "re");
    while (info != NULL && available == 0 && fgets(line, sizeof line, info) != NULL) {
        unsigned long long kib;
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) available = (uint64_t)kib << 10;
    }
    if (info != NULL) fclose(info);
    FILE *group = fopen("/sys/fs/cgroup/memory.max", "re");
    if (group != NULL) {
        unsigned long long bytes; /* or the word "max" */
        limit = fscanf(group, "%llu", &bytes) == 1 ? bytes : UINT64_MAX;
        if (limit < available) available = limit;
        fclose(group);
    }
    return available > 0 ? available : (uint64_t)4 << 30;
}

/* KV pages for all that the sequences could fill, at most; the engine fits them into the budget. */
static choir_status kv_wanted(const values *v, const char *path, uint64_t *kv_bytes)
{
    choir_model_file *file;
    CHOIR_TRY(choir_model_file_open(path, &file));
    const choir_model_config *c = choir_model_file_config(file);
    uint64_t token = choir_cli_kv_bytes_per_token(c, v->engine.exact);
    uint64_t context = v->max_model_len > 0 ? v->max_model_len : c->max_positions;
    choir_model_file_close(file);
    *kv_bytes = token * (context + CHOIR_PAGE_TOKENS) * v->max_num_seqs;
    return CHOIR_OK;
}

/* The name clients use: what was asked for, or the last part of the path without ".gguf" or
 * ".choir". */
static void name_of(const values *v, uint32_t i, const char *path, char *name, size_t bytes)
{
    if (i < v->served_model_name.n) {
        snprintf(name, bytes, "%.255s", v->served_model_name.item[i]);
        return;
    }
    size_t end = strlen(path);
    while (end > 1 && path[end - 1] == '/') end--;
    size_t start = end;
    while (start > 0 && path[start - 1] != '/') start--;
    if (end - start > 5 && memcmp(path + end - 5, ".gguf", 5) == 0) end -= 5;
    if (end - start > 6 && memcmp(path + end - 6, ".choir", 6) == 0) end -= 6;
    snprintf(name, bytes, "%.*s", (int)(end - start < 255 ? end - start : 255), path + start);
}

static bool has_adapters(const values *v)
{
    return v->adapters != NULL || v->lora_modules.n > 0;
}

/* "NAME=DIR" into both. */
static choir_status split_module(const char *text, char *name, size_t bytes, const char **path)
{
    const char *equals = strchr(text, '=');
    if (equals == NULL || equals == text || equals[1] == '\0' || (size_t)(equals - text) >= bytes)
        return choir_fail(CHOIR_E_INVALID, "--lora-modules is '%.200s', must be NAME=DIR", text);
    memcpy(name, text, (size_t)(equals - text));
    name[equals - text] = '\0';
    *path = equals + 1;
    return choir_adapters_check_name(name);
}

/* The folder's adapters: bad ones are named in a line each. */
static choir_status register_folder(const values *v, const hosted *h)
{
    uint32_t n_good, n_bad;
    uint64_t start = choir_clock_now();
    CHOIR_TRY(choir_adapters_register_folder(choir_engine_adapters(h->engine), v->adapters, &n_good,
                                             &n_bad));
    fprintf(stderr, "choir: %s: %u adapters registered from %s in %.2f s, %u left out\n", h->name,
            n_good, v->adapters, (double)(choir_clock_now() - start) / 1e9, n_bad);
    return CHOIR_OK;
}

/* Who names an adapter wants it: one that fits no model is an error. */
static choir_status register_module(const char *text, const hosted *models, uint32_t n)
{
    char name[CHOIR_ADAPTER_MAX_NAME + 1];
    const char *path;
    uint32_t n_fit = 0;
    choir_status status = CHOIR_OK;
    CHOIR_TRY(split_module(text, name, sizeof name, &path));
    const choir_adapter_load what = {.name = name, .path = path};
    for (uint32_t i = 0; i < n; i++) {
        choir_status one = choir_adapters_register(choir_engine_adapters(models[i].engine), &what);
        if (one == CHOIR_OK)
            n_fit++;
        else
            status = one;
    }
    return n_fit > 0 ? CHOIR_OK : choir_fail_in(status, "--lora-modules %s", name);
}

static choir_status register_adapters(const values *v, const hosted *models, uint32_t n)
{
    for (uint32_t i = 0; i < n && v->adapters != NULL; i++)
        CHOIR_TRY(register_folder(v, &models[i]));
    for (uint32_t i = 0; i < v->lora_modules.n; i++)
        CHOIR_TRY(register_module(v->lora_modules.item[i], models, n));
    return CHOIR_OK;
}

/* Before the scheduler, which keeps the pool. */
static choir_status open_adapters(const values *v, hosted *h)
{
    choir_engine_adapters_options o = {.folder = v->adapters};
    if (!has_adapters(v)) return CHOIR_OK;
    bool known = choir_adapter_type_parse(v->adapter_type, &o.type);
    CHOIR_ASSERT(known); /* check() has looked */
    h->adapter_type = choir_adapter_type_of(h->engine, o.type);
    return choir_engine_open_adapters(h->engine, &o);
}

static choir_status open_model(const values *v, uint32_t i, const char *model, uint32_t n_models,
                               hosted *out)
{
    char path[4096], a[16], b[16];
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    CHOIR_TRY(choir_cli_engine_options(&v->engine, &o));
    o.max_context = (uint32_t)v->max_model_len;
    o.stall_ns = CHOIR_SECOND;
    CHOIR_TRY(choir_cli_find_model(model, path, sizeof path));
    CHOIR_TRY(kv_wanted(v, path, &o.kv_bytes));
    o.memory_bytes = (v->engine.memory > 0 ? v->engine.memory : available_memory() / 2) / n_models;
    o.max_rows = (uint32_t)v->max_num_batched_tokens;
    o.max_rows_streamed = 4 * o.max_rows;
    o.max_spans = v->max_num_seqs < o.max_rows ? (uint32_t)v->max_num_seqs : o.max_rows;
    if (has_adapters(v)) o.adapter_bytes = v->adapter_memory;
    CHOIR_TRY(choir_engine_open(path, &o, &out->engine));
    CHOIR_TRY(open_adapters(v, out));
    choir_scheduler_options s = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    s.max_sequences = o.max_spans;
    s.max_step_tokens = o.max_rows;
    s.max_hold_ms = (uint32_t)v->max_hold;
    s.max_queued = (uint32_t)v->max_queued;
    s.max_tokens_per_sequence = (uint32_t)v->max_model_len;
    s.prefix_cache = !v->no_prefix_cache;
    s.stall_ms = (uint32_t)v->watchdog_timeout * 1000;
    out->config = *choir_engine_config(out->engine);
    if (v->override_generation_config != NULL)
        CHOIR_TRY(choir_generation_override(&out->config, v->override_generation_config));
    const choir_step_engine step = choir_step_engine_of(out->engine);
    CHOIR_TRY(choir_scheduler_create(&step, &s, &out->scheduler));
    name_of(v, i, path, out->name, sizeof out->name);
    choir_engine_sizes sizes = choir_engine_memory(out->engine);
    fprintf(stderr,
            "choir: %s: %s of weights, %s of KV pages (%u tokens), %u threads, %s kernels\n",
            out->name, choir_format_bytes(sizes.weight_bytes + sizes.expert_bytes, a),
            choir_format_bytes(sizes.kv_bytes, b),
            choir_engine_n_pages(out->engine) * CHOIR_PAGE_TOKENS,
            choir_engine_n_threads(out->engine), choir_engine_kernels(out->engine)->name);
    choir_experts_stats x = choir_engine_expert_stats(out->engine);
    if (x.streamed)
        fprintf(stderr,
                "choir: %s: up to %u of %u experts in %s of memory, the others streamed by %s\n",
                out->name, x.n_slots, x.n_experts, choir_format_bytes(x.budget_bytes, a), x.io);
    return CHOIR_OK;
}

/* Whoever asked for TLS is told what goes without it. */
static void print_http(const values *v, const char *address)
{
    if (address == NULL) return;
    fprintf(stderr, "choir: metrics and health on http://%s\n", address);
    if (v->tls_cert != NULL)
        fprintf(stderr,
                "choir: %s is plain HTTP: TLS is for gRPC alone, and what is read here, %s, can be "
                "seen on the way\n",
                address, v->api_key.n > 0 ? "API keys included" : "metrics and health");
}

static choir_status serve(const values *v, hosted *models, uint32_t n, char *cert, char *key)
{
    choir_server_model served[CHOIR_MAX_LIST];
    choir_server_options o = CHOIR_SERVER_OPTIONS_DEFAULT;
    choir_server *server;
    for (uint32_t i = 0; i < n; i++) {
        served[i] = choir_server_model_of(models[i].name, models[i].engine, models[i].scheduler);
        served[i].config = &models[i].config;
        served[i].adapter_type = models[i].adapter_type;
        served[i].max_tokens = (uint32_t)v->max_model_len;
    }
    o.listen = v->listen.item;
    o.n_listen = v->listen.n;
    o.api_keys = v->api_key.item;
    o.n_api_keys = v->api_key.n;
    o.tls_certificate = cert;
    o.tls_key = key;
    o.http = v->http;
    o.max_message_bytes = (uint32_t)v->max_message;
    o.shutdown_ms = (uint32_t)v->shutdown_timeout * 1000;
    o.watchdog_exit_ms = (uint32_t)v->watchdog_timeout * 1000;
    CHOIR_TRY(choir_server_create(&o, served, n, &server));
    choir_status status = choir_server_start(server);
    if (status == CHOIR_OK) {
        for (uint32_t i = 0; i < o.n_listen; i++)
            fprintf(stderr, "choir: listening on %s\n", choir_server_address(server, i));
        print_http(v, choir_server_http_address(server));
        choir_server_run_until_signal(server);
    }
    choir_server_destroy(server);
    return status;
}

static choir_status read_pem(const char *path, char **out)
{
    size_t bytes;
    return path == NULL ? CHOIR_OK : choir_file_read(path, 1 << 20, out, &bytes);
}

/* The server's loop takes them; gRPC's threads inherit the mask. Until now they ended the program
 * at once: a model that loads has nothing to save. */
static void block_signals(void)
{
    sigset_t taken;
    sigemptyset(&taken);
    sigaddset(&taken, SIGTERM);
    sigaddset(&taken, SIGINT);
    pthread_sigmask(SIG_BLOCK, &taken, NULL);
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    uint32_t n = arguments->n_positional;
    hosted models[CHOIR_MAX_LIST] = {0};
    char *cert = NULL, *key = NULL;
    choir_status status;
    signal(SIGPIPE, SIG_IGN);
    fprintf(stderr, "choir: configuration:\n");
    choir_options_print_resolved(options, sizeof options / sizeof *options, v, arguments, stderr);
    CHOIR_TRY_TO(done, status, read_pem(v->tls_cert, &cert));
    CHOIR_TRY_TO(done, status, read_pem(v->tls_key, &key));
    for (uint32_t i = 0; i < n; i++)
        CHOIR_TRY_TO(done, status, open_model(v, i, arguments->positional[i], n, &models[i]));
    CHOIR_TRY_TO(done, status, register_adapters(v, models, n));
    block_signals();
    status = serve(v, models, n, cert, key);
done:
    for (uint32_t i = 0; i < n; i++) {
        choir_scheduler_destroy(models[i].scheduler);
        choir_engine_close(models[i].engine);
    }
    choir_free(cert);
    choir_free(key);
    return status;
}

static choir_status check_adapters(const values *v)
{
    char names[2][CHOIR_ADAPTER_MAX_NAME + 1];
    const char *path;
    CHOIR_TRY(choir_cli_adapter_type_check(v->adapter_type));
    for (uint32_t i = 0; i < v->lora_modules.n; i++) {
        CHOIR_TRY(split_module(v->lora_modules.item[i], names[0], sizeof names[0], &path));
        for (uint32_t k = 0; k < i; k++) {
            CHOIR_TRY(split_module(v->lora_modules.item[k], names[1], sizeof names[1], &path));
            if (strcmp(names[0], names[1]) == 0)
                return choir_fail(CHOIR_E_INVALID, "--lora-modules has the name %s twice",
                                  names[0]);
        }
    }
    return CHOIR_OK;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    uint32_t n = arguments->n_positional;
    if (strcmp(v->kv_cache_dtype, "auto") != 0 && strcmp(v->kv_cache_dtype, "f16") != 0)
        return choir_fail(CHOIR_E_INVALID, "--kv-cache-dtype is '%.20s', must be auto or f16",
                          v->kv_cache_dtype);
    for (uint32_t i = 0; i < v->listen.n; i++)
        CHOIR_TRY(choir_server_check_address(v->listen.item[i]));
    if (v->http != NULL) CHOIR_TRY(choir_server_check_http_address(v->http));
    if ((v->tls_cert != NULL) != (v->tls_key != NULL))
        return choir_fail(CHOIR_E_INVALID, "--tls-cert and --tls-key go together");
    CHOIR_TRY(check_adapters(v));
    choir_model_config any = {.vocab = 1, .temperature = -1};
    if (v->override_generation_config != NULL)
        CHOIR_TRY(choir_generation_override(&any, v->override_generation_config));
    if (v->served_model_name.n > n)
        return choir_fail(CHOIR_E_INVALID, "--served-model-name is given %u times for %u models",
                          v->served_model_name.n, n);
    return CHOIR_OK;
}

const choir_verb choir_verb_serve = {
    .name = "serve",
    .arguments = "MODEL… [--listen 127.0.0.1:50051] [--http 127.0.0.1:8000] [--memory 8GiB] "
                 "[--adapters DIR] "
                 "[--config FILE]",
    .summary = "the gRPC server: streaming, health, reflection; metrics over HTTP",
    .example = "choir serve SmolLM2-135M-Instruct.Q4_1 --listen 127.0.0.1:50051 --memory 2GiB",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 16,
    .check = check,
    .run = run,
};
