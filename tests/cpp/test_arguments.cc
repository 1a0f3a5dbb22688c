// The argument checker: what it refuses, in which words, and what it infers while sizes are unknown.
#include <functional>
#include <limits>
#include <stdexcept>

#include "check.h"
#include "layer.h"

using paddle_moe::Arguments;
using paddle_moe::DType;
using paddle_moe::RouteOptions;
using paddle_moe::Tensor;

namespace {

// `call` must throw a std::invalid_argument whose text starts with the argument's name and holds every word
// of `words`.
void refuses(const char* argument, std::vector<const char*> words, const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    const std::string text = error.what();
    CHECK(text.rfind(argument, 0) == 0, "expected an error about %s, got: %s", argument, error.what());
    for (const char* word : words)
      CHECK(text.find(word) != std::string::npos, "no '%s' in: %s", word, error.what());
    return;
  }
  CHECK(false, "%s was accepted", argument);
}

void refuses(const Layer& layer, const char* argument, std::vector<const char*> words,
             const std::function<void(Arguments&)>& spoil) {
  refuses(argument, words, [&] {
    Arguments arguments = layer.arguments;
    spoil(arguments);
    paddle_moe::resolve(arguments);
  });
}

void experts(const Layer& l) {  // T=6 H=10 I=4 E=3 K=2, fused list
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max(), kMin = std::numeric_limits<int64_t>::min();
  refuses(l, "hidden_states", {"[T, H]", "[6]"}, [](Arguments& a) { a.hidden_states.shape = {6}; });
  refuses(l, "hidden_states", {"float32", "int32"},
          [](Arguments& a) { a.hidden_states.dtype = DType::kInt32; });
  refuses(l, "routing_table", {"[6, 2]", "[5, 2]"}, [](Arguments& a) { a.routing_table.shape = {5, 2}; });
  refuses(l, "routing_table", {"int32", "float32"},
          [](Arguments& a) { a.routing_table.dtype = DType::kFloat32; });
  refuses(l, "routing_table", {"K >= 1"},
          [](Arguments& a) { a.routing_table.shape = a.router_weights.shape = {6, 0}; });
  refuses(l, "routing_table", {"contiguous"}, [](Arguments& a) { a.routing_table.strides = {1, 6}; });
  refuses(l, "router_weights", {"[6, 2]", "[6, 3]"}, [](Arguments& a) { a.router_weights.shape = {6, 3}; });
  refuses(l, "router_weights", {"float32", "float16"},
          [](Arguments& a) { a.router_weights.dtype = DType::kFloat16; });
  refuses(l, "gate_up_weights", {"empty"}, [](Arguments& a) { a.gate_up_weights.clear(); });
  refuses(l, "gate_up_weights", {"3", "6", "2 tensors"}, [](Arguments& a) { a.gate_up_weights.pop_back(); });
  refuses(l, "gate_up_weights[2]", {"[10, 8]", "[10, 7]"},
          [](Arguments& a) { a.gate_up_weights[2].shape = {10, 7}; });
  refuses(l, "gate_up_weights[1]", {"float32", "bfloat16"},
          [](Arguments& a) { a.gate_up_weights[1].dtype = DType::kBFloat16; });
  refuses(l, "down_weights[0]", {"[10, 10]", "[4, 10]", "permuted_weights=False"},
          [](Arguments& a) { a.permuted_weights = true; });
  refuses(l, "down_weights", {"empty"}, [](Arguments& a) { a.down_weights.clear(); });
  refuses(l, "down_weights[0]", {"[I, H]"}, [](Arguments& a) { a.down_weights[0].shape = {40}; });
  refuses(l, "down_weights[1]", {"[4, 10]", "[5, 10]"},
          [](Arguments& a) { a.down_weights[1].shape = {5, 10}; });
  refuses(l, "gate_up_bias", {"3", "2 tensors"},
          [](Arguments& a) { a.gate_up_bias.resize(2, {a.hidden_states.data, DType::kFloat32, {8}, {}}); });
  refuses(l, "down_bias[2]", {"[10]", "[9]"}, [](Arguments& a) {
    a.down_bias.resize(3, {a.hidden_states.data, DType::kFloat32, {10}, {}});
    a.down_bias[2].shape = {9};
  });
  refuses(l, "experts_min", {"-1"}, [](Arguments& a) { a.experts_min = -1; });
  for (int64_t last : {int64_t{1}, int64_t{3}, int64_t{-1}, kMax, kMin + 1}) {
    refuses(l, "experts_max", {"inclusive"}, [&](Arguments& a) { a.experts_max = last; });
  }
  refuses(l, "experts_m", {}, [](Arguments& a) { a.experts_min = 3, a.experts_max = kMin + 1; });
  refuses(l, "experts_min", {},
          [](Arguments& a) { a.experts_min = kMax; });  // the last expert would have no id
  refuses(l, "chunk_size", {"-1"}, [](Arguments& a) { a.chunk_size = -1; });
  // Sizes whose products would not fit into 64 bits, or their indices into 32. No memory stands behind them:
  // there is no token, or neighbours are one element.
  for (int64_t k : {kMax, int64_t{1} << 60, int64_t{1} << 31}) {
    refuses(l, "routing_table", {}, [&](Arguments& a) {
      a.hidden_states.shape[0] = 0;
      a.routing_table.shape = a.router_weights.shape = {0, k};
    });
  }
  refuses(l, "routing_table", {"split the tokens"}, [](Arguments& a) {
    a.hidden_states.shape[0] = a.routing_table.shape[0] = a.router_weights.shape[0] = int64_t{1} << 44;
  });
  refuses(l, "hidden_states", {"elements"},
          [](Arguments& a) { a.hidden_states.shape[0] = int64_t{1} << 60; });
  for (int64_t inter : {kMax, int64_t{1} << 62, int64_t{1} << 46}) {
    refuses(l, "gate_up_weights[0]", {"elements"},
            [&](Arguments& a) { a.gate_up_weights[0].shape[1] = inter; });
    refuses(l, "down_weights[0]", {"elements"}, [&](Arguments& a) { a.down_weights[0].shape[0] = inter; });
  }
  const auto stacked = [](Arguments& a, int64_t num_experts, int64_t inter) {
    a.gate_up_weights = {{a.hidden_states.data, DType::kFloat32, {num_experts, 10, 2 * inter}, {0, 0, 0}}};
    a.down_weights = {{a.hidden_states.data, DType::kFloat32, {num_experts, inter, 10}, {0, 0, 0}}};
  };
  refuses(l, "gate_up_weights", {"elements"}, [&](Arguments& a) { stacked(a, int64_t{1} << 60, 4); });
  refuses(l, "gate_up_weights", {"E_l"}, [&](Arguments& a) { stacked(a, int64_t{1} << 32, 4); });
  refuses(l, "gate_up_weights", {"E_l"}, [](Arguments& a) {  // a list of large ones
    for (Tensor& t : a.gate_up_weights) t = {t.data, t.dtype, {10, int64_t{1} << 44}, {0, 0}};
    for (Tensor& t : a.down_weights) t = {t.data, t.dtype, {int64_t{1} << 43, 10}, {0, 0}};
  });
  for (const char* name :
       {"", "swish", "SILU", "silu ", "swigluoai(1)", "swigluoai(1,2", "swigluoai(1,2)x"}) {
    refuses(l, "activation", {"silu, gelu", name}, [&](Arguments& a) { a.activation = name; });
  }
  for (const char* name : {"swigluoai(nan,7)", "swigluoai(1,0)", "swigluoai(1,-2)", "swigluoai(1,nan)"}) {
    refuses(l, "activation", {"limit", name}, [&](Arguments& a) { a.activation = name; });
  }
}

void accepted(const Layer& l) {
  Arguments a = l.arguments;
  a.experts_min = 7;
  a.experts_max = 9;
  CHECK(paddle_moe::resolve(a).first_expert == 7, "experts_min");
  a.experts_min = std::numeric_limits<int64_t>::max() - 10;
  a.experts_max = std::numeric_limits<int64_t>::max() - 8;
  CHECK(paddle_moe::resolve(a).num_experts() == 3, "ids near the largest there is");
  a = l.arguments;
  a.activation = "swigluoai(1.5, 2.5)";
  const paddle_moe::ActivationSpec spec = paddle_moe::resolve(a).activation;
  CHECK(spec.alpha == 1.5f && spec.limit == 2.5f, "got %g, %g", spec.alpha, spec.limit);
  // No elements, so no strides can be wrong.
  a = l.arguments;
  a.hidden_states.shape = {0, 10};
  a.routing_table.shape = a.router_weights.shape = {0, 2};
  a.hidden_states.strides = a.routing_table.strides = a.router_weights.strides = {0, 0};
  CHECK(paddle_moe::resolve(a).num_tokens == 0, "zero tokens");
}

// As while a static graph is built: no data, and any size may be unknown.
void unknown_sizes(const Layer& l) {
  Arguments a = l.arguments;
  for (Tensor* t : {&a.hidden_states, &a.routing_table, &a.router_weights}) {
    t->data = nullptr;
    t->shape[0] = -1;
  }
  paddle_moe::Problem p = paddle_moe::resolve(a);
  CHECK(p.num_tokens == -1 && p.hidden_size == 10 && p.intermediate_size == 4 && p.top_k == 2, "T unknown");
  a.routing_table.shape[0] = 6;
  CHECK(paddle_moe::resolve(a).num_tokens == 6, "T from routing_table");
  a.hidden_states.shape = {-1, -1};
  CHECK(paddle_moe::resolve(a).hidden_size == 10, "H from down_weights");
  a.router_weights.shape = {7, 2};
  refuses("router_weights", {"[6, 2]", "[7, 2]"}, [&] { paddle_moe::resolve(a); });
}

void router() {
  const Tensor logits{nullptr, DType::kFloat32, {5, 12}, {}};
  const auto spoiled = [&](const char* argument, const std::function<void(RouteOptions&)>& spoil) {
    RouteOptions options;
    spoil(options);
    refuses(argument, {}, [&] { paddle_moe::resolve_route(logits, {}, options); });
  };
  const float inf = std::numeric_limits<float>::infinity();
  spoiled("top_k", [](RouteOptions& o) { o.top_k = 0; });
  spoiled("top_k", [](RouteOptions& o) { o.top_k = 13; });
  spoiled("top_k",
          [](RouteOptions& o) { o.top_k = 4, o.num_groups = 4; });  // three experts in the one group kept
  spoiled("scoring", [](RouteOptions& o) { o.scoring = "max"; });
  spoiled("num_groups", [](RouteOptions& o) { o.num_groups = 5; });
  spoiled("num_groups", [](RouteOptions& o) { o.num_groups = 0; });
  spoiled("topk_groups", [](RouteOptions& o) { o.topk_groups = 2; });
  spoiled("group_score", [](RouteOptions& o) { o.group_score = "mean"; });
  spoiled("group_mask_fill", [](RouteOptions& o) { o.group_mask_fill = 1; });
  spoiled("group_mask_fill", [&](RouteOptions& o) { o.group_mask_fill = inf; });
  spoiled("renormalize_eps", [](RouteOptions& o) { o.renormalize_eps = -1; });
  spoiled("scaling_factor", [&](RouteOptions& o) { o.scaling_factor = inf; });
  refuses("logits", {"[T, E]", "[5]"},
          [] { paddle_moe::resolve_route({nullptr, DType::kFloat32, {5}, {}}, {}, {}); });
  refuses("logits", {"float32"},
          [] { paddle_moe::resolve_route({nullptr, DType::kFloat16, {5, 12}, {}}, {}, {}); });
  refuses("logits", {"int32"},
          [] { paddle_moe::resolve_route({nullptr, DType::kFloat32, {0, int64_t{1} << 31}, {}}, {}, {}); });
  refuses("logits", {"elements"}, [] {
    paddle_moe::resolve_route({nullptr, DType::kFloat32, {int64_t{1} << 40, int64_t{1} << 30}, {}}, {}, {});
  });
  refuses("hidden_states", {"rows"}, [] {
    paddle_moe::resolve_gate({nullptr, DType::kFloat32, {int64_t{1} << 40, 1}, {}},
                             {nullptr, DType::kFloat32, {1, int64_t{1} << 24}, {}});
  });
  refuses("correction_bias", {"[12]", "[11]"},
          [&] { paddle_moe::resolve_route(logits, {nullptr, DType::kFloat32, {11}, {}}, {}); });
  refuses("gate_weight", {"[8, ?]", "[9, 4]"}, [] {
    paddle_moe::resolve_gate({nullptr, DType::kFloat32, {5, 8}, {}}, {nullptr, DType::kFloat32, {9, 4}, {}});
  });
}

}  // namespace

int main() {
  Random random(1);
  const Layer layer(random, 6, 10, 4, 3, 2, DType::kFloat32, Layout::kList, false);
  experts(layer);
  accepted(layer);
  unknown_sizes(layer);
  router();
  return finish();
}
