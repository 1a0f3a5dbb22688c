// bf16, fp16 and fp8 in scalar code: what the vector code does for whole vectors, for single elements.
#pragma once

#include <cstdint>
#include <cstring>

namespace paddle_moe {
namespace cpu {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bf16_to_float(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(239u << 23)));
}

// Rounds to nearest, ties to even; values beyond the range become infinite; a NaN stays a NaN.
inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and above
  if (magnitude < 0x38800000) {
    // Below the smallest normal: adding 0.5 leaves the subnormal, rounded, in the low bits.
    return sign | static_cast<uint16_t>(float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f));
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// fp16 of the same bits: the value of an fp8 e4m3 number times 2^-8, or a NaN.
inline uint16_t fp8_to_half(uint8_t bits) {
  const unsigned magnitude = bits & 0x7fu;
  return static_cast<uint16_t>((bits & 0x80u) << 8 | (magnitude == 0x7f ? 0x7e00u : magnitude << 7));
}

}  // namespace cpu
}  // namespace paddle_moe
