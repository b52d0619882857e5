#include "cli/cli.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>

#if CHOIR_HAVE_CLIENT
#include "server/client.h"
#endif

typedef struct values {
    choir_cli_engine_values engine;
    choir_cli_sampling_values sampling;
    const char *prompt, *system, *server;
    bool chat, stream, json;
} values;
static const values defaults = {.sampling = CHOIR_CLI_SAMPLING_DEFAULT};
static const choir_option options[] = {
    {"prompt", 'p', CHOIR_OPTION_TEXT, offsetof(values, prompt), "TEXT", "what to continue", 0, 0},
    {"chat", 0, CHOIR_OPTION_FLAG, offsetof(values, chat), NULL,
     "the prompt is a user's message, put into the model's chat template", 0, 0},
    {"system", 0, CHOIR_OPTION_TEXT, offsetof(values, system), "TEXT", "a system message (with --chat)", 0, 0},
    {"stream", 0, CHOIR_OPTION_FLAG, offsetof(values, stream), NULL, "print the text as it comes", 0, 0},
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL,
     "one JSON object: text, token_ids, finish_reason, usage, timings", 0, 0},
    {"server", 0, CHOIR_OPTION_TEXT, offsetof(values, server), "HOST:PORT",
     "ask a running server; MODEL is the name it serves", 0, 0},
    CHOIR_CLI_SAMPLING_OPTIONS(values, sampling),
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};

static volatile sig_atomic_t interrupted;
static void on_interrupt(int signal_number)
{
    (void)signal_number;
    interrupted = 1;
}

static void show(void *user, const char *text, size_t bytes)
{
    (void)user;
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
}

static json_t *messages_of(const values *v)
{
    json_t *messages = json_array();
    if (v->system != NULL)
        json_array_append_new(messages, json_pack("{s:s, s:s}", "role", "system", "content", v->system));
    json_array_append_new(messages, json_pack("{s:s, s:s}", "role", "user", "content", v->prompt));
    return messages;
}

static choir_status prompt_tokens(const values *v, const choir_local *local, uint32_t **ids, size_t *n)
{
    if (!v->chat)
        return choir_tokenizer_encode(choir_engine_tokenizer(local->engine), v->prompt,
                                      strlen(v->prompt), CHOIR_ENCODE_OPTIONS_DEFAULT, ids, n);
    json_t *messages = messages_of(v);
    choir_status status = choir_local_chat_tokens(local, messages, ids, n);
    json_decref(messages);
    return status;
}

static void print_result(const values *v, json_t *result)
{
    if (v->json) {
        json_dumpf(result, stdout, JSON_COMPACT);
        putchar('\n');
    } else if (v->stream) {
        putchar('\n');
    } else {
        const json_t *text = json_object_get(result, "text");
        fwrite(json_string_value(text), 1, json_string_length(text), stdout);
        putchar('\n');
    }
}

static choir_status run_here(const values *v, const char *model)
{
    choir_local local = {0};
    uint32_t *ids = NULL;
    size_t n;
    json_t *result = json_object();
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    choir_status status;
    CHOIR_TRY_TO(done, status, choir_cli_engine_options(&v->engine, &o));
    CHOIR_TRY_TO(done, status, choir_local_open(model, &o, &local));
    CHOIR_TRY_TO(done, status, prompt_tokens(v, &local, &ids, &n));
    choir_request request = {.id = "generate", .tokens = ids, .n_tokens = n};
    choir_cli_set_sampling(&v->sampling, choir_engine_config(local.engine), &request);
    CHOIR_TRY_TO(done, status,
                 choir_local_run(&local, &request, v->stream && !v->json ? show : NULL, NULL,
                                 &interrupted, result));
    print_result(v, result);
done:
    json_decref(result);
    choir_free(ids);
    choir_local_close(&local);
    return status;
}

#if CHOIR_HAVE_CLIENT
choir_status choir_generate_remotely(const char *server, const char *model, const json_t *messages,
                                     const char *prompt, const choir_cli_sampling_values *sampling,
                                     void (*show_text)(void *, const char *, size_t),
                                     const volatile sig_atomic_t *stop, json_t *result);
#endif

static choir_status run_there(const values *v, const char *model)
{
#if CHOIR_HAVE_CLIENT
    json_t *messages = v->chat ? messages_of(v) : NULL, *result = json_object();
    choir_status status =
        choir_generate_remotely(v->server, model, messages, v->prompt, &v->sampling,
                                v->stream && !v->json ? show : NULL, &interrupted, result);
    if (status == CHOIR_OK) print_result(v, result);
    json_decref(messages);
    json_decref(result);
    return status;
#else
    (void)model;
    return choir_cli_not_yet("--server");
#endif
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    if (v->prompt == NULL) return choir_fail(CHOIR_E_INVALID, "-p TEXT is missing");
    const char *model = arguments->n_positional > 0 ? arguments->positional[0] : "";
    if (v->server == NULL && model[0] == '\0')
        return choir_fail(CHOIR_E_INVALID, "MODEL is missing (only with --server may it be left out)");
    signal(SIGINT, on_interrupt);
    return v->server != NULL ? run_there(v, model) : run_here(v, model);
}

const choir_verb choir_verb_generate = {
    .name = "generate",
    .arguments = "MODEL -p TEXT [-n N] [--temperature T] [--seed S] [--stream] [--json]",
    .summary = "continues a text, here or on a server",
    .example = "choir generate SmolLM2-135M-Instruct.Q4_1 --chat -p 'What is the capital of France?'",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 0,
    .max_positional = 1,
    .run = run,
};
