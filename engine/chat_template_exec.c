/* Statements, scopes and macros. A `for` body, a macro, a `with` and every captured block have
 * scopes of their own; `if` has none. Names are looked up from the inside out, at last among the
 * render's variables. */
#include "engine/chat_template_render.h"

/* ---- Scopes ---- */

static choir_status lookup_global(template_render *r, const template_string *name,
                                  template_value *out)
{
    template_frame *g = &r->globals;
    for (size_t i = 0; i < g->n; i++)
        if (g->items[i].name == name) {
            *out = g->items[i].value;
            return template_charge(r, i / 16);
        }
    CHOIR_TRY(template_charge(r, g->n / 16));
    const json_t *json = json_object_getn(r->variables, name->data, name->bytes);
    const template_builtin *function = template_find_global(name);
    if (json != NULL)
        CHOIR_TRY(template_from_json(r, json, out));
    else if (function != NULL)
        *out = TEMPLATE_VALUE(FUNCTION, function, function);
    else
        *out = (template_value){
            .type = TEMPLATE_UNDEFINED, .flag = TEMPLATE_NO_NAME, .s = (template_string *)name};
    template_frame *here = r->frame;
    r->frame = g;
    choir_status status = template_bind(r, name, *out);
    r->frame = here;
    return status;
}

choir_status template_lookup(template_render *r, const template_string *name, template_value *out)
{
    size_t seen = 0;
    for (template_frame *f = r->frame; f != NULL; f = f->parent) {
        seen += f->n + 1;
        for (size_t i = 0; i < f->n; i++)
            if (f->items[i].name == name) {
                *out = f->items[i].value;
                return template_charge(r, seen / 16);
            }
    }
    CHOIR_TRY(template_charge(r, seen / 16));
    return lookup_global(r, name, out);
}

choir_status template_bind(template_render *r, const template_string *name, template_value v)
{
    template_frame *f = r->frame;
    for (size_t i = 0; i < f->n; i++)
        if (f->items[i].name == name) {
            f->items[i].value = v;
            return template_charge(r, i / 16);
        }
    if (f->n == f->capacity) {
        size_t capacity = f->capacity == 0 ? 4 : 2 * f->capacity;
        template_binding *items;
        CHOIR_TRY(template_alloc_n(r, capacity, sizeof *items, &items));
        if (f->n > 0) memcpy(items, f->items, f->n * sizeof *items);
        f->items = items;
        f->capacity = capacity;
    }
    f->items[f->n++] = (template_binding){name, v};
    return template_charge(r, f->n / 16);
}

static choir_status push_frame(template_render *r, template_frame *parent)
{
    template_frame *f;
    CHOIR_TRY(template_alloc(r, sizeof *f, &f));
    *f = (template_frame){.parent = parent};
    r->frame = f;
    return CHOIR_OK;
}

static void capture_frames(template_frame *f)
{
    for (; f != NULL && !f->captured; f = f->parent) f->captured = true;
}

static choir_status unpack(template_render *r, const template_node *target, template_value v)
{
    template_iterator it;
    CHOIR_TRY(template_iterate(r, v, &it));
    for (size_t i = 0; i <= target->n; i++) {
        template_value item;
        bool found = false;
        CHOIR_TRY(template_next(r, &it, &item, &found));
        if (found && i == target->n)
            return template_error(r, "too many values to unpack (expected %zu)", target->n);
        if (!found && i < target->n)
            return template_error(r, "not enough values to unpack (expected %zu, got %zu)",
                                  target->n, i);
        if (found) CHOIR_TRY(template_assign(r, target->list[i], item));
    }
    return CHOIR_OK;
}

choir_status template_assign(template_render *r, const template_node *target, template_value v)
{
    template_value object, name;
    switch (target->kind) {
    case NODE_NAME:
        return template_bind(r, target->name, v);
    case NODE_TUPLE:
        return unpack(r, target, v);
    default:
        CHOIR_TRY(template_lookup(r, target->a->name, &object));
        if (object.type != TEMPLATE_NAMESPACE)
            return template_error(r, "only attributes of a namespace can be assigned, not of '%s'",
                                  template_type_name(object));
        if (target->name->data[0] == '_')
            return template_error(r, "a namespace keeps no attributes that begin with _");
        name = TEMPLATE_VALUE(STRING, s, target->name);
        return template_dict_set(r, object.dict, name, v);
    }
}

/* ---- Captured text ---- */

/* Renders a body into text of its own, within a scope of its own. */
static choir_status capture(template_render *r, const template_node *node, template_value *out)
{
    template_text text = {.r = r}, *around = r->out;
    template_frame *frame = r->frame;
    CHOIR_TRY(push_frame(r, frame));
    r->out = &text;
    CHOIR_TRY(template_exec_body(r, node->list, node->n));
    r->out = around;
    r->frame = frame;
    return template_text_value(&text, out);
}

/* A chain of filters whose innermost has nothing before its |. */
static choir_status filter_text(template_render *r, const template_node *chain, template_value *v)
{
    template_node const *links[TEMPLATE_MAX_CHAIN + 1];
    size_t n = 0;
    for (; chain != NULL; chain = chain->a) links[n++] = chain;
    while (n > 0) {
        template_node link = *links[--n];
        link.a = NULL;
        CHOIR_TRY(template_eval(r, &link, v));
    }
    return CHOIR_OK;
}

static choir_status exec_set_block(template_render *r, const template_node *node)
{
    template_value v = {0};
    CHOIR_TRY(capture(r, node, &v));
    if (r->flow != TEMPLATE_ON) return CHOIR_OK;
    CHOIR_TRY(filter_text(r, node->b, &v));
    r->line = node->line;
    return template_assign(r, node->a, v);
}

static choir_status exec_filter_block(template_render *r, const template_node *node)
{
    template_value v = {0};
    CHOIR_TRY(capture(r, node, &v));
    if (r->flow != TEMPLATE_ON) return CHOIR_OK;
    CHOIR_TRY(filter_text(r, node->b, &v));
    return template_text_str(r->out, v);
}

/* ---- Macros ---- */

static choir_status bad_call(template_render *r, const template_macro *macro, const char *what,
                             const template_string *name)
{
    const template_string *m = macro->node->name;
    int n = name == NULL ? 0 : name->bytes > 200 ? 200 : (int)name->bytes;
    return template_error(r, "macro '%.*s' %s%s%.*s%s", m == NULL ? 6 : (int)m->bytes,
                          m == NULL ? "caller" : m->data, what, name == NULL ? "" : " '", n,
                          name == NULL ? "" : name->data, name == NULL ? "" : "'");
}

/* Named arguments that no parameter took: for `kwargs`, `caller`, or too many. */
static choir_status bind_rest(template_render *r, const template_macro *macro,
                              const template_arguments *args, const bool *used)
{
    const template_signature *s = macro->node->signature;
    static const template_string no_caller = {
        .data = "no caller is defined", .bytes = 20, .chars = 20};
    template_value caller = template_hint(&no_caller);
    template_dict *kwargs;
    CHOIR_TRY(template_dict_make(r, &kwargs));
    for (size_t i = 0; i < args->n_named; i++) {
        if (used[i]) continue;
        template_value key = TEMPLATE_VALUE(STRING, s, (template_string *)args->names[i]);
        if (s->caller && template_string_is(args->names[i], "caller"))
            caller = args->named[i];
        else if (s->kwargs)
            CHOIR_TRY(template_dict_set(r, kwargs, key, args->named[i]));
        else
            return bad_call(r, macro, "takes no keyword argument", args->names[i]);
    }
    if (s->caller) CHOIR_TRY(template_bind(r, r->tree->known.caller, caller));
    if (s->kwargs)
        CHOIR_TRY(template_bind(r, r->tree->known.kwargs, TEMPLATE_VALUE(DICT, dict, kwargs)));
    if (s->varargs) {
        template_list *rest;
        size_t n = args->n > s->n ? args->n - s->n : 0;
        CHOIR_TRY(template_list_make(r, n, &rest));
        if (n > 0) memcpy(rest->items, args->positional + s->n, n * sizeof *rest->items);
        rest->n = n;
        CHOIR_TRY(template_bind(r, r->tree->known.varargs, TEMPLATE_VALUE(TUPLE, list, rest)));
    } else if (args->n > s->n) {
        return bad_call(r, macro, "takes fewer arguments than it is given", NULL);
    }
    return CHOIR_OK;
}

static choir_status bind_parameters(template_render *r, const template_macro *macro,
                                    const template_arguments *args)
{
    const template_signature *s = macro->node->signature;
    bool *used;
    CHOIR_TRY(template_alloc(r, args->n_named + 1, &used));
    memset(used, 0, args->n_named + 1);
    uint8_t missing[256] = {0};
    CHOIR_TRY(template_charge(r, s->n * (args->n_named + 1) / 16));
    for (size_t i = 0; i < s->n; i++) {
        template_value v = {.type = TEMPLATE_UNDEFINED, .flag = TEMPLATE_NO_NAME, .s = s->names[i]};
        bool found = i < args->n;
        if (found) v = args->positional[i];
        for (size_t k = 0; k < args->n_named && !found; k++)
            if (template_string_same(args->names[k], s->names[i])) {
                v = args->named[k];
                used[k] = found = true;
            }
        missing[i] = !found;
        CHOIR_TRY(template_bind(r, s->names[i], v));
    }
    CHOIR_TRY(bind_rest(r, macro, args, used));
    for (size_t i = s->n - s->n_defaults; i < s->n; i++) { /* in order: one may read another */
        if (!missing[i]) continue;
        template_value v;
        CHOIR_TRY(template_eval(r, s->defaults[i - (s->n - s->n_defaults)], &v));
        CHOIR_TRY(template_bind(r, s->names[i], v));
    }
    return CHOIR_OK;
}

choir_status template_call_macro(template_render *r, template_macro *macro,
                                 const template_arguments *args, template_value *out)
{
    template_frame *frame = r->frame;
    template_text text = {.r = r}, *around = r->out;
    uint32_t line = r->line;
    if (++r->macros > TEMPLATE_MAX_MACROS)
        return template_error(r, "macros call each other deeper than %d", TEMPLATE_MAX_MACROS);
    CHOIR_TRY(push_frame(r, macro->frame));
    CHOIR_TRY(bind_parameters(r, macro, args));
    r->out = &text;
    CHOIR_TRY(template_exec_body(r, macro->node->list, macro->node->n));
    r->out = around;
    r->frame = frame;
    r->line = line;
    r->macros--;
    return template_text_value(&text, out);
}

static choir_status make_macro(template_render *r, const template_node *node, template_value *out)
{
    template_macro *macro;
    CHOIR_TRY(template_alloc(r, sizeof *macro, &macro));
    *macro = (template_macro){node, r->frame};
    capture_frames(r->frame);
    *out = TEMPLATE_VALUE(MACRO, macro, macro);
    return CHOIR_OK;
}

/* The body becomes the macro `caller` of the call. */
static choir_status exec_call_block(template_render *r, const template_node *node)
{
    template_node call = *node->b;
    template_arguments_node arguments = *call.arguments;
    template_node caller = {.kind = NODE_CONSTANT, .depth = 1, .line = node->line};
    template_string **names;
    template_node **named;
    template_value v;
    CHOIR_TRY(make_macro(r, node, &caller.constant));
    CHOIR_TRY(template_alloc_n(r, arguments.n_named + 1, sizeof *names, &names));
    CHOIR_TRY(template_alloc_n(r, arguments.n_named + 1, sizeof *named, &named));
    for (size_t i = 0; i < arguments.n_named; i++) {
        names[i] = arguments.names[i];
        named[i] = arguments.named[i];
    }
    names[arguments.n_named] = r->tree->known.caller;
    named[arguments.n_named++] = &caller;
    arguments.names = names;
    arguments.named = named;
    call.arguments = &arguments;
    CHOIR_TRY(template_eval(r, &call, &v));
    if (v.type != TEMPLATE_STRING)
        return template_error(r, "{%% call %%} got a '%s' and not text", template_type_name(v));
    return template_text_str(r->out, v);
}

/* ---- Loops ---- */

choir_status template_loop_fetch(template_render *r, template_loop *loop, template_value *out,
                                 bool *found)
{
    for (;;) {
        CHOIR_TRY(template_next(r, &loop->it, out, found));
        if (!*found || loop->test == NULL) return CHOIR_OK;
        template_frame *frame = r->frame;
        template_value passes;
        CHOIR_TRY(push_frame(r, loop->outer));
        CHOIR_TRY(template_assign(r, loop->target, *out));
        CHOIR_TRY(template_eval(r, loop->test, &passes));
        r->frame = frame;
        if (template_truth(passes)) return CHOIR_OK;
    }
}

static choir_status run_iterations(template_render *r, const template_node *node,
                                   template_loop *loop, bool *completed)
{
    for (;;) {
        bool found = template_given(loop->after);
        template_value item = loop->after;
        if (!found) CHOIR_TRY(template_loop_fetch(r, loop, &item, &found));
        if (!found) return CHOIR_OK;
        loop->after = (template_value){0};
        loop->index0++;
        loop->before = loop->current;
        loop->current = item;
        /* Each round begins with an empty scope: a new one if a macro still reads the old. */
        if (r->frame == loop->outer || r->frame->captured) CHOIR_TRY(push_frame(r, loop->outer));
        r->frame->n = 0;
        r->line = node->line;
        CHOIR_TRY(template_assign(r, node->a, item));
        CHOIR_TRY(template_bind(r, r->tree->known.loop, TEMPLATE_VALUE(LOOP, loop, loop)));
        CHOIR_TRY(template_exec_body(r, node->list, node->n));
        template_flow flow = r->flow;
        r->flow = TEMPLATE_ON;
        if (flow == TEMPLATE_BREAK) return CHOIR_OK;
        if (flow == TEMPLATE_ON) *completed = true;
    }
}

static choir_status exec_for(template_render *r, const template_node *node)
{
    template_loop *loop;
    template_frame *frame = r->frame;
    bool completed = false;
    CHOIR_TRY(template_alloc(r, sizeof *loop, &loop));
    *loop = (template_loop){
        .test = node->c, .target = node->a, .outer = frame, .index0 = -1, .length = -1};
    CHOIR_TRY(template_eval(r, node->b, &loop->of));
    r->line = node->line;
    CHOIR_TRY(template_iterate(r, loop->of, &loop->it));
    CHOIR_TRY(run_iterations(r, node, loop, &completed));
    r->frame = frame;
    /* As in Jinja, a loop counts as empty until a round reaches the end of its body. */
    if (completed || node->d == NULL) return CHOIR_OK;
    CHOIR_TRY(push_frame(r, frame));
    CHOIR_TRY(template_exec_body(r, node->d->list, node->d->n));
    r->frame = frame;
    return CHOIR_OK;
}

/* ---- The other statements ---- */

static choir_status exec_output(template_render *r, const template_node *node)
{
    for (size_t i = 0; i < node->n; i++) {
        template_value v;
        CHOIR_TRY(template_eval(r, node->list[i], &v));
        CHOIR_TRY(template_text_str(r->out, v));
    }
    return CHOIR_OK;
}

static choir_status exec_if(template_render *r, const template_node *node)
{
    for (size_t i = 0; i < node->n; i += 2) {
        template_value test;
        CHOIR_TRY(template_eval(r, node->list[i], &test));
        const template_node *body = node->list[i + 1];
        if (template_truth(test)) return template_exec_body(r, body->list, body->n);
    }
    return node->a != NULL ? template_exec_body(r, node->a->list, node->a->n) : CHOIR_OK;
}

static choir_status exec_with(template_render *r, const template_node *node)
{
    template_frame *frame = r->frame, *inner;
    CHOIR_TRY(push_frame(r, frame));
    inner = r->frame;
    for (size_t i = 0; i < node->n_pairs; i += 2) { /* values see the scope around */
        template_value v;
        r->frame = frame;
        CHOIR_TRY(template_eval(r, node->pairs[i + 1], &v));
        r->frame = inner;
        CHOIR_TRY(template_assign(r, node->pairs[i], v));
    }
    CHOIR_TRY(template_exec_body(r, node->list, node->n));
    r->frame = frame;
    return CHOIR_OK;
}

static choir_status exec_scope(template_render *r, const template_node *node)
{
    template_frame *frame = r->frame;
    CHOIR_TRY(push_frame(r, frame));
    CHOIR_TRY(template_exec_body(r, node->list, node->n));
    r->frame = frame;
    return CHOIR_OK;
}

static choir_status exec(template_render *r, const template_node *node)
{
    template_value v;
    switch ((template_kind)node->kind) {
    case NODE_OUTPUT:
        return exec_output(r, node);
    case NODE_IF:
        return exec_if(r, node);
    case NODE_FOR:
        return exec_for(r, node);
    case NODE_SET:
        CHOIR_TRY(template_eval(r, node->b, &v));
        r->line = node->line;
        return template_assign(r, node->a, v);
    case NODE_SET_BLOCK:
        return exec_set_block(r, node);
    case NODE_MACRO:
        CHOIR_TRY(make_macro(r, node, &v));
        return template_bind(r, node->name, v);
    case NODE_CALL_BLOCK:
        return exec_call_block(r, node);
    case NODE_FILTER_BLOCK:
        return exec_filter_block(r, node);
    case NODE_WITH:
        return exec_with(r, node);
    case NODE_SCOPE:
        return exec_scope(r, node);
    case NODE_BREAK:
        r->flow = TEMPLATE_BREAK;
        return CHOIR_OK;
    case NODE_CONTINUE:
        r->flow = TEMPLATE_CONTINUE;
        return CHOIR_OK;
    default:
        CHOIR_ASSERT(!"an expression where a statement belongs");
        return CHOIR_E_INTERNAL;
    }
}

choir_status template_exec_body(template_render *r, template_node *const *list, size_t n)
{
    if (++r->depth > TEMPLATE_MAX_DEPTH)
        return template_error(r, "the template's evaluation nests deeper than %d",
                              TEMPLATE_MAX_DEPTH);
    for (size_t i = 0; i < n && r->flow == TEMPLATE_ON; i++) {
        r->line = list[i]->line;
        CHOIR_TRY(template_charge(r, 1));
        CHOIR_TRY(exec(r, list[i]));
    }
    r->depth--;
    return CHOIR_OK;
}
