// Stage 4 of mixture_of_experts: each token gathers its rows and sums them, weighted, in the order of k.
#pragma once

#include <cstdint>

#include "moe.h"

namespace paddle_moe {
namespace cuda {

// A chunk of tokens. Everything points to device memory.
struct Combine {
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int32_t top_k = 0;
  const float* rows = nullptr;            // in expert order
  int64_t rows_stride = 0;                // a multiple of 4
  const int32_t* position = nullptr;      // [num_tokens, top_k], the slot's row or -1
  const int32_t* local_expert = nullptr;  // [num_tokens, top_k]
  const void* router_weights = nullptr;   // [num_tokens, top_k]; null: all are 1
  DType router_weights_dtype = DType::kUnknown;
  const Expert* experts = nullptr;  // for down_bias; null: there is none
  DType bias_dtype = DType::kUnknown;
  void* out = nullptr;  // [num_tokens, hidden_size]
};

void combine(const Combine& combine, DType dtype, Stream stream);

}  // namespace cuda
}  // namespace paddle_moe
