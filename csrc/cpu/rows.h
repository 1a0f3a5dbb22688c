// What the forward and the backward of mixture_of_experts share: the rows of a chunk of tokens, that is the
// slots (token, k) whose expert is local, sorted by expert; how an expert's GEMM is cut into blocks; and the
// tasks of such blocks, of which the gate uses neighbours_gemm() too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "chunks.h"
#include "cpu/float_formats.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"

namespace paddle_moe {
namespace cpu {

// Of rows of a chunk, where chunk_size is left to us.
constexpr int64_t kChunkBytes = int64_t{512} << 20;
constexpr int64_t kRowsPerCopyTask = 32;
constexpr int64_t kTokensPerCombineTask = 16;
// Of the second GEMM of a forward's last expert, where columns lie in memory as runs: blocks.
constexpr int64_t kLastBlocksPerThread = 4;
// A thread is woken for at least this many bytes of weights, or multiply-adds; less is done before it is
// awake.
constexpr int64_t kWeightBytesPerThread = 256 * 1024;
constexpr int64_t kMultipliesPerThread = 1024 * 1024;

inline float load_float(const void* data, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
    case DType::kFloat16:
      return f16_to_float(static_cast<const uint16_t*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

inline Operand operand_of(DType dtype) {
  return dtype == DType::kBFloat16 && kernels().bf16_dot ? Operand::kBf16Pairs : Operand::kFloat32;
}

// Quantised weights stored column by column or prepacked become bf16 where that is multiplied; else integers
// are multiplied as integers. Integers with fp32 activations would take two planes, which pays for int4
// stored column by column only. All others become fp32.
inline Operand operand_of(const Problem& p) {
  if (!is_quantised(p.weight_dtype)) return operand_of(p.dtype);
  const bool in_columns = std::all_of(p.experts.begin(), p.experts.end(), [](const Expert& e) {
    return storage_of(e.gate, e.up) == Storage::kColumns && storage_of(e.down) == Storage::kColumns;
  });
  const bool int4 = p.weight_dtype == DType::kInt4;
  if (!p.prepacked && !in_columns) return Operand::kFloat32;
  if (operand_of(p.dtype) == Operand::kBf16Pairs) return Operand::kBf16Pairs;
  if (p.dtype == DType::kFloat32) return int4 && !p.prepacked ? Operand::kTwoInt16 : Operand::kFloat32;
  return int4 || p.weight_dtype == DType::kInt8 ? Operand::kInt16 : Operand::kFloat32;
}

// The local expert of slot i, or -1.
inline int32_t local_expert(const Problem& p, int64_t i) {
  const int64_t id = p.routing_table_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.routing_table)[i]
                                                            : static_cast<const int32_t*>(p.routing_table)[i];
  const bool local = id >= p.first_expert && id - p.first_expert < p.num_experts();
  return local ? static_cast<int32_t>(id - p.first_expert) : -1;
}

// The threads that are worth waking for rows of so many experts.
inline int64_t useful_threads(const Problem& p, int64_t experts, int64_t rows) {
  const int64_t weights = 3 * p.hidden_size * p.intermediate_size;
  return 1 + std::max(experts * dtype_bytes(p.weight_dtype, weights) / kWeightBytesPerThread,
                      rows * weights / kMultipliesPerThread);
}

// Of a chunk; in the workspace.
struct Slots {
  Slots() = default;
  Slots(Arena* arena, int64_t slots)
      : position(arena->take<int32_t>(slots * sizeof(int32_t))),
        expert(arena->take<int32_t>(slots * sizeof(int32_t))),
        weight(arena->take<float>(slots * sizeof(float))),
        row_token(arena->take<int32_t>(slots * sizeof(int32_t))) {}

  int32_t* position;   // of each slot: its row, or -1
  int32_t* expert;     // of each slot: its local expert, or -1
  float* weight;       // of each slot
  int32_t* row_token;  // of each row, counted from the first token of the chunk
};

// Sorts a chunk. The rows of expert e are result[e] .. result[e + 1] - 1.
inline std::vector<int64_t> sort_slots(const Problem& p, int64_t first_token, int64_t num_tokens,
                                       const Slots& slots) {
  const int64_t num_experts = p.num_experts(), count = num_tokens * p.top_k, base = first_token * p.top_k;
  std::vector<int64_t> begin(num_experts + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t e = slots.expert[i] = local_expert(p, base + i);
    if (e >= 0) ++begin[e + 1];
    slots.weight[i] = load_float(p.router_weights, base + i, p.router_weights_dtype);
  }
  for (int64_t e = 0; e < num_experts; ++e) begin[e + 1] += begin[e];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t e = slots.expert[i];
    slots.position[i] = e < 0 ? -1 : static_cast<int32_t>(next[e]++);
    if (e >= 0) slots.row_token[slots.position[i]] = static_cast<int32_t>(i / p.top_k);
  }
  return begin;
}

// The same over the whole call, whatever the chunks: this is how pre-activations are kept. Each chunk moves
// the experts' places on by its own rows.
inline std::vector<int64_t> saved_begin(const Problem& p) {
  std::vector<int64_t> begin(p.num_experts() + 1, 0);
  for (int64_t i = 0; i < p.num_tokens * p.top_k; ++i) {
    const int32_t e = local_expert(p, i);
    if (e >= 0) ++begin[e + 1];
  }
  for (int64_t e = 0; e < p.num_experts(); ++e) begin[e + 1] += begin[e];
  return begin;
}

// A block of rows and columns of one expert's GEMM.
struct GemmBlock {
  int32_t expert;
  int64_t first_row, num_rows;
  int64_t first_column, num_columns;
  int64_t width;  // of each of the two blocks of columns that are computed together
};

// Calls add(block) for all blocks of rows begin .. end - 1. `neighbours` is 2 where the two blocks of columns
// are neighbours, 1 where they are the same columns of two weights. blocks_wanted: blocks that are not packed
// become narrower until there are this many, all of about one width: one for each thread, more would cost
// long runs of memory.
template <class Add>
void cut_into_blocks(int64_t expert, int64_t begin, int64_t end, int64_t columns, int64_t neighbours,
                     Storage storage, int64_t blocks_wanted, const Add& add) {
  int64_t width = block_columns(storage, std::min(kBlockRows, end - begin));
  if (!is_packed(storage, end - begin)) {
    const int64_t blocks = std::max(blocks_wanted, divide_up(columns, neighbours * width));
    width = round_up(divide_up(columns, neighbours * blocks), kPackedColumns);
  }
  for (int64_t c = 0; c < columns; c += neighbours * width) {
    for (int64_t r = begin; r < end; r += kBlockRows) {
      add(GemmBlock{static_cast<int32_t>(expert), r, std::min(kBlockRows, end - r), c,
                    std::min(neighbours * width, columns - c), width});
    }
  }
}

inline Scale from_column(Scale scale, int64_t column) {
  scale.first_out += column;
  return scale;
}

// A block's rows x the same columns of gate and up; the two results lie side by side in scratch.result.
inline GemmTask gate_up_gemm(const void* rows, int64_t row_stride, const Problem& p, Operand operand,
                             const GemmBlock& block, const ThreadScratch& scratch) {
  const Expert& expert = p.experts[block.expert];
  GemmTask task{rows,
                row_stride,
                block.num_rows,
                p.hidden_size,
                operand,
                p.weight_dtype,
                {from_column(expert.gate, block.first_column, p.weight_dtype),
                 from_column(expert.up, block.first_column, p.weight_dtype)},
                {block.num_columns, block.num_columns},
                block.width,
                scratch.result,
                sums_stride(block.width),
                scratch.gemm};
  task.panels = p.prepacked;
  if (!p.scales.empty()) {
    const ExpertScales& scales = p.scales[block.expert];
    task.scale[0] = from_column(scales.gate, block.first_column);
    task.scale[1] = from_column(scales.up, block.first_column);
  }
  return task;
}

// What becomes of gate and up, as gate_up_gemm() left them, for the caller to complete: where it goes, or is
// saved.
inline ActivateTask activate_task(const Problem& p, const GemmBlock& block, const ThreadScratch& scratch) {
  const Expert& expert = p.experts[block.expert];
  const auto bias = [&](const void* b) { return b ? advance(b, block.first_column, p.bias_dtype) : nullptr; };
  ActivateTask task{};
  task.gate = scratch.result;
  task.up = scratch.result + block.width;
  task.gate_up_stride = sums_stride(block.width);
  task.num_rows = block.num_rows;
  task.columns = block.num_columns;
  task.gate_bias = bias(expert.gate_bias);
  task.up_bias = bias(expert.up_bias);
  task.bias_dtype = p.bias_dtype;
  task.activation = p.activation;
  task.dtype = p.dtype;
  return task;
}

// A block's rows x two neighbouring blocks of columns of one weight, quantised ones still without scales.
inline GemmTask neighbours_gemm(const void* rows, int64_t row_stride, int64_t depth, Operand operand,
                                const Matrix& weight, DType weight_dtype, const GemmBlock& block,
                                float* result, int64_t result_stride, const ThreadScratch& scratch) {
  const int64_t first_columns = std::min(block.width, block.num_columns);
  const Matrix first = from_column(weight, block.first_column, weight_dtype);
  return {rows,
          row_stride,
          block.num_rows,
          depth,
          operand,
          weight_dtype,
          {first, from_column(first, first_columns, weight_dtype)},
          {first_columns, block.num_columns - first_columns},
          block.width,
          result,
          result_stride,
          scratch.gemm};
}

}  // namespace cpu
}  // namespace paddle_moe
