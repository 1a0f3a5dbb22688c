// Measures what the machine can do at best: the floor that benchmarks divide by.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace paddle_moe {
namespace cpu {
namespace {

struct Run {
  int threads;
  double seconds;  // from the start of the first to the end of the last, the median of the tries
};

// On as many threads as the system allows; not the pool's, because all of them must take part. They begin
// each try together, and of a few tries the median counts.
template <class Work>
Run run(int num_threads, int tries, const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> begins(num_threads * tries), ends(num_threads * tries);
  std::atomic<float> sink{0.0f};
  std::atomic<int> expected{0}, arrived{0};
  std::vector<pthread_t> handles;
  int kept_off = -1;
  const auto take_part = [&](int thread) {
    for (int t = 0; t < tries; ++t) {
      if (thread == 0) kept_off = keep_off_this_cpu(handles, kept_off);  // the caller may have been moved
      arrived.fetch_add(1);
      spin_until([&] { return expected > 0 && arrived >= (t + 1) * expected; });
      begins[t * num_threads + thread] = Clock::now();
      sink = work(thread);
      ends[t * num_threads + thread] = Clock::now();
    }
  };
  std::vector<std::thread> others;
  try {
    others.reserve(num_threads);
    handles.reserve(num_threads);
    for (int i = 1; i < num_threads; ++i) others.emplace_back(take_part, i);
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  const int threads = 1 + static_cast<int>(others.size());
  for (std::thread& other : others) handles.push_back(other.native_handle());
  expected = threads;
  take_part(0);
  for (std::thread& other : others) other.join();
  std::vector<double> seconds;
  for (int t = 0; t < tries; ++t) {
    const auto begin = begins.begin() + t * num_threads, end = ends.begin() + t * num_threads;
    const auto taken = *std::max_element(end, end + threads) - *std::min_element(begin, begin + threads);
    seconds.push_back(std::chrono::duration<double>(taken).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + tries / 2, seconds.end());
  return {threads, seconds[tries / 2]};
}

}  // namespace

double measure_flops(DType dtype, int num_threads) {
  constexpr int64_t kIterations = 500000;
  constexpr int kTries = 9;
  const Kernels& k = kernels();
  const bool pairs = dtype == DType::kBFloat16 && k.bf16_dot;
  const auto loop = pairs ? k.bf16_dot_loop : k.multiply_add_loop;
  const Run done = run(num_threads, kTries, [&](int) { return loop(kIterations); });
  const double flops = static_cast<double>(k.multiply_add_flops) * (pairs ? 2 : 1);
  return kIterations * flops * done.threads / done.seconds;
}

double measure_read(const void* data, size_t bytes, int streams, int num_threads) {
  const int64_t count = static_cast<int64_t>(bytes / sizeof(float)) / num_threads;
  const float* floats = static_cast<const float*>(data);
  const Run done = run(num_threads, 1, [&](int thread) {
    return kernels().read_loop(floats + thread * count, count, streams);
  });
  return static_cast<double>(count) * sizeof(float) * done.threads / done.seconds;
}

}  // namespace cpu
}  // namespace paddle_moe
