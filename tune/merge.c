/* The steps of merging: check, read the adapters, list the matrices, merge them one beside the
 * other, write. Each matrix is one worker's, so that how many there are changes nothing. */
#include "tune/merge.h"

#include "tune/encode.h"
#include "tune/hf_files.h"
#include "tune/merge_module.h"
#include "tune/out_folder.h"

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* What all workers together hold; one matrix alone may take more. */
static const uint64_t max_scratch = UINT64_C(4) << 30;

static choir_status check_numbers(const choir_merge_options *o)
{
    const choir_merge_method_info *m = choir_merge_method_of(o->method);
    if (!(o->density > 0 && o->density <= 1))
        return choir_fail(CHOIR_E_INVALID, "the density is %g, must be over 0 and at most 1",
                          o->density);
    if (m->pruning == CHOIR_MERGE_PRUNES_NOTHING && o->density < 1)
        return choir_fail(CHOIR_E_INVALID, "%s prunes nothing, so a density means nothing to it",
                          m->text);
    if (!m->svd && o->rank != 0)
        return choir_fail(
            CHOIR_E_INVALID,
            "%s has the rank that its adapters have; methods with svd can be given one", m->text);
    if (o->rank > CHOIR_ADAPTER_MAX_RANK)
        return choir_fail(CHOIR_E_INVALID, "the rank is %u, must be 1 to %d", o->rank,
                          CHOIR_ADAPTER_MAX_RANK);
    if (o->dtype != CHOIR_F32 && o->dtype != CHOIR_BF16 && o->dtype != CHOIR_F16)
        return choir_fail(CHOIR_E_INVALID, "an adapter can be written as F32, BF16 or F16, not %s",
                          o->dtype < CHOIR_N_DTYPES ? choir_dtype_text(o->dtype)
                                                    : "as an unknown type");
    for (uint32_t i = 0; i < o->n_adapters; i++)
        if (!(fabs(o->adapters[i].weight) <= CHOIR_MERGE_MAX_WEIGHT))
            return choir_fail(CHOIR_E_INVALID, "%s: the weight is %g, must be -%g to %g",
                              o->adapters[i].folder, o->adapters[i].weight, CHOIR_MERGE_MAX_WEIGHT,
                              CHOIR_MERGE_MAX_WEIGHT);
    return CHOIR_OK;
}

static choir_status check_options(const choir_merge_options *o)
{
    if (o->base == NULL || o->out == NULL || o->out[0] == '\0' || strlen(o->out) > 3900)
        return choir_fail(CHOIR_E_INVALID, "merging wants a base and the name of a folder");
    if (o->n_adapters < 1 || o->n_adapters > CHOIR_MAX_MERGE)
        return choir_fail(CHOIR_E_INVALID, "%u adapters were given, must be 1 to %d", o->n_adapters,
                          CHOIR_MAX_MERGE);
    CHOIR_TRY(check_numbers(o));
    return choir_tune_out_folder_check(o->out);
}

static choir_status read_adapters(choir_tune_merge *m)
{
    const choir_merge_options *o = m->options;
    choir_model_file *base;
    CHOIR_TRY(choir_model_file_open(o->base, &base));
    choir_status status = CHOIR_OK;
    for (uint32_t i = 0; i < o->n_adapters && status == CHOIR_OK; i++)
        status = choir_adapter_pairs_open(choir_model_file_config(base), o->adapters[i].folder,
                                          &m->pairs[i]);
    choir_model_file_close(base);
    return status;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const choir_tune_merged *)a)->name, ((const choir_tune_merged *)b)->name);
}

static choir_status list_modules(choir_tune_merge *m)
{
    size_t n = 0;
    for (uint32_t i = 0; i < m->options->n_adapters; i++) n += m->pairs[i]->n;
    m->modules = choir_calloc(CHOIR_MEM_TUNE, n, sizeof *m->modules);
    if (m->modules == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a list of %zu matrices", n);
    n = 0;
    for (uint32_t i = 0; i < m->options->n_adapters; i++)
        for (size_t k = 0; k < m->pairs[i]->n; k++) {
            const choir_adapter_raw_pair *p = &m->pairs[i]->items[k];
            m->modules[n++] = (choir_tune_merged){.name = p->name,
                                                  .embedding = p->embedding,
                                                  .stacked = p->stacked,
                                                  .swapped = p->swapped,
                                                  .n_experts = p->n_experts,
                                                  .rows = p->rows,
                                                  .cols = p->cols};
        }
    qsort(m->modules, n, sizeof *m->modules, by_name);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(m->modules[i].name, m->modules[i - 1].name) != 0)
            m->modules[m->n_modules++] = m->modules[i];
    return CHOIR_OK;
}

static int by_matrix(const void *a, const void *b)
{
    const choir_adapter_raw_pair *x = *(const choir_adapter_raw_pair *const *)a;
    const choir_adapter_raw_pair *y = *(const choir_adapter_raw_pair *const *)b;
    if (x->layer != y->layer) return x->layer < y->layer ? -1 : 1;
    if (x->role != y->role) return x->role < y->role ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* transformers has called one matrix by several names, alone and fused with others: PEFT would pass
 * over those that the model at hand does not have. */
static choir_status check_names(const choir_tune_merge *m)
{
    size_t n = 0;
    for (uint32_t i = 0; i < m->options->n_adapters; i++) n += m->pairs[i]->n;
    const choir_adapter_raw_pair **all = choir_alloc(CHOIR_MEM_TUNE, n * sizeof *all);
    if (all == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a list of %zu matrices", n);
    n = 0;
    for (uint32_t i = 0; i < m->options->n_adapters; i++)
        for (size_t k = 0; k < m->pairs[i]->n; k++) all[n++] = &m->pairs[i]->items[k];
    qsort(all, n, sizeof *all, by_matrix);
    choir_status status = CHOIR_OK;
    for (size_t i = 1; i < n && status == CHOIR_OK; i++)
        if (by_matrix(&all[i - 1], &all[i]) == 0 && all[i - 1]->stacked == all[i]->stacked &&
            strcmp(all[i - 1]->name, all[i]->name) != 0)
            status = choir_fail(CHOIR_E_INVALID,
                                "'%s' and '%s' are one matrix of the base under two names, as "
                                "other versions of its model have them: such adapters cannot be "
                                "joined",
                                all[i - 1]->name, all[i]->name);
    choir_free(all);
    return status;
}

/* One module, one meaning: all adapters that have it have the same matrix, and factors that are
 * added have one rank. */
static choir_status check_module(const choir_tune_merge *m, choir_tune_merged *module)
{
    const choir_merge_method_info *method = choir_merge_method_of(m->options->method);
    bool factors = !method->svd && m->options->method != CHOIR_MERGE_CAT;
    uint32_t first = 0, rank = 0;
    for (uint32_t i = 0; i < m->options->n_adapters; i++) {
        const choir_adapter_raw_pair *p = choir_adapter_pairs_find(m->pairs[i], module->name);
        if (p == NULL) continue;
        if (p->embedding != module->embedding || p->n_experts != module->n_experts ||
            p->rows != module->rows || p->cols != module->cols || p->swapped != module->swapped)
            return choir_fail(CHOIR_E_INVALID,
                              "%s: '%s' lies otherwise than in the adapters before it, as another "
                              "version of PEFT has it, so the two cannot be joined",
                              m->pairs[i]->folder, module->name);
        if (rank == 0) first = i;
        if (rank != 0 && factors && p->rank != rank)
            return choir_fail(CHOIR_E_INVALID,
                              "%s: '%s' has rank %u, and %u in %s: %s adds the factors, which "
                              "wants one rank; cat and the methods with svd take any",
                              m->pairs[i]->folder, module->name, p->rank, rank,
                              m->pairs[first]->folder, method->text);
        rank = p->rank;
        module->sum_of_ranks += p->rank;
    }
    return CHOIR_OK;
}

static bool is_of_one_expert(const char *name)
{
    static const char part[] = ".experts.";
    const char *at = strstr(name, part);
    return at != NULL && at[sizeof part - 1] >= '0' && at[sizeof part - 1] <= '9';
}

/* A model has its experts stacked or one by one, and so has what adapts them: PEFT would pass over
 * one of the two. */
static choir_status check_layouts(const choir_tune_merge *m)
{
    const char *stack = NULL, *one = NULL;
    for (size_t i = 0; i < m->n_modules; i++) {
        const choir_tune_merged *t = &m->modules[i];
        if (t->stacked)
            stack = t->name;
        else if (is_of_one_expert(t->name))
            one = t->name;
    }
    if (stack == NULL || one == NULL) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID,
                      "'%s' is of all experts at once and '%s' of one: adapters of the two layouts "
                      "cannot be joined",
                      stack, one);
}

static choir_status choose_rank(choir_tune_merge *m)
{
    const choir_merge_options *o = m->options;
    uint64_t sum = 0, most = 0;
    for (uint32_t i = 0; i < o->n_adapters; i++) {
        sum += m->pairs[i]->max_rank;
        if (m->pairs[i]->max_rank > most) most = m->pairs[i]->max_rank;
    }
    uint64_t rank = o->method == CHOIR_MERGE_CAT ? sum : o->rank != 0 ? o->rank : most;
    if (rank > CHOIR_ADAPTER_MAX_RANK)
        return choir_fail(CHOIR_E_INVALID,
                          "the adapters' ranks are %" PRIu64 " together, the limit is %d; svd "
                          "--rank makes less of them",
                          rank, CHOIR_ADAPTER_MAX_RANK);
    m->rank = (uint32_t)rank;
    return CHOIR_OK;
}

static choir_status plan(choir_tune_merge *m)
{
    CHOIR_TRY(read_adapters(m));
    CHOIR_TRY(list_modules(m));
    if (m->n_modules == 0)
        return choir_fail(CHOIR_E_INVALID,
                          "the adapters hold no pairs of LoRA, so there is nothing to merge");
    CHOIR_TRY(check_names(m));
    for (size_t i = 0; i < m->n_modules; i++) CHOIR_TRY(check_module(m, &m->modules[i]));
    CHOIR_TRY(check_layouts(m));
    CHOIR_TRY(choose_rank(m));
    uint64_t at = 0, bytes = choir_dtype_row_bytes(m->options->dtype, 1);
    for (size_t i = 0; i < m->n_modules; i++) {
        choir_tune_merged *t = &m->modules[i];
        uint64_t ranks = (uint64_t)t->n_experts * m->rank;
        t->a_at = at;
        t->b_at = at + ranks * t->cols * bytes;
        at = t->b_at + ranks * t->rows * bytes;
    }
    m->data_bytes = at;
    return CHOIR_OK;
}

/* One worker's arrays for one module; grown as modules want it. */
typedef struct scratch {
    float *memory;
    size_t n;
} scratch;

/* What the workers share. */
typedef struct work {
    const choir_tune_merge *merge;
    choir_save *save;
    uint64_t first_byte;
    scratch *scratches;
    atomic_size_t next, done;    /* relaxed: modules are taken, not handed over */
    _Atomic choir_status status; /* of the first that failed; its sentence is under the lock */
    pthread_mutex_t lock;
    char sentence[CHOIR_MAX_SENTENCE];
    choir_progress progress;
} work;

static choir_status read_floats(const choir_adapter_pairs *from, const choir_adapter_raw_pair *p,
                                bool b, float *out)
{
    const choir_tensor *t = b ? &p->b : &p->a;
    for (uint32_t i = 0; i < t->rows; i++) {
        float *row = out + (size_t)i * t->cols;
        choir_tensor_row(t, i, row);
        for (uint32_t j = 0; j < t->cols; j++)
            if (!isfinite(row[j]))
                return choir_fail(CHOIR_E_DATA_LOSS, "%s: tensor '%s.%s' holds NaN or infinity",
                                  from->folder, p->name,
                                  choir_adapter_pair_ending(p->embedding, b));
    }
    return CHOIR_OK;
}

/* Expert e's columns of a stacked B, and back. */
static void take_columns(const float *from, uint32_t rows, uint32_t rank, uint32_t n, uint32_t e,
                         float *to)
{
    for (uint32_t i = 0; i < rows; i++)
        for (uint32_t k = 0; k < rank; k++)
            to[(size_t)i * rank + k] = from[((size_t)i * rank + k) * n + e];
}

static void put_columns(const float *from, uint32_t rows, uint32_t rank, uint32_t n, uint32_t e,
                        float *to)
{
    for (uint32_t i = 0; i < rows; i++)
        for (uint32_t k = 0; k < rank; k++)
            to[((size_t)i * rank + k) * n + e] = from[(size_t)i * rank + k];
}

/* A module's adapters as they were read, and the room for what is made of them. */
typedef struct inputs {
    const choir_adapter_raw_pair *pairs[CHOIR_MAX_MERGE];
    const float *a[CHOIR_MAX_MERGE], *b[CHOIR_MAX_MERGE]; /* of all experts */
    float *one_b[CHOIR_MAX_MERGE];                        /* of one */
    choir_tune_source sources[CHOIR_MAX_MERGE];
    uint32_t n;
    float *out_a, *out_b, *out_one_b;
} inputs;

static size_t floats_of(const choir_tune_merge *m, const choir_tune_merged *t)
{
    size_t sides = (size_t)t->rows + t->cols, ranks = (size_t)t->sum_of_ranks + m->rank;
    return ranks * (sides * t->n_experts + t->rows);
}

static choir_status make_room(scratch *s, size_t n)
{
    if (n <= s->n) return CHOIR_OK;
    choir_free(s->memory);
    s->n = 0;
    s->memory = choir_alloc(CHOIR_MEM_TUNE, n * sizeof *s->memory);
    if (s->memory == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu numbers of a matrix", n);
    s->n = n;
    return CHOIR_OK;
}

static choir_status read_inputs(const choir_tune_merge *m, const choir_tune_merged *t,
                                scratch *room, inputs *in)
{
    CHOIR_TRY(make_room(room, floats_of(m, t)));
    float *at = room->memory;
    in->n = 0;
    for (uint32_t i = 0; i < m->options->n_adapters; i++) {
        const choir_adapter_raw_pair *p = choir_adapter_pairs_find(m->pairs[i], t->name);
        if (p == NULL) continue;
        size_t ranks = (size_t)p->n_experts * p->rank;
        CHOIR_TRY(read_floats(m->pairs[i], p, false, at));
        in->a[in->n] = at;
        at += ranks * t->cols;
        CHOIR_TRY(read_floats(m->pairs[i], p, true, at));
        in->b[in->n] = at;
        at += ranks * t->rows;
        in->one_b[in->n] = at;
        at += (size_t)p->rank * t->rows;
        in->pairs[in->n] = p;
        in->sources[in->n++] = (choir_tune_source){.rank = p->rank,
                                                   .scale = (double)p->scale,
                                                   .weight = m->options->adapters[i].weight,
                                                   .adapter = i};
    }
    in->out_a = at;
    in->out_b = in->out_a + (size_t)t->n_experts * m->rank * t->cols;
    in->out_one_b = in->out_b + (size_t)t->n_experts * m->rank * t->rows;
    return CHOIR_OK;
}

static choir_status merge_experts(const choir_tune_merge *m, const choir_tune_merged *t, inputs *in)
{
    const volatile sig_atomic_t *interrupted = m->options->interrupted;
    for (uint32_t e = 0; e < t->n_experts; e++) {
        if (interrupted != NULL && *interrupted)
            return choir_fail(CHOIR_E_CANCELLED, "interrupted");
        for (uint32_t k = 0; k < in->n; k++) {
            choir_tune_source *s = &in->sources[k];
            s->a = in->a[k] + (size_t)e * s->rank * t->cols;
            s->b = t->n_experts == 1 ? in->b[k] : in->one_b[k];
            if (t->n_experts > 1)
                take_columns(in->b[k], t->rows, s->rank, t->n_experts, e, in->one_b[k]);
        }
        const choir_tune_target target = {.name = t->name,
                                          .stream =
                                              XXH3_64bits_withSeed(t->name, strlen(t->name), e),
                                          .rows = t->rows,
                                          .cols = t->cols,
                                          .rank = m->rank,
                                          .a = in->out_a + (size_t)e * m->rank * t->cols,
                                          .b = t->n_experts == 1 ? in->out_b : in->out_one_b};
        CHOIR_TRY(choir_tune_merge_module(m->options, in->sources, in->n, &target));
        if (t->n_experts > 1)
            put_columns(in->out_one_b, t->rows, m->rank, t->n_experts, e, in->out_b);
    }
    return CHOIR_OK;
}

/* Encoded in place, which every type that is written allows: none has wider numbers than f32. */
static choir_status write_floats(const work *w, const choir_tune_merged *t, bool b, float *values,
                                 size_t n)
{
    const choir_tune_merge *m = w->merge;
    uint8_t *bytes = (uint8_t *)values;
    size_t each = choir_dtype_row_bytes(m->options->dtype, 1);
    for (size_t done = 0; done < n;) {
        float part[1024];
        uint32_t now = n - done < 1024 ? (uint32_t)(n - done) : 1024;
        memcpy(part, values + done, now * sizeof *part);
        if (!choir_tune_encode(m->options->dtype, part, now, bytes + done * each))
            return choir_fail(
                CHOIR_E_DATA_LOSS, "tensor '%s.%s': a merged weight is too large for %s", t->name,
                choir_adapter_pair_ending(t->embedding, b), choir_dtype_text(m->options->dtype));
        done += now;
    }
    return choir_save_write_at(w->save, w->first_byte + (b ? t->b_at : t->a_at), bytes, n * each);
}

static choir_status merge_one(const work *w, const choir_tune_merged *t, scratch *room)
{
    const choir_tune_merge *m = w->merge;
    inputs in;
    CHOIR_TRY(read_inputs(m, t, room, &in));
    CHOIR_TRY(merge_experts(m, t, &in));
    size_t ranks = (size_t)t->n_experts * m->rank;
    CHOIR_TRY(write_floats(w, t, false, in.out_a, ranks * t->cols));
    return write_floats(w, t, true, in.out_b, ranks * t->rows);
}

static void keep_failure(work *w, choir_status status)
{
    pthread_mutex_lock(&w->lock);
    if (atomic_load(&w->status) == CHOIR_OK) {
        snprintf(w->sentence, sizeof w->sentence, "%s", choir_error_message());
        atomic_store(&w->status, status);
    }
    pthread_mutex_unlock(&w->lock);
}

static void merge_modules(void *arg, uint32_t worker, uint32_t n_workers)
{
    work *w = arg;
    (void)n_workers;
    for (;;) {
        size_t i = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (i >= w->merge->n_modules || atomic_load(&w->status) != CHOIR_OK) return;
        choir_status status = merge_one(w, &w->merge->modules[i], &w->scratches[worker]);
        if (status != CHOIR_OK) {
            keep_failure(w, status);
            return;
        }
        size_t done = atomic_fetch_add_explicit(&w->done, 1, memory_order_relaxed) + 1;
        if (worker == 0) choir_progress_update(&w->progress, done);
    }
}

static uint32_t workers_of(const choir_tune_merge *m)
{
    uint64_t most = 1;
    for (size_t i = 0; i < m->n_modules; i++) {
        const choir_tune_merged *t = &m->modules[i];
        uint64_t bytes = floats_of(m, t) * sizeof(float) +
                         choir_tune_merge_module_bytes(m->options->method, t->rows, t->cols,
                                                       t->sum_of_ranks, m->rank);
        if (bytes > most) most = bytes;
    }
    uint64_t n = m->options->n_threads != 0 ? m->options->n_threads : choir_workers_best();
    if (n > m->n_modules) n = m->n_modules;
    if (n > max_scratch / most) n = max_scratch / most;
    return n < 1 ? 1 : (uint32_t)n;
}

static choir_status run_workers(work *w, uint32_t n_workers)
{
    choir_workers *workers;
    char what[128];
    const char *slash = strrchr(w->merge->options->out, '/');
    snprintf(what, sizeof what, "merging into %.100s",
             slash == NULL || slash[1] == '\0' ? w->merge->options->out : slash + 1);
    CHOIR_TRY(choir_workers_create(n_workers, &workers));
    choir_progress_begin(&w->progress, what, CHOIR_PROGRESS_ITEMS, w->merge->n_modules);
    w->progress.quiet = !w->merge->options->show_progress;
    choir_workers_run(workers, merge_modules, w);
    choir_progress_end(&w->progress);
    choir_workers_destroy(workers);
    choir_status status = atomic_load(&w->status);
    return status == CHOIR_OK ? CHOIR_OK : choir_fail(status, "%s", w->sentence);
}

choir_status choir_tune_merge_write(const choir_tune_merge *m, uint64_t first_byte,
                                    choir_save *save)
{
    uint32_t n_workers = workers_of(m);
    work w = {.merge = m, .save = save, .first_byte = first_byte};
    w.scratches = choir_calloc(CHOIR_MEM_TUNE, n_workers, sizeof *w.scratches);
    if (w.scratches == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for merging");
    pthread_mutex_init(&w.lock, NULL);
    choir_status status = run_workers(&w, n_workers);
    pthread_mutex_destroy(&w.lock);
    for (uint32_t i = 0; i < n_workers; i++) choir_free(w.scratches[i].memory);
    choir_free(w.scratches);
    return status;
}

choir_status choir_merge(const choir_merge_options *options, choir_merge_result *out)
{
    choir_tune_merge m = {.options = options};
    choir_status status;
    CHOIR_TRY_TO(done, status, check_options(options));
    CHOIR_TRY_TO(done, status, plan(&m));
    CHOIR_TRY_TO(done, status, choir_tune_merge_save(&m));
    *out = (choir_merge_result){.rank = m.rank, .n_modules = m.n_modules, .bytes = m.data_bytes};
done:
    choir_free(m.modules);
    for (uint32_t i = 0; i < CHOIR_MAX_MERGE; i++) choir_adapter_pairs_close(m.pairs[i]);
    return status;
}
