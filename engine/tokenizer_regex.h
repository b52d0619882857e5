/* WHAT    Rewrites an expression of Oniguruma's Ruby dialect so that PCRE2 means the same by it.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  CHOIR_E_FORMAT, CHOIR_E_UNIMPLEMENTED, CHOIR_E_NO_MEMORY.
 * LIMITS  What differs between the dialects and is not rewritten is refused, never passed on.
 * NEXT    engine/tokenizer_pattern.c */
#pragma once
#include "engine/tokenizer_buffer.h"

choir_status choir_regex_translate(const char *where, const char *source, size_t bytes,
                                   choir_bytes *out) CHOIR_MUST_USE;
