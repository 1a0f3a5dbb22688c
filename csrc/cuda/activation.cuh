// act(gate) * up and its derivatives in fp32, as the CPU back end and reference.py define them.
#pragma once

#include "cuda/common.cuh"

namespace paddle_moe {
namespace cuda {

// exp(x) and a / b for results that are stored as T. For the half precision formats the fast ones, a third
// of the instructions, which are off by a few units in the last place of fp32 where the result is not tiny.
template <class T>
struct Arithmetic {
  __device__ static float exp(float x) { return __expf(x); }
  __device__ static float divide(float a, float b) { return __fdividef(a, b); }
};
template <>
struct Arithmetic<float> {
  __device__ static float exp(float x) { return expf(x); }
  __device__ static float divide(float a, float b) { return a / b; }
};

// x * sigmoid(argument)
template <class T>
__device__ inline float times_sigmoid(float x, float argument) {
  return Arithmetic<T>::divide(x, 1.0f + Arithmetic<T>::exp(-argument));
}

__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays one

__device__ inline float twice_gelu_tanh_argument(float x) {
  return 1.595769122f * x * fmaf(x * x, 0.044715f, 1.0f);
}

template <class T>
__device__ inline float activate(const ActivationSpec& spec, float gate, float up) {
  switch (spec.kind) {
    case Activation::kSilu:
      return times_sigmoid<T>(gate, gate) * up;
    case Activation::kGelu:
      return 0.5f * gate * erfcf(gate * -0.707106781f) * up;
    case Activation::kGeluTanh:
      return times_sigmoid<T>(gate, twice_gelu_tanh_argument(gate)) * up;
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
      return times_sigmoid<T>(gate, spec.alpha * gate) * (up + 1.0f);
  }
  return 0.0f;
}

// The derivatives of activate() by gate and by up. At a kink that of the left side is taken, at a limit of
// swigluoai that of the inside.
struct Slopes {
  float by_gate, by_up;
};

// Of x * sigmoid(argument), from x, sigmoid(argument) and the derivative of the argument. Where the sigmoid
// is 0 or 1 in fp32 the second term is nothing, though the derivative of the argument may be infinite.
__device__ inline float times_sigmoid_slope(float x, float sigmoid, float argument_slope) {
  const float bend = x * sigmoid * (1.0f - sigmoid);
  return bend == 0.0f ? sigmoid : fmaf(bend, argument_slope, sigmoid);
}

template <class T>
__device__ inline Slopes activation_slopes(const ActivationSpec& spec, float gate, float up) {
  switch (spec.kind) {
    case Activation::kSilu: {
      const float sigmoid = times_sigmoid<T>(1.0f, gate);
      return {times_sigmoid_slope(gate, sigmoid, 1.0f) * up, times_sigmoid<T>(gate, gate)};
    }
    case Activation::kGelu: {
      const float distribution = 0.5f * erfcf(gate * -0.707106781f);
      const float density = 0.398942280f * Arithmetic<T>::exp(-0.5f * gate * gate);
      return {fmaf(gate, density, distribution) * up, gate * distribution};
    }
    case Activation::kGeluTanh: {
      const float argument = twice_gelu_tanh_argument(gate), sigmoid = times_sigmoid<T>(1.0f, argument);
      const float argument_slope = 1.595769122f * fmaf(gate * gate, 0.134145f, 1.0f);
      return {times_sigmoid_slope(gate, sigmoid, argument_slope) * up, times_sigmoid<T>(gate, argument)};
    }
    case Activation::kRelu:
      return {gate <= 0.0f ? 0.0f : up, relu(gate)};
    case Activation::kRelu2:
      return {2.0f * relu(gate) * up, relu(gate) * relu(gate)};
    case Activation::kSelu:
      return {1.05070099f * (gate > 0.0f ? 1.0f : 1.67326324f * Arithmetic<T>::exp(gate)) * up,
              1.05070099f * (gate > 0.0f ? gate : 1.67326324f * expm1f(gate))};
    case Activation::kIdentity:
      return {up, gate};
    case Activation::kSwigluOai: {
      const float g = gate > spec.limit ? spec.limit : gate;
      float u = up > spec.limit ? spec.limit : up;
      u = u < -spec.limit ? -spec.limit : u;
      const float sigmoid = times_sigmoid<T>(1.0f, spec.alpha * g);
      const float slope = times_sigmoid_slope(g, sigmoid, spec.alpha) * (u + 1.0f);
      return {gate > spec.limit ? 0.0f : slope,
              fabsf(up) > spec.limit ? 0.0f : times_sigmoid<T>(g, spec.alpha * g)};
    }
  }
  return {0.0f, 0.0f};
}

}  // namespace cuda
}  // namespace paddle_moe
