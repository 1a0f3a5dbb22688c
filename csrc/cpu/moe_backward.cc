// Schedules the backward of mixture_of_experts over the threads. Per chunk of tokens, with the rows sorted by
// expert as in moe.cc:
//
//   copy           activation rows, in pairs of rows where bf16 pairs are multiplied; rows of grad_out
//   recompute      the pre-activations, where they were not kept: the first GEMM again
//   intermediate   grad_out x down^T, then the activation backwards while the result is in cache: rows of the
//                  gradients of gate and up, of the weighted intermediate, and parts of the router's gradient
//   hidden         gate gradient x gate^T + up gradient x up^T, fp32 rows
//   weights        per expert, activations^T x gate and up gradient, intermediate^T x grad_out; biases
//   combine        each token's rows of `hidden`, in the order of k; the gradient of its router weights
//
// Quantised weights have no gradients of their own. Here they become fp32, a block at a time, because each
// has a scale along the dimension that is summed over.
//
// All tasks of a chunk stand in one queue. An expert's later stages follow the `intermediate` tasks of the
// next expert, so that its rows are still in a cache and nobody waits for a task that has only just begun.
#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/rows.h"
#include "cpu/threads.h"

namespace paddle_moe {
namespace cpu {
namespace {

// Tasks of an expert's gate and up gradients, or of its down gradient, for each thread.
constexpr int64_t kWeightTasksPerThread = 4;
// By default a chunk in fp32 takes no more than half of the weights, which are there anyway, or than this; a
// chunk of that size still computes far longer than it reads weights and adds to their gradients. In bf16 and
// fp16 a second chunk would take fp32 sums of the gradients, so chunks are as large as in the forward.
constexpr int64_t kSmallChunkBytes = int64_t{64} << 20;

int64_t chunk_bytes(DType dtype, int64_t weight_bytes) {
  return dtype == DType::kFloat32 ? std::clamp(weight_bytes / 2, kSmallChunkBytes, kChunkBytes) : kChunkBytes;
}

// Of a block of quantised or prepacked weights as fp32: those of a GemmTask.
constexpr int64_t kDecodedColumns = 2 * kPackedColumns;

// Gradients of weights above this size would not stay in a cache until they are read.
constexpr int64_t kCachedGradientBytes = int64_t{32} << 20;

// What the caller wants, and so what has to be computed.
struct Wanted {
  explicit Wanted(const BackwardProblem& b) {
    for (const Expert& e : b.experts) {
      gate_up |= e.gate.data || e.up.data;
      down |= e.down.data != nullptr;
      gate_up_bias |= e.gate_bias || e.up_bias;
      down_bias |= e.down_bias != nullptr;
    }
    hidden = b.hidden_states != nullptr;
    router = b.router_weights != nullptr;
    gate_up_rows = hidden || gate_up || gate_up_bias;
    intermediate = gate_up_rows || down || router;
  }
  bool hidden = false, router = false, gate_up = false, down = false, gate_up_bias = false, down_bias = false;
  bool gate_up_rows = false;  // rows of the gradients of gate and up
  bool intermediate = false;  // what pre-activations are read for
};

struct Layout {
  Layout(const BackwardProblem& b, void* workspace, int threads)
      : wanted(b),
        decoded(is_quantised(b.forward.weight_dtype) || b.forward.prepacked),
        operand(decoded ? Operand::kFloat32 : operand_of(b.forward.dtype)),
        hidden_operand(operand_of(b.forward)),
        row_dtype(operand == Operand::kBf16Pairs ? DType::kBFloat16 : DType::kFloat32),
        rows_per_unit(operand == Operand::kBf16Pairs ? 2 : 1),
        recompute(wanted.intermediate && b.pre_activations == nullptr),
        hidden_stride(operand_stride(b.forward.hidden_size, hidden_operand)),
        grad_stride(operand_stride(b.forward.hidden_size, operand)),
        inter_stride(operand_stride(b.forward.intermediate_size, operand)),
        hidden_unit_stride(operand_stride(b.forward.hidden_size, Operand::kFloat32)),
        inter_unit_stride(operand_stride(b.forward.intermediate_size, Operand::kFloat32)),
        hidden_grad_stride(sums_stride(round_up(b.forward.hidden_size, 2 * kPackedColumns) / 2)),
        router_sums(divide_up(b.forward.intermediate_size, kRouterSumColumns)) {
    const Problem& p = b.forward;
    const int64_t inter = p.intermediate_size;
    const int64_t weight_bytes =
        p.num_experts() * 3 * p.hidden_size * inter * static_cast<int64_t>(dtype_size(p.dtype));
    constexpr int64_t kSomeRows = 64;  // no piece of them is rounded up
    Arena some_rows(nullptr);
    take_rows(p, &some_rows, kSomeRows, kSomeRows / rows_per_unit);
    const int64_t row_bytes = static_cast<int64_t>(some_rows.used()) / kSomeRows;
    tokens = chunk_tokens(p, p.top_k * row_bytes, chunk_bytes(p.dtype, weight_bytes));
    Arena arena(workspace);
    const int64_t n = tokens * p.top_k;
    slots = Slots(&arena, n);
    row_weight = arena.take<float>(n * sizeof(float));
    // Each expert may have a unit that is not full.
    take_rows(p, &arena, n, rows_per_unit == 1 ? n : n / 2 + std::min(n, p.num_experts()));
    bias_stride = 2 * inter + p.hidden_size;
    bias_sums =
        arena.take<float>(wanted.gate_up_bias || wanted.down_bias ? p.num_experts() * bias_stride * 4 : 0);
    // Between chunks the gradients of weights have to stay in fp32; where they are fp32 themselves, they are
    // their own accumulators.
    separate_sums = tokens < p.num_tokens && p.dtype != DType::kFloat32;
    gate_up_sums = arena.take<float>(
        separate_sums && wanted.gate_up ? p.num_experts() * 2 * p.hidden_size * inter * 4 : 0);
    down_sums =
        arena.take<float>(separate_sums && wanted.down ? p.num_experts() * p.hidden_size * inter * 4 : 0);
    large_gradients = weight_bytes > kCachedGradientBytes;
    scratch = take_thread_scratch(&arena, threads, decoded ? kBlockUnits * kDecodedColumns : 0);
    bytes = arena.used();
  }

  // What there is of every row, and of every unit of rows, if it is needed.
  void take_rows(const Problem& p, Arena* arena, int64_t rows, int64_t units) {
    // Units of one row serve as rows too. Where weights are decoded, there is no use for units, and the first
    // GEMM has operands of its own.
    const bool hidden_row = recompute && (rows_per_unit > 1 || decoded);
    const bool hidden_unit = wanted.gate_up || (recompute && !hidden_row);
    const auto take = [&](bool needed, int64_t count, int64_t elements, int64_t size = kUnitBytes) {
      return arena->take<char>(needed ? count * elements * size : 0);
    };
    hidden_units = take(hidden_unit, units, hidden_unit_stride);
    hidden_rows = hidden_row ? take(true, rows, hidden_stride) : hidden_units;
    grad_rows = take(true, rows, grad_stride);
    pre_activations =
        take(recompute, rows, 2 * p.intermediate_size, static_cast<int64_t>(dtype_size(p.dtype)));
    gate_up_rows = take(wanted.gate_up_rows, rows, 2 * inter_stride);
    inter_units = take(wanted.down, units, inter_unit_stride);
    hidden_grad_rows = reinterpret_cast<float*>(take(wanted.hidden, rows, hidden_grad_stride));
    sums = reinterpret_cast<float*>(take(wanted.router, rows, router_sums));
  }

  Wanted wanted;
  bool decoded;                     // weights become fp32 block by block, but in the first GEMM
  Operand operand, hidden_operand;  // the latter in the first GEMM
  DType row_dtype;                  // how rows of the former are stored
  int64_t rows_per_unit;            // of the left operands of the gradients of weights
  bool recompute;
  int64_t hidden_stride, grad_stride, inter_stride, hidden_unit_stride, inter_unit_stride;  // units
  int64_t hidden_grad_stride, router_sums, bias_stride;                                     // floats
  int64_t tokens;
  Slots slots;
  float* row_weight;
  char *hidden_rows, *hidden_units, *grad_rows, *pre_activations, *gate_up_rows, *inter_units;
  float *hidden_grad_rows, *sums, *bias_sums, *gate_up_sums, *down_sums;
  bool separate_sums, large_gradients;
  std::vector<ThreadScratch> scratch;
  size_t bytes;
};

enum class Stage { kCopy, kRecompute, kIntermediate, kHidden, kGateUpWeight, kDownWeight, kBias, kCombine };

struct Task {
  Stage stage;
  GemmBlock block;  // copy and combine: first_row and num_rows are rows and tokens
};

// Of an expert over the chunks so far.
struct Progress {
  std::vector<int64_t> saved_row;  // the next row in the saved pre-activations
  std::vector<bool> started;       // the sums of its weight gradients hold something
};

class Chunk {
 public:
  Chunk(const BackwardProblem& problem, const Layout& layout, int64_t first_token, int64_t num_tokens,
        Progress* progress)
      : b_(problem),
        p_(problem.forward),
        w_(layout),
        threads_(static_cast<int64_t>(layout.scratch.size())),
        first_token_(first_token),
        num_tokens_(num_tokens),
        last_(first_token + num_tokens == p_.num_tokens),
        progress_(progress),
        begin_(sort_slots(p_, first_token, num_tokens, layout.slots)) {
    for (int64_t i = 0; i < num_tokens * p_.top_k; ++i) {
      if (w_.slots.position[i] >= 0) w_.row_weight[w_.slots.position[i]] = w_.slots.weight[i];
    }
    for (int64_t e = 0; e < p_.num_experts(); ++e)
      first_unit_.push_back(first_unit_.back() + divide_up(rows_of(e), w_.rows_per_unit));
    plan();
  }

  void run() {
    const int64_t useful = useful_threads(p_, p_.num_experts(), begin_.back());
    const int64_t count = static_cast<int64_t>(tasks_.size());
    parallel(static_cast<int>(std::min<int64_t>({threads_, useful, count})),
             [this](int thread) { work(w_.scratch[thread]); });
    for (int64_t e = 0; e < p_.num_experts(); ++e) {
      progress_->saved_row[e] += rows_of(e);
      if (rows_of(e) > 0) progress_->started[e] = true;
    }
  }

 private:
  int64_t rows_of(int64_t expert) const { return begin_[expert + 1] - begin_[expert]; }

  // ---- planning

  void plan() {
    const int64_t num_experts = p_.num_experts();
    for (int64_t e = 0; e < num_experts; ++e) {
      for (int64_t r = begin_[e]; r < begin_[e + 1]; r += kRowsPerCopyTask)
        add(Stage::kCopy,
            {static_cast<int32_t>(e), r, std::min(kRowsPerCopyTask, begin_[e + 1] - r), 0, 0, 0});
    }
    recompute_left_.reset(new std::atomic<int32_t>[num_experts]);
    intermediate_left_.reset(new std::atomic<int32_t>[num_experts]);
    for (int64_t e = 0; e < num_experts; ++e) {
      recompute_left_[e].store(0, std::memory_order_relaxed);
      intermediate_left_[e].store(0, std::memory_order_relaxed);
    }
    for (int64_t e = 0; w_.recompute && e < num_experts; ++e) {
      recompute_left_[e] = cut(Stage::kRecompute, e, p_.intermediate_size, 1,
                               storage_of(p_, p_.experts[e].gate, p_.experts[e].up));
    }
    int64_t previous = -1;
    for (int64_t e = 0; e < num_experts; ++e) {
      if (rows_of(e) == 0) {
        if (last_) add_weight_tasks(e);
        continue;
      }
      if (w_.wanted.intermediate) {
        const Expert& expert = p_.experts[e];
        intermediate_left_[e] = cut(Stage::kIntermediate, e, p_.intermediate_size, 2,
                                    transposed_storage(expert.down, expert.down));
      }
      if (previous >= 0) add_later_tasks(previous);
      previous = e;
    }
    if (previous >= 0) add_later_tasks(previous);
    for (int64_t t = 0; (w_.wanted.hidden || w_.wanted.router) && t < num_tokens_; t += kTokensPerCombineTask)
      add(Stage::kCombine, {0, t, std::min(kTokensPerCombineTask, num_tokens_ - t), 0, 0, 0});
  }

  // How multiply_transposed() has the weights. Decoded ones get blocks as if they were packed, of which two
  // are what there is room for.
  Storage transposed_storage(const Matrix& first, const Matrix& second) const {
    static_assert(kDecodedColumns == 2 * kPackedColumns, "");
    return w_.decoded ? Storage::kStrided : storage_of(transposed(first), transposed(second));
  }

  void add(Stage stage, const GemmBlock& block) {
    if (stage == Stage::kCopy) ++copy_tasks_;
    if (stage == Stage::kIntermediate || stage == Stage::kHidden) ++row_tasks_;
    tasks_.push_back({stage, block});
  }

  int32_t cut(Stage stage, int64_t e, int64_t columns, int64_t neighbours, Storage storage) {
    const size_t before = tasks_.size();
    if (rows_of(e) > 0) {
      cut_into_blocks(e, begin_[e], begin_[e + 1], columns, neighbours, storage, threads_,
                      [&](const GemmBlock& block) { add(stage, block); });
    }
    return static_cast<int32_t>(tasks_.size() - before);
  }

  void add_later_tasks(int64_t e) {
    if (w_.wanted.hidden) {
      const Expert& expert = p_.experts[e];
      cut(Stage::kHidden, e, p_.hidden_size, 2, transposed_storage(expert.gate, expert.up));
    }
    add_weight_tasks(e);
  }

  // Parts of the gradients of weights: rows are input features, columns output features. A task has as many
  // rows as leave each thread some tasks, because it packs its columns once.
  void add_weight_tasks(int64_t e) {
    auto cut_weight = [&](Stage stage, int64_t rows, int64_t columns, int64_t step) {
      const int64_t column_blocks = divide_up(columns, step);
      const int64_t parts = std::clamp(divide_up(kWeightTasksPerThread * threads_, column_blocks), int64_t{1},
                                       divide_up(rows, kBlockRows));
      for (int64_t c = 0; c < columns; c += step) {
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t first = rows * part / parts;
          add(stage, {static_cast<int32_t>(e), first, rows * (part + 1) / parts - first, c,
                      std::min(step, columns - c), kPackedColumns});
        }
      }
    };
    const Expert& expert = b_.experts[e];
    if (expert.gate.data || expert.up.data)
      cut_weight(Stage::kGateUpWeight, p_.hidden_size, p_.intermediate_size, kPackedColumns);
    if (expert.down.data)
      cut_weight(Stage::kDownWeight, p_.intermediate_size, p_.hidden_size, 2 * kPackedColumns);
    if (expert.gate_bias || expert.up_bias || expert.down_bias)
      add(Stage::kBias, {static_cast<int32_t>(e), 0, 0, 0, 0, 0});
  }

  // ---- running

  void work(const ThreadScratch& scratch) {
    const int64_t count = static_cast<int64_t>(tasks_.size());
    for (int64_t i; (i = next_task_.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const GemmBlock& block = tasks_[i].block;
      switch (tasks_[i].stage) {
        case Stage::kCopy:
          copy(block);
          copied_.fetch_add(1, std::memory_order_release);
          break;
        case Stage::kRecompute:
          wait_for_copies();
          recompute(block, scratch);
          recompute_left_[block.expert].fetch_sub(1, std::memory_order_release);
          break;
        case Stage::kIntermediate:
          wait_for_copies();
          spin_until([&] { return recompute_left_[block.expert].load(std::memory_order_acquire) == 0; });
          intermediate(block, scratch);
          intermediate_left_[block.expert].fetch_sub(1, std::memory_order_release);
          rows_done_.fetch_add(1, std::memory_order_release);
          break;
        case Stage::kHidden:
          wait_for_intermediate(block.expert);
          hidden(block, scratch);
          rows_done_.fetch_add(1, std::memory_order_release);
          break;
        case Stage::kGateUpWeight:
          wait_for_intermediate(block.expert);
          gate_up_weight(block, scratch);
          break;
        case Stage::kDownWeight:
          wait_for_intermediate(block.expert);
          down_weight(block, scratch);
          break;
        case Stage::kBias:
          wait_for_copies();  // which no earlier task has waited for where only down_bias is wanted
          wait_for_intermediate(block.expert);
          biases(block.expert);
          break;
        case Stage::kCombine:
          spin_until([&] { return rows_done_.load(std::memory_order_acquire) == row_tasks_; });
          combine(block);
          break;
      }
    }
  }

  void wait_for_copies() {
    spin_until([&] { return copied_.load(std::memory_order_acquire) == copy_tasks_; });
  }

  void wait_for_intermediate(int32_t expert) {
    spin_until([&] { return intermediate_left_[expert].load(std::memory_order_acquire) == 0; });
  }

  void copy(const GemmBlock& block) {
    const int64_t end = block.first_row + block.num_rows;
    auto activations = [&](int64_t row) {
      const int64_t token = first_token_ + w_.slots.row_token[row];
      return advance(p_.hidden_states, token * p_.hidden_states_stride, p_.dtype);
    };
    const bool pairs = w_.rows_per_unit == 2;
    for (int64_t row = block.first_row; row < end; ++row) {
      const int64_t token = first_token_ + w_.slots.row_token[row];
      if (w_.recompute || (w_.wanted.gate_up && !pairs)) {
        kernels().copy_row(activations(row), p_.dtype, p_.hidden_size, w_.hidden_operand,
                           w_.hidden_rows + row * w_.hidden_stride * kUnitBytes);
      }
      kernels().copy_row(advance(b_.grad_out, token * b_.grad_out_stride, p_.dtype), p_.dtype, p_.hidden_size,
                         w_.operand, grad_row(row));
    }
    for (int64_t row = block.first_row; w_.wanted.gate_up && pairs && row < end; row += 2) {
      kernels().pair_rows(activations(row), row + 1 < end ? activations(row + 1) : nullptr, p_.hidden_size,
                          w_.hidden_units + unit_of(block.expert, row) * w_.hidden_unit_stride * kUnitBytes);
    }
  }

  int64_t unit_of(int64_t expert, int64_t row) const {
    return first_unit_[expert] + (row - begin_[expert]) / w_.rows_per_unit;
  }

  // The pre-activations of a row of this chunk, from `column` on: gate; up is intermediate_size further.
  void* pre_activations(int32_t expert, int64_t row, int64_t column) const {
    const int64_t stride = 2 * p_.intermediate_size;
    if (w_.recompute) return const_cast<void*>(advance(w_.pre_activations, row * stride + column, p_.dtype));
    const int64_t saved = progress_->saved_row[expert] + row - begin_[expert];
    return const_cast<void*>(advance(b_.pre_activations, saved * stride + column, p_.dtype));
  }

  void recompute(const GemmBlock& block, const ThreadScratch& scratch) {
    kernels().gemm(gate_up_gemm(w_.hidden_rows + block.first_row * w_.hidden_stride * kUnitBytes,
                                w_.hidden_stride, p_, w_.hidden_operand, block, scratch));
    ActivateTask activate = activate_task(p_, block, scratch);
    activate.activation.kind = Activation::kIdentity;  // only what is saved counts
    activate.saved_gate = pre_activations(block.expert, block.first_row, block.first_column);
    activate.saved_up = const_cast<void*>(advance(activate.saved_gate, p_.intermediate_size, p_.dtype));
    activate.saved_stride = 2 * p_.intermediate_size;
    kernels().activate(&activate);
  }

  // result (+)= rows x weight^T, for a block of rows and of the weight's inputs.
  void multiply_transposed(const void* rows, int64_t row_stride, int64_t depth, const Matrix& weight,
                           const Scale& scale, const GemmBlock& block, float* result, int64_t result_stride,
                           bool accumulate, const ThreadScratch& scratch) {
    GemmTask task = neighbours_gemm(rows, row_stride, depth, w_.operand, transposed(weight), p_.weight_dtype,
                                    block, result, result_stride, scratch);
    task.accumulate = accumulate;
    if (!w_.decoded) return kernels().gemm(task);
    // In the parts of the depth that are summed one by one anyway.
    DecodeTask decode{task.weight[0],
                      p_.weight_dtype,
                      from_column(transposed(scale), block.first_column),
                      0,
                      block.num_columns,
                      scratch.decoded,
                      kDecodedColumns,
                      p_.prepacked};
    task.weight_dtype = DType::kFloat32;
    for (int i = 0; i < 2; ++i) task.weight[i] = {scratch.decoded + i * block.width, kDecodedColumns, 1};
    for (int64_t first = 0; first < depth; first += kBlockUnits) {
      decode.num_in = task.depth = std::min(kBlockUnits, depth - first);
      kernels().decode_block(decode);
      kernels().gemm(task);
      decode.weight = from_row(decode.weight, kBlockUnits, p_.weight_dtype);
      decode.scale.data += (kBlockUnits >> decode.scale.in_shift) * decode.scale.in_stride;
      task.rows = static_cast<const char*>(task.rows) + kBlockUnits * kUnitBytes;
      task.accumulate = true;
    }
  }

  Scale scale_of(int32_t expert, Scale ExpertScales::* part) const {
    return p_.scales.empty() ? Scale{} : p_.scales[expert].*part;
  }

  void intermediate(const GemmBlock& block, const ThreadScratch& scratch) {
    const bool need_grad = w_.wanted.gate_up_rows || w_.wanted.router;
    const int64_t stride = sums_stride(block.width);
    if (need_grad) {
      multiply_transposed(grad_row(block.first_row), w_.grad_stride, p_.hidden_size,
                          p_.experts[block.expert].down, scale_of(block.expert, &ExpertScales::down), block,
                          scratch.result, stride, false, scratch);
    }
    const int64_t column_bytes = block.first_column * static_cast<int64_t>(dtype_size(w_.row_dtype));
    ActivateBackwardTask task{};
    task.grad = need_grad ? scratch.result : nullptr;
    task.grad_stride = stride;
    task.num_rows = block.num_rows;
    task.columns = block.num_columns;
    task.gate = pre_activations(block.expert, block.first_row, block.first_column);
    task.up = advance(task.gate, p_.intermediate_size, p_.dtype);
    task.gate_up_stride = 2 * p_.intermediate_size;
    task.router_weight = w_.row_weight + block.first_row;
    task.activation = p_.activation;
    task.dtype = p_.dtype;
    task.operand = w_.operand;
    if (w_.wanted.gate_up_rows) {
      task.gate_grad = gate_rows(block.first_row) + column_bytes;
      task.up_grad = up_rows(block.first_row) + column_bytes;
      task.gate_up_grad_stride = 2 * w_.inter_stride;
    }
    if (w_.wanted.down) {
      task.inter =
          w_.inter_units +
          (unit_of(block.expert, block.first_row) * w_.inter_unit_stride + block.first_column) * kUnitBytes;
      task.inter_stride = w_.inter_unit_stride;
    }
    if (w_.wanted.router) {
      task.router_sums = w_.sums + block.first_row * w_.router_sums + block.first_column / kRouterSumColumns;
      task.router_sums_stride = w_.router_sums;
    }
    kernels().activate_backward(task);
  }

  char* grad_row(int64_t row) const { return w_.grad_rows + row * w_.grad_stride * kUnitBytes; }
  char* gate_rows(int64_t row) const { return w_.gate_up_rows + row * 2 * w_.inter_stride * kUnitBytes; }
  char* up_rows(int64_t row) const { return gate_rows(row) + w_.inter_stride * kUnitBytes; }

  void hidden(const GemmBlock& block, const ThreadScratch& scratch) {
    const Expert& expert = p_.experts[block.expert];
    float* result = w_.hidden_grad_rows + block.first_row * w_.hidden_grad_stride + block.first_column;
    for (const bool up : {false, true}) {
      multiply_transposed(up ? up_rows(block.first_row) : gate_rows(block.first_row), 2 * w_.inter_stride,
                          p_.intermediate_size, up ? expert.up : expert.gate,
                          scale_of(block.expert, up ? &ExpertScales::up : &ExpertScales::gate), block, result,
                          w_.hidden_grad_stride, up, scratch);
    }
  }

  // ---- gradients of weights

  // Of left^T x right over the rows of an expert the rows of `block`, for the columns of one gradient or of
  // two. left: the expert's units at the block's first row; gradient[i] and sums[i]: at its first element;
  // sums lie as [in, out].
  void weight_rows(const GemmBlock& block, const ThreadScratch& scratch, const char* left,
                   int64_t unit_stride, const Matrix (&right)[2], const int64_t (&columns)[2],
                   const Matrix (&gradient)[2], const Matrix (&sums)[2]) {
    const bool started = progress_->started[block.expert], any = rows_of(block.expert) > 0;
    if (started && !any && !w_.separate_sums) return;
    const int64_t parts = divide_up(block.num_rows, kBlockRows);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t row = block.num_rows * part / parts;
      const int64_t num_rows = block.num_rows * (part + 1) / parts - row;
      BlockTask result[2];
      for (int i = 0; i < 2; ++i) {
        if (!gradient[i].data) continue;
        result[i] = {scratch.result + i * kPackedColumns,
                     2 * kPackedColumns,
                     num_rows,
                     columns[i],
                     from_row(w_.separate_sums ? sums[i] : gradient[i], row, DType::kFloat32),
                     DType::kFloat32};
        if (started) kernels().load_block(result[i]);
      }
      if (any) {
        GemmTask task{left + row * kUnitBytes,
                      1,
                      num_rows,
                      rows_of(block.expert),
                      w_.operand,
                      w_.row_dtype,
                      {right[0], right[1]},
                      {columns[0], columns[1]},
                      kPackedColumns,
                      scratch.result,
                      2 * kPackedColumns,
                      scratch.gemm};
        task.unit_stride = unit_stride;
        task.accumulate = started;
        task.chained = true;
        task.packed = part > 0 && rows_of(block.expert) <= kBlockUnits * w_.rows_per_unit;
        kernels().gemm(task);
      } else if (!started) {
        std::fill_n(scratch.result, num_rows * 2 * kPackedColumns, 0.0f);
      }
      for (int i = 0; i < 2; ++i) {
        if (!gradient[i].data) continue;
        if (last_) {
          result[i].matrix = from_row(gradient[i], row, p_.dtype);
          result[i].dtype = p_.dtype;
          result[i].past_caches = w_.large_gradients;
        }
        kernels().store_block(result[i]);
      }
    }
  }

  Matrix row_matrix(const char* rows, int64_t stride, int64_t column) const {
    const int64_t size = static_cast<int64_t>(dtype_size(w_.row_dtype));
    return {rows + column * size, stride * kUnitBytes / size, 1};
  }

  void gate_up_weight(const GemmBlock& block, const ThreadScratch& scratch) {
    const int64_t first = begin_[block.expert], inter = p_.intermediate_size;
    const Expert& expert = b_.experts[block.expert];
    Matrix gradient[2], sums[2];
    for (int i = 0; i < 2; ++i) {
      const Matrix& whole = i == 0 ? expert.gate : expert.up;
      if (!whole.data) continue;
      gradient[i] = from_row(from_column(whole, block.first_column, p_.dtype), block.first_row, p_.dtype);
      sums[i] = {w_.gate_up_sums + ((block.expert * 2 + i) * p_.hidden_size + block.first_row) * inter +
                     block.first_column,
                 inter, 1};
    }
    const int64_t left = first_unit_[block.expert] * w_.hidden_unit_stride + block.first_row;
    weight_rows(block, scratch, w_.hidden_units + left * kUnitBytes, w_.hidden_unit_stride,
                {row_matrix(gate_rows(first), 2 * w_.inter_stride, block.first_column),
                 row_matrix(up_rows(first), 2 * w_.inter_stride, block.first_column)},
                {block.num_columns, block.num_columns}, gradient, sums);
  }

  void down_weight(const GemmBlock& block, const ThreadScratch& scratch) {
    const int64_t first = begin_[block.expert];
    const int64_t first_columns = std::min(kPackedColumns, block.num_columns);
    const Matrix gradient = from_row(from_column(b_.experts[block.expert].down, block.first_column, p_.dtype),
                                     block.first_row, p_.dtype);
    const Matrix sums{w_.down_sums +
                          (block.expert * p_.intermediate_size + block.first_row) * p_.hidden_size +
                          block.first_column,
                      p_.hidden_size, 1};
    const Matrix right = row_matrix(grad_row(first), w_.grad_stride, block.first_column);
    const int64_t left = first_unit_[block.expert] * w_.inter_unit_stride + block.first_row;
    weight_rows(block, scratch, w_.inter_units + left * kUnitBytes, w_.inter_unit_stride,
                {right, from_column(right, first_columns, w_.row_dtype)},
                {first_columns, block.num_columns - first_columns},
                {gradient, from_column(gradient, first_columns, p_.dtype)},
                {sums, from_column(sums, first_columns, DType::kFloat32)});
  }

  void biases(int32_t e) {
    const int64_t inter = p_.intermediate_size, first = begin_[e];
    float* const sums = w_.bias_sums + e * w_.bias_stride;
    if (!progress_->started[e]) std::fill_n(sums, w_.bias_stride, 0.0f);
    const Expert& expert = b_.experts[e];
    auto add = [&](const void* wanted, const char* rows, int64_t stride, const float* weight, int64_t columns,
                   float* to) {
      if (!wanted) return;
      if (rows_of(e) > 0)
        kernels().column_sums(
            {rows, w_.row_dtype, row_matrix(rows, stride, 0).in_stride, weight, rows_of(e), columns, to});
      if (last_) kernels().store_block({to, columns, 1, columns, {wanted, columns, 1}, p_.bias_dtype});
    };
    add(expert.gate_bias, gate_rows(first), 2 * w_.inter_stride, nullptr, inter, sums);
    add(expert.up_bias, up_rows(first), 2 * w_.inter_stride, nullptr, inter, sums + inter);
    add(expert.down_bias, grad_row(first), w_.grad_stride, w_.row_weight + first, p_.hidden_size,
        sums + 2 * inter);
  }

  // ---- per token

  void combine(const GemmBlock& block) {
    const int64_t first_slot = block.first_row * p_.top_k;
    if (w_.wanted.hidden) {
      char* out = static_cast<char*>(b_.hidden_states) + (first_token_ + block.first_row) * p_.hidden_size *
                                                             static_cast<int64_t>(dtype_size(p_.dtype));
      kernels().combine({w_.hidden_grad_rows, w_.hidden_grad_stride, w_.slots.position + first_slot,
                         w_.slots.expert + first_slot, nullptr, nullptr, p_.bias_dtype, block.num_rows,
                         p_.top_k, p_.hidden_size, p_.dtype, out});
    }
    for (int64_t i = first_slot; w_.wanted.router && i < first_slot + block.num_rows * p_.top_k; ++i) {
      float sum = 0.0f;
      if (const int64_t row = w_.slots.position[i]; row >= 0) {
        for (int64_t j = 0; j < w_.router_sums; ++j) sum += w_.sums[row * w_.router_sums + j];
        if (const void* bias = p_.experts[w_.slots.expert[i]].down_bias) {
          const int64_t token = first_token_ + i / p_.top_k;
          sum += kernels().dot(advance(b_.grad_out, token * b_.grad_out_stride, p_.dtype), p_.dtype, bias,
                               p_.bias_dtype, p_.hidden_size);
        }
      }
      kernels().store_block(
          {&sum,
           1,
           1,
           1,
           {advance(b_.router_weights, first_token_ * p_.top_k + i, p_.router_weights_dtype), 1, 1},
           p_.router_weights_dtype});
    }
  }

  const BackwardProblem& b_;
  const Problem& p_;
  const Layout& w_;
  const int64_t threads_, first_token_, num_tokens_;
  const bool last_;
  Progress* const progress_;

  const std::vector<int64_t> begin_;       // the rows of expert e: begin_[e] .. begin_[e + 1] - 1
  std::vector<int64_t> first_unit_ = {0};  // of each expert
  std::vector<Task> tasks_;
  int64_t copy_tasks_ = 0, row_tasks_ = 0;

  std::atomic<int64_t> next_task_{0}, copied_{0}, rows_done_{0};
  // Tasks of each expert that are not finished.
  std::unique_ptr<std::atomic<int32_t>[]> recompute_left_, intermediate_left_;
};

}  // namespace

size_t backward_workspace_size(const BackwardProblem& problem, int num_threads) {
  return Layout(problem, nullptr, num_threads).bytes;
}

void mixture_of_experts_backward(const BackwardProblem& problem, int num_threads, void* workspace) {
  const PlainFloats plain;
  kernels();  // so that it throws here where the choice of them fails, and not in a task that others wait for
  const Layout layout(problem, workspace, num_threads);
  const Problem& p = problem.forward;
  Progress progress{saved_begin(p), std::vector<bool>(p.num_experts(), false)};
  if (problem.pre_activations && problem.saved_rows < progress.saved_row.back()) {
    throw std::invalid_argument(
        "pre_activations must have a row for each of the " + std::to_string(progress.saved_row.back()) +
        " slots with a local expert, got " + std::to_string(problem.saved_rows) + " rows");
  }
  int64_t t = 0;
  do {  // once even without a token: gradients of weights are zero then
    const int64_t tokens = std::min(layout.tokens, p.num_tokens - t);
    Chunk(problem, layout, t, tokens, &progress).run();
    t += tokens;
  } while (t < p.num_tokens);
}

}  // namespace cpu
}  // namespace paddle_moe
