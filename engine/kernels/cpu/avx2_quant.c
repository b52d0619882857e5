/* Quantised products with AVX2: 8 output rows x 4 k in a register against 4 broadcast activation
 * bytes.
 *
 * 4-bit codes: maddubs gives int16 sums of two products, at most 2 * 15 * 127; a block's eight of
 * them fit int16 (30480), so widening and scaling are paid once in 32 k. 8-bit codes would overflow
 * int16, so they are widened to int16 and multiplied with the int16 copy of the activations; both
 * halves of a 16-bit pair lie where one shift or mask finds them.
 *
 * Up to 4 activation rows stream a strip straight from its packed form. More rows first widen a
 * piece of the strip into a buffer in L1, which tiles of 4 rows then share. */
#include "engine/kernels/cpu/avx2.h"

#include <immintrin.h>

enum {
    TILE = 4,          /* activation rows worked on together */
    ROWS_AT_ONCE = 64, /* activation rows that share a widened piece: their codes stay in L2 */
    PIECE = 16,        /* blocks of K widened at a time: 16 KiB of 8-bit weights */
    WIDE_SCALES = 48,  /* f32 scales of a widened block: d, d of the second half or m, m */
};

/* What a tile function is compiled for. */
enum { W8 = 1, MIN = 2, F32_SCALES = 4, HALVES = 8, WIDENED = 16 };

typedef struct tile {
    const uint8_t *codes, *scales;
    uint32_t code_bytes, scale_bytes; /* of one block */
    uint32_t first, n_blocks;         /* along K */
    uint32_t zero_log2;
    const uint8_t *row; /* the first activation row */
    acts_layout acts;
    float *acc; /* [rows][16] */
} tile;

#define INLINE static inline __attribute__((always_inline))

INLINE __m256i load(const void *p)
{
    return _mm256_loadu_si256(p);
}

/* Keeps the compiler from delaying a sum until its terms fill all registers. */
INLINE __m256i now(__m256i x)
{
    __asm__ volatile("" : "+x"(x));
    return x;
}

INLINE __m256i broadcast_bytes(const uint8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

INLINE __m256 broadcast_float(const uint8_t *p)
{
    return _mm256_broadcast_ss((const float *)p);
}

INLINE __m256 load_scales(const uint8_t *p, int i, int kind)
{
    if (kind & (F32_SCALES | WIDENED)) return _mm256_loadu_ps((const float *)p + 8 * i);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + i));
}

/* acc += scale * (sum - zero * code sum) [+ minimum * s], for the two vectors of one activation row
 */
INLINE void finish(const tile *t, const uint8_t *row, uint32_t b, int half, const __m256i *sum,
                   const __m256 *d, const __m256 *m, int kind, __m256 *acc)
{
    __m256 da = broadcast_float(row + t->acts.d_at + 4 * (size_t)b);
    __m256i zero = _mm256_setzero_si256();
    if (!(kind & MIN)) {
        const int32_t *sums = (const int32_t *)(row + t->acts.sums_at) + 2 * (size_t)b;
        int32_t n = kind & HALVES ? sums[half] : sums[0] + sums[1];
        zero = _mm256_set1_epi32(n * (1 << t->zero_log2));
    }
    for (int v = 0; v < 2; v++) {
        __m256i n = kind & MIN ? sum[v] : _mm256_sub_epi32(sum[v], zero);
        acc[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(n), _mm256_mul_ps(d[v], da), acc[v]);
    }
    if (kind & MIN) {
        __m256 sa = broadcast_float(row + t->acts.s_at + 4 * (size_t)b);
        for (int v = 0; v < 2; v++) acc[v] = _mm256_fmadd_ps(m[v], sa, acc[v]);
    }
}

/* One block of 4-bit codes: int16 sums of 8 k-groups for `rows` activation rows. */
INLINE void w4_block(const tile *t, const uint8_t *codes, uint32_t b, int rows, int kind,
                     __m256 acc[TILE][2])
{
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t *scales = t->scales + (size_t)(b - t->first) * t->scale_bytes;
    __m256i sum[TILE][2];
#pragma GCC unroll 8
    for (int p = 0; p < 4; p++) {
        __m256i low[2], high[2];
        for (int v = 0; v < 2; v++) {
            if (kind & WIDENED) {
                low[v] = load(codes + p * 128 + v * 32);
                high[v] = load(codes + p * 128 + 64 + v * 32);
            } else {
                __m256i both = load(codes + p * 64 + v * 32);
                low[v] = _mm256_and_si256(both, mask);
                high[v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            const uint8_t *q = t->row + i * t->acts.row_bytes + (size_t)b * BLOCK + p * 8;
            __m256i a = broadcast_bytes(q), c = broadcast_bytes(q + 4);
            for (int v = 0; v < 2; v++) {
                __m256i x = _mm256_maddubs_epi16(low[v], a), y = _mm256_maddubs_epi16(high[v], c);
                sum[i][v] = p == 0 ? x : now(_mm256_add_epi16(sum[i][v], x));
                sum[i][v] = now(_mm256_add_epi16(sum[i][v], y));
            }
        }
    }
    __m256 d[2] = {load_scales(scales, 0, kind), load_scales(scales, 1, kind)}, m[2] = {d[0], d[1]};
    if (kind & MIN) {
        m[0] = load_scales(scales, 2, kind);
        m[1] = load_scales(scales, 3, kind);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        for (int v = 0; v < 2; v++) sum[i][v] = _mm256_madd_epi16(sum[i][v], ones);
        finish(t, t->row + i * t->acts.row_bytes, b, 0, sum[i], d, m, kind, acc[i]);
    }
}

/* One block of 8-bit codes, or each half of it where the halves have scales of their own. */
INLINE void w8_block(const tile *t, const uint8_t *codes, uint32_t b, int rows, int kind,
                     __m256 acc[TILE][2])
{
    const __m256i mask = _mm256_set1_epi16(255);
    const uint8_t *scales = t->scales + (size_t)(b - t->first) * t->scale_bytes;
    int n_parts = kind & HALVES ? 2 : 1;
    for (int part = 0; part < n_parts; part++) {
        __m256i sum[TILE][2];
#pragma GCC unroll 8
        for (int j = 0; j < 8 / n_parts; j++) {
            int g = part * 4 + j;
            __m256i even[2], odd[2];
            for (int v = 0; v < 2; v++) {
                if (kind & WIDENED) {
                    even[v] = load(codes + g * 128 + v * 32);
                    odd[v] = load(codes + g * 128 + 64 + v * 32);
                } else {
                    __m256i four = load(codes + g * 64 + v * 32);
                    even[v] = _mm256_and_si256(four, mask);
                    odd[v] = _mm256_srli_epi16(four, 8);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                const uint8_t *q = t->row + i * t->acts.row_bytes + t->acts.words_at +
                                   ((size_t)b * BLOCK + g * 4) * 2;
                __m256i a = broadcast_bytes(q), c = broadcast_bytes(q + 4);
                for (int v = 0; v < 2; v++) {
                    __m256i x = _mm256_madd_epi16(even[v], a), y = _mm256_madd_epi16(odd[v], c);
                    sum[i][v] = j == 0 ? x : now(_mm256_add_epi32(sum[i][v], x));
                    sum[i][v] = now(_mm256_add_epi32(sum[i][v], y));
                }
            }
        }
        __m256 d[2] = {load_scales(scales, 2 * part, kind),
                       load_scales(scales, 2 * part + 1, kind)};
        __m256 m[2] = {d[0], d[1]};
        if (kind & MIN) {
            m[0] = load_scales(scales, 2 * n_parts, kind);
            m[1] = load_scales(scales, 2 * n_parts + 1, kind);
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
            finish(t, t->row + i * t->acts.row_bytes, b, part, sum[i], d, m, kind, acc[i]);
    }
}

INLINE void run_tile(const tile *t, int rows, int kind)
{
    __m256 acc[TILE][2];
    const uint8_t *codes = t->codes;
    const tile local = *t;
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 2; v++) acc[i][v] = _mm256_loadu_ps(t->acc + i * STRIP + v * 8);
    for (uint32_t b = local.first; b < local.first + local.n_blocks; b++) {
        if (kind & W8)
            w8_block(&local, codes, b, rows, kind, acc);
        else
            w4_block(&local, codes, b, rows, kind, acc);
        codes += local.code_bytes;
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 2; v++) _mm256_storeu_ps(local.acc + i * STRIP + v * 8, acc[i][v]);
}

typedef void (*tile_function)(const tile *t);

#define TILE_FUNCTION(name, rows, kind)                                                            \
    static __attribute__((noinline)) void name##_##rows(const tile *t)                             \
    {                                                                                              \
        run_tile(t, rows, kind);                                                                   \
    }
#define TILE_FUNCTIONS(name, kind)                                                                 \
    TILE_FUNCTION(name, 1, kind)                                                                   \
    TILE_FUNCTION(name, 2, kind)                                                                   \
    TILE_FUNCTION(name, 3, kind)                                                                   \
    TILE_FUNCTION(name, 4, kind)                                                                   \
    static const tile_function name[TILE + 1] = {NULL, name##_1, name##_2, name##_3, name##_4};

TILE_FUNCTIONS(w4_zero_f16, 0)
TILE_FUNCTIONS(w4_min_f16, MIN)
TILE_FUNCTIONS(w4_min_f32, MIN | F32_SCALES)
TILE_FUNCTIONS(w8_zero_f16, W8)
TILE_FUNCTIONS(w8_min_f16, W8 | MIN)
TILE_FUNCTIONS(w8_min_f32, W8 | MIN | F32_SCALES)
TILE_FUNCTIONS(w8_halves_f32, W8 | HALVES | F32_SCALES)
TILE_FUNCTIONS(w4_zero_wide, WIDENED)
TILE_FUNCTIONS(w4_min_wide, WIDENED | MIN)
TILE_FUNCTIONS(w8_zero_wide, WIDENED | W8)
TILE_FUNCTIONS(w8_min_wide, WIDENED | W8 | MIN)
TILE_FUNCTIONS(w8_halves_wide, WIDENED | W8 | HALVES)

static const tile_function *packed_functions(const choir_matrix *w, const quant_layout *l)
{
    if (w->layout == CHOIR_LAYOUT_W4)
        return l->min ? l->f32 ? w4_min_f32 : w4_min_f16 : w4_zero_f16;
    if (l->n_groups == 2) return w8_halves_f32;
    return l->min ? l->f32 ? w8_min_f32 : w8_min_f16 : w8_zero_f16;
}

static const tile_function *wide_functions(const choir_matrix *w, const quant_layout *l)
{
    if (w->layout == CHOIR_LAYOUT_W4) return l->min ? w4_min_wide : w4_zero_wide;
    if (l->n_groups == 2) return w8_halves_wide;
    return l->min ? w8_min_wide : w8_zero_wide;
}

static void widen_codes(const uint8_t *codes, uint32_t bytes, bool w4, uint8_t *out)
{
    const __m256i nibble = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
    for (uint32_t i = 0; i < bytes; i += 64, codes += 64, out += 128)
        for (int v = 0; v < 2; v++) {
            __m256i x = load(codes + v * 32);
            __m256i first = _mm256_and_si256(x, w4 ? nibble : byte);
            __m256i second =
                w4 ? _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble) : _mm256_srli_epi16(x, 8);
            _mm256_store_si256((__m256i *)(out + v * 32), first);
            _mm256_store_si256((__m256i *)(out + 64 + v * 32), second);
        }
}

static void widen_scales(const quant_layout *l, const uint8_t *scales, uint32_t n_blocks,
                         float *out)
{
    uint32_t n = (l->n_groups + l->min) * 2;
    for (uint32_t b = 0; b < n_blocks; b++, scales += l->scale_bytes, out += n * 8)
        for (uint32_t i = 0; i < n; i++)
            _mm256_store_ps(out + i * 8, load_scales(scales, (int)i, l->f32 ? F32_SCALES : 0));
}

/* acc[n_rows][16] of one strip, by way of widened pieces. */
static void strip_by_pieces(const choir_matrix *w, const quant_layout *l, const uint8_t *strip,
                            tile *t, uint32_t n_rows)
{
    _Alignas(64) uint8_t codes[PIECE * 1024];
    _Alignas(64) float scales[PIECE * WIDE_SCALES];
    const tile_function *functions = wide_functions(w, l);
    const uint8_t *rows = t->row;
    float *acc = t->acc;
    t->codes = codes;
    t->code_bytes = 2 * l->code_bytes;
    t->scales = (const uint8_t *)scales;
    t->scale_bytes = (l->n_groups + l->min) * STRIP * 4;
    for (t->first = 0; t->first < l->n_blocks; t->first += PIECE) {
        t->n_blocks = l->n_blocks - t->first < PIECE ? l->n_blocks - t->first : PIECE;
        widen_codes(strip + l->codes_at + (size_t)t->first * l->code_bytes,
                    t->n_blocks * l->code_bytes, w->layout == CHOIR_LAYOUT_W4, codes);
        widen_scales(l, strip + (size_t)t->first * l->scale_bytes, t->n_blocks, scales);
        for (uint32_t i = 0; i < n_rows; i += TILE) {
            t->row = rows + i * t->acts.row_bytes;
            t->acc = acc + i * STRIP;
            functions[n_rows - i < TILE ? n_rows - i : TILE](t);
        }
    }
}

/* y [n_rows, 16 of ldy] of one strip */
static void strip_product(const choir_matrix *w, const quant_layout *l, const uint8_t *strip,
                          const uint8_t *rows, uint32_t n_rows, float *acc)
{
    tile t = {.codes = strip + l->codes_at,
              .scales = strip,
              .code_bytes = l->code_bytes,
              .scale_bytes = l->scale_bytes,
              .n_blocks = l->n_blocks,
              .zero_log2 = l->zero_log2,
              .row = rows,
              .acts = choir_acts_layout(w->cols),
              .acc = acc};
    memset(acc, 0, n_rows * STRIP * sizeof *acc);
    if (n_rows <= TILE)
        packed_functions(w, l)[n_rows](&t);
    else
        strip_by_pieces(w, l, strip, &t, n_rows);
}

void choir_avx2_quant_matmul(const choir_matrix *w, const choir_acts *acts, float *restrict y,
                             size_t ldy, uint32_t begin, uint32_t end)
{
    _Alignas(64) float acc[ROWS_AT_ONCE * STRIP];
    quant_layout l = choir_quant_layout(w);
    size_t row_bytes = choir_acts_layout(w->cols).row_bytes;
    CHOIR_ASSERT(acts->q8 != NULL && begin % STRIP == 0);
    for (uint32_t first = 0; first < acts->n_rows; first += ROWS_AT_ONCE) {
        uint32_t left = acts->n_rows - first, n = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE;
        const uint8_t *rows = (const uint8_t *)acts->q8 + first * row_bytes;
        for (uint32_t r = begin; r < end; r += STRIP) {
            const uint8_t *strip = (const uint8_t *)w->data + r / STRIP * l.strip_bytes;
            uint32_t n_out = end - r < STRIP ? end - r : STRIP;
            strip_product(w, &l, strip, rows, n, acc);
            for (size_t i = 0; i < n; i++)
                memcpy(y + (first + i) * ldy + r, acc + i * STRIP, n_out * sizeof *y);
        }
    }
}
