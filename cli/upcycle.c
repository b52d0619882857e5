/* A dense model and LoRA adapters on its MLP become a mixture of experts. */
#include "cli/cli.h"

#include "tune/tune.h"

#include <stdio.h>
#include <string.h>

typedef struct values {
    choir_option_list experts;
    const char *out, *samples, *gate_init, *quant;
    uint64_t top_k, threads;
    double sharpness;
} values;
static const values defaults = {.samples = "models/domains",
                                .gate_init = "hidden",
                                .quant = "q8_0",
                                .top_k = 2,
                                .sharpness = 4};
static const choir_option options[] = {
    {"expert", 0, CHOIR_OPTION_LIST, offsetof(values, experts), "NAME=DIR",
     "a PEFT LoRA adapter on the MLP; once for each expert beside the base", 0, 0},
    {"out", 'o', CHOIR_OPTION_TEXT, offsetof(values, out), "OUT.gguf", "the new model", 0, 0},
    {"samples", 0, CHOIR_OPTION_TEXT, offsetof(values, samples), "DIR",
     "DIR/NAME/sample.txt for each expert, DIR/base/sample.txt for the base", 0, 0},
    {"gate-init", 0, CHOIR_OPTION_TEXT, offsetof(values, gate_init), "hidden|uniform",
     "gates from the samples' mean hidden states, or zero", 0, 0},
    {"sharpness", 0, CHOIR_OPTION_REAL, offsetof(values, sharpness), "T", "length of a gate's row", 0.001, 1e6},
    {"top-k", 'k', CHOIR_OPTION_COUNT, offsetof(values, top_k), "K", "experts per token", 1, 64},
    {"quant", 0, CHOIR_OPTION_TEXT, offsetof(values, quant), "TYPE",
     "of the experts: q8_0, q4_1, f16, bf16 or f32", 0, 0},
    {"threads", 't', CHOIR_OPTION_COUNT, offsetof(values, threads), "N",
     "worker threads; 0: one per core", 0, 256},
};

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    (void)arguments;
    if (v->out == NULL) return choir_fail(CHOIR_E_INVALID, "-o OUT.gguf is missing");
    if (v->experts.n == 0) return choir_fail(CHOIR_E_INVALID, "--expert NAME=DIR is missing");
    for (uint32_t i = 0; i < v->experts.n; i++) {
        const char *equals = strchr(v->experts.item[i], '=');
        size_t n = equals == NULL ? 0 : (size_t)(equals - v->experts.item[i]);
        if (n == 0 || n > 40 || strcspn(v->experts.item[i], "/.") < n)
            return choir_fail(CHOIR_E_INVALID,
                              "--expert is '%.80s', must be NAME=DIR with a name of 1 to 40 characters "
                              "without / and .",
                              v->experts.item[i]);
    }
    if (strcmp(v->gate_init, "hidden") != 0 && strcmp(v->gate_init, "uniform") != 0)
        return choir_fail(CHOIR_E_INVALID, "--gate-init is '%.40s', must be hidden or uniform", v->gate_init);
    return CHOIR_OK;
}

static choir_status parse_quant(const char *text, choir_dtype *out)
{
    for (int d = 0; d < CHOIR_N_DTYPES; d++)
        if (strcasecmp(choir_dtype_text(d), text) == 0) {
            *out = (choir_dtype)d;
            return CHOIR_OK;
        }
    return choir_fail(CHOIR_E_INVALID, "--quant is '%.40s', must be q8_0, q4_1, f16, bf16 or f32", text);
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    char base[4096], samples[CHOIR_MAX_LIST + 1][1024], names[CHOIR_MAX_LIST][48];
    choir_upcycle_expert experts[CHOIR_MAX_LIST];
    choir_upcycle_options o = CHOIR_UPCYCLE_OPTIONS_DEFAULT;
    CHOIR_TRY(choir_cli_find_model(arguments->positional[0], base, sizeof base));
    CHOIR_TRY(parse_quant(v->quant, &o.quant));
    for (uint32_t i = 0; i < v->experts.n; i++) {
        const char *equals = strchr(v->experts.item[i], '=');
        snprintf(names[i], sizeof names[i], "%.*s", (int)(equals - v->experts.item[i]), v->experts.item[i]);
        snprintf(samples[i], sizeof samples[i], "%.900s/%s/sample.txt", v->samples, names[i]);
        experts[i] = (choir_upcycle_expert){names[i], equals + 1, samples[i]};
    }
    snprintf(samples[CHOIR_MAX_LIST], sizeof samples[0], "%.900s/base/sample.txt", v->samples);
    o.base = base;
    o.out = v->out;
    o.base_sample = samples[CHOIR_MAX_LIST];
    o.experts = experts;
    o.n_experts = v->experts.n;
    o.top_k = (uint32_t)v->top_k;
    o.gates = strcmp(v->gate_init, "hidden") == 0 ? CHOIR_GATES_HIDDEN : CHOIR_GATES_UNIFORM;
    o.sharpness = v->sharpness;
    o.n_threads = (uint32_t)v->threads;
    o.show_progress = true;
    return choir_upcycle(&o);
}

const choir_verb choir_verb_upcycle = {
    .name = "upcycle",
    .arguments = "BASE --expert NAME=ADAPTER_DIR… -o OUT.gguf",
    .summary = "a dense model and LoRA adapters become a mixture of experts",
    .example = "choir upcycle SmolLM2-135M-Instruct.Q4_1 --expert python=models/adapters/python -o "
               "moe.gguf",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .check = check,
    .run = run,
};
