/* kill -9 at any moment: a child feeds the journal and tells what was acknowledged, until it is
 * killed; then everything it told is there exactly once. CHOIR_KILLS says how often, CHOIR_SEED
 * where chance begins. */
#include "tests/router/learn/journal_world.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* A message on the pipe is written at once, so it is whole or not there. */
typedef struct told {
    uint32_t number;
    bool is_feedback;
} told;

typedef struct sent {
    int pipe;
    told what;
} sent;

static void tell(void *user, const choir_journal_receipt *receipt)
{
    sent *s = user;
    if (receipt->status == CHOIR_OK && write(s->pipe, &s->what, sizeof s->what) != sizeof s->what)
        _exit(3);
    if (receipt->status != CHOIR_OK) {
        fprintf(stderr, "%s\n", receipt->message);
        _exit(4);
    }
    free(s);
}

static sent *make_sent(int pipe, uint32_t number, bool is_feedback)
{
    sent *s = malloc(sizeof *s);
    if (s == NULL) _exit(5);
    *s = (sent){pipe, {number, is_feedback}};
    return s;
}

/* As fast as the queue takes it; every fourth has feedback, which waits in the same queue behind
 * its decision. */
_Noreturn static void run_child(const world *w, uint32_t round, int pipe)
{
    choir_journal *journal;
    char id[48];
    if (choir_journal_open(w->folder, &w->options, &journal) != CHOIR_OK) {
        fprintf(stderr, "%s\n", choir_error_message());
        _exit(6);
    }
    for (uint32_t i = 0;; i++) {
        toy t;
        snprintf(id, sizeof id, "k%u-%u", round, i);
        make_toy(&t, id, "m", "t");
        sent *s = make_sent(pipe, i, false);
        while (choir_journal_decide(journal, &t.decision, tell, s) != CHOIR_OK) usleep(100);
        if (i % 4 != 0) continue;
        choir_feedback f = {
            .request_id = id, .tenant = "t", .signal = CHOIR_SIGNAL_SCORE, .value = 0.25F};
        s = make_sent(pipe, i, true);
        while (choir_journal_feed(journal, &f, tell, s) != CHOIR_OK) usleep(100);
    }
}

static uint64_t next_random(uint64_t *random)
{
    *random = *random * UINT64_C(6364136223846793005) + 1442695040888963407;
    return *random >> 33;
}

enum { MAX_NUMBERS = 1 << 16 };
typedef struct seen {
    uint8_t decisions[MAX_NUMBERS], feedback[MAX_NUMBERS];
    uint32_t round, n;
} seen;

static bool count_seen(void *user, const choir_journal_entry *e)
{
    seen *s = user;
    uint32_t round, number;
    assert_int_equal(sscanf(e->decision.request_id, "k%u-%u", &round, &number), 2);
    assert_true(number < MAX_NUMBERS);
    assert_true(e->decision.n_candidates > 0);
    s->n++;
    if (round == s->round) (e->is_feedback ? s->feedback : s->decisions)[number]++;
    return true;
}

static uint32_t read_told(int pipe, told **all)
{
    uint32_t n = 0, room = 0;
    *all = NULL;
    for (;;) {
        if (n == room) {
            room = 2 * room + 1024;
            *all = realloc(*all, room * sizeof **all);
            assert_non_null(*all);
        }
        if (read(pipe, *all + n, sizeof **all) != sizeof **all) return n;
        n++;
    }
}

/* The pipe is read meanwhile, lest the child wait for it. */
static void *kill_later(void *arg)
{
    const int64_t *wait = arg;
    usleep((useconds_t)wait[1]);
    kill((pid_t)wait[0], SIGKILL);
    return NULL;
}

static uint32_t kill_one(world *w, uint32_t round, uint64_t *random, told **all)
{
    int ends[2], status;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(ends[0]);
        run_child(w, round, ends[1]);
    }
    close(ends[1]);
    /* Some while the journal is opened, most while it is written. */
    int64_t wait[2] = {child, (int64_t)(next_random(random) % (round % 4 == 0 ? 30000 : 200000))};
    pthread_t killer;
    assert_int_equal(pthread_create(&killer, NULL, kill_later, wait), 0);
    uint32_t n = read_told(ends[0], all);
    pthread_join(killer, NULL);
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    return n;
}

/* All that was told is there once; and nothing is there twice, or in part. */
static void check_round(world *w, uint32_t round, const told *all, uint32_t n)
{
    static seen s;
    uint64_t last;
    choir_journal_stats stats;
    memset(&s, 0, sizeof s);
    s.round = round;
    open_world(w);
    choir_journal_get_stats(w->journal, &stats);
    assert_int_equal(choir_journal_read(w->journal, "m", "t", 0, 0, count_seen, &s, &last),
                     CHOIR_OK);
    assert_int_equal(s.n, stats.n_decisions + stats.n_feedback);
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *counts = all[i].is_feedback ? s.feedback : s.decisions;
        if (counts[all[i].number] != 1)
            fail_msg("%s %u of round %u is there %d times",
                     all[i].is_feedback ? "feedback" : "decision", all[i].number, round,
                     counts[all[i].number]);
    }
    for (uint32_t i = 0; i < MAX_NUMBERS; i++) {
        assert_true(s.decisions[i] <= 1 && s.feedback[i] <= s.decisions[i]);
        if (i > 0) assert_true(s.decisions[i] <= s.decisions[i - 1]); /* in order */
    }
    close_world(w);
}

/* With a queue that is short, so that there are many commits. */
static void make_closed(world *w)
{
    make_closed_world(w, "/tmp");
    w->options.max_queued = 64;
}

static void test_kill(void **state)
{
    (void)state;
    const char *kills = getenv("CHOIR_KILLS"), *seed = getenv("CHOIR_SEED");
    uint32_t n_kills = kills != NULL ? (uint32_t)strtoul(kills, NULL, 10) : 20;
    uint64_t random = seed != NULL ? strtoull(seed, NULL, 10) : (uint64_t)time(NULL), n_told = 0;
    printf("CHOIR_SEED=%" PRIu64 "\n", random);
    fflush(stdout);
    world w;
    make_closed(&w);
    for (uint32_t round = 0; round < n_kills; round++) {
        told *all;
        if (round % 25 == 24) { /* it is long enough to be checked again and again */
            end_world(&w);
            make_closed(&w);
        }
        uint32_t n = kill_one(&w, round, &random, &all);
        check_round(&w, round, all, n);
        free(all);
        n_told += n;
    }
    printf("%u kills, %" PRIu64 " entries were acknowledged, and all are there once\n", n_kills,
           n_told);
    assert_true(n_kills < 10 || n_told > 0);
    open_world(&w);
    end_world(&w);
}

int main(void)
{
    choir_log_set_level(CHOIR_LOG_ERROR);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kill)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
