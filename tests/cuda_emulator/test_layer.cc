// The whole layer on small integers against the naive loop: every result must be exact.
#include "emulated.h"

using namespace paddle_moe;

namespace {

void check(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
           ::Layout layout, bool permuted) {
  const Layer layer(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted);
  const int wrong = count_differences(layer, run_emulated(resolve(layer.arguments)));
  CHECK(wrong == 0, "%d values differ for T=%d H=%d I=%d E=%d K=%d %s layout %d permuted %d", wrong, tokens,
        hidden, inter, experts, top_k, dtype_name(dtype), static_cast<int>(layout), permuted);
}

}  // namespace

int main() {
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
  return finish();
}
