/* KV page numbers with reference counts; internal to scheduler/.
 * 1. A page is free (refs 0, on the free stack) or held (refs >= 1).
 * 2. A sequence writes only into pages that it alone holds (refs 1): shared pages are full.
 * 3. Whoever takes a reference gives it back exactly once.
 * 4. A cached page has one reference of the prefix cache's; n_idle counts those with no other.
 * 5. A suspect page (its KV may hold NaN) is wiped before it is free again. */
#pragma once
#include "base/base.h"

typedef struct kv_page {
    uint32_t refs;
    bool cached, suspect, touched; /* touched: its memory may be held */
} kv_page;

typedef struct kv_pages {
    uint32_t n, n_free, n_idle;
    kv_page *page;  /* [n] */
    uint32_t *free; /* stack of free page numbers */
    void (*wipe)(void *engine, uint32_t page);
    void *engine;
} kv_pages;

choir_status kv_pages_create(uint32_t n, void (*wipe)(void *engine, uint32_t page), void *engine,
                             kv_pages *out) CHOIR_MUST_USE;
void kv_pages_destroy(kv_pages *pages);
bool kv_pages_take(kv_pages *pages, uint32_t *page); /* refs 1; false: none is free */
void kv_pages_hold(kv_pages *pages, uint32_t page);  /* one more reference */
bool kv_pages_drop(kv_pages *pages, uint32_t page);  /* one less; true: it became free */
/* The prefix cache takes its reference, and gives it back. */
void kv_pages_cache(kv_pages *pages, uint32_t page);
bool kv_pages_uncache(kv_pages *pages, uint32_t page);
void kv_pages_suspect(kv_pages *pages, uint32_t page);
