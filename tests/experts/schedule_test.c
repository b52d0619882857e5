/* 100,000 random schedules against a model of the slots' states, as experts/store.h draws them, and
 * its invariants 1 to 4. The model hears the calls and what the disk was asked and has answered;
 * what the store may choose (who goes, which slot, which guess) it takes over and judges. After
 * every call all of the store's picture is compared. A failure tells its seed; `schedule_test SEED`
 * runs that one alone. */
#include "experts/store.h"
#include "tests/experts/fake_disk.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmocka.h>

enum { N_SCHEDULES = 100000 }; /* some 10 s; 25 s with sanitizers */

enum {
    N_CALLS = 40, /* of a schedule, at least */
    LAYERS = 3,
    EXPERTS = 6,
    N = LAYERS * EXPERTS,
    TRIES = 3, /* a read is tried again twice */
    MAX_SLOTS = 64,
    MAX_EVENTS = 4096,
    MAX_ECHOES = 64,
    AREA = 8 * CHOIR_DISK_PAGE, /* of the image, for each expert */
};

static const size_t part_bytes[CHOIR_EXPERT_PARTS] = {264, 72, 1304};

/* -- what the disk was asked, and what it answered -- */

typedef struct event {
    bool done; /* else submitted */
    choir_read read;
    uint64_t tag, at;
    int error;
} event;

/* The fake disk, watched; it may answer reads of earlier generations again. */
typedef struct watched_disk {
    choir_disk disk;
    fake_disk *fake;
    choir_experts *store;
    event events[MAX_EVENTS];
    uint32_t n_events, last_generation[MAX_SLOTS];
    uint64_t echoes[MAX_ECHOES];
    uint32_t n_echoes, echo_permille;
} watched_disk;

typedef struct model_entry {
    slot_state state; /* FREE: it is in no slot */
    uint32_t slot, n_pins, tries, sent, arrived;
    int error;
    bool guess, late, packed, resident;
    bool checked[CHOIR_EXPERT_PARTS], sound[CHOIR_EXPERT_PARTS];
    uint64_t quarantined_until;
} model_entry;

typedef struct model {
    model_entry entries[N];
    int32_t holder[MAX_SLOTS];
    uint32_t generation[MAX_SLOTS];
    uint32_t layer, n_wanted;
    wanted wanted[EXPERTS];
    uint64_t progress;
    bool stalled;
    uint64_t n_requested, n_hits, n_late_hits, n_failed, n_retries, n_damaged, n_late, n_submitted;
    uint64_t n_guessed, n_right, n_wrong;
} model;

/* What the call at hand may do besides what it must. */
typedef struct licence {
    bool demand, evict;
    const uint16_t *guesses;
    uint32_t n_guesses, n_begun;
} licence;

typedef struct schedule {
    uint64_t seed;
    uint32_t call;
    const char *name;
    uint32_t n_layers, n_experts;
    choir_experts *store;
    model m;
    licence may;
    double evicted[N]; /* values of those that this call evicted */
    uint32_t n_evicted;
    bool could_go[N];        /* before this call */
    bool shrinks;            /* slabs go: not the coldest alone */
    bool open;               /* a request is */
    uint16_t given[EXPERTS]; /* collected, not admitted yet */
    uint32_t n_given;
    uint32_t held[64]; /* admitted, not released yet */
    uint32_t n_held;
} schedule;

static fake_disk fake;
static watched_disk watched;
static char path[64];
static uint64_t checksums[N][CHOIR_EXPERT_PARTS];
static uint64_t seed_at_work, first_seed = 1, n_seeds = N_SCHEDULES;
static bool refuse_unpack;

/* That the schedules reach what they are for. */
static struct {
    uint64_t echoes, evictions, failures, retries, damages, given_up, late, guesses, shrinks,
        quarantines_ended, stalls, unpacked, pins;
} seen;

static CHOIR_PRINTF(2, 3) void broken(const schedule *s, const char *format, ...)
{
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fail_msg("seed %llu, call %u, %s: %s", (unsigned long long)s->seed, s->call, s->name, text);
}

#define HOLDS(s, condition)                                                                        \
    do {                                                                                           \
        if (!(condition)) broken(s, "line %d: not so: %s", __LINE__, #condition);                  \
    } while (0)

static uint64_t chance(uint64_t n)
{
    return fake_random(&fake) % n;
}

static uint32_t watched_submit(choir_disk *disk, const choir_read *reads, uint32_t n)
{
    watched_disk *w = (watched_disk *)disk;
    uint32_t taken = w->fake->disk.submit(&w->fake->disk, reads, n);
    for (uint32_t i = 0; i < taken; i++) {
        assert_true(w->n_events < MAX_EVENTS);
        w->events[w->n_events++] = (event){.read = reads[i], .tag = reads[i].tag, .at = fake_now};
        w->last_generation[(uint32_t)reads[i].tag] = (uint32_t)(reads[i].tag >> 32);
    }
    return taken;
}

static void note_done(watched_disk *w, const choir_read_done *done)
{
    assert_true(w->n_events < MAX_EVENTS);
    w->events[w->n_events++] =
        (event){.done = true, .tag = done->tag, .error = done->error, .at = fake_now};
}

static uint32_t watched_reap(choir_disk *disk, choir_read_done *done, uint32_t max,
                             uint64_t wait_ns)
{
    watched_disk *w = (watched_disk *)disk;
    uint32_t n = 0;
    if (w->n_echoes > 0 && chance(1000) < w->echo_permille) {
        uint64_t tag = w->echoes[chance(w->n_echoes)];
        if (tag >> 32 < w->last_generation[(uint32_t)tag]) {
            /* As of a read that somebody gave up: the store still counts it. */
            w->store->n_reads_in_flight++;
            done[n++] = (choir_read_done){tag, chance(2) ? EIO : 0};
            seen.echoes++;
        }
    }
    uint32_t real = w->fake->disk.reap(&w->fake->disk, done + n, max - n, n > 0 ? 0 : wait_ns);
    for (uint32_t i = 0; i < n + real; i++) note_done(w, &done[i]);
    for (uint32_t i = n; i < n + real; i++)
        w->echoes[w->n_echoes < MAX_ECHOES ? w->n_echoes++ : chance(MAX_ECHOES)] = done[i].tag;
    return n + real;
}

static void watched_memory(choir_disk *disk, void *data, size_t bytes, bool in_use)
{
    (void)disk, (void)data, (void)bytes, (void)in_use;
}

static void watched_file(choir_disk *disk, int fd)
{
    (void)disk, (void)fd;
}

static void watched_close(choir_disk *disk)
{
    (void)disk;
}

/* -- experts: a packed run at their area's start, or extents that lie across pages -- */

static choir_expert planned(void)
{
    choir_matrix m = {.layout = CHOIR_LAYOUT_W8, .rows = 8, .cols = 32};
    choir_expert x = {m, m, m};
    x.gate.bytes = part_bytes[0];
    x.up.bytes = part_bytes[1];
    x.down.bytes = part_bytes[2];
    return x;
}

static uint32_t extent_at(uint32_t extent)
{
    return CHOIR_DISK_PAGE + 4000 + extent * 4200;
}

static choir_expert_source source_of(uint32_t number, bool packed, bool halves)
{
    choir_expert_source source = {.packed = packed, .n_extents = packed ? 1 : halves ? 6 : 3};
    uint64_t area = (uint64_t)number * AREA;
    if (packed) {
        source.extents[0] = (choir_expert_extent){0, CHOIR_DISK_PAGE, area};
        memcpy(source.checksums, checksums[number], sizeof source.checksums);
        return source;
    }
    for (uint32_t i = 0; i < source.n_extents; i++) {
        uint32_t bytes = (uint32_t)part_bytes[halves ? i / 2 : i] / (halves ? 2 : 1);
        source.extents[i] = (choir_expert_extent){0, bytes, area + extent_at(i)};
    }
    return source;
}

/* Whether a part's bytes are those of the image: as they lie there, or as unpack() makes them. */
static bool is_true(const schedule *s, uint32_t number, uint32_t part, const uint8_t *data)
{
    const choir_expert_source *source = &s->store->entries[number].source;
    uint8_t *area = fake.image + (size_t)number * AREA;
    if (source->packed) {
        choir_expert x = planned();
        choir_expert_place_run(&x, area);
        return memcmp(data, choir_expert_part(&x, part)->data, part_bytes[part]) == 0;
    }
    uint32_t n_pieces = source->n_extents / CHOIR_EXPERT_PARTS;
    size_t piece = part_bytes[part] / n_pieces;
    for (size_t i = 0; i < part_bytes[part]; i++) {
        uint32_t extent = part * n_pieces + (uint32_t)(i / piece);
        if (data[i] != (area[extent_at(extent) + i % piece] ^ 0x5A)) return false;
    }
    return true;
}

static bool unpack(void *user, uint32_t layer, uint32_t expert, uint32_t part,
                   const uint8_t *const *staged, const choir_expert *into)
{
    const schedule *s = user;
    const choir_expert_source *source = &s->store->entries[layer * s->n_experts + expert].source;
    uint8_t *out = (uint8_t *)(uintptr_t)choir_expert_part(into, part)->data;
    if (refuse_unpack) return false;
    uint32_t n_pieces = source->n_extents / CHOIR_EXPERT_PARTS;
    size_t piece = part_bytes[part] / n_pieces;
    for (size_t i = 0; i < part_bytes[part]; i++)
        out[i] = staged[part * n_pieces + i / piece][i % piece] ^ 0x5A;
    return true;
}

/* -- the model: transitions -- */

static bool may_go(const model_entry *e)
{
    return (e->state == SLOT_ARRIVED || e->state == SLOT_READY) && e->n_pins == 0;
}

static bool quarantined(const model_entry *e, uint64_t now)
{
    return now < e->quarantined_until;
}

static wanted *want_of(schedule *s, uint32_t number)
{
    for (uint32_t i = 0; i < s->m.n_wanted; i++)
        if (s->m.layer * s->n_experts + s->m.wanted[i].expert == number) return &s->m.wanted[i];
    return NULL;
}

static void model_leave(schedule *s, uint32_t number)
{
    model_entry *e = &s->m.entries[number];
    if (e->guess) s->m.n_wrong++;
    s->m.holder[e->slot] = NONE;
    e->state = SLOT_FREE;
    e->guess = e->late = false;
}

static void model_evict(schedule *s, uint32_t number)
{
    model_entry *e = &s->m.entries[number];
    if (!s->may.evict) broken(s, "expert %u was evicted", number);
    if (!may_go(e))
        broken(s, "expert %u was evicted in state %d, %u pins", number, (int)e->state, e->n_pins);
    s->evicted[s->n_evicted++] =
        choir_policy_value(s->store->policy, number / s->n_experts, number % s->n_experts);
    seen.evictions++;
    model_leave(s, number);
}

static void model_try(schedule *s, model_entry *e)
{
    e->state = SLOT_LOADING;
    s->m.generation[e->slot]++;
    e->tries++;
    e->sent = e->arrived = 0;
    e->error = 0;
}

static void model_begin(schedule *s, uint32_t number, uint32_t slot_number, uint64_t now)
{
    model_entry *e = &s->m.entries[number];
    HOLDS(s, slot_number < MAX_SLOTS);
    if (s->m.holder[slot_number] != NONE) model_evict(s, (uint32_t)s->m.holder[slot_number]);
    HOLDS(s, e->state == SLOT_FREE && !e->resident);
    HOLDS(s, !quarantined(e, now));
    if (e->quarantined_until != 0) seen.quarantines_ended++;
    e->quarantined_until = 0;
    e->slot = slot_number;
    e->tries = 0;
    e->guess = s->may.guesses != NULL;
    e->late = false;
    s->m.holder[slot_number] = (int32_t)number;
    model_try(s, e);
    if (s->may.demand) {
        wanted *w = want_of(s, number);
        HOLDS(s, w != NULL && w->state == WANT_COLD);
        w->state = WANT_AWAITED;
        e->n_pins++;
        return;
    }
    HOLDS(s, s->may.guesses != NULL);
    bool offered = false;
    for (uint32_t i = 0; i < s->may.n_guesses; i++) offered |= s->may.guesses[i] == number;
    HOLDS(s, offered);
    s->may.n_begun++;
    s->m.n_guessed++;
    seen.guesses++;
}

static void model_fail(schedule *s, model_entry *e, uint64_t now)
{
    e->quarantined_until = now + s->store->options.quarantine_ns;
    e->n_pins = 0;
    s->m.n_failed++;
    seen.failures++;
    model_leave(s, (uint32_t)(e - s->m.entries));
}

static void model_done(schedule *s, const event *x)
{
    uint32_t slot_number = (uint32_t)x->tag;
    s->m.progress = x->at;
    s->m.stalled = false;
    if (s->m.holder[slot_number] == NONE) return;
    model_entry *e = &s->m.entries[s->m.holder[slot_number]];
    if (e->state != SLOT_LOADING || s->m.generation[slot_number] != x->tag >> 32) return;
    if (e->error == 0) e->error = x->error;
    if (++e->arrived < s->store->entries[e - s->m.entries].source.n_extents) return;
    memset(e->checked, 0, sizeof e->checked);
    if (e->error == 0) {
        e->state = SLOT_ARRIVED;
        e->late = false;
    } else if (e->tries < TRIES && e->error != ENODATA) {
        s->m.n_retries++;
        seen.retries++;
        model_try(s, e);
    } else {
        model_fail(s, e, x->at);
    }
}

static void model_submitted(schedule *s, const event *x)
{
    uint32_t slot_number = (uint32_t)x->tag, generation = (uint32_t)(x->tag >> 32);
    uint32_t number = (uint32_t)(x->read.offset / AREA);
    HOLDS(s, slot_number < MAX_SLOTS && number < N);
    s->m.progress = x->at;
    s->m.n_submitted++;
    model_entry *e = &s->m.entries[number];
    if (s->m.holder[slot_number] != (int32_t)number) model_begin(s, number, slot_number, x->at);
    HOLDS(s, e->state == SLOT_LOADING && s->m.generation[slot_number] == generation);
    HOLDS(s, ++e->sent <= s->store->entries[number].source.n_extents);
}

/* -- the model beside the store -- */

static uint32_t n_slots_of(const choir_experts *store)
{
    return store->max_slabs * store->slots_per_slab;
}

/* Choices that the disk did not see: loads that are queued, experts that went. */
static void take_over_choices(schedule *s)
{
    const choir_experts *store = s->store;
    for (int begun = 0; begun < 2; begun++)
        for (uint32_t i = 0; i < n_slots_of(store); i++) {
            const slot *x = &store->slots[i];
            int32_t now = x->state != SLOT_FREE ? (int32_t)x->entry : NONE;
            if (now == s->m.holder[i]) continue;
            if (begun == 0 && s->m.holder[i] != NONE) model_evict(s, (uint32_t)s->m.holder[i]);
            if (begun == 1) model_begin(s, (uint32_t)now, i, fake_now);
        }
}

static void compare_entry(schedule *s, uint32_t number)
{
    const choir_experts *store = s->store;
    const entry *e = &store->entries[number];
    const model_entry *m = &s->m.entries[number];
    HOLDS(s, e->n_pins == m->n_pins);
    HOLDS(s, (m->quarantined_until > fake_now) == (e->quarantined_until > fake_now));
    HOLDS(s, choir_experts_in_reach(store, number / s->n_experts, number % s->n_experts) ==
                 (m->resident || m->state != SLOT_FREE));
    if (m->resident) {
        HOLDS(s, e->resident && e->slot == NONE && e->expert.gate.data != NULL);
        return;
    }
    HOLDS(s, (m->state == SLOT_READY) == (e->expert.gate.data != NULL));
    if (m->state == SLOT_FREE) {
        HOLDS(s, e->slot == NONE);
        return;
    }
    HOLDS(s, e->slot == (int32_t)m->slot);
    const slot *x = &store->slots[e->slot];
    HOLDS(s, x->state == m->state && x->entry == number);
    HOLDS(s, x->generation == s->m.generation[m->slot] && x->tries == m->tries);
    HOLDS(s, x->speculative == m->guess);
    HOLDS(s, store->slabs[x->slab].data != NULL);
    HOLDS(s, x->data >= store->slabs[x->slab].data &&
                 x->data + store->slot_bytes <= store->slabs[x->slab].data + store->slab_bytes);
    if (m->state == SLOT_LOADING)
        HOLDS(s, x->late == m->late && x->n_extents_arrived == m->arrived);
    if (m->state == SLOT_READY) HOLDS(s, e->expert.gate.data == x->data);
    HOLDS(s, (x->staging != NONE) == (!m->packed && m->state != SLOT_READY));
    if (x->staging != NONE) HOLDS(s, store->stagings[x->staging].taken);
}

static void compare_stats(schedule *s)
{
    choir_experts_stats x;
    const model *m = &s->m;
    choir_experts_get_stats(s->store, &x);
    HOLDS(s, x.n_hits == m->n_hits && x.n_late_hits == m->n_late_hits);
    HOLDS(s, x.n_hits + x.n_late_hits + x.n_misses == m->n_requested);
    HOLDS(s, x.n_failed == m->n_failed && x.n_retries == m->n_retries);
    HOLDS(s, x.n_damaged == m->n_damaged && x.n_late == m->n_late);
    HOLDS(s, x.n_reads == m->n_submitted && x.n_prefetched == m->n_guessed);
    HOLDS(s, x.n_prefetch_used == m->n_right && x.n_prefetch_wasted == m->n_wrong);
}

static bool apart(const uint8_t *a, size_t a_bytes, const uint8_t *b, size_t b_bytes)
{
    return a + a_bytes <= b || b + b_bytes <= a;
}

/* Reads fill the memory of their slots alone, and no two slots or reads have the same. */
static void compare_memory(schedule *s)
{
    const choir_experts *store = s->store;
    for (uint32_t i = 0; i < fake.n_reads; i++) {
        const choir_read *r = &fake.reads[i];
        const slot *x = &store->slots[(uint32_t)r->tag];
        const uint8_t *home = x->staging == NONE ? x->data : store->stagings[x->staging].data;
        size_t bytes = x->staging == NONE ? store->slot_bytes : store->staged_bytes;
        HOLDS(s, x->state == SLOT_LOADING && x->generation == r->tag >> 32);
        HOLDS(s, r->to >= home && r->to + r->bytes <= home + bytes);
        for (uint32_t j = 0; j < i; j++)
            HOLDS(s, apart(r->to, r->bytes, fake.reads[j].to, fake.reads[j].bytes));
    }
    for (uint32_t i = 0; i < N; i++)
        for (uint32_t j = 0; j < i; j++) {
            const model_entry *a = &s->m.entries[i], *b = &s->m.entries[j];
            if (a->state == SLOT_FREE || b->state == SLOT_FREE) continue;
            HOLDS(s, apart(store->slots[a->slot].data, store->slot_bytes,
                           store->slots[b->slot].data, store->slot_bytes));
            int32_t staging_a = store->slots[a->slot].staging;
            HOLDS(s, staging_a == NONE || staging_a != store->slots[b->slot].staging);
        }
}

static void compare(schedule *s)
{
    const choir_experts *store = s->store;
    uint32_t n_used = 0, n_pinned = 0, n_guesses = 0, n_staged = 0, n_taken = 0, n_queued = 0,
             n_left = 0;
    for (uint32_t i = 0; i < s->n_layers * s->n_experts; i++) {
        const model_entry *m = &s->m.entries[i];
        compare_entry(s, i);
        n_used += m->state != SLOT_FREE;
        n_pinned += m->n_pins > 0;
        n_guesses += m->guess;
        n_staged += !m->packed && (m->state == SLOT_LOADING || m->state == SLOT_ARRIVED);
        n_queued += m->state == SLOT_LOADING && m->sent < store->entries[i].source.n_extents;
    }
    for (uint32_t i = 0; i < store->n_stagings; i++) n_taken += store->stagings[i].taken;
    for (uint32_t i = 0; i < s->m.n_wanted; i++) n_left += s->m.wanted[i].state != WANT_GIVEN;
    HOLDS(s, n_staged == n_taken && n_left == store->n_left);
    HOLDS(s, choir_experts_pending(store) == (n_left > 0));
    HOLDS(s, store->n_slots_used == n_used && choir_experts_n_pinned(store) == n_pinned);
    HOLDS(s, store->slot_limit == 0 || n_used <= store->slot_limit);
    HOLDS(s, store->n_guesses == n_guesses);
    HOLDS(s, store->n_free_slots + n_used == store->n_slabs_held * store->slots_per_slab);
    HOLDS(s, store->n_reads_in_flight == fake.n_reads && store->n_sending == n_queued);
    for (uint32_t i = 0; i < store->n_free_slots; i++) {
        uint32_t free_slot = store->free_slots[i];
        HOLDS(s, s->m.holder[free_slot] == NONE && store->slots[free_slot].state == SLOT_FREE);
        for (uint32_t j = 0; j < i; j++) HOLDS(s, store->free_slots[j] != free_slot);
    }
    compare_memory(s);
    compare_stats(s);
}

static void begin_call(schedule *s, const char *name, licence may)
{
    s->call++;
    s->name = name;
    s->may = may;
    s->n_evicted = watched.n_events = 0;
    s->shrinks = s->store->n_slabs_held > s->store->n_slabs_allowed;
    for (uint32_t i = 0; i < N; i++) s->could_go[i] = may_go(&s->m.entries[i]);
}

static void hear_disk(schedule *s)
{
    for (uint32_t i = 0; i < watched.n_events; i++) {
        const event *x = &watched.events[i];
        if (x->done)
            model_done(s, x);
        else
            model_submitted(s, x);
    }
    watched.n_events = 0;
    take_over_choices(s);
}

/* Who went for a demand was worth no more than who stayed and could have gone. */
static void judge_victims(schedule *s)
{
    if (s->shrinks || s->store->n_stagings > 0) return; /* slabs and buffers have other reasons */
    for (uint32_t i = 0; i < s->n_layers * s->n_experts; i++) {
        if (!s->could_go[i] || !may_go(&s->m.entries[i])) continue;
        double stayed = choir_policy_value(s->store->policy, i / s->n_experts, i % s->n_experts);
        for (uint32_t v = 0; v < s->n_evicted; v++) HOLDS(s, s->evicted[v] <= stayed);
    }
}

/* Slabs beyond the budget stay only for who may not go. */
static void judge_slabs(schedule *s)
{
    const choir_experts *store = s->store;
    if (store->n_slabs_held <= store->n_slabs_allowed) return;
    for (uint32_t i = 0; i < store->max_slabs; i++) {
        bool stays = store->slabs[i].data == NULL;
        for (uint32_t j = 0; j < store->slots_per_slab; j++) {
            int32_t h = s->m.holder[i * store->slots_per_slab + j];
            stays |= h != NONE && !may_go(&s->m.entries[h]);
        }
        HOLDS(s, stays);
    }
}

/* The first that still wants a slot finds none, nor anybody who may go, or the disk has its hands full. */
static void judge_diligence(schedule *s)
{
    const choir_experts *store = s->store;
    uint32_t first = 0;
    while (first < s->m.n_wanted &&
           (s->m.wanted[first].state != WANT_COLD ||
            quarantined(&s->m.entries[s->m.layer * s->n_experts + s->m.wanted[first].expert],
                        fake_now)))
        first++;
    if (first == s->m.n_wanted) return;
    const model_entry *e = &s->m.entries[s->m.layer * s->n_experts + s->m.wanted[first].expert];
    judge_slabs(s);
    if (store->n_slabs_held > store->n_slabs_allowed) return;
    if (store->n_reads_in_flight + store->n_sending >= store->options.queue_depth) return;
    bool room = (store->slot_limit == 0 || store->n_slots_used < store->slot_limit) &&
                (store->n_free_slots > 0 || store->n_slabs_held < store->n_slabs_allowed);
    bool buffer = e->packed;
    for (uint32_t i = 0; i < store->n_stagings; i++) buffer |= !store->stagings[i].taken;
    for (uint32_t i = 0; i < s->n_layers * s->n_experts; i++) {
        const model_entry *x = &s->m.entries[i];
        room |= may_go(x);
        buffer |= may_go(x) && x->state == SLOT_ARRIVED && !x->packed;
    }
    HOLDS(s, !(room && buffer));
}

/* -- calls -- */

static void call_step(schedule *s)
{
    begin_call(s, "step", (licence){.evict = true});
    choir_experts_step(s->store);
    hear_disk(s);
    HOLDS(s, s->n_evicted == 0 || s->shrinks);
}

static void call_request(schedule *s)
{
    choir_expert_use uses[EXPERTS];
    uint32_t n = 0, layer = (uint32_t)chance(s->n_layers);
    for (uint32_t x = 0; x < s->n_experts; x++)
        if (chance(2))
            uses[n++] = (choir_expert_use){x, 1 + (uint32_t)chance(3), 0.25F * (float)chance(8)};
    begin_call(s, "request", (licence){.demand = true, .evict = true});
    s->m.layer = layer;
    s->m.n_wanted = n;
    for (uint32_t i = 0; i < n; i++) {
        model_entry *e = &s->m.entries[layer * s->n_experts + uses[i].expert];
        bool here = e->resident || e->state != SLOT_FREE;
        s->m.wanted[i] = (wanted){uses[i].expert, here ? WANT_AWAITED : WANT_COLD};
        if (here) e->n_pins++;
        if (e->n_pins > 1) seen.pins++;
        if (e->resident) continue;
        s->m.n_requested++;
        if (e->state != SLOT_FREE)
            *(e->state == SLOT_READY ? &s->m.n_hits : &s->m.n_late_hits) += 1;
        if (e->guess) s->m.n_right++;
        e->guess = false;
    }
    for (uint32_t x = 0; x < s->n_experts; x++) { /* guesses at this layer that were wrong */
        model_entry *e = &s->m.entries[layer * s->n_experts + x];
        if (e->guess) s->m.n_wrong++;
        e->guess = false;
    }
    for (uint32_t i = 0; i < N; i++) s->could_go[i] = may_go(&s->m.entries[i]);
    choir_experts_request(s->store, layer, uses, n);
    s->open = true;
    hear_disk(s);
    judge_victims(s);
    judge_diligence(s);
}

/* Whether waiting makes sense. */
static bool may_come(const schedule *s)
{
    for (uint32_t i = 0; i < s->m.n_wanted; i++) {
        const model_entry *e = &s->m.entries[s->m.layer * s->n_experts + s->m.wanted[i].expert];
        want w = s->m.wanted[i].state;
        if (w == WANT_AWAITED && e->state == SLOT_LOADING && !e->late) return true;
        if (w == WANT_COLD && !quarantined(e, fake_now) && fake.n_reads > 0) return true;
    }
    return false;
}

static void call_collect(schedule *s, bool wait)
{
    uint16_t ids[EXPERTS];
    begin_call(s, wait ? "collect and wait" : "collect", (licence){.demand = true, .evict = true});
    uint32_t max = 1 + (uint32_t)chance(s->n_experts), expected = 0,
             n = choir_experts_collect(s->store, wait, max, ids);
    hear_disk(s);
    judge_victims(s);
    for (uint32_t i = 0; i < s->m.n_wanted && expected < max; i++) {
        wanted *w = &s->m.wanted[i];
        const model_entry *e = &s->m.entries[s->m.layer * s->n_experts + w->expert];
        bool here = e->resident || e->state == SLOT_READY || (wait && e->state == SLOT_ARRIVED);
        if (w->state != WANT_AWAITED || !here) continue;
        HOLDS(s, expected < n && ids[expected] == w->expert);
        w->state = WANT_GIVEN;
        s->given[s->n_given++] = ids[expected++];
    }
    HOLDS(s, n == expected);
    judge_diligence(s);
    if (n > 0 || !wait || s->m.stalled || !may_come(s)) return;
    /* It was left with something that may come: only for a disk that gave nothing for so long. */
    HOLDS(s, fake_now >= s->m.progress + s->store->options.stall_ns);
    s->m.stalled = true;
    seen.stalls++;
}

static void check_parts(schedule *s, uint32_t number)
{
    model_entry *e = &s->m.entries[number];
    uint32_t layer = number / s->n_experts, expert = number % s->n_experts;
    for (uint32_t i = 0, first = (uint32_t)chance(CHOIR_EXPERT_PARTS); i < CHOIR_EXPERT_PARTS;
         i++) {
        uint32_t part = (first + i) % CHOIR_EXPERT_PARTS;
        if (e->resident || e->state == SLOT_READY) {
            choir_experts_check(s->store, layer, expert, part);
            continue;
        }
        refuse_unpack = chance(16) == 0;
        choir_expert x = planned();
        choir_expert_place_run(&x, s->store->slots[e->slot].data);
        e->sound[part] = e->packed ? is_true(s, number, part, choir_expert_part(&x, part)->data)
                                   : !refuse_unpack;
        e->checked[part] = true;
        choir_experts_check(s->store, layer, expert, part);
    }
}

static void call_admit(schedule *s)
{
    uint32_t which = (uint32_t)chance(s->n_given),
             number = s->m.layer * s->n_experts + s->given[which];
    model_entry *e = &s->m.entries[number];
    begin_call(s, "admit", (licence){0});
    s->given[which] = s->given[--s->n_given];
    check_parts(s, number);
    const choir_expert *held = choir_experts_admit(s->store, s->m.layer, number % s->n_experts);
    bool good =
        e->resident || e->state == SLOT_READY || (e->sound[0] && e->sound[1] && e->sound[2]);
    HOLDS(s, good == (held != NULL));
    if (good && !e->resident) {
        e->state = SLOT_READY;
        seen.unpacked += !e->packed;
        const choir_matrix *parts[] = {&held->gate, &held->up, &held->down};
        for (uint32_t i = 0; i < CHOIR_EXPERT_PARTS; i++)
            HOLDS(s, is_true(s, number, i, parts[i]->data));
    }
    if (good) {
        HOLDS(s, s->n_held < sizeof s->held / sizeof *s->held);
        s->held[s->n_held++] = number;
    } else {
        s->m.n_damaged++;
        seen.damages++;
        want_of(s, number)->state = WANT_AWAITED;
        if (e->tries < TRIES)
            model_try(s, e);
        else
            model_fail(s, e, fake_now);
    }
    hear_disk(s);
}

static void call_release(schedule *s)
{
    uint32_t which = (uint32_t)chance(s->n_held), number = s->held[which];
    begin_call(s, "release", (licence){0});
    s->held[which] = s->held[--s->n_held];
    s->m.entries[number].n_pins--;
    choir_experts_release(s->store, number / s->n_experts, number % s->n_experts);
    hear_disk(s);
}

/* Also in the middle, as somebody does who gives up. */
static void call_missing(schedule *s)
{
    choir_expert_missing out[EXPERTS];
    uint32_t n, expected = 0;
    begin_call(s, "missing", (licence){0});
    n = choir_experts_missing(s->store, out);
    for (uint32_t i = 0; i < s->m.n_wanted; i++) {
        const wanted *w = &s->m.wanted[i];
        model_entry *e = &s->m.entries[s->m.layer * s->n_experts + w->expert];
        if (w->state == WANT_GIVEN) continue;
        bool lost = w->state == WANT_AWAITED ? !e->resident && e->state == SLOT_FREE
                                             : quarantined(e, fake_now);
        HOLDS(s, expected < n && out[expected].expert == w->expert);
        HOLDS(s, out[expected].status == (lost ? CHOIR_E_DATA_LOSS : CHOIR_E_UNAVAILABLE));
        expected++;
        if (!lost) {
            s->m.n_late++;
            seen.late++;
        }
        if (w->state == WANT_COLD || lost) continue;
        seen.given_up += e->state == SLOT_LOADING;
        e->late = e->state == SLOT_LOADING;
        e->n_pins--;
    }
    HOLDS(s, n == expected);
    s->m.n_wanted = 0;
    s->open = false;
    hear_disk(s);
}

/* Guesses are about another layer than the one that is at work. */
static void call_prefetch(schedule *s)
{
    uint16_t experts[4], numbers[4];
    uint32_t n = 1 + (uint32_t)chance(4), layer = (uint32_t)chance(s->n_layers);
    if (s->open && layer == s->m.layer) return;
    for (uint32_t i = 0; i < n; i++) {
        experts[i] = (uint16_t)chance(s->n_experts);
        numbers[i] = (uint16_t)(layer * s->n_experts + experts[i]);
    }
    begin_call(s, "prefetch", (licence){.evict = true, .guesses = numbers, .n_guesses = n});
    uint32_t begun = choir_experts_prefetch(s->store, layer, experts, n);
    hear_disk(s);
    HOLDS(s, begun == s->may.n_begun);
    HOLDS(s, s->n_evicted <= begun);
}

static void call_set_budget(schedule *s)
{
    choir_experts *store = s->store;
    begin_call(s, "set_budget", (licence){.evict = true});
    uint64_t bytes = chance(24 * CHOIR_DISK_PAGE), held = choir_experts_set_budget(store, bytes);
    s->shrinks = true;
    hear_disk(s);
    HOLDS(s, held == choir_experts_bytes(store));
    HOLDS(s, held == (uint64_t)store->n_slabs_held * store->slab_bytes +
                         store->n_stagings * store->staged_bytes);
    seen.shrinks += s->n_evicted > 0;
    HOLDS(s, store->n_slabs_allowed * store->slots_per_slab >= 2 || store->slots_per_slab > 1);
    judge_slabs(s);
}

/* Time, and what becomes of the disk. */
static void move_world(schedule *s)
{
    begin_call(s, "time", (licence){0});
    switch (chance(10)) {
    case 0:
        fake_now += 31 * CHOIR_SECOND;
        break;
    case 1:
        fake_now += 6 * CHOIR_SECOND;
        break;
    case 2:
        fake.stalled = true;
        break;
    case 3:
        fake.bad_to = 0;
        break;
    default:
        fake_now += chance(CHOIR_MS);
        fake.stalled = false;
    }
}

static void any_call(schedule *s)
{
    uint64_t what = chance(100);
    if (what < 8)
        move_world(s);
    else if (what < 18)
        call_prefetch(s);
    else if (what < 22)
        call_set_budget(s);
    else if (!s->open)
        what<32 && s->n_held> 0 ? call_release(s) : what < 45 ? call_step(s) : call_request(s);
    else if (what < 55)
        s->n_given > 0 ? call_admit(s) : call_collect(s, false);
    else if (what < 65 && s->n_held > 0)
        call_release(s);
    else if (what < 72 && s->n_given == 0)
        call_missing(s);
    else
        call_collect(s, what < 90);
    compare(s);
}

static void end_all(schedule *s)
{
    while (s->n_given > 0 || s->n_held > 0) {
        if (s->n_given > 0) call_admit(s);
        if (s->n_held > 0) call_release(s);
        compare(s);
    }
    if (s->open) call_missing(s);
    compare(s);
    HOLDS(s, choir_experts_n_pinned(s->store) == 0);
    for (uint32_t i = 0; i < s->n_layers * s->n_experts; i++) {
        if (s->m.entries[i].state != SLOT_READY) continue;
        const choir_expert *x = &s->store->entries[i].expert;
        const choir_matrix *parts[] = {&x->gate, &x->up, &x->down};
        for (uint32_t p = 0; p < CHOIR_EXPERT_PARTS; p++)
            HOLDS(s, is_true(s, i, p, parts[p]->data));
    }
}

/* -- a schedule -- */

static void set_disk(schedule *s, bool all_packed)
{
    static const uint32_t rates[] = {0, 0, 50, 300};
    fake.n_reads = 0;
    fake.stalled = false;
    fake.depth = 1 + (uint32_t)chance(8);
    fake.slowest_ns = chance(3) * CHOIR_MS;
    fake.eio_permille = rates[chance(4)];
    fake.damage_permille = all_packed ? rates[chance(4)] : 0; /* checksums are the packs' */
    fake.stall_permille = chance(4) == 0 ? 30 : 0;
    fake.bad_from = chance(N) * AREA;
    fake.bad_to = chance(3) == 0 ? fake.bad_from + AREA : 0;
    fake.bytes = (uint64_t)(s->n_layers * s->n_experts) * AREA - (chance(8) == 0 ? AREA : 0);
    watched.n_events = watched.n_echoes = 0;
    watched.echo_permille = chance(2) ? 100 : 0;
    memset(watched.last_generation, 0, sizeof watched.last_generation);
}

static void place_experts(schedule *s, uint64_t kinds)
{
    static const uint8_t resident_bytes[2048];
    bool resident = kinds == 0 && s->n_layers > 1 && chance(4) == 0;
    for (uint32_t i = 0; i < s->n_layers * s->n_experts; i++) {
        model_entry *m = &s->m.entries[i];
        m->packed = kinds == 0 || (kinds == 2 && chance(2));
        m->resident = resident && i < s->n_experts;
        if (m->resident) continue;
        choir_expert x = planned();
        choir_expert_source source = source_of(i, m->packed, chance(2));
        assert_int_equal(
            choir_experts_place(s->store, i / s->n_experts, i % s->n_experts, &x, &source),
            CHOIR_OK);
    }
    choir_expert views[EXPERTS];
    for (uint32_t x = 0; x < EXPERTS; x++) {
        views[x] = planned();
        choir_expert_place_run(&views[x], (void *)(uintptr_t)resident_bytes);
    }
    if (resident) assert_int_equal(choir_experts_reserve(s->store, 0, views), CHOIR_OK);
}

static void run_schedule(uint64_t seed)
{
    static schedule s;
    uint32_t file;
    fake.random = seed;
    s = (schedule){.seed = seed, .name = "create"};
    for (uint32_t i = 0; i < MAX_SLOTS; i++) s.m.holder[i] = NONE;
    s.n_layers = 1 + (uint32_t)chance(LAYERS);
    s.n_experts = 2 + (uint32_t)chance(EXPERTS - 1);
    uint64_t kinds = chance(4) % 3; /* packed, unpacked, both */
    set_disk(&s, kinds == 0);
    choir_experts_options o = CHOIR_EXPERTS_OPTIONS_DEFAULT;
    o.n_layers = s.n_layers;
    o.n_experts = s.n_experts;
    o.queue_depth = 1 + (uint32_t)chance(12);
    o.policy = (choir_policy_kind)chance(CHOIR_N_POLICIES);
    o.disk = &watched.disk;
    o.unpack = unpack;
    o.user = &s;
    assert_int_equal(choir_experts_create(&o, &s.store), CHOIR_OK);
    watched.store = s.store;
    assert_int_equal(choir_experts_add_file(s.store, path, &file), CHOIR_OK);
    place_experts(&s, kinds);
    uint64_t pages = chance(2) ? 48 + chance(80) : chance(12);
    uint64_t bytes = choir_experts_least_bytes(s.store) + pages * CHOIR_DISK_PAGE;
    assert_int_equal(choir_experts_start(s.store, bytes, (uint32_t)(chance(2) * chance(9))),
                     CHOIR_OK);
    HOLDS(&s, n_slots_of(s.store) <= MAX_SLOTS);
    compare(&s);
    while (s.call < N_CALLS) any_call(&s);
    end_all(&s);
    choir_experts_destroy(s.store);
}

/* An assertion of the store's own stops the process: the seed is told then, too. */
static void tell_seed(int signal_number)
{
    char text[64];
    int n = snprintf(text, sizeof text, "seed %llu\n", (unsigned long long)seed_at_work);
    if (write(STDERR_FILENO, text, (size_t)n) < 0) _exit(2);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static void test_schedules(void **state)
{
    (void)state;
    print_message("seeds %llu to %llu\n", (unsigned long long)first_seed,
                  (unsigned long long)(first_seed + n_seeds - 1));
    for (uint64_t i = 0; i < n_seeds; i++) {
        seed_at_work = first_seed + i;
        run_schedule(seed_at_work);
    }
    const uint64_t *counts = &seen.echoes;
    static const char *const names[] = {
        "echoes",  "evictions", "failures",          "retries", "damages",  "given up",   "late",
        "guesses", "shrinks",   "quarantines ended", "stalls",  "unpacked", "second pins"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        print_message("%s %llu\n", names[i], (unsigned long long)counts[i]);
        if (n_seeds == N_SCHEDULES && counts[i] < N_SCHEDULES / 100)
            fail_msg("too few %s", names[i]);
    }
}

static int make_world(void **state)
{
    (void)state;
    /* Slabs are large pages, and clearing them would be most of the time. */
    if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0) print_message("with large pages: slow\n");
    choir_log_set_level((choir_log_level)-1); /* lost experts are many here */
    signal(SIGABRT, tell_seed);
    watched.disk = (choir_disk){"watched",      watched_submit, watched_reap,
                                watched_memory, watched_file,   watched_close};
    watched.fake = &fake;
    fake_disk_create(&fake, (uint64_t)N * AREA, 1);
    for (uint32_t i = 0; i < N; i++) {
        choir_expert x = planned();
        choir_expert_place_run(&x, fake.image + (size_t)i * AREA);
        for (uint32_t p = 0; p < CHOIR_EXPERT_PARTS; p++)
            checksums[i][p] = XXH3_64bits(choir_expert_part(&x, p)->data, part_bytes[p]);
    }
    snprintf(path, sizeof path, "/tmp/schedule_test-XXXXXX");
    int fd = mkstemp(path);
    int failed = fd < 0 || ftruncate(fd, N * AREA) != 0;
    close(fd);
    return failed;
}

static int end_world(void **state)
{
    (void)state;
    fake_disk_destroy(&fake);
    return unlink(path);
}

int main(int argc, char **argv)
{
    if (argc > 1) {
        first_seed = strtoull(argv[1], NULL, 10);
        n_seeds = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_schedules)};
    return cmocka_run_group_tests(tests, make_world, end_world);
}
