#include "tests/server/simulated_model.h"

#include "tests/server/simulated_adapters.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { PAGE_TOKENS = 32, MAX_PAGES = 65536, END = 256, VOCAB = 265, N_LAYERS = 2, CONTEXT = 4096 };

typedef enum mode {
    MODE_LETTERS, /* letters of the alphabet by position, so that a recomputed answer is the same */
    MODE_SHORT,   /* <|short|>: "ok", then the end */
    MODE_ACCENT,  /* <|accent|>: characters of 2, 3 and 4 bytes, a byte a token */
    MODE_NUL,     /* <|nul|>: a NUL every third byte */
    MODE_STALL,   /* <|stall|>: the step hangs for --stall-ms */
    MODE_NAN,     /* <|nan|>: the span fails */
    MODE_SLOW,    /* <|slow|>: a step of 50 ms */
    N_MODES
} mode;
static const uint32_t first_mode_token = 259;

/* What the engine knows of a sequence, by its first page. */
typedef struct simulated_pages {
    uint8_t modes[MAX_PAGES];
    uint32_t starts[MAX_PAGES]; /* position of the answer's first token */
} simulated_pages;

static void sleep_ms(uint32_t ms)
{
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000L};
    while (nanosleep(&t, &t) != 0) {
    }
}

static uint32_t token_at(mode m, uint32_t position, uint32_t index, int shift)
{
    static const char accents[] = "na\xC3\xAFve \xE2\x98\x95 \xF0\x9F\x98\x80 ";
    switch (m) {
    case MODE_SHORT:
        return index < 2 ? (uint32_t) "ok"[index] : END;
    case MODE_ACCENT:
        return (uint8_t)accents[index % (sizeof accents - 1)];
    case MODE_NUL:
        return index % 3 == 2 ? 0 : 'a' + index % 26;
    default:
        return 'a' + (position + (uint32_t)shift) % 26;
    }
}

static void fill_sample(choir_span *span, uint32_t token)
{
    span->sample = (choir_sample){.token = token, .logprob = -0.5f, .n_top = 2};
    for (uint32_t i = 0; i < 2; i++) {
        span->sample.top_tokens[i] = i == 0 ? token : 'z';
        span->sample.top_logprobs[i] = -0.5f - (float)i;
    }
}

static void fill_routes(choir_span *span)
{
    if (span->routes == NULL) return;
    for (uint32_t i = 0; i < N_LAYERS * span->n_tokens * 2; i++) {
        span->routes->experts[i] = (uint16_t)(i % 2);
        span->routes->weights[i] = 0.5f;
    }
}

static choir_status step(void *engine, choir_span *spans, uint32_t n_spans)
{
    simulated_model *s = engine;
    uint32_t wait_ms = s->step_ms;
    s->n_steps++;
    for (uint32_t i = 0; i < n_spans; i++) {
        choir_span *span = &spans[i];
        uint32_t key = span->pages[0] % MAX_PAGES;
        span->status = CHOIR_OK;
        if (span->position == 0) {
            uint32_t t = span->tokens[0];
            bool steers = t >= first_mode_token && t < first_mode_token + N_MODES - 1;
            s->pages->modes[key] = (uint8_t)(steers ? t - first_mode_token + 1 : MODE_LETTERS);
        }
        mode m = (mode)s->pages->modes[key];
        if (m == MODE_SLOW && wait_ms < 50) wait_ms = 50;
        if (m == MODE_STALL && !s->stalled) {
            s->stalled = true;
            wait_ms = s->stall_ms;
        }
        uint32_t after = span->position + span->n_tokens;
        if (span->n_tokens > 1 || span->position == 0) s->pages->starts[key] = after;
        bool poison = m == MODE_NAN;
        int shift = simulated_adapters_shift(span, &poison);
        if (poison)
            span->status = choir_fail(CHOIR_E_DATA_LOSS, "the logits are not numbers");
        if (span->n_logits != 0)
            fill_sample(span, token_at(m, after, after - s->pages->starts[key], shift));
        fill_routes(span);
    }
    if (wait_ms != 0) sleep_ms(wait_ms);
    return CHOIR_OK;
}

static void copy_page(void *engine, uint32_t from, uint32_t to)
{
    simulated_model *s = engine;
    s->pages->modes[to % MAX_PAGES] = s->pages->modes[from % MAX_PAGES];
    s->pages->starts[to % MAX_PAGES] = s->pages->starts[from % MAX_PAGES];
}

static void zero_page(void *engine, uint32_t page)
{
    ((simulated_model *)engine)->pages->modes[page % MAX_PAGES] = 0;
}

static const char template_source[] =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

static choir_model_config make_config(void)
{
    choir_model_config c = {.n_layers = N_LAYERS,
                            .hidden = 8,
                            .n_experts = 2,
                            .n_experts_used = 2,
                            .vocab = VOCAB,
                            .max_positions = CONTEXT,
                            .n_eos = 1,
                            .bos_id = -1,
                            .pad_id = -1,
                            .top_k = 40,
                            .temperature = 0.7f};
    c.eos_ids[0] = END;
    snprintf(c.name, sizeof c.name, "simulated");
    snprintf(c.licence, sizeof c.licence, "Apache-2.0");
    return c;
}

static choir_status read_tokenizer(const char *path, choir_tokenizer **out)
{
    char *json;
    size_t bytes;
    CHOIR_TRY(choir_file_read(path, 1 << 20, &json, &bytes));
    choir_status status = choir_tokenizer_parse_json(json, bytes, out);
    choir_free(json);
    return status;
}

choir_status simulated_model_open(simulated_model *m, const char *tokenizer, uint32_t n_pages)
{
    *m = (simulated_model){.config = make_config(), .stall_ms = 3000};
    m->pages = choir_calloc(CHOIR_MEM_OTHER, 1, sizeof *m->pages);
    if (m->pages == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a simulated model");
    choir_status status = read_tokenizer(tokenizer, &m->tokenizer);
    if (status == CHOIR_OK)
        status = choir_chat_template_compile(template_source, sizeof template_source - 1,
                                             &m->chat_template);
    if (status != CHOIR_OK) simulated_model_close(m);
    m->engine = (choir_step_engine){.engine = m,
                                    .step = step,
                                    .copy_page = copy_page,
                                    .zero_page = zero_page,
                                    .n_pages = n_pages,
                                    .page_tokens = PAGE_TOKENS,
                                    .vocab = VOCAB,
                                    .max_positions = CONTEXT,
                                    .max_rows = 512,
                                    .max_spans = 128,
                                    .tokenizer = m->tokenizer,
                                    .digest = 7,
                                    .eos_ids = m->config.eos_ids,
                                    .n_eos = m->config.n_eos,
                                    .n_layers = N_LAYERS,
                                    .n_experts_used = 2};
    return status;
}

void simulated_model_close(simulated_model *m)
{
    choir_chat_template_destroy(m->chat_template);
    choir_tokenizer_destroy(m->tokenizer);
    choir_free(m->pages);
    m->chat_template = NULL;
    m->tokenizer = NULL;
    m->pages = NULL;
}

static choir_experts_stats expert_stats(void *engine)
{
    uint64_t n = ((simulated_model *)engine)->n_steps;
    choir_experts_stats x = {.streamed = true,
                             .io = "pread",
                             .policy = "router",
                             .n_experts = 4,
                             .n_slots = 3,
                             .n_slots_used = 2,
                             .budget_bytes = 5000000000,
                             .held_bytes = 4000000000,
                             .n_hits = 101 + n,
                             .n_late_hits = 102 + n,
                             .n_misses = 103 + n,
                             .n_prefetched = 104 + n,
                             .n_prefetch_used = 105 + n,
                             .n_prefetch_wasted = 106 + n,
                             .n_predicted = 107 + n,
                             .n_predicted_right = 108 + n,
                             .prefetching = true,
                             .n_reads = 109 + n,
                             .bytes_read = 6000000000 + n,
                             .n_retries = 110 + n,
                             .n_damaged = 111 + n,
                             .n_failed = 112 + n,
                             .n_late = 113 + n,
                             .stall_ns = 1500000000 + n,
                             .busy_ns = 2500000000 + n,
                             .latency_ns = 3500000000 + n};
    x.latency[0] = 1;                         /* below what /metrics tells apart */
    x.latency[10] = 20 + n;                   /* 128 to 256 us */
    x.latency[CHOIR_LATENCY_BUCKETS - 1] = 3; /* above it */
    return x;
}

static float expert_heat(void *engine, uint32_t layer, uint32_t expert)
{
    (void)engine;
    return 0.5f + (float)(layer * 2 + expert);
}

void simulated_model_stream_experts(simulated_model *m, uint32_t n_in_layer)
{
    m->engine.expert_stats = expert_stats;
    m->engine.expert_heat = expert_heat;
    m->engine.n_experts = n_in_layer;
}

choir_server_model simulated_model_served(simulated_model *m, choir_scheduler *scheduler)
{
    static const char *const aliases[] = {"simulated-alias"};
    return (choir_server_model){.name = "simulated",
                                .aliases = aliases,
                                .n_aliases = 1,
                                .config = &m->config,
                                .tokenizer = m->tokenizer,
                                .chat_template = m->chat_template,
                                .scheduler = scheduler,
                                .digest = 7};
}
