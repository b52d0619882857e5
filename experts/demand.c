/* A layer's demand: all its experts are asked for at once, and given in the order of their arrival.
 */
#include "experts/store.h"

/* Layers share one budget by the worth of their experts; a layer whose misses are waited for longer
 * keeps more of them. Costs are followed slowly, within a factor of two. */
static void weigh_layers(choir_experts *store)
{
    double stall_ns = 0, n = 0;
    for (uint32_t l = 0; l < store->n_layers; l++) {
        stall_ns += store->miss_costs[l].stall_ns;
        n += store->miss_costs[l].n;
    }
    for (uint32_t l = 0; l < store->n_layers; l++) {
        miss_cost *c = &store->miss_costs[l];
        /* As if it had a step's worth of misses at the mean cost, so that a few do not decide. */
        double mean = n > 0 ? stall_ns / n : 0, few = store->n_experts;
        double cost = mean > 0 ? (c->stall_ns + few * mean) / (c->n + few) / mean : 1;
        choir_policy_set_layer_cost(store->policy, l,
                                    (float)(cost < 0.5 ? 0.5
                                            : cost > 2 ? 2
                                                       : cost));
        c->stall_ns *= 0.98;
        c->n *= 0.98;
    }
}

void choir_experts_step(choir_experts *store)
{
    if (store->policy == NULL) return;
    store->layer_began = 0;
    choir_policy_step(store->policy);
    weigh_layers(store);
    slots_shrink(store);
}

static bool in_quarantine(entry *e)
{
    if (e->quarantined_until != 0 && choir_clock_now() >= e->quarantined_until)
        e->quarantined_until = 0;
    return e->quarantined_until != 0;
}

/* Slots for the cold ones, as far as there are any, and as many as the disk can be asked for now:
 * what computes meanwhile gives its slot to the next, and fewer of those that stay have to go. */
static void load_cold(choir_experts *store)
{
    uint32_t n_victims = 0, at = 0;
    bool looked = false;
    slots_shrink(store);
    /* Each slab beyond the budget holds somebody who stays; until he goes, others would for
     * nothing. */
    if (store->n_slabs_held > store->n_slabs_allowed) return;
    for (uint32_t i = 0; i < store->n_wanted; i++) {
        wanted *w = &store->wanted[i];
        entry *e = entry_at(store, store->layer, w->expert);
        if (w->state != WANT_COLD || in_quarantine(e)) continue;
        uint32_t busy = choir_experts_n_in_flight(store);
        if (busy >= store->options.queue_depth) break;
        if (!load_can_begin(store, e) && !slots_free_staging(store)) break;
        slot *s = slots_take_free(store);
        while (s == NULL) {
            if (!looked) n_victims = slots_find_victims(store, store->options.queue_depth - busy);
            looked = true;
            if (!slots_evict_next(store, &at, n_victims)) return;
            s = slots_take_free(store);
        }
        load_begin(store, s, (uint32_t)(e - store->entries), false);
        entry_pin(store, e);
        w->state = WANT_AWAITED;
    }
}

void choir_experts_request(choir_experts *store, uint32_t layer, const choir_expert_use *uses,
                           uint32_t n)
{
    CHOIR_ASSERT(store->n_left == 0);
    if (store->stats.streamed) guesses_begin_layer(store, n);
    store->layer = layer;
    store->n_wanted = store->n_left = n;
    for (uint32_t i = 0; i < n; i++) {
        entry *e = entry_at(store, layer, uses[i].expert);
        store->wanted[i] = (wanted){uses[i].expert, WANT_AWAITED};
        if (e->resident) {
            entry_pin(store, e);
            continue;
        }
        choir_policy_use(store->policy, layer, uses[i].expert, uses[i].n_rows, uses[i].weight,
                         uses[i].remaining);
        if (e->slot == NONE) {
            store->stats.n_misses++;
            store->miss_costs[layer].n++;
            store->wanted[i].state = WANT_COLD;
            continue;
        }
        slot *s = &store->slots[e->slot];
        if (s->speculative) guess_was_right(store, s);
        *(s->state == SLOT_READY ? &store->stats.n_hits : &store->stats.n_late_hits) += 1;
        entry_pin(store, e);
    }
    if (!store->stats.streamed) return;
    guesses_end_layer(store, layer);
    load_cold(store);
    loads_send(store);
}

/* What is in reach now and was not given yet. */
static uint32_t give(choir_experts *store, bool unchecked, uint32_t max, uint16_t *ids)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < store->n_wanted && n < max; i++) {
        wanted *w = &store->wanted[i];
        if (w->state != WANT_AWAITED) continue;
        const entry *e = entry_at(store, store->layer, w->expert);
        if (!e->resident && e->slot == NONE) continue; /* lost */
        slot_state state = e->resident ? SLOT_READY : store->slots[e->slot].state;
        if (state != SLOT_READY && (state != SLOT_ARRIVED || !unchecked)) continue;
        w->state = WANT_GIVEN;
        ids[n++] = (uint16_t)w->expert;
    }
    store->n_left -= n;
    return n;
}

/* Whether waiting makes sense: something wanted may still come. */
static bool may_come(const choir_experts *store)
{
    for (uint32_t i = 0; i < store->n_wanted; i++) {
        const wanted *w = &store->wanted[i];
        entry *e = entry_at(store, store->layer, w->expert);
        if (w->state == WANT_AWAITED && e->slot != NONE && !store->slots[e->slot].late) return true;
        /* A cold one waits for a slot: it comes when others, which are on their way, have been. */
        if (w->state == WANT_COLD && store->n_reads_in_flight > 0 && !in_quarantine(e)) return true;
    }
    return false;
}

uint32_t choir_experts_collect(choir_experts *store, bool wait, uint32_t max, uint16_t *ids)
{
    uint64_t began = 0;
    uint32_t n = 0;
    while (store->n_left > 0) {
        if (store->stats.streamed) {
            loads_reap(store, 0);
            load_cold(store);
            loads_send(store);
        }
        n = give(store, wait, max, ids);
        if (n > 0 || !wait || store->stalled || !may_come(store)) break;
        uint64_t now = choir_clock_now();
        if (began == 0) began = now;
        uint64_t patience = store->progress_ns + store->options.stall_ns;
        if (now >= patience) {
            store->stalled = true;
            break;
        }
        loads_reap(store, patience - now);
    }
    if (began != 0) {
        uint64_t waited = choir_clock_now() - began;
        store->stats.stall_ns += waited;
        store->miss_costs[store->layer].stall_ns += (double)waited;
    }
    return n;
}

bool choir_experts_pending(const choir_experts *store)
{
    return store->n_left > 0;
}

uint32_t choir_experts_missing(choir_experts *store, choir_expert_missing *out)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < store->n_wanted; i++) {
        wanted *w = &store->wanted[i];
        if (w->state == WANT_GIVEN) continue;
        entry *e = entry_at(store, store->layer, w->expert);
        bool lost = w->state == WANT_COLD ? in_quarantine(e) : e->quarantined_until != 0;
        out[n++] =
            (choir_expert_missing){w->expert, lost ? CHOIR_E_DATA_LOSS : CHOIR_E_UNAVAILABLE};
        if (!lost) store->stats.n_late++;
        if (w->state == WANT_COLD || (!e->resident && e->slot == NONE)) continue; /* not pinned */
        if (!e->resident) store->slots[e->slot].late = store->slots[e->slot].state == SLOT_LOADING;
        entry_unpin(store, e);
    }
    store->n_wanted = store->n_left = 0;
    return n;
}

void choir_experts_check(choir_experts *store, uint32_t layer, uint32_t expert, uint32_t part)
{
    const entry *e = entry_at(store, layer, expert);
    if (!e->resident && store->slots[e->slot].state == SLOT_ARRIVED)
        load_check(store, &store->slots[e->slot], part);
}

static void want_again(choir_experts *store, uint32_t expert)
{
    for (uint32_t i = 0; i < store->n_wanted; i++)
        if (store->wanted[i].expert == expert) store->wanted[i].state = WANT_AWAITED;
    store->n_left++;
}

const choir_expert *choir_experts_admit(choir_experts *store, uint32_t layer, uint32_t expert)
{
    entry *e = entry_at(store, layer, expert);
    if (e->resident) return &e->expert;
    slot *s = &store->slots[e->slot];
    if (s->state == SLOT_READY) return &e->expert;
    bool damaged = false;
    for (int i = 0; i < CHOIR_EXPERT_PARTS; i++) {
        CHOIR_ASSERT(s->parts[i] != PART_UNCHECKED);
        damaged = damaged || s->parts[i] == PART_DAMAGED;
    }
    if (!damaged) {
        load_end_staging(store, s);
        slot_move(store, s, SLOT_READY);
        return &e->expert;
    }
    store->stats.n_damaged++;
    want_again(store, expert);
    if (s->tries < MAX_TRIES) {
        load_again(store, s);
        loads_send(store);
    } else {
        slot_fail(store, s, "its checksum is wrong");
    }
    return NULL;
}

void choir_experts_release(choir_experts *store, uint32_t layer, uint32_t expert)
{
    entry_unpin(store, entry_at(store, layer, expert));
}
