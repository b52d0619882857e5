/* The watch thread: ten times a second it asks every engine whether it makes progress, tells
 * health, moves the server's phase on its way down, and ends calls that hold a place for nothing.
 */
#include "server/call.h"

#include <dirent.h>
#include <execinfo.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { TICK_MS = 100, SWEEP_MS = 1000, FLUSH_MS = 300 };

typedef struct watch {
    choir_server *server;
    uint64_t phase_since_ns, swept_ns, unhealthy_since_ns;
    bool cancelled_all, is_down;
} watch;

static void move(watch *w, choir_phase phase)
{
    choir_server *s = w->server;
    pthread_mutex_lock(&s->phase_lock);
    atomic_store(&s->phase, (int)phase);
    pthread_cond_broadcast(&s->phase_changed);
    pthread_mutex_unlock(&s->phase_lock);
    w->phase_since_ns = choir_clock_now();
}

/* Sleeps for a tick or until somebody asks for a drain or a stop. */
static void sleep_tick(choir_server *s)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += TICK_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_mutex_lock(&s->phase_lock);
    int phase = atomic_load(&s->phase);
    bool asked = (s->drain_wanted && phase == CHOIR_PHASE_SERVING) ||
                 (s->stop_wanted && phase < CHOIR_PHASE_STOPPING);
    if (!asked) pthread_cond_timedwait(&s->phase_changed, &s->phase_lock, &until);
    pthread_mutex_unlock(&s->phase_lock);
}

static void begin_stop(watch *w)
{
    choir_server *s = w->server;
    move(w, CHOIR_PHASE_STOPPING);
    choir_calls_stop(s);
    atomic_store_explicit(&s->shut_down.armed, 1, memory_order_release);
    grpc_server_shutdown_and_notify(s->grpc, s->completions, &s->shut_down);
}

static void advance(watch *w)
{
    choir_server *s = w->server;
    pthread_mutex_lock(&s->phase_lock);
    bool drain = s->drain_wanted, stop = s->stop_wanted, is_down = s->is_shut_down;
    pthread_mutex_unlock(&s->phase_lock);
    int phase = atomic_load(&s->phase);
    uint64_t in_phase_ms = (choir_clock_now() - w->phase_since_ns) / CHOIR_MS;
    if (stop && phase < CHOIR_PHASE_STOPPING) {
        begin_stop(w);
    } else if (phase == CHOIR_PHASE_SERVING && drain) {
        choir_log(CHOIR_LOG_INFO, "draining: %u requests run", atomic_load(&s->n_generating));
        move(w, CHOIR_PHASE_NOT_SERVING);
    } else if (phase == CHOIR_PHASE_NOT_SERVING && in_phase_ms >= s->options.drain_pause_ms) {
        move(w, CHOIR_PHASE_REFUSING);
        for (uint32_t i = 0; i < s->n_models; i++) choir_scheduler_drain(s->models[i].scheduler);
    } else if (phase == CHOIR_PHASE_REFUSING) {
        uint32_t left = atomic_load(&s->n_generating);
        if (left != 0 && in_phase_ms < s->options.shutdown_ms) return;
        if (left != 0)
            choir_log(CHOIR_LOG_WARNING, "%u requests still run after %u ms: they are cancelled",
                      left, s->options.shutdown_ms);
        begin_stop(w);
    } else if (phase == CHOIR_PHASE_STOPPING) {
        if (!w->cancelled_all && in_phase_ms >= FLUSH_MS) {
            w->cancelled_all = true;
            grpc_server_cancel_all_calls(s->grpc);
        }
        if (is_down && atomic_load(&s->n_open) == 0) {
            move(w, CHOIR_PHASE_STOPPED);
            w->is_down = true;
        }
    }
}

static void probe(watch *w)
{
    choir_server *s = w->server;
    bool healthy[CHOIR_SERVER_MAX_MODELS] = {false}, all = true;
    for (uint32_t i = 0; i < s->n_models; i++) {
        choir_scheduler_stats stats;
        choir_scheduler_get_stats(s->models[i].scheduler, &stats);
        healthy[i] = stats.healthy;
        all = all && stats.healthy;
    }
    choir_health_update(s, healthy);
    uint64_t now = choir_clock_now();
    atomic_store(&s->makes_progress, all);
    atomic_store(&s->looked_ns, now);
    if (all || w->unhealthy_since_ns == 0) w->unhealthy_since_ns = all ? 0 : now;
    uint64_t limit = s->options.watchdog_exit_ms * CHOIR_MS;
    if (all || limit == 0 || now - w->unhealthy_since_ns < limit) return;
    choir_log(CHOIR_LOG_ERROR, "no step was done for too long, and none for %u ms more: giving up",
              s->options.watchdog_exit_ms);
    choir_dump_stacks();
    _exit(1);
}

static void restore_slots(choir_server *s)
{
    while (atomic_load(&s->n_slots_missing) > 0) {
        if (atomic_load(&s->phase) >= CHOIR_PHASE_STOPPING || choir_call_await(s) != CHOIR_OK)
            return;
        atomic_fetch_sub(&s->n_slots_missing, 1);
    }
}

void *choir_watch_run(void *server)
{
    watch w = {.server = server, .phase_since_ns = choir_clock_now()};
    while (!w.is_down) {
        advance(&w);
        probe(&w);
        if (choir_clock_now() - w.swept_ns > SWEEP_MS * CHOIR_MS) {
            choir_calls_sweep(server);
            restore_slots(server);
            w.swept_ns = choir_clock_now();
        }
        if (!w.is_down) sleep_tick(server);
    }
    return NULL;
}

/* --- stacks of all threads, each written by the thread itself in a signal handler */

static _Atomic uint32_t n_dumped; /* released by the handler, acquired by who waits for it */

static void write_stack(int signal)
{
    (void)signal;
    void *frames[64];
    int n = backtrace(frames, 64);
    backtrace_symbols_fd(frames, n, STDERR_FILENO);
    atomic_fetch_add_explicit(&n_dumped, 1, memory_order_release);
}

static void print_file(const char *task, const char *thread, const char *name)
{
    char path[288], text[256];
    snprintf(path, sizeof path, "%s/%s/%s", task, thread, name);
    FILE *f = fopen(path, "re");
    if (f == NULL) return;
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    while (n > 0 && text[n - 1] == '\n') n--;
    text[n] = '\0';
    dprintf(STDERR_FILENO, " %s %s", name, text);
}

/* A thread that blocks the signal (none of ours) shows only its name and where in the kernel it waits. */
void choir_dump_stacks(void)
{
    static const char task[] = "/proc/self/task";
    struct sigaction action = {.sa_handler = write_stack, .sa_flags = SA_RESTART};
    void *warm[4];
    backtrace(warm, 4); /* loads the unwinder outside of the handler */
    sigaction(SIGURG, &action, NULL);
    DIR *folder = opendir(task);
    struct dirent *entry;
    while (folder != NULL && (entry = readdir(folder)) != NULL) {
        if (entry->d_name[0] == '.') continue;
        dprintf(STDERR_FILENO, "thread %s:", entry->d_name);
        print_file(task, entry->d_name, "comm");
        print_file(task, entry->d_name, "wchan");
        dprintf(STDERR_FILENO, "\n");
        uint32_t before = atomic_load_explicit(&n_dumped, memory_order_acquire);
        if (syscall(SYS_tgkill, getpid(), atoi(entry->d_name), SIGURG) != 0) continue;
        for (int i = 0; i < 20; i++) {
            if (atomic_load_explicit(&n_dumped, memory_order_acquire) != before) break;
            usleep(5000);
        }
    }
    if (folder != NULL) closedir(folder);
}
