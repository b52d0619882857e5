/* The merged adapter as PEFT has it: adapter_config.json, adapter_model.safetensors; beside them
 * what it was made of, and its parts' notices. */
#include "tune/merge.h"

#include "tune/hf_files.h"
#include "tune/out_folder.h"
#include "tune/weights.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { MAX_PATH_BYTES = 4096 };
static const char prefix[] = "base_model.model.";

/* A module as PEFT's configurations name it. */
static const char *plain_name(const choir_tune_merged *t)
{
    bool has = strncmp(t->name, prefix, sizeof prefix - 1) == 0;
    return has ? t->name + sizeof prefix - 1 : t->name;
}

/* PEFT's rule for a list of targets: the whole name, or its end behind a dot. */
static bool is_target(const json_t *targets, const char *module)
{
    const char *key = module;
    while (key != NULL) {
        if (json_object_get(targets, key) != NULL) return true;
        key = strchr(key, '.');
        if (key != NULL) key++;
    }
    return false;
}

static bool is_given(const json_t *config, const char *key)
{
    const json_t *value = json_object_get(config, key);
    return value != NULL && !json_is_null(value) &&
           !(json_is_array(value) && json_array_size(value) == 0);
}

/* The texts of a list, as the keys of an object, so that each is there once; false: it is no list
 * of texts. */
static bool add_texts(json_t **to, const json_t *config, const char *key)
{
    const json_t *list = json_object_get(config, key);
    if (!is_given(config, key)) return true;
    if (!json_is_array(list)) return false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *text = json_string_value(json_array_get(list, i));
        if (text == NULL) return false;
        choir_tune_json_set(to, text, json_true());
    }
    return true;
}

static json_t *keys_of(json_t *object)
{
    const char *key;
    json_t *value, *list = json_array();
    json_object_foreach(object, key, value) choir_tune_json_append(&list, json_string(key));
    return list;
}

/* The first adapter that has matrices of all experts at once: its file says which parameters they
 * are of, and which version of PEFT laid them so. The number of adapters: there is none. */
static uint32_t first_stacked(const choir_tune_merge *m)
{
    uint32_t i = 0;
    for (; i < m->options->n_adapters; i++)
        for (size_t k = 0; k < m->pairs[i]->n; k++)
            if (m->pairs[i]->items[k].stacked) return i;
    return i;
}

static bool has_stack(const choir_adapter_pairs *pairs)
{
    bool has = false;
    for (size_t k = 0; k < pairs->n; k++) has = has || pairs->items[k].stacked;
    return has;
}

/* The configurations of all adapters, parsed. */
typedef struct configs {
    json_t *items[CHOIR_MAX_MERGE];
    uint32_t n;
} configs;

static choir_status parse_configs(const choir_tune_merge *m, configs *c)
{
    for (; c->n < m->options->n_adapters; c->n++) {
        const choir_adapter_pairs *p = m->pairs[c->n];
        c->items[c->n] = json_loadb(p->config, p->config_bytes, 0, NULL);
        if (c->items[c->n] == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for its configuration", p->folder);
    }
    return CHOIR_OK;
}

/* A list that names exactly what is in the file: the adapters' own words where they cover it all
 * without exceptions, as they do mostly, else every module by its whole name. NULL: no memory. */
static json_t *targets_of(const choir_tune_merge *m, const configs *c)
{
    json_t *words = json_object();
    bool good = true;
    for (uint32_t i = 0; i < c->n; i++)
        good = good && add_texts(&words, c->items[i], "target_modules") &&
               !is_given(c->items[i], "layers_to_transform") &&
               !is_given(c->items[i], "layers_pattern") &&
               !is_given(c->items[i], "exclude_modules");
    for (size_t k = 0; k < m->n_modules; k++)
        good = good && (m->modules[k].stacked || is_target(words, plain_name(&m->modules[k])));
    if (!good) {
        json_decref(words);
        words = json_object();
        for (size_t k = 0; k < m->n_modules; k++)
            if (!m->modules[k].stacked)
                choir_tune_json_set(&words, plain_name(&m->modules[k]), json_true());
    }
    json_t *list = json_object_size(words) == 0 ? json_null() : keys_of(words);
    if (words == NULL) list = NULL;
    json_decref(words);
    return list;
}

/* The names of stacks do not say which parameter is meant: that hangs on which are targeted. */
static choir_status targets_of_stacks(const choir_tune_merge *m, const configs *c, json_t **out)
{
    uint32_t first = first_stacked(m);
    *out = json_null();
    if (first == c->n) return CHOIR_OK;
    json_t *words = json_object();
    add_texts(&words, c->items[first], "target_parameters");
    choir_status status = CHOIR_OK;
    for (uint32_t i = first + 1; i < c->n && status == CHOIR_OK; i++) {
        json_t *others = json_object();
        add_texts(&others, c->items[i], "target_parameters");
        if (has_stack(m->pairs[i]) && !json_equal(words, others))
            status = choir_fail(CHOIR_E_INVALID,
                                "%s: target_parameters differs from that of %s, so matrices of "
                                "one name are of different parameters",
                                m->pairs[i]->folder, m->pairs[first]->folder);
        json_decref(others);
    }
    if (status == CHOIR_OK) *out = keys_of(words);
    json_decref(words);
    return status;
}

/* The first adapter's, with what the merged one has: one rank and no scale, since the scales are in
 * the numbers. What says how an adapter was started would be said of the wrong one. */
static choir_status save_config(const choir_tune_merge *m, const configs *c, const char *folder)
{
    static const char *const emptied[] = {"layers_to_transform", "layers_pattern",
                                          "exclude_modules",     "eva_config",
                                          "corda_config",        "lora_ga_config"};
    json_t *parameters;
    CHOIR_TRY(targets_of_stacks(m, c, &parameters));
    json_t *j = json_deep_copy(c->items[0]);
    uint32_t stacked = first_stacked(m);
    if (stacked < c->n && json_object_get(c->items[stacked], "peft_version") != NULL)
        choir_tune_json_set(&j, "peft_version",
                            json_deep_copy(json_object_get(c->items[stacked], "peft_version")));
    for (size_t i = 0; i < sizeof emptied / sizeof *emptied; i++)
        if (json_object_get(j, emptied[i]) != NULL)
            choir_tune_json_set(&j, emptied[i], json_null());
    choir_tune_json_set(&j, "r", json_integer(m->rank));
    choir_tune_json_set(&j, "lora_alpha", json_integer(m->rank));
    choir_tune_json_set(&j, "use_rslora", json_false());
    choir_tune_json_set(&j, "rank_pattern", json_object());
    choir_tune_json_set(&j, "alpha_pattern", json_object());
    choir_tune_json_set(&j, "loftq_config", json_object());
    choir_tune_json_set(&j, "init_lora_weights", json_true());
    choir_tune_json_set(&j, "inference_mode", json_true());
    choir_tune_json_set(&j, "target_modules", targets_of(m, c));
    choir_tune_json_set(&j, "target_parameters", parameters);
    return choir_tune_save_json(folder, "adapter_config.json", j);
}

static void add_to_header(json_t **header, const choir_tune_merge *m, const choir_tune_merged *t,
                          bool b)
{
    char name[MAX_PATH_BYTES];
    json_int_t ranks = (json_int_t)t->n_experts * m->rank;
    json_int_t rows = b ? t->rows : ranks, cols = b ? ranks : t->cols;
    json_int_t begin = (json_int_t)(b ? t->b_at : t->a_at);
    json_int_t bytes = rows * cols * (json_int_t)choir_dtype_row_bytes(m->options->dtype, 1);
    snprintf(name, sizeof name, "%s.%s", t->name, choir_adapter_pair_ending(t->embedding, b));
    choir_tune_json_set(header, name,
                        json_pack("{s:s, s:[I, I], s:[I, I]}", "dtype",
                                  choir_dtype_text(m->options->dtype), "shape", rows, cols,
                                  "data_offsets", begin, begin + bytes));
}

static choir_status save_weights(const choir_tune_merge *m, const char *folder)
{
    static const char file[] = "adapter_model.safetensors";
    char path[MAX_PATH_BYTES + 64];
    choir_save save;
    uint64_t first_byte;
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    for (size_t i = 0; i < m->n_modules; i++) {
        add_to_header(&header, m, &m->modules[i], false);
        add_to_header(&header, m, &m->modules[i], true);
    }
    snprintf(path, sizeof path, "%s/%s", folder, file);
    choir_status status = choir_save_begin(path, &save);
    if (status != CHOIR_OK) {
        json_decref(header);
        return status;
    }
    status = choir_tune_save_header(&save, file, header, &first_byte);
    if (status == CHOIR_OK) status = choir_tune_merge_write(m, first_byte, &save);
    if (status == CHOIR_OK) return choir_save_commit(&save);
    choir_save_abandon(&save);
    return status;
}

/* A folder's last name, for people. */
static const char *short_name(const char *folder, char *out, size_t bytes)
{
    size_t n = strlen(folder);
    while (n > 1 && folder[n - 1] == '/') n--;
    size_t begin = n;
    while (begin > 0 && folder[begin - 1] != '/') begin--;
    snprintf(out, bytes, "%.*s", (int)(n - begin), folder + begin);
    for (char *c = out; *c != '\0'; c++)
        if ((unsigned char)*c < ' ' || *c == '|') *c = '?';
    return out;
}

/* The recipe, and the parts' notices under their numbers: the parts keep their own licences. */
static choir_status save_readme(const choir_tune_merge *m, const char *folder)
{
    const choir_merge_options *o = m->options;
    const choir_merge_method_info *method = choir_merge_method_of(o->method);
    char text[32 << 10], name[128];
    size_t n = (size_t)snprintf(text, sizeof text,
                                "A LoRA adapter of rank %u, joined by Choir out of %u by the "
                                "method %s",
                                m->rank, o->n_adapters, method->text);
    if (method->pruning != CHOIR_MERGE_PRUNES_NOTHING)
        n += (size_t)snprintf(text + n, sizeof text - n, ", density %g", o->density);
    if (method->pruning == CHOIR_MERGE_PRUNES_RANDOM)
        n += (size_t)snprintf(text + n, sizeof text - n, ", seed %" PRIu64, o->seed);
    if (method->elects && o->by_frequency)
        n += (size_t)snprintf(text + n, sizeof text - n, ", signs elected by frequency");
    n += (size_t)snprintf(text + n, sizeof text - n,
                          ".\n\n| | adapter | weight | notices |\n|---|---|---:|---|\n");
    for (uint32_t i = 0; i < o->n_adapters; i++) {
        static const char *const notices[] = {"COPYRIGHT", "LICENSE", "NOTICE"};
        n += (size_t)snprintf(text + n, sizeof text - n, "| %u | %s | %g |", i + 1,
                              short_name(o->adapters[i].folder, name, sizeof name),
                              o->adapters[i].weight);
        for (size_t k = 0; k < sizeof notices / sizeof *notices; k++) {
            char to[32], path[MAX_PATH_BYTES + 64];
            snprintf(to, sizeof to, "%s.%u", notices[k], i + 1);
            CHOIR_TRY(choir_tune_copy_file(o->adapters[i].folder, notices[k], folder, to));
            snprintf(path, sizeof path, "%s/%s", folder, to);
            if (choir_file_exists(path))
                n += (size_t)snprintf(text + n, sizeof text - n, " %s", to);
        }
        n += (size_t)snprintf(text + n, sizeof text - n, " |\n");
    }
    return choir_tune_save_text(folder, "README.md", text, n);
}

static choir_status save_files(const choir_tune_merge *m, const char *folder)
{
    configs c = {.n = 0};
    choir_status status = parse_configs(m, &c);
    if (status == CHOIR_OK) status = save_config(m, &c, folder);
    for (uint32_t i = 0; i < CHOIR_MAX_MERGE; i++) json_decref(c.items[i]);
    if (status == CHOIR_OK) status = save_readme(m, folder);
    if (status == CHOIR_OK) status = save_weights(m, folder);
    return status;
}

choir_status choir_tune_merge_save(const choir_tune_merge *m)
{
    choir_tune_out_folder folder;
    CHOIR_TRY(choir_tune_check_space(m->options->out, m->data_bytes));
    CHOIR_TRY(choir_tune_out_folder_begin(m->options->out, &folder));
    choir_status status = save_files(m, folder.temporary);
    if (status == CHOIR_OK) status = choir_tune_out_folder_commit(&folder);
    if (status != CHOIR_OK) choir_tune_out_folder_abandon(&folder);
    return status;
}
