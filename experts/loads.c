/* The reads of slots: sent, reaped, checked, tried again. */
#include "base/checksum.h"
#include "experts/store.h"

#include <errno.h>
#include <string.h>

enum { REAP = 64 };

static uint64_t tag_of(const choir_experts *store, const slot *s)
{
    return (uint64_t)s->generation << 32 | (uint32_t)(s - store->slots);
}

static int32_t free_staging(const choir_experts *store)
{
    for (uint32_t i = 0; i < store->n_stagings; i++)
        if (!store->stagings[i].taken) return (int32_t)i;
    return NONE;
}

bool load_can_begin(const choir_experts *store, const entry *e)
{
    return e->source.packed || free_staging(store) != NONE;
}

bool loads_spare_staging(const choir_experts *store)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < store->n_stagings; i++) n += !store->stagings[i].taken;
    return 2 * n > store->n_stagings;
}

static int32_t take_staging(choir_experts *store)
{
    int32_t i = free_staging(store);
    CHOIR_ASSERT(i != NONE);
    store->stagings[i].taken = true;
    return i;
}

void load_end_staging(choir_experts *store, slot *s)
{
    if (s->staging != NONE) store->stagings[s->staging].taken = false;
    s->staging = NONE;
}

void load_begin(choir_experts *store, slot *s, uint32_t number, bool speculative)
{
    entry *e = &store->entries[number];
    CHOIR_ASSERT(e->slot == NONE && s->state == SLOT_FREE);
    s->entry = number;
    e->slot = (int32_t)(s - store->slots);
    s->tries = 0;
    s->speculative = speculative;
    s->late = false;
    s->staging = e->source.packed ? NONE : take_staging(store);
    load_again(store, s);
}

void load_again(choir_experts *store, slot *s)
{
    slot_move(store, s, SLOT_LOADING);
    s->n_extents_sent = s->n_extents_arrived = 0;
    s->error = 0;
    memset(s->parts, PART_UNCHECKED, sizeof s->parts);
    s->tries++;
    s->sent_ns = choir_clock_now();
    store->sending[store->n_sending++] = (uint32_t)(s - store->slots);
}

/* Extents are read by whole pages where the file wants that; in a staging buffer they lie behind
 * each other, each where its page begins. */
typedef struct page_range {
    uint64_t offset;
    uint32_t bytes, need, lead; /* lead: bytes before the extent's first */
} page_range;

static page_range pages_of(const choir_expert_extent *x)
{
    uint64_t begin = x->offset / CHOIR_DISK_PAGE * CHOIR_DISK_PAGE;
    uint32_t lead = (uint32_t)(x->offset - begin);
    return (page_range){begin, (uint32_t)choir_round_up(lead + x->bytes, CHOIR_DISK_PAGE),
                        lead + x->bytes, lead};
}

static uint8_t *place_of(const choir_experts *store, const slot *s, uint32_t extent)
{
    if (s->staging == NONE) return s->data;
    uint8_t *at = store->stagings[s->staging].data;
    for (uint32_t i = 0; i < extent; i++)
        at += pages_of(&store->entries[s->entry].source.extents[i]).bytes;
    return at;
}

size_t choir_expert_staged_bytes(const choir_expert_source *source)
{
    size_t bytes = 0;
    for (uint32_t i = 0; i < source->n_extents; i++) bytes += pages_of(&source->extents[i]).bytes;
    return bytes;
}

static choir_read read_of(const choir_experts *store, const slot *s, uint32_t extent)
{
    const choir_expert_extent *x = &store->entries[s->entry].source.extents[extent];
    page_range p = pages_of(x);
    return (choir_read){store->fds[x->file], p.offset, place_of(store, s, extent), p.bytes, p.need,
                        tag_of(store, s)};
}

void loads_send(choir_experts *store)
{
    uint64_t now = store->n_sending > 0 ? choir_clock_now() : 0;
    uint32_t at = 0;
    for (; at < store->n_sending && store->n_reads_in_flight < store->options.queue_depth; at++) {
        slot *s = &store->slots[store->sending[at]];
        uint32_t n = store->entries[s->entry].source.n_extents - s->n_extents_sent;
        choir_read reads[CHOIR_EXPERT_EXTENTS];
        for (uint32_t i = 0; i < n; i++) reads[i] = read_of(store, s, s->n_extents_sent + i);
        uint32_t taken = store->disk->submit(store->disk, reads, n);
        if (store->n_reads_in_flight == 0 && taken > 0) store->busy_since = now;
        if (taken > 0) store->progress_ns = now;
        store->n_reads_in_flight += taken;
        store->stats.n_reads += taken;
        s->n_extents_sent += (uint8_t)taken;
        if (taken < n) break;
    }
    memmove(store->sending, store->sending + at, (store->n_sending - at) * sizeof *store->sending);
    store->n_sending -= at;
}

static void note_latency(choir_experts *store, const slot *s, uint64_t now)
{
    uint64_t eighths = (now - s->sent_ns) / 125 + 1; /* of a microsecond */
    uint32_t bucket = 63 - (uint32_t)__builtin_clzll(eighths);
    if (bucket >= CHOIR_LATENCY_BUCKETS) bucket = CHOIR_LATENCY_BUCKETS - 1;
    store->stats.latency[bucket]++;
    store->stats.latency_ns += now - s->sent_ns;
}

/* After its last try: the expert is left alone for a while, and who pinned it learns by its
 * absence. */
void slot_fail(choir_experts *store, slot *s, const char *why)
{
    entry *e = &store->entries[s->entry];
    choir_log(CHOIR_LOG_ERROR, "expert %u of layer %u is lost for %.0f s: %s",
              s->entry % store->n_experts, s->entry / store->n_experts,
              (double)store->options.quarantine_ns / 1e9, why);
    e->quarantined_until = choir_clock_now() + store->options.quarantine_ns;
    store->stats.n_failed++;
    while (e->n_pins > 0) entry_unpin(store, e);
    if (s->speculative) guess_was_wrong(store, s);
    load_end_staging(store, s);
    slot_move(store, s, SLOT_FREE);
}

static void slot_arrive(choir_experts *store, slot *s, uint64_t now)
{
    if (s->error == 0) {
        const choir_expert_source *from = &store->entries[s->entry].source;
        for (uint32_t i = 0; i < from->n_extents; i++)
            store->stats.bytes_read += from->extents[i].bytes;
        note_latency(store, s, now);
        s->late = false; /* should its bytes be wrong, the next read of them is waited for */
        slot_move(store, s, SLOT_ARRIVED);
        return;
    }
    if (s->tries < MAX_TRIES && s->error != ENODATA) {
        store->stats.n_retries++;
        /* A failed read is read anew in full; the generation keeps the old one's echoes out. */
        slot_move(store, s, SLOT_ARRIVED);
        load_again(store, s);
        return;
    }
    slot_fail(store, s, s->error == ENODATA ? "the file ends before it" : strerror(s->error));
}

void loads_reap(choir_experts *store, uint64_t wait_ns)
{
    choir_read_done done[REAP];
    if (store->n_reads_in_flight == 0) return;
    uint32_t n = store->disk->reap(store->disk, done, REAP, wait_ns);
    if (n == 0) return;
    uint64_t now = choir_clock_now();
    store->progress_ns = now;
    store->stalled = false;
    store->n_reads_in_flight -= n;
    if (store->n_reads_in_flight == 0) store->stats.busy_ns += now - store->busy_since;
    for (uint32_t i = 0; i < n; i++) {
        slot *s = &store->slots[(uint32_t)done[i].tag];
        if (s->state != SLOT_LOADING || s->generation != done[i].tag >> 32) continue;
        const entry *e = &store->entries[s->entry];
        if (done[i].error != 0 && s->error == 0) s->error = done[i].error;
        if (++s->n_extents_arrived == e->source.n_extents) slot_arrive(store, s, now);
    }
}

void load_check(choir_experts *store, slot *s, uint32_t part)
{
    const entry *e = &store->entries[s->entry];
    choir_expert into = e->expert;
    choir_expert_place_run(&into, s->data);
    bool good;
    if (e->source.packed) {
        const choir_matrix *m = choir_expert_part(&into, part);
        good = XXH3_64bits(m->data, m->bytes) == e->source.checksums[part];
    } else {
        const uint8_t *staged[CHOIR_EXPERT_EXTENTS];
        for (uint32_t i = 0; i < e->source.n_extents; i++)
            staged[i] = place_of(store, s, i) + pages_of(&e->source.extents[i]).lead;
        good = store->options.unpack(store->options.user, s->entry / store->n_experts,
                                     s->entry % store->n_experts, part, staged, &into);
    }
    s->parts[part] = good ? PART_GOOD : PART_DAMAGED;
}
