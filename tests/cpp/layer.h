// A small mixture of experts made of integers, and its result by the most naive loop.
//
// Every matrix has at most four entries +-1 per output column, so that each intermediate (at most 16), each
// product (64) and each sum (256) is exact in fp32, bf16 and fp16, in whatever order it is computed: results
// must be equal. Every array has an allocation of its own with exactly its size, so that AddressSanitizer
// sees a step outside.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/float_formats.h"
#include "moe.h"

using Random = std::mt19937;
using Buffer = std::unique_ptr<unsigned char[], void (*)(void*)>;

// Filled with NaN, whatever the dtype. ASan notices the first byte past the end.
inline Buffer make_buffer(size_t bytes) {
  void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  Buffer buffer(static_cast<unsigned char*>(data), std::free);
  std::fill_n(buffer.get(), bytes, 0xff);
  return buffer;
}

inline int pick(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

inline void put(std::vector<unsigned char>& bytes, paddle_moe::DType dtype, int64_t i, float value) {
  using namespace paddle_moe::cpu;
  uint16_t half;
  switch (dtype) {
    case paddle_moe::DType::kBFloat16:
      half = float_to_bf16(value);
      break;
    case paddle_moe::DType::kFloat16:
      half = float_to_f16(value);
      break;
    default:
      std::memcpy(&bytes[4 * i], &value, 4);
      return;
  }
  std::memcpy(&bytes[2 * i], &half, 2);
}

inline float get(const unsigned char* bytes, paddle_moe::DType dtype, int64_t i) {
  using namespace paddle_moe::cpu;
  uint16_t half;
  float value;
  switch (dtype) {
    case paddle_moe::DType::kBFloat16:
      std::memcpy(&half, bytes + 2 * i, 2);
      return bf16_to_float(half);
    case paddle_moe::DType::kFloat16:
      std::memcpy(&half, bytes + 2 * i, 2);
      return f16_to_float(half);
    default:
      std::memcpy(&value, bytes + 4 * i, 4);
      return value;
  }
}

using Numbers = std::vector<float>;

// [in, out] with at most four entries per column.
inline Numbers sparse_matrix(Random& random, int in, int out) {
  Numbers matrix(static_cast<size_t>(in) * out, 0.0f);
  for (int o = 0; o < out; ++o) {
    for (int n = 0; n < 4; ++n)
      matrix[static_cast<size_t>(pick(random, 0, in - 1)) * out + o] = pick(random, -1, 1);
  }
  return matrix;
}

enum class Layout { kList, kSeparate, kStacked };

struct Layer {
  int tokens, hidden, inter, num_experts, top_k;
  paddle_moe::DType dtype;
  Layout layout;
  bool permuted;
  int64_t first_expert = 0;

  Numbers x, weight;
  std::vector<int64_t> ids;
  std::vector<Numbers> gate, up, down;  // per expert, [in, out]
  std::vector<std::vector<unsigned char>> storage;
  paddle_moe::Arguments arguments;

  Layer(Random& random, int t, int h, int i, int e, int k, paddle_moe::DType type, Layout how,
        bool transposed)
      : tokens(t),
        hidden(h),
        inter(i),
        num_experts(e),
        top_k(k),
        dtype(type),
        layout(how),
        permuted(transposed) {
    for (int n = 0; n < t * h; ++n) x.push_back(pick(random, -1, 1));
    for (int n = 0; n < t * k; ++n) {
      ids.push_back(pick(random, -1, e));  // some on either side of the range
      weight.push_back(pick(random, -2, 2));
    }
    for (int n = 0; n < e; ++n) {
      gate.push_back(sparse_matrix(random, h, i));
      up.push_back(sparse_matrix(random, h, i));
      down.push_back(sparse_matrix(random, i, h));
    }
    fill_arguments();
  }

  // out [tokens, hidden] and amax [num_experts] of the relu network.
  void expected(Numbers* out, Numbers* amax) const {
    out->assign(static_cast<size_t>(tokens) * hidden, 0.0f);
    amax->assign(num_experts, 0.0f);
    for (int slot = 0; slot < tokens * top_k; ++slot) {
      if (ids[slot] < first_expert || ids[slot] > first_expert + (num_experts - 1)) continue;
      const int64_t e = ids[slot] - first_expert, t = slot / top_k;
      for (int64_t i = 0; i < inter; ++i) {
        float g = 0, u = 0;
        for (int64_t h = 0; h < hidden; ++h) {
          g += x[t * hidden + h] * gate[e][h * inter + i];
          u += x[t * hidden + h] * up[e][h * inter + i];
        }
        const float value = (g > 0 ? g : 0) * u;
        (*amax)[e] = std::max((*amax)[e], std::abs(value));
        if (value == 0) continue;
        for (int64_t h = 0; h < hidden; ++h) {
          (*out)[t * hidden + h] += weight[slot] * value * down[e][i * hidden + h];
        }
      }
    }
  }

  // The same layer with weights of a quantised dtype: +-64, or +-4 of int4, and scales +-1/64, or +-1/4, of
  // random groups, so that nothing is rounded.
  void quantise(Random& random, paddle_moe::DType type) {
    arguments.gate_up_scale = quantise(random, type, &arguments.gate_up_weights, hidden, inter,
                                       layout == Layout::kSeparate ? 1 : 2);
    arguments.down_scale = quantise(random, type, &arguments.down_weights, inter, hidden, 1);
  }

  // The same layer with prepacked weights, quantised ones too. Its sizes must be multiples of row_inputs().
  void prepack() {
    prepack(&arguments.gate_up_weights, &arguments.gate_up_scale, hidden, inter,
            layout == Layout::kSeparate ? 1 : 2);
    prepack(&arguments.down_weights, &arguments.down_scale, inter, hidden, 1);
    arguments.permuted_weights = false;
  }

  // Neighbours of the depth that prepacked weights hold together.
  static int row_inputs(paddle_moe::DType weights) {
    using paddle_moe::DType;
    return weights == DType::kInt4                                                                   ? 8
           : weights == DType::kInt8 || weights == DType::kFloat8E4M3 || weights == DType::kBFloat16 ? 2
                                                                                                     : 1;
  }

 private:
  void prepack(std::vector<paddle_moe::Tensor>* weights, std::vector<paddle_moe::Tensor>* scales, int64_t in,
               int64_t part_out, int64_t parts) {
    using paddle_moe::DType;
    const int64_t panels = (part_out + 15) / 16, columns = parts * part_out;
    const int64_t matrices = layout == Layout::kStacked ? num_experts : 1;
    for (paddle_moe::Tensor& tensor : *weights) {
      const bool int4 = tensor.dtype == DType::kInt32, pairs = tensor.dtype == DType::kBFloat16;
      const int64_t size = static_cast<int64_t>(paddle_moe::dtype_size(tensor.dtype));
      const int64_t inputs = row_inputs(int4 ? DType::kInt4 : tensor.dtype);
      const int64_t rows = in / inputs, width = inputs == 2 ? 32 : 16;
      std::vector<unsigned char> packed(static_cast<size_t>(matrices * parts * panels * rows * width * size));
      const auto* from = static_cast<const unsigned char*>(tensor.data);
      for (int64_t n = 0; n < matrices * in * columns; ++n) {
        const int64_t column = n % columns, i = n / columns % in, matrix = n / columns / in;
        const int64_t panel = (matrix * parts + column / part_out) * panels + column % part_out / 16;
        const int64_t c = column % part_out % 16;
        if (int4) {
          const int64_t half = ((matrix * columns + column) * ((in + 63) / 64) + i / 64) * 16 + i % 16;
          const int64_t word = ((panel * rows + i / 8) * 16 + c) * 2 + i % 2;
          const int number = from[2 * half + i % 64 / 32] >> i % 32 / 16 * 4 & 15;
          packed[static_cast<size_t>(2 * word + i % 8 / 4)] |=
              static_cast<unsigned char>(number << i % 4 / 2 * 4);
          continue;
        }
        const int64_t at = pairs ? panel * in * 16 + i / 2 * 32 + c * 2 + i % 2 : (panel * in + i) * 16 + c;
        const int64_t old = permuted ? (matrix * columns + column) * in + i : n;
        std::memcpy(&packed[static_cast<size_t>(at * size)], from + old * size, static_cast<size_t>(size));
      }
      storage.push_back(std::move(packed));
      tensor = {storage.back().data(), tensor.dtype, {matrices, parts * panels, rows, width}, {}};
    }
    // As of weights stored [in, out], and with the same first dimension.
    for (paddle_moe::Tensor& scale : *scales) {
      if (layout != Layout::kStacked) scale.shape.insert(scale.shape.begin(), 1);
      if (!permuted || scale.shape.size() < 3) continue;
      const int64_t outs = scale.shape[1], ins = scale.shape[2];
      Numbers turned(static_cast<size_t>(matrices * outs * ins));
      for (int64_t n = 0; n < matrices * outs * ins; ++n) {
        const int64_t matrix = n / outs / ins, o = n / ins % outs, i = n % ins;
        turned[static_cast<size_t>((matrix * ins + i) * outs + o)] =
            get(static_cast<const unsigned char*>(scale.data), DType::kFloat32, n);
      }
      scale = store(turned, DType::kFloat32, {matrices, ins, outs});
    }
  }

  std::vector<paddle_moe::Tensor> quantise(Random& random, paddle_moe::DType type,
                                           std::vector<paddle_moe::Tensor>* weights, int64_t in,
                                           int64_t part_out, int64_t parts) {
    const int granularity = pick(random, 0, 3);
    const int64_t out = part_out * parts, blocks = (part_out + 127) / 128;
    const int64_t in_groups = granularity < 2 ? 1 : (in + 127) / 128;
    const int64_t out_groups = granularity == 0 ? 1 : granularity == 3 ? parts * blocks : out;
    const bool int4 = type == paddle_moe::DType::kInt4;
    const float unit = int4 ? 1.0f / 4 : 1.0f / 64;
    const int64_t words = (in + 63) / 64 * 8;  // of an int4 column
    std::vector<paddle_moe::Tensor> scales;
    for (paddle_moe::Tensor& tensor : *weights) {
      const int64_t matrices = layout == Layout::kStacked ? num_experts : 1;
      Numbers scale(static_cast<size_t>(matrices * in_groups * out_groups));
      for (float& value : scale) value = pick(random, 0, 1) ? unit : -unit;
      std::vector<unsigned char> bytes(static_cast<size_t>(matrices * out * (int4 ? 4 * words : in)));
      for (size_t n = 0; n < static_cast<size_t>(matrices * in * out); ++n) {
        const int64_t first = static_cast<int64_t>(n) / (permuted ? in : out) % (permuted ? out : in);
        const int64_t second = static_cast<int64_t>(n) % (permuted ? in : out);
        const int64_t column = permuted ? first : second, block = column % part_out / 128;
        const int64_t i = granularity < 2 ? 0 : (permuted ? second : first) / 128;
        const int64_t o = granularity == 0   ? 0
                          : granularity == 3 ? column / part_out * blocks + block
                                             : column;
        const int64_t at = permuted ? o * in_groups + i : i * out_groups + o;
        const float value = get(static_cast<const unsigned char*>(tensor.data), dtype, n) /
                            scale[static_cast<int64_t>(n) / (in * out) * in_groups * out_groups + at];
        if (int4) {
          // Little-endian: half i % 16 of a run is two bytes, each of two numbers.
          const size_t byte =
              static_cast<size_t>((static_cast<int64_t>(n) / in * words + second / 64 * 8) * 4 +
                                  second % 16 * 2 + second % 64 / 32);
          bytes[byte] |= static_cast<unsigned char>((static_cast<int>(value) & 15) << second % 32 / 16 * 4);
          continue;
        }
        // 64 is 1.000 x 2^6 with an exponent bias of 7.
        const int fp8 = value == 0 ? 0 : 13 << 3 | (value < 0 ? 0x80 : 0);
        bytes[n] =
            static_cast<unsigned char>(type == paddle_moe::DType::kInt8 ? static_cast<int>(value) : fp8);
      }
      storage.push_back(std::move(bytes));
      tensor = {storage.back().data(), int4 ? paddle_moe::DType::kInt32 : type, tensor.shape, {}};
      if (int4) tensor.shape.back() = words;
      std::vector<int64_t> groups = shape(in_groups, out_groups);
      if (granularity == 1 && pick(random, 0, 1)) groups = {out};
      if (layout == Layout::kStacked) groups.insert(groups.begin(), num_experts);
      scales.push_back(store(scale, paddle_moe::DType::kFloat32, groups));
    }
    return scales;
  }

  paddle_moe::Tensor store(const Numbers& numbers, paddle_moe::DType type, std::vector<int64_t> shape) {
    storage.emplace_back(numbers.size() * paddle_moe::dtype_size(type));
    for (size_t i = 0; i < numbers.size(); ++i) put(storage.back(), type, i, numbers[i]);
    return {storage.back().data(), type, std::move(shape), {}};
  }

  // Matrices of one shape, side by side along their columns, stored as the layout wants them.
  Numbers joined(const std::vector<const Numbers*>& parts, int in, int out) const {
    const int columns = out * static_cast<int>(parts.size());
    Numbers all(static_cast<size_t>(in) * columns);
    for (int i = 0; i < in; ++i) {
      for (int c = 0; c < columns; ++c) {
        const float value = (*parts[c / out])[static_cast<size_t>(i) * out + c % out];
        all[permuted ? static_cast<size_t>(c) * in + i : static_cast<size_t>(i) * columns + c] = value;
      }
    }
    return all;
  }

  std::vector<int64_t> shape(int64_t in, int64_t out) const {
    return permuted ? std::vector<int64_t>{out, in} : std::vector<int64_t>{in, out};
  }

  std::vector<paddle_moe::Tensor> store_all(const std::vector<Numbers>& matrices, int64_t in, int64_t out) {
    std::vector<paddle_moe::Tensor> tensors;
    if (layout != Layout::kStacked) {
      for (const Numbers& matrix : matrices) tensors.push_back(store(matrix, dtype, shape(in, out)));
      return tensors;
    }
    Numbers all;
    for (const Numbers& matrix : matrices) all.insert(all.end(), matrix.begin(), matrix.end());
    std::vector<int64_t> stacked = shape(in, out);
    stacked.insert(stacked.begin(), num_experts);
    return {store(all, dtype, stacked)};
  }

  void fill_arguments() {
    using paddle_moe::DType;
    arguments.hidden_states = store(x, dtype, {tokens, hidden});
    arguments.router_weights = store(weight, DType::kFloat32, {tokens, top_k});
    arguments.routing_table = {ids.data(), DType::kInt64, {tokens, top_k}, {}};
    std::vector<Numbers> gate_up, downs;
    if (layout == Layout::kSeparate) {
      for (const auto* matrices : {&gate, &up}) {
        for (const Numbers& matrix : *matrices) gate_up.push_back(joined({&matrix}, hidden, inter));
      }
    } else {
      for (int e = 0; e < num_experts; ++e) gate_up.push_back(joined({&gate[e], &up[e]}, hidden, inter));
    }
    for (const Numbers& matrix : down) downs.push_back(joined({&matrix}, inter, hidden));
    arguments.gate_up_weights = store_all(gate_up, hidden, layout == Layout::kSeparate ? inter : 2 * inter);
    arguments.down_weights = store_all(downs, inter, hidden);
    arguments.permuted_weights = permuted;
    arguments.activation = "relu";
  }
};

struct Result {
  Buffer out;
  std::vector<float> amax;
};

inline Result run(const Layer& layer, int num_threads) {
  const paddle_moe::Problem problem = paddle_moe::resolve(layer.arguments);
  const size_t elements = static_cast<size_t>(layer.tokens) * layer.hidden;
  Result result{make_buffer(elements * paddle_moe::dtype_size(layer.dtype)),
                std::vector<float>(layer.num_experts, -1)};
  const Buffer workspace = make_buffer(paddle_moe::cpu::workspace_size(problem, num_threads));
  paddle_moe::cpu::mixture_of_experts(problem, num_threads, workspace.get(), result.out.get(),
                                      result.amax.data());
  return result;
}

// How many values of out and amax differ from the naive loop's.
inline int count_differences(const Layer& layer, const Result& result) {
  Numbers out, amax;
  layer.expected(&out, &amax);
  int count = result.amax != amax;
  for (size_t i = 0; i < out.size(); ++i) count += get(result.out.get(), layer.dtype, i) != out[i];
  return count;
}
