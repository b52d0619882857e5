/* One tick, read aloud: take what was submitted, end what must end, resume who has room again, let
 * choosers choose, choose the rows of this step (decode rows first, then prefill chunks), step,
 * hand out. */
#include "scheduler/state.h"

#include <stdlib.h>
#include <string.h>

static void take_mailbox(choir_scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    request *r = s->mailbox_first;
    s->mailbox_first = s->mailbox_last = NULL;
    s->nudged = false;
    pthread_mutex_unlock(&s->lock);
    while (r != NULL) {
        request *next = r->next;
        r->next = NULL;
        for (uint32_t i = 0; i < r->n; i++) s->live[s->n_live++] = &r->sequences[i];
        r = next;
    }
}

static void end_what_must(choir_scheduler *s)
{
    uint64_t now = choir_clock_now();
    for (uint32_t i = 0; i < s->n_live;) {
        sequence *q = s->live[i];
        request *r = q->of;
        uint64_t slow_ns = (uint64_t)s->options.slow_reader_ms * CHOIR_MS;
        if (atomic_load_explicit(&r->stream->cancelled, memory_order_acquire))
            request_end(s, r, CHOIR_E_CANCELLED, "the client cancelled the request");
        else if (r->deadline_ns != 0 && now >= r->deadline_ns)
            request_end(s, r, CHOIR_E_DEADLINE, "the request's deadline has passed");
        else if (r->blocked_since != 0 && now - r->blocked_since >= slow_ns)
            request_end(s, r, CHOIR_E_CANCELLED, "the client reads too slowly");
        else
            i++; /* an end moves another sequence to this place */
    }
}

static uint32_t n_in_state(const choir_scheduler *s, sequence_state state)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->n_live; i++) n += s->live[i]->state == state;
    return n;
}

/* Pauses who has no room for another delta, resumes who has room again and finds a slot. The slow
 * reader's time runs on while its sequence has lost its pages. */
static void watch_readers(choir_scheduler *s)
{
    uint64_t now = choir_clock_now();
    uint32_t n_running = n_in_state(s, SEQ_RUNNING);
    for (uint32_t i = 0; i < s->n_live; i++) {
        sequence *q = s->live[i];
        request *r = q->of;
        if (r->first_token_ns == 0) continue; /* nothing was put out yet */
        bool room = stream_has_room(r->stream, r->n);
        if (room)
            r->blocked_since = 0;
        else if (r->blocked_since == 0)
            r->blocked_since = now;
        if (q->state == SEQ_RUNNING && !room) {
            sequence_move(s, q, SEQ_PAUSED);
            n_running--;
        } else if (q->state == SEQ_PAUSED && room && n_running < s->options.max_sequences) {
            sequence_move(s, q, SEQ_RUNNING);
            n_running++;
        }
    }
}

static int by_rank(const void *a, const void *b)
{
    const sequence *x = *(sequence *const *)a, *y = *(sequence *const *)b;
    if (x->of->rank != y->of->rank) return x->of->rank < y->of->rank ? -1 : 1;
    if (x->of->arrival != y->of->arrival) return x->of->arrival < y->of->arrival ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

static uint32_t pages_for(const choir_scheduler *s, uint32_t tokens)
{
    return (tokens + s->engine.page_tokens - 1) / s->engine.page_tokens;
}

static bool take_page(choir_scheduler *s, uint32_t *page)
{
    while (!kv_pages_take(&s->pages, page))
        if (s->prefix == NULL || !prefix_cache_evict(s->prefix)) return false;
    return true;
}

static void preempt(choir_scheduler *s, sequence *q)
{
    q->selected = false;
    sequence_drop_pages(s, q, false);
    sequence_move(s, q, SEQ_WAITING);
    q->of->usage.n_preemptions++;
    s->stats.n_preempted++;
}

/* Whose pages the sequence at place `at` may have: the last in rank of those that pause, else
 * (unless `paused_only`) the last in rank behind it. */
static sequence *find_victim(choir_scheduler *s, uint32_t at, uint32_t n, bool paused_only)
{
    sequence *victim = NULL;
    for (uint32_t i = n; i-- > 0;) {
        sequence *q = s->order[i];
        if (q->n_pages == 0 || i == at) continue;
        if (q->state == SEQ_PAUSED) return q;
        if (q->state == SEQ_RUNNING && i > at && victim == NULL && !paused_only) victim = q;
    }
    return victim;
}

/* Pages for the sequence at place `at` up to `tokens`; others give theirs if they must. */
static bool reserve(choir_scheduler *s, uint32_t at, uint32_t n, uint32_t tokens, bool paused_only)
{
    sequence *q = s->order[at];
    uint32_t need = pages_for(s, tokens);
    CHOIR_ASSERT(need <= q->max_pages);
    while (q->n_pages < need) {
        if (take_page(s, &q->pages[q->n_pages])) {
            q->n_pages++;
            continue;
        }
        sequence *victim = find_victim(s, at, n, paused_only);
        if (victim == NULL) return false;
        preempt(s, victim);
    }
    return true;
}

/* Full pages that the cache knows become the sequence's; at least the last token is left to
 * compute. */
static void match_prefix(choir_scheduler *s, sequence *q)
{
    uint32_t page_tokens = s->engine.page_tokens;
    q->keys[0] = q->of->root;
    if (s->prefix == NULL) return;
    while ((q->n_pages + 1) * page_tokens < q->n_tokens) {
        uint32_t i = q->n_pages;
        const uint32_t *tokens = q->tokens + (size_t)i * page_tokens;
        q->keys[i + 1] = sequence_page_key(s, q, i);
        if (!prefix_cache_find(s->prefix, q->keys[i], q->keys[i + 1], tokens, &q->pages[i])) break;
        q->n_pages = q->n_registered = i + 1;
    }
    q->n_computed = q->n_pages * page_tokens;
}

static bool has_first_token(const sequence *q)
{
    return q->n_tokens > q->n_prompt;
}

/* A further sample takes over what the first has computed of the prompt: full pages are shared, the
 * page in which the prompt ends is copied; only the prompt's last token is computed again. */
static bool fork_from_first(choir_scheduler *s, sequence *q)
{
    const sequence *first = &q->of->sequences[0];
    uint32_t shared = (q->n_prompt - 1) / s->engine.page_tokens;
    bool partial = (q->n_prompt - 1) % s->engine.page_tokens != 0;
    if (first->n_computed + 1 < q->n_prompt)
        return false; /* it was preempted meanwhile, or has ended */
    uint32_t copy = 0;
    if (partial && !take_page(s, &copy)) return false;
    memcpy(q->keys, first->keys, ((size_t)shared + 1) * sizeof *q->keys);
    for (uint32_t i = 0; i < shared; i++) {
        q->pages[i] = first->pages[i];
        kv_pages_hold(&s->pages, q->pages[i]);
    }
    q->n_pages = q->n_registered = shared;
    if (partial) {
        s->engine.copy_page(s->engine.engine, first->pages[shared], copy);
        q->pages[q->n_pages++] = copy;
    }
    q->n_computed = q->n_prompt - 1;
    return true;
}

static void select_rows(sequence *q, uint32_t n_rows, uint32_t *budget)
{
    q->selected = true;
    q->n_rows = n_rows;
    q->ran_ns = choir_clock_now();
    *budget -= n_rows;
}

static uint32_t n_pending(const sequence *q)
{
    return q->n_tokens - q->n_computed;
}

static void select_decode(choir_scheduler *s, uint32_t n, uint32_t *budget, uint32_t *n_selected)
{
    uint64_t now = choir_clock_now();
    for (uint32_t i = 0; i < n && *budget > 0; i++) {
        sequence *q = s->order[i];
        if (q->state != SEQ_RUNNING || n_pending(q) != 1) continue;
        if (*n_selected == s->options.max_sequences) break;
        if (!reads_may_run(s, q, now)) continue;
        if (!reserve(s, i, n, q->n_tokens, false)) {
            preempt(s, q); /* nobody behind it can give: it waits itself */
            continue;
        }
        select_rows(q, 1, budget);
        ++*n_selected;
    }
}

/* Rows that the sequence may have of the budget; there is room for so many routes, where they are
 * wanted. */
static uint32_t chunk(const choir_scheduler *s, const sequence *q, uint32_t budget)
{
    if (q->of->want_routes && budget > s->options.max_step_tokens)
        budget = s->options.max_step_tokens;
    return n_pending(q) < budget ? n_pending(q) : budget;
}

static void select_prefill(choir_scheduler *s, uint32_t n, uint32_t *budget, uint32_t *n_selected)
{
    for (uint32_t i = 0; i < n && *budget > 0 && *n_selected < s->options.max_sequences; i++) {
        sequence *q = s->order[i];
        if (q->state != SEQ_RUNNING || q->selected || n_pending(q) <= 1) continue;
        uint32_t rows = chunk(s, q, *budget);
        if (!reserve(s, i, n, q->n_computed + rows, false)) {
            preempt(s, q);
            continue;
        }
        select_rows(q, rows, budget);
        ++*n_selected;
    }
}

static bool may_enter(const sequence *q)
{
    if (q->of->blocked_since != 0) return false; /* its reader is slow: it would only pause again */
    return q->index == 0 || has_first_token(q) || has_first_token(&q->of->sequences[0]);
}

/* Pages that a sequence needs beyond those it holds to draw its next token. */
static uint32_t n_owed(const choir_scheduler *s, const sequence *q)
{
    uint32_t need = pages_for(s, q->n_tokens + 1);
    return need > q->n_pages ? need - q->n_pages : 0;
}

/* Room for all that the sequence has still to compute, beside what the running ones still need, so
 * that nobody is thrown out again at once. */
static bool has_room(const choir_scheduler *s, uint32_t owed)
{
    uint64_t have = (uint64_t)s->pages.n_free + s->pages.n_idle;
    bool alone = true;
    for (uint32_t i = 0; i < s->n_live; i++) {
        const sequence *q = s->live[i];
        if (q->state == SEQ_PAUSED) have += q->n_pages;
        if (q->state == SEQ_RUNNING) owed += n_owed(s, q);
        alone = alone && q->state != SEQ_RUNNING;
    }
    return alone || have >= owed;
}

/* What is computed already becomes the waiting sequence's, and pages for `rows` more. */
static bool enter(choir_scheduler *s, uint32_t at, uint32_t n, uint32_t budget)
{
    sequence *q = s->order[at];
    bool forks = q->index > 0 && !has_first_token(q);
    uint32_t shared = forks ? (q->n_prompt - 1) / s->engine.page_tokens : 0;
    if (forks && !has_room(s, n_owed(s, q) - shared)) return false;
    if (!forks || !fork_from_first(s, q)) match_prefix(s, q);
    uint32_t rows = chunk(s, q, budget);
    if (has_room(s, n_owed(s, q)) && reserve(s, at, n, q->n_computed + rows, true)) {
        sequence_move(s, q, SEQ_RUNNING);
        reads_know(s, q);
        return true;
    }
    sequence_drop_pages(s, q, false);
    return false;
}

static void note_admission(choir_scheduler *s, request *r, const sequence *q)
{
    if (r->admitted) return;
    r->admitted = true;
    r->first_step_ns = choir_clock_now();
    r->usage.queue_ns = r->first_step_ns - r->submitted_ns;
    uint32_t n_virtual = r->adapters.n_virtual; /* the user did not send them */
    r->usage.cached_tokens = q->n_computed > n_virtual ? q->n_computed - n_virtual : 0;
    s->stats.n_cached_tokens += r->usage.cached_tokens;
    s->stats.n_prompt_tokens += r->usage.prompt_tokens;
    pthread_mutex_lock(&s->lock);
    s->n_not_admitted--;
    pthread_mutex_unlock(&s->lock);
}

/* Admits waiting sequences by rank while slots, rows and pages are there; the first that finds none
 * ends it, so that nobody is overtaken for being large. */
static void admit(choir_scheduler *s, uint32_t n, uint32_t *budget, uint32_t *n_selected)
{
    uint32_t n_running = n_in_state(s, SEQ_RUNNING);
    for (uint32_t i = 0; i < n && *budget > 0 && n_running < s->options.max_sequences; i++) {
        sequence *q = s->order[i];
        if (q->state == SEQ_FETCHING && !adapters_fetched(s, q->of)) continue; /* others go on */
        if (q->state != SEQ_WAITING || !may_enter(q)) continue;
        if (!enter(s, i, n, *budget)) return;
        note_admission(s, q->of, q);
        n_running++;
        if (*n_selected == s->options.max_sequences) return;
        select_rows(q, chunk(s, q, *budget), budget);
        ++*n_selected;
    }
}

static choir_routes *routes_for(sequence *q)
{
    if (q->routes.experts != NULL) return &q->routes;
    return q->n_rows == 1 && q->drawn_by.experts != NULL ? &q->drawn_by : NULL;
}

static uint32_t order_by_rank(choir_scheduler *s)
{
    memcpy(s->order, s->live, s->n_live * sizeof *s->order);
    qsort(s->order, s->n_live, sizeof *s->order, by_rank);
    return s->n_live;
}

static uint32_t choose(choir_scheduler *s, uint32_t n)
{
    uint32_t n_selected = 0;
    reads_before_choice(s);
    uint32_t budget = s->reads.step_tokens;
    for (uint32_t i = 0; i < n; i++) s->order[i]->selected = false;
    select_decode(s, n, &budget, &n_selected);
    select_prefill(s, n, &budget, &n_selected);
    admit(s, n, &budget, &n_selected);
    uint32_t n_spans = 0;
    for (uint32_t i = 0; i < n; i++) {
        sequence *q = s->order[i];
        if (!q->selected) continue;
        bool draws = q->n_rows == n_pending(q);
        const request_adapters *a = &q->of->adapters;
        bool adapted = q->n_computed + q->n_rows > a->from;
        s->span_of[n_spans] = q;
        s->spans[n_spans++] = (choir_span){.tokens = q->tokens + q->n_computed,
                                           .n_tokens = q->n_rows,
                                           .position = q->n_computed,
                                           .pages = q->pages,
                                           .n_pages = q->n_pages,
                                           .n_logits = draws,
                                           .sampler = draws ? q->sampler : NULL,
                                           .routes = routes_for(q),
                                           .adapters = a->uses,
                                           .n_adapters = adapted ? a->n_uses : 0,
                                           .adapter_from = a->from,
                                           .remaining = sequence_remaining(q)};
    }
    return n_spans;
}

static void register_pages(choir_scheduler *s, sequence *q)
{
    uint32_t page_tokens = s->engine.page_tokens;
    for (; s->prefix != NULL && (q->n_registered + 1) * page_tokens <= q->n_computed;
         q->n_registered++) {
        uint32_t i = q->n_registered;
        const uint32_t *tokens = q->tokens + (size_t)i * page_tokens;
        q->keys[i + 1] = sequence_page_key(s, q, i);
        prefix_cache_add(s->prefix, q->keys[i], q->keys[i + 1], tokens, q->pages[i]);
    }
}

/* False: every sequence waits for an expert that the disk does not give. */
static bool hand_out(choir_scheduler *s, uint32_t n_spans)
{
    uint32_t n_late = 0;
    for (uint32_t i = 0; i < n_spans; i++) {
        sequence *q = s->span_of[i];
        if (q->state == SEQ_ENDED) continue;             /* its request ended with a sibling */
        if (s->spans[i].status == CHOIR_E_UNAVAILABLE) { /* the same rows again, next time */
            n_late++;
            continue;
        }
        if (s->spans[i].status != CHOIR_OK) {
            adapters_note_poison(q->of, &s->spans[i]);
            choir_status status = choir_span_failure(&s->spans[i]);
            request_end(s, q->of, status, choir_error_message());
            continue;
        }
        q->n_computed += q->n_rows;
        reads_note(s, q, s->spans[i].routes);
        register_pages(s, q);
        if (s->spans[i].sampler != NULL) sequence_take_token(s, q, &s->spans[i].sample);
    }
    s->stats.n_late += n_late;
    return n_late < n_spans;
}

static void free_ended(choir_scheduler *s)
{
    while (s->ended != NULL) {
        request *r = s->ended;
        s->ended = r->next;
        request_destroy(r);
    }
}

enum { HEAT_TICKS = 4 }; /* the heat is copied every so many */

static void publish_heat(choir_scheduler *s)
{
    const choir_step_engine *e = &s->engine;
    if (s->published_heat == NULL || s->stats.n_steps % HEAT_TICKS != 1) return;
    pthread_mutex_lock(&s->lock);
    for (uint32_t l = 0; l < e->n_layers; l++)
        for (uint32_t x = 0; x < e->n_experts; x++)
            s->published_heat[(size_t)l * e->n_experts + x] = e->expert_heat(e->engine, l, x);
    pthread_mutex_unlock(&s->lock);
}

static void publish(choir_scheduler *s, bool worked)
{
    choir_scheduler_stats *t = &s->stats;
    bool runnable = false;
    t->n_running = n_in_state(s, SEQ_RUNNING);
    t->n_fetching = n_in_state(s, SEQ_FETCHING);
    t->n_choosing = n_in_state(s, SEQ_CHOOSING);
    t->n_waiting = n_in_state(s, SEQ_WAITING) + t->n_fetching + t->n_choosing;
    t->n_paused = n_in_state(s, SEQ_PAUSED);
    for (uint32_t i = 0; i < s->n_live; i++)
        runnable = runnable || s->live[i]->of->blocked_since == 0;
    t->n_pages = s->pages.n;
    t->n_pages_free = s->pages.n_free;
    t->n_pages_cached = s->pages.n_idle;
    if (s->engine.expert_stats != NULL) t->experts = s->engine.expert_stats(s->engine.engine);
    publish_heat(s);
    if (worked || !runnable)
        atomic_store_explicit(&s->last_progress_ns, choir_clock_now(), memory_order_release);
    atomic_store_explicit(&s->busy, runnable, memory_order_release);
    pthread_mutex_lock(&s->lock);
    uint64_t accepted = s->published.n_accepted, refused = s->published.n_refused;
    s->published = *t;
    s->published.n_accepted = accepted;
    s->published.n_refused = refused;
    pthread_mutex_unlock(&s->lock);
}

bool scheduler_tick(choir_scheduler *s)
{
    take_mailbox(s);
    end_what_must(s);
    adapters_end_failed(s);
    watch_readers(s);
    uint32_t n = order_by_rank(s);
    bool probed = choosers_take_turns(s, n);
    uint32_t n_spans = choose(s, n);
    bool worked = n_spans > 0;
    kv_share_before_step(s);
    if (n_spans > 0) {
        /* Before the step: a step that hangs must be seen from outside as work without progress. */
        atomic_store_explicit(&s->busy, true, memory_order_release);
        uint64_t start = choir_clock_now();
        choir_status status = s->engine.step(s->engine.engine, s->spans, n_spans);
        s->stats.last_step_ns = choir_clock_now() - start;
        s->stats.step_ns_total += s->stats.last_step_ns;
        s->stats.n_steps++;
        uint32_t n_rows = 0;
        for (uint32_t i = 0; i < n_spans; i++) n_rows += s->spans[i].n_tokens;
        s->stats.rows_total += n_rows;
        reads_after_step(s, n_rows, n_spans);
        if (status == CHOIR_OK)
            worked = hand_out(s, n_spans);
        else
            for (uint32_t i = 0; i < n_spans; i++)
                request_end(s, s->span_of[i]->of, status, choir_error_message());
    }
    free_ended(s);
    worked = worked || probed;
    publish(s, worked);
    return worked;
}
