/* XXH3 (Collet) at the speed of the widest registers that the machine has: including this instead of
 * <xxhash.h> makes XXH3_64bits() and its kin choose at run time. The same sums either way. */
#pragma once
#if defined(__x86_64__)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif
