/* A conversation on the terminal. Ctrl-C stops the answer, not the program; /help lists the commands. */
#include "cli/cli.h"

#include <errno.h>
#include <histedit.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct values {
    choir_cli_engine_values engine;
    choir_cli_sampling_values sampling;
    const char *system;
} values;
static const values defaults = {.sampling = CHOIR_CLI_SAMPLING_DEFAULT};
static const choir_option options[] = {
    {"system", 0, CHOIR_OPTION_TEXT, offsetof(values, system), "TEXT", "the system message", 0, 0},
    CHOIR_CLI_SAMPLING_OPTIONS(values, sampling),
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};

static volatile sig_atomic_t interrupted;
static void on_interrupt(int signal_number)
{
    (void)signal_number;
    interrupted = 1;
}

typedef struct talk {
    const values *v;
    choir_local local;
    json_t *messages;
    bool terminal, colours;
    EditLine *editor;
    History *history;
    char *line; /* of getline, without a terminal */
    size_t line_bytes;
} talk;

static char *prompt_text(EditLine *editor)
{
    (void)editor;
    static char text[] = "you> ";
    return text;
}

static void colour(const talk *t, const char *code)
{
    if (t->colours) fputs(code, stdout);
}

static void open_editor(talk *t)
{
    HistEvent event;
    t->terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
    t->colours = t->terminal && getenv("NO_COLOR") == NULL;
    if (!t->terminal) return;
    t->editor = el_init("choir", stdin, stdout, stderr);
    t->history = history_init();
    if (t->editor == NULL || t->history == NULL) return;
    history(t->history, &event, H_SETSIZE, 500);
    el_set(t->editor, EL_PROMPT, prompt_text);
    el_set(t->editor, EL_EDITOR, "emacs");
    el_set(t->editor, EL_HIST, history, t->history);
    /* Ctrl-C ends the line being typed; the signal handler notes it. */
    el_set(t->editor, EL_SIGNAL, 0);
}

/* The next line without its end, or NULL at the end of input; *cancelled: Ctrl-C at the prompt. */
static const char *read_line(talk *t, bool *cancelled)
{
    *cancelled = false;
    interrupted = 0;
    if (t->editor == NULL) {
        ssize_t n = getline(&t->line, &t->line_bytes, stdin);
        if (n < 0 && errno == EINTR && interrupted) {
            clearerr(stdin);
            *cancelled = true;
            return NULL;
        }
        if (n < 0) return NULL;
        t->line[strcspn(t->line, "\n")] = '\0';
        return t->line;
    }
    int n;
    const char *typed = el_gets(t->editor, &n);
    if (typed == NULL || interrupted) {
        *cancelled = interrupted != 0;
        if (*cancelled) {
            putchar('\n');
            el_reset(t->editor);
        }
        return NULL;
    }
    HistEvent event;
    if (n > 1) history(t->history, &event, H_ENTER, typed);
    free(t->line);
    t->line = strdup(typed);
    if (t->line != NULL) t->line[strcspn(t->line, "\n")] = '\0';
    return t->line;
}

static void add_message(talk *t, const char *role, const char *content)
{
    json_array_append_new(t->messages, json_pack("{s:s, s:s}", "role", role, "content", content));
}

static void reset(talk *t)
{
    json_array_clear(t->messages);
    if (t->v->system != NULL) add_message(t, "system", t->v->system);
}

static void save(const talk *t, const char *path)
{
    while (*path == ' ') path++;
    if (*path == '\0')
        puts("/save needs a file name");
    else if (json_dump_file(t->messages, path, JSON_INDENT(1)) != 0)
        printf("cannot write %s\n", path);
    else
        printf("saved %zu messages to %s\n", json_array_size(t->messages), path);
}

/* True when the line was a command; *quit ends the conversation. */
static bool run_command(talk *t, const char *line, bool *quit)
{
    if (line[0] != '/') return false;
    if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) {
        *quit = true;
    } else if (strcmp(line, "/reset") == 0) {
        reset(t);
        puts("a new conversation");
    } else if (strncmp(line, "/system ", 8) == 0) {
        json_array_clear(t->messages);
        add_message(t, "system", line + 8);
        puts("a new conversation with this system message");
    } else if (strncmp(line, "/save", 5) == 0) {
        save(t, line + 5);
    } else {
        if (strcmp(line, "/help") != 0) printf("'%.40s' is no command\n", line);
        puts("/help           this list\n"
             "/reset          forget the conversation\n"
             "/system TEXT    start anew with a system message\n"
             "/save FILE      write the conversation as JSON\n"
             "/quit           leave (Ctrl-D does too)\n"
             "Ctrl-C stops an answer; at the prompt, twice leaves.");
    }
    return true;
}

static void show(void *user, const char *text, size_t bytes)
{
    (void)user;
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
}

static choir_status answer(talk *t)
{
    uint32_t *ids = NULL;
    size_t n;
    CHOIR_TRY(choir_local_chat_tokens(&t->local, t->messages, &ids, &n));
    uint32_t most = choir_engine_config(t->local.engine)->max_positions;
    if (n + 16 > most) {
        choir_free(ids);
        return choir_fail(CHOIR_E_INVALID,
                          "the conversation has %zu tokens, the context %u: /reset starts anew", n, most);
    }
    choir_request request = {.id = "chat", .tokens = ids, .n_tokens = n};
    choir_cli_set_sampling(&t->v->sampling, choir_engine_config(t->local.engine), &request);
    json_t *result = json_object();
    interrupted = 0;
    colour(t, "\033[36m");
    choir_status status = choir_local_run(&t->local, &request, show, NULL, &interrupted, result);
    colour(t, "\033[0m");
    putchar('\n');
    const char *text = json_string_value(json_object_get(result, "text"));
    if (status == CHOIR_OK && text != NULL) add_message(t, "assistant", text);
    json_decref(result);
    choir_free(ids);
    return status;
}

static void converse(talk *t)
{
    bool quit = false, cancelled, once = false;
    while (!quit) {
        const char *line = read_line(t, &cancelled);
        if (line == NULL && cancelled && !once) {
            puts("(Ctrl-C again, Ctrl-D or /quit leaves)");
            once = true;
            continue;
        }
        if (line == NULL) break;
        once = false;
        if (line[strspn(line, " \t")] == '\0' || run_command(t, line, &quit)) continue;
        add_message(t, "user", line);
        if (answer(t) == CHOIR_OK) continue;
        fprintf(stderr, "choir: %s\n", choir_error_message());
        json_array_remove(t->messages, json_array_size(t->messages) - 1);
    }
    if (t->terminal) putchar('\n');
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    talk t = {.v = verb_values, .messages = json_array()};
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    choir_status status;
    CHOIR_TRY_TO(done, status, choir_cli_engine_options(&t.v->engine, &o));
    CHOIR_TRY_TO(done, status, choir_local_open(arguments->positional[0], &o, &t.local));
    struct sigaction action = {.sa_handler = on_interrupt}; /* no SA_RESTART: reads are interrupted */
    sigaction(SIGINT, &action, NULL);
    open_editor(&t);
    reset(&t);
    if (t.terminal) printf("%s; /help lists the commands\n", choir_engine_config(t.local.engine)->name);
    converse(&t);
done:
    if (t.editor != NULL) el_end(t.editor);
    if (t.history != NULL) history_end(t.history);
    free(t.line);
    json_decref(t.messages);
    choir_local_close(&t.local);
    return status;
}

const choir_verb choir_verb_chat = {
    .name = "chat",
    .arguments = "MODEL [--system TEXT]",
    .summary = "a conversation on the terminal",
    .example = "choir chat SmolLM2-135M-Instruct.Q4_1 --system 'You answer in one sentence.'",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .run = run,
};
