// The backward on small integers against the most naive loop, in every dtype and weight layout, on every
// instruction set of this processor: with pre-activations kept and computed again, in chunks, on threads.
#include <algorithm>
#include <cstring>
#include <limits>

#include "check.h"
#include "layer.h"

using namespace paddle_moe;

namespace {

float rounded(float value, DType dtype) {
  std::vector<unsigned char> bytes(4);
  put(bytes, dtype, 0, value);
  return get(bytes.data(), dtype, 0);
}

// A layer with biases where its layout is a list, a gradient of its result, and NaN where the results go;
// each in an array of its own with exactly its size. Weights have no gradients where they are quantised or
// prepacked.
struct Case {
  Case(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
       ::Layout layout, bool permuted, DType quantised = DType::kUnknown, bool prepacked = false)
      : layer(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted) {
    if (is_quantised(quantised)) layer.quantise(random, quantised);
    if (prepacked) layer.prepack();
    for (int i = 0; i < tokens * hidden; ++i) grad_out.push_back(pick(random, -1, 1));
    grad_bytes.resize(grad_out.size() * dtype_size(dtype));
    for (size_t i = 0; i < grad_out.size(); ++i) put(grad_bytes, dtype, i, grad_out[i]);
    for (int e = 0; e < experts && layout == ::Layout::kList; ++e) {
      gate_up_bias.push_back(integers(random, 2 * inter));
      down_bias.push_back(integers(random, hidden));
      layer.arguments.gate_up_bias.push_back({gate_up_bias[e].data(), DType::kFloat32, {2 * inter}, {}});
      layer.arguments.down_bias.push_back({down_bias[e].data(), DType::kFloat32, {hidden}, {}});
    }
    gradients = layer.arguments;
    give(&gradients.hidden_states);
    give(&gradients.router_weights);
    for (auto* tensors : {&gradients.gate_up_bias, &gradients.down_bias}) {
      for (Tensor& tensor : *tensors) give(&tensor);
    }
    for (auto* tensors : {&gradients.gate_up_weights, &gradients.down_weights, &gradients.gate_up_scale,
                          &gradients.down_scale}) {
      for (Tensor& tensor : *tensors) {
        tensor.data = nullptr;
        if (!is_quantised(quantised) && !prepacked) give(&tensor);
      }
    }
  }

  static Numbers integers(Random& random, int count) {
    Numbers numbers;
    for (int i = 0; i < count; ++i) numbers.push_back(pick(random, -1, 1));
    return numbers;
  }

  void give(Tensor* tensor) {
    size_t size = dtype_size(tensor->dtype);
    for (const int64_t n : tensor->shape) size *= n;
    results.emplace_back(size, 0xff);
    tensor->data = results.back().data();
  }

  // Computes the gradients and returns how many differ from the loop's.
  int differences(bool recompute, int64_t chunk_size, int num_threads) {
    return compare(compute(recompute, chunk_size, num_threads));
  }

  BackwardProblem compute(bool recompute, int64_t chunk_size, int num_threads) {
    for (auto& bytes : results) std::fill(bytes.begin(), bytes.end(), 0xff);
    layer.arguments.chunk_size = chunk_size;
    const int64_t tokens = layer.tokens, hidden = layer.hidden, inter = layer.inter;
    Tensor pre_activations;
    std::vector<unsigned char> kept;
    if (!recompute) {
      const Problem problem = resolve(layer.arguments);
      const int64_t rows = cpu::count_rows(problem);
      kept.assign(rows * 2 * inter * dtype_size(layer.dtype) + 1, 0xff);  // not null without a row
      std::vector<unsigned char> out(tokens * hidden * dtype_size(layer.dtype));
      const Buffer workspace = make_buffer(cpu::workspace_size(problem, num_threads));
      cpu::mixture_of_experts(problem, num_threads, workspace.get(), out.data(), nullptr, kept.data());
      pre_activations = {kept.data(), layer.dtype, {rows, 2 * inter}, {}};
    }
    const BackwardProblem problem = resolve_backward(
        layer.arguments, {grad_bytes.data(), layer.dtype, {tokens, hidden}, {}}, pre_activations, gradients);
    const Buffer workspace = make_buffer(cpu::backward_workspace_size(problem, num_threads));
    cpu::mixture_of_experts_backward(problem, num_threads, workspace.get());
    return problem;
  }

  // All tensors that gradients go to.
  std::vector<Tensor*> wanted() {
    std::vector<Tensor*> all{&gradients.hidden_states, &gradients.router_weights};
    for (auto* tensors : {&gradients.gate_up_weights, &gradients.down_weights, &gradients.gate_up_bias,
                          &gradients.down_bias}) {
      for (Tensor& tensor : *tensors) all.push_back(&tensor);
    }
    return all;
  }

  int compare(const BackwardProblem& actual) const {
    const int64_t hidden = layer.hidden, inter = layer.inter;
    const DType dtype = layer.dtype;
    Numbers x_grad(layer.x.size(), 0.0f);
    std::vector<Numbers> gate_grad(layer.num_experts, Numbers(hidden * inter)),
        up_grad = gate_grad, down_grad = gate_grad, gate_up_bias_grad(layer.num_experts, Numbers(2 * inter)),
        down_bias_grad(layer.num_experts, Numbers(hidden));
    int count = 0;
    for (size_t slot = 0; slot < layer.ids.size(); ++slot) {
      const int64_t e = layer.ids[slot], t = static_cast<int64_t>(slot) / layer.top_k;
      const float weight = layer.weight[slot];
      const float *x = &layer.x[t * hidden], *dy = &grad_out[t * hidden];
      float weight_grad = 0;
      for (int64_t i = 0; e >= 0 && e < layer.num_experts && i < inter; ++i) {
        float gate = down_bias.empty() ? 0 : gate_up_bias[e][i];
        float up = down_bias.empty() ? 0 : gate_up_bias[e][inter + i];
        float u = 0;
        for (int64_t h = 0; h < hidden; ++h) {
          gate += x[h] * layer.gate[e][h * inter + i];
          up += x[h] * layer.up[e][h * inter + i];
          u += dy[h] * layer.down[e][i * hidden + h];
        }
        const float activated = gate > 0 ? gate : 0;
        const float by_gate = rounded(gate > 0 ? weight * u * up : 0, dtype);
        const float by_up = rounded(weight * u * activated, dtype), value = weight * activated * up;
        weight_grad += u * activated * up;
        gate_up_bias_grad[e][i] += by_gate;
        gate_up_bias_grad[e][inter + i] += by_up;
        for (int64_t h = 0; h < hidden; ++h) {
          x_grad[t * hidden + h] +=
              by_gate * layer.gate[e][h * inter + i] + by_up * layer.up[e][h * inter + i];
          gate_grad[e][h * inter + i] += x[h] * by_gate;
          up_grad[e][h * inter + i] += x[h] * by_up;
          down_grad[e][i * hidden + h] += value * dy[h];
        }
      }
      for (int64_t h = 0; !down_bias.empty() && e >= 0 && e < layer.num_experts && h < hidden; ++h) {
        weight_grad += dy[h] * down_bias[e][h];
        down_bias_grad[e][h] += weight * dy[h];
      }
      count += get_float(actual.router_weights, slot) != weight_grad;
    }
    for (size_t i = 0; i < x_grad.size(); ++i) {
      count += get(static_cast<unsigned char*>(actual.hidden_states), dtype, i) != rounded(x_grad[i], dtype);
    }
    for (int e = 0; e < layer.num_experts; ++e) {
      const Expert& expert = actual.experts[e];
      count += matrix_differences(expert.gate, gate_grad[e], inter) +
               matrix_differences(expert.up, up_grad[e], inter) +
               matrix_differences(expert.down, down_grad[e], hidden);
      for (int64_t i = 0; !down_bias.empty() && i < inter; ++i) {
        count += get_float(expert.gate_bias, i) != gate_up_bias_grad[e][i];
        count += get_float(expert.up_bias, i) != gate_up_bias_grad[e][inter + i];
      }
      for (int64_t h = 0; !down_bias.empty() && h < hidden; ++h)
        count += get_float(expert.down_bias, h) != down_bias_grad[e][h];
    }
    return count;
  }

  static float get_float(const void* data, int64_t i) { return static_cast<const float*>(data)[i]; }

  int matrix_differences(const Matrix& actual, const Numbers& expected, int64_t columns) const {
    int count = 0;
    for (int64_t i = 0; actual.data != nullptr && i < static_cast<int64_t>(expected.size()); ++i) {
      const int64_t at = i / columns * actual.in_stride + i % columns * actual.out_stride;
      const float wanted = rounded(expected[i], layer.dtype);
      count += get(static_cast<const unsigned char*>(actual.data), layer.dtype, at) != wanted;
    }
    return count;
  }

  Layer layer;
  Numbers grad_out;
  std::vector<unsigned char> grad_bytes;
  std::vector<Numbers> gate_up_bias, down_bias;
  Arguments gradients;
  std::vector<std::vector<unsigned char>> results;
};

void check(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
           ::Layout layout, bool permuted, int num_threads, DType quantised = DType::kUnknown,
           bool prepacked = false) {
  Case c(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted, quantised, prepacked);
  for (const bool recompute : {false, true}) {
    for (const int64_t chunk_size : {0, 7}) {
      const int wrong = c.differences(recompute, chunk_size, num_threads);
      CHECK(wrong == 0,
            "%d gradients differ for T=%d H=%d I=%d E=%d K=%d %s layout %d permuted %d threads %d weights %s "
            "prepacked %d recompute %d chunk %d",
            wrong, tokens, hidden, inter, experts, top_k, dtype_name(dtype), static_cast<int>(layout),
            permuted, num_threads, dtype_name(quantised), prepacked, recompute, static_cast<int>(chunk_size));
    }
  }
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

void small_shapes() {
  Random random(1);
  for (const DType dtype : kDTypes) {
    for (const bool permuted : {false, true}) {
      for (const int hidden : {1, 7, 16, 65}) {
        for (const int inter : {1, 3, 64, 65}) {
          check(random, pick(random, 0, 13), hidden, inter, pick(random, 1, 4), pick(random, 1, 2), dtype,
                static_cast<::Layout>(pick(random, 0, 2)), permuted, pick(random, 1, 2));
        }
      }
    }
  }
}

// More rows of an expert than a block of the forward's GEMMs and than a block of depth; more rows and columns
// of a gradient than a block.
void past_block_sizes() {
  Random random(2);
  for (const DType dtype : kDTypes) {
    check(random, 600, 9, 8, 1, 1, dtype, ::Layout::kList, false, 2);
    check(random, 9, 450, 20, 2, 1, dtype, ::Layout::kSeparate, false, 1);
    check(random, 9, 20, 450, 2, 1, dtype, ::Layout::kStacked, true, 3);
  }
}

// Also past a block of the depth (256), of the columns (128) and a group of scales.
void quantised() {
  Random random(3);
  for (const DType type : {DType::kInt8, DType::kFloat8E4M3, DType::kInt4}) {
    for (const bool permuted : {false, true}) {
      if (type == DType::kInt4 && !permuted) continue;
      for (const int hidden : {1, 33, 128, 300}) {
        for (const int inter : {1, 65, 130, 257}) {
          check(random, pick(random, 1, 20), hidden, inter, 2, 1, kDTypes[pick(random, 0, 2)],
                static_cast<::Layout>(pick(random, 0, 2)), permuted, pick(random, 1, 2), type);
        }
      }
    }
  }
}

void prepacked() {
  Random random(4);
  for (const DType dtype : kDTypes) {
    const int even = dtype == DType::kBFloat16 ? 2 : 1;
    for (const int hidden : {1, 17, 64, 300}) {
      for (const int inter : {1, 33, 130, 257}) {
        check(random, pick(random, 1, 20), even * hidden, even * inter, 2, 1, dtype,
              static_cast<::Layout>(pick(random, 0, 2)), false, pick(random, 1, 2), DType::kUnknown, true);
      }
    }
  }
  for (const DType type : {DType::kInt8, DType::kFloat8E4M3, DType::kInt4}) {
    for (const int hidden : {8, 136, 304}) {
      for (const int inter : {16, 64, 264}) {
        check(random, pick(random, 1, 20), hidden, inter, 2, 1, kDTypes[pick(random, 0, 2)],
              static_cast<::Layout>(pick(random, 0, 2)), type == DType::kInt4 || pick(random, 0, 1) == 1,
              pick(random, 1, 2), type, true);
      }
    }
  }
}

// A gradient has the same bits whether it is wanted alone, when stages are left out, or with all others. Two
// copy tasks, of which the second is the shorter one, leave a thread time to run ahead.
void wanted_alone() {
  Random random(5);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Case c(random, 40, 512, 96, 1, 1, dtype, ::Layout::kList, false);
    std::fill(c.layer.ids.begin(), c.layer.ids.end(), 0);
    CHECK(c.differences(true, 0, 1) == 0, "%s", dtype_name(dtype));
    const auto expected = c.results;
    const Arguments all = c.gradients;
    for (size_t kept = 0; kept < expected.size(); ++kept) {
      c.gradients = all;
      for (Tensor* tensor : c.wanted()) {
        if (tensor->data != c.results[kept].data()) tensor->data = nullptr;
      }
      for (const bool recompute : {false, true, true}) {
        c.compute(recompute, 0, 3);
        CHECK(c.results[kept] == expected[kept], "%s gradient %d alone, recompute %d", dtype_name(dtype),
              static_cast<int>(kept), recompute);
      }
    }
  }
}

// An infinite router weight makes all gradients of a layer of ones infinite; also for an odd size, where a
// pair of bf16 has a column that is not there.
void infinite_router_weight() {
  Random random(7);
  for (const DType dtype : kDTypes) {
    for (const int inter : {1, 2, 17, 65}) {
      Case c(random, 1, 3, inter, 1, 1, dtype, ::Layout::kStacked, false);
      const auto fill = [dtype](const Tensor& tensor, float value) {
        int64_t count = 1;
        for (const int64_t n : tensor.shape) count *= n;
        auto* bytes = static_cast<unsigned char*>(const_cast<void*>(tensor.data));
        std::vector<unsigned char> values(count * dtype_size(dtype));
        for (int64_t i = 0; i < count; ++i) put(values, dtype, i, value);
        std::copy(values.begin(), values.end(), bytes);
      };
      fill(c.layer.arguments.hidden_states, 1);
      fill(c.layer.arguments.gate_up_weights[0], 1);
      fill(c.layer.arguments.down_weights[0], 1);
      std::fill(c.grad_bytes.begin(), c.grad_bytes.end(), 0);
      for (int i = 0; i < 3; ++i) put(c.grad_bytes, dtype, i, 1);
      const float infinity = std::numeric_limits<float>::infinity();
      std::memcpy(const_cast<void*>(c.layer.arguments.router_weights.data), &infinity, sizeof infinity);
      c.layer.ids[0] = 0;
      const BackwardProblem problem = c.compute(true, 0, 1);
      for (int h = 0; h < 3; ++h) {
        const float value = get(static_cast<unsigned char*>(problem.hidden_states), dtype, h);
        CHECK(value == infinity, "%s I=%d: %f", dtype_name(dtype), inter, value);
      }
    }
  }
}

#if defined(__x86_64__)
// Bits do not depend on what the caller's thread makes of subnormal numbers, which here all gradients are.
void subnormal_numbers() {
  Random random(6);
  const unsigned as_they_are = __builtin_ia32_stmxcsr(), as_zero = as_they_are | 0x8040;
  for (const bool permuted : {false, true}) {
    Case c(random, 33, 70, 50, 2, 2, DType::kFloat32, ::Layout::kList, permuted);
    for (size_t i = 0; i < c.grad_out.size(); ++i)
      put(c.grad_bytes, DType::kFloat32, i, c.grad_out[i] * 0x1p-140f);
    for (const int num_threads : {1, 3}) {
      c.compute(true, 0, num_threads);
      const auto expected = c.results;
      __builtin_ia32_ldmxcsr(as_zero);
      c.compute(true, 0, num_threads);
      CHECK(__builtin_ia32_stmxcsr() >> 6 == as_zero >> 6, "the caller's mode became another");
      __builtin_ia32_ldmxcsr(as_they_are);
      for (size_t i = 0; i < expected.size(); ++i)
        CHECK(c.results[i] == expected[i], "gradient %d, permuted %d", static_cast<int>(i), permuted);
      CHECK(std::count(expected[0].begin(), expected[0].end(), 0) < static_cast<int64_t>(expected[0].size()),
            "all zero");
    }
  }
}
#endif

}  // namespace

int main() {
  on_every_isa([] {
    wanted_alone();
    infinite_router_weight();
#if defined(__x86_64__)
    subnormal_numbers();
#endif
    small_shapes();
    past_block_sizes();
    quantised();
    prepacked();
  });
  return finish();
}
