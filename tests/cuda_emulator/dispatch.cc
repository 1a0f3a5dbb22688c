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
                        void*) {
  const auto lock = next_schedule();
  cuda::mixture_of_experts(problem, nullptr, workspace, out, amax);
}

int64_t saved_rows(const Device&, const Problem&) { return 0; }

[[noreturn]] void no_gradient() { throw NotImplemented("the CUDA back end has no gradients yet"); }
size_t backward_workspace_size(const Device&, const BackwardProblem&) { no_gradient(); }
void mixture_of_experts_backward(const Device&, const BackwardProblem&, void*) { no_gradient(); }
size_t gate_backward_workspace_size(const Device&, const GateBackwardProblem&) { no_gradient(); }
void gate_backward(const Device&, const GateBackwardProblem&, void*) { no_gradient(); }
void route_backward(const Device&, const RouteBackwardProblem&, float*) { no_gradient(); }

size_t gate_workspace_size(const Device&, const GateProblem&) { return 0; }

void gate(const Device&, const GateProblem& problem, void*, float* logits) {
  const auto lock = next_schedule();
  cuda::gate(problem, nullptr, logits);
}

void route(const Device&, const RouteProblem& problem, int32_t* routing_table, float* router_weights) {
  const auto lock = next_schedule();
  cuda::route(problem, nullptr, routing_table, router_weights);
}

void set_to_zero(const Device&, void* data, size_t bytes) { std::memset(data, 0, bytes); }

}  // namespace dispatch
}  // namespace paddle_moe
