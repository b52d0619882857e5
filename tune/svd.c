/* Three tools do all of it: Householder's QR makes a tall matrix square, Jacobi's rotations from
 * one side (Hestenes 1958) decompose the square, and for large dense matrices a block Krylov space
 * (Musco, Musco 2015, "Randomized block Krylov methods for stronger and faster approximate singular
 * value decomposition") finds the few directions that a small rank wants, begun again from its best
 * vectors until what they hold of X no longer grows. */
#include "tune/svd.h"

#include <math.h>
#include <string.h>

enum {
    PANEL = 8,  /* columns that go through a dense product together */
    MARGIN = 8, /* columns of a Krylov block beyond the rank: they speed the last wanted ones up */
    MAX_SWEEPS = 60, /* Jacobi converges in six to ten */
    MAX_ROUNDS = 200,
};
/* Two columns count as orthogonal at this cosine; energy that no longer grows by this share is all
 * there is. */
static const double max_cosine = 1e-13, noise = 1e-24, min_growth = 1e-12;

/* n_columns columns of n_rows doubles, one behind the other. */
typedef struct block {
    double *v;
    size_t n_rows;
    uint32_t n_columns;
} block;

static double *column(const block *x, uint32_t j)
{
    return x->v + j * x->n_rows;
}

static choir_status block_make(size_t n_rows, uint32_t n_columns, block *out)
{
    *out = (block){choir_calloc(CHOIR_MEM_TUNE, n_rows * n_columns, sizeof(double)), n_rows,
                   n_columns};
    if (out->v != NULL) return CHOIR_OK;
    return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu by %u numbers of a decomposition",
                      n_rows, n_columns);
}

/* Four sums beside each other, so that the additions need not wait for one another. */
static double dot(const double *restrict x, const double *restrict y, size_t n)
{
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        s0 += x[i] * y[i];
        s1 += x[i + 1] * y[i + 1];
        s2 += x[i + 2] * y[i + 2];
        s3 += x[i + 3] * y[i + 3];
    }
    for (; i < n; i++) s0 += x[i] * y[i];
    return s0 + s1 + (s2 + s3);
}

static void subtract(double *restrict y, double factor, const double *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++) y[i] -= factor * x[i];
}

/* Column j from row j on becomes Householder's vector, its first element 1; R's diagonal element
 * and the factor tau of H = 1 - tau v v' come back. */
static double reflector(double *x, size_t n, double *diagonal)
{
    double norm = sqrt(dot(x, x, n));
    *diagonal = x[0] > 0 ? -norm : norm;
    if (norm == 0) return 0;
    double first = x[0] - *diagonal;
    for (size_t i = 1; i < n; i++) x[i] /= first;
    x[0] = 1;
    return -first / *diagonal;
}

/* x = Q R: Q comes in x's place, R [n, n] upper as a block of columns, if it is wanted. x has as
 * many rows as columns or more; Q's columns are orthonormal whatever x's rank. */
static choir_status factor_qr(block *x, double *r)
{
    uint32_t n = x->n_columns;
    double *tau = choir_calloc(CHOIR_MEM_TUNE, n, sizeof *tau);
    if (tau == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u numbers", n);
    for (uint32_t j = 0; j < n; j++) {
        double *v = column(x, j) + j, diagonal;
        size_t left = x->n_rows - j;
        tau[j] = reflector(v, left, &diagonal);
        if (r != NULL) {
            memcpy(r + (size_t)j * n, column(x, j), j * sizeof *r);
            memset(r + (size_t)j * n + j, 0, (n - j) * sizeof *r);
            r[(size_t)j * n + j] = diagonal;
        }
        for (uint32_t k = j + 1; k < n; k++) {
            double *y = column(x, k) + j;
            subtract(y, tau[j] * dot(v, y, left), v, left);
        }
    }
    for (uint32_t j = n;
         j-- > 0;) { /* the reflectors applied to the unit columns, the last first */
        double *v = column(x, j) + j;
        size_t left = x->n_rows - j;
        for (uint32_t k = j + 1; k < n; k++) {
            double *y = column(x, k) + j;
            subtract(y, tau[j] * dot(v, y, left), v, left);
        }
        for (size_t i = 0; i < left; i++) v[i] *= -tau[j];
        v[0] += 1;
        memset(column(x, j), 0, j * sizeof(double));
    }
    choir_free(tau);
    return CHOIR_OK;
}

static void rotate(double *restrict x, double *restrict y, size_t n, double c, double s)
{
    for (size_t i = 0; i < n; i++) {
        double xi = x[i], yi = y[i];
        x[i] = c * xi - s * yi;
        y[i] = s * xi + c * yi;
    }
}

/* One pair made orthogonal; whether there was anything to do. */
static bool rotate_pair(block *g, block *v, uint32_t i, uint32_t j, double *squares, double scale)
{
    double product = dot(column(g, i), column(g, j), g->n_rows);
    if (fabs(product) <= noise * scale ||
        fabs(product) <= max_cosine * sqrt(squares[i]) * sqrt(squares[j]))
        return false;
    double zeta = (squares[j] - squares[i]) / (2 * product);
    double t = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
    double c = 1 / sqrt(1 + t * t), s = c * t;
    rotate(column(g, i), column(g, j), g->n_rows, c, s);
    rotate(column(v, i), column(v, j), v->n_rows, c, s);
    squares[i] = dot(column(g, i), column(g, i), g->n_rows);
    squares[j] = dot(column(g, j), column(g, j), g->n_rows);
    return true;
}

/* g becomes g V, its columns orthogonal: U S of the decomposition; `v`, square, becomes V. */
static void jacobi(block *g, block *v, double *squares)
{
    double scale = 0;
    for (uint32_t j = 0; j < g->n_columns; j++) {
        memset(column(v, j), 0, v->n_rows * sizeof(double));
        column(v, j)[j] = 1;
        squares[j] = dot(column(g, j), column(g, j), g->n_rows);
        if (squares[j] > scale) scale = squares[j];
    }
    bool any = true;
    for (int sweep = 0; any && sweep < MAX_SWEEPS; sweep++) {
        any = false;
        for (uint32_t i = 0; i + 1 < g->n_columns; i++)
            for (uint32_t j = i + 1; j < g->n_columns; j++)
                any = rotate_pair(g, v, i, j, squares, scale) || any;
    }
}

/* The columns of x times those of the square c, the best first: x becomes x c[order]. */
static choir_status recombine(block *x, const block *c, const uint32_t *order, uint32_t n)
{
    block y;
    CHOIR_TRY(block_make(x->n_rows, n, &y));
    for (uint32_t j = 0; j < n; j++)
        for (uint32_t k = 0; k < x->n_columns; k++)
            subtract(column(&y, j), -column(c, order[j])[k], column(x, k), x->n_rows);
    choir_free(x->v);
    *x = y;
    return CHOIR_OK;
}

static void sort_by_size(const double *squares, uint32_t n, uint32_t *order)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = i;
        for (; at > 0 && squares[order[at - 1]] < squares[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
}

/* left core right' decomposed, all orthonormal but the core: `left` and `right` become the first
 * `n` pairs of singular vectors, squares their values squared. */
static choir_status decompose(block *left, block *core, block *right, uint32_t n, double *squares)
{
    uint32_t k = core->n_columns;
    block v = {0};
    uint32_t *order = choir_calloc(CHOIR_MEM_TUNE, k, sizeof *order);
    double *all = choir_calloc(CHOIR_MEM_TUNE, k, sizeof *all);
    choir_status status = CHOIR_OK;
    if (order == NULL || all == NULL)
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u singular values", k);
    if (status == CHOIR_OK) status = block_make(k, k, &v);
    if (status != CHOIR_OK) goto done;
    jacobi(core, &v, all);
    sort_by_size(all, k, order);
    for (uint32_t j = 0; j < k; j++) {
        double norm = sqrt(all[j]);
        for (uint32_t i = 0; norm > 0 && i < k; i++) column(core, j)[i] /= norm;
    }
    for (uint32_t j = 0; j < n; j++) squares[j] = all[order[j]];
    CHOIR_TRY_TO(done, status, recombine(left, core, order, n));
    status = recombine(right, &v, order, n);
done:
    choir_free(v.v);
    choir_free(all);
    choir_free(order);
    return status;
}

/* The pairs as B and A; those that are noise beside the first are left out. */
static void put_factors(const choir_tune_svd *svd, const block *left, const block *right,
                        const double *squares)
{
    uint32_t n = left->n_columns < svd->rank ? left->n_columns : svd->rank;
    memset(svd->a, 0, (size_t)svd->rank * svd->cols * sizeof *svd->a);
    memset(svd->b, 0, (size_t)svd->rows * svd->rank * sizeof *svd->b);
    for (uint32_t k = 0; k < n && squares[k] > noise * squares[0]; k++) {
        double sigma = sqrt(squares[k]);
        for (uint32_t i = 0; i < svd->rows; i++)
            svd->b[(size_t)i * svd->rank + k] = (float)(sigma * column(left, k)[i]);
        for (uint32_t i = 0; i < svd->cols; i++)
            svd->a[(size_t)k * svd->cols + i] = (float)column(right, k)[i];
    }
}

static void multiply_upper(const double *p, const double *q, block *out)
{
    uint32_t n = out->n_columns; /* p q', both upper */
    for (uint32_t j = 0; j < n; j++)
        for (uint32_t k = j; k < n; k++)
            subtract(column(out, j), -q[(size_t)k * n + j], p + (size_t)k * n, k + 1);
}

choir_status choir_tune_svd_product(const choir_tune_svd *svd, uint32_t inner, const double *p,
                                    const double *q)
{
    CHOIR_ASSERT(inner > 0 && inner <= svd->rows && inner <= svd->cols);
    block left = {0}, right = {0}, core = {0}, triangles = {0}, squares = {0};
    uint32_t n = inner < svd->rank ? inner : svd->rank;
    choir_status status;
    CHOIR_TRY_TO(done, status, block_make(svd->rows, inner, &left));
    CHOIR_TRY_TO(done, status, block_make(svd->cols, inner, &right));
    CHOIR_TRY_TO(done, status, block_make(inner, inner, &core));
    CHOIR_TRY_TO(done, status, block_make((size_t)inner * inner, 2, &triangles));
    CHOIR_TRY_TO(done, status, block_make(n, 1, &squares));
    for (uint32_t k = 0; k < inner; k++) {
        for (uint32_t i = 0; i < svd->rows; i++) column(&left, k)[i] = p[(size_t)i * inner + k];
        memcpy(column(&right, k), q + (size_t)k * svd->cols, svd->cols * sizeof *q);
    }
    CHOIR_TRY_TO(done, status, factor_qr(&left, column(&triangles, 0)));
    CHOIR_TRY_TO(done, status, factor_qr(&right, column(&triangles, 1)));
    multiply_upper(column(&triangles, 0), column(&triangles, 1), &core);
    CHOIR_TRY_TO(done, status, decompose(&left, &core, &right, n, squares.v));
    put_factors(svd, &left, &right, squares.v);
done:
    choir_free(left.v);
    choir_free(right.v);
    choir_free(core.v);
    choir_free(triangles.v);
    choir_free(squares.v);
    return status;
}

/* X seen from its longer side: tall [n_long, n_short], whether that is X or X'. */
typedef struct dense {
    const float *x;
    size_t n_rows, n_cols; /* as x lies */
    bool turned;           /* tall is X' */
    size_t n_long, n_short;
} dense;

static void gather_panel(const block *from, uint32_t first, uint32_t n, double (*panel)[PANEL])
{
    for (size_t i = 0; i < from->n_rows; i++)
        for (uint32_t c = 0; c < PANEL; c++) panel[i][c] = c < n ? column(from, first + c)[i] : 0;
}

static void scatter_panel(double (*panel)[PANEL], block *to, uint32_t first, uint32_t n)
{
    for (size_t i = 0; i < to->n_rows; i++)
        for (uint32_t c = 0; c < n; c++) column(to, first + c)[i] = panel[i][c];
}

/* y = x v for a panel of columns: two rows of x at once share what is read of v. */
static void times_panel(const dense *d, double (*restrict v)[PANEL], double (*restrict y)[PANEL])
{
    memset(y, 0, d->n_rows * sizeof *y);
    for (size_t i = 0; i < d->n_rows; i += 2) {
        size_t last = i + 1 < d->n_rows ? i + 1 : i;
        const float *x0 = d->x + i * d->n_cols, *x1 = d->x + last * d->n_cols;
        double s0[PANEL] = {0}, s1[PANEL] = {0};
        for (size_t j = 0; j < d->n_cols; j++) {
            double f0 = (double)x0[j], f1 = (double)x1[j];
            for (int c = 0; c < PANEL; c++) {
                s0[c] += f0 * v[j][c];
                s1[c] += f1 * v[j][c];
            }
        }
        memcpy(y[i], s0, sizeof s0);
        memcpy(y[last], last == i ? s0 : s1, sizeof s1);
    }
}

/* y = x' v */
static void turned_times_panel(const dense *d, double (*restrict v)[PANEL],
                               double (*restrict y)[PANEL])
{
    memset(y, 0, d->n_cols * sizeof *y);
    for (size_t i = 0; i < d->n_rows; i++) {
        const float *x = d->x + i * d->n_cols;
        for (size_t j = 0; j < d->n_cols; j++) {
            double f = (double)x[j];
            for (int c = 0; c < PANEL; c++) y[j][c] += f * v[i][c];
        }
    }
}

/* Columns [first, first + n) of `from` times tall (or tall') become those of `to` from `at` on. */
static choir_status multiply(const dense *d, bool back, const block *from, uint32_t first,
                             uint32_t n, block *to, uint32_t at)
{
    double(*v)[PANEL] = choir_alloc(CHOIR_MEM_TUNE, from->n_rows * sizeof *v);
    double(*y)[PANEL] = choir_alloc(CHOIR_MEM_TUNE, to->n_rows * sizeof *y);
    choir_status status = CHOIR_OK;
    if (v == NULL || y == NULL)
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu numbers of a decomposition",
                            (from->n_rows + to->n_rows) * PANEL);
    for (uint32_t done = 0; status == CHOIR_OK && done < n; done += PANEL) {
        uint32_t now = n - done < PANEL ? n - done : PANEL;
        gather_panel(from, first + done, now, v);
        (back != d->turned ? turned_times_panel : times_panel)(d, v, y);
        scatter_panel(y, to, at + done, now);
    }
    choir_free(v);
    choir_free(y);
    return status;
}

/* Every direction at once, where the short side is hardly more than a Krylov space would be. */
static choir_status decompose_whole(const choir_tune_svd *svd, const dense *d)
{
    uint32_t k = (uint32_t)d->n_short, n = k < svd->rank ? k : svd->rank;
    block tall = {0}, core = {0}, side = {0}, squares = {0};
    choir_status status;
    CHOIR_TRY_TO(done, status, block_make(d->n_long, k, &tall));
    CHOIR_TRY_TO(done, status, block_make(k, k, &core));
    CHOIR_TRY_TO(done, status, block_make(k, k, &side));
    CHOIR_TRY_TO(done, status, block_make(n, 1, &squares));
    for (uint32_t j = 0; j < k; j++) {
        column(&side, j)[j] = 1;
        for (size_t i = 0; i < d->n_long; i++)
            column(&tall, j)[i] = (double)d->x[d->turned ? j * d->n_cols + i : i * d->n_cols + j];
    }
    CHOIR_TRY_TO(done, status, factor_qr(&tall, core.v));
    CHOIR_TRY_TO(done, status, decompose(&tall, &core, &side, n, squares.v));
    put_factors(svd, d->turned ? &side : &tall, d->turned ? &tall : &side, squares.v);
done:
    choir_free(tall.v);
    choir_free(core.v);
    choir_free(side.v);
    choir_free(squares.v);
    return status;
}

/* The space that is searched: `depth` + 1 blocks of `width` columns on the short side. */
typedef struct krylov {
    const dense *d;
    uint32_t width, depth;
    block basis;   /* [n_short, width * (depth + 1)] */
    block image;   /* tall times basis */
    block squares; /* of the best pairs' values */
} krylov;

/* The starting columns, each time the same: a linear congruential generator does, since all that is
 * asked of them is that they are not orthogonal to what is sought. */
static void start(block *x, uint32_t n)
{
    uint64_t state = 1;
    for (size_t i = 0; i < n * x->n_rows; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        x->v[i] = (double)(state >> 11) / 0x1p52 - 1;
    }
}

/* From `width` columns to the best `width` in the space that they, tall' tall of them, … span. */
static choir_status search_once(krylov *s)
{
    uint32_t k = s->width * (s->depth + 1);
    block core = {0}, image = {0}, basis = {.v = s->basis.v, .n_rows = s->basis.n_rows};
    choir_status status = CHOIR_OK;
    for (uint32_t j = 1; j <= s->depth && status == CHOIR_OK; j++) {
        basis.n_columns = j * s->width;
        CHOIR_TRY_TO(done, status, factor_qr(&basis, NULL));
        uint32_t last = (j - 1) * s->width, next = j * s->width;
        CHOIR_TRY_TO(done, status, multiply(s->d, false, &s->basis, last, s->width, &s->image, 0));
        CHOIR_TRY_TO(done, status, multiply(s->d, true, &s->image, 0, s->width, &s->basis, next));
    }
    CHOIR_TRY_TO(done, status, factor_qr(&s->basis, NULL));
    CHOIR_TRY_TO(done, status, multiply(s->d, false, &s->basis, 0, k, &s->image, 0));
    CHOIR_TRY_TO(done, status, block_make(k, k, &core));
    CHOIR_TRY_TO(done, status, factor_qr(&s->image, core.v));
    CHOIR_TRY_TO(done, status, decompose(&s->image, &core, &s->basis, s->width, s->squares.v));
    /* Both have shrunk to the best columns; the next round wants the room again. */
    CHOIR_TRY_TO(done, status, block_make(s->basis.n_rows, k, &basis));
    memcpy(basis.v, s->basis.v, s->basis.n_rows * s->width * sizeof(double));
    choir_free(s->basis.v);
    s->basis = basis;
    CHOIR_TRY_TO(done, status, block_make(s->image.n_rows, k, &image));
    memcpy(image.v, s->image.v, s->image.n_rows * s->width * sizeof(double));
    choir_free(s->image.v);
    s->image = image;
done:
    choir_free(core.v);
    return status;
}

static choir_status search(const choir_tune_svd *svd, krylov *s)
{
    uint32_t k = s->width * (s->depth + 1);
    double energy = -1;
    CHOIR_TRY(block_make(s->d->n_short, k, &s->basis));
    CHOIR_TRY(block_make(s->d->n_long, k, &s->image));
    CHOIR_TRY(block_make(s->width, 1, &s->squares));
    start(&s->basis, s->width);
    for (int round = 0; round < MAX_ROUNDS; round++) {
        if (svd->interrupted != NULL && *svd->interrupted)
            return choir_fail(CHOIR_E_CANCELLED, "interrupted");
        CHOIR_TRY(search_once(s));
        double sum = 0;
        for (uint32_t j = 0; j < svd->rank; j++) sum += s->squares.v[j];
        if (sum - energy <= min_growth * sum) break;
        energy = sum;
    }
    s->basis.n_columns = s->image.n_columns = s->width;
    bool turned = s->d->turned;
    put_factors(svd, turned ? &s->basis : &s->image, turned ? &s->image : &s->basis, s->squares.v);
    return CHOIR_OK;
}

choir_status choir_tune_svd_dense(const choir_tune_svd *svd, const float *x)
{
    bool turned = svd->rows < svd->cols;
    dense d = {.x = x, .n_rows = svd->rows, .n_cols = svd->cols, .turned = turned};
    d.n_long = turned ? svd->cols : svd->rows;
    d.n_short = turned ? svd->rows : svd->cols;
    uint64_t width = (uint64_t)svd->rank + MARGIN;
    uint32_t depth = width <= 48 ? 4 : width <= 96 ? 3 : 2;
    if (3 * width * (depth + 1) >= 2 * d.n_short) return decompose_whole(svd, &d);
    krylov s = {.d = &d, .width = (uint32_t)width, .depth = depth};
    choir_status status = search(svd, &s);
    choir_free(s.basis.v);
    choir_free(s.image.v);
    choir_free(s.squares.v);
    return status;
}
