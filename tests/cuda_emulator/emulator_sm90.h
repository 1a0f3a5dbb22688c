// The twins of ptx_sm90.cuh: mbarriers, tensor copies and wgmma.
//
// With Copies::kEager a copy lands at once and a wgmma is computed when its warpgroup waits for it, from what
// shared memory holds by then: a stage that is refilled too early gives wrong sums. With kLate a copy lands
// when somebody waits for its barrier and a wgmma is computed at once: a stage that is read too early is
// still NaN. A wgmma that reads what cp.async has written and no fence.proxy.async has published ends the
// program, and so do a barrier with too many arrivals and copies that nobody waits for.
#pragma once

#include <array>

#include "emulator.h"

namespace paddle_moe {
namespace cuda {

// ---------------------------------------------------------------- barriers in shared memory

// Eight bytes, as in hardware. Shared memory starts as ones, so a barrier that was not initialised is known
// by arrivals that it cannot expect.
struct Mbarrier {
  uint16_t expected;
  uint16_t pending : 15;
  uint16_t parity : 1;  // of the phase that is not over
  int32_t bytes;        // of tensor copies, announced and not landed
};
static_assert(sizeof(Mbarrier) == 8, "as large as the real one");

inline void check(const Mbarrier* barrier) {
  emulator::expect(barrier->expected > 0 && barrier->expected <= 1024, "a barrier is used before its init");
  const auto& unfenced = emulator::block->unfenced_barriers;
  emulator::expect(std::find(unfenced.begin(), unfenced.end(), barrier) == unfenced.end(),
                   "a barrier is used before the fence behind its init");
}

inline void end_phase_if_complete(Mbarrier* barrier) {
  if (barrier->pending > 0 || barrier->bytes != 0) return;
  barrier->pending = barrier->expected;
  barrier->parity ^= 1;
}

inline void mbarrier_init(Mbarrier* barrier, uint32_t arrivals) {
  emulator::expect(arrivals > 0 && arrivals <= 1024, "a barrier expects no or too many arrivals");
  *barrier = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0};
  emulator::block->unfenced_barriers.push_back(barrier);
}
inline void mbarrier_init_fence() { emulator::block->unfenced_barriers.clear(); }

inline void mbarrier_arrive_expect(Mbarrier* barrier, uint32_t bytes) {
  check(barrier);
  emulator::expect(barrier->pending > 0, "a barrier gets more arrivals than it expects");
  barrier->bytes += static_cast<int32_t>(bytes);
  --barrier->pending;
  end_phase_if_complete(barrier);
}
inline void mbarrier_arrive(Mbarrier* barrier) { mbarrier_arrive_expect(barrier, 0); }

inline void start_copy(Mbarrier* barrier, const emulator::Fiber* thread, std::function<void()> land) {
  check(barrier);
  if (emulator::copies == emulator::Copies::kEager) return land();
  emulator::block->late.push_back({barrier, thread, std::move(land)});
}

inline void land_copies_of(const Mbarrier* barrier) {
  auto& late = emulator::block->late;
  for (size_t i = 0; i < late.size();) {
    if (late[i].barrier != barrier) {
      ++i;
      continue;
    }
    const auto land = std::move(late[i].happen);
    late.erase(late.begin() + i);
    land();
  }
}

inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  check(barrier);
  emulator::expect(parity <= 1, "a parity is 0 or 1");
  auto over = [barrier, parity] {
    if (barrier->parity == parity) land_copies_of(barrier);
    return barrier->parity != parity;
  };
  if (!over()) emulator::wait_until(over);
}

inline void mbarrier_arrive_after_copies(Mbarrier* barrier) {
  emulator::Fiber& fiber = *emulator::block->running;
  emulator::expect(fiber.copy_groups.empty(), "copies of a committed group and of a barrier are mixed");
  start_copy(barrier, &fiber, [barrier, copies = std::move(fiber.open_group)] {
    for (const emulator::Copy& copy : copies) emulator::perform(copy);
    mbarrier_arrive(barrier);
  });
  fiber.open_group.clear();
}

// ---------------------------------------------------------------- tensor copies

struct TensorMap {
  const char* base;
  uint64_t sizes[3], strides[2];
  uint32_t box[2];
};

// Refuses what the driver refuses.
inline bool encode_tensor_map(TensorMap* map, const void* base, const uint64_t (&sizes)[3],
                              const uint64_t (&strides)[2], uint32_t box0, uint32_t box1) {
  *map = {static_cast<const char*>(base), {}, {}, {box0, box1}};
  std::copy(sizes, sizes + 3, map->sizes);
  std::copy(strides, strides + 2, map->strides);
  bool valid = reinterpret_cast<uintptr_t>(base) % 16 == 0 && box0 * 2 <= 128 && box0 * 2 % 16 == 0 &&
               box0 > 0 && box1 > 0 && box1 <= 256;
  for (const uint64_t size : sizes) valid = valid && size > 0 && size <= uint64_t{1} << 32;
  for (const uint64_t stride : strides) valid = valid && stride % 16 == 0 && stride < uint64_t{1} << 40;
  return valid;
}

inline void prefetch_tensor_map(const TensorMap*) {}

// The 128-byte swizzle works on addresses: bits 4 to 6 change by bits 7 to 9.
inline char* swizzled(const char* address) {
  const uintptr_t a = reinterpret_cast<uintptr_t>(address);
  return reinterpret_cast<char*>(a ^ (a >> 7 & 7) << 4);
}

inline void tensor_copy(void* destination, const TensorMap* map, int32_t i0, int32_t i1, int32_t i2,
                        Mbarrier* barrier) {
  emulator::expect(reinterpret_cast<uintptr_t>(destination) % 1024 == 0,
                   "a tensor copy to a misaligned atom");
  char* to = static_cast<char*>(destination);
  // A copy of the map: kernel parameters live on the stack of a thread, which may be done by then.
  start_copy(barrier, nullptr, [=, map = *map] {
    for (uint32_t r = 0; r < map.box[1]; ++r) {
      for (uint32_t c = 0; c < map.box[0]; ++c) {
        const int64_t x = int64_t{i0} + c, y = int64_t{i1} + r, z = i2;
        const bool inside = x >= 0 && y >= 0 && z >= 0 && x < static_cast<int64_t>(map.sizes[0]) &&
                            y < static_cast<int64_t>(map.sizes[1]) && z < static_cast<int64_t>(map.sizes[2]);
        uint16_t element = 0;
        if (inside) std::memcpy(&element, map.base + 2 * x + y * map.strides[0] + z * map.strides[1], 2);
        std::memcpy(swizzled(to + r * 128 + c * 2), &element, 2);
      }
    }
    const size_t chunk = (to - static_cast<char*>(shared_memory())) / 16;
    std::fill_n(emulator::block->written.begin() + chunk, map.box[1] * 128 / 16, 0);
    barrier->bytes -= static_cast<int32_t>(map.box[0] * map.box[1] * 2);
    end_phase_if_complete(barrier);
  });
}

// ---------------------------------------------------------------- wgmma

inline void fence_shared_for_wgmma() { emulator::block->running->fenced = emulator::block->clock; }

inline uint64_t wgmma_matrix(const void* data, uint32_t leading, uint32_t stride) {
  const uintptr_t offset = static_cast<const char*>(data) - static_cast<const char*>(shared_memory());
  emulator::expect(offset % 1024 == 0, "a wgmma matrix that does not begin with an atom");
  return uint64_t{1} << 62 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | offset >> 4;
}
inline uint64_t wgmma_advance(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

// Element (row, term) of a matrix in shared memory, for threads that have fenced what was written until then.
template <class T>
float wgmma_element(uint64_t matrix, bool mn_major, int row, int term, uint64_t fenced) {
  const int64_t begin = (matrix & 0x3fff) << 4, leading = (matrix >> 16 & 0x3fff) << 4,
                stride = (matrix >> 32 & 0x3fff) << 4;
  const int64_t offset = mn_major ? row / 64 * leading + row % 64 * 2 + term / 8 * stride + term % 8 * 128
                                  : row / 8 * stride + row % 8 * 128 + term * 2;
  const char* shared = static_cast<const char*>(shared_memory());
  const char* address = swizzled(shared + begin + offset);
  emulator::expect(emulator::block->written[(address - shared) / 16] <= fenced,
                   "wgmma reads what cp.async wrote without fence.proxy.async");
  T element;
  std::memcpy(&element, address, sizeof element);
  return to_float(element);
}

// A matrix that is K-major has no leading offset, and PTX assumes a 1 in its place.
inline void check_leading(uint64_t matrix, bool mn_major) {
  emulator::expect(mn_major || (matrix >> 16 & 0x3fff) == 1, "a K-major matrix with a leading offset");
}

inline void wgmma_begin() {
  emulator::expect(emulator::block->running->open_products.empty(), "wgmma_begin before wgmma_commit");
  emulator::block->running->wgmma_begun = true;
}

// By one lane for its warp, the first one.
template <class T, bool kMnMajorA, bool kMnMajorB, int kSums>
void wgmma(float (&sum)[kSums], uint64_t a, uint64_t b, bool accumulate) {
  struct Lane {
    emulator::Fiber* fiber;
    float* sum;
    uint64_t a, b;
    bool accumulate;
  } mine{emulator::block->running, sum, a, b, accumulate};
  emulator::expect(mine.fiber->wgmma_begun, "wgmma without wgmma_begin");
  check_leading(a, kMnMajorA);
  check_leading(b, kMnMajorB);
  emulator::warp_collective(
      +[](void* const* lanes, uint32_t) {
        const Lane first = *static_cast<Lane*>(lanes[0]);
        std::array<float*, 32> sums;
        uint64_t fenced = first.fiber->fenced;
        for (int i = 0; i < 32; ++i) {
          const auto* lane = static_cast<Lane*>(lanes[i]);
          emulator::expect(lane->a == first.a && lane->b == first.b && lane->accumulate == first.accumulate,
                           "the lanes of a warp are in different operations");
          sums[i] = lane->sum;
          fenced = std::min(fenced, lane->fiber->fenced);
        }
        auto compute = [=, first_row = static_cast<int>(threadIdx.x / 32 % 4 * 16)] {
          constexpr int kColumns = 2 * kSums;
          float right[kColumns][16];
          for (int n = 0; n < kColumns; ++n) {
            for (int k = 0; k < 16; ++k) right[n][k] = wgmma_element<T>(first.b, kMnMajorB, n, k, fenced);
          }
          for (int r = 0; r < 16; ++r) {
            auto sum_of = [&](int n) -> float& {
              return sums[r % 8 * 4 + n % 8 / 2][n / 8 * 4 + r / 8 * 2 + n % 2];
            };
            float left[16];
            for (int k = 0; k < 16; ++k) {
              left[k] = wgmma_element<T>(first.a, kMnMajorA, first_row + r, k, fenced);
            }
            for (int n = 0; n < kColumns; ++n) {
              sum_of(n) = add_products(first.accumulate ? sum_of(n) : 0.0f, left, right[n]);
            }
          }
        };
        if (emulator::copies == emulator::Copies::kLate) return compute();
        first.fiber->open_products.push_back(compute);
      },
      &mine);
}

inline void wgmma_commit() {
  emulator::Fiber& fiber = *emulator::block->running;
  fiber.wgmma_begun = false;
  fiber.products.push_back(std::move(fiber.open_products));
  fiber.open_products.clear();
}
template <int kPending>
void wgmma_wait() {
  auto& products = emulator::block->running->products;
  while (products.size() > kPending) {
    for (const auto& compute : products.front()) compute();
    products.erase(products.begin());
  }
  __syncwarp();  // .sync: no lane goes on before the products of its warp are done
}
template <int kCount>
void pin(float (&)[kCount]) {}
inline void pin(int&) {}

// ---------------------------------------------------------------- the rest

inline void stmatrix(void* row, const uint32_t (&matrix)[4]) {
  emulator::expect(reinterpret_cast<uintptr_t>(row) % 16 == 0, "stmatrix to a misaligned row");
  struct Lane {
    char* row;
    const uint32_t* matrix;
  } mine{static_cast<char*>(row), matrix};
  emulator::warp_collective(
      +[](void* const* lanes, uint32_t) {
        for (int i = 0; i < 32; ++i) {
          for (int m = 0; m < 4; ++m) {
            char* to = static_cast<Lane*>(lanes[8 * m + i / 4])->row + i % 4 * 4;
            std::memcpy(to, &static_cast<Lane*>(lanes[i])->matrix[m], 4);
          }
        }
      },
      &mine);
}

template <int kRegisters>
void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "what setmaxnreg takes");
}
template <int kRegisters>
void take_registers() {
  give_registers<kRegisters>();
}

}  // namespace cuda
}  // namespace paddle_moe
