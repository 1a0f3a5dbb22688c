// csrc/cpu/isa.cc, kernels_avx512.cc and kernels_avx512_bf16.cc, for a processor with AVX2 that is taken for
// one with AVX-512 and its bf16 dot product.
#define __builtin_cpu_supports(feature) (feature[3] == '5' || __builtin_cpu_supports(feature))
#include "cpu/isa.cc"
#undef __builtin_cpu_supports

#include "cpu/kernels_prelude.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here is called with vectors from outside
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace paddle_moe {
namespace cpu {

namespace avx512 {
#include "avx512.h"
#include "cpu/simd_avx512.h"
#include "cpu/kernels.inc"
const Kernels kKernels = make_kernels("avx512");
}  // namespace avx512

#define PADDLE_MOE_AVX512_BF16
namespace avx512_bf16 {
#include "avx512.h"
#include "cpu/simd_avx512.h"
#include "cpu/kernels.inc"
const Kernels kKernels = make_kernels("avx512_bf16");
}  // namespace avx512_bf16

}  // namespace cpu
}  // namespace paddle_moe

#ifdef __clang__
#pragma clang attribute pop
#endif
