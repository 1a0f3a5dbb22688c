// A tile of a matrix product by fp32 multiply-adds, for fp32 experts and for the gate: any element types, any
// strides. Each sum runs over the depth in blocks of kSumBlock terms: a chain of multiply-adds within a
// block, then the blocks added in order. That is the order of the CPU back end, and it keeps the error of a
// long sum below that of one long chain.
#pragma once

#include "cuda/common.cuh"

namespace paddle_moe {
namespace cuda {

constexpr int kSumBlock = 256;

struct Fp32Tile {
  static constexpr int kBlockM = 64, kHalfN = 32, kBlockDepth = 16, kThreads = 256;
  static constexpr int kRows = 4, kColumns = 2;  // of one thread, the columns in each half
  static constexpr int kThreadsN = kHalfN / kColumns;
  static constexpr int kLoadsA = kBlockM * kBlockDepth / kThreads, kLoadsB = kHalfN * kBlockDepth / kThreads;
  static_assert(kThreadsN * kBlockM / kRows == kThreads, "the threads cover the tile");
  static_assert(kSumBlock % kBlockDepth == 0, "a block of a sum ends with a step");

  struct Shared {
    float a[kBlockDepth][kBlockM + 4];
    float b[2][kBlockDepth][kHalfN];
  };

  float sum[2][kRows][kColumns] = {};

  __device__ static int first_row() { return threadIdx.x / kThreadsN * kRows; }
  __device__ static int first_column() { return threadIdx.x % kThreadsN * kColumns; }

  // a(row, k) and b(half, k, column), with zeros for what lies outside. weights_along_depth: neighbours in k
  // are neighbours in memory.
  template <class A, class B>
  __device__ void multiply(Shared& shared, int64_t depth, bool weights_along_depth, A a, B b) {
    float block[2][kRows][kColumns] = {};
    float next_a[kLoadsA], next_b[2][kLoadsB];
    const auto index = [](int i) { return static_cast<int>(threadIdx.x) + i * kThreads; };
    const auto depth_of_b = [&](int i) { return weights_along_depth ? i % kBlockDepth : i / kHalfN; };
    const auto column_of_b = [&](int i) { return weights_along_depth ? i / kBlockDepth : i % kHalfN; };
    // The next step's elements are on their way while this step's are multiplied.
    const auto fetch = [&](int64_t k) {
#pragma unroll
      for (int n = 0; n < kLoadsA; ++n) {
        const int row = index(n) / kBlockDepth, d = index(n) % kBlockDepth;
        next_a[n] = k + d < depth ? a(row, k + d) : 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kLoadsB; ++n) {
          const int d = depth_of_b(index(n));
          next_b[half][n] = k + d < depth ? b(half, k + d, column_of_b(index(n))) : 0.0f;
        }
      }
    };
    fetch(0);
    for (int64_t k = 0; k < depth; k += kBlockDepth) {
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kLoadsA; ++n) {
        shared.a[index(n) % kBlockDepth][index(n) / kBlockDepth] = next_a[n];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kLoadsB; ++n) {
          shared.b[half][depth_of_b(index(n))][column_of_b(index(n))] = next_b[half][n];
        }
      }
      __syncthreads();
      fetch(k + kBlockDepth);
#pragma unroll
      for (int d = 0; d < kBlockDepth; ++d) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float factor = shared.a[d][first_row() + r];
#pragma unroll
          for (int i = 0; i < 2 * kColumns; ++i) {
            float& value = block[i / kColumns][r][i % kColumns];
            value = fmaf(factor, shared.b[i / kColumns][d][first_column() + i % kColumns], value);
          }
        }
      }
      if ((k + kBlockDepth) % kSumBlock == 0 || k + kBlockDepth >= depth) add(block);
    }
  }

  // body(half, row, column, sum) for all sums of this thread.
  template <class Body>
  __device__ void for_each(Body body) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          body(half, first_row() + r, first_column() + c, sum[half][r][c]);
        }
      }
    }
  }

 private:
  __device__ void add(float (&block)[2][kRows][kColumns]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sum[half][r][c] += block[half][r][c];
          block[half][r][c] = 0.0f;
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace paddle_moe
