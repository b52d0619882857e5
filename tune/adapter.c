#include "tune/adapter.h"

#include "base/base.h"
#include "engine/safetensors.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

enum { MAX_RANK = 1024, MAX_CONFIG_BYTES = 1 << 20, MAX_PATH_BYTES = 4096 };

static const char *const part_names[CHOIR_TUNE_N_PARTS] = {"gate_proj", "up_proj", "down_proj"};

typedef struct reader {
    const char *folder;
    const choir_model_config *base;
    json_t *config;
    choir_safetensors *file;
    choir_tune_adapter *adapter;
} reader;

/* What changes an adapter's meaning in ways that a merge into W does not know. */
static const char *const must_be_off[] = {
    "use_dora",      "lora_bias",         "fan_in_fan_out",          "modules_to_save",
    "use_qalora",    "use_bdlora",        "layer_replication",       "target_parameters",
    "arrow_config",  "monteclora_config", "alora_invocation_tokens", "trainable_token_indices",
    "velora_config",
};

static bool is_off(const json_t *value)
{
    return value == NULL || json_is_null(value) || json_is_false(value) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0);
}

/* PiSSA, OLoRA and their like subtract from W what they start A and B with. */
static bool keeps_base(const json_t *init)
{
    static const char *const keeping[] = {"gaussian", "orthogonal", "eva", "mica"};
    const char *name = json_string_value(init);
    bool keeps = name == NULL;
    for (size_t i = 0; !keeps && i < sizeof keeping / sizeof *keeping; i++)
        keeps = strcasecmp(name, keeping[i]) == 0;
    return keeps;
}

static choir_status check_config(const reader *r)
{
    const char *type = json_string_value(json_object_get(r->config, "peft_type"));
    if (type == NULL || strcmp(type, "LORA") != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: peft_type is \"%.40s\"; Choir merges LORA",
                          r->folder, type == NULL ? "" : type);
    const char *bias = json_string_value(json_object_get(r->config, "bias"));
    if (bias != NULL && strcmp(bias, "none") != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: bias is \"%.40s\"; Choir merges \"none\"",
                          r->folder, bias);
    if (!keeps_base(json_object_get(r->config, "init_lora_weights")))
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: init_lora_weights is \"%.40s\", which trains beside changed weights "
                          "of the base; save "
                          "the adapter with PEFT's path_initial_model_for_weight_conversion",
                          r->folder,
                          json_string_value(json_object_get(r->config, "init_lora_weights")));
    for (size_t i = 0; i < sizeof must_be_off / sizeof *must_be_off; i++)
        if (!is_off(json_object_get(r->config, must_be_off[i])))
            return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: %s is set, which cannot be merged",
                              r->folder, must_be_off[i]);
    return CHOIR_OK;
}

/* rank_pattern and alpha_pattern: a key fits a module whose name it is, or ends with after a dot.
 * PEFT reads keys as regular expressions; plain names are what its users write. */
static bool pattern_fits(const char *key, const char *module)
{
    size_t n = strlen(key), m = strlen(module);
    if (n == 0 || n > m || strcmp(module + m - n, key) != 0) return false;
    return n == m || module[m - n - 1] == '.';
}

static choir_status number_for(const reader *r, const char *pattern_name, const char *field,
                               const char *module, double *out)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.";
    const json_t *value = json_object_get(r->config, field);
    json_t *patterns = json_object_get(r->config, pattern_name);
    const char *key;
    json_t *candidate;
    bool found = false;
    json_object_foreach(patterns, key, candidate)
    {
        if (key[strspn(key, plain)] != '\0')
            return choir_fail(CHOIR_E_UNIMPLEMENTED,
                              "%s: the key \"%.100s\" of %s is a regular expression; Choir reads "
                              "plain names",
                              r->folder, key, pattern_name);
        if (found || !pattern_fits(key, module)) continue;
        value = candidate;
        found = true;
    }
    if (!json_is_number(value))
        return choir_fail(CHOIR_E_FORMAT, "%s: adapter_config.json has no number for %s", r->folder,
                          field);
    *out = json_number_value(value);
    return CHOIR_OK;
}

static choir_status read_matrix(const reader *r, const choir_safetensor *t, uint32_t rows,
                                uint32_t cols, float **out)
{
    if (!t->readable)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: tensor '%s' has type %.20s; Choir reads F32, F16 and BF16",
                          r->folder, t->name, t->type);
    if (t->n_dims != 2 || t->dims[0] != rows || t->dims[1] != cols)
        return choir_fail(CHOIR_E_INVALID,
                          "%s: tensor '%s' is [%" PRIu64 ", %" PRIu64
                          "] of %u dimensions, the base "
                          "model wants [%u, %u]",
                          r->folder, t->name, t->n_dims > 0 ? t->dims[0] : 0,
                          t->n_dims > 1 ? t->dims[1] : 0, t->n_dims, rows, cols);
    *out = choir_alloc(CHOIR_MEM_TUNE, (size_t)rows * cols * sizeof **out);
    if (*out == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for '%s'", r->folder, t->name);
    const choir_tensor view = {t->dtype, rows, cols, t->data, t->bytes};
    for (uint32_t i = 0; i < rows; i++) choir_tensor_row(&view, i, *out + (size_t)i * cols);
    for (size_t i = 0; i < (size_t)rows * cols; i++)
        if (!isfinite((*out)[i]))
            return choir_fail(CHOIR_E_DATA_LOSS, "%s: tensor '%s' holds NaN or infinity", r->folder,
                              t->name);
    return CHOIR_OK;
}

/* A tensor's name taken apart; the prefix is what PEFT puts before the model's own names. */
typedef struct place {
    uint32_t layer, part;
    bool is_b;
} place;

static bool parse_name(const char *name, uint32_t n_layers, place *out)
{
    static const char prefix[] = "base_model.model.model.layers.";
    if (strncmp(name, prefix, sizeof prefix - 1) != 0) return false;
    char part[16], letter, end;
    unsigned layer;
    int n = sscanf(name + sizeof prefix - 1, "%5u.mlp.%15[a-z_].lora_%c.weigh%c", &layer, part,
                   &letter, &end);
    if (n != 4 || layer >= n_layers || (letter != 'A' && letter != 'B')) return false;
    for (uint32_t p = 0; p < CHOIR_TUNE_N_PARTS; p++) {
        char exact[128];
        snprintf(exact, sizeof exact, "%s%u.mlp.%s.lora_%c.weight", prefix, layer, part_names[p],
                 letter);
        if (strcmp(exact, name) != 0) continue;
        *out = (place){layer, p, letter == 'B'};
        return true;
    }
    return false;
}

static choir_status refuse_tensor(const reader *r, const char *name)
{
    if (strstr(name, "lora_magnitude_vector") != NULL)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: tensor '%.200s' belongs to DoRA, which Choir does not merge",
                          r->folder, name);
    return choir_fail(
        CHOIR_E_INVALID,
        "%s: tensor '%.200s' is none of gate_proj, up_proj and down_proj of the base's "
        "%u layers, which is all that an expert can take over",
        r->folder, name, r->base->n_layers);
}

static choir_status read_lora(const reader *r, const choir_safetensor *a, place where)
{
    char name[160], module[96];
    snprintf(name, sizeof name, "base_model.model.model.layers.%u.mlp.%s.lora_B.weight",
             where.layer, part_names[where.part]);
    snprintf(module, sizeof module, "model.layers.%u.mlp.%s", where.layer, part_names[where.part]);
    const choir_safetensor *b = choir_safetensors_find(r->file, name);
    if (b == NULL)
        return choir_fail(CHOIR_E_INVALID, "%s: tensor '%s' is missing", r->folder, name);
    double rank, alpha;
    CHOIR_TRY(number_for(r, "rank_pattern", "r", module, &rank));
    CHOIR_TRY(number_for(r, "alpha_pattern", "lora_alpha", module, &alpha));
    if (!(rank >= 1 && rank <= MAX_RANK) || rank != floor(rank))
        return choir_fail(CHOIR_E_INVALID, "%s: r is %g for %s, must be 1 to %d", r->folder, rank,
                          module, MAX_RANK);
    if (!isfinite((float)alpha))
        return choir_fail(CHOIR_E_INVALID, "%s: lora_alpha is %g for %s", r->folder, alpha, module);
    bool down = where.part == CHOIR_TUNE_DOWN;
    bool rslora = json_is_true(json_object_get(r->config, "use_rslora"));
    choir_tune_lora *l = &r->adapter->loras[(size_t)where.layer * CHOIR_TUNE_N_PARTS + where.part];
    l->rank = (uint32_t)rank;
    l->scale = (float)(alpha / (rslora ? sqrt(rank) : rank));
    uint32_t in = down ? r->base->ffn_hidden : r->base->hidden;
    uint32_t out = down ? r->base->hidden : r->base->ffn_hidden;
    CHOIR_TRY(read_matrix(r, a, l->rank, in, &l->a));
    return read_matrix(r, b, out, l->rank, &l->b);
}

static choir_status read_tensors(const reader *r)
{
    size_t n = choir_safetensors_count(r->file), n_read = 0;
    for (size_t i = 0; i < n; i++) {
        const choir_safetensor *t = choir_safetensors_at(r->file, i);
        place where;
        if (!parse_name(t->name, r->base->n_layers, &where)) return refuse_tensor(r, t->name);
        if (!where.is_b) {
            CHOIR_TRY(read_lora(r, t, where));
            n_read++;
        }
    }
    if (n_read == 0 || n != 2 * n_read)
        return choir_fail(CHOIR_E_INVALID,
                          "%s: %zu tensors, of which %zu are lora_A; each wants its "
                          "lora_B",
                          r->folder, n, n_read);
    return CHOIR_OK;
}

static choir_status read_config(reader *r, const char *path)
{
    char *text = NULL;
    size_t bytes;
    json_error_t error;
    CHOIR_TRY(choir_file_read(path, MAX_CONFIG_BYTES, &text, &bytes));
    r->config = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    choir_free(text);
    if (!json_is_object(r->config))
        return choir_fail(CHOIR_E_FORMAT, "%s: line %d: %s", path, error.line,
                          r->config == NULL ? error.text : "no object");
    return check_config(r);
}

choir_status choir_tune_adapter_open(const char *folder, const choir_model_config *base,
                                     choir_tune_adapter *out)
{
    char path[MAX_PATH_BYTES];
    reader r = {.folder = folder, .base = base, .adapter = out};
    *out = (choir_tune_adapter){.n_layers = base->n_layers};
    if (strlen(folder) > sizeof path - 64)
        return choir_fail(CHOIR_E_INVALID, "a folder's name of %zu bytes, the limit is %zu",
                          strlen(folder), sizeof path - 64);
    choir_status status;
    snprintf(path, sizeof path, "%s/adapter_config.json", folder);
    CHOIR_TRY_TO(done, status, read_config(&r, path));
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    CHOIR_TRY_TO(done, status, choir_safetensors_open(path, &r.file));
    out->loras = choir_calloc(CHOIR_MEM_TUNE, (size_t)base->n_layers * CHOIR_TUNE_N_PARTS,
                              sizeof *out->loras);
    if (out->loras == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for the adapter", folder);
        goto done;
    }
    status = read_tensors(&r);
done:
    choir_safetensors_close(r.file);
    json_decref(r.config);
    if (status != CHOIR_OK) choir_tune_adapter_close(out);
    return status;
}

void choir_tune_adapter_close(choir_tune_adapter *adapter)
{
    if (adapter->loras != NULL)
        for (size_t i = 0; i < (size_t)adapter->n_layers * CHOIR_TUNE_N_PARTS; i++) {
            choir_free(adapter->loras[i].a);
            choir_free(adapter->loras[i].b);
        }
    choir_free(adapter->loras);
    *adapter = (choir_tune_adapter){0};
}

void choir_tune_lora_add(const choir_tune_lora *lora, uint32_t index, uint32_t cols, float *row)
{
    for (uint32_t k = 0; k < lora->rank; k++) {
        float factor = lora->scale * lora->b[(size_t)index * lora->rank + k];
        const float *a = lora->a + (size_t)k * cols;
        for (uint32_t i = 0; i < cols; i++) row[i] += factor * a[i];
    }
}
