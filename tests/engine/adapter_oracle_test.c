/* Adapters of every kind on tiny models against PEFT in f32: logits of all positions and greedy
 * continuations in exact mode, the merged model, the fast path beside it; on the model as a folder
 * and as a GGUF file. */
#include "tests/engine/sequence.h"
#include "tests/support/reference.h"

#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define ADAPTERS "tests/fixtures/adapters"
enum { N_PAGES = 8, MAX_TOKENS = 96 };

/* tests/oracle/make_adapters.py says what each is. `twin`: the base lies there as a GGUF file too.
 */
typedef struct fixture {
    const char *name, *base;
    bool twin;
} fixture;

// clang-format off
static const fixture fixtures[] = {
    {"lora", "yarn", true},                         {"lora_f16", "llama", true},
    {"rslora", "linear", true},                     {"patterns", "yarn", true},
    {"some_layers", "yarn", true},                  {"excluded", "qwen3", true},
    {"dora", "yarn", true},                         {"dora_bias", "linear", true},
    {"lora_bias", "linear", true},                  {"bias_all", "qwen2", true},
    {"bias_lora_only", "linear", true},             {"embeddings", "yarn", true},
    {"embeddings_tied", "granite", true},           {"saved", "yarn", true},
    {"saved_tied", "smollm3", true},                {"saved_norms", "gemma2", true},
    {"ia3", "yarn", true},                          {"ia3_bias", "linear", true},
    {"ia3_outputs", "yarn", true},                  {"vera", "yarn", true},
                        {"prompt_tuning", "yarn", true},
    {"prompt_tuning_gemma", "gemma2", true},        {"p_tuning", "qwen3", true},
    {"prefix_tuning", "yarn", true},                {"prefix_tuning_projected", "phi3", true},
    {"alora", "yarn", true},                        {"phi3_fused", "phi3", true},
    {"phi3_dora", "phi3", true},                    {"phi3_ia3", "phi3", true},
    {"mla", "deepseek_v2_group", true},             {"mla_direct", "deepseek_v2", true},
    {"mla_kv_b", "deepseek_v3", true},              {"mla_dora", "deepseek_v3", true},
    {"experts_mixtral", "mixtral_odd", true},       {"experts_down", "mixtral_odd", true},
    {"experts_qwen3_moe", "qwen3_moe_odd", true},   {"experts_qwen2_moe", "qwen2_moe_sparse", true},
    {"experts_qwen2_moe_dense", "qwen2_moe", false}, {"experts_gpt_oss", "gpt_oss", true},
    {"experts_gpt_oss_mxfp4", "gpt_oss_mxfp4", true}, {"experts_granitemoe", "granitemoe", true},
    {"experts_deepseek_v3", "deepseek_v3", true},   {"attention_glm4_moe", "glm4_moe", true},
    {"attention_llama4", "llama4_standard", true},  {"by_expert_mixtral", "mixtral_odd", true},
    {"by_expert_qwen3_moe", "qwen3_moe_odd", true}, {"by_expert_olmoe", "olmoe_odd", true},
    {"by_expert_qwen2_moe", "qwen2_moe", false},    {"by_expert_deepseek_v2", "deepseek_v2_group", true},
    {"by_expert_dora", "olmoe_odd", true},
    {"bottleneck_parallel", "yarn", true},          {"bottleneck_series", "yarn", true},
    {"hub_houlsby", "yarn", true},                  {"hub_pfeiffer", "yarn", true},
    {"hub_parallel", "yarn", true},
    /* llama.cpp's files of the folders of these names */
    {"lora.gguf", "yarn", true},                    {"lora_f16.gguf", "llama", true},
    {"alora.gguf", "yarn", true},                   {"embeddings.gguf", "yarn", true},
    {"by_expert_mixtral.gguf", "mixtral_odd", true}, {"by_expert_qwen3_moe.gguf", "qwen3_moe_odd", true},
};

/* What Choir refuses, and words of the sentence that says why. */
static const struct {
    const char *name, *base, *why;
} refused[] = {
    {"bottleneck_before", "yarn", "gate_proj.adapter_down.weight': without use_parallel_adapter"},
};

typedef struct mix {
    const char *name, *base;
    uint32_t n;
    struct {
        const char *adapter;
        float weight;
    } uses[4];
} mix;
static const mix mixes[] = {
    {"mix_lora", "yarn", 3, {{"lora", 0.75F}, {"patterns", -0.5F}, {"some_layers", 1.25F}}},
    {"mix_kinds", "yarn", 4, {{"dora", 0.5F}, {"ia3_outputs", 0.75F}, {"vera", -0.25F}, {"bottleneck_parallel", 0.5F}}},
};
// clang-format on
enum {
    N_FIXTURES = sizeof fixtures / sizeof *fixtures,
    N_MIXES = sizeof mixes / sizeof *mixes,
    N_REFUSED = sizeof refused / sizeof *refused,
};

/* A model with what one request has of adapters. */
typedef struct setting {
    choir_engine *engine;
    const char *what; /* for sentences */
    bool lends;
    uint32_t n_uses, n_virtual;
    choir_adapter *adapters[CHOIR_MAX_MIX];
    choir_adapter_use uses[CHOIR_MAX_MIX];
    uint32_t n_invocation, invocation[CHOIR_ADAPTER_MAX_INVOCATION];
} setting;

static choir_engine *open_engine(const char *base, const char *ending, bool exact)
{
    char path[256];
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    o.exact = exact;
    o.n_threads = 2;
    o.max_rows = MAX_TOKENS;
    o.kv_bytes = (uint64_t)4 << 20;
    o.max_context = N_PAGES * CHOIR_PAGE_TOKENS;
    snprintf(path, sizeof path, "tests/fixtures/models/%s%s", base, ending);
    choir_engine *engine;
    if (choir_engine_open(path, &o, &engine) != CHOIR_OK) fail_msg("%s", choir_error_message());
    return engine;
}

/* What an adapter's data are of, where they were not copied. */
typedef struct lender {
    choir_map map;
    char *config;
} lender;

/* As a server's pool reads them: numbers may stay where they lie in the file. */
static choir_status read_lent(const choir_engine *e, const char *path, lender *l,
                              choir_adapter_data **data)
{
    choir_adapter_source s = {.name = path};
    if (choir_folder_exists(path)) {
        CHOIR_TRY(choir_adapter_open_files(path, &s, &l->config, &l->map));
    } else {
        CHOIR_TRY(choir_map_open(path, &l->map));
        s.tensors = l->map.data;
        s.tensor_bytes = l->map.bytes;
    }
    s.lends = true;
    return choir_adapter_data_parse(choir_engine_config(e), &s, data);
}

/* False: the adapter cannot be had, and the sentence is printed. */
static bool add_adapter(setting *s, const char *name, float weight)
{
    char path[256];
    choir_adapter_data *data;
    lender l = {0};
    snprintf(path, sizeof path, ADAPTERS "/%s", name);
    choir_status status =
        s->lends ? read_lent(s->engine, path, &l, &data)
                 : choir_adapter_data_open(choir_engine_config(s->engine), path, &data);
    if (status != CHOIR_OK) {
        print_message("%s: %s\n", s->what, choir_error_message());
        return false;
    }
    choir_adapter *adapter;
    status = choir_adapter_make(s->engine, data, CHOIR_ADAPTER_AUTO, NULL, &adapter);
    s->n_virtual += data->n_virtual;
    s->n_invocation = data->n_invocation;
    memcpy(s->invocation, data->invocation, sizeof s->invocation);
    choir_adapter_data_free(data);
    if (s->lends) choir_map_close(&l.map);
    choir_free(l.config);
    if (status != CHOIR_OK) {
        print_message("%s: %s\n", s->what, choir_error_message());
        return false;
    }
    s->adapters[s->n_uses] = adapter;
    s->uses[s->n_uses++] = (choir_adapter_use){adapter, weight};
    return true;
}

static void end(setting *s)
{
    for (uint32_t i = 0; i < s->n_uses; i++) choir_adapter_free(s->adapters[i]);
    choir_engine_close(s->engine);
}

/* Where the last occurrence of the invocation begins: adapters with none act from 0 on. */
static uint32_t acts_from(const setting *s, const uint32_t *ids, uint32_t n)
{
    uint32_t m = s->n_invocation, from = m > 0 ? n : 0;
    for (uint32_t i = 0; m > 0 && i + m <= n; i++)
        if (memcmp(ids + i, s->invocation, m * sizeof *ids) == 0) from = i;
    return from;
}

/* Virtual tokens and a prompt, in chunks: logits of the prompt's tokens. The sequence goes on
 * behind it. */
static void run_prompt(const setting *s, sequence *q, const uint32_t *ids, uint32_t n,
                       uint32_t chunk, float *logits)
{
    const choir_model_config *c = choir_engine_config(s->engine);
    uint32_t tokens[MAX_TOKENS], total = s->n_virtual + n;
    assert_true(total <= MAX_TOKENS);
    for (uint32_t i = 0; i < s->n_virtual; i++) tokens[i] = c->vocab + i;
    memcpy(tokens + s->n_virtual, ids, n * sizeof *ids);
    for (uint32_t at = 0; at < total; at += chunk) {
        uint32_t m = total - at < chunk ? total - at : chunk, end = at + m;
        choir_span span = sequence_span(q, tokens + at, m, NULL);
        span.n_logits = end <= s->n_virtual ? 0 : end - s->n_virtual < m ? end - s->n_virtual : m;
        if (span.n_logits > 0)
            span.logits = logits + (size_t)(end - s->n_virtual - span.n_logits) * c->vocab;
        span.adapters = s->uses;
        span.n_adapters = s->n_uses;
        span.adapter_from = acts_from(s, ids, n);
        if (choir_engine_step(s->engine, &span, 1) != CHOIR_OK)
            fail_msg("%s: %s", s->what, choir_error_message());
        if (span.status != CHOIR_OK) fail_msg("%s: %s", s->what, choir_status_text(span.status));
        sequence_advance(q, &span);
    }
}

/* The largest difference, as a part of the largest logit. */
static double difference(const float *a, const float *b, size_t n)
{
    double worst = 0, largest = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(a[i])) return INFINITY;
        worst = fmax(worst, fabs((double)a[i] - b[i]));
        largest = fmax(largest, fabs((double)b[i]));
    }
    return worst / largest;
}

static uint32_t best_of(const float *logits, uint32_t vocab)
{
    uint32_t best = 0;
    for (uint32_t v = 1; v < vocab; v++)
        if (logits[v] > logits[best]) best = v;
    return best;
}

static void compare_greedy(const setting *s, sequence *q, const reference *r,
                           const reference_prompt *p, const float *last)
{
    float *logits = malloc(sizeof *logits * r->vocab);
    assert_non_null(logits);
    memcpy(logits, last, sizeof *logits * r->vocab);
    for (uint32_t i = 0; i < p->n_greedy; i++) {
        if (p->margins[i] > 1e-3F && best_of(logits, r->vocab) != p->greedy[i])
            fail_msg("%s: greedy token %u is %u, not %u", s->what, i, best_of(logits, r->vocab),
                     p->greedy[i]);
        choir_span span = sequence_span(q, &p->greedy[i], 1, logits);
        span.adapters = s->uses;
        span.n_adapters = s->n_uses;
        assert_int_equal(choir_engine_step(s->engine, &span, 1), CHOIR_OK);
        sequence_advance(q, &span);
    }
    free(logits);
}

/* What exact mode is held to, in parts of the largest logit: against PEFT, and against the merged
 * model. */
static const double exact_limit = 2e-4, merged_limit = 1e-3;

typedef struct worst {
    double exact, merged, fast;
    uint32_t n_fast, n_other; /* positions of the fast path, and those with another best token */
    uint32_t n_failed;
} worst;

static void compare_exact(const setting *s, const reference *r, worst *w)
{
    const reference_prompt *p = &r->prompts[0];
    size_t n = (size_t)p->n_tokens * r->vocab;
    float *logits = malloc(sizeof *logits * n), *chunked = malloc(sizeof *chunked * n);
    assert_true(logits != NULL && chunked != NULL);
    sequence q = sequence_at(s->engine, 0, N_PAGES), again = sequence_at(s->engine, 0, N_PAGES);
    run_prompt(s, &again, p->ids, p->n_tokens, 5, chunked);
    run_prompt(s, &q, p->ids, p->n_tokens, MAX_TOKENS, logits);
    double d = difference(logits, p->logits, n), merged = 0;
    if (r->n_prompts > 1) {
        const reference_prompt *m = &r->prompts[1];
        size_t last = (size_t)m->n_tokens * r->vocab;
        merged = difference(logits + n - last, m->logits, last);
    }
    print_message("%-44s exact %.1e, merged %.1e\n", s->what, d, merged);
    if (!(d <= exact_limit) || !(merged <= merged_limit)) {
        w->n_failed++;
    } else {
        if (memcmp(logits, chunked, n * sizeof *logits) != 0)
            fail_msg("%s: other bits where the prompt is cut", s->what);
        compare_greedy(s, &q, r, p, logits + n - r->vocab);
    }
    w->exact = fmax(w->exact, d);
    w->merged = fmax(w->merged, merged);
    free(logits);
    free(chunked);
}

/* The fast path: f16 adapters, weights as they are, f16 keys and values. The best token may be
 * another one only where the reference's two best are as close as the path is exact. */
static void compare_fast(const setting *s, const reference *r, worst *w)
{
    const reference_prompt *p = &r->prompts[0];
    float *logits = malloc(sizeof *logits * p->n_tokens * r->vocab);
    assert_non_null(logits);
    sequence q = sequence_at(s->engine, 0, N_PAGES);
    run_prompt(s, &q, p->ids, p->n_tokens, MAX_TOKENS, logits);
    double d = difference(logits, p->logits, (size_t)p->n_tokens * r->vocab);
    uint32_t n_other = 0;
    for (uint32_t t = 0; t < p->n_tokens; t++)
        n_other += best_of(logits + (size_t)t * r->vocab, r->vocab) !=
                   best_of(p->logits + (size_t)t * r->vocab, r->vocab);
    print_message("%-44s fast %.1e, %u of %u best tokens differ\n", s->what, d, n_other,
                  p->n_tokens);
    w->n_fast += p->n_tokens;
    w->n_other += n_other;
    w->fast = fmax(w->fast, d);
    free(logits);
}

static void compare_setting(setting *s, const char *name, bool exact, worst *w)
{
    char path[256];
    snprintf(path, sizeof path, ADAPTERS "/%.*s/ref.bin", (int)strcspn(name, "."), name);
    reference r = reference_open(path);
    if (exact)
        compare_exact(s, &r, w);
    else
        compare_fast(s, &r, w);
    reference_close(&r);
}

static void compare_fixture(const fixture *f, const char *ending, bool exact, worst *w)
{
    char what[128];
    snprintf(what, sizeof what, "%s on %s%s", f->name, f->base, ending);
    setting s = {.engine = open_engine(f->base, ending, exact), .what = what, .lends = exact};
    if (add_adapter(&s, f->name, 1))
        compare_setting(&s, f->name, exact, w);
    else
        w->n_failed++;
    end(&s);
}

static void compare_all(bool exact, worst *w)
{
    for (size_t i = 0; i < N_FIXTURES; i++) {
        compare_fixture(&fixtures[i], "", exact, w);
        if (fixtures[i].twin) compare_fixture(&fixtures[i], ".gguf", exact, w);
    }
    for (size_t i = 0; i < N_MIXES; i++) {
        setting s = {.engine = open_engine(mixes[i].base, "", exact), .what = mixes[i].name};
        bool all = true;
        for (uint32_t u = 0; u < mixes[i].n; u++)
            all = add_adapter(&s, mixes[i].uses[u].adapter, mixes[i].uses[u].weight) && all;
        if (all) compare_setting(&s, mixes[i].name, exact, w);
        w->n_failed += !all;
        end(&s);
    }
}

static void test_exact(void **state)
{
    (void)state;
    worst w = {0};
    compare_all(true, &w);
    print_message("exact: at most %.1e, merged %.1e, %u failed\n", w.exact, w.merged, w.n_failed);
    assert_int_equal(w.n_failed, 0);
}

static void test_fast(void **state)
{
    (void)state;
    worst w = {0};
    compare_all(false, &w);
    print_message("fast: at most %.1e, %u of %u best tokens differ\n", w.fast, w.n_other, w.n_fast);
    assert_int_equal(w.n_failed, 0);
    assert_true(w.fast <= 6e-3);
    assert_true(w.n_other * 100 <= w.n_fast);
}

/* A folder that the tables forget would be compared with nothing. */
static void test_refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_REFUSED; i++) {
        char path[256];
        choir_adapter_data *data;
        choir_engine *engine = open_engine(refused[i].base, "", true);
        snprintf(path, sizeof path, ADAPTERS "/%s", refused[i].name);
        assert_int_equal(choir_adapter_data_open(choir_engine_config(engine), path, &data),
                         CHOIR_E_UNIMPLEMENTED);
        assert_non_null(strstr(choir_error_message(), refused[i].why));
        choir_engine_close(engine);
    }
}

static void test_none_is_forgotten(void **state)
{
    (void)state;
    struct dirent **names;
    int n = scandir(ADAPTERS, &names, NULL, alphasort), n_seen = 0;
    for (int i = 0; i < n; i++) {
        bool known = names[i]->d_name[0] == '.';
        for (size_t k = 0; k < N_FIXTURES; k++)
            known |= strcmp(names[i]->d_name, fixtures[k].name) == 0;
        for (size_t k = 0; k < N_MIXES; k++) known |= strcmp(names[i]->d_name, mixes[k].name) == 0;
        for (size_t k = 0; k < N_REFUSED; k++)
            known |= strcmp(names[i]->d_name, refused[k].name) == 0;
        if (!known) fail_msg("%s is in no table", names[i]->d_name);
        n_seen += names[i]->d_name[0] != '.';
        free(names[i]);
    }
    free(names);
    assert_int_equal(n_seen, N_FIXTURES + N_MIXES + N_REFUSED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_none_is_forgotten),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_fast),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
