/* Jinja's tests: what may stand after `is`. */
#include "engine/chat_template_render.h"

#define TEST(name)                                                                                 \
    static choir_status name(template_render *r, template_value *slots,                            \
                             const template_arguments *all, template_value *out)
#define SIMPLE_TEST(name, condition)                                                               \
    TEST(name)                                                                                     \
    {                                                                                              \
        template_value v = slots[0];                                                               \
        (void)r;                                                                                   \
        (void)all;                                                                                 \
        *out = template_bool(condition);                                                           \
        return CHOIR_OK;                                                                           \
    }

SIMPLE_TEST(is_defined, v.type != TEMPLATE_UNDEFINED)
SIMPLE_TEST(is_undefined, v.type == TEMPLATE_UNDEFINED)
SIMPLE_TEST(is_none, v.type == TEMPLATE_NONE)
SIMPLE_TEST(is_boolean, v.type == TEMPLATE_BOOL)
SIMPLE_TEST(is_true, v.type == TEMPLATE_BOOL && v.b)
SIMPLE_TEST(is_false, v.type == TEMPLATE_BOOL && !v.b)
SIMPLE_TEST(is_integer, v.type == TEMPLATE_INT)
SIMPLE_TEST(is_float, v.type == TEMPLATE_FLOAT)
SIMPLE_TEST(is_number, template_is_number(v))
SIMPLE_TEST(is_string, v.type == TEMPLATE_STRING)
SIMPLE_TEST(is_mapping, v.type == TEMPLATE_DICT)
SIMPLE_TEST(is_sequence, v.type == TEMPLATE_UNDEFINED || v.type == TEMPLATE_STRING ||
                             v.type == TEMPLATE_LIST || v.type == TEMPLATE_TUPLE ||
                             v.type == TEMPLATE_DICT || v.type == TEMPLATE_RANGE)
SIMPLE_TEST(is_iterable, template_iterable(v) || v.type == TEMPLATE_LOOP)
SIMPLE_TEST(is_callable, v.type == TEMPLATE_UNDEFINED || v.type == TEMPLATE_MACRO ||
                             v.type == TEMPLATE_FUNCTION || v.type == TEMPLATE_METHOD ||
                             v.type == TEMPLATE_JOINER || v.type == TEMPLATE_LOOP)
SIMPLE_TEST(is_escaped, v.type == TEMPLATE_STRING && v.flag != 0)
SIMPLE_TEST(is_filter, v.type == TEMPLATE_STRING && template_find_filter(v.s) != NULL)
SIMPLE_TEST(is_test, v.type == TEMPLATE_STRING && template_find_test(v.s) != NULL)

static choir_status remainder_is(template_render *r, template_value v, template_value by,
                                 int64_t wanted, template_value *out)
{
    CHOIR_TRY(template_binary(r, TOKEN_MOD, v, by, &v));
    bool same = false;
    CHOIR_TRY(template_equal(r, v, template_int(wanted), &same));
    *out = template_bool(same);
    return CHOIR_OK;
}

TEST(is_odd)
{
    return (void)all, remainder_is(r, slots[0], template_int(2), 1, out);
}
TEST(is_even)
{
    return (void)all, remainder_is(r, slots[0], template_int(2), 0, out);
}
TEST(is_divisible)
{
    return (void)all, remainder_is(r, slots[0], slots[1], 0, out);
}

static choir_status has_case(template_render *r, template_value v, int how, template_value *out)
{
    static const template_string lower = {"islower", 7, 7, NULL}, upper = {"isupper", 7, 7, NULL};
    static const template_arguments none = {0};
    template_string *s;
    CHOIR_TRY(template_to_string(r, v, &s));
    v = TEMPLATE_VALUE(STRING, s, s);
    return template_call_builtin(r, template_find_string_method(how > 0 ? &upper : &lower), &v,
                                 &none, out);
}

TEST(is_lower)
{
    return (void)all, has_case(r, slots[0], -1, out);
}
TEST(is_upper)
{
    return (void)all, has_case(r, slots[0], 1, out);
}

/* Identity: Python has one True, one None, and objects of their own for what is made anew. */
TEST(is_same)
{
    template_value a = slots[0], b = slots[1];
    bool same = a.type == b.type;
    (void)r;
    (void)all;
    if (same && a.type == TEMPLATE_BOOL)
        same = a.b == b.b;
    else if (same && a.type == TEMPLATE_INT)
        same = a.i == b.i && a.i >= -5 && a.i <= 256;
    else if (same && a.type == TEMPLATE_STRING)
        same = a.s == b.s || (a.s->bytes < 2 && template_string_same(a.s, b.s));
    else if (same && a.type != TEMPLATE_NONE)
        same = a.s == b.s && a.flag == b.flag;
    *out = template_bool(same);
    return CHOIR_OK;
}

TEST(is_in)
{
    bool found = false;
    (void)all;
    CHOIR_TRY(template_contains(r, slots[0], slots[1], &found));
    *out = template_bool(found);
    return CHOIR_OK;
}

TEST(is_equal)
{
    bool same = false;
    (void)all;
    CHOIR_TRY(template_equal(r, slots[0], slots[1], &same));
    *out = template_bool(same);
    return CHOIR_OK;
}

TEST(is_unequal)
{
    CHOIR_TRY(is_equal(r, slots, all, out));
    out->b = !out->b;
    return CHOIR_OK;
}

#define ORDER_TEST(name, condition)                                                                \
    TEST(name)                                                                                     \
    {                                                                                              \
        int order = 0;                                                                             \
        (void)all;                                                                                 \
        CHOIR_TRY(template_compare(r, slots[0], slots[1], &order));                                \
        *out = template_bool(order != 2 && (condition));                                           \
        return CHOIR_OK;                                                                           \
    }
ORDER_TEST(is_greater, order > 0)
ORDER_TEST(is_at_least, order >= 0)
ORDER_TEST(is_less, order < 0)
ORDER_TEST(is_at_most, order <= 0)

const template_builtin *template_find_test(const template_string *name)
{
    // clang-format off
    static const template_builtin tests[] = {
        {"defined", "value", is_defined},
        {"undefined", "value", is_undefined},
        {"none", "value", is_none},
        {"string", "value", is_string},
        {"mapping", "value", is_mapping},
        {"iterable", "value", is_iterable},
        {"sequence", "value", is_sequence},
        {"number", "value", is_number},
        {"integer", "value", is_integer},
        {"float", "value", is_float},
        {"boolean", "value", is_boolean},
        {"true", "value", is_true},
        {"false", "value", is_false},
        {"odd", "value", is_odd},
        {"even", "value", is_even},
        {"divisibleby", "value num", is_divisible},
        {"equalto", "a b", is_equal},
        {"==", "a b", is_equal},
        {"eq", "a b", is_equal},
        {"ne", "a b", is_unequal},
        {"!=", "a b", is_unequal},
        {"gt", "a b", is_greater},
        {">", "a b", is_greater},
        {"greaterthan", "a b", is_greater},
        {"ge", "a b", is_at_least},
        {">=", "a b", is_at_least},
        {"lt", "a b", is_less},
        {"<", "a b", is_less},
        {"lessthan", "a b", is_less},
        {"le", "a b", is_at_most},
        {"<=", "a b", is_at_most},
        {"in", "value seq", is_in},
        {"sameas", "value other", is_same},
        {"lower", "value", is_lower},
        {"upper", "value", is_upper},
        {"callable", "value", is_callable},
        {"escaped", "value", is_escaped},
        {"filter", "value", is_filter},
        {"test", "value", is_test},
    };
    // clang-format on
    return template_find_builtin(tests, sizeof tests / sizeof *tests, name);
}

choir_status template_apply_test(template_render *r, const template_string *name, template_value v,
                                 const template_arguments *rest, bool *out)
{
    const template_builtin *f = template_find_test(name);
    template_value result;
    if (f == NULL)
        return template_error(r, "unknown test '%.*s'",
                              (int)(name->bytes > 200 ? 200 : name->bytes), name->data);
    CHOIR_TRY(template_call_builtin(r, f, &v, rest, &result));
    *out = template_truth(result);
    return CHOIR_OK;
}
