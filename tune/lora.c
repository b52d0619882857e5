#include "tune/lora.h"

#include "base/base.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_CONFIG_BYTES = 1 << 20, MAX_RANK = 1024 };

static const char *const part_names[MLP_PARTS] = {"gate_proj", "up_proj", "down_proj"};

static uint32_t part_rows(const choir_model_config *c, mlp_part part)
{
    return part == MLP_DOWN ? c->hidden : c->ffn_hidden;
}

static uint32_t part_cols(const choir_model_config *c, mlp_part part)
{
    return part == MLP_DOWN ? c->ffn_hidden : c->hidden;
}

/* A feature of PEFT that changes the arithmetic must be off. */
static choir_status must_be_off(const char *path, const json_t *root, const char *key)
{
    const json_t *value = json_object_get(root, key);
    bool empty = json_is_object(value) && json_object_size(value) == 0;
    if (value == NULL || json_is_null(value) || json_is_false(value) || empty) return CHOIR_OK;
    if (json_is_string(value) && strcmp(json_string_value(value), "none") == 0) return CHOIR_OK;
    return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: '%s' is set, which upcycle cannot merge", path, key);
}

static choir_status read_config(const char *folder, float *scale)
{
    char path[4096], *text;
    size_t bytes;
    json_error_t error;
    static const char *const off[] = {"use_dora",      "bias",           "modules_to_save",
                                      "rank_pattern",  "alpha_pattern",  "fan_in_fan_out",
                                      "layers_to_transform", "lora_bias", "target_parameters"};
    snprintf(path, sizeof path, "%.3500s/adapter_config.json", folder);
    CHOIR_TRY(choir_file_read(path, MAX_CONFIG_BYTES, &text, &bytes));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    choir_free(text);
    if (root == NULL)
        return choir_fail(CHOIR_E_FORMAT, "%s: bad JSON in line %d: %s", path, error.line, error.text);
    choir_status status = CHOIR_OK;
    const json_t *type = json_object_get(root, "peft_type"), *r = json_object_get(root, "r");
    const json_t *alpha = json_object_get(root, "lora_alpha");
    if (!json_is_string(type) || strcmp(json_string_value(type), "LORA") != 0)
        status = choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: 'peft_type' must be LORA", path);
    else if (!json_is_integer(r) || json_integer_value(r) < 1 || json_integer_value(r) > MAX_RANK ||
             !json_is_number(alpha) || !isfinite(json_number_value(alpha)))
        status = choir_fail(CHOIR_E_FORMAT, "%s: 'r' must be 1 to %d and 'lora_alpha' a number", path,
                            MAX_RANK);
    for (size_t i = 0; i < sizeof off / sizeof *off && status == CHOIR_OK; i++)
        status = must_be_off(path, root, off[i]);
    if (status == CHOIR_OK) {
        double rank = (double)json_integer_value(r);
        bool rs = json_is_true(json_object_get(root, "use_rslora"));
        *scale = (float)(json_number_value(alpha) / (rs ? sqrt(rank) : rank));
    }
    json_decref(root);
    return status;
}

static choir_status copy_values(const char *folder, const choir_safetensor *t, uint32_t rows,
                                uint32_t cols, float **out)
{
    if (!t->readable || t->n_dims != 2 || t->dims[0] != rows || t->dims[1] != cols)
        return choir_fail(CHOIR_E_PRECONDITION, "%s: tensor '%s' does not fit [%u, %u] of the base",
                          folder, t->name, rows, cols);
    *out = choir_alloc(CHOIR_MEM_TUNE, (size_t)rows * cols * sizeof **out);
    if (*out == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", folder);
    const choir_tensor view = {t->dtype, rows, cols, t->data, t->bytes};
    for (uint32_t r = 0; r < rows; r++) {
        choir_tensor_row(&view, r, *out + (size_t)r * cols);
        for (uint32_t k = 0; k < cols; k++)
            if (!isfinite((*out)[(size_t)r * cols + k]))
                return choir_fail(CHOIR_E_FORMAT, "%s: tensor '%s' holds NaN or Inf", folder, t->name);
    }
    return CHOIR_OK;
}

/* "base_model.model.model.layers.L.mlp.gate_proj.lora_A.weight" or a refusal by name. */
static choir_status place(const char *folder, const choir_model_config *c, lora *l,
                          const choir_safetensor *t)
{
    uint32_t layer;
    char part[32], side;
    int end = 0;
    if (sscanf(t->name, "base_model.model.model.layers.%u.mlp.%31[a-z_].lora_%c.weight%n", &layer, part,
               &side, &end) != 3 ||
        end == 0 || t->name[end] != '\0' || layer >= c->n_layers || (side != 'A' && side != 'B'))
        return choir_fail(CHOIR_E_PRECONDITION,
                          "%s: tensor '%s' has no place: upcycle merges LoRA on gate_proj, up_proj and "
                          "down_proj of the base's %u layers",
                          folder, t->name, c->n_layers);
    for (uint32_t p = 0; p < MLP_PARTS; p++) {
        if (strcmp(part, part_names[p]) != 0) continue;
        lora_pair *pair = &l->pairs[layer * MLP_PARTS + p];
        uint64_t rank = side == 'A' ? t->dims[0] : t->dims[1];
        if (t->n_dims != 2 || rank == 0 || rank > MAX_RANK || (pair->rank != 0 && pair->rank != rank))
            return choir_fail(CHOIR_E_PRECONDITION, "%s: tensor '%s' has an absurd rank", folder, t->name);
        pair->rank = (uint32_t)rank;
        pair->present = true;
        return side == 'A' ? copy_values(folder, t, pair->rank, part_cols(c, p), &pair->a)
                           : copy_values(folder, t, part_rows(c, p), pair->rank, &pair->b);
    }
    return choir_fail(CHOIR_E_PRECONDITION, "%s: tensor '%s' is not on the MLP", folder, t->name);
}

choir_status lora_open(const char *folder, const choir_model_config *c, lora *out)
{
    char path[4096];
    choir_safetensors *file = NULL;
    *out = (lora){.n_layers = c->n_layers};
    CHOIR_TRY(read_config(folder, &out->scale));
    snprintf(path, sizeof path, "%.3500s/adapter_model.safetensors", folder);
    CHOIR_TRY(choir_safetensors_open(path, &file));
    choir_status status = CHOIR_OK;
    out->pairs = choir_calloc(CHOIR_MEM_TUNE, (size_t)c->n_layers * MLP_PARTS, sizeof *out->pairs);
    if (out->pairs == NULL) status = choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", folder);
    for (size_t i = 0; status == CHOIR_OK && i < choir_safetensors_count(file); i++)
        status = place(folder, c, out, choir_safetensors_at(file, i));
    for (uint32_t i = 0; status == CHOIR_OK && i < c->n_layers * MLP_PARTS; i++)
        if (out->pairs[i].present && (out->pairs[i].a == NULL || out->pairs[i].b == NULL))
            status = choir_fail(CHOIR_E_FORMAT, "%s: layer %u, %s has only one of lora_A and lora_B",
                                folder, i / MLP_PARTS, part_names[i % MLP_PARTS]);
    choir_safetensors_close(file);
    if (status != CHOIR_OK) lora_close(out);
    return status;
}

void lora_close(lora *l)
{
    for (uint32_t i = 0; l->pairs != NULL && i < l->n_layers * MLP_PARTS; i++) {
        choir_free(l->pairs[i].a);
        choir_free(l->pairs[i].b);
    }
    choir_free(l->pairs);
    *l = (lora){0};
}

void lora_add_row(const lora *l, uint32_t layer, mlp_part part, uint32_t row_index, uint32_t cols,
                  float *row)
{
    const lora_pair *p = &l->pairs[layer * MLP_PARTS + part];
    if (!p->present) return;
    for (uint32_t r = 0; r < p->rank; r++) {
        float b = p->b[(size_t)row_index * p->rank + r] * l->scale;
        const float *a = p->a + (size_t)r * cols;
        for (uint32_t k = 0; k < cols; k++) row[k] += b * a[k];
    }
}
