/* What tensors a configuration has, and of what shape: the columns of CHOIR_ROLE_LIST, worked out.
 */
#include "base/base.h"
#include "engine/model_file.h"

#include <string.h>

typedef enum where { MODEL, LAYER, DENSE, MOE, EXPERT, HEAD } where;
typedef enum when { ALWAYS, OPTIONAL, UNTIED, GQA, LATENT, DIRECT_Q, LORA_Q } when;
typedef enum dim {
    DIM_ONE,
    DIM_VOCAB,
    DIM_HIDDEN,
    DIM_ROTARY, /* frequencies */
    DIM_HEADS,
    DIM_QUERIES, /* all heads' */
    DIM_KEYS,
    DIM_ATTENDED, /* what the output projection takes */
    DIM_Q_NORM,   /* a head's, or all heads' */
    DIM_K_NORM,
    DIM_Q_LORA,
    DIM_KV_LORA,
    DIM_LATENT, /* the latent and the key's position */
    DIM_NOPE,
    DIM_VALUE,
    DIM_FFN,
    DIM_EXPERTS,
    DIM_EXPERT,
    DIM_SHARED,
} dim;

static const struct {
    const char *text;
    where where;
    dim rows, cols;
    when when;
} roles[CHOIR_N_ROLES] = {
#define X(role, where, rows, cols, when) {#role, where, DIM_##rows, DIM_##cols, when},
    CHOIR_ROLE_LIST(X)
#undef X
};

static uint64_t size_of(const choir_model_config *c, dim d)
{
    uint64_t head = c->head_dim;
    bool per_head = c->qk_norm == CHOIR_QK_NORM_HEAD;
    switch (d) {
    case DIM_ONE:
        return 1;
    case DIM_VOCAB:
        return c->vocab;
    case DIM_HIDDEN:
        return c->hidden;
    case DIM_ROTARY:
        return c->rope.rotary_dims / 2;
    case DIM_HEADS:
        return c->n_heads;
    case DIM_QUERIES:
        return c->n_heads * head;
    case DIM_KEYS:
        return c->n_kv_heads * head;
    case DIM_ATTENDED:
        return choir_attended(c);
    case DIM_Q_NORM:
        return per_head ? head : c->n_heads * head;
    case DIM_K_NORM:
        return per_head ? head : c->n_kv_heads * head;
    case DIM_Q_LORA:
        return c->q_lora_rank;
    case DIM_KV_LORA:
        return c->kv_lora_rank;
    case DIM_LATENT:
        return (uint64_t)c->kv_lora_rank + c->rope_dim;
    case DIM_NOPE:
        return c->nope_dim;
    case DIM_VALUE:
        return c->value_dim;
    case DIM_FFN:
        return c->ffn_hidden;
    case DIM_EXPERTS:
        return c->n_experts;
    case DIM_EXPERT:
        return c->expert_hidden;
    case DIM_SHARED:
        return c->shared_hidden;
    }
    return 0;
}

void choir_role_shape(const choir_model_config *c, choir_role role, uint64_t *rows, uint64_t *cols)
{
    *rows = size_of(c, roles[role].rows);
    *cols = size_of(c, roles[role].cols);
}

static bool has_role(const choir_model_config *c, choir_role role)
{
    switch (roles[role].when) {
    case ALWAYS:
        return true;
    case OPTIONAL:
        return (c->roles >> role & 1) != 0;
    case UNTIED:
        return !c->tied_head;
    case GQA:
        return !choir_is_latent(c);
    case LATENT:
        return choir_is_latent(c);
    case DIRECT_Q:
        return c->q_lora_rank == 0;
    case LORA_Q:
        return c->q_lora_rank > 0;
    }
    return false;
}

bool choir_role_in_layer(const choir_model_config *c, choir_role role, uint32_t layer)
{
    if (!has_role(c, role)) return false;
    bool moe = (c->layers[layer] & CHOIR_LAYER_MOE) != 0;
    switch (roles[role].where) {
    case DENSE:
        return !moe;
    case MOE:
    case EXPERT:
        return moe;
    default:
        return true;
    }
}

bool choir_role_per_layer(choir_role role)
{
    return roles[role].where != MODEL;
}
bool choir_role_is_vector(choir_role role)
{
    return roles[role].rows == DIM_ONE;
}
bool choir_role_optional(choir_role role)
{
    return roles[role].when == OPTIONAL;
}
const char *choir_role_text(choir_role role)
{
    return roles[role].text;
}

const choir_role choir_expert_roles[3] = {CHOIR_ROLE_EXPERT_GATE, CHOIR_ROLE_EXPERT_UP,
                                          CHOIR_ROLE_EXPERT_DOWN};

bool choir_role_is_routed(choir_role role)
{
    return roles[role].where == EXPERT && !choir_role_is_vector(role);
}

bool choir_role_is_f32(choir_role role)
{
    return choir_role_is_vector(role) || role == CHOIR_ROLE_ROUTER;
}

bool choir_next_tensor(const choir_model_config *c, choir_role_place *at)
{
    if (at->begun) at->index++;
    at->begun = true;
    for (; at->role < CHOIR_N_ROLES; at->role++, at->layer = 0) {
        uint32_t n_layers = choir_role_per_layer(at->role) ? c->n_layers : 1;
        for (; at->layer < n_layers; at->layer++, at->index = 0)
            if (choir_role_in_layer(c, at->role, at->layer) &&
                at->index < choir_role_count(c, at->role))
                return true;
    }
    return false;
}

uint32_t choir_role_count(const choir_model_config *c, choir_role role)
{
    switch (roles[role].where) {
    case EXPERT:
        return c->n_experts;
    case HEAD:
        return c->n_heads;
    default:
        return 1;
    }
}

size_t choir_slice_bytes(const choir_slice *s)
{
    return (size_t)s->rows * choir_dtype_row_bytes(s->dtype, s->cols);
}

size_t choir_slice_span(const choir_slice *s)
{
    if (s->scales != NULL) return (s->rows - 1) * s->row_stride + s->cols / 32 * 16;
    if (s->source != s->dtype) return s->cols * s->col_stride; /* its rows are the columns here */
    size_t row = s->col_stride == 0
                     ? choir_dtype_row_bytes(s->dtype, s->cols)
                     : (s->cols - 1) * s->col_stride + choir_dtype_block_bytes(s->dtype);
    return (s->rows - 1) * s->row_stride + row;
}

void choir_slice_forget(const choir_slice *s)
{
    choir_forget_pages((void *)s->data, choir_slice_span(s));
}

bool choir_slice_is_tensor(const choir_slice *s, choir_tensor *out)
{
    size_t row = choir_dtype_row_bytes(s->dtype, s->cols);
    *out = (choir_tensor){s->dtype, s->rows, s->cols, s->data, (size_t)s->rows * row};
    bool dense = s->col_stride == 0 && (s->row_stride == row || s->rows == 1);
    return dense && s->scales == NULL && s->source == s->dtype;
}

/* Two tensors of MXFP4: 16 bytes of pairs (2i, 2i + 1), and an exponent. A GGUF block has the
 * exponent first, then element i low and element 16 + i high. */
static void join_mxfp4(const uint8_t *pairs, uint8_t exponent, uint8_t *block)
{
    uint8_t codes[32];
    for (int i = 0; i < 16; i++) {
        codes[2 * i] = pairs[i] & 15;
        codes[2 * i + 1] = pairs[i] >> 4;
    }
    block[0] = exponent;
    for (int i = 0; i < 16; i++) block[1 + i] = (uint8_t)(codes[i] | codes[16 + i] << 4);
}

/* Quantised rows of the source are the columns here. */
static void transpose_quantised(const choir_slice *s, float *out)
{
    for (uint32_t c = 0; c < s->cols; c++) {
        const choir_tensor row = {s->source, 1, s->rows, s->data + c * s->col_stride,
                                  s->col_stride};
        for (uint32_t first = 0; first < s->rows; first += 256) {
            float values[256];
            uint32_t n = s->rows - first < 256 ? s->rows - first : 256;
            choir_tensor_part(&row, first, first + n, values);
            for (uint32_t r = 0; r < n; r++) out[(size_t)(first + r) * s->cols + c] = values[r];
        }
    }
}

void choir_slice_copy(const choir_slice *s, void *out)
{
    uint8_t *to = out;
    size_t row_bytes = choir_dtype_row_bytes(s->dtype, s->cols);
    if (s->source != s->dtype) {
        transpose_quantised(s, out);
        return;
    }
    for (size_t r = 0; r < s->rows; r++, to += row_bytes) {
        const uint8_t *row = s->data + r * s->row_stride;
        if (s->scales != NULL) {
            size_t bytes = choir_dtype_block_bytes(s->dtype);
            for (size_t b = 0; b < row_bytes / bytes; b++)
                join_mxfp4(row + 16 * b, s->scales[r * s->scales_stride + b], to + b * bytes);
        } else if (s->col_stride == 0) {
            memcpy(to, row, row_bytes);
        } else {
            size_t size = choir_dtype_block_bytes(s->dtype);
            for (size_t c = 0; c < s->cols; c++)
                memcpy(to + c * size, row + c * s->col_stride, size);
        }
    }
}

bool choir_slice_tensor(const choir_slice *s, choir_memory_tag tag, choir_tensor *out, void **copy)
{
    *copy = NULL;
    if (choir_slice_is_tensor(s, out)) return true;
    *copy = choir_alloc(tag, choir_slice_bytes(s));
    if (*copy == NULL) return false;
    choir_slice_copy(s, *copy);
    out->data = *copy;
    return true;
}
