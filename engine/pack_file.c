#include "engine/pack_file.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

enum { MAX_TABLES = 1 << 30 };

struct choir_pack {
    char *name;
    choir_pack_header header;
    uint8_t *tables, *vectors;
    const choir_pack_tensor *tensors; /* ascending by role, layer, index */
    const choir_pack_run *runs;       /* ascending by layer, expert */
    const choir_pack_small *small;    /* NULL, or [n_runs] */
    const choir_pack_text_entry *texts;
    choir_pack_tensor
        *small_tensors; /* NULL, or [n_runs][3], made of `small` and the experts' shapes */
};

/* Where open's bytes come from: a file, or memory. */
typedef struct source {
    const char *name;
    int fd; /* -1: memory */
    const uint8_t *data;
    size_t bytes;
} source;

static choir_status read_at(const source *s, uint64_t offset, void *to, size_t bytes)
{
    if (offset > s->bytes || bytes > s->bytes - offset)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s ends at byte %zu, and %zu are wanted at %" PRIu64
                          " (is it truncated?)",
                          s->name, s->bytes, bytes, offset);
    if (s->fd < 0) {
        memcpy(to, s->data + offset, bytes);
        return CHOIR_OK;
    }
    return choir_file_read_at(s->fd, s->name, offset, to, bytes);
}

static choir_status bad(const source *s, const char *field, uint64_t value)
{
    return choir_fail(CHOIR_E_FORMAT, "%s: %s is %" PRIu64, s->name, field, value);
}

static choir_status read_header(const source *s, choir_pack_header *h)
{
    uint8_t page[CHOIR_PACK_PAGE];
    uint64_t hash;
    CHOIR_TRY(read_at(s, 0, page, sizeof page));
    memcpy(h, page, sizeof *h);
    memcpy(&hash, page + CHOIR_PACK_HASH_AT, sizeof hash);
    if (memcmp(h->magic, CHOIR_PACK_UNFINISHED, 8) == 0)
        return choir_fail(
            CHOIR_E_FORMAT,
            "%s is not finished: `choir pack` with the same arguments goes on with it", s->name);
    if (memcmp(h->magic, CHOIR_PACK_MAGIC, 8) != 0)
        return choir_fail(CHOIR_E_FORMAT, "%s is not a .choir file", s->name);
    bool small = h->version == CHOIR_PACK_VERSION_SMALL;
    if (h->version != CHOIR_PACK_VERSION && !small)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s has version %u, this Choir reads %d and %d: pack the model again",
                          s->name, h->version, CHOIR_PACK_VERSION, CHOIR_PACK_VERSION_SMALL);
    if (XXH3_64bits(page, CHOIR_PACK_HASH_AT) != hash)
        return choir_fail(CHOIR_E_DATA_LOSS, "%s: the header's checksum is wrong", s->name);
    if (h->page_bytes != CHOIR_PACK_PAGE) return bad(s, "page_bytes", h->page_bytes);
    if ((h->flags & ~(uint32_t)(CHOIR_PACK_FROM_GGUF | (small ? CHOIR_PACK_HAS_USAGE : 0))) != 0)
        return bad(s, "flags", h->flags);
    if (h->file_bytes != s->bytes)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s has %zu bytes, its header says %" PRIu64 " (is it truncated?)",
                          s->name, s->bytes, h->file_bytes);
    uint64_t least = h->n_tensors * (uint64_t)sizeof(choir_pack_tensor) +
                     h->n_runs * (uint64_t)sizeof(choir_pack_run) +
                     (small ? h->n_runs * (uint64_t)sizeof(choir_pack_small) : 0) +
                     h->n_texts * (uint64_t)sizeof(choir_pack_text_entry);
    if (h->tables_bytes > MAX_TABLES || least > h->tables_bytes ||
        h->tables_bytes > s->bytes - CHOIR_PACK_PAGE)
        return bad(s, "tables_bytes", h->tables_bytes);
    if (h->vectors_offset > s->bytes || h->vectors_bytes > s->bytes - h->vectors_offset)
        return bad(s, "vectors_bytes", h->vectors_bytes);
    h->name[sizeof h->name - 1] = h->kind[sizeof h->kind - 1] = h->types[sizeof h->types - 1] =
        '\0';
    return CHOIR_OK;
}

static int compare_keys(uint64_t a, uint64_t b)
{
    return a < b ? -1 : a > b;
}

/* Role, layer and index as one number that orders them; index has 24 bits. */
static uint64_t tensor_key(uint32_t role, uint32_t layer, uint32_t index)
{
    return (uint64_t)role << 48 | (uint64_t)layer << 24 | index;
}

static uint64_t key_of(const choir_pack_tensor *t)
{
    return tensor_key(t->role, t->layer, t->index);
}

static choir_status check_tensor(const choir_pack *p, const source *s, uint32_t i)
{
    const choir_pack_tensor *t = &p->tensors[i];
    const choir_pack_header *h = &p->header;
    if (t->role >= CHOIR_N_ROLES || t->layer >= CHOIR_MAX_LAYERS || t->index >= 1 << 24)
        return bad(s, "a tensor's role or place", key_of(t));
    if (i > 0 && key_of(t - 1) >= key_of(t)) return bad(s, "a tensor out of order, number", i);
    if (t->offset > h->file_bytes || t->bytes > h->file_bytes - t->offset)
        return bad(s, "a tensor beyond the file's end, at", t->offset);
    if (t->layout != CHOIR_LAYOUT_EXACT) return CHOIR_OK;
    uint64_t first = h->vectors_offset, last = first + h->vectors_bytes;
    if (t->dtype != CHOIR_F32 || t->bytes != (uint64_t)t->rows * t->cols * sizeof(float) ||
        t->offset < first || (t->offset - first) % sizeof(float) != 0 ||
        t->offset + t->bytes > last)
        return bad(s, "a vector out of its place, at", t->offset);
    if (XXH3_64bits(choir_pack_vector(p, t), t->bytes) != t->checksum)
        return choir_fail(CHOIR_E_DATA_LOSS, "%s: the checksum of %s in layer %u is wrong", s->name,
                          choir_role_text(t->role), t->layer);
    return CHOIR_OK;
}

/* One part of a small copy as a tensor, `at` bytes into its run: of the expert's own shape, in the
 * layout that this program would give it. */
static choir_status small_part(const choir_pack *p, const source *s, uint32_t run, int k,
                               uint64_t at)
{
    const choir_pack_run *r = &p->runs[run];
    const choir_pack_small *x = &p->small[run];
    const choir_pack_tensor *own = choir_pack_find(p, choir_expert_roles[k], r->layer, r->expert);
    if (own == NULL) return bad(s, "a small copy of no expert, number", run);
    if (x->dtypes[k] >= CHOIR_N_DTYPES) return bad(s, "a small copy's dtype", x->dtypes[k]);
    choir_matrix m;
    const choir_tensor like = {x->dtypes[k], own->rows, own->cols, p, SIZE_MAX};
    CHOIR_TRY(choir_matrix_plan(&like, &m));
    if (m.layout != x->layouts[k] || m.flags != x->flags[k])
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: the small copy of expert %u in layer %u lies in a layout that this "
                          "Choir does not make: pack the model again",
                          s->name, r->expert, r->layer);
    if (m.bytes > x->bytes) return bad(s, "a small copy's bytes", x->bytes);
    p->small_tensors[run * 3 + (uint32_t)k] = (choir_pack_tensor){.role = own->role,
                                                                  .layout = (uint8_t)m.layout,
                                                                  .dtype = (uint8_t)m.dtype,
                                                                  .layer = r->layer,
                                                                  .index = r->expert,
                                                                  .rows = m.rows,
                                                                  .cols = m.cols,
                                                                  .flags = m.flags,
                                                                  .offset = x->offset + at,
                                                                  .bytes = m.bytes,
                                                                  .checksum = x->checksums[k]};
    return CHOIR_OK;
}

static choir_status check_small(const choir_pack *p, const source *s, uint32_t run)
{
    const choir_pack_header *h = &p->header;
    const choir_pack_small *x = &p->small[run];
    if (x->offset % CHOIR_PACK_PAGE != 0 || x->offset > h->file_bytes ||
        x->bytes > h->file_bytes - x->offset || x->bytes > UINT32_MAX / 2)
        return bad(s, "a small copy out of its place, at", x->offset);
    bool used = (h->flags & CHOIR_PACK_HAS_USAGE) != 0;
    if (!(x->usage >= 0 && x->usage <= (used ? 1.0F : 0.0F)))
        return bad(s, "an expert's usage is no share of tokens, number", run);
    uint64_t at = 0;
    for (int k = 0; k < 3; k++) {
        CHOIR_TRY(small_part(p, s, run, k, at));
        at += choir_round_up(p->small_tensors[run * 3 + (uint32_t)k].bytes, 64);
    }
    return at == x->bytes ? CHOIR_OK : bad(s, "a small copy's bytes", x->bytes);
}

static choir_status check_tables(const choir_pack *p, const source *s)
{
    const choir_pack_header *h = &p->header;
    for (uint32_t i = 0; i < h->n_tensors; i++) CHOIR_TRY(check_tensor(p, s, i));
    for (uint32_t i = 0; i < h->n_runs; i++) {
        const choir_pack_run *r = &p->runs[i];
        if (i > 0 &&
            (r->layer < r[-1].layer || (r->layer == r[-1].layer && r->expert <= r[-1].expert)))
            return bad(s, "an expert out of order, number", i);
        if (r->offset % CHOIR_PACK_PAGE != 0 || r->offset > h->file_bytes ||
            r->bytes > h->file_bytes - r->offset || r->bytes > UINT32_MAX / 2)
            return bad(s, "an expert out of its place, at", r->offset);
    }
    for (uint32_t i = 0; p->small != NULL && i < h->n_runs; i++) CHOIR_TRY(check_small(p, s, i));
    for (uint32_t i = 0; i < h->n_texts; i++) {
        const choir_pack_text_entry *t = &p->texts[i];
        if (memchr(t->name, '\0', sizeof t->name) == NULL || t->offset > h->tables_bytes ||
            t->bytes > h->tables_bytes - t->offset)
            return bad(s, "a text out of its place, at", t->offset);
    }
    return CHOIR_OK;
}

static choir_status read_all(const source *s, choir_pack *p)
{
    choir_pack_header *h = &p->header;
    CHOIR_TRY(read_header(s, h));
    p->tables = choir_alloc(CHOIR_MEM_OTHER, h->tables_bytes + 1);
    p->vectors = choir_alloc(CHOIR_MEM_OTHER, h->vectors_bytes + 1);
    if (p->tables == NULL || p->vectors == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for its tables", s->name);
    CHOIR_TRY(read_at(s, CHOIR_PACK_PAGE, p->tables, h->tables_bytes));
    if (XXH3_64bits(p->tables, h->tables_bytes) != h->tables_hash)
        return choir_fail(CHOIR_E_DATA_LOSS, "%s: the tables' checksum is wrong", s->name);
    CHOIR_TRY(read_at(s, h->vectors_offset, p->vectors, h->vectors_bytes));
    p->tensors = (const choir_pack_tensor *)p->tables;
    p->runs = (const choir_pack_run *)(p->tensors + h->n_tensors);
    p->texts = (const choir_pack_text_entry *)(p->runs + h->n_runs);
    if (h->version == CHOIR_PACK_VERSION_SMALL) {
        p->small = (const choir_pack_small *)(p->runs + h->n_runs);
        p->texts = (const choir_pack_text_entry *)(p->small + h->n_runs);
        p->small_tensors =
            choir_calloc(CHOIR_MEM_OTHER, 3 * (size_t)h->n_runs + 1, sizeof *p->small_tensors);
        if (p->small_tensors == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for its tables", s->name);
    }
    return check_tables(p, s);
}

static choir_status open_source(const source *s, choir_pack **out)
{
    choir_pack *p = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *p);
    if (p == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", s->name);
    p->name = choir_strdup(CHOIR_MEM_OTHER, s->name);
    choir_status status =
        p->name != NULL ? read_all(s, p) : choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", s->name);
    if (status != CHOIR_OK) {
        choir_pack_close(p);
        return status;
    }
    *out = p;
    return CHOIR_OK;
}

choir_status choir_pack_parse(const char *name, const void *data, size_t bytes, choir_pack **out)
{
    return open_source(&(source){name, -1, data, bytes}, out);
}

choir_status choir_pack_open(const char *path, choir_pack **out)
{
    source s = {.name = path};
    CHOIR_TRY(choir_file_open(path, &s.fd, &s.bytes));
    choir_status status = open_source(&s, out);
    close(s.fd);
    return status;
}

bool choir_pack_is(const char *path)
{
    char magic[8];
    size_t bytes;
    int fd;
    if (choir_file_open(path, &fd, &bytes) != CHOIR_OK) return false;
    bool is =
        pread(fd, magic, sizeof magic, 0) == (ssize_t)sizeof magic &&
        (memcmp(magic, CHOIR_PACK_MAGIC, 8) == 0 || memcmp(magic, CHOIR_PACK_UNFINISHED, 8) == 0);
    close(fd);
    return is;
}

void choir_pack_close(choir_pack *p)
{
    if (p == NULL) return;
    choir_free(p->tables);
    choir_free(p->small_tensors);
    choir_free(p->vectors);
    choir_free(p->name);
    choir_free(p);
}

const choir_pack_header *choir_pack_get_header(const choir_pack *p)
{
    return &p->header;
}

bool choir_pack_text(const choir_pack *p, const char *name, const char **data, size_t *bytes)
{
    for (uint32_t i = 0; i < p->header.n_texts; i++)
        if (strcmp(p->texts[i].name, name) == 0) {
            *data = (const char *)p->tables + p->texts[i].offset;
            *bytes = p->texts[i].bytes;
            return true;
        }
    return false;
}

static int find_tensor(const void *key, const void *at)
{
    return compare_keys(*(const uint64_t *)key, key_of(at));
}

const choir_pack_tensor *choir_pack_find(const choir_pack *p, choir_role role, uint32_t layer,
                                         uint32_t index)
{
    uint64_t key = tensor_key(role, layer, index);
    return bsearch(&key, p->tensors, p->header.n_tensors, sizeof *p->tensors, find_tensor);
}

static int find_run(const void *key, const void *at)
{
    const choir_pack_run *r = at;
    return compare_keys(*(const uint64_t *)key, (uint64_t)r->layer << 32 | r->expert);
}

const choir_pack_run *choir_pack_find_run(const choir_pack *p, uint32_t layer, uint32_t expert)
{
    uint64_t key = (uint64_t)layer << 32 | expert;
    return bsearch(&key, p->runs, p->header.n_runs, sizeof *p->runs, find_run);
}

bool choir_pack_has_small(const choir_pack *p)
{
    return p->small != NULL;
}

bool choir_pack_has_usage(const choir_pack *p)
{
    return (p->header.flags & CHOIR_PACK_HAS_USAGE) != 0;
}

static size_t run_number(const choir_pack *p, uint32_t layer, uint32_t expert)
{
    const choir_pack_run *r = choir_pack_find_run(p, layer, expert);
    CHOIR_ASSERT(p->small != NULL && r != NULL);
    return (size_t)(r - p->runs);
}

const choir_pack_tensor *choir_pack_find_small(const choir_pack *p, uint32_t layer, uint32_t expert)
{
    return &p->small_tensors[3 * run_number(p, layer, expert)];
}

float choir_pack_usage(const choir_pack *p, uint32_t layer, uint32_t expert)
{
    return p->small[run_number(p, layer, expert)].usage;
}

const float *choir_pack_vector(const choir_pack *p, const choir_pack_tensor *t)
{
    return (const float *)(p->vectors + (t->offset - p->header.vectors_offset));
}

choir_matrix choir_pack_matrix(const choir_pack_tensor *t)
{
    return (choir_matrix){.layout = t->layout,
                          .dtype = t->dtype,
                          .rows = t->rows,
                          .cols = t->cols,
                          .flags = t->flags,
                          .bytes = t->bytes};
}

static choir_status check_role(const choir_pack *p, const choir_model_config *c, choir_role role,
                               uint32_t layer, uint32_t index)
{
    const choir_pack_tensor *t = choir_pack_find(p, role, layer, index);
    uint64_t rows, cols;
    choir_role_shape(c, role, &rows, &cols);
    if (t == NULL)
        return choir_fail(CHOIR_E_FORMAT, "%s lacks %s %u of layer %u", p->name,
                          choir_role_text(role), index, layer);
    if (t->rows != rows || t->cols != cols)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: %s of layer %u is [%u, %u], the configuration wants [%" PRIu64
                          ", %" PRIu64 "]",
                          p->name, choir_role_text(role), layer, t->rows, t->cols, rows, cols);
    bool exact = choir_role_is_f32(role);
    if (exact != (t->layout == CHOIR_LAYOUT_EXACT))
        return choir_fail(CHOIR_E_FORMAT, "%s: %s of layer %u has layout %u", p->name,
                          choir_role_text(role), layer, t->layout);
    if (exact) return CHOIR_OK;
    /* How this program would pack it; the source's bytes are never looked at. */
    choir_matrix m;
    const choir_tensor like = {t->dtype, t->rows, t->cols, p, SIZE_MAX};
    if (t->dtype >= CHOIR_N_DTYPES) return bad(&(source){.name = p->name}, "a dtype", t->dtype);
    CHOIR_TRY(choir_matrix_plan(&like, &m));
    if (m.layout != t->layout || m.flags != t->flags || m.bytes != t->bytes)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: %s of layer %u lies in a layout that this Choir does not make: pack "
                          "the model again",
                          p->name, choir_role_text(role), layer);
    return CHOIR_OK;
}

static choir_status check_run(const choir_pack *p, uint32_t layer, uint32_t expert)
{
    const choir_pack_run *r = choir_pack_find_run(p, layer, expert);
    uint64_t at = 0;
    for (int i = 0; r != NULL && i < 3; i++) {
        const choir_pack_tensor *t = choir_pack_find(p, choir_expert_roles[i], layer, expert);
        if (t->offset != r->offset + at) r = NULL;
        at += choir_round_up(t->bytes, 64);
    }
    if (r == NULL || r->bytes != at)
        return choir_fail(CHOIR_E_FORMAT, "%s: expert %u of layer %u is not one run", p->name,
                          expert, layer);
    return CHOIR_OK;
}

choir_status choir_pack_check(const choir_pack *p, const choir_model_config *c)
{
    uint64_t n = 0, n_runs = 0;
    for (choir_role_place at = {0}; choir_next_tensor(c, &at); n++)
        CHOIR_TRY(check_role(p, c, at.role, at.layer, at.index));
    for (uint32_t l = 0; l < c->n_layers; l++)
        for (uint32_t x = 0; (c->layers[l] & CHOIR_LAYER_MOE) != 0 && x < c->n_experts;
             x++, n_runs++)
            CHOIR_TRY(check_run(p, l, x));
    if (n != p->header.n_tensors || n_runs != p->header.n_runs)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s has %u tensors and %u experts, the model has %" PRIu64
                          " and %" PRIu64,
                          p->name, p->header.n_tensors, p->header.n_runs, n, n_runs);
    return CHOIR_OK;
}
