// Chooses the experts of every token, and the gradient of their weights: one warp per token.
#include "cuda/router.cuh"

namespace paddle_moe {
namespace cuda {
namespace {

constexpr int kMaxWarps = 8;

__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    route_tokens(const __grid_constant__ RouteProblem p, int32_t* routing_table, float* router_weights) {
  route_by_warps(p, blockDim.x / kWarpSize, routing_table, router_weights);
}

// Every lane sums the few chosen experts itself.
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    route_tokens_backward(const __grid_constant__ RouteBackwardProblem b, float* grad_logits) {
  const RouteProblem& p = b.forward;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kMaxWarps + threadIdx.x / kWarpSize;
  if (token >= p.num_tokens) return;
  Router(p, p.logits + token * p.num_experts, nullptr)
      .backward(b.routing_table + token * p.top_k, b.grad_router_weights + token * p.top_k,
                grad_logits + token * p.num_experts);
}

}  // namespace

void route_backward(const RouteBackwardProblem& b, Stream stream, float* grad_logits) {
  launch("route_tokens_backward", route_tokens_backward, divide_up(b.forward.num_tokens, kMaxWarps),
         kMaxWarps * kWarpSize, 0, stream, b, grad_logits);
}

void route(const RouteProblem& p, Stream stream, int32_t* routing_table, float* router_weights) {
  const RouteBlocks grid(p, kMaxWarps);
  launch("route_tokens", route_tokens, grid.blocks, grid.warps * kWarpSize, grid.shared_bytes, stream, p,
         routing_table, router_weights);
}

}  // namespace cuda
}  // namespace paddle_moe
