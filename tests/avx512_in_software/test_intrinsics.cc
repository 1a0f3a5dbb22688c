// avx512.h against values worked out by hand, the processor's own instructions for half a vector, and the
// scalar conversions.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/kernels_prelude.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {
using namespace paddle_moe::cpu;
#define PADDLE_MOE_AVX512_BF16
#include "avx512.h"

// 0, 1, 2 ... from `first` on.
Floats16 count_from(int first) {
  Floats16 v;
  for (int i = 0; i < 16; ++i) v[i] = static_cast<float>(first + i);
  return v;
}

Floats16 floats(const float (&array)[16]) { return bits_as<Floats16>(array); }

template <class T, int kCount>
void check_equal(const char* what, const Elements<T, kCount>& got, const Elements<T, kCount>& expected) {
  for (int i = 0; i < kCount; ++i)
    CHECK(std::memcmp(&got.at[i], &expected.at[i], sizeof(T)) == 0, "%s [%d] is %g, expected %g", what, i,
          static_cast<double>(got[i]), static_cast<double>(expected[i]));
}

void check_floats(const char* what, __m512 got, const Floats16& expected) {
  check_equal<float, 16>(what, got, expected);
}

template <class Instruction>
Floats16 by_halves(__m512 a, __m512 b, Instruction instruction) {
  __m256 halves[2];
  for (int i = 0; i < 2; ++i)
    halves[i] = instruction(_mm512_extractf32x8_ps(a, i), _mm512_extractf32x8_ps(b, i));
  return bits_as<Floats16>(halves);
}

void shuffles() {
  const __m512 a = count_from(0), b = count_from(16);
  check_floats("unpacklo", _mm512_unpacklo_ps(a, b),
               by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_unpacklo_ps(x, y); }));
  check_floats("unpackhi", _mm512_unpackhi_ps(a, b),
               by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_unpackhi_ps(x, y); }));
  check_floats("shuffle_ps 0x44", _mm512_shuffle_ps(a, b, 0x44),
               by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0x44); }));
  check_floats("shuffle_ps 0xee", _mm512_shuffle_ps(a, b, 0xee),
               by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0xee); }));
  check_floats("shuffle_ps 0x87", _mm512_shuffle_ps(a, b, 0x87),
               by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0x87); }));
  check_floats("shuffle_f32x4 0x88", _mm512_shuffle_f32x4(a, b, 0x88),
               floats({0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}));
  check_floats("shuffle_f32x4 0xdd", _mm512_shuffle_f32x4(a, b, 0xdd),
               floats({4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}));
  check_floats("shuffle_f32x4 0x63", _mm512_shuffle_f32x4(a, b, 0x63),
               floats({12, 13, 14, 15, 0, 1, 2, 3, 24, 25, 26, 27, 20, 21, 22, 23}));
  const __m256 low = _mm512_castps512_ps256(a), high = _mm512_extractf32x8_ps(a, 1);
  for (int i = 0; i < 8; ++i) CHECK(low[i] == i && high[i] == 8 + i, "halves of a vector");

  Halves32 x, y, indices, expected;
  for (int i = 0; i < 32; ++i) {
    x[i] = static_cast<uint16_t>(1000 + i);
    y[i] = static_cast<uint16_t>(2000 + i);
    indices[i] = static_cast<uint16_t>(64 * i + 63 - i);  // the bits from the seventh on are ignored
    expected[i] = static_cast<uint16_t>(2031 - i);
  }
  indices[3] = 5, expected[3] = 1005;
  indices[4] = 31, expected[4] = 1031;
  indices[5] = 32, expected[5] = 2000;
  check_equal<uint16_t, 32>("permutex2var", _mm512_permutex2var_epi16(x, indices, y), expected);
  for (int i = 0; i < 32; ++i) expected[i] = static_cast<uint16_t>(1031 - i);
  expected[3] = 1005, expected[4] = 1031, expected[5] = 1000;
  check_equal<uint16_t, 32>("permutexvar", _mm512_permutexvar_epi16(indices, x), expected);
}

void memory() {
  alignas(64) float data[33];
  for (int i = 0; i < 33; ++i) data[i] = static_cast<float>(i);
  check_floats("loadu", _mm512_loadu_ps(data + 1), count_from(1));
  check_equal<float, 16>("load_si512", _mm512_load_si512(data + 16), count_from(16));
  const std::vector<float> three = {1, 2, 3};  // AddressSanitizer sees a fourth read
  check_floats("maskz_loadu", _mm512_maskz_loadu_ps(7, three.data()), floats({1, 2, 3}));
  check_floats("maskz_loadu", _mm512_maskz_loadu_ps(0x8002, data),
               floats({0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 15}));
  _mm512_storeu_ps(data + 1, count_from(100));
  CHECK(data[0] == 0 && data[1] == 100 && data[16] == 115 && data[17] == 17, "storeu");
  _mm512_stream_ps(data + 16, _mm512_set1_ps(-2));
  CHECK(data[15] == 114 && data[16] == -2 && data[31] == -2 && data[32] == 32, "stream, set1");
}

// 0x8000 has every bit of its own, so that all are seen to be where they belong.
void integers() {
  Ints16 wide;
  Halves16 halves, low;
  for (int i = 0; i < 16; ++i) {
    halves[i] = static_cast<uint16_t>(0x8001 + 257 * i);
    wide[i] = 0xabcd0000u + 0x10001u * halves[i];
    low[i] = halves[i];
  }
  __m256i eight[2] = {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(halves)),
                      _mm256_cvtepu16_epi32(_mm256_extracti128_si256(halves, 1))};
  check_equal<uint32_t, 16>("cvtepu16", _mm512_cvtepu16_epi32(halves), bits_as<Ints16>(eight));
  for (__m256i& v : eight) v = _mm256_slli_epi32(v, 16);
  check_equal<uint32_t, 16>("slli", _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16),
                            bits_as<Ints16>(eight));
  check_equal<uint32_t, 16>("slli 32", _mm512_slli_epi32(wide, 32), Ints16(__m512i{}));
  check_equal<uint16_t, 16>("cvtepi32", _mm512_cvtepi32_epi16(wide), low);
  Elements<int8_t, 16> bytes;
  Floats16 floats;
  for (int i = 0; i < 16; ++i) {
    bytes[i] = static_cast<int8_t>(17 * i - 128);
    wide[i] = static_cast<uint32_t>(17 * i - 128);
    floats[i] = static_cast<float>(17 * i - 128);
  }
  check_equal<uint32_t, 16>("cvtepi8", _mm512_cvtepi8_epi32(bytes), wide);
  check_equal<float, 16>("cvtepi32_ps", _mm512_cvtepi32_ps(wide), floats);

  Elements<int8_t, 32> many;
  Elements<int16_t, 32> a, b;
  for (int i = 0; i < 32; ++i) {
    many[i] = static_cast<int8_t>(8 * i - 128);
    a[i] = static_cast<int16_t>(2117 * i - 32768);
    b[i] = static_cast<int16_t>(32767 - 1999 * i);
  }
  __m256i of_a[2], of_b[2], expected[2];
  std::memcpy(of_a, &a, sizeof a);
  std::memcpy(of_b, &b, sizeof b);
  for (int i = 0; i < 2; ++i) {
    __m128i part;
    std::memcpy(&part, &many[16 * i], sizeof part);
    expected[i] = _mm256_cvtepi8_epi16(part);
  }
  check_equal<uint16_t, 32>("cvtepi8_epi16", _mm512_cvtepi8_epi16(many), bits_as<Halves32>(expected));
  for (int i = 0; i < 2; ++i) expected[i] = _mm256_madd_epi16(of_a[i], of_b[i]);
  check_equal<uint32_t, 16>("madd_epi16", _mm512_madd_epi16(a, b), bits_as<Ints16>(expected));
  for (int i = 0; i < 2; ++i) expected[i] = _mm256_add_epi32(expected[i], of_b[i]);
  check_equal<uint32_t, 16>("dpwssd", _mm512_dpwssd_epi32(b, a, b), bits_as<Ints16>(expected));
  for (__m256i& half : expected) half = of_a[1];
  check_equal<uint32_t, 16>("broadcast_i64x4", _mm512_broadcast_i64x4(expected[0]),
                            bits_as<Ints16>(expected));
}

// Every fp16 number, and between two neighbours the middle and what lies on its sides.
void half_precision() {
  for (uint32_t first = 0; first < 0x10000; first += 16) {
    Halves16 halves;
    for (int i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(first + i);
    const Floats16 values = _mm512_cvtph_ps(halves);
    for (int i = 0; i < 16; ++i) {
      const float expected = f16_to_float(halves[i]);
      CHECK(values[i] == expected || (std::isnan(values[i]) && std::isnan(expected)), "cvtph %04x is %g",
            halves[i], values[i]);
    }
    if ((first & 0x7fff) >= 0x7bf0) continue;  // next to infinity
    Floats16 middle, below, above;
    for (int i = 0; i < 16; ++i) {
      const float next = f16_to_float(static_cast<uint16_t>(halves[i] + 1));
      middle[i] = (values[i] + next) / 2;
      below[i] = std::nextafterf(middle[i], values[i]);
      above[i] = std::nextafterf(middle[i], next);
    }
    for (const Floats16& v : {values, middle, below, above}) {
      Halves16 expected;
      for (int i = 0; i < 16; ++i) expected[i] = float_to_f16(v[i]);
      check_equal<uint16_t, 16>("cvtps", _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), expected);
    }
  }
}

void multiply_add() {
  // Rounded, the product is 1 + 2^-11, and nothing is left of it.
  const float x = 1 + 0x1p-12f;
  check_floats("fmadd", _mm512_fmadd_ps(_mm512_set1_ps(x), _mm512_set1_ps(x), _mm512_set1_ps(-1 - 0x1p-11f)),
               _mm512_set1_ps(0x1p-24f));
  const __m512 a = count_from(3), b = count_from(-8), c = count_from(1000);
  check_floats("fmadd", _mm512_fmadd_ps(a, b, c), by_halves(a, b, [](__m256 p, __m256 q) {
                 return _mm256_add_ps(_mm256_mul_ps(p, q), _mm256_add_ps(_mm256_set1_ps(997), p));
               }));
}

void rounding_to_bf16() {
  Floats16 low = count_from(-100), high = count_from(1);
  Halves32 expected;
  for (int i = 0; i < 16; ++i) {
    expected[i] = static_cast<uint16_t>(float_to_bits(low[i]) >> 16);
    expected[16 + i] = static_cast<uint16_t>(float_to_bits(high[i]) >> 16);
  }
  low[0] = 1 + 0x1p-8f, expected[0] = 0x3f80;  // ties to even
  low[1] = 1 + 3 * 0x1p-8f, expected[1] = 0x3f82;
  low[2] = 1 + 0x1.1p-8f, expected[2] = 0x3f81;
  low[3] = -0x1.8p-127f, expected[3] = 0x8000;
  low[4] = 0x1p-126f, expected[4] = 0x0080;
  low[5] = std::numeric_limits<float>::infinity(), expected[5] = 0x7f80;
  low[6] = std::numeric_limits<float>::max(), expected[6] = 0x7f80;
  low[7] = bits_to_float(0x7f800001), expected[7] = 0x7fc0;
  check_equal<uint16_t, 32>("cvtne2ps", _mm512_cvtne2ps_pbh(high, low), expected);
}

// One lane of VDPBF16PS: c + high[0] * high[1] + low[0] * low[1].
float dot(float c, std::pair<float, float> high, std::pair<float, float> low) {
  auto pairs = [](float high_half, float low_half) {
    const uint32_t bits = static_cast<uint32_t>(float_to_bf16(high_half)) << 16 | float_to_bf16(low_half);
    Ints16 v;
    for (int i = 0; i < 16; ++i) v[i] = i == 5 ? bits : 0u;
    return bits_as<__m512bh>(v);
  };
  Floats16 sum = count_from(20);
  sum[5] = c;
  const Floats16 got = _mm512_dpbf16_ps(sum, pairs(high.first, low.first), pairs(high.second, low.second));
  sum[5] = got[5];
  check_equal("dpbf16, the other lanes", got, sum);
  return got[5];
}

void bf16_products() {
  const float kInfinity = std::numeric_limits<float>::infinity(), kSmallest = 0x1p-126f;
  const struct {
    const char* what;
    float got, expected;
  } cases[] = {
      {"sum", dot(3, {2, 5}, {7, 11}), 90},
      {"high half first, rounded", dot(1, {0x1p24f, 1}, {0x1p24f, -1}), 0},
      {"low half last", dot(1, {0x1p24f, -1}, {0x1p24f, 1}), 1},
      {"the products are not added to each other first", dot(0x1p24f, {1, 1}, {1, 1}), 0x1p24f},
      {"ties to even", dot(0x1p24f, {3, 1}, {0, 0}), 0x1p24f + 4},
      {"fused: no overflow in between", dot(-0x1p127f, {0x1p64f, 0x1p64f}, {0, 0}), 0x1p127f},
      {"overflow", dot(0x1p127f, {0x1p64f, 0x1p63f}, {0, 0}), kInfinity},
      {"infinite", dot(0, {-kInfinity, 2}, {1, 1}), -kInfinity},
      {"subnormal high factor", dot(0, {0x1p-127f, 0x1p120f}, {0, 0}), 0},
      {"subnormal low factor", dot(0, {0, 0}, {0x1p120f, 0x1p-133f}), 0},
      {"subnormal negative factor", dot(-0.0f, {-0x1p-127f, 0x1p120f}, {-0.0f, 1}), -0.0f},
      {"smallest normal factor", dot(0, {kSmallest, 0x1p120f}, {0, 0}), 0x1p-6f},
      {"subnormal addend", dot(kSmallest / 2, {1, 0x1p-126f}, {0, 0}), kSmallest},
      {"subnormal result", dot(0, {0, 0}, {0x1p-64f, 0x1p-63f}), 0},
      {"subnormal negative result", dot(-0.0f, {-0.0f, 1}, {-0x1p-64f, 0x1p-63f}), -0.0f},
      {"subnormal result of the high half", dot(0, {0x1p-64f, 0x1p-63f}, {0x1p-64f, 0x1p-63f}), 0},
      {"smallest normal result", dot(0, {0x1p-63f, 0x1p-63f}, {0, 0}), kSmallest},
      // With 24 bits and any exponent the first is 2^-126 - 2^-150, the second 2^-126.
      {"just tiny", dot(kSmallest, {-0x1p-75f, 0x1p-75f}, {0, 0}), 0},
      {"not tiny any more", dot(kSmallest, {-0x1p-75f, 0x1p-76f}, {0, 0}), kSmallest},
  };
  for (const auto& c : cases)
    CHECK(float_to_bits(c.got) == float_to_bits(c.expected), "%s: %a, expected %a", c.what, c.got,
          c.expected);
  CHECK(std::isnan(dot(0, {kInfinity, 0}, {1, 1})) && std::isnan(dot(0, {1, 1}, {NAN, 1})), "NaN");
  CHECK(std::isnan(dot(0, {kInfinity, 0x1p-127f}, {1, 1})), "a subnormal factor is zero for infinity too");
}

}  // namespace

#ifdef __clang__
#pragma clang attribute pop
#endif

int main() {
  const std::vector<std::string> isas = available_isas();
  if (isas == std::vector<std::string>{"generic"}) {
    std::printf("left out: this processor has no AVX2, FMA and F16C\n");
    return 0;
  }
  CHECK(isas == (std::vector<std::string>{"avx512_bf16", "avx512", "avx2", "generic"}), "the first is %s",
        isas.front().c_str());
  shuffles();
  memory();
  integers();
  half_precision();
  multiply_add();
  rounding_to_bf16();
  bf16_products();
  return finish();
}
