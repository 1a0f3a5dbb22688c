#include "cpu/kernels_prelude.h"

namespace paddle_moe {
namespace cpu {
namespace generic {
#include "cpu/simd_generic.h"
#include "cpu/kernels.inc"
const Kernels kKernels = make_kernels("generic");
}  // namespace generic
}  // namespace cpu
}  // namespace paddle_moe
