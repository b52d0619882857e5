/* Full KV pages by everything that made them; internal to scheduler/.
 * A page's key is the hash of (its parent's key, its tokens); the first parent is the hash of the
 * tenant's salt and the engine's digest. Where adapters begin to act, the page's key is joined with
 * theirs, and so are all behind it: what lies before is the model's own. The tokens are compared
 * too, so that a collision is a miss. The cache holds one reference of each page it knows; pages
 * that only it holds are given back oldest first. Holders touch their pages last to first when they
 * let go: so a page is given back before its parent, without which nobody would find it. */
#pragma once
#include "scheduler/kv_pages.h"

typedef struct prefix_key {
    uint64_t low, high;
} prefix_key;

typedef struct prefix_cache prefix_cache;

choir_status prefix_cache_create(kv_pages *pages, uint32_t page_tokens,
                                 prefix_cache **out) CHOIR_MUST_USE;
void prefix_cache_destroy(prefix_cache *cache);
prefix_key prefix_root(uint64_t salt, uint64_t digest);
prefix_key prefix_child(prefix_key parent, const uint32_t *tokens, uint32_t page_tokens);
/* Of words that say what else made a page: adapters. */
prefix_key prefix_of_words(const uint64_t *words, uint32_t n);
prefix_key prefix_joined(prefix_key key, prefix_key more);
/* The page of a key, with a reference for the caller; false: not there. */
bool prefix_cache_find(prefix_cache *cache, prefix_key parent, prefix_key key,
                       const uint32_t *tokens, uint32_t *page);
/* Makes a full page known (a key that is known already is left alone). */
void prefix_cache_add(prefix_cache *cache, prefix_key parent, prefix_key key,
                      const uint32_t *tokens, uint32_t page);
/* Gives back the page that nobody else has held for the longest; false: there is none. */
bool prefix_cache_evict(prefix_cache *cache);
void prefix_cache_touch(prefix_cache *cache, uint32_t page); /* used just now, if it is known */
/* A page whose content went bad is known no more, nor is any page that was computed from it: all
 * are suspect. */
void prefix_cache_forget(prefix_cache *cache, uint32_t page);
