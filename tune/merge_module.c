/* Pruning and adding go by rows, so that products B A are never held but where they are the result:
 * each number's row is made again whenever it is looked at. */
#include "tune/merge_module.h"

#include "engine/philox.h"
#include "tune/svd.h"

#include <math.h>
#include <string.h>

static const choir_merge_method_info methods[] = {
#define X(name, text, prunes, elects, svd) {text, CHOIR_MERGE_PRUNES_##prunes, elects, svd},
    CHOIR_MERGE_METHODS(X)
#undef X
};

const choir_merge_method_info *choir_merge_method_of(choir_merge_method method)
{
    CHOIR_ASSERT(method < CHOIR_N_MERGE_METHODS);
    return &methods[method];
}

/* One adapter's matrix among those that are added: a factor, or scale B A. */
typedef enum which { FACTOR_A, FACTOR_B, PRODUCT, N_WHICH } which;
typedef struct plane {
    const choir_tune_source *source;
    which which;
    double weight;
    /* Magnitudes above the threshold stay, and so many of those that equal it. */
    uint32_t threshold;
    uint64_t n_equal;
} plane;

typedef struct mix {
    const choir_merge_options *options;
    const choir_merge_method_info *method;
    uint64_t stream;
    plane *planes;
    uint32_t n_planes;
    uint64_t n_rows, n_cols;
    double *sums; /* [n_cols] */
    float *rows;  /* [n_planes, n_cols] */
    uint64_t *histogram;
} mix;

enum { HIGH_BITS = 16, LOW_BITS = 15, N_BINS = 1 << HIGH_BITS };

static choir_status no_memory(const choir_tune_target *target)
{
    return choir_fail(CHOIR_E_NO_MEMORY, "no memory to merge %s of %u by %u", target->name,
                      target->rows, target->cols);
}

static void put_row(const mix *m, const plane *p, uint64_t i, float *out)
{
    const choir_tune_source *s = p->source;
    size_t n = m->n_cols;
    if (p->which != PRODUCT) {
        memcpy(out, (p->which == FACTOR_A ? s->a : s->b) + i * n, n * sizeof *out);
        return;
    }
    memset(m->sums, 0, n * sizeof *m->sums);
    for (uint32_t k = 0; k < s->rank; k++) {
        double factor = (double)s->b[i * s->rank + k];
        const float *a = s->a + k * n;
        for (size_t j = 0; j < n; j++) m->sums[j] += factor * (double)a[j];
    }
    for (size_t j = 0; j < n; j++) out[j] = (float)(s->scale * m->sums[j]);
}

/* The order of magnitudes is that of their bits. */
static uint32_t magnitude(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

/* The bin in which the `*left`-th from the top lies; `*left` becomes its place within. */
static uint32_t bin_of(const uint64_t *histogram, uint32_t n_bins, uint64_t *left)
{
    uint32_t bin = n_bins - 1;
    while (bin > 0 && histogram[bin] < *left) *left -= histogram[bin--];
    return bin;
}

/* The k largest magnitudes are those above the threshold and the first of those that equal it:
 * found by their higher bits, then among those that share them by the lower. */
static void find_threshold(const mix *m, plane *p)
{
    uint64_t n = m->n_rows * m->n_cols, left = (uint64_t)(m->options->density * (double)n);
    p->threshold = UINT32_MAX;
    p->n_equal = 0;
    if (left == 0) return;
    memset(m->histogram, 0, N_BINS * sizeof *m->histogram);
    for (uint64_t i = 0; i < m->n_rows; i++) {
        put_row(m, p, i, m->rows);
        for (uint64_t j = 0; j < m->n_cols; j++) m->histogram[magnitude(m->rows[j]) >> LOW_BITS]++;
    }
    uint32_t high = bin_of(m->histogram, N_BINS, &left);
    memset(m->histogram, 0, N_BINS * sizeof *m->histogram);
    for (uint64_t i = 0; i < m->n_rows; i++) {
        put_row(m, p, i, m->rows);
        for (uint64_t j = 0; j < m->n_cols; j++) {
            uint32_t key = magnitude(m->rows[j]);
            if (key >> LOW_BITS == high) m->histogram[key & ((1 << LOW_BITS) - 1)]++;
        }
    }
    p->threshold = high << LOW_BITS | bin_of(m->histogram, 1 << LOW_BITS, &left);
    p->n_equal = left;
}

static void prune_small(plane *p, float *row, uint64_t n)
{
    for (uint64_t j = 0; j < n; j++) {
        uint32_t key = magnitude(row[j]);
        if (key > p->threshold) continue;
        if (key == p->threshold && p->n_equal > 0)
            p->n_equal--;
        else
            row[j] = 0;
    }
}

/* Number i of a matrix has its word of the generator, whatever else is drawn. */
static void prune_random(const mix *m, const plane *p, uint64_t i, float *row)
{
    double density = m->options->density;
    uint64_t seed = m->options->seed, at = i * m->n_cols;
    uint64_t stream = m->stream + N_WHICH * p->source->adapter + p->which;
    choir_philox word = {{0}};
    for (uint64_t j = 0; j < m->n_cols; j++, at++) {
        if (j == 0 || at % 4 == 0)
            word = choir_philox_draw((choir_philox){{(uint32_t)(at / 4), (uint32_t)(at / 4 >> 32),
                                                     (uint32_t)stream, (uint32_t)(stream >> 32)}},
                                     (uint32_t)seed, (uint32_t)(seed >> 32));
        bool stays = (double)word.word[at % 4] < density * 0x1p32;
        row[j] = stays ? row[j] / (float)density : 0;
    }
}

static void add_weighted(const mix *m, uint64_t j, double *out)
{
    *out = 0;
    for (uint32_t p = 0; p < m->n_planes; p++)
        *out += m->planes[p].weight * (double)m->rows[p * m->n_cols + j];
}

/* TIES: the sign that has more behind it, and the mean of what has that sign. A sum of zero is for
 * plus. */
static void add_elected(const mix *m, uint64_t j, double *out)
{
    double votes = 0, sum = 0;
    uint32_t n = 0;
    for (uint32_t p = 0; p < m->n_planes; p++) {
        double x = (double)m->rows[p * m->n_cols + j];
        votes += m->options->by_frequency ? (x > 0) - (x < 0) : x;
    }
    for (uint32_t p = 0; p < m->n_planes; p++) {
        double x = (double)m->rows[p * m->n_cols + j];
        if (votes >= 0 ? !(x > 0) : !(x < 0)) continue;
        sum += m->planes[p].weight * x;
        n++;
    }
    *out = n > 1 ? sum / n : sum;
}

static void mix_rows(const mix *m, float *out)
{
    bool prunes = m->options->density < 1;
    bool small = prunes && m->method->pruning == CHOIR_MERGE_PRUNES_SMALL;
    bool random = prunes && m->method->pruning == CHOIR_MERGE_PRUNES_RANDOM;
    for (uint32_t p = 0; small && p < m->n_planes; p++) find_threshold(m, &m->planes[p]);
    for (uint64_t i = 0; i < m->n_rows; i++) {
        for (uint32_t p = 0; p < m->n_planes; p++) {
            float *row = m->rows + p * m->n_cols;
            put_row(m, &m->planes[p], i, row);
            if (small) prune_small(&m->planes[p], row, m->n_cols);
            if (random) prune_random(m, &m->planes[p], i, row);
        }
        for (uint64_t j = 0; j < m->n_cols; j++) {
            double sum;
            (m->method->elects ? add_elected : add_weighted)(m, j, &sum);
            out[i * m->n_cols + j] = (float)sum;
        }
    }
}

/* Mixes one of the three matrices of all sources into out [rows, cols]. */
static choir_status mix_planes(const choir_merge_options *o, const choir_tune_source *sources,
                               uint32_t n, const choir_tune_target *t, which w, float *out)
{
    mix m = {.options = o, .method = choir_merge_method_of(o->method), .stream = t->stream};
    m.n_planes = n;
    m.n_rows = w == FACTOR_A ? sources[0].rank : t->rows;
    m.n_cols = w == FACTOR_B ? sources[0].rank : t->cols;
    m.planes = choir_calloc(CHOIR_MEM_TUNE, n, sizeof *m.planes);
    m.sums = choir_calloc(CHOIR_MEM_TUNE, m.n_cols, sizeof *m.sums);
    m.rows = choir_calloc(CHOIR_MEM_TUNE, n * m.n_cols, sizeof *m.rows);
    m.histogram = choir_calloc(CHOIR_MEM_TUNE, N_BINS, sizeof *m.histogram);
    choir_status status = CHOIR_OK;
    if (m.planes == NULL || m.sums == NULL || m.rows == NULL || m.histogram == NULL)
        status = no_memory(t);
    for (uint32_t p = 0; status == CHOIR_OK && p < n; p++) {
        const choir_tune_source *s = &sources[p];
        double weight = s->weight * (w == PRODUCT ? 1 : s->scale);
        if (w == FACTOR_A) weight = weight < 0 ? -sqrt(-weight) : sqrt(weight);
        if (w == FACTOR_B) weight = sqrt(fabs(weight));
        m.planes[p] = (plane){.source = s, .which = w, .weight = weight};
    }
    if (status == CHOIR_OK) mix_rows(&m, out);
    choir_free(m.planes);
    choir_free(m.sums);
    choir_free(m.rows);
    choir_free(m.histogram);
    return status;
}

static choir_status mix_factors(const choir_merge_options *o, const choir_tune_source *sources,
                                uint32_t n, const choir_tune_target *t)
{
    uint32_t rank = sources[0].rank;
    CHOIR_ASSERT(rank <= t->rank);
    CHOIR_TRY(mix_planes(o, sources, n, t, FACTOR_A, t->a));
    if (rank == t->rank) return mix_planes(o, sources, n, t, FACTOR_B, t->b);
    float *b = choir_calloc(CHOIR_MEM_TUNE, (size_t)t->rows * rank, sizeof *b);
    if (b == NULL) return no_memory(t);
    choir_status status = mix_planes(o, sources, n, t, FACTOR_B, b);
    for (uint32_t i = 0; i < t->rows; i++)
        memcpy(t->b + (size_t)i * t->rank, b + (size_t)i * rank, rank * sizeof *b);
    choir_free(b);
    return status;
}

static void concatenate(const choir_tune_source *sources, uint32_t n, const choir_tune_target *t)
{
    uint32_t first = 0;
    for (uint32_t p = 0; p < n; p++) {
        const choir_tune_source *s = &sources[p];
        CHOIR_ASSERT(s->rank <= t->rank - first);
        float *a = t->a + (size_t)first * t->cols;
        for (size_t i = 0; i < (size_t)s->rank * t->cols; i++)
            a[i] = (float)(s->weight * s->scale * (double)s->a[i]);
        for (uint32_t i = 0; i < t->rows; i++)
            memcpy(t->b + (size_t)i * t->rank + first, s->b + (size_t)i * s->rank,
                   s->rank * sizeof *s->b);
        first += s->rank;
    }
}

/* The sum of products of small rank, decomposed without being made. */
static choir_status decompose_factors(const choir_tune_svd *svd, const choir_tune_source *sources,
                                      uint32_t n, uint32_t inner, const choir_tune_target *t)
{
    double *p = choir_alloc(CHOIR_MEM_TUNE, (size_t)t->rows * inner * sizeof *p);
    double *q = choir_alloc(CHOIR_MEM_TUNE, (size_t)inner * t->cols * sizeof *q);
    choir_status status = p == NULL || q == NULL ? no_memory(t) : CHOIR_OK;
    uint32_t first = 0;
    for (uint32_t k = 0; k < n && status == CHOIR_OK; k++) {
        const choir_tune_source *s = &sources[k];
        for (uint32_t i = 0; i < t->rows; i++)
            for (uint32_t j = 0; j < s->rank; j++)
                p[(size_t)i * inner + first + j] = (double)s->b[(size_t)i * s->rank + j];
        for (size_t i = 0; i < (size_t)s->rank * t->cols; i++)
            q[(size_t)first * t->cols + i] = s->weight * s->scale * (double)s->a[i];
        first += s->rank;
    }
    if (status == CHOIR_OK) status = choir_tune_svd_product(svd, inner, p, q);
    choir_free(p);
    choir_free(q);
    return status;
}

static choir_status check_finite(const choir_tune_target *t, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return choir_fail(CHOIR_E_DATA_LOSS, "%s: the merged weights are too large for f32",
                              t->name);
    return CHOIR_OK;
}

static choir_status decompose(const choir_merge_options *o, const choir_tune_source *sources,
                              uint32_t n, const choir_tune_target *t)
{
    const choir_tune_svd svd = {.rows = t->rows,
                                .cols = t->cols,
                                .rank = t->rank,
                                .a = t->a,
                                .b = t->b,
                                .interrupted = o->interrupted};
    uint64_t inner = 0;
    for (uint32_t k = 0; k < n; k++) inner += sources[k].rank;
    if (o->method == CHOIR_MERGE_SVD && inner <= t->rows && inner <= t->cols)
        return decompose_factors(&svd, sources, n, (uint32_t)inner, t);
    size_t size = (size_t)t->rows * t->cols;
    float *x = choir_alloc(CHOIR_MEM_TUNE, size * sizeof *x);
    choir_status status = x == NULL ? no_memory(t) : CHOIR_OK;
    if (status == CHOIR_OK) status = mix_planes(o, sources, n, t, PRODUCT, x);
    if (status == CHOIR_OK) status = check_finite(t, x, size);
    if (status == CHOIR_OK) status = choir_tune_svd_dense(&svd, x);
    choir_free(x);
    return status;
}

choir_status choir_tune_merge_module(const choir_merge_options *options,
                                     const choir_tune_source *sources, uint32_t n_sources,
                                     const choir_tune_target *target)
{
    size_t n_a = (size_t)target->rank * target->cols, n_b = (size_t)target->rows * target->rank;
    memset(target->a, 0, n_a * sizeof(float));
    memset(target->b, 0, n_b * sizeof(float));
    if (choir_merge_method_of(options->method)->svd)
        CHOIR_TRY(decompose(options, sources, n_sources, target));
    else if (options->method == CHOIR_MERGE_CAT)
        concatenate(sources, n_sources, target);
    else
        CHOIR_TRY(mix_factors(options, sources, n_sources, target));
    CHOIR_TRY(check_finite(target, target->a, n_a));
    return check_finite(target, target->b, n_b);
}

uint64_t choir_tune_merge_module_bytes(choir_merge_method method, uint32_t rows, uint32_t cols,
                                       uint32_t sum_of_ranks, uint32_t rank)
{
    const choir_merge_method_info *m = choir_merge_method_of(method);
    uint64_t sides = (uint64_t)rows + cols;
    uint64_t bytes = sides * ((uint64_t)sum_of_ranks + rank) * sizeof(float);
    if (!m->svd) return 2 * bytes;
    /* the blocks of doubles: twice what is searched, at most five times the rank and a margin */
    bytes += 2 * sides * 5 * ((uint64_t)rank + 8) * sizeof(double);
    if (method == CHOIR_MERGE_SVD) return bytes + 2 * sides * sum_of_ranks * sizeof(double);
    return bytes + (uint64_t)rows * cols * sizeof(float);
}
