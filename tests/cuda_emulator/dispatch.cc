// Stands in for csrc/dispatch.cc: NumPy arrays go to the CUDA back end, emulated. Linked with the bindings of
// paddle_moe.core it makes the tests of the CPU back end tests of the kernels in csrc/cuda.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "cuda/ptx.cuh"

namespace paddle_moe {
namespace dispatch {
namespace {

// One caller at a time: the emulator has one device. Every call gets a schedule of its own.
std::unique_lock<std::mutex> next_schedule() {
  static std::mutex mutex;
  std::unique_lock<std::mutex> lock(mutex);
  emulator::order = emulator::Order::kRandom;
  emulator::copies = emulator::random_numbers() % 2 ? emulator::Copies::kEager : emulator::Copies::kLate;
  if (const char* capability = std::getenv("PADDLE_MOE_EMULATED_CAPABILITY")) {
    emulator::compute_capability = std::atoi(capability);
  }
  return lock;
}

}  // namespace

bool has_cuda() { return false; }

Device cpu_device() { return {}; }

Device cuda_device(const char*, int, cuda::Stream) { throw std::runtime_error("the GPU is emulated"); }

size_t workspace_size(const Device&, const Problem& problem) {
  const auto lock = next_schedule();
  return cuda::workspace_size(problem);
}

void mixture_of_experts(const Device&, const Problem& problem, void* workspace, void* out, float* amax,
                        void* pre_activations) {
  const auto lock = next_schedule();
  cuda::mixture_of_experts(problem, nullptr, workspace, out, amax, pre_activations);
}

int64_t saved_rows(const Device&, const Problem& problem) { return problem.num_tokens * problem.top_k; }

size_t backward_workspace_size(const Device&, const BackwardProblem& problem) {
  const auto lock = next_schedule();
  return cuda::backward_workspace_size(problem);
}

void mixture_of_experts_backward(const Device&, const BackwardProblem& problem, void* workspace) {
  const auto lock = next_schedule();
  cuda::mixture_of_experts_backward(problem, nullptr, workspace);
}

size_t gate_backward_workspace_size(const Device&, const GateBackwardProblem&) { return 0; }

void gate_backward(const Device&, const GateBackwardProblem& problem, void*) {
  const auto lock = next_schedule();
  cuda::gate_backward(problem, nullptr);
}

void route_backward(const Device&, const RouteBackwardProblem& problem, float* grad_logits) {
  const auto lock = next_schedule();
  cuda::route_backward(problem, nullptr, grad_logits);
}

size_t gate_workspace_size(const Device&, const GateProblem&) { return 0; }

void gate(const Device&, const GateProblem& problem, void*, float* logits) {
  const auto lock = next_schedule();
  cuda::gate(problem, nullptr, logits);
}

void route(const Device&, const RouteProblem& problem, int32_t* routing_table, float* router_weights) {
  const auto lock = next_schedule();
  cuda::route(problem, nullptr, routing_table, router_weights);
}

size_t fused_workspace_size(const Device& device, const GateProblem&, const Problem& problem) {
  return workspace_size(device, problem);
}

void fused_gate_moe(const Device&, const GateProblem& gate, const RouteProblem& route, const Problem& problem,
                    void* workspace, void* out, float* amax) {
  const auto lock = next_schedule();
  cuda::fused_gate_moe(gate, route, problem, nullptr, workspace, out, amax);
}

void set_to_zero(const Device&, void* data, size_t bytes) { std::memset(data, 0, bytes); }

}  // namespace dispatch
}  // namespace paddle_moe
