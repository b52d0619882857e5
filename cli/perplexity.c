/* The text is tokenized whole and cut into windows of --context tokens, each with fresh KV; scored
 * are positions 1 … of every window, or the second halves of full windows (as llama.cpp does). */
#include "cli/adapters.h"

#include <math.h>
#include <stdio.h>

enum { MAX_TEXT_BYTES = 1 << 30 };

typedef struct values {
    choir_cli_engine_values engine;
    choir_cli_adapter_values adapters;
    const char *file;
    uint64_t context, windows;
    bool second_half, json;
} values;
static const values defaults = {.adapters = CHOIR_CLI_ADAPTER_DEFAULT, .context = 512};
static const choir_option options[] = {
    {"file", 'f', CHOIR_OPTION_TEXT, offsetof(values, file), "FILE", "the text, UTF-8", 0, 0},
    {"context", 'c', CHOIR_OPTION_COUNT, offsetof(values, context), "N", "tokens a window", 2,
     1 << 20},
    {"windows", 0, CHOIR_OPTION_COUNT, offsetof(values, windows), "N",
     "only the first N windows; 0: all", 0, 1e9},
    {"second-half", 0, CHOIR_OPTION_FLAG, offsetof(values, second_half), NULL,
     "score the second halves of full windows only", 0, 0},
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL, "one JSON object", 0, 0},
    CHOIR_CLI_ADAPTER_OPTIONS(values, adapters),
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};

typedef struct score {
    double nll;
    uint64_t tokens;
} score;

typedef struct job {
    choir_engine *engine;
    choir_cli_adapters adapters;
    char *text;
    uint32_t *ids, *pages, n_pages, rows; /* rows: of a step */
    size_t n_ids;
    float *scores; /* [context - 1] of a window: the log-probabilities of its tokens 1 … */
} job;

/* One window in chunks of the step's rows. */
static choir_status score_window(job *j, const uint32_t *ids, uint32_t n)
{
    CHOIR_TRY(choir_cli_adapters_begin(&j->adapters, j->engine, j->pages, j->n_pages));
    for (uint32_t first = 0; first < n - 1; first += j->rows) {
        uint32_t m = n - 1 - first < j->rows ? n - 1 - first : j->rows;
        choir_span span = {.tokens = ids + first,
                           .n_tokens = m,
                           .position = j->adapters.n_virtual + first,
                           .pages = j->pages,
                           .n_pages = j->n_pages,
                           .n_logits = m,
                           .targets = ids + first + 1,
                           .target_logprobs = j->scores + first};
        choir_cli_adapters_use(&j->adapters, ids, n, &span);
        CHOIR_TRY(choir_engine_step(j->engine, &span, 1));
        CHOIR_TRY(choir_span_failure(&span));
    }
    return CHOIR_OK;
}

static choir_status score_all(job *j, const values *v, score *out)
{
    uint32_t context = (uint32_t)v->context;
    size_t n_windows = (j->n_ids + context - 1) / context;
    if (v->windows > 0 && v->windows < n_windows) n_windows = (size_t)v->windows;
    choir_progress progress;
    choir_progress_begin(&progress, "scoring", CHOIR_PROGRESS_ITEMS, n_windows);
    for (size_t w = 0; w < n_windows; w++) {
        size_t at = w * context, left = j->n_ids - at;
        uint32_t len = left < context ? (uint32_t)left : context;
        if (len < 2 || (v->second_half && len < context)) break;
        CHOIR_TRY(score_window(j, j->ids + at, len));
        for (uint32_t i = v->second_half ? context / 2 : 0; i + 1 < len; i++, out->tokens++)
            out->nll -= (double)j->scores[i];
        choir_progress_update(&progress, w + 1);
    }
    choir_progress_end(&progress);
    if (out->tokens == 0)
        return choir_fail(CHOIR_E_INVALID, "the text has %zu tokens, too few for windows of %u",
                          j->n_ids, context);
    return CHOIR_OK;
}

static void print(const values *v, const score *s, double seconds)
{
    double ppl = exp(s->nll / (double)s->tokens), speed = (double)s->tokens / seconds;
    if (!v->json) {
        printf("perplexity %.4f over %llu tokens (%.0f tokens/s)\n", ppl,
               (unsigned long long)s->tokens, speed);
        return;
    }
    json_t *o = json_pack("{s:f, s:f, s:I, s:f}", "ppl", ppl, "nll", s->nll, "tokens",
                          (json_int_t)s->tokens, "tokens_per_s", speed);
    choir_cli_print_json(o, false);
}

/* The model, and memory for windows of --context tokens behind the adapter's virtual ones. */
static choir_status open_model(job *j, const values *v, const char *model)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    CHOIR_TRY(choir_cli_engine_options(&v->engine, &o));
    CHOIR_TRY(choir_cli_adapters_read(&v->adapters, model, &j->adapters));
    uint64_t window = v->context + j->adapters.n_virtual;
    o.max_context = (uint32_t)window;
    o.max_rows = v->context < 512 ? (uint32_t)v->context : 512;
    if (o.max_spans > o.max_rows) o.max_spans = o.max_rows;
    CHOIR_TRY(choir_cli_open_engine(model, &o, &j->engine));
    CHOIR_TRY(choir_cli_adapters_fit(&j->adapters, "--context", v->context,
                                     choir_engine_config(j->engine)));
    if (window > (uint64_t)choir_engine_n_pages(j->engine) * CHOIR_PAGE_TOKENS) {
        /* A longer window needs more KV than one step's rows: opened again with that much. */
        o.kv_bytes = (window / CHOIR_PAGE_TOKENS + 1) * choir_engine_page_bytes(j->engine);
        choir_engine_close(j->engine);
        j->engine = NULL;
        CHOIR_TRY(choir_cli_open_engine(model, &o, &j->engine));
    }
    CHOIR_TRY(choir_cli_adapters_make(&j->adapters, j->engine));
    j->rows = o.max_rows;
    j->n_pages = choir_engine_n_pages(j->engine);
    j->pages = choir_alloc(CHOIR_MEM_OTHER, j->n_pages * sizeof *j->pages);
    j->scores = choir_alloc(CHOIR_MEM_OTHER, v->context * sizeof *j->scores);
    if (j->pages == NULL || j->scores == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the scores");
    for (uint32_t i = 0; i < j->n_pages; i++) j->pages[i] = i;
    return CHOIR_OK;
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    job j = {0};
    size_t bytes;
    score s = {0};
    choir_status status;
    CHOIR_TRY(choir_file_read(v->file, MAX_TEXT_BYTES, &j.text, &bytes));
    CHOIR_TRY_TO(done, status, open_model(&j, v, arguments->positional[0]));
    CHOIR_TRY_TO(done, status,
                 choir_tokenizer_encode(choir_engine_tokenizer(j.engine), j.text, bytes,
                                        CHOIR_ENCODE_OPTIONS_DEFAULT, &j.ids, &j.n_ids));
    uint64_t start = choir_clock_now();
    CHOIR_TRY_TO(done, status, score_all(&j, v, &s));
    print(v, &s, (double)(choir_clock_now() - start) / 1e9);
done:
    choir_free(j.scores);
    choir_free(j.pages);
    choir_free(j.ids);
    choir_free(j.text);
    choir_cli_adapters_close(&j.adapters);
    choir_engine_close(j.engine);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    (void)arguments;
    if (v->file == NULL) return choir_fail(CHOIR_E_INVALID, "--file FILE is missing");
    return choir_cli_adapters_check(&v->adapters);
}

const choir_verb choir_verb_perplexity = {
    .name = "perplexity",
    .arguments =
        "MODEL --file F [--context 512] [--second-half] [--adapter DIR] [--exact] [--json]",
    .summary = "how well a model predicts a text",
    .example =
        "choir perplexity SmolLM2-135M-Instruct.Q4_1 --file /usr/share/common-licenses/GPL-3",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .check = check,
    .run = run,
};
