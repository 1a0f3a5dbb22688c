// The whole layer on small integers against the naive loop, where every result must be exact, under every
// schedule; the call that routes too against the three calls; combine and gate against
// their sums in the documented order; what a launch that is refused says; how many
// launches a call takes.
#include <cmath>
#include <stdexcept>

#include "cuda/combine.h"
#include "emulated.h"

using namespace paddle_moe;

namespace {

void check(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
           ::Layout layout, bool permuted, int64_t chunk_size = 0) {
  Layer layer(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted);
  layer.arguments.chunk_size = chunk_size;
  const int wrong = count_differences(layer, run_emulated(resolve(layer.arguments)));
  CHECK(wrong == 0, "%d values differ for T=%d H=%d I=%d E=%d K=%d %s layout %d permuted %d", wrong, tokens,
        hidden, inter, experts, top_k, dtype_name(dtype), static_cast<int>(layout), permuted);
}

void small_shapes() {
  Random random(1);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (bool permuted : {false, true}) {
      for (int hidden : {1, 8, 40, 72, 129}) {
        for (int inter : {1, 8, 24, 65}) {
          check(random, pick(random, 0, 13), hidden, inter, pick(random, 1, 4), pick(random, 1, 2), dtype,
                static_cast<::Layout>(pick(random, 0, 2)), permuted);
        }
      }
    }
  }
}

// More stages than the ring has, more columns than a tile, tiles of 16, 64 and 128 rows and a few more.
void past_block_sizes() {
  Random random(2);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (bool permuted : {false, true}) {
      check(random, 20, 328, 136, 2, 1, dtype, ::Layout::kStacked, permuted);
      check(random, 70, 136, 264, 2, 1, dtype, ::Layout::kList, permuted);
      check(random, 150, 72, 72, 1, 1, dtype, ::Layout::kSeparate, permuted);
      check(random, 150, 37, 41, 1, 1, dtype, ::Layout::kSeparate, permuted);
      check(random, 50, 16, 8, 3, 2, dtype, ::Layout::kList, permuted, 7);
    }
  }
}

void launches() {
  Random random(3);
  const Layer layer(random, 8, 16, 8, 4, 2, DType::kBFloat16, ::Layout::kList, false);
  emulator::num_launches = 0;
  run_emulated(resolve(layer.arguments));
  CHECK(emulator::num_launches == 4, "%d launches", emulator::num_launches);

  RouteProblem route;  // 2^34 tokens: more blocks than a grid may have
  route.num_tokens = int64_t{1} << 34;
  route.num_experts = route.top_k = 1;
  std::string text;
  try {
    cuda::route(route, nullptr, nullptr, nullptr);
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  CHECK(text.find("route_tokens with 2147483648 blocks of 256 threads") != std::string::npos, "'%s'",
        text.c_str());
}

float fraction(Random& random) { return pick(random, -999, 999) / 997.0f; }

// Random numbers, whose sum has other bits in another order. Rows of slots that are not local do not exist.
void check_combine(Random& random, int tokens, int hidden, int top_k, bool weighted) {
  const int slots = tokens * top_k, stride = (hidden + 7) / 8 * 8;
  std::vector<int32_t> position(slots, -1);
  int rows = 0;
  for (int32_t& p : position) {
    if (pick(random, 0, 2) > 0) p = rows++;
  }
  for (int i = 0; i < slots; ++i) std::swap(position[i], position[pick(random, 0, i)]);
  Numbers row(static_cast<size_t>(rows) * stride, std::nanf("")), weight(slots, std::nanf(""));
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < hidden; ++h) row[r * stride + h] = fraction(random);
  }
  for (int i = 0; i < slots; ++i) {
    if (position[i] >= 0) weight[i] = fraction(random);
  }
  const Fenced out(sizeof(float) * tokens * hidden);
  cuda::Combine task;
  task.num_tokens = tokens;
  task.hidden_size = hidden;
  task.top_k = top_k;
  task.rows = row.data();
  task.rows_stride = stride;
  task.position = position.data();
  task.router_weights = weighted ? weight.data() : nullptr;
  task.router_weights_dtype = DType::kFloat32;
  task.out = out.get();
  cuda::combine(task, DType::kFloat32, nullptr);
  int wrong = 0;
  for (int t = 0; t < tokens; ++t) {
    for (int h = 0; h < hidden; ++h) {
      float sum = 0;
      for (int slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
        if (position[slot] < 0) continue;
        sum = std::fmaf(weighted ? weight[slot] : 1.0f, row[position[slot] * stride + h], sum);
      }
      wrong += !(get(out.get(), DType::kFloat32, int64_t{t} * hidden + h) == sum);
    }
  }
  CHECK(wrong == 0, "%d sums differ for T=%d H=%d K=%d", wrong, tokens, hidden, top_k);
}

void sums_of_combine() {
  Random random(5);
  emulator::order = emulator::Order::kRandom;
  for (int top_k = 1; top_k <= 9; ++top_k) {
    check_combine(random, 7, 20, top_k, true);
    check_combine(random, 65, 8, top_k, false);
  }
  check_combine(random, 2, 1000, 3, true);
  check_combine(random, 70, 2056, 2, true);
}

// Chains of 256 multiply-adds, added in order, by the tile and by one and by four tokens to a block.
void sums_of_gate() {
  constexpr int kTokens = 130, kHidden = 600, kExperts = 40;
  Random random(6);
  Numbers hidden, weight;
  for (int i = 0; i < kTokens * kHidden; ++i) hidden.push_back(fraction(random));
  for (int i = 0; i < kHidden * kExperts; ++i) weight.push_back(fraction(random));
  Numbers expected;
  for (int t = 0; t < kTokens; ++t) {
    for (int e = 0; e < kExperts; ++e) {
      float total = 0;
      for (int first = 0; first < kHidden; first += 256) {
        float sum = 0;
        for (int k = first; k < std::min(first + 256, kHidden); ++k) {
          sum = std::fmaf(hidden[t * kHidden + k], weight[k * kExperts + e], sum);
        }
        total += sum;
      }
      expected.push_back(total);
    }
  }
  for (int tokens : {1, 3, 33, 130}) {
    const GateProblem gate = resolve_gate({hidden.data(), DType::kFloat32, {tokens, kHidden}, {}},
                                          {weight.data(), DType::kFloat32, {kHidden, kExperts}, {}});
    const Fenced logits(sizeof(float) * tokens * kExperts);
    cuda::gate(gate, nullptr, reinterpret_cast<float*>(logits.get()));
    CHECK(std::memcmp(logits.get(), expected.data(), sizeof(float) * tokens * kExperts) == 0,
          "the logits of %d tokens differ", tokens);
  }
}

struct Routed {
  Routed(const Layer& layer, int experts)
      : logits(4ull * layer.tokens * experts),
        ids(4ull * layer.tokens * layer.top_k),
        weights(ids_bytes(layer)),
        out(2ull * layer.tokens * layer.hidden) {}
  static size_t ids_bytes(const Layer& layer) { return 4ull * layer.tokens * layer.top_k; }

  Fenced logits, ids, weights, out;
};

// Routing in the kernel that sorts gives the bits of the separate kernels: also in the workspace that the
// call before has left, and where some of the experts are not local.
void check_routed(Random& random, int tokens, int local_experts, int experts, int top_k, int launches) {
  Layer layer(random, tokens, 8, 8, local_experts, top_k, DType::kBFloat16, ::Layout::kStacked, false);
  Numbers weight;
  for (int i = 0; i < layer.hidden * experts; ++i) weight.push_back(pick(random, -9, 9) / 8.0f);
  const GateProblem gate = resolve_gate(layer.arguments.hidden_states,
                                        {weight.data(), DType::kFloat32, {layer.hidden, experts}, {}});
  auto route_of = [&](const Routed& r) {
    RouteOptions options;
    options.top_k = top_k;
    return resolve_route({r.logits.get(), DType::kFloat32, {tokens, experts}, {}}, {}, options);
  };
  auto problem_of = [&](const Routed& r) {
    layer.arguments.routing_table = {r.ids.get(), DType::kInt32, {tokens, top_k}, {}};
    layer.arguments.router_weights = {r.weights.get(), DType::kFloat32, {tokens, top_k}, {}};
    return resolve(layer.arguments);
  };
  const Routed apart(layer, experts);
  const Problem problem = problem_of(apart);
  const Fenced workspace(cuda::workspace_size(problem));
  cuda::gate(gate, nullptr, reinterpret_cast<float*>(apart.logits.get()));
  cuda::route(route_of(apart), nullptr, reinterpret_cast<int32_t*>(apart.ids.get()),
              reinterpret_cast<float*>(apart.weights.get()));
  cuda::mixture_of_experts(problem, nullptr, workspace.get(), apart.out.get(), nullptr);
  std::fill_n(workspace.get(), cuda::workspace_size(problem), 0xff);
  for (int call = 0; call < 2; ++call) {
    const Routed together(layer, experts);
    emulator::num_launches = 0;
    cuda::fused_gate_moe(gate, route_of(together), problem_of(together), nullptr, workspace.get(),
                         together.out.get(), nullptr);
    CHECK(emulator::num_launches == launches, "%d launches instead of %d for T=%d E=%d K=%d",
          emulator::num_launches, launches, tokens, experts, top_k);
    auto same = [](const Fenced& one, const Fenced& other, size_t bytes) {
      return std::memcmp(one.get(), other.get(), bytes) == 0;
    };
    const size_t ids_bytes = Routed::ids_bytes(layer);
    CHECK(same(together.logits, apart.logits, 4ull * tokens * experts) &&
              same(together.ids, apart.ids, ids_bytes) && same(together.weights, apart.weights, ids_bytes) &&
              same(together.out, apart.out, 2ull * tokens * layer.hidden),
          "call %d routed other bits for T=%d E=%d K=%d", call, tokens, experts, top_k);
  }
}

void routed() {
  Random random(4);
  check_routed(random, 0, 2, 3, 1, 0);
  on_every_schedule([&] {
    check_routed(random, 1, 3, 5, 2, 5);
    check_routed(random, 40, 5, 8, 2, 5);  // two blocks route, the last warps of the second nothing
  });
  emulator::order = emulator::Order::kRandom;
  check_routed(random, 140, 40, 600, 3, 5);    // 20 warps of a block have room for their keys; gate_tiles
  check_routed(random, 2, 6500, 6500, 1, 25);  // the sort needs more shared memory than the keys
  check_routed(random, 512, 16, 16, 16, 5);
  check_routed(random, 513, 16, 16, 16, 8);
}

}  // namespace

int main() {
  small_shapes();
  on_every_schedule(past_block_sizes);
  launches();
  sums_of_combine();
  on_every_schedule(sums_of_gate);
  routed();
  return finish();
}
