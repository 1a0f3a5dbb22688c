// Gradients of weights on Hopper: per expert left^T x right by wgmma, a GEMM whose depth is the rows of the
// expert. See docs/cuda_grouped_gemm_sm90.md.
//
// Both operands lie row by row, that is term by term, which wgmma reads as MN-major. Rows are gathered, and
// their number is only known on the device, so all loads are 16-byte cp.async, with zeros past the last row
// and the last column. One warpgroup loads and two multiply, in a persistent grid, as in
// grouped_gemm_sm90.cuh.
#include <algorithm>
#include <utility>

#include "cuda/backward.h"
#include "cuda/ring_sm90.cuh"
#include "cuda/tile_schedule.h"

namespace paddle_moe {
namespace cuda {
namespace {

// A tile: kRows columns of `left` by kColumns of `right`.
struct Config {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kRows = 64 * kConsumers, kColumns = 256;
  static constexpr int kSums = kColumns / 2;  // per thread
  static constexpr int kABytes = kRows / kBlockColumns * kBlockBytes;
  static constexpr int kBBytes = kColumns / kBlockColumns * kBlockBytes;
  static constexpr int kStages = 4;
  static constexpr int kStagingBytes = kConsumers * 4 * 16 * kRowBytes;
};

struct GradientTile {
  const Matrix* gradient;
  int64_t first_row, rows;
  int64_t first_left, first_right;  // columns
};

// Calls body with the tiles of this block: the experts one after the other.
template <class Body>
__device__ void for_each_tile(const WeightGradient& p, Body body) {
  const TileSchedule tiles{static_cast<int32_t>(divide_up(p.in_features, Config::kRows)),
                           static_cast<int32_t>(divide_up(p.out_features, Config::kColumns))};
  for (int32_t t = blockIdx.x; t < p.num_experts * tiles.size(); t += gridDim.x) {
    const int32_t expert = t / tiles.size();
    const Matrix& gradient = gradient_of(p.gradients[expert], p.weight);
    if (gradient.data == nullptr) continue;
    const TilePosition position = tiles[t % tiles.size()];
    body(GradientTile{&gradient, p.first_row[expert], p.expert_rows[expert],
                      int64_t{position.row_tile} * Config::kRows,
                      int64_t{position.column_tile} * Config::kColumns});
  }
}

// The blocks of columns of one operand that a thread loads a part of: of each row of 64 columns one chunk.
template <class T, int kBlocks>
class OperandLoader {
 public:
  __device__ OperandLoader(const OperandRows& operand, int64_t first_column, int64_t columns, int chunk)
      : operand_(operand), first_(first_column + chunk * kChunk) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) inside_[b] = first_ + b * kBlockColumns < columns;
  }

  // slot: of the row, or -1 where there is none.
  __device__ void load(unsigned char* destination, int32_t slot) const {
    const T* row = static_cast<const T*>(operand_.data);
    if (slot >= 0) row += slot / operand_.slots_per_row * operand_.stride + first_;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const bool copied = slot >= 0 && inside_[b];
      cp_async_16(destination + b * kBlockBytes, copied ? row + b * kBlockColumns : operand_.data,
                  copied ? 16 : 0);
    }
  }

 private:
  const OperandRows& operand_;
  const int64_t first_;
  bool inside_[kBlocks];
};

template <class T>
__device__ void produce(const WeightGradient& p, const Stages& stages) {
  constexpr int kRowsAtOnce = kWarpgroup / (kBlockColumns / kChunk);
  constexpr int kRows = kDepth / kRowsAtOnce;  // per thread
  const int chunk = threadIdx.x % (kBlockColumns / kChunk), row = threadIdx.x / (kBlockColumns / kChunk);
  static_assert(kRowsAtOnce % 8 == 0, "all rows of a thread have the same place in their atom");
  const int destination = swizzled_chunk(row, chunk);

  Ring<Config::kStages> ring;
  for_each_tile(p, [&](const GradientTile& tile) {
    const OperandLoader<T, Config::kRows / kBlockColumns> left(p.left, tile.first_left, p.in_features, chunk);
    const OperandLoader<T, Config::kColumns / kBlockColumns> right(p.right, tile.first_right, p.out_features,
                                                                   chunk);
    int32_t next[kRows];  // fetched a step ahead
    auto fetch = [&](int64_t first) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t r = first + row + i * kRowsAtOnce;
        next[i] = r < tile.rows ? p.row_slot[tile.first_row + r] : -1;
      }
    };
    fetch(0);
    for (int64_t k = 0; k < tile.rows; k += kDepth) {
      int32_t slot[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) slot[i] = next[i];
      fetch(k + kDepth);
      mbarrier_wait(&stages.empty[ring.stage], ring.phase ^ 1);
      unsigned char* a = stages.a + ring.stage * Config::kABytes + destination;
      unsigned char* b = stages.b + ring.stage * Config::kBBytes + destination;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        left.load(a + i * kRowsAtOnce * kRowBytes, slot[i]);
        right.load(b + i * kRowsAtOnce * kRowBytes, slot[i]);
      }
      mbarrier_arrive_after_copies(&stages.full[ring.stage]);
      ring.advance();
    }
  });
  cp_async_wait_all();  // no thread leaves copies behind that still have to arrive for it
}

// transposed: element (l, r) of the product is element (r, l) of the gradient.
template <class T>
__device__ void consume(const WeightGradient& p, bool transposed, const Stages& stages) {
  const int consumer = threadIdx.x / kWarpgroup - 1;
  const int warp = threadIdx.x / kWarpSize - 4;  // 16 rows of the tile each
  unsigned char* staging = stages.staging + warp * 16 * kRowBytes;
  Ring<Config::kStages> ring;
  for_each_tile(p, [&](const GradientTile& tile) {
    float sum[Config::kSums];
    const int32_t steps = divide_up(tile.rows, kDepth);
    if (steps > 0) {
      multiply<Config, T, true, true>(stages, consumer, steps, &ring, sum);
    } else {
#pragma unroll
      for (int i = 0; i < Config::kSums; ++i) sum[i] = 0.0f;
    }
    const Matrix& gradient = *tile.gradient;
    const int64_t stride = transposed ? gradient.out_stride : gradient.in_stride;
    const int64_t first = tile.first_left + warp * 16;
    T* data = static_cast<T*>(const_cast<void*>(gradient.data)) + first * stride;
#pragma unroll
    for (int b = 0; b < Config::kColumns / kBlockColumns; ++b) {
      const int64_t column = tile.first_right + b * kBlockColumns;
      store_block<T>(staging, sum, b * kBlockColumns / 2, p.out_features - column, [&](int row) -> T* {
        return first + row < p.in_features ? data + row * stride + column : nullptr;
      });
    }
  });
}

template <class T>
__global__ void __launch_bounds__(Config::kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ WeightGradient p, bool transposed) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PADDLE_MOE_CUDA_EMULATOR)
  const Stages stages = make_ring<Config>(0);
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    produce<T>(p, stages);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T>(p, transposed, stages);
  }
#else
  __trap();  // compiled for another device, it would return without having done anything
#endif
}

// Whether all gradients can be stored by 16 bytes along this index, the other one `stride` elements apart.
bool contiguous_along(int64_t Matrix::* index, int64_t Matrix::* other, const std::vector<Expert>& experts,
                      Weight weight) {
  return std::all_of(experts.begin(), experts.end(), [&](const Expert& expert) {
    const Matrix& m = gradient_of(expert, weight);
    return m.data == nullptr || (m.*index == 1 && is_aligned(m.data, m.*other));
  });
}

}  // namespace

bool weight_gradient_sm90(WeightGradient p, const std::vector<Expert>& gradients, DType dtype,
                          Stream stream) {
  if (p.in_features % kChunk != 0 || p.out_features % kChunk != 0) return false;
  if (!is_aligned(p.left.data, p.left.stride) || !is_aligned(p.right.data, p.right.stride)) return false;
  const bool transposed = !contiguous_along(&Matrix::out_stride, &Matrix::in_stride, gradients, p.weight);
  if (transposed) {
    if (!contiguous_along(&Matrix::in_stride, &Matrix::out_stride, gradients, p.weight)) return false;
    std::swap(p.left, p.right);
    std::swap(p.in_features, p.out_features);
  }
  const int64_t tiles =
      p.num_experts * divide_up(p.in_features, Config::kRows) * divide_up(p.out_features, Config::kColumns);
  launch("weight_gradient_sm90",
         dtype == DType::kBFloat16 ? weight_gradient_kernel<Bf16> : weight_gradient_kernel<Fp16>,
         std::min<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount), tiles), Config::kThreads,
         ring_bytes<Config>(), stream, p, transposed);
  return true;
}

}  // namespace cuda
}  // namespace paddle_moe
