#include "cpu/linear.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace almostgpt::cpu {
namespace {

constexpr int64_t kTileRows = 4;  // rows of x that pass a block of the weight together

Dots<float, float, float> float_dots(const DotKernels& kernels, const float*) { return kernels.float32; }
Dots<bf16, float, float> float_dots(const DotKernels& kernels, const bf16*) { return kernels.bfloat16; }

// Calls store(row, output, sum) for all rows and the outputs [begin, end).
template <class Weight, class X, class Sum, class Store>
void for_each_sum(Dots<Weight, X, Sum> dots, const LinearShape& shape, const X* x, int64_t x_stride,
                  const Weight* weight, int64_t begin, int64_t end, const Store& store) {
  const int64_t block = block_outputs(shape.inputs, sizeof(Weight));
  std::vector<Sum> sums(kTileRows * block);
  for (int64_t n = begin; n < end; n += block) {
    const int64_t outputs = std::min(block, end - n);
    for (int64_t row = 0; row < shape.rows; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, shape.rows - row);
      dots(weight + n * shape.inputs, outputs, shape.inputs, x + row * x_stride, x_stride, rows, sums.data(), block);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < outputs; ++i) store(row + r, n + i, sums[r * block + i]);
    }
  }
}

template <class T> T from_double(double x) { return from_float<T>(static_cast<float>(x)); }

}  // namespace

const DotKernels& dot_kernels(InstructionSet set) {
#if defined(ALMOSTGPT_X86_64)
  if (set == InstructionSet::avx512) return kAvx512Dots;
  if (set == InstructionSet::avx2) return kAvx2Dots;
#endif
  (void)set;
  return kPortableDots;
}

int64_t block_outputs(int64_t inputs, int64_t weight_bytes) {
  constexpr int64_t cache = 16 << 10;
  return std::clamp<int64_t>(cache / std::max<int64_t>(1, inputs * weight_bytes), 4, 64);
}

template <class T>
void linear_part(const DotKernels& kernels, const LinearShape& shape, const float* x, int64_t x_stride,
                 const T* weight, const T* bias, T* y, int64_t begin, int64_t end) {
  for_each_sum(float_dots(kernels, weight), shape, x, x_stride, weight, begin, end,
               [&](int64_t row, int64_t n, float sum) {
                 y[row * shape.outputs + n] = from_float<T>(bias ? sum + to_float(bias[n]) : sum);
               });
}

template <class T>
void quantize_rows(const T* x, int64_t x_stride, int64_t rows, int64_t columns, int16_t* codes, double* scales) {
  for (int64_t row = 0; row < rows; ++row, x += x_stride, codes += columns) {
    // Magnitudes are ordered as their bits are, those that are not finite above all others.
    uint32_t most = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const float value = to_float(x[k]);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      most = std::max(most, bits & 0x7fffffffu);
    }
    if (most == 0 || most >= 0x7f800000u) {
      std::memset(codes, 0, columns * sizeof(*codes));
      scales[row] = most == 0 ? 0.0 : std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    float largest;
    std::memcpy(&largest, &most, sizeof(largest));
    const double units = 32767.0 / largest;
    scales[row] = largest / 32767.0;
    for (int64_t k = 0; k < columns; ++k) {
      // 1.5 * 2^52: the sum has no room for a fraction, so it is rounded to even, and its lowest bits are
      // the number. The compiler makes vectors of it, which of lrint it does not.
      const double shifted = to_float(x[k]) * units + 6755399441055744.0;
      int64_t bits;
      std::memcpy(&bits, &shifted, sizeof(bits));
      codes[k] = static_cast<int16_t>(bits);
    }
  }
}

template <class T>
void int8_linear_part(const DotKernels& kernels, const LinearShape& shape, const int16_t* codes,
                      const double* x_scales, const int8_t* weight, const float* scales, const float* bias, T* y,
                      int64_t begin, int64_t end) {
  for_each_sum(kernels.int8, shape, codes, shape.inputs, weight, begin, end,
               [&](int64_t row, int64_t n, int64_t sum) {
                 const double value = static_cast<double>(sum) * (x_scales[row] * scales[n]);
                 y[row * shape.outputs + n] = from_double<T>(bias ? value + bias[n] : value);
               });
}

float to_float(float x) { return x; }

float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <> float from_float(float x) { return x; }

template <> bf16 from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // rounded, a NaN could become infinite
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

#define ALMOSTGPT_INSTANTIATE(T)                                                                              \
  template void linear_part(const DotKernels&, const LinearShape&, const float*, int64_t, const T*, const T*, \
                            T*, int64_t, int64_t);                                                            \
  template void quantize_rows(const T*, int64_t, int64_t, int64_t, int16_t*, double*);                        \
  template void int8_linear_part(const DotKernels&, const LinearShape&, const int16_t*, const double*,        \
                                 const int8_t*, const float*, const float*, T*, int64_t, int64_t);
ALMOSTGPT_INSTANTIATE(float)
ALMOSTGPT_INSTANTIATE(bf16)
#undef ALMOSTGPT_INSTANTIATE

}  // namespace almostgpt::cpu
