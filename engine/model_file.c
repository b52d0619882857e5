#include "engine/model_file.h"

#include "base/base.h"
#include "engine/model_config.h"
#include "engine/pack_file.h"
#include "engine/safetensors.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SHARDS = 1024, MAX_INDEX_BYTES = 64 << 20, MAX_TEMPLATE_BYTES = 1 << 20 };

typedef enum prefix { PREFIX_NONE, PREFIX_LANGUAGE_MODEL, PREFIX_INSIDE_MODEL } prefix;

struct choir_model_file {
    char *path;
    prefix prefix;
    bool
        *claimed; /* [tensors] has a place; NULL while the configuration is still being found out */
    choir_model_config config;
    choir_gguf *gguf;
    choir_pack *pack;
    choir_safetensors **shards;
    uint32_t n_shards;
    char *chat_template;
    char types[256];
    uint64_t bytes, n_parameters;
};

/* A tensor of either kind of file: dims slowest first. */
typedef struct found {
    bool readable;
    const char *type;
    choir_dtype dtype;
    uint32_t n_dims;
    uint64_t dims[8];
    const uint8_t *data;
    size_t bytes;
    uint64_t number; /* in the order of the files */
} found;

static uint64_t n_tensors(const choir_model_file *f)
{
    uint64_t n = f->gguf != NULL ? choir_gguf_n_tensors(f->gguf) : 0;
    for (uint32_t i = 0; i < f->n_shards; i++) n += choir_safetensors_count(f->shards[i]);
    return n;
}

/* A Hugging Face model that also sees has the text's tensors under another name; which, its
 * embedding tells. */
static void name_in_file(const choir_model_file *f, const char *name, char *out, size_t bytes)
{
    if (f->prefix == PREFIX_LANGUAGE_MODEL)
        snprintf(out, bytes, "language_model.%s", name);
    else if (f->prefix == PREFIX_INSIDE_MODEL && strncmp(name, "model.", 6) == 0)
        snprintf(out, bytes, "model.language_model.%s", name + 6);
    else
        snprintf(out, bytes, "%s", name);
}

static bool find_tensor(const choir_model_file *f, const char *plain, found *out)
{
    char name[300];
    name_in_file(f, plain, name, sizeof name);
    if (f->gguf != NULL) {
        const choir_gguf_tensor *t = choir_gguf_find_tensor(f->gguf, name);
        if (t == NULL) return false;
        *out = (found){true,     choir_dtype_text(t->dtype),
                       t->dtype, t->n_dims,
                       {0},      t->data,
                       t->bytes, (uint64_t)(t - choir_gguf_tensor_at(f->gguf, 0))};
        for (uint32_t d = 0; d < t->n_dims; d++) out->dims[d] = t->dims[t->n_dims - 1 - d];
        return true;
    }
    uint64_t before = 0;
    for (uint32_t i = 0; i < f->n_shards; before += choir_safetensors_count(f->shards[i++])) {
        const choir_safetensor *t = choir_safetensors_find(f->shards[i], name);
        if (t == NULL) continue;
        *out = (found){t->readable, t->type,
                       t->dtype,    t->n_dims,
                       {0},         t->data,
                       t->bytes,    before + (uint64_t)(t - choir_safetensors_at(f->shards[i], 0))};
        memcpy(out->dims, t->dims, sizeof out->dims);
        return true;
    }
    return false;
}

/* "blk.%l.ffn.%e" with the layer and the expert put in. */
static void expand(const char *pattern, uint32_t layer, uint32_t expert, char *name, size_t bytes)
{
    size_t n = 0;
    for (const char *p = pattern; *p != '\0' && n + 12 < bytes; p++) {
        if (p[0] == '%' && (p[1] == 'l' || p[1] == 'e')) {
            n += (size_t)snprintf(name + n, bytes - n, "%u", p[1] == 'l' ? layer : expert);
            p++;
        } else {
            name[n++] = *p;
        }
    }
    name[n] = '\0';
}

/* What a place holds before its part is taken: a matrix of outputs and inputs. */
typedef struct whole_tensor {
    uint64_t rows, cols;
    size_t row_stride, col_stride; /* col_stride 0: by blocks */
    const uint8_t *data, *scales;
    size_t scales_stride;
} whole_tensor;

static choir_status bad_shape(const choir_model_file *f, const char *name, const found *t,
                              uint64_t rows, uint64_t cols)
{
    char text[128] = "";
    for (uint32_t d = 0, n = 0; d < t->n_dims && n < sizeof text; d++)
        n += (uint32_t)snprintf(text + n, sizeof text - n, "%s%" PRIu64, d > 0 ? ", " : "",
                                t->dims[d]);
    return choir_fail(CHOIR_E_FORMAT,
                      "%s: tensor '%s' has shape [%s], the configuration wants [%" PRIu64
                      ", %" PRIu64 "]",
                      f->path, name, text, rows, cols);
}

/* The rows and columns that the whole tensor must have for its part to be [rows, cols]. */
static void whole_shape(const choir_model_config *c, choir_part part, bool vector, uint64_t *rows,
                        uint64_t *cols)
{
    uint64_t *n = vector ? cols : rows; /* a vector is cut along its elements */
    switch (part) {
    case CHOIR_PART_ALL:
        break;
    case CHOIR_PART_FIRST_HALF:
    case CHOIR_PART_SECOND_HALF:
    case CHOIR_PART_EVEN:
    case CHOIR_PART_ODD:
        *n *= 2;
        break;
    case CHOIR_PART_Q:
    case CHOIR_PART_K:
    case CHOIR_PART_V:
        *n = (c->n_heads + 2 * (uint64_t)c->n_kv_heads) * c->head_dim;
        break;
    case CHOIR_PART_HEAD_K:
    case CHOIR_PART_HEAD_V:
        *rows = c->n_heads * ((uint64_t)c->nope_dim + c->value_dim);
        *cols = c->kv_lora_rank;
        break;
    }
}

/* Narrows the source to a part; lengths were checked. */
static void take_part(const choir_model_config *c, choir_part part, uint32_t index, bool vector,
                      whole_tensor *s)
{
    uint64_t *n = vector ? &s->cols : &s->rows;
    size_t *stride = vector ? &s->col_stride : &s->row_stride;
    uint64_t q = (uint64_t)c->n_heads * c->head_dim, kv = (uint64_t)c->n_kv_heads * c->head_dim;
    uint64_t head = (uint64_t)c->nope_dim + c->value_dim, first = 0;
    switch (part) {
    case CHOIR_PART_ALL:
        return;
    case CHOIR_PART_FIRST_HALF:
        *n /= 2;
        break;
    case CHOIR_PART_SECOND_HALF:
        first = *n /= 2;
        break;
    case CHOIR_PART_EVEN:
    case CHOIR_PART_ODD:
        first = part == CHOIR_PART_ODD;
        *n /= 2;
        break;
    case CHOIR_PART_Q:
        *n = q;
        break;
    case CHOIR_PART_K:
        first = q;
        *n = kv;
        break;
    case CHOIR_PART_V:
        first = q + kv;
        *n = kv;
        break;
    case CHOIR_PART_HEAD_K:
        first = index * head;
        *n = c->nope_dim;
        break;
    case CHOIR_PART_HEAD_V:
        first = index * head + c->nope_dim;
        *n = c->value_dim;
        break;
    }
    s->data += first * *stride;
    if (s->scales != NULL) s->scales += first * s->scales_stride;
    if (part == CHOIR_PART_EVEN || part == CHOIR_PART_ODD) {
        *stride *= 2;
        s->scales_stride *= 2;
    }
}

/* The index-th of stacked matrices, or the only one; vectors may be stacked too, or have a
 * dimension of 1. */
static bool fits(const found *t, uint32_t count, uint64_t rows, uint64_t cols, bool *stacked)
{
    const uint64_t *d = t->dims;
    *stacked = false;
    if (t->n_dims == 2 && d[0] == rows && d[1] == cols) return true;
    if (t->n_dims == 1 && rows == 1 && d[0] == cols) return true;
    *stacked = true;
    if (t->n_dims == 3 && d[0] == count && d[1] == rows && d[2] == cols) return true;
    return t->n_dims == 2 && rows == 1 && d[0] == count && d[1] == cols;
}

/* Codes of MXFP4 in a tensor of bytes [experts, rows, blocks, 16], exponents in its twin. */
static bool split_mxfp4(const choir_model_file *f, const char *name, const found *t, uint32_t count,
                        uint32_t index, whole_tensor *s)
{
    char twin[300];
    found scales;
    size_t n = strlen(name), tail = strlen("_blocks");
    if (strcmp(t->type, "U8") != 0 || n < tail || strcmp(name + n - tail, "_blocks") != 0)
        return false;
    snprintf(twin, sizeof twin, "%.*s_scales", (int)(n - tail), name);
    uint64_t blocks = s->cols / 32;
    if (s->cols % 32 != 0 || t->n_dims != 4 || t->dims[0] != count || t->dims[1] != s->rows ||
        t->dims[2] != blocks || t->dims[3] != 16 || !find_tensor(f, twin, &scales) ||
        strcmp(scales.type, "U8") != 0 || scales.n_dims != 3 || scales.dims[0] != count ||
        scales.dims[1] != s->rows || scales.dims[2] != blocks)
        return false;
    if (f->claimed != NULL) f->claimed[scales.number] = true;
    s->row_stride = blocks * 16;
    s->scales_stride = blocks;
    s->data = t->data + index * s->rows * s->row_stride;
    s->scales = scales.data + index * s->rows * blocks;
    return true;
}

static choir_status whole(const choir_model_file *f, const char *name, const found *t,
                          const choir_place *place, uint32_t count, uint32_t index, whole_tensor *s)
{
    uint64_t rows = place->transposed ? s->cols : s->rows,
             cols = place->transposed ? s->rows : s->cols;
    bool stacked;
    if (split_mxfp4(f, name, t, count, index, s)) return CHOIR_OK;
    if (!t->readable)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: tensor '%s' has dtype %s; Choir reads F32, F16 "
                          "and BF16 from safetensors",
                          f->path, name, t->type);
    if (!fits(t, count, rows, cols, &stacked)) return bad_shape(f, name, t, rows, cols);
    uint32_t block = choir_dtype_block_elements(t->dtype);
    if (cols % block != 0)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: tensor '%s': rows of %" PRIu64 " elements are no whole %s blocks",
                          f->path, name, cols, t->type);
    size_t row = choir_dtype_row_bytes(t->dtype, cols), element = choir_dtype_block_bytes(t->dtype);
    if (place->transposed && block > 1)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: tensor '%s' lies transposed as %s", f->path,
                          name, t->type);
    s->row_stride = place->transposed ? element : row;
    s->col_stride = place->transposed ? row : block > 1 ? 0 : element;
    s->data = t->data + (stacked ? index * (size_t)rows * row : 0);
    return CHOIR_OK;
}

static choir_status slice_of(const choir_model_file *f, const char *name, const found *t,
                             const choir_place *place, choir_role role, uint32_t index,
                             choir_slice *out)
{
    const choir_model_config *c = &f->config;
    uint64_t rows, cols;
    choir_role_shape(c, role, &rows, &cols);
    bool vector = choir_role_is_vector(role), turned = place->part == CHOIR_PART_HEAD_K;
    whole_tensor s = {.rows = rows, .cols = cols};
    whole_shape(c, place->part, vector, &s.rows, &s.cols);
    CHOIR_TRY(whole(f, name, t, place, choir_role_count(c, role), index, &s));
    if (vector && place->part != CHOIR_PART_ALL && s.col_stride == 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: tensor '%s' is a part of quantised numbers",
                          f->path, name);
    take_part(c, place->part, index, vector, &s);
    choir_dtype dtype = s.scales != NULL ? CHOIR_MXFP4 : t->dtype;
    *out = (choir_slice){dtype,        (uint32_t)rows, (uint32_t)cols,  s.data, s.row_stride,
                         s.col_stride, s.scales,       s.scales_stride, dtype};
    if (turned) {
        out->row_stride = s.col_stride;
        out->col_stride = s.row_stride;
        if (s.col_stride == 0) out->dtype = CHOIR_F32;
    } else if (s.col_stride == choir_dtype_block_bytes(dtype)) {
        out->col_stride = 0;
    }
    return CHOIR_OK;
}

static bool locate(const choir_model_file *f, choir_role role, uint32_t layer, uint32_t index,
                   char *name, size_t bytes, const choir_place **place, found *out)
{
    char other[256];
    name[0] = '\0';
    for (uint32_t i = 0; i < CHOIR_MAX_PLACES; i++) {
        *place = choir_family_place(f->config.family, role, f->gguf != NULL, i);
        if (*place == NULL) continue;
        expand((*place)->name, layer, index, other, sizeof other);
        /* A missing tensor is told by the first of its names. */
        if (name[0] == '\0') snprintf(name, bytes, "%s", other);
        if (!find_tensor(f, other, out)) continue;
        snprintf(name, bytes, "%s", other);
        if (f->claimed != NULL) f->claimed[out->number] = true;
        return true;
    }
    return false;
}

/* Vectors and gates lie in a pack as f32; the matrices do not lie as a tensor does. */
static choir_status slice_of_pack(const choir_model_file *f, choir_role role, uint32_t layer,
                                  uint32_t index, choir_slice *out)
{
    const choir_pack_tensor *t = choir_pack_find(f->pack, role, layer, index);
    if (t == NULL || t->layout != CHOIR_LAYOUT_EXACT)
        return choir_fail(t == NULL ? CHOIR_E_NOT_FOUND : CHOIR_E_UNIMPLEMENTED,
                          "%s: %s of layer %u %s", f->path, choir_role_text(role), layer,
                          t == NULL
                              ? "is missing"
                              : "lies packed; what wants the tensor wants the model's own file");
    *out = (choir_slice){.dtype = CHOIR_F32,
                         .rows = t->rows,
                         .cols = t->cols,
                         .data = (const uint8_t *)choir_pack_vector(f->pack, t),
                         .row_stride = t->cols * sizeof(float),
                         .source = CHOIR_F32};
    return CHOIR_OK;
}

choir_status choir_model_file_slice(const choir_model_file *f, choir_role role, uint32_t layer,
                                    uint32_t index, choir_slice *out)
{
    char name[256];
    const choir_place *place;
    found t;
    if (role == CHOIR_ROLE_HEAD && f->config.tied_head) role = CHOIR_ROLE_EMBEDDING;
    if (f->pack != NULL) return slice_of_pack(f, role, layer, index, out);
    if (!locate(f, role, layer, index, name, sizeof name, &place, &t))
        return choir_fail(CHOIR_E_NOT_FOUND, "%s: tensor '%s' is missing", f->path,
                          name[0] != '\0' ? name : choir_role_text(role));
    return slice_of(f, name, &t, place, role, index, out);
}

choir_status choir_model_file_tensor(const choir_model_file *f, choir_role role, uint32_t layer,
                                     uint32_t index, choir_tensor *out)
{
    choir_slice slice;
    CHOIR_TRY(choir_model_file_slice(f, role, layer, index, &slice));
    if (choir_slice_is_tensor(&slice, out)) return CHOIR_OK;
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "%s: the tensor of role %s in layer %u lies rearranged in a "
                      "%s model",
                      f->path, choir_role_text(role), layer, f->config.family->name);
}

static bool has(const choir_model_file *f, choir_role role, uint32_t layer, found *out)
{
    char name[256];
    const choir_place *place;
    if (f->pack == NULL) return locate(f, role, layer, 0, name, sizeof name, &place, out);
    const choir_pack_tensor *t = choir_pack_find(f->pack, role, layer, 0);
    if (t == NULL) return false;
    *out = (found){.n_dims = 2, .dims = {t->rows, t->cols}};
    return true;
}

/* What the files tell and no key does: which layers are MoE, which optional roles there are, and
 * how wide the shared expert is. */
static void look_at_tensors(choir_model_file *f)
{
    choir_model_config *c = &f->config;
    found t;
    for (uint32_t l = 0; l < c->n_layers; l++)
        if (c->family->moe && has(f, CHOIR_ROLE_ROUTER, l, &t)) c->layers[l] |= CHOIR_LAYER_MOE;
    for (uint32_t role = 0; role < CHOIR_N_ROLES; role++) {
        uint32_t n_layers = choir_role_per_layer(role) ? c->n_layers : 1;
        for (uint32_t l = 0; choir_role_optional(role) && l < n_layers; l++)
            if (has(f, role, l, &t)) c->roles |= UINT64_C(1) << role;
    }
    for (uint32_t l = 0; c->shared_hidden == 0 && l < c->n_layers; l++)
        if (has(f, CHOIR_ROLE_SHARED_DOWN, l, &t) && t.n_dims == 2 && t.dims[1] <= 1 << 20)
            c->shared_hidden = (uint32_t)t.dims[1];
}

/* Every tensor that the model needs is there and has its shape, so that a bad file fails at once.
 */
static choir_status check_tensors(choir_model_file *f)
{
    choir_slice slice;
    for (choir_role_place at = {0}; choir_next_tensor(&f->config, &at);)
        CHOIR_TRY(choir_model_file_slice(f, at.role, at.layer, at.index, &slice));
    return CHOIR_OK;
}

/* The layer in "model.layers.61.x" or "blk.61.x"; -1 where there is none. */
static long layer_in(const char *name)
{
    const char *at = strstr(name, "layers.");
    at = at != NULL ? at + 7 : strncmp(name, "blk.", 4) == 0 ? name + 4 : NULL;
    return at != NULL && *at >= '0' && *at <= '9' ? strtol(at, NULL, 10) : -1;
}

/* Parts that an answer in text does not need: other senses, buffers that follow from the
 * configuration. */
static bool not_needed(const choir_model_file *f, const char *name)
{
    static const char *const parts[] = {"rotary_emb.inv_freq", "vision_tower.", "vision_model.",
                                        "multi_modal_projector.", "rope_freqs."};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (strstr(name, parts[i]) != NULL) return true;
    return f->config.tied_head && strstr(name, "lm_head.weight") != NULL;
}

/* Whether a layer behind the model's own predicts further tokens (DeepSeek-V3, GLM-4.5). */
static bool predicts(const choir_model_file *f, long layer)
{
    char name[64];
    found t;
    snprintf(name, sizeof name,
             f->gguf != NULL ? "blk.%ld.nextn.eh_proj.weight" : "model.layers.%ld.eh_proj.weight",
             layer);
    return layer >= (long)f->config.n_layers && find_tensor(f, name, &t);
}

/* A tensor without a place would be left out of every answer in silence: a bias, a norm. It is
 * refused; but layers that predict further tokens are known, and only told. */
static choir_status check_leftovers(const choir_model_file *f)
{
    uint64_t n_predicting = 0, number = 0, n = n_tensors(f);
    uint32_t shard = 0;
    for (uint64_t i = 0; i < n; i++, number++) {
        char name[300];
        if (f->gguf != NULL) {
            choir_text text = choir_gguf_tensor_at(f->gguf, i)->name;
            snprintf(name, sizeof name, "%.*s", (int)(text.bytes < 250 ? text.bytes : 250),
                     text.data);
        } else {
            while (number >= choir_safetensors_count(f->shards[shard])) {
                number = 0;
                shard++;
            }
            snprintf(name, sizeof name, "%.250s",
                     choir_safetensors_at(f->shards[shard], number)->name);
        }
        if (f->claimed[i] || not_needed(f, name)) continue;
        if (predicts(f, layer_in(name)) || strstr(name, "mtp") != NULL) {
            n_predicting++;
            continue;
        }
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: tensor '%s' has no place in Choir's family %s; answers "
                          "without it would be wrong",
                          f->path, name, f->config.family->name);
    }
    if (n_predicting > 0)
        choir_log(CHOIR_LOG_INFO,
                  "%s: %" PRIu64 " tensors that predict further tokens are not used", f->path,
                  n_predicting);
    return CHOIR_OK;
}

static choir_status open_shard(choir_model_file *f, const char *name)
{
    char path[4096];
    if (strchr(name, '/') != NULL || strcmp(name, "..") == 0)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: the index names '%.100s', which is no file of the folder", f->path,
                          name);
    snprintf(path, sizeof path, "%s/%.200s", f->path, name);
    CHOIR_TRY(choir_safetensors_open(path, &f->shards[f->n_shards]));
    f->bytes += choir_safetensors_bytes(f->shards[f->n_shards++]);
    return CHOIR_OK;
}

static choir_status open_index(choir_model_file *f, const char *path)
{
    char *text;
    size_t bytes;
    json_error_t error;
    CHOIR_TRY(choir_file_read(path, MAX_INDEX_BYTES, &text, &bytes));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error), *names = json_object();
    choir_free(text);
    json_t *map = json_object_get(root, "weight_map"), *value;
    const char *key;
    choir_status status = CHOIR_OK;
    if (names == NULL) status = choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", path);
    if (status == CHOIR_OK && !json_is_object(map))
        status =
            choir_fail(CHOIR_E_FORMAT, "%s: %s", path, root == NULL ? error.text : "no weight_map");
    if (status == CHOIR_OK) {
        json_object_foreach(map, key, value) if (json_is_string(value))
            json_object_set_new(names, json_string_value(value), json_true());
        if (json_object_size(names) == 0 || json_object_size(names) > MAX_SHARDS)
            status = choir_fail(CHOIR_E_FORMAT, "%s names %zu files, must be 1 to %d", path,
                                json_object_size(names), MAX_SHARDS);
    }
    if (status == CHOIR_OK) {
        f->shards = choir_calloc(CHOIR_MEM_OTHER, json_object_size(names), sizeof *f->shards);
        if (f->shards == NULL) status = choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", path);
    }
    if (status == CHOIR_OK)
        json_object_foreach(names, key, value) if (status == CHOIR_OK) status = open_shard(f, key);
    json_decref(names);
    json_decref(root);
    return status;
}

/* chat_template.jinja, or "chat_template" of tokenizer_config.json: a string or a list of named
 * ones. */
static choir_status read_hf_template(choir_model_file *f)
{
    char *text;
    size_t bytes;
    json_error_t error;
    static const char *const config = "tokenizer_config.json";
    if (choir_model_file_has_text(f, "chat_template.jinja"))
        return choir_model_file_text(f, "chat_template.jinja", MAX_TEMPLATE_BYTES,
                                     &f->chat_template, &bytes);
    if (!choir_model_file_has_text(f, config)) return CHOIR_OK;
    CHOIR_TRY(choir_model_file_text(f, config, MAX_INDEX_BYTES, &text, &bytes));
    json_t *root =
        json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &error);
    choir_free(text);
    if (root == NULL)
        return choir_fail(CHOIR_E_FORMAT, "%s/%s: bad JSON in line %d: %s", f->path, config,
                          error.line, error.text);
    const json_t *source = json_object_get(root, "chat_template");
    for (size_t i = 0; json_is_array(source) && i < json_array_size(source); i++) {
        const json_t *named = json_array_get(source, i);
        const char *name = json_string_value(json_object_get(named, "name"));
        if (name != NULL && strcmp(name, "default") == 0) {
            source = json_object_get(named, "template");
            break;
        }
    }
    if (json_is_string(source))
        f->chat_template = choir_strdup(CHOIR_MEM_OTHER, json_string_value(source));
    bool failed = json_is_string(source) && f->chat_template == NULL;
    json_decref(root);
    return failed ? choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", f->path) : CHOIR_OK;
}

static choir_status open_folder(choir_model_file *f)
{
    char path[4096];
    CHOIR_TRY(choir_config_read_hf(&(choir_texts){.path = f->path}, &f->config));
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", f->path);
    if (choir_file_exists(path)) {
        CHOIR_TRY(open_index(f, path));
    } else {
        f->shards = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *f->shards);
        if (f->shards == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", f->path);
        CHOIR_TRY(open_shard(f, "model.safetensors"));
    }
    return read_hf_template(f);
}

static choir_status read_gguf_template(choir_model_file *f)
{
    choir_text source;
    if (!choir_gguf_string(f->gguf, "tokenizer.chat_template", &source)) return CHOIR_OK;
    if (source.bytes > MAX_TEMPLATE_BYTES || memchr(source.data, 0, source.bytes) != NULL)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: tokenizer.chat_template has %zu bytes or a NUL in it, the "
                          "limit is %d",
                          f->path, source.bytes, MAX_TEMPLATE_BYTES);
    f->chat_template = choir_alloc(CHOIR_MEM_OTHER, source.bytes + 1);
    if (f->chat_template == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", f->path);
    memcpy(f->chat_template, source.data, source.bytes);
    f->chat_template[source.bytes] = '\0';
    return CHOIR_OK;
}

static choir_status open_gguf(choir_model_file *f)
{
    CHOIR_TRY(choir_gguf_open(f->path, &f->gguf));
    int64_t n_files;
    if (choir_gguf_integer(f->gguf, "split.count", &n_files) && n_files > 1)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s is one of %" PRId64
                          " files of a split model, and Choir reads whole ones; "
                          "llama.cpp's llama-gguf-split --merge joins them",
                          f->path, n_files);
    CHOIR_TRY(choir_config_read_gguf(f->path, f->gguf, &f->config));
    choir_map map;
    CHOIR_TRY(choir_map_open(f->path, &map));
    f->bytes = map.bytes;
    choir_map_close(&map);
    return read_gguf_template(f);
}

/* "Q4_1 (210), F32 (61)", and the number of parameters. */
static void count_types(choir_model_file *f)
{
    uint32_t counts[CHOIR_N_DTYPES] = {0};
    uint64_t n = f->gguf != NULL ? choir_gguf_n_tensors(f->gguf) : 0;
    for (uint64_t i = 0; i < n; i++) {
        const choir_gguf_tensor *t = choir_gguf_tensor_at(f->gguf, i);
        counts[t->dtype]++;
        f->n_parameters += t->dims[0] * t->dims[1] * t->dims[2] * t->dims[3];
    }
    for (uint32_t s = 0; s < f->n_shards; s++)
        for (size_t i = 0; i < choir_safetensors_count(f->shards[s]); i++) {
            const choir_safetensor *t = choir_safetensors_at(f->shards[s], i);
            if (!t->readable) continue;
            counts[t->dtype]++;
            f->n_parameters += t->bytes / choir_dtype_block_bytes(t->dtype);
        }
    size_t at = 0;
    for (;;) {
        uint32_t best = 0;
        for (uint32_t d = 1; d < CHOIR_N_DTYPES; d++)
            if (counts[d] > counts[best]) best = d;
        if (counts[best] == 0 || at + 24 > sizeof f->types) return;
        at += (size_t)snprintf(f->types + at, sizeof f->types - at, "%s%s (%u)", at > 0 ? ", " : "",
                               choir_dtype_text(best), counts[best]);
        counts[best] = 0;
    }
}

/* Where a Hugging Face folder has the text model's tensors. */
static void find_prefix(choir_model_file *f)
{
    found t;
    char name[256];
    const choir_place *place;
    static const prefix prefixes[] = {PREFIX_INSIDE_MODEL, PREFIX_LANGUAGE_MODEL, PREFIX_NONE};
    for (size_t i = 0; i < 3; i++) {
        f->prefix = prefixes[i];
        if (locate(f, CHOIR_ROLE_EMBEDDING, 0, 0, name, sizeof name, &place, &t)) return;
    }
}

/* Dense layers among others have a width of their own. */
static choir_status check_layers(const choir_model_file *f)
{
    const choir_model_config *c = &f->config;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        bool moe = (c->layers[l] & CHOIR_LAYER_MOE) != 0;
        if (!moe && c->ffn_hidden == 0)
            return choir_fail(CHOIR_E_FORMAT,
                              "%s: layer %u has no router, and the configuration gives no "
                              "width for dense layers",
                              f->path, l);
    }
    return CHOIR_OK;
}

/* What the texts say, and what the tables have. */
static choir_status open_pack(choir_model_file *f)
{
    const char *header;
    size_t bytes;
    CHOIR_TRY(choir_pack_open(f->path, &f->pack));
    const choir_pack_header *h = choir_pack_get_header(f->pack);
    f->bytes = h->file_bytes;
    f->n_parameters = h->n_parameters;
    snprintf(f->types, sizeof f->types, "%s", h->types);
    if ((h->flags & CHOIR_PACK_FROM_GGUF) != 0) {
        if (!choir_pack_text(f->pack, "gguf", &header, &bytes))
            return choir_fail(CHOIR_E_FORMAT, "%s lacks the text 'gguf'", f->path);
        CHOIR_TRY(choir_gguf_parse_header(f->path, header, bytes, &f->gguf));
        CHOIR_TRY(choir_config_read_gguf(f->path, f->gguf, &f->config));
        CHOIR_TRY(read_gguf_template(f));
    } else {
        const choir_texts texts = {f->path, f->pack};
        CHOIR_TRY(choir_config_read_hf(&texts, &f->config));
        CHOIR_TRY(read_hf_template(f));
    }
    snprintf(f->config.name, sizeof f->config.name, "%s", h->name);
    f->config.tied_head = choir_pack_find(f->pack, CHOIR_ROLE_HEAD, 0, 0) == NULL;
    CHOIR_TRY(choir_config_check(f->path, &f->config));
    look_at_tensors(f);
    CHOIR_TRY(check_layers(f));
    return choir_pack_check(f->pack, &f->config);
}

static choir_status open_any(choir_model_file *f)
{
    if (choir_pack_is(f->path)) return open_pack(f);
    if (choir_folder_exists(f->path))
        CHOIR_TRY(open_folder(f));
    else
        CHOIR_TRY(open_gguf(f));
    CHOIR_TRY(choir_config_check(f->path, &f->config));
    if (f->gguf == NULL) find_prefix(f);
    look_at_tensors(f);
    f->claimed = choir_calloc(CHOIR_MEM_OTHER, n_tensors(f) + 1, sizeof *f->claimed);
    if (f->claimed == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", f->path);
    CHOIR_TRY(check_layers(f));
    CHOIR_TRY(check_tensors(f));
    CHOIR_TRY(check_leftovers(f));
    choir_free(f->claimed);
    f->claimed = NULL; /* from here on files are read-only */
    count_types(f);
    return CHOIR_OK;
}

choir_status choir_model_file_open(const char *path, choir_model_file **out)
{
    choir_model_file *f = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *f);
    if (f == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory to open %s", path);
    choir_status status = CHOIR_OK;
    if (strlen(path) > 3000)
        status =
            choir_fail(CHOIR_E_INVALID, "the model's path %.60s… has %zu bytes, the limit is 3000",
                       path, strlen(path));
    else if ((f->path = choir_strdup(CHOIR_MEM_OTHER, path)) == NULL)
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory to open %s", path);
    for (size_t n = f->path == NULL ? 0 : strlen(f->path); n > 1 && f->path[n - 1] == '/'; n--)
        f->path[n - 1] = '\0';
    if (status == CHOIR_OK) status = open_any(f);
    if (status != CHOIR_OK) {
        choir_model_file_close(f);
        return status;
    }
    *out = f;
    return CHOIR_OK;
}

void choir_model_file_close(choir_model_file *f)
{
    if (f == NULL) return;
    for (uint32_t i = 0; i < f->n_shards; i++) choir_safetensors_close(f->shards[i]);
    choir_free(f->shards);
    choir_gguf_close(f->gguf);
    choir_pack_close(f->pack);
    choir_free(f->chat_template);
    choir_free(f->claimed);
    choir_free(f->path);
    choir_free(f);
}

const choir_pack *choir_model_file_pack(const choir_model_file *f)
{
    return f->pack;
}

bool choir_model_file_has_text(const choir_model_file *f, const char *name)
{
    return choir_texts_have(&(choir_texts){f->path, f->pack}, name);
}

choir_status choir_model_file_text(const choir_model_file *f, const char *name, size_t max_bytes,
                                   char **out, size_t *bytes)
{
    return choir_texts_read(&(choir_texts){f->path, f->pack}, name, max_bytes, out, bytes);
}

choir_status choir_model_file_plan(const choir_model_file *f, choir_role role, uint32_t layer,
                                   uint32_t index, choir_matrix *out)
{
    choir_slice slice;
    choir_tensor t;
    if (f->pack != NULL) {
        const choir_pack_tensor *p = choir_pack_find(f->pack, role, layer, index);
        if (p == NULL)
            return choir_fail(CHOIR_E_NOT_FOUND, "%s: %s of layer %u is missing", f->path,
                              choir_role_text(role), layer);
        *out = choir_pack_matrix(p);
        return CHOIR_OK;
    }
    CHOIR_TRY(choir_model_file_slice(f, role, layer, index, &slice));
    choir_slice_is_tensor(&slice, &t); /* its shape, wherever it lies */
    if (choir_role_is_f32(role)) {
        const choir_tensor f32 = {CHOIR_F32, t.rows, t.cols, NULL,
                                  (size_t)t.rows * t.cols * sizeof(float)};
        *out = choir_matrix_exact(&f32);
        return CHOIR_OK;
    }
    CHOIR_TRY(choir_matrix_plan(&t, out));
    out->data = NULL;
    return CHOIR_OK;
}

/* Gemma's folders have norm weights less one; its GGUF files have them whole, and packs as well. */
static bool lacks_one(const choir_model_file *f, choir_role role)
{
    static const uint64_t norms = CHOIR_ROLE_BIT(OUTPUT_NORM) | CHOIR_ROLE_BIT(ATTN_NORM) |
                                  CHOIR_ROLE_BIT(ATTN_POST_NORM) | CHOIR_ROLE_BIT(FFN_NORM) |
                                  CHOIR_ROLE_BIT(FFN_POST_NORM) | CHOIR_ROLE_BIT(ATTN_Q_NORM) |
                                  CHOIR_ROLE_BIT(ATTN_K_NORM);
    return f->config.family->norms_less_one && f->pack == NULL && f->gguf == NULL &&
           (norms >> role & 1) != 0;
}

void choir_model_file_expand(const choir_model_file *f, choir_role role, const choir_tensor *t,
                             float *out)
{
    for (uint32_t r = 0; r < t->rows; r++) choir_tensor_row(t, r, out + (size_t)r * t->cols);
    bool less = lacks_one(f, role);
    for (size_t i = 0; less && i < (size_t)t->rows * t->cols; i++) out[i] += 1;
}

choir_status choir_model_file_weigh(const choir_model_file *f, size_t align, uint64_t *dense,
                                    uint64_t *experts)
{
    *dense = *experts = 0;
    for (choir_role_place at = {0}; choir_next_tensor(&f->config, &at);) {
        choir_matrix m;
        CHOIR_TRY(choir_model_file_plan(f, at.role, at.layer, at.index, &m));
        *(choir_role_is_routed(at.role) ? experts : dense) += choir_round_up(m.bytes, align);
    }
    return CHOIR_OK;
}

uint32_t choir_model_file_n_parts(const choir_model_file *f)
{
    return f->gguf != NULL ? 1 : f->n_shards;
}

const char *choir_model_file_part_path(const choir_model_file *f, uint32_t part)
{
    return f->gguf != NULL ? choir_gguf_path(f->gguf) : choir_safetensors_path(f->shards[part]);
}

bool choir_model_file_locate(const choir_model_file *f, const void *data, uint32_t *part,
                             uint64_t *offset)
{
    for (uint32_t i = 0; i < choir_model_file_n_parts(f); i++) {
        size_t bytes;
        const uint8_t *base, *at = data;
        if (f->gguf != NULL) {
            base = choir_gguf_data(f->gguf, &bytes);
        } else {
            base = choir_safetensors_data(f->shards[i]);
            bytes = choir_safetensors_bytes(f->shards[i]);
        }
        if (at < base || at >= base + bytes) continue;
        *part = i;
        *offset = (uint64_t)(at - base);
        return true;
    }
    return false;
}

const char *choir_model_config_family(const choir_model_config *c)
{
    return c->family->name;
}
const choir_model_config *choir_model_file_config(const choir_model_file *f)
{
    return &f->config;
}
const char *choir_model_file_path(const choir_model_file *f)
{
    return f->path;
}
const choir_gguf *choir_model_file_gguf(const choir_model_file *f)
{
    return f->gguf;
}
uint64_t choir_model_file_bytes(const choir_model_file *f)
{
    return f->bytes;
}
uint64_t choir_model_file_n_parameters(const choir_model_file *f)
{
    return f->n_parameters;
}
const char *choir_model_file_types(const choir_model_file *f)
{
    return f->types;
}
const char *choir_model_file_chat_template(const choir_model_file *f)
{
    return f->chat_template;
}

const char *choir_model_file_kind(const choir_model_file *f)
{
    return f->pack != NULL ? "pack" : f->gguf != NULL ? "GGUF" : "safetensors";
}
