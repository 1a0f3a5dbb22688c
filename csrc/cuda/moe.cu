// The four stages of mixture_of_experts on a stream, chunk by chunk:
//
//   sort     slots (token, k) by local expert, and the tiles of the GEMMs          (sort.cu)
//   gate_up  gathered rows x [H, 2I] per expert, activation; rows of the intermediate
//   down     [rows, I] x [I, H] per expert; fp32 rows                              (grouped_gemm_*.cu)
//   combine  each token's rows, weighted, in the order of k                        (combine.cu)
//
// The host never learns the routing: grids are sized for the worst case, and blocks without a tile return.
#include <algorithm>

#include "cuda/combine.h"
#include "cuda/common.cuh"
#include "cuda/implementation.h"

namespace paddle_moe {
namespace cuda {
namespace {

struct Layout {
  Layout(const Problem& p, void* workspace, const void* pre_activations)
      : implementation(choose_implementation(p, pre_activations, 2 * p.intermediate_size)),
        inter_stride(round_up(p.intermediate_size, 8)),
        rows_stride(round_up(p.hidden_size, 8)) {
    const int64_t element = static_cast<int64_t>(dtype_size(p.dtype)), k = p.top_k;
    const int64_t bytes_per_token = k * (inter_stride * element + rows_stride * int64_t{sizeof(float)});
    tokens = chunk_tokens(p, bytes_per_token, kChunkBytes);
    const int64_t slots = tokens * k;
    Arena arena(workspace);
    // One tile size for all chunks. The last one may be smaller; the sums do not depend on it.
    sort = take_sort(p, slots, implementation.block_m(p, tokens), &arena);
    blocks_done = arena.take<uint32_t>(1);
    intermediate = arena.take<char>(slots * inter_stride * element);
    rows = arena.take<float>(slots * rows_stride);
    bytes = arena.used();
  }

  Implementation implementation;
  int64_t inter_stride, rows_stride;  // elements; whole 16-byte vectors
  int64_t tokens;
  Sort sort;
  uint32_t* blocks_done;
  char* intermediate;
  float* rows;
  size_t bytes;
};

// route: to be done first, for a chunk of all tokens and at most kSlotsOfOneBlock slots; or null.
void run_chunk(const Problem& p, const Layout& w, int64_t first_token, int64_t num_tokens, Stream stream,
               void* out, uint32_t* amax, void* pre_activations, const RouteProblem* route = nullptr) {
  const int64_t first_slot = first_token * p.top_k;
  const Sort sort = of_chunk(w.sort, p, first_token, num_tokens);
  if (route != nullptr) {
    route_and_sort_slots(*route, static_cast<float*>(const_cast<void*>(p.router_weights)), w.blocks_done,
                         sort, p.experts, stream);
  } else {
    sort_slots(sort, p.experts, stream);
  }

  GroupedGemm gate_up = gate_up_gemm(p, sort, first_token);
  gate_up.out = w.intermediate;
  gate_up.out_stride = w.inter_stride;
  gate_up.activation = p.activation;
  gate_up.amax = amax;
  if (pre_activations != nullptr) {
    gate_up.pre_activations = advance(pre_activations, first_slot * 2 * p.intermediate_size, p.dtype);
  }
  w.implementation.run(Stage::kGateUp, p, gate_up, stream);

  GroupedGemm down = gemm_of(sort, sort.experts);
  down.depth = p.intermediate_size;
  down.columns = p.hidden_size;
  down.a = w.intermediate;
  down.a_stride = w.inter_stride;
  down.row_slot = nullptr;  // the intermediate lies in the order of the experts
  down.out = w.rows;
  down.out_stride = w.rows_stride;
  w.implementation.run(Stage::kDown, p, down, stream);

  Combine sum;
  sum.num_tokens = num_tokens;
  sum.hidden_size = p.hidden_size;
  sum.top_k = static_cast<int32_t>(p.top_k);
  sum.rows = w.rows;
  sum.rows_stride = w.rows_stride;
  sum.position = sort.position;
  sum.local_expert = sort.local_expert;
  sum.router_weights = advance(p.router_weights, first_slot, p.router_weights_dtype);
  sum.router_weights_dtype = p.router_weights_dtype;
  sum.experts = p.experts[0].down_bias != nullptr ? sort.experts : nullptr;
  sum.bias_dtype = p.bias_dtype;
  sum.out = advance(out, first_token * p.hidden_size, p.dtype);
  combine(sum, p.dtype, stream);
}

void clear(float* amax, const Problem& p, Stream stream) {
  if (amax == nullptr) return;
  expect(cudaMemsetAsync(amax, 0, p.num_experts() * sizeof(float), stream), "cudaMemsetAsync");
}

}  // namespace

size_t workspace_size(const Problem& problem) { return Layout(problem, nullptr, nullptr).bytes; }

void mixture_of_experts(const Problem& problem, Stream stream, void* workspace, void* out, float* amax,
                        void* pre_activations) {
  const Layout layout(problem, workspace, pre_activations);
  clear(amax, problem, stream);
  for (int64_t t = 0; t < problem.num_tokens; t += layout.tokens) {
    run_chunk(problem, layout, t, std::min(layout.tokens, problem.num_tokens - t), stream, out,
              reinterpret_cast<uint32_t*>(amax), pre_activations);
  }
}

void fused_gate_moe(const GateProblem& gate_problem, const RouteProblem& route_problem,
                    const Problem& problem, Stream stream, void* workspace, void* out, float* amax) {
  const Layout layout(problem, workspace, nullptr);
  const int64_t tokens = problem.num_tokens;
  const bool together = tokens > 0 && tokens <= layout.tokens && tokens * problem.top_k <= kSlotsOfOneBlock;
  gate(gate_problem, stream, const_cast<float*>(route_problem.logits),
       together ? layout.blocks_done : nullptr);
  if (!together) {
    route(route_problem, stream, static_cast<int32_t*>(const_cast<void*>(problem.routing_table)),
          static_cast<float*>(const_cast<void*>(problem.router_weights)));
    mixture_of_experts(problem, stream, workspace, out, amax);
    return;
  }
  clear(amax, problem, stream);
  run_chunk(problem, layout, 0, tokens, stream, out, reinterpret_cast<uint32_t*>(amax), nullptr,
            &route_problem);
}

}  // namespace cuda
}  // namespace paddle_moe
