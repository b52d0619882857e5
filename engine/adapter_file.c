/* An adapter's file as a list of changes: the tensors that its readers claim, and what they say of
 * each matrix of the base. */
#include "engine/adapter_read.h"
#include "engine/safetensors.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum {
    SMALL_ARENA = 256 << 10,
    LARGE_ARENA = 16 << 20,
    MAX_LENT_BYTES = 256 << 20,
    MAX_CONFIG_BYTES = 4 << 20,
    MAX_PATH_BYTES = 4096
};

static choir_status no_memory(const choir_adapter_reader *r)
{
    return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for the adapter", r->name);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const choir_adapter_tensor *)a)->name, ((const choir_adapter_tensor *)b)->name);
}

choir_adapter_tensor *choir_adapter_find(const choir_adapter_reader *r, const char *name)
{
    const choir_adapter_tensor key = {.name = name};
    return bsearch(&key, r->tensors, r->n_tensors, sizeof key, by_name);
}

choir_status choir_adapter_floats(choir_adapter_reader *r, size_t n, float **out)
{
    *out = n > SIZE_MAX / sizeof **out ? NULL : choir_arena_alloc(r->arena, n * sizeof **out);
    return *out != NULL ? CHOIR_OK : no_memory(r);
}

static void put_dims(const uint64_t *dims, uint32_t n_dims, char *out, size_t bytes)
{
    size_t n = (size_t)snprintf(out, bytes, "[");
    for (uint32_t d = 0; d < n_dims && n < bytes; d++)
        n += (size_t)snprintf(out + n, bytes - n, "%s%" PRIu64, d > 0 ? ", " : "", dims[d]);
    if (n < bytes) snprintf(out + n, bytes - n, "]");
}

/* Wanted: n numbers, slowest first. */
static choir_status expect_dims(const choir_adapter_reader *r, const choir_adapter_tensor *t,
                                const uint64_t *wanted, uint32_t n)
{
    char shape[200], text[100];
    if (!t->readable)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: tensor '%.200s' has type %.20s; Choir reads F32, F16 and BF16",
                          r->name, t->name, t->type);
    bool fits = t->n_dims == n;
    for (uint32_t d = 0; fits && d < n; d++) fits = t->dims[d] == wanted[d];
    if (fits) return CHOIR_OK;
    put_dims(t->dims, t->n_dims, shape, sizeof shape);
    put_dims(wanted, n, text, sizeof text);
    return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has shape %s, the base wants %s",
                      r->name, t->name, shape, text);
}

choir_status choir_adapter_expect(const choir_adapter_reader *r, const choir_adapter_tensor *t,
                                  uint64_t rows, uint64_t cols)
{
    const uint64_t wanted[] = {rows, cols};
    return rows == 0 ? expect_dims(r, t, wanted + 1, 1) : expect_dims(r, t, wanted, 2);
}

choir_status choir_adapter_expect_stack(const choir_adapter_reader *r,
                                        const choir_adapter_tensor *t, uint64_t n, uint64_t rows,
                                        uint64_t cols)
{
    return expect_dims(r, t, (const uint64_t[]){n, rows, cols}, 3);
}

/* Rows of a tensor, whatever its dimensions: all but the last. */
static choir_status view_of(const choir_adapter_reader *r, const choir_adapter_tensor *t,
                            choir_tensor *out)
{
    uint64_t cols = t->n_dims == 0 ? 1 : t->dims[t->n_dims - 1], rows = 1;
    for (uint32_t d = 0; d + 1 < t->n_dims; d++) rows *= t->dims[d];
    *out = (choir_tensor){t->dtype, (uint32_t)rows, (uint32_t)cols, t->data, t->bytes};
    if (rows <= UINT32_MAX) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has %" PRIu64 " rows", r->name, t->name,
                      rows);
}

static choir_status check_finite(const choir_adapter_reader *r, const choir_adapter_tensor *t,
                                 const float *values, size_t n)
{
    /* By the thousand, so that the compiler takes many at once. */
    for (size_t i = 0; i < n;) {
        size_t end = n - i < 4096 ? n : i + 4096;
        int bad = 0;
        for (; i < end; i++) bad |= !(fabsf(values[i]) <= FLT_MAX);
        if (bad)
            return choir_fail(CHOIR_E_DATA_LOSS, "%s: tensor '%.200s' holds NaN or infinity",
                              r->name, t->name);
    }
    return CHOIR_OK;
}

/* Rows 0 to n as f32; `rows`, if it is there, says where they lie. */
static void read_rows(const choir_tensor *t, const choir_adapter_rows *rows, size_t n, float *to)
{
    bool move = rows != NULL && choir_adapter_rows_move(rows);
    size_t row_bytes = choir_dtype_row_bytes(t->dtype, t->cols);
    /* Factors' rows are short: they are taken many at once where they lie behind each other. */
    size_t many = move || t->cols > 4096 ? 1 : 65536 / (t->cols + 1) + 1;
    for (size_t i = 0, k; i < n; i += k) {
        choir_tensor piece = *t;
        size_t from = move ? choir_adapter_row(rows, (uint32_t)i) : i;
        k = many < n - i ? many : n - i;
        piece.data = (const uint8_t *)t->data + from * row_bytes;
        choir_tensor_part(&piece, 0, (uint32_t)(k * t->cols), to + i * t->cols);
    }
}

choir_status choir_adapter_read(choir_adapter_reader *r, choir_adapter_tensor *t,
                                const choir_adapter_rows *rows, const float **out)
{
    t->used = true;
    *out = NULL;
    if (r->headers_only) return CHOIR_OK;
    choir_tensor view;
    CHOIR_TRY(view_of(r, t, &view));
    if (t->n_dims == 1 && rows != NULL) { /* a vector is cut along its elements */
        if (choir_dtype_block_elements(t->dtype) > 1)
            return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: tensor '%.200s' is a vector of type %s",
                              r->name, t->name, t->type);
        view.rows = view.cols;
        view.cols = 1;
    }
    float *to;
    size_t n_rows = rows != NULL ? rows->n : view.rows, n = n_rows * view.cols;
    CHOIR_TRY(choir_adapter_floats(r, n, &to));
    read_rows(&view, rows, n_rows, to);
    *out = to;
    return check_finite(r, t, to, n);
}

/* Of 16 bits each; the exponent of what is no number is all ones. */
static bool all_finite(const void *data, size_t n, uint16_t exponent)
{
    typedef uint16_t __attribute__((may_alias)) half;
    const half *x = data;
    int bad = 0;
    for (size_t i = 0; i < n; i++) bad |= (x[i] & exponent) == exponent;
    return !bad;
}

choir_status choir_adapter_lend(choir_adapter_reader *r, choir_adapter_tensor *t,
                                const choir_adapter_rows *rows, choir_tensor *out)
{
    *out = (choir_tensor){0};
    bool halves = t->dtype == CHOIR_F16 || t->dtype == CHOIR_BF16;
    if (!r->lends || r->headers_only || !halves || t->bytes > MAX_LENT_BYTES ||
        (uintptr_t)t->data % 2 != 0 || (rows != NULL && choir_adapter_rows_move(rows)))
        return CHOIR_OK;
    CHOIR_TRY(view_of(r, t, out));
    t->used = true;
    if (all_finite(t->data, t->bytes / 2, t->dtype == CHOIR_F16 ? 0x7C00 : 0x7F80)) return CHOIR_OK;
    return choir_fail(CHOIR_E_DATA_LOSS, "%s: tensor '%.200s' holds NaN or infinity", r->name,
                      t->name);
}

choir_status choir_adapter_load(choir_adapter_reader *r, choir_adapter_tensor *t, const float **out)
{
    choir_tensor view;
    CHOIR_TRY(view_of(r, t, &view));
    size_t n = (size_t)view.rows * view.cols;
    t->used = true;
    if (n > r->scratch_n) {
        choir_free(r->scratch);
        r->scratch_n = 0;
        r->scratch = choir_alloc(CHOIR_MEM_OTHER, n * sizeof *r->scratch);
        if (r->scratch == NULL) return no_memory(r);
        r->scratch_n = n;
    }
    read_rows(&view, NULL, view.rows, r->scratch);
    *out = r->scratch;
    return check_finite(r, t, r->scratch, n);
}

choir_adapter_change choir_adapter_begin(const choir_adapter_reader *r,
                                         const choir_adapter_place *place, uint32_t layer,
                                         uint32_t index)
{
    uint64_t rows, cols;
    choir_role_shape(r->base, place->role, &rows, &cols);
    return (choir_adapter_change){.role = place->role,
                                  .layer = choir_role_per_layer(place->role) ? layer : 0,
                                  .index = choir_role_count(r->base, place->role) > 1 ? index : 0,
                                  .rows = (uint32_t)rows,
                                  .cols = (uint32_t)cols,
                                  .scale = 1};
}

choir_status choir_adapter_add(choir_adapter_reader *r, const choir_adapter_change *change,
                               const char *tensor)
{
    if (r->n_pieces == r->pieces_capacity) {
        size_t capacity = r->pieces_capacity == 0 ? 256 : 2 * r->pieces_capacity;
        void *pieces = choir_realloc(CHOIR_MEM_OTHER, r->pieces, capacity * sizeof *r->pieces);
        if (pieces == NULL) return no_memory(r);
        r->pieces = pieces;
        r->pieces_capacity = capacity;
    }
    r->pieces[r->n_pieces++] = (choir_adapter_piece){*change, tensor};
    return CHOIR_OK;
}

choir_status choir_adapter_refuse(const choir_adapter_reader *r, const char *tensor)
{
    return choir_fail(
        CHOIR_E_INVALID,
        "%s: tensor '%.200s' has no place in the base (%s) as %s; the adapter without it "
        "would answer wrongly",
        r->name, tensor, r->base->family->name, r->data->kind);
}

static int by_matrix(const void *a, const void *b)
{
    const choir_adapter_piece *p = a, *q = b;
    const choir_adapter_change *x = &p->change, *y = &q->change;
    if (x->layer != y->layer) return x->layer < y->layer ? -1 : 1;
    if (x->role != y->role) return x->role < y->role ? -1 : 1;
    if (x->index != y->index) return x->index < y->index ? -1 : 1;
    return strcmp(p->tensor, q->tensor); /* so that the order is one */
}

static bool same_matrix(const choir_adapter_change *x, const choir_adapter_change *y)
{
    return x->layer == y->layer && x->role == y->role && x->index == y->index;
}

/* What two tensors say of one matrix, in one change. */
static choir_status join(const choir_adapter_reader *r, choir_adapter_change *to,
                         const choir_adapter_piece *piece, const char *other)
{
    const choir_adapter_change *from = &piece->change;
    if ((to->has & from->has) != 0)
        return choir_fail(CHOIR_E_INVALID,
                          "%s: tensors '%.200s' and '%.200s' say the same of %s in layer %u",
                          r->name, other, piece->tensor, choir_role_text(to->role), to->layer);
    if ((from->has & CHOIR_ADAPTER_HAS_LOW_RANK) != 0) {
        choir_adapter_change joined = *from;
        joined.out_scale = to->out_scale;
        joined.in_scale = to->in_scale;
        joined.weight = to->weight;
        joined.bias = to->bias;
        joined.has |= to->has;
        *to = joined;
        return CHOIR_OK;
    }
    if (from->out_scale != NULL) to->out_scale = from->out_scale;
    if (from->in_scale != NULL) to->in_scale = from->in_scale;
    if (from->weight != NULL) to->weight = from->weight;
    if (from->bias != NULL) to->bias = from->bias;
    to->has |= from->has;
    return CHOIR_OK;
}

static choir_status collect(choir_adapter_reader *r)
{
    choir_adapter_data *d = r->data;
    if (r->n_pieces > 0) qsort(r->pieces, r->n_pieces, sizeof *r->pieces, by_matrix);
    size_t n = 0;
    for (size_t i = 0; i < r->n_pieces; i++)
        n += i == 0 || !same_matrix(&r->pieces[i - 1].change, &r->pieces[i].change);
    d->changes = choir_arena_alloc(r->arena, n * sizeof *d->changes);
    if (d->changes == NULL) return no_memory(r);
    const char *first = NULL;
    for (size_t i = 0; i < r->n_pieces; i++) {
        const choir_adapter_piece *p = &r->pieces[i];
        choir_adapter_change *last = &d->changes[d->n_changes - (d->n_changes > 0)];
        if (d->n_changes > 0 && same_matrix(last, &p->change)) {
            CHOIR_TRY(join(r, last, p, first));
        } else {
            d->changes[d->n_changes++] = p->change;
            first = p->tensor;
        }
    }
    for (size_t i = 0; i < d->n_changes; i++)
        if (d->changes[i].rank > d->max_rank) d->max_rank = d->changes[i].rank;
    return CHOIR_OK;
}

static choir_status check_leftovers(const choir_adapter_reader *r)
{
    for (size_t i = 0; i < r->n_tensors; i++)
        if (!r->tensors[i].used) return choir_adapter_refuse(r, r->tensors[i].name);
    const choir_adapter_data *d = r->data;
    if (d->n_changes == 0 && d->n_virtual == 0)
        return choir_fail(CHOIR_E_INVALID, "%s holds no tensors, so it changes nothing", r->name);
    return CHOIR_OK;
}

static choir_status make_tensors(choir_adapter_reader *r, size_t n)
{
    r->tensors = choir_calloc(CHOIR_MEM_OTHER, n + 1, sizeof *r->tensors);
    return r->tensors != NULL ? CHOIR_OK : no_memory(r);
}

static choir_status list_safetensors(choir_adapter_reader *r, const choir_safetensors *file)
{
    size_t n = choir_safetensors_count(file);
    CHOIR_TRY(make_tensors(r, n));
    for (size_t i = 0; i < n; i++) { /* by name already */
        const choir_safetensor *t = choir_safetensors_at(file, i);
        choir_adapter_tensor *to = &r->tensors[r->n_tensors++];
        *to = (choir_adapter_tensor){.name = t->name,
                                     .type = t->type,
                                     .readable = t->readable,
                                     .dtype = t->dtype,
                                     .n_dims = t->n_dims,
                                     .data = t->data,
                                     .bytes = t->bytes};
        memcpy(to->dims, t->dims, sizeof to->dims);
        uint64_t n_elements = 1;
        for (uint32_t d = 0; d < t->n_dims; d++) {
            if (t->dims[d] > UINT32_MAX)
                return choir_fail(CHOIR_E_INVALID,
                                  "%s: tensor '%.200s' has a dimension of %" PRIu64, r->name,
                                  t->name, t->dims[d]);
            n_elements *= t->dims[d];
        }
        r->data->n_parameters += n_elements;
    }
    return CHOIR_OK;
}

/* Of everything that the answer depends on. */
static uint64_t digest_of(const choir_adapter_source *s)
{
    uint64_t config = s->config == NULL ? 0 : XXH3_64bits(s->config, s->config_bytes);
    return XXH3_64bits_withSeed(s->tensors, s->tensor_bytes, config);
}

static choir_status read_folder(choir_adapter_reader *r, const choir_adapter_source *s,
                                uint64_t file_bytes)
{
    json_error_t error;
    choir_safetensors *file = NULL;
    json_t *config = json_loadb(s->config, s->config_bytes, JSON_REJECT_DUPLICATES, &error);
    choir_status status = CHOIR_OK;
    r->config = config;
    if (!json_is_object(config)) {
        status =
            choir_fail(CHOIR_E_FORMAT, "%s: adapter_config.json is no JSON object: %s (line %d)",
                       s->name, config == NULL ? error.text : "something else", error.line);
        goto done;
    }
    CHOIR_TRY_TO(done, status,
                 r->headers_only && r->pairs == NULL
                     ? choir_safetensors_parse_header(s->name, s->tensors, s->tensor_bytes,
                                                      file_bytes, &file)
                     : choir_safetensors_parse(s->name, s->tensors, s->tensor_bytes, &file));
    CHOIR_TRY_TO(done, status, list_safetensors(r, file));
    CHOIR_TRY_TO(done, status, choir_adapter_read_peft(r));
    CHOIR_TRY_TO(done, status, collect(r));
    status = check_leftovers(r);
done:
    choir_safetensors_close(file);
    json_decref(config);
    return status;
}

/* Dimensions slowest first, without the ones that llama.cpp puts before a matrix. */
static choir_status list_gguf(choir_adapter_reader *r)
{
    uint64_t n = choir_gguf_n_tensors(r->gguf);
    CHOIR_TRY(make_tensors(r, n));
    for (uint64_t i = 0; i < n; i++) {
        const choir_gguf_tensor *t = choir_gguf_tensor_at(r->gguf, i);
        choir_adapter_tensor *to = &r->tensors[r->n_tensors++];
        char *name = choir_arena_alloc(r->arena, t->name.bytes + 1);
        if (name == NULL) return no_memory(r);
        memcpy(name, t->name.data, t->name.bytes);
        name[t->name.bytes] = '\0';
        *to = (choir_adapter_tensor){.name = name,
                                     .type = choir_dtype_text(t->dtype),
                                     .readable = true,
                                     .dtype = t->dtype,
                                     .n_dims = t->n_dims,
                                     .data = t->data,
                                     .bytes = t->bytes};
        uint64_t n_elements = 1;
        for (uint32_t d = 0; d < t->n_dims; d++) {
            to->dims[d] = t->dims[t->n_dims - 1 - d];
            n_elements *= to->dims[d];
            if (to->dims[d] > UINT32_MAX)
                return choir_fail(CHOIR_E_INVALID,
                                  "%s: tensor '%.200s' has a dimension of %" PRIu64, r->name, name,
                                  to->dims[d]);
        }
        r->data->n_parameters += n_elements;
    }
    if (r->n_tensors > 0) qsort(r->tensors, r->n_tensors, sizeof *r->tensors, by_name);
    for (size_t i = 1; i < r->n_tensors; i++) /* a NUL ends names here, not in the file */
        if (strcmp(r->tensors[i - 1].name, r->tensors[i].name) == 0)
            return choir_fail(CHOIR_E_FORMAT, "%s: tensor '%.200s' is there twice", r->name,
                              r->tensors[i].name);
    return CHOIR_OK;
}

static choir_status read_gguf(choir_adapter_reader *r, const choir_adapter_source *s)
{
    choir_gguf *gguf = NULL;
    choir_status status;
    CHOIR_TRY_TO(done, status,
                 r->headers_only
                     ? choir_gguf_parse_header(s->name, s->tensors, s->tensor_bytes, &gguf)
                     : choir_gguf_parse(s->name, s->tensors, s->tensor_bytes, &gguf));
    r->gguf = gguf;
    CHOIR_TRY_TO(done, status, list_gguf(r));
    CHOIR_TRY_TO(done, status, choir_adapter_read_gguf(r));
    CHOIR_TRY_TO(done, status, collect(r));
    status = check_leftovers(r);
done:
    choir_gguf_close(gguf);
    return status;
}

/* Numbers of 16 bits become twice as long. */
static size_t arena_bytes(const choir_adapter_source *s, bool headers_only)
{
    size_t numbers = headers_only || s->lends ? 0 : 2 * s->tensor_bytes;
    return numbers < SMALL_ARENA ? SMALL_ARENA : numbers < LARGE_ARENA ? numbers : LARGE_ARENA;
}

static choir_status parse(const choir_model_config *base, const choir_adapter_source *s,
                          bool headers_only, uint64_t file_bytes, choir_adapter_pairs *pairs,
                          choir_adapter_data **out)
{
    choir_adapter_reader r = {.base = base,
                              .name = s->name,
                              .headers_only = headers_only,
                              .pairs = pairs,
                              .lends = s->lends};
    r.data = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *r.data);
    if (r.data == NULL) return no_memory(&r);
    choir_status status =
        choir_arena_create(CHOIR_MEM_OTHER, arena_bytes(s, headers_only), &r.arena);
    r.data->memory = r.arena;
    if (status == CHOIR_OK)
        status = s->config != NULL ? read_folder(&r, s, file_bytes) : read_gguf(&r, s);
    if (status == CHOIR_OK && !headers_only) r.data->digest = digest_of(s);
    choir_adapter_free_places(&r);
    choir_free(r.tensors);
    choir_free(r.pieces);
    choir_free(r.scratch);
    if (status != CHOIR_OK)
        choir_adapter_data_free(r.data);
    else
        *out = r.data;
    return status;
}

choir_status choir_adapter_data_parse(const choir_model_config *base, const choir_adapter_source *s,
                                      choir_adapter_data **out)
{
    return parse(base, s, false, s->tensor_bytes, NULL, out);
}

choir_status choir_adapter_data_check(const choir_model_config *base, const choir_adapter_source *s,
                                      uint64_t file_bytes, choir_adapter_data **out)
{
    return parse(base, s, true, file_bytes, NULL, out);
}

choir_status choir_adapter_list_pairs(const choir_model_config *base, const choir_adapter_source *s,
                                      choir_adapter_pairs *pairs, choir_adapter_data **out)
{
    return parse(base, s, true, s->tensor_bytes, pairs, out);
}

uint32_t choir_adapter_begins(const uint32_t *invocation, uint32_t n_invocation,
                              const uint32_t *tokens, size_t n_tokens)
{
    for (size_t at = n_tokens >= n_invocation ? n_tokens - n_invocation + 1 : 0; at-- > 0;)
        if (memcmp(tokens + at, invocation, n_invocation * sizeof *tokens) == 0)
            return (uint32_t)at;
    return CHOIR_ADAPTER_NEVER;
}

void choir_adapter_data_free(choir_adapter_data *data)
{
    if (data == NULL) return;
    choir_arena_destroy(data->memory);
    choir_free(data);
}

/* A folder without safetensors, and what it has instead. */
static choir_status refuse_pickles(const char *folder)
{
    static const char *const pickles[] = {"adapter_model.bin", "pytorch_adapter.bin",
                                          "adapter_model.pt", "adapter_model.pth"};
    char path[MAX_PATH_BYTES];
    for (size_t i = 0; i < sizeof pickles / sizeof *pickles; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, pickles[i]);
        if (choir_file_exists(path))
            return choir_fail(
                CHOIR_E_UNIMPLEMENTED,
                "%s is a pickle, which can run code as it is read, so Choir reads none; "
                "save the adapter as safetensors",
                path);
    }
    return CHOIR_OK;
}

static choir_status check_path(const char *path)
{
    if (strlen(path) <= MAX_PATH_BYTES - 64) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "the adapter's path %.60s… has %zu bytes, the limit is %d",
                      path, strlen(path), MAX_PATH_BYTES - 64);
}

choir_status choir_adapter_open_files(const char *folder, choir_adapter_source *source,
                                      char **config, choir_map *map)
{
    char config_path[MAX_PATH_BYTES], path[MAX_PATH_BYTES];
    CHOIR_TRY(check_path(folder));
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    if (!choir_file_exists(path)) {
        CHOIR_TRY(refuse_pickles(folder));
        snprintf(path, sizeof path, "%s/adapter.safetensors", folder); /* AdapterHub's name */
    }
    if (!choir_file_exists(path))
        snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    snprintf(config_path, sizeof config_path, "%s/adapter_config.json", folder);
    *source = (choir_adapter_source){.name = folder};
    CHOIR_TRY(choir_file_read(config_path, MAX_CONFIG_BYTES, config, &source->config_bytes));
    choir_status status = choir_map_open(path, map);
    if (status != CHOIR_OK) {
        choir_free(*config);
        return status;
    }
    source->config = *config;
    source->tensors = map->data;
    source->tensor_bytes = map->bytes;
    return CHOIR_OK;
}

static choir_status open_folder(const choir_model_config *base, const char *folder,
                                choir_adapter_data **out)
{
    choir_adapter_source source;
    char *config;
    choir_map map;
    CHOIR_TRY(choir_adapter_open_files(folder, &source, &config, &map));
    choir_status status = choir_adapter_data_parse(base, &source, out);
    choir_map_close(&map);
    choir_free(config);
    return status;
}

choir_status choir_adapter_data_open(const choir_model_config *base, const char *path,
                                     choir_adapter_data **out)
{
    CHOIR_TRY(check_path(path));
    if (choir_folder_exists(path)) return open_folder(base, path, out);
    choir_map map;
    CHOIR_TRY(choir_map_open(path, &map));
    const choir_adapter_source source = {
        .name = path, .tensors = map.data, .tensor_bytes = map.bytes};
    choir_status status = choir_adapter_data_parse(base, &source, out);
    choir_map_close(&map);
    return status;
}
