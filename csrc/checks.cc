#include "checks.h"

#include <algorithm>

namespace paddle_moe {
namespace {

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

}  // namespace

std::ostream& operator<<(std::ostream& text, const Name& name) {
  text << name.argument;
  if (name.size > 1) text << '[' << name.index << ']';
  return text;
}

std::string shape_text(const std::vector<int64_t>& shape) { return list_text(shape, true); }

bool fits(const std::vector<int64_t>& sizes) {
  double product = 1;  // exact as far as it fits
  for (const int64_t size : sizes) product *= static_cast<double>(std::max<int64_t>(1, size));
  return product <= kMaxElements;
}

void expect_size(const Name& name, const Tensor& tensor) {
  if (fits(tensor.shape)) return;
  fail(name, " must have at most ", kMaxElements, " elements, where a size of 0 counts as 1, got the shape ",
       shape_text(tensor.shape));
}

void expect_rank(const Name& name, const Tensor& tensor, size_t rank, const std::string& meaning) {
  if (tensor.shape.size() != rank) {
    fail(name, " must have ", rank, " dimensions ", meaning, ", got the shape ", shape_text(tensor.shape));
  }
  expect_size(name, tensor);
}

void expect_shape(const Name& name, const Tensor& tensor, const std::vector<int64_t>& expected,
                  const std::string& meaning, const char* advice) {
  if (tensor.shape.size() != expected.size() ||
      !std::equal(expected.begin(), expected.end(), tensor.shape.begin(), agree)) {
    fail(name, " must have the shape ", meaning, " = ", shape_text(expected), ", got ",
         shape_text(tensor.shape), advice);
  }
}

void expect_dtype(const Name& name, const Tensor& tensor, DType first, DType second) {
  if (tensor.dtype == DType::kUnknown || first == DType::kUnknown) return;
  if (tensor.dtype == first || tensor.dtype == second) return;
  if (second == DType::kUnknown || second == first) {
    fail(name, " must have the dtype ", dtype_name(first), ", got ", dtype_text(tensor));
  }
  fail(name, " must have the dtype ", dtype_name(first), " or ", dtype_name(second), ", got ",
       dtype_text(tensor));
}

void expect_contiguous(const Name& name, const Tensor& tensor, size_t first_dim) {
  if (!is_contiguous(tensor, first_dim)) {
    const char* where = first_dim == 0                         ? ""
                        : first_dim + 1 == tensor.shape.size() ? " in its last dimension"
                                                               : " but for its first dimension";
    fail(name, " must be contiguous", where, ", got the shape ", shape_text(tensor.shape),
         " with the strides ", list_text(tensor.strides, false), "; pass a contiguous copy");
  }
}

int64_t stride(const Tensor& tensor, size_t dim) {
  if (!tensor.strides.empty()) return tensor.strides[dim];
  int64_t result = 1;
  for (size_t i = dim + 1; i < tensor.shape.size(); ++i) result *= tensor.shape[i];
  return result;
}

}  // namespace paddle_moe
