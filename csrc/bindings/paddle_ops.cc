// The Paddle binding, four custom operators: the only file that includes Paddle.
#include <paddle/extension.h>

#ifdef PADDLE_WITH_CUDA  // defined by setup.py where Paddle is a CUDA build
#define PADDLE_MOE_GPU_TENSORS
// With it enforce.h asks for the headers of cuBLAS, cuDNN and others, none of which is needed here.
#undef PADDLE_WITH_CUDA
#endif
#include <paddle/phi/core/enforce.h>

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"

namespace paddle_moe {
namespace {

using Shape = std::vector<int64_t>;
using DataTypes = std::vector<paddle::DataType>;
using PaddleTensors = std::vector<paddle::Tensor>;

DType dtype_of(paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::UNDEFINED:
      return DType::kUnknown;
    case paddle::DataType::FLOAT32:
      return DType::kFloat32;
    case paddle::DataType::BFLOAT16:
      return DType::kBFloat16;
    case paddle::DataType::FLOAT16:
      return DType::kFloat16;
    case paddle::DataType::INT32:
      return DType::kInt32;
    case paddle::DataType::INT64:
      return DType::kInt64;
    case paddle::DataType::FLOAT64:
      return DType::kFloat64;
    case paddle::DataType::INT16:
      return DType::kInt16;
    case paddle::DataType::INT8:
      return DType::kInt8;
    case paddle::DataType::UINT8:
      return DType::kUInt8;
    case paddle::DataType::BOOL:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

// Only Paddle's own exceptions cross into Python: any other one ends the process. Each error code below
// becomes the Python exception named beside it.
template <auto function>
struct Guarded;

template <class Result, class... Args, Result (*function)(Args...)>
struct Guarded<function> {
  static Result call(Args... args) {
    try {
      return function(args...);
    } catch (const std::logic_error& error) {
      PADDLE_THROW(common::errors::InvalidArgument("%s", error.what()));  // ValueError
    } catch (const std::bad_alloc& error) {
      PADDLE_THROW(common::errors::ResourceExhausted("%s", error.what()));  // MemoryError
    } catch (const std::runtime_error& error) {
      PADDLE_THROW(common::errors::Unavailable("%s", error.what()));  // RuntimeError
    }
  }
};

// ---------------------------------------------------------------- views of tensors and of mere shapes

// Paddle hands custom operators contiguous tensors: it copies any other before the call.
Tensor view(const paddle::Tensor& tensor) {
  Tensor result{tensor.data(), dtype_of(tensor.dtype()), tensor.shape(), {}};
  if (result.dtype == DType::kOther) {
    std::ostringstream name;
    name << tensor.dtype();
    if (name.str() == dtype_name(DType::kFloat8E4M3))  // older versions have no constant for it
      result.dtype = DType::kFloat8E4M3;
    else
      result.other_dtype = name.str();
  }
  return result;
}

Tensor view(const paddle::optional<paddle::Tensor>& tensor) { return tensor ? view(*tensor) : Tensor{}; }

Tensor view(const Shape& shape) { return {nullptr, DType::kUnknown, shape, {}}; }

Tensor view(const paddle::optional<Shape>& shape) { return shape ? view(*shape) : Tensor{}; }

template <class T>
std::vector<Tensor> views(const std::vector<T>& list) {
  std::vector<Tensor> result;
  result.reserve(list.size());
  for (const T& item : list) result.push_back(view(item));
  return result;
}

// ---------------------------------------------------------------- places and memory

void expect_place(const char* name, const paddle::Tensor& tensor, const paddle::Place& expected) {
  if (tensor.place() != expected) {
    throw std::invalid_argument(std::string(name) + " must be on the device of the first argument, " +
                                expected.DebugString() + ", got " + tensor.place().DebugString());
  }
}

void expect_place(const char* name, const paddle::optional<paddle::Tensor>& tensor,
                  const paddle::Place& expected) {
  if (tensor) expect_place(name, *tensor, expected);
}

// Paddle does not notice for a custom operator that a first backward() has freed what the graph kept: it
// passes the gradient, which comes last, in place of every tensor that is missing, and empty lists.
void expect_kept(const paddle::Tensor& kept, const paddle::Tensor& gradient) {
  if (&kept == &gradient) {
    throw std::runtime_error(
        "backward() must not go through a call of paddle_moe a second time: the first one freed what the "
        "graph kept; set retain_graph=True in the first");
  }
}

// Where the call runs: on the device of its first argument.
Device device_of(const char* name, const paddle::Tensor& tensor) {
  if (tensor.is_cpu()) return dispatch::cpu_device();
#ifdef PADDLE_MOE_GPU_TENSORS
  if (tensor.is_gpu()) return dispatch::cuda_device(name, tensor.place().GetDeviceId(), tensor.stream());
#endif
  throw std::runtime_error(std::string(name) + " is on " + tensor.place().DebugString() +
                           ", which paddle_moe has no back end for; move the arguments to the CPU");
}

// Memory on the CPU that outlives what is in it. The C library returns large arrays to the system when they
// are freed, and the next call pays for fresh pages, which takes longer than to write into them.
//
// Scratch memory: a call takes the smallest block that is large enough, or replaces the largest one, so that
// there are as many as calls have run at once. Gradients, whose sizes come again in the next step: blocks of
// exactly that size; those that are kept and those that are in use together never exceed what was once in
// use.
class KeptMemory {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    bool operator<(const Block& other) const { return bytes < other.bytes; }
  };

  static constexpr size_t kSmallestScratch = size_t{1} << 20;
  static constexpr size_t kSmallestGradient = size_t{32} << 20;  // the C library keeps smaller ones by itself

  static bool is_for(const paddle::Place& place, size_t bytes, size_t smallest) {
    static const bool is_wanted = [] {
      const char* const text = std::getenv("PADDLE_MOE_KEEP_MEMORY");
      const std::string value = text == nullptr || *text == '\0' ? "1" : text;
      if (value != "0" && value != "1")
        throw std::invalid_argument("PADDLE_MOE_KEEP_MEMORY must be 0 or 1, got '" + value + "'");
      return value == "1";
    }();
    return is_wanted && place.GetType() == phi::AllocationType::CPU && bytes >= smallest;
  }

  static KeptMemory& instance() {
    // Never destroyed: tensors may still be in it while the process exits. A fork waits for the lock, so that
    // nobody holds it in the child.
    static KeptMemory* const memory = [] {
      const auto unlock = [] { instance().mutex_.unlock(); };
      pthread_atfork([] { instance().mutex_.lock(); }, unlock, unlock);
      return new KeptMemory();
    }();
    return *memory;
  }

  // At least `bytes`.
  Block take_scratch(size_t bytes) {
    Block block, replaced;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::lower_bound(scratch_.begin(), scratch_.end(), Block{nullptr, bytes});
      if (found != scratch_.end()) {
        block = *found;
        scratch_.erase(found);
      } else if (!scratch_.empty()) {
        replaced = scratch_.back();
        scratch_.pop_back();
      }
    }
    std::free(replaced.data);
    return block.data ? block : Block{allocate(bytes), bytes};
  }

  // Where there is no memory to remember it, a block is freed: this runs in destructors.
  void give_scratch_back(Block block) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      scratch_.insert(std::upper_bound(scratch_.begin(), scratch_.end(), block), block);
    } catch (const std::bad_alloc&) {
      std::free(block.data);
    }
  }

  void* take(size_t bytes) {
    std::vector<void*> dropped;
    void* block = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto same =
          std::find_if(free_.begin(), free_.end(), [&](const Block& one) { return one.bytes == bytes; });
      if (same != free_.end()) {
        block = same->data;
        free_bytes_ -= bytes;
        free_.erase(same);
      }
      const size_t most = std::max(most_used_bytes_, used_bytes_ + bytes);
      while (!free_.empty() && used_bytes_ + bytes + free_bytes_ > most) {
        dropped.push_back(free_.front().data);
        free_bytes_ -= free_.front().bytes;
        free_.erase(free_.begin());
      }
    }
    for (void* old : dropped) std::free(old);
    if (!block) block = allocate(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ += bytes;
    most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
    return block;
  }

  void give_back(void* data, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ -= bytes;
    try {
      free_.push_back({data, bytes});
      free_bytes_ += bytes;
    } catch (const std::bad_alloc&) {
      std::free(data);
    }
  }

  // Frees what nothing uses, and forgets how much was once in use.
  size_t release() {
    std::vector<Block> gradients, scratch;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      gradients.swap(free_);
      scratch.swap(scratch_);
      most_used_bytes_ = used_bytes_;
      free_bytes_ = 0;
    }
    size_t bytes = 0;
    for (const auto* blocks : {&gradients, &scratch}) {
      for (const Block& block : *blocks) {
        std::free(block.data);
        bytes += block.bytes;
      }
    }
    return bytes;
  }

 private:
  // What is kept must not be what is missing.
  void* allocate(size_t bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 4096, bytes) != 0) {
      release();
      if (posix_memalign(&data, 4096, bytes) != 0) throw std::bad_alloc();
    }
    return data;
  }

  std::mutex mutex_;
  std::vector<Block> scratch_;                                    // the smallest first
  std::vector<Block> free_;                                       // of gradients, the longest unused first
  size_t used_bytes_ = 0, free_bytes_ = 0, most_used_bytes_ = 0;  // of gradients
};

// The gradient of a tensor, not yet computed.
paddle::Tensor empty_gradient(const paddle::Tensor& tensor) {
#ifdef PADDLE_MOE_KEPT_GRADIENTS  // not by setup.py before Paddle 3.0, whose from_blob calls the wrong
                                  // deleters
  const size_t bytes = static_cast<size_t>(tensor.numel()) * phi::SizeOf(tensor.dtype());
  if (KeptMemory::is_for(tensor.place(), bytes, KeptMemory::kSmallestGradient)) {
    return paddle::from_blob(KeptMemory::instance().take(bytes), tensor.shape(), tensor.dtype(),
                             phi::DataLayout::NCHW, tensor.place(),
                             [bytes](void* data) { KeptMemory::instance().give_back(data, bytes); });
  }
#endif
  return paddle::empty(tensor.shape(), tensor.dtype(), tensor.place());
}

class Workspace {
 public:
  Workspace(size_t bytes, const paddle::Place& place) {
    bytes += kAlignment;
    if (KeptMemory::is_for(place, bytes, KeptMemory::kSmallestScratch))
      block_ = KeptMemory::instance().take_scratch(bytes);
    else
      buffer_ = paddle::empty({static_cast<int64_t>(bytes)}, paddle::DataType::UINT8, place);
    void* pointer = block_.data ? block_.data : buffer_.data();
    data_ = std::align(kAlignment, bytes - kAlignment, pointer, bytes);
  }
  ~Workspace() {
    if (block_.data) KeptMemory::instance().give_scratch_back(block_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  static constexpr size_t kAlignment = dispatch::kWorkspaceAlignment;
  KeptMemory::Block block_;
  paddle::Tensor buffer_;
  void* data_;
};

// ---------------------------------------------------------------- options
//
// As Paddle's attributes, as parameters in the same order, and as what moe.h calls them.

#define PADDLE_MOE_EXPERTS_ATTRIBUTES                                                                  \
  "permuted_weights: bool", "activation: std::string", "experts_min: int64_t", "experts_max: int64_t", \
      "chunk_size: int64_t"
#define PADDLE_MOE_EXPERTS_PARAMETERS                                                             \
  bool permuted_weights, const std::string &activation, int64_t experts_min, int64_t experts_max, \
      int64_t chunk_size
#define PADDLE_MOE_EXPERTS_OPTIONS \
  ExpertsOptions { permuted_weights, activation, experts_min, experts_max, chunk_size }

#define PADDLE_MOE_ROUTE_ATTRIBUTES                                                                        \
  "top_k: int64_t", "scoring: std::string", "num_groups: int64_t", "topk_groups: int64_t",                 \
      "group_score: std::string", "group_mask_fill: float", "renormalize: bool", "renormalize_eps: float", \
      "scaling_factor: float"
#define PADDLE_MOE_ROUTE_PARAMETERS                                                                   \
  int64_t top_k, const std::string &scoring, int64_t num_groups, int64_t topk_groups,                 \
      const std::string &group_score, float group_mask_fill, bool renormalize, float renormalize_eps, \
      float scaling_factor
#define PADDLE_MOE_ROUTE_OPTIONS                                                                         \
  RouteOptions {                                                                                         \
    top_k, scoring, num_groups, topk_groups, group_score, group_mask_fill, renormalize, renormalize_eps, \
        scaling_factor                                                                                   \
  }

// ---------------------------------------------------------------- experts
//
// Everything that has a gradient is one list, because the executor of static programs accepts one list among
// the outputs of a gradient operator and nothing beside it. `counts`: how many of its entries are
// gate_up_weights, down_weights, gate_up_bias, down_bias, gate_up_scale and down_scale, after hidden_states
// and router_weights.

template <class T>
Arguments experts_arguments(const T& routing_table, const std::vector<T>& tensors,
                            const std::vector<int>& counts, const ExpertsOptions& options) {
  auto next = tensors.begin() + 2;
  auto take = [&](int count) {
    const std::vector<T> part(next, next + count);
    next += count;
    return views(part);
  };
  Arguments arguments{options, view(tensors[0]), view(routing_table), view(tensors[1])};
  arguments.gate_up_weights = take(counts[0]);
  arguments.down_weights = take(counts[1]);
  arguments.gate_up_bias = take(counts[2]);
  arguments.down_bias = take(counts[3]);
  arguments.gate_up_scale = take(counts[4]);
  arguments.down_scale = take(counts[5]);
  return arguments;
}

void expect_places(const paddle::Tensor& routing_table, const PaddleTensors& tensors,
                   const std::vector<int>& counts) {
  const paddle::Place& place = tensors[0].place();
  expect_place("routing_table", routing_table, place);
  expect_place("router_weights", tensors[1], place);
  const char* const names[] = {"gate_up_weights", "down_weights",  "gate_up_bias",
                               "down_bias",       "gate_up_scale", "down_scale"};
  size_t next = 2;
  for (size_t kind = 0; kind < counts.size(); ++kind) {
    for (int i = 0; i < counts[kind]; ++i) expect_place(names[kind], tensors[next++], place);
  }
}

PaddleTensors experts(const paddle::Tensor& routing_table, const PaddleTensors& tensors,
                      const std::vector<int>& counts, const std::vector<int>& wanted,
                      PADDLE_MOE_EXPERTS_PARAMETERS, bool measurement_mode, bool save_pre_activations) {
  expect_places(routing_table, tensors, counts);
  const Problem problem =
      resolve(experts_arguments(routing_table, tensors, counts, PADDLE_MOE_EXPERTS_OPTIONS));
  const paddle::Place& place = tensors[0].place();
  const paddle::DataType dtype = tensors[0].dtype();
  const Device device = device_of("hidden_states", tensors[0]);

  paddle::Tensor out = paddle::empty({problem.num_tokens, problem.hidden_size}, dtype, place);
  paddle::Tensor amax = paddle::empty({problem.num_experts()}, paddle::DataType::FLOAT32, place);
  // An operator has to return what was not computed too, and Paddle 2.6 refuses an empty output.
  const int64_t rows = save_pre_activations ? dispatch::saved_rows(device, problem) : 0;
  paddle::Tensor pre_activations = paddle::empty(
      {std::max<int64_t>(1, rows), rows == 0 ? 1 : 2 * problem.intermediate_size}, dtype, place);
  Workspace workspace(dispatch::workspace_size(device, problem), place);
  dispatch::mixture_of_experts(device, problem, workspace.data(), out.data(),
                               measurement_mode ? amax.data<float>() : nullptr,
                               rows == 0 ? nullptr : pre_activations.data());
  if (!measurement_mode) dispatch::set_to_zero(device, amax.data(), amax.numel() * sizeof(float));
  return {out, amax, pre_activations};
}

std::vector<Shape> experts_shapes(const Shape& routing_table, const std::vector<Shape>& tensors,
                                  const std::vector<int>& counts, const std::vector<int>& wanted,
                                  PADDLE_MOE_EXPERTS_PARAMETERS, bool measurement_mode,
                                  bool save_pre_activations) {
  const Problem problem =
      resolve(experts_arguments(routing_table, tensors, counts, PADDLE_MOE_EXPERTS_OPTIONS));
  const int64_t num_experts = problem.experts.empty() ? -1 : problem.num_experts();
  return {{problem.num_tokens, problem.hidden_size}, {num_experts}, {-1, -1}};
}

DataTypes experts_dtypes(paddle::DataType routing_table, const DataTypes& tensors) {
  return {tensors[0], paddle::DataType::FLOAT32, tensors[0]};
}

PaddleTensors experts_backward(const paddle::Tensor& routing_table, const PaddleTensors& tensors,
                               const paddle::Tensor& pre_activations, const paddle::Tensor& grad_out,
                               const std::vector<int>& counts, const std::vector<int>& wanted,
                               PADDLE_MOE_EXPERTS_PARAMETERS, bool measurement_mode,
                               bool save_pre_activations) {
  expect_kept(routing_table, grad_out);
  expect_places(routing_table, tensors, counts);
  const Device device = device_of("hidden_states", tensors[0]);
  const paddle::Place& place = tensors[0].place();
  PaddleTensors gradients;
  for (size_t i = 0; i < tensors.size(); ++i) {
    gradients.push_back(wanted[i] ? empty_gradient(tensors[i]) : paddle::Tensor());
  }
  const Arguments arguments = experts_arguments(routing_table, tensors, counts, PADDLE_MOE_EXPERTS_OPTIONS);
  // A gradient has the shape and dtype of its argument, and no data where it is not wanted.
  Arguments results = arguments;
  std::vector<Tensor*> views{&results.hidden_states, &results.router_weights};
  for (auto* list : {&results.gate_up_weights, &results.down_weights, &results.gate_up_bias,
                     &results.down_bias, &results.gate_up_scale, &results.down_scale}) {
    for (Tensor& tensor : *list) views.push_back(&tensor);
  }
  for (size_t i = 0; i < views.size(); ++i) views[i]->data = wanted[i] ? gradients[i].data() : nullptr;
  const BackwardProblem problem = resolve_backward(
      arguments, view(grad_out), pre_activations.shape()[1] == 1 ? Tensor{} : view(pre_activations), results);
  Workspace workspace(dispatch::backward_workspace_size(device, problem), place);
  dispatch::mixture_of_experts_backward(device, problem, workspace.data());
  return gradients;
}

// ---------------------------------------------------------------- gate

PaddleTensors gate(const paddle::Tensor& hidden_states, const paddle::Tensor& gate_weight,
                   const std::vector<int>& wanted) {
  expect_place("gate_weight", gate_weight, hidden_states.place());
  const GateProblem problem = resolve_gate(view(hidden_states), view(gate_weight));
  const Device device = device_of("hidden_states", hidden_states);
  paddle::Tensor logits = paddle::empty({problem.num_tokens, problem.num_experts}, paddle::DataType::FLOAT32,
                                        hidden_states.place());
  Workspace workspace(dispatch::gate_workspace_size(device, problem), hidden_states.place());
  dispatch::gate(device, problem, workspace.data(), logits.data<float>());
  return {logits};
}

std::vector<Shape> gate_shapes(const Shape& hidden_states, const Shape& gate_weight,
                               const std::vector<int>& wanted) {
  const GateProblem problem = resolve_gate(view(hidden_states), view(gate_weight));
  return {{problem.num_tokens, problem.num_experts}};
}

DataTypes gate_dtypes() { return {paddle::DataType::FLOAT32}; }

PaddleTensors gate_backward(const paddle::Tensor& hidden_states, const paddle::Tensor& gate_weight,
                            const paddle::Tensor& grad_logits, const std::vector<int>& wanted) {
  expect_kept(hidden_states, grad_logits);
  const Device device = device_of("hidden_states", hidden_states);
  // Nobody looks at what is returned in place of an unwanted gradient, but Paddle refuses nothing at all.
  auto gradient = [&](const paddle::Tensor& tensor, bool is_wanted) {
    return is_wanted ? empty_gradient(tensor) : paddle::empty({1}, tensor.dtype(), tensor.place());
  };
  paddle::Tensor hidden_states_grad = gradient(hidden_states, wanted[0]);
  paddle::Tensor gate_weight_grad = gradient(gate_weight, wanted[1]);
  const GateBackwardProblem problem = resolve_gate_backward(
      view(hidden_states), view(gate_weight), view(grad_logits),
      wanted[0] ? view(hidden_states_grad) : Tensor{}, wanted[1] ? view(gate_weight_grad) : Tensor{});
  Workspace workspace(dispatch::gate_backward_workspace_size(device, problem), hidden_states.place());
  dispatch::gate_backward(device, problem, workspace.data());
  return {hidden_states_grad, gate_weight_grad};
}

// ---------------------------------------------------------------- route

PaddleTensors route(const paddle::Tensor& logits, const paddle::optional<paddle::Tensor>& correction_bias,
                    PADDLE_MOE_ROUTE_PARAMETERS) {
  expect_place("correction_bias", correction_bias, logits.place());
  const RouteProblem problem = resolve_route(view(logits), view(correction_bias), PADDLE_MOE_ROUTE_OPTIONS);
  const Device device = device_of("logits", logits);
  paddle::Tensor table = paddle::empty({problem.num_tokens, top_k}, paddle::DataType::INT32, logits.place());
  paddle::Tensor weights =
      paddle::empty({problem.num_tokens, top_k}, paddle::DataType::FLOAT32, logits.place());
  dispatch::route(device, problem, table.data<int32_t>(), weights.data<float>());
  return {table, weights};
}

std::vector<Shape> route_shapes(const Shape& logits, const paddle::optional<Shape>& correction_bias,
                                PADDLE_MOE_ROUTE_PARAMETERS) {
  const RouteProblem problem = resolve_route(view(logits), view(correction_bias), PADDLE_MOE_ROUTE_OPTIONS);
  return {{problem.num_tokens, top_k}, {problem.num_tokens, top_k}};
}

DataTypes route_dtypes() { return {paddle::DataType::INT32, paddle::DataType::FLOAT32}; }

PaddleTensors route_backward(const paddle::Tensor& logits,
                             const paddle::optional<paddle::Tensor>& correction_bias,
                             const paddle::Tensor& routing_table, const paddle::Tensor& grad_router_weights,
                             PADDLE_MOE_ROUTE_PARAMETERS) {
  expect_kept(logits, grad_router_weights);
  const RouteProblem problem = resolve_route(view(logits), view(correction_bias), PADDLE_MOE_ROUTE_OPTIONS);
  const Device device = device_of("logits", logits);
  paddle::Tensor grad = paddle::empty(logits.shape(), paddle::DataType::FLOAT32, logits.place());
  dispatch::route_backward(device,
                           resolve_route_backward(problem, view(routing_table), view(grad_router_weights)),
                           grad.data<float>());
  return {grad};
}

// ---------------------------------------------------------------- gate, route and experts at once
//
// Without gradients. `tensors`: as in experts, but without router_weights.

PaddleTensors fused_gate_moe(const paddle::Tensor& gate_weight,
                             const paddle::optional<paddle::Tensor>& correction_bias,
                             const PaddleTensors& tensors, const std::vector<int>& counts,
                             PADDLE_MOE_ROUTE_PARAMETERS, PADDLE_MOE_EXPERTS_PARAMETERS,
                             bool measurement_mode) {
  const paddle::Tensor& hidden_states = tensors[0];
  const paddle::Place& place = hidden_states.place();
  const Device device = device_of("hidden_states", hidden_states);
  expect_place("gate_weight", gate_weight, place);
  const GateProblem gate_problem = resolve_gate(view(hidden_states), view(gate_weight));
  const int64_t num_tokens = gate_problem.num_tokens;
  auto new_tensor = [&](const Shape& shape, paddle::DataType dtype) {
    return paddle::empty(shape, dtype, place);
  };

  expect_place("correction_bias", correction_bias, place);
  const paddle::Tensor logits = new_tensor({num_tokens, gate_problem.num_experts}, paddle::DataType::FLOAT32);
  const RouteProblem route_problem =
      resolve_route(view(logits), view(correction_bias), PADDLE_MOE_ROUTE_OPTIONS);

  const paddle::Tensor table = new_tensor({num_tokens, top_k}, paddle::DataType::INT32);
  const paddle::Tensor weights = new_tensor({num_tokens, top_k}, paddle::DataType::FLOAT32);
  PaddleTensors all = tensors;
  all.insert(all.begin() + 1, weights);
  expect_places(table, all, counts);
  const Problem problem = resolve(experts_arguments(table, all, counts, PADDLE_MOE_EXPERTS_OPTIONS));
  paddle::Tensor out = new_tensor({num_tokens, problem.hidden_size}, hidden_states.dtype());
  paddle::Tensor amax = new_tensor({problem.num_experts()}, paddle::DataType::FLOAT32);
  Workspace workspace(dispatch::fused_workspace_size(device, gate_problem, problem), place);
  dispatch::fused_gate_moe(device, gate_problem, route_problem, problem, workspace.data(), out.data(),
                           measurement_mode ? amax.data<float>() : nullptr);
  if (!measurement_mode) dispatch::set_to_zero(device, amax.data(), amax.numel() * sizeof(float));
  return {out, amax, table, weights};
}

std::vector<Shape> fused_gate_moe_shapes(const Shape& gate_weight,
                                         const paddle::optional<Shape>& correction_bias,
                                         const std::vector<Shape>& tensors, const std::vector<int>& counts,
                                         int64_t top_k) {
  const Shape& hidden_states = tensors[0];
  return {hidden_states, {-1}, {hidden_states[0], top_k}, {hidden_states[0], top_k}};
}

DataTypes fused_gate_moe_dtypes(paddle::DataType gate_weight,
                                const paddle::optional<paddle::DataType>& correction_bias,
                                const DataTypes& tensors) {
  return {tensors[0], paddle::DataType::FLOAT32, paddle::DataType::INT32, paddle::DataType::FLOAT32};
}

// ---------------------------------------------------------------- second derivatives

// Without these operators Paddle would silently return none.
PaddleTensors no_second_derivative() {
  PADDLE_THROW(common::errors::Unimplemented(  // NotImplementedError
      "paddle_moe has no second derivatives: call paddle.grad() without create_graph"));
}
PaddleTensors no_second_derivative_of_list(const PaddleTensors&) { return no_second_derivative(); }
PaddleTensors no_second_derivative_of_one(const paddle::Tensor&) { return no_second_derivative(); }

}  // namespace
}  // namespace paddle_moe

PD_BUILD_OP(paddle_moe_experts)
    .Inputs({"routing_table", paddle::Vec("tensors")})
    .Outputs({"out", "amax", "pre_activations"})
    .Attrs({"counts: std::vector<int>", "wanted: std::vector<int>", PADDLE_MOE_EXPERTS_ATTRIBUTES,
            "measurement_mode: bool", "save_pre_activations: bool"})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::experts>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(paddle_moe::Guarded<paddle_moe::experts_shapes>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(paddle_moe::experts_dtypes));

PD_BUILD_GRAD_OP(paddle_moe_experts)
    .Inputs({"routing_table", paddle::Vec("tensors"), "pre_activations", paddle::Grad("out")})
    .Outputs({paddle::Grad(paddle::Vec("tensors"))})
    .Attrs({"counts: std::vector<int>", "wanted: std::vector<int>", PADDLE_MOE_EXPERTS_ATTRIBUTES,
            "measurement_mode: bool", "save_pre_activations: bool"})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::experts_backward>::call));

PD_BUILD_DOUBLE_GRAD_OP(paddle_moe_experts)
    .Inputs({paddle::Grad(paddle::Grad(paddle::Vec("tensors")))})
    .Outputs({paddle::Grad(paddle::Grad("out"))})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::no_second_derivative_of_list>::call));

PD_BUILD_OP(paddle_moe_gate)
    .Inputs({"hidden_states", "gate_weight"})
    .Outputs({"logits"})
    .Attrs({"wanted: std::vector<int>"})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::gate>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(paddle_moe::Guarded<paddle_moe::gate_shapes>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(paddle_moe::gate_dtypes));

PD_BUILD_GRAD_OP(paddle_moe_gate)
    .Inputs({"hidden_states", "gate_weight", paddle::Grad("logits")})
    .Outputs({paddle::Grad("hidden_states"), paddle::Grad("gate_weight")})
    .Attrs({"wanted: std::vector<int>"})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::gate_backward>::call));

PD_BUILD_DOUBLE_GRAD_OP(paddle_moe_gate)
    .Inputs({paddle::Grad(paddle::Grad("hidden_states"))})
    .Outputs({paddle::Grad(paddle::Grad("logits"))})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::no_second_derivative_of_one>::call));

PD_BUILD_OP(paddle_moe_route)
    .Inputs({"logits", paddle::Optional("correction_bias")})
    .Outputs({"routing_table", "router_weights"})
    .Attrs({PADDLE_MOE_ROUTE_ATTRIBUTES})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::route>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(paddle_moe::Guarded<paddle_moe::route_shapes>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(paddle_moe::route_dtypes));

PD_BUILD_GRAD_OP(paddle_moe_route)
    .Inputs({"logits", paddle::Optional("correction_bias"), "routing_table", paddle::Grad("router_weights")})
    .Outputs({paddle::Grad("logits")})
    .Attrs({PADDLE_MOE_ROUTE_ATTRIBUTES})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::route_backward>::call));

PD_BUILD_DOUBLE_GRAD_OP(paddle_moe_route)
    .Inputs({paddle::Grad(paddle::Grad("logits"))})
    .Outputs({paddle::Grad(paddle::Grad("router_weights"))})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::no_second_derivative_of_one>::call));

PD_BUILD_OP(paddle_moe_fused_gate_moe)
    .Inputs({"gate_weight", paddle::Optional("correction_bias"), paddle::Vec("tensors")})
    .Outputs({"out", "amax", "routing_table", "router_weights"})
    .Attrs({"counts: std::vector<int>", PADDLE_MOE_ROUTE_ATTRIBUTES, PADDLE_MOE_EXPERTS_ATTRIBUTES,
            "measurement_mode: bool"})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::fused_gate_moe>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(paddle_moe::fused_gate_moe_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(paddle_moe::fused_gate_moe_dtypes));

// What Paddle's operator registry has no place for; functional.py calls these through ctypes.
#define PADDLE_MOE_EXPORT extern "C" __attribute__((visibility("default")))
PADDLE_MOE_EXPORT void paddle_moe_set_num_threads(int num_threads) {
  paddle_moe::cpu::set_num_threads(num_threads);
}
// -1 where PADDLE_MOE_NUM_THREADS makes no sense: no exception may leave a function of C.
PADDLE_MOE_EXPORT int paddle_moe_num_threads() {
  try {
    return paddle_moe::cpu::num_threads();
  } catch (const std::runtime_error&) {
    return -1;
  }
}
PADDLE_MOE_EXPORT size_t paddle_moe_release_memory() { return paddle_moe::KeptMemory::instance().release(); }
