/* Normalizers, step after step over the text between added tokens. Each reads one buffer and writes
 * the other. */
#include "engine/tokenizer_internal.h"

#include <utf8proc.h>

/* ---- Unicode's forms */
/* Below U+0300 nothing combines and nothing has another composed form: NFC leaves it alone. ASCII
 * is left alone by all four. */
static bool is_plain(const char *text, size_t bytes, uint8_t first_special)
{
    for (size_t i = 0; i < bytes; i++)
        if ((uint8_t)text[i] >= first_special) return false;
    return true;
}

/* Marks behind a starter, sorted by combining class and stable: a merge from the bottom, so that a
 * long run of marks costs n log n. */
static void order_marks(utf8proc_int32_t *c, uint8_t *class, size_t n, utf8proc_int32_t *spare,
                        uint8_t *spare_class)
{
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t low = 0; low + width < n; low += 2 * width) {
            size_t middle = low + width, high = middle + width < n ? middle + width : n;
            if (class[middle - 1] <= class[middle]) continue;
            size_t i = low, j = middle, k = low;
            while (i < middle || j < high) {
                bool left = j == high || (i < middle && class[i] <= class[j]);
                size_t from = left ? i++ : j++;
                spare[k] = c[from];
                spare_class[k++] = class[from];
            }
            memcpy(c + low, spare + low, (high - low) * sizeof *c);
            memcpy(class + low, spare_class + low, high - low);
        }
    }
}

/* utf8proc's tables decompose and compose; its own ordering is quadratic in a run of marks. */
typedef struct decomposition {
    utf8proc_int32_t *c, *spare;
    uint8_t *class, *spare_class;
    size_t n;
} decomposition;

static size_t decompose_one(uint32_t c, int options, utf8proc_int32_t *out, size_t room)
{
    int boundary = 0;
    if (!choir_unicode_formless(c))
        return (size_t)utf8proc_decompose_char((utf8proc_int32_t)c, out, (utf8proc_ssize_t)room,
                                               (utf8proc_option_t)options, &boundary);
    if (room > 0) out[0] = (utf8proc_int32_t)c;
    return 1;
}

/* Composes what lies between characters that the reference does not know to combine. */
static void compose(decomposition *d)
{
    size_t n = 0;
    for (size_t i = 0; i < d->n;) {
        size_t begin = i;
        while (i < d->n && !choir_unicode_formless((uint32_t)d->c[i])) i++;
        if (i > begin) {
            size_t made = (size_t)utf8proc_normalize_utf32(
                d->c + begin, (utf8proc_ssize_t)(i - begin), UTF8PROC_STABLE | UTF8PROC_COMPOSE);
            memmove(d->c + n, d->c + begin, made * sizeof *d->c);
            n += made;
        }
        if (i < d->n) d->c[n++] = d->c[i++];
    }
    d->n = n;
}

static choir_status decompose(const char *text, size_t bytes, int options, decomposition *d)
{
    size_t most = 0;
    for (size_t at = 0; at < bytes;)
        most += decompose_one(choir_utf8_next(text, &at), options, NULL, 0);
    d->c = choir_alloc(CHOIR_MEM_TOKENIZER, (most + 1) * 2 * sizeof *d->c);
    d->class = choir_alloc(CHOIR_MEM_TOKENIZER, (most + 1) * 2);
    if (d->c == NULL || d->class == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory to normalise %zu bytes", bytes);
    d->spare = d->c + most + 1;
    d->spare_class = d->class + most + 1;
    for (size_t at = 0; at < bytes;)
        d->n += decompose_one(choir_utf8_next(text, &at), options, d->c + d->n, most - d->n);
    for (size_t i = 0; i < d->n; i++)
        d->class[i] = choir_unicode_formless((uint32_t)d->c[i])
                          ? 0
                          : (uint8_t)utf8proc_get_property(d->c[i])->combining_class;
    for (size_t i = 0; i < d->n;) {
        size_t begin = i;
        while (i < d->n && d->class[i] != 0) i++;
        if (i - begin > 1)
            order_marks(d->c + begin, d->class + begin, i - begin, d->spare + begin,
                        d->spare_class + begin);
        while (i < d->n && d->class[i] == 0) i++;
    }
    return CHOIR_OK;
}

static choir_status to_form(choir_normal_kind kind, const char *text, size_t bytes,
                            choir_bytes *out)
{
    bool composed = kind == CHOIR_NORMAL_NFC || kind == CHOIR_NORMAL_NFKC;
    bool compatible = kind == CHOIR_NORMAL_NFKC || kind == CHOIR_NORMAL_NFKD;
    if (is_plain(text, bytes, kind == CHOIR_NORMAL_NFC ? 0xCC : 0x80))
        return choir_bytes_append(out, text, bytes);
    int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compatible ? UTF8PROC_COMPAT : 0);
    decomposition d = {0};
    choir_status status = decompose(text, bytes, options, &d);
    if (status == CHOIR_OK && composed) compose(&d);
    if (status == CHOIR_OK) status = choir_bytes_reserve(out, 4 * d.n);
    for (size_t i = 0; status == CHOIR_OK && i < d.n; i++)
        out->n += choir_utf8_put((uint32_t)d.c[i], out->data + out->n);
    choir_free(d.c);
    choir_free(d.class);
    return status;
}

/* ---- the others */
static choir_status lowercase(const char *text, size_t bytes, choir_bytes *out)
{
    CHOIR_TRY(choir_bytes_reserve(out, 2 * bytes + 8)); /* the longest: U+0130, 2 bytes to 3 */
    for (size_t at = 0; at < bytes;) {
        uint32_t c = choir_utf8_next(text, &at);
        if (c == 0x130) { /* the one character whose lower case is two */
            CHOIR_TRY(choir_bytes_append(out, "i\xCC\x87", 3));
            continue;
        }
        CHOIR_TRY(choir_bytes_reserve(out, 4));
        out->n += choir_utf8_put(choir_unicode_lower(c), out->data + out->n);
    }
    return CHOIR_OK;
}

static choir_status strip(const choir_normal_step *step, const char *text, size_t bytes,
                          choir_bytes *out)
{
    size_t begin = 0, end = bytes;
    while (step->left && begin < end) {
        size_t next = begin;
        if (!choir_unicode_space(choir_utf8_next(text, &next))) break;
        begin = next;
    }
    while (step->right && end > begin) {
        size_t before = choir_utf8_before(text, end), next = before;
        if (!choir_unicode_space(choir_utf8_next(text, &next))) break;
        end = before;
    }
    return choir_bytes_append(out, text + begin, end - begin);
}

static choir_status strip_accents(const char *text, size_t bytes, choir_bytes *out)
{
    for (size_t at = 0; at < bytes;) {
        size_t begin = at;
        if (choir_unicode_mark(choir_utf8_next(text, &at))) continue;
        CHOIR_TRY(choir_bytes_append(out, text + begin, at - begin));
    }
    return CHOIR_OK;
}

static choir_status replace(const choir_normal_step *step, const char *text, size_t bytes,
                            size_t limit, choir_match *match, choir_bytes *out)
{
    size_t last = 0;
    choir_match_begin(match, text, bytes);
    for (;;) {
        size_t begin, end;
        bool found;
        CHOIR_TRY(choir_match_next(step->pattern, match, &begin, &end, &found));
        if (!found) break;
        CHOIR_TRY(choir_bytes_append(out, text + last, begin - last));
        CHOIR_TRY(choir_bytes_append(out, step->content, step->content_bytes));
        last = end;
        if (out->n > limit) return choir_text_too_long(out->n);
    }
    return choir_bytes_append(out, text + last, bytes - last);
}

/* SentencePiece's cleaning of control characters and odd spaces. */
static choir_status nmt(const char *text, size_t bytes, choir_bytes *out)
{
    for (size_t at = 0; at < bytes;) {
        size_t begin = at;
        uint32_t c = choir_utf8_next(text, &at);
        if ((c >= 1 && c <= 8) || c == 0x0B || (c >= 0x0E && c <= 0x1F) || c == 0x7F || c == 0x8F ||
            c == 0x9F)
            continue;
        bool space = c == 9 || c == 10 || c == 12 || c == 13 || c == 0x1680 ||
                     (c >= 0x200B && c <= 0x200F) || c == 0x2028 || c == 0x2029 || c == 0x2581 ||
                     c == 0xFEFF || c == 0xFFFD;
        CHOIR_TRY(space ? choir_bytes_append(out, " ", 1)
                        : choir_bytes_append(out, text + begin, at - begin));
    }
    return CHOIR_OK;
}

static choir_status collapse_spaces(const char *text, size_t bytes, choir_bytes *out)
{
    CHOIR_TRY(choir_bytes_reserve(out, bytes));
    while (bytes > 0 && text[bytes - 1] == ' ') bytes--;
    bool space = true;
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] == ' ' && space) continue;
        space = text[i] == ' ';
        out->data[out->n++] = text[i];
    }
    return CHOIR_OK;
}

static choir_status run(const choir_normal_step *step, const char *text, size_t bytes, size_t limit,
                        choir_match *match, choir_bytes *out)
{
    switch (step->kind) {
    case CHOIR_NORMAL_NFC:
    case CHOIR_NORMAL_NFD:
    case CHOIR_NORMAL_NFKC:
    case CHOIR_NORMAL_NFKD:
        return to_form(step->kind, text, bytes, out);
    case CHOIR_NORMAL_LOWERCASE:
        return lowercase(text, bytes, out);
    case CHOIR_NORMAL_STRIP:
        return strip(step, text, bytes, out);
    case CHOIR_NORMAL_STRIP_ACCENTS:
        return strip_accents(text, bytes, out);
    case CHOIR_NORMAL_REPLACE:
        return replace(step, text, bytes, limit, match, out);
    case CHOIR_NORMAL_NMT:
        return nmt(text, bytes, out);
    case CHOIR_NORMAL_COLLAPSE_SPACES:
        return collapse_spaces(text, bytes, out);
    case CHOIR_NORMAL_PREPEND:
        if (bytes > 0) CHOIR_TRY(choir_bytes_append(out, step->content, step->content_bytes));
        return choir_bytes_append(out, text, bytes);
    case CHOIR_NORMAL_BYTE_LEVEL:
        CHOIR_TRY(choir_bytes_reserve(out, 2 * bytes));
        for (size_t i = 0; i < bytes; i++)
            out->n += choir_utf8_put(choir_byte_to_char((uint8_t)text[i]), out->data + out->n);
        return CHOIR_OK;
    }
    return CHOIR_OK;
}

choir_status choir_normalize(const choir_normal_step *steps, size_t n_steps, const char *text,
                             size_t bytes, choir_bytes buffers[2], choir_match *match,
                             const char **out, size_t *out_bytes)
{
    size_t limit = choir_text_limit(bytes);
    for (size_t i = 0; i < n_steps; i++) {
        choir_bytes *to = &buffers[i & 1];
        to->n = 0;
        CHOIR_TRY(choir_bytes_reserve(to, bytes + 1));
        CHOIR_TRY(run(&steps[i], text, bytes, limit, match, to));
        if (to->n > limit) return choir_text_too_long(to->n);
        text = to->data;
        bytes = to->n;
    }
    *out = text;
    *out_bytes = bytes;
    return CHOIR_OK;
}
