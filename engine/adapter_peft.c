/* What PEFT's adapter_config.json says whatever the method is, and which method it is. */
#include "engine/adapter_read.h"

#include <math.h>
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

bool choir_adapter_ends_with(const char *name, const char *suffix)
{
    size_t n = strlen(name), m = strlen(suffix);
    return n > m && strcmp(name + n - m, suffix) == 0;
}

choir_adapter_tensor *choir_adapter_beside(const choir_adapter_reader *r, const char *tensor,
                                           const char *suffix, const char *other)
{
    char name[CHOIR_ADAPTER_MAX_NAME + 64];
    int n = (int)(strlen(tensor) - strlen(suffix));
    if ((size_t)snprintf(name, sizeof name, "%.*s%s", n, tensor, other) >= sizeof name) return NULL;
    return choir_adapter_find(r, name);
}

choir_status choir_adapter_number(const choir_adapter_reader *r, const char *key, double *out)
{
    const json_t *value = choir_adapter_get(r, key);
    *out = json_number_value(value);
    if (json_is_number(value)) return CHOIR_OK;
    return choir_fail(CHOIR_E_FORMAT, "%s: adapter_config.json has no number for %s", r->name, key);
}

choir_status choir_adapter_check_rank(const choir_adapter_reader *r, double rank, const char *field,
                                      const char *of)
{
    if (rank >= 1 && rank <= CHOIR_ADAPTER_MAX_RANK && rank == floor(rank)) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID,
                      "%s: %s is %g for %.200s, must be a whole number from 1 to %d", r->name,
                      field, rank, of, CHOIR_ADAPTER_MAX_RANK);
}

choir_status choir_adapter_module_spot(const choir_adapter_reader *r, const char *tensor,
                                       const char *suffix, char *module, size_t bytes,
                                       choir_adapter_spot *out)
{
    char name[CHOIR_ADAPTER_MAX_NAME + 16];
    if (!choir_adapter_plain_name(tensor, module, bytes) || !choir_adapter_strip(module, suffix))
        return choir_adapter_refuse(r, tensor);
    snprintf(name, sizeof name, "%.250s.weight", module);
    *out = choir_adapter_find_spot(r, name);
    if (out->n_places == 0 || choir_adapter_is_vector(out->places[0]->role) ||
        out->places[0]->stacked || choir_adapter_is_of_heads(out->places[0]))
        return choir_adapter_refuse(r, tensor);
    return choir_adapter_check_spot(r, out, tensor);
}

static const char prefix[] = "base_model.model.";

/* A model that also sees has its text model below another name, in the files and in transformers:
 * how a tensor's name begins there, and what it is here. */
typedef struct beginning {
    const char *own, *plain;
} beginning;

static const beginning *beginning_of(const char *tensor)
{
    static const beginning all[] = {{"model.language_model.", "model."},
                                    {"language_model.model.", "model."},
                                    {"language_model.lm_head", "lm_head"},
                                    {"", ""}};
    const beginning *b = all;
    while (strncmp(tensor + sizeof prefix - 1, b->own, strlen(b->own)) != 0) b++;
    return b;
}

bool choir_adapter_plain_name(const char *tensor, char *out, size_t bytes)
{
    if (strncmp(tensor, prefix, sizeof prefix - 1) != 0) return false;
    const beginning *b = beginning_of(tensor);
    const char *rest = tensor + sizeof prefix - 1 + strlen(b->own);
    return (size_t)snprintf(out, bytes, "%s%s", b->plain, rest) < bytes;
}

const char *choir_adapter_own_name(const char *tensor, const char *plain,
                                   char out[CHOIR_ADAPTER_MAX_OWN_NAME])
{
    const beginning *b = beginning_of(tensor);
    snprintf(out, CHOIR_ADAPTER_MAX_OWN_NAME, "%s%s", b->own, plain + strlen(b->plain));
    return out;
}

static const struct {
    const char *type;
    choir_status (*read)(choir_adapter_reader *reader);
} kinds[] = {
    {"LORA", choir_adapter_read_lora},
    {"IA3", choir_adapter_read_ia3},
    {"VERA", choir_adapter_read_vera},
    {"PROMPT_TUNING", choir_adapter_read_prompt},
    {"P_TUNING", choir_adapter_read_prompt},
    {"PREFIX_TUNING", choir_adapter_read_prefix},
    {"BOTTLENECK", choir_adapter_read_bottleneck},
};

choir_status choir_adapter_read_peft(choir_adapter_reader *r)
{
    const char *type = choir_adapter_string(r, "peft_type", "");
    char known[200];
    size_t n = 0;
    CHOIR_TRY(choir_adapter_make_places(r, false));
    if (*type == '\0' && json_is_object(choir_adapter_get(r, "config")))
        return choir_adapter_read_hub(r);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(kinds[i].type, type) == 0) return kinds[i].read(r);
        n +=
            (size_t)snprintf(known + n, sizeof known - n, "%s%s", i > 0 ? ", " : "", kinds[i].type);
    }
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "%s: peft_type of adapter_config.json is \"%.40s\"; Choir reads %s", r->name,
                      type, known);
}
