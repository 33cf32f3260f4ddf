// The row kernels for processors with AVX-512.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <utility>

// After the system's headers: their inline functions are shared with objects that run everywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define MMPEFT_ISA isa_avx512
#define MMPEFT_NAME "avx512"
#define MMPEFT_LANES 16

#include "csrc/cpu/rows/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // x86-64
