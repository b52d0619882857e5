/* Grouped-query attention with a running softmax (Milakov, Gimelshein 2018; Dao et al. 2022), one
 * query head after the other. All scores are in units of log2, so that a probability is one exp2.
 */
#include "engine/kernels/cpu/levels.h"

#include <math.h>

typedef struct running {
    float max, sum;
    float *out; /* [value_dim], unnormalised */
} running;

static const uint8_t *key_at(const choir_attention_block *b, uint32_t key)
{
    return b->kv + b->pages[key / b->page_tokens] * b->page_stride +
           choir_key_offset(b, key % b->page_tokens) * 2;
}

static const uint8_t *value_at(const choir_attention_block *b, uint32_t key)
{
    return b->kv + b->pages[key / b->page_tokens] * b->page_stride +
           choir_value_offset(b, key % b->page_tokens) * 2;
}

static float score(const choir_attention_block *b, const float *q, uint32_t key)
{
    const uint8_t *k = key_at(b, key);
    float sum = 0;
    for (uint32_t d = 0; d < b->key_dim; d++)
        sum = fmaf(q[d], f16_to_f32(load_u16(k + d * 2)), sum);
    if (b->softcap == 0) return sum * (b->scale * LOG2E_HIGH);
    return b->softcap * LOG2E_HIGH * choir_reference_tanh(sum * (b->scale * (1 / b->softcap)));
}

/* Keys [begin, end), all in the chunk that starts at `chunk`. */
static void add_chunk(const choir_attention_block *b, const float *q, uint32_t chunk,
                      uint32_t begin, uint32_t end, running *r)
{
    float p[KEY_CHUNK], sum[LANES] = {0}, max = r->max;
    for (uint32_t key = begin; key < end; key++) {
        p[key - chunk] = score(b, q, key);
        if (p[key - chunk] > max) max = p[key - chunk];
    }
    float correction = choir_reference_exp2(r->max - max);
    for (uint32_t d = 0; d < b->value_dim; d++) r->out[d] *= correction;
    for (uint32_t i = begin - chunk; i < end - chunk; i++) {
        p[i] = choir_reference_exp2(p[i] - max);
        sum[i % LANES] += p[i];
        const uint8_t *v = value_at(b, chunk + i);
        for (uint32_t d = 0; d < b->value_dim; d++)
            r->out[d] = fmaf(p[i], f16_to_f32(load_u16(v + d * 2)), r->out[d]);
    }
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) sum[i] += sum[i + n];
    r->sum = fmaf(r->sum, correction, sum[0]);
    r->max = max;
}

static void attend(const choir_attention_block *b, uint32_t query, uint32_t head)
{
    size_t at = (size_t)query * b->n_heads + head;
    uint32_t end = b->position + query + 1;
    uint32_t begin = choir_first_key(end - 1, b->window, b->chunk);
    running r = {.max = -INFINITY, .out = b->out + at * b->value_dim};
    if (b->sinks != NULL) {
        r.max = b->sinks[head] * LOG2E_HIGH;
        r.sum = 1;
    }
    for (uint32_t d = 0; d < b->value_dim; d++) r.out[d] = 0;
    for (uint32_t chunk = begin - begin % KEY_CHUNK; chunk < end; chunk += KEY_CHUNK)
        add_chunk(b, b->q + at * b->key_dim, chunk, begin > chunk ? begin : chunk,
                  end < chunk + KEY_CHUNK ? end : chunk + KEY_CHUNK, &r);
    float inverse = 1.0F / r.sum;
    for (uint32_t d = 0; d < b->value_dim; d++) r.out[d] *= inverse;
}

void choir_reference_attention(const choir_attention_block *block)
{
    for (uint32_t i = 0; i < block->n_queries; i++)
        for (uint32_t h = 0; h < block->n_block_heads; h++) attend(block, i, block->first_head + h);
}
