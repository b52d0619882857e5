/* Requests that leave their adapters open. At its turn such a request's prompt goes through the
 * first blocks of the model alone, and its chooser is told what came out; what it names is claimed
 * as if the client had named it. Nothing hangs on a choice: where the prompt cannot be probed or
 * the adapters are not to be had, the model answers alone.
 *
 * The bound: the probes of a tick have no more rows together than a step may have, or are one
 * prompt's. So whoever decodes waits for them no longer than for the probed share of the blocks of
 * one full step. Who is next in rank and does not fit waits for the next tick, and all behind it.
 */
#include "scheduler/state.h"

choir_status chooser_check(const choir_scheduler *s, const choir_request *from)
{
    const choir_chooser *c = &from->chooser;
    if (c->choose == NULL) return CHOIR_OK;
    if (from->n_adapters > 0)
        return choir_fail(CHOIR_E_INVALID,
                          "the request names adapter %s, and wants its adapters chosen",
                          from->adapters[0].name);
    if (s->engine.probe == NULL)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "this model has no features to choose adapters by");
    if (c->n_blocks > s->engine.n_blocks)
        return choir_fail(CHOIR_E_INVALID, "features behind %u blocks, the model has %u",
                          c->n_blocks, s->engine.n_blocks);
    return CHOIR_OK;
}

void chooser_release(request *r)
{
    if (r->chooser.release != NULL) r->chooser.release(r->chooser.user);
    r->chooser = (choir_chooser){0};
}

static uint32_t probe_rows(const choir_scheduler *s, const sequence *q)
{
    return q->n_prompt < s->engine.probe_tokens ? q->n_prompt : s->engine.probe_tokens;
}

static choir_status ask(choir_scheduler *s, request *r, choir_choice *choice)
{
    const sequence *first = &r->sequences[0];
    choir_probe p = {.tokens = first->tokens,
                     .n_tokens = first->n_prompt,
                     .n_blocks = r->chooser.n_blocks,
                     .mean = s->features};
    CHOIR_TRY(s->engine.probe(s->engine.engine, &p));
    const choir_prompt_features features = {.mean = p.mean,
                                            .n = s->engine.n_features,
                                            .gate_entropy = p.gate_entropy,
                                            .n_tokens = first->n_prompt};
    r->chooser.choose(r->chooser.user, &features, choice);
    s->stats.n_chosen++;
    return CHOIR_OK;
}

static choir_status claim(choir_scheduler *s, request *r, const choir_choice *choice)
{
    const sequence *first = &r->sequences[0];
    uint32_t n_virtual; /* room for them is made when they are pinned */
    const choir_request named = {.tokens = first->tokens,
                                 .n_tokens = first->n_prompt,
                                 .adapters = choice->adapters,
                                 .n_adapters = choice->n};
    CHOIR_TRY(adapters_check(s, &named));
    return adapters_claim(s, &named, r, &n_virtual);
}

static void settle(choir_scheduler *s, request *r)
{
    choir_choice choice = {0};
    choir_status status = ask(s, r, &choice);
    r->chosen = true;
    if (status == CHOIR_OK) status = claim(s, r, &choice);
    chooser_release(r);
    if (status != CHOIR_OK) {
        adapters_fall_back(s, r);
        return;
    }
    sequence_state next = choice.n > 0 ? SEQ_FETCHING : SEQ_WAITING;
    for (uint32_t i = 0; i < r->n; i++) sequence_move(s, &r->sequences[i], next);
}

bool choosers_take_turns(choir_scheduler *s, uint32_t n)
{
    uint32_t rows = 0;
    for (uint32_t i = 0; i < n; i++) {
        sequence *q = s->order[i];
        if (q->state != SEQ_CHOOSING) continue;
        if (rows > 0 && rows + probe_rows(s, q) > s->options.max_step_tokens) break;
        rows += probe_rows(s, q);
        /* Before it: a probe that hangs must be seen from outside as work without progress. */
        atomic_store_explicit(&s->busy, true, memory_order_release);
        settle(s, q->of);
    }
    return rows > 0;
}
