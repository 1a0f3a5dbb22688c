// The Hopper path: in which order tiles are taken, which weights it accepts, and layers of integers, which
// must be exact, through barriers, tensor copies and wgmma.
#include <cmath>
#include <limits>
#include <set>

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
  // So deep that a barrier with one arrival too few to wait for has let go of a stage before all have read
  // it.
  emulator::order = emulator::Order::kRandom;
  emulator::copies = emulator::Copies::kEager;
  for (int tokens : {5, 64}) {
    check_layer(random, tokens, 4104, 8, 1, 1, DType::kBFloat16, ::Layout::kStacked, true);
  }
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
