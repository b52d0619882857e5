/* WHAT    What a product of codes fetches beside its own reads: a few lines with each block.
 * OWNS    Nothing.
 * THREADS A fetch is one thread's.
 * ERRORS  None: to prefetch what is not there does nothing.
 * LIMITS  Included by the levels' sources. Without a fetch a block pays one branch.
 * NEXT    engine/adapt.c, which says what is fetched */
#pragma once
#include "engine/kernels/kernels.h"

enum { FETCHED_LINES = 4 };

/* A tile's own copy, which stays in registers. */
static inline choir_fetch begin_fetch(const choir_fetch *of)
{
    return of == NULL ? (choir_fetch){0} : *of;
}

static inline void fetch_lines(choir_fetch *f)
{
    for (int i = 0; i < FETCHED_LINES; i++) {
        if (f->at >= f->end) {
            if (f->ranges >= f->last) return;
            f->at = f->ranges->at;
            f->end = f->at + f->ranges->bytes;
            f->ranges++;
        }
        __builtin_prefetch(f->at, 0, 2);
        f->at += CHOIR_CACHE_LINE;
    }
}

static inline void end_fetch(choir_fetch *of, const choir_fetch *f)
{
    if (of != NULL) *of = *f;
}
