/* Expressions: from a node of the tree to its value. */
#include "engine/chat_template_render.h"
#include <math.h>

/* ---- Shared steps ---- */

choir_status template_error(template_render *r, const char *format, ...)
{
    char text[900];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return choir_fail(CHOIR_E_INVALID, "line %u: %s", r->line, text);
}

choir_status template_charge(template_render *r, size_t steps)
{
    if (steps > (size_t)r->steps_left) {
        r->steps_left = 0;
        return choir_fail(CHOIR_E_FULL, "line %u: the chat template takes more than %d steps",
                          r->line, TEMPLATE_MAX_STEPS);
    }
    r->steps_left -= (int64_t)steps;
    return CHOIR_OK;
}

choir_status template_undefined_error(template_render *r, template_value v)
{
    static const char *const names[] = {
#define X(name, text) text,
        TEMPLATE_TYPES(X)
#undef X
    };
    int n = v.s == NULL ? 0 : v.s->bytes > 200 ? 200 : (int)v.s->bytes;
    const char *text = v.s == NULL ? "" : v.s->data;
    switch (v.flag) {
    case TEMPLATE_NO_NAME:
        return template_error(r, "'%.*s' is undefined", n, text);
    case TEMPLATE_NO_ATTRIBUTE:
        return template_error(r, "'%s' object has no attribute or element '%.*s'", names[v.extra],
                              n, text);
    case TEMPLATE_UNSAFE:
        return template_error(r, "attribute '%.*s' of a '%s' object is closed to templates", n,
                              text, names[v.extra]);
    default:
        return template_error(r, "%.*s", n, text);
    }
}

/* ---- Arithmetic ---- */

static choir_status wrong_operands(template_render *r, const char *op, template_value a,
                                   template_value b)
{
    if (a.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, a);
    if (b.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, b);
    return template_error(r, "unsupported operand types for %s: '%s' and '%s'", op,
                          template_type_name(a), template_type_name(b));
}

static choir_status overflow(template_render *r, const char *op)
{
    return template_error(r, "the result of %s has more than 64 bits", op);
}

static int64_t as_int(template_value v)
{
    return v.type == TEMPLATE_BOOL ? v.b : v.i;
}
static double as_float(template_value v)
{
    return v.type == TEMPLATE_FLOAT ? v.f : (double)as_int(v);
}

static choir_status power_int(template_render *r, int64_t base, int64_t exponent,
                              template_value *out)
{
    int64_t result = 1;
    if (exponent < 0) {
        if (base == 0) return template_error(r, "0 cannot be raised to a negative power");
        *out = template_float(pow((double)base, (double)exponent));
        return CHOIR_OK;
    }
    for (; exponent > 0; exponent >>= 1) {
        if ((exponent & 1) != 0 && __builtin_mul_overflow(result, base, &result))
            return overflow(r, "**");
        if (exponent > 1 && __builtin_mul_overflow(base, base, &base)) return overflow(r, "**");
    }
    *out = template_int(result);
    return CHOIR_OK;
}

static choir_status arithmetic_int(template_render *r, template_token_kind op, int64_t a, int64_t b,
                                   template_value *out)
{
    int64_t result = 0;
    bool over = false;
    switch (op) {
    case TOKEN_ADD:
        over = __builtin_add_overflow(a, b, &result);
        break;
    case TOKEN_SUB:
        over = __builtin_sub_overflow(a, b, &result);
        break;
    case TOKEN_MUL:
        over = __builtin_mul_overflow(a, b, &result);
        break;
    case TOKEN_POW:
        return power_int(r, a, b, out);
    default:
        if (b == 0) return template_error(r, "division by zero");
        if (op == TOKEN_DIV) {
            *out = template_float((double)((long double)a / (long double)b));
            return CHOIR_OK;
        }
        if (b == -1) { /* INT64_MIN / -1 */
            over = op == TOKEN_FLOORDIV && __builtin_sub_overflow(0, a, &result);
            break;
        }
        result = op == TOKEN_MOD ? a % b : a / b;
        if (a % b != 0 && (a < 0) != (b < 0)) result += op == TOKEN_MOD ? b : -1;
    }
    if (over) return overflow(r, template_token_text(op));
    *out = template_int(result);
    return CHOIR_OK;
}

static choir_status arithmetic_float(template_render *r, template_token_kind op, double a, double b,
                                     template_value *out)
{
    double f = 0;
    if ((op == TOKEN_DIV || op == TOKEN_FLOORDIV || op == TOKEN_MOD) && b == 0)
        return template_error(r, "division by zero");
    switch (op) {
    case TOKEN_ADD:
        f = a + b;
        break;
    case TOKEN_SUB:
        f = a - b;
        break;
    case TOKEN_MUL:
        f = a * b;
        break;
    case TOKEN_DIV:
        f = a / b;
        break;
    case TOKEN_POW:
        if (a == 0 && b < 0) return template_error(r, "0.0 cannot be raised to a negative power");
        if (a < 0 && isfinite(a) && isfinite(b) && b != floor(b))
            return template_error(r, "a root of a negative number is not real");
        f = pow(a, b);
        if (isinf(f) && isfinite(a) && isfinite(b)) return template_error(r, "** is out of range");
        break;
    default: { /* // and %, as Python rounds them */
        double mod = fmod(a, b), div = (a - mod) / b;
        if (mod != 0 && (b < 0) != (mod < 0)) {
            mod += b;
            div -= 1;
        } else if (mod == 0) {
            mod = copysign(0, b);
        }
        f = op == TOKEN_MOD ? mod
            : div != 0      ? floor(div) + (div - floor(div) > 0.5)
                            : copysign(0, a / b);
    }
    }
    *out = template_float(f);
    return CHOIR_OK;
}

static choir_status repeat_list(template_render *r, template_value v, int64_t times,
                                template_value *out)
{
    size_t n;
    template_list *list;
    if (times < 0) times = 0;
    if (__builtin_mul_overflow(v.list->n, (size_t)times, &n)) n = SIZE_MAX / 64;
    CHOIR_TRY(template_charge(r, n / 16));
    CHOIR_TRY(template_list_make(r, n, &list));
    for (size_t i = 0; i < n; i++) list->items[i] = v.list->items[i % v.list->n];
    list->n = n;
    *out = (template_value){.type = v.type, .list = list};
    return CHOIR_OK;
}

static choir_status repeat_string(template_render *r, template_value v, int64_t times,
                                  template_value *out)
{
    size_t n;
    char *data;
    if (times < 0) times = 0;
    if (__builtin_mul_overflow(v.s->bytes, (size_t)times, &n)) n = SIZE_MAX / 2;
    CHOIR_TRY(template_alloc(r, n, &data));
    CHOIR_TRY(template_charge_bytes(r, n));
    for (size_t i = 0; i < n; i += v.s->bytes) memcpy(data + i, v.s->data, v.s->bytes);
    CHOIR_TRY(template_string_value(r, data, n, out));
    out->flag = v.flag;
    return CHOIR_OK;
}

static choir_status multiply(template_render *r, template_value a, template_value b,
                             template_value *out)
{
    if (a.type == TEMPLATE_INT || a.type == TEMPLATE_BOOL) {
        template_value swap = a;
        a = b;
        b = swap;
    }
    if (b.type != TEMPLATE_INT && b.type != TEMPLATE_BOOL) return wrong_operands(r, "*", a, b);
    if (a.type == TEMPLATE_STRING) return repeat_string(r, a, as_int(b), out);
    if (a.type == TEMPLATE_LIST || a.type == TEMPLATE_TUPLE)
        return repeat_list(r, a, as_int(b), out);
    return wrong_operands(r, "*", a, b);
}

/* HTML-safe text escapes what is joined to it. */
static choir_status add_strings(template_render *r, template_value a, template_value b,
                                template_value *out)
{
    bool safe = a.flag != 0 || b.flag != 0;
    static const template_string escape = {.data = "escape", .bytes = 6, .chars = 6};
    static const template_arguments none = {0};
    if (safe && a.flag == 0) CHOIR_TRY(template_apply_filter(r, &escape, a, &none, &a));
    if (safe && b.flag == 0) CHOIR_TRY(template_apply_filter(r, &escape, b, &none, &b));
    CHOIR_TRY(template_string_concat(r, a.s, b.s, out));
    out->flag = safe;
    return CHOIR_OK;
}

static choir_status add_lists(template_render *r, template_value a, template_value b,
                              template_value *out)
{
    template_list *list;
    size_t n = a.list->n + b.list->n;
    CHOIR_TRY(template_charge(r, n / 16));
    CHOIR_TRY(template_list_make(r, n, &list));
    if (a.list->n > 0) memcpy(list->items, a.list->items, a.list->n * sizeof *list->items);
    if (b.list->n > 0)
        memcpy(list->items + a.list->n, b.list->items, b.list->n * sizeof *list->items);
    list->n = n;
    *out = (template_value){.type = a.type, .list = list};
    return CHOIR_OK;
}

choir_status template_binary(template_render *r, template_token_kind op, template_value a,
                             template_value b, template_value *out)
{
    if (template_is_number(a) && template_is_number(b)) {
        if (a.type == TEMPLATE_FLOAT || b.type == TEMPLATE_FLOAT)
            return arithmetic_float(r, op, as_float(a), as_float(b), out);
        return arithmetic_int(r, op, as_int(a), as_int(b), out);
    }
    if (b.type == TEMPLATE_UNDEFINED && a.type != TEMPLATE_STRING)
        return template_undefined_error(r, b);
    if (op == TOKEN_ADD && a.type == b.type) {
        if (a.type == TEMPLATE_STRING) return add_strings(r, a, b, out);
        if (a.type == TEMPLATE_LIST || a.type == TEMPLATE_TUPLE) return add_lists(r, a, b, out);
    }
    if (op == TOKEN_MUL) return multiply(r, a, b, out);
    if (op == TOKEN_MOD && a.type == TEMPLATE_STRING) return template_percent(r, a.s, b, out);
    return wrong_operands(r, template_token_text(op), a, b);
}

static choir_status eval_unary(template_render *r, const template_node *node, template_value *out)
{
    template_value v;
    CHOIR_TRY(template_eval(r, node->a, &v));
    r->line = node->line;
    if (v.type == TEMPLATE_UNDEFINED) return template_undefined_error(r, v);
    if (!template_is_number(v))
        return template_error(r, "bad operand type for unary %s: '%s'",
                              template_token_text(node->op), template_type_name(v));
    if (v.type == TEMPLATE_FLOAT) {
        *out = template_float(node->op == TOKEN_SUB ? -v.f : v.f);
        return CHOIR_OK;
    }
    return arithmetic_int(r, node->op, 0, as_int(v), out);
}

/* ---- Comparisons ---- */

static choir_status compare_pair(template_render *r, uint8_t op, template_value a, template_value b,
                                 bool *out)
{
    int order;
    switch (op) {
    case TOKEN_EQ:
    case TOKEN_NE:
        CHOIR_TRY(template_equal(r, a, b, out));
        *out ^= op == TOKEN_NE;
        return CHOIR_OK;
    case TOKEN_NAME: /* in */
    case TOKEN_TEXT: /* not in */
        CHOIR_TRY(template_contains(r, a, b, out));
        *out ^= op == TOKEN_TEXT;
        return CHOIR_OK;
    default:
        CHOIR_TRY(template_compare(r, a, b, &order));
        *out = order != 2 && (op == TOKEN_LT   ? order < 0
                              : op == TOKEN_LE ? order <= 0
                              : op == TOKEN_GT ? order > 0
                                               : order >= 0);
        return CHOIR_OK;
    }
}

/* a < b < c holds when each pair does; what follows a false pair is not evaluated. */
static choir_status eval_compare(template_render *r, const template_node *node, template_value *out)
{
    template_value left, right;
    bool holds = true;
    CHOIR_TRY(template_eval(r, node->a, &left));
    for (size_t i = 0; i < node->n && holds; i++) {
        CHOIR_TRY(template_eval(r, node->list[i], &right));
        r->line = node->line;
        CHOIR_TRY(compare_pair(r, node->ops[i], left, right, &holds));
        left = right;
    }
    *out = template_bool(holds);
    return CHOIR_OK;
}

/* ---- Lists, calls ---- */

static choir_status eval_list(template_render *r, const template_node *node, template_value *out)
{
    template_list *list;
    CHOIR_TRY(template_list_make(r, node->n, &list));
    for (size_t i = 0; i < node->n; i++)
        CHOIR_TRY(template_eval(r, node->list[i], &list->items[i]));
    list->n = node->n;
    *out = (template_value){.type = node->kind == NODE_LIST ? TEMPLATE_LIST : TEMPLATE_TUPLE,
                            .list = list};
    return CHOIR_OK;
}

static choir_status eval_dict(template_render *r, const template_node *node, template_value *out)
{
    template_dict *d;
    CHOIR_TRY(template_dict_make(r, &d));
    for (size_t i = 0; i < node->n; i += 2) {
        template_value key, value;
        CHOIR_TRY(template_eval(r, node->list[i], &key));
        CHOIR_TRY(template_eval(r, node->list[i + 1], &value));
        r->line = node->line;
        CHOIR_TRY(template_dict_set(r, d, key, value));
    }
    *out = TEMPLATE_VALUE(DICT, dict, d);
    return CHOIR_OK;
}

static choir_status eval_concat(template_render *r, const template_node *node, template_value *out)
{
    template_value v;
    template_string *s;
    CHOIR_TRY(template_eval(r, node->list[0], &v));
    CHOIR_TRY(template_to_string(r, v, &s));
    *out = TEMPLATE_VALUE(STRING, s, s);
    for (size_t i = 1; i < node->n; i++) {
        CHOIR_TRY(template_eval(r, node->list[i], &v));
        r->line = node->line;
        CHOIR_TRY(template_to_string(r, v, &s));
        CHOIR_TRY(template_string_concat(r, out->s, s, out));
    }
    return CHOIR_OK;
}

static choir_status add_named(template_render *r, template_arguments *args, size_t *capacity,
                              const template_string *name, template_value v)
{
    for (size_t i = 0; i < args->n_named; i++)
        if (template_string_same(args->names[i], name))
            return template_error(r, "argument '%.*s' is given twice",
                                  (int)(name->bytes > 200 ? 200 : name->bytes), name->data);
    CHOIR_TRY(template_charge(r, args->n_named / 8));
    if (args->n_named == *capacity) {
        size_t more = 2 * *capacity + 4;
        const template_string **names;
        template_value *named;
        CHOIR_TRY(template_alloc_n(r, more, sizeof *names, &names));
        CHOIR_TRY(template_alloc_n(r, more, sizeof *named, &named));
        if (args->n_named > 0) {
            memcpy(names, args->names, args->n_named * sizeof *names);
            memcpy(named, args->named, args->n_named * sizeof *named);
        }
        args->names = names;
        args->named = named;
        *capacity = more;
    }
    args->names[args->n_named] = name;
    args->named[args->n_named++] = v;
    return CHOIR_OK;
}

static choir_status eval_star(template_render *r, const template_node *node, template_list *list)
{
    template_value v;
    template_iterator it;
    CHOIR_TRY(template_eval(r, node, &v));
    CHOIR_TRY(template_iterate(r, v, &it));
    for (;;) {
        bool found = false;
        CHOIR_TRY(template_next(r, &it, &v, &found));
        if (!found) return CHOIR_OK;
        CHOIR_TRY(template_list_push(r, list, v));
    }
}

static choir_status eval_arguments(template_render *r, const template_arguments_node *node,
                                   template_arguments *args)
{
    size_t capacity = node->n_named;
    *args = (template_arguments){0};
    if (node->n_positional > 0 || node->star != NULL) {
        template_list *list;
        CHOIR_TRY(template_list_make(r, node->n_positional, &list));
        for (size_t i = 0; i < node->n_positional; i++)
            CHOIR_TRY(template_eval(r, node->positional[i], &list->items[list->n++]));
        if (node->star != NULL) CHOIR_TRY(eval_star(r, node->star, list));
        args->positional = list->items;
        args->n = list->n;
    }
    if (node->n_named > 0) {
        CHOIR_TRY(template_alloc_n(r, capacity, sizeof *args->named, &args->named));
        CHOIR_TRY(template_alloc_n(r, capacity, sizeof *args->names, &args->names));
        memcpy(args->names, node->names, capacity * sizeof *args->names);
        for (size_t i = 0; i < node->n_named; i++)
            CHOIR_TRY(template_eval(r, node->named[i], &args->named[i]));
        args->n_named = capacity;
    }
    if (node->star_star == NULL) return CHOIR_OK;
    template_value v;
    CHOIR_TRY(template_eval(r, node->star_star, &v));
    if (v.type != TEMPLATE_DICT)
        return template_error(r, "what follows ** is a '%s' and not a dict", template_type_name(v));
    for (size_t i = 0; i < v.dict->n; i++) {
        if (v.dict->entries[i].key.type != TEMPLATE_STRING)
            return template_error(r, "names of arguments are strings");
        CHOIR_TRY(
            add_named(r, args, &capacity, v.dict->entries[i].key.s, v.dict->entries[i].value));
    }
    return CHOIR_OK;
}

static choir_status eval_call(template_render *r, const template_node *node, template_value *out)
{
    template_value callee;
    template_arguments args;
    CHOIR_TRY(template_eval(r, node->a, &callee));
    CHOIR_TRY(eval_arguments(r, node->arguments, &args));
    r->line = node->line;
    return template_call(r, callee, &args, out);
}

/* A filter or a test. */
static choir_status eval_filter(template_render *r, const template_node *node, template_value *out)
{
    template_value v;
    template_arguments args;
    if (node->a != NULL)
        CHOIR_TRY(template_eval(r, node->a, &v));
    else
        v = *out; /* a block's text, which its first filter works on */
    CHOIR_TRY(eval_arguments(r, node->arguments, &args));
    r->line = node->line;
    if (node->builtin == NULL)
        return template_error(r, "unknown %s '%.*s'", node->kind == NODE_FILTER ? "filter" : "test",
                              (int)node->name->bytes, node->name->data);
    return template_call_builtin(r, node->builtin, &v, &args, out);
}

static choir_status eval_slice(template_render *r, const template_node *node, template_value *out)
{
    template_value object, bounds[3] = {{0}};
    CHOIR_TRY(template_eval(r, node->a, &object));
    for (size_t i = 0; i < 3; i++)
        if (node->list[i] != NULL) CHOIR_TRY(template_eval(r, node->list[i], &bounds[i]));
    r->line = node->line;
    return template_slice(r, object, bounds, out);
}

static choir_status eval_item(template_render *r, const template_node *node, template_value *out)
{
    template_value object, key;
    CHOIR_TRY(template_eval(r, node->a, &object));
    CHOIR_TRY(template_eval(r, node->b, &key));
    r->line = node->line;
    return template_get_item(r, object, key, out);
}

static choir_status eval_choice(template_render *r, const template_node *node, template_value *out)
{
    static const template_string hint = {
        .data = "the inline if-expression is false and has no else", .bytes = 49, .chars = 49};
    template_value test;
    CHOIR_TRY(template_eval(r, node->b, &test));
    if (template_truth(test)) return template_eval(r, node->a, out);
    if (node->c != NULL) return template_eval(r, node->c, out);
    *out = template_hint(&hint);
    return CHOIR_OK;
}

static choir_status eval_node(template_render *r, const template_node *node, template_value *out)
{
    template_value a, b;
    switch ((template_kind)node->kind) {
    case NODE_CONSTANT:
        *out = node->constant;
        return CHOIR_OK;
    case NODE_NAME:
        return template_lookup(r, node->name, out);
    case NODE_LIST:
    case NODE_TUPLE:
        return eval_list(r, node, out);
    case NODE_DICT:
        return eval_dict(r, node, out);
    case NODE_ATTRIBUTE:
        CHOIR_TRY(template_eval(r, node->a, &a));
        r->line = node->line;
        return template_get_attribute(r, a, node->name, out);
    case NODE_ITEM:
        return eval_item(r, node, out);
    case NODE_SLICE:
        return eval_slice(r, node, out);
    case NODE_CALL:
        return eval_call(r, node, out);
    case NODE_FILTER:
    case NODE_TEST:
        return eval_filter(r, node, out);
    case NODE_UNARY:
        return eval_unary(r, node, out);
    case NODE_BINARY:
        CHOIR_TRY(template_eval(r, node->a, &a));
        CHOIR_TRY(template_eval(r, node->b, &b));
        r->line = node->line;
        return template_binary(r, node->op, a, b, out);
    case NODE_AND:
    case NODE_OR:
        CHOIR_TRY(template_eval(r, node->a, out));
        if (template_truth(*out) == (node->kind == NODE_OR)) return CHOIR_OK;
        return template_eval(r, node->b, out);
    case NODE_NOT:
        CHOIR_TRY(template_eval(r, node->a, &a));
        *out = template_bool(!template_truth(a));
        return CHOIR_OK;
    case NODE_COMPARE:
        return eval_compare(r, node, out);
    case NODE_CONCAT:
        return eval_concat(r, node, out);
    case NODE_CHOICE:
        return eval_choice(r, node, out);
    default:
        CHOIR_ASSERT(!"a statement where an expression belongs");
        return CHOIR_E_INTERNAL;
    }
}

choir_status template_eval(template_render *r, const template_node *node, template_value *out)
{
    r->line = node->line;
    CHOIR_TRY(template_charge(r, 1));
    if (++r->depth > TEMPLATE_MAX_DEPTH)
        return template_error(r, "the template's evaluation nests deeper than %d",
                              TEMPLATE_MAX_DEPTH);
    CHOIR_TRY(eval_node(r, node, out));
    r->depth--;
    return CHOIR_OK;
}
