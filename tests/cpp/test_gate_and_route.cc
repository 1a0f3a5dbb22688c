// The router's product and selection over every small shape, on every instruction set of this processor.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check.h"
#include "layer.h"

using paddle_moe::DType;

namespace {

void check_gate(Random& random, int tokens, int hidden, int experts, DType dtype, DType weight_dtype) {
  Numbers x(static_cast<size_t>(tokens) * hidden), w(static_cast<size_t>(hidden) * experts);
  std::vector<unsigned char> x_bytes(x.size() * dtype_size(dtype)),
      w_bytes(w.size() * dtype_size(weight_dtype));
  for (size_t i = 0; i < x.size(); ++i) put(x_bytes, dtype, i, x[i] = pick(random, -3, 3));
  for (size_t i = 0; i < w.size(); ++i) put(w_bytes, weight_dtype, i, w[i] = pick(random, -3, 3));
  const paddle_moe::GateProblem problem = paddle_moe::resolve_gate(
      {x_bytes.data(), dtype, {tokens, hidden}, {}}, {w_bytes.data(), weight_dtype, {hidden, experts}, {}});
  const int num_threads = pick(random, 1, 3);
  const Buffer logits = make_buffer(4ull * tokens * experts);
  const Buffer workspace = make_buffer(paddle_moe::cpu::gate_workspace_size(problem, num_threads));
  paddle_moe::cpu::gate(problem, num_threads, workspace.get(), reinterpret_cast<float*>(logits.get()));
  for (int t = 0; t < tokens; ++t) {
    for (int e = 0; e < experts; ++e) {
      float sum = 0;
      for (int h = 0; h < hidden; ++h) sum += x[t * hidden + h] * w[h * experts + e];
      const float got = get(logits.get(), DType::kFloat32, static_cast<int64_t>(t) * experts + e);
      CHECK(got == sum, "gate T=%d H=%d E=%d %s: logit [%d, %d] is %g, expected %g", tokens, hidden, experts,
            paddle_moe::dtype_name(dtype), t, e, got, sum);
    }
  }
}

void gates() {
  Random random(1);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (DType weight_dtype : {DType::kFloat32, dtype}) {
      for (int hidden : {1, 2, 7, 8, 17, 33, 64, 300}) {
        for (int experts : {1, 2, 5, 8, 16, 63, 64, 65, 128, 129, 200}) {
          check_gate(random, pick(random, 0, 20), hidden, experts, dtype, weight_dtype);
        }
      }
      check_gate(random, 500, 9, 7, dtype, weight_dtype);
    }
  }
}

// Logits from a handful of values, so that ties are everywhere; no bias and no groups: the logits alone
// choose.
void routes() {
  Random random(2);
  for (const char* scoring : {"softmax", "sigmoid", "softmax_topk"}) {
    for (int experts : {1, 2, 3, 8, 17, 64, 300}) {
      for (int top_k : {1, 2, 5, experts}) {
        if (top_k > experts) continue;
        const int tokens = pick(random, 0, 70);
        Numbers logits(static_cast<size_t>(tokens) * experts);
        for (float& logit : logits) logit = pick(random, -4, 4);
        for (int t = 5; t < tokens; t += 7)
          logits[t * experts + pick(random, 0, experts - 1)] = std::nanf("");
        paddle_moe::RouteOptions options;
        options.top_k = top_k;
        options.scoring = scoring;
        const auto problem =
            paddle_moe::resolve_route({logits.data(), DType::kFloat32, {tokens, experts}, {}}, {}, options);
        std::vector<int32_t> ids(static_cast<size_t>(tokens) * top_k, -7);
        std::vector<float> weights(ids.size(), -7);
        paddle_moe::cpu::route(problem, pick(random, 1, 3), ids.data(), weights.data());
        for (int t = 0; t < tokens; ++t) {
          const float* row = &logits[t * experts];
          std::vector<int32_t> order(experts);
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
          const bool bad = std::any_of(row, row + experts, [](float x) { return std::isnan(x); });
          double sum = 0;
          for (int k = 0; k < top_k; ++k) {
            const int32_t id = ids[t * top_k + k];
            CHECK(id == (bad ? -1 : order[k]), "%s E=%d K=%d: id [%d, %d] is %d", scoring, experts, top_k, t,
                  k, id);
            sum += weights[t * top_k + k];
          }
          CHECK(std::abs(sum - (bad ? 0 : 1)) < 1e-5, "%s E=%d K=%d: row %d sums to %g", scoring, experts,
                top_k, t, sum);
        }
      }
    }
  }
}

// Every combination of options must keep to the rules, whatever they select: valid ids, none twice.
void groups() {
  Random random(3);
  for (int round = 0; round < 300; ++round) {
    const int num_groups = pick(random, 1, 6), per_group = pick(random, 1, 9),
              experts = num_groups * per_group;
    Numbers logits(20 * experts), bias(experts);
    const float special[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                             NAN, 3e38f};
    for (float& logit : logits)
      logit = pick(random, 0, 30) ? pick(random, -9, 9) * 0.5f : special[pick(random, 0, 3)];
    for (float& b : bias) b = pick(random, -2, 2);
    paddle_moe::RouteOptions options;
    options.scoring = round % 3 == 0 ? "softmax" : round % 3 == 1 ? "sigmoid" : "softmax_topk";
    options.num_groups = num_groups;
    options.topk_groups = pick(random, 1, num_groups);
    options.group_score = round % 2 ? "max" : "top2_sum";
    options.group_mask_fill = round % 4 < 2 ? 0.0f : -std::numeric_limits<float>::infinity();
    options.top_k = pick(random, 1, static_cast<int>(options.topk_groups) * per_group);
    const auto problem = paddle_moe::resolve_route({logits.data(), DType::kFloat32, {20, experts}, {}},
                                                   {bias.data(), DType::kFloat32, {experts}, {}}, options);
    const int top_k = static_cast<int>(options.top_k);
    std::vector<int32_t> ids(20 * top_k);
    std::vector<float> weights(20 * top_k);
    paddle_moe::cpu::route(problem, 1, ids.data(), weights.data());
    for (int t = 0; t < 20; ++t) {
      std::vector<int32_t> row(&ids[t * top_k], &ids[t * top_k] + top_k);
      std::sort(row.begin(), row.end());
      const bool none = row.front() == -1 && row.back() == -1;
      const bool valid =
          row.front() >= 0 && row.back() < experts && std::adjacent_find(row.begin(), row.end()) == row.end();
      CHECK(none || valid, "round %d row %d holds an id twice or out of range", round, t);
      for (int k = 0; k < top_k; ++k)
        CHECK(!std::isnan(weights[t * top_k + k]), "round %d: weight [%d, %d] is NaN", round, t, k);
    }
  }
}

}  // namespace

int main() {
  on_every_isa(gates);
  routes();
  groups();
  return finish();
}
