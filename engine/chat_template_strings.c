/* Methods of strings, as Python's str has them. Positions count characters; results that are parts
 * of the string are views into it. */
#include "engine/chat_template_render.h"

#define METHOD(name)                                                                               \
    static choir_status name(template_render *r, template_value *slots,                            \
                             const template_arguments *all, template_value *out)

static choir_status view(template_render *r, template_value self, const char *from, const char *to,
                         template_value *out)
{
    CHOIR_TRY(template_string_value(r, from, (size_t)(to - from), out));
    out->flag = self.flag;
    return CHOIR_OK;
}

/* ---- Stripping ---- */

static bool in_set(const template_string *set, const char *p, size_t n, uint32_t code)
{
    if (set == NULL) return template_is_space(code);
    return memmem(set->data, set->bytes, p, n) != NULL;
}

static const char *previous(const char *from, const char *p)
{
    do p--;
    while (p > from && ((unsigned char)*p & 0xc0) == 0x80);
    return p;
}

static choir_status strip(template_render *r, template_value *slots, bool left, bool right,
                          template_value *out)
{
    template_string *set = NULL;
    const char *from = slots[0].s->data, *to = from + slots[0].s->bytes;
    uint32_t code;
    if (slots[1].type != TEMPLATE_NONE)
        CHOIR_TRY(template_want_string(r, slots[1], "strip's characters", &set));
    size_t cost = 1 + (set == NULL ? 0 : set->bytes / 64);
    while (left && from < to) {
        size_t n = template_utf8_decode(from, (size_t)(to - from), &code);
        if (!in_set(set, from, n, code)) break;
        from += n;
        CHOIR_TRY(template_charge(r, cost / 2));
    }
    while (right && from < to) {
        const char *p = previous(from, to);
        template_utf8_decode(p, (size_t)(to - p), &code);
        if (!in_set(set, p, (size_t)(to - p), code)) break;
        to = p;
        CHOIR_TRY(template_charge(r, cost / 2));
    }
    CHOIR_TRY(template_charge_bytes(r, (size_t)(slots[0].s->bytes - (size_t)(to - from))));
    return view(r, slots[0], from, to, out);
}

METHOD(str_strip)
{
    return (void)all, strip(r, slots, true, true, out);
}
METHOD(str_lstrip)
{
    return (void)all, strip(r, slots, true, false, out);
}
METHOD(str_rstrip)
{
    return (void)all, strip(r, slots, false, true, out);
}

METHOD(str_removeprefix)
{
    const template_string *s = slots[0].s;
    template_string *part = NULL;
    (void)all;
    CHOIR_TRY(template_want_string(r, slots[1], "removeprefix's prefix", &part));
    bool there = part->bytes <= s->bytes && memcmp(s->data, part->data, part->bytes) == 0;
    return view(r, slots[0], s->data + (there ? part->bytes : 0), s->data + s->bytes, out);
}

METHOD(str_removesuffix)
{
    const template_string *s = slots[0].s;
    template_string *part = NULL;
    (void)all;
    CHOIR_TRY(template_want_string(r, slots[1], "removesuffix's suffix", &part));
    const char *end = s->data + s->bytes;
    bool there = part->bytes <= s->bytes && memcmp(end - part->bytes, part->data, part->bytes) == 0;
    return view(r, slots[0], s->data, end - (there ? part->bytes : 0), out);
}

/* ---- Searching ---- */

/* The part of the string that optional start and end (in characters) leave; *empty when they cross
 * or the start lies past the end, where even the empty string is not found. */
static choir_status window(template_render *r, template_value *slots, const char **from,
                           const char **to, size_t *first, bool *nowhere)
{
    template_string *s = slots[0].s;
    int64_t n = (int64_t)template_string_chars(s), start = 0, stop = n;
    size_t a = 0, b = 0;
    if (slots[2].type != TEMPLATE_NONE) CHOIR_TRY(template_want_int(r, slots[2], "start", &start));
    if (slots[3].type != TEMPLATE_NONE) CHOIR_TRY(template_want_int(r, slots[3], "end", &stop));
    if (start < 0) start = start < -n ? 0 : start + n;
    if (stop < 0) stop = stop < -n ? 0 : stop + n;
    if (stop > n) stop = n;
    *nowhere = start > stop;
    *first = (size_t)start;
    if (*nowhere) return CHOIR_OK;
    CHOIR_TRY(template_string_offset(r, s, (size_t)start, &a));
    CHOIR_TRY(template_string_offset(r, s, (size_t)stop, &b));
    *from = s->data + a;
    *to = s->data + b;
    return CHOIR_OK;
}

/* From the right, step by step, charged before what may be long comparisons. *out is NULL where it
 * is not found. */
static choir_status find_last(template_render *r, const char *from, const char *to,
                              const template_string *part, const char **out)
{
    *out = NULL;
    if ((size_t)(to - from) < part->bytes) return CHOIR_OK;
    size_t n = (size_t)(to - from) - part->bytes, step = part->bytes / 64 + 1;
    for (size_t i = 0; i <= n && *out == NULL; i++) {
        const char *p = from + n - i;
        if (i % 64 == 0) CHOIR_TRY(template_charge(r, step));
        if (memcmp(p, part->data, part->bytes) == 0) *out = p;
    }
    return CHOIR_OK;
}

static choir_status find_first(template_render *r, const char *from, const char *to,
                               const template_string *part, const char **out)
{
    *out = memmem(from, (size_t)(to - from), part->data, part->bytes);
    return template_charge_bytes(r, 4 * (size_t)((*out == NULL ? to : *out) - from));
}

static int64_t count_chars(const char *from, const char *to)
{
    int64_t n = 0;
    for (; from < to; from++) n += ((unsigned char)*from & 0xc0) != 0x80;
    return n;
}

static choir_status find(template_render *r, template_value *slots, bool last, bool must,
                         template_value *out)
{
    template_string *part = NULL;
    const char *from = "", *to = from, *p = NULL;
    size_t first = 0;
    bool nowhere = false;
    CHOIR_TRY(template_want_string(r, slots[1], "what is searched for", &part));
    CHOIR_TRY(window(r, slots, &from, &to, &first, &nowhere));
    if (!nowhere && last)
        CHOIR_TRY(find_last(r, from, to, part, &p));
    else if (!nowhere)
        CHOIR_TRY(find_first(r, from, to, part, &p));
    if (p == NULL && must) return template_error(r, "index: the substring is not found");
    *out = template_int(p == NULL ? -1 : (int64_t)first + count_chars(from, p));
    return CHOIR_OK;
}

METHOD(str_find)
{
    return (void)all, find(r, slots, false, false, out);
}
METHOD(str_rfind)
{
    return (void)all, find(r, slots, true, false, out);
}
METHOD(str_index)
{
    return (void)all, find(r, slots, false, true, out);
}
METHOD(str_rindex)
{
    return (void)all, find(r, slots, true, true, out);
}

METHOD(str_count)
{
    template_string *part = NULL;
    const char *from = "", *to = from;
    size_t first;
    bool nowhere = false;
    int64_t n = 0;
    (void)all;
    CHOIR_TRY(template_want_string(r, slots[1], "what is counted", &part));
    CHOIR_TRY(window(r, slots, &from, &to, &first, &nowhere));
    CHOIR_TRY(template_charge_bytes(r, 4 * (size_t)(to - from)));
    if (!nowhere && part->bytes == 0)
        n = count_chars(from, to) + 1;
    else if (!nowhere)
        while ((from = memmem(from, (size_t)(to - from), part->data, part->bytes)) != NULL) {
            from += part->bytes;
            n++;
        }
    *out = template_int(n);
    return CHOIR_OK;
}

static choir_status affix(template_render *r, template_value *slots, bool suffix,
                          template_value *out)
{
    const char *from = "", *to = from;
    size_t first;
    bool nowhere = false, found = false;
    template_value one = slots[1];
    template_list single = {.items = &one, .n = 1};
    const template_list *list = slots[1].type == TEMPLATE_TUPLE ? slots[1].list : &single;
    CHOIR_TRY(window(r, slots, &from, &to, &first, &nowhere));
    for (size_t i = 0; i < list->n && !found; i++) {
        template_string *part = NULL;
        CHOIR_TRY(template_want_string(r, list->items[i], "a prefix or suffix", &part));
        if (nowhere || part->bytes > (size_t)(to - from)) continue;
        const char *at = suffix ? to - part->bytes : from;
        found = memcmp(at, part->data, part->bytes) == 0;
    }
    *out = template_bool(found);
    return CHOIR_OK;
}

METHOD(str_startswith)
{
    return (void)all, affix(r, slots, false, out);
}
METHOD(str_endswith)
{
    return (void)all, affix(r, slots, true, out);
}

/* ---- Splitting and joining ---- */

static choir_status push_view(template_render *r, template_list *list, const char *from,
                              const char *to)
{
    template_value v;
    CHOIR_TRY(template_charge(r, 1));
    CHOIR_TRY(template_string_value(r, from, (size_t)(to - from), &v));
    return template_list_push(r, list, v);
}

static size_t space_here(const char *p, const char *end)
{
    uint32_t code;
    size_t n = template_utf8_decode(p, (size_t)(end - p), &code);
    return template_is_space(code) ? n : 0;
}

static choir_status split_spaces(template_render *r, const template_string *s, int64_t max,
                                 template_list *list)
{
    const char *p = s->data, *end = p + s->bytes;
    for (size_t n;;) {
        while (p < end && (n = space_here(p, end)) > 0) p += n;
        if (p == end) return CHOIR_OK;
        const char *from = p;
        if (max >= 0 && (int64_t)list->n == max) return push_view(r, list, from, end);
        while (p < end && space_here(p, end) == 0) {
            p++;
            while (p < end && ((unsigned char)*p & 0xc0) == 0x80) p++;
        }
        CHOIR_TRY(push_view(r, list, from, p));
    }
}

static choir_status rsplit_spaces(template_render *r, const template_string *s, int64_t max,
                                  template_list *list)
{
    const char *begin = s->data, *p = begin + s->bytes;
    for (const char *q;;) {
        while (p > begin && space_here(q = previous(begin, p), p) > 0) p = q;
        if (p == begin) return CHOIR_OK;
        const char *to = p;
        if (max >= 0 && (int64_t)list->n == max) return push_view(r, list, begin, to);
        while (p > begin && space_here(q = previous(begin, p), p) == 0) p = q;
        CHOIR_TRY(push_view(r, list, p, to));
    }
}

static choir_status split_at(template_render *r, const template_string *s,
                             const template_string *separator, int64_t max, bool right,
                             template_list *list)
{
    const char *from = s->data, *end = from + s->bytes;
    while (max < 0 || (int64_t)list->n < max) {
        const char *p;
        CHOIR_TRY((right ? find_last : find_first)(r, from, end, separator, &p));
        if (p == NULL) break;
        if (right) {
            CHOIR_TRY(push_view(r, list, p + separator->bytes, end));
            end = p;
        } else {
            CHOIR_TRY(push_view(r, list, from, p));
            from = p + separator->bytes;
        }
    }
    return push_view(r, list, from, end);
}

static choir_status split(template_render *r, template_value *slots, bool right,
                          template_value *out)
{
    template_string *separator = NULL;
    int64_t max = -1;
    template_list *list;
    CHOIR_TRY(template_list_make(r, 0, &list));
    CHOIR_TRY(template_want_int(r, slots[2], "split's limit", &max));
    CHOIR_TRY(template_charge_bytes(r, slots[0].s->bytes));
    if (slots[1].type != TEMPLATE_NONE)
        CHOIR_TRY(template_want_string(r, slots[1], "split's separator", &separator));
    if (separator == NULL && right)
        CHOIR_TRY(rsplit_spaces(r, slots[0].s, max, list));
    else if (separator == NULL)
        CHOIR_TRY(split_spaces(r, slots[0].s, max, list));
    else if (separator->bytes == 0)
        return template_error(r, "split: the separator is empty");
    else
        CHOIR_TRY(split_at(r, slots[0].s, separator, max, right, list));
    for (size_t i = 0; i < list->n; i++) list->items[i].flag = slots[0].flag;
    for (size_t i = 0, n = list->n; right && i < n / 2; i++) {
        template_value v = list->items[i];
        list->items[i] = list->items[n - 1 - i];
        list->items[n - 1 - i] = v;
    }
    *out = TEMPLATE_VALUE(LIST, list, list);
    return CHOIR_OK;
}

METHOD(str_split)
{
    return (void)all, split(r, slots, false, out);
}
METHOD(str_rsplit)
{
    return (void)all, split(r, slots, true, out);
}

static choir_status partition(template_render *r, template_value *slots, bool right,
                              template_value *out)
{
    const template_string *s = slots[0].s;
    template_string *separator = NULL;
    template_list *list;
    CHOIR_TRY(template_want_string(r, slots[1], "partition's separator", &separator));
    if (separator->bytes == 0) return template_error(r, "partition: the separator is empty");
    CHOIR_TRY(template_list_make(r, 3, &list));
    const char *end = s->data + s->bytes, *p;
    CHOIR_TRY((right ? find_last : find_first)(r, s->data, end, separator, &p));
    const char *a = p != NULL ? p : right ? s->data : end;
    const char *b = p != NULL ? p + separator->bytes : a;
    CHOIR_TRY(push_view(r, list, s->data, a));
    CHOIR_TRY(push_view(r, list, a, b));
    CHOIR_TRY(push_view(r, list, b, end));
    *out = TEMPLATE_VALUE(TUPLE, list, list);
    return CHOIR_OK;
}

METHOD(str_partition)
{
    return (void)all, partition(r, slots, false, out);
}
METHOD(str_rpartition)
{
    return (void)all, partition(r, slots, true, out);
}

static bool is_line_break(uint32_t c)
{
    return (c >= 10 && c <= 13) || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 ||
           c == 0x2029;
}

METHOD(str_splitlines)
{
    const char *p = slots[0].s->data, *end = p + slots[0].s->bytes, *from = p;
    bool keep = template_given(slots[1]) && template_truth(slots[1]);
    template_list *list;
    (void)all;
    CHOIR_TRY(template_list_make(r, 0, &list));
    CHOIR_TRY(template_charge_bytes(r, slots[0].s->bytes));
    while (p < end) {
        uint32_t code;
        size_t n = template_utf8_decode(p, (size_t)(end - p), &code);
        p += n;
        if (!is_line_break(code)) continue;
        const char *to = p - n;
        if (code == '\r' && p < end && *p == '\n') p++;
        CHOIR_TRY(push_view(r, list, from, keep ? p : to));
        from = p;
    }
    if (from < end) CHOIR_TRY(push_view(r, list, from, end));
    *out = TEMPLATE_VALUE(LIST, list, list);
    return CHOIR_OK;
}

METHOD(str_join)
{
    template_text text = {.r = r};
    template_iterator it;
    (void)all;
    CHOIR_TRY(template_iterate(r, slots[1], &it));
    for (bool first = true;; first = false) {
        template_value item;
        bool found = false;
        CHOIR_TRY(template_next(r, &it, &item, &found));
        if (!found) break;
        if (item.type != TEMPLATE_STRING)
            return template_error(r, "join: expected a string, got '%s'", template_type_name(item));
        if (!first) CHOIR_TRY(template_text_add(&text, slots[0].s->data, slots[0].s->bytes));
        CHOIR_TRY(template_text_add(&text, item.s->data, item.s->bytes));
    }
    return template_text_value(&text, out);
}

METHOD(str_replace)
{
    const template_string *s = slots[0].s;
    template_string *old = NULL, *new = NULL;
    template_text text = {.r = r};
    int64_t count = -1;
    const char *p = s->data, *end = p + s->bytes;
    (void)all;
    CHOIR_TRY(template_want_string(r, slots[1], "replace's first argument", &old));
    CHOIR_TRY(template_want_string(r, slots[2], "replace's second argument", &new));
    if (slots[3].type != TEMPLATE_NONE)
        CHOIR_TRY(template_want_int(r, slots[3], "replace's count", &count));
    CHOIR_TRY(template_charge_bytes(r, 4 * s->bytes));
    while (count != 0) {
        const char *hit = memmem(p, (size_t)(end - p), old->data, old->bytes);
        if (hit == NULL) break;
        CHOIR_TRY(template_charge(r, 1));
        CHOIR_TRY(template_text_add(&text, p, (size_t)(hit - p)));
        CHOIR_TRY(template_text_add(&text, new->data, new->bytes));
        p = hit + old->bytes;
        if (count > 0) count--;
        if (old->bytes > 0) continue;
        if (p == end) break; /* an empty string is found before every character and at the end */
        uint32_t code;
        size_t n = template_utf8_decode(p, (size_t)(end - p), &code);
        CHOIR_TRY(template_text_add(&text, p, n));
        p += n;
    }
    if (p == s->data) {
        *out = slots[0];
        if (text.bytes == 0) return CHOIR_OK;
    }
    CHOIR_TRY(template_text_add(&text, p, (size_t)(end - p)));
    return template_text_value(&text, out);
}

/* ---- Cases and classes ---- */

#define CASE_METHOD(name, how)                                                                     \
    METHOD(name)                                                                                   \
    {                                                                                              \
        return (void)all, template_change_case(r, slots[0].s, how, out);                           \
    }
CASE_METHOD(str_upper, TEMPLATE_UPPER)
CASE_METHOD(str_lower, TEMPLATE_LOWER)
CASE_METHOD(str_title, TEMPLATE_TITLE)
CASE_METHOD(str_capitalize, TEMPLATE_CAPITAL)
CASE_METHOD(str_swapcase, TEMPLATE_SWAP)
CASE_METHOD(str_casefold, TEMPLATE_FOLD)

static bool is_alnum(uint32_t c)
{
    return template_is_alpha(c) || template_is_numeric(c) || template_is_digit(c);
}

static choir_status every(template_render *r, const template_string *s, bool (*is)(uint32_t),
                          bool when_empty, template_value *out)
{
    bool all_are = s->bytes > 0 || when_empty;
    CHOIR_TRY(template_charge_bytes(r, s->bytes * 4));
    for (size_t i = 0; i < s->bytes && all_are;) {
        uint32_t code;
        i += template_utf8_decode(s->data + i, s->bytes - i, &code);
        all_are = is(code);
    }
    *out = template_bool(all_are);
    return CHOIR_OK;
}

static bool is_ascii(uint32_t c)
{
    return c < 0x80;
}

#define CLASS_METHOD(name, is, when_empty)                                                         \
    METHOD(name)                                                                                   \
    {                                                                                              \
        return (void)all, every(r, slots[0].s, is, when_empty, out);                               \
    }
CLASS_METHOD(str_isalpha, template_is_alpha, false)
CLASS_METHOD(str_isalnum, is_alnum, false)
CLASS_METHOD(str_isdecimal, template_is_decimal, false)
CLASS_METHOD(str_isdigit, template_is_digit, false)
CLASS_METHOD(str_isnumeric, template_is_numeric, false)
CLASS_METHOD(str_isspace, template_is_space, false)
CLASS_METHOD(str_isascii, is_ascii, true)
CLASS_METHOD(str_isprintable, template_is_printable, true)

static choir_status all_cased(template_render *r, const template_string *s, int how,
                              template_value *out)
{
    bool any = false, bad = false;
    CHOIR_TRY(template_charge_bytes(r, s->bytes * 4));
    for (size_t i = 0; i < s->bytes && !bad;) {
        uint32_t code;
        i += template_utf8_decode(s->data + i, s->bytes - i, &code);
        int c = template_char_case(code);
        any |= c == how;
        bad = c != 0 && c != how;
    }
    *out = template_bool(any && !bad);
    return CHOIR_OK;
}

METHOD(str_isupper)
{
    return (void)all, all_cased(r, slots[0].s, 1, out);
}
METHOD(str_islower)
{
    return (void)all, all_cased(r, slots[0].s, -1, out);
}

METHOD(str_istitle)
{
    const template_string *s = slots[0].s;
    bool any = false, bad = false, in_word = false;
    (void)all;
    CHOIR_TRY(template_charge_bytes(r, s->bytes * 4));
    for (size_t i = 0; i < s->bytes && !bad;) {
        uint32_t code;
        i += template_utf8_decode(s->data + i, s->bytes - i, &code);
        int c = template_char_case(code);
        bad = c != 0 && (c == -1) != in_word;
        any |= c != 0;
        in_word = c != 0;
    }
    *out = template_bool(any && !bad);
    return CHOIR_OK;
}

METHOD(str_isidentifier)
{
    const template_string *s = slots[0].s;
    bool ok = s->bytes > 0;
    (void)all;
    CHOIR_TRY(template_charge_bytes(r, s->bytes * 4));
    for (size_t i = 0; i < s->bytes && ok;) {
        uint32_t code;
        size_t n = template_utf8_decode(s->data + i, s->bytes - i, &code);
        ok = code == '_' || template_is_alpha(code) || (i > 0 && template_is_decimal(code));
        i += n;
    }
    *out = template_bool(ok);
    return CHOIR_OK;
}

/* ---- Padding ---- */

static choir_status pad(template_render *r, template_value *slots, int side, template_value *out)
{
    template_string *s = slots[0].s, *fill = NULL;
    int64_t width = 0, n = (int64_t)template_string_chars(s);
    uint32_t code = ' ';
    template_text text = {.r = r};
    CHOIR_TRY(template_want_int(r, slots[1], "a width", &width));
    CHOIR_TRY(template_want_string(r, slots[2], "a fill character", &fill));
    if (fill != NULL && template_string_chars(fill) != 1)
        return template_error(r, "a fill character must be one character");
    if (fill != NULL) template_utf8_decode(fill->data, fill->bytes, &code);
    if (width <= n) {
        *out = slots[0];
        return CHOIR_OK;
    }
    int64_t margin = width - n, left = 0;
    if (side < 0) left = margin;
    if (side == 0) left = margin / 2 + (margin & width & 1); /* as Python divides the odd one */
    CHOIR_TRY(template_text_add_char(&text, code, (size_t)left));
    CHOIR_TRY(template_text_add(&text, s->data, s->bytes));
    CHOIR_TRY(template_text_add_char(&text, code, (size_t)(margin - left)));
    return template_text_value(&text, out);
}

METHOD(str_ljust)
{
    return (void)all, pad(r, slots, 1, out);
}
METHOD(str_rjust)
{
    return (void)all, pad(r, slots, -1, out);
}
METHOD(str_center)
{
    return (void)all, pad(r, slots, 0, out);
}

METHOD(str_zfill)
{
    template_string *s = slots[0].s;
    int64_t width = 0, n = (int64_t)template_string_chars(s);
    template_text text = {.r = r};
    size_t sign = s->bytes > 0 && (s->data[0] == '+' || s->data[0] == '-');
    (void)all;
    CHOIR_TRY(template_want_int(r, slots[1], "zfill's width", &width));
    CHOIR_TRY(template_text_add(&text, s->data, sign));
    if (width > n) CHOIR_TRY(template_text_add_char(&text, '0', (size_t)(width - n)));
    CHOIR_TRY(template_text_add(&text, s->data + sign, s->bytes - sign));
    return template_text_value(&text, out);
}

METHOD(str_expandtabs)
{
    const template_string *s = slots[0].s;
    int64_t size = 8, column = 0;
    template_text text = {.r = r};
    (void)all;
    CHOIR_TRY(template_want_int(r, slots[1], "expandtabs's size", &size));
    CHOIR_TRY(template_charge_bytes(r, 4 * s->bytes));
    for (size_t i = 0; i < s->bytes;) {
        uint32_t code;
        size_t n = template_utf8_decode(s->data + i, s->bytes - i, &code);
        int64_t spaces = code == '\t' && size > 0 ? size - column % size : 0;
        if (code == '\t')
            CHOIR_TRY(template_text_add_char(&text, ' ', (size_t)spaces));
        else
            CHOIR_TRY(template_text_add(&text, s->data + i, n));
        column = code == '\n' || code == '\r' ? 0 : code == '\t' ? column + spaces : column + 1;
        i += n;
    }
    return template_text_value(&text, out);
}

METHOD(str_format)
{
    return template_format(r, slots[0].s, all, out);
}

METHOD(str_format_map)
{
    (void)all;
    if (slots[1].type != TEMPLATE_DICT) return template_error(r, "format_map wants a dict");
    const template_dict *d = slots[1].dict;
    template_arguments args = {0};
    CHOIR_TRY(template_alloc_n(r, d->n + 1, sizeof *args.names, &args.names));
    CHOIR_TRY(template_alloc_n(r, d->n + 1, sizeof *args.named, &args.named));
    for (size_t i = 0; i < d->n; i++) {
        if (d->entries[i].key.type != TEMPLATE_STRING) continue;
        args.names[args.n_named] = d->entries[i].key.s;
        args.named[args.n_named++] = d->entries[i].value;
    }
    return template_format(r, slots[0].s, &args, out);
}

METHOD(str_unavailable)
{
    (void)slots;
    (void)all;
    (void)out;
    return template_error(r, "this method of strings is not available to chat templates");
}

const template_builtin *template_find_string_method(const template_string *name)
{
    // clang-format off
    static const template_builtin methods[] = {
        {"strip", "self chars?", str_strip},
        {"split", "self sep? maxsplit?", str_split},
        {"startswith", "self prefix start? end?", str_startswith},
        {"endswith", "self suffix start? end?", str_endswith},
        {"lstrip", "self chars?", str_lstrip},
        {"rstrip", "self chars?", str_rstrip},
        {"replace", "self old new count?", str_replace},
        {"upper", "self", str_upper},
        {"lower", "self", str_lower},
        {"title", "self", str_title},
        {"capitalize", "self", str_capitalize},
        {"join", "self iterable", str_join},
        {"format", "*", str_format},
        {"find", "self sub start? end?", str_find},
        {"rfind", "self sub start? end?", str_rfind},
        {"index", "self sub start? end?", str_index},
        {"rindex", "self sub start? end?", str_rindex},
        {"count", "self sub start? end?", str_count},
        {"rsplit", "self sep? maxsplit?", str_rsplit},
        {"splitlines", "self keepends?", str_splitlines},
        {"partition", "self sep", str_partition},
        {"rpartition", "self sep", str_rpartition},
        {"removeprefix", "self prefix", str_removeprefix},
        {"removesuffix", "self suffix", str_removesuffix},
        {"isalpha", "self", str_isalpha},
        {"isalnum", "self", str_isalnum},
        {"isdecimal", "self", str_isdecimal},
        {"isdigit", "self", str_isdigit},
        {"isnumeric", "self", str_isnumeric},
        {"isspace", "self", str_isspace},
        {"isascii", "self", str_isascii},
        {"isprintable", "self", str_isprintable},
        {"isupper", "self", str_isupper},
        {"islower", "self", str_islower},
        {"istitle", "self", str_istitle},
        {"isidentifier", "self", str_isidentifier},
        {"ljust", "self width fillchar?", str_ljust},
        {"rjust", "self width fillchar?", str_rjust},
        {"center", "self width fillchar?", str_center},
        {"zfill", "self width", str_zfill},
        {"swapcase", "self", str_swapcase},
        {"casefold", "self", str_casefold},
        {"expandtabs", "self tabsize?", str_expandtabs},
        {"format_map", "self mapping", str_format_map},
        {"encode", "*", str_unavailable},
        {"translate", "*", str_unavailable},
        {"maketrans", "*", str_unavailable},
    };
    // clang-format on
    return template_find_builtin(methods, sizeof methods / sizeof *methods, name);
}
