/* WHAT    Reads without waiting: submit many, reap them in the order of their arrival. By io_uring, or by a
 *         pool of threads that pread where the kernel forbids io_uring; the results are the same.
 * OWNS    Its ring or threads; not the files, not the memory read into.
 * THREADS One thread calls submit and reap; another may take over when nothing is in flight.
 * ERRORS  open: CHOIR_E_NO_MEMORY, CHOIR_E_UNAVAILABLE (a backend that was asked for by name and is not
 *         to be had). A read's own error arrives with it.
 * LIMITS  At most `depth` reads in flight. Short reads, EINTR and EAGAIN are completed here, in one place.
 *         Direct files want offset, bytes and memory to be multiples of CHOIR_DISK_PAGE.
 * NEXT    experts/store.c, which decides what is read */
#pragma once
#include "base/base.h"

enum { CHOIR_DISK_PAGE = 4096 };

/* X(name, text): from the best to the plainest. */
#define CHOIR_IO_LIST(X)                                                                           \
    X(AUTO, "auto")         /* the first of the others that works */                               \
    X(URING, "io_uring")    /* one issuer, deferred task work, registered files and buffers */     \
    X(URING_PLAIN, "io_uring-plain")                                                               \
    X(PREAD, "pread")       /* a pool of threads */

typedef enum choir_io {
#define X(name, text) CHOIR_IO_##name,
    CHOIR_IO_LIST(X)
#undef X
    CHOIR_N_IO
} choir_io;
const char *choir_io_text(choir_io io);
bool choir_io_parse(const char *text, choir_io *out);

typedef struct choir_read {
    int fd;
    uint64_t offset;
    uint8_t *to;
    uint32_t bytes; /* to read, at most … */
    uint32_t need;  /* … and at least; the difference may lie beyond the file's end */
    uint64_t tag;   /* the caller's: comes back with the read */
} choir_read;

typedef struct choir_read_done {
    uint64_t tag;
    int error; /* 0, or an errno; ENODATA: the file ends before `need` bytes */
} choir_read_done;

/* A disk is what has these; tests have one of their own. */
typedef struct choir_disk {
    const char *name; /* "io_uring" */
    /* Takes the first reads that there is room for, and says how many. */
    uint32_t (*submit)(struct choir_disk *disk, const choir_read *reads, uint32_t n);
    /* Takes what has arrived, waiting up to wait_ns for the first. */
    uint32_t (*reap)(struct choir_disk *disk, choir_read_done *done, uint32_t max, uint64_t wait_ns);
    /* Memory that will be read into again and again (or no longer); may do nothing. */
    void (*use_memory)(struct choir_disk *disk, void *data, size_t bytes, bool in_use);
    void (*use_file)(struct choir_disk *disk, int fd);
    void (*close)(struct choir_disk *disk); /* waits for what is in flight */
} choir_disk;

choir_status choir_disk_open(choir_io io, uint32_t depth, choir_disk **out) CHOIR_MUST_USE;

/* Opens a file for reading past the page cache, or through it where the file system has no such reads. */
choir_status choir_disk_open_file(const char *path, int *out_fd, uint64_t *out_bytes, bool *out_direct)
    CHOIR_MUST_USE;

/* The backends, for choir_disk_open(). */
choir_status choir_disk_uring_open(uint32_t depth, bool plain, choir_disk **out) CHOIR_MUST_USE;
choir_status choir_disk_pool_open(uint32_t depth, choir_disk **out) CHOIR_MUST_USE;
