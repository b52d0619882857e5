/* Times of the kernels at the shapes of SmolLM2-135M, as shares of what this core reaches at best.
 */
#include "tests/kernels/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The best of several runs: a shared machine only ever makes a run slower. */
#define BEST(best, n_runs, CALL)                                                                   \
    do {                                                                                           \
        (best) = INFINITY;                                                                         \
        for (int run_ = 0; run_ < (n_runs); run_++) {                                              \
            double start_ = seconds();                                                             \
            CALL;                                                                                  \
            double took_ = seconds() - start_;                                                     \
            if (took_ < (best)) (best) = took_;                                                    \
        }                                                                                          \
    } while (0)

/* Multiply-adds a second of one core, all operands in registers. */
typedef struct peaks {
    double int8, f32;
} peaks;

#ifdef __x86_64__
#    include <immintrin.h>
enum { SPINS = 1 << 20, CHAINS = 12 };

static __attribute__((target("avx2,fma"), noinline)) void spin_f32(void)
{
    __m256 sum[CHAINS], x = _mm256_set1_ps(0.5F);
    for (int i = 0; i < CHAINS; i++) sum[i] = x;
    for (int n = 0; n < SPINS; n++)
#    pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            sum[i] = _mm256_fmadd_ps(sum[i], x, x);
            __asm__ volatile("" : "+x"(sum[i]));
        }
}

static __attribute__((target("avx2"), noinline)) void spin_int8(void)
{
    __m256i sum[CHAINS], x = _mm256_set1_epi8(3);
    for (int i = 0; i < CHAINS; i++) sum[i] = x;
    for (int n = 0; n < SPINS; n++)
#    pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            sum[i] = _mm256_maddubs_epi16(x, sum[i]);
            __asm__ volatile("" : "+x"(sum[i]));
        }
}

static peaks measure_peaks(void)
{
    double int8, f32;
    BEST(int8, 5, spin_int8());
    BEST(f32, 5, spin_f32());
    return (peaks){32.0 * CHAINS * SPINS / int8, 8.0 * CHAINS * SPINS / f32};
}
#else
static peaks measure_peaks(void)
{
    return (peaks){NAN, NAN};
}
#endif

static void bench_product(const choir_kernels *k, choir_dtype dtype, bool exact, uint32_t rows,
                          uint32_t cols, uint32_t n, peaks p)
{
    choir_tensor t = check_tensor(dtype, rows, cols);
    choir_matrix packed = check_packed(&t), w = exact ? choir_matrix_exact(&t) : packed;
    float *x = malloc((size_t)n * cols * sizeof *x), *y = malloc((size_t)n * rows * sizeof *y);
    void *q8 = aligned_alloc(64, choir_acts_q8_bytes(n, cols));
    CHOIR_ASSERT(x != NULL && y != NULL && q8 != NULL);
    check_floats(x, (size_t)n * cols);
    k->quantize(x, cols, q8, 0, n);
    const choir_acts acts = {x, q8, n, cols};
    double best, macs = (double)rows * cols * n;
    BEST(best, macs > 1e8 ? 5 : 50, k->matmul(&w, &acts, y, rows, 0, rows));
    bool int8 = choir_layout_has_codes(w.layout);
    printf(
        "  matmul %-5s%s %5u x %4u x %3u  %9.1f us %7.1f GOPS  %3.0f%% of the %s peak %6.1f GB/s\n",
        choir_dtype_text(dtype), exact ? " exact" : "      ", rows, cols, n, best * 1e6,
        2e-9 * macs / best, 100 * macs / best / (int8 ? p.int8 : p.f32), int8 ? "int8" : "f32",
        1e-9 * (double)w.bytes / best);
    free(x);
    free(y);
    free(q8);
    free((void *)packed.data);
    free((void *)t.data);
}

/* Both factors of one matrix at each row count, in memory that a cache holds. */
static void bench_factors(const choir_kernels *k, choir_factor_type type, uint32_t rank, peaks p)
{
    enum { IN = 576, OUT = 1536, ROWS = 32 };
    static float from[IN * 64 + OUT * 64], x[ROWS * IN], t[ROWS * 64], y[ROWS * OUT];
    void *a = aligned_alloc(64, choir_factor_bytes(type, rank, IN));
    void *b = aligned_alloc(64, choir_factor_bytes(type, rank, OUT));
    CHOIR_ASSERT(a != NULL && b != NULL && rank <= 64);
    check_floats(from, sizeof from / sizeof *from);
    check_floats(x, ROWS * IN);
    choir_factor fa =
        choir_factor_pack(type, &(choir_factor_source){from, rank, IN, IN, 1, 1, NULL}, y, a);
    choir_factor fb =
        choir_factor_pack(type, &(choir_factor_source){from, rank, OUT, OUT, 1, 1, NULL}, y, b);
    for (uint32_t n = 1; n <= ROWS; n = n == 1 ? 4 : n * 8) {
        double down, up;
        BEST(down, 50, k->shrink(&fa, x, IN, n, t, 64));
        BEST(up, 50, k->expand(&fb, t, 64, n, y, OUT, 0, OUT));
        printf("  factors type %d rank %2u, %2u rows  A %7.2f us %5.1f GOPS %3.0f%%  B %7.2f us "
               "%5.1f GOPS "
               "%3.0f%% of the f32 peak\n",
               type, rank, n, down * 1e6, 2e-9 * rank * IN * n / down,
               100.0 * rank * IN * n / down / p.f32, up * 1e6, 2e-9 * rank * OUT * n / up,
               100.0 * rank * OUT * n / up / p.f32);
    }
    free(a);
    free(b);
}

static void bench_attention(const choir_kernels *k, uint32_t position, uint32_t n_queries, peaks p)
{
    enum { HEADS = 9, KV_HEADS = 3, DIM = 64, PAGE = 32 };
    uint32_t n_pages = (position + n_queries) / PAGE + 1, *pages = malloc(n_pages * sizeof *pages);
    size_t page = 2 * KV_HEADS * DIM * PAGE * sizeof(uint16_t);
    uint8_t *kv = calloc(n_pages, page);
    float *q = malloc(2 * (size_t)n_queries * HEADS * DIM * sizeof *q);
    float *out = q + (size_t)n_queries * HEADS * DIM;
    float *scratch =
        aligned_alloc(64, (choir_attention_scratch_floats(HEADS, DIM, DIM) * 4 + 63) / 64 * 64);
    CHOIR_ASSERT(pages != NULL && kv != NULL && q != NULL && scratch != NULL);
    check_floats(q, (size_t)n_queries * HEADS * DIM);
    for (uint32_t i = 0; i < n_pages; i++) pages[i] = i;
    choir_attention_block b = {.q = q,
                               .out = out,
                               .n_queries = n_queries,
                               .position = position,
                               .n_heads = HEADS,
                               .n_kv_heads = KV_HEADS,
                               .n_block_heads = HEADS / KV_HEADS,
                               .key_dim = DIM,
                               .value_dim = DIM,
                               .page_tokens = PAGE,
                               .scale = 0.125F,
                               .pages = pages,
                               .kv = kv,
                               .page_stride = page,
                               .scratch = scratch};
    double best, macs = 2.0 * HEADS / KV_HEADS * DIM * n_queries * (position + n_queries / 2.0);
    BEST(best, 50, k->attention(&b));
    printf("  attention %2u queries at %5u, one kv head  %9.1f us %7.1f GOPS  %3.0f%% of the f32 "
           "peak\n",
           n_queries, position, best * 1e6, 2e-9 * macs / best, 100 * macs / best / p.f32);
    free(pages);
    free(kv);
    free(q);
    free(scratch);
}

static void bench_rows(const choir_kernels *k)
{
    enum { N = 49152 };
    float *x = malloc(3 * N * sizeof *x);
    void *q8 = aligned_alloc(64, choir_acts_q8_bytes(1, N));
    CHOIR_ASSERT(x != NULL && q8 != NULL);
    check_floats(x, 3 * N);
    struct {
        const char *name;
        double best;
    } rows[5] = {{"quantize", 0}, {"rms_norm", 0}, {"silu_mul", 0}, {"max", 0}, {"sum_exp", 0}};
    BEST(rows[0].best, 20, k->quantize(x, N, q8, 0, 1));
    BEST(rows[1].best, 20, k->rms_norm(x, x + N, 1e-5F, N, x + 2 * N));
    BEST(rows[2].best, 20, k->silu_mul(x, x + N, N, x + 2 * N));
    volatile double sink;
    BEST(rows[3].best, 20, sink = (double)k->max(x, N));
    BEST(rows[4].best, 20, sink = k->sum_exp(x, 10.0F, N));
    (void)sink;
    for (int i = 0; i < 5; i++)
        printf("  %-9s of %d  %9.1f us %7.2f ns an element\n", rows[i].name, N, rows[i].best * 1e6,
               rows[i].best * 1e9 / N);
    free(x);
    free(q8);
}

void check_bench(const choir_kernels *k)
{
    peaks p = measure_peaks();
    printf("%s: one core; peaks with AVX2: int8 %.0f GOPS, f32 %.0f GOPS\n", k->name, 2e-9 * p.int8,
           2e-9 * p.f32);
    static const choir_dtype types[] = {CHOIR_Q4_1,  CHOIR_Q8_0, CHOIR_Q4_K, CHOIR_Q6_K,
                                        CHOIR_MXFP4, CHOIR_Q2,   CHOIR_Q3,   CHOIR_F16};
    bool slow = k->level == CHOIR_CPU_REFERENCE;
    for (uint32_t i = 0; i < sizeof types / sizeof *types; i++)
        for (uint32_t n = 1; n <= (slow ? 4 : 512); n = n == 1 ? 4 : n == 4 ? 16 : n * 32)
            bench_product(k, types[i], false, 1536,
                          types[i] == CHOIR_Q4_K || types[i] == CHOIR_Q6_K ? 512 : 576, n, p);
    if (!slow) bench_product(k, CHOIR_Q8_0, false, 49152, 576, 1, p);
    if (!slow) bench_product(k, CHOIR_Q4_1, true, 1536, 576, 512, p);
    for (int type = 0; type < CHOIR_N_FACTOR_TYPES; type++)
        for (uint32_t rank = 8; rank <= 64; rank *= 8)
            bench_factors(k, (choir_factor_type)type, rank, p);
    bench_attention(k, 511, 1, p);
    if (!slow) bench_attention(k, 4095, 1, p);
    bench_attention(k, 496, 16, p);
    if (!slow) bench_attention(k, 4080, 16, p);
    bench_rows(k);
}
