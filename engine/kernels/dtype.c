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

bool choir_dtype_from_gguf(uint32_t id, choir_dtype *out)
{
    for (uint32_t i = 0; i < CHOIR_N_DTYPES; i++)
        if (types[i].id == id) {
            *out = (choir_dtype)i;
            return true;
        }
    return false;
}

uint32_t choir_dtype_gguf(choir_dtype dtype)
{
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

static void set_scale(block_codes *out, float d, float m, int zero)
{
    out->d[0] = out->d[1] = d;
    out->m = m;
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
    out->m = 0;
    out->zero = 32;
}

/* Half of 2^(e - 127), since the table holds doubled values; exponents 0 and 1 give subnormals. */
static float half_of_e8m0(uint8_t e)
{
    return bits_to_f32(e < 2 ? 0x00200000U << e : (uint32_t)(e - 1) << 23);
}

/* FP4's values, doubled: 0 0.5 1 1.5 2 3 4 6 and their negatives (OCP Microscaling Formats 2023). */
static void decode_mxfp4(const uint8_t *p, block_codes *out)
{
    static const int8_t values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    split_nibbles(p + 1, out->code);
    for (int i = 0; i < BLOCK; i++) out->code[i] = (uint8_t)(128 + values[out->code[i]]);
    set_scale(out, half_of_e8m0(p[0]), 0, 128);
}

void choir_decode_block(choir_dtype dtype, const uint8_t *row, uint32_t block, block_codes *out)
{
    uint32_t per_block = types[dtype].elements / BLOCK, j = block % per_block;
    const uint8_t *p = row + (size_t)(block / per_block) * types[dtype].bytes;
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
    case CHOIR_MXFP4:
        decode_mxfp4(p, out);
        break;
    default:
        CHOIR_ASSERT(!"a type without blocks");
    }
}

static void dequantize_block(choir_dtype dtype, const block_codes *b, float *out)
{
    bool has_minimum =
        dtype == CHOIR_Q4_1 || dtype == CHOIR_Q5_1 || dtype == CHOIR_Q4_K || dtype == CHOIR_Q5_K;
    for (int i = 0; i < BLOCK; i++) {
        out[i] = b->d[i / 16] * (float)(b->code[i] - b->zero);
        if (has_minimum) out[i] += b->m;
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

void choir_tensor_row(const choir_tensor *tensor, uint32_t row, float *out)
{
    const uint8_t *at =
        (const uint8_t *)tensor->data + row * choir_dtype_row_bytes(tensor->dtype, tensor->cols);
    choir_dequantize(tensor->dtype, at, 0, tensor->cols, out);
}

void choir_tensor_part(const choir_tensor *tensor, uint32_t begin, uint32_t end, float *out)
{
    choir_dequantize(tensor->dtype, tensor->data, begin, end, out);
}
