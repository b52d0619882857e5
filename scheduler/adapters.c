/* What a request is computed with besides the model: claimed when it is submitted (or chosen for
 * it, scheduler/chooser.c), pinned when its turn has come and all of it is in memory, released at
 * its end.
 *
 * Virtual tokens (soft prompts) become the sequence's first tokens: positions, pages and the
 * context's length count them; the user's prompt, its usage and the sampler's penalties do not know
 * them.
 *
 * An adapter with invocation tokens (aLoRA) acts from the last occurrence of these in the prompt
 * on; in a prompt without them it never does, and the model answers alone, as in PEFT. What lies
 * before is the model's own KV, under the model's own keys. */
#include "scheduler/state.h"

#include <math.h>
#include <string.h>

choir_status adapters_check(const choir_scheduler *s, const choir_request *from)
{
    if (from->n_adapters > CHOIR_MAX_MIX)
        return choir_fail(CHOIR_E_INVALID, "a mix has %u adapters, the limit is %d",
                          from->n_adapters, CHOIR_MAX_MIX);
    for (uint32_t i = 0; i < from->n_adapters; i++) {
        const choir_request_adapter *a = &from->adapters[i];
        CHOIR_TRY(choir_adapters_check_name(a->name));
        if (!(fabsf(a->weight) <= CHOIR_MAX_ADAPTER_WEIGHT))
            return choir_fail(CHOIR_E_INVALID, "adapter %s has the weight %g, must be -%d to %d",
                              a->name, (double)a->weight, CHOIR_MAX_ADAPTER_WEIGHT,
                              CHOIR_MAX_ADAPTER_WEIGHT);
        for (uint32_t j = 0; j < i; j++)
            if (strcmp(a->name, from->adapters[j].name) == 0)
                return choir_fail(CHOIR_E_INVALID, "adapter %s is in the mix twice", a->name);
    }
    if (from->n_adapters > 0 && s->engine.adapters == NULL)
        return choir_fail(CHOIR_E_NOT_FOUND, "there is no adapter %s; this model has none",
                          from->adapters[0].name);
    return CHOIR_OK;
}

/* What the facts of its adapters mean for a prompt. */
typedef struct plan {
    const char *const *names; /* in sentences */
    const choir_adapter_facts *const *facts;
    const float *weights;
    uint32_t n, n_virtual, from;
} plan;

static choir_status make_plan(const choir_scheduler *s, const uint32_t *tokens, uint32_t n_tokens,
                              plan *p)
{
    uint32_t most = s->options.max_tokens_per_sequence;
    p->n_virtual = p->from = 0;
    for (uint32_t i = 0; i < p->n; i++) {
        const choir_adapter_facts *f = p->facts[i];
        uint32_t from = 0;
        if (f->n_invocation > 0)
            from = choir_adapter_begins(f->invocation, f->n_invocation, tokens, n_tokens);
        if ((f->sole || f->n_virtual > 0) && (p->n > 1 || p->weights[i] != 1))
            return choir_fail(
                CHOIR_E_INVALID,
                "adapter %s replaces weights, scales inputs or brings virtual tokens; it cannot be "
                "mixed, and its weight is 1",
                p->names[i]);
        if (i > 0 && from != p->from)
            return choir_fail(CHOIR_E_INVALID,
                              "adapters %s and %s begin to act at different tokens of the prompt; "
                              "they cannot be mixed",
                              p->names[0], p->names[i]);
        p->n_virtual = f->n_virtual;
        p->from = from;
    }
    if (p->n_virtual >= most || n_tokens >= most - p->n_virtual)
        return choir_fail(CHOIR_E_INVALID,
                          "the prompt has %u tokens and adapter %s %u virtual ones, both and the "
                          "answer must fit into %u",
                          n_tokens, p->names[0], p->n_virtual, most);
    return CHOIR_OK;
}

static choir_status claim_all(choir_scheduler *s, const choir_request *from, request *r,
                              choir_adapter_facts *facts, uint32_t *n_virtual)
{
    request_adapters *a = &r->adapters;
    const char *names[CHOIR_MAX_MIX];
    const choir_adapter_facts *each[CHOIR_MAX_MIX];
    a->pool = s->engine.adapters;
    for (; a->n < from->n_adapters; a->n++) {
        uint32_t i = a->n;
        CHOIR_TRY(choir_adapters_claim(a->pool, from->adapters[i].name, r->rank, &a->claims[i],
                                       &facts[i]));
        a->weights[i] = from->adapters[i].weight;
        names[i] = from->adapters[i].name;
        each[i] = &facts[i];
    }
    plan p = {.names = names, .facts = each, .weights = a->weights, .n = a->n};
    CHOIR_TRY(make_plan(s, from->tokens, (uint32_t)from->n_tokens, &p));
    *n_virtual = p.n_virtual;
    return CHOIR_OK;
}

choir_status adapters_claim(choir_scheduler *s, const choir_request *from, request *r,
                            uint32_t *n_virtual)
{
    if (from->n_adapters == 0) return CHOIR_OK;
    choir_adapter_facts *facts = choir_alloc(CHOIR_MEM_REQUESTS, from->n_adapters * sizeof *facts);
    if (facts == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
    choir_status status = claim_all(s, from, r, facts, n_virtual);
    choir_free(facts);
    return status;
}

void adapters_release(request *r)
{
    request_adapters *a = &r->adapters;
    if (a->n > 0) choir_adapters_release(a->pool, a->claims, a->n);
    a->n = a->n_uses = 0;
}

void adapters_fall_back(choir_scheduler *s, request *r)
{
    adapters_release(r);
    s->stats.n_fell_back++;
    for (uint32_t i = 0; i < r->n; i++) sequence_move(s, &r->sequences[i], SEQ_WAITING);
}

/* Those that the client has named are what it wants; those that were chosen for it are not worth
 * its answer. Lack of memory may have come in the middle of a change. */
static bool may_fall_back(const request *r, choir_status status)
{
    return r->chosen && status != CHOIR_E_NO_MEMORY;
}

/* -- pinned: their versions are known now, and stay -- */

/* In an order that does not depend on the client's, so that the same mix is the same sums and the
 * same key. */
static void take_uses(request *r)
{
    request_adapters *a = &r->adapters;
    uint64_t digests[CHOIR_MAX_MIX], words[2 * CHOIR_MAX_MIX + 1];
    for (uint32_t i = 0; i < a->n; i++) {
        uint64_t digest = choir_adapter_claim_digest(&a->claims[i]);
        uint32_t at = i;
        for (; at > 0 && digest < digests[at - 1]; at--) {
            digests[at] = digests[at - 1];
            a->uses[at] = a->uses[at - 1];
        }
        digests[at] = digest;
        a->uses[at] =
            (choir_adapter_use){choir_adapter_claim_adapter(&a->claims[i]), a->weights[i]};
    }
    a->n_uses = a->from == CHOIR_ADAPTER_NEVER ? 0 : a->n;
    for (uint32_t i = 0; i < a->n; i++) {
        uint32_t bits;
        memcpy(&bits, &a->uses[i].weight, sizeof bits);
        words[2 * i] = digests[i];
        words[2 * i + 1] = bits;
    }
    words[2 * a->n] = a->from;
    a->key = prefix_of_words(words, 2 * a->n + 1);
}

/* Room for the virtual tokens before the sequence's own. */
static choir_status put_virtual(const choir_scheduler *s, sequence *q, uint32_t n)
{
    uint32_t page_tokens = s->engine.page_tokens;
    size_t room = (size_t)n + q->n_prompt + q->of->max_new;
    uint32_t max_pages = (uint32_t)((room + page_tokens - 1) / page_tokens);
    uint32_t *tokens = choir_realloc(CHOIR_MEM_REQUESTS, q->tokens, room * sizeof *tokens);
    if (tokens != NULL) q->tokens = tokens;
    uint32_t *pages = choir_realloc(CHOIR_MEM_REQUESTS, q->pages, max_pages * sizeof *pages);
    if (pages != NULL) q->pages = pages;
    prefix_key *keys =
        choir_realloc(CHOIR_MEM_REQUESTS, q->keys, ((size_t)max_pages + 1) * sizeof *keys);
    if (keys != NULL) q->keys = keys;
    if (tokens == NULL || pages == NULL || keys == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request of %zu tokens", room);
    memmove(tokens + n, tokens, q->n_prompt * sizeof *tokens);
    for (uint32_t i = 0; i < n; i++) tokens[i] = s->engine.vocab + i;
    q->max_pages = max_pages;
    q->n_prompt += n;
    q->n_tokens = q->n_prompt;
    return CHOIR_OK;
}

static choir_status bind(const choir_scheduler *s, request *r)
{
    request_adapters *a = &r->adapters;
    const char *names[CHOIR_MAX_MIX];
    const choir_adapter_facts *facts[CHOIR_MAX_MIX];
    const sequence *first = &r->sequences[0];
    for (uint32_t i = 0; i < a->n; i++) {
        names[i] = choir_adapter_claim_name(&a->claims[i]);
        facts[i] = choir_adapter_claim_facts(&a->claims[i]);
    }
    /* Once more: since the request was submitted a newer version may have come. */
    plan p = {.names = names, .facts = facts, .weights = a->weights, .n = a->n};
    CHOIR_TRY(make_plan(s, first->tokens, first->n_prompt, &p));
    uint32_t most = s->options.max_tokens_per_sequence - first->n_prompt - p.n_virtual;
    if (r->max_new > most) r->max_new = most;
    a->from = p.from;
    a->n_virtual = p.n_virtual;
    take_uses(r);
    for (uint32_t i = 0; i < r->n && p.n_virtual > 0; i++)
        CHOIR_TRY(put_virtual(s, &r->sequences[i], p.n_virtual));
    return CHOIR_OK;
}

bool adapters_fetched(choir_scheduler *s, request *r)
{
    request_adapters *a = &r->adapters;
    uint64_t now = choir_clock_now();
    bool pinned;
    choir_status status = choir_adapters_pin(a->pool, a->claims, a->n, &pinned);
    if (status == CHOIR_OK && !pinned) {
        if (a->missed_ns == 0) a->missed_ns = now;
        return false;
    }
    if (status == CHOIR_OK) status = bind(s, r);
    if (status != CHOIR_OK && may_fall_back(r, status)) {
        adapters_fall_back(s, r);
        return true;
    }
    if (status != CHOIR_OK) {
        request_end(s, r, status, choir_error_message());
        return false;
    }
    if (a->missed_ns != 0) {
        r->usage.adapter_ns = now - a->missed_ns;
        choir_adapters_note_wait(a->pool, &a->claims[0], r->usage.adapter_ns);
    }
    for (uint32_t i = 0; i < r->n; i++) sequence_move(s, &r->sequences[i], SEQ_WAITING);
    return true;
}

void adapters_end_failed(choir_scheduler *s)
{
    if (s->engine.adapters == NULL) return;
    uint64_t n = choir_adapters_bad_news(s->engine.adapters);
    if (n == s->n_bad_news) return;
    s->n_bad_news = n;
    for (uint32_t i = 0; i < s->n_live;) {
        sequence *q = s->live[i];
        const request_adapters *a = &q->of->adapters;
        choir_status status = CHOIR_OK;
        if (q->state == SEQ_FETCHING)
            status = choir_adapters_check_claims(a->pool, a->claims, a->n);
        if (status != CHOIR_OK && may_fall_back(q->of, status))
            adapters_fall_back(s, q->of);
        else if (status != CHOIR_OK)
            request_end(s, q->of, status, choir_error_message());
        else
            i++; /* an end moves another sequence to this place */
    }
}

/* Only an adapter alone and as it is can be blamed: a client may weigh a good one until it
 * overflows. */
void adapters_note_poison(request *r, const choir_span *span)
{
    request_adapters *a = &r->adapters;
    if (span->status != CHOIR_E_DATA_LOSS || span->missing_expert >= 0) return;
    if (span->n_adapters == 1 && a->weights[0] == 1)
        choir_adapters_note_poison(a->pool, &a->claims[0]);
}

prefix_key sequence_page_key(const choir_scheduler *s, const sequence *q, uint32_t page)
{
    const request_adapters *a = &q->of->adapters;
    uint32_t page_tokens = s->engine.page_tokens;
    prefix_key key =
        prefix_child(q->keys[page], q->tokens + (size_t)page * page_tokens, page_tokens);
    bool begins = a->n_uses > 0 && page == a->from / page_tokens;
    return begins ? prefix_joined(key, a->key) : key;
}
