/* WHAT    Growable arrays for the tokenizer's scratch: bytes, ids, pieces of a text.
 * OWNS    Its array, until the matching free; a zeroed struct is an empty array.
 * THREADS One owner each.
 * ERRORS  CHOIR_E_NO_MEMORY; what was there stays.
 * LIMITS  Doubling growth: appending n items costs O(n).
 * NEXT    engine/tokenizer_internal.h */
#pragma once
#include "base/memory.h"
#include <string.h>

typedef struct choir_bytes {
    char *data;
    size_t n, capacity;
} choir_bytes;

typedef struct choir_ids {
    uint32_t *data;
    size_t n, capacity;
} choir_ids;

/* A piece [begin, end) of a text. `first` says that it starts where the caller's text starts. */
typedef struct choir_piece {
    size_t begin, end;
    bool first;
} choir_piece;

typedef struct choir_pieces {
    choir_piece *data;
    size_t n, capacity;
} choir_pieces;

/* Room for `more` items of `size` bytes behind n. */
choir_status choir_buffer_grow(void **data, size_t n, size_t *capacity, size_t more,
                               size_t size) CHOIR_MUST_USE;

static inline choir_status choir_bytes_reserve(choir_bytes *b, size_t more)
{
    if (b->capacity - b->n >= more) return CHOIR_OK;
    return choir_buffer_grow((void **)&b->data, b->n, &b->capacity, more, 1);
}

static inline choir_status choir_bytes_append(choir_bytes *b, const void *data, size_t n)
{
    CHOIR_TRY(choir_bytes_reserve(b, n));
    if (n > 0) memcpy(b->data + b->n, data, n);
    b->n += n;
    return CHOIR_OK;
}

static inline choir_status choir_ids_push(choir_ids *ids, uint32_t id)
{
    if (ids->n == ids->capacity)
        CHOIR_TRY(choir_buffer_grow((void **)&ids->data, ids->n, &ids->capacity, 1, sizeof id));
    ids->data[ids->n++] = id;
    return CHOIR_OK;
}

static inline choir_status choir_ids_append(choir_ids *ids, const uint32_t *more, size_t n)
{
    if (ids->capacity - ids->n < n)
        CHOIR_TRY(choir_buffer_grow((void **)&ids->data, ids->n, &ids->capacity, n, sizeof *more));
    if (n > 0) memcpy(ids->data + ids->n, more, n * sizeof *more);
    ids->n += n;
    return CHOIR_OK;
}

/* Empty pieces vanish, as they do in the reference after every step. */
static inline choir_status choir_pieces_push(choir_pieces *p, size_t begin, size_t end, bool first)
{
    if (begin >= end) return CHOIR_OK;
    if (p->n == p->capacity)
        CHOIR_TRY(choir_buffer_grow((void **)&p->data, p->n, &p->capacity, 1, sizeof *p->data));
    p->data[p->n++] = (choir_piece){begin, end, first};
    return CHOIR_OK;
}
