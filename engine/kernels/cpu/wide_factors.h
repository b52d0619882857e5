/* WHAT    Products with the factors of low-rank pairs: x to A x, and y to y + B t.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  Included once by each level's source, after its wide_*.h. Bits equal reference.c's,
 * whatever the number of rows: tiles only share loads. NEXT    engine/adapt.c */
#pragma once

INLINE wide load_factor(const choir_factor *f, size_t at, choir_factor_type type)
{
    switch (type) {
    case CHOIR_FACTOR_F32:
        return w_load((const float *)f->data + at);
    case CHOIR_FACTOR_F16:
        return w_load_f16((const uint16_t *)f->data + at);
    case CHOIR_FACTOR_BF16:
        return w_load_bf16((const uint16_t *)f->data + at);
    default:
        return w_load_i8((const int8_t *)f->data + at);
    }
}

/* Sums that a tile keeps in registers, a `wide` each: FACTOR_SUMS of the level. */
enum { FACTOR_ROWS = 4 };

/* sums[j * n_rows + i] += A[r + j] x[i] over all columns */
INLINE void shrink_tile(const choir_factor *a, choir_factor_type type, uint32_t r, int n_ranks,
                        const float *x, size_t ldx, int n_rows, wide *sums)
{
    for (int j = 0; j < n_ranks * n_rows; j++) sums[j] = w_zero();
    size_t at = (size_t)r * a->stride;
    uint32_t k = 0;
    for (; k + LANES <= a->length; k += LANES)
        for (int j = 0; j < n_ranks; j++) {
            wide w = load_factor(a, at + (size_t)j * a->stride + k, type);
            for (int i = 0; i < n_rows; i++)
                sums[j * n_rows + i] =
                    w_fma(w, w_load(x + (size_t)i * ldx + k), sums[j * n_rows + i]);
        }
    if (k == a->length) return;
    for (int j = 0; j < n_ranks;
         j++) { /* the factor's rows end in zeros, the activations' do not */
        wide w = load_factor(a, at + (size_t)j * a->stride + k, type);
        for (int i = 0; i < n_rows; i++)
            sums[j * n_rows + i] = w_fma(w, w_load_first(x + (size_t)i * ldx + k, a->length - k),
                                         sums[j * n_rows + i]);
    }
}

/* From rank r on, n_ranks at once while there are so many; returns the rank that is left. */
INLINE uint32_t shrink_ranks(const choir_factor *a, choir_factor_type type, uint32_t r, int n_ranks,
                             const float *x, size_t ldx, int n_rows, float *t, size_t ldt)
{
    wide sums[FACTOR_SUMS];
    for (; r + (uint32_t)n_ranks <= a->rank; r += (uint32_t)n_ranks) {
        shrink_tile(a, type, r, n_ranks, x, ldx, n_rows, sums);
        for (int j = 0; j < n_ranks; j++)
            for (int i = 0; i < n_rows; i++)
                t[(size_t)i * ldt + r + (uint32_t)j] =
                    w_fold(sums[j * n_rows + i]) * choir_factor_scale(a, r + (uint32_t)j);
    }
    return r;
}

INLINE void shrink_rows(const choir_factor *a, choir_factor_type type, const float *x, size_t ldx,
                        int n_rows, float *t, size_t ldt)
{
    uint32_t r = 0;
    if (n_rows == 1) r = shrink_ranks(a, type, r, FACTOR_SUMS > 4 ? 8 : 4, x, ldx, 1, t, ldt);
    if (n_rows > 1) r = shrink_ranks(a, type, r, FACTOR_SUMS / n_rows, x, ldx, n_rows, t, ldt);
    shrink_ranks(a, type, r, 1, x, ldx, n_rows, t, ldt);
}

INLINE void shrink_type(const choir_factor *a, choir_factor_type type, const float *x, size_t ldx,
                        uint32_t n_rows, float *t, size_t ldt)
{
    uint32_t i = 0;
    for (; FACTOR_SUMS > 4 && i + FACTOR_ROWS <= n_rows; i += FACTOR_ROWS)
        shrink_rows(a, type, x + i * ldx, ldx, FACTOR_ROWS, t + i * ldt, ldt);
    for (; i + 2 <= n_rows; i += 2) shrink_rows(a, type, x + i * ldx, ldx, 2, t + i * ldt, ldt);
    if (i < n_rows) shrink_rows(a, type, x + i * ldx, ldx, 1, t + i * ldt, ldt);
}

static void shrink(const choir_factor *a, const float *x, size_t ldx, uint32_t n_rows, float *t,
                   size_t ldt)
{
    if (a->type == CHOIR_FACTOR_F32)
        shrink_type(a, CHOIR_FACTOR_F32, x, ldx, n_rows, t, ldt);
    else if (a->type == CHOIR_FACTOR_F16)
        shrink_type(a, CHOIR_FACTOR_F16, x, ldx, n_rows, t, ldt);
    else if (a->type == CHOIR_FACTOR_BF16)
        shrink_type(a, CHOIR_FACTOR_BF16, x, ldx, n_rows, t, ldt);
    else
        shrink_type(a, CHOIR_FACTOR_INT8, x, ldx, n_rows, t, ldt);
}

/* y[i] += t[i, r] B[r] over n_wides * 16 columns from c on, ranks ascending. */
INLINE void expand_tile(const choir_factor *b, choir_factor_type type, uint32_t c, int n_wides,
                        const float *t, size_t ldt, int n_rows, float *y, size_t ldy)
{
    wide sums[FACTOR_SUMS];
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < n_wides; j++)
            sums[i * n_wides + j] = w_load(y + (size_t)i * ldy + c + j * LANES);
    for (uint32_t r = 0; r < b->rank; r++) {
        wide w[FACTOR_SUMS];
        for (int j = 0; j < n_wides; j++)
            w[j] = load_factor(b, (size_t)r * b->stride + c + (uint32_t)j * LANES, type);
        for (int i = 0; i < n_rows; i++) {
            wide s = w_set(t[(size_t)i * ldt + r] * choir_factor_scale(b, r));
            for (int j = 0; j < n_wides; j++)
                sums[i * n_wides + j] = w_fma(s, w[j], sums[i * n_wides + j]);
        }
    }
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < n_wides; j++)
            w_store(y + (size_t)i * ldy + c + j * LANES, sums[i * n_wides + j]);
}

/* The last columns, fewer than 16. */
INLINE void expand_tail(const choir_factor *b, choir_factor_type type, uint32_t c, uint32_t left,
                        const float *t, size_t ldt, uint32_t n_rows, float *y, size_t ldy)
{
    for (uint32_t i = 0; i < n_rows; i++) {
        wide sum = w_load_first(y + i * ldy + c, left);
        for (uint32_t r = 0; r < b->rank; r++)
            sum = w_fma(w_set(t[i * ldt + r] * choir_factor_scale(b, r)),
                        load_factor(b, (size_t)r * b->stride + c, type), sum);
        w_store_first(y + i * ldy + c, sum, left);
    }
}

/* n_wides * 16 columns from c on, of all rows. */
INLINE void expand_rows(const choir_factor *b, choir_factor_type type, uint32_t c, int n_wides,
                        const float *t, size_t ldt, uint32_t n_rows, float *y, size_t ldy)
{
    uint32_t i = 0;
    for (; i + FACTOR_ROWS <= n_rows; i += FACTOR_ROWS)
        expand_tile(b, type, c, n_wides, t + i * ldt, ldt, FACTOR_ROWS, y + i * ldy, ldy);
    for (; i < n_rows; i++) expand_tile(b, type, c, n_wides, t + i * ldt, ldt, 1, y + i * ldy, ldy);
}

INLINE void expand_type(const choir_factor *b, choir_factor_type type, const float *t, size_t ldt,
                        uint32_t n_rows, float *y, size_t ldy, uint32_t begin, uint32_t end)
{
    uint32_t c = begin;
    if (n_rows == 1)
        for (; c + 4 * LANES <= end; c += 4 * LANES) expand_tile(b, type, c, 4, t, ldt, 1, y, ldy);
    else
        for (; c + FACTOR_SUMS / FACTOR_ROWS * LANES <= end; c += FACTOR_SUMS / FACTOR_ROWS * LANES)
            expand_rows(b, type, c, FACTOR_SUMS / FACTOR_ROWS, t, ldt, n_rows, y, ldy);
    for (; c + LANES <= end; c += LANES) expand_rows(b, type, c, 1, t, ldt, n_rows, y, ldy);
    if (c < end) expand_tail(b, type, c, end - c, t, ldt, n_rows, y, ldy);
}

static void expand(const choir_factor *b, const float *t, size_t ldt, uint32_t n_rows, float *y,
                   size_t ldy, uint32_t begin, uint32_t end)
{
    if (b->type == CHOIR_FACTOR_F32)
        expand_type(b, CHOIR_FACTOR_F32, t, ldt, n_rows, y, ldy, begin, end);
    else if (b->type == CHOIR_FACTOR_F16)
        expand_type(b, CHOIR_FACTOR_F16, t, ldt, n_rows, y, ldy, begin, end);
    else if (b->type == CHOIR_FACTOR_BF16)
        expand_type(b, CHOIR_FACTOR_BF16, t, ldt, n_rows, y, ldy, begin, end);
    else
        expand_type(b, CHOIR_FACTOR_INT8, t, ldt, n_rows, y, ldy, begin, end);
}
