/* kernels_check [--bench] [--seed N]: checks, or times, every level this machine has. Built a
 * second time as kernels_check_simde, where the AVX-512 level runs on any CPU through SIMDe. */
#include "tests/kernels/check.h"

#include <stdlib.h>
#include <string.h>

#ifdef CHECK_SIMDE
extern const choir_kernels choir_kernels_avx512_simde;
#endif

static void check_level(const choir_kernels *k, uint64_t seed, bool bench)
{
    const choir_kernels *ref = choir_kernels_at(CHOIR_CPU_REFERENCE);
    uint32_t before = check_failures();
    if (bench) {
        check_bench(k);
        return;
    }
    check_seed(seed);
    check_rows(ref, k);
    check_matmul(ref, k);
    check_factors(ref, k);
    check_attention(ref, k);
    printf("%-12s %s\n", k->name, check_failures() == before ? "equals the reference" : "FAILED");
}

int main(int argc, char **argv)
{
    uint64_t seed = 1;
    bool bench = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--bench") == 0) bench = true;
        if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) seed = strtoull(argv[++i], NULL, 0);
    }
    printf("seed %llu\n", (unsigned long long)seed);
#ifdef CHECK_SIMDE
    check_level(&choir_kernels_avx512_simde, seed, bench);
#else
    for (uint32_t level = 0; level < CHOIR_CPU_N_LEVELS; level++) {
        const choir_kernels *k = choir_kernels_at((choir_cpu_level)level);
        if (k != NULL) check_level(k, seed, bench);
    }
#endif
    return check_failures() == 0 ? 0 : 1;
}
