/* LoRA as PEFT saves it: W + scale B A (Hu et al. 2021), scale = alpha / r, or alpha / sqrt(r) with
 * rsLoRA (Kalajdzievski 2023); magnitudes beside it are DoRA's (Liu et al. 2024). Pairs lie beside
 * a module's name, "X.lora_A.weight"; beside the name of a module of experts they are of all
 * experts at once, of one of its parameters (target_parameters). */
#include "engine/adapter_pattern.h"
#include "engine/adapter_read.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <strings.h>

typedef struct lora {
    choir_adapter_reader *reader;
    choir_adapter_patterns *ranks, *alphas;
    double rank, alpha; /* where no pattern says otherwise */
    bool rslora, dora, bias;
    int experts_version;
} lora;

/* One pair, and what lies beside it. */
typedef struct pair {
    choir_adapter_tensor *a, *b, *b_bias, *magnitude;
    char module[CHOIR_ADAPTER_MAX_NAME]; /* as patterns know it */
    uint32_t rank;
    float scale;
} pair;

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

/* Variants to come are switched on as those that there are: by use_X or X_config. What PEFT writes
 * of the way in which an adapter was started or trained says nothing of what it computes. */
static choir_status check_variants(const choir_adapter_reader *r)
{
    static const char *const refused[] = {"layer_replication", "use_qalora",
                                          "use_bdlora",        "arrow_config",
                                          "monteclora_config", "velora_config",
                                          "kasa_config",       "trainable_token_indices",
                                          "megatron_config",   NULL};
    static const char *const known[] = {"use_rslora",     "use_dora",     "loftq_config",
                                        "eva_config",     "corda_config", "lora_ga_config",
                                        "runtime_config", "use_cache",    NULL};
    CHOIR_TRY(choir_adapter_refuse_keys(r, refused));
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)r->config, key, value)
    {
        size_t n = strlen(key);
        bool variant =
            strncmp(key, "use_", 4) == 0 || (n > 7 && strcmp(key + n - 7, "_config") == 0);
        for (size_t i = 0; variant && known[i] != NULL; i++) variant = strcmp(key, known[i]) != 0;
        const char *const keys[] = {key, NULL};
        if (variant) CHOIR_TRY(choir_adapter_refuse_keys(r, keys));
    }
    const json_t *init = choir_adapter_get(r, "init_lora_weights");
    if (keeps_base(init)) return CHOIR_OK;
    return choir_fail(
        CHOIR_E_UNIMPLEMENTED,
        "%s: init_lora_weights is \"%.40s\", which trains beside changed weights of the "
        "base; save the adapter with PEFT's path_initial_model_for_weight_conversion",
        r->name, json_string_value(init));
}

static choir_status read_number(const choir_adapter_reader *r, const char *key, double *out)
{
    const json_t *value = choir_adapter_get(r, key);
    *out = json_number_value(value);
    if (json_is_number(value)) return CHOIR_OK;
    return choir_fail(CHOIR_E_FORMAT, "%s: adapter_config.json has no number for %s", r->name, key);
}

/* Versions of PEFT differ in which side of stacked experts they take for the inputs. Before 0.19 it
 * was always the first; 0.19.0 had the flag is_transposed the wrong way round. */
static int experts_version(const choir_adapter_reader *r)
{
    unsigned major = 0, minor = 0, patch = 0;
    const char *version = choir_adapter_string(r, "peft_version", "0");
    int n = sscanf(version, "%5u.%5u.%5u", &major, &minor, &patch);
    if (n < 1 || (major == 0 && minor < 19)) return 0;
    return major == 0 && minor == 19 && patch == 0 ? 1 : 2;
}

/* Where an activated adapter begins (Greenewald et al. 2025). */
static choir_status read_invocation(choir_adapter_reader *r)
{
    const json_t *tokens = choir_adapter_get(r, "alora_invocation_tokens");
    if (choir_adapter_is_off(tokens)) return CHOIR_OK;
    size_t n = json_array_size(tokens);
    if (!json_is_array(tokens) || n > CHOIR_ADAPTER_MAX_INVOCATION)
        return choir_fail(CHOIR_E_INVALID,
                          "%s: alora_invocation_tokens is no list of at most %d tokens", r->name,
                          CHOIR_ADAPTER_MAX_INVOCATION);
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(tokens, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= r->base->vocab)
            return choir_fail(CHOIR_E_INVALID,
                              "%s: token %zu of alora_invocation_tokens is none of the base's %u",
                              r->name, i, r->base->vocab);
        r->data->invocation[r->data->n_invocation++] = (uint32_t)json_integer_value(id);
    }
    return CHOIR_OK;
}

static choir_status read_config(lora *l)
{
    choir_adapter_reader *r = l->reader;
    CHOIR_TRY(check_variants(r));
    CHOIR_TRY(read_number(r, "r", &l->rank));
    CHOIR_TRY(read_number(r, "lora_alpha", &l->alpha));
    CHOIR_TRY(choir_adapter_flag(r, "use_rslora", &l->rslora));
    CHOIR_TRY(choir_adapter_flag(r, "use_dora", &l->dora));
    CHOIR_TRY(choir_adapter_flag(r, "lora_bias", &l->bias));
    CHOIR_TRY(choir_adapter_patterns_make(r, "rank_pattern", &l->ranks));
    CHOIR_TRY(choir_adapter_patterns_make(r, "alpha_pattern", &l->alphas));
    if (l->dora && l->bias)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: use_dora and lora_bias are both set, which PEFT refuses too",
                          r->name);
    l->experts_version = experts_version(r);
    CHOIR_TRY(read_invocation(r));
    const char *kind = r->data->n_invocation > 0 ? "aLoRA"
                       : l->dora                 ? "DoRA"
                       : l->rslora               ? "rsLoRA"
                                                 : "LoRA";
    snprintf(r->data->kind, sizeof r->data->kind, "%s", kind);
    return CHOIR_OK;
}

static choir_status set_scale(const lora *l, pair *p)
{
    const choir_adapter_reader *r = l->reader;
    double rank = l->rank, alpha = l->alpha;
    CHOIR_TRY(choir_adapter_patterns_find(r, l->ranks, p->module, &rank));
    CHOIR_TRY(choir_adapter_patterns_find(r, l->alphas, p->module, &alpha));
    if (!(rank >= 1 && rank <= CHOIR_ADAPTER_MAX_RANK) || rank != floor(rank))
        return choir_fail(CHOIR_E_INVALID,
                          "%s: r is %g for %s, must be a whole number from 1 to %d", r->name, rank,
                          p->module, CHOIR_ADAPTER_MAX_RANK);
    p->rank = (uint32_t)rank;
    p->scale = (float)(alpha / (l->rslora ? sqrt(rank) : rank));
    if (!isfinite(p->scale))
        return choir_fail(CHOIR_E_INVALID, "%s: lora_alpha is %g for %s", r->name, alpha,
                          p->module);
    return CHOIR_OK;
}

/* The tensor of the same module with another ending; NULL: there is none. */
static choir_adapter_tensor *beside(const lora *l, const char *tensor, const char *suffix,
                                    const char *other)
{
    char name[CHOIR_ADAPTER_MAX_NAME + 64];
    size_t n = strlen(tensor) - strlen(suffix);
    if ((size_t)snprintf(name, sizeof name, "%.*s%s", (int)n, tensor, other) >= sizeof name)
        return NULL;
    return choir_adapter_find(l->reader, name);
}

static choir_status find_pair(const lora *l, choir_adapter_tensor *a, const char *suffix, pair *p)
{
    bool embedding = strstr(suffix, "embedding") != NULL;
    const char *other = embedding ? ".lora_embedding_B" : ".lora_B.weight";
    p->a = a;
    p->b = beside(l, a->name, suffix, other);
    if (p->b == NULL)
        return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has no %s beside it",
                          l->reader->name, a->name, other + 1);
    p->b_bias = l->bias ? beside(l, a->name, suffix, ".lora_B.bias") : NULL;
    if (l->dora) {
        p->magnitude = beside(l, a->name, suffix, ".lora_magnitude_vector");
        if (p->magnitude == NULL)
            p->magnitude = beside(l, a->name, suffix, ".lora_magnitude_vector.weight");
        if (p->magnitude == NULL)
            return choir_fail(CHOIR_E_INVALID,
                              "%s: tensor '%.200s' has no lora_magnitude_vector beside it",
                              l->reader->name, a->name);
    }
    return CHOIR_OK;
}

/* The pair of one matrix, or of several that lie in one: they share A, and each has its rows of B.
 */
static choir_status add_module(const lora *l, const choir_adapter_spot *spot, pair *p)
{
    choir_adapter_reader *r = l->reader;
    const float *a;
    uint64_t rows, cols;
    choir_adapter_whole_shape(r, spot->places[0], &rows, &cols);
    CHOIR_TRY(choir_adapter_expect(r, p->a, p->rank, cols));
    CHOIR_TRY(choir_adapter_expect(r, p->b, rows, p->rank));
    if (p->b_bias != NULL) CHOIR_TRY(choir_adapter_expect(r, p->b_bias, 0, rows));
    if (p->magnitude != NULL) CHOIR_TRY(choir_adapter_expect(r, p->magnitude, 0, rows));
    const choir_adapter_pair raw = {.n_experts = 1,
                                    .rank = p->rank,
                                    .rows = (uint32_t)rows,
                                    .cols = (uint32_t)cols,
                                    .scale = p->scale};
    CHOIR_TRY(choir_adapter_note_pair(r, &raw, p->a, p->b));
    CHOIR_TRY(choir_adapter_read(r, p->a, NULL, &a));
    for (uint32_t i = 0; i < spot->n_places; i++) {
        const choir_adapter_rows map = choir_adapter_rows_of(r, spot->places[i]);
        choir_adapter_change c = choir_adapter_begin(r, spot->places[i], spot->layer, spot->index);
        c.rank = p->rank;
        c.scale = p->scale;
        c.a = a;
        c.has = CHOIR_ADAPTER_HAS_LOW_RANK;
        CHOIR_TRY(choir_adapter_read(r, p->b, &map, &c.b));
        if (p->b_bias != NULL) {
            CHOIR_TRY(choir_adapter_read(r, p->b_bias, &map, &c.b_bias));
            c.has |= CHOIR_ADAPTER_HAS_B_BIAS;
        }
        if (p->magnitude != NULL) {
            CHOIR_TRY(choir_adapter_read(r, p->magnitude, &map, &c.magnitude));
            c.has |= CHOIR_ADAPTER_HAS_MAGNITUDE;
        }
        CHOIR_TRY(choir_adapter_add(r, &c, p->a->name));
    }
    return CHOIR_OK;
}

/* A is [rank, vocab] and B [hidden, rank]: a token's row of the table and its column of A. */
static choir_status add_embedding(const lora *l, const choir_adapter_spot *spot, pair *p)
{
    choir_adapter_reader *r = l->reader;
    choir_adapter_change c = choir_adapter_begin(r, spot->places[0], 0, 0);
    if (c.role != CHOIR_ROLE_EMBEDDING) return choir_adapter_refuse(r, p->a->name);
    c.rank = p->rank;
    c.scale = p->scale;
    c.has = CHOIR_ADAPTER_HAS_LOW_RANK;
    CHOIR_TRY(choir_adapter_expect(r, p->a, p->rank, c.rows));
    CHOIR_TRY(choir_adapter_expect(r, p->b, c.cols, p->rank));
    const choir_adapter_pair raw = {.embedding = true,
                                    .n_experts = 1,
                                    .rank = p->rank,
                                    .rows = c.cols,
                                    .cols = c.rows,
                                    .scale = p->scale};
    CHOIR_TRY(choir_adapter_note_pair(r, &raw, p->a, p->b));
    CHOIR_TRY(choir_adapter_read(r, p->a, NULL, &c.a));
    CHOIR_TRY(choir_adapter_read(r, p->b, NULL, &c.b));
    if (p->magnitude != NULL) {
        CHOIR_TRY(choir_adapter_expect(r, p->magnitude, 0, c.cols));
        CHOIR_TRY(choir_adapter_read(r, p->magnitude, NULL, &c.magnitude));
        c.has |= CHOIR_ADAPTER_HAS_MAGNITUDE;
    }
    return choir_adapter_add(r, &c, p->a->name);
}

/* All experts' pairs: expert e has the rows e r … of the one whose rows are ranks, and of the
 * other's columns every so-manieth from e on. PEFT puts the inputs beside A, except where it takes
 * the parameter for its transpose: A and B change their sides then. */
typedef struct stack {
    uint32_t n_experts, rank;
    uint64_t rows, cols; /* of one expert's whole matrix */
    bool swapped;
} stack;

static choir_status shape_of_stack(const lora *l, const choir_adapter_place *place, const pair *p,
                                   stack *s)
{
    const choir_adapter_reader *r = l->reader;
    s->n_experts = choir_role_count(r->base, place->role);
    s->rank = p->rank;
    choir_adapter_whole_shape(r, place, &s->rows, &s->cols);
    uint64_t ranks = (uint64_t)s->n_experts * p->rank;
    bool could_swap = p->a->n_dims == 2 && p->b->n_dims == 2 && p->a->dims[1] == s->rows &&
                      p->b->dims[0] == s->cols;
    /* A square matrix fits both ways, and what wrote the file says which. */
    bool hidden = place->transposed && r->base->family->hides_transposed;
    bool turned = l->experts_version == 0   ? !place->transposed
                  : l->experts_version == 1 ? !hidden
                                            : hidden;
    s->swapped = could_swap && (s->rows != s->cols || turned);
    CHOIR_TRY(choir_adapter_expect(r, p->a, ranks, s->swapped ? s->rows : s->cols));
    return choir_adapter_expect(r, p->b, s->swapped ? s->cols : s->rows, ranks);
}

/* Rows e r … e r + r of the pair's A, as A of expert e: [rank, n]. */
static void copy_rows(const stack *s, const float *from, uint64_t n, uint32_t e, float *to)
{
    memcpy(to, from + (size_t)e * s->rank * n, (size_t)s->rank * n * sizeof *to);
}

/* Makes the arrays that the experts' changes have, [experts, n] each. */
static choir_status make_arrays(choir_adapter_reader *r, const stack *s, uint64_t n, float **out)
{
    size_t each;
    *out = NULL;
    if (r->headers_only) return CHOIR_OK;
    if (__builtin_mul_overflow((size_t)s->n_experts, (size_t)n, &each)) each = SIZE_MAX;
    return choir_adapter_floats(r, each, out);
}

/* B of all experts, from the tensor whose rows are outputs: row i of the change is row map(i), and
 * its numbers of expert e are every n_experts-th. */
static void gather_outputs(const stack *s, const choir_adapter_rows *map, const float *from,
                           float *to)
{
    size_t ranks = (size_t)s->n_experts * s->rank;
    for (uint32_t i = 0; i < map->n; i++) {
        const float *row = from + choir_adapter_row(map, i) * ranks;
        for (uint32_t e = 0; e < s->n_experts; e++)
            for (uint32_t k = 0; k < s->rank; k++)
                to[((size_t)e * map->n + i) * s->rank + k] = row[(size_t)k * s->n_experts + e];
    }
}

/* The same from the tensor whose rows are ranks. */
static void gather_ranks(const stack *s, const choir_adapter_rows *map, const float *from,
                         float *to)
{
    for (uint32_t e = 0; e < s->n_experts; e++)
        for (uint32_t k = 0; k < s->rank; k++) {
            const float *row = from + ((size_t)e * s->rank + k) * s->rows;
            for (uint32_t i = 0; i < map->n; i++)
                to[((size_t)e * map->n + i) * s->rank + k] = row[choir_adapter_row(map, i)];
        }
}

/* A of all experts, [experts, rank, cols], in either case. */
static void gather_inputs(const stack *s, const float *from, float *to)
{
    size_t ranks = (size_t)s->n_experts * s->rank;
    for (uint32_t e = 0; e < s->n_experts; e++) {
        float *a = to + (size_t)e * s->rank * s->cols;
        if (!s->swapped) copy_rows(s, from, s->cols, e, a);
        for (uint32_t k = 0; s->swapped && k < s->rank; k++)
            for (uint64_t i = 0; i < s->cols; i++)
                a[k * s->cols + i] = from[i * ranks + (size_t)k * s->n_experts + e];
    }
}

static choir_status add_stack(const lora *l, const choir_adapter_spot *spot, pair *p)
{
    choir_adapter_reader *r = l->reader;
    stack s;
    float *a, *b;
    const float *from;
    CHOIR_TRY(shape_of_stack(l, spot->places[0], p, &s));
    const choir_adapter_pair raw = {.stacked = true,
                                    .swapped = s.swapped,
                                    .n_experts = s.n_experts,
                                    .rank = s.rank,
                                    .rows = (uint32_t)(s.swapped ? s.cols : s.rows),
                                    .cols = (uint32_t)(s.swapped ? s.rows : s.cols),
                                    .scale = p->scale};
    CHOIR_TRY(choir_adapter_note_pair(r, &raw, p->a, p->b));
    p->a->used = p->b->used = true;
    CHOIR_TRY(make_arrays(r, &s, s.rank * s.cols, &a));
    if (a != NULL) {
        CHOIR_TRY(choir_adapter_load(r, s.swapped ? p->b : p->a, &from));
        gather_inputs(&s, from, a);
    }
    for (uint32_t i = 0; i < spot->n_places; i++) {
        const choir_adapter_rows map = choir_adapter_rows_of(r, spot->places[i]);
        CHOIR_TRY(make_arrays(r, &s, (uint64_t)map.n * s.rank, &b));
        if (b != NULL) {
            CHOIR_TRY(choir_adapter_load(r, s.swapped ? p->a : p->b, &from));
            (s.swapped ? gather_ranks : gather_outputs)(&s, &map, from, b);
        }
        for (uint32_t e = 0; e < s.n_experts; e++) {
            choir_adapter_change c = choir_adapter_begin(r, spot->places[i], spot->layer, e);
            c.rank = s.rank;
            c.scale = p->scale;
            c.has = CHOIR_ADAPTER_HAS_LOW_RANK;
            c.a = a == NULL ? NULL : a + (size_t)e * s.rank * s.cols;
            c.b = b == NULL ? NULL : b + (size_t)e * map.n * s.rank;
            CHOIR_TRY(choir_adapter_add(r, &c, p->a->name));
        }
    }
    return CHOIR_OK;
}

/* Which of a module's parameters a pair is of. PEFT wraps the module once for each parameter that
 * target_parameters names, in the order in which the module has them: the last is the outermost,
 * and each
 * `.base_layer` in the name leads one further in. */
static choir_status find_parameter(const lora *l, const char *tensor, char *module, uint32_t depth)
{
    const choir_adapter_reader *r = l->reader;
    char all[CHOIR_ADAPTER_MAX_STACKED][CHOIR_ADAPTER_MAX_NAME];
    const json_t *targets = choir_adapter_get(r, "target_parameters");
    uint32_t n_all = choir_adapter_stacked(r, module, all), n = 0;
    if (n_all == 0) return choir_adapter_refuse(r, tensor);
    for (size_t i = 0; i < json_array_size(targets); i++) {
        const char *name = json_string_value(json_array_get(targets, i));
        size_t bytes = name == NULL ? 0 : strlen(name);
        if (bytes > 5 && strcmp(name + bytes - 5, "_bias") == 0)
            return choir_fail(
                CHOIR_E_UNIMPLEMENTED,
                "%s: target_parameters names '%.100s'; Choir adapts matrices of experts, "
                "not their biases",
                r->name, name);
    }
    for (uint32_t i = 0; i < n_all; i++)
        if (choir_adapter_is_listed(targets, all[i])) memcpy(all[n++], all[i], sizeof all[i]);
    if (depth >= n)
        return choir_fail(
            CHOIR_E_INVALID,
            "%s: tensor '%.200s' is of parameter %u of %s, of which target_parameters of "
            "adapter_config.json names %u",
            r->name, tensor, depth + 1, module, n);
    snprintf(module, CHOIR_ADAPTER_MAX_NAME, "%s", all[n - 1 - depth]);
    return CHOIR_OK;
}

static choir_status read_pair(const lora *l, choir_adapter_tensor *a, const char *suffix)
{
    choir_adapter_reader *r = l->reader;
    pair p = {0};
    char name[CHOIR_ADAPTER_MAX_NAME + 16];
    uint32_t depth = 0;
    if (!choir_adapter_plain_name(a->name, p.module, sizeof p.module) ||
        !choir_adapter_strip(p.module, suffix))
        return choir_adapter_refuse(r, a->name);
    while (choir_adapter_strip(p.module, ".base_layer")) depth++;
    snprintf(name, sizeof name, "%s.weight", p.module);
    choir_adapter_spot spot = choir_adapter_find_spot(r, name);
    if (spot.n_places == 0) {
        CHOIR_TRY(find_parameter(l, a->name, p.module, depth));
        spot = choir_adapter_find_spot(r, p.module);
    } else if (depth > 0) {
        return choir_adapter_refuse(r, a->name);
    }
    CHOIR_ASSERT(spot.n_places > 0);
    CHOIR_TRY(choir_adapter_check_spot(r, &spot, a->name));
    CHOIR_TRY(find_pair(l, a, suffix, &p));
    CHOIR_TRY(set_scale(l, &p));
    bool stacked = spot.places[0]->stacked;
    if (choir_role_is_vector(spot.places[0]->role) &&
        spot.places[0]->role != CHOIR_ROLE_SHARED_ROUTER)
        return choir_adapter_refuse(r, a->name);
    if (strstr(suffix, "embedding") != NULL) return add_embedding(l, &spot, &p);
    if (spot.places[0]->role == CHOIR_ROLE_EMBEDDING) return choir_adapter_refuse(r, a->name);
    return stacked ? add_stack(l, &spot, &p) : add_module(l, &spot, &p);
}

static choir_status read_pairs(lora *l)
{
    choir_adapter_reader *r = l->reader;
    static const char *const suffixes[] = {".lora_A.weight", ".lora_embedding_A"};
    for (size_t i = 0; i < r->n_tensors; i++)
        for (size_t k = 0; k < 2; k++) {
            const char *name = r->tensors[i].name;
            size_t n = strlen(name), m = strlen(suffixes[k]);
            if (n > m && strcmp(name + n - m, suffixes[k]) == 0)
                CHOIR_TRY(read_pair(l, &r->tensors[i], suffixes[k]));
        }
    return CHOIR_OK;
}

choir_status choir_adapter_read_lora(choir_adapter_reader *r)
{
    lora l = {.reader = r};
    choir_status status;
    CHOIR_TRY_TO(done, status, read_config(&l));
    status = read_pairs(&l);
done:
    choir_adapter_patterns_free(l.ranks);
    choir_adapter_patterns_free(l.alphas);
    return status;
}
