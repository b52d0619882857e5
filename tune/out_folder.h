/* WHAT    A folder that appears whole or not at all: made under another name beside its own, renamed
 *         once everything in it is on the disk.
 * OWNS    The folder under its temporary name, between begin and commit or abandon.
 * THREADS One.
 * ERRORS  CHOIR_E_EXISTS: something of that name is there. CHOIR_E_IO.
 * LIMITS  Flat: folders within are nobody's. Paths of 3900 bytes.
 * NEXT    tune/folder_out.c, tune/peft_out.c */
#pragma once
#include "base/base.h"

typedef struct choir_tune_out_folder {
    const char *path;     /* lent */
    char temporary[4096]; /* where to write meanwhile */
} choir_tune_out_folder;

/* Whether there is nothing of that name. */
choir_status choir_tune_out_folder_check(const char *path) CHOIR_MUST_USE;
choir_status choir_tune_out_folder_begin(const char *path,
                                         choir_tune_out_folder *out) CHOIR_MUST_USE;
choir_status choir_tune_out_folder_commit(const choir_tune_out_folder *folder) CHOIR_MUST_USE;
void choir_tune_out_folder_abandon(const choir_tune_out_folder *folder);
