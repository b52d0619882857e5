/* What the kernel checks share: seeded numbers, guarded outputs, comparisons, random weights. */
#include "tests/kernels/check.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64, PATTERN = 0xa7 };

static uint64_t state;
static uint32_t n_failures;

void check_seed(uint64_t seed)
{
    state = seed;
}

static uint32_t next(void) /* SplitMix64 (Steele et al. 2014), upper half */
{
    uint64_t z = (state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

uint32_t check_below(uint32_t n)
{
    return (uint32_t)((uint64_t)next() * n >> 32);
}

float check_float(void)
{
    float sum = 0;
    for (int i = 0; i < 12; i++) sum += (float)next() * 0x1p-32F;
    return (sum - 6) * (check_below(10) == 0 ? 100.0F : 1.0F);
}

void check_floats(float *out, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i] = check_float();
}

guarded check_alloc(size_t bytes)
{
    size_t whole = (bytes + 2 * GUARD + 63) & ~(size_t)63;
    uint8_t *base = aligned_alloc(64, whole);
    CHOIR_ASSERT(base != NULL);
    memset(base, PATTERN, whole);
    return (guarded){base, base + GUARD, bytes};
}

bool check_guards(const guarded *g)
{
    for (size_t i = 0; i < GUARD; i++)
        if (g->base[i] != PATTERN || g->base[GUARD + g->bytes + i] != PATTERN) return false;
    return true;
}

void check_free(guarded *g)
{
    free(g->base);
}

bool check_true(const char *what, bool condition)
{
    if (condition) return true;
    if (++n_failures <= 20) printf("FAILED %s\n", what);
    return false;
}

bool check_same(const char *what, const guarded *expected, const guarded *got)
{
    if (!check_true(what, check_guards(expected) && check_guards(got))) {
        printf("       a guard was overwritten\n");
        return false;
    }
    if (memcmp(expected->data, got->data, expected->bytes) == 0) return true;
    check_true(what, false);
    const float *a = expected->data, *b = got->data;
    for (size_t i = 0; n_failures <= 20 && i < expected->bytes / sizeof *a; i++)
        if (memcmp(a + i, b + i, sizeof *a) != 0) {
            printf("       float %zu of %zu: expected %a, got %a\n", i, expected->bytes / sizeof *a,
                   (double)a[i], (double)b[i]);
            break;
        }
    return false;
}

const char *check_label(const char *format, ...)
{
    static char text[160];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

uint32_t check_failures(void)
{
    return n_failures;
}

/* f16 of a small number: a sign, an exponent of 2^-9 or so, random digits. */
static uint16_t small_half(void)
{
    return (uint16_t)(check_below(2) << 15 | (5 + check_below(4)) << 10 | check_below(1024));
}

/* Where a block keeps its f16 scales, or its exponent; all other bytes may be anything. */
static void put_block_scales(choir_dtype dtype, uint8_t *block)
{
    bool two = dtype == CHOIR_Q4_1 || dtype == CHOIR_Q5_1 || dtype == CHOIR_Q4_K ||
               dtype == CHOIR_Q5_K || dtype == CHOIR_Q2_K || dtype == CHOIR_Q2;
    size_t at = dtype == CHOIR_Q6_K ? 208 : dtype == CHOIR_Q2_K ? 80 : dtype == CHOIR_Q3_K ? 108 : 0;
    uint16_t half[2] = {small_half(), small_half()};
    if (dtype == CHOIR_MXFP4) {
        block[0] = (uint8_t)(120 + check_below(8));
        return;
    }
    memcpy(block + at, half, two ? 4 : 2);
}

choir_tensor check_tensor(choir_dtype dtype, uint32_t rows, uint32_t cols)
{
    size_t bytes = rows * choir_dtype_row_bytes(dtype, cols);
    uint8_t *data = malloc(bytes);
    CHOIR_ASSERT(data != NULL);
    for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)next();
    if (dtype == CHOIR_F32)
        check_floats((float *)data, (size_t)rows * cols);
    else if (dtype == CHOIR_F16 || dtype == CHOIR_BF16)
        for (size_t i = 0; i < bytes / 2; i++) {
            float x = check_float();
            uint32_t bits;
            memcpy(&bits, &x, 4);
            uint16_t half = dtype == CHOIR_F16 ? small_half() : (uint16_t)(bits >> 16);
            memcpy(data + 2 * i, &half, 2);
        }
    else
        for (size_t i = 0; i < bytes; i += choir_dtype_block_bytes(dtype))
            put_block_scales(dtype, data + i);
    return (choir_tensor){dtype, rows, cols, data, bytes};
}

choir_matrix check_packed(const choir_tensor *t)
{
    choir_matrix m;
    choir_status status = choir_matrix_plan(t, &m);
    CHOIR_ASSERT(status == CHOIR_OK);
    void *data = aligned_alloc(64, (m.bytes + 63) & ~(size_t)63);
    CHOIR_ASSERT(data != NULL);
    choir_matrix_pack(&m, t, data, 0, t->rows);
    m.data = data;
    return m;
}
