// The kernels of fp16.
#include "cuda/grouped_gemm_sm90.cuh"

namespace paddle_moe {
namespace cuda {

void grouped_gemm_fp16_sm90(Stage stage, const GroupedGemm& gemm, const GemmWeights& weights, Stream stream) {
  run<Fp16>(stage, gemm, weights, stream);
}

}  // namespace cuda
}  // namespace paddle_moe
