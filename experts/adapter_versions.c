/* Versions: their states, who claims them, who has to go. Everything here is under the pool's lock.
 */
#include "experts/adapter_pool.h"

#include <string.h>

static const char *const state_texts[] = {"REGISTERED", "LOADING", "RESIDENT", "FAILED"};

static void take_marks(choir_adapter_version *v, const adapter_files *files,
                       const choir_adapter_facts *facts)
{
    v->folder = files->folder;
    v->config = files->config_mark;
    v->tensors = files->tensors_mark;
    v->facts = *facts;
}

choir_adapter_version *version_create(choir_adapters *pool, const choir_adapter_load *what,
                                      const adapter_files *files, const choir_adapter_facts *facts)
{
    if (pool->n_versions == pool->versions_room) {
        uint32_t room = pool->versions_room == 0 ? 64 : 2 * pool->versions_room;
        choir_adapter_version **grown =
            choir_realloc(CHOIR_MEM_ADAPTERS, pool->versions, room * sizeof *grown);
        if (grown == NULL) return NULL;
        pool->versions = grown;
        pool->versions_room = room;
    }
    choir_adapter_version *v = choir_calloc(CHOIR_MEM_ADAPTERS, 1, sizeof *v);
    if (v == NULL) return NULL;
    v->name = choir_strdup(CHOIR_MEM_ADAPTERS, what->name);
    v->path = choir_strdup(CHOIR_MEM_ADAPTERS, what->path);
    if (v->name == NULL || v->path == NULL) {
        version_free(pool, v);
        return NULL;
    }
    v->beneath = what->beneath;
    take_marks(v, files, facts);
    v->number = ++pool->n_numbered;
    v->place = pool->n_versions;
    pool->versions[pool->n_versions++] = v;
    pool->n_in_state[v->state]++;
    if (version_overhead(v) > pool->most_overhead) pool->most_overhead = version_overhead(v);
    return v;
}

void version_free(choir_adapters *pool, choir_adapter_version *v)
{
    if (v->adapter != NULL) pool->options.free(pool->options.user, v->adapter);
    CHOIR_ASSERT(v->evicted == NULL);
    choir_free(v->name);
    choir_free(v->path);
    choir_free(v);
}

void version_move(choir_adapters *pool, choir_adapter_version *v, version_state to)
{
    static const bool legal[N_VERSION_STATES][N_VERSION_STATES] = {
        [VERSION_REGISTERED] = {[VERSION_LOADING] = true},
        [VERSION_LOADING] =
            {[VERSION_RESIDENT] = true, [VERSION_FAILED] = true, [VERSION_REGISTERED] = true},
        [VERSION_RESIDENT] = {[VERSION_REGISTERED] = true},
        [VERSION_FAILED] = {[VERSION_REGISTERED] = true},
    };
    if (!legal[v->state][to])
        choir_log(CHOIR_LOG_ERROR, "an adapter from %s to %s", state_texts[v->state],
                  state_texts[to]);
    CHOIR_ASSERT(legal[v->state][to]);
    CHOIR_ASSERT((to == VERSION_RESIDENT) == (v->adapter != NULL));
    pool->n_in_state[v->state]--;
    v->state = to;
    pool->n_in_state[to]++;
    version_recount(pool, v);
}

uint64_t version_overhead(const choir_adapter_version *v)
{
    return v->facts.load_bytes + choir_round_up(v->tensors.bytes, CHOIR_DISK_PAGE);
}

static uint64_t size_of(const choir_adapter_version *v)
{
    return v->state == VERSION_RESIDENT ? v->bytes : v->facts.bytes;
}

static bool is_kept(const choir_adapter_version *v)
{
    return v->kept && v->of != NULL;
}

void version_recount(choir_adapters *pool, choir_adapter_version *v)
{
    version_sums now = {0}, *all = &pool->sums;
    if (v->n_claims > 0 || is_kept(v)) {
        now.wanted = size_of(v);
        now.n_absent = v->state == VERSION_REGISTERED || v->state == VERSION_LOADING;
    }
    if (is_kept(v)) now.kept = size_of(v);
    all->wanted += now.wanted - v->sums.wanted;
    all->kept += now.kept - v->sums.kept;
    all->n_absent += now.n_absent - v->sums.n_absent;
    v->sums = now;
}

void version_fail(choir_adapters *pool, choir_adapter_version *v, choir_status status,
                  const char *why)
{
    v->failure = status;
    snprintf(v->why, sizeof v->why, "%s", why);
    v->retry_at = choir_clock_now() + pool->options.retry_ns;
    version_move(pool, v, VERSION_FAILED);
    pool->stats.n_failures++;
    pool->n_bad_news++;
    if (v->of != NULL) v->of->n_failures++;
}

void version_evict(choir_adapters *pool, choir_adapter_version *v)
{
    CHOIR_ASSERT(v->n_pins == 0 && v->evicted == NULL);
    v->evicted = v->adapter;
    v->next_evicted = pool->evicted;
    pool->evicted = v;
    v->adapter = NULL;
    pool->held_bytes -= v->bytes;
    pool->going_bytes += v->bytes;
    version_move(pool, v, VERSION_REGISTERED);
    pool->stats.n_evictions++;
    if (v->of != NULL) v->of->n_evictions++;
}

void version_end_if_idle(choir_adapters *pool, choir_adapter_version *v)
{
    if (v->of != NULL || v->n_claims > 0 || v->n_holds > 0 || v->state == VERSION_LOADING) return;
    pool->n_in_state[v->state]--;
    if (v->state == VERSION_RESIDENT) {
        pool->held_bytes -= v->bytes;
        pool->going_bytes += v->bytes;
    }
    pool->stats.n_quarantined -= v->quarantined;
    choir_adapter_version *last = pool->versions[--pool->n_versions];
    pool->versions[v->place] = last;
    last->place = v->place;
    v->next_ended = pool->ended;
    pool->ended = v;
    pool_nudge(pool);
}

static void move_claims(choir_adapters *pool, choir_adapter_version *from,
                        choir_adapter_version *to)
{
    for (choir_adapter_claim *c = from->claims, *after; c != NULL; c = after) {
        after = c->next;
        if (c->pinned) continue;
        claim_unlink(pool, c);
        claim_link(pool, to, c);
    }
}

void version_adopt(choir_adapters *pool, choir_adapter_version *v)
{
    for (uint32_t i = pool->n_versions; i-- > 0;) {
        choir_adapter_version *other = pool->versions[i];
        if (other->of != NULL || other->candidate || other->n_claims == 0 || other == v) continue;
        if (strcmp(other->name, v->name) != 0) continue;
        move_claims(pool, other, v);
        version_end_if_idle(pool, other);
    }
}

void version_renumber(choir_adapters *pool, choir_adapter_version *v)
{
    v->number = ++pool->n_numbered;
    if (!v->quarantined) v->n_poisoned = 0;
}

void version_take_files(choir_adapters *pool, choir_adapter_version *v, const adapter_files *files,
                        const choir_adapter_facts *facts)
{
    take_marks(v, files, facts);
    if (version_overhead(v) > pool->most_overhead) pool->most_overhead = version_overhead(v);
    version_renumber(pool, v);
    v->digest = 0;
    version_move(pool, v, VERSION_REGISTERED);
}

void version_retire(choir_adapters *pool, choir_adapter_version *v, choir_adapter_version *next)
{
    v->of = NULL;
    if (next != NULL) move_claims(pool, v, next);
    version_recount(pool, v);
    version_end_if_idle(pool, v);
    pool_shrink(pool); /* it may have been kept, and a load blocked by that */
    pool_nudge(pool);
}

int64_t version_urgency(const choir_adapter_version *v)
{
    int64_t least = INT64_MAX;
    for (const choir_adapter_claim *c = v->claims; c != NULL; c = c->next)
        if (c->urgency < least) least = c->urgency;
    return least;
}

void claim_link(choir_adapters *pool, choir_adapter_version *v, choir_adapter_claim *claim)
{
    claim->version = v;
    claim->next = v->claims;
    claim->link = &v->claims;
    if (v->claims != NULL) v->claims->link = &claim->next;
    v->claims = claim;
    v->n_claims++;
    pool->stats.n_claims++;
    version_recount(pool, v);
}

void claim_unlink(choir_adapters *pool, choir_adapter_claim *claim)
{
    choir_adapter_version *v = claim->version;
    *claim->link = claim->next;
    if (claim->next != NULL) claim->next->link = claim->link;
    claim->version = NULL;
    v->n_claims--;
    pool->stats.n_claims--;
    version_recount(pool, v);
}

bool version_is_followed(const choir_adapters *pool, const choir_adapter_version *v)
{
    for (uint32_t i = 0; i < pool->n_versions && pool->n_candidates > 0; i++) {
        const choir_adapter_version *c = pool->versions[i];
        if (c->candidate && c != v && strcmp(c->name, v->name) == 0) return true;
    }
    return false;
}

/* Who is kept is read behind those that somebody waits for. */
choir_adapter_version *pool_next_load(choir_adapters *pool)
{
    choir_adapter_version *best = NULL;
    int64_t urgency = INT64_MAX;
    if (pool->sums.n_absent == 0) return NULL;
    for (uint32_t i = 0; i < pool->n_versions; i++) {
        choir_adapter_version *v = pool->versions[i];
        if (v->state != VERSION_REGISTERED || (v->n_claims == 0 && !is_kept(v))) continue;
        if (!v->candidate && version_is_followed(pool, v)) continue;
        int64_t u = version_urgency(v);
        if (best != NULL && u >= urgency) continue;
        best = v;
        urgency = u;
    }
    return best;
}

/* Whether it may go for a claim of this urgency: what nobody waits for, or those who wait are less
 * urgent. */
static bool may_go(const choir_adapter_version *v, int64_t urgency)
{
    return v->state == VERSION_RESIDENT && v->n_pins == 0 && !is_kept(v) &&
           (v->n_claims == 0 || version_urgency(v) > urgency);
}

/* The first to go: unclaimed before claimed, the least recently used; of claimed ones the least
 * urgent. */
static bool goes_before(const choir_adapter_version *a, const choir_adapter_version *b)
{
    if ((a->n_claims == 0) != (b->n_claims == 0)) return a->n_claims == 0;
    if (a->n_claims == 0) return a->used < b->used;
    return version_urgency(a) > version_urgency(b);
}

static choir_adapter_version *find_victim(const choir_adapters *pool, int64_t urgency)
{
    choir_adapter_version *victim = NULL;
    for (uint32_t i = 0; i < pool->n_versions; i++) {
        choir_adapter_version *v = pool->versions[i];
        if (may_go(v, urgency) && (victim == NULL || goes_before(v, victim))) victim = v;
    }
    return victim;
}

bool pool_make_room(choir_adapters *pool, uint64_t bytes, int64_t urgency)
{
    uint64_t movable = 0;
    for (uint32_t i = 0; i < pool->n_versions; i++)
        if (may_go(pool->versions[i], urgency)) movable += pool->versions[i]->bytes;
    if (pool->held_bytes - movable + bytes > pool->options.budget_bytes) return false;
    while (pool->held_bytes + bytes > pool->options.budget_bytes)
        version_evict(pool, find_victim(pool, urgency));
    return true;
}

void pool_shrink(choir_adapters *pool)
{
    choir_adapter_version *v;
    while (pool->held_bytes > pool->options.budget_bytes &&
           (v = find_victim(pool, INT64_MIN)) != NULL)
        version_evict(pool, v);
}

choir_status pool_check_fits(const choir_adapters *pool, const char *name, uint64_t bytes,
                             uint64_t kept)
{
    char a[16], b[16], c[16];
    uint64_t most = pool->options.most_bytes;
    if (bytes <= most && kept <= most - bytes) return CHOIR_OK;
    if (kept == 0)
        return choir_fail(CHOIR_E_FULL,
                          "%s takes %s while it is loaded, all adapters together may have %s", name,
                          choir_format_bytes(bytes, a), choir_format_bytes(most, b));
    return choir_fail(CHOIR_E_FULL,
                      "%s takes %s while it is loaded, all adapters together may have %s, and "
                      "those that are never evicted take %s of it",
                      name, choir_format_bytes(bytes, a), choir_format_bytes(most, b),
                      choir_format_bytes(kept, c));
}

void pool_nudge(choir_adapters *pool)
{
    pool->nudged = true;
    pthread_cond_signal(&pool->work);
}
