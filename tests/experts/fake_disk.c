#include "tests/experts/fake_disk.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmocka.h>

uint64_t fake_now = CHOIR_SECOND;

static uint64_t read_clock(void *user)
{
    (void)user;
    return fake_now;
}

uint64_t fake_random(fake_disk *d)
{
    d->random += UINT64_C(0x9E3779B97F4A7C15);
    uint64_t z = d->random;
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

static uint32_t submit(choir_disk *disk, const choir_read *reads, uint32_t n)
{
    fake_disk *d = (fake_disk *)disk;
    uint32_t taken = 0;
    for (; taken < n && d->n_reads < d->depth; taken++) {
        bool stalls = fake_random(d) % 1000 < d->stall_permille;
        d->reads[d->n_reads] = reads[taken];
        d->due_ns[d->n_reads++] = fake_now + 1 +
                                  (d->slowest_ns > 0 ? fake_random(d) % d->slowest_ns : 0) +
                                  (stalls ? 5 * CHOIR_SECOND : 0);
        d->n_submitted++;
    }
    if (d->n_reads > d->max_in_flight) d->max_in_flight = d->n_reads;
    return taken;
}

static int complete(fake_disk *d, const choir_read *r)
{
    assert_true(r->offset % CHOIR_DISK_PAGE == 0 && r->bytes % CHOIR_DISK_PAGE == 0);
    assert_true(r->need <= r->bytes && r->need > 0);
    if ((r->offset >= d->bad_from && r->offset < d->bad_to) ||
        fake_random(d) % 1000 < d->eio_permille)
        return EIO;
    if (r->offset + r->need > d->bytes) return ENODATA;
    memcpy(r->to, d->image + r->offset, r->need);
    bool damaged = fake_random(d) % 1000 < d->damage_permille ||
                   (r->offset >= d->damaged_from && r->offset < d->damaged_to);
    if (damaged) r->to[fake_random(d) % 64] ^= 1;
    return 0;
}

static uint32_t take_due(fake_disk *d, choir_read_done *done, uint32_t max)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < d->n_reads && n < max && !d->stalled;) {
        if (d->due_ns[i] > fake_now) {
            i++;
            continue;
        }
        done[n++] = (choir_read_done){d->reads[i].tag, complete(d, &d->reads[i])};
        d->n_reads--;
        d->reads[i] = d->reads[d->n_reads];
        d->due_ns[i] = d->due_ns[d->n_reads];
    }
    return n;
}

static uint32_t reap(choir_disk *disk, choir_read_done *done, uint32_t max, uint64_t wait_ns)
{
    fake_disk *d = (fake_disk *)disk;
    uint32_t n = take_due(d, done, max);
    if (n > 0 || wait_ns == 0) return n;
    uint64_t end = fake_now + wait_ns, first = end;
    for (uint32_t i = 0; i < d->n_reads && !d->stalled; i++)
        if (d->due_ns[i] < first) first = d->due_ns[i];
    fake_now = first;
    return take_due(d, done, max);
}

static void use_memory(choir_disk *disk, void *data, size_t bytes, bool in_use)
{
    (void)disk, (void)data, (void)bytes, (void)in_use;
}

static void use_file(choir_disk *disk, int fd)
{
    (void)disk, (void)fd;
}

static void leave(choir_disk *disk)
{
    (void)disk;
}

void fake_disk_create(fake_disk *d, uint64_t bytes, uint64_t seed)
{
    *d = (fake_disk){.disk = {"fake", submit, reap, use_memory, use_file, leave},
                     .bytes = bytes,
                     .depth = 16,
                     .random = seed};
    d->image = malloc(bytes);
    assert_non_null(d->image);
    for (uint64_t i = 0; i < bytes; i += 8) {
        uint64_t r = fake_random(d);
        memcpy(d->image + i, &r, 8);
    }
    choir_clock_replace(read_clock, NULL);
}

void fake_disk_destroy(fake_disk *d)
{
    choir_clock_replace(NULL, NULL);
    free(d->image);
}

static choir_expert planned(uint32_t expert)
{
    choir_matrix m = {.layout = CHOIR_LAYOUT_W8, .rows = 16, .cols = 32};
    choir_expert x = {m, m, m};
    x.gate.bytes = 1000 + expert * 8;
    x.up.bytes = 64;
    x.down.bytes = 2048;
    return x;
}

enum { RUN = 8192 };

static uint64_t run_at(const fake_store *f, uint32_t layer, uint32_t expert)
{
    return ((uint64_t)layer * f->n_experts + expert) * RUN;
}

static void place(fake_store *f, uint32_t layer, uint32_t expert)
{
    choir_expert x = planned(expert), there = x;
    uint64_t offset = run_at(f, layer, expert);
    choir_expert_source source = {.packed = true, .n_extents = 1};
    source.extents[0].offset = offset;
    source.extents[0].bytes = (uint32_t)((choir_expert_run_bytes(&x) + CHOIR_DISK_PAGE - 1) /
                                         CHOIR_DISK_PAGE * CHOIR_DISK_PAGE);
    choir_expert_place_run(&there, f->disk.image + offset);
    source.checksums[0] = XXH3_64bits(there.gate.data, there.gate.bytes);
    source.checksums[1] = XXH3_64bits(there.up.data, there.up.bytes);
    source.checksums[2] = XXH3_64bits(there.down.data, there.down.bytes);
    assert_int_equal(choir_experts_place(f->store, layer, expert, &x, &source), CHOIR_OK);
}

void fake_store_create(fake_store *f, uint32_t n_layers, uint32_t n_experts, uint32_t n_slots,
                       uint64_t seed)
{
    uint32_t file;
    f->n_layers = n_layers;
    f->n_experts = n_experts;
    fake_disk_create(&f->disk, (uint64_t)n_layers * n_experts * RUN, seed);
    snprintf(f->path, sizeof f->path, "/tmp/fake_disk-XXXXXX");
    int fd = mkstemp(f->path);
    assert_true(fd >= 0 && ftruncate(fd, (off_t)f->disk.bytes) == 0);
    close(fd);
    choir_experts_options o = CHOIR_EXPERTS_OPTIONS_DEFAULT;
    o.n_layers = n_layers;
    o.n_experts = n_experts;
    o.disk = &f->disk.disk;
    assert_int_equal(choir_experts_create(&o, &f->store), CHOIR_OK);
    assert_int_equal(choir_experts_add_file(f->store, f->path, &file), CHOIR_OK);
    for (uint32_t l = 0; l < n_layers; l++)
        for (uint32_t x = 0; x < n_experts; x++) place(f, l, x);
    assert_int_equal(choir_experts_start(f->store, 1 << 20, n_slots), CHOIR_OK);
}

void fake_store_destroy(fake_store *f)
{
    choir_experts_destroy(f->store);
    fake_disk_destroy(&f->disk);
    unlink(f->path);
}

void fake_assert_expert(const fake_store *f, uint32_t layer, uint32_t expert,
                        const choir_expert *held)
{
    choir_expert there = planned(expert);
    choir_expert_place_run(&there, f->disk.image + run_at(f, layer, expert));
    assert_memory_equal(held->gate.data, there.gate.data, there.gate.bytes);
    assert_memory_equal(held->up.data, there.up.data, there.up.bytes);
    assert_memory_equal(held->down.data, there.down.data, there.down.bytes);
}

uint32_t fake_run(fake_store *f, uint32_t layer, const choir_expert_use *uses, uint32_t n)
{
    uint16_t ids[1024];
    uint32_t came = 0, got;
    choir_experts_step(f->store);
    choir_experts_request(f->store, layer, uses, n);
    while ((got = choir_experts_collect(f->store, true, 1024, ids)) > 0)
        for (uint32_t i = 0; i < got; i++) {
            for (uint32_t p = 0; p < CHOIR_EXPERT_PARTS; p++)
                choir_experts_check(f->store, layer, ids[i], p);
            const choir_expert *held = choir_experts_admit(f->store, layer, ids[i]);
            if (held == NULL) continue;
            fake_assert_expert(f, layer, ids[i], held);
            choir_experts_release(f->store, layer, ids[i]);
            came++;
        }
    f->n_missing =
        choir_experts_pending(f->store) ? choir_experts_missing(f->store, f->missing) : 0;
    assert_int_equal(choir_experts_n_pinned(f->store), 0);
    return came;
}
