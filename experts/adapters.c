/* The pool from outside: its life, claims and pins, its memory, its numbers. */
#include "experts/adapter_pool.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

static choir_status open_parts(choir_adapters *pool)
{
    choir_adapters_options *o = &pool->options;
    if (o->most_bytes < o->budget_bytes) o->most_bytes = o->budget_bytes;
    if (o->folder != NULL) {
        pool->folder = open(o->folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (pool->folder < 0)
            return choir_fail(CHOIR_E_INVALID, "the folder of adapters %s: %m", o->folder);
        o->folder = NULL; /* it was lent */
    }
    if (pool->disk == NULL) CHOIR_TRY(choir_disk_open(o->io, o->io_depth, &pool->disk));
    pool->stats.io = pool->disk->name;
    if (o->manual) return CHOIR_OK;
    CHOIR_TRY(choir_thread_start(&pool->thread, "choir-adapters", run_loader, pool));
    pool->threaded = true;
    return CHOIR_OK;
}

choir_status choir_adapters_create(const choir_adapters_options *options, choir_adapters **out)
{
    choir_adapters *pool = choir_calloc(CHOIR_MEM_ADAPTERS, 1, sizeof *pool);
    if (pool == NULL) {
        if (options->disk != NULL) options->disk->close(options->disk);
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the pool of adapters");
    }
    pool->options = *options;
    pool->disk = options->disk;
    pool->folder = -1;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_mutex_init(&pool->wake_lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&pool->work, &monotonic);
    pthread_cond_init(&pool->settled, &monotonic);
    pthread_condattr_destroy(&monotonic);
    choir_status status = open_parts(pool);
    if (status != CHOIR_OK) {
        choir_adapters_destroy(pool);
        return status;
    }
    *out = pool;
    return CHOIR_OK;
}

void choir_adapters_destroy(choir_adapters *pool)
{
    if (pool == NULL) return;
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    if (pool->threaded) pthread_join(pool->thread, NULL);
    CHOIR_ASSERT(pool->stats.n_claims == 0 && pool->stats.n_pins == 0);
    loads_end(pool);
    for (uint32_t i = 0; i < pool->n_versions; i++) version_free(pool, pool->versions[i]);
    for (uint32_t i = 0; i < pool->n_names; i++) {
        choir_free(pool->names[i]->text);
        choir_free(pool->names[i]);
    }
    choir_free(pool->versions);
    choir_free(pool->names);
    if (pool->folder >= 0) close(pool->folder);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->wake_lock);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->settled);
    choir_free(pool);
}

/* -- claims -- */

/* Why nobody gets this version, if nobody does. */
static choir_status check_version(const choir_adapters *pool, const choir_adapter_version *v)
{
    if (version_is_followed(pool, v)) return CHOIR_OK;
    if (v->quarantined)
        return choir_fail(
            CHOIR_E_PRECONDITION,
            "adapter %s is quarantined: %u requests with it ended in NaN or Inf; load "
            "it again to try it once more",
            v->name, v->n_poisoned);
    if (v->state == VERSION_FAILED) return choir_fail(v->failure, "%s", v->why);
    return CHOIR_OK;
}

static choir_status claim_current(choir_adapters *pool, const char *text,
                                  choir_adapter_claim *claim, choir_adapter_facts *facts)
{
    char what[CHOIR_ADAPTER_MAX_NAME + 16];
    const adapter_name *name = name_find(pool, text);
    if (name == NULL) return name_unknown(pool, text);
    choir_adapter_version *v = name->current;
    if (v->state == VERSION_FAILED && choir_clock_now() >= v->retry_at)
        version_move(pool, v, VERSION_REGISTERED);
    CHOIR_TRY(check_version(pool, v));
    snprintf(what, sizeof what, "adapter %s", text);
    CHOIR_TRY(pool_check_fits(pool, what, v->facts.bytes + version_overhead(v),
                              pool->sums.kept - v->sums.kept));
    claim_link(pool, v, claim);
    if (facts != NULL) *facts = v->facts;
    if (v->state != VERSION_RESIDENT) pool_nudge(pool);
    return CHOIR_OK;
}

choir_status choir_adapters_claim(choir_adapters *pool, const char *name, int64_t urgency,
                                  choir_adapter_claim *claim, choir_adapter_facts *facts)
{
    CHOIR_ASSERT(claim->version == NULL && !claim->pinned);
    CHOIR_TRY(choir_adapters_check_name(name));
    claim->urgency = urgency;
    pthread_mutex_lock(&pool->lock);
    choir_status status = claim_current(pool, name, claim, facts);
    pthread_mutex_unlock(&pool->lock);
    return status;
}

/* Those that are wanted together must fit together. */
static choir_status check_together(const choir_adapters *pool, const choir_adapter_claim *claims,
                                   uint32_t n)
{
    char what[CHOIR_ADAPTER_MAX_NAME + 16];
    uint64_t bytes = 0, overhead = 0;
    for (uint32_t i = 0; i < n; i++) {
        const choir_adapter_version *v = claims[i].version;
        bool resident = v->state == VERSION_RESIDENT;
        bytes += v->sums.kept > 0 ? 0 : resident ? v->bytes : v->facts.bytes;
        if (!resident && version_overhead(v) > overhead) overhead = version_overhead(v);
    }
    if (n == 1)
        snprintf(what, sizeof what, "adapter %s", claims[0].version->name);
    else
        snprintf(what, sizeof what, "a mix of %u adapters", n);
    return pool_check_fits(pool, what, bytes + overhead, pool->sums.kept);
}

choir_status choir_adapters_check_claims(choir_adapters *pool, const choir_adapter_claim *claims,
                                         uint32_t n)
{
    choir_status status = CHOIR_OK;
    pthread_mutex_lock(&pool->lock);
    for (uint32_t i = 0; i < n && status == CHOIR_OK; i++)
        status = check_version(pool, claims[i].version);
    pthread_mutex_unlock(&pool->lock);
    return status;
}

static choir_status pin_all(choir_adapters *pool, choir_adapter_claim *claims, uint32_t n,
                            bool *pinned)
{
    bool all = true;
    for (uint32_t i = 0; i < n; i++) {
        const choir_adapter_version *v = claims[i].version;
        CHOIR_TRY(check_version(pool, v));
        all = all && v->state == VERSION_RESIDENT && !v->quarantined;
    }
    if (!all) CHOIR_TRY(check_together(pool, claims, n));
    if (!all || (pool->blocked && claims[0].urgency > pool->blocked_urgency)) return CHOIR_OK;
    for (uint32_t i = 0; i < n; i++) {
        choir_adapter_version *v = claims[i].version;
        claims[i].pinned = true;
        v->n_pins++;
        pool->stats.n_pins++;
        pool->stats.n_requests++;
        if (v->of != NULL) v->of->n_requests++;
    }
    *pinned = true;
    return CHOIR_OK;
}

choir_status choir_adapters_pin(choir_adapters *pool, choir_adapter_claim *claims, uint32_t n,
                                bool *pinned)
{
    *pinned = false;
    pthread_mutex_lock(&pool->lock);
    choir_status status = pin_all(pool, claims, n, pinned);
    pthread_mutex_unlock(&pool->lock);
    return status;
}

void choir_adapters_release(choir_adapters *pool, choir_adapter_claim *claims, uint32_t n)
{
    if (n == 0) return;
    pthread_mutex_lock(&pool->lock);
    for (uint32_t i = 0; i < n; i++) {
        choir_adapter_version *v = claims[i].version;
        if (v == NULL) continue;
        if (claims[i].pinned) {
            CHOIR_ASSERT(v->n_pins > 0);
            v->n_pins--;
            v->used = ++pool->n_used;
            pool->stats.n_pins--;
        }
        claims[i].pinned = false;
        claim_unlink(pool, &claims[i]);
        version_end_if_idle(pool, v);
    }
    if (pool->held_bytes > pool->options.budget_bytes) pool_shrink(pool);
    /* Only then the loader has something new to look at. */
    if (pool->blocked || pool->evicted != NULL || pool->ended != NULL) pool_nudge(pool);
    pthread_mutex_unlock(&pool->lock);
}

const void *choir_adapter_claim_adapter(const choir_adapter_claim *claim)
{
    CHOIR_ASSERT(claim->pinned);
    return claim->version->adapter;
}

const char *choir_adapter_claim_name(const choir_adapter_claim *claim)
{
    CHOIR_ASSERT(claim->pinned);
    return claim->version->name;
}

uint64_t choir_adapter_claim_digest(const choir_adapter_claim *claim)
{
    CHOIR_ASSERT(claim->pinned);
    return claim->version->digest;
}

const choir_adapter_facts *choir_adapter_claim_facts(const choir_adapter_claim *claim)
{
    CHOIR_ASSERT(claim->pinned);
    return &claim->version->facts;
}

void choir_adapters_note_poison(choir_adapters *pool, const choir_adapter_claim *claim)
{
    pthread_mutex_lock(&pool->lock);
    choir_adapter_version *v = claim->version;
    v->n_poisoned++;
    pool->stats.n_poisoned++;
    bool now = !v->quarantined && v->n_poisoned >= pool->options.max_poisoned;
    if (now) {
        v->quarantined = true;
        pool->n_bad_news++;
        pool->stats.n_quarantined++;
        choir_log(CHOIR_LOG_WARNING,
                  "adapter %s is quarantined: %u requests with it ended in NaN or Inf", v->name,
                  v->n_poisoned);
    }
    pthread_mutex_unlock(&pool->lock);
}

void choir_adapters_note_wait(choir_adapters *pool, const choir_adapter_claim *claim, uint64_t ns)
{
    pthread_mutex_lock(&pool->lock);
    adapter_name *name = claim->version->of;
    pool->stats.n_waits++;
    pool->stats.wait_ns += ns;
    if (name != NULL) {
        name->n_waits++;
        name->wait_ns += ns;
    }
    pthread_mutex_unlock(&pool->lock);
}

void choir_adapters_set_wake(choir_adapters *pool, void (*wake)(void *user), void *user)
{
    pthread_mutex_lock(&pool->wake_lock);
    pool->wake = wake;
    pool->wake_user = user;
    pthread_mutex_unlock(&pool->wake_lock);
}

/* -- memory and numbers -- */

uint64_t choir_adapters_set_budget(choir_adapters *pool, uint64_t bytes)
{
    pthread_mutex_lock(&pool->lock);
    if (bytes > pool->options.most_bytes) bytes = pool->options.most_bytes;
    bool changes = bytes != pool->options.budget_bytes;
    pool->options.budget_bytes = bytes;
    if (changes) {
        pool_shrink(pool);
        pool_nudge(pool);
    }
    uint64_t held = pool->held_bytes + pool->going_bytes;
    pthread_mutex_unlock(&pool->lock);
    return held;
}

void choir_adapters_get_stats(choir_adapters *pool, choir_adapters_stats *out)
{
    pthread_mutex_lock(&pool->lock);
    *out = pool->stats;
    out->n_names = pool->n_names;
    out->n_resident = pool->n_in_state[VERSION_RESIDENT];
    out->n_loading = pool->n_in_state[VERSION_LOADING];
    out->n_failed = pool->n_in_state[VERSION_FAILED];
    out->budget_bytes = pool->options.budget_bytes;
    out->most_bytes = pool->options.most_bytes;
    out->held_bytes = pool->held_bytes + pool->going_bytes;
    out->wanted_bytes =
        pool->sums.wanted + (pool->sums.n_absent > 0 ? MAX_LOADS * pool->most_overhead : 0);
    pthread_mutex_unlock(&pool->lock);
}

uint64_t choir_adapters_bad_news(choir_adapters *pool)
{
    pthread_mutex_lock(&pool->lock);
    uint64_t n = pool->n_bad_news;
    pthread_mutex_unlock(&pool->lock);
    return n;
}

bool choir_adapters_work(choir_adapters *pool)
{
    CHOIR_ASSERT(pool->options.manual);
    return loader_turn(pool);
}
