/* How a model wants to be sampled: its generation_config.json, or GGUF's general.sampling keys. */
#include "engine/engine.h"
#include "engine/model_config.h"

#include <math.h>
#include <string.h>

choir_sampling choir_sampling_of_model(const choir_model_config *c)
{
    choir_sampling s = CHOIR_SAMPLING_DEFAULT;
    if (c->temperature >= 0) s.temperature = c->temperature;
    if (c->top_p > 0) s.top_p = c->top_p;
    if (c->top_k > 0) s.top_k = (uint32_t)c->top_k;
    if (c->repetition_penalty > 0) s.repetition_penalty = c->repetition_penalty;
    return s;
}

static choir_status take(choir_model_config *c, const char *key, const json_t *value)
{
    double x = json_number_value(value);
    if (!json_is_number(value) || !isfinite((float)x) || x < 0)
        return choir_fail(CHOIR_E_INVALID, "'%s' is no number of 0 or more", key);
    if (strcmp(key, "temperature") == 0)
        c->temperature = (float)x;
    else if (strcmp(key, "top_p") == 0)
        c->top_p = (float)x;
    else if (strcmp(key, "repetition_penalty") == 0)
        c->repetition_penalty = (float)x;
    else if (strcmp(key, "top_k") == 0 && json_is_integer(value) && x <= INT32_MAX)
        c->top_k = (int32_t)x;
    else
        return choir_fail(CHOIR_E_INVALID,
                          "'%.60s' is none of temperature, top_p, top_k (a whole number) and "
                          "repetition_penalty",
                          key);
    return CHOIR_OK;
}

choir_status choir_generation_override(choir_model_config *config, const char *json)
{
    json_error_t error;
    json_t *root = json_loads(json, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(root)) {
        json_decref(root);
        return choir_fail(CHOIR_E_INVALID, "the generation config is no JSON object: %s",
                          root == NULL ? error.text : "another value");
    }
    choir_status status = CHOIR_OK;
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value) if (status == CHOIR_OK) status = take(config, key, value);
    json_decref(root);
    if (status != CHOIR_OK) return status;
    const choir_sampling sampling = choir_sampling_of_model(config);
    return choir_sampling_check(&sampling, config->vocab);
}
