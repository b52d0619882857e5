/* Words seen before. A table of fixed size, one 64-byte entry a place, overwritten by whoever
 * comes: no locks, no growth. An entry is read and written under a sequence number: odd while a
 * writer is in it. */
#include "engine/tokenizer_internal.h"

#include <stdatomic.h>

enum { N_ENTRIES = 1 << 15, KEY_WORDS = 3, ID_WORDS = 4 };
_Static_assert(KEY_WORDS * 8 == CHOIR_CACHED_WORD_BYTES, "the key holds a whole word");
_Static_assert(ID_WORDS * 2 == CHOIR_CACHED_WORD_IDS, "two ids in each 64 bits");

typedef struct entry {
    /* Bits 0–7: n_ids, 8–15: bytes, 32–63: the sequence number. Its acquire load in get pairs with
     * the release store that ends put. */
    atomic_uint_fast64_t head;
    atomic_uint_fast64_t key[KEY_WORDS];
    atomic_uint_fast64_t ids[ID_WORDS];
} entry;
_Static_assert(sizeof(entry) == 64, "one cache line");

struct choir_word_cache {
    char *block;
    entry *entries; /* 64-aligned, inside the block */
};

choir_status choir_word_cache_create(choir_word_cache **out)
{
    choir_word_cache *c = choir_calloc(CHOIR_MEM_TOKENIZER, 1, sizeof *c);
    if (c == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a cache of words");
    *out = c;
    c->block = choir_calloc(CHOIR_MEM_TOKENIZER, N_ENTRIES + 1, sizeof(entry));
    if (c->block == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a cache of words");
    c->entries = (entry *)(((uintptr_t)c->block + 63) & ~(uintptr_t)63);
    return CHOIR_OK;
}

void choir_word_cache_destroy(choir_word_cache *c)
{
    if (c == NULL) return;
    choir_free(c->block);
    choir_free(c);
}

static entry *place(const choir_word_cache *c, const char *word, size_t bytes,
                    uint64_t key[KEY_WORDS])
{
    memset(key, 0, KEY_WORDS * 8);
    memcpy(key, word, bytes);
    uint64_t h = (key[0] ^ bytes) * 0x9E3779B97F4A7C15u;
    h = (h ^ (h >> 29) ^ key[1]) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 32) ^ key[2]) * 0x94D049BB133111EBu;
    return &c->entries[(h >> 40) & (N_ENTRIES - 1)];
}

size_t choir_word_cache_get(const choir_word_cache *c, const char *word, size_t bytes,
                            uint32_t *ids)
{
    uint64_t key[KEY_WORDS], packed[ID_WORDS];
    entry *e = place(c, word, bytes, key);
    uint64_t head = atomic_load_explicit(&e->head, memory_order_acquire);
    if ((head >> 8 & 0xFF) != bytes || (head >> 32 & 1) != 0) return 0;
    for (size_t i = 0; i < KEY_WORDS; i++)
        if (atomic_load_explicit(&e->key[i], memory_order_acquire) != key[i]) return 0;
    for (size_t i = 0; i < ID_WORDS; i++)
        packed[i] = atomic_load_explicit(&e->ids[i], memory_order_acquire);
    if (atomic_load_explicit(&e->head, memory_order_relaxed) != head) return 0;
    memcpy(ids, packed, sizeof packed);
    return head & 0xFF;
}

void choir_word_cache_put(choir_word_cache *c, const char *word, size_t bytes, const uint32_t *ids,
                          size_t n_ids)
{
    if (n_ids == 0 || n_ids > CHOIR_CACHED_WORD_IDS || bytes > CHOIR_CACHED_WORD_BYTES) return;
    uint64_t key[KEY_WORDS], packed[ID_WORDS] = {0};
    entry *e = place(c, word, bytes, key);
    memcpy(packed, ids, n_ids * sizeof *ids);
    uint64_t head = atomic_load_explicit(&e->head, memory_order_relaxed);
    uint64_t sequence = head >> 32;
    if (sequence & 1) return; /* another writer is in it */
    if (!atomic_compare_exchange_strong_explicit(&e->head, &head, (sequence + 1) << 32,
                                                 memory_order_acquire, memory_order_relaxed))
        return;
    /* Release: a reader that sees any of these sees the odd number too, and lets go. */
    for (size_t i = 0; i < KEY_WORDS; i++)
        atomic_store_explicit(&e->key[i], key[i], memory_order_release);
    for (size_t i = 0; i < ID_WORDS; i++)
        atomic_store_explicit(&e->ids[i], packed[i], memory_order_release);
    atomic_store_explicit(&e->head, (uint64_t)(uint32_t)(sequence + 2) << 32 | bytes << 8 | n_ids,
                          memory_order_release);
}
