// Scores, selects and weighs the experts of a token by the rules of cpu/route.cc: a warp does it.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/common.cuh"

namespace paddle_moe {
namespace cuda {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

__device__ inline float warp_max(float value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

// Orders by falling key; equal keys by rising index.
struct Ranked {
  float key;
  int index;
};

__device__ inline bool before(Ranked a, Ranked b) {
  return a.key > b.key || (a.key == b.key && a.index < b.index);
}

// The first of keys[0 .. size-1] that comes after `last`. The caller knows that there is one.
__device__ inline Ranked next_best(const float* keys, int size, Ranked last) {
  Ranked best{kMinusInfinity, size};
  for (int i = threadIdx.x % kWarpSize; i < size; i += kWarpSize) {
    const Ranked candidate{keys[i], i};
    if (before(last, candidate) && before(candidate, best)) best = candidate;
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Ranked other{__shfl_xor_sync(kFullWarp, best.key, distance),
                       __shfl_xor_sync(kFullWarp, best.index, distance)};
    if (before(other, best)) best = other;
  }
  return best;
}

__device__ inline Ranked before_all() { return {-kMinusInfinity, -1}; }

class Router {
 public:
  // keys: [num_experts + num_groups] of shared memory, this warp's own.
  __device__ Router(const RouteProblem& problem, const float* logits, float* keys)
      : p_(problem),
        num_experts_(static_cast<int>(problem.num_experts)),
        num_groups_(static_cast<int>(problem.num_groups)),
        lane_(static_cast<int>(threadIdx.x % kWarpSize)),
        logits_(logits),
        keys_(keys),
        group_keys_(keys + problem.num_experts) {}

  __device__ void route(int32_t* ids, float* weights) {
    if (!prepare_scores() || !make_keys() || !weigh(ids, weights)) {
      for (int k = lane_; k < p_.top_k; k += kWarpSize) {
        ids[k] = -1;
        weights[k] = 0.0f;
      }
    }
  }

  // The gradient of the logits from that of the weights, by the rules of cpu/route.cc. Where ids are not what
  // route() returns, NaN: no error can be thrown here.
  __device__ void backward(const int32_t* ids, const float* grad, float* grad_logits) {
    const int top_k = static_cast<int>(p_.top_k);
    bool valid = true;
    for (int k = 0; k < top_k; ++k) valid &= ids[0] < 0 ? ids[k] < 0 : 0 <= ids[k] && ids[k] < num_experts_;
    for (int e = lane_; e < num_experts_; e += kWarpSize) grad_logits[e] = valid ? 0.0f : nanf("");
    if (ids[0] < 0 || !valid) return;
    prepare_scores();
    const bool over_logits = p_.scoring == Scoring::kSoftmaxTopK;
    float largest = kMinusInfinity, sum = 0.0f;
    for (int k = 0; over_logits && k < top_k; ++k) largest = fmaxf(largest, logits_[ids[k]]);
    auto part = [&](int k) { return over_logits ? expf(logits_[ids[k]] - largest) : score(ids[k]); };
    for (int k = 0; k < top_k; ++k) sum += part(k);
    const float divisor = over_logits ? sum : divisor_of(sum);
    float inner = 0.0f;  // what the weights' common divisor takes away
    for (int k = 0; (over_logits || p_.renormalize) && k < top_k; ++k) {
      inner = fmaf(grad[k], part(k) / divisor, inner);
    }
    __syncwarp();  // the zeros are there
    float total = 0.0f;
    for (int k = 0; k < top_k; ++k) {
      const float value = part(k);
      const float by_log = p_.scaling_factor * ((grad[k] - inner) * (value / divisor));
      if (lane_ == 0) {
        grad_logits[ids[k]] += p_.scoring == Scoring::kSigmoid ? by_log * (1.0f - value) : by_log;
      }
      total += by_log;
    }
    if (p_.scoring != Scoring::kSoftmax) return;
    __syncwarp();
    for (int e = lane_; e < num_experts_; e += kWarpSize) {
      grad_logits[e] = fmaf(-score(e), total, grad_logits[e]);
    }
  }

 private:
  // Of the chosen scores, whose sum is given.
  __device__ float divisor_of(float sum) const {
    const float divisor = p_.renormalize ? sum + p_.renormalize_eps : 1.0f;
    return divisor == 0.0f ? 1.0f : divisor;
  }

  __device__ float score(int expert) const {
    const float logit = logits_[expert];
    switch (p_.scoring) {
      case Scoring::kSoftmax:
        return expf(logit - largest_) / sum_;
      case Scoring::kSigmoid:
        return 1.0f / (1.0f + expf(-logit));
      case Scoring::kSoftmaxTopK:
        break;
    }
    return logit;
  }

  // Each of the three steps returns false when it meets something that is not a number.
  __device__ bool prepare_scores() {
    if (p_.scoring != Scoring::kSoftmax) return true;  // make_keys sees what is not a number
    float largest = kMinusInfinity, sum = 0.0f;
    for (int e = lane_; e < num_experts_; e += kWarpSize) largest = fmaxf(largest, logits_[e]);
    largest_ = warp_max(largest);
    for (int e = lane_; e < num_experts_; e += kWarpSize) sum += expf(logits_[e] - largest_);
    sum_ = warp_sum(sum);
    return sum_ == sum_;
  }

  __device__ bool make_keys() {
    // Softmax and sigmoid keep the order of the logits; ranking the logits themselves avoids ties made by
    // rounding.
    const bool plain = p_.correction_bias == nullptr && num_groups_ == 1;
    bool invalid = false;
    for (int e = lane_; e < num_experts_; e += kWarpSize) {
      keys_[e] = plain ? logits_[e] : score(e) + (p_.correction_bias ? p_.correction_bias[e] : 0.0f);
      invalid |= logits_[e] != logits_[e] || keys_[e] != keys_[e];
    }
    if (__any_sync(kFullWarp, invalid)) return false;
    __syncwarp();
    if (num_groups_ > 1) mask_groups();
    return true;
  }

  __device__ void mask_groups() {
    const int size = num_experts_ / num_groups_;
    for (int g = lane_; g < num_groups_; g += kWarpSize) {
      float first = kMinusInfinity, second = kMinusInfinity;
      for (int e = g * size; e < (g + 1) * size; ++e) {
        second = fmaxf(second, fminf(first, keys_[e]));
        first = fmaxf(first, keys_[e]);
      }
      const float key = p_.group_score == GroupScore::kTop2Sum && size > 1 ? first + second : first;
      group_keys_[g] = key == key ? key : kMinusInfinity;  // opposite infinities: the group loses
    }
    __syncwarp();
    Ranked last_kept = before_all();
    for (int i = 0; i < p_.topk_groups; ++i) last_kept = next_best(group_keys_, num_groups_, last_kept);
    for (int e = lane_; e < num_experts_; e += kWarpSize) {
      if (before(last_kept, {group_keys_[e / size], e / size})) keys_[e] = p_.group_mask_fill;
    }
    __syncwarp();
  }

  __device__ bool weigh(int32_t* ids, float* weights) const {
    const int top_k = static_cast<int>(p_.top_k);
    float sum = 0.0f, largest = kMinusInfinity;
    Ranked chosen = before_all();
    for (int k = 0; k < top_k; ++k) {
      chosen = next_best(keys_, num_experts_, chosen);
      const float value = score(chosen.index);
      largest = fmaxf(largest, value);
      sum += value;
      if (lane_ == 0) {
        ids[k] = chosen.index;
        weights[k] = value;
      }
    }
    if (lane_ == 0) {
      if (p_.scoring == Scoring::kSoftmaxTopK) {
        sum = 0.0f;
        for (int k = 0; k < top_k; ++k) sum += weights[k] = expf(weights[k] - largest);
      } else {
        sum = divisor_of(sum);
      }
      for (int k = 0; k < top_k; ++k) weights[k] = weights[k] / sum * p_.scaling_factor;
    }
    __syncwarp();
    sum = __shfl_sync(kFullWarp, sum, 0);
    return sum == sum;
  }

  const RouteProblem& p_;
  const int num_experts_, num_groups_, lane_;
  const float* logits_;
  float *keys_, *group_keys_;
  float largest_ = 0.0f, sum_ = 1.0f;
};

// A token for each of the first `warps` warps of every block.
__device__ inline void route_by_warps(const RouteProblem& p, int warps, int32_t* routing_table,
                                      float* router_weights) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (warp >= warps || token >= p.num_tokens) return;
  float* keys = static_cast<float*>(shared_memory()) + warp * (p.num_experts + p.num_groups);
  Router(p, p.logits + token * p.num_experts, keys)
      .route(routing_table + token * p.top_k, router_weights + token * p.top_k);
}

// How the tokens are shared out: `warps` per block, at most max_warps, and the shared memory of such a block.
struct RouteBlocks {
  RouteBlocks(const RouteProblem& p, int max_warps) {
    constexpr size_t kSharedBytes = 48 * 1024;  // granted on every device
    const size_t bytes_per_warp = (p.num_experts + p.num_groups) * sizeof(float);
    if (bytes_per_warp > kSharedBytes) {
      throw std::invalid_argument("logits must have at most " + std::to_string(kSharedBytes / sizeof(float)) +
                                  " experts and groups together on a GPU, got " +
                                  std::to_string(p.num_experts) + " experts in " +
                                  std::to_string(p.num_groups) + " groups");
    }
    warps = static_cast<int>(std::min<size_t>(max_warps, kSharedBytes / bytes_per_warp));
    shared_bytes = warps * bytes_per_warp;
    blocks = divide_up(p.num_tokens, warps);
  }

  int warps;
  size_t shared_bytes;
  int64_t blocks;
};

}  // namespace cuda
}  // namespace paddle_moe
