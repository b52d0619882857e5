/* WHAT    Starting a thread the one way: named, with all signals blocked but SIGURG (stack dumps).
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  CHOIR_E_NO_MEMORY when the system gives no thread.
 * NEXT    base/workers.h, scheduler/scheduler.h, server/server.h */
#pragma once
#include "base/error.h"
#include <pthread.h>

/* name: at most 15 characters. pthread_join() is the caller's. */
choir_status choir_thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *arg)
    CHOIR_MUST_USE;
