/* WHAT    What the CPU levels share: the constants that make their bits equal, and the tables.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  Inside engine/kernels only.
 * NEXT    reference.c says what each entry means; the levels do the same sums in the same order.
 *
 * Orders that every level keeps. Sums over a row have 16 partial sums, element i in sum i % 16,
 * folded 8 + 8, 4 + 4, 2 + 2, 1 + 1. Products with f32 activations are fused, ascending over k, in
 * partial sums of FLOAT_CHUNK. Quantised products are exact within a block of 32 (or half of one),
 * then fused into the output, ascending over blocks. Attention is cut at keys 64 c, wherever the
 * sequence starts. */
#pragma once
#include "engine/kernels/layout.h"

enum {
    LANES = 16,
    KEY_CHUNK = 64, /* keys between two updates of a running softmax */
    HEAD_GROUP = CHOIR_ATTENTION_HEADS,
};

/* 2^f on [-0.5, 0.5] as 1 + f (c0 + c1 f + …), relative error 2e-9 before rounding; fitted for this
 * project. */
#define EXP2_C0    0x1.62e430p-1F
#define EXP2_C1    0x1.ebfbdcp-3F
#define EXP2_C2    0x1.c6aee8p-5F
#define EXP2_C3    0x1.3b2d4cp-7F
#define EXP2_C4    0x1.5f3e54p-10F
#define EXP2_C5    0x1.41fbbcp-13F
#define LOG2E_HIGH 0x1.715476p+0F
#define LOG2E_LOW  0x1.4ae0c0p-26F
/* Exponents are kept where 2^n is a normal number; what is below counts as 2^-125. */
#define EXP2_MIN (-125.0F)
#define EXP2_MAX 127.0F
#define EXP_MIN  (-86.0F) /* the same for powers of e */
#define EXP_MAX  88.0F
/* A block whose largest |x| is below this is taken as zeros, so that CODE_MAX / max stays finite.
 */
#define QUANT_MIN 0x1p-100F
/* gelu(x) = x sigmoid(x (GELU_A + GELU_B x^2)): 2 sqrt(2 / pi), and that times 0.044715 */
#define GELU_A 0x1.988454p+0F
#define GELU_B 0x1.2444f2p-4F

void choir_reference_attention(const choir_attention_block *block);
float choir_reference_exp2(float x);
float choir_reference_tanh(float x);

/* Where the block's kv head has a token's key and value in a page, in elements. */
static inline size_t choir_key_offset(const choir_attention_block *b, uint32_t token)
{
    return ((size_t)b->kv_head * b->page_tokens + token) * b->key_dim;
}

static inline size_t choir_value_offset(const choir_attention_block *b, uint32_t token)
{
    if (b->latent) return choir_key_offset(b, token);
    size_t keys = (size_t)b->n_kv_heads * b->page_tokens * b->key_dim;
    return keys + ((size_t)b->kv_head * b->page_tokens + token) * b->value_dim;
}

extern const choir_kernels choir_kernels_reference;
#ifdef __x86_64__
extern const choir_kernels choir_kernels_avx2;
extern const choir_kernels choir_kernels_avx512;
#endif
