/* Pre-tokenizers. Each step walks over the pieces that the step before left and cuts them again;
 * steps that change the text write a new one. A cut is a row of parts, matched or not, that covers
 * the piece; what becomes of matched parts is the step's behaviour. */
#include "engine/tokenizer_internal.h"

/* Turns parts into pieces. Which parts join depends on their neighbours only, so one is held back.
 */
typedef struct cutter {
    choir_split_behaviour behaviour;
    choir_pieces *out;
    bool first; /* the piece being cut starts the caller's text */
    size_t origin;
    bool holding, held_match, matched_before;
    size_t begin, end; /* what is held */
} cutter;

static choir_status release(cutter *c)
{
    if (!c->holding) return CHOIR_OK;
    c->holding = false;
    return choir_pieces_push(c->out, c->begin, c->end, c->first && c->begin == c->origin);
}

static choir_status hold(cutter *c, size_t begin, size_t end, bool match)
{
    CHOIR_TRY(release(c));
    c->holding = true;
    c->held_match = match;
    c->begin = begin;
    c->end = end;
    return CHOIR_OK;
}

static choir_status part(cutter *c, size_t begin, size_t end, bool match)
{
    bool before = c->matched_before;
    c->matched_before = match;
    switch (c->behaviour) {
    case CHOIR_SPLIT_REMOVED:
        if (match) return CHOIR_OK;
        __attribute__((fallthrough));
    case CHOIR_SPLIT_ISOLATED:
        return choir_pieces_push(c->out, begin, end, c->first && begin == c->origin);
    case CHOIR_SPLIT_CONTIGUOUS:
        if (c->holding && match == before) break;
        return hold(c, begin, end, match);
    case CHOIR_SPLIT_MERGED_WITH_PREVIOUS:
        if (c->holding && match && !before) break;
        return hold(c, begin, end, match);
    case CHOIR_SPLIT_MERGED_WITH_NEXT:
        if (c->holding && c->held_match && !match) {
            c->held_match = false;
            break;
        }
        return hold(c, begin, end, match);
    }
    c->end = end; /* joined to what is held */
    return CHOIR_OK;
}

static bool in_class(const choir_split_step *step, uint32_t c)
{
    switch (step->kind) {
    case CHOIR_SPLIT_NUMERIC:
        return choir_unicode_numeric(c);
    case CHOIR_SPLIT_PUNCTUATION:
        return choir_unicode_punctuation(c);
    case CHOIR_SPLIT_SPACE:
        return choir_unicode_space(c);
    default:
        return c == step->character;
    }
}

static choir_status cut_by_class(const choir_split_step *step, const char *text, choir_piece piece,
                                 cutter *c)
{
    size_t last = piece.begin;
    for (size_t at = piece.begin; at < piece.end;) {
        size_t begin = at;
        if (!in_class(step, choir_utf8_next(text, &at))) continue;
        if (last < begin) CHOIR_TRY(part(c, last, begin, step->invert));
        CHOIR_TRY(part(c, begin, at, !step->invert));
        last = at;
    }
    if (last < piece.end) CHOIR_TRY(part(c, last, piece.end, step->invert));
    return CHOIR_OK;
}

static choir_status cut_by_pattern(const choir_split_step *step, const char *text,
                                   choir_piece piece, choir_match *match, cutter *c)
{
    size_t last = 0, bytes = piece.end - piece.begin;
    choir_match_begin(match, text + piece.begin, bytes);
    for (;;) {
        size_t begin, end;
        bool found;
        CHOIR_TRY(choir_match_next(step->pattern, match, &begin, &end, &found));
        if (!found) break;
        if (last != begin)
            CHOIR_TRY(part(c, piece.begin + last, piece.begin + begin, step->invert));
        CHOIR_TRY(part(c, piece.begin + begin, piece.begin + end, !step->invert));
        last = end;
    }
    if (last != bytes) CHOIR_TRY(part(c, piece.begin + last, piece.end, step->invert));
    return CHOIR_OK;
}

static choir_status cut_by_length(const choir_split_step *step, const char *text, choir_piece piece,
                                  choir_pieces *out)
{
    for (size_t at = piece.begin; at < piece.end;) {
        size_t begin = at;
        for (uint32_t i = 0; i < step->length && at < piece.end; i++) choir_utf8_next(text, &at);
        CHOIR_TRY(choir_pieces_push(out, begin, at, piece.first && begin == piece.begin));
    }
    return CHOIR_OK;
}

/* ---- steps that write a new text */
static choir_status prefix_space(const char *text, choir_piece piece, choir_bytes *out)
{
    if (text[piece.begin] != ' ') CHOIR_TRY(choir_bytes_append(out, " ", 1));
    return choir_bytes_append(out, text + piece.begin, piece.end - piece.begin);
}

static choir_status write_bytes(const char *text, choir_piece piece, choir_bytes *out)
{
    CHOIR_TRY(choir_bytes_reserve(out, 2 * (piece.end - piece.begin)));
    for (size_t i = piece.begin; i < piece.end; i++)
        out->n += choir_utf8_put(choir_byte_to_char((uint8_t)text[i]), out->data + out->n);
    return CHOIR_OK;
}

static choir_status write_marks(const choir_split_step *step, const char *text, choir_piece piece,
                                choir_bytes *out)
{
    char mark[4];
    size_t mark_bytes = choir_utf8_put(step->character, mark), bytes = piece.end - piece.begin;
    const char *s = text + piece.begin;
    bool starts = s[0] == ' ' || (bytes >= mark_bytes && memcmp(s, mark, mark_bytes) == 0);
    bool wanted = step->prepend == CHOIR_PREPEND_ALWAYS ||
                  (step->prepend == CHOIR_PREPEND_FIRST && piece.first);
    if (wanted && !starts) CHOIR_TRY(choir_bytes_append(out, mark, mark_bytes));
    for (size_t i = 0; i < bytes;) {
        const char *space = memchr(s + i, ' ', bytes - i);
        size_t end = space == NULL ? bytes : (size_t)(space - s);
        CHOIR_TRY(choir_bytes_append(out, s + i, end - i));
        if (space != NULL) CHOIR_TRY(choir_bytes_append(out, mark, mark_bytes));
        i = end + 1;
    }
    return CHOIR_OK;
}

static bool changes_text(const choir_split_step *step)
{
    return step->kind == CHOIR_SPLIT_PREFIX_SPACE || step->kind == CHOIR_SPLIT_BYTES ||
           step->kind == CHOIR_SPLIT_METASPACE;
}

static choir_status change(const choir_split_step *step, const char *text, const choir_pieces *in,
                           choir_bytes *new_text, choir_pieces *out)
{
    for (size_t i = 0; i < in->n; i++) {
        size_t begin = new_text->n;
        choir_piece piece = in->data[i];
        if (step->kind == CHOIR_SPLIT_PREFIX_SPACE)
            CHOIR_TRY(prefix_space(text, piece, new_text));
        else if (step->kind == CHOIR_SPLIT_BYTES)
            CHOIR_TRY(write_bytes(text, piece, new_text));
        else
            CHOIR_TRY(write_marks(step, text, piece, new_text));
        CHOIR_TRY(choir_pieces_push(out, begin, new_text->n, piece.first));
    }
    return CHOIR_OK;
}

static choir_status cut(const choir_split_step *step, const char *text, const choir_pieces *in,
                        choir_match *match, choir_pieces *out)
{
    for (size_t i = 0; i < in->n; i++) {
        choir_piece piece = in->data[i];
        cutter c = {step->behaviour, out, piece.first, piece.begin};
        if (step->kind == CHOIR_SPLIT_PATTERN)
            CHOIR_TRY(cut_by_pattern(step, text, piece, match, &c));
        else if (step->kind == CHOIR_SPLIT_FIXED)
            CHOIR_TRY(cut_by_length(step, text, piece, out));
        else
            CHOIR_TRY(cut_by_class(step, text, piece, &c));
        CHOIR_TRY(release(&c));
    }
    return CHOIR_OK;
}

choir_status choir_split(const choir_split_step *steps, size_t n_steps, const char *text,
                         size_t bytes, bool first, choir_split_scratch *s, choir_match *match,
                         const char **out_text, const choir_pieces **out)
{
    size_t in = 0, buffer = 0, limit = choir_text_limit(bytes);
    s->pieces[0].n = 0;
    CHOIR_TRY(choir_pieces_push(&s->pieces[0], 0, bytes, first));
    for (size_t i = 0; i < n_steps; i++) {
        choir_pieces *from = &s->pieces[in], *to = &s->pieces[in ^ 1];
        to->n = 0;
        if (changes_text(&steps[i])) {
            choir_bytes *new_text = &s->buffers[buffer];
            new_text->n = 0;
            CHOIR_TRY(change(&steps[i], text, from, new_text, to));
            text = new_text->data;
            buffer ^= 1;
            if (new_text->n > limit) return choir_text_too_long(new_text->n);
        } else {
            CHOIR_TRY(cut(&steps[i], text, from, match, to));
        }
        in ^= 1;
    }
    *out_text = text;
    *out = &s->pieces[in];
    return CHOIR_OK;
}
