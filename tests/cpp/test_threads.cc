// The thread pool under everything a program may do to it. The interesting runs are those under
// ThreadSanitizer.
#include <atomic>
#include <thread>

#include "check.h"
#include "layer.h"

using paddle_moe::DType;

namespace {

std::vector<Layer> make_layers() {
  Random random(1);
  std::vector<Layer> layers;
  layers.reserve(4);  // a Layer points into itself
  layers.emplace_back(random, 1, 64, 40, 4, 2, DType::kFloat32, Layout::kList, false);
  layers.emplace_back(random, 30, 130, 70, 4, 2, DType::kBFloat16, Layout::kStacked, true);
  layers.emplace_back(random, 100, 33, 65, 2, 1, DType::kFloat16, Layout::kSeparate, false);
  // Enough bytes of weights to wake the pool.
  layers.emplace_back(random, 20, 400, 200, 6, 2, DType::kFloat32, Layout::kList, false);
  return layers;
}

// More threads than cores, fewer, as many; growing and shrinking between calls.
void changing_sizes(const std::vector<Layer>& layers) {
  for (int num_threads : {1, 4, 2, 9, 1, 3, 17, 5}) {
    for (const Layer& layer : layers) {
      CHECK(count_differences(layer, run(layer, num_threads)) == 0, "%d threads", num_threads);
    }
  }
}

void callers_at_once(const std::vector<Layer>& layers, int num_callers, int calls) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < num_callers; ++c) {
    callers.emplace_back([&, c] {
      for (int i = 0; i < calls; ++i) {
        const Layer& layer = layers[(c + i) % layers.size()];
        paddle_moe::cpu::set_num_threads((c + i) % 5);
        wrong += count_differences(layer, run(layer, paddle_moe::cpu::num_threads())) != 0;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  paddle_moe::cpu::set_num_threads(0);
  CHECK(wrong == 0, "%d of %d calls were wrong", wrong.load(), num_callers * calls);
}

void short_lived_callers(const std::vector<Layer>& layers) {
  for (int i = 0; i < 30; ++i) {
    std::thread([&] { CHECK(count_differences(layers[3], run(layers[3], 3)) == 0, "caller %d", i); }).join();
  }
}

void setting() {
  paddle_moe::cpu::set_num_threads(3);
  CHECK(paddle_moe::cpu::num_threads() == 3, "got %d", paddle_moe::cpu::num_threads());
  paddle_moe::cpu::set_num_threads(0);
  CHECK(paddle_moe::cpu::num_threads() >= 1, "got %d", paddle_moe::cpu::num_threads());
}

}  // namespace

int main() {
  const std::vector<Layer> layers = make_layers();
  changing_sizes(layers);
  callers_at_once(layers, 6, 15);
  short_lived_callers(layers);
  setting();
  return finish();
}
