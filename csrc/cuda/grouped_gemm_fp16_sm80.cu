// The kernels of fp16.
#include "cuda/grouped_gemm_sm80.cuh"

namespace paddle_moe {
namespace cuda {

void grouped_gemm_fp16_sm80(Stage stage, const Problem& problem, const GroupedGemm& gemm, Stream stream) {
  start<Fp16>(stage, problem, gemm, stream);
}

}  // namespace cuda
}  // namespace paddle_moe
