/* WHAT    Philox4x32-10: 128 random bits as a pure function of a counter and a key (Salmon,
 *         Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
 * OWNS    Nothing; there is no state.
 * THREADS Any.
 * ERRORS  None.
 * LIMITS  Not for secrets.
 * NEXT    engine/sampler.c */
#pragma once
#include <stdint.h>

typedef struct choir_philox {
    uint32_t word[4];
} choir_philox;

static inline choir_philox choir_philox_draw(choir_philox counter, uint32_t key0, uint32_t key1)
{
    choir_philox c = counter;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = UINT64_C(0xD2511F53) * c.word[0], p1 = UINT64_C(0xCD9E8D57) * c.word[2];
        c = (choir_philox){{(uint32_t)(p1 >> 32) ^ c.word[1] ^ key0, (uint32_t)p1,
                            (uint32_t)(p0 >> 32) ^ c.word[3] ^ key1, (uint32_t)p0}};
        key0 += 0x9E3779B9; /* the golden ratio */
        key1 += 0xBB67AE85; /* sqrt(3) - 1 */
    }
    return c;
}
