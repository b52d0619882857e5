/* Growing text, and values as text: Python's str() and repr(), and json.dumps(). */
#include "engine/chat_template_render.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static choir_status reserve(template_text *t, size_t bytes)
{
    if (t->capacity - t->bytes >= bytes) return CHOIR_OK;
    size_t need;
    if (__builtin_add_overflow(t->bytes, bytes, &need)) need = SIZE_MAX / 4;
    size_t want = need < 128 ? 256 : 2 * need;
    if (t->owned) {
        if (need > TEMPLATE_MAX_OUTPUT)
            return choir_fail(CHOIR_E_FULL,
                              "line %u: the chat template's output is longer than %zu MiB",
                              t->r->line, TEMPLATE_MAX_OUTPUT >> 20);
        char *data = choir_realloc(CHOIR_MEM_REQUESTS, t->data, want + 1);
        if (data == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu bytes of a rendered prompt",
                              want);
        t->data = data;
    } else {
        template_pool *pool = &t->r->pool;
        size_t more = want - t->capacity;
        /* The newest allocation grows where it lies. */
        if (t->data != NULL && t->data + t->capacity == pool->next && (t->capacity & 15) == 0 &&
            more <= pool->left && more <= pool->limit - pool->used) {
            more = (more & ~(size_t)15);
            if (t->capacity + more >= need) {
                pool->next += more;
                pool->left -= more;
                pool->used += more;
                t->capacity += more;
                return CHOIR_OK;
            }
        }
        if (want > pool->limit - pool->used) want = need;
        char *data;
        want = (want + 15) & ~(size_t)15;
        CHOIR_TRY(template_pool_alloc(pool, want, &data));
        if (t->bytes > 0) memcpy(data, t->data, t->bytes);
        t->data = data;
    }
    t->capacity = want;
    return CHOIR_OK;
}

choir_status template_text_add(template_text *t, const char *data, size_t bytes)
{
    if (bytes == 0) return CHOIR_OK;
    if (bytes >= TEMPLATE_STEP_BYTES) CHOIR_TRY(template_charge_bytes(t->r, bytes));
    CHOIR_TRY(reserve(t, bytes));
    memcpy(t->data + t->bytes, data, bytes);
    t->bytes += bytes;
    return CHOIR_OK;
}

choir_status template_text_add_char(template_text *t, uint32_t code, size_t times)
{
    char c[4];
    size_t n = template_utf8_encode(code, c), total;
    if (__builtin_mul_overflow(n, times, &total)) total = SIZE_MAX / 4;
    CHOIR_TRY(reserve(t, total));
    CHOIR_TRY(template_charge(t->r, times / TEMPLATE_STEP_BYTES));
    for (; times > 0; times--, t->bytes += n) memcpy(t->data + t->bytes, c, n);
    return CHOIR_OK;
}

choir_status template_text_addf(template_text *t, const char *format, ...)
{
    char buffer[400];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    if (n >= (int)sizeof buffer) n = (int)sizeof buffer - 1;
    return template_text_add(t, buffer, (size_t)n);
}

choir_status template_text_value(template_text *t, template_value *out)
{
    return template_string_value(t->r, t->data, t->bytes, out);
}

void template_float_repr(double f, char *out)
{
    if (isnan(f) || isinf(f)) {
        strcpy(out, isnan(f) ? "nan" : f < 0 ? "-inf" : "inf");
        return;
    }
    char digits[40];
    int precision = 0;
    do snprintf(digits, sizeof digits, "%.*e", precision, f);
    while (strtod(digits, NULL) != f && ++precision < 17);
    int exponent = atoi(strchr(digits, 'e') + 1);
    if (exponent < -4 || exponent >= 16) {
        size_t n = (size_t)(strchr(digits, 'e') - digits); /* at most 19: sign, 17 digits, point */
        memcpy(out, digits, n);
        snprintf(out + n, 32 - n, "e%c%02d", exponent < 0 ? '-' : '+', abs(exponent));
        return;
    }
    int decimals = precision - exponent;
    snprintf(out, 32, "%.*f", decimals < 1 ? 1 : decimals, f);
}

static choir_status add_escape(template_text *t, uint32_t code)
{
    if (code < 0x100) return template_text_addf(t, "\\x%02x", code);
    return template_text_addf(t, code < 0x10000 ? "\\u%04x" : "\\U%08x", code);
}

static choir_status repr_string(template_text *t, const template_string *s)
{
    bool single = memchr(s->data, '\'', s->bytes) != NULL;
    char quote = single && memchr(s->data, '"', s->bytes) == NULL ? '"' : '\'';
    CHOIR_TRY(template_charge_bytes(t->r, s->bytes * 4));
    CHOIR_TRY(template_text_add(t, &quote, 1));
    for (size_t i = 0; i < s->bytes;) {
        uint32_t code;
        size_t n = template_utf8_decode(s->data + i, s->bytes - i, &code);
        if (code == (uint32_t)quote || code == '\\') {
            CHOIR_TRY(template_text_addf(t, "\\%c", (char)code));
        } else if (code == '\n' || code == '\r' || code == '\t') {
            CHOIR_TRY(template_text_add(t, code == '\n' ? "\\n" : code == '\r' ? "\\r" : "\\t", 2));
        } else if (!template_is_printable(code)) {
            CHOIR_TRY(add_escape(t, code));
        } else {
            CHOIR_TRY(template_text_add(t, s->data + i, n));
        }
        i += n;
    }
    return template_text_add(t, &quote, 1);
}

static choir_status repr_list(template_text *t, const template_list *list, const char *marks)
{
    CHOIR_TRY(template_text_add(t, marks, 1));
    for (size_t i = 0; i < list->n; i++) {
        if (i > 0) CHOIR_TRY(template_text_add(t, ", ", 2));
        CHOIR_TRY(template_text_repr(t, list->items[i]));
    }
    if (*marks == '(' && list->n == 1) CHOIR_TRY(template_text_add(t, ",", 1));
    return template_text_add(t, marks + 1, 1);
}

static choir_status repr_dict(template_text *t, const template_dict *d)
{
    CHOIR_TRY(template_text_add(t, "{", 1));
    for (size_t i = 0; i < d->n; i++) {
        if (i > 0) CHOIR_TRY(template_text_add(t, ", ", 2));
        CHOIR_TRY(template_text_repr(t, d->entries[i].key));
        CHOIR_TRY(template_text_add(t, ": ", 2));
        CHOIR_TRY(template_text_repr(t, d->entries[i].value));
    }
    return template_text_add(t, "}", 1);
}

static choir_status repr_view(template_text *t, template_value v)
{
    template_list *list;
    CHOIR_TRY(template_to_list(t->r, v, &list));
    CHOIR_TRY(template_text_addf(t, "%s(", template_type_name(v)));
    CHOIR_TRY(repr_list(t, list, "[]"));
    return template_text_add(t, ")", 1);
}

static choir_status repr_range(template_text *t, const template_range *range)
{
    CHOIR_TRY(template_text_addf(t, "range(%" PRId64 ", %" PRId64, range->start, range->stop));
    if (range->step != 1) CHOIR_TRY(template_text_addf(t, ", %" PRId64, range->step));
    return template_text_add(t, ")", 1);
}

static choir_status repr(template_text *t, template_value v)
{
    char number[32];
    switch (v.type) {
    case TEMPLATE_NONE:
        return template_text_add(t, "None", 4);
    case TEMPLATE_BOOL:
        return template_text_add(t, v.b ? "True" : "False", v.b ? 4 : 5);
    case TEMPLATE_INT:
        return template_text_addf(t, "%" PRId64, v.i);
    case TEMPLATE_FLOAT:
        template_float_repr(v.f, number);
        return template_text_add(t, number, strlen(number));
    case TEMPLATE_STRING:
        if (v.flag == 0) return repr_string(t, v.s);
        CHOIR_TRY(template_text_add(t, "Markup(", 7));
        CHOIR_TRY(repr_string(t, v.s));
        return template_text_add(t, ")", 1);
    case TEMPLATE_LIST:
        return repr_list(t, v.list, "[]");
    case TEMPLATE_TUPLE:
        return repr_list(t, v.list, "()");
    case TEMPLATE_DICT:
        return repr_dict(t, v.dict);
    case TEMPLATE_VIEW:
        return repr_view(t, v);
    case TEMPLATE_RANGE:
        return repr_range(t, v.range);
    case TEMPLATE_NAMESPACE:
        CHOIR_TRY(template_text_add(t, "<Namespace ", 11));
        CHOIR_TRY(repr_dict(t, v.dict));
        return template_text_add(t, ">", 1);
    case TEMPLATE_MACRO:
        CHOIR_TRY(template_text_add(t, "<Macro ", 7));
        if (v.macro->node->name == NULL) return template_text_add(t, "anonymous>", 10);
        CHOIR_TRY(repr_string(t, v.macro->node->name));
        return template_text_add(t, ">", 1);
    case TEMPLATE_UNDEFINED:
        return template_text_add(t, "Undefined", 9);
    default:
        return template_text_addf(t, "<%s object>", template_type_name(v));
    }
}

choir_status template_text_repr(template_text *t, template_value v)
{
    template_render *r = t->r;
    CHOIR_TRY(template_charge(r, 1));
    if (++r->value_depth > TEMPLATE_MAX_VALUE_DEPTH)
        return template_error(r, "a value is nested deeper than %d", TEMPLATE_MAX_VALUE_DEPTH);
    CHOIR_TRY(repr(t, v));
    r->value_depth--;
    return CHOIR_OK;
}

choir_status template_text_str(template_text *t, template_value v)
{
    if (v.type == TEMPLATE_STRING) return template_text_add(t, v.s->data, v.s->bytes);
    if (v.type == TEMPLATE_UNDEFINED) return CHOIR_OK;
    return template_text_repr(t, v);
}

choir_status template_to_string(template_render *r, template_value v, template_string **out)
{
    if (v.type == TEMPLATE_STRING) {
        *out = v.s;
        return CHOIR_OK;
    }
    template_text t = {.r = r};
    CHOIR_TRY(template_text_str(&t, v));
    return template_string_make(&r->pool, t.data, t.bytes, false, out);
}

/* ---- JSON ---- */

static choir_status json_string_text(template_text *t, const template_string *s, bool ascii)
{
    static const char shorts[] = /* pairs: the character, its letter */
        "\bb\ff\nn\rr\tt\"\"\\\\";
    CHOIR_TRY(template_charge_bytes(t->r, s->bytes * 4));
    CHOIR_TRY(template_text_add(t, "\"", 1));
    for (size_t i = 0, from = 0; i <= s->bytes;) {
        uint32_t code = 0;
        size_t n = 1;
        if (i < s->bytes) n = template_utf8_decode(s->data + i, s->bytes - i, &code);
        bool plain = code >= 0x20 && code != '"' && code != '\\' && (!ascii || code < 0x7f);
        if (i < s->bytes && plain) {
            i += n;
            continue;
        }
        CHOIR_TRY(template_text_add(t, s->data + from, i - from)); /* the plain part before */
        if (i == s->bytes) break;
        const char *p = code < 0x80 && code != 0 ? strchr(shorts, (int)code) : NULL;
        if (p != NULL)
            CHOIR_TRY(template_text_addf(t, "\\%c", p[1]));
        else if (code < 0x10000)
            CHOIR_TRY(template_text_addf(t, "\\u%04x", code));
        else
            CHOIR_TRY(template_text_addf(t, "\\u%04x\\u%04x", 0xd800 + ((code - 0x10000) >> 10),
                                         0xdc00 + (code & 0x3ff)));
        from = i += n;
    }
    return template_text_add(t, "\"", 1);
}

static choir_status json_float(template_text *t, double f)
{
    char number[32];
    template_float_repr(f, number);
    const char *text = isnan(f) ? "NaN" : isinf(f) ? (f < 0 ? "-Infinity" : "Infinity") : number;
    return template_text_add(t, text, strlen(text));
}

static choir_status json_line(template_text *t, const template_json *o, int level)
{
    CHOIR_TRY(template_text_add(t, "\n", 1));
    for (int i = 0; i < level; i++) {
        if (o->indent_text != NULL)
            CHOIR_TRY(template_text_add(t, o->indent_text->data, o->indent_text->bytes));
        else
            CHOIR_TRY(template_text_add_char(t, ' ', (size_t)o->indent));
    }
    return CHOIR_OK;
}

static choir_status json_key(template_text *t, template_value key, const template_json *o)
{
    if (key.type == TEMPLATE_STRING) return json_string_text(t, key.s, o->ascii);
    CHOIR_TRY(template_text_add(t, "\"", 1));
    switch (key.type) {
    case TEMPLATE_FLOAT:
        CHOIR_TRY(json_float(t, key.f));
        break;
    case TEMPLATE_BOOL:
        CHOIR_TRY(template_text_add(t, key.b ? "true" : "false", key.b ? 4 : 5));
        break;
    case TEMPLATE_NONE:
        CHOIR_TRY(template_text_add(t, "null", 4));
        break;
    case TEMPLATE_INT:
        CHOIR_TRY(template_text_addf(t, "%" PRId64, key.i));
        break;
    default:
        return template_error(t->r, "tojson: keys must be str, int, float, bool or None, not %s",
                              template_type_name(key));
    }
    return template_text_add(t, "\"", 1);
}

/* Insertion sort by binary search: objects of tools are small, and every comparison is charged. */
static choir_status sorted_keys(template_render *r, const template_dict *d,
                                const template_entry ***out)
{
    CHOIR_TRY(template_alloc_n(r, d->n + 1, sizeof **out, out));
    for (size_t i = 0; i < d->n; i++) {
        size_t low = 0, high = i;
        while (low < high) {
            size_t middle = (low + high) / 2;
            int order;
            CHOIR_TRY(template_compare(r, d->entries[i].key, (*out)[middle]->key, &order));
            if (order < 0)
                high = middle;
            else
                low = middle + 1;
        }
        CHOIR_TRY(template_charge(r, (i - low) / 32));
        memmove(*out + low + 1, *out + low, (i - low) * sizeof **out);
        (*out)[low] = &d->entries[i];
    }
    return CHOIR_OK;
}

static choir_status json_value(template_text *t, template_value v, const template_json *o,
                               int level);

static choir_status json_list(template_text *t, const template_list *list, const template_json *o,
                              int level)
{
    if (list->n == 0) return template_text_add(t, "[]", 2);
    CHOIR_TRY(template_text_add(t, "[", 1));
    for (size_t i = 0; i < list->n; i++) {
        if (i > 0)
            CHOIR_TRY(template_text_add(t, o->item_separator->data, o->item_separator->bytes));
        if (o->indent >= 0) CHOIR_TRY(json_line(t, o, level + 1));
        CHOIR_TRY(json_value(t, list->items[i], o, level + 1));
    }
    if (o->indent >= 0) CHOIR_TRY(json_line(t, o, level));
    return template_text_add(t, "]", 1);
}

static choir_status json_dict(template_text *t, const template_dict *d, const template_json *o,
                              int level)
{
    const template_entry **sorted = NULL;
    if (d->n == 0) return template_text_add(t, "{}", 2);
    if (o->sort_keys) CHOIR_TRY(sorted_keys(t->r, d, &sorted));
    CHOIR_TRY(template_text_add(t, "{", 1));
    for (size_t i = 0; i < d->n; i++) {
        const template_entry *e = sorted != NULL ? sorted[i] : &d->entries[i];
        if (i > 0)
            CHOIR_TRY(template_text_add(t, o->item_separator->data, o->item_separator->bytes));
        if (o->indent >= 0) CHOIR_TRY(json_line(t, o, level + 1));
        CHOIR_TRY(json_key(t, e->key, o));
        CHOIR_TRY(template_text_add(t, o->key_separator->data, o->key_separator->bytes));
        CHOIR_TRY(json_value(t, e->value, o, level + 1));
    }
    if (o->indent >= 0) CHOIR_TRY(json_line(t, o, level));
    return template_text_add(t, "}", 1);
}

static choir_status json_value(template_text *t, template_value v, const template_json *o,
                               int level)
{
    CHOIR_TRY(template_charge(t->r, 1));
    if (level > TEMPLATE_MAX_VALUE_DEPTH)
        return template_error(t->r, "tojson: a value is nested deeper than %d",
                              TEMPLATE_MAX_VALUE_DEPTH);
    switch (v.type) {
    case TEMPLATE_NONE:
        return template_text_add(t, "null", 4);
    case TEMPLATE_BOOL:
        return template_text_add(t, v.b ? "true" : "false", v.b ? 4 : 5);
    case TEMPLATE_INT:
        return template_text_addf(t, "%" PRId64, v.i);
    case TEMPLATE_FLOAT:
        return json_float(t, v.f);
    case TEMPLATE_STRING:
        return json_string_text(t, v.s, o->ascii);
    case TEMPLATE_LIST:
    case TEMPLATE_TUPLE:
        return json_list(t, v.list, o, level);
    case TEMPLATE_DICT:
        return json_dict(t, v.dict, o, level);
    default:
        return template_error(t->r, "tojson: an object of type %s is not JSON",
                              template_type_name(v));
    }
}

choir_status template_text_json(template_text *t, template_value v, const template_json *options)
{
    return json_value(t, v, options, 0);
}
