/* A conversation on the terminal. Ctrl-C stops the answer, not the program; /help lists the
 * commands. */
#include "cli/answer.h"

#include <errno.h>
#include <histedit.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <wchar.h>

typedef struct values {
    choir_cli_engine_values engine;
    choir_cli_sampling_values sampling;
    choir_cli_server_values server;
    choir_cli_adapter_values adapters;
    const char *system;
} values;
static const values defaults = {.sampling = CHOIR_CLI_SAMPLING_DEFAULT,
                                .adapters = CHOIR_CLI_ADAPTER_DEFAULT};
static const choir_option options[] = {
    {"system", 0, CHOIR_OPTION_TEXT, offsetof(values, system), "TEXT", "the system message", 0, 0},
    CHOIR_CLI_SERVER_OPTIONS(values, server),
    CHOIR_CLI_ANSWER_ADAPTER_OPTIONS(values, adapters),
    CHOIR_CLI_SAMPLING_OPTIONS(values, sampling),
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};

typedef struct talk {
    const values *v;
    choir_answerer answerer;
    json_t *messages, *last; /* last: the result of the newest answer, or NULL */
    const char *system;
    char *owned_system;
    bool terminal, colours;
    EditLine *editor;
    History *history;
    char *line; /* the newest, without its end */
    size_t line_bytes;
} talk;

static char *prompt_text(EditLine *editor)
{
    (void)editor;
    static char text[] = "> ";
    return text;
}

/* Waits for input or Ctrl-C (false). The signal is let in only while waiting, so that none is lost
 * between the look at the flag and the wait. */
static bool wait_for_input(void)
{
    sigset_t inside, outside;
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    sigemptyset(&inside);
    sigaddset(&inside, SIGINT);
    pthread_sigmask(SIG_BLOCK, &inside, &outside);
    while (!choir_cli_interrupted && ppoll(&input, 1, NULL, &outside) < 0 && errno == EINTR)
        continue;
    pthread_sigmask(SIG_SETMASK, &outside, NULL);
    return !choir_cli_interrupted;
}

/* libedit's own reader starts a read again after a signal; this one comes back, for Ctrl-C. */
static int read_character(EditLine *editor, wchar_t *out)
{
    mbstate_t state = {0};
    (void)editor;
    for (int i = 0; i < MB_LEN_MAX; i++) {
        char byte;
        if (!wait_for_input()) return -1;
        ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n <= 0) return n < 0 ? -1 : 0;
        size_t used = mbrtowc(out, &byte, 1, &state);
        if (used == (size_t)-2) continue; /* more bytes belong to it */
        if (used == (size_t)-1) *out = L'?';
        return 1;
    }
    *out = L'?';
    return 1;
}

static void open_editor(talk *t)
{
    HistEvent event;
    t->terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
    const char *no_colour = getenv("NO_COLOR"), *term = getenv("TERM");
    t->colours = t->terminal && (no_colour == NULL || no_colour[0] == '\0') &&
                 (term == NULL || strcmp(term, "dumb") != 0);
    if (!t->terminal) return;
    t->editor = el_init("choir", stdin, stdout, stderr);
    t->history = history_init();
    if (t->editor == NULL || t->history == NULL) return;
    history(t->history, &event, H_SETSIZE, 500);
    el_set(t->editor, EL_PROMPT, prompt_text);
    el_set(t->editor, EL_EDITOR, "emacs");
    el_set(t->editor, EL_HIST, history, t->history);
    el_set(t->editor, EL_GETCFN, read_character);
}

typedef enum input { INPUT_LINE, INPUT_END, INPUT_CLEARED, INPUT_INTERRUPTED } input;

static input read_plain(talk *t)
{
    ssize_t n = getline(&t->line, &t->line_bytes, stdin);
    if (n >= 0) {
        t->line[strcspn(t->line, "\n")] = '\0';
        return INPUT_LINE;
    }
    if (!choir_cli_interrupted) return INPUT_END;
    clearerr(stdin);
    return INPUT_INTERRUPTED;
}

/* The next line in t->line. Ctrl-C clears what was typed (CLEARED), or was pressed at an empty
 * prompt. */
static input read_line(talk *t)
{
    HistEvent event;
    int n = 0;
    choir_cli_interrupted = 0;
    if (t->editor == NULL) return read_plain(t);
    const char *typed = el_gets(t->editor, &n);
    if (choir_cli_interrupted) {
        const LineInfo *info = el_line(t->editor);
        bool empty = info->lastchar == info->buffer;
        putchar('\n');
        el_reset(t->editor);
        return empty ? INPUT_INTERRUPTED : INPUT_CLEARED;
    }
    if (typed == NULL || n <= 0) return INPUT_END;
    if (n > 1) history(t->history, &event, H_ENTER, typed);
    free(t->line);
    t->line = strdup(typed);
    if (t->line == NULL) return INPUT_END;
    t->line[strcspn(t->line, "\n")] = '\0';
    return INPUT_LINE;
}

static void add_message(talk *t, const char *role, const char *content)
{
    json_t *message = json_pack("{s:s, s:s}", "role", role, "content", content);
    if (message == NULL)
        puts("(a line that is not UTF-8 is left out)");
    else
        json_array_append_new(t->messages, message);
}

static void reset(talk *t)
{
    json_array_clear(t->messages);
    if (t->system != NULL) add_message(t, "system", t->system);
}

static void do_help(talk *t, const char *text);

static void do_reset(talk *t, const char *text)
{
    (void)text;
    reset(t);
    puts("a new conversation");
}

static void do_system(talk *t, const char *text)
{
    free(t->owned_system);
    t->owned_system = text[0] != '\0' ? strdup(text) : NULL;
    t->system = t->owned_system;
    reset(t);
    puts(t->system != NULL ? "a new conversation with this system message"
                           : "a new conversation without a system message");
}

static void do_save(talk *t, const char *text)
{
    if (text[0] == '\0')
        puts("/save needs a file name");
    else if (json_dump_file(t->messages, text, JSON_INDENT(1)) != 0)
        printf("cannot write %s: %s\n", text, strerror(errno));
    else
        printf("saved %zu messages to %s\n", json_array_size(t->messages), text);
}

static double number(const json_t *result, const char *group, const char *name)
{
    return json_number_value(json_object_get(json_object_get(result, group), name));
}

static void do_stats(talk *t, const char *text)
{
    (void)text;
    if (t->last == NULL) {
        puts("nothing was answered yet");
        return;
    }
    double n = number(t->last, "usage", "output_tokens"),
           ms = number(t->last, "timings", "decode_ms");
    printf(
        "prompt %.0f tokens (%.0f from the cache), first token after %.0f ms; answer %.0f tokens",
        number(t->last, "usage", "prompt_tokens"), number(t->last, "usage", "cached_tokens"),
        number(t->last, "timings", "queue_ms") + number(t->last, "timings", "prefill_ms"), n);
    if (n > 1 && ms > 0) printf(", %.1f tokens/s", (n - 1) / ms * 1000);
    putchar('\n');
}

static const struct command {
    const char *name, *argument, *help;
    void (*run)(talk *t, const char *text); /* NULL: leaves */
} commands[] = {
    {"/help", "", "this list", do_help},
    {"/reset", "", "forget the conversation", do_reset},
    {"/system", " TEXT", "start anew with a system message", do_system},
    {"/save", " FILE", "write the conversation as JSON", do_save},
    {"/stats", "", "tokens and speed of the last answer", do_stats},
    {"/quit", "", "leave (Ctrl-D does too)", NULL},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void do_help(talk *t, const char *text)
{
    (void)t;
    (void)text;
    for (int i = 0; i < N_COMMANDS; i++)
        printf("%s%-*s %s\n", commands[i].name, 14 - (int)strlen(commands[i].name),
               commands[i].argument, commands[i].help);
    puts("Ctrl-C stops an answer; pressed twice at an empty prompt it leaves.");
}

/* False: leave. */
static bool run_command(talk *t, char *line)
{
    size_t n = strcspn(line, " \t");
    const char *text = line + n + strspn(line + n, " \t");
    if (n == 5 && strncmp(line, "/exit", 5) == 0) return false;
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strlen(commands[i].name) != n || strncmp(line, commands[i].name, n) != 0) continue;
        if (commands[i].run == NULL) return false;
        commands[i].run(t, text);
        return true;
    }
    printf("'%.*s' is no command; /help lists them\n", (int)(n < 40 ? n : 40), line);
    return true;
}

static void show(const char *text, size_t bytes)
{
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
}

/* Answers the messages; what had come before Ctrl-C stays in the conversation. */
static choir_status answer(talk *t)
{
    const choir_ask ask = {.messages = t->messages, .sampling = &t->v->sampling, .show = show};
    json_t *result = json_object();
    if (t->colours) fputs("\033[36m", stdout);
    choir_status status = choir_answer(&t->answerer, &ask, result);
    if (t->colours) fputs("\033[0m", stdout);
    const char *text = json_string_value(json_object_get(result, "text"));
    const char *finish = json_string_value(json_object_get(result, "finish_reason"));
    if (status == CHOIR_OK || text[0] != '\0') putchar('\n');
    if (status == CHOIR_E_CANCELLED) puts("(stopped)");
    if (finish != NULL && strcmp(finish, "length") == 0)
        puts(t->v->sampling.max_tokens > 0 &&
                     number(result, "usage", "output_tokens") >= (double)t->v->sampling.max_tokens
                 ? "(cut at --max-tokens)"
                 : "(the context is full: /reset starts anew)");
    if (status == CHOIR_OK || (status == CHOIR_E_CANCELLED && text[0] != '\0')) {
        /* The very string, not its C text: an answer may hold a NUL. */
        json_array_append_new(t->messages, json_pack("{s:s, s:O}", "role", "assistant", "content",
                                                     json_object_get(result, "text")));
        json_decref(t->last);
        t->last = json_incref(result);
    }
    json_decref(result);
    return status;
}

static void converse(talk *t)
{
    for (bool warned = false;;) {
        input got = read_line(t);
        if (got == INPUT_END || (got == INPUT_INTERRUPTED && warned)) break;
        if (got == INPUT_INTERRUPTED) puts("(Ctrl-C again, Ctrl-D or /quit leaves)");
        warned = got == INPUT_INTERRUPTED;
        if (got != INPUT_LINE || t->line[strspn(t->line, " \t")] == '\0') continue;
        if (t->line[0] == '/') {
            if (!run_command(t, t->line)) return;
            continue;
        }
        size_t before = json_array_size(t->messages);
        add_message(t, "user", t->line);
        if (json_array_size(t->messages) == before || answer(t) == CHOIR_OK) continue;
        /* Nothing was answered: the question is taken back, so that it can be asked anew. */
        if (json_array_size(t->messages) == before + 1) json_array_remove(t->messages, before);
        fflush(stdout);
        if (!choir_cli_interrupted) fprintf(stderr, "choir: %s\n", choir_error_message());
    }
    if (t->terminal) putchar('\n');
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    talk t = {.v = verb_values, .messages = json_array()};
    const char *model = arguments->n_positional > 0 ? arguments->positional[0] : "";
    choir_status status;
    CHOIR_TRY_TO(
        done, status,
        choir_answerer_open(model, &t.v->server, &t.v->engine, &t.v->adapters, &t.answerer));
    open_editor(&t);
    t.system = t.v->system;
    reset(&t);
    if (t.terminal) printf("%s; /help lists the commands\n", model);
    converse(&t);
done:
    if (t.editor != NULL) el_end(t.editor);
    if (t.history != NULL) history_end(t.history);
    free(t.line);
    free(t.owned_system);
    json_decref(t.messages);
    json_decref(t.last);
    choir_answerer_close(&t.answerer);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    if (v->server.target == NULL && arguments->n_positional == 0)
        return choir_fail(CHOIR_E_INVALID,
                          "MODEL is missing (only with --server may it be left out)");
    CHOIR_TRY(choir_cli_adapters_check(&v->adapters));
    return CHOIR_OK;
}

const choir_verb choir_verb_chat = {
    .name = "chat",
    .arguments = "MODEL [--system TEXT] [--adapter DIR] [--server HOST:PORT]",
    .summary = "a conversation on the terminal, with a model here or on a server",
    .example = "choir chat SmolLM2-135M-Instruct.Q4_1 --system 'You answer in one sentence.'",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 0,
    .max_positional = 1,
    .check = check,
    .run = run,
};
