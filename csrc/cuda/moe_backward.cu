// The backward of mixture_of_experts on a stream. First chunk by chunk:
//
//   sort          as in moe.cu
//   gate_up       where the pre-activations were not kept: the first GEMM again
//   intermediate  gathered rows of grad_out x down^T; fp32 rows
//   activation    backwards: the gradients of gate and up, the weighted intermediate, the router's gradient
//                                                                           (activation_backward.cu)
//   hidden        gate gradient x gate^T + up gradient x up^T; fp32 rows
//   combine       each token's rows of `hidden`, in the order of k
//
// Then for all tokens, sorted once more if they were several chunks:
//
//   weights       per expert, activations^T x gate and up gradient, intermediate^T x grad_out; biases
//                                                                           (weight_gradient*.cu)
//
// So a weight's gradient is one sum over all its rows, without an fp32 copy, and no bit depends on the
// chunks.
#include <algorithm>

#include "cuda/backward.h"
#include "cuda/combine.h"
#include "cuda/implementation.h"

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
    activation = intermediate_grad || down;
    weights = gate || up || down || gate_bias || up_bias || down_bias;
  }
  bool hidden, router;
  bool gate = false, up = false, down = false, gate_bias = false, up_bias = false, down_bias = false;
  bool gate_up_rows, intermediate_grad, weights;
  bool activation;  // what pre-activations are read for
};

struct Layout {
  Layout(const BackwardProblem& b, void* workspace)
      : wanted(b),
        implementation(choose_implementation(b.forward, b.grad_out, b.grad_out_stride)),
        recompute(wanted.activation && b.pre_activations == nullptr),
        inter_stride(round_up(b.forward.intermediate_size, 8)),
        hidden_stride(round_up(b.forward.hidden_size, 8)) {
    const Problem& p = b.forward;
    const int64_t element = static_cast<int64_t>(dtype_size(p.dtype));
    if (p.num_tokens > kMaxChunkSlots / p.top_k) {
      throw std::invalid_argument("routing_table must have at most " + std::to_string(kMaxChunkSlots) +
                                  " elements in a backward on a GPU, got the shape [" +
                                  std::to_string(p.num_tokens) + ", " + std::to_string(p.top_k) +
                                  "]; split the tokens among several calls");
    }
    const int64_t slots = p.num_tokens * p.top_k;
    // First the gradients of the intermediate, then, when nobody needs them any more, of the hidden states.
    const int64_t row_elements =
        std::max(wanted.intermediate_grad ? inter_stride : 0, wanted.hidden ? hidden_stride : 0);
    tokens =
        chunk_tokens(p, p.top_k * std::max<int64_t>(1, row_elements) * int64_t{sizeof(float)}, kChunkBytes);
    const int64_t kept_slots = wanted.weights ? slots : std::min(slots, tokens * p.top_k);
    Arena arena(workspace);
    sort = take_sort(p, slots, implementation.block_m(p, tokens), &arena);
    for (Expert** table : {&down_transposed, &gate_up_transposed, &gradients})
      *table = arena.take<Expert>(p.num_experts());
    if (recompute || wanted.gate_up_rows) {
      gate_up = arena.take<char>(kept_slots * 2 * p.intermediate_size * element);
    }
    if (wanted.down) intermediate = arena.take<char>(kept_slots * inter_stride * element);
    rows = arena.take<float>(std::min(slots, tokens * p.top_k) * row_elements);
    bytes = arena.used();
  }

  Wanted wanted;
  Implementation implementation;
  bool recompute;
  int64_t inter_stride, hidden_stride;  // elements; whole 16-byte vectors
  int64_t tokens;                       // of a chunk
  Sort sort;                            // `experts`: the forward's weights
  // As `down` and `up` what the GEMMs by rows multiply with: down transposed, and gate and up transposed.
  Expert *down_transposed, *gate_up_transposed;
  Expert* gradients;
  // In the order of the slots; of all where weights have a gradient, else of a chunk.
  char* gate_up = nullptr;       // pre-activations that are computed again, then their gradients; [slots, 2I]
  char* intermediate = nullptr;  // weighted
  float* rows;
  size_t bytes;
};

class Backward {
 public:
  Backward(const BackwardProblem& problem, void* workspace, Stream stream)
      : b_(problem), p_(problem.forward), w_(problem, workspace), stream_(stream) {}

  void run() {
    store_transposed();
    for (int64_t t = 0; t < p_.num_tokens; t += w_.tokens) {
      run_chunk(t, std::min(w_.tokens, p_.num_tokens - t));
    }
    if (!w_.wanted.weights) return;
    if (w_.tokens != p_.num_tokens) sort_slots(of_chunk(w_.sort, p_, 0, p_.num_tokens), p_.experts, stream_);
    sum_over_tokens();
  }

 private:
  void store_transposed() {
    auto transposed = [](const Matrix& m) { return Matrix{m.data, m.out_stride, m.in_stride}; };
    by_down_ = by_gate_up_ = p_;
    for (size_t e = 0; e < p_.experts.size(); ++e) {
      by_down_.experts[e].down = transposed(p_.experts[e].down);
      by_gate_up_.experts[e].down = transposed(p_.experts[e].gate);
      by_gate_up_.experts[e].up = transposed(p_.experts[e].up);
    }
    if (p_.num_tokens == 0) return;
    if (w_.wanted.intermediate_grad) {
      store_experts(by_down_.experts, w_.down_transposed, stream_);
    }
    if (w_.wanted.hidden) {
      store_experts(by_gate_up_.experts, w_.gate_up_transposed, stream_);
    }
  }

  void run_chunk(int64_t first_token, int64_t num_tokens) const {
    const Wanted& wanted = w_.wanted;
    const int64_t first_slot = first_token * p_.top_k;
    const int64_t kept_slot = wanted.weights ? first_slot : 0;
    void* gate_up =
        w_.gate_up ? advance(w_.gate_up, kept_slot * 2 * p_.intermediate_size, p_.dtype) : nullptr;
    const Sort sort = of_chunk(w_.sort, p_, first_token, num_tokens);
    sort_slots(sort, p_.experts, stream_);
    if (w_.recompute) {
      GroupedGemm g = gate_up_gemm(p_, sort, first_token);
      g.pre_activations = gate_up;
      w_.implementation.run(Stage::kGateUp, p_, g, stream_);
    }
    if (wanted.intermediate_grad) {
      GroupedGemm g = gemm_of(sort, w_.down_transposed);
      g.depth = p_.hidden_size;
      g.columns = p_.intermediate_size;
      g.a = advance(b_.grad_out, first_token * b_.grad_out_stride, p_.dtype);
      g.a_stride = b_.grad_out_stride;
      g.top_k = static_cast<int32_t>(p_.top_k);
      g.out = w_.rows;
      g.out_stride = w_.inter_stride;
      w_.implementation.run(Stage::kDown, by_down_, g, stream_);
    }
    if (wanted.activation) backward_through_activation(first_slot, sort.num_slots, kept_slot, gate_up);
    if (wanted.hidden) {
      GroupedGemm g = gemm_of(sort, w_.gate_up_transposed);
      g.depth = p_.intermediate_size;
      g.parts = 2;
      g.columns = p_.hidden_size;
      g.a = gate_up;
      g.a_stride = 2 * p_.intermediate_size;
      g.out = w_.rows;
      g.out_stride = w_.hidden_stride;
      w_.implementation.run(Stage::kDown, by_gate_up_, g, stream_);
      combine_tokens(first_token, num_tokens);
    }
  }

  void sum_over_tokens() const {
    const Wanted& wanted = w_.wanted;
    store_experts(b_.experts, w_.gradients, stream_);
    const int64_t h = p_.hidden_size, i = p_.intermediate_size;
    const int32_t top_k = static_cast<int32_t>(p_.top_k);
    const OperandRows hidden{p_.hidden_states, p_.hidden_states_stride, top_k};
    const OperandRows grad_out{b_.grad_out, b_.grad_out_stride, top_k};
    const OperandRows gate{w_.gate_up, 2 * i, 1};
    const OperandRows up{w_.gate_up ? advance(w_.gate_up, i, p_.dtype) : nullptr, 2 * i, 1};
    if (wanted.gate) weight(Weight::kGate, hidden, h, gate, i);
    if (wanted.up) weight(Weight::kUp, hidden, h, up, i);
    if (wanted.down) weight(Weight::kDown, {w_.intermediate, w_.inter_stride, 1}, i, grad_out, h);
    if (wanted.gate_bias) bias(Weight::kGate, gate, i, nullptr);
    if (wanted.up_bias) bias(Weight::kUp, up, i, nullptr);
    if (wanted.down_bias) bias(Weight::kDown, grad_out, h, p_.router_weights);
  }

  void backward_through_activation(int64_t first_slot, int32_t num_slots, int64_t kept_slot,
                                   void* gate_up) const {
    const Wanted& wanted = w_.wanted;
    ActivationBackward a;
    a.num_slots = num_slots;
    a.top_k = static_cast<int32_t>(p_.top_k);
    a.intermediate_size = p_.intermediate_size;
    a.hidden_size = p_.hidden_size;
    a.position = w_.sort.position;
    a.local_expert = w_.sort.local_expert;
    a.pre_activations =
        w_.recompute ? gate_up : advance(b_.pre_activations, first_slot * 2 * p_.intermediate_size, p_.dtype);
    a.intermediate_grad = wanted.intermediate_grad ? w_.rows : nullptr;
    a.intermediate_grad_stride = w_.inter_stride;
    a.router_weights = advance(p_.router_weights, first_slot, p_.router_weights_dtype);
    a.router_weights_dtype = p_.router_weights_dtype;
    a.activation = p_.activation;
    a.grad_out = advance(b_.grad_out, first_slot / p_.top_k * b_.grad_out_stride, p_.dtype);
    a.grad_out_stride = b_.grad_out_stride;
    a.experts = p_.experts[0].down_bias != nullptr ? w_.sort.experts : nullptr;
    a.bias_dtype = p_.bias_dtype;
    a.gate_up_grad = wanted.gate_up_rows ? gate_up : nullptr;
    if (wanted.down) {
      a.weighted_intermediate = advance(w_.intermediate, kept_slot * w_.inter_stride, p_.dtype);
    }
    a.weighted_intermediate_stride = w_.inter_stride;
    if (wanted.router) {
      a.router_weights_grad = advance(b_.router_weights, first_slot, p_.router_weights_dtype);
    }
    activation_backward(a, p_.dtype, stream_);
  }

  void combine_tokens(int64_t first_token, int64_t num_tokens) const {
    Combine sum;
    sum.num_tokens = num_tokens;
    sum.hidden_size = p_.hidden_size;
    sum.top_k = static_cast<int32_t>(p_.top_k);
    sum.rows = w_.rows;
    sum.rows_stride = w_.hidden_stride;
    sum.position = w_.sort.position;
    sum.local_expert = w_.sort.local_expert;
    sum.out = advance(b_.hidden_states, first_token * p_.hidden_size, p_.dtype);
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
    g.num_experts = static_cast<int32_t>(p_.num_experts());
    g.row_slot = w_.sort.row_slot;
    g.first_row = w_.sort.first_row;
    g.expert_rows = w_.sort.expert_rows;
    g.gradients = w_.gradients;
#ifndef PADDLE_MOE_NO_SM90A  // not compiled for it
    const bool half = p_.dtype != DType::kFloat32;
    if (half && compute_capability() == 90 && weight_gradient_sm90(g, b_.experts, p_.dtype, stream_)) return;
#endif
    weight_gradient(g, p_.dtype, stream_);
  }

  void bias(Weight of, const OperandRows& rows, int64_t columns, const void* row_weights) const {
    BiasGradient g;
    g.of = of;
    g.rows = rows;
    g.columns = columns;
    g.row_weights = row_weights;
    g.row_weights_dtype = p_.router_weights_dtype;
    g.num_experts = static_cast<int32_t>(p_.num_experts());
    g.row_slot = w_.sort.row_slot;
    g.first_row = w_.sort.first_row;
    g.expert_rows = w_.sort.expert_rows;
    g.gradients = w_.gradients;
    g.bias_dtype = p_.bias_dtype;
    bias_gradient(g, p_.dtype, stream_);
  }

  const BackwardProblem& b_;
  const Problem& p_;
  const Layout w_;
  const Stream stream_;
  Problem by_down_, by_gate_up_;  // with the matrices of the tables of the same names
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
