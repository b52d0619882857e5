/* A fuzzer's input as two files of a folder: what comes before the first zero byte, and what comes
 * behind it (without a zero byte the second file is not there). */
#pragma once
#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
    char folder[32], path[2][96];
} two_files = {.folder = "/tmp/choir-fuzz-XXXXXX"};

static void remove_two_files(void)
{
    for (int i = 0; i < 2; i++) unlink(two_files.path[i]);
    rmdir(two_files.folder);
}

static void write_one(int i, const uint8_t *data, size_t bytes)
{
    FILE *f = fopen(two_files.path[i], "wb");
    CHOIR_ASSERT(f != NULL && fwrite(data, 1, bytes, f) == bytes && fclose(f) == 0);
}

/* The folder's path; it is made on the first call. */
static const char *write_two_files(const char *first, const char *second, const uint8_t *data,
                                   size_t bytes)
{
    if (two_files.path[0][0] == '\0') {
        CHOIR_ASSERT(mkdtemp(two_files.folder) != NULL);
        snprintf(two_files.path[0], sizeof two_files.path[0], "%s/%s", two_files.folder, first);
        snprintf(two_files.path[1], sizeof two_files.path[1], "%s/%s", two_files.folder, second);
        atexit(remove_two_files);
    }
    const uint8_t *zero = bytes > 0 ? memchr(data, 0, bytes) : NULL;
    size_t first_bytes = zero != NULL ? (size_t)(zero - data) : bytes;
    write_one(0, data, first_bytes);
    unlink(two_files.path[1]);
    if (zero != NULL) write_one(1, zero + 1, bytes - first_bytes - 1);
    return two_files.folder;
}
