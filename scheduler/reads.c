/* What the scheduler does for the disk's sake, where experts are streamed and steps wait for them.
 *
 * Groups. If all sequences together want more experts than memory holds, every step reads nearly
 * all of them again. Sequences that want the same experts then run together, and groups that want
 * different ones take turns of a few steps: within a turn its experts stay. Who wants what is
 * learnt from the routes of the tokens drawn so far. Whether turns pay is reckoned first (misses of
 * a step that memory cannot hold, the time that a miss is waited for, what a turn reads at its
 * start), then measured. Nobody is held back for longer than options.max_hold_ms (and the step that
 * runs), nor when a deadline is near; no token depends on who runs with whom.
 *
 * Steps. A prefill reads nearly every expert once a step, however many rows it has: while reads
 * dominate, steps grow up to what the engine has room for. */
#include "scheduler/state.h"

#include <string.h>

enum {
    KNOWN = 8,    /* tokens before a sequence's wants are known; it runs with everybody till then */
    REVIEW = 32,  /* steps between two looks at who should run with whom */
    TURN = 16,    /* steps of a turn, at most */
    SHUN = 16,    /* reviews that pass before turns that did not pay are tried again */
    BUCKETS = 64, /* of how likely an expert is wanted */
    MOST = 64,    /* sequences that are grouped; more share nearly all, and looking takes long */
    URGENT = 4,   /* times the time that a request needs: its deadline is near */
};
static const float FORGET = 0.9F;      /* a token's part in the next one's wants */
static const double WORTHWHILE = 0.75; /* reckoned time a token beside that of one group */
static const double DOMINATE = 0.3, MINOR = 0.1; /* shares of a step's time that is waited */

choir_status reads_create(choir_scheduler *s)
{
    read_groups *g = &s->reads;
    g->n_pairs = (size_t)s->engine.n_layers * s->engine.n_experts;
    g->step_tokens = s->options.max_step_tokens;
    g->until_review = REVIEW;
    s->stats.n_read_groups = 1;
    s->stats.step_tokens = g->step_tokens;
    if (s->engine.expert_stats == NULL || s->engine.n_experts_used == 0) return CHOIR_OK;
    g->absent = choir_alloc(CHOIR_MEM_REQUESTS, g->n_pairs * sizeof *g->absent);
    if (g->absent == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory to group sequences by their experts");
    g->streamed = true;
    return CHOIR_OK;
}

void reads_destroy(choir_scheduler *s)
{
    choir_free(s->reads.absent);
}

void reads_know(choir_scheduler *s, sequence *q)
{
    size_t k = (size_t)s->engine.n_layers * s->engine.n_experts_used;
    q->ran_ns = choir_clock_now();
    if (!s->reads.streamed || q->wants != NULL) return;
    q->drawn_by.experts = choir_alloc(CHOIR_MEM_REQUESTS, k * sizeof(uint16_t));
    q->drawn_by.weights = choir_alloc(CHOIR_MEM_REQUESTS, k * sizeof(float));
    if (q->drawn_by.experts != NULL && q->drawn_by.weights != NULL)
        q->wants = choir_calloc(CHOIR_MEM_REQUESTS, s->reads.n_pairs, sizeof *q->wants);
    if (q->wants == NULL) reads_forget(q); /* it runs with everybody */
}

void reads_forget(sequence *q)
{
    choir_free(q->wants);
    choir_free(q->drawn_by.experts);
    choir_free(q->drawn_by.weights);
    q->wants = NULL;
    q->drawn_by = (choir_routes){0};
}

void reads_note(choir_scheduler *s, sequence *q, const choir_routes *routes)
{
    uint32_t n = s->engine.n_experts, k = s->engine.n_experts_used;
    if (q->wants == NULL || q->n_rows != 1 || routes == NULL) return;
    for (size_t i = 0; i < s->reads.n_pairs; i++) q->wants[i] *= FORGET;
    for (uint32_t l = 0; l < s->engine.n_layers; l++)
        for (uint32_t i = 0; i < k; i++) {
            /* Weight 0: a dense layer, or an expert that is not used. */
            size_t at = (size_t)l * k + i;
            if (routes->weights[at] != 0 && routes->experts[at] < n)
                q->wants[(size_t)l * n + routes->experts[at]] += 1 - FORGET;
        }
    q->n_seen++;
}

/* -- what a group's steps would read -- */

/* absent[i]: how likely no one of a group wants the pair in a step; `more`: NULL, or one who joins.
 */
typedef struct reading {
    double misses, start; /* of a step; what a turn has to read before */
} reading;

static reading reckon(const choir_scheduler *s, const float *absent, const sequence *more)
{
    uint32_t count[BUCKETS] = {0};
    double sum[BUCKETS] = {0}, room = s->stats.experts.n_slots;
    reading r = {0};
    for (size_t i = 0; i < s->reads.n_pairs; i++) {
        float wanted = 1 - absent[i] * (more != NULL ? 1 - more->wants[i] : 1);
        if (wanted <= 0.01F) continue;
        uint32_t b = wanted < 1 ? (uint32_t)(wanted * (BUCKETS - 1)) : BUCKETS - 1;
        count[b]++;
        sum[b] += wanted;
    }
    for (int b = BUCKETS - 1; b >= 0; b--) { /* the most wanted stay in memory */
        double kept = count[b] < room ? count[b] : room;
        if (count[b] > 0) r.misses += sum[b] * (count[b] - kept) / count[b];
        if (count[b] > 0) r.start += sum[b] * kept / count[b];
        room -= kept;
    }
    return r;
}

/* Steps that only drew tokens, since the last review. */
typedef struct period {
    double stall_share, rows;   /* of the time; of a step */
    double miss_ns, compute_ns; /* a miss's wait; a step without waits */
    double step_ns, token_ns;
} period;

static double step_ns(const period *p, const reading *r, uint32_t n_rows, uint32_t turn)
{
    double compute = p->compute_ns * (0.5 + 0.5 * n_rows / p->rows);
    return compute + p->miss_ns * (r->misses + (turn > 0 ? r->start / turn : 0));
}

static void join(const choir_scheduler *s, float *absent, sequence *q, uint32_t group)
{
    for (size_t i = 0; i < s->reads.n_pairs; i++) absent[i] *= 1 - q->wants[i];
    q->group = group;
}

static bool is_known(const sequence *q)
{
    return q->state == SEQ_RUNNING && q->wants != NULL && q->n_seen >= KNOWN;
}

/* The next group: the first in rank of those without one, then as long as a token gets cheaper the
 * one that fits best. Returns its size. */
static uint32_t make_group(choir_scheduler *s, const period *p, uint32_t group, double *ns)
{
    float *absent = s->reads.absent;
    uint32_t size = 0;
    for (size_t i = 0; i < s->reads.n_pairs; i++) absent[i] = 1;
    for (;;) {
        sequence *best = NULL;
        double best_ns = 0;
        for (uint32_t i = 0; i < s->n_live && (size > 0 || best == NULL); i++) {
            sequence *q = s->order[i];
            if (!is_known(q) || q->group != NO_GROUP) continue;
            reading r = reckon(s, absent, q);
            double here = step_ns(p, &r, size + 1, TURN);
            if (best == NULL || here < best_ns) {
                best = q;
                best_ns = here;
            }
        }
        if (best == NULL || (size > 0 && best_ns / (size + 1) >= *ns / size)) return size;
        join(s, absent, best, group);
        *ns = best_ns;
        size++;
    }
}

/* All in one group, as far as they are known: a step's reckoned time. */
static double together_ns(choir_scheduler *s, const period *p, uint32_t *n)
{
    float *absent = s->reads.absent;
    *n = 0;
    for (size_t i = 0; i < s->reads.n_pairs; i++) absent[i] = 1;
    for (uint32_t i = 0; i < s->n_live; i++)
        if (is_known(s->order[i])) {
            join(s, absent, s->order[i], NO_GROUP);
            ++*n;
        }
    reading r = reckon(s, absent, NULL);
    return step_ns(p, &r, *n, 0);
}

static void run_together(choir_scheduler *s)
{
    s->reads.n_groups = 0;
    for (uint32_t i = 0; i < s->n_live; i++) s->live[i]->group = NO_GROUP;
}

static void begin_turn(choir_scheduler *s, uint32_t group)
{
    s->reads.turn = group;
    s->reads.n_steps = 0;
    s->reads.turn_began_ns = choir_clock_now();
}

/* Groups by what was measured, or one for all. */
static void regroup(choir_scheduler *s, const period *p)
{
    read_groups *g = &s->reads;
    uint32_t n, n_groups = 0, n_grouped = 0;
    run_together(s);
    double one = together_ns(s, p, &n), all = 0;
    if (n < 2 || n > MOST || p->miss_ns <= 0) return;
    while (n_grouped < n) {
        double ns = 0;
        n_grouped += make_group(s, p, n_groups++, &ns);
        all += ns;
    }
    if (n_groups < 2 || all >= WORTHWHILE * one) {
        run_together(s);
        return;
    }
    double hold_ns = (double)s->options.max_hold_ms * 1e6;
    double steps = hold_ns / (n_groups - 1) / (all / n_groups);
    g->n_groups = n_groups;
    g->turn_steps = steps < 1 ? 1 : steps > TURN ? TURN : (uint32_t)steps;
    g->turn_ns = (uint64_t)(hold_ns / (n_groups - 1));
    begin_turn(s, 0);
}

static period measure(choir_scheduler *s)
{
    read_sums t = s->reads.sums;
    s->reads.sums = (read_sums){0};
    if (t.steps == 0 || t.ns <= 0) return (period){0};
    return (period){.stall_share = t.stall_ns / t.ns,
                    .miss_ns = t.misses > 0 ? t.stall_ns / t.misses : 0,
                    .compute_ns = (t.ns - t.stall_ns) / t.steps,
                    .rows = t.rows / t.steps,
                    .step_ns = t.ns / t.steps,
                    .token_ns = t.ns / t.rows};
}

static void review(choir_scheduler *s)
{
    read_groups *g = &s->reads;
    bool apart = g->n_groups > 1;
    period p = measure(s);
    if (p.rows <= 0) return;
    g->step_ns = p.step_ns;
    g->token_ns[apart] =
        g->token_ns[apart] == 0 ? p.token_ns : 0.5 * g->token_ns[apart] + 0.5 * p.token_ns;
    if (g->shun > 0 && --g->shun == 0) g->token_ns[1] = 0;
    if (apart && g->token_ns[0] > 0 && g->token_ns[1] > 0.95 * g->token_ns[0]) g->shun = SHUN;
    if (g->shun > 0 || (!apart && p.stall_share < DOMINATE))
        run_together(s);
    else
        regroup(s, &p);
}

/* -- turns -- */

static bool has_runnable(const choir_scheduler *s, uint32_t group)
{
    for (uint32_t i = 0; i < s->n_live; i++)
        if (s->live[i]->state == SEQ_RUNNING && s->live[i]->group == group) return true;
    return false;
}

/* Whose turn it is now. True: a round begins, all groups have had theirs. */
static bool take_turns(choir_scheduler *s)
{
    read_groups *g = &s->reads;
    if (g->n_groups < 2) return true;
    bool over = g->n_steps >= g->turn_steps || choir_clock_now() - g->turn_began_ns >= g->turn_ns;
    if (!over && has_runnable(s, g->turn)) return false;
    bool round = false;
    for (uint32_t i = 0; i < g->n_groups; i++) {
        begin_turn(s, (g->turn + 1) % g->n_groups);
        round = round || g->turn == 0;
        if (has_runnable(s, g->turn)) return round;
    }
    run_together(s); /* all who had a group have ended or pause */
    return true;
}

void reads_before_choice(choir_scheduler *s)
{
    read_groups *g = &s->reads;
    if (!g->streamed || s->options.max_hold_ms == 0) return;
    if (!take_turns(s) || g->until_review > 0) return;
    g->until_review = REVIEW;
    review(s);
}

bool reads_may_run(const choir_scheduler *s, const sequence *q, uint64_t now)
{
    const read_groups *g = &s->reads;
    if (g->n_groups < 2 || q->group == NO_GROUP || q->group == g->turn) return true;
    if (now - q->ran_ns >= s->options.max_hold_ms * CHOIR_MS) return true;
    uint64_t deadline = q->of->deadline_ns;
    if (deadline == 0) return false;
    double left = sequence_remaining(q) * g->step_ns * g->n_groups;
    return deadline <= now || (double)(deadline - now) < URGENT * left;
}

/* Twice as long, but no step may take so long that the engine looks as if it hung. */
static void grow_steps(choir_scheduler *s, double took_ns)
{
    read_groups *g = &s->reads;
    if (2 * took_ns > s->options.stall_ms * 1e6 / 2) return;
    uint32_t most = s->engine.max_rows;
    g->step_tokens = g->step_tokens > most / 2 ? most : 2 * g->step_tokens;
}

void reads_after_step(choir_scheduler *s, uint32_t n_rows, uint32_t n_spans)
{
    read_groups *g = &s->reads;
    if (!g->streamed) return;
    const choir_experts_stats *before = &s->stats.experts;
    choir_experts_stats after = s->engine.expert_stats(s->engine.engine);
    double waited = (double)(after.stall_ns - before->stall_ns),
           took = (double)s->stats.last_step_ns;
    if (n_rows == g->step_tokens && waited > DOMINATE * took)
        grow_steps(s, took);
    else if (n_rows > s->options.max_step_tokens && waited < MINOR * took)
        g->step_tokens = s->options.max_step_tokens;
    if (n_rows == n_spans) {
        g->sums.steps++;
        g->sums.rows += n_rows;
        g->sums.ns += took;
        g->sums.stall_ns += waited;
        g->sums.misses += (double)(after.n_misses - before->n_misses);
    }
    s->stats.n_read_groups = g->n_groups < 2 ? 1 : g->n_groups;
    s->stats.step_tokens = g->step_tokens;
    g->n_steps++;
    if (g->until_review > 0) g->until_review--;
}
