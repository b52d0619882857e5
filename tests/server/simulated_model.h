/* A model whose tokens are made up, for tests of the front end: a step engine, a real tokenizer of
 * bytes, a chat template. Special tokens at the start of a prompt steer the answer:
 *   <|short|> "ok" and the end · <|accent|> characters of 2, 3 and 4 bytes, a byte a token ·
 * <|nul|> a NUL every third byte · <|stall|> the step hangs for stall_ms, once · <|nan|> the logits
 * are no numbers ·
 *   <|slow|> steps of 50 ms · otherwise letters of the alphabet by position. */
#pragma once
#include "server/server.h"

typedef struct simulated_model {
    choir_tokenizer *tokenizer;
    choir_chat_template *chat_template;
    choir_model_config config;
    choir_step_engine engine;
    uint32_t step_ms, stall_ms; /* may be set after open */
    bool stalled;
    uint64_t n_steps;
    struct simulated_pages *pages;
} simulated_model;

choir_status simulated_model_open(simulated_model *model, const char *tokenizer,
                                  uint32_t n_pages) CHOIR_MUST_USE;
void simulated_model_close(simulated_model *model);
/* From now on it says that it streams its experts; every number of theirs differs from the others, and
 * grows with each step. Before a scheduler is made. */
void simulated_model_stream_experts(simulated_model *model, uint32_t n_in_layer);
/* As the server wants it; lent until close. */
choir_server_model simulated_model_served(simulated_model *model, choir_scheduler *scheduler);
