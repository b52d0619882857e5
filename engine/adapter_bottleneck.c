/* Bottleneck adapters: up f(down z), two matrices with an activation between (Houlsby et al. 2019),
 * beside a matrix of the base or behind it. In the layout of LLM-Adapters (Hu et al. 2023), a fork
 * of PEFT with the peft_type BOTTLENECK, and in AdapterHub's (Poth et al. 2023). */
#include "engine/adapter_read.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Both take transformers' names of activations. */
static choir_status read_act(const choir_adapter_reader *r, const char *name,
                             choir_adapter_act *out)
{
    static const struct {
        const char *name;
        choir_adapter_act act;
    } known[] = {{"relu", CHOIR_ADAPTER_RELU},
                 {"gelu", CHOIR_ADAPTER_GELU},
                 {"gelu_python", CHOIR_ADAPTER_GELU},
                 {"gelu_new", CHOIR_ADAPTER_GELU_TANH},
                 {"gelu_fast", CHOIR_ADAPTER_GELU_TANH},
                 {"gelu_accurate", CHOIR_ADAPTER_GELU_TANH},
                 {"gelu_pytorch_tanh", CHOIR_ADAPTER_GELU_TANH},
                 {"silu", CHOIR_ADAPTER_SILU},
                 {"swish", CHOIR_ADAPTER_SILU},
                 {"tanh", CHOIR_ADAPTER_TANH},
                 {"linear", CHOIR_ADAPTER_LINEAR}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(known[i].name, name) == 0) {
            *out = known[i].act;
            return CHOIR_OK;
        }
    return choir_fail(
        CHOIR_E_UNIMPLEMENTED,
        "%s: non_linearity is \"%.40s\"; Choir has relu, gelu, gelu_new, silu, swish, tanh "
        "and linear",
        r->name, name);
}

static choir_status read_scale(choir_adapter_reader *r, choir_adapter_tensor *t, float *out)
{
    const float *value;
    CHOIR_TRY(choir_adapter_expect(r, t, 0, 1));
    CHOIR_TRY(choir_adapter_read(r, t, NULL, &value));
    *out = value != NULL ? *value : 1;
    return CHOIR_OK;
}

static choir_status check_scale(const choir_adapter_reader *r, const json_t *value, float *out)
{
    *out = value == NULL ? 1 : (float)json_number_value(value);
    if ((value == NULL || json_is_number(value)) && isfinite(*out)) return CHOIR_OK;
    return choir_fail(CHOIR_E_FORMAT,
                      "%s: scaling of adapter_config.json is neither a number nor "
                      "\"learned\"",
                      r->name);
}

static bool is_text(const json_t *value, const char *text)
{
    return json_is_string(value) && strcmp(json_string_value(value), text) == 0;
}

/* The width of the bottleneck, as the tensor has it. */
static choir_status read_rank(const choir_adapter_reader *r, const choir_adapter_tensor *down,
                              uint32_t *out)
{
    double rank = down->n_dims == 2 ? (double)down->dims[0] : 0;
    CHOIR_TRY(choir_adapter_check_rank(r, rank, "the width", down->name));
    *out = (uint32_t)rank;
    return CHOIR_OK;
}

/* How a layout calls the tensors of a bottleneck, behind what names the module. */
typedef struct layout {
    const char *down, *down_bias, *scaling;
} layout;

/* What lies beside the tensor `down`. *scaling: NULL unless it is there. */
static choir_status find_parts(const choir_adapter_reader *r, const layout *l, bool wants_scaling,
                               choir_adapter_tensor *down, choir_adapter_pair *p,
                               choir_adapter_tensor **scaling)
{
    p->a = down;
    p->a_bias = choir_adapter_beside(r, down->name, l->down, l->down_bias);
    p->b = choir_adapter_beside(r, down->name, l->down, ".adapter_up.weight");
    p->b_bias = choir_adapter_beside(r, down->name, l->down, ".adapter_up.bias");
    *scaling = choir_adapter_beside(r, down->name, l->down, l->scaling);
    if (p->b == NULL)
        return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has no adapter_up.weight beside it",
                          r->name, down->name);
    if (wants_scaling && *scaling == NULL)
        return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has no %s beside it", r->name,
                          down->name, l->scaling + 1);
    return read_rank(r, down, &p->rank);
}

/* -- LLM-Adapters -- */

typedef struct bottleneck {
    choir_adapter_act act;
    float scale;
    bool learned, parallel;
} bottleneck;

static choir_status read_pair(choir_adapter_reader *r, const bottleneck *b,
                              choir_adapter_tensor *down)
{
    char module[CHOIR_ADAPTER_MAX_NAME];
    static const layout names = {".adapter_down.weight", ".adapter_down.bias", ".adapter_scaling"};
    choir_adapter_spot spot;
    CHOIR_TRY(choir_adapter_module_spot(r, down->name, names.down, module, sizeof module, &spot));
    choir_role role = spot.places[0]->role;
    if (role == CHOIR_ROLE_EMBEDDING) return choir_adapter_refuse(r, down->name);
    /* Without use_parallel_adapter a name says where: before gate_proj and up_proj, behind
     * down_proj. */
    if (!b->parallel && role != CHOIR_ROLE_FFN_DOWN)
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s: tensor '%.200s': without use_parallel_adapter this adapter changes what "
            "its matrix is given; Choir has serial adapters behind down_proj",
            r->name, down->name);
    choir_adapter_pair p = {.scale = b->scale, .act = b->act, .series = !b->parallel};
    choir_adapter_tensor *scale;
    CHOIR_TRY(find_parts(r, &names, b->learned, down, &p, &scale));
    if (b->learned) CHOIR_TRY(read_scale(r, scale, &p.scale));
    return choir_adapter_add_pair(r, &spot, &p);
}

choir_status choir_adapter_read_bottleneck(choir_adapter_reader *r)
{
    bottleneck b = {.scale = 1};
    const json_t *scaling = choir_adapter_get(r, "scaling");
    snprintf(r->data->kind, sizeof r->data->kind, "bottleneck");
    CHOIR_TRY(read_act(r, choir_adapter_string(r, "non_linearity", "tanh"), &b.act));
    CHOIR_TRY(choir_adapter_flag(r, "use_parallel_adapter", &b.parallel));
    b.learned = is_text(scaling, "learned");
    if (!b.learned) CHOIR_TRY(check_scale(r, scaling, &b.scale));
    for (size_t i = 0; i < r->n_tensors; i++)
        if (choir_adapter_ends_with(r->tensors[i].name, ".adapter_down.weight"))
            CHOIR_TRY(read_pair(r, &b, &r->tensors[i]));
    return choir_adapter_read_saved(r);
}

/* -- AdapterHub -- */

typedef struct hub {
    choir_adapter_reader *reader;
    const json_t *config;
    choir_adapter_act act;
    float scale;
    bool learned, by_channel;
    bool parallel, sums; /* it takes the residual stream; the stream and the block's output */
} hub;

static bool option(const hub *h, const char *name, bool otherwise)
{
    const json_t *value = json_object_get(h->config, name);
    return value == NULL ? otherwise : !choir_adapter_is_off(value);
}

/* Options that give an adapter norms, gates or matrices of its own. */
static choir_status check_options(const hub *h)
{
    static const char *const must_be_off[] = {"ln_before", "ln_after",    "use_gating",
                                              "phm_layer", "inv_adapter", "cross_adapter"};
    const choir_adapter_reader *r = h->reader;
    for (size_t i = 0; i < sizeof must_be_off / sizeof *must_be_off; i++)
        if (option(h, must_be_off[i], false))
            return choir_fail(
                CHOIR_E_UNIMPLEMENTED,
                "%s: %s of AdapterHub's adapter_config.json is set, which Choir does not have",
                r->name, must_be_off[i]);
    const json_t *architecture = json_object_get(h->config, "architecture");
    if (choir_adapter_is_off(architecture)) return CHOIR_OK;
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "%s: architecture of AdapterHub's adapter_config.json is \"%.40s\"; Choir "
                      "reads bottleneck adapters of AdapterHub, other kinds from PEFT",
                      r->name,
                      json_is_string(architecture) ? json_string_value(architecture) : "?");
}

/* With r the residual stream and h what the block gives it, a model without norms behind its blocks
 * ends as r + h + up, whatever the options, unless they drop or double r: original_ln_before lets
 * the adapter see r + h, and without residual_before_ln r + h goes around it, so that
 * original_ln_after must not add r again. */
static choir_status check_residual(hub *h)
{
    const choir_adapter_reader *r = h->reader;
    bool after = option(h, "original_ln_after", true), parallel = option(h, "is_parallel", false);
    bool sums = !parallel && option(h, "original_ln_before", false);
    bool around = option(h, "residual_before_ln", true);
    h->parallel = parallel;
    h->sums = sums;
    if (is_text(json_object_get(h->config, "residual_before_ln"), "post_add"))
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s: residual_before_ln of AdapterHub's adapter_config.json is \"post_add\"", r->name);
    bool adds = sums && !around ? !after : after;
    if (adds) return CHOIR_OK;
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "%s: original_ln_after of AdapterHub's adapter_config.json is %s, so that "
                      "the residual stream is %s",
                      r->name, after ? "true beside residual_before_ln false" : "false",
                      after ? "added twice" : "left out");
}

/* "model.layers.3.output_adapters.adapters.NAME.adapter_down.0.weight": the matrix that it lies
 * behind. */
static bool find_module(const hub *h, const char *tensor, choir_adapter_spot *out)
{
    static const struct {
        const char *part, *module;
    } parts[] = {{".attention_adapters.adapters.", ".self_attn.o_proj.weight"},
                 {".output_adapters.adapters.", ".mlp.down_proj.weight"}};
    char name[CHOIR_ADAPTER_MAX_NAME];
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const char *at = strstr(tensor, parts[i].part);
        if (at == NULL) continue;
        const char *prefix = strncmp(tensor, "model.", 6) == 0 ? "" : "model.";
        int n = snprintf(name, sizeof name, "%s%.*s%s", prefix, (int)(at - tensor), tensor,
                         parts[i].module);
        if (n < 0 || (size_t)n >= sizeof name) return false;
        *out = choir_adapter_find_spot(h->reader, name);
        return out->n_places == 1;
    }
    return false;
}

/* A vector that scales each output: folded into B and its bias. */
static choir_status fold_channels(choir_adapter_reader *r, choir_adapter_tensor *t,
                                  choir_adapter_change *c)
{
    const float *s;
    CHOIR_TRY(choir_adapter_expect(r, t, 0, c->rows));
    CHOIR_TRY(choir_adapter_read(r, t, NULL, &s));
    for (uint32_t i = 0; s != NULL && i < c->rows; i++) {
        for (uint32_t k = 0; k < c->rank; k++) ((float *)c->b)[(size_t)i * c->rank + k] *= s[i];
        if (c->b_bias != NULL) ((float *)c->b_bias)[i] *= s[i];
    }
    return CHOIR_OK;
}

static choir_status read_hub_pair(const hub *h, choir_adapter_tensor *down)
{
    choir_adapter_reader *r = h->reader;
    static const layout names = {".adapter_down.0.weight", ".adapter_down.0.bias", ".scaling"};
    choir_adapter_spot spot;
    if (!find_module(h, down->name, &spot)) return choir_adapter_refuse(r, down->name);
    CHOIR_TRY(choir_adapter_check_spot(r, &spot, down->name));
    choir_adapter_pair p = {.scale = h->scale,
                            .act = h->act,
                            .series = !h->parallel,
                            .residual = h->parallel || h->sums};
    choir_adapter_tensor *scale;
    CHOIR_TRY(find_parts(r, &names, h->learned || h->by_channel, down, &p, &scale));
    if (h->learned) CHOIR_TRY(read_scale(r, scale, &p.scale));
    CHOIR_TRY(choir_adapter_add_pair(r, &spot, &p));
    return h->by_channel ? fold_channels(r, scale, &r->pieces[r->n_pieces - 1].change) : CHOIR_OK;
}

choir_status choir_adapter_read_hub(choir_adapter_reader *r)
{
    hub h = {.reader = r, .config = choir_adapter_get(r, "config"), .scale = 1};
    const json_t *act = json_object_get(h.config, "non_linearity");
    const json_t *scaling = json_object_get(h.config, "scaling");
    snprintf(r->data->kind, sizeof r->data->kind, "bottleneck");
    CHOIR_TRY(check_options(&h));
    CHOIR_TRY(check_residual(&h));
    const char *name = json_is_string(act) ? json_string_value(act) : "";
    char lower[40];
    size_t n = 0;
    for (; name[n] != '\0' && n + 1 < sizeof lower; n++)
        lower[n] = name[n] >= 'A' && name[n] <= 'Z' ? (char)(name[n] + 32) : name[n];
    lower[n] = '\0';
    /* What says no version is older than the day when "gelu" became its erf form. */
    bool old = json_object_get(r->config, "version") == NULL;
    if (old && strcmp(lower, "gelu") == 0) snprintf(lower, sizeof lower, "gelu_new");
    if (old && strcmp(lower, "gelu_orig") == 0) snprintf(lower, sizeof lower, "gelu");
    CHOIR_TRY(read_act(r, lower, &h.act));
    h.learned = is_text(scaling, "learned");
    h.by_channel = is_text(scaling, "channel");
    if (!h.learned && !h.by_channel) CHOIR_TRY(check_scale(r, scaling, &h.scale));
    for (size_t i = 0; i < r->n_tensors; i++)
        if (choir_adapter_ends_with(r->tensors[i].name, ".adapter_down.0.weight"))
            CHOIR_TRY(read_hub_pair(&h, &r->tensors[i]));
    return CHOIR_OK;
}
