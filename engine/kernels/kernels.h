/* WHAT    The arithmetic: tensor types, packed weight layouts, and one table of kernels that the portable
 *         C reference fills and CPU levels overlay (AVX2, AVX-512 VNNI).
 * OWNS    Nothing; every buffer is the caller's.
 * THREADS Any; kernels are pure. A matmul is cut over output rows [begin, end) by the caller.
 * ERRORS  Only pack checks (CHOIR_E_INVALID); kernels take checked shapes.
 * LIMITS  Batch invariance: a row's result has one order of operations, whatever the number of rows, the
 *         cut or the neighbours. Quantised layouts give the same bits at every CPU level.
 * NEXT    engine/token_path.c, which calls them; engine/kernels/cpu/ for the levels. */
#pragma once
#include "base/error.h"

enum { CHOIR_NOT_GGUF = 0x7fffffff }; /* types of Choir's own: they lie in packs alone */

/* X(name, text, GGUF type id, elements per block, bytes per block). Packs hold places in this list: a new
 * type comes last. Q2: f16 d, f16 m, 32 codes of 2 bits, d * code + m; Q3: f16 d, 32 codes of 3 bits,
 * d * (code - 4). */
#define CHOIR_DTYPE_LIST(X)                                                                        \
    X(F32, "F32", 0, 1, 4)                                                                         \
    X(F16, "F16", 1, 1, 2)                                                                         \
    X(BF16, "BF16", 30, 1, 2)                                                                      \
    X(Q8_0, "Q8_0", 8, 32, 34)                                                                     \
    X(Q4_0, "Q4_0", 2, 32, 18)                                                                     \
    X(Q4_1, "Q4_1", 3, 32, 20)                                                                     \
    X(Q5_0, "Q5_0", 6, 32, 22)                                                                     \
    X(Q5_1, "Q5_1", 7, 32, 24)                                                                     \
    X(Q4_K, "Q4_K", 12, 256, 144)                                                                  \
    X(Q5_K, "Q5_K", 13, 256, 176)                                                                  \
    X(Q6_K, "Q6_K", 14, 256, 210)                                                                  \
    X(Q2_K, "Q2_K", 10, 256, 84)                                                                   \
    X(Q3_K, "Q3_K", 11, 256, 110)                                                                  \
    X(IQ4_NL, "IQ4_NL", 20, 32, 18)                                                                \
    X(IQ4_XS, "IQ4_XS", 23, 256, 136)                                                              \
    X(MXFP4, "MXFP4", 39, 32, 17)                                                                  \
    X(Q2, "Q2", CHOIR_NOT_GGUF, 32, 12)                                                            \
    X(Q3, "Q3", CHOIR_NOT_GGUF, 32, 14)

typedef enum choir_dtype {
#define X(name, text, id, elements, bytes) CHOIR_##name,
    CHOIR_DTYPE_LIST(X)
#undef X
    CHOIR_N_DTYPES
} choir_dtype;

const char *choir_dtype_text(choir_dtype dtype);
bool choir_dtype_from_gguf(uint32_t id, choir_dtype *out); /* false: unknown type */
bool choir_dtype_in_gguf(choir_dtype dtype); /* false: a type of Choir's own */
uint32_t choir_dtype_gguf(choir_dtype dtype); /* of those that are in GGUF */
uint32_t choir_dtype_block_elements(choir_dtype dtype);
uint32_t choir_dtype_block_bytes(choir_dtype dtype);
size_t choir_dtype_row_bytes(choir_dtype dtype, uint64_t cols); /* cols: a multiple of the block */

/* A weight as it lies in a file: row-major [rows, cols], y = W x has `rows` outputs. A view; whoever
 * mapped the file owns the bytes. A vector has rows = 1. data need not be aligned. */
typedef struct choir_tensor {
    choir_dtype dtype;
    uint32_t rows, cols;
    const void *data;
    size_t bytes;
} choir_tensor;

/* Dequantises elements [0, tensor->cols) of one row. Bit for bit what gguf-py's dequantize gives. */
void choir_tensor_row(const choir_tensor *tensor, uint32_t row, float *out);
/* Elements [begin, end) of the first row, both multiples of the type's block or of 32. */
void choir_tensor_part(const choir_tensor *tensor, uint32_t begin, uint32_t end, float *out);

/* A weight in the kernels' layout. CHOIR_LAYOUT_EXACT is a tensor as it lies: f32 activations, f32
 * accumulation over dequantised weights. The others are made once by choir_matrix_pack(). */
typedef enum choir_layout {
    CHOIR_LAYOUT_EXACT,
    CHOIR_LAYOUT_W4, /* 4-bit blocks of 32 with scale and minimum */
    CHOIR_LAYOUT_W8, /* 8-bit blocks with scale, and minimum where the source has one */
    CHOIR_LAYOUT_F16,
    CHOIR_LAYOUT_BF16,
    CHOIR_LAYOUT_F32,
    CHOIR_LAYOUT_W2, /* 2-bit blocks of 32 with scale and minimum */
    CHOIR_LAYOUT_W3, /* 3-bit blocks of 32 with scale */
} choir_layout;

/* Layouts of codes, whose products take quantised activations. */
static inline bool choir_layout_has_codes(choir_layout layout)
{
    return layout == CHOIR_LAYOUT_W4 || layout == CHOIR_LAYOUT_W8 || layout == CHOIR_LAYOUT_W2 ||
           layout == CHOIR_LAYOUT_W3;
}

typedef struct choir_matrix {
    choir_layout layout;
    choir_dtype dtype;   /* of the source */
    uint32_t rows, cols; /* outputs, inputs */
    uint32_t flags;      /* the layout's own */
    const void *data;    /* 64-byte aligned unless EXACT */
    size_t bytes;
} choir_matrix;

enum { CHOIR_PACK_ROWS = 16 }; /* packing and matmul are cut at multiples of this many output rows */

/* The packed form's size and description (data NULL) for a source tensor. */
choir_status choir_matrix_plan(const choir_tensor *source, choir_matrix *out) CHOIR_MUST_USE;
/* Packs rows [begin, end) into `data` (matrix->bytes, 64-aligned); threads may do disjoint parts. */
void choir_matrix_pack(const choir_matrix *matrix, const choir_tensor *source, void *data,
                       uint32_t begin, uint32_t end);
choir_matrix choir_matrix_exact(const choir_tensor *source); /* a view, EXACT layout */
/* One row back as f32 (embedding look-up on a packed, tied matrix). */
void choir_matrix_row(const choir_matrix *matrix, uint32_t row, float *out);

/* Activations of n rows in the form the layouts want: f32, and blocks of 32 codes with a scale each
 * (per row, so that rows are independent). `q8` may be NULL when no matrix of codes will be used.
 * The codes have 16 bits, see docs/decisions/0005. */
typedef struct choir_acts {
    const float *x; /* [n_rows, cols], row stride = cols */
    const void *q8; /* choir_kernels.quantize's output, or NULL */
    uint32_t n_rows, cols;
    struct choir_fetch *fetch; /* NULL, or what products fetch besides; one thread's own */
} choir_acts;

/* Memory that will be wanted soon: a product of codes, which computes more than it reads, fetches some lines of it
 * with each block. */
enum { CHOIR_CACHE_LINE = 64 };
typedef struct choir_range {
    const char *at;
    size_t bytes;
} choir_range;
typedef struct choir_fetch {
    const char *at, *end;             /* of the range that is under way */
    const choir_range *ranges, *last; /* that come then */
} choir_fetch;
size_t choir_acts_q8_bytes(uint32_t n_rows, uint32_t cols);

/* A factor of a low-rank pair B A (Hu et al. 2021) as `rank` rows of equal length: A as it is, [rank, inputs], and
 * B turned, [rank, outputs]. A row begins at a multiple of `stride` elements and ends in zeros up to it. */
typedef enum choir_factor_type {
    CHOIR_FACTOR_F32,
    CHOIR_FACTOR_F16, /* a power of two for each row, which leaves it the whole precision of 11 bits */
    CHOIR_FACTOR_BF16,
    CHOIR_FACTOR_INT8, /* a scale for each row */
    CHOIR_N_FACTOR_TYPES
} choir_factor_type;
typedef struct choir_factor {
    choir_factor_type type;
    uint32_t rank, length, stride;
    const void *data;
    const float *scales; /* [rank] of F16 and INT8, else NULL */
} choir_factor;
size_t choir_factor_element_bytes(choir_factor_type type);
static inline uint32_t choir_factor_stride(uint32_t length) { return (length + 15) & ~15U; }
size_t choir_factor_bytes(choir_factor_type type, uint32_t rank, uint32_t length); /* data, then scales */
/* What a factor is made of: element i of row r is data[r row_stride + i stride] scale scales[i]. */
typedef struct choir_factor_source {
    const float *data;
    uint32_t rank, length;
    size_t row_stride, stride;
    float scale;
    const float *scales; /* NULL: ones, or [length] */
} choir_factor_source;
/* Into `data` (choir_factor_bytes) by way of scratch [length]; rounds to nearest. */
choir_factor choir_factor_pack(choir_factor_type type, const choir_factor_source *from, float *scratch,
                               void *data);
uint16_t choir_f32_to_bf16(float x); /* finite; to nearest, ties to even */
static inline float choir_factor_scale(const choir_factor *f, uint32_t r)
{
    return f->scales != NULL ? f->scales[r] : 1;
}

/* One (sequence, kv head, some query heads of it, block of query tokens). K and V of a layer in one page lie as f16
 * K[n_kv_heads][page_tokens][key_dim] then V[n_kv_heads][page_tokens][value_dim], at
 * kv + pages[i] * page_stride. Latent attention (DeepSeek-AI 2024) has K alone: a value is the first
 * value_dim of its key. */
typedef struct choir_attention_block {
    const float *q; /* [n_queries, n_heads, key_dim] of consecutive positions */
    float *out;     /* [n_queries, n_heads, value_dim]; may not alias q */
    uint32_t n_queries, position; /* of the first query; query i sees keys 0 .. position + i */
    uint32_t n_heads, n_kv_heads, kv_head, key_dim, value_dim, page_tokens;
    uint32_t first_head, n_block_heads; /* the query heads to work on, all of kv_head */
    bool latent;
    uint32_t window; /* 0: all keys; else only the last `window` keys, the query's own included */
    uint32_t chunk;  /* 0, or only keys of the query's own chunk of so many positions (Llama 4) */
    float scale;
    float softcap;      /* 0, or scores s become softcap * tanh(s / softcap) (Gemma 2) */
    const float *sinks; /* NULL, or [n_heads]: a score that takes weight and has no value (gpt-oss) */
    const uint32_t *pages;
    const uint8_t *kv; /* base of this layer in page 0 */
    size_t page_stride;
    float *scratch; /* choir_attention_scratch_floats() floats, 64-aligned, this worker's own */
} choir_attention_block;
/* Query tokens per block, and query heads that are best worked on together; results depend on neither. */
enum { CHOIR_ATTENTION_QUERIES = 16, CHOIR_ATTENTION_HEADS = 8 };
size_t choir_attention_scratch_floats(uint32_t n_heads, uint32_t key_dim, uint32_t value_dim);
/* The first key that the query at `position` sees under a window and chunks (0: none). */
static inline uint32_t choir_first_key(uint32_t position, uint32_t window, uint32_t chunk)
{
    uint32_t first = window != 0 && position >= window ? position - window + 1 : 0;
    uint32_t start = chunk != 0 ? position - position % chunk : 0;
    return first > start ? first : start;
}

typedef enum choir_cpu_level {
    CHOIR_CPU_REFERENCE,
    CHOIR_CPU_AVX2,       /* AVX2, FMA, F16C */
    CHOIR_CPU_AVX512VNNI, /* AVX-512 F BW VL VNNI */
    CHOIR_CPU_N_LEVELS
} choir_cpu_level;

typedef struct choir_kernels {
    choir_cpu_level level;
    const char *name; /* "reference", "avx2", "avx512vnni" */
    /* x [n_rows, cols] -> q8 (choir_acts_q8_bytes) for rows [begin, end). cols: a multiple of 32, or
     * the last block is padded with zeros. */
    void (*quantize)(const float *x, uint32_t cols, void *q8, uint32_t begin, uint32_t end);
    /* y[i, r] = sum_k W[r, k] x[i, k] for r in [begin, end), all acts rows. y has row stride ldy and is
     * indexed by absolute r. begin, end: multiples of CHOIR_PACK_ROWS, except end = rows. */
    void (*matmul)(const choir_matrix *w, const choir_acts *acts, float *restrict y, size_t ldy,
                   uint32_t begin, uint32_t end);
    /* t[i, r] = scale[r] sum_k A[r, k] x[i, k] of n_rows rows */
    void (*shrink)(const choir_factor *a, const float *x, size_t ldx, uint32_t n_rows, float *t, size_t ldt);
    /* y[i, c] += sum_r t[i, r] scale[r] B[r, c] for c in [begin, end), ranks ascending. begin, end: as matmul's */
    void (*expand)(const choir_factor *b, const float *t, size_t ldt, uint32_t n_rows, float *y, size_t ldy,
                   uint32_t begin, uint32_t end);
    /* out = x / sqrt(mean(x^2) + eps) * weight  (Zhang, Sennrich 2019); weight NULL means ones */
    void (*rms_norm)(const float *x, const float *weight, float eps, uint32_t n, float *out);
    /* rotates pairs of `rotary_dims` in x [head_dim]; interleaved: (2i, 2i+1), else (i, i + d/2).
     * cos, sin: [rotary_dims / 2] of the position (Su et al. 2021) */
    void (*rope)(float *x, uint32_t rotary_dims, bool interleaved, const float *cos,
                 const float *sin);
    void (*silu_mul)(const float *gate, const float *up, uint32_t n, float *out); /* SwiGLU */
    /* GeGLU with gelu's tanh form (Hendrycks, Gimpel 2016; Shazeer 2020) */
    void (*gelu_mul)(const float *gate, const float *up, uint32_t n, float *out);
    /* gpt-oss: g = min(gate, limit), u = up within +-limit; out = (u + 1) g sigmoid(alpha g) */
    void (*clamped_swiglu)(const float *gate, const float *up, float alpha, float limit, uint32_t n,
                           float *out);
    void (*softcap)(float *x, float cap, uint32_t n); /* x = cap tanh(x / cap) */
    void (*add)(float *x, const float *y, uint32_t n);                            /* x += y */
    void (*add_scaled)(float *x, const float *y, float scale, uint32_t n);        /* x += scale y */
    void (*f32_to_f16)(const float *x, uint32_t n, uint16_t *out);
    void (*f16_to_f32)(const void *x, uint32_t n, float *out); /* x [n], need not be aligned */
    void (*attention)(const choir_attention_block *block);
    float (*max)(const float *x, uint32_t n);
    /* sum_i exp(x_i - max) in one fixed order, in double: the softmax denominator over a vocabulary */
    double (*sum_exp)(const float *x, float max, uint32_t n);
} choir_kernels;

/* The best level of this CPU. */
choir_cpu_level choir_cpu_best_level(void);
/* The table of a level; NULL when this CPU (or this build) lacks it. */
const choir_kernels *choir_kernels_at(choir_cpu_level level);
const char *choir_cpu_level_text(choir_cpu_level level); /* "avx2" */
bool choir_cpu_level_parse(const char *text, choir_cpu_level *out); /* "reference", "avx2", … */
