// The grouped GEMM as the stages see it: what moe.cu hands to the implementation that the device gets.
//
//   gate_up  intermediate[r, i] = act(x[r] . gate_e[:, i] + gate_bias, x[r] . up_e[:, i] + up_bias)
//   down     rows[r, h] = intermediate[r] . down_e[:, h], in fp32; also the GEMMs of the backward by rows,
//   where
//            `down` and `up` stand for other matrices of the expert
//
// Row r belongs to the r-th slot (token, k) in expert order.
#pragma once

#include <cstdint>

#include "moe.h"

namespace paddle_moe {
namespace cuda {

// At most block_m consecutive rows of one expert. The sort writes the tiles in the order of the rows.
struct Tile {
  int32_t expert;  // local
  int32_t first_row;
  int32_t num_rows;
};

// Everything points to device memory. Passed to kernels by value.
struct GroupedGemm {
  int64_t depth = 0;    // terms of each sum, or of each of its parts: H for gate_up, I for down
  int64_t columns = 0;  // of the result: I for gate_up, H for down
  // down: with 2 parts a row of `a` has 2 * depth terms, and the second half multiplies `up`.
  int32_t parts = 1;

  const void* a = nullptr;  // hidden_states, or the intermediate
  int64_t a_stride = 0;     // elements
  // Row r multiplies the row row_slot[r] / top_k of `a`; null, for down alone: row r of `a` itself.
  const int32_t* row_slot = nullptr;
  int32_t top_k = 1;

  const Expert* experts = nullptr;
  const Tile* tiles = nullptr;
  const int32_t* num_tiles = nullptr;
  int64_t max_tiles = 0;  // known on the host: *num_tiles is at most this
  int32_t block_m = 0;    // of the tiles

  // gate_up: the intermediate in the dtype of `a`, or null for pre_activations alone; columns past `columns`
  // up to out_stride are never read. down: fp32 rows.
  void* out = nullptr;
  int64_t out_stride = 0;  // elements; rows begin at multiples of 16 bytes

  ActivationSpec activation;           // gate_up
  DType bias_dtype = DType::kUnknown;  // gate_up; fp32 or the dtype of `a`
  uint32_t* amax = nullptr;  // gate_up; bits of |fp32| per local expert, raised by atomicMax, or null
  // gate_up: gate and up with their biases for the backward, in the dtype of `a`; row row_slot[r] of
  // [slots, 2 * columns]. Or null. On sm_90 aligned to 16 bytes.
  void* pre_activations = nullptr;
};

enum class Stage { kGateUp, kDown };

// What every implementation offers. block_m: rows of the tiles that it wants for this problem, from
// num_tokens, top_k and the sizes alone: never from the routing, which only the device knows.

// bf16 and fp16, any strides and alignment; devices from 80 up.
int block_m_sm80(const Problem& problem, int64_t num_tokens);
void grouped_gemm_sm80(Stage stage, const Problem& problem, const GroupedGemm& gemm, Stream stream);

// bf16 and fp16 on devices 90 that have wgmma and TMA. accepts: the weights and rows are aligned for TMA.
bool accepts_sm90(const Problem& problem);
int block_m_sm90(const Problem& problem, int64_t num_tokens);
void grouped_gemm_sm90(Stage stage, const Problem& problem, const GroupedGemm& gemm, Stream stream);

// fp32 by multiply-adds, any strides; every device.
int block_m_fp32(const Problem& problem, int64_t num_tokens);
void grouped_gemm_fp32(Stage stage, const Problem& problem, const GroupedGemm& gemm, Stream stream);

}  // namespace cuda
}  // namespace paddle_moe
