/* The queue and its writer. The writer takes all that waits, writes it in one transaction, and
 * answers each entry after the commit: the disk is waited for once for all of them. */
#include "router/learn/journal_state.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

static const uint64_t MAX_QUEUED_BYTES = (uint64_t)64 << 20;
static const uint64_t CARE_NS = 60 * CHOIR_SECOND; /* between two retentions by itself */

/* -- transactions -- */

choir_status journal_ready(choir_journal *j)
{
    int moved = 0;
    if (j->db.db != NULL &&
        sqlite3_file_control(j->db.db, "main", SQLITE_FCNTL_HAS_MOVED, &moved) == SQLITE_OK &&
        moved) {
        choir_log(CHOIR_LOG_WARNING, "the journal %s was moved or deleted: a new one is begun",
                  j->path);
        journal_db_close(&j->db);
    }
    if (j->db.db == NULL) CHOIR_TRY(journal_connect(j, false));
    j->db.rc = SQLITE_OK;
    return CHOIR_OK;
}

choir_status journal_begin(choir_journal *j)
{
    CHOIR_TRY(journal_ready(j));
    j->delta = (journal_delta){0};
    return journal_run_plain(&j->db, SQL_BEGIN);
}

choir_status journal_measure(choir_journal *j)
{
    int64_t n_pages, n_free;
    CHOIR_TRY(journal_number(&j->db, SQL_N_PAGES, &n_pages));
    CHOIR_TRY(journal_number(&j->db, SQL_N_FREE_PAGES, &n_free));
    j->used_bytes = (uint64_t)(n_pages - n_free) * j->page_bytes;
    pthread_mutex_lock(&j->lock);
    j->stats.bytes = (uint64_t)n_pages * j->page_bytes;
    pthread_mutex_unlock(&j->lock);
    return CHOIR_OK;
}

choir_status journal_commit(choir_journal *j)
{
    CHOIR_TRY(journal_run_plain(&j->db, SQL_COMMIT));
    pthread_mutex_lock(&j->lock);
    j->stats.n_decisions += (uint64_t)j->delta.n_decisions;
    j->stats.n_feedback += (uint64_t)j->delta.n_feedback;
    if (j->delta.last_sequence != 0) j->stats.last_sequence = j->delta.last_sequence;
    j->stats.healthy = true;
    j->stats.why[0] = '\0';
    pthread_mutex_unlock(&j->lock);
    /* What is committed stays so, whatever the numbers say. */
    if (journal_measure(j) != CHOIR_OK) journal_recover(j);
    return CHOIR_OK;
}

choir_status journal_count(choir_journal *j)
{
    int64_t n_decisions, n_feedback, last;
    CHOIR_TRY(journal_number(&j->db, SQL_N_DECISIONS, &n_decisions));
    CHOIR_TRY(journal_number(&j->db, SQL_N_FEEDBACK, &n_feedback));
    CHOIR_TRY(journal_number(&j->db, SQL_LAST_SEQUENCE, &last));
    pthread_mutex_lock(&j->lock);
    j->stats.n_decisions = (uint64_t)n_decisions;
    j->stats.n_feedback = (uint64_t)n_feedback;
    j->stats.last_sequence = (uint64_t)last;
    pthread_mutex_unlock(&j->lock);
    return journal_measure(j);
}

/* -- answers -- */

static void answer(queued *entry)
{
    entry->done(entry->user, &entry->receipt);
    choir_free(entry);
}

/* What an entry is answered, later. */
static void settle(queued *entry, choir_status status, const char *why)
{
    snprintf(entry->why, sizeof entry->why, "%s", why);
    entry->receipt = (choir_journal_receipt){.status = status, .message = entry->why};
}

/* The writing has failed: `why` is told to every entry that waits for it. */
static choir_status note_failure(choir_journal *j, choir_status status,
                                 char why[CHOIR_MAX_SENTENCE])
{
    if (status == CHOIR_E_DATA_LOSS) { /* the file is set aside, and the entry can be sent again */
        choir_fail_in(CHOIR_E_IO, "this was not written and may be sent again");
        status = CHOIR_E_IO;
    }
    snprintf(why, CHOIR_MAX_SENTENCE, "%s", choir_error_message());
    journal_recover(j);
    if (status == CHOIR_E_UNAVAILABLE) return status; /* a reader was in the way: nothing is ill */
    pthread_mutex_lock(&j->lock);
    bool news = j->stats.healthy;
    j->stats.healthy = false;
    snprintf(j->stats.why, sizeof j->stats.why, "%s", why);
    pthread_mutex_unlock(&j->lock);
    if (news) choir_log(CHOIR_LOG_ERROR, "%s", why);
    return status;
}

/* -- one transaction of entries -- */

static bool is_in_transaction(const queued *entry)
{
    return entry != NULL && entry->kind <= QUEUED_LAST_IN_TRANSACTION;
}

/* An error is the transaction's; what is wrong with the entry alone stands in its receipt. */
static choir_status write_one(choir_journal *j, queued *entry)
{
    journal_delta before = j->delta;
    entry->receipt = (choir_journal_receipt){.message = ""};
    CHOIR_TRY(journal_run_plain(&j->db, SQL_MARK));
    choir_status status = journal_write(j, entry);
    if (status != CHOIR_OK) {
        if (j->db.rc != SQLITE_OK) return status;
        settle(entry, status, choir_error_message());
        j->delta = before;
        CHOIR_TRY(journal_run_plain(&j->db, SQL_BACK_TO_MARK));
    }
    return journal_run_plain(&j->db, SQL_UNMARK);
}

static choir_status write_entries(choir_journal *j, queued *first)
{
    CHOIR_TRY(journal_begin(j));
    for (queued *entry = first; is_in_transaction(entry); entry = entry->next)
        CHOIR_TRY(write_one(j, entry));
    return journal_commit(j);
}

/* Returns what follows. */
static queued *write_group(choir_journal *j, queued *first)
{
    char why[CHOIR_MAX_SENTENCE];
    uint64_t n_refused = 0;
    queued *entry = first;
    choir_status status = write_entries(j, first);
    if (status != CHOIR_OK) status = note_failure(j, status, why);
    for (; is_in_transaction(entry); entry = entry->next) {
        if (status != CHOIR_OK) settle(entry, status, why);
        n_refused += entry->receipt.status != CHOIR_OK;
    }
    pthread_mutex_lock(&j->lock);
    j->stats.n_refused += n_refused;
    pthread_mutex_unlock(&j->lock);
    while (first != entry) {
        queued *next = first->next;
        answer(first);
        first = next;
    }
    return entry;
}

/* -- care, between the transactions -- */

static int64_t wall_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void end_retention(choir_journal *j, choir_status status, const char *why)
{
    j->retention = false;
    while (j->retaining != NULL) {
        queued *entry = j->retaining;
        j->retaining = entry->next;
        settle(entry, status, why);
        answer(entry);
    }
}

static void care(choir_journal *j)
{
    const choir_journal_options *o = &j->options;
    bool too_large = o->max_bytes != 0 && j->used_bytes > o->max_bytes, more;
    char why[CHOIR_MAX_SENTENCE] = "";
    if (!j->retention && (too_large || choir_clock_now() - j->cared_ns >= CARE_NS)) {
        j->retention = true;
        j->retain_ms = wall_ms();
        j->cared_ns = choir_clock_now();
    }
    if (!j->retention) return;
    choir_status status = journal_retain_slice(j, j->retain_ms, &more);
    if (status != CHOIR_OK) status = note_failure(j, status, why);
    if (status != CHOIR_OK || !more) end_retention(j, status, why);
}

static void start_retention(choir_journal *j, queued *entry)
{
    entry->next = j->retaining;
    j->retaining = entry;
    j->retention = true;
    j->retain_ms = entry->retain_ms;
}

static void forget(choir_journal *j, queued *entry)
{
    char why[CHOIR_MAX_SENTENCE] = "";
    choir_status status = journal_forget_now(j, entry->forget.tenant, entry->forget.n);
    if (status != CHOIR_OK) status = note_failure(j, status, why);
    settle(entry, status, why);
    answer(entry);
}

/* -- the writer -- */

static void wait_for_work(choir_journal *j)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)(CARE_NS / CHOIR_SECOND);
    while (j->first == NULL && !j->stopping && !j->suspect)
        if (pthread_cond_timedwait(&j->work, &j->lock, &until) == ETIMEDOUT) return;
}

/* All that waits. *stop: nothing does, and nothing will. */
static queued *take(choir_journal *j, bool *suspect, bool *stop)
{
    pthread_mutex_lock(&j->lock);
    if (!j->retention) wait_for_work(j);
    queued *first = j->first;
    j->first = NULL;
    j->last = &j->first;
    j->stats.n_queued = 0;
    j->queued_bytes = 0;
    *suspect = j->suspect;
    j->suspect = false;
    *stop = j->stopping && first == NULL;
    pthread_mutex_unlock(&j->lock);
    return first;
}

static void *run_writer(void *arg)
{
    choir_journal *j = arg;
    for (;;) {
        bool suspect, stop;
        queued *entry = take(j, &suspect, &stop);
        if (stop && j->retaining == NULL) return NULL;
        if (suspect) journal_look_at_damage(j);
        while (entry != NULL) {
            queued *next = entry->next;
            if (is_in_transaction(entry)) {
                next = write_group(j, entry);
            } else if (entry->kind == QUEUED_RETAIN) {
                start_retention(j, entry);
            } else {
                forget(j, entry);
            }
            entry = next;
        }
        care(j);
    }
}

/* -- the queue -- */

static choir_status no_memory(void)
{
    return choir_fail(CHOIR_E_NO_MEMORY, "no memory for an entry of the journal");
}

static queued *make_queued(queued_kind kind, size_t more_bytes)
{
    size_t bytes = sizeof(queued) + more_bytes;
    queued *entry = choir_alloc(CHOIR_MEM_LEARNING, bytes);
    if (entry == NULL) return NULL;
    entry->next = NULL;
    entry->kind = kind;
    entry->bytes = bytes;
    return entry;
}

/* Copies to *at, which moves on. */
static void *keep(char **at, const void *data, size_t bytes)
{
    char *to = *at;
    if (bytes > 0) memcpy(to, data, bytes);
    *at += bytes;
    return to;
}

static const char *keep_text(char **at, const char *text)
{
    return keep(at, text, strlen(text) + 1);
}

/* Who waits for an answer of his own has a thread that waits, which is bound enough. */
static choir_status push(choir_journal *j, queued *entry, bool always)
{
    choir_status status = CHOIR_OK;
    pthread_mutex_lock(&j->lock);
    bool full = j->stats.n_queued >= j->options.max_queued ||
                (j->stats.n_queued > 0 && j->queued_bytes + entry->bytes > MAX_QUEUED_BYTES);
    if (j->stopping) { /* a `done` asks, while the rest is written */
        status = choir_fail(CHOIR_E_UNAVAILABLE, "the journal is being closed");
    } else if (full && !always) {
        j->stats.n_refused++;
        status = choir_fail(CHOIR_E_FULL,
                            "%u entries wait to be written into the journal, more than it takes: "
                            "try again later",
                            j->stats.n_queued);
    } else {
        *j->last = entry;
        j->last = &entry->next;
        j->stats.n_queued++;
        j->queued_bytes += entry->bytes;
        pthread_cond_signal(&j->work);
    }
    pthread_mutex_unlock(&j->lock);
    if (status != CHOIR_OK) choir_free(entry);
    return status;
}

choir_status choir_journal_decide(choir_journal *journal, const choir_decision *decision,
                                  choir_journal_done done, void *user)
{
    CHOIR_TRY(journal_check_decision(decision));
    size_t features_bytes = decision->n_features * sizeof(float);
    queued *entry = make_queued(QUEUED_DECISION, features_bytes + decision->routes_bytes +
                                                     strlen(decision->model) + 1 +
                                                     strlen(decision->tenant) + 1);
    if (entry == NULL) return no_memory();
    char *at = (char *)(entry + 1);
    entry->decision = *decision;
    entry->decision.features = keep(&at, decision->features, features_bytes);
    entry->decision.routes =
        decision->routes != NULL ? keep(&at, decision->routes, decision->routes_bytes) : NULL;
    entry->decision.model = keep_text(&at, decision->model);
    entry->decision.tenant = keep_text(&at, decision->tenant);
    entry->done = done;
    entry->user = user;
    return push(journal, entry, false);
}

choir_status choir_journal_feed(choir_journal *journal, const choir_feedback *feedback,
                                choir_journal_done done, void *user)
{
    CHOIR_TRY(journal_check_feedback(feedback));
    const char *text = feedback->text != NULL ? feedback->text : "";
    queued *entry =
        make_queued(QUEUED_FEEDBACK, strlen(feedback->request_id) + 1 + strlen(feedback->tenant) +
                                         1 + strlen(text) + 1);
    if (entry == NULL) return no_memory();
    char *at = (char *)(entry + 1);
    entry->feedback = *feedback;
    entry->feedback.request_id = keep_text(&at, feedback->request_id);
    entry->feedback.tenant = keep_text(&at, feedback->tenant);
    entry->feedback.text = keep_text(&at, text);
    entry->done = done;
    entry->user = user;
    return push(journal, entry, false);
}

/* -- calls that wait for the writer -- */

typedef struct waiter {
    choir_journal *journal;
    bool done;
    choir_journal_receipt receipt;
    char why[CHOIR_MAX_SENTENCE];
} waiter;

static void wake(void *user, const choir_journal_receipt *receipt)
{
    waiter *w = user;
    choir_journal *j = w->journal; /* w is gone once done is seen */
    pthread_mutex_lock(&j->lock);
    w->receipt = *receipt;
    snprintf(w->why, sizeof w->why, "%s", receipt->message);
    w->done = true;
    pthread_cond_broadcast(&j->settled);
    pthread_mutex_unlock(&j->lock);
}

static choir_status push_and_wait(choir_journal *j, queued *entry, choir_journal_receipt *receipt)
{
    waiter w = {.journal = j};
    entry->done = wake;
    entry->user = &w;
    CHOIR_TRY(push(j, entry, true));
    pthread_mutex_lock(&j->lock);
    while (!w.done) pthread_cond_wait(&j->settled, &j->lock);
    pthread_mutex_unlock(&j->lock);
    if (receipt != NULL) *receipt = w.receipt;
    return w.receipt.status == CHOIR_OK ? CHOIR_OK : choir_fail(w.receipt.status, "%s", w.why);
}

static choir_status check_scope(const char *model, const char *tenant)
{
    if (!journal_text_is_good(model, CHOIR_MAX_SCOPE_NAME) ||
        !journal_text_is_good(tenant, CHOIR_MAX_SCOPE_NAME))
        return choir_fail(CHOIR_E_INVALID,
                          "a model's name and a tenant are UTF-8 of at most %d bytes",
                          CHOIR_MAX_SCOPE_NAME - 1);
    return CHOIR_OK;
}

static choir_status check_state(choir_version_state state, double share)
{
    if ((unsigned)state >= CHOIR_N_VERSION_STATES)
        return choir_fail(CHOIR_E_INVALID, "a version has no state %d", (int)state);
    if (!(share >= 0 && share <= 1))
        return choir_fail(CHOIR_E_INVALID, "a version's share is 0 to 1, not %g", share);
    return CHOIR_OK;
}

choir_status choir_journal_put_version(choir_journal *journal, const char *model,
                                       const char *tenant, choir_version_row *row)
{
    CHOIR_TRY(check_scope(model, tenant));
    CHOIR_TRY(check_state(row->state, row->share));
    if (!journal_text_is_good(row->digest, sizeof row->digest) ||
        !journal_text_is_good(row->evidence, sizeof row->evidence) || row->version > INT64_MAX)
        return choir_fail(CHOIR_E_INVALID, "a version's number, digest or evidence is none");
    queued *entry = make_queued(QUEUED_PUT, 0);
    if (entry == NULL) return no_memory();
    entry->version.model = model;
    entry->version.tenant = tenant;
    entry->version.row = row;
    choir_journal_receipt receipt;
    CHOIR_TRY(push_and_wait(journal, entry, &receipt));
    row->version = receipt.sequence;
    return CHOIR_OK;
}

choir_status choir_journal_move_version(choir_journal *journal, const char *model,
                                        const char *tenant, const choir_version_move *move)
{
    CHOIR_TRY(check_scope(model, tenant));
    CHOIR_TRY(check_state(move->to, move->share));
    if (move->to == CHOIR_VERSION_LIVE && move->was != CHOIR_VERSION_RETIRED &&
        move->was != CHOIR_VERSION_ROLLED_BACK)
        return choir_fail(CHOIR_E_INVALID, "the version that was live is retired or rolled back");
    if (move->evidence != NULL &&
        !journal_text_is_good(move->evidence, sizeof((choir_version_row *)0)->evidence))
        return choir_fail(CHOIR_E_INVALID, "evidence is UTF-8 of at most 511 bytes");
    queued *entry = make_queued(QUEUED_MOVE, 0);
    if (entry == NULL) return no_memory();
    entry->version.model = model;
    entry->version.tenant = tenant;
    entry->version.move = move;
    return push_and_wait(journal, entry, NULL);
}

choir_status choir_journal_retain(choir_journal *journal, int64_t now_ms)
{
    queued *entry = make_queued(QUEUED_RETAIN, 0);
    if (entry == NULL) return no_memory();
    entry->retain_ms = now_ms;
    return push_and_wait(journal, entry, NULL);
}

choir_status choir_journal_forget(choir_journal *journal, const char *tenant, uint64_t *n)
{
    *n = 0;
    CHOIR_TRY(check_scope("", tenant));
    queued *entry = make_queued(QUEUED_FORGET, 0);
    if (entry == NULL) return no_memory();
    entry->forget.tenant = tenant;
    entry->forget.n = n;
    return push_and_wait(journal, entry, NULL);
}

void choir_journal_get_stats(choir_journal *journal, choir_journal_stats *out)
{
    pthread_mutex_lock(&journal->lock);
    *out = journal->stats;
    pthread_mutex_unlock(&journal->lock);
}

/* -- life -- */

/* The kernel lets go of the lock when the process ends, however it does. */
static choir_status claim_folder(choir_journal *j)
{
    char path[sizeof j->path + 8];
    snprintf(path, sizeof path, "%s.lock", j->path);
    j->claim = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (j->claim < 0) return choir_fail(CHOIR_E_IO, "cannot open %s: %m", path);
    if (flock(j->claim, LOCK_EX | LOCK_NB) == 0) return CHOIR_OK;
    if (errno != EWOULDBLOCK) return choir_fail(CHOIR_E_IO, "cannot lock %s: %m", path);
    return choir_fail(
        CHOIR_E_UNAVAILABLE,
        "the journal %s is another process's: stop that one, or choose another folder", j->path);
}

/* An absolute path: SQLite reads "file:…" as a URI. */
static choir_status find_folder(choir_journal *j, const char *folder)
{
    CHOIR_TRY(choir_folder_make(folder));
    char *real = realpath(folder, NULL);
    if (real == NULL) return choir_fail(CHOIR_E_IO, "the folder %s: %m", folder);
    bool fits = strlen(real) < sizeof j->folder;
    if (fits) {
        snprintf(j->folder, sizeof j->folder, "%s", real);
        snprintf(j->path, sizeof j->path, "%s/journal.db", real);
    }
    free(real);
    if (!fits) return choir_fail(CHOIR_E_INVALID, "the path of the folder %s is too long", folder);
    return choir_folder_sync(j->folder);
}

static choir_status open_parts(choir_journal *j, const char *folder)
{
    CHOIR_TRY(find_folder(j, folder));
    CHOIR_TRY(claim_folder(j));
    CHOIR_TRY(journal_connect(j, true));
    CHOIR_TRY(choir_folder_sync(j->path));
    j->stats.healthy = true;
    j->cared_ns = choir_clock_now();
    CHOIR_TRY(choir_thread_start(&j->thread, "choir-journal", run_writer, j));
    j->threaded = true;
    return CHOIR_OK;
}

choir_status choir_journal_open(const char *folder, const choir_journal_options *options,
                                choir_journal **out)
{
    choir_journal *j = choir_calloc(CHOIR_MEM_LEARNING, 1, sizeof *j);
    if (j == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the journal");
    j->options = *options;
    j->options.vfs = NULL; /* it was lent */
    j->claim = -1;
    j->last = &j->first;
    if (options->vfs != NULL) snprintf(j->vfs, sizeof j->vfs, "%s", options->vfs);
    pthread_mutex_init(&j->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&j->work, &monotonic);
    pthread_cond_init(&j->settled, &monotonic);
    pthread_condattr_destroy(&monotonic);
    choir_status status = open_parts(j, folder);
    if (status != CHOIR_OK) {
        choir_journal_close(j);
        return status;
    }
    *out = j;
    return CHOIR_OK;
}

void choir_journal_close(choir_journal *journal)
{
    if (journal == NULL) return;
    pthread_mutex_lock(&journal->lock);
    journal->stopping = true;
    pthread_cond_signal(&journal->work);
    pthread_mutex_unlock(&journal->lock);
    if (journal->threaded) pthread_join(journal->thread, NULL);
    journal_db_close(&journal->db);
    if (journal->claim >= 0) close(journal->claim);
    pthread_mutex_destroy(&journal->lock);
    pthread_cond_destroy(&journal->work);
    pthread_cond_destroy(&journal->settled);
    choir_free(journal);
}
