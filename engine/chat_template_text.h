/* WHAT    Growing text, values as text (Python's str, repr and json.dumps), and Unicode.
 * OWNS    A text's bytes lie in the render's pool; an owned text's are choir_free()d by its owner.
 * THREADS That of the render.
 * ERRORS  CHOIR_E_FULL for the limits of pool and output.
 * LIMITS  An owned text has at most TEMPLATE_MAX_OUTPUT bytes.
 * NEXT    engine/chat_template_lex.h */
#pragma once
#include "engine/chat_template_value.h"

/* Growing text: of the pool, or (owned) of choir_alloc with a limit of its own. */
typedef struct template_text {
    template_render *r;
    char *data;
    size_t bytes, capacity;
    bool owned;
} template_text;

choir_status template_text_add(template_text *t, const char *data, size_t bytes);
choir_status template_text_add_char(template_text *t, uint32_t code, size_t times);
choir_status template_text_addf(template_text *t, const char *format, ...) CHOIR_PRINTF(2, 3);
choir_status template_text_str(template_text *t, template_value v);      /* Python's str() */
choir_status template_text_repr(template_text *t, template_value v);     /* Python's repr() */
choir_status template_text_value(template_text *t, template_value *out); /* the text as a string */
choir_status template_to_string(template_render *r, template_value v, template_string **out);
/* Python's repr of a float; `out` has 32 bytes. */
void template_float_repr(double f, char *out);

typedef struct template_json {
    int64_t indent; /* < 0: one line */
    const template_string *indent_text, *item_separator, *key_separator;
    bool ascii, sort_keys;
} template_json;
choir_status template_text_json(template_text *t, template_value v, const template_json *options);

/* Unicode. */
size_t template_utf8_decode(const char *data, size_t bytes, uint32_t *code); /* bytes read, >= 1 */
size_t template_utf8_encode(uint32_t code, char out[4]);
bool template_is_space(uint32_t code);
bool template_is_alpha(uint32_t code);
bool template_is_decimal(uint32_t code);
bool template_is_digit(uint32_t code);
bool template_is_numeric(uint32_t code);
bool template_is_printable(uint32_t code);
typedef enum template_case {
    TEMPLATE_UPPER,
    TEMPLATE_LOWER,
    TEMPLATE_TITLE,
    TEMPLATE_CAPITAL,
    TEMPLATE_SWAP,
    TEMPLATE_FOLD,
} template_case;
choir_status template_change_case(template_render *r, const template_string *s, template_case how,
                                  template_value *out);
int template_char_case(uint32_t code); /* 1 upper, -1 lower, 2 title, 0 uncased */
