/* WHAT    The small files of a Hugging Face folder, each as JSON or text.
 * OWNS    Nothing.
 * THREADS One.
 * ERRORS  CHOIR_E_UNIMPLEMENTED names what tokenizer.json cannot say; CHOIR_E_NO_MEMORY,
 *         CHOIR_E_IO.
 * LIMITS  From GGUF: byte-level BPE of a few pre-tokenizers.
 * NEXT    tune/folder_out.c */
#pragma once
#include "tune/weights.h"
#include <jansson.h>

/* Sets a key of an object, or appends to an array, and takes `value`. Where memory lacked for the
 * value or its place the whole becomes NULL. */
void choir_tune_json_set(json_t **object, const char *key, json_t *value);
void choir_tune_json_append(json_t **array, json_t *value);
/* JSON with two spaces of indent as `folder`/`name`; takes the reference; NULL is a lack of memory.
 */
choir_status choir_tune_save_json(const char *folder, const char *name,
                                  json_t *json) CHOIR_MUST_USE;
choir_status choir_tune_save_text(const char *folder, const char *name, const char *text,
                                  size_t bytes) CHOIR_MUST_USE;
/* Copies a small file if it is there. */
choir_status choir_tune_copy_file(const char *from_folder, const char *from, const char *folder,
                                  const char *name) CHOIR_MUST_USE;
/* The beginning of a safetensors file called `name`: the header's length, the header padded with
 * spaces to 8 bytes. Takes the reference; NULL is a lack of memory. */
choir_status choir_tune_save_header(choir_save *save, const char *name, json_t *header,
                                    uint64_t *bytes) CHOIR_MUST_USE;

/* config.json, generation_config.json and the tokenizer's files. */
choir_status choir_tune_save_hf_files(const choir_tune_moe *moe, choir_dtype dtype,
                                      const char *folder) CHOIR_MUST_USE;
/* tokenizer.json and tokenizer_config.json from a GGUF file's metadata (tune/hf_tokenizer.c). */
choir_status choir_tune_save_tokenizer(const choir_gguf *gguf, uint32_t max_positions,
                                       const char *folder) CHOIR_MUST_USE;
