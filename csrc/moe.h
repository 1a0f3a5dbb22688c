// The one interface between the bindings and the kernels.
//
// A binding fills Arguments from its framework's arrays, resolve() checks them and turns them into a Problem,
// and a back end runs the Problem. Nothing here allocates device memory or knows a framework.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

struct CUstream_st;  // of the CUDA runtime

namespace paddle_moe {

enum class DType {
  // The operators compute with these.
  kUnknown,
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt32,
  kInt64,
  kInt8,
  kFloat8E4M3,
  kInt4,  // kInt4InWord numbers in an int32
  kUInt8,
  // These are for error messages only.
  kFloat64,
  kInt16,
  kBool,
  kOther,
};

const char* dtype_name(DType dtype);                 // of every one but kOther
size_t dtype_size(DType dtype);                      // bytes; of every one but kInt4
int64_t dtype_bytes(DType dtype, int64_t elements);  // elements of kInt4: a multiple of kInt4InWord
bool is_quantised(DType dtype);

// A strided array. While a static graph is being built sizes may be -1, the dtype kUnknown and data null:
// such an unknown agrees with everything.
struct Tensor {
  const void* data = nullptr;
  DType dtype = DType::kUnknown;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // in elements; empty: contiguous, last dimension fastest
  std::string other_dtype = {};  // the name of its dtype where that is kOther
};

std::string dtype_text(const Tensor& tensor);  // for error messages

// From a dimension on. One of size 1 has no meaningful stride, and in an array without elements none has, so
// any is accepted there.
bool is_contiguous(const Tensor& tensor, size_t first_dim = 0);
// As a broadcast array does; also said of some unusual strides under which none is shared.
bool may_hold_an_element_twice(const Tensor& tensor);

// ---------------------------------------------------------------- mixture_of_experts

constexpr int64_t kLastExpertPassed = std::numeric_limits<int64_t>::min();

struct ExpertsOptions {
  bool permuted_weights = false;  // every matrix is stored transposed: [2I, H] and [H, I]
  std::string activation = "silu";
  int64_t experts_min = 0;
  int64_t experts_max = kLastExpertPassed;  // inclusive
  int64_t chunk_size = 0;                   // tokens per chunk, 0: chosen by the back end
};

// What the caller passed, by the names the caller used. Shapes are those of the public Python function.
struct Arguments : ExpertsOptions {
  Tensor hidden_states;   // [T, H] fp32 | bf16 | fp16
  Tensor routing_table;   // [T, K] int32 | int64, global expert ids
  Tensor router_weights;  // [T, K] fp32 or the dtype of hidden_states
  std::vector<Tensor>
      gate_up_weights;  // E_l x [H, 2I], or 2*E_l x [H, I] (gates, then ups), or one [E_l, H, 2I]
  std::vector<Tensor> down_weights;  // E_l x [I, H], or one [E_l, I, H]
  std::vector<Tensor> gate_up_bias;  // empty, or E_l x [2I], or 2*E_l x [I], or one [E_l, 2I]
  std::vector<Tensor> down_bias;     // empty, or E_l x [H], or one [E_l, H]
  // Of quantised weights (int8, fp8 e4m3 or its bits as uint8), else empty. fp32, in the form of the weights:
  // a value for each matrix, column, kScaleGroup inputs of a column, or block of kScaleGroup x kScaleGroup.
  std::vector<Tensor> gate_up_scale;
  std::vector<Tensor> down_scale;
};

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSelu, kIdentity, kSwigluOai };

struct ActivationSpec {
  Activation kind = Activation::kSilu;
  float alpha = 1.702f;  // kSwigluOai: (up + 1) * gate * sigmoid(alpha * gate), gate and up clamped to limit
  float limit = 7.0f;
};

// Parses "silu", ..., "swigluoai", "swigluoai(alpha, limit)". Throws std::invalid_argument.
ActivationSpec parse_activation(const std::string& text);

// Element (i, o) of a weight that maps `in` features to `out` features lies at data[i * in_stride + o *
// out_stride]. Every layout the operator accepts is a pair of strides, so no back end needs to know which one
// it was; but for prepacked weights, where that is the place only for o a multiple of kPanelColumns and i of
// the inputs that a row of a panel holds. (CUDA passes many of these as parameters of a kernel, which have a
// limit.)
struct Matrix {
  const void* data = nullptr;
  int64_t in_stride = 0;
  int64_t out_stride = 0;
};

// Prepacked weights: the columns of a matrix in panels of kPanelColumns, one after the other, the last
// completed with zeros. A row of a panel is one input of all its columns; of bf16 two, side by side in each
// column; of int8 and fp8 two, one after the other; of int4 eight, a word in each column, with input 2n at
// bit 4n and input 2n + 1 at bit 16 + 4n. As an array [ceil(out / 16), rows, 16], where a row has two
// inputs 32. Scales are in the order of weights stored [in, out].
constexpr int64_t kPanelColumns = 16;
inline int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

// What element (i, o) of a quantised weight is multiplied by: data[(i >> in_shift) * in_stride + ((first_out
// + o) >> out_shift) * out_stride], in groups of kScaleGroup or one element; a stride of 0 makes one group of
// all.
struct Scale {
  const float* data = nullptr;
  int64_t in_stride = 0, out_stride = 0;
  int in_shift = 0, out_shift = 0;
  int64_t first_out = 0;  // of what o counts from: a part of a matrix, or a task's columns
};

// int4 weights: element i of a run of kInt4Run along the depth is number i / 16 of the i % 16th half of the
// run's words, so that whole vectors of neighbours are cut out of all halves by one shift. The last run of a
// column is complete.
constexpr int64_t kInt4InWord = 8, kInt4Run = 64;

constexpr int kScaleGroupShift = 7;
constexpr int64_t kScaleGroup = 1 << kScaleGroupShift;

struct ExpertScales {
  Scale gate, up, down;
};

struct Expert {
  Matrix gate, up;                  // [H, I]
  Matrix down;                      // [I, H]
  const void* gate_bias = nullptr;  // [I] or null
  const void* up_bias = nullptr;    // [I] or null
  const void* down_bias = nullptr;  // [H] or null
};

// A checked call. Sizes are -1 where an Arguments size was not known yet.
struct Problem {
  int64_t num_tokens = 0;                // T
  int64_t hidden_size = 0;               // H
  int64_t intermediate_size = 0;         // I, of this shard
  int64_t top_k = 0;                     // K
  int64_t first_expert = 0;              // experts[i] has the global id first_expert + i
  DType dtype = DType::kUnknown;         // of hidden_states and the output
  DType weight_dtype = DType::kUnknown;  // the same, or a quantised one
  bool prepacked = false;                // the weights

  const void* hidden_states = nullptr;
  int64_t hidden_states_stride = 0;     // elements from one token to the next
  const void* routing_table = nullptr;  // contiguous [T, K]
  DType routing_table_dtype = DType::kUnknown;
  const void* router_weights = nullptr;  // contiguous [T, K]
  DType router_weights_dtype = DType::kUnknown;

  std::vector<Expert> experts;         // E_l of them
  std::vector<ExpertScales> scales;    // as many where the weights are quantised, else none
  DType bias_dtype = DType::kUnknown;  // dtype or fp32
  ActivationSpec activation;
  int64_t chunk_size = 0;

  int64_t num_experts() const { return static_cast<int64_t>(experts.size()); }
};

// Throws std::invalid_argument whose text names the argument, what was expected and what came.
Problem resolve(const Arguments& arguments);

// The gradients of a call. Every result lies in the layout of the argument that it belongs to, and is not
// computed where its data is null; the pointers of `experts` are written through.
struct BackwardProblem {
  Problem forward;
  const void* grad_out = nullptr;  // [T, H] of forward.dtype
  int64_t grad_out_stride = 0;     // elements from one token to the next
  // [R, 2I] of forward.dtype as mixture_of_experts() of the back end kept them, or null: computed again.
  const void* pre_activations = nullptr;
  int64_t saved_rows = 0;  // R, of pre_activations

  void* hidden_states = nullptr;   // contiguous [T, H] of forward.dtype
  void* router_weights = nullptr;  // contiguous [T, K] of forward.router_weights_dtype
  std::vector<Expert> experts;     // biases of forward.bias_dtype
};

// gradients: where the results go, in the shapes and dtypes of `arguments`; its routing_table and options are
// not read. A Tensor without data is not wanted. pre_activations without a shape: computed again. Throws
// std::invalid_argument.
BackwardProblem resolve_backward(const Arguments& arguments, const Tensor& grad_out,
                                 const Tensor& pre_activations, const Arguments& gradients);

// ---------------------------------------------------------------- gate and route

// logits[t, e] = sum over h of hidden_states[t, h] * weight[h, e], accumulated in fp32.
struct GateProblem {
  int64_t num_tokens = 0, hidden_size = 0, num_experts = 0;
  const void* hidden_states = nullptr;
  int64_t hidden_states_stride = 0;
  DType dtype = DType::kUnknown;         // of hidden_states
  Matrix weight;                         // [H, E]
  DType weight_dtype = DType::kUnknown;  // fp32 or dtype
};

// hidden_states [T, H], gate_weight [H, E]. Throws std::invalid_argument.
GateProblem resolve_gate(const Tensor& hidden_states, const Tensor& gate_weight);

// The gradients of a gate() call: all fp32 sums, stored in the dtype of what they belong to; null: not
// wanted.
struct GateBackwardProblem {
  GateProblem forward;
  const float* grad_logits = nullptr;  // [T, E], contiguous
  void* hidden_states = nullptr;       // [T, H], contiguous
  Matrix weight;                       // [H, E]
};

// Throws std::invalid_argument; a gradient without data is not wanted.
GateBackwardProblem resolve_gate_backward(const Tensor& hidden_states, const Tensor& gate_weight,
                                          const Tensor& grad_logits, const Tensor& hidden_states_grad,
                                          const Tensor& gate_weight_grad);

enum class Scoring { kSoftmax, kSigmoid, kSoftmaxTopK };
enum class GroupScore { kMax, kTop2Sum };

struct RouteOptions {
  int64_t top_k = 1;
  std::string scoring = "softmax";  // softmax | sigmoid | softmax_topk
  int64_t num_groups = 1;
  int64_t topk_groups = 1;
  std::string group_score = "max";  // max | top2_sum
  float group_mask_fill = 0.0f;     // 0 or -infinity: the selection score of experts in groups that lost
  bool renormalize = true;
  float renormalize_eps = 1e-20f;
  float scaling_factor = 1.0f;
};

struct RouteProblem {
  int64_t num_tokens = 0, num_experts = 0, top_k = 0;
  const float* logits = nullptr;           // contiguous [T, E]
  const float* correction_bias = nullptr;  // [E] or null; moves the selection, never the weights
  Scoring scoring = Scoring::kSoftmax;
  int64_t num_groups = 1, topk_groups = 1;
  GroupScore group_score = GroupScore::kMax;
  float group_mask_fill = 0.0f;
  bool renormalize = true;
  float renormalize_eps = 1e-20f;
  float scaling_factor = 1.0f;
};

// logits [T, E] fp32, correction_bias [E] fp32 or a Tensor with an empty shape. Throws std::invalid_argument.
RouteProblem resolve_route(const Tensor& logits, const Tensor& correction_bias, const RouteOptions& options);

// The gradient of the logits. The choice of the experts is taken as a constant, so the correction bias has no
// gradient, and a row of -1 gets zeros.
struct RouteBackwardProblem {
  RouteProblem forward;
  const int32_t* routing_table = nullptr;      // [T, K], what route() returned
  const float* grad_router_weights = nullptr;  // [T, K]
};

// Throws std::invalid_argument.
RouteBackwardProblem resolve_route_backward(const RouteProblem& forward, const Tensor& routing_table,
                                            const Tensor& grad_router_weights);

// ---------------------------------------------------------------- the CPU back end

namespace cpu {

// Threads to use by default: set_num_threads(); else PADDLE_MOE_NUM_THREADS; else OMP_NUM_THREADS where it is
// above 1 (importing Paddle writes the value 1 there, so a 1 says nothing about what the user wants); else
// the cores that this process may use, divided among the ranks that paddle.distributed.launch started on this
// machine.
int num_threads();  // throws std::runtime_error: PADDLE_MOE_NUM_THREADS is not from 1 to kMaxThreads
void set_num_threads(int num_threads);  // 0: the default again
constexpr int kMaxThreads = 4096;       // a call takes scratch memory for each thread, used or not

// Bytes of scratch that the call with the same arguments needs; 64-byte aligned, its contents mean nothing
// before or after.
size_t workspace_size(const Problem& problem, int num_threads);

// out: [T, H] of problem.dtype, contiguous. amax: [E_l] fp32, or null when it is not wanted. pre_activations:
// [R, 2I] of problem.dtype, gate | up with their biases, for R = count_rows() slots sorted by expert; or
// null.
void mixture_of_experts(const Problem& problem, int num_threads, void* workspace, void* out, float* amax,
                        void* pre_activations = nullptr);

// R: the slots (token, k) whose expert is local.
int64_t count_rows(const Problem& problem);

size_t backward_workspace_size(const BackwardProblem& problem, int num_threads);
void mixture_of_experts_backward(const BackwardProblem& problem, int num_threads, void* workspace);

// logits: [T, E] fp32.
size_t gate_workspace_size(const GateProblem& problem, int num_threads);
void gate(const GateProblem& problem, int num_threads, void* workspace, float* logits);
size_t gate_backward_workspace_size(const GateBackwardProblem& problem, int num_threads);
void gate_backward(const GateBackwardProblem& problem, int num_threads, void* workspace);

// routing_table: int32 [T, K]; router_weights: fp32 [T, K].
void route(const RouteProblem& problem, int num_threads, int32_t* routing_table, float* router_weights);
// grad_logits: [T, E].
void route_backward(const RouteBackwardProblem& problem, int num_threads, float* grad_logits);

// The limits of the machine, for benchmarks: operations per second of a loop of the multiply-adds that the
// kernels use for this dtype (of bf16 pairs where the processor has them, else of fp32), and bytes per second
// of reading `bytes` at `data` as `streams` parallel streams per thread.
double measure_flops(DType dtype, int num_threads);
double measure_read(const void* data, size_t bytes, int streams, int num_threads);

// The instruction set in use: generic, avx2, avx512 or avx512_bf16. PADDLE_MOE_ISA forces one, for tests.
const char* isa_name();
std::vector<std::string> available_isas();  // best first

}  // namespace cpu

// ---------------------------------------------------------------- the CUDA back end

namespace cuda {

// All pointers of a problem, the workspace and the results lie in the memory of the current device. Calls
// only enqueue work on the stream: they never wait, allocate or copy, so they can be captured into a CUDA
// graph. Errors of a launch throw std::runtime_error that names the kernel and its sizes.
using Stream = ::CUstream_st*;  // cudaStream_t

// Bytes of scratch, aligned to 256; the contents mean nothing before or after. Depends on the current device.
size_t workspace_size(const Problem& problem);

// out: [T, H] of problem.dtype, contiguous. amax: [E_l] fp32, or null when it is not wanted. pre_activations:
// [T * K, 2I] of problem.dtype, gate | up with their biases, in row t * K + k those of slot (t, k), where
// rows of slots without a local expert are not written: the host does not know how many have one; or null.
void mixture_of_experts(const Problem& problem, Stream stream, void* workspace, void* out, float* amax,
                        void* pre_activations = nullptr);

// problem.saved_rows is T * K. Throws std::invalid_argument for more than 2^30 slots.
size_t backward_workspace_size(const BackwardProblem& problem);
void mixture_of_experts_backward(const BackwardProblem& problem, Stream stream, void* workspace);

// logits: [T, E] fp32. zeroed: a word that is set to 0 on the way, for a later kernel; or null.
void gate(const GateProblem& problem, Stream stream, float* logits, uint32_t* zeroed = nullptr);
void gate_backward(const GateBackwardProblem& problem, Stream stream);

// routing_table: int32 [T, K]; router_weights: fp32 [T, K].
void route(const RouteProblem& problem, Stream stream, int32_t* routing_table, float* router_weights);
// grad_logits: [T, E].
void route_backward(const RouteBackwardProblem& problem, Stream stream, float* grad_logits);

// gate(), route() and mixture_of_experts(), with the same bits and fewer launches. The logits that `route`
// reads, and the routing table (int32) and router weights (fp32) that `problem` reads, are written first.
void fused_gate_moe(const GateProblem& gate, const RouteProblem& route, const Problem& problem, Stream stream,
                    void* workspace, void* out, float* amax);

}  // namespace cuda
}  // namespace paddle_moe
