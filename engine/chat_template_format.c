/* Python's two ways to format: "%5.2f" % x, and "{0:>5.2f}".format(x) with its fields, conversions
 * and format specifications. */
#include "engine/chat_template_render.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_WIDTH     ((int64_t)1 << 24)
#define MAX_PRECISION 400

/* What both ways come down to. */
typedef struct spec {
    uint32_t fill;
    char align;               /* < > ^ =, or 0: the type's own */
    char sign;                /* + - or space */
    bool alternate, percent;  /* percent: of the % operator, whose numbers accept less */
    char grouping;            /* , _ or 0 */
    int64_t width, precision; /* precision < 0: not given */
    char type;
} spec;

/* ---- One value ---- */

/* Pads `digits` (after its sign or 0x, `prefix` bytes) to the width. */
static choir_status add_padded(template_text *t, const spec *s, const char *data, size_t bytes,
                               size_t chars, size_t prefix, char own_align)
{
    char align = s->align != 0 ? s->align : own_align;
    size_t width = s->width > 0 ? (size_t)s->width : 0, pad = width > chars ? width - chars : 0;
    size_t left = align == '>' ? pad : align == '^' ? pad / 2 : 0;
    CHOIR_TRY(template_text_add_char(t, s->fill, left));
    if (align == '=') {
        CHOIR_TRY(template_text_add(t, data, prefix));
        CHOIR_TRY(template_text_add_char(t, s->fill, pad));
        return template_text_add(t, data + prefix, bytes - prefix);
    }
    CHOIR_TRY(template_text_add(t, data, bytes));
    return template_text_add_char(t, s->fill, align == '=' ? 0 : pad - left);
}

static choir_status format_string(template_text *t, const spec *s, template_string *text)
{
    size_t chars = template_string_chars(text), bytes = text->bytes;
    if (s->precision >= 0 && (size_t)s->precision < chars) {
        chars = (size_t)s->precision;
        CHOIR_TRY(template_string_offset(t->r, text, chars, &bytes));
    }
    return add_padded(t, s, text->data, bytes, chars, 0, s->percent ? '>' : '<');
}

/* Puts a separator before every group of digits; `digits` of `n`, into out (room for 2 n). */
static size_t group_digits(const char *digits, size_t n, char separator, size_t every, char *out)
{
    size_t w = 0;
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && (n - i) % every == 0) out[w++] = separator;
        out[w++] = digits[i];
    }
    return w;
}

static size_t put_sign(char *out, bool negative, char sign)
{
    if (negative)
        out[0] = '-';
    else if (sign == '+' || sign == ' ')
        out[0] = sign;
    else
        return 0;
    return 1;
}

static choir_status format_int(template_text *t, const spec *s, int64_t value)
{
    char digits[80], text[200];
    size_t n = 0, prefix = put_sign(text, value < 0, s->sign);
    uint64_t left = value < 0 ? -(uint64_t)value : (uint64_t)value;
    unsigned base = s->type == 'x' || s->type == 'X' ? 16
                    : s->type == 'o'                 ? 8
                    : s->type == 'b'                 ? 2
                                                     : 10;
    const char *letters = s->type == 'X' ? "0123456789ABCDEF" : "0123456789abcdef";
    do digits[sizeof digits - ++n] = letters[left % base];
    while ((left /= base) > 0);
    while (s->percent && s->precision > (int64_t)n && n < sizeof digits - 1)
        digits[sizeof digits - ++n] = '0';
    if (s->alternate && base != 10) {
        text[prefix++] = '0';
        text[prefix++] = s->type;
    }
    size_t bytes = prefix;
    const char *first = digits + sizeof digits - n;
    if (s->grouping != 0) {
        bytes += group_digits(first, n, s->grouping, base == 10 ? 3 : 4, text + prefix);
    } else {
        memcpy(text + prefix, first, n);
        bytes += n;
    }
    return add_padded(t, s, text, bytes, bytes, prefix, '>');
}

/* A float's digits without sign, by C's printf where it agrees with Python. */
static void float_digits(const spec *s, double f, char *out, size_t size)
{
    char format[16];
    int precision = s->precision < 0 ? 6 : (int)s->precision;
    char type = s->type;
    if (isnan(f) || isinf(f)) {
        bool upper = type == 'F' || type == 'E' || type == 'G';
        snprintf(out, size, "%s", isnan(f) ? (upper ? "NAN" : "nan") : upper ? "INF" : "inf");
        if (type == '%') strcat(out, "%");
        return;
    }
    if (type == 0 && s->precision < 0) {
        template_float_repr(f, out);
        return;
    }
    if (type == '%') f *= 100;
    if (type == 0) { /* like g, but with a digit after the point unless there is an exponent */
        snprintf(out, size, "%.*g", precision == 0 ? 1 : precision, f);
        int exponent = 0;
        char probe[32];
        snprintf(probe, sizeof probe, "%.*e",
                 precision == 0       ? 0
                 : precision - 1 > 17 ? 17
                                      : precision - 1,
                 f);
        exponent = atoi(strchr(probe, 'e') + 1);
        if (strchr(out, 'e') == NULL && exponent >= precision - 1 && precision > 1)
            snprintf(out, size, "%.*e", precision - 1, f);
        if (strpbrk(out, ".e") == NULL) strcat(out, ".0");
        return;
    }
    snprintf(format, sizeof format, "%%%s.*%c", s->alternate ? "#" : "",
             type == '%'   ? 'f'
             : type == 'n' ? 'g'
                           : type);
    snprintf(out, size, format, precision, f);
    if (type == '%') strcat(out, "%");
}

static choir_status format_float(template_text *t, const spec *s, double f)
{
    char digits[MAX_PRECISION + 340], text[2 * MAX_PRECISION + 700];
    size_t prefix = put_sign(text, signbit(f) != 0 && !isnan(f), s->sign), n = prefix;
    if (s->precision > MAX_PRECISION)
        return template_error(t->r, "a format's precision is over %d", MAX_PRECISION);
    float_digits(s, fabs(f), digits, sizeof digits - 8);
    size_t whole = strspn(digits, "0123456789");
    if (s->grouping != 0 && whole > 0)
        n += group_digits(digits, whole, s->grouping, 3, text + n);
    else
        whole = 0;
    strcpy(text + n, digits + whole);
    n += strlen(digits + whole);
    return add_padded(t, s, text, n, n, prefix, '>');
}

/* ---- "…" % values ---- */

typedef struct percent_args {
    template_value all;
    size_t next;
    bool named; /* a %(name)s was seen */
} percent_args;

static choir_status next_value(template_render *r, percent_args *args, template_value *out)
{
    size_t n = args->all.type == TEMPLATE_TUPLE ? args->all.list->n : 1;
    if (args->next >= n) return template_error(r, "not enough arguments for the format string");
    *out = args->all.type == TEMPLATE_TUPLE ? args->all.list->items[args->next] : args->all;
    args->next++;
    return CHOIR_OK;
}

/* A number of the format, or * for the next value. */
static choir_status percent_number(template_render *r, const char **p, const char *end,
                                   percent_args *args, int64_t *out)
{
    template_value v;
    if (*p < end && **p == '*') {
        ++*p;
        CHOIR_TRY(next_value(r, args, &v));
        return template_want_int(r, v, "a format's *", out);
    }
    *out = 0;
    for (; *p < end && **p >= '0' && **p <= '9'; ++*p) {
        *out = *out * 10 + (**p - '0');
        if (*out > MAX_WIDTH) return template_error(r, "a format's width is too large");
    }
    return CHOIR_OK;
}

static choir_status to_integer(template_render *r, template_value v, bool floats, int64_t *out)
{
    if (v.type == TEMPLATE_FLOAT && floats) {
        if (!(v.f > -9.2e18 && v.f < 9.2e18))
            return template_error(r, "a float is out of the range of integers");
        *out = (int64_t)v.f;
        return CHOIR_OK;
    }
    return template_want_int(r, v, "a formatted number", out);
}

static choir_status percent_value(template_text *t, spec *s, template_value v)
{
    template_text text = {.r = t->r};
    template_string *string;
    int64_t i = 0;
    switch (s->type) {
    case 's':
    case 'r':
    case 'a':
        if (s->type == 's')
            CHOIR_TRY(template_text_str(&text, v));
        else
            CHOIR_TRY(template_text_repr(&text, v));
        CHOIR_TRY(template_string_make(&t->r->pool, text.data, text.bytes, false, &string));
        return format_string(t, s, string);
    case 'c':
        if (v.type == TEMPLATE_STRING && template_string_chars(v.s) == 1)
            return format_string(t, s, v.s);
        CHOIR_TRY(template_want_int(t->r, v, "%c's value", &i));
        if (i < 0 || i > 0x10ffff || (i >= 0xd800 && i < 0xe000))
            return template_error(t->r, "%%c of %" PRId64 " is no character", i);
        CHOIR_TRY(template_text_add_char(&text, (uint32_t)i, 1));
        CHOIR_TRY(template_string_make(&t->r->pool, text.data, text.bytes, false, &string));
        return format_string(t, s, string);
    case 'd':
    case 'i':
    case 'u':
    case 'x':
    case 'X':
    case 'o':
        CHOIR_TRY(to_integer(t->r, v, s->type == 'd' || s->type == 'i' || s->type == 'u', &i));
        if (s->type == 'i' || s->type == 'u') s->type = 'd';
        return format_int(t, s, i);
    case 'e':
    case 'E':
    case 'f':
    case 'F':
    case 'g':
    case 'G':
        if (v.type == TEMPLATE_UNDEFINED) return template_undefined_error(t->r, v);
        if (!template_is_number(v))
            return template_error(t->r, "must be real number, not %s", template_type_name(v));
        return format_float(t, s,
                            v.type == TEMPLATE_FLOAT ? v.f
                            : v.type == TEMPLATE_INT ? (double)v.i
                                                     : v.b);
    default:
        return template_error(t->r, "unsupported format character '%c'", s->type);
    }
}

/* One % with all that belongs to it; *p stands behind the %. */
static choir_status percent_one(template_text *t, const char **p, const char *end,
                                percent_args *args)
{
    template_render *r = t->r;
    template_value v = {0};
    spec s = {.fill = ' ', .precision = -1, .percent = true};
    if (*p < end && **p == '(') {
        const char *name = ++*p;
        int open = 1;
        for (; *p < end; ++*p) {
            open += (**p == '(') - (**p == ')');
            if (open == 0) break;
        }
        if (*p >= end) return template_error(r, "incomplete format key");
        if (args->all.type != TEMPLATE_DICT) return template_error(r, "format requires a mapping");
        template_value key, *found = NULL;
        CHOIR_TRY(template_string_value(r, name, (size_t)(*p - name), &key));
        CHOIR_TRY(template_dict_get(r, args->all.dict, key, &found));
        if (found == NULL) return template_error(r, "the format's key is not in the mapping");
        v = *found;
        args->named = true;
        ++*p;
    }
    for (; *p < end && strchr("-+ #0", **p) != NULL; ++*p) {
        if (**p == '-')
            s.align = '<';
        else if (**p == '+')
            s.sign = '+';
        else if (**p == ' ' && s.sign == 0)
            s.sign = ' ';
        else if (**p == '#')
            s.alternate = true;
        else if (**p == '0')
            s.fill = '0';
    }
    CHOIR_TRY(percent_number(r, p, end, args, &s.width));
    if (s.width < 0) {
        s.align = '<';
        s.width = s.width < -MAX_WIDTH ? MAX_WIDTH : -s.width;
    }
    if (*p < end && **p == '.') {
        ++*p;
        CHOIR_TRY(percent_number(r, p, end, args, &s.precision));
        if (s.precision < 0) s.precision = 0;
    }
    if (s.width > MAX_WIDTH) return template_error(r, "a format's width is too large");
    while (*p < end && (**p == 'l' || **p == 'h' || **p == 'L')) ++*p;
    if (*p >= end) return template_error(r, "incomplete format");
    s.type = *(*p)++;
    if (s.type == '%') return template_text_add(t, "%", 1);
    bool number = strchr("diuxXoeEfFgG", s.type) != NULL;
    if (s.fill == '0' && (s.align == '<' || !number)) s.fill = ' ';
    if (s.fill == '0') s.align = '=';
    if (!template_given(v)) CHOIR_TRY(next_value(r, args, &v));
    return percent_value(t, &s, v);
}

choir_status template_percent(template_render *r, const template_string *format,
                              template_value values, template_value *out)
{
    template_text text = {.r = r};
    percent_args args = {.all = values};
    const char *p = format->data, *end = p + format->bytes;
    while (p < end) {
        const char *mark = memchr(p, '%', (size_t)(end - p));
        if (mark == NULL) mark = end;
        CHOIR_TRY(template_text_add(&text, p, (size_t)(mark - p)));
        p = mark;
        if (p == end) break;
        p++;
        CHOIR_TRY(template_charge(r, 1));
        CHOIR_TRY(percent_one(&text, &p, end, &args));
    }
    size_t n = values.type == TEMPLATE_TUPLE ? values.list->n : 1;
    bool mapping = values.type == TEMPLATE_DICT || values.type == TEMPLATE_LIST ||
                   values.type == TEMPLATE_RANGE || values.type == TEMPLATE_UNDEFINED || args.named;
    if (args.next < n && !mapping)
        return template_error(r, "not all arguments are converted by the format string");
    return template_text_value(&text, out);
}

/* ---- "…".format(…) ---- */

static bool is_align(uint32_t c)
{
    return c == '<' || c == '>' || c == '^' || c == '=';
}

static choir_status parse_digits(template_render *r, const char **p, const char *end, int64_t *out)
{
    for (*out = 0; *p < end && **p >= '0' && **p <= '9'; ++*p) {
        *out = *out * 10 + (**p - '0');
        if (*out > MAX_WIDTH) return template_error(r, "a format's width is too large");
    }
    return CHOIR_OK;
}

/* [[fill]align][sign][#][0][width][grouping][.precision][type] */
static choir_status parse_spec(template_render *r, const char *p, const char *end, spec *s)
{
    *s = (spec){.fill = ' ', .precision = -1};
    bool filled = false;
    uint32_t code;
    if (p < end) {
        size_t n = template_utf8_decode(p, (size_t)(end - p), &code);
        if (p + n < end && is_align((unsigned char)p[n])) {
            filled = true;
            s->fill = code;
            s->align = p[n];
            p += n + 1;
        } else if (is_align(code)) {
            s->align = *p++;
        }
    }
    if (p < end && (*p == '+' || *p == '-' || *p == ' ')) s->sign = *p++;
    if (p < end && *p == '#') s->alternate = *p++ == '#';
    if (p < end && *p == '0') {
        p++;
        if (!filled) s->fill = '0';
        if (s->align == 0) s->align = '=';
    }
    CHOIR_TRY(parse_digits(r, &p, end, &s->width));
    if (p < end && (*p == ',' || *p == '_')) s->grouping = *p++;
    if (p < end && *p == '.') {
        const char *digits = ++p;
        CHOIR_TRY(parse_digits(r, &p, end, &s->precision));
        if (p == digits) return template_error(r, "a format's precision is missing");
    }
    if (p < end) s->type = *p++;
    if (p < end) return template_error(r, "invalid format specifier");
    return CHOIR_OK;
}

static choir_status format_value(template_text *t, template_value v, const char *p, const char *end)
{
    template_render *r = t->r;
    spec s;
    template_string *string;
    CHOIR_TRY(parse_spec(r, p, end, &s));
    if (v.type == TEMPLATE_STRING) {
        bool zero = s.align == '=' && s.fill == '0';
        if ((s.type != 0 && s.type != 's') || s.sign != 0 || s.alternate || s.grouping != 0 ||
            (s.align == '=' && !zero))
            return template_error(r, "invalid format specifier for a string");
        if (zero) s.align = '<';
        return format_string(t, &s, v.s);
    }
    if (!template_is_number(v))
        return template_error(r, "a '%s' takes no format specifier", template_type_name(v));
    bool as_float = v.type == TEMPLATE_FLOAT;
    if (s.type != 0 && strchr("eEfFgGn%", s.type) != NULL) as_float = true;
    double f = v.type == TEMPLATE_FLOAT ? v.f : v.type == TEMPLATE_INT ? (double)v.i : v.b;
    int64_t i = v.type == TEMPLATE_INT ? v.i : v.type == TEMPLATE_BOOL ? v.b : 0;
    if (s.type != 0 &&
        strchr(v.type == TEMPLATE_FLOAT ? "eEfFgGn%" : "bcdoxXneEfFgG%", s.type) == NULL)
        return template_error(r, "unknown format code '%c' for a '%s'", s.type,
                              template_type_name(v));
    if (as_float && !(s.type == 'n' && v.type != TEMPLATE_FLOAT)) return format_float(t, &s, f);
    if (s.precision >= 0) return template_error(r, "an integer's format has no precision");
    if (s.type == 'c') {
        if (i < 0 || i > 0x10ffff || (i >= 0xd800 && i < 0xe000))
            return template_error(r, "%" PRId64 " is no character", i);
        template_text one = {.r = r};
        CHOIR_TRY(template_text_add_char(&one, (uint32_t)i, 1));
        CHOIR_TRY(template_string_make(&r->pool, one.data, one.bytes, false, &string));
        return format_string(t, &s, string);
    }
    return format_int(t, &s, i);
}

typedef struct fields {
    const template_arguments *args;
    int64_t next; /* of {} fields; -1 after a numbered one */
} fields;

static choir_status named_field(template_render *r, fields *f, const char *p, size_t n,
                                template_value *out)
{
    bool digits = n > 0;
    int64_t at = 0;
    for (size_t i = 0; i < n && digits; i++) {
        digits = p[i] >= '0' && p[i] <= '9' && at < 1000000;
        at = digits ? at * 10 + (p[i] - '0') : 0;
    }
    if (n == 0 || digits) {
        if ((n == 0 && f->next < 0) || (n > 0 && f->next > 0))
            return template_error(r, "numbered and unnumbered fields do not mix in a format");
        if (n == 0)
            at = f->next++;
        else
            f->next = -1;
        if ((size_t)at >= f->args->n)
            return template_error(r, "the format wants argument %" PRId64 " of %zu", at,
                                  f->args->n);
        *out = f->args->positional[at];
        return CHOIR_OK;
    }
    for (size_t i = 0; i < f->args->n_named; i++)
        if (f->args->names[i]->bytes == n && memcmp(f->args->names[i]->data, p, n) == 0) {
            *out = f->args->named[i];
            return CHOIR_OK;
        }
    return template_error(r, "the format's field '%.*s' has no value", (int)(n > 200 ? 200 : n), p);
}

/* name.attribute[item]…, from p to end. */
static choir_status field_value(template_render *r, fields *f, const char *p, const char *end,
                                template_value *out)
{
    const char *q = p;
    template_string *name;
    while (q < end && *q != '.' && *q != '[') q++;
    CHOIR_TRY(named_field(r, f, p, (size_t)(q - p), out));
    while (q < end) {
        const char *from = q + 1;
        CHOIR_TRY(template_charge(r, 1));
        if (*q == '.') {
            for (q++; q < end && *q != '.' && *q != '[';) q++;
            if (q == from) return template_error(r, "a format's field has an empty attribute");
            CHOIR_TRY(template_string_make(&r->pool, from, (size_t)(q - from), false, &name));
            CHOIR_TRY(template_get_attribute(r, *out, name, out));
            continue;
        }
        const char *close = *q == '[' ? memchr(from, ']', (size_t)(end - from)) : NULL;
        if (close == NULL || close == from)
            return template_error(r, "a format's field is malformed after its name");
        int64_t at = 0;
        const char *d = from;
        CHOIR_TRY(parse_digits(r, &d, close, &at));
        CHOIR_TRY(template_string_make(&r->pool, from, (size_t)(close - from), false, &name));
        CHOIR_TRY(template_get_item(
            r, *out, d == close ? template_int(at) : TEMPLATE_VALUE(STRING, s, name), out));
        q = close + 1;
    }
    return CHOIR_OK;
}

static choir_status format_into(template_text *t, fields *f, const char *p, const char *end,
                                int depth);

/* The inside of one {…}. */
static choir_status format_field(template_text *t, fields *f, const char *p, const char *end,
                                 int depth)
{
    template_render *r = t->r;
    const char *q = p;
    template_value v;
    for (int brackets = 0; q < end && (brackets > 0 || (*q != ':' && *q != '!')); q++)
        brackets += (*q == '[') - (*q == ']' && brackets > 0);
    CHOIR_TRY(field_value(r, f, p, q, &v));
    if (q < end && *q == '!') {
        template_text text = {.r = r};
        if (q + 1 >= end || (q + 2 < end && q[2] != ':') || strchr("sra", q[1]) == NULL)
            return template_error(r, "a format's conversion is not !s, !r or !a");
        if (q[1] == 's')
            CHOIR_TRY(template_text_str(&text, v));
        else
            CHOIR_TRY(template_text_repr(&text, v));
        CHOIR_TRY(template_text_value(&text, &v));
        q += 2;
    }
    template_text specifier = {.r = r};
    if (q < end) CHOIR_TRY(format_into(&specifier, f, q + 1, end, depth + 1));
    if (specifier.bytes == 0) return template_text_str(t, v);
    return format_value(t, v, specifier.data, specifier.data + specifier.bytes);
}

static choir_status format_into(template_text *t, fields *f, const char *p, const char *end,
                                int depth)
{
    template_render *r = t->r;
    if (depth > 1) return template_error(r, "a format's fields nest too deep");
    while (p < end) {
        const char *q = p;
        while (q < end && *q != '{' && *q != '}') q++;
        CHOIR_TRY(template_text_add(t, p, (size_t)(q - p)));
        if (q == end) break;
        CHOIR_TRY(template_charge(r, 1));
        p = q + 1;
        if (p < end && *p == *q) {
            CHOIR_TRY(template_text_add(t, p++, 1));
            continue;
        }
        if (*q == '}') return template_error(r, "single '}' in a format string");
        int open = 1;
        for (q = p; q < end; q++) {
            open += (*q == '{') - (*q == '}');
            if (open == 0) break;
        }
        if (q >= end) return template_error(r, "single '{' in a format string");
        CHOIR_TRY(format_field(t, f, p, q, depth));
        p = q + 1;
    }
    return CHOIR_OK;
}

choir_status template_format(template_render *r, const template_string *format,
                             const template_arguments *args, template_value *out)
{
    template_text text = {.r = r};
    fields f = {.args = args};
    CHOIR_TRY(template_charge_bytes(r, format->bytes));
    CHOIR_TRY(format_into(&text, &f, format->data, format->data + format->bytes, 0));
    return template_text_value(&text, out);
}
