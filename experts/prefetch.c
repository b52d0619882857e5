/* Reading ahead: real loads of the best guesses, only while the disk would idle, only into colder
 * slots. A right guess saves the time until it is wanted; a wrong one holds up the reads that are.
 * Whether all in all it pays is measured, and if it does not it is left alone. */
#include "experts/store.h"

#include <math.h>

/* What is wanted in a moment counts as much as so many past uses. */
enum { GUESS_WEIGHT = 4 };
enum {
    MAX_DEPTH = 8,
    BLOCK = 64,   /* layers */
    EXPLORE = 12, /* every so many blocks the other way; the second is the first */
};

static double read_ns(const choir_experts *store)
{
    const choir_experts_stats *s = &store->stats;
    return s->bytes_read > 0 && s->busy_ns > 0
               ? (double)s->busy_ns / (double)s->bytes_read * (double)store->slot_bytes
               : 0;
}

static double precision(const choir_experts *store)
{
    return (store->right + 1) / (store->right + store->wrong + 2);
}

static void note(choir_experts *store, bool right)
{
    store->right = store->right * 0.99 + right;
    store->wrong = store->wrong * 0.99 + !right;
}

static void forget(choir_experts *store, const slot *s)
{
    uint32_t number = (uint32_t)(s - store->slots);
    for (uint32_t i = 0; i < store->n_guesses; i++)
        if (store->guesses[i] == number) {
            store->guesses[i] = store->guesses[--store->n_guesses];
            return;
        }
}

void guess_was_right(choir_experts *store, slot *s)
{
    s->speculative = false;
    store->stats.n_prefetch_used++;
    note(store, true);
    forget(store, s);
}

void guess_was_wrong(choir_experts *store, slot *s)
{
    s->speculative = false;
    store->stats.n_prefetch_wasted++;
    note(store, false);
    forget(store, s);
}

/* The time that a wanted expert took, hits included, is the judge: with guesses and without, block
 * by block in turn. Whether the disk's idle time is really free (its reads may cost processors too)
 * no count of right guesses tells. Only neighbours are compared, as what is asked for changes with
 * time, and the first block not at all: memory was empty. */
static void end_block(choir_experts *store)
{
    double cost = (double)store->block_ns / (double)store->block_wanted;
    if (store->n_blocks > 1 && store->guessing != store->guessed_before && cost > 0 &&
        store->cost_before > 0) {
        double gain = log(store->guessing ? store->cost_before / cost : cost / store->cost_before);
        double part = 1.0 / (++store->n_pairs < 5 ? store->n_pairs : 5);
        store->gain += part * (gain - store->gain);
    }
    store->n_blocks++;
    store->cost_before = cost;
    store->guessed_before = store->guessing;
    bool better = store->gain >= 0;
    store->guessing = store->n_blocks % EXPLORE == 2 ? !better : better;
    store->stats.prefetching = better;
    store->block_ns = store->block_wanted = store->block_layers = 0;
}

void guesses_begin_layer(choir_experts *store, uint32_t n_wanted)
{
    uint64_t now = choir_clock_now();
    if (store->guessed_at != 0) {
        uint64_t window = now - store->guessed_at;
        store->window_ns = store->window_ns == 0 ? window : (7 * store->window_ns + window) / 8;
        store->guessed_at = 0;
    }
    if (store->layer_began != 0) { /* the first layer of a step has no time before it */
        store->block_ns += now - store->layer_began;
        store->block_wanted += store->layer_wanted;
        if (++store->block_layers >= BLOCK && store->block_wanted > 0) end_block(store);
    }
    store->layer_began = now;
    store->layer_wanted = n_wanted;
}

void guesses_end_layer(choir_experts *store, uint32_t layer)
{
    for (uint32_t i = store->n_guesses; i-- > 0;) {
        slot *s = &store->slots[store->guesses[i]];
        if (s->entry / store->n_experts == layer) guess_was_wrong(store, s);
    }
}

/* How many the disk is likely to read until the next demand; 0: not now. */
static uint32_t depth(const choir_experts *store)
{
    if (!store->guessing || store->n_slabs_held > store->n_slabs_allowed) return 0;
    double read = read_ns(store);
    uint32_t n = read > 0 ? (uint32_t)((double)store->window_ns / read) + 1 : 1;
    return n < MAX_DEPTH ? n : MAX_DEPTH;
}

/* A slot that is free, or whose expert is less likely to be wanted than the guess is. */
static slot *colder_slot(choir_experts *store, float heat, uint32_t *at, int64_t *n_victims)
{
    slot *s = slots_take_free(store);
    if (s != NULL) return s;
    if (*n_victims < 0) *n_victims = slots_find_victims(store, MAX_DEPTH);
    if (*at == *n_victims) return NULL;
    slot *coldest = &store->slots[store->victims[*at].slot];
    float least = choir_policy_heat(store->policy, coldest->entry / store->n_experts,
                                    coldest->entry % store->n_experts);
    if (least >= heat + GUESS_WEIGHT * (float)precision(store)) return NULL;
    ++*at;
    slot_evict(store, coldest);
    return slots_take_free(store);
}

uint32_t choir_experts_prefetch(choir_experts *store, uint32_t layer, const uint16_t *experts,
                                uint32_t n)
{
    uint32_t begun = 0, most = depth(store), at = 0;
    int64_t n_victims = -1;
    uint64_t now = choir_clock_now();
    store->guessed_at = now;
    for (uint32_t i = 0; i < n && begun < most && store->n_guesses < MAX_GUESSES; i++) {
        entry *e = entry_at(store, layer, experts[i]);
        if (e->resident || e->slot != NONE || e->quarantined_until != 0) continue;
        if (!e->source.packed && !loads_spare_staging(store)) break; /* demand comes first */
        slot *s = colder_slot(store, choir_policy_heat(store->policy, layer, experts[i]), &at,
                              &n_victims);
        if (s == NULL) break;
        load_begin(store, s, (uint32_t)(e - store->entries), true);
        store->guesses[store->n_guesses++] = (uint32_t)(s - store->slots);
        store->stats.n_prefetched++;
        begun++;
    }
    loads_send(store);
    return begun;
}

void choir_experts_note_prediction(choir_experts *store, uint32_t n, uint32_t n_right)
{
    store->stats.n_predicted += n;
    store->stats.n_predicted_right += n_right;
}
