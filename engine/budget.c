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
    static const choir_memory_tag models[] = {CHOIR_MEM_WEIGHTS, CHOIR_MEM_EXPERTS, CHOIR_MEM_KV,
                                              CHOIR_MEM_SCRATCH};
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

choir_status choir_budget_plan(choir_engine *e, const choir_model_file *file)
{
    uint64_t dense, experts, scratch = choir_step_bytes(e), process,
                             memory = e->options.memory_bytes;
    if (memory == 0) return CHOIR_OK;
    CHOIR_TRY(choir_model_file_weigh(file, 64, &dense, &experts));
    uint64_t few = few_experts(e, file, experts); /* slots are of the largest */
    experts = choir_small_weigh(e, file, experts);
    malloc_trim(0); /* what parsing the model's texts took and gave back */
    process = process_bytes() + SLACK;
    uint64_t page = choir_kv_page_bytes(e), wanted = e->options.kv_bytes;
    uint64_t least_kv = MIN_KV_PAGES * page;
    if (wanted < least_kv) wanted = least_kv;
    uint64_t fixed = dense + scratch + process;
    uint64_t rest = memory > fixed ? memory - fixed : 0;
    if (e->options.expert_bytes > 0) { /* told apart: nothing is shared */
        if (rest < e->options.expert_bytes + least_kv)
            return too_small(e, dense, scratch, process, e->options.expert_bytes + least_kv);
        rest -= e->options.expert_bytes;
        e->options.kv_bytes = wanted < rest ? wanted : rest;
        return CHOIR_OK;
    }
    if (experts == 0 || experts + wanted <= rest || rest >= experts + experts / 8 + least_kv) {
        if (rest < experts + least_kv)
            return too_small(e, dense, scratch, process, experts + least_kv);
        e->options.kv_bytes = wanted < rest - experts ? wanted : rest - experts;
        return CHOIR_OK;
    }
    /* Streamed. Floors: KV pages and experts each keep an eighth of what they share. */
    uint64_t grown = grow_steps(e, scratch, rest);
    rest -= grown - scratch;
    scratch = grown;
    uint64_t kv_floor = rest / 8 > least_kv ? rest / 8 : least_kv;
    if (kv_floor > wanted) kv_floor = wanted;
    uint64_t expert_floor = rest / 8;
    if (expert_floor < few) expert_floor = few;
    if (rest < kv_floor + expert_floor)
        return too_small(e, dense, scratch, process, least_kv + few);
    uint64_t most_kv = rest - expert_floor;
    e->options.kv_bytes = wanted < most_kv ? wanted : most_kv;
    e->shared_bytes = rest;
    e->kv_floor_bytes = kv_floor;
    e->options.expert_bytes = rest - e->options.kv_bytes;
    return CHOIR_OK;
}

uint32_t choir_engine_kv_floor(const choir_engine *e)
{
    return e->shared_bytes == 0 ? e->n_pages : (uint32_t)(e->kv_floor_bytes / e->page_bytes);
}

void choir_engine_set_kv_pages(choir_engine *e, uint32_t n)
{
    if (e->shared_bytes == 0) return;
    uint32_t floor = choir_engine_kv_floor(e);
    if (n < floor) n = floor;
    uint64_t kv = (uint64_t)n * e->page_bytes;
    CHOIR_ASSERT(kv < e->shared_bytes);
    choir_experts_set_budget(e->experts, e->shared_bytes - kv);
}

void choir_engine_forget_page(choir_engine *e, uint32_t page)
{
    CHOIR_ASSERT(page < e->n_pages);
    choir_forget_pages(e->kv + page * e->page_bytes, e->page_bytes);
}
