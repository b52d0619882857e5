/* The list is made by the readers of adapter_lora.c as they check each pair against the base. */
#include "engine/adapter_pairs.h"

#include "engine/adapter_read.h"

#include <stdlib.h>
#include <string.h>

/* What a list keeps alive. */
typedef struct keeper {
    choir_adapter_pairs pairs;
    choir_adapter_data *data; /* the names */
    char *config;
    choir_map map;
} keeper;

const char *choir_adapter_pair_ending(bool embedding, bool b)
{
    static const char *const endings[2][2] = {{"lora_A.weight", "lora_B.weight"},
                                              {"lora_embedding_A", "lora_embedding_B"}};
    return endings[embedding][b];
}

choir_status choir_adapter_note_pair(choir_adapter_reader *r, const choir_adapter_pair *pair,
                                     const choir_adapter_tensor *a, const choir_adapter_tensor *b)
{
    choir_adapter_pairs *list = r->pairs;
    if (list == NULL) return CHOIR_OK;
    if (list->n == r->pairs_capacity) {
        size_t capacity = list->n == 0 ? 256 : 2 * list->n;
        void *items = choir_realloc(CHOIR_MEM_OTHER, list->items, capacity * sizeof *list->items);
        if (items == NULL)
            return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for a list of pairs", r->name);
        list->items = items;
        r->pairs_capacity = capacity;
    }
    size_t n = strlen(a->name) - strlen(choir_adapter_pair_ending(pair->embedding, false)) - 1;
    char *name = choir_arena_alloc(r->arena, n + 1);
    if (name == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for a name", r->name);
    memcpy(name, a->name, n);
    name[n] = '\0';
    choir_adapter_pair *to = &list->items[list->n++];
    uint32_t ranks = pair->rank * pair->n_experts;
    *to = *pair;
    to->name = name;
    to->a = (choir_tensor){a->dtype, ranks, pair->cols, a->data, a->bytes};
    to->b = (choir_tensor){b->dtype, pair->rows, ranks, b->data, b->bytes};
    if (pair->rank > list->max_rank) list->max_rank = pair->rank;
    return CHOIR_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const choir_adapter_pair *)a)->name, ((const choir_adapter_pair *)b)->name);
}

const choir_adapter_pair *choir_adapter_pairs_find(const choir_adapter_pairs *pairs,
                                                   const char *name)
{
    const choir_adapter_pair key = {.name = name};
    return bsearch(&key, pairs->items, pairs->n, sizeof key, by_name);
}

/* Pairs are all that there may be: what else an adapter says would be lost. */
static choir_status check_plain(const choir_adapter_pairs *pairs, const choir_adapter_data *data)
{
    if (strcmp(data->kind, "LoRA") != 0 && strcmp(data->kind, "rsLoRA") != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s is of the kind %s; adapters of LoRA and rsLoRA can be joined, since "
                          "theirs alone are sums",
                          pairs->folder, data->kind);
    for (size_t i = 0; i < data->n_changes; i++)
        if (data->changes[i].has != CHOIR_ADAPTER_HAS_LOW_RANK)
            return choir_fail(CHOIR_E_UNIMPLEMENTED,
                              "%s: beside LoRA it has whole weights or biases of %s in layer %u, "
                              "which cannot be joined",
                              pairs->folder, choir_role_text(data->changes[i].role),
                              data->changes[i].layer);
    return CHOIR_OK;
}

choir_status choir_adapter_pairs_open(const choir_model_config *base, const char *folder,
                                      choir_adapter_pairs **out)
{
    choir_adapter_source source;
    if (!choir_folder_exists(folder))
        return choir_fail(CHOIR_E_NOT_FOUND, "%s is no folder of PEFT's", folder);
    keeper *k = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *k);
    if (k == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for the adapter", folder);
    k->pairs.folder = folder;
    k->pairs.memory = k;
    choir_status status = choir_adapter_open_files(folder, &source, &k->config, &k->map);
    if (status != CHOIR_OK) {
        choir_free(k);
        return status;
    }
    k->pairs.config = k->config;
    k->pairs.config_bytes = source.config_bytes;
    status = choir_adapter_list_pairs(base, &source, &k->pairs, &k->data);
    if (status == CHOIR_OK) status = check_plain(&k->pairs, k->data);
    if (status != CHOIR_OK) {
        choir_adapter_pairs_close(&k->pairs);
        return status;
    }
    qsort(k->pairs.items, k->pairs.n, sizeof *k->pairs.items, by_name);
    *out = &k->pairs;
    return CHOIR_OK;
}

void choir_adapter_pairs_close(choir_adapter_pairs *pairs)
{
    if (pairs == NULL) return;
    keeper *k = pairs->memory;
    choir_adapter_data_free(k->data);
    choir_map_close(&k->map);
    choir_free(k->config);
    choir_free(k->pairs.items);
    choir_free(k);
}
