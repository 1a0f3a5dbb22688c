// The backward of mixture_of_experts on a stream:
//
//   sort          as in moe.cu
//   gate_up       where the pre-activations were not kept: the first GEMM again
//   intermediate  gathered rows of grad_out x down^T; fp32 rows
//   activation    backwards: rows of the gradients of gate and up, of the weighted intermediate; the router's
//                 gradient                                                  (activation_backward.cu)
//   hidden        gate gradient x gate^T, then + up gradient x up^T; fp32 rows
//   weights       per expert, activations^T x gate and up gradient, intermediate^T x grad_out; biases
//                                                                           (weight_gradient.cu)
//   combine       each token's rows of `hidden`, in the order of k
//
// All tokens are one chunk: a weight's gradient is one sum over them, which then needs no fp32 copy.
#include <algorithm>

#include "cuda/backward.h"
#include "cuda/combine.h"
#include "cuda/implementation.h"
#include "cuda/sort.h"

namespace paddle_moe {
namespace cuda {
namespace {

// What the caller wants, and so what has to be computed.
struct Wanted {
  explicit Wanted(const BackwardProblem& b) : hidden(b.hidden_states), router(b.router_weights) {
    for (const Expert& e : b.experts) {
      gate |= e.gate.data != nullptr;
      up |= e.up.data != nullptr;
      down |= e.down.data != nullptr;
      gate_bias |= e.gate_bias != nullptr;
      up_bias |= e.up_bias != nullptr;
      down_bias |= e.down_bias != nullptr;
    }
    gate_up_rows = hidden || gate || up || gate_bias || up_bias;
    intermediate_grad = gate_up_rows || router;
  }
  bool hidden, router;
  bool gate = false, up = false, down = false, gate_bias = false, up_bias = false, down_bias = false;
  bool gate_up_rows, intermediate_grad;
};

struct Layout {
  Layout(const BackwardProblem& b, void* workspace)
      : wanted(b),
        implementation(choose_implementation(b.forward, true)),
        recompute(b.pre_activations == nullptr),
        inter_stride(round_up(b.forward.intermediate_size, 8)),
        hidden_stride(round_up(b.forward.hidden_size, 8)) {
    const Problem& p = b.forward;
    const int64_t element = static_cast<int64_t>(dtype_size(p.dtype)), experts = p.num_experts();
    if (p.num_tokens > kMaxChunkSlots / p.top_k) {
      throw std::invalid_argument("routing_table must have at most " + std::to_string(kMaxChunkSlots) +
                                  " elements in a backward on a GPU, got the shape [" +
                                  std::to_string(p.num_tokens) + ", " + std::to_string(p.top_k) +
                                  "]; split the tokens among several calls");
    }
    const int64_t slots = p.num_tokens * p.top_k;
    block_m = implementation.block_m(p, p.num_tokens);
    Arena arena(workspace);
    for (Expert*& table : tables) table = arena.take<Expert>(experts);
    expert_rows = arena.take<int32_t>(experts);
    first_row = arena.take<int32_t>(experts);
    counts = arena.take<int32_t>(sort_scratch(slots, experts));
    tiles = arena.take<Tile>(max_tiles(slots, experts, kMinBlockM));
    num_tiles = arena.take<int32_t>(1);
    local_expert = arena.take<int32_t>(slots);
    position = arena.take<int32_t>(slots);
    row_slot = arena.take<int32_t>(slots);
    pre_activations = arena.take<char>(recompute ? slots * 2 * p.intermediate_size * element : 0);
    intermediate = arena.take<char>(recompute || wanted.down ? slots * inter_stride * element : 0);
    gate_up_grad = arena.take<char>(wanted.gate_up_rows ? slots * 2 * inter_stride * element : 0);
    // First the gradients of the intermediate, then, when nobody needs them any more, of the hidden states.
    rows = arena.take<float>(
        slots * std::max(wanted.intermediate_grad ? inter_stride : 0, wanted.hidden ? hidden_stride : 0));
    bytes = arena.used();
  }

  Wanted wanted;
  Implementation implementation;
  bool recompute;
  int64_t inter_stride, hidden_stride;  // elements; whole 16-byte vectors
  int block_m;
  // Each GEMM by rows takes the `down` of its table: the forward's weights; down, gate and up transposed.
  enum Table { kForward, kDownTransposed, kGateTransposed, kUpTransposed, kGradients, kNumTables };
  Expert* tables[kNumTables];
  Tile* tiles;
  int32_t *expert_rows, *first_row, *counts, *num_tiles, *local_expert, *position, *row_slot;
  char *pre_activations, *intermediate, *gate_up_grad;
  float* rows;
  size_t bytes;
};

class Backward {
 public:
  Backward(const BackwardProblem& problem, void* workspace, Stream stream)
      : b_(problem),
        p_(problem.forward),
        w_(problem, workspace),
        stream_(stream),
        slots_(p_.num_tokens * p_.top_k) {}

  void run() {
    const Wanted& wanted = w_.wanted;
    sort();
    if (w_.recompute) recompute();
    if (wanted.intermediate_grad) {
      multiply_rows(Layout::kDownTransposed, b_.grad_out, b_.grad_out_stride, w_.row_slot, p_.hidden_size,
                    p_.intermediate_size, w_.inter_stride, false);
    }
    backward_through_activation();
    if (wanted.hidden) {
      multiply_rows(Layout::kGateTransposed, gate_grad(), 2 * w_.inter_stride, nullptr, p_.intermediate_size,
                    p_.hidden_size, w_.hidden_stride, false);
      multiply_rows(Layout::kUpTransposed, up_grad(), 2 * w_.inter_stride, nullptr, p_.intermediate_size,
                    p_.hidden_size, w_.hidden_stride, true);
      combine_tokens();
    }
    store_experts(b_.experts, w_.tables[Layout::kGradients], stream_);
    const OperandRows hidden{p_.hidden_states, p_.hidden_states_stride, w_.row_slot};
    const OperandRows grad_out{b_.grad_out, b_.grad_out_stride, w_.row_slot};
    const OperandRows gate{gate_grad(), 2 * w_.inter_stride, nullptr};
    const OperandRows up{up_grad(), 2 * w_.inter_stride, nullptr};
    const int64_t h = p_.hidden_size, i = p_.intermediate_size;
    if (wanted.gate) weight(Weight::kGate, hidden, h, gate, i);
    if (wanted.up) weight(Weight::kUp, hidden, h, up, i);
    if (wanted.down) weight(Weight::kDown, {w_.intermediate, w_.inter_stride, nullptr}, i, grad_out, h);
    if (wanted.gate_bias) bias(Weight::kGate, gate, i, nullptr);
    if (wanted.up_bias) bias(Weight::kUp, up, i, nullptr);
    if (wanted.down_bias) bias(Weight::kDown, grad_out, h, p_.router_weights);
  }

 private:
  const void* gate_grad() const { return w_.gate_up_grad; }
  const void* up_grad() const { return advance(gate_grad(), w_.inter_stride, p_.dtype); }

  void sort() {
    Sort sort;
    sort.routing_table = p_.routing_table;
    sort.routing_table_dtype = p_.routing_table_dtype;
    sort.first_expert = p_.first_expert;
    sort.num_experts = static_cast<int32_t>(p_.num_experts());
    sort.num_slots = static_cast<int32_t>(slots_);
    sort.block_m = w_.block_m;
    sort.local_expert = w_.local_expert;
    sort.position = w_.position;
    sort.row_slot = w_.row_slot;
    sort.expert_rows = w_.expert_rows;
    sort.first_row = w_.first_row;
    sort.tiles = w_.tiles;
    sort.num_tiles = w_.num_tiles;
    sort.experts = w_.tables[Layout::kForward];
    sort.counts = w_.counts;
    sort_slots(sort, p_.experts, stream_);
  }

  GroupedGemm gemm(Layout::Table table) const {
    GroupedGemm gemm;
    gemm.top_k = static_cast<int32_t>(p_.top_k);
    gemm.experts = w_.tables[table];
    gemm.tiles = w_.tiles;
    gemm.num_tiles = w_.num_tiles;
    gemm.max_tiles = max_tiles(slots_, p_.num_experts(), w_.block_m);
    gemm.block_m = w_.block_m;
    return gemm;
  }

  void recompute() const {
    GroupedGemm g = gemm(Layout::kForward);
    g.depth = p_.hidden_size;
    g.columns = p_.intermediate_size;
    g.a = p_.hidden_states;
    g.a_stride = p_.hidden_states_stride;
    g.row_slot = w_.row_slot;
    g.out = w_.intermediate;  // only what is saved counts
    g.out_stride = w_.inter_stride;
    g.activation.kind = Activation::kIdentity;
    g.bias_dtype = p_.bias_dtype;
    g.pre_activations = w_.pre_activations;
    w_.implementation.run(Stage::kGateUp, p_, g, stream_);
  }

  // rows = a x the transposed weights of the table.
  void multiply_rows(Layout::Table table, const void* a, int64_t a_stride, const int32_t* row_slot,
                     int64_t depth, int64_t columns, int64_t out_stride, bool accumulate) const {
    Problem transposed = p_;
    for (Expert& e : transposed.experts) {
      const Matrix& m = table == Layout::kDownTransposed   ? e.down
                        : table == Layout::kGateTransposed ? e.gate
                                                           : e.up;
      e.down = Matrix{m.data, m.out_stride, m.in_stride};
    }
    store_experts(transposed.experts, w_.tables[table], stream_);
    GroupedGemm g = gemm(table);
    g.depth = depth;
    g.columns = columns;
    g.a = a;
    g.a_stride = a_stride;
    g.row_slot = row_slot;
    g.out = w_.rows;
    g.out_stride = out_stride;
    g.accumulate = accumulate;
    w_.implementation.run(Stage::kDown, transposed, g, stream_);
  }

  void backward_through_activation() const {
    const Wanted& wanted = w_.wanted;
    if (!wanted.intermediate_grad && !wanted.down) return;
    ActivationBackward a;
    a.num_slots = static_cast<int32_t>(slots_);
    a.top_k = static_cast<int32_t>(p_.top_k);
    a.intermediate_size = p_.intermediate_size;
    a.hidden_size = p_.hidden_size;
    a.position = w_.position;
    a.local_expert = w_.local_expert;
    a.pre_activations = w_.recompute ? w_.pre_activations : b_.pre_activations;
    a.intermediate_grad = wanted.intermediate_grad ? w_.rows : nullptr;
    a.intermediate_grad_stride = w_.inter_stride;
    a.router_weights = p_.router_weights;
    a.router_weights_dtype = p_.router_weights_dtype;
    a.activation = p_.activation;
    a.grad_out = b_.grad_out;
    a.grad_out_stride = b_.grad_out_stride;
    a.experts = p_.experts[0].down_bias != nullptr ? w_.tables[Layout::kForward] : nullptr;
    a.bias_dtype = p_.bias_dtype;
    a.gate_up_grad = wanted.gate_up_rows ? w_.gate_up_grad : nullptr;
    a.gate_up_grad_stride = 2 * w_.inter_stride;
    a.weighted_intermediate = wanted.down ? w_.intermediate : nullptr;
    a.weighted_intermediate_stride = w_.inter_stride;
    a.router_weights_grad = b_.router_weights;
    activation_backward(a, p_.dtype, stream_);
  }

  void combine_tokens() const {
    Combine sum;
    sum.num_tokens = p_.num_tokens;
    sum.hidden_size = p_.hidden_size;
    sum.top_k = static_cast<int32_t>(p_.top_k);
    sum.rows = w_.rows;
    sum.rows_stride = w_.hidden_stride;
    sum.position = w_.position;
    sum.local_expert = w_.local_expert;
    sum.out = b_.hidden_states;
    combine(sum, p_.dtype, stream_);
  }

  void weight(Weight which, const OperandRows& left, int64_t in_features, const OperandRows& right,
              int64_t out_features) const {
    WeightGradient g;
    g.weight = which;
    g.left = left;
    g.right = right;
    g.in_features = in_features;
    g.out_features = out_features;
    g.top_k = static_cast<int32_t>(p_.top_k);
    g.num_experts = static_cast<int32_t>(p_.num_experts());
    g.first_row = w_.first_row;
    g.expert_rows = w_.expert_rows;
    g.gradients = w_.tables[Layout::kGradients];
    weight_gradient(g, p_.dtype, stream_);
  }

  void bias(Weight of, const OperandRows& rows, int64_t columns, const void* row_weights) const {
    BiasGradient g;
    g.of = of;
    g.rows = rows;
    g.columns = columns;
    g.row_weights = row_weights;
    g.row_weights_dtype = p_.router_weights_dtype;
    g.top_k = static_cast<int32_t>(p_.top_k);
    g.num_experts = static_cast<int32_t>(p_.num_experts());
    g.first_row = w_.first_row;
    g.expert_rows = w_.expert_rows;
    g.gradients = w_.tables[Layout::kGradients];
    g.bias_dtype = p_.bias_dtype;
    bias_gradient(g, p_.dtype, stream_);
  }

  const BackwardProblem& b_;
  const Problem& p_;
  const Layout w_;
  const Stream stream_;
  const int64_t slots_;
};

}  // namespace

size_t backward_workspace_size(const BackwardProblem& problem) { return Layout(problem, nullptr).bytes; }

void mixture_of_experts_backward(const BackwardProblem& problem, Stream stream, void* workspace) {
  const Problem& p = problem.forward;
  if (problem.pre_activations != nullptr && problem.saved_rows != p.num_tokens * p.top_k) {
    throw std::invalid_argument("pre_activations must have a row for each of the " +
                                std::to_string(p.num_tokens * p.top_k) + " slots of routing_table, got " +
                                std::to_string(problem.saved_rows) + " rows");
  }
  Backward(problem, workspace, stream).run();
}

}  // namespace cuda
}  // namespace paddle_moe
