/* WHAT    The small texts of a Hugging Face model by name (config.json, tokenizer.json, …), whether they lie
 *         in its folder or in a pack.
 * OWNS    Nothing: the folder's name and the pack are lent.
 * THREADS Any.
 * ERRORS  CHOIR_E_NOT_FOUND, CHOIR_E_INVALID (larger than the limit), CHOIR_E_IO.
 * NEXT    engine/pack_file.h */
#pragma once
#include "base/base.h"

typedef struct choir_pack choir_pack;
typedef struct choir_texts {
    const char *path;       /* of the folder, or of the pack; for sentences too */
    const choir_pack *pack; /* NULL: a folder */
} choir_texts;

/* "FOLDER/config.json", for sentences. */
void choir_texts_path(const choir_texts *texts, const char *name, char *path, size_t bytes);
bool choir_texts_have(const choir_texts *texts, const char *name);
/* As choir_file_read(): choir_free() it. */
choir_status choir_texts_read(const choir_texts *texts, const char *name, size_t max_bytes,
                              char **out, size_t *out_bytes) CHOIR_MUST_USE;
