/* Statements of a template, and what both halves of the parser share. */
#include "engine/chat_template_parse.h"
#include "engine/chat_template_render.h"

static choir_status parse_body(template_parser *p, const char *const *stops, template_nodes *out);

/* ---- Shared steps ---- */

choir_status template_node_make(template_parser *p, template_kind kind, uint32_t line,
                                template_node **out)
{
    template_node *node;
    CHOIR_TRY(template_pool_alloc(p->pool, sizeof *node, &node));
    *node = (template_node){.kind = (uint8_t)kind, .line = line, .depth = 1};
    *out = node;
    return CHOIR_OK;
}

choir_status template_nodes_push(template_parser *p, template_nodes *nodes, template_node *node)
{
    if (nodes->n == nodes->capacity) {
        size_t capacity = nodes->capacity == 0 ? 4 : 2 * nodes->capacity;
        template_node **items;
        CHOIR_TRY(template_pool_alloc(p->pool, capacity * sizeof *items, &items));
        if (nodes->n > 0) memcpy(items, nodes->items, nodes->n * sizeof *items);
        nodes->items = items;
        nodes->capacity = capacity;
    }
    nodes->items[nodes->n++] = node;
    return CHOIR_OK;
}

bool template_accept(template_parser *p, template_token_kind kind)
{
    if (template_peek(p)->kind != kind) return false;
    p->at++;
    return true;
}

bool template_at_name(template_parser *p, const char *name)
{
    const template_token *t = template_peek(p);
    return t->kind == TOKEN_NAME && template_string_is(t->value.s, name);
}

bool template_accept_name(template_parser *p, const char *name)
{
    if (!template_at_name(p, name)) return false;
    p->at++;
    return true;
}

static choir_status refuse_token(template_parser *p, const char *wanted)
{
    const template_token *t = template_peek(p);
    if (t->kind == TOKEN_NAME)
        return template_refuse(t->line, "expected '%s', got '%.*s'", wanted, (int)t->value.s->bytes,
                               t->value.s->data);
    return template_refuse(t->line, "expected '%s', got '%s'", wanted,
                           template_token_text(t->kind));
}

choir_status template_expect(template_parser *p, template_token_kind kind)
{
    return template_accept(p, kind) ? CHOIR_OK : refuse_token(p, template_token_text(kind));
}

choir_status template_expect_name(template_parser *p, template_string **out)
{
    const template_token *t = template_peek(p);
    if (t->kind != TOKEN_NAME) return refuse_token(p, "name");
    *out = t->value.s;
    p->at++;
    return CHOIR_OK;
}

choir_status template_enter(template_parser *p)
{
    if (++p->nesting > TEMPLATE_MAX_NESTING)
        return template_refuse(template_peek(p)->line, "the template nests deeper than %d",
                               TEMPLATE_MAX_NESTING);
    return CHOIR_OK;
}

/* ---- Targets of assignments ---- */

static choir_status check_assignable(template_parser *p, uint32_t line, const template_string *name)
{
    static const char *const constants[] = {"true", "false", "none", "True", "False", "None"};
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (template_string_is(name, constants[i]))
            return template_refuse(line, "'%s' cannot be assigned to", constants[i]);
    if (name == p->known.loop && p->loops > 0)
        return template_refuse(line, "'loop' cannot be assigned to within a loop");
    return CHOIR_OK;
}

static choir_status parse_one_target(template_parser *p, bool with_namespace, template_node **out)
{
    uint32_t line = template_peek(p)->line;
    template_string *name = NULL;
    if (template_accept(p, TOKEN_OPEN_PAREN)) {
        CHOIR_TRY(template_enter(p));
        CHOIR_TRY(template_parse_target(p, NULL, with_namespace, out));
        p->nesting--;
        return template_expect(p, TOKEN_CLOSE_PAREN);
    }
    CHOIR_TRY(template_expect_name(p, &name));
    CHOIR_TRY(template_node_make(p, NODE_NAME, line, out));
    (*out)->name = name;
    if (!with_namespace || !template_accept(p, TOKEN_DOT)) return check_assignable(p, line, name);
    template_node *member;
    CHOIR_TRY(template_node_make(p, NODE_MEMBER, line, &member));
    member->a = *out;
    *out = member;
    return template_expect_name(p, &member->name);
}

choir_status template_parse_target(template_parser *p, const char *stop, bool with_namespace,
                                   template_node **out)
{
    uint32_t line = template_peek(p)->line;
    template_nodes items = {0};
    bool tuple = false;
    for (;;) {
        template_token_kind kind = template_peek(p)->kind;
        if (tuple && (kind == TOKEN_ASSIGN || kind == TOKEN_CLOSE_PAREN ||
                      kind == TOKEN_CLOSE_BLOCK || (stop != NULL && template_at_name(p, stop))))
            break;
        template_node *item;
        CHOIR_TRY(parse_one_target(p, with_namespace, &item));
        CHOIR_TRY(template_nodes_push(p, &items, item));
        if (!template_accept(p, TOKEN_COMMA)) break;
        tuple = true;
    }
    if (!tuple) {
        *out = items.items[0];
        return CHOIR_OK;
    }
    CHOIR_TRY(template_node_make(p, NODE_TUPLE, line, out));
    (*out)->list = items.items;
    (*out)->n = items.n;
    return CHOIR_OK;
}

/* ---- Statements ---- */

/* From the end of the opening tag to the closing one, whose name is consumed and returned. */
static choir_status parse_block_body(template_parser *p, const char *const *stops,
                                     template_node *node, template_string **stop)
{
    template_nodes body = {0};
    template_accept(p, TOKEN_COLON);
    CHOIR_TRY(template_expect(p, TOKEN_CLOSE_BLOCK));
    CHOIR_TRY(parse_body(p, stops, &body));
    node->list = body.items;
    node->n = body.n;
    return template_expect_name(p, stop);
}

static choir_status parse_child_body(template_parser *p, const char *const *stops,
                                     template_node **out, template_string **stop)
{
    CHOIR_TRY(template_node_make(p, NODE_BODY, template_peek(p)->line, out));
    return parse_block_body(p, stops, *out, stop);
}

static choir_status parse_if(template_parser *p, template_node *node)
{
    static const char *const stops[] = {"elif", "else", "endif", NULL};
    template_nodes parts = {0};
    template_string *stop;
    bool soft = p->soft;
    p->soft = true;
    do {
        template_node *test, *body;
        CHOIR_TRY(template_parse_tuple(p, false, NULL, false, &test));
        CHOIR_TRY(parse_child_body(p, stops, &body, &stop));
        CHOIR_TRY(template_nodes_push(p, &parts, test));
        CHOIR_TRY(template_nodes_push(p, &parts, body));
    } while (template_string_is(stop, "elif"));
    if (template_string_is(stop, "else"))
        CHOIR_TRY(parse_child_body(p, stops + 2, &node->a, &stop));
    p->soft = soft;
    node->list = parts.items;
    node->n = parts.n;
    return CHOIR_OK;
}

static choir_status parse_for(template_parser *p, template_node *node)
{
    static const char *const stops[] = {"else", "endfor", NULL};
    template_string *stop;
    p->loops++;
    CHOIR_TRY(template_parse_target(p, "in", false, &node->a));
    if (!template_accept_name(p, "in")) return refuse_token(p, "in");
    CHOIR_TRY(template_parse_tuple(p, false, "recursive", false, &node->b));
    if (template_accept_name(p, "if")) CHOIR_TRY(template_parse_expression(p, true, &node->c));
    if (template_at_name(p, "recursive"))
        return template_refuse(node->line, "recursive loops are not available");
    bool soft = p->soft;
    p->soft = false;
    CHOIR_TRY(parse_block_body(p, stops, node, &stop));
    p->loops--;
    if (template_string_is(stop, "else"))
        CHOIR_TRY(parse_child_body(p, stops + 1, &node->d, &stop));
    p->soft = soft;
    return CHOIR_OK;
}

static choir_status parse_set(template_parser *p, template_node *node)
{
    static const char *const stops[] = {"endset", NULL};
    template_string *stop;
    CHOIR_TRY(template_parse_target(p, NULL, true, &node->a));
    if (template_accept(p, TOKEN_ASSIGN))
        return template_parse_tuple(p, true, NULL, false, &node->b);
    node->kind = NODE_SET_BLOCK;
    if (template_peek(p)->kind == TOKEN_PIPE)
        CHOIR_TRY(template_parse_filters(p, NULL, false, &node->b));
    return parse_block_body(p, stops, node, &stop);
}

static choir_status parse_signature(template_parser *p, template_signature *s)
{
    template_nodes names = {0}, defaults = {0};
    CHOIR_TRY(template_expect(p, TOKEN_OPEN_PAREN));
    while (template_peek(p)->kind != TOKEN_CLOSE_PAREN) {
        if (names.n > 0) CHOIR_TRY(template_expect(p, TOKEN_COMMA));
        uint32_t line = template_peek(p)->line;
        template_string *name = NULL;
        CHOIR_TRY(template_expect_name(p, &name));
        CHOIR_TRY(check_assignable(p, line, name));
        for (size_t i = 0; i < names.n; i++)
            if ((template_string *)(void *)names.items[i] == name)
                return template_refuse(line, "parameter '%.*s' appears twice", (int)name->bytes,
                                       name->data);
        if (names.n >= 255) return template_refuse(line, "a macro has more than 255 parameters");
        CHOIR_TRY(template_nodes_push(p, &names, (template_node *)(void *)name));
        if (template_accept(p, TOKEN_ASSIGN)) {
            template_node *value;
            CHOIR_TRY(template_parse_expression(p, true, &value));
            CHOIR_TRY(template_nodes_push(p, &defaults, value));
        } else if (defaults.n > 0) {
            return template_refuse(line, "a parameter without default follows one with a default");
        }
    }
    p->at++;
    s->names = (template_string **)(void *)names.items;
    s->n = names.n;
    s->defaults = defaults.items;
    s->n_defaults = defaults.n;
    return CHOIR_OK;
}

/* A macro's body is a function of its own: loops around it end here, and it notes which of the
 * special names it reads. */
static choir_status parse_function_body(template_parser *p, const char *const *stops,
                                        template_node *node)
{
    template_parser around = *p;
    template_string *stop;
    p->loops = 0;
    p->soft = p->saw_caller = p->saw_kwargs = p->saw_varargs = false;
    CHOIR_TRY(parse_block_body(p, stops, node, &stop));
    if (node->signature != NULL) {
        template_signature *s = node->signature;
        s->caller = p->saw_caller;
        s->kwargs = p->saw_kwargs;
        s->varargs = p->saw_varargs;
        for (size_t i = 0; i < s->n; i++) {
            if (s->names[i] == p->known.caller) s->caller = false;
            if (s->names[i] == p->known.kwargs) s->kwargs = false;
            if (s->names[i] == p->known.varargs) s->varargs = false;
        }
    }
    p->loops = around.loops;
    p->soft = around.soft;
    p->saw_caller |= around.saw_caller;
    p->saw_kwargs |= around.saw_kwargs;
    p->saw_varargs |= around.saw_varargs;
    return CHOIR_OK;
}

static choir_status parse_macro(template_parser *p, template_node *node)
{
    static const char *const stops[] = {"endmacro", NULL};
    CHOIR_TRY(template_pool_alloc(p->pool, sizeof *node->signature, &node->signature));
    *node->signature = (template_signature){0};
    CHOIR_TRY(template_expect_name(p, &node->name));
    CHOIR_TRY(check_assignable(p, node->line, node->name));
    CHOIR_TRY(parse_signature(p, node->signature));
    return parse_function_body(p, stops, node);
}

static choir_status parse_call_block(template_parser *p, template_node *node)
{
    static const char *const stops[] = {"endcall", NULL};
    CHOIR_TRY(template_pool_alloc(p->pool, sizeof *node->signature, &node->signature));
    *node->signature = (template_signature){0};
    if (template_peek(p)->kind == TOKEN_OPEN_PAREN) CHOIR_TRY(parse_signature(p, node->signature));
    CHOIR_TRY(template_parse_expression(p, true, &node->b));
    if (node->b->kind != NODE_CALL)
        return template_refuse(node->line, "{%% call %%} wants a call of a macro");
    return parse_function_body(p, stops, node);
}

static choir_status parse_with(template_parser *p, template_node *node)
{
    static const char *const stops[] = {"endwith", NULL};
    template_nodes pairs = {0};
    template_string *stop;
    while (template_peek(p)->kind != TOKEN_CLOSE_BLOCK && template_peek(p)->kind != TOKEN_COLON) {
        template_node *target, *value;
        if (pairs.n > 0) CHOIR_TRY(template_expect(p, TOKEN_COMMA));
        CHOIR_TRY(template_parse_target(p, NULL, false, &target));
        CHOIR_TRY(template_expect(p, TOKEN_ASSIGN));
        CHOIR_TRY(template_parse_expression(p, true, &value));
        CHOIR_TRY(template_nodes_push(p, &pairs, target));
        CHOIR_TRY(template_nodes_push(p, &pairs, value));
    }
    node->pairs = pairs.items;
    node->n_pairs = pairs.n;
    return parse_block_body(p, stops, node, &stop);
}

static choir_status parse_filter_block(template_parser *p, template_node *node)
{
    static const char *const stops[] = {"endfilter", NULL};
    template_string *stop;
    CHOIR_TRY(template_parse_filters(p, NULL, true, &node->b));
    return parse_block_body(p, stops, node, &stop);
}

static choir_status parse_generation(template_parser *p, template_node *node)
{
    static const char *const stops[] = {"endgeneration", NULL};
    return parse_function_body(p, stops, node);
}

static choir_status parse_print(template_parser *p, template_node *node)
{
    template_nodes items = {0};
    while (template_peek(p)->kind != TOKEN_CLOSE_BLOCK) {
        template_node *item;
        if (items.n > 0) CHOIR_TRY(template_expect(p, TOKEN_COMMA));
        CHOIR_TRY(template_parse_expression(p, true, &item));
        CHOIR_TRY(template_nodes_push(p, &items, item));
    }
    node->list = items.items;
    node->n = items.n;
    return CHOIR_OK;
}

static choir_status parse_jump(template_parser *p, template_node *node)
{
    if (p->loops == 0)
        return template_refuse(node->line, "'%s' stands outside of a loop",
                               node->kind == NODE_BREAK ? "break" : "continue");
    return CHOIR_OK;
}

static const struct statement {
    const char *name;
    template_kind kind;
    choir_status (*parse)(template_parser *p, template_node *node);
} statements[] = {
    {"if", NODE_IF, parse_if},
    {"for", NODE_FOR, parse_for},
    {"set", NODE_SET, parse_set},
    {"macro", NODE_MACRO, parse_macro},
    {"call", NODE_CALL_BLOCK, parse_call_block},
    {"with", NODE_WITH, parse_with},
    {"filter", NODE_FILTER_BLOCK, parse_filter_block},
    {"generation", NODE_SCOPE, parse_generation},
    {"print", NODE_OUTPUT, parse_print},
    {"break", NODE_BREAK, parse_jump},
    {"continue", NODE_CONTINUE, parse_jump},
};

static choir_status refuse_tag(template_parser *p, const template_string *name,
                               const char *const *stops)
{
    static const char *const others[] = {"block", "extends",    "include", "import",
                                         "from",  "autoescape", "do",      "trans"};
    uint32_t line = template_peek(p)->line;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (template_string_is(name, others[i]))
            return template_refuse(line, "the tag '%s' is not available to chat templates",
                                   others[i]);
    if (stops != NULL)
        return template_refuse(line, "unknown tag '%.*s' where '%s' is still open for its end",
                               (int)name->bytes, name->data, stops[0]);
    return template_refuse(line, "unknown tag '%.*s'", (int)name->bytes, name->data);
}

static choir_status parse_statement(template_parser *p, const char *const *stops,
                                    template_node **out)
{
    const template_token *t = template_peek(p);
    if (t->kind != TOKEN_NAME) return template_refuse(t->line, "expected the name of a tag");
    for (size_t i = 0; i < sizeof statements / sizeof *statements; i++) {
        if (!template_string_is(t->value.s, statements[i].name)) continue;
        p->at++;
        CHOIR_TRY(template_enter(p));
        CHOIR_TRY(template_node_make(p, statements[i].kind, t->line, out));
        CHOIR_TRY(statements[i].parse(p, *out));
        p->nesting--;
        return template_expect(p, TOKEN_CLOSE_BLOCK);
    }
    return refuse_tag(p, t->value.s, stops);
}

static choir_status check_unknown(const template_parser *p)
{
    const template_node *node = p->unknown;
    if (p->soft || node == NULL) return CHOIR_OK;
    return template_refuse(node->line, "unknown %s '%.*s'",
                           node->kind == NODE_FILTER ? "filter" : "test", (int)node->name->bytes,
                           node->name->data);
}

/* Text and {{ }} next to each other become one output node. */
static choir_status parse_output(template_parser *p, template_nodes *out)
{
    template_nodes items = {0};
    template_node *node;
    CHOIR_TRY(template_node_make(p, NODE_OUTPUT, template_peek(p)->line, &node));
    for (;;) {
        const template_token *t = template_peek(p);
        template_node *item;
        if (t->kind == TOKEN_DATA) {
            p->at++;
            CHOIR_TRY(template_node_make(p, NODE_CONSTANT, t->line, &item));
            item->constant = t->value;
        } else if (t->kind == TOKEN_OPEN_PRINT) {
            p->at++;
            CHOIR_TRY(template_parse_tuple(p, true, NULL, false, &item));
            CHOIR_TRY(template_expect(p, TOKEN_CLOSE_PRINT));
            CHOIR_TRY(check_unknown(p));
        } else {
            break;
        }
        CHOIR_TRY(template_nodes_push(p, &items, item));
    }
    node->list = items.items;
    node->n = items.n;
    return template_nodes_push(p, out, node);
}

/* Until one of `stops` (its {% is consumed, its name is not), or the end where there are none. */
static choir_status parse_body(template_parser *p, const char *const *stops, template_nodes *out)
{
    for (;;) {
        const template_token *t = template_peek(p);
        if (t->kind == TOKEN_DATA || t->kind == TOKEN_OPEN_PRINT) {
            CHOIR_TRY(parse_output(p, out));
            continue;
        }
        if (t->kind == TOKEN_END && stops == NULL) return CHOIR_OK;
        if (t->kind == TOKEN_END)
            return template_refuse(t->line, "the template ends where '%s' is missing", stops[0]);
        p->at++; /* {% */
        for (size_t i = 0; stops != NULL && stops[i] != NULL; i++)
            if (template_at_name(p, stops[i])) return CHOIR_OK;
        template_node *node = NULL;
        CHOIR_TRY(parse_statement(p, stops, &node));
        CHOIR_TRY(check_unknown(p));
        CHOIR_TRY(template_nodes_push(p, out, node));
    }
}

choir_status template_parse(template_pool *pool, const char *source, size_t bytes,
                            template_tree *out)
{
    template_parser p = {.pool = pool};
    template_nodes body = {0};
    static const char *const known[] = {"loop", "caller", "kwargs", "varargs"};
    template_string **slots[] = {&p.known.loop, &p.known.caller, &p.known.kwargs, &p.known.varargs};
    for (size_t i = 0; i < 4; i++)
        CHOIR_TRY(template_intern(pool, &p.names, known[i], strlen(known[i]), slots[i]));
    CHOIR_TRY(template_lex(pool, &p.names, source, bytes, &p.tokens));
    CHOIR_TRY(parse_body(&p, NULL, &body));
    CHOIR_TRY(template_node_make(&p, NODE_BODY, 1, &out->body));
    out->body->list = body.items;
    out->body->n = body.n;
    out->known = p.known;
    return CHOIR_OK;
}
