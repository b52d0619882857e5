/* WHAT    What the tokenizer must know of Unicode: checked UTF-8, character classes of Unicode 16
 *         as the reference's regex engine has them, and GPT-2's bytes written as characters.
 * OWNS    Constant tables.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  Text given to the stepping functions must have passed choir_utf8_check().
 * NEXT    engine/tokenizer_pattern.h */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The bytes of the longest valid prefix: equal to `bytes` for valid UTF-8. */
size_t choir_utf8_check(const char *text, size_t bytes);

/* The code point at text[*at]; steps behind it. */
static inline uint32_t choir_utf8_next(const char *text, size_t *at)
{
    const uint8_t *s = (const uint8_t *)text + *at;
    if (s[0] < 0x80) {
        *at += 1;
        return s[0];
    }
    if (s[0] < 0xE0) {
        *at += 2;
        return (s[0] & 0x1Fu) << 6 | (s[1] & 0x3Fu);
    }
    if (s[0] < 0xF0) {
        *at += 3;
        return (s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3Fu);
    }
    *at += 4;
    return (s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3Fu);
}

/* Where the character before text[at] starts; at > 0. */
static inline size_t choir_utf8_before(const char *text, size_t at)
{
    do at--;
    while (at > 0 && ((uint8_t)text[at] & 0xC0) == 0x80);
    return at;
}

/* Writes a code point as UTF-8 (at most 4 bytes); returns the bytes. */
size_t choir_utf8_put(uint32_t code_point, char *out);

/* The length of the character that starts with this byte; 1 for bytes that start none. */
static inline size_t choir_utf8_length(uint8_t first)
{
    return first < 0xC2 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 1;
}

/* How many bytes at text are one maximal broken part (to become one U+FFFD): at least 1. *partial
 * says that the end of the text cut a character that may still become valid. */
size_t choir_utf8_broken(const char *text, size_t bytes, bool *partial);

bool choir_unicode_space(uint32_t code_point);       /* White_Space */
bool choir_unicode_numeric(uint32_t code_point);     /* Nd, Nl, No */
bool choir_unicode_punctuation(uint32_t code_point); /* ASCII's, and P* as the reference has it */
bool choir_unicode_mark(uint32_t code_point);        /* Mn, Mc, Me as the reference has them */
bool choir_unicode_formless(uint32_t code_point);  /* left alone by the reference's normal forms */
uint32_t choir_unicode_lower(uint32_t code_point); /* but for U+0130, whose lower case is two */
bool choir_unicode_word(uint32_t code_point);      /* Alphabetic, M*, Nd, Pc, joiners */

/* Characters assigned after Unicode 14, which the system's PCRE2 and utf8proc may not know. */
typedef struct choir_unicode_range {
    uint32_t first, last;
    char category[3];
} choir_unicode_range;
extern const choir_unicode_range choir_unicode_new[];
extern const size_t choir_unicode_n_new;

/* GPT-2 writes every byte as a printable character: the code point of a byte, and back (-1: none).
 */
uint32_t choir_byte_to_char(uint8_t byte);
int choir_char_to_byte(uint32_t code_point);
