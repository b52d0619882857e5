/* Binds a model file's tensors to the engine by role, packs them once into the kernels' layout and makes the
 * digest of their bytes, all workers together. In exact mode matrices stay views into the file. */
#include "engine/state.h"

#include <stdlib.h>
#include <xxhash.h>

/* A matrix to be packed: its source in the file and its place in the engine. */
typedef struct job {
    choir_tensor source;
    const choir_matrix *matrix;
    uint32_t number; /* of the tensor, in the order of the roles */
} job;

typedef struct loader {
    choir_engine *engine;
    const choir_model_file *file;
    job *jobs;
    uint32_t n_jobs, max_jobs;
    uint32_t n_tensors;
    uint64_t total_bytes;
    _Atomic uint64_t digest;   /* relaxed sum over the tensors; read after the run */
    atomic_uint next_job;      /* relaxed ticket: jobs are disjoint; all meet at the run's end */
    _Atomic uint64_t packed;   /* relaxed: progress only */
    choir_progress progress;
} loader;

/* The sum does not depend on who adds first; the number keeps equal tensors apart. */
static void add_to_digest(loader *l, const choir_tensor *t, uint32_t number)
{
    uint64_t hash = XXH3_64bits_withSeed(t->data, t->bytes, number);
    atomic_fetch_add_explicit(&l->digest, hash, memory_order_relaxed);
}

static choir_status read_vector(loader *l, choir_role role, uint32_t layer_index, bool optional,
                                float **out)
{
    *out = NULL;
    if (optional && !choir_model_file_has(l->file, role, layer_index)) return CHOIR_OK;
    choir_tensor t;
    CHOIR_TRY(choir_model_file_tensor(l->file, role, layer_index, 0, &t));
    float *values =
        choir_arena_alloc(l->engine->vectors, (size_t)t.rows * t.cols * sizeof *values);
    if (values == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the model's vectors");
    for (uint32_t r = 0; r < t.rows; r++) choir_tensor_row(&t, r, values + (size_t)r * t.cols);
    add_to_digest(l, &t, l->n_tensors++);
    *out = values;
    return CHOIR_OK;
}

/* Plans one matrix; it is packed later, when all sizes are known. */
static choir_status plan_matrix(loader *l, choir_role role, uint32_t layer_index, uint32_t expert,
                                choir_matrix *out)
{
    choir_tensor t;
    CHOIR_TRY(choir_model_file_tensor(l->file, role, layer_index, expert, &t));
    if (l->engine->options.exact)
        *out = choir_matrix_exact(&t);
    else
        CHOIR_TRY(choir_matrix_plan(&t, out));
    CHOIR_ASSERT(l->n_jobs < l->max_jobs);
    l->jobs[l->n_jobs++] = (job){t, out, l->n_tensors++};
    l->total_bytes += out->bytes;
    return CHOIR_OK;
}

/* Gates decide between experts by small margins, so they are always f32. */
static choir_status load_router(loader *l, uint32_t layer_index, choir_matrix *out)
{
    const choir_model_config *c = &l->engine->config;
    float *values;
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ROUTER, layer_index, false, &values));
    const choir_tensor t = {CHOIR_F32, c->n_experts, c->hidden, values,
                            (size_t)c->n_experts * c->hidden * sizeof *values};
    *out = choir_matrix_exact(&t);
    return CHOIR_OK;
}

static choir_status plan_experts(loader *l, uint32_t layer_index)
{
    choir_engine *e = l->engine;
    bool moe = e->layers[layer_index].router.rows > 0;
    uint32_t n = moe ? e->config.n_experts : 1, first_job = l->n_jobs;
    choir_expert *experts = choir_calloc(CHOIR_MEM_SCRATCH, n, sizeof *experts);
    if (experts == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory to load experts");
    choir_status status = CHOIR_OK;
    for (uint32_t x = 0; x < n; x++) {
        choir_role gate = moe ? CHOIR_ROLE_EXPERT_GATE : CHOIR_ROLE_FFN_GATE;
        choir_role up = moe ? CHOIR_ROLE_EXPERT_UP : CHOIR_ROLE_FFN_UP;
        choir_role down = moe ? CHOIR_ROLE_EXPERT_DOWN : CHOIR_ROLE_FFN_DOWN;
        CHOIR_TRY_TO(done, status, plan_matrix(l, gate, layer_index, x, &experts[x].gate));
        CHOIR_TRY_TO(done, status, plan_matrix(l, up, layer_index, x, &experts[x].up));
        CHOIR_TRY_TO(done, status, plan_matrix(l, down, layer_index, x, &experts[x].down));
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

static choir_status plan_layer(loader *l, uint32_t i)
{
    layer *w = &l->engine->layers[i];
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_NORM, i, false, &w->attn_norm));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_FFN_NORM, i, false, &w->ffn_norm));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_Q_BIAS, i, true, &w->q_bias));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_K_BIAS, i, true, &w->k_bias));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_V_BIAS, i, true, &w->v_bias));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_Q_NORM, i, true, &w->q_norm));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_ATTN_K_NORM, i, true, &w->k_norm));
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_Q, i, 0, &w->q));
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_K, i, 0, &w->k));
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_V, i, 0, &w->v));
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_ATTN_OUT, i, 0, &w->out));
    if (choir_model_file_has(l->file, CHOIR_ROLE_ROUTER, i))
        CHOIR_TRY(load_router(l, i, &w->router));
    return plan_experts(l, i);
}

static choir_status plan_all(loader *l)
{
    choir_engine *e = l->engine;
    CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_EMBEDDING, 0, 0, &e->embedding));
    if (!e->config.tied_head) CHOIR_TRY(plan_matrix(l, CHOIR_ROLE_HEAD, 0, 0, &e->head));
    CHOIR_TRY(read_vector(l, CHOIR_ROLE_OUTPUT_NORM, 0, false, &e->output_norm));
    for (uint32_t i = 0; i < e->config.n_layers; i++) CHOIR_TRY(plan_layer(l, i));
    return CHOIR_OK;
}

/* One region for all dense matrices; the experts' lie in the store and have their place already. */
static choir_status place_dense(loader *l)
{
    choir_engine *e = l->engine;
    size_t total = 0;
    for (uint32_t i = 0; i < l->n_jobs; i++)
        if (l->jobs[i].matrix->data == NULL)
            total += (l->jobs[i].matrix->bytes + 63) & ~(size_t)63;
    if (total > 0) {
        e->weights = choir_alloc_pages(CHOIR_MEM_WEIGHTS, total);
        if (e->weights == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu bytes of weights", total);
        e->weight_bytes = total;
    }
    char *at = e->weights;
    for (uint32_t i = 0; i < l->n_jobs; i++) {
        choir_matrix *m = (choir_matrix *)l->jobs[i].matrix; /* the engine's own, still being made */
        if (m->data != NULL) continue;
        m->data = at;
        at += (m->bytes + 63) & ~(size_t)63;
    }
    return CHOIR_OK;
}

static void pack_jobs(void *arg, uint32_t worker, uint32_t n_workers)
{
    loader *l = arg;
    (void)n_workers;
    for (;;) {
        uint32_t i = atomic_fetch_add_explicit(&l->next_job, 1, memory_order_relaxed);
        if (i >= l->n_jobs) return;
        const choir_matrix *m = l->jobs[i].matrix;
        add_to_digest(l, &l->jobs[i].source, l->jobs[i].number);
        if (m->layout != CHOIR_LAYOUT_EXACT)
            choir_matrix_pack(m, &l->jobs[i].source, (void *)m->data, 0, m->rows);
        uint64_t done =
            atomic_fetch_add_explicit(&l->packed, m->bytes, memory_order_relaxed) + m->bytes;
        if (worker == 0 && l->engine->options.show_progress)
            choir_progress_update(&l->progress, done);
    }
}

static int larger_first(const void *a, const void *b)
{
    size_t x = ((const job *)a)->matrix->bytes, y = ((const job *)b)->matrix->bytes;
    return x < y ? 1 : x > y ? -1 : 0;
}

choir_status choir_engine_load_weights(choir_engine *e, const choir_model_file *file)
{
    const choir_model_config *c = &e->config;
    uint32_t n_experts = c->n_experts > 0 ? c->n_experts : 1;
    loader l = {.engine = e, .file = file, .max_jobs = 2 + c->n_layers * (4 + 3 * n_experts)};
    choir_status status = CHOIR_OK;
    e->layers = choir_calloc(CHOIR_MEM_WEIGHTS, c->n_layers, sizeof *e->layers);
    l.jobs = choir_calloc(CHOIR_MEM_SCRATCH, l.max_jobs, sizeof *l.jobs);
    if (e->layers == NULL || l.jobs == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u layers", c->n_layers);
        goto done;
    }
    CHOIR_TRY_TO(done, status, choir_arena_create(CHOIR_MEM_WEIGHTS, 1 << 20, &e->vectors));
    CHOIR_TRY_TO(done, status, choir_experts_create(c->n_layers, n_experts, &e->experts));
    CHOIR_TRY_TO(done, status, plan_all(&l));
    CHOIR_TRY_TO(done, status, place_dense(&l));
    qsort(l.jobs, l.n_jobs, sizeof *l.jobs, larger_first);
    char what[96];
    snprintf(what, sizeof what, "loading %.80s", c->name);
    choir_progress_begin(&l.progress, what, CHOIR_PROGRESS_BYTES, l.total_bytes);
    choir_workers_run(e->workers, pack_jobs, &l);
    if (e->options.show_progress) choir_progress_end(&l.progress);
    if (c->tied_head) e->head = e->embedding;
    e->digest = atomic_load_explicit(&l.digest, memory_order_relaxed);
done:
    choir_free(l.jobs);
    return status;
}

void choir_engine_free_weights(choir_engine *e)
{
    choir_experts_destroy(e->experts);
    choir_arena_destroy(e->vectors);
    choir_free(e->layers);
    choir_free_pages(CHOIR_MEM_WEIGHTS, e->weights, e->weight_bytes);
}
