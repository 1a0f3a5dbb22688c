// Conversions of bf16 and fp16, for all 65536 numbers of each and for what lies between them.
#include <cmath>

#include "check.h"
#include "cpu/float_formats.h"

using namespace paddle_moe::cpu;

namespace {

// Between two neighbours: nearer goes to the nearer one, the middle to the one whose last bit is 0.
template <class Widen, class Narrow>
void check(const char* name, uint16_t infinity, Widen widen, Narrow narrow) {
  for (uint32_t sign : {0u, 0x8000u}) {
    for (uint32_t bits = 0; bits < 0x8000; ++bits) {
      const uint16_t half = static_cast<uint16_t>(sign | bits);
      const float value = widen(half);
      if (bits > infinity) {
        CHECK(std::isnan(value) && std::isnan(widen(narrow(value))), "%s NaN %04x", name, half);
        continue;
      }
      CHECK(narrow(value) == half, "%s %04x became %04x", name, half, narrow(value));
      if (bits >= infinity - 1u) continue;
      const uint16_t next = half + 1;
      const float middle = static_cast<float>((static_cast<double>(value) + widen(next)) / 2);
      CHECK(narrow(middle) == (half & 1 ? next : half), "%s middle above %04x", name, half);
      CHECK(narrow(std::nextafterf(middle, value)) == half, "%s below the middle above %04x", name, half);
      CHECK(narrow(std::nextafterf(middle, widen(next))) == next, "%s above the middle above %04x", name,
            half);
    }
  }
}

}  // namespace

int main() {
  check("bf16", 0x7f80, bf16_to_float, float_to_bf16);
  check("fp16", 0x7c00, f16_to_float, float_to_f16);
  CHECK(
      f16_to_float(0x3c00) == 1 && f16_to_float(0x7bff) == 65504 && f16_to_float(1) == std::ldexp(1.0f, -24),
      "fp16");
  CHECK(float_to_f16(65519.996f) == 0x7bff && float_to_f16(65520) == 0x7c00 && float_to_f16(-1e30f) == 0xfc00,
        "fp16");
  CHECK(bf16_to_float(0x3f80) == 1 && float_to_bf16(3.4e38f) == 0x7f80 && float_to_bf16(-HUGE_VALF) == 0xff80,
        "bf16");
  return finish();
}
