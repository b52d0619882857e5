#include "tune/gates.h"

#include "engine/engine.h"

#include <math.h>
#include <string.h>

enum { WINDOW = 256, MAX_TOKENS = 768, MAX_TEXT_BYTES = 16 << 20 };

typedef struct collector {
    choir_engine *engine;
    const choir_model_config *config;
    float *inputs; /* [n_layers, WINDOW, hidden] of one window */
    double *means; /* [n_layers, n_experts, hidden] */
    uint32_t n_experts;
} collector;

/* Adds the window's mean to each layer's row of this expert: windows weigh alike, whatever their
 * length. */
static choir_status run_window(collector *c, const uint32_t *ids, uint32_t n, uint32_t expert)
{
    uint32_t pages[WINDOW / CHOIR_PAGE_TOKENS], hidden = c->config->hidden;
    uint32_t n_pages = (n + CHOIR_PAGE_TOKENS - 1) / CHOIR_PAGE_TOKENS;
    for (uint32_t i = 0; i < n_pages; i++) pages[i] = i;
    choir_span span = {
        .tokens = ids, .n_tokens = n, .pages = pages, .n_pages = n_pages, .ffn_inputs = c->inputs};
    CHOIR_TRY(choir_engine_step(c->engine, &span, 1));
    for (uint32_t l = 0; l < c->config->n_layers; l++) {
        double *mean = c->means + ((size_t)l * c->n_experts + expert) * hidden;
        for (uint32_t i = 0; i < hidden; i++) {
            double sum = 0;
            for (uint32_t t = 0; t < n; t++)
                sum += (double)c->inputs[((size_t)l * n + t) * hidden + i];
            mean[i] += sum / n;
        }
    }
    return span.status;
}

static choir_status run_text(collector *c, const char *path, uint32_t expert)
{
    char *text = NULL;
    uint32_t *ids = NULL;
    size_t bytes, n;
    CHOIR_TRY(choir_file_read(path, MAX_TEXT_BYTES, &text, &bytes));
    choir_status status = choir_tokenizer_encode(choir_engine_tokenizer(c->engine), text, bytes,
                                                 CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n);
    if (status == CHOIR_OK && n == 0)
        status = choir_fail(CHOIR_E_INVALID, "the sample text %s has no tokens", path);
    if (status != CHOIR_OK) goto done;
    if (n > MAX_TOKENS) n = MAX_TOKENS;
    uint32_t n_windows = 0;
    for (uint32_t at = 0; at < n; at += WINDOW, n_windows++) {
        uint32_t left = (uint32_t)n - at;
        CHOIR_TRY_TO(done, status, run_window(c, ids + at, left < WINDOW ? left : WINDOW, expert));
    }
    for (uint32_t l = 0; l < c->config->n_layers; l++) {
        double *mean = c->means + ((size_t)l * c->n_experts + expert) * c->config->hidden;
        for (uint32_t i = 0; i < c->config->hidden; i++) {
            mean[i] /= n_windows;
            if (!isfinite(mean[i]))
                status = choir_fail(CHOIR_E_DATA_LOSS,
                                    "hidden states of layer %u over %s are NaN or "
                                    "infinite",
                                    l, path);
        }
    }
done:
    choir_free(ids);
    choir_free(text);
    return status;
}

static double dot(const double *a, const double *b, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Orthogonal to c, a row has no share in what all tokens have in common, and needs no bias for it.
 */
void choir_tune_gates_of_means(double *means, uint32_t n, uint32_t hidden, float temperature,
                               double *c, float *gates)
{
    for (uint32_t i = 0; i < hidden; i++) {
        c[i] = 0;
        for (uint32_t e = 0; e < n; e++) c[i] += means[(size_t)e * hidden + i];
        c[i] /= n;
    }
    double cc = dot(c, c, hidden);
    for (uint32_t e = 0; e < n; e++) {
        double *w = means + (size_t)e * hidden;
        for (uint32_t i = 0; i < hidden; i++) w[i] -= c[i];
        double share = cc > 0 ? dot(w, c, hidden) / cc : 0;
        for (uint32_t i = 0; i < hidden; i++) w[i] -= share * c[i];
        /* A text like the mean of all has no direction of its own: what rounding left is none. */
        double length = sqrt(dot(w, w, hidden));
        double scale = length > 1e-9 * sqrt(cc) ? temperature / length : 0;
        for (uint32_t i = 0; i < hidden; i++) gates[(size_t)e * hidden + i] = (float)(w[i] * scale);
    }
}

static choir_status collect(collector *c, const char *const *texts, bool show_progress)
{
    choir_progress progress;
    choir_progress_begin(&progress, "gates from sample texts", CHOIR_PROGRESS_ITEMS, c->n_experts);
    progress.quiet = !show_progress;
    choir_status status = CHOIR_OK;
    for (uint32_t e = 0; e < c->n_experts && status == CHOIR_OK; e++) {
        status = run_text(c, texts[e], e);
        choir_progress_update(&progress, e + 1);
    }
    choir_progress_end(&progress);
    return status;
}

choir_status choir_tune_gates_from_texts(const char *base_path, const char *const *texts,
                                         uint32_t n_experts, float temperature, uint32_t n_threads,
                                         bool show_progress, float *gates)
{
    collector c = {.n_experts = n_experts};
    double *common = NULL;
    choir_engine_options options = CHOIR_ENGINE_OPTIONS_DEFAULT;
    options.exact = true;
    options.n_threads = n_threads;
    options.max_rows = WINDOW;
    options.max_spans = 1;
    options.show_progress = show_progress;
    choir_status status;
    CHOIR_TRY_TO(done, status, choir_engine_open(base_path, &options, &c.engine));
    c.config = choir_engine_config(c.engine);
    uint32_t n_layers = c.config->n_layers, hidden = c.config->hidden;
    c.inputs = choir_alloc(CHOIR_MEM_TUNE, (size_t)n_layers * WINDOW * hidden * sizeof *c.inputs);
    c.means = choir_calloc(CHOIR_MEM_TUNE, (size_t)n_layers * n_experts * hidden, sizeof *c.means);
    common = choir_alloc(CHOIR_MEM_TUNE, hidden * sizeof *common);
    if (c.inputs == NULL || c.means == NULL || common == NULL) {
        status =
            choir_fail(CHOIR_E_NO_MEMORY, "no memory for the hidden states of %u layers", n_layers);
        goto done;
    }
    CHOIR_TRY_TO(done, status, collect(&c, texts, show_progress));
    for (uint32_t l = 0; l < n_layers; l++) {
        size_t at = (size_t)l * n_experts * hidden;
        choir_tune_gates_of_means(c.means + at, n_experts, hidden, temperature, common, gates + at);
    }
done:
    choir_free(common);
    choir_free(c.means);
    choir_free(c.inputs);
    choir_engine_close(c.engine);
    return status;
}
