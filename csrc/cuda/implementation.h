// Which grouped GEMM a problem gets, and what else the forward and the backward of mixture_of_experts share
// on the host.
#pragma once

#include "chunks.h"
#include "cuda/common.cuh"
#include "cuda/grouped_gemm.h"
#include "cuda/sort.h"

namespace paddle_moe {
namespace cuda {

constexpr int64_t kMinBlockM = 16;                 // of all implementations
constexpr int64_t kChunkBytes = int64_t{4} << 30;  // of rows, where chunk_size is left to us

inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// The implementation of the grouped GEMM that a problem gets on the current device.
struct Implementation {
  int (*block_m)(const Problem&, int64_t);
  void (*run)(Stage, const Problem&, const GroupedGemm&, Stream);
};

// rows: the address of other rows that it reads or writes, which begin at multiples of `stride` elements.
inline Implementation choose_implementation(const Problem& p, const void* rows, int64_t stride) {
  if (p.dtype == DType::kFloat32) return {block_m_fp32, grouped_gemm_fp32};
  const int capability = compute_capability();
  if (capability < 80) {
    throw std::runtime_error("mixture_of_experts in " + std::string(dtype_name(p.dtype)) +
                             " needs a GPU of compute capability 8.0 or higher, got " +
                             std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
#ifndef PADDLE_MOE_NO_SM90A  // not compiled for it
  if (capability == 90 && is_aligned(rows, stride) && accepts_sm90(p))
    return {block_m_sm90, grouped_gemm_sm90};
#endif
  return {block_m_sm80, grouped_gemm_sm80};
}

inline const void* advance(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * static_cast<int64_t>(dtype_size(dtype));
}

inline void* advance(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * static_cast<int64_t>(dtype_size(dtype));
}

// With arrays from the arena for chunks of up to max_slots slots; the rest is for of_chunk().
inline Sort take_sort(const Problem& p, int64_t max_slots, int block_m, Arena* arena) {
  const int64_t experts = p.num_experts();
  Sort sort;
  sort.routing_table_dtype = p.routing_table_dtype;
  sort.first_expert = p.first_expert;
  sort.num_experts = static_cast<int32_t>(experts);
  sort.block_m = block_m;
  sort.local_expert = arena->take<int32_t>(max_slots);
  sort.position = arena->take<int32_t>(max_slots);
  sort.row_slot = arena->take<int32_t>(max_slots);
  sort.expert_rows = arena->take<int32_t>(experts);
  sort.first_row = arena->take<int32_t>(experts);
  // For any implementation: the size of the workspace must not depend on the alignment of the arrays.
  sort.tiles = arena->take<Tile>(max_tiles(max_slots, experts, kMinBlockM));
  sort.num_tiles = arena->take<int32_t>(1);
  sort.experts = arena->take<Expert>(experts);
  sort.counts = arena->take<int32_t>(sort_scratch(max_slots, experts));
  return sort;
}

inline Sort of_chunk(Sort sort, const Problem& p, int64_t first_token, int64_t num_tokens) {
  sort.routing_table = advance(p.routing_table, first_token * p.top_k, p.routing_table_dtype);
  sort.num_slots = static_cast<int32_t>(num_tokens * p.top_k);
  return sort;
}

// The rows of a chunk times matrices of a table of experts: which ones, of what, is left to the caller.
inline GroupedGemm gemm_of(const Sort& chunk, const Expert* table) {
  GroupedGemm gemm;
  gemm.row_slot = chunk.row_slot;
  gemm.experts = table;
  gemm.tiles = chunk.tiles;
  gemm.num_tiles = chunk.num_tiles;
  gemm.max_tiles = max_tiles(chunk.num_slots, chunk.num_experts, chunk.block_m);
  gemm.block_m = chunk.block_m;
  return gemm;
}

// The first GEMM; what becomes of gate and up is left to the caller.
inline GroupedGemm gate_up_gemm(const Problem& p, const Sort& chunk, int64_t first_token) {
  GroupedGemm gemm = gemm_of(chunk, chunk.experts);
  gemm.depth = p.hidden_size;
  gemm.columns = p.intermediate_size;
  gemm.a = advance(p.hidden_states, first_token * p.hidden_states_stride, p.dtype);
  gemm.a_stride = p.hidden_states_stride;
  gemm.top_k = static_cast<int32_t>(p.top_k);
  gemm.bias_dtype = p.bias_dtype;
  return gemm;
}

}  // namespace cuda
}  // namespace paddle_moe
