/* The text is tokenized whole and cut into windows of --context tokens, each with fresh KV; scored
 * are positions 1 … of every window, or the second halves of full windows (as llama.cpp does). */
#include "cli/cli.h"

#include <math.h>
#include <stdio.h>

enum { MAX_TEXT_BYTES = 1 << 30 };

typedef struct values {
    choir_cli_engine_values engine;
    const char *file;
    uint64_t context, windows;
    bool second_half, json;
} values;
static const values defaults = {.context = 512};
static const choir_option options[] = {
    {"file", 'f', CHOIR_OPTION_TEXT, offsetof(values, file), "FILE", "the text, UTF-8", 0, 0},
    {"context", 'c', CHOIR_OPTION_COUNT, offsetof(values, context), "N", "tokens a window", 2,
     1 << 20},
    {"windows", 0, CHOIR_OPTION_COUNT, offsetof(values, windows), "N",
     "only the first N windows; 0: all", 0, 1e9},
    {"second-half", 0, CHOIR_OPTION_FLAG, offsetof(values, second_half), NULL,
     "score the second halves of full windows only", 0, 0},
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL, "one JSON object", 0, 0},
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};

typedef struct score {
    double nll;
    uint64_t tokens;
} score;

/* One window in chunks of the step's rows; scores: [n - 1] log-probabilities of tokens 1 … n-1. */
static choir_status score_window(choir_engine *engine, const uint32_t *ids, uint32_t n,
                                 uint32_t chunk, const uint32_t *pages, uint32_t n_pages,
                                 float *scores)
{
    for (uint32_t first = 0; first < n - 1; first += chunk) {
        uint32_t m = n - 1 - first < chunk ? n - 1 - first : chunk;
        choir_span span = {.tokens = ids + first,
                           .n_tokens = m,
                           .position = first,
                           .pages = pages,
                           .n_pages = n_pages,
                           .n_logits = m,
                           .targets = ids + first + 1,
                           .target_logprobs = scores + first};
        CHOIR_TRY(choir_engine_step(engine, &span, 1));
        CHOIR_TRY(choir_span_failure(&span));
    }
    return CHOIR_OK;
}

static choir_status score_all(choir_engine *engine, const values *v, uint32_t chunk,
                              const uint32_t *ids, size_t n, uint32_t *pages, float *scores,
                              score *out)
{
    uint32_t n_pages = choir_engine_n_pages(engine), context = (uint32_t)v->context;
    size_t n_windows = (n + context - 1) / context;
    if (v->windows > 0 && v->windows < n_windows) n_windows = (size_t)v->windows;
    choir_progress progress;
    choir_progress_begin(&progress, "scoring", CHOIR_PROGRESS_ITEMS, n_windows);
    for (uint32_t i = 0; i < n_pages; i++) pages[i] = i;
    for (size_t w = 0; w < n_windows; w++) {
        size_t at = w * context, left = n - at;
        uint32_t len = left < context ? (uint32_t)left : context;
        if (len < 2 || (v->second_half && len < context)) break;
        CHOIR_TRY(score_window(engine, ids + at, len, chunk, pages, n_pages, scores));
        for (uint32_t i = v->second_half ? context / 2 : 0; i + 1 < len; i++, out->tokens++)
            out->nll -= (double)scores[i];
        choir_progress_update(&progress, w + 1);
    }
    choir_progress_end(&progress);
    if (out->tokens == 0)
        return choir_fail(CHOIR_E_INVALID, "the text has %zu tokens, too few for windows of %u", n,
                          context);
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

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    choir_engine *engine = NULL;
    char *text = NULL;
    uint32_t *ids = NULL, *pages = NULL;
    float *scores = NULL;
    size_t bytes, n;
    score s = {0};
    choir_status status;
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    CHOIR_TRY(choir_cli_engine_options(&v->engine, &o));
    o.max_context = (uint32_t)v->context;
    o.max_rows = v->context < 512 ? (uint32_t)v->context : 512;
    if (o.max_spans > o.max_rows) o.max_spans = o.max_rows;
    CHOIR_TRY(choir_file_read(v->file, MAX_TEXT_BYTES, &text, &bytes));
    CHOIR_TRY_TO(done, status, choir_cli_open_engine(arguments->positional[0], &o, &engine));
    const choir_model_config *c = choir_engine_config(engine);
    if (v->context > c->max_positions) {
        status = choir_fail(CHOIR_E_INVALID, "--context is %llu, the model's context is %u",
                            (unsigned long long)v->context, c->max_positions);
        goto done;
    }
    if (v->context > (uint64_t)choir_engine_n_pages(engine) * CHOIR_PAGE_TOKENS) {
        /* A longer window needs more KV than one step's rows: opened again with that much. */
        o.kv_bytes = (v->context / CHOIR_PAGE_TOKENS + 1) * choir_engine_page_bytes(engine);
        choir_engine_close(engine);
        engine = NULL;
        CHOIR_TRY_TO(done, status, choir_cli_open_engine(arguments->positional[0], &o, &engine));
    }
    CHOIR_TRY_TO(done, status,
                 choir_tokenizer_encode(choir_engine_tokenizer(engine), text, bytes,
                                        CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n));
    pages = choir_alloc(CHOIR_MEM_OTHER, choir_engine_n_pages(engine) * sizeof *pages);
    scores = choir_alloc(CHOIR_MEM_OTHER, v->context * sizeof *scores);
    if (pages == NULL || scores == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for the scores");
        goto done;
    }
    uint64_t start = choir_clock_now();
    CHOIR_TRY_TO(done, status, score_all(engine, v, o.max_rows, ids, n, pages, scores, &s));
    print(v, &s, (double)(choir_clock_now() - start) / 1e9);
done:
    choir_free(scores);
    choir_free(pages);
    choir_free(ids);
    choir_free(text);
    choir_engine_close(engine);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    (void)arguments;
    return v->file != NULL ? CHOIR_OK : choir_fail(CHOIR_E_INVALID, "--file FILE is missing");
}

const choir_verb choir_verb_perplexity = {
    .name = "perplexity",
    .arguments = "MODEL --file F [--context 512] [--second-half] [--exact] [--json]",
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
