#include "engine/gguf.h"

#include "base/base.h"

#include <inttypes.h>
#include <string.h>
#include <xxhash.h>

/* The kinds of metadata values, numbered as in the file. */
enum kind { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64, N_KINDS };
static const uint8_t kind_bytes[N_KINDS] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

enum { MAX_KEY_BYTES = 65535, MAX_ALIGNMENT = 1 << 20, MAX_NAME_BYTES = 1024 };

struct choir_gguf_array {
    uint32_t kind;
    uint64_t count;
    const uint8_t *data;     /* of numbers */
    const uint8_t **strings; /* of strings: where each begins (its length field) */
};

typedef struct entry {
    choir_text key;
    uint32_t kind;
    const uint8_t *value; /* scalars, and a string's length field */
    choir_text raw;       /* the whole entry */
    choir_gguf_array array;
} entry;

struct choir_gguf {
    choir_map map; /* NULL data when parsed from memory */
    const char *name;
    char *own_name;
    const uint8_t *data;
    size_t bytes, at;
    uint64_t n_entries, n_tensors, alignment;
    bool header_only; /* the tensors' bytes lie elsewhere */
    entry *entries;
    choir_gguf_tensor *tensors;
    uint32_t *entry_slots, *tensor_slots; /* open addressing: index + 1, or 0 */
    uint64_t entry_mask, tensor_mask;
};

static choir_status cut(const choir_gguf *g, const char *what)
{
    return choir_fail(CHOIR_E_FORMAT, "%s: the file ends inside %s at byte %zu of %zu", g->name, what,
                      g->at, g->bytes);
}

static choir_status take(choir_gguf *g, size_t n, const char *what, const uint8_t **out)
{
    if (n > g->bytes - g->at) return cut(g, what);
    *out = g->data + g->at;
    g->at += n;
    return CHOIR_OK;
}

static choir_status take_u32(choir_gguf *g, const char *what, uint32_t *out)
{
    const uint8_t *p = NULL;
    CHOIR_TRY(take(g, 4, what, &p));
    memcpy(out, p, 4);
    return CHOIR_OK;
}

static choir_status take_u64(choir_gguf *g, const char *what, uint64_t *out)
{
    const uint8_t *p = NULL;
    CHOIR_TRY(take(g, 8, what, &p));
    memcpy(out, p, 8);
    return CHOIR_OK;
}

static choir_status take_text(choir_gguf *g, const char *what, uint64_t most, choir_text *out)
{
    uint64_t n;
    size_t at = g->at;
    CHOIR_TRY(take_u64(g, what, &n));
    if (n > most)
        return choir_fail(CHOIR_E_FORMAT, "%s: %s at byte %zu has length %" PRIu64
                          ", the limit is %" PRIu64, g->name, what, at, n, most);
    const uint8_t *p = NULL;
    CHOIR_TRY(take(g, (size_t)n, what, &p));
    *out = (choir_text){(const char *)p, (size_t)n};
    return CHOIR_OK;
}

static choir_status fail_field(const choir_gguf *g, choir_text key, const char *what, uint64_t value,
                               size_t at)
{
    return choir_fail(CHOIR_E_FORMAT, "%s: '%.*s' at byte %zu %s %" PRIu64, g->name,
                      (int)(key.bytes < 200 ? key.bytes : 200), key.data, at, what, value);
}

static choir_status read_array(choir_gguf *g, entry *e)
{
    choir_gguf_array *a = &e->array;
    size_t at = g->at;
    CHOIR_TRY(take_u32(g, "an array's type", &a->kind));
    CHOIR_TRY(take_u64(g, "an array's count", &a->count));
    if (a->kind >= N_KINDS || a->kind == ARRAY)
        return fail_field(g, e->key, "is an array of unsupported type", a->kind, at);
    /* A string takes at least its 8-byte length, so the file bounds the count before we allocate. */
    uint64_t least = a->kind == STRING ? 8 : kind_bytes[a->kind];
    if (a->count > (g->bytes - g->at) / least)
        return fail_field(g, e->key, "is an array beyond the file's end with count", a->count, at);
    if (a->kind != STRING)
        return take(g, (size_t)(a->count * least), "an array", &a->data);
    a->strings = choir_alloc(CHOIR_MEM_OTHER, (size_t)a->count * sizeof *a->strings + 1);
    if (a->strings == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for %" PRIu64 " strings", g->name,
                          a->count);
    for (uint64_t i = 0; i < a->count; i++) {
        choir_text text;
        a->strings[i] = g->data + g->at;
        CHOIR_TRY(take_text(g, "an array of strings", UINT64_MAX, &text));
    }
    return CHOIR_OK;
}

static uint64_t hash_of(const char *data, size_t bytes) { return XXH3_64bits(data, bytes); }

static bool same_text(choir_text a, const char *data, size_t bytes)
{
    return a.bytes == bytes && memcmp(a.data, data, bytes) == 0;
}

static uint32_t *find_slot(uint32_t *slots, uint64_t mask, const char *data, size_t bytes,
                           const char *base, size_t stride)
{
    uint64_t i = hash_of(data, bytes) & mask;
    for (;; i = (i + 1) & mask) {
        if (slots[i] == 0) return &slots[i];
        const choir_text *key = (const choir_text *)(base + (size_t)(slots[i] - 1) * stride);
        if (same_text(*key, data, bytes)) return &slots[i];
    }
}

static choir_status make_slots(uint64_t n, uint32_t **slots, uint64_t *mask)
{
    uint64_t size = 16;
    while (size < n * 2) size *= 2;
    *slots = choir_calloc(CHOIR_MEM_OTHER, (size_t)size, sizeof **slots);
    if (*slots == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %" PRIu64 " names", n);
    *mask = size - 1;
    return CHOIR_OK;
}

static choir_status read_entry(choir_gguf *g, uint64_t i)
{
    entry *e = &g->entries[i];
    size_t at = g->at;
    CHOIR_TRY(take_text(g, "a metadata key", MAX_KEY_BYTES, &e->key));
    uint32_t *slot = find_slot(g->entry_slots, g->entry_mask, e->key.data, e->key.bytes,
                               (const char *)g->entries, sizeof *e);
    if (*slot != 0) return fail_field(g, e->key, "is a duplicate key, number", i, at);
    *slot = (uint32_t)i + 1;
    at = g->at;
    CHOIR_TRY(take_u32(g, "a metadata type", &e->kind));
    if (e->kind >= N_KINDS) return fail_field(g, e->key, "has unknown type", e->kind, at);
    if (e->kind == ARRAY) return read_array(g, e);
    e->value = g->data + g->at;
    choir_text text;
    if (e->kind == STRING) return take_text(g, "a metadata string", UINT64_MAX, &text);
    return take(g, kind_bytes[e->kind], "a metadata value", &e->value);
}

/* ggml's types that Choir lacks, by what people call them. */
static choir_status fail_type(const choir_gguf *g, choir_text name, uint32_t type)
{
    static const struct {
        uint32_t id;
        const char *text;
    } lacking[] = {{9, "Q8_1"},     {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"},
                   {19, "IQ1_S"},   {21, "IQ3_S"}, {22, "IQ2_S"},   {24, "I8"},     {25, "I16"},
                   {26, "I32"},     {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},  {34, "TQ1_0"},
                   {35, "TQ2_0"},   {40, "NVFP4"}};
    char known[160];
    size_t n = 0;
    const char *text = "unknown";
    for (uint32_t d = 0; d < CHOIR_N_DTYPES && n < sizeof known; d++)
        if (choir_dtype_in_gguf((choir_dtype)d))
            n += (size_t)snprintf(known + n, sizeof known - n, "%s%s", d > 0 ? ", " : "",
                                  choir_dtype_text((choir_dtype)d));
    for (size_t i = 0; i < sizeof lacking / sizeof *lacking; i++)
        if (lacking[i].id == type) text = lacking[i].text;
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "%s: tensor '%.*s' has type %u (%s), which Choir does not read; it reads %s", g->name,
                      (int)name.bytes, name.data, type, text, known);
}

static choir_status read_tensor_info(choir_gguf *g, uint64_t i)
{
    choir_gguf_tensor *t = &g->tensors[i];
    size_t at = g->at;
    uint32_t type;
    uint64_t n = 1, offset;
    CHOIR_TRY(take_text(g, "a tensor's name", MAX_NAME_BYTES, &t->name));
    uint32_t *slot = find_slot(g->tensor_slots, g->tensor_mask, t->name.data, t->name.bytes,
                               (const char *)g->tensors, sizeof *t);
    if (*slot != 0) return fail_field(g, t->name, "is a duplicate tensor, number", i, at);
    *slot = (uint32_t)i + 1;
    at = g->at;
    CHOIR_TRY(take_u32(g, "a tensor's dimensions", &t->n_dims));
    if (t->n_dims < 1 || t->n_dims > 4)
        return fail_field(g, t->name, "must have 1 to 4 dimensions and has", t->n_dims, at);
    for (uint32_t d = 0; d < t->n_dims; d++) {
        at = g->at;
        CHOIR_TRY(take_u64(g, "a tensor's dimensions", &t->dims[d]));
        if (t->dims[d] == 0 || __builtin_mul_overflow(n, t->dims[d], &n) || n > UINT64_MAX / 8)
            return fail_field(g, t->name, "has an absurd dimension:", t->dims[d], at);
    }
    for (uint32_t d = t->n_dims; d < 4; d++) t->dims[d] = 1;
    at = g->at;
    CHOIR_TRY(take_u32(g, "a tensor's type", &type));
    if (!choir_dtype_from_gguf(type, &t->dtype))
        return fail_type(g, t->name, type);
    if (t->dims[0] % choir_dtype_block_elements(t->dtype) != 0)
        return fail_field(g, t->name, "has rows that are no whole number of blocks:", t->dims[0], at);
    t->bytes = choir_dtype_row_bytes(t->dtype, n);
    at = g->at;
    CHOIR_TRY(take_u64(g, "a tensor's offset", &offset));
    if (offset % g->alignment != 0)
        return fail_field(g, t->name, "has a misaligned offset:", offset, at);
    t->data = (const void *)(uintptr_t)offset; /* made an address once the data's start is known */
    return CHOIR_OK;
}

static choir_status place_tensors(choir_gguf *g)
{
    uint64_t start = (g->at + g->alignment - 1) / g->alignment * g->alignment;
    for (uint64_t i = 0; i < g->n_tensors; i++) {
        choir_gguf_tensor *t = &g->tensors[i];
        uint64_t offset = (uint64_t)(uintptr_t)t->data, begin, end;
        t->data = NULL;
        if (g->header_only) continue;
        if (__builtin_add_overflow(start, offset, &begin) ||
            __builtin_add_overflow(begin, t->bytes, &end) || end > g->bytes)
            return choir_fail(CHOIR_E_FORMAT,
                              "%s: tensor '%.*s' lies at offset %" PRIu64 " with %zu bytes, the "
                              "file has %zu (is it truncated?)",
                              g->name, (int)t->name.bytes, t->name.data, offset, t->bytes,
                              g->bytes);
        t->data = g->data + begin;
    }
    return CHOIR_OK;
}

static choir_status read_all(choir_gguf *g)
{
    uint32_t magic, version;
    CHOIR_TRY(take_u32(g, "the header", &magic));
    if (magic != 0x46554747) return choir_fail(CHOIR_E_FORMAT, "%s is not a GGUF file", g->name);
    CHOIR_TRY(take_u32(g, "the header", &version));
    if (version != 3)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: GGUF version %u at byte 4, Choir reads 3",
                          g->name, version);
    CHOIR_TRY(take_u64(g, "the header", &g->n_tensors));
    CHOIR_TRY(take_u64(g, "the header", &g->n_entries));
    /* The least that a tensor (8+4+8+4+8) and an entry (8+4+1) take bounds both counts. */
    if (g->n_tensors > g->bytes / 32 || g->n_tensors > UINT32_MAX / 4)
        return choir_fail(CHOIR_E_FORMAT, "%s: tensor count at byte 8 is %" PRIu64, g->name,
                          g->n_tensors);
    if (g->n_entries > g->bytes / 13 || g->n_entries > UINT32_MAX / 4)
        return choir_fail(CHOIR_E_FORMAT, "%s: metadata count at byte 16 is %" PRIu64, g->name,
                          g->n_entries);
    g->entries = choir_calloc(CHOIR_MEM_OTHER, (size_t)g->n_entries + 1, sizeof *g->entries);
    g->tensors = choir_calloc(CHOIR_MEM_OTHER, (size_t)g->n_tensors + 1, sizeof *g->tensors);
    if (g->entries == NULL || g->tensors == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for its tables", g->name);
    CHOIR_TRY(make_slots(g->n_entries, &g->entry_slots, &g->entry_mask));
    CHOIR_TRY(make_slots(g->n_tensors, &g->tensor_slots, &g->tensor_mask));
    for (uint64_t i = 0; i < g->n_entries; i++) {
        size_t at = g->at;
        CHOIR_TRY(read_entry(g, i));
        g->entries[i].raw = (choir_text){(const char *)g->data + at, g->at - at};
    }
    int64_t alignment = 32;
    choir_gguf_integer(g, "general.alignment", &alignment);
    if (alignment < 1 || alignment > MAX_ALIGNMENT || (alignment & (alignment - 1)) != 0)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: general.alignment is %" PRId64 ", must be a power of two up to %d",
                          g->name, alignment, MAX_ALIGNMENT);
    g->alignment = (uint64_t)alignment;
    for (uint64_t i = 0; i < g->n_tensors; i++) CHOIR_TRY(read_tensor_info(g, i));
    return place_tensors(g);
}

static choir_status parse(const char *name, const void *data, size_t bytes, bool header_only,
                          choir_gguf **out)
{
    choir_gguf *g = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *g);
    if (g == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", name);
    g->own_name = choir_strdup(CHOIR_MEM_OTHER, name);
    g->name = g->own_name;
    g->data = data;
    g->bytes = bytes;
    g->header_only = header_only;
    choir_status status = g->own_name == NULL ? choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", name)
                                              : read_all(g);
    if (status != CHOIR_OK) {
        choir_gguf_close(g);
        return status;
    }
    *out = g;
    return CHOIR_OK;
}

choir_status choir_gguf_parse(const char *name, const void *data, size_t bytes, choir_gguf **out)
{
    return parse(name, data, bytes, false, out);
}

choir_status choir_gguf_parse_header(const char *name, const void *data, size_t bytes,
                                     choir_gguf **out)
{
    return parse(name, data, bytes, true, out);
}

choir_status choir_gguf_open(const char *path, choir_gguf **out)
{
    choir_map map;
    CHOIR_TRY(choir_map_open(path, &map));
    choir_status status = choir_gguf_parse(path, map.data, map.bytes, out);
    if (status != CHOIR_OK) {
        choir_map_close(&map);
        return status;
    }
    (*out)->map = map;
    return CHOIR_OK;
}

void choir_gguf_close(choir_gguf *g)
{
    if (g == NULL) return;
    for (uint64_t i = 0; g->entries != NULL && i < g->n_entries; i++)
        choir_free(g->entries[i].array.strings);
    choir_free(g->entries);
    choir_free(g->tensors);
    choir_free(g->entry_slots);
    choir_free(g->tensor_slots);
    choir_free(g->own_name);
    choir_map_close(&g->map);
    choir_free(g);
}

static const entry *find_entry(const choir_gguf *g, const char *key)
{
    uint32_t *slot = find_slot(g->entry_slots, g->entry_mask, key, strlen(key),
                               (const char *)g->entries, sizeof *g->entries);
    return *slot == 0 ? NULL : &g->entries[*slot - 1];
}

static bool integer_at(uint32_t kind, const uint8_t *p, int64_t *out)
{
#define CASE(name, type)                                                                           \
    case name: {                                                                                   \
        type v;                                                                                    \
        memcpy(&v, p, sizeof v);                                                                   \
        *out = (int64_t)v;                                                                         \
        return true;                                                                               \
    }
    switch (kind) {
        CASE(U8, uint8_t)
        CASE(I8, int8_t)
        CASE(U16, uint16_t)
        CASE(I16, int16_t)
        CASE(U32, uint32_t)
        CASE(I32, int32_t)
        CASE(BOOL, uint8_t)
        CASE(U64, uint64_t)
        CASE(I64, int64_t)
    default: return false;
    }
#undef CASE
}

static bool real_at(uint32_t kind, const uint8_t *p, double *out)
{
    if (kind == F32) {
        float v;
        memcpy(&v, p, sizeof v);
        *out = (double)v;
        return true;
    }
    if (kind != F64) return false;
    memcpy(out, p, sizeof *out);
    return true;
}

static choir_text text_at(const uint8_t *p)
{
    uint64_t n;
    memcpy(&n, p, 8);
    return (choir_text){(const char *)p + 8, (size_t)n};
}

bool choir_gguf_integer(const choir_gguf *g, const char *key, int64_t *out)
{
    const entry *e = find_entry(g, key);
    return e != NULL && integer_at(e->kind, e->value, out);
}

bool choir_gguf_real(const choir_gguf *g, const char *key, double *out)
{
    const entry *e = find_entry(g, key);
    return e != NULL && real_at(e->kind, e->value, out);
}

bool choir_gguf_string(const choir_gguf *g, const char *key, choir_text *out)
{
    const entry *e = find_entry(g, key);
    if (e == NULL || e->kind != STRING) return false;
    *out = text_at(e->value);
    return true;
}

const choir_gguf_array *choir_gguf_find_array(const choir_gguf *g, const char *key)
{
    const entry *e = find_entry(g, key);
    return e == NULL || e->kind != ARRAY ? NULL : &e->array;
}

uint64_t choir_gguf_n_entries(const choir_gguf *g) { return g->n_entries; }

void choir_gguf_entry_at(const choir_gguf *g, uint64_t i, choir_text *key, choir_text *raw)
{
    CHOIR_ASSERT(i < g->n_entries);
    *key = g->entries[i].key;
    *raw = g->entries[i].raw;
}

uint64_t choir_gguf_array_count(const choir_gguf_array *array) { return array->count; }

bool choir_gguf_array_string(const choir_gguf_array *array, uint64_t i, choir_text *out)
{
    if (array->kind != STRING || i >= array->count) return false;
    *out = text_at(array->strings[i]);
    return true;
}

bool choir_gguf_array_integer(const choir_gguf_array *array, uint64_t i, int64_t *out)
{
    if (array->kind == STRING || i >= array->count) return false;
    return integer_at(array->kind, array->data + i * kind_bytes[array->kind], out);
}

bool choir_gguf_array_real(const choir_gguf_array *array, uint64_t i, double *out)
{
    if (array->kind == STRING || i >= array->count) return false;
    return real_at(array->kind, array->data + i * kind_bytes[array->kind], out);
}

uint64_t choir_gguf_n_tensors(const choir_gguf *g) { return g->n_tensors; }

const choir_gguf_tensor *choir_gguf_tensor_at(const choir_gguf *g, uint64_t i)
{
    return &g->tensors[i];
}

const choir_gguf_tensor *choir_gguf_find_tensor(const choir_gguf *g, const char *name)
{
    uint32_t *slot = find_slot(g->tensor_slots, g->tensor_mask, name, strlen(name),
                               (const char *)g->tensors, sizeof *g->tensors);
    return *slot == 0 ? NULL : &g->tensors[*slot - 1];
}

const void *choir_gguf_data(const choir_gguf *g, size_t *bytes)
{
    *bytes = g->bytes;
    return g->data;
}

const char *choir_gguf_path(const choir_gguf *g)
{
    return g->name;
}
