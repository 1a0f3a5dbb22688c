// In which order a persistent grid takes the tiles of a grouped GEMM.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace paddle_moe {
namespace cuda {

struct TilePosition {
  int32_t row_tile;
  int32_t column_tile;
};

// Tile number `index` of row_tiles x column_tiles; number b + i * gridDim.x is the i-th of block b. Tiles
// that run at the same time lie in a nearly square area, so that the L2 serves most reads of rows and
// weights: in groups of kRowTiles row tiles, a group goes through its row tiles, then to the next column
// tile.
struct TileSchedule {
  static constexpr int32_t kRowTiles = 8;

  int32_t row_tiles, column_tiles;

  __host__ __device__ constexpr int32_t size() const { return row_tiles * column_tiles; }

  __host__ __device__ constexpr TilePosition operator[](int32_t index) const {
    const int32_t group = index / (kRowTiles * column_tiles);
    const int32_t first = group * kRowTiles;
    const int32_t rows = row_tiles - first < kRowTiles ? row_tiles - first : kRowTiles;
    const int32_t within = index - first * column_tiles;
    return {first + within % rows, within / rows};
  }
};

}  // namespace cuda
}  // namespace paddle_moe
