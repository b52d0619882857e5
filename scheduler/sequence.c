/* Requests and their sequences: made from what a client asked, moved between states, and turned
 * from drawn tokens into text. */
#include "scheduler/state.h"

#include <string.h>

/* One step of priority is worth ten seconds of waiting, so that nobody waits for ever. The order of
 * two requests never changes, so that they never throw each other out by turns. */
static const int64_t PRIORITY_US = 10 * 1000 * 1000;
enum { ARRIVALS_PER_US = 256 }; /* any int32_t of priorities still fits beside */

void sequence_move(choir_scheduler *s, sequence *q, sequence_state to)
{
    static const bool legal[N_SEQUENCE_STATES][N_SEQUENCE_STATES] = {
        [SEQ_CHOOSING] = {[SEQ_FETCHING] = true, [SEQ_WAITING] = true, [SEQ_ENDED] = true},
        [SEQ_FETCHING] = {[SEQ_WAITING] = true, [SEQ_ENDED] = true},
        [SEQ_WAITING] = {[SEQ_RUNNING] = true, [SEQ_ENDED] = true},
        [SEQ_RUNNING] = {[SEQ_WAITING] = true, [SEQ_PAUSED] = true, [SEQ_ENDED] = true},
        [SEQ_PAUSED] = {[SEQ_RUNNING] = true, [SEQ_WAITING] = true, [SEQ_ENDED] = true},
    };
    CHOIR_ASSERT(legal[q->state][to]);
    if (to == SEQ_ENDED) {
        q->of->n_ended++;
        for (uint32_t i = 0; i < s->n_live; i++)
            if (s->live[i] == q) {
                s->live[i] = s->live[--s->n_live];
                break;
            }
    }
    q->state = to;
}

void sequence_drop_pages(choir_scheduler *s, sequence *q, bool suspect)
{
    for (uint32_t i = q->n_pages; i-- > 0;) {
        uint32_t page = q->pages[i];
        if (suspect) kv_pages_suspect(&s->pages, page);
        if (suspect && s->prefix != NULL) prefix_cache_forget(s->prefix, page);
        if (s->prefix != NULL) prefix_cache_touch(s->prefix, page);
        kv_pages_drop(&s->pages, page);
    }
    q->n_pages = q->n_computed = q->n_registered = 0;
}

static choir_status copy_stops(const choir_request *from, request *r)
{
    for (uint32_t i = 0; i < from->n_stops; i++) {
        size_t bytes = strlen(from->stops[i]);
        r->stops[i] = choir_strdup(CHOIR_MEM_REQUESTS, from->stops[i]);
        if (r->stops[i] == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
        r->n_stops = i + 1;
        r->stop_bytes[i] = bytes;
        if (bytes > r->longest_stop) r->longest_stop = bytes;
    }
    return CHOIR_OK;
}

static sequence_state first_state(const choir_request *from)
{
    if (from->chooser.choose != NULL) return SEQ_CHOOSING;
    return from->n_adapters > 0 ? SEQ_FETCHING : SEQ_WAITING;
}

static choir_status make_sequence(choir_scheduler *s, const choir_request *from, request *r,
                                  uint32_t index)
{
    sequence *q = &r->sequences[index];
    size_t room = from->n_tokens + r->max_new;
    uint32_t page_tokens = s->engine.page_tokens;
    *q = (sequence){.of = r,
                    .index = index,
                    .state = first_state(from),
                    .n_prompt = (uint32_t)from->n_tokens,
                    .stop_match = NO_STOP};
    q->max_pages = (uint32_t)((room + page_tokens - 1) / page_tokens);
    q->n_tokens = q->n_prompt;
    q->tokens = choir_alloc(CHOIR_MEM_REQUESTS, room * sizeof *q->tokens);
    q->pages = choir_alloc(CHOIR_MEM_REQUESTS, q->max_pages * sizeof *q->pages);
    q->keys = choir_alloc(CHOIR_MEM_REQUESTS, ((size_t)q->max_pages + 1) * sizeof *q->keys);
    q->held = r->longest_stop > 0 ? choir_alloc(CHOIR_MEM_REQUESTS, r->longest_stop) : NULL;
    if (q->tokens == NULL || q->pages == NULL || q->keys == NULL ||
        (r->longest_stop > 0 && q->held == NULL))
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request of %zu tokens", room);
    memcpy(q->tokens, from->tokens, from->n_tokens * sizeof *q->tokens);
    if (r->want_routes) {
        size_t n =
            (size_t)s->engine.n_layers * s->options.max_step_tokens * s->engine.n_experts_used;
        q->routes.experts = choir_alloc(CHOIR_MEM_REQUESTS, n * sizeof(uint16_t));
        q->routes.weights = choir_alloc(CHOIR_MEM_REQUESTS, n * sizeof(float));
        if (q->routes.experts == NULL || q->routes.weights == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request's routes");
    }
    choir_sampling sampling = from->sampling;
    q->group = NO_GROUP;
    sampling.index = index;
    sampling.stop_ids = r->end_ids;
    sampling.n_stop_ids = r->n_end_ids;
    CHOIR_TRY(choir_sampler_create(&sampling, s->engine.vocab, &q->sampler));
    CHOIR_TRY(choir_sampler_see_prompt(q->sampler, from->tokens, from->n_tokens));
    if (s->engine.tokenizer == NULL) return CHOIR_OK;
    return choir_detokenizer_create(s->engine.tokenizer, from->skip_special, &q->detokenizer);
}

uint32_t sequence_remaining(const sequence *q)
{
    uint32_t drawn = q->n_tokens - q->n_prompt;
    return q->of->max_new > drawn ? q->of->max_new - drawn : 0;
}

static void collect_end_ids(choir_scheduler *s, const choir_request *from, request *r)
{
    for (uint32_t i = 0; i < from->n_stop_ids; i++) r->end_ids[r->n_end_ids++] = from->stop_ids[i];
    for (uint32_t i = 0;
         i < s->engine.n_eos && !from->ignore_eos && r->n_end_ids < CHOIR_MAX_END_IDS; i++)
        r->end_ids[r->n_end_ids++] = (uint32_t)s->engine.eos_ids[i];
}

/* No two arrive at once: of two mixes of adapters that fit one at a time, one must be first. */
static int64_t next_arrival(choir_scheduler *s, uint64_t now_ns)
{
    int64_t now = (int64_t)(now_ns / 1000) * ARRIVALS_PER_US;
    int64_t last = atomic_load_explicit(&s->last_arrival, memory_order_relaxed), next;
    do next = now > last ? now : last + 1;
    while (!atomic_compare_exchange_weak_explicit(&s->last_arrival, &last, next,
                                                  memory_order_relaxed, memory_order_relaxed));
    return next;
}

choir_status request_create(choir_scheduler *s, const choir_request *from, choir_stream *stream,
                            request **out)
{
    request *r = choir_calloc(CHOIR_MEM_REQUESTS, 1, sizeof *r);
    if (r == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
    *r = (request){.stream = stream,
                   .n = from->n,
                   .min_new = from->sampling.min_tokens,
                   .want_logprobs = from->want_logprobs,
                   .want_routes = from->want_routes && s->engine.n_experts_used > 0,
                   .deadline_ns = from->deadline_ns,
                   .submitted_ns = choir_clock_now(),
                   .root = prefix_root(from->cache_salt, s->engine.digest)};
    r->arrival = next_arrival(s, r->submitted_ns);
    r->rank = r->arrival - from->priority * PRIORITY_US * ARRIVALS_PER_US;
    r->usage.prompt_tokens = (uint32_t)from->n_tokens;
    collect_end_ids(s, from, r);
    uint32_t n_virtual = 0;
    choir_status status = adapters_claim(s, from, r, &n_virtual);
    uint32_t most = s->options.max_tokens_per_sequence - (uint32_t)from->n_tokens - n_virtual;
    r->max_new = from->max_tokens == 0 || from->max_tokens > most ? most : from->max_tokens;
    if (status == CHOIR_OK) status = copy_stops(from, r);
    if (status == CHOIR_OK) {
        r->sequences = choir_calloc(CHOIR_MEM_REQUESTS, r->n, sizeof *r->sequences);
        if (r->sequences == NULL) status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
    }
    for (uint32_t i = 0; i < from->n && status == CHOIR_OK; i++)
        status = make_sequence(s, from, r, i);
    if (status != CHOIR_OK) {
        request_destroy(r);
        return status;
    }
    r->chooser = from->chooser; /* the scheduler's from here on: nothing fails any more */
    *out = r;
    return CHOIR_OK;
}

void request_destroy(request *r)
{
    if (r == NULL) return;
    adapters_release(r);
    chooser_release(r);
    for (uint32_t i = 0; r->sequences != NULL && i < r->n; i++) {
        sequence *q = &r->sequences[i];
        choir_free(q->tokens);
        choir_free(q->pages);
        choir_free(q->keys);
        choir_free(q->held);
        choir_free(q->routes.experts);
        choir_free(q->routes.weights);
        reads_forget(q);
        choir_sampler_destroy(q->sampler);
        choir_detokenizer_destroy(q->detokenizer);
    }
    choir_free(r->sequences);
    for (uint32_t i = 0; i < r->n_stops; i++) choir_free(r->stops[i]);
    choir_free(r);
}

/* Where the earliest stop text begins in held + text, or n; *which tells it. */
static size_t find_stop(const request *r, const char *joined, size_t n, uint32_t *which)
{
    size_t first = n;
    *which = NO_STOP;
    for (uint32_t i = 0; i < r->n_stops; i++) {
        const char *hit = memmem(joined, n, r->stops[i], r->stop_bytes[i]);
        if (hit != NULL && (size_t)(hit - joined) < first) {
            first = (size_t)(hit - joined);
            *which = i;
        }
    }
    return first;
}

/* The longest end of the text that may be the beginning of a stop text. */
static size_t may_begin_stop(const request *r, const char *text, size_t n)
{
    size_t longest = 0;
    for (uint32_t i = 0; i < r->n_stops; i++) {
        size_t most = r->stop_bytes[i] - 1 < n ? r->stop_bytes[i] - 1 : n;
        for (size_t k = most; k > longest; k--)
            if (memcmp(text + n - k, r->stops[i], k) == 0) {
                longest = k;
                break;
            }
    }
    return longest;
}

/* Decides what of the new text may go out now: *out points into `joined`, whose room is enough for
 * the held text and the new. `last`: nothing is held back any more. */
static size_t pass_stops(sequence *q, const char *text, size_t bytes, bool last, char *joined)
{
    request *r = q->of;
    memcpy(joined, q->held, q->n_held);
    memcpy(joined + q->n_held, text, bytes);
    size_t n = q->n_held + bytes;
    uint32_t which;
    size_t end = find_stop(r, joined, n, &which);
    if (which != NO_STOP) {
        q->stop_match = which;
        q->finish = CHOIR_FINISH_STOP;
        q->n_held = 0;
        return end;
    }
    q->n_held = last ? 0 : may_begin_stop(r, joined, n);
    memcpy(q->held, joined + n - q->n_held, q->n_held);
    return n - q->n_held;
}

static void emit(choir_scheduler *s, sequence *q, const char *text, size_t bytes, bool last,
                 const choir_sample *sample)
{
    request *r = q->of;
    char small[1024], *joined = small;
    size_t room = bytes + q->n_held;
    if (r->n_stops > 0 && room > 0) {
        if (room > sizeof small) joined = choir_alloc(CHOIR_MEM_REQUESTS, room);
        if (joined == NULL) {
            request_end(s, r, CHOIR_E_NO_MEMORY, "no memory for the answer's text");
            return;
        }
        bytes = pass_stops(q, text, bytes, last, joined);
        text = joined;
    }
    choir_routes route = {0};
    if (r->want_routes && sample != NULL) {
        /* The last row's slice of [n_layers, n_rows, k], moved to the front layer by layer. */
        uint32_t k = s->engine.n_experts_used;
        for (uint32_t l = 0; l < s->engine.n_layers; l++) {
            size_t from = ((size_t)l * q->n_rows + q->n_rows - 1) * k;
            memmove(q->routes.experts + (size_t)l * k, q->routes.experts + from,
                    k * sizeof(uint16_t));
            memmove(q->routes.weights + (size_t)l * k, q->routes.weights + from, k * sizeof(float));
        }
        route = q->routes;
    }
    const delta d = {.index = q->index,
                     .text = text,
                     .text_bytes = bytes,
                     .sample = sample,
                     .logprobs = r->want_logprobs,
                     .routes = route.experts != NULL ? &route : NULL};
    choir_status status = CHOIR_OK;
    if (sample != NULL || bytes > 0) status = stream_put(r->stream, &d);
    if (joined != small) choir_free(joined);
    if (status != CHOIR_OK) request_end(s, r, status, choir_error_message());
}

static bool ends_answer(const request *r, uint32_t token)
{
    for (uint32_t i = 0; i < r->n_end_ids; i++)
        if (r->end_ids[i] == token) return true;
    return false;
}

static void finish_sequence(choir_scheduler *s, sequence *q)
{
    const char *rest = "";
    size_t bytes = 0;
    if (q->detokenizer != NULL && q->stop_match == NO_STOP &&
        choir_detokenizer_flush(q->detokenizer, &rest, &bytes) == CHOIR_OK)
        emit(s, q, rest, bytes, true, NULL);
    if (q->state == SEQ_ENDED) return; /* emit() may have failed the whole request */
    sequence_drop_pages(s, q, false);
    sequence_move(s, q, SEQ_ENDED);
    if (q->of->n_ended == q->of->n) request_end(s, q->of, CHOIR_OK, NULL);
}

void sequence_take_token(choir_scheduler *s, sequence *q, const choir_sample *sample)
{
    request *r = q->of;
    const char *text = "";
    size_t bytes = 0;
    uint64_t now = choir_clock_now();
    q->tokens[q->n_tokens++] = sample->token;
    uint32_t n_drawn = q->n_tokens - q->n_prompt;
    r->usage.output_tokens++;
    s->stats.n_output_tokens++;
    if (r->first_token_ns == 0) {
        r->first_token_ns = now;
        r->usage.prefill_ns = now - r->first_step_ns;
        stream_start(r->stream, r);
    }
    r->usage.decode_ns = now - r->first_token_ns;
    bool end = n_drawn > r->min_new && ends_answer(r, sample->token);
    if (!end && q->detokenizer != NULL) {
        choir_status status = choir_detokenizer_push(q->detokenizer, sample->token, &text, &bytes);
        if (status != CHOIR_OK) {
            request_end(s, r, status, choir_error_message());
            return;
        }
    }
    emit(s, q, text, bytes, false, sample);
    if (q->state == SEQ_ENDED) return;
    if (end)
        q->finish = CHOIR_FINISH_STOP;
    else if (q->finish == CHOIR_FINISH_NONE && n_drawn >= r->max_new)
        q->finish = CHOIR_FINISH_LENGTH;
    if (q->finish != CHOIR_FINISH_NONE) finish_sequence(s, q);
}

void request_end(choir_scheduler *s, request *r, choir_status status, const char *message)
{
    if (r->stream == NULL) return; /* ended already, freed at the tick's end */
    for (uint32_t i = 0; i < r->n; i++) {
        sequence *q = &r->sequences[i];
        if (q->state == SEQ_ENDED) continue;
        q->finish = CHOIR_FINISH_ERROR;
        sequence_drop_pages(s, q, status == CHOIR_E_DATA_LOSS);
        sequence_move(s, q, SEQ_ENDED);
    }
    adapters_release(r);
    s->stats.n_done += status == CHOIR_OK;
    s->stats.n_cancelled += status == CHOIR_E_CANCELLED;
    s->stats.n_expired += status == CHOIR_E_DEADLINE;
    s->stats.n_failed +=
        status != CHOIR_OK && status != CHOIR_E_CANCELLED && status != CHOIR_E_DEADLINE;
    uint64_t took = choir_clock_now() - r->submitted_ns;
    s->mean_request_ns = s->mean_request_ns == 0 ? took : (s->mean_request_ns * 7 + took) / 8;
    pthread_mutex_lock(&s->lock);
    s->n_held_requests--;
    s->n_held_samples -= r->n;
    s->published_request_ns = s->mean_request_ns;
    if (!r->admitted) s->n_not_admitted--;
    pthread_mutex_unlock(&s->lock);
    stream_finish(r->stream, r, status, message);
    r->stream = NULL;
    r->next = s->ended;
    s->ended = r;
}
