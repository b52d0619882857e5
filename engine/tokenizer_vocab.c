/* The vocabulary: every piece in one block of text, ids by array, pieces by a hash table. Loading
 * fifty thousand pieces makes four allocations. */
#include "engine/tokenizer_internal.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

choir_status choir_buffer_grow(void **data, size_t n, size_t *capacity, size_t more, size_t size)
{
    size_t want, bytes;
    if (__builtin_add_overflow(n, more, &want) || want > SIZE_MAX / 4)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu more items of text", more);
    size_t grown = *capacity < 16 ? 16 : *capacity * 2;
    if (grown < want) grown = want;
    if (__builtin_mul_overflow(grown, size, &bytes))
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu items of %zu bytes", grown, size);
    void *p = choir_realloc(CHOIR_MEM_TOKENIZER, *data, bytes);
    if (p == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu bytes of tokenizer text", bytes);
    *data = p;
    *capacity = grown;
    return CHOIR_OK;
}

choir_status choir_vocab_create(choir_vocab *v, uint32_t n_ids, size_t text_bytes, size_t n_pieces)
{
    uint32_t n_slots = 16;
    while (n_slots < n_pieces * 2 && n_slots < 1u << 31) n_slots *= 2;
    v->mask = n_slots - 1;
    v->slots = choir_alloc(CHOIR_MEM_TOKENIZER, (size_t)n_slots * sizeof *v->slots);
    v->offset = choir_alloc(CHOIR_MEM_TOKENIZER, ((size_t)n_ids + 1) * sizeof *v->offset);
    v->length = choir_alloc(CHOIR_MEM_TOKENIZER, ((size_t)n_ids + 1) * sizeof *v->length);
    v->flags = choir_calloc(CHOIR_MEM_TOKENIZER, (size_t)n_ids + 1, 1);
    if (v->slots == NULL || v->offset == NULL || v->length == NULL || v->flags == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a vocabulary of %u ids", n_ids);
    memset(v->slots, 0xFF, (size_t)n_slots * sizeof *v->slots);
    memset(v->length, 0xFF, ((size_t)n_ids + 1) * sizeof *v->length);
    v->n_ids = v->capacity = n_ids;
    return choir_bytes_reserve(&v->text, text_bytes + n_pieces);
}

void choir_vocab_destroy(choir_vocab *v)
{
    choir_free(v->slots);
    choir_free(v->offset);
    choir_free(v->length);
    choir_free(v->flags);
    choir_free(v->text.data);
    *v = (choir_vocab){0};
}

/* The slot of this piece, or the free one where it belongs. The table is never more than half full.
 */
static uint32_t *slot_of(const choir_vocab *v, const char *piece, size_t bytes)
{
    uint32_t i = (uint32_t)XXH3_64bits(piece, bytes) & v->mask;
    for (;; i = (i + 1) & v->mask) {
        uint32_t id = v->slots[i];
        if (id == CHOIR_NO_ID) break;
        if (v->length[id] == bytes && memcmp(v->text.data + v->offset[id], piece, bytes) == 0)
            break;
    }
    return &v->slots[i];
}

static choir_status grow_table(choir_vocab *v)
{
    size_t n_slots = ((size_t)v->mask + 1) * 2;
    if (n_slots > UINT32_MAX)
        return choir_fail(CHOIR_E_FORMAT, "a vocabulary of %u pieces is too large", v->n_pieces);
    uint32_t *slots = choir_alloc(CHOIR_MEM_TOKENIZER, n_slots * sizeof *slots);
    if (slots == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a vocabulary of %u pieces",
                          v->n_pieces);
    memset(slots, 0xFF, n_slots * sizeof *slots);
    uint32_t *old = v->slots, n_old = v->mask + 1;
    v->slots = slots;
    v->mask = (uint32_t)(n_slots - 1);
    for (uint32_t i = 0; i < n_old; i++)
        if (old[i] != CHOIR_NO_ID)
            *slot_of(v, v->text.data + v->offset[old[i]], v->length[old[i]]) = old[i];
    choir_free(old);
    return CHOIR_OK;
}

/* Room for ids up to and including `id`; for added tokens behind the model's vocabulary. */
static choir_status grow_ids(choir_vocab *v, uint32_t id)
{
    if (id < v->capacity) {
        if (id >= v->n_ids) v->n_ids = id + 1;
        return CHOIR_OK;
    }
    uint32_t capacity = id + 1 + id / 4;
    uint32_t *offset =
        choir_realloc(CHOIR_MEM_TOKENIZER, v->offset, (size_t)capacity * sizeof *offset);
    if (offset != NULL) v->offset = offset;
    uint32_t *length =
        choir_realloc(CHOIR_MEM_TOKENIZER, v->length, (size_t)capacity * sizeof *length);
    if (length != NULL) v->length = length;
    uint8_t *flags = choir_realloc(CHOIR_MEM_TOKENIZER, v->flags, capacity);
    if (flags != NULL) v->flags = flags;
    if (offset == NULL || length == NULL || flags == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a vocabulary of %u ids", capacity);
    memset(v->length + v->capacity, 0xFF, (size_t)(capacity - v->capacity) * sizeof *length);
    memset(v->flags + v->capacity, 0, capacity - v->capacity);
    v->capacity = capacity;
    v->n_ids = id + 1;
    return CHOIR_OK;
}

choir_status choir_vocab_add(choir_vocab *v, uint32_t id, const char *piece, size_t bytes)
{
    if (id >= UINT32_MAX / 2 || bytes >= UINT32_MAX / 2 || v->text.n >= UINT32_MAX / 2)
        return choir_fail(CHOIR_E_FORMAT, "a vocabulary beyond 2 GiB (id %u)", id);
    CHOIR_TRY(grow_ids(v, id));
    if (v->length[id] != CHOIR_NO_ID)
        return choir_fail(CHOIR_E_FORMAT, "id %u has two pieces: \"%s\" and \"%.*s\"", id,
                          v->text.data + v->offset[id], (int)(bytes < 100 ? bytes : 100), piece);
    if ((size_t)(v->n_pieces + 1) * 2 > (size_t)v->mask + 1) CHOIR_TRY(grow_table(v));
    size_t offset = v->text.n;
    CHOIR_TRY(choir_bytes_append(&v->text, piece, bytes));
    CHOIR_TRY(choir_bytes_append(&v->text, "", 1));
    uint32_t *slot = slot_of(v, piece, bytes);
    if (*slot == CHOIR_NO_ID) *slot = id;
    v->offset[id] = (uint32_t)offset;
    v->length[id] = (uint32_t)bytes;
    v->n_pieces++;
    if (bytes > v->longest) v->longest = (uint32_t)bytes;
    return CHOIR_OK;
}

uint32_t choir_vocab_find(const choir_vocab *v, const char *piece, size_t bytes)
{
    return *slot_of(v, piece, bytes);
}
