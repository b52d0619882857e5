#include "tune/weights.h"

#include "engine/families/families.h"
#include "tune/encode.h"

#include <libgen.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>

enum { WRITE_BYTES = 4 << 20 };

/* An expert's matrix is the base's MLP matrix with one of the adapter's parts. */
static bool expert_part(choir_role role, choir_role *base_role, uint32_t *part)
{
    static const struct {
        choir_role expert, base;
        uint32_t part;
    } parts[] = {
        {CHOIR_ROLE_EXPERT_GATE, CHOIR_ROLE_FFN_GATE, CHOIR_TUNE_GATE},
        {CHOIR_ROLE_EXPERT_UP, CHOIR_ROLE_FFN_UP, CHOIR_TUNE_UP},
        {CHOIR_ROLE_EXPERT_DOWN, CHOIR_ROLE_FFN_DOWN, CHOIR_TUNE_DOWN},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (parts[i].expert == role) {
            *base_role = parts[i].base;
            *part = parts[i].part;
            return true;
        }
    return false;
}

/* Where the row of halves lies among rows of pairs: row h d + j d/2 + i comes from h d + 2 i + j.
 */
static uint32_t row_of_pairs(uint32_t row, uint32_t head_dim)
{
    uint32_t in_head = row % head_dim, half = head_dim / 2;
    return row - in_head + 2 * (in_head % half) + in_head / half;
}

choir_status choir_tune_row(const choir_tune_moe *moe, const choir_tune_tensor *t, uint32_t expert,
                            uint32_t row, float *out)
{
    if (t->role == CHOIR_ROLE_ROUTER) {
        size_t at = (size_t)t->layer * moe->n_experts + row;
        memcpy(out, moe->gates + at * t->cols, t->cols * sizeof *out);
        return CHOIR_OK;
    }
    choir_role role = t->role;
    uint32_t part = CHOIR_TUNE_N_PARTS;
    bool routed = expert_part(t->role, &role, &part);
    choir_tensor base;
    CHOIR_TRY(choir_model_file_tensor(moe->base, role, t->layer, 0, &base));
    choir_tensor_row(&base, t->split_halves ? row_of_pairs(row, moe->config->head_dim) : row, out);
    const choir_tune_adapter *a = &moe->adapters[expert];
    if (routed && a->loras != NULL)
        choir_tune_lora_add(&a->loras[(size_t)t->layer * CHOIR_TUNE_N_PARTS + part], row, t->cols,
                            out);
    return CHOIR_OK;
}

static void expand(const char *pattern, uint32_t layer, uint32_t expert, char *out, size_t bytes)
{
    size_t n = 0;
    for (const char *p = pattern; *p != '\0' && n + 12 < bytes; p++) {
        if (p[0] == '%' && (p[1] == 'l' || p[1] == 'e'))
            n += (size_t)snprintf(out + n, bytes - n, "%u", *++p == 'l' ? layer : expert);
        else
            out[n++] = *p;
    }
    out[n] = '\0';
}

typedef struct planner {
    const choir_tune_moe *moe;
    choir_dtype dtype;
    bool gguf;
    choir_tune_plan *plan;
} planner;

static choir_status add_tensor(planner *p, choir_tune_tensor t, const choir_tensor *base)
{
    choir_tune_plan *plan = p->plan;
    if (plan->n == plan->capacity) {
        size_t capacity = plan->capacity == 0 ? 256 : 2 * plan->capacity;
        void *items = choir_realloc(CHOIR_MEM_TUNE, plan->items, capacity * sizeof *plan->items);
        if (items == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a list of tensors");
        plan->items = items;
        plan->capacity = capacity;
    }
    bool quantised = choir_dtype_block_elements(p->dtype) > 1;
    t.dtype = t.vector || t.role == CHOIR_ROLE_ROUTER ? CHOIR_F32 : p->dtype;
    if (base != NULL && p->gguf && quantised && choir_dtype_block_elements(base->dtype) > 1) {
        t.as_it_lies = true;
        t.dtype = base->dtype;
    }
    const choir_family *mixtral = choir_family_of_model_type("mixtral");
    expand(choir_family_place(mixtral, t.role, p->gguf, 0)->name, t.layer, t.first_expert, t.name,
           sizeof t.name);
    if (t.cols % choir_dtype_block_elements(t.dtype) != 0)
        return choir_fail(CHOIR_E_INVALID, "tensor '%s' has rows of %u, which %s cuts into %u",
                          t.name, t.cols, choir_dtype_text(t.dtype),
                          choir_dtype_block_elements(t.dtype));
    t.bytes = (uint64_t)t.n_slices * t.rows * choir_dtype_row_bytes(t.dtype, t.cols);
    plan->bytes += t.bytes;
    plan->items[plan->n++] = t;
    return CHOIR_OK;
}

static choir_status add_from_base(planner *p, choir_role role, uint32_t layer, bool vector)
{
    choir_tensor base;
    CHOIR_TRY(choir_model_file_tensor(p->moe->base, role, layer, 0, &base));
    choir_tune_tensor t = {.role = role,
                           .layer = layer,
                           .n_slices = 1,
                           .rows = base.rows,
                           .cols = base.cols,
                           .vector = vector};
    t.split_halves = !p->gguf && p->moe->config->rope.interleaved &&
                     (role == CHOIR_ROLE_ATTN_Q || role == CHOIR_ROLE_ATTN_K);
    return add_tensor(p, t, vector ? NULL : &base);
}

static choir_status add_experts(planner *p, choir_role role, uint32_t layer)
{
    const choir_model_config *c = p->moe->config;
    bool down = role == CHOIR_ROLE_EXPERT_DOWN;
    choir_tune_tensor t = {.role = role,
                           .layer = layer,
                           .rows = down ? c->hidden : c->ffn_hidden,
                           .cols = down ? c->ffn_hidden : c->hidden};
    t.n_slices = p->gguf ? p->moe->n_experts : 1;
    for (uint32_t e = 0; e < p->moe->n_experts; e += t.n_slices) {
        t.first_expert = e;
        CHOIR_TRY(add_tensor(p, t, NULL));
    }
    return CHOIR_OK;
}

static choir_status add_layer(planner *p, uint32_t layer)
{
    const choir_tune_tensor router = {.role = CHOIR_ROLE_ROUTER,
                                      .layer = layer,
                                      .n_slices = 1,
                                      .rows = p->moe->n_experts,
                                      .cols = p->moe->config->hidden};
    CHOIR_TRY(add_from_base(p, CHOIR_ROLE_ATTN_NORM, layer, true));
    CHOIR_TRY(add_from_base(p, CHOIR_ROLE_ATTN_Q, layer, false));
    CHOIR_TRY(add_from_base(p, CHOIR_ROLE_ATTN_K, layer, false));
    CHOIR_TRY(add_from_base(p, CHOIR_ROLE_ATTN_V, layer, false));
    CHOIR_TRY(add_from_base(p, CHOIR_ROLE_ATTN_OUT, layer, false));
    CHOIR_TRY(add_from_base(p, CHOIR_ROLE_FFN_NORM, layer, true));
    CHOIR_TRY(add_tensor(p, router, NULL));
    CHOIR_TRY(add_experts(p, CHOIR_ROLE_EXPERT_GATE, layer));
    CHOIR_TRY(add_experts(p, CHOIR_ROLE_EXPERT_UP, layer));
    return add_experts(p, CHOIR_ROLE_EXPERT_DOWN, layer);
}

choir_status choir_tune_plan_make(const choir_tune_moe *moe, choir_dtype dtype, bool gguf,
                                  choir_tune_plan *out)
{
    planner p = {moe, dtype, gguf, out};
    *out = (choir_tune_plan){0};
    choir_status status;
    CHOIR_TRY_TO(fail, status, add_from_base(&p, CHOIR_ROLE_EMBEDDING, 0, false));
    if (gguf && choir_role_in_layer(moe->config, CHOIR_ROLE_ROPE_FACTORS, 0))
        CHOIR_TRY_TO(fail, status, add_from_base(&p, CHOIR_ROLE_ROPE_FACTORS, 0, true));
    for (uint32_t l = 0; l < moe->config->n_layers; l++)
        CHOIR_TRY_TO(fail, status, add_layer(&p, l));
    CHOIR_TRY_TO(fail, status, add_from_base(&p, CHOIR_ROLE_OUTPUT_NORM, 0, true));
    if (!moe->config->tied_head)
        CHOIR_TRY_TO(fail, status, add_from_base(&p, CHOIR_ROLE_HEAD, 0, false));
    return CHOIR_OK;
fail:
    choir_tune_plan_free(out);
    return status;
}

void choir_tune_plan_free(choir_tune_plan *plan)
{
    choir_free(plan->items);
    *plan = (choir_tune_plan){0};
}

choir_status choir_tune_writer_create(const choir_tune_moe *moe, const choir_tune_plan *plan,
                                      uint32_t n_threads, choir_tune_writer *out)
{
    *out = (choir_tune_writer){.moe = moe};
    size_t longest_bytes = WRITE_BYTES;
    for (size_t i = 0; i < plan->n; i++) {
        const choir_tune_tensor *t = &plan->items[i];
        size_t row_bytes = choir_dtype_row_bytes(t->dtype, t->cols);
        if (t->cols > out->longest) out->longest = t->cols;
        if (row_bytes > longest_bytes) longest_bytes = row_bytes;
    }
    choir_status status = choir_workers_create(n_threads, &out->workers);
    if (status != CHOIR_OK) return status;
    out->bytes = choir_alloc(CHOIR_MEM_TUNE, longest_bytes);
    out->rows = choir_calloc(CHOIR_MEM_TUNE, (size_t)n_threads * out->longest, sizeof *out->rows);
    if (out->bytes == NULL || out->rows == NULL) {
        choir_tune_writer_destroy(out);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a writer's %zu bytes", longest_bytes);
    }
    return CHOIR_OK;
}

void choir_tune_writer_destroy(choir_tune_writer *writer)
{
    choir_workers_destroy(writer->workers);
    choir_free(writer->bytes);
    choir_free(writer->rows);
    *writer = (choir_tune_writer){0};
}

typedef struct chunk {
    choir_tune_writer *writer;
    const choir_tune_tensor *tensor;
    uint32_t expert, first_row, n_rows;
    atomic_bool bad; /* relaxed: read after the run, which is a meeting */
} chunk;

static void encode_rows(void *arg, uint32_t worker, uint32_t n_workers)
{
    chunk *c = arg;
    const choir_tune_tensor *t = c->tensor;
    float *row = c->writer->rows + (size_t)worker * c->writer->longest;
    size_t row_bytes = choir_dtype_row_bytes(t->dtype, t->cols);
    uint64_t begin, end;
    choir_share(c->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        uint32_t index = c->first_row + (uint32_t)i;
        if (choir_tune_row(c->writer->moe, t, c->expert, index, row) != CHOIR_OK ||
            !choir_tune_encode(t->dtype, row, t->cols, c->writer->bytes + i * row_bytes))
            atomic_store_explicit(&c->bad, true, memory_order_relaxed);
    }
}

static choir_status write_slice(choir_tune_writer *w, const choir_tune_tensor *t, uint32_t expert,
                                choir_save *save)
{
    size_t row_bytes = choir_dtype_row_bytes(t->dtype, t->cols);
    uint32_t at_once = row_bytes < WRITE_BYTES ? (uint32_t)(WRITE_BYTES / row_bytes) : 1;
    for (uint32_t row = 0; row < t->rows; row += at_once) {
        uint32_t left = t->rows - row, n = left < at_once ? left : at_once;
        chunk c = {.writer = w, .tensor = t, .expert = expert, .first_row = row, .n_rows = n};
        choir_workers_run(w->workers, encode_rows, &c);
        if (atomic_load_explicit(&c.bad, memory_order_relaxed))
            return choir_fail(
                CHOIR_E_DATA_LOSS,
                "tensor '%s': a weight of rows %u to %u (expert '%s') is NaN, infinite "
                "or too large for %s",
                t->name, row, row + n - 1, w->moe->names[expert], choir_dtype_text(t->dtype));
        CHOIR_TRY(choir_save_write(save, w->bytes, n * row_bytes));
        w->done += n * row_bytes;
        choir_progress_update(&w->progress, w->done);
    }
    return CHOIR_OK;
}

choir_status choir_tune_write(choir_tune_writer *w, const choir_tune_tensor *t, choir_save *save)
{
    if (t->as_it_lies) {
        choir_tensor base;
        CHOIR_TRY(choir_model_file_tensor(w->moe->base, t->role, t->layer, 0, &base));
        CHOIR_TRY(choir_save_write(save, base.data, base.bytes));
        w->done += base.bytes;
        choir_progress_update(&w->progress, w->done);
        return CHOIR_OK;
    }
    for (uint32_t s = 0; s < t->n_slices; s++)
        CHOIR_TRY(write_slice(w, t, t->first_expert + s, save));
    return CHOIR_OK;
}

choir_status choir_tune_check_space(const char *path, uint64_t bytes)
{
    char copy[4096], needed[16], available[16];
    struct statvfs disk;
    snprintf(copy, sizeof copy, "%s", path);
    /* A folder that is not there yet is the writer's to complain of. */
    if (statvfs(dirname(copy), &disk) != 0) return CHOIR_OK;
    uint64_t free_bytes = (uint64_t)disk.f_bavail * disk.f_frsize;
    if (free_bytes >= bytes) return CHOIR_OK;
    return choir_fail(CHOIR_E_IO, "%s needs %s, the disk has %s free", path,
                      choir_format_bytes(bytes, needed), choir_format_bytes(free_bytes, available));
}
