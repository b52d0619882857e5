#include "scheduler/kv_pages.h"

choir_status kv_pages_create(uint32_t n, void (*wipe)(void *engine, uint32_t page), void *engine,
                             kv_pages *out)
{
    *out = (kv_pages){.n = n, .n_free = n, .wipe = wipe, .engine = engine};
    out->page = choir_calloc(CHOIR_MEM_KV, n, sizeof *out->page);
    out->free = choir_calloc(CHOIR_MEM_KV, n, sizeof *out->free);
    if (out->page == NULL || out->free == NULL) {
        kv_pages_destroy(out);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the table of %u KV pages", n);
    }
    for (uint32_t i = 0; i < n; i++) out->free[i] = n - 1 - i;
    return CHOIR_OK;
}

void kv_pages_destroy(kv_pages *pages)
{
    choir_free(pages->page);
    choir_free(pages->free);
    *pages = (kv_pages){0};
}

bool kv_pages_take(kv_pages *pages, uint32_t *page)
{
    if (pages->n_free == 0) return false;
    *page = pages->free[--pages->n_free];
    pages->page[*page].refs = 1;
    pages->page[*page].touched = true;
    return true;
}

static bool is_idle(const kv_page *p)
{
    return p->cached && p->refs == 1;
}

void kv_pages_hold(kv_pages *pages, uint32_t page)
{
    kv_page *p = &pages->page[page];
    CHOIR_ASSERT(p->refs > 0);
    pages->n_idle -= is_idle(p);
    p->refs++;
}

bool kv_pages_drop(kv_pages *pages, uint32_t page)
{
    kv_page *p = &pages->page[page];
    CHOIR_ASSERT(p->refs > 0);
    if (--p->refs > 0) {
        pages->n_idle += is_idle(p);
        return false;
    }
    CHOIR_ASSERT(!p->cached);
    if (p->suspect) pages->wipe(pages->engine, page);
    p->suspect = false;
    pages->free[pages->n_free++] = page;
    return true;
}

void kv_pages_cache(kv_pages *pages, uint32_t page)
{
    CHOIR_ASSERT(!pages->page[page].cached);
    kv_pages_hold(pages, page);
    pages->page[page].cached = true;
}

bool kv_pages_uncache(kv_pages *pages, uint32_t page)
{
    kv_page *p = &pages->page[page];
    CHOIR_ASSERT(p->cached);
    pages->n_idle -= is_idle(p);
    p->cached = false;
    return kv_pages_drop(pages, page);
}

void kv_pages_suspect(kv_pages *pages, uint32_t page)
{
    pages->page[page].suspect = true;
}
