#include "engine/model_file.h"

#include "base/base.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

enum { MAX_SHARDS = 1024, MAX_INDEX_BYTES = 64 << 20, MAX_TEMPLATE_BYTES = 1 << 20 };

struct choir_model_file {
    char *path;
    choir_model_config config;
    choir_gguf *gguf;
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
} found;

static bool find_tensor(const choir_model_file *f, const char *name, found *out)
{
    if (f->gguf != NULL) {
        const choir_gguf_tensor *t = choir_gguf_find_tensor(f->gguf, name);
        if (t == NULL) return false;
        *out = (found){true, choir_dtype_text(t->dtype), t->dtype, t->n_dims, {0}, t->data, t->bytes};
        for (uint32_t d = 0; d < t->n_dims; d++) out->dims[d] = t->dims[t->n_dims - 1 - d];
        return true;
    }
    for (uint32_t i = 0; i < f->n_shards; i++) {
        const choir_safetensor *t = choir_safetensors_find(f->shards[i], name);
        if (t == NULL) continue;
        *out = (found){t->readable, t->type, t->dtype, t->n_dims, {0}, t->data, t->bytes};
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

/* The shape a role must have. */
static void wanted_shape(const choir_model_config *c, choir_role role, uint64_t *rows, uint64_t *cols)
{
    uint64_t q = (uint64_t)c->n_heads * c->head_dim, kv = (uint64_t)c->n_kv_heads * c->head_dim;
    bool per_head = c->family->qk_norm == CHOIR_QK_NORM_HEAD;
    *rows = 1;
    *cols = c->hidden;
    switch (role) {
    case CHOIR_ROLE_EMBEDDING:
    case CHOIR_ROLE_HEAD: *rows = c->vocab; break;
    case CHOIR_ROLE_ROPE_FACTORS: *cols = c->rope.rotary_dims / 2; break;
    case CHOIR_ROLE_ATTN_Q: *rows = q; break;
    case CHOIR_ROLE_ATTN_K:
    case CHOIR_ROLE_ATTN_V: *rows = kv; break;
    case CHOIR_ROLE_ATTN_OUT:
        *rows = c->hidden;
        *cols = q;
        break;
    case CHOIR_ROLE_ATTN_Q_BIAS: *cols = q; break;
    case CHOIR_ROLE_ATTN_K_BIAS:
    case CHOIR_ROLE_ATTN_V_BIAS: *cols = kv; break;
    case CHOIR_ROLE_ATTN_Q_NORM: *cols = per_head ? c->head_dim : q; break;
    case CHOIR_ROLE_ATTN_K_NORM: *cols = per_head ? c->head_dim : kv; break;
    case CHOIR_ROLE_FFN_GATE:
    case CHOIR_ROLE_FFN_UP: *rows = c->ffn_hidden; break;
    case CHOIR_ROLE_FFN_DOWN:
        *rows = c->hidden;
        *cols = c->ffn_hidden;
        break;
    case CHOIR_ROLE_ROUTER: *rows = c->n_experts; break;
    case CHOIR_ROLE_EXPERT_GATE:
    case CHOIR_ROLE_EXPERT_UP: *rows = c->expert_hidden; break;
    case CHOIR_ROLE_EXPERT_DOWN:
        *rows = c->hidden;
        *cols = c->expert_hidden;
        break;
    default: break;
    }
}

static choir_status view(const choir_model_file *f, const char *name, const found *t, choir_role role,
                         uint32_t expert, choir_tensor *out)
{
    uint64_t rows, cols;
    wanted_shape(&f->config, role, &rows, &cols);
    if (!t->readable)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: tensor '%s' has dtype %s; Choir reads F32, F16 "
                          "and BF16 from safetensors", f->path, name, t->type);
    bool stacked = t->n_dims == 3 && t->dims[0] == f->config.n_experts;
    const uint64_t *dims = t->dims + (stacked ? 1 : 0);
    uint32_t n_dims = t->n_dims - (stacked ? 1 : 0);
    bool fits = n_dims == 2 ? dims[0] == rows && dims[1] == cols
                            : n_dims == 1 && rows == 1 && dims[0] == cols;
    if (!fits)
        return choir_fail(CHOIR_E_FORMAT,
                          "%s: tensor '%s' has shape [%" PRIu64 ", %" PRIu64
                          "] in %u dimensions, the configuration wants [%" PRIu64 ", %" PRIu64 "]",
                          f->path, name, dims[0], n_dims > 1 ? dims[1] : 1, t->n_dims, rows, cols);
    if (cols % choir_dtype_block_elements(t->dtype) != 0)
        return choir_fail(CHOIR_E_FORMAT, "%s: tensor '%s': rows of %" PRIu64
                          " elements are no whole %s blocks", f->path, name, cols, t->type);
    size_t bytes = (size_t)rows * choir_dtype_row_bytes(t->dtype, cols);
    *out = (choir_tensor){t->dtype, (uint32_t)rows, (uint32_t)cols,
                          t->data + (stacked ? expert * bytes : 0), bytes};
    return CHOIR_OK;
}

/* Older GGUF files of Mixtral have one tensor per expert: blk.0.ffn_gate.3.weight. */
static bool old_expert_name(choir_role role, uint32_t layer, uint32_t expert, char *name, size_t bytes)
{
    const char *part = role == CHOIR_ROLE_EXPERT_GATE   ? "gate"
                       : role == CHOIR_ROLE_EXPERT_UP   ? "up"
                       : role == CHOIR_ROLE_EXPERT_DOWN ? "down"
                                                        : NULL;
    if (part == NULL) return false;
    snprintf(name, bytes, "blk.%u.ffn_%s.%u.weight", layer, part, expert);
    return true;
}

static bool locate(const choir_model_file *f, choir_role role, uint32_t layer, uint32_t expert,
                   char *name, size_t bytes, found *out)
{
    const char *pattern = choir_family_pattern(f->config.family, role, f->gguf != NULL);
    name[0] = '\0';
    if (pattern == NULL) return false;
    expand(pattern, layer, expert, name, bytes);
    if (find_tensor(f, name, out)) return true;
    char old[64];
    return f->gguf != NULL && old_expert_name(role, layer, expert, old, sizeof old) &&
           find_tensor(f, old, out);
}

choir_status choir_model_file_tensor(const choir_model_file *f, choir_role role, uint32_t layer,
                                     uint32_t expert, choir_tensor *out)
{
    char name[256];
    found t;
    if (role == CHOIR_ROLE_HEAD && f->config.tied_head) role = CHOIR_ROLE_EMBEDDING;
    if (!locate(f, role, layer, expert, name, sizeof name, &t))
        return choir_fail(CHOIR_E_NOT_FOUND, "%s: tensor '%s' is missing", f->path, name);
    return view(f, name, &t, role, expert, out);
}

bool choir_model_file_has(const choir_model_file *f, choir_role role, uint32_t layer)
{
    char name[256];
    found t;
    return locate(f, role, layer, 0, name, sizeof name, &t);
}

static bool optional(choir_role role) { return role == CHOIR_ROLE_ROPE_FACTORS; }

/* Every tensor that the family needs is there and has its shape, so that a bad file fails at once. */
static choir_status check_tensors(const choir_model_file *f)
{
    static const struct {
        uint8_t per_layer, per_expert;
    } roles[CHOIR_N_ROLES] = {
#define X(role, layer, expert) {layer, expert},
        CHOIR_ROLE_LIST(X)
#undef X
    };
    bool gguf = f->gguf != NULL;
    for (uint32_t role = 0; role < CHOIR_N_ROLES; role++) {
        if (choir_family_pattern(f->config.family, role, gguf) == NULL) continue;
        if (optional(role) && !choir_model_file_has(f, role, 0)) continue;
        uint32_t n_layers = roles[role].per_layer ? f->config.n_layers : 1;
        uint32_t n_experts = roles[role].per_expert ? f->config.n_experts : 1;
        choir_tensor t;
        for (uint32_t l = 0; l < n_layers; l++)
            for (uint32_t e = 0; e < n_experts; e++)
                CHOIR_TRY(choir_model_file_tensor(f, role, l, e, &t));
    }
    return CHOIR_OK;
}

static choir_status open_shard(choir_model_file *f, const char *name)
{
    char path[4096];
    if (strchr(name, '/') != NULL || strcmp(name, "..") == 0)
        return choir_fail(CHOIR_E_FORMAT, "%s: the index names '%.100s', which is no file of the folder",
                          f->path, name);
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
        status = choir_fail(CHOIR_E_FORMAT, "%s: %s", path, root == NULL ? error.text : "no weight_map");
    if (status == CHOIR_OK) {
        json_object_foreach (map, key, value)
            if (json_is_string(value))
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
        json_object_foreach (names, key, value)
            if (status == CHOIR_OK) status = open_shard(f, key);
    json_decref(names);
    json_decref(root);
    return status;
}

/* chat_template.jinja, or "chat_template" of tokenizer_config.json: a string or a list of named ones. */
static choir_status read_hf_template(choir_model_file *f)
{
    char path[4096];
    size_t bytes;
    json_error_t error;
    snprintf(path, sizeof path, "%s/chat_template.jinja", f->path);
    if (choir_file_exists(path))
        return choir_file_read(path, MAX_TEMPLATE_BYTES, &f->chat_template, &bytes);
    snprintf(path, sizeof path, "%s/tokenizer_config.json", f->path);
    if (!choir_file_exists(path)) return CHOIR_OK;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &error);
    if (root == NULL)
        return choir_fail(CHOIR_E_FORMAT, "%s: bad JSON in line %d: %s", path, error.line, error.text);
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
    return failed ? choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", path) : CHOIR_OK;
}

static choir_status open_folder(choir_model_file *f)
{
    char path[4096];
    CHOIR_TRY(choir_config_read_hf(f->path, &f->config));
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", f->path);
    if (choir_file_exists(path)) {
        CHOIR_TRY(open_index(f, path));
    } else {
        f->shards = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *f->shards);
        if (f->shards == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", f->path);
        CHOIR_TRY(open_shard(f, "model.safetensors"));
    }
    found head;
    if (f->config.tied_head && find_tensor(f, "lm_head.weight", &head)) f->config.tied_head = true;
    return read_hf_template(f);
}

static choir_status open_gguf(choir_model_file *f)
{
    choir_text source;
    CHOIR_TRY(choir_gguf_open(f->path, &f->gguf));
    CHOIR_TRY(choir_config_read_gguf(f->path, f->gguf, &f->config));
    choir_map map;
    CHOIR_TRY(choir_map_open(f->path, &map));
    f->bytes = map.bytes;
    choir_map_close(&map);
    if (!choir_gguf_string(f->gguf, "tokenizer.chat_template", &source)) return CHOIR_OK;
    if (source.bytes > MAX_TEMPLATE_BYTES || memchr(source.data, 0, source.bytes) != NULL)
        return choir_fail(CHOIR_E_FORMAT, "%s: tokenizer.chat_template has %zu bytes or a NUL in it, the "
                          "limit is %d", f->path, source.bytes, MAX_TEMPLATE_BYTES);
    f->chat_template = choir_alloc(CHOIR_MEM_OTHER, source.bytes + 1);
    if (f->chat_template == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", f->path);
    memcpy(f->chat_template, source.data, source.bytes);
    f->chat_template[source.bytes] = '\0';
    return CHOIR_OK;
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

void choir_config_set_id(const choir_model_config *c, int64_t id, int32_t *out)
{
    *out = id >= 0 && id < c->vocab ? (int32_t)id : -1;
}

void choir_config_add_eos(choir_model_config *c, int64_t id)
{
    if (id < 0 || id >= c->vocab || c->n_eos == sizeof c->eos_ids / sizeof *c->eos_ids) return;
    for (uint32_t i = 0; i < c->n_eos; i++)
        if (c->eos_ids[i] == id) return;
    c->eos_ids[c->n_eos++] = (int32_t)id;
}

choir_status choir_config_check(const char *path, const choir_model_config *c)
{
    const struct {
        const char *what;
        uint32_t value, most;
    } counts[] = {
        {"number of layers", c->n_layers, 4096},   {"hidden size", c->hidden, 1 << 20},
        {"number of heads", c->n_heads, 4096},     {"number of kv heads", c->n_kv_heads, 4096},
        {"head size", c->head_dim, 4096},          {"vocabulary", c->vocab, 1 << 24},
        {"context length", c->max_positions, 1 << 28},
        {"FFN size", c->n_experts > 0 ? c->expert_hidden : c->ffn_hidden, 1 << 20},
    };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i].value == 0 || counts[i].value > counts[i].most)
            return choir_fail(CHOIR_E_FORMAT, "%s: the %s is %u, must be 1 to %u", path,
                              counts[i].what, counts[i].value, counts[i].most);
    if (c->n_heads % c->n_kv_heads != 0)
        return choir_fail(CHOIR_E_FORMAT, "%s: %u heads are no multiple of %u kv heads", path,
                          c->n_heads, c->n_kv_heads);
    if (c->rope.rotary_dims == 0 || c->rope.rotary_dims % 2 != 0 || c->rope.rotary_dims > c->head_dim)
        return choir_fail(CHOIR_E_FORMAT, "%s: rope turns %u of %u dimensions", path,
                          c->rope.rotary_dims, c->head_dim);
    if (c->n_experts > 65535 || (c->n_experts > 0 && (c->n_experts_used == 0 ||
                                                      c->n_experts_used > c->n_experts)))
        return choir_fail(CHOIR_E_FORMAT, "%s: %u experts per token of %u", path, c->n_experts_used,
                          c->n_experts);
    bool good = c->norm_eps >= 0 && c->norm_eps < 1 && c->rope.theta > 0 && isfinite(c->rope.theta);
    bool scaled = c->rope.scaling == CHOIR_ROPE_NONE || c->rope.factor >= 1;
    if (c->rope.scaling == CHOIR_ROPE_LLAMA3)
        scaled = scaled && c->rope.low_freq_factor > 0 &&
                 c->rope.high_freq_factor > c->rope.low_freq_factor &&
                 c->rope.original_max_positions > 0;
    if (!good || !scaled)
        return choir_fail(CHOIR_E_FORMAT, "%s: the norm's epsilon or rope's parameters are absurd", path);
    return CHOIR_OK;
}

static choir_status open_any(choir_model_file *f)
{
    if (choir_folder_exists(f->path))
        CHOIR_TRY(open_folder(f));
    else
        CHOIR_TRY(open_gguf(f));
    CHOIR_TRY(choir_config_check(f->path, &f->config));
    CHOIR_TRY(check_tensors(f));
    count_types(f);
    return CHOIR_OK;
}

choir_status choir_model_file_open(const char *path, choir_model_file **out)
{
    choir_model_file *f = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *f);
    if (f == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory to open %s", path);
    choir_status status = CHOIR_OK;
    if (strlen(path) > 3000)
        status = choir_fail(CHOIR_E_INVALID, "a path of %zu bytes, the limit is 3000", strlen(path));
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
    choir_free(f->chat_template);
    choir_free(f->path);
    choir_free(f);
}

const char *choir_model_config_family(const choir_model_config *c) { return c->family->name; }
const choir_model_config *choir_model_file_config(const choir_model_file *f) { return &f->config; }
const char *choir_model_file_path(const choir_model_file *f) { return f->path; }
const choir_gguf *choir_model_file_gguf(const choir_model_file *f) { return f->gguf; }
uint64_t choir_model_file_bytes(const choir_model_file *f) { return f->bytes; }
uint64_t choir_model_file_n_parameters(const choir_model_file *f) { return f->n_parameters; }
const char *choir_model_file_types(const choir_model_file *f) { return f->types; }
const char *choir_model_file_chat_template(const choir_model_file *f) { return f->chat_template; }

const char *choir_model_file_kind(const choir_model_file *f)
{
    return f->gguf != NULL ? "GGUF" : "safetensors";
}
