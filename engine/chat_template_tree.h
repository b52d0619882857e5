/* WHAT    A template's tokens and its tree, as the lexer and the parser make them.
 * OWNS    Everything lies in the compilation's pool.
 * THREADS Made by one thread, then only read.
 * ERRORS  CHOIR_E_FORMAT: "line N: …".
 * LIMITS  Nesting 100, operator chains 400.
 * NEXT    engine/chat_template_render.h */
#pragma once
#include "engine/chat_template_value.h"

#define TEMPLATE_MAX_NESTING 100
#define TEMPLATE_MAX_CHAIN   400

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

typedef enum template_kind {
    /* expressions */
    NODE_CONSTANT,
    NODE_NAME,
    NODE_LIST,
    NODE_TUPLE,
    NODE_DICT, /* list: key, value, key, value, … */
    NODE_ATTRIBUTE,
    NODE_ITEM,
    NODE_SLICE, /* a: object; list: start, stop, step (each may be NULL) */
    NODE_CALL,
    NODE_FILTER,
    NODE_TEST,
    NODE_UNARY,
    NODE_BINARY,
    NODE_AND,
    NODE_OR,
    NODE_NOT,
    NODE_COMPARE, /* a: first; list: the others; ops: their operators */
    NODE_CONCAT,
    NODE_CHOICE, /* a if b else c (c may be NULL) */
    NODE_MEMBER, /* only as a target: name.attribute of a namespace */
    /* statements */
    NODE_OUTPUT,    /* list: expressions to print */
    NODE_IF,        /* list: test, body, test, body, …; a: the else body */
    NODE_FOR,       /* a: target; b: iterable; c: test; list: body; d: the else body */
    NODE_SET,       /* a: target; b: expression */
    NODE_SET_BLOCK, /* a: target; b: filter chain over NULL, or NULL; list: body */
    NODE_MACRO,
    NODE_CALL_BLOCK,   /* b: the call; as a macro otherwise */
    NODE_FILTER_BLOCK, /* b: filter chain over NULL; list: body */
    NODE_WITH,         /* pairs: target, value, …; list: body */
    NODE_SCOPE,        /* a generation block; list: body */
    NODE_BODY,
    NODE_BREAK,
    NODE_CONTINUE,
} template_kind;

typedef struct template_node template_node;

typedef struct template_arguments_node {
    template_node **positional;
    size_t n_positional;
    template_string **names;
    template_node **named;
    size_t n_named;
    template_node *star, *star_star;
} template_arguments_node;

struct template_node {
    uint8_t kind;
    uint8_t op;     /* a token kind; for COMPARE's `in` and `not in` TOKEN_NAME and TOKEN_TEXT */
    uint16_t depth; /* of the tree below, bounded by TEMPLATE_MAX_CHAIN in expressions */
    uint32_t line;
    template_string *name; /* NAME, ATTRIBUTE, FILTER, TEST, MACRO, MEMBER (the object: a) */
    template_node *a, *b, *c, *d;
    template_node **list;
    size_t n;
    union {
        template_value constant;
        uint8_t *ops;
        template_arguments_node *arguments;   /* CALL, FILTER, TEST */
        struct template_signature *signature; /* MACRO, CALL_BLOCK */
        struct {
            template_node **pairs; /* WITH: target, value, … */
            size_t n_pairs;        /* entries of `pairs`, both of a pair counted */
        };
    };
    const struct template_builtin *builtin; /* FILTER, TEST; NULL: unknown, refused when run */
};

typedef struct template_signature {
    template_string **names;
    template_node **defaults; /* the last n_defaults names' */
    size_t n, n_defaults;
    bool caller, kwargs, varargs; /* the body reads these names */
} template_signature;

/* The special names a parser and an interpreter share. */
typedef struct template_known {
    template_string *loop, *caller, *kwargs, *varargs;
} template_known;

typedef struct template_tree {
    template_node *body;
    template_known known;
} template_tree;

choir_status template_parse(template_pool *pool, const char *source, size_t bytes,
                            template_tree *out);

/* Between the parser's two files. */
typedef struct template_parser {
    template_pool *pool;
    template_names names;
    template_tokens tokens;
    size_t at;
    int nesting, loops; /* loops around this point, within this macro */
    bool soft;          /* inside an `if`: an unknown filter is refused only when reached */
    const template_node *unknown; /* the first unknown filter or test outside of one */
    /* which special names were read since a macro began */
    bool saw_caller, saw_kwargs, saw_varargs;
    template_known known;
} template_parser;

typedef struct template_nodes {
    template_node **items;
    size_t n, capacity;
} template_nodes;

static inline template_token *template_peek(template_parser *p)
{
    return &p->tokens.items[p->at];
}
choir_status template_refuse(uint32_t line, const char *format, ...) CHOIR_PRINTF(2, 3);
choir_status template_node_make(template_parser *p, template_kind kind, uint32_t line,
                                template_node **out);
choir_status template_nodes_push(template_parser *p, template_nodes *nodes, template_node *node);
bool template_accept(template_parser *p, template_token_kind kind);
bool template_at_name(template_parser *p, const char *name);
bool template_accept_name(template_parser *p, const char *name);
choir_status template_expect(template_parser *p, template_token_kind kind);
choir_status template_expect_name(template_parser *p, template_string **out);
choir_status template_enter(template_parser *p); /* one nesting level more; leave with nesting-- */
choir_status template_parse_expression(template_parser *p, bool with_choice, template_node **out);
/* A bare tuple where commas follow; `stop` (may be NULL) is a name that ends it. */
choir_status template_parse_tuple(template_parser *p, bool with_choice, const char *stop,
                                  bool parenthesised, template_node **out);
choir_status template_parse_target(template_parser *p, const char *stop, bool with_namespace,
                                   template_node **out);
choir_status template_parse_filters(template_parser *p, template_node *of, bool inline_first,
                                    template_node **out);
