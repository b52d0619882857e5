/* WHAT    How packed weights and quantised activations lie in memory; scalar f16 and bf16.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  Inside engine/kernels only; nothing of it is stored in files.
 * NEXT    pack.c writes it, cpu/ reads it.
 *
 * Weights. 16 output rows make a strip; strips follow each other. Quantised strips are cut along K
 * in blocks of 32 and lie as two runs, each 64-aligned: scales   for each block: d[groups][16],
 * then m[groups][16] where the source has minima (f16 or f32) codes    W8: for each block 8 x 64
 * bytes: row r's four codes of k = 4g .. 4g+3 at 64g + 4r W4: for each block 4 x 64 bytes, low
 * nibbles as group 2p, high nibbles as group 2p + 1 so that 16 rows x 4 k are one AVX-512 VNNI
 * operand, and 8 rows x 4 k one for AVX2. W2: for each block 2 x 64 bytes, bits 2j of the q-th as
 * group 4q + j. W3: the codes' low two bits as in W2, then 64 bytes whose bit g is the third bit of
 * group g. A weight is d * (code - zero), or d * code + m; with a table, the code is what the table
 * has in its place. Rows beyond the matrix are zeros. Float strips are [K][16].
 *
 * Activations. Per row, K padded to blocks of 32 that share a scale d, and a 16-bit code each:
 *     high   int8, and low int8: code = 256 high + low. The upper halves alone are 8-bit
 * activations words  int16, the codes in the order 0 2 1 3 of each four (what AVX2 wants for 8-bit
 * weights) d, s, high_s   f32 a block: the scale, d * sum of codes, d * 256 * sum of upper halves
 *     sums   int32 a block: the codes' sums of both 16s, and the sum of upper halves */
#pragma once
#include "engine/kernels/kernels.h"

#include <string.h>

enum {
    STRIP = CHOIR_PACK_ROWS,
    BLOCK = 32,           /* K elements that share an activation scale */
    FLOAT_CHUNK = 256,    /* K elements of a partial sum with f32 activations */
    CODE_MAX = 127 * 256, /* of an activation, so that both its halves fit int8 */
    FLAG_F32 = 1,         /* scales are f32, else f16 */
    FLAG_MIN = 2,         /* minima present, zero is 0 */
    FLAG_HALVES = 4,      /* two scales a block, 16 elements each */
    ZERO_SHIFT = 8,       /* log2 of zero lies in bits 8..15 */
    TABLE_SHIFT = 16,     /* the number of a code table in bits 16.., 0: codes are what they are */
};

typedef struct quant_layout {
    uint32_t n_blocks, n_groups; /* blocks along K; scales a block (1 or 2) */
    uint32_t scale_bytes;        /* of one block, all 16 rows, minima included */
    uint32_t code_bytes;         /* of one block: choir_code_bytes() */
    size_t codes_at;             /* from the strip's start */
    size_t strip_bytes;
    uint32_t zero_log2; /* of the code that means 0, where there is no minimum */
    uint32_t table;
    bool f32, min;
} quant_layout;

static inline size_t round_up_64(size_t n)
{
    return (n + 63) & ~(size_t)63;
}

static inline uint32_t choir_code_bytes(choir_layout layout)
{
    switch (layout) {
    case CHOIR_LAYOUT_W2:
        return 128;
    case CHOIR_LAYOUT_W3:
        return 192;
    case CHOIR_LAYOUT_W4:
        return 256;
    default:
        return 512;
    }
}

/* Row r's k-th code of a block. */
static inline uint32_t choir_code_at(choir_layout layout, const uint8_t *block, uint32_t r,
                                     uint32_t k)
{
    uint32_t g = k / 4, at = r * 4 + k % 4;
    switch (layout) {
    case CHOIR_LAYOUT_W2:
        return block[g / 4 * 64 + at] >> (g % 4 * 2) & 3;
    case CHOIR_LAYOUT_W3:
        return (block[g / 4 * 64 + at] >> (g % 4 * 2) & 3) | (block[128 + at] >> g & 1) << 2;
    case CHOIR_LAYOUT_W4:
        return block[g / 2 * 64 + at] >> (g % 2 * 4) & 15;
    default:
        return block[g * 64 + at];
    }
}

static inline quant_layout choir_quant_layout(const choir_matrix *w)
{
    quant_layout l = {.n_blocks = w->cols / BLOCK, .n_groups = w->flags & FLAG_HALVES ? 2 : 1};
    l.f32 = (w->flags & FLAG_F32) != 0;
    l.min = (w->flags & FLAG_MIN) != 0;
    l.zero_log2 = w->flags >> ZERO_SHIFT & 255;
    l.table = w->flags >> TABLE_SHIFT;
    l.scale_bytes = STRIP * l.n_groups * (1 + l.min) * (l.f32 ? 4 : 2);
    l.code_bytes = choir_code_bytes(w->layout);
    l.codes_at = round_up_64((size_t)l.n_blocks * l.scale_bytes);
    l.strip_bytes = l.codes_at + (size_t)l.n_blocks * l.code_bytes;
    return l;
}

static inline size_t choir_float_strip_bytes(const choir_matrix *w)
{
    return round_up_64((size_t)w->cols * STRIP * (w->layout == CHOIR_LAYOUT_F32 ? 4 : 2));
}

typedef struct acts_layout {
    uint32_t n_blocks;
    size_t low_at, words_at, d_at, s_at, sums_at, row_bytes;
} acts_layout;

enum { SUM_FIRST, SUM_SECOND, N_SUMS }; /* of a block, at sums_at */

static inline acts_layout choir_acts_layout(uint32_t cols)
{
    acts_layout l = {.n_blocks = (uint32_t)(((uint64_t)cols + BLOCK - 1) / BLOCK)};
    size_t n = l.n_blocks, k = n * BLOCK;
    l.low_at = k;
    l.words_at = 2 * k;
    l.d_at = 4 * k;
    l.s_at = l.d_at + 4 * n;
    l.sums_at = l.s_at + 4 * n;
    l.row_bytes = round_up_64(l.sums_at + 4 * n * N_SUMS) | 64; /* no powers of two */
    return l;
}

/* 4-bit codes of 4-bit layouts whose products are made with 8 bits: themselves; the values of IQ4 and of
 * FP4 (doubled), plus 128. */
enum { TABLE_NONE, TABLE_SAME, TABLE_IQ4, TABLE_FP4, N_TABLES };
extern const uint8_t choir_code_tables[N_TABLES][16];

/* 32 weights of one row as codes: d[half] * (code - zero) + m[half], by way of a table if there is one. */
typedef struct block_codes {
    uint8_t code[BLOCK];
    float d[2], m[2];
    int zero;
    uint32_t table;
} block_codes;

void choir_decode_block(choir_dtype dtype, const uint8_t *row, uint32_t block, block_codes *out);
/* Elements [begin, end) of a row, both multiples of the block (or of 1 for float types). */
void choir_dequantize(choir_dtype dtype, const uint8_t *row, uint32_t begin, uint32_t end,
                      float *out);

static inline float bits_to_f32(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint32_t f32_to_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline float bf16_to_f32(uint16_t h)
{
    return bits_to_f32((uint32_t)h << 16);
}

static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) { /* Inf; a NaN is made quiet, as the hardware does */
        uint32_t nan = rest > 0x7c00 ? 0x400000 : 0;
        return bits_to_f32(sign | 0x7f800000 | (rest & 0x3ff) << 13 | nan);
    }
    if (rest < 0x400) { /* a multiple of 2^-24, which f32 holds exactly */
        float f = (float)rest * 0x1p-24F;
        return bits_to_f32(sign | f32_to_bits(f));
    }
    return bits_to_f32(sign | ((rest << 13) + (112U << 23)));
}

/* Rounds to nearest, ties to even; NaNs keep their top bits and become quiet, as F16C does. */
static inline uint16_t f32_to_f16(float f)
{
    uint32_t bits = f32_to_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and above */
    if (rest < 0x38800000) { /* subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits */
        float shifted = bits_to_f32(rest) + 0.5F;
        return (uint16_t)(sign | (f32_to_bits(shifted) - 0x3f000000));
    }
    uint32_t odd = rest >> 13 & 1;
    return (uint16_t)(sign | ((rest - (112U << 23) + 0xfff + odd) >> 13));
}

/* Address of an unaligned little-endian 16-bit value. */
static inline uint16_t load_u16(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}
