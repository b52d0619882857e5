#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

choir_status choir_file_open(const char *path, int *out_fd, size_t *out_bytes)
{
    /* O_NONBLOCK: opening a FIFO by mistake must not hang. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return choir_fail(errno == ENOENT ? CHOIR_E_NOT_FOUND : CHOIR_E_IO, "cannot open %s: %m",
                          path);
    struct stat st;
    choir_status status = CHOIR_OK;
    if (fstat(fd, &st) != 0)
        status = choir_fail(CHOIR_E_IO, "cannot stat %s: %m", path);
    else if (!S_ISREG(st.st_mode))
        status = choir_fail(CHOIR_E_INVALID, "%s is not a regular file", path);
    if (status != CHOIR_OK) {
        close(fd);
        return status;
    }
    *out_fd = fd;
    *out_bytes = (size_t)st.st_size;
    return CHOIR_OK;
}

choir_status choir_map_open(const char *path, choir_map *out)
{
    int fd;
    size_t bytes;
    *out = (choir_map){0};
    CHOIR_TRY(choir_file_open(path, &fd, &bytes));
    if (bytes == 0) {
        close(fd);
        return CHOIR_OK;
    }
    void *data = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    int saved = errno;
    close(fd);
    errno = saved;
    if (data == MAP_FAILED) return choir_fail(CHOIR_E_IO, "cannot map %s: %m", path);
    *out = (choir_map){data, bytes};
    return CHOIR_OK;
}

void choir_map_close(choir_map *map)
{
    if (map->data != NULL) munmap((void *)map->data, map->bytes);
    *map = (choir_map){0};
}

choir_status choir_file_read_at(int fd, const char *path, uint64_t offset, void *to, size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char *)to + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return choir_fail(CHOIR_E_IO, "cannot read %s: %m", path);
        if (n == 0)
            return choir_fail(CHOIR_E_IO, "%s ended at byte %zu of %zu while it was read", path,
                              done, bytes);
        done += (size_t)n;
    }
    return CHOIR_OK;
}

choir_status choir_file_read(const char *path, size_t max_bytes, char **out, size_t *out_bytes)
{
    int fd;
    size_t bytes;
    CHOIR_TRY(choir_file_open(path, &fd, &bytes));
    choir_status status = CHOIR_OK;
    char *buffer = NULL;
    if (bytes > max_bytes) {
        status = choir_fail(CHOIR_E_INVALID, "%s has %zu bytes, the limit is %zu", path, bytes,
                            max_bytes);
        goto done;
    }
    buffer = choir_alloc(CHOIR_MEM_OTHER, bytes + 1);
    if (buffer == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory to read %s (%zu bytes)", path, bytes);
        goto done;
    }
    CHOIR_TRY_TO(done, status, choir_file_read_at(fd, path, 0, buffer, bytes));
    buffer[bytes] = '\0';
    *out = buffer;
    *out_bytes = bytes;
    buffer = NULL;
done:
    choir_free(buffer);
    close(fd);
    return status;
}

static bool mode_is(const char *path, mode_t kind)
{
    struct stat st;
    return stat(path, &st) == 0 && (st.st_mode & S_IFMT) == kind;
}

bool choir_file_exists(const char *path) { return mode_is(path, S_IFREG); }
bool choir_folder_exists(const char *path) { return mode_is(path, S_IFDIR); }

choir_status choir_folder_make(const char *path)
{
    char part[PATH_MAX];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof part)
        return choir_fail(CHOIR_E_INVALID, "folder name of %zu bytes, must be 1 to %zu", n,
                          sizeof part - 1);
    memcpy(part, path, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (part[i] != '/' && part[i] != '\0') continue;
        char end = part[i];
        part[i] = '\0';
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            return choir_fail(CHOIR_E_IO, "cannot make folder %s: %m", part);
        part[i] = end;
    }
    if (!choir_folder_exists(path)) return choir_fail(CHOIR_E_IO, "%s is not a folder", path);
    return CHOIR_OK;
}

choir_status choir_save_begin(const char *path, choir_save *save)
{
    if (strlen(path) >= sizeof save->path)
        return choir_fail(CHOIR_E_INVALID, "file name of %zu bytes, the limit is %zu",
                          strlen(path), sizeof save->path - 1);
    snprintf(save->path, sizeof save->path, "%s", path);
    snprintf(save->temporary, sizeof save->temporary, "%s.tmp-%ld", path, (long)getpid());
    save->fd = open(save->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (save->fd < 0) return choir_fail(CHOIR_E_IO, "cannot write %s: %m", save->temporary);
    return CHOIR_OK;
}

choir_status choir_save_write(choir_save *save, const void *data, size_t bytes)
{
    const char *from = data;
    while (bytes > 0) {
        ssize_t n = write(save->fd, from, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return choir_fail(CHOIR_E_IO, "cannot write %s: %m", save->path);
        from += n;
        bytes -= (size_t)n;
    }
    return CHOIR_OK;
}

choir_status choir_save_write_at(const choir_save *save, uint64_t offset, const void *data,
                                 size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(save->fd, (const char *)data + done, bytes - done,
                           (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return choir_fail(CHOIR_E_IO, "cannot write %s: %m", save->path);
        done += (size_t)n;
    }
    return CHOIR_OK;
}

choir_status choir_folder_sync(const char *path)
{
    char copy[4096];
    snprintf(copy, sizeof copy, "%s", path);
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return choir_fail(CHOIR_E_IO, "cannot open the folder of %s: %m", path);
    int e = fsync(fd);
    close(fd);
    return e == 0 ? CHOIR_OK : choir_fail(CHOIR_E_IO, "cannot sync the folder of %s: %m", path);
}

choir_status choir_save_commit(choir_save *save)
{
    /* A failed fsync is final: the kernel may have dropped the pages, so the file is given up. */
    bool synced = fsync(save->fd) == 0;
    int saved = errno;
    bool closed = close(save->fd) == 0;
    save->fd = -1;
    if (!synced) errno = saved;
    if (!synced || !closed || rename(save->temporary, save->path) != 0) {
        choir_status status = choir_fail(CHOIR_E_IO, "cannot save %s: %m", save->path);
        unlink(save->temporary);
        return status;
    }
    return choir_folder_sync(save->path);
}

void choir_save_abandon(choir_save *save)
{
    if (save->fd >= 0) close(save->fd);
    save->fd = -1;
    unlink(save->temporary);
}
