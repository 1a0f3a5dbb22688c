// Gradients of weights and biases: per expert left^T x right, a GEMM whose depth is the rows of the expert.
//
// Both operands lie row by row, so a stage of the ring in shared memory holds kBlockDepth rows of each, and
// ldmatrix transposes both. Every element is one chain of mma over the rows, 16 at a time, ascending, so its
// bits depend on its expert's rows alone. fp32 sums as fp32_tile.cuh does.
#include "cuda/backward.h"
#include "cuda/common.cuh"
#include "cuda/fp32_tile.cuh"
#include "cuda/vectors.cuh"

namespace paddle_moe {
namespace cuda {
namespace {

__device__ const void* bias_of(const Expert& expert, Weight weight) {
  return weight == Weight::kGate ? expert.gate_bias
         : weight == Weight::kUp ? expert.up_bias
                                 : expert.down_bias;
}

template <class T>
__device__ const T* row_of(const OperandRows& operand, int32_t slot) {
  return static_cast<const T*>(operand.data) + slot / operand.slots_per_row * operand.stride;
}

// The tile of one block: which expert, and where in its matrix.
struct GradientTile {
  int32_t expert;
  int64_t first_in, first_out;
};

__device__ GradientTile tile_of_block(int tiles_in, int tiles_out, int tile_size) {
  const int64_t block = blockIdx.x;
  return {static_cast<int32_t>(block / tiles_out / tiles_in), block / tiles_out % tiles_in * tile_size,
          block % tiles_out * tile_size};
}

// ---------------------------------------------------------------- bf16 and fp16

constexpr int kTile = 128, kBlockDepth = 32, kStages = 4, kThreads = 128;
constexpr int kWarpTile = 64;  // 2 x 2 warps
constexpr int kTileVectors = kTile / kVector;
constexpr int kTileElements = kTile * kBlockDepth;
constexpr int kVectorsPerThread = kTileElements / kVector / kThreads;
constexpr size_t kSharedBytes = size_t{kStages} * 2 * kTileElements * 2;
constexpr int kFragmentsIn = kWarpTile / 16, kFragmentsOut = kWarpTile / 8;

// Position of a vector of a tile, so that eight consecutive rows of one column of vectors lie in different
// banks: each half of 64 columns as swizzled() lays it out.
__device__ int position_of(int row, int vector) {
  constexpr int kHalf = kTileVectors / 2;
  return (vector / kHalf * kBlockDepth) * kHalf + swizzled<kHalf>(row, vector % kHalf);
}

template <class T, bool kAligned>
class GradientMultiplier {
 public:
  __device__ GradientMultiplier(const WeightGradient& task, const GradientTile& tile)
      : p_(task),
        tile_(tile),
        first_row_(task.first_row[tile.expert]),
        rows_(task.expert_rows[tile.expert]) {}

  __device__ void multiply(T* stages) {
    const int steps = static_cast<int>(divide_up(rows_, kBlockDepth));
    for (int s = 0; s < kStages - 1; ++s) load(stages, s, steps);
    for (int s = 0; s < steps; ++s) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // stage s is whole, and nobody reads the stage that is loaded next any more
      load(stages, s + kStages - 1, steps);
      multiply_stage(stages + s % kStages * 2 * kTileElements);
    }
    cp_async_wait<0>();
  }

  __device__ void store(const Matrix& gradient) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < kFragmentsIn; ++m) {
#pragma unroll
      for (int n = 0; n < kFragmentsOut; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t in = tile_.first_in + warp_in() + m * 16 + i / 2 * 8 + lane / 4;
          const int64_t out = tile_.first_out + warp_out() + n * 8 + lane % 4 * 2 + i % 2;
          if (in >= p_.in_features || out >= p_.out_features) continue;
          static_cast<T*>(
              const_cast<void*>(gradient.data))[in * gradient.in_stride + out * gradient.out_stride] =
              from_float<T>(sum_[m][n][i]);
        }
      }
    }
  }

 private:
  __device__ static int warp_in() { return threadIdx.x / kWarpSize % 2 * kWarpTile; }
  __device__ static int warp_out() { return threadIdx.x / kWarpSize / 2 * kWarpTile; }

  __device__ void load(T* stages, int step, int steps) {
    if (step < steps) {
      T* left = stages + step % kStages * 2 * kTileElements;
#pragma unroll
      for (int i = 0; i < kVectorsPerThread; ++i) {
        const int index = threadIdx.x + i * kThreads;
        const int row = index / kTileVectors, vector = index % kTileVectors;
        const int64_t r = static_cast<int64_t>(step) * kBlockDepth + row;
        load_vector(left, p_.left, row, vector, r, tile_.first_in, p_.in_features);
        load_vector(left + kTileElements, p_.right, row, vector, r, tile_.first_out, p_.out_features);
      }
    }
    cp_async_commit();  // also without a load: the number of groups is what the wait counts
  }

  // Zeros where there is no row or no column.
  __device__ void load_vector(T* tile, const OperandRows& operand, int row, int vector, int64_t r,
                              int64_t first_column, int64_t columns) const {
    const int64_t column = first_column + vector * kVector;
    const int count = r < rows_ ? valid_elements(columns, column) : 0;
    const T* source = static_cast<const T*>(operand.data);
    if (count > 0) source = row_of<T>(operand, p_.row_slot[first_row_ + r]) + column;
    T* destination = tile + position_of(row, vector) * kVector;
    if (kAligned) {
      cp_async_16(destination, source, count * static_cast<int>(sizeof(T)));
    } else {
      copy_elements(destination, source, 1, count);
    }
  }

  __device__ void multiply_stage(const T* left) {
    const T* right = left + kTileElements;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < kBlockDepth; k += 16) {
      uint32_t in[kFragmentsIn][4];
#pragma unroll
      for (int m = 0; m < kFragmentsIn; ++m) {
        const int row = k + lane / 16 * 8 + lane % 8;
        const int vector = (warp_in() + m * 16) / kVector + lane / 8 % 2;
        ldmatrix_transposed(in[m], left + position_of(row, vector) * kVector);
      }
#pragma unroll
      for (int n = 0; n < kFragmentsOut; n += 2) {
        uint32_t out[4];  // two fragments of 16 x 8
        const int row = k + lane % 16, vector = (warp_out() + n * 8) / kVector + lane / 16;
        ldmatrix_transposed(out, right + position_of(row, vector) * kVector);
#pragma unroll
        for (int m = 0; m < kFragmentsIn; ++m) {
          mma<T>(sum_[m][n], in[m], out[0], out[1]);
          mma<T>(sum_[m][n + 1], in[m], out[2], out[3]);
        }
      }
    }
  }

  const WeightGradient& p_;
  const GradientTile tile_;
  const int64_t first_row_, rows_;
  float sum_[kFragmentsIn][kFragmentsOut][4] = {};
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    weight_gradient_tiles(const __grid_constant__ WeightGradient p, int tiles_in, int tiles_out) {
  const GradientTile tile = tile_of_block(tiles_in, tiles_out, kTile);
  const Matrix& gradient = gradient_of(p.gradients[tile.expert], p.weight);
  if (gradient.data == nullptr) return;
  GradientMultiplier<T, kAligned> multiplier(p, tile);
  multiplier.multiply(static_cast<T*>(shared_memory()));
  multiplier.store(gradient);
}

template <class T, bool kAligned>
void start(const WeightGradient& p, Stream stream) {
  const int64_t tiles_in = divide_up(p.in_features, kTile), tiles_out = divide_up(p.out_features, kTile);
  launch("weight_gradient_tiles", weight_gradient_tiles<T, kAligned>, p.num_experts * tiles_in * tiles_out,
         kThreads, kSharedBytes, stream, p, static_cast<int>(tiles_in), static_cast<int>(tiles_out));
}

// ---------------------------------------------------------------- fp32

__global__ void __launch_bounds__(Fp32Tile::kThreads)
    weight_gradient_tiles_fp32(const __grid_constant__ WeightGradient p, int tiles_in, int tiles_out) {
  static_assert(Fp32Tile::kBlockM == 2 * Fp32Tile::kHalfN, "square tiles");
  const GradientTile tile = tile_of_block(tiles_in, tiles_out, Fp32Tile::kBlockM);
  const Matrix& gradient = gradient_of(p.gradients[tile.expert], p.weight);
  if (gradient.data == nullptr) return;
  const int64_t first_row = p.first_row[tile.expert];
  Fp32Tile sums;
  sums.multiply(
      *static_cast<Fp32Tile::Shared*>(shared_memory()), p.expert_rows[tile.expert], false,
      [&](int in, int64_t k) {
        if (tile.first_in + in >= p.in_features) return 0.0f;
        return row_of<float>(p.left, p.row_slot[first_row + k])[tile.first_in + in];
      },
      [&](int half, int64_t k, int column) {
        const int64_t out = tile.first_out + half * Fp32Tile::kHalfN + column;
        if (out >= p.out_features) return 0.0f;
        return row_of<float>(p.right, p.row_slot[first_row + k])[out];
      });
  sums.for_each([&](int half, int row, int column, float sum) {
    const int64_t in = tile.first_in + row, out = tile.first_out + half * Fp32Tile::kHalfN + column;
    if (in >= p.in_features || out >= p.out_features) return;
    static_cast<float*>(
        const_cast<void*>(gradient.data))[in * gradient.in_stride + out * gradient.out_stride] = sum;
  });
}

void start_fp32(const WeightGradient& p, Stream stream) {
  const int64_t tiles_in = divide_up(p.in_features, Fp32Tile::kBlockM);
  const int64_t tiles_out = divide_up(p.out_features, Fp32Tile::kBlockM);
  launch("weight_gradient_tiles_fp32", weight_gradient_tiles_fp32, p.num_experts * tiles_in * tiles_out,
         Fp32Tile::kThreads, sizeof(Fp32Tile::Shared), stream, p, static_cast<int>(tiles_in),
         static_cast<int>(tiles_out));
}

// ---------------------------------------------------------------- biases

constexpr int kBiasWarps = 8;

// A block sums 32 columns of one expert, one per lane: warp w the rows w, w + kBiasWarps, ..., then the warps
// in order.
template <class T>
__global__ void __launch_bounds__(kBiasWarps* kWarpSize)
    bias_gradient_columns(const __grid_constant__ BiasGradient p, int blocks_per_expert) {
  auto* sums = static_cast<float (*)[kWarpSize]>(shared_memory());
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int32_t expert = static_cast<int32_t>(blockIdx.x) / blocks_per_expert;
  const int64_t column = static_cast<int64_t>(blockIdx.x) % blocks_per_expert * kWarpSize + lane;
  void* gradient = const_cast<void*>(bias_of(p.gradients[expert], p.of));
  if (gradient == nullptr) return;
  const int64_t first = p.first_row[expert], end = first + p.expert_rows[expert];
  float sum = 0.0f;
  if (column < p.columns) {
    for (int64_t r = first + warp; r < end; r += kBiasWarps) {
      const int32_t slot = p.row_slot[r];
      const float weight =
          p.row_weights == nullptr ? 1.0f : load_as_float(p.row_weights, slot, p.row_weights_dtype);
      sum = fmaf(weight, to_float(row_of<T>(p.rows, slot)[column]), sum);
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= p.columns) return;
  for (int w = 1; w < kBiasWarps; ++w) sum += sums[w][lane];
  store_from_float(gradient, column, p.bias_dtype, sum);
}

}  // namespace

void weight_gradient(const WeightGradient& p, DType dtype, Stream stream) {
  if (dtype == DType::kFloat32) return start_fp32(p, stream);
  const bool aligned = is_aligned(p.left.data, p.left.stride) && is_aligned(p.right.data, p.right.stride);
  const bool bf16 = dtype == DType::kBFloat16;
  if (aligned) {
    (bf16 ? start<Bf16, true> : start<Fp16, true>)(p, stream);
  } else {
    (bf16 ? start<Bf16, false> : start<Fp16, false>)(p, stream);
  }
}

void bias_gradient(const BiasGradient& p, DType dtype, Stream stream) {
  const int64_t blocks = divide_up(p.columns, kWarpSize);
  with_element(dtype, [&](auto element) {
    launch("bias_gradient_columns", bias_gradient_columns<decltype(element)>, p.num_experts * blocks,
           kBiasWarps * kWarpSize, kBiasWarps * kWarpSize * sizeof(float), stream, p,
           static_cast<int>(blocks));
  });
}

}  // namespace cuda
}  // namespace paddle_moe
