/* Reading a model's configuration into choir_model_config; internal to engine/. */
#pragma once
#include "engine/families/families.h"
#include "engine/gguf.h"

/* config.json (old and transformers-5 spelling) and generation_config.json of a folder. */
choir_status choir_config_read_hf(const char *folder, choir_model_config *out) CHOIR_MUST_USE;
choir_status choir_config_read_gguf(const char *path, const choir_gguf *gguf,
                                    choir_model_config *out) CHOIR_MUST_USE;
/* Ranges and divisibility, whatever the source. */
choir_status choir_config_check(const char *path, const choir_model_config *config) CHOIR_MUST_USE;
/* An id that the vocabulary lacks is none. */
void choir_config_set_id(const choir_model_config *config, int64_t id, int32_t *out);
/* Puts an id on the list of end tokens, once. */
void choir_config_add_eos(choir_model_config *config, int64_t id);
