/* A template's tokens. Whitespace control happens here, as in Jinja with trim_blocks and
 * lstrip_blocks: a block's or comment's own indentation and the line break after it vanish unless a
 * + keeps them, and a - takes all whitespace on its side. Brackets are balanced here too, because
 * within them }} and %} end nothing. */
#include "engine/chat_template_render.h"
#include <errno.h>
#include <stdlib.h>

typedef struct lexer {
    template_pool *pool;
    template_names *names;
    template_tokens *out;
    const char *p, *end;
    uint32_t line;
    bool line_starting;                 /* what came before ended its line */
    char closers[TEMPLATE_MAX_NESTING]; /* brackets still open in this tag */
    size_t n_closers;
} lexer;

const char *template_token_text(template_token_kind kind)
{
    static const char *const texts[] = {
#define X(name, text) text,
        TEMPLATE_TOKENS(X)
#undef X
    };
    return texts[kind];
}

choir_status template_refuse(uint32_t line, const char *format, ...)
{
    char text[600];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return choir_fail(CHOIR_E_FORMAT, "line %u: %s", line, text);
}

/* ---- Names ---- */

static size_t hash_name(const char *data, size_t bytes)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++) h = (h ^ (unsigned char)data[i]) * 0x100000001b3u;
    return (size_t)(h ^ h >> 32);
}

static choir_status grow_names(template_pool *pool, template_names *names)
{
    template_names bigger = {.n = names->n, .size = names->size == 0 ? 64 : 4 * names->size};
    CHOIR_TRY(template_pool_alloc(pool, bigger.size * sizeof *bigger.slots, &bigger.slots));
    memset(bigger.slots, 0, bigger.size * sizeof *bigger.slots);
    for (size_t i = 0; i < names->size; i++) {
        template_string *s = names->slots[i];
        if (s == NULL) continue;
        size_t at = hash_name(s->data, s->bytes) & (bigger.size - 1);
        while (bigger.slots[at] != NULL) at = (at + 1) & (bigger.size - 1);
        bigger.slots[at] = s;
    }
    *names = bigger;
    return CHOIR_OK;
}

choir_status template_intern(template_pool *pool, template_names *names, const char *data,
                             size_t bytes, template_string **out)
{
    if (2 * names->n >= names->size) CHOIR_TRY(grow_names(pool, names));
    size_t at = hash_name(data, bytes) & (names->size - 1);
    for (; names->slots[at] != NULL; at = (at + 1) & (names->size - 1)) {
        *out = names->slots[at];
        if ((*out)->bytes == bytes && memcmp((*out)->data, data, bytes) == 0) return CHOIR_OK;
    }
    CHOIR_TRY(template_string_make(pool, data, bytes, true, out));
    template_string_chars(*out);
    names->slots[at] = *out;
    names->n++;
    return CHOIR_OK;
}

/* ---- Small steps ---- */

static choir_status push(lexer *x, template_token_kind kind, template_value value)
{
    template_tokens *t = x->out;
    if (t->n == t->capacity) {
        size_t capacity = t->capacity == 0 ? 256 : 2 * t->capacity;
        template_token *items;
        CHOIR_TRY(template_pool_alloc(x->pool, capacity * sizeof *items, &items));
        if (t->n > 0) memcpy(items, t->items, t->n * sizeof *items);
        t->items = items;
        t->capacity = capacity;
    }
    t->items[t->n++] = (template_token){(uint8_t)kind, x->line, value};
    return CHOIR_OK;
}

static choir_status push_string(lexer *x, template_token_kind kind, const char *data, size_t bytes)
{
    template_string *s;
    CHOIR_TRY(template_string_make(x->pool, data, bytes, false, &s));
    template_string_chars(
        s); /* constants are shared by renders: nothing is computed in them later */
    return push(x, kind, TEMPLATE_VALUE(STRING, s, s));
}

static bool at(const lexer *x, const char *text)
{
    size_t n = strlen(text);
    return (size_t)(x->end - x->p) >= n && memcmp(x->p, text, n) == 0;
}

static size_t space_at(const char *p, const char *end)
{
    uint32_t code;
    if (p >= end) return 0;
    size_t n = template_utf8_decode(p, (size_t)(end - p), &code);
    return template_is_space(code) ? n : 0;
}

static const char *skip_space(const char *p, const char *end)
{
    for (size_t n; (n = space_at(p, end)) > 0;) p += n;
    return p;
}

/* Where the text's trailing whitespace begins. */
static const char *strip_right(const char *from, const char *to)
{
    while (to > from) {
        const char *p = to - 1;
        while (p > from && ((unsigned char)*p & 0xc0) == 0x80) p--;
        if (space_at(p, to) != (size_t)(to - p)) break;
        to = p;
    }
    return to;
}

static void move_to(lexer *x, const char *p)
{
    for (; x->p < p; x->p++) x->line += *x->p == '\n';
}

/* Past a tag's end mark: %} or #} with their sign before, or }}. Moves on if it is here. */
static bool close_tag(lexer *x, const char *mark)
{
    const char *p = x->p;
    char sign = *p == '-' || (*p == '+' && mark[0] != '}') ? *p : 0;
    if (sign != 0) p++;
    if (x->end - p < 2 || memcmp(p, mark, 2) != 0) return false;
    p += 2;
    if (sign == '-')
        p = skip_space(p, x->end);
    else if (sign == 0 && mark[0] != '}' && p < x->end && *p == '\n')
        p++;
    move_to(x, p);
    x->line_starting = p[-1] == '\n';
    return true;
}

/* The text before a tag, with what the tag's sign and its kind take off its end. */
static choir_status push_text(lexer *x, const char *from, const char *to, char sign, bool print)
{
    const char *end = to;
    if (sign == '-') {
        end = strip_right(from, to);
    } else if (sign != '+' && !print) {
        const char *line = memrchr(from, '\n', (size_t)(to - from));
        line = line == NULL ? from : line + 1;
        if ((line > from || x->line_starting) && skip_space(line, to) == to) end = line;
    }
    if (end > from) CHOIR_TRY(push_string(x, TOKEN_DATA, from, (size_t)(end - from)));
    move_to(x, to);
    return CHOIR_OK;
}

/* ---- Literals ---- */

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* One escape sequence after its backslash; *q moves on and what it means is written to *w. */
static choir_status unescape(lexer *x, const char **q, const char *end, char **w)
{
    static const char letters[] = "\\\\''\"\"a\ab\bf\fn\nr\rt\tv\v";
    char c = *(*q)++;
    uint32_t code = 0;
    size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    for (size_t i = 0; i + 1 < sizeof letters; i += 2)
        if (letters[i] == c) {
            *(*w)++ = letters[i + 1];
            return CHOIR_OK;
        }
    if (c == '\n') return CHOIR_OK; /* the line goes on */
    if (c == 'N') return template_refuse(x->line, "\\N{name} escapes are not available");
    if (c >= '0' && c <= '7') {
        code = (uint32_t)(c - '0');
        for (int i = 0; i < 2 && *q < end && **q >= '0' && **q <= '7'; i++)
            code = code * 8 + (uint32_t)(*(*q)++ - '0');
    } else if (digits > 0) {
        for (size_t i = 0; i < digits; i++, ++*q) {
            int digit = *q < end ? hex_digit(**q) : -1;
            if (digit < 0) return template_refuse(x->line, "truncated \\%c escape", c);
            code = code << 4 | (uint32_t)digit;
        }
        if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
            return template_refuse(x->line, "\\%c escape of %#x, which is no character", c, code);
    } else { /* unknown escapes stay as they are */
        *(*w)++ = '\\';
        *(*w)++ = c;
        return CHOIR_OK;
    }
    *w += template_utf8_encode(code, *w);
    return CHOIR_OK;
}

static choir_status lex_string(lexer *x)
{
    char quote = *x->p;
    const char *start = x->p + 1, *q = start;
    bool plain = true;
    while (q < x->end && *q != quote) {
        if (*q == '\\') {
            plain = false;
            q++;
        }
        q++;
    }
    if (q >= x->end) return template_refuse(x->line, "a string has no end");
    if (plain) {
        CHOIR_TRY(push_string(x, TOKEN_TEXT, start, (size_t)(q - start)));
    } else {
        char *text, *w;
        CHOIR_TRY(template_pool_alloc(x->pool, (size_t)(q - start), &text));
        w = text;
        for (const char *from = start; from < q;) {
            if (*from != '\\') {
                *w++ = *from++;
                continue;
            }
            from++;
            CHOIR_TRY(unescape(x, &from, q, &w));
        }
        CHOIR_TRY(push_string(x, TOKEN_TEXT, text, (size_t)(w - text)));
    }
    move_to(x, q + 1);
    return CHOIR_OK;
}

/* Digits of the base with single underscores between; returns their end. */
static const char *digits_end(const char *p, const char *end, int base)
{
    const char *q = p;
    for (;;) {
        const char *d = q < end && *q == '_' && q > p ? q + 1 : q;
        int digit = d < end ? hex_digit(*d) : -1;
        if (digit < 0 || digit >= base) return q;
        q = d + 1;
    }
}

static choir_status copy_digits(lexer *x, const char *from, const char *to, char **out)
{
    char *w;
    CHOIR_TRY(template_pool_alloc(x->pool, (size_t)(to - from) + 1, out));
    w = *out;
    for (; from < to; from++)
        if (*from != '_') *w++ = *from;
    *w = 0;
    return CHOIR_OK;
}

static choir_status lex_number(lexer *x)
{
    const char *p = x->p, *stop = digits_end(p, x->end, 10), *q = stop;
    bool real = false;
    char *text;
    if (p[-1] != '.') { /* the lexer never stands at the source's first byte here */
        if (q + 1 < x->end && *q == '.' && digits_end(q + 1, x->end, 10) > q + 1) {
            q = digits_end(q + 1, x->end, 10);
            real = true;
        }
        if (q < x->end && (*q | 0x20) == 'e') {
            const char *e = q + 1 < x->end && (q[1] == '+' || q[1] == '-') ? q + 2 : q + 1;
            if (digits_end(e, x->end, 10) > e) {
                q = digits_end(e, x->end, 10);
                real = true;
            }
        }
    }
    if (real) {
        CHOIR_TRY(copy_digits(x, p, q, &text));
        CHOIR_TRY(push(x, TOKEN_REAL, template_float(strtod(text, NULL))));
        move_to(x, q);
        return CHOIR_OK;
    }
    int base = 10;
    if (*p == '0' && x->end - p > 2) {
        char letter = p[1] | 0x20;
        base = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 10;
        const char *from = p[2] == '_' ? p + 3 : p + 2;
        if (base != 10 && digits_end(from, x->end, base) > from) {
            stop = digits_end(from, x->end, base);
            p = from;
        } else {
            base = 10;
        }
    }
    if (base == 10 && *p == '0') /* a zero before other digits stands alone, as in Python */
        for (stop = p; stop < x->end && (*stop == '0' || (*stop == '_' && stop[1] == '0'));) stop++;
    CHOIR_TRY(copy_digits(x, p, stop, &text));
    errno = 0;
    int64_t value = strtoll(text, NULL, base);
    if (errno != 0)
        return template_refuse(x->line, "the integer %.40s has more than 64 bits", text);
    CHOIR_TRY(push(x, TOKEN_INTEGER, template_int(value)));
    move_to(x, stop);
    return CHOIR_OK;
}

static size_t name_char(const lexer *x, const char *p, bool first)
{
    uint32_t code;
    if (p >= x->end) return 0;
    size_t n = template_utf8_decode(p, (size_t)(x->end - p), &code);
    bool ok = code == '_' || template_is_alpha(code) || (!first && template_is_decimal(code));
    return ok ? n : 0;
}

static choir_status lex_name(lexer *x)
{
    const char *p = x->p;
    template_string *s;
    for (size_t n; (n = name_char(x, p, p == x->p)) > 0;) p += n;
    CHOIR_TRY(template_intern(x->pool, x->names, x->p, (size_t)(p - x->p), &s));
    CHOIR_TRY(push(x, TOKEN_NAME, TEMPLATE_VALUE(STRING, s, s)));
    x->p = p;
    return CHOIR_OK;
}

static choir_status balance(lexer *x, char c)
{
    static const char openers[] = "([{", closers[] = ")]}";
    const char *o = strchr(openers, c);
    if (o != NULL) {
        if (x->n_closers == sizeof x->closers)
            return template_refuse(x->line, "brackets nest deeper than %d", TEMPLATE_MAX_NESTING);
        x->closers[x->n_closers++] = closers[o - openers];
        return CHOIR_OK;
    }
    if (strchr(closers, c) == NULL) return CHOIR_OK;
    if (x->n_closers == 0) return template_refuse(x->line, "unexpected '%c'", c);
    char want = x->closers[--x->n_closers];
    if (want != c) return template_refuse(x->line, "unexpected '%c', expected '%c'", c, want);
    return CHOIR_OK;
}

static choir_status lex_operator(lexer *x)
{
    for (int kind = TOKEN_FLOORDIV; kind <= TOKEN_SEMICOLON; kind++) {
        const char *text = template_token_text((template_token_kind)kind);
        if (!at(x, text)) continue;
        if (text[1] == 0) CHOIR_TRY(balance(x, text[0]));
        CHOIR_TRY(push(x, (template_token_kind)kind, template_none()));
        x->p += strlen(text);
        return CHOIR_OK;
    }
    uint32_t code;
    template_utf8_decode(x->p, (size_t)(x->end - x->p), &code);
    if (template_is_printable(code) && code < 0x80)
        return template_refuse(x->line, "unexpected character '%c'", (char)code);
    return template_refuse(x->line, "unexpected character U+%04X", code);
}

/* ---- Tags ---- */

/* The tokens between {{ and }}, or {% and %}. */
static choir_status lex_tag(lexer *x, bool print)
{
    x->n_closers = 0;
    for (;;) {
        move_to(x, skip_space(x->p, x->end));
        if (x->p >= x->end)
            return template_refuse(x->line, "the template ends within %s",
                                   print ? "{{ }}" : "{% %}");
        uint32_t line = x->line;
        if (x->n_closers == 0 && close_tag(x, print ? "}}" : "%}")) {
            uint32_t after = x->line;
            x->line = line;
            CHOIR_TRY(push(x, print ? TOKEN_CLOSE_PRINT : TOKEN_CLOSE_BLOCK, template_none()));
            x->line = after;
            return CHOIR_OK;
        }
        char c = *x->p;
        if (c >= '0' && c <= '9')
            CHOIR_TRY(lex_number(x));
        else if (c == '\'' || c == '"')
            CHOIR_TRY(lex_string(x));
        else if (name_char(x, x->p, true) > 0)
            CHOIR_TRY(lex_name(x));
        else
            CHOIR_TRY(lex_operator(x));
    }
}

static choir_status lex_comment(lexer *x)
{
    uint32_t line = x->line;
    for (;; move_to(x, x->p + 1)) {
        if (x->p >= x->end) return template_refuse(line, "a comment {# has no end");
        if (close_tag(x, "#}")) return CHOIR_OK;
    }
}

/* Where "{%- raw" or the like ends its name, or NULL; *sign is what follows {%. */
static const char *tag_named(const lexer *x, const char *p, const char *name, char *sign)
{
    size_t n = strlen(name);
    if (x->end - p < 2 || p[0] != '{' || p[1] != '%') return NULL;
    p += 2;
    *sign = p < x->end && (*p == '-' || *p == '+') ? *p++ : 0;
    p = skip_space(p, x->end);
    if ((size_t)(x->end - p) < n || memcmp(p, name, n) != 0) return NULL;
    return skip_space(p + n, x->end);
}

static choir_status lex_raw(lexer *x, const char *body)
{
    uint32_t line = x->line;
    char sign;
    move_to(x, body);
    x->line_starting = body[-1] == '\n';
    for (const char *p = body; p < x->end; p++) {
        const char *stop = tag_named(x, p, "endraw", &sign);
        if (stop == NULL || stop >= x->end) continue;
        lexer probe = *x;
        probe.p = stop;
        if (!close_tag(&probe, "%}")) continue;
        CHOIR_TRY(push_text(x, body, p, sign, false));
        move_to(x, stop);
        (void)close_tag(x, "%}");
        return CHOIR_OK;
    }
    return template_refuse(line, "{%% raw %%} has no end");
}

/* The end of "{% raw %}" if that is what stands here: its own line break is not trimmed. */
static const char *raw_begin(const lexer *x, const char *p, char *sign)
{
    const char *q = tag_named(x, p, "raw", sign);
    if (q == NULL || x->end - q < 2) return NULL;
    if (memcmp(q, "%}", 2) == 0) return q + 2;
    if (x->end - q > 2 && memcmp(q, "-%}", 3) == 0) return skip_space(q + 3, x->end);
    return NULL;
}

static const char *find_tag(const char *p, const char *end)
{
    for (; (p = memchr(p, '{', (size_t)(end - p))) != NULL; p++)
        if (p + 1 < end && (p[1] == '{' || p[1] == '%' || p[1] == '#')) return p;
    return NULL;
}

static choir_status lex_all(lexer *x)
{
    while (x->p < x->end) {
        const char *tag = find_tag(x->p, x->end);
        if (tag == NULL) {
            CHOIR_TRY(push_string(x, TOKEN_DATA, x->p, (size_t)(x->end - x->p)));
            break;
        }
        char kind = tag[1], sign = 0;
        const char *raw = kind == '%' ? raw_begin(x, tag, &sign) : NULL;
        if (raw == NULL && tag + 2 < x->end && (tag[2] == '-' || tag[2] == '+'))
            sign = tag[2];
        else if (raw == NULL)
            sign = 0;
        CHOIR_TRY(push_text(x, x->p, tag, sign, kind == '{'));
        if (raw != NULL) {
            CHOIR_TRY(lex_raw(x, raw));
            continue;
        }
        x->p = tag + 2 + (sign != 0);
        x->line_starting = false;
        if (kind == '#') {
            CHOIR_TRY(lex_comment(x));
            continue;
        }
        CHOIR_TRY(push(x, kind == '{' ? TOKEN_OPEN_PRINT : TOKEN_OPEN_BLOCK, template_none()));
        CHOIR_TRY(lex_tag(x, kind == '{'));
    }
    return push(x, TOKEN_END, template_none());
}

/* Line breaks become \n, and one at the very end goes. */
static size_t normalise(const char *source, size_t bytes, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < bytes; i++) {
        char c = source[i];
        if (c == '\r') {
            c = '\n';
            if (i + 1 < bytes && source[i + 1] == '\n') i++;
        }
        out[n++] = c;
    }
    return n > 0 && out[n - 1] == '\n' ? n - 1 : n;
}

choir_status template_lex(template_pool *pool, template_names *names, const char *source,
                          size_t bytes, template_tokens *out)
{
    char *text;
    CHOIR_TRY(template_pool_alloc(pool, bytes + 1, &text));
    size_t n = normalise(source, bytes, text);
    text[n] = 0;
    lexer x = {.pool = pool,
               .names = names,
               .out = out,
               .p = text,
               .end = text + n,
               .line = 1,
               .line_starting = true};
    return lex_all(&x);
}
