#include "experts/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *const io_texts[] = {
#define X(name, text) text,
    CHOIR_IO_LIST(X)
#undef X
};

const char *choir_io_text(choir_io io)
{
    return io_texts[io];
}

bool choir_io_parse(const char *text, choir_io *out)
{
    for (int i = 0; i < CHOIR_N_IO; i++)
        if (strcmp(text, io_texts[i]) == 0) {
            *out = (choir_io)i;
            return true;
        }
    return false;
}

choir_status choir_disk_open(choir_io io, uint32_t depth, choir_disk **out)
{
    if (depth == 0 || depth > 4096)
        return choir_fail(CHOIR_E_INVALID, "a queue of %u reads, must be 1 to 4096", depth);
    if (io == CHOIR_IO_PREAD) return choir_disk_pool_open(depth, out);
    choir_status status = CHOIR_E_UNAVAILABLE;
    if (io != CHOIR_IO_URING_PLAIN) status = choir_disk_uring_open(depth, false, out);
    if (status == CHOIR_E_UNAVAILABLE && io != CHOIR_IO_URING)
        status = choir_disk_uring_open(depth, true, out);
    if (status != CHOIR_E_UNAVAILABLE || io != CHOIR_IO_AUTO) return status;
    choir_log(CHOIR_LOG_WARNING,
              "%s; files are read by a pool of threads instead (a container's seccomp profile "
              "often forbids io_uring)",
              choir_error_message());
    return choir_disk_pool_open(depth, out);
}

choir_status choir_disk_open_file(const char *path, int *out_fd, uint64_t *out_bytes,
                                  bool *out_direct)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT);
    *out_direct = fd >= 0;
    if (fd < 0 && errno == EINVAL) fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return choir_fail(errno == ENOENT ? CHOIR_E_NOT_FOUND : CHOIR_E_IO, "cannot open %s: %m",
                          path);
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return choir_fail(CHOIR_E_INVALID, "%s is not a regular file", path);
    }
    *out_fd = fd;
    *out_bytes = (uint64_t)st.st_size;
    return CHOIR_OK;
}
