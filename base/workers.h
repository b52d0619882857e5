/* WHAT    A fork-join pool: the caller and n-1 helpers run one function together, then all meet again.
 * OWNS    Its threads.
 * THREADS One owner calls run(); it is worker 0.
 * ERRORS  create: CHOIR_E_NO_MEMORY when a thread cannot be made.
 * LIMITS  Helpers spin for a short while after a run, then sleep on a futex.
 * NEXT    engine/engine.h */
#pragma once
#include "base/error.h"

typedef struct choir_workers choir_workers;
/* `worker` runs from 0 to n_workers-1; the work is cut by index, so that results never depend on n. */
typedef void (*choir_work)(void *arg, uint32_t worker, uint32_t n_workers);

choir_status choir_workers_create(uint32_t n_workers, choir_workers **out); /* 1..256 */
void choir_workers_destroy(choir_workers *workers);
void choir_workers_run(choir_workers *workers, choir_work work, void *arg);
/* A barrier inside `work`: every worker calls it the same number of times; what each wrote before is
 * seen by all after. */
void choir_workers_sync(choir_workers *workers);
uint32_t choir_workers_count(const choir_workers *workers);
uint32_t choir_workers_best(void); /* one for each core that is online, 1..256 */

/* The part [*begin, *end) of n items that worker i of k does; multiples of `grain` except the last. */
static inline void choir_share(uint64_t n, uint64_t grain, uint32_t i, uint32_t k, uint64_t *begin,
                               uint64_t *end)
{
    uint64_t grains = (n + grain - 1) / grain;
    uint64_t b = grains * i / k * grain, e = grains * (i + 1) / k * grain;
    *begin = b < n ? b : n;
    *end = e < n ? e : n;
}
