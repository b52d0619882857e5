/* Jinja's filters of sequences. Where Jinja gives a generator, so does this: it is read once, has
 * no length, is true even when nothing comes out of it, and works or fails only when read. */
#include "engine/chat_template_render.h"

#define FILTER(name)                                                                               \
    static choir_status name(template_render *r, template_value *slots,                            \
                             const template_arguments *all, template_value *out)

/* Generators over generators recurse, so their depth counts like that of calls. */
choir_status template_lazy_next(template_render *r, template_lazy *lazy, template_value *out,
                                bool *found)
{
    *found = false;
    if (lazy->done) return CHOIR_OK;
    if (++r->depth > TEMPLATE_MAX_DEPTH)
        return template_error(r, "the template's evaluation nests deeper than %d",
                              TEMPLATE_MAX_DEPTH);
    CHOIR_TRY(lazy->next(r, lazy, out, found));
    r->depth--;
    lazy->done = !*found;
    return CHOIR_OK;
}

typedef choir_status (*lazy_next)(template_render *r, template_lazy *lazy, template_value *out,
                                  bool *found);

static choir_status generator(template_render *r, lazy_next next, const template_value *slots,
                              const template_arguments *all, template_value *out)
{
    template_iterator *it;
    template_lazy *lazy;
    CHOIR_TRY(template_alloc(r, sizeof *it, &it));
    CHOIR_TRY(template_alloc(r, sizeof *lazy, &lazy));
    *lazy = (template_lazy){.next = next, .arguments = *all};
    memcpy(lazy->slots, slots, sizeof lazy->slots);
    *it = (template_iterator){.lazy = lazy};
    *out = TEMPLATE_VALUE(ITERATOR, iterator, it);
    return CHOIR_OK;
}

/* A generator that makes all it gives when it is first read. */
typedef choir_status (*make_list)(template_render *r, template_value *slots, template_list **out);
static choir_status next_of_list(template_render *r, template_lazy *lazy, make_list make,
                                 template_value *out, bool *found)
{
    if (!lazy->begun) {
        template_list *list = NULL;
        CHOIR_TRY(make(r, lazy->slots, &list));
        CHOIR_TRY(template_iterate(r, TEMPLATE_VALUE(LIST, list, list), &lazy->source));
        lazy->begun = true;
    }
    return template_next(r, &lazy->source, out, found);
}

// clang-format off
#define GENERATOR(name, make)                                                                      \
    static choir_status name##_next(template_render *r, template_lazy *lazy, template_value *out,  \
                                    bool *found)                                                   \
    {                                                                                              \
        return next_of_list(r, lazy, make, out, found);                                            \
    }                                                                                              \
    FILTER(name) { return generator(r, name##_next, slots, all, out); }
// clang-format on

static choir_status list_iterator(template_render *r, template_list *list, template_value *out)
{
    template_iterator *it;
    CHOIR_TRY(template_alloc(r, sizeof *it, &it));
    *it = (template_iterator){.of = TEMPLATE_VALUE(LIST, list, list)};
    *out = TEMPLATE_VALUE(ITERATOR, iterator, it);
    return CHOIR_OK;
}

static template_value list_value(template_list *list)
{
    return TEMPLATE_VALUE(LIST, list, list);
}

static choir_status nothing(const char *text, template_render *r, template_value *out)
{
    template_string *s;
    CHOIR_TRY(template_string_make(&r->pool, text, strlen(text), false, &s));
    *out = template_hint(s);
    return CHOIR_OK;
}

/* ---- Attributes by path ---- */

/* What `attribute` ("a.b.0", a number, or none) leads to within the item. */
static choir_status by_path(template_render *r, template_value item, template_value path,
                            const template_value *fallback, template_value *out)
{
    *out = item;
    if (!template_given(path) || path.type == TEMPLATE_NONE) return CHOIR_OK;
    const char *p = path.type == TEMPLATE_STRING ? path.s->data : "";
    const char *end = path.type == TEMPLATE_STRING ? p + path.s->bytes : p;
    for (;;) {
        template_value key = path;
        const char *dot = p < end ? memchr(p, '.', (size_t)(end - p)) : NULL;
        if (path.type == TEMPLATE_STRING) {
            size_t n = (size_t)((dot != NULL ? dot : end) - p);
            int64_t number = 0;
            bool digits = n > 0 && n < 18;
            for (size_t i = 0; i < n && digits; i++) {
                digits = p[i] >= '0' && p[i] <= '9';
                number = number * 10 + (p[i] - '0');
            }
            CHOIR_TRY(template_string_value(r, p, n, &key));
            if (digits) key = template_int(number);
        }
        CHOIR_TRY(template_charge(r, 1));
        CHOIR_TRY(template_get_item(r, *out, key, out));
        if (fallback != NULL && template_given(*fallback) && fallback->type != TEMPLATE_NONE &&
            out->type == TEMPLATE_UNDEFINED)
            *out = *fallback;
        if (dot == NULL) return CHOIR_OK;
        p = dot + 1;
    }
}

static choir_status fold_case(template_render *r, bool case_sensitive, template_value *v)
{
    if (case_sensitive || v->type != TEMPLATE_STRING) return CHOIR_OK;
    return template_change_case(r, v->s, TEMPLATE_LOWER, v);
}

/* The keys of one item for sorting: "a,b.c" gives several, compared in turn. */
static choir_status sort_key(template_render *r, template_value item, template_value path,
                             bool case_sensitive, template_value *out)
{
    template_list *keys;
    bool many = path.type == TEMPLATE_STRING && memchr(path.s->data, ',', path.s->bytes) != NULL;
    if (!many) {
        CHOIR_TRY(by_path(r, item, path, NULL, out));
        return fold_case(r, case_sensitive, out);
    }
    CHOIR_TRY(template_list_make(r, 2, &keys));
    const char *p = path.s->data, *end = p + path.s->bytes;
    for (const char *comma = p; comma != NULL;) {
        template_value part, key;
        comma = memchr(p, ',', (size_t)(end - p));
        const char *stop = comma != NULL ? comma : end;
        CHOIR_TRY(template_string_value(r, p, (size_t)(stop - p), &part));
        CHOIR_TRY(by_path(r, item, part, NULL, &key));
        CHOIR_TRY(fold_case(r, case_sensitive, &key));
        CHOIR_TRY(template_list_push(r, keys, key));
        p = stop + 1;
    }
    *out = list_value(keys);
    return CHOIR_OK;
}

/* ---- Sorting ---- */

typedef struct keyed {
    template_value key, item;
} keyed;

/* Within Python's lists, equal items are skipped before any is asked for an order, so that even
 * what has none (None and None) can stand side by side. */
static choir_status compare_items(template_render *r, template_value a, template_value b,
                                  bool in_lists, int *order)
{
    bool same = false;
    *order = 0;
    if (in_lists) CHOIR_TRY(template_equal(r, a, b, &same));
    return same ? CHOIR_OK : template_compare(r, a, b, order);
}

/* How to sort: a sum of these. */
enum { SORT_DOWN = 1, SORT_IN_LISTS = 2 };

/* Stable merge sort, from the bottom up. Reversed, equal items keep their order, as in Python. */
static choir_status merge_sort(template_render *r, keyed *items, size_t n, unsigned how)
{
    bool reverse = (how & SORT_DOWN) != 0, in_lists = (how & SORT_IN_LISTS) != 0;
    keyed *from = items, *to;
    CHOIR_TRY(template_alloc_n(r, n + 1, sizeof *to, &to));
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t low = 0; low < n; low += 2 * width) {
            size_t middle = low + width < n ? low + width : n;
            size_t high = low + 2 * width < n ? low + 2 * width : n;
            size_t a = low, b = middle;
            for (size_t i = low; i < high; i++) {
                int order = 0;
                if (a < middle && b < high)
                    CHOIR_TRY(compare_items(r, from[b].key, from[a].key, in_lists, &order));
                bool second = a >= middle || (b < high && (reverse ? order == 1 : order == -1));
                to[i] = second ? from[b++] : from[a++];
            }
        }
        keyed *swap = from;
        from = to;
        to = swap;
    }
    if (from != items) memcpy(items, from, n * sizeof *items);
    return CHOIR_OK;
}

static bool flag(template_value v)
{
    return template_given(v) && template_truth(v);
}

static choir_status sort_by(template_render *r, template_value sequence, template_value path,
                            bool case_sensitive, unsigned how, template_value *out)
{
    template_list *list;
    keyed *items;
    CHOIR_TRY(template_to_list(r, sequence, &list));
    CHOIR_TRY(template_alloc_n(r, list->n + 1, sizeof *items, &items));
    for (size_t i = 0; i < list->n; i++) {
        items[i].item = list->items[i];
        CHOIR_TRY(sort_key(r, list->items[i], path, case_sensitive, &items[i].key));
    }
    CHOIR_TRY(merge_sort(r, items, list->n, how));
    for (size_t i = 0; i < list->n; i++) list->items[i] = items[i].item;
    *out = list_value(list);
    return CHOIR_OK;
}

FILTER(filter_sort)
{
    (void)all;
    unsigned how = SORT_IN_LISTS | (flag(slots[1]) ? SORT_DOWN : 0);
    return sort_by(r, slots[0], slots[3], flag(slots[2]), how, out);
}

FILTER(filter_dictsort)
{
    template_string *by = NULL;
    template_value path = template_int(0), pairs = slots[0];
    (void)all;
    CHOIR_TRY(template_want_string(r, slots[2], "dictsort's key", &by));
    if (by != NULL && template_string_is(by, "value"))
        path = template_int(1);
    else if (by != NULL && !template_string_is(by, "key"))
        return template_error(r, "dictsort sorts by \"key\" or \"value\"");
    if (pairs.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, pairs);
    if (pairs.type != TEMPLATE_DICT)
        return template_error(r, "dictsort wants a dict, not '%s'", template_type_name(pairs));
    pairs.type = TEMPLATE_VIEW;
    pairs.flag = TEMPLATE_ITEMS;
    return sort_by(r, pairs, path, flag(slots[1]), flag(slots[3]) ? SORT_DOWN : 0, out);
}

FILTER(filter_groupby)
{
    static const template_string grouper = {"grouper", 7, 7, NULL},
                                 list_name = {"list", 4, 4, NULL};
    static const template_string *const names[] = {&grouper, &list_name};
    template_list *list, *groups, *group = NULL;
    keyed *items;
    bool case_sensitive = flag(slots[3]);
    (void)all;
    CHOIR_TRY(template_to_list(r, slots[0], &list));
    CHOIR_TRY(template_alloc_n(r, list->n + 1, sizeof *items, &items));
    for (size_t i = 0; i < list->n; i++) {
        items[i].item = list->items[i];
        CHOIR_TRY(by_path(r, items[i].item, slots[1], &slots[2], &items[i].key));
        CHOIR_TRY(fold_case(r, case_sensitive, &items[i].key));
    }
    CHOIR_TRY(merge_sort(r, items, list->n, 0));
    CHOIR_TRY(template_list_make(r, 0, &groups));
    for (size_t i = 0; i < list->n; i++) {
        bool same = false;
        if (i > 0) CHOIR_TRY(template_equal(r, items[i - 1].key, items[i].key, &same));
        if (!same) {
            template_list *pair;
            template_value key;
            CHOIR_TRY(template_list_make(r, 2, &pair));
            CHOIR_TRY(template_list_make(r, 0, &group));
            CHOIR_TRY(by_path(r, items[i].item, slots[1], &slots[2], &key));
            pair->items[0] = key;
            pair->items[1] = list_value(group);
            pair->n = 2;
            pair->names = names;
            CHOIR_TRY(template_list_push(r, groups, TEMPLATE_VALUE(TUPLE, list, pair)));
        }
        CHOIR_TRY(template_list_push(r, group, items[i].item));
    }
    *out = list_value(groups);
    return CHOIR_OK;
}

static choir_status make_unique(template_render *r, template_value *slots, template_list **out)
{
    template_list *list;
    template_dict *seen;
    CHOIR_TRY(template_to_list(r, slots[0], &list));
    CHOIR_TRY(template_list_make(r, 0, out));
    CHOIR_TRY(template_dict_make(r, &seen));
    for (size_t i = 0; i < list->n; i++) {
        template_value key, *before = NULL;
        CHOIR_TRY(by_path(r, list->items[i], slots[2], NULL, &key));
        CHOIR_TRY(fold_case(r, flag(slots[1]), &key));
        CHOIR_TRY(template_dict_get(r, seen, key, &before));
        if (before != NULL) continue;
        CHOIR_TRY(template_dict_set(r, seen, key, template_none()));
        CHOIR_TRY(template_list_push(r, *out, list->items[i]));
    }
    return CHOIR_OK;
}

GENERATOR(filter_unique, make_unique)

static choir_status extreme(template_render *r, template_value *slots, int wanted,
                            template_value *out)
{
    template_list *list;
    template_value best_key = {0};
    CHOIR_TRY(template_to_list(r, slots[0], &list));
    if (list->n == 0) return nothing("the sequence is empty, so nothing is its extreme", r, out);
    for (size_t i = 0; i < list->n; i++) {
        template_value key;
        int order = wanted;
        CHOIR_TRY(by_path(r, list->items[i], slots[2], NULL, &key));
        CHOIR_TRY(fold_case(r, flag(slots[1]), &key));
        if (i > 0) CHOIR_TRY(template_compare(r, key, best_key, &order));
        if (order != wanted) continue;
        best_key = key;
        *out = list->items[i];
    }
    return CHOIR_OK;
}

FILTER(filter_min)
{
    return (void)all, extreme(r, slots, -1, out);
}
FILTER(filter_max)
{
    return (void)all, extreme(r, slots, 1, out);
}

/* ---- Mapping and selecting ---- */

static template_value named_argument(const template_arguments *all, const char *name)
{
    for (size_t i = 0; i < all->n_named; i++)
        if (template_string_is(all->names[i], name)) return all->named[i];
    return (template_value){0};
}

/* The first positional argument, taken off the others; MISSING where there is none. */
static template_value take_first(template_arguments *args)
{
    if (args->n == 0) return (template_value){0};
    args->n--;
    return *args->positional++;
}

/* Sequences that are false (empty, none, undefined) give nothing; what is true must be iterable. */
static choir_status begin(template_render *r, template_lazy *lazy)
{
    static template_list empty = {0};
    template_value v = lazy->slots[0];
    if (!template_truth(v)) v = list_value(&empty);
    lazy->begun = true;
    return template_iterate(r, v, &lazy->source);
}

static choir_status map_next(template_render *r, template_lazy *lazy, template_value *out,
                             bool *found)
{
    template_arguments rest = lazy->arguments;
    template_value name = take_first(&rest), path = {0}, fallback = {0}, item;
    template_string *filter = NULL;
    if (!lazy->begun) CHOIR_TRY(begin(r, lazy));
    if (!template_given(name)) {
        path = named_argument(&rest, "attribute");
        fallback = named_argument(&rest, "default");
        if (!template_given(path) || rest.n_named > 1u + template_given(fallback))
            return template_error(r, "map wants the name of a filter, or attribute=");
    }
    CHOIR_TRY(template_want_string(r, name, "map's filter", &filter));
    CHOIR_TRY(template_next(r, &lazy->source, &item, found));
    if (!*found) return CHOIR_OK;
    if (filter == NULL) return by_path(r, item, path, &fallback, out);
    return template_apply_filter(r, filter, item, &rest, out);
}

FILTER(filter_map)
{
    return generator(r, map_next, slots, all, out);
}

static choir_status select_next(template_render *r, template_lazy *lazy, bool by_attribute,
                                bool wanted, template_value *out, bool *found)
{
    template_arguments rest = lazy->arguments;
    template_value path = {0};
    template_string *test = NULL;
    if (!lazy->begun) CHOIR_TRY(begin(r, lazy));
    if (by_attribute) {
        path = take_first(&rest);
        if (!template_given(path)) return template_error(r, "the name of the attribute is missing");
    }
    CHOIR_TRY(template_want_string(r, take_first(&rest), "the name of a test", &test));
    for (;;) {
        template_value v;
        bool holds;
        CHOIR_TRY(template_next(r, &lazy->source, out, found));
        if (!*found) return CHOIR_OK;
        CHOIR_TRY(by_path(r, *out, path, NULL, &v));
        holds = template_truth(v);
        if (test != NULL) CHOIR_TRY(template_apply_test(r, test, v, &rest, &holds));
        if (holds == wanted) return CHOIR_OK;
    }
}

// clang-format off
#define SELECT(name, by_attribute, wanted)                                                         \
    static choir_status name##_next(template_render *r, template_lazy *lazy, template_value *out,  \
                                    bool *found)                                                   \
    {                                                                                              \
        return select_next(r, lazy, by_attribute, wanted, out, found);                             \
    }                                                                                              \
    FILTER(name) { return generator(r, name##_next, slots, all, out); }
SELECT(filter_select, false, true)
SELECT(filter_reject, false, false)
SELECT(filter_selectattr, true, true)
SELECT(filter_rejectattr, true, false)
// clang-format on

/* ---- The others ---- */

FILTER(filter_length)
{
    size_t n;
    (void)all;
    if (slots[0].type == TEMPLATE_LOOP) {
        static const template_string name = {"length", 6, 6, NULL};
        return template_get_attribute(r, slots[0], &name, out);
    }
    if (!template_length(slots[0], &n))
        return template_error(r, "object of type '%s' has no len()", template_type_name(slots[0]));
    *out = template_int((int64_t)n);
    return CHOIR_OK;
}

FILTER(filter_list)
{
    template_list *list;
    (void)all;
    CHOIR_TRY(template_to_list(r, slots[0], &list));
    *out = list_value(list);
    return CHOIR_OK;
}

FILTER(filter_join)
{
    template_text text = {.r = r};
    template_iterator it;
    template_string *separator = NULL;
    (void)all;
    if (template_given(slots[1])) CHOIR_TRY(template_to_string(r, slots[1], &separator));
    CHOIR_TRY(template_iterate(r, slots[0], &it));
    for (bool first = true;; first = false) {
        template_value item;
        bool found = false;
        CHOIR_TRY(template_next(r, &it, &item, &found));
        if (!found) return template_text_value(&text, out);
        CHOIR_TRY(by_path(r, item, slots[2], NULL, &item));
        if (!first && separator != NULL)
            CHOIR_TRY(template_text_add(&text, separator->data, separator->bytes));
        CHOIR_TRY(template_text_str(&text, item));
    }
}

FILTER(filter_first)
{
    template_iterator it;
    bool found = false;
    (void)all;
    CHOIR_TRY(template_iterate(r, slots[0], &it));
    CHOIR_TRY(template_next(r, &it, out, &found));
    return found ? CHOIR_OK : nothing("the sequence is empty and has no first item", r, out);
}

/* The reverse of what Python can reverse: not of generators. */
static choir_status reversed(template_render *r, template_value v, template_list **out)
{
    template_list *list;
    CHOIR_TRY(template_to_list(r, v, &list));
    CHOIR_TRY(template_list_make(r, list->n, out));
    for (size_t i = list->n; i > 0; i--) (*out)->items[(*out)->n++] = list->items[i - 1];
    return CHOIR_OK;
}

FILTER(filter_last)
{
    template_list *list;
    (void)all;
    if (slots[0].type == TEMPLATE_ITERATOR || !template_iterable(slots[0]))
        return template_error(r, "a '%s' has no last item", template_type_name(slots[0]));
    if (slots[0].type == TEMPLATE_STRING || slots[0].type == TEMPLATE_RANGE ||
        slots[0].type == TEMPLATE_LIST || slots[0].type == TEMPLATE_TUPLE) {
        size_t n = 0;
        (void)template_length(slots[0], &n);
        if (n > 0) return template_get_item(r, slots[0], template_int(-1), out);
    }
    CHOIR_TRY(template_to_list(r, slots[0], &list));
    if (list->n == 0) return nothing("the sequence is empty and has no last item", r, out);
    *out = list->items[list->n - 1];
    return CHOIR_OK;
}

FILTER(filter_reverse)
{
    template_list *list;
    (void)all;
    if (slots[0].type == TEMPLATE_STRING) {
        template_value bounds[3] = {{0}, {0}, template_int(-1)};
        return template_slice(r, slots[0], bounds, out);
    }
    CHOIR_TRY(reversed(r, slots[0], &list));
    if (slots[0].type == TEMPLATE_ITERATOR) { /* a generator's reverse is a list */
        *out = list_value(list);
        return CHOIR_OK;
    }
    return list_iterator(r, list, out);
}

static choir_status make_items(template_render *r, template_value *slots, template_list **out)
{
    template_value v = slots[0];
    if (v.type != TEMPLATE_UNDEFINED && v.type != TEMPLATE_DICT)
        return template_error(r, "items wants a dict, not '%s'", template_type_name(v));
    if (v.type == TEMPLATE_DICT) {
        v.type = TEMPLATE_VIEW;
        v.flag = TEMPLATE_ITEMS;
    }
    return template_to_list(r, v, out);
}

GENERATOR(filter_items, make_items)

FILTER(filter_sum)
{
    template_iterator it;
    (void)all;
    *out = template_given(slots[2]) ? slots[2] : template_int(0);
    if (out->type == TEMPLATE_STRING) return template_error(r, "sum does not add up strings");
    CHOIR_TRY(template_iterate(r, slots[0], &it));
    for (;;) {
        template_value item;
        bool found = false;
        CHOIR_TRY(template_next(r, &it, &item, &found));
        if (!found) return CHOIR_OK;
        CHOIR_TRY(by_path(r, item, slots[1], NULL, &item));
        CHOIR_TRY(template_binary(r, TOKEN_ADD, *out, item, out));
    }
}

static choir_status make_batch(template_render *r, template_value *slots, template_list **out)
{
    template_list *list, *rows, *row;
    int64_t size = 0;
    CHOIR_TRY(template_want_int(r, slots[1], "batch's size", &size));
    CHOIR_TRY(template_to_list(r, slots[0], &list));
    CHOIR_TRY(template_list_make(r, 0, &rows));
    CHOIR_TRY(template_list_make(r, 0, &row));
    for (size_t i = 0; i < list->n; i++) {
        if ((int64_t)row->n == size) {
            CHOIR_TRY(template_list_push(r, rows, list_value(row)));
            CHOIR_TRY(template_list_make(r, 0, &row));
        }
        CHOIR_TRY(template_list_push(r, row, list->items[i]));
    }
    bool fill = template_given(slots[2]) && slots[2].type != TEMPLATE_NONE;
    while (fill && row->n > 0 && (int64_t)row->n < size) {
        CHOIR_TRY(template_charge(r, 1));
        CHOIR_TRY(template_list_push(r, row, slots[2]));
    }
    if (row->n > 0) CHOIR_TRY(template_list_push(r, rows, list_value(row)));
    *out = rows;
    return CHOIR_OK;
}

GENERATOR(filter_batch, make_batch)

static choir_status make_slice(template_render *r, template_value *slots, template_list **out)
{
    template_list *list, *rows;
    int64_t slices = 0;
    CHOIR_TRY(template_want_int(r, slots[1], "slice's count", &slices));
    if (slices == 0) return template_error(r, "slice: division by zero");
    CHOIR_TRY(template_to_list(r, slots[0], &list));
    CHOIR_TRY(template_list_make(r, 0, &rows));
    bool fill = template_given(slots[2]) && slots[2].type != TEMPLATE_NONE;
    int64_t each = slices > 0 ? (int64_t)list->n / slices : 0;
    int64_t longer = slices > 0 ? (int64_t)list->n % slices : 0;
    size_t at = 0;
    for (int64_t i = 0; i < slices; i++) {
        template_list *row;
        CHOIR_TRY(template_charge(r, 1));
        CHOIR_TRY(template_list_make(r, 0, &row));
        for (int64_t k = 0; k < each + (i < longer); k++)
            CHOIR_TRY(template_list_push(r, row, list->items[at++]));
        if (fill && i >= longer) CHOIR_TRY(template_list_push(r, row, slots[2]));
        CHOIR_TRY(template_list_push(r, rows, list_value(row)));
    }
    *out = rows;
    return CHOIR_OK;
}

GENERATOR(filter_slice, make_slice)

const template_builtin *template_find_sequence_filter(const template_string *name)
{
    // clang-format off
    static const template_builtin filters[] = {
        {"length", "object", filter_length},
        {"count", "object", filter_length},
        {"list", "value", filter_list},
        {"join", "value d? attribute?", filter_join},
        {"first", "seq", filter_first},
        {"last", "seq", filter_last},
        {"map", "*", filter_map},
        {"select", "*", filter_select},
        {"reject", "*", filter_reject},
        {"selectattr", "*", filter_selectattr},
        {"rejectattr", "*", filter_rejectattr},
        {"items", "value", filter_items},
        {"reverse", "value", filter_reverse},
        {"sort", "value reverse? case_sensitive? attribute?", filter_sort},
        {"dictsort", "value case_sensitive? by? reverse?", filter_dictsort},
        {"groupby", "value attribute default? case_sensitive?", filter_groupby},
        {"unique", "value case_sensitive? attribute?", filter_unique},
        {"min", "value case_sensitive? attribute?", filter_min},
        {"max", "value case_sensitive? attribute?", filter_max},
        {"sum", "iterable attribute? start?", filter_sum},
        {"batch", "value linecount fill_with?", filter_batch},
        {"slice", "value slices fill_with?", filter_slice},
    };
    // clang-format on
    return template_find_builtin(filters, sizeof filters / sizeof *filters, name);
}
