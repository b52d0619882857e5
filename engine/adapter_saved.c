/* What an adapter saves whole beside what it trains in small: modules_to_save, biases of `bias`,
 * and the embeddings that PEFT puts beside LoRA on them. */
#include "engine/adapter_read.h"

#include <string.h>

/* modules_to_save names modules by the end of their names, with all that is in them. */
static bool is_module_to_save(const choir_adapter_reader *r, const char *name)
{
    const json_t *list = choir_adapter_get(r, "modules_to_save");
    for (const char *dot = strchr(name, '.'); dot != NULL; dot = strchr(dot + 1, '.')) {
        char module[CHOIR_ADAPTER_MAX_OWN_NAME];
        snprintf(module, sizeof module, "%.*s", (int)(dot - name), name);
        for (size_t i = 0; i < json_array_size(list); i++) {
            const char *end = json_string_value(json_array_get(list, i));
            if (end != NULL && *end != '\0' &&
                (strcmp(module, end) == 0 || choir_adapter_ends_with(module, end)))
                return true;
        }
    }
    return false;
}

/* "all", or "lora_only" and its like: the biases of the base's modules are trained and saved. */
static bool saves_biases(const choir_adapter_reader *r)
{
    const char *bias = choir_adapter_string(r, "bias", "none");
    return strcmp(bias, "none") != 0;
}

static bool lacks_one(const choir_adapter_reader *r, choir_role role)
{
    static const uint64_t norms = CHOIR_ROLE_BIT(OUTPUT_NORM) | CHOIR_ROLE_BIT(ATTN_NORM) |
                                  CHOIR_ROLE_BIT(ATTN_POST_NORM) | CHOIR_ROLE_BIT(FFN_NORM) |
                                  CHOIR_ROLE_BIT(FFN_POST_NORM) | CHOIR_ROLE_BIT(ATTN_Q_NORM) |
                                  CHOIR_ROLE_BIT(ATTN_K_NORM);
    return r->base->family->norms_less_one && r->gguf == NULL && (norms >> role & 1) != 0;
}

static choir_status add_vector(choir_adapter_reader *r, const choir_adapter_spot *spot,
                               choir_adapter_tensor *t)
{
    uint64_t rows, cols;
    choir_adapter_whole_shape(r, spot->places[0], &rows, &cols);
    CHOIR_TRY(choir_adapter_expect(r, t, 0, cols));
    for (uint32_t i = 0; i < spot->n_places; i++) {
        const choir_adapter_place *place = spot->places[i];
        const choir_adapter_rows map = choir_adapter_rows_of(r, place);
        choir_role matrix = choir_adapter_role_of_bias(place->role);
        choir_adapter_place owner = *place;
        const float *values;
        if (matrix != CHOIR_N_ROLES) owner.role = matrix;
        choir_adapter_change c = choir_adapter_begin(r, &owner, spot->layer, spot->index);
        CHOIR_TRY(choir_adapter_read(r, t, &map, &values));
        if (lacks_one(r, place->role) && values != NULL)
            for (uint64_t k = 0; k < c.cols; k++) ((float *)values)[k] += 1; /* the reader's own */
        *(matrix != CHOIR_N_ROLES ? &c.bias : &c.weight) = values;
        c.has = matrix != CHOIR_N_ROLES ? CHOIR_ADAPTER_HAS_BIAS : CHOIR_ADAPTER_HAS_WEIGHT;
        CHOIR_TRY(choir_adapter_add(r, &c, t->name));
    }
    return CHOIR_OK;
}

static choir_status add_matrix(choir_adapter_reader *r, const choir_adapter_spot *spot,
                               choir_adapter_tensor *t, uint32_t more)
{
    uint64_t rows, cols;
    choir_adapter_whole_shape(r, spot->places[0], &rows, &cols);
    CHOIR_TRY(choir_adapter_expect(r, t, rows, cols));
    for (uint32_t i = 0; i < spot->n_places; i++) {
        const choir_adapter_rows map = choir_adapter_rows_of(r, spot->places[i]);
        choir_adapter_change c = choir_adapter_begin(r, spot->places[i], spot->layer, spot->index);
        CHOIR_TRY(choir_adapter_read(r, t, &map, &c.weight));
        c.has = CHOIR_ADAPTER_HAS_WEIGHT | more;
        CHOIR_TRY(choir_adapter_add(r, &c, t->name));
    }
    return CHOIR_OK;
}

/* Numbers of all experts: [experts, rows, cols], or [experts, cols, rows] where the file is
 * transposed, or [experts, n] of biases. */
static choir_status add_stacked(choir_adapter_reader *r, const choir_adapter_spot *spot,
                                choir_adapter_tensor *t)
{
    uint64_t rows, cols;
    const choir_adapter_place *first = spot->places[0];
    uint32_t n = choir_role_count(r->base, first->role);
    bool vector = choir_adapter_is_vector(first->role), turned = first->transposed;
    const float *from = NULL;
    choir_adapter_whole_shape(r, first, &rows, &cols);
    CHOIR_TRY(
        vector ? choir_adapter_expect(r, t, n, cols)
               : choir_adapter_expect_stack(r, t, n, turned ? cols : rows, turned ? rows : cols));
    t->used = true;
    if (!r->headers_only) CHOIR_TRY(choir_adapter_load(r, t, &from));
    if (vector) { /* each number is a row of its own */
        rows = cols;
        cols = 1;
    }
    for (uint32_t i = 0; i < spot->n_places; i++) {
        const choir_adapter_rows map = choir_adapter_rows_of(r, spot->places[i]);
        choir_role matrix = choir_adapter_role_of_bias(spot->places[i]->role);
        choir_adapter_place owner = *spot->places[i];
        float *to = NULL;
        if (matrix != CHOIR_N_ROLES) owner.role = matrix;
        if (from != NULL) CHOIR_TRY(choir_adapter_floats(r, (size_t)n * map.n * cols, &to));
        for (uint32_t e = 0; e < n; e++) {
            choir_adapter_change c = choir_adapter_begin(r, &owner, spot->layer, e);
            float *mine = to == NULL ? NULL : to + (size_t)e * map.n * cols;
            for (uint32_t k = 0; mine != NULL && k < map.n; k++)
                for (uint64_t x = 0; x < cols; x++) {
                    uint64_t row = choir_adapter_row(&map, k);
                    size_t at = turned && !vector ? x * rows + row : row * cols + x;
                    mine[k * cols + x] = from[(size_t)e * rows * cols + at];
                }
            *(vector ? &c.bias : &c.weight) = mine;
            c.has = vector ? CHOIR_ADAPTER_HAS_BIAS : CHOIR_ADAPTER_HAS_WEIGHT;
            CHOIR_TRY(choir_adapter_add(r, &c, t->name));
        }
    }
    return CHOIR_OK;
}

choir_status choir_adapter_add_whole(choir_adapter_reader *r, const choir_adapter_spot *spot,
                                     choir_adapter_tensor *t, uint32_t more)
{
    CHOIR_TRY(choir_adapter_check_spot(r, spot, t->name));
    if (choir_adapter_is_of_heads(spot->places[0])) return choir_adapter_refuse(r, t->name);
    if (spot->places[0]->stacked) return add_stacked(r, spot, t);
    if (choir_adapter_is_vector(spot->places[0]->role)) return add_vector(r, spot, t);
    return add_matrix(r, spot, t, more);
}

static choir_status read_one(choir_adapter_reader *r, choir_adapter_tensor *t)
{
    char name[CHOIR_ADAPTER_MAX_NAME], own[CHOIR_ADAPTER_MAX_OWN_NAME];
    bool wrapped = false;
    if (!choir_adapter_plain_name(t->name, name, sizeof name)) return CHOIR_OK;
    /* A module that is adapted has its own numbers one level further in. */
    static const char *const inner[] = {".weight", ".bias"};
    for (int i = 0; i < 2; i++)
        if (choir_adapter_strip(name, inner[i])) {
            wrapped = choir_adapter_strip(name, ".base_layer");
            strncat(name, inner[i], sizeof name - strlen(name) - 1);
        }
    choir_adapter_spot spot = choir_adapter_find_spot(r, name);
    if (spot.n_places == 0) return CHOIR_OK;
    choir_role role = spot.places[0]->role;
    bool table =
        role == CHOIR_ROLE_EMBEDDING || role == CHOIR_ROLE_HEAD || role == CHOIR_ROLE_HEAD_BIAS;
    bool saved = is_module_to_save(r, choir_adapter_own_name(t->name, name, own)) ||
                 (saves_biases(r) && choir_adapter_ends_with(name, ".bias"));
    if (!saved && !table) return CHOIR_OK;
    return choir_adapter_add_whole(r, &spot, t, table && wrapped ? CHOIR_ADAPTER_HAS_COPY : 0);
}

choir_status choir_adapter_read_saved(choir_adapter_reader *r)
{
    for (size_t i = 0; i < r->n_tensors; i++)
        if (!r->tensors[i].used) CHOIR_TRY(read_one(r, &r->tensors[i]));
    return CHOIR_OK;
}
