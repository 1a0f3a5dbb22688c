// How many tokens a back end takes at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moe.h"

namespace paddle_moe {

constexpr int64_t kMaxChunkSlots = int64_t{1} << 30;  // positions of slots (token, k) are 32-bit
constexpr int64_t kMinChunkTokens = 64;

// From the bytes that a token takes in the workspace. Where chunk_size is left to us, a chunk is as large as
// chunk_bytes allow: every chunk reads the weights anew, so fewer are better.
inline int64_t chunk_tokens(const Problem& p, int64_t bytes_per_token, int64_t chunk_bytes) {
  const int64_t wanted =
      p.chunk_size > 0 ? p.chunk_size : std::max(kMinChunkTokens, chunk_bytes / bytes_per_token);
  return std::min({wanted, std::max<int64_t>(1, p.num_tokens), kMaxChunkSlots / p.top_k});
}

}  // namespace paddle_moe
