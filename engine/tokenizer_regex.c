/* From Oniguruma's Ruby dialect to PCRE2's. What differs, and what becomes of it:
 *   \s \S \w \W \b \B \d \h   Oniguruma's own sets, written out as ranges and properties
 *   \p{L} and the like        what Unicode 16 added to the category is appended for an older PCRE2
 *   [a[bc]] [a&&b]            nested sets and intersections become alternations and lookaheads
 *   x{2,3}+ x{2}? x{,3}       (?:x{2,3})+ (?:x{2})? x{0,3}: possessive or lazy only in Perl
 *   (?m: (?i)                 Ruby's m is PCRE2's s; a bare (?i) embraces the alternatives behind
 * it \v \xE9 \R \K \1 (?(      the vertical tab; the others are refused
 * Behind every repetition comes a callout, by which the steps of a match are counted: the JIT itself
 * counts no loop over single characters. */
#include "engine/tokenizer_regex.h"

#include "engine/tokenizer_unicode.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_DEPTH = 60, MAX_TRANSLATED = 1 << 20 /* beyond what PCRE2 compiles anyway */ };

typedef struct group {
    size_t start;    /* of its text in `out` */
    uint32_t closes; /* parentheses to close with it: one, and one for each bare (?i) inside */
} group;

typedef struct translation {
    const char *where, *source;
    size_t bytes, at;
    choir_bytes *out;
    size_t atom; /* where the last atom starts in `out`; SIZE_MAX: nothing to repeat */
    group groups[MAX_DEPTH];
    uint32_t n_groups;
    bool add_new; /* PCRE2's tables are older than Unicode 16 */
} translation;

#define SPACES                                                                                     \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}"             \
    "\\x{202f}\\x{205f}\\x{3000}"
#define NOT_SPACES                                                                                 \
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}"                   \
    "\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}"                 \
    "\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}"
/* What Oniguruma's \w holds besides L, M, Nd, Nl and Pc. */
#define WORD_REST                                                                                  \
    "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}"                 \
    "\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"

static choir_status refuse(const translation *t, const char *what)
{
    return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: %s at byte %zu of the pattern is not supported",
                      t->where, what, t->at);
}

static choir_status put(choir_bytes *out, const char *text)
{
    return choir_bytes_append(out, text, strlen(text));
}

static choir_status put_code_point(choir_bytes *out, uint32_t c)
{
    char text[16];
    snprintf(text, sizeof text, "\\x{%x}", c);
    return put(out, text);
}

/* The characters that Unicode 15 to 16 added to a category; "" takes none. */
static choir_status put_new(const translation *t, choir_bytes *out, const char *category)
{
    if (!t->add_new || category[0] == '\0') return CHOIR_OK;
    for (size_t i = 0; i < choir_unicode_n_new; i++) {
        const choir_unicode_range *r = &choir_unicode_new[i];
        if (strncmp(r->category, category, strlen(category)) != 0) continue;
        CHOIR_TRY(put_code_point(out, r->first));
        if (r->last == r->first) continue;
        CHOIR_TRY(put(out, "-"));
        CHOIR_TRY(put_code_point(out, r->last));
    }
    return CHOIR_OK;
}

static choir_status put_category(const translation *t, choir_bytes *out, const char *category)
{
    char text[16];
    snprintf(text, sizeof text, "\\p{%s}", category);
    CHOIR_TRY(put(out, text));
    return put_new(t, out, category);
}

static choir_status put_word(const translation *t, choir_bytes *out)
{
    static const char *const categories[] = {"L", "M", "Nd", "Nl", "Pc"};
    for (size_t i = 0; i < 5; i++) CHOIR_TRY(put_category(t, out, categories[i]));
    return put(out, WORD_REST);
}

/* What \p{name} means: a category, or text for the inside of a PCRE2 set. */
static const struct {
    const char *name, *category, *set;
} properties[] = {
    {"letter", "L", NULL},
    {"uppercaseletter", "Lu", NULL},
    {"lowercaseletter", "Ll", NULL},
    {"titlecaseletter", "Lt", NULL},
    {"modifierletter", "Lm", NULL},
    {"otherletter", "Lo", NULL},
    {"mark", "M", NULL},
    {"nonspacingmark", "Mn", NULL},
    {"spacingmark", "Mc", NULL},
    {"enclosingmark", "Me", NULL},
    {"number", "N", NULL},
    {"decimalnumber", "Nd", NULL},
    {"letternumber", "Nl", NULL},
    {"othernumber", "No", NULL},
    {"punctuation", "P", NULL},
    {"symbol", "S", NULL},
    {"separator", "Z", NULL},
    {"digit", "Nd", NULL},
    {"mathsymbol", "Sm", NULL},
    {"currencysymbol", "Sc", NULL},
    {"othersymbol", "So", NULL},
    {"space", NULL, SPACES},
    {"whitespace", NULL, SPACES},
};

static bool is_category(const char *name)
{
    static const char *const known =
        " L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po "
        "S Sm Sc Sk So Z Zs Zl Zp C Cc Cf Cs Co Cn ";
    char spaced[8];
    if (strlen(name) > 2) return false;
    snprintf(spaced, sizeof spaced, " %s ", name);
    return strstr(known, spaced) != NULL;
}

/* After "\p" or "\P": the inside of a set, and whether its complement is meant. */
static choir_status read_property(translation *t, bool negated, choir_bytes *set, bool *complement)
{
    if (t->at >= t->bytes || t->source[t->at] != '{') return refuse(t, "a \\p without braces");
    const char *open = t->source + t->at + 1;
    const char *close = memchr(open, '}', t->bytes - t->at - 1);
    if (close == NULL || close - open > 40) return refuse(t, "an endless \\p{");
    t->at = (size_t)(close - t->source) + 1;
    if (open < close && *open == '^') {
        negated = !negated;
        open++;
    }
    *complement = negated;
    char name[48], folded[48];
    size_t n = 0, n_folded = 0;
    for (const char *c = open; c < close; c++) {
        bool letter =
            (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9');
        if (!letter && *c != ' ' && *c != '-' && *c != '_') return refuse(t, "this \\p{}");
        name[n++] = *c;
        if (letter) folded[n_folded++] = *c >= 'A' && *c <= 'Z' ? (char)(*c + 32) : *c;
    }
    name[n] = folded[n_folded] = '\0';
    if (n_folded > 0 && n_folded <= 2) {
        folded[0] = (char)(folded[0] - (folded[0] >= 'a' ? 32 : 0));
        if (is_category(folded)) return put_category(t, set, folded);
    }
    for (size_t i = 0; i < sizeof properties / sizeof properties[0]; i++) {
        if (strcmp(properties[i].name, folded) != 0) continue;
        return properties[i].category != NULL ? put_category(t, set, properties[i].category)
                                              : put(set, properties[i].set);
    }
    /* A script: in PCRE2 a bare name would mean its extensions too. */
    CHOIR_TRY(put(set, "\\p{sc:"));
    CHOIR_TRY(put(set, name));
    return put(set, "}");
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* After "\x" or "\u". */
static choir_status read_hex(translation *t, char kind, uint32_t *out)
{
    uint32_t value = 0;
    size_t most = kind == 'u' ? 4 : 2, n = 0;
    bool braces = kind == 'x' && t->at < t->bytes && t->source[t->at] == '{';
    if (braces) {
        t->at++;
        most = 6;
    }
    while (n < most && t->at < t->bytes && hex_digit(t->source[t->at]) >= 0) {
        value = value * 16 + (uint32_t)hex_digit(t->source[t->at++]);
        n++;
    }
    if (n == 0 || (kind == 'u' && n != 4)) return refuse(t, "an escape without hex digits");
    if (braces && (t->at >= t->bytes || t->source[t->at++] != '}')) return refuse(t, "this \\x{");
    if (!braces && kind == 'x' && value >= 0x80)
        return refuse(t, "a single byte (\\x80 and above)");
    if (value > 0x10FFFF || (value >= 0xD800 && value < 0xE000))
        return refuse(t, "this code point");
    *out = value;
    return CHOIR_OK;
}

/* An escape, the backslash being read: a code point (*is_set false), or the inside of a set with
 * its complement flag. */
static choir_status read_escape(translation *t, uint32_t *code_point, bool *is_set,
                                choir_bytes *set, bool *complement)
{
    if (t->at >= t->bytes) return refuse(t, "a lone backslash");
    static const char controls[] = "n\nt\tr\rf\fv\va\ae\033";
    char c = t->source[t->at];
    *is_set = *complement = false;
    if ((uint8_t)c >= 0x80) {
        *code_point = choir_utf8_next(t->source, &t->at);
        return CHOIR_OK;
    }
    t->at++;
    for (size_t i = 0; i + 1 < sizeof controls; i += 2)
        if (c == controls[i]) {
            *code_point = (uint8_t)controls[i + 1];
            return CHOIR_OK;
        }
    if (c == 'x' || c == 'u') return read_hex(t, c, code_point);
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (!letter) {
        *code_point = (uint8_t)c;
        return CHOIR_OK;
    }
    *is_set = true;
    *complement = c >= 'A' && c <= 'Z';
    switch (c) {
    case 's':
    case 'S':
        return put(set, SPACES);
    case 'w':
    case 'W':
        return put_word(t, set);
    case 'd':
    case 'D':
        return put_category(t, set, "Nd");
    case 'h':
    case 'H':
        return put(set, "0-9A-Fa-f");
    case 'p':
    case 'P':
        return read_property(t, c == 'P', set, complement);
    default:
        t->at--;
        return refuse(t, "this escape");
    }
}

static choir_status read_set(translation *t, uint32_t depth, choir_bytes *out);

/* One operand of && in a set: plain items, and items that are sets of their own. */
typedef struct operand {
    choir_bytes items;  /* the inside of a PCRE2 set */
    choir_bytes nested; /* "|[^…]|…" */
} operand;

static choir_status put_operand(choir_bytes *out, const operand *o, const char *negation)
{
    if (o->nested.n == 0 && o->items.n > 0) {
        CHOIR_TRY(put(out, "["));
        CHOIR_TRY(put(out, negation));
        CHOIR_TRY(choir_bytes_append(out, o->items.data, o->items.n));
        return put(out, "]");
    }
    CHOIR_TRY(put(out, negation[0] != '\0' ? "(?:(?!" : "(?:"));
    if (o->items.n > 0) {
        CHOIR_TRY(put(out, "["));
        CHOIR_TRY(choir_bytes_append(out, o->items.data, o->items.n));
        CHOIR_TRY(put(out, "]"));
        CHOIR_TRY(choir_bytes_append(out, o->nested.data, o->nested.n));
    } else if (o->nested.n > 0) {
        CHOIR_TRY(choir_bytes_append(out, o->nested.data + 1, o->nested.n - 1));
    } else {
        CHOIR_TRY(put(out, "(?!)"));
    }
    return put(out, negation[0] != '\0' ? ")(?s:.))" : ")");
}

static choir_status read_posix(translation *t, choir_bytes *items)
{
    static const struct {
        const char *name;
        const char *set;
    } classes[] = {{"[:space:]", SPACES}, {"[:xdigit:]", "0-9A-Fa-f"}};
    for (size_t i = 0; i < sizeof classes / sizeof classes[0]; i++) {
        size_t n = strlen(classes[i].name);
        if (t->bytes - t->at < n || memcmp(t->source + t->at, classes[i].name, n) != 0) continue;
        t->at += n;
        return put(items, classes[i].set);
    }
    if (t->bytes - t->at >= 9 && memcmp(t->source + t->at, "[:digit:]", 9) == 0) {
        t->at += 9;
        return put_category(t, items, "Nd");
    }
    return refuse(t, "this POSIX class");
}

/* One item of a set into `o`: a character, a range, a class or a nested set. */
static choir_status read_item(translation *t, uint32_t depth, operand *o)
{
    char c = t->source[t->at];
    if (c == '[') {
        if (t->at + 1 < t->bytes && t->source[t->at + 1] == ':') return read_posix(t, &o->items);
        CHOIR_TRY(put(&o->nested, "|"));
        return read_set(t, depth + 1, &o->nested);
    }
    uint32_t first, last;
    bool is_set = false, complement = false;
    size_t before = o->items.n;
    if (c == '\\') {
        t->at++;
        if (t->at < t->bytes && t->source[t->at] == 'S') {
            t->at++;
            return put(&o->items, NOT_SPACES);
        }
        choir_bytes set = {0};
        choir_status status = read_escape(t, &first, &is_set, &set, &complement);
        if (status == CHOIR_OK && is_set && complement) {
            status = put(&o->nested, "|[^");
            if (status == CHOIR_OK) status = choir_bytes_append(&o->nested, set.data, set.n);
            if (status == CHOIR_OK) status = put(&o->nested, "]");
        } else if (status == CHOIR_OK && is_set) {
            status = choir_bytes_append(&o->items, set.data, set.n);
        }
        choir_free(set.data);
        if (status != CHOIR_OK || is_set) return status;
    } else {
        first = choir_utf8_next(t->source, &t->at);
    }
    CHOIR_TRY(put_code_point(&o->items, first));
    if (t->at + 1 >= t->bytes || t->source[t->at] != '-' || t->source[t->at + 1] == ']' ||
        t->source[t->at + 1] == '[')
        return CHOIR_OK;
    t->at++;
    if (t->source[t->at] == '\\') {
        t->at++;
        choir_bytes set = {0};
        choir_status status = read_escape(t, &last, &is_set, &set, &complement);
        choir_free(set.data);
        if (status == CHOIR_OK && is_set) status = refuse(t, "a range that ends in a class");
        if (status != CHOIR_OK) return status;
    } else {
        last = choir_utf8_next(t->source, &t->at);
    }
    if (last < first) {
        o->items.n = before;
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: a range in the pattern ends before it starts (byte %zu)", t->where,
                          t->at);
    }
    CHOIR_TRY(put(&o->items, "-"));
    return put_code_point(&o->items, last);
}

/* The operands of a set behind "[" and "^"; `seen` is the intersection of those before the last. */
static choir_status read_operands(translation *t, uint32_t depth, operand *o, choir_bytes *seen)
{
    for (bool start = true;; start = false) {
        if (t->at >= t->bytes) return refuse(t, "a set without its end");
        char c = t->source[t->at];
        if (c == ']' && !start) {
            t->at++;
            return CHOIR_OK;
        }
        if (c == '&' && t->at + 1 < t->bytes && t->source[t->at + 1] == '&') {
            t->at += 2;
            CHOIR_TRY(put(seen, "(?="));
            CHOIR_TRY(put_operand(seen, o, ""));
            CHOIR_TRY(put(seen, ")"));
            o->items.n = o->nested.n = 0;
            continue;
        }
        CHOIR_TRY(read_item(t, depth, o));
    }
}

/* A set, t->at being at its "[": something that matches one character. */
static choir_status read_set(translation *t, uint32_t depth, choir_bytes *out)
{
    if (depth > 8) return refuse(t, "a set nested so deep");
    t->at++;
    bool negated = t->at < t->bytes && t->source[t->at] == '^';
    if (negated) t->at++;
    operand o = {0};
    choir_bytes seen = {0};
    choir_status status = read_operands(t, depth, &o, &seen);
    if (status == CHOIR_OK && seen.n == 0) {
        status = put_operand(out, &o, negated ? "^" : "");
    } else if (status == CHOIR_OK) {
        status = put(out, negated ? "(?:(?!" : "(?:");
        if (status == CHOIR_OK) status = choir_bytes_append(out, seen.data, seen.n);
        if (status == CHOIR_OK) status = put_operand(out, &o, "");
        if (status == CHOIR_OK) status = put(out, negated ? ")(?s:.))" : ")");
    }
    choir_free(o.items.data);
    choir_free(o.nested.data);
    choir_free(seen.data);
    return status;
}

/* \b and \B by Oniguruma's word characters. */
static choir_status put_boundary(const translation *t, bool negated)
{
    static const char *const parts[2][5] = {
        {"(?:(?<=[", "])(?![", "])|(?<![", "])(?=[", "]))"},
        {"(?:(?<=[", "])(?=[", "])|(?<![", "])(?![", "]))"},
    };
    for (size_t i = 0; i < 5; i++) {
        CHOIR_TRY(put(t->out, parts[negated][i]));
        if (i < 4) CHOIR_TRY(put_word(t, t->out));
    }
    return CHOIR_OK;
}

static choir_status outside_escape(translation *t)
{
    t->at++;
    char c = t->at < t->bytes ? t->source[t->at] : '\0';
    if (c == 'b' || c == 'B') {
        t->at++;
        return put_boundary(t, c == 'B');
    }
    if (c == 'A' || c == 'z' || c == 'Z') {
        t->at++;
        char text[3] = {'\\', c, '\0'};
        return put(t->out, text);
    }
    uint32_t code_point;
    bool is_set, complement;
    choir_bytes set = {0};
    choir_status status = read_escape(t, &code_point, &is_set, &set, &complement);
    if (status == CHOIR_OK && !is_set) status = put_code_point(t->out, code_point);
    if (status == CHOIR_OK && is_set) {
        status = put(t->out, complement ? "[^" : "[");
        if (status == CHOIR_OK) status = choir_bytes_append(t->out, set.data, set.n);
        if (status == CHOIR_OK) status = put(t->out, "]");
    }
    choir_free(set.data);
    return status;
}

/* "(" with its options; what is not listed is refused. */
static choir_status open_group(translation *t)
{
    static const char *const plain[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    if (t->n_groups == MAX_DEPTH) return refuse(t, "a group nested so deep");
    group *g = &t->groups[t->n_groups];
    *g = (group){t->out->n, 1};
    const char *s = t->source + t->at;
    size_t left = t->bytes - t->at;
    t->atom = SIZE_MAX;
    if (left < 2 || s[1] != '?') {
        t->at++;
        t->n_groups++;
        return put(t->out, "(?:"); /* captures are of no use here */
    }
    for (size_t i = 0; i < sizeof plain / sizeof plain[0]; i++) {
        size_t n = strlen(plain[i]);
        if (left < n || memcmp(s, plain[i], n) != 0) continue;
        t->at += n;
        t->n_groups++;
        return put(t->out, plain[i]);
    }
    char options[16] = "(?";
    size_t n = 2, i = 2;
    for (; i < left && n < sizeof options - 2 && strchr("im-", s[i]) != NULL && s[i] != '\0'; i++)
        options[n++] = s[i] == 'm' ? 's' : s[i];
    if (i >= left || i == 2 || (s[i] != ':' && s[i] != ')')) return refuse(t, "this kind of group");
    t->at += i + 1;
    options[n++] = ':';
    options[n] = '\0';
    if (s[i] == ':') {
        t->n_groups++;
        return put(t->out, options);
    }
    if (t->n_groups > 0)
        t->groups[t->n_groups - 1].closes++;
    else
        return refuse(t,
                      "a bare option outside of a group"); /* wrapped by the caller, never seen */
    return put(t->out, options);
}

static choir_status put_count(translation *t)
{
    t->atom = SIZE_MAX;
    return put(t->out, "(?C1)");
}

static choir_status close_group(translation *t)
{
    if (t->n_groups <= 1)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: a closing parenthesis without its opening one (byte %zu)", t->where,
                          t->at);
    group *g = &t->groups[--t->n_groups];
    for (uint32_t i = 0; i < g->closes; i++) CHOIR_TRY(put(t->out, ")"));
    t->atom = g->start;
    t->at++;
    return CHOIR_OK;
}

/* Puts "(?:" before the last atom and ")" behind it. */
static choir_status wrap_atom(translation *t)
{
    CHOIR_TRY(choir_bytes_append(t->out, "(?:)", 4));
    char *a = t->out->data + t->atom;
    size_t n = t->out->n - 4 - t->atom;
    memmove(a + 3, a, n);
    memcpy(a, "(?:", 3);
    t->out->data[t->out->n - 1] = ')';
    return CHOIR_OK;
}

/* A number of at most 5 digits; -1: none here. */
static int read_number(const translation *t, size_t *at)
{
    int value = -1;
    for (size_t n = 0; n < 5 && *at < t->bytes; n++, ++*at) {
        char c = t->source[*at];
        if (c < '0' || c > '9') break;
        value = (value < 0 ? 0 : value) * 10 + (c - '0');
    }
    return value;
}

/* "{n,m}" and what follows it; a brace that starts no interval stands for itself. */
static choir_status interval(translation *t)
{
    size_t at = t->at + 1;
    int low = read_number(t, &at), high = low;
    bool comma = at < t->bytes && t->source[at] == ',';
    if (comma) {
        at++;
        high = read_number(t, &at);
    }
    if (at >= t->bytes || t->source[at] != '}' || (low < 0 && high < 0)) {
        t->atom = t->out->n;
        t->at++;
        return put(t->out, "\\{");
    }
    if (t->atom == SIZE_MAX)
        return choir_fail(CHOIR_E_FORMAT, "%s: nothing to repeat at byte %zu of the pattern",
                          t->where, t->at);
    t->at = at + 1;
    char text[40];
    if (comma && high < 0)
        snprintf(text, sizeof text, "{%d,}", low);
    else
        snprintf(text, sizeof text, "{%d,%d}", low < 0 ? 0 : low, high);
    CHOIR_TRY(put(t->out, text));
    char next = t->at < t->bytes ? t->source[t->at] : '\0';
    if (next == '+' || (next == '?' && !comma)) {
        CHOIR_TRY(wrap_atom(t));
    } else if (next == '?') {
        CHOIR_TRY(put(t->out, "?"));
        t->at++;
        return put_count(t);
    } else {
        return put_count(t);
    }
    return CHOIR_OK;
}

static choir_status quantifier(translation *t)
{
    if (t->atom == SIZE_MAX)
        return choir_fail(CHOIR_E_FORMAT, "%s: nothing to repeat at byte %zu of the pattern",
                          t->where, t->at);
    char text[3] = {t->source[t->at++], '\0', '\0'};
    if (t->at < t->bytes && (t->source[t->at] == '?' || t->source[t->at] == '+'))
        text[1] = t->source[t->at++];
    CHOIR_TRY(put(t->out, text));
    return put_count(t);
}

static choir_status translate(translation *t)
{
    while (t->at < t->bytes) {
        char c = t->source[t->at];
        if (t->out->n > MAX_TRANSLATED) return refuse(t, "an expression this long, its classes written out,");
        switch (c) {
        case '\\':
            t->atom = t->out->n;
            CHOIR_TRY(outside_escape(t));
            break;
        case '[':
            t->atom = t->out->n;
            CHOIR_TRY(read_set(t, 0, t->out));
            break;
        case '(':
            CHOIR_TRY(open_group(t));
            break;
        case ')':
            CHOIR_TRY(close_group(t));
            break;
        case '{':
            CHOIR_TRY(interval(t));
            break;
        case '*':
        case '+':
        case '?':
            CHOIR_TRY(quantifier(t));
            break;
        case '|':
            t->atom = SIZE_MAX;
            t->at++;
            CHOIR_TRY(put(t->out, "|"));
            break;
        case '^':
        case '$':
        case '.': {
            char text[2] = {c, '\0'};
            t->atom = t->out->n;
            t->at++;
            CHOIR_TRY(put(t->out, text));
            break;
        }
        default:
            t->atom = t->out->n;
            CHOIR_TRY(put_code_point(t->out, choir_utf8_next(t->source, &t->at)));
        }
    }
    return CHOIR_OK;
}

choir_status choir_regex_translate(const char *where, const char *source, size_t bytes,
                                   choir_bytes *out)
{
    if (choir_utf8_check(source, bytes) != bytes)
        return choir_fail(CHOIR_E_FORMAT, "%s: the pattern is not valid UTF-8", where);
    char version[32] = "";
    pcre2_config(PCRE2_CONFIG_UNICODE_VERSION, version);
    translation t = {where, source, bytes, 0, out, SIZE_MAX};
    t.add_new = atoi(version) < 16;
    t.groups[t.n_groups++] =
        (group){0, 1}; /* the whole, so that a bare (?i) has what to end with */
    CHOIR_TRY(put(out, "(?:"));
    CHOIR_TRY(translate(&t));
    if (t.n_groups != 1)
        return choir_fail(CHOIR_E_FORMAT, "%s: %u parentheses of the pattern are never closed",
                          where, t.n_groups - 1);
    for (uint32_t i = 0; i < t.groups[0].closes; i++) CHOIR_TRY(put(out, ")"));
    return CHOIR_OK;
}
