// The grouped GEMM of Hopper: TMA, wgmma and specialised warps. See grouped_gemm.h for what it computes and
// docs/cuda_kernels.md for the budgets behind its shape.
//
// A persistent grid takes tiles in the order of TileSchedule. In each block the first warpgroup fills a ring
// of stages in shared memory: it gathers rows of `a` by 16-byte cp.async (Hopper's copy engine cannot gather)
// and has one thread start the tensor copies of the weights. The other warpgroups multiply, 64 rows each, and
// write the result while the next tile is already being loaded.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "cuda/activation.cuh"
#include "cuda/grouped_gemm.h"
#include "cuda/ptx_sm90.cuh"
#include "cuda/tile_schedule.h"

namespace paddle_moe {
namespace cuda {
namespace {

constexpr int kWarpgroup = 128;  // threads
constexpr int kDepth = 64;       // terms per stage: 128 bytes, the width of the swizzle
constexpr int kRowBytes = kDepth * 2;
constexpr int kAtomBytes = 8 * kRowBytes;  // 8 rows: what the swizzle permutes
constexpr int kBlockColumns = 64;          // columns of weights that one tensor copy brings
constexpr int kBlockBytes = kBlockColumns * kRowBytes;
constexpr int kTermsPerWgmma = 16;
constexpr int kChunk = 8;  // elements in 16 bytes

enum class WeightOrder { kInOut, kOutIn };  // which index is contiguous is the second

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
  // 16 rows x kBlockColumns per warp, on their way from registers to global memory.
  static constexpr int kStagingBytes = kGated ? kConsumers * 4 * 16 * kRowBytes : 0;
  static constexpr int kSharedBytes = kStages * (kABytes + kBBytes) + kStagingBytes + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block may have");
  static_assert(kStagingBytes % 8 == 0, "the barriers behind it are 8-byte aligned");
};

// Registers are shared out again after the start: the loads need few, the sums many. Together they are what
// __launch_bounds__ grants, 168 x 3.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / (3 * kWarpgroup) / 8 * 8),
              "a consumer would wait for registers that nobody gives back");

// Where expert e's weights lie: at coordinate (data - base) / granularity of the tensor map's last dimension.
struct WeightMap {
  const char* base;
  int64_t granularity;  // bytes
};

struct Stages {
  unsigned char* a;
  unsigned char* b;
  unsigned char* staging;
  Mbarrier* full;
  Mbarrier* empty;
};

// A position in the ring.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ inline TileSchedule schedule(const GroupedGemm& gemm, int columns) {
  return {*gemm.num_tiles, static_cast<int32_t>(divide_up(gemm.columns, columns))};
}

// Byte `offset` of a swizzled array, whose row is `row` modulo 8: the 16-byte chunks of a row change places.
__device__ inline int swizzled_chunk(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// ---------------------------------------------------------------- loads

template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
__device__ void produce(const GroupedGemm& gemm, const TensorMap* gate_map, const TensorMap* up_map,
                        const WeightMap& gate, const WeightMap& up, const Stages& stages) {
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
      if (C::kGated) source_row = present[i] ? gemm.row_slot[source_row] / gemm.top_k : 0;
      source[i] = static_cast<const T*>(gemm.a) + source_row * gemm.a_stride + chunk * kChunk;
    }
    const Expert& expert = gemm.experts[tile.expert];
    const int32_t column = position.column_tile * C::kColumns;
    int32_t gate_place = 0, up_place = 0;
    if (thread == 0) {
      const Matrix& first = C::kGated ? expert.gate : expert.down;
      gate_place = (static_cast<const char*>(first.data) - gate.base) / gate.granularity;
      if (C::kGated) up_place = (static_cast<const char*>(expert.up.data) - up.base) / up.granularity;
    }
    for (int32_t k = 0; k < gemm.depth; k += kDepth) {
      mbarrier_wait(&stages.empty[ring.stage], ring.phase ^ 1);
      Mbarrier* full = &stages.full[ring.stage];
      if (thread == 0) {
        mbarrier_arrive_expect(full, C::kBBytes);
#pragma unroll
        for (int b = 0; b < C::kBlocks; ++b) {
          const bool is_up = C::kGated && b % 2;
          const int32_t n = column + (C::kGated ? b / 2 : b) * kBlockColumns;
          const bool in_out = kOrder == WeightOrder::kInOut;
          tensor_copy(stages.b + ring.stage * C::kBBytes + b * kBlockBytes, is_up ? up_map : gate_map,
                      in_out ? n : k, in_out ? k : n, is_up ? up_place : gate_place, full);
        }
      }
      const bool inside = k + chunk * kChunk < gemm.depth;
      unsigned char* a = stages.a + ring.stage * C::kABytes + destination;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool copied = present[i] && inside;
        cp_async_16(a + i * kRowsAtOnce * kRowBytes, copied ? source[i] + k : gemm.a, copied ? 16 : 0);
      }
      mbarrier_arrive_after_copies(full);
      ring.advance();
    }
  }
  cp_async_wait_all();  // no thread leaves copies behind that still have to arrive for it
}

// ---------------------------------------------------------------- sums

// Where sum i of a thread lies among the 16 rows of its warp and the columns of its tile's weights.
__device__ constexpr int sum_row(int i) { return i % 4 / 2 * 8; }         // + lane / 4
__device__ constexpr int sum_column(int i) { return i / 4 * 8 + i % 2; }  // + 2 (lane % 4)

template <class C, class T, WeightOrder kOrder>
__device__ void multiply(const GroupedGemm& gemm, const Stages& stages, int consumer, Ring<C::kStages>* ring,
                         float (&sum)[C::kSums]) {
  constexpr bool kMnMajor = kOrder == WeightOrder::kInOut;
  const bool signals = threadIdx.x % kWarpSize == 0;
  int previous = 0;
  for (int32_t k = 0; k < gemm.depth; k += kDepth) {
    mbarrier_wait(&stages.full[ring->stage], ring->phase);
    // Rows of `a` come by cp.async, which writes as ordinary stores do; the barrier has made them visible to
    // this thread, the fence makes them visible to its wgmma.
    fence_shared_for_wgmma();
    const uint64_t a =
        wgmma_matrix(stages.a + ring->stage * C::kABytes + consumer * 64 * kRowBytes, kAtomBytes, kAtomBytes);
    const uint64_t b = wgmma_matrix(stages.b + ring->stage * C::kBBytes, kBlockBytes, kAtomBytes);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kDepth / kTermsPerWgmma; ++i) {
      constexpr int kStepA = kTermsPerWgmma * 2, kStepB = kMnMajor ? kTermsPerWgmma * kRowBytes : kStepA;
      wgmma<T, kMnMajor>(sum, wgmma_advance(a, i * kStepA), wgmma_advance(b, i * kStepB), k > 0 || i > 0);
    }
    wgmma_commit();
    if (k > 0) {
      wgmma_wait<1>();
      if (signals) mbarrier_arrive(&stages.empty[previous]);
    }
    previous = ring->stage;
    ring->advance();
  }
  wgmma_wait<0>();
  pin(sum);
  if (signals) mbarrier_arrive(&stages.empty[previous]);
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

template <class T>
__device__ uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

// Bias, activation and amax; then through shared memory, so that whole lines are written.
template <class C, class T>
__device__ void write_intermediate(const GroupedGemm& gemm, const Tile& tile, int32_t first_column, int warp,
                                   unsigned char* staging, float (&sum)[C::kSums]) {
  constexpr int kHalf = kBlockColumns / 2;  // sums of a thread in one block of columns
  const int lane = threadIdx.x % kWarpSize;
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
#pragma unroll
    for (int i = 0; i < kHalf; i += 8) {
      const float* v = value + block * kHalf + i;
      const uint32_t matrix[4] = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]),
                                  pack<T>(v[6], v[7])};
      stmatrix(staging + swizzled_chunk(lane % 16, i / 4 + lane / 16), matrix);
    }
    __syncwarp();
    constexpr int kChunks = kBlockColumns / kChunk;  // per row
#pragma unroll
    for (int i = 0; i < 16 * kChunks / kWarpSize; ++i) {
      const int row = (i * kWarpSize + lane) / kChunks, chunk = lane % kChunks;
      const int32_t column = first_column + block * kBlockColumns + chunk * kChunk;
      if (row < rows && column < gemm.columns) {
        T* out = static_cast<T*>(gemm.out) + (first_row + row) * gemm.out_stride + column;
        *reinterpret_cast<uint4*>(out) =
            *reinterpret_cast<const uint4*>(staging + swizzled_chunk(row, chunk));
      }
    }
    __syncwarp();
  }
}

// fp32 rows. The 4 threads that share a row write 32 bytes of it at a time, a whole sector.
template <class C>
__device__ void write_rows(const GroupedGemm& gemm, const Tile& tile, int32_t first_column, int warp,
                           const float (&sum)[C::kSums]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + lane / 4 + 8 * r;
    if (row >= tile.num_rows) continue;
    float* out = static_cast<float*>(gemm.out) + (tile.first_row + row) * gemm.out_stride;
#pragma unroll
    for (int j = 0; j < C::kColumns / 8; ++j) {
      const int32_t c = first_column + 8 * j + 2 * (lane % 4);
      if (c < gemm.columns)
        *reinterpret_cast<float2*>(out + c) = {sum[4 * j + 2 * r], sum[4 * j + 2 * r + 1]};
    }
  }
}

template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
__device__ void consume(const GroupedGemm& gemm, const Stages& stages) {
  using C = Config<T, kBlockM, kStage, kOrder>;
  const int consumer = threadIdx.x / kWarpgroup - 1;
  const int warp = threadIdx.x / kWarpSize - 4;  // 16 rows each
  const TileSchedule tiles = schedule(gemm, C::kColumns);
  Ring<C::kStages> ring;
  for (int32_t t = blockIdx.x; t < tiles.size(); t += gridDim.x) {
    const TilePosition position = tiles[t];
    const Tile tile = gemm.tiles[position.row_tile];
    const int32_t column = position.column_tile * C::kColumns;
    float sum[C::kSums];
    multiply<C, T, kOrder>(gemm, stages, consumer, &ring, sum);
    if constexpr (C::kGated) {
      write_intermediate<C, T>(gemm, tile, column, warp, stages.staging + warp * 16 * kRowBytes, sum);
    } else {
      write_rows<C>(gemm, tile, column, warp, sum);
    }
  }
}

template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
__global__ void __launch_bounds__(Config<T, kBlockM, kStage, kOrder>::kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemm gemm, const __grid_constant__ TensorMap gate_map,
                        const __grid_constant__ TensorMap up_map, const WeightMap gate, const WeightMap up) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PADDLE_MOE_CUDA_EMULATOR)
  using C = Config<T, kBlockM, kStage, kOrder>;
  unsigned char* shared = static_cast<unsigned char*>(shared_memory());
  Stages stages;
  stages.a = shared;
  stages.b = stages.a + C::kStages * C::kABytes;
  stages.staging = stages.b + C::kStages * C::kBBytes;
  stages.full = reinterpret_cast<Mbarrier*>(stages.staging + C::kStagingBytes);
  stages.empty = stages.full + C::kStages;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&gate_map);
    if (C::kGated) prefetch_tensor_map(&up_map);
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(&stages.full[i], kWarpgroup + 1);      // each thread's rows, and the start of the copies
      mbarrier_init(&stages.empty[i], 4 * C::kConsumers);  // each warp of the consumers
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    if constexpr (C::kConsumers == 2) give_registers<kProducerRegisters>();
    produce<T, kBlockM, kStage, kOrder>(gemm, &gate_map, &up_map, gate, up, stages);
  } else {
    if constexpr (C::kConsumers == 2) take_registers<kConsumerRegisters>();
    consume<T, kBlockM, kStage, kOrder>(gemm, stages);
  }
#else
  __trap();  // compiled for another device, it would return without having done anything
#endif
}

// ---------------------------------------------------------------- host

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

// False where tensor copies cannot read them: their addresses and strides are multiples of 16 bytes.
bool describe(const std::vector<Expert>& experts, Matrix Expert::* member, Weights* weights) {
  constexpr int64_t kElement = 2, kAlignment = 16, kMaxStride = int64_t{1} << 40,
                    kMaxPlace = int64_t{1} << 31;
  const Matrix& first = experts.front().*member;
  auto address = [](const Matrix& m) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(m.data)); };
  weights->order = first.out_stride == 1 ? WeightOrder::kInOut : WeightOrder::kOutIn;
  if (weights->order == WeightOrder::kOutIn && first.in_stride != 1) return false;
  const int64_t row = kElement * (weights->order == WeightOrder::kInOut ? first.in_stride : first.out_stride);
  int64_t base = address(first), last = base;
  for (const Expert& expert : experts) {
    const Matrix& m = expert.*member;
    if (m.in_stride != first.in_stride || m.out_stride != first.out_stride) return false;
    base = std::min(base, address(m));
    last = std::max(last, address(m));
  }
  int64_t granularity = 0;
  for (const Expert& expert : experts) granularity = std::gcd(granularity, address(expert.*member) - base);
  if (granularity == 0) granularity = kAlignment;  // one expert, or all the same
  if (base % kAlignment != 0 || granularity % kAlignment != 0 || granularity >= kMaxStride) return false;
  if (row <= 0 || row % kAlignment != 0 || row >= kMaxStride) return false;
  if ((last - base) / granularity >= kMaxPlace) return false;
  weights->map = {reinterpret_cast<const char*>(base), granularity};
  weights->row_bytes = row;
  weights->places = (last - base) / granularity + 1;
  return true;
}

bool encode(const Weights& weights, int64_t in, int64_t out, TensorMap* map) {
  const bool in_out = weights.order == WeightOrder::kInOut;
  const uint64_t sizes[3] = {static_cast<uint64_t>(in_out ? out : in),
                             static_cast<uint64_t>(in_out ? in : out), weights.places};
  // Without a second place its distance means nothing, but has to be one that the driver takes.
  const uint64_t strides[2] = {weights.row_bytes, weights.places == 1
                                                      ? weights.row_bytes * sizes[1]
                                                      : static_cast<uint64_t>(weights.map.granularity)};
  static_assert(kDepth == kBlockColumns, "a box is as wide as high, whichever index is contiguous");
  return encode_tensor_map(map, weights.map.base, sizes, strides, kDepth, kBlockColumns);
}

struct GemmWeights {
  Weights first, second;  // gate and up, or down twice
  TensorMap first_map, second_map;
};

bool prepare(Stage stage, const Problem& p, GemmWeights* w) {
  if (stage == Stage::kDown) {
    if (!describe(p.experts, &Expert::down, &w->first)) return false;
    if (!encode(w->first, p.intermediate_size, p.hidden_size, &w->first_map)) return false;
    w->second = w->first;
    w->second_map = w->first_map;
    return true;
  }
  return describe(p.experts, &Expert::gate, &w->first) && describe(p.experts, &Expert::up, &w->second) &&
         w->first.order == w->second.order &&
         encode(w->first, p.hidden_size, p.intermediate_size, &w->first_map) &&
         encode(w->second, p.hidden_size, p.intermediate_size, &w->second_map);
}

int num_multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: the number of multiprocessors is not known: ") +
                             cudaGetErrorString(error));
  }
  return count;
}

template <class T, int kBlockM, Stage kStage, WeightOrder kOrder>
void run(const GroupedGemm& gemm, const GemmWeights& weights, Stream stream) {
  using C = Config<T, kBlockM, kStage, kOrder>;
  // Fits 32 bits: the results of a tile are at least 8 KiB, so more tiles would not fit into any memory.
  const int64_t tiles = gemm.max_tiles * divide_up(gemm.columns, C::kColumns);
  launch("grouped_gemm_sm90", grouped_gemm_kernel<T, kBlockM, kStage, kOrder>,
         std::min<int64_t>(num_multiprocessors(), tiles), C::kThreads, C::kSharedBytes, stream, gemm,
         weights.first_map, weights.second_map, weights.first.map, weights.second.map);
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

bool accepts_sm90(const Problem& p) {
  if (p.experts.empty() || dtype_size(p.dtype) != 2) return false;
  if (p.hidden_size % kChunk != 0 || p.intermediate_size % kChunk != 0) return false;
  if (p.hidden_states_stride % kChunk != 0 || reinterpret_cast<uintptr_t>(p.hidden_states) % 16 != 0)
    return false;
  GemmWeights weights;
  return prepare(Stage::kGateUp, p, &weights) && prepare(Stage::kDown, p, &weights);
}

// With fewer rows per expert than this the weights' way through memory takes longer than the products of 64
// rows, so smaller tiles cost nothing.
int block_m_sm90(const Problem& p, int64_t num_tokens) {
  return num_tokens * p.top_k < 64 * p.num_experts() ? 64 : 128;
}

void grouped_gemm_sm90(Stage stage, const Problem& p, const GroupedGemm& gemm, Stream stream) {
  GemmWeights weights;
  if (!prepare(stage, p, &weights)) {
    throw std::runtime_error("grouped_gemm_sm90: the weights cannot be read by tensor copies");
  }
  if (p.dtype == DType::kBFloat16) {
    run<Bf16>(stage, gemm, weights, stream);
  } else {
    run<Fp16>(stage, gemm, weights, stream);
  }
}

}  // namespace cuda
}  // namespace paddle_moe
