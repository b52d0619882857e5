/* A cap on connections, and life after EMFILE.
 *
 * gRPC 1.51 counts no connections, and its listener closes for good when accept4() fails for want
 * of file descriptors: whoever opens enough idle connections ends the service. So this file defines
 * accept4() for the whole program, libgrpc included, which is its only caller: a connection whose
 * descriptor would lie beyond the limit is closed at once, and gRPC never sees it nor an EMFILE.
 * Descriptors are given out lowest first, so that the number of a new one says how many are open.
 */
#include "server/call.h"

#include <errno.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    OTHER_FILES = 64, /* for what else the process opens: model files, logs, epoll */
    QUIET_S = 60,     /* a flood is logged once in this time */
};

/* Set before the listener starts; relaxed: each is a number of its own. */
static _Atomic int highest = INT32_MAX;
static _Atomic uint64_t logged_ns;

void choir_accept_limit(uint32_t max_connections)
{
    struct rlimit files;
    int limit =
        max_connections < INT32_MAX - OTHER_FILES ? (int)max_connections + OTHER_FILES : INT32_MAX;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max; /* the soft limit is for programs that use select() */
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < (rlim_t)limit + OTHER_FILES)
        limit = files.rlim_cur > 2 * OTHER_FILES ? (int)files.rlim_cur - OTHER_FILES
                                                 : (int)files.rlim_cur / 2;
    atomic_store_explicit(&highest, limit, memory_order_relaxed);
}

static void tell(void)
{
    uint64_t now = choir_clock_now(), last = atomic_load_explicit(&logged_ns, memory_order_relaxed);
    if (last != 0 && now - last < QUIET_S * CHOIR_SECOND) return;
    atomic_store_explicit(&logged_ns, now, memory_order_relaxed);
    choir_log(CHOIR_LOG_WARNING, "too many connections are open: new ones are closed at once");
}

int accept4(int listener, struct sockaddr *restrict address, socklen_t *restrict bytes, int flags);

int accept4(int listener, struct sockaddr *restrict address, socklen_t *restrict bytes, int flags)
{
    socklen_t room = bytes == NULL ? 0 : *bytes;
    for (;;) {
        if (bytes != NULL) *bytes = room;
        int fd = (int)syscall(SYS_accept4, listener, address, bytes, flags);
        bool full =
            fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM);
        if (full) {
            /* Only files opened elsewhere can bring this about; the backlog is asked again with the
             * next connection. */
            tell();
            errno = EAGAIN;
            return -1;
        }
        if (fd < atomic_load_explicit(&highest, memory_order_relaxed)) return fd; /* also -1 */
        close(fd);
        tell();
    }
}
