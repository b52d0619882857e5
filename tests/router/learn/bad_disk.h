/* WHAT    A disk that fails, as an SQLite VFS named "bad": it hands everything to the default one, but for the
 *         call that is to go wrong. It also knows what a power cut would leave.
 * OWNS    The platter: beside each file of a journal FILE.platter, which holds what was synced.
 *         Bytes whose sync failed are lost to it until they are written again, as on Linux.
 * THREADS Any; one test at a time arms and disarms it, while no journal is open on it.
 * ERRORS  What it was armed with.
 * LIMITS  Syncs are counted, not done: a test is not about the machine's disk.
 * NEXT    router/learn/journal_schema.c, which survives it */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef enum bad_call {
    BAD_WRITE,
    BAD_HALF_WRITE,
    BAD_SYNC,
    BAD_OPEN,
    BAD_TRUNCATE,
    N_BAD_CALLS
} bad_call;

void bad_disk_register(void);
typedef struct bad_plan {
    bad_call call;
    int rc;         /* what it fails with: a result code of SQLite's */
    uint64_t at;    /* which call of its kind, from now; 1: the next */
    uint64_t more;  /* … and so many behind it */
    uint64_t opens; /* then so many opens fail as well, when the journal begins anew */
} bad_plan;
void bad_disk_arm(const bad_plan *plan);
void bad_disk_disarm(void);
uint64_t bad_disk_failures(void); /* since it was armed */
/* What a power cut would leave of the journal in `folder` now lies in the folder `to`, which is
 * made. */
void bad_disk_cut(const char *folder, const char *to);
