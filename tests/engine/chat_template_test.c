/* The templates of the common model families and some hundred small ones give what jinja2 gives
 * (the fixtures are made by tests/oracle/make_chat_templates.py); hostile ones end in a sentence,
 * soon. */
#include "base/base.h"
#include "engine/chat_template.h"
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

/* With a file of cases and a folder of templates: those instead of the fixtures. */
int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model_templates),
        cmocka_unit_test(test_expressions),
    };
    if (argc == 3) {
        const struct CMUnitTest given[] = {cmocka_unit_test(test_model_templates)};
        cases_path = argv[1];
        templates = argv[2];
        return cmocka_run_group_tests(given, NULL, NULL);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
