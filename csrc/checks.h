// What the checks of arguments share: names, texts, and refusals. A size of -1 is not known yet and agrees
// with every other.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "moe.h"

namespace paddle_moe {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// Names an argument, or one entry of a list: "down_weights[3]". The text is only made when an error needs it.
struct Name {
  Name(const char* argument, size_t index = 0, size_t size = 1)
      : argument(argument), index(index), size(size) {}
  const char* argument;
  size_t index, size;
};

std::ostream& operator<<(std::ostream& text, const Name& name);
std::string shape_text(const std::vector<int64_t>& shape);

inline bool known(int64_t size) { return size >= 0; }
inline bool agree(int64_t a, int64_t b) { return !known(a) || !known(b) || a == b; }

// The size that two places agree on; -1 while neither knows.
inline void unify(int64_t* size, int64_t other) {
  if (!known(*size)) *size = other;
}

// More than any memory holds; sizes in bytes of what is computed from so many still fit into 64 bits.
constexpr int64_t kMaxElements = int64_t{1} << 48;

// Whether the product is at most kMaxElements, where a size of 0, or not known yet, counts as 1.
bool fits(const std::vector<int64_t>& sizes);

// That its sizes can be multiplied with each other.
void expect_size(const Name& name, const Tensor& tensor);
// The same, and how many they are.
void expect_rank(const Name& name, const Tensor& tensor, size_t rank, const std::string& meaning);
void expect_shape(const Name& name, const Tensor& tensor, const std::vector<int64_t>& expected,
                  const std::string& meaning, const char* advice = "");
void expect_dtype(const Name& name, const Tensor& tensor, DType first, DType second = DType::kUnknown);
void expect_contiguous(const Name& name, const Tensor& tensor, size_t first_dim = 0);

// In elements of the tensor.
int64_t stride(const Tensor& tensor, size_t dim);

}  // namespace paddle_moe
