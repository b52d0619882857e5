/* WHAT    Adapters of a model in this process: `--adapter DIR[=WEIGHT]`, read before the model is loaded,
 *         made for its engine, put into spans.
 * OWNS    choir_cli_adapters: what was read and what was made of it.
 * THREADS The main thread.
 * ERRORS  Those of engine/adapter_file.h and engine/adapter.h, sentence included; check: a wrong
 * usage. LIMITS  CHOIR_MAX_MIX at once, each once. Virtual tokens and aLoRA are for one adapter
 * alone. NEXT    engine/adapter_file.h, engine/adapter.h; a server's adapters:
 * scheduler/scheduler.h */
#pragma once
#include "cli/cli.h"

typedef struct choir_cli_adapter_values {
    choir_option_list adapter;
    const char *type;
} choir_cli_adapter_values;
#define CHOIR_CLI_ADAPTER_DEFAULT                                                                  \
    {                                                                                              \
        .type = "auto"                                                                             \
    }
// clang-format off
#define CHOIR_CLI_ADAPTER_TYPE_OPTION(type_, member)                                                             \
    {"adapter-dtype", 0, CHOIR_OPTION_TEXT, offsetof(type_, member), "TYPE",                                     \
     "f32, f16, bf16 or int8: how adapters lie in memory; auto: f16, with --exact f32", 0, 0}
#define CHOIR_CLI_ADAPTER_OPTIONS(type_, member)                                                                 \
    {"adapter", 0, CHOIR_OPTION_LIST, offsetof(type_, member.adapter), "DIR[=WEIGHT]",                           \
     "a PEFT folder or a GGUF LoRA file; again for a mix of up to 8 (weights -8 to 8; left out: 1)", 0, 0},      \
    CHOIR_CLI_ADAPTER_TYPE_OPTION(type_, member.type)
// clang-format on

typedef struct choir_cli_adapters {
    uint32_t n;
    uint32_t n_virtual; /* tokens before the prompt, at positions 0 … n_virtual - 1 */
    choir_adapter_type type;
    const char *paths[CHOIR_MAX_MIX]; /* as they were given */
    choir_adapter_data *data[CHOIR_MAX_MIX];
    choir_adapter *made[CHOIR_MAX_MIX];
    choir_adapter_use uses[CHOIR_MAX_MIX];
} choir_cli_adapters;

/* "DIR=0.5" into a path (in `path`) and its weight. What stands behind the last '=' is a weight if
 * it is a number; so a path that ends like one is followed by "=1". */
choir_status choir_cli_adapter_split(const char *text, char *path, size_t bytes,
                                     float *weight) CHOIR_MUST_USE;
choir_status choir_cli_adapter_type_check(const char *text) CHOIR_MUST_USE;
choir_status choir_cli_adapters_check(const choir_cli_adapter_values *values) CHOIR_MUST_USE;
/* Reads all of them for MODEL's shapes. close() also after a failure. */
choir_status choir_cli_adapters_read(const choir_cli_adapter_values *values, const char *model,
                                     choir_cli_adapters *out) CHOIR_MUST_USE;
choir_status choir_cli_adapters_make(choir_cli_adapters *adapters,
                                     const choir_engine *engine) CHOIR_MUST_USE;
void choir_cli_adapters_close(choir_cli_adapters *adapters);

/* `what` ("--tokens") and the virtual tokens fit into the model's context. */
choir_status choir_cli_adapters_fit(const choir_cli_adapters *adapters, const char *what,
                                    uint64_t n_tokens,
                                    const choir_model_config *config) CHOIR_MUST_USE;
/* The virtual tokens of a fresh sequence into its pages. */
choir_status choir_cli_adapters_begin(const choir_cli_adapters *adapters, choir_engine *engine,
                                      const uint32_t *pages, uint32_t n_pages) CHOIR_MUST_USE;
/* Puts the adapters into a span; `prompt` are all tokens of the sequence, the first at position
 * n_virtual. */
void choir_cli_adapters_use(const choir_cli_adapters *adapters, const uint32_t *prompt,
                            size_t n_prompt, choir_span *span);
