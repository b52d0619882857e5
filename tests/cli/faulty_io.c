/* Preloaded into choir: calls of the system fail as the environment says. IO_FAULTS names a file
 * whose text is read anew when it changes, so that a test can change its mind while a server runs:
 * "key=value" words. sync=I            the I-th fsync or fdatasync fails with EIO, from 1; so does
 * no other name=TEXT         what follows counts only for files whose path ends so eio=N the next N
 * reads fail with EIO, -1: all from=A to=B       … only those that begin in [A, B) short=P of 1000
 * reads so many give a part, or EINTR, or EAGAIN sleep_ms=T        each read takes so long Reads
 * are pread's; what maps a file or reads it otherwise is left alone. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef struct faults {
    long sync, eio, shorts, sleep_ms;
    long long from, to;
    char name[256];
} faults;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards all below */
static faults now;
static struct timespec read_at;
static long n_syncs;
static uint64_t drawn = 1;

static ssize_t (*real_pread)(int, void *, size_t, off_t);
static int (*real_fsync)(int), (*real_fdatasync)(int);

__attribute__((constructor)) static void find_real(void)
{
    *(void **)&real_pread = dlsym(RTLD_NEXT, "pread64");
    *(void **)&real_fsync = dlsym(RTLD_NEXT, "fsync");
    *(void **)&real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    if (real_pread == NULL || real_fsync == NULL || real_fdatasync == NULL) _exit(3);
}

static void read_word(const char *word)
{
    sscanf(word, "sync=%ld", &now.sync);
    sscanf(word, "eio=%ld", &now.eio);
    sscanf(word, "short=%ld", &now.shorts);
    sscanf(word, "sleep_ms=%ld", &now.sleep_ms);
    sscanf(word, "from=%lld", &now.from);
    sscanf(word, "to=%lld", &now.to);
    sscanf(word, "name=%255s", now.name);
}

/* With the lock held. */
static void look(void)
{
    const char *path = getenv("IO_FAULTS");
    struct stat st;
    if (path == NULL || stat(path, &st) != 0) return;
    if (st.st_mtim.tv_sec == read_at.tv_sec && st.st_mtim.tv_nsec == read_at.tv_nsec) return;
    read_at = st.st_mtim;
    now = (faults){.to = LLONG_MAX};
    FILE *file = fopen(path, "re");
    char word[300];
    while (file != NULL && fscanf(file, "%299s", word) == 1) read_word(word);
    if (file != NULL) fclose(file);
}

static int is_named(int fd)
{
    char link[64], path[4096];
    if (now.name[0] == '\0') return 1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    size_t wanted = strlen(now.name);
    return n >= (ssize_t)wanted && memcmp(path + n - wanted, now.name, wanted) == 0;
}

static uint64_t draw(void)
{
    drawn = drawn * UINT64_C(6364136223846793005) + 1442695040888963407;
    return drawn >> 33;
}

static int sync_fails(void)
{
    pthread_mutex_lock(&lock);
    look();
    int fails = ++n_syncs == now.sync;
    pthread_mutex_unlock(&lock);
    if (fails) errno = EIO;
    return fails;
}

int fsync(int fd)
{
    return sync_fails() ? -1 : real_fsync(fd);
}

int fdatasync(int fd)
{
    return sync_fails() ? -1 : real_fdatasync(fd);
}

/* 0: as it should be; else an errno. May shorten the read to whole pages, as a direct one must be.
 */
static int read_fault(int fd, size_t *bytes, off_t offset, long *sleep_ms)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    look();
    if (offset >= now.from && offset < now.to && is_named(fd)) {
        *sleep_ms = now.sleep_ms;
        if (now.eio != 0) {
            if (now.eio > 0) now.eio--;
            error = EIO;
        } else if ((long)(draw() % 1000) < now.shorts) {
            uint64_t kind = draw() % 3;
            error = kind == 0 ? EINTR : kind == 1 ? EAGAIN : 0;
            if (kind == 2 && *bytes > 4096) *bytes = 4096 * (1 + draw() % (*bytes / 4096));
        }
    }
    pthread_mutex_unlock(&lock);
    return error;
}

ssize_t pread64(int fd, void *to, size_t bytes, off_t offset)
{
    long sleep_ms = 0;
    int error = read_fault(fd, &bytes, offset, &sleep_ms);
    if (sleep_ms > 0) {
        struct timespec t = {sleep_ms / 1000, sleep_ms % 1000 * 1000000};
        nanosleep(&t, NULL);
    }
    if (error != 0) {
        errno = error;
        return -1;
    }
    return real_pread(fd, to, bytes, offset);
}

ssize_t pread(int fd, void *to, size_t bytes, off_t offset)
{
    return pread64(fd, to, bytes, offset);
}
