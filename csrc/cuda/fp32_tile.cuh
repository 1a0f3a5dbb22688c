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
    for (int64_t k = 0; k < depth; k += kBlockDepth) {
      __syncthreads();
      for (int i = threadIdx.x; i < kBlockM * kBlockDepth; i += kThreads) {
        const int row = i / kBlockDepth, d = i % kBlockDepth;
        shared.a[d][row] = k + d < depth ? a(row, k + d) : 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for (int i = threadIdx.x; i < kHalfN * kBlockDepth; i += kThreads) {
          const int d = weights_along_depth ? i % kBlockDepth : i / kHalfN;
          const int column = weights_along_depth ? i / kBlockDepth : i % kHalfN;
          shared.b[half][d][column] = k + d < depth ? b(half, k + d, column) : 0.0f;
        }
      }
      __syncthreads();
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
