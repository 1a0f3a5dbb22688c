// One warp per slot. A row's gradients depend on nothing but the row, and the router weight's gradient is
// summed in an order that its length alone decides.
#include "cuda/activation.cuh"
#include "cuda/backward.h"

namespace paddle_moe {
namespace cuda {
namespace {

constexpr int kWarps = 8;

template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    activation_backward_rows(const __grid_constant__ ActivationBackward p, bool aligned) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (slot >= p.num_slots) return;
  const int64_t row = p.position[slot];
  float sum = 0.0f;
  if (row >= 0) {
    const float weight = load_as_float(p.router_weights, slot, p.router_weights_dtype);
    const T* gates = static_cast<const T*>(p.pre_activations) + slot * 2 * p.intermediate_size;
    const T* ups = gates + p.intermediate_size;
    const float* grads =
        p.intermediate_grad == nullptr ? nullptr : p.intermediate_grad + row * p.intermediate_grad_stride;
    T* gate_grads = static_cast<T*>(p.gate_up_grad) + slot * 2 * p.intermediate_size;
    T* up_grads = gate_grads + p.intermediate_size;
    T* intermediate = static_cast<T*>(p.weighted_intermediate) + slot * p.weighted_intermediate_stride;
    constexpr int kColumns = kColumnsOfThread;
    for (int64_t c = lane * kColumns; c < p.intermediate_size; c += kWarpSize * kColumns) {
      const int64_t columns = p.intermediate_size - c;
      float gate[kColumns], up[kColumns], grad[kColumns], value[kColumns], weighted[kColumns];
      load_columns(gates + c, gate, columns, aligned);
      load_columns(ups + c, up, columns, aligned);
      if (grads != nullptr) load_columns(grads + c, grad, columns, aligned);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        // What the forward multiplied with: rounded to the dtype.
        value[i] = to_float(from_float<T>(activate<T>(p.activation, gate[i], up[i])));
        weighted[i] = weight * value[i];
      }
      if (p.weighted_intermediate != nullptr) store_columns(intermediate + c, weighted, columns, aligned);
      if (grads == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (i < columns) sum = fmaf(grad[i], value[i], sum);
      }
      if (p.gate_up_grad == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const Slopes slopes = activation_slopes<T>(p.activation, gate[i], up[i]);
        gate[i] = weight * grad[i] * slopes.by_gate;
        up[i] = weight * grad[i] * slopes.by_up;
      }
      store_columns(gate_grads + c, gate, columns, aligned);
      store_columns(up_grads + c, up, columns, aligned);
    }
    if (p.router_weights_grad != nullptr && p.experts != nullptr) {
      const void* bias = p.experts[p.local_expert[slot]].down_bias;
      const T* grad_out = static_cast<const T*>(p.grad_out) + slot / p.top_k * p.grad_out_stride;
      for (int64_t c = lane; c < p.hidden_size; c += kWarpSize) {
        sum = fmaf(to_float(grad_out[c]), load_as_float(bias, c, p.bias_dtype), sum);
      }
    }
    sum = warp_sum(sum);
  }
  if (lane == 0 && p.router_weights_grad != nullptr) {
    store_from_float(p.router_weights_grad, slot, p.router_weights_dtype, sum);
  }
}

}  // namespace

void activation_backward(const ActivationBackward& p, DType dtype, Stream stream) {
  // The rows of the workspace are aligned where those of the caller's pre-activations are.
  const bool aligned =
      reinterpret_cast<uintptr_t>(p.pre_activations) % 16 == 0 && p.intermediate_size % kColumnsOfThread == 0;
  with_element(dtype, [&](auto element) {
    launch("activation_backward_rows", activation_backward_rows<decltype(element)>,
           divide_up(p.num_slots, kWarps), kWarps * kWarpSize, 0, stream, p, aligned);
  });
}

}  // namespace cuda
}  // namespace paddle_moe
