#include "experts/store.h"

#include <math.h>
#include <unistd.h>

enum { SLAB_BYTES = 64 << 20, MAX_STAGINGS = 16, MAX_FILES = 1024 };

choir_status choir_experts_create(const choir_experts_options *options, choir_experts **out)
{
    choir_experts *store = choir_calloc(CHOIR_MEM_EXPERTS, 1, sizeof *store);
    if (store == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the expert store");
    store->options = *options;
    store->n_layers = options->n_layers;
    store->n_experts = options->n_experts;
    store->disk = options->disk;
    size_t n = (size_t)store->n_layers * store->n_experts;
    store->entries = choir_calloc(CHOIR_MEM_EXPERTS, n, sizeof *store->entries);
    store->regions = choir_calloc(CHOIR_MEM_EXPERTS, store->n_layers, sizeof *store->regions);
    store->guesses = choir_calloc(CHOIR_MEM_EXPERTS, MAX_GUESSES, sizeof *store->guesses);
    store->wanted = choir_calloc(CHOIR_MEM_EXPERTS, store->n_experts, sizeof *store->wanted);
    store->miss_costs =
        choir_calloc(CHOIR_MEM_EXPERTS, store->n_layers, sizeof *store->miss_costs);
    if (store->entries == NULL || store->regions == NULL || store->wanted == NULL ||
        store->guesses == NULL || store->miss_costs == NULL) {
        choir_experts_destroy(store);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u experts in %u layers",
                          options->n_experts, options->n_layers);
    }
    for (size_t i = 0; i < n; i++) store->entries[i].slot = NONE;
    *out = store;
    return CHOIR_OK;
}

static void free_slots(choir_experts *store)
{
    for (uint32_t i = 0; store->slabs != NULL && i < store->max_slabs; i++)
        choir_free_pages(CHOIR_MEM_EXPERTS, store->slabs[i].data, store->slab_bytes);
    choir_free_pages(CHOIR_MEM_EXPERTS, store->staging_data,
                     store->n_stagings * store->staged_bytes);
    choir_free(store->slabs);
    choir_free(store->slots);
    choir_free(store->free_slots);
    choir_free(store->sending);
    choir_free(store->victims);
    choir_free(store->stagings);
}

void choir_experts_destroy(choir_experts *store)
{
    if (store == NULL) return;
    CHOIR_ASSERT(store->n_pinned == 0);
    if (store->disk != NULL) store->disk->close(store->disk); /* before the memory that it fills */
    for (uint32_t l = 0; store->regions != NULL && l < store->n_layers; l++)
        choir_free_pages(CHOIR_MEM_EXPERTS, store->regions[l].data, store->regions[l].bytes);
    free_slots(store);
    choir_policy_destroy(store->policy);
    for (uint32_t i = 0; i < store->n_files; i++) close(store->fds[i]);
    choir_free(store->fds);
    choir_free(store->file_bytes);
    choir_free(store->guesses);
    choir_free(store->wanted);
    choir_free(store->miss_costs);
    choir_free(store->regions);
    choir_free(store->entries);
    choir_free(store);
}

size_t choir_expert_run_bytes(const choir_expert *planned)
{
    return choir_round_up(planned->gate.bytes, 64) + choir_round_up(planned->up.bytes, 64) +
           choir_round_up(planned->down.bytes, 64);
}

void choir_expert_place_run(choir_expert *planned, void *data)
{
    uint8_t *at = data;
    planned->gate.data = at;
    planned->up.data = at + choir_round_up(planned->gate.bytes, 64);
    planned->down.data =
        at + choir_round_up(planned->gate.bytes, 64) + choir_round_up(planned->up.bytes, 64);
}

/* -- all resident -- */

/* Of an expert's parts, those that are no views lie in the region. */
static size_t own_bytes(const choir_expert *expert)
{
    const choir_matrix *parts[] = {&expert->gate, &expert->up, &expert->down};
    size_t total = 0;
    for (int i = 0; i < 3; i++)
        if (parts[i]->data == NULL) total += choir_round_up(parts[i]->bytes, 64);
    return total;
}

static char *place_own(choir_expert *expert, char *at)
{
    choir_matrix *parts[] = {&expert->gate, &expert->up, &expert->down};
    for (int i = 0; i < 3; i++) {
        if (parts[i]->data != NULL) continue;
        parts[i]->data = at;
        at += choir_round_up(parts[i]->bytes, 64);
    }
    return at;
}

choir_status choir_experts_reserve(choir_experts *store, uint32_t layer, choir_expert *experts)
{
    size_t total = 0;
    for (uint32_t e = 0; e < store->n_experts; e++) total += own_bytes(&experts[e]);
    region *r = &store->regions[layer];
    CHOIR_ASSERT(r->data == NULL);
    if (total > 0) {
        r->data = choir_alloc_pages(CHOIR_MEM_EXPERTS, total);
        if (r->data == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the experts of layer %u (%zu bytes)",
                              layer, total);
        r->bytes = total;
    }
    char *at = r->data;
    for (uint32_t e = 0; e < store->n_experts; e++) {
        at = place_own(&experts[e], at);
        *entry_at(store, layer, e) = (entry){.expert = experts[e], .slot = NONE, .resident = true};
    }
    store->resident_bytes += total;
    return CHOIR_OK;
}

const choir_expert *choir_experts_describe(const choir_experts *store, uint32_t layer, uint32_t expert)
{
    return &entry_at(store, layer, expert)->expert;
}

choir_status choir_experts_pin(choir_experts *store, uint32_t layer, uint32_t expert,
                               const choir_expert **out)
{
    entry *e = entry_at(store, layer, expert);
    if (!e->resident)
        return choir_fail(CHOIR_E_NOT_FOUND, "expert %u of layer %u is not loaded", expert, layer);
    entry_pin(store, e);
    *out = &e->expert;
    return CHOIR_OK;
}

void choir_experts_unpin(choir_experts *store, uint32_t layer, uint32_t expert)
{
    entry_unpin(store, entry_at(store, layer, expert));
}

/* -- streamed -- */

choir_status choir_experts_add_file(choir_experts *store, const char *path, uint32_t *out)
{
    int *fds = choir_realloc(CHOIR_MEM_EXPERTS, store->fds, (store->n_files + 1) * sizeof *fds);
    if (fds != NULL) store->fds = fds;
    uint64_t *bytes = choir_realloc(CHOIR_MEM_EXPERTS, store->file_bytes,
                                    (store->n_files + 1) * sizeof *bytes);
    if (bytes != NULL) store->file_bytes = bytes;
    if (fds == NULL || bytes == NULL || store->n_files == MAX_FILES)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for file %u of the experts",
                          store->n_files);
    bool direct;
    CHOIR_TRY(choir_disk_open_file(path, &fds[store->n_files], &bytes[store->n_files], &direct));
    if (!direct)
        choir_log(CHOIR_LOG_WARNING,
                  "%s lies on a file system without direct reads; they pass through the page cache",
                  path);
    *out = store->n_files++;
    return CHOIR_OK;
}

choir_status choir_experts_place(choir_experts *store, uint32_t layer, uint32_t expert,
                                 const choir_expert *planned, const choir_expert_source *source)
{
    CHOIR_ASSERT(source->n_extents >= 1 && source->n_extents <= CHOIR_EXPERT_EXTENTS);
    for (uint32_t i = 0; i < source->n_extents; i++) {
        const choir_expert_extent *x = &source->extents[i];
        uint64_t end;
        if (x->file >= store->n_files || __builtin_add_overflow(x->offset, x->bytes, &end) ||
            end > store->file_bytes[x->file])
            return choir_fail(CHOIR_E_FORMAT,
                              "expert %u of layer %u lies beyond its file's end (offset %llu)",
                              expert, layer, (unsigned long long)x->offset);
    }
    const choir_expert_extent *x = source->extents;
    if (source->packed &&
        (source->n_extents != 1 || x->offset % CHOIR_DISK_PAGE != 0 ||
         x->bytes != choir_round_up(choir_expert_run_bytes(planned), CHOIR_DISK_PAGE)))
        return choir_fail(CHOIR_E_FORMAT, "the run of expert %u of layer %u has %u bytes at %llu",
                          expert, layer, x->bytes, (unsigned long long)x->offset);
    entry *e = entry_at(store, layer, expert);
    *e = (entry){.expert = *planned, .source = *source, .slot = NONE};
    size_t run = choir_round_up(choir_expert_run_bytes(planned), CHOIR_DISK_PAGE);
    size_t staged = source->packed ? 0 : choir_expert_staged_bytes(source);
    if (run > store->slot_bytes) store->slot_bytes = run;
    if (staged > store->staged_bytes) store->staged_bytes = staged;
    store->stats.n_experts++;
    return CHOIR_OK;
}

/* A slab is a few slots, and little against the whole budget. */
static void plan_slabs(choir_experts *store, uint64_t bytes)
{
    uint64_t target = bytes / 16 < SLAB_BYTES ? bytes / 16 : SLAB_BYTES;
    uint32_t n = (uint32_t)(target / store->slot_bytes);
    store->slots_per_slab = n > 0 ? n : 1;
    store->slab_bytes = choir_pages_bytes(store->slots_per_slab * store->slot_bytes);
    store->max_slabs =
        (store->stats.n_experts + store->slots_per_slab - 1) / store->slots_per_slab;
}

uint64_t choir_experts_least_bytes(const choir_experts *store)
{
    /* Two slots: one computes while one is read. */
    return 2 * choir_pages_bytes(store->slot_bytes) + choir_pages_bytes(2 * store->staged_bytes);
}

static uint64_t staging_bytes(const choir_experts *store)
{
    return choir_pages_bytes(store->n_stagings * store->staged_bytes);
}

static uint32_t slabs_within(const choir_experts *store, uint64_t bytes)
{
    uint64_t staged = staging_bytes(store);
    uint64_t n = bytes > staged ? (bytes - staged) / store->slab_bytes : 0;
    return n > store->max_slabs ? store->max_slabs : (uint32_t)n;
}

static choir_status take_tables(choir_experts *store)
{
    size_t n_slots = (size_t)store->max_slabs * store->slots_per_slab;
    store->slabs = choir_calloc(CHOIR_MEM_EXPERTS, store->max_slabs, sizeof *store->slabs);
    store->slots = choir_calloc(CHOIR_MEM_EXPERTS, n_slots, sizeof *store->slots);
    store->free_slots = choir_calloc(CHOIR_MEM_EXPERTS, n_slots, sizeof *store->free_slots);
    store->sending = choir_calloc(CHOIR_MEM_EXPERTS, n_slots, sizeof *store->sending);
    store->victims = choir_calloc(CHOIR_MEM_EXPERTS, n_slots, sizeof *store->victims);
    store->stagings = choir_calloc(CHOIR_MEM_EXPERTS, MAX_STAGINGS, sizeof *store->stagings);
    if (store->slabs == NULL || store->slots == NULL || store->free_slots == NULL ||
        store->sending == NULL || store->victims == NULL || store->stagings == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu slots of experts", n_slots);
    for (uint32_t i = 0; i < store->n_stagings; i++)
        store->stagings[i].data = store->staging_data + i * store->staged_bytes;
    return CHOIR_OK;
}

choir_status choir_experts_start(choir_experts *store, uint64_t bytes, uint32_t max_slots)
{
    char a[16], b[16];
    CHOIR_ASSERT(store->stats.n_experts > 0);
    if (bytes < choir_experts_least_bytes(store))
        return choir_fail(CHOIR_E_INVALID,
                          "%s for experts; two of them, the least to stream with, take %s",
                          choir_format_bytes(bytes, a),
                          choir_format_bytes(choir_experts_least_bytes(store), b));
    store->n_stagings = 0;
    if (store->staged_bytes > 0) { /* an eighth of the budget at most */
        uint64_t n = bytes / 8 / store->staged_bytes;
        store->n_stagings = n < 2 ? 2 : n > MAX_STAGINGS ? MAX_STAGINGS : (uint32_t)n;
        store->staging_data =
            choir_alloc_pages(CHOIR_MEM_EXPERTS, store->n_stagings * store->staged_bytes);
        if (store->staging_data == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory to read experts into");
    }
    plan_slabs(store, bytes - staging_bytes(store));
    store->n_slabs_allowed = slabs_within(store, bytes);
    store->slot_limit = max_slots;
    CHOIR_TRY(take_tables(store));
    CHOIR_TRY(choir_policy_create(store->options.policy, store->n_layers, store->n_experts,
                                  &store->policy));
    if (store->disk == NULL)
        CHOIR_TRY(choir_disk_open(store->options.io, store->options.queue_depth, &store->disk));
    for (uint32_t i = 0; i < store->n_files; i++)
        store->disk->use_file(store->disk, store->fds[i]);
    store->guessing = store->stats.prefetching = true;
    store->stats.streamed = true;
    store->stats.io = store->disk->name;
    store->stats.policy = choir_policy_text(store->options.policy);
    store->stats.budget_bytes = bytes;
    return CHOIR_OK;
}

uint64_t choir_experts_set_budget(choir_experts *store, uint64_t bytes)
{
    if (!store->stats.streamed) return store->resident_bytes;
    uint32_t n = slabs_within(store, bytes), least = store->slots_per_slab == 1 ? 2 : 1;
    store->n_slabs_allowed = n < least ? least : n;
    store->stats.budget_bytes = bytes;
    slots_shrink(store);
    return choir_experts_bytes(store);
}

/* -- watching -- */

void choir_experts_get_stats(const choir_experts *store, choir_experts_stats *out)
{
    *out = store->stats;
    out->n_slots_used = store->n_slots_used;
    out->n_slots = store->n_slabs_allowed * store->slots_per_slab;
    if (out->n_slots > out->n_experts) out->n_slots = out->n_experts;
    if (store->slot_limit > 0 && store->slot_limit < out->n_slots) out->n_slots = store->slot_limit;
    out->held_bytes = choir_experts_bytes(store);
    if (store->n_reads_in_flight > 0) out->busy_ns += choir_clock_now() - store->busy_since;
}

double choir_experts_latency(const choir_experts_stats *stats, double share)
{
    uint64_t total = 0, below = 0;
    for (int i = 0; i < CHOIR_LATENCY_BUCKETS; i++) total += stats->latency[i];
    for (int i = 0; i < CHOIR_LATENCY_BUCKETS && total > 0; i++) {
        uint64_t here = stats->latency[i];
        double target = share * (double)total;
        if ((double)(below + here) >= target && here > 0) {
            double within = (target - (double)below) / (double)here;
            return ldexp(1 + within, i) / 8e6;
        }
        below += here;
    }
    return 0;
}

float choir_experts_heat(const choir_experts *store, uint32_t layer, uint32_t expert)
{
    return store->policy != NULL ? choir_policy_heat(store->policy, layer, expert) : 0;
}

bool choir_experts_in_reach(const choir_experts *store, uint32_t layer, uint32_t expert)
{
    const entry *e = entry_at(store, layer, expert);
    return e->resident || e->slot != NONE;
}

uint64_t choir_experts_bytes(const choir_experts *store)
{
    return store->resident_bytes + (uint64_t)store->n_slabs_held * store->slab_bytes +
           staging_bytes(store);
}

uint32_t choir_experts_n_pinned(const choir_experts *store)
{
    return store->n_pinned;
}

bool choir_experts_streamed(const choir_experts *store)
{
    return store->stats.streamed;
}

uint32_t choir_experts_n_in_flight(const choir_experts *store)
{
    return store->n_reads_in_flight + store->n_sending;
}
