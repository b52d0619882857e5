/* WHAT    What must hold of any tokenizer and any text, for the fuzz targets of the tokenizer.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  An assertion stops the process: that is the finding.
 * LIMITS  Included by tests/fuzz/tokenizer_*_fuzz.c only.
 * NEXT    engine/tokenizer.h */
#pragma once
#include "base/base.h"
#include "engine/tokenizer.h"

#include <string.h>

/* A file may ask for what is refused; it never breaks Choir, and it is told why. */
static inline void check_refusal(choir_status status)
{
    CHOIR_ASSERT(status != CHOIR_E_INTERNAL && choir_error_message()[0] != '\0');
}

/* The pieces that come one by one are decode() of all ids. */
static inline void check_pieces(const choir_tokenizer *t, const uint32_t *ids, size_t n, bool skip,
                                const char *whole, size_t whole_bytes)
{
    choir_detokenizer *d;
    const char *piece;
    size_t at = 0, bytes;
    CHOIR_ASSERT(choir_detokenizer_create(t, skip, &d) == CHOIR_OK);
    for (size_t i = 0; i <= n; i++) {
        choir_status status = i < n ? choir_detokenizer_push(d, ids[i], &piece, &bytes)
                                    : choir_detokenizer_flush(d, &piece, &bytes);
        CHOIR_ASSERT(status == CHOIR_OK && bytes <= whole_bytes - at);
        CHOIR_ASSERT(memcmp(whole + at, piece, bytes) == 0);
        at += bytes;
    }
    CHOIR_ASSERT(at == whole_bytes);
    choir_detokenizer_destroy(d);
}

/* Whether the ids have a text: a hostile decoder may need more steps than are allowed. */
static inline bool check_decode(const choir_tokenizer *t, const uint32_t *ids, size_t n, bool skip)
{
    char *text;
    size_t bytes;
    choir_status status = choir_tokenizer_decode(t, ids, n, skip, &text, &bytes);
    if (status != CHOIR_OK) {
        check_refusal(status);
        return false;
    }
    CHOIR_ASSERT(text[bytes] == '\0');
    check_pieces(t, ids, n, skip, text, bytes);
    choir_free(text);
    return true;
}

static inline void check_text(const choir_tokenizer *t, const char *text, size_t bytes,
                              choir_encode_options options)
{
    uint32_t *ids;
    size_t n;
    choir_status status = choir_tokenizer_encode(t, text, bytes, options, &ids, &n);
    if (status != CHOIR_OK) {
        check_refusal(status);
        return;
    }
    for (size_t i = 0; i < n; i++) CHOIR_ASSERT(ids[i] < choir_tokenizer_n_ids(t));
    check_decode(t, ids, n, options.add_special);
    choir_free(ids);
}

/* Texts on which steps, patterns and merges trip. */
static inline void check_nasty_texts(const choir_tokenizer *t)
{
    static const char *const texts[] = {
        "",
        " ",
        "Hello  wor1d's 12345\r\n\n\t x\xC2\xA0y  ",
        "<s> <|im_start|>a<|im_sta[w] <0x41>\xE2\x96\x81",
        "e\xCC\x81\xCC\xA7\xEF\xAC\x81\xC7\x85 \xE6\x97\xA5\xE6\x9C\xAC \xC4\xB0\xC3\x9F",
        "\xF0\x9F\x98\x80\xE2\x80\x8D\xF4\x8F\xBF\xBF \xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8\xD9\xA0",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        check_text(t, texts[i], strlen(texts[i]), CHOIR_ENCODE_OPTIONS_DEFAULT);
        check_text(t, texts[i], strlen(texts[i]), (choir_encode_options){false, false});
    }
    char repeated[1500];
    for (size_t i = 0; i < sizeof repeated; i++) repeated[i] = "aaab  1\n"[i * 8 / sizeof repeated];
    check_text(t, repeated, sizeof repeated, CHOIR_ENCODE_OPTIONS_DEFAULT);
}

/* Every id is decoded behind another, until one takes too long. */
static inline void check_every_id(const choir_tokenizer *t)
{
    uint32_t n = choir_tokenizer_n_ids(t);
    for (uint32_t id = 0; id < n && id < 600; id++) {
        const uint32_t pair[2] = {id / 2, id};
        size_t bytes;
        const char *piece = choir_tokenizer_piece(t, id, &bytes);
        CHOIR_ASSERT(piece == NULL || piece[bytes] == '\0');
        if (!check_decode(t, pair, 2, id & 1)) break;
    }
    CHOIR_ASSERT(choir_tokenizer_bos(t) < (int64_t)n && choir_tokenizer_eos(t) < (int64_t)n);
}
