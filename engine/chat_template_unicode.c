/* Unicode as Python's str sees it: decoding, the classes its methods ask for, and case mapping. */
#include "engine/chat_template_render.h"
#include <utf8proc.h>

size_t template_utf8_decode(const char *data, size_t bytes, uint32_t *code)
{
    const unsigned char *p = (const unsigned char *)data;
    if (p[0] < 0x80) {
        *code = p[0];
        return 1;
    }
    utf8proc_int32_t c = -1;
    utf8proc_ssize_t n = utf8proc_iterate(p, (utf8proc_ssize_t)bytes, &c);
    if (n < 1) { /* never in checked text; a step forward all the same */
        *code = 0xfffd;
        return 1;
    }
    *code = (uint32_t)c;
    return (size_t)n;
}

size_t template_utf8_encode(uint32_t code, char out[4])
{
    return (size_t)utf8proc_encode_char((utf8proc_int32_t)code, (utf8proc_uint8_t *)out);
}

static utf8proc_category_t category(uint32_t code)
{
    return utf8proc_category((int32_t)code);
}

bool template_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 ||
           c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

bool template_is_alpha(uint32_t code)
{
    utf8proc_category_t c = category(code);
    return c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_LO;
}

bool template_is_decimal(uint32_t code)
{
    return category(code) == UTF8PROC_CATEGORY_ND;
}

/* Superscripts, subscripts and circled digits are digits that are not decimals. */
bool template_is_digit(uint32_t c)
{
    return template_is_decimal(c) || c == 0xb2 || c == 0xb3 || c == 0xb9 || c == 0x2070 ||
           (c >= 0x2074 && c <= 0x2079) || (c >= 0x2080 && c <= 0x2089) ||
           (c >= 0x1369 && c <= 0x1371) || c == 0x19da || (c >= 0x2460 && c <= 0x2468) ||
           (c >= 0x2474 && c <= 0x247c) || (c >= 0x2488 && c <= 0x2490) || c == 0x24ea ||
           (c >= 0x24f5 && c <= 0x24fd) || c == 0x24ff || (c >= 0x2776 && c <= 0x277e) ||
           (c >= 0x2780 && c <= 0x2788) || (c >= 0x278a && c <= 0x2792) ||
           (c >= 0x10a40 && c <= 0x10a43) || (c >= 0x10e60 && c <= 0x10e68) ||
           (c >= 0x11052 && c <= 0x1105a) || (c >= 0x1f100 && c <= 0x1f10a);
}

bool template_is_numeric(uint32_t code)
{
    utf8proc_category_t c = category(code);
    return c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_NO;
}

bool template_is_printable(uint32_t code)
{
    if (code == ' ') return true;
    switch (category(code)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
        return false;
    default:
        return true;
    }
}

int template_char_case(uint32_t code)
{
    if (code < 0x80) return code >= 'A' && code <= 'Z' ? 1 : code >= 'a' && code <= 'z' ? -1 : 0;
    if (category(code) == UTF8PROC_CATEGORY_LT) return 2;
    if (utf8proc_isupper((utf8proc_int32_t)code)) return 1;
    return utf8proc_islower((utf8proc_int32_t)code) ? -1 : 0;
}

/* Characters whose upper, title or folded form is more than one character (SpecialCasing.txt of the
 * Unicode character database, its unconditional rows that real text meets). */
// clang-format off
static const struct special { uint32_t code; const char *upper, *title, *fold; } specials[] = {
    {0x00df, "SS", "Ss", "ss"},
    {0x0149, "\u02bcN", "\u02bcN", "\u02bcn"},
    {0x01f0, "J\u030c", "J\u030c", "j\u030c"},
    {0x0390, "\u0399\u0308\u0301", "\u0399\u0308\u0301", "\u03b9\u0308\u0301"},
    {0x03b0, "\u03a5\u0308\u0301", "\u03a5\u0308\u0301", "\u03c5\u0308\u0301"},
    {0x0587, "\u0535\u0552", "\u0535\u0582", "\u0565\u0582"},
    {0x1e96, "H\u0331", "H\u0331", "h\u0331"},
    {0x1e97, "T\u0308", "T\u0308", "t\u0308"},
    {0x1e98, "W\u030a", "W\u030a", "w\u030a"},
    {0x1e99, "Y\u030a", "Y\u030a", "y\u030a"},
    {0x1e9a, "A\u02be", "A\u02be", "a\u02be"},
    {0x1e9e, "\u1e9e", "\u1e9e", "ss"},
    {0xfb00, "FF", "Ff", "ff"},
    {0xfb01, "FI", "Fi", "fi"},
    {0xfb02, "FL", "Fl", "fl"},
    {0xfb03, "FFI", "Ffi", "ffi"},
    {0xfb04, "FFL", "Ffl", "ffl"},
    {0xfb05, "ST", "St", "st"},
    {0xfb06, "ST", "St", "st"},
};
// clang-format on

static const char *special_case(uint32_t code, template_case how)
{
    for (size_t i = 0; i < sizeof specials / sizeof *specials; i++)
        if (specials[i].code == code)
            return how == TEMPLATE_UPPER   ? specials[i].upper
                   : how == TEMPLATE_TITLE ? specials[i].title
                                           : specials[i].fold;
    return NULL;
}

/* Folding differs from lower case for few letters; those that real text meets are here. */
static uint32_t fold(uint32_t code)
{
    switch (code) {
    case 0xb5:
        return 0x3bc;
    case 0x17f:
        return 's';
    case 0x345:
        return 0x3b9;
    case 0x3c2:
        return 0x3c3;
    case 0x3d0:
        return 0x3b2;
    case 0x3d1:
        return 0x3b8;
    case 0x3d5:
        return 0x3c6;
    case 0x3d6:
        return 0x3c0;
    case 0x3f0:
        return 0x3ba;
    case 0x3f1:
        return 0x3c1;
    case 0x3f5:
        return 0x3b5;
    default:
        return (uint32_t)utf8proc_tolower((utf8proc_int32_t)code);
    }
}

static bool is_cased(uint32_t code)
{
    return template_char_case(code) != 0;
}

/* A sigma ends a word when a cased letter stands before it and none follows. */
static bool final_sigma(const template_string *s, size_t at, size_t after)
{
    uint32_t code = 0;
    bool before = false;
    for (size_t i = at; i > 0 && !before;) {
        do i--;
        while (i > 0 && ((unsigned char)s->data[i] & 0xc0) == 0x80);
        template_utf8_decode(s->data + i, s->bytes - i, &code);
        utf8proc_category_t c = category(code);
        if (is_cased(code))
            before = true;
        else if (c != UTF8PROC_CATEGORY_MN && c != UTF8PROC_CATEGORY_CF && code != '\'')
            break;
    }
    if (!before) return false;
    for (size_t i = after; i < s->bytes;) {
        i += template_utf8_decode(s->data + i, s->bytes - i, &code);
        utf8proc_category_t c = category(code);
        if (is_cased(code)) return false;
        if (c != UTF8PROC_CATEGORY_MN && c != UTF8PROC_CATEGORY_CF && code != '\'') break;
    }
    return true;
}

static choir_status add_cased(template_text *t, const template_string *s, size_t at, size_t bytes,
                              uint32_t code, template_case how)
{
    if (how == TEMPLATE_LOWER && code == 0x3a3)
        return template_text_add_char(t, final_sigma(s, at, at + bytes) ? 0x3c2 : 0x3c3, 1);
    if (how == TEMPLATE_LOWER && code == 0x130) return template_text_add(t, "i\u0307", 3);
    if (code >= 0xdf && how != TEMPLATE_LOWER) {
        const char *text = special_case(code, how);
        if (text != NULL) return template_text_add(t, text, strlen(text));
    }
    utf8proc_int32_t c = (utf8proc_int32_t)code;
    if (how == TEMPLATE_UPPER) c = utf8proc_toupper(c);
    if (how == TEMPLATE_LOWER) c = utf8proc_tolower(c);
    if (how == TEMPLATE_TITLE) c = utf8proc_totitle(c);
    if (how == TEMPLATE_FOLD) c = (utf8proc_int32_t)fold(code);
    return template_text_add_char(t, (uint32_t)c, 1);
}

choir_status template_change_case(template_render *r, const template_string *s, template_case how,
                                  template_value *out)
{
    template_text t = {.r = r};
    bool in_word = false;
    CHOIR_TRY(template_charge_bytes(r, 8 * s->bytes));
    for (size_t i = 0; i < s->bytes;) {
        uint32_t code;
        template_case now = how;
        size_t n = template_utf8_decode(s->data + i, s->bytes - i, &code);
        if (how == TEMPLATE_TITLE && in_word) now = TEMPLATE_LOWER;
        if (how == TEMPLATE_CAPITAL) now = i == 0 ? TEMPLATE_TITLE : TEMPLATE_LOWER;
        if (how == TEMPLATE_SWAP) {
            int c = template_char_case(code);
            now = c == 1 ? TEMPLATE_LOWER : TEMPLATE_UPPER;
        }
        CHOIR_TRY(add_cased(&t, s, i, n, code, now));
        in_word = how == TEMPLATE_TITLE && is_cased(code);
        i += n;
    }
    return template_text_value(&t, out);
}
