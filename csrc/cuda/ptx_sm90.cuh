// The PTX of Hopper (sm_90a) that ptx.cuh does not have: mbarrier, tensor copies (TMA) and wgmma. Like
// ptx.cuh it has a twin in tests/cuda_emulator.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"

#ifdef PADDLE_MOE_CUDA_EMULATOR
#include "emulator_sm90.h"
#else
#include <cuda.h>

namespace paddle_moe {
namespace cuda {

using Mbarrier = uint64_t;
using TensorMap = CUtensorMap;

// ---------------------------------------------------------------- tensor maps, on the host

// Describes 16-bit elements at base[i0 + i1 * strides[0] + i2 * strides[1]] (strides in bytes) for copies of
// boxes [box1, box0] of one i2 into shared memory with the 128-byte swizzle; what lies outside of `sizes` is
// filled with zeros. False when the driver has no tensor maps or refuses this one.
inline bool encode_tensor_map(TensorMap* map, const void* base, const uint64_t (&sizes)[3],
                              const uint64_t (&strides)[2], uint32_t box0, uint32_t box1) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // From the runtime, so that nothing has to be linked against the driver.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (!encode) return false;
  const uint32_t box[3] = {box0, box1, 1}, element_strides[3] = {1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(base), sizes, strides, box,
                element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// ---------------------------------------------------------------- barriers in shared memory

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Makes initialised barriers known to the copy engine, which reaches them through the async proxy; a
// __syncthreads() follows for the other threads.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and the phase also waits for this many bytes of tensor copies.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Arrives when all earlier cp.async of this thread have landed.
__device__ __forceinline__ void mbarrier_arrive_after_copies(Mbarrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Until the phase of this parity is over. A new barrier is in phase 0, and the one before it counts as over.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---------------------------------------------------------------- tensor copies

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// One thread copies the box that begins at (i0, i1, i2).
__device__ __forceinline__ void tensor_copy(void* destination, const TensorMap* map, int32_t i0, int32_t i1,
                                            int32_t i2, Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(destination)),
      "l"(map), "r"(i0), "r"(i1), "r"(i2), "r"(shared_address(barrier))
      : "memory");
}

// ---------------------------------------------------------------- wgmma

// Between ordinary writes to shared memory (cp.async included), once they are known to have landed, and
// reads of them by wgmma.
__device__ __forceinline__ void fence_shared_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `kPending` of the youngest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler takes these values for changed here. After wgmma_wait it must not have read the sums earlier;
// behind the last use of the sums it must not choose the sums' registers to suit what follows, which would
// put copies, and waits for them, into the loop of wgmma.
template <int kCount>
__device__ __forceinline__ void pin(float (&value)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(value[i])::"memory");
}
__device__ __forceinline__ void pin(int& value) { asm volatile("" : "+r"(value)); }

// A matrix of 16-bit elements in shared memory with the 128-byte swizzle, as wgmma reads it. Rows of 64
// elements (128 bytes) lie one behind the other; 8 of them are an atom of 1024 bytes, to which it is aligned.
//   K-major   a row holds 64 terms of one matrix row. stride: bytes from 8 matrix rows to the next 8.
//   MN-major  a row holds one term of 64 matrix rows. stride: from 8 terms to the next 8; leading: from 64
//             matrix rows to the next 64.
__device__ __forceinline__ uint64_t wgmma_matrix(const void* data, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | shared_address(data) >> 4;
}
// The same matrix from `bytes` further on.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t matrix, uint32_t bytes) {
  return matrix + (bytes >> 4);
}

#define PADDLE_MOE_SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define PADDLE_MOE_SUMS_16(i) \
  PADDLE_MOE_SUMS_4(i), PADDLE_MOE_SUMS_4(i + 4), PADDLE_MOE_SUMS_4(i + 8), PADDLE_MOE_SUMS_4(i + 12)
#define PADDLE_MOE_SUMS_64(i) \
  PADDLE_MOE_SUMS_16(i), PADDLE_MOE_SUMS_16(i + 16), PADDLE_MOE_SUMS_16(i + 32), PADDLE_MOE_SUMS_16(i + 48)
#define PADDLE_MOE_REGISTERS_64                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
  "%58, %59, %60, %61, %62, %63"
#define PADDLE_MOE_REGISTERS_128                                                   \
  PADDLE_MOE_REGISTERS_64                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "  \
  "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "    \
  "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, " \
  "%121, %122, %123, %124, %125, %126, %127"
#define PADDLE_MOE_WGMMA_128(type)                                                              \
  asm volatile(                                                                                 \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" PADDLE_MOE_REGISTERS_64 \
      "}, %64, %65, accumulate, 1, 1, %67, %68;\n}"                                             \
      : PADDLE_MOE_SUMS_64(0)                                                                   \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMnMajorA ? 1 : 0), "n"(kMnMajorB ? 1 : 0))
#define PADDLE_MOE_WGMMA_256(type)                                                               \
  asm volatile(                                                                                  \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"                            \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" PADDLE_MOE_REGISTERS_128 \
      "}, %128, %129, accumulate, 1, 1, %131, %132;\n}"                                          \
      : PADDLE_MOE_SUMS_64(0), PADDLE_MOE_SUMS_64(64)                                            \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMnMajorA ? 1 : 0), "n"(kMnMajorB ? 1 : 0))

// By one warpgroup: sum[64 x n] = a[64 x 16] b[16 x n], plus the old sum if `accumulate`, where n is twice
// the sums of a thread, 128 or 256. Asynchronous: between wgmma_begin() and wgmma_commit().
// Thread t of the warpgroup holds rows 16 (t / 32) + t % 32 / 4 and + 8: sum[4 j ...] are columns 8 j + 2 (t
// % 4) and the next one of the first row, then of the second.
template <class T, bool kMnMajorA, bool kMnMajorB, int kSums>
__device__ __forceinline__ void wgmma(float (&sum)[kSums], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kSums == 64 || kSums == 128, "n is 128 or 256");
  constexpr bool kIsBf16 = std::is_same<T, Bf16>::value;
  if constexpr (kSums == 64 && kIsBf16)
    PADDLE_MOE_WGMMA_128("bf16");
  else if constexpr (kSums == 64)
    PADDLE_MOE_WGMMA_128("f16");
  else if constexpr (kIsBf16)
    PADDLE_MOE_WGMMA_256("bf16");
  else
    PADDLE_MOE_WGMMA_256("f16");
}

#undef PADDLE_MOE_WGMMA_256
#undef PADDLE_MOE_WGMMA_128
#undef PADDLE_MOE_REGISTERS_128
#undef PADDLE_MOE_REGISTERS_64
#undef PADDLE_MOE_SUMS_64
#undef PADDLE_MOE_SUMS_16
#undef PADDLE_MOE_SUMS_4

// ---------------------------------------------------------------- the rest

// Four 8x8 matrices of 16-bit elements, in the order in which wgmma leaves them, to shared memory; lane i
// passes the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&matrix)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(matrix[0]), "r"(matrix[1]), "r"(matrix[2]), "r"(matrix[3])
               : "memory");
}

// This warpgroup gives registers back, or takes them.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "what setmaxnreg takes");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "what setmaxnreg takes");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace cuda
}  // namespace paddle_moe
#endif
