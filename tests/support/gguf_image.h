/* WHAT    Writes a GGUF file without tensors in memory: the metadata of a tokenizer, as tests
 *         want it.
 * OWNS    The image's bytes, until free.
 * THREADS One owner.
 * ERRORS  Lack of memory stops the process.
 * LIMITS  Little-endian machines; keys come one by one, elements of an array right behind it.
 * NEXT    engine/gguf.h, which reads it */
#pragma once
#include "engine/gguf.h"

enum { GGUF_U32 = 4, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY };

typedef struct gguf_image {
    uint8_t *bytes;
    size_t n, capacity;
    uint64_t n_keys;
} gguf_image;

void gguf_image_begin(gguf_image *image); /* from a zeroed struct, or one to be written anew */
void gguf_image_end(gguf_image *image);
void gguf_image_free(gguf_image *image);

void gguf_put(gguf_image *image, const void *data, size_t bytes);
void gguf_put_text(gguf_image *image, choir_text text);
void gguf_put_key(gguf_image *image, const char *key, uint32_t type);
void gguf_put_array(gguf_image *image, const char *key, uint32_t type, uint64_t n);
void gguf_put_flag(gguf_image *image, const char *key, bool value);
void gguf_put_u32(gguf_image *image, const char *key, uint32_t value);
