/* The templates of the common model families and some hundred small ones give what jinja2 gives
 * (the fixtures are made by tests/oracle/make_chat_templates.py); hostile ones end in a sentence,
 * soon. */
#include "base/base.h"
#include "engine/chat_template.h"
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define FIXTURES "tests/fixtures/chat_templates/"

static char *read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    if (f == NULL) fail_msg("open %s", path);
    char *data = malloc(1 << 20);
    *bytes = fread(data, 1, 1 << 20, f);
    fclose(f);
    return data;
}

static json_t *load(const char *path)
{
    json_error_t error;
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    if (json == NULL) fail_msg("%s line %d: %s", path, error.line, error.text);
    return json;
}

static choir_status render_source(const char *source, size_t bytes, const json_t *variables,
                                  int64_t now_s, char **text, size_t *n)
{
    choir_chat_template *t = NULL;
    *text = NULL;
    CHOIR_TRY(choir_chat_template_compile(source, bytes, &t));
    choir_status status = choir_chat_template_render(t, variables, now_s, text, n);
    choir_chat_template_destroy(t);
    return status;
}

/* One fixture: text to expect, or `refuses`, or `fails`. Returns whether it was met. */
static bool meets(const char *name, const char *source, size_t bytes, const json_t *variables,
                  int64_t now_s, const json_t *c)
{
    static const char refusal[] = "the model's chat template refuses this conversation: ";
    const json_t *expected = json_object_get(c, "text"), *refuses = json_object_get(c, "refuses");
    char *text = NULL;
    size_t n = 0;
    choir_status status = render_source(source, bytes, variables, now_s, &text, &n);
    bool ok;
    if (expected != NULL) {
        ok = status == CHOIR_OK && n == json_string_length(expected) &&
             memcmp(text, json_string_value(expected), n) == 0;
    } else if (refuses != NULL) {
        ok = status == CHOIR_E_INVALID &&
             strncmp(choir_error_message(), refusal, strlen(refusal)) == 0 &&
             strcmp(choir_error_message() + strlen(refusal), json_string_value(refuses)) == 0;
    } else {
        ok = status != CHOIR_OK && status != CHOIR_E_INTERNAL && status != CHOIR_E_NO_MEMORY;
    }
    if (!ok)
        print_error("%s: got %s\n%s\n-- wanted\n%s\n\n", name, choir_status_text(status),
                    status == CHOIR_OK ? text : choir_error_message(),
                    expected != NULL  ? json_string_value(expected)
                    : refuses != NULL ? json_string_value(refuses)
                                      : json_string_value(json_object_get(c, "fails")));
    choir_free(text);
    return ok;
}

/* The conversation's variables, with those that every caller gives. */
static json_t *variables_of(const json_t *all, const json_t *c)
{
    const json_t *conversations = json_object_get(all, "conversations");
    json_t *variables =
        json_pack("{s:b, s:n, s:n}", "add_generation_prompt", 1, "tools", "documents");
    assert_int_equal(json_object_update(variables, json_object_get(c, "tokens")), 0);
    json_t *conversation =
        json_object_get(conversations, json_string_value(json_object_get(c, "name")));
    assert_int_equal(json_object_update(variables, conversation), 0);
    return variables;
}

static const char *cases_path = FIXTURES "cases.json", *templates = FIXTURES "templates";

static void test_model_templates(void **state)
{
    (void)state;
    json_t *all = load(cases_path), *cases = json_object_get(all, "cases"), *c;
    size_t i, bad = 0;
    json_array_foreach(cases, i, c)
    {
        char path[512], name[256];
        size_t bytes;
        const char *file = json_string_value(json_object_get(c, "template"));
        snprintf(path, sizeof path, "%s/%s", templates, file);
        snprintf(name, sizeof name, "%s, %s", file, json_string_value(json_object_get(c, "name")));
        char *source = read_file(path, &bytes);
        json_t *variables = variables_of(all, c);
        bad += !meets(name, source, bytes, variables,
                      json_integer_value(json_object_get(all, "now")), c);
        json_decref(variables);
        free(source);
    }
    print_message("%zu of %zu cases\n", json_array_size(cases) - bad, json_array_size(cases));
    json_decref(all);
    assert_int_equal(bad, 0);
}

static void test_expressions(void **state)
{
    (void)state;
    json_t *all = load(FIXTURES "expressions.json"), *cases = json_object_get(all, "cases"), *c;
    size_t i, bad = 0;
    json_array_foreach(cases, i, c)
    {
        const json_t *source = json_object_get(c, "source");
        const char *text = json_string_value(source);
        bad += !meets(text, text, json_string_length(source), json_object_get(all, "variables"),
                      json_integer_value(json_object_get(all, "now")), c);
    }
    print_message("%zu of %zu cases\n", json_array_size(cases) - bad, json_array_size(cases));
    json_decref(all);
    assert_int_equal(bad, 0);
}

/* ---- Hostile templates ---- */

static char *repeat(const char *before, const char *middle, size_t times, const char *after)
{
    size_t n = strlen(middle);
    char *text = malloc(strlen(before) + n * times + strlen(after) + 1), *w = text;
    w = stpcpy(w, before);
    for (size_t i = 0; i < times; i++) w = stpcpy(w, middle);
    stpcpy(w, after);
    return text;
}

static void expect(const char *source, choir_status wanted, const char *sentence)
{
    char *text = NULL;
    size_t n = 0;
    json_t *none = json_object();
    choir_status status = render_source(source, strlen(source), none, 0, &text, &n);
    json_decref(none);
    choir_free(text);
    if (status != wanted || strstr(choir_error_message(), sentence) == NULL)
        fail_msg("%.100s: got %s (%s), wanted %s (%s)", source, choir_status_text(status),
                 choir_error_message(), choir_status_text(wanted), sentence);
}

static void expect_repeated(const char *before, const char *middle, size_t times, const char *after,
                            choir_status wanted, const char *sentence)
{
    char *source = repeat(before, middle, times, after);
    expect(source, wanted, sentence);
    free(source);
}

static void test_nesting(void **state)
{
    (void)state;
    expect_repeated("{{ ", "(", 6000, " 1 }}", CHOIR_E_FORMAT, "line 1: ");
    expect_repeated("{{ ", "[", 6000, " 1 }}", CHOIR_E_FORMAT, "nest deeper than 100");
    expect_repeated("{{ ", "{1:", 6000, " 1 }}", CHOIR_E_FORMAT, "nest deeper than 100");
    expect_repeated("{{ ", "f(", 6000, " 1 }}", CHOIR_E_FORMAT, "nest");
    expect_repeated("{{ ", "not ", 200000, " 1 }}", CHOIR_E_FORMAT, "nests deeper than 100");
    expect_repeated("{{ ", "- ", 200000, " 1 }}", CHOIR_E_FORMAT, "nests deeper than 100");
    expect_repeated("{{ 1", " + 1", 200000, " }}", CHOIR_E_FORMAT, "more than 400 operators");
    expect_repeated("{{ 1", " and 1", 100000, " }}", CHOIR_E_FORMAT, "more than 400 operators");
    expect_repeated("{{ a", ".a", 200000, " }}", CHOIR_E_FORMAT, "more than 400 operators");
    expect_repeated("{{ a", "[0]", 200000, " }}", CHOIR_E_FORMAT, "more than 400 operators");
    expect_repeated("{{ a", "|d", 200000, " }}", CHOIR_E_FORMAT, "more than 400 operators");
    expect_repeated("{{ a", " is defined is defined", 1, " }}", CHOIR_E_FORMAT, "chained");
    expect_repeated("{{ 1", " if 1 else 1", 50000, " }}", CHOIR_E_FORMAT, "nests deeper than 100");
    expect_repeated("{{ 1", " if 1", 50000, " }}", CHOIR_E_FORMAT, "more than 400 operators");
    expect_repeated("", "{% if 1 %}", 50000, "", CHOIR_E_FORMAT, "nests deeper than 100");
    expect_repeated("", "{% for x in y %}", 50000, "", CHOIR_E_FORMAT, "nests deeper than 100");
    expect_repeated("{% set ", "(", 50000, "", CHOIR_E_FORMAT, "nest");
    expect_repeated("{% macro f() %}", "{% macro f() %}", 5000, "", CHOIR_E_FORMAT, "nests deeper");
    /* long, but not deep */
    expect_repeated("{{ 1", " ~ 1", 100000, " }}", CHOIR_OK, "");
    expect_repeated("{% if 0 %}", "{% elif 0 %}", 40000, "{% endif %}", CHOIR_OK, "");
    expect_repeated("{{ [", "1,", 200000, "] | length }}", CHOIR_OK, "");
    expect_repeated("", "{{ 1 }}", 100000, "", CHOIR_OK, "");
    expect_repeated("", "{", 1000000, "", CHOIR_E_FORMAT, "");
    expect_repeated("", "{% raw ", 100000, "", CHOIR_E_FORMAT, "");
    expect_repeated("{% raw %}", "{% endraw", 100000, "", CHOIR_E_FORMAT, "no end");
    expect_repeated("", " ", (1 << 20) + 1, "", CHOIR_E_FULL, "longer than 1 MiB");
    expect("\xff", CHOIR_E_FORMAT, "not UTF-8");
}

#define MUCH "{% for a in range(100000) %}{% for b in range(100000) %}"
static void test_endless(void **state)
{
    (void)state;
    expect(MUCH "{% endfor %}{% endfor %}", CHOIR_E_FULL, "more than 4000000 steps");
    expect(MUCH "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}", CHOIR_E_FULL,
           "longer than 16 MiB");
    expect("{{ 'a' * 10 ** 9 }}", CHOIR_E_FULL, "64 MiB");
    expect("{{ 'a' * 9000000000000000000 }}", CHOIR_E_FULL, "64 MiB");
    expect("{{ [1] * 10 ** 9 }}", CHOIR_E_FULL, "steps");
    expect("{{ 'a' * 60000000 }}", CHOIR_E_FULL, "16 MiB");
    expect("{% set ns = namespace(s='aaaa') %}" MUCH
           "{% set ns.s = ns.s + ns.s %}{% endfor %}{% endfor %}",
           CHOIR_E_FULL, "64 MiB");
    expect("{% set ns = namespace(s=[1]) %}" MUCH
           "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{% endfor %}{{ ns.s }}",
           CHOIR_E_FULL, "");
    expect("{% set ns = namespace(s=[1]) %}{% for i in range(90000) %}{% set ns.s = [ns.s] %}{% "
           "endfor %}{{ ns.s }}",
           CHOIR_E_INVALID, "nested deeper than 200");
    expect("{% set ns = namespace(s=[1]) %}{% for i in range(90000) %}{% set ns.s = [ns.s] %}{% "
           "endfor %}{{ ns.s | tojson }}",
           CHOIR_E_INVALID, "nested deeper than 200");
    expect("{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(90000) %}{% set ns.s = [ns.s] "
           "%}{% set ns.t = [ns.t] %}{% endfor %}{{ ns.s == ns.t }}",
           CHOIR_E_INVALID, "nested deeper than 200");
    expect("{% set ns = namespace(s=(1,)) %}{% for i in range(90000) %}{% set ns.s = (ns.s,) %}{% "
           "endfor %}{{ {ns.s: 1} }}",
           CHOIR_E_INVALID, "nested deeper than 200");
    /* shared halves: 2^60 leaves in 60 lists */
    expect("{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% "
           "endfor %}{{ ns.s }}",
           CHOIR_E_FULL, "");
    expect("{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, "
           "ns.s] %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.s == ns.t }}",
           CHOIR_E_FULL, "steps");
    expect("{% set ns = namespace() %}{% set ns.n = ns %}{{ ns }}", CHOIR_E_INVALID,
           "nested deeper");
    expect("{% set ns = namespace(s=[1]) %}{% for i in range(90000) %}"
           "{% set ns.s = ns.s | map('string') %}{% endfor %}{{ ns.s | list }}",
           CHOIR_E_INVALID, "nests deeper than 1200");
    expect("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CHOIR_E_INVALID, "deeper than 100");
    expect("{% macro f(a) %}{{ (((((((((f(a ~ 'x')))))))))) }}{% endmacro %}{{ f('') }}",
           CHOIR_E_INVALID, "deeper than 100");
    expect("{% macro f() %}{% call f() %}{% endcall %}{{ caller }}{% endmacro %}{{ f() }}",
           CHOIR_E_INVALID, "deeper than 100");
    expect("{{ 'x'.ljust(10 ** 12) }}", CHOIR_E_FULL, "64 MiB");
    expect("{{ '%999999999999d' % 1 }}", CHOIR_E_INVALID, "too large");
    expect("{{ '%*d' % (10 ** 12, 1) }}", CHOIR_E_INVALID, "too large");
    expect("{{ '{:99999999999}'.format(1) }}", CHOIR_E_INVALID, "too large");
    expect("{{ '%.999999f' % 1.5 }}", CHOIR_E_INVALID, "precision");
    expect("{{ ('a' * 1000000).replace('', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb' * 4) }}",
           CHOIR_E_FULL, "MiB");
    expect("{{ 'a' | indent(10 ** 11, true) }}", CHOIR_E_FULL, "64 MiB");
    expect("{{ [1] | tojson(indent=10 ** 11) }}", CHOIR_E_INVALID, "too large");
    expect("{{ [1] | batch(10 ** 11, 'x') | list }}", CHOIR_E_FULL, "");
    expect("{{ [] | slice(10 ** 11) | list }}", CHOIR_E_FULL, "");
    expect("{{ ('a' * 4000000).rfind('a' * 2000000 ~ 'b') }}", CHOIR_E_FULL, "steps");
    expect("{{ range(10 ** 15) }}", CHOIR_E_INVALID, "longer than 100000");
    expect("{% for i in range(100000) %}{% set x = ('a' * 40000).find('b') %}{% endfor %}",
           CHOIR_E_FULL, "");
    expect("{{ 9223372036854775807 + 1 }}", CHOIR_E_INVALID, "64 bits");
    expect("{{ 9223372036854775808 }}", CHOIR_E_FORMAT, "64 bits");
    expect("{{ 3037000500 * 3037000500 }}", CHOIR_E_INVALID, "64 bits");
    expect("{{ (-9223372036854775807 - 1) // -1 }}", CHOIR_E_INVALID, "64 bits");
    expect("{{ -(-9223372036854775807 - 1) }}", CHOIR_E_INVALID, "64 bits");
    expect("{{ (-9223372036854775807 - 1) | abs }}", CHOIR_E_INVALID, "64 bits");
    expect("{{ (-9223372036854775807 - 1) % -1 }}", CHOIR_OK, "");
    expect("{{ 'abc'[::-9223372036854775807 - 1] }}", CHOIR_OK, "");
    expect("{{ range(10)[::9223372036854775807] | list }}", CHOIR_OK, "");
}

static void test_sentences(void **state)
{
    (void)state;
    expect("a\nb\n{{ x | foo }}", CHOIR_E_FORMAT, "line 3: unknown filter 'foo'");
    expect("\n{{ 1 is foo }}", CHOIR_E_FORMAT, "line 2: unknown test 'foo'");
    expect("\n\n{% foo %}", CHOIR_E_FORMAT, "line 3: unknown tag 'foo'");
    expect("{% if 1 %}\n", CHOIR_E_FORMAT, "the template ends where 'elif' is missing");
    expect("\n{{ nothing.x }}", CHOIR_E_INVALID, "line 2: 'nothing' is undefined");
    expect("{{ {}.a.b }}", CHOIR_E_INVALID,
           "line 1: 'dict' object has no attribute or element 'a'");
    expect("{{ [].append(1) }}", CHOIR_E_INVALID, "'append' of a 'list' object is closed");
    expect("{{ 'a'\n+\n1 }}", CHOIR_E_INVALID,
           "line 2: unsupported operand types for +: 'str' and 'int'");
    expect("{{ a[,0] }}", CHOIR_E_FORMAT, "expected an index");
    expect("{% include 'x' %}", CHOIR_E_FORMAT, "the tag 'include' is not available");
    expect("{{ raise_exception('no') }}", CHOIR_E_INVALID,
           "the model's chat template refuses this conversation: no");
}

/* What a render is given can be odd as well: depth, zero bytes, numbers of all sizes. */
static void test_variables(void **state)
{
    (void)state;
    static const char source[] = "{{ a }}|{{ b | length }}|{{ b | tojson }}|{{ i }}|{{ r }}";
    choir_chat_template *t = NULL;
    char *text = NULL;
    size_t n = 0;
    json_t *v = json_pack("{s:[i,n,b], s:s%, s:I, s:f}", "a", 1, 1, "b", "x\0y", (size_t)3, "i",
                          (json_int_t)INT64_MIN, "r", 0.5);
    assert_int_equal(choir_chat_template_compile(source, strlen(source), &t), CHOIR_OK);
    assert_int_equal(choir_chat_template_render(t, v, 0, &text, &n), CHOIR_OK);
    assert_string_equal(text, "[1, None, True]|3|\"x\\u0000y\"|-9223372036854775808|0.5");
    choir_free(text);
    json_t *deep = json_array();
    for (int i = 0; i < 1000; i++) {
        json_t *around = json_array();
        json_array_append_new(around, deep);
        deep = around;
    }
    json_object_set_new(v, "a", deep);
    assert_int_equal(choir_chat_template_render(t, v, 0, &text, &n), CHOIR_E_INVALID);
    assert_non_null(strstr(choir_error_message(), "nested deeper than 200"));
    assert_null(text);
    json_decref(v);
    choir_chat_template_destroy(t);
    choir_chat_template_destroy(NULL);
}

/* The i-th allocation fails: an error, no leak, and in the end the text. */
static void test_memory_faults(void **state)
{
    (void)state;
    size_t bytes;
    char *source = read_file(FIXTURES "templates/gpt-oss.jinja", &bytes);
    json_t *all = load(FIXTURES "cases.json");
    json_t *conversations = json_object_get(all, "conversations");
    json_t *variables = json_object_get(conversations, "tool called");
    uint64_t before = choir_memory_bytes(CHOIR_MEM_REQUESTS) + choir_memory_bytes(CHOIR_MEM_OTHER);
    for (uint64_t i = 1;; i++) {
        char *text = NULL;
        size_t n = 0;
        choir_memory_fail_at(i);
        choir_status status = render_source(source, bytes, variables, 0, &text, &n);
        choir_memory_fail_at(0);
        choir_free(text);
        if (status == CHOIR_OK) {
            assert_true(i > 4);
            break;
        }
        assert_int_equal(status, CHOIR_E_NO_MEMORY);
        assert_true(i < 1000);
    }
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_REQUESTS) + choir_memory_bytes(CHOIR_MEM_OTHER),
                     before);
    json_decref(all);
    free(source);
}

/* One compiled template, rendered by several threads at once: nothing in it changes. */
typedef struct shared {
    const choir_chat_template *t;
    const json_t *variables;
    const char *expected;
    bool same;
} shared;

static void *render_often(void *argument)
{
    shared *s = argument;
    s->same = true;
    for (int i = 0; i < 50; i++) {
        char *text = NULL;
        size_t n = 0;
        choir_status status = choir_chat_template_render(s->t, s->variables, 0, &text, &n);
        s->same &= status == CHOIR_OK && strcmp(text, s->expected) == 0;
        choir_free(text);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    size_t bytes, n;
    char *source = read_file(FIXTURES "templates/qwen3.jinja", &bytes), *text = NULL;
    json_t *all = load(FIXTURES "cases.json");
    json_t *variables = json_object_get(json_object_get(all, "conversations"), "tool called");
    choir_chat_template *t = NULL;
    assert_int_equal(choir_chat_template_compile(source, bytes, &t), CHOIR_OK);
    assert_int_equal(choir_chat_template_render(t, variables, 0, &text, &n), CHOIR_OK);
    pthread_t threads[4];
    shared each[4];
    for (int i = 0; i < 4; i++) {
        each[i] = (shared){t, variables, text, false};
        assert_int_equal(pthread_create(&threads[i], NULL, render_often, &each[i]), 0);
    }
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 4; i++) assert_true(each[i].same);
    choir_free(text);
    choir_chat_template_destroy(t);
    json_decref(all);
    free(source);
}

/* With a file of cases and a folder of templates: those instead of the fixtures. */
int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model_templates), cmocka_unit_test(test_expressions),
        cmocka_unit_test(test_nesting),         cmocka_unit_test(test_endless),
        cmocka_unit_test(test_sentences),       cmocka_unit_test(test_variables),
        cmocka_unit_test(test_memory_faults),   cmocka_unit_test(test_threads),
    };
    if (argc == 3) {
        const struct CMUnitTest given[] = {cmocka_unit_test(test_model_templates)};
        cases_path = argv[1];
        templates = argv[2];
        return cmocka_run_group_tests(given, NULL, NULL);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
