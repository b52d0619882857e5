/* Random schedules of everything that can befall the pool: names come, go, and get other weights,
 * by calls and behind its back; claims of any urgency are pinned, kept waiting, released; the
 * budget moves; reads fail, memory is short. After every call the pool's picture is compared with
 * what was done, and with the invariants that experts/adapter_pool.h numbers. A failure tells its
 * seed; `adapters_schedule_test SEED` runs that one alone. */
#include "experts/adapter_pool.h"
#include "tests/support/toy_adapters.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum {
    N_SCHEDULES = 1500,
    N_CALLS = 80,
    N_NAMES = 5,
    N_USERS = 6,
    MAX_MIX = 3,
    N_SEEDS = 6,
    MAX_WRITES = 256,
    MAX_VERSIONS = 512,
    SMALL = 1 << 10,
};

static uint64_t fake_now;

static uint64_t read_clock(void *user)
{
    (void)user;
    return fake_now;
}

/* What was done: the weights that a name's files were given, and from which on a claim may get
 * them. */
typedef struct known_name {
    char text[4];
    uint32_t written[MAX_WRITES], n_written; /* seeds */
    uint32_t settled; /* the pool was told of this one, and agreed; later ones it may have found */
    bool there;
} known_name;

/* A request: some claims of one urgency. */
typedef struct user {
    choir_adapter_claim claims[MAX_MIX];
    uint32_t n, names[MAX_MIX], first[MAX_MIX];
    uint64_t digests[MAX_MIX]; /* once they are pinned */
    bool pinned;
} user;

typedef struct schedule {
    uint64_t seed, random;
    uint32_t call;
    const char *what;
    toy_folder *folder;
    toy_maker maker;
    toy_disk disk;
    choir_adapters *pool;
    known_name names[N_NAMES];
    user users[N_USERS];
} schedule;

/* That the schedules reach what they are for. */
static struct {
    uint64_t pins, waits, evictions, claimed_evictions, failures, refusals, blocked, replaced,
        found, quarantined, kept;
} seen;

static uint64_t first_seed = 1, n_seeds = N_SCHEDULES;

static CHOIR_PRINTF(2, 3) void broken(const schedule *s, const char *format, ...)
{
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fail_msg("seed %llu, call %u, %s: %s", (unsigned long long)s->seed, s->call, s->what, text);
}

#define HOLDS(s, condition)                                                                        \
    do {                                                                                           \
        if (!(condition)) broken(s, "line %d: not so: %s", __LINE__, #condition);                  \
    } while (0)

static uint32_t chance(schedule *s, uint32_t n)
{
    s->random = s->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(s->random >> 33) % n;
}

static toy_spec spec_of(uint32_t name, uint32_t seed)
{
    return (toy_spec){.seed = 10 * name + seed,
                      .bytes = SMALL * (1 + (name + seed) % 4),
                      .spoiled = seed == N_SEEDS - 1};
}

/* -- the invariants -- */

static uint64_t bytes_in_loads(const schedule *s, uint32_t *n)
{
    uint64_t bytes = 0;
    *n = 0;
    for (int i = 0; i < MAX_LOADS; i++) {
        const adapter_load *load = &s->pool->loads[i];
        if (load->version == NULL) continue;
        HOLDS(s, load->version->state == VERSION_LOADING);
        bytes += load->reserved;
        ++*n;
    }
    return bytes;
}

static void check_claims(const schedule *s, const choir_adapter_version *v)
{
    uint32_t n = 0, n_pinned = 0;
    for (const choir_adapter_claim *c = v->claims; c != NULL; c = c->next, n++) {
        HOLDS(s, c->version == v && *c->link == c);
        n_pinned += c->pinned;
        if (!c->pinned && v->of != NULL) HOLDS(s, v->of->current == v); /* 5 */
        if (!c->pinned && v->of == NULL) HOLDS(s, name_find(s->pool, v->name) == NULL);
    }
    HOLDS(s, n == v->n_claims && n_pinned == v->n_pins);
}

static void check_version(const schedule *s, const choir_adapter_version *v)
{
    bool keeps = v->kept && v->of != NULL;
    HOLDS(s, (v->state == VERSION_RESIDENT) == (v->adapter != NULL));          /* 1 */
    HOLDS(s, v->n_pins == 0 || v->state == VERSION_RESIDENT);                  /* 2 */
    HOLDS(s, v->of != NULL || v->n_claims > 0 || v->state == VERSION_LOADING); /* 4 */
    HOLDS(s, v->of == NULL || v->of->current == v);
    uint64_t size = v->state == VERSION_RESIDENT ? v->bytes : v->facts.bytes;
    HOLDS(s, v->sums.wanted == (v->n_claims > 0 || keeps ? size : 0));
    HOLDS(s, v->sums.kept == (keeps ? size : 0));
    check_claims(s, v);
}

static void check_pool(const schedule *s)
{
    const choir_adapters *p = s->pool;
    uint32_t n_states[N_VERSION_STATES] = {0}, n_pins = 0, n_claims = 0, n_quarantined = 0, n_loads;
    uint64_t held = bytes_in_loads(s, &n_loads), movable = 0;
    version_sums sums = {0};
    for (uint32_t i = 0; i < p->n_versions; i++) {
        const choir_adapter_version *v = p->versions[i];
        HOLDS(s, v->place == i);
        check_version(s, v);
        n_states[v->state]++;
        n_pins += v->n_pins;
        n_claims += v->n_claims;
        n_quarantined += v->quarantined;
        sums.wanted += v->sums.wanted;
        sums.kept += v->sums.kept;
        sums.n_absent += v->sums.n_absent;
        if (v->state != VERSION_RESIDENT) continue;
        held += v->bytes;
        if (v->n_pins == 0 && v->sums.kept == 0) movable += v->bytes;
    }
    HOLDS(s, held == p->held_bytes);
    HOLDS(s, held <= p->options.budget_bytes || movable == 0); /* 3 */
    HOLDS(s, memcmp(n_states, p->n_in_state, sizeof n_states) == 0);
    HOLDS(s, n_states[VERSION_LOADING] == n_loads && p->n_candidates == 0);
    HOLDS(s, n_pins == p->stats.n_pins && n_claims == p->stats.n_claims);
    HOLDS(s, n_quarantined == p->stats.n_quarantined);
    HOLDS(s, sums.wanted == p->sums.wanted && sums.kept == p->sums.kept &&
                 sums.n_absent == p->sums.n_absent);
    for (uint32_t i = 0; i + 1 < p->n_names; i++)
        HOLDS(s, strcmp(p->names[i]->text, p->names[i + 1]->text) < 0);
    for (uint32_t i = 0; i < N_NAMES; i++)
        HOLDS(s, (name_find(p, s->names[i].text) != NULL) == s->names[i].there);
}

/* Who is pinned has, as ever, what it was pinned with. */
static void check_users(const schedule *s)
{
    for (uint32_t i = 0; i < N_USERS; i++) {
        const user *u = &s->users[i];
        for (uint32_t c = 0; c < u->n && u->pinned; c++) {
            const toy_adapter *toy = choir_adapter_claim_adapter(&u->claims[c]);
            HOLDS(s, toy->digest == u->digests[c]);
        }
    }
}

/* -- a turn of the loader, and who went -- */

typedef struct before {
    const choir_adapter_version *version;
    uint64_t used;
    uint32_t n_pins, n_claims;
    bool resident, kept;
} before;

static uint32_t picture(const schedule *s, before *out)
{
    HOLDS(s, s->pool->n_versions <= MAX_VERSIONS);
    for (uint32_t i = 0; i < s->pool->n_versions; i++) {
        const choir_adapter_version *v = s->pool->versions[i];
        out[i] = (before){
            v, v->used, v->n_pins, v->n_claims, v->state == VERSION_RESIDENT, v->sums.kept > 0};
    }
    return s->pool->n_versions;
}

static bool is_resident(const schedule *s, const choir_adapter_version *v)
{
    for (uint32_t i = 0; i < s->pool->n_versions; i++)
        if (s->pool->versions[i] == v) return v->state == VERSION_RESIDENT;
    return false;
}

/* Those that nobody claims went before those that somebody does, the least recently used first. */
static void check_evictions(schedule *s, const before *was, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (!was[i].resident || is_resident(s, was[i].version)) continue;
        if (was[i].n_claims == 0 && was[i].version->of == NULL) continue; /* it has ended */
        seen.evictions++;
        seen.claimed_evictions += was[i].n_claims > 0;
        HOLDS(s, was[i].n_pins == 0 && !was[i].kept); /* 2 */
        for (uint32_t j = 0; j < n; j++) {
            bool stayed = was[j].resident && is_resident(s, was[j].version) && was[j].n_pins == 0 &&
                          !was[j].kept;
            if (!stayed || was[j].n_claims > 0) continue;
            HOLDS(s, was[i].n_claims == 0 && was[i].used < was[j].used);
        }
    }
}

static void do_work(schedule *s)
{
    static before was[MAX_VERSIONS];
    s->what = "work";
    uint32_t n = picture(s, was);
    uint64_t made = s->pool->n_numbered;
    choir_adapters_work(s->pool);
    seen.found += s->pool->n_numbered - made;
    check_evictions(s, was, n);
}

/* -- the calls -- */

static void do_write(schedule *s, uint32_t name)
{
    known_name *k = &s->names[name];
    s->what = "write";
    if (k->n_written == MAX_WRITES) return;
    uint32_t seed = chance(s, N_SEEDS);
    toy_spec spec = spec_of(name, seed);
    toy_write(s->folder, k->text, &spec);
    k->written[k->n_written++] = seed;
}

static choir_adapter_load place(schedule *s, uint32_t name)
{
    return (choir_adapter_load){.name = s->names[name].text,
                                .path = s->names[name].text,
                                .beneath = true,
                                .keep = chance(s, 25) == 0};
}

static bool is_weather(choir_status status)
{
    return status == CHOIR_E_NO_MEMORY || status == CHOIR_E_UNAVAILABLE || status == CHOIR_E_FULL;
}

static void do_register(schedule *s, uint32_t name, bool reads)
{
    known_name *k = &s->names[name];
    s->what = reads ? "load" : "register";
    if (k->n_written == 0) do_write(s, name);
    const choir_adapter_load what = place(s, name);
    uint32_t last = k->written[k->n_written - 1];
    if (chance(s, 8) == 0) choir_memory_fail_at(1 + chance(s, 12));
    choir_status status =
        reads ? choir_adapters_load(s->pool, &what, NULL) : choir_adapters_register(s->pool, &what);
    choir_memory_fail_at(0);
    if (status == CHOIR_OK) {
        HOLDS(s, !reads || last != N_SEEDS - 1);
        seen.replaced += k->there;
        seen.kept += what.keep;
        k->there = true;
        k->settled = k->n_written - 1;
        return;
    }
    seen.refusals++;
    if (!is_weather(status))
        HOLDS(s, status == CHOIR_E_PRECONDITION && reads && last == N_SEEDS - 1);
}

static void do_unload(schedule *s, uint32_t name)
{
    s->what = "unload";
    choir_status status = choir_adapters_unload(s->pool, s->names[name].text);
    HOLDS(s, status == (s->names[name].there ? CHOIR_OK : CHOIR_E_NOT_FOUND));
    s->names[name].there = false;
}

static void do_release(schedule *s, user *u)
{
    s->what = "release";
    choir_adapters_release(s->pool, u->claims, u->n);
    *u = (user){0};
}

static void do_claim(schedule *s, user *u)
{
    s->what = "claim";
    uint32_t n = 1 + chance(s, MAX_MIX), first = chance(s, N_NAMES);
    int64_t urgency = (int64_t)chance(s, 20) - 10;
    *u = (user){0};
    for (; u->n < n; u->n++) {
        uint32_t name = (first + u->n) % N_NAMES;
        const known_name *k = &s->names[name];
        choir_status status =
            choir_adapters_claim(s->pool, k->text, urgency, &u->claims[u->n], NULL);
        HOLDS(s, (status == CHOIR_E_NOT_FOUND) == !k->there);
        if (status != CHOIR_OK) {
            seen.refusals++;
            do_release(s, u);
            return;
        }
        u->names[u->n] = name;
        u->first[u->n] = k->settled;
    }
}

/* What a claim has is what its name's files held since it was made, or when the pool was last told
 * of them. */
static void check_content(schedule *s, user *u, uint32_t c)
{
    const known_name *k = &s->names[u->names[c]];
    u->digests[c] = choir_adapter_claim_digest(&u->claims[c]);
    for (uint32_t i = u->first[c]; i < k->n_written; i++) {
        toy_spec spec = spec_of(u->names[c], k->written[i]);
        if (toy_digest(&spec) == u->digests[c]) return;
    }
    broken(s, "%s has weights that it did not have since it was claimed", k->text);
}

static void do_pin(schedule *s, user *u)
{
    bool pinned;
    s->what = "pin";
    choir_status status = choir_adapters_pin(s->pool, u->claims, u->n, &pinned);
    if (status != CHOIR_OK) {
        HOLDS(s, !pinned && (is_weather(status) || status == CHOIR_E_PRECONDITION));
        HOLDS(s, status == CHOIR_E_FULL ||
                     choir_adapters_check_claims(s->pool, u->claims, u->n) == status);
        seen.failures++;
        do_release(s, u);
        return;
    }
    HOLDS(s, choir_adapters_check_claims(s->pool, u->claims, u->n) == CHOIR_OK);
    if (!pinned) {
        seen.waits++;
        for (uint32_t c = 0; c < u->n; c++) HOLDS(s, !u->claims[c].pinned); /* all or none */
        return;
    }
    seen.pins++;
    u->pinned = true;
    for (uint32_t c = 0; c < u->n; c++) check_content(s, u, c);
    HOLDS(s, !s->pool->blocked || u->claims[0].urgency <= s->pool->blocked_urgency);
}

static void do_one(schedule *s)
{
    uint32_t name = chance(s, N_NAMES), kind = chance(s, 100);
    user *u = &s->users[chance(s, N_USERS)];
    fake_now += chance(s, 100) * CHOIR_MS;
    if (chance(s, 40) == 0) fake_now += 31 * CHOIR_SECOND;
    if (kind < 6) {
        do_write(s, name);
    } else if (kind < 14) {
        do_register(s, name, kind < 9);
    } else if (kind < 16) {
        do_unload(s, name);
    } else if (kind < 20) {
        s->what = "set_budget";
        choir_adapters_set_budget(s->pool, SMALL * (uint64_t)(9 + chance(s, 12)));
    } else if (kind < 22 && u->pinned) {
        s->what = "note_poison";
        choir_adapters_note_poison(s->pool, &u->claims[0]);
        seen.quarantined += u->claims[0].version->quarantined;
    } else if (kind < 50) {
        if (u->n == 0) do_claim(s, u);
        if (u->n > 0 && !u->pinned) do_pin(s, u);
    } else if (kind < 60) {
        do_release(s, u);
    } else {
        do_work(s);
    }
    seen.blocked += s->pool->blocked;
}

/* When the disk is well and everybody who is served goes, all who wait are served or told why not.
 */
static void serve_all(schedule *s)
{
    s->disk.eio_permille = s->disk.late_permille = 0;
    choir_adapters_set_budget(s->pool, SMALL * 60);
    for (uint32_t i = 0; i < N_USERS; i++)
        if (s->users[i].pinned) do_release(s, &s->users[i]);
    for (uint32_t turn = 0, n_left = 1; n_left > 0; turn++) {
        HOLDS(s, turn < 500);
        do_work(s);
        n_left = 0;
        for (uint32_t i = 0; i < N_USERS; i++) {
            user *u = &s->users[i];
            if (u->n > 0) do_pin(s, u);
            if (u->pinned) do_release(s, u);
            n_left += u->n;
        }
        check_pool(s);
    }
}

static void run(uint64_t seed, toy_folder *folder)
{
    static schedule s;
    s = (schedule){.seed = seed, .random = seed, .folder = folder, .what = "create"};
    for (uint32_t i = 0; i < N_NAMES; i++)
        snprintf(s.names[i].text, sizeof s.names[i].text, "n%u", i);
    toy_disk_create(&s.disk, seed);
    s.disk.eio_permille = seed % 3 == 0 ? 200 : 0;
    s.disk.late_permille = seed % 2 == 0 ? 600 : 0;
    choir_adapters_options o = toy_options(&s.maker, &s.disk, SMALL * (9 + seed % 12));
    o.most_bytes = SMALL * 60;
    o.folder = folder->path;
    o.max_poisoned = 1;
    assert_int_equal(choir_adapters_create(&o, &s.pool), CHOIR_OK);
    for (uint32_t i = 0; i < N_NAMES; i++) do_register(&s, i, false);
    for (s.call = 0; s.call < N_CALLS; s.call++) {
        do_one(&s);
        check_pool(&s);
        check_users(&s);
    }
    serve_all(&s);
    choir_adapters_destroy(s.pool);
    s.what = "destroy";
    HOLDS(&s, s.maker.n_live == 0 && choir_memory_bytes(CHOIR_MEM_ADAPTERS) == 0);
}

static void test_schedules(void **state)
{
    (void)state;
    toy_folder folder;
    fake_now = 1000 * CHOIR_SECOND;
    choir_clock_replace(read_clock, NULL);
    choir_log_set_level(CHOIR_LOG_ERROR);
    toy_folder_create(&folder);
    for (uint64_t seed = first_seed; seed < first_seed + n_seeds; seed++) run(seed, &folder);
    toy_folder_destroy(&folder);
    choir_clock_replace(NULL, NULL);
    print_message(
        "%llu pins, %llu waits, %llu evictions (%llu claimed), %llu failures, %llu refusals, "
        "%llu blocked, %llu replaced, %llu found, %llu quarantined, %llu kept\n",
        (unsigned long long)seen.pins, (unsigned long long)seen.waits,
        (unsigned long long)seen.evictions, (unsigned long long)seen.claimed_evictions,
        (unsigned long long)seen.failures, (unsigned long long)seen.refusals,
        (unsigned long long)seen.blocked, (unsigned long long)seen.replaced,
        (unsigned long long)seen.found, (unsigned long long)seen.quarantined,
        (unsigned long long)seen.kept);
    if (n_seeds < N_SCHEDULES) return;
    assert_true(seen.pins > 1000 && seen.waits > 1000 && seen.blocked > 1000);
    assert_true(seen.evictions > 500 && seen.claimed_evictions > 50 && seen.failures > 100);
    assert_true(seen.refusals > 100 && seen.replaced > 1000 && seen.found > 100);
    assert_true(seen.quarantined > 50 && seen.kept > 100);
}

int main(int argc, char **argv)
{
    if (argc > 1) first_seed = strtoull(argv[1], NULL, 10);
    if (argc > 1) n_seeds = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_schedules)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
