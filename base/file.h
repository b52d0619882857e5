/* WHAT    Files: bounded whole reads, read-only maps, and saves that are whole or not there.
 * OWNS    A map owns its pages until unmapped.
 * THREADS Any; a map may be read from many threads.
 * ERRORS  CHOIR_E_NOT_FOUND, CHOIR_E_IO, CHOIR_E_INVALID (larger than the limit), CHOIR_E_NO_MEMORY;
 *         each names the path.
 * LIMITS  Only regular files.
 * NEXT    base/base.h */
#pragma once
#include "base/memory.h"

typedef struct choir_map {
    const uint8_t *data; /* NULL for an empty file */
    size_t bytes;
} choir_map;

choir_status choir_map_open(const char *path, choir_map *out) CHOIR_MUST_USE;
void choir_map_close(choir_map *map);

/* A regular file, for reading; close() it. */
choir_status choir_file_open(const char *path, int *out_fd, size_t *out_bytes) CHOIR_MUST_USE;
/* All of [offset, offset + bytes), or CHOIR_E_IO, which tells `path` and where the file ended. */
choir_status choir_file_read_at(int fd, const char *path, uint64_t offset, void *to, size_t bytes)
    CHOIR_MUST_USE;
/* Reads a whole file of at most max_bytes; a NUL is put behind it (not counted). choir_free() it. */
choir_status choir_file_read(const char *path, size_t max_bytes, char **out, size_t *out_bytes)
    CHOIR_MUST_USE;
bool choir_file_exists(const char *path);
bool choir_folder_exists(const char *path);
choir_status choir_folder_make(const char *path) CHOIR_MUST_USE; /* with its parents */

/* A save: write to `path`.tmp-PID, then commit = fsync, rename, fsync of the folder. abandon removes
 * the temporary file. Exactly one of the two must be called after a successful begin. */
typedef struct choir_save {
    int fd;
    char path[4096], temporary[4128];
} choir_save;
choir_status choir_save_begin(const char *path, choir_save *save) CHOIR_MUST_USE;
choir_status choir_save_write(choir_save *save, const void *data, size_t bytes) CHOIR_MUST_USE;
/* The same at a place of its own, beside others that write elsewhere; it does not move the first. */
choir_status choir_save_write_at(const choir_save *save, uint64_t offset, const void *data,
                                 size_t bytes) CHOIR_MUST_USE;
choir_status choir_save_commit(choir_save *save) CHOIR_MUST_USE;
void choir_save_abandon(choir_save *save);
/* After a rename: the folder that `path` lies in is on the disk. */
choir_status choir_folder_sync(const char *path) CHOIR_MUST_USE;
