/* The AVX-512 level (F, BW, VL, VNNI). Quantised products: 16 output rows x 4 k in a register,
 * multiplied with 4 broadcast activation bytes and added up by one dpbusd, once for each half of
 * the activations' codes; all else is as in AVX2, twice as wide. */
#include "engine/kernels/cpu/fetch.h"
#include "engine/kernels/cpu/wide_avx512.h"
/* wide_*.h need the vocabulary above. */
#include "engine/kernels/cpu/wide_attention.h"
#include "engine/kernels/cpu/wide_factors.h"
#include "engine/kernels/cpu/wide_matmul.h"
#include "engine/kernels/cpu/wide_rows.h"

enum {
    TILE = 4,     /* activation rows whose sums, two each, are kept in registers */
    AHEAD = 2048, /* bytes: how long before their use codes are fetched, to hide memory's latency */
    ROWS_AT_ONCE = 64, /* activation rows per pass over the weights: their codes stay in L2 */
};

/* What a tile function is compiled for. */
enum { W8 = 1, MIN = 2, F32_SCALES = 4, HALVES = 8, TABLE = 16, W2 = 32, W3 = 64 };

typedef struct tile {
    const uint8_t *strip;
    const uint8_t *row; /* the first activation row */
    float *y;           /* of the first activation row and output row */
    size_t ldy;
    uint32_t n_out; /* output rows that exist, 1..16 */
    const quant_layout *l;
    acts_layout acts;
    __m512i table; /* of 4-bit codes, four times */
    choir_fetch *fetch;
} tile;

INLINE wide load_scales(const uint8_t *p, int i, int kind)
{
    if (kind & F32_SCALES) return w_load((const float *)p + LANES * i);
    return w_load_f16((const uint16_t *)p + LANES * i);
}

INLINE __m512i add_third_bit(__m512i low, __m512i bits)
{
    return _mm512_or_si512(low, _mm512_and_si512(bits, _mm512_set1_epi8(4)));
}

/* Groups of 16 rows x 4 k, as load_codes() has them, of 2- or 3-bit codes. */
INLINE void load_few_bits(const uint8_t *codes, int kind, __m512i group[8])
{
    const __m512i mask = _mm512_set1_epi8(3);
#pragma GCC unroll 2
    for (int q = 0; q < 2; q++) {
        _mm_prefetch(codes + q * 64 + AHEAD, _MM_HINT_T0);
        __m512i four = _mm512_loadu_si512(codes + q * 64);
        group[4 * q] = _mm512_and_si512(four, mask);
        group[4 * q + 1] = _mm512_and_si512(_mm512_srli_epi16(four, 2), mask);
        group[4 * q + 2] = _mm512_and_si512(_mm512_srli_epi16(four, 4), mask);
        group[4 * q + 3] = _mm512_and_si512(_mm512_srli_epi16(four, 6), mask);
    }
    if (!(kind & W3)) return;
    _mm_prefetch(codes + 128 + AHEAD, _MM_HINT_T0);
    __m512i bits = _mm512_loadu_si512(codes + 128); /* group g's is bit g, wanted as bit 2 */
    group[0] = add_third_bit(group[0], _mm512_slli_epi16(bits, 2));
    group[1] = add_third_bit(group[1], _mm512_slli_epi16(bits, 1));
    group[2] = add_third_bit(group[2], bits);
    group[3] = add_third_bit(group[3], _mm512_srli_epi16(bits, 1));
    group[4] = add_third_bit(group[4], _mm512_srli_epi16(bits, 2));
    group[5] = add_third_bit(group[5], _mm512_srli_epi16(bits, 3));
    group[6] = add_third_bit(group[6], _mm512_srli_epi16(bits, 4));
    group[7] = add_third_bit(group[7], _mm512_srli_epi16(bits, 5));
}

/* The 8 groups of 16 rows x 4 k of a block as unsigned bytes. */
INLINE void load_codes(const tile *t, const uint8_t *codes, int kind, __m512i group[8])
{
    if (kind & W8) {
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
            _mm_prefetch(codes + g * 64 + AHEAD, _MM_HINT_T0);
            group[g] = _mm512_loadu_si512(codes + g * 64);
        }
        return;
    }
    if (kind & (W2 | W3)) {
        load_few_bits(codes, kind, group);
        return;
    }
    const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        _mm_prefetch(codes + p * 64 + AHEAD, _MM_HINT_T0);
        __m512i both = _mm512_loadu_si512(codes + p * 64);
        group[2 * p] = _mm512_and_si512(both, mask);
        group[2 * p + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        if (!(kind & TABLE)) continue;
        group[2 * p] = _mm512_shuffle_epi8(t->table, group[2 * p]);
        group[2 * p + 1] = _mm512_shuffle_epi8(t->table, group[2 * p + 1]);
    }
}

INLINE __m512i broadcast_codes(const uint8_t *p)
{
    float four; /* a broadcast from memory, not by way of an integer register */
    memcpy(&four, p, 4);
    return _mm512_castps_si512(_mm512_set1_ps(four));
}

/* acc += scale * (sum - zero * code sum) [+ minimum * s] for one activation row and (half) block */
INLINE wide finish(const tile *t, const uint8_t *row, uint32_t b, int half, __m512i sum, wide d,
                   wide m, int kind, wide acc)
{
    wide da = w_set(((const float *)(row + t->acts.d_at))[b]);
    if (!(kind & MIN)) {
        const int32_t *sums = (const int32_t *)(row + t->acts.sums_at) + N_SUMS * (size_t)b;
        int32_t n = sums[SUM_FIRST] + sums[SUM_SECOND];
        if (kind & HALVES) n = sums[half];
        sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(n * (1 << t->l->zero_log2)));
    }
    acc = w_fma(_mm512_cvtepi32_ps(sum), w_mul(d, da), acc);
    if (kind & MIN) {
        wide s = w_set(((const float *)(row + t->acts.s_at))[b]);
        const int32_t *sums = (const int32_t *)(row + t->acts.sums_at) + N_SUMS * (size_t)b;
        if (kind & HALVES) s = w_mul(da, w_set((float)sums[half]));
        acc = w_fma(m, s, acc);
    }
    return acc;
}

/* An upper half counts 256 times. */
INLINE __m512i join_sums(__m512i high, __m512i low)
{
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

INLINE void run_block(const tile *t, uint32_t b, int rows, int kind, wide *acc)
{
    const uint8_t *scales = t->strip + (size_t)b * t->l->scale_bytes;
    const int n_parts = kind & HALVES ? 2 : 1, per_part = 8 / n_parts;
    __m512i group[8];
    load_codes(t, t->strip + t->l->codes_at + (size_t)b * t->l->code_bytes, kind, group);
    for (int part = 0; part < n_parts; part++) {
        wide d = load_scales(scales, part, kind);
        wide m = kind & MIN ? load_scales(scales, n_parts + part, kind) : w_zero();
        __m512i sum[2 * TILE];
#pragma GCC unroll 8
        for (int i = 0; i < 2 * rows; i++) sum[i] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int g = 0; g < per_part; g++)
#pragma GCC unroll 8
            for (int i = 0; i < 2 * rows; i++) {
                const int at = part * per_part + g;
                const uint8_t *four = t->row + i / 2 * t->acts.row_bytes + i % 2 * t->acts.low_at +
                                      (size_t)b * BLOCK + at * 4;
                sum[i] = _mm512_dpbusd_epi32(sum[i], group[at], broadcast_codes(four));
            }
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512i joined = join_sums(sum[2 * i], sum[2 * i + 1]);
            acc[i] = finish(t, t->row + i * t->acts.row_bytes, b, part, joined, d, m, kind, acc[i]);
        }
    }
}

INLINE void run_tile(const tile *t, int rows, int kind)
{
    wide acc[TILE];
    for (int i = 0; i < rows; i++) acc[i] = w_zero();
    choir_fetch fetch = begin_fetch(t->fetch);
    for (uint32_t b = 0; b < t->l->n_blocks; b++) {
        run_block(t, b, rows, kind, acc);
        fetch_lines(&fetch);
    }
    end_fetch(t->fetch, &fetch);
    for (int i = 0; i < rows; i++) w_store_first(t->y + i * t->ldy, acc[i], t->n_out);
}

/* All activation rows, in tiles of as many as registers hold. */
INLINE void run_rows_of(tile *t, uint32_t n, int kind)
{
    while (n > 0) {
        uint32_t step = n >= TILE ? TILE : 1;
        if (n >= TILE)
            run_tile(t, TILE, kind);
        else
            run_tile(t, 1, kind);
        t->row += step * t->acts.row_bytes;
        t->y += step * t->ldy;
        n -= step;
    }
}

typedef void (*tile_function)(tile *t, uint32_t n);

#define TILE_FUNCTION(name, kind)                                                                  \
    static void name(tile *t, uint32_t n)                                                          \
    {                                                                                              \
        run_rows_of(t, n, kind);                                                                   \
    }
TILE_FUNCTION(w4_zero_f16, 0)
TILE_FUNCTION(w4_min_f16, MIN)
TILE_FUNCTION(w4_min_f32, MIN | F32_SCALES)
TILE_FUNCTION(w2_min_f16, W2 | MIN)
TILE_FUNCTION(w3_zero_f16, W3)
TILE_FUNCTION(w8_zero_f16, W8)
TILE_FUNCTION(w8_min_f16, W8 | MIN)
TILE_FUNCTION(w8_min_f32, W8 | MIN | F32_SCALES)
TILE_FUNCTION(w8_halves_f32, W8 | HALVES | F32_SCALES)
TILE_FUNCTION(table_f16, TABLE)
TILE_FUNCTION(table_f32, TABLE | F32_SCALES)
TILE_FUNCTION(table_halves_f32, TABLE | HALVES | F32_SCALES)
TILE_FUNCTION(table_halves_min_f32, TABLE | HALVES | MIN | F32_SCALES)

static tile_function function_for(const choir_matrix *w, const quant_layout *l)
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

static void quant_matmul(const choir_matrix *w, const choir_acts *acts, float *restrict y,
                         size_t ldy, uint32_t begin, uint32_t end)
{
    quant_layout l = choir_quant_layout(w);
    tile t = {.ldy = ldy, .l = &l, .acts = choir_acts_layout(w->cols), .fetch = acts->fetch};
    tile_function run = function_for(w, &l);
    t.table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)choir_code_tables[l.table]));
    CHOIR_ASSERT(acts->q8 != NULL && begin % STRIP == 0);
    for (uint32_t first = 0; first < acts->n_rows; first += ROWS_AT_ONCE) {
        uint32_t left = acts->n_rows - first, n = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE;
        for (uint32_t r = begin; r < end; r += STRIP) {
            t.strip = (const uint8_t *)w->data + r / STRIP * l.strip_bytes;
            t.n_out = end - r < STRIP ? end - r : STRIP;
            t.row = (const uint8_t *)acts->q8 + first * t.acts.row_bytes;
            t.y = y + first * ldy + r;
            run(&t, n);
        }
    }
}

static void matmul(const choir_matrix *w, const choir_acts *acts, float *restrict y, size_t ldy,
                   uint32_t begin, uint32_t end)
{
    if (choir_layout_has_codes(w->layout))
        quant_matmul(w, acts, y, ldy, begin, end);
    else
        float_matmul(w, acts, y, ldy, begin, end);
}

const choir_kernels choir_kernels_avx512 = {
    .level = CHOIR_CPU_AVX512VNNI,
    .name = "avx512vnni",
    .quantize = quantize,
    .matmul = matmul,
    .shrink = shrink,
    .expand = expand,
    .rms_norm = rms_norm,
    .rope = rope,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .clamped_swiglu = clamped_swiglu,
    .softcap = softcap,
    .add = add,
    .add_scaled = add_scaled,
    .f32_to_f16 = f32_to_f16_row,
    .f16_to_f32 = f16_to_f32_row,
    .attention = attention,
    .max = max_of_row,
    .sum_exp = sum_exp,
};
