// Checks what a caller passed; of the experts' weights expert_weights.cc does.
#include <algorithm>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <utility>

#include "checks.h"
#include "chunks.h"
#include "expert_weights.h"
#include "moe.h"

namespace paddle_moe {
namespace {

constexpr int64_t kMaxExperts = std::numeric_limits<int32_t>::max();  // their ids are kept as int32

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

void expect_float(const Name& name, const Tensor& tensor) {
  if (tensor.dtype == DType::kUnknown || is_float(tensor.dtype)) return;
  fail(name, " must have the dtype float32, bfloat16 or float16, got ", dtype_text(tensor));
}

// hidden_states and the routing: T, K, H as far as known, and the dtype.
void resolve_tokens(const Arguments& a, Problem* p) {
  expect_rank("hidden_states", a.hidden_states, 2, "[T, H]");
  expect_rank("routing_table", a.routing_table, 2, "[T, K]");
  expect_rank("router_weights", a.router_weights, 2, "[T, K]");
  expect_float("hidden_states", a.hidden_states);
  p->dtype = a.hidden_states.dtype;
  expect_dtype("routing_table", a.routing_table, DType::kInt32, DType::kInt64);
  expect_dtype("router_weights", a.router_weights, DType::kFloat32, p->dtype);

  p->num_tokens = a.hidden_states.shape[0];
  unify(&p->num_tokens, a.routing_table.shape[0]);
  unify(&p->num_tokens, a.router_weights.shape[0]);
  p->top_k = a.routing_table.shape[1];
  unify(&p->top_k, a.router_weights.shape[1]);
  if (p->top_k == 0)
    fail("routing_table must have at least one column (K >= 1), got the shape ",
         shape_text(a.routing_table.shape));
  if (p->top_k > kMaxChunkSlots)
    fail("routing_table must have at most ", kMaxChunkSlots, " columns, got the shape ",
         shape_text(a.routing_table.shape));
  expect_shape("routing_table", a.routing_table, {p->num_tokens, p->top_k}, "[T, K]");
  expect_shape("router_weights", a.router_weights, {p->num_tokens, p->top_k}, "[T, K]");
  p->hidden_size = a.hidden_states.shape[1];
}

// H, which hidden_states may not know yet, and I.
void resolve_sizes(const Arguments& a, const ExpertForms& forms, Problem* p) {
  const Tensor &gate_up = a.gate_up_weights[0], &down = a.down_weights[0];
  unify(&p->hidden_size, forms.down.outputs(down));
  unify(&p->hidden_size, forms.gate_up.inputs(gate_up));
  p->intermediate_size = forms.down.inputs(down);
  const bool from_down = known(p->intermediate_size);
  unify(&p->intermediate_size, forms.gate_up.outputs(gate_up));
  if (p->hidden_size > 0 && forms.gate_up.inputs_of_row > 1 &&
      p->hidden_size % forms.gate_up.inputs_of_row != 0)
    fail("hidden_states must have a multiple of ", forms.gate_up.inputs_of_row,
         " columns with prepacked weights", forms.dtype == DType::kUnknown ? "" : " of the dtype ",
         forms.dtype == DType::kUnknown ? "" : dtype_name(forms.dtype), ", got ", p->hidden_size);
  if (p->hidden_size == 0)
    fail("hidden_states must have at least one column (H >= 1), got the shape ",
         shape_text(a.hidden_states.shape));
  if (p->intermediate_size == 0) {
    fail(from_down ? "down_weights" : "gate_up_weights",
         " must have an intermediate dimension I >= 1, got the shape ",
         shape_text(from_down ? down.shape : gate_up.shape));
  }
  if (forms.num_experts > kMaxExperts || !fits({forms.num_experts, p->hidden_size, 2 * p->intermediate_size}))
    fail("gate_up_weights must have at most ", kMaxElements, " elements in all, of at most ", kMaxExperts,
         " experts, got E_l = ", forms.num_experts, ", H = ", p->hidden_size, ", I = ", p->intermediate_size);
  const int64_t most_slots = kMaxElements / std::max<int64_t>(1, p->hidden_size + p->intermediate_size);
  if (most_slots / std::max<int64_t>(1, p->num_tokens) < p->top_k) {
    fail("routing_table must have at most ", most_slots, " elements where H + I is ",
         p->hidden_size + p->intermediate_size, " (a T of 0 counts as 1), got the shape ",
         shape_text(a.routing_table.shape), "; split the tokens among several calls");
  }
}

void resolve_options(const Arguments& a, int64_t num_experts, Problem* p) {
  const int64_t most = std::numeric_limits<int64_t>::max() - std::max<int64_t>(num_experts, 0);
  if (a.experts_min < 0 || a.experts_min > most)
    fail("experts_min must be between 0 and ", most, ", got ", a.experts_min);
  if (a.experts_max != kLastExpertPassed && known(num_experts) &&
      a.experts_max != a.experts_min + num_experts - 1) {
    fail("experts_max must be experts_min + ", num_experts, " - 1 = ", a.experts_min + num_experts - 1,
         " (the range is inclusive and ", num_experts,
         " experts were passed), got experts_min=", a.experts_min, ", experts_max=", a.experts_max);
  }
  if (a.chunk_size < 0) fail("chunk_size must be at least 0 (0: chosen), got ", a.chunk_size);
  p->first_expert = a.experts_min;
  p->chunk_size = a.chunk_size;
  p->activation = parse_activation(a.activation);
}

Matrix in_out_matrix(const Tensor& array) { return {array.data, stride(array, 0), stride(array, 1)}; }

BiasForm gate_up_bias_form(int64_t num_experts, int64_t inter) {
  return {"gate_up_bias", "I", num_experts, 2, inter};
}

BiasForm down_bias_form(int64_t num_experts, int64_t hidden) {
  return {"down_bias", "H", num_experts, 1, hidden};
}

void check_biases(const Arguments& a, int64_t num_experts, const Problem& p) {
  gate_up_bias_form(num_experts, p.intermediate_size).check(a.gate_up_bias, p.dtype);
  down_bias_form(num_experts, p.hidden_size).check(a.down_bias, p.dtype);
  if (!a.gate_up_bias.empty() && !a.down_bias.empty())
    expect_dtype("down_bias", a.down_bias[0], a.gate_up_bias[0].dtype);
}

// The parts of every expert, which are null where an array has no data.
std::vector<Expert> find_experts(const Arguments& a, const ExpertForms& forms, const Problem& p) {
  const int64_t hidden = p.hidden_size, inter = p.intermediate_size;
  const BiasForm gate_up_bias = gate_up_bias_form(forms.num_experts, inter);
  const BiasForm down_bias = down_bias_form(forms.num_experts, hidden);
  std::vector<Expert> experts(forms.num_experts);
  for (int64_t e = 0; e < forms.num_experts; ++e) {
    experts[e] = {forms.gate_up.matrix(a.gate_up_weights, e, 0, inter),
                  forms.gate_up.matrix(a.gate_up_weights, e, 1, inter),
                  forms.down.matrix(a.down_weights, e, 0, hidden),
                  gate_up_bias.bias(a.gate_up_bias, e, 0),
                  gate_up_bias.bias(a.gate_up_bias, e, 1),
                  down_bias.bias(a.down_bias, e, 0)};
  }
  return experts;
}

void expect_no_gradients(const char* name, const std::vector<Tensor>& gradients, const std::string& what) {
  for (const Tensor& gradient : gradients) {
    if (gradient.data == nullptr) continue;
    fail(name, " has no gradient where the weights are ", what,
         "; set stop_gradient = True on it, or leave it out of wanted");
  }
}

}  // namespace

ActivationSpec parse_activation(const std::string& text) {
  static const std::pair<const char*, Activation> names[] = {
      {"silu", Activation::kSilu},          {"gelu", Activation::kGelu},
      {"gelu_tanh", Activation::kGeluTanh}, {"relu", Activation::kRelu},
      {"relu2", Activation::kRelu2},        {"selu", Activation::kSelu},
      {"identity", Activation::kIdentity},  {"swigluoai", Activation::kSwigluOai}};
  ActivationSpec spec;
  for (const auto& [name, kind] : names) {
    if (text == name) {
      spec.kind = kind;
      return spec;
    }
  }
  std::istringstream parts(text);
  parts.imbue(std::locale::classic());  // that of the process may want a decimal comma
  std::string name;
  char comma = 0, closing = 0;
  if (std::getline(parts, name, '(') && name == "swigluoai" &&
      parts >> spec.alpha >> comma >> spec.limit >> closing && comma == ',' && closing == ')' &&
      parts.peek() == std::istringstream::traits_type::eof()) {
    if (!(spec.limit > 0)) fail("activation must have a positive limit, got '", text, "'");
    spec.kind = Activation::kSwigluOai;
    return spec;
  }
  fail(
      "activation must be one of silu, gelu, gelu_tanh, relu, relu2, selu, identity, swigluoai, "
      "swigluoai(alpha, limit), got '",
      text, "'");
}

Problem resolve(const Arguments& a) {
  Problem p;
  resolve_tokens(a, &p);
  const ExpertForms forms = find_forms(a, p.dtype);
  const int64_t num_experts = forms.num_experts;
  p.weight_dtype = forms.dtype;
  p.prepacked = forms.prepacked();
  resolve_sizes(a, forms, &p);
  // I is that of down, so down_weights that do not fit would be the fault of gate_up_weights.
  forms.down.check(a.down_weights, p.intermediate_size, p.hidden_size);
  forms.gate_up.check(a.gate_up_weights, p.hidden_size, p.intermediate_size);
  const ScaleForm gate_up_scale("gate_up_scale", forms.gate_up, p.hidden_size, p.intermediate_size);
  const ScaleForm down_scale("down_scale", forms.down, p.intermediate_size, p.hidden_size);
  gate_up_scale.check(a.gate_up_scale, a.gate_up_weights);
  down_scale.check(a.down_scale, a.down_weights);
  check_biases(a, num_experts, p);
  resolve_options(a, num_experts, &p);

  p.experts.resize(std::max<int64_t>(num_experts, 0));
  // Shapes only: nothing to point at yet.
  if ((a.hidden_states.data == nullptr && p.num_tokens != 0) || !known(num_experts)) return p;

  expect_contiguous("hidden_states", a.hidden_states, 1);
  expect_contiguous("routing_table", a.routing_table);
  expect_contiguous("router_weights", a.router_weights);
  p.hidden_states = a.hidden_states.data;
  p.hidden_states_stride = stride(a.hidden_states, 0);
  p.routing_table = a.routing_table.data;
  p.routing_table_dtype = a.routing_table.dtype;
  p.router_weights = a.router_weights.data;
  p.router_weights_dtype = a.router_weights.dtype;
  if (!a.gate_up_bias.empty()) p.bias_dtype = a.gate_up_bias[0].dtype;
  if (!a.down_bias.empty()) p.bias_dtype = a.down_bias[0].dtype;
  p.experts = find_experts(a, forms, p);
  for (int64_t e = 0; is_quantised(p.weight_dtype) && e < num_experts; ++e) {
    p.scales.push_back({gate_up_scale.scale(a.gate_up_scale, e, 0),
                        gate_up_scale.scale(a.gate_up_scale, e, 1), down_scale.scale(a.down_scale, e, 0)});
  }
  return p;
}

BackwardProblem resolve_backward(const Arguments& arguments, const Tensor& grad_out,
                                 const Tensor& pre_activations, const Arguments& gradients) {
  BackwardProblem b;
  b.forward = resolve(arguments);
  const Problem& p = b.forward;
  if (is_quantised(p.weight_dtype) || p.prepacked) {
    const std::string what =
        p.prepacked ? "prepacked" : std::string("quantised, got the dtype ") + dtype_name(p.weight_dtype);
    expect_no_gradients("gate_up_weights", gradients.gate_up_weights, what);
    expect_no_gradients("down_weights", gradients.down_weights, what);
    expect_no_gradients("gate_up_scale", gradients.gate_up_scale, what);
    expect_no_gradients("down_scale", gradients.down_scale, what);
  }
  expect_shape("grad_out", grad_out, {p.num_tokens, p.hidden_size}, "[T, H]");
  expect_dtype("grad_out", grad_out, p.dtype);
  expect_contiguous("grad_out", grad_out, 1);
  b.grad_out = grad_out.data;
  b.grad_out_stride = stride(grad_out, 0);
  if (!pre_activations.shape.empty()) {
    expect_shape("pre_activations", pre_activations, {-1, 2 * p.intermediate_size}, "[R, 2I]");
    expect_dtype("pre_activations", pre_activations, p.dtype);
    expect_contiguous("pre_activations", pre_activations);
    b.pre_activations = pre_activations.data;
    b.saved_rows = pre_activations.shape[0];
  }
  b.hidden_states = const_cast<void*>(gradients.hidden_states.data);
  b.router_weights = const_cast<void*>(gradients.router_weights.data);
  b.experts = find_experts(gradients, find_forms(arguments, p.dtype), p);
  return b;
}

GateProblem resolve_gate(const Tensor& hidden_states, const Tensor& gate_weight) {
  GateProblem p;
  expect_rank("hidden_states", hidden_states, 2, "[T, H]");
  expect_rank("gate_weight", gate_weight, 2, "[H, E]");
  expect_float("hidden_states", hidden_states);
  p.dtype = hidden_states.dtype;
  expect_dtype("gate_weight", gate_weight, DType::kFloat32, p.dtype);
  p.num_tokens = hidden_states.shape[0];
  p.hidden_size = hidden_states.shape[1];
  unify(&p.hidden_size, gate_weight.shape[0]);
  p.num_experts = gate_weight.shape[1];
  expect_shape("gate_weight", gate_weight, {p.hidden_size, -1}, "[H, E]");
  if (p.hidden_size == 0 || p.num_experts == 0) {
    fail("gate_weight must have at least one row and one column, got the shape ",
         shape_text(gate_weight.shape));
  }
  if (!fits({p.num_tokens, p.num_experts})) {
    fail("hidden_states must have at most ", kMaxElements / p.num_experts, " rows where gate_weight has ",
         p.num_experts, " columns, got the shape ", shape_text(hidden_states.shape),
         "; split the tokens among several calls");
  }
  if (gate_weight.data == nullptr) return p;
  expect_contiguous("hidden_states", hidden_states, 1);
  p.hidden_states = hidden_states.data;
  p.hidden_states_stride = stride(hidden_states, 0);
  p.weight = in_out_matrix(gate_weight);
  p.weight_dtype = gate_weight.dtype;
  return p;
}

GateBackwardProblem resolve_gate_backward(const Tensor& hidden_states, const Tensor& gate_weight,
                                          const Tensor& grad_logits, const Tensor& hidden_states_grad,
                                          const Tensor& gate_weight_grad) {
  GateBackwardProblem b;
  b.forward = resolve_gate(hidden_states, gate_weight);
  expect_shape("grad_logits", grad_logits, {b.forward.num_tokens, b.forward.num_experts}, "[T, E]");
  expect_dtype("grad_logits", grad_logits, DType::kFloat32);
  expect_contiguous("grad_logits", grad_logits);
  b.grad_logits = static_cast<const float*>(grad_logits.data);
  b.hidden_states = const_cast<void*>(hidden_states_grad.data);
  if (gate_weight_grad.data) b.weight = in_out_matrix(gate_weight_grad);
  return b;
}

RouteProblem resolve_route(const Tensor& logits, const Tensor& correction_bias, const RouteOptions& o) {
  RouteProblem p;
  expect_rank("logits", logits, 2, "[T, E]");
  expect_dtype("logits", logits, DType::kFloat32);
  p.num_tokens = logits.shape[0];
  p.num_experts = logits.shape[1];
  const int64_t num_experts = p.num_experts;
  if (num_experts == 0)
    fail("logits must have at least one column (E >= 1), got the shape ", shape_text(logits.shape));
  if (num_experts > kMaxExperts)
    fail("logits must have at most ", kMaxExperts, " columns, because ids are int32, got the shape ",
         shape_text(logits.shape));
  if (!correction_bias.shape.empty()) {
    expect_shape("correction_bias", correction_bias, {num_experts}, "[E]");
    expect_dtype("correction_bias", correction_bias, DType::kFloat32);
    expect_contiguous("correction_bias", correction_bias);
  }
  if (o.scoring == "softmax")
    p.scoring = Scoring::kSoftmax;
  else if (o.scoring == "sigmoid")
    p.scoring = Scoring::kSigmoid;
  else if (o.scoring == "softmax_topk")
    p.scoring = Scoring::kSoftmaxTopK;
  else
    fail("scoring must be one of softmax, sigmoid, softmax_topk, got '", o.scoring, "'");
  if (o.group_score == "max")
    p.group_score = GroupScore::kMax;
  else if (o.group_score == "top2_sum")
    p.group_score = GroupScore::kTop2Sum;
  else
    fail("group_score must be one of max, top2_sum, got '", o.group_score, "'");

  if (o.num_groups < 1) fail("num_groups must be at least 1, got ", o.num_groups);
  if (known(num_experts) && num_experts % o.num_groups != 0) {
    fail("num_groups must divide the number of experts ", num_experts, ", got ", o.num_groups);
  }
  if (o.topk_groups < 1 || o.topk_groups > o.num_groups) {
    fail("topk_groups must be between 1 and num_groups = ", o.num_groups, ", got ", o.topk_groups);
  }
  if (o.top_k < 1) fail("top_k must be at least 1, got ", o.top_k);
  if (known(num_experts) && o.top_k > num_experts / o.num_groups * o.topk_groups) {
    fail("top_k must be at most ", num_experts / o.num_groups * o.topk_groups,
         ", the number of experts in the groups that are kept, got ", o.top_k);
  }
  if (o.group_mask_fill != 0.0f && !(std::isinf(o.group_mask_fill) && o.group_mask_fill < 0)) {
    fail("group_mask_fill must be 0.0 or -inf, got ", o.group_mask_fill);
  }
  if (!(o.renormalize_eps >= 0) || std::isinf(o.renormalize_eps)) {
    fail("renormalize_eps must be finite and at least 0, got ", o.renormalize_eps);
  }
  if (!std::isfinite(o.scaling_factor)) fail("scaling_factor must be finite, got ", o.scaling_factor);
  p.top_k = o.top_k;
  p.num_groups = o.num_groups;
  p.topk_groups = o.topk_groups;
  p.group_mask_fill = o.group_mask_fill;
  p.renormalize = o.renormalize;
  p.renormalize_eps = o.renormalize_eps;
  p.scaling_factor = o.scaling_factor;
  if (logits.data == nullptr) return p;
  expect_contiguous("logits", logits);
  p.logits = static_cast<const float*>(logits.data);
  p.correction_bias = static_cast<const float*>(correction_bias.data);
  return p;
}

RouteBackwardProblem resolve_route_backward(const RouteProblem& forward, const Tensor& routing_table,
                                            const Tensor& grad_router_weights) {
  const std::vector<int64_t> shape{forward.num_tokens, forward.top_k};
  expect_shape("routing_table", routing_table, shape, "[T, K]");
  expect_dtype("routing_table", routing_table, DType::kInt32);
  expect_contiguous("routing_table", routing_table);
  expect_shape("grad_router_weights", grad_router_weights, shape, "[T, K]");
  expect_dtype("grad_router_weights", grad_router_weights, DType::kFloat32);
  expect_contiguous("grad_router_weights", grad_router_weights);
  return {forward, static_cast<const int32_t*>(routing_table.data),
          static_cast<const float*>(grad_router_weights.data)};
}

}  // namespace paddle_moe
