#include "base/memory.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Counters are relaxed: each is a statistic of its own, read by people. */
static atomic_size_t bytes_held[CHOIR_MEM_N_TAGS];
static atomic_uint_fast64_t n_allocs;
static atomic_int_fast64_t fail_in; /* > 0: calls left until the one that fails */

typedef struct header {
    size_t bytes;
    choir_memory_tag tag;
    uint32_t magic;
} header;
_Static_assert(sizeof(header) == 16, "keeps the user's pointer 16-aligned");
enum { MAGIC = 0xC401F00D };

static void count(choir_memory_tag tag, size_t bytes, bool add)
{
    if (add)
        atomic_fetch_add_explicit(&bytes_held[tag], bytes, memory_order_relaxed);
    else
        atomic_fetch_sub_explicit(&bytes_held[tag], bytes, memory_order_relaxed);
}

static bool must_fail(void)
{
    atomic_fetch_add_explicit(&n_allocs, 1, memory_order_relaxed);
    if (atomic_load_explicit(&fail_in, memory_order_relaxed) <= 0) return false;
    if (atomic_fetch_sub_explicit(&fail_in, 1, memory_order_relaxed) != 1) return false;
    errno = ENOMEM;
    return true;
}

void *choir_alloc(choir_memory_tag tag, size_t bytes)
{
    if (must_fail() || bytes > SIZE_MAX - sizeof(header)) return NULL;
    header *h = malloc(sizeof(header) + bytes);
    if (h == NULL) return NULL;
    *h = (header){bytes, tag, MAGIC};
    count(tag, bytes, true);
    return h + 1;
}

void *choir_calloc(choir_memory_tag tag, size_t n, size_t bytes)
{
    size_t total;
    if (__builtin_mul_overflow(n, bytes, &total)) return NULL;
    void *p = choir_alloc(tag, total);
    if (p != NULL) memset(p, 0, total);
    return p;
}

void *choir_realloc(choir_memory_tag tag, void *p, size_t bytes)
{
    if (p == NULL) return choir_alloc(tag, bytes);
    if (must_fail() || bytes > SIZE_MAX - sizeof(header)) return NULL;
    header *old = (header *)p - 1;
    CHOIR_ASSERT(old->magic == MAGIC);
    size_t before = old->bytes;
    header *h = realloc(old, sizeof(header) + bytes);
    if (h == NULL) return NULL;
    h->bytes = bytes;
    count(h->tag, before, false);
    count(h->tag, bytes, true);
    return h + 1;
}

char *choir_strdup(choir_memory_tag tag, const char *text)
{
    size_t n = strlen(text) + 1;
    char *copy = choir_alloc(tag, n);
    if (copy != NULL) memcpy(copy, text, n);
    return copy;
}

void choir_free(void *p)
{
    if (p == NULL) return;
    header *h = (header *)p - 1;
    CHOIR_ASSERT(h->magic == MAGIC);
    h->magic = 0;
    count(h->tag, h->bytes, false);
    free(h);
}

enum { HUGE_PAGE = 2 << 20 };

size_t choir_pages_bytes(size_t bytes)
{
    return choir_round_up(bytes, (size_t)sysconf(_SC_PAGESIZE));
}

void *choir_alloc_pages(choir_memory_tag tag, size_t bytes)
{
    if (must_fail() || bytes == 0 || bytes > SIZE_MAX / 2) return NULL;
    size_t size = choir_pages_bytes(bytes), huge = size & ~(size_t)(HUGE_PAGE - 1);
    size_t page = huge > 0 ? HUGE_PAGE : (size_t)sysconf(_SC_PAGESIZE), span = size + page;
    char *raw = mmap(NULL, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    char *start = (char *)choir_round_up((uintptr_t)raw, page);
    if (start > raw) munmap(raw, (size_t)(start - raw));
    char *end = start + size;
    if (raw + span > end) munmap(end, (size_t)(raw + span - end));
    /* Advice: a kernel without huge pages serves small ones. */
    if (huge > 0) madvise(start, huge, MADV_HUGEPAGE);
    count(tag, size, true);
    return start;
}

void choir_free_pages(choir_memory_tag tag, void *p, size_t bytes)
{
    if (p == NULL) return;
    munmap(p, choir_pages_bytes(bytes));
    count(tag, choir_pages_bytes(bytes), false);
}

void choir_forget_pages(void *p, size_t bytes)
{
    uintptr_t begin = ((uintptr_t)p + 4095) & ~(uintptr_t)4095;
    uintptr_t end = ((uintptr_t)p + bytes) & ~(uintptr_t)4095;
    if (end > begin) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

size_t choir_memory_bytes(choir_memory_tag tag)
{
    return atomic_load_explicit(&bytes_held[tag], memory_order_relaxed);
}

uint64_t choir_memory_resident(void)
{
    unsigned long long size = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f == NULL) return 0;
    if (fscanf(f, "%llu %llu", &size, &resident) != 2) resident = 0;
    fclose(f);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

const char *choir_memory_tag_text(choir_memory_tag tag)
{
    static const char *const text[] = {
#define X(name, words) words,
        CHOIR_MEMORY_TAGS(X)
#undef X
    };
    return text[tag];
}

uint64_t choir_memory_n_allocs(void)
{
    return atomic_load_explicit(&n_allocs, memory_order_relaxed);
}

void choir_memory_fail_at(uint64_t n)
{
    atomic_store_explicit(&fail_in, (int_fast64_t)n, memory_order_relaxed);
}

typedef struct chunk {
    struct chunk *next;
    size_t bytes, used;
    char *data; /* 64-aligned, inside this allocation */
} chunk;

enum { CHUNK_HEAD = sizeof(chunk) + 64 };

/* Huge pages: thousands of small ones cost more to get than most of what is written into them. */
static bool is_large(size_t chunk_bytes)
{
    return chunk_bytes >= HUGE_PAGE;
}

struct choir_arena {
    choir_memory_tag tag;
    size_t chunk_bytes;
    chunk *first, *current;
};

choir_status choir_arena_create(choir_memory_tag tag, size_t chunk_bytes, choir_arena **out)
{
    choir_arena *arena = choir_calloc(tag, 1, sizeof *arena);
    if (arena == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for an arena");
    arena->tag = tag;
    arena->chunk_bytes = chunk_bytes;
    *out = arena;
    return CHOIR_OK;
}

void choir_arena_destroy(choir_arena *arena)
{
    if (arena == NULL) return;
    for (chunk *c = arena->first; c != NULL;) {
        chunk *next = c->next;
        if (is_large(c->bytes))
            choir_free_pages(arena->tag, c, CHUNK_HEAD + c->bytes);
        else
            choir_free(c);
        c = next;
    }
    choir_free(arena);
}

static chunk *add_chunk(choir_arena *arena, size_t bytes)
{
    if (bytes < arena->chunk_bytes) bytes = arena->chunk_bytes;
    chunk *c = is_large(bytes) ? choir_alloc_pages(arena->tag, CHUNK_HEAD + bytes)
                               : choir_alloc(arena->tag, CHUNK_HEAD + bytes);
    if (c == NULL) return NULL;
    c->bytes = bytes;
    c->used = 0;
    c->data = (char *)(((uintptr_t)(c + 1) + 63) & ~(uintptr_t)63);
    if (arena->current == NULL) {
        c->next = arena->first;
        arena->first = c;
    } else {
        c->next = arena->current->next;
        arena->current->next = c;
    }
    arena->current = c;
    return c;
}

void *choir_arena_alloc(choir_arena *arena, size_t bytes)
{
    if (bytes > SIZE_MAX - 4096) return NULL;
    size_t want = bytes == 0 ? 64 : (bytes + 63) & ~(size_t)63;
    chunk *c = arena->current;
    while (c != NULL && c->bytes - c->used < want) {
        c = c->next;
        if (c != NULL) {
            c->used = 0;
            arena->current = c;
        }
    }
    if (c == NULL && (c = add_chunk(arena, want)) == NULL) return NULL;
    void *p = c->data + c->used;
    c->used += want;
    return p;
}

void choir_arena_reset(choir_arena *arena)
{
    arena->current = arena->first;
    if (arena->first != NULL) arena->first->used = 0;
}

size_t choir_arena_used(const choir_arena *arena)
{
    size_t used = 0;
    for (const chunk *c = arena->first; c != NULL; c = c->next) {
        used += c->used;
        if (c == arena->current) break;
    }
    return used;
}
