/* Which experts should stay in memory? Traces of routes are played against caches of several sizes
 * with each policy, and against Belady's optimum (1966), which knows the future: the hit rates say
 * what is left to gain.
 *
 *   bench_expert_cache                         synthetic traces
 *   bench_expert_cache --routes FILE …         of `choir logits MODEL --tokens … --routes FILE` */
#include "base/base.h"
#include "experts/experts.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct values {
    choir_option_list routes;
    uint64_t layers, experts, top_k, tokens, seed;
    const char *batch;
} values;
static const values defaults = {
    .layers = 16, .experts = 64, .top_k = 8, .tokens = 192, .seed = 1, .batch = "1,8,16"};
static const choir_option options[] = {
    {"routes", 0, CHOIR_OPTION_LIST, offsetof(values, routes), "FILE",
     "a recorded trace, one sequence a file; may be given again", 0, 0},
    {"layers", 0, CHOIR_OPTION_COUNT, offsetof(values, layers), "N", "of synthetic traces", 1, 256},
    {"experts", 0, CHOIR_OPTION_COUNT, offsetof(values, experts), "N", "in a layer", 1, 1024},
    {"top-k", 0, CHOIR_OPTION_COUNT, offsetof(values, top_k), "N", "experts a token", 1, 64},
    {"tokens", 0, CHOIR_OPTION_COUNT, offsetof(values, tokens), "N", "of a sequence", 8, 65536},
    {"batch", 0, CHOIR_OPTION_TEXT, offsetof(values, batch), "1,8,16", "sequences at once", 0, 0},
    {"seed", 0, CHOIR_OPTION_COUNT, offsetof(values, seed), "S", "of synthetic traces", 0, 0},
};

/* The routes of sequences: [n_sequences, n_tokens, n_layers, k]. */
typedef struct trace {
    char name[80];
    uint32_t n_sequences, n_tokens, n_layers, n_experts, k;
    uint16_t *experts;
    float *weights;
} trace;

/* What steps of a batch ask for: (layer, expert) pairs in the order of the layers. */
typedef struct demand {
    uint32_t key;                /* layer * n_experts + expert */
    uint32_t step, n_rows, next; /* next: index of the pair's next demand */
    float weight;
} demand;

typedef struct demands {
    demand *at;
    uint32_t n;
} demands;

static void *need(size_t n, size_t bytes)
{
    void *p = calloc(n > 0 ? n : 1, bytes);
    if (p == NULL) {
        fprintf(stderr, "no memory\n");
        exit(1);
    }
    return p;
}

static uint64_t next_random(uint64_t *state)
{
    *state += UINT64_C(0x9E3779B97F4A7C15);
    uint64_t z = *state;
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

static double uniform(uint64_t *state)
{
    return ((double)(next_random(state) >> 11) + 0.5) / 9007199254740992.0;
}

static size_t route_at(const trace *t, uint32_t sequence, uint32_t token, uint32_t layer)
{
    return (((size_t)sequence * t->n_tokens + token) * t->n_layers + layer) * t->k;
}

static trace new_trace(const char *name, uint32_t n_sequences, uint32_t n_tokens, uint32_t n_layers,
                       uint32_t n_experts, uint32_t k)
{
    trace t = {.n_sequences = n_sequences,
               .n_tokens = n_tokens,
               .n_layers = n_layers,
               .n_experts = n_experts,
               .k = k};
    snprintf(t.name, sizeof t.name, "%s", name);
    size_t n = (size_t)n_sequences * n_tokens * n_layers * k;
    t.experts = need(n, sizeof *t.experts);
    t.weights = need(n, sizeof *t.weights);
    return t;
}

/* Experts by Zipf's law over a random order of each layer; the order of a sequence is its own mix
 * of `topics` orders and changes every `drift` tokens (0: never). k of them without replacement, by
 * Gumbel's trick. */
static trace synthetic(const values *v, const char *name, double exponent, uint32_t topics,
                       uint32_t drift, uint32_t n_sequences)
{
    trace t = new_trace(name, n_sequences, (uint32_t)v->tokens, (uint32_t)v->layers,
                        (uint32_t)v->experts, (uint32_t)v->top_k);
    uint64_t state = v->seed * 7919 + topics * 31 + drift;
    uint32_t n = t.n_experts;
    uint16_t *orders = need((size_t)topics * t.n_layers * n, sizeof *orders);
    double *score = need(n, sizeof *score);
    for (uint32_t o = 0; o < topics * t.n_layers; o++)
        for (uint32_t x = 0; x < n; x++) {
            uint32_t y = (uint32_t)(next_random(&state) % (x + 1));
            orders[o * n + x] = orders[o * n + y];
            orders[o * n + y] = (uint16_t)x;
        }
    for (uint32_t s = 0; s < n_sequences; s++)
        for (uint32_t i = 0; i < t.n_tokens; i++)
            for (uint32_t l = 0; l < t.n_layers; l++) {
                uint32_t topic = (s + (drift > 0 ? i / drift : 0)) % topics;
                const uint16_t *order = orders + ((size_t)topic * t.n_layers + l) * n;
                for (uint32_t x = 0; x < n; x++)
                    score[order[x]] = -exponent * log(x + 1) - log(-log(uniform(&state)));
                for (uint32_t r = 0; r < t.k; r++) {
                    uint32_t best = 0;
                    for (uint32_t x = 1; x < n; x++)
                        if (score[x] > score[best]) best = x;
                    score[best] = -INFINITY;
                    t.experts[route_at(&t, s, i, l) + r] = (uint16_t)best;
                    t.weights[route_at(&t, s, i, l) + r] = 1.0F / (float)t.k;
                }
            }
    free(orders);
    free(score);
    return t;
}

static json_t *read_line(FILE *f, char *line, int bytes)
{
    json_error_t error;
    return fgets(line, bytes, f) != NULL ? json_loads(line, 0, &error) : NULL;
}

/* A line of --routes: its shape only widens what was seen before. */
static void measure(const json_t *o, trace *t)
{
    uint32_t layer = (uint32_t)json_integer_value(json_object_get(o, "layer")),
             token = (uint32_t)json_integer_value(json_object_get(o, "token"));
    const json_t *experts = json_object_get(o, "experts"), *x;
    size_t i;
    if (layer >= t->n_layers) t->n_layers = layer + 1;
    if (token >= t->n_tokens) t->n_tokens = token + 1;
    if (json_array_size(experts) > t->k) t->k = (uint32_t)json_array_size(experts);
    json_array_foreach(experts, i, x) if (json_integer_value(x) >= t->n_experts) t->n_experts =
        (uint32_t)json_integer_value(x) + 1;
}

static void take(const json_t *o, trace *t, uint32_t sequence)
{
    uint32_t layer = (uint32_t)json_integer_value(json_object_get(o, "layer")),
             token = (uint32_t)json_integer_value(json_object_get(o, "token"));
    const json_t *experts = json_object_get(o, "experts"), *weights = json_object_get(o, "weights");
    for (uint32_t r = 0; r < t->k && token < t->n_tokens; r++) {
        t->experts[route_at(t, sequence, token, layer) + r] =
            (uint16_t)json_integer_value(json_array_get(experts, r));
        t->weights[route_at(t, sequence, token, layer) + r] =
            (float)json_number_value(json_array_get(weights, r));
    }
}

static bool read_routes(const values *v, trace *out)
{
    enum { LINE = 1 << 20 };
    char *line = need(LINE, 1);
    trace shape = {0};
    uint32_t shortest = UINT32_MAX;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1)
            *out = new_trace("recorded routes", v->routes.n, shortest, shape.n_layers,
                             shape.n_experts, shape.k);
        for (uint32_t s = 0; s < v->routes.n; s++) {
            FILE *f = fopen(v->routes.item[s], "re");
            json_t *o;
            if (f == NULL) {
                fprintf(stderr, "cannot open %s: %m\n", v->routes.item[s]);
                return false;
            }
            shape.n_tokens = 0;
            while ((o = read_line(f, line, LINE)) != NULL) {
                if (pass == 0)
                    measure(o, &shape);
                else
                    take(o, out, s);
                json_decref(o);
            }
            if (pass == 0 && shape.n_tokens < shortest) shortest = shape.n_tokens;
            fclose(f);
        }
        if (shape.n_layers == 0 || shape.k == 0 || shape.n_layers > 1024 || shortest == 0) {
            fprintf(stderr, "%s holds no routes\n", v->routes.item[0]);
            return false;
        }
    }
    free(line);
    return true;
}

/* Steps in which each of `batch` sequences is a row: the union of their experts, once each.
 * Sequences are taken from different places of the trace when there are too few. */
static demands make_demands(const trace *t, uint32_t batch)
{
    uint32_t n_pairs = t->n_layers * t->n_experts;
    demands d = {need((size_t)t->n_tokens * t->n_layers * batch * t->k, sizeof(demand)), 0};
    uint32_t *last = need(n_pairs, sizeof *last), *rows = need(t->n_experts, sizeof *rows);
    float *weights = need(t->n_experts, sizeof *weights);
    for (uint32_t i = 0; i < t->n_tokens; i++)
        for (uint32_t l = 0; l < t->n_layers; l++) {
            memset(rows, 0, t->n_experts * sizeof *rows);
            memset(weights, 0, t->n_experts * sizeof *weights);
            for (uint32_t b = 0; b < batch; b++) {
                uint32_t around = b / t->n_sequences, token = (i + around * 37) % t->n_tokens;
                size_t at = route_at(t, b % t->n_sequences, token, l);
                for (uint32_t r = 0; r < t->k; r++) {
                    rows[t->experts[at + r]]++;
                    weights[t->experts[at + r]] += t->weights[at + r];
                }
            }
            for (uint32_t x = 0; x < t->n_experts; x++)
                if (rows[x] > 0)
                    d.at[d.n++] =
                        (demand){l * t->n_experts + x, i, rows[x], UINT32_MAX, weights[x]};
        }
    memset(last, 0xFF, n_pairs * sizeof *last);
    for (uint32_t i = d.n; i-- > 0;) {
        d.at[i].next = last[d.at[i].key];
        last[d.at[i].key] = i;
    }
    free(last);
    free(rows);
    free(weights);
    return d;
}

/* Belady: of those held and the one that comes, the one whose next use is farthest goes. Its bound
 * is on what a cache can do that may also let a read expert go at once. */
static double optimum(const trace *t, const demands *d, uint32_t n_slots)
{
    uint32_t *held = need(n_slots, sizeof *held), n_held = 0, hits = 0;
    uint32_t *next = need(t->n_layers * t->n_experts, sizeof *next);
    for (uint32_t i = 0; i < d->n; i++) {
        uint32_t key = d->at[i].key, found = n_held;
        for (uint32_t j = 0; j < n_held && found == n_held; j++)
            if (held[j] == key) found = j;
        next[key] = d->at[i].next;
        if (found < n_held) {
            hits++;
            continue;
        }
        if (n_held < n_slots) {
            held[n_held++] = key;
            continue;
        }
        uint32_t farthest = 0;
        for (uint32_t j = 1; j < n_held; j++)
            if (next[held[j]] > next[held[farthest]]) farthest = j;
        if (next[held[farthest]] > next[key]) held[farthest] = key;
    }
    free(held);
    free(next);
    return (double)hits / d->n;
}

static double play(const trace *t, const demands *d, uint32_t n_slots, choir_policy_kind kind)
{
    choir_policy *p;
    if (choir_policy_create(kind, t->n_layers, t->n_experts, &p) != CHOIR_OK) exit(1);
    uint32_t *held = need(n_slots, sizeof *held), n_held = 0, hits = 0, n = t->n_experts;
    uint32_t *of_layer = need(t->n_layers * n, sizeof *of_layer); /* demand of a layer, for pins */
    for (uint32_t i = 0, turn = 0; i < d->n; turn++) {
        uint32_t end = i, layer = d->at[i].key / n, step = d->at[i].step;
        if (i == 0 || step != d->at[i - 1].step) choir_policy_step(p);
        for (; end < d->n && d->at[end].key / n == layer && d->at[end].step == step; end++) {
            choir_policy_use(p, layer, d->at[end].key % n, d->at[end].n_rows, d->at[end].weight, 0);
            of_layer[d->at[end].key] = turn + 1;
        }
        for (; i < end; i++) {
            uint32_t key = d->at[i].key, found = n_held, victim = UINT32_MAX;
            double least = 0;
            for (uint32_t j = 0; j < n_held && found == n_held; j++) {
                if (held[j] == key) found = j;
                double value = choir_policy_value(p, held[j] / n, held[j] % n);
                if (of_layer[held[j]] != turn + 1 && (victim == UINT32_MAX || value < least)) {
                    victim = j;
                    least = value;
                }
            }
            if (found < n_held)
                hits++;
            else if (n_held < n_slots)
                held[n_held++] = key;
            else if (victim != UINT32_MAX)
                held[victim] = key; /* all pinned: it is read, and leaves no trace */
        }
    }
    free(held);
    free(of_layer);
    choir_policy_destroy(p);
    return (double)hits / d->n;
}

static void compare(const trace *t, const char *batches)
{
    static const uint32_t percent[] = {5, 10, 20, 40, 60, 80};
    printf("\n%s: %u layers, %u experts, %u a token, %u tokens\n", t->name, t->n_layers,
           t->n_experts, t->k, t->n_tokens);
    printf("  %5s  %6s  %6s  %6s  %6s  %7s  %s\n", "batch", "memory", "lru", "lfu", "router",
           "optimum", "reads a token and layer with lfu");
    for (const char *at = batches; *at != '\0';) {
        char *end;
        uint32_t batch = (uint32_t)strtoul(at, &end, 10);
        at = *end == ',' ? end + 1 : end;
        if (batch == 0 || batch > 256 || (*end != ',' && *end != '\0')) {
            fprintf(stderr, "--batch must be numbers from 1 to 256\n");
            exit(2);
        }
        demands d = make_demands(t, batch);
        for (size_t i = 0; i < sizeof percent / sizeof *percent; i++) {
            uint32_t n_slots = t->n_layers * t->n_experts * percent[i] / 100;
            if (n_slots == 0) continue;
            double rate[CHOIR_N_POLICIES];
            for (int k = 0; k < CHOIR_N_POLICIES; k++)
                rate[k] = play(t, &d, n_slots, (choir_policy_kind)k);
            printf("  %5u  %4u %%  %4.1f %%  %4.1f %%  %4.1f %%  %5.1f %%  %.2f\n", batch,
                   percent[i], 100 * rate[CHOIR_POLICY_LRU], 100 * rate[CHOIR_POLICY_LFU_AGED],
                   100 * rate[CHOIR_POLICY_ROUTER], 100 * optimum(t, &d, n_slots),
                   (1 - rate[CHOIR_POLICY_LFU_AGED]) * d.n /
                       (t->n_tokens * (double)t->n_layers * batch));
        }
        free(d.at);
    }
}

int main(int argc, char **argv)
{
    values v = defaults;
    choir_arguments arguments;
    uint32_t n_options = sizeof options / sizeof *options;
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0) {
            choir_options_print_help(options, n_options, &defaults, stdout);
            return 0;
        }
    if (choir_options_parse(options, n_options, argc, argv, &v, &arguments) != CHOIR_OK ||
        v.top_k > v.experts) {
        fprintf(stderr, "%s\n",
                v.top_k > v.experts ? "--top-k is more than --experts" : choir_error_message());
        return 2;
    }
    if (v.routes.n > 0) {
        trace t;
        if (!read_routes(&v, &t)) return 1;
        compare(&t, v.batch);
        return 0;
    }
    printf("seed %llu\n", (unsigned long long)v.seed);
    const struct {
        const char *name;
        double exponent;
        uint32_t topics, drift;
    } kinds[] = {{"uniform", 0, 1, 0},
                 {"Zipf 0.5", 0.5, 1, 0},
                 {"Zipf 1", 1, 1, 0},
                 {"Zipf 1.5", 1.5, 1, 0},
                 {"Zipf 1, four topics, each sequence its own", 1, 4, 0},
                 {"Zipf 1, four topics that change every 48 tokens", 1, 4, 48}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        trace t =
            synthetic(&v, kinds[i].name, kinds[i].exponent, kinds[i].topics, kinds[i].drift, 16);
        compare(&t, v.batch);
        free(t.experts);
        free(t.weights);
    }
    return 0;
}
