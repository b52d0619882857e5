/* A model into a file that streams: experts in runs of pages, everything in the kernels' layout. */
#include "cli/cli.h"

#include "tune/tune.h"

#include <stdio.h>
#include <string.h>

typedef struct values {
    const char *out, *quant, *small, *usage;
    uint64_t threads;
} values;
static const values defaults = {.threads = 0};
static const choir_option options[] = {
    {"output", 'o', CHOIR_OPTION_TEXT, offsetof(values, out), "F.choir", "the file to write", 0, 0},
    {"quant", 0, CHOIR_OPTION_TEXT, offsetof(values, quant), "TYPE",
     "matrices become q4_0, q8_0 or bf16; gates and norms stay f32", 0, 0},
    {"small", 0, CHOIR_OPTION_TEXT, offsetof(values, small), "TYPE",
     "a second copy of every expert as q2, q3 or q4_0, for --small-experts", 0, 0},
    {"usage", 0, CHOIR_OPTION_TEXT, offsetof(values, usage), "ROUTES.jsonl",
     "with --small: what `choir logits --routes` wrote tells which experts are rare", 0, 0},
    {"threads", 't', CHOIR_OPTION_COUNT, offsetof(values, threads), "N",
     "worker threads; 0: one per core", 0, 256},
};

static bool parse_quant(const char *text, choir_dtype *out)
{
    return choir_cli_parse_dtype(text, out) && (*out == CHOIR_Q4_0 || *out == CHOIR_Q8_0 ||
                                                *out == CHOIR_BF16 || *out == CHOIR_N_DTYPES);
}

static bool parse_small(const char *text, choir_dtype *out)
{
    return choir_cli_parse_dtype(text, out) &&
           (*out == CHOIR_Q2 || *out == CHOIR_Q3 || *out == CHOIR_Q4_0 || *out == CHOIR_N_DTYPES);
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    char path[4096];
    choir_pack_options o = CHOIR_PACK_OPTIONS_DEFAULT;
    o.out = v->out;
    o.usage = v->usage;
    o.n_threads = (uint32_t)v->threads;
    o.show_progress = true;
    CHOIR_TRY(choir_cli_find_model(arguments->positional[0], path, sizeof path));
    o.model = path;
    if (!parse_quant(v->quant, &o.quant))
        return choir_fail(CHOIR_E_INVALID, "--quant is '%.20s'", v->quant);
    if (!parse_small(v->small, &o.small))
        return choir_fail(CHOIR_E_INVALID, "--small is '%.20s'", v->small);
    choir_cli_catch_interrupts();
    o.interrupted = &choir_cli_interrupted;
    CHOIR_TRY(choir_pack_write(&o));
    printf("%s\n", v->out);
    return CHOIR_OK;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    choir_dtype dtype;
    (void)arguments;
    if (v->out == NULL) return choir_fail(CHOIR_E_INVALID, "-o F.choir is missing");
    size_t n = strlen(v->out);
    if (n < 7 || strcmp(v->out + n - 6, ".choir") != 0 || n > 4000)
        return choir_fail(CHOIR_E_INVALID, "-o is '%.80s', must end in .choir", v->out);
    if (!parse_quant(v->quant, &dtype))
        return choir_fail(CHOIR_E_INVALID, "--quant is '%.20s', must be q4_0, q8_0 or bf16",
                          v->quant);
    if (!parse_small(v->small, &dtype))
        return choir_fail(CHOIR_E_INVALID, "--small is '%.20s', must be q2, q3 or q4_0", v->small);
    if (v->usage != NULL && v->small == NULL)
        return choir_fail(CHOIR_E_INVALID, "--usage says which experts are rare, for --small TYPE");
    return CHOIR_OK;
}

const choir_verb choir_verb_pack = {
    .name = "pack",
    .arguments =
        "MODEL -o F.choir [--quant q4_0|q8_0|bf16] [--small q2|q3|q4_0] [--usage ROUTES.jsonl]",
    .summary = "a model into one file that streams: experts page-aligned, each with its checksum",
    .example = "choir pack demo-moe-q8_0 -o demo.choir",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .check = check,
    .run = run,
};
