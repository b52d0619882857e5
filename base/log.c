#include "base/log.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Relaxed: a level is advice; no other data depends on it. */
static atomic_int max_level = CHOIR_LOG_INFO;

void choir_log_set_level(choir_log_level level)
{
    atomic_store_explicit(&max_level, (int)level, memory_order_relaxed);
}

void choir_log(choir_log_level level, const char *format, ...)
{
    static const char *const prefix[] = {"choir: error: ", "choir: warning: ", "choir: ",
                                         "choir: debug: "};
    if ((int)level > atomic_load_explicit(&max_level, memory_order_relaxed)) return;
    char line[2048];
    size_t n = strlen(prefix[level]);
    memcpy(line, prefix[level], n);
    va_list args;
    va_start(args, format);
    int wrote = vsnprintf(line + n, sizeof line - n - 1, format, args);
    va_end(args);
    if (wrote > 0) n += (size_t)wrote < sizeof line - n - 1 ? (size_t)wrote : sizeof line - n - 2;
    line[n++] = '\n';
    ssize_t ignored = write(STDERR_FILENO, line, n);
    (void)ignored;
}
