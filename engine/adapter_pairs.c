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

choir_status choir_adapter_note_pair(choir_adapter_reader *r, const choir_adapter_spot *spot,
                                     const choir_adapter_pair *p)
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
    const choir_adapter_place *place = spot->places[0];
    bool stacked = place->stacked && !choir_adapter_is_of_heads(place);
    uint32_t n = stacked ? choir_role_count(r->base, place->role) : 1;
    const choir_adapter_tensor *a = p->a, *b = p->b;
    choir_adapter_raw_pair *to = &list->items[list->n];
    *to = (choir_adapter_raw_pair){
        .role = place->role,
        .layer = spot->layer,
        .index = spot->index,
        .embedding = place->role == CHOIR_ROLE_EMBEDDING,
        .stacked = stacked,
        .n_experts = n,
        .rank = p->rank,
        .rows = (uint32_t)b->dims[0],
        .cols = (uint32_t)a->dims[1],
        .scale = p->scale,
        .a = {a->dtype, n * p->rank, (uint32_t)a->dims[1], a->data, a->bytes},
        .b = {b->dtype, (uint32_t)b->dims[0], n * p->rank, b->data, b->bytes}};
    to->swapped = stacked && to->rows == to->cols && p->swapped;
    size_t bytes = strlen(a->name) - strlen(choir_adapter_pair_ending(to->embedding, false)) - 1;
    char *name = choir_arena_alloc(r->arena, bytes + 1);
    if (name == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for a name", r->name);
    memcpy(name, a->name, bytes);
    name[bytes] = '\0';
    to->name = name;
    list->n++;
    if (p->rank > list->max_rank) list->max_rank = p->rank;
    return CHOIR_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const choir_adapter_raw_pair *)a)->name,
                  ((const choir_adapter_raw_pair *)b)->name);
}

const choir_adapter_raw_pair *choir_adapter_pairs_find(const choir_adapter_pairs *pairs,
                                                       const char *name)
{
    const choir_adapter_raw_pair key = {.name = name};
    return bsearch(&key, pairs->items, pairs->n, sizeof key, by_name);
}

/* Pairs are all that there may be, but for copies of the base's own embeddings: what else an
 * adapter says would be lost. */
static choir_status check_plain(const choir_adapter_pairs *pairs, const choir_adapter_data *data)
{
    if (strcmp(data->kind, "LoRA") != 0 && strcmp(data->kind, "rsLoRA") != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s is of the kind %s; adapters of LoRA and rsLoRA can be joined, since "
                          "theirs alone are sums",
                          pairs->folder, data->kind);
    const uint32_t copy = CHOIR_ADAPTER_HAS_COPY | CHOIR_ADAPTER_HAS_WEIGHT;
    for (size_t i = 0; i < data->n_changes; i++) {
        uint32_t has = data->changes[i].has;
        if ((has & CHOIR_ADAPTER_HAS_COPY) != 0) has &= ~copy;
        if (has != 0 && has != CHOIR_ADAPTER_HAS_LOW_RANK)
            return choir_fail(CHOIR_E_UNIMPLEMENTED,
                              "%s: beside LoRA it has whole weights or biases of %s in layer %u, "
                              "which cannot be joined",
                              pairs->folder, choir_role_text(data->changes[i].role),
                              data->changes[i].layer);
    }
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
