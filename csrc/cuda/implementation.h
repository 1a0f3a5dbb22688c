// Which grouped GEMM a problem gets, and what else the forward and the backward of mixture_of_experts share
// on the host.
#pragma once

#include "chunks.h"
#include "cuda/common.cuh"
#include "cuda/grouped_gemm.h"

namespace paddle_moe {
namespace cuda {

constexpr int64_t kMinBlockM = 16;                 // of all implementations
constexpr int64_t kChunkBytes = int64_t{4} << 30;  // of rows, where chunk_size is left to us

inline void expect(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  expect(cudaGetDevice(&device), "cudaGetDevice");
  expect(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  expect(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

// The implementation of the grouped GEMM that a problem gets on the current device.
struct Implementation {
  int (*block_m)(const Problem&, int64_t);
  void (*run)(Stage, const Problem&, const GroupedGemm&, Stream);
};

// rows: the address of other rows that it reads or writes, which begin at multiples of `stride` elements.
inline Implementation choose_implementation(const Problem& p, const void* rows, int64_t stride) {
  if (p.dtype == DType::kFloat32) return {block_m_fp32, grouped_gemm_fp32};
  const int capability = compute_capability();
  if (capability < 80) {
    throw std::runtime_error("mixture_of_experts in " + std::string(dtype_name(p.dtype)) +
                             " needs a GPU of compute capability 8.0 or higher, got " +
                             std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
#ifndef PADDLE_MOE_NO_SM90A  // not compiled for it
  if (capability == 90 && is_aligned(rows, stride) && accepts_sm90(p))
    return {block_m_sm90, grouped_gemm_sm90};
#endif
  return {block_m_sm80, grouped_gemm_sm80};
}

inline const void* advance(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * static_cast<int64_t>(dtype_size(dtype));
}

inline void* advance(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * static_cast<int64_t>(dtype_size(dtype));
}

}  // namespace cuda
}  // namespace paddle_moe
