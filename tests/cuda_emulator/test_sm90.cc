// The Hopper path: in which order tiles are taken, which weights it accepts, and layers and gradients of
// integers, which must be exact, through barriers, tensor copies and wgmma.
#include <cmath>
#include <limits>
#include <memory>
#include <set>
#include <tuple>

#include "cuda/backward.h"
#include "cuda/grouped_gemm.h"
#include "cuda/tile_schedule.h"
#include "emulated.h"

using namespace paddle_moe;

namespace {

void check_schedule(int row_tiles, int column_tiles) {
  const cuda::TileSchedule tiles{row_tiles, column_tiles};
  std::set<std::pair<int, int>> seen;
  for (int i = 0; i < tiles.size(); ++i) {
    const cuda::TilePosition p = tiles[i];
    CHECK(p.row_tile >= 0 && p.row_tile < row_tiles && p.column_tile >= 0 && p.column_tile < column_tiles,
          "tile %d of %d x %d is (%d, %d)", i, row_tiles, column_tiles, p.row_tile, p.column_tile);
    seen.insert({p.row_tile, p.column_tile});
    CHECK(p.row_tile / 8 == i / (8 * column_tiles), "tile %d of %d x %d is not in its group", i, row_tiles,
          column_tiles);
  }
  CHECK(static_cast<int>(seen.size()) == row_tiles * column_tiles, "%d x %d has only %zu tiles", row_tiles,
        column_tiles, seen.size());
}

void check_layer(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
                 ::Layout layout, bool permuted) {
  const Layer layer(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted);
  const Problem problem = resolve(layer.arguments);
  CHECK(cuda::accepts_sm90(problem), "H=%d I=%d is refused", hidden, inter);
  const int wrong = count_differences(layer, run_emulated(problem));
  CHECK(wrong == 0, "%d values differ for T=%d H=%d I=%d E=%d K=%d %s layout %d permuted %d", wrong, tokens,
        hidden, inter, experts, top_k, dtype_name(dtype), static_cast<int>(layout), permuted);
}

// Tiles of 128 rows of which the second warpgroup has all, one, or nothing: it has to go through the ring
// with the first one, and nobody may use rows that are not there, which are NaN or those of a tile before.
void check_short_tiles(Random& random, DType dtype, bool permuted) {
  constexpr int kRows[] = {192, 1, 7, 65};
  Layer layer(random, 265, 328, 136, 4, 1, dtype, ::Layout::kStacked, permuted);
  int64_t* id = layer.ids.data();
  for (int e = 0; e < 4; ++e) id = std::fill_n(id, kRows[e], e);
  std::shuffle(layer.ids.begin(), layer.ids.end(), random);
  const Problem problem = resolve(layer.arguments);
  CHECK(cuda::block_m_sm90(problem, layer.tokens) == 128, "other tiles");
  const int wrong = count_differences(layer, run_emulated(problem));
  CHECK(wrong == 0, "%d values differ, %s permuted %d", wrong, dtype_name(dtype), permuted);
}

// Bias, activation and amax against the CPU back end, which rounds at the same places.
void check_epilogue(Random& random, const char* activation, ::Layout layout, DType bias_dtype) {
  constexpr int kHidden = 72, kInter = 136, kExperts = 2;
  Layer layer(random, 70, kHidden, kInter, kExperts, 2, DType::kBFloat16, layout, false);
  layer.arguments.activation = activation;
  std::vector<std::vector<unsigned char>> storage;
  const int tensors = layout == ::Layout::kSeparate ? 2 * kExperts : kExperts;
  for (int n = 0; n < tensors; ++n) {
    const int columns = 2 * kInter * kExperts / tensors;
    storage.emplace_back(columns * dtype_size(bias_dtype));
    for (int i = 0; i < columns; ++i) put(storage.back(), bias_dtype, i, 0.25f * pick(random, -9, 9));
    layer.arguments.gate_up_bias.push_back({storage.back().data(), bias_dtype, {columns}, {}});
  }
  const Result got = run_emulated(resolve(layer.arguments)), expected = run(layer, 1);
  double error = 0, norm = 0;
  for (int i = 0; i < layer.tokens * kHidden; ++i) {
    const double value = get(expected.out.get(), layer.dtype, i);
    const double difference = get(got.out.get(), layer.dtype, i) - value;
    error += difference * difference, norm += value * value;
  }
  CHECK(norm > 0 && std::sqrt(error / norm) < 2e-3, "%s: the relative error is %g", activation,
        std::sqrt(error / norm));
  for (int e = 0; e < kExperts; ++e) {
    CHECK(std::abs(got.amax[e] - expected.amax[e]) <= 1e-5 * expected.amax[e], "%s: amax is %g, expected %g",
          activation, got.amax[e], expected.amax[e]);
  }
}

// An expert without tokens is not read, and NaN in one token does not reach another.
void check_isolation(Random& random) {
  Layer layer(random, 70, 72, 40, 3, 1, DType::kBFloat16, ::Layout::kList, false);
  std::replace(layer.ids.begin(), layer.ids.end(), int64_t{1}, int64_t{-1});
  const Result expected = run_emulated(resolve(layer.arguments));
  CHECK(count_differences(layer, expected) == 0, "an expert without tokens changes values");
  auto fill = [](const Tensor& tensor, int64_t begin, int64_t count) {
    std::fill_n(static_cast<unsigned char*>(const_cast<void*>(tensor.data)) + 2 * begin, 2 * count, 0xff);
  };
  fill(layer.arguments.gate_up_weights[1], 0, 72 * 80);
  fill(layer.arguments.down_weights[1], 0, 40 * 72);
  constexpr int kSpoiled = 9;
  layer.ids[kSpoiled] = 2;
  fill(layer.arguments.hidden_states, kSpoiled * 72, 72);
  const Result got = run_emulated(resolve(layer.arguments));
  for (int t = 0; t < layer.tokens; ++t) {
    const unsigned char *a = got.out.get() + t * 144, *b = expected.out.get() + t * 144;
    CHECK(t == kSpoiled || std::equal(a, a + 144, b), "NaN in token %d changed token %d", kSpoiled, t);
  }
  CHECK(std::isnan(get(got.out.get(), layer.dtype, kSpoiled * 72)), "NaN was lost");
  CHECK(std::isnan(got.amax[2]) && got.amax[1] == 0, "amax is %g and %g", got.amax[2], got.amax[1]);
}

// A largest intermediate of infinity is one, though infinity times the zeros of columns that are not there is
// NaN.
void check_infinity(Random& random) {
  Layer layer(random, 3, 8, 72, 1, 1, DType::kBFloat16, ::Layout::kList, false);
  std::fill(layer.ids.begin(), layer.ids.end(), int64_t{0});
  auto fill = [](const Tensor& tensor, int64_t count, float value) {
    auto* bytes = static_cast<unsigned char*>(const_cast<void*>(tensor.data));
    const uint16_t bits = cpu::float_to_bf16(value);
    for (int64_t i = 0; i < count; ++i) std::memcpy(bytes + 2 * i, &bits, sizeof bits);
  };
  fill(layer.arguments.gate_up_weights[0], 8 * 2 * 72, 1.0f);
  fill(layer.arguments.hidden_states, 1, std::numeric_limits<float>::infinity());
  const Result got = run_emulated(resolve(layer.arguments));
  CHECK(std::isinf(got.amax[0]), "amax is %g, expected infinity", got.amax[0]);
}

// The gradient of `down` from rows of 16-bit integers in [-1, 1]: left ones gathered by slot, right ones by
// token.
class GradientCase {
 public:
  GradientCase(Random& random, std::vector<int32_t> rows_of_experts, int in, int out, bool transposed)
      : in_(in), out_(out), transposed_(transposed), rows_(std::move(rows_of_experts)) {
    for (const int32_t rows : rows_) {
      first_.push_back(static_cast<int32_t>(slot_.size()));
      for (int32_t r = 0; r < rows; ++r) slot_.push_back(static_cast<int32_t>(slot_.size()));
    }
    std::shuffle(slot_.begin(), slot_.end(), random);
    const size_t slots = slot_.size(), tokens = (slots + kTopK - 1) / kTopK;
    for (auto [rows, columns, numbers, bytes] :
         {std::tuple{slots, in, &left_, &left_bytes_}, std::tuple{tokens, out, &right_, &right_bytes_}}) {
      bytes->resize(rows * columns * 2);
      for (size_t i = 0; i < rows * columns; ++i) {
        numbers->push_back(static_cast<float>(pick(random, -1, 1)));
        put(*bytes, DType::kBFloat16, i, numbers->back());
      }
    }
    task.weight = cuda::Weight::kDown;
    task.left = {left_bytes_.data(), in, 1};
    task.right = {right_bytes_.data(), out, kTopK};
    task.in_features = in;
    task.out_features = out;
    task.num_experts = static_cast<int32_t>(rows_.size());
    task.row_slot = slot_.data();
    task.first_row = first_.data();
    task.expert_rows = rows_.data();
    for (size_t e = 0; e < rows_.size(); ++e) {
      results_.push_back(std::make_unique<Fenced>(size_t{2} * in * out));
      experts.emplace_back();
      experts.back().down =
          transposed ? Matrix{results_.back()->get(), 1, in} : Matrix{results_.back()->get(), out, 1};
    }
    task.gradients = experts.data();
  }

  bool run() { return cuda::weight_gradient_sm90(task, experts, DType::kBFloat16, nullptr); }

  int differences() const {
    int count = 0;
    for (size_t e = 0; e < rows_.size(); ++e) {
      Numbers expected(static_cast<size_t>(in_) * out_, 0.0f);
      for (int32_t r = first_[e]; r < first_[e] + rows_[e]; ++r) {
        for (int i = 0; i < in_; ++i) {
          const float left = left_[slot_[r] * in_ + i];
          for (int o = 0; o < out_; ++o) expected[i * out_ + o] += left * right_[slot_[r] / kTopK * out_ + o];
        }
      }
      for (int i = 0; i < in_; ++i) {
        for (int o = 0; o < out_; ++o) {
          const int64_t at = transposed_ ? o * in_ + i : i * out_ + o;
          count += get(results_[e]->get(), DType::kBFloat16, at) != expected[i * out_ + o];
        }
      }
    }
    return count;
  }

  cuda::WeightGradient task;
  std::vector<Expert> experts;

 private:
  static constexpr int kTopK = 2;
  int in_, out_;
  bool transposed_;
  std::vector<int32_t> rows_, first_, slot_;
  Numbers left_, right_;
  std::vector<unsigned char> left_bytes_, right_bytes_;
  std::vector<std::unique_ptr<Fenced>> results_;
};

void check_gradient(Random& random, std::vector<int32_t> rows, int in, int out) {
  for (bool transposed : {false, true}) {
    GradientCase gradient(random, rows, in, out, transposed);
    CHECK(gradient.run(), "%d x %d is refused", in, out);
    const int wrong = gradient.differences();
    CHECK(wrong == 0, "%d elements differ of %d x %d, transposed %d", wrong, in, out, transposed);
  }
}

void check_gradient_refusals(Random& random) {
  auto refused = [&](const char* what, auto change) {
    GradientCase gradient(random, {3, 2}, 16, 24, false);
    change(gradient);
    CHECK(!gradient.run(), "%s: accepted", what);
  };
  auto shifted = [](const void* data) { return static_cast<const unsigned char*>(data) + 2; };
  refused("columns that are not whole vectors", [](auto& g) { g.task.in_features = 12; });
  refused("results that are not whole vectors", [](auto& g) { g.task.out_features = 20; });
  refused("misaligned rows", [&](auto& g) { g.task.left.data = shifted(g.task.left.data); });
  refused("rows with an odd stride", [](auto& g) { g.task.right.stride = 25; });
  refused("a misaligned gradient",
          [&](auto& g) { g.experts[1].down.data = shifted(g.experts[1].down.data); });
  refused("gradients in two orders", [](auto& g) { g.experts[0].down = {g.experts[0].down.data, 1, 16}; });
}

// A layer that tensor copies cannot read takes another path, to the same result.
void check_refused(const Layer& layer, const char* what) {
  const Problem problem = resolve(layer.arguments);
  CHECK(!cuda::accepts_sm90(problem), "%s: accepted", what);
  CHECK(count_differences(layer, run_emulated(problem)) == 0, "%s: values differ", what);
}

void check_refusals(Random& random) {
  auto make = [&](int hidden, int inter) {
    return Layer(random, 6, hidden, inter, 2, 2, DType::kBFloat16, ::Layout::kList, false);
  };
  check_refused(make(12, 16), "rows that are not whole vectors");
  check_refused(make(16, 12), "intermediate rows that are not whole vectors");
  check_refused(Layer(random, 6, 16, 16, 2, 2, DType::kFloat32, ::Layout::kList, false), "fp32");

  Layer layer = make(16, 16);
  std::vector<unsigned char> shifted(layer.storage.size() * 16 * 32 * 2 + 16);
  auto shift = [&](Tensor& tensor) {
    auto* to = shifted.data() + (16 - reinterpret_cast<uintptr_t>(shifted.data()) % 16) % 16 + 2;
    int64_t elements = 1;
    for (const int64_t size : tensor.shape) elements *= size;
    std::copy_n(static_cast<const unsigned char*>(tensor.data), 2 * elements, to);
    tensor.data = to;
  };
  Layer rows = make(16, 16);
  shift(rows.arguments.hidden_states);
  check_refused(rows, "misaligned tokens");
  const size_t workspace = cuda::workspace_size(resolve(layer.arguments));
  shift(layer.arguments.gate_up_weights[1]);
  CHECK(cuda::workspace_size(resolve(layer.arguments)) == workspace, "the workspace depends on addresses");
  check_refused(layer, "a misaligned gate");
  Layer down = make(16, 16);
  shift(down.arguments.down_weights[0]);
  check_refused(down, "a misaligned down");
}

}  // namespace

int main() {
  for (int row_tiles : {0, 1, 7, 8, 9, 16, 4099}) {
    for (int column_tiles : {1, 2, 13}) check_schedule(row_tiles, column_tiles);
  }
  emulator::compute_capability = 90;
  Random random(1);
  on_every_schedule([&] {
    for (bool permuted : {false, true}) {
      for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        const auto layout = static_cast<::Layout>(pick(random, 0, 2));
        // Tiles of 64 rows: none or few, one and a bit; of 128 rows: the same.
        check_layer(random, pick(random, 0, 5), 200, 72, 3, 2, dtype, layout, permuted);
        check_layer(random, 80, 72, 8, 3, 1, dtype, layout, permuted);
        check_layer(random, 150, 136, 264, 2, 2, dtype, layout, permuted);
      }
    }
  });
  on_every_schedule([&] {
    const bool permuted = pick(random, 0, 1);
    check_short_tiles(random, permuted ? DType::kFloat16 : DType::kBFloat16, permuted);
  });
  on_every_schedule([&] { check_gradient(random, {0, 130, 1, 64}, 136, 264); });
  check_gradient(random, {5}, 8, 8);
  check_gradient_refusals(random);
  // So deep that a barrier with one arrival too few to wait for has let go of a stage before all have read
  // it.
  emulator::order = emulator::Order::kRandom;
  emulator::copies = emulator::Copies::kEager;
  for (int tokens : {5, 64}) {
    check_layer(random, tokens, 4104, 8, 1, 1, DType::kBFloat16, ::Layout::kStacked, true);
  }
  check_gradient(random, {700}, 8, 8);
  constexpr const char* kActivations[] = {"silu",  "gelu", "gelu_tanh", "relu",
                                          "relu2", "selu", "identity",  "swigluoai(1.5, 3)"};
  for (const char* activation : kActivations) {
    const bool separate = pick(random, 0, 1);
    check_epilogue(random, activation, separate ? ::Layout::kSeparate : ::Layout::kList,
                   pick(random, 0, 1) ? DType::kFloat32 : DType::kBFloat16);
  }
  check_isolation(random);
  check_infinity(random);
  check_refusals(random);
  check_layer(random, 9, 8, 8, 1500, 2, DType::kFloat16, ::Layout::kList, false);
  return finish();
}
