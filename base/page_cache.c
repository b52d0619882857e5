#include "base/page_cache.h"

#include <string.h>

enum { MAX_KEPT = 32 };

typedef struct block {
    void *p;
    size_t bytes;
} block;

struct choir_page_cache {
    choir_memory_tag tag;
    size_t limit, kept_bytes;
    uint32_t n;
    block kept[MAX_KEPT]; /* the oldest first */
};

choir_page_cache *choir_page_cache_create(choir_memory_tag tag, size_t limit)
{
    choir_page_cache *c = choir_calloc(tag, 1, sizeof *c);
    if (c == NULL) return NULL;
    c->tag = tag;
    c->limit = limit;
    return c;
}

static block remove_at(choir_page_cache *c, uint32_t i)
{
    block b = c->kept[i];
    c->n--;
    memmove(c->kept + i, c->kept + i + 1, (c->n - i) * sizeof *c->kept);
    c->kept_bytes -= b.bytes;
    return b;
}

static void drop_oldest(choir_page_cache *c)
{
    block b = remove_at(c, 0);
    choir_free_pages(c->tag, b.p, b.bytes);
}

void choir_page_cache_destroy(choir_page_cache *c)
{
    if (c == NULL) return;
    while (c->n > 0) drop_oldest(c);
    choir_free(c);
}

/* The youngest kept block of a size, or c->n. */
static uint32_t find(const choir_page_cache *c, size_t bytes)
{
    for (uint32_t i = c->n; i-- > 0;)
        if (c->kept[i].bytes == bytes) return i;
    return c->n;
}

void *choir_page_cache_take(choir_page_cache *c, choir_memory_tag tag, size_t bytes)
{
    size_t size = choir_pages_bytes(bytes);
    uint32_t at = c != NULL ? find(c, size) : 0;
    return c != NULL && at < c->n ? remove_at(c, at).p : choir_alloc_pages(tag, size);
}

void choir_page_cache_give(choir_page_cache *c, choir_memory_tag tag, void *p, size_t bytes)
{
    size_t size = choir_pages_bytes(bytes);
    if (p == NULL) return;
    if (c == NULL || size > c->limit) {
        choir_free_pages(tag, p, size);
        return;
    }
    while (c->n == MAX_KEPT || c->kept_bytes + size > c->limit) drop_oldest(c);
    c->kept[c->n++] = (block){p, size};
    c->kept_bytes += size;
}
