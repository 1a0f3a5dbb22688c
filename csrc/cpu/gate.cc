// logits = hidden_states x gate_weight in fp32: the grouped GEMM's kernel with one expert.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

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
    const int64_t first = std::min(width, columns);
    const Matrix weight = from_column(p.weight, column, p.weight_dtype);
    kernels().gemm({scratch.rows,
                    layout.row_stride,
                    num_tokens,
                    p.hidden_size,
                    Operand::kFloat32,
                    p.weight_dtype,
                    {weight, from_column(weight, first, p.weight_dtype)},
                    {first, columns - first},
                    width,
                    scratch.thread.result,
                    2 * width,
                    scratch.thread.gemm});
    for (int64_t i = 0; i < num_tokens; ++i) {
      std::memcpy(logits + (first_token + i) * p.num_experts + column, scratch.thread.result + i * 2 * width,
                  columns * sizeof(float));
    }
  }
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

}  // namespace cpu
}  // namespace paddle_moe
