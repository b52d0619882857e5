/* WHAT    Pages that were used and will be again: what the kernel gives has to be cleared, and by a
 *         hypervisor found, which takes longer than filling it.
 * OWNS    The pages that it keeps; those that were taken are the taker's until they are given back.
 * THREADS One at a time.
 * ERRORS  NULL: no memory.
 * LIMITS  It keeps at most `limit` bytes; of what is given beyond that, the oldest goes.
 * NEXT    base/memory.h, whose pages they are */
#pragma once
#include "base/memory.h"

typedef struct choir_page_cache choir_page_cache;

choir_page_cache *choir_page_cache_create(choir_memory_tag tag, size_t limit) CHOIR_MUST_USE;
void choir_page_cache_destroy(choir_page_cache *cache); /* all that was taken has been given back */

/* Of choir_pages_bytes(bytes), aligned as choir_alloc_pages() has them; what they hold is anything.
 * cache: NULL, and they come from the kernel. The tag is the cache's. */
void *choir_page_cache_take(choir_page_cache *cache, choir_memory_tag tag,
                            size_t bytes) CHOIR_MUST_USE;
/* With the bytes that were taken; p may be NULL. */
void choir_page_cache_give(choir_page_cache *cache, choir_memory_tag tag, void *p, size_t bytes);
