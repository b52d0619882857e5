#include "scheduler/prefix_cache.h"

#include <string.h>
#include <xxhash.h>

enum { NONE = UINT32_MAX };

/* Entry i belongs to page i: a page has one content, so the table needs no allocation after
 * creation. */
typedef struct entry {
    bool known;
    prefix_key parent, key;
    uint32_t next;         /* in its bucket */
    uint32_t older, newer; /* by last use */
} entry;

struct prefix_cache {
    kv_pages *pages;
    uint32_t page_tokens, mask;
    entry *entries;   /* [n_pages] */
    uint32_t *tokens; /* [n_pages, page_tokens] */
    uint32_t *buckets;
    uint32_t oldest, newest;
};

choir_status prefix_cache_create(kv_pages *pages, uint32_t page_tokens, prefix_cache **out)
{
    prefix_cache *c = choir_calloc(CHOIR_MEM_PREFIX, 1, sizeof *c);
    if (c == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the prefix cache");
    uint32_t size = 16;
    while (size < pages->n && size < 1U << 30) size *= 2;
    *c = (prefix_cache){.pages = pages,
                        .page_tokens = page_tokens,
                        .mask = size - 1,
                        .oldest = NONE,
                        .newest = NONE};
    c->entries = choir_calloc(CHOIR_MEM_PREFIX, pages->n, sizeof *c->entries);
    c->tokens = choir_calloc(CHOIR_MEM_PREFIX, (size_t)pages->n * page_tokens, sizeof *c->tokens);
    c->buckets = choir_alloc(CHOIR_MEM_PREFIX, size * sizeof *c->buckets);
    if (c->entries == NULL || c->tokens == NULL || c->buckets == NULL) {
        prefix_cache_destroy(c);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the prefix cache of %u pages",
                          pages->n);
    }
    memset(c->buckets, 0xFF, size * sizeof *c->buckets);
    *out = c;
    return CHOIR_OK;
}

void prefix_cache_destroy(prefix_cache *c)
{
    if (c == NULL) return;
    choir_free(c->entries);
    choir_free(c->tokens);
    choir_free(c->buckets);
    choir_free(c);
}

static prefix_key key_of(XXH128_hash_t h)
{
    return (prefix_key){h.low64, h.high64};
}
static bool same_key(prefix_key a, prefix_key b)
{
    return a.low == b.low && a.high == b.high;
}

prefix_key prefix_root(uint64_t salt, uint64_t digest)
{
    const uint64_t words[2] = {salt, digest};
    return key_of(XXH3_128bits(words, sizeof words));
}

prefix_key prefix_child(prefix_key parent, const uint32_t *tokens, uint32_t page_tokens)
{
    XXH128_hash_t h = XXH3_128bits_withSeed(tokens, page_tokens * sizeof *tokens, parent.low);
    const uint64_t words[4] = {parent.low, parent.high, h.low64, h.high64};
    return key_of(XXH3_128bits(words, sizeof words));
}

prefix_key prefix_of_words(const uint64_t *words, uint32_t n)
{
    return key_of(XXH3_128bits(words, n * sizeof *words));
}

prefix_key prefix_joined(prefix_key key, prefix_key more)
{
    const uint64_t words[4] = {key.low, key.high, more.low, more.high};
    return prefix_of_words(words, 4);
}

static void unlink_use(prefix_cache *c, uint32_t i)
{
    entry *e = &c->entries[i];
    if (e->older != NONE)
        c->entries[e->older].newer = e->newer;
    else
        c->oldest = e->newer;
    if (e->newer != NONE)
        c->entries[e->newer].older = e->older;
    else
        c->newest = e->older;
}

static void link_newest(prefix_cache *c, uint32_t i)
{
    entry *e = &c->entries[i];
    e->older = c->newest;
    e->newer = NONE;
    if (c->newest != NONE)
        c->entries[c->newest].newer = i;
    else
        c->oldest = i;
    c->newest = i;
}

static uint32_t lookup(const prefix_cache *c, prefix_key parent, prefix_key key,
                       const uint32_t *tokens)
{
    for (uint32_t i = c->buckets[key.low & c->mask]; i != NONE; i = c->entries[i].next) {
        const entry *e = &c->entries[i];
        if (same_key(e->key, key) && same_key(e->parent, parent) &&
            memcmp(c->tokens + (size_t)i * c->page_tokens, tokens,
                   c->page_tokens * sizeof *tokens) == 0)
            return i;
    }
    return NONE;
}

bool prefix_cache_find(prefix_cache *c, prefix_key parent, prefix_key key, const uint32_t *tokens,
                       uint32_t *page)
{
    uint32_t i = lookup(c, parent, key, tokens);
    if (i == NONE) return false;
    kv_pages_hold(c->pages, i);
    *page = i;
    return true;
}

void prefix_cache_add(prefix_cache *c, prefix_key parent, prefix_key key, const uint32_t *tokens,
                      uint32_t page)
{
    entry *e = &c->entries[page];
    if (e->known || lookup(c, parent, key, tokens) != NONE) return;
    uint32_t *bucket = &c->buckets[key.low & c->mask];
    *e = (entry){.known = true, .parent = parent, .key = key, .next = *bucket};
    *bucket = page;
    memcpy(c->tokens + (size_t)page * c->page_tokens, tokens, c->page_tokens * sizeof *tokens);
    link_newest(c, page);
    kv_pages_cache(c->pages, page);
}

void prefix_cache_touch(prefix_cache *c, uint32_t page)
{
    if (!c->entries[page].known) return;
    unlink_use(c, page);
    link_newest(c, page);
}

static void forget(prefix_cache *c, uint32_t i)
{
    uint32_t *at = &c->buckets[c->entries[i].key.low & c->mask];
    while (*at != i) at = &c->entries[*at].next;
    *at = c->entries[i].next;
    unlink_use(c, i);
    c->entries[i].known = false;
    kv_pages_uncache(c->pages, i);
}

/* Poison is rare: a look at every page for each that is forgotten will do. The depth is that of the
 * longest sequence in pages. */
void prefix_cache_forget(prefix_cache *c, uint32_t page)
{
    if (!c->entries[page].known) return;
    prefix_key gone = c->entries[page].key;
    kv_pages_suspect(c->pages, page);
    forget(c, page);
    for (uint32_t i = 0; i < c->pages->n; i++)
        if (c->entries[i].known && same_key(c->entries[i].parent, gone)) prefix_cache_forget(c, i);
}

bool prefix_cache_evict(prefix_cache *c)
{
    if (c->pages->n_idle == 0) return false;
    for (uint32_t i = c->oldest; i != NONE; i = c->entries[i].newer)
        if (c->pages->page[i].refs == 1) {
            forget(c, i);
            return true;
        }
    return false;
}
