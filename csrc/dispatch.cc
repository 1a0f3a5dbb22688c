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

void fill_with_zeros(const Device&, void*, size_t) {}

#endif

// The calls of cuda:: stand in discarded branches where the back end was not built, and need no definition.
bool is_gpu(const Device& device) { return device.kind == Device::Kind::kCuda; }

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
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::workspace_size(problem);
    }
  }
  return cpu::workspace_size(problem, device.num_threads);
}

void mixture_of_experts(const Device& device, const Problem& problem, void* workspace, void* out, float* amax,
                        void* pre_activations) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::mixture_of_experts(problem, device.stream, workspace, out, amax, pre_activations);
    }
  }
  cpu::mixture_of_experts(problem, device.num_threads, workspace, out, amax, pre_activations);
}

int64_t saved_rows(const Device& device, const Problem& problem) {
  return is_gpu(device) ? problem.num_tokens * problem.top_k : cpu::count_rows(problem);
}

size_t backward_workspace_size(const Device& device, const BackwardProblem& problem) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::backward_workspace_size(problem);
    }
  }
  return cpu::backward_workspace_size(problem, device.num_threads);
}

void mixture_of_experts_backward(const Device& device, const BackwardProblem& problem, void* workspace) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::mixture_of_experts_backward(problem, device.stream, workspace);
    }
  }
  cpu::mixture_of_experts_backward(problem, device.num_threads, workspace);
}

size_t gate_backward_workspace_size(const Device& device, const GateBackwardProblem& problem) {
  return is_gpu(device) ? 0 : cpu::gate_backward_workspace_size(problem, device.num_threads);
}

void gate_backward(const Device& device, const GateBackwardProblem& problem, void* workspace) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::gate_backward(problem, device.stream);
    }
  }
  cpu::gate_backward(problem, device.num_threads, workspace);
}

void route_backward(const Device& device, const RouteBackwardProblem& problem, float* grad_logits) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::route_backward(problem, device.stream, grad_logits);
    }
  }
  cpu::route_backward(problem, device.num_threads, grad_logits);
}

size_t gate_workspace_size(const Device& device, const GateProblem& problem) {
  return is_gpu(device) ? 0 : cpu::gate_workspace_size(problem, device.num_threads);
}

void gate(const Device& device, const GateProblem& problem, void* workspace, float* logits) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::gate(problem, device.stream, logits);
    }
  }
  cpu::gate(problem, device.num_threads, workspace, logits);
}

void route(const Device& device, const RouteProblem& problem, int32_t* routing_table, float* router_weights) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::route(problem, device.stream, routing_table, router_weights);
    }
  }
  cpu::route(problem, device.num_threads, routing_table, router_weights);
}

size_t fused_workspace_size(const Device& device, const GateProblem& gate, const Problem& problem) {
  return std::max(gate_workspace_size(device, gate), workspace_size(device, problem));
}

void fused_gate_moe(const Device& device, const GateProblem& gate, const RouteProblem& route,
                    const Problem& problem, void* workspace, void* out, float* amax) {
  if constexpr (kHasCuda) {
    if (is_gpu(device)) {
      const CurrentDevice guard(device);
      return cuda::fused_gate_moe(gate, route, problem, device.stream, workspace, out, amax);
    }
  }
  cpu::gate(gate, device.num_threads, workspace, const_cast<float*>(route.logits));
  cpu::route(route, device.num_threads, static_cast<int32_t*>(const_cast<void*>(problem.routing_table)),
             static_cast<float*>(const_cast<void*>(problem.router_weights)));
  cpu::mixture_of_experts(problem, device.num_threads, workspace, out, amax);
}

void set_to_zero(const Device& device, void* data, size_t bytes) {
  if (!is_gpu(device)) {
    std::memset(data, 0, bytes);
    return;
  }
  const CurrentDevice guard(device);
  fill_with_zeros(device, data, bytes);
}

}  // namespace dispatch
}  // namespace paddle_moe
