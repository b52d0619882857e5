/* WHAT    Time. Monotonic nanoseconds for every time-out and measure; wall time only for people.
 * OWNS    A process-wide source that tests may replace.
 * THREADS Any. The source is replaced only before threads start (tests).
 * ERRORS  None.
 * LIMITS  Wall-clock jumps never change a time-out.
 * NEXT    base/base.h */
#pragma once
#include <stdint.h>

#define CHOIR_MS ((uint64_t)1000000)
#define CHOIR_SECOND ((uint64_t)1000000000)

uint64_t choir_clock_now(void); /* ns, monotonic */
/* Replaces the source (NULL restores the real one); `now` must be monotonic. For tests. */
void choir_clock_replace(uint64_t (*now)(void *user), void *user);
