// Runs the CUDA back end on the CPU for a check: fences around every buffer, several schedules.
#pragma once

#include "cuda/ptx.cuh"

#include "check.h"
#include "layer.h"

// Calls body under every schedule that could bring a missing barrier or wait to light.
template <class Body>
void on_every_schedule(Body body) {
  for (emulator::Order order :
       {emulator::Order::kForward, emulator::Order::kBackward, emulator::Order::kRandom}) {
    for (emulator::Copies copies : {emulator::Copies::kEager, emulator::Copies::kLate}) {
      emulator::order = order;
      emulator::copies = copies;
      body();
    }
  }
}

// A buffer of exactly this size that starts as NaN; writes beside it end the check.
class Fenced {
 public:
  explicit Fenced(size_t bytes) : bytes_(bytes), whole_(make_buffer(bytes + 2 * kFence)) {}
  ~Fenced() {
    for (size_t i = 0; i < kFence; ++i) {
      CHECK(whole_[i] == 0xff && whole_[kFence + bytes_ + i] == 0xff, "a byte beside a buffer was written");
    }
  }
  unsigned char* get() const { return whole_.get() + kFence; }

 private:
  static constexpr size_t kFence = 256;
  size_t bytes_;
  Buffer whole_;
};

inline Result run_emulated(const paddle_moe::Problem& problem) {
  using namespace paddle_moe;
  const size_t bytes = problem.num_tokens * problem.hidden_size * dtype_size(problem.dtype);
  Result result{make_buffer(bytes), std::vector<float>(problem.num_experts(), -1)};
  const Fenced workspace(cuda::workspace_size(problem)), out(bytes);
  cuda::mixture_of_experts(problem, nullptr, workspace.get(), out.get(), result.amax.data());
  std::copy_n(out.get(), bytes, result.out.get());
  return result;
}
