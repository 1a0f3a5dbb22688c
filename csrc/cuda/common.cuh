// Helpers that every kernel file uses.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/ptx.cuh"
#include "moe.h"

namespace paddle_moe {
namespace cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffff;

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Hands out consecutive pieces of the workspace; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

inline void expect(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  expect(cudaGetDevice(&device), "cudaGetDevice");
  expect(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Starts `blocks` blocks, or nothing when there are none: a launch without blocks is an error in CUDA.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            Stream stream, const Arguments&... arguments) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  if (blocks == 0) return;
  cudaError_t error = cudaErrorInvalidConfiguration;
  if (blocks <= kMaxBlocks) {
    error = launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, stream,
                          arguments...);
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA kernel ") + name + " with " + std::to_string(blocks) +
                             " blocks of " + std::to_string(threads) + " threads and " +
                             std::to_string(shared_bytes) +
                             " bytes of shared memory was not started: " + cudaGetErrorString(error));
  }
}

// Whether rows of 16-bit elements, `stride` of them apart, begin at multiples of 16 bytes.
inline bool is_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

// Calls body with a value of the element type that dtype names.
template <class Body>
void with_element(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(Bf16{});
    case DType::kFloat16:
      return body(Fp16{});
    default:
      return body(float{});
  }
}

// Element i of an array whose dtype is only known at run time: for biases and router weights.
__device__ inline float load_as_float(const void* data, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const Bf16*>(data)[i]);
    case DType::kFloat16:
      return to_float(static_cast<const Fp16*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ inline void store_from_float(void* data, int64_t i, DType dtype, float value) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<Bf16*>(data)[i] = from_float<Bf16>(value);
      break;
    case DType::kFloat16:
      static_cast<Fp16*>(data)[i] = from_float<Fp16>(value);
      break;
    default:
      static_cast<float*>(data)[i] = value;
  }
}

// The same bits on every lane: addition commutes.
__device__ inline float warp_sum(float value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

// 16 bytes at once. destination is aligned to 16.
template <class T, int kCount>
__device__ inline void store_vector(T* destination, const T (&values)[kCount], int first = 0) {
  uint4 bytes;
  memcpy(&bytes, values + first, sizeof bytes);
  *reinterpret_cast<uint4*>(destination) = bytes;
}

// What a thread of the kernels that only move rows takes: 16 bytes of half precision elements. In whole
// 16-byte pieces where `aligned`, else element by element; only the first `columns` are there.
constexpr int kColumnsOfThread = 8;

template <class T>
__device__ void load_columns(const T* in, float (&value)[kColumnsOfThread], int64_t columns, bool aligned) {
  if (aligned && columns >= kColumnsOfThread) {
    T element[kColumnsOfThread];
#pragma unroll
    for (int c = 0; c < kColumnsOfThread; c += 16 / sizeof(T)) {
      const uint4 bytes = *reinterpret_cast<const uint4*>(in + c);
      memcpy(element + c, &bytes, sizeof bytes);
    }
#pragma unroll
    for (int c = 0; c < kColumnsOfThread; ++c) value[c] = to_float(element[c]);
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumnsOfThread; ++c) value[c] = c < columns ? to_float(in[c]) : 0.0f;
}

template <class T>
__device__ void store_columns(T* out, const float (&value)[kColumnsOfThread], int64_t columns, bool aligned) {
  T element[kColumnsOfThread];
#pragma unroll
  for (int c = 0; c < kColumnsOfThread; ++c) element[c] = from_float<T>(value[c]);
  if (aligned && columns >= kColumnsOfThread) {
#pragma unroll
    for (int c = 0; c < kColumnsOfThread; c += 16 / sizeof(T)) store_vector(out + c, element, c);
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumnsOfThread; ++c) {
    if (c < columns) out[c] = element[c];
  }
}

}  // namespace cuda
}  // namespace paddle_moe
