#include "cpu/kernels_prelude.h"

#ifdef PADDLE_MOE_CAN_AVX512_BF16
#define PADDLE_MOE_AVX512_BF16
#define PADDLE_MOE_32_REGISTERS
#ifdef __clang__
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")
#endif

namespace paddle_moe {
namespace cpu {
namespace avx512_bf16 {
#include "cpu/simd_avx512.h"
#include "cpu/kernels.inc"
const Kernels kKernels = make_kernels("avx512_bf16");
}  // namespace avx512_bf16
}  // namespace cpu
}  // namespace paddle_moe

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
