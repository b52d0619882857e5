/* Names and what they stand for: registered, loaded, replaced, unloaded, listed. */
#include "experts/adapter_pool.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

choir_status choir_adapters_check_name(const char *name)
{
    size_t n = strnlen(name, CHOIR_ADAPTER_MAX_NAME + 1);
    if (n == 0 || n > CHOIR_ADAPTER_MAX_NAME)
        return choir_fail(CHOIR_E_INVALID, "an adapter's name has %s%zu bytes, must be 1 to %d",
                          n > CHOIR_ADAPTER_MAX_NAME ? "at least " : "", n, CHOIR_ADAPTER_MAX_NAME);
    for (size_t i = 0; i < n; i++)
        if (!isascii((unsigned char)name[i]) ||
            (!isalnum((unsigned char)name[i]) && strchr("._-/:@+", name[i]) == NULL))
            return choir_fail(CHOIR_E_INVALID,
                              "byte %zu of an adapter's name is 0x%02x; letters, digits and "
                              "._-/:@+ may be in it",
                              i, (unsigned char)name[i]);
    bool begins = isalnum((unsigned char)name[0]) || name[0] == '_';
    if (!begins || name[n - 1] == '/' || strstr(name, "..") != NULL || strstr(name, "//") != NULL)
        return choir_fail(CHOIR_E_INVALID,
                          "the adapter's name %s must begin with a letter, a digit or _, and hold "
                          "no .. and no empty part",
                          name);
    return CHOIR_OK;
}

/* The path without what means nothing: "./" before it, slashes behind it. */
static choir_status clean_path(const choir_adapters *pool, const choir_adapter_load *what,
                               char out[MAX_PATH])
{
    const char *path = what->path;
    while (path[0] == '.' && path[1] == '/') path += 2;
    size_t n = strnlen(path, MAX_PATH);
    while (n > 1 && path[n - 1] == '/') n--;
    if (n == 0 || n == MAX_PATH)
        return choir_fail(CHOIR_E_INVALID, "adapter %s: its path has %s bytes, must be 1 to %d",
                          what->name, n == 0 ? "0" : "more", MAX_PATH - 1);
    memcpy(out, path, n);
    out[n] = 0;
    if (!what->beneath) return CHOIR_OK;
    if (pool->folder < 0)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "adapter %s: there is no folder of adapters to load from (--adapters)",
                          what->name);
    bool leaves = out[0] == '/';
    for (const char *at = out; !leaves && at != NULL; at = strchr(at, '/')) {
        at += *at == '/';
        leaves = strncmp(at, "..", 2) == 0 && (at[2] == '/' || at[2] == 0);
    }
    if (leaves)
        return choir_fail(CHOIR_E_INVALID,
                          "adapter %s: its path %.200s leads out of the adapters' folder",
                          what->name, out);
    return CHOIR_OK;
}

choir_status adapter_examine(choir_adapters *pool, const choir_adapter_load *what,
                             adapter_files *files, choir_adapter_facts *facts)
{
    choir_adapter_file file = {.name = what->name};
    char *config = NULL;
    void *header = NULL;
    choir_status status = files_open(pool, what->name, what->path, what->beneath, false, files);
    if (status != CHOIR_OK) return status;
    CHOIR_TRY_TO(done, status, files_read_config(files, what->name, &config, &file.config_bytes));
    CHOIR_TRY_TO(done, status, files_read_header(files, what->name, &header, &file.tensor_bytes));
    file.config = config;
    file.tensors = header;
    file.file_bytes = files->tensors_mark.bytes;
    *facts = (choir_adapter_facts){0};
    status = adapter_failure(pool->options.check(pool->options.user, &file, facts));
done:
    files_close(files);
    choir_free(config);
    choir_free(header);
    return status;
}

/* -- names, under the lock -- */

/* Where the name is, or has to be put. */
static uint32_t place_of(const choir_adapters *pool, const char *text, bool *found)
{
    uint32_t low = 0, high = pool->n_names;
    *found = false;
    while (low < high && !*found) {
        uint32_t mid = low + (high - low) / 2;
        int order = strcmp(text, pool->names[mid]->text);
        *found = order == 0;
        if (order > 0)
            low = mid + 1;
        else
            high = mid;
    }
    return *found ? high : low;
}

adapter_name *name_find(const choir_adapters *pool, const char *text)
{
    bool found;
    uint32_t at = place_of(pool, text, &found);
    return found ? pool->names[at] : NULL;
}

choir_status name_unknown(const choir_adapters *pool, const char *text)
{
    return choir_fail(CHOIR_E_NOT_FOUND, "there is no adapter %s; %u are registered", text,
                      pool->n_names);
}

static choir_status name_insert(choir_adapters *pool, const char *text, adapter_name **out)
{
    bool found;
    uint32_t at = place_of(pool, text, &found);
    if (found) {
        *out = pool->names[at];
        return CHOIR_OK;
    }
    if (pool->n_names == pool->options.max_names)
        return choir_fail(CHOIR_E_FULL, "adapter %s: %u adapters are registered, the limit is %u",
                          text, pool->n_names, pool->options.max_names);
    if (pool->n_names == pool->names_room) {
        uint32_t room = pool->names_room == 0 ? 64 : 2 * pool->names_room;
        adapter_name **grown = choir_realloc(CHOIR_MEM_ADAPTERS, pool->names, room * sizeof *grown);
        if (grown == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "adapter %s: no memory for its name", text);
        pool->names = grown;
        pool->names_room = room;
    }
    adapter_name *name = choir_calloc(CHOIR_MEM_ADAPTERS, 1, sizeof *name);
    if (name != NULL) name->text = choir_strdup(CHOIR_MEM_ADAPTERS, text);
    if (name == NULL || name->text == NULL) {
        choir_free(name);
        return choir_fail(CHOIR_E_NO_MEMORY, "adapter %s: no memory for its name", text);
    }
    memmove(pool->names + at + 1, pool->names + at, (pool->n_names - at) * sizeof *pool->names);
    pool->names[at] = name;
    pool->n_names++;
    *out = name;
    return CHOIR_OK;
}

/* The version becomes the name's; the one before is retired. */
static choir_status make_current(choir_adapters *pool, const choir_adapter_load *what,
                                 choir_adapter_version *v)
{
    adapter_name *name;
    CHOIR_TRY(name_insert(pool, what->name, &name));
    choir_adapter_version *before = name->current;
    name->current = v;
    v->of = name;
    v->kept = what->keep;
    if (v->state == VERSION_RESIDENT) name->n_loads++; /* read before it had the name */
    version_recount(pool, v);
    if (before != NULL) version_retire(pool, before, v);
    version_adopt(pool, v);
    pool_nudge(pool);
    return CHOIR_OK;
}

static bool is_good(const choir_adapter_version *v)
{
    return v->state != VERSION_FAILED && !v->quarantined;
}

/* Whether a version lies where the files were found. */
static bool same_place(const choir_adapter_version *v, const choir_adapter_load *what,
                       const file_mark *folder)
{
    return (v->beneath == what->beneath && strcmp(v->path, what->path) == 0) ||
           (v->folder.device == folder->device && v->folder.inode == folder->inode);
}

static void set_kept(choir_adapters *pool, choir_adapter_version *v, bool kept)
{
    v->kept = kept;
    version_recount(pool, v);
    pool_shrink(pool);
    pool_nudge(pool);
}

static choir_status exists(const char *name)
{
    return choir_fail(
        CHOIR_E_EXISTS,
        "adapter %s has other weights already, from another path: unload it, or load with replace",
        name);
}

choir_status files_changed(const char *name)
{
    return choir_fail(CHOIR_E_PRECONDITION,
                      "adapter %s: its files have changed while it was loaded", name);
}

static choir_status register_found(choir_adapters *pool, const choir_adapter_load *what,
                                   const adapter_files *files, const choir_adapter_facts *facts)
{
    const adapter_name *name = name_find(pool, what->name);
    choir_adapter_version *now = name != NULL ? name->current : NULL;
    bool here = now != NULL && same_place(now, what, &files->folder);
    if (here && is_good(now) && file_mark_same(&now->config, &files->config_mark) &&
        file_mark_same(&now->tensors, &files->tensors_mark)) {
        set_kept(pool, now, what->keep);
        return CHOIR_OK;
    }
    if (now != NULL && !here && !what->replace) return exists(what->name);
    choir_adapter_version *v = version_create(pool, what, files, facts);
    if (v == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "adapter %s: no memory to register it", what->name);
    choir_status status = make_current(pool, what, v);
    if (status != CHOIR_OK) version_end_if_idle(pool, v);
    return status;
}

/* What is asked for, its path cleaned, and what lies there. */
typedef struct examined {
    char path[MAX_PATH];
    choir_adapter_load what;
    adapter_files files;
    choir_adapter_facts facts;
} examined;

static choir_status find_asked(choir_adapters *pool, const choir_adapter_load *asked, examined *out)
{
    CHOIR_TRY(choir_adapters_check_name(asked->name));
    CHOIR_TRY(clean_path(pool, asked, out->path));
    out->what = *asked;
    out->what.path = out->path;
    return adapter_examine(pool, &out->what, &out->files, &out->facts);
}

choir_status choir_adapters_register(choir_adapters *pool, const choir_adapter_load *asked)
{
    examined f;
    CHOIR_TRY(find_asked(pool, asked, &f));
    pthread_mutex_lock(&pool->lock);
    choir_status status = register_found(pool, &f.what, &f.files, &f.facts);
    pthread_mutex_unlock(&pool->lock);
    return status;
}

/* -- load -- */

static void fill_info(const adapter_name *name, choir_adapter_info *out)
{
    static const char *const texts[] = {"registered", "loading", "resident", "failed"};
    const choir_adapter_version *v = name->current;
    *out = (choir_adapter_info){.facts = v->facts,
                                .state = v->quarantined ? "quarantined" : texts[v->state],
                                .version = v->number,
                                .digest = v->digest,
                                .resident = v->state == VERSION_RESIDENT,
                                .bytes = v->state == VERSION_RESIDENT ? v->bytes : 0,
                                .file_bytes = v->tensors.bytes,
                                .n_pins = v->n_pins,
                                .n_claims = v->n_claims,
                                .kept = v->kept,
                                .quarantined = v->quarantined,
                                .failure = v->state == VERSION_FAILED ? v->failure : CHOIR_OK,
                                .n_requests = name->n_requests,
                                .n_loads = name->n_loads,
                                .n_evictions = name->n_evictions,
                                .n_failures = name->n_failures,
                                .n_waits = name->n_waits,
                                .wait_ns = name->wait_ns};
    snprintf(out->name, sizeof out->name, "%s", name->text);
    if (v->state == VERSION_FAILED) snprintf(out->why, sizeof out->why, "%s", v->why);
}

/* Until the candidate is in memory or has failed. */
static choir_status await(choir_adapters *pool, const choir_adapter_version *v,
                          const choir_adapter_load *what)
{
    bool goes_on = true;
    while (v->state != VERSION_RESIDENT && v->state != VERSION_FAILED) {
        if (what->stopped != NULL && what->stopped(what->user))
            return choir_fail(CHOIR_E_CANCELLED, "adapter %s: nobody waits for it any more",
                              v->name);
        if (!goes_on || (what->deadline_ns != 0 && choir_clock_now() >= what->deadline_ns)) {
            if (v->state == VERSION_REGISTERED)
                return choir_fail(CHOIR_E_FULL,
                                  "adapter %s: there is no room, those in use take all that "
                                  "adapters may have",
                                  v->name);
            return choir_fail(CHOIR_E_DEADLINE, "adapter %s was still being read", v->name);
        }
        if (pool->options.manual) {
            pthread_mutex_unlock(&pool->lock);
            goes_on = loader_turn(pool);
            pthread_mutex_lock(&pool->lock);
            continue;
        }
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += 20 * (long)CHOIR_MS; /* a deadline is looked at so often */
        if (until.tv_nsec >= (long)CHOIR_SECOND) {
            until.tv_sec++;
            until.tv_nsec -= (long)CHOIR_SECOND;
        }
        pthread_cond_timedwait(&pool->settled, &pool->lock, &until);
    }
    return v->state == VERSION_RESIDENT ? CHOIR_OK : choir_fail(v->failure, "%s", v->why);
}

static bool same_files(const choir_adapter_version *a, const choir_adapter_version *b)
{
    return file_mark_same(&a->config, &b->config) && file_mark_same(&a->tensors, &b->tensors);
}

/* The candidate is in memory: it becomes the name's version, or what is there will do. The name may
 * have got another one meanwhile, from here or from elsewhere. */
static choir_status settle(choir_adapters *pool, const choir_adapter_load *what,
                           choir_adapter_version *v)
{
    const adapter_name *name = name_find(pool, what->name);
    choir_adapter_version *now = name != NULL ? name->current : NULL;
    if (now == NULL) return make_current(pool, what, v);
    bool here = same_place(now, what, &v->folder);
    if (here && now->digest == v->digest && is_good(now)) {
        if (now->state == VERSION_RESIDENT) {
            set_kept(pool, now, what->keep);
            return CHOIR_OK;
        }
        v->number = now->number; /* evicted, and back: nothing has changed */
        v->n_poisoned = now->n_poisoned;
        return make_current(pool, what, v);
    }
    if (here && now->number > v->number && !same_files(now, v)) return files_changed(what->name);
    if (!here && !what->replace && now->digest != v->digest) return exists(what->name);
    if (now->number > v->number) version_renumber(pool, v);
    return make_current(pool, what, v);
}

static choir_status load_found(choir_adapters *pool, const choir_adapter_load *what,
                               const adapter_files *files, const choir_adapter_facts *facts)
{
    char name[CHOIR_ADAPTER_MAX_NAME + 16];
    choir_adapter_claim claim = {.urgency = INT64_MIN};
    const adapter_name *known = name_find(pool, what->name);
    choir_adapter_version *now = known != NULL ? known->current : NULL;
    if (now != NULL && now->digest == 0 && !what->replace && !same_place(now, what, &files->folder))
        return exists(what->name); /* what it has was never read: they count as others */
    choir_adapter_version *v = version_create(pool, what, files, facts);
    if (v == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "adapter %s: no memory to load it", what->name);
    snprintf(name, sizeof name, "adapter %s", what->name);
    /* The one that it may follow can go meanwhile: both together need not fit. */
    bool lets_go = now != NULL && now->kept;
    if (lets_go) {
        now->n_holds++;
        set_kept(pool, now, false);
    }
    choir_status status =
        pool_check_fits(pool, name, facts->bytes + version_overhead(v), pool->sums.kept);
    if (status == CHOIR_OK) {
        claim_link(pool, v, &claim);
        v->candidate = true;
        pool->n_candidates++;
        pool_nudge(pool);
        status = await(pool, v, what);
        v->candidate = false;
        pool->n_candidates--;
        if (status == CHOIR_OK) status = settle(pool, what, v);
        if (status != CHOIR_OK) pool->n_bad_news++;
        claim_unlink(pool, &claim);
    }
    if (lets_go) {
        now->n_holds--;
        if (status != CHOIR_OK && now->of != NULL) set_kept(pool, now, true);
        version_end_if_idle(pool, now);
    }
    version_end_if_idle(pool, v);
    pool_nudge(pool);
    return status;
}

choir_status choir_adapters_load(choir_adapters *pool, const choir_adapter_load *asked,
                                 choir_adapter_info *out)
{
    examined f;
    CHOIR_TRY(find_asked(pool, asked, &f));
    pthread_mutex_lock(&pool->lock);
    choir_status status = load_found(pool, &f.what, &f.files, &f.facts);
    const adapter_name *name = name_find(pool, f.what.name);
    if (status == CHOIR_OK && name == NULL)
        status = choir_fail(CHOIR_E_ABORTED, "adapter %s was unloaded meanwhile", f.what.name);
    if (status == CHOIR_OK && out != NULL) fill_info(name, out);
    pthread_mutex_unlock(&pool->lock);
    return status;
}

/* -- the others -- */

choir_status choir_adapters_unload(choir_adapters *pool, const char *text)
{
    bool found;
    CHOIR_TRY(choir_adapters_check_name(text));
    pthread_mutex_lock(&pool->lock);
    uint32_t at = place_of(pool, text, &found);
    choir_status status = found ? CHOIR_OK : name_unknown(pool, text);
    if (found) {
        adapter_name *name = pool->names[at];
        pool->n_names--;
        memmove(pool->names + at, pool->names + at + 1, (pool->n_names - at) * sizeof *pool->names);
        version_retire(pool, name->current, NULL);
        choir_free(name->text);
        choir_free(name);
    }
    pthread_mutex_unlock(&pool->lock);
    return status;
}

choir_status choir_adapters_find(choir_adapters *pool, const char *text, choir_adapter_info *out)
{
    CHOIR_TRY(choir_adapters_check_name(text));
    pthread_mutex_lock(&pool->lock);
    const adapter_name *name = name_find(pool, text);
    choir_status status = name != NULL ? CHOIR_OK : name_unknown(pool, text);
    if (name != NULL) fill_info(name, out);
    pthread_mutex_unlock(&pool->lock);
    return status;
}

uint32_t choir_adapters_list(choir_adapters *pool, const char *after, choir_adapter_info *out,
                             uint32_t max)
{
    bool found;
    pthread_mutex_lock(&pool->lock);
    uint32_t first = place_of(pool, after, &found);
    if (found) first++;
    uint32_t n = pool->n_names - first;
    for (uint32_t i = 0; i < n && i < max; i++) fill_info(pool->names[first + i], &out[i]);
    pthread_mutex_unlock(&pool->lock);
    return n;
}

/* -- a folder of adapters -- */

typedef struct walk {
    choir_adapters *pool;
    const char *folder;
    uint32_t n_good, n_bad;
} walk;

static bool is_adapter(const char *folder)
{
    char path[2 * MAX_PATH + 32];
    snprintf(path, sizeof path, "%s/adapter_config.json", folder);
    return access(path, F_OK) == 0;
}

static void take_one(walk *w, const char *name, const char *path)
{
    const choir_adapter_load what = {.name = name, .path = path};
    if (choir_adapters_register(w->pool, &what) == CHOIR_OK) {
        w->n_good++;
        return;
    }
    w->n_bad++;
    choir_log(CHOIR_LOG_WARNING, "%s is left out: %s", path, choir_error_message());
}

static int is_visible(const struct dirent *d)
{
    return d->d_name[0] != '.';
}

static choir_status walk_folder(walk *w, const char *within);

/* A thing that lies in the folder; `name`: its path from there. */
static void walk_entry(walk *w, char name[MAX_PATH], bool deeper)
{
    char path[2 * MAX_PATH];
    size_t n = strlen(name);
    snprintf(path, sizeof path, "%s/%s", w->folder, name);
    if (!choir_folder_exists(path)) {
        if (n <= 5 || strcmp(name + n - 5, ".gguf") != 0) return;
        name[n - 5] = 0;
        take_one(w, name, path);
        return;
    }
    uint32_t before = w->n_good + w->n_bad;
    if (deeper && !is_adapter(path) && walk_folder(w, name) != CHOIR_OK)
        choir_log(CHOIR_LOG_WARNING, "%s", choir_error_message());
    if (w->n_good + w->n_bad == before) take_one(w, name, path); /* or what it lacks is told */
}

/* `within`: the path from the folder to one in it, or "". */
static choir_status walk_folder(walk *w, const char *within)
{
    struct dirent **list;
    char path[2 * MAX_PATH], name[MAX_PATH];
    const char *slash = within[0] != 0 ? "/" : "";
    snprintf(path, sizeof path, "%s%s%s", w->folder, slash, within);
    int n = scandir(path, &list, is_visible, alphasort);
    if (n < 0) return choir_fail(CHOIR_E_IO, "the folder of adapters %s: %m", path);
    for (int i = 0; i < n; i++) {
        snprintf(name, sizeof name, "%s%s%s", within, slash, list[i]->d_name);
        walk_entry(w, name, within[0] == 0);
        free(list[i]);
    }
    free(list);
    return CHOIR_OK;
}

choir_status choir_adapters_register_folder(choir_adapters *pool, const char *folder,
                                            uint32_t *n_good, uint32_t *n_bad)
{
    walk w = {.pool = pool, .folder = folder};
    *n_good = *n_bad = 0;
    if (strnlen(folder, MAX_PATH) == MAX_PATH)
        return choir_fail(CHOIR_E_INVALID, "the path of the folder of adapters is too long");
    if (is_adapter(folder))
        return choir_fail(CHOIR_E_INVALID,
                          "%s is an adapter itself, not a folder of adapters; name the folder that "
                          "it lies in",
                          folder);
    choir_status status = walk_folder(&w, "");
    *n_good = w.n_good;
    *n_bad = w.n_bad;
    return status;
}
