// The grouped GEMM for bf16 and fp16 on every device from 80 up: tiles through cp.async into a ring of stages
// in shared memory, mma.sync on fragments read by ldmatrix.
//
// A block computes block_m rows times two halves of columns. In the first GEMM the halves are the same
// columns of gate and up, so that one thread holds both operands of the activation; in the second they are
// neighbours.
//
// Every element is summed over the depth in steps of 16, in ascending order, whatever the tile and whichever
// way the weights are loaded: its bits depend on its row and its column of weights alone.
//
// Half of the kernels, those of one dtype, are as much as one file should compile.
#pragma once

#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/common.cuh"
#include "cuda/grouped_gemm.h"
#include "cuda/tile_schedule.h"
#include "cuda/vectors.cuh"

namespace paddle_moe {
namespace cuda {
namespace {

// How a tile of weights gets into shared memory.
enum class Load {
  kRows,      // [in, out]: 16 bytes along out_stride == 1
  kColumns,   // [out, in]: 16 bytes along in_stride == 1
  kElements,  // any strides and alignment of weights and rows, element by element
};

constexpr int kMmaDepth = 16;

template <int kBlockM_, int kBlockDepth_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Config {
  static constexpr int kBlockM = kBlockM_, kBlockDepth = kBlockDepth_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kHalfN = 64;  // 128 bytes: whole rows of banks
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarpSize;
  static constexpr int kWarpM = kBlockM / kWarpsM, kWarpN = kHalfN / kWarpsN;
  static constexpr int kElementsA = kBlockM * kBlockDepth, kElementsB = kHalfN * kBlockDepth;
  static constexpr int kStageElements = kElementsA + 2 * kElementsB;
  // fp32 gate | up for the epilogue; the padding spreads the rows over the banks.
  static constexpr int kResultStride = 2 * kHalfN + 8;
  static constexpr size_t kSharedBytes =
      std::max<size_t>(kStages * kStageElements * 2, kBlockM * kResultStride * 4);
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kBlockDepth % kMmaDepth == 0, "whole fragments");
  static_assert(kElementsA % (kVector * kThreads) == 0 && kElementsB % (kVector * kThreads) == 0,
                "every thread loads as much");
  static_assert(kSharedBytes <= 99 * 1024, "the shared memory of devices 86 and 89");
};

using LargeConfig = Config<128, 32, 2, 2, 4>;
using MediumConfig = Config<64, 32, 2, 2, 4>;
using SmallConfig = Config<16, 64, 1, 4, 4>;  // weights are all that matters: deep stages of them

template <class T, class C, Stage kStage, Load kLoad>
class TileMultiplier {
 public:
  __device__ TileMultiplier(const GroupedGemm& gemm, const Tile& tile, int64_t first_column)
      : g_(gemm), tile_(tile), first_column_(first_column), expert_(gemm.experts[tile.expert]) {
    const Matrix& first = kStage == Stage::kGateUp ? expert_.gate : expert_.down;
    const Matrix& second = kStage == Stage::kGateUp ? expert_.up : expert_.down;
    columns_[0] = first_column;
    columns_[1] = kStage == Stage::kGateUp ? first_column : first_column + C::kHalfN;
    weights_[0] = first;
    weights_[1] = second;
#pragma unroll
    for (int i = 0; i < kVectorsA; ++i) {
      const int row = row_of_a(i);
      rows_[i] = nullptr;
      if (row < tile.num_rows) {
        int64_t index = tile.first_row + row;
        if (kStage == Stage::kGateUp || g_.row_slot != nullptr) index = g_.row_slot[index] / g_.top_k;
        rows_[i] = static_cast<const T*>(g_.a) + index * g_.a_stride;
      }
    }
  }

  __device__ void multiply(T* stages) {
    const int steps = g_.parts * steps_per_part();
    for (int s = 0; s < C::kStages - 1; ++s) load(stages, s, steps);
    for (int s = 0; s < steps; ++s) {
      cp_async_wait<C::kStages - 2>();
      __syncthreads();  // stage s is whole, and nobody reads the stage that is loaded next any more
      load(stages, s + C::kStages - 1, steps);
      multiply_stage(stages + s % C::kStages * C::kStageElements);
    }
    cp_async_wait<0>();
  }

  // The first GEMM: through shared memory, so that the activation is one small loop and rows are stored
  // whole.
  __device__ void store_activated(float* result) {
    __syncthreads();
    for_each_pair([&](int half, int row, int column, float first, float second) {
      *reinterpret_cast<float2*>(result + row * C::kResultStride + half * C::kHalfN + column) = {first,
                                                                                                 second};
    });
    __syncthreads();
    constexpr int kThreadsPerRow = C::kHalfN / kVector;
    const int column = threadIdx.x % kThreadsPerRow * kVector;
    const int count = valid_elements(g_.columns, first_column_ + column);
    uint32_t largest = 0;
    for (int row = threadIdx.x / kThreadsPerRow; row < tile_.num_rows; row += C::kThreads / kThreadsPerRow) {
      if (count == 0) break;
      float* gate = result + row * C::kResultStride + column;
      float* up = gate + C::kHalfN;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const int64_t c = first_column_ + column + i;
        if (expert_.gate_bias != nullptr) gate[i] += load_as_float(expert_.gate_bias, c, g_.bias_dtype);
        if (expert_.up_bias != nullptr) up[i] += load_as_float(expert_.up_bias, c, g_.bias_dtype);
      }
      if (g_.pre_activations != nullptr) save(row, column, count, gate, up);
      if (g_.out == nullptr) continue;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        gate[i] = activate<T>(g_.activation, gate[i], up[i]);
        largest = max(largest, __float_as_uint(fabsf(gate[i])));
      }
      T value[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[i] = from_float<T>(i < count ? gate[i] : 0.0f);
      T* out = static_cast<T*>(g_.out) + (tile_.first_row + row) * g_.out_stride + first_column_ + column;
      store_vector(out, value);
    }
    if (g_.amax == nullptr) return;
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      largest = max(largest, __shfl_xor_sync(kFullWarp, largest, distance));
    }
    if (threadIdx.x % kWarpSize == 0) atomicMax(g_.amax + tile_.expert, largest);
  }

  // The second GEMM: fp32 pairs from the registers, 32 bytes of a row together.
  __device__ void store_rows() {
    for_each_pair([&](int half, int row, int column, float first, float second) {
      const int64_t c = first_column_ + half * C::kHalfN + column;
      if (row >= tile_.num_rows || c >= g_.columns) return;
      float* out = static_cast<float*>(g_.out) + (tile_.first_row + row) * g_.out_stride + c;
      *reinterpret_cast<float2*>(out) = {first, second};
    });
  }

 private:
  // Gate and up of kVector columns, or of the `count` that there are.
  __device__ void save(int row, int column, int count, const float* gate, const float* up) const {
    const int64_t slot = g_.row_slot[tile_.first_row + row];
    T* out = static_cast<T*>(g_.pre_activations) + slot * 2 * g_.columns + first_column_ + column;
#pragma unroll
    for (int half = 0; half < 2; ++half, out += g_.columns) {
      const float* source = half == 0 ? gate : up;
      T value[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[i] = from_float<T>(i < count ? source[i] : 0.0f);
      if (count == kVector && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
        store_vector(out, value);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < count) out[i] = value[i];
      }
    }
  }

  static constexpr int kVectorsPerDepth = C::kBlockDepth / kVector;
  static constexpr int kVectorsPerHalf = C::kHalfN / kVector;
  static constexpr int kVectorsA = C::kElementsA / kVector / C::kThreads;
  static constexpr int kVectorsB = C::kElementsB / kVector / C::kThreads;
  static constexpr int kFragmentsM = C::kWarpM / 16, kFragmentsN = C::kWarpN / 8;

  __device__ static int warp_m() { return threadIdx.x / kWarpSize % C::kWarpsM * C::kWarpM; }
  __device__ static int warp_n() { return threadIdx.x / kWarpSize / C::kWarpsM * C::kWarpN; }

  __device__ static int row_of_a(int i) { return (threadIdx.x + i * C::kThreads) / kVectorsPerDepth; }
  __device__ static int vector_of_a(int i) { return (threadIdx.x + i * C::kThreads) % kVectorsPerDepth; }

  __device__ int steps_per_part() const { return static_cast<int>(divide_up(g_.depth, C::kBlockDepth)); }

  __device__ void load(T* stages, int step, int steps) {
    if (step < steps) {
      T* a = stages + step % C::kStages * C::kStageElements;
      const bool second_part = kStage == Stage::kDown && step >= steps_per_part();
      const int64_t first = int64_t{second_part ? step - steps_per_part() : step} * C::kBlockDepth;
      load_a(a, first, second_part ? g_.depth : 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_b(a + C::kElementsA + half * C::kElementsB, half, first,
               second_part ? expert_.up : weights_[half]);
      }
    }
    cp_async_commit();  // also without a load: the number of groups is what the wait counts
  }

  __device__ void load_a(T* tile, int64_t first, int64_t first_of_part) {
#pragma unroll
    for (int i = 0; i < kVectorsA; ++i) {
      const int64_t k = first + vector_of_a(i) * kVector;
      const int count = rows_[i] == nullptr ? 0 : valid_elements(g_.depth, k);
      T* destination = tile + swizzled<kVectorsPerDepth>(row_of_a(i), vector_of_a(i)) * kVector;
      copy(destination, count ? rows_[i] + first_of_part + k : static_cast<const T*>(g_.a), 1, count);
    }
  }

  __device__ void load_b(T* tile, int half, int64_t first, const Matrix& weight) {
#pragma unroll
    for (int i = 0; i < kVectorsB; ++i) {
      const int index = threadIdx.x + i * C::kThreads;
      const bool by_columns = kLoad == Load::kColumns;
      const int outer = by_columns ? index / kVectorsPerDepth : index / kVectorsPerHalf;
      const int vector = by_columns ? index % kVectorsPerDepth : index % kVectorsPerHalf;
      const int64_t k = first + (by_columns ? vector * kVector : outer);
      const int64_t n = columns_[half] + (by_columns ? outer : vector * kVector);
      const bool inside = by_columns ? n < g_.columns : k < g_.depth;
      const int count = !inside      ? 0
                        : by_columns ? valid_elements(g_.depth, k)
                                     : valid_elements(g_.columns, n);
      const T* source = static_cast<const T*>(weight.data);
      if (count) source += k * weight.in_stride + n * weight.out_stride;
      const int position =
          by_columns ? swizzled<kVectorsPerDepth>(outer, vector) : swizzled<kVectorsPerHalf>(outer, vector);
      copy(tile + position * kVector, source, weight.out_stride, count);
    }
  }

  __device__ static void copy(T* destination, const T* source, int64_t stride, int count) {
    if (kLoad == Load::kElements) {
      copy_elements(destination, source, stride, count);
    } else {
      cp_async_16(destination, source, count * static_cast<int>(sizeof(T)));
    }
  }

  __device__ void multiply_stage(const T* a) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < C::kBlockDepth; k += kMmaDepth) {
      uint32_t rows[kFragmentsM][4];
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m) {
        const int row = warp_m() + m * 16 + lane % 16, vector = k / kVector + lane / 16;
        ldmatrix(rows[m], a + swizzled<kVectorsPerDepth>(row, vector) * kVector);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* b = a + C::kElementsA + half * C::kElementsB;
#pragma unroll
        for (int n = 0; n < kFragmentsN; n += 2) {
          uint32_t weight[4];  // two fragments of 16 x 8
          load_fragments(weight, b, k, warp_n() + n * 8, lane);
#pragma unroll
          for (int m = 0; m < kFragmentsM; ++m) {
            mma<T>(sum_[half][m][n], rows[m], weight[0], weight[1]);
            mma<T>(sum_[half][m][n + 1], rows[m], weight[2], weight[3]);
          }
        }
      }
    }
  }

  __device__ static void load_fragments(uint32_t (&weight)[4], const T* b, int k, int n, int lane) {
    if (kLoad == Load::kColumns) {
      const int column = n + lane / 16 * 8 + lane % 8, vector = k / kVector + lane / 8 % 2;
      ldmatrix(weight, b + swizzled<kVectorsPerDepth>(column, vector) * kVector);
    } else {
      const int row = k + lane % 16, vector = n / kVector + lane / 16;
      ldmatrix_transposed(weight, b + swizzled<kVectorsPerHalf>(row, vector) * kVector);
    }
  }

  // body(half, row, column, value, value of the next column) for all sums of this thread.
  template <class Body>
  __device__ void for_each_pair(Body body) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
        for (int n = 0; n < kFragmentsN; ++n) {
          const float (&sum)[4] = sum_[half][m][n];
          const int row = warp_m() + m * 16 + lane / 4, column = warp_n() + n * 8 + lane % 4 * 2;
          body(half, row, column, sum[0], sum[1]);
          body(half, row + 8, column, sum[2], sum[3]);
        }
      }
    }
  }

  const GroupedGemm& g_;
  const Tile tile_;
  const int64_t first_column_;
  const Expert& expert_;
  int64_t columns_[2];
  Matrix weights_[2];
  const T* rows_[kVectorsA];
  float sum_[2][kFragmentsM][kFragmentsN][4] = {};
};

// Two blocks of a multiprocessor hide each other's barriers; the bound keeps the sums in registers.
constexpr int kBlocksPerMultiprocessor = 2;

template <class T, class C, Stage kStage, Load kLoad>
__global__ void __launch_bounds__(C::kThreads, kBlocksPerMultiprocessor)
    multiply_tiles(const __grid_constant__ GroupedGemm g, int column_tiles) {
  const TileSchedule schedule{*g.num_tiles, column_tiles};
  if (static_cast<int>(blockIdx.x) >= schedule.size()) return;
  const TilePosition position = schedule[blockIdx.x];
  constexpr int kColumns = kStage == Stage::kGateUp ? C::kHalfN : 2 * C::kHalfN;
  TileMultiplier<T, C, kStage, kLoad> tile(g, g.tiles[position.row_tile],
                                           static_cast<int64_t>(position.column_tile) * kColumns);
  tile.multiply(static_cast<T*>(shared_memory()));
  if (kStage == Stage::kGateUp) {
    tile.store_activated(static_cast<float*>(shared_memory()));
  } else {
    tile.store_rows();
  }
}

template <class Matches>
bool all_weights(Stage stage, const Problem& problem, const GroupedGemm& gemm, Matches matches) {
  const bool gated = stage == Stage::kGateUp, has_up = gated || gemm.parts == 2;
  return std::all_of(problem.experts.begin(), problem.experts.end(), [&](const Expert& e) {
    return matches(gated ? e.gate : e.down) && (!has_up || matches(e.up));
  });
}

Load choose_load(Stage stage, const Problem& problem, const GroupedGemm& gemm) {
  if (!is_aligned(gemm.a, gemm.a_stride)) return Load::kElements;
  if (gemm.parts == 2 && gemm.depth % kVector != 0) return Load::kElements;
  if (all_weights(stage, problem, gemm,
                  [](const Matrix& m) { return m.out_stride == 1 && is_aligned(m.data, m.in_stride); })) {
    return Load::kRows;
  }
  if (all_weights(stage, problem, gemm,
                  [](const Matrix& m) { return m.in_stride == 1 && is_aligned(m.data, m.out_stride); })) {
    return Load::kColumns;
  }
  return Load::kElements;
}

template <class T, class C, Stage kStage, Load kLoad>
void start(const GroupedGemm& gemm, Stream stream) {
  constexpr int kColumns = kStage == Stage::kGateUp ? C::kHalfN : 2 * C::kHalfN;
  const int64_t column_tiles = divide_up(gemm.columns, kColumns);
  launch(kStage == Stage::kGateUp ? "grouped_gemm_sm80 (gate_up)" : "grouped_gemm_sm80 (down)",
         multiply_tiles<T, C, kStage, kLoad>, gemm.max_tiles * column_tiles, C::kThreads, C::kSharedBytes,
         stream, gemm, static_cast<int>(column_tiles));
}

template <class T, class C, Stage kStage>
void start_with_load(const Problem& problem, const GroupedGemm& gemm, Stream stream) {
  switch (choose_load(kStage, problem, gemm)) {
    case Load::kRows:
      return start<T, C, kStage, Load::kRows>(gemm, stream);
    case Load::kColumns:
      return start<T, C, kStage, Load::kColumns>(gemm, stream);
    case Load::kElements:
      return start<T, C, kStage, Load::kElements>(gemm, stream);
  }
}

template <class T, Stage kStage>
void start_with_config(const Problem& problem, const GroupedGemm& gemm, Stream stream) {
  switch (gemm.block_m) {
    case SmallConfig::kBlockM:
      return start_with_load<T, SmallConfig, kStage>(problem, gemm, stream);
    case MediumConfig::kBlockM:
      return start_with_load<T, MediumConfig, kStage>(problem, gemm, stream);
    default:
      return start_with_load<T, LargeConfig, kStage>(problem, gemm, stream);
  }
}

template <class T>
void start(Stage stage, const Problem& problem, const GroupedGemm& gemm, Stream stream) {
  if (stage == Stage::kGateUp) {
    start_with_config<T, Stage::kGateUp>(problem, gemm, stream);
  } else {
    start_with_config<T, Stage::kDown>(problem, gemm, stream);
  }
}

}  // namespace

// In grouped_gemm_fp16_sm80.cu.
void grouped_gemm_fp16_sm80(Stage stage, const Problem& problem, const GroupedGemm& gemm, Stream stream);

}  // namespace cuda
}  // namespace paddle_moe
