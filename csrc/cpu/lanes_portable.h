// Lanes of plain C++, which a compiler puts into the vectors that every processor of its kind has (SSE2,
// NEON); what they offer is said in dots.inl.
#pragma once

#include <cstring>

#include "cpu/dots.h"

namespace almostgpt::cpu {
namespace {

struct Lanes {
  struct Floats {
    float lane[4];
  };
  struct Integers {  // of 16 bits as they are loaded, of 32 bits in sums
    int32_t lane[8];
  };
  static constexpr int kFloats = 4, kIntegers = 8, kRows = 1;

  static Floats zero() { return {}; }
  static Floats load(const float* p) {
    Floats result;
    std::memcpy(result.lane, p, sizeof(result.lane));
    return result;
  }
  static Floats load(const bf16* p) {
    Floats result;
    for (int i = 0; i < kFloats; ++i) {
      const uint32_t bits = static_cast<uint32_t>(p[i].bits) << 16;
      std::memcpy(&result.lane[i], &bits, sizeof(bits));
    }
    return result;
  }
  static Floats load(const int8_t* p) {
    Floats result;
    for (int i = 0; i < kFloats; ++i) result.lane[i] = p[i];
    return result;
  }
  static Floats repeat(float x) { return {{x, x, x, x}}; }
  static void store(float* p, Floats a) { std::memcpy(p, a.lane, sizeof(a.lane)); }
  static Floats multiply_add(Floats a, Floats b, Floats sum) {
    for (int i = 0; i < kFloats; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
  }
  static Floats add(Floats a, Floats b) {
    for (int i = 0; i < kFloats; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static float total(Floats a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }

  static Integers zero_integers() { return {}; }
  template <class Integer> static Integers widen(const Integer* p) {
    Integers result;
    for (int i = 0; i < kIntegers; ++i) result.lane[i] = p[i];
    return result;
  }
  static Integers load(const int16_t* p) { return widen(p); }
  static Integers multiply_add_pairs(Integers a, Integers b, Integers sum) {
    for (int i = 0; i < kIntegers; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
  }
  static Integers add(Integers a, Integers b) {
    for (int i = 0; i < kIntegers; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static int64_t total(Integers a) {
    int64_t sum = 0;
    for (const int32_t lane : a.lane) sum += lane;
    return sum;
  }
};

}  // namespace
}  // namespace almostgpt::cpu
