// Vectors of 16 bytes of half precision elements in the shared memory of the tensor core kernels.
#pragma once

#include "cuda/common.cuh"

namespace paddle_moe {
namespace cuda {

constexpr int kVector = 8;  // 16-bit elements in 16 bytes

// Position of a 16-byte vector in a tile whose rows hold kPerRow of them, so that eight consecutive rows of
// one column of vectors lie in different banks.
template <int kPerRow>
__device__ inline int swizzled(int row, int vector) {
  static_assert(kPerRow == 4 || kPerRow == 8, "64 or 128 bytes");
  return row * kPerRow + (vector ^ (kPerRow == 8 ? row % 8 : row / 2 % 4));
}

__device__ inline int valid_elements(int64_t size, int64_t first) {
  const int64_t left = size - first;
  return left <= 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;
}

// A vector of `count` elements that lie `stride` apart, zeros behind them.
template <class T>
__device__ void copy_elements(T* destination, const T* source, int64_t stride, int count) {
  T value[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) value[i] = i < count ? source[i * stride] : T{0};
  store_vector(destination, value);
}

}  // namespace cuda
}  // namespace paddle_moe
