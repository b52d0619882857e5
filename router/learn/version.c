#include "router/learn/version.h"

#include "router/learn/json.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

enum { FORMAT = 1, MAX_FILE_BYTES = 1 << 20 };

static const char *const kind_texts[] = {[CHOIR_ROUTING_FIXED] = "fixed",
                                         [CHOIR_ROUTING_UNIFORM] = "uniform",
                                         [CHOIR_ROUTING_GREEDY] = "greedy"};

static void digest_of(const char *bytes, size_t n, char out[CHOIR_DIGEST_TEXT])
{
    XXH128_hash_t h = XXH3_128bits(bytes, n);
    snprintf(out, CHOIR_DIGEST_TEXT, "%016" PRIx64 "%016" PRIx64, h.high64, h.low64);
}

static choir_status path_of(const char *folder, const char *digest, char *out, size_t room)
{
    bool is_digest = strlen(digest) == CHOIR_DIGEST_TEXT - 1 &&
                     strspn(digest, "0123456789abcdef") == CHOIR_DIGEST_TEXT - 1;
    if (!is_digest)
        return choir_fail(CHOIR_E_FORMAT,
                          "\"%.40s\" is no digest of a router version: 32 digits of 0-9a-f",
                          digest);
    if (snprintf(out, room, "%s/%s.json", folder, digest) >= (int)room)
        return choir_fail(CHOIR_E_INVALID, "the path of router versions is too long: %.200s",
                          folder);
    return CHOIR_OK;
}

/* --- to JSON: numbers of 64 bits as hexadecimal text, since JSON's integers are signed; reals with
 * 17 digits, which are the same bits when read */

static json_t *json_reals(const double *x, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) json_array_append_new(list, json_real(x[i]));
    return list;
}

static json_t *model_to_json(const choir_reward_model *m)
{
    json_t *plans = json_array();
    for (uint32_t a = 0; a < m->n_plans; a++)
        json_array_append_new(plans, json_pack("{s:I, s:o}", "events", (json_int_t)m->n_events[a],
                                               "theta", json_reals(m->theta[a], CHOIR_N_FEATURES)));
    return json_pack("{s:f, s:o, s:o, s:o}", "prior", m->prior, "mean",
                     json_reals(m->mean, CHOIR_N_FEATURES), "scale",
                     json_reals(m->scale, CHOIR_N_FEATURES), "plans", plans);
}

static json_t *to_json(const choir_version *v)
{
    json_t *plans = json_array();
    for (uint32_t a = 0; a < v->n_plans; a++)
        json_array_append_new(plans, json_pack("{s:s, s:o}", "name", v->plans[a].name, "digest",
                                               json_of_bits(v->plans[a].digest)));
    json_t *policy =
        json_pack("{s:s, s:i}", "kind", kind_texts[v->policy.kind], "plan", (int)v->policy.plan);
    if (v->policy.kind == CHOIR_ROUTING_GREEDY)
        json_object_set_new(policy, "estimate", model_to_json(&v->policy.model));
    return json_pack("{s:i, s:s, s:s, s:I, s:I, s:o, s:i, s:o, s:o}", "choir_router", FORMAT,
                     "model", v->model, "parent", v->parent, "learnt_to", (json_int_t)v->learnt_to,
                     "learnt_events", (json_int_t)v->n_learnt, "feature_seed",
                     json_of_bits(v->feature_seed), "feature_blocks", (int)v->n_blocks, "plans",
                     plans, "policy", policy);
}

choir_status choir_version_save(const char *folder, const choir_version *version,
                                char digest[CHOIR_DIGEST_TEXT])
{
    char path[4096];
    json_t *json = to_json(version);
    char *text = json != NULL
                     ? json_dumps(json, JSON_INDENT(1) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17))
                     : NULL;
    choir_save save;
    choir_status status = CHOIR_OK;
    json_decref(json);
    if (text == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a router version");
    digest_of(text, strlen(text), digest);
    CHOIR_TRY_TO(done, status, path_of(folder, digest, path, sizeof path));
    CHOIR_TRY_TO(done, status, choir_folder_make(folder));
    CHOIR_TRY_TO(done, status, choir_save_begin(path, &save));
    status = choir_save_write(&save, text, strlen(text));
    if (status == CHOIR_OK)
        status = choir_save_commit(&save);
    else
        choir_save_abandon(&save);
done:
    free(text);
    return status;
}

/* --- from JSON: whoever can write the file can also name it rightly, so every value is checked */

static bool read_bits(const json_t *from, uint64_t *out)
{
    const char *text = json_string_value(from);
    return text != NULL && strlen(text) == 16 && strspn(text, "0123456789abcdef") == 16 &&
           sscanf(text, "%" SCNx64, out) == 1;
}

static bool read_count(const json_t *from, uint64_t most, uint64_t *out)
{
    json_int_t x = json_integer_value(from);
    *out = (uint64_t)x;
    return json_is_integer(from) && x >= 0 && (uint64_t)x <= most;
}

static bool read_text(const json_t *from, char *out, size_t room)
{
    const char *text = json_string_value(from);
    if (text == NULL || json_string_length(from) != strlen(text) || strlen(text) >= room)
        return false;
    memcpy(out, text, strlen(text) + 1);
    return true;
}

static bool read_reals(const json_t *from, double *out, size_t n)
{
    bool good = json_array_size(from) == n;
    for (size_t i = 0; good && i < n; i++) {
        const json_t *x = json_array_get(from, i);
        out[i] = json_number_value(x);
        good = json_is_number(x) && isfinite(out[i]) && fabs(out[i]) < 1e12;
    }
    return good;
}

static bool read_model(const json_t *from, uint32_t n_plans, choir_reward_model *m)
{
    const json_t *plans = json_object_get(from, "plans");
    bool good = json_array_size(plans) == n_plans &&
                read_reals(json_object_get(from, "mean"), m->mean, CHOIR_N_FEATURES) &&
                read_reals(json_object_get(from, "scale"), m->scale, CHOIR_N_FEATURES);
    m->n_plans = n_plans;
    m->prior = json_number_value(json_object_get(from, "prior"));
    good = good && json_is_number(json_object_get(from, "prior")) && m->prior >= 0 && m->prior <= 1;
    for (uint32_t a = 0; good && a < n_plans; a++) {
        const json_t *plan = json_array_get(plans, a);
        good = read_count(json_object_get(plan, "events"), INT64_MAX, &m->n_events[a]) &&
               read_reals(json_object_get(plan, "theta"), m->theta[a], CHOIR_N_FEATURES);
    }
    return good;
}

static bool read_policy(const json_t *from, uint32_t n_plans, choir_routing *policy)
{
    const char *kind = json_string_value(json_object_get(from, "kind"));
    uint64_t plan;
    int found = -1;
    for (int k = 0; kind != NULL && k <= CHOIR_ROUTING_GREEDY; k++)
        if (strcmp(kind, kind_texts[k]) == 0) found = k;
    if (found < 0 || !read_count(json_object_get(from, "plan"), n_plans - 1, &plan)) return false;
    policy->kind = (choir_routing_kind)found;
    policy->plan = (uint32_t)plan;
    return policy->kind != CHOIR_ROUTING_GREEDY ||
           read_model(json_object_get(from, "estimate"), n_plans, &policy->model);
}

static bool read_plans(const json_t *from, choir_version *v)
{
    size_t n = json_array_size(from);
    bool good = n >= 1 && n <= CHOIR_MAX_CANDIDATES;
    v->n_plans = (uint32_t)n;
    for (size_t a = 0; good && a < n; a++) {
        const json_t *plan = json_array_get(from, a);
        good =
            read_text(json_object_get(plan, "name"), v->plans[a].name, sizeof v->plans[a].name) &&
            read_bits(json_object_get(plan, "digest"), &v->plans[a].digest);
    }
    return good;
}

static bool read_version(const json_t *from, choir_version *v)
{
    uint64_t format, blocks;
    bool good = read_count(json_object_get(from, "choir_router"), FORMAT, &format) &&
                format == FORMAT &&
                read_text(json_object_get(from, "model"), v->model, sizeof v->model) &&
                read_text(json_object_get(from, "parent"), v->parent, sizeof v->parent) &&
                read_count(json_object_get(from, "learnt_to"), INT64_MAX, &v->learnt_to) &&
                read_count(json_object_get(from, "learnt_events"), INT64_MAX, &v->n_learnt) &&
                read_bits(json_object_get(from, "feature_seed"), &v->feature_seed) &&
                read_count(json_object_get(from, "feature_blocks"), 1 << 20, &blocks) &&
                read_plans(json_object_get(from, "plans"), v);
    if (!good) return false;
    v->n_blocks = (uint32_t)blocks;
    return read_policy(json_object_get(from, "policy"), v->n_plans, &v->policy);
}

choir_status choir_version_load(const char *folder, const char *digest, choir_version *out)
{
    char path[4096], found[CHOIR_DIGEST_TEXT], *text;
    size_t bytes;
    CHOIR_TRY(path_of(folder, digest, path, sizeof path));
    CHOIR_TRY(choir_file_read(path, MAX_FILE_BYTES, &text, &bytes));
    memset(out, 0, sizeof *out);
    digest_of(text, bytes, found);
    bool whole = strcmp(found, digest) == 0;
    json_t *json = whole ? json_loadb(text, bytes, JSON_REJECT_DUPLICATES, NULL) : NULL;
    bool good = json != NULL && read_version(json, out);
    json_decref(json);
    choir_free(text);
    if (!whole)
        return choir_fail(CHOIR_E_FORMAT,
                          "router version %s is damaged: its bytes have the digest %s", path,
                          found);
    return good ? CHOIR_OK
                : choir_fail(CHOIR_E_FORMAT, "%s is no router version that this program can read",
                             path);
}
