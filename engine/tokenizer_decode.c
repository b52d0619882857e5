/* From tokens to text. A detokenizer is a row of stages, as the file's decoders say; each is given
 * tokens (or, behind a stage that fuses, fragments of the one token left) and hands on what can no
 * longer change. decode() is a detokenizer that is given all ids, so both give the same text. */
#include "engine/tokenizer_internal.h"

#include <stdlib.h>

typedef struct stage_state {
    choir_bytes held; /* what may still change */
    choir_bytes text; /* what is handed on */
    uint32_t n_stripped;
    bool begun;
} stage_state;

struct choir_detokenizer {
    const choir_tokenizer *tokenizer;
    bool skip_special;
    choir_bytes out;
    choir_match match;
    size_t fed; /* bytes of the tokens since the start: what stages may write is bounded by it */
    size_t written;
    stage_state states[CHOIR_TOKENIZER_MAX_STEPS];
};

static choir_status give(choir_detokenizer *d, size_t stage, const char *text, size_t bytes);

/* A hostile file could otherwise have one replacement multiply what another made. */
static choir_status count_written(choir_detokenizer *d, size_t bytes)
{
    d->written += bytes;
    return d->written <= choir_text_limit(d->fed) ? CHOIR_OK : choir_text_too_long(d->written);
}

/* ---- bytes to text: what is valid goes on, what is broken becomes U+FFFD, a cut character is kept
 */
static choir_status drain(choir_bytes *held, choir_bytes *text, bool all)
{
    size_t at = 0;
    text->n = 0;
    while (at < held->n) {
        size_t good = choir_utf8_check(held->data + at, held->n - at);
        CHOIR_TRY(choir_bytes_append(text, held->data + at, good));
        at += good;
        if (at == held->n) break;
        bool partial;
        size_t broken = choir_utf8_broken(held->data + at, held->n - at, &partial);
        if (partial && !all) break;
        CHOIR_TRY(choir_bytes_append(text, "\xEF\xBF\xBD", 3));
        at += broken;
    }
    if (at > 0) memmove(held->data, held->data + at, held->n - at);
    held->n -= at;
    return CHOIR_OK;
}

/* A token's characters as bytes; a token with a character that stands for no byte is taken as it
 * is. */
static choir_status unwrite_bytes(const char *text, size_t bytes, choir_bytes *out)
{
    size_t before = out->n;
    CHOIR_TRY(choir_bytes_reserve(out, bytes));
    for (size_t at = 0; at < bytes;) {
        int byte = choir_char_to_byte(choir_utf8_next(text, &at));
        if (byte < 0) {
            out->n = before;
            return choir_bytes_append(out, text, bytes);
        }
        out->data[out->n++] = (char)byte;
    }
    return CHOIR_OK;
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The byte that "<0x0A>" stands for, or -1. */
static int fallback_byte(const char *text, size_t bytes)
{
    if (bytes != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
    int high = hex_value(text[3]), low = hex_value(text[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* A run of byte tokens is text when all of it is; else each byte is one U+FFFD. So the run is held
 * until it ends. */
static choir_status end_run(choir_detokenizer *d, size_t stage)
{
    stage_state *s = &d->states[stage];
    size_t n = s->held.n;
    if (n == 0) return CHOIR_OK;
    s->held.n = 0;
    if (choir_utf8_check(s->held.data, n) == n) return give(d, stage + 1, s->held.data, n);
    for (size_t i = 0; i < n; i++) CHOIR_TRY(give(d, stage + 1, "\xEF\xBF\xBD", 3));
    return CHOIR_OK;
}

static bool starts_with(const char *text, size_t bytes, const choir_decode_stage *stage)
{
    return bytes >= stage->mark_bytes && memcmp(text, stage->mark, stage->mark_bytes) == 0;
}

static choir_status strip(choir_detokenizer *d, size_t i, const char *text, size_t bytes)
{
    const choir_decode_stage *stage = &d->tokenizer->decode[i];
    stage_state *s = &d->states[i];
    if (!stage->fused || stage->whole) s->n_stripped = 0;
    while (s->n_stripped < stage->start && starts_with(text, bytes, stage)) {
        text += stage->mark_bytes;
        bytes -= stage->mark_bytes;
        s->n_stripped++;
    }
    if (bytes > 0) s->n_stripped = stage->start; /* the start is over */
    for (uint32_t n = 0; n < stage->stop && bytes >= stage->mark_bytes; n++) {
        if (!starts_with(text + bytes - stage->mark_bytes, stage->mark_bytes, stage)) break;
        bytes -= stage->mark_bytes;
    }
    return give(d, i + 1, text, bytes);
}

static choir_status replace(choir_detokenizer *d, size_t i, const char *text, size_t bytes)
{
    const choir_decode_stage *stage = &d->tokenizer->decode[i];
    choir_bytes *out = &d->states[i].text;
    size_t last = 0;
    out->n = 0;
    choir_match_begin(&d->match, text, bytes);
    for (;;) {
        size_t begin, end;
        bool found;
        CHOIR_TRY(choir_match_next(stage->pattern, &d->match, &begin, &end, &found));
        if (!found) break;
        CHOIR_TRY(choir_bytes_append(out, text + last, begin - last));
        CHOIR_TRY(choir_bytes_append(out, stage->content, stage->content_bytes));
        CHOIR_TRY(count_written(d, stage->content_bytes));
        last = end;
    }
    CHOIR_TRY(choir_bytes_append(out, text + last, bytes - last));
    return give(d, i + 1, out->data, out->n);
}

static choir_status unmark(choir_detokenizer *d, size_t i, const char *text, size_t bytes)
{
    const choir_decode_stage *stage = &d->tokenizer->decode[i];
    stage_state *s = &d->states[i];
    bool drop = stage->strip_first && (stage->fused || !s->begun);
    s->begun = true;
    s->text.n = 0;
    CHOIR_TRY(choir_bytes_reserve(&s->text, bytes));
    for (size_t at = 0; at < bytes;) {
        if (!starts_with(text + at, bytes - at, stage)) {
            s->text.data[s->text.n++] = text[at++];
            continue;
        }
        if (!drop) s->text.data[s->text.n++] = ' ';
        at += stage->mark_bytes;
    }
    return give(d, i + 1, s->text.data, s->text.n);
}

static choir_status run(choir_detokenizer *d, size_t i, const char *text, size_t bytes)
{
    stage_state *s = &d->states[i];
    switch (d->tokenizer->decode[i].kind) {
    case CHOIR_DECODE_JOIN_SPACES:
        if (s->begun) CHOIR_TRY(give(d, i + 1, " ", 1));
        s->begun = true;
        return give(d, i + 1, text, bytes);
    case CHOIR_DECODE_BYTE_LEVEL:
        CHOIR_TRY(unwrite_bytes(text, bytes, &s->held));
        CHOIR_TRY(drain(&s->held, &s->text, false));
        return s->text.n > 0 ? give(d, i + 1, s->text.data, s->text.n) : CHOIR_OK;
    case CHOIR_DECODE_BYTE_FALLBACK: {
        int byte = fallback_byte(text, bytes);
        char c = (char)byte;
        if (byte >= 0) return choir_bytes_append(&s->held, &c, 1);
        CHOIR_TRY(end_run(d, i));
        return give(d, i + 1, text, bytes);
    }
    case CHOIR_DECODE_FUSE:
        return give(d, i + 1, text, bytes);
    case CHOIR_DECODE_STRIP:
        return strip(d, i, text, bytes);
    case CHOIR_DECODE_REPLACE:
        return replace(d, i, text, bytes);
    case CHOIR_DECODE_METASPACE:
        return unmark(d, i, text, bytes);
    }
    return CHOIR_OK;
}

/* A token, or a fragment, arrives at a stage; behind the last one is the output. */
static choir_status give(choir_detokenizer *d, size_t stage, const char *text, size_t bytes)
{
    if (stage == d->tokenizer->n_decode) return choir_bytes_append(&d->out, text, bytes);
    if (d->tokenizer->decode[stage].whole)
        return choir_bytes_append(&d->states[stage].held, text, bytes);
    return run(d, stage, text, bytes);
}

/* No token comes any more: every stage, in order, lets go what it holds, and starts anew. */
static choir_status finish(choir_detokenizer *d)
{
    for (size_t i = 0; i < d->tokenizer->n_decode; i++) {
        stage_state *s = &d->states[i];
        const choir_decode_stage *stage = &d->tokenizer->decode[i];
        choir_bytes whole = {0};
        if (stage->whole) {
            whole = s->held;
            s->held = (choir_bytes){0};
        }
        choir_status status = CHOIR_OK;
        if (stage->whole) status = run(d, i, whole.n > 0 ? whole.data : "", whole.n);
        choir_free(whole.data);
        if (status == CHOIR_OK && stage->kind == CHOIR_DECODE_BYTE_FALLBACK) status = end_run(d, i);
        if (status == CHOIR_OK && stage->kind == CHOIR_DECODE_BYTE_LEVEL) {
            status = drain(&s->held, &s->text, true);
            if (status == CHOIR_OK && s->text.n > 0)
                status = give(d, i + 1, s->text.data, s->text.n);
        }
        if (status != CHOIR_OK) return status;
        s->begun = false;
        s->n_stripped = 0;
    }
    d->fed = d->written = 0;
    return CHOIR_OK;
}

static int by_id(const void *key, const void *item)
{
    uint32_t id = *(const uint32_t *)key, other = ((const choir_added_token *)item)->id;
    return id < other ? -1 : id > other;
}

static choir_status feed(choir_detokenizer *d, uint32_t id)
{
    const choir_tokenizer *t = d->tokenizer;
    if (id >= t->vocab.n_ids)
        return choir_fail(CHOIR_E_INVALID, "id %u is beyond the vocabulary of %u ids", id,
                          t->vocab.n_ids);
    if (!choir_vocab_has(&t->vocab, id)) return CHOIR_OK; /* a hole has no text */
    uint8_t flags = t->vocab.flags[id];
    if (d->skip_special && (flags & CHOIR_ID_SKIPPED)) return CHOIR_OK;
    if (d->fed == 0) choir_match_allow(&d->match, 0);
    choir_match_allow_more(&d->match, t->vocab.length[id]);
    d->fed += t->vocab.length[id];
    if (flags & CHOIR_ID_NORMAL) {
        const choir_added_token *a = bsearch(&id, t->added, t->n_added, sizeof *a, by_id);
        CHOIR_ASSERT(a != NULL);
        return give(d, 0, a->normal, a->normal_bytes);
    }
    return give(d, 0, t->vocab.text.data + t->vocab.offset[id], t->vocab.length[id]);
}

/* ---- public */
choir_status choir_detokenizer_create(const choir_tokenizer *tokenizer, bool skip_special,
                                      choir_detokenizer **out)
{
    choir_detokenizer *d = choir_calloc(CHOIR_MEM_TOKENIZER, 1, sizeof *d);
    if (d == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a detokenizer");
    d->tokenizer = tokenizer;
    d->skip_special = skip_special;
    *out = d;
    return CHOIR_OK;
}

void choir_detokenizer_destroy(choir_detokenizer *d)
{
    if (d == NULL) return;
    for (size_t i = 0; i < CHOIR_TOKENIZER_MAX_STEPS; i++) {
        choir_free(d->states[i].held.data);
        choir_free(d->states[i].text.data);
    }
    choir_match_free(&d->match);
    choir_free(d->out.data);
    choir_free(d);
}

static void lend(choir_detokenizer *d, const char **text, size_t *bytes)
{
    *text = d->out.n > 0 ? d->out.data : "";
    *bytes = d->out.n;
}

choir_status choir_detokenizer_push(choir_detokenizer *d, uint32_t id, const char **text,
                                    size_t *bytes)
{
    d->out.n = 0;
    CHOIR_TRY(feed(d, id));
    lend(d, text, bytes);
    return CHOIR_OK;
}

choir_status choir_detokenizer_flush(choir_detokenizer *d, const char **text, size_t *bytes)
{
    d->out.n = 0;
    CHOIR_TRY(finish(d));
    lend(d, text, bytes);
    return CHOIR_OK;
}

choir_status choir_tokenizer_decode(const choir_tokenizer *tokenizer, const uint32_t *ids,
                                    size_t n_ids, bool skip_special, char **text, size_t *bytes)
{
    choir_detokenizer *d;
    CHOIR_TRY(choir_detokenizer_create(tokenizer, skip_special, &d));
    choir_status status = CHOIR_OK;
    for (size_t i = 0; i < n_ids && status == CHOIR_OK; i++) status = feed(d, ids[i]);
    if (status == CHOIR_OK) status = finish(d);
    if (status == CHOIR_OK) status = choir_bytes_append(&d->out, "", 1);
    if (status == CHOIR_OK) {
        *text = d->out.data;
        *bytes = d->out.n - 1;
        d->out = (choir_bytes){0};
    }
    choir_detokenizer_destroy(d);
    return status;
}
