// The source of attention.h, for the lanes of one instruction set: see dots.inl.

#include <cstring>

#include "cpu/attention.h"

namespace almostgpt::cpu {
namespace {

// VECTORS times kFloats columns of ROWS rows, with the sums in registers while the keys pass by.
template <int ROWS, int VECTORS, class Value>
inline void add_weighted_columns(const float* weights, int64_t weights_stride, const Value* values, int64_t keys,
                                 int64_t columns, float* sums) {
  Lanes::Floats total[ROWS][VECTORS];
  for (auto& row : total)
    for (auto& sum : row) sum = Lanes::zero();
  for (int64_t n = 0; n < keys; ++n) {
    Lanes::Floats weight[ROWS];
    for (int r = 0; r < ROWS; ++r) weight[r] = Lanes::repeat(weights[r * weights_stride + n]);
    for (int i = 0; i < VECTORS; ++i) {
      const Lanes::Floats value = Lanes::load(values + n * columns + i * Lanes::kFloats);
      for (int r = 0; r < ROWS; ++r) total[r][i] = Lanes::multiply_add(weight[r], value, total[r][i]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < VECTORS; ++i) {
      float* const sum = sums + r * columns + i * Lanes::kFloats;
      Lanes::store(sum, Lanes::add(Lanes::load(sum), total[r][i]));
    }
}

template <int ROWS, class Value>
inline void add_weighted_rows(const float* weights, int64_t weights_stride, const Value* values, int64_t keys,
                              int64_t columns, float* sums) {
  constexpr int vectors = 4;
  int64_t c = 0;
  for (; c + vectors * Lanes::kFloats <= columns; c += vectors * Lanes::kFloats)
    add_weighted_columns<ROWS, vectors>(weights, weights_stride, values + c, keys, columns, sums + c);
  for (; c < columns; c += Lanes::kFloats)
    add_weighted_columns<ROWS, 1>(weights, weights_stride, values + c, keys, columns, sums + c);
}

template <class Value>
void add_weighted(const float* weights, int64_t weights_stride, int64_t rows, const Value* values, int64_t keys,
                  int64_t columns, float* sums) {
  int64_t r = 0;
  for (; r + Lanes::kRows <= rows; r += Lanes::kRows)
    add_weighted_rows<Lanes::kRows>(weights + r * weights_stride, weights_stride, values, keys, columns,
                                    sums + r * columns);
  for (; r < rows; ++r)
    add_weighted_rows<1>(weights + r * weights_stride, weights_stride, values, keys, columns, sums + r * columns);
}

// e^x for x <= 0, to 2^-23 of it; 0 below -87, and NaN of NaN. x = n ln 2 + r with |r| <= ln 2 / 2, and a
// polynomial of r. Source of the coefficients: Cephes, expf.c.
inline float exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: n is in the lowest bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;  // 2^n
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

float exponentials(float* scores, int64_t count, float largest) {
  constexpr int lanes = 16;  // beside each other, so that the loops become vectors
  float sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      scores[i + lane] = exponential(scores[i + lane] - largest);
      sums[lane] += scores[i + lane];
    }
  for (; i < count; ++i) {
    scores[i] = exponential(scores[i] - largest);
    sums[0] += scores[i];
  }
  float sum = 0.0f;
  for (const float lane : sums) sum += lane;
  return sum;
}

inline float multiply_add(float a, float b, float sum) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, sum);
#else
  return a * b + sum;
#endif
}

void turn(const float* x, const float* cosines, const float* sines, int64_t half, float* y) {
  for (int64_t i = 0; i < half; ++i) {
    y[i] = multiply_add(-x[i + half], sines[i], x[i] * cosines[i]);
    y[i + half] = multiply_add(x[i], sines[i], x[i + half] * cosines[i]);
  }
}

constexpr AttentionKernels kAttention{add_weighted<float>, add_weighted<int8_t>, exponentials, turn};

}  // namespace
}  // namespace almostgpt::cpu
