/* One budget of memory for everything: what is there for good first, then KV pages and experts,
 * which share the rest. If all experts fit beside the KV pages that are wanted, they are resident;
 * else they are streamed, and the line between the two moves at run time
 * (choir_engine_set_kv_pages). */
#include "engine/state.h"

#include <malloc.h>

/* For what no tag counts: stacks, the allocator's slack, a server's connections. */
enum { SLACK = 40 << 20, MIN_KV_PAGES = 4 };

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

static uint64_t least_of(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* What each part would like, and what is there for all. */
typedef struct wishes {
    uint64_t dense, experts, scratch, process, few; /* few: experts to stream with, at least */
    uint64_t kv, least_kv, rest;
} wishes;

static void tell_adapters(const choir_engine *e)
{
    char a[16], b[16];
    if (e->adapter_most < e->options.adapter_bytes)
        choir_log(CHOIR_LOG_WARNING, "adapters may have %s of the memory budget, not %s",
                  choir_format_bytes(e->adapter_most, a),
                  choir_format_bytes(e->options.adapter_bytes, b));
}

/* Each part has its own memory: adapters up to a half of what is beside experts and the least of KV. */
static bool plan_fixed(choir_engine *e, const wishes *w, uint64_t experts, uint64_t spare)
{
    uint64_t taken = experts + spare + w->least_kv, asked = e->options.adapter_bytes;
    uint64_t adapters = w->rest > taken ? least_of((w->rest - taken) / 2, asked) : 0;
    uint64_t rest = w->rest - adapters;
    if (asked > 0 && adapters == 0) return false;
    if (experts + w->kv > rest && rest < taken) return false;
    e->options.kv_bytes = least_of(w->kv, rest - experts);
    e->adapter_floor = e->adapter_most = adapters;
    return true;
}

/* Experts are streamed. Floors: KV pages and experts each keep an eighth of what they share, and adapters an
 * eighth of what they may have, which is up to a half of what is beside those floors. KV's most and adapters'
 * most do not touch each other: whatever neither has now is the experts'. */
static choir_status plan_shared(choir_engine *e, wishes *w)
{
    uint64_t grown = grow_steps(e, w->scratch, w->rest);
    w->rest -= grown - w->scratch;
    w->scratch = grown;
    uint64_t rest = w->rest, kv_floor = rest / 8 > w->least_kv ? rest / 8 : w->least_kv;
    if (kv_floor > w->kv) kv_floor = w->kv;
    uint64_t expert_floor = rest / 8 > w->few ? rest / 8 : w->few;
    if (rest < kv_floor + expert_floor)
        return too_small(e, w->dense, w->scratch, w->process, w->least_kv + w->few);
    e->adapter_most =
        least_of((rest - kv_floor - expert_floor) / 2, e->options.adapter_bytes);
    e->adapter_floor = e->adapter_now_bytes = e->adapter_most / 8;
    e->options.kv_bytes = least_of(w->kv, rest - expert_floor - e->adapter_most);
    e->shared_bytes = rest;
    e->kv_floor_bytes = kv_floor;
    e->kv_now_bytes = e->options.kv_bytes;
    e->options.expert_bytes = rest - e->options.kv_bytes - e->adapter_now_bytes;
    return CHOIR_OK;
}

static choir_status plan_parts(choir_engine *e, wishes *w)
{
    uint64_t told = e->options.expert_bytes;
    if (told > 0) { /* nothing is shared */
        if (plan_fixed(e, w, told, 0)) return CHOIR_OK;
        return too_small(e, w->dense, w->scratch, w->process, told + w->least_kv);
    }
    if (w->experts > 0 && !plan_fixed(e, w, w->experts, w->experts / 8)) return plan_shared(e, w);
    if (w->experts > 0 || plan_fixed(e, w, 0, 0)) return CHOIR_OK;
    return too_small(e, w->dense, w->scratch, w->process, w->least_kv);
}

choir_status choir_budget_plan(choir_engine *e, const choir_model_file *file)
{
    wishes w = {.scratch = choir_step_bytes(e), .kv = e->options.kv_bytes};
    uint64_t memory = e->options.memory_bytes;
    e->adapter_floor = e->adapter_most = e->options.adapter_bytes;
    if (memory == 0) return CHOIR_OK;
    CHOIR_TRY(choir_model_file_weigh(file, 64, &w.dense, &w.experts));
    w.few = few_experts(e, file, w.experts); /* slots are of the largest */
    w.experts = choir_small_weigh(e, file, w.experts);
    malloc_trim(0); /* what parsing the model's texts took and gave back */
    w.process = process_bytes() + SLACK;
    w.least_kv = MIN_KV_PAGES * choir_kv_page_bytes(e);
    if (w.kv < w.least_kv) w.kv = w.least_kv;
    uint64_t fixed = w.dense + w.scratch + w.process;
    w.rest = memory > fixed ? memory - fixed : 0;
    CHOIR_TRY(plan_parts(e, &w));
    tell_adapters(e);
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
