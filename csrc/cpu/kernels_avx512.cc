#if defined(__x86_64__)
#include "cpu/kernels_prelude.h"

#define PADDLE_MOE_32_REGISTERS

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace paddle_moe {
namespace cpu {
namespace avx512 {
#include "cpu/simd_avx512.h"
#include "cpu/kernels.inc"
const Kernels kKernels = make_kernels("avx512");
}  // namespace avx512
}  // namespace cpu
}  // namespace paddle_moe

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
