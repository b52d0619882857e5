/* At which point of the network do a prompt's features say most for what they cost? Prompts from
 * several domains' texts are probed at each point; a ridge classifier of their projected means
 * learns on train.txt which domain a prompt is of, as a router learns which plan suits it, and is
 * asked about valid.txt. Cost: a probe's time beside that of the prompt's prefill, in turn.
 *
 *   bench_router_features MODEL FOLDER [chat]       FOLDER/<domain>/train.txt and valid.txt
 *
 * chat: each prompt is a user's message in the model's own template. */
#include "engine/chat_variables.h"
#include "engine/engine.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_DOMAINS = 8,
    N_TRAIN = 250, /* prompts of a domain */
    N_VALID = 200,
    MIN_TOKENS = 16,
    MAX_TOKENS = 128,
    PROMPT_BYTES = 1500, /* enough for so many tokens */
    DIMS = 64,           /* of the projection */
    N_PHI = DIMS + 1,    /* and a constant */
    N_DRAWS = 20,        /* of projections, and of the prompts that are learnt from */
    N_TIMED = 60,
    N_PAGES = 1024 / CHOIR_PAGE_TOKENS,
};
static const double RIDGE = 1;

/* In blocks: attention and FFN of a layer are one each. */
static const struct {
    uint32_t n_blocks;
    const char *name;
} points[] = {{0, "embeddings"}, {1, "first attention"}, {2, "1 layer"},
              {4, "2 layers"},   {8, "4 layers"},        {16, "8 layers"}};
static const uint32_t n_learnt[] = {100, 300, 1000};
enum { N_POINTS = sizeof points / sizeof *points, N_SIZES = sizeof n_learnt / sizeof *n_learnt };

typedef struct prompt {
    uint32_t domain, n_tokens, *tokens;
    float *features[N_POINTS]; /* [hidden], of unit RMS */
} prompt;

typedef struct bench {
    choir_engine *engine;
    char domains[MAX_DOMAINS][64];
    uint32_t n_domains, hidden, n_train, n_valid;
    bool chat;
    prompt *train, *valid;
    uint64_t random;
} bench;

static uint32_t pick(bench *b, uint32_t n)
{
    b->random = b->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((b->random >> 33) % n);
}

static double normal(bench *b)
{
    double u = (pick(b, 1U << 30) + 0.5) / (1U << 30), v = (pick(b, 1U << 30) + 0.5) / (1U << 30);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

/* -- prompts -- */

static choir_status encode(const bench *b, const char *text, size_t bytes, bool special, prompt *p)
{
    size_t n;
    const choir_encode_options o = {.add_special = false, .parse_special = special};
    CHOIR_TRY(
        choir_tokenizer_encode(choir_engine_tokenizer(b->engine), text, bytes, o, &p->tokens, &n));
    p->n_tokens = (uint32_t)n;
    return CHOIR_OK;
}

/* The prompt's text in a user's turn. */
static choir_status wrap(const bench *b, prompt *p)
{
    const choir_tokenizer *t = choir_engine_tokenizer(b->engine);
    char *text, *whole;
    size_t bytes;
    CHOIR_TRY(choir_tokenizer_decode(t, p->tokens, p->n_tokens, false, &text, &bytes));
    json_t *variables = json_pack("{s:[{s:s, s:s}]}", "messages", "role", "user", "content", text);
    choir_free(text);
    if (variables == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a conversation");
    choir_status status = choir_chat_variables_set(variables, t, true);
    if (status == CHOIR_OK)
        status = choir_chat_template_render(choir_engine_chat_template(b->engine), variables, 0,
                                            &whole, &bytes);
    json_decref(variables);
    CHOIR_TRY(status);
    choir_free(p->tokens);
    status = encode(b, whole, bytes, true, p);
    choir_free(whole);
    return status;
}

/* So many tokens from the beginning of some line on. */
static choir_status make_prompt(bench *b, const char *text, size_t bytes, prompt *p)
{
    size_t at = pick(b, (uint32_t)(bytes - PROMPT_BYTES)), n = PROMPT_BYTES;
    uint32_t most = MIN_TOKENS + pick(b, MAX_TOKENS - MIN_TOKENS + 1);
    while (at > 0 && text[at - 1] != '\n') at--;
    while (((unsigned char)text[at + n] & 0xC0) == 0x80) n--; /* no half character */
    CHOIR_TRY(encode(b, text + at, n, false, p));
    if (p->n_tokens > most) p->n_tokens = most;
    return b->chat ? wrap(b, p) : CHOIR_OK;
}

static choir_status probe(const bench *b, const prompt *p, uint32_t n_blocks, float *mean)
{
    choir_probe what = {
        .tokens = p->tokens, .n_tokens = p->n_tokens, .n_blocks = n_blocks, .mean = mean};
    return choir_engine_probe(b->engine, &what);
}

static choir_status probe_all(const bench *b, prompt *p)
{
    for (uint32_t i = 0; i < N_POINTS; i++) {
        float *x = p->features[i] = malloc(b->hidden * sizeof *x);
        if (x == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for features");
        CHOIR_TRY(probe(b, p, points[i].n_blocks, x));
        double squares = 1e-30;
        for (uint32_t d = 0; d < b->hidden; d++) squares += (double)x[d] * x[d];
        float scale = (float)(1 / sqrt(squares / b->hidden));
        for (uint32_t d = 0; d < b->hidden; d++) x[d] *= scale;
    }
    return CHOIR_OK;
}

static choir_status make_prompts(bench *b, const char *folder, uint32_t domain, const char *file,
                                 uint32_t n, prompt *out)
{
    char path[4096], *text;
    size_t bytes;
    snprintf(path, sizeof path, "%s/%s/%s", folder, b->domains[domain], file);
    CHOIR_TRY(choir_file_read(path, 64 << 20, &text, &bytes));
    choir_status status = CHOIR_OK;
    if (bytes <= PROMPT_BYTES)
        status = choir_fail(CHOIR_E_INVALID, "%s has %zu bytes, must have more than %d", path,
                            bytes, PROMPT_BYTES);
    for (uint32_t i = 0; i < n && status == CHOIR_OK; i++) {
        out[i].domain = domain;
        status = make_prompt(b, text, bytes, &out[i]);
        if (status == CHOIR_OK) status = probe_all(b, &out[i]);
    }
    choir_free(text);
    return status;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(a, b);
}

static choir_status find_domains(bench *b, const char *folder)
{
    DIR *dir = opendir(folder);
    for (struct dirent *e; dir != NULL && (e = readdir(dir)) != NULL;) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s/valid.txt", folder, e->d_name);
        if (e->d_name[0] == '.' || !choir_file_exists(path) || b->n_domains == MAX_DOMAINS)
            continue;
        snprintf(b->domains[b->n_domains++], sizeof *b->domains, "%.63s", e->d_name);
    }
    if (dir != NULL) closedir(dir);
    if (b->n_domains < 2)
        return choir_fail(
            CHOIR_E_NOT_FOUND,
            "%s has %u folders with a train.txt and a valid.txt, at least two domains "
            "are wanted",
            folder, b->n_domains);
    qsort(b->domains, b->n_domains, sizeof *b->domains, by_name);
    return CHOIR_OK;
}

static choir_status load(bench *b, const char *folder)
{
    CHOIR_TRY(find_domains(b, folder));
    b->train = calloc((size_t)b->n_domains * N_TRAIN, sizeof *b->train);
    b->valid = calloc((size_t)b->n_domains * N_VALID, sizeof *b->valid);
    if (b->train == NULL || b->valid == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for prompts");
    for (uint32_t d = 0; d < b->n_domains; d++) {
        CHOIR_TRY(make_prompts(b, folder, d, "train.txt", N_TRAIN, b->train + b->n_train));
        CHOIR_TRY(make_prompts(b, folder, d, "valid.txt", N_VALID, b->valid + b->n_valid));
        b->n_train += N_TRAIN;
        b->n_valid += N_VALID;
    }
    return CHOIR_OK;
}

/* -- the classifier -- */

typedef struct ridge {
    double a[N_PHI][N_PHI], v[MAX_DOMAINS][N_PHI]; /* Σ φφᵀ + RIDGE, Σ [domain] φ; then weights */
} ridge;

static void project(const bench *b, const float *projection, const float *x, double phi[N_PHI])
{
    for (uint32_t i = 0; i < DIMS; i++) {
        float sum = 0;
        for (uint32_t d = 0; d < b->hidden; d++) sum += projection[i * b->hidden + d] * x[d];
        phi[i] = (double)sum;
    }
    phi[DIMS] = 1;
}

/* v = a⁻¹ v by Cholesky's factors, which take a's place. */
static void solve(ridge *r, uint32_t n_domains)
{
    for (int i = 0; i < N_PHI; i++)
        for (int j = 0; j <= i; j++) {
            double sum = r->a[i][j];
            for (int k = 0; k < j; k++) sum -= r->a[i][k] * r->a[j][k];
            r->a[i][j] = i == j ? sqrt(sum) : sum / r->a[j][j];
        }
    for (uint32_t c = 0; c < n_domains; c++) {
        double *v = r->v[c];
        for (int i = 0; i < N_PHI; i++) {
            for (int k = 0; k < i; k++) v[i] -= r->a[i][k] * v[k];
            v[i] /= r->a[i][i];
        }
        for (int i = N_PHI; i-- > 0;) {
            for (int k = i + 1; k < N_PHI; k++) v[i] -= r->a[k][i] * v[k];
            v[i] /= r->a[i][i];
        }
    }
}

static void learn(ridge *r, const double phi[N_PHI], uint32_t domain)
{
    for (int i = 0; i < N_PHI; i++) {
        for (int j = 0; j <= i; j++) r->a[i][j] += phi[i] * phi[j];
        r->v[domain][i] += phi[i];
    }
}

static uint32_t classify(const ridge *r, uint32_t n_domains, const double phi[N_PHI])
{
    uint32_t best = 0;
    double scores[MAX_DOMAINS] = {0};
    for (uint32_t c = 0; c < n_domains; c++) {
        for (int i = 0; i < N_PHI; i++) scores[c] += r->v[c][i] * phi[i];
        if (scores[c] > scores[best]) best = c;
    }
    return best;
}

static void shuffle(bench *b, prompt *prompts, uint32_t n)
{
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = pick(b, i);
        const prompt p = prompts[i - 1];
        prompts[i - 1] = prompts[j];
        prompts[j] = p;
    }
}

/* Adds the share of right answers for each number of prompts learnt from. */
static void try_point(const bench *b, uint32_t point, const float *projection,
                      double right[N_SIZES])
{
    static ridge sums, solved;
    double phi[N_PHI];
    uint32_t n = 0;
    sums = (ridge){0};
    for (int i = 0; i < N_PHI; i++) sums.a[i][i] = RIDGE;
    for (uint32_t size = 0; size < N_SIZES; size++) {
        for (; n < n_learnt[size] && n < b->n_train; n++) {
            project(b, projection, b->train[n].features[point], phi);
            learn(&sums, phi, b->train[n].domain);
        }
        solved = sums;
        solve(&solved, b->n_domains);
        uint32_t n_right = 0;
        for (uint32_t i = 0; i < b->n_valid; i++) {
            project(b, projection, b->valid[i].features[point], phi);
            n_right += classify(&solved, b->n_domains, phi) == b->valid[i].domain;
        }
        right[size] += (double)n_right / b->n_valid;
    }
}

/* -- cost -- */

static choir_status prefill(const bench *b, const prompt *p)
{
    uint32_t pages[N_PAGES];
    for (uint32_t i = 0; i < N_PAGES; i++) pages[i] = i;
    choir_span span = {.tokens = p->tokens,
                       .n_tokens = p->n_tokens,
                       .pages = pages,
                       .n_pages = N_PAGES,
                       .n_logits = 1};
    CHOIR_TRY(choir_engine_step(b->engine, &span, 1));
    return choir_span_failure(&span);
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Medians of a probe's share of its prompt's prefill. */
static choir_status time_points(bench *b, double share[N_POINTS], double *prefill_ns)
{
    static double shares[N_POINTS][N_TIMED], whole[N_TIMED];
    float *mean = malloc(b->hidden * sizeof *mean);
    choir_status status = CHOIR_OK;
    for (uint32_t i = 0; i < N_TIMED && status == CHOIR_OK; i++) {
        const prompt *p = &b->valid[pick(b, b->n_valid)];
        uint64_t start = choir_clock_now();
        status = prefill(b, p);
        whole[i] = (double)(choir_clock_now() - start);
        for (uint32_t k = 0; k < N_POINTS && status == CHOIR_OK; k++) {
            start = choir_clock_now();
            status = probe(b, p, points[k].n_blocks, mean);
            shares[k][i] = (double)(choir_clock_now() - start) / whole[i];
        }
    }
    free(mean);
    for (uint32_t k = 0; k < N_POINTS; k++) {
        qsort(shares[k], N_TIMED, sizeof(double), compare);
        share[k] = shares[k][N_TIMED / 2];
    }
    qsort(whole, N_TIMED, sizeof(double), compare);
    *prefill_ns = whole[N_TIMED / 2];
    return status;
}

static choir_status run(bench *b, const char *folder)
{
    double right[N_POINTS][N_SIZES] = {{0}}, share[N_POINTS], prefill_ns;
    CHOIR_TRY(load(b, folder));
    CHOIR_TRY(time_points(b, share, &prefill_ns));
    float *projection = malloc((size_t)DIMS * b->hidden * sizeof *projection);
    if (projection == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a projection");
    for (uint32_t draw = 0; draw < N_DRAWS; draw++) {
        for (uint32_t i = 0; i < DIMS * b->hidden; i++)
            projection[i] = (float)(normal(b) / sqrt(b->hidden));
        shuffle(b, b->train, b->n_train);
        for (uint32_t k = 0; k < N_POINTS; k++) try_point(b, k, projection, right[k]);
    }
    free(projection);
    printf("%u domains, %u prompts to learn from, %u to be asked about, %d draws; prefill %.1f ms\n"
           "\n| point | %u prompts | %u | %u | of a prefill |\n|---|---:|---:|---:|---:|\n",
           b->n_domains, b->n_train, b->n_valid, N_DRAWS, prefill_ns / 1e6, n_learnt[0],
           n_learnt[1], n_learnt[2]);
    for (uint32_t k = 0; k < N_POINTS; k++) {
        printf("| %s |", points[k].name);
        for (uint32_t i = 0; i < N_SIZES; i++) printf(" %.1f %% |", 100 * right[k][i] / N_DRAWS);
        printf(" %.1f %% |\n", 100 * share[k]);
    }
    return CHOIR_OK;
}

static void free_prompts(prompt *prompts, uint32_t n)
{
    for (uint32_t i = 0; prompts != NULL && i < n; i++) {
        choir_free(prompts[i].tokens);
        for (uint32_t k = 0; k < N_POINTS; k++) free(prompts[i].features[k]);
    }
    free(prompts);
}

int main(int argc, char **argv)
{
    bench b = {.random = 1, .chat = argc > 3 && strcmp(argv[3], "chat") == 0};
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    if (argc < 3) {
        fprintf(stderr, "usage: bench_router_features MODEL FOLDER [chat]\n"
                        "FOLDER has a folder for each domain, with a train.txt and a valid.txt\n");
        return 2;
    }
    o.max_rows = N_PAGES * CHOIR_PAGE_TOKENS;
    choir_status status = choir_engine_open(argv[1], &o, &b.engine);
    if (status == CHOIR_OK) {
        b.hidden = choir_engine_config(b.engine)->hidden;
        status = run(&b, argv[2]);
    }
    if (status != CHOIR_OK) fprintf(stderr, "bench: %s\n", choir_error_message());
    free_prompts(b.train, b.n_domains * N_TRAIN);
    free_prompts(b.valid, b.n_domains * N_VALID);
    choir_engine_close(b.engine);
    return status == CHOIR_OK ? 0 : 1;
}
