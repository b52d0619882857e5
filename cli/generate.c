/* One answer to one prompt, from a model in this process or from a server. */
#include "cli/answer.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { MAX_PROMPT_BYTES = 64 << 20 };

typedef struct values {
    choir_cli_engine_values engine;
    choir_cli_sampling_values sampling;
    choir_cli_server_values server;
    choir_cli_adapter_values adapters;
    const char *prompt, *system;
    bool chat, stream, json;
} values;
static const values defaults = {.sampling = CHOIR_CLI_SAMPLING_DEFAULT,
                                .adapters = CHOIR_CLI_ADAPTER_DEFAULT};
// clang-format off
static const choir_option options[] = {
    {"prompt", 'p', CHOIR_OPTION_TEXT, offsetof(values, prompt), "TEXT", "what to continue; - reads it from the standard input", 0, 0},
    {"chat", 0, CHOIR_OPTION_FLAG, offsetof(values, chat), NULL, "the prompt is a user's message, put into the model's chat template", 0, 0},
    {"system", 0, CHOIR_OPTION_TEXT, offsetof(values, system), "TEXT", "a system message (with --chat)", 0, 0},
    {"stream", 0, CHOIR_OPTION_FLAG, offsetof(values, stream), NULL, "print the text as it comes", 0, 0},
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL, "one JSON object: text, token_ids, finish_reason, usage, timings", 0, 0},
    CHOIR_CLI_SERVER_OPTIONS(values, server),
    CHOIR_CLI_ANSWER_ADAPTER_OPTIONS(values, adapters),
    CHOIR_CLI_SAMPLING_OPTIONS(values, sampling),
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};
// clang-format on

static void show(const char *text, size_t bytes)
{
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
}

static json_t *messages_of(const values *v, const char *prompt)
{
    json_t *messages = json_array();
    if (v->system != NULL)
        json_array_append_new(messages,
                              json_pack("{s:s, s:s}", "role", "system", "content", v->system));
    json_array_append_new(messages, json_pack("{s:s, s:s}", "role", "user", "content", prompt));
    return messages;
}

/* The standard input to its end; *out is choir_free()d. */
static choir_status read_input(char **out)
{
    size_t n = 0, room = 1 << 16;
    char *text = choir_alloc(CHOIR_MEM_OTHER, room), *grown;
    while (text != NULL) {
        ssize_t got = read(STDIN_FILENO, text + n, room - 1 - n);
        if (got <= 0) {
            text[n] = '\0';
            *out = text;
            return got == 0 ? CHOIR_OK : choir_fail(CHOIR_E_IO, "cannot read the input: %m");
        }
        n += (size_t)got;
        if (n + 1 < room) continue;
        grown = room < MAX_PROMPT_BYTES ? choir_realloc(CHOIR_MEM_OTHER, text, room * 2) : NULL;
        if (grown == NULL) choir_free(text);
        text = grown;
        room *= 2;
    }
    return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a prompt of more than %zu bytes", n);
}

static void print_result(const values *v, json_t *result)
{
    const json_t *text = json_object_get(result, "text");
    if (v->json) {
        choir_cli_print_json(json_incref(result), false);
        return;
    }
    if (!v->stream) fwrite(json_string_value(text), 1, json_string_length(text), stdout);
    putchar('\n');
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    const char *model = arguments->n_positional > 0 ? arguments->positional[0] : "";
    choir_answerer answerer = {0};
    char *input = NULL;
    json_t *result = json_object(), *messages = NULL;
    choir_status status;
    if (strcmp(v->prompt, "-") == 0) CHOIR_TRY_TO(done, status, read_input(&input));
    const char *prompt = input != NULL ? input : v->prompt;
    CHOIR_TRY_TO(done, status,
                 choir_answerer_open(model, &v->server, &v->engine, &v->adapters, &answerer));
    if (v->chat) messages = messages_of(v, prompt);
    const choir_ask ask = {.prompt = prompt,
                           .messages = messages,
                           .sampling = &v->sampling,
                           .show = v->stream && !v->json ? show : NULL};
    status = choir_answer(&answerer, &ask, result);
    if (status == CHOIR_OK || status == CHOIR_E_CANCELLED) print_result(v, result);
done:
    json_decref(result);
    json_decref(messages);
    choir_free(input);
    choir_answerer_close(&answerer);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    if (v->prompt == NULL) return choir_fail(CHOIR_E_INVALID, "-p TEXT is missing");
    if (v->server.target == NULL && arguments->n_positional == 0)
        return choir_fail(CHOIR_E_INVALID,
                          "MODEL is missing (only with --server may it be left out)");
    CHOIR_TRY(choir_cli_adapters_check(&v->adapters));
    if (v->system != NULL && !v->chat)
        return choir_fail(CHOIR_E_INVALID, "--system goes with --chat");
    return CHOIR_OK;
}

const choir_verb choir_verb_generate = {
    .name = "generate",
    .arguments =
        "MODEL -p TEXT [-n N] [--temperature T] [--seed S] [--adapter DIR] [--stream] [--json]",
    .summary = "continues a text or answers a question, here or on a server",
    .example =
        "choir generate SmolLM2-135M-Instruct.Q4_1 --chat -p 'What is the capital of France?'",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 0,
    .max_positional = 1,
    .check = check,
    .run = run,
};
