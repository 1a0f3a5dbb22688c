// Measures what the machine can do at best: the floor that benchmarks divide by.
#include <atomic>
#include <chrono>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace paddle_moe {
namespace cpu {
namespace {

struct Run {
  int threads;
  double seconds;  // that the slowest of them needed
};

// On as many threads as the system allows; not the pool's, because all of them must take part.
template <class Work>
Run run(int num_threads, const Work& work) {
  std::atomic<float> sink{0.0f};
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  try {
    threads.reserve(num_threads);
    for (int i = 1; i < num_threads; ++i) threads.emplace_back([&, i] { sink = work(i); });
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  sink = work(0);
  for (std::thread& thread : threads) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return {1 + static_cast<int>(threads.size()), seconds};
}

}  // namespace

double measure_flops(DType dtype, int num_threads) {
  constexpr int64_t kIterations = 500000;
  const Kernels& k = kernels();
  const bool pairs = dtype == DType::kBFloat16 && k.bf16_dot;
  const auto loop = pairs ? k.bf16_dot_loop : k.multiply_add_loop;
  const Run done = run(num_threads, [&](int) { return loop(kIterations); });
  const double flops = static_cast<double>(k.multiply_add_flops) * (pairs ? 2 : 1);
  return kIterations * flops * done.threads / done.seconds;
}

double measure_read(const void* data, size_t bytes, int streams, int num_threads) {
  const int64_t count = static_cast<int64_t>(bytes / sizeof(float)) / num_threads;
  const float* floats = static_cast<const float*>(data);
  const Run done = run(
      num_threads, [&](int thread) { return kernels().read_loop(floats + thread * count, count, streams); });
  return static_cast<double>(count) * sizeof(float) * done.threads / done.seconds;
}

}  // namespace cpu
}  // namespace paddle_moe
