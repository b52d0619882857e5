/* Tensor types: their table, and dequantisation as gguf-py does it, bit for bit: a product and a
 * sum are rounded one after the other, never fused. */
#include "engine/kernels/layout.h"

static const struct {
    const char *text;
    uint32_t id, elements, bytes;
} types[CHOIR_N_DTYPES] = {
#define X(name, text, id, elements, bytes) [CHOIR_##name] = {text, id, elements, bytes},
    CHOIR_DTYPE_LIST(X)
#undef X
};

const char *choir_dtype_text(choir_dtype dtype)
{
    return types[dtype].text;
}

bool choir_dtype_in_gguf(choir_dtype dtype)
{
    return types[dtype].id != CHOIR_NOT_GGUF;
}

bool choir_dtype_from_gguf(uint32_t id, choir_dtype *out)
{
    for (uint32_t i = 0; i < CHOIR_N_DTYPES; i++)
        if (types[i].id == id && choir_dtype_in_gguf((choir_dtype)i)) {
            *out = (choir_dtype)i;
            return true;
        }
    return false;
}

uint32_t choir_dtype_gguf(choir_dtype dtype)
{
    CHOIR_ASSERT(choir_dtype_in_gguf(dtype));
    return types[dtype].id;
}

uint32_t choir_dtype_block_elements(choir_dtype dtype)
{
    return types[dtype].elements;
}
uint32_t choir_dtype_block_bytes(choir_dtype dtype)
{
    return types[dtype].bytes;
}

size_t choir_dtype_row_bytes(choir_dtype dtype, uint64_t cols)
{
    return (size_t)(cols / types[dtype].elements * types[dtype].bytes);
}

static float scale_at(const uint8_t *p)
{
    return f16_to_f32(load_u16(p));
}

/* 16 bytes of nibbles: elements 0..15 in the low halves, 16..31 in the high ones. */
static void split_nibbles(const uint8_t *p, uint8_t *code)
{
    for (int i = 0; i < 16; i++) {
        code[i] = p[i] & 15;
        code[16 + i] = p[i] >> 4;
    }
}

static void add_fifth_bits(const uint8_t *p, uint8_t *code)
{
    uint32_t bits;
    memcpy(&bits, p, 4);
    for (int i = 0; i < BLOCK; i++) code[i] |= (bits >> i & 1) << 4;
}

/* 8 bytes of 2-bit codes: bits 2j of byte i are element 8j + i. */
static void split_pairs(const uint8_t *p, uint8_t *code)
{
    for (int i = 0; i < BLOCK; i++) code[i] = p[i % 8] >> (i / 8 * 2) & 3;
}

static void set_scale(block_codes *out, float d, float m, int zero)
{
    out->d[0] = out->d[1] = d;
    out->m[0] = out->m[1] = m;
    out->zero = zero;
}

/* Q4_K and Q5_K: 6-bit scale and minimum of the j-th of 8 sub-blocks, out of 12 bytes. */
static void k_scale(const uint8_t *p, uint32_t j, block_codes *out)
{
    const uint8_t *s = p + 4;
    uint32_t sc = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    uint32_t mn = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
    set_scale(out, scale_at(p) * (float)sc, -(scale_at(p + 2) * (float)mn), 0);
}

/* 32 bytes of nibbles serve two sub-blocks: the even one low, the odd one high. */
static void k_nibbles(const uint8_t *p, uint32_t j, uint8_t *code)
{
    for (int i = 0; i < BLOCK; i++) code[i] = p[j / 2 * 32 + i] >> (j % 2 * 4) & 15;
}

static void decode_q6_k(const uint8_t *p, uint32_t j, block_codes *out)
{
    const uint8_t *low = p + j / 4 * 64 + j % 2 * 32, *high = p + 128 + j / 4 * 32;
    const int8_t *scales = (const int8_t *)p + 192 + j * 2;
    for (int i = 0; i < BLOCK; i++)
        out->code[i] = (low[i] >> (j % 4 / 2 * 4) & 15) | (high[i] >> (j % 4 * 2) & 3) << 4;
    out->d[0] = scale_at(p + 208) * (float)scales[0];
    out->d[1] = scale_at(p + 208) * (float)scales[1];
    out->m[0] = out->m[1] = 0;
    out->zero = 32;
}

/* Half of 2^(e - 127), since the table holds doubled values; exponents 0 and 1 give subnormals. */
static float half_of_e8m0(uint8_t e)
{
    return bits_to_f32(e < 2 ? 0x00200000U << e : (uint32_t)(e - 1) << 23);
}

// clang-format off
const uint8_t choir_code_tables[N_TABLES][16] = {
    [TABLE_SAME] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    /* -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113 */
    [TABLE_IQ4] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
    /* 0 0.5 1 1.5 2 3 4 6 and their negatives, doubled (OCP Microscaling Formats 2023) */
    [TABLE_FP4] = {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116},
};
// clang-format on

static void use_table(block_codes *out, uint32_t table)
{
    out->table = table;
    out->zero = 128;
}

/* 16 scales of 4 bits with 16 minima of 4 bits; 2-bit codes, four of them 32 apart in a byte. */
static void decode_q2_k(const uint8_t *p, uint32_t j, block_codes *out)
{
    for (int i = 0; i < BLOCK; i++) out->code[i] = p[16 + j / 4 * 32 + i] >> (j % 4 * 2) & 3;
    for (int h = 0; h < 2; h++) {
        uint8_t scale = p[2 * j + h];
        out->d[h] = scale_at(p + 80) * (float)(scale & 15);
        out->m[h] = -(scale_at(p + 82) * (float)(scale >> 4));
    }
    out->zero = 0;
}

/* 6-bit scales: the low 4 bits in 8 bytes, the high 2 in 4; codes of 2 bits, a mask that takes 4
 * off. */
static void decode_q3_k(const uint8_t *p, uint32_t j, block_codes *out)
{
    for (int i = 0; i < BLOCK; i++) {
        uint32_t low = p[32 + j / 4 * 32 + i] >> (j % 4 * 2) & 3, high = p[i] >> j & 1;
        out->code[i] = (uint8_t)(low | high << 2);
    }
    for (int h = 0; h < 2; h++) {
        uint32_t at = 2 * j + h, low = p[96 + at % 8] >> (at / 8 * 4) & 15;
        uint32_t high = p[104 + at % 4] >> (at / 4 * 2) & 3;
        out->d[h] = scale_at(p + 108) * (float)((int)(low | high << 4) - 32);
        out->m[h] = 0;
    }
    out->zero = 4;
}

static void decode_iq4_xs(const uint8_t *p, uint32_t j, block_codes *out)
{
    uint32_t low = p[4 + j / 2] >> (j % 2 * 4) & 15, high = load_u16(p + 2) >> (2 * j) & 3;
    split_nibbles(p + 8 + 16 * j, out->code);
    set_scale(out, scale_at(p) * (float)((int)(low | high << 4) - 32), 0, 0);
    use_table(out, TABLE_IQ4);
}

void choir_decode_block(choir_dtype dtype, const uint8_t *row, uint32_t block, block_codes *out)
{
    uint32_t per_block = types[dtype].elements / BLOCK, j = block % per_block;
    const uint8_t *p = row + (size_t)(block / per_block) * types[dtype].bytes;
    out->table = TABLE_NONE;
    switch (dtype) {
    case CHOIR_Q8_0:
        for (int i = 0; i < BLOCK; i++) out->code[i] = p[2 + i] ^ 128;
        set_scale(out, scale_at(p), 0, 128);
        break;
    case CHOIR_Q4_0:
        split_nibbles(p + 2, out->code);
        set_scale(out, scale_at(p), 0, 8);
        break;
    case CHOIR_Q4_1:
        split_nibbles(p + 4, out->code);
        set_scale(out, scale_at(p), scale_at(p + 2), 0);
        break;
    case CHOIR_Q5_0:
        split_nibbles(p + 6, out->code);
        add_fifth_bits(p + 2, out->code);
        set_scale(out, scale_at(p), 0, 16);
        break;
    case CHOIR_Q5_1:
        split_nibbles(p + 8, out->code);
        add_fifth_bits(p + 4, out->code);
        set_scale(out, scale_at(p), scale_at(p + 2), 0);
        break;
    case CHOIR_Q4_K:
        k_nibbles(p + 16, j, out->code);
        k_scale(p, j, out);
        break;
    case CHOIR_Q5_K:
        k_nibbles(p + 48, j, out->code);
        for (int i = 0; i < BLOCK; i++) out->code[i] |= (p[16 + i] >> j & 1) << 4;
        k_scale(p, j, out);
        break;
    case CHOIR_Q6_K:
        decode_q6_k(p, j, out);
        break;
    case CHOIR_Q2_K:
        decode_q2_k(p, j, out);
        break;
    case CHOIR_Q3_K:
        decode_q3_k(p, j, out);
        break;
    case CHOIR_IQ4_NL:
        split_nibbles(p + 2, out->code);
        set_scale(out, scale_at(p), 0, 0);
        use_table(out, TABLE_IQ4);
        break;
    case CHOIR_IQ4_XS:
        decode_iq4_xs(p, j, out);
        break;
    case CHOIR_MXFP4:
        split_nibbles(p + 1, out->code);
        set_scale(out, half_of_e8m0(p[0]), 0, 0);
        use_table(out, TABLE_FP4);
        break;
    case CHOIR_Q2:
        split_pairs(p + 4, out->code);
        set_scale(out, scale_at(p), scale_at(p + 2), 0);
        break;
    case CHOIR_Q3: {
        uint32_t third;
        memcpy(&third, p + 10, 4);
        split_pairs(p + 2, out->code);
        for (int i = 0; i < BLOCK; i++) out->code[i] |= (third >> i & 1) << 2;
        set_scale(out, scale_at(p), 0, 4);
        break;
    }
    default:
        CHOIR_ASSERT(!"a type without blocks");
    }
}

static void dequantize_block(choir_dtype dtype, const block_codes *b, float *out)
{
    bool has_minimum = dtype == CHOIR_Q4_1 || dtype == CHOIR_Q5_1 || dtype == CHOIR_Q4_K ||
                       dtype == CHOIR_Q5_K || dtype == CHOIR_Q2_K || dtype == CHOIR_Q2;
    const uint8_t *table = choir_code_tables[b->table];
    for (int i = 0; i < BLOCK; i++) {
        int code = b->table != TABLE_NONE ? table[b->code[i]] : b->code[i];
        out[i] = b->d[i / 16] * (float)(code - b->zero);
        if (has_minimum) out[i] += b->m[i / 16];
    }
}

void choir_dequantize(choir_dtype dtype, const uint8_t *row, uint32_t begin, uint32_t end,
                      float *out)
{
    switch (dtype) {
    case CHOIR_F32:
        memcpy(out, row + (size_t)begin * 4, (size_t)(end - begin) * 4);
        return;
    case CHOIR_F16:
        for (uint32_t i = begin; i < end; i++) *out++ = f16_to_f32(load_u16(row + (size_t)i * 2));
        return;
    case CHOIR_BF16:
        for (uint32_t i = begin; i < end; i++) *out++ = bf16_to_f32(load_u16(row + (size_t)i * 2));
        return;
    default:
        break;
    }
    block_codes codes;
    for (uint32_t b = begin / BLOCK; b < end / BLOCK; b++, out += BLOCK) {
        choir_decode_block(dtype, row, b, &codes);
        dequantize_block(dtype, &codes, out);
    }
}

/* As a file's numbers are read: halves many at once. */
static void read_numbers(choir_dtype dtype, const uint8_t *data, uint32_t begin, uint32_t end,
                         float *out)
{
    if (dtype == CHOIR_F16)
        choir_kernels_at(choir_cpu_best_level())
            ->f16_to_f32(data + (size_t)begin * 2, end - begin, out);
    else
        choir_dequantize(dtype, data, begin, end, out);
}

void choir_tensor_row(const choir_tensor *tensor, uint32_t row, float *out)
{
    const uint8_t *at =
        (const uint8_t *)tensor->data + row * choir_dtype_row_bytes(tensor->dtype, tensor->cols);
    read_numbers(tensor->dtype, at, 0, tensor->cols, out);
}

void choir_tensor_part(const choir_tensor *tensor, uint32_t begin, uint32_t end, float *out)
{
    read_numbers(tensor->dtype, tensor->data, begin, end, out);
}
