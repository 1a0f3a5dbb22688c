// How the callers of the kernels divide their scratch memory.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace paddle_moe {
namespace cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline const void* advance(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + dtype_bytes(dtype, elements);
}

inline Matrix from_column(Matrix m, int64_t column, DType dtype) {
  m.data = advance(m.data, column * m.out_stride, dtype);
  return m;
}

inline Matrix from_row(Matrix m, int64_t row, DType dtype) {
  m.data = advance(m.data, row * m.in_stride, dtype);
  return m;
}

// Whole cache lines, and one more so that rows do not all fall into the same cache sets when the size is a
// power of two.
inline int64_t operand_stride(int64_t elements, Operand operand) {
  if (is_integer(operand)) return round_up(Int16Row(elements, operand).units(), 16) + 16;
  return round_up(operand == Operand::kBf16Pairs ? divide_up(elements, 2) : elements, 16) + 16;
}

// Hands out consecutive pieces of the workspace; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t bytes) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(bytes, 64);
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Scratch of one thread inside a GEMM task.
struct ThreadScratch {
  float* result;
  void* gemm;
  float* decoded;  // quantised or prepacked weights as fp32
};

inline std::vector<ThreadScratch> take_thread_scratch(Arena* arena, int64_t threads,
                                                      int64_t decoded_floats = 0) {
  std::vector<ThreadScratch> scratch(threads);
  for (ThreadScratch& s : scratch) {
    s.result = arena->take<float>(kResultFloats * sizeof(float));
    s.gemm = arena->take<void>(kPackedBytes);
    s.decoded = arena->take<float>(decoded_floats * sizeof(float));
  }
  return scratch;
}

}  // namespace cpu
}  // namespace paddle_moe
