#include "scheduler/scheduler.h"

static choir_status step(void *engine, choir_span *spans, uint32_t n_spans)
{
    return choir_engine_step(engine, spans, n_spans);
}

static void copy_page(void *engine, uint32_t from, uint32_t to)
{
    choir_engine_copy_page(engine, from, to);
}

static void zero_page(void *engine, uint32_t page)
{
    choir_engine_zero_page(engine, page);
}

static void set_pages(void *engine, uint32_t n)
{
    choir_engine_set_kv_pages(engine, n);
}
static void forget_page(void *engine, uint32_t page)
{
    choir_engine_forget_page(engine, page);
}

static uint64_t set_adapter_bytes(void *engine, uint64_t bytes)
{
    return choir_engine_set_adapter_bytes(engine, bytes);
}

static choir_experts_stats expert_stats(void *engine)
{
    return choir_engine_expert_stats(engine);
}
static float expert_heat(void *engine, uint32_t layer, uint32_t expert)
{
    return choir_engine_expert_heat(engine, layer, expert);
}

static choir_status probe(void *engine, choir_probe *what)
{
    return choir_engine_probe(engine, what);
}

choir_step_engine choir_step_engine_of(choir_engine *engine)
{
    const choir_model_config *c = choir_engine_config(engine);
    uint64_t n_pages = choir_engine_n_pages(engine);
    bool streamed = choir_engine_expert_stats(engine).streamed;
    bool shared = choir_engine_kv_floor(engine) < n_pages;
    choir_adapters_stats adapters = {0};
    if (choir_engine_adapters(engine) != NULL)
        choir_adapters_get_stats(choir_engine_adapters(engine), &adapters);
    return (choir_step_engine){
        .engine = engine,
        .step = step,
        .copy_page = copy_page,
        .zero_page = zero_page,
        .set_pages = shared ? set_pages : NULL,
        .forget_page = forget_page,
        .adapters = choir_engine_adapters(engine),
        .set_adapter_bytes =
            choir_engine_adapter_floor(engine) < adapters.most_bytes ? set_adapter_bytes : NULL,
        .adapter_floor = choir_engine_adapter_floor(engine),
        .expert_stats = streamed ? expert_stats : NULL,
        .expert_heat = expert_heat,
        .n_experts = c->n_experts,
        .kv_floor = choir_engine_kv_floor(engine),
        .n_pages = (uint32_t)n_pages,
        .page_tokens = CHOIR_PAGE_TOKENS,
        .vocab = c->vocab,
        .max_positions = c->max_positions,
        .max_rows = choir_engine_max_rows(engine),
        .max_spans = choir_engine_max_spans(engine),
        .tokenizer = choir_engine_tokenizer(engine),
        .digest = choir_engine_digest(engine),
        .eos_ids = c->eos_ids,
        .n_eos = c->n_eos,
        .n_layers = c->n_layers,
        .n_experts_used = c->n_experts_used,
        .probe = probe,
        .n_features = c->hidden,
        .n_blocks = 2 * c->n_layers,
        .probe_tokens = CHOIR_PROBE_TOKENS,
    };
}
