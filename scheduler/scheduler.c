/* The scheduler's face: create, submit, cancel, stats, drain, and the engine thread. */
#include "scheduler/state.h"

#include <string.h>

/* Without work in sight the thread still looks at deadlines and slow readers this often. */
enum { LOOK_MS = 10 };

void scheduler_nudge(choir_scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    s->nudged = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}

/* Waits for a request, a nudge or the end; with live requests at most LOOK_MS. False: stop. */
static bool await_work(choir_scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    while (!s->stopping && !s->nudged && s->mailbox_first == NULL) {
        if (s->n_live == 0) {
            pthread_cond_wait(&s->work, &s->lock);
            continue;
        }
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += LOOK_MS * 1000000L;
        if (until.tv_nsec >= 1000000000L) {
            until.tv_sec++;
            until.tv_nsec -= 1000000000L;
        }
        if (pthread_cond_timedwait(&s->work, &s->lock, &until) != 0) break;
    }
    bool go_on = !s->stopping;
    pthread_mutex_unlock(&s->lock);
    return go_on;
}

static bool must_stop(choir_scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    bool stop = s->stopping;
    pthread_mutex_unlock(&s->lock);
    return stop;
}

static void *run_engine_thread(void *arg)
{
    choir_scheduler *s = arg;
    while (!must_stop(s))
        if (!scheduler_tick(s) && !await_work(s)) break;
    return NULL;
}

static choir_status check_options(const choir_step_engine *engine, choir_scheduler_options *o)
{
    if (o->max_sequences == 0 || o->max_sequences > engine->max_spans)
        return choir_fail(CHOIR_E_INVALID, "max_sequences is %u, must be 1 to %u", o->max_sequences,
                          engine->max_spans);
    if (o->max_step_tokens < o->max_sequences || o->max_step_tokens > engine->max_rows)
        return choir_fail(CHOIR_E_INVALID, "max_step_tokens is %u, must be %u to %u",
                          o->max_step_tokens, o->max_sequences, engine->max_rows);
    if (o->max_queued == 0)
        return choir_fail(CHOIR_E_INVALID, "max_queued is 0, must be at least 1");
    if (o->max_tokens_per_sequence == 0 || o->max_tokens_per_sequence > engine->max_positions)
        o->max_tokens_per_sequence = engine->max_positions;
    /* One sequence must always fit alone, or it could wait for ever. */
    uint64_t held = (uint64_t)engine->n_pages * engine->page_tokens;
    if (o->max_tokens_per_sequence > held) o->max_tokens_per_sequence = (uint32_t)held;
    if (o->outbox_bytes < 4 * DELTA_ROOM) o->outbox_bytes = 4 * DELTA_ROOM;
    return CHOIR_OK;
}

static choir_status make_tables(choir_scheduler *s)
{
    uint32_t spans = s->options.max_sequences;
    s->max_live = (s->options.max_queued + s->options.max_sequences) * 2 + CHOIR_MAX_SAMPLES;
    s->live = choir_calloc(CHOIR_MEM_REQUESTS, s->max_live, sizeof *s->live);
    s->order = choir_calloc(CHOIR_MEM_REQUESTS, s->max_live, sizeof *s->order);
    s->spans = choir_calloc(CHOIR_MEM_REQUESTS, spans, sizeof *s->spans);
    s->span_of = choir_calloc(CHOIR_MEM_REQUESTS, spans, sizeof *s->span_of);
    if (s->live == NULL || s->order == NULL || s->spans == NULL || s->span_of == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the scheduler");
    CHOIR_TRY(kv_pages_create(s->engine.n_pages, s->engine.zero_page, s->engine.engine, &s->pages));
    kv_share_begin(s);
    CHOIR_TRY(reads_create(s));
    if (s->engine.probe != NULL) {
        s->features = choir_calloc(CHOIR_MEM_REQUESTS, s->engine.n_features, sizeof *s->features);
        if (s->features == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for prompts' features");
    }
    if (s->engine.expert_stats != NULL) {
        s->published_heat =
            choir_calloc(CHOIR_MEM_OTHER, (size_t)s->engine.n_layers * s->engine.n_experts,
                         sizeof *s->published_heat);
        if (s->published_heat == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the experts' heat");
        s->published.experts = s->engine.expert_stats(s->engine.engine);
        s->published.n_read_groups = s->stats.n_read_groups;
        s->published.step_tokens = s->stats.step_tokens;
    }
    if (!s->options.prefix_cache) return CHOIR_OK;
    return prefix_cache_create(&s->pages, s->engine.page_tokens, &s->prefix);
}

static void wake_up(void *user)
{
    scheduler_nudge(user);
}

static choir_status start_thread(choir_scheduler *s)
{
    CHOIR_TRY(choir_thread_start(&s->thread, "choir-engine", run_engine_thread, s));
    s->threaded = true;
    return CHOIR_OK;
}

choir_status choir_scheduler_create(const choir_step_engine *engine,
                                    const choir_scheduler_options *options, choir_scheduler **out)
{
    choir_scheduler *s = choir_calloc(CHOIR_MEM_REQUESTS, 1, sizeof *s);
    if (s == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the scheduler");
    s->engine = *engine;
    s->options = *options;
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&s->work, &monotonic);
    pthread_condattr_destroy(&monotonic);
    s->last_progress_ns = choir_clock_now();
    s->published.n_pages = s->published.n_pages_free = engine->n_pages;
    choir_status status = check_options(engine, &s->options);
    if (status == CHOIR_OK) status = make_tables(s);
    if (s->engine.adapters != NULL) choir_adapters_set_wake(s->engine.adapters, wake_up, s);
    if (status == CHOIR_OK && !options->manual) status = start_thread(s);
    if (status != CHOIR_OK) {
        choir_scheduler_destroy(s);
        return status;
    }
    *out = s;
    return CHOIR_OK;
}

void choir_scheduler_destroy(choir_scheduler *s)
{
    if (s == NULL) return;
    pthread_mutex_lock(&s->lock);
    s->stopping = s->draining = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    if (s->threaded) pthread_join(s->thread, NULL);
    for (request *r = s->mailbox_first; r != NULL;) {
        request *next = r->next;
        r->next = NULL;
        for (uint32_t i = 0; i < r->n; i++) s->live[s->n_live++] = &r->sequences[i];
        r = next;
    }
    while (s->n_live > 0)
        request_end(s, s->live[0]->of, CHOIR_E_UNAVAILABLE, "the server has stopped");
    while (s->ended != NULL) {
        request *r = s->ended;
        s->ended = r->next;
        request_destroy(r);
    }
    if (s->engine.adapters != NULL) choir_adapters_set_wake(s->engine.adapters, NULL, NULL);
    prefix_cache_destroy(s->prefix);
    reads_destroy(s);
    kv_pages_destroy(&s->pages);
    choir_free(s->published_heat);
    choir_free(s->live);
    choir_free(s->order);
    choir_free(s->spans);
    choir_free(s->span_of);
    choir_free(s->features);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->work);
    choir_free(s);
}

/* What may end an answer. */
static choir_status check_ends(const choir_scheduler *s, const choir_request *r)
{
    if (r->n_stops > CHOIR_MAX_STOPS)
        return choir_fail(CHOIR_E_INVALID, "stop has %u texts, the limit is %d", r->n_stops,
                          CHOIR_MAX_STOPS);
    for (uint32_t i = 0; i < r->n_stops; i++) {
        size_t bytes = strnlen(r->stops[i], CHOIR_MAX_STOP_BYTES + 1);
        if (bytes == 0 || bytes > CHOIR_MAX_STOP_BYTES)
            return choir_fail(CHOIR_E_INVALID, "stop[%u] has %s%zu bytes, must be 1 to %d", i,
                              bytes > CHOIR_MAX_STOP_BYTES ? "at least " : "", bytes,
                              CHOIR_MAX_STOP_BYTES);
    }
    if (r->n_stop_ids > CHOIR_MAX_STOP_IDS)
        return choir_fail(CHOIR_E_INVALID, "stop_token_ids has %u ids, the limit is %d",
                          r->n_stop_ids, CHOIR_MAX_STOP_IDS);
    for (uint32_t i = 0; i < r->n_stop_ids; i++)
        if (r->stop_ids[i] >= s->engine.vocab)
            return choir_fail(CHOIR_E_INVALID, "stop_token_ids[%u] is %u, the vocabulary has %u", i,
                              r->stop_ids[i], s->engine.vocab);
    return CHOIR_OK;
}

/* All of a request's fields, before anything large is copied. */
static choir_status check_request(const choir_scheduler *s, const choir_request *r)
{
    uint32_t most = s->options.max_tokens_per_sequence;
    if (r->n_tokens == 0) return choir_fail(CHOIR_E_INVALID, "the prompt has no tokens");
    if (r->n_tokens >= most)
        return choir_fail(CHOIR_E_INVALID,
                          "the prompt has %zu tokens, prompt and answer must fit into %u",
                          r->n_tokens, most);
    for (size_t i = 0; i < r->n_tokens; i++)
        if (r->tokens[i] >= s->engine.vocab)
            return choir_fail(CHOIR_E_INVALID,
                              "token %zu of the prompt is %u, the vocabulary has %u", i,
                              r->tokens[i], s->engine.vocab);
    if (r->n == 0 || r->n > CHOIR_MAX_SAMPLES)
        return choir_fail(CHOIR_E_INVALID, "n is %u, must be 1 to %d", r->n, CHOIR_MAX_SAMPLES);
    CHOIR_TRY(check_ends(s, r));
    CHOIR_TRY(adapters_check(s, r));
    CHOIR_TRY(chooser_check(s, r));
    return choir_sampling_check(&r->sampling, s->engine.vocab);
}

/* Takes a place in the queue, so that two submits never take the last one both. */
static choir_status take_place(choir_scheduler *s, uint32_t n_samples)
{
    choir_status status = CHOIR_OK;
    pthread_mutex_lock(&s->lock);
    if (s->draining)
        status = choir_fail(CHOIR_E_UNAVAILABLE, "the server is shutting down");
    else if (s->n_held_samples + n_samples > s->max_live)
        status = choir_fail(CHOIR_E_FULL, "%u samples are held, %u more would pass the limit of %u",
                            s->n_held_samples, n_samples, s->max_live);
    else if (s->n_not_admitted >= s->options.max_queued)
        status = choir_fail(CHOIR_E_FULL, "%u requests are waiting, the limit is %u",
                            s->n_not_admitted, s->options.max_queued);
    if (status == CHOIR_OK) {
        /* Nothing was owed before: the watchdog's time begins now. */
        if (s->n_held_requests == 0)
            atomic_store_explicit(&s->last_progress_ns, choir_clock_now(), memory_order_release);
        s->n_not_admitted++;
        s->n_held_requests++;
        s->n_held_samples += n_samples;
    } else {
        s->published.n_refused++;
    }
    pthread_mutex_unlock(&s->lock);
    return status;
}

static void give_place_back(choir_scheduler *s, uint32_t n_samples)
{
    pthread_mutex_lock(&s->lock);
    s->n_not_admitted--;
    s->n_held_requests--;
    s->n_held_samples -= n_samples;
    s->published.n_refused++;
    pthread_mutex_unlock(&s->lock);
}

choir_status choir_scheduler_submit(choir_scheduler *s, const choir_request *from,
                                    void (*wake)(void *user), void *user, choir_stream **out)
{
    choir_stream *stream = NULL;
    request *r = NULL;
    CHOIR_TRY(check_request(s, from));
    CHOIR_TRY(take_place(s, from->n));
    choir_status status = stream_create(s, wake, user, &stream);
    if (status == CHOIR_OK) status = request_create(s, from, stream, &r);
    if (status != CHOIR_OK) {
        stream_free(stream);
        give_place_back(s, from->n);
        return status;
    }
    pthread_mutex_lock(&s->lock);
    if (s->mailbox_last != NULL)
        s->mailbox_last->next = r;
    else
        s->mailbox_first = r;
    s->mailbox_last = r;
    s->published.n_accepted++; /* here, not with the place: a counter never goes back */
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    *out = stream;
    return CHOIR_OK;
}

choir_adapters *choir_scheduler_adapters(const choir_scheduler *s)
{
    return s->engine.adapters;
}

uint32_t choir_scheduler_retry_ms(choir_scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    /* What waits, at the pace of the last requests. */
    uint64_t ms = s->published_request_ns / CHOIR_MS * s->n_not_admitted / s->options.max_sequences;
    pthread_mutex_unlock(&s->lock);
    return ms < 50 ? 50 : ms > 10000 ? 10000 : (uint32_t)ms;
}

bool choir_scheduler_tick(choir_scheduler *s)
{
    CHOIR_ASSERT(!s->threaded);
    return scheduler_tick(s);
}

size_t choir_scheduler_get_expert_heat(choir_scheduler *s, float *out)
{
    size_t n = s->published_heat == NULL ? 0 : (size_t)s->engine.n_layers * s->engine.n_experts;
    if (n == 0 || out == NULL) return n;
    pthread_mutex_lock(&s->lock);
    memcpy(out, s->published_heat, n * sizeof *out);
    pthread_mutex_unlock(&s->lock);
    return n;
}

void choir_scheduler_get_stats(choir_scheduler *s, choir_scheduler_stats *out)
{
    bool busy = atomic_load_explicit(&s->busy, memory_order_acquire);
    uint64_t last = atomic_load_explicit(&s->last_progress_ns, memory_order_acquire);
    uint64_t now = choir_clock_now();
    pthread_mutex_lock(&s->lock);
    *out = s->published;
    busy = busy || s->mailbox_first != NULL;
    pthread_mutex_unlock(&s->lock);
    if (s->engine.adapters != NULL) choir_adapters_get_stats(s->engine.adapters, &out->adapters);
    out->healthy = !busy || now < last || now - last < (uint64_t)s->options.stall_ms * CHOIR_MS;
}

void choir_scheduler_drain(choir_scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    s->draining = true;
    pthread_mutex_unlock(&s->lock);
}

bool choir_scheduler_idle(choir_scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    bool idle = s->n_held_requests == 0;
    pthread_mutex_unlock(&s->lock);
    return idle;
}
