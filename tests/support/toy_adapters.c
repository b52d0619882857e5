#include "tests/support/toy_adapters.h"

#include <errno.h>
#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmocka.h>

enum { HEADER = 16 }; /* bytes behind the header's length: the seed, the tensors' bytes */

static uint8_t byte_of(uint64_t seed, uint64_t i)
{
    uint64_t z = (seed + i / 8) * UINT64_C(0x9E3779B97F4A7C15);
    return (uint8_t)((z ^ z >> 29) >> i % 8 * 8);
}

static char *tensors_of(const toy_spec *spec, size_t *bytes)
{
    const uint64_t header[3] = {HEADER, spec->seed, spec->bytes};
    *bytes = sizeof header + spec->bytes;
    char *data = malloc(*bytes);
    assert_non_null(data);
    memcpy(data, header, sizeof header);
    for (uint32_t i = 0; i < spec->bytes; i++)
        data[sizeof header + i] = (char)byte_of(spec->seed, i);
    return data;
}

static int config_of(const toy_spec *spec, char *out, size_t room)
{
    int n = snprintf(out, room, "virtual %u poison %d spoiled %d sole %d invocation",
                     spec->n_virtual, spec->poison, spec->spoiled, spec->sole);
    for (uint32_t i = 0; i < spec->n_invocation; i++)
        n += snprintf(out + n, room - (size_t)n, " %u", spec->invocation[i]);
    return n;
}

static uint64_t digest_of(const char *config, size_t config_bytes, const void *data, size_t bytes)
{
    return XXH3_64bits_withSeed(data, bytes, XXH3_64bits(config, config_bytes));
}

uint64_t toy_digest(const toy_spec *spec)
{
    char config[256];
    size_t bytes;
    int n = config_of(spec, config, sizeof config);
    char *data = tensors_of(spec, &bytes);
    uint64_t digest = digest_of(config, (size_t)n, data, bytes);
    free(data);
    return digest;
}

/* -- the maker -- */

typedef struct settings {
    uint32_t n_virtual;
    int poison, spoiled, sole;
} settings;

static choir_status parse(const choir_adapter_file *file, settings *s, choir_adapter_facts *facts)
{
    int at = 0;
    uint64_t header[3];
    if (file->config == NULL)
        return choir_fail(CHOIR_E_FORMAT, "adapter %s is no GGUF file", file->name);
    if (sscanf(file->config, "virtual %u poison %d spoiled %d sole %d invocation%n", &s->n_virtual,
               &s->poison, &s->spoiled, &s->sole, &at) != 4 ||
        at == 0)
        return choir_fail(CHOIR_E_FORMAT, "adapter %s: its config is malformed", file->name);
    *facts = (choir_adapter_facts){.kind = "toy", .max_rank = 8, .n_virtual = s->n_virtual};
    int n;
    for (; sscanf(file->config + at, " %u%n", &facts->invocation[facts->n_invocation], &n) == 1;
         at += n)
        facts->n_invocation++;
    if (file->tensor_bytes < sizeof header)
        return choir_fail(CHOIR_E_FORMAT, "adapter %s: its header is cut", file->name);
    memcpy(header, file->tensors, sizeof header);
    if (header[0] != HEADER || header[2] + sizeof header != file->file_bytes)
        return choir_fail(CHOIR_E_INVALID, "adapter %s: its tensors have %llu bytes, not %llu",
                          file->name, (unsigned long long)file->file_bytes,
                          (unsigned long long)header[2]);
    facts->bytes = header[2];
    facts->load_bytes = 64;
    return CHOIR_OK;
}

choir_status toy_check(void *maker, const choir_adapter_file *file, choir_adapter_facts *facts)
{
    (void)maker;
    settings s;
    return parse(file, &s, facts);
}

static void note_most(toy_maker *m)
{
    int n = atomic_load_explicit(&m->n_live, memory_order_relaxed);
    long long bytes = atomic_load_explicit(&m->live_bytes, memory_order_relaxed);
    if (n > m->n_most_live) m->n_most_live = n;
    if (bytes > m->most_live_bytes) m->most_live_bytes = bytes;
}

choir_status toy_make(void *maker, const choir_adapter_file *file, choir_adapter_made *made)
{
    toy_maker *m = maker;
    settings s;
    choir_adapter_facts facts;
    CHOIR_TRY(parse(file, &s, &facts));
    if (s.spoiled)
        return choir_fail(CHOIR_E_DATA_LOSS, "adapter %s: a tensor holds NaN", file->name);
    uint64_t header[3];
    const uint8_t *data = file->tensors;
    memcpy(header, data, sizeof header);
    for (uint64_t i = 0; i < header[2]; i++)
        if (data[sizeof header + i] != byte_of(header[1], i))
            fail_msg("adapter %s: byte %llu is not as it was written", file->name,
                     (unsigned long long)i);
    toy_adapter *a = choir_alloc(CHOIR_MEM_ADAPTERS, sizeof *a);
    if (a == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "adapter %s: no memory", file->name);
    *a = (toy_adapter){
        digest_of(file->config, file->config_bytes, file->tensors, file->tensor_bytes), header[2],
        s.n_virtual, s.poison != 0};
    *made = (choir_adapter_made){a, a->bytes, a->digest, s.sole != 0 || s.n_virtual > 0};
    atomic_fetch_add_explicit(&m->n_live, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&m->n_made, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&m->live_bytes, (long long)a->bytes, memory_order_relaxed);
    note_most(m);
    return CHOIR_OK;
}

void toy_free(void *maker, void *adapter)
{
    toy_maker *m = maker;
    toy_adapter *a = adapter;
    atomic_fetch_sub_explicit(&m->n_live, 1, memory_order_relaxed);
    atomic_fetch_sub_explicit(&m->live_bytes, (long long)a->bytes, memory_order_relaxed);
    *a = (toy_adapter){.digest = UINT64_MAX}; /* whoever still looks gets nonsense */
    choir_free(a);
}

/* -- folders -- */

void toy_folder_create(toy_folder *folder)
{
    snprintf(folder->path, sizeof folder->path, "/tmp/toy_adapters-XXXXXX");
    assert_non_null(mkdtemp(folder->path));
}

static int remove_one(const char *path, const struct stat *st, int flag, struct FTW *ftw)
{
    (void)st, (void)flag, (void)ftw;
    return remove(path);
}

static void remove_tree(const char *path)
{
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

void toy_folder_destroy(toy_folder *folder)
{
    remove_tree(folder->path);
}

static void write_file(const char *folder, const char *file, const void *data, size_t bytes)
{
    char path[512], temporary[520];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    FILE *f = fopen(temporary, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
    assert_int_equal(rename(temporary, path), 0);
}

void toy_write(const toy_folder *folder, const char *name, const toy_spec *spec)
{
    char path[256], config[256];
    size_t bytes;
    snprintf(path, sizeof path, "%s/%s", folder->path, name);
    assert_int_equal(choir_folder_make(path), CHOIR_OK);
    char *data = tensors_of(spec, &bytes);
    int n = config_of(spec, config, sizeof config);
    write_file(path, "adapter_config.json", config, (size_t)n);
    write_file(path, "adapter_model.safetensors", data, bytes);
    free(data);
}

void toy_remove(const toy_folder *folder, const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder->path, name);
    remove_tree(path);
}

/* -- the disk -- */

static uint32_t draw(toy_disk *d, uint32_t n)
{
    d->random = d->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(d->random >> 33) % n;
}

static uint32_t submit(choir_disk *disk, const choir_read *reads, uint32_t n)
{
    toy_disk *d = (toy_disk *)disk;
    uint32_t taken = 0;
    for (; taken < n && d->n_reads < d->depth; taken++) d->reads[d->n_reads++] = reads[taken];
    d->n_submitted += taken;
    return taken;
}

static int complete(toy_disk *d, const choir_read *r)
{
    assert_true(r->offset % CHOIR_DISK_PAGE == 0 && r->bytes % CHOIR_DISK_PAGE == 0);
    assert_true((uintptr_t)r->to % CHOIR_DISK_PAGE == 0 && r->need > 0 && r->need <= r->bytes);
    if (d->fail_reads > 0) {
        d->fail_reads--;
        return EIO;
    }
    if (draw(d, 1000) < d->eio_permille) return EIO;
    uint32_t done = 0;
    while (done < r->need) {
        ssize_t n = pread(r->fd, r->to + done, r->bytes - done, (off_t)(r->offset + done));
        if (n < 0) return errno;
        if (n == 0) return ENODATA;
        done += (uint32_t)n;
    }
    return 0;
}

static uint32_t reap(choir_disk *disk, choir_read_done *done, uint32_t max, uint64_t wait_ns)
{
    toy_disk *d = (toy_disk *)disk;
    uint32_t n = 0;
    (void)wait_ns;
    while (d->n_reads > 0 && n < max && !d->held) {
        if (draw(d, 1000) < d->late_permille) break;
        uint32_t i = draw(d, d->n_reads);
        done[n++] = (choir_read_done){d->reads[i].tag, complete(d, &d->reads[i])};
        d->reads[i] = d->reads[--d->n_reads];
    }
    return n;
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
    ((toy_disk *)disk)->closed = true;
}

void toy_disk_create(toy_disk *disk, uint64_t seed)
{
    *disk = (toy_disk){
        .disk = {"toy", submit, reap, use_memory, use_file, leave}, .depth = 4, .random = seed};
}

choir_adapters_options toy_options(toy_maker *maker, toy_disk *disk, uint64_t budget_bytes)
{
    choir_adapters_options o = CHOIR_ADAPTERS_OPTIONS_DEFAULT;
    o.budget_bytes = budget_bytes;
    o.disk = disk != NULL ? &disk->disk : NULL;
    o.manual = disk != NULL;
    o.check = toy_check;
    o.make = toy_make;
    o.free = toy_free;
    o.user = maker;
    return o;
}
