// The Paddle binding, three custom operators: the only file that includes Paddle.
#include <paddle/extension.h>

#ifdef PADDLE_WITH_CUDA  // defined by setup.py where Paddle is a CUDA build
#define PADDLE_MOE_GPU_TENSORS
// With it enforce.h asks for the headers of cuBLAS, cuDNN and others, none of which is needed here.
#undef PADDLE_WITH_CUDA
#endif
#include <paddle/phi/core/enforce.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"

namespace paddle_moe {
namespace {

using Shape = std::vector<int64_t>;
using DataTypes = std::vector<paddle::DataType>;
using PaddleTensors = std::vector<paddle::Tensor>;
using OptionalTensors = paddle::optional<PaddleTensors>;

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

struct NotImplemented : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Only Paddle's own exceptions cross into Python: any other one ends the process. Each error code below
// becomes the Python exception named beside it.
template <auto function>
struct Guarded;

template <class Result, class... Args, Result (*function)(Args...)>
struct Guarded<function> {
  static Result call(Args... args) {
    try {
      return function(args...);
    } catch (const std::invalid_argument& error) {
      PADDLE_THROW(common::errors::InvalidArgument("%s", error.what()));  // ValueError
    } catch (const NotImplemented& error) {
      PADDLE_THROW(common::errors::Unimplemented("%s", error.what()));  // NotImplementedError
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
  return {tensor.data(), dtype_of(tensor.dtype()), tensor.shape(), {}};
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

template <class T>
std::vector<Tensor> views(const paddle::optional<std::vector<T>>& list) {
  return list ? views(*list) : std::vector<Tensor>{};
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

void expect_place(const char* name, const PaddleTensors& tensors, const paddle::Place& expected) {
  for (const paddle::Tensor& tensor : tensors) expect_place(name, tensor, expected);
}

void expect_place(const char* name, const OptionalTensors& tensors, const paddle::Place& expected) {
  if (tensors) expect_place(name, *tensors, expected);
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

class Workspace {
 public:
  Workspace(size_t bytes, const paddle::Place& place)
      : buffer_(paddle::empty({static_cast<int64_t>(bytes + kAlignment)}, paddle::DataType::UINT8, place)) {}

  void* data() {
    void* pointer = buffer_.data();
    size_t space = static_cast<size_t>(buffer_.numel());
    return std::align(kAlignment, space - kAlignment, pointer, space);
  }

 private:
  static constexpr size_t kAlignment = dispatch::kWorkspaceAlignment;
  paddle::Tensor buffer_;
};

// ---------------------------------------------------------------- experts

PaddleTensors experts(const paddle::Tensor& hidden_states, const paddle::Tensor& routing_table,
                      const paddle::Tensor& router_weights, const PaddleTensors& gate_up_weights,
                      const PaddleTensors& down_weights, const OptionalTensors& gate_up_bias,
                      const OptionalTensors& down_bias, bool permuted_weights, const std::string& activation,
                      int64_t experts_min, int64_t experts_max, int64_t chunk_size, bool measurement_mode) {
  const paddle::Place& place = hidden_states.place();
  expect_place("routing_table", routing_table, place);
  expect_place("router_weights", router_weights, place);
  expect_place("gate_up_weights", gate_up_weights, place);
  expect_place("down_weights", down_weights, place);
  expect_place("gate_up_bias", gate_up_bias, place);
  expect_place("down_bias", down_bias, place);
  const Problem problem =
      resolve({view(hidden_states), view(routing_table), view(router_weights), views(gate_up_weights),
               views(down_weights), views(gate_up_bias), views(down_bias), permuted_weights, activation,
               experts_min, experts_max, chunk_size});
  const Device device = device_of("hidden_states", hidden_states);

  paddle::Tensor out = paddle::empty({problem.num_tokens, problem.hidden_size}, hidden_states.dtype(), place);
  paddle::Tensor amax = paddle::empty({problem.num_experts()}, paddle::DataType::FLOAT32, place);
  Workspace workspace(dispatch::workspace_size(device, problem), place);
  dispatch::mixture_of_experts(device, problem, workspace.data(), out.data(),
                               measurement_mode ? amax.data<float>() : nullptr);
  // Not computed then, but an operator has to return it, and Paddle 2.6 refuses an empty one.
  if (!measurement_mode) dispatch::set_to_zero(device, amax.data(), amax.numel() * sizeof(float));
  return {out, amax};
}

std::vector<Shape> experts_shapes(const Shape& hidden_states, const Shape& routing_table,
                                  const Shape& router_weights, const std::vector<Shape>& gate_up_weights,
                                  const std::vector<Shape>& down_weights,
                                  const paddle::optional<std::vector<Shape>>& gate_up_bias,
                                  const paddle::optional<std::vector<Shape>>& down_bias,
                                  bool permuted_weights, const std::string& activation, int64_t experts_min,
                                  int64_t experts_max, int64_t chunk_size) {
  const Problem problem =
      resolve({view(hidden_states), view(routing_table), view(router_weights), views(gate_up_weights),
               views(down_weights), views(gate_up_bias), views(down_bias), permuted_weights, activation,
               experts_min, experts_max, chunk_size});
  const int64_t num_experts = problem.experts.empty() ? -1 : problem.num_experts();
  return {{problem.num_tokens, problem.hidden_size}, {num_experts}};
}

DataTypes experts_dtypes(paddle::DataType hidden_states) {
  return {hidden_states, paddle::DataType::FLOAT32};
}

// ---------------------------------------------------------------- gate

PaddleTensors gate(const paddle::Tensor& hidden_states, const paddle::Tensor& gate_weight) {
  expect_place("gate_weight", gate_weight, hidden_states.place());
  const GateProblem problem = resolve_gate(view(hidden_states), view(gate_weight));
  const Device device = device_of("hidden_states", hidden_states);
  paddle::Tensor logits = paddle::empty({problem.num_tokens, problem.num_experts}, paddle::DataType::FLOAT32,
                                        hidden_states.place());
  Workspace workspace(dispatch::gate_workspace_size(device, problem), hidden_states.place());
  dispatch::gate(device, problem, workspace.data(), logits.data<float>());
  return {logits};
}

std::vector<Shape> gate_shapes(const Shape& hidden_states, const Shape& gate_weight) {
  const GateProblem problem = resolve_gate(view(hidden_states), view(gate_weight));
  return {{problem.num_tokens, problem.num_experts}};
}

DataTypes gate_dtypes() { return {paddle::DataType::FLOAT32}; }

// ---------------------------------------------------------------- route

PaddleTensors route(const paddle::Tensor& logits, const paddle::optional<paddle::Tensor>& correction_bias,
                    int64_t top_k, const std::string& scoring, int64_t num_groups, int64_t topk_groups,
                    const std::string& group_score, float group_mask_fill, bool renormalize,
                    float renormalize_eps, float scaling_factor) {
  expect_place("correction_bias", correction_bias, logits.place());
  const RouteProblem problem = resolve_route(view(logits), view(correction_bias),
                                             {top_k, scoring, num_groups, topk_groups, group_score,
                                              group_mask_fill, renormalize, renormalize_eps, scaling_factor});
  const Device device = device_of("logits", logits);
  paddle::Tensor table = paddle::empty({problem.num_tokens, top_k}, paddle::DataType::INT32, logits.place());
  paddle::Tensor weights =
      paddle::empty({problem.num_tokens, top_k}, paddle::DataType::FLOAT32, logits.place());
  dispatch::route(device, problem, table.data<int32_t>(), weights.data<float>());
  return {table, weights};
}

std::vector<Shape> route_shapes(const Shape& logits, const paddle::optional<Shape>& correction_bias,
                                int64_t top_k, const std::string& scoring, int64_t num_groups,
                                int64_t topk_groups, const std::string& group_score, float group_mask_fill,
                                bool renormalize, float renormalize_eps, float scaling_factor) {
  const RouteProblem problem = resolve_route(view(logits), view(correction_bias),
                                             {top_k, scoring, num_groups, topk_groups, group_score,
                                              group_mask_fill, renormalize, renormalize_eps, scaling_factor});
  return {{problem.num_tokens, top_k}, {problem.num_tokens, top_k}};
}

DataTypes route_dtypes() { return {paddle::DataType::INT32, paddle::DataType::FLOAT32}; }

// ---------------------------------------------------------------- backward

// Without a grad operator Paddle would silently return no gradients.
PaddleTensors no_backward() {
  throw NotImplemented(
      "paddle_moe has no backward yet: call its functions under paddle.no_grad(), or with inputs whose "
      "stop_gradient is True");
}

PaddleTensors no_experts_backward(const paddle::Tensor&, const paddle::Tensor&, const PaddleTensors&,
                                  const PaddleTensors&, const OptionalTensors&, const OptionalTensors&,
                                  const paddle::Tensor&) {
  return no_backward();
}

PaddleTensors no_gate_backward(const paddle::Tensor&, const paddle::Tensor&, const paddle::Tensor&) {
  return no_backward();
}

PaddleTensors no_route_backward(const paddle::Tensor&) { return no_backward(); }

}  // namespace
}  // namespace paddle_moe

PD_BUILD_OP(paddle_moe_experts)
    .Inputs({"hidden_states", "routing_table", "router_weights", paddle::Vec("gate_up_weights"),
             paddle::Vec("down_weights"), paddle::Optional(paddle::Vec("gate_up_bias")),
             paddle::Optional(paddle::Vec("down_bias"))})
    .Outputs({"out", "amax"})
    .Attrs({"permuted_weights: bool", "activation: std::string", "experts_min: int64_t",
            "experts_max: int64_t", "chunk_size: int64_t", "measurement_mode: bool"})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::experts>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(paddle_moe::Guarded<paddle_moe::experts_shapes>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(paddle_moe::experts_dtypes));

PD_BUILD_GRAD_OP(paddle_moe_experts)
    .Inputs({"hidden_states", "router_weights", paddle::Vec("gate_up_weights"), paddle::Vec("down_weights"),
             paddle::Optional(paddle::Vec("gate_up_bias")), paddle::Optional(paddle::Vec("down_bias")),
             paddle::Grad("out")})
    .Outputs({paddle::Grad("hidden_states"), paddle::Grad("router_weights"),
              paddle::Grad(paddle::Vec("gate_up_weights")), paddle::Grad(paddle::Vec("down_weights")),
              paddle::Grad(paddle::Optional(paddle::Vec("gate_up_bias"))),
              paddle::Grad(paddle::Optional(paddle::Vec("down_bias")))})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::no_experts_backward>::call));

PD_BUILD_OP(paddle_moe_gate)
    .Inputs({"hidden_states", "gate_weight"})
    .Outputs({"logits"})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::gate>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(paddle_moe::Guarded<paddle_moe::gate_shapes>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(paddle_moe::gate_dtypes));

PD_BUILD_GRAD_OP(paddle_moe_gate)
    .Inputs({"hidden_states", "gate_weight", paddle::Grad("logits")})
    .Outputs({paddle::Grad("hidden_states"), paddle::Grad("gate_weight")})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::no_gate_backward>::call));

PD_BUILD_OP(paddle_moe_route)
    .Inputs({"logits", paddle::Optional("correction_bias")})
    .Outputs({"routing_table", "router_weights"})
    .Attrs({"top_k: int64_t", "scoring: std::string", "num_groups: int64_t", "topk_groups: int64_t",
            "group_score: std::string", "group_mask_fill: float", "renormalize: bool",
            "renormalize_eps: float", "scaling_factor: float"})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::route>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(paddle_moe::Guarded<paddle_moe::route_shapes>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(paddle_moe::route_dtypes));

PD_BUILD_GRAD_OP(paddle_moe_route)
    .Inputs({paddle::Grad("router_weights")})
    .Outputs({paddle::Grad("logits")})
    .SetKernelFn(PD_KERNEL(paddle_moe::Guarded<paddle_moe::no_route_backward>::call));

// What Paddle's operator registry has no place for; functional.py calls these through ctypes.
#define PADDLE_MOE_EXPORT extern "C" __attribute__((visibility("default")))
PADDLE_MOE_EXPORT void paddle_moe_set_num_threads(int num_threads) {
  paddle_moe::cpu::set_num_threads(num_threads);
}
PADDLE_MOE_EXPORT int paddle_moe_num_threads() { return paddle_moe::cpu::num_threads(); }
