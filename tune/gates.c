#include "tune/gates.h"

#include <math.h>
#include <string.h>

/* As the reference has it: at most three windows of 256 tokens, each window's mean counts alike. */
enum { WINDOW = 256, MAX_TOKENS = 768, MAX_SAMPLE_BYTES = 1 << 20 };

typedef struct collector {
    choir_engine *engine;
    const choir_model_config *c;
    float *taps; /* [n_layers, WINDOW, hidden] */
} collector;

/* Adds one window's mean hidden states to mean [n_layers, hidden]. */
static choir_status add_window(collector *k, const uint32_t *ids, uint32_t n, double *mean)
{
    uint32_t pages[WINDOW / CHOIR_PAGE_TOKENS];
    for (uint32_t i = 0; i < WINDOW / CHOIR_PAGE_TOKENS; i++) pages[i] = i;
    choir_span span = {.tokens = ids,
                       .n_tokens = n,
                       .pages = pages,
                       .n_pages = WINDOW / CHOIR_PAGE_TOKENS,
                       .ffn_inputs = k->taps};
    CHOIR_TRY(choir_engine_step(k->engine, &span, 1));
    for (uint32_t l = 0; l < k->c->n_layers; l++)
        for (uint32_t h = 0; h < k->c->hidden; h++) {
            double sum = 0;
            for (uint32_t t = 0; t < n; t++)
                sum += (double)k->taps[((size_t)l * n + t) * k->c->hidden + h];
            mean[(size_t)l * k->c->hidden + h] += sum / n;
        }
    return CHOIR_OK;
}

static choir_status mean_of_sample(collector *k, const char *path, double *mean)
{
    char *text;
    size_t bytes, n, width = (size_t)k->c->n_layers * k->c->hidden;
    uint32_t *ids;
    CHOIR_TRY(choir_file_read(path, MAX_SAMPLE_BYTES, &text, &bytes));
    choir_status status = choir_tokenizer_encode(choir_engine_tokenizer(k->engine), text, bytes,
                                                 CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n);
    choir_free(text);
    if (status != CHOIR_OK) return choir_fail_in(status, "%s", path);
    if (n == 0) status = choir_fail(CHOIR_E_INVALID, "%s holds no text", path);
    if (n > MAX_TOKENS) n = MAX_TOKENS;
    uint32_t n_windows = 0;
    memset(mean, 0, width * sizeof *mean);
    for (size_t at = 0; at < n && status == CHOIR_OK; at += WINDOW, n_windows++)
        status = add_window(k, ids + at, (uint32_t)(n - at < WINDOW ? n - at : WINDOW), mean);
    for (size_t i = 0; i < width && status == CHOIR_OK; i++) mean[i] /= n_windows;
    choir_free(ids);
    return status;
}

/* One layer's rows from the means of all experts; means of expert e begin at means + e * stride. */
static void rows_of_layer(const double *means, size_t stride, uint32_t n, uint32_t hidden,
                          double sharpness, double *center, float *rows)
{
    double cc = 0;
    for (uint32_t h = 0; h < hidden; h++) {
        center[h] = 0;
        for (uint32_t e = 0; e < n; e++) center[h] += means[e * stride + h] / n;
        cc += center[h] * center[h];
    }
    for (uint32_t e = 0; e < n; e++) {
        double dot = 0, length = 0;
        for (uint32_t h = 0; h < hidden; h++)
            dot += (means[e * stride + h] - center[h]) * center[h];
        for (int pass = 0; pass < 2; pass++)
            for (uint32_t h = 0; h < hidden; h++) {
                double w = means[e * stride + h] - center[h] - (cc > 0 ? dot * center[h] / cc : 0);
                if (pass == 0)
                    length += w * w;
                else
                    rows[(size_t)e * hidden + h] = (float)(length > 0 ? sharpness * w / sqrt(length) : 0);
            }
    }
}

choir_status make_gates(const choir_upcycle_options *o, const choir_model_config *c, float *gates)
{
    uint32_t n = o->n_experts + 1;
    size_t width = (size_t)c->n_layers * c->hidden;
    if (o->gates == CHOIR_GATES_UNIFORM) {
        memset(gates, 0, n * width * sizeof *gates);
        return CHOIR_OK;
    }
    collector k = {.c = c};
    choir_engine_options engine = CHOIR_ENGINE_OPTIONS_DEFAULT;
    engine.exact = true;
    engine.n_threads = o->n_threads;
    engine.max_rows = WINDOW;
    choir_progress progress;
    double *means = choir_alloc(CHOIR_MEM_TUNE, n * width * sizeof *means);
    double *center = choir_alloc(CHOIR_MEM_TUNE, c->hidden * sizeof *center);
    k.taps = choir_alloc(CHOIR_MEM_TUNE, (size_t)c->n_layers * WINDOW * c->hidden * sizeof *k.taps);
    choir_status status = means == NULL || center == NULL || k.taps == NULL
                              ? choir_fail(CHOIR_E_NO_MEMORY, "no memory for the gates")
                              : choir_engine_open(o->base, &engine, &k.engine);
    choir_progress_begin(&progress, "reading sample texts", CHOIR_PROGRESS_ITEMS, n);
    for (uint32_t e = 0; e < n && status == CHOIR_OK; e++) {
        const char *path = e == 0 ? o->base_sample : o->experts[e - 1].sample;
        status = mean_of_sample(&k, path, means + e * width);
        if (o->show_progress) choir_progress_update(&progress, e + 1);
    }
    if (o->show_progress) choir_progress_end(&progress);
    for (uint32_t l = 0; l < c->n_layers && status == CHOIR_OK; l++)
        rows_of_layer(means + (size_t)l * c->hidden, width, n, c->hidden, o->sharpness, center,
                      gates + (size_t)l * n * c->hidden);
    choir_engine_close(k.engine);
    choir_free(means);
    choir_free(center);
    choir_free(k.taps);
    return status;
}
