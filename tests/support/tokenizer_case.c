#include "tests/support/tokenizer_case.h"

#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static json_t *load(const char *root, const char *folder, const char *name)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s/%s.json", root, folder, name);
    json_t *value = json_load_file(path, JSON_ALLOW_NUL, NULL);
    if (value == NULL) fprintf(stderr, "%s is missing or no JSON\n", path);
    CHOIR_ASSERT(value != NULL);
    return value;
}

char *tokenizer_case_json(const char *root, json_t *one)
{
    json_t *tokenizer = json_object_get(one, "tokenizer");
    json_t *model = json_object_get(tokenizer, "model");
    json_t *bpe = load(root, "models", json_string_value(json_object_get(model, "file")));
    json_object_update(bpe, model);
    json_object_set_new(tokenizer, "model", bpe);
    return json_dumps(tokenizer, JSON_COMPACT);
}

choir_tokenizer *tokenizer_case_open(const char *root, const char *name)
{
    json_t *one = load(root, "cases", name);
    char *json = tokenizer_case_json(root, one);
    choir_tokenizer *t;
    choir_status status = choir_tokenizer_parse_json(json, strlen(json), &t);
    if (status != CHOIR_OK) fprintf(stderr, "%s: %s\n", name, choir_error_message());
    CHOIR_ASSERT(status == CHOIR_OK);
    free(json);
    json_decref(one);
    return t;
}
