/* See bad_disk.h. */
#include "tests/router/learn/bad_disk.h"
#include "base/base.h"

#include <fcntl.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Written or cut since the last sync, in order. */
typedef struct change {
    sqlite3_int64 offset;
    int bytes; /* -1: the file was cut at `offset` */
} change;

/* What a path's file has not synced yet, whichever handle wrote it. */
typedef struct dirt {
    struct dirt *next;
    char path[4200];
    change *changes;
    size_t n, room;
} dirt;

typedef struct bad_file {
    sqlite3_file base;
    int platter, file; /* -1: not a journal's file */
    dirt *dirt;
    sqlite3_file *real; /* behind this struct */
} bad_file;

static sqlite3_vfs *disk, bad;
static sqlite3_io_methods methods;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static dirt *all_dirt;
static bad_plan plan;
static bool armed;
static uint64_t n_calls, n_failed, n_opens_failed;

static dirt *dirt_of(const char *path)
{
    pthread_mutex_lock(&lock);
    dirt *d = all_dirt;
    while (d != NULL && strcmp(d->path, path) != 0) d = d->next;
    if (d == NULL) {
        d = calloc(1, sizeof *d);
        CHOIR_ASSERT(d != NULL);
        snprintf(d->path, sizeof d->path, "%s", path);
        d->next = all_dirt;
        all_dirt = d;
    }
    pthread_mutex_unlock(&lock);
    return d;
}

static void forget_dirt(void)
{
    while (all_dirt != NULL) {
        dirt *next = all_dirt->next;
        free(all_dirt->changes);
        free(all_dirt);
        all_dirt = next;
    }
}

void bad_disk_arm(const bad_plan *what)
{
    pthread_mutex_lock(&lock);
    forget_dirt();
    plan = *what;
    armed = true;
    n_calls = n_failed = n_opens_failed = 0;
    pthread_mutex_unlock(&lock);
}

void bad_disk_disarm(void)
{
    pthread_mutex_lock(&lock);
    armed = false;
    forget_dirt();
    pthread_mutex_unlock(&lock);
}

uint64_t bad_disk_failures(void)
{
    pthread_mutex_lock(&lock);
    uint64_t n = n_failed;
    pthread_mutex_unlock(&lock);
    return n;
}

static bool fails(bad_call call)
{
    if (!armed) return false;
    if (call == BAD_OPEN && call != plan.call && n_failed > 0) return n_opens_failed++ < plan.opens;
    if (call != plan.call) return false;
    n_calls++;
    if (n_calls < plan.at || n_calls > plan.at + plan.more) return false;
    n_failed++;
    return true;
}

/* SQLITE_OK, or what this call fails with. */
static int fate(bad_call call)
{
    pthread_mutex_lock(&lock);
    int rc = !fails(call) ? SQLITE_OK : call == BAD_OPEN ? SQLITE_CANTOPEN : plan.rc;
    pthread_mutex_unlock(&lock);
    return rc;
}

/* Only the writer's connection writes, so its thread alone comes here. */
static void note(const bad_file *f, sqlite3_int64 offset, int bytes)
{
    dirt *d = f->dirt;
    if (d == NULL) return;
    if (d->n == d->room) {
        d->room = 2 * d->room + 16;
        d->changes = realloc(d->changes, d->room * sizeof *d->changes);
        CHOIR_ASSERT(d->changes != NULL);
    }
    d->changes[d->n++] = (change){offset, bytes};
}

static void copy_range(int from, int to, sqlite3_int64 offset, size_t bytes)
{
    char buffer[65536];
    while (bytes > 0) {
        ssize_t n = pread(from, buffer, bytes < sizeof buffer ? bytes : sizeof buffer, offset);
        if (n <= 0) return; /* it was cut since */
        CHOIR_ASSERT(pwrite(to, buffer, (size_t)n, offset) == n);
        offset += n;
        bytes -= (size_t)n;
    }
}

static int bad_close(sqlite3_file *file)
{
    bad_file *f = (bad_file *)file;
    if (f->platter >= 0) close(f->platter);
    if (f->file >= 0) close(f->file);
    return f->real->pMethods->xClose(f->real);
}

static int bad_read(sqlite3_file *file, void *to, int bytes, sqlite3_int64 offset)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xRead(f->real, to, bytes, offset);
}

static int bad_write(sqlite3_file *file, const void *data, int bytes, sqlite3_int64 offset)
{
    bad_file *f = (bad_file *)file;
    int rc = fate(BAD_WRITE);
    if (rc != SQLITE_OK) return rc;
    rc = fate(BAD_HALF_WRITE);
    if (rc != SQLITE_OK) bytes /= 2;
    int wrote = f->real->pMethods->xWrite(f->real, data, bytes, offset);
    note(f, offset, bytes);
    return rc != SQLITE_OK ? rc : wrote;
}

static int bad_truncate(sqlite3_file *file, sqlite3_int64 bytes)
{
    bad_file *f = (bad_file *)file;
    int rc = fate(BAD_TRUNCATE);
    if (rc != SQLITE_OK) return rc;
    note(f, bytes, -1);
    return f->real->pMethods->xTruncate(f->real, bytes);
}

static int bad_sync(sqlite3_file *file, int flags)
{
    (void)flags;
    bad_file *f = (bad_file *)file;
    int rc = fate(BAD_SYNC);
    dirt *d = f->dirt;
    if (d == NULL) return rc;
    for (size_t i = 0; rc == SQLITE_OK && i < d->n; i++) {
        const change *c = &d->changes[i];
        if (c->bytes < 0) {
            CHOIR_ASSERT(ftruncate(f->platter, c->offset) == 0);
        } else {
            copy_range(f->file, f->platter, c->offset, (size_t)c->bytes);
        }
    }
    d->n = 0; /* also if it failed: then what was written is lost */
    return rc;
}

static int bad_file_size(sqlite3_file *file, sqlite3_int64 *out)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xFileSize(f->real, out);
}

static int bad_lock(sqlite3_file *file, int level)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xLock(f->real, level);
}

static int bad_unlock(sqlite3_file *file, int level)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xUnlock(f->real, level);
}

static int bad_check_lock(sqlite3_file *file, int *out)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xCheckReservedLock(f->real, out);
}

static int bad_control(sqlite3_file *file, int op, void *arg)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xFileControl(f->real, op, arg);
}

static int bad_sector(sqlite3_file *file)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xSectorSize(f->real);
}

static int bad_traits(sqlite3_file *file)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xDeviceCharacteristics(f->real);
}

static int bad_shm_map(sqlite3_file *file, int page, int bytes, int extend, void volatile **out)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xShmMap(f->real, page, bytes, extend, out);
}

static int bad_shm_lock(sqlite3_file *file, int offset, int n, int flags)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xShmLock(f->real, offset, n, flags);
}

static void bad_shm_barrier(sqlite3_file *file)
{
    bad_file *f = (bad_file *)file;
    f->real->pMethods->xShmBarrier(f->real);
}

static int bad_shm_unmap(sqlite3_file *file, int erase)
{
    bad_file *f = (bad_file *)file;
    return f->real->pMethods->xShmUnmap(f->real, erase);
}

static int bad_open(sqlite3_vfs *vfs, sqlite3_filename name, sqlite3_file *file, int flags,
                    int *out_flags)
{
    (void)vfs;
    bad_file *f = (bad_file *)file;
    *f = (bad_file){.platter = -1, .file = -1, .real = (sqlite3_file *)(f + 1)};
    int rc = fate(BAD_OPEN);
    if (rc != SQLITE_OK) return rc;
    rc = disk->xOpen(disk, name, f->real, flags, out_flags);
    if (rc != SQLITE_OK) return rc;
    f->base.pMethods = &methods;
    bool writes = (flags & SQLITE_OPEN_READWRITE) != 0 &&
                  (flags & (SQLITE_OPEN_MAIN_DB | SQLITE_OPEN_WAL)) != 0;
    if (!writes || name == NULL) return SQLITE_OK;
    char platter[4200];
    snprintf(platter, sizeof platter, "%s.platter", name);
    bool is_new = access(platter, F_OK) != 0;
    f->platter = open(platter, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    /* A second descriptor would take SQLite's POSIX locks with it when it is closed; only this
     * process has the file, and SQLite counts its own locks within one. */
    f->file = open(name, O_RDONLY | O_CLOEXEC);
    CHOIR_ASSERT(f->platter >= 0 && f->file >= 0);
    f->dirt = dirt_of(name);
    if (is_new) copy_range(f->file, f->platter, 0, SIZE_MAX); /* what lay there before */
    return SQLITE_OK;
}

static int bad_delete(sqlite3_vfs *vfs, const char *name, int sync)
{
    (void)vfs;
    char platter[4200];
    snprintf(platter, sizeof platter, "%s.platter", name);
    int rc = disk->xDelete(disk, name, sync);
    if (rc == SQLITE_OK) {
        unlink(platter);
        dirt_of(name)->n = 0;
    }
    return rc;
}

void bad_disk_register(void)
{
    disk = sqlite3_vfs_find(NULL);
    CHOIR_ASSERT(disk != NULL);
    bad = *disk;
    bad.pNext = NULL;
    bad.zName = "bad";
    bad.szOsFile = (int)sizeof(bad_file) + disk->szOsFile;
    bad.xOpen = bad_open;
    bad.xDelete = bad_delete;
    methods = (sqlite3_io_methods){.iVersion = 2,
                                   .xClose = bad_close,
                                   .xRead = bad_read,
                                   .xWrite = bad_write,
                                   .xTruncate = bad_truncate,
                                   .xSync = bad_sync,
                                   .xFileSize = bad_file_size,
                                   .xLock = bad_lock,
                                   .xUnlock = bad_unlock,
                                   .xCheckReservedLock = bad_check_lock,
                                   .xFileControl = bad_control,
                                   .xSectorSize = bad_sector,
                                   .xDeviceCharacteristics = bad_traits,
                                   .xShmMap = bad_shm_map,
                                   .xShmLock = bad_shm_lock,
                                   .xShmBarrier = bad_shm_barrier,
                                   .xShmUnmap = bad_shm_unmap};
    CHOIR_ASSERT(sqlite3_vfs_register(&bad, 0) == SQLITE_OK);
}

void bad_disk_cut(const char *folder, const char *to)
{
    static const char *const ends[] = {"", "-wal"};
    char from_path[4200], to_path[4200];
    CHOIR_ASSERT(mkdir(to, 0700) == 0);
    for (int i = 0; i < 2; i++) {
        snprintf(from_path, sizeof from_path, "%s/journal.db%s.platter", folder, ends[i]);
        snprintf(to_path, sizeof to_path, "%s/journal.db%s", to, ends[i]);
        int from = open(from_path, O_RDONLY | O_CLOEXEC);
        if (from < 0) continue;
        int out = open(to_path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        struct stat st;
        CHOIR_ASSERT(out >= 0 && fstat(from, &st) == 0);
        copy_range(from, out, 0, (size_t)st.st_size);
        close(from);
        close(out);
    }
}
