/* WHAT    A disk that fails, as an SQLite VFS named "bad": it hands everything to the default one, but for the
 *         call that is to go wrong. It also knows what a power cut would leave.
 * OWNS    The platter: for each file of a journal a second one, FILE.platter, which holds what was
 * synced. Bytes whose sync failed are lost to it until they are written again, as Linux has it.
 * THREADS Any; one test at a time arms it.
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
/* The at-th call of the kind from now (1: the next) fails with the SQLite result code, and `more`
 * behind it. */
void bad_disk_arm(bad_call call, uint64_t at, uint64_t more, int rc);
void bad_disk_disarm(void);
uint64_t bad_disk_failures(void); /* since it was armed */
/* What a power cut would leave of the journal in `folder` now lies in the folder `to`, which is
 * made. */
void bad_disk_cut(const char *folder, const char *to);
