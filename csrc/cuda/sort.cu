// A stable counting sort of slots by expert. The slots are cut into ranges, one warp for each:
//
//   count   the slots of each expert in each range
//   scan    per expert over the ranges: where each range begins within the expert
//   place   over the experts: where each expert begins; the position of each slot; the tiles of the GEMMs
//
// Nothing depends on the order in which warps run, so neither do the positions.
#include <algorithm>
#include <type_traits>

#include "cuda/router.cuh"
#include "cuda/sort.h"

namespace paddle_moe {
namespace cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMinRange = 256;
constexpr int64_t kMaxRanges = 512;  // bounds the counts, and the work of the scan

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kManyExperts = 36;
constexpr size_t kParameterBytes = 4096;  // that all parameters of a kernel may take
#else
constexpr int kManyExperts = 320;
constexpr size_t kParameterBytes = 32764;
#endif
constexpr int kFewExperts = 32, kSomeExperts = kManyExperts < 128 ? kManyExperts : 128;

template <int kCapacity>
struct ExpertBatch {
  int32_t first = 0, count = 0;
  alignas(16) Expert experts[kCapacity];
};
static_assert(sizeof(ExpertBatch<kManyExperts>) + sizeof(Sort) + sizeof(RouteProblem) + 64 <= kParameterBytes,
              "the limit of kernel parameters");

int64_t range_size(int64_t num_slots) {
  const int64_t ranges = num_slots <= kSlotsOfOneBlock ? kWarps : kMaxRanges;
  const int64_t least = num_slots <= kSlotsOfOneBlock ? kWarpSize : kMinRange;
  return std::max(least, round_up(divide_up(num_slots, ranges), kWarpSize));
}

int64_t num_ranges(int64_t num_slots) { return divide_up(num_slots, range_size(num_slots)); }

__device__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }

template <int kCapacity>
__device__ void store(const ExpertBatch<kCapacity>& batch, Expert* experts) {
  constexpr int kPieces = sizeof(Expert) / sizeof(uint4);
  static_assert(sizeof(Expert) % sizeof(uint4) == 0, "copied in whole pieces");
  const auto* from = forget_origin(reinterpret_cast<const uint4*>(batch.experts));
  auto* to = reinterpret_cast<uint4*>(experts + batch.first);
  for (int i = threadIdx.x; i < batch.count * kPieces; i += blockDim.x) to[i] = from[i];
}

__device__ int local_expert(const Sort& s, int slot) {
  const int64_t id = s.routing_table_dtype == DType::kInt64
                         ? static_cast<const int64_t*>(s.routing_table)[slot]
                         : static_cast<const int32_t*>(s.routing_table)[slot];
  const bool local = id >= s.first_expert && id - s.first_expert < s.num_experts;
  return local ? static_cast<int>(id - s.first_expert) : -1;
}

// Calls body(slot, expert, earlier, peers) for 32 slots of the warp's range at a time: `peers` of them go to
// the same expert, `earlier` of those come first. Slots past the end have the expert -1.
template <class Body>
__device__ void for_each_slot(const Sort& s, int range, int range_size, Body body) {
  const int end = min(s.num_slots, (range + 1) * range_size);
  for (int first = range * range_size; first < end; first += kWarpSize) {
    const int slot = first + lane_index();
    const int expert = slot < end ? local_expert(s, slot) : -1;
    const uint32_t peers = __match_any_sync(kFullWarp, expert);
    const uint32_t lower_lanes = (1u << lane_index()) - 1;
    body(slot, expert, __popc(peers & lower_lanes), __popc(peers));
    __syncwarp();  // the counter that one lane wrote may be another lane's in the next round
  }
}

__device__ void count(const Sort& s, int range, int range_size) {
  int32_t* counts = s.counts + static_cast<int64_t>(range) * s.num_experts;
  for (int e = lane_index(); e < s.num_experts; e += kWarpSize) counts[e] = 0;
  __syncwarp();
  for_each_slot(s, range, range_size, [&](int slot, int expert, int earlier, int peers) {
    if (slot < s.num_slots) s.local_expert[slot] = expert;
    if (expert >= 0 && earlier == 0) counts[expert] += peers;
  });
}

// 32 experts, one per lane; each warp takes a part of the ranges. Leaves in counts where each range begins
// and in expert_rows[e] the number of the expert's rows.
__device__ void scan_ranges(const Sort& s, int first_expert, int ranges, int32_t (*sums)[kWarpSize]) {
  const int expert = first_expert + lane_index();
  const int part = (ranges + kWarps - 1) / kWarps;
  const int first = min(ranges, warp_index() * part), end = min(ranges, first + part);
  int32_t* counts = s.counts + expert;
  int32_t sum = 0;
  if (expert < s.num_experts) {
    for (int r = first; r < end; ++r) sum += counts[static_cast<int64_t>(r) * s.num_experts];
  }
  sums[warp_index()][lane_index()] = sum;
  __syncthreads();
  if (expert < s.num_experts) {
    int32_t before = 0;
    for (int w = 0; w < warp_index(); ++w) before += sums[w][lane_index()];
    for (int r = first; r < end; ++r) {
      int32_t* count = counts + static_cast<int64_t>(r) * s.num_experts;
      const int32_t rows = *count;
      *count = before;
      before += rows;
    }
    if (warp_index() == kWarps - 1) s.expert_rows[expert] = before;
  }
  __syncthreads();
}

// The same for few ranges, an expert per thread: several counts are on their way at once.
__device__ void scan_few_ranges(const Sort& s, int ranges) {
  constexpr int kAtOnce = 8;
  for (int e = threadIdx.x; e < s.num_experts; e += kThreads) {
    int32_t before = 0;
    for (int first = 0; first < ranges; first += kAtOnce) {
      int32_t* counts = s.counts + static_cast<int64_t>(first) * s.num_experts + e;
      int32_t rows[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) rows[r] = first + r < ranges ? counts[r * s.num_experts] : 0;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (first + r < ranges) counts[r * s.num_experts] = before;
        before += rows[r];
      }
    }
    s.expert_rows[e] = before;
  }
  __syncthreads();
}

// The sum of `value` over the threads before this one; *total over all of them.
__device__ int32_t sum_before(int32_t value, int32_t* sums, int32_t* total) {
  int32_t inclusive = value;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t other = __shfl_up_sync(kFullWarp, inclusive, distance);
    if (lane_index() >= distance) inclusive += other;
  }
  if (lane_index() == kWarpSize - 1) sums[warp_index()] = inclusive;
  __syncthreads();
  int32_t before = inclusive - value;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_index()) before += sums[w];
    *total += sums[w];
  }
  __syncthreads();
  return before;
}

// What every block of `place` works out for itself, in shared memory.
struct Begins {
  int32_t sums[kWarps];
  int32_t num_rows, num_tiles;
  int32_t rows[1];  // [2 * num_experts]: first row, then first tile of each expert
  static size_t bytes(int64_t num_experts) { return sizeof(Begins) + 2 * sizeof(int32_t) * num_experts; }
};

__device__ int tiles_of(int rows, int block_m) { return (rows + block_m - 1) / block_m; }

// rows_of: the number of rows of each expert, [num_experts].
__device__ void scan_experts(const Sort& s, const int32_t* rows_of, Begins& begins) {
  const int part = (s.num_experts + kThreads - 1) / kThreads;
  const int first = min(s.num_experts, static_cast<int>(threadIdx.x) * part);
  const int end = min(s.num_experts, first + part);
  int32_t rows = 0, tiles = 0;
  for (int e = first; e < end; ++e) {
    rows += rows_of[e];
    tiles += tiles_of(rows_of[e], s.block_m);
  }
  rows = sum_before(rows, begins.sums, &begins.num_rows);
  tiles = sum_before(tiles, begins.sums, &begins.num_tiles);
  for (int e = first; e < end; ++e) {
    begins.rows[e] = rows;
    begins.rows[s.num_experts + e] = tiles;
    rows += rows_of[e];
    tiles += tiles_of(rows_of[e], s.block_m);
  }
  __syncthreads();
}

__device__ void write_tiles(const Sort& s, const Begins& begins) {
  const int32_t* first_tile = begins.rows + s.num_experts;
  for (int i = threadIdx.x; i < begins.num_tiles; i += kThreads) {
    int low = 0, high = s.num_experts - 1;  // the last expert whose first tile is not behind tile i
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_tile[middle] <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int end = low + 1 < s.num_experts ? begins.rows[low + 1] : begins.num_rows;
    const int row = begins.rows[low] + (i - first_tile[low]) * s.block_m;
    s.tiles[i] = {low, row, min(s.block_m, end - row)};
  }
  for (int e = threadIdx.x; e < s.num_experts; e += kThreads) s.first_row[e] = begins.rows[e];
  if (threadIdx.x == 0) *s.num_tiles = begins.num_tiles;
}

__device__ void place(const Sort& s, int range, int range_size, const Begins& begins) {
  int32_t* counts = s.counts + static_cast<int64_t>(range) * s.num_experts;
  for_each_slot(s, range, range_size, [&](int slot, int expert, int earlier, int peers) {
    const int32_t before = expert < 0 ? 0 : counts[expert];
    __syncwarp();
    if (expert >= 0 && earlier == 0) counts[expert] = before + peers;
    if (slot >= s.num_slots) return;
    const int32_t position = expert < 0 ? -1 : begins.rows[expert] + before + earlier;
    s.position[slot] = position;
    if (position >= 0) s.row_slot[position] = slot;
  });
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 1)
    store_batch(const __grid_constant__ ExpertBatch<kCapacity> batch, Expert* experts) {
  store(batch, experts);
}

template <int kCapacity>
__device__ void sort(const Sort& s, const ExpertBatch<kCapacity>& batch, int ranges, int range_size) {
  auto& begins = *static_cast<Begins*>(shared_memory());
  if (warp_index() < ranges) count(s, warp_index(), range_size);
  __syncthreads();
  scan_few_ranges(s, ranges);
  scan_experts(s, s.expert_rows, begins);
  write_tiles(s, begins);
  if (warp_index() < ranges) place(s, warp_index(), range_size, begins);
  store(batch, s.experts);  // last: only later kernels read it
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 1)
    sort_in_one_block(const __grid_constant__ Sort s, const __grid_constant__ ExpertBatch<kCapacity> batch,
                      int ranges, int range_size) {
  sort(s, batch, ranges, range_size);
}

// By all threads of a block, true in the block that comes last: what all blocks wrote before is visible to it
// then. *blocks_done is 0 before the launch. The barriers extend thread 0's fences to its block, as those of
// a grid barrier do.
__device__ bool is_last_block(uint32_t* blocks_done) {
  bool last = gridDim.x == 1;
  __syncthreads();
  if (threadIdx.x == 0 && !last) {
    __threadfence();
    last = atomicAdd(blocks_done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  return __syncthreads_or(last);
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 1)
    route_then_sort(const __grid_constant__ RouteProblem route, int routing_warps, float* router_weights,
                    uint32_t* blocks_done, const __grid_constant__ Sort s,
                    const __grid_constant__ ExpertBatch<kCapacity> batch, int ranges, int range_size) {
  route_by_warps(route, routing_warps, static_cast<int32_t*>(const_cast<void*>(s.routing_table)),
                 router_weights);
  if (is_last_block(blocks_done)) sort(s, batch, ranges, range_size);
}

__global__ void __launch_bounds__(kThreads, 1)
    count_slots(const __grid_constant__ Sort s, const __grid_constant__ ExpertBatch<kManyExperts> batch,
                int ranges, int range_size) {
  const int range = blockIdx.x * kWarps + warp_index();
  if (range < ranges) count(s, range, range_size);
  if (blockIdx.x == 0) store(batch, s.experts);
}

__global__ void __launch_bounds__(kThreads, 1) scan_counts(const __grid_constant__ Sort s, int ranges) {
  scan_ranges(s, blockIdx.x * kWarpSize, ranges, static_cast<int32_t (*)[kWarpSize]>(shared_memory()));
}

__global__ void __launch_bounds__(kThreads, 1)
    place_slots(const __grid_constant__ Sort s, int ranges, int range_size) {
  auto& begins = *static_cast<Begins*>(shared_memory());
  scan_experts(s, s.expert_rows, begins);
  if (blockIdx.x == 0) write_tiles(s, begins);
  const int range = blockIdx.x * kWarps + warp_index();
  if (range < ranges) place(s, range, range_size, begins);
}

template <int kCapacity>
ExpertBatch<kCapacity> batch_of(const std::vector<Expert>& experts, size_t first) {
  ExpertBatch<kCapacity> batch;
  batch.first = static_cast<int32_t>(first);
  batch.count = static_cast<int32_t>(std::min<size_t>(kCapacity, experts.size() - first));
  std::copy_n(experts.begin() + first, batch.count, batch.experts);
  return batch;
}

template <int kCapacity>
void sort_few(const Sort& s, const std::vector<Expert>& experts, int ranges, int range_size, Stream stream) {
  launch("sort_in_one_block", sort_in_one_block<kCapacity>, 1, kThreads, Begins::bytes(s.num_experts), stream,
         s, batch_of<kCapacity>(experts, 0), ranges, range_size);
}

template <int kCapacity>
void route_then_sort_few(const RouteProblem& route, float* router_weights, uint32_t* blocks_done,
                         const Sort& s, const std::vector<Expert>& experts, Stream stream) {
  const RouteBlocks grid(route, kWarps);
  launch("route_then_sort", route_then_sort<kCapacity>, grid.blocks, kThreads,
         std::max(grid.shared_bytes, Begins::bytes(s.num_experts)), stream, route, grid.warps, router_weights,
         blocks_done, s, batch_of<kCapacity>(experts, 0), static_cast<int>(num_ranges(s.num_slots)),
         static_cast<int>(range_size(s.num_slots)));
}

// Calls body with the capacity, as a constant, of the smallest batch that takes so many.
template <class Body>
void with_capacity(size_t num_experts, Body body) {
  if (num_experts <= kFewExperts) return body(std::integral_constant<int, kFewExperts>{});
  if (num_experts <= kSomeExperts) return body(std::integral_constant<int, kSomeExperts>{});
  body(std::integral_constant<int, kManyExperts>{});
}

void store_experts_from(size_t first, const std::vector<Expert>& experts, Expert* table, Stream stream) {
  for (size_t e = first; e < experts.size(); e += kManyExperts) {
    launch("store_experts", store_batch<kManyExperts>, 1, kThreads, 0, stream,
           batch_of<kManyExperts>(experts, e), table);
  }
}

}  // namespace

void store_experts(const std::vector<Expert>& experts, Expert* table, Stream stream) {
  store_experts_from(0, experts, table, stream);
}

int64_t sort_scratch(int64_t num_slots, int64_t num_experts) {
  return std::clamp<int64_t>(divide_up(num_slots, kMinRange), kWarps, kMaxRanges) * num_experts;
}

void sort_slots(const Sort& s, const std::vector<Expert>& experts, Stream stream) {
  const int size = static_cast<int>(range_size(s.num_slots));
  const int ranges = static_cast<int>(num_ranges(s.num_slots));
  store_experts_from(kManyExperts, experts, s.experts, stream);
  if (s.num_slots <= kSlotsOfOneBlock) {
    return with_capacity(experts.size(), [&](auto capacity) {
      sort_few<decltype(capacity)::value>(s, experts, ranges, size, stream);
    });
  }
  const int64_t blocks = divide_up(ranges, kWarps);
  launch("count_slots", count_slots, blocks, kThreads, 0, stream, s, batch_of<kManyExperts>(experts, 0),
         ranges, size);
  launch("scan_counts", scan_counts, divide_up(s.num_experts, kWarpSize), kThreads,
         kWarps * kWarpSize * sizeof(int32_t), stream, s, ranges);
  launch("place_slots", place_slots, blocks, kThreads, Begins::bytes(s.num_experts), stream, s, ranges, size);
}

void route_and_sort_slots(const RouteProblem& route, float* router_weights, uint32_t* blocks_done,
                          const Sort& s, const std::vector<Expert>& experts, Stream stream) {
  store_experts_from(kManyExperts, experts, s.experts, stream);
  with_capacity(experts.size(), [&](auto capacity) {
    route_then_sort_few<decltype(capacity)::value>(route, router_weights, blocks_done, s, experts, stream);
  });
}

}  // namespace cuda
}  // namespace paddle_moe
