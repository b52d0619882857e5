/* WHAT    Tagged memory: every long-lived byte has a tag, so one call answers who holds it; arenas for
 *         the three lifetimes (process, sequence, step).
 * OWNS    Process-wide counters per tag. An arena owns its chunks.
 * THREADS choir_alloc* and the counters: any. An arena: its owner only.
 * ERRORS  NULL (alloc) or CHOIR_E_NO_MEMORY; the process never aborts for lack of memory.
 * LIMITS  Tests make the i-th allocation fail with choir_memory_fail_at().
 * NEXT    base/base.h */
#pragma once
#include "base/error.h"

/* X(name, what people read) */
#define CHOIR_MEMORY_TAGS(X)                                                                       \
    X(OTHER, "other")                                                                              \
    X(WEIGHTS, "weights")                                                                          \
    X(EXPERTS, "experts")                                                                          \
    X(ADAPTERS, "adapters")                                                                        \
    X(KV, "KV pages")                                                                              \
    X(SCRATCH, "step scratch")                                                                     \
    X(TOKENIZER, "tokenizer")                                                                      \
    X(REQUESTS, "requests")                                                                        \
    X(PREFIX, "prefix cache")                                                                      \
    X(SERVER, "server")                                                                            \
    X(TUNE, "training")                                                                            \
    X(LEARNING, "learning")

typedef enum choir_memory_tag {
#define X(name, text) CHOIR_MEM_##name,
    CHOIR_MEMORY_TAGS(X)
#undef X
    CHOIR_MEM_N_TAGS
} choir_memory_tag;

static inline size_t choir_round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

void *choir_alloc(choir_memory_tag tag, size_t bytes) CHOIR_MUST_USE;  /* uninitialised, 16-aligned */
void *choir_calloc(choir_memory_tag tag, size_t n, size_t bytes) CHOIR_MUST_USE; /* zeroed, checked */
/* Grows or shrinks; `p` may be NULL. On failure NULL, and `p` is untouched. Keeps p's tag. */
void *choir_realloc(choir_memory_tag tag, void *p, size_t bytes) CHOIR_MUST_USE;
char *choir_strdup(choir_memory_tag tag, const char *text) CHOIR_MUST_USE;
void choir_free(void *p); /* NULL is fine; only for memory of the calls above */

/* Zeroed, by whole pages: huge ones of 2 MiB (advised) as far as they go, small ones for the rest. For
 * weights, experts, adapters, KV. Freed with its size. */
size_t choir_pages_bytes(size_t bytes); /* what so many take */
void *choir_alloc_pages(choir_memory_tag tag, size_t bytes) CHOIR_MUST_USE;
void choir_free_pages(choir_memory_tag tag, void *p, size_t bytes);

/* The whole system pages within are given back; they read as zeros afterwards. */
void choir_forget_pages(void *p, size_t bytes);

size_t choir_memory_bytes(choir_memory_tag tag);
uint64_t choir_memory_resident(void); /* of the whole process, as the kernel counts; 0: it does not say */
const char *choir_memory_tag_text(choir_memory_tag tag);
uint64_t choir_memory_n_allocs(void);      /* calls so far, for "a warm step allocates nothing" */
/* The n-th call from now (1 = next) fails, once; 0 turns it off. Process-wide, for tests. */
void choir_memory_fail_at(uint64_t n);

typedef struct choir_arena choir_arena;
choir_status choir_arena_create(choir_memory_tag tag, size_t chunk_bytes, choir_arena **out);
void choir_arena_destroy(choir_arena *arena);
void *choir_arena_alloc(choir_arena *arena, size_t bytes) CHOIR_MUST_USE; /* 64-aligned, uninit. */
void choir_arena_reset(choir_arena *arena); /* everything is gone; chunks are kept for reuse */
size_t choir_arena_used(const choir_arena *arena);
