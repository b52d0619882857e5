/* The one place that asks what the CPU can do. */
#include "engine/kernels/cpu/levels.h"

#include <stdatomic.h>

#ifdef __x86_64__
#    include <cpuid.h>
#endif

static const choir_kernels *const tables[CHOIR_CPU_N_LEVELS] = {
    [CHOIR_CPU_REFERENCE] = &choir_kernels_reference,
#ifdef __x86_64__
    [CHOIR_CPU_AVX2] = &choir_kernels_avx2,
    [CHOIR_CPU_AVX512VNNI] = &choir_kernels_avx512,
#endif
};

#ifdef __x86_64__
/* clang 14's __builtin_cpu_supports does not know this one. Asked once: the instruction leaves a
 * virtual machine, which takes microseconds. */
static bool has_f16c(void)
{
    static atomic_int known; /* relaxed: 0 not asked, 1 no, 2 yes; whoever asks gets the same */
    int answer = atomic_load_explicit(&known, memory_order_relaxed);
    if (answer == 0) {
        unsigned a, b, c, d;
        answer = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0 ? 2 : 1;
        atomic_store_explicit(&known, answer, memory_order_relaxed);
    }
    return answer == 2;
}
#endif

/* __builtin_cpu_supports also asks whether the system saves the wide registers (XGETBV). */
static bool has_level(choir_cpu_level level)
{
    if (level == CHOIR_CPU_REFERENCE) return true;
#ifdef __x86_64__
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (level == CHOIR_CPU_AVX2) return avx2;
    if (level == CHOIR_CPU_AVX512VNNI)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return false;
}

const choir_kernels *choir_kernels_at(choir_cpu_level level)
{
    if ((uint32_t)level >= CHOIR_CPU_N_LEVELS || !has_level(level)) return NULL;
    return tables[level];
}

choir_cpu_level choir_cpu_best_level(void)
{
    uint32_t level = CHOIR_CPU_N_LEVELS - 1;
    while (choir_kernels_at((choir_cpu_level)level) == NULL) level--;
    return (choir_cpu_level)level;
}

static const char *const level_names[CHOIR_CPU_N_LEVELS] = {"reference", "avx2", "avx512vnni"};

const char *choir_cpu_level_text(choir_cpu_level level)
{
    return level_names[level];
}

bool choir_cpu_level_parse(const char *text, choir_cpu_level *out)
{
    for (uint32_t i = 0; i < CHOIR_CPU_N_LEVELS; i++)
        if (strcmp(text, level_names[i]) == 0) {
            *out = (choir_cpu_level)i;
            return true;
        }
    return false;
}

/* One chunk of K (transposed) and V as f32, the scores of a few rows, and the running sums of all
 * rows that are worked on together. */
size_t choir_attention_scratch_floats(uint32_t n_heads, uint32_t key_dim, uint32_t value_dim)
{
    size_t heads = n_heads < HEAD_GROUP ? n_heads : HEAD_GROUP;
    size_t rows = heads * CHOIR_ATTENTION_QUERIES,
           keys = ((size_t)key_dim + LANES - 1) / LANES * LANES,
           values = ((size_t)value_dim + LANES - 1) / LANES * LANES;
    return KEY_CHUNK * (keys + values) + KEY_CHUNK * LANES + rows * (values + 2);
}
