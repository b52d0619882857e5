#include "base/thread.h"

#include <errno.h>
#include <signal.h>

choir_status choir_thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *arg)
{
    sigset_t most, before;
    sigfillset(&most);
    sigdelset(&most, SIGURG);
    pthread_sigmask(SIG_SETMASK, &most, &before);
    int e = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = e;
    if (e != 0) return choir_fail(CHOIR_E_NO_MEMORY, "thread %s cannot be started: %m", name);
    pthread_setname_np(*thread, name);
    return CHOIR_OK;
}
