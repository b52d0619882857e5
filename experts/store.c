#include "experts/experts.h"

typedef struct entry {
    choir_expert expert;
    uint32_t n_pins; /* engine thread only */
    bool present;
} entry;

/* A layer's experts lie in one region, so that large pages are not wasted on small experts. */
typedef struct region {
    void *data;
    size_t bytes;
} region;

struct choir_experts {
    uint32_t n_layers, n_experts;
    entry *entries;  /* [n_layers, n_experts] */
    region *regions; /* [n_layers] */
    uint64_t bytes;
    uint32_t n_pinned;
};

choir_status choir_experts_create(uint32_t n_layers, uint32_t n_experts, choir_experts **out)
{
    choir_experts *store = choir_calloc(CHOIR_MEM_EXPERTS, 1, sizeof *store);
    if (store == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the expert store");
    store->n_layers = n_layers;
    store->n_experts = n_experts;
    store->entries =
        choir_calloc(CHOIR_MEM_EXPERTS, (size_t)n_layers * n_experts, sizeof *store->entries);
    store->regions = choir_calloc(CHOIR_MEM_EXPERTS, n_layers, sizeof *store->regions);
    if (store->entries == NULL || store->regions == NULL) {
        choir_experts_destroy(store);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %u experts in %u layers", n_experts,
                          n_layers);
    }
    *out = store;
    return CHOIR_OK;
}

void choir_experts_destroy(choir_experts *store)
{
    if (store == NULL) return;
    CHOIR_ASSERT(store->n_pinned == 0);
    for (uint32_t l = 0; store->regions != NULL && l < store->n_layers; l++)
        choir_free_pages(CHOIR_MEM_EXPERTS, store->regions[l].data, store->regions[l].bytes);
    choir_free(store->regions);
    choir_free(store->entries);
    choir_free(store);
}

static entry *entry_of(choir_experts *store, uint32_t layer, uint32_t expert)
{
    CHOIR_ASSERT(layer < store->n_layers && expert < store->n_experts);
    return &store->entries[(size_t)layer * store->n_experts + expert];
}

static size_t round_up_64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static size_t run_bytes(const choir_expert *expert)
{
    const choir_matrix *parts[] = {&expert->gate, &expert->up, &expert->down};
    size_t total = 0;
    for (int i = 0; i < 3; i++)
        if (parts[i]->data == NULL) total += round_up_64(parts[i]->bytes);
    return total;
}

static char *place_run(choir_expert *expert, char *at)
{
    choir_matrix *parts[] = {&expert->gate, &expert->up, &expert->down};
    for (int i = 0; i < 3; i++) {
        if (parts[i]->data != NULL) continue;
        parts[i]->data = at;
        at += round_up_64(parts[i]->bytes);
    }
    return at;
}

choir_status choir_experts_reserve(choir_experts *store, uint32_t layer, choir_expert *experts)
{
    size_t total = 0;
    for (uint32_t e = 0; e < store->n_experts; e++) total += run_bytes(&experts[e]);
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
        at = place_run(&experts[e], at);
        *entry_of(store, layer, e) = (entry){.expert = experts[e], .present = true};
    }
    store->bytes += total;
    return CHOIR_OK;
}

choir_status choir_experts_pin(choir_experts *store, uint32_t layer, uint32_t expert,
                               const choir_expert **out)
{
    entry *e = entry_of(store, layer, expert);
    if (!e->present)
        return choir_fail(CHOIR_E_NOT_FOUND, "expert %u of layer %u is not loaded", expert, layer);
    if (e->n_pins++ == 0) store->n_pinned++;
    *out = &e->expert;
    return CHOIR_OK;
}

void choir_experts_unpin(choir_experts *store, uint32_t layer, uint32_t expert)
{
    entry *e = entry_of(store, layer, expert);
    CHOIR_ASSERT(e->n_pins > 0);
    if (--e->n_pins == 0) store->n_pinned--;
}

uint64_t choir_experts_bytes(const choir_experts *store) { return store->bytes; }
uint32_t choir_experts_n_pinned(const choir_experts *store) { return store->n_pinned; }
