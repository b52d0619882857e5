/* Who may connect: a cap on connections, a rate for each address, and life after EMFILE.
 *
 * gRPC 1.51 counts no connections; its listener accepts in a loop until there is nobody left,
 * before it serves anyone, so that one client that connects again and again starves the others and
 * fills the memory; and it closes for good when accept4() fails for want of file descriptors. So
 * this file defines accept4() for the whole program; libgrpc and libevent are its callers.
 * Whoever comes too often, and whoever's descriptor would lie beyond the limit, is closed at once
 * and never reaches gRPC. Descriptors are given out lowest first, so that the number of a new one
 * says how many are open. */
#include "server/call.h"

#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    OTHER_FILES = 64, /* for what else the process opens: model files, logs, epoll */
    QUIET_S = 60,     /* a flood is logged once in this time */
    N_BUCKETS = 1024, /* by a hash of the address; who shares one shares its rate */
    BURST_S = 8,      /* an address that was quiet may connect this many seconds' worth at once */
};

typedef struct bucket {
    uint64_t updated_ns;
    double tokens;
} bucket;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static int highest = INT32_MAX;                          /* descriptors are below this */
static double connects_per_s;                            /* of one address; 0: no limit */
static bucket buckets[N_BUCKETS];
static uint64_t logged_ns;

void choir_accept_limit(uint32_t max_connections, uint32_t max_connects_per_s)
{
    struct rlimit files;
    int limit =
        max_connections < INT32_MAX - OTHER_FILES ? (int)max_connections + OTHER_FILES : INT32_MAX;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max; /* the soft limit is for programs that use select() */
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < (rlim_t)limit)
        limit = files.rlim_cur > 2 * OTHER_FILES ? (int)files.rlim_cur - OTHER_FILES
                                                 : (int)files.rlim_cur / 2;
    pthread_mutex_lock(&lock);
    highest = limit;
    connects_per_s = max_connects_per_s;
    pthread_mutex_unlock(&lock);
}

/* The lock is held. */
static void tell(const char *what)
{
    uint64_t now = choir_clock_now();
    if (logged_ns != 0 && now - logged_ns < QUIET_S * CHOIR_SECOND) return;
    logged_ns = now;
    choir_log(CHOIR_LOG_WARNING, "%s: new connections are closed at once", what);
}

/* An IPv4 address, or the network half of an IPv6 one. NULL: local sockets have no rate. */
static bucket *bucket_of(const struct sockaddr_storage *from)
{
    uint64_t key = 0;
    if (from->ss_family == AF_INET) {
        key = ((const struct sockaddr_in *)from)->sin_addr.s_addr;
    } else if (from->ss_family == AF_INET6) {
        const struct in6_addr *a = &((const struct sockaddr_in6 *)from)->sin6_addr;
        memcpy(&key, a->s6_addr + (IN6_IS_ADDR_V4MAPPED(a) ? 8 : 0), sizeof key);
    } else {
        return NULL;
    }
    key = (key ^ key >> 32) * 0x9E3779B97F4A7C15u;
    return &buckets[key >> 54];
}

/* The lock is held. */
static bool comes_too_often(const struct sockaddr_storage *from)
{
    bucket *b = bucket_of(from);
    if (connects_per_s == 0 || b == NULL) return false;
    uint64_t now = choir_clock_now();
    double most = BURST_S * connects_per_s;
    double earned = (double)(now - b->updated_ns) / CHOIR_SECOND * connects_per_s;
    b->tokens = b->updated_ns == 0 || b->tokens + earned > most ? most : b->tokens + earned;
    b->updated_ns = now;
    if (b->tokens < 1) return true;
    b->tokens -= 1;
    return false;
}

static bool may_stay(int fd, const struct sockaddr_storage *from)
{
    pthread_mutex_lock(&lock);
    bool full = fd >= highest, often = !full && comes_too_often(from);
    if (full) tell("too many connections are open");
    if (often) tell("an address connects too often");
    pthread_mutex_unlock(&lock);
    return !full && !often;
}

int accept4(int listener, struct sockaddr *restrict address, socklen_t *restrict bytes, int flags);

int accept4(int listener, struct sockaddr *restrict address, socklen_t *restrict bytes, int flags)
{
    for (;;) {
        struct sockaddr_storage from = {0};
        socklen_t n = sizeof from;
        int fd = (int)syscall(SYS_accept4, listener, &from, &n, flags);
        if (fd < 0) {
            /* Only files opened elsewhere can use up the descriptors below the limit; the backlog
             * is asked again with the next connection. */
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
                errno = EAGAIN;
            return -1;
        }
        if (may_stay(fd, &from)) {
            if (address != NULL && bytes != NULL) {
                memcpy(address, &from, n < *bytes ? n : *bytes);
                *bytes = n;
            }
            return fd;
        }
        close(fd);
    }
}
