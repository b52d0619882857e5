/* Compiling and rendering: the two calls of the header, the functions templates can call, and JSON
 * as their values. */
#include "engine/chat_template.h"
#include "engine/chat_template_render.h"
#include <locale.h>
#include <time.h>
#include <utf8proc.h>

struct choir_chat_template {
    template_pool pool;
    template_tree tree;
};

/* ---- JSON in ---- */

static choir_status from_json_array(template_render *r, const json_t *json, template_value *out)
{
    template_list *list;
    size_t n = json_array_size(json);
    CHOIR_TRY(template_list_make(r, n, &list));
    for (size_t i = 0; i < n; i++)
        CHOIR_TRY(template_from_json(r, json_array_get(json, i), &list->items[i]));
    list->n = n;
    *out = TEMPLATE_VALUE(LIST, list, list);
    return CHOIR_OK;
}

static choir_status from_json_object(template_render *r, const json_t *json, template_value *out)
{
    template_dict *d;
    json_t *object = (json_t *)json; /* jansson's iteration reads only, though it asks for more */
    CHOIR_TRY(template_dict_make(r, &d));
    for (void *at = json_object_iter(object); at != NULL; at = json_object_iter_next(object, at)) {
        template_value key, v = {0};
        CHOIR_TRY(
            template_string_value(r, json_object_iter_key(at), json_object_iter_key_len(at), &key));
        CHOIR_TRY(template_from_json(r, json_object_iter_value(at), &v));
        CHOIR_TRY(template_dict_set(r, d, key, v));
    }
    *out = TEMPLATE_VALUE(DICT, dict, d);
    return CHOIR_OK;
}

choir_status template_from_json(template_render *r, const json_t *json, template_value *out)
{
    choir_status status;
    CHOIR_TRY(template_charge(r, 1));
    if (++r->value_depth > TEMPLATE_MAX_VALUE_DEPTH)
        return template_error(r, "a variable is nested deeper than %d", TEMPLATE_MAX_VALUE_DEPTH);
    switch (json_typeof(json)) {
    case JSON_NULL:
        *out = template_none();
        status = CHOIR_OK;
        break;
    case JSON_TRUE:
    case JSON_FALSE:
        *out = template_bool(json_is_true(json));
        status = CHOIR_OK;
        break;
    case JSON_INTEGER:
        *out = template_int(json_integer_value(json));
        status = CHOIR_OK;
        break;
    case JSON_REAL:
        *out = template_float(json_real_value(json));
        status = CHOIR_OK;
        break;
    case JSON_STRING:
        status = template_string_value(r, json_string_value(json), json_string_length(json), out);
        break;
    case JSON_ARRAY:
        status = from_json_array(r, json, out);
        break;
    default:
        status = from_json_object(r, json, out);
        break;
    }
    r->value_depth--;
    return status;
}

/* ---- Functions ---- */

static choir_status raise_exception(template_render *r, template_value *slots,
                                    const template_arguments *all, template_value *out)
{
    template_string *s;
    (void)all;
    (void)out;
    CHOIR_TRY(template_to_string(r, slots[0], &s));
    return choir_fail(CHOIR_E_INVALID, "the model's chat template refuses this conversation: %.*s",
                      s->bytes > 900 ? 900 : (int)s->bytes, s->data);
}

/* Python's format as the C library wants it: %f is spelt out (now_s has no microseconds) and the
 * zone of a time without one is empty. `pattern` has room for 256 bytes. */
static choir_status translate_format(template_render *r, const template_string *format,
                                     char *pattern)
{
    size_t n = 0;
    pattern[n++] = 'x'; /* tells an empty result from one that did not fit */
    if (memchr(format->data, 0, format->bytes) != NULL)
        return template_error(r, "strftime_now's format holds a zero byte");
    for (size_t i = 0; i < format->bytes; i++) {
        char next = i + 1 < format->bytes ? format->data[i + 1] : 0;
        if (n + 8 >= 256) return template_error(r, "strftime_now's format is too long");
        if (format->data[i] != '%' || next == 0) {
            pattern[n++] = format->data[i];
            continue;
        }
        i++;
        if (next == 'Z' || next == 'z') continue;
        memcpy(pattern + n, next == 'f' ? "000000" : format->data + i - 1, next == 'f' ? 6 : 2);
        n += next == 'f' ? 6 : 2;
    }
    pattern[n] = 0;
    return CHOIR_OK;
}

static choir_status strftime_now(template_render *r, template_value *slots,
                                 const template_arguments *all, template_value *out)
{
    template_string *s = NULL;
    struct tm tm;
    time_t now = (time_t)r->now_s;
    char text[1024], pattern[256];
    (void)all;
    CHOIR_TRY(template_want_string(r, slots[0], "strftime_now's format", &s));
    CHOIR_TRY(translate_format(r, s, pattern));
    if (gmtime_r(&now, &tm) == NULL)
        return template_error(r, "the time %" PRId64 " is out of range", r->now_s);
    locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (c_locale == (locale_t)0) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a locale");
    size_t n = strftime_l(text, sizeof text, pattern, &tm, c_locale);
    freelocale(c_locale);
    if (n == 0) return template_error(r, "strftime_now's result is longer than 1023 bytes");
    CHOIR_TRY(template_string_make(&r->pool, text + 1, n - 1, true, &s));
    *out = TEMPLATE_VALUE(STRING, s, s);
    return CHOIR_OK;
}

static choir_status make_range(template_render *r, template_value *slots,
                               const template_arguments *all, template_value *out)
{
    template_range *range;
    int64_t a[3] = {0, 0, 1};
    (void)all;
    for (size_t i = 0; i < 3; i++) CHOIR_TRY(template_want_int(r, slots[i], "range", &a[i]));
    if (!template_given(slots[1])) {
        a[1] = a[0];
        a[0] = 0;
    }
    if (a[2] == 0) return template_error(r, "range: the step is zero");
    CHOIR_TRY(template_alloc(r, sizeof *range, &range));
    uint64_t n = 0;
    if (a[2] > 0 && a[0] < a[1]) n = ((uint64_t)a[1] - (uint64_t)a[0] - 1) / (uint64_t)a[2] + 1;
    if (a[2] < 0 && a[0] > a[1]) n = ((uint64_t)a[0] - (uint64_t)a[1] - 1) / -(uint64_t)a[2] + 1;
    if (n > TEMPLATE_MAX_RANGE)
        return template_error(r, "a range of %" PRIu64 " items is longer than %d", n,
                              TEMPLATE_MAX_RANGE);
    *range = (template_range){a[0], a[1], a[2], (size_t)n};
    *out = TEMPLATE_VALUE(RANGE, range, range);
    return CHOIR_OK;
}

/* dict(pairs or a dict, name=value, …) */
static choir_status fill_dict(template_render *r, const template_arguments *all,
                              template_dict **out)
{
    template_iterator it;
    CHOIR_TRY(template_dict_make(r, out));
    if (all->n > 1) return template_error(r, "dict takes at most one positional argument");
    if (all->n == 1) {
        template_value from = all->positional[0], item;
        if (from.type == TEMPLATE_DICT) {
            from.type = TEMPLATE_VIEW;
            from.flag = TEMPLATE_ITEMS;
        }
        CHOIR_TRY(template_iterate(r, from, &it));
        for (;;) {
            bool found = false;
            template_list *pair;
            CHOIR_TRY(template_next(r, &it, &item, &found));
            if (!found) break;
            CHOIR_TRY(template_to_list(r, item, &pair));
            if (pair->n != 2) return template_error(r, "dict wants pairs, got %zu items", pair->n);
            CHOIR_TRY(template_dict_set(r, *out, pair->items[0], pair->items[1]));
        }
    }
    for (size_t i = 0; i < all->n_named; i++) {
        template_value key = TEMPLATE_VALUE(STRING, s, (template_string *)all->names[i]);
        CHOIR_TRY(template_dict_set(r, *out, key, all->named[i]));
    }
    return CHOIR_OK;
}

static choir_status make_dict(template_render *r, template_value *slots,
                              const template_arguments *all, template_value *out)
{
    template_dict *d;
    (void)slots;
    CHOIR_TRY(fill_dict(r, all, &d));
    *out = TEMPLATE_VALUE(DICT, dict, d);
    return CHOIR_OK;
}

static choir_status make_namespace(template_render *r, template_value *slots,
                                   const template_arguments *all, template_value *out)
{
    template_dict *d;
    (void)slots;
    CHOIR_TRY(fill_dict(r, all, &d));
    for (size_t i = 0; i < d->n; i++) {
        template_value key = d->entries[i].key;
        if (key.type == TEMPLATE_STRING && key.s->bytes > 0 && key.s->data[0] == '_')
            return template_error(r, "a namespace keeps no attributes that begin with _");
    }
    *out = TEMPLATE_VALUE(NAMESPACE, dict, d);
    return CHOIR_OK;
}

static choir_status make_cycler(template_render *r, template_value *slots,
                                const template_arguments *all, template_value *out)
{
    template_cycler *cycler;
    (void)slots;
    if (all->n == 0 || all->n_named > 0)
        return template_error(r, "cycler wants the items to go through");
    CHOIR_TRY(template_alloc(r, sizeof *cycler, &cycler));
    *cycler = (template_cycler){all->positional, all->n, 0};
    *out = TEMPLATE_VALUE(CYCLER, cycler, cycler);
    return CHOIR_OK;
}

static choir_status make_joiner(template_render *r, template_value *slots,
                                const template_arguments *all, template_value *out)
{
    template_cycler *joiner;
    (void)all;
    CHOIR_TRY(template_alloc(r, sizeof *joiner + sizeof *joiner->items, &joiner));
    *joiner = (template_cycler){(template_value *)(joiner + 1), 1, 0};
    joiner->items[0] = slots[0];
    if (!template_given(slots[0])) CHOIR_TRY(template_string_value(r, ", ", 2, &joiner->items[0]));
    *out = TEMPLATE_VALUE(JOINER, cycler, joiner);
    return CHOIR_OK;
}

const template_builtin *template_find_global(const template_string *name)
{
    static const template_builtin globals[] = {
        {"raise_exception", "message", raise_exception},
        {"strftime_now", "format", strftime_now},
        {"range", "start stop? step?", make_range},
        {"namespace", "*", make_namespace},
        {"dict", "*", make_dict},
        {"cycler", "*", make_cycler},
        {"joiner", "sep?", make_joiner},
    };
    return template_find_builtin(globals, sizeof globals / sizeof *globals, name);
}

/* ---- The header's calls ---- */

static choir_status check_utf8(const char *source, size_t bytes)
{
    const utf8proc_uint8_t *p = (const utf8proc_uint8_t *)source;
    uint32_t line = 1;
    for (size_t i = 0; i < bytes;) {
        utf8proc_int32_t code;
        utf8proc_ssize_t n = utf8proc_iterate(p + i, (utf8proc_ssize_t)(bytes - i), &code);
        if (n < 1) return template_refuse(line, "the chat template is not UTF-8 at byte %zu", i);
        line += code == '\n';
        i += (size_t)n;
    }
    return CHOIR_OK;
}

choir_status choir_chat_template_compile(const char *source, size_t bytes,
                                         choir_chat_template **out)
{
    choir_status status;
    *out = NULL;
    if (bytes > TEMPLATE_MAX_SOURCE)
        return choir_fail(CHOIR_E_FULL, "a chat template of %zu bytes is longer than %zu MiB",
                          bytes, TEMPLATE_MAX_SOURCE >> 20);
    CHOIR_TRY(check_utf8(source, bytes));
    choir_chat_template *t = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *t);
    if (t == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a chat template");
    CHOIR_TRY_TO(fail, status, template_pool_open(&t->pool, TEMPLATE_MAX_TREE));
    CHOIR_TRY_TO(fail, status, template_parse(&t->pool, source, bytes, &t->tree));
    *out = t;
    return CHOIR_OK;
fail:
    choir_chat_template_destroy(t);
    return status;
}

void choir_chat_template_destroy(choir_chat_template *chat_template)
{
    if (chat_template == NULL) return;
    template_pool_close(&chat_template->pool);
    choir_free(chat_template);
}

choir_status choir_chat_template_render(const choir_chat_template *chat_template,
                                        const json_t *variables, int64_t now_s, char **text,
                                        size_t *bytes)
{
    choir_status status;
    template_render r = {.tree = &chat_template->tree,
                         .variables = variables,
                         .now_s = now_s,
                         .steps_left = TEMPLATE_MAX_STEPS,
                         .line = 1};
    template_text out = {.r = &r, .owned = true};
    template_frame top = {0};
    *text = NULL;
    *bytes = 0;
    r.out = &out;
    r.frame = &top;
    CHOIR_TRY(template_pool_open(&r.pool, TEMPLATE_MAX_VALUES));
    r.pool.line = &r.line;
    CHOIR_TRY_TO(done, status, template_exec_body(&r, r.tree->body->list, r.tree->body->n));
    if (out.data == NULL) out.data = choir_alloc(CHOIR_MEM_REQUESTS, 1);
    if (out.data == NULL) status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for a rendered prompt");
done:
    template_pool_close(&r.pool);
    if (status != CHOIR_OK) {
        choir_free(out.data);
        return status;
    }
    out.data[out.bytes] = 0;
    *text = out.data;
    *bytes = out.bytes;
    return CHOIR_OK;
}
