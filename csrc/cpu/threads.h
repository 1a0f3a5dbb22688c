// A small persistent thread pool.
//
// Not OpenMP: importing Paddle sets OMP_NUM_THREADS=1, static splits stall when another process takes a core,
// and ThreadSanitizer cannot see through libgomp.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace paddle_moe {
namespace cpu {

// Calls body(i) once each for some of i = 0 .. num_threads-1, always for i = 0 and on the calling thread;
// returns when all calls have. Threads that are still asleep when the work is finished are not waited for, so
// body must take its work from a shared counter and not rely on the number of calls. When the pool is busy
// with another caller, or was asked for from inside itself, body(0) alone runs. If calls throw, one of the
// exceptions is thrown when all calls have returned; so only a body whose calls do not wait for each other
// may throw.
void parallel(int num_threads, const std::function<void(int)>& body);

// Linux likes to start and to wake a thread on the processor of the caller, which stays busy, and may take
// milliseconds to move it. So these threads may run where the caller may, but not on its processor, which is
// returned. `kept_off` is what the call before returned for them, at first -1, and is returned where nothing
// changed.
int keep_off_this_cpu(const std::vector<pthread_t>& threads, int kept_off);

// While it lives, this thread rounds to nearest and computes with subnormal numbers, whatever it has told its
// processor. Libraries have it take those for zero on the threads that call them: bits would then depend on
// which thread computes what.
class PlainFloats {
 public:
  PlainFloats();
  ~PlainFloats();
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
  uint64_t before_ = 0;
};

void pause_briefly(int round);

// Waits for a condition that another thread is about to make true.
template <class Condition>
void spin_until(const Condition& condition) {
  for (int round = 0; !condition(); ++round) pause_briefly(round);
}

}  // namespace cpu
}  // namespace paddle_moe
