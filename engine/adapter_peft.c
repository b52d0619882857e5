/* What PEFT's adapter_config.json says whatever the method is, and which method it is. */
#include "engine/adapter_read.h"

#include <string.h>
#include <strings.h>

const json_t *choir_adapter_get(const choir_adapter_reader *r, const char *key)
{
    const json_t *value = json_object_get(r->config, key);
    return json_is_null(value) ? NULL : value;
}

bool choir_adapter_is_off(const json_t *value)
{
    return value == NULL || json_is_null(value) || json_is_false(value) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0) ||
           (json_is_string(value) && json_string_length(value) == 0) ||
           (json_is_number(value) && json_number_value(value) == 0);
}

const char *choir_adapter_string(const choir_adapter_reader *r, const char *key,
                                 const char *otherwise)
{
    const char *text = json_string_value(choir_adapter_get(r, key));
    return text != NULL ? text : otherwise;
}

choir_status choir_adapter_flag(const choir_adapter_reader *r, const char *key, bool *out)
{
    const json_t *value = choir_adapter_get(r, key);
    *out = json_is_true(value);
    if (value == NULL || json_is_boolean(value)) return CHOIR_OK;
    return choir_fail(CHOIR_E_FORMAT, "%s: %s of adapter_config.json is neither true nor false",
                      r->name, key);
}

choir_status choir_adapter_refuse_keys(const choir_adapter_reader *r, const char *const *keys)
{
    for (; *keys != NULL; keys++)
        if (!choir_adapter_is_off(choir_adapter_get(r, *keys)))
            return choir_fail(CHOIR_E_UNIMPLEMENTED,
                              "%s: %s is set in adapter_config.json, which Choir does not have",
                              r->name, *keys);
    return CHOIR_OK;
}

bool choir_adapter_is_listed(const json_t *list, const char *module)
{
    size_t n = strlen(module);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        size_t m = name == NULL ? 0 : strlen(name);
        if (m == 0 || m > n || strcmp(module + n - m, name) != 0) continue;
        if (m == n || module[n - m - 1] == '.') return true;
    }
    return false;
}

bool choir_adapter_strip(char *name, const char *suffix)
{
    size_t n = strlen(name), m = strlen(suffix);
    if (m > n || strcmp(name + n - m, suffix) != 0) return false;
    name[n - m] = '\0';
    return true;
}

bool choir_adapter_plain_name(const char *tensor, char *out, size_t bytes)
{
    static const char prefix[] = "base_model.model.";
    /* A model that also sees has its text model below another name, in the files and in
     * transformers. */
    static const struct {
        const char *name, *plain;
    } others[] = {{"model.language_model.", "model."},
                  {"language_model.model.", "model."},
                  {"language_model.lm_head", "lm_head"}};
    if (strncmp(tensor, prefix, sizeof prefix - 1) != 0) return false;
    tensor += sizeof prefix - 1;
    const char *plain = "";
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strncmp(tensor, others[i].name, strlen(others[i].name)) == 0) {
            tensor += strlen(others[i].name);
            plain = others[i].plain;
            break;
        }
    return (size_t)snprintf(out, bytes, "%s%s", plain, tensor) < bytes;
}

static const struct {
    const char *type;
    choir_status (*read)(choir_adapter_reader *reader);
} kinds[] = {
    {"LORA", choir_adapter_read_lora},
};

choir_status choir_adapter_read_peft(choir_adapter_reader *r)
{
    const char *type = choir_adapter_string(r, "peft_type", "");
    char known[200];
    size_t n = 0;
    CHOIR_TRY(choir_adapter_make_places(r, false));
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(kinds[i].type, type) == 0) return kinds[i].read(r);
        n +=
            (size_t)snprintf(known + n, sizeof known - n, "%s%s", i > 0 ? ", " : "", kinds[i].type);
    }
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "%s: peft_type of adapter_config.json is \"%.40s\"; Choir reads %s", r->name,
                      type, known);
}
