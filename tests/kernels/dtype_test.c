/* Tensor types: the table, and dequantisation against gguf-py (tests/oracle/kernels_dequant.py). */
#include "base/file.h"
#include "engine/kernels/kernels.h"

#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_table(void **state)
{
    (void)state;
    static const uint32_t ids[] = {0, 1, 30, 8, 2, 3, 6, 7, 12, 13, 14, 10, 11, 20, 23, 39};
    const uint32_t n = sizeof ids / sizeof *ids;
    for (uint32_t i = 0; i < n; i++) {
        choir_dtype dtype;
        assert_true(choir_dtype_from_gguf(ids[i], &dtype));
        assert_int_equal(dtype, i);
        assert_int_equal(choir_dtype_gguf(dtype), ids[i]);
        assert_int_equal(choir_dtype_row_bytes(dtype, 512),
                         512 / choir_dtype_block_elements(dtype) * choir_dtype_block_bytes(dtype));
    }
    choir_dtype dtype;
    assert_false(choir_dtype_from_gguf(16, &dtype)); /* IQ2_XXS */
    assert_false(choir_dtype_from_gguf(UINT32_MAX, &dtype));
    /* Q2 and Q3 are Choir's own: no file of another kind has them. */
    assert_false(choir_dtype_from_gguf(CHOIR_NOT_GGUF, &dtype));
    assert_int_equal(n + 2, CHOIR_N_DTYPES);
    assert_string_equal(choir_dtype_text(CHOIR_Q4_K), "Q4_K");
}

typedef struct record {
    choir_tensor tensor;
    float *expected; /* free() it */
} record;

static bool next_record(const char **at, const char *end, record *out)
{
    uint32_t head[3];
    if (*at == end) return false;
    assert_true((size_t)(end - *at) >= sizeof head);
    memcpy(head, *at, sizeof head);
    assert_true(choir_dtype_from_gguf(head[0], &out->tensor.dtype));
    out->tensor.rows = 1;
    out->tensor.cols = head[1];
    out->tensor.data = *at + sizeof head;
    out->tensor.bytes = head[2];
    assert_int_equal(choir_dtype_row_bytes(out->tensor.dtype, head[1]), head[2]);
    size_t bytes = head[1] * sizeof(float);
    out->expected = malloc(bytes);
    memcpy(out->expected, *at + sizeof head + head[2], bytes);
    *at += sizeof head + head[2] + bytes;
    return true;
}

/* As the tensor lies, and as a packed row (16 of the same, and the last of 5), the bits are
 * gguf-py's. */
static void check_record(const record *r)
{
    uint32_t cols = r->tensor.cols;
    float *row = malloc(cols * sizeof *row);
    choir_tensor_row(&r->tensor, 0, row);
    assert_memory_equal(row, r->expected, cols * sizeof *row);

    choir_tensor five = r->tensor;
    char *data = malloc(5 * five.bytes);
    for (int i = 0; i < 5; i++) memcpy(data + i * five.bytes, r->tensor.data, five.bytes);
    five.data = data;
    five.bytes *= 5;
    five.rows = 5;
    choir_matrix m;
    assert_int_equal(choir_matrix_plan(&five, &m), CHOIR_OK);
    void *packed = aligned_alloc(64, (m.bytes + 63) & ~(size_t)63);
    choir_matrix_pack(&m, &five, packed, 0, 5);
    m.data = packed;
    memset(row, 0, cols * sizeof *row);
    choir_matrix_row(&m, 4, row);
    assert_memory_equal(row, r->expected, cols * sizeof *row);
    m = choir_matrix_exact(&five);
    memset(row, 0, cols * sizeof *row);
    choir_matrix_row(&m, 3, row);
    assert_memory_equal(row, r->expected, cols * sizeof *row);
    free(packed);
    free(data);
    free(row);
}

static void test_equals_gguf_py(void **state)
{
    (void)state;
    char *bytes;
    size_t n;
    assert_int_equal(choir_file_read("tests/fixtures/kernels/dequant.bin", 1 << 20, &bytes, &n),
                     CHOIR_OK);
    const char *at = bytes;
    record r;
    uint32_t n_types = 0;
    for (; next_record(&at, bytes + n, &r); n_types++) {
        check_record(&r);
        free(r.expected);
    }
    assert_int_equal(n_types, CHOIR_Q2); /* those before Choir's own */
    choir_free(bytes);
}

/* Every f16 number becomes the f32 that the definition gives. */
static void test_all_halves(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        uint16_t half = (uint16_t)h;
        int exponent = (int)(h >> 10 & 31), digits = (int)(h & 1023);
        if (exponent == 31) continue;
        double expected = exponent == 0 ? digits * 0x1p-24 : (1024 + digits) * 0x1p-25;
        for (int i = 1; i < exponent; i++) expected *= 2;
        if (exponent > 0) expected *= 2;
        float got;
        choir_tensor_row(&(choir_tensor){CHOIR_F16, 1, 1, &half, 2}, 0, &got);
        assert_true((double)got == (h & 0x8000 ? -expected : expected));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_equals_gguf_py),
        cmocka_unit_test(test_all_halves),
    };
    return cmocka_run_group_tests_name("kernels/dtype", tests, NULL, NULL);
}
