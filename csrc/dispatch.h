// Where a call runs, and the back end that runs it there. Both bindings go through this file, so that they do
// not need to know which back ends were built.
#pragma once

#include "moe.h"

namespace paddle_moe {

struct Device {
  enum class Kind { kCpu, kCuda };
  Kind kind = Kind::kCpu;
  int num_threads = 1;            // of the CPU
  int index = 0;                  // of the GPU
  cuda::Stream stream = nullptr;  // of the GPU: where the inputs are ready and the work is enqueued
};

namespace dispatch {

bool has_cuda();  // whether this build has the CUDA back end

Device cpu_device();  // with as many threads as cpu::num_threads() says now

// Throws std::runtime_error in a build without the CUDA back end. `name`: the argument that lies on the GPU.
Device cuda_device(const char* name, int index, cuda::Stream stream);

constexpr size_t kWorkspaceAlignment = 256;

// See cpu and cuda in moe.h. All pointers lie in the memory of `device`; it is the current one meanwhile.
size_t workspace_size(const Device& device, const Problem& problem);
void mixture_of_experts(const Device& device, const Problem& problem, void* workspace, void* out, float* amax,
                        void* pre_activations);

// Rows of what mixture_of_experts() keeps pre-activations in.
int64_t saved_rows(const Device& device, const Problem& problem);

size_t backward_workspace_size(const Device& device, const BackwardProblem& problem);
void mixture_of_experts_backward(const Device& device, const BackwardProblem& problem, void* workspace);
size_t gate_backward_workspace_size(const Device& device, const GateBackwardProblem& problem);
void gate_backward(const Device& device, const GateBackwardProblem& problem, void* workspace);
void route_backward(const Device& device, const RouteBackwardProblem& problem, float* grad_logits);

size_t gate_workspace_size(const Device& device, const GateProblem& problem);
void gate(const Device& device, const GateProblem& problem, void* workspace, float* logits);

void route(const Device& device, const RouteProblem& problem, int32_t* routing_table, float* router_weights);

// gate(), route() and mixture_of_experts(): the arrays that a later one reads are written by the one before.
// workspace: of fused_workspace_size() bytes.
size_t fused_workspace_size(const Device& device, const GateProblem& gate, const Problem& problem);
void fused_gate_moe(const Device& device, const GateProblem& gate, const RouteProblem& route,
                    const Problem& problem, void* workspace, void* out, float* amax);

void set_to_zero(const Device& device, void* data, size_t bytes);

}  // namespace dispatch
}  // namespace paddle_moe
