/* WHAT    Log lines on stderr: one line an event, "choir: warning: …", no colours, no secrets.
 * OWNS    The process-wide level.
 * THREADS Any; a line is written by one write(2), so lines never interleave.
 * ERRORS  A log line that cannot be written is lost.
 * LIMITS  2 KiB a line. Client text is escaped by the caller or not logged.
 * NEXT    base/progress.h */
#pragma once
#include "base/error.h"

typedef enum choir_log_level {
    CHOIR_LOG_ERROR,
    CHOIR_LOG_WARNING,
    CHOIR_LOG_INFO,
    CHOIR_LOG_DEBUG,
} choir_log_level;

void choir_log_set_level(choir_log_level level); /* default CHOIR_LOG_INFO */
void choir_log(choir_log_level level, const char *format, ...) CHOIR_PRINTF(2, 3);
