// The Hopper path: in which order tiles are taken, which weights it accepts, and layers of integers, which
// must be exact, through barriers, tensor copies and wgmma.
#include <set>

#include "cuda/grouped_gemm.h"
#include "cuda/tile_schedule.h"
#include "emulated.h"

using namespace paddle_moe;

namespace {

void check_schedule(int row_tiles, int column_tiles) {
  const cuda::TileSchedule tiles{row_tiles, column_tiles};
  std::set<std::pair<int, int>> seen;
  for (int i = 0; i < tiles.size(); ++i) {
    const cuda::TilePosition p = tiles[i];
    CHECK(p.row_tile >= 0 && p.row_tile < row_tiles && p.column_tile >= 0 && p.column_tile < column_tiles,
          "tile %d of %d x %d is (%d, %d)", i, row_tiles, column_tiles, p.row_tile, p.column_tile);
    seen.insert({p.row_tile, p.column_tile});
    CHECK(p.row_tile / 8 == i / (8 * column_tiles), "tile %d of %d x %d is not in its group", i, row_tiles,
          column_tiles);
  }
  CHECK(static_cast<int>(seen.size()) == row_tiles * column_tiles, "%d x %d has only %zu tiles", row_tiles,
        column_tiles, seen.size());
}

void check_layer(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
                 ::Layout layout, bool permuted) {
  const Layer layer(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted);
  const Problem problem = resolve(layer.arguments);
  CHECK(cuda::accepts_sm90(problem), "H=%d I=%d is refused", hidden, inter);
  const int wrong = count_differences(layer, run_emulated(problem));
  CHECK(wrong == 0, "%d values differ for T=%d H=%d I=%d E=%d K=%d %s layout %d permuted %d", wrong, tokens,
        hidden, inter, experts, top_k, dtype_name(dtype), static_cast<int>(layout), permuted);
}

}  // namespace

int main() {
  for (int row_tiles : {0, 1, 7, 8, 9, 16, 4099}) {
    for (int column_tiles : {1, 2, 13}) check_schedule(row_tiles, column_tiles);
  }
  emulator::compute_capability = 90;
  Random random(1);
  on_every_schedule([&] {
    for (bool permuted : {false, true}) {
      for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        const auto layout = static_cast<::Layout>(pick(random, 0, 2));
        // Tiles of 64 rows: none or few, one and a bit; of 128 rows: the same.
        check_layer(random, pick(random, 0, 5), 200, 72, 3, 2, dtype, layout, permuted);
        check_layer(random, 80, 72, 8, 3, 1, dtype, layout, permuted);
        check_layer(random, 150, 136, 264, 2, 2, dtype, layout, permuted);
      }
    }
  });
  return finish();
}
