// logits = hidden_states x gate_weight in fp32: the grouped GEMM's kernel with one expert.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/rows.h"
#include "cpu/threads.h"

namespace paddle_moe {
namespace cpu {
namespace {

struct GateScratch {
  char* rows;
  ThreadScratch thread;
};

int64_t choose_tokens_per_task(int64_t num_tokens, int threads) {
  return std::clamp<int64_t>(divide_up(num_tokens, 4 * threads), 16, kBlockRows);
}

// Each thread widens the rows of its own task: a task is a block of tokens with all experts.
struct GateLayout {
  GateLayout(const GateProblem& p, void* workspace, int threads)
      : tokens_per_task(choose_tokens_per_task(p.num_tokens, threads)),
        num_tasks(divide_up(p.num_tokens, tokens_per_task)),
        row_stride(operand_stride(p.hidden_size, Operand::kFloat32)) {
    Arena arena(workspace);
    for (const ThreadScratch& thread : take_thread_scratch(&arena, std::min<int64_t>(threads, num_tasks))) {
      scratch.push_back({arena.take<char>(tokens_per_task * row_stride * kUnitBytes), thread});
    }
    bytes = arena.used();
  }
  int64_t tokens_per_task, num_tasks, row_stride;
  std::vector<GateScratch> scratch;  // of each thread
  size_t bytes;
};

void gate_block(const GateProblem& p, const GateLayout& layout, const GateScratch& scratch,
                int64_t first_token, int64_t num_tokens, float* logits) {
  for (int64_t i = 0; i < num_tokens; ++i) {
    kernels().copy_row(advance(p.hidden_states, (first_token + i) * p.hidden_states_stride, p.dtype), p.dtype,
                       p.hidden_size, Operand::kFloat32, scratch.rows + i * layout.row_stride * kUnitBytes);
  }
  const int64_t width = block_columns(storage_of(p.weight), num_tokens);
  for (int64_t column = 0; column < p.num_experts; column += 2 * width) {
    const int64_t columns = std::min(2 * width, p.num_experts - column);
    kernels().gemm(neighbours_gemm(scratch.rows, layout.row_stride, p.hidden_size, Operand::kFloat32,
                                   p.weight, p.weight_dtype, {0, 0, num_tokens, column, columns, width},
                                   scratch.thread.result, sums_stride(width), scratch.thread));
    for (int64_t i = 0; i < num_tokens; ++i) {
      std::memcpy(logits + (first_token + i) * p.num_experts + column,
                  scratch.thread.result + i * sums_stride(width), columns * sizeof(float));
    }
  }
}

// Backward, a task is a block of tokens for hidden_states, or a block of the weight's gradient, for which the
// activations are widened kBlockUnits tokens at a time.
struct GateBackwardLayout {
  GateBackwardLayout(const GateBackwardProblem& b, void* workspace, int threads)
      : tokens_per_task(choose_tokens_per_task(b.forward.num_tokens, threads)),
        hidden_tasks(b.hidden_states ? divide_up(b.forward.num_tokens, tokens_per_task) : 0),
        row_blocks(divide_up(b.forward.hidden_size, kBlockRows)),
        num_tasks(hidden_tasks +
                  (b.weight.data ? row_blocks * divide_up(b.forward.num_experts, 2 * kPackedColumns) : 0)),
        row_stride(operand_stride(b.forward.num_experts, Operand::kFloat32)) {
    Arena arena(workspace);
    for (const ThreadScratch& thread : take_thread_scratch(&arena, std::min<int64_t>(threads, num_tasks))) {
      const int64_t units = kBlockRows * std::max(row_stride, kBlockUnits);
      scratch.push_back({arena.take<char>(units * kUnitBytes), thread});
    }
    bytes = arena.used();
  }
  int64_t tokens_per_task, hidden_tasks, row_blocks, num_tasks, row_stride;
  std::vector<GateScratch> scratch;  // of each thread
  size_t bytes;
};

void gate_hidden_block(const GateBackwardProblem& b, const GateBackwardLayout& layout,
                       const GateScratch& scratch, int64_t first_token, int64_t num_tokens) {
  const GateProblem& p = b.forward;
  for (int64_t i = 0; i < num_tokens; ++i) {
    kernels().copy_row(b.grad_logits + (first_token + i) * p.num_experts, DType::kFloat32, p.num_experts,
                       Operand::kFloat32, scratch.rows + i * layout.row_stride * kUnitBytes);
  }
  const Matrix weight = transposed(p.weight);
  const int64_t width = block_columns(storage_of(weight), num_tokens);
  for (int64_t column = 0; column < p.hidden_size; column += 2 * width) {
    const int64_t columns = std::min(2 * width, p.hidden_size - column);
    kernels().gemm(neighbours_gemm(scratch.rows, layout.row_stride, p.num_experts, Operand::kFloat32, weight,
                                   p.weight_dtype, {0, 0, num_tokens, column, columns, width},
                                   scratch.thread.result, sums_stride(width), scratch.thread));
    kernels().store_block(
        {scratch.thread.result,
         sums_stride(width),
         num_tokens,
         columns,
         {advance(b.hidden_states, first_token * p.hidden_size + column, p.dtype), p.hidden_size, 1},
         p.dtype});
  }
}

void gate_weight_block(const GateBackwardProblem& b, const GateScratch& scratch, int64_t row,
                       int64_t column) {
  const GateProblem& p = b.forward;
  const int64_t rows = std::min(kBlockRows, p.hidden_size - row);
  const int64_t columns = std::min(2 * kPackedColumns, p.num_experts - column);
  const int64_t first = std::min(kPackedColumns, columns);
  std::fill_n(scratch.thread.result, rows * 2 * kPackedColumns, 0.0f);
  for (int64_t token = 0; token < p.num_tokens; token += kBlockUnits) {
    const int64_t tokens = std::min(kBlockUnits, p.num_tokens - token);
    for (int64_t i = 0; i < tokens; ++i) {
      kernels().copy_row(advance(p.hidden_states, (token + i) * p.hidden_states_stride + row, p.dtype),
                         p.dtype, rows, Operand::kFloat32, scratch.rows + i * kBlockRows * kUnitBytes);
    }
    const Matrix right{b.grad_logits + token * p.num_experts + column, p.num_experts, 1};
    GemmTask task{scratch.rows,
                  1,
                  rows,
                  tokens,
                  Operand::kFloat32,
                  DType::kFloat32,
                  {right, from_column(right, first, DType::kFloat32)},
                  {first, columns - first},
                  kPackedColumns,
                  scratch.thread.result,
                  2 * kPackedColumns,
                  scratch.thread.gemm};
    task.unit_stride = kBlockRows;
    task.accumulate = task.chained = true;
    kernels().gemm(task);
  }
  const Matrix gradient = from_row(from_column(b.weight, column, p.weight_dtype), row, p.weight_dtype);
  kernels().store_block({scratch.thread.result, 2 * kPackedColumns, rows, columns, gradient, p.weight_dtype});
}

}  // namespace

size_t gate_workspace_size(const GateProblem& problem, int num_threads) {
  return GateLayout(problem, nullptr, num_threads).bytes;
}

void gate(const GateProblem& problem, int num_threads, void* workspace, float* logits) {
  const PlainFloats plain;
  const GateLayout layout(problem, workspace, num_threads);
  if (layout.num_tasks == 0) return;
  kernels();  // so that it throws here where the choice of them fails
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(layout.scratch.size()), [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < layout.num_tasks;) {
      const int64_t token = i * layout.tokens_per_task;
      gate_block(problem, layout, layout.scratch[thread], token,
                 std::min(layout.tokens_per_task, problem.num_tokens - token), logits);
    }
  });
}

size_t gate_backward_workspace_size(const GateBackwardProblem& problem, int num_threads) {
  return GateBackwardLayout(problem, nullptr, num_threads).bytes;
}

void gate_backward(const GateBackwardProblem& b, int num_threads, void* workspace) {
  const PlainFloats plain;
  const GateBackwardLayout layout(b, workspace, num_threads);
  if (layout.num_tasks == 0) return;
  kernels();  // as above
  const int64_t tokens = layout.tokens_per_task;
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(layout.scratch.size()), [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < layout.num_tasks;) {
      if (i < layout.hidden_tasks) {
        gate_hidden_block(b, layout, layout.scratch[thread], i * tokens,
                          std::min(tokens, b.forward.num_tokens - i * tokens));
      } else {
        const int64_t block = i - layout.hidden_tasks;
        gate_weight_block(b, layout.scratch[thread], block % layout.row_blocks * kBlockRows,
                          block / layout.row_blocks * 2 * kPackedColumns);
      }
    }
  });
}

}  // namespace cpu
}  // namespace paddle_moe
