// What one instruction set offers to the schedulers in moe.cc, moe_backward.cc and gate.cc. The same template
// source, kernels.inc, is compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moe.h"

namespace paddle_moe {
namespace cpu {

// How a GEMM reads its operands: in units of four bytes along the reduced dimension, each an fp32 value or a
// pair of neighbouring bf16 values (only where the processor multiplies such pairs; VDPBF16PS takes subnormal
// bf16 values, below 1.2e-38, for zero). For integer weights stored column by column or prepacked also pairs
// of int16 values, which integers are multiplied with exactly: see Int16Row.
enum class Operand { kFloat32, kBf16Pairs, kInt16, kTwoInt16 };

constexpr int64_t kUnitBytes = 4;

// A row of activations as integers: kInt16Group neighbours are multiples of one power of two, the largest of
// them below 2^15 of it; with kTwoInt16 below 2^14, and a second plane of integers holds what that leaves, in
// multiples of 2^-kSecondPlaneBits of that power. Behind the planes lie the powers, one for each group. So
// bf16 values are exact down to 2^-7 of the largest in their group, where a float32 row with its two planes
// is within 2^-29 of it.
constexpr int64_t kInt16Group = 64;
constexpr int kSecondPlaneBits = 15;

struct Int16Row {
  Int16Row(int64_t elements, Operand operand)
      : groups((elements + kInt16Group - 1) / kInt16Group), planes(operand == Operand::kTwoInt16 ? 2 : 1) {}
  int64_t groups, planes;
  int64_t plane_bytes() const { return groups * kInt16Group * 2; }
  int64_t powers_at() const { return planes * plane_bytes(); }
  int64_t units() const { return powers_at() / kUnitBytes + groups; }
};

inline bool is_integer(Operand operand) {
  return operand == Operand::kInt16 || operand == Operand::kTwoInt16;
}

// Units reduced in registers before the partial sum is added to the result. A constant of the contract, not
// only of the cache: every result is the sum, in order, of such blocks, each summed in order, whatever the
// tile it was computed in. Of prepacked weights whose scales change along the depth a block is a group of
// them.
constexpr int64_t kBlockUnits = 256;
// The same for weights that are stored column by column, where each lane of a register sums its own units.
constexpr int64_t kDotUnits = 1024;
// Rows of a GemmTask: 192 x 1 KiB of activations stay in L2 beside 128 KiB of packed weights. A multiple of
// all tile heights.
constexpr int64_t kBlockRows = 192;
// Columns of each of the two blocks of a GemmTask: two cache lines of bf16, four of fp32, where weights are
// packed; as many as leave 256 KiB of results in L2 where they are not, because memory is fastest in long
// runs.
constexpr int64_t kPackedColumns = 64;
constexpr int64_t kStreamedResults = 65536;
constexpr int64_t kMaxStreamedColumns = 16384;

// From one row of sums to the next, where each has two blocks of `width` columns. A cache line more than they
// need: rows a power of two apart would fall into the same cache sets.
constexpr int64_t sums_stride(int64_t width) { return 2 * width + 16; }

// Floats of a GemmTask's result when it is scratch, and bytes of its other scratch: two packed blocks, one
// that is multiplied and one that is packed meanwhile.
constexpr int64_t kResultFloats = std::max(kStreamedResults, sums_stride(kPackedColumns) * kBlockRows);
constexpr int64_t kPackedBytes = 2 * kBlockUnits * 2 * kPackedColumns * kUnitBytes;
static_assert(kPackedBytes >= kStreamedResults * kUnitBytes, "which hold a streamed task's running sums");

constexpr int64_t kLineBytes = 64;
// Streamed groups of up to so many bytes are prefetched into L1, beside the one before and the sums of a row,
// which take as much each. The smallest L1 have four times that.
constexpr int64_t kAheadInL1 = 8 * 1024;
// Of prepacked weights: bytes ahead that a panel is prefetched into L1 for few rows, which have up to so many
// multiply-adds by vectors for a line, and into L2 for a single tile of more, half of them where the tile has
// several panels; more tiles of rows prefetch what all of them use next. Up to so many bytes of activations
// all panels go through the whole depth.
constexpr int64_t kPanelAheadInL1 = 4 * 1024;
constexpr int64_t kFewMultiplyAdds = 8;
constexpr int64_t kPanelAheadInL2 = 8 * 1024;
constexpr int64_t kRowsInL2 = 512 * 1024;

struct GemmTask;

// Weights that a thread has packed before it computes the task.
struct PackedAhead {
  const GemmTask* task = nullptr;
  int64_t offset = 0;  // in the scratch
};

// result[r, c] = rows[r, :] * weight[0][:, c] for the first block of columns, and the same for weight[1] at
// result[r, second_block + c]. Results may be written in whole vectors: second_block columns of each block
// may be overwritten.
struct GemmTask {
  const void* rows;
  int64_t row_stride;  // units
  int64_t num_rows;    // <= kBlockRows
  int64_t depth;       // elements
  Operand operand;
  DType weight_dtype;
  Matrix weight[2];      // at their first column
  int64_t columns[2];    // <= second_block; columns[1] <= columns[0]
  int64_t second_block;  // block_columns(...) or, where weights are not packed, a smaller multiple of
                         // kPackedColumns
  float* result;
  int64_t result_stride;
  void* scratch;            // kPackedBytes
  bool accumulate = false;  // adds to what result holds
  int64_t unit_stride = 1;  // units, from one of a row to the next: the left operand may be a transpose
  // Every result is one chain of multiply-adds in the order of the depth, which accumulate continues: cutting
  // the depth into several tasks changes no bit. Needs weights with out_stride 1. A pair is then the elements
  // 2 u + 1 and 2 u, in this order, because VDPBF16PS adds the product of the high half first.
  bool chained = false;
  // scratch still holds the same weights as the call before packed them. Only where depth is at most
  // kBlockUnits units.
  bool packed = false;
  // The task, packed too, that the same thread computes next with the same scratch, operand and dtypes; its
  // first weights are packed meanwhile, which packed_ahead tells it. Needs packed_ahead.
  const GemmTask* next = nullptr;
  PackedAhead* packed_ahead = nullptr;
  Scale scale[2] = {};  // of quantised weights, at their first column
  bool panels = false;  // the weights are prepacked
};

// out[r, c] = activation(gate) * up, rounded to dtype and stored as an operand of the second GEMM.
struct ActivateTask {
  const float* gate;  // [num_rows, columns]
  const float* up;
  int64_t gate_up_stride;
  int64_t num_rows, columns;
  const void* gate_bias;  // at the first column, or null
  const void* up_bias;
  DType bias_dtype;
  ActivationSpec activation;
  DType dtype;
  Operand operand;
  void* out;            // at the first column, or null where only saved_gate and saved_up are wanted
  int64_t out_stride;   // units
  float* powers;        // of an Int16Row, at the group of the first column; in steps of out_stride too
  int64_t plane_bytes;  // of an Int16Row
  uint32_t amax_bits;   // raised to the bits of max |value before rounding|; NaN is the largest
  // Where gate and up, with their biases, are kept as dtype for the backward; or null.
  void* saved_gate = nullptr;
  void* saved_up = nullptr;
  int64_t saved_stride = 0;  // elements
};

// A block of quantised or prepacked weights becomes fp32: block[i, o] = weight(i, o) x scale(i, o), for
// num_in x num_out of them; block_stride floats from one i to the next.
struct DecodeTask {
  Matrix weight;  // at the block's first element, which for int4 begins a run; panels transposed
  DType dtype;
  Scale scale;  // at the same; its groups begin where the block does, or single elements have their own
  int64_t num_in, num_out;
  float* block;  // of each row whole runs of kDecodedRun may be written
  int64_t block_stride;
  bool panels;  // the weight is prepacked
};
constexpr int64_t kDecodedRun = 64;

// Columns whose part of a router weight's gradient is summed before the parts are added.
constexpr int64_t kRouterSumColumns = kPackedColumns;

// What an ActivateTask did, backwards: for every row, from the gradient of its intermediate.
struct ActivateBackwardTask {
  const float* grad;  // [num_rows, columns], of the intermediate before the router weight; null: not needed
  int64_t grad_stride;
  int64_t num_rows, columns;
  const void* gate;  // pre-activations, of dtype
  const void* up;
  int64_t gate_up_stride;      // elements
  const float* router_weight;  // [num_rows]
  ActivationSpec activation;
  DType dtype;
  Operand operand;
  // Each null where it is not wanted. Operand rows of router weight x gradient of gate and up; router weight
  // x intermediate as the transposed left operand of a chained GEMM, that is as rows of fp32 or, in bf16,
  // rows of units of two rows each; router_sums[r, j]: the sum of grad x intermediate over kRouterSumColumns
  // columns.
  void* gate_grad;
  void* up_grad;
  int64_t gate_up_grad_stride;  // units
  void* inter;
  int64_t inter_stride;  // units
  float* router_sums;
  int64_t router_sums_stride;
};

// A block of a weight's gradient: fp32 rows here, a Matrix of any layout there.
struct BlockTask {
  float* block;
  int64_t block_stride;
  int64_t num_rows, columns;
  Matrix matrix;  // at the block's first element
  DType dtype;
  bool past_caches = false;  // store_block writes straight to memory where it can
};

// sums[c] += weight[r] * rows[r, c], in the order of r. A null weight is 1.
struct ColumnSumsTask {
  const void* rows;
  DType dtype;
  int64_t row_stride;  // elements
  const float* weight;
  int64_t num_rows, columns;
  float* sums;
};

// out[t, :] = sum over k of weight[t, k] * (down[position[t, k], :] + bias of the expert), skipping position
// -1. A null weight is 1; without experts there is no bias.
struct CombineTask {
  const float* down;
  int64_t down_stride;
  const int32_t* position;      // [num_tokens, top_k]
  const int32_t* local_expert;  // [num_tokens, top_k]
  const float* weight;          // [num_tokens, top_k], or null
  const Expert* experts;        // or null
  DType bias_dtype;
  int64_t num_tokens, top_k, hidden_size;
  DType dtype;
  void* out;  // [num_tokens, hidden_size]
};

struct Kernels {
  const char* name;
  // Up to this many rows, weights that are stored row by row are multiplied as they stream by; above, a block
  // of them is packed first and then reused by every tile of rows.
  int64_t streamed_rows;
  bool bf16_dot;  // Operand::kBf16Pairs is available
  // Stores n elements as an operand row; a last half-filled unit is completed with zero.
  void (*copy_row)(const void* source, DType dtype, int64_t n, Operand operand, void* row);
  // n pairs of two bf16 rows as a unit row of a chained GEMM's transposed left operand; a null second is
  // zero.
  void (*pair_rows)(const void* first, const void* second, int64_t n, void* row);
  void (*gemm)(const GemmTask& task);
  void (*decode_block)(const DecodeTask& task);
  void (*activate)(ActivateTask* task);
  void (*combine)(const CombineTask& task);
  void (*activate_backward)(const ActivateBackwardTask& task);
  void (*load_block)(const BlockTask& task);   // block = matrix, which is fp32
  void (*store_block)(const BlockTask& task);  // matrix = block, rounded to dtype
  void (*column_sums)(const ColumnSumsTask& task);
  float (*dot)(const void* a, DType a_dtype, const void* b, DType b_dtype, int64_t n);
  // What the machine can do at best, for benchmarks. All return a value that depends on all they did.
  float (*multiply_add_loop)(int64_t iterations);  // of fp32, multiply_add_flops each
  float (*bf16_dot_loop)(int64_t iterations);      // of bf16 pairs, twice as many each; null without bf16_dot
  float (*read_loop)(const float* data, int64_t count, int64_t streams);
  int64_t multiply_add_flops;
};

// The best that this processor runs, or the one that PADDLE_MOE_ISA names.
const Kernels& kernels();

inline Matrix transposed(const Matrix& m) { return {m.data, m.out_stride, m.in_stride}; }

// first_out must begin a group.
inline Scale transposed(const Scale& s) {
  return {s.data + (s.first_out >> s.out_shift) * s.out_stride, s.out_stride, s.in_stride, s.out_shift,
          s.in_shift};
}

// How the two weights of a GemmTask are stored: row by row ([in, out]), column by column ([out, in]),
// prepacked in panels, or with any other strides or each in its own way.
enum class Storage { kRows, kColumns, kPanels, kStrided };

inline Storage storage_of(const Matrix& weight) {
  return weight.out_stride == 1  ? Storage::kRows
         : weight.in_stride == 1 ? Storage::kColumns
                                 : Storage::kStrided;
}

inline Storage storage_of(const Matrix& first, const Matrix& second) {
  return storage_of(first) == storage_of(second) ? storage_of(first) : Storage::kStrided;
}

inline Storage storage_of(const Problem& problem, const Matrix& first, const Matrix& second) {
  return problem.prepacked ? Storage::kPanels : storage_of(first, second);
}

inline bool is_packed(Storage storage, int64_t rows, int64_t streamed_rows = kernels().streamed_rows) {
  return storage == Storage::kStrided || (storage == Storage::kRows && rows > streamed_rows);
}

// Columns of each block of a GemmTask, a multiple of kPackedColumns; where weights are not packed, blocks may
// be narrower.
inline int64_t block_columns(Storage storage, int64_t rows) {
  const int64_t fitting = (kStreamedResults / rows - sums_stride(0)) / 2 / kPackedColumns * kPackedColumns;
  if (is_packed(storage, rows) || fitting < kPackedColumns) return kPackedColumns;
  return std::min(fitting, kMaxStreamedColumns);
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#if defined(__clang__) || __GNUC__ >= 10  // earlier ones have no such instructions
#define PADDLE_MOE_CAN_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif
#endif
namespace generic {
extern const Kernels kKernels;
}

}  // namespace cpu
}  // namespace paddle_moe
