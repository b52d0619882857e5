#include "scheduler/kv_pages.h"

choir_status kv_pages_create(uint32_t n, kv_pages *out)
{
    *out = (kv_pages){.n = n, .n_free = n};
    out->refs = choir_calloc(CHOIR_MEM_KV, n, sizeof *out->refs);
    out->free = choir_calloc(CHOIR_MEM_KV, n, sizeof *out->free);
    if (out->refs == NULL || out->free == NULL) {
        kv_pages_destroy(out);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the table of %u KV pages", n);
    }
    for (uint32_t i = 0; i < n; i++) out->free[i] = n - 1 - i;
    return CHOIR_OK;
}

void kv_pages_destroy(kv_pages *pages)
{
    choir_free(pages->refs);
    choir_free(pages->free);
    *pages = (kv_pages){0};
}

bool kv_pages_take(kv_pages *pages, uint32_t *page)
{
    if (pages->n_free == 0) return false;
    *page = pages->free[--pages->n_free];
    pages->refs[*page] = 1;
    return true;
}

void kv_pages_hold(kv_pages *pages, uint32_t page)
{
    CHOIR_ASSERT(pages->refs[page] > 0);
    pages->refs[page]++;
}

bool kv_pages_drop(kv_pages *pages, uint32_t page)
{
    CHOIR_ASSERT(pages->refs[page] > 0);
    if (--pages->refs[page] > 0) return false;
    pages->free[pages->n_free++] = page;
    return true;
}
