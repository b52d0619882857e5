/* WHAT    What the parser's two files, statements and expressions, have in common.
 * OWNS    The parser's state lives as long as one template_parse().
 * THREADS The compiling one.
 * ERRORS  CHOIR_E_FORMAT: "line N: …".
 * LIMITS  As chat_template_tree.h says.
 * NEXT    engine/chat_template_render.h */
#pragma once
#include "engine/chat_template_tree.h"

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
