/* The engine's pool of adapters: experts/adapters.h keeps names and bytes, and asks here what they
 * are. */
#include "engine/state.h"

#include <string.h>

enum { MAX_KEPT_PAGES = 64 << 20 };

static choir_adapter_source source_of(const choir_adapter_file *file)
{
    return (choir_adapter_source){.name = file->name,
                                  .config = file->config,
                                  .config_bytes = file->config_bytes,
                                  .tensors = file->tensors,
                                  .tensor_bytes = file->tensor_bytes,
                                  .lends = true};
}

static choir_status facts_of(const choir_engine *e, const choir_adapter_file *file,
                             const choir_adapter_data *data, choir_adapter_facts *out)
{
    _Static_assert(sizeof out->invocation == sizeof data->invocation, "all invocations fit");
    *out = (choir_adapter_facts){.bytes = choir_adapter_plan_bytes(e, data, e->adapter_type),
                                 .n_parameters = data->n_parameters,
                                 .sole = !choir_adapter_data_mixes(data),
                                 .max_rank = data->max_rank,
                                 .n_virtual = data->n_virtual,
                                 .n_invocation = data->n_invocation};
    if (out->bytes == 0) return choir_fail_in(CHOIR_E_UNIMPLEMENTED, "adapter %s", file->name);
    /* Headers do not tell keys and values from embeddings. */
    out->bytes += (uint64_t)data->n_virtual * e->config.n_layers * 2 * e->config.n_kv_heads *
                  e->config.head_dim * sizeof(float);
    /* While it is made, its numbers are there as f32 as well: the file's, or more where matrices
     * share some (VeRA's projections). */
    uint64_t n_numbers = 0;
    for (size_t i = 0; i < data->n_changes; i++) {
        const choir_adapter_change *c = &data->changes[i];
        n_numbers += (uint64_t)c->rank * (c->rows + c->cols);
    }
    if (n_numbers < data->n_parameters) n_numbers = data->n_parameters;
    out->load_bytes = n_numbers * sizeof(float);
    memcpy(out->kind, data->kind, sizeof out->kind);
    memcpy(out->invocation, data->invocation, sizeof out->invocation);
    for (size_t i = 0; i < data->n_changes; i++)
        out->targets |= UINT64_C(1) << data->changes[i].role;
    return CHOIR_OK;
}

static choir_status check(void *user, const choir_adapter_file *file, choir_adapter_facts *facts)
{
    const choir_engine *e = user;
    const choir_adapter_source source = source_of(file);
    choir_adapter_data *data;
    CHOIR_TRY(choir_adapter_data_check(&e->config, &source, file->file_bytes, &data));
    choir_status status = facts_of(e, file, data, facts);
    choir_adapter_data_free(data);
    return status;
}

static choir_status make(void *user, const choir_adapter_file *file, choir_adapter_made *made)
{
    const choir_engine *e = user;
    const choir_adapter_source source = source_of(file);
    choir_adapter_data *data;
    choir_adapter *adapter = NULL;
    CHOIR_TRY(choir_adapter_data_parse(&e->config, &source, &data));
    choir_status status = choir_adapter_make(e, data, e->adapter_type, e->adapter_pages, &adapter);
    choir_adapter_data_free(data);
    if (status != CHOIR_OK) return choir_fail_in(status, "adapter %s", file->name);
    *made = (choir_adapter_made){.adapter = adapter,
                                 .bytes = choir_adapter_bytes(adapter),
                                 .digest = choir_adapter_digest(adapter),
                                 .sole = !choir_adapter_mixes(adapter)};
    return CHOIR_OK;
}

static void free_one(void *user, void *adapter)
{
    (void)user;
    choir_adapter_free(adapter);
}

/* A part of the adapters' memory is kept for what is loaded next, so that no load waits for the
 * kernel to clear pages. */
static choir_status keep_pages(choir_engine *e)
{
    uint64_t bytes = e->adapter_floor / 16;
    if (bytes > MAX_KEPT_PAGES) bytes = MAX_KEPT_PAGES;
    e->adapter_pages = choir_page_cache_create(CHOIR_MEM_ADAPTERS, bytes);
    if (e->adapter_pages == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the pool of adapters");
    choir_engine_reserve_adapter_bytes(e, bytes);
    return CHOIR_OK;
}

choir_status choir_engine_open_adapters(choir_engine *e,
                                        const choir_engine_adapters_options *options)
{
    CHOIR_ASSERT(e->adapters == NULL && e->adapter_pages == NULL);
    if (e->adapter_most == 0)
        return choir_fail(CHOIR_E_INVALID,
                          "adapters have no memory: --adapter-memory is 0, or nothing is left of "
                          "the budget");
    CHOIR_TRY(keep_pages(e));
    choir_adapters_options o = CHOIR_ADAPTERS_OPTIONS_DEFAULT;
    o.pages = e->adapter_pages;
    o.budget_bytes = e->adapter_floor;
    o.most_bytes = e->adapter_most;
    o.folder = options->folder;
    o.check = check;
    o.make = make;
    o.free = free_one;
    o.user = e;
    o.io = e->options.io;
    if (e->options.io_depth > 0) o.io_depth = e->options.io_depth;
    choir_experts_stats experts = choir_engine_expert_stats(e);
    /* What was found to work for experts is asked for, so that nobody warns twice. */
    if (o.io == CHOIR_IO_AUTO && experts.io != NULL && !choir_io_parse(experts.io, &o.io))
        o.io = CHOIR_IO_AUTO;
    e->adapter_type = options->type;
    return choir_adapters_create(&o, &e->adapters);
}

choir_adapters *choir_engine_adapters(const choir_engine *e)
{
    return e->adapters;
}

size_t choir_adapter_targets_text(uint64_t targets, char *out, size_t room)
{
    size_t n = 0;
    if (room > 0) out[0] = 0;
    for (int role = 0; role < CHOIR_N_ROLES; role++) {
        if ((targets >> role & 1) == 0) continue;
        int more = snprintf(n < room ? out + n : NULL, n < room ? room - n : 0, "%s%s",
                            n > 0 ? "," : "", choir_role_text((choir_role)role));
        n += (size_t)more;
    }
    return n;
}
