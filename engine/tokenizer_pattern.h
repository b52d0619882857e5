/* WHAT    Patterns of a tokenizer file: literal strings, and regular expressions in the dialect
 *         of Oniguruma (Ruby's syntax), which the reference uses, translated for PCRE2.
 * OWNS    The compiled code. A choir_match is the scratch of one call.
 * THREADS A pattern is read-only after compile; a choir_match has one owner.
 * ERRORS  CHOIR_E_FORMAT (does not compile), CHOIR_E_UNIMPLEMENTED (a construct without a
 *         translation), CHOIR_E_INVALID (a text on which the pattern backtracks beyond its
 *         limits).
 * LIMITS  Patterns up to 16 KiB; the steps of one encode are bounded by its text's length.
 * NEXT    engine/tokenizer_split.c, engine/tokenizer_normalize.c */
#pragma once
#include "base/memory.h"

typedef struct choir_pattern choir_pattern;

/* `where` names the field in sentences. */
choir_status choir_pattern_compile(const char *where, const char *source, size_t bytes,
                                   bool literal, choir_pattern **out) CHOIR_MUST_USE;
void choir_pattern_destroy(choir_pattern *pattern);
/* A literal of exactly one character: safe to match in any fragment of a text. */
bool choir_pattern_is_character(const choir_pattern *pattern);

/* The scratch of matching; a zeroed struct is ready. */
typedef struct choir_match {
    void *data, *stack, *context; /* PCRE2's */
    size_t stack_bytes;
    uint64_t budget; /* steps left to slow matches; set by choir_match_allow */
    /* the walk over one subject */
    const char *text;
    size_t bytes, at, last_end;
    size_t counted_to; /* where the search was when its steps were last counted */
    bool matched;
} choir_match;

/* Grants the steps that a text of this length may cost in all. */
void choir_match_allow(choir_match *match, size_t bytes);
void choir_match_allow_more(choir_match *match, size_t bytes);
void choir_match_free(choir_match *match);

/* Starts a walk over valid UTF-8, then gives match after match; *found is false behind the last. */
void choir_match_begin(choir_match *match, const char *text, size_t bytes);
choir_status choir_match_next(const choir_pattern *pattern, choir_match *match, size_t *begin,
                              size_t *end, bool *found) CHOIR_MUST_USE;
