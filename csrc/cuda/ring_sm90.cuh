// What the kernels of Hopper share: a ring of stages in shared memory that one warpgroup fills and the others
// multiply from, 64 rows each, and the way of their sums to global memory.
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx_sm90.cuh"

namespace paddle_moe {
namespace cuda {

constexpr int kWarpgroup = 128;            // threads
constexpr int kDepth = 64;                 // terms per stage
constexpr int kRowBytes = 128;             // the width of the swizzle: 64 elements
constexpr int kAtomBytes = 8 * kRowBytes;  // 8 rows: what the swizzle permutes
constexpr int kBlockColumns = 64;          // of one operand: a block is kDepth x kBlockColumns elements
constexpr int kBlockBytes = kBlockColumns * kRowBytes;
constexpr int kNoLeading = 16;  // bytes; what PTX assumes where a matrix is K-major
constexpr int kTermsPerWgmma = 16;
constexpr int kChunk = 8;  // elements in 16 bytes

// Registers are shared out again after the start: the loads need few, the sums many. Together they are what
// __launch_bounds__ grants for 3 warpgroups, 168 x 3.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / (3 * kWarpgroup) / 8 * 8),
              "a consumer would wait for registers that nobody gives back");

struct Stages {
  unsigned char* a;
  unsigned char* b;
  unsigned char* staging;
  Mbarrier* full;
  Mbarrier* empty;
};

// Config: kStages, of kABytes and kBBytes; kStagingBytes; kConsumers, warpgroups.
template <class Config>
constexpr int ring_bytes() {
  constexpr int kBarriers = 2 * Config::kStages * static_cast<int>(sizeof(Mbarrier));
  constexpr int kBytes =
      Config::kStages * (Config::kABytes + Config::kBBytes) + Config::kStagingBytes + kBarriers;
  static_assert(kBytes <= 227 * 1024, "more shared memory than a block may have");
  static_assert(Config::kStagingBytes % 8 == 0, "the barriers behind it are 8-byte aligned");
  return kBytes;
}

// By all threads. A stage is full after one arrival of each thread of the producer and `extra` others.
template <class Config>
__device__ Stages make_ring(int extra) {
  Stages stages;
  stages.a = static_cast<unsigned char*>(shared_memory());
  stages.b = stages.a + Config::kStages * Config::kABytes;
  stages.staging = stages.b + Config::kStages * Config::kBBytes;
  stages.full = reinterpret_cast<Mbarrier*>(stages.staging + Config::kStagingBytes);
  stages.empty = stages.full + Config::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      mbarrier_init(&stages.full[i], kWarpgroup + extra);
      mbarrier_init(&stages.empty[i], 4 * Config::kConsumers);  // each warp of the consumers
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  return stages;
}

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

// Byte offset of a chunk of a swizzled array of rows: the 16-byte chunks of a row change places.
__device__ inline int swizzled_chunk(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Where sum i of a thread lies among the 16 rows of its warp and the columns of its tile.
__device__ constexpr int sum_row(int i) { return i % 4 / 2 * 8; }         // + lane / 4
__device__ constexpr int sum_column(int i) { return i / 4 * 8 + i % 2; }  // + 2 (lane % 4)

// The products of the next `steps` stages, at least one. An operand that is MN-major lies in blocks of rows
// that hold one term of 64 of its rows or columns each, one that is K-major in rows of 64 terms.
template <class Config, class T, bool kMnMajorA, bool kMnMajorB>
__device__ void multiply(const Stages& stages, int consumer, int32_t steps, Ring<Config::kStages>* ring,
                         float (&sum)[Config::kSums]) {
  const bool signals = threadIdx.x % kWarpSize == 0;
  int previous = 0;
  // One copy of the loop: where the sums come out of several, ptxas moves them in between, and waits for each
  // wgmma (C7520).
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    mbarrier_wait(&stages.full[ring->stage], ring->phase);
    // cp.async writes as ordinary stores do; the barrier has made what it wrote visible to this thread, the
    // fence makes it visible to its wgmma.
    fence_shared_for_wgmma();
    const uint64_t a = wgmma_matrix(stages.a + ring->stage * Config::kABytes + consumer * 64 * kRowBytes,
                                    kMnMajorA ? kBlockBytes : kNoLeading, kAtomBytes);
    const uint64_t b = wgmma_matrix(stages.b + ring->stage * Config::kBBytes,
                                    kMnMajorB ? kBlockBytes : kNoLeading, kAtomBytes);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kDepth / kTermsPerWgmma; ++i) {
      constexpr int kStepK = kTermsPerWgmma * 2, kStepMn = kTermsPerWgmma * kRowBytes;
      wgmma<T, kMnMajorA, kMnMajorB>(sum, wgmma_advance(a, i * (kMnMajorA ? kStepMn : kStepK)),
                                     wgmma_advance(b, i * (kMnMajorB ? kStepMn : kStepK)), step > 0 || i > 0);
    }
    wgmma_commit();
    if (step > 0) {
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

// The same steps through the ring without products, for a warpgroup that has no row of the tile. Every lane
// waits for every stage: one left behind by two phases would take the parity of the next for its own.
template <class Config>
__device__ void pass(const Stages& stages, int32_t steps, Ring<Config::kStages>* ring) {
  for (int32_t step = 0; step < steps; ++step, ring->advance()) {
    mbarrier_wait(&stages.full[ring->stage], ring->phase);
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(&stages.empty[ring->stage]);
  }
}

template <class T>
__device__ uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

// By one warp: 16 rows x kBlockColumns, value[first ...] of its threads in the order of sums, rounded to T.
// They go through `staging`, 2 KiB of the warp's own, so that whole lines are written. row_of(row) is where
// row 0 to 15 begins, null where it is not there; only the first `columns` are.
template <class T, int kValues, class RowOf>
__device__ __forceinline__ void store_block(unsigned char* staging, const float (&value)[kValues], int first,
                                            int64_t columns, RowOf row_of) {
  int lane = threadIdx.x % kWarpSize;
  pin(lane);  // addresses that a caller's blocks have in common take registers that the sums need
#pragma unroll
  for (int i = 0; i < kBlockColumns / 2; i += 8) {
    uint32_t matrix[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      matrix[j] = pack<T>(value[first + i + 2 * j], value[first + i + 2 * j + 1]);
    }
    stmatrix(staging + swizzled_chunk(lane % 16, i / 4 + lane / 16), matrix);
  }
  __syncwarp();
  constexpr int kChunks = kBlockColumns / kChunk;  // per row
#pragma unroll
  for (int i = 0; i < 16 * kChunks / kWarpSize; ++i) {
    const int row = (i * kWarpSize + lane) / kChunks, chunk = lane % kChunks;
    T* out = row_of(row);
    if (out != nullptr && chunk * kChunk < columns) {
      *reinterpret_cast<uint4*>(out + chunk * kChunk) =
          *reinterpret_cast<const uint4*>(staging + swizzled_chunk(row, chunk));
    }
  }
  __syncwarp();
}

}  // namespace cuda
}  // namespace paddle_moe
