#if defined(__x86_64__)
#include "cpu/kernels_prelude.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace paddle_moe {
namespace cpu {
namespace avx2 {
#include "cpu/simd_avx2.h"
#include "cpu/kernels.inc"
const Kernels kKernels = make_kernels("avx2");
}  // namespace avx2
}  // namespace cpu
}  // namespace paddle_moe

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
