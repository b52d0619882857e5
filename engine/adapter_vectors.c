/* IA3 (Liu et al. 2022): a vector that scales a module's outputs, or, of the feed-forward modules,
 * its inputs. VeRA (Kopiczko et al. 2024): one random A and B for all modules, and two vectors for
 * each: W + diag(lambda_b) B diag(lambda_d) A. */
#include "engine/adapter_pattern.h"
#include "engine/adapter_read.h"

#include <inttypes.h>
#include <string.h>

/* -- IA3 -- */

typedef struct ia3 {
    choir_adapter_reader *reader;
    const json_t *names;             /* feedforward_modules as a list … */
    choir_adapter_patterns *pattern; /* … or as an expression for whole names */
} ia3;

static choir_status is_feedforward(const ia3 *x, const char *module, bool *out)
{
    double found = 0;
    for (size_t i = 0; i < json_array_size(x->names); i++) {
        const char *end = json_string_value(json_array_get(x->names, i));
        if (end == NULL || *end == '\0') continue;
        if (strcmp(module, end) == 0 || choir_adapter_ends_with(module, end)) found = 1;
    }
    CHOIR_TRY(choir_adapter_patterns_find(x->reader, x->pattern, module, &found));
    *out = found != 0;
    return CHOIR_OK;
}

static choir_status read_scale(const ia3 *x, choir_adapter_tensor *t)
{
    choir_adapter_reader *r = x->reader;
    char module[CHOIR_ADAPTER_MAX_NAME], own[CHOIR_ADAPTER_MAX_OWN_NAME];
    choir_adapter_spot spot;
    bool inputs;
    uint64_t rows, cols;
    CHOIR_TRY(choir_adapter_module_spot(r, t->name, ".ia3_l", module, sizeof module, &spot));
    CHOIR_TRY(is_feedforward(x, choir_adapter_own_name(t->name, module, own), &inputs));
    if (spot.places[0]->role == CHOIR_ROLE_EMBEDDING) return choir_adapter_refuse(r, t->name);
    choir_adapter_whole_shape(r, spot.places[0], &rows, &cols);
    CHOIR_TRY(choir_adapter_expect(r, t, inputs ? 1 : rows, inputs ? cols : 1));
    for (uint32_t i = 0; i < spot.n_places; i++) {
        const choir_adapter_rows map = choir_adapter_rows_of(r, spot.places[i]);
        choir_adapter_change c = choir_adapter_begin(r, spot.places[i], spot.layer, spot.index);
        CHOIR_TRY(
            choir_adapter_read(r, t, inputs ? NULL : &map, inputs ? &c.in_scale : &c.out_scale));
        c.has = inputs ? CHOIR_ADAPTER_HAS_IN_SCALE : CHOIR_ADAPTER_HAS_OUT_SCALE;
        CHOIR_TRY(choir_adapter_add(r, &c, t->name));
    }
    return CHOIR_OK;
}

choir_status choir_adapter_read_ia3(choir_adapter_reader *r)
{
    ia3 x = {.reader = r};
    const json_t *modules = choir_adapter_get(r, "feedforward_modules");
    snprintf(r->data->kind, sizeof r->data->kind, "IA3");
    choir_status status = CHOIR_OK;
    if (json_is_string(modules))
        status = choir_adapter_pattern_whole(r, "feedforward_modules", &x.pattern);
    else if (modules == NULL || json_is_array(modules))
        x.names = modules;
    else
        status = choir_fail(CHOIR_E_FORMAT,
                            "%s: feedforward_modules of adapter_config.json is no list", r->name);
    for (size_t i = 0; i < r->n_tensors && status == CHOIR_OK; i++)
        if (choir_adapter_ends_with(r->tensors[i].name, ".ia3_l"))
            status = read_scale(&x, &r->tensors[i]);
    choir_adapter_patterns_free(x.pattern);
    return status == CHOIR_OK ? choir_adapter_read_saved(r) : status;
}

/* -- VeRA -- */

typedef struct vera {
    choir_adapter_reader *reader;
    const float *a,
        *b; /* of the largest module: [rank, inputs], [outputs, rank]; smaller ones have a part */
    uint64_t inputs, outputs;
    uint32_t rank;
} vera;

static choir_status read_projection(vera *v, const char *name, bool is_a, const float **out)
{
    choir_adapter_reader *r = v->reader;
    choir_adapter_tensor *t = choir_adapter_find(r, name);
    if (t == NULL)
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s: tensor '%s' is missing; Choir does not draw VeRA's random projections "
            "anew: save the adapter with save_projection",
            r->name, name);
    uint64_t other = t->n_dims == 2 ? t->dims[is_a] : 1;
    *(is_a ? &v->inputs : &v->outputs) = other;
    CHOIR_TRY(choir_adapter_expect(r, t, is_a ? v->rank : other, is_a ? other : v->rank));
    return choir_adapter_read(r, t, NULL, out);
}

/* diag(lambda_d) A, of the first columns of A. */
static choir_status scaled_a(const vera *v, const float *lambda, uint64_t cols, const float **out)
{
    float *to;
    CHOIR_TRY(choir_adapter_floats(v->reader, v->rank * cols, &to));
    for (uint32_t k = 0; k < v->rank; k++)
        for (uint64_t i = 0; i < cols; i++) to[k * cols + i] = lambda[k] * v->a[k * v->inputs + i];
    *out = to;
    return CHOIR_OK;
}

static choir_status scaled_b(const vera *v, const float *lambda, const choir_adapter_rows *map,
                             const float **out)
{
    float *to;
    CHOIR_TRY(choir_adapter_floats(v->reader, (size_t)map->n * v->rank, &to));
    for (uint32_t i = 0; i < map->n; i++) {
        const float *from = v->b + (size_t)choir_adapter_row(map, i) * v->rank;
        for (uint32_t k = 0; k < v->rank; k++) to[(size_t)i * v->rank + k] = lambda[i] * from[k];
    }
    *out = to;
    return CHOIR_OK;
}

static choir_status read_module(const vera *v, choir_adapter_tensor *d)
{
    choir_adapter_reader *r = v->reader;
    char module[CHOIR_ADAPTER_MAX_NAME];
    choir_adapter_spot spot;
    uint64_t rows, cols;
    const float *lambda_d, *lambda_b, *a = NULL;
    const char *suffix = ".vera_lambda_d";
    CHOIR_TRY(choir_adapter_module_spot(r, d->name, suffix, module, sizeof module, &spot));
    if (spot.places[0]->role == CHOIR_ROLE_EMBEDDING) return choir_adapter_refuse(r, d->name);
    choir_adapter_tensor *b = choir_adapter_beside(r, d->name, suffix, ".vera_lambda_b");
    if (b == NULL)
        return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has no vera_lambda_b beside it",
                          r->name, d->name);
    choir_adapter_whole_shape(r, spot.places[0], &rows, &cols);
    CHOIR_TRY(choir_adapter_expect(r, d, 0, v->rank));
    CHOIR_TRY(choir_adapter_expect(r, b, 0, rows));
    if (rows > v->outputs || cols > v->inputs)
        return choir_fail(CHOIR_E_INVALID,
                          "%s: vera_A takes %" PRIu64 " inputs and vera_B gives %" PRIu64
                          " outputs, %s has [%" PRIu64 ", %" PRIu64 "]",
                          r->name, v->inputs, v->outputs, module, rows, cols);
    CHOIR_TRY(choir_adapter_read(r, d, NULL, &lambda_d));
    if (lambda_d != NULL) CHOIR_TRY(scaled_a(v, lambda_d, cols, &a));
    for (uint32_t i = 0; i < spot.n_places; i++) {
        const choir_adapter_rows map = choir_adapter_rows_of(r, spot.places[i]);
        choir_adapter_change c = choir_adapter_begin(r, spot.places[i], spot.layer, spot.index);
        CHOIR_TRY(choir_adapter_read(r, b, &map, &lambda_b));
        c.rank = v->rank;
        c.has = CHOIR_ADAPTER_HAS_LOW_RANK;
        c.a = a;
        if (lambda_b != NULL) CHOIR_TRY(scaled_b(v, lambda_b, &map, &c.b));
        CHOIR_TRY(choir_adapter_add(r, &c, d->name));
    }
    return CHOIR_OK;
}

choir_status choir_adapter_read_vera(choir_adapter_reader *r)
{
    vera v = {.reader = r};
    double rank;
    snprintf(r->data->kind, sizeof r->data->kind, "VeRA");
    CHOIR_TRY(choir_adapter_number(r, "r", &rank));
    CHOIR_TRY(choir_adapter_check_rank(r, rank, "r", "VeRA"));
    v.rank = (uint32_t)rank;
    CHOIR_TRY(read_projection(&v, "base_model.vera_A", true, &v.a));
    CHOIR_TRY(read_projection(&v, "base_model.vera_B", false, &v.b));
    for (size_t i = 0; i < r->n_tensors; i++)
        if (choir_adapter_ends_with(r->tensors[i].name, ".vera_lambda_d"))
            CHOIR_TRY(read_module(&v, &r->tensors[i]));
    return choir_adapter_read_saved(r);
}
