// The choice of a tile, and the kernels of bf16.
#include "cuda/grouped_gemm_sm80.cuh"

namespace paddle_moe {
namespace cuda {

int block_m_sm80(const Problem& problem, int64_t num_tokens) {
  const int64_t rows_per_expert = num_tokens * problem.top_k / problem.num_experts();
  if (rows_per_expert <= SmallConfig::kBlockM) return SmallConfig::kBlockM;
  return rows_per_expert <= MediumConfig::kBlockM ? MediumConfig::kBlockM : LargeConfig::kBlockM;
}

void grouped_gemm_sm80(Stage stage, const Problem& problem, const GroupedGemm& gemm, Stream stream) {
  if (problem.dtype == DType::kBFloat16) {
    start<Bf16>(stage, problem, gemm, stream);
  } else {
    grouped_gemm_fp16_sm80(stage, problem, gemm, stream);
  }
}

}  // namespace cuda
}  // namespace paddle_moe
