// 16-bit floats and the fast maths of the hardware, in software.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace almostgpt::emulator {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

constexpr uint16_t kNaN16 = 0x7fff;  // what cvt gives for every NaN

// To the nearest, ties to even, as cvt.rn.
inline uint16_t bf16_bits(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return kNaN16;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_value(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

inline uint16_t fp16_bits(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return kNaN16;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to infinity
  if (magnitude >= 0x38800000) {  // normal: 13 bits of the mantissa go
    const uint32_t rebased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
  }
  // Subnormal: a multiple of 2^-24, to which the float adder rounds.
  const float rounded = float_of(magnitude) + 0.5f;  // 0.5 has the last bit 2^-24
  return static_cast<uint16_t>(sign | (bits_of(rounded) - bits_of(0.5f)));
}
inline float fp16_value(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
}

// Subnormals are 0, as .ftz has it.
inline float flushed(float x) {
  const uint32_t bits = bits_of(x);
  return bits & 0x7f800000 ? x : float_of(bits & 0x80000000);
}

// 1 / 0 is an infinity of that sign.
inline float reciprocal(float x) { return x == 0 ? std::copysign(INFINITY, x) : 1 / x; }

}  // namespace almostgpt::emulator
