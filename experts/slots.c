/* Slots: their states, their memory, and who has to go. */
#include "experts/store.h"

static const char *const state_texts[] = {"FREE", "LOADING", "ARRIVED", "READY"};

void slot_move(choir_experts *store, slot *s, slot_state to)
{
    static const bool legal[4][4] = {
        [SLOT_FREE] = {[SLOT_LOADING] = true},
        [SLOT_LOADING] = {[SLOT_ARRIVED] = true, [SLOT_FREE] = true},
        [SLOT_ARRIVED] = {[SLOT_READY] = true, [SLOT_LOADING] = true, [SLOT_FREE] = true},
        [SLOT_READY] = {[SLOT_FREE] = true},
    };
    if (!legal[s->state][to])
        choir_log(CHOIR_LOG_ERROR, "a slot from %s to %s", state_texts[s->state], state_texts[to]);
    CHOIR_ASSERT(legal[s->state][to]);
    entry *e = &store->entries[s->entry];
    if (to == SLOT_LOADING) s->generation++;
    if (to == SLOT_READY) choir_expert_place_run(&e->expert, s->data);
    if (to == SLOT_FREE) {
        e->expert.gate.data = e->expert.up.data = e->expert.down.data = NULL;
        e->slot = NONE;
        store->n_slots_used--;
        store->free_slots[store->n_free_slots++] = (uint32_t)(s - store->slots);
    }
    s->state = to;
}

void entry_pin(choir_experts *store, entry *e)
{
    if (e->n_pins++ == 0) store->n_pinned++;
}

void entry_unpin(choir_experts *store, entry *e)
{
    CHOIR_ASSERT(e->n_pins > 0);
    if (--e->n_pins == 0) store->n_pinned--;
}

static bool may_go(const choir_experts *store, const slot *s)
{
    return (s->state == SLOT_READY || s->state == SLOT_ARRIVED) &&
           store->entries[s->entry].n_pins == 0;
}

static double value_of(const choir_experts *store, const slot *s)
{
    return choir_policy_value(store->policy, s->entry / store->n_experts,
                              s->entry % store->n_experts);
}

static bool colder(victim a, victim b)
{
    return a.value != b.value ? a.value < b.value : a.slot < b.slot;
}

/* Insertion into a short list: few are needed of many. */
uint32_t slots_find_victims(choir_experts *store, uint32_t most)
{
    uint32_t n = 0, n_slots = store->max_slabs * store->slots_per_slab;
    victim *v = store->victims;
    for (uint32_t i = 0; i < n_slots && most > 0; i++) {
        if (!may_go(store, &store->slots[i])) continue;
        victim next = {value_of(store, &store->slots[i]), i};
        if (n == most && !colder(next, v[n - 1])) continue;
        uint32_t at = n < most ? n++ : n - 1;
        for (; at > 0 && colder(next, v[at - 1]); at--) v[at] = v[at - 1];
        v[at] = next;
    }
    return n;
}

/* True: a further slab is held, and its slots are free. */
static bool add_slab(choir_experts *store)
{
    if (store->n_slabs_held >= store->n_slabs_allowed) return false;
    uint32_t i = 0;
    while (store->slabs[i].data != NULL) i++;
    slab *b = &store->slabs[i];
    b->data = choir_alloc_pages(CHOIR_MEM_EXPERTS, store->slab_bytes);
    if (b->data == NULL) return false; /* what is held must do */
    store->disk->use_memory(store->disk, b->data, store->slab_bytes, true);
    store->n_slabs_held++;
    for (uint32_t j = store->slots_per_slab; j-- > 0;) {
        uint32_t number = i * store->slots_per_slab + j;
        store->slots[number].slab = i;
        store->slots[number].data = b->data + j * store->slot_bytes;
        store->slots[number].staging = NONE;
        store->free_slots[store->n_free_slots++] = number;
    }
    return true;
}

void slot_evict(choir_experts *store, slot *s)
{
    CHOIR_ASSERT(may_go(store, s));
    if (s->speculative) guess_was_wrong(store, s);
    load_end_staging(store, s);
    slot_move(store, s, SLOT_FREE);
}

bool slots_evict_next(choir_experts *store, uint32_t *at, uint32_t n)
{
    while (*at < n) {
        slot *s = &store->slots[store->victims[(*at)++].slot];
        if (!may_go(store, s)) continue; /* gone meanwhile, with its slab */
        slot_evict(store, s);
        return true;
    }
    return false;
}

bool slots_free_staging(choir_experts *store)
{
    uint32_t n_slots = store->max_slabs * store->slots_per_slab;
    for (uint32_t i = 0; i < n_slots; i++) {
        slot *s = &store->slots[i];
        if (s->state != SLOT_ARRIVED || s->staging == NONE || !may_go(store, s)) continue;
        slot_evict(store, s);
        return true;
    }
    return false;
}

slot *slots_take_free(choir_experts *store)
{
    if (store->slot_limit > 0 && store->n_slots_used >= store->slot_limit) return NULL;
    if (store->n_slabs_held > store->n_slabs_allowed) return NULL; /* what becomes free goes back */
    if (store->n_free_slots == 0 && !add_slab(store)) return NULL;
    slot *s = &store->slots[store->free_slots[--store->n_free_slots]];
    store->n_slots_used++;
    return s;
}

static void drop_slab(choir_experts *store, uint32_t i)
{
    slab *b = &store->slabs[i];
    uint32_t n = 0;
    for (uint32_t j = 0; j < store->n_free_slots; j++)
        if (store->slots[store->free_slots[j]].slab != i)
            store->free_slots[n++] = store->free_slots[j];
    store->n_free_slots = n;
    store->disk->use_memory(store->disk, b->data, store->slab_bytes, false);
    choir_free_pages(CHOIR_MEM_EXPERTS, b->data, store->slab_bytes);
    *b = (slab){0};
    store->n_slabs_held--;
}

/* What a slab's experts are worth together; false: one of them has to stay. */
static bool slab_value(const choir_experts *store, uint32_t i, double *value)
{
    *value = 0;
    for (uint32_t j = 0; j < store->slots_per_slab; j++) {
        const slot *s = &store->slots[i * store->slots_per_slab + j];
        if (s->state == SLOT_FREE) continue;
        if (!may_go(store, s)) return false;
        *value += value_of(store, s);
    }
    return true;
}

void slots_shrink(choir_experts *store)
{
    while (store->n_slabs_held > store->n_slabs_allowed) {
        int64_t best = NONE;
        double least = 0, value;
        for (uint32_t i = 0; i < store->max_slabs; i++) {
            if (store->slabs[i].data == NULL || !slab_value(store, i, &value)) continue;
            if (best == NONE || value < least) {
                best = i;
                least = value;
            }
        }
        if (best == NONE) return;
        for (uint32_t j = 0; j < store->slots_per_slab; j++) {
            slot *s = &store->slots[(uint32_t)best * store->slots_per_slab + j];
            if (s->state != SLOT_FREE) slot_evict(store, s);
        }
        drop_slab(store, (uint32_t)best);
    }
}
