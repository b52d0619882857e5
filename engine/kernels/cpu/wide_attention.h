/* WHAT    Grouped-query attention on 16 lanes: a chunk of 64 keys is converted once for all
 *         queries of the block and all query heads of its kv head, then tiles of 4 rows run over
 *         it.
 * OWNS    Nothing; works in the block's scratch.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  A row (query, head) meets exactly its own keys, in ascending order and cut at multiples
 *         of 64, whatever rows are beside it. Slots outside [0, position + n_queries) are never
 *         read. Included once by each level's source, after wide_rows.h.
 * NEXT    reference_attention.c says the same in plain C. */
#pragma once
#include "engine/kernels/cpu/wide_rows.h"

enum { ROW_TILE = 4 };

typedef struct attention_work {
    const choir_attention_block *b;
    uint32_t first_head, n_heads; /* query heads worked on together */
    uint32_t key_dims, dims;      /* of keys and values, padded to 16 */
    uint32_t chunk;               /* first key of the current chunk */
    float *keys;                  /* [key_dims][64], transposed */
    float *values;                /* [64][dims] */
    float *scores;                /* [ROW_TILE][64], then probabilities */
    float *out;                   /* [rows][dims], unnormalised */
    float *max, *sum;             /* [rows] */
} attention_work;

/* A row's keys within the current chunk, relative to its start; begin >= end: none. */
typedef struct key_range {
    int32_t begin, end;
} key_range;

static key_range keys_of(const attention_work *w, uint32_t query)
{
    int64_t end = (int64_t)w->b->position + query + 1;
    int64_t begin = choir_first_key((uint32_t)end - 1, w->b->window, w->b->chunk);
    begin -= w->chunk;
    end -= w->chunk;
    return (key_range){(int32_t)(begin < 0           ? 0
                                 : begin < KEY_CHUNK ? begin
                                                     : KEY_CHUNK),
                       (int32_t)(end < 0           ? 0
                                 : end < KEY_CHUNK ? end
                                                   : KEY_CHUNK)};
}

static const uint16_t *page_of(const choir_attention_block *b, uint32_t key)
{
    return (const uint16_t *)(b->kv + b->pages[key / b->page_tokens] * b->page_stride);
}

static const uint16_t *key_at(const choir_attention_block *b, uint32_t key)
{
    return page_of(b, key) + choir_key_offset(b, key % b->page_tokens);
}

static const uint16_t *value_at(const choir_attention_block *b, uint32_t key)
{
    return page_of(b, key) + choir_value_offset(b, key % b->page_tokens);
}

/* Transposes 8 keys x 16 dims of f16 and stores them as f32, 8 keys side by side, 64 a dim. */
INLINE void store_transposed(const uint16_t *const *rows, uint32_t d, float *out)
{
    __m256i x[8], y[8];
    for (int i = 0; i < 8; i++) x[i] = _mm256_loadu_si256((const __m256i *)(rows[i] + d));
    for (int i = 0; i < 4; i++) {
        y[2 * i] = _mm256_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm256_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_unpacklo_epi32(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm256_unpackhi_epi32(y[i + j], y[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        y[2 * j] = _mm256_unpacklo_epi64(x[j], x[j + 4]);
        y[2 * j + 1] = _mm256_unpackhi_epi64(x[j], x[j + 4]);
    }
    for (int i = 0; i < 8; i++) {
        _mm256_storeu_ps(out + i * KEY_CHUNK, _mm256_cvtph_ps(_mm256_castsi256_si128(y[i])));
        _mm256_storeu_ps(out + (i + 8) * KEY_CHUNK,
                         _mm256_cvtph_ps(_mm256_extracti128_si256(y[i], 1)));
    }
}

/* Keys [begin, end) of the chunk, and zeros up to multiples of 16 around them. */
static void load_keys(const attention_work *w, int32_t begin, int32_t end)
{
    static const uint16_t zeros[LANES];
    uint16_t tails[8][LANES];
    uint32_t hd = w->b->key_dim;
    for (int32_t first = begin / LANES * LANES; first < end || first % LANES != 0; first += 8) {
        const uint16_t *rows[8], *tail_rows[8];
        for (int32_t i = 0; i < 8; i++) {
            bool valid = first + i >= begin && first + i < end;
            rows[i] = valid ? key_at(w->b, w->chunk + (uint32_t)(first + i)) : NULL;
        }
        for (uint32_t d = 0; d < hd; d += LANES) {
            uint32_t n = hd - d < LANES ? hd - d : LANES;
            for (int i = 0; i < 8; i++) {
                tail_rows[i] = rows[i] == NULL ? zeros : rows[i] + d;
                if (n == LANES || rows[i] == NULL) continue;
                memset(tails[i], 0, sizeof tails[i]);
                memcpy(tails[i], rows[i] + d, n * sizeof *tails[i]);
                tail_rows[i] = tails[i];
            }
            store_transposed(tail_rows, 0, w->keys + (size_t)d * KEY_CHUNK + first);
        }
    }
}

static void load_values(const attention_work *w, int32_t begin, int32_t end)
{
    uint32_t hd = w->b->value_dim;
    for (int32_t i = begin; i < end; i++) {
        const uint16_t *from = value_at(w->b, w->chunk + (uint32_t)i);
        float *to = w->values + (size_t)i * w->dims;
        uint32_t d = 0;
        for (; d + LANES <= hd; d += LANES) w_store(to + d, w_load_f16(from + d));
        if (d == hd) continue;
        uint16_t tail[LANES] = {0};
        memcpy(tail, from + d, (hd - d) * sizeof *tail);
        w_store(to + d, w_load_f16(tail));
    }
}

/* scores[i][key] = q_i . key, for keys [begin, end) and up to the next multiples of 16 */
INLINE void score_rows(const attention_work *w, const float *const *q, int n, int32_t begin,
                       int32_t end)
{
    for (int32_t key = begin / LANES * LANES; key < end; key += LANES) {
        wide sum[ROW_TILE];
        for (int i = 0; i < n; i++) sum[i] = w_zero();
        for (uint32_t d = 0; d < w->b->key_dim; d++) {
            wide k = w_load(w->keys + (size_t)d * KEY_CHUNK + key);
            for (int i = 0; i < n; i++) sum[i] = w_fma(w_set(q[i][d]), k, sum[i]);
        }
        for (int i = 0; i < n; i++) w_store(w->scores + i * KEY_CHUNK + key, sum[i]);
    }
}

/* out[row] += probabilities . values over keys [begin, end), for n rows that follow each other */
INLINE void add_values(const attention_work *w, const float *p, float *out, int n, int32_t begin,
                       int32_t end)
{
    for (uint32_t d = 0; d < w->dims; d += LANES) {
        wide sum[ROW_TILE];
        for (int i = 0; i < n; i++) sum[i] = w_load(out + i * w->dims + d);
        for (int32_t key = begin; key < end; key++) {
            wide v = w_load(w->values + (size_t)key * w->dims + d);
            for (int i = 0; i < n; i++) sum[i] = w_fma(w_set(p[i * KEY_CHUNK + key]), v, sum[i]);
        }
        for (int i = 0; i < n; i++) w_store(out + i * w->dims + d, sum[i]);
    }
}

/* Turns a row's scores into probabilities under the new running maximum, and rescales its sums. */
static void soften_row(const attention_work *w, float *p, uint32_t row, key_range r)
{
    float softcap = w->b->softcap, units = softcap != 0 ? 1 / softcap : LOG2E_HIGH;
    wide scale = w_set(w->b->scale * units), low = w_set(-__builtin_inff()), max = low;
    wide cap = w_set(softcap * LOG2E_HIGH);
    int32_t first = r.begin / LANES * LANES;
    for (int32_t key = first; key < r.end; key += LANES) {
        wide t = w_mul(w_load(p + key), scale);
        if (softcap != 0) t = w_mul(cap, tanh_wide(t));
        if (key < r.begin || key + LANES > r.end) t = w_keep(t, r.begin - key, r.end - key, low);
        w_store(p + key, t);
        max = w_max(t, max);
    }
    float new_max = w_fold_max(max), old_max = w->max[row];
    if (!(new_max > old_max)) new_max = old_max;
    wide m = w_set(new_max), sum = w_zero();
    for (int32_t key = first; key < r.end; key += LANES) {
        wide e = exp2_wide(w_sub(w_load(p + key), m));
        if (key < r.begin || key + LANES > r.end)
            e = w_keep(e, r.begin - key, r.end - key, w_zero());
        w_store(p + key, e);
        sum = w_add(sum, e);
    }
    float total = w_fold(sum);
    if (new_max != old_max) {
        float correction[LANES];
        w_store(correction, exp2_wide(w_set(old_max - new_max)));
        float *out = w->out + (size_t)row * w->dims;
        for (uint32_t d = 0; d < w->dims; d += LANES)
            w_store(out + d, w_mul(w_load(out + d), w_set(correction[0])));
        total = __builtin_fmaf(w->sum[row], correction[0], total);
    } else {
        total += w->sum[row];
    }
    w->max[row] = new_max;
    w->sum[row] = total;
}

/* Rows that see the same keys go together; the others' ends go alone. */
INLINE void add_values_of_rows(const attention_work *w, uint32_t row, int n, const key_range *r)
{
    float *out = w->out + (size_t)row * w->dims;
    int32_t begin = 0, end = KEY_CHUNK;
    for (int i = 0; i < n; i++) {
        if (r[i].begin > begin) begin = r[i].begin;
        if (r[i].end < end) end = r[i].end;
    }
    if (end < begin) end = begin;
    for (int i = 0; i < n; i++)
        if (r[i].begin < begin)
            add_values(w, w->scores + i * KEY_CHUNK, out + i * w->dims, 1, r[i].begin,
                       begin < r[i].end ? begin : r[i].end);
    if (begin < end) add_values(w, w->scores, out, n, begin, end);
    for (int i = 0; i < n; i++) {
        int32_t from = end > r[i].begin ? end : r[i].begin;
        if (from < r[i].end)
            add_values(w, w->scores + i * KEY_CHUNK, out + i * w->dims, 1, from, r[i].end);
    }
}

INLINE void run_rows(const attention_work *w, uint32_t row, int n)
{
    const float *q[ROW_TILE];
    key_range r[ROW_TILE];
    int32_t begin = KEY_CHUNK, end = 0;
    for (int i = 0; i < n; i++) {
        uint32_t query = (row + (uint32_t)i) / w->n_heads, head = (row + (uint32_t)i) % w->n_heads;
        q[i] = w->b->q + ((size_t)query * w->b->n_heads + w->first_head + head) * w->b->key_dim;
        r[i] = keys_of(w, query);
        if (r[i].begin < begin) begin = r[i].begin;
        if (r[i].end > end) end = r[i].end;
    }
    if (begin >= end) return;
    score_rows(w, q, n, begin, end);
    for (int i = 0; i < n; i++)
        if (r[i].begin < r[i].end)
            soften_row(w, w->scores + i * KEY_CHUNK, row + (uint32_t)i, r[i]);
    add_values_of_rows(w, row, n, r);
}

static void run_chunk(const attention_work *w, uint32_t n_rows)
{
    int32_t begin = keys_of(w, 0).begin, end = keys_of(w, w->b->n_queries - 1).end;
    load_keys(w, begin, end);
    load_values(w, begin, end);
    for (uint32_t row = 0; row < n_rows; row += ROW_TILE) switch (n_rows - row) {
        case 1:
            run_rows(w, row, 1);
            break;
        case 2:
            run_rows(w, row, 2);
            break;
        case 3:
            run_rows(w, row, 3);
            break;
        default:
            run_rows(w, row, ROW_TILE);
            break;
        }
}

static void store_outputs(const attention_work *w, uint32_t n_rows)
{
    uint32_t hd = w->b->value_dim;
    for (uint32_t row = 0; row < n_rows; row++) {
        size_t head = (size_t)(row / w->n_heads) * w->b->n_heads + w->first_head + row % w->n_heads;
        const float *from = w->out + (size_t)row * w->dims;
        float *to = w->b->out + head * hd;
        wide inverse = w_set(1.0F / w->sum[row]);
        for (uint32_t d = 0; d < hd; d += LANES) {
            wide x = w_mul(w_load(from + d), inverse);
            if (hd - d < LANES)
                w_store_first(to + d, x, hd - d);
            else
                w_store(to + d, x);
        }
    }
}

static void attend_heads(attention_work *w)
{
    const choir_attention_block *b = w->b;
    uint32_t n_rows = b->n_queries * w->n_heads, end = b->position + b->n_queries;
    uint32_t begin = choir_first_key(b->position, b->window, b->chunk);
    memset(w->out, 0, (size_t)n_rows * w->dims * sizeof *w->out);
    for (uint32_t row = 0; row < n_rows; row++) {
        w->max[row] = -__builtin_inff();
        w->sum[row] = 0;
        if (b->sinks == NULL) continue;
        w->max[row] = b->sinks[w->first_head + row % w->n_heads] * LOG2E_HIGH;
        w->sum[row] = 1;
    }
    for (w->chunk = begin - begin % KEY_CHUNK; w->chunk < end; w->chunk += KEY_CHUNK)
        run_chunk(w, n_rows);
    store_outputs(w, n_rows);
}

static void attention(const choir_attention_block *block)
{
    uint32_t group = block->n_block_heads;
    uint32_t heads = block->n_heads < HEAD_GROUP ? block->n_heads : HEAD_GROUP;
    attention_work w = {.b = block,
                        .key_dims = (block->key_dim + LANES - 1) / LANES * LANES,
                        .dims = (block->value_dim + LANES - 1) / LANES * LANES};
    w.keys = block->scratch;
    w.values = w.keys + (size_t)w.key_dims * KEY_CHUNK;
    w.scores = w.values + (size_t)w.dims * KEY_CHUNK;
    w.out = w.scores + LANES * KEY_CHUNK;
    w.max = w.out + (size_t)heads * CHOIR_ATTENTION_QUERIES * w.dims;
    w.sum = w.max + heads * CHOIR_ATTENTION_QUERIES;
    CHOIR_ASSERT(block->n_queries >= 1 && block->n_queries <= CHOIR_ATTENTION_QUERIES);
    for (uint32_t g = 0; g < group; g += HEAD_GROUP) {
        w.first_head = block->first_head + g;
        w.n_heads = group - g < HEAD_GROUP ? group - g : HEAD_GROUP;
        attend_heads(&w);
    }
}
