// Lanes of AVX-512 with VNNI; what they offer is said in dots.inl.
#pragma once

#include <immintrin.h>

#include "cpu/dots.h"

namespace almostgpt::cpu {
namespace {

struct Lanes {
  using Floats = __m512;
  using Integers = __m512i;
  static constexpr int kFloats = 16, kIntegers = 32, kRows = 4;

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Floats repeat(float x) { return _mm512_set1_ps(x); }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static float total(Floats a) { return _mm512_reduce_add_ps(a); }

  static Integers zero_integers() { return _mm512_setzero_si512(); }
  static Integers widen(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Integers load(const int16_t* p) { return _mm512_loadu_si512(p); }
  static Integers multiply_add_pairs(Integers a, Integers b, Integers sum) {
    return _mm512_dpwssd_epi32(sum, a, b);
  }
  static Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
  static int64_t total(Integers a) {
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(a));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(a, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
  }
};

}  // namespace
}  // namespace almostgpt::cpu
