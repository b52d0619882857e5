/* A disk for tests: a file in memory, a clock that it drives, completions in any order, and faults by a seeded
 * generator or on demand. */
#pragma once
#include "experts/experts.h"

enum { FAKE_MAX_READS = 4096 };

typedef struct fake_disk {
    choir_disk disk;
    uint8_t *image;
    uint64_t bytes;
    choir_read reads[FAKE_MAX_READS];
    uint64_t due_ns[FAKE_MAX_READS];
    uint32_t n_reads, depth, max_in_flight;
    uint64_t random;
    uint64_t slowest_ns; /* a read takes up to so long */
    /* of 1000 reads: so many fail with EIO, are damaged on the way, or take 5 s */
    uint32_t eio_permille, damage_permille, stall_permille;
    uint64_t bad_from, bad_to;         /* reads that begin here always fail … */
    uint64_t damaged_from, damaged_to; /* … or are always damaged */
    bool stalled;                      /* nothing completes */
    uint64_t n_submitted;
} fake_disk;

extern uint64_t fake_now;
uint64_t fake_random(fake_disk *d);
/* Takes over the process's clock. The disk is the test's: the store's close leaves it. */
void fake_disk_create(fake_disk *d, uint64_t bytes, uint64_t seed);
void fake_disk_destroy(fake_disk *d);

/* A store of experts of sizes that differ, all in the image with their checksums, and a file of that size for
 * it to open. */
typedef struct fake_store {
    fake_disk disk;
    choir_experts *store;
    uint32_t n_layers, n_experts;
    char path[64];
    choir_expert_missing missing[64]; /* of the last run */
    uint32_t n_missing;
} fake_store;
void fake_store_create(fake_store *f, uint32_t n_layers, uint32_t n_experts, uint32_t n_slots,
                       uint64_t seed);
void fake_store_destroy(fake_store *f);
/* Every byte of its matrices is its own. */
void fake_assert_expert(const fake_store *f, uint32_t layer, uint32_t expert, const choir_expert *held);
/* Runs a request to its end. Returns how many experts came; those that did not are in f->missing. */
uint32_t fake_run(fake_store *f, uint32_t layer, const choir_expert_use *uses, uint32_t n);
