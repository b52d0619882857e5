/* `choir pack`: every matrix of a model into the kernels' layout, experts in runs of pages,
 * streamed into a file that is whole or not there (engine/pack_file.h, docs/formats.md). The file
 * grows under another name; its tables are brought up to date every CHECKPOINT bytes, so that a
 * later call can go on. */
#include "engine/gguf.h"
#include "engine/pack_file.h"
#include "tune/encode.h"
#include "tune/tune.h"
#include "tune/usage.h"
#include "tune/weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { CHECKPOINT = 256 << 20, CHUNK = 16 << 20, MAX_TEXT = 512 << 20 };

/* What is written at once: a vector or matrix, or an expert's three, or the three of its small
 * copy. */
typedef struct unit {
    uint32_t first_tensor; /* in the tables */
    int64_t run;           /* -1, or in the tables */
    bool small;
    uint64_t offset, bytes;
} unit;

typedef struct packer {
    const choir_pack_options *options;
    choir_model_file *file;
    const choir_model_config *config;
    char partial[4200];
    int fd;
    choir_pack_header header;
    uint8_t *tables;
    choir_pack_tensor *tensors;
    choir_pack_run *runs;
    choir_pack_small *small; /* NULL, or [n_runs] */
    float *usage;            /* NULL, or [n_layers, n_experts] */
    choir_pack_text_entry *texts;
    unit *units;
    uint32_t n_units;
    choir_workers *workers;
    uint8_t **buffers; /* [n_workers] of the largest chunk or run */
    size_t buffer_bytes;
    choir_progress progress;
    uint64_t n_written;
} packer;

/* -- the texts -- */

typedef struct text {
    const char *name;
    char *data;
    size_t bytes;
} text;
enum { MAX_TEXTS = 8 };

static void put(char **at, const void *data, size_t bytes)
{
    memcpy(*at, data, bytes);
    *at += bytes;
}

/* A GGUF file's metadata, and its tensors' names and shapes, without their bytes. */
static choir_status copy_gguf_header(const choir_gguf *g, text *out)
{
    static const uint32_t magic = 0x46554747, version = 3;
    uint64_t n_tensors = choir_gguf_n_tensors(g), n_entries = choir_gguf_n_entries(g), none = 0;
    size_t bytes = 24;
    choir_text key, raw;
    for (uint64_t i = 0; i < n_entries; i++) {
        choir_gguf_entry_at(g, i, &key, &raw);
        bytes += raw.bytes;
    }
    for (uint64_t i = 0; i < n_tensors; i++)
        bytes += 8 + choir_gguf_tensor_at(g, i)->name.bytes + 4 + 32 + 4 + 8;
    char *at = out->data = choir_alloc(CHOIR_MEM_TUNE, bytes);
    if (at == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the model's metadata");
    put(&at, &magic, 4);
    put(&at, &version, 4);
    put(&at, &n_tensors, 8);
    put(&at, &n_entries, 8);
    for (uint64_t i = 0; i < n_entries; i++) {
        choir_gguf_entry_at(g, i, &key, &raw);
        put(&at, raw.data, raw.bytes);
    }
    for (uint64_t i = 0; i < n_tensors; i++) {
        const choir_gguf_tensor *t = choir_gguf_tensor_at(g, i);
        uint64_t n = t->name.bytes;
        uint32_t type = choir_dtype_gguf(t->dtype);
        put(&at, &n, 8);
        put(&at, t->name.data, n);
        put(&at, &t->n_dims, 4);
        put(&at, t->dims, t->n_dims * sizeof *t->dims);
        put(&at, &type, 4);
        put(&at, &none, 8);
    }
    out->name = "gguf";
    out->bytes = (size_t)(at - out->data);
    return CHOIR_OK;
}

static choir_status collect_texts(const packer *p, text *texts, uint32_t *n)
{
    static const char *const names[] = {"config.json", "generation_config.json", "tokenizer.json",
                                        "tokenizer_config.json", "chat_template.jinja"};
    const choir_gguf *g = choir_model_file_gguf(p->file);
    *n = 0;
    if (g != NULL) return copy_gguf_header(g, &texts[(*n)++]);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!choir_model_file_has_text(p->file, names[i])) continue;
        texts[*n].name = names[i];
        CHOIR_TRY(
            choir_model_file_text(p->file, names[i], MAX_TEXT, &texts[*n].data, &texts[*n].bytes));
        ++*n;
    }
    return CHOIR_OK;
}

/* -- the plan -- */

/* The matrix as it will be in the file: another type where --quant wants it and its rows allow. */
static choir_dtype target_dtype(const packer *p, const choir_slice *s)
{
    choir_dtype quant = p->options->quant;
    if (quant == CHOIR_N_DTYPES || s->cols % choir_dtype_block_elements(quant) != 0)
        return s->dtype;
    return quant;
}

static choir_status plan_tensor(packer *p, choir_role role, uint32_t layer, uint32_t index,
                                choir_pack_tensor *out)
{
    choir_slice s;
    choir_matrix m;
    CHOIR_TRY(choir_model_file_slice(p->file, role, layer, index, &s));
    *out = (choir_pack_tensor){.role = (uint16_t)role,
                               .layer = layer,
                               .index = index,
                               .rows = s.rows,
                               .cols = s.cols,
                               .layout = CHOIR_LAYOUT_EXACT,
                               .dtype = CHOIR_F32,
                               .bytes = (uint64_t)s.rows * s.cols * sizeof(float)};
    if (choir_role_is_f32(role)) return CHOIR_OK;
    const choir_tensor like = {target_dtype(p, &s), s.rows, s.cols, s.data, SIZE_MAX};
    CHOIR_TRY(choir_matrix_plan(&like, &m));
    out->layout = (uint8_t)m.layout;
    out->dtype = (uint8_t)m.dtype;
    out->flags = m.flags;
    out->bytes = m.bytes;
    return CHOIR_OK;
}

static void count_tensors(const packer *p, uint32_t *n_tensors, uint32_t *n_runs)
{
    *n_tensors = *n_runs = 0;
    for (choir_role_place at = {0}; choir_next_tensor(p->config, &at); ++*n_tensors)
        *n_runs += at.role == CHOIR_ROLE_EXPERT_GATE;
}

static choir_status plan_tensors(packer *p)
{
    choir_pack_tensor *to = p->tensors;
    for (choir_role_place at = {0}; choir_next_tensor(p->config, &at);)
        CHOIR_TRY(plan_tensor(p, at.role, at.layer, at.index, to++));
    return CHOIR_OK;
}

/* Vectors, matrices, then experts layer by layer, each run on pages of its own. */
static void place_all(packer *p)
{
    choir_pack_header *h = &p->header;
    uint64_t at = choir_round_up(CHOIR_PACK_PAGE + h->tables_bytes, CHOIR_PACK_PAGE);
    h->vectors_offset = at;
    for (int exact = 1; exact >= 0; exact--) {
        for (uint32_t i = 0; i < h->n_tensors; i++) {
            choir_pack_tensor *t = &p->tensors[i];
            if (choir_role_is_routed(t->role) || choir_role_is_f32(t->role) != (exact == 1))
                continue;
            t->offset = at;
            p->units[p->n_units++] = (unit){i, -1, false, at, t->bytes};
            at = choir_round_up(at + t->bytes, 64);
        }
        if (exact == 1) h->vectors_bytes = at - h->vectors_offset;
    }
    uint32_t run = 0;
    for (uint32_t i = 0; i < h->n_tensors; i++) {
        const choir_pack_tensor *gate = &p->tensors[i];
        if (gate->role != CHOIR_ROLE_EXPERT_GATE) continue;
        at = choir_round_up(at, CHOIR_PACK_PAGE);
        choir_pack_run *r = &p->runs[run];
        *r = (choir_pack_run){.layer = gate->layer, .expert = gate->index, .offset = at};
        for (int k = 0; k < 3; k++) {
            choir_pack_tensor *t = &p->tensors[i + (uint32_t)k * h->n_runs];
            CHOIR_ASSERT(t->role == choir_expert_roles[k] && t->layer == gate->layer &&
                         t->index == gate->index);
            t->offset = at;
            at = choir_round_up(at + t->bytes, 64);
        }
        r->bytes = at - r->offset;
        p->units[p->n_units++] = (unit){i, run++, false, r->offset, r->bytes};
    }
    h->file_bytes = choir_round_up(at, CHOIR_PACK_PAGE);
}

/* A matrix of a small copy. Rows that are no whole number of its blocks stay as they are. */
static choir_status plan_small_part(const packer *p, const choir_pack_tensor *t, choir_matrix *out)
{
    choir_dtype dtype = p->options->small;
    if (t->cols % choir_dtype_block_elements(dtype) != 0) dtype = t->dtype;
    const choir_tensor like = {dtype, t->rows, t->cols, p, SIZE_MAX}; /* no byte is looked at */
    return choir_matrix_plan(&like, out);
}

/* The small copies follow all else, each on pages of its own. */
static choir_status place_small(packer *p)
{
    choir_pack_header *h = &p->header;
    uint32_t first = 0;
    uint64_t at = h->file_bytes;
    while (first < h->n_tensors && p->tensors[first].role != CHOIR_ROLE_EXPERT_GATE) first++;
    for (uint32_t i = 0; i < h->n_runs; i++) {
        choir_pack_small *x = &p->small[i];
        const choir_pack_run *r = &p->runs[i];
        x->offset = at = choir_round_up(at, CHOIR_PACK_PAGE);
        for (uint32_t k = 0; k < 3; k++) {
            choir_matrix m;
            CHOIR_TRY(plan_small_part(p, &p->tensors[first + i + k * h->n_runs], &m));
            x->dtypes[k] = (uint8_t)m.dtype;
            x->layouts[k] = (uint8_t)m.layout;
            x->flags[k] = m.flags;
            at = choir_round_up(at + m.bytes, 64);
        }
        x->bytes = at - x->offset;
        if (p->usage != NULL)
            x->usage = p->usage[(size_t)r->layer * p->config->n_experts + r->expert];
        p->units[p->n_units++] = (unit){first + i, i, true, x->offset, x->bytes};
    }
    h->file_bytes = choir_round_up(at, CHOIR_PACK_PAGE);
    return CHOIR_OK;
}

/* What must be the same for a partial file to be gone on with: the plan, and the source's age. */
static uint64_t fingerprint(const packer *p)
{
    uint64_t hash = XXH3_64bits(p->tables, p->header.tables_bytes);
    for (uint32_t i = 0; i < choir_model_file_n_parts(p->file); i++) {
        struct stat st;
        if (stat(choir_model_file_part_path(p->file, i), &st) != 0) continue;
        const int64_t age[] = {st.st_size, st.st_mtim.tv_sec, st.st_mtim.tv_nsec};
        hash = XXH3_64bits_withSeed(age, sizeof age, hash);
    }
    return hash;
}

static void put_texts(packer *p, const text *texts, uint32_t n, uint64_t at)
{
    for (uint32_t i = 0; i < n; i++) {
        choir_pack_text_entry *t = &p->texts[i];
        snprintf(t->name, sizeof t->name, "%s", texts[i].name);
        t->offset = at;
        t->bytes = texts[i].bytes;
        memcpy(p->tables + at, texts[i].data, texts[i].bytes);
        at += texts[i].bytes;
    }
}

static choir_status make_plan(packer *p, const text *texts, uint32_t n_texts)
{
    choir_pack_header *h = &p->header;
    memcpy(h->magic, CHOIR_PACK_UNFINISHED, sizeof h->magic);
    bool small = p->options->small != CHOIR_N_DTYPES;
    h->version = small ? CHOIR_PACK_VERSION_SMALL : CHOIR_PACK_VERSION;
    h->page_bytes = CHOIR_PACK_PAGE;
    h->flags = choir_model_file_gguf(p->file) != NULL ? CHOIR_PACK_FROM_GGUF : 0;
    h->n_texts = n_texts;
    h->n_parameters = choir_model_file_n_parameters(p->file);
    snprintf(h->name, sizeof h->name, "%s", p->config->name);
    snprintf(h->kind, sizeof h->kind, "%s", choir_model_file_kind(p->file));
    snprintf(h->types, sizeof h->types, "%s", choir_model_file_types(p->file));
    if (small) {
        size_t n = strlen(h->types);
        snprintf(h->types + n, sizeof h->types - n, "; small experts: %s",
                 choir_dtype_text(p->options->small));
    }
    if (p->usage != NULL) h->flags |= CHOIR_PACK_HAS_USAGE;
    count_tensors(p, &h->n_tensors, &h->n_runs);
    uint32_t n_small = small ? h->n_runs : 0;
    uint64_t fixed = h->n_tensors * sizeof *p->tensors + h->n_runs * sizeof *p->runs +
                     n_small * sizeof *p->small + n_texts * sizeof *p->texts;
    h->tables_bytes = fixed;
    for (uint32_t i = 0; i < n_texts; i++) h->tables_bytes += texts[i].bytes;
    p->tables = choir_calloc(CHOIR_MEM_TUNE, 1, h->tables_bytes);
    p->units = choir_calloc(CHOIR_MEM_TUNE, h->n_tensors + n_small, sizeof *p->units);
    if (p->tables == NULL || p->units == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the tables of %u tensors",
                          h->n_tensors);
    p->tensors = (choir_pack_tensor *)p->tables;
    p->runs = (choir_pack_run *)(p->tensors + h->n_tensors);
    if (small) p->small = (choir_pack_small *)(p->runs + h->n_runs);
    p->texts = (choir_pack_text_entry *)((choir_pack_small *)(p->runs + h->n_runs) + n_small);
    put_texts(p, texts, n_texts, fixed);
    CHOIR_TRY(plan_tensors(p));
    place_all(p);
    if (small) CHOIR_TRY(place_small(p));
    h->source = fingerprint(p);
    return CHOIR_OK;
}

/* -- the partial file -- */

static choir_status write_at(const packer *p, uint64_t offset, const void *data, size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(p->fd, (const char *)data + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return choir_fail(CHOIR_E_IO, "cannot write %s: %m", p->partial);
        done += (size_t)n;
    }
    return CHOIR_OK;
}

static choir_status sync_file(const packer *p)
{
    if (fdatasync(p->fd) == 0) return CHOIR_OK;
    /* What was written may be lost, whatever a second call would say: begin anew. */
    choir_status status = choir_fail(CHOIR_E_IO, "cannot sync %s: %m", p->partial);
    unlink(p->partial);
    return status;
}

static choir_status write_header(packer *p, const char *magic)
{
    uint8_t page[CHOIR_PACK_PAGE] = {0};
    memcpy(p->header.magic, magic, sizeof p->header.magic);
    p->header.tables_hash = XXH3_64bits(p->tables, p->header.tables_bytes);
    memcpy(page, &p->header, sizeof p->header);
    uint64_t hash = XXH3_64bits(page, CHOIR_PACK_HASH_AT);
    memcpy(page + CHOIR_PACK_HASH_AT, &hash, sizeof hash);
    return write_at(p, 0, page, sizeof page);
}

/* Units before n_done are safe on the disk: the data first, then what says so. */
static choir_status checkpoint(packer *p, uint32_t n_done)
{
    CHOIR_TRY(sync_file(p));
    CHOIR_TRY(write_at(p, CHOIR_PACK_PAGE, p->tables, p->header.tables_bytes));
    CHOIR_TRY(sync_file(p));
    p->header.n_done = n_done;
    CHOIR_TRY(write_header(p, CHOIR_PACK_UNFINISHED));
    return sync_file(p);
}

/* The number of units that an earlier call has done, their checksums in the tables; 0: begin anew.
 */
static uint32_t go_on(packer *p)
{
    choir_pack_header h;
    uint8_t page[CHOIR_PACK_PAGE];
    uint64_t hash;
    if (pread(p->fd, page, sizeof page, 0) != (ssize_t)sizeof page) return 0;
    memcpy(&h, page, sizeof h);
    memcpy(&hash, page + CHOIR_PACK_HASH_AT, sizeof hash);
    if (memcmp(h.magic, CHOIR_PACK_UNFINISHED, sizeof h.magic) != 0 ||
        XXH3_64bits(page, CHOIR_PACK_HASH_AT) != hash || h.source != p->header.source ||
        h.tables_bytes != p->header.tables_bytes || h.n_done > p->n_units)
        return 0;
    uint8_t *tables = choir_alloc(CHOIR_MEM_TUNE, h.tables_bytes);
    bool whole = tables != NULL &&
                 pread(p->fd, tables, h.tables_bytes, CHOIR_PACK_PAGE) == (ssize_t)h.tables_bytes &&
                 XXH3_64bits(tables, h.tables_bytes) == h.tables_hash;
    if (whole) memcpy(p->tables, tables, h.tables_bytes);
    choir_free(tables);
    return whole ? (uint32_t)h.n_done : 0;
}

/* -- units -- */

/* Rows [begin, end) of a slice, for matrices that are packed in parts. */
static choir_slice rows_of(const choir_slice *s, uint32_t begin, uint32_t end)
{
    choir_slice part = *s;
    part.rows = end - begin;
    part.data += begin * s->row_stride;
    if (s->scales != NULL) part.scales += begin * s->scales_stride;
    return part;
}

/* Rows of the source as the type that the file will have. */
static choir_status requantize(const choir_tensor *from, choir_dtype dtype, uint8_t *out)
{
    size_t row_bytes = choir_dtype_row_bytes(dtype, from->cols);
    float *row = choir_alloc(CHOIR_MEM_TUNE, from->cols * sizeof *row);
    if (row == NULL) return CHOIR_E_NO_MEMORY;
    choir_status status = CHOIR_OK;
    for (uint32_t r = 0; r < from->rows && status == CHOIR_OK; r++) {
        choir_tensor_row(from, r, row);
        if (!choir_tune_encode(dtype, row, from->cols, out + r * row_bytes))
            status = CHOIR_E_DATA_LOSS;
    }
    choir_free(row);
    return status;
}

static choir_status pack_rows(const choir_slice *s, choir_dtype dtype, uint8_t *out)
{
    choir_tensor t;
    choir_matrix m;
    void *copy;
    uint8_t *quantised = NULL;
    choir_status status = CHOIR_OK;
    if (!choir_slice_tensor(s, CHOIR_MEM_TUNE, &t, &copy)) return CHOIR_E_NO_MEMORY;
    if (dtype != t.dtype) {
        size_t bytes = t.rows * choir_dtype_row_bytes(dtype, t.cols);
        quantised = choir_alloc(CHOIR_MEM_TUNE, bytes);
        status = quantised != NULL ? requantize(&t, dtype, quantised) : CHOIR_E_NO_MEMORY;
        t = (choir_tensor){dtype, t.rows, t.cols, quantised, bytes};
    }
    if (status == CHOIR_OK) status = choir_matrix_plan(&t, &m);
    if (status == CHOIR_OK) choir_matrix_pack(&m, &t, out, 0, m.rows);
    choir_free(copy);
    choir_free(quantised);
    choir_slice_forget(s);
    return status;
}

static choir_status write_vector(packer *p, choir_pack_tensor *t)
{
    choir_slice s;
    choir_tensor from;
    CHOIR_TRY(choir_model_file_slice(p->file, t->role, t->layer, t->index, &s));
    void *copy;
    float *values = choir_alloc(CHOIR_MEM_TUNE, t->bytes);
    bool there = choir_slice_tensor(&s, CHOIR_MEM_TUNE, &from, &copy);
    choir_status status = CHOIR_OK;
    if (values == NULL || !there) {
        status =
            choir_fail(CHOIR_E_NO_MEMORY, "no memory for a vector of %zu bytes", (size_t)t->bytes);
    } else {
        choir_model_file_expand(p->file, t->role, &from, values);
        t->checksum = XXH3_64bits(values, t->bytes);
        status = write_at(p, t->offset, values, t->bytes);
    }
    choir_free(values);
    choir_free(copy);
    return status;
}

static choir_status tell(const packer *p, const choir_pack_tensor *t, choir_dtype dtype,
                         choir_status status)
{
    if (status == CHOIR_OK) return status;
    if (status == CHOIR_E_NO_MEMORY) return choir_fail(status, "no memory to pack a tensor");
    return choir_fail(status, "%s: %s %u of layer %u holds a NaN, or a number too large for %s",
                      p->options->model, choir_role_text(t->role), t->index, t->layer,
                      choir_dtype_text(dtype));
}

/* A round of a matrix's parts, one a worker. */
typedef struct part {
    choir_slice slice;
    uint8_t *out;
    size_t bytes;
    choir_status status;
} part;
typedef struct round {
    part parts[256];
    choir_dtype dtype;
    uint32_t n;
} round;

static void pack_parts(void *arg, uint32_t worker, uint32_t n_workers)
{
    round *r = arg;
    for (uint32_t i = worker; i < r->n; i += n_workers)
        r->parts[i].status = pack_rows(&r->parts[i].slice, r->dtype, r->parts[i].out);
}

/* A matrix of any size: strips of rows are packed on their own and follow each other. */
static choir_status write_matrix(packer *p, choir_pack_tensor *t, round *r)
{
    choir_slice s;
    CHOIR_TRY(choir_model_file_slice(p->file, t->role, t->layer, t->index, &s));
    size_t strips = (t->rows + CHOIR_PACK_ROWS - 1) / CHOIR_PACK_ROWS, strip = t->bytes / strips;
    size_t at_once = p->buffer_bytes / strip;
    uint32_t rows = at_once < strips ? (uint32_t)at_once * CHOIR_PACK_ROWS : t->rows;
    if (s.source != s.dtype) rows = t->rows; /* its rows lie across */
    XXH3_state_t *hash = XXH3_createState();
    if (hash == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a checksum");
    XXH3_64bits_reset(hash);
    choir_status status = CHOIR_OK;
    uint64_t offset = t->offset;
    for (uint32_t begin = 0; begin < t->rows && status == CHOIR_OK;) {
        *r = (round){.dtype = t->dtype};
        for (; r->n < choir_workers_count(p->workers) && begin < t->rows; r->n++) {
            uint32_t end = t->rows - begin < rows ? t->rows : begin + rows;
            size_t bytes = (end - begin + CHOIR_PACK_ROWS - 1) / CHOIR_PACK_ROWS * strip;
            r->parts[r->n] = (part){rows_of(&s, begin, end), p->buffers[r->n], bytes, CHOIR_OK};
            begin = end;
        }
        choir_workers_run(p->workers, pack_parts, r);
        for (uint32_t i = 0; i < r->n && status == CHOIR_OK; i++) {
            status = tell(p, t, t->dtype, r->parts[i].status);
            if (status != CHOIR_OK) break;
            XXH3_64bits_update(hash, r->parts[i].out, r->parts[i].bytes);
            status = write_at(p, offset, r->parts[i].out, r->parts[i].bytes);
            offset += r->parts[i].bytes;
        }
    }
    t->checksum = XXH3_64bits_digest(hash);
    XXH3_freeState(hash);
    return status;
}

/* A round of experts, one a worker. */
typedef struct experts_round {
    packer *p;
    uint32_t first, n;
    choir_status status[256];
} experts_round;

static void pack_expert(packer *p, const unit *u, uint8_t *out, choir_status *status)
{
    choir_pack_small *small = u->small ? &p->small[u->run] : NULL;
    memset(out, 0, u->bytes);
    for (uint32_t i = 0; i < 3; i++) {
        choir_pack_tensor *t = &p->tensors[u->first_tensor + i * p->header.n_runs];
        choir_matrix m = {.dtype = t->dtype, .bytes = t->bytes};
        choir_slice s;
        *status = choir_model_file_slice(p->file, t->role, t->layer, t->index, &s);
        if (*status == CHOIR_OK && small != NULL) *status = plan_small_part(p, t, &m);
        if (*status == CHOIR_OK) *status = pack_rows(&s, m.dtype, out);
        if (*status != CHOIR_OK) return;
        *(small != NULL ? &small->checksums[i] : &t->checksum) = XXH3_64bits(out, m.bytes);
        out += choir_round_up(m.bytes, 64);
    }
}

static void pack_experts(void *arg, uint32_t worker, uint32_t n_workers)
{
    experts_round *r = arg;
    for (uint32_t i = worker; i < r->n; i += n_workers)
        pack_expert(r->p, &r->p->units[r->first + i], r->p->buffers[i], &r->status[i]);
}

static choir_status write_experts(packer *p, uint32_t first, uint32_t *n)
{
    experts_round r = {.p = p, .first = first};
    while (r.n < choir_workers_count(p->workers) && first + r.n < p->n_units) r.n++;
    choir_workers_run(p->workers, pack_experts, &r);
    for (uint32_t i = 0; i < r.n; i++) {
        const unit *u = &p->units[first + i];
        const choir_pack_tensor *t = &p->tensors[u->first_tensor];
        CHOIR_TRY(tell(p, t, u->small ? p->options->small : (choir_dtype)t->dtype, r.status[i]));
        CHOIR_TRY(write_at(p, u->offset, p->buffers[i], u->bytes));
    }
    *n = r.n;
    return CHOIR_OK;
}

static choir_status write_units(packer *p, uint32_t from)
{
    round *r = choir_calloc(CHOIR_MEM_TUNE, 1, sizeof *r);
    if (r == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory to pack");
    choir_status status = CHOIR_OK;
    uint64_t since = 0, total = 0;
    for (uint32_t i = 0; i < p->n_units; i++) total += p->units[i].bytes;
    for (uint32_t i = 0; i < from; i++) p->n_written += p->units[i].bytes;
    choir_progress_begin(&p->progress, "packing", CHOIR_PROGRESS_BYTES, total);
    p->progress.quiet = !p->options->show_progress;
    for (uint32_t i = from, n = 1; i < p->n_units && status == CHOIR_OK; i += n) {
        const unit *u = &p->units[i];
        choir_pack_tensor *t = &p->tensors[u->first_tensor];
        n = 1;
        if (u->run >= 0)
            status = write_experts(p, i, &n);
        else
            status = choir_role_is_f32(t->role) ? write_vector(p, t) : write_matrix(p, t, r);
        for (uint32_t k = 0; k < n; k++) since += p->units[i + k].bytes;
        choir_progress_update(&p->progress, p->n_written + since);
        bool stop = p->options->interrupted != NULL && *p->options->interrupted;
        if (status == CHOIR_OK && (since >= CHECKPOINT || stop)) {
            status = checkpoint(p, i + n);
            p->n_written += since;
            since = 0;
        }
        if (status == CHOIR_OK && stop)
            status =
                choir_fail(CHOIR_E_CANCELLED, "interrupted; the same command goes on from %.0f %%",
                           100.0 * (double)p->n_written / (double)total);
    }
    choir_progress_end(&p->progress);
    choir_free(r);
    return status;
}

static choir_status finish(packer *p)
{
    if (ftruncate(p->fd, (off_t)p->header.file_bytes) != 0)
        return choir_fail(CHOIR_E_IO, "cannot write %s: %m", p->partial);
    CHOIR_TRY(write_at(p, CHOIR_PACK_PAGE, p->tables, p->header.tables_bytes));
    CHOIR_TRY(sync_file(p)); /* all but the header is there before the header says so */
    p->header.source = p->header.n_done = 0;
    CHOIR_TRY(write_header(p, CHOIR_PACK_MAGIC));
    CHOIR_TRY(sync_file(p));
    if (rename(p->partial, p->options->out) != 0)
        return choir_fail(CHOIR_E_IO, "cannot rename %s to %s: %m", p->partial, p->options->out);
    return choir_folder_sync(p->options->out);
}

static choir_status take_buffers(packer *p)
{
    p->buffer_bytes = CHUNK;
    for (uint32_t i = 0; i < p->n_units; i++) {
        const choir_pack_tensor *t = &p->tensors[p->units[i].first_tensor];
        size_t strips = (t->rows + CHOIR_PACK_ROWS - 1) / CHOIR_PACK_ROWS;
        size_t least = p->units[i].run >= 0 ? p->units[i].bytes : t->bytes / strips;
        /* Heads' keys of latent attention may lie across, and are packed whole. */
        if (t->role == CHOIR_ROLE_ATTN_K_B) least = t->bytes;
        if (least > p->buffer_bytes) p->buffer_bytes = least;
    }
    uint32_t n = choir_workers_count(p->workers);
    p->buffers = choir_calloc(CHOIR_MEM_TUNE, n, sizeof *p->buffers);
    for (uint32_t i = 0; p->buffers != NULL && i < n; i++) {
        p->buffers[i] = choir_alloc_pages(CHOIR_MEM_TUNE, p->buffer_bytes);
        if (p->buffers[i] == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory to pack with %u threads", n);
    }
    return p->buffers != NULL ? CHOIR_OK : choir_fail(CHOIR_E_NO_MEMORY, "no memory to pack");
}

static choir_status write_file(packer *p)
{
    snprintf(p->partial, sizeof p->partial, "%s.partial", p->options->out);
    p->fd = open(p->partial, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (p->fd < 0) return choir_fail(CHOIR_E_IO, "cannot write %s: %m", p->partial);
    uint32_t from = go_on(p);
    struct stat st;
    uint64_t held = fstat(p->fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
    if (held < p->header.file_bytes)
        CHOIR_TRY(choir_tune_check_space(p->options->out, p->header.file_bytes - held));
    if (from > 0 && p->options->show_progress)
        choir_log(CHOIR_LOG_INFO, "going on with %s, %u of %u parts are done", p->partial, from,
                  p->n_units);
    CHOIR_TRY(take_buffers(p));
    CHOIR_TRY(write_units(p, from));
    return finish(p);
}

static choir_status prepare_small(packer *p)
{
    const choir_pack_options *o = p->options;
    size_t n = (size_t)p->config->n_layers * p->config->n_experts;
    if (o->small == CHOIR_N_DTYPES && o->usage != NULL)
        return choir_fail(CHOIR_E_INVALID, "experts' usage is kept beside small copies alone");
    if (o->small == CHOIR_N_DTYPES) return CHOIR_OK;
    if (o->small != CHOIR_Q2 && o->small != CHOIR_Q3 && o->small != CHOIR_Q4_0)
        return choir_fail(CHOIR_E_INVALID, "small copies can be Q2, Q3 or Q4_0");
    if (n == 0)
        return choir_fail(CHOIR_E_INVALID, "%s is dense, it has no experts to be copied",
                          p->config->name);
    if (o->usage == NULL) return CHOIR_OK;
    p->usage = choir_calloc(CHOIR_MEM_TUNE, n, sizeof *p->usage);
    if (p->usage == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for experts' usage");
    return choir_usage_read(o->usage, p->config, p->usage);
}

static choir_status pack_model(packer *p)
{
    text texts[MAX_TEXTS] = {{0}};
    uint32_t n_texts;
    if (choir_model_file_pack(p->file) != NULL)
        return choir_fail(CHOIR_E_INVALID, "%s is packed already", p->options->model);
    p->config = choir_model_file_config(p->file);
    CHOIR_TRY(prepare_small(p));
    choir_status status = collect_texts(p, texts, &n_texts);
    if (status == CHOIR_OK) status = make_plan(p, texts, n_texts);
    for (int i = 0; i < MAX_TEXTS; i++) choir_free(texts[i].data);
    CHOIR_TRY(status);
    CHOIR_TRY(choir_workers_create(p->options->n_threads, &p->workers));
    return write_file(p);
}

choir_status choir_pack_write(const choir_pack_options *options)
{
    packer p = {.fd = -1};
    choir_pack_options o = *options;
    if (o.n_threads == 0) o.n_threads = choir_workers_best();
    p.options = &o;
    CHOIR_TRY(choir_model_file_open(o.model, &p.file));
    choir_status status = pack_model(&p);
    if (p.fd >= 0) close(p.fd);
    uint32_t n = p.workers != NULL ? choir_workers_count(p.workers) : 0;
    for (uint32_t i = 0; p.buffers != NULL && i < n; i++)
        choir_free_pages(CHOIR_MEM_TUNE, p.buffers[i], p.buffer_bytes);
    choir_free(p.buffers);
    choir_workers_destroy(p.workers);
    choir_free(p.units);
    choir_free(p.usage);
    choir_free(p.tables);
    choir_model_file_close(p.file);
    return status;
}
