/* One budget of memory for everything: what is there for good first, then KV pages and experts,
 * which share the rest. If all experts fit beside the KV pages that are wanted, they are resident;
 * else they are streamed, and the line between the two moves at run time
 * (choir_engine_set_kv_pages). */
#include "engine/budget.h"
#include "engine/state.h"

#include <malloc.h>

/* For what no tag counts: stacks, the allocator's slack, a server's connections. */
enum { SLACK = 40 << 20, MIN_KV_PAGES = 4 };

static uint64_t least_of(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Bytes that this process holds in memory now, besides those of models. */
static uint64_t process_bytes(void)
{
    static const choir_memory_tag models[] = {CHOIR_MEM_WEIGHTS, CHOIR_MEM_EXPERTS,
                                              CHOIR_MEM_ADAPTERS, CHOIR_MEM_KV, CHOIR_MEM_SCRATCH};
    uint64_t bytes = choir_memory_resident(), least = SLACK / 2, others = 0;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        others += choir_memory_bytes(models[i]);
    return bytes > others + least ? bytes - others : least;
}

static choir_status too_small(const choir_engine *e, uint64_t dense, uint64_t scratch,
                              uint64_t process, uint64_t least)
{
    char all[16], a[16], b[16], c[16], d[16];
    return choir_fail(CHOIR_E_INVALID,
                      "a budget of %s (--memory) is too little for %.200s: %s of weights that "
                      "every token meets, %s "
                      "of scratch, %s for the process, and at least %s of KV pages and experts",
                      choir_format_bytes(e->options.memory_bytes, all), e->path,
                      choir_format_bytes(dense, a), choir_format_bytes(scratch, b),
                      choir_format_bytes(process, c), choir_format_bytes(least, d));
}

/* What streaming needs to go on at all: a few slots, and buffers to read unpacked experts into. */
static uint64_t few_experts(const choir_engine *e, const choir_model_file *file, uint64_t experts)
{
    uint64_t n = 0;
    for (uint32_t l = 0; l < e->config.n_layers; l++)
        if ((e->config.layers[l] & CHOIR_LAYER_MOE) != 0) n += e->config.n_experts;
    uint64_t mean = n > 0 ? experts / n : 0;
    return mean * (choir_model_file_pack(file) != NULL ? 4 : 8);
}

/* Rows of a step, doubled while what its scratch grows by stays small beside what is left for KV
 * pages and experts. Returns the scratch's bytes. */
static uint64_t grow_steps(choir_engine *e, uint64_t scratch, uint64_t rest)
{
    uint64_t first = scratch;
    while (e->options.max_rows < e->options.max_rows_streamed) {
        uint32_t before = e->options.max_rows;
        e->options.max_rows =
            before > e->options.max_rows_streamed / 2 ? e->options.max_rows_streamed : 2 * before;
        uint64_t grown = choir_step_bytes(e);
        if (grown - first > rest / 8) {
            e->options.max_rows = before;
            break;
        }
        scratch = grown;
    }
    return scratch;
}

/* Adapters have up to a half of what is beside experts and the least of KV. */
bool choir_budget_fixed(const budget_wishes *w, budget_parts *out)
{
    uint64_t taken = w->experts + w->spare_experts + w->least_kv;
    uint64_t adapters = w->rest > taken ? least_of((w->rest - taken) / 2, w->adapters) : 0;
    uint64_t rest = w->rest - adapters;
    if (w->adapters > 0 && adapters == 0) return false;
    if (w->experts + w->kv > rest && rest < taken) return false;
    uint64_t kv = least_of(w->kv, rest - w->experts);
    *out = (budget_parts){.kv = kv,
                          .kv_floor = kv,
                          .adapters = adapters,
                          .adapter_floor = adapters,
                          .experts = w->experts};
    return true;
}

/* KV pages and experts each keep an eighth of what they share. Adapters may have up to a half of
 * what is beside these floors, and keep an eighth of that. */
bool choir_budget_shared(const budget_wishes *w, budget_parts *out)
{
    uint64_t rest = w->rest, eighth = rest / 8;
    uint64_t kv_floor = least_of(eighth > w->least_kv ? eighth : w->least_kv, w->kv);
    uint64_t expert_floor = eighth > w->few_experts ? eighth : w->few_experts;
    if (rest < kv_floor + expert_floor) return false;
    uint64_t adapters = least_of((rest - kv_floor - expert_floor) / 2, w->adapters);
    uint64_t kv = least_of(w->kv, rest - expert_floor - adapters);
    *out = (budget_parts){.kv = kv,
                          .kv_floor = kv_floor,
                          .adapters = adapters,
                          .adapter_floor = adapters / 8,
                          .experts = rest - kv - adapters / 8};
    return true;
}

static void take_parts(choir_engine *e, const budget_parts *parts)
{
    char a[16], b[16];
    e->options.kv_bytes = parts->kv;
    e->adapter_most = parts->adapters;
    e->adapter_floor = parts->adapter_floor;
    if (e->adapter_most < e->options.adapter_bytes)
        choir_log(CHOIR_LOG_WARNING, "adapters may have %s of the memory budget, not %s",
                  choir_format_bytes(e->adapter_most, a),
                  choir_format_bytes(e->options.adapter_bytes, b));
}

choir_status choir_budget_plan(choir_engine *e, const choir_model_file *file)
{
    uint64_t dense, experts, scratch = choir_step_bytes(e), memory = e->options.memory_bytes;
    uint64_t told = e->options.expert_bytes, least_kv = MIN_KV_PAGES * choir_kv_page_bytes(e);
    budget_parts parts;
    e->adapter_floor = e->adapter_most = e->options.adapter_bytes;
    if (memory == 0) return CHOIR_OK;
    CHOIR_TRY(choir_model_file_weigh(file, 64, &dense, &experts));
    uint64_t few = few_experts(e, file, experts); /* slots are of the largest */
    experts = choir_small_weigh(e, file, experts);
    malloc_trim(0); /* what parsing the model's texts took and gave back */
    uint64_t process = process_bytes() + SLACK, fixed = dense + scratch + process;
    budget_wishes w = {.rest = memory > fixed ? memory - fixed : 0,
                       .experts = told > 0 ? told : experts, /* told apart: nothing is shared */
                       .spare_experts = told > 0 ? 0 : experts / 8,
                       .few_experts = few,
                       .kv = e->options.kv_bytes > least_kv ? e->options.kv_bytes : least_kv,
                       .least_kv = least_kv,
                       .adapters = e->options.adapter_bytes};
    if (choir_budget_fixed(&w, &parts)) {
        take_parts(e, &parts);
        return CHOIR_OK;
    }
    if (told > 0 || experts == 0) return too_small(e, dense, scratch, process, told + least_kv);
    uint64_t grown = grow_steps(e, scratch, w.rest);
    w.rest -= grown - scratch;
    if (!choir_budget_shared(&w, &parts))
        return too_small(e, dense, grown, process, least_kv + few);
    take_parts(e, &parts);
    e->shared_bytes = w.rest;
    e->kv_floor_bytes = parts.kv_floor;
    e->kv_now_bytes = parts.kv;
    e->adapter_now_bytes = parts.adapter_floor;
    e->options.expert_bytes = parts.experts;
    return CHOIR_OK;
}

uint32_t choir_engine_kv_floor(const choir_engine *e)
{
    return e->shared_bytes == 0 ? e->n_pages : (uint32_t)(e->kv_floor_bytes / e->page_bytes);
}

/* Experts have what neither KV pages nor adapters do. Returns the bytes that they still hold. */
static uint64_t share(choir_engine *e)
{
    CHOIR_ASSERT(e->kv_now_bytes + e->adapter_now_bytes < e->shared_bytes);
    return choir_experts_set_budget(e->experts,
                                    e->shared_bytes - e->kv_now_bytes - e->adapter_now_bytes);
}

void choir_engine_set_kv_pages(choir_engine *e, uint32_t n)
{
    if (e->shared_bytes == 0) return;
    uint32_t floor = choir_engine_kv_floor(e);
    if (n < floor) n = floor;
    e->kv_now_bytes = (uint64_t)n * e->page_bytes;
    share(e);
}

void choir_engine_reserve_adapter_bytes(choir_engine *e, uint64_t bytes)
{
    CHOIR_ASSERT(bytes <= e->adapter_floor);
    e->adapter_floor -= bytes;
    e->adapter_most -= bytes;
    if (e->shared_bytes == 0) return;
    e->shared_bytes -= bytes;
    e->adapter_now_bytes -= bytes;
}

uint64_t choir_engine_adapter_floor(const choir_engine *e)
{
    return e->adapter_floor;
}

uint64_t choir_engine_set_adapter_bytes(choir_engine *e, uint64_t bytes)
{
    if (e->shared_bytes == 0) return e->adapter_most;
    if (bytes < e->adapter_floor) bytes = e->adapter_floor;
    e->adapter_now_bytes = least_of(bytes, e->adapter_most);
    uint64_t others = share(e) + e->kv_now_bytes;
    uint64_t left = e->shared_bytes > others ? e->shared_bytes - others : 0;
    if (left < e->adapter_floor) left = e->adapter_floor;
    return least_of(left, e->adapter_now_bytes);
}

void choir_engine_forget_page(choir_engine *e, uint32_t page)
{
    CHOIR_ASSERT(page < e->n_pages);
    choir_forget_pages(e->kv + page * e->page_bytes, e->page_bytes);
}
