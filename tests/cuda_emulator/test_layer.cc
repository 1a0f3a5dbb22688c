// The whole layer on small integers against the naive loop, where every result must be exact, under every
// schedule; what a launch that is refused says; how many launches a call takes.
#include <stdexcept>

#include "emulated.h"

using namespace paddle_moe;

namespace {

void check(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
           ::Layout layout, bool permuted, int64_t chunk_size = 0) {
  Layer layer(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted);
  layer.arguments.chunk_size = chunk_size;
  const int wrong = count_differences(layer, run_emulated(resolve(layer.arguments)));
  CHECK(wrong == 0, "%d values differ for T=%d H=%d I=%d E=%d K=%d %s layout %d permuted %d", wrong, tokens,
        hidden, inter, experts, top_k, dtype_name(dtype), static_cast<int>(layout), permuted);
}

void small_shapes() {
  Random random(1);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (bool permuted : {false, true}) {
      for (int hidden : {1, 8, 40, 72, 129}) {
        for (int inter : {1, 8, 24, 65}) {
          check(random, pick(random, 0, 13), hidden, inter, pick(random, 1, 4), pick(random, 1, 2), dtype,
                static_cast<::Layout>(pick(random, 0, 2)), permuted);
        }
      }
    }
  }
}

// More stages than the ring has, more columns than a tile, tiles of 16, 64 and 128 rows and a few more.
void past_block_sizes() {
  Random random(2);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (bool permuted : {false, true}) {
      check(random, 20, 328, 136, 2, 1, dtype, ::Layout::kStacked, permuted);
      check(random, 70, 136, 264, 2, 1, dtype, ::Layout::kList, permuted);
      check(random, 150, 72, 72, 1, 1, dtype, ::Layout::kSeparate, permuted);
      check(random, 150, 37, 41, 1, 1, dtype, ::Layout::kSeparate, permuted);
      check(random, 50, 16, 8, 3, 2, dtype, ::Layout::kList, permuted, 7);
    }
  }
}

void launches() {
  Random random(3);
  const Layer layer(random, 8, 16, 8, 4, 2, DType::kBFloat16, ::Layout::kList, false);
  emulator::num_launches = 0;
  run_emulated(resolve(layer.arguments));
  CHECK(emulator::num_launches == 4, "%d launches", emulator::num_launches);

  RouteProblem route;  // 2^34 tokens: more blocks than a grid may have
  route.num_tokens = int64_t{1} << 34;
  route.num_experts = route.top_k = 1;
  std::string text;
  try {
    cuda::route(route, nullptr, nullptr, nullptr);
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  CHECK(text.find("route_tokens with 2147483648 blocks of 256 threads") != std::string::npos, "'%s'",
        text.c_str());
}

}  // namespace

int main() {
  small_shapes();
  on_every_schedule(past_block_sizes);
  launches();
  return finish();
}
