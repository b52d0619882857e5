/* The values of a template: pool, strings, lists, dicts, and what Python's operators ask. */
#include "engine/chat_template_render.h"
#include <math.h>

#define BLOCK_BYTES ((size_t)32 << 10)

/* ---- Pool ---- */

choir_status template_pool_open(template_pool *pool, size_t limit)
{
    *pool = (template_pool){.limit = limit};
    return choir_arena_create(CHOIR_MEM_REQUESTS, 4 * BLOCK_BYTES, &pool->arena);
}

void template_pool_close(template_pool *pool)
{
    choir_arena_destroy(pool->arena);
    *pool = (template_pool){0};
}

choir_status template_pool_alloc(template_pool *pool, size_t bytes, void *out)
{
    if (bytes > pool->limit - pool->used) {
        if (pool->line == NULL)
            return choir_fail(CHOIR_E_FULL, "the chat template's tree needs more than %zu MiB",
                              pool->limit >> 20);
        return choir_fail(CHOIR_E_FULL,
                          "line %u: the chat template's values need more than %zu MiB", *pool->line,
                          pool->limit >> 20);
    }
    size_t want = bytes == 0 ? 16 : (bytes + 15) & ~(size_t)15;
    if (want > pool->left) {
        size_t block = want > BLOCK_BYTES / 4 ? want : BLOCK_BYTES;
        char *p = choir_arena_alloc(pool->arena, block);
        if (p == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu bytes of a chat template",
                              bytes);
        if (block == want) { /* a big one has a block of its own; the open block stays open */
            pool->used += pool->limit - pool->used < want ? bytes : want;
            *(void **)out = p;
            return CHOIR_OK;
        }
        pool->next = p;
        pool->left = block;
    }
    *(void **)out = pool->next;
    pool->next += want;
    pool->left -= want;
    pool->used += pool->limit - pool->used < want ? bytes : want;
    return CHOIR_OK;
}

choir_status template_alloc(template_render *r, size_t bytes, void *out)
{
    return template_pool_alloc(&r->pool, bytes, out);
}

choir_status template_alloc_n(template_render *r, size_t n, size_t bytes, void *out)
{
    size_t total;
    if (__builtin_mul_overflow(n, bytes, &total)) total = SIZE_MAX;
    return template_pool_alloc(&r->pool, total, out);
}

/* ---- Strings ---- */

choir_status template_string_make(template_pool *pool, const char *data, size_t bytes, bool copy,
                                  template_string **out)
{
    template_string *s;
    CHOIR_TRY(template_pool_alloc(pool, sizeof *s, &s));
    if (copy && bytes > 0) {
        char *own;
        CHOIR_TRY(template_pool_alloc(pool, bytes, &own));
        memcpy(own, data, bytes);
        data = own;
    }
    *s = (template_string){.data = bytes > 0 ? data : "", .bytes = bytes, .chars = SIZE_MAX};
    *out = s;
    return CHOIR_OK;
}

choir_status template_string_value(template_render *r, const char *data, size_t bytes,
                                   template_value *out)
{
    template_string *s;
    CHOIR_TRY(template_string_make(&r->pool, data, bytes, false, &s));
    *out = TEMPLATE_VALUE(STRING, s, s);
    return CHOIR_OK;
}

/* Appends in place when `a` ends where its buffer's used part ends. */
choir_status template_string_concat(template_render *r, const template_string *a,
                                    const template_string *b, template_value *out)
{
    size_t total = a->bytes + b->bytes;
    template_string *s;
    CHOIR_TRY(template_charge_bytes(r, b->bytes));
    CHOIR_TRY(template_alloc(r, sizeof *s, &s));
    *s = (template_string){.data = a->data, .bytes = total, .chars = SIZE_MAX, .tail = a->tail};
    if (s->tail == NULL || s->tail->used != a->bytes || s->tail->capacity < total) {
        size_t capacity = a->tail != NULL ? 2 * total : total;
        if (capacity > r->pool.limit - r->pool.used) capacity = total;
        char *data;
        CHOIR_TRY(template_charge_bytes(r, a->bytes));
        CHOIR_TRY(template_alloc(r, sizeof *s->tail, &s->tail));
        CHOIR_TRY(template_alloc(r, capacity, &data));
        memcpy(data, a->data, a->bytes);
        s->data = data;
        s->tail->capacity = capacity;
    }
    memcpy((char *)s->data + a->bytes, b->data, b->bytes);
    s->tail->used = total;
    *out = TEMPLATE_VALUE(STRING, s, s);
    return CHOIR_OK;
}

size_t template_string_chars(template_string *s)
{
    if (s->chars != SIZE_MAX) return s->chars;
    size_t n = 0;
    for (size_t i = 0; i < s->bytes; i++) n += ((unsigned char)s->data[i] & 0xc0) != 0x80;
    return s->chars = n;
}

choir_status template_string_offset(template_render *r, template_string *s, size_t at, size_t *out)
{
    size_t chars = template_string_chars(s);
    if (chars == s->bytes) {
        *out = at;
        return CHOIR_OK;
    }
    size_t i = 0;
    if (at > chars / 2) { /* from the end */
        i = s->bytes;
        for (size_t left = chars - at; left > 0; left--)
            while (((unsigned char)s->data[--i] & 0xc0) == 0x80) continue;
        *out = i;
        return template_charge_bytes(r, s->bytes - i);
    }
    for (size_t left = at; left > 0; left--) do
            i++;
        while (i < s->bytes && ((unsigned char)s->data[i] & 0xc0) == 0x80);
    *out = i;
    return template_charge_bytes(r, i);
}

bool template_string_is(const template_string *s, const char *text)
{
    size_t n = strlen(text);
    return s->bytes == n && memcmp(s->data, text, n) == 0;
}

/* ---- Lists ---- */

choir_status template_list_make(template_render *r, size_t capacity, template_list **out)
{
    template_list *list;
    CHOIR_TRY(template_alloc(r, sizeof *list, &list));
    *list = (template_list){.capacity = capacity};
    if (capacity > 0) CHOIR_TRY(template_alloc_n(r, capacity, sizeof *list->items, &list->items));
    *out = list;
    return CHOIR_OK;
}

choir_status template_list_push(template_render *r, template_list *list, template_value v)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity == 0 ? 4 : 2 * list->capacity;
        template_value *items;
        CHOIR_TRY(template_alloc_n(r, capacity, sizeof *items, &items));
        if (list->n > 0) memcpy(items, list->items, list->n * sizeof *items);
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->n++] = v;
    return CHOIR_OK;
}

/* ---- Dicts ---- */

static uint64_t hash_bytes(const char *data, size_t bytes)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++) h = (h ^ (unsigned char)data[i]) * 0x100000001b3u;
    return h ^ h >> 29;
}

static uint64_t hash_number(double f)
{
    uint64_t bits;
    if (f == 0) f = 0; /* -0.0 is 0 */
    memcpy(&bits, &f, sizeof bits);
    return (bits ^ bits >> 31) * 0x9e3779b97f4a7c15u;
}

static choir_status deeper(template_render *r)
{
    if (++r->value_depth > TEMPLATE_MAX_VALUE_DEPTH)
        return template_error(r, "a value is nested deeper than %d", TEMPLATE_MAX_VALUE_DEPTH);
    return CHOIR_OK;
}

static choir_status hash_value(template_render *r, template_value v, uint64_t *out)
{
    switch (v.type) {
    case TEMPLATE_STRING:
        *out = hash_bytes(v.s->data, v.s->bytes);
        return template_charge_bytes(r, v.s->bytes);
    case TEMPLATE_BOOL:
        *out = hash_number(v.b);
        return CHOIR_OK;
    case TEMPLATE_INT:
        *out = hash_number((double)v.i);
        return CHOIR_OK;
    case TEMPLATE_FLOAT:
        *out = hash_number(v.f);
        return CHOIR_OK;
    case TEMPLATE_TUPLE: {
        uint64_t h = 0x345678;
        CHOIR_TRY(deeper(r));
        for (size_t i = 0; i < v.list->n; i++) {
            uint64_t item = 0;
            CHOIR_TRY(hash_value(r, v.list->items[i], &item));
            h = (h ^ item) * 0x9e3779b97f4a7c15u;
        }
        r->value_depth--;
        *out = h;
        return template_charge(r, v.list->n);
    }
    case TEMPLATE_LIST:
    case TEMPLATE_DICT:
    case TEMPLATE_VIEW:
        return template_error(r, "unhashable type: '%s'", template_type_name(v));
    case TEMPLATE_NONE:
    case TEMPLATE_UNDEFINED:
        *out = v.type;
        return CHOIR_OK;
    default:
        *out = (uint64_t)(uintptr_t)v.s * 0x9e3779b97f4a7c15u;
        return CHOIR_OK;
    }
}

choir_status template_dict_make(template_render *r, template_dict **out)
{
    template_dict *d;
    CHOIR_TRY(template_alloc(r, sizeof *d, &d));
    *d = (template_dict){0};
    *out = d;
    return CHOIR_OK;
}

/* *at is the entry's number, or d->n where it is absent. */
static choir_status find_entry(template_render *r, const template_dict *d, template_value key,
                               uint64_t hash, size_t *at)
{
    bool same = false;
    if (d->index == NULL) {
        for (*at = 0; *at < d->n; ++*at) {
            if (d->entries[*at].hash != hash) continue;
            CHOIR_TRY(template_equal(r, d->entries[*at].key, key, &same));
            if (same) return CHOIR_OK;
        }
        return CHOIR_OK;
    }
    for (size_t slot = hash & (d->index_size - 1);; slot = (slot + 1) & (d->index_size - 1)) {
        uint32_t entry = d->index[slot];
        if (entry == 0) break;
        CHOIR_TRY(template_charge(r, 1));
        *at = entry - 1;
        if (d->entries[*at].hash != hash) continue;
        CHOIR_TRY(template_equal(r, d->entries[*at].key, key, &same));
        if (same) return CHOIR_OK;
    }
    *at = d->n;
    return CHOIR_OK;
}

static void index_entry(template_dict *d, size_t at)
{
    size_t slot = d->entries[at].hash & (d->index_size - 1);
    while (d->index[slot] != 0) slot = (slot + 1) & (d->index_size - 1);
    d->index[slot] = (uint32_t)at + 1;
}

static choir_status grow_dict(template_render *r, template_dict *d)
{
    size_t capacity = d->capacity == 0 ? 8 : 2 * d->capacity;
    template_entry *entries;
    CHOIR_TRY(template_charge(r, d->n / 8));
    CHOIR_TRY(template_alloc_n(r, capacity, sizeof *entries, &entries));
    if (d->n > 0) memcpy(entries, d->entries, d->n * sizeof *entries);
    if (capacity > 8) {
        uint32_t *index;
        CHOIR_TRY(template_alloc_n(r, 2 * capacity, sizeof *index, &index));
        memset(index, 0, 2 * capacity * sizeof *index);
        d->index = index;
        d->index_size = 2 * capacity;
    }
    d->entries = entries;
    d->capacity = capacity;
    if (d->index != NULL)
        for (size_t i = 0; i < d->n; i++) index_entry(d, i);
    return CHOIR_OK;
}

choir_status template_dict_set(template_render *r, template_dict *d, template_value key,
                               template_value v)
{
    uint64_t hash = 0;
    size_t at = 0;
    CHOIR_TRY(hash_value(r, key, &hash));
    CHOIR_TRY(find_entry(r, d, key, hash, &at));
    if (at < d->n) {
        d->entries[at].value = v;
        return CHOIR_OK;
    }
    if (d->n == d->capacity) CHOIR_TRY(grow_dict(r, d));
    d->entries[d->n] = (template_entry){key, v, hash};
    if (d->index != NULL) index_entry(d, d->n);
    d->n++;
    return CHOIR_OK;
}

choir_status template_dict_set_text(template_render *r, template_dict *d, const char *key,
                                    template_value v)
{
    template_value k;
    CHOIR_TRY(template_string_value(r, key, strlen(key), &k));
    return template_dict_set(r, d, k, v);
}

choir_status template_dict_get(template_render *r, const template_dict *d, template_value key,
                               template_value **out)
{
    uint64_t hash = 0;
    size_t at = 0;
    CHOIR_TRY(hash_value(r, key, &hash));
    CHOIR_TRY(find_entry(r, d, key, hash, &at));
    *out = at < d->n ? &d->entries[at].value : NULL;
    return CHOIR_OK;
}

/* ---- Operators ---- */

const char *template_type_name(template_value v)
{
    static const char *const names[] = {
#define X(name, text) text,
        TEMPLATE_TYPES(X)
#undef X
    };
    static const char *const views[] = {"dict_keys", "dict_values", "dict_items"};
    return v.type == TEMPLATE_VIEW ? views[v.flag] : names[v.type];
}

bool template_is_number(template_value v)
{
    return v.type == TEMPLATE_BOOL || v.type == TEMPLATE_INT || v.type == TEMPLATE_FLOAT;
}

bool template_length(template_value v, size_t *out)
{
    switch (v.type) {
    case TEMPLATE_UNDEFINED:
        *out = 0;
        return true;
    case TEMPLATE_STRING:
        *out = template_string_chars(v.s);
        return true;
    case TEMPLATE_LIST:
    case TEMPLATE_TUPLE:
        *out = v.list->n;
        return true;
    case TEMPLATE_DICT:
    case TEMPLATE_VIEW:
        *out = v.dict->n;
        return true;
    case TEMPLATE_RANGE:
        *out = v.range->n;
        return true;
    default:
        return false;
    }
}

bool template_truth(template_value v)
{
    switch (v.type) {
    case TEMPLATE_MISSING:
    case TEMPLATE_UNDEFINED:
    case TEMPLATE_NONE:
        return false;
    case TEMPLATE_BOOL:
        return v.b;
    case TEMPLATE_INT:
        return v.i != 0;
    case TEMPLATE_FLOAT:
        return v.f != 0;
    case TEMPLATE_STRING:
        return v.s->bytes > 0;
    case TEMPLATE_LIST:
    case TEMPLATE_TUPLE:
        return v.list->n > 0;
    case TEMPLATE_DICT:
    case TEMPLATE_VIEW:
        return v.dict->n > 0;
    case TEMPLATE_RANGE:
        return v.range->n > 0;
    default:
        return true;
    }
}

/* long double holds every integer and every float. */
static long double wide(template_value v)
{
    if (v.type == TEMPLATE_FLOAT) return v.f;
    return v.type == TEMPLATE_BOOL ? (long double)v.b : (long double)v.i;
}

static int compare_numbers(template_value a, template_value b)
{
    if (a.type != TEMPLATE_FLOAT && b.type != TEMPLATE_FLOAT) {
        int64_t x = a.type == TEMPLATE_BOOL ? a.b : a.i, y = b.type == TEMPLATE_BOOL ? b.b : b.i;
        return x < y ? -1 : x > y;
    }
    long double x = wide(a), y = wide(b);
    return x < y ? -1 : x > y ? 1 : x == y ? 0 : 2;
}

static choir_status equal_dicts(template_render *r, const template_dict *a, const template_dict *b,
                                bool *out)
{
    if (a->n != b->n) return CHOIR_OK;
    for (size_t i = 0; i < a->n; i++) {
        size_t at = 0;
        bool same = false;
        CHOIR_TRY(find_entry(r, b, a->entries[i].key, a->entries[i].hash, &at));
        if (at == b->n) return CHOIR_OK;
        CHOIR_TRY(template_equal(r, a->entries[i].value, b->entries[at].value, &same));
        if (!same) return CHOIR_OK;
    }
    *out = true;
    return CHOIR_OK;
}

static choir_status equal_lists(template_render *r, const template_list *a, const template_list *b,
                                bool *out)
{
    if (a->n != b->n) return CHOIR_OK;
    for (size_t i = 0; i < a->n; i++) {
        bool same = false;
        CHOIR_TRY(template_equal(r, a->items[i], b->items[i], &same));
        if (!same) return CHOIR_OK;
    }
    *out = true;
    return CHOIR_OK;
}

choir_status template_equal(template_render *r, template_value a, template_value b, bool *out)
{
    *out = false;
    CHOIR_TRY(template_charge(r, 1));
    if (template_is_number(a) && template_is_number(b)) {
        *out = compare_numbers(a, b) == 0;
        return CHOIR_OK;
    }
    if (a.type != b.type) return CHOIR_OK;
    choir_status status = CHOIR_OK;
    switch (a.type) {
    case TEMPLATE_NONE:
    case TEMPLATE_UNDEFINED:
        *out = true;
        return CHOIR_OK;
    case TEMPLATE_STRING:
        *out = template_string_same(a.s, b.s);
        return *out ? template_charge_bytes(r, a.s->bytes) : CHOIR_OK;
    case TEMPLATE_LIST:
    case TEMPLATE_TUPLE:
        CHOIR_TRY(deeper(r));
        status = equal_lists(r, a.list, b.list, out);
        r->value_depth--;
        return status;
    case TEMPLATE_DICT:
        CHOIR_TRY(deeper(r));
        status = equal_dicts(r, a.dict, b.dict, out);
        r->value_depth--;
        return status;
    case TEMPLATE_RANGE:
        *out = a.range->n == b.range->n &&
               (a.range->n == 0 || (a.range->start == b.range->start &&
                                    (a.range->n == 1 || a.range->step == b.range->step)));
        return CHOIR_OK;
    default:
        *out = a.s == b.s && a.flag == b.flag;
        return CHOIR_OK;
    }
}

choir_status template_compare(template_render *r, template_value a, template_value b, int *order)
{
    *order = 0;
    CHOIR_TRY(template_charge(r, 1));
    if (template_is_number(a) && template_is_number(b)) {
        *order = compare_numbers(a, b);
        return CHOIR_OK;
    }
    if (a.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, a);
    if (b.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, b);
    if (a.type == TEMPLATE_STRING && b.type == TEMPLATE_STRING) {
        size_t n = a.s->bytes < b.s->bytes ? a.s->bytes : b.s->bytes;
        int c = memcmp(a.s->data, b.s->data, n);
        *order = c != 0 ? (c < 0 ? -1 : 1) : a.s->bytes < b.s->bytes ? -1 : a.s->bytes > b.s->bytes;
        return template_charge_bytes(r, n);
    }
    if (a.type == b.type && (a.type == TEMPLATE_LIST || a.type == TEMPLATE_TUPLE)) {
        const template_list *x = a.list, *y = b.list;
        CHOIR_TRY(deeper(r));
        for (size_t i = 0; i < x->n && i < y->n; i++) {
            bool same = false;
            CHOIR_TRY(template_equal(r, x->items[i], y->items[i], &same));
            if (same) continue;
            CHOIR_TRY(template_compare(r, x->items[i], y->items[i], order));
            r->value_depth--;
            return CHOIR_OK;
        }
        r->value_depth--;
        *order = x->n < y->n ? -1 : x->n > y->n;
        return CHOIR_OK;
    }
    return template_error(r, "values of types '%s' and '%s' have no order", template_type_name(a),
                          template_type_name(b));
}

choir_status template_contains(template_render *r, template_value v, template_value in, bool *out)
{
    *out = false;
    if (in.type == TEMPLATE_STRING) {
        if (v.type != TEMPLATE_STRING)
            return template_error(r, "'in <string>' requires string as left operand, not %s",
                                  template_type_name(v));
        *out = memmem(in.s->data, in.s->bytes, v.s->data, v.s->bytes) != NULL;
        return template_charge_bytes(r, 4 * in.s->bytes);
    }
    if (in.type == TEMPLATE_DICT || (in.type == TEMPLATE_VIEW && in.flag == TEMPLATE_KEYS)) {
        template_value *found = NULL;
        CHOIR_TRY(template_dict_get(r, in.dict, v, &found));
        *out = found != NULL;
        return CHOIR_OK;
    }
    if (!template_iterable(in))
        return template_error(r, "argument of type '%s' is not iterable", template_type_name(in));
    template_iterator it;
    CHOIR_TRY(template_iterate(r, in, &it));
    for (bool found = true; !*out;) {
        template_value item;
        CHOIR_TRY(template_next(r, &it, &item, &found));
        if (!found) break;
        CHOIR_TRY(template_equal(r, item, v, out));
    }
    return CHOIR_OK;
}

/* ---- Iteration ---- */

bool template_iterable(template_value v)
{
    size_t n;
    return v.type == TEMPLATE_ITERATOR || template_length(v, &n);
}

choir_status template_iterate(template_render *r, template_value v, template_iterator *out)
{
    if (!template_iterable(v))
        return template_error(r, "'%s' object is not iterable", template_type_name(v));
    *out = (template_iterator){.of = v};
    return CHOIR_OK;
}

static choir_status next_in_dict(template_render *r, template_iterator *it, template_value *out)
{
    const template_entry *e = &it->of.dict->entries[it->at++];
    template_view view = it->of.type == TEMPLATE_DICT ? TEMPLATE_KEYS : it->of.flag;
    if (view == TEMPLATE_ITEMS) {
        template_list *pair;
        CHOIR_TRY(template_list_make(r, 2, &pair));
        pair->items[0] = e->key;
        pair->items[1] = e->value;
        pair->n = 2;
        *out = TEMPLATE_VALUE(TUPLE, list, pair);
        return CHOIR_OK;
    }
    *out = view == TEMPLATE_KEYS ? e->key : e->value;
    return CHOIR_OK;
}

choir_status template_next(template_render *r, template_iterator *it, template_value *out,
                           bool *found)
{
    CHOIR_TRY(template_charge(r, 1));
    while (it->of.type == TEMPLATE_ITERATOR) it = it->of.iterator;
    if (it->lazy != NULL) return template_lazy_next(r, it->lazy, out, found);
    size_t n = 0;
    (void)template_length(it->of, &n);
    *found = it->at < n;
    if (!*found) return CHOIR_OK;
    switch (it->of.type) {
    case TEMPLATE_STRING: {
        const template_string *s = it->of.s;
        uint32_t code;
        size_t bytes = template_utf8_decode(s->data + it->offset, s->bytes - it->offset, &code);
        CHOIR_TRY(template_string_value(r, s->data + it->offset, bytes, out));
        it->offset += bytes;
        it->at++;
        return CHOIR_OK;
    }
    case TEMPLATE_LIST:
    case TEMPLATE_TUPLE:
        *out = it->of.list->items[it->at++];
        return CHOIR_OK;
    case TEMPLATE_RANGE:
        *out = template_int(it->of.range->start + (int64_t)it->at++ * it->of.range->step);
        return CHOIR_OK;
    default:
        return next_in_dict(r, it, out);
    }
}

choir_status template_to_list(template_render *r, template_value v, template_list **out)
{
    template_iterator it;
    size_t n = 0;
    (void)template_length(v, &n);
    CHOIR_TRY(template_iterate(r, v, &it));
    CHOIR_TRY(template_list_make(r, n, out));
    for (;;) {
        template_value item;
        bool found = false;
        CHOIR_TRY(template_next(r, &it, &item, &found));
        if (!found) return CHOIR_OK;
        CHOIR_TRY(template_list_push(r, *out, item));
    }
}
