#include "base/clock.h"

#include <stddef.h>
#include <time.h>

static uint64_t (*source)(void *user);
static void *source_user;

uint64_t choir_clock_now(void)
{
    if (source != NULL) return source(source_user);
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * CHOIR_SECOND + (uint64_t)t.tv_nsec;
}

void choir_clock_replace(uint64_t (*now)(void *user), void *user)
{
    source = now;
    source_user = user;
}
