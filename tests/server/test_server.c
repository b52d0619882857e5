/* choir's front end over a simulated engine, for tests: real scheduler, real tokenizer, made-up
 * tokens. Special tokens at the start of a prompt steer the answer (see modes). Prints "listening
 * on ADDRESS". */
#include "server/server.h"

#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PAGE_TOKENS = 32, MAX_PAGES = 65536, BYTES = 256, END = 256, VOCAB = 265, N_LAYERS = 2 };

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

typedef struct simulated {
    uint32_t step_ms, stall_ms;
    bool stalled;               /* a stall happens once */
    uint8_t modes[MAX_PAGES];   /* by a sequence's first page */
    uint32_t starts[MAX_PAGES]; /* position of the answer's first token */
} simulated;

static void sleep_ms(uint32_t ms)
{
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000L};
    while (nanosleep(&t, &t) != 0) {
    }
}

static uint32_t token_at(mode m, uint32_t position, uint32_t index)
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
        return 'a' + position % 26;
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
    simulated *s = engine;
    uint32_t wait_ms = s->step_ms;
    for (uint32_t i = 0; i < n_spans; i++) {
        choir_span *span = &spans[i];
        uint32_t key = span->pages[0] % MAX_PAGES;
        span->status = CHOIR_OK;
        if (span->position == 0) {
            uint32_t t = span->tokens[0];
            bool steers = t >= first_mode_token && t < first_mode_token + N_MODES - 1;
            s->modes[key] = (uint8_t)(steers ? t - first_mode_token + 1 : MODE_LETTERS);
        }
        mode m = (mode)s->modes[key];
        if (m == MODE_SLOW && wait_ms < 50) wait_ms = 50;
        if (m == MODE_STALL && !s->stalled) {
            s->stalled = true;
            wait_ms = s->stall_ms;
        }
        uint32_t after = span->position + span->n_tokens;
        if (span->n_tokens > 1 || span->position == 0) s->starts[key] = after;
        if (m == MODE_NAN)
            span->status = choir_fail(CHOIR_E_DATA_LOSS, "the logits are not numbers");
        if (span->n_logits != 0) fill_sample(span, token_at(m, after, after - s->starts[key]));
        fill_routes(span);
    }
    if (wait_ms != 0) sleep_ms(wait_ms);
    return CHOIR_OK;
}

static void copy_page(void *engine, uint32_t from, uint32_t to)
{
    simulated *s = engine;
    s->modes[to % MAX_PAGES] = s->modes[from % MAX_PAGES];
    s->starts[to % MAX_PAGES] = s->starts[from % MAX_PAGES];
}

static void zero_page(void *engine, uint32_t page)
{
    ((simulated *)engine)->modes[page % MAX_PAGES] = 0;
}

static const char template_source[] =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

typedef struct arguments {
    const char *listen[2], *tokenizer, *keys[1], *certificate, *key;
    uint32_t n_listen, n_pages, step_ms, stall_ms;
    choir_server_options server;
    choir_scheduler_options scheduler;
} arguments;

static uint32_t number(const char *text)
{
    return (uint32_t)strtoul(text, NULL, 10);
}

static void parse(int argc, char **argv, arguments *a)
{
    // clang-format off
    static const struct option options[] = {
        {"listen", 1, NULL, 'l'},      {"tokenizer", 1, NULL, 't'},     {"pages", 1, NULL, 'p'},
        {"step-ms", 1, NULL, 's'},     {"stall-ms", 1, NULL, 'S'},      {"api-key", 1, NULL, 'k'},
        {"max-queued", 1, NULL, 'q'},  {"max-sequences", 1, NULL, 'n'}, {"outbox", 1, NULL, 'o'},
        {"slow-reader-ms", 1, NULL, 'r'}, {"stalled-after-ms", 1, NULL, 'h'},
        {"watchdog-exit-ms", 1, NULL, 'w'}, {"pause-ms", 1, NULL, 'P'},
        {"shutdown-ms", 1, NULL, 'd'}, {"stuck-ms", 1, NULL, 'u'}, {"max-calls", 1, NULL, 'c'},
        {"certificate", 1, NULL, 'C'}, {"key", 1, NULL, 'K'}, {0}};
    // clang-format on
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'l':
            if (a->n_listen < 2) a->listen[a->n_listen++] = optarg;
            break;
        case 't':
            a->tokenizer = optarg;
            break;
        case 'p':
            a->n_pages = number(optarg);
            break;
        case 's':
            a->step_ms = number(optarg);
            break;
        case 'S':
            a->stall_ms = number(optarg);
            break;
        case 'k':
            a->keys[0] = optarg;
            a->server.n_api_keys = 1;
            break;
        case 'q':
            a->scheduler.max_queued = number(optarg);
            break;
        case 'n':
            a->scheduler.max_sequences = number(optarg);
            break;
        case 'o':
            a->scheduler.outbox_bytes = number(optarg);
            break;
        case 'r':
            a->scheduler.slow_reader_ms = number(optarg);
            break;
        case 'h':
            a->scheduler.stall_ms = number(optarg);
            break;
        case 'w':
            a->server.watchdog_exit_ms = number(optarg);
            break;
        case 'P':
            a->server.drain_pause_ms = number(optarg);
            break;
        case 'd':
            a->server.shutdown_ms = number(optarg);
            break;
        case 'u':
            a->server.stuck_ms = number(optarg);
            break;
        case 'c':
            a->server.max_calls = number(optarg);
            break;
        case 'C':
            a->certificate = optarg;
            break;
        case 'K':
            a->key = optarg;
            break;
        default:
            exit(2);
        }
    }
}

static choir_model_config make_config(void)
{
    choir_model_config c = {.n_layers = N_LAYERS,
                            .hidden = 8,
                            .n_experts = 2,
                            .n_experts_used = 2,
                            .vocab = VOCAB,
                            .max_positions = 4096,
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

static choir_status serve(arguments *a, simulated *s, choir_tokenizer *tokenizer,
                          choir_chat_template *chat_template)
{
    choir_model_config config = make_config();
    choir_step_engine engine = {.engine = s,
                                .step = step,
                                .copy_page = copy_page,
                                .zero_page = zero_page,
                                .n_pages = a->n_pages,
                                .page_tokens = PAGE_TOKENS,
                                .vocab = VOCAB,
                                .max_positions = 4096,
                                .max_rows = 512,
                                .max_spans = 128,
                                .tokenizer = tokenizer,
                                .digest = 7};
    static const char *const aliases[] = {"simulated-alias"};
    choir_scheduler *scheduler = NULL;
    choir_server *server = NULL;
    choir_status status = choir_scheduler_create(&engine, &a->scheduler, &scheduler);
    if (status == CHOIR_OK) {
        choir_server_model model = {.name = "simulated",
                                    .aliases = aliases,
                                    .n_aliases = 1,
                                    .config = &config,
                                    .tokenizer = tokenizer,
                                    .chat_template = chat_template,
                                    .scheduler = scheduler,
                                    .digest = 7};
        status = choir_server_create(&a->server, &model, 1, &server);
    }
    if (status == CHOIR_OK) status = choir_server_start(server);
    if (status == CHOIR_OK) {
        for (uint32_t i = 0; i < a->server.n_listen; i++)
            printf("listening on %s\n", choir_server_address(server, i));
        fflush(stdout);
        choir_server_run_until_signal(server);
    }
    choir_server_destroy(server);
    choir_scheduler_destroy(scheduler);
    return status;
}

int main(int argc, char **argv)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    arguments a = {.tokenizer = "tests/fixtures/server/tokenizer.json",
                   .n_pages = 4096,
                   .stall_ms = 3000,
                   .server = CHOIR_SERVER_OPTIONS_DEFAULT,
                   .scheduler = CHOIR_SCHEDULER_OPTIONS_DEFAULT};
    a.scheduler.max_sequences = 64;
    parse(argc, argv, &a);
    if (a.n_listen == 0) a.listen[a.n_listen++] = "127.0.0.1:0";
    a.server.listen = a.listen;
    a.server.n_listen = a.n_listen;
    a.server.api_keys = a.keys;
    char *json = NULL, *certificate = NULL, *key = NULL;
    size_t bytes;
    choir_tokenizer *tokenizer = NULL;
    choir_chat_template *chat_template = NULL;
    static simulated engine;
    engine.step_ms = a.step_ms;
    engine.stall_ms = a.stall_ms;
    choir_status status = CHOIR_OK;
    if (a.certificate != NULL)
        status = choir_file_read(a.certificate, 1 << 20, &certificate, &bytes);
    if (status == CHOIR_OK && a.key != NULL) status = choir_file_read(a.key, 1 << 20, &key, &bytes);
    a.server.tls_certificate = certificate;
    a.server.tls_key = key;
    if (status == CHOIR_OK) status = choir_file_read(a.tokenizer, 1 << 20, &json, &bytes);
    if (status == CHOIR_OK) status = choir_tokenizer_parse_json(json, bytes, &tokenizer);
    if (status == CHOIR_OK)
        status = choir_chat_template_compile(template_source, sizeof template_source - 1,
                                             &chat_template);
    if (status == CHOIR_OK) status = serve(&a, &engine, tokenizer, chat_template);
    if (status != CHOIR_OK) fprintf(stderr, "test_server: %s\n", choir_error_message());
    choir_chat_template_destroy(chat_template);
    choir_tokenizer_destroy(tokenizer);
    choir_free(json);
    choir_free(certificate);
    choir_free(key);
    return status == CHOIR_OK ? 0 : 1;
}
