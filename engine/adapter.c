/* From what an adapter's file says to what a step computes: settings are folded into factors,
 * scales and shifts once, here. */
#include "engine/state.h"

#include <math.h>
#include <string.h>

static const char *const type_texts[] = {
#define X(name, text) text,
    CHOIR_ADAPTER_TYPE_LIST(X)
#undef X
};

const char *choir_adapter_type_text(choir_adapter_type type)
{
    return type_texts[type];
}

bool choir_adapter_type_parse(const char *text, choir_adapter_type *out)
{
    for (int i = 0; i < CHOIR_N_ADAPTER_TYPES; i++)
        if (strcmp(text, type_texts[i]) == 0) {
            *out = (choir_adapter_type)i;
            return true;
        }
    return false;
}

choir_adapter_type choir_adapter_type_of(const choir_engine *e, choir_adapter_type type)
{
    if (type != CHOIR_ADAPTER_AUTO) return type;
    return e->options.exact ? CHOIR_ADAPTER_F32 : CHOIR_ADAPTER_F16;
}

typedef struct maker {
    const choir_engine *engine;
    choir_factor_type type;
    choir_adapter *adapter;
    uint8_t *base; /* NULL: only sizes are added up */
    size_t at;
} maker;

static void *carve(maker *m, size_t n, size_t bytes)
{
    void *p = m->base == NULL ? NULL : m->base + m->at;
    m->at += (n * bytes + 63) & ~(size_t)63;
    return p;
}

static float *carve_floats(maker *m, const float *from, size_t n)
{
    float *to = carve(m, n, sizeof *to);
    if (to != NULL && from != NULL) memcpy(to, from, n * sizeof *to);
    return to;
}

/* -- what can be applied -- */

#define BIT(role) ((uint64_t)1 << CHOIR_ROLE_##role)
static const uint64_t norm_roles = BIT(ATTN_NORM) | BIT(FFN_NORM) | BIT(OUTPUT_NORM);
static const uint64_t attention_roles = BIT(ATTN_Q) | BIT(ATTN_Q_A) | BIT(ATTN_Q_B) | BIT(ATTN_K) |
                                        BIT(ATTN_V) | BIT(ATTN_KV_A) | BIT(ATTN_OUT);
static const uint64_t dense_roles = BIT(FFN_GATE) | BIT(FFN_UP) | BIT(FFN_DOWN);
static const uint64_t expert_roles = BIT(EXPERT_GATE) | BIT(EXPERT_UP) | BIT(EXPERT_DOWN);
static const uint64_t other_roles = BIT(EMBEDDING) | BIT(HEAD) | BIT(ROUTER) | BIT(SHARED_GATE) |
                                    BIT(SHARED_UP) | BIT(SHARED_DOWN) | BIT(SHARED_ROUTER);
static const uint64_t head_roles = BIT(ATTN_K_B) | BIT(ATTN_V_B);
static const uint64_t scaled_inputs =
    BIT(ATTN_OUT) | BIT(FFN_DOWN) | BIT(EXPERT_DOWN) | BIT(SHARED_DOWN);

static bool has(uint64_t roles, choir_role role)
{
    return (roles >> role & 1) != 0;
}

static choir_status refuse(const choir_adapter_change *c, const char *what)
{
    return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s of %s (layer %u, %u) cannot be applied", what,
                      choir_role_text(c->role), c->layer, c->index);
}

static bool brings(const choir_adapter_change *c, uint32_t arrays)
{
    return (c->has & arrays) != 0;
}

/* A copy of the base's own matrix changes nothing. */
static bool replaces(const choir_adapter_change *c)
{
    return brings(c, CHOIR_ADAPTER_HAS_WEIGHT) && !brings(c, CHOIR_ADAPTER_HAS_COPY);
}

static choir_status check_change(const choir_engine *e, const choir_adapter_change *c)
{
    uint64_t matrices = attention_roles | dense_roles | expert_roles | other_roles | head_roles;
    if (!has(matrices | norm_roles, c->role)) return refuse(c, "an adapter");
    if (has(norm_roles, c->role) && c->has != CHOIR_ADAPTER_HAS_WEIGHT)
        return refuse(c, "anything but new weights");
    if (brings(c, CHOIR_ADAPTER_HAS_IN_SCALE) && !has(scaled_inputs, c->role))
        return refuse(c, "a scale of the inputs");
    if (c->series && !has(attention_roles | dense_roles, c->role))
        return refuse(c, "a serial bottleneck");
    if (c->residual &&
        (!has(BIT(ATTN_OUT) | BIT(FFN_DOWN), c->role) || e->config.residual_scale != 1 ||
         choir_role_in_layer(&e->config, CHOIR_ROLE_ATTN_POST_NORM, c->layer) ||
         choir_role_in_layer(&e->config, CHOIR_ROLE_FFN_POST_NORM, c->layer)))
        return refuse(c, "a bottleneck of the residual stream");
    static const uint32_t of_embedding =
        CHOIR_ADAPTER_HAS_LOW_RANK | CHOIR_ADAPTER_HAS_WEIGHT | CHOIR_ADAPTER_HAS_COPY;
    if (has(head_roles, c->role) && c->has != CHOIR_ADAPTER_HAS_LOW_RANK)
        return refuse(c, "anything but LoRA");
    if (c->role == CHOIR_ROLE_EMBEDDING &&
        ((c->has & ~of_embedding) != 0 || c->act != CHOIR_ADAPTER_LINEAR))
        return refuse(c, "anything but LoRA or new weights");
    if (brings(c, CHOIR_ADAPTER_HAS_MAGNITUDE) && has(expert_roles, c->role) &&
        choir_experts_streamed(e->experts))
        return refuse(c, "DoRA, whose norms need all weights in memory,");
    return CHOIR_OK;
}

/* -- the base's own -- */

static const choir_matrix *base_matrix(const choir_engine *e, choir_role role, uint32_t layer_index,
                                       uint32_t index)
{
    const layer *l = &e->layers[layer_index];
    switch (role) {
    case CHOIR_ROLE_HEAD:
        return &e->head;
    case CHOIR_ROLE_ATTN_Q:
    case CHOIR_ROLE_ATTN_Q_B:
        return &l->q;
    case CHOIR_ROLE_ATTN_Q_A:
        return &l->q_a;
    case CHOIR_ROLE_ATTN_K:
        return &l->k;
    case CHOIR_ROLE_ATTN_V:
        return &l->v;
    case CHOIR_ROLE_ATTN_KV_A:
        return &l->kv_a;
    case CHOIR_ROLE_ATTN_OUT:
        return &l->out;
    case CHOIR_ROLE_ROUTER:
        return &l->router;
    case CHOIR_ROLE_FFN_GATE:
    case CHOIR_ROLE_SHARED_GATE:
        return &l->always.gate;
    case CHOIR_ROLE_FFN_UP:
    case CHOIR_ROLE_SHARED_UP:
        return &l->always.up;
    case CHOIR_ROLE_FFN_DOWN:
    case CHOIR_ROLE_SHARED_DOWN:
        return &l->always.down;
    case CHOIR_ROLE_EXPERT_GATE:
        return &choir_experts_describe(e->experts, layer_index, index)->gate;
    case CHOIR_ROLE_EXPERT_UP:
        return &choir_experts_describe(e->experts, layer_index, index)->up;
    case CHOIR_ROLE_EXPERT_DOWN:
        return &choir_experts_describe(e->experts, layer_index, index)->down;
    default:
        return NULL;
    }
}

static const float *base_bias(const choir_engine *e, choir_role role, uint32_t layer_index,
                              uint32_t index)
{
    const layer *l = &e->layers[layer_index];
    switch (role) {
    case CHOIR_ROLE_HEAD:
        return e->head_bias;
    case CHOIR_ROLE_ATTN_Q:
        return l->q_bias;
    case CHOIR_ROLE_ATTN_K:
        return l->k_bias;
    case CHOIR_ROLE_ATTN_V:
        return l->v_bias;
    case CHOIR_ROLE_ATTN_OUT:
        return l->out_bias;
    case CHOIR_ROLE_ROUTER:
        return l->router_bias;
    case CHOIR_ROLE_FFN_GATE:
    case CHOIR_ROLE_SHARED_GATE:
        return l->always.gate_bias;
    case CHOIR_ROLE_FFN_UP:
    case CHOIR_ROLE_SHARED_UP:
        return l->always.up_bias;
    case CHOIR_ROLE_FFN_DOWN:
    case CHOIR_ROLE_SHARED_DOWN:
        return l->always.down_bias;
    case CHOIR_ROLE_EXPERT_GATE:
        return choir_experts_describe(e->experts, layer_index, index)->gate_bias;
    case CHOIR_ROLE_EXPERT_UP:
        return choir_experts_describe(e->experts, layer_index, index)->up_bias;
    case CHOIR_ROLE_EXPERT_DOWN:
        return choir_experts_describe(e->experts, layer_index, index)->down_bias;
    default:
        return NULL;
    }
}

/* -- folding -- */

/* m / |W + scale B A| of each row, the norm in double (Liu et al. 2024, equation 5). */
static choir_status fold_magnitude(const choir_engine *e, const choir_adapter_change *c, float *out)
{
    const choir_matrix *w = base_matrix(e, c->role, c->layer, c->index);
    if (w == NULL) return refuse(c, "DoRA");
    float *base_row = choir_alloc(CHOIR_MEM_SCRATCH, c->cols * sizeof *base_row);
    if (base_row == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for an adapter's norms");
    for (uint32_t r = 0; r < c->rows; r++) {
        double sum = 0;
        choir_matrix_row(w, r, base_row);
        for (uint32_t k = 0; k < c->rank; k++)
            e->kernels->add_scaled(base_row, c->a + (size_t)k * c->cols,
                                   c->scale * c->b[(size_t)r * c->rank + k], c->cols);
        for (uint32_t i = 0; i < c->cols; i++) sum += (double)base_row[i] * (double)base_row[i];
        out[r] = sum > 0 ? (float)(c->magnitude[r] / sqrt(sum)) : 0;
    }
    choir_free(base_row);
    return CHOIR_OK;
}

/* out_scale · n: what W x is multiplied by. */
static choir_status fold_scale(const maker *m, const choir_adapter_change *c, float *out)
{
    for (uint32_t r = 0; r < c->rows; r++) out[r] = 1;
    if (c->magnitude != NULL) CHOIR_TRY(fold_magnitude(m->engine, c, out));
    for (uint32_t r = 0; c->out_scale != NULL && r < c->rows; r++) out[r] *= c->out_scale[r];
    return CHOIR_OK;
}

/* What is added to every row: the bias that B has, and the base's bias as it is changed, less
 * itself, since the path adds that anyway. */
static void fold_shift(const maker *m, const choir_adapter_change *c, const float *scale,
                       float *out)
{
    const float *base = base_bias(m->engine, c->role, c->layer, c->index);
    for (uint32_t r = 0; r < c->rows; r++) {
        float s = scale != NULL ? scale[r] : 1, was = base != NULL ? base[r] : 0;
        float is = c->bias != NULL ? c->bias[r] : was;
        out[r] = c->b_bias != NULL ? s * c->scale * c->b_bias[r] : 0;
        out[r] += (c->out_scale != NULL ? c->out_scale[r] : 1) * is - was;
    }
}

/* A takes y0 with the base's bias where it is serial: A (y0 + b) = A y0 + A b. */
static void fold_a_bias(const maker *m, const choir_adapter_change *c, float *out)
{
    const float *base = c->series ? base_bias(m->engine, c->role, c->layer, c->index) : NULL;
    for (uint32_t k = 0; k < c->rank; k++) {
        double sum = c->a_bias != NULL ? c->a_bias[k] : 0;
        for (uint32_t r = 0; base != NULL && r < c->rows; r++)
            sum += (double)c->a[(size_t)k * c->rows + r] * base[r];
        out[k] = (float)sum;
    }
}

/* The numbers of a factor: in `scratch` where they are lent. */
static const float *numbers_of(const choir_tensor *lent, const float *numbers, size_t n,
                               float *scratch)
{
    if (lent->data == NULL) return numbers;
    choir_tensor_part(lent, 0, (uint32_t)n, scratch);
    return scratch;
}

static choir_status pack_pair(maker *m, const choir_adapter_change *c, adapted *out)
{
    uint32_t in = c->series || c->residual ? c->rows : c->cols;
    bool embedding = c->role == CHOIR_ROLE_EMBEDDING;
    uint32_t outputs = embedding ? c->cols : c->rows;
    void *b = carve(m, 1, choir_factor_bytes(m->type, c->rank, outputs));
    void *a = embedding ? NULL : carve(m, 1, choir_factor_bytes(m->type, c->rank, in));
    float *columns = embedding ? carve(m, (size_t)c->rows * c->rank, sizeof *columns) : NULL;
    if (m->base == NULL) return CHOIR_OK;
    out->a_columns = columns;
    for (size_t i = 0; embedding && i < c->rows; i++)
        for (size_t k = 0; k < c->rank; k++) columns[i * c->rank + k] = c->a[k * c->rows + i];
    size_t longest = in > outputs ? in : outputs;
    bool lent = c->a_lent.data != NULL || c->b_lent.data != NULL;
    float *scratch =
        choir_alloc(CHOIR_MEM_SCRATCH, (1 + lent * (size_t)c->rank) * longest * sizeof *scratch);
    if (scratch == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for an adapter's factor");
    if (!embedding) {
        const float *from = numbers_of(&c->a_lent, c->a, (size_t)c->rank * in, scratch + longest);
        const choir_factor_source of_a = {from, c->rank, in, in, 1, 1, NULL};
        out->a = choir_factor_pack(m->type, &of_a, scratch, a);
    }
    const float *from = numbers_of(&c->b_lent, c->b, (size_t)c->rank * outputs, scratch + longest);
    const choir_factor_source of_b = {from, c->rank, outputs, 1, c->rank, c->scale, out->scale};
    out->b = choir_factor_pack(m->type, &of_b, scratch, b);
    choir_free(scratch);
    return CHOIR_OK;
}

/* A matrix that stands in the base's place: as f32, or as bf16 where factors are no more than that.
 */
static choir_status pack_weight(maker *m, const choir_adapter_change *c, choir_matrix *out)
{
    size_t n = (size_t)c->rows * c->cols;
    bool exact = m->engine->options.exact, halves = !exact && m->type != CHOIR_FACTOR_F32;
    choir_tensor t = {halves ? CHOIR_BF16 : CHOIR_F32, c->rows, c->cols, c->weight,
                      n * (halves ? 2 : 4)};
    if (c->weight == NULL) t.data = c; /* a header alone: only sizes count */
    if (exact)
        *out = choir_matrix_exact(&t);
    else
        CHOIR_TRY(choir_matrix_plan(&t, out));
    void *data = carve(m, 1, out->bytes);
    if (m->base == NULL) return CHOIR_OK;
    out->data = data;
    if (exact) {
        memcpy(data, c->weight, out->bytes);
        return CHOIR_OK;
    }
    uint16_t *copy = halves ? choir_alloc(CHOIR_MEM_SCRATCH, n * sizeof *copy) : NULL;
    if (halves && copy == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for an adapter's matrix");
    for (size_t i = 0; halves && i < n; i++) copy[i] = choir_f32_to_bf16(c->weight[i]);
    if (halves) t.data = copy;
    choir_matrix_pack(out, &t, data, 0, c->rows);
    choir_free(copy);
    return CHOIR_OK;
}

static choir_status make_change(maker *m, const choir_adapter_change *c, adapted *out)
{
    bool real = m->base != NULL;
    *out = (adapted){.role = c->role,
                     .index = c->index,
                     .act = c->act,
                     .series = c->series,
                     .residual = c->residual};
    if (has(norm_roles, c->role)) {
        out->vector = carve_floats(m, c->weight, c->cols);
        return CHOIR_OK;
    }
    if (brings(c, CHOIR_ADAPTER_HAS_MAGNITUDE | CHOIR_ADAPTER_HAS_OUT_SCALE)) {
        float *scale = carve_floats(m, NULL, c->rows);
        if (real) CHOIR_TRY(fold_scale(m, c, scale));
        out->scale = scale;
    }
    if (brings(c,
               CHOIR_ADAPTER_HAS_B_BIAS | CHOIR_ADAPTER_HAS_BIAS | CHOIR_ADAPTER_HAS_OUT_SCALE)) {
        float *shift = carve_floats(m, NULL, c->rows);
        if (real) fold_shift(m, c, out->scale, shift);
        out->shift = shift;
    }
    if (c->rank > 0 && (brings(c, CHOIR_ADAPTER_HAS_A_BIAS) || c->series)) {
        float *a_bias = carve_floats(m, NULL, c->rank);
        if (real) fold_a_bias(m, c, a_bias);
        out->a_bias = a_bias;
    }
    if (brings(c, CHOIR_ADAPTER_HAS_IN_SCALE))
        out->in_scale = carve_floats(m, c->in_scale, c->cols);
    if (replaces(c)) CHOIR_TRY(pack_weight(m, c, &out->weight));
    return c->rank > 0 ? pack_pair(m, c, out) : CHOIR_OK;
}

static void note_change(choir_adapter *a, const adapted *x)
{
    uint64_t bit = (uint64_t)1 << x->role;
    a->roles |= bit;
    if (x->series || x->residual) a->series_roles |= bit;
    if (x->in_scale != NULL) a->in_scale_roles |= bit;
}

static void index_changes(const choir_engine *e, const choir_adapter_data *d, uint32_t *first)
{
    size_t n = (size_t)e->config.n_layers * CHOIR_N_ROLES, at = 0;
    for (size_t i = 0; i <= n; i++) {
        while (at < d->n_changes &&
               (size_t)d->changes[at].layer * CHOIR_N_ROLES + d->changes[at].role < i)
            at++;
        first[i] = (uint32_t)at;
    }
}

static void make_virtual(maker *m, const choir_adapter_data *d)
{
    choir_adapter *a = m->adapter;
    const choir_model_config *c = &m->engine->config;
    size_t keys = (size_t)c->n_layers * d->n_virtual * c->n_kv_heads * c->head_dim;
    a->n_virtual = d->n_virtual;
    if (d->n_virtual == 0) return;
    a->prefix = d->virtual_keys != NULL;
    if (a->prefix) {
        a->virtual_keys = carve_floats(m, d->virtual_keys, keys);
        a->virtual_values = carve_floats(m, d->virtual_values, keys);
    } else {
        a->virtual_embeddings =
            carve_floats(m, d->virtual_embeddings, (size_t)d->n_virtual * c->hidden);
    }
}

bool choir_adapter_data_mixes(const choir_adapter_data *data)
{
    bool mixes = data->n_virtual == 0;
    for (size_t i = 0; i < data->n_changes; i++)
        if (replaces(&data->changes[i]) || brings(&data->changes[i], CHOIR_ADAPTER_HAS_IN_SCALE))
            mixes = false;
    return mixes;
}

static choir_status make_all(maker *m, const choir_adapter_data *d)
{
    choir_adapter *a = m->adapter;
    adapted *items = carve(m, d->n_changes, sizeof *items), sized;
    uint32_t *first =
        carve(m, (size_t)m->engine->config.n_layers * CHOIR_N_ROLES + 1, sizeof *first);
    a->mixes = choir_adapter_data_mixes(d);
    if (first != NULL) index_changes(m->engine, d, first);
    for (size_t i = 0; i < d->n_changes; i++) {
        adapted *item = items != NULL ? &items[i] : &sized;
        CHOIR_TRY(check_change(m->engine, &d->changes[i]));
        CHOIR_TRY(make_change(m, &d->changes[i], item));
        if (items != NULL) note_change(a, item);
    }
    make_virtual(m, d);
    a->items = items;
    a->first = first;
    if (d->n_virtual > 0 && choir_is_latent(&m->engine->config) && a->prefix)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "prefixes of keys and values, where the model keeps latents");
    a->digest = d->digest;
    a->max_rank = d->max_rank;
    a->bytes = m->at;
    return CHOIR_OK;
}

static maker maker_of(const choir_engine *e, choir_adapter_type type, choir_adapter *adapter)
{
    static const choir_factor_type factors[] = {[CHOIR_ADAPTER_F32] = CHOIR_FACTOR_F32,
                                                [CHOIR_ADAPTER_F16] = CHOIR_FACTOR_F16,
                                                [CHOIR_ADAPTER_BF16] = CHOIR_FACTOR_BF16,
                                                [CHOIR_ADAPTER_INT8] = CHOIR_FACTOR_INT8};
    return (maker){
        .engine = e, .type = factors[choir_adapter_type_of(e, type)], .adapter = adapter};
}

uint64_t choir_adapter_plan_bytes(const choir_engine *e, const choir_adapter_data *data,
                                  choir_adapter_type type)
{
    choir_adapter sizes = {0};
    maker m = maker_of(e, type, &sizes);
    return make_all(&m, data) == CHOIR_OK ? sizes.bytes : 0;
}

choir_status choir_adapter_make(const choir_engine *e, const choir_adapter_data *data,
                                choir_adapter_type type, choir_page_cache *pages,
                                choir_adapter **out)
{
    choir_status status;
    choir_adapter *a = choir_calloc(CHOIR_MEM_ADAPTERS, 1, sizeof *a);
    if (a == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for an adapter");
    maker m = maker_of(e, type, a);
    CHOIR_TRY_TO(fail, status, make_all(&m, data));
    a->pages = pages;
    a->memory = choir_page_cache_take(pages, CHOIR_MEM_ADAPTERS, m.at);
    if (a->memory == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for an adapter of %zu bytes", m.at);
        goto fail;
    }
    m.base = a->memory;
    m.at = 0;
    CHOIR_TRY_TO(fail, status, make_all(&m, data));
    *out = a;
    return CHOIR_OK;
fail:
    choir_adapter_free(a);
    return status;
}

void choir_adapter_free(choir_adapter *adapter)
{
    if (adapter == NULL) return;
    choir_page_cache_give(adapter->pages, CHOIR_MEM_ADAPTERS, adapter->memory, adapter->bytes);
    choir_free(adapter);
}

uint64_t choir_adapter_bytes(const choir_adapter *a)
{
    return a->bytes;
}
uint64_t choir_adapter_digest(const choir_adapter *a)
{
    return a->digest;
}
uint32_t choir_adapter_n_virtual(const choir_adapter *a)
{
    return a->n_virtual;
}
uint32_t choir_adapter_max_rank(const choir_adapter *a)
{
    return a->max_rank;
}
bool choir_adapter_mixes(const choir_adapter *a)
{
    return a->mixes;
}

const adapted *choir_adapted_find(const choir_adapter *a, choir_role role, uint32_t layer_index,
                                  uint32_t index)
{
    size_t at = (size_t)layer_index * CHOIR_N_ROLES + role;
    uint32_t low = a->first[at], high = a->first[at + 1];
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (a->items[middle].index == index) return &a->items[middle];
        if (a->items[middle].index < index)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}
