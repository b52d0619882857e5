/* How adapters lie on disk: a folder of PEFT's with adapter_config.json and
 * adapter_model.safetensors, or a GGUF file. Sentences name the adapter and its files, not where
 * they lie: clients read them. */
#include "experts/adapter_pool.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char config_file[] = "adapter_config.json",
                  tensors_file[] = "adapter_model.safetensors", pickle_file[] = "adapter_model.bin";

choir_status adapter_failure(choir_status status)
{
    switch (status) {
    case CHOIR_OK:
    case CHOIR_E_FULL:
    case CHOIR_E_NO_MEMORY:
    case CHOIR_E_UNAVAILABLE:
        return status;
    case CHOIR_E_IO:
        return CHOIR_E_UNAVAILABLE;
    default:
        return CHOIR_E_PRECONDITION;
    }
}

int open_by_steps(int folder, const char *path, int flags)
{
    char part[NAME_MAX + 1];
    int at = folder;
    while (at >= 0) {
        size_t n = strcspn(path, "/");
        const char *rest = path + n + strspn(path + n, "/");
        if (n == 0 || n > NAME_MAX || (n == 2 && memcmp(path, "..", 2) == 0)) {
            errno = n > NAME_MAX ? ENAMETOOLONG : EXDEV;
            if (at != folder) close(at);
            return -1;
        }
        memcpy(part, path, n);
        part[n] = 0;
        int how = *rest != 0 ? O_PATH | O_DIRECTORY | O_CLOEXEC : flags;
        int next = openat(at, part, how | O_NOFOLLOW);
        if (at != folder) close(at);
        if (*rest == 0) return next;
        at = next;
        path = rest;
    }
    return -1;
}

/* By openat2(), or step by step where the kernel or a seccomp profile has no such call. */
static int open_beneath(int folder, const char *path, int flags)
{
    struct open_how how = {.flags = (uint64_t)flags,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS};
    int fd = (int)syscall(SYS_openat2, folder, path, &how, sizeof how);
    if (fd < 0 && (errno == ENOSYS || errno == EPERM)) fd = open_by_steps(folder, path, flags);
    return fd;
}

static int open_one(const choir_adapters *pool, const char *path, bool beneath, int flags)
{
    flags |= (flags & O_PATH) != 0 ? O_CLOEXEC : O_CLOEXEC | O_NONBLOCK;
    return beneath ? open_beneath(pool->folder, path, flags) : open(path, flags);
}

static file_mark mark_of(const struct stat *st)
{
    return (file_mark){.device = st->st_dev,
                       .inode = st->st_ino,
                       .bytes = (uint64_t)st->st_size,
                       .seconds = st->st_mtim.tv_sec,
                       .nanoseconds = st->st_mtim.tv_nsec};
}

bool file_mark_same(const file_mark *a, const file_mark *b)
{
    return a->device == b->device && a->inode == b->inode && a->bytes == b->bytes &&
           a->seconds == b->seconds && a->nanoseconds == b->nanoseconds;
}

static bool is_unchanged(int fd, const file_mark *mark)
{
    struct stat st;
    if (fd < 0) return true;
    if (fstat(fd, &st) != 0) return false;
    file_mark now = mark_of(&st);
    return file_mark_same(&now, mark);
}

bool files_unchanged(const adapter_files *files)
{
    return is_unchanged(files->config, &files->config_mark) &&
           is_unchanged(files->tensors, &files->tensors_mark);
}

void files_close(adapter_files *files)
{
    if (files->config >= 0) close(files->config);
    if (files->tensors >= 0) close(files->tensors);
    files->config = files->tensors = -1;
}

/* The state of the disk is weather; what lies there is the adapter's own fault. */
static choir_status cannot_open(const char *name, const char *file)
{
    int e = errno;
    if (e == ENOENT || e == ENOTDIR)
        return choir_fail(CHOIR_E_PRECONDITION, "adapter %s has no %s", name, file);
    if (e == EXDEV || e == ELOOP)
        return choir_fail(CHOIR_E_INVALID, "adapter %s: its path leads out of the adapters' folder",
                          name);
    return choir_fail(e == EACCES || e == EPERM ? CHOIR_E_PRECONDITION : CHOIR_E_UNAVAILABLE,
                      "adapter %s: its %s cannot be opened: %s", name, file, strerror(e));
}

static choir_status open_marked(const choir_adapters *pool, const char *name, const char *path,
                                bool beneath, int flags, const char *file, int *fd, file_mark *mark)
{
    struct stat st;
    *fd = open_one(pool, path, beneath, flags);
    if (*fd < 0 && errno == EINVAL && (flags & O_DIRECT) != 0)
        *fd = open_one(pool, path, beneath, flags & ~O_DIRECT); /* it has no such reads */
    if (*fd < 0) return cannot_open(name, file);
    if (fstat(*fd, &st) != 0) return cannot_open(name, file);
    if (!S_ISREG(st.st_mode))
        return choir_fail(CHOIR_E_PRECONDITION, "adapter %s: its %s is no regular file", name,
                          file);
    *mark = mark_of(&st);
    return CHOIR_OK;
}

static bool has_pickle(const choir_adapters *pool, const char *path, bool beneath)
{
    char file[MAX_PATH + 64];
    snprintf(file, sizeof file, "%s/%s", path, pickle_file);
    int fd = open_one(pool, file, beneath, O_PATH);
    if (fd >= 0) close(fd);
    return fd >= 0;
}

static choir_status open_folder(const choir_adapters *pool, const char *name, const char *path,
                                bool beneath, int direct, adapter_files *out)
{
    char file[MAX_PATH + 64];
    snprintf(file, sizeof file, "%s/%s", path, config_file);
    CHOIR_TRY(open_marked(pool, name, file, beneath, O_RDONLY, config_file, &out->config,
                          &out->config_mark));
    snprintf(file, sizeof file, "%s/%s", path, tensors_file);
    choir_status status = open_marked(pool, name, file, beneath, O_RDONLY | direct, tensors_file,
                                      &out->tensors, &out->tensors_mark);
    if (status == CHOIR_E_PRECONDITION && out->tensors < 0 && has_pickle(pool, path, beneath))
        return choir_fail(CHOIR_E_PRECONDITION,
                          "adapter %s has %s alone, a pickle, which may run code: save it as %s",
                          name, pickle_file, tensors_file);
    return status;
}

choir_status files_open(const choir_adapters *pool, const char *name, const char *path,
                        bool beneath, bool direct, adapter_files *out)
{
    struct stat st;
    int flag = direct ? O_DIRECT : 0;
    *out = (adapter_files){.config = -1, .tensors = -1};
    int fd = open_one(pool, path, beneath, O_PATH);
    if (fd < 0 && errno == ENOENT)
        return choir_fail(CHOIR_E_PRECONDITION, "adapter %s: its folder is not there", name);
    if (fd < 0) return cannot_open(name, "folder");
    int e = fstat(fd, &st);
    close(fd);
    if (e != 0) return cannot_open(name, "folder");
    out->folder = mark_of(&st);
    choir_status status = S_ISDIR(st.st_mode)
                              ? open_folder(pool, name, path, beneath, flag, out)
                              : open_marked(pool, name, path, beneath, O_RDONLY | flag, "file",
                                            &out->tensors, &out->tensors_mark);
    if (status != CHOIR_OK) files_close(out);
    return status;
}

static choir_status read_at(int fd, const char *name, const char *file, uint64_t offset, void *to,
                            size_t bytes)
{
    uint8_t *at = to;
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, at + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (n < 0)
            return choir_fail(CHOIR_E_UNAVAILABLE, "adapter %s: its %s cannot be read: %m", name,
                              file);
        if (n == 0)
            return choir_fail(CHOIR_E_PRECONDITION, "adapter %s: its %s was cut while it was read",
                              name, file);
        done += (size_t)n;
    }
    return CHOIR_OK;
}

choir_status files_read_config(const adapter_files *files, const char *name, char **out,
                               size_t *bytes)
{
    *out = NULL;
    *bytes = 0;
    if (files->config < 0) return CHOIR_OK;
    if (files->config_mark.bytes > MAX_CONFIG)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "adapter %s: its %s has %llu bytes, the limit is %d", name, config_file,
                          (unsigned long long)files->config_mark.bytes, MAX_CONFIG);
    size_t n = (size_t)files->config_mark.bytes;
    char *text = choir_alloc(CHOIR_MEM_ADAPTERS, n + 1);
    if (text == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "adapter %s: no memory for its %s", name, config_file);
    choir_status status = read_at(files->config, name, config_file, 0, text, n);
    if (status != CHOIR_OK) {
        choir_free(text);
        return status;
    }
    text[n] = 0;
    *out = text;
    *bytes = n;
    return CHOIR_OK;
}

/* A safetensors header says how long it is; a GGUF file's is short beside its tensors, and all is
 * taken. */
static choir_status header_bytes(const adapter_files *files, const char *name, size_t *out)
{
    uint64_t all = files->tensors_mark.bytes;
    uint8_t length[8];
    *out = all < MAX_HEADER ? (size_t)all : MAX_HEADER;
    if (files->config < 0 || all < sizeof length) return CHOIR_OK;
    CHOIR_TRY(read_at(files->tensors, name, tensors_file, 0, length, sizeof length));
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | length[i];
    if (n > all - sizeof length || n > MAX_HEADER)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "adapter %s: the header of its %s says %llu bytes, the file has %llu and "
                          "the limit is %d",
                          name, tensors_file, (unsigned long long)n, (unsigned long long)all,
                          MAX_HEADER);
    *out = (size_t)n + sizeof length;
    return CHOIR_OK;
}

choir_status files_read_header(const adapter_files *files, const char *name, void **out,
                               size_t *bytes)
{
    *out = NULL;
    CHOIR_TRY(header_bytes(files, name, bytes));
    void *data = choir_alloc(CHOIR_MEM_ADAPTERS, *bytes + 1);
    if (data == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "adapter %s: no memory for its header", name);
    choir_status status = read_at(files->tensors, name, "tensors", 0, data, *bytes);
    if (status != CHOIR_OK) {
        choir_free(data);
        return status;
    }
    *out = data;
    return CHOIR_OK;
}
