/* WHAT    Progress of long work on stderr: a bar with sizes and ETA on a terminal, plain lines otherwise.
 * OWNS    One line of the terminal between begin and end.
 * THREADS One at a time.
 * ERRORS  None.
 * LIMITS  Redrawn at most 10 times a second; plain lines at most every 5 s; nothing under 0.2 s of work.
 * NEXT    base/base.h */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef enum choir_progress_unit { CHOIR_PROGRESS_BYTES, CHOIR_PROGRESS_ITEMS } choir_progress_unit;

typedef struct choir_progress {
    const char *what; /* "loading model.gguf"; lent until end */
    choir_progress_unit unit;
    uint64_t total, start_ns, drawn_ns;
    bool terminal, drawn, quiet;
} choir_progress;

void choir_progress_begin(choir_progress *p, const char *what, choir_progress_unit unit,
                          uint64_t total);
void choir_progress_update(choir_progress *p, uint64_t done);
void choir_progress_end(choir_progress *p); /* clears the bar, or prints the last plain line */

/* "1.2 GiB", "34 MiB", "12 B" into `out` (at least 16 bytes); returns out. */
char *choir_format_bytes(uint64_t bytes, char *out);
