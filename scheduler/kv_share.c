/* How many KV pages may be in use, where they share their memory with streamed experts: as many as
 * the sequences need, and no fewer than the floor. A long context takes memory from cold experts at
 * once; what is no longer needed goes back when it was not for a while. The same for adapters: what
 * is claimed is taken from cold experts, as fast as these let go of it. */
#include "scheduler/state.h"

enum {
    PATIENCE = 64, /* ticks that pages are idle before they go back */
    DRAINING = 16, /* and more, in which the loader frees what was evicted */
};

static uint32_t with_margin(const choir_scheduler *s, uint32_t pages)
{
    uint32_t wanted = pages + pages / 8 + 1;
    if (wanted < s->engine.kv_floor) wanted = s->engine.kv_floor;
    return wanted < s->pages.n ? wanted : s->pages.n;
}

static void set_pages(choir_scheduler *s, uint32_t n)
{
    s->n_kv_pages = n;
    s->n_idle_ticks = 0;
    s->engine.set_pages(s->engine.engine, n);
}

/* Cached prefixes go, oldest first, until no more than `target` pages are in use; what is free is
 * not held. */
static void evict_to(choir_scheduler *s, uint32_t target)
{
    while (s->prefix != NULL && s->pages.n - s->pages.n_free > target)
        if (!prefix_cache_evict(s->prefix)) break;
    for (uint32_t i = 0; i < s->pages.n_free; i++) {
        kv_page *p = &s->pages.page[s->pages.free[i]];
        if (p->touched) s->engine.forget_page(s->engine.engine, s->pages.free[i]);
        p->touched = false;
    }
}

void kv_share_begin(choir_scheduler *s)
{
    s->n_kv_pages = s->pages.n;
    if (s->engine.set_pages != NULL) set_pages(s, with_margin(s, 0));
    s->adapter_bytes = s->engine.adapter_floor;
}

/* Adapters that nobody claims stay while experts do not want the memory more than a while. */
static void share_with_adapters(choir_scheduler *s)
{
    choir_adapters_stats t;
    if (s->engine.adapters == NULL || s->engine.set_adapter_bytes == NULL) return;
    choir_adapters_get_stats(s->engine.adapters, &t);
    uint64_t wanted = t.wanted_bytes + t.wanted_bytes / 8, asked = s->adapter_bytes;
    if (wanted < s->engine.adapter_floor) wanted = s->engine.adapter_floor;
    if (wanted > t.most_bytes) wanted = t.most_bytes;
    if (wanted + wanted / 8 >= asked) s->n_spare_ticks = 0;
    /* First they go, then experts get what they have left. */
    bool less = wanted < asked && ++s->n_spare_ticks >= PATIENCE &&
                choir_adapters_set_budget(s->engine.adapters, wanted) <= wanted;
    if (wanted > asked || less) asked = wanted;
    bool drains = s->n_spare_ticks >= PATIENCE && s->n_spare_ticks < PATIENCE + DRAINING;
    if (asked == s->adapter_bytes && (t.budget_bytes >= asked || drains)) return;
    s->adapter_bytes = asked;
    s->n_spare_ticks = 0;
    uint64_t granted = s->engine.set_adapter_bytes(s->engine.engine, asked);
    choir_adapters_set_budget(s->engine.adapters, granted);
}

void kv_share_before_step(choir_scheduler *s)
{
    share_with_adapters(s);
    if (s->engine.set_pages == NULL) return;
    uint32_t used = s->pages.n - s->pages.n_free, active = used - s->pages.n_idle;
    if (used > s->n_kv_pages) {
        if (s->pages.n_idle > 0) evict_to(s, s->n_kv_pages); /* rather than take from experts */
        used = s->pages.n - s->pages.n_free;
        if (used > s->n_kv_pages) set_pages(s, with_margin(s, used));
    }
    /* Cached prefixes keep the floor; beyond it experts are the better use. */
    uint32_t target = with_margin(s, active);
    if (target + target / 8 >= s->n_kv_pages)
        s->n_idle_ticks = 0;
    else if (++s->n_idle_ticks >= PATIENCE) {
        evict_to(s, target);
        set_pages(s, with_margin(s, s->pages.n - s->pages.n_free));
    }
}
