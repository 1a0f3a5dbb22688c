// Every small shape, dtype and weight layout against the naive loop, on every instruction set of this
// processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "layer.h"

using paddle_moe::DType;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

void check(Random& random, int tokens, int hidden, int inter, int experts, int top_k, DType dtype,
           Layout layout, bool permuted, int num_threads = 1) {
  const Layer layer(random, tokens, hidden, inter, experts, top_k, dtype, layout, permuted);
  const int wrong = count_differences(layer, run(layer, num_threads));
  CHECK(wrong == 0, "%d values differ for T=%d H=%d I=%d E=%d K=%d %s layout %d permuted %d threads %d",
        wrong, tokens, hidden, inter, experts, top_k, paddle_moe::dtype_name(dtype), static_cast<int>(layout),
        permuted, num_threads);
}

void small_shapes() {
  Random random(1);
  for (DType dtype : kDTypes) {
    for (bool permuted : {false, true}) {
      for (int hidden : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129}) {
        for (int inter : {1, 2, 3, 8, 17, 32, 63, 64, 65}) {
          const Layout layout = static_cast<Layout>(pick(random, 0, 2));
          check(random, pick(random, 0, 13), hidden, inter, pick(random, 1, 4), pick(random, 1, 2), dtype,
                layout, permuted, pick(random, 1, 3));
        }
      }
    }
  }
}

// Past every block size of the kernels: rows of a tile, depth and columns of a block, tokens of a copy or
// combine task.
void past_block_sizes() {
  Random random(2);
  for (DType dtype : kDTypes) {
    for (bool permuted : {false, true}) {
      check(random, 450, 20, 9, 2, 1, dtype, Layout::kList, permuted, 3);
      check(random, 5, 257, 6, 2, 2, dtype, Layout::kSeparate, permuted, 2);
      check(random, 5, 1031, 6, 2, 2, dtype, Layout::kStacked, permuted, 2);
      check(random, 5, 6, 1031, 2, 2, dtype, Layout::kStacked, permuted, 3);
      check(random, 1, 2, 16500, 1, 1, dtype, Layout::kStacked, permuted);
      check(random, 40, 8, 8, 300, 2, dtype, Layout::kList, permuted, 2);
      for (int tokens = 14; tokens < 40; ++tokens)
        check(random, tokens, 5, 4, 1, 1, dtype, Layout::kList, permuted);
    }
    // As many columns as the sums of 11 rows leave, and as many blocks of the depth as need sums of their
    // own.
    const int64_t width = paddle_moe::cpu::block_columns(paddle_moe::cpu::Storage::kRows, 11);
    check(random, 11, 514, static_cast<int>(width), 1, 1, dtype, Layout::kStacked, false);
    check(random, 11, static_cast<int>(2 * width), 514, 1, 1, dtype, Layout::kList, false);
  }
}

void quantised() {
  Random random(5);
  for (DType type : {DType::kInt8, DType::kFloat8E4M3, DType::kInt4}) {
    for (bool permuted : {false, true}) {
      if (type == DType::kInt4 && !permuted) continue;
      for (int hidden : {1, 7, 16, 33, 127, 128, 129, 300}) {
        for (int inter : {1, 9, 64, 65, 130, 257}) {
          for (int most_tokens : {3, 70}) {
            Layer layer(random, pick(random, 1, most_tokens), hidden, inter, 2, 1,
                        kDTypes[pick(random, 0, 2)], static_cast<Layout>(pick(random, 0, 2)), permuted);
            layer.quantise(random, type);
            CHECK(count_differences(layer, run(layer, 2)) == 0, "T=%d H=%d I=%d %s %s layout %d permuted %d",
                  layer.tokens, hidden, inter, paddle_moe::dtype_name(layer.dtype),
                  paddle_moe::dtype_name(type), static_cast<int>(layer.layout), permuted);
          }
        }
      }
      for (DType dtype : kDTypes) {
        Layer wide(random, 1, 3, paddle_moe::cpu::kMaxStreamedColumns, 1, 1, dtype, Layout::kStacked,
                   permuted);
        wide.quantise(random, type);
        CHECK(count_differences(wide, run(wide, 1)) == 0, "wide %s", paddle_moe::dtype_name(type));
        for (int tokens : {1, 5, 9}) {
          Layer deep(random, tokens, 2304, 6, 1, 1, dtype, Layout::kList, permuted);
          deep.quantise(random, type);
          CHECK(count_differences(deep, run(deep, 1)) == 0, "deep %s", paddle_moe::dtype_name(type));
        }
      }
    }
  }
}

// Past a block of the depth and the columns of every tile; more rows than stay in L2, of several tiles.
void prepacked() {
  Random random(6);
  auto check_one = [&](int tokens, int hidden, int inter, DType dtype, Layout layout, int threads) {
    const int even = dtype == DType::kBFloat16 ? 2 : 1;
    Layer layer(random, tokens, even * hidden, even * inter, 3, 2, dtype, layout, false);
    layer.prepack();
    CHECK(count_differences(layer, run(layer, threads)) == 0, "T=%d H=%d I=%d %s layout %d", tokens,
          layer.hidden, layer.inter, paddle_moe::dtype_name(dtype), static_cast<int>(layout));
  };
  for (DType dtype : kDTypes) {
    for (int hidden : {1, 7, 16, 33, 64, 129, 300}) {
      for (int inter : {1, 9, 31, 64, 95, 130, 257}) {
        for (int most_tokens : {3, 70})
          check_one(pick(random, 0, most_tokens), hidden, inter, dtype,
                    static_cast<Layout>(pick(random, 0, 2)), pick(random, 1, 3));
      }
    }
    check_one(400, 800, 160, dtype, Layout::kStacked, 2);
    check_one(400, 40, 1031, dtype, Layout::kList, 3);
  }
}

// Also past groups of scales, along both dimensions.
void quantised_and_prepacked() {
  Random random(7);
  const auto check_one = [&](int tokens, int hidden, int inter, DType dtype, DType type, Layout layout) {
    const int inputs = Layer::row_inputs(type);
    hidden = (hidden + inputs - 1) / inputs * inputs;
    inter = (inter + inputs - 1) / inputs * inputs;
    Layer layer(random, tokens, hidden, inter, 3, 2, dtype, layout,
                type == DType::kInt4 || pick(random, 0, 1) == 1);
    layer.quantise(random, type);
    layer.prepack();
    CHECK(count_differences(layer, run(layer, 2)) == 0, "T=%d H=%d I=%d %s %s layout %d", tokens, hidden,
          inter, paddle_moe::dtype_name(dtype), paddle_moe::dtype_name(type), static_cast<int>(layout));
  };
  for (DType type : {DType::kInt8, DType::kFloat8E4M3, DType::kInt4}) {
    for (int hidden : {2, 33, 129, 300}) {
      for (int inter : {2, 64, 130, 257}) {
        for (int most_tokens : {3, 40})
          check_one(pick(random, 0, most_tokens), hidden, inter, kDTypes[pick(random, 0, 2)], type,
                    static_cast<Layout>(pick(random, 0, 2)));
      }
    }
    check_one(300, 800, 40, DType::kFloat32, type, Layout::kStacked);
    check_one(100, 40, 531, DType::kBFloat16, type, Layout::kList);
  }
}

void ids_at_the_limits() {
  Random random(3);
  Layer layer(random, 64, 9, 7, 3, 2, DType::kFloat32, Layout::kList, false);
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
  const int64_t ids[] = {kMin, kMin + 1,        kMin + 5,         -1,       0,   4, 5, 6, 7, 8,
                         9,    (1ll << 32) + 5, -(1ll << 32) + 5, kMax - 1, kMax};
  layer.first_expert = layer.arguments.experts_min = 5;
  layer.arguments.experts_max = 7;
  for (int64_t& id : layer.ids) id = ids[pick(random, 0, static_cast<int>(std::size(ids)) - 1)];
  CHECK(count_differences(layer, run(layer, 2)) == 0, "64-bit ids");

  std::vector<int32_t> narrow;
  for (int64_t& id : layer.ids) {
    const int32_t limits[] = {
        std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max(), 4, 5, 7, 8};
    narrow.push_back(limits[pick(random, 0, 5)]);
    id = narrow.back();
  }
  layer.arguments.routing_table = {narrow.data(), DType::kInt32, {64, 2}, {}};
  CHECK(count_differences(layer, run(layer, 2)) == 0, "32-bit ids");
}

void chunks() {
  Random random(4);
  Layer layer(random, 50, 13, 11, 3, 2, DType::kBFloat16, Layout::kList, false);
  for (int64_t chunk_size :
       {int64_t{1}, int64_t{3}, int64_t{49}, int64_t{50}, int64_t{51}, int64_t{1} << 62}) {
    layer.arguments.chunk_size = chunk_size;
    CHECK(count_differences(layer, run(layer, 2)) == 0, "chunk_size %lld",
          static_cast<long long>(chunk_size));
  }
}

// What blocks of columns leave in a thread's scratch: results, and running sums of the same size where
// weights are streamed.
void blocks_fit_their_scratch() {
  using namespace paddle_moe::cpu;
  for (const Storage storage : {Storage::kRows, Storage::kColumns, Storage::kPanels, Storage::kStrided}) {
    for (int64_t rows = 1; rows <= kBlockRows; ++rows) {
      const int64_t width = block_columns(storage, rows), floats = rows * sums_stride(width);
      const bool streamed = storage == Storage::kRows && !is_packed(storage, rows);
      CHECK(floats <= kResultFloats && (!streamed || floats * kUnitBytes <= kPackedBytes),
            "%d rows of 2 x %d columns", static_cast<int>(rows), static_cast<int>(width));
    }
  }
}

// Weights that are read, or many rows that are multiplied with few weights.
void threads_worth_waking() {
  paddle_moe::Problem problem{};
  problem.hidden_size = problem.intermediate_size = 64;
  for (const DType dtype : {DType::kFloat32, DType::kInt4}) {
    problem.weight_dtype = dtype;
    const int64_t bytes = dtype == DType::kInt4 ? 3 * 64 * 64 / 2 : 3 * 64 * 64 * 4;
    for (const auto& [experts, rows] : {std::pair<int64_t, int64_t>{0, 0}, {1, 1}, {64, 64}, {8, 100000}}) {
      const int64_t by_bytes = experts * bytes / 262144, by_rows = rows * 3 * 64 * 64 / 1048576;
      const int64_t threads = paddle_moe::cpu::useful_threads(problem, experts, rows);
      CHECK(threads == 1 + std::max(by_bytes, by_rows), "%d threads for %d experts and %d rows",
            static_cast<int>(threads), static_cast<int>(experts), static_cast<int>(rows));
    }
  }
}

// A GEMM by weights stored column by column writes its two blocks of columns and nothing beside them, where
// another thread may have its own results.
void results_stay_in_their_blocks() {
  using namespace paddle_moe;
  using namespace paddle_moe::cpu;
  constexpr int64_t kColumns = kPackedColumns, kStride = 2 * kColumns + 32, kMaxRows = 9;
  const Operand bf16_operand = kernels().bf16_dot ? Operand::kBf16Pairs : Operand::kFloat32;
  const std::pair<DType, Operand> cases[] = {{DType::kFloat32, Operand::kFloat32},
                                             {DType::kBFloat16, bf16_operand},
                                             {DType::kInt8, bf16_operand},
                                             {DType::kInt8, Operand::kInt16}};
  for (const auto& [weight_dtype, operand] : cases) {
    const bool integers = weight_dtype == DType::kInt8;
    const DType dtype = weight_dtype == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    for (const int64_t depth : {64, 2176}) {
      // All activations and weights are 1.
      const std::vector<float> ones(depth, 1.0f);
      const std::vector<uint16_t> bf16_ones(depth, 0x3f80);
      const std::vector<int8_t> int8_ones(2 * kColumns * depth, 1);
      const std::vector<float> fp32_weights(2 * kColumns * depth, 1.0f);
      const std::vector<uint16_t> bf16_weights(2 * kColumns * depth, 0x3f80);
      const void* weights = integers                          ? static_cast<const void*>(int8_ones.data())
                            : weight_dtype == DType::kFloat32 ? static_cast<const void*>(fp32_weights.data())
                                                              : bf16_weights.data();
      const void* activations =
          dtype == DType::kFloat32 ? static_cast<const void*>(ones.data()) : bf16_ones.data();
      const int64_t row_stride = depth + 128;  // units, enough for any operand
      std::vector<float> rows(kMaxRows * row_stride), scratch(kPackedBytes / sizeof(float));
      for (int64_t r = 0; r < kMaxRows; ++r)
        kernels().copy_row(activations, dtype, depth, operand, rows.data() + r * row_stride);
      for (int64_t num_rows = 1; num_rows <= kMaxRows; ++num_rows) {
        std::vector<float> result(num_rows * kStride, -7.0f);
        const float scale = 1.0f;
        GemmTask task{rows.data(), row_stride, num_rows, depth, operand, weight_dtype};
        for (int block = 0; block < 2; ++block) {
          const int64_t first = block * kColumns * depth;
          task.weight[block] = {static_cast<const char*>(weights) + dtype_bytes(weight_dtype, first), 1,
                                depth};
          task.columns[block] = kColumns;
          task.scale[block] = {&scale, 0, 0, 0, 0};
        }
        task.second_block = kColumns;
        task.result = result.data();
        task.result_stride = kStride;
        task.scratch = scratch.data();
        kernels().gemm(task);
        for (int64_t i = 0; i < num_rows * kStride; ++i) {
          const float expected = i % kStride < 2 * kColumns ? static_cast<float>(depth) : -7.0f;
          CHECK(result[i] == expected, "weights %d, depth %d, %d rows: row %d, column %d is %g",
                static_cast<int>(weight_dtype), static_cast<int>(depth), static_cast<int>(num_rows),
                static_cast<int>(i / kStride), static_cast<int>(i % kStride), result[i]);
        }
      }
    }
  }
}

#if defined(__x86_64__)
// Bits are the same on all threads, whatever the caller's makes of subnormal numbers; also where the threads
// of the pool are started while it takes them for zero, so this must be the first to use them.
void subnormal_numbers() {
  Random random(11);
  const unsigned as_they_are = __builtin_ia32_stmxcsr(), as_zero = as_they_are | 0x8040;
  for (DType dtype : {DType::kFloat32, DType::kFloat16}) {
    for (bool permuted : {false, true}) {
      // 150: the last columns are no whole vector.
      const Layer layer(random, 64, 150, 150, 4, 2, dtype, Layout::kList, permuted);
      for (const auto& down : layer.arguments.down_weights) {
        auto* bytes = static_cast<unsigned char*>(const_cast<void*>(down.data));
        for (int64_t i = 0; i < 150 * 150; ++i) {
          const float tiny = get(bytes, dtype, i) * (dtype == DType::kFloat32 ? 0x1p-140f : 0x1p-20f);
          if (dtype == DType::kFloat32) {
            std::memcpy(bytes + 4 * i, &tiny, 4);
          } else {
            const uint16_t half = paddle_moe::cpu::float_to_f16(tiny);
            std::memcpy(bytes + 2 * i, &half, 2);
          }
        }
      }
      __builtin_ia32_ldmxcsr(as_zero);
      const Result other = run(layer, 3);
      CHECK(__builtin_ia32_stmxcsr() >> 6 == as_zero >> 6, "the caller's mode became another");
      __builtin_ia32_ldmxcsr(as_they_are);
      const size_t bytes = 64 * 150 * paddle_moe::dtype_size(dtype);
      int not_zero = 0;
      for (int64_t i = 0; i < 64 * 150; ++i) not_zero += get(other.out.get(), dtype, i) != 0.0f;
      CHECK(not_zero > 1000, "%d of the results are not zero", not_zero);
      for (const int threads : {1, 3, 3, 3}) {
        const Result result = run(layer, threads);
        CHECK(std::memcmp(result.out.get(), other.out.get(), bytes) == 0, "%s permuted %d, %d threads",
              paddle_moe::dtype_name(dtype), permuted, threads);
      }
    }
  }
}
#endif

// The loops that measure the limits of the machine do what they are counted for.
void loops_of_the_limits() {
  using paddle_moe::cpu::kernels;
  constexpr int64_t kCount = 4096, kLine = 16;
  std::vector<float> data(kCount, 1.0f);
  // Of a sum per lane the loop returns that of the first.
  const float all = kernels().read_loop(data.data(), kCount, 1);
  CHECK(all == kCount / 4 || all == kCount / 8 || all == kCount / 16, "%g of 4096 ones", all);
  for (const int64_t streams : {1, 2, 4}) {
    for (int64_t i = 0; i < kCount; i += kLine) {
      data[i] = 3.0f;
      const float sum = kernels().read_loop(data.data(), kCount, streams);
      CHECK(sum == all + 2.0f, "line %d is read %g times, %d streams", static_cast<int>(i / kLine),
            (sum - all) / 2, static_cast<int>(streams));
      data[i] = 1.0f;
    }
  }
  // Chain i begins with i and goes to 1 by a factor of 0.999.
  const int chains = kernels().multiply_add_flops / 2 / static_cast<int>(kCount / all);
  for (const int iterations : {0, 1, 700}) {
    double expected = 0;
    for (int i = 0; i < chains; ++i) expected += 1 + (i - 1) * std::pow(0.999, iterations);
    const float sum = kernels().multiply_add_loop(iterations);
    CHECK(std::abs(sum - expected) < 1e-3 * expected, "%g instead of %g after %d", sum, expected, iterations);
  }
}

}  // namespace

int main() {
  on_every_isa([] {
#if defined(__x86_64__)
    subnormal_numbers();
#endif
    small_shapes();
    past_block_sizes();
    quantised();
    prepacked();
    quantised_and_prepacked();
    ids_at_the_limits();
    chunks();
    results_stay_in_their_blocks();
    blocks_fit_their_scratch();
    threads_worth_waking();
    loops_of_the_limits();
  });
  return finish();
}
