/* Quantised products with AVX2: 8 output rows x 4 k in a register against 4 broadcast activation
 * bytes.
 *
 * 4-bit codes: maddubs gives int16 sums of two products, at most 2 * 15 * 128; a block's eight of
 * them fit int16 (30720), so widening and scaling are paid once in 32 k; 2- and 3-bit codes become
 * such bytes first. The two halves of 16-bit
 * activations are two such sums, joined when they are widened. 8-bit codes would overflow int16, so
 * they are widened and multiplied with the int16 form of the activations, as are 4-bit codes that
 * stand for 8-bit values, once a table has told them; both halves of a 16-bit
 * pair lie where one shift or mask finds them. Unpacking costs little beside the work on a tile of
 * activation rows. */
#include "engine/kernels/cpu/avx2.h"
#include "engine/kernels/cpu/fetch.h"

#include <immintrin.h>

enum {
    TILE = 4,     /* sums for each output that are kept in registers */
    AHEAD = 4096, /* bytes: how long before their use codes are fetched, to hide memory's latency */
    ROWS_AT_ONCE = 32, /* activation rows per pass over the weights: their codes stay in L2 */
};

/* What a strip function is compiled for. */
enum {
    W8 = 1,
    MIN = 2,
    F32_SCALES = 4,
    HALVES = 8,
    TABLE = 16, /* with W8: 4-bit codes of a table */
    W2 = 32,
    W3 = 64
};

/* One strip of weights against some activation rows. */
typedef struct strip_job {
    const uint8_t *strip, *rows;
    uint32_t n_rows, n_out; /* output rows that exist, 1..16 */
    float *y;               /* of the first activation row, at the strip's first output */
    size_t ldy;
    quant_layout l;
    acts_layout acts;
    const uint8_t *table; /* of 4-bit codes */
    choir_fetch *fetch;
} strip_job;

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
    if (kind & F32_SCALES) return _mm256_loadu_ps((const float *)p + 8 * i);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + i));
}

/* Scales and minima of one (half) block. */
typedef struct block_scales {
    __m256 d[2], m[2];
} block_scales;

INLINE block_scales load_block_scales(const uint8_t *p, int part, int kind)
{
    block_scales s;
    int m_at = kind & HALVES ? 4 + 2 * part : 2;
    for (int v = 0; v < 2; v++) {
        s.d[v] = load_scales(p, 2 * part + v, kind);
        s.m[v] = kind & MIN ? load_scales(p, m_at + v, kind) : s.d[v];
    }
    return s;
}

/* acc += d * (sum - zero * code sum) [+ m * s], for the two vectors of one activation row */
INLINE void finish(const strip_job *j, const uint8_t *row, uint32_t b, int part, const __m256i *sum,
                   const block_scales *s, int kind, __m256 *acc)
{
    __m256 da = broadcast_float(row + j->acts.d_at + 4 * (size_t)b);
    __m256i zero = _mm256_setzero_si256();
    if (!(kind & MIN)) {
        const int32_t *sums = (const int32_t *)(row + j->acts.sums_at) + N_SUMS * (size_t)b;
        int32_t n = sums[SUM_FIRST] + sums[SUM_SECOND];
        if (kind & HALVES) n = sums[part];
        zero = _mm256_set1_epi32(n * (1 << j->l.zero_log2));
    }
    for (int v = 0; v < 2; v++) {
        __m256i n = kind & MIN ? sum[v] : _mm256_sub_epi32(sum[v], zero);
        acc[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(n), _mm256_mul_ps(s->d[v], da), acc[v]);
    }
    if (kind & MIN) {
        __m256 sa = broadcast_float(row + j->acts.s_at + 4 * (size_t)b);
        if (kind & HALVES) {
            const int32_t *sums = (const int32_t *)(row + j->acts.sums_at) + N_SUMS * (size_t)b;
            sa = _mm256_mul_ps(da, _mm256_set1_ps((float)sums[part]));
        }
        for (int v = 0; v < 2; v++) acc[v] = _mm256_fmadd_ps(s->m[v], sa, acc[v]);
    }
}

/* Widens a row's int16 sums; an upper half counts 256 times. */
INLINE __m256i widen_sum(__m256i high, __m256i low)
{
    __m256i sum = _mm256_madd_epi16(high, _mm256_set1_epi16(256));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
}

/* Groups 2p and 2p + 1 of a block's codes of up to 4 bits, the v-th 8 output rows, as bytes. */
INLINE void load_pair(const uint8_t *codes, int p, int v, int kind, __m256i *first, __m256i *second)
{
    if (!(kind & (W2 | W3))) {
        const __m256i mask = _mm256_set1_epi8(15);
        __m256i both = load(codes + p * 64 + v * 32);
        *first = _mm256_and_si256(both, mask);
        *second = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        return;
    }
    const __m256i mask = _mm256_set1_epi8(3), third = _mm256_set1_epi8(4);
    __m256i four = load(codes + p / 2 * 64 + v * 32);
    if (p % 2 == 1) four = _mm256_srli_epi16(four, 4);
    *first = _mm256_and_si256(four, mask);
    *second = _mm256_and_si256(_mm256_srli_epi16(four, 2), mask);
    if (!(kind & W3)) return;
    __m256i bits = load(codes + 128 + v * 32); /* group g's is bit g, wanted as bit 2 */
    __m256i a = p == 0 ? _mm256_slli_epi16(bits, 2) : _mm256_srli_epi16(bits, 2 * p - 2);
    __m256i b = p == 0 ? _mm256_slli_epi16(bits, 1) : _mm256_srli_epi16(bits, 2 * p - 1);
    *first = _mm256_or_si256(*first, _mm256_and_si256(a, third));
    *second = _mm256_or_si256(*second, _mm256_and_si256(b, third));
}

/* One block of 4-bit codes: int16 sums over 8 k-groups of the halves of n activation rows. */
INLINE void w4_block(const strip_job *j, const uint8_t *rows, uint32_t b, int n, int kind,
                     __m256 acc[TILE][2])
{
    const int bytes = kind & W2 ? 128 : kind & W3 ? 192 : 256;
    const uint8_t *codes = j->strip + j->l.codes_at + (size_t)b * bytes;
    __m256i sum[TILE][2];
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        __m256i first[2], second[2];
        if (p * 64 < bytes) _mm_prefetch(codes + p * 64 + AHEAD, _MM_HINT_T0);
        for (int v = 0; v < 2; v++) load_pair(codes, p, v, kind, &first[v], &second[v]);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * n; i++) {
            const uint8_t *q = rows + i / 2 * j->acts.row_bytes + i % 2 * j->acts.low_at +
                               (size_t)b * BLOCK + p * 8;
            __m256i a = broadcast_bytes(q), c = broadcast_bytes(q + 4);
            for (int v = 0; v < 2; v++) {
                __m256i x = _mm256_maddubs_epi16(first[v], a),
                        y = _mm256_maddubs_epi16(second[v], c);
                sum[i][v] = p == 0 ? x : now(_mm256_add_epi16(sum[i][v], x));
                sum[i][v] = now(_mm256_add_epi16(sum[i][v], y));
            }
        }
    }
    block_scales s = load_block_scales(j->strip + (size_t)b * j->l.scale_bytes, 0, kind);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        __m256i wide[2], *high = sum[2 * i], *low = sum[2 * i + 1];
        for (int v = 0; v < 2; v++) wide[v] = widen_sum(high[v], low[v]);
        finish(j, rows + i * j->acts.row_bytes, b, 0, wide, &s, kind, acc[i]);
    }
}

/* Group g of a block's codes, the v-th 8 output rows: bytes as they lie, or as the table has them.
 */
INLINE __m256i load_group(const strip_job *j, const uint8_t *codes, int g, int v, int kind)
{
    if (!(kind & TABLE)) return load(codes + g * 64 + v * 32);
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i both = load(codes + g / 2 * 64 + v * 32);
    __m256i nibbles = _mm256_and_si256(g % 2 ? _mm256_srli_epi16(both, 4) : both, mask);
    __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)j->table));
    return _mm256_shuffle_epi8(table, nibbles);
}

/* One block of 8-bit codes, or the part-th half of it where the halves have scales of their own. */
INLINE void w8_block(const strip_job *j, const uint8_t *rows, uint32_t b, int part, int n, int kind,
                     __m256 acc[TILE][2])
{
    const __m256i mask = _mm256_set1_epi16(255);
    const int n_groups = kind & HALVES ? 4 : 8, bytes = kind & TABLE ? 32 : 64; /* of a group */
    const uint8_t *codes = j->strip + j->l.codes_at + ((size_t)b * 8 + part * 4) * bytes;
    __m256i sum[TILE][2];
#pragma GCC unroll 8
    for (int g = 0; g < n_groups; g++) {
        __m256i even[2], odd[2];
        if (!(kind & TABLE) || g % 2 == 0) _mm_prefetch(codes + g * bytes + AHEAD, _MM_HINT_T0);
        for (int v = 0; v < 2; v++) {
            __m256i four = load_group(j, codes, g, v, kind);
            even[v] = _mm256_and_si256(four, mask);
            odd[v] = _mm256_srli_epi16(four, 8);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const uint8_t *q = rows + i * j->acts.row_bytes + j->acts.words_at +
                               ((size_t)b * BLOCK + part * 16 + g * 4) * 2;
            __m256i a = broadcast_bytes(q), c = broadcast_bytes(q + 4);
            for (int v = 0; v < 2; v++) {
                __m256i x = _mm256_madd_epi16(even[v], a), y = _mm256_madd_epi16(odd[v], c);
                sum[i][v] = g == 0 ? x : now(_mm256_add_epi32(sum[i][v], x));
                sum[i][v] = now(_mm256_add_epi32(sum[i][v], y));
            }
        }
    }
    block_scales s = load_block_scales(j->strip + (size_t)b * j->l.scale_bytes, part, kind);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
        finish(j, rows + i * j->acts.row_bytes, b, part, sum[i], &s, kind, acc[i]);
}

INLINE void store_outputs(const strip_job *j, float *y, const __m256 *acc)
{
    if (__builtin_expect(j->n_out == STRIP, 1)) {
        _mm256_storeu_ps(y, acc[0]);
        _mm256_storeu_ps(y + 8, acc[1]);
        return;
    }
    float all[STRIP];
    _mm256_storeu_ps(all, acc[0]);
    _mm256_storeu_ps(all + 8, acc[1]);
    memcpy(y, all, j->n_out * sizeof *y);
}

/* n activation rows from the first-th on */
INLINE void run_tile(const strip_job *j, uint32_t first, int n, int kind)
{
    __m256 acc[TILE][2];
    const strip_job local = *j; /* a copy that no store can alias */
    const uint8_t *rows = j->rows + first * j->acts.row_bytes;
    for (int i = 0; i < n; i++) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    choir_fetch fetch = begin_fetch(local.fetch);
    for (uint32_t b = 0; b < local.l.n_blocks; b++) {
        if (!(kind & W8)) w4_block(&local, rows, b, n, kind, acc);
        if (kind & W8) w8_block(&local, rows, b, 0, n, kind, acc);
        if (kind & HALVES) w8_block(&local, rows, b, 1, n, kind, acc);
        fetch_lines(&fetch);
    }
    end_fetch(local.fetch, &fetch);
    for (int i = 0; i < n; i++) store_outputs(&local, local.y + (first + i) * local.ldy, acc[i]);
}

INLINE void run_strip(const strip_job *j, int kind)
{
    const uint32_t tile = kind & W8 ? TILE : TILE / 2;
    uint32_t i = 0;
    for (; i + tile <= j->n_rows; i += tile) run_tile(j, i, (int)tile, kind);
    if (tile == TILE && j->n_rows - i == 3) run_tile(j, i, 3, kind);
    if (tile == TILE && j->n_rows - i == 2) run_tile(j, i, 2, kind);
    if (j->n_rows - i == 1) run_tile(j, i, 1, kind);
}

typedef void (*strip_function)(const strip_job *j);

#define STRIP_FUNCTION(name, kind)                                                                 \
    static void name(const strip_job *j)                                                           \
    {                                                                                              \
        run_strip(j, kind);                                                                        \
    }
STRIP_FUNCTION(w4_zero_f16, 0)
STRIP_FUNCTION(w4_min_f16, MIN)
STRIP_FUNCTION(w4_min_f32, MIN | F32_SCALES)
STRIP_FUNCTION(w2_min_f16, W2 | MIN)
STRIP_FUNCTION(w3_zero_f16, W3)
STRIP_FUNCTION(w8_zero_f16, W8)
STRIP_FUNCTION(w8_min_f16, W8 | MIN)
STRIP_FUNCTION(w8_min_f32, W8 | MIN | F32_SCALES)
STRIP_FUNCTION(w8_halves_f32, W8 | HALVES | F32_SCALES)
STRIP_FUNCTION(table_f16, W8 | TABLE)
STRIP_FUNCTION(table_f32, W8 | TABLE | F32_SCALES)
STRIP_FUNCTION(table_halves_f32, W8 | TABLE | HALVES | F32_SCALES)
STRIP_FUNCTION(table_halves_min_f32, W8 | TABLE | HALVES | MIN | F32_SCALES)

static strip_function function_for(const choir_matrix *w, const quant_layout *l)
{
    if (l->table != TABLE_NONE && l->n_groups == 2)
        return l->min ? table_halves_min_f32 : table_halves_f32;
    if (l->table != TABLE_NONE) return l->f32 ? table_f32 : table_f16;
    if (w->layout == CHOIR_LAYOUT_W2) return w2_min_f16;
    if (w->layout == CHOIR_LAYOUT_W3) return w3_zero_f16;
    if (w->layout == CHOIR_LAYOUT_W4)
        return l->min ? l->f32 ? w4_min_f32 : w4_min_f16 : w4_zero_f16;
    if (l->n_groups == 2) return w8_halves_f32;
    return l->min ? l->f32 ? w8_min_f32 : w8_min_f16 : w8_zero_f16;
}

void choir_avx2_quant_matmul(const choir_matrix *w, const choir_acts *acts, float *restrict y,
                             size_t ldy, uint32_t begin, uint32_t end)
{
    strip_job j = {.ldy = ldy,
                   .l = choir_quant_layout(w),
                   .acts = choir_acts_layout(w->cols),
                   .fetch = acts->fetch};
    strip_function run = function_for(w, &j.l);
    j.table = choir_code_tables[j.l.table];
    CHOIR_ASSERT(acts->q8 != NULL && begin % STRIP == 0);
    for (uint32_t first = 0; first < acts->n_rows; first += ROWS_AT_ONCE) {
        uint32_t left = acts->n_rows - first;
        j.n_rows = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE;
        j.rows = (const uint8_t *)acts->q8 + first * j.acts.row_bytes;
        for (uint32_t r = begin; r < end; r += STRIP) {
            j.strip = (const uint8_t *)w->data + r / STRIP * j.l.strip_bytes;
            j.n_out = end - r < STRIP ? end - r : STRIP;
            j.y = y + first * ldy + r;
            run(&j);
        }
    }
}
