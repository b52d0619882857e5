/* What does the scheduler cost beside the model? Thirty-two sequences decode over an engine that
 * does nothing; printed is the time of a tick and its share of the 10 ms that a step of a 135M
 * model takes on two AVX2 cores. */
#include "scheduler/scheduler.h"

#include <stdio.h>
#include <stdlib.h>

enum { N_SEQUENCES = 32, N_PROMPT = 500, N_TOKENS = 2000, N_PAGES = 4096, N_REPEATS = 5 };
static const double STEP_NS = 10e6;

static choir_status step(void *engine, choir_span *spans, uint32_t n_spans)
{
    (void)engine;
    for (uint32_t i = 0; i < n_spans; i++) {
        spans[i].status = CHOIR_OK;
        spans[i].sample = (choir_sample){.token = 5 + (spans[i].position & 1023)};
    }
    return CHOIR_OK;
}

static void copy_page(void *engine, uint32_t from, uint32_t to)
{
    (void)engine, (void)from, (void)to;
}
static void zero_page(void *engine, uint32_t page)
{
    (void)engine, (void)page;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Mean time of a tick in ns, with reading; < 0: it failed. */
static double run(void)
{
    const choir_step_engine engine = {.step = step,
                                      .copy_page = copy_page,
                                      .zero_page = zero_page,
                                      .n_pages = N_PAGES,
                                      .page_tokens = CHOIR_PAGE_TOKENS,
                                      .vocab = 49152,
                                      .max_positions = 8192,
                                      .max_rows = 512,
                                      .max_spans = 64};
    choir_scheduler_options o = CHOIR_SCHEDULER_OPTIONS_DEFAULT;
    choir_scheduler *s;
    choir_stream *streams[N_SEQUENCES];
    uint32_t prompt[N_PROMPT], n_done = 0;
    o.manual = true;
    if (choir_scheduler_create(&engine, &o, &s) != CHOIR_OK) return -1;
    for (uint32_t i = 0; i < N_SEQUENCES; i++) {
        for (uint32_t t = 0; t < N_PROMPT; t++) prompt[t] = t < 100 ? t : i * 1000 + t;
        choir_request r = {.tokens = prompt,
                           .n_tokens = N_PROMPT,
                           .sampling = CHOIR_SAMPLING_DEFAULT,
                           .max_tokens = N_TOKENS,
                           .n = 1};
        if (choir_scheduler_submit(s, &r, NULL, NULL, &streams[i]) != CHOIR_OK) return -1;
    }
    uint64_t start = choir_clock_now();
    while (n_done < N_SEQUENCES) {
        choir_scheduler_tick(s);
        choir_event e;
        for (uint32_t i = 0; i < N_SEQUENCES; i++)
            while (choir_stream_next(streams[i], &e)) n_done += e.kind == CHOIR_EVENT_DONE;
    }
    uint64_t took = choir_clock_now() - start;
    choir_scheduler_stats stats;
    choir_scheduler_get_stats(s, &stats);
    for (uint32_t i = 0; i < N_SEQUENCES; i++) choir_stream_release(streams[i]);
    choir_scheduler_destroy(s);
    return (double)took / (double)stats.n_steps;
}

int main(void)
{
    double ns[N_REPEATS];
    for (int i = 0; i < N_REPEATS; i++)
        if ((ns[i] = run()) < 0) {
            fprintf(stderr, "bench: %s\n", choir_error_message());
            return 1;
        }
    qsort(ns, N_REPEATS, sizeof *ns, compare);
    printf("tick of %d decoding sequences: %.1f us (best %.1f), %.2f %% of a step\n", N_SEQUENCES,
           ns[N_REPEATS / 2] / 1e3, ns[0] / 1e3, 100 * ns[N_REPEATS / 2] / STEP_NS);
    return 0;
}
