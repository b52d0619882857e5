#include "cli/cli.h"

#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const choir_verb *const verbs[] = {
    &choir_verb_serve,    &choir_verb_chat,       &choir_verb_generate,   &choir_verb_logits,
    &choir_verb_tokenize, &choir_verb_detokenize, &choir_verb_perplexity, &choir_verb_info,
    &choir_verb_bench,    &choir_verb_pack,       &choir_verb_upcycle,    &choir_verb_adapter,
    &choir_verb_merge,
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

/* Verbs of the contract that are not there yet. */
static const char *const later[] = {"quantize", "convert", "prune", "router",
                                    "data",     "tune",    "eval",  "monitor"};
enum { N_LATER = sizeof later / sizeof *later };

static void print_usage(FILE *to)
{
    fprintf(
        to,
        "choir %s: a mixture-of-experts serving engine\n\nusage: choir VERB [MODEL] [options]\n\n",
        CHOIR_VERSION);
    for (int i = 0; i < N_VERBS; i++)
        fprintf(to, "  %-11s %s\n", verbs[i]->name, verbs[i]->summary);
    fprintf(to, "\nnot there yet: ");
    for (int i = 0; i < N_LATER; i++) fprintf(to, "%s%s", i > 0 ? ", " : "", later[i]);
    fprintf(to, "\n\nMODEL is a Hugging Face folder, a .gguf or .choir file, or a name in the "
                "model cache.\n"
                "choir VERB --help tells a verb's options, with an example.\n\nexample:\n"
                "  choir chat SmolLM2-135M-Instruct.Q4_1\n");
}

static void print_verb_help(const choir_verb *v)
{
    printf("usage: choir %s %s\n\n%s\n\n", v->name, v->arguments, v->summary);
    choir_options_print_help(v->options, v->n_options, v->defaults, stdout);
    printf("\nexample:\n  %s\n", v->example);
}

static int fail(int code)
{
    fprintf(stderr, "choir: %s\n", choir_error_message());
    return code;
}

static int run_verb(const choir_verb *v, int argc, char **argv)
{
    choir_arguments arguments;
    void *values = malloc(v->values_bytes);
    if (values == NULL) return 1;
    memcpy(values, v->defaults, v->values_bytes);
    int code = 0;
    choir_status status =
        choir_options_parse(v->options, v->n_options, argc, argv, values, &arguments);
    if (status != CHOIR_OK) {
        code = fail(2);
    } else if (arguments.n_positional < v->min_positional ||
               arguments.n_positional > v->max_positional) {
        fprintf(stderr, "choir: usage: choir %s %s\n", v->name, v->arguments);
        code = 2;
    } else if (v->check != NULL && (status = v->check(values, &arguments)) != CHOIR_OK) {
        code = fail(2);
    } else if ((status = v->run(values, &arguments)) != CHOIR_OK) {
        code = fail(1);
    }
    choir_options_free(&arguments);
    free(values);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        perror("choir: cannot write the output");
        if (code == 0) code = 1;
    }
    return code;
}

static int unknown_verb(const char *name)
{
    const char *names[N_VERBS + N_LATER];
    for (int i = 0; i < N_VERBS; i++) names[i] = verbs[i]->name;
    for (int i = 0; i < N_LATER; i++) names[N_VERBS + i] = later[i];
    fprintf(stderr, "choir: '%.80s' is no verb; the nearest is '%s' (choir --help lists all)\n",
            name, choir_nearest(name, names, N_VERBS + N_LATER));
    return 2;
}

static const choir_verb *find_verb(const char *name)
{
    for (int i = 0; i < N_VERBS; i++)
        if (strcmp(verbs[i]->name, name) == 0) return verbs[i];
    return NULL;
}

int main(int argc, char **argv)
{
    signal(SIGXFSZ, SIG_IGN); /* a limit on files is an error like a full disk */
    setlocale(LC_CTYPE, "");
    if (argc < 2) {
        print_usage(stderr);
        return 2;
    }
    const char *name = argv[1];
    bool help = strcmp(name, "help") == 0, man = help && argc > 3 && strcmp(argv[2], "--man") == 0;
    if (help && argc > 2) name = argv[man ? 3 : 2];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_usage(stdout);
        return 0;
    }
    if (strcmp(name, "--version") == 0) {
        puts("choir " CHOIR_VERSION);
        return 0;
    }
    for (int i = 0; i < N_LATER; i++)
        if (strcmp(name, later[i]) == 0) {
            fprintf(stderr,
                    "choir: the verb '%s' is not there yet; the README's table says what works\n",
                    name);
            return 1;
        }
    const choir_verb *v = find_verb(name);
    if (v == NULL) return unknown_verb(name);
    for (int i = 2; i < argc && strcmp(argv[i], "--") != 0; i++)
        help = help || strcmp(argv[i], "--help") == 0;
    if (help) {
        (man ? choir_cli_print_man(v, stdout) : print_verb_help(v));
        return 0;
    }
    return run_verb(v, argc - 1, argv + 1);
}
