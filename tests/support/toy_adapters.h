/* Adapters without a model, for tests of the pool and of the scheduler: a folder as PEFT writes it,
 * whose config is a line of numbers and whose tensors are what a seed says, so that a wrong, cut or
 * torn read is seen; and a disk that reads real files in any order, with faults. */
#pragma once
#include "experts/experts.h"

#include <stdatomic.h>

typedef struct toy_spec {
    uint64_t seed;
    uint32_t bytes; /* of the tensors, and in memory */
    uint32_t n_virtual, n_invocation, invocation[4];
    bool poison;  /* gives NaN logits */
    bool sole;    /* cannot be mixed */
    bool spoiled; /* its headers are right, its bytes are refused */
} toy_spec;

typedef struct toy_adapter {
    uint64_t digest, bytes;
    uint32_t n_virtual;
    bool poison;
} toy_adapter;

/* Whoever makes them; counters are relaxed: they are read when all is quiet, or are limits. */
typedef struct toy_maker {
    atomic_int n_live, n_most_live, n_made;
    atomic_llong live_bytes, most_live_bytes;
} toy_maker;
choir_status toy_check(void *maker, const choir_adapter_file *file, choir_adapter_facts *facts);
choir_status toy_make(void *maker, const choir_adapter_file *file, choir_adapter_made *made);
void toy_free(void *maker, void *adapter);

typedef struct toy_folder {
    char path[64];
} toy_folder;
void toy_folder_create(toy_folder *folder);
void toy_folder_destroy(toy_folder *folder); /* with all that lies in it */
/* Writes folder/name, whole: a new file in the place of one that is there. */
void toy_write(const toy_folder *folder, const char *name, const toy_spec *spec);
void toy_remove(const toy_folder *folder, const char *name);
/* The digest that make() will tell. */
uint64_t toy_digest(const toy_spec *spec);

enum { TOY_MAX_READS = 64 };
typedef struct toy_disk {
    choir_disk disk;
    choir_read reads[TOY_MAX_READS];
    uint32_t n_reads, depth;
    uint64_t random, n_submitted;
    uint32_t eio_permille, late_permille; /* late: it does not complete in this turn */
    uint32_t fail_reads;                  /* so many fail with EIO */
    bool held;                            /* nothing completes */
    atomic_bool closed;
} toy_disk;
void toy_disk_create(toy_disk *disk, uint64_t seed);

/* Options of a pool that is run by hand over these. */
choir_adapters_options toy_options(toy_maker *maker, toy_disk *disk, uint64_t budget_bytes);
