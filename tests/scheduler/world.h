/* A scheduler over a simulated engine and a fake clock, and a client that collects what it is sent.
 */
#pragma once
#include "scheduler/state.h"
#include "tests/scheduler/simulated_engine.h"

enum { MAX_TOKENS = 256, MAX_TEXT = 2048, N_ANSWERS = 4 };

extern uint64_t fake_now;
int use_fake_clock(void **state); /* a cmocka set-up */

/* A seeded generator, so that a failure can be seen again. */
void seed_random(uint64_t seed);
uint32_t pick(uint32_t n); /* 0 .. n-1 */

typedef struct world {
    simulated_engine *engine;
    choir_scheduler *scheduler;
} world;

choir_scheduler_options small_options(void);
world make_world(uint32_t n_pages, choir_scheduler_options options); /* ticked by hand */
world make_world_with(uint32_t n_pages, choir_scheduler_options options,
                      const choir_tokenizer *tokenizer);
void assert_quiet(world *w); /* nothing runs; only the prefix cache holds pages */
void end_world(world *w);

typedef struct answer {
    uint32_t tokens[N_ANSWERS][MAX_TOKENS], n[N_ANSWERS];
    char text[N_ANSWERS][MAX_TEXT];
    size_t text_bytes[N_ANSWERS];
    choir_status status;
    bool started, done;
    choir_usage usage;
    choir_finish finish[N_ANSWERS];
    uint32_t stop_match[N_ANSWERS];
    char with[128]; /* STARTED: "a:0.5 b:2 ", what it is computed with */
} answer;

bool drain(choir_stream *stream, answer *a); /* reads what is there; true once DONE has come */
choir_request plain_request(const uint32_t *tokens, size_t n, uint32_t max_tokens, uint64_t seed);
choir_stream *submit(world *w, const choir_request *r);
void finish(world *w, choir_stream *stream, answer *a); /* ticks until DONE, and releases */
answer run_alone(const choir_request *r, const choir_tokenizer *tokenizer);
