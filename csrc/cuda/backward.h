// Stages of the backward of mixture_of_experts; moe_backward.cu puts them together. Slot t * K + k is (token
// t, k). What the sums over all tokens need lies in the order of the slots, whichever chunk a token belongs
// to.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/ptx.cuh"
#include "moe.h"

namespace paddle_moe {
namespace cuda {

// The activation backwards, and the gradient of the router weights. Everything points to device memory.
struct ActivationBackward {
  int32_t num_slots = 0, top_k = 0;  // of a chunk
  int64_t intermediate_size = 0, hidden_size = 0;
  const int32_t* position = nullptr;      // [num_slots], the slot's row or -1
  const int32_t* local_expert = nullptr;  // [num_slots]
  const void* pre_activations = nullptr;  // [num_slots, 2 * intermediate_size], gate | up
  const float* intermediate_grad =
      nullptr;  // rows, before the router weight; null: neither result needs them
  int64_t intermediate_grad_stride = 0;
  const void* router_weights = nullptr;  // [num_slots]
  DType router_weights_dtype = DType::kUnknown;
  ActivationSpec activation;

  // For the part of a router weight's gradient that down_bias has.
  const void* grad_out = nullptr;
  int64_t grad_out_stride = 0;
  const Expert* experts = nullptr;  // null: there is no bias
  DType bias_dtype = DType::kUnknown;

  // Each null where it is not wanted. Of the dtype; rows of slots without a local expert are not written.
  void* gate_up_grad =
      nullptr;  // [num_slots, 2 * intermediate_size], weighted; may be pre_activations itself
  void* weighted_intermediate = nullptr;     // [num_slots, intermediate_size]
  int64_t weighted_intermediate_stride = 0;  // elements
  void* router_weights_grad = nullptr;       // [num_slots] of router_weights_dtype
};

void activation_backward(const ActivationBackward& task, DType dtype, Stream stream);

// One operand of a weight's gradient: the row of slot s is row s / slots_per_row of `data`.
struct OperandRows {
  const void* data = nullptr;
  int64_t stride = 0;  // elements
  int32_t slots_per_row = 1;
};

enum class Weight { kGate, kUp, kDown };

__host__ __device__ inline const Matrix& gradient_of(const Expert& expert, Weight weight) {
  return weight == Weight::kGate ? expert.gate : weight == Weight::kUp ? expert.up : expert.down;
}

// For every expert, gradient = left^T x right over the rows of the expert; zeros without rows.
struct WeightGradient {
  Weight weight = Weight::kGate;
  OperandRows left, right;
  int64_t in_features = 0, out_features = 0;  // columns of left and of right
  int32_t num_experts = 0;
  const int32_t* row_slot = nullptr;     // [rows], the slot of each row in the order of the experts
  const int32_t* first_row = nullptr;    // [num_experts]
  const int32_t* expert_rows = nullptr;  // [num_experts]
  const Expert* gradients = nullptr;     // [num_experts]; matrices without data are left out
};

// On every device, any strides.
void weight_gradient(const WeightGradient& task, DType dtype, Stream stream);

// bf16 and fp16 on devices 90; false, with nothing done, where rows or gradients are not aligned for it.
// gradients: as in the task, on the host.
bool weight_gradient_sm90(WeightGradient task, const std::vector<Expert>& gradients, DType dtype,
                          Stream stream);

// For every expert, bias gradient = sum over its rows of weight x row.
struct BiasGradient {
  Weight of = Weight::kGate;
  OperandRows rows;
  int64_t columns = 0;
  const void* row_weights = nullptr;  // [slots]; null: all are 1
  DType row_weights_dtype = DType::kUnknown;
  int32_t num_experts = 0;
  const int32_t* row_slot = nullptr;
  const int32_t* first_row = nullptr;
  const int32_t* expert_rows = nullptr;
  const Expert* gradients = nullptr;  // biases without data are left out
  DType bias_dtype = DType::kUnknown;
};

void bias_gradient(const BiasGradient& task, DType dtype, Stream stream);

}  // namespace cuda
}  // namespace paddle_moe
