/* WHAT    A template's tokens and interned names.
 * OWNS    Everything lies in the compilation's pool.
 * THREADS Made by one thread, then only read.
 * ERRORS  CHOIR_E_FORMAT: "line N: …".
 * LIMITS  Brackets nest at most TEMPLATE_MAX_NESTING deep.
 * NEXT    engine/chat_template_tree.h */
#pragma once
#include "engine/chat_template_value.h"

#define TEMPLATE_MAX_NESTING 100

/* X(enumerator, how a message names it) */
#define TEMPLATE_TOKENS(X)                                                                         \
    X(END, "end of template")                                                                      \
    X(DATA, "text")                                                                                \
    X(OPEN_PRINT, "{{")                                                                            \
    X(CLOSE_PRINT, "}}")                                                                           \
    X(OPEN_BLOCK, "{%")                                                                            \
    X(CLOSE_BLOCK, "%}")                                                                           \
    X(NAME, "name")                                                                                \
    X(TEXT, "string")                                                                              \
    X(INTEGER, "integer")                                                                          \
    X(REAL, "float")                                                                               \
    X(FLOORDIV, "//")                                                                              \
    X(POW, "**")                                                                                   \
    X(EQ, "==")                                                                                    \
    X(NE, "!=")                                                                                    \
    X(GE, ">=")                                                                                    \
    X(LE, "<=")                                                                                    \
    X(GT, ">")                                                                                     \
    X(LT, "<")                                                                                     \
    X(ADD, "+")                                                                                    \
    X(SUB, "-")                                                                                    \
    X(DIV, "/")                                                                                    \
    X(MUL, "*")                                                                                    \
    X(MOD, "%")                                                                                    \
    X(TILDE, "~")                                                                                  \
    X(OPEN_BRACKET, "[")                                                                           \
    X(CLOSE_BRACKET, "]")                                                                          \
    X(OPEN_PAREN, "(")                                                                             \
    X(CLOSE_PAREN, ")")                                                                            \
    X(OPEN_BRACE, "{")                                                                             \
    X(CLOSE_BRACE, "}")                                                                            \
    X(ASSIGN, "=")                                                                                 \
    X(DOT, ".")                                                                                    \
    X(COLON, ":")                                                                                  \
    X(PIPE, "|")                                                                                   \
    X(COMMA, ",")                                                                                  \
    X(SEMICOLON, ";")

typedef enum template_token_kind {
#define X(name, text) TOKEN_##name,
    TEMPLATE_TOKENS(X)
#undef X
} template_token_kind;

typedef struct template_token {
    uint8_t kind;
    uint32_t line;
    template_value value; /* NAME (interned), TEXT, DATA: STRING; INTEGER, REAL: the number */
} template_token;

typedef struct template_tokens {
    template_token *items;
    size_t n, capacity;
} template_tokens;

/* Names are interned, so that the interpreter compares pointers. */
typedef struct template_names {
    template_string **slots;
    size_t n, size;
} template_names;

choir_status template_intern(template_pool *pool, template_names *names, const char *data,
                             size_t bytes, template_string **out);
choir_status template_lex(template_pool *pool, template_names *names, const char *source,
                          size_t bytes, template_tokens *out);
const char *template_token_text(template_token_kind kind);
choir_status template_refuse(uint32_t line, const char *format, ...) CHOIR_PRINTF(2, 3);
