// Checks what a caller passed and resolves every accepted weight layout to pointers and strides.
#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>
#include <stdexcept>

#include "moe.h"

namespace paddle_moe {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

std::string list_text(const std::vector<int64_t>& numbers, bool negative_is_unknown) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (i) text << ", ";
    if (numbers[i] < 0 && negative_is_unknown)
      text << '?';
    else
      text << numbers[i];
  }
  text << ']';
  return text.str();
}

std::string shape_text(const std::vector<int64_t>& shape) { return list_text(shape, true); }

// Names an argument, or one entry of a list: "down_weights[3]". The text is only made when an error needs it.
struct Name {
  Name(const char* argument, size_t index = 0, size_t size = 1)
      : argument(argument), index(index), size(size) {}
  const char* argument;
  size_t index, size;
};

std::ostream& operator<<(std::ostream& text, const Name& name) {
  text << name.argument;
  if (name.size > 1) text << '[' << name.index << ']';
  return text;
}

bool known(int64_t size) { return size >= 0; }

// The size that two places agree on; -1 while neither knows.
void unify(int64_t* size, int64_t other) {
  if (!known(*size)) *size = other;
}

void expect_shape(const Name& name, const Tensor& tensor, const std::vector<int64_t>& expected,
                  const char* meaning) {
  bool same = tensor.shape.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = !known(expected[i]) || !known(tensor.shape[i]) || expected[i] == tensor.shape[i];
  }
  if (!same) {
    fail(name, " must have the shape ", meaning, " = ", shape_text(expected), ", got ",
         shape_text(tensor.shape));
  }
}

void expect_rank(const Name& name, const Tensor& tensor, size_t rank, const char* meaning) {
  if (tensor.shape.size() != rank) {
    fail(name, " must have ", rank, " dimensions ", meaning, ", got the shape ", shape_text(tensor.shape));
  }
}

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

void expect_dtype(const Name& name, const Tensor& tensor, DType first, DType second = DType::kUnknown) {
  if (tensor.dtype == DType::kUnknown || first == DType::kUnknown) return;
  if (tensor.dtype == first || tensor.dtype == second) return;
  if (second == DType::kUnknown || second == first) {
    fail(name, " must have the dtype ", dtype_name(first), ", got ", dtype_text(tensor));
  }
  fail(name, " must have the dtype ", dtype_name(first), " or ", dtype_name(second), ", got ",
       dtype_text(tensor));
}

int64_t stride(const Tensor& tensor, size_t dim) {
  if (!tensor.strides.empty()) return tensor.strides[dim];
  int64_t result = 1;
  for (size_t i = dim + 1; i < tensor.shape.size(); ++i) result *= tensor.shape[i];
  return result;
}

}  // namespace

bool is_contiguous(const Tensor& tensor, size_t first_dim) {
  if (std::count(tensor.shape.begin(), tensor.shape.end(), 0) != 0) return true;
  int64_t expected = 1;
  for (size_t i = tensor.shape.size(); i-- > first_dim;) {
    if (tensor.shape[i] > 1 && stride(tensor, i) != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

namespace {

void expect_contiguous(const Name& name, const Tensor& tensor, size_t first_dim = 0) {
  if (!is_contiguous(tensor, first_dim)) {
    const char* where = first_dim == 0                         ? ""
                        : first_dim + 1 == tensor.shape.size() ? " in its last dimension"
                                                               : " but for its first dimension";
    fail(name, " must be contiguous", where, ", got the shape ", shape_text(tensor.shape),
         " with the strides ", list_text(tensor.strides, false), "; pass a contiguous copy");
  }
}

const void* offset(const void* data, DType dtype, int64_t elements) {
  if (data == nullptr) return nullptr;
  return static_cast<const char*>(data) + dtype_bytes(dtype, elements);
}

// In elements of a weight.
int64_t stride(const Tensor& tensor, size_t dim, DType dtype) {
  return stride(tensor, dim) * (dtype == DType::kInt4 ? kInt4InWord : 1);
}

// Of prepacked weights, and only of them: [E_l or 1, panels, rows of a panel, a row].
constexpr size_t kPrepackedRank = 4;

// The inputs that a row of a panel holds.
int64_t inputs_of_row(const Tensor& prepacked) { return prepacked.shape[3] == 2 * kPanelColumns ? 2 : 1; }

// The last dimensions of a weight as [in, out], whichever way it is stored.
Matrix as_matrix(const Tensor& weight, bool permuted, DType dtype = DType::kUnknown) {
  const size_t rank = weight.shape.size();
  if (rank == kPrepackedRank) return {weight.data, kPanelColumns, weight.shape[2] * inputs_of_row(weight)};
  const int64_t first = stride(weight, rank - 2, dtype);
  const int64_t second = dtype == DType::kInt4 ? 1 : stride(weight, rank - 1);
  return {weight.data, permuted ? second : first, permuted ? first : second};
}

struct Layout {
  int64_t num_experts;
  bool stacked_gate_up, stacked_down, separate;  // separate: 2*E_l tensors, all gates, then all ups
  bool prepacked;
};

Layout find_layout(const Arguments& a) {
  Layout layout{};
  if (a.down_weights.empty()) fail("down_weights must hold at least one tensor, got an empty list");
  if (a.gate_up_weights.empty()) fail("gate_up_weights must hold at least one tensor, got an empty list");
  layout.prepacked = a.down_weights[0].shape.size() == kPrepackedRank;
  if (layout.prepacked != (a.gate_up_weights[0].shape.size() == kPrepackedRank)) {
    fail("gate_up_weights and down_weights must both be prepacked, which has ", kPrepackedRank,
         " dimensions, or neither, got the shapes ", shape_text(a.gate_up_weights[0].shape), " and ",
         shape_text(a.down_weights[0].shape));
  }
  const size_t stacked_rank = layout.prepacked ? kPrepackedRank : 3;
  layout.stacked_down = a.down_weights.size() == 1 && a.down_weights[0].shape.size() == stacked_rank;
  layout.stacked_gate_up = a.gate_up_weights.size() == 1 && a.gate_up_weights[0].shape.size() == stacked_rank;
  layout.num_experts =
      layout.stacked_down ? a.down_weights[0].shape[0] : static_cast<int64_t>(a.down_weights.size());
  if (layout.num_experts == 0)
    fail("down_weights must hold at least one expert, got the shape ", shape_text(a.down_weights[0].shape));
  if (layout.stacked_gate_up) {
    const int64_t gate_up_experts = a.gate_up_weights[0].shape[0];
    unify(&layout.num_experts, gate_up_experts);
    if (known(gate_up_experts) && gate_up_experts != layout.num_experts) {
      fail("gate_up_weights must hold as many experts as down_weights (", layout.num_experts,
           "), got the stacked shape ", shape_text(a.gate_up_weights[0].shape));
    }
  } else {
    const int64_t count = static_cast<int64_t>(a.gate_up_weights.size());
    if (!known(layout.num_experts))
      fail("down_weights must have a known number of experts when gate_up_weights is a list");
    layout.separate = count == 2 * layout.num_experts;
    if (!layout.separate && count != layout.num_experts) {
      fail("gate_up_weights must hold one tensor per expert (", layout.num_experts,
           ", gate and up side by side), two (", 2 * layout.num_experts,
           ", all gates, then all ups), or one stacked tensor; down_weights holds ", layout.num_experts,
           " experts, got ", count, " tensors");
    }
  }
  return layout;
}

// Few libraries store and load fp8, so its bits are taken as well; none has int4.
DType weight_dtype_of(const Tensor& weight) {
  return weight.dtype == DType::kUInt8   ? DType::kFloat8E4M3
         : weight.dtype == DType::kInt32 ? DType::kInt4
                                         : weight.dtype;
}

void expect_weight_dtype(const Name& name, const Tensor& weight, DType dtype) {
  if (weight_dtype_of(weight) != dtype) expect_dtype(name, weight, dtype);
}

// What `in` elements of a column take in the last dimension of int4 weights.
int64_t int4_words(int64_t in) {
  return known(in) ? (in + kInt4Run - 1) / kInt4Run * (kInt4Run / kInt4InWord) : in;
}

// Checks the expert matrices of one kind. `in`: of the array.
void check_weights(const char* name, const std::vector<Tensor>& weights, bool permuted, DType dtype,
                   int64_t num_experts, bool stacked, int64_t in, int64_t out, const std::string& meaning) {
  std::vector<int64_t> expected = permuted ? std::vector<int64_t>{out, in} : std::vector<int64_t>{in, out};
  if (stacked) expected.insert(expected.begin(), num_experts);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Name entry(name, i, weights.size());
    expect_shape(entry, weights[i], expected, meaning.c_str());
    expect_weight_dtype(entry, weights[i], dtype);
    if (dtype == DType::kInt4) expect_contiguous(entry, weights[i], expected.size() - 1);
  }
}

// The same of prepacked ones. `inputs`: of a row; `columns` of a matrix, `parts` of them side by side.
void check_prepacked(const char* name, const std::vector<Tensor>& weights, DType dtype, int64_t num_experts,
                     bool stacked, int64_t in, int64_t columns, int64_t parts, int64_t inputs,
                     const char* in_name, const char* out_name) {
  const std::string meaning = std::string(stacked ? "[E_l, " : "[1, ") + (parts == 2 ? "2 * " : "") +
                              "ceil(" + out_name + " / 16), " + in_name +
                              (inputs == 2 ? " / 2, 32]" : ", 16]");
  const std::vector<int64_t> expected{stacked ? num_experts : 1,
                                      known(columns) ? parts * panels_of(columns) : -1,
                                      known(in) ? in / inputs : -1, kPanelColumns * inputs};
  for (size_t i = 0; i < weights.size(); ++i) {
    const Name entry(name, i, weights.size());
    expect_shape(entry, weights[i], expected, meaning.c_str());
    expect_dtype(entry, weights[i], dtype);
    expect_contiguous(entry, weights[i], 1);
  }
}

void check_bias(const char* name, const std::vector<Tensor>& bias, DType dtype, int64_t num_experts,
                int64_t size, bool allow_separate, const char* meaning) {
  if (bias.empty()) return;
  const bool stacked = bias.size() == 1 && bias[0].shape.size() == 2;
  const int64_t count = static_cast<int64_t>(bias.size());
  const bool separate = allow_separate && !stacked && count == 2 * num_experts;
  if (!stacked && !separate && count != num_experts) {
    fail(name, " must hold one tensor per expert (", num_experts, ") or one stacked tensor, got ", count,
         " tensors");
  }
  std::vector<int64_t> expected{separate && known(size) ? size / 2 : size};
  if (stacked) expected.insert(expected.begin(), num_experts);
  for (size_t i = 0; i < bias.size(); ++i) {
    const Name entry(name, i, bias.size());
    expect_shape(entry, bias[i], expected, separate ? "[I]" : meaning);
    expect_dtype(entry, bias[i], dtype, DType::kFloat32);
    expect_dtype(entry, bias[i], bias[0].dtype);
    expect_contiguous(entry, bias[i], bias[i].shape.size() - 1);
  }
}

// Expert e's bias; part 1 of 2 is the up half of a fused or separate gate_up bias.
const void* bias_of(const std::vector<Tensor>& bias, int64_t e, int64_t num_experts, int64_t part,
                    int64_t half) {
  if (bias.empty()) return nullptr;
  if (bias.size() == 1 && bias[0].shape.size() == 2) {
    return offset(bias[0].data, bias[0].dtype, e * stride(bias[0], 0) + part * half);
  }
  if (static_cast<int64_t>(bias.size()) == 2 * num_experts) return bias[part * num_experts + e].data;
  return offset(bias[e].data, bias[e].dtype, part * half);
}

// The dtype of all weights: that of the activations, or a quantised one.
DType find_weight_dtype(const Arguments& a, DType dtype) {
  const Tensor& first = a.gate_up_weights[0];
  const DType found = weight_dtype_of(first.dtype == DType::kUnknown ? a.down_weights[0] : first);
  // Here, because the shape of an int32 that is no int4 would be refused first.
  if (found == DType::kInt4 && a.gate_up_scale.empty())
    fail("gate_up_scale must be given: gate_up_weights has the dtype ", dtype_text(first));
  return found == DType::kUnknown || is_quantised(found) ? found : dtype;
}

int64_t scale_groups(int64_t size) {
  return known(size) ? (size + kScaleGroup - 1) >> kScaleGroupShift : size;
}

bool agree(int64_t a, int64_t b) { return !known(a) || !known(b) || a == b; }

// Matrices [in, out] that have scales; the first dimension of an array is the expert where they are stacked.
struct ScaledMatrices {
  int64_t num_experts;
  bool stacked, permuted;
  int64_t in, out;
  int64_t parts;  // 2: gate and up side by side, each with blocks of its own

  int64_t out_groups() const { return known(out) ? parts * scale_groups(out / parts) : out; }

  Scale read(const Name& name, const Tensor& tensor) const {
    const size_t rank = tensor.shape.size(), first = stacked ? 1 : 0, own = rank - std::min(rank, first);
    const bool right = rank >= first && own <= 2 && (!stacked || agree(tensor.shape[0], num_experts));
    if (!right) refuse(name, tensor);
    Scale scale;
    scale.data = static_cast<const float*>(tensor.data);
    const size_t in_dim = first + (permuted ? 1 : 0), out_dim = own == 2 && !permuted ? first + 1 : first;
    constexpr int64_t kNever = -2;  // no scale belongs to a single input
    const bool fits =
        (own < 2 || find(tensor, in_dim, scale_groups(in), kNever, &scale.in_stride, &scale.in_shift)) &&
        (own < 1 || find(tensor, out_dim, out_groups(), out, &scale.out_stride, &scale.out_shift));
    if (!fits) refuse(name, tensor);
    return scale;
  }

  // Scale::first_out of a part: the columns before it, counted in whole groups where it has blocks of its
  // own.
  int64_t first_out(const Scale& scale, int64_t part) const {
    const int64_t columns = part * (out / parts);
    return scale.out_shift == 0 ? columns : scale_groups(columns) << kScaleGroupShift;
  }

 private:
  // Along one dimension: one scale for all, one for each group, or one for each element.
  static bool find(const Tensor& tensor, size_t dim, int64_t groups, int64_t elements, int64_t* step,
                   int* shift) {
    const int64_t count = tensor.shape[dim];
    if (count == 1) return true;
    *step = stride(tensor, dim);
    if (agree(count, groups)) *shift = kScaleGroupShift;
    return agree(count, groups) || count == elements;
  }

  [[noreturn]] void refuse(const Name& name, const Tensor& tensor) const {
    auto text = [&](std::vector<int64_t> shape) {
      if (permuted) std::reverse(shape.begin(), shape.end());
      if (stacked) shape.insert(shape.begin(), num_experts);
      return shape_text(shape);
    };
    const std::string group = std::to_string(kScaleGroup);
    fail(name, " must have the shape ", text({1}), " (a scale per matrix), ", text({out}), " (per output), ",
         text({scale_groups(in), out}), " (per output and ", group, " inputs) or ",
         text({scale_groups(in), out_groups()}), " (per ", group, " x ", group, " block",
         parts == 2 ? ", of gate and of up" : "", "), got ", shape_text(tensor.shape));
  }
};

// One for each tensor.
std::vector<Scale> check_scales(const char* name, const std::vector<Tensor>& scales, const char* weights_name,
                                const std::vector<Tensor>& weights, const ScaledMatrices& matrices) {
  const Tensor& first = weights[0];
  std::vector<Scale> result;
  if (scales.empty()) {
    if (is_quantised(weight_dtype_of(first)))
      fail(name, " must be given: ", weights_name, " has the dtype ", dtype_text(first));
    return result;
  }
  if (first.dtype != DType::kUnknown && !is_quantised(weight_dtype_of(first))) {
    fail(name, " must not be given: ", weights_name,
         " is not quantised (int8, int4 in int32, float8_e4m3fn or its bits as uint8) but has the dtype ",
         dtype_text(first));
  }
  if (scales.size() != weights.size()) {
    fail(name, " must hold as many tensors as ", weights_name, " (", weights.size(), "), got ",
         scales.size());
  }
  result.reserve(scales.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    const Name entry(name, i, scales.size());
    expect_dtype(entry, scales[i], DType::kFloat32);
    result.push_back(matrices.read(entry, scales[i]));
  }
  return result;
}

void expect_no_gradients(const char* name, const std::vector<Tensor>& gradients, const std::string& what) {
  for (const Tensor& gradient : gradients) {
    if (gradient.data == nullptr) continue;
    fail(name, " has no gradient where the weights are ", what,
         "; set stop_gradient = True on it, or leave it out of wanted");
  }
}

// The parts of every expert, which are null where a tensor has no data.
std::vector<Expert> find_experts(const Arguments& a, const Layout& layout, DType dtype, int64_t inter) {
  const int64_t num_experts = layout.num_experts;
  const bool t = a.permuted_weights;
  const int64_t gate_columns = layout.prepacked ? panels_of(inter) * kPanelColumns : inter;
  std::vector<Expert> experts(num_experts);
  for (int64_t e = 0; e < num_experts; ++e) {
    Expert& expert = experts[e];
    if (layout.stacked_down) {
      expert.down = as_matrix(a.down_weights[0], t, dtype);
      expert.down.data = offset(expert.down.data, dtype, e * stride(a.down_weights[0], 0, dtype));
    } else {
      expert.down = as_matrix(a.down_weights[e], t, dtype);
    }
    if (layout.separate) {
      expert.gate = as_matrix(a.gate_up_weights[e], t, dtype);
      expert.up = as_matrix(a.gate_up_weights[num_experts + e], t, dtype);
    } else {
      expert.gate = as_matrix(a.gate_up_weights[layout.stacked_gate_up ? 0 : e], t, dtype);
      if (layout.stacked_gate_up) {
        expert.gate.data = offset(expert.gate.data, dtype, e * stride(a.gate_up_weights[0], 0, dtype));
      }
      expert.up = expert.gate;
      expert.up.data = offset(expert.gate.data, dtype, gate_columns * expert.gate.out_stride);
    }
    expert.gate_bias = bias_of(a.gate_up_bias, e, num_experts, 0, inter);
    expert.up_bias = bias_of(a.gate_up_bias, e, num_experts, 1, inter);
    expert.down_bias = bias_of(a.down_bias, e, num_experts, 0, 0);
  }
  return experts;
}

// Of expert e, from those of the tensors that check_scales() read.
ExpertScales scales_of_expert(const Arguments& a, const Layout& layout, const std::vector<Scale>& gate_up,
                              const ScaledMatrices& gate_up_matrices, const std::vector<Scale>& down,
                              int64_t e) {
  auto find = [e](const std::vector<Scale>& scales, const Tensor& first, bool stacked, int64_t i) {
    Scale scale = scales[stacked ? 0 : i];
    if (stacked) scale.data += e * stride(first, 0);
    return scale;
  };
  ExpertScales result;
  result.gate = find(gate_up, a.gate_up_scale[0], layout.stacked_gate_up, e);
  result.down = find(down, a.down_scale[0], layout.stacked_down, e);
  if (layout.separate) {
    result.up = gate_up[layout.num_experts + e];
  } else {
    result.up = result.gate;
    result.up.first_out = gate_up_matrices.first_out(result.up, 1);
  }
  return result;
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat64:
      return "float64";
    case DType::kInt16:
      return "int16";
    case DType::kInt8:
      return "int8";
    case DType::kInt4:
      return "int4 in int32";
    case DType::kFloat8E4M3:
      return "float8_e4m3fn";
    case DType::kUInt8:
      return "uint8";
    case DType::kBool:
      return "bool";
    default:
      return "another dtype";
  }
}

std::string dtype_text(const Tensor& tensor) {
  return tensor.other_dtype.empty() ? dtype_name(tensor.dtype) : tensor.other_dtype;
}

size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kInt64:
    case DType::kFloat64:
      return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
      return 2;
    case DType::kInt8:
    case DType::kFloat8E4M3:
    case DType::kUInt8:
    case DType::kBool:
      return 1;
    default:
      return 4;
  }
}

int64_t dtype_bytes(DType dtype, int64_t elements) {
  return dtype == DType::kInt4 ? elements / 2 : elements * static_cast<int64_t>(dtype_size(dtype));
}

bool is_quantised(DType dtype) {
  return dtype == DType::kInt8 || dtype == DType::kFloat8E4M3 || dtype == DType::kInt4;
}

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
    if (!std::isfinite(spec.alpha) || !(spec.limit > 0)) {
      fail("activation must have a finite alpha and a positive limit, got '", text, "'");
    }
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
  expect_rank("hidden_states", a.hidden_states, 2, "[T, H]");
  expect_rank("routing_table", a.routing_table, 2, "[T, K]");
  expect_rank("router_weights", a.router_weights, 2, "[T, K]");
  p.dtype = a.hidden_states.dtype;
  if (p.dtype != DType::kUnknown && !is_float(p.dtype)) {
    fail("hidden_states must have the dtype float32, bfloat16 or float16, got ", dtype_text(a.hidden_states));
  }
  expect_dtype("routing_table", a.routing_table, DType::kInt32, DType::kInt64);
  expect_dtype("router_weights", a.router_weights, DType::kFloat32, p.dtype);

  p.num_tokens = a.hidden_states.shape[0];
  unify(&p.num_tokens, a.routing_table.shape[0]);
  unify(&p.num_tokens, a.router_weights.shape[0]);
  p.top_k = a.routing_table.shape[1];
  unify(&p.top_k, a.router_weights.shape[1]);
  if (p.top_k == 0)
    fail("routing_table must have at least one column (K >= 1), got the shape ",
         shape_text(a.routing_table.shape));
  expect_shape("routing_table", a.routing_table, {p.num_tokens, p.top_k}, "[T, K]");
  expect_shape("router_weights", a.router_weights, {p.num_tokens, p.top_k}, "[T, K]");

  const Layout layout = find_layout(a);
  const int64_t num_experts = layout.num_experts;
  const bool t = a.permuted_weights;
  p.prepacked = layout.prepacked;

  // H and I come from the first weight of each kind, hidden_states completes H.
  const Tensor& first_down = a.down_weights[0];
  if (!layout.prepacked) {
    expect_rank({"down_weights", 0, a.down_weights.size()}, first_down, layout.stacked_down ? 3 : 2,
                layout.stacked_down ? (t ? "[E_l, H, I]" : "[E_l, I, H]") : (t ? "[H, I]" : "[I, H]"));
  }
  const std::vector<int64_t>& down_shape = first_down.shape;
  p.weight_dtype = find_weight_dtype(a, p.dtype);
  const bool packed = p.weight_dtype == DType::kInt4;
  if (layout.prepacked && t)
    fail("permuted_weights must be False with prepacked weights, which have a layout of their own, got True");
  if (layout.prepacked && is_quantised(p.weight_dtype)) {
    fail(
        "down_weights must have the dtype float32, bfloat16 or float16 where they are prepacked (4 "
        "dimensions), got ",
        dtype_text(first_down));
  }
  // Before the shapes, which depend on the dtype.
  expect_weight_dtype({"gate_up_weights", 0, a.gate_up_weights.size()}, a.gate_up_weights[0], p.weight_dtype);
  expect_weight_dtype({"down_weights", 0, a.down_weights.size()}, first_down, p.weight_dtype);
  // While a static graph is being built, dtypes are not known.
  const bool maybe_packed = p.weight_dtype == DType::kUnknown && t && !a.gate_up_scale.empty();
  if (packed && !t) {
    fail("permuted_weights must be True with int4 weights, whose words hold numbers along the inputs: ",
         "[2I, 8 * ceil(H / 64)] and [H, 8 * ceil(I / 64)]; got False");
  }
  if (packed || maybe_packed) {
    const Tensor& gate_up = a.gate_up_weights[0];
    expect_rank({"gate_up_weights", 0, a.gate_up_weights.size()}, gate_up, layout.stacked_gate_up ? 3 : 2,
                layout.stacked_gate_up ? "[E_l, 2I, 8 * ceil(H / 64)]" : "[2I, 8 * ceil(H / 64)]");
    const int64_t columns = gate_up.shape[gate_up.shape.size() - 2];
    p.intermediate_size = layout.separate || !known(columns) ? columns : columns / 2;
  } else {
    p.intermediate_size = down_shape[down_shape.size() - (t ? 1 : 2)];
  }
  // While a static graph is being built, the dtype may not be known.
  const int64_t inputs = !layout.prepacked             ? 1
                         : p.dtype == DType::kUnknown  ? inputs_of_row(first_down)
                         : p.dtype == DType::kBFloat16 ? 2
                                                       : 1;
  if (layout.prepacked && known(p.intermediate_size)) p.intermediate_size *= inputs;
  p.hidden_size = a.hidden_states.shape[1];
  if (!layout.prepacked) {
    unify(&p.hidden_size, down_shape[down_shape.size() - (t ? 2 : 1)]);
  } else if (known(a.gate_up_weights[0].shape[2])) {
    unify(&p.hidden_size, a.gate_up_weights[0].shape[2] * inputs);
  }
  if (p.hidden_size > 0 && p.hidden_size % inputs != 0)
    fail("hidden_states must have an even number of columns with prepacked bfloat16 weights, got ",
         p.hidden_size);
  if (p.hidden_size == 0)
    fail("hidden_states must have at least one column (H >= 1), got the shape ",
         shape_text(a.hidden_states.shape));
  if (p.intermediate_size == 0) {
    fail(packed ? "gate_up_weights" : "down_weights",
         " must have an intermediate dimension I >= 1, got the shape ",
         shape_text(packed ? a.gate_up_weights[0].shape : down_shape));
  }
  const int64_t inter = p.intermediate_size;
  const int64_t columns = layout.separate || !known(inter) ? inter : 2 * inter;
  const auto meaning = [&](bool stacked, const std::string& in, const std::string& out) {
    const std::string stored = packed ? "8 * ceil(" + in + " / 64)" : in;
    return (stacked ? "[E_l, " : "[") + (t ? out + ", " + stored : stored + ", " + out) + "]";
  };
  const auto stored = [&](int64_t in) { return packed ? int4_words(in) : maybe_packed ? -1 : in; };
  if (layout.prepacked) {
    check_prepacked("gate_up_weights", a.gate_up_weights, p.weight_dtype, num_experts, layout.stacked_gate_up,
                    p.hidden_size, inter, layout.separate ? 1 : 2, inputs, "H", "I");
    check_prepacked("down_weights", a.down_weights, p.weight_dtype, num_experts, layout.stacked_down, inter,
                    p.hidden_size, 1, inputs, "I", "H");
  } else {
    check_weights("gate_up_weights", a.gate_up_weights, t, p.weight_dtype, num_experts,
                  layout.stacked_gate_up, stored(p.hidden_size), columns,
                  meaning(layout.stacked_gate_up, "H", layout.separate ? "I" : "2I"));
    check_weights("down_weights", a.down_weights, t, p.weight_dtype, num_experts, layout.stacked_down,
                  stored(inter), p.hidden_size, meaning(layout.stacked_down, "I", "H"));
  }
  const ScaledMatrices gate_up{num_experts, layout.stacked_gate_up, t, p.hidden_size,
                               columns,     layout.separate ? 1 : 2};
  const ScaledMatrices down{num_experts, layout.stacked_down, t, inter, p.hidden_size, 1};
  const std::vector<Scale> gate_up_scales =
      check_scales("gate_up_scale", a.gate_up_scale, "gate_up_weights", a.gate_up_weights, gate_up);
  const std::vector<Scale> down_scales =
      check_scales("down_scale", a.down_scale, "down_weights", a.down_weights, down);
  check_bias("gate_up_bias", a.gate_up_bias, p.dtype, num_experts, known(inter) ? 2 * inter : -1, true,
             a.gate_up_bias.size() == 1 && a.gate_up_bias[0].shape.size() == 2 ? "[E_l, 2I]" : "[2I]");
  check_bias("down_bias", a.down_bias, p.dtype, num_experts, p.hidden_size, false,
             a.down_bias.size() == 1 && a.down_bias[0].shape.size() == 2 ? "[E_l, H]" : "[H]");
  if (!a.gate_up_bias.empty() && !a.down_bias.empty()) {
    expect_dtype("down_bias", a.down_bias[0], a.gate_up_bias[0].dtype);
  }

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
  p.first_expert = a.experts_min;
  p.chunk_size = a.chunk_size;
  p.activation = parse_activation(a.activation);

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

  p.experts = find_experts(a, layout, p.weight_dtype, inter);
  for (int64_t e = 0; is_quantised(p.weight_dtype) && e < num_experts; ++e)
    p.scales.push_back(scales_of_expert(a, layout, gate_up_scales, gate_up, down_scales, e));
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
  b.experts = find_experts(gradients, find_layout(arguments), p.dtype, p.intermediate_size);
  return b;
}

GateProblem resolve_gate(const Tensor& hidden_states, const Tensor& gate_weight) {
  GateProblem p;
  expect_rank("hidden_states", hidden_states, 2, "[T, H]");
  expect_rank("gate_weight", gate_weight, 2, "[H, E]");
  p.dtype = hidden_states.dtype;
  if (p.dtype != DType::kUnknown && !is_float(p.dtype)) {
    fail("hidden_states must have the dtype float32, bfloat16 or float16, got ", dtype_text(hidden_states));
  }
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
  if (gate_weight.data == nullptr) return p;
  expect_contiguous("hidden_states", hidden_states, 1);
  p.hidden_states = hidden_states.data;
  p.hidden_states_stride = stride(hidden_states, 0);
  p.weight = as_matrix(gate_weight, false);
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
  if (gate_weight_grad.data) b.weight = as_matrix(gate_weight_grad, false);
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
