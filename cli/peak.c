#include "cli/peak.h"

#include "base/base.h"

#include <stdatomic.h>
#include <string.h>

enum {
    READ_BYTES = 128 << 20, /* beyond every cache */
    ROWS = 256,
    COLS = 512,
    ACTS = 64, /* with its matrix well inside one core's cache */
    PRODUCTS = 40,
    ROUNDS = 5,
};

/* Several sums, so that no read waits for another. */
typedef struct reading {
    const uint64_t *data;
    _Atomic uint64_t sum;
} reading;

static void read_share(void *arg, uint32_t worker, uint32_t n_workers)
{
    reading *r = arg;
    uint64_t begin, end, s[8] = {0};
    choir_share(READ_BYTES / 8, 8, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i + 8 <= end; i += 8)
        for (int j = 0; j < 8; j++) s[j] ^= r->data[i + (uint64_t)j];
    r->sum += s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
}

typedef struct product {
    const choir_kernels *kernels;
    choir_matrix matrix;
    choir_acts acts;
    float *y; /* [n_workers, ACTS, ROWS] */
} product;

static void multiply(void *arg, uint32_t worker, uint32_t n_workers)
{
    product *p = arg;
    (void)n_workers;
    float *y = p->y + (size_t)worker * ACTS * ROWS;
    for (int i = 0; i < PRODUCTS; i++) p->kernels->matmul(&p->matrix, &p->acts, y, ROWS, 0, ROWS);
}

/* The best of some rounds, in runs per second. */
static double best_rate(choir_workers *workers, choir_work work, void *arg)
{
    double best = 0;
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t start = choir_clock_now();
        choir_workers_run(workers, work, arg);
        double rate = 1e9 / (double)(choir_clock_now() - start + 1);
        if (rate > best) best = rate;
    }
    return best;
}

static choir_status measure_reads(choir_workers *workers, choir_peak *out)
{
    void *data = choir_alloc_pages(CHOIR_MEM_SCRATCH, READ_BYTES);
    if (data == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory to measure reads with");
    memset(data, 1, READ_BYTES);
    reading r = {.data = data};
    out->bytes_per_s = best_rate(workers, read_share, &r) * READ_BYTES;
    choir_free_pages(CHOIR_MEM_SCRATCH, data, READ_BYTES);
    return CHOIR_OK;
}

static choir_status measure_products(const choir_kernels *kernels, choir_workers *workers,
                                     choir_peak *out)
{
    uint32_t n = choir_workers_count(workers);
    size_t source_bytes = ROWS * choir_dtype_row_bytes(CHOIR_Q8_0, COLS), packed_bytes = 0;
    size_t acts_bytes = choir_acts_q8_bytes(ACTS, COLS), y_bytes = (size_t)n * ACTS * ROWS * 4;
    size_t x_bytes = (size_t)ACTS * COLS * sizeof(float);
    product p = {.kernels = kernels};
    void *source = choir_alloc_pages(CHOIR_MEM_SCRATCH, source_bytes), *packed = NULL;
    void *q8 = choir_alloc_pages(CHOIR_MEM_SCRATCH, acts_bytes);
    float *x = choir_alloc_pages(CHOIR_MEM_SCRATCH, x_bytes);
    choir_status status = CHOIR_OK;
    p.y = choir_alloc_pages(CHOIR_MEM_SCRATCH, y_bytes);
    if (source == NULL || q8 == NULL || x == NULL || p.y == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory to measure products with");
        goto done;
    }
    const choir_tensor tensor = {CHOIR_Q8_0, ROWS, COLS, source, source_bytes};
    CHOIR_TRY_TO(done, status, choir_matrix_plan(&tensor, &p.matrix));
    packed_bytes = p.matrix.bytes;
    packed = choir_alloc_pages(CHOIR_MEM_SCRATCH, packed_bytes);
    if (packed == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory to measure products with");
        goto done;
    }
    choir_matrix_pack(&p.matrix, &tensor, packed, 0, ROWS);
    p.matrix.data = packed;
    for (size_t i = 0; i < (size_t)ACTS * COLS; i++) x[i] = (float)(i % 7) - 3;
    kernels->quantize(x, COLS, q8, 0, ACTS);
    p.acts = (choir_acts){.x = x, .q8 = q8, .n_rows = ACTS, .cols = COLS};
    out->ops_per_s = best_rate(workers, multiply, &p) * 2 * PRODUCTS * ROWS * COLS * ACTS * n;
done:
    choir_free_pages(CHOIR_MEM_SCRATCH, source, source_bytes);
    choir_free_pages(CHOIR_MEM_SCRATCH, packed, packed_bytes);
    choir_free_pages(CHOIR_MEM_SCRATCH, q8, acts_bytes);
    choir_free_pages(CHOIR_MEM_SCRATCH, x, x_bytes);
    choir_free_pages(CHOIR_MEM_SCRATCH, p.y, y_bytes);
    return status;
}

choir_status choir_peak_measure(const choir_kernels *kernels, uint32_t n_threads, choir_peak *out)
{
    choir_workers *workers;
    CHOIR_TRY(choir_workers_create(n_threads, &workers));
    choir_status status = measure_reads(workers, out);
    if (status == CHOIR_OK) status = measure_products(kernels, workers, out);
    choir_workers_destroy(workers);
    return status;
}
