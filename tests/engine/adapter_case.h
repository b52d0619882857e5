/* What the tests of reading adapters share: a base's configuration, an adapter read or refused.
 * Every adapter is read whole and by its header alone: both must say the same. */
#pragma once
#include "tests/support/adapter_image.h"

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LAYERS "base_model.model.model.layers."
#define LORA   "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6}"

/* The models whose configurations were asked for stay open to the end. */
static struct {
    char name[64];
    choir_model_file *file;
} bases[16];

static const choir_model_config *base_of(const char *name)
{
    char path[128];
    size_t i = 0;
    for (; bases[i].file != NULL; i++) {
        assert_true(i + 1 < sizeof bases / sizeof *bases);
        if (strcmp(bases[i].name, name) == 0) return choir_model_file_config(bases[i].file);
    }
    snprintf(path, sizeof path, "tests/fixtures/models/%s", name);
    if (choir_model_file_open(path, &bases[i].file) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    snprintf(bases[i].name, sizeof bases[i].name, "%s", name);
    return choir_model_file_config(bases[i].file);
}

static void close_bases(void)
{
    for (size_t i = 0; bases[i].file != NULL; i++) {
        choir_model_file_close(bases[i].file);
        bases[i].file = NULL;
    }
}

static choir_adapter_source source_of(const char *config, const adapter_image *image)
{
    return (choir_adapter_source){.name = "here",
                                  .config = config,
                                  .config_bytes = config == NULL ? 0 : strlen(config),
                                  .tensors = image->bytes,
                                  .tensor_bytes = image->n_bytes};
}

static choir_status check_header(const choir_model_config *base, const char *config,
                                 const adapter_image *image, choir_adapter_data **out)
{
    /* A copy of the header alone, so that a sanitizer sees who reads on. */
    uint8_t *header = malloc(image->header_bytes);
    assert_non_null(header);
    memcpy(header, image->bytes, image->header_bytes);
    choir_adapter_source s = source_of(config, image);
    s.tensors = header;
    s.tensor_bytes = image->header_bytes;
    choir_status status = choir_adapter_data_check(base, &s, image->n_bytes, out);
    free(header);
    return status;
}

static void same_but_for_arrays(const choir_adapter_data *whole, const choir_adapter_data *header)
{
    assert_int_equal(whole->n_changes, header->n_changes);
    assert_int_equal(whole->n_virtual, header->n_virtual);
    assert_int_equal(whole->max_rank, header->max_rank);
    assert_int_equal(whole->n_parameters, header->n_parameters);
    assert_string_equal(whole->kind, header->kind);
    assert_int_equal(header->digest, 0);
    assert_null(header->virtual_embeddings);
    assert_null(header->virtual_keys);
    for (size_t i = 0; i < whole->n_changes; i++) {
        const choir_adapter_change *w = &whole->changes[i], *h = &header->changes[i];
        assert_true(w->role == h->role && w->layer == h->layer && w->index == h->index);
        assert_true(w->rows == h->rows && w->cols == h->cols && w->rank == h->rank);
        assert_true(w->act == h->act && w->series == h->series && w->residual == h->residual &&
                    w->has == h->has);
        const float *arrays[] = {h->a,         h->b,        h->a_bias, h->b_bias, h->magnitude,
                                 h->out_scale, h->in_scale, h->weight, h->bias};
        for (size_t k = 0; k < sizeof arrays / sizeof *arrays; k++) assert_null(arrays[k]);
        const struct {
            uint32_t bit;
            const float *array;
        } has[] = {{CHOIR_ADAPTER_HAS_LOW_RANK, w->a},
                   {CHOIR_ADAPTER_HAS_LOW_RANK, w->b},
                   {CHOIR_ADAPTER_HAS_A_BIAS, w->a_bias},
                   {CHOIR_ADAPTER_HAS_B_BIAS, w->b_bias},
                   {CHOIR_ADAPTER_HAS_MAGNITUDE, w->magnitude},
                   {CHOIR_ADAPTER_HAS_OUT_SCALE, w->out_scale},
                   {CHOIR_ADAPTER_HAS_IN_SCALE, w->in_scale},
                   {CHOIR_ADAPTER_HAS_WEIGHT, w->weight},
                   {CHOIR_ADAPTER_HAS_BIAS, w->bias}};
        for (size_t k = 0; k < sizeof has / sizeof *has; k++)
            assert_int_equal((w->has & has[k].bit) != 0, has[k].array != NULL);
    }
}

/* Reads what must be readable. `config` NULL: a GGUF file; else safetensors are made of the
 * tensors. */
static choir_adapter_data *reads(const char *base, const char *config, adapter_image *image)
{
    choir_adapter_data *whole, *header;
    if (config != NULL) image_safetensors(image);
    const choir_adapter_source s = source_of(config, image);
    if (choir_adapter_data_parse(base_of(base), &s, &whole) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    if (check_header(base_of(base), config, image, &header) != CHOIR_OK)
        fail_msg("%s", choir_error_message());
    same_but_for_arrays(whole, header);
    choir_adapter_data_free(header);
    return whole;
}

static void says(choir_status status, choir_status expected, const char *word)
{
    const char *sentence = choir_error_message();
    if (status != expected || strstr(sentence, word) == NULL || strstr(sentence, "here") == NULL)
        fail_msg("status %d for %d: '%s' does not say '%s'", status, expected, sentence, word);
}

/* An adapter whose header tells that it cannot be had. */
static void refuses(const char *base, const char *config, adapter_image *image,
                    choir_status expected, const char *word)
{
    choir_adapter_data *data;
    if (config != NULL) image_safetensors(image);
    const choir_adapter_source s = source_of(config, image);
    says(choir_adapter_data_parse(base_of(base), &s, &data), expected, word);
    says(check_header(base_of(base), config, image, &data), expected, word);
}

static const choir_adapter_change *find_change(const choir_adapter_data *data, choir_role role,
                                               uint32_t layer, uint32_t index)
{
    for (size_t i = 0; i < data->n_changes; i++) {
        const choir_adapter_change *c = &data->changes[i];
        if (c->role == role && c->layer == layer && c->index == index) return c;
    }
    fail_msg("no change of %s in layer %u, %u", choir_role_text(role), layer, index);
    return NULL;
}

/* "NAME.lora_A.weight" [rank, in] and "NAME.lora_B.weight" [out, rank]. */
static void add_lora(adapter_image *image, const char *name, uint64_t rank, uint64_t in,
                     uint64_t out)
{
    char text[256];
    snprintf(text, sizeof text, "%s.lora_A.weight", name);
    image_add(image, text, rank, in, 0);
    snprintf(text, sizeof text, "%s.lora_B.weight", name);
    image_add(image, text, out, rank, 0);
}

static inline void same_numbers(const float *values, size_t n, size_t number, size_t first)
{
    for (size_t i = 0; i < n; i++)
        if (values[i] != image_value(number, first + i))
            fail_msg("element %zu of tensor %zu is %g, not %g", first + i, number,
                     (double)values[i], (double)image_value(number, first + i));
}

/* The row of an order of halves that lies at row r in an order of pairs, heads of `dim`. */
static inline uint32_t half_of(uint32_t r, uint32_t dim)
{
    uint32_t in = r % dim;
    return r - in + (in % 2 == 0 ? in / 2 : dim / 2 + in / 2);
}
