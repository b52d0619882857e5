/* What a model or an adapter is, without loading it; or what a server serves. */
#include "cli/answer.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

typedef struct values {
    choir_cli_server_values server;
    const char *base;
    uint64_t wait;
    bool json;
} values;
static const values defaults = {.json = false};
static const choir_option options[] = {
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL, "one JSON object", 0, 0},
    {"base", 0, CHOIR_OPTION_TEXT, offsetof(values, base), "MODEL",
     "what is named is an adapter of this model, a PEFT folder or a GGUF LoRA file", 0, 0},
    {"wait", 0, CHOIR_OPTION_COUNT, offsetof(values, wait), "S",
     "with --server: wait up to S seconds until it is SERVING", 0, 86400},
    CHOIR_CLI_SERVER_OPTIONS(values, server),
};

static void print_json(const choir_model_file *f, const choir_tokenizer *t, uint64_t dense,
                       uint64_t experts)
{
    const choir_model_config *c = choir_model_file_config(f);
    json_t *o = json_pack(
        "{s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, "
        "s:I, "
        "s:I, s:I, s:s, s:b, s:s}",
        "name", c->name, "family", choir_model_config_family(c), "format", choir_model_file_kind(f),
        "types", choir_model_file_types(f), "parameters",
        (json_int_t)choir_model_file_n_parameters(f), "layers", (json_int_t)c->n_layers, "hidden",
        (json_int_t)c->hidden, "heads", (json_int_t)c->n_heads, "kv_heads",
        (json_int_t)c->n_kv_heads, "head_dim", (json_int_t)c->head_dim, "ffn",
        (json_int_t)c->ffn_hidden, "experts", (json_int_t)c->n_experts, "experts_per_token",
        (json_int_t)c->n_experts_used, "expert_ffn", (json_int_t)c->expert_hidden, "vocab",
        (json_int_t)c->vocab, "context", (json_int_t)c->max_positions, "bytes_on_disk",
        (json_int_t)choir_model_file_bytes(f), "bytes_dense", (json_int_t)dense, "bytes_experts",
        (json_int_t)experts, "kv_bytes_per_token",
        (json_int_t)choir_cli_kv_bytes_per_token(c, false), "tokenizer", choir_tokenizer_kind(t),
        "chat_template", choir_model_file_chat_template(f) != NULL, "licence", c->licence);
    choir_cli_print_json(o, true);
}

static void print_text(const choir_model_file *f, const choir_tokenizer *t, uint64_t dense,
                       uint64_t experts)
{
    const choir_model_config *c = choir_model_file_config(f);
    char a[16], b[16], d[16];
    printf("%s\n", c->name);
    printf("  family      %s, from %s\n", choir_model_config_family(c), choir_model_file_kind(f));
    printf("  parameters  %.1f M in %s\n", (double)choir_model_file_n_parameters(f) / 1e6,
           choir_model_file_types(f));
    printf("  layers      %u of hidden size %u; ", c->n_layers, c->hidden);
    if (choir_is_latent(c))
        printf("%u heads over a latent of %u\n", c->n_heads, c->kv_lora_rank);
    else
        printf("%u heads of %u over %u kv heads\n", c->n_heads, c->head_dim, c->n_kv_heads);
    uint32_t n_moe = 0;
    for (uint32_t l = 0; l < c->n_layers; l++) n_moe += (c->layers[l] & CHOIR_LAYER_MOE) != 0;
    if (n_moe > 0)
        printf("  experts     %u in each of %u layers, %u a token, FFN %u\n", c->n_experts, n_moe,
               c->n_experts_used, c->expert_hidden);
    if (c->shared_hidden > 0)
        printf("  shared      one expert for every token, FFN %u\n", c->shared_hidden);
    if (n_moe < c->n_layers)
        printf("  FFN         %u in %u dense layers\n", c->ffn_hidden, c->n_layers - n_moe);
    printf("  context     %u tokens, KV %s a token\n", c->max_positions,
           choir_format_bytes(choir_cli_kv_bytes_per_token(c, false), a));
    printf("  memory      %s dense, %s experts; on disk %s\n", choir_format_bytes(dense, a),
           choir_format_bytes(experts, b), choir_format_bytes(choir_model_file_bytes(f), d));
    printf("  tokenizer   %s, %u tokens; chat template: %s\n", choir_tokenizer_kind(t), c->vocab,
           choir_model_file_chat_template(f) != NULL ? "yes" : "none");
    printf("  licence     %s\n", c->licence[0] != '\0' ? c->licence : "the file does not say");
}

static json_t *model_json(const Choir__V1__Model *m)
{
    return json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:b, s:s}", "name",
                     m->name, "family", m->family, "digest", m->digest, "max_tokens",
                     (json_int_t)m->max_tokens, "layers", (json_int_t)m->n_layers, "hidden",
                     (json_int_t)m->hidden, "experts", (json_int_t)m->n_experts,
                     "experts_per_token", (json_int_t)m->n_experts_used, "vocab",
                     (json_int_t)m->vocab, "tokenizer", m->tokenizer, "chat_template",
                     (int)m->chat_template, "licence", m->licence);
}

/* A letter for an expert's share of its layer's hottest: '.' never used, then 1 to 9. */
static void print_heat(const Choir__V1__ExpertStats *x)
{
    for (size_t l = 0; l < x->n_heat; l++) {
        const Choir__V1__LayerHeat *h = x->heat[l];
        float most = 0;
        for (size_t i = 0; i < h->n_experts; i++)
            if (h->experts[i] > most) most = h->experts[i];
        if (most == 0) continue; /* a dense layer, or nothing yet */
        printf("    layer %3u  ", h->layer);
        for (size_t i = 0; i < h->n_experts; i++)
            putchar(h->experts[i] < 0.01F ? '.' : '1' + (int)(8.99F * h->experts[i] / most));
        putchar('\n');
    }
}

static void print_experts(const Choir__V1__ExpertStats *x)
{
    char a[16], b[16];
    printf("    experts are streamed by %s: %u of %u in memory (%s of %s), policy %s\n", x->io,
           x->slots_used, x->experts, choir_format_bytes(x->held_bytes, a),
           choir_format_bytes(x->budget_bytes, b), x->policy);
    printf("    hits %.0f %%; %s read at %.2f GB/s; a read's p50 %.1f ms, p99 %.1f ms; waited %.1f "
           "ms a "
           "token\n",
           100 * x->hit_rate, choir_format_bytes(x->bytes_read, a), x->bandwidth / 1e9,
           x->read_p50_ms, x->read_p99_ms, x->stall_ms_per_token);
    printf("    reading ahead is %s: foreseen %.0f %%, used %.0f %% of %llu\n",
           x->prefetching ? "on" : "off, it does not pay", 100 * x->prediction_recall,
           100 * x->prefetch_precision, (unsigned long long)x->prefetched);
    printf("    steps of up to %u tokens; ", x->step_tokens);
    if (x->groups > 1)
        printf("sequences take turns in %u groups that share their reads\n", x->groups);
    else
        printf("all sequences run together\n");
    if (x->retries + x->damaged + x->failed > 0)
        printf("    the disk failed: %llu reads tried again, %llu damaged, %llu experts given up\n",
               (unsigned long long)x->retries, (unsigned long long)x->damaged,
               (unsigned long long)x->failed);
    print_heat(x);
}

static json_t *experts_json(const Choir__V1__ExpertStats *x)
{
    return json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:f, s:I, s:f, s:f, s:f, s:f, s:b, s:I, s:I}", "io",
                     x->io, "policy", x->policy, "experts", (json_int_t)x->experts, "slots",
                     (json_int_t)x->slots, "slots_used", (json_int_t)x->slots_used, "held_bytes",
                     (json_int_t)x->held_bytes, "hit_rate", x->hit_rate, "bytes_read",
                     (json_int_t)x->bytes_read, "bandwidth", x->bandwidth, "read_p50_ms",
                     x->read_p50_ms, "read_p99_ms", x->read_p99_ms, "stall_ms_per_token",
                     x->stall_ms_per_token, "prefetching", (int)x->prefetching, "groups",
                     (json_int_t)x->groups, "step_tokens", (json_int_t)x->step_tokens);
}

static const Choir__V1__ExpertStats *experts_of(const Choir__V1__GetStatsResponse *stats,
                                                const char *model)
{
    for (size_t i = 0; i < stats->n_models; i++)
        if (strcmp(stats->models[i]->model, model) == 0) return stats->models[i]->experts;
    return NULL;
}

static void print_served(const values *v, const Choir__V1__ListModelsResponse *answer,
                         const Choir__V1__GetStatsResponse *stats)
{
    if (v->json) {
        json_t *models = json_array();
        for (size_t i = 0; i < answer->n_models; i++) {
            const Choir__V1__ExpertStats *x = experts_of(stats, answer->models[i]->name);
            json_t *model = model_json(answer->models[i]);
            if (x != NULL) json_object_set_new(model, "streamed", experts_json(x));
            json_array_append_new(models, model);
        }
        choir_cli_print_json(json_pack("{s:s, s:s, s:o}", "server", v->server.target, "health",
                                       "SERVING", "models", models),
                             true);
        return;
    }
    printf("%s is SERVING\n", v->server.target);
    for (size_t i = 0; i < answer->n_models; i++) {
        const Choir__V1__Model *m = answer->models[i];
        printf("  %s: %s, %u layers, context %u tokens", m->name, m->family, m->n_layers,
               m->max_tokens);
        if (m->n_experts > 0) printf(", %u of %u experts a token", m->n_experts_used, m->n_experts);
        putchar('\n');
        if (experts_of(stats, m->name) != NULL) print_experts(experts_of(stats, m->name));
    }
}

static choir_status run_served(const values *v)
{
    choir_client *client;
    ProtobufCMessage *answer = NULL, *stats = NULL;
    Choir__V1__GetStatsRequest stats_request = CHOIR__V1__GET_STATS_REQUEST__INIT;
    const Choir__V1__ListModelsRequest request = CHOIR__V1__LIST_MODELS_REQUEST__INIT;
    choir_cli_catch_interrupts();
    CHOIR_TRY(choir_cli_client(&v->server, &client));
    choir_status status = choir_client_wait_serving(client, "", (uint32_t)v->wait * 1000);
    if (status == CHOIR_OK)
        status = choir_client_call(client, "/choir.v1.Choir/ListModels", &request.base,
                                   &choir__v1__list_models_response__descriptor, &answer);
    stats_request.expert_heat = true;
    if (status == CHOIR_OK)
        status = choir_client_call(client, "/choir.v1.Choir/GetStats", &stats_request.base,
                                   &choir__v1__get_stats_response__descriptor, &stats);
    if (status == CHOIR_OK)
        print_served(v, (const Choir__V1__ListModelsResponse *)answer,
                     (const Choir__V1__GetStatsResponse *)stats);
    if (stats != NULL) protobuf_c_message_free_unpacked(stats, NULL);
    if (answer != NULL) protobuf_c_message_free_unpacked(answer, NULL);
    choir_client_destroy(client);
    return status;
}

/* --- an adapter */

/* The kinds of matrices that it changes: "attn_q, attn_v". */
static void list_targets(const choir_adapter_data *d, char *out, size_t bytes)
{
    uint64_t seen = 0;
    size_t n = 0;
    out[0] = '\0';
    for (size_t i = 0; i < d->n_changes; i++) {
        uint64_t bit = UINT64_C(1) << d->changes[i].role;
        if ((seen & bit) != 0) continue;
        seen |= bit;
        n += (size_t)snprintf(out + n, bytes - n, "%s%s", n > 0 ? ", " : "",
                              choir_role_text(d->changes[i].role));
    }
    for (size_t i = 0; i < n; i++) out[i] = (char)tolower((unsigned char)out[i]);
}

static void print_adapter(const values *v, const choir_adapter_data *d)
{
    enum { TARGETS_BYTES = 64 * 32 }; /* more than all roles' names together */
    char targets[TARGETS_BYTES], digest[17];
    list_targets(d, targets, sizeof targets);
    snprintf(digest, sizeof digest, "%016llx", (unsigned long long)d->digest);
    if (v->json) {
        choir_cli_print_json(
            json_pack("{s:s, s:I, s:s, s:I, s:I, s:I, s:I, s:s}", "kind", d->kind, "rank",
                      (json_int_t)d->max_rank, "targets", targets, "changes",
                      (json_int_t)d->n_changes, "parameters", (json_int_t)d->n_parameters,
                      "virtual_tokens", (json_int_t)d->n_virtual, "invocation_tokens",
                      (json_int_t)d->n_invocation, "digest", digest),
            true);
        return;
    }
    printf("%s of rank %u, %.2f M parameters\n", d->kind, d->max_rank,
           (double)d->n_parameters / 1e6);
    printf("  changes     %zu matrices: %s\n", d->n_changes, d->n_changes > 0 ? targets : "none");
    if (d->n_virtual > 0) printf("  virtual     %u tokens before the prompt\n", d->n_virtual);
    if (d->n_invocation > 0)
        printf("  activated   by %u tokens, from their last occurrence on\n", d->n_invocation);
    printf("  digest      %s\n", digest);
}

static choir_status run_adapter(const values *v, const char *adapter)
{
    char path[4096];
    choir_model_file *file;
    choir_adapter_data *data = NULL;
    CHOIR_TRY(choir_cli_find_model(v->base, path, sizeof path));
    CHOIR_TRY(choir_model_file_open(path, &file));
    choir_status status = choir_adapter_data_open(choir_model_file_config(file), adapter, &data);
    if (status == CHOIR_OK) {
        print_adapter(v, data);
        choir_adapter_data_free(data);
    }
    choir_model_file_close(file);
    return status;
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    char path[4096];
    choir_model_file *f = NULL;
    choir_tokenizer *t = NULL;
    uint64_t dense = 0, experts = 0;
    choir_status status;
    if (v->server.target != NULL) return run_served(v);
    if (v->base != NULL) return run_adapter(v, arguments->positional[0]);
    CHOIR_TRY_TO(done, status, choir_cli_find_model(arguments->positional[0], path, sizeof path));
    CHOIR_TRY_TO(done, status, choir_model_file_open(path, &f));
    CHOIR_TRY_TO(done, status, choir_tokenizer_open(f, &t));
    CHOIR_TRY_TO(done, status, choir_model_file_weigh(f, 1, &dense, &experts));
    (v->json ? print_json : print_text)(f, t, dense, experts);
done:
    choir_tokenizer_destroy(t);
    choir_model_file_close(f);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    if ((v->server.target != NULL) == (arguments->n_positional == 1))
        return choir_fail(CHOIR_E_INVALID, "give either MODEL or --server HOST:PORT");
    if (v->base != NULL && v->server.target != NULL)
        return choir_fail(CHOIR_E_INVALID, "--base goes with an adapter's folder or file");
    return CHOIR_OK;
}

const choir_verb choir_verb_info = {
    .name = "info",
    .arguments = "MODEL|ADAPTER --base MODEL|--server HOST:PORT [--json]",
    .summary = "family, shapes, quantisation, experts, sizes, tokenizer, template, licence",
    .example = "choir info SmolLM2-135M-Instruct.Q4_1",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 0,
    .max_positional = 1,
    .check = check,
    .run = run,
};
