/* The merged adapter as PEFT has it: adapter_config.json, adapter_model.safetensors; beside them what it was
 * made of, and its parts' notices. */
#include "tune/merge.h"

#include "tune/hf_files.h"
#include "tune/out_folder.h"
#include "tune/weights.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { MAX_PATH_BYTES = 4096, MAX_TEXT = 64 << 10 };
static const char prefix[] = "base_model.model.";

/* A module as PEFT's configurations name it. */
static const char *plain_name(const choir_tune_merged *t)
{
    bool has = strncmp(t->name, prefix, sizeof prefix - 1) == 0;
    return has ? t->name + sizeof prefix - 1 : t->name;
}

/* PEFT's rule for a list of targets: the whole name, or its end behind a dot. */
static bool is_target(const json_t *targets, const char *module)
{
    const char *key = module;
    while (key != NULL) {
        if (json_object_get(targets, key) != NULL) return true;
        key = strchr(key, '.');
        if (key != NULL) key++;
    }
    return false;
}

static bool is_given(const json_t *config, const char *key)
{
    const json_t *value = json_object_get(config, key);
    return value != NULL && !json_is_null(value) &&
           !(json_is_array(value) && json_array_size(value) == 0);
}

/* The texts of a list, as the keys of an object, so that each is there once; false: it is no list of texts. */
static bool add_texts(json_t **to, const json_t *config, const char *key)
{
    const json_t *list = json_object_get(config, key);
    if (!is_given(config, key)) return true;
    if (!json_is_array(list)) return false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *text = json_string_value(json_array_get(list, i));
        if (text == NULL) return false;
        choir_tune_json_set(to, text, json_true());
    }
    return true;
}

static json_t *keys_of(const json_t *object)
{
    const char *key;
    json_t *value, *list = json_array();
    json_object_keylen_t n;
    json_object_keylen_foreach((json_t *)object, key, n, value)
        choir_tune_json_append(&list, json_stringn(key, n));
    return list;
}
