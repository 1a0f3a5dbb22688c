// The weights, biases and scales of the experts as a caller passed them: which arrays are accepted, what
// sizes they tell, and where the parts of each expert lie in them.
#pragma once

#include "checks.h"

namespace paddle_moe {

// How a matrix from `in` features to `out` features is stored.
enum class WeightStorage {
  kInOut,  // [in, out]
  kOutIn,  // [out, in]
  kInt4,   // [out, 8 * ceil(in / 64)]: words of eight numbers along `in`
  // Panels: [1, ceil(out / 16), in, 16]; of bfloat16 and 8 bits [1, ceil(out / 16), in / 2, 32]; of int4
  // [1, ceil(out / 16), in / 8, 16].
  kPrepacked,
};

// Of one argument: an array for all experts, with a dimension more in front (prepacked ones with E_l instead
// of 1), or a list, which has an array for each matrix, or for gate and up of an expert side by side.
struct WeightForm {
  const char* argument;
  const char *in_letter, *out_letter;  // of the sizes of a matrix, for messages
  int64_t num_experts;                 // -1: not known yet
  bool stacked;
  int64_t parts;  // 2: gate and up side by side
  DType dtype;    // kUnknown while a static graph is being built
  WeightStorage storage;
  bool may_be_int4;       // kOutIn, but of a dtype that is not known
  int64_t inputs_of_row;  // of prepacked ones, in a row of a panel; 0: not known yet

  // The order of the scales of a matrix: as if prepacked ones were stored [in, out].
  bool inputs_first() const {
    return storage == WeightStorage::kInOut || storage == WeightStorage::kPrepacked;
  }

  bool has_experts_in_front() const { return stacked || storage == WeightStorage::kPrepacked; }
  int64_t experts_in_front() const { return stacked ? num_experts : 1; }

  // Sizes of one matrix, -1 where an array does not tell.
  int64_t inputs(const Tensor& array) const;
  int64_t outputs(const Tensor& array) const;

  void check(const std::vector<Tensor>& arrays, int64_t in, int64_t out) const;
  Matrix matrix(const std::vector<Tensor>& arrays, int64_t expert, int64_t part, int64_t out) const;

 private:
  std::vector<int64_t> shape(int64_t in, int64_t out) const;
  std::string shape_in_letters() const;
  const char* advice_on(const std::vector<int64_t>& shape, const std::vector<int64_t>& expected) const;
};

struct ExpertForms {
  int64_t num_experts;  // E_l, -1: not known yet
  DType dtype;          // of the weights
  WeightForm gate_up, down;

  bool prepacked() const { return down.storage == WeightStorage::kPrepacked; }
};

// dtype: of the activations, and of weights that are not quantised.
ExpertForms find_forms(const Arguments& arguments, DType dtype);

// The scales of an argument, whose arrays are in the form of its weights, quantised ones of the sizes in,
// out.
class ScaleForm {
 public:
  ScaleForm(const char* argument, const WeightForm& weights, int64_t in, int64_t out)
      : argument_(argument), weights_(weights), in_(in), out_(out) {}

  void check(const std::vector<Tensor>& arrays, const std::vector<Tensor>& weights) const;
  Scale scale(const std::vector<Tensor>& arrays, int64_t expert, int64_t part) const;

 private:
  int64_t columns() const { return known(out_) ? weights_.parts * out_ : -1; }
  int64_t column_groups() const;  // gate and up side by side have groups of their own
  Scale read(const Name& name, const Tensor& array) const;
  [[noreturn]] void refuse(const Name& name, const Tensor& array) const;

  const char* argument_;
  const WeightForm& weights_;
  int64_t in_, out_;
};

// The biases of an argument, `parts` vectors of one size for each expert: an array [E_l, parts * size], a
// list of [parts * size], or, of two parts, one of [size] with all first parts before all second ones.
struct BiasForm {
  const char* argument;
  const char* letter;  // of the size
  int64_t num_experts, parts, size;

  void check(const std::vector<Tensor>& arrays, DType dtype) const;
  const void* bias(const std::vector<Tensor>& arrays, int64_t expert, int64_t part) const;

 private:
  bool stacked(const std::vector<Tensor>& arrays) const;
  bool separate(const std::vector<Tensor>& arrays) const;
};

}  // namespace paddle_moe
