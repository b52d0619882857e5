#include "engine/safetensors.h"

#include "base/base.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HEADER_BYTES = 100000000 };

struct choir_safetensors {
    choir_map map;
    char *path; /* as told at the opening */
    json_t *header; /* names and types are lent from it */
    const uint8_t *data;
    size_t bytes, n;
    choir_safetensor *tensors; /* by name */
};

static int by_name(const void *a, const void *b)
{
    return strcmp(((const choir_safetensor *)a)->name, ((const choir_safetensor *)b)->name);
}

static int by_place(const void *a, const void *b)
{
    const choir_safetensor *x = *(choir_safetensor *const *)a, *y = *(choir_safetensor *const *)b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static size_t element_bytes(const char *type)
{
    static const struct {
        const char *name;
        size_t bytes;
    } types[] = {{"F64", 8}, {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4},     {"U32", 4},
                 {"F16", 2}, {"BF16", 2}, {"I16", 2}, {"U16", 2}, {"I8", 1},      {"U8", 1},
                 {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].name, type) == 0) return types[i].bytes;
    return 0;
}

static void set_dtype(choir_safetensor *t)
{
    t->readable = true;
    if (strcmp(t->type, "F32") == 0)
        t->dtype = CHOIR_F32;
    else if (strcmp(t->type, "F16") == 0)
        t->dtype = CHOIR_F16;
    else if (strcmp(t->type, "BF16") == 0)
        t->dtype = CHOIR_BF16;
    else
        t->readable = false;
}

static choir_status read_unsigned(const char *file, const char *name, const char *field,
                                  const json_t *value, uint64_t *out)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return choir_fail(CHOIR_E_FORMAT, "%s: tensor '%.200s': %s is not a whole number", file, name,
                          field);
    *out = (uint64_t)json_integer_value(value);
    return CHOIR_OK;
}

static choir_status read_tensor(const char *file, const char *name, const json_t *info,
                                const uint8_t *data, size_t bytes, choir_safetensor *t)
{
    const json_t *type = json_object_get(info, "dtype"), *shape = json_object_get(info, "shape");
    const json_t *offsets = json_object_get(info, "data_offsets");
    if (!json_is_string(type) || !json_is_array(shape) || json_array_size(offsets) != 2)
        return choir_fail(CHOIR_E_FORMAT, "%s: tensor '%.200s' lacks dtype, shape or data_offsets",
                          file, name);
    t->name = name;
    t->type = json_string_value(type);
    size_t element = element_bytes(t->type);
    if (element == 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: tensor '%.200s' has dtype %.20s", file, name,
                          t->type);
    if (json_array_size(shape) > 8)
        return choir_fail(CHOIR_E_FORMAT, "%s: tensor '%.200s' has %zu dimensions, the limit is 8",
                          file, name, json_array_size(shape));
    t->n_dims = (uint32_t)json_array_size(shape);
    uint64_t n = element, begin, end;
    for (uint32_t d = 0; d < t->n_dims; d++) {
        CHOIR_TRY(read_unsigned(file, name, "shape", json_array_get(shape, d), &t->dims[d]));
        if (__builtin_mul_overflow(n, t->dims[d], &n))
            return choir_fail(CHOIR_E_FORMAT, "%s: tensor '%.200s': its shape overflows", file, name);
    }
    CHOIR_TRY(read_unsigned(file, name, "data_offsets", json_array_get(offsets, 0), &begin));
    CHOIR_TRY(read_unsigned(file, name, "data_offsets", json_array_get(offsets, 1), &end));
    if (begin > end || end > bytes)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: tensor '%.200s' lies at %" PRIu64 " to %" PRIu64
                          ", the file has %zu bytes of data (is it truncated?)",
                          file, name, begin, end, bytes);
    if (end - begin != n)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: tensor '%.200s' has %" PRIu64 " bytes, its shape takes %" PRIu64,
                          file, name, end - begin, n);
    t->data = (const void *)((uintptr_t)data + begin); /* may lie beyond what is in memory */
    t->bytes = (size_t)n;
    set_dtype(t);
    return CHOIR_OK;
}

static choir_status check_overlaps(const char *file, const choir_safetensors *s)
{
    choir_safetensor **order = choir_alloc(CHOIR_MEM_OTHER, s->n * sizeof *order + 1);
    if (order == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", file);
    for (size_t i = 0; i < s->n; i++) order[i] = &s->tensors[i];
    qsort(order, s->n, sizeof *order, by_place);
    choir_status status = CHOIR_OK;
    for (size_t i = 1; i < s->n && status == CHOIR_OK; i++)
        if ((const char *)order[i - 1]->data + order[i - 1]->bytes > (const char *)order[i]->data)
            status = choir_fail(CHOIR_E_FORMAT, "%s: tensors '%.200s' and '%.200s' overlap", file,
                                order[i - 1]->name, order[i]->name);
    choir_free(order);
    return status;
}

/* `bytes` are in memory, of a file of `file_bytes`. */
static choir_status parse(const char *name, const uint8_t *data, size_t bytes, uint64_t file_bytes,
                          choir_safetensors *s)
{
    uint64_t header_bytes;
    if (bytes < 8) return choir_fail(CHOIR_E_FORMAT, "%s has %zu bytes, a header takes 8", name, bytes);
    memcpy(&header_bytes, data, 8);
    if (header_bytes > MAX_HEADER_BYTES || header_bytes > bytes - 8)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: header of %" PRIu64 " bytes, the limit is %d and the file has %zu",
                          name, header_bytes, MAX_HEADER_BYTES, bytes);
    json_error_t error;
    s->header = json_loadb((const char *)data + 8, (size_t)header_bytes, JSON_REJECT_DUPLICATES,
                           &error);
    if (!json_is_object(s->header))
        return choir_fail(CHOIR_E_FORMAT, "%s: bad JSON header: %s (byte %d)", name,
                          s->header == NULL ? error.text : "not an object", error.position);
    s->bytes = bytes;
    s->data = data;
    s->tensors = choir_calloc(CHOIR_MEM_OTHER, json_object_size(s->header) + 1, sizeof *s->tensors);
    if (s->tensors == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", name);
    const char *key;
    json_t *info;
    const uint8_t *start = data + 8 + header_bytes;
    json_object_foreach (s->header, key, info) {
        if (strcmp(key, "__metadata__") == 0) continue;
        CHOIR_TRY(read_tensor(name, key, info, start, (size_t)(file_bytes - 8 - header_bytes),
                              &s->tensors[s->n]));
        s->n++;
    }
    qsort(s->tensors, s->n, sizeof *s->tensors, by_name);
    return check_overlaps(name, s);
}

static choir_status parse_new(const char *name, const void *data, size_t bytes, uint64_t file_bytes,
                              choir_safetensors **out)
{
    choir_safetensors *s = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *s);
    if (s == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", name);
    s->path = choir_strdup(CHOIR_MEM_OTHER, name);
    choir_status status = s->path != NULL ? parse(name, data, bytes, file_bytes, s)
                                          : choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", name);
    if (status != CHOIR_OK) {
        choir_safetensors_close(s);
        return status;
    }
    *out = s;
    return CHOIR_OK;
}

choir_status choir_safetensors_parse(const char *name, const void *data, size_t bytes,
                                     choir_safetensors **out)
{
    return parse_new(name, data, bytes, bytes, out);
}

choir_status choir_safetensors_parse_header(const char *name, const void *data, size_t bytes,
                                            uint64_t file_bytes, choir_safetensors **out)
{
    if (file_bytes < bytes)
        return choir_fail(CHOIR_E_INVALID, "%s has %llu bytes, of which %zu were given", name,
                          (unsigned long long)file_bytes, bytes);
    CHOIR_TRY(parse_new(name, data, bytes, file_bytes, out));
    for (size_t i = 0; i < (*out)->n; i++) (*out)->tensors[i].data = NULL;
    return CHOIR_OK;
}

choir_status choir_safetensors_open(const char *path, choir_safetensors **out)
{
    choir_map map;
    CHOIR_TRY(choir_map_open(path, &map));
    choir_status status = choir_safetensors_parse(path, map.data, map.bytes, out);
    if (status != CHOIR_OK)
        choir_map_close(&map);
    else
        (*out)->map = map;
    return status;
}

void choir_safetensors_close(choir_safetensors *s)
{
    if (s == NULL) return;
    json_decref(s->header);
    choir_free(s->path);
    choir_free(s->tensors);
    choir_map_close(&s->map);
    choir_free(s);
}

const choir_safetensor *choir_safetensors_find(const choir_safetensors *s, const char *name)
{
    const choir_safetensor key = {.name = name};
    return bsearch(&key, s->tensors, s->n, sizeof key, by_name);
}

size_t choir_safetensors_count(const choir_safetensors *s) { return s->n; }
size_t choir_safetensors_bytes(const choir_safetensors *s) { return s->bytes; }
const void *choir_safetensors_data(const choir_safetensors *s) { return s->data; }
const char *choir_safetensors_path(const choir_safetensors *s) { return s->path; }

const choir_safetensor *choir_safetensors_at(const choir_safetensors *s, size_t i)
{
    return &s->tensors[i];
}
