/* WHAT    Who answers in `generate` and `chat`: a model in this process, or a server over gRPC.
 * OWNS    Its engine and scheduler, or its client.
 * THREADS The main thread; Ctrl-C (choir_cli_interrupted) ends the running answer.
 * ERRORS  Those of the scheduler or of the server, sentence included; CHOIR_E_CANCELLED after
 *         Ctrl-C.
 * LIMITS  One answer at a time.
 * NEXT    scheduler/scheduler.h, server/client.h */
#pragma once
#include "cli/adapters.h"
#include "scheduler/scheduler.h"
#include "server/client.h"

/* Sampling flags. Negative or unset: as the model's generation_config says. */
typedef struct choir_cli_sampling_values {
    double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    uint64_t top_k, seed, max_tokens, min_tokens;
    choir_option_list stop;
    bool ignore_eos;
} choir_cli_sampling_values;
#define CHOIR_CLI_SAMPLING_DEFAULT                                                                 \
    {                                                                                              \
        .temperature = -1, .top_p = -1, .repetition_penalty = -1, .top_k = CHOIR_CLI_UNSET,        \
        .seed = CHOIR_CLI_UNSET                                                                    \
    }
// clang-format off
#define CHOIR_CLI_SAMPLING_OPTIONS(type, member)                                                                 \
    {"max-tokens", 'n', CHOIR_OPTION_COUNT, offsetof(type, member.max_tokens), "N",                              \
     "tokens to generate at most; 0: what fits", 0, 1e9},                                                        \
    {"temperature", 0, CHOIR_OPTION_REAL, offsetof(type, member.temperature), "T",                               \
     "0: greedy; left out: the model's own", 0, 100},                                                           \
    {"top-k", 0, CHOIR_OPTION_COUNT, offsetof(type, member.top_k), "K",                                          \
     "draw among the K best; 0: all", 0, 4294967295.0},                                                          \
    {"top-p", 0, CHOIR_OPTION_REAL, offsetof(type, member.top_p), "P",                                           \
     "draw among the best that sum to P; 1: all", 0, 1},                                                        \
    {"min-p", 0, CHOIR_OPTION_REAL, offsetof(type, member.min_p), "P",                                           \
     "drop what is below P times the best's probability", 0, 1},                                                 \
    {"repetition-penalty", 0, CHOIR_OPTION_REAL, offsetof(type, member.repetition_penalty), "R",                 \
     "on tokens of prompt and answer; 1: off", 0, 10},                                                          \
    {"presence-penalty", 0, CHOIR_OPTION_REAL, offsetof(type, member.presence_penalty), "R",                     \
     "on tokens of the answer, once", -2, 2},                                                                    \
    {"frequency-penalty", 0, CHOIR_OPTION_REAL, offsetof(type, member.frequency_penalty), "R",                   \
     "on tokens of the answer, each time", -2, 2},                                                               \
    {"seed", 0, CHOIR_OPTION_COUNT, offsetof(type, member.seed), "S",                                            \
     "same seed, same tokens; left out: another each time", 0, 0},                                               \
    {"min-tokens", 0, CHOIR_OPTION_COUNT, offsetof(type, member.min_tokens), "N", "no end before these", 0, 1e9}, \
    {"stop", 0, CHOIR_OPTION_LIST, offsetof(type, member.stop), "TEXT",                                          \
     "ends the answer; may be given 16 times", 0, 0},                                                            \
    {"ignore-eos", 0, CHOIR_OPTION_FLAG, offsetof(type, member.ignore_eos), NULL,                                \
     "goes on after the end token", 0, 0}

/* Options to reach a server. */
typedef struct choir_cli_server_values {
    const char *target, *api_key, *ca;
    bool tls;
} choir_cli_server_values;
#define CHOIR_CLI_SERVER_OPTIONS(type, member)                                                                   \
    {"server", 0, CHOIR_OPTION_TEXT, offsetof(type, member.target), "HOST:PORT",                                 \
     "ask a running server; MODEL is the name it serves", 0, 0},                                                 \
    {"api-key", 0, CHOIR_OPTION_TEXT, offsetof(type, member.api_key), "KEY",                                     \
     "the server's key; left out: CHOIR_API_KEY of the environment", 0, 0},                                      \
    {"tls", 0, CHOIR_OPTION_FLAG, offsetof(type, member.tls), NULL, "the server speaks TLS", 0, 0},              \
    {"tls-ca", 0, CHOIR_OPTION_TEXT, offsetof(type, member.ca), "FILE",                                          \
     "roots to trust, PEM; left out: the system's", 0, 0}
/* Adapters of an answer: files here, names there. */
#define CHOIR_CLI_ANSWER_ADAPTER_OPTIONS(type_, member)                                                          \
    {"adapter", 0, CHOIR_OPTION_LIST, offsetof(type_, member.adapter), "DIR[=WEIGHT]",                           \
     "a PEFT folder or a GGUF LoRA file, with --server a loaded one's name; again for a mix of up to 8", 0, 0},  \
    CHOIR_CLI_ADAPTER_TYPE_OPTION(type_, member.type)
// clang-format on
/* A client that Ctrl-C stops. */
choir_status choir_cli_client(const choir_cli_server_values *server,
                              choir_client **out) CHOIR_MUST_USE;

typedef struct choir_answerer {
    choir_engine *engine; /* here … */
    choir_scheduler *scheduler;
    choir_client *client; /* … or there */
    const char *model;    /* the name it has there */
    uint32_t n_adapters;  /* of each answer; names are the pool's here, the server's there */
    char *names[CHOIR_MAX_MIX];
    choir_request_adapter adapters[CHOIR_MAX_MIX];
} choir_answerer;

/* Exactly one of prompt and messages (a JSON array of {role, content}). */
typedef struct choir_ask {
    const char *prompt;
    const json_t *messages;
    const choir_cli_sampling_values *sampling;
    void (*show)(const char *text, size_t bytes); /* each piece of text as it comes; may be NULL */
} choir_ask;

choir_status choir_answerer_open(const char *model, const choir_cli_server_values *server,
                                 const choir_cli_engine_values *engine,
                                 const choir_cli_adapter_values *adapters,
                                 choir_answerer *out) CHOIR_MUST_USE;
void choir_answerer_close(choir_answerer *answerer);
/* Fills result (an empty object) with model, text, token_ids, finish_reason, seed, usage, timings;
 * what had come is there too when the answer was cut short. */
choir_status choir_answer(const choir_answerer *answerer, const choir_ask *ask,
                          json_t *result) CHOIR_MUST_USE;

/* --seed, or one drawn anew, small enough that --seed takes it. */
uint64_t choir_answer_seed(const choir_cli_sampling_values *sampling);

/* The halves of choir_answer, and what both write into the result. */
choir_status choir_answer_here(const choir_answerer *answerer, const choir_ask *ask,
                               json_t *result) CHOIR_MUST_USE;
choir_status choir_answer_there(const choir_answerer *answerer, const choir_ask *ask,
                                json_t *result) CHOIR_MUST_USE;
void choir_answer_add(json_t *result, const char *text, size_t bytes, const uint32_t *tokens,
                      size_t n_tokens);
void choir_answer_end(json_t *result, const char *finish_reason, const choir_usage *usage);
