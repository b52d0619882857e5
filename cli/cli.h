/* WHAT    The binary `choir`: one verb a file, each with its table of options, help and example.
 * OWNS    Nothing between verbs.
 * THREADS The main thread; a verb starts what it needs.
 * ERRORS  A verb returns a status; main prints its sentence on stderr. Exit codes: 0 done, 1 failed,
 *         2 wrong usage.
 * LIMITS  Only here are exit(), getenv() and the terminal touched.
 * NEXT    cli/main.c */
#pragma once
#include "base/base.h"
#include "engine/engine.h"
#include "scheduler/scheduler.h"

typedef struct choir_verb {
    const char *name, *arguments, *summary; /* "info", "MODEL [--json]", "family, shapes, …" */
    const char *example;
    const choir_option *options;
    uint32_t n_options;
    const void *defaults;   /* of the verb's values */
    size_t values_bytes;
    uint32_t min_positional, max_positional;
    choir_status (*run)(void *values, choir_arguments *arguments);
} choir_verb;

extern const choir_verb choir_verb_serve, choir_verb_chat, choir_verb_generate, choir_verb_logits,
    choir_verb_tokenize, choir_verb_detokenize, choir_verb_perplexity, choir_verb_info,
    choir_verb_bench, choir_verb_upcycle;

/* A wrong use of a verb: exit code 2. */
#define CHOIR_USAGE_ERROR CHOIR_E_INVALID

/* The file or folder that MODEL means: a path, or a name in the model cache (beneath that folder). */
choir_status choir_cli_find_model(const char *model, char *path, size_t bytes) CHOIR_MUST_USE;
/* "<cache>/choir/models"; the cache is XDG_CACHE_HOME or ~/.cache. */
void choir_cli_cache_folder(char *path, size_t bytes);
/* "reference", "avx2", "avx512vnni", or NULL for the best; sets options->level. */
choir_status choir_cli_set_level(const char *text, choir_engine_options *options) CHOIR_MUST_USE;
/* Opens MODEL, with its progress bar. */
choir_status choir_cli_open_engine(const char *model, const choir_engine_options *options,
                                   choir_engine **out) CHOIR_MUST_USE;
/* What --adapter and the like answer until they are there. */
choir_status choir_cli_not_yet(const char *what);

/* Options every verb with a local model has. */
typedef struct choir_cli_engine_values {
    uint64_t threads;
    const char *cpu_level;
    bool exact;
    const char *adapter;
} choir_cli_engine_values;
#define CHOIR_CLI_ENGINE_OPTIONS(type, member)                                                     \
    {"threads", 't', CHOIR_OPTION_COUNT, offsetof(type, member.threads), "N",                      \
     "worker threads; 0: one per core", 0, 256},                                                   \
        {"cpu-level", 0, CHOIR_OPTION_TEXT, offsetof(type, member.cpu_level), "LEVEL",             \
         "reference, avx2 or avx512vnni instead of this CPU's best", 0, 0},                        \
        {"exact", 0, CHOIR_OPTION_FLAG, offsetof(type, member.exact), NULL,                        \
         "f32 activations over dequantised weights: slow, the reference", 0, 0},                   \
        {"adapter", 0, CHOIR_OPTION_TEXT, offsetof(type, member.adapter), "DIR",                   \
         "a LoRA adapter (not there yet)", 0, 0}
/* Fills options from the values; refuses what is not there yet. */
choir_status choir_cli_engine_options(const choir_cli_engine_values *values,
                                      choir_engine_options *options) CHOIR_MUST_USE;

/* Sampling flags of generate and chat. */
typedef struct choir_cli_sampling_values {
    double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    uint64_t top_k, seed, max_tokens, min_tokens;
    choir_option_list stop;
    bool ignore_eos;
} choir_cli_sampling_values;
/* Negative: as the model's generation_config says. */
#define CHOIR_CLI_SAMPLING_DEFAULT                                                                 \
    {.temperature = -1, .top_p = -1, .repetition_penalty = -1, .top_k = UINT32_MAX}
#define CHOIR_CLI_SAMPLING_OPTIONS(type, member)                                                   \
    {"max-tokens", 'n', CHOIR_OPTION_COUNT, offsetof(type, member.max_tokens), "N",                \
     "tokens to generate at most; 0: what fits", 0, 1e9},                                          \
        {"temperature", 0, CHOIR_OPTION_REAL, offsetof(type, member.temperature), "T",             \
         "0: greedy; left out: the model's own", -1, 100},                                         \
        {"top-k", 0, CHOIR_OPTION_COUNT, offsetof(type, member.top_k), "K", "0: all", 0, 4294967295.0}, \
        {"top-p", 0, CHOIR_OPTION_REAL, offsetof(type, member.top_p), "P", "nucleus; 1: all", -1, 1},  \
        {"min-p", 0, CHOIR_OPTION_REAL, offsetof(type, member.min_p), "P", "of the best's probability", 0, 1}, \
        {"repetition-penalty", 0, CHOIR_OPTION_REAL, offsetof(type, member.repetition_penalty),    \
         "R", "1: off", -1, 10},                                                                   \
        {"presence-penalty", 0, CHOIR_OPTION_REAL, offsetof(type, member.presence_penalty), "R",   \
         "0: off", -2, 2},                                                                         \
        {"frequency-penalty", 0, CHOIR_OPTION_REAL, offsetof(type, member.frequency_penalty), "R", \
         "0: off", -2, 2},                                                                         \
        {"seed", 0, CHOIR_OPTION_COUNT, offsetof(type, member.seed), "S", "same seed, same tokens", 0, 0}, \
        {"min-tokens", 0, CHOIR_OPTION_COUNT, offsetof(type, member.min_tokens), "N",              \
         "no end before these", 0, 1e9},                                                           \
        {"stop", 0, CHOIR_OPTION_LIST, offsetof(type, member.stop), "TEXT",                        \
         "ends the answer; may be given 16 times", 0, 0},                                          \
        {"ignore-eos", 0, CHOIR_OPTION_FLAG, offsetof(type, member.ignore_eos), NULL,              \
         "goes on after the end token", 0, 0}
/* The request's sampling: the flags over the model's generation_config over the stated defaults. */
void choir_cli_set_sampling(const choir_cli_sampling_values *values, const choir_model_config *config,
                            choir_request *request);

/* A model with its scheduler, for generate and chat. */
typedef struct choir_local {
    choir_engine *engine;
    choir_scheduler *scheduler;
} choir_local;
choir_status choir_local_open(const char *model, const choir_engine_options *options,
                              choir_local *out) CHOIR_MUST_USE;
void choir_local_close(choir_local *local);
/* messages: a JSON array of {role, content}; rendered by the model's template and tokenized. */
choir_status choir_local_chat_tokens(const choir_local *local, const json_t *messages, uint32_t **ids,
                                     size_t *n_ids) CHOIR_MUST_USE;
/* Runs one request; `show` gets each piece of text; stops early when *stop turns true. The text, ids and
 * usage are added to `result` (an object) unless NULL. */
choir_status choir_local_run(choir_local *local, const choir_request *request,
                             void (*show)(void *user, const char *text, size_t bytes), void *user,
                             const volatile int *stop, json_t *result) CHOIR_MUST_USE;
