/* The loader: one thread that frees what has gone, reads what is wanted in large pieces, several in
 * flight, and makes adapters of it. It holds the pool's lock only to choose and to hand over; a
 * load in the making is its own, and the version it is for stays, since nothing ends while it is
 * LOADING. */
#include "experts/adapter_pool.h"

#include <errno.h>
#include <string.h>

enum { MAX_REAPED = 32 };
static const uint64_t REAP_NS = 2 * CHOIR_MS; /* then what was asked for since is looked at */

static void free_gone(choir_adapters *pool)
{
    pthread_mutex_lock(&pool->lock);
    while (pool->evicted != NULL || pool->ended != NULL) {
        choir_adapter_version *v = pool->evicted;
        uint64_t bytes;
        if (v != NULL) {
            void *adapter = v->evicted;
            bytes = v->bytes;
            pool->evicted = v->next_evicted;
            v->evicted = NULL;
            pthread_mutex_unlock(&pool->lock);
            pool->options.free(pool->options.user, adapter);
        } else {
            v = pool->ended;
            bytes = v->adapter != NULL ? v->bytes : 0;
            pool->ended = v->next_ended;
            pthread_mutex_unlock(&pool->lock);
            version_free(pool, v);
        }
        pthread_mutex_lock(&pool->lock);
        pool->going_bytes -= bytes;
    }
    pthread_mutex_unlock(&pool->lock);
}

static void call_wake(choir_adapters *pool)
{
    pthread_mutex_lock(&pool->wake_lock);
    if (pool->wake != NULL) pool->wake(pool->wake_user);
    pthread_mutex_unlock(&pool->wake_lock);
}

static void close_load(choir_adapters *pool, adapter_load *load)
{
    files_close(&load->files);
    choir_free(load->config);
    load->config = NULL;
    load->ready = false;
    choir_page_cache_give(pool->options.pages, CHOIR_MEM_ADAPTERS, load->data, load->room);
    load->data = NULL;
    load->room = 0;
}

/* Hands the load's end over: the adapter, or why there is none. */
static void load_end(choir_adapters *pool, adapter_load *load, choir_status status,
                     const choir_adapter_made *made)
{
    choir_adapter_version *v = load->version;
    uint64_t took = choir_clock_now() - load->began_ns, read = load->files.tensors_mark.bytes;
    close_load(pool, load);
    pthread_mutex_lock(&pool->lock);
    pool->held_bytes -= load->reserved;
    load->version = NULL;
    if (status == CHOIR_OK) {
        v->adapter = made->adapter;
        v->bytes = v->facts.bytes = made->bytes;
        v->facts.sole = made->sole;
        /* Bytes that were changed without a trace: others than before, so another version. */
        if (v->digest != 0 && v->digest != made->digest) version_renumber(pool, v);
        v->digest = made->digest;
        v->used = ++pool->n_used;
        pool->held_bytes += made->bytes;
        pool->stats.n_loads++;
        pool->stats.bytes_read += read;
        pool->stats.load_ns += took;
        if (v->of != NULL) v->of->n_loads++;
        version_move(pool, v, VERSION_RESIDENT);
    } else {
        version_fail(pool, v, status, choir_error_message());
    }
    version_end_if_idle(pool, v);
    pool_shrink(pool); /* it may have become larger than it was planned to be */
    pthread_cond_broadcast(&pool->settled);
    pthread_mutex_unlock(&pool->lock);
    call_wake(pool);
}

/* Other files lie there than those that the version stands for: they are its name's next version,
 * read in its turn. A candidate fails instead: who waits for it has named what he wants. */
static void load_anew(choir_adapters *pool, adapter_load *load)
{
    choir_adapter_version *v = load->version;
    const choir_adapter_load what = {.name = v->name, .path = v->path, .beneath = v->beneath};
    adapter_files files;
    choir_adapter_facts facts;
    pthread_mutex_lock(&pool->lock);
    bool candidate = v->candidate;
    pthread_mutex_unlock(&pool->lock);
    choir_status status =
        candidate ? files_changed(v->name) : adapter_examine(pool, &what, &files, &facts);
    if (status != CHOIR_OK) {
        load_end(pool, load, status, NULL);
        return;
    }
    choir_log(CHOIR_LOG_INFO, "adapter %s: its files have changed; it is what they are now",
              v->name);
    close_load(pool, load);
    pthread_mutex_lock(&pool->lock);
    pool->held_bytes -= load->reserved;
    load->version = NULL;
    version_take_files(pool, v, &files, &facts);
    version_end_if_idle(pool, v);
    pthread_mutex_unlock(&pool->lock);
}

/* Files and a buffer for the version that was chosen. *other: its files are not there any more. */
static choir_status open_load(choir_adapters *pool, adapter_load *load, bool *other)
{
    const choir_adapter_version *v = load->version;
    CHOIR_TRY(files_open(pool, v->name, v->path, v->beneath, true, &load->files));
    *other = !file_mark_same(&load->files.tensors_mark, &v->tensors) ||
             !file_mark_same(&load->files.config_mark, &v->config);
    if (*other) return CHOIR_OK;
    CHOIR_TRY(files_read_config(&load->files, v->name, &load->config, &load->config_bytes));
    size_t need = choir_round_up(v->tensors.bytes, CHOIR_DISK_PAGE);
    if (need == 0)
        return choir_fail(CHOIR_E_PRECONDITION, "adapter %s: its tensors' file is empty", v->name);
    load->data = choir_page_cache_take(pool->options.pages, CHOIR_MEM_ADAPTERS, need);
    if (load->data == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "adapter %s: no memory to read it into", v->name);
    load->room = need;
    load->n_pieces = (uint32_t)((need + PIECE_BYTES - 1) / PIECE_BYTES);
    load->n_sent = load->n_in_flight = 0;
    load->error = 0;
    load->ready = true;
    return CHOIR_OK;
}

/* The most urgent of those that are wanted, if there is room; NULL: none. */
static choir_adapter_version *choose(choir_adapters *pool, adapter_load *load)
{
    pthread_mutex_lock(&pool->lock);
    bool was_blocked = pool->blocked;
    choir_adapter_version *v = pool_next_load(pool);
    uint64_t bytes = v != NULL ? v->facts.bytes + version_overhead(v) : 0;
    int64_t urgency = v != NULL ? version_urgency(v) : 0;
    pool->blocked = v != NULL && !pool_make_room(pool, bytes, urgency);
    pool->blocked_urgency = urgency;
    if (pool->blocked) v = NULL;
    if (v != NULL) {
        version_move(pool, v, VERSION_LOADING);
        pool->held_bytes += bytes;
        load->reserved = bytes;
        load->version = v;
        load->began_ns = choir_clock_now();
        load->n_tries = 1;
    }
    /* Who is less urgent was held back; or who sets the budget has something to do. */
    bool wakes = was_blocked != pool->blocked ||
                 (pool->blocked && pool->blocked_budget != pool->options.budget_bytes);
    pool->blocked_budget = pool->options.budget_bytes;
    pthread_mutex_unlock(&pool->lock);
    if (wakes) call_wake(pool);
    return v;
}

static bool begin_loads(choir_adapters *pool)
{
    bool moved = false;
    for (uint32_t i = 0; i < MAX_LOADS; i++) {
        adapter_load *load = &pool->loads[i];
        if (load->version != NULL) continue;
        if (choose(pool, load) == NULL) break;
        free_gone(pool);
        moved = true;
        bool other = false;
        choir_status status = open_load(pool, load, &other);
        if (status != CHOIR_OK)
            load_end(pool, load, status, NULL);
        else if (other)
            load_anew(pool, load);
    }
    return moved;
}

static bool has_unsent(const adapter_load *load)
{
    return load->ready && load->error == 0 && load->n_sent < load->n_pieces;
}

static void send_pieces(choir_adapters *pool, adapter_load *load)
{
    uint32_t number = (uint32_t)(load - pool->loads);
    while (has_unsent(load)) {
        uint64_t offset = (uint64_t)load->n_sent * PIECE_BYTES;
        uint64_t left = load->files.tensors_mark.bytes - offset;
        uint32_t need = left < PIECE_BYTES ? (uint32_t)left : PIECE_BYTES;
        const choir_read read = {.fd = load->files.tensors,
                                 .offset = offset,
                                 .to = load->data + offset,
                                 .bytes = (uint32_t)choir_round_up(need, CHOIR_DISK_PAGE),
                                 .need = need,
                                 .tag = number};
        if (pool->disk->submit(pool->disk, &read, 1) == 0) return;
        load->n_sent++;
        load->n_in_flight++;
    }
}

static bool is_over(const adapter_load *load)
{
    return load->version != NULL && load->n_in_flight == 0 &&
           (load->error != 0 || load->n_sent == load->n_pieces);
}

static choir_status make(choir_adapters *pool, const adapter_load *load, choir_adapter_made *made)
{
    const choir_adapter_version *v = load->version;
    const choir_adapter_file file = {.name = v->name,
                                     .config = load->config,
                                     .config_bytes = load->config_bytes,
                                     .tensors = load->data,
                                     .tensor_bytes = (size_t)v->tensors.bytes,
                                     .file_bytes = v->tensors.bytes};
    *made = (choir_adapter_made){0};
    return adapter_failure(pool->options.make(pool->options.user, &file, made));
}

/* False: it is read once more. */
static bool gives_up(choir_adapters *pool, adapter_load *load)
{
    if (load->n_tries == MAX_LOAD_TRIES) return true;
    load->n_tries++;
    load->n_sent = 0;
    load->error = 0;
    pthread_mutex_lock(&pool->lock);
    pool->stats.n_retries++;
    pthread_mutex_unlock(&pool->lock);
    return false;
}

/* All pieces have arrived, or one has not. */
static void finish_load(choir_adapters *pool, adapter_load *load)
{
    choir_adapter_made made = {0};
    choir_status status;
    int e = load->error;
    if (!files_unchanged(&load->files)) { /* cut, or written to */
        load_anew(pool, load);
        return;
    }
    if (e != 0 && !gives_up(pool, load)) return;
    if (e != 0)
        status = choir_fail(CHOIR_E_UNAVAILABLE, "adapter %s cannot be read: %s",
                            load->version->name, strerror(e));
    else
        status = make(pool, load, &made);
    load_end(pool, load, status, &made);
}

static uint32_t n_in_flight(const choir_adapters *pool)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < MAX_LOADS; i++) n += pool->loads[i].n_in_flight;
    return n;
}

bool loader_turn(choir_adapters *pool)
{
    choir_read_done done[MAX_REAPED];
    free_gone(pool);
    bool moved = begin_loads(pool);
    for (uint32_t i = 0; i < MAX_LOADS; i++) send_pieces(pool, &pool->loads[i]);
    bool reading = n_in_flight(pool) > 0;
    /* With nothing in flight the disk took none of these. */
    for (uint32_t i = 0; i < MAX_LOADS && !reading; i++)
        if (has_unsent(&pool->loads[i])) pool->loads[i].error = EAGAIN;
    uint32_t n = reading ? pool->disk->reap(pool->disk, done, MAX_REAPED, REAP_NS) : 0;
    for (uint32_t i = 0; i < n; i++) {
        adapter_load *load = &pool->loads[done[i].tag];
        load->n_in_flight--;
        if (load->error == 0) load->error = done[i].error;
    }
    for (uint32_t i = 0; i < MAX_LOADS; i++) {
        if (!is_over(&pool->loads[i])) continue;
        finish_load(pool, &pool->loads[i]);
        moved = true;
    }
    return moved || reading;
}

void *run_loader(void *arg)
{
    choir_adapters *pool = arg;
    for (;;) {
        bool busy = loader_turn(pool);
        pthread_mutex_lock(&pool->lock);
        while (!busy && !pool->nudged && !pool->stopping)
            pthread_cond_wait(&pool->work, &pool->lock);
        pool->nudged = false;
        bool stop = pool->stopping;
        pthread_mutex_unlock(&pool->lock);
        if (stop) return NULL;
    }
}

/* Reads in flight end before the memory that they fill. */
void loads_end(choir_adapters *pool)
{
    if (pool->disk != NULL) pool->disk->close(pool->disk);
    for (uint32_t i = 0; i < MAX_LOADS; i++) {
        adapter_load *load = &pool->loads[i];
        if (load->version != NULL) close_load(pool, load);
    }
    free_gone(pool);
}
