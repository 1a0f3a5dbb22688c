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

// Each thread widens the rows of its own task: a task is a block of tokens with all experts.
struct GateLayout {
  GateLayout(const GateProblem& p, void* workspace, int threads)
      : row_stride(operand_stride(p.hidden_size, Operand::kFloat32)) {
    Arena arena(workspace);
    for (const ThreadScratch& thread : take_thread_scratch(&arena, threads)) {
      scratch.push_back({arena.take<char>(kBlockRows * row_stride * kUnitBytes), thread});
    }
    bytes = arena.used();
  }
  int64_t row_stride;
  std::vector<GateScratch> scratch;
  size_t bytes;
};

void gate_block(const GateProblem& p, const GateLayout& layout, const GateScratch& scratch,
                int64_t first_token, int64_t num_tokens, float* logits) {
  for (int64_t i = 0; i < num_tokens; ++i) {
    kernels().copy_row(advance(p.hidden_states, (first_token + i) * p.hidden_states_stride, p.dtype), p.dtype,
                       p.hidden_size, Operand::kFloat32, scratch.rows + i * layout.row_stride * kUnitBytes);
  }
  const int64_t width = block_columns(p.weight, num_tokens);
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
      : row_stride(operand_stride(b.forward.num_experts, Operand::kFloat32)) {
    Arena arena(workspace);
    for (const ThreadScratch& thread : take_thread_scratch(&arena, threads)) {
      const int64_t units = kBlockRows * std::max(row_stride, kBlockUnits);
      scratch.push_back({arena.take<char>(units * kUnitBytes), thread});
    }
    bytes = arena.used();
  }
  int64_t row_stride;
  std::vector<GateScratch> scratch;
  size_t bytes;
};

void gate_hidden_block(const GateBackwardProblem& b, const GateBackwardLayout& layout,
                       const GateScratch& scratch, int64_t first_token, int64_t num_tokens) {
  const GateProblem& p = b.forward;
  for (int64_t i = 0; i < num_tokens; ++i) {
    kernels().copy_row(b.grad_logits + (first_token + i) * p.num_experts, DType::kFloat32, p.num_experts,
                       Operand::kFloat32, scratch.rows + i * layout.row_stride * kUnitBytes);
  }
  const Matrix transposed{p.weight.data, p.weight.out_stride, p.weight.in_stride};
  const int64_t width = block_columns(transposed, num_tokens);
  for (int64_t column = 0; column < p.hidden_size; column += 2 * width) {
    const int64_t columns = std::min(2 * width, p.hidden_size - column);
    kernels().gemm(neighbours_gemm(scratch.rows, layout.row_stride, p.num_experts, Operand::kFloat32,
                                   transposed, p.weight_dtype, {0, 0, num_tokens, column, columns, width},
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
  Matrix gradient = from_column(b.weight, column, p.weight_dtype);
  gradient.data = advance(gradient.data, row * gradient.in_stride, p.weight_dtype);
  kernels().store_block({scratch.thread.result, 2 * kPackedColumns, rows, columns, gradient, p.weight_dtype});
}

}  // namespace

size_t gate_workspace_size(const GateProblem& problem, int num_threads) {
  return GateLayout(problem, nullptr, num_threads).bytes;
}

void gate(const GateProblem& problem, int num_threads, void* workspace, float* logits) {
  const GateLayout layout(problem, workspace, num_threads);
  const int64_t tokens_per_task =
      std::min(kBlockRows, std::max<int64_t>(16, divide_up(problem.num_tokens, 4 * num_threads)));
  const int64_t num_tasks = divide_up(problem.num_tokens, tokens_per_task);
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(num_threads, num_tasks)), [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      const int64_t token = i * tokens_per_task;
      gate_block(problem, layout, layout.scratch[thread], token,
                 std::min(tokens_per_task, problem.num_tokens - token), logits);
    }
  });
}

size_t gate_backward_workspace_size(const GateBackwardProblem& problem, int num_threads) {
  return GateBackwardLayout(problem, nullptr, num_threads).bytes;
}

void gate_backward(const GateBackwardProblem& b, int num_threads, void* workspace) {
  const GateBackwardLayout layout(b, workspace, num_threads);
  const GateProblem& p = b.forward;
  const int64_t tokens_per_task =
      std::min(kBlockRows, std::max<int64_t>(16, divide_up(p.num_tokens, 4 * num_threads)));
  const int64_t hidden_tasks = b.hidden_states ? divide_up(p.num_tokens, tokens_per_task) : 0;
  const int64_t row_blocks = divide_up(p.hidden_size, kBlockRows);
  const int64_t weight_tasks = b.weight.data ? row_blocks * divide_up(p.num_experts, 2 * kPackedColumns) : 0;
  const int64_t num_tasks = hidden_tasks + weight_tasks;
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(num_threads, num_tasks)), [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      if (i < hidden_tasks) {
        gate_hidden_block(b, layout, layout.scratch[thread], i * tokens_per_task,
                          std::min(tokens_per_task, p.num_tokens - i * tokens_per_task));
      } else {
        const int64_t block = i - hidden_tasks;
        gate_weight_block(b, layout.scratch[thread], block % row_blocks * kBlockRows,
                          block / row_blocks * 2 * kPackedColumns);
      }
    }
  });
}

}  // namespace cpu
}  // namespace paddle_moe
