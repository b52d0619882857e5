/* Reads by io_uring: prepare, submit, reap. A completion carries the number of its operation, which
 * stays taken until it is whole: a short read goes on where it ended. */
#include "experts/disk.h"

#include <errno.h>
#include <liburing.h>
#include <string.h>

enum { MAX_BUFFERS = 1024, MAX_FILES = 64, MAX_BUFFER_BYTES = 1 << 30 };

typedef struct operation {
    choir_read read;
    uint32_t done; /* bytes */
} operation;

typedef struct uring {
    choir_disk disk;
    struct io_uring ring;
    pthread_t owner;
    bool plain, open, buffers, files; /* buffers, files: tables are registered */
    uint32_t depth, n_free, n_waiting;
    operation *operations; /* [depth] */
    uint32_t *free;        /* [depth] numbers of operations that are not taken */
    uint32_t *again;       /* [depth] operations to be prepared once more */
    struct iovec memory[MAX_BUFFERS];
    int fds[MAX_FILES];
    uint32_t n_fds;
} uring;

static void register_memory(uring *u, uint32_t i)
{
    __u64 tag = 0;
    if (u->buffers && io_uring_register_buffers_update_tag(&u->ring, i, &u->memory[i], &tag, 1) < 0)
        u->memory[i].iov_len = 0; /* RLIMIT_MEMLOCK, say: it is read into all the same */
}

static int open_ring(uring *u)
{
    struct io_uring_params p = {0};
    if (!u->plain)
        p.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                  IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_CQSIZE;
    p.cq_entries = 4 * u->depth;
    int e = io_uring_queue_init_params(u->depth, &u->ring, &p);
    if (e < 0) return e;
    u->owner = pthread_self();
    u->open = true;
    u->buffers = !u->plain && io_uring_register_buffers_sparse(&u->ring, MAX_BUFFERS) == 0;
    u->files = !u->plain && io_uring_register_files_sparse(&u->ring, MAX_FILES) == 0;
    for (uint32_t i = 0; u->files && i < u->n_fds; i++)
        u->files = io_uring_register_files_update(&u->ring, i, &u->fds[i], 1) == 1;
    for (uint32_t i = 0; i < MAX_BUFFERS; i++)
        if (u->memory[i].iov_len > 0) register_memory(u, i);
    return 0;
}

/* A ring with one issuer belongs to the thread that made it; who takes over gets one of his own. */
static bool own_ring(uring *u)
{
    if (u->open && (u->plain || pthread_equal(u->owner, pthread_self()))) return true;
    if (u->open && u->n_free == u->depth) {
        io_uring_queue_exit(&u->ring);
        u->open = false;
    }
    return !u->open && open_ring(u) == 0;
}

static int registered_file(const uring *u, int fd)
{
    for (uint32_t i = 0; u->files && i < u->n_fds; i++)
        if (u->fds[i] == fd) return (int)i;
    return -1;
}

static int registered_memory(const uring *u, const uint8_t *to, uint32_t bytes)
{
    for (uint32_t i = 0; u->buffers && i < MAX_BUFFERS; i++) {
        const uint8_t *base = u->memory[i].iov_base;
        size_t n = u->memory[i].iov_len;
        if (n > 0 && to >= base && to + bytes <= base + n) return (int)i;
    }
    return -1;
}

/* False: the submission queue is full. */
static bool prepare(uring *u, uint32_t number)
{
    operation *o = &u->operations[number];
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);
    if (sqe == NULL) return false;
    uint8_t *to = o->read.to + o->done;
    uint32_t bytes = o->read.bytes - o->done;
    int file = registered_file(u, o->read.fd), memory = registered_memory(u, to, bytes);
    int fd = file >= 0 ? file : o->read.fd;
    if (memory >= 0)
        io_uring_prep_read_fixed(sqe, fd, to, bytes, o->read.offset + o->done, memory);
    else
        io_uring_prep_read(sqe, fd, to, bytes, o->read.offset + o->done);
    if (file >= 0) sqe->flags |= IOSQE_FIXED_FILE; /* the prep call has cleared the flags */
    io_uring_sqe_set_data64(sqe, number);
    return true;
}

static void prepare_again(uring *u)
{
    while (u->n_waiting > 0 && prepare(u, u->again[u->n_waiting - 1])) u->n_waiting--;
}

static uint32_t submit(choir_disk *disk, const choir_read *reads, uint32_t n)
{
    uring *u = (uring *)disk;
    uint32_t taken = 0;
    if (!own_ring(u)) return 0;
    prepare_again(u);
    for (; taken < n && u->n_free > 0; taken++) {
        uint32_t number = u->free[u->n_free - 1];
        u->operations[number] = (operation){.read = reads[taken]};
        if (!prepare(u, number)) break;
        u->n_free--;
    }
    io_uring_submit(&u->ring); /* what it cannot take now stays in the queue for the next call */
    return taken;
}

/* True: the operation is whole, for better or worse. */
static bool take_result(uring *u, uint32_t number, int result, choir_read_done *done)
{
    operation *o = &u->operations[number];
    int error = 0;
    if (result == -EINTR || result == -EAGAIN) {
        u->again[u->n_waiting++] = number;
        return false;
    }
    if (result == -EINVAL && o->done % CHOIR_DISK_PAGE != 0)
        result = 0; /* a direct read that goes on behind a file's ragged end */
    if (result < 0)
        error = -result;
    else
        o->done += (uint32_t)result;
    if (error == 0 && o->done < o->read.need) {
        if (result == 0) {
            error = ENODATA;
        } else {
            u->again[u->n_waiting++] = number;
            return false;
        }
    }
    *done = (choir_read_done){o->read.tag, error};
    u->free[u->n_free++] = number;
    return true;
}

static uint32_t take_all(uring *u, choir_read_done *done, uint32_t max)
{
    struct io_uring_cqe *cqe;
    uint32_t n = 0;
    while (n < max && io_uring_peek_cqe(&u->ring, &cqe) == 0) {
        uint32_t number = (uint32_t)io_uring_cqe_get_data64(cqe);
        int result = cqe->res;
        io_uring_cqe_seen(&u->ring, cqe);
        if (take_result(u, number, result, &done[n])) n++;
    }
    if (u->n_waiting > 0) {
        prepare_again(u);
        io_uring_submit(&u->ring);
    }
    return n;
}

static uint32_t reap(choir_disk *disk, choir_read_done *done, uint32_t max, uint64_t wait_ns)
{
    uring *u = (uring *)disk;
    if (u->n_free == u->depth || !own_ring(u)) return 0;
    uint32_t n = take_all(u, done, max);
    uint64_t end = choir_clock_now() + wait_ns;
    while (n == 0 && u->n_free < u->depth && wait_ns > 0) {
        uint64_t now = choir_clock_now();
        if (now >= end) break;
        struct io_uring_cqe *cqe;
        struct __kernel_timespec wait = {(int64_t)((end - now) / CHOIR_SECOND),
                                         (int64_t)((end - now) % CHOIR_SECOND)};
        int e = io_uring_wait_cqe_timeout(&u->ring, &cqe, &wait);
        if (e < 0 && e != -EINTR && e != -ETIME && e != -EAGAIN) break;
        n = take_all(u, done, max);
    }
    return n;
}

static void use_memory(choir_disk *disk, void *data, size_t bytes, bool in_use)
{
    uring *u = (uring *)disk;
    for (uint32_t i = 0; i < MAX_BUFFERS; i++) {
        struct iovec *m = &u->memory[i];
        if (!in_use && m->iov_base == data && m->iov_len > 0) {
            *m = (struct iovec){0};
            if (u->open) register_memory(u, i);
            return;
        }
        if (in_use && m->iov_len == 0 && bytes <= MAX_BUFFER_BYTES) {
            *m = (struct iovec){data, bytes};
            if (u->open) register_memory(u, i);
            return;
        }
    }
}

static void use_file(choir_disk *disk, int fd)
{
    uring *u = (uring *)disk;
    if (u->n_fds == MAX_FILES) return;
    u->fds[u->n_fds] = fd;
    if (u->open && u->files && io_uring_register_files_update(&u->ring, u->n_fds, &fd, 1) != 1)
        return;
    u->n_fds++;
}

static void close_uring(choir_disk *disk)
{
    uring *u = (uring *)disk;
    choir_read_done done[16];
    if (u->open) {
        while (u->n_free < u->depth && reap(disk, done, 16, CHOIR_SECOND) > 0) {
        }
        io_uring_queue_exit(&u->ring); /* cancels and waits for what is left */
    }
    choir_free(u->operations);
    choir_free(u->free);
    choir_free(u->again);
    choir_free(u);
}

choir_status choir_disk_uring_open(uint32_t depth, bool plain, choir_disk **out)
{
    uring *u = choir_calloc(CHOIR_MEM_EXPERTS, 1, sizeof *u);
    if (u == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a queue of reads");
    u->disk = (choir_disk){
        plain ? "io_uring-plain" : "io_uring", submit, reap, use_memory, use_file, close_uring};
    u->plain = plain;
    u->depth = u->n_free = depth;
    u->operations = choir_calloc(CHOIR_MEM_EXPERTS, depth, sizeof *u->operations);
    u->free = choir_calloc(CHOIR_MEM_EXPERTS, depth, sizeof *u->free);
    u->again = choir_calloc(CHOIR_MEM_EXPERTS, depth, sizeof *u->again);
    choir_status status = CHOIR_OK;
    if (u->operations == NULL || u->free == NULL || u->again == NULL)
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for a queue of %u reads", depth);
    for (uint32_t i = 0; status == CHOIR_OK && i < depth; i++) u->free[i] = depth - 1 - i;
    if (status == CHOIR_OK) {
        int e = open_ring(u);
        if (e < 0)
            status = choir_fail(e == -ENOMEM ? CHOIR_E_NO_MEMORY : CHOIR_E_UNAVAILABLE,
                                "the kernel gives no %s ring: %s", u->disk.name, strerror(-e));
    }
    if (status != CHOIR_OK) {
        close_uring(&u->disk);
        return status;
    }
    *out = &u->disk;
    return CHOIR_OK;
}
