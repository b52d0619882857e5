/* WHAT    The values of a template, which are Python's as far as templates see them; their pool.
 * OWNS    A pool owns an arena; values, strings, lists and dicts live until its end.
 * THREADS That of one compilation or one render; constants of a template are read by any.
 * ERRORS  CHOIR_E_FULL for the pool's limit, CHOIR_E_INVALID for what Python refuses.
 * LIMITS  Integers have 64 bits; values nest at most 200 deep where they are walked.
 * NEXT    engine/chat_template_text.h, engine/chat_template_lex.h */
#pragma once
#include "base/base.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

typedef struct template_render template_render;

typedef struct template_pool {
    choir_arena *arena;
    char *next; /* the free part of the newest block */
    size_t left, used, limit;
    const uint32_t *line; /* of the render, for its sentence; NULL while compiling */
} template_pool;

choir_status template_pool_open(template_pool *pool, size_t limit);
void template_pool_close(template_pool *pool);
/* 16-aligned, uninitialised. */
choir_status template_pool_alloc(template_pool *pool, size_t bytes, void *out);

/* Bytes beyond `used` of a concatenation's buffer are free, so that growing a string step by step
 * costs what is added and not what is there. */
typedef struct template_tail {
    size_t used, capacity;
} template_tail;

/* UTF-8, not terminated, often a view into another string. */
typedef struct template_string {
    const char *data;
    /* Of characters: SIZE_MAX until someone asks; constants of the template know it from the start.
     */
    size_t bytes, chars;
    template_tail *tail;
} template_string;

/* X(enumerator, Python's name of the type) */
#define TEMPLATE_TYPES(X)                                                                          \
    X(MISSING, "missing") /* an argument not given; never seen by a template */                    \
    X(UNDEFINED, "Undefined")                                                                      \
    X(NONE, "NoneType")                                                                            \
    X(BOOL, "bool")                                                                                \
    X(INT, "int")                                                                                  \
    X(FLOAT, "float")                                                                              \
    X(STRING, "str")                                                                               \
    X(LIST, "list")                                                                                \
    X(TUPLE, "tuple")                                                                              \
    X(DICT, "dict")                                                                                \
    X(RANGE, "range")                                                                              \
    X(VIEW, "dict view")                                                                           \
    X(ITERATOR, "generator")                                                                       \
    X(NAMESPACE, "Namespace")                                                                      \
    X(LOOP, "LoopContext")                                                                         \
    X(MACRO, "Macro")                                                                              \
    X(FUNCTION, "function")                                                                        \
    X(METHOD, "method")                                                                            \
    X(CYCLER, "Cycler")                                                                            \
    X(JOINER, "Joiner")

typedef enum template_type {
#define X(name, text) TEMPLATE_##name,
    TEMPLATE_TYPES(X)
#undef X
} template_type;

/* What an undefined value says when it is used. */
typedef enum template_undefined {
    TEMPLATE_NO_NAME,      /* 'text' is undefined */
    TEMPLATE_NO_ATTRIBUTE, /* the object (its type in `extra`) has no attribute 'text' */
    TEMPLATE_HINT,         /* text */
    TEMPLATE_UNSAFE,       /* attribute 'text' of `extra` is closed to templates */
} template_undefined;

typedef enum template_view { TEMPLATE_KEYS, TEMPLATE_VALUES, TEMPLATE_ITEMS } template_view;

typedef struct template_value {
    uint8_t type;
    uint8_t flag;   /* STRING: HTML-safe; UNDEFINED: template_undefined; VIEW: template_view */
    uint32_t extra; /* UNDEFINED: the object's template_type */
    union {
        bool b;
        int64_t i;
        double f;
        template_string *s;
        struct template_list *list; /* LIST, TUPLE */
        struct template_dict *dict; /* DICT, VIEW, NAMESPACE */
        struct template_range *range;
        struct template_iterator *iterator;
        struct template_loop *loop;
        struct template_macro *macro;
        const struct template_builtin *function;
        struct template_method *method;
        struct template_cycler *cycler; /* CYCLER, JOINER */
    };
} template_value;

typedef struct template_list {
    template_value *items;
    size_t n, capacity;
    const template_string *const *names; /* a named tuple's, else NULL */
} template_list;

typedef struct template_entry {
    template_value key, value;
    uint64_t hash;
} template_entry;

/* In order of insertion; `index` (open addressing, entry + 1) exists from nine entries on. */
typedef struct template_dict {
    template_entry *entries;
    size_t n, capacity;
    uint32_t *index;
    size_t index_size;
} template_dict;

typedef struct template_range {
    int64_t start, stop, step;
    size_t n;
} template_range;

/* Steps once through a sized value, `at` counting items and `offset` bytes of a string; or asks
 * `lazy`. */
typedef struct template_iterator {
    template_value of;
    size_t at, offset;
    struct template_lazy *lazy;
} template_iterator;

typedef struct template_cycler {
    template_value *items; /* the joiner's separator is items[0] */
    size_t n, at;
} template_cycler;

#define TEMPLATE_VALUE(t, field, x) ((template_value){.type = TEMPLATE_##t, .field = (x)})
static inline template_value template_none(void)
{
    return (template_value){.type = TEMPLATE_NONE};
}
static inline template_value template_bool(bool b)
{
    return TEMPLATE_VALUE(BOOL, b, b);
}
static inline template_value template_int(int64_t i)
{
    return TEMPLATE_VALUE(INT, i, i);
}
static inline template_value template_float(double f)
{
    return TEMPLATE_VALUE(FLOAT, f, f);
}
static inline template_value template_hint(const template_string *text)
{
    return (template_value){
        .type = TEMPLATE_UNDEFINED, .flag = TEMPLATE_HINT, .s = (template_string *)text};
}

const char *template_type_name(template_value v);

/* Strings. `copy` false: a view of bytes that outlive the render. */
choir_status template_string_make(template_pool *pool, const char *data, size_t bytes, bool copy,
                                  template_string **out);
choir_status template_string_value(template_render *r, const char *data, size_t bytes,
                                   template_value *out); /* a view */
choir_status template_string_concat(template_render *r, const template_string *a,
                                    const template_string *b, template_value *out);
size_t template_string_chars(template_string *s);
/* The byte offset of the at-th character (at <= chars). */
choir_status template_string_offset(template_render *r, template_string *s, size_t at, size_t *out);
bool template_string_is(const template_string *s, const char *text);
static inline bool template_string_same(const template_string *a, const template_string *b)
{
    return a == b || (a->bytes == b->bytes && memcmp(a->data, b->data, a->bytes) == 0);
}

choir_status template_list_make(template_render *r, size_t capacity, template_list **out);
choir_status template_list_push(template_render *r, template_list *list, template_value v);
choir_status template_dict_make(template_render *r, template_dict **out);
choir_status template_dict_set(template_render *r, template_dict *d, template_value key,
                               template_value v);
choir_status template_dict_set_text(template_render *r, template_dict *d, const char *key,
                                    template_value v);
/* NULL where the key is absent. */
choir_status template_dict_get(template_render *r, const template_dict *d, template_value key,
                               template_value **out);

bool template_truth(template_value v);
bool template_is_number(template_value v); /* bool, int or float */
choir_status template_equal(template_render *r, template_value a, template_value b, bool *out);
/* Python's < <= > >=: *order is -1, 0, 1, or 2 for unordered (NaN). */
choir_status template_compare(template_render *r, template_value a, template_value b, int *order);
choir_status template_contains(template_render *r, template_value v, template_value in, bool *out);
/* false: the value has no len(). */
bool template_length(template_value v, size_t *out);
bool template_iterable(template_value v);
choir_status template_iterate(template_render *r, template_value v, template_iterator *out);
choir_status template_next(template_render *r, template_iterator *it, template_value *out,
                           bool *found);
choir_status template_to_list(template_render *r, template_value v, template_list **out);
