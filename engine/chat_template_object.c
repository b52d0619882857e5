/* Attributes, items, slices and calls. An attribute is first what Python's object has by that name
 * and then its item; an index is the other way round. Methods that would change a list or a dict
 * are closed: they read as undefined and refuse to be called. */
#include "engine/chat_template_render.h"

static choir_status absent(template_render *r, template_value object, const template_string *name,
                           template_undefined why, template_value *out)
{
    (void)r;
    *out = (template_value){.type = TEMPLATE_UNDEFINED,
                            .flag = (uint8_t)why,
                            .extra = object.type,
                            .s = (template_string *)name};
    return CHOIR_OK;
}

static bool is_one_of(const template_string *name, const char *const *names)
{
    for (; *names != NULL; names++)
        if (template_string_is(name, *names)) return true;
    return false;
}

/* Names that Python's objects have and that stay closed: those that change the object, and __…__.
 */
static bool is_closed(template_value object, const template_string *name)
{
    static const char *const dict[] = {"clear", "pop", "popitem", "setdefault", "update", NULL};
    static const char *const list[] = {"append", "clear",  "pop",    "reverse", "insert",
                                       "sort",   "extend", "remove", NULL};
    const char *s = name->data;
    size_t n = name->bytes;
    if (n > 4 && s[0] == '_' && s[1] == '_' && s[n - 1] == '_' && s[n - 2] == '_')
        return object.type != TEMPLATE_NAMESPACE;
    if (object.type == TEMPLATE_DICT) return is_one_of(name, dict);
    return object.type == TEMPLATE_LIST && is_one_of(name, list);
}

/* ---- Methods of dicts and lists ---- */

static choir_status dict_get(template_render *r, template_value *slots,
                             const template_arguments *all, template_value *out)
{
    (void)all;
    template_value *found = NULL;
    CHOIR_TRY(template_dict_get(r, slots[0].dict, slots[1], &found));
    if (found != NULL)
        *out = *found;
    else
        *out = template_given(slots[2]) ? slots[2] : template_none();
    return CHOIR_OK;
}

static choir_status dict_view(template_value self, template_view view, template_value *out)
{
    *out = (template_value){.type = TEMPLATE_VIEW, .flag = (uint8_t)view, .dict = self.dict};
    return CHOIR_OK;
}

#define DICT_VIEW(function, view)                                                                  \
    static choir_status function(template_render *r, template_value *slots,                        \
                                 const template_arguments *all, template_value *out)               \
    {                                                                                              \
        (void)r;                                                                                   \
        (void)all;                                                                                 \
        return dict_view(slots[0], view, out);                                                     \
    }
DICT_VIEW(dict_items, TEMPLATE_ITEMS)
DICT_VIEW(dict_keys, TEMPLATE_KEYS)
DICT_VIEW(dict_values, TEMPLATE_VALUES)

/* Nothing can change a dict or a list, so a copy is the thing itself. */
static choir_status same_object(template_render *r, template_value *slots,
                                const template_arguments *all, template_value *out)
{
    (void)r;
    (void)all;
    *out = slots[0];
    return CHOIR_OK;
}

static choir_status list_count(template_render *r, template_value *slots,
                               const template_arguments *all, template_value *out)
{
    (void)all;
    int64_t n = 0;
    for (size_t i = 0; i < slots[0].list->n; i++) {
        bool same = false;
        CHOIR_TRY(template_equal(r, slots[0].list->items[i], slots[1], &same));
        n += same;
    }
    *out = template_int(n);
    return CHOIR_OK;
}

static choir_status list_index(template_render *r, template_value *slots,
                               const template_arguments *all, template_value *out)
{
    (void)all;
    int64_t n = (int64_t)slots[0].list->n, start = 0, stop = n;
    if (template_given(slots[2])) CHOIR_TRY(template_want_int(r, slots[2], "start", &start));
    if (template_given(slots[3])) CHOIR_TRY(template_want_int(r, slots[3], "stop", &stop));
    if (start < 0) start = start + n < 0 ? 0 : start + n;
    if (stop < 0) stop += n;
    for (int64_t i = start; i < n && i < stop; i++) {
        bool same = false;
        CHOIR_TRY(template_equal(r, slots[0].list->items[i], slots[1], &same));
        *out = template_int(i);
        if (same) return CHOIR_OK;
    }
    return template_error(r, "index: the value is not in the %s", template_type_name(slots[0]));
}

static const template_builtin dict_methods[] = {
    {"get", "self key default?", dict_get},
    {"items", "self", dict_items},
    {"keys", "self", dict_keys},
    {"values", "self", dict_values},
    {"copy", "self", same_object},
};

static const template_builtin list_methods[] = {
    {"index", "self value start? stop?", list_index},
    {"count", "self value", list_count},
    {"copy", "self", same_object}, /* the last: tuples have none */
};

/* ---- Attributes of what Jinja itself provides ---- */

static choir_status loop_length(template_render *r, template_loop *loop, int64_t *out)
{
    size_t n = 0;
    if (loop->length < 0 && loop->test == NULL && template_length(loop->of, &n)) {
        loop->length = (int64_t)n;
    } else if (loop->length < 0) { /* what is left is read now and kept for the rounds to come */
        template_list *rest;
        CHOIR_TRY(template_list_make(r, 0, &rest));
        for (;;) {
            template_value item;
            bool found = false;
            CHOIR_TRY(template_loop_fetch(r, loop, &item, &found));
            if (!found) break;
            CHOIR_TRY(template_list_push(r, rest, item));
        }
        loop->it = (template_iterator){.of = TEMPLATE_VALUE(LIST, list, rest)};
        loop->test = NULL;
        loop->length = (int64_t)rest->n + loop->index0 + 1 + template_given(loop->after);
    }
    *out = loop->length;
    return CHOIR_OK;
}

static choir_status loop_peek(template_render *r, template_loop *loop, bool *found)
{
    *found = template_given(loop->after);
    if (*found) return CHOIR_OK;
    CHOIR_TRY(template_loop_fetch(r, loop, &loop->after, found));
    if (!*found) loop->after = (template_value){0};
    return CHOIR_OK;
}

static choir_status loop_cycle(template_render *r, template_value *slots,
                               const template_arguments *all, template_value *out)
{
    if (all->n == 0) return template_error(r, "loop.cycle has no items to go through");
    *out = all->positional[(size_t)slots[0].loop->index0 % all->n];
    return CHOIR_OK;
}

static choir_status loop_changed(template_render *r, template_value *slots,
                                 const template_arguments *all, template_value *out)
{
    template_loop *loop = slots[0].loop;
    template_list *list;
    bool same = false;
    CHOIR_TRY(template_list_make(r, all->n, &list));
    if (all->n > 0) memcpy(list->items, all->positional, all->n * sizeof *list->items);
    list->n = all->n;
    template_value now = TEMPLATE_VALUE(TUPLE, list, list);
    CHOIR_TRY(template_equal(r, loop->changed, now, &same));
    loop->changed = now;
    *out = template_bool(!same);
    return CHOIR_OK;
}

static choir_status make_method(template_render *r, const template_builtin *function,
                                template_value self, template_value *out)
{
    template_method *method;
    CHOIR_TRY(template_alloc(r, sizeof *method, &method));
    *method = (template_method){function, self};
    *out = TEMPLATE_VALUE(METHOD, method, method);
    return CHOIR_OK;
}

static choir_status neighbour(template_value v, bool there, template_value *out)
{
    static const template_string hint = {
        .data = "there is no such neighbour of the loop's item", .bytes = 45, .chars = 45};
    *out = there ? v : template_hint(&hint);
    return CHOIR_OK;
}

static choir_status loop_attribute(template_render *r, template_loop *loop,
                                   const template_string *name, template_value *out)
{
    static const template_builtin cycle = {"cycle", "*", loop_cycle};
    static const template_builtin changed = {"changed", "*", loop_changed};
    const template_value self = TEMPLATE_VALUE(LOOP, loop, loop);
    int64_t i = loop->index0, length = 0;
    bool more = false;
    if (template_string_is(name, "cycle")) return make_method(r, &cycle, self, out);
    if (template_string_is(name, "changed")) return make_method(r, &changed, self, out);
    if (template_string_is(name, "previtem")) return neighbour(loop->before, i > 0, out);
    if (template_string_is(name, "last") || template_string_is(name, "nextitem")) {
        CHOIR_TRY(loop_peek(r, loop, &more));
        if (name->data[0] == 'n') return neighbour(loop->after, more, out);
        *out = template_bool(!more);
    } else if (template_string_is(name, "index0"))
        *out = template_int(i);
    else if (template_string_is(name, "index"))
        *out = template_int(i + 1);
    else if (template_string_is(name, "first"))
        *out = template_bool(i == 0);
    else if (template_string_is(name, "depth"))
        *out = template_int(1);
    else if (template_string_is(name, "depth0"))
        *out = template_int(0);
    else if (template_string_is(name, "length") || template_string_is(name, "revindex") ||
             template_string_is(name, "revindex0")) {
        CHOIR_TRY(loop_length(r, loop, &length));
        *out = template_int(name->data[0] == 'l'                    ? length
                            : name->bytes == sizeof "revindex0" - 1 ? length - i - 1
                                                                    : length - i);
    } else
        return absent(r, self, name, TEMPLATE_NO_ATTRIBUTE, out);
    return CHOIR_OK;
}

static choir_status cycler_next(template_render *r, template_value *slots,
                                const template_arguments *all, template_value *out)
{
    (void)r;
    (void)all;
    template_cycler *c = slots[0].cycler;
    *out = c->items[c->at];
    c->at = (c->at + 1) % c->n;
    return CHOIR_OK;
}

static choir_status cycler_reset(template_render *r, template_value *slots,
                                 const template_arguments *all, template_value *out)
{
    (void)r;
    (void)all;
    slots[0].cycler->at = 0;
    *out = template_none();
    return CHOIR_OK;
}

static choir_status macro_attribute(template_render *r, template_value object,
                                    const template_string *name, template_value *out)
{
    const template_node *node = object.macro->node;
    if (template_string_is(name, "name")) {
        *out = node->name == NULL ? template_none() : TEMPLATE_VALUE(STRING, s, node->name);
        return CHOIR_OK;
    }
    if (!template_string_is(name, "arguments"))
        return absent(r, object, name, TEMPLATE_NO_ATTRIBUTE, out);
    template_list *list;
    CHOIR_TRY(template_list_make(r, node->signature->n, &list));
    for (size_t i = 0; i < node->signature->n; i++)
        list->items[i] = TEMPLATE_VALUE(STRING, s, node->signature->names[i]);
    list->n = node->signature->n;
    *out = TEMPLATE_VALUE(TUPLE, list, list);
    return CHOIR_OK;
}

/* ---- Attributes and items ---- */

static const template_builtin *find_method(template_value object, const template_string *name)
{
    static const template_builtin next = {"next", "self", cycler_next};
    static const template_builtin reset = {"reset", "self", cycler_reset};
    switch (object.type) {
    case TEMPLATE_STRING:
        return template_find_string_method(name);
    case TEMPLATE_DICT:
        return template_find_builtin(dict_methods, 5, name);
    case TEMPLATE_LIST:
        return template_find_builtin(list_methods, 3, name);
    case TEMPLATE_TUPLE:
        return template_find_builtin(list_methods, 2, name);
    case TEMPLATE_RANGE:
        return NULL;
    case TEMPLATE_CYCLER:
        if (template_string_is(name, "next")) return &next;
        return template_string_is(name, "reset") ? &reset : NULL;
    default:
        return NULL;
    }
}

/* What Python's getattr() finds, closed things included; *found is false where it finds nothing. */
static choir_status own_attribute(template_render *r, template_value object,
                                  const template_string *name, template_value *out, bool *found)
{
    *found = true;
    if (is_closed(object, name)) return absent(r, object, name, TEMPLATE_UNSAFE, out);
    const template_builtin *method = find_method(object, name);
    if (method != NULL) return make_method(r, method, object, out);
    if (object.type == TEMPLATE_NAMESPACE) {
        template_value *value = NULL, key = TEMPLATE_VALUE(STRING, s, (template_string *)name);
        CHOIR_TRY(template_dict_get(r, object.dict, key, &value));
        *found = value != NULL;
        if (*found) *out = *value;
        return CHOIR_OK;
    }
    if (object.type == TEMPLATE_LOOP) return loop_attribute(r, object.loop, name, out);
    if (object.type == TEMPLATE_MACRO) return macro_attribute(r, object, name, out);
    if (object.type == TEMPLATE_CYCLER && template_string_is(name, "current")) {
        *out = object.cycler->items[object.cycler->at];
        return CHOIR_OK;
    }
    if (object.type == TEMPLATE_TUPLE && object.list->names != NULL)
        for (size_t i = 0; i < object.list->n; i++)
            if (template_string_same(object.list->names[i], name)) {
                *out = object.list->items[i];
                return CHOIR_OK;
            }
    *found = false;
    return CHOIR_OK;
}

static bool item_position(template_value key, size_t n, size_t *out)
{
    if (key.type != TEMPLATE_INT && key.type != TEMPLATE_BOOL) return false;
    int64_t i = key.type == TEMPLATE_BOOL ? key.b : key.i;
    if (i < 0) i += (int64_t)n;
    *out = (size_t)i;
    return i >= 0 && (size_t)i < n;
}

/* What Python's [ ] finds. */
static choir_status own_item(template_render *r, template_value object, template_value key,
                             template_value *out, bool *found)
{
    size_t n, at = 0;
    *found = false;
    if (object.type == TEMPLATE_DICT) {
        template_value *value = NULL;
        if (key.type == TEMPLATE_LIST || key.type == TEMPLATE_DICT) return CHOIR_OK;
        CHOIR_TRY(template_dict_get(r, object.dict, key, &value));
        *found = value != NULL;
        if (*found) *out = *value;
        return CHOIR_OK;
    }
    if (object.type == TEMPLATE_VIEW || !template_length(object, &n) || !item_position(key, n, &at))
        return CHOIR_OK;
    *found = true;
    if (object.type == TEMPLATE_STRING) {
        size_t from = 0;
        uint32_t code;
        CHOIR_TRY(template_string_offset(r, object.s, at, &from));
        size_t bytes = template_utf8_decode(object.s->data + from, object.s->bytes - from, &code);
        return template_string_value(r, object.s->data + from, bytes, out);
    }
    *out = object.type == TEMPLATE_RANGE
               ? template_int(object.range->start + (int64_t)at * object.range->step)
               : object.list->items[at];
    return CHOIR_OK;
}

choir_status template_get_attribute(template_render *r, template_value object,
                                    const template_string *name, template_value *out)
{
    bool found = false;
    if (object.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, object);
    CHOIR_TRY(own_attribute(r, object, name, out, &found));
    if (found) return CHOIR_OK;
    template_value key = TEMPLATE_VALUE(STRING, s, (template_string *)name);
    CHOIR_TRY(own_item(r, object, key, out, &found));
    return found ? CHOIR_OK : absent(r, object, name, TEMPLATE_NO_ATTRIBUTE, out);
}

choir_status template_get_item(template_render *r, template_value object, template_value key,
                               template_value *out)
{
    bool found = false;
    template_string *name;
    if (object.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, object);
    CHOIR_TRY(own_item(r, object, key, out, &found));
    if (found) return CHOIR_OK;
    if (key.type == TEMPLATE_STRING) {
        CHOIR_TRY(own_attribute(r, object, key.s, out, &found));
        if (found) return CHOIR_OK;
        return absent(r, object, key.s, TEMPLATE_NO_ATTRIBUTE, out);
    }
    template_text text = {.r = r};
    CHOIR_TRY(template_text_repr(&text, key));
    CHOIR_TRY(template_string_make(&r->pool, text.data, text.bytes, false, &name));
    return absent(r, object, name, TEMPLATE_NO_ATTRIBUTE, out);
}

/* ---- Slices ---- */

/* Bounds as Python's slice.indices() makes them. */
static choir_status slice_bound(template_render *r, template_value v, int64_t n, bool backward,
                                int64_t none, int64_t *out)
{
    *out = none;
    if (!template_given(v) || v.type == TEMPLATE_NONE) return CHOIR_OK;
    if (v.type != TEMPLATE_INT && v.type != TEMPLATE_BOOL)
        return template_error(r, "bounds of a slice are integers or none, not '%s'",
                              template_type_name(v));
    int64_t i = v.type == TEMPLATE_BOOL ? v.b : v.i;
    if (i < 0) i = i < -n ? -1 : i + n;
    if (i < 0)
        i = backward ? -1 : 0;
    else if (i >= n)
        i = backward ? n - 1 : n;
    *out = i;
    return CHOIR_OK;
}

static choir_status slice_string(template_render *r, template_value v, int64_t start, int64_t step,
                                 size_t count, template_value *out)
{
    size_t from = 0, to = 0;
    CHOIR_TRY(template_string_offset(r, v.s, (size_t)start, &from));
    if (step == 1) {
        CHOIR_TRY(template_string_offset(r, v.s, (size_t)start + count, &to));
        CHOIR_TRY(template_string_value(r, v.s->data + from, to - from, out));
        out->flag = v.flag;
        return CHOIR_OK;
    }
    template_text text = {.r = r};
    bool ascii = v.s->bytes == template_string_chars(v.s);
    CHOIR_TRY(template_charge_bytes(r, v.s->bytes));
    for (size_t i = 0; i < count; i++) { /* walks from character to character, either way */
        uint32_t code;
        size_t n = template_utf8_decode(v.s->data + from, v.s->bytes - from, &code);
        CHOIR_TRY(template_text_add(&text, v.s->data + from, n));
        if (i + 1 == count) break;
        if (ascii) {
            from = (size_t)((int64_t)from + step);
            continue;
        }
        for (int64_t k = step; k > 0; k--)
            from += template_utf8_decode(v.s->data + from, v.s->bytes - from, &code);
        for (int64_t k = step; k < 0; k++) do
                from--;
            while (((unsigned char)v.s->data[from] & 0xc0) == 0x80);
    }
    CHOIR_TRY(template_text_value(&text, out));
    out->flag = v.flag;
    return CHOIR_OK;
}

choir_status template_slice(template_render *r, template_value object,
                            const template_value bounds[3], template_value *out)
{
    size_t length;
    int64_t start, stop, step = 1;
    if (object.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, object);
    if (object.type == TEMPLATE_DICT || object.type == TEMPLATE_VIEW ||
        !template_length(object, &length))
        return template_error(r, "a '%s' cannot be sliced", template_type_name(object));
    int64_t n = (int64_t)length;
    if (template_given(bounds[2]) && bounds[2].type != TEMPLATE_NONE)
        CHOIR_TRY(template_want_int(r, bounds[2], "a slice's step", &step));
    if (step == 0) return template_error(r, "a slice's step is zero");
    CHOIR_TRY(slice_bound(r, bounds[0], n, step < 0, step < 0 ? n - 1 : 0, &start));
    CHOIR_TRY(slice_bound(r, bounds[1], n, step < 0, step < 0 ? -1 : n, &stop));
    size_t count = 0;
    if (step > 0 && start < stop) count = (size_t)((stop - start - 1) / step) + 1;
    if (step < 0 && start > stop)
        count = (size_t)((start - stop - 1) / (step == INT64_MIN ? INT64_MAX : -step)) + 1;
    if (count == 0) start = 0;
    if (object.type == TEMPLATE_STRING) {
        if (count == 0) return template_string_value(r, "", 0, out);
        return slice_string(r, object, start, step, count, out);
    }
    if (object.type == TEMPLATE_RANGE) {
        template_range *range;
        int64_t own = object.range->step;
        CHOIR_TRY(template_alloc(r, sizeof *range, &range));
        if (__builtin_mul_overflow(own, step, &step)) step = own; /* at most one item is left */
        *range = (template_range){object.range->start + start * own,
                                  object.range->start + stop * own, step, count};
        *out = TEMPLATE_VALUE(RANGE, range, range);
        return CHOIR_OK;
    }
    template_list *list;
    CHOIR_TRY(template_charge(r, count / 16));
    CHOIR_TRY(template_list_make(r, count, &list));
    for (size_t i = 0; i < count; i++)
        list->items[list->n++] = object.list->items[start + (int64_t)i * step];
    *out = (template_value){.type = object.type, .list = list};
    return CHOIR_OK;
}

/* ---- Calls ---- */

const template_builtin *template_find_builtin(const template_builtin *table, size_t n,
                                              const template_string *name)
{
    for (size_t i = 0; i < n; i++)
        if (template_string_is(name, table[i].name)) return &table[i];
    return NULL;
}

/* One parameter's name within "a b? c?"; returns where the next begins, or NULL after the last. */
static const char *next_parameter(const char *p, size_t *bytes, bool *optional)
{
    *bytes = strcspn(p, " ");
    const char *next = p[*bytes] == 0 ? NULL : p + *bytes + 1;
    *optional = *bytes > 0 && p[*bytes - 1] == '?';
    *bytes -= *optional;
    return next;
}

static choir_status bind_slots(template_render *r, const template_builtin *f,
                               const template_value *self, const template_arguments *args,
                               template_value *slots)
{
    size_t n = 0, given = 0, bytes, used = 0;
    bool optional;
    if (self != NULL) slots[given++] = *self;
    for (const char *p = f->parameters; p != NULL && *p != 0; n++) {
        const char *name = p;
        p = next_parameter(p, &bytes, &optional);
        if (n < given) continue;
        if (n - given < args->n) {
            slots[n] = args->positional[n - given];
            continue;
        }
        for (size_t i = 0; i < args->n_named; i++)
            if (args->names[i]->bytes == bytes && memcmp(args->names[i]->data, name, bytes) == 0) {
                slots[n] = args->named[i];
                used++;
            }
        if (!template_given(slots[n]) && !optional)
            return template_error(r, "%s: the argument '%.*s' is missing", f->name, (int)bytes,
                                  name);
    }
    if (args->n + given > n)
        return template_error(r, "%s takes at most %zu arguments, got %zu", f->name, n - given,
                              args->n);
    if (used != args->n_named)
        return template_error(r, "%s was given a named argument that it does not have", f->name);
    return CHOIR_OK;
}

choir_status template_call_builtin(template_render *r, const template_builtin *f,
                                   const template_value *self, const template_arguments *args,
                                   template_value *out)
{
    template_value slots[TEMPLATE_MAX_SLOTS] = {{0}};
    if (f->parameters[0] == '*') {
        if (self != NULL) slots[0] = *self;
    } else {
        CHOIR_TRY(bind_slots(r, f, self, args, slots));
    }
    return f->call(r, slots, args, out);
}

static choir_status call_joiner(template_render *r, template_cycler *joiner, template_value *out)
{
    if (joiner->at++ == 0) return template_string_value(r, "", 0, out);
    *out = joiner->items[0];
    return CHOIR_OK;
}

choir_status template_call(template_render *r, template_value callee,
                           const template_arguments *args, template_value *out)
{
    choir_status status;
    if (++r->depth > TEMPLATE_MAX_DEPTH)
        return template_error(r, "the template's evaluation nests deeper than %d",
                              TEMPLATE_MAX_DEPTH);
    switch (callee.type) {
    case TEMPLATE_MACRO:
        status = template_call_macro(r, callee.macro, args, out);
        break;
    case TEMPLATE_FUNCTION:
        status = template_call_builtin(r, callee.function, NULL, args, out);
        break;
    case TEMPLATE_METHOD:
        status = template_call_builtin(r, callee.method->function, &callee.method->self, args, out);
        break;
    case TEMPLATE_JOINER:
        status = call_joiner(r, callee.cycler, out);
        break;
    case TEMPLATE_UNDEFINED:
        return template_undefined_error(r, callee);
    default:
        return template_error(r, "a '%s' cannot be called", template_type_name(callee));
    }
    r->depth--;
    return status;
}

choir_status template_want_string(template_render *r, template_value v, const char *what,
                                  template_string **out)
{
    if (!template_given(v)) return CHOIR_OK;
    if (v.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, v);
    if (v.type != TEMPLATE_STRING)
        return template_error(r, "%s must be a string, not '%s'", what, template_type_name(v));
    *out = v.s;
    return CHOIR_OK;
}

choir_status template_want_int(template_render *r, template_value v, const char *what, int64_t *out)
{
    if (!template_given(v)) return CHOIR_OK;
    if (v.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, v);
    if (v.type != TEMPLATE_INT && v.type != TEMPLATE_BOOL)
        return template_error(r, "%s must be an integer, not '%s'", what, template_type_name(v));
    *out = v.type == TEMPLATE_BOOL ? v.b : v.i;
    return CHOIR_OK;
}
