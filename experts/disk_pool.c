/* The same reads by a pool of threads that pread: for kernels and containers without io_uring. */
#include "experts/disk.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 8 };

typedef struct pool {
    choir_disk disk;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t work, arrived;
    pthread_t threads[MAX_THREADS];
    uint32_t n_threads, depth;
    choir_read *queue;     /* [depth] a ring of reads not begun */
    choir_read_done *done; /* [depth] */
    uint32_t first, n_queued, n_done, n_in_flight;
    bool stop;
} pool;

static int read_whole(const choir_read *r)
{
    uint32_t done = 0;
    while (done < r->need) {
        ssize_t n = pread(r->fd, r->to + done, r->bytes - done, (off_t)(r->offset + done));
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (n < 0 && errno == EINVAL && done % CHOIR_DISK_PAGE != 0)
            return ENODATA; /* ragged end */
        if (n < 0) return errno;
        if (n == 0) return ENODATA;
        done += (uint32_t)n;
    }
    return 0;
}

static void *serve(void *arg)
{
    pool *p = arg;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (p->n_queued == 0 && !p->stop) pthread_cond_wait(&p->work, &p->lock);
        if (p->n_queued == 0) break;
        choir_read r = p->queue[p->first];
        p->first = (p->first + 1) % p->depth;
        p->n_queued--;
        pthread_mutex_unlock(&p->lock);
        int error = read_whole(&r);
        pthread_mutex_lock(&p->lock);
        p->done[p->n_done++] = (choir_read_done){r.tag, error};
        pthread_cond_signal(&p->arrived);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static uint32_t submit(choir_disk *disk, const choir_read *reads, uint32_t n)
{
    pool *p = (pool *)disk;
    uint32_t taken = 0;
    pthread_mutex_lock(&p->lock);
    for (; taken < n && p->n_in_flight < p->depth; taken++, p->n_in_flight++)
        p->queue[(p->first + p->n_queued++) % p->depth] = reads[taken];
    if (taken > 0) pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    return taken;
}

static uint32_t reap(choir_disk *disk, choir_read_done *done, uint32_t max, uint64_t wait_ns)
{
    pool *p = (pool *)disk;
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    uint64_t ns = (uint64_t)end.tv_nsec + wait_ns;
    end.tv_sec += (time_t)(ns / CHOIR_SECOND);
    end.tv_nsec = (long)(ns % CHOIR_SECOND);
    uint32_t n = 0;
    pthread_mutex_lock(&p->lock);
    while (p->n_done == 0 && p->n_in_flight > 0 && wait_ns > 0)
        if (pthread_cond_timedwait(&p->arrived, &p->lock, &end) == ETIMEDOUT) break;
    for (; n < max && p->n_done > 0; n++, p->n_in_flight--) done[n] = p->done[--p->n_done];
    pthread_mutex_unlock(&p->lock);
    return n;
}

static void use_memory(choir_disk *disk, void *data, size_t bytes, bool in_use)
{
    (void)disk, (void)data, (void)bytes, (void)in_use;
}

static void use_file(choir_disk *disk, int fd)
{
    (void)disk, (void)fd;
}

static void close_pool(choir_disk *disk)
{
    pool *p = (pool *)disk;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < p->n_threads; i++) pthread_join(p->threads[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->work);
    pthread_cond_destroy(&p->arrived);
    choir_free(p->queue);
    choir_free(p->done);
    choir_free(p);
}

choir_status choir_disk_pool_open(uint32_t depth, choir_disk **out)
{
    pool *p = choir_calloc(CHOIR_MEM_EXPERTS, 1, sizeof *p);
    if (p == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a pool of readers");
    p->disk = (choir_disk){"pread", submit, reap, use_memory, use_file, close_pool};
    p->depth = depth;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->arrived, &monotonic);
    pthread_condattr_destroy(&monotonic);
    p->queue = choir_calloc(CHOIR_MEM_EXPERTS, depth, sizeof *p->queue);
    p->done = choir_calloc(CHOIR_MEM_EXPERTS, depth, sizeof *p->done);
    choir_status status = CHOIR_OK;
    if (p->queue == NULL || p->done == NULL)
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for a queue of %u reads", depth);
    uint32_t n = depth < MAX_THREADS ? depth : MAX_THREADS;
    while (status == CHOIR_OK && p->n_threads < n) {
        status = choir_thread_start(&p->threads[p->n_threads], "choir-reader", serve, p);
        if (status == CHOIR_OK) p->n_threads++;
    }
    if (status != CHOIR_OK) {
        close_pool(&p->disk);
        return status;
    }
    *out = &p->disk;
    return CHOIR_OK;
}
