/* Products: every source type, packed and exact, odd shapes; a row's bits must not depend on the
 * number of rows beside it nor on where the outputs are cut. */
#include "tests/kernels/check.h"

#include <stdlib.h>
#include <string.h>

typedef struct product_case {
    const choir_kernels *ref, *k;
    const choir_matrix *w;
    const float *x;
    const void *q8;
    const char *text;
} product_case;

static guarded multiply(const choir_kernels *k, const product_case *c, uint32_t n_rows)
{
    guarded y = check_alloc((size_t)n_rows * c->w->rows * sizeof(float));
    const choir_acts acts = {c->x, c->q8, n_rows, c->w->cols};
    k->matmul(c->w, &acts, y.data, c->w->rows, 0, c->w->rows);
    return y;
}

/* Cut into parts as workers cut it, and with a row stride of its own. */
static void check_cuts(const product_case *c, const guarded *whole, uint32_t n_rows)
{
    uint32_t rows = c->w->rows, cut = rows / 2 / CHOIR_PACK_ROWS * CHOIR_PACK_ROWS;
    size_t ldy = rows + 3;
    guarded y = check_alloc(n_rows * ldy * sizeof(float)), packed = check_alloc(whole->bytes);
    /* What is fetched besides changes nothing; there need not be anything. */
    const choir_range ranges[] = {{(const char *)c->x, 200}, {(const char *)64, 5000}};
    choir_fetch fetch = {.ranges = ranges, .last = ranges + 2};
    const choir_acts acts = {c->x, c->q8, n_rows, c->w->cols, &fetch};
    if (cut < rows) c->k->matmul(c->w, &acts, y.data, ldy, cut, rows);
    if (cut > 0) c->k->matmul(c->w, &acts, y.data, ldy, 0, cut);
    for (uint32_t i = 0; i < n_rows; i++) {
        memcpy((float *)packed.data + (size_t)i * rows, (float *)y.data + i * ldy,
               rows * sizeof(float));
        uint32_t gap;
        memcpy(&gap, (float *)y.data + i * ldy + rows, sizeof gap);
        check_true(c->text, gap == 0xa7a7a7a7);
    }
    check_same(check_label("%s, cut", c->text), whole, &packed);
    check_free(&y);
    check_free(&packed);
}

static void check_batches(const product_case *c)
{
    static const uint32_t batches[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 67};
    guarded expected = multiply(c->ref, c, 67);
    for (uint32_t i = 0; i < sizeof batches / sizeof *batches; i++) {
        uint32_t n = batches[i];
        guarded got = multiply(c->k, c, n), first = check_alloc(got.bytes);
        memcpy(first.data, expected.data, got.bytes);
        check_same(check_label("%s, %u rows", c->text, n), &first, &got);
        if (n == 9) check_cuts(c, &got, n);
        check_free(&got);
        check_free(&first);
    }
    check_free(&expected);
}

static void check_product(const choir_kernels *ref, const choir_kernels *k, choir_dtype dtype,
                          uint32_t rows, uint32_t cols)
{
    choir_tensor t = check_tensor(dtype, rows, cols);
    choir_matrix packed = check_packed(&t), exact = choir_matrix_exact(&t);
    float *x = malloc((size_t)67 * cols * sizeof *x);
    CHOIR_ASSERT(x != NULL);
    check_floats(x, (size_t)67 * cols);
    guarded q8 = check_alloc(choir_acts_q8_bytes(67, cols));
    ref->quantize(x, cols, q8.data, 0, 67);
    char text[80];
    snprintf(text, sizeof text, "matmul %s %ux%u", choir_dtype_text(dtype), rows, cols);
    check_batches(&(product_case){ref, k, &packed, x, q8.data, text});
    snprintf(text, sizeof text, "matmul exact %s %ux%u", choir_dtype_text(dtype), rows, cols);
    check_batches(&(product_case){ref, k, &exact, x, NULL, text});
    check_true("quantize's guards", check_guards(&q8));
    check_free(&q8);
    free(x);
    free((void *)t.data);
    free((void *)packed.data);
}

void check_matmul(const choir_kernels *ref, const choir_kernels *k)
{
    for (uint32_t d = 0; d < CHOIR_N_DTYPES; d++) {
        choir_dtype dtype = (choir_dtype)d;
        uint32_t block = choir_dtype_block_elements(dtype);
        check_product(ref, k, dtype, 1, block == 1 ? 65 : block);
        check_product(ref, k, dtype, 35, block == 1 ? 300 : block * (block == 32 ? 19 : 3));
        check_product(ref, k, dtype, 48, block == 1 ? 7 : block * (block == 32 ? 33 : 5));
    }
}
