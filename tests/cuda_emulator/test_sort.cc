// The sort against a plain loop: one block and several, few experts and more than kernel parameters hold.
#include <cstring>

#include "cuda/sort.h"
#include "emulated.h"

using namespace paddle_moe;

namespace {

template <class T>
struct Array {
  explicit Array(int64_t count) : bytes(count * sizeof(T)) {}
  T* get() const { return reinterpret_cast<T*>(bytes.get()); }
  const T& operator[](int64_t i) const { return get()[i]; }
  Fenced bytes;
};

void check(Random& random, int num_slots, int num_experts, int block_m) {
  std::vector<int64_t> ids(num_slots);
  const int64_t first_expert = pick(random, 0, 9);
  for (int64_t& id : ids) id = first_expert + pick(random, -2, num_experts + 1);
  for (int i = 0; i < num_slots / 3; ++i) ids[i] = first_expert + num_experts / 2;  // one hot expert

  std::vector<Expert> experts(num_experts);
  for (Expert& expert : experts) expert.gate_bias = expert.down_bias = expert.down.data = &expert;
  const int64_t most_tiles = cuda::max_tiles(num_slots, num_experts, block_m);
  const Array<int32_t> local(num_slots), position(num_slots), row_slot(num_slots), rows(num_experts),
      first_row(num_experts);
  const Array<int32_t> num_tiles(1), counts(cuda::sort_scratch(num_slots, num_experts));
  const Array<cuda::Tile> tiles(most_tiles);
  const Array<Expert> table(num_experts);
  cuda::Sort sort;
  sort.routing_table = ids.data();
  sort.routing_table_dtype = DType::kInt64;
  sort.first_expert = first_expert;
  sort.num_experts = num_experts;
  sort.num_slots = num_slots;
  sort.block_m = block_m;
  sort.local_expert = local.get();
  sort.position = position.get();
  sort.row_slot = row_slot.get();
  sort.expert_rows = rows.get();
  sort.first_row = first_row.get();
  sort.tiles = tiles.get();
  sort.num_tiles = num_tiles.get();
  sort.experts = table.get();
  sort.counts = counts.get();
  emulator::num_launches = 0;
  cuda::sort_slots(sort, experts, nullptr);
  const int launches =
      (num_slots <= cuda::kSlotsOfOneBlock ? 1 : 3) + (num_experts > 320 ? (num_experts - 1) / 320 : 0);
  CHECK(emulator::num_launches == launches, "%d launches instead of %d for %d slots, %d experts",
        emulator::num_launches, launches, num_slots, num_experts);

  int wrong = 0, row = 0, tile = 0;
  for (int e = 0; e < num_experts; ++e) {
    wrong += std::memcmp(&table[e], &experts[e], sizeof(Expert)) != 0;
    const int begin = row;
    for (int slot = 0; slot < num_slots; ++slot) {
      if (ids[slot] - first_expert != e) continue;
      wrong += local[slot] != e || position[slot] != row || row_slot[row] != slot;
      ++row;
    }
    wrong += rows[e] != row - begin || first_row[e] != begin;
    for (int first = begin; first < row; first += block_m, ++tile) {
      wrong += tile >= most_tiles || tiles[tile].expert != e || tiles[tile].first_row != first ||
               tiles[tile].num_rows != std::min(block_m, row - first);
    }
  }
  for (int slot = 0; slot < num_slots; ++slot) {
    const int64_t e = ids[slot] - first_expert;
    if (e < 0 || e >= num_experts) wrong += local[slot] != -1 || position[slot] != -1;
  }
  CHECK(wrong == 0 && num_tiles[0] == tile, "%d wrong, %d tiles instead of %d, for %d slots, %d experts",
        wrong, num_tiles[0], tile, num_slots, num_experts);
}

}  // namespace

int main() {
  Random random(1);
  on_every_schedule([&] {
    check(random, 1, 1, 16);
    check(random, 31, 3, 16);
    check(random, 1000, 33, 64);
    check(random, 100, 129, 64);
    check(random, 700, 1500, 16);
  });
  emulator::order = emulator::Order::kRandom;
  check(random, cuda::kSlotsOfOneBlock, 7, 128);
  check(random, cuda::kSlotsOfOneBlock + 1, 40, 128);
  check(random, 150000, 330, 128);
  return finish();
}
