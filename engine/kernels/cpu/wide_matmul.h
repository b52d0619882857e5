/* WHAT    Products with f32 activations: packed F32, F16 and BF16 strips, and exact products over
 *         weights that are dequantised piece by piece.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  Included once by each level's source, after its wide_*.h. Bits equal reference.c's.
 * NEXT    wide_attention.h */
#pragma once

enum {
    FLOAT_TILE = 4,
    FLOAT_ROWS_AT_ONCE = 256, /* activation rows that share a dequantised piece */
};

/* A piece of a strip: k of 16 weights each, for k in [0, n). */
typedef struct float_piece {
    const uint8_t *weights;
    choir_layout layout; /* F32, F16 or BF16 */
    uint32_t n;
    bool first; /* of K: sets, instead of adds to, acc */
} float_piece;

INLINE wide load_weights(const uint8_t *p, size_t k, choir_layout layout)
{
    if (layout == CHOIR_LAYOUT_F32) return w_load((const float *)p + k * LANES);
    const uint16_t *halves = (const uint16_t *)p + k * LANES;
    return layout == CHOIR_LAYOUT_F16 ? w_load_f16(halves) : w_load_bf16(halves);
}

/* acc[i][16] += sum over the piece of x[i][k] * weights[k][16], for n_rows <= FLOAT_TILE rows */
INLINE void float_tile(const float_piece *p, const float *x, size_t ldx, int n_rows,
                       choir_layout layout, float *acc)
{
    wide sum[FLOAT_TILE];
    for (int i = 0; i < n_rows; i++) sum[i] = w_zero();
    for (uint32_t k = 0; k < p->n; k++) {
        wide w = load_weights(p->weights, k, layout);
        for (int i = 0; i < n_rows; i++) sum[i] = w_fma(w, w_set(x[i * ldx + k]), sum[i]);
    }
    for (int i = 0; i < n_rows; i++)
        w_store(acc + i * LANES, p->first ? sum[i] : w_add(w_load(acc + i * LANES), sum[i]));
}

INLINE void float_rows(const float_piece *p, const float *x, size_t ldx, uint32_t n_rows,
                       choir_layout layout, float *acc)
{
    for (uint32_t i = 0; i < n_rows;
         i += FLOAT_TILE, x += FLOAT_TILE * ldx, acc += FLOAT_TILE * LANES)
        switch (n_rows - i) {
        case 1:
            float_tile(p, x, ldx, 1, layout, acc);
            break;
        case 2:
            float_tile(p, x, ldx, 2, layout, acc);
            break;
        case 3:
            float_tile(p, x, ldx, 3, layout, acc);
            break;
        default:
            float_tile(p, x, ldx, FLOAT_TILE, layout, acc);
            break;
        }
}

static void add_float_piece(const float_piece *p, const float *x, size_t ldx, uint32_t n_rows,
                            float *acc)
{
    if (p->layout == CHOIR_LAYOUT_F32)
        float_rows(p, x, ldx, n_rows, CHOIR_LAYOUT_F32, acc);
    else if (p->layout == CHOIR_LAYOUT_F16)
        float_rows(p, x, ldx, n_rows, CHOIR_LAYOUT_F16, acc);
    else
        float_rows(p, x, ldx, n_rows, CHOIR_LAYOUT_BF16, acc);
}

/* Elements [k, k + n) of up to 16 output rows from r, dequantised into out[n][16]. */
static void dequantize_piece(const choir_matrix *w, uint32_t r, uint32_t k, uint32_t n, float *out)
{
    float row[FLOAT_CHUNK];
    size_t row_bytes = choir_dtype_row_bytes(w->dtype, w->cols);
    uint32_t n_out = w->rows - r < STRIP ? w->rows - r : STRIP;
    if (n_out < STRIP) memset(out, 0, (size_t)n * STRIP * sizeof *out);
    for (uint32_t j = 0; j < n_out; j++) {
        choir_dequantize(w->dtype, (const uint8_t *)w->data + (r + j) * row_bytes, k, k + n, row);
        for (uint32_t i = 0; i < n; i++) out[i * STRIP + j] = row[i];
    }
}

static void float_strip(const choir_matrix *w, uint32_t r, const float *x, size_t ldx,
                        uint32_t n_rows, float *acc)
{
    _Alignas(64) float weights[FLOAT_CHUNK * STRIP];
    bool exact = w->layout == CHOIR_LAYOUT_EXACT;
    for (uint32_t k = 0; k < w->cols; k += FLOAT_CHUNK) {
        float_piece p = {.layout = exact ? CHOIR_LAYOUT_F32 : w->layout, .first = k == 0};
        p.n = w->cols - k < FLOAT_CHUNK ? w->cols - k : FLOAT_CHUNK;
        if (exact) {
            dequantize_piece(w, r, k, p.n, weights);
            p.weights = (const uint8_t *)weights;
        } else {
            p.weights = (const uint8_t *)w->data + r / STRIP * choir_float_strip_bytes(w) +
                        (size_t)k * STRIP * (w->layout == CHOIR_LAYOUT_F32 ? 4 : 2);
        }
        add_float_piece(&p, x + k, ldx, n_rows, acc);
    }
}

static void float_matmul(const choir_matrix *w, const choir_acts *acts, float *restrict y,
                         size_t ldy, uint32_t begin, uint32_t end)
{
    _Alignas(64) float acc[FLOAT_ROWS_AT_ONCE * STRIP];
    for (uint32_t first = 0; first < acts->n_rows; first += FLOAT_ROWS_AT_ONCE) {
        uint32_t left = acts->n_rows - first;
        uint32_t n = left < FLOAT_ROWS_AT_ONCE ? left : FLOAT_ROWS_AT_ONCE;
        for (uint32_t r = begin; r < end; r += STRIP) {
            uint32_t n_out = end - r < STRIP ? end - r : STRIP;
            float_strip(w, r, acts->x + (size_t)first * acts->cols, acts->cols, n, acc);
            for (size_t i = 0; i < n; i++)
                memcpy(y + (first + i) * ldy + r, acc + i * STRIP, n_out * sizeof *y);
        }
    }
}
