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
    CHOIR_TRY(choir_adapter_number(r, "r", &l->rank));
    CHOIR_TRY(choir_adapter_number(r, "lora_alpha", &l->alpha));
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

static choir_status set_scale(const lora *l, const char *module, choir_adapter_pair *p)
{
    const choir_adapter_reader *r = l->reader;
    double rank = l->rank, alpha = l->alpha;
    char own[CHOIR_ADAPTER_MAX_OWN_NAME];
    choir_adapter_own_name(p->a->name, module, own);
    CHOIR_TRY(choir_adapter_patterns_find(r, l->ranks, own, &rank));
    CHOIR_TRY(choir_adapter_patterns_find(r, l->alphas, own, &alpha));
    CHOIR_TRY(choir_adapter_check_rank(r, rank, "r", module));
    p->rank = (uint32_t)rank;
    p->scale = (float)(alpha / (l->rslora ? sqrt(rank) : rank));
    if (!isfinite(p->scale))
        return choir_fail(CHOIR_E_INVALID, "%s: lora_alpha is %g for %s", r->name, alpha, module);
    return CHOIR_OK;
}

static choir_status find_pair(const lora *l, choir_adapter_tensor *a, const char *suffix,
                              choir_adapter_pair *p)
{
    bool embedding = strstr(suffix, "embedding") != NULL;
    const char *other = embedding ? ".lora_embedding_B" : ".lora_B.weight";
    p->a = a;
    p->b = choir_adapter_beside(l->reader, a->name, suffix, other);
    if (p->b == NULL)
        return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has no %s beside it",
                          l->reader->name, a->name, other + 1);
    if (l->bias) p->b_bias = choir_adapter_beside(l->reader, a->name, suffix, ".lora_B.bias");
    if (!l->dora) return CHOIR_OK;
    p->magnitude = choir_adapter_beside(l->reader, a->name, suffix, ".lora_magnitude_vector");
    if (p->magnitude == NULL)
        p->magnitude =
            choir_adapter_beside(l->reader, a->name, suffix, ".lora_magnitude_vector.weight");
    if (p->magnitude != NULL) return CHOIR_OK;
    return choir_fail(
        CHOIR_E_INVALID,
        "%s: use_dora is set, and tensor '%.200s' has no lora_magnitude_vector beside it",
        l->reader->name, a->name);
}

/* What PEFT took for the inputs of stacked experts that are square. */
static bool is_swapped(const lora *l, const choir_adapter_place *place)
{
    bool hidden = place->transposed && l->reader->base->family->hides_transposed;
    if (l->experts_version == 0) return !place->transposed;
    return l->experts_version == 1 ? !hidden : hidden;
}

static choir_status add_any(const lora *l, const choir_adapter_spot *spot, const char *suffix,
                            choir_adapter_pair *p)
{
    choir_adapter_reader *r = l->reader;
    const choir_adapter_place *place = spot->places[0];
    bool embedding = strstr(suffix, "embedding") != NULL;
    if (embedding != (place->role == CHOIR_ROLE_EMBEDDING) || choir_adapter_is_vector(place->role))
        return choir_adapter_refuse(r, p->a->name);
    if (embedding) return choir_adapter_add_embedding(r, spot, p);
    if (!place->stacked || choir_adapter_is_of_heads(place))
        return choir_adapter_add_pair(r, spot, p);
    p->swapped = is_swapped(l, place);
    if (p->b_bias != NULL || p->magnitude != NULL)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s: tensor '%.200s' lies beside all experts at once", r->name,
                          p->b_bias != NULL ? p->b_bias->name : p->magnitude->name);
    return choir_adapter_add_stack(r, spot, p);
}

/* Which of a module's parameters a pair is of. PEFT wraps the module once for each parameter that
 * target_parameters names, in the order in which the module has them: the last is the outermost,
 * and each ".base_layer" in a name leads one further in. */
static choir_status find_parameter(const lora *l, const char *tensor, char *module, uint32_t depth)
{
    const choir_adapter_reader *r = l->reader;
    char all[CHOIR_ADAPTER_MAX_STACKED][CHOIR_ADAPTER_MAX_NAME], own[CHOIR_ADAPTER_MAX_OWN_NAME];
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
        if (choir_adapter_is_listed(targets, choir_adapter_own_name(tensor, all[i], own)))
            memmove(all[n++], all[i], sizeof all[i]);
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
    choir_adapter_pair p = {0};
    char module[CHOIR_ADAPTER_MAX_NAME], name[CHOIR_ADAPTER_MAX_NAME + 16];
    uint32_t depth = 0;
    if (!choir_adapter_plain_name(a->name, module, sizeof module) ||
        !choir_adapter_strip(module, suffix))
        return choir_adapter_refuse(r, a->name);
    while (choir_adapter_strip(module, ".base_layer")) depth++;
    snprintf(name, sizeof name, "%s.weight", module);
    choir_adapter_spot spot = choir_adapter_find_spot(r, name);
    if (spot.n_places == 0) {
        CHOIR_TRY(find_parameter(l, a->name, module, depth));
        spot = choir_adapter_find_spot(r, module);
    } else if (depth > 0) {
        return choir_adapter_refuse(r, a->name);
    }
    CHOIR_ASSERT(spot.n_places > 0);
    CHOIR_TRY(choir_adapter_check_spot(r, &spot, a->name));
    CHOIR_TRY(find_pair(l, a, suffix, &p));
    CHOIR_TRY(set_scale(l, module, &p));
    CHOIR_TRY(add_any(l, &spot, suffix, &p));
    return choir_adapter_note_pair(r, &spot, &p);
}

static choir_status read_pairs(lora *l)
{
    choir_adapter_reader *r = l->reader;
    static const char *const a[] = {".lora_A.weight", ".lora_embedding_A"};
    static const char *const b[] = {".lora_B.weight", ".lora_embedding_B"};
    for (size_t i = 0; i < r->n_tensors; i++)
        for (size_t k = 0; k < 2; k++)
            if (choir_adapter_ends_with(r->tensors[i].name, a[k]))
                CHOIR_TRY(read_pair(l, &r->tensors[i], a[k]));
    for (size_t i = 0; i < r->n_tensors; i++)
        for (size_t k = 0; k < 2; k++)
            if (!r->tensors[i].used && choir_adapter_ends_with(r->tensors[i].name, b[k]))
                return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has no %s beside it",
                                  r->name, r->tensors[i].name, a[k] + 1);
    return CHOIR_OK;
}

choir_status choir_adapter_read_lora(choir_adapter_reader *r)
{
    lora l = {.reader = r};
    choir_status status;
    CHOIR_TRY_TO(done, status, read_config(&l));
    CHOIR_TRY_TO(done, status, read_pairs(&l));
    status = choir_adapter_read_saved(r);
done:
    choir_adapter_patterns_free(l.ranks);
    choir_adapter_patterns_free(l.alphas);
    return status;
}
