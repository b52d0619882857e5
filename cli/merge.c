/* Several LoRA adapters of one base become one, as PEFT writes them. */
#include "cli/adapters.h"
#include "cli/cli.h"
#include "tune/tune.h"

#include <stdio.h>
#include <string.h>

enum { PATH_BYTES = 4096 };

typedef struct values {
    choir_option_list adapter;
    const char *adapters, *method, *majority, *dtype, *out;
    double density;
    uint64_t rank, seed, threads;
} values;
static const values defaults = {.method = "svd",
                                .dtype = "f32",
                                .density = -1,
                                .rank = CHOIR_CLI_UNSET,
                                .seed = CHOIR_CLI_UNSET};
// clang-format off
static const choir_option options[] = {
    {"adapter", 0, CHOIR_OPTION_LIST, offsetof(values, adapter), "DIR[=WEIGHT]", "a PEFT folder of LoRA or rsLoRA; again for each (weights -8 to 8; left out: 1)", 0, 0},
    {"adapters", 0, CHOIR_OPTION_TEXT, offsetof(values, adapters), "DIR", "--adapter may name a folder in this one", 0, 0},
    {"method", 0, CHOIR_OPTION_TEXT, offsetof(values, method), "METHOD", "cat, svd, linear, ties, dare_linear, dare_ties, magnitude_prune; the last four also with _svd", 0, 0},
    {"density", 0, CHOIR_OPTION_REAL, offsetof(values, density), "D", "ties, dare, magnitude_prune: the share of numbers that stay", 0, 1},
    {"majority-sign-method", 0, CHOIR_OPTION_TEXT, offsetof(values, majority), "HOW", "ties: signs are elected by total (so if left out) or frequency", 0, 0},
    {"rank", 'r', CHOIR_OPTION_COUNT, offsetof(values, rank), "R", "svd: of the result; left out: the largest of the adapters'", 1, CHOIR_ADAPTER_MAX_RANK},
    {"seed", 0, CHOIR_OPTION_COUNT, offsetof(values, seed), "S", "dare: what is dropped; left out: 0", 0, 0x1p53},
    {"dtype", 0, CHOIR_OPTION_TEXT, offsetof(values, dtype), "TYPE", "f32, bf16 or f16", 0, 0},
    {"out", 'o', CHOIR_OPTION_TEXT, offsetof(values, out), "OUT", "the folder to be made", 0, 0},
    {"threads", 't', CHOIR_OPTION_COUNT, offsetof(values, threads), "N", "worker threads; 0: one per core", 0, 256},
};
// clang-format on

static bool parse_method(const char *text, choir_merge_method *out)
{
    for (*out = 0; *out < CHOIR_N_MERGE_METHODS; ++*out)
        if (strcmp(choir_merge_method_of(*out)->text, text) == 0) return true;
    return false;
}

static choir_status unknown_method(const char *text)
{
    const char *names[CHOIR_N_MERGE_METHODS];
    for (int i = 0; i < CHOIR_N_MERGE_METHODS; i++) names[i] = choir_merge_method_of(i)->text;
    return choir_fail(CHOIR_E_INVALID, "--method is '%.40s'; the nearest is %s (see merge --help)",
                      text, choir_nearest(text, names, CHOIR_N_MERGE_METHODS));
}

/* Options that a method does not heed are refused: whoever gives one expects something of it. */
static choir_status check_method(const values *v)
{
    choir_merge_method method;
    if (!parse_method(v->method, &method)) return unknown_method(v->method);
    const choir_merge_method_info *m = choir_merge_method_of(method);
    bool prunes = m->pruning != CHOIR_MERGE_PRUNES_NOTHING;
    if (prunes && v->density < 0)
        return choir_fail(CHOIR_E_INVALID, "--density is missing: the share that %s keeps, as 0.5",
                          m->text);
    if (prunes && v->density == 0)
        return choir_fail(CHOIR_E_INVALID, "--density is 0, must be over 0 and at most 1");
    if (!prunes && v->density >= 0)
        return choir_fail(CHOIR_E_INVALID, "--density is for methods that prune, not for %s",
                          m->text);
    if (!m->elects && v->majority != NULL)
        return choir_fail(CHOIR_E_INVALID, "--majority-sign-method is for ties, not for %s",
                          m->text);
    if (!m->svd && v->rank != CHOIR_CLI_UNSET)
        return choir_fail(CHOIR_E_INVALID, "--rank is for svd and methods that end in _svd, not %s",
                          m->text);
    if (m->pruning != CHOIR_MERGE_PRUNES_RANDOM && v->seed != CHOIR_CLI_UNSET)
        return choir_fail(CHOIR_E_INVALID, "--seed is for dare, not for %s", m->text);
    return CHOIR_OK;
}

static bool parse_dtype(const char *text, choir_dtype *out)
{
    return choir_cli_parse_dtype(text, out) &&
           (*out == CHOIR_F32 || *out == CHOIR_BF16 || *out == CHOIR_F16);
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    char path[PATH_BYTES];
    float weight;
    choir_dtype dtype;
    (void)arguments;
    if (v->out == NULL || v->out[0] == '\0')
        return choir_fail(CHOIR_E_INVALID, "-o OUT is missing");
    if (strlen(v->out) > 3900)
        return choir_fail(CHOIR_E_INVALID, "-o is a path of %zu bytes, the limit is 3900",
                          strlen(v->out));
    if (v->adapter.n == 0) return choir_fail(CHOIR_E_INVALID, "--adapter DIR[=WEIGHT] is missing");
    for (uint32_t i = 0; i < v->adapter.n; i++)
        CHOIR_TRY(choir_cli_adapter_split(v->adapter.item[i], path, sizeof path, &weight));
    CHOIR_TRY(check_method(v));
    if (v->majority != NULL && strcmp(v->majority, "total") != 0 &&
        strcmp(v->majority, "frequency") != 0)
        return choir_fail(CHOIR_E_INVALID,
                          "--majority-sign-method is '%.20s', must be total or frequency",
                          v->majority);
    if (!parse_dtype(v->dtype, &dtype))
        return choir_fail(CHOIR_E_INVALID, "--dtype is '%.20s', must be f32, bf16 or f16",
                          v->dtype);
    return CHOIR_OK;
}

/* The adapters and their folders' paths, where choir_merge finds them until it returns. */
typedef struct plan {
    choir_merge_adapter adapters[CHOIR_MAX_MERGE];
    char paths[CHOIR_MAX_MERGE][PATH_BYTES];
} plan;

/* A name is a folder directly in --adapters; everything else is a path. */
static choir_status find_folder(const values *v, const char *text, char *path, float *weight)
{
    char name[PATH_BYTES];
    CHOIR_TRY(choir_cli_adapter_split(text, name, sizeof name, weight));
    bool named = v->adapters != NULL && strchr(name, '/') == NULL && name[0] != '.';
    int n = snprintf(path, PATH_BYTES, "%s%s%s", named ? v->adapters : "", named ? "/" : "", name);
    if (n >= PATH_BYTES)
        return choir_fail(CHOIR_E_INVALID, "--adapters is longer than %d bytes", PATH_BYTES - 200);
    return CHOIR_OK;
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    char base[PATH_BYTES];
    choir_merge_options o = CHOIR_MERGE_OPTIONS_DEFAULT;
    choir_merge_result made;
    bool known = parse_method(v->method, &o.method) && parse_dtype(v->dtype, &o.dtype);
    CHOIR_ASSERT(known); /* check() has looked */
    CHOIR_TRY(choir_cli_find_model(arguments->positional[0], base, sizeof base));
    plan *p = choir_calloc(CHOIR_MEM_TUNE, 1, sizeof *p);
    if (p == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the adapters' names");
    choir_status status = CHOIR_OK;
    for (uint32_t i = 0; i < v->adapter.n && status == CHOIR_OK; i++) {
        float weight = 1;
        status = find_folder(v, v->adapter.item[i], p->paths[i], &weight);
        p->adapters[i] = (choir_merge_adapter){p->paths[i], (double)weight};
    }
    o.base = base;
    o.out = v->out;
    o.adapters = p->adapters;
    o.n_adapters = v->adapter.n;
    if (v->density >= 0) o.density = v->density;
    o.by_frequency = v->majority != NULL && strcmp(v->majority, "frequency") == 0;
    o.rank = v->rank == CHOIR_CLI_UNSET ? 0 : (uint32_t)v->rank;
    o.seed = v->seed == CHOIR_CLI_UNSET ? 0 : v->seed;
    o.n_threads = (uint32_t)v->threads;
    o.show_progress = true;
    choir_cli_catch_interrupts();
    o.interrupted = &choir_cli_interrupted;
    if (status == CHOIR_OK) status = choir_merge(&o, &made);
    if (status == CHOIR_OK) {
        char size[16];
        printf("%s: rank %u, %llu matrices, %s\n", v->out, made.rank,
               (unsigned long long)made.n_modules, choir_format_bytes(made.bytes, size));
    }
    choir_free(p);
    return status;
}

const choir_verb choir_verb_merge = {
    .name = "merge",
    .arguments = "BASE --adapter DIR[=WEIGHT]… --method METHOD -o OUT [--density D] [--rank R]",
    .summary = "several LoRA adapters of one base become one, as PEFT merges and writes them",
    .example = "choir merge SmolLM2-135M-Instruct.Q4_1 --adapter models/adapters/python "
               "--adapter models/adapters/french=0.5 --method ties_svd --density 0.5 -o both",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .check = check,
    .run = run,
};
