/* WHAT    The binary `choir`: one verb a file, each with its table of options, help and example.
 * OWNS    Nothing between verbs.
 * THREADS The main thread; a verb starts what it needs.
 * ERRORS  A verb returns a status; main prints its sentence on stderr. Exit codes: 0 done, 1
 *         failed, 2 wrong usage.
 * LIMITS  Only here are exit(), getenv() and the terminal touched.
 * NEXT    cli/main.c; cli/answer.h for who answers in generate and chat */
#pragma once
#include "base/base.h"
#include "engine/engine.h"

#include <signal.h>

typedef struct choir_verb {
    const char *name, *arguments, *summary; /* "info", "MODEL [--json]", "family, shapes, …" */
    const char *example;
    const choir_option *options;
    uint32_t n_options;
    const void *defaults; /* of the verb's values */
    size_t values_bytes;
    uint32_t min_positional, max_positional;
    /* What the table cannot say (a pair of flags that go together): a failure is a wrong usage. */
    choir_status (*check)(const void *values, const choir_arguments *arguments); /* may be NULL */
    choir_status (*run)(void *values, choir_arguments *arguments);
} choir_verb;

extern const choir_verb choir_verb_serve, choir_verb_chat, choir_verb_generate, choir_verb_logits,
    choir_verb_tokenize, choir_verb_detokenize, choir_verb_perplexity, choir_verb_info,
    choir_verb_bench, choir_verb_pack, choir_verb_upcycle, choir_verb_adapter, choir_verb_merge;

/* The verb's manual page in roff; `choir help --man VERB`. */
void choir_cli_print_man(const choir_verb *verb, FILE *to);

/* The file or folder that MODEL means: a path, or a name in the model cache (beneath that folder).
 */
choir_status choir_cli_find_model(const char *model, char *path, size_t bytes) CHOIR_MUST_USE;
/* "<cache>/choir/models"; the cache is XDG_CACHE_HOME or ~/.cache. */
void choir_cli_cache_folder(char *path, size_t bytes);
/* Opens MODEL, with its progress bar. */
choir_status choir_cli_open_engine(const char *model, const choir_engine_options *options,
                                   choir_engine **out) CHOIR_MUST_USE;
/* Bytes of KV that one token takes; f32 in exact mode. */
uint64_t choir_cli_kv_bytes_per_token(const choir_model_config *config, bool exact);
/* "5,7,9", "[5, 7, 9]", "5 7 9" or one a line, into *ids (choir_free), each below `limit`. `what`
 * names where they stood. */
choir_status choir_cli_parse_ids(const char *what, const char *text, uint32_t limit, uint32_t **ids,
                                 size_t *n) CHOIR_MUST_USE;
/* "q8_0" in any case; NULL is CHOIR_N_DTYPES. False: no such type. */
bool choir_cli_parse_dtype(const char *text, choir_dtype *out);
/* Prints and frees an object: one line, or indented. */
void choir_cli_print_json(json_t *object, bool indented);

/* Ctrl-C sets it; reads are interrupted. Threads made between block and unblock never get the
 * signal. */
extern volatile sig_atomic_t choir_cli_interrupted;
void choir_cli_catch_interrupts(void);
void choir_cli_block_interrupts(bool block);

/* COUNT options whose default is "as the model says" or "none". */
#define CHOIR_CLI_UNSET UINT64_MAX

/* Options every verb with a local model has. */
typedef struct choir_cli_engine_values {
    uint64_t threads;
    const char *cpu_level;
    bool exact;
    uint64_t memory, expert_memory;
    const char *io, *policy;
    uint64_t io_depth;
    bool no_prefetch;
    double small_experts;
} choir_cli_engine_values;
// clang-format off
#define CHOIR_CLI_ENGINE_OPTIONS(type, member)                                                                   \
    {"threads", 't', CHOIR_OPTION_COUNT, offsetof(type, member.threads), "N",                                    \
     "worker threads; 0: one per core", 0, 256},                                                                 \
    {"cpu-level", 0, CHOIR_OPTION_TEXT, offsetof(type, member.cpu_level), "LEVEL",                               \
     "reference, avx2 or avx512vnni instead of this CPU's best", 0, 0},                                          \
    {"exact", 0, CHOIR_OPTION_FLAG, offsetof(type, member.exact), NULL,                                          \
     "f32 activations and accumulation over dequantised weights: slow, the reference", 0, 0},                    \
    {"memory", 0, CHOIR_OPTION_SIZE, offsetof(type, member.memory), "8GiB",                                      \
     "budget for weights, KV pages and scratch together; experts beyond it are streamed from the file", 0, 0},   \
    {"expert-memory", 0, CHOIR_OPTION_SIZE, offsetof(type, member.expert_memory), "2GiB",                        \
     "experts are streamed, and get so much; 0: what the budget leaves, if they do not all fit", 0, 0},          \
    {"expert-io", 0, CHOIR_OPTION_TEXT, offsetof(type, member.io), "HOW",                                        \
     "auto, io_uring, io_uring-plain or pread: how streamed experts are read", 0, 0},                            \
    {"expert-policy", 0, CHOIR_OPTION_TEXT, offsetof(type, member.policy), "WHO",                                \
     "lru, lfu or router: which experts stay in memory", 0, 0},                                                  \
    {"expert-io-depth", 0, CHOIR_OPTION_COUNT, offsetof(type, member.io_depth), "N",                             \
     "reads in flight at once; 0: a few", 0, 4096},                                                              \
    {"no-prefetch", 0, CHOIR_OPTION_FLAG, offsetof(type, member.no_prefetch), NULL,                              \
     "streamed experts are not read ahead", 0, 0},                                                               \
    {"small-experts", 0, CHOIR_OPTION_REAL, offsetof(type, member.small_experts), "SHARE",                       \
     "of each layer's experts this share, the least used, from the pack's small copies", 0, 1}
// clang-format on
choir_status choir_cli_engine_options(const choir_cli_engine_values *values,
                                      choir_engine_options *options) CHOIR_MUST_USE;
