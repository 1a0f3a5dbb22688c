// logits = hidden_states x gate_weight in fp32, by multiply-adds: the gate is a small part of the layer, and
// its rounding would move the routing. Both kernels sum in the order of fp32_tile.cuh, so a token's logits do
// not depend on which one ran.
#include "cuda/fp32_tile.cuh"

namespace paddle_moe {
namespace cuda {
namespace {

// Up to kVeryFewTokens a block for each, so that there are enough blocks; then the reads count.
constexpr int64_t kVeryFewTokens = 32, kFewTokens = 128;
constexpr int kWarps = 16;  // of a block of gate_few: so many blocks of a sum run side by side

__device__ void set_to_zero(uint32_t* word) {
  if (word != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *word = 0;
}

template <class Hidden, class Weight>
__global__ void __launch_bounds__(Fp32Tile::kThreads)
    gate_tiles(const __grid_constant__ GateProblem p, int blocks_n, float* logits, uint32_t* zeroed) {
  set_to_zero(zeroed);
  constexpr int kColumns = 2 * Fp32Tile::kHalfN;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) / blocks_n * Fp32Tile::kBlockM;
  const int64_t first_expert = static_cast<int64_t>(blockIdx.x) % blocks_n * kColumns;
  Fp32Tile sums;
  sums.multiply(
      *static_cast<Fp32Tile::Shared*>(shared_memory()), p.hidden_size, p.weight.in_stride == 1,
      [&](int row, int64_t k) {
        if (first_token + row >= p.num_tokens) return 0.0f;
        return to_float(
            static_cast<const Hidden*>(p.hidden_states)[(first_token + row) * p.hidden_states_stride + k]);
      },
      [&](int half, int64_t k, int column) {
        const int64_t n = first_expert + half * Fp32Tile::kHalfN + column;
        if (n >= p.num_experts) return 0.0f;
        return to_float(
            static_cast<const Weight*>(p.weight.data)[k * p.weight.in_stride + n * p.weight.out_stride]);
      });
  sums.for_each([&](int half, int row, int column, float sum) {
    const int64_t n = first_expert + half * Fp32Tile::kHalfN + column;
    if (first_token + row < p.num_tokens && n < p.num_experts) {
      logits[(first_token + row) * p.num_experts + n] = sum;
    }
  });
}

// A block computes 32 logits, one per lane, of kTokens tokens, which share the reads of the weight; warp w
// the blocks w, w + kWarps, ... of each sum. Warp t adds those of token t.
template <class Hidden, class Weight, int kTokens>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    gate_few(const __grid_constant__ GateProblem p, int blocks_n, float* logits, uint32_t* zeroed) {
  static_assert(kTokens <= kWarps, "a warp for each token");
  set_to_zero(zeroed);
  auto* sums = static_cast<float (*)[kTokens][kWarpSize]>(shared_memory());
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) / blocks_n * kTokens;
  const int64_t expert = static_cast<int64_t>(blockIdx.x) % blocks_n * kWarpSize + lane;
  const Hidden* hidden[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int64_t token = first_token + t < p.num_tokens ? first_token + t : p.num_tokens - 1;
    hidden[t] = static_cast<const Hidden*>(p.hidden_states) + token * p.hidden_states_stride;
  }
  const auto* weight = static_cast<const Weight*>(p.weight.data) + expert * p.weight.out_stride;
  float total = 0.0f;
  for (int64_t round = 0; round < p.hidden_size; round += kWarps * kSumBlock) {
    const int64_t first = round + warp * kSumBlock;
    const int64_t end = first + kSumBlock < p.hidden_size ? first + kSumBlock : p.hidden_size;
    float sum[kTokens] = {};
    if (expert < p.num_experts) {
#pragma unroll(16 / kTokens)
      for (int64_t k = first; k < end; ++k) {
        const float factor = to_float(weight[k * p.weight.in_stride]);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) sum[t] = fmaf(to_float(hidden[t][k]), factor, sum[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[warp][t][lane] = sum[t];
    __syncthreads();
    if (warp < kTokens) {
      for (int w = 0; w < kWarps && round + w * kSumBlock < p.hidden_size; ++w) total += sums[w][warp][lane];
    }
    __syncthreads();
  }
  const int64_t token = first_token + warp;
  if (warp < kTokens && token < p.num_tokens && expert < p.num_experts) {
    logits[token * p.num_experts + expert] = total;
  }
}

template <class Hidden, class Weight, int kTokens>
void start_few(const GateProblem& p, Stream stream, float* logits, uint32_t* zeroed) {
  const int64_t blocks_n = divide_up(p.num_experts, kWarpSize);
  launch("gate_few", gate_few<Hidden, Weight, kTokens>, divide_up(p.num_tokens, kTokens) * blocks_n,
         kWarps * kWarpSize, kTokens * kWarps * kWarpSize * sizeof(float), stream, p,
         static_cast<int>(blocks_n), logits, zeroed);
}

template <class Hidden, class Weight>
void start(const GateProblem& p, Stream stream, float* logits, uint32_t* zeroed) {
  if (p.num_tokens <= kVeryFewTokens) return start_few<Hidden, Weight, 1>(p, stream, logits, zeroed);
  if (p.num_tokens <= kFewTokens) return start_few<Hidden, Weight, 4>(p, stream, logits, zeroed);
  const int64_t blocks_n = divide_up(p.num_experts, 2 * Fp32Tile::kHalfN);
  launch("gate_tiles", gate_tiles<Hidden, Weight>, divide_up(p.num_tokens, Fp32Tile::kBlockM) * blocks_n,
         Fp32Tile::kThreads, sizeof(Fp32Tile::Shared), stream, p, static_cast<int>(blocks_n), logits, zeroed);
}

// ---------------------------------------------------------------- backward

// grad_logits x weight^T: a sum over the experts for each token and feature.
template <class Hidden, class Weight>
__global__ void __launch_bounds__(Fp32Tile::kThreads)
    gate_hidden_gradient(const __grid_constant__ GateBackwardProblem b, int blocks_n) {
  const GateProblem& p = b.forward;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) / blocks_n * Fp32Tile::kBlockM;
  const int64_t first_feature = static_cast<int64_t>(blockIdx.x) % blocks_n * 2 * Fp32Tile::kHalfN;
  Fp32Tile sums;
  sums.multiply(
      *static_cast<Fp32Tile::Shared*>(shared_memory()), p.num_experts, p.weight.out_stride == 1,
      [&](int row, int64_t k) {
        if (first_token + row >= p.num_tokens) return 0.0f;
        return b.grad_logits[(first_token + row) * p.num_experts + k];
      },
      [&](int half, int64_t k, int column) {
        const int64_t n = first_feature + half * Fp32Tile::kHalfN + column;
        if (n >= p.hidden_size) return 0.0f;
        return to_float(
            static_cast<const Weight*>(p.weight.data)[n * p.weight.in_stride + k * p.weight.out_stride]);
      });
  sums.for_each([&](int half, int row, int column, float sum) {
    const int64_t n = first_feature + half * Fp32Tile::kHalfN + column;
    if (first_token + row < p.num_tokens && n < p.hidden_size) {
      static_cast<Hidden*>(b.hidden_states)[(first_token + row) * p.hidden_size + n] =
          from_float<Hidden>(sum);
    }
  });
}

// hidden_states^T x grad_logits: a sum over the tokens for each feature and expert.
template <class Hidden, class Weight>
__global__ void __launch_bounds__(Fp32Tile::kThreads)
    gate_weight_gradient(const __grid_constant__ GateBackwardProblem b, int blocks_n) {
  const GateProblem& p = b.forward;
  const int64_t first_feature = static_cast<int64_t>(blockIdx.x) / blocks_n * Fp32Tile::kBlockM;
  const int64_t first_expert = static_cast<int64_t>(blockIdx.x) % blocks_n * 2 * Fp32Tile::kHalfN;
  Fp32Tile sums;
  sums.multiply(
      *static_cast<Fp32Tile::Shared*>(shared_memory()), p.num_tokens, false,
      [&](int row, int64_t k) {
        if (first_feature + row >= p.hidden_size) return 0.0f;
        return to_float(
            static_cast<const Hidden*>(p.hidden_states)[k * p.hidden_states_stride + first_feature + row]);
      },
      [&](int half, int64_t k, int column) {
        const int64_t n = first_expert + half * Fp32Tile::kHalfN + column;
        return n < p.num_experts ? b.grad_logits[k * p.num_experts + n] : 0.0f;
      });
  sums.for_each([&](int half, int row, int column, float sum) {
    const int64_t n = first_expert + half * Fp32Tile::kHalfN + column, feature = first_feature + row;
    if (feature < p.hidden_size && n < p.num_experts) {
      static_cast<Weight*>(const_cast<void*>(
          b.weight.data))[feature * b.weight.in_stride + n * b.weight.out_stride] = from_float<Weight>(sum);
    }
  });
}

template <class Hidden, class Weight>
void start_backward(const GateBackwardProblem& b, Stream stream) {
  const GateProblem& p = b.forward;
  constexpr int kColumns = 2 * Fp32Tile::kHalfN;
  if (b.hidden_states != nullptr) {
    const int64_t blocks_n = divide_up(p.hidden_size, kColumns);
    launch("gate_hidden_gradient", gate_hidden_gradient<Hidden, Weight>,
           divide_up(p.num_tokens, Fp32Tile::kBlockM) * blocks_n, Fp32Tile::kThreads,
           sizeof(Fp32Tile::Shared), stream, b, static_cast<int>(blocks_n));
  }
  if (b.weight.data != nullptr) {
    const int64_t blocks_n = divide_up(p.num_experts, kColumns);
    launch("gate_weight_gradient", gate_weight_gradient<Hidden, Weight>,
           divide_up(p.hidden_size, Fp32Tile::kBlockM) * blocks_n, Fp32Tile::kThreads,
           sizeof(Fp32Tile::Shared), stream, b, static_cast<int>(blocks_n));
  }
}

}  // namespace

void gate_backward(const GateBackwardProblem& b, Stream stream) {
  with_element(b.forward.dtype, [&](auto hidden) {
    using Hidden = decltype(hidden);
    b.forward.weight_dtype == DType::kFloat32 ? start_backward<Hidden, float>(b, stream)
                                              : start_backward<Hidden, Hidden>(b, stream);
  });
}

void gate(const GateProblem& p, Stream stream, float* logits, uint32_t* zeroed) {
  with_element(p.dtype, [&](auto hidden) {
    using Hidden = decltype(hidden);
    p.weight_dtype == DType::kFloat32 ? start<Hidden, float>(p, stream, logits, zeroed)
                                      : start<Hidden, Hidden>(p, stream, logits, zeroed);
  });
}

}  // namespace cuda
}  // namespace paddle_moe
