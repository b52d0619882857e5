/* An engine without a model: its KV is the tokens themselves, written into pages, and its logits
 * are a hash of the history that the page table shows. A wrong page, a stale one or a wrong order
 * changes the tokens. */
#pragma once
#include "scheduler/scheduler.h"
#include "tests/support/toy_adapters.h"

typedef struct simulated_engine {
    uint32_t n_pages, page_tokens, vocab, max_rows, max_spans;
    uint32_t *kv; /* [n_pages, page_tokens] token + 1; 0: never written */
    uint64_t n_steps, n_tokens;
    uint64_t poison;     /* a history that holds this token gives NaN logits; 0: off */
    uint32_t late_percent; /* so many spans of 100 lack an expert: void, with nonsense in their pages */
    uint64_t late_state;
    bool shares;         /* as simulated_engine_shares at its creation: KV pages share memory, no more than `allowed` may be in use */
    uint32_t allowed, most_allowed, n_forgotten;
    uint32_t fail_steps; /* so many steps fail whole */
    choir_adapters *adapters;        /* NULL, or toys: what they change, later tokens see */
    uint64_t adapter_bytes, n_adapted; /* that they asked for; rows computed with any */
    uint64_t adapter_floor, slow_grants; /* grants: so many come short by half; floor: of what they share */
    uint64_t n_probes, probed_rows;
    choir_status probe_status;         /* what probes end with */
    bool no_probe;                     /* as of simulated_step_engine() */
    void (*before_step)(void *user);
    void *user;
} simulated_engine;

extern bool simulated_engine_shares;
enum { SIMULATED_KV_FLOOR = 8 };
/* What a probe makes of a prompt: its first and last token that counted, how many did, and the blocks. */
enum { SIMULATED_FEATURES = 4, SIMULATED_BLOCKS = 8, SIMULATED_PROBE_TOKENS = 32 };
simulated_engine *simulated_engine_create(uint32_t n_pages);
void simulated_engine_destroy(simulated_engine *engine);
choir_step_engine simulated_step_engine(simulated_engine *engine);
