/* A dense model and LoRA adapters on its MLP become a mixture of experts. */
#include "cli/cli.h"

typedef struct values {
    const char *out;
} values;
static const values defaults = {0};
static const choir_option options[] = {
    {"out", 'o', CHOIR_OPTION_TEXT, offsetof(values, out), "OUT", "the new model", 0, 0},
};

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    (void)verb_values;
    (void)arguments;
    return choir_cli_not_yet("upcycle");
}

const choir_verb choir_verb_upcycle = {
    .name = "upcycle",
    .arguments = "BASE --expert NAME=ADAPTER_DIR… -o OUT",
    .summary = "a dense model and LoRA adapters become a mixture of experts",
    .example = "choir upcycle SmolLM2-135M-Instruct.Q4_1 --expert python=models/adapters/python -o "
               "moe.gguf",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .run = run,
};
