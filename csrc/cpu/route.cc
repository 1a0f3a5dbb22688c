// Scores, selects and weighs the experts of each token. Scalar: a row of logits is small beside the experts'
// GEMMs.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/threads.h"
#include "moe.h"

namespace paddle_moe {
namespace cpu {
namespace {

constexpr int64_t kTokensPerTask = 32;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The `count` best of keys[0 .. size-1], best first, equal keys in the order of their index.
class Best {
 public:
  void find(const float* keys, int64_t size, int64_t count) {
    index_.clear();
    for (int64_t i = 0; i < size; ++i) {
      const bool full = static_cast<int64_t>(index_.size()) == count;
      if (full && !(keys[i] > keys[index_.back()])) continue;
      if (full) index_.pop_back();
      auto place = index_.end();
      while (place != index_.begin() && keys[i] > keys[place[-1]]) --place;
      index_.insert(place, static_cast<int32_t>(i));
    }
  }
  const std::vector<int32_t>& index() const { return index_; }

 private:
  std::vector<int32_t> index_;
};

class Router {
 public:
  explicit Router(const RouteProblem& problem)
      : p_(problem), scores_(problem.num_experts), keys_(problem.num_experts) {}

  void route(const float* logits, int32_t* ids, float* weights) {
    if (!score(logits) || !select(logits, ids) || !weigh(ids, weights)) {
      std::fill_n(ids, p_.top_k, -1);
      std::fill_n(weights, p_.top_k, 0.0f);
    }
  }

  // The gradient of the logits from that of the weights. False: ids are not what route() returns.
  bool backward(const float* logits, const int32_t* ids, const float* grad, float* grad_logits) {
    std::fill_n(grad_logits, p_.num_experts, 0.0f);
    if (ids[0] < 0) return std::all_of(ids, ids + p_.top_k, [](int32_t id) { return id < 0; });
    if (!std::all_of(ids, ids + p_.top_k, [&](int32_t id) { return 0 <= id && id < p_.num_experts; }))
      return false;
    score(logits);
    parts_.resize(p_.top_k);
    const float divisor = find_parts(ids, parts_.data());
    const bool shared = p_.scoring == Scoring::kSoftmaxTopK || p_.renormalize;
    float inner = 0.0f;  // what the weights' common divisor takes away
    for (int64_t i = 0; shared && i < p_.top_k; ++i) inner += grad[i] * (parts_[i] / divisor);
    float total = 0.0f;
    for (int64_t i = 0; i < p_.top_k; ++i) {
      // That of the logarithm of the score: one over a tiny divisor alone would overflow.
      const float by_log = p_.scaling_factor * ((grad[i] - inner) * (parts_[i] / divisor));
      grad_logits[ids[i]] += p_.scoring == Scoring::kSigmoid ? by_log * (1.0f - parts_[i]) : by_log;
      total += by_log;
    }
    for (int64_t e = 0; p_.scoring == Scoring::kSoftmax && e < p_.num_experts; ++e)
      grad_logits[e] -= scores_[e] * total;
    return true;
  }

 private:
  // Each of the three steps returns false when it meets something that is not a number.
  bool score(const float* logits) {
    const int64_t n = p_.num_experts;
    if (p_.scoring == Scoring::kSoftmax) {
      float largest = kMinusInfinity;
      for (int64_t e = 0; e < n; ++e) largest = std::max(largest, logits[e]);
      float sum = 0.0f;
      for (int64_t e = 0; e < n; ++e) sum += scores_[e] = std::exp(logits[e] - largest);
      for (int64_t e = 0; e < n; ++e) scores_[e] /= sum;
      return sum == sum;
    }
    bool valid = true;
    for (int64_t e = 0; e < n; ++e) {
      scores_[e] = p_.scoring == Scoring::kSigmoid ? 1.0f / (1.0f + std::exp(-logits[e])) : logits[e];
      valid &= logits[e] == logits[e];
    }
    return valid;
  }

  bool select(const float* logits, int32_t* ids) {
    // Softmax and sigmoid keep the order of the logits; ranking the logits themselves avoids ties made by
    // rounding.
    const bool plain = p_.correction_bias == nullptr && p_.num_groups == 1;
    bool valid = true;
    for (int64_t e = 0; e < p_.num_experts; ++e) {
      keys_[e] = plain ? logits[e] : scores_[e] + (p_.correction_bias ? p_.correction_bias[e] : 0.0f);
      valid &= keys_[e] == keys_[e];
    }
    if (!valid) return false;
    if (p_.num_groups > 1) mask_groups();
    best_.find(keys_.data(), p_.num_experts, p_.top_k);
    std::copy(best_.index().begin(), best_.index().end(), ids);
    return true;
  }

  void mask_groups() {
    const int64_t size = p_.num_experts / p_.num_groups;
    group_keys_.resize(p_.num_groups);
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      float first = kMinusInfinity, second = kMinusInfinity;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        second = std::max(second, std::min(first, keys_[e]));
        first = std::max(first, keys_[e]);
      }
      const float key = p_.group_score == GroupScore::kTop2Sum && size > 1 ? first + second : first;
      group_keys_[g] = key == key ? key : kMinusInfinity;  // opposite infinities: the group loses
    }
    best_.find(group_keys_.data(), p_.num_groups, p_.topk_groups);
    kept_.assign(p_.num_groups, false);
    for (const int32_t g : best_.index()) kept_[g] = true;
    for (int64_t e = 0; e < p_.num_experts; ++e) {
      if (!kept_[e / size]) keys_[e] = p_.group_mask_fill;
    }
  }

  // A weight is parts[i] / (what this returns) * scaling_factor.
  float find_parts(const int32_t* ids, float* parts) const {
    const int64_t k = p_.top_k;
    float sum = 0.0f;
    if (p_.scoring == Scoring::kSoftmaxTopK) {
      float largest = kMinusInfinity;
      for (int64_t i = 0; i < k; ++i) largest = std::max(largest, scores_[ids[i]]);
      for (int64_t i = 0; i < k; ++i) sum += parts[i] = std::exp(scores_[ids[i]] - largest);
      return sum;
    }
    for (int64_t i = 0; i < k; ++i) sum += parts[i] = scores_[ids[i]];
    const float divisor = p_.renormalize ? sum + p_.renormalize_eps : 1.0f;
    return divisor == 0.0f ? 1.0f : divisor;  // 0: all parts are, and so are the weights
  }

  bool weigh(const int32_t* ids, float* weights) const {
    const float sum = find_parts(ids, weights);
    for (int64_t i = 0; i < p_.top_k; ++i) weights[i] = weights[i] / sum * p_.scaling_factor;
    return sum == sum;
  }

  const RouteProblem& p_;
  std::vector<float> scores_, keys_, group_keys_, parts_;
  std::vector<bool> kept_;
  Best best_;
};

template <class Function>
void for_tokens(const RouteProblem& problem, int num_threads, const Function& function) {
  const PlainFloats plain;
  const int64_t num_tasks = (problem.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(num_threads, num_tasks)), [&](int) {
    Router router(problem);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      const int64_t end = std::min(problem.num_tokens, (i + 1) * kTokensPerTask);
      for (int64_t t = i * kTokensPerTask; t < end; ++t) function(&router, t);
    }
  });
}

}  // namespace

void route(const RouteProblem& problem, int num_threads, int32_t* routing_table, float* router_weights) {
  for_tokens(problem, num_threads, [&](Router* router, int64_t t) {
    router->route(problem.logits + t * problem.num_experts, routing_table + t * problem.top_k,
                  router_weights + t * problem.top_k);
  });
}

void route_backward(const RouteBackwardProblem& problem, int num_threads, float* grad_logits) {
  const RouteProblem& p = problem.forward;
  for_tokens(p, num_threads, [&](Router* router, int64_t t) {
    if (!router->backward(p.logits + t * p.num_experts, problem.routing_table + t * p.top_k,
                          problem.grad_router_weights + t * p.top_k, grad_logits + t * p.num_experts)) {
      throw std::invalid_argument("routing_table must be what route() returned, ids between 0 and " +
                                  std::to_string(p.num_experts - 1) +
                                  " or a row of -1, got something else in row " + std::to_string(t) +
                                  "; drop slots after route, in a copy of the table");
    }
  });
}

}  // namespace cpu
}  // namespace paddle_moe
