#include "cli/adapters.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct values {
    choir_cli_engine_values engine;
    choir_cli_adapter_values adapters;
    const char *tokens, *out, *routes;
    uint64_t force_expert;
} values;
static const values defaults = {.adapters = CHOIR_CLI_ADAPTER_DEFAULT,
                                .force_expert = CHOIR_CLI_UNSET};
static const choir_option options[] = {
    {"tokens", 0, CHOIR_OPTION_TEXT, offsetof(values, tokens), "5,7,9", "the token ids", 0, 0},
    {"out", 'o', CHOIR_OPTION_TEXT, offsetof(values, out), "FILE",
     "logits as little-endian f32 [n_tokens, vocab]", 0, 0},
    {"routes", 0, CHOIR_OPTION_TEXT, offsetof(values, routes), "FILE",
     "which experts took each token, a JSON object a line", 0, 0},
    {"force-expert", 0, CHOIR_OPTION_COUNT, offsetof(values, force_expert), "N",
     "every token goes to expert N alone", 0, 65535},
    CHOIR_CLI_ADAPTER_OPTIONS(values, adapters),
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};

typedef struct job {
    choir_engine *engine;
    choir_cli_adapters adapters;
    uint32_t *tokens, n_pages, *pages;
    size_t n_tokens;
    choir_save out, routes_out;
    choir_routes routes;
    float *logits; /* of one chunk */
} job;

enum { CHUNK = 64 };

static choir_status write_route(job *j, uint32_t layer, uint32_t token, size_t at)
{
    json_t *experts = json_array(), *weights = json_array();
    for (uint32_t i = 0; i < choir_engine_config(j->engine)->n_experts_used; i++) {
        json_array_append_new(experts, json_integer(j->routes.experts[at + i]));
        json_array_append_new(weights, json_real((double)j->routes.weights[at + i]));
    }
    json_t *line = json_pack("{s:i, s:i, s:o, s:o}", "layer", (int)layer, "token", (int)token,
                             "experts", experts, "weights", weights);
    char *text = json_dumps(line, JSON_COMPACT | JSON_REAL_PRECISION(9));
    choir_status status = text == NULL ? choir_fail(CHOIR_E_NO_MEMORY, "no memory for the routes")
                                       : choir_save_write(&j->routes_out, text, strlen(text));
    if (status == CHOIR_OK) status = choir_save_write(&j->routes_out, "\n", 1);
    free(text);
    json_decref(line);
    return status;
}

/* Dense layers among the others route nothing, so they have no lines. */
static choir_status write_routes(job *j, uint32_t first, uint32_t n)
{
    const choir_model_config *c = choir_engine_config(j->engine);
    for (uint32_t l = 0; l < c->n_layers; l++)
        for (uint32_t t = 0; (c->layers[l] & CHOIR_LAYER_MOE) != 0 && t < n; t++)
            CHOIR_TRY(write_route(j, l, first + t, ((size_t)l * n + t) * c->n_experts_used));
    return CHOIR_OK;
}

static void print_top(const job *j, const float *logits)
{
    uint32_t vocab = choir_engine_config(j->engine)->vocab, best[5], n = 0;
    for (uint32_t v = 0; v < vocab; v++) {
        uint32_t at = n;
        while (at > 0 && logits[v] > logits[best[at - 1]]) at--;
        if (at == 5) continue;
        if (n < 5) n++;
        for (uint32_t i = n - 1; i > at; i--) best[i] = best[i - 1];
        best[at] = v;
    }
    json_t *list = json_array();
    for (uint32_t i = 0; i < n; i++) {
        size_t bytes = 0;
        const char *piece =
            choir_tokenizer_piece(choir_engine_tokenizer(j->engine), best[i], &bytes);
        json_t *text = piece == NULL ? NULL : json_stringn(piece, bytes);
        json_array_append_new(list, json_pack("{s:i, s:f, s:o}", "token", (int)best[i], "logit",
                                              (double)logits[best[i]], "piece",
                                              text != NULL ? text : json_null()));
    }
    json_t *o = json_pack("{s:i, s:o}", "position", (int)j->n_tokens - 1, "top", list);
    choir_cli_print_json(o, false);
}

static choir_status run_chunks(job *j, bool save_logits, bool save_routes)
{
    CHOIR_TRY(choir_cli_adapters_begin(&j->adapters, j->engine, j->pages, j->n_pages));
    uint32_t vocab = choir_engine_config(j->engine)->vocab, n = 0;
    for (uint32_t first = 0; first < j->n_tokens; first += n) {
        n = j->n_tokens - first < CHUNK ? (uint32_t)(j->n_tokens - first) : CHUNK;
        choir_span span = {.tokens = j->tokens + first,
                           .n_tokens = n,
                           .position = j->adapters.n_virtual + first,
                           .pages = j->pages,
                           .n_pages = j->n_pages,
                           .n_logits = n,
                           .logits = j->logits,
                           .routes = save_routes ? &j->routes : NULL};
        choir_cli_adapters_use(&j->adapters, j->tokens, j->n_tokens, &span);
        CHOIR_TRY(choir_engine_step(j->engine, &span, 1));
        if (span.status != CHOIR_OK && span.missing_expert < 0)
            return choir_fail(span.status, "the logits of tokens %u to %u hold NaN or Inf", first,
                              first + n - 1);
        CHOIR_TRY(choir_span_failure(&span));
        if (save_logits)
            CHOIR_TRY(choir_save_write(&j->out, j->logits, (size_t)n * vocab * sizeof(float)));
        if (save_routes) CHOIR_TRY(write_routes(j, first, n));
    }
    print_top(j, j->logits + (size_t)(n - 1) * vocab);
    return CHOIR_OK;
}

static choir_status make_buffers(job *j)
{
    const choir_model_config *c = choir_engine_config(j->engine);
    size_t n_routes = (size_t)c->n_layers * CHUNK * c->n_experts_used;
    j->n_pages = choir_engine_n_pages(j->engine);
    j->pages = choir_alloc(CHOIR_MEM_OTHER, j->n_pages * sizeof *j->pages);
    j->logits = choir_alloc(CHOIR_MEM_OTHER, (size_t)CHUNK * c->vocab * sizeof *j->logits);
    j->routes.experts = choir_calloc(CHOIR_MEM_OTHER, n_routes, sizeof(uint16_t));
    j->routes.weights = choir_calloc(CHOIR_MEM_OTHER, n_routes, sizeof(float));
    if (j->pages == NULL || j->logits == NULL || j->routes.experts == NULL ||
        j->routes.weights == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the logits");
    for (uint32_t i = 0; i < j->n_pages; i++) j->pages[i] = i;
    return CHOIR_OK;
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    job j = {.out.fd = -1, .routes_out.fd = -1};
    bool save_logits = false, save_routes = false;
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    choir_status status;
    CHOIR_TRY(choir_cli_engine_options(&v->engine, &o));
    o.max_rows = o.max_spans = CHUNK;
    o.max_context = 1; /* as many as there are commas, and one */
    for (const char *p = v->tokens; *p != '\0'; p++) o.max_context += *p == ',';
    o.kv_bytes = (uint64_t)256 << 20;
    CHOIR_TRY_TO(done, status,
                 choir_cli_adapters_read(&v->adapters, arguments->positional[0], &j.adapters));
    o.max_context += j.adapters.n_virtual;
    CHOIR_TRY_TO(done, status, choir_cli_open_engine(arguments->positional[0], &o, &j.engine));
    CHOIR_TRY_TO(done, status, choir_cli_adapters_make(&j.adapters, j.engine));
    const choir_model_config *c = choir_engine_config(j.engine);
    if (v->force_expert != CHOIR_CLI_UNSET)
        CHOIR_TRY_TO(done, status, choir_engine_force_expert(j.engine, (int32_t)v->force_expert));
    CHOIR_TRY_TO(done, status,
                 choir_cli_parse_ids("--tokens", v->tokens, c->vocab, &j.tokens, &j.n_tokens));
    CHOIR_TRY_TO(done, status, choir_cli_adapters_fit(&j.adapters, "--tokens", j.n_tokens, c));
    CHOIR_TRY_TO(done, status, make_buffers(&j));
    if (v->routes != NULL && c->n_experts == 0) {
        status = choir_fail(CHOIR_E_INVALID, "--routes: %s is dense, it routes nothing", c->name);
        goto done;
    }
    if (v->out != NULL) CHOIR_TRY_TO(done, status, choir_save_begin(v->out, &j.out));
    save_logits = v->out != NULL;
    if (v->routes != NULL) CHOIR_TRY_TO(done, status, choir_save_begin(v->routes, &j.routes_out));
    save_routes = v->routes != NULL;
    CHOIR_TRY_TO(done, status, run_chunks(&j, save_logits, save_routes));
    if (save_logits) {
        save_logits = false;
        CHOIR_TRY_TO(done, status, choir_save_commit(&j.out));
    }
    if (save_routes) {
        save_routes = false;
        CHOIR_TRY_TO(done, status, choir_save_commit(&j.routes_out));
    }
done:
    if (save_logits) choir_save_abandon(&j.out);
    if (save_routes) choir_save_abandon(&j.routes_out);
    choir_free(j.tokens);
    choir_free(j.pages);
    choir_free(j.logits);
    choir_free(j.routes.experts);
    choir_free(j.routes.weights);
    choir_cli_adapters_close(&j.adapters);
    choir_engine_close(j.engine);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    (void)arguments;
    if (v->tokens == NULL)
        return choir_fail(CHOIR_E_INVALID, "--tokens is missing, like --tokens 5,7,9");
    return choir_cli_adapters_check(&v->adapters);
}

const choir_verb choir_verb_logits = {
    .name = "logits",
    .arguments = "MODEL --tokens 5,7,9 [--out FILE] [--routes FILE] [--adapter DIR] [--exact]",
    .summary = "a model's raw logits and routes for given tokens",
    .example = "choir logits SmolLM2-135M-Instruct.Q4_1 --tokens 504,2365,6354 --exact --out l.f32",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .check = check,
    .run = run,
};
