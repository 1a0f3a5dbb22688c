// The backward on small integers against that of the CPU back end, where every gradient must be equal, with
// pre-activations that were kept and computed again, in chunks, under every schedule; on devices 80 and 90.
#include <cstring>
#include <memory>

#include "emulated.h"

using namespace paddle_moe;

namespace {

// Every gradient in an array of its own with exactly its size, as NaN at first.
struct Gradients {
  explicit Gradients(const Arguments& like) : arguments(like) {
    give(&arguments.hidden_states);
    give(&arguments.router_weights);
    for (Tensor& tensor : arguments.gate_up_weights) give(&tensor);
    for (Tensor& tensor : arguments.down_weights) give(&tensor);
  }

  int differences(const Gradients& other) const {
    int count = 0;
    for (size_t i = 0; i < arrays.size(); ++i) {
      for (int64_t j = 0; j < sizes[i]; ++j) {
        count += get(arrays[i]->get(), dtypes[i], j) != get(other.arrays[i]->get(), dtypes[i], j);
      }
    }
    return count;
  }

  Arguments arguments;
  std::vector<std::unique_ptr<Fenced>> arrays;
  std::vector<DType> dtypes;
  std::vector<int64_t> sizes;

 private:
  void give(Tensor* tensor) {
    int64_t size = 1;
    for (const int64_t n : tensor->shape) size *= n;
    arrays.push_back(std::make_unique<Fenced>(size * dtype_size(tensor->dtype)));
    dtypes.push_back(tensor->dtype);
    sizes.push_back(size);
    tensor->data = arrays.back()->get();
  }
};

void check(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
           ::Layout layout, bool permuted) {
  Layer layer(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted);
  // So that gates and ups do not lie at the same distances.
  if (layout == ::Layout::kSeparate && experts > 1) {
    std::swap(layer.arguments.gate_up_weights[0].data, layer.arguments.gate_up_weights[1].data);
  }
  const int64_t elements = int64_t{tokens} * hidden, slots = int64_t{tokens} * top_k;
  std::vector<unsigned char> grad_bytes(elements * dtype_size(dtype));
  for (int64_t i = 0; i < elements; ++i) put(grad_bytes, dtype, i, pick(random, -1, 1));
  const Tensor grad_out{grad_bytes.data(), dtype, {tokens, hidden}, {}};

  Gradients expected(layer.arguments);
  const BackwardProblem on_cpu = resolve_backward(layer.arguments, grad_out, {}, expected.arguments);
  const Buffer cpu_workspace = make_buffer(cpu::backward_workspace_size(on_cpu, 1));
  cpu::mixture_of_experts_backward(on_cpu, 1, cpu_workspace.get());

  layer.arguments.chunk_size = pick(random, 0, tokens);
  const Problem problem = resolve(layer.arguments);
  const Fenced saved(slots * 2 * inter * dtype_size(dtype)), out(elements * dtype_size(dtype));
  const Fenced workspace(cuda::workspace_size(problem));
  cuda::mixture_of_experts(problem, nullptr, workspace.get(), out.get(), nullptr, saved.get());
  for (bool recompute : {false, true}) {
    Gradients gradients(layer.arguments);
    const Tensor pre_activations{saved.get(), dtype, {slots, 2 * inter}, {}};
    const BackwardProblem backward = resolve_backward(
        layer.arguments, grad_out, recompute ? Tensor{} : pre_activations, gradients.arguments);
    const Fenced scratch(cuda::backward_workspace_size(backward));
    cuda::mixture_of_experts_backward(backward, nullptr, scratch.get());
    const int wrong = gradients.differences(expected);
    CHECK(wrong == 0,
          "%d gradients differ for T=%d H=%d I=%d E=%d K=%d %s layout %d permuted %d recompute %d chunk %d",
          wrong, tokens, hidden, inter, experts, top_k, dtype_name(dtype), static_cast<int>(layout), permuted,
          recompute, static_cast<int>(layer.arguments.chunk_size));
  }
}

void small_shapes() {
  Random random(1);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (bool permuted : {false, true}) {
      for (int hidden : {1, 40, 129}) {
        for (int inter : {8, 65}) {
          check(random, pick(random, 0, 13), hidden, inter, pick(random, 1, 4), pick(random, 1, 2), dtype,
                static_cast<::Layout>(pick(random, 0, 2)), permuted);
        }
      }
    }
  }
}

// More rows than the ring has stages of, more columns than a tile, aligned and not.
void past_block_sizes() {
  Random random(2);
  check(random, 150, 136, 72, 1, 1, DType::kBFloat16, ::Layout::kStacked, false);
  check(random, 150, 37, 41, 1, 1, DType::kBFloat16, ::Layout::kSeparate, true);
  check(random, 9, 8, 280, 2, 2, DType::kFloat16, ::Layout::kList, false);
  check(random, 300, 8, 8, 1, 1, DType::kFloat32, ::Layout::kList, false);
}

// Tiles of 64 and of 128 rows; more rows and columns than a tile, and weights in either order.
void on_hopper(Random& random, bool permuted) {
  const DType dtype = permuted ? DType::kBFloat16 : DType::kFloat16;
  check(random, pick(random, 0, 5), 200, 72, 3, 2, dtype, static_cast<::Layout>(pick(random, 0, 2)),
        permuted);
  check(random, 100, 136, 136, 2, 2, dtype, ::Layout::kSeparate, permuted);
}

void chunks_bound_the_workspace() {
  Random random(4);
  constexpr int kTokens = 64, kHidden = 64, kTopK = 2, kChunk = 8;
  Layer layer(random, kTokens, kHidden, 32, 2, kTopK, DType::kFloat32, ::Layout::kList, false);
  auto size_with = [&](int64_t chunk_size) {
    layer.arguments.chunk_size = chunk_size;
    const Gradients gradients(layer.arguments);
    return cuda::backward_workspace_size(
        resolve_backward(layer.arguments, layer.arguments.hidden_states, {}, gradients.arguments));
  };
  const size_t saved = size_with(0) - size_with(kChunk);
  CHECK(saved == (kTokens - kChunk) * kTopK * kHidden * sizeof(float), "a chunk saves %zu bytes", saved);
}

// Pre-activations are not computed again where no wanted gradient reads them.
void down_bias_alone() {
  Random random(5);
  constexpr int kTokens = 20, kHidden = 16, kInter = 24;
  Layer layer(random, kTokens, kHidden, kInter, 1, 1, DType::kFloat32, ::Layout::kList, false);
  const Numbers bias(kHidden, 1.0f);
  layer.arguments.down_bias = {{bias.data(), DType::kFloat32, {kHidden}, {}}};
  Arguments gradients = layer.arguments;
  gradients.hidden_states.data = gradients.router_weights.data = nullptr;
  gradients.gate_up_weights[0].data = gradients.down_weights[0].data = nullptr;
  const Fenced on_cpu(kHidden * sizeof(float)), on_gpu(kHidden * sizeof(float)), saved(1);
  auto problem = [&](const Fenced& result, const Tensor& pre_activations) {
    gradients.down_bias[0].data = result.get();
    return resolve_backward(layer.arguments, layer.arguments.hidden_states, pre_activations, gradients);
  };
  const BackwardProblem expected = problem(on_cpu, {});
  const Buffer cpu_workspace = make_buffer(cpu::backward_workspace_size(expected, 1));
  cpu::mixture_of_experts_backward(expected, 1, cpu_workspace.get());
  const size_t bytes = cuda::backward_workspace_size(problem(on_gpu, {}));
  const Tensor pre_activations{saved.get(), DType::kFloat32, {kTokens, 2 * kInter}, {}};
  CHECK(bytes == cuda::backward_workspace_size(problem(on_gpu, pre_activations)), "%zu bytes", bytes);
  const Fenced workspace(bytes);
  cuda::mixture_of_experts_backward(problem(on_gpu, {}), nullptr, workspace.get());
  CHECK(std::memcmp(on_gpu.get(), on_cpu.get(), kHidden * sizeof(float)) == 0, "the gradients differ");
}

}  // namespace

int main() {
  small_shapes();
  down_bias_alone();
  chunks_bound_the_workspace();
  on_every_schedule(past_block_sizes);
  emulator::compute_capability = 90;
  Random random(3);
  on_every_schedule([&] { on_hopper(random, pick(random, 0, 1)); });
  return finish();
}
