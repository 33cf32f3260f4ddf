// The row kernels for processors with AVX2.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <utility>

// After the system's headers: their inline functions are shared with objects that run everywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MMPEFT_ISA isa_avx2
#define MMPEFT_NAME "avx2"
#define MMPEFT_LANES 8

#include "csrc/cpu/rows/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // x86-64
