// Runs the kernels of csrc/cuda on the CPU, from the same sources, with any C++17 compiler.
//
// The threads of a block are fibers. A fiber runs until it must wait: at a barrier, in an operation of a
// whole warp, or for an asynchronous copy. Then the next one runs, in an order that tests choose, so that a
// missing barrier lets some thread read what another has not written yet: shared memory starts as NaN.
// Asynchronous copies happen either at once or as late as the kernel's own waits allow, also by choice: the
// first finds buffers that are refilled too early, the second data that nobody waited for. What the hardware
// would reject (misaligned vectors, diverged warps, deadlocks) ends the program with a message. Blocks begin
// in an order that tests choose too, and two of them run side by side. Shared memory is one allocation of
// exactly the size that the launch asked for, so AddressSanitizer sees a step outside of it and of every
// array that a test allocates.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/float_formats.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// ---------------------------------------------------------------- the language

struct CUstream_st;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

namespace emulator {

// ---------------------------------------------------------------- what tests choose

enum class Order { kForward, kBackward, kRandom };
enum class Copies { kEager, kLate };

inline Order order = Order::kForward;
inline Copies copies = Copies::kLate;
inline std::mt19937 random_numbers{0};
inline int compute_capability = 80;
inline int num_multiprocessors = 3;
inline int num_launches = 0;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void expect(bool condition, const char* what) {
  if (!condition) fail(what);
}

// ---------------------------------------------------------------- threads of a block

struct Copy {
  void* destination;
  const void* source;
  int bytes, zeros;
};

// Where a fiber, or the scheduler, goes on.
struct Context {
  ucontext_t start;
  jmp_buf jump;
  bool started = false;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  unsigned thread = 0;
  bool done = false;
  // Where it waits: ready(waiting_for) says when it may go on.
  bool (*ready)(void*) = nullptr;
  void* waiting_for = nullptr;
  std::vector<std::vector<Copy>> copy_groups;  // committed and unfinished, oldest first
  std::vector<Copy> open_group;
  // emulator_sm90.h: products of wgmma, as above, and until when it has fenced what cp.async wrote.
  std::vector<std::vector<std::function<void()>>> products;
  std::vector<std::function<void()>> open_products;
  bool wgmma_begun = false;
  uint64_t fenced = 0;
};

// emulator_sm90.h: what happens when a thread waits for this barrier.
struct LateArrival {
  const void* barrier;
  const Fiber* thread;  // whose cp.async it is; null: a tensor copy
  std::function<void()> happen;
};

struct Warp {
  void (*operation)(void* const* lanes, uint32_t mask) = nullptr;
  void* lanes[32];
  uint32_t arrived = 0, generation = 0;
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  unsigned index = 0;
  std::vector<Fiber> fibers;
  std::vector<size_t> turns;  // in which its threads go on
  uint32_t resting = 0;       // warps that wait for no reason, so that others get far ahead of them
  std::vector<Warp> warps;
  Barrier barriers[16];
  bool any = false;  // of __syncthreads_or
  unsigned alive = 0;
  Context scheduler;
  Fiber* running = nullptr;
  std::unique_ptr<void, void (*)(void*)> shared{nullptr, std::free};
  size_t shared_bytes = 0;
  std::vector<LateArrival> late;
  std::vector<const void*> unfenced_barriers;  // initialised, and the copy engine does not know
  // When cp.async wrote each 16 bytes of shared memory; 0: it did not.
  std::vector<uint64_t> written;
  uint64_t clock = 0;
  void (*body)(void*) = nullptr;
  void* body_arguments = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};
inline Block* block = nullptr;

constexpr size_t kStackBytes = 256 * 1024;

// Stacks outlive a launch: fresh memory costs more than all else.
inline char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[thread].get();
}

inline void switch_to(Context* from, Context* to, const void* stack, size_t size, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;  // AddressSanitizer has to be told which stack is in use
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack, size);
  swapcontext(&from->start, &to->start);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)stack, (void)size, (void)last;
  // swapcontext asks the kernel for the signal mask each time; a jump does not.
  if (_setjmp(from->jump) == 0) {
    if (to->started) _longjmp(to->jump, 1);
    to->started = true;
    setcontext(&to->start);
  }
#endif
}

inline void leave(bool last = false) {
  Fiber* fiber = block->running;
  switch_to(&fiber->context, &block->scheduler, block->scheduler_stack, block->scheduler_stack_size, last);
}

template <class Condition>
void wait_until(Condition condition) {
  Fiber* fiber = block->running;
  fiber->ready = [](void* c) { return (*static_cast<Condition*>(c))(); };
  fiber->waiting_for = &condition;
  leave();
}

inline bool has_late_copies(const Fiber* fiber) {
  return std::any_of(block->late.begin(), block->late.end(),
                     [fiber](const LateArrival& late) { return late.thread == fiber; });
}

inline void start_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
  block->body(block->body_arguments);
  const Fiber* fiber = block->running;
  expect(fiber->copy_groups.empty() && fiber->open_group.empty() && !has_late_copies(fiber),
         "a thread ends before its asynchronous copies");
  block->running->done = true;
  --block->alive;
  leave(true);
}

// Each thread goes on until it waits again.
inline void run_turn() {
  blockIdx = dim3(block->index);
  if (order == Order::kRandom) {
    std::shuffle(block->turns.begin(), block->turns.end(), random_numbers);
    if (random_numbers() % 32 == 0) block->resting = random_numbers();
  }
  bool progress = false;
  for (const size_t i : block->turns) {
    Fiber& fiber = block->fibers[i];
    if (block->resting >> i / 32 & 1) continue;
    if (fiber.done || (fiber.ready && !fiber.ready(fiber.waiting_for))) continue;
    progress = true;
    fiber.ready = nullptr;
    block->running = &fiber;
    threadIdx = dim3(fiber.thread);
    switch_to(&block->scheduler, &fiber.context, fiber.stack, kStackBytes);
  }
  expect(progress || block->resting, "deadlock: every thread waits");
  if (!progress) block->resting = 0;
}

// The operation runs once all lanes of the mask have come, on the lanes' own arguments.
template <class Lane>
void warp_collective(void (*operation)(void* const*, uint32_t), Lane* lane, uint32_t mask = 0xffffffff) {
  Warp& warp = block->warps[threadIdx.x / 32];
  expect(warp.arrived == 0 || warp.operation == operation, "the lanes of a warp are in different operations");
  expect(mask >> threadIdx.x % 32 & 1, "a lane is not in the mask it passed");
  warp.operation = operation;
  warp.lanes[threadIdx.x % 32] = lane;
  warp.arrived |= 1u << threadIdx.x % 32;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
    operation(warp.lanes, mask);
  } else {
    wait_until([&warp, generation = warp.generation] { return warp.generation != generation; });
  }
}

// Barrier 0 is __syncthreads: it counts the threads that have not returned.
inline void wait_at_barrier(int id, unsigned threads) {
  Barrier& barrier = block->barriers[id];
  ++barrier.arrived;
  auto complete = [&barrier, threads] { return barrier.arrived >= (threads ? threads : block->alive); };
  if (complete()) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  wait_until([&barrier, complete, generation = barrier.generation] {
    if (barrier.generation == generation && complete()) {  // the last missing thread has returned
      barrier.arrived = 0;
      ++barrier.generation;
    }
    return barrier.generation != generation;
  });
}

inline void perform(const Copy& copy) {
  std::memcpy(copy.destination, copy.source, copy.bytes);
  std::memset(static_cast<char*>(copy.destination) + copy.bytes, 0, copy.zeros);
  const size_t offset = static_cast<char*>(copy.destination) - static_cast<char*>(block->shared.get());
  if (offset < block->shared_bytes) block->written[offset / 16] = ++block->clock;
}

inline void* aligned_bytes(size_t bytes) {
  void* data = nullptr;
  expect(posix_memalign(&data, 1024, bytes) == 0, "out of memory");
  std::memset(data, 0xff, bytes);  // NaN in every format
  return data;
}

inline void begin_block(Block* state, unsigned index, size_t shared_bytes) {
  const size_t threads = state->fibers.size();
  state->index = index;
  state->resting = 0;
  state->warps.assign(threads / 32, {});
  for (Barrier& barrier : state->barriers) barrier = {};
  state->shared.reset(aligned_bytes(shared_bytes));
  state->shared_bytes = shared_bytes;
  state->written.assign(shared_bytes / 16 + 1, 0);
  state->clock = 0;
  state->unfenced_barriers.clear();
  state->alive = threads;
  for (Fiber& fiber : state->fibers) {
    fiber.context.start.uc_stack.ss_sp = fiber.stack;
    fiber.context.start.uc_stack.ss_size = kStackBytes;
    fiber.context.started = false;
    makecontext(&fiber.context.start, start_fiber, 0);
    fiber.done = false;
    fiber.ready = nullptr;
    fiber.copy_groups.clear();
    fiber.open_group.clear();
    fiber.fenced = 0;
  }
}

inline void end_block() {
  expect(block->late.empty(), "a block ends before its asynchronous copies");
  for (const Fiber& fiber : block->fibers) {
    expect(fiber.products.empty() && fiber.open_products.empty(), "a thread ends before its wgmma");
  }
}

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, dim3 grid, unsigned threads, size_t shared_bytes,
                   std::tuple<Arguments...> arguments) {
  constexpr size_t kMaxShared = 227 * 1024;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1 || threads == 0 || threads > 1024 ||
      threads % 32 != 0 || shared_bytes > kMaxShared) {
    return cudaErrorInvalidConfiguration;
  }
  ++num_launches;
  auto body = [&] { std::apply(kernel, arguments); };
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<unsigned> indices(grid.x);
  for (unsigned b = 0; b < grid.x; ++b) indices[b] = order == Order::kBackward ? grid.x - 1 - b : b;
  if (order == Order::kRandom) std::shuffle(indices.begin(), indices.end(), random_numbers);

  constexpr size_t kAtOnce = 2;
  std::vector<Block> places(std::min<size_t>(kAtOnce, grid.x));
  std::vector<Block*> busy;
  auto next = indices.begin();
  for (Block& state : places) {
    state.scheduler.started = true;
    state.body = [](void* b) { (*static_cast<decltype(body)*>(b))(); };
    state.body_arguments = &body;
    state.fibers.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
      state.fibers[t].stack = stack_of((&state - places.data()) * threads + t);
      state.fibers[t].thread = t;
      getcontext(&state.fibers[t].context.start);
      state.turns.push_back(order == Order::kBackward ? threads - 1 - t : t);
    }
    begin_block(&state, *next++, shared_bytes);
    busy.push_back(&state);
  }
  while (!busy.empty()) {
    const size_t chosen = order == Order::kRandom ? random_numbers() % busy.size() : 0;
    block = busy[chosen];
    run_turn();
    if (block->alive) continue;
    end_block();
    if (next != indices.end()) {
      begin_block(block, *next++, shared_bytes);
    } else {
      busy.erase(busy.begin() + chosen);
    }
  }
  block = nullptr;
  return cudaSuccess;
}

}  // namespace emulator

// ---------------------------------------------------------------- the runtime

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::num_multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulator::compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulator::compute_capability % 10;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// ---------------------------------------------------------------- barriers, warps, atomics

inline void __syncthreads() { emulator::wait_at_barrier(0, 0); }
inline int __syncthreads_or(int predicate) {
  emulator::block->any |= predicate != 0;
  __syncthreads();
  const bool any = emulator::block->any;
  __syncthreads();
  emulator::block->any = false;
  __syncthreads();
  return any;
}
inline void __threadfence() {}

inline void __syncwarp(uint32_t mask = 0xffffffff) {
  char nothing;
  emulator::warp_collective(+[](void* const*, uint32_t) {}, &nothing, mask);
}

namespace emulator {

template <class T>
struct Shuffle {
  T value, result;
  int lane;
};

template <class T>
T shuffle(uint32_t mask, T value, int source) {
  Shuffle<T> mine{value, value, source};
  warp_collective(
      +[](void* const* lanes, uint32_t mask) {
        for (int i = 0; i < 32; ++i) {
          if (!(mask >> i & 1)) continue;
          auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
          expect(mask >> lane->lane & 1, "a shuffle reads a lane outside of the mask");
          lane->result = static_cast<Shuffle<T>*>(lanes[lane->lane])->value;
        }
      },
      &mine, mask);
  return mine.result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return emulator::shuffle(mask, value, lane % 32);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
  return emulator::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return emulator::shuffle(mask, value, lane >= distance ? lane - distance : lane);
}

template <class T>
uint32_t __match_any_sync(uint32_t mask, T value) {
  struct Result : emulator::Shuffle<T> {
    uint32_t peers;
  } result{{value, value, 0}, 0};
  emulator::warp_collective(
      +[](void* const* lanes, uint32_t mask) {
        for (int i = 0; i < 32; ++i) {
          for (int j = 0; j < 32; ++j) {
            if (!(mask >> i & 1) || !(mask >> j & 1)) continue;
            auto* lane = static_cast<Result*>(lanes[i]);
            lane->peers |= static_cast<uint32_t>(lane->value == static_cast<Result*>(lanes[j])->value) << j;
          }
        }
      },
      &result, mask);
  return result.peers;
}

inline int __any_sync(uint32_t mask, int value) {
  emulator::Shuffle<int> mine{value, 0, 0};
  emulator::warp_collective(
      +[](void* const* lanes, uint32_t mask) {
        int any = 0;
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) any |= static_cast<emulator::Shuffle<int>*>(lanes[i])->value;
        }
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) static_cast<emulator::Shuffle<int>*>(lanes[i])->result = any;
        }
      },
      &mine, mask);
  return mine.result;
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return std::abs(y) > 0x1p126f ? x * 0.0f : x / y; }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float __uint_as_float(uint32_t bits) { return paddle_moe::cpu::bits_to_float(bits); }
inline uint32_t __float_as_uint(float value) { return paddle_moe::cpu::float_to_bits(value); }

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}

// ---------------------------------------------------------------- ptx.cuh

namespace paddle_moe {
namespace cuda {

using std::max;
using std::min;

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                          cudaStream_t, const Arguments&... arguments) {
  return emulator::launch(kernel, grid, threads, shared_bytes,
                          std::tuple<std::decay_t<Parameters>...>(arguments...));
}

inline void* shared_memory() { return emulator::block->shared.get(); }

template <class T>
const T* forget_origin(const T* pointer) {
  return pointer;
}

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return cpu::bf16_to_float(value.bits); }
inline float to_float(Fp16 value) { return cpu::f16_to_float(value.bits); }

template <class T>
T from_float(float value) {
  return value;
}
template <>
inline Bf16 from_float<Bf16>(float value) {
  return {cpu::float_to_bf16(value)};
}
template <>
inline Fp16 from_float<Fp16>(float value) {
  return {cpu::float_to_f16(value)};
}

inline void cp_async_16(void* destination, const void* source, int bytes) {
  emulator::expect(reinterpret_cast<uintptr_t>(destination) % 16 == 0, "cp.async to a misaligned address");
  emulator::expect(reinterpret_cast<uintptr_t>(source) % 16 == 0 || bytes == 0,
                   "cp.async from a misaligned address");
  emulator::expect(bytes >= 0 && bytes <= 16, "cp.async of less than 0 or more than 16 bytes");
  const emulator::Copy copy{destination, source, bytes, 16 - bytes};
  if (emulator::copies == emulator::Copies::kEager) {
    emulator::perform(copy);
  } else {
    emulator::block->running->open_group.push_back(copy);
  }
}

inline void cp_async_commit() {
  emulator::Fiber& fiber = *emulator::block->running;
  fiber.copy_groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::block->running->copy_groups;
  while (groups.size() > kPending) {
    for (const emulator::Copy& copy : groups.front()) emulator::perform(copy);
    groups.erase(groups.begin());
  }
}

// Late copies stay late: they land when somebody waits for their barrier.
inline void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait<0>();
  const emulator::Fiber* fiber = emulator::block->running;
  if (emulator::has_late_copies(fiber)) {
    emulator::wait_until([fiber] { return !emulator::has_late_copies(fiber); });
  }
}

struct LdmatrixLane {
  uint32_t* matrix;
  const void* row;
  bool transposed;
};

inline void ldmatrix_any(uint32_t (&matrix)[4], const void* row, bool transposed) {
  emulator::expect(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix of a misaligned row");
  LdmatrixLane mine{matrix, row, transposed};
  emulator::warp_collective(
      +[](void* const* lanes, uint32_t) {
        uint16_t element[32][8];
        for (int i = 0; i < 32; ++i) {
          const auto* lane = static_cast<LdmatrixLane*>(lanes[i]);
          emulator::expect(lane->transposed == static_cast<LdmatrixLane*>(lanes[0])->transposed,
                           "the lanes of a warp are in different operations");
          std::memcpy(element[i], lane->row, 16);
        }
        for (int i = 0; i < 32; ++i) {
          const auto* lane = static_cast<LdmatrixLane*>(lanes[i]);
          for (int m = 0; m < 4; ++m) {
            const int outer = i / 4, inner = i % 4 * 2;
            const uint16_t low =
                lane->transposed ? element[8 * m + inner][outer] : element[8 * m + outer][inner];
            const uint16_t high =
                lane->transposed ? element[8 * m + inner + 1][outer] : element[8 * m + outer][inner + 1];
            lane->matrix[m] = low | static_cast<uint32_t>(high) << 16;
          }
        }
      },
      &mine);
}
inline void ldmatrix(uint32_t (&matrix)[4], const void* row) { ldmatrix_any(matrix, row, false); }
inline void ldmatrix_transposed(uint32_t (&matrix)[4], const void* row) { ldmatrix_any(matrix, row, true); }

struct MmaLane {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
}

// sum + the 16 products, as inaccurate as tensor cores may be: every term is cut off one bit below the last
// one that fp32 keeps of the largest, and so is their sum (Fasi, Higham, Mikaitis and Pranesh, "Numerical
// behavior of NVIDIA tensor cores", 2021).
inline float add_products(float sum, const float (&a)[16], const float (&b)[16]) {
  double terms[17] = {sum}, total = sum, largest = std::abs(sum);
  for (int k = 0; k < 16; ++k) {
    terms[k + 1] = static_cast<double>(a[k]) * b[k];
    total += terms[k + 1];
    largest = std::max(largest, std::abs(terms[k + 1]));
  }
  if (largest == 0 || !std::isfinite(total)) return static_cast<float>(total);
  constexpr int kBits = 25;  // of the largest term
  int exponent;
  std::frexp(largest, &exponent);
  const double scale = std::ldexp(1.0, kBits - exponent);
  int64_t sum_of_bits = 0;
  for (const double term : terms) sum_of_bits += static_cast<int64_t>(term * scale);
  for (; std::abs(sum_of_bits) >> 24 != 0; ++exponent) sum_of_bits /= 2;
  return static_cast<float>(std::ldexp(static_cast<double>(sum_of_bits), exponent - kBits));
}

template <class T>
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane mine{sum, a, {b0, b1}};
  emulator::warp_collective(
      +[](void* const* lanes, uint32_t) {
        float a[16][16], b[8][16];
        for (int i = 0; i < 32; ++i) {
          const auto* lane = static_cast<MmaLane*>(lanes[i]);
          for (int r = 0; r < 4; ++r) {
            for (int h = 0; h < 2; ++h) {
              a[i / 4 + r % 2 * 8][i % 4 * 2 + h + r / 2 * 8] = half_of<T>(lane->a[r], h);
              if (r < 2) b[i / 4][i % 4 * 2 + h + r * 8] = half_of<T>(lane->b[r], h);
            }
          }
        }
        for (int i = 0; i < 32; ++i) {
          for (int c = 0; c < 4; ++c) {
            float& result = static_cast<MmaLane*>(lanes[i])->sum[c];
            result = add_products(result, a[i / 4 + c / 2 * 8], b[i % 4 * 2 + c % 2]);
          }
        }
      },
      &mine);
}

}  // namespace cuda
}  // namespace paddle_moe
