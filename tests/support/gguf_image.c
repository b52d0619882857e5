#include "tests/support/gguf_image.h"

#include "base/base.h"

#include <stdlib.h>
#include <string.h>

enum { AT_N_KEYS = 16, HEADER_BYTES = 24 };

void gguf_put(gguf_image *image, const void *data, size_t bytes)
{
    if (bytes > image->capacity - image->n) {
        image->capacity = 2 * image->capacity + bytes + HEADER_BYTES;
        image->bytes = realloc(image->bytes, image->capacity);
        CHOIR_ASSERT(image->bytes != NULL);
    }
    if (bytes > 0) memcpy(image->bytes + image->n, data, bytes);
    image->n += bytes;
}

void gguf_image_begin(gguf_image *image)
{
    static const uint8_t header[HEADER_BYTES] = "GGUF\3"; /* no tensors */
    image->n = image->n_keys = 0;
    gguf_put(image, header, sizeof header);
}

void gguf_image_end(gguf_image *image)
{
    memcpy(image->bytes + AT_N_KEYS, &image->n_keys, sizeof image->n_keys);
}

void gguf_image_free(gguf_image *image)
{
    free(image->bytes);
}

void gguf_put_text(gguf_image *image, choir_text text)
{
    const uint64_t bytes = text.bytes;
    gguf_put(image, &bytes, sizeof bytes);
    gguf_put(image, text.data, text.bytes);
}

void gguf_put_key(gguf_image *image, const char *key, uint32_t type)
{
    gguf_put_text(image, (choir_text){key, strlen(key)});
    gguf_put(image, &type, sizeof type);
    image->n_keys++;
}

void gguf_put_array(gguf_image *image, const char *key, uint32_t type, uint64_t n)
{
    gguf_put_key(image, key, GGUF_ARRAY);
    gguf_put(image, &type, sizeof type);
    gguf_put(image, &n, sizeof n);
}

void gguf_put_flag(gguf_image *image, const char *key, bool value)
{
    const uint8_t byte = value;
    gguf_put_key(image, key, GGUF_BOOL);
    gguf_put(image, &byte, 1);
}

void gguf_put_u32(gguf_image *image, const char *key, uint32_t value)
{
    gguf_put_key(image, key, GGUF_U32);
    gguf_put(image, &value, sizeof value);
}
