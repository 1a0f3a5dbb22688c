// out[t] = sum over k of router_weights[t, k] * (rows[position[t, k]] + down_bias), in fp32, k ascending.
#include "cuda/combine.h"
#include "cuda/common.cuh"

namespace paddle_moe {
namespace cuda {
namespace {

constexpr int kColumns = 8;  // of one thread: 16 bytes of a half precision result
constexpr int kMaxThreads = 256;

// out is written in whole 16-byte pieces where `aligned`, else element by element.
template <class T>
__device__ void store_columns(T* out, const float (&sum)[kColumns], int64_t columns, bool aligned) {
  T value[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) value[c] = from_float<T>(sum[c]);
  if (aligned && columns >= kColumns) {
#pragma unroll
    for (int c = 0; c < kColumns; c += 16 / sizeof(T)) {
      store_vector(out + c, value, c);
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (c < columns) out[c] = value[c];
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    combine_rows(const __grid_constant__ Combine p, int blocks_per_token, bool aligned) {
  const int64_t token = blockIdx.x / blocks_per_token;
  const int64_t part = blockIdx.x % blocks_per_token;
  const int64_t column = (part * blockDim.x + threadIdx.x) * kColumns;
  if (column >= p.hidden_size) return;
  const int64_t columns = p.hidden_size - column;
  float sum[kColumns] = {};
  for (int64_t slot = token * p.top_k; slot < (token + 1) * p.top_k; ++slot) {
    const int32_t position = p.position[slot];
    if (position < 0) continue;
    const float weight =
        p.router_weights == nullptr ? 1.0f : load_as_float(p.router_weights, slot, p.router_weights_dtype);
    // Rows are padded to whole vectors; what is read past the last column is never stored.
    const auto* row = reinterpret_cast<const float4*>(p.rows + position * p.rows_stride + column);
    const float4 low = row[0], high = row[1];
    float value[kColumns] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (p.experts != nullptr) {
      const void* bias = p.experts[p.local_expert[slot]].down_bias;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c < columns) value[c] += load_as_float(bias, column + c, p.bias_dtype);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] = fmaf(weight, value[c], sum[c]);
  }
  store_columns(static_cast<T*>(p.out) + token * p.hidden_size + column, sum, columns, aligned);
}

}  // namespace

void combine(const Combine& p, DType dtype, Stream stream) {
  const int64_t vectors = divide_up(p.hidden_size, kColumns);
  const int64_t blocks_per_token = divide_up(vectors, kMaxThreads);
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
