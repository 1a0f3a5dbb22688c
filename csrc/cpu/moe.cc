// Schedules the four stages of mixture_of_experts over the threads.
//
//   sort    slots (token, k) by local expert; copy their activation rows, in that order, into the workspace
//   gemm 1  [rows, H] x [H, 2I] per expert; activation while the result is in cache; rows of the intermediate
//   gemm 2  [rows, I] x [I, H] per expert; fp32 rows
//   combine each token's rows, weighted, in the order of k
//
// All tasks of a chunk stand in one queue, stage after stage. A task waits only for what it reads: the second
// GEMM of an expert for the first of the same expert, not for a barrier.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/rows.h"
#include "cpu/threads.h"

namespace paddle_moe {
namespace cpu {
namespace {

struct Layout {
  explicit Layout(const Problem& p, void* workspace, int threads)
      : operand(operand_of(p)),
        hidden_stride(operand_stride(p.hidden_size, operand)),
        inter_stride(operand_stride(p.intermediate_size, operand)),
        down_stride(sums_stride(round_up(p.hidden_size, 2 * kPackedColumns) / 2)) {
    const int64_t bytes_per_token = p.top_k * (hidden_stride + inter_stride + down_stride) * kUnitBytes;
    tokens = chunk_tokens(p, bytes_per_token, kChunkBytes);
    Arena arena(workspace);
    const int64_t num_slots = tokens * p.top_k;
    slots = Slots(&arena, num_slots);
    hidden_rows = arena.take<char>(num_slots * hidden_stride * kUnitBytes);
    inter_rows = arena.take<char>(num_slots * inter_stride * kUnitBytes);
    down_rows = arena.take<float>(num_slots * down_stride * sizeof(float));
    scratch = take_thread_scratch(&arena, threads);
    bytes = arena.used();
  }

  Operand operand;
  int64_t tokens, hidden_stride, inter_stride, down_stride;  // strides in units and floats
  Slots slots;
  char *hidden_rows, *inter_rows;
  float* down_rows;
  std::vector<ThreadScratch> scratch;
  size_t bytes;
};

// Where the pre-activations are kept, if at all, and the next row of each expert there.
struct Saved {
  void* rows;  // [R, 2I]
  std::vector<int64_t> next;
};

class Chunk {
 public:
  Chunk(const Problem& problem, const Layout& layout, int64_t first_token, int64_t num_tokens, void* out,
        uint32_t* amax_bits, Saved* saved)
      : p_(problem),
        w_(layout),
        threads_(static_cast<int64_t>(layout.scratch.size())),
        first_token_(first_token),
        num_tokens_(num_tokens),
        out_(out),
        amax_(amax_bits),
        saved_(saved),
        begin_(sort_slots(problem, first_token, num_tokens, layout.slots)) {
    plan();
  }

  void run() {
    const int64_t useful = useful_threads(p_, active_experts_, num_rows_);
    parallel(static_cast<int>(std::min<int64_t>({threads_, useful, num_tasks_})),
             [this](int thread) { work(thread); });
    for (size_t e = 0; e < saved_->next.size(); ++e) saved_->next[e] += begin_[e + 1] - begin_[e];
  }

 private:
  void plan() {
    const int64_t num_experts = p_.num_experts();
    num_rows_ = begin_[num_experts];
    for (int64_t e = 0; e < num_experts; ++e) active_experts_ += begin_[e + 1] > begin_[e];
    first_left_.reset(new std::atomic<int32_t>[num_experts]);
    for (int64_t e = 0; e < num_experts; ++e) {
      const int64_t rows = begin_[e + 1] - begin_[e];
      const size_t before = first_.size();
      if (rows > 0) {
        const Expert& expert = p_.experts[e];
        const int64_t wanted = divide_up(threads_, active_experts_);
        const Storage of_down = storage_of(p_, expert.down, expert.down);
        // The last tasks are short, because who finds none waits for the others; but not pieces of rows.
        const bool last = begin_[e + 1] == num_rows_ && of_down != Storage::kRows;
        // The first GEMM computes the same columns of gate and up together, the second GEMM two neighbouring
        // blocks of columns.
        cut_into_blocks(e, begin_[e], begin_[e + 1], p_.intermediate_size, 1,
                        storage_of(p_, expert.gate, expert.up), wanted,
                        [this](const GemmBlock& block) { first_.push_back(block); });
        cut_into_blocks(e, begin_[e], begin_[e + 1], p_.hidden_size, 2, of_down,
                        last ? kLastBlocksPerThread * threads_ : wanted,
                        [this](const GemmBlock& block) { second_.push_back(block); });
      }
      first_left_[e].store(static_cast<int32_t>(first_.size() - before), std::memory_order_relaxed);
    }
    copy_tasks_ = divide_up(num_rows_, kRowsPerCopyTask);
    combine_tasks_ = divide_up(num_tokens_, kTokensPerCombineTask);
    num_tasks_ = copy_tasks_ + static_cast<int64_t>(first_.size() + second_.size()) + combine_tasks_;
  }

  // A thread takes the index after a packed GEMM's before it computes that, because it packs the weights of
  // the next one meanwhile.
  void work(int thread) {
    const ThreadScratch& scratch = w_.scratch[thread];
    PackedAhead packed_ahead;
    GemmTask gemms[2];
    int64_t i = take();
    if (is_gemm(i)) gemms[0] = gemm_task(i, scratch);
    for (int turn = 0; i < num_tasks_; turn ^= 1) {
      GemmTask& gemm = gemms[turn];
      const bool ahead = is_gemm(i) && is_packed(gemm);
      int64_t next = -1;
      if (ahead) {
        next = take();
        gemm.packed_ahead = &packed_ahead;
        if (is_gemm(next)) {
          gemms[turn ^ 1] = gemm_task(next, scratch);
          if (is_packed(gemms[turn ^ 1])) gemm.next = &gemms[turn ^ 1];
        }
      }
      run_task(i, gemm, scratch);
      if (!ahead) {
        next = take();
        if (is_gemm(next)) gemms[turn ^ 1] = gemm_task(next, scratch);
      }
      i = next;
    }
  }

  static bool is_packed(const GemmTask& gemm) {
    return !gemm.panels && cpu::is_packed(storage_of(gemm.weight[0], gemm.weight[1]), gemm.num_rows);
  }

  int64_t take() { return next_task_.fetch_add(1, std::memory_order_relaxed); }

  int64_t first_end() const { return copy_tasks_ + static_cast<int64_t>(first_.size()); }
  int64_t second_end() const { return first_end() + static_cast<int64_t>(second_.size()); }
  bool is_gemm(int64_t i) const { return i >= copy_tasks_ && i < second_end(); }

  GemmTask gemm_task(int64_t i, const ThreadScratch& scratch) const {
    const bool first = i < first_end();
    const GemmBlock& block = first ? first_[i - copy_tasks_] : second_[i - first_end()];
    GemmTask task =
        first ? gate_up_gemm(w_.hidden_rows + block.first_row * w_.hidden_stride * kUnitBytes,
                             w_.hidden_stride, p_, w_.operand, block, scratch)
              : neighbours_gemm(w_.inter_rows + block.first_row * w_.inter_stride * kUnitBytes,
                                w_.inter_stride, p_.intermediate_size, w_.operand,
                                p_.experts[block.expert].down, p_.weight_dtype, block,
                                w_.down_rows + block.first_row * w_.down_stride + block.first_column,
                                w_.down_stride, scratch);
    if (first) return task;
    task.panels = p_.prepacked;
    if (!p_.scales.empty()) {
      task.scale[0] = from_column(p_.scales[block.expert].down, block.first_column);
      task.scale[1] = from_column(task.scale[0], task.columns[0]);
    }
    return task;
  }

  void run_task(int64_t i, const GemmTask& gemm, const ThreadScratch& scratch) {
    if (i < copy_tasks_) {
      copy_rows(i);
      copied_.fetch_add(1, std::memory_order_release);
    } else if (i < first_end()) {
      spin_until([&] { return copied_.load(std::memory_order_acquire) == copy_tasks_; });
      const GemmBlock& block = first_[i - copy_tasks_];
      kernels().gemm(gemm);
      activate(block, scratch);
      first_left_[block.expert].fetch_sub(1, std::memory_order_release);
    } else if (i < second_end()) {
      const int32_t expert = second_[i - first_end()].expert;
      spin_until([&] { return first_left_[expert].load(std::memory_order_acquire) == 0; });
      kernels().gemm(gemm);
      second_done_.fetch_add(1, std::memory_order_release);
    } else {
      spin_until([&] {
        return second_done_.load(std::memory_order_acquire) == static_cast<int64_t>(second_.size());
      });
      combine(i - second_end());
    }
  }

  void copy_rows(int64_t task) {
    const int64_t end = std::min(num_rows_, (task + 1) * kRowsPerCopyTask);
    for (int64_t row = task * kRowsPerCopyTask; row < end; ++row) {
      const int64_t token = first_token_ + w_.slots.row_token[row];
      kernels().copy_row(advance(p_.hidden_states, token * p_.hidden_states_stride, p_.dtype), p_.dtype,
                         p_.hidden_size, w_.operand, w_.hidden_rows + row * w_.hidden_stride * kUnitBytes);
    }
  }

  void activate(const GemmBlock& block, const ThreadScratch& scratch) {
    ActivateTask activate = activate_task(p_, block, scratch);
    char* const row = w_.inter_rows + block.first_row * w_.inter_stride * kUnitBytes;
    const Int16Row integers(p_.intermediate_size, w_.operand);
    static_assert(kPackedColumns % kInt16Group == 0, "blocks of columns are whole groups");
    activate.operand = w_.operand;
    activate.out = row + block.first_column * (w_.operand == Operand::kFloat32 ? kUnitBytes : 2);
    activate.out_stride = w_.inter_stride;
    activate.plane_bytes = integers.plane_bytes();
    if (is_integer(w_.operand))
      activate.powers =
          reinterpret_cast<float*>(row + integers.powers_at()) + block.first_column / kInt16Group;
    if (saved_->rows) {
      const int64_t inter = p_.intermediate_size;
      const int64_t saved_row = saved_->next[block.expert] + block.first_row - begin_[block.expert];
      activate.saved_stride = 2 * inter;
      activate.saved_gate = const_cast<void*>(
          advance(saved_->rows, saved_row * activate.saved_stride + block.first_column, p_.dtype));
      activate.saved_up = const_cast<void*>(advance(activate.saved_gate, inter, p_.dtype));
    }
    kernels().activate(&activate);
    if (amax_) raise(&amax_[block.expert], activate.amax_bits);
  }

  void combine(int64_t task) {
    const int64_t token = task * kTokensPerCombineTask, slot = token * p_.top_k;
    char* out = static_cast<char*>(out_) +
                (first_token_ + token) * p_.hidden_size * static_cast<int64_t>(dtype_size(p_.dtype));
    kernels().combine({w_.down_rows, w_.down_stride, w_.slots.position + slot, w_.slots.expert + slot,
                       w_.slots.weight + slot, p_.experts[0].down_bias ? p_.experts.data() : nullptr,
                       p_.bias_dtype, std::min(kTokensPerCombineTask, num_tokens_ - token), p_.top_k,
                       p_.hidden_size, p_.dtype, out});
  }

  static void raise(uint32_t* maximum, uint32_t value) {
    uint32_t seen = __atomic_load_n(maximum, __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(maximum, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  const Problem& p_;
  const Layout& w_;
  const int64_t threads_, first_token_, num_tokens_;
  void* const out_;
  uint32_t* const amax_;
  Saved* const saved_;

  const std::vector<int64_t> begin_;  // the rows of expert e: begin_[e] .. begin_[e + 1] - 1
  std::vector<GemmBlock> first_, second_;
  int64_t num_rows_ = 0, active_experts_ = 0, copy_tasks_ = 0, combine_tasks_ = 0, num_tasks_ = 0;

  std::atomic<int64_t> next_task_{0}, copied_{0}, second_done_{0};
  std::unique_ptr<std::atomic<int32_t>[]>
      first_left_;  // first GEMM blocks of each expert that are not finished
};

}  // namespace

size_t workspace_size(const Problem& problem, int num_threads) {
  return Layout(problem, nullptr, num_threads).bytes;
}

int64_t count_rows(const Problem& problem) { return saved_begin(problem).back(); }

void mixture_of_experts(const Problem& problem, int num_threads, void* workspace, void* out, float* amax,
                        void* pre_activations) {
  const PlainFloats plain;
  Layout layout(problem, workspace, num_threads);
  std::vector<uint32_t> amax_bits(amax ? problem.num_experts() : 0, 0);
  Saved saved{pre_activations, {}};
  if (pre_activations) {
    saved.next = saved_begin(problem);
    saved.next.pop_back();
  }
  for (int64_t t = 0; t < problem.num_tokens; t += layout.tokens) {
    Chunk chunk(problem, layout, t, std::min(layout.tokens, problem.num_tokens - t), out,
                amax ? amax_bits.data() : nullptr, &saved);
    chunk.run();
  }
  for (size_t e = 0; e < amax_bits.size(); ++e) amax[e] = bits_to_float(amax_bits[e]);
}

}  // namespace cpu
}  // namespace paddle_moe
