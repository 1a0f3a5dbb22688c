#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef PADDLE_MOE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace paddle_moe {
namespace dispatch {
namespace {

#ifdef PADDLE_MOE_WITH_CUDA

constexpr bool kHasCuda = true;

void check(cudaError_t error, const char* function) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(function) + " failed: " + cudaGetErrorString(error));
  }
}

// Makes the GPU the current device of this thread, and the former one current again in the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Device& device) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    changed_ = former_ != device.index;
    if (changed_) check(cudaSetDevice(device.index), "cudaSetDevice");
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(former_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

void fill_with_zeros(const Device& device, void* data, size_t bytes) {
  check(cudaMemsetAsync(data, 0, bytes, device.stream), "cudaMemsetAsync");
}

#else

constexpr bool kHasCuda = false;

struct CurrentDevice {
  explicit CurrentDevice(const Device&) {}
};

[[maybe_unused]] void fill_with_zeros(const Device&, void*, size_t) {}

#endif

bool is_gpu(const Device& device) { return device.kind == Device::Kind::kCuda; }

// on_gpu(stream), with the GPU as the current device, or on_cpu(num_threads). on_gpu takes an `auto`: where
// the CUDA back end was not built it is never instantiated, so that nothing refers to that back end.
template <class OnGpu, class OnCpu>
auto run(const Device& device, const OnGpu& on_gpu, const OnCpu& on_cpu) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return on_gpu(device.stream);
    }
  }
  return on_cpu(device.num_threads);
}

void expect_supported(const Device& device, const Problem& problem) {
  if (!is_gpu(device)) return;
  if (problem.prepacked) {
    throw std::invalid_argument(
        "gate_up_weights and down_weights must not be prepacked on a GPU, whose kernels read them in another "
        "order; pass [E_l, H, 2I] and [E_l, I, H]");
  }
  if (!is_quantised(problem.weight_dtype)) return;
  throw std::invalid_argument(std::string("gate_up_weights and down_weights must have the dtype ") +
                              dtype_name(problem.dtype) + " on a GPU, got " +
                              dtype_name(problem.weight_dtype) +
                              ": only the CPU back end multiplies quantised weights; dequantise them");
}

}  // namespace

bool has_cuda() { return kHasCuda; }

Device cpu_device() {
  Device device;
  device.num_threads = cpu::num_threads();
  return device;
}

Device cuda_device(const char* name, int index, cuda::Stream stream) {
  if (!kHasCuda) {
    throw std::runtime_error(std::string(name) +
                             " is on a GPU, but this build of paddle_moe has only the CPU back end; move the "
                             "arguments to the CPU, or install paddle_moe again with PADDLE_MOE_CUDA=1");
  }
  Device device;
  device.kind = Device::Kind::kCuda;
  device.index = index;
  device.stream = stream;
  return device;
}

size_t workspace_size(const Device& device, const Problem& problem) {
  expect_supported(device, problem);
  return run(
      device, [&](auto) { return cuda::workspace_size(problem); },
      [&](int threads) { return cpu::workspace_size(problem, threads); });
}

void mixture_of_experts(const Device& device, const Problem& problem, void* workspace, void* out, float* amax,
                        void* pre_activations) {
  run(
      device,
      [&](auto stream) { cuda::mixture_of_experts(problem, stream, workspace, out, amax, pre_activations); },
      [&](int threads) { cpu::mixture_of_experts(problem, threads, workspace, out, amax, pre_activations); });
}

int64_t saved_rows(const Device& device, const Problem& problem) {
  return is_gpu(device) ? problem.num_tokens * problem.top_k : cpu::count_rows(problem);
}

size_t backward_workspace_size(const Device& device, const BackwardProblem& problem) {
  expect_supported(device, problem.forward);
  return run(
      device, [&](auto) { return cuda::backward_workspace_size(problem); },
      [&](int threads) { return cpu::backward_workspace_size(problem, threads); });
}

void mixture_of_experts_backward(const Device& device, const BackwardProblem& problem, void* workspace) {
  run(
      device, [&](auto stream) { cuda::mixture_of_experts_backward(problem, stream, workspace); },
      [&](int threads) { cpu::mixture_of_experts_backward(problem, threads, workspace); });
}

size_t gate_backward_workspace_size(const Device& device, const GateBackwardProblem& problem) {
  return is_gpu(device) ? 0 : cpu::gate_backward_workspace_size(problem, device.num_threads);
}

void gate_backward(const Device& device, const GateBackwardProblem& problem, void* workspace) {
  run(
      device, [&](auto stream) { cuda::gate_backward(problem, stream); },
      [&](int threads) { cpu::gate_backward(problem, threads, workspace); });
}

void route_backward(const Device& device, const RouteBackwardProblem& problem, float* grad_logits) {
  run(
      device, [&](auto stream) { cuda::route_backward(problem, stream, grad_logits); },
      [&](int threads) { cpu::route_backward(problem, threads, grad_logits); });
}

size_t gate_workspace_size(const Device& device, const GateProblem& problem) {
  return is_gpu(device) ? 0 : cpu::gate_workspace_size(problem, device.num_threads);
}

void gate(const Device& device, const GateProblem& problem, void* workspace, float* logits) {
  run(
      device, [&](auto stream) { cuda::gate(problem, stream, logits); },
      [&](int threads) { cpu::gate(problem, threads, workspace, logits); });
}

void route(const Device& device, const RouteProblem& problem, int32_t* routing_table, float* router_weights) {
  run(
      device, [&](auto stream) { cuda::route(problem, stream, routing_table, router_weights); },
      [&](int threads) { cpu::route(problem, threads, routing_table, router_weights); });
}

size_t fused_workspace_size(const Device& device, const GateProblem& gate, const Problem& problem) {
  return std::max(gate_workspace_size(device, gate), workspace_size(device, problem));
}

void fused_gate_moe(const Device& device, const GateProblem& gate, const RouteProblem& route,
                    const Problem& problem, void* workspace, void* out, float* amax) {
  run(
      device, [&](auto stream) { cuda::fused_gate_moe(gate, route, problem, stream, workspace, out, amax); },
      [&](int threads) {
        cpu::gate(gate, threads, workspace, const_cast<float*>(route.logits));
        cpu::route(route, threads, static_cast<int32_t*>(const_cast<void*>(problem.routing_table)),
                   static_cast<float*>(const_cast<void*>(problem.router_weights)));
        cpu::mixture_of_experts(problem, threads, workspace, out, amax);
      });
}

void set_to_zero(const Device& device, void* data, size_t bytes) {
  run(device, [&](auto) { fill_with_zeros(device, data, bytes); }, [&](int) { std::memset(data, 0, bytes); });
}

}  // namespace dispatch
}  // namespace paddle_moe
