// The grouped GEMM of Hopper: TMA, wgmma and specialised warps. See grouped_gemm.h for what it computes and
// docs/cuda_kernels.md for the budgets behind its shape.
//
// A persistent grid takes tiles in the order of TileSchedule. In each block the first warpgroup fills a ring
// of stages in shared memory: it gathers rows of `a` by 16-byte cp.async (Hopper's copy engine cannot gather)
// and has one thread start the tensor copies of the weights. The other warpgroups multiply, 64 rows each, and
// write the result while the next tile is already being loaded.
//
// Half of the kernels, those of one dtype, are as much as one file should compile.
#pragma once

#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/grouped_gemm.h"
#include "cuda/ring_sm90.cuh"
#include "cuda/tile_schedule.h"

namespace paddle_moe {
namespace cuda {

enum class WeightOrder { kInOut, kOutIn };  // which index is contiguous is the second

// Where expert e's weights lie: at coordinate (data - base) / granularity of the tensor map's last dimension.
struct WeightMap {
  const char* base;
  int64_t granularity;  // bytes
};

// A weight of all experts as one tensor: element (i, o) of expert e at
// base[(data_e - base) + i * in_stride + o * out_stride], where data_e - base is a multiple of the
// granularity. So stacked tensors are the usual [E, in, out], and a list of tensors, wherever each of them
// lies, is one too.
struct Weights {
  WeightOrder order;
  WeightMap map;
  uint64_t row_bytes;  // from one of the other index to the next
  uint64_t places;     // multiples of the granularity up to the last expert
};

struct GemmWeights {
  Weights first, up;  // gate and up; or down, and in the second part up, where there is none down again
  TensorMap first_map, up_map;
};

// In grouped_gemm_fp16_sm90.cu.
void grouped_gemm_fp16_sm90(Stage stage, const GroupedGemm& gemm, const GemmWeights& weights, Stream stream);

namespace {

// kBlockM: rows of a tile. 128 for prefill; 64 for few rows per expert, when the weights' way through memory
// is the limit and narrow tiles keep all multiprocessors at it.
template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
struct Config {
  static constexpr bool kGated = kStage == Stage::kGateUp;
  static constexpr int kConsumers = kBlockM / 64;  // warpgroups
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kBlocks = kBlockM == 128 ? 4 : 2;  // of kBlockColumns; gate, up, gate, up where gated
  static constexpr int kColumns = kBlocks * kBlockColumns / (kGated ? 2 : 1);  // of the result
  static constexpr int kSums = kBlocks * kBlockColumns / 2;                    // per thread
  static constexpr int kABytes = kBlockM * kRowBytes;
  static constexpr int kBBytes = kBlocks * kBlockBytes;
  static constexpr int kStages = kBlockM == 128 ? 4 : 8;
  // The second warpgroup skips tiles that it has no row of. In gate_up the branch takes registers that the
  // epilogue needs: they would spill.
  static constexpr bool kSkips = kConsumers == 2 && !kGated;
  // 16 rows x kBlockColumns per warp, on their way from registers to global memory.
  static constexpr int kStagingBytes = kGated ? kConsumers * 4 * 16 * kRowBytes : 0;
};

__device__ inline TileSchedule schedule(const GroupedGemm& gemm, int columns) {
  return {*gemm.num_tiles, static_cast<int32_t>(divide_up(gemm.columns, columns))};
}

// ---------------------------------------------------------------- loads

template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
__device__ void produce(const GroupedGemm& gemm, const TensorMap* first_map, const TensorMap* up_map,
                        const WeightMap& first, const WeightMap& up, const Stages& stages) {
  using C = Config<T, kBlockM, kStage, kOrder>;
  constexpr int kRowsAtOnce = kWarpgroup / (kDepth / kChunk);
  constexpr int kRows = kBlockM / kRowsAtOnce;  // per thread
  const int thread = threadIdx.x;
  const int chunk = thread % (kDepth / kChunk), row = thread / (kDepth / kChunk);
  const int destination = swizzled_chunk(row, chunk);
  static_assert(kRowsAtOnce % 8 == 0, "all rows of a thread have the same place in their atom");

  const TileSchedule tiles = schedule(gemm, C::kColumns);
  Ring<C::kStages> ring;
  for (int32_t t = blockIdx.x; t < tiles.size(); t += gridDim.x) {
    const TilePosition position = tiles[t];
    const Tile tile = gemm.tiles[position.row_tile];
    const T* source[kRows];
    bool present[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = row + i * kRowsAtOnce;
      present[i] = r < tile.num_rows;
      int64_t source_row = present[i] ? tile.first_row + r : 0;
      if (present[i] && (C::kGated || gemm.row_slot)) source_row = gemm.row_slot[source_row] / gemm.top_k;
      source[i] = static_cast<const T*>(gemm.a) + source_row * gemm.a_stride + chunk * kChunk;
    }
    const Expert& expert = gemm.experts[tile.expert];
    const int32_t column = position.column_tile * C::kColumns;
    int32_t first_place = 0, up_place = 0;
    if (thread == 0) {
      const Matrix& matrix = C::kGated ? expert.gate : expert.down;
      first_place = (static_cast<const char*>(matrix.data) - first.base) / first.granularity;
      if (C::kGated || gemm.parts == 2) {
        up_place = (static_cast<const char*>(expert.up.data) - up.base) / up.granularity;
      }
    }
    const int32_t steps = divide_up(gemm.depth, kDepth);
    for (int32_t step = 0; step < (C::kGated ? steps : steps * gemm.parts); ++step) {
      const bool second_part = !C::kGated && step >= steps;
      const int32_t k = (second_part ? step - steps : step) * kDepth;
      mbarrier_wait(&stages.empty[ring.stage], ring.phase ^ 1);
      Mbarrier* full = &stages.full[ring.stage];
      if (thread == 0) {
        mbarrier_arrive_expect(full, C::kBBytes);
#pragma unroll
        for (int b = 0; b < C::kBlocks; ++b) {
          const bool is_up = C::kGated ? b % 2 : second_part;
          const int32_t n = column + (C::kGated ? b / 2 : b) * kBlockColumns;
          const bool in_out = kOrder == WeightOrder::kInOut;
          tensor_copy(stages.b + ring.stage * C::kBBytes + b * kBlockBytes, is_up ? up_map : first_map,
                      in_out ? n : k, in_out ? k : n, is_up ? up_place : first_place, full);
        }
      }
      const bool inside = k + chunk * kChunk < gemm.depth;
      const int64_t column_of_a = k + (second_part ? gemm.depth : 0);
      unsigned char* a = stages.a + ring.stage * C::kABytes + destination;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (C::kSkips && i * kRowsAtOnce / 64 * 64 >= tile.num_rows) break;
        const bool copied = present[i] && inside;
        cp_async_16(a + i * kRowsAtOnce * kRowBytes, copied ? source[i] + column_of_a : gemm.a,
                    copied ? 16 : 0);
      }
      mbarrier_arrive_after_copies(full);
      ring.advance();
    }
  }
  cp_async_wait_all();  // no thread leaves copies behind that still have to arrive for it
}

// ---------------------------------------------------------------- results

// Calls body with `spec`, its kind a constant for the compiler.
template <class Body>
__device__ __forceinline__ void with_activation(ActivationSpec spec, Body body) {
  switch (spec.kind) {
#define PADDLE_MOE_CASE(kind_)     \
  case Activation::kind_:          \
    spec.kind = Activation::kind_; \
    return body(spec);
    PADDLE_MOE_CASE(kSilu)
    PADDLE_MOE_CASE(kGelu)
    PADDLE_MOE_CASE(kGeluTanh)
    PADDLE_MOE_CASE(kRelu)
    PADDLE_MOE_CASE(kRelu2)
    PADDLE_MOE_CASE(kSelu)
    PADDLE_MOE_CASE(kIdentity)
    PADDLE_MOE_CASE(kSwigluOai)
#undef PADDLE_MOE_CASE
  }
}

// Bias, what the backward keeps, activation and amax.
template <class C, class T>
__device__ void write_intermediate(const GroupedGemm& gemm, const Tile& tile, int32_t first_column, int warp,
                                   unsigned char* staging, float (&sum)[C::kSums]) {
  constexpr int kHalf = kBlockColumns / 2;  // sums of a thread in one block of columns
  int lane = threadIdx.x % kWarpSize;
  pin(lane);  // else what the loop of wgmma has found out about it stays in registers that the sums need
  const int64_t first_row = tile.first_row + warp * 16;
  const int rows = tile.num_rows - warp * 16;
  const Expert& expert = gemm.experts[tile.expert];
  const auto column_of = [&](int i) {
    return first_column + i / kHalf * kBlockColumns + sum_column(i % kHalf) + 2 * (lane % 4);
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const void* bias = half == 0 ? expert.gate_bias : expert.up_bias;
    if (!bias) continue;
#pragma unroll
    for (int i = 0; i < C::kSums / 2; ++i) {
      if (sum_row(i) > 0) continue;
      const int32_t column = column_of(i);
      // Columns that are not there stay zero.
      const float value = column < gemm.columns ? load_as_float(bias, column, gemm.bias_dtype) : 0.0f;
      const int at = (2 * (i / kHalf) + half) * kHalf + i % kHalf;
      sum[at] += value;
      sum[at + 2] += value;
    }
  }
  if (gemm.pre_activations) {
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b) {
      const int32_t column = first_column + b / 2 * kBlockColumns;
      store_block<T>(staging, sum, b * kHalf, gemm.columns - column, [&](int row) -> T* {
        if (row >= rows) return nullptr;
        const int64_t slot = gemm.row_slot[first_row + row];
        return static_cast<T*>(gemm.pre_activations) + (2 * slot + b % 2) * gemm.columns + column;
      });
    }
  }
  if (!gemm.out) return;
  float value[C::kSums / 2];
  with_activation(gemm.activation, [&](const ActivationSpec& activation) {
#pragma unroll
    for (int i = 0; i < C::kSums / 2; ++i) {
      const int gate = i + i / kHalf * kHalf;
      value[i] = activate<T>(activation, sum[gate], sum[gate + kHalf]);
    }
  });
  pin(value);
  if (gemm.amax) {
    uint32_t largest = 0;  // as bits, in which a NaN is the largest
#pragma unroll
    for (int i = 0; i < C::kSums / 2; ++i) {
      const uint32_t magnitude = __float_as_uint(value[i]) & 0x7fffffffu;
      // Columns that are not there may be NaN: an infinite element of the row times their zeros.
      if (lane / 4 + sum_row(i) < rows && column_of(i) < gemm.columns) largest = max(largest, magnitude);
    }
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      largest = max(largest, __shfl_xor_sync(kFullWarp, largest, step));
    }
    if (lane == 0) atomicMax(gemm.amax + tile.expert, largest);
  }
#pragma unroll
  for (int block = 0; block < C::kBlocks / 2; ++block) {
    const int32_t column = first_column + block * kBlockColumns;
    store_block<T>(staging, value, block * kHalf, gemm.columns - column, [&](int row) -> T* {
      if (row >= rows) return nullptr;
      return static_cast<T*>(gemm.out) + (first_row + row) * gemm.out_stride + column;
    });
  }
}

// fp32 rows. A thread holds 2 columns of every 8, so neighbours swap pairs: each gets 4 columns in a row, and
// the 4 threads of a row write 64 bytes of it at a time.
template <class C>
__device__ void write_rows(const GroupedGemm& gemm, const Tile& tile, int32_t first_column, int warp,
                           const float (&sum)[C::kSums]) {
  const int lane = threadIdx.x % kWarpSize;
  const bool odd = lane % 2 != 0;  // these write the second 8 of 16 columns
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + lane / 4 + 8 * r;
    float* out = static_cast<float*>(gemm.out) + (tile.first_row + row) * gemm.out_stride;
#pragma unroll
    for (int j = 0; j < C::kColumns / 8; j += 2) {
      const int low = 4 * j + 2 * r, high = low + 4;
      float pair[2];  // of the neighbour; every lane of the warp takes part
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pair[i] = __shfl_xor_sync(kFullWarp, odd ? sum[low + i] : sum[high + i], 1);
      }
      const int32_t c = first_column + 8 * (j + odd) + lane % 4 / 2 * 4;
      if (row < tile.num_rows && c < gemm.columns) {
        *reinterpret_cast<float4*>(out + c) = odd ? float4{pair[0], pair[1], sum[high], sum[high + 1]}
                                                  : float4{sum[low], sum[low + 1], pair[0], pair[1]};
      }
    }
  }
}

template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
__device__ void consume(const GroupedGemm& gemm, const Stages& stages) {
  using C = Config<T, kBlockM, kStage, kOrder>;
  const int consumer = threadIdx.x / kWarpgroup - 1;
  const int warp = threadIdx.x / kWarpSize - 4;  // 16 rows each
  const TileSchedule tiles = schedule(gemm, C::kColumns);
  const int32_t steps = divide_up(gemm.depth, kDepth) * gemm.parts;
  Ring<C::kStages> ring;
  for (int32_t t = blockIdx.x; t < tiles.size(); t += gridDim.x) {
    const TilePosition position = tiles[t];
    const Tile tile = gemm.tiles[position.row_tile];
    const int32_t column = position.column_tile * C::kColumns;
    if constexpr (C::kSkips) {
      if (consumer * 64 >= tile.num_rows) {  // the same in the whole warpgroup
        pass<C>(stages, steps, &ring);
        continue;
      }
    }
    float sum[C::kSums];
    multiply<C, T, false, kOrder == WeightOrder::kInOut>(stages, consumer, steps, &ring, sum);
    if constexpr (C::kGated) {
      write_intermediate<C, T>(gemm, tile, column, warp, stages.staging + warp * 16 * kRowBytes, sum);
    } else {
      write_rows<C>(gemm, tile, column, warp, sum);
    }
  }
}

template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
__global__ void __launch_bounds__(Config<T, kBlockM, kStage, kOrder>::kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemm gemm, const __grid_constant__ TensorMap first_map,
                        const __grid_constant__ TensorMap up_map, const WeightMap first, const WeightMap up) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PADDLE_MOE_CUDA_EMULATOR)
  using C = Config<T, kBlockM, kStage, kOrder>;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&first_map);
    prefetch_tensor_map(&up_map);
  }
  const Stages stages = make_ring<C>(1);  // the start of the tensor copies
  if (threadIdx.x < kWarpgroup) {
    if constexpr (C::kConsumers == 2) give_registers<kProducerRegisters>();
    produce<T, kBlockM, kStage, kOrder>(gemm, &first_map, &up_map, first, up, stages);
  } else {
    if constexpr (C::kConsumers == 2) take_registers<kConsumerRegisters>();
    consume<T, kBlockM, kStage, kOrder>(gemm, stages);
  }
#else
  __trap();  // compiled for another device, it would return without having done anything
#endif
}

// ---------------------------------------------------------------- host

template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
void run(const GroupedGemm& gemm, const GemmWeights& weights, Stream stream) {
  using C = Config<T, kBlockM, kStage, kOrder>;
  // Fits 32 bits: the results of a tile are at least 8 KiB, so more tiles would not fit into any memory.
  const int64_t tiles = gemm.max_tiles * divide_up(gemm.columns, C::kColumns);
  launch("grouped_gemm_sm90", grouped_gemm_kernel<T, kBlockM, kStage, kOrder>,
         std::min<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount), tiles), C::kThreads,
         ring_bytes<C>(), stream, gemm, weights.first_map, weights.up_map, weights.first.map, weights.up.map);
}

template <class T, int kBlockM, Stage kStage>
void run(const GroupedGemm& gemm, const GemmWeights& weights, Stream stream) {
  if (weights.first.order == WeightOrder::kInOut) {
    run<T, kBlockM, kStage, WeightOrder::kInOut>(gemm, weights, stream);
  } else {
    run<T, kBlockM, kStage, WeightOrder::kOutIn>(gemm, weights, stream);
  }
}

template <class T, int kBlockM>
void run(Stage stage, const GroupedGemm& gemm, const GemmWeights& weights, Stream stream) {
  if (stage == Stage::kGateUp) {
    run<T, kBlockM, Stage::kGateUp>(gemm, weights, stream);
  } else {
    run<T, kBlockM, Stage::kDown>(gemm, weights, stream);
  }
}

template <class T>
void run(Stage stage, const GroupedGemm& gemm, const GemmWeights& weights, Stream stream) {
  if (gemm.block_m == 128) {
    run<T, 128>(stage, gemm, weights, stream);
  } else {
    run<T, 64>(stage, gemm, weights, stream);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace paddle_moe
