/* Binds a model file's tensors to the engine by role, packs them once into the kernels' layout and
 * makes the digest of their bytes, all workers together. In exact mode matrices stay views into the
 * file. */
#include "base/checksum.h"
#include "engine/pack_file.h"
#include "engine/state.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

/* A matrix to be packed: its source in the file and its place in the engine. */
typedef struct job {
    choir_slice source;
    const choir_matrix *matrix;
    uint32_t number; /* of the tensor, in the order of the roles */
    const choir_pack_tensor *packed; /* NULL, or where it lies in a pack */
} job;

typedef struct loader {
    choir_engine *engine;
    const choir_model_file *file;
    job *jobs;
    uint32_t n_jobs, max_jobs;
    uint32_t n_tensors;
    uint64_t total_bytes;
    _Atomic uint64_t digest; /* relaxed sum over the tensors; read after the run */
    atomic_uint next_job;    /* relaxed ticket: jobs are disjoint; all meet at the run's end */
    _Atomic uint64_t packed; /* relaxed: progress only */
    atomic_uint failed; /* relaxed: a choir_status; read after the run */
    int pack_fd;        /* -1: the file is no pack */
    choir_progress progress;
} loader;

/* The sum does not depend on who adds first; the number keeps equal tensors apart. */
static void add_to_digest(loader *l, const choir_tensor *t, uint32_t number)
{
    uint64_t hash = XXH3_64bits_withSeed(t->data, t->bytes, number);
    atomic_fetch_add_explicit(&l->digest, hash, memory_order_relaxed);
}

/* A vector, or a small matrix, as f32; NULL if the model has none. */
static choir_status read_vector(loader *l, choir_role role, uint32_t layer_index, uint32_t index,
                                float **out)
{
    *out = NULL;
    if (!choir_role_in_layer(&l->engine->config, role, layer_index)) return CHOIR_OK;
    choir_slice slice;
    choir_tensor t;
    CHOIR_TRY(choir_model_file_slice(l->file, role, layer_index, index, &slice));
    void *copy;
    if (!choir_slice_tensor(&slice, CHOIR_MEM_SCRATCH, &t, &copy))
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the model's vectors");
    size_t n = (size_t)t.rows * t.cols;
    float *values = choir_arena_alloc(l->engine->vectors, n * sizeof *values);
    if (values != NULL) {
        choir_model_file_expand(l->file, role, &t, values);
        add_to_digest(l, &t, l->n_tensors++);
    }
    choir_free(copy);
    *out = values;
    return values != NULL ? CHOIR_OK
                          : choir_fail(CHOIR_E_NO_MEMORY, "no memory for the model's vectors");
}

/* How a tensor's matrix will be: as it lies, or packed. */
static choir_status plan_layout(const loader *l, const choir_tensor *t, choir_matrix *out)
{
    if (!l->engine->options.exact) return choir_matrix_plan(t, out);
    *out = choir_matrix_exact(t);
    return CHOIR_OK;
}

/* A tensor of a pack; of an expert the one that is computed with. */
static const choir_pack_tensor *find_packed(const loader *l, choir_role role, uint32_t layer_index,
                                            uint32_t index)
{
    const choir_pack *pack = choir_model_file_pack(l->file);
    for (int i = 0; i < CHOIR_EXPERT_PARTS; i++)
        if (role == choir_expert_roles[i] && choir_expert_is_small(l->engine, layer_index, index))
            return &choir_pack_find_small(pack, layer_index, index)[i];
    return choir_pack_find(pack, role, layer_index, index);
}

/* A pack's matrix; in exact mode it will be f32 again. */
static choir_status plan_packed(loader *l, choir_role role, uint32_t layer_index, uint32_t index,
                                choir_matrix *out)
{
    const choir_pack_tensor *t = find_packed(l, role, layer_index, index);
    CHOIR_ASSERT(t != NULL && l->n_jobs < l->max_jobs); /* choir_pack_check() has seen it */
    *out = choir_pack_matrix(t);
    if (l->engine->options.exact) {
        const choir_tensor like = {CHOIR_F32, t->rows, t->cols, NULL,
                                   (size_t)t->rows * t->cols * sizeof(float)};
        *out = choir_matrix_exact(&like);
    }
    l->jobs[l->n_jobs++] = (job){.matrix = out, .number = l->n_tensors++, .packed = t};
    l->total_bytes += out->bytes;
    return CHOIR_OK;
}

/* Plans one matrix; it is packed later, when all sizes are known. In exact mode what lies as a
 * tensor stays where it is, and what does not is copied as it is. */
static choir_status plan_matrix(loader *l, choir_role role, uint32_t layer_index, uint32_t index,
                                choir_matrix *out)
{
    choir_slice slice;
    choir_tensor t;
    if (choir_model_file_pack(l->file) != NULL)
        return plan_packed(l, role, layer_index, index, out);
    CHOIR_TRY(choir_model_file_slice(l->file, role, layer_index, index, &slice));
    bool in_place = choir_slice_is_tensor(&slice, &t);
    CHOIR_TRY(plan_layout(l, &t, out));
    if (!in_place) out->data = NULL;
    CHOIR_ASSERT(l->n_jobs < l->max_jobs);
    l->jobs[l->n_jobs++] = (job){.source = slice, .matrix = out, .number = l->n_tensors++};
    l->total_bytes += out->bytes;
    return CHOIR_OK;
}

/* Gates decide between experts by small margins, so they are always f32. */
static choir_status load_router(loader *l, uint32_t layer_index, choir_matrix *out)
{
    const choir_model_config *c = &l->engine->config;
    float *values;
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ROUTER, layer_index, 0, &values));
    const choir_tensor t = {CHOIR_F32, c->n_experts, c->hidden, values,
                            (size_t)c->n_experts * c->hidden * sizeof *values};
    *out = choir_matrix_exact(&t);
    return CHOIR_OK;
}

static choir_status read_expert_biases(loader *l, uint32_t layer_index, uint32_t x,
                                       choir_expert *to)
{
    float *gate, *up, *down;
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_EXPERT_GATE_BIAS, layer_index, x, &gate));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_EXPERT_UP_BIAS, layer_index, x, &up));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_EXPERT_DOWN_BIAS, layer_index, x, &down));
    to->gate_bias = gate;
    to->up_bias = up;
    to->down_bias = down;
    return CHOIR_OK;
}

static choir_status place_packed(loader *l, uint32_t layer_index, uint32_t x)
{
    choir_expert_source source = {.packed = true, .n_extents = 1};
    choir_expert planned = {0};
    choir_matrix *parts[] = {&planned.gate, &planned.up, &planned.down};
    for (int i = 0; i < CHOIR_EXPERT_PARTS; i++) {
        const choir_pack_tensor *t = find_packed(l, choir_expert_roles[i], layer_index, x);
        *parts[i] = choir_pack_matrix(t);
        source.checksums[i] = t->checksum;
        if (i == 0) source.extents[0].offset = t->offset; /* the run's */
    }
    source.extents[0].bytes =
        (uint32_t)choir_round_up(choir_expert_run_bytes(&planned), CHOIR_PACK_PAGE);
    CHOIR_TRY(read_expert_biases(l, layer_index, x, &planned));
    return choir_experts_place(l->engine->experts, layer_index, x, &planned, &source);
}

static choir_status place_unpacked(loader *l, uint32_t layer_index, uint32_t x)
{
    choir_expert planned = {0};
    choir_matrix *parts[] = {&planned.gate, &planned.up, &planned.down};
    choir_slice slices[CHOIR_EXPERT_PARTS];
    uint64_t digest;
    for (int i = 0; i < CHOIR_EXPERT_PARTS; i++) {
        choir_tensor t;
        CHOIR_TRY(
            choir_model_file_slice(l->file, choir_expert_roles[i], layer_index, x, &slices[i]));
        choir_slice_is_tensor(&slices[i], &t); /* its shape, wherever it lies */
        CHOIR_TRY(plan_layout(l, &t, parts[i]));
        parts[i]->data = NULL;
    }
    CHOIR_TRY(read_expert_biases(l, layer_index, x, &planned));
    CHOIR_TRY(choir_stream_place(l->engine, l->file, layer_index, x, slices, &planned, &digest));
    atomic_fetch_add_explicit(&l->digest, digest * (l->n_tensors++ | 1), memory_order_relaxed);
    return CHOIR_OK;
}

/* Streamed experts are not read now: the store learns where they lie. */
static choir_status place_experts(loader *l, uint32_t layer_index)
{
    bool packed = choir_model_file_pack(l->file) != NULL;
    for (uint32_t x = 0; x < l->engine->config.n_experts; x++)
        CHOIR_TRY((packed ? place_packed : place_unpacked)(l, layer_index, x));
    return CHOIR_OK;
}

static choir_status plan_experts(loader *l, uint32_t layer_index)
{
    choir_engine *e = l->engine;
    if (e->options.expert_bytes > 0) return place_experts(l, layer_index);
    uint32_t n = e->config.n_experts, first_job = l->n_jobs;
    choir_expert *experts = choir_calloc(CHOIR_MEM_SCRATCH, n, sizeof *experts);
    if (experts == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory to load experts");
    choir_status status = CHOIR_OK;
    for (uint32_t x = 0; x < n; x++) {
        choir_matrix *parts[] = {&experts[x].gate, &experts[x].up, &experts[x].down};
        for (int i = 0; i < 3; i++)
            CHOIR_TRY_TO(done, status,
                         plan_matrix(l, choir_expert_roles[i], layer_index, x, parts[i]));
        CHOIR_TRY_TO(done, status, read_expert_biases(l, layer_index, x, &experts[x]));
    }
    CHOIR_TRY_TO(done, status, choir_experts_reserve(e->experts, layer_index, experts));
    /* The store holds the matrices now; the jobs point there. */
    for (uint32_t i = first_job; i < l->n_jobs; i++) {
        uint32_t x = (i - first_job) / 3, part = (i - first_job) % 3;
        const choir_expert *held;
        CHOIR_TRY_TO(done, status, choir_experts_pin(e->experts, layer_index, x, &held));
        choir_experts_unpin(e->experts, layer_index, x);
        l->jobs[i].matrix = part == 0 ? &held->gate : part == 1 ? &held->up : &held->down;
    }
done:
    choir_free(experts);
    return status;
}

static choir_status plan_parts(loader *l, uint32_t i, const choir_role *roles, choir_expert *to)
{
    float *gate_bias, *up_bias, *down_bias;
    CHOIR_TRY(plan_matrix(l, roles[0], i, 0, &to->gate));
    CHOIR_TRY(plan_matrix(l, roles[1], i, 0, &to->up));
    CHOIR_TRY(plan_matrix(l, roles[2], i, 0, &to->down));
    CHOIR_TRY(read_vector(l, roles[3], i, 0, &gate_bias));
    CHOIR_TRY(read_vector(l, roles[4], i, 0, &up_bias));
    CHOIR_TRY(read_vector(l, roles[5], i, 0, &down_bias));
    to->gate_bias = gate_bias;
    to->up_bias = up_bias;
    to->down_bias = down_bias;
    return CHOIR_OK;
}

/* The dense FFN, or the shared expert, if there is one. */
static choir_status plan_always(loader *l, uint32_t i, bool dense)
{
    static const choir_role of_dense[] = {CHOIR_ROLE_FFN_GATE,      CHOIR_ROLE_FFN_UP,
                                          CHOIR_ROLE_FFN_DOWN,      CHOIR_ROLE_FFN_GATE_BIAS,
                                          CHOIR_ROLE_FFN_UP_BIAS,   CHOIR_ROLE_FFN_DOWN_BIAS};
    static const choir_role of_shared[] = {CHOIR_ROLE_SHARED_GATE,    CHOIR_ROLE_SHARED_UP,
                                           CHOIR_ROLE_SHARED_DOWN,    CHOIR_ROLE_SHARED_GATE_BIAS,
                                           CHOIR_ROLE_SHARED_UP_BIAS, CHOIR_ROLE_SHARED_DOWN_BIAS};
    layer *w = &l->engine->layers[i];
    if (dense) return plan_parts(l, i, of_dense, &w->always);
    if (!choir_role_in_layer(&l->engine->config, CHOIR_ROLE_SHARED_GATE, i)) return CHOIR_OK;
    CHOIR_TRY(plan_parts(l, i, of_shared, &w->always));
    return read_vector(l, CHOIR_ROLE_SHARED_ROUTER, i, 0, &w->always_gate);
}

static choir_status plan_ffn(loader *l, uint32_t i)
{
    layer *w = &l->engine->layers[i];
    bool moe = (w->flags & CHOIR_LAYER_MOE) != 0;
    CHOIR_TRY(plan_always(l, i, !moe));
    if (!moe) return CHOIR_OK;
    CHOIR_TRY(load_router(l, i, &w->router));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ROUTER_BIAS, i, 0, &w->router_bias));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ROUTER_CORRECTION, i, 0, &w->router_correction));
    return plan_experts(l, i);
}

/* Latent attention: a pair of small matrices for each head. */
static choir_status plan_latent(loader *l, uint32_t i)
{
    choir_engine *e = l->engine;
    layer *w = &e->layers[i];
    uint32_t n = e->config.n_heads;
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_KV_A, i, 0, &w->kv_a));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_KV_A_NORM, i, 0, &w->kv_a_norm));
    w->k_b = choir_arena_alloc(e->vectors, n * sizeof *w->k_b);
    w->v_b = choir_arena_alloc(e->vectors, n * sizeof *w->v_b);
    if (w->k_b == NULL || w->v_b == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u heads", n);
    for (uint32_t h = 0; h < n; h++) {
        CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_K_B, i, h, &w->k_b[h]));
        CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_V_B, i, h, &w->v_b[h]));
    }
    return CHOIR_OK;
}

static choir_status plan_attention(loader *l, uint32_t i)
{
    const choir_model_config *c = &l->engine->config;
    layer *w = &l->engine->layers[i];
    const struct {
        choir_role role;
        float **to;
    } vectors[] = {
        {CHOIR_ROLE_ATTN_Q_BIAS, &w->q_bias},     {CHOIR_ROLE_ATTN_K_BIAS, &w->k_bias},
        {CHOIR_ROLE_ATTN_V_BIAS, &w->v_bias},     {CHOIR_ROLE_ATTN_OUT_BIAS, &w->out_bias},
        {CHOIR_ROLE_ATTN_Q_NORM, &w->q_norm},     {CHOIR_ROLE_ATTN_K_NORM, &w->k_norm},
        {CHOIR_ROLE_ATTN_Q_A_NORM, &w->q_a_norm}, {CHOIR_ROLE_ATTN_SINKS, &w->sinks}};
    for (size_t v = 0; v < sizeof vectors / sizeof *vectors; v++)
        CHOIR_TRY(read_vector(l, vectors[v].role, i, 0, vectors[v].to));
    if (c->q_lora_rank > 0) CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_Q_A, i, 0, &w->q_a));
    CHOIR_TRY(
        plan_matrix(l, c->q_lora_rank > 0 ? CHOIR_ROLE_ATTN_Q_B : CHOIR_ROLE_ATTN_Q, i, 0, &w->q));
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_OUT, i, 0, &w->out));
    if (choir_is_latent(c)) return plan_latent(l, i);
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_K, i, 0, &w->k));
    return plan_matrix(l, CHOIR_ROLE_ATTN_V, i, 0, &w->v);
}

static choir_status plan_layer(loader *l, uint32_t i)
{
    layer *w = &l->engine->layers[i];
    w->flags = l->engine->config.layers[i];
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_NORM, i, 0, &w->attn_norm.weight));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_NORM_BIAS, i, 0, &w->attn_norm.bias));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_POST_NORM, i, 0, &w->attn_post_norm));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_FFN_NORM, i, 0, &w->ffn_norm.weight));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_FFN_NORM_BIAS, i, 0, &w->ffn_norm.bias));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_FFN_POST_NORM, i, 0, &w->ffn_post_norm));
    CHOIR_TRY(plan_attention(l, i));
    return plan_ffn(l, i);
}

static choir_status plan_all(loader *l)
{
    choir_engine *e = l->engine;
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_EMBEDDING, 0, 0, &e->embedding));
    if (!e->config.tied_head) CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_HEAD, 0, 0, &e->head));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_HEAD_BIAS, 0, 0, &e->head_bias));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_OUTPUT_NORM, 0, 0, &e->output_norm.weight));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_OUTPUT_NORM_BIAS, 0, 0, &e->output_norm.bias));
    for (uint32_t i = 0; i < e->config.n_layers; i++) CHOIR_TRY(plan_layer(l, i));
    return CHOIR_OK;
}

/* One region for all dense matrices; the experts' lie in the store and have their place already. */
static choir_status place_dense(loader *l)
{
    choir_engine *e = l->engine;
    size_t total = 0;
    for (uint32_t i = 0; i < l->n_jobs; i++)
        if (l->jobs[i].matrix->data == NULL) total += choir_round_up(l->jobs[i].matrix->bytes, 64);
    if (total > 0) {
        e->weights = choir_alloc_pages(CHOIR_MEM_WEIGHTS, total);
        if (e->weights == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu bytes of weights", total);
        e->weight_bytes = total;
    }
    char *at = e->weights;
    for (uint32_t i = 0; i < l->n_jobs; i++) {
        choir_matrix *m =
            (choir_matrix *)l->jobs[i].matrix; /* the engine's own, still being made */
        if (m->data != NULL) continue;
        m->data = at;
        at += choir_round_up(m->bytes, 64);
    }
    return CHOIR_OK;
}

static void expand(const choir_matrix *packed, const choir_matrix *exact)
{
    for (uint32_t r = 0; r < packed->rows; r++)
        choir_matrix_row(packed, r, (float *)exact->data + (size_t)r * packed->cols);
}

/* A pack's matrix to where it belongs: as it is, or f32. */
static choir_status read_packed(loader *l, const job *j)
{
    bool exact = l->engine->options.exact;
    choir_matrix packed = choir_pack_matrix(j->packed);
    void *copy = exact ? choir_alloc_pages(CHOIR_MEM_SCRATCH, packed.bytes) : NULL;
    if (exact && copy == NULL) return CHOIR_E_NO_MEMORY;
    void *to = exact ? copy : (void *)j->matrix->data;
    choir_status status =
        choir_file_read_at(l->pack_fd, l->engine->path, j->packed->offset, to, packed.bytes);
    posix_fadvise(l->pack_fd, (off_t)j->packed->offset, (off_t)packed.bytes, POSIX_FADV_DONTNEED);
    if (status == CHOIR_OK && XXH3_64bits(to, packed.bytes) != j->packed->checksum)
        status = CHOIR_E_DATA_LOSS;
    packed.data = to;
    if (exact && status == CHOIR_OK) expand(&packed, j->matrix);
    choir_free_pages(CHOIR_MEM_SCRATCH, copy, packed.bytes);
    return status;
}

static choir_status pack_job(loader *l, const job *j)
{
    const choir_matrix *m = j->matrix;
    choir_tensor t;
    void *copy = NULL;
    if (j->packed != NULL) return read_packed(l, j);
    if (!choir_slice_is_tensor(&j->source, &t)) {
        /* What is exact is copied to its place; the rest passes through memory of its own. */
        if (m->layout != CHOIR_LAYOUT_EXACT) {
            copy = choir_alloc(CHOIR_MEM_SCRATCH, t.bytes);
            if (copy == NULL) return CHOIR_E_NO_MEMORY;
        }
        t.data = copy != NULL ? copy : m->data;
        choir_slice_copy(&j->source, (void *)t.data);
    }
    add_to_digest(l, &t, j->number);
    if (m->layout != CHOIR_LAYOUT_EXACT) choir_matrix_pack(m, &t, (void *)m->data, 0, m->rows);
    choir_free(copy);
    choir_slice_forget(&j->source);
    return CHOIR_OK;
}

static void pack_jobs(void *arg, uint32_t worker, uint32_t n_workers)
{
    loader *l = arg;
    (void)n_workers;
    for (;;) {
        uint32_t i = atomic_fetch_add_explicit(&l->next_job, 1, memory_order_relaxed);
        if (i >= l->n_jobs) return;
        choir_status status = pack_job(l, &l->jobs[i]);
        if (status != CHOIR_OK) atomic_store_explicit(&l->failed, status, memory_order_relaxed);
        uint64_t bytes = l->jobs[i].matrix->bytes;
        uint64_t done = atomic_fetch_add_explicit(&l->packed, bytes, memory_order_relaxed) + bytes;
        if (worker == 0 && l->engine->options.show_progress)
            choir_progress_update(&l->progress, done);
    }
}

static int larger_first(const void *a, const void *b)
{
    size_t x = ((const job *)a)->matrix->bytes, y = ((const job *)b)->matrix->bytes;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* The workers' sentences are their own. */
static choir_status tell_failure(const choir_engine *e, choir_status status)
{
    switch (status) {
    case CHOIR_OK:
        return CHOIR_OK;
    case CHOIR_E_NO_MEMORY:
        return choir_fail(status, "no memory to rearrange %s's tensors", e->config.name);
    case CHOIR_E_DATA_LOSS:
        return choir_fail(status, "%s is damaged: the checksum of a tensor is wrong", e->path);
    default:
        return choir_fail(status, "%s cannot be read to its end", e->path);
    }
}

static choir_status create_store(choir_engine *e, const choir_model_file *file)
{
    choir_experts_options o = CHOIR_EXPERTS_OPTIONS_DEFAULT;
    if (e->config.n_experts == 0) e->options.expert_bytes = 0;
    o.n_layers = e->config.n_layers;
    o.n_experts = e->config.n_experts;
    o.io = e->options.io;
    if (e->options.io_depth > 0) o.queue_depth = e->options.io_depth;
    o.policy = e->options.policy;
    o.stall_ns = e->options.stall_ns;
    o.disk = e->options.disk;
    o.unpack = choir_stream_unpack;
    o.user = e;
    CHOIR_TRY(choir_experts_create(&o, &e->experts));
    return e->options.expert_bytes > 0 ? choir_stream_create(e, file) : CHOIR_OK;
}

choir_status choir_engine_load_weights(choir_engine *e, const choir_model_file *file)
{
    const choir_model_config *c = &e->config;
    uint32_t n_heads = choir_is_latent(c) ? c->n_heads : 0;
    loader l = {.engine = e, .file = file, .pack_fd = -1};
    l.max_jobs = 2 + c->n_layers * (8 + 3 * c->n_experts + 2 * n_heads);
    choir_status status = CHOIR_OK;
    e->layers = choir_calloc(CHOIR_MEM_WEIGHTS, c->n_layers, sizeof *e->layers);
    l.jobs = choir_calloc(CHOIR_MEM_SCRATCH, l.max_jobs, sizeof *l.jobs);
    if (e->layers == NULL || l.jobs == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u layers", c->n_layers);
        goto done;
    }
    CHOIR_TRY_TO(done, status, choir_arena_create(CHOIR_MEM_WEIGHTS, 1 << 20, &e->vectors));
    if (choir_model_file_pack(file) != NULL) {
        size_t bytes;
        CHOIR_TRY_TO(done, status, choir_file_open(e->path, &l.pack_fd, &bytes));
    }
    CHOIR_TRY_TO(done, status, create_store(e, file));
    CHOIR_TRY_TO(done, status, plan_all(&l));
    CHOIR_TRY_TO(done, status, place_dense(&l));
    if (e->options.expert_bytes > 0)
        CHOIR_TRY_TO(done, status,
                     choir_experts_start(e->experts, e->options.expert_bytes,
                                         e->options.max_expert_slots));
    qsort(l.jobs, l.n_jobs, sizeof *l.jobs, larger_first);
    char what[96];
    snprintf(what, sizeof what, "loading %.80s", c->name);
    choir_progress_begin(&l.progress, what, CHOIR_PROGRESS_BYTES, l.total_bytes);
    choir_workers_run(e->workers, pack_jobs, &l);
    if (e->options.show_progress) choir_progress_end(&l.progress);
    status = atomic_load_explicit(&l.failed, memory_order_relaxed);
    CHOIR_TRY_TO(done, status, tell_failure(e, status));
    if (c->tied_head) e->head = e->embedding;
    e->digest = atomic_load_explicit(&l.digest, memory_order_relaxed);
    if (l.pack_fd >= 0)
        e->digest = choir_pack_get_header(choir_model_file_pack(file))->tables_hash;
    e->digest = choir_small_digest(e, e->digest);
done:
    if (l.pack_fd >= 0) close(l.pack_fd);
    choir_free(l.jobs);
    return status;
}

void choir_engine_free_weights(choir_engine *e)
{
    choir_experts_destroy(e->experts);
    choir_free(e->slices);
    choir_free(e->small);
    choir_arena_destroy(e->vectors);
    choir_free(e->layers);
    choir_free_pages(CHOIR_MEM_WEIGHTS, e->weights, e->weight_bytes);
}
