#include "engine/state.h"

#include <string.h>

static choir_status check_config(const choir_model_config *c)
{
    if (choir_key_dim(c) > CHOIR_MAX_HEAD_DIM)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "a head's key has %u numbers, the limit is %d",
                          choir_key_dim(c), CHOIR_MAX_HEAD_DIM);
    return CHOIR_OK;
}

static choir_status check_options(choir_engine_options *o)
{
    if (o->level == CHOIR_CPU_N_LEVELS) o->level = choir_cpu_best_level();
    if (choir_kernels_at(o->level) == NULL)
        return choir_fail(
            CHOIR_E_PRECONDITION, "this CPU (or build) lacks what %s kernels need; its best are %s",
            choir_cpu_level_text(o->level), choir_cpu_level_text(choir_cpu_best_level()));
    if (o->n_threads == 0) o->n_threads = choir_workers_best();
    if (o->max_rows == 0 || o->max_rows > 65536)
        return choir_fail(CHOIR_E_INVALID, "max_rows is %u, must be 1 to 65536", o->max_rows);
    if (o->max_spans == 0 || o->max_spans > o->max_rows)
        return choir_fail(CHOIR_E_INVALID, "max_spans is %u, must be 1 to max_rows (%u)",
                          o->max_spans, o->max_rows);
    if (!(o->small_experts >= 0 && o->small_experts <= 1))
        return choir_fail(CHOIR_E_INVALID, "small_experts is %g, must be a share from 0 to 1",
                          o->small_experts);
    return CHOIR_OK;
}

static choir_status open_template(choir_engine *e, const choir_model_file *file)
{
    const char *source = choir_model_file_chat_template(file);
    if (source == NULL) return CHOIR_OK;
    choir_status status = choir_chat_template_compile(source, strlen(source), &e->chat_template);
    if (status == CHOIR_OK || status == CHOIR_E_NO_MEMORY) return status;
    /* Text and token prompts still work without it. */
    choir_log(CHOIR_LOG_WARNING, "%s: chat is off, its template does not compile: %s", e->path,
              choir_error_message());
    return CHOIR_OK;
}

static choir_status open_from(choir_engine *e, const choir_model_file *file)
{
    e->config = *choir_model_file_config(file);
    e->file_bytes = choir_model_file_bytes(file);
    CHOIR_TRY(check_config(&e->config));
    CHOIR_TRY(check_options(&e->options));
    e->kernels = choir_kernels_at(e->options.level);
    choir_tokenizer *tokenizer;
    CHOIR_TRY(choir_tokenizer_open(file, &tokenizer));
    e->tokenizer = tokenizer;
    CHOIR_TRY(open_template(e, file));
    CHOIR_TRY(choir_workers_create(e->options.n_threads, &e->workers));
    e->n_threads = choir_workers_count(e->workers);
    CHOIR_TRY(choir_small_plan(e, file));
    CHOIR_TRY(choir_budget_plan(e, file));
    CHOIR_TRY(choir_engine_load_weights(e, file));
    CHOIR_TRY(choir_rope_create(e, file));
    CHOIR_TRY(choir_kv_create(e));
    return choir_step_create(e);
}

choir_status choir_engine_open(const char *path, const choir_engine_options *options,
                               choir_engine **out)
{
    choir_engine *e = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *e);
    choir_model_file *file = NULL;
    choir_status status = CHOIR_OK;
    if (e == NULL || (e->path = choir_strdup(CHOIR_MEM_OTHER, path)) == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory to open %s", path);
        goto fail;
    }
    e->options = *options;
    e->forced_expert = -1;
    CHOIR_TRY_TO(fail, status, choir_model_file_open(path, &file));
    CHOIR_TRY_TO(fail, status, open_from(e, file));
    if (e->options.exact)
        e->file = file;
    else
        choir_model_file_close(file);
    *out = e;
    return CHOIR_OK;
fail:
    choir_engine_close(e);
    choir_model_file_close(file);
    return status;
}

void choir_engine_close(choir_engine *e)
{
    if (e == NULL) return;
    choir_adapters_destroy(e->adapters);
    choir_page_cache_destroy(e->adapter_pages);
    choir_workers_destroy(e->workers);
    choir_step_destroy(e);
    choir_free_pages(CHOIR_MEM_KV, e->kv, e->kv_bytes);
    choir_engine_free_weights(e);
    choir_chat_template_destroy(e->chat_template);
    choir_tokenizer_destroy(e->tokenizer);
    choir_model_file_close(e->file);
    choir_free(e->path);
    choir_free(e);
}

const choir_model_config *choir_engine_config(const choir_engine *e)
{
    return &e->config;
}
const choir_tokenizer *choir_engine_tokenizer(const choir_engine *e)
{
    return e->tokenizer;
}
const choir_kernels *choir_engine_kernels(const choir_engine *e)
{
    return e->kernels;
}
uint32_t choir_engine_n_threads(const choir_engine *e)
{
    return e->n_threads;
}
uint32_t choir_engine_max_rows(const choir_engine *e)
{
    return e->options.max_rows;
}
uint32_t choir_engine_max_spans(const choir_engine *e)
{
    return e->options.max_spans;
}
uint32_t choir_engine_n_pages(const choir_engine *e)
{
    return e->n_pages;
}
size_t choir_engine_page_bytes(const choir_engine *e)
{
    return e->page_bytes;
}
const char *choir_engine_path(const choir_engine *e)
{
    return e->path;
}

uint64_t choir_engine_digest(const choir_engine *e)
{
    return e->digest;
}

const choir_chat_template *choir_engine_chat_template(const choir_engine *e)
{
    return e->chat_template;
}

void choir_engine_copy_page(choir_engine *e, uint32_t from, uint32_t to)
{
    CHOIR_ASSERT(from < e->n_pages && to < e->n_pages);
    memcpy(e->kv + to * e->page_bytes, e->kv + from * e->page_bytes, e->page_bytes);
}

void choir_engine_zero_page(choir_engine *e, uint32_t page)
{
    CHOIR_ASSERT(page < e->n_pages);
    memset(e->kv + page * e->page_bytes, 0, e->page_bytes);
}

uint64_t choir_engine_n_steps(const choir_engine *e)
{
    return atomic_load_explicit(&e->n_steps, memory_order_acquire);
}

choir_status choir_engine_force_expert(choir_engine *e, int32_t expert)
{
    if (expert >= 0 && e->config.n_experts == 0)
        return choir_fail(CHOIR_E_PRECONDITION, "%s is a dense model, it has no experts to force",
                          e->config.name);
    if (expert >= (int32_t)e->config.n_experts)
        return choir_fail(CHOIR_E_INVALID, "expert %d, the model has %u", expert,
                          e->config.n_experts);
    e->forced_expert = expert;
    return CHOIR_OK;
}

choir_engine_sizes choir_engine_memory(const choir_engine *e)
{
    return (choir_engine_sizes){.weight_bytes = e->weight_bytes,
                                .expert_bytes = choir_experts_bytes(e->experts),
                                .kv_bytes = e->kv_bytes,
                                .scratch_bytes = e->scratch_bytes,
                                .file_bytes = e->file_bytes};
}

choir_experts_stats choir_engine_expert_stats(const choir_engine *e)
{
    choir_experts_stats stats;
    choir_experts_get_stats(e->experts, &stats);
    return stats;
}

uint32_t choir_engine_n_experts_pinned(const choir_engine *e)
{
    return choir_experts_n_pinned(e->experts);
}

float choir_engine_expert_heat(const choir_engine *e, uint32_t layer_index, uint32_t expert)
{
    return choir_experts_heat(e->experts, layer_index, expert);
}
