#include "engine/candidates.h"

#include <math.h>
#include <string.h>

/* Blocks of this many scores are skipped whole when their largest is too small. */
enum { BLOCK = 64 };
/* Mass next to a total of at least 1 that u, a multiple of 2^-53, cannot fall into. A kernel's exp
 * of -INFINITY may be as large as this. */
#define NOTHING 1e-30

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static float block_max(const candidates *c, uint32_t from)
{
    return c->kernels->max(c->score + from, least(BLOCK, c->n - from));
}

candidates candidates_begin(const choir_kernels *kernels, const float *scores, uint32_t vocab,
                            void *scratch)
{
    candidates c = {.kernels = kernels, .score = scratch, .n = vocab, .vocab = vocab};
    c.space = (uint32_t *)(void *)(c.score + vocab);
    memcpy(c.score, scores, vocab * sizeof *scores);
    return c;
}

void candidates_find_max(candidates *c)
{
    c->max = c->kernels->max(c->score, c->n);
}

/* Packing leaves at most half of the vocabulary, so that what lies behind the numbers can hold a
 * copy of the scores left. */
static float *spare(const candidates *c)
{
    return (float *)(void *)(c->numbers == NULL ? c->space : c->space + c->n);
}

uint32_t candidates_first_of(const choir_kernels *kernels, const float *scores, uint32_t n,
                             float max)
{
    for (uint32_t from = 0; from < n; from += BLOCK) {
        uint32_t end = from + least(BLOCK, n - from);
        if (kernels->max(scores + from, end - from) < max) continue;
        for (uint32_t i = from; i < end; i++)
            if (scores[i] == max) return i;
    }
    return 0;
}

/* Keeps the scores above `floor` and the first `ties` that equal it: n_kept in all. */
static void keep(candidates *c, float floor, uint32_t ties, uint32_t n_kept)
{
    if (n_kept >= c->n) return;
    if (c->numbers == NULL && n_kept > c->vocab / 2) { /* too many to pack: mask the others */
        for (uint32_t i = 0; i < c->n; i++) {
            bool tie = c->score[i] == floor && ties > 0;
            if (tie) ties--;
            if (!tie && !(c->score[i] > floor)) c->score[i] = -INFINITY;
        }
        return;
    }
    uint32_t n = 0;
    for (uint32_t from = 0; from < c->n; from += BLOCK) {
        if (block_max(c, from) < floor) continue;
        uint32_t end = from + least(BLOCK, c->n - from);
        for (uint32_t i = from; i < end; i++) {
            float x = c->score[i];
            if (x < floor || (x == floor && ties == 0)) continue;
            if (x == floor) ties--;
            c->space[n] = c->numbers == NULL ? i : c->numbers[i];
            c->score[n++] = x;
        }
    }
    c->numbers = c->space;
    c->n = n;
}

/* Copies the scores >= floor into `out`; returns how many. */
static uint32_t gather(const candidates *c, float floor, float *out)
{
    uint32_t n = 0;
    for (uint32_t from = 0; from < c->n; from += BLOCK) {
        if (block_max(c, from) < floor) continue;
        uint32_t end = from + least(BLOCK, c->n - from);
        for (uint32_t i = from; i < end; i++)
            if (c->score[i] >= floor) out[n++] = c->score[i];
    }
    return n;
}

/* x is reordered: those above the pivot first, then those equal to it, then the rest. */
static void partition(float *x, uint32_t n, float pivot, uint32_t *n_above, uint32_t *n_equal)
{
    uint32_t above = 0, i = 0, below = n;
    while (i < below) {
        float v = x[i];
        if (v > pivot) {
            x[i++] = x[above];
            x[above++] = v;
        } else if (v < pivot) {
            x[i] = x[--below];
            x[below] = v;
        } else {
            i++;
        }
    }
    *n_above = above;
    *n_equal = below - above;
}

/* The median of three places that a fixed generator picks: quadratic time would need scores made
 * for exactly these places. */
static float choose_pivot(const float *x, uint32_t n, uint32_t *state)
{
    float v[3];
    for (int i = 0; i < 3; i++) {
        *state = *state * 1664525 + 1013904223;
        v[i] = x[(uint64_t)*state * n >> 32];
    }
    float low = fminf(v[0], v[1]), high = fmaxf(v[0], v[1]);
    return fmaxf(low, fminf(high, v[2]));
}

/* The k-th largest of x (1 <= k <= n), which is reordered; *n_above: how many are larger. */
static float kth_largest(float *x, uint32_t n, uint32_t k, uint32_t *n_above)
{
    uint32_t state = n, passed = 0;
    for (;;) {
        uint32_t above, equal;
        float pivot = choose_pivot(x, n, &state);
        partition(x, n, pivot, &above, &equal);
        if (k <= above) {
            n = above;
        } else if (k <= above + equal) {
            *n_above = passed + above;
            return pivot;
        } else {
            k -= above + equal;
            passed += above + equal;
            x += above + equal;
            n -= above + equal;
        }
    }
}

void candidates_top_k(candidates *c, uint32_t k)
{
    if (k == 0 || k >= c->n) return;
    float *x = spare(c);
    /* The k-th largest of the blocks' maxima is no larger than the k-th largest score. */
    uint32_t n_blocks = (c->n + BLOCK - 1) / BLOCK, n_above;
    float floor = -INFINITY;
    if (k <= n_blocks) {
        for (uint32_t b = 0; b < n_blocks; b++) x[b] = block_max(c, b * BLOCK);
        floor = kth_largest(x, n_blocks, k, &n_above);
    }
    uint32_t n = gather(c, floor, x);
    floor = kth_largest(x, n, k, &n_above);
    keep(c, floor, k - n_above, k);
}

void candidates_temper(candidates *c, float temperature)
{
    for (uint32_t i = 0; i < c->n; i++) c->score[i] = (c->score[i] - c->max) / temperature;
    c->max = 0;
}

/* The smallest set of best scores with at least `p` of the mass (Holtzman et al. 2020), by a
 * quickselect that weighs the side it passes over. */
void candidates_top_p(candidates *c, float p)
{
    if (p >= 1 || c->n == 1) return;
    double total = c->kernels->sum_exp(c->score, c->max, c->n), wanted = p * total;
    /* Scores below this floor weigh less than 1 - p together, so none of them is needed; the slack
     * covers rounding. */
    float floor = c->max + (float)log((1 - (double)p) * total / c->n) - 0.01F;
    float *x = spare(c), edge = floor;
    uint32_t n = gather(c, floor, x), state = n, n_kept = 0, ties = 0;
    while (n > 0) {
        uint32_t above, equal;
        float pivot = choose_pivot(x, n, &state);
        partition(x, n, pivot, &above, &equal);
        double mass = above > 0 ? c->kernels->sum_exp(x, c->max, above) : 0;
        if (above > 0 && mass >= wanted) {
            n = above;
            continue;
        }
        double each = exp((double)pivot - c->max);
        double needed = ceil((wanted - mass) / each);
        edge = pivot;
        ties = needed < 1 ? 1 : needed < equal ? (uint32_t)needed : equal;
        n_kept += above + ties;
        if (needed <= equal) break;
        wanted -= mass + each * equal;
        x += above + equal;
        n -= above + equal;
    }
    keep(c, edge, ties, n_kept);
}

void candidates_min_p(candidates *c, float p)
{
    if (p <= 0) return;
    float floor = c->max + logf(p);
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->n; i++) n += c->score[i] >= floor;
    keep(c, floor, UINT32_MAX, n);
}

/* The cumulative mass is walked in 64 parts, then in 64 parts of the part that holds the target,
 * and so on: every exponential is computed once and few are computed twice. */
uint32_t candidates_draw(const candidates *c, double u)
{
    enum { PARTS = 64 };
    uint32_t begin = 0, n = c->n;
    double target = -1;
    while (n > BLOCK) {
        uint32_t size = (n + PARTS - 1) / PARTS, n_parts = (n + size - 1) / size, chosen = 0;
        double mass[PARTS], total = 0;
        for (uint32_t i = 0; i < n_parts; i++) {
            mass[i] =
                c->kernels->sum_exp(c->score + begin + i * size, c->max, least(size, n - i * size));
            total += mass[i];
        }
        if (target < 0) target = u * total;
        double before = 0, passed = 0;
        for (uint32_t i = 0; i < n_parts; i++) { /* rounding past the end: the last that has mass */
            if (mass[i] < NOTHING) continue;
            chosen = i;
            before = passed;
            passed += mass[i];
            if (passed > target) break;
        }
        target = fmax(target - before, 0);
        begin += chosen * size;
        n = least(size, n - chosen * size);
    }
    double mass[BLOCK], total = 0;
    for (uint32_t i = 0; i < n; i++) {
        mass[i] = exp((double)c->score[begin + i] - c->max);
        total += mass[i];
    }
    if (target < 0) target = u * total;
    uint32_t chosen = 0;
    double passed = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (mass[i] < NOTHING) continue;
        chosen = i;
        passed += mass[i];
        if (passed > target) break;
    }
    return c->numbers == NULL ? begin + chosen : c->numbers[begin + chosen];
}
