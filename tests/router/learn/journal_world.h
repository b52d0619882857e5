/* WHAT    What tests of the journal share: a folder, entries whose every field follows from their id, calls
 *         that wait for the answer, and the whole journal as a list.
 * OWNS    The folder, until end_world().
 * THREADS One owner.
 * ERRORS  An assertion that fails ends the test.
 * LIMITS  The list holds 4,096 entries.
 * NEXT    tests/router/learn/journal_test.c */
#pragma once
#include "router/learn/journal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

typedef struct world {
    char folder[96];
    choir_journal_options options;
    choir_journal *journal; /* NULL: closed */
} world;

void make_world(world *w); /* open */
/* No journal was there yet. where: NULL, a place in memory if there is one, or a folder on a disk.
 */
void make_closed_world(world *w, const char *where);
void open_world(world *w);
void close_world(world *w);
void end_world(world *w);
void world_path(const world *w, const char *name, char path[128]); /* of a file in the folder */
/* Runs SQL on the closed journal, as somebody with an editor would. */
void edit(const world *w, const char *sql);
int64_t ask_number(const world *w, const char *sql);

typedef struct reply {
    choir_status status;
    char why[512];
    uint64_t sequence;
    bool duplicate, there;
} reply;

enum { N_TOY_FEATURES = 5, TOY_ROUTES = 40 };
typedef struct toy {
    choir_decision decision;
    float features[N_TOY_FEATURES];
    uint8_t routes[TOY_ROUTES];
} toy;

/* Every field follows from the id; the model and the tenant are lent. */
void make_toy(toy *t, const char *id, const char *model, const char *tenant);
reply decide_toy(world *w, const toy *t);
reply decide(world *w, const char *id, const char *model, const char *tenant);
reply feed(world *w, const choir_feedback *feedback);
reply thumb(world *w, const char *id, const char *tenant, float value);
/* Without waiting: the reply is filled later, on the writer's thread; wait_for() waits. */
choir_status start_decide(world *w, const toy *t, reply *out);
choir_status start_feed(world *w, const choir_feedback *feedback, reply *out);
void wait_for(const reply *r);

typedef struct listed {
    uint64_t sequence, decision_sequence;
    char id[CHOIR_MAX_REQUEST_ID];
    bool is_feedback;
    choir_signal signal;
    float value;
    char text[64];
} listed;
enum { MAX_LISTED = 4096 };
typedef struct listing {
    uint32_t n;
    uint64_t last;
    listed at[MAX_LISTED];
} listing;
/* In the order of sequence, each decision compared with the toy of its id. The list is the only one
 * there is. */
const listing *list_all(world *w, const char *model, const char *tenant);
uint32_t count_listed(const listing *l, const char *id, bool is_feedback);
