// out[t] = sum over k of router_weights[t, k] * (rows[position[t, k]] + down_bias), in fp32, k ascending.
#include "cuda/combine.h"
#include "cuda/common.cuh"

namespace paddle_moe {
namespace cuda {
namespace {

constexpr int kColumns = kColumnsOfThread;
constexpr int kMaxThreads = 256;
constexpr int kFewTokens = 64, kFewThreads = 64;
constexpr int kAtOnce = 4;  // slots whose rows are on their way together

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    combine_rows(const __grid_constant__ Combine p, int blocks_per_token, bool aligned) {
  const int64_t token = blockIdx.x / blocks_per_token;
  const int64_t part = blockIdx.x % blocks_per_token;
  const int64_t column = (part * blockDim.x + threadIdx.x) * kColumns;
  if (column >= p.hidden_size) return;
  const int64_t columns = p.hidden_size - column;
  float sum[kColumns] = {};
  const int64_t first_slot = token * p.top_k;
  for (int32_t first = 0; first < p.top_k; first += kAtOnce) {
    // All positions, then all rows, then the sums in the order of k: one wait for memory each, not kAtOnce.
    int32_t position[kAtOnce];
    float weight[kAtOnce];
    float4 low[kAtOnce], high[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t slot = first_slot + first + i;
      const bool is_slot = first + i < p.top_k;
      position[i] = is_slot ? p.position[slot] : -1;
      weight[i] = is_slot && p.router_weights != nullptr
                      ? load_as_float(p.router_weights, slot, p.router_weights_dtype)
                      : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (position[i] < 0) continue;
      // Rows are padded to whole vectors; what is read past the last column is never stored.
      const auto* row = reinterpret_cast<const float4*>(p.rows + position[i] * p.rows_stride + column);
      low[i] = row[0];
      high[i] = row[1];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (position[i] < 0) continue;
      float value[kColumns] = {low[i].x,  low[i].y,  low[i].z,  low[i].w,
                               high[i].x, high[i].y, high[i].z, high[i].w};
      if (p.experts != nullptr) {
        const void* bias = p.experts[p.local_expert[first_slot + first + i]].down_bias;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (c < columns) value[c] += load_as_float(bias, column + c, p.bias_dtype);
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] = fmaf(weight[i], value[c], sum[c]);
    }
  }
  store_columns(static_cast<T*>(p.out) + token * p.hidden_size + column, sum, columns, aligned);
}

}  // namespace

void combine(const Combine& p, DType dtype, Stream stream) {
  const int64_t vectors = divide_up(p.hidden_size, kColumns);
  // Few tokens are spread over more blocks, so that more multiprocessors read.
  const int64_t most = p.num_tokens <= kFewTokens ? kFewThreads : kMaxThreads;
  const int64_t blocks_per_token = divide_up(vectors, most);
  const int threads =
      static_cast<int>(round_up(divide_up(vectors, blocks_per_token), kWarpSize));  // equal shares
  with_element(dtype, [&](auto element) {
    const bool aligned =
        reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.hidden_size * sizeof(element) % 16 == 0;
    launch("combine_rows", combine_rows<decltype(element)>, p.num_tokens * blocks_per_token, threads, 0,
           stream, p, static_cast<int>(blocks_per_token), aligned);
  });
}

}  // namespace cuda
}  // namespace paddle_moe
