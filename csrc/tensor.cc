// Dtypes, and how the elements of a Tensor lie.
#include <algorithm>
#include <utility>
#include <vector>

#include "checks.h"
#include "moe.h"

namespace paddle_moe {

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

bool is_contiguous(const Tensor& tensor, size_t first_dim) {
  if (std::count(tensor.shape.begin(), tensor.shape.end(), 0) != 0) return true;
  int64_t expected = 1;
  for (size_t i = tensor.shape.size(); i-- > first_dim;) {
    if (tensor.shape[i] > 1 && stride(tensor, i) != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

bool may_hold_an_element_twice(const Tensor& view) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // from one index to the next, how many more
  for (size_t i = 0; i < view.shape.size(); ++i) {
    if (view.shape[i] == 0) return false;
    if (view.shape[i] > 1) dims.emplace_back(std::max(stride(view, i), -stride(view, i)), view.shape[i] - 1);
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 0;
  for (const auto& [step, more] : dims) {
    if (step <= extent) return true;
    extent += step * more;
  }
  return false;
}

}  // namespace paddle_moe
