/* Jinja's filters of text and numbers, tojson as the transformers library has it, and the table of
 * all filters. Those of sequences are in chat_template_sequences.c. */
#include "engine/chat_template_render.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>

#define FILTER(name)                                                                               \
    static choir_status name(template_render *r, template_value *slots,                            \
                             const template_arguments *all, template_value *out)

/* A value as Jinja's soft_str gives it. */
static choir_status as_text(template_render *r, template_value v, template_value *out)
{
    template_string *s;
    if (v.type == TEMPLATE_STRING) {
        *out = v;
        return CHOIR_OK;
    }
    CHOIR_TRY(template_to_string(r, v, &s));
    *out = TEMPLATE_VALUE(STRING, s, s);
    return CHOIR_OK;
}

/* The method of strings by this name, on the value as text. */
static choir_status by_method(template_render *r, const char *name, template_value *slots, size_t n,
                              template_value *out)
{
    const template_string key = {name, strlen(name), strlen(name), NULL};
    const template_arguments args = {.positional = slots + 1, .n = n};
    template_value text;
    CHOIR_TRY(as_text(r, slots[0], &text));
    return template_call_builtin(r, template_find_string_method(&key), &text, &args, out);
}

FILTER(filter_upper)
{
    return (void)all, by_method(r, "upper", slots, 0, out);
}
FILTER(filter_lower)
{
    return (void)all, by_method(r, "lower", slots, 0, out);
}
FILTER(filter_capitalize)
{
    return (void)all, by_method(r, "capitalize", slots, 0, out);
}

FILTER(filter_trim)
{
    (void)all;
    return by_method(r, "strip", slots, template_given(slots[1]), out);
}

FILTER(filter_center)
{
    (void)all;
    if (!template_given(slots[1])) slots[1] = template_int(80);
    return by_method(r, "center", slots, 1, out);
}

FILTER(filter_replace)
{
    (void)all;
    CHOIR_TRY(as_text(r, slots[1], &slots[1]));
    CHOIR_TRY(as_text(r, slots[2], &slots[2]));
    bool limited = template_given(slots[3]) && slots[3].type != TEMPLATE_NONE;
    return by_method(r, "replace", slots, limited ? 3 : 2, out);
}

FILTER(filter_string)
{
    return (void)all, as_text(r, slots[0], out);
}

FILTER(filter_safe)
{
    template_string *s;
    (void)all;
    CHOIR_TRY(template_to_string(r, slots[0], &s));
    *out = TEMPLATE_VALUE(STRING, s, s);
    out->flag = 1;
    return CHOIR_OK;
}

static bool starts_word(uint32_t c)
{
    return c == '-' || c == '(' || c == '{' || c == '[' || c == '<' || template_is_space(c);
}

/* Words begin after whitespace and opening marks; not everywhere str.title() begins one. */
FILTER(filter_title)
{
    template_text text = {.r = r};
    template_string *s;
    (void)all;
    CHOIR_TRY(template_to_string(r, slots[0], &s));
    for (size_t i = 0; i < s->bytes;) {
        size_t from = i, first;
        uint32_t code;
        template_value part;
        first = i += template_utf8_decode(s->data + i, s->bytes - i, &code);
        bool separator = starts_word(code);
        while (i < s->bytes) {
            size_t n = template_utf8_decode(s->data + i, s->bytes - i, &code);
            if (starts_word(code) != separator) break;
            i += n;
        }
        template_string head = {s->data + from, first - from, SIZE_MAX, NULL};
        template_string tail = {s->data + first, i - first, SIZE_MAX, NULL};
        CHOIR_TRY(template_change_case(r, &head, TEMPLATE_UPPER, &part));
        CHOIR_TRY(template_text_add(&text, part.s->data, part.s->bytes));
        CHOIR_TRY(template_change_case(r, &tail, TEMPLATE_LOWER, &part));
        CHOIR_TRY(template_text_add(&text, part.s->data, part.s->bytes));
    }
    return template_text_value(&text, out);
}

FILTER(filter_indent)
{
    template_text text = {.r = r};
    template_string *width = NULL;
    int64_t spaces = 4;
    bool first = template_given(slots[2]) && template_truth(slots[2]);
    bool blank = template_given(slots[3]) && template_truth(slots[3]);
    template_value lines;
    (void)all;
    if (slots[1].type == TEMPLATE_STRING)
        width = slots[1].s;
    else
        CHOIR_TRY(template_want_int(r, slots[1], "indent's width", &spaces));
    if (slots[0].type != TEMPLATE_STRING) {
        template_string *not_text;
        return template_want_string(r, slots[0], "what is indented", &not_text);
    }
    template_string newline = {"\n", 1, 1, NULL};
    CHOIR_TRY(template_string_concat(r, slots[0].s, &newline, &slots[0]));
    CHOIR_TRY(by_method(r, "splitlines", slots, 0, &lines));
    for (size_t i = 0; i < lines.list->n; i++) {
        const template_string *line = lines.list->items[i].s;
        bool indented = i == 0 ? first : blank || line->bytes > 0;
        if (i > 0) CHOIR_TRY(template_text_add(&text, "\n", 1));
        if (indented && width != NULL)
            CHOIR_TRY(template_text_add(&text, width->data, width->bytes));
        else if (indented && spaces > 0)
            CHOIR_TRY(template_text_add_char(&text, ' ', (size_t)spaces));
        CHOIR_TRY(template_text_add(&text, line->data, line->bytes));
    }
    return template_text_value(&text, out);
}

FILTER(filter_escape)
{
    template_text text = {.r = r};
    template_string *s;
    (void)all;
    if (slots[0].type == TEMPLATE_STRING && slots[0].flag != 0) {
        *out = slots[0];
        return CHOIR_OK;
    }
    CHOIR_TRY(template_to_string(r, slots[0], &s));
    CHOIR_TRY(template_charge_bytes(r, s->bytes));
    for (size_t i = 0; i < s->bytes; i++) {
        char c = s->data[i];
        const char *entity = c == '&'    ? "&amp;"
                             : c == '<'  ? "&lt;"
                             : c == '>'  ? "&gt;"
                             : c == '"'  ? "&#34;"
                             : c == '\'' ? "&#39;"
                                         : NULL;
        if (entity != NULL)
            CHOIR_TRY(template_text_add(&text, entity, strlen(entity)));
        else
            CHOIR_TRY(template_text_add(&text, &c, 1));
    }
    CHOIR_TRY(template_text_value(&text, out));
    out->flag = 1;
    return CHOIR_OK;
}

FILTER(filter_forceescape)
{
    slots[0].flag = 0;
    return filter_escape(r, slots, all, out);
}

static choir_status quote_url(template_text *t, template_value v, bool slashes)
{
    template_string *s;
    CHOIR_TRY(template_to_string(t->r, v, &s));
    CHOIR_TRY(template_charge_bytes(t->r, 4 * s->bytes));
    for (size_t i = 0; i < s->bytes; i++) {
        unsigned char c = (unsigned char)s->data[i];
        bool plain = (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z') ||
                     c == '_' || c == '.' || c == '-' || c == '~' || (c == '/' && slashes);
        if (plain)
            CHOIR_TRY(template_text_add(t, (const char *)&c, 1));
        else if (c == ' ' && !slashes)
            CHOIR_TRY(template_text_add(t, "+", 1));
        else
            CHOIR_TRY(template_text_addf(t, "%%%02X", c));
    }
    return CHOIR_OK;
}

FILTER(filter_urlencode)
{
    template_text text = {.r = r};
    template_iterator it;
    template_value pairs = slots[0];
    (void)all;
    if (pairs.type == TEMPLATE_STRING || !template_iterable(pairs)) {
        CHOIR_TRY(quote_url(&text, pairs, true));
        return template_text_value(&text, out);
    }
    if (pairs.type == TEMPLATE_DICT) {
        pairs.type = TEMPLATE_VIEW;
        pairs.flag = TEMPLATE_ITEMS;
    }
    CHOIR_TRY(template_iterate(r, pairs, &it));
    for (bool first = true;; first = false) {
        template_value item;
        template_list *pair;
        bool found = false;
        CHOIR_TRY(template_next(r, &it, &item, &found));
        if (!found) return template_text_value(&text, out);
        CHOIR_TRY(template_to_list(r, item, &pair));
        if (pair->n != 2) return template_error(r, "urlencode wants pairs, got %zu items", pair->n);
        if (!first) CHOIR_TRY(template_text_add(&text, "&", 1));
        CHOIR_TRY(quote_url(&text, pair->items[0], false));
        CHOIR_TRY(template_text_add(&text, "=", 1));
        CHOIR_TRY(quote_url(&text, pair->items[1], false));
    }
}

FILTER(filter_truncate)
{
    template_string *s = NULL, *end = NULL;
    static template_string dots = {"...", 3, 3, NULL};
    int64_t length = 255, leeway = 5;
    size_t cut = 0, n;
    template_value head;
    bool kill = template_given(slots[2]) && template_truth(slots[2]);
    (void)all;
    CHOIR_TRY(template_want_int(r, slots[1], "truncate's length", &length));
    CHOIR_TRY(template_want_string(r, slots[3], "truncate's end", &end));
    if (slots[4].type != TEMPLATE_NONE)
        CHOIR_TRY(template_want_int(r, slots[4], "truncate's leeway", &leeway));
    if (end == NULL) end = &dots;
    int64_t tail = (int64_t)template_string_chars(end);
    if (length < tail || leeway < 0)
        return template_error(r, "truncate: the length %" PRId64 " is shorter than its end",
                              length);
    if (template_length(slots[0], &n) && (leeway > (int64_t)n || (int64_t)n - leeway <= length)) {
        *out = slots[0];
        return CHOIR_OK;
    }
    CHOIR_TRY(template_want_string(r, slots[0], "what is truncated", &s));
    CHOIR_TRY(template_string_offset(r, s, (size_t)(length - tail), &cut));
    const char *space = kill ? NULL : memrchr(s->data, ' ', cut);
    if (space != NULL) cut = (size_t)(space - s->data);
    CHOIR_TRY(template_string_value(r, s->data, cut, &head));
    return template_string_concat(r, head.s, end, out);
}

FILTER(filter_wordcount)
{
    template_string *s;
    int64_t n = 0;
    bool in_word = false;
    (void)all;
    CHOIR_TRY(template_to_string(r, slots[0], &s));
    CHOIR_TRY(template_charge_bytes(r, 8 * s->bytes));
    for (size_t i = 0; i < s->bytes;) {
        uint32_t code;
        i += template_utf8_decode(s->data + i, s->bytes - i, &code);
        bool word = code == '_' || template_is_alpha(code) || template_is_numeric(code);
        n += word && !in_word;
        in_word = word;
    }
    *out = template_int(n);
    return CHOIR_OK;
}

FILTER(filter_format)
{
    template_value text;
    CHOIR_TRY(as_text(r, slots[0], &text));
    if (all->n > 0 && all->n_named > 0)
        return template_error(r, "format takes positional or named arguments, not both");
    if (all->n_named > 0) {
        template_dict *d;
        CHOIR_TRY(template_dict_make(r, &d));
        for (size_t i = 0; i < all->n_named; i++) {
            template_value key = TEMPLATE_VALUE(STRING, s, (template_string *)all->names[i]);
            CHOIR_TRY(template_dict_set(r, d, key, all->named[i]));
        }
        return template_percent(r, text.s, TEMPLATE_VALUE(DICT, dict, d), out);
    }
    template_list *list;
    CHOIR_TRY(template_list_make(r, all->n, &list));
    if (all->n > 0) memcpy(list->items, all->positional, all->n * sizeof *list->items);
    list->n = all->n;
    return template_percent(r, text.s, TEMPLATE_VALUE(TUPLE, list, list), out);
}

/* ---- Numbers ---- */

/* The text of a number without underscores and surrounding whitespace; false: it is none. */
static choir_status number_text(template_render *r, template_value v, char **out, bool *ok)
{
    template_value stripped;
    *ok = false;
    CHOIR_TRY(by_method(r, "strip", &v, 0, &stripped));
    const template_string *s = stripped.s;
    char *w;
    CHOIR_TRY(template_alloc(r, s->bytes + 1, &w));
    *out = w;
    for (size_t i = 0; i < s->bytes; i++) {
        char c = s->data[i];
        bool between = i > 0 && i + 1 < s->bytes && s->data[i - 1] != '_' && s->data[i + 1] != '_';
        if (c == '_' && !between) return CHOIR_OK;
        if (c == 0) return CHOIR_OK;
        if (c != '_') *w++ = c;
    }
    *w = 0;
    *ok = w > *out;
    return CHOIR_OK;
}

static choir_status parse_float(template_render *r, template_value v, double *out, bool *ok)
{
    char *text, *end;
    CHOIR_TRY(number_text(r, v, &text, ok));
    if (!*ok) return CHOIR_OK;
    const char *digits = text + (*text == '+' || *text == '-');
    static const char *const words[] = {"inf", "infinity", "nan", NULL};
    bool word = false;
    for (size_t i = 0; words[i] != NULL; i++) word |= strcasecmp(digits, words[i]) == 0;
    *ok = word || (*digits == '.' || (*digits >= '0' && *digits <= '9'));
    if (strpbrk(digits, "xX") != NULL) *ok = false;
    if (!*ok) return CHOIR_OK;
    *out = strtod(text, &end);
    *ok = *end == 0 && end > text;
    return CHOIR_OK;
}

/* int(text, base) where it succeeds; beyond 64 bits it is an error. */
static choir_status parse_int(template_render *r, template_value v, int base, int64_t *out,
                              bool *ok)
{
    char *text, *end;
    CHOIR_TRY(number_text(r, v, &text, ok));
    if (!*ok) return CHOIR_OK;
    char *digits = text + (*text == '+' || *text == '-');
    bool negative = *text == '-';
    int marked = 0;
    if (digits[0] == '0' && digits[1] != 0) {
        char letter = digits[1] | 0x20;
        marked = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 0;
    }
    if (marked != 0 && (base == 0 || base == marked)) {
        base = marked;
        digits += 2;
    } else if (base == 0) {
        base = 10;
    }
    *ok =
        (*digits >= '0' && *digits <= '9') || ((*digits | 0x20) >= 'a' && (*digits | 0x20) <= 'z');
    if (!*ok) return CHOIR_OK;
    errno = 0;
    unsigned long long magnitude = strtoull(digits, &end, base);
    *ok = *end == 0 && end > digits;
    if (!*ok) return CHOIR_OK;
    if (errno != 0 || magnitude > (unsigned long long)INT64_MAX + negative)
        return template_error(r, "the integer '%.40s' has more than 64 bits", text);
    *out = negative ? (int64_t)-magnitude : (int64_t)magnitude;
    return CHOIR_OK;
}

static choir_status truncate_float(template_render *r, double f, template_value fallback,
                                   template_value *out)
{
    if (!isfinite(f)) {
        *out = fallback;
        return CHOIR_OK;
    }
    if (!(f > -9.2233720368547758e18 && f < 9.2233720368547758e18))
        return template_error(r, "the integer of a float has more than 64 bits");
    *out = template_int((int64_t)f);
    return CHOIR_OK;
}

FILTER(filter_int)
{
    template_value v = slots[0], fallback = template_given(slots[1]) ? slots[1] : template_int(0);
    int64_t base = 10, i = 0;
    double f = 0;
    bool ok = false;
    (void)all;
    CHOIR_TRY(template_want_int(r, slots[2], "int's base", &base));
    switch (v.type) {
    case TEMPLATE_UNDEFINED:
        return template_undefined_error(r, v);
    case TEMPLATE_INT:
    case TEMPLATE_BOOL:
        *out = template_int(v.type == TEMPLATE_BOOL ? v.b : v.i);
        return CHOIR_OK;
    case TEMPLATE_FLOAT:
        if (isinf(v.f)) return template_error(r, "infinity is no integer");
        return truncate_float(r, v.f, fallback, out);
    case TEMPLATE_STRING:
        break;
    default:
        *out = fallback;
        return CHOIR_OK;
    }
    if (base == 0 || (base >= 2 && base <= 36)) CHOIR_TRY(parse_int(r, v, (int)base, &i, &ok));
    *out = template_int(i);
    if (ok) return CHOIR_OK;
    CHOIR_TRY(parse_float(r, v, &f, &ok));
    return truncate_float(r, ok ? f : NAN, fallback, out);
}

FILTER(filter_float)
{
    template_value v = slots[0];
    double f = 0;
    bool ok = false;
    (void)all;
    if (v.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, v);
    *out = template_given(slots[1]) ? slots[1] : template_float(0);
    if (v.type == TEMPLATE_STRING) {
        CHOIR_TRY(parse_float(r, v, &f, &ok));
        if (ok) *out = template_float(f);
    } else if (template_is_number(v)) {
        *out = template_float(v.type == TEMPLATE_FLOAT ? v.f
                              : v.type == TEMPLATE_INT ? (double)v.i
                                                       : v.b);
    }
    return CHOIR_OK;
}

FILTER(filter_abs)
{
    template_value v = slots[0];
    (void)all;
    if (v.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, v);
    if (!template_is_number(v))
        return template_error(r, "abs wants a number, not '%s'", template_type_name(v));
    if (v.type == TEMPLATE_FLOAT)
        *out = template_float(fabs(v.f));
    else if (v.type == TEMPLATE_BOOL)
        *out = template_int(v.b);
    else if (v.i < 0)
        return template_binary(r, TOKEN_SUB, template_int(0), v, out);
    else
        *out = v;
    return CHOIR_OK;
}

/* Python rounds the decimal expansion itself, half to even; so does printf. */
static double round_to(double f, int64_t precision)
{
    char text[400];
    if (!isfinite(f) || precision > 300) return f;
    if (precision >= 0) {
        snprintf(text, sizeof text, "%.*f", (int)precision, f);
        return strtod(text, NULL);
    }
    if (precision < -308) return copysign(0, f);
    double scale = pow(10, (double)-precision);
    return nearbyint(f / scale) * scale;
}

static choir_status round_int(template_render *r, int64_t i, int64_t precision, template_value *out)
{
    int64_t scale = 1;
    *out = template_int(i);
    if (precision >= 0) return CHOIR_OK;
    for (int64_t p = precision; p < 0; p++)
        if (__builtin_mul_overflow(scale, 10, &scale)) {
            *out = template_int(0);
            return CHOIR_OK;
        }
    int64_t rest = i % scale, down = i - rest, half = scale / 2;
    int64_t size = rest < 0 ? -rest : rest;
    if (size > half || (size == half && (down / scale) % 2 != 0))
        return template_binary(r, rest < 0 ? TOKEN_SUB : TOKEN_ADD, template_int(down),
                               template_int(scale), out);
    *out = template_int(down);
    return CHOIR_OK;
}

FILTER(filter_round)
{
    template_value v = slots[0], scale;
    template_string *method = NULL;
    int64_t precision = 0;
    (void)all;
    CHOIR_TRY(template_want_int(r, slots[1], "round's precision", &precision));
    CHOIR_TRY(template_want_string(r, slots[2], "round's method", &method));
    if (v.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, v);
    if (!template_is_number(v))
        return template_error(r, "round wants a number, not '%s'", template_type_name(v));
    if (method == NULL || template_string_is(method, "common")) {
        if (v.type != TEMPLATE_FLOAT)
            return round_int(r, v.type == TEMPLATE_BOOL ? v.b : v.i, precision, out);
        *out = template_float(round_to(v.f, precision));
        return CHOIR_OK;
    }
    bool up = template_string_is(method, "ceil");
    if (!up && !template_string_is(method, "floor"))
        return template_error(r, "round's method must be common, ceil or floor");
    CHOIR_TRY(template_binary(r, TOKEN_POW, template_int(10), template_int(precision), &scale));
    CHOIR_TRY(template_binary(r, TOKEN_MUL, v, scale, &v));
    if (v.type == TEMPLATE_FLOAT) {
        if (!isfinite(v.f)) return template_error(r, "round: the number is not finite");
        v = template_float(up ? ceil(v.f) : floor(v.f));
    }
    return template_binary(r, TOKEN_DIV, v, scale, out);
}

/* ---- Others ---- */

FILTER(filter_default)
{
    (void)all;
    bool boolean = template_given(slots[2]) && template_truth(slots[2]);
    bool absent = slots[0].type == TEMPLATE_UNDEFINED || (boolean && !template_truth(slots[0]));
    *out = slots[0];
    if (!absent) return CHOIR_OK;
    *out = slots[1];
    return template_given(slots[1]) ? CHOIR_OK : template_string_value(r, "", 0, out);
}

FILTER(filter_attr)
{
    template_string *name = NULL;
    (void)all;
    CHOIR_TRY(template_want_string(r, slots[1], "attr's name", &name));
    CHOIR_TRY(template_get_attribute(r, slots[0], name, out));
    if (slots[0].type != TEMPLATE_DICT || out->type == TEMPLATE_METHOD) return CHOIR_OK;
    *out = (template_value){.type = TEMPLATE_UNDEFINED, /* items are no attributes here */
                            .flag = TEMPLATE_NO_ATTRIBUTE,
                            .extra = TEMPLATE_DICT,
                            .s = name};
    return CHOIR_OK;
}

FILTER(filter_tojson)
{
    static const template_string comma = {",", 1, 1, NULL}, comma_space = {", ", 2, 2, NULL};
    static const template_string colon = {": ", 2, 2, NULL};
    template_text text = {.r = r};
    template_json o = {.indent = -1, .item_separator = &comma_space, .key_separator = &colon};
    (void)all;
    o.ascii = template_given(slots[1]) && template_truth(slots[1]);
    if (template_given(slots[2]) && slots[2].type != TEMPLATE_NONE) {
        o.item_separator = &comma;
        o.indent = 0;
        if (slots[2].type == TEMPLATE_STRING)
            o.indent_text = slots[2].s;
        else
            CHOIR_TRY(template_want_int(r, slots[2], "tojson's indent", &o.indent));
        if (o.indent < 0) o.indent = 0;
        if (o.indent > 1 << 20) return template_error(r, "tojson's indent is too large");
    }
    if (template_given(slots[3]) && slots[3].type != TEMPLATE_NONE) {
        template_list *pair;
        template_string *item = NULL, *key = NULL;
        CHOIR_TRY(template_to_list(r, slots[3], &pair));
        if (pair->n != 2) return template_error(r, "tojson's separators are a pair");
        CHOIR_TRY(template_want_string(r, pair->items[0], "tojson's separator", &item));
        CHOIR_TRY(template_want_string(r, pair->items[1], "tojson's separator", &key));
        o.item_separator = item;
        o.key_separator = key;
    }
    o.sort_keys = template_given(slots[4]) && template_truth(slots[4]);
    CHOIR_TRY(template_text_json(&text, slots[0], &o));
    return template_text_value(&text, out);
}

const template_builtin *template_find_filter(const template_string *name)
{
    // clang-format off
    static const template_builtin filters[] = {
        {"tojson", "value ensure_ascii? indent? separators? sort_keys?", filter_tojson},
        {"trim", "value chars?", filter_trim},
        {"default", "value default_value? boolean?", filter_default},
        {"d", "value default_value? boolean?", filter_default},
        {"upper", "s", filter_upper},
        {"lower", "s", filter_lower},
        {"capitalize", "s", filter_capitalize},
        {"title", "s", filter_title},
        {"replace", "s old new count?", filter_replace},
        {"string", "s", filter_string},
        {"indent", "s width? first? blank?", filter_indent},
        {"int", "value default? base?", filter_int},
        {"float", "value default?", filter_float},
        {"abs", "x", filter_abs},
        {"round", "value precision? method?", filter_round},
        {"safe", "value", filter_safe},
        {"escape", "s", filter_escape},
        {"e", "s", filter_escape},
        {"forceescape", "value", filter_forceescape},
        {"urlencode", "value", filter_urlencode},
        {"truncate", "s length? killwords? end? leeway?", filter_truncate},
        {"wordcount", "s", filter_wordcount},
        {"center", "value width?", filter_center},
        {"format", "*", filter_format},
        {"attr", "obj name", filter_attr},
    };
    // clang-format on
    const template_builtin *f =
        template_find_builtin(filters, sizeof filters / sizeof *filters, name);
    return f != NULL ? f : template_find_sequence_filter(name);
}

choir_status template_apply_filter(template_render *r, const template_string *name,
                                   template_value v, const template_arguments *rest,
                                   template_value *out)
{
    const template_builtin *f = template_find_filter(name);
    if (f == NULL)
        return template_error(r, "unknown filter '%.*s'",
                              (int)(name->bytes > 200 ? 200 : name->bytes), name->data);
    return template_call_builtin(r, f, &v, rest, out);
}
