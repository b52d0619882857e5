#include "base/workers.h"

#include "base/memory.h"
#include "base/thread.h"

#include <linux/futex.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() ((void)0)
#endif

enum { SPINS = 4000 }; /* about 50-100 us on today's x86: longer than the gaps inside one step */

struct choir_workers {
    uint32_t n;
    int spins; /* SPINS, or 0 with more workers than CPUs: whoever is waited for needs this one */
    pthread_t *threads;
    choir_work work; /* written by the owner before `round` is released */
    void *arg;
    /* What is waited for is moved by change() and watched by await_change(). */
    _Alignas(64) _Atomic uint32_t round;   /* up in run(), watched by helper(): publishes work */
    _Alignas(64) _Atomic uint32_t pending; /* down in helper(), watched by run() */
    _Alignas(64) _Atomic uint32_t sleepers;
    _Atomic uint32_t stop;                 /* published by `round` like work */
    _Alignas(64) _Atomic uint32_t arrived; /* acq_rel count in sync(); the last one resets it */
    _Alignas(64) _Atomic uint32_t phase;   /* up by the last to arrive, watched by the others */
};

typedef struct seat {
    choir_workers *workers;
    uint32_t index;
} seat;

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}

/* Waits until *word differs from `seen`, and returns what it is. Spins first, since what is waited for
 * is mostly near; then sleeps: a core that spins while experts are read is taken from whoever reads
 * them (on a virtual machine, the disk's own thread). */
static uint32_t await_change(choir_workers *w, _Atomic uint32_t *word, uint32_t seen)
{
    for (int i = 0; i < w->spins; i++) {
        uint32_t now = atomic_load_explicit(word, memory_order_acquire);
        if (now != seen) return now;
        RELAX();
    }
    for (;;) {
        /* seq_cst pairs with change(): either it sees the sleeper, or the sleeper sees the change. */
        atomic_fetch_add(&w->sleepers, 1);
        uint32_t now = atomic_load(word);
        if (now == seen) futex_wait(word, seen);
        atomic_fetch_sub(&w->sleepers, 1);
        now = atomic_load_explicit(word, memory_order_acquire);
        if (now != seen) return now;
    }
}

static void change(choir_workers *w, _Atomic uint32_t *word, uint32_t by)
{
    atomic_fetch_add(word, by);
    if (atomic_load(&w->sleepers) > 0) futex_wake_all(word);
}

static void *helper(void *arg)
{
    seat *s = arg;
    choir_workers *w = s->workers;
    uint32_t index = s->index, seen = 0;
    choir_free(s);
    for (;;) {
        seen = await_change(w, &w->round, seen);
        if (atomic_load_explicit(&w->stop, memory_order_relaxed)) return NULL;
        w->work(w->arg, index, w->n);
        change(w, &w->pending, UINT32_MAX);
    }
}

void choir_workers_run(choir_workers *w, choir_work work, void *arg)
{
    if (w->n > 1) {
        w->work = work;
        w->arg = arg;
        atomic_store_explicit(&w->pending, w->n - 1, memory_order_relaxed);
        change(w, &w->round, 1);
    }
    work(arg, 0, w->n);
    uint32_t left = atomic_load_explicit(&w->pending, memory_order_acquire);
    while (left != 0) left = await_change(w, &w->pending, left);
}

void choir_workers_sync(choir_workers *w)
{
    if (w->n == 1) return;
    uint32_t phase = atomic_load_explicit(&w->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&w->arrived, 1, memory_order_acq_rel) + 1 == w->n) {
        atomic_store_explicit(&w->arrived, 0, memory_order_relaxed);
        change(w, &w->phase, 1);
        return;
    }
    await_change(w, &w->phase, phase);
}

uint32_t choir_workers_count(const choir_workers *workers) { return workers->n; }

uint32_t choir_workers_best(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 256 ? 256 : (uint32_t)n;
}

static choir_status start_helper(choir_workers *w, uint32_t index)
{
    seat *s = choir_alloc(CHOIR_MEM_OTHER, sizeof *s);
    if (s == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a worker thread");
    *s = (seat){w, index};
    choir_status status = choir_thread_start(&w->threads[index], "choir-worker", helper, s);
    if (status != CHOIR_OK) choir_free(s);
    return status;
}

choir_status choir_workers_create(uint32_t n_workers, choir_workers **out)
{
    if (n_workers < 1 || n_workers > 256)
        return choir_fail(CHOIR_E_INVALID, "threads is %u, must be 1 to 256", n_workers);
    choir_workers *w = NULL;
    /* The struct holds cache-line-aligned members, which plain allocation does not promise. */
    w = choir_alloc_pages(CHOIR_MEM_OTHER, sizeof *w);
    if (w == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for worker threads");
    w->threads = choir_calloc(CHOIR_MEM_OTHER, n_workers, sizeof *w->threads);
    if (w->threads == NULL) {
        choir_free_pages(CHOIR_MEM_OTHER, w, sizeof *w);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for worker threads");
    }
    w->n = 1;
    w->spins = n_workers > choir_workers_best() ? 0 : SPINS;
    for (uint32_t i = 1; i < n_workers; i++) {
        choir_status status = start_helper(w, i);
        if (status != CHOIR_OK) {
            choir_workers_destroy(w);
            return status;
        }
        w->n = i + 1; /* no helper reads n before the first run() */
    }
    *out = w;
    return CHOIR_OK;
}

void choir_workers_destroy(choir_workers *w)
{
    if (w == NULL) return;
    atomic_store_explicit(&w->stop, 1, memory_order_relaxed);
    change(w, &w->round, 1);
    for (uint32_t i = 1; i < w->n; i++) pthread_join(w->threads[i], NULL);
    choir_free(w->threads);
    choir_free_pages(CHOIR_MEM_OTHER, w, sizeof *w);
}
