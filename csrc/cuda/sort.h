// Stage 1 of mixture_of_experts: slots (token, k) in the order of their experts.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/grouped_gemm.h"
#include "moe.h"

namespace paddle_moe {
namespace cuda {

// A chunk of slots, and where what is found out about them goes. Everything points to device memory.
struct Sort {
  const void* routing_table = nullptr;  // [num_slots] of int32 or int64, global expert ids
  DType routing_table_dtype = DType::kUnknown;
  int64_t first_expert = 0;
  int32_t num_experts = 0;
  int32_t num_slots = 0;
  int32_t block_m = 0;

  int32_t* local_expert = nullptr;  // [num_slots], -1: not an expert of this shard
  int32_t* position = nullptr;      // [num_slots], the slot's row in expert order, or -1
  int32_t* row_slot = nullptr;      // [rows], the slot of each row
  int32_t* expert_rows = nullptr;   // [num_experts], how many rows each expert has
  int32_t* first_row = nullptr;     // [num_experts], of each expert
  Tile* tiles = nullptr;            // [max_tiles(...)]
  int32_t* num_tiles = nullptr;     // [1]
  Expert* experts = nullptr;        // [num_experts]
  int32_t* counts = nullptr;        // scratch, sort_scratch(...) of them
};

// More tiles than this cannot come of num_slots slots, however they are spread over the experts.
constexpr int64_t max_tiles(int64_t num_slots, int64_t num_experts, int64_t block_m) {
  return num_slots / block_m + (num_experts < num_slots ? num_experts : num_slots);
}

// Enough for num_slots slots or fewer.
int64_t sort_scratch(int64_t num_slots, int64_t num_experts);

// Stable: slots of one expert keep their order. One launch for up to kSlotsOfOneBlock slots, else three.
// `experts`, on the host, is copied into the table `sort.experts` through kernel parameters.
constexpr int64_t kSlotsOfOneBlock = 8192;
void sort_slots(const Sort& sort, const std::vector<Expert>& experts, Stream stream);

// route() and sort_slots() in one launch, of at most kSlotsOfOneBlock slots: sort.routing_table, of int32,
// and router_weights are written first. *blocks_done has to be 0.
void route_and_sort_slots(const RouteProblem& route, float* router_weights, uint32_t* blocks_done,
                          const Sort& sort, const std::vector<Expert>& experts, Stream stream);

// Copies `experts` from the host into a table in device memory, through kernel parameters too.
void store_experts(const std::vector<Expert>& experts, Expert* table, Stream stream);

}  // namespace cuda
}  // namespace paddle_moe
