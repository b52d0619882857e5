/* Expressions, by recursive descent in Jinja's order: choice, or, and, not, comparisons, sums, ~,
 * products, powers, signs, then postfixes and filters. */
#include "engine/chat_template_parse.h"
#include "engine/chat_template_render.h"

static choir_status parse_unary(template_parser *p, bool with_filter, template_node **out);

/* A parent's depth from its children; chains of operators are trees as deep as they are long. */
static choir_status set_depth(template_node *node)
{
    unsigned depth = 0;
    const template_node *children[] = {node->a, node->b, node->c, node->d};
    for (size_t i = 0; i < 4; i++)
        if (children[i] != NULL && children[i]->depth > depth) depth = children[i]->depth;
    for (size_t i = 0; i < node->n; i++)
        if (node->list[i] != NULL && node->list[i]->depth > depth) depth = node->list[i]->depth;
    if (node->kind == NODE_CALL || node->kind == NODE_FILTER || node->kind == NODE_TEST) {
        const template_arguments_node *a = node->arguments;
        for (size_t i = 0; i < a->n_positional; i++)
            if (a->positional[i]->depth > depth) depth = a->positional[i]->depth;
        for (size_t i = 0; i < a->n_named; i++)
            if (a->named[i]->depth > depth) depth = a->named[i]->depth;
    }
    if (depth >= TEMPLATE_MAX_CHAIN)
        return template_refuse(node->line, "an expression chains more than %d operators",
                               TEMPLATE_MAX_CHAIN);
    node->depth = (uint16_t)(depth + 1);
    return CHOIR_OK;
}

static choir_status make_binary(template_parser *p, template_kind kind, uint8_t op, uint32_t line,
                                template_node *a, template_node *b, template_node **out)
{
    template_node *node;
    CHOIR_TRY(template_node_make(p, kind, line, &node));
    node->op = op;
    node->a = a;
    node->b = b;
    *out = node;
    return set_depth(node);
}

static choir_status make_constant(template_parser *p, uint32_t line, template_value v,
                                  template_node **out)
{
    CHOIR_TRY(template_node_make(p, NODE_CONSTANT, line, out));
    (*out)->constant = v;
    return CHOIR_OK;
}

static void note_name(template_parser *p, const template_string *name)
{
    p->saw_caller |= name == p->known.caller;
    p->saw_kwargs |= name == p->known.kwargs;
    p->saw_varargs |= name == p->known.varargs;
}

/* ---- Literals ---- */

static choir_status parse_name(template_parser *p, template_node **out)
{
    const template_token *t = template_peek(p);
    const template_string *s = t->value.s;
    p->at++;
    if (template_string_is(s, "true") || template_string_is(s, "True"))
        return make_constant(p, t->line, template_bool(true), out);
    if (template_string_is(s, "false") || template_string_is(s, "False"))
        return make_constant(p, t->line, template_bool(false), out);
    if (template_string_is(s, "none") || template_string_is(s, "None"))
        return make_constant(p, t->line, template_none(), out);
    CHOIR_TRY(template_node_make(p, NODE_NAME, t->line, out));
    (*out)->name = t->value.s;
    note_name(p, s);
    return CHOIR_OK;
}

/* Neighbouring strings are one. */
static choir_status parse_string(template_parser *p, template_node **out)
{
    size_t first = p->at, bytes = 0;
    for (; template_peek(p)->kind == TOKEN_TEXT; p->at++) bytes += template_peek(p)->value.s->bytes;
    const template_token *t = &p->tokens.items[first];
    if (p->at == first + 1) return make_constant(p, t->line, t->value, out);
    char *text, *w;
    template_string *s;
    CHOIR_TRY(template_pool_alloc(p->pool, bytes, &text));
    w = text;
    for (size_t i = first; i < p->at; i++) {
        const template_string *part = p->tokens.items[i].value.s;
        memcpy(w, part->data, part->bytes);
        w += part->bytes;
    }
    CHOIR_TRY(template_string_make(p->pool, text, bytes, false, &s));
    template_string_chars(s);
    return make_constant(p, t->line, TEMPLATE_VALUE(STRING, s, s), out);
}

static choir_status finish_list(template_node *node, const template_nodes *nodes)
{
    node->list = nodes->items;
    node->n = nodes->n;
    return set_depth(node);
}

static choir_status parse_list(template_parser *p, template_node **out)
{
    template_nodes items = {0};
    CHOIR_TRY(template_node_make(p, NODE_LIST, template_peek(p)->line, out));
    p->at++;
    while (template_peek(p)->kind != TOKEN_CLOSE_BRACKET) {
        if (items.n > 0) CHOIR_TRY(template_expect(p, TOKEN_COMMA));
        if (template_peek(p)->kind == TOKEN_CLOSE_BRACKET) break;
        template_node *item;
        CHOIR_TRY(template_parse_expression(p, true, &item));
        CHOIR_TRY(template_nodes_push(p, &items, item));
    }
    p->at++;
    return finish_list(*out, &items);
}

static choir_status parse_dict(template_parser *p, template_node **out)
{
    template_nodes items = {0};
    CHOIR_TRY(template_node_make(p, NODE_DICT, template_peek(p)->line, out));
    p->at++;
    while (template_peek(p)->kind != TOKEN_CLOSE_BRACE) {
        if (items.n > 0) CHOIR_TRY(template_expect(p, TOKEN_COMMA));
        if (template_peek(p)->kind == TOKEN_CLOSE_BRACE) break;
        template_node *key, *value;
        CHOIR_TRY(template_parse_expression(p, true, &key));
        CHOIR_TRY(template_expect(p, TOKEN_COLON));
        CHOIR_TRY(template_parse_expression(p, true, &value));
        CHOIR_TRY(template_nodes_push(p, &items, key));
        CHOIR_TRY(template_nodes_push(p, &items, value));
    }
    p->at++;
    return finish_list(*out, &items);
}

choir_status template_parse_tuple(template_parser *p, bool with_choice, const char *stop,
                                  bool parenthesised, template_node **out)
{
    uint32_t line = template_peek(p)->line;
    template_nodes items = {0};
    bool tuple = false;
    for (;;) {
        if (items.n > 0) CHOIR_TRY(template_expect(p, TOKEN_COMMA));
        template_token_kind kind = template_peek(p)->kind;
        if (kind == TOKEN_CLOSE_PRINT || kind == TOKEN_CLOSE_BLOCK || kind == TOKEN_CLOSE_PAREN ||
            (stop != NULL && template_at_name(p, stop)))
            break;
        template_node *item;
        CHOIR_TRY(template_parse_expression(p, with_choice, &item));
        CHOIR_TRY(template_nodes_push(p, &items, item));
        if (template_peek(p)->kind != TOKEN_COMMA) break;
        tuple = true;
    }
    if (!tuple && items.n > 0) {
        *out = items.items[0];
        return CHOIR_OK;
    }
    if (!tuple && !parenthesised)
        return template_refuse(line, "expected an expression, got '%s'",
                               template_token_text(template_peek(p)->kind));
    CHOIR_TRY(template_node_make(p, NODE_TUPLE, line, out));
    return finish_list(*out, &items);
}

static choir_status parse_primary(template_parser *p, template_node **out)
{
    const template_token *t = template_peek(p);
    switch (t->kind) {
    case TOKEN_NAME:
        return parse_name(p, out);
    case TOKEN_TEXT:
        return parse_string(p, out);
    case TOKEN_INTEGER:
    case TOKEN_REAL:
        p->at++;
        return make_constant(p, t->line, t->value, out);
    case TOKEN_OPEN_BRACKET:
        return parse_list(p, out);
    case TOKEN_OPEN_BRACE:
        return parse_dict(p, out);
    case TOKEN_OPEN_PAREN:
        p->at++;
        CHOIR_TRY(template_parse_tuple(p, true, NULL, true, out));
        return template_expect(p, TOKEN_CLOSE_PAREN);
    default:
        return template_refuse(t->line, "unexpected '%s'", template_token_text(t->kind));
    }
}

/* ---- Postfixes ---- */

static choir_status parse_slice_bound(template_parser *p, template_node **out)
{
    template_token_kind kind = template_peek(p)->kind;
    *out = NULL;
    if (kind == TOKEN_COLON || kind == TOKEN_CLOSE_BRACKET || kind == TOKEN_COMMA) return CHOIR_OK;
    return template_parse_expression(p, true, out);
}

/* The inside of [ ]: one index, or a slice of up to three bounds. */
static choir_status parse_subscript(template_parser *p, template_node *of, template_node **out)
{
    uint32_t line = template_peek(p)->line;
    template_node *bounds[3] = {NULL, NULL, NULL}, *node;
    p->at++;
    if (template_peek(p)->kind == TOKEN_CLOSE_BRACKET || template_peek(p)->kind == TOKEN_COMMA)
        return template_refuse(line, "expected an index within [ ]");
    CHOIR_TRY(parse_slice_bound(p, &bounds[0]));
    if (template_peek(p)->kind != TOKEN_COLON) {
        template_nodes items = {0};
        if (template_peek(p)->kind == TOKEN_COMMA) {
            CHOIR_TRY(template_nodes_push(p, &items, bounds[0]));
            while (template_accept(p, TOKEN_COMMA)) {
                template_node *item;
                CHOIR_TRY(template_parse_expression(p, true, &item));
                CHOIR_TRY(template_nodes_push(p, &items, item));
            }
            CHOIR_TRY(template_node_make(p, NODE_TUPLE, line, &bounds[0]));
            CHOIR_TRY(finish_list(bounds[0], &items));
        }
        CHOIR_TRY(template_expect(p, TOKEN_CLOSE_BRACKET));
        return make_binary(p, NODE_ITEM, 0, line, of, bounds[0], out);
    }
    p->at++;
    CHOIR_TRY(parse_slice_bound(p, &bounds[1]));
    if (template_accept(p, TOKEN_COLON)) CHOIR_TRY(parse_slice_bound(p, &bounds[2]));
    CHOIR_TRY(template_expect(p, TOKEN_CLOSE_BRACKET));
    CHOIR_TRY(template_node_make(p, NODE_SLICE, line, &node));
    CHOIR_TRY(template_pool_alloc(p->pool, sizeof bounds, &node->list));
    memcpy(node->list, bounds, sizeof bounds);
    node->a = of;
    node->n = 3;
    *out = node;
    return set_depth(node);
}

static choir_status parse_attribute(template_parser *p, template_node *of, template_node **out)
{
    uint32_t line = template_peek(p)->line;
    p->at++;
    const template_token *t = template_peek(p);
    if (t->kind == TOKEN_INTEGER) {
        template_node *index;
        p->at++;
        CHOIR_TRY(make_constant(p, t->line, t->value, &index));
        return make_binary(p, NODE_ITEM, 0, line, of, index, out);
    }
    if (t->kind != TOKEN_NAME) return template_refuse(t->line, "expected a name after '.'");
    p->at++;
    CHOIR_TRY(make_binary(p, NODE_ATTRIBUTE, 0, line, of, NULL, out));
    (*out)->name = t->value.s;
    return CHOIR_OK;
}

static choir_status push_named(template_parser *p, template_arguments_node *args,
                               template_nodes *named, template_nodes *names)
{
    template_string *name = template_peek(p)->value.s;
    template_node *value;
    p->at += 2;
    for (size_t i = 0; i < names->n; i++)
        if ((template_string *)(void *)names->items[i] == name)
            return template_refuse(template_peek(p)->line, "argument '%.*s' is given twice",
                                   (int)name->bytes, name->data);
    CHOIR_TRY(template_parse_expression(p, true, &value));
    CHOIR_TRY(template_nodes_push(p, named, value));
    CHOIR_TRY(template_nodes_push(p, names, (template_node *)(void *)name));
    args->named = named->items;
    args->names = (template_string **)(void *)names->items;
    args->n_named = named->n;
    return CHOIR_OK;
}

static choir_status parse_arguments(template_parser *p, template_arguments_node **out)
{
    template_arguments_node *args;
    template_nodes positional = {0}, named = {0}, names = {0};
    uint32_t line = template_peek(p)->line;
    CHOIR_TRY(template_pool_alloc(p->pool, sizeof *args, &args));
    *args = (template_arguments_node){0};
    *out = args;
    if (template_peek(p)->kind != TOKEN_OPEN_PAREN) return CHOIR_OK;
    p->at++;
    for (bool first = true; template_peek(p)->kind != TOKEN_CLOSE_PAREN; first = false) {
        bool ok = true;
        if (!first) CHOIR_TRY(template_expect(p, TOKEN_COMMA));
        if (template_peek(p)->kind == TOKEN_CLOSE_PAREN) break;
        if (template_accept(p, TOKEN_MUL)) {
            ok = args->star == NULL && args->star_star == NULL;
            if (ok) CHOIR_TRY(template_parse_expression(p, true, &args->star));
        } else if (template_accept(p, TOKEN_POW)) {
            ok = args->star_star == NULL;
            if (ok) CHOIR_TRY(template_parse_expression(p, true, &args->star_star));
        } else if (template_peek(p)->kind == TOKEN_NAME &&
                   template_peek(p)[1].kind == TOKEN_ASSIGN) {
            ok = args->star_star == NULL;
            if (ok) CHOIR_TRY(push_named(p, args, &named, &names));
        } else {
            template_node *value;
            ok = args->star == NULL && args->star_star == NULL && named.n == 0;
            if (ok) CHOIR_TRY(template_parse_expression(p, true, &value));
            if (ok) CHOIR_TRY(template_nodes_push(p, &positional, value));
        }
        if (!ok) return template_refuse(line, "invalid order of arguments in a call");
    }
    args->positional = positional.items;
    args->n_positional = positional.n;
    return template_expect(p, TOKEN_CLOSE_PAREN);
}

static choir_status parse_call(template_parser *p, template_node *of, template_node **out)
{
    template_node *node;
    CHOIR_TRY(template_node_make(p, NODE_CALL, template_peek(p)->line, &node));
    node->a = of;
    CHOIR_TRY(parse_arguments(p, &node->arguments));
    *out = node;
    return set_depth(node);
}

static choir_status parse_postfix(template_parser *p, template_node *node, template_node **out)
{
    for (;;) {
        switch (template_peek(p)->kind) {
        case TOKEN_DOT:
            CHOIR_TRY(parse_attribute(p, node, &node));
            break;
        case TOKEN_OPEN_BRACKET:
            CHOIR_TRY(parse_subscript(p, node, &node));
            break;
        case TOKEN_OPEN_PAREN:
            CHOIR_TRY(parse_call(p, node, &node));
            break;
        default:
            *out = node;
            return CHOIR_OK;
        }
    }
}

/* ---- Filters and tests ---- */

/* An unknown one is refused with its statement, but within an `if` or a choice only when it is
 * reached: templates ask with `is filter` first. */
static void note_unknown(template_parser *p, const template_node *node)
{
    if (node->builtin == NULL && !p->soft && p->unknown == NULL) p->unknown = node;
}

static choir_status parse_dotted(template_parser *p, template_string **out)
{
    CHOIR_TRY(template_expect_name(p, out));
    if (template_peek(p)->kind == TOKEN_DOT)
        return template_refuse(template_peek(p)->line, "names of filters and tests have no dots");
    return CHOIR_OK;
}

choir_status template_parse_filters(template_parser *p, template_node *of, bool inline_first,
                                    template_node **out)
{
    *out = of;
    for (bool first = inline_first; first || template_accept(p, TOKEN_PIPE); first = false) {
        template_node *node;
        CHOIR_TRY(template_node_make(p, NODE_FILTER, template_peek(p)->line, &node));
        CHOIR_TRY(parse_dotted(p, &node->name));
        CHOIR_TRY(parse_arguments(p, &node->arguments));
        node->a = *out;
        node->builtin = template_find_filter(node->name);
        note_unknown(p, node);
        CHOIR_TRY(set_depth(node));
        *out = node;
    }
    return CHOIR_OK;
}

/* A test's argument may stand without parentheses: `x is divisibleby 3`. */
static choir_status parse_test_argument(template_parser *p, template_node *node)
{
    template_token_kind kind = template_peek(p)->kind;
    bool bare = kind == TOKEN_NAME || kind == TOKEN_TEXT || kind == TOKEN_INTEGER ||
                kind == TOKEN_REAL || kind == TOKEN_OPEN_BRACKET || kind == TOKEN_OPEN_BRACE;
    if (template_at_name(p, "else") || template_at_name(p, "or") || template_at_name(p, "and") ||
        !bare)
        return parse_arguments(p, &node->arguments);
    if (template_at_name(p, "is"))
        return template_refuse(node->line, "tests cannot be chained with 'is'");
    template_arguments_node *args;
    template_nodes list = {0};
    template_node *value;
    CHOIR_TRY(template_enter(p));
    CHOIR_TRY(parse_primary(p, &value));
    CHOIR_TRY(parse_postfix(p, value, &value));
    p->nesting--;
    CHOIR_TRY(template_nodes_push(p, &list, value));
    CHOIR_TRY(template_pool_alloc(p->pool, sizeof *args, &args));
    *args = (template_arguments_node){.positional = list.items, .n_positional = 1};
    node->arguments = args;
    return CHOIR_OK;
}

static choir_status parse_test(template_parser *p, template_node *of, template_node **out)
{
    template_node *node;
    CHOIR_TRY(template_node_make(p, NODE_TEST, template_peek(p)->line, &node));
    p->at++;
    bool negated = template_accept_name(p, "not");
    CHOIR_TRY(parse_dotted(p, &node->name));
    node->a = of;
    node->builtin = template_find_test(node->name);
    CHOIR_TRY(parse_test_argument(p, node));
    note_unknown(p, node);
    CHOIR_TRY(set_depth(node));
    *out = node;
    return negated ? make_binary(p, NODE_NOT, 0, node->line, node, NULL, out) : CHOIR_OK;
}

static choir_status parse_filter_expression(template_parser *p, template_node *node,
                                            template_node **out)
{
    for (;;) {
        if (template_peek(p)->kind == TOKEN_PIPE)
            CHOIR_TRY(template_parse_filters(p, node, false, &node));
        else if (template_at_name(p, "is"))
            CHOIR_TRY(parse_test(p, node, &node));
        else if (template_peek(p)->kind == TOKEN_OPEN_PAREN)
            CHOIR_TRY(parse_call(p, node, &node));
        else
            break;
    }
    *out = node;
    return CHOIR_OK;
}

/* ---- Operators ---- */

static choir_status parse_unary(template_parser *p, bool with_filter, template_node **out)
{
    const template_token *t = template_peek(p);
    template_node *node;
    CHOIR_TRY(template_enter(p));
    if (t->kind == TOKEN_SUB || t->kind == TOKEN_ADD) {
        p->at++;
        CHOIR_TRY(parse_unary(p, false, &node));
        CHOIR_TRY(make_binary(p, NODE_UNARY, t->kind, t->line, node, NULL, &node));
    } else {
        CHOIR_TRY(parse_primary(p, &node));
    }
    CHOIR_TRY(parse_postfix(p, node, &node));
    if (with_filter) CHOIR_TRY(parse_filter_expression(p, node, &node));
    p->nesting--;
    *out = node;
    return CHOIR_OK;
}

/* The four levels of arithmetic, loosest first; ~ makes one node of all its operands. */
static choir_status parse_arithmetic(template_parser *p, int level, template_node **out)
{
    static const uint8_t operators[4][5] = {
        {TOKEN_ADD, TOKEN_SUB},
        {TOKEN_TILDE},
        {TOKEN_MUL, TOKEN_DIV, TOKEN_FLOORDIV, TOKEN_MOD},
        {TOKEN_POW},
    };
    if (level == 4) return parse_unary(p, true, out);
    CHOIR_TRY(parse_arithmetic(p, level + 1, out));
    template_nodes parts = {0};
    uint32_t line = template_peek(p)->line;
    for (;;) {
        uint8_t op = template_peek(p)->kind;
        if (op == TOKEN_END || memchr(operators[level], op, 5) == NULL) break;
        template_node *right;
        uint32_t at = template_peek(p)->line;
        p->at++;
        CHOIR_TRY(parse_arithmetic(p, level + 1, &right));
        if (level != 1) {
            CHOIR_TRY(make_binary(p, NODE_BINARY, op, at, *out, right, out));
            continue;
        }
        if (parts.n == 0) CHOIR_TRY(template_nodes_push(p, &parts, *out));
        CHOIR_TRY(template_nodes_push(p, &parts, right));
    }
    if (parts.n == 0) return CHOIR_OK;
    CHOIR_TRY(template_node_make(p, NODE_CONCAT, line, out));
    return finish_list(*out, &parts);
}

/* Comparison operators as the tree has them; 0 where none stands here. */
static uint8_t accept_comparison(template_parser *p)
{
    uint8_t kind = template_peek(p)->kind;
    if (kind >= TOKEN_EQ && kind <= TOKEN_LT) {
        p->at++;
        return kind;
    }
    if (template_accept_name(p, "in")) return TOKEN_NAME;
    if (!template_at_name(p, "not")) return 0;
    p->at++;
    if (template_accept_name(p, "in")) return TOKEN_TEXT;
    p->at--;
    return 0;
}

static choir_status parse_comparison(template_parser *p, template_node **out)
{
    template_nodes others = {0};
    uint8_t *ops = NULL;
    size_t capacity = 0;
    uint32_t line = template_peek(p)->line;
    template_node *first, *node;
    CHOIR_TRY(parse_arithmetic(p, 0, &first));
    for (uint8_t op; (op = accept_comparison(p)) != 0;) {
        CHOIR_TRY(parse_arithmetic(p, 0, &node));
        if (others.n == capacity) {
            uint8_t *more;
            CHOIR_TRY(template_pool_alloc(p->pool, 2 * capacity + 4, &more));
            if (capacity > 0) memcpy(more, ops, capacity);
            ops = more;
            capacity = 2 * capacity + 4;
        }
        ops[others.n] = op;
        CHOIR_TRY(template_nodes_push(p, &others, node));
    }
    *out = first;
    if (others.n == 0) return CHOIR_OK;
    CHOIR_TRY(template_node_make(p, NODE_COMPARE, line, out));
    (*out)->a = first;
    (*out)->ops = ops;
    return finish_list(*out, &others);
}

static choir_status parse_not(template_parser *p, template_node **out)
{
    uint32_t line = template_peek(p)->line;
    if (!template_accept_name(p, "not")) return parse_comparison(p, out);
    CHOIR_TRY(template_enter(p));
    CHOIR_TRY(parse_not(p, out));
    p->nesting--;
    return make_binary(p, NODE_NOT, 0, line, *out, NULL, out);
}

static choir_status parse_and(template_parser *p, template_node **out)
{
    CHOIR_TRY(parse_not(p, out));
    for (;;) {
        template_node *right;
        uint32_t line = template_peek(p)->line;
        if (!template_accept_name(p, "and")) return CHOIR_OK;
        CHOIR_TRY(parse_not(p, &right));
        CHOIR_TRY(make_binary(p, NODE_AND, 0, line, *out, right, out));
    }
}

static choir_status parse_or(template_parser *p, template_node **out)
{
    CHOIR_TRY(parse_and(p, out));
    for (;;) {
        template_node *right;
        uint32_t line = template_peek(p)->line;
        if (!template_accept_name(p, "or")) return CHOIR_OK;
        CHOIR_TRY(parse_and(p, &right));
        CHOIR_TRY(make_binary(p, NODE_OR, 0, line, *out, right, out));
    }
}

choir_status template_parse_expression(template_parser *p, bool with_choice, template_node **out)
{
    const template_node *unknown = p->unknown;
    bool soft = p->soft;
    CHOIR_TRY(template_enter(p));
    CHOIR_TRY(parse_or(p, out));
    while (with_choice && template_at_name(p, "if")) {
        template_node *node;
        CHOIR_TRY(template_node_make(p, NODE_CHOICE, template_peek(p)->line, &node));
        p->at++;
        p->soft = true;
        p->unknown = unknown; /* what the first part did not know may never be reached */
        node->a = *out;
        CHOIR_TRY(parse_or(p, &node->b));
        if (template_accept_name(p, "else"))
            CHOIR_TRY(template_parse_expression(p, true, &node->c));
        CHOIR_TRY(set_depth(node));
        *out = node;
    }
    p->soft = soft;
    p->nesting--;
    return CHOIR_OK;
}
