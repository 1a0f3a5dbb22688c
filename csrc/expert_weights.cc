#include "expert_weights.h"

#include <algorithm>
#include <utility>

namespace paddle_moe {
namespace {

constexpr size_t kPrepackedRank = 4;  // of prepacked weights, and only of them

// Few libraries store and load fp8, so its bits are taken as well; none has int4.
DType weight_dtype_of(const Tensor& weight) {
  return weight.dtype == DType::kUInt8   ? DType::kFloat8E4M3
         : weight.dtype == DType::kInt32 ? DType::kInt4
                                         : weight.dtype;
}

void expect_weight_dtype(const Name& name, const Tensor& weight, DType dtype) {
  if (weight_dtype_of(weight) != dtype) expect_dtype(name, weight, dtype);
}

int64_t divide_up(int64_t size, int64_t by) { return known(size) ? (size + by - 1) / by : -1; }
int64_t times(int64_t size, int64_t factor) { return known(size) ? size * factor : -1; }

const void* offset(const void* data, DType dtype, int64_t elements) {
  return data ? static_cast<const char*>(data) + dtype_bytes(dtype, elements) : nullptr;
}

// How many experts there are, and which arrays hold them.
struct Counts {
  int64_t num_experts;
  bool prepacked, stacked_gate_up, stacked_down;
  bool separate;  // two arrays for each expert: all gates, then all ups
};

Counts count_experts(const std::vector<Tensor>& gate_up, const std::vector<Tensor>& down) {
  if (down.empty()) fail("down_weights must hold at least one tensor, got an empty list");
  if (gate_up.empty()) fail("gate_up_weights must hold at least one tensor, got an empty list");
  expect_size({"gate_up_weights", 0, gate_up.size()}, gate_up[0]);  // those behind it have its shape
  expect_size({"down_weights", 0, down.size()}, down[0]);
  Counts counts{};
  counts.prepacked = down[0].shape.size() == kPrepackedRank;
  if (counts.prepacked != (gate_up[0].shape.size() == kPrepackedRank)) {
    fail("gate_up_weights and down_weights must both be prepacked, which has ", kPrepackedRank,
         " dimensions, or neither, got the shapes ", shape_text(gate_up[0].shape), " and ",
         shape_text(down[0].shape));
  }
  const size_t stacked_rank = counts.prepacked ? kPrepackedRank : 3;
  counts.stacked_down = down.size() == 1 && down[0].shape.size() == stacked_rank;
  counts.stacked_gate_up = gate_up.size() == 1 && gate_up[0].shape.size() == stacked_rank;
  counts.num_experts = counts.stacked_down ? down[0].shape[0] : static_cast<int64_t>(down.size());
  if (counts.num_experts == 0)
    fail("down_weights must hold at least one expert, got the shape ", shape_text(down[0].shape));
  if (counts.stacked_gate_up) {
    unify(&counts.num_experts, gate_up[0].shape[0]);
    if (!agree(gate_up[0].shape[0], counts.num_experts)) {
      fail("gate_up_weights must hold as many experts as down_weights (", counts.num_experts,
           "), got the stacked shape ", shape_text(gate_up[0].shape));
    }
    return counts;
  }
  const int64_t count = static_cast<int64_t>(gate_up.size());
  if (!known(counts.num_experts))
    fail("down_weights must have a known number of experts when gate_up_weights is a list");
  counts.separate = count == 2 * counts.num_experts;
  if (!counts.separate && count != counts.num_experts) {
    fail("gate_up_weights must hold one tensor per expert (", counts.num_experts,
         ", gate and up side by side), two (", 2 * counts.num_experts,
         ", all gates, then all ups), or one stacked tensor; down_weights holds ", counts.num_experts,
         " experts, got ", count, " tensors");
  }
  return counts;
}

// The dtype of all weights: that of the activations, or a quantised one.
DType find_dtype(const Arguments& a, DType dtype) {
  const bool by_gate_up = a.gate_up_weights[0].dtype != DType::kUnknown;
  const Tensor& first = by_gate_up ? a.gate_up_weights[0] : a.down_weights[0];
  const DType found = weight_dtype_of(first);
  // Here, because the shape of an int32 that is no int4 would be refused first.
  if (found == DType::kInt4 && a.gate_up_scale.empty()) {
    fail("gate_up_scale must be given: ", by_gate_up ? "gate_up_weights" : "down_weights", " has the dtype ",
         dtype_text(first));
  }
  return found == DType::kUnknown || is_quantised(found) ? found : dtype;
}

// 0: not known yet.
int64_t inputs_of_prepacked_row(const Arguments& a, DType dtype) {
  if (dtype == DType::kUnknown) {
    const int64_t width = a.down_weights[0].shape[3];
    return !known(width) ? 0 : width != kPanelColumns ? 2 : a.gate_up_scale.empty() ? 1 : kInt4InWord;
  }
  return dtype == DType::kInt4 ? kInt4InWord : dtype == DType::kFloat32 || dtype == DType::kFloat16 ? 1 : 2;
}

WeightStorage find_storage(const Arguments& a, bool prepacked, DType dtype) {
  if (prepacked) {
    if (a.permuted_weights) {
      fail(
          "permuted_weights must be False with prepacked weights, which have a layout of their own, "
          "got True");
    }
    return WeightStorage::kPrepacked;
  }
  if (dtype == DType::kInt4) {
    if (!a.permuted_weights) {
      fail("permuted_weights must be True with int4 weights, whose words hold numbers along the inputs: ",
           "[2I, 8 * ceil(H / 64)] and [H, 8 * ceil(I / 64)]; got False");
    }
    return WeightStorage::kInt4;
  }
  return a.permuted_weights ? WeightStorage::kOutIn : WeightStorage::kInOut;
}

}  // namespace

ExpertForms find_forms(const Arguments& a, DType dtype) {
  const Counts counts = count_experts(a.gate_up_weights, a.down_weights);
  const Tensor& first_down = a.down_weights[0];
  const DType stored = find_dtype(a, dtype);
  const WeightStorage storage = find_storage(a, counts.prepacked, stored);
  // Before the shapes, which depend on the dtype.
  expect_weight_dtype({"gate_up_weights", 0, a.gate_up_weights.size()}, a.gate_up_weights[0], stored);
  expect_weight_dtype({"down_weights", 0, a.down_weights.size()}, first_down, stored);
  const bool may_be_int4 =
      storage == WeightStorage::kOutIn && stored == DType::kUnknown && !a.gate_up_scale.empty();
  const int64_t inputs_of_row = counts.prepacked ? inputs_of_prepacked_row(a, stored) : 1;
  const auto form = [&](const char* argument, const char* in, const char* out, bool stacked, int64_t parts) {
    return WeightForm{argument, in,     out,     counts.num_experts, stacked,
                      parts,    stored, storage, may_be_int4,        inputs_of_row};
  };
  return {counts.num_experts, stored,
          form("gate_up_weights", "H", "I", counts.stacked_gate_up, counts.separate ? 1 : 2),
          form("down_weights", "I", "H", counts.stacked_down, 1)};
}

// ---------------------------------------------------------------- weights

std::vector<int64_t> WeightForm::shape(int64_t in, int64_t out) const {
  const int64_t columns = times(out, parts);
  std::vector<int64_t> result;
  switch (storage) {
    case WeightStorage::kInOut:
      result = {in, columns};
      break;
    case WeightStorage::kOutIn:
      result = {columns, may_be_int4 ? -1 : in};
      break;
    case WeightStorage::kInt4:
      result = {columns, times(divide_up(in, kInt4Run), kInt4Run / kInt4InWord)};
      break;
    case WeightStorage::kPrepacked:
      result = {times(divide_up(out, kPanelColumns), parts),
                known(in) && inputs_of_row ? in / inputs_of_row : -1,
                inputs_of_row == 0   ? -1
                : inputs_of_row == 2 ? 2 * kPanelColumns
                                     : kPanelColumns};
  }
  if (has_experts_in_front()) result.insert(result.begin(), experts_in_front());
  return result;
}

std::string WeightForm::shape_in_letters() const {
  const std::string in = in_letter, out = out_letter, columns = parts == 2 ? "2" + out : out;
  const std::string experts = stacked ? "E_l, " : has_experts_in_front() ? "1, " : "";
  switch (storage) {
    case WeightStorage::kInOut:
      return "[" + experts + in + ", " + columns + "]";
    case WeightStorage::kOutIn:
      return "[" + experts + columns + ", " + in + "]";
    case WeightStorage::kInt4:
      return "[" + experts + columns + ", 8 * ceil(" + in + " / 64)]";
    default:
      return "[" + experts + (parts == 2 ? "2 * " : "") + "ceil(" + out + " / 16), " + in +
             (inputs_of_row == 1   ? ", 16]"
              : inputs_of_row == 2 ? " / 2, 32]"
                                   : " / 8, 16]");
  }
}

int64_t WeightForm::inputs(const Tensor& array) const {
  const size_t first = has_experts_in_front() ? 1 : 0;
  if (array.shape.size() != shape(-1, -1).size() || storage == WeightStorage::kInt4 || may_be_int4) return -1;
  return storage == WeightStorage::kInOut   ? array.shape[first]
         : storage == WeightStorage::kOutIn ? array.shape[first + 1]
         : inputs_of_row                    ? times(array.shape[2], inputs_of_row)
                                            : -1;
}

int64_t WeightForm::outputs(const Tensor& array) const {
  const size_t first = has_experts_in_front() ? 1 : 0;
  if (array.shape.size() != shape(-1, -1).size() || storage == WeightStorage::kPrepacked) return -1;
  const int64_t columns = array.shape[storage == WeightStorage::kInOut ? first + 1 : first];
  return known(columns) ? columns / parts : -1;
}

void WeightForm::check(const std::vector<Tensor>& arrays, int64_t in, int64_t out) const {
  const std::vector<int64_t> expected = shape(in, out);
  const std::string letters = shape_in_letters();
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Name name(argument, i, arrays.size());
    expect_shape(name, arrays[i], expected, letters, advice_on(arrays[i].shape, expected));
    expect_weight_dtype(name, arrays[i], dtype);
    if (storage == WeightStorage::kInt4) expect_contiguous(name, arrays[i], expected.size() - 1);
    if (storage == WeightStorage::kPrepacked) expect_contiguous(name, arrays[i], 1);
  }
}

// On a shape that is not the expected one, if it looks like that of a transpose.
const char* WeightForm::advice_on(const std::vector<int64_t>& shape,
                                  const std::vector<int64_t>& expected) const {
  const size_t rank = expected.size();
  const bool transposed = shape.size() == rank &&
                          (shape[rank - 2] == expected[rank - 1] || shape[rank - 1] == expected[rank - 2]);
  if (transposed && storage == WeightStorage::kInOut) return "; [out, in] needs permuted_weights=True";
  if (transposed && storage == WeightStorage::kOutIn) return "; [in, out] needs permuted_weights=False";
  return "";
}

Matrix WeightForm::matrix(const std::vector<Tensor>& arrays, int64_t expert, int64_t part,
                          int64_t out) const {
  const Tensor& array = arrays[stacked ? 0 : parts == 1 ? part * num_experts + expert : expert];
  const size_t rank = array.shape.size();
  const int64_t word = dtype == DType::kInt4 ? kInt4InWord : 1;  // elements
  Matrix matrix{array.data, stride(array, rank - 2), stride(array, rank - 1)};
  int64_t columns = out;  // of a part
  switch (storage) {
    case WeightStorage::kInOut:
      break;
    case WeightStorage::kOutIn:
      std::swap(matrix.in_stride, matrix.out_stride);
      break;
    case WeightStorage::kInt4:
      matrix.out_stride = matrix.in_stride * word;
      matrix.in_stride = 1;
      break;
    case WeightStorage::kPrepacked:
      matrix.in_stride = kPanelColumns;
      matrix.out_stride = array.shape[2] * inputs_of_row;
      columns = panels_of(out) * kPanelColumns;
  }
  const int64_t before = (stacked ? expert * stride(array, 0) * word : 0) +
                         (parts == 2 ? part * columns * matrix.out_stride : 0);
  matrix.data = offset(array.data, dtype, before);
  return matrix;
}

// ---------------------------------------------------------------- scales

int64_t ScaleForm::column_groups() const { return times(divide_up(out_, kScaleGroup), weights_.parts); }

void ScaleForm::check(const std::vector<Tensor>& arrays, const std::vector<Tensor>& weights) const {
  const Tensor& first = weights[0];
  const bool quantised = is_quantised(weight_dtype_of(first));
  if (arrays.empty()) {
    if (quantised)
      fail(argument_, " must be given: ", weights_.argument, " has the dtype ", dtype_text(first));
    return;
  }
  if (first.dtype != DType::kUnknown && !quantised) {
    fail(argument_, " must not be given: ", weights_.argument,
         " is not quantised (int8, int4 in int32, float8_e4m3fn or its bits as uint8) but has the dtype ",
         dtype_text(first));
  }
  if (arrays.size() != weights.size()) {
    fail(argument_, " must hold as many tensors as ", weights_.argument, " (", weights.size(), "), got ",
         arrays.size());
  }
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Name name(argument_, i, arrays.size());
    expect_dtype(name, arrays[i], DType::kFloat32);
    read(name, arrays[i]);
  }
}

// Of the first part of the first expert of an array.
Scale ScaleForm::read(const Name& name, const Tensor& array) const {
  const bool in_first = weights_.inputs_first();
  const size_t rank = array.shape.size(), first = weights_.has_experts_in_front() ? 1 : 0;
  if (rank < first || rank - first > 2 || (first == 1 && !agree(array.shape[0], weights_.experts_in_front())))
    refuse(name, array);
  Scale scale;
  scale.data = static_cast<const float*>(array.data);
  // Along one dimension: one scale for all, one for each group, or one for each element.
  const auto fits = [&](size_t dim, int64_t groups, int64_t elements, int64_t* step, int* shift) {
    const int64_t count = array.shape[dim];
    if (count == 1) return true;
    *step = stride(array, dim);
    if (agree(count, groups)) *shift = kScaleGroupShift;
    return agree(count, groups) || count == elements;
  };
  constexpr int64_t kNever = -2;  // no scale belongs to a single input
  const size_t own = rank - first, in_dim = in_first ? first : first + 1;
  const size_t out_dim = own == 2 && in_first ? first + 1 : first;
  const bool right =
      (own < 2 || fits(in_dim, divide_up(in_, kScaleGroup), kNever, &scale.in_stride, &scale.in_shift)) &&
      (own < 1 || fits(out_dim, column_groups(), columns(), &scale.out_stride, &scale.out_shift));
  if (!right) refuse(name, array);
  return scale;
}

Scale ScaleForm::scale(const std::vector<Tensor>& arrays, int64_t expert, int64_t part) const {
  const bool side_by_side = weights_.parts == 2;
  const Tensor& array = arrays[weights_.stacked ? 0
                               : side_by_side   ? expert
                                                : part * weights_.num_experts + expert];
  Scale scale = read(argument_, array);
  if (weights_.stacked) scale.data += expert * stride(array, 0);
  if (side_by_side) {
    const int64_t columns = part * out_;
    scale.first_out = scale.out_shift == 0 ? columns : divide_up(columns, kScaleGroup) << kScaleGroupShift;
  }
  return scale;
}

void ScaleForm::refuse(const Name& name, const Tensor& array) const {
  const auto text = [&](std::vector<int64_t> shape) {
    if (!weights_.inputs_first()) std::reverse(shape.begin(), shape.end());
    if (weights_.has_experts_in_front()) shape.insert(shape.begin(), weights_.experts_in_front());
    return shape_text(shape);
  };
  const std::string group = std::to_string(kScaleGroup);
  const int64_t in_groups = divide_up(in_, kScaleGroup);
  fail(name, " must have the shape ", text({1}), " (a scale per matrix), ", text({columns()}),
       " (per output), ", text({in_groups, columns()}), " (per output and ", group, " inputs) or ",
       text({in_groups, column_groups()}), " (per ", group, " x ", group, " block",
       weights_.parts == 2 ? ", of gate and of up" : "", "), got ", shape_text(array.shape));
}

// ---------------------------------------------------------------- biases

bool BiasForm::stacked(const std::vector<Tensor>& arrays) const {
  return arrays.size() == 1 && arrays[0].shape.size() == 2;
}

bool BiasForm::separate(const std::vector<Tensor>& arrays) const {
  return parts == 2 && !stacked(arrays) && static_cast<int64_t>(arrays.size()) == 2 * num_experts;
}

void BiasForm::check(const std::vector<Tensor>& arrays, DType dtype) const {
  if (arrays.empty()) return;
  const bool one = stacked(arrays), two = separate(arrays);
  if (num_experts < 0 && !one) {
    fail(argument, " must be one stacked tensor where the number of experts is not known, got a list");
  }
  if (!one && !two && static_cast<int64_t>(arrays.size()) != num_experts) {
    fail(argument, " must hold one tensor per expert (", num_experts, ") or one stacked tensor, got ",
         arrays.size(), " tensors");
  }
  std::vector<int64_t> expected{two ? size : times(size, parts)};
  if (one) expected.insert(expected.begin(), num_experts);
  const std::string letters =
      std::string(one ? "[E_l, " : "[") + (parts == 2 && !two ? "2" : "") + letter + "]";
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Name name(argument, i, arrays.size());
    expect_shape(name, arrays[i], expected, letters);
    expect_dtype(name, arrays[i], dtype, DType::kFloat32);
    expect_dtype(name, arrays[i], arrays[0].dtype);
    expect_contiguous(name, arrays[i], expected.size() - 1);
  }
}

const void* BiasForm::bias(const std::vector<Tensor>& arrays, int64_t expert, int64_t part) const {
  if (arrays.empty()) return nullptr;
  if (separate(arrays)) return arrays[part * num_experts + expert].data;
  const Tensor& array = arrays[stacked(arrays) ? 0 : expert];
  return offset(array.data, array.dtype, (stacked(arrays) ? expert * stride(array, 0) : 0) + part * size);
}

}  // namespace paddle_moe
