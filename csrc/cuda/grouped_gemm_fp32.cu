// The grouped GEMM for fp32 weights. Right and simple rather than fast: no tensor core has 24-bit products.
#include "cuda/activation.cuh"
#include "cuda/fp32_tile.cuh"
#include "cuda/grouped_gemm.h"

namespace paddle_moe {
namespace cuda {
namespace {

template <Stage kStage>
__global__ void __launch_bounds__(Fp32Tile::kThreads)
    multiply_tiles_fp32(const __grid_constant__ GroupedGemm g, int blocks_n) {
  // Blocks of columns change fastest: they share the rows.
  if (static_cast<int>(blockIdx.x) / blocks_n >= *g.num_tiles) return;
  const Tile tile = g.tiles[blockIdx.x / blocks_n];
  const Expert& expert = g.experts[tile.expert];
  const Matrix weight[2] = {kStage == Stage::kGateUp ? expert.gate : expert.down,
                            kStage == Stage::kGateUp ? expert.up : expert.down};
  constexpr int kColumns = kStage == Stage::kGateUp ? Fp32Tile::kHalfN : 2 * Fp32Tile::kHalfN;
  constexpr int kSecondHalf = kColumns - Fp32Tile::kHalfN;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) % blocks_n * kColumns;

  Fp32Tile sums;
  sums.multiply(
      *static_cast<Fp32Tile::Shared*>(shared_memory()), g.depth * g.parts, weight[0].in_stride == 1,
      [&](int row, int64_t k) {
        if (row >= tile.num_rows) return 0.0f;
        int64_t index = tile.first_row + row;
        if (kStage == Stage::kGateUp || g.row_slot != nullptr) index = g.row_slot[index] / g.top_k;
        return static_cast<const float*>(g.a)[index * g.a_stride + k];
      },
      [&](int half, int64_t k, int column) {
        const int64_t n = first_column + half * kSecondHalf + column;
        if (n >= g.columns) return 0.0f;
        const bool second_part = kStage == Stage::kDown && k >= g.depth;
        const Matrix& m = second_part ? expert.up : weight[half];
        if (second_part) k -= g.depth;
        return static_cast<const float*>(m.data)[k * m.in_stride + n * m.out_stride];
      });

  float* out = static_cast<float*>(g.out);
  if (kStage == Stage::kDown) {
    sums.for_each([&](int half, int row, int column, float sum) {
      const int64_t n = first_column + half * kSecondHalf + column;
      if (row >= tile.num_rows || n >= g.columns) return;
      out[(tile.first_row + row) * g.out_stride + n] = sum;
    });
    return;
  }
  uint32_t largest = 0;
#pragma unroll
  for (int r = 0; r < Fp32Tile::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < Fp32Tile::kColumns; ++c) {
      const int row = Fp32Tile::first_row() + r;
      const int64_t n = first_column + Fp32Tile::first_column() + c;
      if (row >= tile.num_rows || n >= g.columns) continue;
      float gate = sums.sum[0][r][c], up = sums.sum[1][r][c];
      if (expert.gate_bias != nullptr) gate += load_as_float(expert.gate_bias, n, g.bias_dtype);
      if (expert.up_bias != nullptr) up += load_as_float(expert.up_bias, n, g.bias_dtype);
      if (g.pre_activations != nullptr) {
        const int64_t slot = g.row_slot[tile.first_row + row];
        float* saved = static_cast<float*>(g.pre_activations) + slot * 2 * g.columns + n;
        saved[0] = gate;
        saved[g.columns] = up;
      }
      if (out == nullptr) continue;
      const float value = activate<float>(g.activation, gate, up);
      largest = max(largest, __float_as_uint(fabsf(value)));
      out[(tile.first_row + row) * g.out_stride + n] = value;
    }
  }
  if (g.amax != nullptr && largest != 0) atomicMax(g.amax + tile.expert, largest);
}

template <Stage kStage>
void start(const GroupedGemm& gemm, Stream stream) {
  constexpr int kColumns = kStage == Stage::kGateUp ? Fp32Tile::kHalfN : 2 * Fp32Tile::kHalfN;
  const int64_t blocks_n = divide_up(gemm.columns, kColumns);
  launch(kStage == Stage::kGateUp ? "grouped_gemm_fp32 (gate_up)" : "grouped_gemm_fp32 (down)",
         multiply_tiles_fp32<kStage>, gemm.max_tiles * blocks_n, Fp32Tile::kThreads, sizeof(Fp32Tile::Shared),
         stream, gemm, static_cast<int>(blocks_n));
}

}  // namespace

int block_m_fp32(const Problem&, int64_t) { return Fp32Tile::kBlockM; }

void grouped_gemm_fp32(Stage stage, const Problem&, const GroupedGemm& gemm, Stream stream) {
  stage == Stage::kGateUp ? start<Stage::kGateUp>(gemm, stream) : start<Stage::kDown>(gemm, stream);
}

}  // namespace cuda
}  // namespace paddle_moe
