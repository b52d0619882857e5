/* A world whose engine has a pool of toy adapters, both run by hand. */
#pragma once
#include "tests/scheduler/world.h"
#include "tests/support/toy_adapters.h"

enum { SIZE = 8 << 10, ROOM = 1 << 20, PAGE = 4, N_PROMPT = 14 };

typedef struct house {
    world w;
    toy_folder folder;
    toy_maker maker;
    toy_disk disk;
    choir_adapters *pool;
    size_t bytes_before; /* of adapters: houses may stand in each other */
} house;

void open_house(house *h); /* with room for everything */
/* floor: 0, or the adapters' part of the memory that they share with experts; budget: the most they may have. */
void open_house_with(house *h, uint32_t n_pages, choir_scheduler_options o, uint64_t budget,
                     uint64_t floor);
void close_house(house *h); /* nothing runs, no claim is left, nothing was leaked */
void assert_no_claims(const house *h);

void add(house *h, const char *name, toy_spec spec); /* writes and registers it; bytes 0: SIZE */
choir_status load(house *h, const char *name);       /* from where add() writes */
void turn(house *h);                                 /* one of the loader, one tick */
void finish_one(house *h, choir_stream *stream, answer *a);
answer ask(house *h, const choir_request *r);
/* What the request gets with nobody beside it, its adapters being what the specs say. */
answer alone(const choir_request *r, const toy_spec *specs);
bool same(const answer *a, const answer *b);
