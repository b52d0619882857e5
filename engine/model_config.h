/* WHAT    Reading a model's configuration into choir_model_config; internal to engine/.
 * OWNS    Nothing.
 * THREADS The one that opens the file.
 * ERRORS  CHOIR_E_FORMAT and CHOIR_E_UNIMPLEMENTED name the file, the key and the value.
 * LIMITS  choir_config_check bounds every number, whatever the source.
 * NEXT    hf_config.c and gguf_config.c read; model_config.c has what they share. */
#pragma once
#include "engine/families/families.h"
#include "engine/gguf.h"
#include "engine/texts.h"

/* config.json (old and transformers-5 spelling) and generation_config.json. */
choir_status choir_config_read_hf(const choir_texts *texts, choir_model_config *out) CHOIR_MUST_USE;
choir_status choir_config_read_gguf(const char *path, const choir_gguf *gguf,
                                    choir_model_config *out) CHOIR_MUST_USE;

/* The keys that mean the same in every family; ended by {0}. */
extern const choir_key choir_common_keys[];
/* The family's properties, and the defaults of what it leaves at 0. */
void choir_config_begin(const choir_family *family, choir_model_config *out);
/* Sets a key's property; the value is checked to be of the key's kind. */
void choir_config_set(choir_model_config *config, const choir_key *key, double value);
/* What a COUNT is now. */
uint32_t choir_config_count(const choir_model_config *config, const choir_key *key);
/* Once all keys are read: what follows from them. `gguf`: the kind of file. */
void choir_config_settle(choir_model_config *config, bool gguf);
/* Ranges and divisibility, whatever the source. */
choir_status choir_config_check(const char *path, const choir_model_config *config) CHOIR_MUST_USE;
/* YaRN's factor on cos and sin, 0.1 m ln(factor) + 1 (Peng et al. 2023, equation 22; DeepSeek's mscale m). */
float choir_yarn_mscale(float factor, float m);
/* An id that the vocabulary lacks is none. */
void choir_config_set_id(const choir_model_config *config, int64_t id, int32_t *out);
/* Puts an id on the list of end tokens, once. */
void choir_config_add_eos(choir_model_config *config, int64_t id);
