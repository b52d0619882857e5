#include "tests/scheduler/simulated_engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE_TOKENS = 4, VOCAB = 64, MAX_ROWS = 64, MAX_SPANS = 16 };

bool simulated_engine_shares = false;

simulated_engine *simulated_engine_create(uint32_t n_pages)
{
    simulated_engine *e = calloc(1, sizeof *e);
    *e = (simulated_engine){n_pages,   PAGE_TOKENS,
                            VOCAB,     MAX_ROWS,
                            MAX_SPANS, calloc((size_t)n_pages * PAGE_TOKENS, sizeof(uint32_t))};
    e->shares = simulated_engine_shares;
    return e;
}

void simulated_engine_destroy(simulated_engine *e)
{
    free(e->kv);
    free(e);
}

static uint64_t mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * UINT64_C(0x9E3779B97F4A7C15);
    return h ^ h >> 29;
}

static const toy_adapter *toy_of(const choir_adapter_use *use)
{
    return (const toy_adapter *)(const void *)use->adapter;
}

/* What a row leaves in its page: the token, and whatever it was computed with. */
static uint32_t row_of(simulated_engine *e, const choir_span *span, uint32_t i)
{
    uint32_t token = span->tokens[i], at = span->position + i;
    bool adapted = span->n_adapters > 0 && at >= span->adapter_from;
    if (token >= e->vocab) /* a virtual one, at its own position */
        CHOIR_ASSERT(span->n_adapters == 1 && token - e->vocab == at &&
                     at < toy_of(&span->adapters[0])->n_virtual);
    if (!adapted) return token + 1;
    uint64_t h = token + 1;
    for (uint32_t a = 0; a < span->n_adapters; a++) {
        uint32_t bits;
        const toy_adapter *toy = toy_of(&span->adapters[a]);
        CHOIR_ASSERT(toy->digest != UINT64_MAX); /* it was freed */
        memcpy(&bits, &span->adapters[a].weight, sizeof bits);
        h = mix(mix(h, toy->digest), bits);
    }
    e->n_adapted++;
    return (uint32_t)h | 1U << 31;
}

static bool is_poisoned(const choir_span *span)
{
    for (uint32_t a = 0; a < span->n_adapters; a++)
        if (toy_of(&span->adapters[a])->poison) return true;
    return false;
}

static void run_span(simulated_engine *e, choir_span *span)
{
    CHOIR_ASSERT(span->n_tokens > 0);
    CHOIR_ASSERT(span->position + span->n_tokens <= span->n_pages * e->page_tokens);
    CHOIR_ASSERT(span->n_adapters <= CHOIR_MAX_MIX);
    for (uint32_t i = 0; i < span->n_tokens; i++) {
        uint32_t at = span->position + i;
        e->kv[span->pages[at / e->page_tokens] * e->page_tokens + at % e->page_tokens] =
            row_of(e, span, i);
    }
    span->status = CHOIR_OK;
    span->missing_layer = span->missing_expert = -1;
    e->late_state = mix(e->late_state, span->position + 1);
    if ((e->late_state >> 32) % 100 < e->late_percent) {
        for (uint32_t i = 0; i < span->n_tokens; i++) {
            uint32_t at = span->position + i;
            e->kv[span->pages[at / e->page_tokens] * e->page_tokens + at % e->page_tokens] = 999;
        }
        span->status = CHOIR_E_UNAVAILABLE;
        span->missing_layer = span->missing_expert = 1;
        return;
    }
    e->n_tokens += span->n_tokens;
    if (span->sampler == NULL) return;
    uint64_t h = 1;
    bool poisoned = is_poisoned(span);
    for (uint32_t at = 0; at < span->position + span->n_tokens; at++) {
        uint32_t kv =
            e->kv[span->pages[at / e->page_tokens] * e->page_tokens + at % e->page_tokens];
        CHOIR_ASSERT(kv != 0); /* a position that nobody has computed */
        poisoned = poisoned || (e->poison != 0 && kv == e->poison + 1);
        h = mix(h, kv);
    }
    float logits[VOCAB];
    _Alignas(64) char scratch[VOCAB * 8];
    for (uint32_t v = 0; v < VOCAB; v++)
        logits[v] = poisoned ? NAN : (float)(mix(h, v + 7) >> 40) / (float)(1 << 20);
    span->status = choir_sampler_draw(span->sampler, choir_kernels_at(CHOIR_CPU_REFERENCE), logits,
                                      scratch, &span->sample);
}

/* Pages that hold anything are within what is allowed. */
static void check_share(const simulated_engine *e)
{
    uint32_t n = 0;
    for (uint32_t p = 0; p < e->n_pages; p++) {
        bool held = false;
        for (uint32_t i = 0; i < e->page_tokens; i++) held |= e->kv[p * e->page_tokens + i] != 0;
        n += held;
    }
    CHOIR_ASSERT(!e->shares || n <= e->allowed);
}

static choir_status step(void *engine, choir_span *spans, uint32_t n_spans)
{
    simulated_engine *e = engine;
    uint32_t rows = 0;
    if (e->before_step != NULL) e->before_step(e->user);
    if (e->fail_steps > 0) {
        e->fail_steps--;
        return choir_fail(CHOIR_E_INTERNAL, "a step failed on demand");
    }
    CHOIR_ASSERT(n_spans > 0 && n_spans <= e->max_spans);
    /* Rule 2 of kv_pages.h: no page is written by one span and touched by another in the same step.
     */
    for (uint32_t i = 0; i < n_spans; i++)
        for (uint32_t p = spans[i].position / e->page_tokens; p < spans[i].n_pages; p++)
            for (uint32_t j = 0; j < n_spans; j++)
                for (uint32_t r = 0; r < spans[j].n_pages; r++)
                    CHOIR_ASSERT(i == j || spans[i].pages[p] != spans[j].pages[r]);
    for (uint32_t i = 0; i < n_spans; i++) {
        run_span(e, &spans[i]);
        rows += spans[i].n_tokens;
    }
    CHOIR_ASSERT(rows <= e->max_rows);
    check_share(e);
    e->n_steps++;
    return CHOIR_OK;
}

static void copy_page(void *engine, uint32_t from, uint32_t to)
{
    simulated_engine *e = engine;
    memcpy(e->kv + to * e->page_tokens, e->kv + from * e->page_tokens,
           e->page_tokens * sizeof *e->kv);
}

static void zero_page(void *engine, uint32_t page)
{
    simulated_engine *e = engine;
    memset(e->kv + page * e->page_tokens, 0, e->page_tokens * sizeof *e->kv);
}

static void set_pages(void *engine, uint32_t n)
{
    simulated_engine *e = engine;
    CHOIR_ASSERT(n <= e->n_pages);
    e->allowed = n;
    if (n > e->most_allowed) e->most_allowed = n;
}

static void forget_page(void *engine, uint32_t page)
{
    ((simulated_engine *)engine)->n_forgotten++;
    zero_page(engine, page);
}

static uint64_t set_adapter_bytes(void *engine, uint64_t bytes)
{
    simulated_engine *e = engine;
    e->adapter_bytes = bytes;
    if (e->slow_grants == 0) return bytes;
    e->slow_grants--;
    return bytes / 2 > e->adapter_floor ? bytes / 2 : e->adapter_floor;
}

static choir_status probe(void *engine, choir_probe *p)
{
    simulated_engine *e = engine;
    uint32_t n = p->n_tokens < SIMULATED_PROBE_TOKENS ? p->n_tokens : SIMULATED_PROBE_TOKENS;
    CHOIR_ASSERT(n > 0 && p->n_blocks <= SIMULATED_BLOCKS);
    for (uint32_t i = 0; i < p->n_tokens; i++) CHOIR_ASSERT(p->tokens[i] < e->vocab);
    e->n_probes++;
    e->probed_rows += n;
    if (e->probe_status != CHOIR_OK) return choir_fail(e->probe_status, "a probe failed on demand");
    p->n_rows = n;
    p->mean[0] = (float)p->tokens[p->n_tokens - n];
    p->mean[1] = (float)p->tokens[p->n_tokens - 1];
    p->mean[2] = (float)n;
    p->mean[3] = (float)p->n_blocks;
    p->gate_entropy = 0.5F;
    return CHOIR_OK;
}

choir_step_engine simulated_step_engine(simulated_engine *e)
{
    static const int32_t eos[] = {3};
    return (choir_step_engine){.engine = e,
                               .step = step,
                               .copy_page = copy_page,
                               .zero_page = zero_page,
                               .set_pages = e->shares ? set_pages : NULL,
                               .forget_page = forget_page,
                               .kv_floor = SIMULATED_KV_FLOOR,
                               .adapters = e->adapters,
                               .set_adapter_bytes = e->adapter_floor > 0 ? set_adapter_bytes : NULL,
                               .adapter_floor = e->adapter_floor,
                               .n_pages = e->n_pages,
                               .page_tokens = e->page_tokens,
                               .vocab = e->vocab,
                               .max_positions = 256,
                               .max_rows = e->max_rows,
                               .max_spans = e->max_spans,
                               .digest = 42,
                               .eos_ids = eos,
                               .n_eos = 1,
                               .probe = e->no_probe ? NULL : probe,
                               .n_features = SIMULATED_FEATURES,
                               .n_blocks = SIMULATED_BLOCKS,
                               .probe_tokens = SIMULATED_PROBE_TOKENS};
}
