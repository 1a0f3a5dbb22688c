// act(gate) * up in fp32, as the CPU back end and reference.py define it.
#pragma once

#include "cuda/common.cuh"

namespace paddle_moe {
namespace cuda {

// x * sigmoid(argument). The fast division and exponential, a third of the instructions, are off by a few
// units in the last place of fp32 where the result is not tiny.
__device__ inline float times_sigmoid(float x, float argument) {
  return __fdividef(x, 1.0f + __expf(-argument));
}

__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays one

__device__ inline float activate(const ActivationSpec& spec, float gate, float up) {
  switch (spec.kind) {
    case Activation::kSilu:
      return times_sigmoid(gate, gate) * up;
    case Activation::kGelu:
      return 0.5f * gate * erfcf(gate * -0.707106781f) * up;
    case Activation::kGeluTanh:
      return times_sigmoid(gate, 1.595769122f * gate * fmaf(gate * gate, 0.044715f, 1.0f)) * up;
    case Activation::kRelu:
      return relu(gate) * up;
    case Activation::kRelu2:
      return relu(gate) * relu(gate) * up;
    case Activation::kSelu:
      return 1.05070099f * (gate > 0.0f ? gate : 1.67326324f * expm1f(gate)) * up;
    case Activation::kIdentity:
      return gate * up;
    case Activation::kSwigluOai:
      gate = gate > spec.limit ? spec.limit : gate;
      up = up > spec.limit ? spec.limit : up;
      up = up < -spec.limit ? -spec.limit : up;
      return times_sigmoid(gate, spec.alpha * gate) * (up + 1.0f);
  }
  return 0.0f;
}

}  // namespace cuda
}  // namespace paddle_moe
