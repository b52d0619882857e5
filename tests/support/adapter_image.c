#include "tests/support/adapter_image.h"

#include "tests/support/gguf_image.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 32, MAX_HEADER = 1 << 16 };

float image_value(size_t number, size_t i)
{
    return (float)(number + 1) + (float)(i % 997) / 1024 + (float)(i / 997) / 64;
}

image_tensor *image_add(adapter_image *image, const char *name, uint64_t d0, uint64_t d1,
                        uint64_t d2)
{
    CHOIR_ASSERT(image->n_tensors < IMAGE_MAX_TENSORS);
    size_t number = image->n_tensors++;
    image_tensor *t = &image->tensors[number];
    *t = (image_tensor){.dims = {d0, d1, d2}, .n_dims = d2 > 0 ? 3 : d1 > 0 ? 2 : 1, .n = 1};
    snprintf(t->name, sizeof t->name, "%s", name);
    for (uint32_t d = 0; d < t->n_dims; d++) t->n *= t->dims[d];
    t->values = malloc((t->n + 1) * sizeof *t->values);
    CHOIR_ASSERT(t->values != NULL);
    for (size_t i = 0; i < t->n; i++) t->values[i] = image_value(number, i);
    return t;
}

void image_safetensors(adapter_image *image)
{
    char *header = malloc(MAX_HEADER);
    size_t n = 0, at = 0;
    CHOIR_ASSERT(header != NULL);
    n += (size_t)snprintf(header, MAX_HEADER, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = 0; i < image->n_tensors; i++) {
        const image_tensor *t = &image->tensors[i];
        n += (size_t)snprintf(header + n, MAX_HEADER - n, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[",
                              t->name);
        for (uint32_t d = 0; d < t->n_dims; d++)
            n += (size_t)snprintf(header + n, MAX_HEADER - n, "%s%" PRIu64, d > 0 ? "," : "",
                                  t->dims[d]);
        n += (size_t)snprintf(header + n, MAX_HEADER - n, "],\"data_offsets\":[%zu,%zu]}", at,
                              at + 4 * t->n);
        at += 4 * t->n;
    }
    header[n++] = '}';
    CHOIR_ASSERT(n < MAX_HEADER);
    free(image->bytes);
    image->header_bytes = 8 + n;
    image->n_bytes = image->header_bytes + at;
    image->bytes = malloc(image->n_bytes);
    CHOIR_ASSERT(image->bytes != NULL);
    uint64_t length = n;
    memcpy(image->bytes, &length, 8);
    memcpy(image->bytes + 8, header, n);
    free(header);
    uint8_t *to = image->bytes + image->header_bytes;
    for (size_t i = 0; i < image->n_tensors; to += 4 * image->tensors[i++].n)
        memcpy(to, image->tensors[i].values, 4 * image->tensors[i].n);
}

static void put_string(gguf_image *g, const char *key, const char *value)
{
    gguf_put_key(g, key, GGUF_STRING);
    gguf_put_text(g, (choir_text){value, strlen(value)});
}

static void pad(gguf_image *g)
{
    static const uint8_t zeros[ALIGNMENT];
    gguf_put(g, zeros, (ALIGNMENT - g->n % ALIGNMENT) % ALIGNMENT);
}

void image_gguf(adapter_image *image, const char *architecture, float alpha)
{
    gguf_image g = {0};
    const uint64_t n_tensors = image->n_tensors;
    uint64_t at = 0;
    gguf_image_begin(&g);
    put_string(&g, "general.architecture", architecture);
    put_string(&g, "general.type", "adapter");
    put_string(&g, "adapter.type", "lora");
    if (alpha != 0) {
        gguf_put_key(&g, "adapter.lora.alpha", GGUF_F32);
        gguf_put(&g, &alpha, sizeof alpha);
    }
    gguf_image_end(&g);
    memcpy(g.bytes + 8, &n_tensors, 8);
    for (size_t i = 0; i < n_tensors; i++) {
        const image_tensor *t = &image->tensors[i];
        const uint32_t f32 = 0;
        gguf_put_text(&g, (choir_text){t->name, strlen(t->name)});
        gguf_put(&g, &t->n_dims, 4);
        for (uint32_t d = t->n_dims; d > 0; d--) gguf_put(&g, &t->dims[d - 1], 8);
        gguf_put(&g, &f32, 4);
        gguf_put(&g, &at, 8);
        at += choir_round_up(4 * t->n, ALIGNMENT);
    }
    image->header_bytes = g.n;
    for (size_t i = 0; i < n_tensors; i++) {
        pad(&g);
        gguf_put(&g, image->tensors[i].values, 4 * image->tensors[i].n);
    }
    pad(&g);
    free(image->bytes);
    image->bytes = g.bytes;
    image->n_bytes = g.n;
}

void image_free(adapter_image *image)
{
    for (size_t i = 0; i < image->n_tensors; i++) free(image->tensors[i].values);
    free(image->bytes);
    *image = (adapter_image){0};
}
