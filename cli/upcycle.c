/* A dense model and LoRA adapters on its MLP become a mixture of experts. */
#include "cli/cli.h"
#include "tune/tune.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

enum { MAX_EXPERTS = CHOIR_MAX_UPCYCLE_ADAPTERS, NAME_BYTES = 65, PATH_BYTES = 4096 };

typedef struct values {
    choir_option_list experts, sample;
    const char *out, *samples, *gate_init, *quant;
    double temperature;
    uint64_t top_k, shard_size, threads;
} values;
static const values defaults = {
    .gate_init = "hidden", .temperature = 4, .top_k = 2, .shard_size = (uint64_t)4 << 30};
// clang-format off
static const choir_option options[] = {
    {"expert", 0, CHOIR_OPTION_LIST, offsetof(values, experts), "NAME=DIR", "a LoRA adapter on the MLP; given again for each expert", 0, 0},
    {"out", 'o', CHOIR_OPTION_TEXT, offsetof(values, out), "OUT", "NAME.gguf, or a folder to be made (safetensors)", 0, 0},
    {"gate-init", 0, CHOIR_OPTION_TEXT, offsetof(values, gate_init), "KIND", "hidden: from the domains' sample texts; uniform: zero", 0, 0},
    {"samples", 0, CHOIR_OPTION_TEXT, offsetof(values, samples), "DIR", "holds NAME/sample.txt for every expert, and base/sample.txt", 0, 0},
    {"sample", 0, CHOIR_OPTION_LIST, offsetof(values, sample), "NAME=FILE", "one expert's sample text; NAME base is the base's", 0, 0},
    {"gate-temperature", 0, CHOIR_OPTION_REAL, offsetof(values, temperature), "T", "length of the gates' rows: higher decides harder", 0.001, 1000},
    {"top-k", 0, CHOIR_OPTION_COUNT, offsetof(values, top_k), "K", "experts a token", 1, MAX_EXPERTS + 1},
    {"quant", 0, CHOIR_OPTION_TEXT, offsetof(values, quant), "TYPE", "q8_0, q4_1, f16, bf16, f32; left out: q8_0 for GGUF, bf16 for a folder", 0, 0},
    {"shard-size", 0, CHOIR_OPTION_SIZE, offsetof(values, shard_size), "4GiB", "a folder's files are at most so large", 1, 0x1p53},
    {"threads", 't', CHOIR_OPTION_COUNT, offsetof(values, threads), "N", "worker threads; 0: one per core", 0, 256},
};
// clang-format on

/* What stands behind "NAME=" in a list, or NULL. */
static const char *value_of(const choir_option_list *list, const char *name)
{
    size_t n = strlen(name);
    for (uint32_t i = 0; i < list->n; i++)
        if (strncmp(list->item[i], name, n) == 0 && list->item[i][n] == '=')
            return list->item[i] + n + 1;
    return NULL;
}

/* Names and sample paths, where choir_upcycle finds them until it returns. */
typedef struct plan {
    choir_upcycle_expert experts[MAX_EXPERTS];
    char names[MAX_EXPERTS][NAME_BYTES];
    char samples[MAX_EXPERTS + 1][PATH_BYTES]; /* the last is the base's */
} plan;

/* --sample NAME=FILE, else DIR/NAME/sample.txt of --samples. */
static choir_status find_sample(const values *v, const char *name, char *path, const char **out)
{
    *out = NULL;
    if (strcmp(v->gate_init, "uniform") == 0) return CHOIR_OK;
    *out = value_of(&v->sample, name);
    if (*out != NULL) return CHOIR_OK;
    if (v->samples == NULL)
        return choir_fail(CHOIR_E_INVALID,
                          "no sample text for '%s': give --sample %s=FILE, --samples DIR, or "
                          "--gate-init uniform",
                          name, name);
    if (snprintf(path, PATH_BYTES, "%s/%s/sample.txt", v->samples, name) >= PATH_BYTES)
        return choir_fail(CHOIR_E_INVALID, "--samples is longer than %d bytes", PATH_BYTES - 100);
    *out = path;
    return CHOIR_OK;
}

static choir_status plan_experts(const values *v, plan *p, choir_upcycle_options *o)
{
    for (uint32_t i = 0; i < v->experts.n; i++) {
        const char *item = v->experts.item[i], *equals = strchr(item, '=');
        size_t n = (size_t)(equals - item);
        memcpy(p->names[i], item, n);
        p->names[i][n] = '\0';
        p->experts[i] = (choir_upcycle_expert){.name = p->names[i], .adapter = equals + 1};
        CHOIR_TRY(find_sample(v, p->names[i], p->samples[i], &p->experts[i].sample_text));
    }
    o->experts = p->experts;
    o->n_experts = v->experts.n;
    return find_sample(v, "base", p->samples[MAX_EXPERTS], &o->base_sample_text);
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    char base[PATH_BYTES];
    choir_upcycle_options o = CHOIR_UPCYCLE_OPTIONS_DEFAULT;
    CHOIR_TRY(choir_cli_find_model(arguments->positional[0], base, sizeof base));
    o.base = base;
    o.out = v->out;
    o.gates = strcmp(v->gate_init, "uniform") == 0 ? CHOIR_GATES_UNIFORM : CHOIR_GATES_HIDDEN;
    o.temperature = (float)v->temperature;
    o.top_k = (uint32_t)v->top_k;
    o.shard_bytes = v->shard_size;
    o.n_threads = (uint32_t)v->threads;
    o.show_progress = true;
    if (!choir_cli_parse_dtype(v->quant, &o.dtype))
        return choir_fail(CHOIR_E_INVALID, "--quant is '%.20s'", v->quant);
    plan *p = choir_calloc(CHOIR_MEM_TUNE, 1, sizeof *p);
    if (p == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the experts' names");
    choir_status status = plan_experts(v, p, &o);
    if (status == CHOIR_OK) status = choir_upcycle(&o);
    if (status == CHOIR_OK)
        printf("%s: %u experts, %u a token\n", v->out, o.n_experts + 1, o.top_k);
    choir_free(p);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    choir_dtype dtype;
    (void)arguments;
    if (v->out == NULL) return choir_fail(CHOIR_E_INVALID, "-o OUT is missing");
    if (v->experts.n == 0) return choir_fail(CHOIR_E_INVALID, "--expert NAME=DIR is missing");
    if (v->experts.n > MAX_EXPERTS)
        return choir_fail(CHOIR_E_INVALID, "--expert is given %u times, the limit is %d",
                          v->experts.n, MAX_EXPERTS);
    for (uint32_t i = 0; i < v->experts.n; i++) {
        const char *item = v->experts.item[i], *equals = strchr(item, '=');
        if (equals == NULL || equals == item || equals[1] == '\0' || equals - item >= NAME_BYTES)
            return choir_fail(CHOIR_E_INVALID, "--expert is '%.80s', must be NAME=DIR", item);
    }
    for (uint32_t i = 0; i < v->sample.n; i++)
        if (strchr(v->sample.item[i], '=') == NULL)
            return choir_fail(CHOIR_E_INVALID, "--sample is '%.80s', must be NAME=FILE",
                              v->sample.item[i]);
    if (strcmp(v->gate_init, "hidden") != 0 && strcmp(v->gate_init, "uniform") != 0)
        return choir_fail(CHOIR_E_INVALID, "--gate-init is '%.20s', must be hidden or uniform",
                          v->gate_init);
    if (!choir_cli_parse_dtype(v->quant, &dtype) ||
        (dtype != CHOIR_N_DTYPES && !choir_dtype_in_gguf(dtype)))
        return choir_fail(CHOIR_E_INVALID,
                          "--quant is '%.20s', must be q8_0, q4_1, f16, bf16 or f32", v->quant);
    return CHOIR_OK;
}

const choir_verb choir_verb_upcycle = {
    .name = "upcycle",
    .arguments = "BASE --expert NAME=DIR… --samples DIR -o OUT [--quant q8_0]",
    .summary = "a dense model and LoRA adapters on its MLP become a mixture of experts",
    .example = "choir upcycle SmolLM2-135M-Instruct.Q4_1 --expert python=models/adapters/python "
               "--expert french=models/adapters/french --samples models/domains -o moe.gguf",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .check = check,
    .run = run,
};
