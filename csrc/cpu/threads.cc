#include "cpu/threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "moe.h"

namespace paddle_moe {
namespace cpu {
namespace {

// Long enough to bridge what lies between two layers of a decoding step: waking a thread takes 50
// microseconds at best, on a virtual machine often more than such a layer. All but the first microseconds are
// spent yielding.
constexpr std::chrono::microseconds kSpinBeforeSleep{1000};

class Pool {
 public:
  void run(int num_threads, const std::function<void(int)>& body) {
    if (num_threads <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
      body(0);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers(static_cast<size_t>(num_threads - 1));
      caller_cpu_ = keep_off_this_cpu(workers_, caller_cpu_);
      body_ = &body;
      next_index_ = 1;
      open_places_ = num_threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    call(body, 0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_places_ = 0;
    }
    spin_until([this] { return active_.load(std::memory_order_acquire) == 0; });
    const std::exception_ptr error = std::exchange(error_, nullptr);
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

 private:
  // Where the system allows no more threads, or has no memory for them, those that are there do the work.
  void start_workers(size_t count) {
    try {
      workers_.reserve(count);
      while (workers_.size() < count) {
        std::thread worker([this] { work(); });
        workers_.push_back(worker.native_handle());
        worker.detach();
        caller_cpu_ = -1;
      }
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
  }

  void call(const std::function<void(int)>& body, int index) {
    try {
      body(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
  }

  void work() {
    const PlainFloats plain;  // not what was in force where the thread was started
    uint64_t seen = 0;
    for (;;) {
      const auto sleep_at = std::chrono::steady_clock::now() + kSpinBeforeSleep;
      for (int round = 0; generation_.load(std::memory_order_acquire) == seen; ++round) {
        if (round % 64 == 63 && std::chrono::steady_clock::now() > sleep_at) break;
        pause_briefly(round);
      }
      const std::function<void(int)>* body = nullptr;
      int index = 0;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (open_places_ == 0) continue;
        --open_places_;
        index = next_index_++;
        body = body_;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      call(*body, index);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::atomic<bool> busy_{false};  // a caller's body is running
  std::mutex mutex_;               // guards the plain members below
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
  const std::function<void(int)>* body_ = nullptr;
  std::exception_ptr error_;  // of a call that did not return
  std::vector<pthread_t> workers_;
  int caller_cpu_ = -1;  // which the workers keep off
  int open_places_ = 0;
  int next_index_ = 0;
};

// Never destroyed: workers may still sleep in it while the process exits.
alignas(Pool) unsigned char pool_storage[sizeof(Pool)];

Pool& pool() {
  static Pool* instance = [] {
    // A forked child has none of the workers; it starts over with an empty pool.
    pthread_atfork(nullptr, nullptr, [] { new (pool_storage) Pool(); });
    return new (pool_storage) Pool();
  }();
  return *instance;
}

// The value of a variable that holds a positive number; 0 for any other.
int positive_from_environment(const char* name) {
  const char* text = std::getenv(name);
  return text ? std::max(0, std::atoi(text)) : 0;
}

// The processors that this process may use, or its share of their time if that is less.
int available_cores() {
  int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) cores = std::max(1, CPU_COUNT(&allowed));
  // The limit of a container, where it sees its own control group: version 2, or 1 with -1 for none.
  double quota = -1, period = -1;
  if (!(std::ifstream("/sys/fs/cgroup/cpu.max") >> quota >> period)) {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  if (quota > 0 && period > 0) cores = std::min(cores, std::max(1, static_cast<int>(quota / period)));
#endif
  return cores;
}

int default_num_threads() {
  const char* const own = std::getenv("PADDLE_MOE_NUM_THREADS");
  if (own && *own) {
    char* end = nullptr;
    const long n = std::strtol(own, &end, 10);
    if (*end == '\0' && 0 < n && n <= kMaxThreads) return static_cast<int>(n);
    throw std::runtime_error("PADDLE_MOE_NUM_THREADS must be a number from 1 to " +
                             std::to_string(kMaxThreads) + ", got '" + own +
                             "'; without it all cores of the process are used");
  }
  if (const int n = positive_from_environment("OMP_NUM_THREADS"); n > 1) return std::min(n, kMaxThreads);
  return std::max(1, available_cores() / std::max(1, positive_from_environment("PADDLE_LOCAL_SIZE")));
}

std::atomic<int> chosen_num_threads{0};

}  // namespace

PlainFloats::PlainFloats() {
#if defined(__x86_64__)
  before_ = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(0x1f80);  // all exceptions masked
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(before_));
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}) : "memory");
#endif
}

PlainFloats::~PlainFloats() {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(static_cast<uint32_t>(before_));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(before_) : "memory");
#endif
}

void pause_briefly(int round) {
  if (round > 1000) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int keep_off_this_cpu(const std::vector<pthread_t>& threads, int kept_off) {
#if defined(__linux__)
  const int cpu = sched_getcpu();
  if (cpu == kept_off || cpu < 0) return kept_off;
  cpu_set_t others;
  if (sched_getaffinity(0, sizeof others, &others) != 0) return kept_off;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) == 0) return kept_off;  // the caller is pinned, for now perhaps
  for (pthread_t thread : threads) pthread_setaffinity_np(thread, sizeof others, &others);
  return cpu;
#else
  return kept_off;
#endif
}

void parallel(int num_threads, const std::function<void(int)>& body) { pool().run(num_threads, body); }

void set_num_threads(int num_threads) { chosen_num_threads = std::max(0, num_threads); }

int num_threads() {
  const int chosen = chosen_num_threads;
  if (chosen > 0) return chosen;
  static const int by_default = default_num_threads();
  return by_default;
}

}  // namespace cpu
}  // namespace paddle_moe
