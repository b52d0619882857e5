/* WHAT    A template's tree, as the parser makes it and the interpreter walks it.
 * OWNS    Everything lies in the compilation's pool.
 * THREADS Made by one thread, then only read.
 * ERRORS  CHOIR_E_FORMAT: "line N: …".
 * LIMITS  Statements and expressions nest at most TEMPLATE_MAX_NESTING deep; a chain of operators
 *         has at most TEMPLATE_MAX_CHAIN links.
 * NEXT    engine/chat_template_parse.h, engine/chat_template_render.h */
#pragma once
#include "engine/chat_template_lex.h"

#define TEMPLATE_MAX_CHAIN 400

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
