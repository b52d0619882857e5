#include "base/progress.h"

#include "base/clock.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

char *choir_format_bytes(uint64_t bytes, char *out)
{
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    int u = 0;
    while (value >= 1024 && u < 6) {
        value /= 1024;
        u++;
    }
    snprintf(out, 16, u == 0 || value >= 100 ? "%.0f %s" : "%.1f %s", value, unit[u]);
    return out;
}

static char *format_count(const choir_progress *p, uint64_t n, char *out)
{
    if (p->unit == CHOIR_PROGRESS_BYTES) return choir_format_bytes(n, out);
    snprintf(out, 16, "%llu", (unsigned long long)n);
    return out;
}

void choir_progress_begin(choir_progress *p, const char *what, choir_progress_unit unit,
                          uint64_t total)
{
    *p = (choir_progress){.what = what,
                          .unit = unit,
                          .total = total,
                          .start_ns = choir_clock_now(),
                          .terminal = isatty(STDERR_FILENO) == 1};
    p->drawn_ns = p->start_ns;
}

/* Bytes of the name that leave room on the line; a bar that wraps cannot be redrawn. Cut on a
 * character. */
static int name_bytes(const char *what, int others)
{
    struct winsize window = {0};
    int columns = ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 ? window.ws_col : 0;
    int room = (columns > 0 ? columns : 80) - others, n = (int)strlen(what);
    if (room < 8) room = 8;
    if (n <= room) return n;
    while (room > 0 && ((unsigned char)what[room] & 0xC0) == 0x80) room--;
    return room;
}

static void draw_bar(const choir_progress *p, uint64_t done, double eta_s)
{
    enum { WIDTH = 24, OTHERS = WIDTH + 40 /* " [] 1023 MiB of 1023 MiB, 9999 s left" */ };
    char a[16], b[16], bar[WIDTH + 1];
    int full = p->total == 0 ? 0 : (int)((double)done / (double)p->total * WIDTH);
    memset(bar, '.', WIDTH);
    memset(bar, '#', (size_t)(full > WIDTH ? WIDTH : full));
    bar[WIDTH] = '\0';
    fprintf(stderr, "\r\033[K%.*s [%s] %s of %s, %.0f s left", name_bytes(p->what, OTHERS), p->what,
            bar, format_count(p, done, a), format_count(p, p->total, b), eta_s);
    fflush(stderr);
}

void choir_progress_update(choir_progress *p, uint64_t done)
{
    if (p->quiet) return;
    uint64_t now = choir_clock_now();
    uint64_t gap = p->terminal ? CHOIR_SECOND / 10 : 5 * CHOIR_SECOND;
    if (now - p->drawn_ns < gap || now - p->start_ns < CHOIR_SECOND / 5) return;
    double spent_s = (double)(now - p->start_ns) / 1e9;
    double eta_s = done == 0 ? 0 : spent_s * ((double)p->total / (double)done - 1);
    p->drawn_ns = now;
    p->drawn = true;
    if (p->terminal) {
        draw_bar(p, done, eta_s);
        return;
    }
    char a[16], b[16];
    fprintf(stderr, "%s: %s of %s, %.0f s left\n", p->what, format_count(p, done, a),
            format_count(p, p->total, b), eta_s);
}

void choir_progress_end(choir_progress *p)
{
    if (!p->drawn) return;
    char a[16];
    double spent_s = (double)(choir_clock_now() - p->start_ns) / 1e9;
    fprintf(stderr, "%s%s: %s in %.1f s\n", p->terminal ? "\r\033[K" : "", p->what,
            format_count(p, p->total, a), spent_s);
}
