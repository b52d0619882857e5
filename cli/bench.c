/* Prefill and decode in tokens/s, beside what the machine gives at best in the same run; and what
 * adapters of random numbers cost a decode, in turn with the base. */
#include "cli/adapters.h"
#include "cli/bench_adapters.h"
#include "cli/peak.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BATCHES = 16, MAX_BATCH = 256, STEP_ROWS = 512, MAX_ROUNDS = 99 };

typedef struct values {
    choir_cli_engine_values engine;
    choir_cli_adapter_values adapters;
    uint64_t prompt, generate;
    const char *batch;
    uint64_t random_adapters, adapter_rank, rounds;
    const char *adapter_on;
    bool json;
} values;
static const values defaults = {.adapters = CHOIR_CLI_ADAPTER_DEFAULT,
                                .prompt = 512,
                                .generate = 128,
                                .batch = "1,8,32",
                                .adapter_rank = 8,
                                .rounds = 5,
                                .adapter_on = "all"};
static const choir_option options[] = {
    {"prompt", 0, CHOIR_OPTION_COUNT, offsetof(values, prompt), "N", "tokens of the prompt", 1,
     65536},
    {"generate", 0, CHOIR_OPTION_COUNT, offsetof(values, generate), "N", "tokens decoded", 1,
     65536},
    {"batch", 0, CHOIR_OPTION_TEXT, offsetof(values, batch), "1,8,32", "sequences at once", 0, 0},
    {"random-adapters", 0, CHOIR_OPTION_COUNT, offsetof(values, random_adapters), "N",
     "decodes also with N random LoRAs, one a sequence, in turn with the base", 0,
     CHOIR_BENCH_MAX_ADAPTERS},
    {"adapter-rank", 0, CHOIR_OPTION_COUNT, offsetof(values, adapter_rank), "R",
     "of random adapters", 1, CHOIR_ADAPTER_MAX_RANK},
    {"adapter-on", 0, CHOIR_OPTION_TEXT, offsetof(values, adapter_on), "all|mlp",
     "random adapters lie on all linear layers, or on the MLP's and the experts'", 0, 0},
    {"rounds", 0, CHOIR_OPTION_COUNT, offsetof(values, rounds), "N",
     "with random adapters: turns, whose medians are told", 1, MAX_ROUNDS},
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL, "one JSON object", 0, 0},
    CHOIR_CLI_ADAPTER_OPTIONS(values, adapters),
    CHOIR_CLI_ENGINE_OPTIONS(values, engine),
};

typedef struct result {
    uint32_t batch;
    double prefill_tokens_per_s, decode_tokens_per_s, decode_s;
    choir_experts_stats before, after; /* of the decode */
    double base, adapted, ratio;       /* with random adapters: medians of the rounds */
} result;

static choir_status parse_batches(const char *text, uint32_t *batches, uint32_t *n)
{
    *n = 0;
    for (const char *p = text; *p != '\0';) {
        char *end;
        unsigned long b = strtoul(p, &end, 10);
        if (end == p || b < 1 || b > MAX_BATCH || *n == MAX_BATCHES ||
            (*end != ',' && *end != '\0'))
            return choir_fail(CHOIR_E_INVALID,
                              "--batch is '%.40s', must be up to %d numbers from 1 to %d", text,
                              MAX_BATCHES, MAX_BATCH);
        batches[(*n)++] = (uint32_t)b;
        p = *end == ',' ? end + 1 : end;
    }
    return *n > 0 ? CHOIR_OK : choir_fail(CHOIR_E_INVALID, "--batch is empty");
}

typedef struct bench {
    choir_engine *engine;
    choir_cli_adapters adapters;
    uint32_t prompt, generate, pages_per_sequence, *pages, *tokens;
    choir_span *spans;
    choir_bench_adapters random;
} bench;

/* The prompts of all sequences, one after the other in chunks: tokens/s. */
static choir_status prefill(bench *b, uint32_t batch, double *rate)
{
    uint64_t start = choir_clock_now();
    for (uint32_t s = 0; s < batch; s++) {
        const uint32_t *pages = b->pages + (size_t)s * b->pages_per_sequence;
        CHOIR_TRY(choir_cli_adapters_begin(&b->adapters, b->engine, pages, b->pages_per_sequence));
        for (uint32_t at = 0; at < b->prompt; at += STEP_ROWS) {
            uint32_t n = b->prompt - at < STEP_ROWS ? b->prompt - at : STEP_ROWS;
            choir_span span = {.tokens = b->tokens + s + at,
                               .n_tokens = n,
                               .position = b->adapters.n_virtual + at,
                               .pages = pages,
                               .n_pages = b->pages_per_sequence,
                               .n_logits = at + n == b->prompt,
                               .adapters = b->adapters.uses,
                               .n_adapters = b->adapters.n};
            CHOIR_TRY(choir_engine_step(b->engine, &span, 1));
            CHOIR_TRY(choir_span_failure(&span));
        }
    }
    *rate = (double)b->prompt * batch / ((double)(choir_clock_now() - start) / 1e9);
    return CHOIR_OK;
}

/* Sequences with the same adapter are side by side; of more adapters than sequences each step takes
 * others. */
static const choir_adapter_use *random_use(const bench *b, uint32_t step, uint32_t s,
                                           uint32_t batch)
{
    uint32_t n = b->random.n;
    return &b->random.uses[n <= batch ? s * n / batch : (step * batch + s) % n];
}

static choir_status decode(bench *b, uint32_t batch, bool random, double *rate)
{
    uint64_t start = choir_clock_now();
    for (uint32_t i = 0; i < b->generate; i++) {
        for (uint32_t s = 0; s < batch; s++)
            b->spans[s] =
                (choir_span){.tokens = b->tokens + s + b->prompt + i,
                             .n_tokens = 1,
                             .position = b->adapters.n_virtual + b->prompt + i,
                             .pages = b->pages + (size_t)s * b->pages_per_sequence,
                             .n_pages = b->pages_per_sequence,
                             .n_logits = 1,
                             .adapters = random ? random_use(b, i, s, batch) : b->adapters.uses,
                             .n_adapters = random ? 1 : b->adapters.n};
        CHOIR_TRY(choir_engine_step(b->engine, b->spans, batch));
        for (uint32_t s = 0; s < batch; s++) CHOIR_TRY(choir_span_failure(&b->spans[s]));
    }
    *rate = (double)b->generate * batch / ((double)(choir_clock_now() - start) / 1e9);
    return CHOIR_OK;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *of, uint32_t n)
{
    qsort(of, n, sizeof *of, by_size);
    return (of[(n - 1) / 2] + of[n / 2]) / 2;
}

/* The same decode without and with random adapters, in turn, so that a machine's moods hit both. */
static choir_status decode_in_turn(bench *b, uint32_t rounds, result *r)
{
    double rates[2][MAX_ROUNDS], ratios[MAX_ROUNDS], warm;
    CHOIR_TRY(decode(b, r->batch, true, &warm));
    for (uint32_t i = 0; i < rounds; i++) {
        for (uint32_t k = 0; k < 2; k++) {
            bool random = (i + k) % 2 == 1;
            CHOIR_TRY(decode(b, r->batch, random, &rates[random][i]));
        }
        ratios[i] = rates[1][i] / rates[0][i];
    }
    r->base = median(rates[0], rounds);
    r->adapted = median(rates[1], rounds);
    r->ratio = median(ratios, rounds);
    return CHOIR_OK;
}

static choir_status make_random(const values *v, bench *b)
{
    choir_bench_adapter_options o = {.n = (uint32_t)v->random_adapters,
                                     .rank = (uint32_t)v->adapter_rank,
                                     .mlp_alone = strcmp(v->adapter_on, "mlp") == 0};
    if (o.n == 0) return CHOIR_OK;
    bool known = choir_adapter_type_parse(v->adapters.type, &o.type);
    CHOIR_ASSERT(known); /* check() has looked */
    return choir_bench_adapters_make(b->engine, &o, &b->random);
}

static choir_status open_bench(const values *v, const char *model, uint32_t largest, bench *b)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    CHOIR_TRY(choir_cli_engine_options(&v->engine, &o));
    /* Rows that are never used would take memory from experts. */
    o.max_rows = v->prompt < STEP_ROWS ? (uint32_t)v->prompt : STEP_ROWS;
    if (o.max_rows < largest) o.max_rows = largest;
    o.max_spans = largest;
    b->prompt = (uint32_t)v->prompt;
    b->generate = (uint32_t)v->generate;
    CHOIR_TRY(choir_cli_adapters_read(&v->adapters, model, &b->adapters));
    uint32_t total = b->adapters.n_virtual + b->prompt + b->generate;
    b->pages_per_sequence = (total + CHOIR_PAGE_TOKENS - 1) / CHOIR_PAGE_TOKENS;
    char path[4096];
    choir_model_file *file;
    CHOIR_TRY(choir_cli_find_model(model, path, sizeof path));
    CHOIR_TRY(choir_model_file_open(path, &file));
    const choir_model_config *c = choir_model_file_config(file);
    uint64_t page = choir_cli_kv_bytes_per_token(c, o.exact) * CHOIR_PAGE_TOKENS;
    o.kv_bytes = page * b->pages_per_sequence * largest;
    choir_model_file_close(file);
    CHOIR_TRY(choir_engine_open(path, &o, &b->engine));
    const choir_model_config *config = choir_engine_config(b->engine);
    CHOIR_TRY(choir_cli_adapters_fit(&b->adapters, "--prompt and --generate",
                                     (uint64_t)b->prompt + b->generate, config));
    CHOIR_TRY(choir_cli_adapters_make(&b->adapters, b->engine));
    b->pages =
        choir_alloc(CHOIR_MEM_OTHER, (size_t)b->pages_per_sequence * largest * sizeof *b->pages);
    /* Sequence s begins at token s: they differ, and so do the experts that they want. */
    uint32_t n_tokens = total + largest;
    b->tokens = choir_alloc(CHOIR_MEM_OTHER, n_tokens * sizeof *b->tokens);
    b->spans = choir_alloc(CHOIR_MEM_OTHER, largest * sizeof *b->spans);
    if (b->pages == NULL || b->tokens == NULL || b->spans == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the bench");
    for (uint32_t i = 0; i < b->pages_per_sequence * largest; i++) b->pages[i] = i;
    for (uint32_t i = 0; i < n_tokens; i++) b->tokens[i] = (i * 7919 + 11) % config->vocab;
    return CHOIR_OK;
}

/* Products of one token in the layers: every matrix that it meets, of experts those it is routed
 * to. */
static double products_per_token(const choir_model_config *c)
{
    double products = 0;
    for (uint32_t role = 0; role < CHOIR_N_ROLES; role++) {
        uint64_t rows, cols;
        choir_role_shape(c, role, &rows, &cols);
        double met = choir_role_is_routed(role) ? c->n_experts_used : choir_role_count(c, role);
        for (uint32_t l = 0; l < c->n_layers && rows > 1 && choir_role_per_layer(role); l++)
            if (choir_role_in_layer(c, role, l)) products += met * (double)rows * (double)cols;
    }
    return products;
}

/* The time that one step of `rows` tokens takes at the machine's best: its weights are read once
 * (of the experts, those that so many tokens may meet), and every row is multiplied with what it
 * meets. */
static double best_step_s(const choir_engine *engine, const choir_peak *peak, double rows,
                          double heads)
{
    const choir_model_config *c = choir_engine_config(engine);
    choir_engine_sizes s = choir_engine_memory(engine);
    double used = c->n_experts > 0 ? c->n_experts_used : 0, met = 0;
    if (c->n_experts > 0) met = rows * used < c->n_experts ? rows * used / c->n_experts : 1;
    double products = rows * products_per_token(c) + heads * c->hidden * (double)c->vocab;
    double reading = ((double)s.weight_bytes + met * (double)s.expert_bytes) / peak->bytes_per_s;
    double multiplying = 2 * products / peak->ops_per_s;
    return reading > multiplying ? reading : multiplying;
}

static double share(uint64_t part, uint64_t whole)
{
    return whole > 0 ? (double)part / (double)whole : 0;
}

/* What streaming did while it decoded; NULL: all experts are resident. */
static json_t *streamed(const values *v, const result *r)
{
    const choir_experts_stats *a = &r->after, *b = &r->before;
    if (!a->streamed) return NULL;
    uint64_t hits = a->n_hits - b->n_hits, late = a->n_late_hits - b->n_late_hits,
             wanted = hits + late + a->n_misses - b->n_misses,
             bytes = a->bytes_read - b->bytes_read;
    double busy_s = (double)(a->busy_ns - b->busy_ns) / 1e9,
           stall_s = (double)(a->stall_ns - b->stall_ns) / 1e9;
    if (!v->json)
        printf(
            "             %s, %s: hits %.0f %%, on their way %.0f %%; %.2f GB read at %.2f GB/s; "
            "waited %.0f %% of the time; a read's p50 %.1f ms, p99 %.1f ms\n",
            a->io, a->policy, 100 * share(hits, wanted), 100 * share(late, wanted),
            (double)bytes / 1e9, busy_s > 0 ? (double)bytes / 1e9 / busy_s : 0,
            100 * stall_s / r->decode_s, 1e3 * choir_experts_latency(a, 0.5),
            1e3 * choir_experts_latency(a, 0.99));
    uint64_t n_pairs = a->n_predicted - b->n_predicted,
             guesses = a->n_prefetch_used + a->n_prefetch_wasted - b->n_prefetch_used -
                       b->n_prefetch_wasted;
    double recall = share(a->n_predicted_right - b->n_predicted_right, n_pairs),
           precision = share(a->n_prefetch_used - b->n_prefetch_used, guesses);
    if (!v->json)
        printf("             predicted %.0f %% of what was wanted; of %llu read ahead %.0f %% were "
               "used%s\n",
               100 * recall, (unsigned long long)(a->n_prefetched - b->n_prefetched),
               100 * precision, a->prefetching ? "" : " (off: it does not pay)");
    return json_pack("{s:f, s:f, s:s, s:s, s:f, s:f, s:I, s:f, s:f}", "prediction_recall", recall,
                     "prefetch_precision", precision, "io", a->io, "policy", a->policy, "hit_rate",
                     share(hits, wanted), "late_hit_rate", share(late, wanted), "bytes_read",
                     (json_int_t)bytes, "busy_s", busy_s, "stall_s", stall_s);
}

/* NULL: no random adapters. */
static json_t *adapted(const values *v, const bench *b, const result *r)
{
    if (b->random.n == 0) return NULL;
    if (!v->json)
        printf("             %u adapters of rank %u on %s (%s, %.1f MB each): decode %.1f "
               "tokens/s, base %.1f: "
               "%.1f %%; medians of %u rounds\n",
               b->random.n, (uint32_t)v->adapter_rank, v->adapter_on, v->adapters.type,
               (double)b->random.bytes / 1e6, r->adapted, r->base, 100 * r->ratio,
               (uint32_t)v->rounds);
    return json_pack("{s:I, s:I, s:s, s:s, s:I, s:f, s:f, s:f, s:I}", "n", (json_int_t)b->random.n,
                     "rank", (json_int_t)v->adapter_rank, "on", v->adapter_on, "type",
                     v->adapters.type, "bytes", (json_int_t)b->random.bytes, "decode_tokens_per_s",
                     r->adapted, "base_tokens_per_s", r->base, "ratio", r->ratio, "rounds",
                     (json_int_t)v->rounds);
}

static void print(const values *v, const bench *b, const result *r, uint32_t n,
                  const choir_peak *peak)
{
    const char *name = choir_engine_config(b->engine)->name;
    const choir_kernels *k = choir_engine_kernels(b->engine);
    uint32_t n_threads = choir_engine_n_threads(b->engine);
    double rows = b->prompt < STEP_ROWS ? b->prompt : STEP_ROWS;
    json_t *runs = json_array();
    if (!v->json)
        printf("%s, %u threads, %s kernels; memory reads %.1f GB/s, int8 products %.0f Gop/s\n",
               name, n_threads, k->name, peak->bytes_per_s / 1e9, peak->ops_per_s / 1e9);
    for (uint32_t i = 0; i < n; i++) {
        double prefill = r[i].prefill_tokens_per_s, decode = r[i].decode_tokens_per_s;
        double prefill_share = prefill / rows * best_step_s(b->engine, peak, rows, 1);
        double decode_share =
            decode / r[i].batch * best_step_s(b->engine, peak, r[i].batch, r[i].batch);
        if (!v->json)
            printf("  batch %3u: prefill %7.1f tokens/s (%2.0f %% of peak), decode %7.1f tokens/s "
                   "(%2.0f %%)\n",
                   r[i].batch, prefill, 100 * prefill_share, decode, 100 * decode_share);
        json_t *experts = streamed(v, &r[i]), *random = adapted(v, b, &r[i]);
        json_array_append_new(
            runs, json_pack("{s:i, s:f, s:f, s:f, s:f, s:o*, s:o*}", "batch", (int)r[i].batch,
                            "prefill_tokens_per_s", prefill, "decode_tokens_per_s", decode,
                            "prefill_share_of_peak", prefill_share, "decode_share_of_peak",
                            decode_share, "experts", experts, "random_adapters", random));
    }
    json_t *o = json_pack("{s:s, s:i, s:s, s:f, s:f, s:o}", "model", name, "threads",
                          (int)n_threads, "kernels", k->name, "memory_bytes_per_s",
                          peak->bytes_per_s, "int8_ops_per_s", peak->ops_per_s, "runs", runs);
    if (v->json)
        choir_cli_print_json(o, true);
    else
        json_decref(o);
}

static choir_status run(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    uint32_t batches[MAX_BATCHES], n, largest = 0;
    result results[MAX_BATCHES];
    double warm;
    choir_peak peak;
    bench b = {0};
    choir_status status;
    CHOIR_TRY(parse_batches(v->batch, batches, &n));
    for (uint32_t i = 0; i < n; i++)
        if (batches[i] > largest) largest = batches[i];
    CHOIR_TRY_TO(done, status, open_bench(v, arguments->positional[0], largest, &b));
    CHOIR_TRY_TO(done, status,
                 choir_peak_measure(choir_engine_kernels(b.engine),
                                    choir_engine_n_threads(b.engine), &peak));
    CHOIR_TRY_TO(done, status, make_random(v, &b));
    CHOIR_TRY_TO(done, status, prefill(&b, 1, &warm));
    for (uint32_t i = 0; i < n; i++) {
        results[i].batch = batches[i];
        CHOIR_TRY_TO(done, status, prefill(&b, batches[i], &results[i].prefill_tokens_per_s));
        results[i].before = choir_engine_expert_stats(b.engine);
        CHOIR_TRY_TO(done, status, decode(&b, batches[i], false, &results[i].decode_tokens_per_s));
        results[i].after = choir_engine_expert_stats(b.engine);
        results[i].decode_s = (double)b.generate * batches[i] / results[i].decode_tokens_per_s;
        if (b.random.n > 0)
            CHOIR_TRY_TO(done, status, decode_in_turn(&b, (uint32_t)v->rounds, &results[i]));
    }
    print(v, &b, results, n, &peak);
done:
    choir_free(b.pages);
    choir_free(b.tokens);
    choir_free(b.spans);
    choir_bench_adapters_free(&b.random);
    choir_cli_adapters_close(&b.adapters);
    choir_engine_close(b.engine);
    return status;
}

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    (void)arguments;
    if (strcmp(v->adapter_on, "all") != 0 && strcmp(v->adapter_on, "mlp") != 0)
        return choir_fail(CHOIR_E_INVALID, "--adapter-on is '%.20s', must be all or mlp",
                          v->adapter_on);
    if (v->random_adapters > 0 && v->adapters.adapter.n > 0)
        return choir_fail(CHOIR_E_INVALID, "--random-adapters and --adapter do not go together");
    return choir_cli_adapters_check(&v->adapters);
}

const choir_verb choir_verb_bench = {
    .name = "bench",
    .arguments = "MODEL [--prompt 512] [--generate 128] [--batch 1,8,32] [--adapter DIR] [--json]",
    .summary = "tokens/s of prefill and decode, and the share of the machine's measured peak",
    .example = "choir bench SmolLM2-135M-Instruct.Q4_1 --batch 1,16",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 1,
    .check = check,
    .run = run,
};
