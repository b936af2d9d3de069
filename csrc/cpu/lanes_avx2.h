// Lanes of AVX2 and FMA; what they offer is said in dots.inl.
#pragma once

#include <immintrin.h>

#include "cpu/dots.h"

namespace almostgpt::cpu {
namespace {

struct Lanes {
  using Floats = __m256;
  using Integers = __m256i;
  static constexpr int kFloats = 8, kIntegers = 16, kRows = 2;

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Floats repeat(float x) { return _mm256_set1_ps(x); }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static float total(Floats a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  static Integers zero_integers() { return _mm256_setzero_si256(); }
  static Integers widen(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Integers load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Integers multiply_add_pairs(Integers a, Integers b, Integers sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }
  static Integers add(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
  static int64_t total(Integers a) {
    const __m256i sums = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(a)),
                                          _mm256_cvtepi32_epi64(_mm256_extracti128_si256(a, 1)));
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return _mm_extract_epi64(two, 0) + _mm_extract_epi64(two, 1);
  }
};

}  // namespace
}  // namespace almostgpt::cpu
