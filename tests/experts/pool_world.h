/* A pool over a folder of toy adapters, its loader run by hand, and a clock that stands still:
 * shared by the tests of the pool. Whatever does not succeed fails the test. */
#pragma once
#include "experts/adapter_pool.h"
#include "tests/support/toy_adapters.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

enum { KB = 1024, SIZE = 100 * KB };

extern uint64_t fake_now;

typedef struct world {
    toy_folder folder;
    toy_maker maker;
    toy_disk disk;
    choir_adapters *pool;
} world;

/* Of the world's folder; make_world() has done it. */
void open_pool(world *w, uint64_t budget);
/* The next adapter's making does this first. */
void before_making(void (*act)(world *w));
void make_world(world *w, uint64_t budget);
void assert_idle(const world *w);
/* Everything was given back. */
void end_world(world *w);
toy_spec spec_of(uint64_t seed);
/* Where add() puts it; the path is overwritten by the next call. */
choir_adapter_load place(const world *w, const char *name);
void add(world *w, const char *name, uint64_t seed);
/* Twenty turns of the loader. */
void work(world *w);
choir_adapter_claim *claim(world *w, const char *name, int64_t urgency);
bool pin(world *w, choir_adapter_claim *c);
void release(world *w, choir_adapter_claim *c);
uint64_t digest_of_seed(uint64_t seed);
/* What runs with the claim is what the seed says. */
void assert_holds(const choir_adapter_claim *c, uint64_t seed);
choir_adapter_info info_of(world *w, const char *name);
/* The last error's sentence has this part. */
void says(const char *part);
