/* What the names in an adapter's file mean. A module has the name that the base's own files give
 * it, or the one that transformers has given it since: version 5 joins the experts of most families
 * in one parameter and calls some modules by another name. Both kinds of adapters are around,
 * whichever file of the base is served. */
#include "engine/adapter_read.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define LAYER "model.layers.%l."

/* Names of transformers 5 where a family's files have others. A name means nothing where the base
 * lacks the role.
 */
static const struct {
    choir_role role;
    choir_place place;
} newer[] = {
    {CHOIR_ROLE_ROUTER, {LAYER "mlp.gate.weight"}},
    {CHOIR_ROLE_ROUTER, {LAYER "mlp.router.weight"}},
    {CHOIR_ROLE_ROUTER, {LAYER "block_sparse_moe.router.weight"}},
    {CHOIR_ROLE_ROUTER_CORRECTION, {LAYER "mlp.e_score_correction_bias"}},
    {CHOIR_ROLE_ROUTER_CORRECTION, {LAYER "mlp.gate.moe_statics.e_score_correction_bias"}},
    {CHOIR_ROLE_EXPERT_GATE,
     {LAYER "block_sparse_moe.experts.gate_up_proj", CHOIR_PART_FIRST_HALF}},
    {CHOIR_ROLE_EXPERT_UP, {LAYER "block_sparse_moe.experts.gate_up_proj", CHOIR_PART_SECOND_HALF}},
    {CHOIR_ROLE_EXPERT_DOWN, {LAYER "block_sparse_moe.experts.down_proj"}},
};

static int by_pattern(const void *a, const void *b)
{
    const choir_adapter_place *x = a, *y = b;
    int order = strcmp(x->pattern, y->pattern);
    return order != 0 ? order : x->order < y->order ? -1 : x->order > y->order;
}

static choir_status add_place(choir_adapter_reader *r, choir_role role, const choir_place *p)
{
    for (size_t i = 0; i < r->n_places;
         i++) /* the family's own word counts more than the common one */
        if (r->places[i].role == role && strcmp(r->places[i].pattern, p->name) == 0)
            return CHOIR_OK;
    if (r->n_places == r->places_capacity) {
        size_t capacity = r->places_capacity == 0 ? 128 : 2 * r->places_capacity;
        void *places = choir_realloc(CHOIR_MEM_OTHER, r->places, capacity * sizeof *r->places);
        if (places == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", r->name);
        r->places = places;
        r->places_capacity = capacity;
    }
    choir_adapter_place *place = &r->places[r->n_places];
    bool each = choir_role_count(r->base, role) > 1 || choir_role_is_routed(role);
    *place = (choir_adapter_place){.pattern = choir_strdup(CHOIR_MEM_OTHER, p->name),
                                   .role = role,
                                   .part = p->part,
                                   .transposed = p->transposed,
                                   .stacked = each && strstr(p->name, "%e") == NULL,
                                   .order = (uint32_t)r->n_places};
    if (place->pattern == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory", r->name);
    r->n_places++;
    return CHOIR_OK;
}

choir_status choir_adapter_make_places(choir_adapter_reader *r, bool gguf)
{
    for (uint32_t role = 0; role < CHOIR_N_ROLES; role++)
        for (uint32_t i = 0; i < CHOIR_MAX_PLACES; i++) {
            const choir_place *p = choir_family_place(r->base->family, role, gguf, i);
            if (p == NULL) continue;
            CHOIR_TRY(add_place(r, role, p));
            char name[CHOIR_ADAPTER_MAX_NAME];
            const char *old = strstr(p->name, ".block_sparse_moe.");
            if (old == NULL) continue;
            snprintf(name, sizeof name, "%.*s.mlp.%s", (int)(old - p->name), p->name,
                     old + strlen(".block_sparse_moe."));
            CHOIR_TRY(add_place(r, role, &(choir_place){name, p->part, p->transposed}));
        }
    for (size_t i = 0; !gguf && i < sizeof newer / sizeof *newer; i++)
        CHOIR_TRY(add_place(r, newer[i].role, &newer[i].place));
    qsort(r->places, r->n_places, sizeof *r->places, by_pattern);
    return CHOIR_OK;
}

void choir_adapter_free_places(choir_adapter_reader *r)
{
    for (size_t i = 0; i < r->n_places; i++) choir_free(r->places[i].pattern);
    choir_free(r->places);
    r->places = NULL;
    r->n_places = 0;
}

/* A number without leading zeros and its end; NULL: none here. */
static const char *number(const char *p, uint32_t *out)
{
    if (*p < '0' || *p > '9' || (p[0] == '0' && p[1] >= '0' && p[1] <= '9')) return NULL;
    uint64_t n = 0;
    for (; *p >= '0' && *p <= '9'; p++)
        if ((n = n * 10 + (uint64_t)(*p - '0')) > UINT32_MAX) return NULL;
    *out = (uint32_t)n;
    return p;
}

/* "blk.7.ffn_up.3" as "blk.%l.ffn_up.%e", with 7 and 3: the first number is the layer, the second
 * the expert.
 */
static bool pattern_of(const char *name, char *out, size_t bytes, uint32_t *layer, uint32_t *index)
{
    uint32_t n_numbers = 0, value;
    size_t n = 0;
    *layer = *index = 0;
    for (const char *p = name; *p != '\0';) {
        const char *end = p > name && p[-1] == '.' ? number(p, &value) : NULL;
        if (n + 3 > bytes) return false;
        if (end != NULL && (*end == '.' || *end == '\0') && n_numbers < 2) {
            *(n_numbers == 0 ? layer : index) = value;
            out[n++] = '%';
            out[n++] = n_numbers++ == 0 ? 'l' : 'e';
            p = end;
        } else {
            out[n++] = *p++;
        }
    }
    out[n] = '\0';
    return true;
}

choir_adapter_spot choir_adapter_find_spot(const choir_adapter_reader *r, const char *name)
{
    char pattern[CHOIR_ADAPTER_MAX_NAME];
    choir_adapter_spot spot = {0};
    if (!pattern_of(name, pattern, sizeof pattern, &spot.layer, &spot.index)) return spot;
    size_t low = 0, high = r->n_places;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (strcmp(r->places[middle].pattern, pattern) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < r->n_places && strcmp(r->places[low].pattern, pattern) == 0; low++)
        if (spot.n_places < CHOIR_ADAPTER_MAX_PARTS) spot.places[spot.n_places++] = &r->places[low];
    return spot;
}

/* The gate of a shared expert is a matrix of one row, which roles know as a vector. */
bool choir_adapter_is_vector(choir_role role)
{
    return choir_role_is_vector(role) && role != CHOIR_ROLE_SHARED_ROUTER;
}

/* gate_up_proj before down_proj, as transformers' modules have them. */
static int by_role(const void *a, const void *b)
{
    const choir_adapter_place *const *x = a, *const *y = b;
    return (*x)->role < (*y)->role ? -1 : (*x)->role > (*y)->role;
}

uint32_t choir_adapter_stacked(const choir_adapter_reader *r, const char *module,
                               char out[CHOIR_ADAPTER_MAX_STACKED][CHOIR_ADAPTER_MAX_NAME])
{
    char pattern[CHOIR_ADAPTER_MAX_NAME];
    const choir_adapter_place *found[16];
    uint32_t layer, index, n_found = 0, n = 0;
    if (!pattern_of(module, pattern, sizeof pattern, &layer, &index)) return 0;
    size_t bytes = strlen(pattern);
    for (size_t i = 0; i < r->n_places; i++) {
        const choir_adapter_place *p = &r->places[i];
        bool inside = strncmp(p->pattern, pattern, bytes) == 0 && p->pattern[bytes] == '.' &&
                      strchr(p->pattern + bytes + 1, '.') == NULL;
        if (inside && p->stacked && !choir_adapter_is_vector(p->role) && n_found < 16)
            found[n_found++] = p;
    }
    qsort(found, n_found, sizeof *found, by_role);
    for (uint32_t i = 0; i < n_found && n < CHOIR_ADAPTER_MAX_STACKED; i++) {
        char name[CHOIR_ADAPTER_MAX_NAME];
        bool again = false;
        snprintf(name, sizeof name, "%.180s%.60s", module, found[i]->pattern + bytes);
        for (uint32_t k = 0; k < n; k++) again = again || strcmp(out[k], name) == 0;
        if (!again) snprintf(out[n++], CHOIR_ADAPTER_MAX_NAME, "%s", name);
    }
    return n;
}

choir_status choir_adapter_check_spot(const choir_adapter_reader *r, const choir_adapter_spot *spot,
                                      const char *tensor)
{
    const choir_model_config *c = r->base;
    const choir_adapter_place *p = spot->places[0];
    if (choir_role_per_layer(p->role) && spot->layer >= c->n_layers)
        return choir_fail(CHOIR_E_INVALID,
                          "%s: tensor '%.200s' is of layer %u, the base has %u layers", r->name,
                          tensor, spot->layer, c->n_layers);
    for (uint32_t i = 0; i < spot->n_places; i++) {
        choir_role role = spot->places[i]->role;
        bool of_heads = role == CHOIR_ROLE_ATTN_K_B || role == CHOIR_ROLE_ATTN_V_B;
        if (of_heads && spot->places[i]->part == CHOIR_PART_ALL)
            return choir_fail(CHOIR_E_UNIMPLEMENTED,
                              "%s: tensor '%.200s' is of one part of latent attention's kv_b_proj; "
                              "Choir adapts it as "
                              "a whole, in PEFT's layout",
                              r->name, tensor);
        /* A tied head is the embedding's matrix, and can be adapted as if it were its own. */
        bool has = choir_role_in_layer(c, role, spot->layer) || role == CHOIR_ROLE_HEAD;
        if (!has)
            return choir_fail(
                CHOIR_E_INVALID,
                "%s: tensor '%.200s' is for %s of layer %u, which the base (%s) lacks", r->name,
                tensor, choir_role_text(role), spot->layer, c->family->name);
        if (!spot->places[i]->stacked && spot->index >= choir_role_count(c, role))
            return choir_fail(CHOIR_E_INVALID,
                              "%s: tensor '%.200s' is of expert %u, the base has %u experts",
                              r->name, tensor, spot->index, choir_role_count(c, role));
    }
    return CHOIR_OK;
}

static uint64_t whole_of(const choir_model_config *c, choir_part part, uint64_t n)
{
    switch (part) {
    case CHOIR_PART_FIRST_HALF:
    case CHOIR_PART_SECOND_HALF:
    case CHOIR_PART_EVEN:
    case CHOIR_PART_ODD:
        return 2 * n;
    case CHOIR_PART_Q:
    case CHOIR_PART_K:
    case CHOIR_PART_V:
        return (c->n_heads + 2 * (uint64_t)c->n_kv_heads) * c->head_dim;
    default:
        return n;
    }
}

void choir_adapter_whole_shape(const choir_adapter_reader *r, const choir_adapter_place *place,
                               uint64_t *rows, uint64_t *cols)
{
    choir_role_shape(r->base, place->role, rows, cols);
    uint64_t *n = choir_adapter_is_vector(place->role) ? cols : rows;
    *n = whole_of(r->base, place->part, *n);
}

choir_role choir_adapter_role_of_bias(choir_role role)
{
    static const struct {
        choir_role bias, matrix;
    } pairs[] = {
#define PAIR(name) {CHOIR_ROLE_##name##_BIAS, CHOIR_ROLE_##name}
        PAIR(HEAD),      PAIR(ATTN_Q),      PAIR(ATTN_K),      PAIR(ATTN_V),    PAIR(ATTN_OUT),
        PAIR(FFN_GATE),  PAIR(FFN_UP),      PAIR(FFN_DOWN),    PAIR(ROUTER),    PAIR(EXPERT_GATE),
        PAIR(EXPERT_UP), PAIR(EXPERT_DOWN), PAIR(SHARED_GATE), PAIR(SHARED_UP), PAIR(SHARED_DOWN),
#undef PAIR
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (pairs[i].bias == role) return pairs[i].matrix;
    return CHOIR_N_ROLES;
}

/* llama.cpp's converter gives the heads of q and k of some families the order of pairs, and the
 * base's rope says which order is served. */
choir_adapter_rows choir_adapter_rows_of(const choir_adapter_reader *r,
                                         const choir_adapter_place *place)
{
    const choir_model_config *c = r->base;
    uint64_t rows, cols;
    choir_role_shape(c, place->role, &rows, &cols);
    bool vector = choir_adapter_is_vector(place->role);
    choir_role role = vector ? choir_adapter_role_of_bias(place->role) : place->role;
    uint64_t n = vector ? cols : rows;
    choir_adapter_rows out = {.part = place->part,
                              .n = (uint32_t)n,
                              .whole = (uint32_t)whole_of(c, place->part, n),
                              .queries = c->n_heads * c->head_dim,
                              .keys = c->n_kv_heads * c->head_dim,
                              .head_dim = c->head_dim};
    bool permuted = c->family->gguf_interleaved_rope && !c->family->properties.rope.interleaved;
    if (!permuted || (role != CHOIR_ROLE_ATTN_Q && role != CHOIR_ROLE_ATTN_K)) return out;
    if (c->rope.interleaved && r->gguf == NULL) out.order = CHOIR_ROWS_OF_HALVES;
    if (!c->rope.interleaved && r->gguf != NULL) out.order = CHOIR_ROWS_OF_PAIRS;
    return out;
}

uint32_t choir_adapter_row(const choir_adapter_rows *rows, uint32_t i)
{
    uint32_t in_head = i % rows->head_dim, half = rows->head_dim / 2;
    if (rows->order == CHOIR_ROWS_OF_HALVES) i = i - in_head + in_head % 2 * half + in_head / 2;
    if (rows->order == CHOIR_ROWS_OF_PAIRS) i = i - in_head + 2 * (in_head % half) + in_head / half;
    switch (rows->part) {
    case CHOIR_PART_SECOND_HALF:
        return rows->n + i;
    case CHOIR_PART_EVEN:
        return 2 * i;
    case CHOIR_PART_ODD:
        return 2 * i + 1;
    case CHOIR_PART_K:
        return rows->queries + i;
    case CHOIR_PART_V:
        return rows->queries + rows->keys + i;
    default:
        return i;
    }
}

bool choir_adapter_rows_move(const choir_adapter_rows *rows)
{
    return rows->order != CHOIR_ROWS_AS_THEY_ARE ||
           (rows->part != CHOIR_PART_ALL && rows->part != CHOIR_PART_FIRST_HALF &&
            rows->part != CHOIR_PART_Q);
}
