/* Byte pair encoding. A word starts as characters (or bytes); again and again the pair with the
 * lowest rank, the leftmost of equals, becomes one symbol. Short words look for it by eye, long
 * ones keep a heap of candidates over a linked list, so that n symbols cost n log n. */
#include "engine/tokenizer_internal.h"

#include <stdio.h>

enum { SHORT_WORD = 24 }; /* symbols; below it a scan beats the heap */

choir_status choir_bpe_create(choir_bpe *b, const choir_vocab *vocab, size_t n_merges)
{
    uint32_t n_slots = 16;
    if (n_merges > 1u << 29) return choir_fail(CHOIR_E_FORMAT, "%zu merges are too many", n_merges);
    while (n_slots / 4 * 3 <= n_merges) n_slots *= 2;
    b->mask = n_slots - 1;
    b->merges = choir_alloc(CHOIR_MEM_TOKENIZER, (size_t)n_slots * sizeof *b->merges);
    if (b->merges == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu merges", n_merges);
    memset(b->merges, 0xFF, (size_t)n_slots * sizeof *b->merges);
    b->all_bytes = true;
    for (uint32_t i = 0; i < 256; i++) {
        char text[8];
        size_t n = choir_utf8_put(choir_byte_to_char((uint8_t)i), text);
        b->byte_id[i] = choir_vocab_find(vocab, text, n);
        if (b->byte_id[i] == CHOIR_NO_ID) b->all_bytes = false;
        n = (size_t)snprintf(text, sizeof text, "<0x%02X>", i);
        b->fallback_id[i] = choir_vocab_find(vocab, text, n);
    }
    return choir_word_cache_create(&b->cache);
}

void choir_bpe_destroy(choir_bpe *b)
{
    choir_free(b->merges);
    choir_free(b->score_rank);
    choir_free(b->mergeable);
    choir_word_cache_destroy(b->cache);
    *b = (choir_bpe){0};
}

void choir_bpe_scratch_free(choir_bpe_scratch *s)
{
    choir_free(s->symbols);
    choir_free(s->heap);
    choir_free(s->unused_left);
    choir_free(s->mapped.data);
    *s = (choir_bpe_scratch){0};
}

/* The slot of a pair, or the free one where it belongs. */
static choir_merge *merge_slot(const choir_bpe *b, uint32_t left, uint32_t right)
{
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    for (uint32_t i = (uint32_t)(h >> 32) & b->mask;; i = (i + 1) & b->mask) {
        choir_merge *m = &b->merges[i];
        if ((m->left == left && m->right == right) || m->id == CHOIR_NO_ID) return m;
    }
}

choir_status choir_bpe_add_merge(choir_bpe *b, const choir_vocab *vocab, uint32_t rank,
                                 const char *left, size_t left_bytes, const char *right,
                                 size_t right_bytes)
{
    char small[256], *joint = small;
    size_t bytes = left_bytes + right_bytes;
    uint32_t id = CHOIR_NO_ID, left_id = choir_vocab_find(vocab, left, left_bytes);
    uint32_t right_id = choir_vocab_find(vocab, right, right_bytes);
    if (bytes > sizeof small) joint = choir_alloc(CHOIR_MEM_TOKENIZER, bytes);
    if (joint == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a merge");
    memcpy(joint, left, left_bytes);
    memcpy(joint + left_bytes, right, right_bytes);
    id = choir_vocab_find(vocab, joint, bytes);
    if (joint != small) choir_free(joint);
    if (left_id == CHOIR_NO_ID || right_id == CHOIR_NO_ID || id == CHOIR_NO_ID)
        return choir_fail(CHOIR_E_FORMAT,
                          "merge %u (\"%.*s\" with \"%.*s\"): %s is not in the vocabulary", rank,
                          (int)(left_bytes < 60 ? left_bytes : 60), left,
                          (int)(right_bytes < 60 ? right_bytes : 60), right,
                          left_id == CHOIR_NO_ID    ? "its left part"
                          : right_id == CHOIR_NO_ID ? "its right part"
                                                    : "what it makes");
    /* A pair that is listed twice has its later rank, as in the reference. */
    *merge_slot(b, left_id, right_id) = (choir_merge){left_id, right_id, rank, id};
    return CHOIR_OK;
}

/* ---- short words: ranks of neighbours in an array, the lowest is searched each time */
static size_t merge_short(const choir_bpe *b, uint32_t *ids, size_t n)
{
    uint32_t rank[SHORT_WORD], joint[SHORT_WORD];
    for (size_t i = 0; i + 1 < n; i++) {
        const choir_merge *m = merge_slot(b, ids[i], ids[i + 1]);
        rank[i] = m->rank; /* UINT32_MAX in a free slot */
        joint[i] = m->id;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == UINT32_MAX) break;
        ids[best] = joint[best];
        n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
        if (best + 1 < n) {
            memmove(rank + best + 1, rank + best + 2, (n - best - 2) * sizeof *rank);
            memmove(joint + best + 1, joint + best + 2, (n - best - 2) * sizeof *joint);
            const choir_merge *m = merge_slot(b, ids[best], ids[best + 1]);
            rank[best] = m->rank;
            joint[best] = m->id;
        }
        if (best > 0) {
            const choir_merge *m = merge_slot(b, ids[best - 1], ids[best]);
            rank[best - 1] = m->rank;
            joint[best - 1] = m->id;
        }
    }
    return n;
}

/* ---- long words: a heap by (rank, place) */
static bool before(const choir_candidate *a, const choir_candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static choir_status heap_push(choir_bpe_scratch *s, choir_candidate c)
{
    if (s->n_heap == s->heap_capacity)
        CHOIR_TRY(
            choir_buffer_grow((void **)&s->heap, s->n_heap, &s->heap_capacity, 1, sizeof *s->heap));
    size_t i = s->n_heap++;
    while (i > 0 && before(&c, &s->heap[(i - 1) / 2])) {
        s->heap[i] = s->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    s->heap[i] = c;
    return CHOIR_OK;
}

static choir_candidate heap_pop(choir_bpe_scratch *s)
{
    choir_candidate top = s->heap[0], last = s->heap[--s->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= s->n_heap) break;
        if (child + 1 < s->n_heap && before(&s->heap[child + 1], &s->heap[child])) child++;
        if (!before(&s->heap[child], &last)) break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    if (s->n_heap > 0) s->heap[i] = last;
    return top;
}

/* What a word's symbols may become; with SentencePiece by the text they span. */
typedef struct word {
    const choir_bpe *bpe;
    const choir_vocab *vocab;
    const char *text;
    choir_bpe_scratch *scratch;
} word;

static choir_status push_pair(const word *w, int32_t left, int32_t right)
{
    if (left < 0 || right < 0) return CHOIR_OK;
    const choir_symbol *a = &w->scratch->symbols[left], *b = &w->scratch->symbols[right];
    uint32_t bytes = b->end - a->begin;
    if (w->bpe->score_rank == NULL) {
        const choir_merge *m = merge_slot(w->bpe, a->id, b->id);
        if (m->id == CHOIR_NO_ID) return CHOIR_OK;
        return heap_push(w->scratch, (choir_candidate){m->rank, (uint32_t)left, m->id, bytes});
    }
    if (bytes > w->vocab->longest) return CHOIR_OK;
    uint32_t id = choir_vocab_find(w->vocab, w->text + a->begin, bytes);
    if (id == CHOIR_NO_ID || w->bpe->mergeable[id] == CHOIR_MERGEABLE_NEVER) return CHOIR_OK;
    if (w->bpe->mergeable[id] == CHOIR_MERGEABLE_UNUSED)
        w->scratch->unused_left[id] = a->end - a->begin;
    return heap_push(w->scratch,
                     (choir_candidate){w->bpe->score_rank[id], (uint32_t)left, id, bytes});
}

static choir_status merge_long(const word *w, size_t n)
{
    choir_symbol *symbols = w->scratch->symbols;
    w->scratch->n_heap = 0;
    for (size_t i = 0; i + 1 < n; i++) CHOIR_TRY(push_pair(w, (int32_t)i, (int32_t)i + 1));
    while (w->scratch->n_heap > 0) {
        choir_candidate c = heap_pop(w->scratch);
        choir_symbol *a = &symbols[c.at];
        if (a->end == a->begin || a->next < 0) continue;
        choir_symbol *b = &symbols[a->next];
        /* Symbols only grow: the same span is the same pair, anything else is out of date. */
        if (b->end - a->begin != c.bytes) continue;
        a->id = c.id;
        a->end = b->end;
        a->next = b->next;
        b->begin = b->end;
        if (a->next >= 0) symbols[a->next].previous = (int32_t)c.at;
        CHOIR_TRY(push_pair(w, a->previous, (int32_t)c.at));
        CHOIR_TRY(push_pair(w, (int32_t)c.at, a->next));
    }
    return CHOIR_OK;
}

static choir_status add_symbol(choir_bpe_scratch *s, size_t *n, uint32_t id, size_t begin,
                               size_t end)
{
    if (*n == s->symbol_capacity)
        CHOIR_TRY(choir_buffer_grow((void **)&s->symbols, *n, &s->symbol_capacity, 1,
                                    sizeof *s->symbols));
    s->symbols[*n] = (choir_symbol){id, (uint32_t)begin, (uint32_t)end, (int32_t)*n - 1, -1};
    if (*n > 0) s->symbols[*n - 1].next = (int32_t)*n;
    ++*n;
    return CHOIR_OK;
}

/* The word's characters as symbols. A character without an id becomes its bytes' tokens if all are
 * there, else the unknown token; unknowns in a row become one if the model fuses them. Places are
 * counted in symbols here: begin and end only say which spans are the same. */
static choir_status characters(const word *w, size_t bytes, size_t *n_symbols)
{
    const choir_bpe *b = w->bpe;
    bool unknown = false; /* one is waiting to be written */
    size_t n = 0;
    for (size_t at = 0; at < bytes;) {
        size_t begin = at;
        at += choir_utf8_length((uint8_t)w->text[at]);
        if (at > bytes) at = bytes;
        uint32_t id = choir_vocab_find(w->vocab, w->text + begin, at - begin);
        if (id != CHOIR_NO_ID) {
            if (unknown) CHOIR_TRY(add_symbol(w->scratch, &n, b->unknown_id, n, n + 1));
            unknown = false;
            CHOIR_TRY(add_symbol(w->scratch, &n, id, n, n + 1));
            continue;
        }
        bool fallback = b->byte_fallback;
        for (size_t i = begin; i < at && fallback; i++)
            fallback = b->fallback_id[(uint8_t)w->text[i]] != CHOIR_NO_ID;
        if (fallback) {
            for (size_t i = begin; i < at; i++)
                CHOIR_TRY(
                    add_symbol(w->scratch, &n, b->fallback_id[(uint8_t)w->text[i]], n, n + 1));
        } else if (b->unknown_id != CHOIR_NO_ID) {
            if (unknown && !b->fuse_unknown)
                CHOIR_TRY(add_symbol(w->scratch, &n, b->unknown_id, n, n + 1));
            unknown = true;
        }
    }
    if (unknown) CHOIR_TRY(add_symbol(w->scratch, &n, b->unknown_id, n, n + 1));
    *n_symbols = n;
    return CHOIR_OK;
}

static choir_status encode_by_rank(const word *w, size_t bytes, bool raw_bytes, choir_ids *out)
{
    uint32_t ids[SHORT_WORD];
    size_t n = 0;
    if (raw_bytes && bytes <= SHORT_WORD) {
        for (; n < bytes; n++) ids[n] = w->bpe->byte_id[(uint8_t)w->text[n]];
    } else if (raw_bytes) {
        for (size_t i = 0; i < bytes; i++)
            CHOIR_TRY(add_symbol(w->scratch, &n, w->bpe->byte_id[(uint8_t)w->text[i]], n, n + 1));
    } else {
        CHOIR_TRY(characters(w, bytes, &n));
        if (n <= SHORT_WORD)
            for (size_t i = 0; i < n; i++) ids[i] = w->scratch->symbols[i].id;
    }
    if (n <= SHORT_WORD) {
        n = merge_short(w->bpe, ids, n);
        if (bytes <= CHOIR_CACHED_WORD_BYTES)
            choir_word_cache_put(w->bpe->cache, w->text, bytes, ids, n);
        return choir_ids_append(out, ids, n);
    }
    CHOIR_TRY(merge_long(w, n));
    for (int32_t i = 0; i >= 0; i = w->scratch->symbols[i].next)
        CHOIR_TRY(choir_ids_push(out, w->scratch->symbols[i].id));
    return CHOIR_OK;
}

/* ---- SentencePiece */
/* A piece that no token is: its bytes' tokens, or the unknown token, once for a run. */
static choir_status put_unknown(const word *w, size_t begin, size_t end, choir_ids *out,
                                bool *after_unknown)
{
    const choir_bpe *b = w->bpe;
    bool fallback = b->byte_fallback;
    for (size_t i = begin; i < end && fallback; i++)
        fallback = b->fallback_id[(uint8_t)w->text[i]] != CHOIR_NO_ID;
    if (fallback) {
        *after_unknown = false;
        for (size_t i = begin; i < end; i++)
            CHOIR_TRY(choir_ids_push(out, b->fallback_id[(uint8_t)w->text[i]]));
        return CHOIR_OK;
    }
    if (b->unknown_id != CHOIR_NO_ID && !*after_unknown)
        CHOIR_TRY(choir_ids_push(out, b->unknown_id));
    *after_unknown = true;
    return CHOIR_OK;
}

/* A symbol's ids; unused pieces are split as they were made. Parts get shorter, so this ends. */
static choir_status put_piece(const word *w, size_t begin, size_t end, uint32_t depth,
                              choir_ids *out, bool *after_unknown)
{
    uint32_t id = choir_vocab_find(w->vocab, w->text + begin, end - begin);
    if (id == CHOIR_NO_ID || w->bpe->mergeable[id] == CHOIR_MERGEABLE_NEVER)
        return put_unknown(w, begin, end, out, after_unknown);
    uint32_t left =
        w->bpe->mergeable[id] == CHOIR_MERGEABLE_UNUSED ? w->scratch->unused_left[id] : 0;
    if (left == 0 || left >= end - begin || depth > 1000) {
        *after_unknown = false;
        return choir_ids_push(out, id);
    }
    CHOIR_TRY(put_piece(w, begin, begin + left, depth + 1, out, after_unknown));
    return put_piece(w, begin + left, end, depth + 1, out, after_unknown);
}

static choir_status encode_by_score(const word *w, size_t bytes, choir_ids *out)
{
    size_t n = 0, n_ids = w->vocab->n_ids;
    if (w->scratch->unused_left == NULL) {
        w->scratch->unused_left = choir_calloc(CHOIR_MEM_TOKENIZER, n_ids + 1, sizeof(uint32_t));
        if (w->scratch->unused_left == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory to encode %zu bytes", bytes);
    }
    for (size_t at = 0; at < bytes;) {
        size_t begin = at;
        at += choir_utf8_length((uint8_t)w->text[at]);
        if (at > bytes) at = bytes;
        CHOIR_TRY(add_symbol(w->scratch, &n, 0, begin, at));
    }
    if (n == 0) return CHOIR_OK;
    CHOIR_TRY(merge_long(w, n));
    bool after_unknown = false;
    for (int32_t i = 0; i >= 0; i = w->scratch->symbols[i].next) {
        const choir_symbol *s = &w->scratch->symbols[i];
        CHOIR_TRY(put_piece(w, s->begin, s->end, 0, out, &after_unknown));
    }
    return CHOIR_OK;
}

choir_status choir_bpe_encode(const choir_bpe *bpe, const choir_vocab *vocab, const char *text,
                              size_t bytes, bool raw_bytes, choir_bpe_scratch *scratch,
                              choir_ids *out)
{
    word w = {bpe, vocab, text, scratch};
    if (bpe->score_rank != NULL) return encode_by_score(&w, bytes, out);
    if (bytes <= CHOIR_CACHED_WORD_BYTES) {
        uint32_t ids[CHOIR_CACHED_WORD_IDS];
        size_t n = choir_word_cache_get(bpe->cache, text, bytes, ids);
        if (n > 0) return choir_ids_append(out, ids, n);
    }
    if (bpe->ignore_merges && bytes <= vocab->longest) {
        const char *whole = text;
        size_t whole_bytes = bytes;
        if (raw_bytes) {
            scratch->mapped.n = 0;
            CHOIR_TRY(choir_bytes_reserve(&scratch->mapped, bytes * 2));
            for (size_t i = 0; i < bytes; i++)
                scratch->mapped.n += choir_utf8_put(choir_byte_to_char((uint8_t)text[i]),
                                                    scratch->mapped.data + scratch->mapped.n);
            whole = scratch->mapped.data;
            whole_bytes = scratch->mapped.n;
        }
        uint32_t id = choir_vocab_find(vocab, whole, whole_bytes);
        if (id != CHOIR_NO_ID) {
            choir_word_cache_put(bpe->cache, text, bytes, &id, 1);
            return choir_ids_push(out, id);
        }
    }
    return encode_by_rank(&w, bytes, raw_bytes, out);
}
